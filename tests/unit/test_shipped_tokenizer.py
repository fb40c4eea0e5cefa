"""What the tokenizer that ships is good for: the demo's shapes."""

from __future__ import annotations

from statistics import fmean

import numpy as np

from grn_scale.demo import shapes
from grn_scale.demo.detector import detect
from grn_scale.evaluation.quality import reconstruct
from grn_scale.tokenizer import load_tokenizer
from grn_scale.tokenizer.clips import psnr
from grn_scale.tokenizer.load import SHIPPED


def test_held_out_shapes_come_back_with_28_db_and_keep_colour_and_direction():
    tokenizer = load_tokenizer("small")
    asked = sorted(shapes.held_out(), key=lambda attributes: attributes.caption)[::4]
    values, right = [], 0
    for number, attributes in enumerate(asked):
        truth = np.stack(shapes.render(attributes, 10**6 + number, 32))
        found = reconstruct(tokenizer, truth, rounds=4)
        values.append(psnr(found, truth))
        seen = detect(found)
        right += seen.color == attributes.color and seen.direction == attributes.direction
    assert fmean(values) >= 28 and right == len(asked)


def test_it_fits_the_repository():
    assert SHIPPED["small"].stat().st_size <= 5_000_000
