"""The demo's stages: each command is shown, run once, and stops the demo where it fails."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grn_scale.demo import run as demo_run
from grn_scale.demo.stages import StageFailed, Stages
from grn_scale.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def touch(path):
    """A command that appends a line to `path`."""
    return [sys.executable, "-c", "import sys; open(sys.argv[1], 'a').write('made\\n')", path]


def lines(path):
    return path.read_text().count("\n")


def test_finished_stage_is_not_run_again(tmp_path, capfd):
    out = tmp_path / "out"
    for _ in range(2):
        Stages(out, {"clips": 3}).run("make", touch(out / "a"), makes=out / "a")
    assert lines(out / "a") == 1
    shown = capfd.readouterr().out
    assert shown.count("\n$ ") == 1 and "make: finished before" in shown
    assert json.loads((out / "stages.json").read_text())["make"]["seconds"] > 0


def test_stage_runs_again_when_its_command_its_output_or_an_earlier_stage_changed(tmp_path):
    out = tmp_path / "out"

    def both(first=()):
        stages = Stages(out, {})
        stages.run("first", [*touch(out / "a"), *first], makes=out / "a")
        stages.run("second", touch(out / "b"), makes=out / "b")
        return lines(out / "a"), lines(out / "b")

    assert both() == (1, 1)
    assert both(["other"]) == (2, 2)
    (out / "b").unlink()
    assert both(["other"]) == (2, 1)


def test_command_that_wants_a_new_folder_gets_one(tmp_path):
    out = tmp_path / "out"
    make = [sys.executable, "-c", "import os, sys; os.mkdir(sys.argv[1])", out / "f"]
    Stages(out, {}).run("make", make, makes=out / "f", new_folder=out / "f")
    Stages(out, {}).run("make", [*make, "x"], makes=out / "f", new_folder=out / "f")
    assert {p.name for p in out.iterdir()} == {"demo.json", "stages.json", "f", "f.old1"}


@pytest.mark.parametrize(("code", "ends_with"), [
    ("raise SystemExit(78)", 78), ("import os; os.kill(os.getpid(), 9)", 137), ("pass", 1)])
def test_failing_stage_says_which_command_and_keeps_its_exit_code(tmp_path, code, ends_with):
    stages = Stages(tmp_path / "out", {})
    with pytest.raises(StageFailed) as caught:
        stages.run("break", [sys.executable, "-c", code], makes=tmp_path / "never")
    assert caught.value.exit_code == ends_with
    assert "stage 'break'" in str(caught.value) and code.split()[0] in str(caught.value)
    assert stages.records == {}


def test_folder_of_others_or_of_other_settings_is_refused(tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="was not made by `grn-scale demo`"):
        Stages(tmp_path / "foreign", {})
    (tmp_path / "foreign" / "demo.json").write_text("{}")
    with pytest.raises(ConfigError, match="was not made by `grn-scale demo`"):
        Stages(tmp_path / "foreign", {})
    Stages(tmp_path / "ours", {"config": {"optimizer": {"lr": 1e-3}}})
    with pytest.raises(ConfigError, match=r"config.optimizer.lr 0.001 -> 0.01"):
        Stages(tmp_path / "ours", {"config": {"optimizer": {"lr": 1e-2}}})


def test_command_does_not_outlive_a_demo_that_is_told_to_end(tmp_path):
    child = ("import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)")
    code = (f"import sys; from pathlib import Path; from grn_scale.demo.stages import Stages\n"
            f"command = [sys.executable, '-c', {child!r}, sys.argv[1] + '/pid']\n"
            "Stages(Path(sys.argv[1]) / 'out', {}).run('wait', command, makes=Path(sys.argv[1]) / 'never')")
    parent = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_for(lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text())
    pid = int((tmp_path / "pid").read_text())
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(timeout=30) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(("argv", "words"), [
    (["output=elsewhere"], "--output DIR says where everything goes"),
    (["data.dataset=tokens"], "is what the demo sets itself"),
    (["--clips", "0"], "must be at least 1"),
    (["train.stepz=3"], "did you mean train.steps?"),
    (["--processes", "3"], "data.packs_per_step"),
])
def test_impossible_demo_is_refused_before_anything_is_written(tmp_path, argv, words):
    with pytest.raises(ConfigError) as caught:
        demo_run.main(["--output", str(tmp_path / "out"), *argv])
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()
