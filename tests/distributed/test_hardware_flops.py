"""The hardware FLOPs that a run reports are those that its processes carry out, in any layout."""

from __future__ import annotations

import pytest

from grn_scale.perf.flops import hardware_flops
from tests.helpers.parity import BUDGET, PACKS, packs_of_step, parity_config
from tests.helpers.rank_pool import RankPools

AGAIN = [{}, {"recompute": "selective"}, {"recompute": "full"},
         {"recompute": "selective", "recompute_modules": ("core_attn", "mlp")}]


@pytest.mark.parametrize("layout", [
    {}, {"tensor": 2}, {"context": 2},
    *(pytest.param(layout, marks=pytest.mark.slow)
      for layout in ({"tensor": 2, "sequence": False}, {"pipeline": 2}, {"stage": 3}))])
def test_all_processes_together_do_what_is_reported(pools: RankPools, layout):
    configs = [parity_config(**layout, **again) for again in (AGAIN if layout == {} else AGAIN[::2])]
    counted = pools.run(2, "tests.helpers.counted_flops:counted_steps", configs=configs)
    draws = [sample.draw for pack in packs_of_step(0, configs[0], empty=True)[0] for sample in pack]
    lengths = [(d.visual_tokens, d.predicted_tokens, d.text_tokens, d.tokens) for d in draws]
    for config, counts in zip(configs, zip(*counted)):
        model = config.model
        # the CPU computes attention unfused, so scores are not computed again
        scores_again = 2 * model.num_layers * model.hidden_size * sum(d.tokens**2 for d in draws)
        assert sum(counts) == hardware_flops(model, config.parallel, lengths, PACKS * BUDGET) - scores_again
