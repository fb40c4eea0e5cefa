"""What a Slurm site is like: one YAML file for each (configs/clusters/), so that a job says only what is its own."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from grn_scale.config.load import build, read_mapping, shipped_file
from grn_scale.config.rules import require, require_choice, require_positive
from grn_scale.errors import ConfigError

TIME = re.compile(r"\d+|(\d+-)?\d+(:\d+){0,2}")
"""Slurm's forms: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS."""
OPTION = re.compile(r"(--)?[a-z][a-z0-9-]+(=[^\n\0]*)?")
OPTION_FORM = "long options such as reservation=NAME or --reservation=NAME"
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_WORD = re.compile(r"[A-Za-z0-9_.,:@+/=-]*")
"""What Slurm's own names and a list of them are made of: nothing in it means anything to a shell."""
_EXPANDED = re.compile(r"\$(\w|\{)|^~")


def _require_written_out(key: str, value: str) -> None:
    require(_EXPANDED.search(value) is None,
            f"{key} is {value!r}, but nothing is expanded in a cluster file: write out what $NAME or ~ stands for")


@dataclass(frozen=True)
class Container:
    """How processes get their root file system."""

    runtime: str = "none"
    """none: the nodes' own; pyxis: srun's plugin for enroot; apptainer: a program that srun starts."""
    image: str = ""
    """pyxis: /path/of/file.sqsh or registry#image:tag; apptainer: file.sif or docker://..."""
    mounts: tuple[str, ...] = ()
    """SOURCE or SOURCE:TARGET, beside the run folder, the working directory and the folders the job reads."""
    start_seconds: int = 300
    """How long a node may take to fetch and unpack the image: so much longer the preflight waits for it."""
    python: str = "python3"
    """Interpreter inside the image, with grn_scale's requirements installed."""

    def __post_init__(self) -> None:
        require_choice("container.runtime", self.runtime, ("none", "pyxis", "apptainer"))
        require(self.runtime == "none" or bool(self.image),
                f"container.image is empty, but container.runtime is {self.runtime}: name an image, or take none")
        require(self.runtime != "pyxis" or not self.image.endswith(".sqsh") or self.image.startswith(("/", "./")),
                f"container.image is {self.image}, which pyxis takes for the name of an image in a registry: give the "
                "file's whole path")
        _require_written_out("container.image", self.image)
        require(self.start_seconds >= 0,
                f"container.start_seconds is {self.start_seconds}, but must not be negative")
        for mount in self.mounts:
            require("," not in mount and "\n" not in mount,
                    f"container.mounts holds {mount!r}: commas and line breaks cannot be mounted; give other paths")
            _require_written_out("container.mounts", mount)


@dataclass(frozen=True)
class Cluster:
    """Facts of a site that all its jobs share."""

    name: str
    partition: str = ""
    """Empty: the site's default."""
    account: str = ""
    qos: str = ""
    time_limit: str = ""
    """Longest time a job may ask for, and what it asks for without --time; empty: the partition's own."""
    gpus_per_node: int = 0
    gpu: str = ""
    """What `grn-scale plan` takes the GPUs for: a name of configs/hardware/, such as H100. Slurm is not told."""
    price_per_gpu_hour: float = 0.0
    """What an hour of one GPU costs, in any currency, for `grn-scale plan`; 0: not known."""
    network_gbits: float = 0.0
    """Gbit/s that the nodes' network has for each GPU in one direction, for `grn-scale plan`; 0: what is usual for the
    GPU (configs/hardware/)."""
    processes_per_node: int = 0
    """Of nodes without GPUs; else there is one for each GPU."""
    gpu_option: str = "gpus-per-node"
    """How GPUs are asked for: gpus-per-node or gres (--gres=gpu:N); none where whole nodes are given out with them."""
    cpus_per_process: int = 0
    """0: not asked for."""
    memory: str = ""
    """--mem of a node, such as 0 (all of it) or 900G; empty: not asked for."""
    exclusive: bool = False
    constraint: str = ""
    gres_type: str = ""
    """Slurm's name of the kind of GPU, such as a100, where a site asks for it; empty: any."""
    sbatch_options: tuple[str, ...] = ()
    """Further options of each job: reservation=NAME, exclude=NODES, mail-type=END, ..."""
    srun_options: tuple[str, ...] = ()
    """Further options of each srun: mpi=pmix, network=..."""
    signal_seconds: int = 300
    """How long before its end a job is told to save and stop."""
    requeue: bool = True
    """Whether the site lets jobs go back into the queue. Where not, long runs are submitted with --chain."""
    modules: tuple[str, ...] = ()
    """What `module load` gets, in order."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of all processes: interconnect, NCCL, proxies."""
    scratch: str = ""
    """Folder of fast local storage that every node has, as TMPDIR of the processes."""
    preflight: bool = True
    """Whether the nodes of a training or evaluation are looked at before it starts."""
    minimum_bandwidth: float = 0.0
    """GB/s that an all-reduce between the nodes must reach before training starts; 0: it is only recorded."""
    container: Container = field(default_factory=Container)

    def __post_init__(self) -> None:
        require(bool(self.name), "name is empty: give the cluster one")
        for key in ("partition", "account", "qos", "memory", "constraint", "gres_type"):
            value = getattr(self, key)
            require(_WORD.fullmatch(value) is not None,
                    f"{key} is {value!r}, but Slurm's names have letters, digits and _ . , : @ + / = - only")
        require(not self.time_limit or TIME.fullmatch(self.time_limit) is not None,
                f"time_limit is {self.time_limit!r}, but must be like 90 (minutes), 12:00:00 or 2-00:00:00")
        for key in ("sbatch_options", "srun_options"):
            for option in getattr(self, key):
                require(OPTION.fullmatch(option) is not None, f"{key} holds {option!r}, but must hold {OPTION_FORM}")
        require_choice("gpu_option", self.gpu_option, ("gpus-per-node", "gres", "none"))
        for key in ("gpus_per_node", "processes_per_node", "cpus_per_process"):
            require(getattr(self, key) >= 0, f"{key} is {getattr(self, key)}, but must not be negative")
        require(self.minimum_bandwidth >= 0, "minimum_bandwidth must not be negative")
        require(self.price_per_gpu_hour >= 0,
                f"price_per_gpu_hour is {self.price_per_gpu_hour}, but must not be negative")
        require(self.network_gbits >= 0, f"network_gbits is {self.network_gbits}, but must not be negative")
        require_positive("cluster", signal_seconds=self.signal_seconds)
        require(self.signal_seconds <= 65535, "signal_seconds is above 65535, which Slurm does not take")
        for name, value in self.environment.items():
            require(_VARIABLE.fullmatch(name) is not None, f"environment: {name!r} is no name of a variable")
            require("\n" not in value and "\0" not in value, f"environment.{name} holds a line break; leave it out")
            _require_written_out(f"environment.{name}", value)
        _require_written_out("scratch", self.scratch)

    @property
    def network(self) -> float | None:
        """Bytes a second of a GPU to other nodes, where the file says so."""
        return self.network_gbits / 8 * 1e9 or None

    @classmethod
    def load(cls, path: str | Path) -> Cluster:
        """The cluster that a file describes, also one of configs/clusters/ by its path there. ConfigError, naming file
        and key, where it cannot be read."""
        file = Path(path)
        if not file.exists() and not file.is_absolute() and file.parts[:1] == ("configs",):
            file = shipped_file(str(Path(*file.parts[1:])))
        values = read_mapping(file, "--cluster")
        try:
            return build(cls, {"name": file.stem, **values})
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from error
