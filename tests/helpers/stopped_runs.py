"""Several runs in one process, since starting one takes longer than the runs: `stopped_runs.py DATASET FOLDER`.

FOLDER/a is a run that a signal has stopped before. Prints as JSON what the tests look at.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from grn_scale.cli import main
from tests.helpers.self_care import arguments, rows, steps_done


def signal_at(output: Path, step: int, number: int) -> None:
    """Send this process a signal twice as soon as a run has come to a step."""
    def wait() -> None:
        while steps_done(output) < step:
            time.sleep(0.01)
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)

    threading.Thread(target=wait, daemon=True).start()


def spiking_run(dataset: Path, output: Path) -> tuple[int, int]:
    """Exit code, and how many engines were closed, of a run in which one absurd learning rate wrecks the weights with
    the 16th global batch; its own loss is fine, so they are saved. After the run has gone back from step 19 to 12, the
    29th wrecks them in step 22, too late to tell a spike."""
    from grn_scale.parallel.engine import TrainEngine

    honest, close, batches, closed = TrainEngine.train_step, TrainEngine.close, [], []

    def wrecking(self, micro_batches, rate, *more):
        batches.append(rate)
        return honest(self, micro_batches, 5.0 if len(batches) in (16, 29) else rate, *more)

    def counted(self):
        closed.append(close(self))

    TrainEngine.train_step, TrainEngine.close = wrecking, counted
    try:
        code = main(arguments(dataset, output, "spikes.window=8", "spikes.patience=3", "train.checkpoint_every=4",
                              "train.keep_last=100"))
        return code, len(closed)
    finally:
        TrainEngine.train_step, TrainEngine.close = honest, close


def ledger(dataset: Path, output: Path) -> list[dict]:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main(["verify", str(dataset), "--ledger", str(output / "ledger.jsonl"), "--json"])
    return json.loads(printed.getvalue())["epochs"]


def run(dataset: Path, folder: Path) -> dict:
    a, spiked = folder / "a", folder / "spiked"
    found: dict = {"codes": []}
    signal_at(a, steps_done(a) + 2, signal.SIGUSR2)
    found["codes"].append(main(arguments(dataset, a, "--resume", "must")))
    os.environ["SLURM_JOB_END_TIME"] = str(int(time.time()) + 100)
    found["codes"].append(main(arguments(dataset, a, "--resume", "auto")))
    del os.environ["SLURM_JOB_END_TIME"]
    found["stopped_at"] = sorted(int(path.name[5:]) for path in a.glob("step-*"))
    for output, more in ((a, ["--resume", "must"]), (folder / "undisturbed", [])):
        found["codes"].append(main(arguments(dataset, output, *more)))
    code, found["closed_engines"] = spiking_run(dataset, spiked)
    found["codes"].append(code)
    found["rows"] = {name: rows(folder / name) for name in ("a", "undisturbed", "spiked")}
    found["ledgers"] = {name: ledger(dataset, folder / name) for name in ("a", "spiked")}
    return found


if __name__ == "__main__":
    result = run(Path(sys.argv[1]), Path(sys.argv[2]))
    print(json.dumps(result))
