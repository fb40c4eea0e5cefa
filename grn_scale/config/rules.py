"""Checks that sections of the configuration are built with; each raises ConfigError naming the dotted field."""

from __future__ import annotations

from grn_scale.errors import ConfigError


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    require(value in choices, f"{name} is {value!r}, but must be one of {', '.join(choices)}")


def require_positive(section: str, **values: float) -> None:
    for name, value in values.items():
        require(value > 0, f"{section}.{name} is {value}, but must be greater than 0")
