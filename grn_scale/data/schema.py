"""The on-disk contract of a tokenized dataset, as values: index rows, captions, dataset.json.

A dataset is a folder:

    dataset.json                     DatasetInfo, written last: without it the folder is not a dataset
    video-000000.tar ...             <key>.bits and <key>.json of each sample (webdataset)
    text-000000.tar ...              <text key>.json (ids) and <text key>.states (bf16) of each caption
    index/video-000000.parquet ...   one part a video shard: IndexRow columns
    index/text-000000.parquet ...    one part a text shard: TextRow columns
"""

from __future__ import annotations

from dataclasses import dataclass

FORMAT_VERSION = 1


@dataclass(frozen=True)
class TextRef:
    """What the index says of one text entry."""

    key: str
    """sha256 of task tag + cleaned caption + text-encoder fingerprint."""
    tokens: int
    """True length, end token included."""


@dataclass(frozen=True)
class Caption:
    """One caption of a clip. With task tags there is an entry for each task the clip can be trained as."""

    type: str
    """short, medium, long, or empty where the manifest gives none."""
    texts: dict[str, TextRef]
    """Task (T2I, T2V, I2V) -> entry; without task tags all tasks share one entry."""


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class TextRow:
    """One tokenized caption."""

    shard: int
    key: str
    tokens: int
    ids_offset: int
    ids_length: int
    states_offset: int
    states_length: int
    """0 where the features are not cached."""
    xxh3: int
    """xxh3_64 of the states payload (of the ids payload where the features are not cached)."""


@dataclass(frozen=True)
class ShardInfo:
    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class DatasetInfo:
    """dataset.json."""

    format_version: int
    tokenizer_fingerprint: str
    latent_channels: int
    rounds: int
    text_fingerprint: str
    text_hidden_size: int
    task_tags: bool
    empty_text: TextRef
    fps: float
    samples: int
    tokens: int
    """Visual tokens in all."""
    video_shards: tuple[ShardInfo, ...]
    text_shards: tuple[ShardInfo, ...]
    snapshot: str
    """Names this exact state of the index: sha256 over the index parts' content."""
