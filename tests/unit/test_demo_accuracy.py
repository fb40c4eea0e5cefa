"""Conditional accuracy: all on rendered truth, chance on noise, and the right counts in between."""

import numpy as np
import pytest

from grn_scale.demo import accuracy, compare, shapes
from grn_scale.demo.accuracy import prompts, sample_and_detect, score
from grn_scale.errors import ConfigError, UserError
from grn_scale.tokenizer.clips import psnr


def detections(make, asked):
    return [seen for _, seen in sample_and_detect(make, asked)]


def test_prompts_are_the_128_held_out_combinations_in_a_fixed_order():
    chosen = prompts()
    assert len(chosen) == len(set(chosen)) == 128 and set(chosen) == shapes.held_out()
    assert not set(chosen) & set(shapes.training()) and len(set(prompts(10**6))) == len(shapes.combinations())
    assert prompts(5) == chosen[:5]


def test_rendered_truth_scores_everything():
    asked = prompts() * 4
    by_caption = {a.caption: a for a in asked}

    def render(captions):
        return [shapes.render(by_caption[caption], i) for i, caption in enumerate(captions)]

    result = score(asked, detections(render, asked))
    for name in ("color", "direction", "both"):
        assert (result[name]["correct"], result[name]["accuracy"]) == (512, 1.0)
    assert result["color"]["confusion"]["red"].keys() == {"red"}


def test_noise_scores_no_better_than_chance():
    drawn = np.random.default_rng(0)
    asked = prompts() * 2
    result = score(asked, detections(lambda captions: drawn.integers(
        0, 256, (len(captions), 9, 32, 32, 3), dtype=np.uint8), asked))
    # three standard deviations above 1/6 and 1/4 of 256
    assert result["color"]["correct"] < 61 and result["direction"]["correct"] < 85


def test_wrong_clips_are_counted_and_confusions_name_what_was_seen():
    asked = [shapes.Attributes("large", "red", "circle", "left", "black"),
             shapes.Attributes("large", "red", "square", "up", "gray"),
             shapes.Attributes("large", "blue", "square", "up", "gray")]
    shown = [asked[0], shapes.Attributes("large", "green", "square", "up", "gray"), None]
    clips = [np.full((9, 32, 32, 3), 12, np.uint8) if a is None else shapes.render(a, 5) for a in shown]
    result = score(asked, detections(lambda captions: clips, asked))
    assert result["clips"] == 3
    assert result["color"]["correct"] == 1 and result["direction"]["correct"] == 2 and result["both"]["correct"] == 1
    assert result["color"]["confusion"] == {"red": {"green": 1, "red": 1}, "blue": {"none": 1}}
    assert result["direction"]["confusion"] == {"left": {"left": 1}, "up": {"none": 1, "up": 1}}


@pytest.mark.parametrize(("arguments", "words"), [
    (["--run", "x", "output=out"], "text.encoder is not set"),
    (["--run", "x", "--seeds", "0", "output=out", "text.encoder=t"], "must be at least 1"),
])
def test_bad_usage_is_refused(arguments, words):
    with pytest.raises(ConfigError) as caught:
        accuracy.main(arguments)
    assert words in str(caught.value)


def test_psnr_of_a_known_error():
    truth = np.zeros((2, 4, 4, 3), np.uint8)
    assert psnr(truth + 1, truth) == pytest.approx(48.13, abs=0.01)
    assert psnr(truth, truth) == float("inf")


def clips(*rows):
    return {(prompt, draw): {"color": color, "direction": direction, "steps": steps}
            for prompt, draw, color, direction, steps in rows}


def test_two_measurements_are_compared_clip_by_clip():
    first = clips(("a", 0, True, True, 20), ("a", 1, False, True, 20), ("b", 2, True, False, 20))
    second = clips(("a", 0, True, True, 8), ("a", 1, True, True, 10), ("b", 2, True, True, 12))
    found = compare.compare(first, second)
    assert found["steps"] == [20, 10] and found["clips"] == 3 and found["prompts"] == 2
    assert found["color"]["correct"] == [2, 3] and found["color"]["difference"] == 0.25
    assert found["direction"]["interval_95"][0] < 0.5 < found["direction"]["interval_95"][1]
    with pytest.raises(UserError, match="same prompts and draws"):
        compare.compare(first, clips(("a", 0, True, True, 8)))
