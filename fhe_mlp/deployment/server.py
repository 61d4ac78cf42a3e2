"""The server's side: classifies encrypted heartbeats and cannot read them, nor the answers.

    python server.py encrypted_beats.zip evaluation_keys.zip      -> encrypted_answers.zip

Both files come from the hospital's client.py; the answers go back to it. server.zip and boxes.py lie beside this file.
Beats are computed one at a time. Each answer is kept at once in a .part file beside the output, which is deleted at the
end: after an interruption, the same command computes only what is missing.
"""

from __future__ import annotations

import argparse
import fcntl
import itertools
import json
import os
import struct
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from boxes import NAMES, Refusal, check_output, first_line, read_box, run, same, sha256, without_log, write_box

SERVER = Path(__file__).resolve().with_name("server.zip")
FRAME = struct.Struct(">QI")  # length and CRC-32 before each entry of a .part file
PROGRESS_S = 60.0  # between two lines of progress in a log; on a terminal one line is renewed after each beat


def append(part: BinaryIO, entry: bytes) -> None:
    """Write an entry behind the others; the operating system has all of it, should this process be killed."""
    part.write(FRAME.pack(len(entry), zlib.crc32(entry)) + entry)
    part.flush()


def entries(part: BinaryIO) -> Iterator[bytes]:
    """Each whole entry of a .part file; leaves the file behind the last one, where an interrupted one may begin.

    No entry is empty: zeros, which a power cut can leave at the end of a file, would pass as empty ones.
    """
    part.seek(0)
    end, size = 0, os.fstat(part.fileno()).st_size
    while len(frame := part.read(FRAME.size)) == FRAME.size:
        length, checksum = FRAME.unpack(frame)
        if not 0 < length <= size - part.tell():  # before memory is taken for it
            break
        entry = part.read(length)
        if zlib.crc32(entry) != checksum:
            break
        end = part.tell()
        yield entry
    part.seek(end)


def resume(part: BinaryIO, first: bytes) -> int:
    """How many answers a .part file holds behind the entry `first`; whatever else it held is cut off."""
    part.seek(0)
    if next(entries(part), None) == first:
        done = sum(1 for _ in entries(part)) - 1
        part.truncate()
        return done
    part.seek(0)
    part.truncate()
    append(part, first)
    return 0


def with_progress(numbers: range) -> Iterator[int]:
    """The numbers; beats a second and the time that is left are shown on stderr."""
    started = shown = time.monotonic()
    terminal = sys.stderr.isatty()
    for number in numbers:
        yield number
        now, left = time.monotonic(), numbers.stop - number - 1
        if terminal or now - shown >= PROGRESS_S:
            shown, rate = now, (number + 1 - numbers.start) / (now - started)
            text = f"{number + 1} of {numbers.stop} beats, {rate:.3g} a second, {left / rate:.0f} s left"
            print(f"{text:<79}", end="\r" if terminal and left else "\n", file=sys.stderr, flush=True)


def classify(beats: Path, evaluation_keys: Path, target: Path) -> None:
    """Run the network on each encrypted beat and write the encrypted answers, in the same order. Raises Refusal."""
    header, payloads = read_box(beats, "encrypted beats")
    keys_header, stored_keys = read_box(evaluation_keys, "evaluation keys")
    model = sha256(SERVER)
    for path, given in ((beats, header), (evaluation_keys, keys_header)):
        same("model", path, given["model"], model, "server.zip and client.zip must come from one export")
    remedy = "beats and evaluation keys must come from the same keys"
    same("key", evaluation_keys, keys_header["key"], header["key"], remedy)

    from concrete.fhe import EvaluationKeys  # takes seconds, so only for files that fit
    from concrete.ml.deployment import FHEModelServer

    try:
        server = FHEModelServer(str(SERVER.parent))
    except (OSError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile) as error:
        raise Refusal(f"{SERVER}: cannot be used here ({first_line(error)})") from None
    names, count = {name: header[name] for name in NAMES}, header["count"]
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{target.name}.{header['beats']}.part")
    with unfinished.open("a+b") as part:
        try:
            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Refusal(f"{unfinished}: another process is computing these beats") from None
        if done := resume(part, json.dumps({**names, "count": count}).encode()):
            print(f"{done} of {count} beats are computed already", flush=True)
        try:
            with without_log():  # once; FHEModelServer.run would do it for every beat
                keys = EvaluationKeys.deserialize(next(stored_keys))
            for _, beat in zip(with_progress(range(done, count)), itertools.islice(payloads, done, None)):
                with without_log():
                    answer = server.run(beat, keys)
                append(part, answer)
        except (RuntimeError, ValueError, AssertionError) as error:
            raise Refusal(f"{beats}, {evaluation_keys}: cannot be computed with ({first_line(error)})") from None
        write_box(target, "encrypted answers", names, itertools.islice(entries(part), 1, None))
        unfinished.unlink()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("beats", type=Path, help="encrypted_beats.zip as client.py encrypt wrote it")
    parser.add_argument("evaluation_keys", type=Path, help="evaluation_keys.zip as client.py keys wrote it")
    output = Path("encrypted_answers.zip")
    parser.add_argument("--output", type=Path, default=output, help=f"file to write (default: {output})")
    args = parser.parse_args()
    check_output(args.output, [args.beats, args.evaluation_keys, SERVER])
    classify(args.beats, args.evaluation_keys, args.output)


if __name__ == "__main__":
    run(main)
