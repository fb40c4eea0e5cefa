"""Shape of a full pack as one rank holds it, and the bytes of the batch that is made of it.

The pack is the dry run's (`grn_scale.parallel.dry_step.full_pack`): one video with a caption of the longest length
fills it. Packs of more and shorter samples hold fewer pairs and as many rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from grn_scale.config.schema import Config

INT64 = 8


@dataclass(frozen=True)
class PackShape:
    """Legend as in `grn_scale.model.sequence`."""

    length: int
    """Rows of the whole pack, padding included."""
    visual: int
    predicted: int
    text: int
    samples: int
    own_visual: int
    """Of `visual`, in this rank's part of the sequence."""
    own_predicted: int
    own_text: int
    own_levels: int
    keys: int
    """Rows of keys that segments see, segment by segment."""
    longest_keys: int
    """Keys of the longest segment."""
    pairs: int
    """Of a query and a key."""
    shares_texts: bool
    """Layout v1: a text's keys are seen by its own rows and by the frames', and are copied for each."""


def full_pack(config: Config) -> PackShape:
    """One video and its caption on the first rank of a context."""
    budget, context = config.data.token_budget, config.parallel.context
    words = min(config.text.max_tokens, budget // 2)
    frames = budget - words - 1
    part = budget // context
    v1 = config.model.layout == "v1"
    own_visual = min(frames, part)
    # v1: frames, level, text; v2: frames, text, level
    own_text = min(max(0, part - frames - v1), words)
    own_levels = int(part > frames if v1 else part == budget)
    keys = budget + words if v1 else budget
    pairs = (frames + 1) * budget + words * words if v1 else budget * budget
    return PackShape(budget, frames, frames, words, 1, own_visual, own_visual, own_text, own_levels, keys, budget,
                     pairs, v1)


@dataclass(frozen=True)
class TypicalPack:
    """A pack filled with clips of the configured size, which time is planned for. Packs are 99.9 % full
    (docs/packing.md), so parts of clips are counted."""

    clips: float
    visual: int
    """Tokens of one clip."""
    text: int

    @property
    def clip_tokens(self) -> int:
        return self.visual + self.text + 1


def typical_pack(config: Config) -> TypicalPack:
    """Clips of tokenize.max_frames frames of a square of tokenize.latent_side, captions of text.max_tokens; one cut to
    the budget where even one does not fit."""
    budget, latent_frames = config.data.token_budget, 1 + (config.tokenize.max_frames - 1) // 4
    text = min(config.text.max_tokens, budget // 2)
    visual = min(latent_frames * config.tokenize.latent_side**2, budget - text - 1)
    return TypicalPack(budget / (visual + text + 1), visual, text)


def batch_bytes(config: Config, pack: PackShape) -> int:
    """Bytes of one micro-batch's tensors (`grn_scale.model.pack.PackedBatch`): labels and targets, text states, the
    sequence's layout, and where it is cut, this rank's part of it."""
    model, cut = config.model, config.parallel.context > 1
    labels = (pack.own_visual + pack.own_predicted) * model.label_channels
    text = 2 * pack.own_text * model.text_hidden_size  # bf16
    angles = 2 * 4 * pack.length * (model.head_size // 2)
    rows = INT64 * (3 * pack.visual + pack.text + pack.samples + pack.predicted)
    if cut:
        rows += 2 * INT64 * (pack.own_visual + pack.own_text + pack.own_levels + pack.own_predicted)
    if pack.shares_texts:
        rows += INT64 * (pack.keys - pack.text)
    return labels + text + angles + rows + INT64 * pack.own_predicted + 4 * (4 + 4 * pack.samples)
