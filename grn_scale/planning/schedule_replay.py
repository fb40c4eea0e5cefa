"""When each pass of a pipeline begins and ends where passes take differently long, many pipelines at once.

Passes wait for their input, and in megatron-core 0.16 also for the exchange behind them. Without its overlap_p2p_comm,
which this package does not set, a stage sends what it has, receives what it needs next, and goes on when all of that is
done: it waits for its neighbours to come to their exchanges. In plain 1F1B both sides need at once what they exchange,
so this costs next to nothing; in interleaved 1F1B one exchange serves a forward and a backward pass in both directions,
and packs of different cost make the stages wait in step. With overlap_p2p_comm, interleaved only, a pass waits for its
input alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from grn_scale.errors import ConfigError
from grn_scale.planning.schedule import Schedule, Task

Observer = Callable[[Task, np.ndarray, np.ndarray], None]
"""Is told each task with the times at which it begins and ends, seconds [rows]."""


class Message(NamedTuple):
    """The `number`-th activation, or gradient, that a stage sends to the next, or previous, stage of the ring."""

    backward: bool
    sender: int
    number: int


class Post(NamedTuple):
    """A stage is ready to send or receive messages."""

    stage: int
    messages: tuple[Message, ...]


class Await(NamedTuple):
    """A stage goes on when all that is needed for these messages has been posted; `last`: of them, those that nobody
    awaits later."""

    stage: int
    messages: tuple[Message, ...]
    last: tuple[Message, ...] = ()


Action = Task | Post | Await


def replay(schedule: Schedule, seconds: Callable[[Task], np.ndarray], *, transfer: float = 0.0, overlap: bool = False,
           observe: Observer | None = None) -> np.ndarray:
    """When each stage is done, seconds [rows, stages] from the start of the step.

    Rows are pipelines beside each other. seconds: duration of a task in each row [rows]. transfer: from the moment a
    message can be sent until it has come. overlap: stages compute while they send and receive.
    ConfigError for overlap without interleaving, which megatron-core does not have.
    """
    if overlap and schedule.virtual == 1:
        raise ConfigError("transfers overlap with passes in the interleaved schedule only: take 2 chunks a stage or "
                          "more, or transfers that do not overlap")
    free: list[np.ndarray] = [np.zeros(())] * schedule.pipeline
    posted: dict[Message, np.ndarray] = {}
    for action in _actions(schedule, overlap):
        now = free[action.stage]
        if isinstance(action, Task):
            end = free[action.stage] = now + seconds(action)
            if observe is not None:
                observe(action, np.broadcast_to(now, end.shape), end)
        elif isinstance(action, Post):
            for message in action.messages:
                posted[message] = np.maximum(posted[message], now) if message in posted else now
        else:
            for message in action.messages:
                now = np.maximum(now, posted[message] + transfer)
            free[action.stage] = now
            for message in action.last:
                del posted[message]
    return np.stack(free, axis=-1)


@lru_cache(maxsize=4)
def _actions(schedule: Schedule, overlap: bool) -> tuple[Action, ...]:
    """What all stages do, in an order in which everything stands behind what it waits for."""
    programs = [list(_overlapped(schedule, stage) if overlap else _exchanging(schedule, stage))
                for stage in range(schedule.pipeline)]
    awaits: dict[Message, int] = {}
    posts: dict[Message, int] = {}
    for program in programs:
        for action in program:
            for message in action.messages if isinstance(action, Await) else ():
                awaits[message] = awaits.get(message, 0) + 1
            for message in action.messages if isinstance(action, Post) else ():
                posts[message] = posts.get(message, 0) + 1
    position, ordered = [0] * schedule.pipeline, []
    while any(position[stage] < len(program) for stage, program in enumerate(programs)):
        before = len(ordered)
        for stage, program in enumerate(programs):
            while position[stage] < len(program):
                action = program[position[stage]]
                if isinstance(action, Post):
                    for message in action.messages:
                        posts[message] -= 1
                elif isinstance(action, Await):
                    if any(posts[message] for message in action.messages):
                        break
                    for message in action.messages:
                        awaits[message] -= 1
                    action = action._replace(last=tuple(each for each in action.messages if not awaits[each]))
                ordered.append(action)
                position[stage] += 1
        assert len(ordered) > before, "a schedule that waits for itself"
    return tuple(ordered)


class _Ring:
    """The messages of one stage, in the order in which it sends and receives them."""

    def __init__(self, schedule: Schedule, stage: int) -> None:
        self.stage, self.size = stage, schedule.pipeline
        self._count = {(backward, sends): 0 for backward in (False, True) for sends in (False, True)}

    def next(self, backward: bool, sends: bool) -> Message:
        """The next activation (or gradient) that goes out (or comes in)."""
        number = self._count[backward, sends]
        self._count[backward, sends] += 1
        step = 1 if backward else -1
        return Message(backward, self.stage if sends else (self.stage + step) % self.size, number)


def _overlapped(schedule: Schedule, stage: int) -> Iterator[Action]:
    """Each pass awaits its input alone, and posts its result."""
    ring, parts = _Ring(schedule, stage), schedule.pipeline * schedule.virtual
    for task in schedule.of_stage(stage):
        part = task.chunk * schedule.pipeline + stage
        first, last = (parts - 1, 0) if task.backward else (0, parts - 1)
        if part != first:
            yield Await(stage, (ring.next(task.backward, sends=False),))
        yield task
        if part != last:
            yield Post(stage, (ring.next(task.backward, sends=True),))


def _exchanging(schedule: Schedule, stage: int) -> Iterator[Action]:
    """Passes and exchanges in turn, as megatron-core's schedules make them."""
    ring = _Ring(schedule, stage)
    groups = _plain(schedule, stage) if schedule.virtual == 1 else _interleaved(schedule, stage)
    for item in groups:
        if isinstance(item, Task):
            yield item
        elif any(item):
            kinds = ((False, True), (False, False), (True, True), (True, False))
            messages = tuple(ring.next(*kind) for kind, wanted in zip(kinds, item) if wanted)
            yield Post(stage, messages)
            yield Await(stage, messages)


Exchange = tuple[bool, bool, bool, bool]
"""Whether it sends an activation, receives one, sends a gradient, receives one."""


def _plain(schedule: Schedule, stage: int) -> Iterator[Task | Exchange]:
    """forward_backward_pipelining_without_interleaving."""
    first, last = stage == 0, stage == schedule.pipeline - 1
    warm_up = schedule.warm_up(stage)
    tasks = schedule.of_stage(stage)
    for task in tasks[:warm_up]:
        yield from ((False, not first, False, False), task, (not last, False, False, False))
    steady = tasks[warm_up:len(tasks) - warm_up]
    if steady:
        yield False, not first, False, False
    for i in range(0, len(steady), 2):
        more = i + 2 < len(steady)
        yield from (steady[i], (not last, False, False, not last))
        yield from (steady[i + 1], (False, more and not first, not first, False))
    for task in tasks[len(tasks) - warm_up:]:
        yield from ((False, False, False, not last), task, (False, False, not first, False))


def _interleaved(schedule: Schedule, stage: int) -> Iterator[Task | Exchange]:
    """forward_backward_pipelining_with_interleaving without overlap_p2p_comm."""
    first, last = stage == 0, stage == schedule.pipeline - 1
    tasks = schedule.of_stage(stage)
    forward = [task for task in tasks if not task.backward]
    backward = [task for task in tasks if task.backward]
    count, warm_up = len(forward), schedule.warm_up(stage)
    top = schedule.virtual - 1

    def receives(done: list[Task], number: int, leads: bool, end: int) -> bool:
        """Whether the exchange behind a pass gets an input. The stage that leads gets, `pipeline - 1` passes ahead of
        its use of it, what the stage that closes the ring makes meanwhile, unless that ends there."""
        aligned = number - (schedule.pipeline - 1)
        return not leads or (aligned >= 0 and done[aligned].chunk != end)

    yield False, not first, False, False
    for k in range(warm_up):
        turn = k == warm_up - 1 < count - 1
        yield from (forward[k], (not (last and forward[k].chunk == top),
                                 k < count - 1 and receives(forward, k, first, top), False, turn and not last))
    for k in range(count - warm_up):
        i = k + warm_up
        yield from (forward[i], backward[k])
        yield (not (last and forward[i].chunk == top), i < count - 1 and receives(forward, i, first, top),
               not (first and backward[k].chunk == 0), receives(backward, k, last, 0))
    if warm_up == count:
        yield False, False, False, not last
    for k in range(count - warm_up, count):
        yield from (backward[k], (False, False, not (first and backward[k].chunk == 0),
                                  k < count - 1 and receives(backward, k, last, 0)))
