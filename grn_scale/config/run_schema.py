"""The sections about how a training run begins and looks after itself: its first weights, when it stops, what it does
about loss spikes and hangs."""

from __future__ import annotations

from dataclasses import dataclass

from grn_scale.config.rules import require, require_choice, require_positive


@dataclass(frozen=True)
class InitConfig:
    """The weights a run starts from. Optimizer, schedule, step and data begin anew; the moving average begins with
    the weights taken. A run that is resumed goes on from its checkpoint and does not look here."""

    from_: str = ""
    """A run folder (its newest complete checkpoint), a step folder, or what `grn-scale convert --to native` wrote.
    Empty: weights drawn from the seed. Written init.from."""
    weights: str = "raw"
    """raw: as they were trained; ema: their moving average."""
    partial: bool = False
    """Take what is there with the same shape, name every other tensor and each difference of the models, and go on;
    otherwise a difference refuses the start."""

    def __post_init__(self) -> None:
        require_choice("init.weights", self.weights, ("raw", "ema"))
        require(bool(self.from_) or not self.partial,
                "init.partial is true, but init.from names nothing to take a part of: set both, or none")


@dataclass(frozen=True)
class ProfileConfig:
    """A few steps whose operations and kernels are recorded into the run folder (trace-FIRST-LAST.json.gz, for
    Perfetto or chrome://tracing), as the first process sees them. Recording slows these steps."""

    start: int = 10
    """First step that is recorded, counted from 1 as in metrics.jsonl. Steps before the start of a resumed run are not
    there to be recorded."""
    steps: int = 0
    """How many; 0 records none. What is recorded stays in memory until the last of them is done."""

    def __post_init__(self) -> None:
        require(self.start >= 1, f"profile.start is {self.start}, but steps are counted from 1")
        require(self.steps >= 0, f"profile.steps is {self.steps}, but must not be negative (0 records none)")


@dataclass(frozen=True)
class StopConfig:
    """When a run saves and ends (exit 75) before train.steps are done. SIGTERM and SIGUSR2 always ask for it."""

    time_limit_minutes: float = 0.0
    """From the start of the process; 0 is none. Under Slurm the end of the job counts as well."""
    margin_seconds: float = 120.0
    """Kept free before the end at least; more where steps, saves and validations have taken longer so far."""

    def __post_init__(self) -> None:
        require(self.time_limit_minutes >= 0,
                f"stop.time_limit_minutes is {self.time_limit_minutes}, but must not be negative")
        require(self.margin_seconds >= 0, f"stop.margin_seconds is {self.margin_seconds}, but must not be negative")
        require(not self.time_limit_minutes or self.time_limit_minutes * 60 > self.margin_seconds,
                f"stop.time_limit_minutes is {self.time_limit_minutes}, which stop.margin_seconds="
                f"{self.margin_seconds} uses up: raise the limit, or lower the margin")


@dataclass(frozen=True)
class SpikesConfig:
    """Loss spikes: the run goes back to a checkpoint from before the loss rose, and leaves out the data it has read
    since."""

    enabled: bool = True
    window: int = 64
    """Finite losses before, whose median and spread a loss is held against; nothing is judged until there are so many.
    """
    threshold: float = 10.0
    """Robust standard deviations (1.4826 x median absolute deviation) above the median from which a loss is suspicious.
    """
    patience: int = 3
    """Suspicious steps in a row that make a spike. Meanwhile nothing is saved."""
    limit: int = 3
    """Spikes that a run may have, over all its starts; at one more it stops (exit 78)."""

    def __post_init__(self) -> None:
        require_positive("spikes", threshold=self.threshold, patience=self.patience)
        require(self.window >= 8, f"spikes.window is {self.window}, but a median absolute deviation of fewer than 8 "
                "losses says nothing: set at least 8")
        require(self.limit >= 0, f"spikes.limit is {self.limit}, but must not be negative")


@dataclass(frozen=True)
class WatchdogConfig:
    """How long each phase of a run may last on any process until all dump their stacks and end (exit 79); 0 is no
    limit."""

    start_seconds: float = 1800.0
    """From the process group to the first batch: plan, model, checkpoint. Also for going back to a checkpoint."""
    first_step_seconds: float = 1800.0
    """Connections are made and kernels compiled in it."""
    step_seconds: float = 600.0
    """Every later step, and the wait for its data."""
    validate_seconds: float = 1800.0
    save_seconds: float = 1800.0
    """Also for the end of the run, when the last checkpoint is written."""
    heartbeat_seconds: float = 60.0
    """A process that gives no sign of life for so long is taken for dead."""
    straggler_every: int = 50
    """Steps between comparisons of the processes' times; 0 never compares."""
    straggler_ratio: float = 1.3
    """A copy of the model, or a process in what it does alone, is named as slow when it takes so many times the median
    in three comparisons in a row."""

    def __post_init__(self) -> None:
        for name in ("start_seconds", "first_step_seconds", "step_seconds", "validate_seconds", "save_seconds",
                     "straggler_every"):
            value = getattr(self, name)
            require(value >= 0, f"watchdog.{name} is {value}, but must not be negative (0 turns it off)")
        require(self.heartbeat_seconds == 0 or self.heartbeat_seconds >= 10,
                f"watchdog.heartbeat_seconds is {self.heartbeat_seconds}, but processes give a sign of life every two "
                "seconds at best: set at least 10, or 0 to take no process for dead")
        require(self.straggler_ratio > 1, f"watchdog.straggler_ratio is {self.straggler_ratio}, but must be above 1")
