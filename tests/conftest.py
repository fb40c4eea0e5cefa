"""Settings that must stand before torch and DeepSpeed are imported, here and in the processes that tests start."""

import os
from pathlib import Path

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // 2)))


def pytest_addoption(parser):
    group = parser.getgroup("parity", "layout invariance (tests/distributed/test_parity.py)")
    group.addoption("--parity-seed", type=int, default=3, help="seed of weights, samples and noise")
    group.addoption("--parity-shape", default="", metavar="hidden=..,layers=..,heads=..", help="another tiny model")
    group.addoption("--parity-record", default="", metavar="FILE",
                    help="add a JSON line for each layout that holds, and leave out those that are there")
    parser.addoption("--write-golden", action="store_true",
                     help="write tests/golden/slurm anew, to be looked at before it is committed")
