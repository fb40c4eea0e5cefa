"""Clips -> bits -> one video shard.

What is encoded together is a function of the chunk alone: clips arrive in its order, wait by shape, and leave in
batches. Decoding runs ahead in other processes and writing behind in a thread, while the tokenizer works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from grn_scale.config.data_schema import TokenizeConfig
from grn_scale.data.decode import DecodedClip, DecodeError, DecodeRequest
from grn_scale.data.schema import IndexRow, ShardInfo
from grn_scale.data.shard_writer import ShardWriter, write_shard
from grn_scale.data_pipeline.chunks import Problem, Source, VideoSettings
from grn_scale.data_pipeline.meter import WorkerMeter
from grn_scale.hbq import pack_bits
from grn_scale.tokenizer.clips import encode_frames
from grn_scale.tokenizer.video import VideoTokenizer

WAITING_BYTES = 1 << 30
"""Decoded frames that may wait for others of their shape; above it the fullest batch runs as it is."""
UNWRITTEN_BATCHES = 2


class VideoShards:
    """Makes video shards with one tokenizer. Use it as a context manager."""

    def __init__(self, settings: VideoSettings, config: TokenizeConfig, tokenizer: VideoTokenizer,
                 meter: WorkerMeter) -> None:
        self._settings = settings
        self._config = config
        self._tokenizer = tokenizer
        self._meter = meter
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="write-shard")

    def __enter__(self) -> VideoShards:
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.shutdown()

    def make(self, path: str, sources: Mapping[str, Source],
             decoded: Iterator[tuple[DecodeRequest, DecodedClip | DecodeError]], confirm: Callable[[], None],
             ) -> tuple[ShardInfo | None, list[IndexRow], dict[str, Problem]]:
        """The shard of the clips (key -> line), its index rows (without captions) in the order of the tar, and by key
        what could not be decoded.

        decoded: gives the result of each clip in order. confirm: called when all is done and the file is about to
        appear; if it raises, none does. No file is made, and None is given, where no clip is left.
        """
        bad: dict[str, Problem] = {}
        rows: list[IndexRow] = []
        batches = self._encoded(sources, decoded, bad)
        first = next(batches, None)
        if first is None:
            return None, [], bad
        with write_shard(path) as writer:
            unwritten: list[Future] = [self._writer.submit(self._store, writer, *first)]
            for batch in batches:
                unwritten.append(self._writer.submit(self._store, writer, *batch))
                while len(unwritten) > UNWRITTEN_BATCHES:
                    rows += unwritten.pop(0).result()
            for writing in unwritten:
                rows += writing.result()
            confirm()
        return writer.info, rows, bad

    def _encoded(self, sources: Mapping[str, Source],
                 decoded: Iterator[tuple[DecodeRequest, DecodedClip | DecodeError]],
                 bad: dict[str, Problem]) -> Iterator[tuple[list[tuple[Source, DecodedClip]], list[torch.Tensor]]]:
        """Batches of clips with their bits."""
        batches = _Batches(self._config.batch_clips)
        for key, source in sources.items():
            with self._meter.timed("decode_wait"):
                _, result = next(decoded)
            if isinstance(result, DecodeError):
                bad[key] = Problem(result.reason, result.detail)
                self._meter.failed()
                continue
            for batch in batches.add(source, result):
                yield batch, self._encode(batch)
        for batch in batches.rest():
            yield batch, self._encode(batch)

    def _encode(self, batch: list[tuple[Source, DecodedClip]]) -> list[torch.Tensor]:
        with self._meter.timed("encode"):
            bits = encode_frames(self._tokenizer, np.stack([clip.frames for _, clip in batch]), self._settings.rounds)
        self._meter.encoded(len(batch), sum(len(clip.frames) for _, clip in batch))
        return bits

    def _store(self, writer: ShardWriter, batch: list[tuple[Source, DecodedClip]],
               encoded: list[torch.Tensor]) -> list[IndexRow]:
        rows = []
        with self._meter.timed("write"):
            for (source, clip), bits in zip(batch, encoded):
                thw = tuple(bits.shape[:3])
                about = {"id": source.id, "class_id": source.clip.class_id, "shape": thw,
                         "latent_channels": self._settings.latent_channels, "rounds": self._settings.rounds,
                         "fps": self._settings.fps, "flipped": source.clip.flip,
                         "bucket": {"height": clip.frames.shape[1], "width": clip.frames.shape[2],
                                    "ratio_key": clip.ratio_key},
                         "source": clip.provenance}
                payload = writer.add_video(source.key, pack_bits(bits), about)
                rows.append(IndexRow(0, 0, source.key, payload.offset, payload.length, payload.xxh3, thw,
                                     clip.ratio_key, (), source.clip.class_id))
        return rows


class _Batches:
    """Clips that wait for others of their shape. Depends on the order they come in, and on nothing else."""

    def __init__(self, size: int):
        self._size = size
        self._waiting: dict[tuple[int, ...], list[tuple[Source, DecodedClip]]] = {}
        self._bytes = 0

    def add(self, source: Source, clip: DecodedClip) -> Iterator[list[tuple[Source, DecodedClip]]]:
        """Take one clip; yields the batches that are now due."""
        shape = clip.frames.shape
        self._waiting.setdefault(shape, []).append((source, clip))
        self._bytes += clip.frames.nbytes
        if len(self._waiting[shape]) == self._size:
            yield self._take(shape)
        while self._bytes > WAITING_BYTES:
            yield self._take(max(self._waiting, key=lambda waiting: len(self._waiting[waiting])))

    def rest(self) -> Iterator[list[tuple[Source, DecodedClip]]]:
        """The batches that are not full, the shape that has waited longest first."""
        while self._waiting:
            yield self._take(next(iter(self._waiting)))

    def _take(self, shape: tuple[int, ...]) -> list[tuple[Source, DecodedClip]]:
        batch = self._waiting.pop(shape)
        self._bytes -= sum(clip.frames.nbytes for _, clip in batch)
        return batch
