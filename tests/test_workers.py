"""Processes of this machine and workers of a Dask cluster: what they receive, and what happens when they die."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, until

from fhe_mlp.cli import InputError, cores
from fhe_mlp.workers import open_workers

HERE = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}


# What the workers do
def add(shared, number):
    return shared + number


def describe(shared):
    print("to the terminal")
    return os.getpid(), os.environ["OMP_NUM_THREADS"], os.getpgid(0) == os.getpid()


def die(shared, folder, number, deaths):
    """Kill this process the first `deaths` times that it is called in `folder`."""
    calls = len(list(folder.glob(f"{number}-*")))
    if calls < deaths:
        (folder / f"{number}-{calls}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def fail(shared):
    raise ValueError("no")


def wait_for_ever(shared, folder):
    (folder / str(os.getpid())).touch()
    while True:
        "a".join(["b"] * 10_000_000)  # with the interpreter held


def versions():
    return {"library": os.environ.get("LIBRARY", "1.0")}


def test_processes_of_this_machine_share_its_cores_and_write_nothing(capfd):
    count = min(2, cores())
    with open_workers(10, count) as workers:
        assert sorted(workers.map(add, ((number,) for number in range(5)))) == [(n, n + 10) for n in range(5)]
        (_, (process, threads, leads)), *_ = workers.map(describe, [()])
        assert process != os.getpid()
        assert (threads, leads) == (str(cores() // count), True)
        with pytest.raises(ValueError, match="no"):
            list(workers.map(fail, [()]))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("deaths", "result"), [(1, 2), (100, "lost")])
def test_only_the_job_that_kills_its_process_again_and_again_is_lost(tmp_path, deaths, result):
    code = (  # in a process without Concrete, as step 5's; other tests load it here
        "import json, pathlib, sys, test_workers\nfrom fhe_mlp.workers import LOST, open_workers\n"
        "folder, deaths = pathlib.Path(sys.argv[1]), int(sys.argv[2])\n"
        "jobs = [(folder, number, deaths if number == 2 else 0) for number in range(6)]\n"
        "with open_workers(None, 2) as workers:\n"
        "    found = dict(workers.map(test_workers.die, jobs))\n"
        "print(json.dumps(['lost' if found[number] is LOST else found[number] for number in range(6)]))"
    )
    argv = [sys.executable, "-c", code, tmp_path, str(deaths)]
    done = subprocess.run(argv, env={**os.environ, **HERE}, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [0, 1, result, 3, 4, 5]
    assert len(list(tmp_path.iterdir())) == min(deaths, 3)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_its_parent(tmp_path, how):
    code = (
        "import pathlib, sys; from fhe_mlp import cli, workers; from test_workers import wait_for_ever\n"
        "def main():\n"
        "    with workers.open_workers(None, 2) as found:\n"
        "        list(found.map(wait_for_ever, [(pathlib.Path(sys.argv[1]),)] * 4))\n"
        "cli.run(main, 'run it again')"
    )
    pipes = {"env": {**os.environ, **HERE}, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path], **pipes)
    until(lambda: len(list(tmp_path.iterdir())) == 2 or process.poll() is not None)
    children = list(tmp_path.iterdir())
    os.killpg(process.pid, how)  # as a terminal does
    errors = process.communicate()[1]
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert errors == "\n-c: interrupted; run it again\n"
    for child in children:
        until(lambda child=child: not Path("/proc", child.name).exists())


class Cluster:
    """A Dask scheduler, and workers without a nanny: a killed one stays dead."""

    def __init__(self, folder, environment):
        self.folder, self.environment, self.processes = folder, {**os.environ, **environment}, []
        self.file = folder / "scheduler.json"
        self.start("scheduler", "--host", "127.0.0.1", "--port", "0")
        until(lambda: (self.file.exists() and self.file.stat().st_size) or self.processes[0].poll() is not None)
        self.address = json.loads(self.file.read_text())["address"]

    def start(self, *what):
        command = [sys.executable, "-m", "dask", *what, "--no-dashboard", "--scheduler-file", str(self.file)]
        options = {"cwd": self.folder, "env": self.environment, "stderr": subprocess.DEVNULL}
        self.processes.append(subprocess.Popen(command, **options))
        return self.processes[-1]

    def worker(self):
        return self.start("worker", "--nthreads", "1", "--no-nanny", "--local-directory", str(self.folder))


@pytest.fixture
def cluster(tmp_path):
    clusters = []
    yield lambda **environment: clusters.append(Cluster(tmp_path, environment)) or clusters[-1]
    for process in (process for cluster in clusters for process in cluster.processes):
        process.kill()
        process.wait()


def when(happens, then):
    """Call `then` in a thread as soon as `happens()` is true."""
    threading.Thread(target=lambda: (until(happens), then()), daemon=True).start()


def test_dask_refuses_other_versions_and_repeats_the_jobs_of_a_killed_worker(cluster, tmp_path, monkeypatch):
    dask = cluster(**HERE)
    first = dask.worker()
    with monkeypatch.context() as patch:
        patch.setenv("LIBRARY", "2.0")
        refused = pytest.raises(InputError, match=r"^worker tcp://.*: its library is 1.0, here it is 2.0; install the")
        with refused, open_workers(None, 0, dask.address, versions) as workers:
            list(workers.map(add, [(1,)]))
    gone = pytest.raises(InputError, match=r"^--scheduler tcp://.*: it is gone; start it")
    with gone, open_workers(10, 0, dask.address, versions) as workers:
        assert sorted(workers.map(add, ((number,) for number in range(3)))) == [(0, 10), (1, 11), (2, 12)]
        ((_, (_, threads, _)),) = workers.map(describe, [()])
        assert threads == str(cores())
        when(lambda: first.poll() is not None, dask.worker)
        assert dict(workers.map(die, [(tmp_path, n, int(n == 1)) for n in range(3)])) == {0: 0, 1: 1, 2: 2}
        started = tmp_path / "jobs"
        started.mkdir()
        when(lambda: list(started.iterdir()), dask.processes[0].kill)
        list(workers.map(wait_for_ever, [(started,)]))


def test_dask_workers_without_the_package_receive_it_also_later_ones(cluster, tmp_path, monkeypatch):
    dask = cluster(PYTHONPATH="")
    dask.worker()
    module = tmp_path / "module" / "sent_along.py"
    module.parent.mkdir()
    module.write_text("def double(shared, number):\n    return 2 * number\n\n\ndef versions():\n    return {}\n")
    monkeypatch.syspath_prepend(module.parent)
    import sent_along

    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.write(module, module.name)
        for name in ("__init__.py", "cli.py", "workers.py"):
            file.write(ROOT / "fhe_mlp" / name, f"fhe_mlp/{name}")
    with pytest.raises(InputError, match=r"cannot load the pipeline \(No module named 'sent_along'\); start"):
        open_workers(None, 0, dask.address, sent_along.versions).__enter__()
    with open_workers(None, 0, dask.address, sent_along.versions, content.getvalue()) as workers:
        dask.worker()
        until(lambda: workers.count() == 2)
        assert sorted(workers.map(sent_along.double, [(n,) for n in range(4)])) == [(n, 2 * n) for n in range(4)]


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "nonsense"])
def test_where_no_scheduler_answers_the_line_says_how_to_start_one(address, monkeypatch):
    monkeypatch.setattr("fhe_mlp.workers.CONNECT_SECONDS", 1)
    with pytest.raises(InputError, match=f"^--scheduler {address}: no Dask scheduler .*: python -m dask worker"):
        open_workers(None, 0, address).__enter__()
