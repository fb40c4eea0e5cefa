"""Configuration of `grn-scale train-tokenizer`: its own schema, since it shares nothing with pretraining but a seed."""

from __future__ import annotations

from dataclasses import dataclass, field

from grn_scale.config.rules import require, require_choice, require_positive


@dataclass(frozen=True)
class ShapeConfig:
    """Widths of the tokenizer that is trained."""

    dim: int = 16
    """Encoder width before the multipliers."""
    dec_dim: int = 16
    """Decoder width before the multipliers."""
    latent_channels: int = 16
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    residual_blocks: int = 2
    """Per encoder stage; a decoder stage has one more."""
    rounds: int = 4
    """HBQ rounds the decoder is trained behind."""

    def __post_init__(self) -> None:
        require_positive("model", dim=self.dim, dec_dim=self.dec_dim, latent_channels=self.latent_channels,
                         residual_blocks=self.residual_blocks)
        require(len(self.multipliers) == 4 and min(self.multipliers) > 0,
                f"model.multipliers is {list(self.multipliers)}, but stride 16 takes 4 stages: give 4 numbers above 0")
        require(1 <= self.rounds <= 8, f"model.rounds is {self.rounds}, but must lie between 1 and 8")
        for narrow, wide in zip(self.multipliers, self.multipliers[1:]):
            require(wide % narrow == 0 and 8 * narrow % wide == 0,
                    f"model.multipliers go from {narrow} to {wide}, but each must be 1, 2, 4 or 8 times the one before")


@dataclass(frozen=True)
class ClipsConfig:
    """Which clips are read, and what is cut from them. All are decoded once and held in memory as bytes."""

    manifest: str = ""
    """JSONL manifest of the training clips; several with commas between them."""
    shares: tuple[float, ...] = ()
    """Probability that a clip comes from each of the manifests; none: by their number of clips."""
    held_out: str = ""
    """Manifests whose PSNR is measured; none measures nothing."""
    held_out_clips: int = 128
    """Most clips of each of them that are measured (the first ones)."""
    fps: float = 8.0
    frames: int = 9
    """Most frames of a clip (1 + 4k); phases take random windows of it."""
    sides: tuple[int, ...] = (32, 48, 64, 96)
    """Pixels of the shorter side that clips are decoded at, those larger than the source left out."""
    crops: tuple[int, ...] = (32, 64)
    """Sides of the squares that are cut out at random; a batch holds squares of one size."""
    crop_shares: tuple[float, ...] = (0.85, 0.15)
    """Probability of each crop."""
    decode_processes: int = 2
    decode_timeout_seconds: float = 60.0
    memory_megabytes: int = 4096
    """Stop where the decoded clips would take more than this."""

    def __post_init__(self) -> None:
        require_positive("data", fps=self.fps, held_out_clips=self.held_out_clips,
                         decode_processes=self.decode_processes, memory_megabytes=self.memory_megabytes)
        require(not self.shares or len(self.shares) == len(self.manifests) and min(self.shares) > 0,
                f"data.shares are {self.shares}, but must hold a number above 0 for each of the "
                f"{len(self.manifests)} manifests of data.manifest")
        require(self.frames > 0 and self.frames % 4 == 1,
                f"data.frames is {self.frames}, but the tokenizer takes 1 + 4k frames")
        require(bool(self.crops) and all(crop > 0 and crop % 16 == 0 for crop in self.crops),
                f"data.crops are {self.crops}, but each must be a multiple of 16")
        require(bool(self.sides) and min(self.sides) >= min(self.crops),
                f"data.sides are {self.sides}, but none may be smaller than the smallest crop, {min(self.crops)}")
        require(len(self.crop_shares) == len(self.crops) and min(self.crop_shares) > 0,
                f"data.crop_shares are {self.crop_shares}, but must hold a number above 0 for each of data.crops")

    @property
    def manifests(self) -> tuple[str, ...]:
        return split_names(self.manifest)


def split_names(names: str) -> tuple[str, ...]:
    """Names with commas between them, one by one."""
    return tuple(name.strip() for name in names.split(",") if name.strip())


@dataclass(frozen=True)
class PhasesConfig:
    """How long, on what, and how the loss is weighed."""

    phases: tuple[tuple[int, int, int], ...] = ((2500, 1, 16), (3500, 9, 16))
    """(steps, frames, clips a step), one after the other. Single frames are cheap and teach most of what clips need."""
    unquantized_steps: int = 800
    """First steps that decode the features as they are: early latents would drown in the quantiser's error."""
    small_batch_factor: int = 4
    """A batch of crops larger than the smallest holds this many times fewer clips."""
    l1_weight: float = 1.0
    mse_weight: float = 4.0
    validate_every: int = 500
    """Steps between measurements of PSNR; 0 measures at the end alone."""
    checkpoint_every: int = 500
    log_every: int = 50
    threads: int = 0
    """CPU threads; 0 leaves it to torch."""

    def __post_init__(self) -> None:
        require(bool(self.phases), "train.phases is empty, but must hold at least one [steps, frames, clips]")
        for steps, frames, clips in self.phases:
            require(steps > 0 and clips > 0 and frames > 0 and frames % 4 == 1,
                    f"train.phases holds {[steps, frames, clips]}, but steps and clips must be above 0, frames 1 + 4k")
        require_positive("train", checkpoint_every=self.checkpoint_every, log_every=self.log_every,
                         small_batch_factor=self.small_batch_factor)
        for name in ("unquantized_steps", "validate_every", "threads"):
            require(getattr(self, name) >= 0, f"train.{name} is {getattr(self, name)}, but must not be negative")
        require(self.l1_weight >= 0 and self.mse_weight >= 0 and self.l1_weight + self.mse_weight > 0,
                "train.l1_weight and train.mse_weight must not be negative, nor both 0")

    @property
    def steps(self) -> int:
        return sum(steps for steps, _, _ in self.phases)

    def at(self, step: int) -> tuple[int, int, int]:
        """(step inside its phase, frames, clips) of update number `step`, from 0."""
        for steps, frames, clips in self.phases:
            if step < steps:
                return step, frames, clips
            step -= steps
        raise IndexError(f"step lies {step} steps behind the last phase")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, and Muon for the convolution weights where muon_lr is set."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    """Of AdamW; not applied to norm gains and biases."""
    muon_lr: float = 0.0
    """Learning rate of Muon, which then updates the convolution weights; 0 leaves all to AdamW."""
    clip_norm: float = 1.0
    ema_decay: float = 0.995
    warmup_steps: int = 100
    """At the start of every phase."""
    schedule: str = "cosine"
    """Over all phases: cosine down to end_factor, or constant."""
    end_factor: float = 0.03

    def __post_init__(self) -> None:
        require_choice("optimizer.schedule", self.schedule, ("cosine", "constant"))
        require_positive("optimizer", lr=self.lr, clip_norm=self.clip_norm)
        for name in ("muon_lr", "weight_decay"):
            require(getattr(self, name) >= 0, f"optimizer.{name} is {getattr(self, name)}, but must not be negative")
        require(all(0 <= beta < 1 for beta in self.betas),
                f"optimizer.betas is {list(self.betas)}, but both must lie in [0, 1)")
        require(0 <= self.end_factor <= 1, f"optimizer.end_factor is {self.end_factor}, but must lie between 0 and 1")
        require(0 <= self.ema_decay < 1, f"optimizer.ema_decay is {self.ema_decay}, but must lie in [0, 1)")
        require(self.warmup_steps >= 0, f"optimizer.warmup_steps is {self.warmup_steps}, but must not be negative")


@dataclass(frozen=True)
class TokenizerTrainingConfig:
    """Everything a run file of train-tokenizer may hold."""

    output: str = ""
    """Run folder: tokenizer.safetensors, checkpoint.safetensors, metrics.jsonl, metrics.png, config.yaml."""
    seed: int = 0
    model: ShapeConfig = field(default_factory=ShapeConfig)
    data: ClipsConfig = field(default_factory=ClipsConfig)
    train: PhasesConfig = field(default_factory=PhasesConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        longest = max(frames for _, frames, _ in self.train.phases)
        require(longest <= self.data.frames,
                f"train.phases take {longest} frames, but data.frames is {self.data.frames}: raise it")
