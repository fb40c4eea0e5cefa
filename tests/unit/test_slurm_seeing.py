"""`grn-scale slurm status|logs|cancel` on records as jobs leave them (tests/slurm has a real cluster)."""

import json
import threading
import time

import pytest

from grn_scale.errors import ConfigError, UserError
from grn_scale.slurm import cancel, logs, status, why
from grn_scale.slurm.squeue import ask, job_ids
from grn_scale.slurm.starts import in_words, read_starts
from grn_scale.slurm.tail import begin_of_last_lines, last_bytes
from grn_scale.slurm.times import duration
from tests.helpers.slurm_records import NOW, PENDING, RUNNING, Job, Slurm, answer_of, text_of


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    return Slurm(tmp_path, monkeypatch)


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path / "run")



# Slurm's word

def test_jobs_and_elements_of_arrays_are_read_from_squeue(slurm):
    slurm.says(RUNNING, "13_4|PENDING||N/A|N/A|(Resources, or so)", "a message of the site")
    running, waiting = ask(["12", 13]).entries
    assert (running.id, running.nodes, running.starts, running.reason) == ("12", "node[1-2]", NOW - 50, "")
    assert (waiting.id, waiting.task, waiting.starts, waiting.reason) == ("13_4", 4, None, "(Resources, or so)")
    assert "--jobs=12,13" in slurm.questions[0]


def test_a_job_that_slurm_forgot_is_gone_and_no_problem(slurm):
    slurm.says(problem="slurm_load_jobs error: Invalid job id specified")
    assert ask([12]).problem == "" and ask([12]).entries == ()


def test_a_slurm_that_is_absent_or_silent_is_a_value(slurm, monkeypatch):
    assert ask([12]).problem == "there is no squeue on this machine"
    slurm.says(problem="slurm_load_jobs error: Unable to contact slurm controller")
    assert "Unable to contact" in ask([12]).problem
    assert ask([]).problem == ""


@pytest.mark.parametrize("word", ["--all", "12;reboot", "", "12_3", "\u0661"])
def test_what_is_no_number_is_no_job_of_slurms(word):
    with pytest.raises(UserError, match="no number of a Slurm job"):
        job_ids(["12", word])


# starts

def test_starts_come_with_their_ends_in_order(job):
    job.ended(75, "requeue", ago=100, progress=4).event("start", 1, 50, 4)
    first, second = read_starts(job.folder)
    assert (first.name, first.code, first.decision, first.progress) == ("12-0", 75, "requeue", 4)
    assert (second.name, second.ended, second.nodes) == ("12-1", None, "node[1-2]")


def test_an_end_without_a_start_was_refused_and_damaged_lines_are_left_out(job, caplog):
    (job.folder / "starts.jsonl").write_text('{"event": "start", "jo\n{"event": "other", "task": null}\n[1]\n')
    job.event("end", 3, code=78, decision="stop")
    [refused] = read_starts(job.folder)
    assert refused.began is None and refused.ended == NOW - 100


def test_exit_codes_have_words():
    assert in_words(137) == "killed by SIGKILL" and in_words(128 + 99) == "failed"
    assert in_words(75) == "asked to stop, wants to go on" and in_words(99) == "failed" and in_words(None) == ""


# status

def test_status_of_a_running_training(slurm, job, capsys):
    slurm.says(RUNNING)
    job.ended(75, "requeue", ago=100, progress=4).event("start", 1, 50, 4)
    (job.folder / "config.yaml").write_text("train:\n  steps: 20\n")
    rows = [{"event": "start", "attempt": 1, "step": 0, "time": NOW - 90}]
    rows += [{"attempt": 1, "step": n, "time": NOW - 90 + n, "loss": 9.0} for n in range(1, 7)]
    rows += [{"event": "start", "attempt": 2, "step": 4, "time": NOW - 40}]
    rows += [{"attempt": 2, "step": n, "time": NOW - 40 + 2 * n, "loss": 0.5, "tokens_per_second": 100.0 * n,
              "mfu": 0.4} for n in range(5, 11)]
    rows += [{"attempt": 2, "step": 10, "time": NOW - 10, "validation_loss": 0.7}]
    (job.run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 11')
    (job.run / "health.json").write_text(json.dumps({"time": NOW, "state": "running", "world_size": 4, "silent": [3]}))
    values = answer_of(status.main, job, capsys)
    progress = values["progress"]
    assert (values["state"], values["restarts"], values["jobs"][0]["id"]) == ("RUNNING", 1, "12")
    assert (progress["step"], progress["steps"], progress["loss"], progress["mfu"]) == (10, 20, 0.5, 0.4)
    assert progress["tokens_per_second"] == 750 and progress["seconds_left"] == 20
    assert progress["health"]["silent"] == [3]
    assert [start["runs"] for start in values["starts"]] == [False, True]
    text = text_of(status.main, job, capsys)
    for part in ("RUNNING on node[1-2]", "step 10 of 20 (50.0%)", "MFU 40.0%", "20 s of training left", "ranks 3",
                 "asked to stop, wants to go on", "back into the queue"):
        assert part in text


def test_status_without_slurm_tells_what_the_files_tell(slurm, job, capsys):
    job.event("start")
    assert answer_of(status.main, job, capsys)["state"] == "started"
    assert "no end is recorded" in text_of(status.main, job, capsys)
    job.event("end", code=0, decision="done", ago=50)
    assert answer_of(status.main, job, capsys)["state"] == "finished"
    assert "cannot be asked: there is no squeue" in text_of(status.main, job, capsys)


@pytest.mark.parametrize("code, decision, said, state", [
    (0, "done", [], "finished"), (1, "requeue", [PENDING], "PENDING"), (1, "requeue", [], "died"),
    (75, "cancelled", [], "cancelled"), (75, "next", [], "ended"), (75, "left", [], "ended"),
])
def test_status_behind_an_end(slurm, job, capsys, code, decision, said, state):
    slurm.says(*said)
    job.ended(code, decision)
    assert answer_of(status.main, job, capsys)["state"] == state


def test_status_of_the_newest_of_several_submissions(slurm, job, capsys):
    slurm.says(PENDING.replace("12|", "20|"))
    Job(job.run, 2).ids(20)
    assert answer_of(status.main, job, capsys)["earlier_submissions"] == 1
    assert "20 PENDING (BeginTime), expected to start" in text_of(status.main, job, capsys)


def test_status_says_why_a_job_was_stopped_or_never_began(slurm, job, capsys):
    slurm.says()
    assert answer_of(status.main, job, capsys)["detail"] == "it left the queue without a start"
    job.event("end", 3, code=78, decision="stop")
    (job.folder / "stopped").write_text("stopped: 3 starts in a row\n")
    values = answer_of(status.main, job, capsys)
    assert (values["state"], values["detail"]) == ("stopped", "stopped: 3 starts in a row")
    (job.folder / "job-ids").unlink()
    Job(job.run, 2).folder.joinpath("job-ids").unlink()
    assert answer_of(status.main, job, capsys)["state"] == "unsubmitted"


def test_status_of_an_array_counts_elements_by_state(slurm, tmp_path, capsys):
    array = Job(tmp_path / "run", kind="tokenize", array=4)
    slurm.says(f"12_2|RUNNING|node1|{NOW}|N/A|None", "12_3|PENDING||N/A|N/A|Resources")
    array.ended(0, "done", task=0).event("start", task=1).event("start", task=2)
    (array.run / "status.json").write_text(json.dumps({
        "state": "running", "written": NOW, "chunks": 3, "chunks_in_all": 9, "bad_lines": 1, "clips_per_second": 2.5,
        "workers": 4, "seconds_left": 100.0}))
    values = answer_of(status.main, array, capsys)
    assert values["elements"] == {"RUNNING": 1, "PENDING": 1, "died": 1, "finished": 1} and values["state"] == "RUNNING"
    assert (values["progress"]["chunks"], values["progress"]["workers"]) == (3, 4)
    assert "3 of 9 chunks, 2.5 clips/s, 4 workers" in text_of(status.main, array, capsys)


def test_status_survives_damaged_files(slurm, job, capsys):
    slurm.says(RUNNING)
    (job.run / "metrics.jsonl").write_text('no json\n{"step": 3, "time": 1.0, "loss": null}\n')
    (job.run / "health.json").write_text("{}")
    progress = answer_of(status.main, job, capsys)["progress"]
    assert (progress["step"], progress["loss"], progress["health"], progress["steps"]) == (3, None, None, None)
    assert "loss not finite" in text_of(status.main, job, capsys)


# logs

def test_logs_prints_the_end_of_a_ranks_log(slurm, job, capsysbinary):
    job.ended(75, "requeue").event("start", 1, 50).log(0, "old\n").log(1, "a\nb\nc\n", "12-1").batch("said\n")
    assert logs.main([str(job.run), "--rank", "1", "--lines", "2"]) == 0
    assert capsysbinary.readouterr().out == b"b\nc\n"
    assert logs.main([str(job.run), "--restart", "0"]) == 0
    assert logs.main([str(job.run), "--batch", "--lines", "0"]) == 0
    assert capsysbinary.readouterr().out == b"old\nsaid\n"


def test_logs_names_what_is_there(job, tmp_path):
    with pytest.raises(UserError, match="has not started yet"):
        logs.main([str(job.run)])
    job.event("start")
    with pytest.raises(UserError, match="no logs of processes"):
        logs.main([str(job.run)])
    for rank in (0, 1, 2, 5):
        job.log(rank, "")
    with pytest.raises(UserError, match="no log of rank 3; there are 0-2, 5"):
        logs.main([str(job.run), "--rank", "3"])
    with pytest.raises(UserError, match="no restart 4; there are 0"):
        logs.main([str(job.run), "--restart", "4"])
    with pytest.raises(ConfigError, match="--task is for arrays"):
        logs.main([str(job.run), "--task", "0"])
    with pytest.raises(ConfigError, match="--lines"):
        logs.main([str(job.run), "--lines", "-1"])
    array = Job(tmp_path / "array", array=3).event("start", task=2)
    with pytest.raises(UserError, match="choose one with --task; started are 2"):
        logs.main([str(array.run)])


def test_logs_follows_over_a_restart_until_the_job_is_done(slurm, job, capsysbinary, monkeypatch):
    monkeypatch.setattr(logs, "POLL_SECONDS", 0.01)
    job.event("start", 0, 100).log(0, "first\n")

    def goes_on():
        time.sleep(0.05)
        with open(job.folder / "logs" / "12-0" / "rank-00000.log", "a") as file:
            file.write("more\n")
        job.event("end", 0, 90, code=75, decision="requeue")
        time.sleep(0.05)
        job.event("start", 1, 80).log(0, "second\n", "12-1")
        time.sleep(0.05)
        job.event("end", 1, 70, code=0, decision="done")

    thread = threading.Thread(target=goes_on)
    thread.start()
    assert logs.main([str(job.run), "--follow"]) == 0
    thread.join()
    assert capsysbinary.readouterr().out == b"first\nmore\nsecond\n"


def test_following_ends_when_slurm_has_nothing_of_the_job(slurm, job, capsysbinary, monkeypatch):
    monkeypatch.setattr(logs, "ASK_SECONDS", 0.0)
    slurm.says()
    job.event("start").batch("killed\n")
    assert logs.main([str(job.run), "--follow", "--batch"]) == 0
    assert capsysbinary.readouterr().out == b"killed\n"


def test_the_end_of_a_file_is_found_without_reading_it_all(tmp_path, monkeypatch):
    monkeypatch.setattr("grn_scale.slurm.tail.BLOCK_BYTES", 3)
    path = tmp_path / "log"
    path.write_bytes(b"one\ntwo\nthree\nunfinished")
    assert [path.read_bytes()[begin_of_last_lines(path, n):] for n in (1, 2, 9, 0)] == [
        b"unfinished", b"three\nunfinished", path.read_bytes(), path.read_bytes()]
    assert last_bytes(path, 15) == b"unfinished" and last_bytes(path, 99) == path.read_bytes()
    path.write_bytes(b"\n\nx\n")
    assert begin_of_last_lines(path, 2) == 1
    path.write_bytes(b"")
    assert begin_of_last_lines(path, 1) == 0


def test_durations_are_short():
    assert [duration(s) for s in (0, 59.6, 185, 7800, 3600, 400000)] == [
        "0 s", "1 min", "3 min 5 s", "2 h 10 min", "1 h", "4 d 15 h"]


# cancel

def test_cancel_lets_what_runs_save_and_takes_out_what_waits(slurm, job, capsys):
    slurm.says(RUNNING, "13|PENDING||N/A|N/A|Dependency")
    job.ids(12, 13)
    assert answer_of(cancel.main, job, capsys) == {
        "submission": str(job.folder), "cancelled": ["13"], "saving": ["12"]}
    assert slurm.calls == ["13", "--signal=USR2 --batch 12"] and (job.folder / "cancelled").exists()
    assert "asked to save and end: 12 on node[1-2]" in text_of(cancel.main, job, capsys)


def test_cancel_now_asks_nobody(slurm, tmp_path, capsys):
    array = Job(tmp_path / "run", array=3)
    slurm.says("12_0|RUNNING|node1|1|1|None", "12_1|PENDING||N/A|N/A|Resources", "12_2|COMPLETED||1|1|None")
    assert "cancelled: 12_0 (RUNNING) cancelled: 12_1 (PENDING)" in text_of(cancel.main, array, capsys, "--now")
    assert slurm.calls == ["12_0 12_1"]


def test_cancel_says_where_there_was_nothing(slurm, job, capsys):
    slurm.says("12|COMPLETED||1|1|None")
    assert "nothing to cancel" in text_of(cancel.main, job, capsys)
    assert slurm.calls == [] and not (job.folder / "cancelled").exists()


def test_cancel_without_slurm_keeps_the_mark_and_says_so(slurm, job):
    with pytest.raises(UserError, match="nothing is cancelled.*will not go back into the queue"):
        cancel.main([str(job.run)])
    assert (job.folder / "cancelled").exists()


def test_cancel_tells_what_scancel_refuses(slurm, job):
    slurm.says(RUNNING).refuses()
    with pytest.raises(UserError, match="permission denied"):
        cancel.main([str(job.run)])


def test_a_folder_without_submissions_is_named(tmp_path):
    for main in (status.main, logs.main, why.main, cancel.main):
        with pytest.raises(UserError, match="no submission of `grn-scale slurm` there"):
            main([str(tmp_path)])
