"""Train a video tokenizer: clips -> encode -> HBQ with a straight-through gradient -> decode -> L1 + MSE.

    grn-scale train-tokenizer --config configs/tokenizer/small.yaml data.manifest=clips.jsonl output=runs/tokenizer

Every batch is drawn by (seed, step) alone, and a checkpoint holds all there is: a resumed run equals an uninterrupted
one bit for bit (same machine, same threads).
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from grn_scale import keyed
from grn_scale.atomic import write_bytes
from grn_scale.command_line import CommandParser, config_yaml, run, save_config, start_logging
from grn_scale.config.load import changes, parse_yaml, to_dict
from grn_scale.config.schema import LoggingConfig
from grn_scale.data.decode import DecodedClip, DecodeRequest
from grn_scale.data.decode_pool import DecodePool
from grn_scale.data.manifest import Clip, load_manifest
from grn_scale.errors import ConfigError, DoNotRequeue, UserError
from grn_scale.hbq import dequantize_index, quantize_index, quantize_straight_through
from grn_scale.tokenizer.clips import to_video
from grn_scale.tokenizer.initialize import new_tokenizer
from grn_scale.tokenizer.layers import use_channels_last
from grn_scale.tokenizer.muon import Muon
from grn_scale.tokenizer.training_config import (
    ClipsConfig,
    OptimizerConfig,
    PhasesConfig,
    TokenizerTrainingConfig,
    split_names,
)
from grn_scale.tokenizer.video import VideoTokenizer, VideoTokenizerShape
from grn_scale.train.metrics import MetricsLog, read_metrics

CHECKPOINT = "checkpoint.safetensors"
TOKENIZER = "tokenizer.safetensors"
"""The moving average of the weights in fp16: what `tokenizer.path` names."""
FREE_KEYS = ("output", "train.threads", "train.validate_every", "train.checkpoint_every", "train.log_every",
             "data.held_out", "data.held_out_clips", "data.decode_processes", "data.decode_timeout_seconds",
             "data.memory_megabytes")
"""May differ between the attempts of a run; with anything else changed it would be another run."""
log = logging.getLogger("grn_scale.tokenizer")


@dataclass(frozen=True)
class Source:
    """Decoded clips of one manifest."""

    share: float
    """Weight of its clips among those of all sources; 0 counts them."""
    by_side: dict[int, list[np.ndarray]]
    """uint8 [T, height, width, 3] by the shorter side they were decoded at."""
    _fitting: dict[tuple[int, int], list[np.ndarray]] = field(default_factory=dict)

    def fitting(self, frames: int, crop: int) -> list[np.ndarray]:
        """Clips that hold `frames` frames of at least crop x crop pixels. Asked for when all are decoded."""
        if (frames, crop) not in self._fitting:
            self._fitting[frames, crop] = [clip for side, clips in self.by_side.items() if side >= crop
                                           for clip in clips if len(clip) >= frames]
        return self._fitting[frames, crop]


def decode_sources(manifests: Sequence[str], shares: Sequence[float], config: ClipsConfig, sides: Sequence[int],
                   most: int | None = None) -> list[Source]:
    """Clips of each manifest (the first `most`), decoded at each of `sides` that the source fills.

    Those that cannot be decoded are named in the log. Raises UserError where none is left or memory would not do.
    """
    sources = [Source(share, {side: [] for side in sides}) for share in shares or [0.0] * len(manifests)]
    requests = [(request, source) for name, source in zip(manifests, sources) for clip in load_manifest(name)[:most]
                for request in _requests(clip, config, sides)]
    taken = bad = 0
    with DecodePool(config.decode_processes, config.decode_timeout_seconds) as pool:
        decoded = pool.map(request for request, _ in requests)
        for (request, clip), (_, source) in _progress(zip(decoded, requests), "decoding clips", len(requests)):
            if not isinstance(clip, DecodedClip):
                bad += 1
                log.warning("left out: %s", clip)
                continue
            taken += clip.frames.nbytes
            if taken > config.memory_megabytes << 20:
                raise UserError(f"the decoded clips take more than data.memory_megabytes={config.memory_megabytes}: "
                                "raise it, or give fewer clips or data.sides")
            source.by_side[min(request.height, request.width)].append(clip.frames)
    log.info("%d clips decoded, %.0f MiB; %d left out", len(requests) - bad, taken / (1 << 20), bad)
    if not taken:
        raise UserError(f"no clip of {', '.join(manifests)} can be used at the sides {list(sides)}; the log says why")
    return sources


def draw_batch(sources: Sequence[Source], key: tuple[int | str, ...], frames: int, count: int, config: ClipsConfig,
               small_batch_factor: int) -> torch.Tensor:
    """float32 [clips, 3, frames, crop, crop] in [-1, 1]: random squares of random windows, drawn by `key`."""
    rng = np.random.default_rng(keyed.key64(*key))
    fitting = {crop: [source.fitting(frames, crop) for source in sources] for crop in config.crops}
    chances = np.array([share if any(fitting[crop]) else 0.0 for crop, share in zip(config.crops, config.crop_shares)])
    if not chances.any():
        raise UserError(f"no clip holds {frames} frames of {min(config.crops)} pixels: give longer or larger clips, or "
                        "change train.phases or data.crops")
    crop = config.crops[rng.choice(len(chances), p=chances / chances.sum())]
    if crop > min(config.crops):
        count = max(1, count // small_batch_factor)
    groups = fitting[crop]
    weights = np.array([(source.share or len(group)) if group else 0.0 for source, group in zip(sources, groups)])
    picked = [groups[i] for i in rng.choice(len(groups), size=count, p=weights / weights.sum())]
    return to_video(np.stack([_cut(group[rng.integers(len(group))], frames, crop, rng) for group in picked]))


def _requests(clip: Clip, config: ClipsConfig, sides: Sequence[int]) -> Iterator[DecodeRequest]:
    """One request for each side the source fills (all of them where the manifest does not tell its size)."""
    height, width = clip.height or 1 << 30, clip.width or 1 << 30
    known = clip.height and clip.width
    for side in sides:
        if side <= min(height, width):
            scale = side / min(height, width) if known else 0
            size = (round(height * scale), round(width * scale)) if known else (side, side)
            yield DecodeRequest(str(clip.path), config.fps, config.frames, clip.begin_frame, clip.end_frame, *size,
                                flip=clip.flip, member=clip.member)


def _cut(clip: np.ndarray, frames: int, crop: int, rng: np.random.Generator) -> np.ndarray:
    begin, top, left = (int(rng.integers(have - want + 1)) for have, want in zip(clip.shape, (frames, crop, crop)))
    return clip[begin:begin + frames, top:top + crop, left:left + crop]


class State:
    """All that training changes: weights, their moving average, Adam's moments, the number of updates done."""

    def __init__(self, config: TokenizerTrainingConfig, device: torch.device) -> None:
        model = config.model
        shape = VideoTokenizerShape(model.dim, model.dec_dim, model.latent_channels, model.multipliers,
                                    model.residual_blocks)
        self.step = 0
        self.model, self.ema = (use_channels_last(new_tokenizer(shape, config.seed)).to(device) for _ in range(2))
        self.ema.requires_grad_(False).eval()
        convolutions = [p for p in self.model.parameters() if _is_matrix(p)]
        others = [p for p in self.model.parameters() if not _is_matrix(p)]
        settings, decay = config.optimizer, {"weight_decay": config.optimizer.weight_decay}
        groups = [{"params": others, "weight_decay": 0.0}]
        self.optimizers: list[torch.optim.Optimizer] = []
        if settings.muon_lr:
            self.optimizers.append(Muon(convolutions, settings.muon_lr))
        else:
            groups.append({"params": convolutions, **decay})
        self.optimizers.append(torch.optim.AdamW(groups, settings.lr, settings.betas))

    def update(self, loss: torch.Tensor, factor: float, config: OptimizerConfig) -> float:
        """One update of weights and average at `factor` of the peak rates; the gradient norm before clipping."""
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm).item()
        if not math.isfinite(norm):
            raise DoNotRequeue(f"the gradient of step {self.step} is not finite: lower optimizer.lr, or look at the "
                               "clips; the last checkpoint is sound")
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * optimizer.defaults["lr"]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        # A young average forgets its first values faster.
        decay = min(config.ema_decay, self.step / (self.step + 9))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)
        return norm

    def save(self, folder: Path, config: TokenizerTrainingConfig) -> None:
        """Write checkpoint.safetensors and tokenizer.safetensors, each complete or not at all."""
        tensors = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"ema/{name}": tensor for name, tensor in self.ema.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            # Parameters without a gradient so far (of layers that single frames pass by) have no entry.
            tensors |= {f"optimizer/{key}/{name}": value for optimizer in self.optimizers
                        for key, value in optimizer.state.get(parameter, {}).items()}
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_bytes(folder / CHECKPOINT, save(plain, {"step": str(self.step), "config": config_yaml(config)}))
        write_bytes(folder / TOKENIZER, save({name: tensor.half().cpu().contiguous()
                                              for name, tensor in self.ema.state_dict().items()}))

    def load(self, path: Path, config: TokenizerTrainingConfig) -> None:
        """Continue from a checkpoint; UserError where it is damaged, ConfigError where `config` is of another run."""
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                about = file.metadata()
                step, saved = int(about["step"]), parse_yaml(about["config"], str(path))
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise UserError(f"cannot read {path} as a checkpoint: {error}") from error
        changed = {key: change for key, change in changes(saved, to_dict(config)).items() if key not in FREE_KEYS}
        if changed:
            listed = "; ".join(f"{key} {change}" for key, change in changed.items())
            raise ConfigError(f"{path} was trained with another configuration ({listed}): give it as it was, or "
                              "another output")
        for prefix, module in (("model/", self.model), ("ema/", self.ema)):
            part = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            own = module.state_dict()
            if {name: t.shape for name, t in part.items()} != {name: t.shape for name, t in own.items()}:
                raise UserError(f"{path} does not hold the tensors of its own configuration; take another checkpoint")
            module.load_state_dict(part)
        for optimizer in self.optimizers:
            for name, parameter in self.model.named_parameters():
                if any(parameter is own for group in optimizer.param_groups for own in group["params"]):
                    optimizer.state[parameter] = _optimizer_state(tensors, name, parameter)
        self.step = step


def _is_matrix(parameter: torch.Tensor) -> bool:
    """Whether it is a convolution's weight, not a bias or a norm's gain."""
    return parameter.ndim >= 4 and parameter.numel() > parameter.shape[0]


def _optimizer_state(tensors: dict[str, torch.Tensor], name: str, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a checkpoint holds for one parameter, in the parameter's memory layout, so that sums keep their order."""
    found = {key.split("/")[1]: value for key, value in tensors.items()
             if key.startswith("optimizer/") and key.split("/")[2] == name}
    return {key: value if key == "step" else torch.empty_like(parameter).copy_(value) for key, value in found.items()}


def rate_factor(step: int, config: OptimizerConfig, train: PhasesConfig) -> float:
    """Share of the peak rates for update number `step`, from 0: warm-up at the start of each phase, times the schedule
    over all of them."""
    into, _, _ = train.at(step)
    factor = min(1.0, (into + 1) / max(1, config.warmup_steps))
    if config.schedule == "cosine":
        fall = 0.5 * (1 + math.cos(math.pi * step / train.steps))
        factor *= config.end_factor + (1 - config.end_factor) * fall
    return factor


def reconstruction_loss(model: VideoTokenizer, video: torch.Tensor, rounds: int | None,
                        train: PhasesConfig) -> torch.Tensor:
    """Weighted sum of mean absolute and mean squared error in [-1, 1]; rounds=None decodes unquantised features."""
    features = model.encode(video)
    error = model.decode(features if rounds is None else quantize_straight_through(features, rounds)) - video
    return train.l1_weight * error.abs().mean() + train.mse_weight * error.square().mean()


@torch.no_grad()
def psnr(model: VideoTokenizer, video: torch.Tensor, rounds: int) -> torch.Tensor:
    """PSNR in dB of each clip [B, 3, T, H, W] after quantisation and clamping, float32 [B]."""
    decoded = model.decode(dequantize_index(quantize_index(model.encode(video), rounds), rounds)).clamp(-1, 1)
    return -10 * ((decoded - video) / 2).square().flatten(1).mean(1).log10()


def measure(model: VideoTokenizer, sources: list[Source], rounds: int, device: torch.device) -> dict[str, float]:
    """Mean PSNR in dB of held-out clips by side; what sticks out over a multiple of 16 pixels is cut."""
    result = {}
    for side in sorted({side for source in sources for side in source.by_side}):
        group = [clip for source in sources for clip in source.by_side[side]]
        values = [psnr(model, to_video(_whole_blocks(clip)[None]).to(device), rounds) for clip in group]
        if values:
            result[f"psnr_db_{side}"] = round(torch.cat(values).mean().item(), 3)
    return result


def _whole_blocks(clip: np.ndarray) -> np.ndarray:
    _, height, width, _ = clip.shape
    top, left = height % 16 // 2, width % 16 // 2
    return clip[:, top:top + height // 16 * 16, left:left + width // 16 * 16]


def train(state: State, sources: list[Source], held_out: list[Source], config: TokenizerTrainingConfig,
          device: torch.device, metrics: MetricsLog) -> dict[str, float]:
    """Train from `state.step` to the end, writing checkpoints; the last measurement of PSNR."""
    settings, folder, last = config.train, Path(config.output), {}
    recent, since = [], time.perf_counter()
    for step in _progress(range(state.step, settings.steps), "training", settings.steps - state.step):
        _, frames, count = settings.at(step)
        video = draw_batch(sources, (config.seed, "tokenizer batch", step), frames, count, config.data,
                           settings.small_batch_factor).to(device)
        rounds = config.model.rounds if step >= settings.unquantized_steps else None
        factor = rate_factor(step, config.optimizer, settings)
        loss = reconstruction_loss(state.model, video, rounds, settings)
        norm = state.update(loss, factor, config.optimizer)
        recent.append(loss.item())
        done, ends = state.step, state.step == settings.steps
        if done % settings.log_every == 0 or ends:
            now = time.perf_counter()
            metrics.write(done, {"loss": sum(recent) / len(recent), "grad_norm": norm,
                                 "lr": factor * config.optimizer.lr, "frames": frames,
                                 "step_seconds": (now - since) / len(recent)})
            recent, since = [], now
        if held_out and (ends or settings.validate_every and done % settings.validate_every == 0):
            last = measure(state.ema, held_out, config.model.rounds, device)
            metrics.write(done, last)
            log.info("step %d of %d: %s", done, settings.steps, last)
            since = time.perf_counter()
        if ends or done % settings.checkpoint_every == 0:
            state.save(folder, config)
    return last


def plot(folder: Path) -> Path:
    """Path of metrics.png in the run folder: loss and held-out PSNR over the steps."""
    import io

    from matplotlib.figure import Figure

    rows = read_metrics(folder / "metrics.jsonl")
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.semilogy(*zip(*[(row["step"], row["loss"]) for row in rows if "loss" in row]), linewidth=1)
    left.set(title="training loss", xlabel="step")
    for key in sorted({key for row in rows for key in row if key.startswith("psnr_db_")}):
        right.plot(*zip(*[(row["step"], row[key]) for row in rows if key in row]), marker=".",
                   label=f"{key.removeprefix('psnr_db_')} pixels")
        right.legend()
    right.set(title="held-out PSNR (dB)", xlabel="step")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=80)
    write_bytes(folder / "metrics.png", picture.getvalue())
    return folder / "metrics.png"


def _progress(items, title: str, total: int):
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(items, title, total=total, console=console, disable=not console.is_terminal)


def main(argv: list[str]) -> int:
    """Train, then print where the tokenizer lies and its PSNR as one JSON line; the exit code."""
    parser = CommandParser("train-tokenizer", "Train a video tokenizer on the clips of a manifest.",
                           "grn-scale train-tokenizer --config configs/tokenizer/small.yaml "
                           "data.manifest=clips.jsonl output=runs/tokenizer", schema=TokenizerTrainingConfig)
    parser.add_argument("--resume", choices=("none", "auto", "must"), default="none",
                        help="continue from the output folder's checkpoint: never, if there is one, or fail without")
    config, options = parser.parse_command(argv)
    for name, value in (("output", config.output), ("data.manifest", config.data.manifest)):
        if not value:
            raise ConfigError(f"{name} is not set: give {name}=VALUE, or write it in the run file")
    folder, checkpoint = Path(config.output), Path(config.output) / CHECKPOINT
    if options.resume == "none" and (checkpoint.exists() or (folder / TOKENIZER).exists()):
        raise ConfigError(f"{folder} holds a run already: continue it with --resume auto, or give another output")
    if options.resume == "must" and not checkpoint.exists():
        raise ConfigError(f"--resume must: there is no {checkpoint}")
    start_logging()
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    state = State(config, device)
    if checkpoint.exists():
        state.load(checkpoint, config)
        log.info("continuing from step %d", state.step)
    data = config.data
    sources = decode_sources(data.manifests, data.shares, data, data.sides)
    names = split_names(data.held_out)
    held_out = decode_sources(names, (), data, data.crops, data.held_out_clips) if names else []
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, folder)
    with MetricsLog(folder, state.step, LoggingConfig()) as metrics:
        result = train(state, sources, held_out, config, device, metrics)
    plot(folder)
    print(json.dumps({"tokenizer": str(folder / TOKENIZER), "steps": state.step, **result}))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
