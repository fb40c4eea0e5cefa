"""Prompts -> videos: a model with the video tokenizer and the text encoder that belong to it, as one object.

    pipeline = GRNPipeline.from_pretrained("grn_2b_hf/")
    output = pipeline("a red circle moves left", num_frames=33, height=480, width=832, seed=3)
    output.frames[0]      # uint8 RGB [33, 480, 832, 3]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from grn_scale.batch import TASKS
from grn_scale.config.schema import SamplingConfig
from grn_scale.data.buckets import CELL_PIXELS, latent_frames, nearest_ratio_key, whole_groups
from grn_scale.errors import ConfigError, UserError
from grn_scale.model import GRN, load_model
from grn_scale.sampling.condition import Condition, SamplingSettings
from grn_scale.sampling.maps import StepMaps
from grn_scale.sampling.sampler import Generated, generate
from grn_scale.sampling.video import decode_clips, encode_first_frame
from grn_scale.tokenizer import load_tokenizer
from grn_scale.tokenizer.text import TextEncoder, clean_caption, load_text_encoder, tagged_caption
from grn_scale.tokenizer.video import VideoTokenizer

INDEX = "model_index.json"
"""Marks the folder of a pipeline."""


@dataclass(frozen=True, eq=False)
class PipelineOutput:
    """What a call of `GRNPipeline` gives back, sample by sample."""

    frames: list[np.ndarray]
    """uint8 RGB [T, H, W, 3] each."""
    steps: list[int]
    """Refinement steps each of them took, over all segments."""


@dataclass(frozen=True, eq=False)
class GRNPipeline:
    """Model, video tokenizer and text encoder, on one device."""

    model: GRN
    tokenizer: VideoTokenizer
    encoder: TextEncoder

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: torch.device | str | None = None,
                        dtype: torch.dtype = torch.float32, max_text_tokens: int = 512) -> GRNPipeline:
        """The pipeline of a folder that `grn-scale convert --to hf --tokenizer ... --text-encoder ...` wrote.

        device: the GPU where there is one by default. dtype: of the model, fp32 or bf16; tokenizer and text encoder
        keep theirs. UserError where the folder lacks a part.
        """
        folder = Path(folder)
        if not (folder / INDEX).is_file():
            raise UserError(f"{folder} has no {INDEX}: give a folder that `grn-scale convert --to hf --tokenizer FILE "
                            "--text-encoder FILE` wrote")
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(load_model(folder).to(device, dtype), load_tokenizer(folder).to(device),
                   load_text_encoder(folder / "text_encoder", max_text_tokens, device))

    def __call__(self, prompt: str | Sequence[str], *, negative_prompt: str = "", num_frames: int = 33,
                 height: int = 480, width: int = 832, image: np.ndarray | None = None, num_segments: int = 1,
                 num_inference_steps: int = 50, guidance_scale: float = 4.0, temperature: float = 1.0,
                 num_videos_per_prompt: int = 1, seed: int = 0,
                 settings: SamplingSettings | None = None) -> PipelineOutput:
        """Sample num_videos_per_prompt videos of each prompt; one frame is a picture.

        image: uint8 RGB [height, width, 3], the first frame of every video. num_segments: each further segment of
        num_frames continues from the last frame of the one before, so a video has
        num_frames + (num_segments - 1) * (num_frames - 1) frames. seed: the same seed gives the same videos.
        settings: all numbers of the sampler at once; the three single ones then have no effect.
        ConfigError for a size or a number of frames that the tokenizer cannot make.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        prompts = [text for text in prompts for _ in range(num_videos_per_prompt)]
        settings = settings or self.settings(SamplingConfig(
            steps=num_inference_steps, tmax=num_inference_steps, guidance=guidance_scale, temperature=temperature))
        return self.sample(prompts, settings, frames=num_frames, height=height, width=width, negative=negative_prompt,
                           first_frame=image, segments=num_segments, seed=seed)

    def sample(self, prompts: Sequence[str], settings: SamplingSettings, *, frames: int, height: int, width: int,
               negative: str = "", first_frame: np.ndarray | None = None, ratio_key: float | None = None,
               segments: int = 1, seed: int = 0,
               observe: Callable[[int, StepMaps], None] | None = None) -> PipelineOutput:
        """A video of each prompt; what `__call__` and `grn-scale sample` do.

        Sample number b of segment s is draw s * len(prompts) + b of the seed. observe: called after every step with
        the segment's number.
        """
        if segments < 1 or (segments > 1 and frames == 1):
            raise ConfigError(f"{segments} segments of {frames} frames are asked for: give at least 1, and where there "
                              "are more, at least 5 frames each")
        clips: list[np.ndarray] = []
        steps: list[int] = []
        first = None if first_frame is None else [first_frame] * len(prompts)
        for segment in range(segments):
            conditions = self.conditions(prompts, frames=frames, height=height, width=width, negative=negative,
                                         first_frames=first, ratio_key=ratio_key)
            generated = generate(self.model, conditions, settings, seed=seed, first_draw=segment * len(prompts),
                                 observe=observe and partial(observe, segment))
            made = list(self.decode(generated))
            clips = [np.concatenate((clip, more[1:])) for clip, more in zip(clips, made)] if segment else made
            steps = [a + b for a, b in zip(steps, generated.steps)] if segment else generated.steps
            first = [clip[-1] for clip in clips]
        return PipelineOutput(clips, steps)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def settings(self, config: SamplingConfig) -> SamplingSettings:
        """The sampler's settings for this model."""
        return SamplingSettings.of(config, self.model.config)

    def text(self, prompt: str, task: str) -> str:
        """The text that is encoded for a prompt: cleaned, with the tag of its task where the model wants one.

        ConfigError for a prompt that begins with another task's tag.
        """
        for other in TASKS:
            if self.model.config.task_tags and other != task and prompt.lstrip().startswith(f"<{other}>"):
                raise ConfigError(f"the prompt {prompt!r} begins with the tag of {other}, but {task} is sampled; "
                                  "leave tags away, they are added")
        return tagged_caption(clean_caption(prompt), task, self.model.config.task_tags)

    def conditions(self, prompts: Sequence[str], *, frames: int, height: int, width: int, negative: str = "",
                   first_frames: Sequence[np.ndarray] | None = None,
                   ratio_key: float | None = None) -> list[Condition]:
        """What `generate` is asked for, a condition for each prompt.

        first_frames: uint8 RGB [height, width, 3] for each prompt. ratio_key: template of the bucket, by default the
        one nearest to height / width. A negative prompt is tagged too: in training the network never saw a text
        without its tag but the empty one.
        """
        self._check(frames, height, width, given=first_frames is not None)
        task = task_of(frames, first_frames is not None)
        negative_states, *states = self.encoder.encode(
            [self.text(negative, task), *(self.text(prompt, task) for prompt in prompts)])
        thw = (latent_frames(frames), height // CELL_PIXELS, width // CELL_PIXELS)
        key = nearest_ratio_key(height, width) if ratio_key is None else ratio_key
        asked = [Condition(state, negative_states, thw, key) for state in states]
        if first_frames is None:
            return asked
        encoded: dict[int, torch.Tensor] = {}
        for frame in first_frames:  # often the same picture for all
            if id(frame) not in encoded:
                encoded[id(frame)] = encode_first_frame(self.tokenizer, frame, self.model.config)
        return [replace(one, first_frame_labels=encoded[id(frame)]) for one, frame in zip(asked, first_frames)]

    def generate(self, conditions: Sequence[Condition], settings: SamplingSettings, *, seed: int, first_draw: int = 0,
                 observe: Callable[[StepMaps], None] | None = None) -> Generated:
        """`grn_scale.sampling.generate` with this model."""
        return generate(self.model, conditions, settings, seed=seed, first_draw=first_draw, observe=observe)

    def decode(self, generated: Generated) -> Iterator[np.ndarray]:
        """uint8 RGB [T, H, W, 3] of each sample, in order."""
        return decode_clips(self.tokenizer, generated.labels, self.model.config)

    @staticmethod
    def _check(frames: int, height: int, width: int, given: bool) -> None:
        if frames < 1 or frames != whole_groups(frames):
            raise ConfigError(f"{frames} frames are asked for, but the tokenizer makes 1 + 4k: "
                              f"{max(1, whole_groups(frames))} would do")
        if given and frames == 1:
            raise ConfigError("a first frame is given, but 1 frame leaves nothing to sample; 5 is the fewest")
        if min(height, width) < 1 or height % CELL_PIXELS or width % CELL_PIXELS:
            near = "x".join(str(max(1, round(side / CELL_PIXELS)) * CELL_PIXELS) for side in (height, width))
            raise ConfigError(f"{height}x{width} pixels are asked for, but both sides must be multiples of "
                              f"{CELL_PIXELS}: {near} is near")


def task_of(frames: int, first_frame: bool) -> str:
    """T2I, T2V or I2V."""
    return "I2V" if first_frame else "T2I" if frames == 1 else "T2V"
