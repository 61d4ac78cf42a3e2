"""Step 5 on several machines: configurations sent to the workers of a Dask cluster, one at a time on each."""

from __future__ import annotations

import argparse
import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING

import numpy as np

from fhe_mlp.common import InputError, first_line
from fhe_mlp.experiment import CODE_SHA256, Data, Result, Task, failed_results, run_task, versions

if TYPE_CHECKING:
    from distributed import Client

LOCAL = "local:"  # before the number of workers on this machine
CONNECT_SECONDS = 15  # that a scheduler, and its first worker, may take to answer
REFRESH_SECONDS = 5  # after which the bar is drawn again while nothing is finished
ONE_AT_A_TIME = threading.Lock()  # of a worker's process, however many threads it has: latencies stay honest


def scheduler_address(text: str) -> str:
    """argparse type: an address, or local:N with at most as many workers as this machine has cores."""
    workers = text.removeprefix(LOCAL)
    if text.startswith(LOCAL) and not (workers.isdecimal() and 0 < int(workers) <= os.cpu_count()):
        raise argparse.ArgumentTypeError(f"{text!r}: give {LOCAL}1 to {LOCAL}{os.cpu_count()}, a worker a core at most")
    return text


@contextlib.contextmanager
def connect(address: str) -> Iterator[Client]:
    """A client of the scheduler at `address`, or of a cluster of N processes on this machine for "local:N".

    Raises InputError when none answers or it has no worker.
    """
    import dask

    # Before Dask is loaded: what it would log is told in our own lines; and keys take longer than its patience.
    quiet = {"distributed": "critical", "distributed.client": "critical"}
    dask.config.set({"logging": quiet, "distributed.scheduler.worker-ttl": None})
    from distributed import Client, LocalCluster

    with contextlib.ExitStack() as stack:
        if address.startswith(LOCAL):
            os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"  # speaks of what it tidies up after Ctrl-C
            workers = int(address.removeprefix(LOCAL))
            cluster = LocalCluster(n_workers=workers, threads_per_worker=1, memory_limit=0, dashboard_address=None)
            client = Client(stack.enter_context(cluster))
        else:
            try:
                client = Client(address, timeout=CONNECT_SECONDS)
                client.wait_for_workers(1, timeout=CONNECT_SECONDS)
            except (OSError, ValueError, TypeError) as error:
                raise InputError(
                    f"--scheduler {address}: no Dask scheduler with a worker answers ({first_line(error)}); "
                    "start them with: python -m dask scheduler, and: python -m dask worker ADDRESS --nthreads 1"
                ) from None
        yield stack.enter_context(client)


def check_workers(client: Client, address: str) -> None:
    """Raises InputError unless scheduler and workers can load this pipeline: one that cannot would leave, unheard."""
    try:
        client.run_on_scheduler(versions)
        client.run(versions)
    except Exception as error:  # Dask wraps a worker's error in a plain Exception
        raise InputError(
            f"--scheduler {address}: its processes cannot load the pipeline ({first_line(error)}); "
            "start scheduler and workers in the folder of a clone that is set up like this one"
        ) from None


def share_of_cores(cores: Sequence[int], number: int, workers: int) -> set[int]:
    """Cores of worker `number` of `workers` on one machine: disjoint, so that they do not slow one another down."""
    return set(cores[number::workers])


def run_on_worker(task: Task, data: Data, simulated: np.ndarray, limit: float, sharing: int | None) -> list[Result]:
    """What a worker does; sharing: how many workers share its machine, None where that is not ours to say.

    Raises InputError when the worker's versions are others than those in the job's identity.
    """
    from distributed import get_worker

    worker = get_worker()
    with ONE_AT_A_TIME:
        if profiler := worker.periodic_callbacks.get("profile"):  # looks every 10 ms: 4 % of the seconds a beat
            worker.loop.add_callback(profiler.stop)
        for name, mine in {**versions(), "code_sha256": CODE_SHA256}.items():
            if task.job.identity[name] != mine:
                raise InputError(
                    f"worker {worker.address}: its {name} is {mine}, here it is {task.job.identity[name]}; "
                    "install the same version of the pipeline and its requirements there, and start it again"
                )
        if sharing:  # of this thread, from which the circuit's threads inherit
            os.sched_setaffinity(0, share_of_cores(range(os.cpu_count()), int(worker.name), sharing))
        # Dask sets it to 1: circuits would run on one core. Read when Concrete is loaded, which is with the first task.
        os.environ["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))
        return list(run_task(task, data, simulated, limit))


def run_on_cluster(
    client: Client,
    address: str,
    tasks: Sequence[Task],
    data: Data,
    simulated: np.ndarray,
    limit: float,
    tick: Callable[[str], None],
) -> Iterator[tuple[Task, list[Result]]]:
    """Yield each configuration with its results, in the order in which they come back; `tick` hears of the workers.

    A worker that dies loses only what it was running, which goes to another one; a configuration that took several
    workers with it is a failed row. Raises InputError for a worker that does not have this pipeline, or when the
    scheduler is lost.
    """
    from distributed import KilledWorker, wait

    check_workers(client, address)
    sharing = int(address.removeprefix(LOCAL)) if address.startswith(LOCAL) else None
    sent = {part: data[part] for part in ("val", "test")}
    futures = {client.submit(run_on_worker, t, sent, simulated, limit, sharing, pure=False): t for t in tasks}
    while futures:
        workers = len(client.scheduler_info(n_workers=-1)["workers"])
        tick(f"workers: {workers}" if workers else "waiting for a worker to come back")
        try:
            finished = wait(list(futures), timeout=REFRESH_SECONDS, return_when="FIRST_COMPLETED").done
        except TimeoutError:
            continue
        except CancelledError:
            raise InputError(
                f"--scheduler {address}: it is gone; start it and its workers, then run this again"
            ) from None
        for future in finished:
            task = futures.pop(future)
            try:
                results = future.result()
            except KilledWorker:
                results = failed_results(task, "its workers died, several in a row")
            yield task, results
