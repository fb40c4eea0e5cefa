"""Moving shapes: what is rendered is what was asked for, and the detector reads all of it back."""

import io

import av
import numpy as np
import pytest

from grn_scale.demo import shapes
from grn_scale.demo.clips import encode_h264
from grn_scale.demo.detector import Detection, detect
from grn_scale.demo.shapes import Attributes
from grn_scale.errors import UserError


def foreground(clip, attributes):
    """float [T, side, side]: share of each pixel that the shape covers."""
    background = np.array(shapes.BACKGROUNDS[attributes.background], np.float64)
    color = np.array(shapes.COLORS[attributes.color], np.float64)
    direction = color - background
    return ((clip - background) @ direction / (direction @ direction)).clip(0, 1)


def decoded(data):
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_there_are_768_combinations_and_a_sixth_is_held_out():
    assert len(set(shapes.combinations())) == 768
    assert len(shapes.held_out()) == 128
    assert shapes.held_out().isdisjoint(shapes.training())
    assert shapes.held_out() | set(shapes.training()) == set(shapes.combinations())


def test_every_value_is_seen_in_training_and_held_out():
    for part in (shapes.training(), shapes.held_out()):
        assert {a.color for a in part} == set(shapes.COLORS)
        assert {a.shape for a in part} == set(shapes.SHAPES)
        assert {a.direction for a in part} == set(shapes.DIRECTIONS)
        assert {a.background for a in part} == set(shapes.BACKGROUNDS)
        assert {a.size for a in part} == set(shapes.SIZES)


def test_held_out_combinations_never_change():
    # A model trained with one release is scored with another: this set is part of the contract.
    first = min(a.caption for a in shapes.held_out())
    assert first == "large blue circle moving down on black"


def test_captions_are_distinct_and_say_all():
    captions = {a.caption for a in shapes.combinations()}
    assert len(captions) == 768
    assert Attributes("small", "red", "circle", "left", "black").caption == "small red circle moving left on black"


def test_unknown_attribute_is_refused_naming_the_valid_ones():
    with pytest.raises(UserError, match="color is 'pink', but must be one of red, green"):
        Attributes("small", "pink", "circle", "left", "black")


def test_clips_depend_on_attributes_and_seed_alone():
    a, b = shapes.combinations()[0], shapes.combinations()[1]
    assert np.array_equal(shapes.render(a, 3), shapes.render(a, 3))
    assert not np.array_equal(shapes.render(a, 3), shapes.render(a, 4))
    assert not np.array_equal(shapes.render(a, 3), shapes.render(b, 3))


@pytest.mark.parametrize("side", [32, 64, 128])
def test_clips_have_the_asked_size_and_the_shape_stays_inside(side):
    for attributes in shapes.combinations()[::97]:
        clip = shapes.render(attributes, 1, side, 5)
        assert clip.shape == (5, side, side, 3) and clip.dtype == np.uint8
        border = np.concatenate([clip[:, 0], clip[:, -1], clip[:, :, 0], clip[:, :, -1]], 1)
        assert (border == shapes.BACKGROUNDS[attributes.background]).all()


def test_shapes_cover_the_same_share_at_every_side_and_large_ones_more():
    for shape in shapes.SHAPES:
        share = {(size, side): foreground(clip, attributes).mean()
                 for size in shapes.SIZES for side in (32, 128)
                 for attributes in [Attributes(size, "red", shape, "left", "black")]
                 for clip in [shapes.render(attributes, 0, side, 1)]}
        for size in shapes.SIZES:
            assert share[size, 32] == pytest.approx(share[size, 128], rel=0.05)
        assert share["large", 32] > 2 * share["small", 32]


def test_edges_are_anti_aliased():
    attributes = Attributes("large", "red", "circle", "left", "black")
    cover = foreground(shapes.render(attributes, 0), attributes)[0]
    assert ((cover > 0.1) & (cover < 0.9)).sum() > 8


def test_the_way_is_long_straight_and_in_the_asked_direction():
    for i, attributes in enumerate(shapes.combinations()[::7]):
        way = np.diff(shapes.path(attributes, i, 9), axis=0).sum(0)
        dx, dy = shapes.DIRECTIONS[attributes.direction]
        assert way @ (dx, dy) >= 0.3 and abs(way @ (dy, dx)) < 1e-9


def test_too_small_frames_are_refused():
    with pytest.raises(UserError, match="at least 16 pixels"):
        shapes.render(shapes.combinations()[0], 0, side=8)


def test_detector_is_right_on_every_combination():
    for i, attributes in enumerate(shapes.combinations()):
        assert detect(shapes.render(attributes, i)) == Detection(attributes.color, attributes.direction), attributes


@pytest.mark.parametrize("side", [32, 64])
def test_detector_is_right_after_h264(side):
    for i, attributes in enumerate(shapes.combinations()[::13]):
        clip = decoded(encode_h264(shapes.render(attributes, i, side)))
        assert detect(clip) == Detection(attributes.color, attributes.direction), attributes


@pytest.mark.parametrize("noise", ["pixels", "frames"])
def test_detector_is_at_most_at_chance_on_noise(noise):
    rng = np.random.default_rng(0)
    right = {"color": 0, "direction": 0}
    for attributes in shapes.combinations()[::3]:
        shape = (9, 32, 32, 3) if noise == "pixels" else (9, 1, 1, 3)
        clip = np.broadcast_to(rng.integers(0, 256, shape, dtype=np.uint8), (9, 32, 32, 3))
        found = detect(clip)
        right["color"] += found.color == attributes.color
        right["direction"] += found.direction == attributes.direction
    # 256 clips: chance is 1/6 and 1/4, three standard deviations above it 0.24 and 0.33.
    assert right["color"] / 256 < 0.24 and right["direction"] / 256 < 0.33


def test_detector_sees_nothing_in_an_empty_clip_and_no_direction_in_a_still_one():
    assert detect(np.full((9, 32, 32, 3), 128, np.uint8)) == Detection(None, None)
    attributes = Attributes("large", "cyan", "square", "up", "gray")
    still = np.repeat(shapes.render(attributes, 0)[:1], 9, 0)
    assert detect(still) == Detection("cyan", None)
