"""One process of a job, as srun starts it: its output goes to a file of its own, and its exit code stays behind.

    srun python -m grn_scale.slurm.task --rank-logs FOLDER -- train --config config.yaml
    srun --ntasks-per-node=1 python -m grn_scale.slurm.task --torchrun 8 --rank-logs FOLDER -- train --config ...

With --torchrun it becomes the torchrun of a node, which starts this program again for each process.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from pathlib import Path

from grn_scale.atomic import write_json
from grn_scale.cli import dispatch
from grn_scale.command_line import run
from grn_scale.errors import EXIT_FAILED, EXIT_REQUEUE
from grn_scale.parallel.dims import adopt_srun
from grn_scale.slurm.records import VERSIONS, versions

TORCHELASTIC = "TORCHELASTIC_RUN_ID"
"""Set by torchrun."""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m grn_scale.slurm.task")
    parser.add_argument("--torchrun", type=int, default=0, metavar="N", help="start N processes on this node")
    # torchrun takes an option that begins as its own do, such as --logs, for one of its own
    parser.add_argument("--rank-logs", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("command", nargs="+", help="arguments of grn-scale")
    options = parser.parse_args(argv)
    if options.torchrun:
        become_torchrun(options.torchrun, options.rank_logs, options.command)
    if options.command[0] in ("train", "evaluate"):
        adopt_srun()
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    write_into(options.rank_logs / f"rank-{rank:05d}.log")
    if TORCHELASTIC in os.environ:
        signal.signal(signal.SIGUSR2, lambda *_: end_at_once(options.rank_logs, rank))
    if rank == 0:
        write_json(options.rank_logs / VERSIONS, versions())
    code = EXIT_FAILED  # of an error that leaves a traceback
    try:
        code = run(dispatch, options.command)
    finally:
        if code or rank == 0:  # srun would say 0 of a node that fails, too
            leave_code(options.rank_logs, rank, code)
    return code


def leave_code(logs: Path, rank: int, code: int) -> None:
    """Leave the exit code of this process behind for the job's script."""
    (logs / f"exit-{code}").write_text(f"rank {rank} on {socket.gethostname()}\n", encoding="utf-8")


def end_at_once(logs: Path, rank: int) -> None:
    """What a request to stop does until training can save: under torchrun, which ignores the signal and hands that on,
    it would be lost."""
    leave_code(logs, rank, EXIT_REQUEUE)
    os._exit(EXIT_REQUEUE)


def become_torchrun(processes: int, logs: Path, command: list[str]) -> None:
    """Replace this process. The signal to save is for the training processes: torchrun would end of it."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    launcher = ["-m", "torch.distributed.run", f"--nnodes={os.environ['SLURM_STEP_NUM_NODES']}",
                f"--node-rank={os.environ['SLURM_NODEID']}", f"--nproc-per-node={processes}",
                f"--master-addr={os.environ['MASTER_ADDR']}", f"--master-port={os.environ['MASTER_PORT']}"]
    os.execv(sys.executable, [sys.executable, *launcher, "-m", __spec__.name, "--rank-logs", str(logs), "--", *command])


def write_into(path: Path) -> None:
    """Send stdout and stderr of this process and its children to the end of a file."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
