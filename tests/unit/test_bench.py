"""The benchmarks run on tiny inputs and say what they were measured on; no time is ever asserted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from grn_scale.config import load_config
from grn_scale.errors import ConfigError
from grn_scale.perf import bench
from grn_scale.perf.measure import peak_memory, repeat, spread

ROOT = Path(__file__).resolve().parents[2]
TINY = ["model.hidden_size=32", "model.num_layers=2", "model.num_heads=2", "model.ffn_hidden_size=64",
        "model.text_hidden_size=8", "data.token_budget=128", "train.precision=fp32"]


def tiny_config(*overrides):
    return load_config(ROOT / "configs/runs/demo.yaml", [*TINY, *overrides])


def check_surroundings(report):
    assert report["hardware"]["cores"] >= 1 and report["hardware"]["memory_bytes"] > 0 and report["hardware"]["cpu"]
    assert report["versions"]["torch"] and report["versions"]["python"] and "T" in report["date"]
    assert report["peak_memory"]["process_bytes"] > 0
    assert report["config"]["data"]["token_budget"] == 128
    json.dumps(report, allow_nan=False)


def test_data_benchmark_reads_a_dataset_it_has_written():
    report = bench.measure("data", tiny_config(), clips=1, samples=40, repeats=2)
    check_surroundings(report)
    results = report["results"]
    assert results["synthetic"] and results["samples"] == 40 and results["payload_bytes"] == 40 * 12 * 64 // 8
    for reading in ("cold", "warm"):
        assert results[reading]["samples_per_second"]["repeats"] == 2
        assert results[reading]["megabytes_per_second"]["median"] > 0
    assert results["pack_loader"]["tokens_per_second"]["median"] > 0
    for form, samples, size in (("image", 40, 8192), ("clip", 1, 1048320)):
        formats = results["formats"][form]
        assert (formats["samples"], formats["bytes_a_sample"]) == (samples, size)
        assert formats["times_npz"]["median"] > 0 and formats["share_of_sequential"]["repeats"] == 2


def test_tokenize_benchmark_measures_decoding_and_encoding_apart(tmp_path):
    config = tiny_config(f"tokenizer.path={random_tokenizer(tmp_path)}", "tokenize.decode_processes=1",
                         "tokenize.batch_clips=2")
    report = bench.measure("tokenize", config, clips=3, samples=1, repeats=2)
    check_surroundings(report)
    results = report["results"]
    assert (results["clips"], results["frames"], results["undecodable_clips"]) == (3, 27, 0)
    assert results["frame_shape"] == [32, 32, 3] and results["encode_batch_clips"] == 2
    assert results["decode_frames_per_second"]["median"] > 0 and results["encode_frames_per_second"]["median"] > 0


def test_tokenizer_benchmark_compares_with_chunk_by_chunk_and_bf16(tmp_path):
    config = tiny_config(f"tokenizer.path={random_tokenizer(tmp_path)}", "tokenize.max_frames=9")
    for widths in (None, "4,8"):
        report = bench.measure("tokenizer", config, clips=1, samples=1, repeats=2, widths=widths)
        check_surroundings(report)
        results = report["results"]
        assert results["frame_shape"] == [9, 32, 32]
        for part in ("encode", "decode"):
            assert results[part]["relative_l2"] < 1e-5 and results[part]["times_as_fast"]["repeats"] == 2
            assert results["bf16"][part]["times_as_fast_as_fp32"]["median"] > 0
        assert 0 <= results["bf16"]["differing_bits"] < 0.5
        assert len(results["bf16"]["differing_bits_by_round"]) == config.model.rounds


@pytest.mark.parametrize("widths", ["160", "a,b", "0,4"])
def test_widths_that_make_no_tokenizer_are_refused(widths):
    with pytest.raises(ConfigError, match="--widths"):
        bench.measure("tokenizer", tiny_config(), clips=1, samples=1, repeats=1, widths=widths)


def test_train_benchmark_prints_json_alone_on_stdout():
    done = subprocess.run([sys.executable, "-m", "grn_scale", "bench", "train", "--repeats", "2", "--json", *TINY],
                          cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    check_surroundings(report)
    results = report["results"]
    assert results["processes"] == 1 and results["tokens_per_step"] == 2 * 5 * 22
    for kind in ("engine", "plain_torch"):
        assert results[kind]["step_seconds"]["repeats"] == 2 and results[kind]["tokens_per_second"]["median"] > 0


def test_checkpoint_benchmark_compares_saves_on_two_ranks():
    report = bench.measure("checkpoint", tiny_config(), clips=1, samples=1, repeats=2, megabytes=1, ranks=2)
    check_surroundings(report)
    results = report["results"]
    assert results["ranks"] == 2 and results["disk"]["staging"]["bytes_per_rank"] > 900_000
    for number in ("synchronous_blocking_seconds", "background_save_seconds"):
        assert results["disk"][number]["median"] > 0
    for number in ("background_stall_seconds", "stall_over_blocking"):
        assert results["disk"][number]["first"] > 0 and results["disk"][number]["later"]["repeats"] == 1
    assert results["disk"]["step_seconds"]["slowdown"]["repeats"] == 2
    with pytest.raises(ConfigError, match="--ranks 3"):
        bench.measure("checkpoint", tiny_config(), clips=1, samples=1, repeats=2, megabytes=1, ranks=3)


def test_clip_that_fits_no_pack_is_refused_with_the_budget_that_would_do():
    with pytest.raises(ConfigError, match="data.token_budget=256 or more"):
        bench.measure("train", tiny_config("tokenize.latent_side=8"), clips=1, samples=1, repeats=1)


@pytest.mark.parametrize(("argv", "words"), [
    (["tokenise"], "did you mean tokenize?"),
    (["data", "--repeats", "0"], "must be at least 1"),
    (["--cips", "3"], "did you mean --clips?"),
])
def test_bad_usage_is_refused(argv, words):
    with pytest.raises(ConfigError) as caught:
        bench.main(argv)
    assert words in str(caught.value)


def test_spread_tells_the_median_and_the_extremes():
    assert spread([3.0, 1.0, 2.00004]) == {"median": 2.0, "min": 1.0, "max": 3.0, "repeats": 3}
    assert len(repeat(lambda: None, 4, warmup=2)) == 4
    assert peak_memory()["process_bytes"] > 1 << 20


def random_tokenizer(folder):
    """File of a small untrained tokenizer with the demo's 16 latent channels."""
    from safetensors.torch import save_file

    from grn_scale.tokenizer.video import VideoTokenizer, VideoTokenizerShape

    path = folder / "tokenizer.safetensors"
    save_file(VideoTokenizer(VideoTokenizerShape(8, 8, 16)).state_dict(), path)
    return path


def test_gpu_benchmark_runs_its_whole_path_on_a_cpu():
    tiny = ["model.hidden_size=32", "model.num_layers=4", "model.num_heads=2", "model.ffn_hidden_size=64",
            "model.num_chunks=2", "model.text_hidden_size=8", "model.latent_channels=4", "tokenize.latent_side=2",
            "tokenize.max_frames=1001"]
    done = subprocess.run([sys.executable, "-m", "grn_scale", "bench", "gpu", "--tokens", "256", "--repeats", "2",
                           "--json", *tiny], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    assert [step["token_budget"] for step in results["steps"]] == [256]
    step, = results["steps"]
    assert step["layers"] == step["layers_of_the_model"] == 4 and step["fill"] > 0.9
    assert step["mfu"] is None and step["model_tflops_per_second"]["repeats"] == 2
    shares = step["profile"]["shares"]
    assert shares["matrix products"] > 0 and shares["attention"] >= 0 and len(step["profile"]["longest"]) == 15
    kernels = results["kernels"]
    assert kernels["attention"]["256"]["quickest"] == "sdpa" and kernels["update"]["torch"]["seconds"]["repeats"] == 2
    assert kernels["norm"]["torch"]["gigabytes_per_second"] > 0


def test_gpu_benchmark_refuses_packs_without_room_for_a_frame_and_lists_that_are_none(capsys):
    with pytest.raises(ConfigError, match="ask for 1610 tokens or more"):
        bench.main(["gpu", "--tokens", "1024"])
    with pytest.raises(ConfigError, match="--tokens is 12,x"):
        bench.main(["gpu", "--tokens", "12,x"])


@pytest.mark.parametrize("name,kind", [
    ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT", "matrix products"), ("aten::mm", "matrix products"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_3", "attention"),
    ("triton_red_fused__to_copy_add_mul_0", "compiled chains"),
    ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "communication"),
    ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "update"), ("Memcpy DtoD", "copies"),
    ("void at::native::vectorized_elementwise_kernel<4, MulFunctor>", "element-wise")])
def test_kernels_are_sorted_by_kind(name: str, kind: str):
    from grn_scale.perf import kernel_times

    assert kernel_times.kind(name) == kind
