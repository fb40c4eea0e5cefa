"""Ulysses context parallelism: between rows of all heads and all rows of some heads (arXiv:2309.14509).

Each process of the group holds an equal part of the rows of a sequence. Attention needs whole samples, but each head
alone: one all-to-all hands every process the whole sequence of its heads, a second one gives the outputs back. Heads
need not divide by the number of processes: the first ones take one more.

Legend: s rows of this process, S = s * processes, H heads here (of this tensor-parallel rank), h heads of this process
inside, E head size.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


def shares(heads: int, processes: int) -> list[int]:
    """How many heads each process works on."""
    base, more = divmod(heads, processes)
    return [base + (rank < more) for rank in range(processes)]


def gather_rows(q_sHE: torch.Tensor, k_sHE: torch.Tensor, v_sHE: torch.Tensor,
                group: dist.ProcessGroup) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[s, H, E] each -> [S, h, E] each: this process's heads of every process's rows. One exchange for all three."""
    rows, heads, size = q_sHE.shape
    counts = shares(heads, dist.get_world_size(group))
    mine = counts[dist.get_rank(group)]
    parts = zip(*(x.split(counts, dim=1) for x in (q_sHE, k_sHE, v_sHE)))
    sent = torch.cat([torch.stack(part, dim=1).flatten() for part in parts])
    received = _Exchange.apply(sent, [rows * 3 * count * size for count in counts],
                               [rows * 3 * mine * size] * len(counts), group)
    return received.view(-1, 3, mine, size).unbind(1)


def scatter_rows(x_ShE: torch.Tensor, heads: int, group: dist.ProcessGroup) -> torch.Tensor:
    """[S, h, E] -> [s, H, E]: all heads (`heads` = H) of this process's rows."""
    counts = shares(heads, dist.get_world_size(group))
    total, mine, size = x_ShE.shape
    rows = total // len(counts)
    received = _Exchange.apply(x_ShE.flatten(), [rows * mine * size] * len(counts),
                               [rows * count * size for count in counts], group)
    return torch.cat([part.view(rows, count, size)
                      for part, count in zip(received.split([rows * count * size for count in counts]), counts)], dim=1)


class _Exchange(torch.autograd.Function):
    """all_to_all_single of a flat tensor; its gradient goes the opposite way."""

    @staticmethod
    def forward(ctx, sent: torch.Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup):
        ctx.send, ctx.receive, ctx.group = send, receive, group
        received = sent.new_empty(sum(receive))
        dist.all_to_all_single(received, sent.contiguous(), receive, send, group=group)
        return received

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        back = gradient.new_empty(sum(ctx.send))
        dist.all_to_all_single(back, gradient.contiguous(), ctx.send, ctx.receive, group=ctx.group)
        return back, None, None, None
