"""How long planning takes and how much memory, at sizes that no test could write: over an index that is never made.

The parts of the index are computed when they are asked for. Lengths are those of a real mix: three images in ten, the
rest clips of 5 to 81 latent frames, from 0.06 to 0.92 million pixels, captions of 6 to 511 tokens.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from grn_scale.errors import UserError
from grn_scale.perf.measure import peak_memory

if TYPE_CHECKING:
    import numpy as np

    from grn_scale.data.columns import ShardColumns
    from grn_scale.data.schema import DatasetInfo

TOKEN_BUDGET = 131_072
PACKS_PER_STEP = 2048
SHARD_SAMPLES = 1024
WINDOW_SHARDS = 16
COUNTED_STEPS = 20
"""State before this step is looked for."""
CAPTIONS = 2
GRIDS = ((12, 21), (24, 43), (30, 53), (45, 80))
"""Latent height and width; how often each occurs is said by GRID_BOUNDS."""
GRID_BOUNDS = (0.09, 0.39, 0.75)
IMAGES = 0.3


class SyntheticIndex:
    """An index of `samples` samples as a plan takes it. A shard's columns follow from its number."""

    snapshot = "synthetic"

    def __init__(self, samples: int) -> None:
        self._sizes = [SHARD_SAMPLES] * (samples // SHARD_SAMPLES)
        self._sizes += [samples % SHARD_SAMPLES] if samples % SHARD_SAMPLES else []

    @functools.cached_property
    def info(self) -> DatasetInfo:
        """What a dataset's summary holds. Images and tokens of a shard are the mean, not counted."""
        from grn_scale.data.schema import DatasetInfo, ShardInfo, TextRef

        first = self.columns(0)
        tokens = int(first.thw.prod(axis=1, dtype="int64").mean())
        shards = tuple(ShardInfo(f"video-{number:06d}.tar", size, 0, "", images=int(IMAGES * size),
                                 tokens=tokens * size, longest=TOKEN_BUDGET)
                       for number, size in enumerate(self._sizes))
        return DatasetInfo(
            format_version=2, tokenizer_fingerprint="", latent_channels=64, rounds=4, text_fingerprint="",
            text_hidden_size=4096, text_states="none", task_tags=True, empty_text=TextRef("empty", 1, ""), fps=16.0,
            video_shards=shards, text_shards=(), samples=sum(self._sizes), snapshot=self.snapshot)

    def columns(self, shard: int) -> ShardColumns:
        import numpy as np

        from grn_scale.data.columns import ShardColumns
        from grn_scale.keyed import hash64, key64

        number = shard * SHARD_SAMPLES + np.arange(self._sizes[shard])
        grid = np.array(GRIDS)[np.searchsorted(GRID_BOUNDS, _uniform("grid", number))]
        frames = np.exp(np.log(14.5) + 0.7 * _bell("frames", number)).astype(np.int32) + 4
        frames = np.clip(frames, 5, np.minimum(81, (TOKEN_BUDGET - 512) // grid.prod(axis=1)))
        frames[_uniform("image", number) < IMAGES] = 1
        captions = np.arange(CAPTIONS * len(number)) + CAPTIONS * number[0]
        text = np.clip(np.exp(np.log(129) + 0.6 * _bell("text", captions)), 6, 510).astype(np.int32)
        digits = np.stack([hash64(key64("key", half), number) for half in (0, 1)], axis=1).astype(">u8")
        return ShardColumns(
            keys=np.frombuffer(digits.tobytes().hex().encode(), "S32"), key_hash=digits[:, 0].astype(np.uint64),
            thw=np.column_stack([frames, grid]).astype(np.int32), ratio_key=np.full(len(number), 0.5625),
            class_id=np.full(len(number), -1), caption_first=CAPTIONS * np.arange(len(number) + 1),
            caption_tokens=text[:, None] + np.array([0, 0, 1], np.int32))


def _uniform(purpose: str, number: np.ndarray) -> np.ndarray:
    from grn_scale.keyed import key64, uniforms

    return uniforms(key64("synthetic index", purpose), number)


def _bell(purpose: str, number: np.ndarray) -> np.ndarray:
    """Numbers of a logistic distribution, nearly standard normal."""
    import numpy as np

    u = _uniform(purpose, number).clip(1e-9, 1 - 1e-9)
    return np.log(u / (1 - u)) / 1.7


def bench_plan(samples: int) -> dict[str, Any]:
    """`measure_plan` in a process of its own, so that its peak of memory is that of planning alone."""
    done = subprocess.run([sys.executable, "-m", "grn_scale.perf.bench_plan", str(samples)], stdout=subprocess.PIPE,
                          text=True, check=False)
    if done.returncode:
        raise UserError(f"the process that measures the plan ended with exit code {done.returncode}")
    return json.loads(done.stdout)


def measure_plan(samples: int) -> dict[str, Any]:
    """Seconds of each step of planning `samples` samples, and the most memory this process held by the end of each."""
    from dataclasses import replace

    from grn_scale.data.plan import Plan

    report: dict[str, Any] = {
        "samples": samples, "token_budget": TOKEN_BUDGET, "packs_per_step": PACKS_PER_STEP,
        "shard_samples": SHARD_SAMPLES, "window_shards": WINDOW_SHARDS,
        "libraries_bytes": peak_memory()["process_bytes"]}

    def timed(name: str, work: Any) -> Any:
        begin = time.perf_counter()
        result = work()
        report[name] = {"seconds": round(time.perf_counter() - begin, 4),
                        "peak_bytes": peak_memory()["process_bytes"]}
        return result

    def make_plan() -> Plan:
        return Plan(index, seed=0, token_budget=TOKEN_BUDGET, caption_drop=0.1, i2v_share=0.1,
                    window_shards=WINDOW_SHARDS, validation_fraction=0.001)

    index = SyntheticIndex(samples)
    timed("summary", lambda: index.info)
    plan = timed("plan", make_plan)
    timed("window", lambda: plan.next_step(plan.start(), 1))
    timed("step", lambda: plan.next_step(plan.start(), PACKS_PER_STEP))
    middle = plan.windows // 2
    state = replace(plan.start(), window=middle, window_first=middle * PACKS_PER_STEP,
                    position=middle * PACKS_PER_STEP)
    report["windows"] = plan.windows
    del plan
    plan = make_plan()
    timed("resume_in_the_middle", lambda: plan.next_step(state, 1))
    found = timed("state_at", lambda: plan.state_at(COUNTED_STEPS, PACKS_PER_STEP))
    report["state_at"] |= {"step": COUNTED_STEPS, "epoch": found.epoch, "window": found.window}
    return report


if __name__ == "__main__":
    print(json.dumps(measure_plan(int(sys.argv[1]))))
