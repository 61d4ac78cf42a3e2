"""Tools of every command: its parser, one-line errors and exit statuses, whole files, facts of the machine."""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import io
import json
import math
import os
import platform
import re
import sys
import tempfile
import traceback
import zipfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SEED = 42
SPACE_BYTES = 200_000  # that a run needs at least on the disk
INSTRUCTION_SETS = ("avx2", "avx512f")  # without the second a bootstrap takes 3 to 4 times as long
BELOW_ONE = math.nextafter(1, 0)


class InputError(Exception):
    """Input that cannot be used; the message names the file, what is wrong and what to do."""


def first_line(error: BaseException) -> str:
    """Return the message of an exception in one line; its type where it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def run(main: Callable[[], None], say: str = "finished files are whole, run it again") -> None:
    """Call `main` as a command: bad input, a full disk or a read-only folder is one line and exit status 2.

    say: printed after "interrupted; " when Ctrl-C ends it, with exit status 130, as shells have it.
    """
    program = Path(sys.argv[0]).name
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files can hold what is no character
    try:
        main()
        print(end="", flush=True)
    except InputError as error:
        print(f"{program}: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"{program}: {where}{error.strerror or first_line(error)}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, ImportError) as error:  # a library is not loaded without memory either
        what = "too little memory, or a library is missing: pip install -r requirements.txt"
        print(f"{program}: {what} ({first_line(error)})", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted; {say}", file=sys.stderr)
        sys.exit(130)


def run_and_leave(main: Callable[[], None], say: str) -> None:
    """Call `run` in a process that loads Concrete, and end with the exit status that Python would have.

    Concrete's runtime, once it has started, ends every process with status 0.
    """
    status: Any = 1
    try:
        run(main, say)
        status = 0
    except SystemExit as stop:  # of run and of argparse
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(OSError):
        print(end="", flush=True)
    os._exit(status)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the docstring's lines and shows each option's default once."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is None or action.default is False or "default" in action.help:
            return action.help
        if isinstance(action.default, tuple | list):
            shown = " ".join(map(str, action.default)) or "none"
            return f"{action.help} (default: {shown})"
        return super()._get_help_string(action)


def make_parser(doc: str) -> argparse.ArgumentParser:
    """Return a parser with the options that every script has; doc: the script's docstring."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=HelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data", help="folder of the arrays")
    parser.add_argument("--workdir", type=Path, default=Path(), help="folder of models and results")
    seeded = "of every random draw; same seed, same results but for encryption's noise"
    parser.add_argument("--seed", type=natural_int, default=SEED, help=seeded)
    return parser


def number(kind: type[int] | type[float], low: float, high: float, what: str) -> Callable[[str], float]:
    """Return an argparse type for an int or float from `low` to `high`; errors say that a text is not `what`."""

    def convert(text: str) -> float:
        with contextlib.suppress(ValueError):
            if (kind is float or text.isdecimal()) and low <= (value := kind(text)) <= high:  # int takes 1_000 too
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")

    return convert


natural_int = number(int, 0, 2**32 - 1, "a whole number from 0 to 4294967295")  # seeds of NumPy and TensorFlow
positive_int = number(int, 1, 2**31 - 1, "a positive whole number")
positive_float = number(float, sys.float_info.min, sys.float_info.max, "a positive number")


def unwritable(path: Path, error: OSError) -> InputError:
    """Return what to raise when `path` cannot be written; the remedy follows the cause."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "free space or name another folder" if full else "name another folder"
    return InputError(f"{path}: cannot be written ({error.strerror or first_line(error)}); {remedy}")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`, which becomes `path` when all is written and is deleted when that fails."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # or a power cut could leave the new name without its content
        temporary.replace(path)
    except OSError as error:
        raise unwritable(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Make `folder` and try it, before hours of work. Raises InputError when nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(SPACE_BYTES))
    except OSError as error:
        raise unwritable(folder, error) from None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as indented JSON, whole."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def zip_entry(name: str) -> zipfile.ZipInfo:
    """Return an entry for a .zip that says nothing of when it was made: equal contents are equal files."""
    return zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))


def digest(content: bytes | str) -> str:
    """Return the first 64 bits of a SHA-256 in hexadecimal: enough to tell results apart, short enough for a column."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:16]


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, which may be larger than memory, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def cores() -> int:
    """Return the cores that this process may use: in a container, fewer than the machine can have."""
    return len(os.sched_getaffinity(0))


def machine_facts() -> dict[str, Any]:
    """Return processor, vector instructions, cores and versions, for the settings sheets."""
    cpu = dict(re.findall(r"^(model name|flags)\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
    packages = ("tensorflow", "concrete-ml", "concrete-python", "onnx", "numpy")
    return {
        "host": platform.node(),
        "processor": cpu.get("model name", ""),
        "instruction_set": " ".join(name for name in INSTRUCTION_SETS if name in cpu.get("flags", "").split()),
        "cores": cores(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }
