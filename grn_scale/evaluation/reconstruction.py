"""Reconstruction by the video tokenizer: PSNR and SSIM of each clip of a manifest, by rounds of HBQ kept.

Writes reconstruction.jsonl (a line for each line of the manifest) and reconstruction.png.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grn_scale.atomic import atomic_file, write_bytes
from grn_scale.config.check import check_set
from grn_scale.data.decode import DecodeError
from grn_scale.data.manifest import Clip, load_manifest
from grn_scale.errors import UserError
from grn_scale.evaluation.clips import decode_as_tokenized
from grn_scale.evaluation.job import Job, Shares, shared
from grn_scale.evaluation.progress import shown
from grn_scale.evaluation.quality import load_ssim, quality_by_round
from grn_scale.tokenizer import load_tokenizer

log = logging.getLogger(__name__)

ROWS, PICTURE = "reconstruction.jsonl", "reconstruction.png"
NAMED = 10
"""Clips that the log names one by one; the file has all."""


def measure(job: Job) -> dict[str, Any]:
    """Means over the clips of data.manifest that can be decoded, by rounds kept, with counts.

    UserError where no clip can be decoded, or scikit-image is missing.
    """
    check_set(job.config, "data.manifest")
    load_ssim()
    clips = load_manifest(job.config.data.manifest)
    with shared(job) as shares:
        rows = sorted(shares.run(lambda: _rows(job, shares, clips)), key=lambda row: row["number"])
    bad = [row for row in rows if "reason" in row]
    good = [row for row in rows if "reason" not in row]
    if not good:
        raise UserError(f"none of the {len(clips)} clips of {job.config.data.manifest} can be decoded; the first said: "
                        f"{bad[0]['detail']}")
    rounds = job.config.model.rounds
    result = {"manifest": job.config.data.manifest, "tokenizer": rows[0]["tokenizer"], "rounds": rounds,
              "clips": len(good), "undecodable_clips": len(bad), "frames": sum(row["shape"][0] for row in good),
              "by_rounds": [_means(good, m) for m in range(rounds)]}
    if job.ranks.rank == 0:
        _write(rows, result, job.folder)
        for row in bad[:NAMED]:
            log.warning("clip %s gives no frames: %s", row["id"], row["detail"])
        if len(bad) > NAMED:
            log.warning("and %d more clips; see %s", len(bad) - NAMED, job.folder / ROWS)
    return result


def _rows(job: Job, shares: Shares, clips: Sequence[Clip]) -> list[dict[str, Any]]:
    import torch

    tokenizer = load_tokenizer(job.config.tokenizer.path).to("cuda" if torch.cuda.is_available() else "cpu")
    if job.source is not None:
        job.source.check_fingerprint("tokenizer", "tokenizer.path", tokenizer.fingerprint)
    rounds, rows = job.config.model.rounds, []
    numbers = range(shares.ranks.rank, len(clips), shares.ranks.size)
    share = (clip for _, clip in shares.mine(clips))
    decoded = zip(numbers, decode_as_tokenized(share, job.config.tokenize))
    for number, (clip, frames) in shown(decoded, len(numbers), "reconstructing", shares.ranks.rank == 0):
        row: dict[str, Any] = {"number": number, "id": clip.id, "line": clip.line, "tokenizer": tokenizer.fingerprint}
        if isinstance(frames, DecodeError):
            row |= {"path": str(clip.path), "reason": frames.reason, "detail": frames.detail}
        else:
            values = quality_by_round(tokenizer, frames, rounds)
            row |= {"shape": list(frames.shape[:3]), "psnr_db": [_finite(value.psnr_db) for value in values],
                    "ssim": [value.ssim for value in values]}
        rows.append(row)
    return rows


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _means(rows: Sequence[dict[str, Any]], m: int) -> dict[str, Any]:
    """Of the clips after m + 1 rounds. A clip that came back identical has no finite PSNR and is only counted."""
    finite = [row["psnr_db"][m] for row in rows if row["psnr_db"][m] is not None]
    return {"rounds": m + 1, "psnr_db": statistics.fmean(finite) if finite else None,
            "psnr_db_lowest": min(finite, default=None), "identical_clips": len(rows) - len(finite),
            "ssim": statistics.fmean(row["ssim"][m] for row in rows), "ssim_lowest": min(r["ssim"][m] for r in rows)}


def _write(rows: Sequence[dict[str, Any]], result: dict[str, Any], folder: Path) -> None:
    kept = [{key: value for key, value in row.items() if key not in ("number", "tokenizer")} for row in rows]
    write_bytes(folder / ROWS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept).encode())
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    numbers = list(range(1, result["rounds"] + 1))
    for axes, key, label in zip(figure.subplots(1, 2), ("psnr_db", "ssim"), ("PSNR (dB)", "SSIM")):
        axes.plot(numbers, [math.nan if row[key] is None else row[key] for row in result["by_rounds"]], "o-")
        axes.set(xlabel="HBQ rounds kept", ylabel=f"{label}, mean of {result['clips']} clips", xticks=numbers)
        axes.grid(alpha=0.3)
    with atomic_file(folder / PICTURE) as stream:
        figure.savefig(stream, format="png", dpi=110)


def table(result: dict[str, Any], folder: Path) -> list[str]:
    """Lines for people."""
    lines = [f"reconstruct  {result['clips']} clips, {result['frames']} frames, {result['undecodable_clips']} clips "
             f"without frames: {folder / ROWS}", "rounds       PSNR dB  lowest     SSIM  lowest"]
    for row in result["by_rounds"]:
        psnr = "   same    same" if row["psnr_db"] is None else f"{row['psnr_db']:7.2f} {row['psnr_db_lowest']:7.2f}"
        lines.append(f"{row['rounds']:<12d} {psnr}  {row['ssim']:7.4f} {row['ssim_lowest']:7.4f}")
    return lines
