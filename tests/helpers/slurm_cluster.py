"""A real Slurm cluster on this machine: two nodes and a spare one, a munge of its own, a folder that goes with it.

Each node has 8 CPUs, whatever the machine has, and 2 GPUs that are mere device files: Slurm hands them out
(CUDA_VISIBLE_DEVICES), and nothing computes on them. The partition `main` is the default one (at most an hour, ten
minutes unless a job asks for more); jobs in `urgent` preempt those of others, which are requeued; `wide` has the spare
node, too.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

NODES = ("node1", "node2", "node3")
GPUS, CPUS = 2, 8
PACKAGES = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge"}
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])
ENDED = frozenset({"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
                   "PREEMPTED", "TIMEOUT"})

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
AuthType=auth/munge
# A requeued job starts when the credential of its last start has expired: 120 seconds by default. Until then the end of
# that start may still come, and would be taken for the end of the next one.
AuthInfo=socket={folder}/munge.socket,cred_expire=10
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
EnforcePartLimits=ALL
JobRequeue=1
KillWait=5
MinJobAge=3600
# Patience, for the tests may keep each core busy.
BatchStartTimeout=60
MessageTimeout=60
TCPTimeout=10
ReturnToService=2
GresTypes=gpu
NodeName=DEFAULT CPUs={cpus} RealMemory=4000 Gres=gpu:{gpus}
{nodes}
PartitionName=DEFAULT Nodes=node1,node2 DefaultTime=10 MaxTime=60 State=UP PriorityTier=1 GraceTime=10
PartitionName=main Default=YES
PartitionName=wide Nodes=ALL
PartitionName=urgent PriorityTier=2 PreemptMode=OFF
"""


def missing() -> str:
    """What this machine lacks for a cluster, for a person; empty where it lacks nothing."""
    packages = [package for program, package in PACKAGES.items() if not shutil.which(program, path=PATH)]
    lacks = [f"the packages {' '.join(packages)} (Debian: apt-get install slurm-wlm munge)"] if packages else []
    with tempfile.TemporaryDirectory() as folder:
        try:
            make_device(Path(folder) / "gpu0")
        except PermissionError:
            lacks.append("root with the right to mknod: it starts the daemons and makes the GPUs' device files")
    return "; ".join(lacks)


def make_device(path: Path) -> None:
    """A character device, as a GPU's is: that of /dev/null."""
    os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))


class SlurmCluster:
    """`with SlurmCluster() as cluster:` has it running with all nodes idle; jobs and daemons end with the block.

    Neither the machine's own Slurm nor its munge is read, used or changed. Raises AssertionError with the ends of the
    daemons' logs where it does not come up within a minute.
    """

    folder: Path
    environment: Mapping[str, str]
    """Of a process that talks to this cluster: PATH, SLURM_CONF, and none of the variables of a job that runs us."""

    def __enter__(self) -> SlurmCluster:
        # A short path, for a socket's may have 107 characters; and open to all, which munged wants to see.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.folder.chmod(0o755)
        family = Path(__file__).with_name("process_family.py")
        foreign = ("SLURM", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SCANCEL_", "SINFO_")
        self.environment = {**{name: value for name, value in os.environ.items() if not name.startswith(foreign)},
                            "PATH": PATH, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self._family = subprocess.Popen([sys.executable, family, self.folder], text=True, stdin=subprocess.PIPE,
                                        env=self.environment, start_new_session=True)
        try:
            self._configure()
            self._start()
        except BaseException:  # also Ctrl-C: no daemon may stay; it is raised again
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._family.stdin.close()
        self._family.wait(timeout=60)

    def _configure(self) -> None:
        ports = free_ports(1 + len(NODES))
        host = socket.gethostname().split(".")[0]
        nodes = "\n".join(f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port}"
                          for node, port in zip(NODES, ports[1:]))
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(
            folder=self.folder, host=host, controller_port=ports[0], nodes=nodes, gpus=GPUS, cpus=CPUS))
        lines = []
        for node in NODES:
            (self.folder / f"devices-{node}").mkdir()
            for gpu in range(GPUS):
                make_device(self.folder / f"devices-{node}/gpu{gpu}")
            lines.append(f"NodeName={node} Name=gpu File={self.folder}/devices-{node}/gpu[0-{GPUS - 1}]\n")
        (self.folder / "gres.conf").write_text("".join(lines))
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))

    def _start(self) -> None:
        munge = {name: self.folder / f"munge.{name}" for name in ("key", "pid", "seed", "socket")}
        self._daemon("munged", "munged", "--foreground", "--num-threads=2",
                     *(f"--{name}{'' if name == 'socket' else '-file'}={path}" for name, path in munge.items()))
        self._until(munge["socket"].exists, 20, "munged does not listen")
        self._daemon("slurmctld", "slurmctld", "-D")
        for node in NODES:
            self._daemon(f"slurmd-{node}", "slurmd", "-D", "-N", node)
        self._until(lambda: self._node_states() == ["idle"] * len(NODES), 60, "the nodes do not come up")

    def _daemon(self, name: str, program: str, *options: str) -> None:
        arguments, output = [shutil.which(program, path=PATH), *options], self.folder / f"{name}.out"
        print(json.dumps({"arguments": arguments, "output": str(output)}), file=self._family.stdin, flush=True)

    def _node_states(self) -> list[str]:
        done = self.run("sinfo", "--noheader", "--Node", "--partition=wide", "--format=%T", expect=None)
        return done.stdout.split()

    def _until(self, reached: Callable[[], bool], timeout: float, complaint: str) -> None:
        end = time.monotonic() + timeout
        while not reached():
            assert time.monotonic() < end, f"{complaint} after {timeout:g} s\n{self.log()}"
            time.sleep(0.1)

    def run(self, *command: str | Path, expect: int | None = 0, timeout: float = 60,
            **more) -> subprocess.CompletedProcess[str]:
        """Run a command against this cluster and return its text output.

        AssertionError with that output where its exit code is not `expect` (None: any will do). `more` goes to
        subprocess.run.
        """
        done = subprocess.run(command, **{"env": self.environment, "capture_output": True, "text": True,
                                          "timeout": timeout, **more})
        assert expect is None or done.returncode == expect, (
            f"{' '.join(map(str, command))}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def submit(self, script: str, *options: str | Path) -> str:
        """Give sbatch a bash script (its text, without #!) and options; returns the job's id."""
        return self.run("sbatch", "--parsable", *options, input=f"#!/bin/bash\n{script}\n").stdout.strip()

    def state(self, job: str) -> str:
        """`RUNNING`, `COMPLETED`, ...; of an array `12` those of its elements, each once: `COMPLETED,RUNNING`."""
        return ",".join(sorted(set(self._ask(job, "%T"))))

    def wait(self, job: str, states: str | Collection[str] = ENDED, timeout: float = 60) -> str:
        """Wait until the job, or each element of an array, is in one of `states`; returns the state then.

        AssertionError with what Slurm knows of the job and the daemons' logs after `timeout` seconds.
        """
        wanted = {states} if isinstance(states, str) else set(states)
        end = time.monotonic() + timeout
        while not set((state := self.state(job)).split(",")) <= wanted:
            if time.monotonic() > end:
                shown = self.run("scontrol", "show", "job", job, expect=None)
                raise AssertionError(f"job {job} is {state} after {timeout:g} s, not {' or '.join(sorted(wanted))}\n"
                                     f"{shown.stdout}{shown.stderr}\n{self.log()}")
            time.sleep(0.1)
        return state

    def _ask(self, job: str, what: str) -> list[str]:
        """What squeue says of a job, in its format; of an array a line for each element."""
        options = ("--noheader", "--array", "--states=all", f"--jobs={job}", f"--format={what}")
        return self.run("squeue", *options).stdout.splitlines()

    def kill_node_tasks(self, job: str, node: str) -> int:
        """SIGKILL to each process of the job's srun tasks on `node`, as where a machine dies; returns how many it hit.

        The batch shell and Slurm's own daemons of the job live on.
        """
        wanted = {f"SLURM_JOB_ID={self._ask(job, '%A')[0]}", f"SLURMD_NODENAME={node}",
                  f"SLURM_CONF={self.environment['SLURM_CONF']}"}
        hit = 0
        for process in Path("/proc").glob("[0-9]*"):
            try:
                environment = set((process / "environ").read_bytes().decode(errors="replace").split("\0"))
                if wanted <= environment and any(line.startswith("SLURM_STEP_ID=") for line in environment):
                    os.kill(int(process.name), signal.SIGKILL)
                    hit += 1
            except (FileNotFoundError, PermissionError, ProcessLookupError):
                continue  # ended since the listing, or another's
        return hit

    def log(self, lines: int = 30) -> str:
        """The last lines of each daemon's log, for a test that fails."""
        parts = []
        for path in sorted(self.folder.glob("*.out")):
            path = path.with_suffix(".log") if path.with_suffix(".log").exists() else path
            parts.append(f"== {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-lines:]))
        return "\n".join(parts)


def free_ports(count: int) -> list[int]:
    """Different TCP ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
