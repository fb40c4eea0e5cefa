"""A check of the preflight: a function that returns `Passed`, or raises `Failed` or `Skipped`; and the process that
runs some of them one after the other and tells through a pipe what it finds."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from grn_scale.command_line import CommandParser, os_error_message
from grn_scale.errors import UserError

OK, WARNING, FAILED, SKIPPED = "ok", "warning", "failed", "skipped"


@dataclass(frozen=True)
class Passed:
    detail: str
    measured: dict[str, float] = field(default_factory=dict)
    """Figures of the check, units in their names."""
    warning: str = ""
    """What is odd, but no reason not to start."""


class Skipped(Exception):
    """There is nothing to check here, or no way to; the message is the reason."""


class Failed(Exception):
    """What is wrong, and the remedy. nodes: those to blame, where that is not this one."""

    def __init__(self, detail: str, remedy: str = "", nodes: Iterable[str] = ()):
        super().__init__(detail)
        self.detail, self.remedy, self.nodes = detail, remedy, tuple(nodes)


@dataclass(frozen=True)
class Result:
    """What a check came to, as it stands in the node's file."""

    check: str
    state: str
    """ok, warning, failed or skipped."""
    detail: str
    seconds: float
    remedy: str = ""
    nodes: tuple[str, ...] = ()
    """Nodes that a failure is about; empty: this one."""
    measured: dict[str, float] = field(default_factory=dict)

    def line(self, node: str) -> str:
        """For people."""
        state = self.state.upper() if self.state in (WARNING, FAILED) else self.state
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{node}: {self.check:<11} {state:<7} {self.detail}{remedy} ({self.seconds:.1f} s)".replace("\n", " ")


Check = Callable[[], Passed]


@dataclass(frozen=True)
class Node:
    """This node among those of the job."""

    number: int
    names: tuple[str, ...]
    """Of all nodes, in order."""

    @classmethod
    def of_step(cls, environment: Mapping[str, str] = os.environ) -> Node:
        """The node as Slurm's variables and GRN_SCALE_NODES tell it; one alone without them."""
        count = int(environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NNODES") or 1)
        number = int(environment.get("SLURM_NODEID") or 0)
        names = environment.get("GRN_SCALE_NODES", "").split()
        if len(names) != count:  # a step of other nodes than the job's
            names = [f"number-{i}" for i in range(count)]
            names[number] = environment.get("SLURMD_NODENAME") or os.uname().nodename
        return cls(number, tuple(names))

    @property
    def name(self) -> str:
        return self.names[self.number]

    @property
    def alone(self) -> bool:
        return len(self.names) == 1


class Limit:
    """The time that all checks of a node have together, from now on."""

    def __init__(self, seconds: float):
        self._begin, self._seconds = time.monotonic(), seconds

    def left(self, share: float) -> float:
        """Seconds until this share of the time is gone; a tenth of a second at least, for libraries take 0 as none."""
        return max(0.1, self._begin + share * self._seconds - time.monotonic())


def judge(name: str, check: Check) -> Result:
    """Run one check. Whatever it raises is a result: a defect on a node must not look like a node that is well."""
    begin = time.monotonic()

    def result(state: str, detail: str, **more: Any) -> Result:
        return Result(name, state, detail, round(time.monotonic() - begin, 3), **more)

    try:
        passed = check()
    except Skipped as reason:
        return result(SKIPPED, str(reason))
    except Failed as error:
        return result(FAILED, error.detail, remedy=error.remedy, nodes=error.nodes)
    except UserError as error:
        return result(FAILED, str(error))
    except Exception as error:  # whatever a driver or library does is a finding about this node, and the others follow
        message = os_error_message(error) if isinstance(error, OSError) else None
        return result(FAILED, message or f"{type(error).__name__}: {error}")
    detail = f"{passed.warning}; {passed.detail}" if passed.warning else passed.detail
    return result(WARNING if passed.warning else OK, detail, measured=passed.measured)


def arguments(program: str, description: str) -> CommandParser:
    """The arguments of the preflight, which those of its processes are too."""
    parser = CommandParser(program, description, "srun --ntasks-per-node=1 python -m grn_scale.slurm.preflight "
                           "--records runs/a/slurm/0001/preflight/12-0 --config runs/a/slurm/0001/config.yaml "
                           "--gpus-per-node 8", configured=False)
    parser.add_argument("--records", required=True, metavar="FOLDER", help="where NODE.json and NODE.ok go")
    parser.add_argument("--config", required=True, metavar="FILE", help="resolved configuration of the job")
    parser.add_argument("--gpus-per-node", type=int, default=0, metavar="G", help="CUDA devices that must answer")
    parser.add_argument("--seconds", type=float, default=300.0, metavar="LIMIT", help="for everything (default: 300)")
    parser.add_argument("--minimum-bandwidth", type=float, default=0.0, metavar="B",
                        help="GB/s that the all-reduce between the nodes must reach (default: any will do)")
    return parser


def tell_checks(argv: list[str], checks_of: Callable[[argparse.Namespace], Iterable[tuple[str, Check]]]) -> int:
    """What a process of the preflight does: run checks, and write to the pipe that argv names a line when each begins
    and one with its `Result`."""
    parser = arguments("slurm preflight", "A part of the preflight, started by it.")
    parser.add_argument("--pipe", type=int, required=True)
    options = parser.parse_options(argv)

    def tell(value: dict[str, Any]) -> None:
        os.write(options.pipe, f"{json.dumps(value)}\n".encode())

    for name, check in checks_of(options):
        tell({"begins": name})
        tell(asdict(judge(name, check)))
    return 0  # the pipe ends with the process, so that one which cannot end is seen
