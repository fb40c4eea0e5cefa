"""The on-disk contract of a tokenized dataset, as values: index rows, captions, shards, dataset.json.

A dataset is a folder, on a file system or in object storage:

    dataset.json                            DatasetInfo without the shard lists, written last: it makes the dataset
    index/snapshot-<id>.parquet             the summary, a row a shard: one state of the dataset. Older ones stay, so
                                            that a run can finish its epoch on the one it began with
    index/video-000000-<hash>.parquet ...   one part a video shard: IndexRow columns
    index/text-000000-<hash>.parquet ...    one part a text shard: TextRow columns
    video-000000.tar ...                    <key>.bits and <key>.json of each sample (webdataset)
    text-000000.tar ...                     <text key>.json (ids) and, where they are cached, <text key>.states

Parts are named by their content and never changed: a new caption gives the shard a new part.
"""

from __future__ import annotations

from dataclasses import dataclass

FORMAT_VERSION = 2
MOST_KEY_BYTES = 32
"""Longest key of a video sample; real ones are 32 hex digits."""


@dataclass(frozen=True, slots=True)
class TextRef:
    """What the index says of one text entry."""

    key: str
    """sha256 of task tag + cleaned caption + text-encoder fingerprint."""
    tokens: int
    """True length, end token included."""
    shard: str
    """Name of the text tar that holds the entry. One key may stand in several: identical captions of two chunks."""


@dataclass(frozen=True, slots=True)
class Caption:
    """One caption of a clip. With task tags there is an entry for each task the clip can be trained as."""

    type: str
    """short, medium, long, or empty where the manifest gives none."""
    texts: dict[str, TextRef]
    """Task (T2I, T2V, I2V) -> entry; without task tags all tasks share one entry."""


@dataclass(frozen=True, slots=True)
class IndexRow:
    """One tokenized clip."""

    shard: int
    row: int
    """Row of the whole dataset: rows of a shard are consecutive, shards in order."""
    key: str
    offset: int
    """First byte of the .bits payload inside the tar."""
    length: int
    xxh3: int
    """xxh3_64 of the payload, checked at every read."""
    thw: tuple[int, int, int]
    ratio_key: float
    captions: tuple[Caption, ...]
    class_id: int | None = None


@dataclass(frozen=True, slots=True)
class TextRow:
    """One tokenized caption, in the tar that its part belongs to."""

    key: str
    tokens: int
    ids_offset: int
    ids_length: int
    ids_xxh3: int
    """xxh3_64 of the payload, as of the states."""
    states_offset: int
    states_length: int
    """0 where the states are not cached."""
    states_xxh3: int


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One tar, and what its part of the index sums up to."""

    name: str
    samples: int
    """Clips, or captions."""
    bytes: int
    sha256: str
    part: str = ""
    """File name of its part in index/; empty while there is none."""
    part_sha256: str = ""
    images: int = 0
    """Samples of one latent frame. This and what follows is 0 for a text shard."""
    tokens: int = 0
    """Visual tokens in all."""
    longest: int = 0
    """Most tokens one of its samples can take in a pack: visual, longest text, and the noise-level token."""


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """dataset.json and the summary it names: one state of a dataset."""

    format_version: int
    tokenizer_fingerprint: str
    latent_channels: int
    rounds: int
    text_fingerprint: str
    text_hidden_size: int
    text_states: str
    """How the states of captions are stored: bf16, int8 (with a scale a token), or none, where only the ids are."""
    task_tags: bool
    empty_text: TextRef
    fps: float
    video_shards: tuple[ShardInfo, ...]
    text_shards: tuple[ShardInfo, ...]
    samples: int = 0
    tokens: int = 0
    """Visual tokens in all."""
    snapshot: str = ""
    """Names this exact state of the dataset: sha256 over its shards and their parts. This, `samples` and `tokens`
    are filled in when the dataset is written."""
