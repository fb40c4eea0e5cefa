"""What torch counts on a rank while the engine takes a step."""

from __future__ import annotations

from collections.abc import Sequence

from grn_scale.config.schema import Config
from tests.helpers.parity import PACKS, batches_of_step


def counted_steps(configs: Sequence[Config]) -> list[int]:
    """FLOPs of this rank in a step of each configuration, all of one layout. Attention as plain products."""
    from megatron.core import parallel_state
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from grn_scale.parallel import groups

    device, counts = groups.start(configs[0].parallel), []
    try:
        from grn_scale.parallel.engine import TrainEngine

        for config in configs:
            engine = TrainEngine(config, device)
            rank, size = groups.data_parallel()
            batches = batches_of_step(0, config, range(rank, PACKS, size), True, groups.context_parallel())
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                engine.train_step(batches, 1e-3)
            counts.append(counter.get_total_flops())
            engine.close()
    finally:
        parallel_state.destroy_model_parallel()
    return counts
