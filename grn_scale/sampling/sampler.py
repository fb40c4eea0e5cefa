"""The refinement sampler: labels out of noise, by predicting all of them again at every step.

    x = R (random labels, drawn once)
    for each step:  y ~ network(x);  x = y where a mask says so, else R;  the mask grows along a schedule
    the result is the y of the last step                                            (GRN reference, section 6)

Samples under way run as one packed call, each at its own step. One that ends leaves at once and the next waiting
sample takes its place, so a step costs the samples that still need it, whatever their numbers of steps are.

Every random number is keyed by (seed, number of the sample, step, label), so what a sample becomes does not depend on
what it is sampled together with. (Matrix products of another size round differently: that can turn a label whose
random number lies within rounding of its probability, about one in a million.)

Legend: P predicted tokens of all samples under way, D labels a token, K classes a label, B samples of the call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from grn_scale import hbq, keyed
from grn_scale.errors import UserError
from grn_scale.model.text_cache import TextCache
from grn_scale.model.transformer import GRN
from grn_scale.sampling.choice import WORDS, choose, probabilities, relative_entropy
from grn_scale.sampling.condition import Condition, SamplingSettings
from grn_scale.sampling.guidance import GuidedNetwork, Prediction
from grn_scale.sampling.maps import StepMaps, flatten_map, unflatten_map, whole_map
from grn_scale.sampling.steps import (
    END_TOLERANCE,
    adaptive_progress,
    is_last,
    predicted_share,
    steps_after,
    temperature_factor,
)
from grn_scale.sampling.trace import Draws, Trace, batched
from grn_scale.sampling.waiting import Waiting

MAX_TOKENS = 4096
"""Tokens under way in both branches; on a CPU larger calls are slower."""


@dataclass(frozen=True, eq=False)
class Generated:
    """What `generate` gives back."""

    labels: torch.Tensor | list[torch.Tensor]
    """uint8 [B, D, t, h, w], a given first frame in front; a list of [D, t, h, w] where the shapes differ."""
    steps: list[int]
    """Steps that each sample took."""
    entropies: list[float | None]
    """With adaptive sampling the relative entropy that each sample's number of steps followed from (None for one that
    ended before the decision); else empty."""
    trace: dict[str, torch.Tensor | list[torch.Tensor]]
    """With record=True the values of every step (see `Trace.result`), else empty."""


def generate(model: GRN, conditions: Sequence[Condition], settings: SamplingSettings, *,
             draws: Mapping[str, torch.Tensor | Sequence[torch.Tensor]] | None = None, record: bool = False,
             seed: int = 0, first_draw: int = 0, max_tokens: int = MAX_TOKENS,
             observe: Callable[[StepMaps], None] | None = None) -> Generated:
    """Sample every condition with the model, on its device and in its precision.

    draws: replaces the random numbers; initial_labels uint8 [B, D, t, h, w], sampled_labels and use_predict_mask
    uint8 [S, B, D, t, h, w] (t without a given first frame), or lists as in a trace.
    seed, first_draw: condition b is sample number first_draw + b of the seed.
    record: keep every step's values in the result's trace, unconditional logits of unguided steps included (under
    layout v2 without guidance only where there are negative texts).
    max_tokens: so many tokens run in one packed call (a longer sample alone); the other conditions wait their turn.
    observe: called after every packed call, once for each step that samples have taken in it.
    Raises UserError where a condition does not fit the model.
    """
    guided = settings.guidance != 1.0
    both = record and (guided or (model.config.layout == "v2" and all(
        condition.negative_text_states is not None for condition in conditions)))
    for condition in conditions:
        condition.check(model.config, guided or both)
    run = Refinement(model, conditions, settings, seed, first_draw, None if draws is None else Draws(draws),
                     Trace() if record else None, both)
    with torch.inference_mode():
        run(Waiting([condition.tokens(guided or both) for condition in conditions], max_tokens), observe)
    samples = [run.ended[n] for n in range(len(conditions))]
    # Copies made outside the inference mode are ordinary tensors.
    return Generated(batched([sample.labels for sample in samples], 0) if samples else [],
                     [sample.step for sample in samples],
                     [sample.entropy for sample in samples] if settings.adaptive else [],
                     run.trace.result() if run.trace else {})


@dataclass(eq=False)
class _Sample:
    """A sample under way. Its maps are uint8 [tokens, D], tokens in natural order."""

    number: int
    """Place in the call's list of conditions."""
    condition: Condition
    noise: torch.Tensor
    mixed: torch.Tensor
    step: int = 0
    """Steps taken."""
    share: float = 0.0
    """Of predictions in `mixed`, counted."""
    after: int | None = None
    """Steps it gets after the decision of adaptive sampling; None before it, and without it."""
    entropy: float | None = None
    """What the decision followed from."""


@dataclass(frozen=True, eq=False)
class _Ended:
    labels: torch.Tensor
    """uint8 [D, t, h, w] on the CPU."""
    step: int
    """Steps it took."""
    entropy: float | None


class _Batch:
    """Samples that run together, until one of them ends."""

    def __init__(self, model: GRN, samples: Sequence[_Sample], texts: TextCache | None) -> None:
        self.samples = tuple(samples)
        self.network = GuidedNetwork(model, [sample.condition for sample in samples], texts)
        self.token_P = torch.cat([_token_numbers(sample.condition) for sample in samples]).to(self.network.device)
        self.noise_PD = torch.cat([sample.noise for sample in samples])

    def by_sample(self, table: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The rows of each sample of a table [P, ...]."""
        return table.split(self.network.predicted_counts)

    def by_token(self, numbers: Sequence[float | int]) -> torch.Tensor:
        """[P] int64 or fp32: the number of each token's sample."""
        return torch.tensor(numbers, device=self.network.device)[self.network.sample_P]


class Refinement:
    """One run of the sampler over a list of conditions."""

    def __init__(self, model: GRN, conditions: Sequence[Condition], settings: SamplingSettings, seed: int,
                 first_draw: int, draws: Draws | None, trace: Trace | None, both: bool) -> None:
        self.model, self.conditions, self.settings = model, conditions, settings
        self.seed, self.first_draw, self.draws, self.trace, self.both = seed, first_draw, draws, trace, both
        self.channels, self.classes = model.config.label_channels, model.config.classes
        self.texts = TextCache(model) if model.config.layout == "v1" else None
        self.ended: dict[int, _Ended] = {}
        """By place in the list of conditions."""

    def __call__(self, waiting: Waiting, observe: Callable[[StepMaps], None] | None) -> None:
        """Run until every sample has ended."""
        going: list[_Sample] = []
        while True:
            going += [self._begin(n) for n in waiting.admit(sample.number for sample in going)]
            if not going:
                return
            batch = _Batch(self.model, going, self.texts)
            while len(going) == len(batch.samples):
                predicted = self._step(batch)
                if observe is not None:
                    self._show(batch, predicted, observe)
                going = [sample for sample in batch.samples if sample.number not in self.ended]

    def _begin(self, n: int) -> _Sample:
        condition = self.conditions[n]
        device = self.model.word_embed.weight.device
        token_P = _token_numbers(condition).to(device)
        if self.draws:
            noise = flatten_map(self.draws.initial(n), device)
            if noise.shape != (len(token_P), self.channels):
                raise ValueError(f"initial_labels have {list(noise.shape)} tokens and labels, "
                                 f"not {[len(token_P), self.channels]}")
        else:
            key = self._key("sample noise", n)
            random = self._hash(torch.tensor([key], device=device), token_P)
            noise = (random >> (32 - self.classes.bit_length() + 1)).to(torch.uint8)
        if self.trace:
            self.trace.add("initial_labels", n, unflatten_map(noise, condition))
        return _Sample(n, condition, noise, mixed=noise)

    def _step(self, batch: _Batch) -> tuple[torch.Tensor, ...]:
        """Each sample's prediction y [tokens, D] of one step, after which they stand as the step leaves them."""
        settings, samples = self.settings, batch.samples
        fed = [sample.share for sample in samples]
        guidance = [settings.guidance_at(share) for share in fed]
        mixed_PD = torch.cat([sample.mixed for sample in samples])
        prediction = batch.network(mixed_PD, fed, guidance, always_both=self.both)
        states = batch.by_sample(prediction.conditional_PC)
        if settings.adaptive:
            for sample, own in zip(samples, states):
                if sample.step == settings.adaptive.wp:
                    self._decide(sample, own)
        temperatures = [self._temperature(sample) for sample in samples]
        temperature_P = batch.by_token(temperatures)
        if self.draws:
            predicted_PD = self._given(batch, "sampled_labels")
        else:
            predicted_PD = choose(prediction.scores, temperature_P, self._random(batch, "sample label"))
        targets = [self._target(sample) for sample in samples]
        if self.draws:
            mask_PD = self._given(batch, "use_predict_mask").bool()
        else:
            below_P = batch.by_token([int(target * WORDS) for target in targets])
            mask_PD = self._random(batch, "sample mask") < below_P[:, None]
        mixed = batch.by_sample(torch.where(mask_PD, predicted_PD, batch.noise_PD))
        counts = torch.zeros(len(samples), dtype=torch.int64, device=mask_PD.device)
        counts = counts.index_add(0, batch.network.sample_P, mask_PD.sum(dim=1)).tolist()
        for sample, own, count in zip(samples, mixed, counts):
            # In fp32 like the reference's mean: whether guidance acts is asked of this number.
            sample.mixed, sample.share = own, torch.tensor(count / own.numel(), dtype=torch.float32).item()
        if self.trace:
            self._record(batch, prediction, predicted_PD, mask_PD, fed, guidance, targets, temperature_P)
        predicted = batch.by_sample(predicted_PD)
        tolerance = END_TOLERANCE[self.model.config.layout]
        for sample, share, own in zip(samples, fed, predicted):
            sample.step += 1
            if is_last(sample.step - 1, self._steps(sample), share, tolerance):
                self._end(sample, own)
        return predicted

    def _end(self, sample: _Sample, predicted: torch.Tensor) -> None:
        # A copy of its own, where a view would keep the whole batch's table in memory.
        labels = whole_map(predicted, sample.condition).to("cpu", copy=True, memory_format=torch.contiguous_format)
        self.ended[sample.number] = _Ended(labels, sample.step, sample.entropy)
        if self.trace:
            dequantise = hbq.dequantize_bits if self.classes == 2 else hbq.dequantize_index
            self.trace.add("final_latent", sample.number, dequantise(labels[None], self.model.config.rounds)[0])
            if self.settings.adaptive and sample.entropy is None:
                self.trace.add("decision_entropy", sample.number, math.nan)
                self.trace.add("dynamic_steps", sample.number, math.nan)

    def _show(self, batch: _Batch, predicted: Sequence[torch.Tensor], observe: Callable[[StepMaps], None]) -> None:
        for step in sorted({sample.step for sample in batch.samples}):
            same = [(sample, own) for sample, own in zip(batch.samples, predicted) if sample.step == step]
            samples = [sample for sample, _ in same]
            observe(StepMaps(
                step - 1, tuple(sample.number for sample in samples), tuple(sample.share for sample in samples),
                frozenset(sample.number for sample in samples if sample.number in self.ended),
                tuple(sample.condition for sample in samples), tuple(own for _, own in same),
                tuple(sample.mixed for sample in samples)))

    def _steps(self, sample: _Sample) -> int:
        """Steps of a sample in all, as far as it is known."""
        return self.settings.most_steps if sample.after is None else self.settings.adaptive.wp + sample.after

    def _target(self, sample: _Sample) -> float:
        settings = self.settings
        wp = settings.adaptive.wp if settings.adaptive else 0
        place = adaptive_progress(sample.step, settings.tmax, wp, sample.after)
        return predicted_share(place, settings.shift, settings.end_fraction)

    def _temperature(self, sample: _Sample) -> float:
        rule = self.settings.adaptive
        if rule is None or not rule.temperature_factor or sample.after is None:
            return self.settings.temperature
        return self.settings.temperature * temperature_factor(sample.after)

    def _decide(self, sample: _Sample, states_PC: torch.Tensor) -> None:
        """Adaptive sampling: fix the sample's number of steps."""
        sample.entropy = self._entropy(states_PC)
        if math.isnan(sample.entropy):
            raise UserError(f"sample {sample.number}: the network's prediction is not a number, so no number of steps "
                            "follows from it; check the weights (grn-scale inspect), and the precision")
        sample.after = steps_after(sample.entropy, self.settings.adaptive, self.settings.tmax)
        if self.trace:
            self.trace.add("decision_entropy", sample.number, sample.entropy)
            self.trace.add("dynamic_steps", sample.number, float(sample.after))

    def _entropy(self, states_PC: torch.Tensor) -> float:
        """Mean relative entropy of a sample's conditional prediction."""
        return relative_entropy(self.model.head(states_PC)).double().mean().item()

    def _key(self, purpose: str, number: int, *step: int) -> int:
        return keyed.as_int64(keyed.key64(self.seed, purpose, self.first_draw + number, *step))

    def _hash(self, key_P: torch.Tensor, token_P: torch.Tensor) -> torch.Tensor:
        """int64 [P, D] in [0, 2^32), for the number of each label inside its sample."""
        counter_PD = token_P[:, None] * self.channels + torch.arange(self.channels, device=token_P.device)
        return keyed.hash32(key_P[:, None], counter_PD)

    def _random(self, batch: _Batch, purpose: str) -> torch.Tensor:
        """int64 [P, D] in [0, 2^32), keyed by seed, purpose, sample, its step and label."""
        keys = [self._key(purpose, sample.number, sample.step) for sample in batch.samples]
        return self._hash(batch.by_token(keys), batch.token_P)

    def _given(self, batch: _Batch, name: str) -> torch.Tensor:
        return torch.cat([flatten_map(self.draws.step(name, sample.number, sample.step), batch.network.device)
                          for sample in batch.samples])

    def _record(self, batch: _Batch, prediction: Prediction, predicted_PD: torch.Tensor, mask_PD: torch.Tensor,
                fed: Sequence[float], guidance: Sequence[float], targets: Sequence[float],
                temperature_P: torch.Tensor) -> None:
        """Add the step to the trace; the samples already hold its mixed map and share."""
        head = self.model.head
        tables = {"cond_logits": head.logits(prediction.conditional_PC),
                  "probs": probabilities(prediction.scores, temperature_P)}
        if self.both:
            tables["uncond_logits"] = head.logits(prediction.unconditional_UC)
        by_sample = {name: batch.by_sample(table) for name, table in tables.items()}
        maps = {"sampled_labels": batch.by_sample(predicted_PD),
                "use_predict_mask": batch.by_sample(mask_PD.to(torch.uint8)),
                "mixed_labels_out": [sample.mixed for sample in batch.samples]}
        states = batch.by_sample(prediction.conditional_PC)
        for i, sample in enumerate(batch.samples):
            numbers = {"cur_pt": fed[i], "next_pt_target": targets[i], "next_pt_realised": sample.share,
                       "cfg_used": guidance[i], "entropy": self._entropy(states[i])}
            for name, value in numbers.items():
                self.trace.add(name, sample.number, float(value))
            for name, values in by_sample.items():
                self.trace.add(name, sample.number, values[i])
            for name, values in maps.items():
                self.trace.add(name, sample.number, unflatten_map(values[i], sample.condition))


def _token_numbers(condition: Condition) -> torch.Tensor:
    """int64: number of each predicted token in its clip, a given first frame counted too, as in training's noise."""
    grid = condition.grid(condition.text_states)
    return torch.arange(grid.visual_tokens - grid.predicted_tokens, grid.visual_tokens)
