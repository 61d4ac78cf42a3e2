"""The same jobs on several machines: functions sent to the workers of a Dask cluster, one at a time on each."""

from __future__ import annotations

import argparse
import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any

from fhe_mlp.cli import InputError, first_line
from fhe_mlp.configuration import versions

if TYPE_CHECKING:
    from distributed import Client

LOCAL = "local:"  # before the number of workers on this machine
CONNECT_SECONDS = 15  # that a scheduler, and its first worker, may take to answer
REFRESH_SECONDS = 5  # after which the bar is drawn again while nothing is finished
ONE_AT_A_TIME = threading.Lock()  # of a worker's process, however many threads it has: timings are free of contention


def scheduler_address(text: str) -> str:
    """argparse type: an address, or local:N with at most as many workers as this machine has cores."""
    workers = text.removeprefix(LOCAL)
    if text.startswith(LOCAL) and not (workers.isdecimal() and 0 < int(workers) <= os.cpu_count()):
        raise argparse.ArgumentTypeError(f"{text!r}: give {LOCAL}1 to {LOCAL}{os.cpu_count()}, at most a worker a core")
    return text


def share_of_cores(cores: Sequence[int], number: int, workers: int) -> set[int]:
    """Cores of worker `number` of `workers` on one machine: disjoint, so that they do not slow one another down."""
    return set(cores[number::workers])


def run_on_worker(expected: dict[str, Any], sharing: int | None, function: Callable, *arguments: Any) -> Any:
    """What a worker does: its address and what `function` returns; sharing: how many share its machine, if known.

    Raises InputError when the worker's versions are not those in `expected`.
    """
    from distributed import get_worker

    worker = get_worker()
    with ONE_AT_A_TIME:
        if profiler := worker.periodic_callbacks.get("profile"):  # looks every 10 ms: 4 % of the seconds a beat
            worker.loop.add_callback(profiler.stop)
        for name, mine in versions().items():
            if expected[name] != mine:
                raise InputError(
                    f"worker {worker.address}: its {name} is {mine}, here it is {expected[name]}; "
                    "install the same version of the pipeline and its requirements there, and start it again"
                )
        if sharing:  # of this thread, from which the circuit's threads inherit
            os.sched_setaffinity(0, share_of_cores(range(os.cpu_count()), int(worker.name), sharing))
        # Dask sets it to 1: circuits would run on one core. Read when Concrete is loaded, which is with the first job.
        os.environ["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))
        return worker.address, function(*arguments)


class Cluster:
    """The workers of a scheduler that answers; see `connect`."""

    def __init__(self, client: Client, address: str) -> None:
        self.client, self.address = client, address
        self.sharing = int(address.removeprefix(LOCAL)) if address.startswith(LOCAL) else None
        try:  # a worker that cannot load the pipeline would leave without a message
            client.run_on_scheduler(versions)
            client.run(versions)
        except Exception as error:  # Dask wraps a worker's error in a plain Exception
            raise InputError(
                f"--scheduler {address}: its processes cannot load the pipeline ({first_line(error)}); "
                "start scheduler and workers in the folder of a clone that is set up like this one"
            ) from None

    def map(
        self,
        function: Callable,
        jobs: Sequence[tuple],
        progress: Callable[[str], None],
        workers: Sequence[str | None] | None = None,
    ) -> Iterator[tuple[int, str | None, Any]]:
        """Call `function(*job)` for each job; yield its number, worker and result in the order in which they come back.

        A worker that dies loses only what it was running, which another one repeats; a job that took several workers
        with it has worker None. workers: who should get each job, where it is free; progress: hears of the workers.
        Raises InputError for a worker of another version, or when the scheduler is lost.
        """
        from distributed import KilledWorker, wait

        futures = {}
        for number, job in enumerate(jobs):
            wanted = workers and workers[number]
            place = {"workers": [wanted], "allow_other_workers": True} if wanted else {}
            call = (run_on_worker, versions(), self.sharing, function, *job)
            futures[self.client.submit(*call, pure=False, **place)] = number
        while futures:
            alive = len(self.client.scheduler_info(n_workers=-1)["workers"])
            progress(f"workers: {alive}" if alive else "waiting for a worker to come back")
            try:
                finished = wait(list(futures), timeout=REFRESH_SECONDS, return_when="FIRST_COMPLETED").done
            except TimeoutError:
                continue
            except CancelledError:
                raise InputError(
                    f"--scheduler {self.address}: it is gone; start it and its workers, then run this again"
                ) from None
            for future in finished:
                try:
                    worker, result = future.result()
                except KilledWorker:
                    worker, result = None, None
                yield futures.pop(future), worker, result


@contextlib.contextmanager
def connect(address: str) -> Iterator[Cluster]:
    """The cluster of the scheduler at `address`, or of N processes on this machine for "local:N".

    Raises InputError when none answers, it has no worker, or its processes cannot load this pipeline.
    """
    import dask

    # Before Dask is loaded: what it would log is reported in our own lines; and keys take longer than its patience.
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
        yield Cluster(stack.enter_context(client), address)
