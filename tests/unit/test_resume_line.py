"""The one line that a resumed run says about itself."""

from pathlib import Path

from grn_scale.checkpoint.resume_line import layout_of, resume_line
from grn_scale.config.schema import Config, DataConfig, ParallelConfig, ZeroConfig

SAVED = {"step": 40, "samples_seen": 900}


def config(**parallel):
    return Config(parallel=ParallelConfig(**parallel), zero=ZeroConfig(stage=1), data=DataConfig(packs_per_step=8))


def test_it_names_place_step_samples_and_both_layouts():
    then = layout_of(config(tensor=2), 4)
    assert then == {"tensor": 2, "pipeline": 1, "virtual_pipeline": 1, "context": 1, "data": 2, "zero_stage": 1,
                    "world_size": 4, "packs_per_step": 8}
    now = layout_of(config(pipeline=2, virtual_pipeline=2), 2)
    line = resume_line(Path("runs/a/step-00000040"), {**SAVED, "layout": then}, now, [])
    assert line == (
        "resumed from runs/a/step-00000040: step 40, 900 samples seen; saved on tensor 2 x pipeline 1 x virtual 1 x "
        "context 1 x data 2, ZeRO-1, world size 4, global batch 8 packs; now on tensor 1 x pipeline 2 x virtual 2 x "
        "context 1 x data 1, ZeRO-1, world size 2, global batch 8 packs; nothing left out")


def test_it_says_what_stayed_the_same_what_was_left_out_and_what_is_not_known():
    layout = layout_of(config(), 1)
    line = resume_line(Path("a"), {**SAVED, "layout": layout}, layout, ["ema (this run keeps none)"])
    assert "the same now; not restored: ema (this run keeps none)" in line and "\n" not in line
    assert "saved on a layout it does not name; now on tensor 1" in resume_line(Path("a"), SAVED, layout, [])
