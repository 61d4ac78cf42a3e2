"""Step 5 on a real Dask scheduler with two worker processes, one of which is killed in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, refusal, small_network
from test_resume import steady

import fhe_experiments as step5
from fhe_mlp import cluster, experiment
from fhe_mlp.circuit import Setting
from fhe_mlp.common import InputError


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
        until = time.monotonic() + 60
        while not file.exists() and time.monotonic() < until:
            time.sleep(0.1)
        for name in ("first", "second"):
            options = ["--nthreads", "1", "--no-nanny", "--no-dashboard", "--name", name]
            worker = [*dask, "worker", "--scheduler-file", str(file), *options, "--local-directory", str(tmp_path)]
            started.append(subprocess.Popen(worker, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL))
        yield json.loads(file.read_text())["address"], started[1:]
    finally:
        for process in reversed(started):
            process.kill()
            process.wait()


def test_a_killed_worker_loses_only_its_own_configuration_which_is_done_elsewhere(arrays, tmp_path, scheduler):
    address, workers = scheduler
    here, there = tmp_path / "here", tmp_path / "there"
    options = ["--data-dir", str(arrays), "--bits", "2", "3", "4", "5", "--samples", "3"]
    for folder in (here, there):
        folder.mkdir()
        small_network(folder / "small.onnx", widths=(32, 3, 1))
    step5.main([*options, "--workdir", str(here), "--models", str(here / "small.onnx")])
    lost = []

    def kill_a_busy_worker():
        from distributed import Client

        with Client(address) as client:
            busy = {}
            while not busy:
                busy = {w: tasks for w, tasks in client.processing().items() if tasks}
                time.sleep(0.02)
            name = client.scheduler_info()["workers"][next(iter(busy))]["name"]
            lost.append(next(iter(busy.values())))
            os.kill(workers[["first", "second"].index(name)].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_a_busy_worker)
    killer.start()
    step5.main([*options, "--workdir", str(there), "--models", str(there / "small.onnx"), "--scheduler", address])
    killer.join()
    assert lost
    assert sum(worker.poll() is not None for worker in workers) == 1
    pd.testing.assert_frame_equal(steady(there / "results_batch_0.xlsx"), steady(here / "results_batch_0.xlsx"))
    rows = pd.read_excel(there / "results_batch_0.xlsx")
    assert (rows["status"] == "ok").all()
    assert (rows["num_items"] == 3).all()
    assert (rows["host"] == os.uname().nodename).all()
    assert (rows["cores"] == len(os.sched_getaffinity(0))).all()


def test_a_cluster_on_this_machine_shares_its_cores(arrays, tmp_path):
    model = small_network(tmp_path / "small.onnx", widths=(32, 2, 1))
    common = ["--data-dir", str(arrays), "--workdir", str(tmp_path), "--models", str(model), "--bits", "2", "3"]
    workers = min(2, os.cpu_count())
    step5.main([*common, "--samples", "1", "--scheduler", f"local:{workers}"])
    rows = pd.read_excel(tmp_path / "results_batch_0.xlsx")
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


@pytest.mark.parametrize("name", ["concrete-ml", "code_sha256"])
def test_a_worker_of_another_version_is_refused(monkeypatch, name):
    import distributed

    monkeypatch.setattr(distributed, "get_worker", FakeWorker)
    identity = {**experiment.versions(), "code_sha256": experiment.CODE_SHA256, name: "another"}
    job = experiment.Job("m", 2, b"", None, Setting(6, 2.0**-13, 0.0), np.zeros((1, 32)), identity)
    task = experiment.Task(job, {"status": "ok"}, {}, 1.0)
    with pytest.raises(
        InputError, match=rf"worker tcp://elsewhere:1234: its {name} is .*, here it is another; install"
    ):
        cluster.run_on_worker(task, {}, np.array([]), 1.0, None)


def test_a_worker_uses_all_its_cores(monkeypatch):
    import distributed

    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as Dask's nanny does
    monkeypatch.setattr(distributed, "get_worker", FakeWorker)
    seen = []
    monkeypatch.setattr(cluster, "run_task", lambda *_: seen.append(os.environ["OMP_NUM_THREADS"]) or [])
    identity = {**experiment.versions(), "code_sha256": experiment.CODE_SHA256}
    job = experiment.Job("m", 2, b"", None, Setting(6, 2.0**-13, 0.0), np.zeros((1, 32)), identity)
    assert cluster.run_on_worker(experiment.Task(job, {}, {}, 1.0), {}, np.array([]), 1.0, None) == []
    assert seen == [str(len(os.sched_getaffinity(0)))]


class FakeClient:
    """A client of a scheduler whose processes do, or do not, have the pipeline."""

    def __init__(self, error=None):
        self.error = error

    def run(self, function):
        if self.error:
            raise self.error
        return function()

    run_on_scheduler = run

    def submit(self, function, task, *args, **options):
        return task.job.model_name

    def scheduler_info(self, n_workers):
        return {"workers": {}}


@pytest.mark.parametrize("what", ["without the pipeline", "gone"])
def test_a_scheduler_without_the_pipeline_or_gone_is_one_line(monkeypatch, what):
    import distributed

    def lost(futures, timeout, return_when):
        raise distributed.client.FuturesCancelledError([])

    monkeypatch.setattr(distributed, "wait", lost)
    task = experiment.Task(experiment.Job("m", 2, b"", None, Setting(6, 0.1, 0.0), np.zeros((1, 32)), {}), {}, {}, 1.0)
    client = FakeClient(ModuleNotFoundError("No module named 'fhe_mlp'") if what == "without the pipeline" else None)
    data = {"val": (), "test": ()}
    told = []
    with pytest.raises(InputError, match=r"^--scheduler tcp://there: .*(cannot load the pipeline|is gone)"):
        list(cluster.run_on_cluster(client, "tcp://there", [task], data, np.array([]), 1.0, told.append))
    assert told == ([] if what == "without the pipeline" else ["waiting for a worker to come back"])


def test_a_configuration_that_takes_workers_with_it_is_a_row():
    job = experiment.Job("m", 2, b"", None, Setting(6, 2.0**-13, 0.0), np.zeros((1, 32)), {"identity": "a"})
    task = experiment.Task(job, {"status": "ok", "complexity": 1e9}, {3: np.arange(5), 4: np.arange(2)}, 1.0)
    found = experiment.failed_results(task, "its workers died")
    assert [(r.batch, r.row["num_items"], r.row["status"], r.predictions) for r in found] == [
        (3, 5, "failed", None),
        (4, 2, "failed", None),
    ]
    assert found[0].row["complexity"] == 1e9


def test_bad_schedulers_are_refused(arrays, tmp_path, capsys, monkeypatch):
    model = small_network(tmp_path / "small.onnx", widths=(32, 2, 1))
    common = ["--data-dir", arrays, "--workdir", tmp_path, "--models", model, "--bits", "2", "--samples", "1"]
    for text in ("local:0", "local:x", "local:10000"):
        assert "--scheduler" in refusal(step5.main, [*common, "--scheduler", text], capsys)
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 1)
    for address in ("tcp://127.0.0.1:9", "nonsense"):
        assert "python -m dask worker" in refusal(step5.main, [*common, "--scheduler", address], capsys)
    assert not list(tmp_path.glob("results_*"))
