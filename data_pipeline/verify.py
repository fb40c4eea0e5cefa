"""grn-scale verify: is a tokenized dataset what its index and dataset.json say?

    grn-scale verify tokens/
    grn-scale verify tokens/ --decode 8 --manifest clips.jsonl

Reads every shard once: sha256, every payload's checksum, and index against tar in both directions. --decode also
turns samples back into frames, and with the manifest compares them with their source.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from grn_scale.command_line import CommandParser, run, start_logging
from grn_scale.config.class_schema import SCHEMAS
from grn_scale.config.schema import Config
from grn_scale.data.index_parts import TEXT_SCHEMA, part_path, read_table, snapshot_of
from grn_scale.data.schema import DatasetInfo, IndexRow, ShardInfo, TextRef
from grn_scale.data.shards import Dataset, read_dataset_info
from grn_scale.errors import EXIT_FAILED, ConfigError, UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Damage:
    """One thing that is not as it should be: the file (and sample) it is in, and what is wrong."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class _Hashed:
    """Reads a stream from front to back and keeps its sha256."""

    def __init__(self, stream: BinaryIO):
        self._stream = stream
        self.sha256 = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self.sha256.update(data)
        return data


def find_damage(folder: str | Path, progress: bool = False) -> Iterator[Damage]:
    """Everything that is wrong with a dataset, shard by shard; nothing where it is sound.

    Raises UserError where dataset.json itself cannot be used.
    """
    folder = Path(folder)
    info = read_dataset_info(folder)
    dataset = Dataset(folder, info)
    names = [shard.name for shard in (*info.video_shards, *info.text_shards)]
    try:
        if snapshot_of(folder, names) != info.snapshot:
            yield Damage("index/", "the parts are not those that dataset.json was written for (another snapshot)")
    except UserError as error:
        yield Damage("index/", str(error))
    texts: dict[str, int] = {}
    wanted: dict[str, TextRef] = {info.empty_text.key: info.empty_text}
    tokens = 0
    for shard in _tracked(info.text_shards, "text shards", progress):
        rows, damage = _text_payloads(folder, shard)
        yield from damage
        texts.update({key: row["tokens"] for key, row in rows.items()})
        yield from _check_tar(folder, shard, "states", {
            key: (row["states_offset"], row["states_length"], row["xxh3"]) for key, row in rows.items()})
    for number, shard in enumerate(_tracked(info.video_shards, "video shards", progress)):
        try:
            rows = dataset.rows(number)
        except UserError as error:
            yield Damage(shard.name, str(error))
            rows = []
        yield from _check_rows(shard, rows, info.latent_channels * info.rounds)
        tokens += sum(math.prod(row.thw) for row in rows)
        wanted.update((ref.key, ref) for row in rows for caption in row.captions for ref in caption.texts.values())
        yield from _check_tar(folder, shard, "bits", {row.key: (row.offset, row.length, row.xxh3) for row in rows})
    for ref in wanted.values():
        if texts.get(ref.key) != ref.tokens:
            found = f"has {texts[ref.key]} tokens there" if ref.key in texts else "is in no text shard"
            yield Damage("index/", f"text {ref.key}, of {ref.tokens} tokens by the video index, {found}")
    if sum(shard.samples for shard in info.video_shards) != info.samples:
        yield Damage("dataset.json", f"says {info.samples} samples, but its shards sum up to "
                                     f"{sum(shard.samples for shard in info.video_shards)}")
    if tokens != info.tokens:
        yield Damage("dataset.json", f"says {info.tokens} visual tokens, but the index has {tokens}")


def _text_payloads(folder: Path, shard: ShardInfo) -> tuple[dict[str, dict[str, Any]], list[Damage]]:
    try:
        rows = read_table(part_path(folder, shard.name), TEXT_SCHEMA).to_pylist()
    except UserError as error:
        return {}, [Damage(shard.name, str(error))]
    wrong = [] if len(rows) == shard.samples else [
        Damage(shard.name, f"its index part has {len(rows)} rows, but dataset.json says {shard.samples}")]
    return {row["key"]: row for row in rows}, wrong


def _check_rows(shard: ShardInfo, rows: list[IndexRow], bits_per_token: int) -> Iterator[Damage]:
    for row in rows:
        length = (math.prod(row.thw) * bits_per_token + 7) // 8
        if row.length != length:
            yield Damage(f"{shard.name}: sample {row.key}",
                         f"{row.length} bytes in the index, but {row.thw} latent cells take {length}")


def _check_tar(folder: Path, shard: ShardInfo, kind: str, index: dict[str, tuple[int, int, int]]) -> Iterator[Damage]:
    """Read a tar from front to back; compare its payloads (<key>.<kind>) with key -> (offset, length, xxh3)."""
    found: set[str] = set()
    try:
        with open(folder / shard.name, "rb") as stream:
            hashed = _Hashed(stream)
            try:
                with tarfile.open(fileobj=hashed, mode="r|", bufsize=1 << 20) as tar:
                    for member in tar:
                        if not member.isfile():
                            yield Damage(shard.name, f"holds {member.name}, which is no file")
                            continue
                        data = tar.extractfile(member).read()
                        key, _, suffix = member.name.partition(".")
                        if suffix == kind:
                            found.add(key)
                            yield from _check_payload(shard, member, data, index.get(key))
                        elif suffix != "json":
                            yield Damage(shard.name, f"holds {member.name}, which is no part of the format")
            except (tarfile.TarError, EOFError) as error:
                yield Damage(shard.name, f"no readable tar: {error}")
            while hashed.read(1 << 20):
                continue
            size = stream.tell()
    except OSError as error:
        yield Damage(shard.name, f"cannot be read: {error.strerror or error}")
        return
    if size != shard.bytes:
        yield Damage(shard.name, f"has {size} bytes, but dataset.json says {shard.bytes}")
    if hashed.sha256.hexdigest() != shard.sha256:
        yield Damage(shard.name, "its sha256 is not the one in dataset.json")
    for key in sorted(index.keys() - found):
        yield Damage(f"{shard.name}: sample {key}", "is in the index, but not in the tar")


def _check_payload(shard: ShardInfo, member: tarfile.TarInfo, data: bytes,
                   entry: tuple[int, int, int] | None) -> Iterator[Damage]:
    where = f"{shard.name}: sample {member.name.partition('.')[0]}"
    if entry is None:
        yield Damage(where, "is in the tar, but not in the index")
        return
    if (member.offset_data, len(data)) != entry[:2]:
        yield Damage(where, f"lies at byte {member.offset_data} with {len(data)} bytes, but the index says byte "
                            f"{entry[0]} with {entry[1]}")
    if xxhash.xxh3_64_intdigest(data) != entry[2]:
        yield Damage(where, "its bytes do not match their checksum")


def decode_samples(dataset: Dataset, config: Config, count: int, manifest: str | None) -> list[dict[str, Any]]:
    """For `count` samples spread over the dataset: entropy of each round's bits, and PSNR against the source.

    The PSNR (dB, of uint8 frames) is there where a manifest is given. Raises UserError where the tokenizer is
    another one than the dataset's, or the manifest does not hold the sample's clip.
    """
    import torch

    from grn_scale.data.decode import DecodeRequest, decode_clip
    from grn_scale.hbq import dequantize_bits, to_channel_major, unpack_bits
    from grn_scale.tokenizer import load_tokenizer
    from grn_scale.tokenizer.clips import psnr, to_frames

    info = dataset.info
    tokenizer = load_tokenizer(config.tokenizer.path)
    dataset.check_tokenizer(tokenizer.fingerprint)
    sources = _sources(dataset, manifest, config) if manifest else {}
    results = []
    rows = min(count, info.samples)
    for number in range(rows):
        row = dataset.locate(number * info.samples // rows)
        bits = unpack_bits(dataset.read_bits(row), (*row.thw, info.latent_channels * info.rounds))
        result: dict[str, Any] = {"key": row.key, "latent_shape": list(row.thw),
                                  "bit_entropy_by_round": _entropies(bits.numpy(), info.rounds)}
        with torch.inference_mode():
            video = tokenizer.decode(dequantize_bits(to_channel_major(bits)[None], info.rounds))
        frames = to_frames(video)[0]
        if manifest:
            clip = sources.get(row.key)
            if clip is None:
                raise UserError(f"no line of {manifest} is sample {row.key}; give the manifest and the configuration "
                                "that the dataset was tokenized with")
            truth = decode_clip(DecodeRequest(
                str(clip.path), info.fps, config.tokenize.max_frames, clip.begin_frame, clip.end_frame,
                height=frames.shape[1], width=frames.shape[2])).frames
            result.update(id=clip.id, psnr_db=round(psnr(frames, truth), 3))
        results.append(result)
    return results


def _sources(dataset: Dataset, manifest: str, config: Config) -> dict[str, Any]:
    from grn_scale.data.manifest import load_manifest
    from grn_scale.data_pipeline.chunks import VideoSettings, find_sources

    info = dataset.info
    settings = VideoSettings(info.tokenizer_fingerprint, info.latent_channels, info.rounds, info.fps,
                             config.tokenize.max_frames, config.tokenize.latent_side)
    found, _ = find_sources(load_manifest(manifest), settings, {})
    return {source.key: source.clip for source in found if source.key}


def _entropies(bits: np.ndarray, rounds: int) -> list[float]:
    """Mean entropy of a bit in each round, over channels, in bits: 1 where both values are equally frequent."""
    share = bits.reshape(-1, rounds, bits.shape[-1] // rounds).mean(axis=0).clip(1e-12, 1 - 1e-12)
    entropy = -(share * np.log2(share) + (1 - share) * np.log2(1 - share))
    return [round(float(value), 4) for value in entropy.mean(axis=1)]


def check_ledger(dataset: Dataset, path: Path) -> list[dict[str, Any]]:
    """For each epoch of a training run's ledger what it says of this dataset's training samples, as plain values.

    The newest epoch may be unfinished: what it lacks is not missing yet. The run's config.yaml beside the ledger says
    which samples were held out. Raises UserError or ConfigError where either cannot be read.
    """
    from grn_scale.config.load import read_mapping
    from grn_scale.data.ledger import check_epoch, read_steps
    from grn_scale.data.plan import held_out

    try:
        fraction = read_mapping(path.with_name("config.yaml"), "--ledger")["data"]["validation_fraction"]
    except KeyError as error:
        raise UserError(f"{path.with_name('config.yaml')} does not say data.validation_fraction") from error
    steps = read_steps(path)
    keys = [row.key for shard in range(len(dataset.shard_sizes)) for row in dataset.rows(shard)
            if not held_out(row.key, fraction)]
    epochs = sorted({pack["epoch"] for packs in steps.values() for pack in packs})
    found = []
    for epoch in epochs:
        report = check_epoch(steps, epoch, keys)
        finished = epoch != epochs[-1] or not report.missing
        found.append({"epoch": epoch, "steps": report.steps, "samples": report.samples, "finished": finished,
                      "missing": len(report.missing), "repeated": len(report.repeated),
                      "exact": report.exact if finished else not report.repeated})
    return found


def _tracked(shards: tuple[ShardInfo, ...], name: str, progress: bool) -> Iterator[ShardInfo]:
    from rich.console import Console
    from rich.progress import track

    return iter(track(shards, name, console=Console(stderr=True)) if progress else shards)


def main(argv: list[str]) -> int:
    """Exit code of `grn-scale verify argv...`: 1 where anything is damaged. The result goes to stdout."""
    parser = CommandParser("verify", "Check every payload of the dataset FOLDER (the first argument, or data.dataset) "
                           "against its checksums.", "grn-scale verify tokens/ --decode 8 --manifest clips.jsonl",
                           json=True, schema=SCHEMAS)
    parser.add_argument("--decode", type=int, default=0, metavar="N",
                        help="decode N samples back to frames; reports the entropy of each round's bits")
    parser.add_argument("--manifest", metavar="FILE", help="with --decode: PSNR against the clips of this manifest")
    parser.add_argument("--ledger", metavar="FILE", help="ledger.jsonl of a run (data.ledger=true): check that each "
                        "epoch took every training sample once")
    named = bool(argv) and not argv[0].startswith("-") and "=" not in argv[0]
    config, options = parser.parse_command(argv[1:] if named else argv)
    folder = argv[0] if named else config.data.dataset
    if not folder:
        raise ConfigError(f"no dataset: {parser.prog} FOLDER, or data.dataset=FOLDER")
    if options.manifest and options.decode < 1:
        raise ConfigError("--manifest says what decoded samples are compared with; add --decode N")
    start_logging()
    damage = list(find_damage(folder, progress=True))
    decoded = []
    if options.decode > 0 and not damage:
        decoded = decode_samples(Dataset.open(folder), config, options.decode, options.manifest)
    epochs = check_ledger(Dataset.open(folder), Path(options.ledger)) if options.ledger else []
    info = read_dataset_info(folder)
    if options.json:
        found = [{"where": entry.where, "what": entry.what} for entry in damage]
        print(json.dumps({"dataset": str(folder), "samples": info.samples, "sound": not damage, "damage": found,
                          "decoded": decoded, "epochs": epochs}, indent=1))
    else:
        print("\n".join(_lines(folder, info, damage, decoded, epochs)))
    if damage and options.decode > 0:
        log.warning("nothing was decoded, because the dataset is damaged")
    return EXIT_FAILED if damage or not all(epoch["exact"] for epoch in epochs) else 0


def _lines(folder: str, info: DatasetInfo, damage: list[Damage], decoded: list[dict[str, Any]],
           epochs: list[dict[str, Any]]) -> Iterator[str]:
    for found in damage:
        yield f"damaged: {found}"
    for sample in decoded:
        psnr = f"PSNR {sample['psnr_db']:.2f} dB  " if "psnr_db" in sample else ""
        entropies = " ".join(f"{value:.3f}" for value in sample["bit_entropy_by_round"])
        yield f"{sample['key']}  {'x'.join(map(str, sample['latent_shape']))}  {psnr}bit entropy by round {entropies}"
    for epoch in epochs:
        state = "finished" if epoch["finished"] else "under way"
        right = "each sample once" if epoch["finished"] else "no sample twice"
        verdict = right if epoch["exact"] else "WRONG"
        yield (f"epoch {epoch['epoch']} ({state}, {epoch['steps']} steps): {verdict}; of {epoch['samples']} training "
               f"samples {epoch['missing']} not taken, {epoch['repeated']} taken more than once")
    verdict = f"{len(damage)} things are damaged; remove the shards named above and tokenize again" if damage else \
        f"sound: {info.samples} samples in {len(info.video_shards)} video and {len(info.text_shards)} text shards"
    yield f"{folder}: {verdict}"


if __name__ == "__main__":
    sys.exit(run(main))
