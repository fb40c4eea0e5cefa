"""The video autoencoder against the recorded reference, its streaming form, and what loading refuses."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from grn_scale.errors import UserError
from grn_scale.hbq import dequantize_bits, quantize_bits
from grn_scale.tokenizer import load_tokenizer
from grn_scale.tokenizer.initialize import new_tokenizer
from grn_scale.tokenizer.layers import (
    CausalConv3d,
    History,
    add_duplicate_shortcut,
    average_shortcut,
    matrix_conv,
    patchify,
    unpatchify,
    use_channels_last,
)
from grn_scale.tokenizer.load import fingerprint
from grn_scale.tokenizer.video import VideoTokenizer, VideoTokenizerShape

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CASES = ("t1", "t5", "t9")
SMALL = VideoTokenizerShape(4, 8, 6, (1, 2, 2, 2), 1)


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "hbq_tokenizer.safetensors")


@pytest.fixture(scope="module")
def weights(golden):
    return {name.removeprefix("state/"): t for name, t in golden.items() if name.startswith("state/")}


@pytest.fixture(scope="module")
def file(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "reference.safetensors"
    save_file(weights, path)
    return path


@pytest.fixture(scope="module")
def reference(file):
    return load_tokenizer(file)


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return VideoTokenizer(SMALL).eval().requires_grad_(False)


def close(result, expected, tolerance):
    assert result.shape == expected.shape
    assert (result - expected).abs().max().item() <= tolerance


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", ["encode", "encode_chunked"])
def test_latents_equal_the_recorded_reference(golden, reference, case, form):
    close(getattr(reference, form)(golden[f"{case}/video"]), golden[f"{case}/latent"], 2e-4)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", ["decode", "decode_chunked"])
@pytest.mark.parametrize("latent, decoded", [("latent", "decoded"), ("latent_q4", "decoded_q4")])
def test_decodes_equal_the_recorded_reference(golden, reference, case, form, latent, decoded):
    close(getattr(reference, form)(golden[f"{case}/{latent}"]), golden[f"{case}/{decoded}"], 5e-4)


@pytest.mark.parametrize("case", CASES)
def test_four_rounds_of_the_recorded_latents_are_exact(golden, case):
    assert torch.equal(dequantize_bits(quantize_bits(golden[f"{case}/latent"], 4), 4), golden[f"{case}/latent_q4"])


def test_reference_weights_have_the_official_keys(weights):
    layout = json.loads((GOLDEN / "hbq_cases.json").read_text())["hbq_tokenizer.safetensors"]["config"]
    shape = VideoTokenizerShape(layout["dim"], layout["dec_dim"], layout["latent_channels"],
                                tuple(layout["dim_mult"]), layout["num_res_blocks"],
                                tuple(map(bool, layout["temperal_downsample"])))
    own = VideoTokenizer(shape).state_dict()
    assert {name: t.shape for name, t in own.items()} == {name: t.shape for name, t in weights.items()}


def test_official_widths_give_the_published_number_of_parameters():
    with torch.device("meta"):
        tokenizers = [VideoTokenizer(VideoTokenizerShape(160, 256, z)) for z in (64, 16)]
    counts = [sum(p.numel() for p in t.parameters()) for t in tokenizers]
    assert counts == [705_693_036, 702_687_612]


@pytest.mark.parametrize("groups", [1, 2, 5])
@pytest.mark.parametrize("frames", [1, 5, 17])
def test_pieces_of_any_size_equal_one_pass(small, groups, frames):
    video = torch.rand(2, 3, frames, 32, 48) * 2 - 1
    features = small.encode(video)
    close(small.encode_chunked(video, groups), features, 1e-5)
    close(small.decode_chunked(features, groups), small.decode(features), 1e-4)


def test_uneven_pieces_equal_one_pass(small):
    video = torch.rand(1, 3, 21, 16, 16) * 2 - 1
    pieces = video.split([5, 4, 12], 2)
    close(torch.cat(list(small.encode_stream(pieces)), 2), small.encode(video), 1e-5)
    features = small.encode(video)
    parts = list(small.decode_stream(features.split([2, 1, 3], 2)))
    assert [part.shape[2] for part in parts] == [5, 4, 12]
    close(torch.cat(parts, 2), small.decode(features), 1e-4)


def test_streams_are_lazy_and_hold_one_piece_at_a_time(small):
    read = []

    def pieces():
        for frames in (1, 4, 4):
            read.append(frames)
            yield torch.zeros(1, 3, frames, 16, 16)

    stream = small.encode_stream(pieces())
    assert read == []
    assert next(stream).shape[2] == 1 and read == [1]
    assert next(stream).shape[2] == 1 and read == [1, 4]


def test_two_clips_can_be_streamed_at_the_same_time(small):
    clips = [torch.rand(1, 3, 9, 16, 16) for _ in range(2)]
    streams = [small.encode_stream(clip.split([1, 4, 4], 2)) for clip in clips]
    parts = [[], []]
    for pair in zip(*streams):
        for part, latent in zip(parts, pair):
            part.append(latent)
    for clip, part in zip(clips, parts):
        close(torch.cat(part, 2), small.encode(clip), 1e-5)


def test_history_keeps_two_frames_and_not_the_piece_they_came_in():
    conv, history = CausalConv3d(1, 1, 3), History(keep=True)
    conv(torch.zeros(1, 1, 40, 8, 8), history)
    kept = history.get(conv)
    assert kept.shape[2] == 2 and kept.untyped_storage().nbytes() == kept.numel() * 4


def test_later_frames_do_not_change_earlier_latents(small):
    video = torch.rand(1, 3, 9, 16, 16)
    other = torch.cat([video[:, :, :5], torch.rand(1, 3, 4, 16, 16)], 2)
    assert torch.equal(small.encode(video)[:, :, :2], small.encode(other)[:, :, :2])
    close(small.encode(video[:, :, :5]), small.encode(video)[:, :, :2], 1e-5)


def test_features_lie_inside_the_quantisers_range(small):
    features = small.encode(torch.rand(1, 3, 5, 16, 16) * 2 - 1)
    assert features.shape == (1, 6, 2, 1, 1) and features.abs().max() < 1


def test_mid_attention_matters_and_can_be_left_out(reference, golden):
    video = golden["t5/video"]
    reference.set_mid_attention(False)
    without = reference.encode(video)
    reference.set_mid_attention(True)
    assert (without - golden["t5/latent"]).abs().max() > 1e-2
    close(reference.encode(video), golden["t5/latent"], 2e-4)


def test_patch_channels_run_over_colour_then_column_then_row():
    video = torch.arange(3 * 2 * 2.0).reshape(1, 3, 1, 2, 2)
    patches = patchify(video)
    assert patches.flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11]
    assert torch.equal(unpatchify(patches), video)


def test_average_shortcut_pads_an_odd_clip_with_a_zero_frame_in_front():
    x = torch.ones(1, 1, 3, 2, 2)
    assert average_shortcut(x, 1, 2, 2).flatten().tolist() == [0.5, 1.0]
    assert average_shortcut(x, 2, 2, 2).shape == (1, 2, 2, 1, 1)


def test_duplicate_shortcut_gives_one_frame_for_the_first_latent():
    x = torch.arange(8.0).reshape(1, 8, 1, 1, 1)
    assert add_duplicate_shortcut(torch.zeros(1, 1, 2, 2, 2), x, 2, 2, first=False).flatten().tolist() == list(range(8))
    assert add_duplicate_shortcut(torch.ones(1, 1, 1, 2, 2), x, 2, 2, first=True).flatten().tolist() == [5, 6, 7, 8]


@pytest.mark.parametrize("channels", [2, 4, 8, 16])
@pytest.mark.parametrize("ft", [1, 2])
def test_duplicate_shortcut_repeats_channels_and_spreads_them_over_blocks(channels, ft):
    x = torch.rand(2, channels, 3, 2, 4)
    wide = x.repeat_interleave(4 * ft * 4 // channels, dim=1).reshape(2, 4, ft, 2, 2, 3, 2, 4)
    wide = wide.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(2, 4, 3 * ft, 4, 8)
    assert torch.equal(add_duplicate_shortcut(torch.zeros_like(wide), x, ft, 2, first=False), wide)
    assert torch.equal(add_duplicate_shortcut(torch.zeros_like(wide[:, :, ft - 1:]), x, ft, 2, first=True),
                       wide[:, :, ft - 1:])


@pytest.mark.parametrize(("kernel", "stride"), [((1, 1, 1), 1), ((3, 1, 1), 1), ((3, 1, 1), 2)])
def test_a_convolution_over_time_is_a_matrix_product(kernel, stride):
    conv = torch.nn.Conv3d(5, 7, kernel, stride=(stride, 1, 1))
    for frames in (3, 4, 5, 9):
        x = torch.rand(2, 5, frames, 3, 2)
        with torch.no_grad():
            close(matrix_conv(x, conv.weight, conv.bias, stride), conv(x), 1e-6)


def test_inference_overwrites_nothing_it_was_given_and_equals_the_pass_that_records_gradients():
    tokenizer = use_channels_last(VideoTokenizer(SMALL))
    video = torch.rand(2, 3, 9, 32, 48) * 2 - 1
    given = video.clone()
    recorded = tokenizer.encode(video)
    frames = tokenizer.decode(recorded)
    assert frames.requires_grad
    with torch.inference_mode():
        features = tokenizer.encode(video)
        kept = features.clone()
        close(features, recorded.detach(), 1e-5)
        close(tokenizer.decode(features), frames.detach(), 1e-5)
    assert torch.equal(video, given) and torch.equal(features, kept)


def test_a_lone_first_frame_takes_the_short_way_with_the_same_result():
    conv = CausalConv3d(2, 3, 3)
    x = torch.rand(1, 2, 5, 4, 4)
    with torch.no_grad():
        close(conv(x[:, :, :1], History(keep=False)), conv(x, History(keep=False))[:, :, :1], 1e-6)


def test_channels_last_changes_no_value(golden, weights):
    shape = VideoTokenizerShape(8, 4, 8)
    plain = VideoTokenizer(shape)
    plain.load_state_dict(weights)
    with torch.no_grad():
        expected = plain.encode(golden["t9/video"])
        close(use_channels_last(plain).encode(golden["t9/video"]), expected, 1e-5)


@pytest.mark.parametrize("frames, hint", [(0, "give at least 1"), (7, "cut it to 5"), (4, "cut it to 1")])
def test_frames_that_fill_no_group_are_refused_not_dropped(small, frames, hint):
    for encode in (small.encode, small.encode_chunked):
        with pytest.raises(UserError, match=f"{frames} frames.*1 \\+ 4k: {hint}"):
            encode(torch.zeros(1, 3, frames, 16, 16))


def test_a_later_piece_of_broken_groups_is_refused(small):
    with pytest.raises(UserError, match="later piece has 3 frames"):
        list(small.encode_stream([torch.zeros(1, 3, 1, 16, 16), torch.zeros(1, 3, 3, 16, 16)]))


@pytest.mark.parametrize("shape, message", [
    ((1, 3, 1, 20, 16), "20 x 16 pixels"), ((1, 1, 1, 16, 16), r"\[B, 3, T, H, W\]"),
    ((3, 1, 16, 16), r"\[B, 3, T, H, W\]")])
def test_video_of_another_form_is_refused(small, shape, message):
    with pytest.raises(UserError, match=message):
        small.encode(torch.zeros(shape))


def test_bytes_are_refused_as_video(small):
    with pytest.raises(UserError, match="uint8"):
        small.encode(torch.zeros(1, 3, 1, 16, 16, dtype=torch.uint8))


def test_features_of_other_channels_are_refused(small):
    with pytest.raises(UserError, match=r"\[B, 6, t, h, w\]"):
        small.decode(torch.zeros(1, 5, 1, 1, 1))


def test_loading_reads_every_width_from_the_tensors(tmp_path):
    shape = VideoTokenizerShape(4, 6, 5, (1, 2, 2, 4), 1, (False, True, False))
    path = tmp_path / "t.safetensors"
    save_file(VideoTokenizer(shape).state_dict(), path)
    tokenizer = load_tokenizer(path)
    assert tokenizer.shape == shape and tokenizer.latent_channels == 5
    assert not tokenizer.training and not any(p.requires_grad for p in tokenizer.parameters())


def test_half_precision_files_load_as_single_precision(tmp_path, weights):
    path = tmp_path / "half.safetensors"
    save_file({name: t.half() for name, t in weights.items()}, path)
    assert {p.dtype for p in load_tokenizer(path).parameters()} == {torch.float32}


def test_fingerprint_tells_weights_apart(weights):
    changed = {name: t.clone() for name, t in weights.items()}
    assert fingerprint(changed) == fingerprint(dict(reversed(weights.items())))
    changed["conv2.bias"][0] += 1e-3
    assert fingerprint(changed) != fingerprint(weights)


@pytest.mark.parametrize("name, change, message", [
    ("conv2.bias", None, "missing conv2.bias"),
    ("conv2.bias", torch.zeros(3), r"conv2.bias is \[3\], not \[8\]"),
    ("encoder.conv1.weight", None, "missing encoder.conv1.weight"),
    ("left.over", torch.zeros(1), "unexpected left.over")])
def test_files_with_other_tensors_are_refused_by_name(tmp_path, weights, name, change, message):
    path = tmp_path / "wrong.safetensors"
    tensors = {key: t for key, t in weights.items() if key != name}
    save_file(tensors if change is None else {**tensors, name: change}, path)
    with pytest.raises(UserError, match=message):
        load_tokenizer(path)


def test_missing_and_damaged_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        load_tokenizer(tmp_path / "absent.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors here")
    with pytest.raises(UserError, match="cannot read"):
        load_tokenizer(tmp_path / "bad.safetensors")


def test_new_weights_depend_on_the_seed_alone_and_leave_the_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, same, other = (new_tokenizer(SMALL, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["encoder.conv1.weight"], other["encoder.conv1.weight"])


def test_untrained_tokenizer_codes_the_frames_of_a_still_clip_alike():
    tokenizer = new_tokenizer(SMALL, 0)
    with torch.no_grad():
        features = tokenizer.encode((torch.rand(1, 3, 1, 32, 32) * 2 - 1).repeat(1, 1, 9, 1, 1))
        decoded = tokenizer.decode(features[:, :, :1].repeat(1, 1, 3, 1, 1))
    assert features.std() > 0.05
    close(decoded, decoded[:, :, :1].expand_as(decoded), 1e-5)
