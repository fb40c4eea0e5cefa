"""train-tokenizer on a few small clips: it learns, resumes bit for bit, and refuses what cannot work."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from grn_scale.config.load import load_config
from grn_scale.data.decode import read_clip
from grn_scale.demo import shapes
from grn_scale.demo.clips import encode_h264
from grn_scale.errors import ConfigError, DoNotRequeue, UserError
from grn_scale.tokenizer import load_tokenizer
from grn_scale.tokenizer.clips import to_video
from grn_scale.tokenizer.muon import orthogonal
from grn_scale.tokenizer.training import (
    CHECKPOINT,
    TOKENIZER,
    State,
    decode_sources,
    draw_batch,
    main,
    psnr,
    rate_factor,
    reconstruction_loss,
)
from grn_scale.tokenizer.training_config import ClipsConfig, OptimizerConfig, PhasesConfig, TokenizerTrainingConfig
from grn_scale.train.metrics import read_metrics

TINY = ["model.dim=4", "model.dec_dim=4", "model.latent_channels=4", "model.residual_blocks=1",
        "data.decode_processes=1",
        "data.sides=[16,32]", "data.crops=[16,32]", "data.crop_shares=[0.7,0.3]", "train.unquantized_steps=1",
        "train.log_every=1", "train.checkpoint_every=2", "train.threads=1", "optimizer.warmup_steps=1",
        "optimizer.muon_lr=0.01"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Manifests of four training clips and one held-out clip, 32x32 and 9 frames each."""
    folder = tmp_path_factory.mktemp("clips")
    lines = []
    for i, attributes in enumerate(shapes.combinations()[::200]):
        (folder / f"{i}.mp4").write_bytes(encode_h264(shapes.render(attributes, i)))
        lines.append(json.dumps({"path": f"{i}.mp4", "caption": attributes.caption, "width": 32, "height": 32}) + "\n")
    (folder / "train.jsonl").write_text("".join(lines[:-1]))
    (folder / "held_out.jsonl").write_text(lines[-1])
    return folder


def run(clips, output, *more, phases="[[2,1,2],[2,5,2]]"):
    return main([f"data.manifest={clips}/train.jsonl", f"data.held_out={clips}/held_out.jsonl", f"output={output}",
                 *TINY, f"train.phases={phases}", *more])


@pytest.fixture(scope="module")
def finished(clips, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "whole"
    assert run(clips, output) == 0
    return output


def test_a_run_leaves_a_tokenizer_that_loads_and_the_record_of_how_it_came_about(finished):
    assert {path.name for path in finished.iterdir()} == {
        TOKENIZER, CHECKPOINT, "config.yaml", "metrics.jsonl", "metrics.png"}
    tokenizer = load_tokenizer(finished / TOKENIZER)
    assert (tokenizer.shape.dim, tokenizer.latent_channels) == (4, 4)
    rows = read_metrics(finished / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and [row["frames"] for row in rows] == [1, 1, 5, 5]
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert {"psnr_db_16", "psnr_db_32"} <= rows[-1].keys()
    assert load_config(finished / "config.yaml", (), TokenizerTrainingConfig).train.steps == 4


def test_the_last_line_on_stdout_is_the_result(clips, tmp_path, capsys):
    run(clips, tmp_path / "run", phases="[[1,1,1]]")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["tokenizer"] == str(tmp_path / "run" / TOKENIZER) and result["steps"] == 1
    assert 0 < result["psnr_db_32"] < 60


@pytest.mark.parametrize("stop_at", [2, 3])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(clips, finished, tmp_path, monkeypatch, stop_at):
    update = State.update

    def stop(state, *arguments):
        if state.step == stop_at:
            raise KeyboardInterrupt
        return update(state, *arguments)

    monkeypatch.setattr(State, "update", stop)
    with pytest.raises(KeyboardInterrupt):
        run(clips, tmp_path / "run")
    monkeypatch.undo()
    assert run(clips, tmp_path / "run", "--resume", "must") == 0
    for name in (CHECKPOINT, TOKENIZER):
        whole, resumed = load_file(finished / name), load_file(tmp_path / "run" / name)
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    whole, resumed = (read_metrics(folder / "metrics.jsonl") for folder in (finished, tmp_path / "run"))
    assert [row["loss"] for row in whole] == [row["loss"] for row in resumed]


def test_a_used_folder_is_not_overwritten(clips, finished):
    before = (finished / CHECKPOINT).read_bytes()
    with pytest.raises(ConfigError, match="holds a run already"):
        run(clips, finished)
    assert (finished / CHECKPOINT).read_bytes() == before


def test_resume_must_have_something_to_resume(clips, tmp_path):
    with pytest.raises(ConfigError, match="--resume must: there is no"):
        run(clips, tmp_path / "new", "--resume", "must")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("change", ["model.dim=8", "optimizer.muon_lr=0.02", "seed=5"])
def test_resume_with_another_configuration_is_refused(clips, finished, change):
    with pytest.raises(ConfigError, match=f"another configuration .*{change.partition('=')[0]}"):
        run(clips, finished, "--resume", "auto", change)


def test_a_damaged_checkpoint_is_refused(clips, tmp_path):
    (tmp_path / CHECKPOINT).write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot read .* as a checkpoint"):
        run(clips, tmp_path, "--resume", "auto")


@pytest.mark.parametrize("missing", ["output", "data.manifest"])
def test_what_is_not_set_is_named(clips, tmp_path, missing):
    given = {"output": tmp_path / "run", "data.manifest": clips / "train.jsonl"}
    with pytest.raises(ConfigError, match=f"{missing} is not set"):
        main([f"{key}={value}" for key, value in given.items() if key != missing])


def test_unknown_keys_name_the_nearest_one(clips, tmp_path):
    with pytest.raises(ConfigError, match="did you mean optimizer.lr"):
        run(clips, tmp_path / "run", "optimizer.ln=1")


@pytest.mark.parametrize("override, message", [
    ("train.phases=[[1,4,1]]", r"frames 1 \+ 4k"), ("train.phases=[[1,13,1]]", "data.frames is 9"),
    ("train.phases=[]", "train.phases is empty"), ("model.multipliers=[1,3,4,4]", "from 1 to 3"),
    ("model.multipliers=[1,2,4]", "4 stages"), ("data.crops=[20]", "multiple of 16"),
    ("data.crop_shares=[1.0]", "data.crop_shares"), ("data.shares=[0.5,0.5]", "1 manifests"),
    ("data.sides=[8]", "none may be smaller"), ("optimizer.schedule=linear", "cosine, constant")])
def test_impossible_settings_are_refused_before_anything_is_read(clips, tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        run(clips, tmp_path / "run", override, phases="[[1,9,1]]")
    assert not (tmp_path / "run").exists()


def test_the_shipped_configuration_is_valid():
    config = load_config("configs/tokenizer/small.yaml", (), TokenizerTrainingConfig)
    assert (config.model.latent_channels, config.model.rounds) == (16, 4)


def config_of(clips, **data):
    settings = {"sides": (16, 32), "crops": (16, 32), "crop_shares": (0.5, 0.5), "decode_processes": 1}
    return ClipsConfig(manifest=f"{clips}/train.jsonl", **{**settings, **data})


@pytest.fixture(scope="module")
def sources(clips):
    config = config_of(clips)
    return decode_sources(config.manifests, config.shares, config, config.sides)


def test_clips_are_decoded_at_every_side_their_source_fills(clips):
    config = config_of(clips, sides=(16, 32, 48))
    source, = decode_sources(config.manifests, (), config, config.sides)
    assert {side: len(group) for side, group in source.by_side.items()} == {16: 3, 32: 3, 48: 0}
    assert np.array_equal(source.by_side[32][0], read_clip(clips / "0.mp4", fps=8, max_frames=9, height=32, width=32))


def test_batches_depend_on_seed_and_step_alone(sources, clips):
    def draw(step):
        return draw_batch(sources, (0, "batch", step), 5, 4, config_of(clips), 4)

    assert torch.equal(draw(1), draw(1))
    drawn = [draw(step) for step in range(12)]
    assert {tuple(batch.shape) for batch in drawn} == {(4, 3, 5, 16, 16), (1, 3, 5, 32, 32)}
    assert all(batch.min() >= -1 and batch.max() <= 1 for batch in drawn)


def test_shares_weigh_manifests_against_their_number_of_clips(clips):
    config = ClipsConfig(manifest=f"{clips}/train.jsonl, {clips}/held_out.jsonl", shares=(0.001, 0.999), sides=(16,),
                         crops=(16,), crop_shares=(1.0,), decode_processes=1)
    found = decode_sources(config.manifests, config.shares, config, config.sides)
    batch = draw_batch(found, (0,), 9, 8, config, 1)
    assert torch.equal(batch, to_video(np.stack(found[1].by_side[16] * 8)))


def test_undecodable_clips_are_left_out_and_none_left_is_an_error(clips, tmp_path):
    line = '{"path": "%s", "caption": "a"}\n'
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    manifest = tmp_path / "clips.jsonl"
    manifest.write_text(line % "bad.mp4" + line % (clips / "0.mp4"))
    config = config_of(clips, sides=(16,), crops=(16,), crop_shares=(1.0,))
    source, = decode_sources([str(manifest)], (), config, config.sides)
    assert len(source.by_side[16]) == 1
    manifest.write_text(line % "bad.mp4")
    with pytest.raises(UserError, match="no clip of .*clips.jsonl can be used"):
        decode_sources([str(manifest)], (), config, config.sides)


def test_clips_that_take_too_much_memory_are_refused(clips, monkeypatch):
    config = config_of(clips)
    object.__setattr__(config, "memory_megabytes", 0)
    with pytest.raises(UserError, match="data.memory_megabytes=0"):
        decode_sources(config.manifests, (), config, config.sides)


def test_clips_shorter_than_a_phase_are_an_error(sources, clips):
    with pytest.raises(UserError, match="no clip holds 13 frames"):
        draw_batch(sources, (0,), 13, 1, config_of(clips), 1)


def tiny_config(*more):
    return load_config(None, [*TINY, "optimizer.lr=3e-3", *more], TokenizerTrainingConfig)


@pytest.mark.parametrize("muon_lr", [0.0, 0.01])
def test_training_lowers_the_loss_through_the_quantiser(sources, clips, muon_lr):
    config = tiny_config(f"optimizer.muon_lr={muon_lr}")
    state = State(config, torch.device("cpu"))
    video = draw_batch(sources, (0,), 1, 3, config_of(clips, sides=(32,), crops=(32,), crop_shares=(1.0,)), 1)
    losses = []
    for _ in range(60):
        loss = reconstruction_loss(state.model, video, 4, config.train)
        losses.append(loss.item())
        state.update(loss, 1.0, config.optimizer)
    assert losses[-1] < 0.5 * losses[0]
    assert psnr(state.model, video, 4).mean() > 10


def test_weight_decay_spares_gains_and_biases():
    state = State(tiny_config("optimizer.muon_lr=0", "optimizer.weight_decay=0.1"), torch.device("cpu"))
    spared, decayed = state.optimizers[0].param_groups
    assert (spared["weight_decay"], decayed["weight_decay"]) == (0.0, 0.1)
    names = {id(p): name for name, p in state.model.named_parameters()}
    assert all(names[id(p)].endswith(("gamma", "bias")) for p in spared["params"])
    assert all(names[id(p)].endswith("weight") for p in decayed["params"])


@pytest.mark.parametrize("shape", [(3, 8, 30), (2, 30, 8), (1, 6, 6)])
def test_muon_brings_singular_values_near_one(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
    assert 0.5 < values.min() and values.max() < 1.3
    assert torch.equal(orthogonal(torch.zeros(shape)), torch.zeros(shape))


def test_average_follows_the_weights_more_slowly_the_older_it_is(sources):
    config = tiny_config()
    state = State(config, torch.device("cpu"))
    before = state.ema.conv2.bias.clone()
    state.update(sum(p.sum() for p in state.model.parameters()), 1.0, config.optimizer)
    torch.testing.assert_close(state.ema.conv2.bias, before + (state.model.conv2.bias - before) * 0.9)


def test_a_gradient_that_is_not_finite_stops_the_run_for_good():
    config = tiny_config()
    state = State(config, torch.device("cpu"))
    loss = sum(p.sum() for p in state.model.parameters()) * float("nan")
    with pytest.raises(DoNotRequeue, match="gradient of step 0"):
        state.update(loss, 1.0, config.optimizer)
    assert state.step == 0 and all(p.isfinite().all() for p in state.model.parameters())


def test_rate_warms_up_in_every_phase_and_falls_over_all():
    train = PhasesConfig(phases=((10, 1, 1), (10, 5, 1)))
    config = OptimizerConfig(warmup_steps=2, end_factor=0.1)
    rates = [rate_factor(step, config, train) for step in range(20)]
    assert rates[0] == pytest.approx(0.5) and rates[10] < rates[9] and rates[11] > rates[10]
    assert rates[1:10] == sorted(rates[1:10], reverse=True) and 0.1 <= rates[-1] < 0.12
    constant = OptimizerConfig(warmup_steps=0, schedule="constant")
    assert {rate_factor(step, constant, train) for step in range(20)} == {1.0}
