"""A whole job over files that were damaged in all kinds of ways: every line is a sample or has its reason."""

from __future__ import annotations

import json
import random

import pytest

from grn_scale.data.dataset import Dataset
from grn_scale.data_pipeline import verify
from tests.helpers.clips import write_clip
from tests.helpers.mutations import MUTATIONS
from tests.helpers.tokenize_setup import TokenizeSetup


def run(tmp_path, clips: int, seed: int, workers: int) -> tuple[int, int]:
    """Samples and quarantined lines of a job over `clips` damaged files and, in the manifest, damaged lines."""
    draw = random.Random(seed)
    setup = TokenizeSetup(tmp_path, clips=0)
    whole = [write_clip(tmp_path / f"whole/{i}.mp4", i, frames=9 + 4 * i).read_bytes() for i in range(3)]
    (tmp_path / "clips").mkdir()
    for i in range(clips):
        data = draw.choice(whole)
        (tmp_path / f"clips/{i}.mp4").write_bytes(draw.choice(MUTATIONS)(draw, data, whole))
    setup.lines = [{"path": f"clips/{i}.mp4", "caption": f"number {i}"} for i in range(clips)]
    for i in range(0, clips, 10):
        setup.lines[i] |= draw.choice(({"begin_frame": 5, "end_frame": 3}, {"caption": 7}, {"path": ""}, {"path": "/"},
                                       {"path": "clips"}, {"path": "a\0b"}, {"begin_frame": 10**12}, {"version": 9}))
    output = setup.run("hostile", **{"tokenize.max_bad_fraction": 1, "tokenize.workers": workers,
                                     "tokenize.shard_samples": max(3, clips // 8)})
    bad = [json.loads(line) for line in (output / "quarantine.jsonl").read_text().splitlines()]
    dataset = Dataset.open(output)
    captions = {len(row.captions) for shard in range(len(dataset.shard_sizes)) for row in dataset.rows(shard)}
    stored = sum(len(row.captions) for shard in range(len(dataset.shard_sizes)) for row in dataset.rows(shard))
    assert captions and stored + len(bad) == clips  # files that came out alike are one sample with several captions
    assert len({entry["line"] for entry in bad}) == len(bad) and all(entry["reason"] for entry in bad)
    assert not list(verify.find_damage(output))
    return dataset.info.samples, len(bad)


def test_a_job_over_damaged_files_ends_with_each_line_accounted_for(tmp_path):
    samples, bad = run(tmp_path, clips=30, seed=0, workers=1)
    assert samples and bad


@pytest.mark.slow
def test_a_job_over_a_thousand_damaged_files_ends_with_each_line_accounted_for(tmp_path, capsys):
    samples, bad = run(tmp_path, clips=1000, seed=1, workers=2)
    with capsys.disabled():
        print(f"\n{samples} samples, {bad} quarantined")
