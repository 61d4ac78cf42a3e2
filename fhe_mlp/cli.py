"""What every command needs: its parser, one-line errors and exit statuses, whole files, facts of the machine."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import json
import math
import os
import platform
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SEED = 42
INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it
PATIENCE = 2.0  # seconds that an interrupted child has to end by itself
POLL_SECONDS = 0.1
SPACE_BYTES = 200_000  # that a run needs at least on the disk
INSTRUCTION_SETS = (
    "avx2",
    "avx512f",
)  # flags of /proc/cpuinfo; without the second a bootstrap takes 3 to 4 times as long
BELOW_ONE = math.nextafter(1, 0)
PR_SET_PDEATHSIG = 1  # of prctl(2): which signal a process gets when its parent dies


class InputError(Exception):
    """What the user gave cannot be used; the message names the file, what is wrong and what to do."""


def first_line(error: BaseException) -> str:
    """What an exception says in one line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def run(main: Callable[[], None], say: str = "finished files are whole, run it again") -> None:
    """Call `main` as a command: bad input, a full disk or a read-only folder is one line and exit status 2.

    say: after "interrupted; ", when it is.
    """
    try:
        main()
        sys.stdout.flush()
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"{Path(sys.argv[0]).name}: {where}{error.strerror or first_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{Path(sys.argv[0]).name}: interrupted; {say}", file=sys.stderr)
        sys.exit(INTERRUPTED)


def run_and_leave(main: Callable[[], None], say: str) -> None:
    """`run` for a command that executes circuits, with the exit status that it should have.

    Concrete's runtime, once it has started, ends every process with status 0, whatever Python says.
    """
    status: Any = 0
    try:
        run(main, say)
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
        status = 1
    if isinstance(status, str):  # what sys.exit prints
        print(status, file=sys.stderr)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


def run_in_child(main: Callable[[], None], say: str, rescue: Callable[[], None]) -> None:
    """`run_and_leave` in a child process, so that Ctrl-C ends it within seconds, with one line that ends in `say`.

    While it compiles, makes keys or computes, Concrete holds the interpreter, up to minutes, and answers SIGINT with
    SIGKILL of its own process (SignalGuard in its Python bindings), so that this process could not print anything.
    rescue: called here after a run that was interrupted or killed; it shows what that run left on the disk.
    """
    received = []
    signal.signal(signal.SIGINT, lambda *_: received.append(time.monotonic()))
    child = os.fork()
    if not child:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # never outlives this process, however that ends
        run_and_leave(main, say)
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        time.sleep(POLL_SECONDS)
        if received and time.monotonic() - received[0] > PATIENCE:
            os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(ended[1])
    if not received and 0 <= status != INTERRUPTED:
        sys.exit(status)
    if status != INTERRUPTED:  # else the child has printed the line itself
        what = "interrupted" if received else f"ended by {signal.Signals(-status).name}"  # as when memory runs out
        print(f"\n{Path(sys.argv[0]).name}: {what}; {say}", file=sys.stderr)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run(rescue)
    sys.exit(INTERRUPTED if received or status == INTERRUPTED else 128 - status)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep the docstring's lines and show every default."""


def make_parser(doc: str) -> argparse.ArgumentParser:
    """Parser with the options every script has; `doc` is the script's docstring."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=HelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data", help="folder of the arrays")
    parser.add_argument("--workdir", type=Path, default=Path(), help="folder of models and results")
    parser.add_argument(
        "--seed",
        type=natural_int,
        default=SEED,
        help="of every random draw; same seed, same results but for encryption's noise",
    )
    return parser


def number(kind: type[int] | type[float], low: float, high: float, what: str) -> Callable[[str], float]:
    """argparse type: an int or float from `low` to `high`; `what` it must be is said of any other text."""

    def convert(text: str) -> float:
        try:
            value = kind(text) if kind is float or text.isdecimal() else math.nan  # int takes 1_000 too
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return convert


natural_int = number(int, 0, 2**32 - 1, "a whole number from 0 to 4294967295")  # seeds of NumPy and TensorFlow
positive_int = number(int, 1, 2**31 - 1, "a positive whole number")
positive_float = number(float, sys.float_info.min, sys.float_info.max, "a positive number")


def unwritable(path: Path, error: OSError) -> InputError:
    """What to raise when `path` cannot be written."""
    reason = error.strerror or first_line(error)
    return InputError(f"{path}: cannot be written ({reason}); free space or name another folder")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; it becomes `path` when all is written, and goes when that fails."""
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


def digest(content: bytes | str) -> str:
    """First 64 bits of a SHA-256 as hexadecimal digits: enough to tell results apart, short enough for a column."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:16]


def sha256(path: Path) -> str:
    """SHA-256 of a file, which may be larger than memory, as a hexadecimal string."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def machine_facts() -> dict[str, Any]:
    """Processor, its vector instructions, cores and versions, for the settings sheets."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    packages = ("tensorflow", "concrete-ml", "concrete-python", "onnx", "numpy")
    return {
        "host": platform.node(),
        "processor": names[0] if names else platform.processor(),
        "instruction_set": " ".join(flag for flag in INSTRUCTION_SETS if flag in flags),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }
