"""Workers and whole jobs killed at random moments: what is there in the end is what an undisturbed run makes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grn_scale.data.dataset import Dataset
from grn_scale.data_pipeline import verify
from tests.helpers.clips import caption, write_clip
from tests.helpers.tokenize_setup import TokenizeSetup, content

CHUNK = 8


def prepare(root: Path, clips: int) -> TokenizeSetup:
    """Clips of two shapes and two lengths, some of them broken, some lines twice."""
    setup = TokenizeSetup(root, clips=0)
    for i in range(clips):
        write_clip(root / f"clips/{i}.mp4", i, frames=25 if i % 5 == 1 else 9, width=64 if i % 3 == 2 else 32)
        if i % 20 == 13:
            path = root / f"clips/{i}.mp4"
            path.write_bytes(path.read_bytes()[:700])
    setup.lines = [{"path": f"clips/{i if i % 17 else 0}.mp4", "caption": caption(i)} for i in range(clips)]
    return setup


def start(setup: TokenizeSetup, output: str, workers: int) -> subprocess.Popen:
    arguments = setup.arguments(output, **settings(workers))
    return subprocess.Popen([sys.executable, "-m", "grn_scale", "tokenize", *arguments], stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL, start_new_session=True,
                            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})


def settings(workers: int) -> dict[str, object]:
    return {"tokenize.workers": workers, "tokenize.shard_samples": CHUNK, "tokenize.max_bad_fraction": 0.2,
            "tokenize.lease_seconds": 10, "tokenize.max_frames": 25}


def children(pid: int) -> list[int]:
    """Processes started by `pid`, and those started by them."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(child) for child in task.read_text().split()]
        except OSError:
            continue
    return found + [grandchild for child in found for grandchild in children(child)]


def kill_something(job: subprocess.Popen, draw: random.Random) -> str:
    """Kill the process group, or one of its processes below the first."""
    if draw.random() < 0.4:
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
        return "group"
    victims = children(job.pid)
    if not victims:
        return "nothing"
    victim = draw.choice(victims)
    try:
        os.kill(victim, signal.SIGKILL)
    except ProcessLookupError:
        return "nothing"
    return "one"


def storm(setup: TokenizeSetup, wanted: dict[str, bytes], kills: int, seed: int) -> dict[str, int]:
    """Kill `kills` times, over as many runs as that takes, each compared with `wanted`; what was killed how often."""
    draw = random.Random(seed)
    done = {"group": 0, "one": 0, "runs": 0, "starts": 0}
    while done["group"] + done["one"] < kills:
        output = f"storm-{seed}-{done['runs']}"
        finished = False
        while not finished:
            job = start(setup, output, workers=draw.randint(1, 3))
            done["starts"] += 1
            while job.poll() is None:
                pause = time.monotonic() + draw.uniform(0.2, 9)
                while job.poll() is None and time.monotonic() < pause:
                    time.sleep(0.02)
                if job.poll() is None and done["group"] + done["one"] < kills:
                    kind = kill_something(job, draw)
                    done[kind] = done.get(kind, 0) + 1
            # A single worker is the job itself; of several one that dies again and again ends it. All start again.
            finished = job.returncode == 0
            assert job.returncode in (0, 1, -signal.SIGKILL)
        done["runs"] += 1
        assert content(setup.root / output) == wanted
    return done


def check(root: Path, clips: int, kills: int, seed: int) -> dict[str, int]:
    setup = prepare(root, clips)
    undisturbed = setup.run("undisturbed", **settings(1))
    assert not list(verify.find_damage(undisturbed))
    assert Dataset.open(undisturbed).info.samples > clips * 0.8
    return storm(setup, content(undisturbed), kills, seed)


def test_a_few_kills_change_nothing(tmp_path):
    check(tmp_path, clips=16, kills=2, seed=0)


@pytest.mark.slow
def test_fifty_kills_change_nothing(tmp_path, capsys):
    done = check(tmp_path, clips=200, kills=50, seed=1)
    with capsys.disabled():
        print(f"\n{done}")
