"""The server's side: classifies encrypted heartbeats and can read neither them nor the answers.

    python server.py encrypted_beats.zip evaluation_keys.zip      -> encrypted_answers.zip

Both files come from the hospital's client.py; the answers go back to it. Answers are stored at once in a .part file
beside the output, which is deleted at the end: after an interruption, the same command computes only what is missing.
One process a core computes, or, with --scheduler, the workers of a Dask cluster.
"""

import argparse
import contextlib
import dataclasses
import functools
import re
import shutil
import sqlite3
import sys
import tempfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fhe_mlp.cli import HelpFormatter, InputError, check_writable, cores, first_line, number, run_and_leave, sha256
from fhe_mlp.deployment import exchange
from fhe_mlp.encrypted import ANSWERS, BEATS, CIRCUIT_ERRORS, KEYS, scheme_module
from fhe_mlp.workers import LOST, open_workers

HERE = Path(__file__).resolve().parent
PROGRESS_S = 60.0  # between two states of the progress bar in a log
OPEN_PART = """PRAGMA locking_mode = EXCLUSIVE;  -- until this process ends, however it does
    BEGIN EXCLUSIVE; CREATE TABLE IF NOT EXISTS answers (payload INTEGER PRIMARY KEY, answer BLOB); COMMIT"""
Network = tuple[str, bytes, bytes]  # what a worker receives once: name of the scheme, server's part, evaluation keys


@functools.lru_cache(maxsize=1)  # by content; loading takes longer than a beat, and keys are large
def load(network: Network) -> Any:
    """Return the scheme's server with its keys."""
    scheme, part, keys = network
    server = scheme_module(scheme).Server(part)
    server.load_keys(keys)
    return server


def answer(network: Network, first: int, beats: bytes) -> bytes:
    """Return the encrypted answers to a payload whose first beat has the number `first`. Raises InputError."""
    try:
        return load(network).run(beats)
    except MemoryError:
        raise  # of this machine, not of the keys
    except CIRCUIT_ERRORS as error:
        what = f"beats from number {first + 1} on cannot be computed with these keys"
        raise InputError(f"{what} ({first_line(error)}); have both sent again") from None


def compute(network: Network, beats: exchange.Archive, part: sqlite3.Connection, args: argparse.Namespace) -> None:
    """Compute the answers that are not in `part` and store them there. Raises InputError."""
    from fhe_mlp.deployment.server import answer  # under a name by which workers can import it

    finished = {payload for (payload,) in part.execute("SELECT payload FROM answers")}
    missing = [payload for payload in range(len(beats.spans)) if payload not in finished]
    done = sum(len(beats.spans[payload]) for payload in finished)
    if finished:
        print(f"{done} of {beats.header.count} beats are computed already", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        package = Path(shutil.make_archive(f"{folder}/package", "zip", HERE, "fhe_mlp")).read_bytes()
    versions = scheme_module(network[0]).Server.versions
    jobs = ((beats.spans[payload].start, beats.payload(payload)) for payload in missing)
    pause = 0.1 if sys.stderr.isatty() else PROGRESS_S
    with (
        open_workers(network, min(args.processes, len(missing) or 1), args.scheduler, versions, package) as workers,
        tqdm(total=beats.header.count, initial=done, unit=" beats", mininterval=pause, delay=pause) as progress,
    ):
        for job, content in workers.map(answer, jobs):
            span = beats.spans[missing[job]]
            if content is LOST:
                what = f"the processes that compute beat {span.start + 1} are killed again and again"
                raise InputError(f"{what}, perhaps for want of memory (--processes); run the same command to resume")
            part.execute("INSERT INTO answers VALUES (?, ?)", (missing[job], content))
            progress.update(len(span))


def classify(args: argparse.Namespace) -> None:
    """Run the network on the encrypted beats and write the encrypted answers. Raises InputError."""
    model, content = exchange.read_export(HERE, exchange.SERVER_PART)
    check = scheme_module(model["scheme"]).Server(content).check
    beats = exchange.Archive(args.beats, BEATS, model, check)
    same = exchange.START % ANSWERS.encode() + rb'.*"beats": "%b"' % re.escape(beats.header.beats).encode()
    exchange.check_replaceable(args.output, same)
    keys = exchange.Archive(args.evaluation_keys, KEYS, model, check)
    if keys.header.key != beats.header.key:
        raise InputError(f"{args.evaluation_keys}: beats and evaluation keys must come from the same keys")
    network = model["scheme"], content, keys.payload()
    check_writable(args.output.absolute().parent)
    path = args.output.with_name(f"{args.output.name}.{sha256(args.beats)[:16]}.part")
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as part:
            part.executescript(OPEN_PART)
            compute(network, beats, part, args)
            answers = (content for (content,) in part.execute("SELECT answer FROM answers ORDER BY payload"))
            exchange.write_archive(args.output, dataclasses.replace(beats.header, kind=ANSWERS), answers)
            path.unlink()
    except sqlite3.Error as error:
        locked = "locked" in str(error)
        why = "another process is computing these beats" if locked else "free space, or delete it to begin anew"
        raise InputError(f"{path}: {first_line(error)}; {why}") from None


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("beats", type=Path, help="encrypted_beats.zip as client.py encrypt wrote it")
    parser.add_argument("evaluation_keys", type=Path, help="evaluation_keys.zip as client.py keys wrote it")
    parser.add_argument("--output", type=Path, default=Path("encrypted_answers.zip"), help="file to write")
    processes = number(int, 1, 10_000, "a whole number from 1 to 10000")
    what = "that compute beats, each with its own keys in memory"
    parser.add_argument("--processes", type=processes, default=cores(), metavar="N", help=what)
    what = "of Dask (tcp://HOST:8786), whose workers compute the beats instead; only in a network you trust"
    parser.add_argument("--scheduler", metavar="ADDRESS", help=what)
    classify(parser.parse_args())


if __name__ == "__main__":
    run_and_leave(main, "run the same command again")
