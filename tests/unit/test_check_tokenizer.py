"""The check of the tokenizer on real clips, on a clip that is small."""

import json
import math

import pytest
import torch

from grn_scale.errors import UserError
from grn_scale.tools import check_tokenizer
from tests.helpers.clips import write_clip


def test_a_clip_passes_and_every_measurement_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(check_tokenizer, "NARROW", (4, 4))
    monkeypatch.setattr(check_tokenizer, "OFFICIAL", (4, 8))
    # In this process: memory is not what is tested here, and a process takes seconds to start.
    monkeypatch.setattr(check_tokenizer, "_alone", lambda work, *arguments: work(*arguments))
    clip = write_clip(tmp_path / "clip.mp4", 0, height=48)
    assert check_tokenizer.main([str(clip), "--output", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out/check.json").read_text())
    assert [row["kind"] for row in result["rows"]] == ["psnr", "equal", "equal", "memory", "equal"]
    assert [row["frames"] for row in result["rows"] if row["kind"] == "equal"] == [9, 9, 5]
    assert all(row[name]["relative_l2"] < 1e-5 for row in result["rows"] if row["kind"] == "equal"
               for name in ("encode", "decode"))
    assert list(result["rows"][3]["peak_bytes"]) == ["9", "17"]
    assert '"broken": []' in capsys.readouterr().out


@pytest.mark.parametrize("value", [2e-5, None])
def test_what_lies_outside_the_bounds_is_named(value):
    fine = {"relative_l2": 1e-6, "largest_over_deviation": 1e-5}
    rows = [{"kind": "equal", "clip": "a", "weights": "small", "encode": fine, "decode": fine | {"relative_l2": value}},
            {"kind": "memory", "clip": "a", "weights": "small", "growth": 1.06}]
    found = check_tokenizer.broken({"rows": rows, "bounds": check_tokenizer.BOUNDS})
    assert found == ["a, small: decode differs", "a: peak memory grew by 6.0%"]


def test_distances_are_those_of_all_pairs_together():
    one = torch.tensor([1.0, 2.0, 3.0, 5.0])
    found = check_tokenizer._apart((one[i:i + 2] + 0.1, one[i:i + 2]) for i in (0, 2))
    assert found["relative_l2"] == pytest.approx(0.2 / one.norm().item())
    assert found["largest_over_deviation"] == pytest.approx(0.1 / one.std(correction=0).item())
    assert check_tokenizer._apart([(one * math.nan, one)]) == {"relative_l2": None, "largest_over_deviation": None}


def test_a_missing_clip_is_named(tmp_path):
    with pytest.raises(UserError, match="no such clip"):
        check_tokenizer.main([str(tmp_path / "none.mp4"), "--output", str(tmp_path / "out")])
