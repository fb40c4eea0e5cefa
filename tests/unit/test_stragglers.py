"""Which rank or copy of the model is slow, as far as times tell; and the probe beside them."""

from __future__ import annotations

import socket
from dataclasses import replace

import torch

from grn_scale.config.run_schema import WatchdogConfig
from grn_scale.train.memory import Held
from grn_scale.train.probe import Probe
from grn_scale.train.stragglers import RankTimes, Stragglers, slow_ranks

HELD = Held(1000, None)


def ranks_of(*times: tuple[int, float, float, float]) -> list[RankTimes]:
    return [RankTimes(f"node{rank}", *one) for rank, one in enumerate(times)]


def compared(ranks: list[RankTimes], **settings) -> tuple[dict, list[str]]:
    """Row of the third comparison of these times, the last of them this process's, and what it says."""
    said: list[str] = []
    *others, mine = ranks
    stragglers = Stragglers(WatchdogConfig(straggler_every=1, straggler_ratio=1.3, **settings), mine.replica,
                            lambda: mine.probe, lambda: HELD,
                            lambda own: [*((other, HELD) for other in others), (replace(own[0], host=mine.host), HELD)],
                            said.append)
    rows = [stragglers.add(mine.forward_backward, mine.data_wait) for _ in range(3)]
    return rows[-1], said


def test_a_slow_rank_makes_its_replica_slow_and_is_found_in_it_by_what_it_does_alone() -> None:
    row, said = compared(ranks_of((0, 1.0, 0.0, 0.01), (0, 0.9, 0.0, 0.01), (1, 1.1, 0.0, 0.01), (1, 1.0, 0.0, 0.01),
                                  (2, 1.9, 0.0, 0.01), (2, 1.8, 0.0, 0.02)))
    alone, replica = said
    assert replica.startswith("replica 2 (ranks 4, 5 on node4, node5) is slow: forward and backward take 1.7 times")
    assert "by itself rank 5 on node5 is slow (the probe: 2.0 times the median)" in replica
    assert alone.startswith("rank 5 on node5 is slow by itself: the probe takes 2.0 times the median of all ranks")
    assert (row["replicas_forward_backward_max"], row["replicas_forward_backward_slowest"]) == (1.9, 2)
    assert (row["ranks_probe_min"], row["ranks_probe_max"], row["ranks_probe_slowest"]) == (0.01, 0.02, 5)


def test_peers_of_a_slow_rank_are_not_named_and_what_is_not_seen_is_said() -> None:
    _, said = compared(ranks_of((0, 1.0, 0.0, 0.01), (0, 1.0, 0.0, 0.01), (1, 1.0, 0.0, 0.01), (1, 2.0, 0.0, 0.01)))
    (message,) = said
    assert "replica 1 (ranks 2, 3" in message and "2.0 times" in message and "none of them is slow" in message


def test_times_are_means_and_compared_only_every_so_often() -> None:
    said, seen = [], []
    stragglers = Stragglers(WatchdogConfig(straggler_every=2), 0, lambda: 0.5, lambda: HELD,
                            lambda mine: [seen.append(mine[0]), mine][1:], said.append)
    assert stragglers.add(1.0, 0.0) == {} and stragglers.add(3.0, 0.2)["replicas_forward_backward_max"] == 2.0
    assert seen == [RankTimes(socket.gethostname(), 0, 2.0, 0.1, 0.5)] and said == []
    off = Stragglers(WatchdogConfig(straggler_every=0), 0, lambda: 0.5, lambda: HELD, lambda mine: [mine],
                     said.append)
    assert [off.add(1.0, 0.0) for _ in range(4)] == [{}] * 4


def test_a_wait_for_data_counts_only_where_it_delays_a_step() -> None:
    ranks = ranks_of(*((i, 1.0, wait, 0.01) for i, wait in enumerate((0.0, 0.0, 0.005, 0.5))))
    assert list(slow_ranks(ranks, "data_wait", 1.3)) == [3]
    assert slow_ranks(ranks, "forward_backward", 1.3) == {}
    (message,) = compared(ranks)[1]
    assert message.startswith("rank 3 on node3 is slow by itself: waiting for samples takes 49.9 times")


def test_the_probe_takes_some_time_and_leaves_finite_numbers() -> None:
    probe = Probe(torch.device("cpu"))
    assert 0 < probe() < 5 and all(buffer.isfinite().all() for buffer in probe._buffers)
