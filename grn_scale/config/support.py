"""Which features of parallel training work together, as a table: made by asking the rules that refuse the rest.

    python -m grn_scale.config.support    # the table of the README
"""

from __future__ import annotations

from grn_scale.config.check import check_layout
from grn_scale.config.load import load_config
from grn_scale.errors import ConfigError

FEATURES: dict[str, tuple[str, ...]] = {
    "DP": (),
    "TP": ("parallel.tensor=2", "parallel.sequence=false"),
    "TP + SP": ("parallel.tensor=2",),
    "PP": ("parallel.pipeline=2",),
    "VPP": ("parallel.pipeline=2", "parallel.virtual_pipeline=2"),
    "CP": ("parallel.context=2",),
    "selective recompute": ("parallel.recompute=selective",),
    "full recompute": ("parallel.recompute=full",),
    "optimizer offload": ("zero.offload_optimizer=true",),
}
"""Column -> settings that switch it on. A model and a world that every degree divides."""
ROWS = [(stage, precision) for stage in (0, 1, 2, 3) for precision in ("bf16", "fp32")]
WORLD = 16
_BASE = ("model.num_layers=4", "model.num_heads=4", "data.token_budget=1024", f"data.packs_per_step={WORLD}")

def works(*settings: str) -> bool:
    """Whether the rules accept these settings on WORLD processes."""
    try:
        check_layout(load_config(None, [*_BASE, *settings]), WORLD)
    except ConfigError:
        return False
    return True

def support_table() -> str:
    """Markdown: ZeRO stage and precision against everything else."""
    lines = ["| | " + " | ".join(FEATURES) + " |", "|---" * (len(FEATURES) + 1) + "|"]
    for stage, precision in ROWS:
        row = (f"zero.stage={stage}", f"train.precision={precision}")
        cells = ["yes" if works(*row, *settings) else "-" for settings in FEATURES.values()]
        lines.append(f"| ZeRO-{stage}, {precision} | " + " | ".join(cells) + " |")
    return "\n".join(lines)

if __name__ == "__main__":
    print(support_table())
