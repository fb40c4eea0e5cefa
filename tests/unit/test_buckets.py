"""The resolution table against the official rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grn_scale.data.buckets import (
    RATIO_KEYS,
    RATIOS,
    Bucket,
    bucket,
    choose_bucket,
    latent_frames,
    nearest_ratio_key,
    whole_groups,
)
from grn_scale.model.rope import spatial_positions

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "resolution_table.json").read_text())
ROWS = [dict(zip(GOLDEN["columns"], row)) for row in GOLDEN["rows"]]


def test_every_official_row_has_our_size_and_grid():
    assert len(ROWS) == 90
    for row in ROWS:
        ours = bucket(row["ratio_key"], GOLDEN["rules"]["scale_per_pn"][row["pn"]])
        assert [ours.height, ours.width] == row["pixel_hw"], row["pn"]
        assert list(ours.grid) == row["grid_hw"]
        assert ours.grid[0] * ours.grid[1] == row["tokens_per_frame"]
    assert {row["pn"] for row in ROWS} == set(GOLDEN["rules"]["scale_per_pn"])


def test_every_official_row_has_our_rotary_positions():
    for row in ROWS:
        rows, columns = spatial_positions(*row["grid_hw"], row["ratio_key"])
        assert rows.tolist() == row["height_index"], (row["ratio_key"], row["pn"])
        assert columns.tolist() == row["width_index"], (row["ratio_key"], row["pn"])
        # One cell over the whole span: positions depend on it through their step alone.
        assert [spatial_positions(2, 2, row["ratio_key"])[axis][1].item() for axis in (0, 1)] == [
            round(span / 2) for span in row["rope_span_hw"]]


def test_every_official_size_is_its_own_bucket():
    for row in ROWS:
        height, width = row["pixel_hw"]
        side = GOLDEN["rules"]["scale_per_pn"][row["pn"]]
        assert choose_bucket(height, width, side) == Bucket(height, width, row["ratio_key"])


def test_templates_are_the_official_ones():
    official = sorted({(row["ratio_key"], row["exact_ratio"]) for row in ROWS})
    assert [key for key, _ in official] == list(RATIO_KEYS)
    assert [ratio for _, ratio in official] == pytest.approx(RATIOS)


def test_nearest_template_is_found_and_the_taller_wins_a_tie():
    assert nearest_ratio_key(480, 848) == 0.562
    assert nearest_ratio_key(848, 480) == 1.777
    assert nearest_ratio_key(1, 1) == 1.0
    assert nearest_ratio_key(1, 100) == 0.333
    assert nearest_ratio_key(100, 1) == 3.0
    assert nearest_ratio_key(9, 4) == 2.5  # 2.25 lies midway between 2 and 2.5


def test_nearest_template_is_the_nearest_key_for_any_source():
    for height in range(1, 64, 3):
        for width in range(1, 64, 5):
            distance = {key: abs(key - height / width) for key in RATIO_KEYS}
            chosen = nearest_ratio_key(height, width)
            assert distance[chosen] == min(distance.values())
            assert chosen == max(key for key in RATIO_KEYS if distance[key] == distance[chosen])
            assert nearest_ratio_key(30 * height, 30 * width) == chosen


@pytest.mark.parametrize("side", [1, 2, 3, 4, 7, 128])
def test_any_side_gives_whole_cells_of_about_that_area(side):
    for key in RATIO_KEYS:
        height, width = bucket(key, side).grid
        assert height >= 1 and width >= 1
        if side >= 7:
            assert height * width == pytest.approx(side * side, rel=0.25)


def test_square_clips_of_the_demo():
    assert choose_bucket(32, 32, 2) == Bucket(32, 32, 1.0)
    assert choose_bucket(64, 64, 4) == Bucket(64, 64, 1.0)


def test_unknown_ratio_and_side_are_refused():
    with pytest.raises(ValueError, match="none of"):
        bucket(0.7, 16)
    with pytest.raises(ValueError, match="at least 1"):
        bucket(1.0, 0)


def test_clip_lengths_are_one_plus_whole_groups():
    assert [whole_groups(n) for n in (0, 1, 4, 5, 8, 9, 81)] == [0, 1, 1, 5, 5, 9, 81]
    assert [latent_frames(n) for n in (1, 5, 9, 81)] == [1, 2, 3, 21]
    for frames, latents in GOLDEN["max_frames_table"].items():
        assert latent_frames(int(frames.removeprefix("video_frames_"))) == latents
