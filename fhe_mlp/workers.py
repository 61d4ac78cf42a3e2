"""Jobs in processes of this machine or on the workers of a Dask cluster.

The process that hands out jobs never loads Concrete, whose runtime holds the interpreter for minutes, answers Ctrl-C
with SIGKILL of its own process and turns every exit status into 0.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fhe_mlp.cli import InputError, cores, digest, first_line

LOST = object()  # result of a job under which workers died
MOST_DEATHS = 3  # under one job; of Dask's workers several each time (distributed.scheduler.allowed-failures)
AHEAD = 2  # jobs handed out for each worker: the one in work and the next
REFRESH_SECONDS = 5.0  # between two calls of `waiting`
CONNECT_SECONDS = 15  # that a scheduler, and its first worker, may take to answer
PR_SET_PDEATHSIG = 1  # of prctl(2): the signal that a process receives when its parent dies
ONE_AT_A_TIME = threading.Lock()  # in a Dask worker, however many threads it has: timings are free of contention
Versions = Callable[[], dict[str, Any]]
_shared: Any = None  # in a process of this machine


@dataclass(frozen=True)
class Workers:
    """Processes that wait for jobs; made by open_workers."""

    submit: Callable[[Callable, tuple], Future]
    count: Callable[[], int]
    death: type[Exception]  # raised by a job under which a worker died

    def map(
        self, function: Callable, jobs: Iterable[tuple], waiting: Callable[[], Any] = lambda: None
    ) -> Iterator[tuple[int, Any]]:
        """Yield the number and the result of `function(shared, *job)` for each job, as they are finished.

        Where a worker died, its jobs and those of its neighbours are repeated one at a time, so that only a deadly one
        becomes LOST. waiting: called every REFRESH_SECONDS while nothing is finished.
        Raises what `function` raises, and InputError for a Dask worker of another version.
        """
        coming, repeated, deaths = enumerate(jobs), [], Counter()
        pending: dict[Future, tuple[int, tuple]] = {}
        while True:
            free = AHEAD * max(1, self.count()) - len(pending)
            chosen = [] if repeated else list(itertools.islice(coming, max(0, free)))
            if repeated and not pending:
                chosen = [repeated.pop()]
            pending |= {self.submit(function, job): (number, job) for number, job in chosen}
            if not pending:
                return
            finished = wait(pending, REFRESH_SECONDS, FIRST_COMPLETED).done
            if not finished:
                waiting()
            for future in finished:
                number, job = pending.pop(future)
                try:
                    result = future.result()
                except self.death:
                    deaths[number] += 1
                    if deaths[number] < MOST_DEATHS:
                        repeated.append((number, job))
                        continue
                    result = LOST
                yield number, result


def open_workers(
    shared: Any, processes: int, scheduler: str | None = None, versions: Versions = dict, package: bytes | None = None
) -> contextlib.AbstractContextManager[Workers]:
    """Open `processes` of this machine or, where its address is given, the workers of a Dask scheduler.

    shared: sent to each once. versions: returns here what it must return on each Dask worker; package: .zip of the
    modules that these need. Raises InputError for a scheduler that has no worker, cannot load the modules, or is lost.
    """
    return dask_workers(shared, scheduler, versions, package) if scheduler else local_workers(shared, processes)


@contextlib.contextmanager
def local_workers(shared: Any, number: int) -> Iterator[Workers]:
    """Yield processes of this machine, which share its cores; at the end they are killed, whatever they are doing."""
    context = multiprocessing.get_context("spawn")

    def new_pool() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(number, context, start_process, (os.getpid(), max(1, cores() // number), shared))

    def submit(function: Callable, job: tuple) -> Future:
        nonlocal pool
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a new process inherits it: Ctrl-C is its parent's
        try:
            return pool.submit(run_in_process, function, job)
        except BrokenProcessPool:
            pool = new_pool()
            return pool.submit(run_in_process, function, job)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    pool = new_pool()
    try:
        yield Workers(submit, lambda: number, BrokenProcessPool)
    finally:
        for process in multiprocessing.active_children():
            process.kill()
        pool.shutdown(cancel_futures=True)


def start_process(parent: int, threads: int, shared: Any) -> None:
    """Let this process die with its parent, and write nothing on the terminal."""
    global _shared
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # which died before that
        os._exit(1)
    os.setpgid(0, 0)
    nothing = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):
        os.dup2(nothing, output)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read when Concrete is loaded, which is later
    _shared = shared


def run_in_process(function: Callable, job: tuple) -> Any:
    """Call the function of a job in a process of this machine."""
    return function(_shared, *job)


@contextlib.contextmanager
def dask_workers(shared: Any, address: str, versions: Versions, package: bytes | None) -> Iterator[Workers]:
    """Yield the workers of the scheduler at `address`; for the rest see open_workers."""
    import dask

    # Before Dask is loaded: what it would log is reported in our own lines.
    dask.config.set({"logging": {"distributed": "critical", "distributed.client": "critical"}})
    from distributed import Client, KilledWorker, TimeoutError, WorkerPlugin

    name, plugin = f"shared-{uuid.uuid4()}", WorkerPlugin()
    with contextlib.ExitStack() as stack:
        try:
            client = stack.enter_context(Client(address, timeout=CONNECT_SECONDS))
            client.wait_for_workers(1, timeout=CONNECT_SECONDS)
        except (OSError, ValueError, TypeError, TimeoutError) as error:
            raise InputError(
                f"--scheduler {address}: no Dask scheduler with a worker answers ({first_line(error)}); "
                "start them with: python -m dask scheduler, and: python -m dask worker ADDRESS --nthreads 1"
            ) from None
        neighbours = Counter(worker["host"] for worker in client.scheduler_info(n_workers=-1)["workers"].values())
        # Unpickled with the first job: a worker that comes later loads plugins before the package.
        plugin.content = pickle.dumps((shared, versions, versions(), neighbours))
        try:
            if package is not None:
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder, f"package_{digest(package)}.zip")
                    path.write_bytes(package)
                    client.upload_file(str(path))
            client.run_on_scheduler(versions)  # it unpickles jobs
            client.run(versions)
            client.register_plugin(plugin, name)  # also with workers that come later
        except Exception as error:  # Dask wraps a worker's error in a plain Exception
            raise InputError(
                f"--scheduler {address}: its processes cannot load the pipeline ({first_line(error)}); "
                "start scheduler and workers in the folder of a clone that is set up like this one"
            ) from None
        executor = client.get_executor(pure=False)
        try:
            yield Workers(
                lambda function, job: executor.submit(run_on_worker, name, function, job),
                lambda: len(client.scheduler_info(n_workers=-1)["workers"]),
                KilledWorker,
            )
        except CancelledError:
            lost = f"--scheduler {address}: it is gone; start it and its workers, then run this again"
            raise InputError(lost) from None
        finally:
            if client.status == "running":
                client.unregister_worker_plugin(name)


def run_on_worker(name: str, function: Callable, job: tuple) -> Any:
    """Call the function of a job on a Dask worker. name: of the plugin. Raises InputError for other versions."""
    from distributed import get_worker
    from distributed.comm import get_address_host

    worker = get_worker()
    plugin = worker.plugins[name]
    with ONE_AT_A_TIME:
        if isinstance(plugin.content, bytes):
            plugin.content = pickle.loads(plugin.content)
        shared, versions, expected, neighbours = plugin.content
        for library, own in versions().items():
            if own != expected[library]:
                raise InputError(
                    f"worker {worker.address}: its {library} is {own}, here it is {expected[library]}; "
                    "install the same version of the pipeline and its requirements there, and start it again"
                )
        if profiler := worker.periodic_callbacks.get("profile"):  # looks every 10 ms: 4 % of the seconds per beat
            worker.loop.add_callback(profiler.stop)
        threads = cores() // neighbours.get(get_address_host(worker.address), 1)
        os.environ["OMP_NUM_THREADS"] = str(max(1, threads))  # Dask sets it to 1; read when Concrete is loaded
        return function(shared, *job)
