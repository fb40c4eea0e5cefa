"""The model of a dense transformer against closed forms: parameters, memory, communication, bubble."""

from dataclasses import fields, replace

import pytest

from grn_scale.errors import ConfigError
from grn_scale.planning.communication import group
from grn_scale.planning.hardware import NAMES, load_efficiencies, load_gpu, with_values
from grn_scale.planning.layout import Layout, Software
from grn_scale.planning.memory import layer_activations, memory
from grn_scale.planning.pipeline import bubble, held
from grn_scale.planning.shape import Shape, complete, gpt3_size
from grn_scale.planning.step_time import Machine, step_time

REACHED = load_efficiencies()
H100, A100 = load_gpu("H100"), load_gpu("A100-80GB")
GPT3 = Shape(96, 12288, 96, 96, 49152, False, 51200, True, True, 2048)
LLAMA2_7B = Shape(32, 4096, 32, 32, 11008, True, 32000, False, True, 4096)
LLAMA2_70B = Shape(80, 8192, 64, 8, 28672, True, 32000, False, True, 4096)
LLAMA3_8B = Shape(32, 4096, 32, 8, 14336, True, 128256, False, True, 8192)
LLAMA3_405B = Shape(126, 16384, 128, 8, 53248, True, 128256, False, True, 8192)
OLD = Software("unfused", overlap=False, dropout=True, gradient_bytes=2)


@pytest.mark.parametrize("shape, billions", [(GPT3, 174.6), (LLAMA2_7B, 6.738), (LLAMA2_70B, 68.98), (LLAMA3_8B, 8.030),
                                             (LLAMA3_405B, 405.85)])
def test_parameters_of_known_models(shape, billions):
    assert shape.parameters / 1e9 == pytest.approx(billions, rel=2e-3)


@pytest.mark.parametrize("shape", [GPT3, LLAMA2_7B, LLAMA2_70B, LLAMA3_8B])
def test_gating_is_found_from_the_parameter_count(shape):
    known = frozenset({"ffn", "kv_heads"})
    found, reasons = complete(replace(shape, gated=not shape.gated), shape.parameters, known)
    assert found.gated == shape.gated and set(reasons) == {"gated", "tied"}


def test_width_of_the_mlp_is_found_from_the_parameter_count():
    found, _ = complete(replace(LLAMA3_8B, ffn=1, gated=False, kv_heads=32), 8.03e9, frozenset())
    assert (found.ffn, found.gated, found.kv_heads) == (14336, True, 8)
    plain, reasons = complete(replace(GPT3, ffn=1), None, frozenset())
    assert (plain.ffn, plain.gated) == (49152, False) and "GPT-3" in reasons["ffn"]


def test_stated_parameters_beyond_the_layers_are_held_and_not_multiplied():
    shape = Shape(57, 3072, 24, 24, 12288, False, 0, False, False, 2304)
    found, reasons = complete(shape, 11e9, frozenset({"ffn", "kv_heads"}))
    assert found.parameters == pytest.approx(11e9) and found.held_beyond > 0 and "held_beyond" in reasons
    assert found.layer_weights == replace(found, held_beyond=0).layer_weights


def test_sizes_of_gpt3_go_by_their_parameter_count():
    assert gpt3_size(1.3e9) == (24, 2048) and gpt3_size(72e9) is None


@pytest.mark.parametrize("field, value", [("layers", 0), ("kv_heads", 7)])
def test_impossible_shapes_are_refused(field, value):
    with pytest.raises(ConfigError, match="at least 1|do not divide"):
        replace(GPT3, **{field: value})


@pytest.mark.parametrize("change", [{"tp": 0}, {"zero": 4}, {"recompute": "some"}])
def test_impossible_layouts_are_refused(change):
    with pytest.raises(ConfigError):
        Layout(**change)


def test_activations_are_those_of_korthikanti():
    """arXiv 2205.05198, table 2: bytes a layer, token and hidden unit, without the scores: 10 + 24/t, and 34/t with
    sequence parallelism; full recomputation keeps 2."""
    h = GPT3.hidden
    assert layer_activations(GPT3, Layout(tp=8), OLD) / h == pytest.approx(10 + 24 / 8)
    assert layer_activations(GPT3, Layout(tp=8, sp=True), OLD) / h == pytest.approx(34 / 8)
    whole = memory(GPT3, Layout(tp=8, sp=True, pp=8, vpp=1, recompute="none", global_batch=64), OLD)
    selective = memory(GPT3, Layout(tp=8, sp=True, pp=8, vpp=1, recompute="selective", global_batch=64), OLD)
    full = memory(GPT3, Layout(tp=8, sp=True, pp=8, vpp=1, recompute="full", global_batch=64), OLD)
    scores = 5 * GPT3.heads * GPT3.sequence / h
    assert whole.activations / selective.activations == pytest.approx((34 + scores) / 34)
    assert full.activations / selective.activations == pytest.approx(2 / 34)
    assert selective.activations == pytest.approx(96 * 2048 * h * 34 / 8)


def test_states_are_those_of_zero():
    """arXiv 1910.02054, figure 1: 16, 4 + 12/64, 2 + 14/64 and 16/64 bytes a parameter."""
    shape = replace(LLAMA2_7B, vocab=0)
    for zero, each in ((0, 16), (1, 4 + 12 / 64), (2, 2 + 14 / 64), (3, 16 / 64)):
        states = memory(shape, Layout(dp=64, zero=zero, global_batch=64), replace(OLD, attention="fa2")).states
        assert states == pytest.approx(each * shape.layers * shape.layer_parameters)


def test_bubble_and_micro_batches_in_flight_are_those_of_narayanan_and_korthikanti():
    assert bubble(1, 1, 8) == 0
    assert bubble(8, 1, 64) == pytest.approx(7 / 64) and bubble(8, 2, 64) == pytest.approx(7 / 128)
    assert held(8, 1, 64) == 8 and held(8, 2, 64) == pytest.approx(8 * (1 + 7 / 16)) and held(8, 1, 4) == 4


def test_a_ring_moves_its_volume_at_the_speed_of_its_slowest_link():
    size = 1e12  # latency does not count
    inside = group(H100, REACHED, 8, 1)
    assert inside.all_gather(size) == pytest.approx(size * 7 / 8 / (H100.nvlink * REACHED.nvlink), rel=1e-3)
    assert inside.all_reduce(size) == pytest.approx(2 * inside.all_gather(size), rel=1e-3)
    far = group(H100, REACHED, 64, 8)
    assert (far.members, far.nodes) == (1, 64)
    assert far.all_gather(size) == pytest.approx(size * 63 / 64 / (H100.nic * REACHED.nic), rel=1e-2)
    whole_nodes = group(H100, REACHED, 64, 1)
    assert whole_nodes.nodes == 8 and whole_nodes.bandwidth == pytest.approx(8 * H100.nic * REACHED.nic, rel=0.05)
    alone = group(H100, REACHED, 1, 1)
    assert alone.all_gather(size) == alone.all_reduce(size) == alone.all_to_all(size) == 0


def test_small_messages_take_the_tree():
    many = group(H100, REACHED, 1024, 8)
    assert many.all_reduce(1e3) < 2 * many.ring_latency / 5


def test_an_all_to_all_sends_each_byte_once():
    size = 1e12
    inside = group(H100, REACHED, 8, 1)
    assert inside.all_to_all(size) == pytest.approx(size * 7 / 8 / inside.inside, rel=1e-3)
    across = group(H100, REACHED, 16, 1)
    expected = size * 7 / 16 / across.inside + size * 8 / 16 / across.direct
    assert across.all_to_all(size) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_every_gpu_has_the_rates_that_are_reached_of_it(name):
    gpu = load_gpu(name)
    assert f"{gpu.architecture}_bf16" in REACHED.matmul
    if gpu.fp8 is None:
        with pytest.raises(ConfigError, match="no FP8"):
            gpu.peak(fp8=True)
    else:
        assert gpu.peak(fp8=True) > gpu.bf16


def time_of(**layout):
    software = Software("unfused" if layout.pop("old", False) else "cudnn", overlap=layout.pop("overlap", True))
    return step_time(LLAMA3_8B, Layout(**layout), software, Machine(H100, REACHED))


def test_parts_of_a_step_are_positive_and_add_up():
    for layout in ({"dp": 8, "zero": 3, "fsdp": True, "global_batch": 8, "recompute": "full"},
                   {"tp": 2, "sp": True, "pp": 4, "vpp": 4, "dp": 8, "global_batch": 128},
                   {"cp": 4, "dp": 2, "global_batch": 8}, {"cp": 4, "ulysses": True, "dp": 2, "global_batch": 8}):
        parts = time_of(**layout)
        values = {field.name: getattr(parts, field.name) for field in fields(parts)}
        assert min(values.values()) >= 0 and sum(values.values()) - parts.hidden == pytest.approx(parts.total)


def test_more_of_what_costs_takes_longer():
    base = time_of(tp=2, pp=4, vpp=4, dp=8, global_batch=128).total
    assert time_of(tp=2, pp=4, vpp=1, dp=8, global_batch=128).bubble > time_of(
        tp=2, pp=4, vpp=4, dp=8, global_batch=128).bubble
    assert time_of(tp=2, pp=4, vpp=4, dp=8, global_batch=128, recompute="full").total > base
    assert time_of(tp=2, pp=4, vpp=4, dp=8, global_batch=128, overlap=False).total > base
    offloaded = time_of(dp=8, global_batch=8, offload_optimizer=True).optimizer
    assert offloaded > 10 * time_of(dp=8, global_batch=8).optimizer
    limited = step_time(LLAMA3_8B, Layout(), Software(), Machine(H100, REACHED, watts=350))
    assert limited.matmul > time_of().matmul


def test_large_matrix_products_reach_the_efficiency_and_small_ones_do_not():
    machine = Machine(A100, REACHED)
    share = REACHED.matmul["ampere_bf16"]
    for size, low, high in ((32768, 0.95 * share, share), (512, 0, 0.6 * share)):
        reached = 2 * size**3 / machine.product(size, size, size, fp8=False) / A100.bf16
        assert low < reached < high


def test_efficiencies_are_replaced_by_name():
    other = with_values(REACHED, {"matmul.hopper_bf16": 0.5, "leak": 0.3, "attention.hopper_fa1": 0.1})
    assert (other.matmul["hopper_bf16"], other.leak, other.attention["hopper_fa1"]) == (0.5, 0.3, (0.1, 0.1))
    assert other.matmul["ampere_bf16"] == REACHED.matmul["ampere_bf16"]
