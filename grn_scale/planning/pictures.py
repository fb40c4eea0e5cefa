"""Which pictures matplotlib is asked to write."""

from __future__ import annotations

from pathlib import Path

from grn_scale.errors import ConfigError

FORMATS = ("png", "svg", "pdf")


def picture_format(path: Path) -> str:
    """What a picture's name ends in; ConfigError where matplotlib is not asked to write it, or its folder is not there.
    """
    kind = path.suffix.removeprefix(".").lower()
    if kind not in FORMATS:
        raise ConfigError(f"--plot {path}: the name must end in .{', .'.join(FORMATS)}")
    if not path.parent.is_dir():
        raise ConfigError(f"--plot {path}: there is no folder {path.parent}: create it first")
    return kind
