"""The nested captions of a video part as flat arrow columns, to be changed without a Python object for each of them.

Legend: n samples, m captions, k texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa


@dataclass(frozen=True, eq=False)
class CaptionColumns:
    """Captions of n samples."""

    first: np.ndarray
    """int64 [n + 1]: sample i has the captions first[i] to first[i + 1] - 1."""
    types: pa.StringArray
    """[m]."""
    text_first: np.ndarray
    """int64 [m + 1]: caption j has the texts text_first[j] to text_first[j + 1] - 1."""
    texts: pa.StructArray
    """[k]: task, key, tokens, shard."""

    @classmethod
    def of(cls, table: pa.Table) -> CaptionColumns:
        """Captions of a video part's table."""
        captions = table["captions"].combine_chunks()
        flat = captions.flatten()
        texts = flat.field("texts")
        return cls(_offsets(captions), flat.field("type"), _offsets(texts), texts.flatten())

    @classmethod
    def join(cls, parts: Sequence[CaptionColumns]) -> CaptionColumns:
        """Samples of all parts (one or more), one part after the other."""
        return cls(_joined([part.first for part in parts]), pa.concat_arrays([part.types for part in parts]),
                   _joined([part.text_first for part in parts]), pa.concat_arrays([part.texts for part in parts]))

    @property
    def owners(self) -> np.ndarray:
        """int64 [m]: sample of each caption."""
        return np.repeat(np.arange(len(self.first) - 1), np.diff(self.first))

    @property
    def text_owners(self) -> np.ndarray:
        """int64 [k]: caption of each text."""
        return np.repeat(np.arange(len(self.types)), np.diff(self.text_first))

    def of_samples(self, samples: np.ndarray) -> CaptionColumns:
        """Captions of these samples, int64 [any], in their order."""
        counts = np.diff(self.first)[samples]
        return self.regrouped(_ranges(self.first[:-1][samples], counts), counts)

    def regrouped(self, captions: np.ndarray, counts: np.ndarray) -> CaptionColumns:
        """These captions, int64 [any], given to samples that have `counts` of them (int64 [samples]), in order."""
        text_counts = np.diff(self.text_first)[captions]
        return CaptionColumns(_starts(counts), self.types.take(pa.array(captions)), _starts(text_counts),
                              self.texts.take(pa.array(_ranges(self.text_first[:-1][captions], text_counts))))

    def with_shards(self, shards: pa.StringArray) -> CaptionColumns:
        """The same with other text shards, [k]."""
        fields = [self.texts.field(name) for name in ("task", "key", "tokens")]
        return CaptionColumns(self.first, self.types, self.text_first,
                              pa.StructArray.from_arrays([*fields, shards], fields=list(self.texts.type)))

    def put_into(self, table: pa.Table) -> pa.Table:
        """The table of as many samples with these captions in the place of its own."""
        texts = pa.ListArray.from_arrays(pa.array(self.text_first, pa.int32()), self.texts)
        flat = pa.StructArray.from_arrays([self.types, texts], names=["type", "texts"])
        captions = pa.ListArray.from_arrays(pa.array(self.first, pa.int32()), flat)
        number = table.schema.get_field_index("captions")
        return table.set_column(number, table.schema.field(number), captions)


def _offsets(lists: pa.ListArray) -> np.ndarray:
    offsets = lists.offsets.to_numpy().astype(np.int64)
    return offsets - offsets[0]


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)])


def _joined(firsts: Sequence[np.ndarray]) -> np.ndarray:
    return _starts(np.concatenate([np.diff(first) for first in firsts]))


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """int64: starts[0], starts[0] + 1, ... counts[0] of them, then those of starts[1], and so on."""
    ends = np.cumsum(counts)
    return np.arange(counts.sum()) + np.repeat(starts - (ends - counts), counts)
