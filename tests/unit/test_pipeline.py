"""Model, tokenizer and text encoder as one object."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from grn_scale.config.schema import ModelConfig
from grn_scale.demo.text_encoder import HIDDEN_SIZE, build_text_encoder
from grn_scale.errors import ConfigError, UserError
from grn_scale.model import build_model
from grn_scale.sampling import GRNPipeline, SamplingSettings, generate
from grn_scale.tokenizer import load_tokenizer
from grn_scale.tokenizer.layers import use_channels_last
from grn_scale.tokenizer.text import load_text_encoder
from grn_scale.tokenizer.video import VideoTokenizer, VideoTokenizerShape

MODEL = ModelConfig(hidden_size=24, num_layers=2, num_heads=2, ffn_hidden_size=32, text_hidden_size=HIDDEN_SIZE,
                    latent_channels=4, rounds=2)
SMALL = {"num_frames": 5, "height": 32, "width": 48, "num_inference_steps": 3, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> GRNPipeline:
    folder = build_text_encoder(["a red circle", "a blue square"], tmp_path_factory.mktemp("text") / "encoder")
    torch.manual_seed(0)
    # Laid out in memory as a loaded one is: results then agree to the last bit.
    tokenizer = use_channels_last(VideoTokenizer(VideoTokenizerShape(4, 4, 4))).eval().requires_grad_(False)
    return GRNPipeline(build_model(MODEL, seed=1).eval(), tokenizer, load_text_encoder(folder, 16))


def test_prompts_become_videos_and_a_seed_repeats(pipeline):
    output = pipeline(["a red circle", "a blue square"], **SMALL, seed=3)
    assert [frames.shape for frames in output.frames] == [(5, 32, 48, 3)] * 2 and output.steps == [3, 3]
    again = pipeline(["a red circle", "a blue square"], **SMALL, seed=3)
    other = pipeline(["a red circle", "a blue square"], **SMALL, seed=4)
    assert all(map(np.array_equal, output.frames, again.frames))
    assert not np.array_equal(output.frames[0], other.frames[0])
    assert len(pipeline("a red circle", **SMALL, num_videos_per_prompt=3).frames) == 3


def test_it_samples_what_generate_samples_for_its_conditions(pipeline):
    asked = pipeline.conditions(["a red circle"], frames=5, height=32, width=48, negative="blue")
    settings = SamplingSettings(3, 3, 2.0)
    expected = generate(pipeline.model, asked, settings, seed=3)
    output = pipeline("a red circle", negative_prompt="blue", num_frames=5, height=32, width=48, settings=settings,
                      seed=3)
    assert np.array_equal(output.frames[0], next(pipeline.decode(expected)))


def test_an_image_begins_the_clip_and_segments_go_on_from_the_last_frame(pipeline):
    image = np.full((32, 48, 3), 200, np.uint8)
    asked = pipeline.conditions(["a red circle"], frames=5, height=32, width=48, first_frames=[image])
    assert asked[0].first_frame_labels.shape == (MODEL.label_channels, 1, 2, 3)
    output = pipeline("a red circle", image=image, num_segments=3, **SMALL)
    assert output.frames[0].shape == (13, 32, 48, 3) and output.steps == [9]
    assert np.array_equal(output.frames[0][:5], pipeline("a red circle", image=image, **SMALL).frames[0])


def test_a_further_segment_is_the_clip_that_begins_with_the_last_frame_under_its_own_draw(pipeline):
    # With a trained tokenizer, whose labels tell pictures apart.
    model = build_model(dataclasses.replace(MODEL, latent_channels=16, rounds=4), seed=1).eval()
    trained = dataclasses.replace(pipeline, model=model, tokenizer=load_tokenizer("small"))
    prompts = ["a red circle", "a blue square"]
    whole = trained(prompts, **SMALL, num_segments=2, seed=6)
    first = trained(prompts, **SMALL, seed=6)
    asked = trained.conditions(prompts, frames=5, height=32, width=48,
                               first_frames=[frames[-1] for frames in first.frames])
    assert not torch.equal(asked[0].first_frame_labels, asked[1].first_frame_labels)
    second = list(trained.decode(trained.generate(asked, SamplingSettings(3, 3, 2.0), seed=6, first_draw=2)))
    for frames, begin, end in zip(whole.frames, first.frames, second, strict=True):
        assert np.array_equal(frames, np.concatenate((begin, end[1:])))
    # The further segment goes on from where the one before ended: its own first frame is that picture, nearly.
    jump = [np.abs(end[0].astype(int) - begin[-1]).mean() for begin, end in zip(first.frames, second)]
    other = np.abs(second[0][0].astype(int) - first.frames[1][-1]).mean()
    assert max(jump) < other / 2


@pytest.mark.parametrize(("frames", "image", "tag", "latents"), [(1, False, "<T2I>", 1), (5, False, "<T2V>", 2),
                                                                  (5, True, "<I2V>", 2)])
def test_each_task_reads_its_own_tagged_texts(pipeline, frames, image, tag, latents):
    given = [np.full((32, 48, 3), 90, np.uint8)] if image else None
    asked, = pipeline.conditions(["a red circle"], frames=frames, height=32, width=48, negative="a blue square",
                                 first_frames=given)
    text, negative = pipeline.encoder.encode([tag + "a red circle", tag + "a blue square"])
    assert torch.equal(asked.text_states, text) and torch.equal(asked.negative_text_states, negative)
    assert asked.thw == (latents, 2, 3) and (asked.first_frame_labels is not None) == image
    bare, = pipeline.conditions(["a red circle"], frames=frames, height=32, width=48, first_frames=given)
    assert torch.equal(bare.negative_text_states, pipeline.encoder.encode([""])[0])


def test_a_negative_prompt_matters_where_there_is_guidance(pipeline):
    plain, avoided, unguided, unguided_avoided = (
        pipeline("a red circle", **SMALL | {"guidance_scale": scale}, negative_prompt=negative, seed=3).frames[0]
        for scale in (4.0, 1.0) for negative in ("", "a blue square"))
    assert not np.array_equal(plain, avoided) and np.array_equal(unguided, unguided_avoided)


def test_one_frame_is_a_picture_with_its_own_tag(pipeline):
    assert pipeline("a red circle", **SMALL | {"num_frames": 1}).frames[0].shape == (1, 32, 48, 3)
    for prompt in ("a  red&nbsp;circle ", "<T2I>a red circle"):
        assert pipeline.text(prompt, "T2I") == "<T2I>a red circle"
    with pytest.raises(ConfigError, match="tag of T2V, but T2I is sampled"):
        pipeline.text("<T2V>a red circle", "T2I")


@pytest.mark.parametrize(("change", "message"), [
    ({"num_frames": 7}, "7 frames are asked for.*5 would do"), ({"height": 40}, "multiples of 16"),
    ({"num_segments": 0}, "0 segments"),
    ({"num_frames": 1, "image": np.zeros((32, 48, 3), np.uint8)}, "leaves nothing"),
])
def test_what_the_tokenizer_cannot_make_is_refused(pipeline, change, message):
    with pytest.raises(ConfigError, match=message):
        pipeline("a red circle", **SMALL | change)


def test_a_converted_folder_is_the_same_pipeline(pipeline, tmp_path):
    from safetensors.torch import save_file

    from grn_scale.checkpoint.checkpoint import save_checkpoint
    from grn_scale.checkpoint.chunks import whole
    from grn_scale.cli import main
    from grn_scale.config.load import to_dict

    weights = [whole(name, tensor.detach()) for name, tensor in pipeline.model.named_parameters()]
    state = {"step": 1, "config": {"model": to_dict(MODEL)}}
    save_checkpoint(tmp_path / "run", 1, {"model": weights}, state, keep_last=1)
    stored = {name: tensor.contiguous() for name, tensor in pipeline.tokenizer.state_dict().items()}
    save_file(stored, tmp_path / "tokenizer.safetensors")
    encoder = build_text_encoder(["a red circle", "a blue square"], tmp_path / "encoder")
    assert main(["convert", "--input", f"{tmp_path}/run", "--from", "native", "--to", "hf", "--output",
                 f"{tmp_path}/hf", "--tokenizer", f"{tmp_path}/tokenizer.safetensors", "--text-encoder",
                 str(encoder)]) == 0
    loaded = GRNPipeline.from_pretrained(tmp_path / "hf", device="cpu", max_text_tokens=16)
    first, second = (one("a red circle", **SMALL, seed=3).frames[0] for one in (pipeline, loaded))
    assert np.array_equal(first, second)


def test_a_folder_without_an_index_is_no_pipeline(tmp_path):
    with pytest.raises(UserError, match="has no model_index.json"):
        GRNPipeline.from_pretrained(tmp_path)
