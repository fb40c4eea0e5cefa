"""grn-scale verify: is a tokenized dataset what its index and dataset.json say?

    grn-scale verify tokens/
    grn-scale verify tokens/ --decode 8 --manifest clips.jsonl

Reads every shard once: sha256, every payload's checksum, and index against tar in both directions. --decode also
turns samples back into frames, and with the manifest compares them with their source.
"""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grn_scale.command_line import CommandParser, run, start_logging
from grn_scale.config.class_schema import SCHEMAS
from grn_scale.data.dataset import Dataset
from grn_scale.data.dataset_info import read_dataset_info
from grn_scale.data.schema import DatasetInfo
from grn_scale.data_pipeline.damage import THREADS, Damage, find_damage
from grn_scale.data_pipeline.verify_ledger import check_ledger, ledger_lines, show_ledger
from grn_scale.errors import EXIT_FAILED, ConfigError

log = logging.getLogger(__name__)


def main(argv: list[str]) -> int:
    """Exit code of `grn-scale verify argv...`: 1 where anything is damaged. The result goes to stdout."""
    parser = CommandParser("verify", "Check every payload of the dataset FOLDER (the first argument, a path or URL, or "
                           "data.dataset) against its checksums.",
                           "grn-scale verify tokens/ --decode 8 --manifest clips.jsonl", json=True, schema=SCHEMAS)
    parser.add_argument("--threads", type=int, default=THREADS, metavar="N",
                        help=f"shards read at a time (default here: {THREADS})")
    parser.add_argument("--decode", type=int, default=0, metavar="N",
                        help="decode N samples back to frames; reports the entropy of each round's bits")
    parser.add_argument("--manifest", metavar="FILE", help="with --decode: PSNR and SSIM against the clips of this "
                        "manifest")
    parser.add_argument("--ledger", metavar="FILE", help="ledger.jsonl of a run (data.ledger=true): check that each "
                        "epoch took every training sample as often as it should")
    named = bool(argv) and not argv[0].startswith("-") and ("=" not in argv[0] or "://" in argv[0].partition("=")[0])
    config, options = parser.parse_command(argv[1:] if named else argv)
    folder = argv[0] if named else config.data.dataset
    if not folder and options.ledger:
        return show_ledger(Path(options.ledger), options.json)
    if not folder:
        raise ConfigError(f"no dataset: {parser.prog} FOLDER, or data.dataset=FOLDER")
    if options.manifest and options.decode < 1:
        raise ConfigError("--manifest says what decoded samples are compared with; add --decode N")
    if options.threads < 1:
        raise ConfigError(f"--threads is {options.threads}, but must be at least 1")
    start_logging()
    counts: Counter[str] = Counter()
    damage = list(find_damage(folder, True, options.threads, counts))
    decoded = []
    if options.decode > 0 and not damage:
        from grn_scale.data_pipeline.verify_decode import decode_samples

        decoded = decode_samples(Dataset.open(folder), config, options.decode, options.manifest)
    epochs = check_ledger(Path(options.ledger), folder) if options.ledger else []
    document = _document(folder, damage, counts, decoded, epochs)
    print(json.dumps(document, indent=1) if options.json else "\n".join(_lines(document)))
    if damage and options.decode > 0:
        log.warning("nothing was decoded, because the dataset is damaged")
    return EXIT_FAILED if damage or not all(epoch["exact"] for epoch in epochs) else 0


def _document(folder: str, damage: list[Damage], counts: Counter[str], decoded: list[dict[str, Any]],
              epochs: list[dict[str, Any]]) -> dict[str, Any]:
    info: DatasetInfo = read_dataset_info(folder)
    means = []
    if decoded:
        from grn_scale.data_pipeline.verify_decode import mean_by_bucket

        means = mean_by_bucket(decoded)
    return {"dataset": folder, "snapshot": info.snapshot, "samples": info.samples,
            "video_shards": len(info.video_shards), "text_shards": len(info.text_shards), "sound": not damage,
            "unlisted_samples": counts["unlisted"],
            "damage": [{"where": entry.where, "what": entry.what} for entry in damage],
            "decoded": decoded, "means": means, "epochs": epochs}


def _lines(document: dict[str, Any]) -> Iterator[str]:
    for found in document["damage"]:
        yield f"damaged: {found['where']}: {found['what']}"
    for sample in document["decoded"]:
        yield f"{sample['key']}  {_shape(sample['latent_shape'])}  {_measured(sample)}"
    for mean in document["means"]:
        name = _shape(mean["latent_shape"]) if mean["latent_shape"] else "all"
        yield f"mean of {name}, {mean['samples']} samples  {_measured(mean)}"
    yield from ledger_lines(document["epochs"])
    if document["unlisted_samples"]:
        yield (f"{document['unlisted_samples']} samples are in a tar but not in the index: clips that the index has "
               "from another shard")
    verdict = (f"sound: {document['samples']} samples in {document['video_shards']} video and "
               f"{document['text_shards']} text shards") if document["sound"] else \
        f"{len(document['damage'])} things are damaged; run `grn-scale index repair {document['dataset']}`"
    yield f"{document['dataset']}: {verdict}"


def _shape(shape: list[int]) -> str:
    return "x".join(map(str, shape))


def _measured(values: dict[str, Any]) -> str:
    psnr = f"PSNR {values['psnr_db']:.2f} dB  " if "psnr_db" in values else ""
    ssim = f"SSIM {values['ssim']:.3f}  " if "ssim" in values else ""
    return psnr + ssim + "bit entropy by round " + " ".join(f"{value:.3f}" for value in values["bit_entropy_by_round"])


if __name__ == "__main__":
    sys.exit(run(main))
