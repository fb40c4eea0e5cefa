"""The sections about data: which clips and captions are tokenized, how, and how draws are formed and packed."""

from __future__ import annotations

from dataclasses import dataclass

from grn_scale.config.rules import require, require_choice, require_positive
from grn_scale.errors import ConfigError

MOST_TEXT_TOKENS = 512  # text token k turns by time position k; those after belong to noise level and frames
TEXT_STATES = ("none", "bf16", "int8")  # how the states of captions may be kept in text shards


@dataclass(frozen=True)
class TokenizerConfig:
    """Which video tokenizer turns pixels into latents."""

    path: str = "small"
    """safetensors file with official key names, or "small" for the one that ships with grn_scale."""


@dataclass(frozen=True)
class TextConfig:
    """Which text encoder turns captions into states."""

    encoder: str = ""
    """Hugging Face folder of a UMT5 encoder with its sentencepiece tokenizer."""
    max_tokens: int = 512
    """Longer captions are cut, the end token kept."""
    states: str = "auto"
    """What text shards hold besides token ids: none (the encoder runs in training), bf16, or int8 with a scale a token.
    auto: bf16 where the states of all captions are estimated to take less than states_limit_gigabytes, else none."""
    states_limit_gigabytes: float = 100.0
    """Of 10^9 bytes."""

    def __post_init__(self) -> None:
        require_positive("text", max_tokens=self.max_tokens, states_limit_gigabytes=self.states_limit_gigabytes)
        require_choice("text.states", self.states, ("auto", *TEXT_STATES))
        require(self.max_tokens <= MOST_TEXT_TOKENS,
                f"text.max_tokens is {self.max_tokens}, but the model has positions for at most {MOST_TEXT_TOKENS}")


@dataclass(frozen=True)
class TokenizeConfig:
    """How clips become token shards."""

    fps: float = 16.0
    """Frames a second of the tokenized clip; sources are sampled by their timestamps."""
    max_frames: int = 209
    """Longest clip kept, in frames of `fps` (1 + 4k)."""
    latent_side: int = 40
    """Side of a square clip in latent cells of 16 pixels: 16, 32, 40, 60, 64, 90 are the official budgets
    0.06M, 0.25M, 0.41M, 0.92M, 1M, 2M; the aspect ratio then gives height and width."""
    shard_samples: int = 1024
    """Samples a video shard holds."""
    batch_clips: int = 8
    """Clips of one bucket that are encoded together."""
    workers: int = 1
    """Processes that encode on this machine, each with its decoding children; on GPUs one each, in turn. Any number of
    machines may run the same command over one output folder."""
    threads: int = 1
    """CPU threads a worker encodes with. Shards are the same to the byte only where this is the same."""
    lease_seconds: float = 120.0
    """A chunk whose worker has not been heard of for so long is taken over."""
    allow_empty_captions: bool = False
    """Keep clips without caption or class_id; they are trained with the empty caption."""
    decode_processes: int = 1
    """Child processes of a worker that decode; a crash or hang costs one clip."""
    decode_timeout_seconds: float = 60.0
    decode_memory_megabytes: int = 4096
    """Address space each of them may take; a clip that needs more costs itself and nothing else."""
    max_bad_fraction: float = 0.05
    """Stop (exit 78) when more of the manifest than this is quarantined."""

    def __post_init__(self) -> None:
        require_positive("tokenize", fps=self.fps, latent_side=self.latent_side, shard_samples=self.shard_samples,
                         batch_clips=self.batch_clips, decode_processes=self.decode_processes,
                         decode_timeout_seconds=self.decode_timeout_seconds, workers=self.workers,
                         threads=self.threads, lease_seconds=self.lease_seconds)
        require(self.max_frames >= 1 and self.max_frames % 4 == 1,
                f"tokenize.max_frames is {self.max_frames}, but the tokenizer takes 1 + 4k frames: "
                f"{self.max_frames - (self.max_frames - 1) % 4} would do")
        require(self.decode_memory_megabytes >= 512,
                f"tokenize.decode_memory_megabytes is {self.decode_memory_megabytes}, but must be at least 512: a "
                "decoding process takes about 210 before it opens a file")
        require(0 <= self.max_bad_fraction <= 1,
                f"tokenize.max_bad_fraction is {self.max_bad_fraction}, but must lie between 0 and 1")


@dataclass(frozen=True)
class MixturePart:
    """One dataset of a mixture, and how often its samples are seen."""

    dataset: str = ""
    """Folder of token shards."""
    repeats: float | None = None
    """Visits of each sample in an epoch; of 2.5 each sample has two or three, drawn anew for every epoch."""
    weight: float | None = None
    """Share of the visits, relative to the other parts' weights."""

    def __post_init__(self) -> None:
        require(bool(self.dataset), "data.mixture: a part names no dataset; write {dataset: DIR, repeats: 1}")
        require(self.repeats is None or self.weight is None,
                f"data.mixture: {self.dataset} has repeats and weight, but takes one of them")
        for name in ("repeats", "weight"):
            value = getattr(self, name)
            require(value is None or value > 0,
                    f"data.mixture: {name} of {self.dataset} is {value}, but must be greater than 0; leave the "
                    "dataset out instead")


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how draws are formed and packed."""

    manifest: str = ""
    """JSONL manifest, read by tokenize."""
    dataset: str = ""
    """Folder of token shards with dataset.json, read by train."""
    mixture: tuple[MixturePart, ...] = ()
    """Several datasets in place of one: each with `repeats` (1 where nothing is said), or each with a `weight`. An
    epoch has as many visits as the repeats add up to; with weights as many as the datasets hold samples in all."""
    temperature: float = 1.0
    """Of a mixture without repeats and weights: a dataset of n samples has the weight n^(1/temperature)."""
    image_share: float | None = None
    """Share of the visits that are images; their visits and those of videos are scaled to reach it. None: as it is."""
    token_budget: int = 4096
    """Tokens a pack is padded to; a multiple of 128 that belongs to the data, not to the layout."""
    packs_per_step: int = 1
    """Global batch, counted in packs."""
    ramp_start: int = 0
    """Packs of the first step, where the global batch is to grow: by as many at a time, up to packs_per_step, which is
    a multiple. 0: no ramp."""
    ramp_steps: int = 0
    """Steps until the global batch is packs_per_step; each size before it lasts equally long."""
    validation_fraction: float = 0.01
    """Share of samples held out, chosen by a hash of their key."""
    validation_packs: int = 4
    """Packs of held-out samples one evaluation reads."""
    caption_drop: float = 0.1
    """Probability that a draw is trained without its caption (guidance needs the empty caption)."""
    i2v_share: float = 0.0
    """Probability that a draw of a video is trained as image-to-video."""
    window_shards: int = 16
    """Shards that are shuffled and packed together; bounds the memory of planning."""
    bad_sample_limit: int = 1000
    """More corrupt or unreadable samples than this, over all processes and all starts of a run, stop it (exit 78)."""
    ledger: bool = False
    """Write which samples each step took into the run folder's ledger.jsonl (about 40 bytes a sample), from which
    `grn-scale verify --ledger` proves that an epoch took each of them as often as it should."""
    cache_dir: str = ""
    """Folder on a local disk that keeps blocks of a remote dataset (s3://...) for all processes of a machine; empty:
    only memory does. Datasets in folders are never cached."""
    cache_gigabytes: float = 100.0
    """About how much data.cache_dir may hold; the blocks of a window of shards should fit."""

    def __post_init__(self) -> None:
        require(self.token_budget > 0 and self.token_budget % 128 == 0,
                f"data.token_budget is {self.token_budget}, but must be a positive multiple of 128: "
                f"{max(128, round(self.token_budget / 128) * 128)} is the nearest")
        require_positive("data", packs_per_step=self.packs_per_step, validation_packs=self.validation_packs,
                         window_shards=self.window_shards, temperature=self.temperature,
                         cache_gigabytes=self.cache_gigabytes)
        self._check_ramp()
        self._check_mixture()
        require(self.bad_sample_limit >= 0,
                f"data.bad_sample_limit is {self.bad_sample_limit}, but must not be negative")
        for name in ("validation_fraction", "caption_drop", "i2v_share"):
            value = getattr(self, name)
            require(0 <= value < 1 or (name == "i2v_share" and value == 1),
                    f"data.{name} is {value}, but must lie in [0, 1)")
        require(self.image_share is None or 0 <= self.image_share <= 1,
                f"data.image_share is {self.image_share}, but must lie between 0 and 1")

    def _check_ramp(self) -> None:
        start, steps, packs = self.ramp_start, self.ramp_steps, self.packs_per_step
        require(start >= 0 and steps >= 0, f"data.ramp_start={start} and data.ramp_steps={steps} must not be negative "
                "(0 and 0: no ramp)")
        require((start > 0) == (steps > 0), f"data.ramp_start is {start} and data.ramp_steps is {steps}: a ramp needs "
                "both, set both to 0 for none")
        if start and packs % start:
            nearest = min((d for d in range(1, packs + 1) if packs % d == 0), key=lambda d: abs(d - start))
            raise ConfigError(f"data.ramp_start is {start}, but must divide data.packs_per_step ({packs}), to which "
                              f"the ramp climbs by it: data.ramp_start={nearest} is the nearest that fits")

    def _check_mixture(self) -> None:
        require(not (self.dataset and self.mixture), "data.dataset and data.mixture are both set: give data.mixture=[] "
                "to read data.dataset alone, or data.dataset= to read the mixture")
        weighed = [part.dataset for part in self.mixture if part.weight is not None]
        require(len(weighed) in (0, len(self.mixture)), f"data.mixture: of {len(self.mixture)} datasets "
                f"{', '.join(weighed)} has a weight, but all must or none")
        require(self.temperature == 1 or all(part.repeats is part.weight is None for part in self.mixture),
                f"data.temperature is {self.temperature}, which sets the shares of a mixture by size: leave repeats "
                "and weight out of data.mixture, or set data.temperature=1")
        require(self.temperature == 1 or len(self.mixture) > 1,
                f"data.temperature is {self.temperature}, but there is no data.mixture of several datasets: set "
                "data.temperature=1")

    @property
    def parts(self) -> tuple[MixturePart, ...]:
        """The mixture; one dataset is the mixture of itself. ConfigError where neither is set."""
        require(bool(self.dataset or self.mixture),
                "no dataset is set: give data.dataset=DIR, or write data.mixture in the run file")
        return self.mixture or (MixturePart(self.dataset, repeats=1.0),)
