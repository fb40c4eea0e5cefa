"""The benchmark of planning: its index is a real one to a plan, and its figures are all there."""

from __future__ import annotations

import json

import numpy as np
import pytest

from grn_scale.errors import UserError
from grn_scale.perf import bench_plan
from grn_scale.perf.bench_plan import SHARD_SAMPLES, TOKEN_BUDGET, SyntheticIndex


def test_the_synthetic_index_has_the_mix_it_claims_and_is_the_same_at_every_look():
    index = SyntheticIndex(3 * SHARD_SAMPLES + 7)
    assert [shard.samples for shard in index.info.video_shards] == [SHARD_SAMPLES] * 3 + [7]
    columns, again = index.columns(1), SyntheticIndex(10**9).columns(1)
    assert all(np.array_equal(getattr(columns, name), getattr(again, name)) for name in vars(columns))
    images = columns.thw[:, 0] == 1
    assert 0.2 < images.mean() < 0.4 and columns.thw[~images, 0].min() >= 5
    longest = columns.thw.prod(axis=1) + columns.caption_tokens.max() + 1
    assert longest.max() <= TOKEN_BUDGET and len(np.unique(columns.keys)) == SHARD_SAMPLES
    assert columns.key_hash[0] == int(columns.keys[0][:16], 16)


def test_every_figure_is_reported_by_a_process_of_its_own():
    report = bench_plan.bench_plan(20_000)
    for name in ("summary", "plan", "window", "step", "resume_in_the_middle", "state_at"):
        assert report[name]["seconds"] >= 0 and report[name]["peak_bytes"] >= report["libraries_bytes"] > 0
    assert report["windows"] == 2 and report["samples"] == 20_000
    json.dumps(report, allow_nan=False)


def test_a_measurement_that_fails_is_an_error(monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(UserError, match="ended with exit code 1"):
        bench_plan.bench_plan(1)
