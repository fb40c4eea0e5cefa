"""What a command line may ask of sampling: prompts from a file, lengths the tokenizer makes, sizes of whole cells."""

from __future__ import annotations

import re
from pathlib import Path

from grn_scale.data.buckets import CELL_PIXELS, whole_groups
from grn_scale.errors import ConfigError


def prompt_lines(file: str) -> list[str]:
    """The lines of the file of --prompts that are not blank; ConfigError where it cannot be read."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts: cannot read {file}: {error}") from error
    return [line for line in lines if line.strip()]


def asked_frames(frames: int | None, default: int) -> int:
    """What --frames says, or the default; ConfigError where that is not 1 + 4k."""
    frames = default if frames is None else frames
    if frames < 1 or frames != whole_groups(frames):
        raise ConfigError(f"--frames is {frames}, but the tokenizer makes 1 + 4k frames: "
                          f"{max(1, whole_groups(frames))} would do")
    return frames


def asked_size(text: str | None) -> tuple[int, int] | None:
    """(height, width) in pixels of what --size says, None where it says nothing; ConfigError for other than HxW of
    whole cells."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)[xX](\d+)", text)
    if not match:
        raise ConfigError(f"--size is {text!r}, but must be height x width in pixels, like 480x832")
    height, width = int(match[1]), int(match[2])
    if not height or not width or height % CELL_PIXELS or width % CELL_PIXELS:
        near = "x".join(str(max(1, round(side / CELL_PIXELS)) * CELL_PIXELS) for side in (height, width))
        raise ConfigError(f"--size is {text}, but both sides must be multiples of {CELL_PIXELS}: {near} is near")
    return height, width
