"""The record of bad samples over several processes: what stops one stops all of them, for the same reason."""

from __future__ import annotations

import json
from pathlib import Path

from grn_scale.config.schema import ParallelConfig
from grn_scale.data.loader import BadSample
from grn_scale.errors import UserError
from grn_scale.train.bad_samples import FILE_NAME, BadSamples

HERE = "tests.distributed.test_bad_samples"


def record(folder: Path, limit: int, found: list[list[str]]) -> tuple[str, str]:
    """Kind and text of the error of a start whose process `rank` finds the keys found[rank] in step 1."""
    from megatron.core import parallel_state

    from grn_scale.checkpoint.ranks import Ranks
    from grn_scale.parallel import groups

    groups.start(ParallelConfig())
    ranks = Ranks(groups.host())
    try:
        BadSamples(folder, limit, [], ranks).add(1, [BadSample("video-000000.tar", key, "checksum", unreadable=False)
                                                     for key in found[ranks.rank]])
    except UserError as error:
        return type(error).__name__, str(error)
    finally:
        parallel_state.destroy_model_parallel()
    return "", ""


def test_processes_count_together_and_stop_together(pools, tmp_path):
    def start(limit, *found):
        first, second = pools.run(2, f"{HERE}:record", folder=tmp_path, limit=limit, found=found)
        assert first == second
        return first

    assert start(3, ["a"], ["a", "b"]) == ("", "")
    lines = (tmp_path / FILE_NAME).read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["a", "b"]
    kind, text = start(2, [], ["c"])
    assert kind == "DoNotRequeue" and "3 samples are corrupt" in text and "the last is c" in text
    kind, text = start(2, [], [])
    assert kind == "DoNotRequeue" and "before this start" in text
    (tmp_path / FILE_NAME).write_text("\n".join(["scratch", *lines, ""]))
    kind, text = start(9, [], [])
    assert kind == "DoNotRequeue" and "bad_samples.jsonl:1: no line of a record" in text
    (tmp_path / FILE_NAME).unlink()
    (tmp_path / FILE_NAME).mkdir()
    kind, text = start(9, [], [])
    assert kind == "UserError" and "cannot be read: Is a directory" in text
