"""`grn-scale slurm why`: the process to blame, from logs, reports and Slurm's own words."""

import json
import os

import pytest

from grn_scale.slurm import why
from grn_scale.slurm.batch_events import events, of_start
from grn_scale.slurm.log_errors import HANGS, LOST_CONTACT, NAMES_ANOTHER, OWN, errors
from grn_scale.slurm.nodelist import expand
from tests.helpers.slurm_records import NOW, PENDING, RUNNING, Job, Slurm, answer_of, text_of


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    return Slurm(tmp_path, monkeypatch)


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path / "run")



# errors in logs

TRACEBACK = """\
2026-11-23 01:00:00 INFO     step 4
[rank3]: Traceback (most recent call last):
[rank3]:   File "train.py", line 3, in main
[rank3]:     batch[key]
[rank3]: KeyError: 'bits'

[rank3]: During handling of the above exception, another exception occurred:

[rank3]: Traceback (most recent call last):
[rank3]:   File "train.py", line 9, in main
[rank3]: RuntimeError: [gloo/transport] Connection closed by peer
"""
NAMED = "error: rank 3 on host failed: KeyError: 'bits'\n"
HANG = """\
the run hangs: rank 0 is in step of step 4 for 11 s
  behind is rank 1 on node1 (process 4711): step 4, data for 11 s
  the others wait: 1 in step of step 4
"""


@pytest.mark.parametrize("log, kind, line, rank", [
    (TRACEBACK, OWN, "KeyError: 'bits'", None),
    ("[rank 2] error: no space left\n  free space\nnext\n", OWN, "no space left", None),
    (f"[rank 1] {NAMED}", NAMES_ANOTHER, "KeyError: 'bits'", 3),
    (f"error: {HANG}", HANGS, "the run hangs: rank 0 is in step of step 4 for 11 s", 1),
    ("Traceback (most recent call last):\n  File\nRuntimeError: NCCL error: remote\n", LOST_CONTACT,
     "RuntimeError: NCCL error: remote", None),
    ("Traceback (most recent call last):\n  File\ntorch.OutOfMemoryError: CUDA out of memory. Tried\n", OWN,
     "torch.OutOfMemoryError: CUDA out of memory. Tried", None),
    ("Fatal Python error: Segmentation fault\n\nThread 0x1 (most recent call first):\n  File a\n\n", OWN,
     "Fatal Python error: Segmentation fault", None),
    ("Timeout (0:10:00)!\nThread 0x1 (most recent call first):\n  File a\n", OWN, "Timeout (0:10:00)!", None),
    ("Traceback (most recent call last):\n  File", OWN, "a traceback without its end", None),
])
def test_the_error_of_a_process_is_found_in_its_log(log, kind, line, rank):
    error = errors(log)[-1]
    assert (error.kind, error.line, error.rank) == (kind, line, rank)


def test_a_log_without_errors_has_none():
    assert errors("2026-11-23 01:00:00 INFO   Killed the old cache, error: none\nloss 0.4\n") == []
    assert errors("Exception ignored in: <f>\nTraceback (most recent call last):\n  File\nTypeError: x\n") == []


def test_the_batch_log_is_cut_at_the_starts():
    log = "".join(f"2026-11-23T01:00:0{n}Z start {n} of job 12 on node1; x\nline {n}\n" for n in range(3))
    assert "line 1" in of_start(log, 1) and "line 2" not in of_start(log, 1) and of_start(log, 7) == ""


def test_slurms_own_words_are_understood():
    told = list(events(
        "srun: error: node2: tasks 2-3: Killed\n"
        "slurmstepd: error: *** STEP 12.0 ON node1 CANCELLED AT 2026-11-23T01:00:00 ***\n"
        "slurmstepd: error: *** JOB 12 ON node1 CANCELLED AT 2026-11-23T01:00:00 DUE TO TIME LIMIT ***\n"
        "slurmstepd: error: *** JOB 12 ON node1 CANCELLED AT 2026-11-23T01:00:00 DUE TO NODE FAILURE, SEE\n"
        "slurmstepd: error: *** JOB 12 ON node1 CANCELLED AT 2026-11-23T01:00:00 ***\n"
        "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=12.0.\n"
        "srun: error: Node failure on node2\n"))
    assert [(event.kind, event.rank, event.node) for event in told] == [
        ("task", 2, "node2"), ("job", None, "node1"), ("job", None, "node1"), ("job", None, "node1"),
        ("memory", None, ""), ("node", None, "node2")]
    assert told[1].what == "its time limit was reached" and told[2].what == "a node failed"


def test_lists_of_nodes_are_spelled_out():
    assert expand("node[1-2,07-08],x") == ["node1", "node2", "node07", "node08", "x"] and expand("") == []
    assert expand("r[1-2]n[1-2]") == ["r1n1", "r1n2", "r2n1", "r2n2"] and expand("a[b]") == ["a[b]"]


# why

def head(restart=0):
    return f"2026-11-23T01:00:00Z start {restart} of job 12 on node[1-2]; logs\n"


def test_why_names_the_process_that_others_point_at_with_its_own_error(slurm, job, capsys):
    slurm.says(PENDING)
    job.ended(1, "requeue").log(0, NAMED).log(1, f"[rank 1] {NAMED}", age=9).log(2, f"[rank 2] {NAMED}")
    job.log(3, TRACEBACK)
    job.batch(head() + "srun: error: node1: task 1: Exited with exit code 1\n")
    values = answer_of(why.main, job, capsys)
    found = values["diagnosis"]
    assert (found["rank"], found["node"], found["log"][-19:]) == (3, "node2", "12-0/rank-00003.log")
    assert values["headline"].endswith("rank 3 on node2 failed: KeyError: 'bits'") and values["failed"]
    assert "During handling" in found["text"] and "waits in the queue (BeginTime)" in values["next"]
    text = text_of(why.main, job, capsys)
    assert "culprit rank 3 on node2 log" in text and "| KeyError: 'bits'" in text


def test_why_joins_what_the_others_and_slurm_say_of_a_killed_process(slurm, job, capsys):
    slurm.says()
    dead = "error: rank 2 on host failed: its process 7 ended without a word in step of step 4 (killed, ...)\n"
    job.ended(137, "requeue").log(0, dead).log(1, dead).log(2, "loss 0.5\n")
    job.batch(head() + "slurmstepd: error: Detected 1 oom_kill event in StepId=12.0\n"
              "srun: error: node2: task 2: Killed\n")
    values = answer_of(why.main, job, capsys)
    assert (values["diagnosis"]["rank"], values["diagnosis"]["node"]) == (2, "node2")
    assert "Slurm says: it was killed for its memory" in values["headline"]
    assert "it went back into the queue, and is not there" not in values["headline"]
    assert "submit it again" in values["next"]


def test_why_takes_whom_slurm_names_before_those_that_lost_contact(slurm, job, capsys):
    slurm.says()
    lost = "Traceback (most recent call last):\n  File\nRuntimeError: gloo/x Connection closed by peer\n"
    job.ended(137, "requeue").log(0, lost, age=5).log(3, "")
    job.batch(head() + "srun: error: node2: task 3: Killed\nsrun: error: node1: task 0: Exited with exit code 1\n")
    assert answer_of(why.main, job, capsys)["diagnosis"]["rank"] == 3
    job.batch(head())
    values = answer_of(why.main, job, capsys)
    assert "lost contact" in values["headline"] and values["diagnosis"]["rank"] == 0


def test_why_counts_processes_with_the_same_error(slurm, job, capsys):
    slurm.says()
    (job.folder / "stopped").write_text("stopped: exit code 78, which would come again\n")
    for rank in range(3):
        job.log(rank, f"[rank {rank}] error: 101 bad samples\n", age=rank == 1)
    job.ended(78, "stop", progress=40)
    values = answer_of(why.main, job, capsys)
    assert values["headline"].endswith("rank 1 on node1 failed: 101 bad samples (2 more processes have the same error)")
    assert "mend the cause, then submit it again" in values["next"] and "from step 40" in values["next"]


def test_why_reads_the_report_of_a_hang(slurm, job, capsys):
    slurm.says(RUNNING)
    job.ended(79, "requeue").event("start", 1, 50).log(0, f"error: {HANG}")
    folder = job.run / "hangs" / "20261123-010000"
    folder.mkdir(parents=True)
    (folder / "report.txt").write_text(HANG)
    (folder / "rank-00001.txt").write_text("stacks")
    os.utime(folder / "report.txt", (NOW - 101, NOW - 101))
    values = answer_of(why.main, job, capsys)
    assert (values["diagnosis"]["rank"], values["diagnosis"]["node"]) == (1, "node1")
    assert values["diagnosis"]["log"].endswith("rank-00001.txt") and "the job runs again" in values["headline"]
    os.utime(folder / "report.txt", (NOW - 9999, NOW - 9999))  # of another start: the log tells the same
    assert answer_of(why.main, job, capsys)["diagnosis"]["rank"] == 1


def test_why_of_the_crash_loop_limit_explains_the_last_start_that_ran(slurm, job, capsys):
    slurm.says()
    job.ended(1, "requeue", ago=200).log(0, "error: no such dataset\n").event("end", 1, code=78, decision="stop")
    line = "stopped: 3 starts in a row ended without progress"
    job.batch(head() + f"2026-11-23T01:00:01Z {line}\n")
    (job.folder / "stopped").write_text(line)
    values = answer_of(why.main, job, capsys)
    assert values["headline"].startswith(line) and "no such dataset" in values["headline"]


def test_why_of_a_preflight_that_failed(slurm, job, capsys):
    slurm.says(PENDING)
    checks = job.folder / "preflight" / "12-0"
    checks.mkdir(parents=True)
    (checks / "node1.ok").touch()
    (checks / "node2.json").write_text(json.dumps({"results": [
        {"check": "disk", "state": "failed", "detail": "2 GB free", "remedy": "free space"},
        {"check": "dns", "state": "ok", "detail": "", "remedy": ""}]}))
    job.ended(1, "requeue")
    values = answer_of(why.main, job, capsys)
    assert "the preflight failed on node2" in values["headline"]
    assert values["diagnosis"]["text"] == "node2: disk: 2 GB free; free space"
    (checks / "node2.json").unlink()
    assert answer_of(why.main, job, capsys)["diagnosis"]["text"] == "node2: it did not answer"


@pytest.mark.parametrize("cause, words", [("TIME LIMIT", "its time limit was reached"), ("PREEMPTION", "preempted"),
                                          ("NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS", "a node failed")])
def test_why_of_what_slurm_ended(slurm, job, capsys, cause, words):
    slurm.says()
    job.event("start").log(0, "error: an old one\n")
    job.batch(f"{head()}slurmstepd: error: *** JOB 12 ON node2 CANCELLED AT 2026-11-23T01:00:00 DUE TO {cause} ***\n")
    values = answer_of(why.main, job, capsys)
    assert words in values["headline"] and values["diagnosis"]["node"] == "node2"


def test_why_of_a_start_without_an_end(slurm, job, capsys):
    slurm.says("12|NODE_FAIL|node1|N/A|N/A|None")
    job.event("start")
    values = answer_of(why.main, job, capsys)
    assert values["headline"].endswith("no end of it is recorded: Slurm says NODE_FAIL")
    slurm.says(problem="no controller")
    assert "it may run, Slurm cannot be asked (no controller)" in answer_of(why.main, job, capsys)["headline"]


def test_why_of_a_process_that_failed_before_it_had_a_log(slurm, job, capsys):
    slurm.says()
    job.ended(1, "requeue").batch(head() + "Traceback (most recent call last):\n  File\nImportError: no libcuda\n"
                                  "srun: error: node1: tasks 0-3: Exited with exit code 1\n")
    values = answer_of(why.main, job, capsys)
    assert values["headline"].endswith("rank 0 on node1 failed: ImportError: no libcuda")


def test_why_of_an_end_without_a_word(slurm, job, capsys):
    slurm.says()
    job.ended(7, "requeue").batch(head() + "node1: clock       ok      0.002 s ahead\nlast words\n")
    values = answer_of(why.main, job, capsys)
    assert "exit code 7 (failed), and no log says why" in values["headline"]
    assert values["diagnosis"]["text"] == head() + "last words"


def test_why_of_a_stop_that_was_asked_for_is_no_failure(slurm, job, capsys):
    slurm.says(PENDING)
    job.ended(75, "requeue").log(0, "2026-11-23 01:00:00 WARNING  stopping after step 4, since the time is up\n")
    job.batch(head() + "2026-11-23T01:00:00Z asked to stop\n2026-11-23T01:00:09Z exit code 75: back into the queue\n"
              "slurmstepd: error: *** JOB 12 ON node1 CANCELLED AT x DUE TO JOB REQUEUE ***\n")
    values = answer_of(why.main, job, capsys)
    assert values["headline"].endswith("it was asked to stop, and saved") and not values["failed"]
    assert "the time is up" in values["diagnosis"]["text"]


def test_why_of_a_failure_that_made_the_others_save(slurm, job, capsys):
    slurm.says(PENDING)
    job.ended(75, "requeue").log(0, "saved\n").log(3, TRACEBACK.replace("Runtime", "Value").replace("gloo", "x"))
    job.batch(head() + "srun: error: node2: task 3: Exited with exit code 1\n"
              "slurmstepd: error: *** STEP 12.0 ON node1 CANCELLED AT x ***\n")
    values = answer_of(why.main, job, capsys)
    assert values["headline"].endswith("rank 3 on node2 failed: KeyError: 'bits'") and values["failed"]
    job.log(3, "saved\n")
    assert "as when another job preempts it" in answer_of(why.main, job, capsys)["headline"]


def test_why_of_a_job_that_somebody_put_back_into_the_queue(slurm, job, capsys):
    slurm.says(PENDING)
    job.ended(75, "requeue").batch(head() + "x: *** JOB 12 ON node1 CANCELLED AT x DUE TO JOB REQUEUE ***\n"
                                   "2026-11-23T01:00:00Z asked to stop\n")
    assert "asked to stop (it was put back into the queue)" in answer_of(why.main, job, capsys)["headline"]


@pytest.mark.parametrize("said, made, words", [
    ([RUNNING], lambda job: job.event("start"), "nothing is wrong: the job is RUNNING"),
    ([PENDING], lambda job: job, "nothing is wrong: the job is PENDING (BeginTime)"),
    ([], lambda job: job.ended(0, "done"), "nothing is wrong: the job is done"),
    ([], lambda job: job, "the job died (it left the queue without a start)"),
])
def test_why_says_when_nothing_is_wrong(slurm, job, capsys, said, made, words):
    slurm.says(*said)
    made(job)
    assert answer_of(why.main, job, capsys)["headline"] == words
    assert "next: " in text_of(why.main, job, capsys)


def test_why_of_an_array_explains_one_bad_element_and_names_the_others(slurm, tmp_path, capsys):
    slurm.says()
    array = Job(tmp_path / "run", kind="tokenize", array=3, processes_per_node=1)
    array.ended(1, "requeue", task=0, ago=100).ended(0, "done", task=1, ago=20).ended(1, "requeue", task=2, ago=50)
    array.log(0, "error: disk full\n", "12_2-0")
    values = answer_of(why.main, array, capsys)
    assert values["start"] == "12_2-0" and "disk full" in values["headline"] and values["others"] == ["12_0-0"]
    assert "not fine either: 12_0-0" in text_of(why.main, array, capsys)


def test_what_could_not_even_be_started_is_told(slurm, job, capsys):
    head = "2026-11-23T01:00:00Z start 0 of job 12 on node[1-2]; processes meet at a:1; logs in b\n"
    job.batch(f"{head}2026-11-23T01:00:00Z error: module load cuda/9 failed; correct modules: back into the queue\n")
    job.ended(1, "requeue")
    assert "module load cuda/9 failed" in text_of(why.main, job, capsys)
    job.batch(f"{head}Traceback (most recent call last):\n  File\nModuleNotFoundError: No module named 'torch'\n"
              "2026-11-23T01:00:00Z error: preflight failed on node1 node2; see x\n")
    (job.folder / "preflight" / "12-0").mkdir(parents=True)
    said = text_of(why.main, job, capsys)
    assert "the preflight failed on node1, node2" in said and "No module named 'torch'" in said


def test_a_process_that_was_killed_comes_before_those_that_lost_it(slurm, job, capsys):
    lost = "terminate called after throwing c10::DistBackendError\n"
    for rank in (0, 1, 3):
        job.log(rank, lost)
    job.log(2, "")
    job.batch("2026-11-23T01:00:00Z start 0 of job 12 on node[1-2]; x\n"
              "srun: error: node1: tasks 0-1: Aborted\nsrun: error: node2: task 2: Killed\n")
    job.ended(134, "requeue")
    assert "rank 2 on node2 ended (task 2: Killed) without a word of its own" in text_of(why.main, job, capsys)
    job.log(2, lost)
    assert "rank 0 on node1 ended (tasks 0-1: Aborted): terminate called" in text_of(why.main, job, capsys)
