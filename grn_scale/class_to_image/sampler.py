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
from grn_scale.class_to_image.model import ClassGRN
from grn_scale.class_to_image.schedule import ClassSamplingSettings
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


def generate(model: ClassGRN, class_ids: Sequence[int], settings: ClassSamplingSettings, *,
             draws: Mapping[str, torch.Tensor | Sequence[torch.Tensor]] | None = None, record: bool = False,
             seed: int = 0, first_draw: int = 0, max_images: int = MAX_IMAGES,
             observe: Callable[[int, tuple[int, ...]], None] | None = None) -> ClassSamples:
    """Sample an image of each class id with the model, on its device and in its precision.

    draws: replaces the random numbers; initial_labels uint8 [images, D, h, w], sampled_labels and use_predict_mask
    uint8 [steps, images, D, h, w], or lists as in a trace; what lies behind an image's last step is not read.
    seed, first_draw: place b of the list is image number first_draw + b of the seed.
    record: the trace then holds, [steps, images, ...] or a list of [steps of the image, ...] where images take
    different numbers of steps: t, t_next, tau, cfg_used, entropy, cond_logits and uncond_logits [K, D, h, w], probs
    [D, h, w, K], sampled_labels, use_predict_mask, labels_in, labels_out; and [images, ...]: labels (the class ids),
    initial_labels, final, and with complexity-aware sampling decision_entropy, raw_dynamic_steps, dynamic_steps.
    max_images: longer lists are sampled in parts. observe: called after every step with its number and the places in
    the list that took it.
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


@dataclass(frozen=True)
class _Prediction:
    scores: torch.Tensor
    """After guidance, [P, D, K] or [P, D]."""
    conditional: torch.Tensor
    """Scores without guidance."""
    hidden: torch.Tensor
    """[P, C] of the conditional branch, then of the unconditional one of the guided images."""


class _Run:
    """Images sampled together, from noise to the end."""

    def __init__(self, model: ClassGRN, settings: ClassSamplingSettings, seed: int, first_draw: int,
                 draws: Draws | None, trace: _ImageTrace | None,
                 observe: Callable[[int, tuple[int, ...]], None] | None) -> None:
        self.model, self.settings, self.draws, self.trace, self.observe = model, settings, draws, trace, observe
        self.seed, self.first_draw = seed, first_draw
        config = model.config
        self.tokens, self.channels, self.classes = config.tokens, config.label_channels, config.classes
        self.counter = torch.arange(self.tokens * self.channels, device=model.device).view(self.tokens, self.channels)

    def __call__(self, class_ids: Sequence[int], members: Sequence[int]) -> list[tuple[torch.Tensor, int]]:
        """(labels uint8 [D, h, w] on the CPU, steps taken) of each member, in their order."""
        batch = self._start(class_ids, members)
        done: dict[int, tuple[torch.Tensor, int]] = {}
        for step in range(self.settings.steps):
            self._step(batch, step)
            if self.observe is not None:
                self.observe(step, tuple(batch.members.tolist()))
            ended = self.settings.ended(step, batch.times)
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
        rule = self.settings.adaptive
        most = self.settings.steps - (rule.wp if rule else 0)
        if self.trace:
            for row, n in enumerate(members):
                self.trace.add("labels", n, classes[row])
                self.trace.add("initial_labels", n, self._picture(noise[row]))
        return _Batch(places, classes, noise, noise, torch.zeros(len(members)), torch.full((len(members),), most))

    def _step(self, batch: _Batch, step: int) -> None:
        """One step of every image; the batch's mixed map and times become those after it."""
        settings, rule = self.settings, self.settings.adaptive
        guidance = settings.guidances(batch.times)
        prediction = self._predict(batch, guidance)
        entropy = None
        if self.trace or (rule and step == rule.wp):
            entropy = relative_entropy(prediction.conditional).double().view(len(batch.members), -1).mean(dim=1).cpu()
        if rule and step == rule.wp:
            self._decide(batch, entropy)
        times, temperature = settings.next_times(step, batch.after), settings.temperatures(step, batch.after)
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

    def _predict(self, batch: _Batch, guidance: torch.Tensor) -> _Prediction:
        """Both branches in one call; an image whose guidance is 1 has no unconditional one, unless it is recorded."""
        device = batch.mixed.device
        guided = torch.arange(len(guidance)) if self.trace else (guidance != 1).nonzero()[:, 0]
        rows = guided.to(device)
        labels = self._picture(torch.cat((batch.mixed, batch.mixed[rows])))
        times = torch.cat((batch.times, batch.times[guided])).to(device)
        nothing = torch.full((len(guided),), self.model.config.null_class, device=device)
        hidden = self.model.hidden(labels, times, torch.cat((batch.classes, nothing)))
        scores = self.model.final_layer.scores(hidden)
        count = len(batch.members) * self.tokens
        conditional = scores[:count]
        if not len(guided):
            return _Prediction(conditional, conditional, hidden)
        asked = conditional.unflatten(0, (-1, self.tokens))
        weight = guidance[guided].to(device).view(-1, *[1] * (asked.dim() - 1))
        unconditional = scores[count:].unflatten(0, (-1, self.tokens))
        # At weight 1 the formula gives the conditional scores up to rounding only.
        mixed = torch.where(weight == 1, asked[rows], unconditional + weight * (asked[rows] - unconditional))
        return _Prediction(asked.index_copy(0, rows, mixed).flatten(0, 1), conditional, hidden)

    def _decide(self, batch: _Batch, entropy: torch.Tensor) -> None:
        values = entropy.tolist()
        batch.after = torch.tensor([self.settings.after(value) for value in values])
        if self.trace:
            for n, value, after in zip(batch.members.tolist(), values, batch.after.tolist()):
                for name, number in zip(DECISIONS, (value, self.settings.raw_steps(value), after)):
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
        return labels.transpose(-1, -2).unflatten(-1, (self.model.config.grid, -1))

    def _record(self, batch: _Batch, fed: tuple[torch.Tensor, torch.Tensor], prediction: _Prediction,
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
