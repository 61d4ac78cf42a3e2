"""The server's side: classifies encrypted heartbeats and cannot read them, nor the answers.

    python server.py encrypted_beats.zip evaluation_keys.zip      -> encrypted_answers.zip

Both files come from the hospital's client.py; the answers go back to it. server.zip and all .py files of the export lie
beside this file. Each answer is kept at once in a .part file beside the output, which is deleted at the end: after an
interruption, the same command computes only what is missing.

Beats are computed by a process a core, each with one thread: 24 beats a second of 2 neurons on two cores, where one
process with two threads computed 19. Each takes up to 1 GB of memory, mostly for the keys (--processes).
With --scheduler, the workers of a Dask cluster do that instead; both are executors of concurrent.futures.
"""

from __future__ import annotations

import argparse
import fcntl
import io
import itertools
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import zipfile
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import compute
import packing
from boxes import NAMES, check_output, framed, read_box, read_frames, same, whole, write_box
from cli import InputError, first_line, number, run_and_leave, sha256

SERVER = Path(__file__).resolve().with_name("server.zip")
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
AHEAD = 2  # beats that are handed out for each worker: the one in work and the next
CONNECT_SECONDS = 15  # that a scheduler, and its first worker, may take to answer
NUMBER_BYTES = 8  # of the beat's number, before its answer in a .part file
# Concrete asks for some 0.2 GB of memory anew for each beat. In pages of 2 MB that costs a 20-neuron network a sixth
# less time, a small one a third. The C library reads this when a program starts.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
Answered = tuple[int, tuple[bytes, ...]]  # the number of a beat and the parts of its answer
PROGRESS_S = 60.0  # between two lines of progress in a log; on a terminal one line is renewed after each beat


class Workers(NamedTuple):
    """Where beats are computed."""

    submit: Callable[[bytes], Future]  # a beat; the future answer
    count: Callable[[], int]
    lost: tuple[type[BaseException], ...]  # what a future answer raises when its workers are gone
    remedy: str  # then


# ------------------------------------------------------------------------------------------------------- the .part file
def append(part: BinaryIO, entry: bytes) -> int:
    """Write an entry behind the others and return its place; the operating system has it, should this process die."""
    place = part.seek(0, os.SEEK_END)
    part.write(framed(entry))
    part.flush()
    return place


def resume(part: BinaryIO, first: bytes, count: int) -> array[int]:
    """Places of the answers to `count` beats in a .part file that begins with the entry `first`; 0 where there is none.

    What follows the last whole entry is cut off; in a file of other beats, everything.
    """
    places = array("Q", bytes(8 * count))
    size = part.seek(0, os.SEEK_END)
    part.seek(0)
    found = read_frames(part, size)
    end = 0
    if next(found, None) == first:
        end = part.tell()
        for entry in found:
            number = int.from_bytes(entry[:NUMBER_BYTES], "big")
            if number >= count:
                break
            places[number], end = end, part.tell()
    part.truncate(end)
    if not end:
        append(part, first)
    return places


def answers(part: BinaryIO, places: array[int]) -> Iterator[bytes]:
    """The parts of the answers in a .part file, in the order of `places`."""
    size = os.fstat(part.fileno()).st_size
    for place in places:
        part.seek(place)
        parts = next(read_frames(part, size))[NUMBER_BYTES:]
        yield from read_frames(io.BytesIO(parts), len(parts))


# ------------------------------------------------------------------------------------------------------------ computing
def start() -> None:
    """What a process does first: nothing on the terminal, Ctrl-C is the parent's, and no life without the parent."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def read_network() -> tuple[bytes, dict[str, Any] | None]:
    """server.zip, and what it says of a network without bootstraps. Raises InputError where it is damaged."""
    content = SERVER.read_bytes()
    try:
        return content, packing.read_description(content)
    except (zipfile.BadZipFile, ValueError) as error:
        raise InputError(f"{SERVER}: cannot be used ({first_line(error)}); restore it from the export") from None


def processes_here(count: int, name: str, keys: Path) -> Workers:
    """`count` processes on this machine, which share its cores; each reads the keys, called `name`, from their box.

    This process never loads Concrete: it hears Ctrl-C, which Concrete answers by killing its process, and can fork.
    """
    os.environ["OMP_NUM_THREADS"] = str(max(1, CORES // count))
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("fork"), start)
    network, _ = read_network()
    fixed = (name, compute.versions(network), network, keys)
    remedy = "a process was killed, perhaps for want of memory (--processes); run the same command again to resume"
    return Workers(lambda beat: pool.submit(compute.answer, *fixed, beat), lambda: count, (BrokenProcessPool,), remedy)


def dask_workers(address: str, name: str, keys: bytes) -> Workers:
    """The workers of a Dask scheduler; network and keys, called `name`, are sent to each once. Raises InputError."""
    import dask

    dask.config.set({"logging": {"distributed": "critical", "distributed.client": "critical"}})  # our lines say it
    from distributed import Client, KilledWorker, TimeoutError

    try:
        client = Client(address, timeout=CONNECT_SECONDS)
        client.wait_for_workers(1, timeout=CONNECT_SECONDS)
        for file in (packing.__file__, compute.__file__):  # in the order of their imports
            client.upload_file(file)
    except (OSError, ValueError, TypeError, TimeoutError) as error:
        remedy = "start them with: python -m dask scheduler, and: python -m dask worker ADDRESS --nworkers -1"
        what = f"no scheduler with a worker answers ({first_line(error)})"
        raise InputError(f"--scheduler {address}: {what}; {remedy}") from None
    network, _ = read_network()
    sent = client.scatter([network, keys], broadcast=True, hash=False)
    fixed, pool = (name, compute.versions(network), *sent), client.get_executor(pure=False)
    return Workers(
        lambda beat: pool.submit(compute.answer, *fixed, beat),
        lambda: len(client.scheduler_info(n_workers=-1)["workers"]),
        (KilledWorker, CancelledError),
        f"--scheduler {address}: it or its workers are gone; start them and run the same command again to resume",
    )


def computed(workers: Workers, beats: Iterator[tuple[int, bytes]]) -> Iterator[Answered]:
    """Number and answer of each beat, as they are finished. Raises InputError for one that cannot be computed with."""
    pending: dict[Future, int] = {}
    number = 0
    try:
        while True:
            free = AHEAD * max(1, workers.count()) - len(pending)
            pending |= {workers.submit(beat): number for number, beat in itertools.islice(beats, max(0, free))}
            if not pending:
                return
            finished = wait(pending, return_when=FIRST_COMPLETED).done
            for future in sorted(finished, key=lambda future: future.cancelled() or bool(future.exception())):
                number = pending.pop(future)
                yield number, future.result()
    except workers.lost:
        raise InputError(workers.remedy) from None
    except (RuntimeError, ValueError, AssertionError, ImportError) as error:
        raise InputError(f"beat {number + 1} cannot be computed with these keys ({first_line(error)})") from None


def with_progress(finished: Iterator[Answered], done: int, count: int) -> Iterator[Answered]:
    """What is finished; beats a second and the time that is left are shown on stderr. done: of `count`, before that."""
    started = shown = time.monotonic()
    terminal = sys.stderr.isatty()
    for ready, one in enumerate(finished, 1):
        yield one
        now, left = time.monotonic(), count - done - ready
        if terminal or now - shown >= PROGRESS_S:
            shown, rate = now, ready / (now - started)
            text = f"{count - left} of {count} beats, {rate:.3g} a second, {left / rate:.0f} s left"
            print(f"{text:<79}", end="\r" if terminal and left else "\n", file=sys.stderr, flush=True)


def classify(beats: Path, evaluation_keys: Path, target: Path, processes: int, scheduler: str | None) -> None:
    """Run the network on each encrypted beat and write the encrypted answers, in the same order. Raises InputError."""
    _, linear = read_network()
    model = sha256(SERVER)
    header, payloads = read_box(beats, "encrypted beats", whole(linear, "encrypted beats"), model)
    is_whole = whole(linear, "evaluation keys")
    keys_header, stored_keys = read_box(evaluation_keys, "evaluation keys", is_whole, model)
    remedy = "beats and evaluation keys must come from the same keys"
    same("key", evaluation_keys, keys_header["key"], header["key"], remedy)
    names, count = {name: header[name] for name in NAMES}, header["count"]
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{target.name}.{header['beats']}.part")
    with unfinished.open("a+b") as part:
        try:
            fcntl.lockf(part, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process; flock's would pass on to the others
        except OSError:
            raise InputError(f"{unfinished}: another process is computing these beats") from None
        places = resume(part, json.dumps({**names, "count": count}).encode(), count)
        left = places.count(0)
        if left < count:
            print(f"{count - left} of {count} beats are computed already", flush=True)
        if left:
            key = header["key"]
            if scheduler:
                workers = dask_workers(scheduler, key, next(stored_keys))
            else:
                workers = processes_here(min(processes, left), key, evaluation_keys)
            missing = ((number, beat) for number, beat in enumerate(payloads) if not places[number])
            for number, answer in with_progress(computed(workers, missing), count - left, count):
                places[number] = append(part, number.to_bytes(NUMBER_BYTES, "big") + b"".join(map(framed, answer)))
        write_box(target, "encrypted answers", names, answers(part, places))
        unfinished.unlink()


def main() -> None:
    """The command line."""
    if not os.environ.keys() & HUGE_PAGES:
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **HUGE_PAGES})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("beats", type=Path, help="encrypted_beats.zip as client.py encrypt wrote it")
    parser.add_argument("evaluation_keys", type=Path, help="evaluation_keys.zip as client.py keys wrote it")
    output = Path("encrypted_answers.zip")
    parser.add_argument("--output", type=Path, default=output, help=f"file to write (default: {output})")
    what = f"that compute beats, each with its own keys in memory (default: one a core, here {CORES})"
    processes = number(int, 1, 10_000, "a whole number from 1 to 10000")
    parser.add_argument("--processes", type=processes, default=CORES, metavar="N", help=what)
    what = "of Dask (tcp://HOST:8786), whose workers compute the beats instead; only in a network you trust"
    parser.add_argument("--scheduler", metavar="ADDRESS", help=what)
    args = parser.parse_args()
    check_output(args.output, [args.beats, args.evaluation_keys, SERVER])
    classify(args.beats, args.evaluation_keys, args.output, args.processes, args.scheduler)


if __name__ == "__main__":
    run_and_leave(main, "run the same command again")
