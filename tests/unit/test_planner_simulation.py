"""Steps of a large job: packs and ranks that differ, and the command."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest

from grn_scale.command_line import run
from grn_scale.errors import ConfigError
from grn_scale.planning.schedule import Schedule
from grn_scale.planning.simulation import Job, Slowness, simulate, timeline
from grn_scale.tools.plan_simulate import main

EVEN = Slowness()


def job(pipeline=4, virtual=1, micro_batches=8, replicas=3, per_stage=2, **times) -> Job:
    schedule = Schedule(pipeline, virtual, micro_batches)
    return Job(schedule, replicas * pipeline * per_stage, per_stage, **{"forward": 0.5, **times})


def replay(job: Job, slowness: Slowness = EVEN, costs=None, steps: int = 1):
    costs = np.ones((1, 1, job.schedule.micro_batches)) if costs is None else costs
    return simulate(job, costs, slowness.factors(job, steps, seed=0))


def test_even_packs_and_ranks_take_the_ideal_time():
    one = job(virtual=2, after=0.3)
    steps = replay(one)
    work = 0.5 * 3 * 8
    assert steps.total[0] == pytest.approx(work * (1 + one.schedule.bubble) + 0.3)
    assert steps.parts() == pytest.approx(
        {"work": work, "slow": 0, "pipeline": work * one.schedule.bubble, "replicas": 0, "after": 0.3})


@pytest.mark.parametrize("slowness", [EVEN, Slowness(0.1, 1.5), Slowness(jitter=0.1), Slowness(0.05, 2.0, 0.05)])
@pytest.mark.parametrize("pipeline", [1, 4])
def test_the_parts_add_up_to_the_step(slowness, pipeline):
    one = job(pipeline, replicas=6, transfer=0.01, after=0.2)
    costs = np.random.default_rng(0).lognormal(0, 0.4, (5, 6, 8))
    steps = replay(one, slowness, costs, steps=5)
    assert sum(steps.parts().values()) == pytest.approx(steps.total.mean())
    assert min(steps.parts().values()) >= 0


def test_one_slow_rank_slows_the_whole_job():
    one = job(pipeline=1, replicas=64, per_stage=1)
    steps = replay(one, Slowness(1 / 64, 1.5))
    assert steps.total[0] == pytest.approx(1.5 * replay(one).total[0])
    assert steps.parts()["replicas"] == pytest.approx(steps.total[0] - 0.5 * 3 * 8 * (1 + 0.5 / 64))


def test_a_slow_stage_sets_the_pace_of_its_pipeline():
    """With many micro-batches a stage that is 1.5 times as slow as the others makes the step 1.5 times as long."""
    one = job(micro_batches=400, replicas=1)
    assert replay(one, Slowness(1 / one.ranks, 1.5)).total[0] == pytest.approx(1.5 * 400 * 1.5, rel=0.01)


def test_all_ranks_slow_is_slow_alone():
    one = job()
    slow = replay(one, Slowness(1.0, 1.25))
    assert slow.total[0] == pytest.approx(1.25 * replay(one).total[0])
    assert slow.parts()["replicas"] == pytest.approx(0)


def test_as_many_ranks_are_slow_as_asked_for_and_they_stay_the_same():
    one = job(pipeline=4, replicas=100, per_stage=1)
    factors = Slowness(0.05, 2.0).factors(one, 1, seed=0)
    assert (factors == 2).sum() == 20
    np.testing.assert_array_equal(factors, Slowness(0.05, 2.0).factors(one, 1, seed=0))
    assert (factors != Slowness(0.05, 2.0).factors(one, 1, seed=1)).any()


def test_jitter_leaves_the_mean_and_makes_stages_of_many_ranks_slower():
    one = job(pipeline=1, replicas=20000, per_stage=1)
    alone = Slowness(jitter=0.2).factors(one, 2, seed=0)
    assert alone.mean() == pytest.approx(1, abs=0.01)
    assert np.log(alone).std() == pytest.approx(0.2, rel=0.02)
    together = Slowness(jitter=0.2).factors(job(pipeline=1, replicas=2000, per_stage=8), 2, seed=0)
    # the largest of 8 standard normal numbers is 1.42 on average
    assert np.log(together).mean() == pytest.approx(0.2 * 1.4236 - 0.02, abs=0.01)


def test_replicas_that_are_alike_give_what_each_gives_alone():
    one, costs = job(replicas=5), np.random.default_rng(2).lognormal(0, 0.3, (3, 5, 8))
    costs[:, 3] = costs[:, 1]
    together = replay(one, costs=costs)
    alone = [[replay(job(replicas=1), costs=costs[i:i + 1, r:r + 1]).total[0] for r in range(5)] for i in range(3)]
    np.testing.assert_allclose(together.total, np.max(alone, axis=1))


def test_a_timeline_has_every_pass_and_ends_with_the_step():
    one = job(virtual=2, replicas=1)
    tasks = timeline(one, np.ones(8), np.ones(4))
    assert len(tasks) == 2 * 4 * 2 * 8
    assert max(end for _, _, end in tasks) == pytest.approx(replay(one).total[0])


def test_16384_ranks_take_seconds():
    one = job(16, 2, 64, replicas=128, per_stage=8)
    costs = np.random.default_rng(0).lognormal(0, 0.2, (4, 128, 64))
    begin = time.process_time()
    steps = replay(one, Slowness(0.001, 1.3, 0.02), costs, steps=4)
    assert time.process_time() - begin < 3
    assert steps.total.shape == (4,)


@pytest.mark.parametrize("call, words", [
    (lambda: Job(Schedule(4, 1, 8), 30, 2, 1.0), "take a multiple, such as 32"),
    (lambda: Job(Schedule(1, 1, 8), 0, 1, 1.0), "from 1 to"),
    (lambda: job(forward=0.0), "both must be above 0"),
    (lambda: job(transfer=-1.0), "must not be negative"),
    (lambda: Slowness(1.5, 1.2), r"lie in \[0, 1\]"),
    (lambda: Slowness(0.1, 0.9), "1 or more"),
    (lambda: Slowness(jitter=-0.1), "must not be negative"),
    (lambda: Slowness(0.001, 1.2).factors(job(), 1, 0), "is no rank"),
])
def test_what_cannot_be_is_refused(call, words):
    with pytest.raises(ConfigError, match=words):
        call()


# --- the command ------------------------------------------------------------------------------------------------------

LAYOUT = ["--ranks", "64", "--tensor", "2", "--pipeline", "4", "--micro-batches", "8", "--forward-seconds", "0.1"]
FAILURES = ["--mtbf-hours-per-gpu", "500", "--checkpoint-seconds", "5", "--restart-seconds", "300"]


def ask(capsys, *arguments: str) -> dict:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_command_gives_the_closed_forms_for_even_packs(capsys):
    document = ask(capsys, *LAYOUT)
    assert document["layout"]["replicas"] == 8
    assert document["step"]["bubble"] == pytest.approx(3 / 8) == document["step"]["bubble_closed_form"]
    assert document["step"]["seconds"] == pytest.approx(0.3 * 8 * (1 + 3 / 8))
    assert document["failures"] is None


def test_the_command_packs_clips_and_finds_the_interval(capsys, tmp_path):
    clips = tmp_path / "clips.csv"
    lines = [f"{t},{h},{h},40" for t, h in zip(np.tile([1, 2, 5, 9, 13], 200), np.repeat([8, 16, 20, 30], 250))]
    clips.write_text("\n".join(["t,h,w,text_tokens", *lines]))
    picture = tmp_path / "plan.png"
    document = ask(capsys, *LAYOUT, *FAILURES, "--lengths", str(clips), "--token-budget", "16384", "--model",
                   "model/grn_2b.yaml", "--stragglers", "0.02", "--slowdown", "1.2", "--checkpoint-every", "1000",
                   "--tokens", "1e10", "--trials", "200", "--plot", str(picture))
    step, failures = document["step"], document["failures"]
    assert 0.9 < document["fill"] <= 1
    assert step["seconds"] > step["seconds_even_ranks"] > step["seconds_even_packs_and_ranks"]
    assert step["tokens"] == pytest.approx(8 * 8 * 16384 * document["fill"])
    rows = {row["name"]: row for row in failures["intervals"]}
    assert rows["best"]["goodput"] == max(row["goodput"] for row in rows.values())
    assert rows["--checkpoint-every"]["steps"] == 1000
    assert failures["run_steps"] == int(np.ceil(1e10 / step["tokens"]))
    for row in rows.values():
        assert abs(row["replayed_wall_seconds"] - row["wall_seconds"]) < 4 * row["replayed_standard_error"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_tables_say_what_is_waited_for(capsys):
    assert main([*LAYOUT, *FAILURES, "--steps", "1000", "--trials", "20"]) == 0
    shown = capsys.readouterr().out
    for words in ("waiting inside the pipeline", "closed form: 37.50%", "goodput", "Daly 2006", "days expected"):
        assert words in shown


@pytest.mark.parametrize("arguments, words", [
    (["--ranks", "60"], "take a multiple"),
    (["--ranks", "0"], "--ranks is 0"),
    (["--forward-seconds", "nan"], "invalid number value"),
    (["--lengths", "clips.csv"], "needs --token-budget"),
    (["--tokens", "1e12"], "needs --token-budget"),
    (["--checkpoint-seconds", "3"], "give --mtbf-hours-per-gpu"),
    (["--mtbf-hours-per-gpu", "3"], "need --checkpoint-seconds and --restart-seconds"),
    (["--plot", "plan.gif"], "must end in .png"),
    (["--pipeline", "1", "--plot", "plan.png"], "nothing to show"),
    (["--steps", "10", "--tokens", "5"], "not allowed with"),
    (["--replays", "10000000"], "take --replays 262144"),
    (["--trials", "2000000"], "1000000 at most"),
    (["--micro-batches", "200000"], "take fewer micro-batches"),
    (["--stragglers", "0.1"], "belong together"),
    (["--overlap-transfers"], "interleaved schedule only"),
])
def test_bad_usage_gets_a_message_and_exit_code_2(capsys, arguments, words):
    assert run(main, [*LAYOUT, *arguments]) == 2
    assert words in capsys.readouterr().err


def test_clips_longer_than_a_micro_batch_are_refused(capsys, tmp_path):
    clips = tmp_path / "clips.csv"
    clips.write_text("t,h,w,text_tokens\n1,8,8,40\n9,16,16,40\n")
    assert run(main, [*LAYOUT, "--lengths", str(clips), "--token-budget", "1024", "--model", "model/grn_2b.yaml"]) == 2
    assert "1 of 2 clips have more than --token-budget 1024 tokens, up to 2345" in capsys.readouterr().err


def test_a_run_of_so_many_steps_takes_their_time_without_failures(capsys):
    assert main(["--ranks", "8", "--micro-batches", "4", "--forward-seconds", "1", "--steps", "100", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["run"] == {"steps": 100, "seconds": pytest.approx(100 * 4 * 3)}
