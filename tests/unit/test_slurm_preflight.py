"""The preflight: nodes that meet, or do not, and the one that is to blame is named. The nodes of most tests are
threads; two real ones stand at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from grn_scale.slurm import preflight, preflight_network
from grn_scale.slurm.preflight_check import Limit, Node, Passed, Result, judge
from grn_scale.slurm.preflight_network import Network
from tests.helpers.dataset import make_dataset
from tests.helpers.preflight import NAMES, named, states, write_settings
from tests.helpers.slurm_cluster import free_ports

# -- nodes ---------------------------------------------------------------------------------------------------------


def meet(records, present=NAMES, *, seconds=60.0, dies_at=None, **settings):
    """Results of each node that is present, by its name. dies_at: name -> check that it does not come to any more.
    settings: a value for all nodes, or by name."""
    (port,), found, threads = free_ports(1), {name: [] for name in present}, []

    def run(name):
        own = {key: value.get(name) if isinstance(value, dict) else value for key, value in settings.items()}
        node = Node(NAMES.index(name), NAMES)
        network = Network(node, f"localhost:{port}", Limit(seconds), records,
                          **{key: value for key, value in own.items() if value is not None})
        for check, action in network.checks():
            if check == (dies_at or {}).get(name):
                return
            found[name].append(judge(check, action))

    for name in present:
        threads.append(threading.Thread(target=run, args=(name,), name=name))
        threads[-1].start()
    for thread in threads:
        thread.join()
    return found


def test_nodes_meet_compare_and_measure(tmp_path):
    found = meet(tmp_path)
    for results in found.values():
        assert states(results) == {"address": "ok", "meeting": "ok", "clock": "ok", "devices": "skipped",
                                   "versions": "ok", "data flow": "ok", "bandwidth": "ok"}
        assert named(results, "bandwidth").measured["sum_gigabytes_per_second"] > 0
        assert torch.__version__ in named(results, "versions").detail
    assert abs(named(found["node3"], "clock").measured["clock_seconds"]) < 1


def test_a_node_that_does_not_come_is_named_by_all_and_waited_for_no_longer_than_told(tmp_path):
    begin, seconds = time.monotonic(), 6
    found = meet(tmp_path, ("node1", "node3"), seconds=seconds)
    assert time.monotonic() - begin < 2 * seconds
    for results in found.values():
        met = named(results, "meeting")
        assert (met.state, met.nodes) == ("failed", ("node2",)) and "node2 did not come" in met.detail
        assert named(results, "data flow").detail == "node2 is missing"
        assert states(results)["versions"] == states(results)["bandwidth"] == "skipped"


def test_the_first_node_is_to_blame_unless_it_started_and_this_one_cannot_reach_it(tmp_path):
    lonely = named(meet(tmp_path, ("node2",), seconds=1)["node2"], "meeting")
    assert lonely.nodes == ("node1",) and "did not start" in lonely.detail
    (tmp_path / "node1.json").touch()
    lonely = named(meet(tmp_path, ("node2",), seconds=1)["node2"], "meeting")
    assert lonely.nodes == () and "cannot reach node1 at localhost" in lonely.detail and "firewall" in lonely.remedy


def test_a_node_that_is_lost_later_is_named_and_so_is_the_one_where_they_meet(tmp_path):
    found = meet(tmp_path, seconds=6, dies_at={"node3": "versions"})
    for name in ("node1", "node2"):
        lost = named(found[name], "versions")
        assert (lost.state, lost.nodes) == ("failed", ("node3",)) and states(found[name])["clock"] == "ok"
    found = meet(tmp_path, seconds=6, dies_at={"node1": "versions"})
    for name in ("node2", "node3"):  # an answer about clocks may still have been on its way
        failed = [result for result in found[name] if result.state == "failed"]
        assert [result.nodes for result in failed] == [("node1",)] and "no longer answers" in failed[0].detail
        assert "\n" not in failed[0].detail and states(found[name])["data flow"] == "skipped"


def test_a_taken_port_is_said_by_the_node_that_needs_it(tmp_path):
    import socket

    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        network = Network(Node(0, NAMES), f"localhost:{taken.getsockname()[1]}", Limit(5), tmp_path)
        result = judge("meeting", network.meet)
    assert result.state == "failed" and "cannot listen on port" in result.detail and result.nodes == ()


def test_a_clock_that_is_off_fails_on_its_node_and_a_little_does_not(tmp_path):
    found = meet(tmp_path, clock={"node2": lambda: time.time() - 12, "node3": lambda: time.time() + 3})
    off, near = named(found["node2"], "clock"), named(found["node3"], "clock")
    assert off.state == "failed" and "s behind node1" in off.detail and off.nodes == ()
    assert near.state == "ok" and abs(near.measured["clock_seconds"] - 3) < 1 and "ahead of node1" in near.detail
    assert states(found["node1"])["clock"] == states(found["node2"])["data flow"] == "ok"


def test_the_node_with_another_driver_is_named_by_itself_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight_network, "driver_version",
                        lambda: "550.1" if threading.current_thread().name == "node1" else "535.2")
    found = {name: named(results, "versions") for name, results in meet(tmp_path).items()}
    assert found["node1"].state == "warning"  # sites change drivers node by node
    assert "WARNING driver is 550.1" in found["node1"].line("node1")
    assert "driver is 550.1, but 535.2 on node2 and most nodes" in found["node1"].detail
    assert found["node2"].state == "ok" and found["node2"].detail.endswith("as on most nodes")


def test_the_node_with_another_release_is_named_by_itself_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight_network, "software", lambda: {
        "grn_scale": "0.0.0" if threading.current_thread().name == "node1" else "1.0", "driver": "535.2"})
    found = {name: named(results, "versions") for name, results in meet(tmp_path).items()}
    assert found["node1"].state == "failed" and "grn_scale is 0.0.0, but" in found["node1"].detail
    assert found["node2"].state == "ok" and found["node2"].detail.endswith("as on most nodes")


def test_too_slow_a_network_fails_only_where_a_bound_is_given(tmp_path):
    slow = named(meet(tmp_path, minimum_bandwidth=1e6)["node2"], "bandwidth")
    assert slow.state == "failed" and "less than 1e+06" in slow.detail


def test_a_node_alone_needs_no_others(tmp_path):
    results = [judge(*check) for check in Network(Node(0, ("a",)), "", Limit(60), tmp_path).checks()]
    assert {result.state for result in results if result.check != "versions"} == {"skipped"}
    assert named(results, "versions").state == "ok"
    several = [judge(*check) for check in Network(Node(1, NAMES), "", Limit(60), tmp_path).checks()]
    assert "MASTER_ADDR" in named(several, "address").detail
    assert states(several)["meeting"] == states(several)["versions"] == "skipped"


def test_a_name_without_address_is_said(tmp_path):
    result = judge("address", Network(Node(1, NAMES), "no-such-host.invalid:1", Limit(5), tmp_path).address)
    assert result.state == "failed" and "no-such-host.invalid has no address here" in result.detail


def test_the_place_of_a_node_comes_from_slurm():
    assert Node.of_step({}).alone
    step = {"SLURM_STEP_NUM_TASKS": "3", "SLURM_NODEID": "2", "GRN_SCALE_NODES": "a b c "}
    assert Node.of_step(step) == Node(2, ("a", "b", "c")) and Node.of_step(step).name == "c"
    bare = Node.of_step({"SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURMD_NODENAME": "b"})
    assert bare.names == ("number-0", "b")


# -- the processes of a node ---------------------------------------------------------------------------------------

TELLS = """
import json, os, signal, sys, time
pipe = int(sys.argv[sys.argv.index("--pipe") + 1])
def tell(value): os.write(pipe, (json.dumps(value) + chr(10)).encode())
def done(name): tell({"begins": name}); tell({"check": name, "state": "ok", "detail": "well", "seconds": 0})
"""


def watched(seconds=30.0, **codes):
    said = []
    results = preflight.watch({name: [sys.executable, "-c", TELLS + code] for name, code in codes.items()}, seconds,
                              said.append)
    assert said == results
    return results


def test_a_check_that_hangs_is_ended_and_the_other_process_tells_all_it_found():
    begin = time.monotonic()
    results = watched(2.0, files='done("disk"); tell({"begins": "dataset"}); time.sleep(60)', network='done("meeting")')
    assert time.monotonic() - begin < 5
    assert states(results) == {"disk": "ok", "meeting": "ok", "dataset": "failed"}
    hung = named(results, "dataset")
    assert "did not end within the 2 s" in hung.detail and "hangs" in hung.remedy


def test_a_process_that_crashes_is_a_failure_of_its_check():
    results = watched(network='tell({"begins": "devices"}); os.kill(os.getpid(), signal.SIGSEGV)', files="sys.exit(3)")
    assert "ended by SIGSEGV" in named(results, "devices").detail
    assert "exit code 3" in named(results, "files checks").detail


def test_whatever_a_check_raises_is_a_result():
    def breaks():
        raise ImportError("no module named torch")

    def not_there():
        Path("/no/such/file").read_text()

    assert judge("a", breaks).detail == "ImportError: no module named torch"
    assert judge("b", not_there).detail.startswith("/no/such/file: No such file")
    assert judge("c", lambda: Passed("well", {"x": 1.0})).measured == {"x": 1.0}


def test_a_node_is_fit_where_only_others_failed(tmp_path):
    node, other = Node(0, NAMES), Result("meeting", "failed", "node2 did not come", 1.0, nodes=("node2",))
    preflight._announce(tmp_path, node)
    assert not json.loads((tmp_path / "node1.json").read_text())["finished"]
    preflight._conclude(tmp_path, node, [other])
    assert (tmp_path / "node1.ok").exists()
    preflight._announce(tmp_path, node)
    assert not (tmp_path / "node1.ok").exists()
    preflight._conclude(tmp_path, node, [other, Result("disk", "failed", "full", 1.0)])
    found = json.loads((tmp_path / "node1.json").read_text())
    assert not (tmp_path / "node1.ok").exists() and found["finished"] and not found["fit"]
    assert found["results"][1] == {"check": "disk", "state": "failed", "detail": "full", "seconds": 1.0, "remedy": "",
                                   "nodes": [], "measured": {}}


def test_records_that_cannot_be_written_fail_the_node(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(preflight, "PROCESSES", {})
    arguments = ["--records", str(tmp_path / "file/records"), "--config", "c.yaml", "--seconds", "20"]
    assert preflight.main(arguments) == 1
    assert "records" in capsys.readouterr().out
    assert preflight._within(0.1, lambda: time.sleep(0.5)) == "no answer within 0 s"


def test_two_real_nodes_of_which_one_cannot_read_the_dataset(tmp_path):
    make_dataset(tmp_path / "tokens")
    (tmp_path / "other").mkdir()
    config, (port,) = {"node1": write_settings(tmp_path), "node2": write_settings(tmp_path / "other")}, free_ports(1)
    processes = {}
    for number, name in enumerate(("node1", "node2")):
        step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_NODEID": str(number), "GRN_SCALE_NODES": "node1 node2 ",
                "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        processes[name] = subprocess.Popen(
            [sys.executable, "-m", "grn_scale.slurm.preflight", "--records", str(tmp_path / "records"), "--config",
             str(config[name]), "--gpus-per-node", "0", "--seconds", "200"],
            env={**os.environ, **step}, stdout=subprocess.PIPE, text=True)
    printed = {name: process.communicate(timeout=200)[0] for name, process in processes.items()}
    assert {name: process.returncode for name, process in processes.items()} == {"node1": 0, "node2": 1}, printed
    assert {path.name for path in (tmp_path / "records").iterdir()} == {"node1.json", "node1.ok", "node2.json"}
    assert "node2: dataset     FAILED" in printed["node2"] and printed["node1"].count("\n") == 12
    results = json.loads((tmp_path / "records/node2.json").read_text())["results"]
    assert {result["check"]: result["state"] for result in results} == {
        "address": "ok", "meeting": "ok", "clock": "ok", "devices": "skipped", "versions": "ok", "data flow": "ok",
        "bandwidth": "ok", "settings": "ok", "disk": "ok", "temporary": "ok", "dataset": "failed", "checkpoint": "ok"}
