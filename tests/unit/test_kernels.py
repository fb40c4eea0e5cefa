"""Every choice of kernels computes the same; one that is missing is said."""

from __future__ import annotations

import importlib.util
import shutil
import sys

import pytest
import torch

from grn_scale.config.check import check_layout
from grn_scale.config.kernel_schema import KernelsConfig
from grn_scale.config.load import load_config
from grn_scale.config.schema import OptimizerConfig
from grn_scale.errors import ConfigError, UserError
from grn_scale.model.attention import packed_attention
from grn_scale.model.attention_kernels import AttentionKernels, attention_kernels, cudnn_sdpa, sdpa, varlen
from grn_scale.model.rope import rotate
from grn_scale.model.sequence import Grid, SequenceLayout, lay_out
from grn_scale.parallel.fused import adamw, choose, torch_norm

CPU = torch.device("cpu")
GRIDS = [Grid((1, 2, 2), 1.0, 3), Grid((3, 4, 5), 1.0, 5), Grid((1, 2, 2), 1.0, 3), Grid((2, 2, 3), 1.0, 1),
         Grid((2, 6, 6), 1.0, 7, first_frame=True)]


def each_segment(q, k, v, q_starts, k_starts, q_longest, k_longest):
    """Segments of any lengths, one by one."""
    bounds = list(zip(q_starts.tolist(), q_starts[1:].tolist(), k_starts.tolist(), k_starts[1:].tolist()))
    assert (q_longest, k_longest) == (max(b - a for a, b, _, _ in bounds), max(d - c for _, _, c, d in bounds))
    assert (len(q), len(k), len(v)) == (bounds[-1][1], bounds[-1][3], bounds[-1][3])
    assert q_starts.dtype == k_starts.dtype == torch.int32
    return torch.cat([sdpa(*(x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d])))[0].transpose(0, 1)
                      for a, b, c, d in bounds])


def attended(layout: SequenceLayout, kernels: AttentionKernels) -> list[torch.Tensor]:
    """Outputs, and gradients of queries, keys and values."""
    generator = torch.Generator().manual_seed(1)
    q, k, v, weight = (torch.randn(layout.length, 3, 8, generator=generator) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = packed_attention(q, k, v, layout, kernels)
    (out * weight).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("form", ["v1", "v2"])
@pytest.mark.parametrize("long", [0, 10, 30, 10_000])
def test_segments_that_run_in_one_call_see_what_they_see_alone(form: str, long: int) -> None:
    layout = lay_out(GRIDS, form, 8, length=220)
    expected = attended(layout, AttentionKernels(sdpa))
    for kernels in (AttentionKernels(sdpa, each_segment, long), AttentionKernels(many=each_segment)):
        for found, want in zip(attended(layout, kernels), expected):
            torch.testing.assert_close(found, want, atol=1e-6, rtol=1e-5)


def test_auto_gives_long_segments_to_cudnn_and_short_ones_to_varlen_on_a_gpu_in_bf16_only(monkeypatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91501)
    kernels = attention_kernels("auto", cuda, torch.bfloat16)
    assert (kernels.equal, kernels.many) == (cudnn_sdpa, varlen)
    assert (kernels.at_once(1023), kernels.at_once(1024)) == (True, False)
    assert str(kernels) == "cudnn_sdpa from 1024 keys on, varlen below"
    assert attention_kernels("varlen", cuda, torch.bfloat16).at_once(100_000)
    for device, dtype in ((cuda, torch.float32), (CPU, torch.bfloat16)):
        assert attention_kernels("auto", device, dtype) == AttentionKernels(sdpa)


@pytest.mark.parametrize("version", [None, 91500])
def test_a_cudnn_with_known_faults_is_not_taken(monkeypatch, version: int | None) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    assert attention_kernels("auto", cuda, torch.bfloat16) == AttentionKernels(many=varlen)
    with pytest.raises(UserError, match="kernels.attention=cudnn: .*; install .*, or set kernels.attention=auto"):
        attention_kernels("cudnn", cuda, torch.bfloat16)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)  # a torch that has none
    assert attention_kernels("auto", cuda, torch.bfloat16) == AttentionKernels(sdpa)
    with pytest.raises(UserError, match="kernels.attention=varlen: .* has no attention over segments"):
        attention_kernels("varlen", cuda, torch.bfloat16)


def test_flash_attention_is_refused_on_a_gpu_without_kernels_for_it_and_undone_for_other_runs(monkeypatch) -> None:
    from torch.nn import attention

    active: list[str] = []
    monkeypatch.setattr(attention, "list_flash_attention_impls", lambda: ["FA3", "FA4"])
    monkeypatch.setattr(attention, "activate_flash_attention_impl", active.append)
    monkeypatch.setattr(attention, "restore_flash_attention_impl", lambda _raise_warn: active.clear())
    capability, cuda = [9, 0], torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: tuple(capability))
    assert attention_kernels("flash3", cuda, torch.bfloat16) == AttentionKernels(many=varlen) and active == ["FA3"]
    attention_kernels("auto", cuda, torch.bfloat16)
    assert active == []
    capability[0] = 8
    with pytest.raises(UserError, match="no kernels for a GPU of compute capability 8.0"):
        attention_kernels("flash4", cuda, torch.bfloat16)
    assert active == []


@pytest.mark.parametrize("settings,module", [
    ({"norm": "apex"}, "apex"), ({"cross_entropy": "apex"}, "apex")])
def test_a_library_that_is_asked_for_and_missing_is_named(settings: dict, module: str) -> None:
    if importlib.util.find_spec(module):
        pytest.skip(f"{module} is installed")
    (field, value), = settings.items()
    said = rf"kernels\.{field}={value}: .* cannot be imported .* set kernels\.{field}=torch"
    with pytest.raises(UserError, match=said):
        choose(KernelsConfig(**settings), CPU, torch.float32)


def test_the_other_apex_of_pypi_is_recognised(tmp_path, monkeypatch) -> None:
    if importlib.util.find_spec("apex"):
        pytest.skip("apex is installed")
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    weight = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(UserError, match="PyPI's package of that name is another project"):
        adamw([{"params": [weight]}], OptimizerConfig(), "apex")
    del sys.modules["apex"]  # other tests of this process look for theirs


def test_attention_that_is_asked_for_and_missing_is_named() -> None:
    cuda = torch.device("cuda")
    for name, module in (("transformer_engine", "transformer_engine"), ("flash3", "flash_attn_interface"),
                         ("flash4", "flash_attn")):
        if importlib.util.find_spec(module):
            continue
        with pytest.raises(UserError, match=rf"kernels\.attention={name}: .* set kernels\.attention=auto"):
            attention_kernels(name, cuda, torch.bfloat16)


def test_compiling_on_a_cpu_needs_a_compiler(monkeypatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="no C\\+\\+ compiler"):
        choose(KernelsConfig(compile="always"), CPU, torch.float32)
    assert not choose(KernelsConfig(), CPU, torch.float32).compiled


def test_a_gpu_without_what_compiling_needs_runs_the_chains_as_they_are(monkeypatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not choose(KernelsConfig(), cuda, torch.bfloat16).compiled
    with pytest.raises(UserError, match="kernels.compile=always, but .* set kernels.compile=auto"):
        choose(KernelsConfig(compile="always"), cuda, torch.bfloat16)


def test_an_update_by_a_library_for_gpus_is_refused_on_the_cpu() -> None:
    with pytest.raises(ConfigError, match="set kernels.adamw=torch"):
        check_layout(load_config(None, ["kernels.adamw=apex", "zero.stage=2", "zero.offload_optimizer=true",
                                        "data.token_budget=1024"]), 1)


def test_fused_cross_entropy_is_refused_for_two_classes() -> None:
    with pytest.raises(ConfigError, match="kernels.cross_entropy=torch"):
        check_layout(load_config(None, ["kernels.cross_entropy=apex", "data.token_budget=1024"]), 1)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_chains_compute_the_same(dtype: torch.dtype) -> None:
    kernels = choose(KernelsConfig(compile="always"), CPU, dtype)
    layout = lay_out(GRIDS, "v2", 8, length=220)
    generator = torch.Generator().manual_seed(1)
    for plain, compiled, rest in ((torch_norm, kernels.norm, (torch.rand(8, generator=generator).to(dtype), 1e-6)),
                                  (rotate, kernels.rotate, (layout.cos, layout.sin))):
        x = torch.randn(220, 3, 8, generator=generator).to(dtype)
        found = []
        for function in (plain, compiled):
            leaf = x.clone().requires_grad_()
            out = function(leaf, *rest)
            out.float().square().sum().backward()
            assert out.dtype == dtype
            found.append((out.detach(), leaf.grad))
        close = {"atol": 1e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
        for a, b in zip(*found):
            torch.testing.assert_close(b, a, **close)
