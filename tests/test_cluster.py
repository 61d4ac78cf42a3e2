"""Step 5 on a real Dask scheduler with two worker processes, one of which is killed in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from typing import ClassVar

import pandas as pd
import pytest
from conftest import ROOT, command, options, refusal, small_network
from test_experiments import steady

import fhe_experiments as step5
from fhe_mlp import circuit, cluster, configuration, plan
from fhe_mlp.cli import InputError


@pytest.fixture
def scheduler(tmp_path):
    """Address of a scheduler, and the processes of its two workers (without a nanny: a killed one stays dead)."""
    file = tmp_path / "scheduler.json"
    environment = {**os.environ, "DASK_DISTRIBUTED__ADMIN__LOW_LEVEL_LOG_LENGTH": "0"}
    dask = [sys.executable, "-m", "dask"]
    started = [
        subprocess.Popen(
            [*dask, "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.DEVNULL,
        )
    ]
    try:
        while not file.exists():  # which the scheduler writes when it listens
            assert started[0].poll() is None
        for name in ("first", "second"):
            flags = ["--nthreads", "1", "--no-nanny", "--no-dashboard", "--name", name]
            worker = [*dask, "worker", "--scheduler-file", str(file), *flags, "--local-directory", str(tmp_path)]
            started.append(subprocess.Popen(worker, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL))
        yield json.loads(file.read_text())["address"], started[1:]
    finally:
        for process in reversed(started):
            process.kill()
            process.wait()


def test_a_killed_worker_loses_only_its_own_configuration_which_is_done_elsewhere(arrays, tmp_path, scheduler):
    address, workers = scheduler
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    step5.main(options(arrays, here, "--bits", "2", "3", "4"))
    lost = []

    def kill_a_busy_worker():
        from distributed import Client

        with Client(address) as client:
            busy = {}
            while not busy:
                busy = {w: tasks for w, tasks in client.processing().items() if tasks}
            name = client.scheduler_info()["workers"][next(iter(busy))]["name"]
            lost.append(next(iter(busy.values())))
            os.kill(workers[["first", "second"].index(name)].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_a_busy_worker)
    killer.start()
    step5.main(options(arrays, there, "--bits", "2", "3", "4", "--scheduler", address))
    killer.join()
    assert lost
    assert sum(worker.poll() is not None for worker in workers) == 1
    pd.testing.assert_frame_equal(steady(there), steady(here))
    rows = steady(there)
    assert list(rows["q_bits"]) == [2, 3, 4]
    assert (rows["status"] == "ok").all()
    assert (rows["num_items"] == 2).all()
    assert (rows["host"] == os.uname().nodename).all()
    assert (rows["cores"] == len(os.sched_getaffinity(0))).all()


def test_the_command_shares_the_cores_of_this_machine_among_workers_that_measure_its_speed(arrays, tmp_path):
    workers = min(2, os.cpu_count())
    not_here = "def no(*a): raise AssertionError\ncircuit.run_encrypted = no"  # the workers have their own modules
    asked = options(arrays, tmp_path, "--bits", "2", "3", "--scheduler", f"local:{workers}")
    argv = command(*asked, prelude=not_here)
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
