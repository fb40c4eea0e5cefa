"""The window of steps that is recorded: which, where to, and what happens when it cannot be written."""

from __future__ import annotations

import gzip
import json
import logging

import pytest
import torch

from grn_scale.config.run_schema import ProfileConfig
from grn_scale.errors import ConfigError
from grn_scale.train.profiling import StepProfiler


def run(folder, settings, numbers, steps=range(1, 100), records=True, fails=False):
    with StepProfiler(settings, folder, steps, records) as profiler:
        for number in numbers:
            profiler.begin(number)
            torch.ones(4, 4) @ torch.ones(4, 4)
        if fails:
            raise RuntimeError("a step failed")


def recorded(folder) -> dict[str, list[str]]:
    """Name of each trace -> the steps marked in it, in order."""
    found = {}
    for path in sorted(folder.iterdir()):
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            events = json.load(stream)["traceEvents"]
        assert any(event.get("name") == "aten::mm" for event in events)
        marks = [event for event in events if event.get("cat") == "user_annotation"]
        found[path.name] = [e["name"] for e in sorted(marks, key=lambda e: e["ts"]) if e["name"].startswith("step ")]
    return found


@pytest.mark.parametrize(("numbers", "steps", "trace"), [
    (range(1, 7), range(1, 7), {"trace-00000003-00000004.json.gz": ["step 3", "step 4"]}),
    (range(4, 7), range(4, 7), {"trace-00000004-00000004.json.gz": ["step 4"]}),  # resumed inside the window
    (range(1, 4), range(1, 9), {"trace-00000003-00000003.json.gz": ["step 3"]}),  # stopped inside it
    ([3, 4, 2, 3, 4, 5], range(1, 9), {"trace-00000003-00000004.json.gz": ["step 3", "step 4"]}),  # went back behind it
])
def test_the_steps_of_the_window_are_recorded_once(tmp_path, numbers, steps, trace):
    run(tmp_path, ProfileConfig(start=3, steps=2), numbers, steps)
    assert recorded(tmp_path) == trace


def test_nothing_is_recorded_unless_asked_nor_on_other_ranks_nor_of_a_run_that_fails(tmp_path):
    run(tmp_path, ProfileConfig(start=1), range(1, 4))
    run(tmp_path, ProfileConfig(start=1, steps=2), range(1, 4), records=False)
    with pytest.raises(RuntimeError, match="a step failed"):
        run(tmp_path, ProfileConfig(start=1, steps=9), range(1, 4), fails=True)
    assert not list(tmp_path.iterdir())


def test_a_window_that_the_run_never_reaches_is_told_of(tmp_path, caplog):
    run(tmp_path, ProfileConfig(start=10, steps=2), range(21, 23), range(21, 31))
    assert "name the steps 10 to 11, but the run does 21 to 30" in caplog.text and not list(tmp_path.iterdir())


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run(tmp_path / "gone", ProfileConfig(start=1, steps=1), range(1, 4))
    assert "the trace of the steps 1 to 1 is not written: " in caplog.text


def test_a_window_that_cannot_be_is_refused():
    for values, words in (({"start": 0}, "counted from 1"), ({"steps": -1}, "must not be negative")):
        with pytest.raises(ConfigError, match=words):
            ProfileConfig(**values)
