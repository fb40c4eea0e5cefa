"""The planner's memory against the dry run: one layout for `grn-scale plan --exact`, or many drawn at random.

    python -m grn_scale.tools.plan_exact --count 30 --draw-seed 6 --record docs/benchmarks/planner-memory.jsonl
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from grn_scale.atomic import write_bytes
from grn_scale.command_line import CommandParser, run
from grn_scale.config.check import check_layout
from grn_scale.config.load import load_config
from grn_scale.config.schema import Config
from grn_scale.errors import EXIT_FAILED, ConfigError
from grn_scale.planning.grn_activations import KernelForms
from grn_scale.planning.grn_memory import StageMemory, step_memory

TOLERANCE = 0.05
"""Of a stage's peak, that the planner may be off."""
MODELS = ((512, 4, 1792), (1024, 8, 3584), (1536, 12, 5376), (2304, 18, 8192), (3072, 24, 9216), (4096, 32, 12288))
"""(width, heads, MLP width): the official shapes and some between."""
CHOICES: dict[str, tuple[Any, ...]] = {
    "model.num_layers": (4, 8, 12, 24, 36), "model.latent_channels": (16, 64),
    "model.label_form": ("bit", "bit", "bit", "index"), "model.layout": ("v2", "v2", "v1"),
    "parallel.tensor": (1, 1, 2, 4, 8), "parallel.sequence": ("true", "true", "false"),
    "parallel.pipeline": (1, 1, 2, 4), "parallel.virtual_pipeline": (1, 2), "parallel.context": (1, 1, 2, 4),
    "parallel.recompute": ("none", "none", "selective", "full"),
    "parallel.recompute_modules": ("[mlp]", "[core_attn]", "[mlp,core_attn]"),
    "zero.stage": (1, 2), "train.precision": ("bf16", "bf16", "bf16", "fp32"),
    "data.token_budget": (2048, 4096, 8192, 16384, 32768, 65536), "optimizer.ema_decay": (0.999, 0.999, 0)}
"""Field -> values that are drawn, those that stand twice twice as often."""
REPLICAS, MICRO_BATCHES = (1, 2, 4, 16), (1, 2, 4, 8)


def compare(config: Config, world_size: int, done: Callable[[], object] = lambda: None,
            ) -> tuple[Any, tuple[StageMemory, ...]]:
    """(`dry_run.DryRun`, what the planner says of the same step with the same kernels); errors as `dry_run`'s."""
    from grn_scale.parallel.dry_run import dry_run

    tried = dry_run(config, world_size, done)
    planned = step_memory(config, world_size, KernelForms.of_dry_run(), tried.classes[0].micro_batches)
    return tried, planned


def differences(tried: Any, planned: tuple[StageMemory, ...]) -> list[dict[str, float]]:
    """By stage: planned - tried of each category, as a share of the peak that was tried."""
    return [{name: (memory.bytes[name] - size) / each.bytes["peak"] for name, size in each.bytes.items()}
            for each, memory in zip(tried.classes, planned)]


def exact_document(tried: Any, planned: tuple[StageMemory, ...], seconds: float) -> dict[str, Any]:
    """Both as plain values, without the tensors of each class."""
    classes = [{"stage": each.stage, "rank": each.rank, "ranks": each.ranks, "parameters": each.parameters,
                "micro_batches": each.micro_batches, "seconds": each.seconds, "tried": each.bytes,
                "planned": memory.bytes, "errors": off}
               for each, memory, off in zip(tried.classes, planned, differences(tried, planned))]
    return {"classes": classes, "parameters": tried.parameters, "differences": list(tried.differences),
            "seconds": seconds}


def random_layouts(seed: int, count: int) -> Iterator[tuple[int, list[str]]]:
    """(world size, settings) of `count` layouts that the rules accept, the same ones for a seed on any machine."""
    from grn_scale.keyed import key64

    number = 0
    while count:
        def pick(name: str, values: tuple[Any, ...], number: int = number) -> Any:
            return values[key64(seed, "planner memory", number, name) % len(values)]

        width, heads, inner = pick("model", MODELS)
        settings = [f"model.hidden_size={width}", f"model.num_heads={heads}", f"model.ffn_hidden_size={inner}",
                    "model.num_chunks=1", *(f"{name}={pick(name, values)}" for name, values in CHOICES.items())]
        replicas = pick("replicas", REPLICAS)
        settings.append(f"data.packs_per_step={replicas * pick('micro batches', MICRO_BATCHES)}")
        number += 1
        try:
            config = load_config(None, settings)
            parallel = config.parallel
            world = replicas * parallel.tensor * parallel.pipeline * parallel.context
            check_layout(config, world)
        except ConfigError:  # most draws do not go together
            continue
        count -= 1
        yield world, settings


def main(argv: list[str]) -> int:
    """Exit code: 1 where a layout's peak is off by more than TOLERANCE."""
    parser = CommandParser("plan_exact", "Compare the planner's memory with dry runs of layouts drawn at random.",
                           "python -m grn_scale.tools.plan_exact --count 30 --draw-seed 6", configured=False)
    parser.add_argument("--count", type=int, default=30, metavar="N", help="layouts (default: 30)")
    parser.add_argument("--draw-seed", type=int, default=6, metavar="N", help="which ones (default: 6)")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write a line of JSON for each layout")
    options = parser.parse_options(argv)
    lines, worst, begin = [], 0.0, time.perf_counter()
    for number, (world, settings) in enumerate(random_layouts(options.draw_seed, options.count)):
        tried, planned = compare(load_config(None, settings), world)
        off = differences(tried, planned)
        largest = max((each["peak"] for each in off), key=abs)
        worst = max(worst, abs(largest))
        lines.append({"draw_seed": options.draw_seed, "number": number, "world_size": world, "settings": settings,
                      "peak_bytes": [each.bytes["peak"] for each in tried.classes],
                      "planned_peak_bytes": [memory.bytes["peak"] for memory in planned],
                      "peak_error": round(largest, 5),
                      "errors": [{name: round(value, 5) for name, value in each.items()} for each in off]})
        print(f"{number:3} {largest:+8.2%} {max(lines[-1]['peak_bytes']) / 1e9:8.2f} GB on {world:3} processes: "
              f"{' '.join(settings)}", flush=True)
    print(f"{len(lines)} layouts, largest error of a stage's peak {worst:.2%}; {time.perf_counter() - begin:.0f} s")
    if options.record:
        write_bytes(options.record, "".join(json.dumps(line) + "\n" for line in lines).encode())
    return EXIT_FAILED if worst > TOLERANCE else 0


if __name__ == "__main__":
    sys.exit(run(main))
