"""The planner's memory of a rank, against dry runs and against the terms it is made of."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from grn_scale.config.load import load_config
from grn_scale.planning.grn_activations import Activations, KernelForms
from grn_scale.planning.grn_budget import budget, text_encoder_bytes
from grn_scale.planning.grn_memory import step_memory
from grn_scale.planning.grn_pack import full_pack
from grn_scale.planning.grn_parameters import stage_chunks
from grn_scale.tools.plan_exact import TOLERANCE, compare, differences, random_layouts

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("model.hidden_size=256", "model.num_heads=4", "model.ffn_hidden_size=768", "model.num_layers=4",
         "model.num_chunks=1", "model.text_hidden_size=64", "data.token_budget=2048")
TRIED = {
    "pipeline and sequence": (8, ("parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.tensor=2",
                                  "parallel.context=2", "parallel.recompute=selective", "model.layout=v1",
                                  "data.packs_per_step=4")),
    "sharded gradients": (4, ("zero.stage=2", "parallel.recompute=full", "model.label_form=index",
                              "data.packs_per_step=4")),
}
"""Name -> processes and settings of layouts that are built and stepped."""


@pytest.fixture(scope="module")
def tried():
    """(dry run, plan) of each layout, two at a time."""
    with ThreadPoolExecutor(2) as threads:
        return dict(zip(TRIED, threads.map(lambda each: compare(load_config(None, [*SMALL, *each[1]]), each[0]),
                                           TRIED.values())))


@pytest.mark.parametrize("name", TRIED)
def test_planned_bytes_are_those_of_a_dry_run(tried, name):
    for off in differences(*tried[name]):
        assert abs(off["peak"]) < TOLERANCE, off
        for category in ("weights", "gradients", "optimizer", "average", "batches"):
            assert abs(off[category]) < 1e-4, (category, off)


@pytest.mark.slow
def test_planned_bytes_are_those_of_thirty_random_layouts():
    for world, settings in random_layouts(7, 30):
        for off in differences(*compare(load_config(None, settings), world)):
            assert abs(off["peak"]) < TOLERANCE, (world, settings, off)


def test_parameters_are_those_of_the_published_sizes():
    for name, count in (("grn_2b", 2_198e6), ("grn_8b", 7_890_859_520)):
        config = load_config(None, [f"model=configs/model/{name}.yaml"])
        blocks = [block for chunk in stage_chunks(config.model, config.parallel, 0) for block in chunk.blocks]
        assert sum(block.count for block in blocks) == pytest.approx(count, rel=5e-4)


def layer_kept(*settings: str, forms: KernelForms | None = None) -> int:
    """Bytes that a layer of 4096 rows keeps beside its input."""
    config = load_config(None, [*SMALL, "data.token_budget=4096", *settings])
    matrices = stage_chunks(config.model, config.parallel, 0)[0].layers[0].matrices
    forms = forms or KernelForms.of_gpu(config.kernels)
    return Activations(config, full_pack(config), forms, 4).layer(matrices).kept


def test_a_layer_keeps_the_terms_of_the_published_formula():
    # Korthikanti et al. 2022, section 4.1, in bf16 without dropout and scores, for SwiGLU: two norms' outputs 4, the
    # sum between attention and MLP 2, q, k, v 6, turned q, k 4, attention's output twice 4; gate, up, product 6 a row
    # and MLP width; 4 a row and head for the log-sum-exp. The first norm's input is the layer's.
    rows, width, inner, heads = 4096, 256, 768, 4
    plain = (4 + 2 + 6 + 4 + 4) * rows * width + 6 * rows * inner + 4 * rows * heads
    assert layer_kept() == plain
    assert layer_kept("parallel.recompute=selective") == plain - 6 * rows * inner
    assert layer_kept("parallel.recompute=full") == 0
    # section 4.2: tensor parallelism with sequence parallelism divides all of it
    assert layer_kept("parallel.tensor=2") == plain // 2
    assert layer_kept("parallel.tensor=2", "parallel.sequence=false") == (plain + 6 * rows * width) // 2
    # norms one operation after the other keep fp32 copies, SwiGLU all of its steps
    more = 2 * (4 + 4) * rows * width - 2 * rows * width + 2 * (4 + 4) * rows * width + 4 * rows * inner
    assert layer_kept(forms=KernelForms.of_dry_run()) == plain + more


def test_the_first_stage_of_a_pipeline_holds_most_and_interleaving_holds_more():
    settings = ("model.num_layers=8", "parallel.pipeline=4", "data.packs_per_step=16")
    plain, interleaved = (step_memory(load_config(None, [*SMALL, *settings, *more]), 4)
                          for more in ((), ("parallel.virtual_pipeline=2",)))
    activations = [stage.bytes["activations"] for stage in plain]
    assert activations == sorted(activations, reverse=True)
    # Narayanan et al. 2021, section 2.2.2: (1 + (p - 1) / (p v)) times as much on the first stage
    assert interleaved[0].bytes["activations"] / activations[0] == pytest.approx(1 + 3 / 8, rel=0.15)


def test_zero_1_in_bf16_keeps_whole_gradients_in_fp32():
    for replicas in (1, 64):
        (found,) = step_memory(load_config(None, [*SMALL, f"data.packs_per_step={replicas}"]), replicas)
        assert found.bytes["gradients"] == pytest.approx(4 * found.parameters, rel=1e-3)
        assert found.bytes["optimizer"] == pytest.approx(12 * found.parameters / replicas, rel=1e-2)


def test_zero_3_divides_weights_and_offload_moves_the_optimizer_to_the_host():
    def of(*settings: str):
        config = load_config(None, [*SMALL, "data.packs_per_step=8", *settings])
        (found,) = step_memory(config, 8)
        return found, budget(config, 8, 8, found)

    (whole, _), (divided, _) = of("zero.stage=2"), of("zero.stage=3")
    assert divided.bytes["weights"] < whole.bytes["weights"] / 7
    moved, held = of("zero.stage=2", "zero.offload_optimizer=true")
    assert moved.bytes["optimizer"] == 0 and moved.state.host > whole.bytes["optimizer"]
    assert held.host["step"] > moved.state.host and held.host["save"] == 2 * moved.state.host


def test_phases_count_the_copy_for_saves_and_the_text_encoder():
    config = load_config(None, [*SMALL, "data.packs_per_step=8", "text.states=none"])
    (found,) = step_memory(config, 8)
    held = budget(config, 8, 8, found)
    assert held.host["save"] == found.bytes["optimizer"] + found.bytes["average"]
    assert held.phases["step"] == found.bytes["peak"] + sum(held.beside.values()) == held.most
    # 4.63e9 weights in bf16 over 8 processes, and two whole layers
    assert text_encoder_bytes(config, 8) == pytest.approx(4.63e9 * 2 / 8 + 2 * 2 * 4.63e9 / 24, rel=0.01)
    waiting = load_config(None, [*SMALL, "data.packs_per_step=8", "train.background_save=false"])
    assert budget(waiting, 8, 8, found).host["save"] == 0
    assert budget(waiting, 8, 8, found).beside["text encoder"] == 0


def test_planning_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; from grn_scale.tools.plan import main; raise SystemExit(main(" \
           "['--gpu', 'H100', '--gpus-per-node', '8', 'data.packs_per_step=8', '--json']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
