"""`grn-scale evaluate` divided over processes: the same result, to the last byte, as from one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.clips import caption, write_clip, write_manifest, write_text_encoder, write_tokenizer
from tests.helpers.evaluation import NETWORK_OPTIONS, command, write_network, write_run
from tests.helpers.rank_pool import RankPools

PROMPTS = 5


@pytest.fixture(scope="module")
def pools() -> Iterator[RankPools]:
    """Processes of this file's own: the command joins them itself, and leaves."""
    started = RankPools()
    yield started
    started.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    clips = [{"path": str(write_clip(folder / f"clips/{n}.mp4", n)), "caption": caption(n)} for n in range(10)]
    write_manifest(folder / "clips.jsonl", [*clips, {"path": "nowhere.mp4", "caption": "none", "id": "gone"}])
    (folder / "prompts.txt").write_text("".join(f"{caption(n)}\n" for n in range(PROMPTS)))
    write_tokenizer(folder / "tokenizer.safetensors")
    write_text_encoder(folder / "text", PROMPTS)
    write_network(folder / "network.pt")
    write_run(folder)
    return folder


def everything(made: Path, output: Path) -> list[str]:
    return ["evaluate", "--run", f"{made}/run", "--reconstruct", f"data.manifest={made}/clips.jsonl", "--generate",
            "--prompts", f"{made}/prompts.txt", "--together", "2", f"text.encoder={made}/text", "--features",
            f"{made}/network.pt", *NETWORK_OPTIONS, "--real", f"{made}/clips.jsonl", "--save-statistics",
            f"{output}.npz", f"output={output}"]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_two_processes_give_what_one_gives(pools, made, tmp_path):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert command(everything(made, alone))[0] == 0
    answers = pools.run(2, "tests.helpers.evaluation:command", argv=everything(made, shared))
    assert [code for code, _ in answers] == [0, 0], answers
    one, two = content(alone), content(shared)
    result = json.loads(one.pop("evaluation.json"))
    other = json.loads(two.pop("evaluation.json"))
    for values, place in ((result, alone), (other, shared)):
        values["features"]["saved_statistics"] = str(values["features"]["saved_statistics"]).replace(str(place), "")
        values["features"]["samples"]["from"] = ""
    assert result == other
    assert one == two and len([name for name in one if name.startswith("samples/")]) == PROMPTS
    assert Path(f"{alone}.npz").read_bytes() == Path(f"{shared}.npz").read_bytes()
    assert result["generated"]["samples"] == PROMPTS and result["reconstruction"]["clips"] == 10
    assert result["reconstruction"]["undecodable_clips"] == 1 and "gone" in one["reconstruction.jsonl"].decode()
    assert result["features"]["frechet_distance"] > 0 and result["features"]["real"]["unusable"][0]["id"] == "gone"


def patience() -> tuple[float, bool]:
    """Seconds that the processes wait for each other, and whether a group is left afterwards."""
    import torch
    import torch.distributed as dist

    from grn_scale.evaluation.job import processes

    with processes() as ranks:
        seconds = ranks.group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    return seconds, dist.is_initialized()


def test_finished_processes_wait_for_days_in_a_group_that_goes_away(pools):
    assert pools.run(2, "tests.distributed.test_evaluation_ranks:patience") == [(2 * 86400, False)] * 2


def test_a_process_without_work_waits_for_nobody(pools, made, tmp_path):
    (tmp_path / "one.txt").write_text("a red square\n")
    argv = ["evaluate", "--run", f"{made}/run", "--generate", "--prompts", f"{tmp_path}/one.txt",
            f"text.encoder={made}/text", f"output={tmp_path}/out"]
    assert [code for code, _ in pools.run(2, "tests.helpers.evaluation:command", argv=argv)] == [0, 0]
    assert len(list((tmp_path / "out/samples").iterdir())) == 1


def test_what_fails_on_one_process_ends_all_with_its_reason(pools, made, tmp_path):
    argv = ["evaluate", "--run", f"{made}/run", "--generate", "--prompts", f"{made}/prompts.txt",
            f"text.encoder={made}/text", f"output={tmp_path}/out"]
    answers = pools.run(2, "tests.helpers.evaluation:command_without_file", argv=argv, missing=f"{made}/no_encoder")
    assert [code for code, _ in answers] == [1, 1]
    assert all("no_encoder" in told for _, told in answers)
    assert not list((tmp_path / "out").glob("parts-*")) and not (tmp_path / "out/evaluation.json").exists()


def test_measurements_of_one_process_refuse_several(pools, made, tmp_path):
    argv = ["evaluate", "--run", f"{made}/run", "--held-out", f"output={tmp_path}/out"]
    answers = pools.run(2, "tests.helpers.evaluation:command", argv=argv)
    assert [code for code, _ in answers] == [2, 2] and "one process" in answers[0][1]
