"""Mean and covariance of features in an .npz file, as the field exchanges them: `mu` and `sigma` (or `mean`, `cov`).

Ours also hold `count` and `settings`, a JSON text that says which network and preprocessing made them. Nothing is ever
unpickled.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grn_scale.atomic import atomic_file
from grn_scale.errors import UserError
from grn_scale.evaluation.frechet import Gaussian

NAMES = (("mu", "sigma"), ("mean", "cov"))
WANTED = frozenset(("mu", "sigma", "mean", "cov", "count", "settings"))
"""What is unpacked: files of the field may hold all their pictures beside the statistics."""
LARGEST_BYTES = 1 << 30
"""An array that unpacks to more (a covariance of 11,585 features in fp64) is refused before it is unpacked."""
ASYMMETRY = 1e-5
"""Of the largest entry: what rounding to fp32 may leave between the halves of a covariance."""


def write_statistics(path: str | Path, gaussian: Gaussian, settings: dict[str, Any]) -> None:
    """Write mu [d] and sigma [d, d] (fp64), count and settings."""
    with atomic_file(path) as stream:
        np.savez(stream, mu=gaussian.mean.numpy(), sigma=gaussian.covariance.numpy(), count=np.int64(gaussian.count),
                 settings=np.array(json.dumps(settings, sort_keys=True)))


def read_statistics(path: str | Path) -> tuple[Gaussian, dict[str, Any] | None]:
    """(mean and covariance, the settings they were made with or None where the file does not say).

    UserError where the file cannot be read, or does not hold finite real numbers [d] and symmetric [d, d].
    """
    arrays, names = _arrays(Path(path))
    found = [pair for pair in NAMES if set(pair) <= arrays.keys()]
    if not found:
        raise UserError(f"{path} holds {', '.join(sorted(names)) or 'nothing'}, but statistics are mu and sigma (or "
                        "mean and cov)")
    mean, covariance = (_numbers(path, name, arrays[name]) for name in found[0])
    if mean.ndim != 1 or not mean.size or covariance.shape != (mean.size, mean.size):
        raise UserError(f"{path}: {found[0][0]} is {list(mean.shape)} and {found[0][1]} {list(covariance.shape)}, but "
                        "they must be [d] and [d, d]")
    if np.abs(covariance - covariance.T).max() > ASYMMETRY * np.abs(covariance).max():
        raise UserError(f"{path}: {found[0][1]} is not symmetric, so it is no covariance")
    if covariance.diagonal().min() < 0:
        raise UserError(f"{path}: {found[0][1]} has a negative variance on its diagonal, so it is no covariance")
    count, settings = _origin(path, arrays)
    symmetric = torch.from_numpy((covariance + covariance.T) / 2)
    return Gaussian(torch.from_numpy(mean), symmetric, count), settings


def _arrays(path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """(the arrays that are WANTED, the names of all)."""
    try:
        with zipfile.ZipFile(path) as archive:
            large = [entry.filename for entry in archive.infolist()
                     if entry.filename.removesuffix(".npy") in WANTED and entry.file_size > LARGEST_BYTES]
        if large:
            raise UserError(f"{path}: {large[0]} unpacks to more than {LARGEST_BYTES >> 30} GiB; no statistics do")
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if name in WANTED}, list(file.files)
    except (OSError, ValueError, EOFError, KeyError, MemoryError, zipfile.BadZipFile, RuntimeError) as error:
        # RuntimeError: zipfile raises it for an encrypted entry, and a kind of it for a compression it does not know.
        raise UserError(f"cannot read {path} as statistics: {error}; give an .npz file of plain arrays, mu and sigma"
                        ) from error
    except zlib.error as error:
        raise UserError(f"cannot read {path} as statistics: {error}; the file is damaged") from error


def _numbers(path: str | Path, name: str, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in "fiu":
        raise UserError(f"{path}: {name} is {array.dtype}, but must hold real numbers")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise UserError(f"{path}: {name} holds NaN or infinity; make the statistics anew")
    return array


def _origin(path: str | Path, arrays: dict[str, np.ndarray]) -> tuple[int | None, dict[str, Any] | None]:
    """Count and settings, which files of others do not hold."""
    count = arrays.get("count")
    known = count is not None and count.shape == () and count.dtype.kind in "iu"
    text = arrays.get("settings")
    if text is None or text.shape != () or text.dtype.kind != "U":
        return int(count) if known else None, None
    try:
        settings = json.loads(str(text))
    except ValueError as error:
        raise UserError(f"{path}: its settings are no JSON ({error}); the file is damaged") from error
    return int(count) if known else None, settings if isinstance(settings, dict) else None
