"""The refinement sampler: labels out of noise, by predicting all of them again at every step.

    x = R (random labels, drawn once)
    for each step:  y ~ network(x);  x = y where a mask says so, else R;  the mask grows along a schedule
    the result is the y of the last step                                            (GRN reference, section 6)

Every random number is keyed by (seed, number of the sample, step, label), so what a sample becomes does not depend on
what it is sampled together with. (Matrix products of another size round differently: that can turn a label whose
random number lies within rounding of its probability, about one in a million.)

Legend: P predicted tokens of all samples under way, D labels a token, K classes a label, B samples of the call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from grn_scale import hbq, keyed
from grn_scale.model.transformer import GRN
from grn_scale.sampling.choice import WORDS, choose, probabilities, relative_entropy
from grn_scale.sampling.condition import Condition, SamplingSettings
from grn_scale.sampling.guidance import GuidedNetwork, Prediction
from grn_scale.sampling.maps import flatten_maps, unflatten_maps
from grn_scale.sampling.steps import (
    END_TOLERANCE,
    adaptive_progress,
    is_last,
    predicted_share,
    steps_after,
    temperature_factor,
)
from grn_scale.sampling.trace import Draws, Trace, batched

MAX_TOKENS = 8192
"""Tokens of both branches in one packed call; on a CPU larger calls are no quicker."""


@dataclass(frozen=True, eq=False)
class Generated:
    """What `generate` gives back."""

    labels: torch.Tensor | list[torch.Tensor]
    """uint8 [B, D, t, h, w], a given first frame in front; a list of [D, t, h, w] where the shapes differ."""
    steps: list[int]
    """Steps that each sample took."""
    entropies: list[float]
    """With adaptive sampling the relative entropy that each sample's number of steps followed from; else empty."""
    trace: dict[str, torch.Tensor | list[torch.Tensor]]
    """With record=True the values of every step (see `Trace.result`), else empty."""


@dataclass(frozen=True, eq=False)
class StepMaps:
    """The samples under way after one step, as an observer sees them."""

    step: int
    samples: tuple[int, ...]
    """Places in the call's list of conditions."""
    shares: tuple[float, ...]
    """Share of predictions in each sample's mixed map."""
    ended: frozenset[int]
    """Those of `samples` for which this was the last step."""
    _conditions: tuple[Condition, ...]
    _predicted: torch.Tensor
    _mixed: torch.Tensor

    def predictions(self) -> list[torch.Tensor]:
        """uint8 [D, t, h, w] of each sample: y, this step's prediction."""
        return unflatten_maps(self._predicted, self._conditions, whole=True)

    def mixed(self) -> list[torch.Tensor]:
        """uint8 [D, t, h, w] of each sample: x, predictions and noise, which the next step reads."""
        return unflatten_maps(self._mixed, self._conditions, whole=True)


def generate(model: GRN, conditions: Sequence[Condition], settings: SamplingSettings, *,
             draws: Mapping[str, torch.Tensor | Sequence[torch.Tensor]] | None = None, record: bool = False,
             seed: int = 0, first_draw: int = 0, max_tokens: int = MAX_TOKENS,
             observe: Callable[[StepMaps], None] | None = None) -> Generated:
    """Sample every condition with the model, on its device and in its precision.

    draws: replaces the random numbers; initial_labels uint8 [B, D, t, h, w], sampled_labels and use_predict_mask
    uint8 [S, B, D, t, h, w] (t without a given first frame), or lists as in a trace.
    seed, first_draw: condition b is sample number first_draw + b of the seed.
    record: keep every step's values in the result's trace, unconditional logits of unguided steps included.
    max_tokens: the list is split into packed calls of at most so many tokens. observe: called after every step.
    Raises UserError where a condition does not fit the model.
    """
    both = record and (settings.guidance != 1.0 or model.config.layout == "v2")
    for condition in conditions:
        condition.check(model.config, guided=both or settings.guidance != 1.0)
    given = None if draws is None else Draws(draws)
    trace = Trace() if record else None
    labels: list[torch.Tensor] = []
    steps: list[int] = []
    entropies: list[float] = []
    with torch.inference_mode():
        for members in split(conditions, max_tokens, guided=both or settings.guidance != 1.0):
            run = Refinement(model, settings, seed, first_draw, given, trace, both)
            labels += run(conditions, members, observe)
            steps += run.steps
            entropies += run.entropies
    # Copies made outside the inference mode are ordinary tensors.
    return Generated(batched(labels, 0) if labels else [], steps, entropies, trace.result() if trace else {})


def split(conditions: Sequence[Condition], max_tokens: int, guided: bool) -> Iterator[range]:
    """Consecutive ranges of conditions whose branches have at most max_tokens tokens; a longer one stands alone."""
    start, tokens = 0, 0
    for n, condition in enumerate(conditions):
        texts = [condition.text_states] + ([condition.negative_text_states] if guided else [])
        grids = [condition.grid(text) for text in texts]
        own = sum(grid.visual_tokens + grid.text_tokens + 1 for grid in grids)
        if n > start and tokens + own > max_tokens:
            yield range(start, n)
            start, tokens = n, 0
        tokens += own
    if conditions:
        yield range(start, len(conditions))


@dataclass
class _Group:
    """Samples under way together. All maps are uint8 [P, D], sample by sample, tokens in natural order."""

    network: GuidedNetwork
    members: tuple[int, ...]
    """Places in the call's list of conditions."""
    counter_PD: torch.Tensor
    """int64: number of each label inside its sample, for the random numbers."""
    noise: torch.Tensor
    mixed: torch.Tensor
    shares: list[float]
    """Of predictions in `mixed`, counted."""
    after: list[int | None]
    """Steps that each sample gets after the decision of adaptive sampling; None before it, and without it."""


class Refinement:
    """One packed run of the sampler."""

    def __init__(self, model: GRN, settings: SamplingSettings, seed: int, first_draw: int, draws: Draws | None,
                 trace: Trace | None, both: bool) -> None:
        self.model, self.settings, self.draws, self.trace, self.both = model, settings, draws, trace, both
        self.seed, self.first_draw = seed, first_draw
        self.channels, self.classes = model.config.label_channels, model.config.classes
        self.tolerance = END_TOLERANCE[model.config.layout]
        self.steps: list[int] = []
        self.entropies: list[float] = []
        """Both of the members, once the run is over."""

    def __call__(self, conditions: Sequence[Condition], members: Sequence[int],
                 observe: Callable[[StepMaps], None] | None) -> list[torch.Tensor]:
        """Labels uint8 [D, t, h, w] on the CPU of the members, in their order."""
        group = self._start([conditions[n] for n in members], tuple(members))
        done: dict[int, torch.Tensor] = {}
        taken: dict[int, int] = {}
        step = 0
        while group.members:
            fed = group.shares
            predicted = self._step(group, step)
            last = [is_last(step, self._steps(after), share, self.tolerance) for share, after in zip(fed, group.after)]
            ended = [n for n, end in zip(group.members, last) if end]
            if observe is not None:
                observe(StepMaps(step, group.members, tuple(group.shares), frozenset(ended), group.network.conditions,
                                 predicted, group.mixed))
            if ended:
                maps = unflatten_maps(predicted, group.network.conditions, whole=True)
                done |= {n: labels.cpu() for n, labels, end in zip(group.members, maps, last) if end}
                taken |= dict.fromkeys(ended, step + 1)
                group = self._without(group, last)
            step += 1
        if self.trace:
            for n in members:
                self._record_result(n, done[n])
        self.steps = [taken[n] for n in members]
        return [done[n] for n in members]

    def _start(self, conditions: list[Condition], members: tuple[int, ...]) -> _Group:
        network = GuidedNetwork(self.model, conditions)
        # Numbers count from the clip's first token on, a given first frame included: as in training's noise.
        first = [v - p for v, p in zip(network.visual_counts, network.predicted_counts)]
        token = torch.cat([torch.arange(f, v) for f, v in zip(first, network.visual_counts)]).to(network.device)
        counter = token[:, None] * self.channels + torch.arange(self.channels, device=network.device)
        if self.draws:
            noise = flatten_maps([self.draws.initial(n) for n in members], network.device)
            if noise.shape != counter.shape:
                raise ValueError(f"initial_labels have {list(noise.shape)} tokens and labels, "
                                 f"not {list(counter.shape)}")
        else:
            random = self._random(network, members, counter, "sample noise")
            noise = (random >> (32 - self.classes.bit_length() + 1)).to(torch.uint8)
        group = _Group(network, members, counter, noise, noise, [0.0] * len(members), [None] * len(members))
        if self.trace:
            for n, labels in zip(members, self._maps(group, noise)):
                self.trace.add("initial_labels", n, labels)
        return group

    def _step(self, group: _Group, step: int) -> torch.Tensor:
        """This step's prediction y [P, D]; the group's mixed map and shares become those after the step."""
        settings = self.settings
        guidance = [settings.guidance_at(share) for share in group.shares]
        prediction = group.network(group.mixed, group.shares, guidance, always_both=self.both)
        if settings.adaptive and step == settings.adaptive.wp:
            self._decide(group, prediction)
        temperature = self._temperature(group, step)
        keyed_by = (group.network, group.members, group.counter_PD)
        if self.draws:
            predicted = self._given(group, "sampled_labels", step)
        else:
            predicted = choose(prediction.scores, temperature, self._random(*keyed_by, "sample label", step))
        targets = [self._target(step, after) for after in group.after]
        if self.draws:
            mask = self._given(group, "use_predict_mask", step).bool()
        else:
            below_N = torch.tensor([int(target * WORDS) for target in targets], device=group.network.device)
            mask = self._random(*keyed_by, "sample mask", step) < below_N[group.network.sample_P, None]
        fed = group.shares
        group.mixed = torch.where(mask, predicted, group.noise)
        counts = torch.zeros(len(fed), dtype=torch.int64, device=mask.device)
        counts = counts.index_add(0, group.network.sample_P, mask.sum(dim=1)).tolist()
        group.shares = [n / (tokens * self.channels) for n, tokens in zip(counts, group.network.predicted_counts)]
        if self.trace:
            self._record_step(group, prediction, predicted, mask, fed, guidance, targets, temperature)
        return predicted

    def _steps(self, after: int | None) -> int:
        """Steps of a sample in all, as far as it is known."""
        return self.settings.most_steps if after is None else self.settings.adaptive.wp + after

    def _target(self, step: int, after: int | None) -> float:
        settings = self.settings
        wp = settings.adaptive.wp if settings.adaptive else 0
        return predicted_share(adaptive_progress(step, settings.tmax, wp, after), settings.shift, settings.end_fraction)

    def _temperature(self, group: _Group, step: int) -> float | torch.Tensor:
        rule = self.settings.adaptive
        if rule is None or not rule.temperature_factor or step < rule.wp:
            return self.settings.temperature
        by_sample = [self.settings.temperature * temperature_factor(after) for after in group.after]
        return torch.tensor(by_sample, device=group.network.device)[group.network.sample_P]

    def _decide(self, group: _Group, prediction: Prediction) -> None:
        """Adaptive sampling: fix the number of steps of the group's samples (all are at the same step)."""
        entropy = self._entropies(group, prediction)
        group.after = [steps_after(e, self.settings.adaptive, self.settings.tmax) for e in entropy]
        self.entropies = entropy
        if self.trace:
            for n, e, after in zip(group.members, entropy, group.after):
                self.trace.add("decision_entropy", n, e)
                self.trace.add("dynamic_steps", n, float(after))

    def _entropies(self, group: _Group, prediction: Prediction) -> list[float]:
        """Mean relative entropy of each sample's conditional prediction."""
        by_label = relative_entropy(self.model.head(prediction.conditional_PC))
        return [part.double().mean().item() for part in by_label.split(group.network.predicted_counts)]

    def _without(self, group: _Group, ended: Sequence[bool]) -> _Group:
        """The group's samples that have not ended."""
        stay = [i for i, end in enumerate(ended) if not end]
        members = tuple(group.members[i] for i in stay)
        if not stay:
            return _Group(group.network, (), *[group.noise[:0]] * 3, [], [])
        rows = ~torch.tensor(ended, device=group.network.device)[group.network.sample_P]
        network = GuidedNetwork(self.model, [group.network.conditions[i] for i in stay])
        return _Group(network, members, group.counter_PD[rows], group.noise[rows], group.mixed[rows],
                      [group.shares[i] for i in stay], [group.after[i] for i in stay])

    def _random(self, network: GuidedNetwork, members: Sequence[int], counter_PD: torch.Tensor, purpose: str,
                *key: int) -> torch.Tensor:
        """int64 [P, D] in [0, 2^32), keyed by seed, purpose, sample and label."""
        keys = [keyed.as_int64(keyed.key64(self.seed, purpose, self.first_draw + n, *key)) for n in members]
        keys_N = torch.tensor(keys, dtype=torch.int64, device=network.device)
        return keyed.hash32(keys_N[network.sample_P, None], counter_PD)

    def _given(self, group: _Group, name: str, step: int) -> torch.Tensor:
        return flatten_maps([self.draws.step(name, n, step) for n in group.members], group.network.device)

    def _maps(self, group: _Group, flat_PD: torch.Tensor) -> list[torch.Tensor]:
        return unflatten_maps(flat_PD, group.network.conditions, whole=False)

    def _record_step(self, group: _Group, prediction: Prediction, predicted: torch.Tensor, mask: torch.Tensor,
                     fed: Sequence[float], guidance: Sequence[float], targets: Sequence[float],
                     temperature: float | torch.Tensor) -> None:
        counts, head = group.network.predicted_counts, self.model.head
        tokens = {"cond_logits": head.logits(prediction.conditional_PC).split(counts),
                  "probs": probabilities(prediction.scores, temperature).split(counts)}
        if self.both:
            tokens["uncond_logits"] = head.logits(prediction.unconditional_UC).split(counts)
        entropy = self._entropies(group, prediction)
        maps = {"sampled_labels": self._maps(group, predicted), "mixed_labels_out": self._maps(group, group.mixed),
                "use_predict_mask": self._maps(group, mask.to(torch.uint8))}
        for i, n in enumerate(group.members):
            numbers = {"cur_pt": fed[i], "next_pt_target": targets[i], "next_pt_realised": group.shares[i],
                       "cfg_used": guidance[i], "entropy": entropy[i]}
            for name, value in numbers.items():
                self.trace.add(name, n, float(value))
            for name, values in (tokens | maps).items():
                self.trace.add(name, n, values[i])

    def _record_result(self, n: int, labels: torch.Tensor) -> None:
        dequantise = hbq.dequantize_bits if self.classes == 2 else hbq.dequantize_index
        self.trace.add("final_latent", n, dequantise(labels[None], self.model.config.rounds)[0])

