"""Which state of its datasets a run reads, when they grow: an epoch keeps the one it began with, the next one takes the
newest. All processes of a run read the same, so one of them looks (`newest`) and the others are told."""

from __future__ import annotations

from collections.abc import Callable

from grn_scale.config.data_schema import DataConfig
from grn_scale.data.mixture import Mixture
from grn_scale.data.plan import Plan
from grn_scale.data.state import DataState


def open_plan(data: DataConfig, seed: int, state: DataState | None,
              newest: Callable[[], str]) -> tuple[Plan, DataState]:
    """The training plan a run starts with, or goes on with from `state`, and the state it goes on from.

    newest: name of the datasets' newest state, the same for all processes (`mixture.newest_snapshot`, by one of them).
    Raises ConfigError where the state stands in the middle of an epoch of a snapshot that is not there any more.
    """
    if state is not None and state.position:
        return _plan(data, seed, state.snapshot), state
    plan = _plan(data, seed, newest())
    return plan, plan.take_over(state) if state is not None else plan.start()


def renewed(plan: Plan, data: DataConfig, seed: int, newest: Callable[[], str]) -> Plan | None:
    """The plan of the newest state of the datasets; None where that is the plan's own."""
    snapshot = newest()
    return None if snapshot == plan.mixture.snapshot else _plan(data, seed, snapshot)


def _plan(data: DataConfig, seed: int, snapshot: str) -> Plan:
    return Plan.of(Mixture.open(data, snapshot, check_files=False), data, seed)
