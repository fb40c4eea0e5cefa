"""Prompts from a text file."""

from __future__ import annotations

from grn_scale.errors import ConfigError, UserError
from grn_scale.sampling.request import prompt_lines


def read_prompts(option: str, file: str | None, least: int = 1) -> list[str]:
    """The lines of the file of --prompts that are not blank.

    ConfigError where it cannot be read, or is not given though `option` needs it; UserError where it has fewer lines
    than `least`.
    """
    if file is None:
        raise ConfigError(f"{option} needs --prompts FILE, with a prompt on each line")
    prompts = prompt_lines(file)
    if len(prompts) < least:
        raise UserError(f"--prompts: {file} holds {len(prompts)} prompts, but {option} needs at least {least}")
    return prompts
