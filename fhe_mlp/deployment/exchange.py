"""Files that travel between client.py and server.py: archives of evaluation keys, encrypted beats and answers.

An archive is an uncompressed .zip: header.json, and an entry "0", "1" ... for each payload; one at a time is in memory.
It comes from somebody else: no name in it is used as a path, and no entry is read before all fit into the file.
"""

import json
import re
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fhe_mlp.cli import InputError, digest, first_line, sha256, whole_file, zip_entry
from fhe_mlp.encrypted import ANSWERS, BEATS, scheme_module

SECRET_KEYS = "secret keys"  # an archive that never travels
HEADER, HEADER_BYTES = "header.json", 10_000  # its name and most bytes that are read; ours has about 200
START = rb'PK\x03\x04.{26}header\.json\{"kind": "%b"'  # pattern of how an archive of a kind begins
MODEL, CLIENT_PART, SERVER_PART = "model.json", "client_part.bin", "server_part.bin"  # beside client.py and server.py


@dataclass(frozen=True)
class Header:
    """Content of an archive, and the network, keys and beats that it belongs to."""

    kind: str  # KEYS, BEATS, ANSWERS or SECRET_KEYS
    model: str  # SHA-256 of the server's part of the network
    key: str  # random name of the keys
    beats: str = ""  # random name of the beats where the client has stored their times
    count: int = 1  # of beats, or of keys


class Archive:
    """An archive that was checked as a whole: its `header`, and as `spans` the range of beats in each payload."""

    def __init__(
        self, path: Path, kind: str, model: dict[str, Any], check: Callable[[str, bytes], None] = lambda *_: None
    ) -> None:
        """Open an archive that must be of `kind` and for `model`, the content of model.json.

        check: raises ValueError for a kind and a payload that no library should see. Raises InputError or OSError.
        """
        file = path.open("rb")  # outside of try: a missing file is not a damaged one
        try:
            self.zip = zipfile.ZipFile(file)
            entries = self.zip.infolist()
            stored = all(e.compress_type == zipfile.ZIP_STORED and e.file_size == e.compress_size for e in entries)
            if not stored or sum(e.file_size for e in entries) > path.stat().st_size:  # they may claim the same bytes
                raise ValueError("its entries are compressed, or claim to be larger than the file")
            if self.zip.getinfo(HEADER).file_size > HEADER_BYTES:
                raise ValueError("its header is too long")
            self.header = header = Header(**json.loads(self.zip.read(HEADER)))
            if not all(type(value) is str for value in (header.kind, header.model, header.key, header.beats)):
                raise ValueError("its header holds no names")
            if header.kind != kind:
                raise InputError(f"{path}: holds {header.kind[:40]!r}; expected are {kind!r}")
            if header.model != model["model"]:
                raise InputError(f"{path}: is for another model; client and server must come from one export")
            count, size = header.count, model["numbers"]["beats"] if kind in (BEATS, ANSWERS) else 1
            if type(count) is not int or count < 1 or -(-count // size) != len(entries) - 1:
                raise ValueError("its header counts other payloads than there are")
            self.spans = [range(first, min(first + size, count)) for first in range(0, count, size)]
            different = set()
            for number in range(len(self.spans)):  # now, rather than after hours of computing
                payload = self.payload(number)
                check(kind, payload)
                different.add(digest(payload))
            if len(different) < len(self.spans):
                raise ValueError("payloads are equal, which encryption never makes")
        except InputError:
            raise
        except Exception as error:  # zipfile raises a dozen unrelated types on damaged files
            remedy = "have it sent again, or restore it from a copy"
            raise InputError(f"{path}: is truncated or damaged ({first_line(error)}); {remedy}") from None

    def payload(self, number: int = 0) -> bytes:
        """Return one payload."""
        return self.zip.read(str(number))


def write_archive(path: Path, header: Header, payloads: Iterable[bytes]) -> None:
    """Write an archive, whole or not at all, each payload as it comes."""
    with whole_file(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        archive.writestr(zip_entry(HEADER), json.dumps(asdict(header)))
        for number, payload in enumerate(payloads):
            archive.writestr(zip_entry(str(number)), payload)
    print(f"wrote {path} ({header.kind}: {header.count}, {path.stat().st_size / 1e6:.2f} MB)", flush=True)


def check_replaceable(path: Path, start: bytes) -> None:
    """Raise InputError where `path` exists and does not begin with the pattern `start` of our own files."""
    if path.exists():
        with path.open("rb") as file:
            if not re.match(start, file.read(500), re.DOTALL):
                what = "exists and is not an earlier output of this command for these beats"
                raise InputError(f"{path}: {what}; move it away or name another --output")


def read_export(folder: Path, part: str) -> tuple[dict[str, Any], bytes]:
    """Return the content of MODEL and of a part in the folder of an exported side.

    Raises InputError where one of them is damaged, or a library has another version than where it was exported.
    """
    try:
        model = json.loads((folder / MODEL).read_text(encoding="utf-8"))
        if sha256(folder / part) != model["parts"][part]:
            raise ValueError(f"{part} is damaged")
        installed = scheme_module(model["scheme"]).Server.versions()
    except ImportError as error:
        raise InputError(f"{first_line(error)}; pip install -r requirements.txt") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: cannot be used ({first_line(error)}); restore it from the export") from None
    for library, version in model["versions"].items() - installed.items():
        found = f"{library} {installed.get(library)} is installed, {version} is needed"
        raise InputError(f"{found}; pip install -r requirements.txt")
    return model, (folder / part).read_bytes()
