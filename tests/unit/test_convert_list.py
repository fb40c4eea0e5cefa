"""Many conversions shared by many processes: each is done once, and one that fails keeps no other back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from grn_scale.checkpoint import load_weights
from grn_scale.cli import main
from grn_scale.convert import many, native
from grn_scale.convert.command import conversions
from tests.helpers.jobs import ENVIRONMENT
from tests.unit.test_convert import CASES, MODELS, same, state_of


@pytest.fixture
def listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """conversions.txt with six conversions into folders with spaces; the weights that each starts from."""
    monkeypatch.chdir(tmp_path)
    name = MODELS[0]
    case = CASES["models"][name]
    Path("model.yaml").write_text(yaml.safe_dump({
        "latent_channels": case["latent_dim"], "rounds": case["hbq_round"],
        "label_form": "bit" if case["refine_mode"] == "bit" else "index"}))
    torch.save(state_of(name), "grn.pth")
    lines = [f"--input grn.pth --from official --to native --output 'out {i}' --layout v2 --model model.yaml"
             for i in range(6)]
    Path("conversions.txt").write_text("# six\n\n" + "\n".join(lines) + "\n")
    return state_of(name)


def test_processes_share_a_list_and_each_output_is_made_once(listed: dict) -> None:
    command = [sys.executable, "-m", "grn_scale", "convert", "--list", "conversions.txt", "--json"]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) for _ in range(2)]
    results = [json.loads(process.communicate(timeout=120)[0]) for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert sum(result["made_here"] for result in results) == 6
    assert all(same(load_weights(f"out {i}"), listed) for i in range(6))
    assert list(Path("conversions.txt.claims/leases").iterdir()) == []


def test_a_line_that_fails_is_named_when_the_others_are_done(listed: dict, capsys) -> None:
    text = Path("conversions.txt").read_text()
    Path("conversions.txt").write_text(text.replace("--input grn.pth --from official --to native --output 'out 3'",
                                                    "--input lost.pth --from official --to native --output 'out 3'"))
    assert main(["convert", "--list", "conversions.txt"]) == 1
    error = capsys.readouterr().err
    assert "1 of 6 conversions failed: conversions.txt:6: " in error and "lost.pth" in error
    assert [i for i in range(6) if Path(f"out {i}").exists()] == [0, 1, 2, 4, 5]
    Path("lost.pth").write_bytes(Path("grn.pth").read_bytes())
    assert main(["convert", "--list", "conversions.txt"]) == 0
    assert capsys.readouterr().out == "6 conversions are done, 1 of them by this process\n"


def name_of(output: str) -> str:
    """Of the claim of a line."""
    return next(line.name for line in conversions("conversions.txt") if line.request.output.name == output)


def test_what_a_killed_process_noted_goes_and_what_others_left_stays(listed: dict) -> None:
    notes = Path("conversions.txt.claims/begun")
    notes.mkdir(parents=True)
    left = {"out 1": "out 1.node7-12-0.partial", "out 2": "out 2.node7-12-1.partial", "out 3": "../out 3"}
    for name in left.values():
        Path(name).mkdir()
        Path(name, "begun").touch()
    for output in ("out 1", "out 3"):
        (notes / name_of(output)).write_text(left[output])
    try:
        assert main(["convert", "--list", "conversions.txt"]) == 0
        assert not Path(left["out 1"]).exists() and Path(left["out 2"], "begun").exists()
        assert Path(left["out 3"], "begun").exists()  # no name of ours
        assert list(notes.iterdir()) == []
    finally:
        shutil.rmtree(left["out 3"])


def test_who_has_lost_the_claim_publishes_nothing_and_removes_nothing_of_the_successor(listed, monkeypatch) -> None:
    """As a process does that was suspended for longer than its claim holds."""
    claim, note = (Path("conversions.txt.claims", folder, name_of("out 0")) for folder in ("leases", "begun"))
    successor = Path("out 0.node7-12-0.partial")

    def taken_over(path: Path, *arguments, **more) -> None:
        write_checkpoint(path, *arguments, **more)
        if path.name.startswith("out 0"):
            claim.write_text(json.dumps({"owner": "another", "processes": "elsewhere", "pid": 1, "process_start": ""}))
            note.write_text(successor.name)
            successor.mkdir()
            Path(successor, "theirs").touch()
            monkeypatch.setattr(many.time, "sleep", lambda _: os.rename(successor, "out 0"))  # it gets done meanwhile

    write_checkpoint = native.write_checkpoint
    monkeypatch.setattr(native, "write_checkpoint", taken_over)
    assert main(["convert", "--list", "conversions.txt"]) == 0
    assert os.listdir("out 0") == ["theirs"] and note.read_text() == successor.name
    assert not list(Path().glob("out 0.*.partial"))


@pytest.mark.parametrize("line,words", [
    ("--input a --from official --output b", "conversions.txt:2: the following arguments are required: --to"),
    ("--input 'a --from official", "conversions.txt:2: No closing quotation"),
    ("--input a --from official --to native --output ./x/../b", "conversions.txt:2: writes x/../b, as line 1 does")])
def test_a_list_is_read_before_anything_is_converted(tmp_path, monkeypatch, capsys, line: str, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("conversions.txt").write_text(f"--input a --from official --to native --output b\n{line}\n")
    assert main(["convert", "--list", "conversions.txt"]) == 2
    assert words in capsys.readouterr().err and len(list(tmp_path.iterdir())) == 1
