"""The class-to-image sampler: as `sampling.sampler`, but at scheduled signal levels, and for a class, not a text.

    x = R (random labels, drawn once);  t = 0
    for each step:  y ~ network(x, t, class);  x = y where a mask of mean t_next says so, else R;  t = t_next
    the result is the last x                                                          (GRN reference, section 7)

A finished image leaves the batch. Every random number is keyed by (seed, number of the image, step, label), so an
image does not depend on what it is sampled together with (matrix products of another size round differently, which
can turn a label whose random number lies within rounding of its probability).

Legend: B images under way, N tokens an image, P = B * N, D labels a token, K classes a label.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from grn_scale import keyed
from grn_scale.class_to_image.guidance import Prediction, predict
from grn_scale.class_to_image.model import ClassGRN
from grn_scale.class_to_image.schedule import Schedule
from grn_scale.config.class_schema import ClassSamplingSettings
from grn_scale.errors import UserError
from grn_scale.sampling.choice import WORDS, choose, probabilities, relative_entropy
from grn_scale.sampling.trace import Draws, Trace, batched

MAX_IMAGES = 64
"""Images in one call of the network; guided ones count once."""
DECISIONS = ("decision_entropy", "raw_dynamic_steps", "dynamic_steps")
PER_IMAGE = ("labels", "initial_labels", "final", *DECISIONS)
"""Names of the trace with one value for each image; every other one has a value for each step."""


@dataclass(frozen=True, eq=False)
class ClassSamples:
    """What `generate` gives back."""

    labels: torch.Tensor
    """uint8 [images, D, h, w]"""
    steps: torch.Tensor
    """int64 [images]: steps that each took."""
    trace: dict[str, torch.Tensor | list[torch.Tensor]]
    """With record=True the values of every step (see `generate`), else empty."""


@dataclass(frozen=True, eq=False)
class ImageMaps:
    """The images under way after one step, as an observer sees them (see `sampling.sampler.StepMaps`)."""

    step: int
    samples: tuple[int, ...]
    """Places in the call's list of class ids."""
    shares: tuple[float, ...]
    """Signal level of each image's mixed map."""
    ended: frozenset[int]
    """Those of `samples` for which this was the last step."""
    _predicted: torch.Tensor
    _mixed: torch.Tensor
    _grid: int

    def predictions(self) -> list[torch.Tensor]:
        """uint8 [D, 1, h, w] of each image: y, this step's prediction."""
        return list(_pictures(self._predicted, self._grid).unsqueeze(2))

    def mixed(self) -> list[torch.Tensor]:
        """uint8 [D, 1, h, w] of each image: x, predictions and noise; after the last step the image itself."""
        return list(_pictures(self._mixed, self._grid).unsqueeze(2))


def generate(model: ClassGRN, class_ids: Sequence[int], settings: ClassSamplingSettings, *,
             draws: Mapping[str, torch.Tensor | Sequence[torch.Tensor]] | None = None, record: bool = False,
             seed: int = 0, first_draw: int = 0, max_images: int = MAX_IMAGES,
             observe: Callable[[ImageMaps], None] | None = None) -> ClassSamples:
    """Sample an image of each class id with the model, on its device and in its precision.

    draws: replaces the random numbers; initial_labels uint8 [images, D, h, w], sampled_labels and use_predict_mask
    uint8 [steps, images, D, h, w], or lists as in a trace; what lies behind an image's last step is not read.
    seed, first_draw: place b of the list is image number first_draw + b of the seed.
    record: the trace then holds, [steps, images, ...] or a list of [steps of the image, ...] where images take
    different numbers of steps: t, t_next, tau, cfg_used, entropy, cond_logits and uncond_logits [K, D, h, w], probs
    [D, h, w, K], sampled_labels, use_predict_mask, labels_in, labels_out; and [images, ...]: labels (the class ids),
    initial_labels, final, and with complexity-aware sampling decision_entropy, raw_dynamic_steps, dynamic_steps.
    max_images: longer lists are sampled in parts. observe: called after every step.
    Raises UserError for a class id that the model does not know.
    """
    for n in class_ids:
        if not 0 <= n <= model.config.null_class:
            raise UserError(f"class id {n} is not known to this model: 0 .. {model.config.num_classes - 1}, and "
                            f"{model.config.null_class} for no class")
    given = None if draws is None else Draws(draws)
    trace = _ImageTrace() if record else None
    labels: list[torch.Tensor] = []
    steps: list[int] = []
    with torch.inference_mode():
        for start in range(0, len(class_ids), max_images):
            members = range(start, min(start + max_images, len(class_ids)))
            run = _Run(model, settings, seed, first_draw, given, trace, observe)
            for image, taken in run(class_ids, members):
                labels.append(image)
                steps.append(taken)
    shape = (0, model.config.label_channels, model.config.grid, model.config.grid)
    # Copies made outside the inference mode are ordinary tensors.
    return ClassSamples(torch.stack(labels) if labels else torch.zeros(shape, dtype=torch.uint8),
                        torch.tensor(steps, dtype=torch.int64), trace.result() if trace else {})


@dataclass
class _Batch:
    """Images under way. Label maps are uint8 [B, N, D]."""

    members: torch.Tensor
    """int64 [B]: places in the call's list."""
    classes: torch.Tensor
    """int64 [B] on the model's device."""
    noise: torch.Tensor
    mixed: torch.Tensor
    times: torch.Tensor
    """fp32 [B] on the host: signal level of `mixed`."""
    after: torch.Tensor
    """int64 [B] on the host: steps from the deciding one on; the most there are until it comes."""

    def keep(self, stay: torch.Tensor) -> _Batch:
        """The images whose place is True in `stay` (bool [B], on the host)."""
        rows = stay.nonzero()[:, 0]
        there = rows.to(self.mixed.device)
        return _Batch(self.members[rows], self.classes[there], self.noise[there], self.mixed[there],
                      self.times[rows], self.after[rows])


class _Run:
    """Images sampled together, from noise to the end."""

    def __init__(self, model: ClassGRN, settings: ClassSamplingSettings, seed: int, first_draw: int,
                 draws: Draws | None, trace: _ImageTrace | None, observe: Callable[[ImageMaps], None] | None) -> None:
        self.model, self.schedule, self.seed, self.first_draw = model, Schedule(settings), seed, first_draw
        self.draws, self.trace, self.observe = draws, trace, observe
        config = model.config
        self.tokens, self.channels, self.classes = config.tokens, config.label_channels, config.classes
        self.counter = torch.arange(self.tokens * self.channels, device=model.device).view(self.tokens, self.channels)

    def __call__(self, class_ids: Sequence[int], members: Sequence[int]) -> list[tuple[torch.Tensor, int]]:
        """(labels uint8 [D, h, w] on the CPU, steps taken) of each member, in their order."""
        batch = self._start(class_ids, members)
        done: dict[int, tuple[torch.Tensor, int]] = {}
        for step in range(self.schedule.steps):
            predicted = self._step(batch, step)
            ended = self.schedule.ended(step, batch.times)
            if self.observe is not None:
                self.observe(ImageMaps(step, tuple(batch.members.tolist()), tuple(batch.times.tolist()),
                                       frozenset(batch.members[ended].tolist()), predicted, batch.mixed,
                                       self.model.config.grid))
            for row in ended.nonzero()[:, 0].tolist():
                n = int(batch.members[row])
                done[n] = (self._picture(batch.mixed[row]).cpu(), step + 1)
                if self.trace:
                    self.trace.add("final", n, done[n][0])
            if ended.all():
                break
            if ended.any():
                batch = batch.keep(~ended)
        return [done[n] for n in members]

    def _start(self, class_ids: Sequence[int], members: Sequence[int]) -> _Batch:
        device = self.model.device
        places = torch.tensor(list(members))
        if self.draws:
            noise = torch.stack([self.draws.initial(n) for n in members]).to(device, torch.uint8)
            config = self.model.config
            wanted = (len(members), self.channels, config.grid, config.grid)
            if tuple(noise.shape) != wanted:
                raise ValueError(f"initial_labels are {list(noise.shape)}, but must be {list(wanted)}")
            noise = noise.flatten(2).transpose(1, 2)
        else:
            random = self._random(places, "sample noise")
            noise = (random >> (32 - self.classes.bit_length() + 1)).to(torch.uint8)
        classes = torch.tensor([class_ids[n] for n in members], device=device)
        rule = self.schedule.rule
        most = self.schedule.steps - (rule.wp if rule else 0)
        if self.trace:
            for row, n in enumerate(members):
                self.trace.add("labels", n, classes[row])
                self.trace.add("initial_labels", n, self._picture(noise[row]))
        return _Batch(places, classes, noise, noise, torch.zeros(len(members)), torch.full((len(members),), most))

    def _step(self, batch: _Batch, step: int) -> torch.Tensor:
        """The prediction, uint8 [B, N, D], of one step of every image; the batch's mixed map and times become those
        after it."""
        schedule, rule = self.schedule, self.schedule.rule
        guidance = schedule.guidances(batch.times)
        prediction = predict(self.model, self._picture(batch.mixed), batch.times, batch.classes, guidance,
                             always_both=self.trace is not None)
        entropy = None
        if self.trace or (rule and step == rule.wp):
            entropy = relative_entropy(prediction.conditional).double().view(len(batch.members), -1).mean(dim=1).cpu()
        if rule and step == rule.wp:
            self._decide(batch, entropy)
        times, temperature = schedule.next_times(step, batch.after), schedule.temperatures(step, batch.after)
        temperature_P = temperature.repeat_interleave(self.tokens).to(batch.mixed.device)
        if self.draws:
            predicted, mask = self._given(batch, "sampled_labels", step), self._given(batch, "use_predict_mask", step)
            mask = mask.bool()
        else:
            random = self._random(batch.members, "sample label", step).flatten(0, 1)
            predicted = choose(prediction.scores, temperature_P, random).view_as(batch.mixed)
            threshold = (times.double() * WORDS).long().to(batch.mixed.device)
            mask = self._random(batch.members, "sample mask", step) < threshold[:, None, None]
        fed = (batch.times, batch.mixed)
        batch.mixed, batch.times = torch.where(mask, predicted, batch.noise), times
        if self.trace:
            self._record(batch, fed, prediction, predicted, mask, guidance, temperature, entropy)
        return predicted

    def _decide(self, batch: _Batch, entropy: torch.Tensor) -> None:
        values = entropy.tolist()
        batch.after = torch.tensor([self.schedule.after(value) for value in values])
        if self.trace:
            for n, value, after in zip(batch.members.tolist(), values, batch.after.tolist()):
                for name, number in zip(DECISIONS, (value, self.schedule.raw_steps(value), after)):
                    self.trace.add(name, n, torch.tensor(number, dtype=torch.float32))

    def _random(self, members: torch.Tensor, purpose: str, *key: int) -> torch.Tensor:
        """int64 [B, N, D] in [0, 2^32), keyed by seed, purpose, image and label, as the text sampler's are."""
        keys = [keyed.as_int64(keyed.key64(self.seed, purpose, self.first_draw + n, *key)) for n in members.tolist()]
        return keyed.hash32(torch.tensor(keys, device=self.counter.device)[:, None, None], self.counter)

    def _given(self, batch: _Batch, name: str, step: int) -> torch.Tensor:
        maps = torch.stack([self.draws.step(name, n, step) for n in batch.members.tolist()])
        return maps.to(batch.mixed.device, torch.uint8).flatten(2).transpose(1, 2)

    def _picture(self, labels: torch.Tensor) -> torch.Tensor:
        """[..., D, h, w] of [..., N, D]"""
        return _pictures(labels, self.model.config.grid)

    def _record(self, batch: _Batch, fed: tuple[torch.Tensor, torch.Tensor], prediction: Prediction,
                predicted: torch.Tensor, mask: torch.Tensor, guidance: torch.Tensor, temperature: torch.Tensor,
                entropy: torch.Tensor) -> None:
        logits = self.model.final_layer.logits(prediction.hidden).unflatten(0, (-1, self.tokens))
        count = len(batch.members)
        probs = probabilities(prediction.scores, temperature.repeat_interleave(self.tokens).to(mask.device))
        values = {
            "t": fed[0], "t_next": batch.times, "tau": temperature, "cfg_used": guidance, "entropy": entropy.float(),
            "cond_logits": self._picture(logits[:count].permute(0, 2, 1, 3)),
            "uncond_logits": self._picture(logits[count:].permute(0, 2, 1, 3)),
            "probs": self._picture(probs.unflatten(0, (-1, self.tokens)).permute(0, 3, 1, 2)).permute(0, 2, 3, 4, 1),
            "sampled_labels": self._picture(predicted), "use_predict_mask": self._picture(mask.to(torch.uint8)),
            "labels_in": self._picture(fed[1]), "labels_out": self._picture(batch.mixed)}
        for row, n in enumerate(batch.members.tolist()):
            for name, value in values.items():
                self.trace.add(name, n, value[row])


def _pictures(labels: torch.Tensor, grid: int) -> torch.Tensor:
    """[..., D, h, w] of [..., N, D]"""
    return labels.transpose(-1, -2).unflatten(-1, (grid, -1))


class _ImageTrace(Trace):
    """Values in the shapes of the recorded class traces: the images' axis stays, also for a single one."""

    def result(self) -> dict[str, torch.Tensor | list[torch.Tensor]]:
        result = {}
        for name, by_image in self._values.items():
            images = [by_image[n] for n in sorted(by_image)]
            if name in PER_IMAGE:
                result[name] = batched([values[0] for values in images], 0)
            else:
                result[name] = batched([torch.stack(values) for values in images], 1)
        return result
