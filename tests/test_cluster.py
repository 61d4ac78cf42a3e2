"""Step 5 on Dask: what is sent, and what is refused (test_experiments.py has a worker that is killed)."""

from __future__ import annotations

import os
import subprocess
from typing import ClassVar

import pytest
from conftest import ROOT, command, options, refusal, small_network
from test_experiments import steady

import fhe_experiments as step5
from fhe_mlp import circuit, cluster, configuration, plan
from fhe_mlp.cli import InputError


def test_the_command_shares_the_cores_of_this_machine_among_workers_that_measure_its_speed(arrays, tmp_path):
    workers = min(2, os.cpu_count())
    not_here = "def no(*a): raise AssertionError\ncircuit.run_encrypted = no"  # the workers have their own modules
    asked = options(arrays, tmp_path, "--bits", "2", "3", "--scheduler", f"local:{workers}")
    argv = command(*asked, prelude=not_here, measured=True)
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = steady(tmp_path)
    assert list(rows["q_bits"]) == [2, 3]
    assert (rows["status"] == "ok").all()
    assert (rows["cores"] == os.cpu_count() // workers).all()


def test_shares_of_cores_are_disjoint_and_leave_none_out():
    shares = [cluster.share_of_cores(range(7), number, 3) for number in range(3)]
    assert set.union(*shares) == set(range(7))
    assert sum(map(len, shares)) == 7
    assert all(shares)


class FakeWorker:
    """What run_on_worker asks of Dask's worker."""

    address = "tcp://elsewhere:1234"
    periodic_callbacks: ClassVar = {}


@pytest.mark.parametrize("name", ["concrete-ml", "result_version"])
def test_a_worker_of_another_version_is_refused(monkeypatch, name):
    import distributed

    monkeypatch.setattr(distributed, "get_worker", FakeWorker)
    expected = {**configuration.versions(), name: "another"}
    with pytest.raises(
        InputError, match=rf"worker tcp://elsewhere:1234: its {name} is .*, here it is another; install"
    ):
        cluster.run_on_worker(expected, None, print)


def test_a_worker_uses_all_its_cores(monkeypatch):
    import distributed

    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as Dask's nanny does
    monkeypatch.setattr(distributed, "get_worker", FakeWorker)
    seen = cluster.run_on_worker(configuration.versions(), None, lambda: os.environ["OMP_NUM_THREADS"])
    assert seen == (FakeWorker.address, str(len(os.sched_getaffinity(0))))


def test_a_circuit_is_compiled_once_in_a_process(monkeypatch):
    made = []
    monkeypatch.setattr(circuit, "cost", lambda c: ({"status": "ok"}, made.append("plan") or object()))
    monkeypatch.setattr(circuit, "compile_circuit", lambda c: made.append("anew"))
    one = configuration.Configuration("m", 2, b"", 4, 0.1, False, None, None, {"identity": "a"})
    circuit.plan_circuit(one)
    circuit.take_circuit(one)
    assert made == ["plan"]
    circuit.take_circuit(one)  # as after the worker that had it has died
    assert made == ["plan", "anew"]


class FakeClient:
    """A client of a scheduler whose processes do, or do not, have the pipeline."""

    def __init__(self, error=None):
        self.error = error

    def run(self, function):
        if self.error:
            raise self.error
        return function()

    run_on_scheduler = run

    def submit(self, *call, **options):
        return "future"

    def scheduler_info(self, n_workers):
        return {"workers": {}}


def test_a_scheduler_without_the_pipeline_or_gone_is_one_line(monkeypatch):
    import distributed

    def lost(futures, timeout, return_when):
        raise distributed.client.FuturesCancelledError([])

    with pytest.raises(InputError, match=r"^--scheduler tcp://there: .*cannot load the pipeline"):
        cluster.Cluster(FakeClient(ModuleNotFoundError("No module named 'fhe_mlp'")), "tcp://there")
    monkeypatch.setattr(distributed, "wait", lost)
    heard = []
    with pytest.raises(InputError, match=r"^--scheduler tcp://there: it is gone"):
        list(cluster.Cluster(FakeClient(), "tcp://there").map(print, [()], heard.append))
    assert heard == ["waiting for a worker to come back"]


def test_a_job_that_takes_its_workers_with_it_becomes_failed_rows(monkeypatch):
    import distributed

    class Future:
        def result(self):
            raise distributed.KilledWorker("job", None, 4)

    client = FakeClient()
    client.submit = lambda *call, **options: Future()
    done = type("Done", (), {"done": []})
    monkeypatch.setattr(distributed, "wait", lambda futures, **_: setattr(done, "done", futures) or done)
    found = list(cluster.Cluster(client, "tcp://there").map(print, [()], lambda text: None))
    assert found == [(0, None, None)]
    one = configuration.Configuration("m", 2, b"", 4, 0.1, False, None, None, {"identity": "a"})
    task = plan.Task(one, {"status": "ok", "complexity": 1e9}, {3: [0] * 5, 4: [0] * 2}, 1.0)
    rows = [row for _, row, _ in plan.failed_results(task)]
    assert [(r["batch"], r["num_items"], r["status"], r["complexity"]) for r in rows] == [
        (3, 5, "failed", 1e9),
        (4, 2, "failed", 1e9),
    ]


def test_bad_schedulers_are_refused(arrays, tmp_path, capsys, monkeypatch):
    model = small_network(tmp_path / "small.onnx", widths=(32, 2, 1))
    common = ["--data-dir", arrays, "--workdir", tmp_path, "--models", model, "--bits", "2", "--samples", "1"]
    for text in ("local:0", "local:x", "local:10000"):
        assert "--scheduler" in refusal(step5.main, [*common, "--scheduler", text], capsys)
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 1)
    for address in ("tcp://127.0.0.1:9", "nonsense"):
        assert "python -m dask worker" in refusal(step5.main, [*common, "--scheduler", address], capsys)
    assert not list(tmp_path.glob("*.xlsx"))
