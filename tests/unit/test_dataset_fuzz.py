"""Datasets with a mutated file: they read as before or say what is wrong, and verify finds what has changed."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from grn_scale.config.data_schema import DataConfig
from grn_scale.data.dataset import Dataset
from grn_scale.data.mixture import Mixture
from grn_scale.data.plan import Plan
from grn_scale.data_pipeline.damage import find_damage
from grn_scale.data_pipeline.index_repair import repair
from grn_scale.errors import UserError
from grn_scale.storage import Storage
from tests.helpers.mutations import MUTATIONS
from tests.helpers.token_dataset import write_tokens

SHARDS = 3


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    write_tokens(folder, range(SHARDS))
    return folder, read_all(folder)


def read_all(folder: Path) -> dict:
    """All that a run reads of a dataset, and the plan of its first step."""
    dataset = Dataset.open(folder)
    rows = [dataset.locate(number) for number in range(dataset.info.samples)]
    columns = [dataset.columns(shard) for shard in range(len(dataset.shard_sizes))]
    data = DataConfig(dataset=str(folder), token_budget=256, packs_per_step=4)
    plan = Plan.of(Mixture.open(data), data, 0)
    packs, _ = plan.next_step(plan.state_at(0, 4), 4)
    return {"info": dataset.info, "rows": rows, "lengths": [len(part) for part in columns], "packs": packs,
            "bits": [dataset.read_bits(row).tobytes() for row in rows],
            "texts": [(dataset.read_text(ref).tolist(), dataset.read_text_ids(ref))
                      for row in rows for caption in row.captions for ref in caption.texts.values()]}


def mutate(folder: Path, seed: int) -> tuple[Path, str]:
    """One changed file of the dataset, and how it was changed."""
    draw = random.Random(seed)
    kind = draw.choice(("*.tar", "index/video*", "index/text*", "index/snapshot*", "dataset.json"))
    path = draw.choice(sorted(folder.glob(kind)))
    before = path.read_bytes()
    others = [other.read_bytes() for other in sorted(folder.rglob("*")) if other.is_file() and other != path]
    mutation = draw.choice(MUTATIONS)
    path.write_bytes(mutation(draw, before, others))
    return path, mutation.__name__ if path.read_bytes() != before else ""


def check(folder: Path, wanted: dict, seed: int) -> None:
    path, mutation = mutate(folder, seed)
    about = f"seed {seed}: {path.relative_to(folder)} {mutation}"
    try:
        found = read_all(folder)
    except UserError:
        found = None
    if found is not None:
        assert all(found[name] == wanted[name] for name in ("rows", "lengths", "bits", "texts")), about
    try:
        damage = list(find_damage(folder))
    except UserError as error:
        damage = [error]
    if path.name.startswith(("video", "text")):
        assert bool(damage) == bool(mutation), about
    else:
        assert damage or found == wanted, about
    for dry_run in (True, False):
        try:
            repair(Storage.of(folder), dry_run)
        except UserError:
            continue


def run(sound: tuple[Path, dict], root: Path, seeds: range) -> None:
    folder, wanted = sound
    for seed in seeds:
        check(Path(shutil.copytree(folder, root / "mutated")), wanted, seed)
        shutil.rmtree(root / "mutated")


def test_a_mutated_dataset_reads_as_before_or_says_what_is_wrong(sound, tmp_path):
    run(sound, tmp_path, range(40))


@pytest.mark.slow
def test_many_mutated_datasets_read_as_before_or_say_what_is_wrong(sound, tmp_path):
    run(sound, tmp_path, range(40, 1000))
