"""Checks of what this node alone reads and writes: space, dataset, checkpoints."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from grn_scale.command_line import run
from grn_scale.errors import ConfigError
from grn_scale.slurm.preflight_check import Check, Failed, Node, Passed, Skipped, tell_checks

if TYPE_CHECKING:
    from grn_scale.config.schema import Config
    from grn_scale.data.dataset import Dataset

GIB = 2**30
LEAST_FREE = GIB
"""Where a run writes no checkpoints, and in the temporary folder."""


class Files:
    """The checks of one node."""

    def __init__(self, config_file: Path, node: Node):
        self._config_file, self._node = config_file, node
        self._config: Config | None = None
        self._kind = ""

    def checks(self) -> Iterator[tuple[str, Check]]:
        """All, in order."""
        yield "settings", self.settings
        yield "disk", self.disk
        yield "temporary", self.temporary
        yield "dataset", self.dataset
        yield "checkpoint", self.checkpoint

    def settings(self) -> Passed:
        """The configuration of the job can be read; beside it stands what kind of job it is."""
        from grn_scale.config.class_schema import SCHEMAS
        from grn_scale.config.load import load_config
        from grn_scale.slurm.records import SUBMISSION, Submission

        try:
            config = load_config(self._config_file, cls=SCHEMAS)
        except ConfigError as error:
            if isinstance(error.__cause__, OSError):
                raise
            # no fault of the node: the command refuses it in its own words, and the job is stopped for good
            raise Skipped(f"the command will refuse it: {error}") from error
        submitted = self._config_file.with_name(SUBMISSION).exists()
        self._kind = Submission.read(self._config_file.parent).kind if submitted else "train"
        self._config = config
        return Passed(f"{self._config_file} ({self._kind})")

    def disk(self) -> Passed:
        """The output folder can be written to and holds the checkpoints to come."""
        config = self._settings()
        if "://" in config.output:
            raise Skipped(f"{config.output} is no file system")
        folder = Path(config.output)
        folder.mkdir(parents=True, exist_ok=True)
        self._write_in(folder)
        needed, why = LEAST_FREE, ""
        if self._kind == "train":
            size, count = checkpoint_bytes(config), checkpoints_to_come(config)
            needed, why = size * count, f" for {count} more checkpoint{'s' * (count > 1)} of {_gib(size)}"
        return _enough(folder, needed, why, "free space, lower train.keep_last, or give another output folder")

    def temporary(self) -> Passed:
        """The folder for temporary files is there and has some space."""
        folder = Path(os.environ.get("TMPDIR") or tempfile.gettempdir())
        if not folder.is_dir():
            raise Failed(f"TMPDIR is {folder}, but there is no such folder",
                         "correct `scratch` in the cluster file, or have the folder made on this node")
        self._write_in(folder)
        return _enough(folder, LEAST_FREE, "", "clean it up, or name another one as `scratch` in the cluster file")

    def dataset(self) -> Passed:
        """A sample of each dataset, of another shard on each node, is what its index says."""
        from grn_scale.data.dataset import Dataset

        config = self._settings()
        if not (config.data.dataset or config.data.mixture):
            raise Skipped("no dataset is configured")
        return Passed("; ".join(self._read_sample(Dataset.open(part.dataset, check_files=False))
                                for part in config.data.parts))

    def _read_sample(self, dataset: Dataset) -> str:
        shards = [i for i, samples in enumerate(dataset.shard_sizes) if samples]
        if not shards:
            return f"{dataset.storage.location} has no samples"
        shard = shards[self._node.number % len(shards)]
        name = dataset.info.video_shards[shard].name
        try:
            dataset.read_bits(dataset.rows(shard)[0])
        except OSError as error:
            raise Failed(f"{dataset.storage / name} cannot be read: {error.strerror or error}",
                         "see whether the dataset's storage is mounted and reachable on this node") from error
        return f"read a sample of {dataset.storage / name}"

    def checkpoint(self) -> Passed:
        """What the run goes on or starts from can be seen."""
        from grn_scale.checkpoint.layout import scan
        from grn_scale.checkpoint.origin import check_origin

        config = self._settings()
        if self._kind != "train":
            raise Skipped(f"{self._kind} writes none")
        sealed = [found for found in scan(Path(config.output)) if found.sealed]
        whole = [found for found in sealed if not found.problem]
        if sealed and not whole:
            raise Failed(f"{sealed[0].path}: {sealed[0].problem}", "see whether other nodes can read it; else remove "
                         "it, or give a new output folder")
        if whole:
            return Passed(f"goes on from {whole[0].path}")
        if config.init.from_:
            check_origin(config.init.from_, config.init.weights)
            return Passed(f"starts from {config.init.from_}")
        return Passed("the run begins")

    def _write_in(self, folder: Path) -> None:
        path = folder / f".preflight-{self._node.name}-{os.getpid()}"
        try:
            with path.open("xb") as file:
                file.write(b"preflight\n")
                file.flush()
                os.fsync(file.fileno())
        finally:
            path.unlink(missing_ok=True)

    def _settings(self) -> Config:
        if self._config is None:
            raise Skipped("the configuration cannot be read")
        return self._config


def checkpoint_bytes(config: Config) -> int:
    """Size of a checkpoint: fp32 masters, with AdamW two moments, and the moving average where one is kept."""
    import torch

    from grn_scale.config.schema import ModelConfig

    if isinstance(config.model, ModelConfig):
        from grn_scale.model import GRN as Model
    else:
        from grn_scale.class_to_image.model import ClassGRN as Model
    with torch.device("meta"):
        model = Model(config.model)
    copies = 1 + 2 * (config.optimizer.name == "adamw") + (config.optimizer.ema_decay > 0)
    return 4 * copies * sum(parameter.numel() for parameter in model.parameters())


def checkpoints_to_come(config: Config) -> int:
    """How many take up space that is free now: an old one goes when the new one is there."""
    from grn_scale.checkpoint.layout import scan

    there = sum(found.sealed for found in scan(Path(config.output)))
    return max(1, config.train.keep_last + 1 - there)


def _enough(folder: Path, needed: int, why: str, remedy: str) -> Passed:
    free = shutil.disk_usage(folder).free
    words = f"{_gib(free)} free in {folder}, needed are {_gib(needed)}{why}"
    if free < needed:
        raise Failed(words, remedy)
    return Passed(words, {"free_bytes": free})


def _gib(size: int) -> str:
    return f"{size / GIB:,.1f} GiB"


def checks(options: argparse.Namespace) -> Iterator[tuple[str, Check]]:
    """Those of the node that this process runs on."""
    return Files(Path(options.config), Node.of_step()).checks()


def main(argv: list[str]) -> int:
    return tell_checks(argv, checks)


if __name__ == "__main__":
    code = run(main)
    sys.stderr.flush()
    os._exit(code)  # nothing that a client of remote storage still does is waited for
