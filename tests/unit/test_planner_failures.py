"""Failures: expected wall time, its replay, and the best interval between saves."""

from __future__ import annotations

import math

import numpy as np
import pytest

from grn_scale.errors import ConfigError
from grn_scale.planning.failures import Failures, job_mtbf

HOUR, MINUTE = 3600.0, 60.0


def test_without_latency_and_detection_it_is_dalys_equation():
    """Daly 2006, eq. 20: T = M e^(R/M) (e^((t + C)/M) - 1) Ts / t."""
    mtbf, restart, blocking, interval, work = 6 * HOUR, 10 * MINUTE, 5 * MINUTE, HOUR, 500 * HOUR
    failures = Failures(mtbf, blocking, restart)
    daly = mtbf * math.exp(restart / mtbf) * math.expm1((interval + blocking) / mtbf) * work / interval
    assert failures.expected_seconds(work, interval) == pytest.approx(daly, rel=1e-12)
    assert failures.goodput(interval) == pytest.approx(work / daly, rel=1e-12)


@pytest.mark.parametrize("mtbf, minutes", [(24 * HOUR, 117), (6 * HOUR, 57), (15 * MINUTE, 9.1)])
def test_the_best_interval_is_that_of_dalys_figures(mtbf, minutes):
    """Daly 2006, figures 3 to 5: saves of 5 minutes, restarts of 10."""
    failures = Failures(mtbf, 5 * MINUTE, 10 * MINUTE)
    assert failures.daly_interval() / MINUTE == pytest.approx(minutes, rel=0.01)
    assert failures.best_interval() / MINUTE == pytest.approx(minutes, rel=0.01)


@pytest.mark.parametrize("blocking", [0.01, 1.0, 60.0, 3600.0, 40000.0])
def test_no_other_interval_has_a_higher_goodput(blocking):
    failures = Failures(4 * HOUR, blocking, 300.0, 60.0)
    best = failures.best_interval()
    others = best * np.geomspace(0.1, 10, 51)
    assert failures.goodput(best) >= max(failures.goodput(each) for each in others) * (1 - 1e-12)


def test_young_and_daly_meet_the_best_interval_where_failures_are_rare():
    for closed, tolerance in ((Failures.young_interval, 0.01), (Failures.daly_interval, 1e-6)):
        failures = Failures(1e6 * HOUR, 60.0, 600.0)
        assert closed(failures) == pytest.approx(failures.best_interval(), rel=tolerance)
    often = Failures(HOUR, 3 * HOUR, 0.0)
    assert often.daly_interval() == HOUR


def test_latency_costs_goodput_and_does_not_move_the_best_interval():
    """Vaidya 1997: the optimum depends on what a save blocks, not on when it is durable."""
    at_once, later = Failures(3 * HOUR, 10.0, 600.0), Failures(3 * HOUR, 10.0, 600.0, durable=130.0)
    best = at_once.best_interval()
    assert later.best_interval() == best
    assert later.goodput(best) == pytest.approx(at_once.goodput(best) * math.exp(-120 / (3 * HOUR)), rel=1e-12)
    slow = Failures(3 * HOUR, 1.0, 600.0, durable=2 * HOUR)
    assert slow.best_interval() == slow.latency


@pytest.mark.parametrize("failures, work, interval", [
    (Failures(3 * HOUR, 10.0, 600.0), 20 * HOUR, 400.0),
    (Failures(3 * HOUR, 10.0, 600.0, 300.0, 150.0), 20 * HOUR, 450.0),
    (Failures(HOUR, 60.0, HOUR, 600.0, 240.0), 5 * HOUR, 1234.5),
    (Failures(2 * HOUR, 30.0, 900.0, 60.0), HOUR, 2 * HOUR),
])
def test_the_replay_agrees_with_the_expectation_within_its_standard_error(failures, work, interval):
    walls = failures.replay(work, interval, 4000, seed=1)
    error = walls.std(ddof=1) / math.sqrt(len(walls))
    assert abs(walls.mean() - failures.expected_seconds(work, interval)) < 3.5 * error
    assert error < 0.02 * walls.mean()
    assert walls.min() >= work


def test_a_long_run_reaches_the_goodput_of_the_long_run():
    failures, work = Failures(3 * HOUR, 10.0, 600.0, 300.0, 150.0), 1e5 * HOUR
    assert work / failures.expected_seconds(work, 450.0) == pytest.approx(failures.goodput(450.0), rel=1e-4)


def test_a_run_that_never_fails_only_saves():
    failures = Failures(1e15, 7.0, 600.0, durable=20.0)
    assert failures.expected_seconds(1000.0, 300.0) == pytest.approx(1000 + 4 * 7 + 13, rel=1e-6)
    np.testing.assert_allclose(failures.replay(1000.0, 300.0, 3, seed=0), 1000 + 4 * 7 + 13)


def test_the_replay_depends_on_its_seed_alone():
    failures = Failures(HOUR, 10.0, 60.0)
    first = failures.replay(10 * HOUR, 600.0, 50, seed=3)
    np.testing.assert_array_equal(first, failures.replay(10 * HOUR, 600.0, 50, seed=3))
    np.testing.assert_array_equal(first[:20], failures.replay(10 * HOUR, 600.0, 20, seed=3))
    assert (first != failures.replay(10 * HOUR, 600.0, 50, seed=4)).any()


def test_a_published_run_comes_out_as_published():
    """Llama 3 405B (arXiv:2407.21783, section 3.3.4): 419 unexpected interruptions in 54 days on 16,384 GPUs, one each
    3 hours, and more than 90 % effective training time."""
    per_gpu = 54 * 24 * 16384 / 419
    mtbf = job_mtbf(16384, hours_per_gpu=per_gpu)
    assert mtbf / HOUR == pytest.approx(3.09, abs=0.01)
    failures = Failures(mtbf, blocking=2.0, restart=600.0, durable=60.0)
    assert 0.9 < failures.goodput(failures.best_interval()) < 0.95


def test_rates_of_gpus_and_nodes_add_up():
    both = job_mtbf(64, hours_per_gpu=6400.0, nodes=8, hours_per_node=800.0)
    assert both == pytest.approx(50 * HOUR)


@pytest.mark.parametrize("call, words", [
    (lambda: Failures(0.0, 1.0, 1.0), "mean time between failures"),
    (lambda: Failures(1.0, -1.0, 1.0), "blocking time"),
    (lambda: Failures(1.0, 1.0, 1.0, -2.0), "detection time"),
    (lambda: Failures(1.0, 5.0, 1.0, durable=4.0), "may not be less"),
    (lambda: Failures(1.0, 1.0, 1.0).goodput(0.0), "must be above 0"),
    (lambda: Failures(100.0, 1.0, 1.0, durable=60.0).goodput(10.0), "save less often"),
    (lambda: Failures(100.0, 1.0, 1.0).expected_seconds(-5.0, 10.0), "must have more than 0"),
    (lambda: Failures(10.0, 5.0, 100.0).replay(1e6, 200.0, 2, 0), "save more often"),
    (lambda: job_mtbf(8, hours_per_gpu=None), "give one of them"),
    (lambda: job_mtbf(8, hours_per_gpu=-1.0), "of a GPU is -1.0 hours"),
])
def test_what_cannot_be_is_refused(call, words):
    with pytest.raises(ConfigError, match=words):
        call()


def test_a_hopeless_interval_has_no_goodput_and_no_number_of_days():
    failures = Failures(1.0, 1.0, 1.0)
    assert failures.goodput(1e6) == 0
    assert failures.expected_seconds(1e7, 1e6) == math.inf
