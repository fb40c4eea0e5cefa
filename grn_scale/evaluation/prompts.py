"""Prompts from a text file."""

from __future__ import annotations

from pathlib import Path

from grn_scale.errors import ConfigError, UserError


def read_prompts(option: str, file: str | None, least: int = 1) -> list[str]:
    """The lines of the file of --prompts that are not blank.

    ConfigError where it is not given though `option` needs it; UserError where it cannot be read or has fewer lines
    than `least`.
    """
    if file is None:
        raise ConfigError(f"{option} needs --prompts FILE, with a prompt on each line")
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts: cannot read {file}: {error}") from error
    prompts = [line for line in lines if line.strip()]
    if len(prompts) < least:
        raise UserError(f"--prompts: {file} holds {len(prompts)} prompts, but {option} needs at least {least}")
    return prompts
