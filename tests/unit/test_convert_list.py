"""Many conversions shared by many processes: each is done once, and one that fails keeps no other back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from grn_scale.checkpoint import load_weights
from grn_scale.cli import main
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


def test_what_a_killed_process_left_goes_and_what_others_left_stays(listed: dict, capsys) -> None:
    for name in ("out 1", "out 2"):
        Path(f"{name}.partial").mkdir()
        Path(f"{name}.partial/begun").touch()
    ours, = (line for line in conversions("conversions.txt") if line.request.output.name == "out 1")
    note = Path("conversions.txt.claims/begun") / ours.name
    note.parent.mkdir(parents=True)
    note.touch()
    for _ in range(2):
        assert main(["convert", "--list", "conversions.txt"]) == 1
        assert "1 of 6 conversions failed" in capsys.readouterr().err
        assert Path("out 2.partial/begun").exists() and not Path("out 1.partial").exists()
    assert [i for i in range(6) if Path(f"out {i}").exists()] == [0, 1, 3, 4, 5]
    assert list(note.parent.iterdir()) == []


@pytest.mark.parametrize("line,words", [
    ("--input a --from official --output b", "conversions.txt:2: the following arguments are required: --to"),
    ("--input 'a --from official", "conversions.txt:2: No closing quotation"),
    ("--input a --from official --to native --output ./x/../b", "conversions.txt:2: writes x/../b, as line 1 does")])
def test_a_list_is_read_before_anything_is_converted(tmp_path, monkeypatch, capsys, line: str, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("conversions.txt").write_text(f"--input a --from official --to native --output b\n{line}\n")
    assert main(["convert", "--list", "conversions.txt"]) == 2
    assert words in capsys.readouterr().err and len(list(tmp_path.iterdir())) == 1
