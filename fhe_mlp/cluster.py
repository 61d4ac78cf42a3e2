"""Step 5 on several machines: configurations sent to the workers of a Dask cluster, one at a time on each."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fhe_mlp.common import InputError, first_line
from fhe_mlp.experiment import CODE_SHA256, Data, Result, Task, failed_results, run_task, versions

if TYPE_CHECKING:
    from distributed import Client

LOCAL = "local:"  # before the number of workers on this machine
CONNECT_SECONDS = 15  # that a scheduler, and its first worker, may take to answer
ONE_AT_A_TIME = threading.Lock()  # of a worker's process, however many threads it has: latencies stay honest


@contextlib.contextmanager
def connect(address: str) -> Iterator[Client]:
    """A client of the scheduler at `address`, or of a cluster of N processes on this machine for "local:N".

    Raises InputError when none answers or it has no worker.
    """
    import dask
    from distributed import Client, LocalCluster

    dask.config.set({"logging.distributed": "error", "distributed.scheduler.worker-ttl": None})
    with contextlib.ExitStack() as stack:
        if address.startswith(LOCAL):
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


def share_of_cores(cores: Sequence[int], number: int, workers: int) -> set[int]:
    """Cores of worker `number` of `workers` on one machine: disjoint, so that they do not slow one another down."""
    return set(cores[number::workers])


def run_on_worker(task: Task, data: Data, simulated: np.ndarray, limit: float, sharing: int | None) -> list[Result]:
    """What a worker does; sharing: how many workers share its machine, None where that is not ours to say.

    Raises InputError when the worker's versions are others than those in the job's identity.
    """
    from distributed import get_worker

    with ONE_AT_A_TIME:
        for name, mine in {**versions(), "code_sha256": CODE_SHA256}.items():
            if task.job.identity[name] != mine:
                raise InputError(
                    f"worker {get_worker().address}: its {name} is {mine}, here it is {task.job.identity[name]}; "
                    "install the same version of the pipeline and its requirements there, and start it again"
                )
        if sharing:  # of this thread, from which the circuit's threads inherit
            os.sched_setaffinity(0, share_of_cores(range(os.cpu_count()), int(get_worker().name), sharing))
        return list(run_task(task, data, simulated, limit))


def run_on_cluster(
    client: Client, address: str, tasks: Sequence[Task], data: Data, simulated: np.ndarray, limit: float
) -> Iterator[tuple[Task, list[Result]]]:
    """Yield each configuration with its results, in the order in which they come back.

    A worker that dies loses only what it was running, which goes to another one; a configuration that took several
    workers with it is a failed row.
    """
    from distributed import KilledWorker, as_completed

    sharing = int(address.removeprefix(LOCAL)) if address.startswith(LOCAL) else None
    sent = {part: data[part] for part in ("val", "test")}
    futures = {client.submit(run_on_worker, t, sent, simulated, limit, sharing, pure=False): t for t in tasks}
    for future in as_completed(futures):
        try:
            yield futures[future], future.result()
        except KilledWorker:
            yield futures[future], failed_results(futures[future], "its workers died, several in a row")
