"""What failures cost a long run: expected wall time, goodput, and how often to save.

Failures come as a Poisson process of the whole job. One of them throws the run back to its last durable checkpoint;
it is noticed after the detection time, and the restart, which may fail as well, follows. A save blocks the run and may
become durable later, while the run goes on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from grn_scale.errors import ConfigError
from grn_scale.keyed import key64, uniforms

MOST_FAILURES = 100_000
"""Of a run, expected: one that fails more often does not get anywhere, and is not replayed."""


@dataclass(frozen=True)
class Failures:
    """All in seconds. ConfigError for what cannot be."""

    mtbf: float
    """Mean time between failures of the whole job."""
    blocking: float
    """How long a save stops the run."""
    restart: float
    """From the moment a failure is noticed until the run goes on: a new allocation, start, load, first step."""
    detection: float = 0.0
    """Until a failure is noticed; nothing else can happen meanwhile."""
    durable: float | None = None
    """From the beginning of a save until a restart can use it; None: as soon as the run goes on."""

    def __post_init__(self) -> None:
        if not self.mtbf > 0:
            raise ConfigError(f"the mean time between failures is {self.mtbf} s, but must be above 0")
        for name in ("blocking", "restart", "detection"):
            if getattr(self, name) < 0:
                raise ConfigError(f"the {name} time is {getattr(self, name)} s, but must not be negative")
        if self.durable is not None and self.durable < self.blocking:
            raise ConfigError(f"a save is durable after {self.durable} s, but blocks for {self.blocking} s: durable is "
                              "counted from the beginning of the save, and may not be less")

    @property
    def latency(self) -> float:
        """How long the run goes on before a save that no longer blocks it is durable."""
        return 0.0 if self.durable is None else self.durable - self.blocking

    @property
    def failure_cost(self) -> float:
        """Expected seconds from one failure to the next beyond the uptime that is used: (M + d) e^(R/M), with the
        restarts that fail themselves (Daly 2006, eq. 20, with a detection time d)."""
        return (self.mtbf + self.detection) * _exp(self.restart / self.mtbf)

    def goodput(self, interval: float) -> float:
        """Work over wall time in the long run, in [0, 1), with a save after each `interval` seconds of work.

        t e^(-l/M) / ((M + d) e^(R/M) (e^((t + C)/M) - 1)) for work t, blocking C, latency l, restart R, detection d and
        MTBF M: Daly 2006 ("A higher order estimate of the optimum checkpoint interval for restart dumps", eq. 20), with
        the latency of Vaidya 1997 ("Impact of checkpoint latency on overhead ratio of a checkpointing scheme").
        """
        self._check_interval(interval)
        return interval / self._later(interval)

    def expected_seconds(self, work: float, interval: float) -> float:
        """Expected wall time from the first step until `work` seconds of steps are done and saved.

        Exact for these assumptions. The first interval has to run for the latency as well; later ones find a checkpoint
        that becomes durable while they run. infinity where no number holds it.
        """
        self._check_interval(interval)
        whole, last = _intervals(work, interval)
        first = interval if whole else last
        begun = self.failure_cost * _expm1((first + self.blocking + self.latency) / self.mtbf)
        return begun + (self._later(interval) * (whole - 1) + self._later(last) if whole else 0.0)

    def best_interval(self) -> float:
        """Work between two saves, seconds, with the highest goodput: where e^((t + C)/M) (1 - t/M) = 1.

        At least the latency, so that a save is durable before the next begins; 0 where a save costs nothing. Latency,
        restart and detection change the goodput, not the optimum (Vaidya 1997).
        """
        low, high = 0.0, self.mtbf
        for _ in range(200):
            middle = (low + high) / 2
            gains = 1 - middle / self.mtbf > math.exp(-(middle + self.blocking) / self.mtbf)
            low, high = (middle, high) if gains else (low, middle)
        return max(low, self.latency)

    def young_interval(self) -> float:
        """sqrt(2 C M) (Young 1974, "A first order approximation to the optimum checkpoint interval")."""
        return math.sqrt(2 * self.blocking * self.mtbf)

    def daly_interval(self) -> float:
        """sqrt(2 C M) (1 + sqrt(C/2M)/3 + (C/2M)/9) - C below C = 2 M, else M (Daly 2006, eq. 37)."""
        ratio = self.blocking / (2 * self.mtbf)
        if ratio >= 1:
            return self.mtbf
        return self.young_interval() * (1 + math.sqrt(ratio) / 3 + ratio / 9) - self.blocking

    def replay(self, work: float, interval: float, trials: int, seed: int) -> np.ndarray:
        """Wall time of `trials` runs, seconds [trials], with failures drawn by (seed, trial, number of the failure).

        Its mean estimates `expected_seconds` with the standard error std / sqrt(trials). ConfigError where a run would
        fail more than MOST_FAILURES times.
        """
        expected = self.expected_seconds(work, interval)
        if not expected / self.mtbf <= MOST_FAILURES:
            best = self.best_interval()
            oftener = f"save more often (best: each {best:.4g} s), " if interval > 2 * best else ""
            raise ConfigError(
                f"with a failure each {self.mtbf:.4g} s and a save each {interval:.4g} s of work the run would fail "
                f"{expected / self.mtbf:.3g} times: {oftener}make saves (now {self.blocking:.4g} s), restarts "
                f"({self.restart:.4g} s) and steps faster, or take fewer ranks")
        whole, last = _intervals(work, interval)
        period = interval + self.blocking
        left = np.full(trials, whole + 1)
        wall = np.zeros(trials)
        active = np.arange(trials)
        key, failure = key64("failure", seed), 0
        # Also the restart may fail, so its time is taken from the same uptime; a run begins started.
        restart = 0.0
        while len(active):
            uptime = -self.mtbf * np.log1p(-uniforms(key, active * (1 << 32) + failure))
            needed = restart + (left[active] - 1) * period + last + self.blocking + self.latency
            done = uptime >= needed
            wall[active] += np.where(done, needed, uptime + self.detection)
            saved = np.floor((uptime - restart - self.latency) / period).clip(0, left[active] - 1)
            left[active] -= saved.astype(np.int64)
            active = active[~done]
            restart, failure = self.restart, failure + 1
        return wall

    def _later(self, interval: float) -> float:
        """Expected wall time of an interval that follows another."""
        return (self.failure_cost * _exp(self.latency / self.mtbf)
                * _expm1((interval + self.blocking) / self.mtbf))

    def _check_interval(self, interval: float) -> None:
        if not interval > 0:
            raise ConfigError(f"the work between two saves is {interval} s, but must be above 0")
        if interval < self.latency:
            raise ConfigError(f"{interval:.4g} s of work between two saves, but a save is durable {self.latency:.4g} s "
                              "after the run goes on, and the next begins then at the earliest: save less often")


def job_mtbf(gpus: int, *, hours_per_gpu: float | None, nodes: int = 0, hours_per_node: float | None = None) -> float:
    """Mean seconds between failures of a job any of whose GPUs and nodes may fail: independent rates add up.

    None: these do not fail. ConfigError where nothing fails, or a time is not positive.
    """
    rate = 0.0
    for name, count, hours in (("GPU", gpus, hours_per_gpu), ("node", nodes, hours_per_node)):
        if hours is not None:
            if not hours > 0:
                raise ConfigError(f"the mean time between failures of a {name} is {hours} hours, but must be above 0")
            rate += count / (3600 * hours)
    if not rate:
        raise ConfigError("neither GPUs nor nodes have a mean time between failures: give one of them")
    return 1 / rate


def _intervals(work: float, interval: float) -> tuple[int, float]:
    """How many whole intervals come before the last one, and the work of that, which may be shorter."""
    if not work > 0:
        raise ConfigError(f"the run has {work} s of work, but must have more than 0")
    # A sum of steps is seldom an exact multiple in floating point: a last interval of nothing is none.
    whole = math.ceil(work / interval * (1 - 1e-12)) - 1
    return whole, work - whole * interval


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def _expm1(x: float) -> float:
    return math.expm1(x) if x < 700 else math.inf
