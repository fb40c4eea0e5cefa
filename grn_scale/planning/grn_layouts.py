"""The layouts that a configuration could have on a machine, and how far each is from the one that it has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from grn_scale.config.check import check_layout
from grn_scale.config.schema import Config, ParallelConfig, ZeroConfig
from grn_scale.errors import ConfigError

RECOMPUTE = (("none", ("mlp",)), ("selective", ("mlp",)), ("selective", ("core_attn",)),
             ("selective", ("mlp", "core_attn")), ("full", ("mlp",)))
"""(parallel.recompute, parallel.recompute_modules), the cheaper ones first."""
CHANGES = ("parallel.tensor", "parallel.sequence", "parallel.pipeline", "parallel.virtual_pipeline",
           "parallel.context", "parallel.recompute", "parallel.recompute_modules", "zero.stage",
           "zero.offload_optimizer")
"""Fields that make a layout."""


@dataclass(frozen=True)
class Layout:
    """A configuration with another layout, and what has to be set for it."""

    config: Config
    settings: tuple[str, ...]
    """key=value, of the fields that differ."""
    distance: float
    """0 for the configuration as it is; doublings of a degree and steps of recomputation count 1, offload 3."""


def legal_layouts(config: Config, world_size: int, reach: int) -> Iterator[Layout]:
    """Every layout that the rules accept for this model and global batch on so many processes.

    Tensor and context parallelism stay together among `reach` neighbours, those of a node, because both exchange
    activations in every layer.
    """
    model = config.model
    inside = [degree for degree in _divisors(reach) if world_size % degree == 0]
    for tensor in inside:
        if model.num_heads % tensor:
            continue
        for context in (degree for degree in inside if tensor * degree <= reach):
            for pipeline in _divisors(model.num_layers):
                if world_size % (tensor * context * pipeline):
                    continue
                for virtual in _virtual(model.num_layers, pipeline):
                    for zero in _zero(config, pipeline):
                        for recompute, modules in RECOMPUTE:
                            parallel = ParallelConfig(tensor, True, pipeline, virtual, context, recompute, modules)
                            found = replace(config, parallel=parallel, zero=zero)
                            if _legal(found, world_size):
                                yield Layout(found, changed(config, found), _distance(config, found))


def changed(before: Config, after: Config) -> tuple[str, ...]:
    """key=value of each field of the layout that differs."""
    settings = []
    for name in CHANGES:
        section, field = name.split(".")
        old, new = (getattr(getattr(each, section), field) for each in (before, after))
        unused = field == "recompute_modules" and after.parallel.recompute != "selective"
        unused |= field == "sequence" and after.parallel.tensor == 1
        if old != new and not unused:
            settings.append(f"{name}={_plain(new)}")
    return tuple(settings)


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{','.join(value)}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _virtual(layers: int, pipeline: int) -> list[int]:
    return [1] if pipeline == 1 else [degree for degree in _divisors(layers // pipeline) if degree <= 8]


def _zero(config: Config, pipeline: int) -> list[ZeroConfig]:
    """A pipeline takes ZeRO-1; bf16 takes it at least."""
    stages = [ZeroConfig(0)] if config.train.precision == "fp32" and config.zero.stage == 0 else []
    stages.append(ZeroConfig(1))
    if pipeline == 1:
        stages += [ZeroConfig(stage, offload) for stage in (2, 3) for offload in (False, True)]
    return stages


def _legal(config: Config, world_size: int) -> bool:
    try:
        check_layout(config, world_size)
    except ConfigError:
        return False
    return True


def _distance(before: Config, after: Config) -> float:
    old, new = before.parallel, after.parallel
    steps = [abs(getattr(old, name).bit_length() - getattr(new, name).bit_length())
             for name in ("tensor", "pipeline", "virtual_pipeline", "context")]
    order = [_rank(each) for each in (old, new)]
    return (sum(steps) + abs(order[0] - order[1]) + abs(before.zero.stage - after.zero.stage)
            + 3 * abs(before.zero.offload_optimizer - after.zero.offload_optimizer))


def _rank(parallel: ParallelConfig) -> int:
    modules = parallel.recompute_modules if parallel.recompute == "selective" else ("mlp",)
    known = [(name, tuple(sorted(each))) for name, each in RECOMPUTE]
    return known.index((parallel.recompute, tuple(sorted(set(modules)))))
