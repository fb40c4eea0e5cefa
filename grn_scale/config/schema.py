"""The one schema of every command: frozen dataclasses, a section for each component.

A component receives its own section and never the whole `Config`. Units stand in the names; numbers that follow from
others are properties. Rules inside one section are checked when it is built, rules between sections in `check.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from grn_scale.config.data_schema import DataConfig, TextConfig, TokenizeConfig, TokenizerConfig
from grn_scale.config.kernel_schema import KernelsConfig
from grn_scale.config.rules import require, require_choice, require_positive
from grn_scale.config.run_schema import InitConfig, ProfileConfig, SpikesConfig, StopConfig, WatchdogConfig


class LabelledShape:
    """What follows from the fields that every GRN model has."""

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def label_channels(self) -> int:
        """D: labels a token."""
        return self.latent_channels * (self.rounds if self.label_form == "bit" else 1)

    @property
    def classes(self) -> int:
        """K: classes a label."""
        return 2 if self.label_form == "bit" else 2**self.rounds

    @property
    def bits_per_token(self) -> int:
        """Bits a token has in the shards, whatever the label form."""
        return self.latent_channels * self.rounds


@dataclass(frozen=True)
class ModelConfig(LabelledShape):
    """Shape of a GRN text/video transformer; travels with the weights."""

    hidden_size: int = 192
    """Width of the transformer."""
    num_layers: int = 8
    num_heads: int = 4
    ffn_hidden_size: int = 768
    """Inner width of the SwiGLU MLP; the official sizes use 256 * round(ratio * hidden_size / 256)."""
    num_chunks: int = 2
    """Only names: official keys count layers inside chunks (block_chunks.<chunk>.module.<i>)."""
    text_hidden_size: int = 4096
    """Width of the text encoder's states."""
    latent_channels: int = 16
    """Channels of the video tokenizer's latent."""
    rounds: int = 4
    """HBQ rounds (bits per latent channel)."""
    label_form: str = "bit"
    """bit: rounds * latent_channels binary labels a token; index: latent_channels labels of 2^rounds classes."""
    layout: str = "v2"
    """v2: all tokens of a sample see each other; v1: text sees text only."""
    task_tags: bool = True
    """Put <T2I>, <T2V> or <I2V> before the caption (official v2 weights expect it)."""
    end_fraction: float = 0.95
    """Largest share of predictions the sampler's schedule takes over (0.999 in v1, 0.95 in v2)."""

    def __post_init__(self) -> None:
        require_choice("model.label_form", self.label_form, ("bit", "index"))
        require_choice("model.layout", self.layout, ("v1", "v2"))
        require_positive("model", hidden_size=self.hidden_size, num_layers=self.num_layers, num_heads=self.num_heads,
                         ffn_hidden_size=self.ffn_hidden_size, num_chunks=self.num_chunks,
                         text_hidden_size=self.text_hidden_size, latent_channels=self.latent_channels)
        require(1 <= self.rounds <= 8, f"model.rounds is {self.rounds}, but must lie between 1 and 8")
        require(self.hidden_size % self.num_heads == 0,
                f"model.hidden_size ({self.hidden_size}) must be a multiple of model.num_heads ({self.num_heads})")
        require(self.head_size % 2 == 0,
                f"model.hidden_size / model.num_heads is {self.head_size}, but rotary pairs need an even head size")
        require(self.num_layers % self.num_chunks == 0,
                f"model.num_layers ({self.num_layers}) must be a multiple of model.num_chunks ({self.num_chunks})")
        require(0 < self.end_fraction <= 1, f"model.end_fraction is {self.end_fraction}, but must lie in (0, 1]")


@dataclass(frozen=True)
class NoiseConfig:
    """Distribution of the signal ratio p that training corrupts with (GRN reference, section 5)."""

    mean: float = -1.3
    """p = sigmoid(z), z ~ N(mean, sigma)."""
    sigma: float = 1.3
    """0 draws p uniformly."""
    shift: float = 1.0
    """More noise above 1; sqrt(pixels)/256 is suggested for large frames."""

    def __post_init__(self) -> None:
        require(self.sigma >= 0, f"noise.sigma is {self.sigma}, but must not be negative")
        require_positive("noise", shift=self.shift)


@dataclass(frozen=True)
class LossConfig:
    gamma: float = 0.5
    """A sample weighs (predicted tokens)^gamma, normalised over the global batch; 0 is uniform."""

    def __post_init__(self) -> None:
        require(0 <= self.gamma <= 1, f"loss.gamma is {self.gamma}, but must lie between 0 and 1")


@dataclass(frozen=True)
class OptimizerConfig:
    name: str = "adamw"
    lr: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    """Not applied to one-dimensional tensors."""
    clip_norm: float = 0.1
    """Global gradient norm is clipped to this."""
    ema_decay: float = 0.999
    """0 keeps no moving average of the weights."""

    def __post_init__(self) -> None:
        require_choice("optimizer.name", self.name, ("adamw", "sgd"))
        require_positive("optimizer", lr=self.lr, clip_norm=self.clip_norm, eps=self.eps)
        require(all(0 <= beta < 1 for beta in self.betas),
                f"optimizer.betas is {list(self.betas)}, but both must lie in [0, 1)")
        require(self.weight_decay >= 0, f"optimizer.weight_decay is {self.weight_decay}, but must not be negative")
        require(0 <= self.ema_decay < 1, f"optimizer.ema_decay is {self.ema_decay}, but must lie in [0, 1)")


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate as a function of the step."""

    warmup_steps: int = 50
    warmup_start: float = 0.005
    """Fraction of the peak at step 0."""
    kind: str = "constant"
    """After the warm-up: constant, cosine or linear, the last two down to end_factor at train.steps."""
    end_factor: float = 0.0

    def __post_init__(self) -> None:
        require_choice("schedule.kind", self.kind, ("constant", "cosine", "linear"))
        require(self.warmup_steps >= 0, f"schedule.warmup_steps is {self.warmup_steps}, but must not be negative")
        for name in ("warmup_start", "end_factor"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"schedule.{name} is {value}, but must lie between 0 and 1")


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 1000
    precision: str = "bf16"
    """bf16 (fp32 masters, moments and gradient accumulation) or fp32."""
    validate_every: int = 200
    """Steps between validations; 0 never validates."""
    checkpoint_every: int = 200
    keep_last: int = 2
    """Newest checkpoints kept."""
    keep_every: int = 0
    """Checkpoints of steps that are multiples of this are kept for good, besides; 0 keeps none."""
    background_save: bool = True
    """Write checkpoints from a copy in host memory while training goes on; false lets training wait for the storage."""
    nonfinite_limit: int = 20
    """Steps in a row whose loss or gradient is not finite and which are skipped; then the run stops (exit 78)."""
    threads: int = 0
    """CPU threads a process uses; 0 divides the machine's cores by its processes."""

    def __post_init__(self) -> None:
        require_choice("train.precision", self.precision, ("bf16", "fp32"))
        require_positive("train", steps=self.steps, checkpoint_every=self.checkpoint_every, keep_last=self.keep_last,
                         nonfinite_limit=self.nonfinite_limit)
        require(self.keep_every >= 0 and self.keep_every % self.checkpoint_every == 0,
                f"train.keep_every is {self.keep_every}, but must be 0 or a multiple of train.checkpoint_every "
                f"({self.checkpoint_every}): only checkpoints that are made can be kept")
        require(self.threads >= 0, f"train.threads is {self.threads}, but must not be negative")
        require(self.validate_every >= 0, f"train.validate_every is {self.validate_every}, but must not be negative")


@dataclass(frozen=True)
class ParallelConfig:
    """Degrees of parallelism; the data-parallel degree is what the world size leaves over."""

    tensor: int = 1
    sequence: bool = True
    """Sequence parallelism inside the tensor-parallel group; no effect at tensor=1."""
    pipeline: int = 1
    virtual_pipeline: int = 1
    """Model chunks a pipeline rank holds (interleaved 1F1B above 1)."""
    context: int = 1
    """Processes that share one packed sequence (Ulysses): each holds a part of its rows, and in attention some heads
    of all of them. For packs too long for one process."""
    recompute: str = "none"
    """What the backward pass computes again instead of keeping: none, selective (recompute_modules of every layer), or
    full (every layer but its input)."""
    recompute_modules: tuple[str, ...] = ("mlp",)
    """For selective: mlp (its inner activations, the largest part), core_attn (queries, keys and values as attention
    sees them; costs a forward pass of attention)."""

    def __post_init__(self) -> None:
        require_positive("parallel", tensor=self.tensor, pipeline=self.pipeline, context=self.context,
                         virtual_pipeline=self.virtual_pipeline)
        require_choice("parallel.recompute", self.recompute, ("none", "selective", "full"))
        require(len(self.recompute_modules) > 0, "parallel.recompute_modules is empty: name some, or set "
                "parallel.recompute=none")
        for module in self.recompute_modules:
            require_choice("parallel.recompute_modules", module, ("mlp", "core_attn"))


@dataclass(frozen=True)
class ZeroConfig:
    stage: int = 1
    """DeepSpeed ZeRO stage: 0 replicates all, 1 shards optimizer states, 2 also gradients, 3 also weights."""
    offload_optimizer: bool = False
    """Keep the optimizer's fp32 state in host memory and update there (stages 2 and 3)."""

    def __post_init__(self) -> None:
        require(self.stage in (0, 1, 2, 3), f"zero.stage is {self.stage}, but must be 0, 1, 2 or 3")
        require(not self.offload_optimizer or self.stage >= 2,
                f"zero.offload_optimizer needs zero.stage=2 or 3, but zero.stage is {self.stage}")


@dataclass(frozen=True)
class LoggingConfig:
    wandb: str = "off"
    """off, offline or online; fed from metrics.jsonl, which is always written."""
    project: str = "grn_scale"

    def __post_init__(self) -> None:
        require_choice("logging.wandb", self.wandb, ("off", "offline", "online"))


@dataclass(frozen=True)
class AdaptiveConfig:
    """Complexity-aware sampling: a sample's entropy after its first steps decides how many more it gets.

    Steps in all: wp + clip(round(k e + b), tmin - wp, tmax - wp), half rounded to even, where e in [0, 1] is the mean
    over labels of entropy / log2(classes) of the conditional prediction at step wp. `grn-scale evaluate
    --calibrate-steps` fits k and b to a model. The symbols are the reference's (section 7).
    """

    enabled: bool = False
    k: float = 700.0
    b: float = -620.0
    wp: int = 5
    """Steps before the decision."""
    tmin: int = 20
    """Fewest steps in all; the most are sampling.tmax."""
    temperature_factor: bool = False
    """After the decision, divide the temperature by up to 2 for a sample with few steps: times
    clip((steps after wp - 10) / 40 + 0.5, 0.5, 1)."""

    def __post_init__(self) -> None:
        require(self.wp >= 0, f"sampling.adaptive.wp is {self.wp}, but must not be negative")
        require(self.tmin > self.wp,
                f"sampling.adaptive.tmin is {self.tmin}, but must be greater than sampling.adaptive.wp ({self.wp})")


@dataclass(frozen=True)
class SamplingConfig:
    """The refinement sampler (GRN reference, section 6)."""

    steps: int = 50
    tmax: int = 50
    """Length of the schedule; the share of predictions saturates at step tmax - 1."""
    guidance: float = 4.0
    """1 is no guidance."""
    guidance_start: float = 0.0
    """Guidance acts from this signal ratio on."""
    guidance_end: float = 1.0
    """Guidance acts up to this signal ratio."""
    temperature: float = 1.0
    shift: float = 1.0
    """Bends the schedule as noise.shift bends training."""
    adaptive: AdaptiveConfig = field(default_factory=AdaptiveConfig)

    def __post_init__(self) -> None:
        require_positive("sampling", steps=self.steps, temperature=self.temperature, shift=self.shift)
        require(self.guidance >= 0, f"sampling.guidance is {self.guidance}, but must not be negative")
        for name in ("guidance_start", "guidance_end"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"sampling.{name} is {value}, but must lie between 0 and 1")
        require(self.tmax >= 2, f"sampling.tmax is {self.tmax}, but must be at least 2")
        require(not self.adaptive.enabled or self.adaptive.tmin <= self.tmax,
                f"sampling.adaptive.tmin is {self.adaptive.tmin}, but must not be above sampling.tmax ({self.tmax})")


@dataclass(frozen=True)
class Config:
    """Everything a run file may hold. Each command reads the sections it needs."""

    output: str = ""
    """Folder the command writes: token shards, run folder or samples."""
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    text: TextConfig = field(default_factory=TextConfig)
    tokenize: TokenizeConfig = field(default_factory=TokenizeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    init: InitConfig = field(default_factory=InitConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    stop: StopConfig = field(default_factory=StopConfig)
    spikes: SpikesConfig = field(default_factory=SpikesConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        require(self.seed >= 0, f"seed is {self.seed}, but must not be negative")
