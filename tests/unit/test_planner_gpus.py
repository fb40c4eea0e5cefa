"""Which GPU a text names: one lookup for plans, published cases and the MFU of training."""

import pytest

from grn_scale.errors import ConfigError
from grn_scale.planning.case_gpu import case_gpu
from grn_scale.planning.hardware import NAMES, find_gpu, known_gpus, load_gpu, peak_flops

FOUND = {
    "H100": "H100", "h100": "H100", "NVIDIA H100 80GB HBM3": "H100", "H100-80GB": "H100", "8x H100 SXM5": "H100",
    "H100-SXM5-80GB": "H100", "NVIDIA H100 Tensor Core GPU": "H100", "h100 pcie": "H100-PCIe",
    "NVIDIA H100 PCIe": "H100-PCIe", "H100 PCIe (80 GB)": "H100-PCIe", "NVIDIA H100 NVL": "H100-NVL",
    "A100": "A100-80GB", "A100 (80GB)": "A100-80GB", "NVIDIA A100-SXM4-80GB": "A100-80GB", "A100-80GB": "A100-80GB",
    "A100 ('NVIDIA Ampere')": "A100-80GB", "A100 (40GB)": "A100-40GB", "A100 40G": "A100-40GB",
    "NVIDIA A100-SXM4-40GB": "A100-40GB", "NVIDIA A100-PCIE-40GB": "A100-PCIe-40GB",
    "NVIDIA A100 80GB PCIe": "A100-PCIe", "A100-80GB PCIe": "A100-PCIe", "NVIDIA A800-SXM4-80GB": "A800",
    "A800": "A800",
    "NVIDIA A800 80GB PCIe": "A800-PCIe", "H800": "H800", "NVIDIA H800": "H800", "H800 PCIe": "H800-PCIe",
    "H20": "H20", "H200": "H200",
    "NVIDIA H200": "H200", "H200 141GB HBM3e": "H200", "NVIDIA H200 NVL": "H200-NVL", "GH200": "GH200",
    "NVIDIA GH200 480GB": "GH200", "B200": "B200", "NVIDIA B200": "B200", "B200 192GB": "B200", "HGX B200": "B200",
    "B300": "B300", "GB200": "GB200", "GB200 NVL72": "GB200", "NVIDIA GB300": "GB300", "NVIDIA L40S": "L40S",
    "L40": "L40", "Tesla V100-SXM2-32GB": "V100-32GB", "NVIDIA A40": "A40", "NVIDIA RTX A6000": "A6000",
    "NVIDIA GeForce RTX 4090": "RTX-4090", "AMD Instinct MI300X": "MI300X", "MI250X": "MI250X", "TPU v4": "TPU-v4",
    "TPU-v5p": "TPU-v5p", "Intel Gaudi 2": "Gaudi2", "64 A100s": "A100-80GB", "8xA100-80GB": "A100-80GB",
    "A100x8": "A100-80GB", "512 A100s (40GB)": "A100-40GB", "TPUv4": "TPU-v4", "RTX4090": "RTX-4090"}


@pytest.mark.parametrize("text, name", FOUND.items())
def test_gpus_are_found_by_free_text(text, name):
    assert find_gpu(text).name == name
    assert peak_flops(text) == find_gpu(text).bf16


@pytest.mark.parametrize("text, near", [
    ("L40T", "did you mean L40"), ("H100 96GB", "did you mean H100"), ("H200 SXM 282GB", "did you mean H200"),
    ("A100-SXM-64GB", "did you mean A100-40GB or"), ("GH200 144G HBM3e", "did you mean GH200"),
    ("X1000", "did you mean"),
    ("NVIDIA H100 of another kind", "did you mean H100"), ("RTX 6000 Ada", "did you mean"), ("CPU", "known are"),
    ("", "known are"), ("A10G", "unknown GPU 'A10G'"), ("NVIDIA GeForce RTX 9090", "unknown GPU"),
    ("A100 (HBM column reaches 78.7 GB)", "did you mean A100-40GB")])
def test_a_variant_that_is_not_known_is_refused_with_the_nearest(text, near):
    with pytest.raises(ConfigError, match=near.replace("(", r"\(")):
        find_gpu(text)
    assert peak_flops(text) is None


def test_no_two_gpus_have_a_name_in_common():
    words = [frozenset(name.split()) for gpu in known_gpus() for name in gpu.names]
    assert len(words) == len(set(words))
    for gpu in known_gpus():
        assert find_gpu(gpu.name) is gpu, gpu.name
        assert gpu.name in NAMES or gpu.like in NAMES and gpu.bf16 <= load_gpu(gpu.like).bf16 * 1.5


@pytest.mark.parametrize("case, name, why", [
    ({"gpu": "H100"}, "H100", None), ({"gpu": "H100 PCIe"}, "H100-PCIe", None),
    ({"gpu": "A100"}, "A100-80GB", "does not say which model"),
    ({"gpu": "A100 (HBM column reaches 78.7 GB)"}, "A100-80GB", "names no other"),
    ({"gpu": "H100 custom 96GB"}, "H100", "names no other"), ({"gpu": "MI300X"}, "MI300X", "reached of H100"),
    ({"gpu": "Ascend 910B"}, "H100", "usual one since 2023"), ({"gpu": "a GPU", "source": "arXiv 2104.04473"},
                                                               "A100-80GB", "usual one before 2023"),
    ({"gpu": "P4d", "measured_tflops_per_gpu": 156, "mfu": 0.5}, "A100-80GB", "TFLOP/s over MFU"),
    ({"gpu": None, "name": "run-b200-x"}, "B200", "the case's name has it"), ({"gpu": None}, "H100", "not stated")])
def test_a_case_always_has_a_gpu_and_says_what_is_assumed(case, name, why):
    gpu, assumed = case_gpu({"name": "run", **case})
    assert gpu.name == name
    assert assumed is None if why is None else why in assumed
