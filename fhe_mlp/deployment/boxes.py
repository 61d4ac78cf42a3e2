"""The files that travel between client.py and server.py.

A box is an uncompressed .zip: payloads.bin, in which each payload follows its length and CRC-32, and header.json with
their count, what they are, which model and which keys they are for, and of which beats. A box comes from somebody else:
the names in it are never used as paths, and nothing is read before its size is known to fit into the file. Payloads are
written and read one at a time, so that memory does not grow with their number.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import packing
from cli import InputError, first_line

BOX_VERSION = 2  # of the layout of a box
PAYLOADS, HEADER = "payloads.bin", "header.json"  # the entries of the .zip
FRAME = struct.Struct(">QI")  # length and CRC-32, before each payload
NAMES = ("model", "key", "beats")  # in the header of a box; beats of evaluation keys: 0, for any
HEADER_BYTES = 10_000  # of header.json at most; ours has about 150
Check = Callable[[bytes], bool]


def same(what: str, path: Path, given: str, wanted: str, remedy: str) -> None:
    """Raises InputError unless both are the same."""
    if given != wanted:
        raise InputError(f"{path}: is for {what} {given}, here is {what} {wanted}; {remedy}")


def check_output(output: Path, inputs: Sequence[Path]) -> None:
    """Raises InputError when writing `output` would change one of `inputs`, files or folders."""
    target = output.resolve()
    for path in inputs:
        if path.resolve() in (target, *target.parents):
            raise InputError(f"{output}: writing it would overwrite {path}; name another --output")


def framed(payload: bytes) -> bytes:
    """A payload behind its length and checksum."""
    return FRAME.pack(len(payload), zlib.crc32(payload)) + payload


def read_frames(file: IO[bytes], size: int) -> Iterator[bytes]:
    """Each whole payload from where `file`, of `size` bytes, stands; ends at the first that is cut short or damaged.

    No payload is empty: zeros, which a power cut can leave at the end of a file, would pass as empty ones.
    """
    while len(frame := file.read(FRAME.size)) == FRAME.size:
        length, checksum = FRAME.unpack(frame)
        if not 0 < length <= size - file.tell():  # before memory is taken for it
            return
        payload = file.read(length)
        if zlib.crc32(payload) != checksum:
            return
        yield payload


def is_message(payload: bytes) -> bool:
    """Whether a payload is as long as it says: a number of segments less one, their sizes in 8 bytes, the segments.

    That is how Cap'n Proto, and so Concrete, stores a value. Where bytes are missing, up to 32 GB, its reader asks for
    them again and again, 8 kB at a time, and writes a stack trace each time, which takes up to hours.
    """
    segments = int.from_bytes(payload[:4], "little") + 1
    table = 4 + 4 * segments
    if table > len(payload):
        return False
    return len(payload) == -(-table // 8) * 8 + 8 * sum(struct.unpack_from(f"<{segments}I", payload, 4))


def whole(linear: Mapping[str, Any] | None, kind: str) -> Check:
    """What says whether a payload of `kind` is whole; linear: what both sides know of a network without bootstraps."""
    return functools.partial(packing.has_layout, wanted=linear["layouts"][kind]) if linear else is_message


def write_box(path: Path, kind: str, names: Mapping[str, str], payloads: Iterable[bytes]) -> None:
    """Write a box, whole or not at all. Payloads are written as they come, so that they need not fit into memory.

    names: of "model", "key" and "beats", in hexadecimal digits.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    count = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as box:
            with box.open(PAYLOADS, "w", force_zip64=True) as entry:
                for payload in payloads:
                    entry.write(framed(payload))
                    count += 1
            header = {"kind": kind, "version": BOX_VERSION, **names, "count": count}
            box.writestr(HEADER, json.dumps(header))
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or first_line(error)})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    print(f"wrote {path} ({kind}: {count}, {path.stat().st_size / 1e6:.2f} MB)")


def damaged(path: Path, error: Exception) -> InputError:
    """What to raise when a box cannot be read."""
    return InputError(f"{path}: is truncated or damaged ({first_line(error)}); have it sent again")


def read_payloads(path: Path, is_whole: Check = is_message) -> Iterator[bytes]:
    """The payloads of a box, one at a time. Raises InputError where one is cut short, damaged or not whole."""
    try:
        with zipfile.ZipFile(path) as box, box.open(PAYLOADS) as entry:
            size, end = box.getinfo(PAYLOADS).file_size, 0
            for payload in itertools.takewhile(is_whole, read_frames(entry, size)):
                end = entry.tell()
                yield payload
            if end != size:
                raise ValueError("a payload is not whole")
    except Exception as error:  # zipfile raises a dozen unrelated types on damaged files
        raise damaged(path, error) from None


def read_box(
    path: Path, kind: str, is_whole: Check = is_message, model: str | None = None
) -> tuple[dict[str, Any], Iterator[bytes]]:
    """Header of a box, checked as a whole, and its payloads, which are read as they are asked for.

    is_whole: of a payload, before a library sees it; those of Concrete are messages. model: that the box has to be for.

    Raises InputError for a damaged box or one of another kind, OSError for a file that cannot be opened.
    """
    with path.open("rb") as file:
        try:
            with zipfile.ZipFile(file) as box:
                entries = box.infolist()
                if sorted(entry.filename for entry in entries) != [HEADER, PAYLOADS]:
                    raise ValueError("it holds other entries")
                if any(e.compress_type != zipfile.ZIP_STORED or e.file_size != e.compress_size for e in entries):
                    raise ValueError("it is compressed")
                # In sum, since entries may also claim the same bytes many times over.
                if sum(entry.file_size for entry in entries) > path.stat().st_size:
                    raise ValueError("its entries claim to be larger than the file")
                if box.getinfo(HEADER).file_size > HEADER_BYTES:
                    raise ValueError("its header is too long")
                header = json.loads(box.read(HEADER))
                found, count = (header["kind"], header["version"]), header["count"]
                if type(count) is not int or count < 1:
                    raise ValueError("its header counts no payloads")
                if not all(re.fullmatch("[0-9a-f]{1,64}", header[name]) for name in NAMES):
                    raise ValueError("its header names no model, keys and beats")
        except Exception as error:  # as above, and json's
            raise damaged(path, error) from None
    if found != (kind, BOX_VERSION):
        what = f"{str(found[0])[:40]!r}, version {str(found[1])[:10]!r}"
        raise InputError(f"{path}: holds {what}; wanted here are {kind!r}, version '{BOX_VERSION}'")
    if model:  # before the payloads, whose form depends on it
        same("model", path, header["model"], model, "server.zip and client.zip must come from one export")
    if sum(1 for _ in read_payloads(path, is_whole)) != count:  # now, rather than after hours of computing
        raise damaged(path, ValueError("its header counts other payloads than there are"))
    return header, read_payloads(path, is_whole)
