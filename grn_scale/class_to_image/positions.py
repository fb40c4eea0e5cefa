"""Where a token of the square latent image stands: a fixed sine table, and rotary angles (GRN reference, section 7)."""

from __future__ import annotations

import torch

BASE = 10_000.0


def sine_table(grid: int, hidden_size: int) -> torch.Tensor:
    """fp32 [1, grid * grid, hidden_size], computed in fp64: the first half of the channels tells the column, the
    second the row, each as sines, then cosines, of its number times 10000^(-2j / (hidden_size / 2))."""
    quarter = hidden_size // 4
    frequency = BASE ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * frequency
    place = torch.cat((angle.sin(), angle.cos()), dim=1)
    rows, columns = _rows_and_columns(grid)
    return torch.cat((place[columns], place[rows]), dim=1)[None].float()


def rotary_tables(grid: int, head_size: int, in_context: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin), each fp32 [in_context + grid * grid, head_size / 2]: an angle for each pair of channels.

    The first half of the pairs turns by the row, the second by the column; the in-context tokens in front are not
    turned.
    """
    quarter = head_size // 4
    frequency = 1.0 / BASE ** (torch.arange(quarter, dtype=torch.float32) / quarter)
    rows, columns = _rows_and_columns(grid)
    angle = torch.cat((rows[:, None] * frequency, columns[:, None] * frequency), dim=1)
    angle = torch.cat((angle.new_zeros(in_context, angle.shape[1]), angle))
    return angle.cos(), angle.sin()


def _rows_and_columns(grid: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [grid * grid] each: row and column of every token, row-major."""
    token = torch.arange(grid * grid)
    return token // grid, token % grid
