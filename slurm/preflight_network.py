"""Checks that the nodes of a job make together, and that of the devices which they need for it."""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from grn_scale import __version__
from grn_scale.command_line import run
from grn_scale.slurm.preflight_check import Check, Failed, Limit, Node, Passed, Skipped, tell_checks
from grn_scale.slurm.preflight_devices import check_devices, driver_version

if TYPE_CHECKING:
    import torch.distributed as dist

    from grn_scale.slurm.preflight_meeting import Meeting

MOST_CLOCK_SECONDS = 5.0
TURN_SECONDS = 10.0
"""How long the first node waits for one that compares clocks."""
CLOCK_SHARE, VERSIONS_SHARE, FLOW_SHARE, AGREE_SHARE = 0.6, 0.75, 0.84, 0.86
"""Of the time limit, until which the nodes wait for each other there."""
CUDA_BYTES, CPU_BYTES = 256 * 2**20, 16 * 2**20
"""What is added up to see how fast the network is."""
ROUNDS = 5


class Network:
    """The checks of one node. Where one fails, those that need it are skipped and the others run all the same."""

    def __init__(self, node: Node, where: str, limit: Limit, records: Path, *, gpus: int = 0,
                 minimum_bandwidth: float = 0.0, clock: Callable[[], float] = time.time):
        """where: ADDRESS:PORT at which the nodes meet; empty for a node alone. minimum_bandwidth: GB/s."""
        self.node, self._limit, self._records, self._clock = node, limit, records, clock
        self._address, _, self._port = where.rpartition(":")
        self._gpus, self._minimum_bandwidth = gpus, minimum_bandwidth
        self._meeting: Meeting | None = None
        self._flow: dist.ProcessGroupGloo | None = None
        self._devices = "failed"
        self._devices_of: dict[str, str] = {}

    def checks(self) -> Iterator[tuple[str, Check]]:
        """All, in order; the nodes stay together until the last is done."""
        yield "address", self.address
        yield "meeting", self.meet
        yield "clock", self.clock
        yield "devices", self.devices
        yield "versions", self.versions
        yield "data flow", self.data_flow
        yield "bandwidth", self.bandwidth
        if self._meeting:
            self._meeting.leave()

    def address(self) -> Passed:
        """The name of the first node has an address."""
        if not self._address and self.node.alone:
            raise Skipped("one node alone")
        if not self._address:
            raise Failed("MASTER_ADDR is not set", "start it from a job script of `grn-scale slurm`, which sets it")
        try:
            found = socket.getaddrinfo(self._address, self._port, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            raise Failed(f"{self._address} has no address here: {error.strerror}",
                         "see to DNS or /etc/hosts of this node") from error
        return Passed(f"{self._address} is {', '.join(sorted({str(entry[4][0]) for entry in found}))}")

    def meet(self) -> Passed:
        """Every node comes to the store that the first one keeps."""
        if self.node.alone:
            raise Skipped("one node alone")
        if not self._address:
            raise Skipped("there is no address")
        from grn_scale.slurm.preflight_meeting import MEET_SHARE, Meeting

        self._meeting = Meeting(self.node, self._address, int(self._port), self._limit, self._records)
        self._meeting.exchange("meet", "here", MEET_SHARE)
        return Passed(f"{len(self.node.names)} nodes met at {self._address}:{self._port}")

    def clock(self) -> Passed:
        """This node's clock agrees with the first one's. One node after the other asks, so that an answer takes no
        longer than the way to it."""
        meeting, first, ours = self._met(), self.node.names[0], f"clock/{self.node.number}"
        if self.node.number == 0:
            for i in range(1, len(self.node.names)):
                meeting.tell(f"clock/{i}/turn", "")
                if meeting.hear(f"clock/{i}/ask", min(TURN_SECONDS, self._limit.left(CLOCK_SHARE))) is not None:
                    meeting.tell(f"clock/{i}/time", repr(self._clock()))
            return Passed("the other nodes compare theirs with this one")
        answer = None
        if meeting.hear(f"{ours}/turn", self._limit.left(CLOCK_SHARE)) is not None:
            begin = self._clock()
            meeting.tell(f"{ours}/ask", "")
            answer = meeting.hear(f"{ours}/time", self._limit.left(CLOCK_SHARE))
            end = self._clock()
        if answer is None:
            raise Failed(f"{first} did not tell its time", nodes=[first])
        ahead, way = (begin + end) / 2 - float(answer), (end - begin) / 2
        words = f"{abs(ahead):.3f} s {'ahead of' if ahead > 0 else 'behind'} {first}, give or take {way:.3f}"
        if abs(ahead) - way > MOST_CLOCK_SECONDS:
            raise Failed(words, "set the clock of this node (chronyd or another NTP client should run)")
        return Passed(words, {"clock_seconds": round(ahead, 4)})

    def devices(self) -> Passed:
        """The GPUs answer."""
        try:
            passed = check_devices(self._gpus)
        except Skipped:
            self._devices = "none"
            raise
        self._devices = "ok"
        return passed

    def versions(self) -> Passed:
        """This node has the software that most nodes have; the first one decides where as many have another."""
        ours = software()
        if self.node.alone:
            self._devices_of = {self.node.name: self._devices}
            return Passed(_words(ours))
        said = self._met().exchange("versions", {"of": ours, "devices": self._devices}, VERSIONS_SHARE)
        self._devices_of = {node: each["devices"] for node, each in said.items()}
        other = {}
        for name, version in ours.items():
            most = Counter(said[node]["of"][name] for node in self.node.names).most_common(1)[0][0]
            if version != most:
                example = next(node for node in self.node.names if said[node]["of"][name] == most)
                other[name] = f"{name} is {version}, but {most} on {example} and most nodes"
        driver = other.pop("driver", "")  # sites change drivers node by node, and CUDA bears it
        if other:
            raise Failed("; ".join(other.values()), "give all nodes the same image or environment")
        same = all(each["of"] == ours for each in said.values())
        return Passed(f"{_words(ours)}, as on {'all' if same else 'most'} nodes", warning=driver)

    def data_flow(self) -> Passed:
        """Numbers from every node reach every node, over gloo as training uses it."""
        meeting = self._met()
        import torch
        import torch.distributed as dist

        seconds, count = self._limit.left(FLOW_SHARE), len(self.node.names)
        meeting.store.set_timeout(timedelta(seconds=seconds))  # which gloo asks for the addresses of the others
        try:
            group = dist.ProcessGroupGloo(dist.PrefixStore("gloo", meeting.store), self.node.number, count,
                                          timedelta(seconds=seconds))
            numbers = torch.full((1024,), self.node.number + 1, dtype=torch.int64)
            group.allreduce([numbers]).wait()
        except RuntimeError as error:
            raise Failed(f"nodes cannot reach each other: {str(error).splitlines()[0]}",
                         "processes connect at ports that the system chooses: a firewall must let them, and the "
                         "node's own name must not be that of its loopback (GLOO_SOCKET_IFNAME names an interface)"
                         ) from error
        if not bool((numbers == count * (count + 1) // 2).all()):
            raise Failed("a sum over all nodes came out wrong", "exclude the node and have its network looked at")
        self._flow = group
        return Passed(f"a sum over {count} nodes came out right")

    def bandwidth(self) -> Passed:
        """How fast the nodes add up numbers: over NCCL and one device a node, or over gloo. On a node alone how fast a
        device copies."""
        if self.node.alone:
            if self._devices != "ok":
                raise Skipped("one node alone")
            return self._copy()
        flows = self._met().exchange("flow", self._flow is not None, AGREE_SHARE)
        if not all(flows.values()):
            raise Skipped("data does not flow between all nodes")
        if "ok" not in self._devices_of.values():
            return self._judged("gloo", CPU_BYTES, self._sum_over_gloo())
        broken = [node for node, state in self._devices_of.items() if state != "ok"]
        if broken:
            raise Skipped(f"devices do not answer on {', '.join(broken)}")
        return self._judged("NCCL", CUDA_BYTES, self._sum_over_nccl())

    def _sum_over_gloo(self) -> Callable[[], None]:
        import torch

        numbers = torch.zeros(CPU_BYTES // 4)
        return lambda: self._flow.allreduce([numbers]).wait()

    def _sum_over_nccl(self) -> Callable[[], None]:
        import torch
        import torch.distributed as dist

        # Where this hangs the whole process is ended from outside.
        torch.cuda.set_device(0)
        dist.init_process_group("nccl", store=dist.PrefixStore("nccl", self._met().store), rank=self.node.number,
                                world_size=len(self.node.names), timeout=timedelta(seconds=self._limit.left(1)))
        numbers = torch.zeros(CUDA_BYTES // 4, device="cuda")

        def add() -> None:
            dist.all_reduce(numbers)
            torch.cuda.synchronize()

        return add

    def _copy(self) -> Passed:
        import torch

        target = f"cuda:{1 if self._gpus > 1 else 0}"
        source = torch.zeros(CUDA_BYTES // 4, device="cuda:0")
        copied = torch.empty_like(source, device=target)

        def copy() -> None:
            copied.copy_(source)
            torch.cuda.synchronize(0)
            torch.cuda.synchronize(target)

        speed = CUDA_BYTES / _best_seconds(copy) / 1e9
        return Passed(f"{speed:.1f} GB/s from device 0 to {'another' if self._gpus > 1 else 'itself'}",
                      {"copy_gigabytes_per_second": round(speed, 3)})

    def _judged(self, library: str, size: int, add: Callable[[], None]) -> Passed:
        count = len(self.node.names)
        # What a link carries in either direction, whatever the number of nodes.
        speed = size / _best_seconds(add) / 1e9 * 2 * (count - 1) / count
        words = f"{speed:.2f} GB/s over each node's link, {library} summing {size >> 20} MiB over {count} nodes"
        if speed < self._minimum_bandwidth:
            raise Failed(f"{words}, less than {self._minimum_bandwidth:g}", "see whether the fast network is used "
                         "(NCCL_DEBUG=INFO) and sound; minimum_bandwidth of the cluster file is the bound")
        return Passed(words, {"sum_gigabytes_per_second": round(speed, 3)})

    def _met(self) -> Meeting:
        if self.node.alone:
            raise Skipped("one node alone")
        if self._meeting is None:
            raise Skipped("the nodes did not meet")
        self._meeting.check_complete()
        return self._meeting


def _best_seconds(action: Callable[[], None]) -> float:
    """Shortest of a few rounds, after one that opens connections."""
    action()
    taken = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        action()
        taken.append(time.perf_counter() - begin)
    return min(taken)


def software() -> dict[str, str]:
    """What of this node should be as on the others, with its version."""
    import torch

    return {"grn_scale": __version__, "torch": torch.__version__, "driver": driver_version() or "none"}


def _words(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def checks(options: argparse.Namespace) -> Iterator[tuple[str, Check]]:
    """Those of the node that this process runs on."""
    address = os.environ.get("MASTER_ADDR", "")
    where = f"{address}:{os.environ.get('MASTER_PORT', '0')}" if address else ""
    return Network(Node.of_step(), where, Limit(options.seconds), Path(options.records), gpus=options.gpus_per_node,
                   minimum_bandwidth=options.minimum_bandwidth).checks()


def main(argv: list[str]) -> int:
    return tell_checks(argv, checks)


if __name__ == "__main__":
    code = run(main)
    sys.stderr.flush()
    os._exit(code)  # threads of gloo and NCCL may wait for nodes that have gone
