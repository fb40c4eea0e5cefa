"""Shape of a class-to-image GRN, and the configuration of a run that trains one."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from grn_scale.config.kernel_schema import KernelsConfig
from grn_scale.config.rules import require, require_choice, require_positive
from grn_scale.config.schema import AdaptiveConfig, Config, LabelledShape, NoiseConfig


@dataclass(frozen=True)
class ClassModelConfig(LabelledShape):
    """Shape of a class-to-image GRN (GRN reference, section 7); travels with the weights. Defaults are GRN-B."""

    hidden_size: int = 768
    """Width of the transformer."""
    num_layers: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    """The SwiGLU MLP has int(int(mlp_ratio * hidden_size) * 2/3) inner channels."""
    bottleneck_size: int = 128
    """Width between the two layers that embed the labels."""
    in_context_length: int = 32
    """Class tokens in front of the image; 0 for none."""
    in_context_start: int = 4
    """Block (from 0) before which the class tokens are put there."""
    num_classes: int = 1000
    """Class ids are 0 .. num_classes - 1; num_classes itself is the null class of guidance."""
    grid: int = 16
    """Height and width of the latent image."""
    latent_channels: int = 16
    """Channels of the tokenizer's latent."""
    rounds: int = 4
    """HBQ rounds (bits per latent channel)."""
    label_form: str = "index"
    """bit: rounds * latent_channels binary labels a token; index: latent_channels labels of 2^rounds classes."""

    def __post_init__(self) -> None:
        require_choice("model.label_form", self.label_form, ("bit", "index"))
        require_positive("model", hidden_size=self.hidden_size, num_layers=self.num_layers, num_heads=self.num_heads,
                         mlp_ratio=self.mlp_ratio, bottleneck_size=self.bottleneck_size, num_classes=self.num_classes,
                         grid=self.grid, latent_channels=self.latent_channels)
        require(1 <= self.rounds <= 8, f"model.rounds is {self.rounds}, but must lie between 1 and 8")
        require(self.hidden_size % self.num_heads == 0,
                f"model.hidden_size ({self.hidden_size}) must be a multiple of model.num_heads ({self.num_heads})")
        require(self.head_size % 4 == 0, f"model.hidden_size / model.num_heads is {self.head_size}, but must be a "
                "multiple of 4: half of it turns by rows, half by columns, in pairs")
        require(self.hidden_size % 4 == 0, f"model.hidden_size is {self.hidden_size}, but must be a multiple of 4: "
                "the fixed positions are sines and cosines of rows and columns")
        require(self.ffn_hidden_size > 0, f"model.mlp_ratio is {self.mlp_ratio}, which leaves the MLP no channel")
        require(self.in_context_length >= 0,
                f"model.in_context_length is {self.in_context_length}, but must not be negative")
        require(0 <= self.in_context_start < self.num_layers,
                f"model.in_context_start is {self.in_context_start}, but must be a block: 0 .. {self.num_layers - 1}")

    @property
    def ffn_hidden_size(self) -> int:
        """Inner width of the SwiGLU MLP."""
        return int(int(self.mlp_ratio * self.hidden_size) * 2 / 3)

    @property
    def task_tags(self) -> bool:
        """No text is read, so none is tagged."""
        return False

    @property
    def null_class(self) -> int:
        """Class id that stands for no class."""
        return self.num_classes

    @property
    def tokens(self) -> int:
        """N: tokens of an image."""
        return self.grid * self.grid


@dataclass(frozen=True)
class ClassAdaptiveConfig(AdaptiveConfig):
    """Complexity-aware sampling of images: the most steps are sampling.steps, and few steps lower the temperature
    unless told otherwise, as in the reference."""

    temperature_factor: bool = True


@dataclass(frozen=True)
class ClassSamplingSettings:
    """How an image comes out of noise (GRN reference, section 7): a run file's section, and what `generate` takes.
    ConfigError where a number is impossible."""

    steps: int = 50
    """Steps of every sample; with `adaptive` the most that one takes."""
    schedule: str = "linear"
    """Signal level after step i of n: linear i/n, or cosine 1 - cos(pi/2 * i/n)."""
    guidance: float = 2.35
    """Scores are unconditional + guidance * (conditional - unconditional); 1 is no guidance."""
    guidance_low: float = 0.44
    """Guidance acts at signal levels above this; 0: from the beginning. Below 0 it acts everywhere and grows: with
    weight 1 + guidance * (1 - cos(pi * t^(-guidance_low))) / 2."""
    guidance_high: float = 1.0
    """Guidance acts at signal levels below this (unless guidance_low is below 0)."""
    temperature: float = 1.31
    adaptive: ClassAdaptiveConfig = field(default_factory=ClassAdaptiveConfig)

    def __post_init__(self) -> None:
        require_choice("sampling.schedule", self.schedule, ("linear", "cosine"))
        require_positive("sampling", steps=self.steps, temperature=self.temperature)
        require(self.guidance >= 0, f"sampling.guidance is {self.guidance}, but must not be negative")
        rule = self.adaptive
        require(not rule.enabled or self.schedule == "linear",
                f"sampling.schedule is {self.schedule}, but complexity-aware sampling is defined for linear alone: "
                "sampling.schedule=linear, or sampling.adaptive.enabled=false")
        require(not rule.enabled or rule.tmin <= self.steps,
                f"sampling.steps is {self.steps}, but the fewest steps of complexity-aware sampling "
                f"(sampling.adaptive.tmin) are {rule.tmin}: raise steps, or lower tmin")


@dataclass(frozen=True)
class ClassConfig(Config):
    """A run file whose model is a class-to-image GRN. `data.caption_drop` is the probability that a draw goes without
    its class; `text` and `data.i2v_share` have no effect, and the model is cut nowhere."""

    model: ClassModelConfig = field(default_factory=ClassModelConfig)
    noise: NoiseConfig = field(default_factory=lambda: NoiseConfig(mean=-0.8, sigma=0.8))
    sampling: ClassSamplingSettings = field(default_factory=ClassSamplingSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tensor", "pipeline", "virtual_pipeline", "context"):
            value = getattr(self.parallel, name)
            require(value == 1, f"parallel.{name} is {value}, but a class-to-image model trains in plain data "
                    f"parallel: parallel.{name}=1")
        require(self.parallel.recompute == "none", f"parallel.recompute is {self.parallel.recompute}, but a "
                "class-to-image model keeps its activations: parallel.recompute=none")
        mine = KernelsConfig(adamw=self.kernels.adamw)
        for name in (each.name for each in fields(KernelsConfig)):
            value, only = getattr(self.kernels, name), getattr(mine, name)
            require(value == only, f"kernels.{name} is {value}, but a class-to-image model has no other kernels to "
                    f"choose from: kernels.{name}={only}")


SCHEMAS = (Config, ClassConfig)
"""Of commands that work for both kinds of model; the keys given tell which one it is."""
