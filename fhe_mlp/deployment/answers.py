"""What client.py makes of the answers of a record's beats: WFDB annotations, a .csv file, a summary and a picture."""

from __future__ import annotations

import csv
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from boxes import check_output
from cli import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# WFDB codes of the answers: the beat code that names no class, since the network names none, and that of a comment.
NORMAL, ABNORMAL, NOT_CLASSIFIED = "N", "Q", '"'
WORDS = {NORMAL: "normal", ABNORMAL: "abnormal", NOT_CLASSIFIED: "not classified"}
COLORS = {NORMAL: "tab:blue", ABNORMAL: "tab:red", NOT_CLASSIFIED: "silver"}
RUN_BEATS = 3  # abnormal beats in a row that count as a run, as three ventricular ones do; any other beat ends it
COLUMNS = ("sample", "time", "output", "probability", "decision")
PROGRAM = "client.py of fhe_mlp"  # that the picture names
# How each file begins that may be replaced by a new one.
OURS = {
    ".fhe": rb"\0\x58.\xfc## time resolution: ",
    ".fhe.csv": ",".join(COLUMNS).encode(),
    ".fhe.png": rb"\x89PNG.{20,99}" + PROGRAM.encode(),
}

BIN_S = (10, 30, 60, 120, 300, 600, 1800, 3600)  # of a recording's overview: the first one that gives MAX_BINS or less
MAX_BINS = 300
EACH_BEAT_S = 600.0  # a recording up to this has the rate of each beat drawn, a longer one that of each bin
LONGEST_RR_S = 3.0  # that gives a rate; longer ones are pauses, gaps or missed beats
STRIPS, STRIP_S = 4, 10.0


class Beats(NamedTuple):
    """A record's n beats with their answers, in the order of time."""

    name: str  # of the record
    fs: float  # Hz
    sample: np.ndarray  # (n,)
    code: np.ndarray  # (n,) NORMAL, ABNORMAL or NOT_CLASSIFIED
    output: np.ndarray  # (n,), NaN where not classified; so is the next
    probability: np.ndarray
    reasons: dict[str, int]  # why beats are not classified
    origin: str  # of the R peaks

    def runs(self, shortest: int = RUN_BEATS) -> list[tuple[int, int]]:
        """First and behind-last beat of each run of abnormal beats."""
        return [run.span() for run in re.finditer(f"{ABNORMAL}{{{shortest},}}", "".join(self.code))]


def listed(reasons: dict[str, int]) -> str:
    """Why beats are not classified, to be put behind a sentence."""
    return "".join(f"; {n} {reason}" for reason, n in reasons.items())


def at(seconds: float) -> str:
    """h:mm:ss since the start of the recording."""
    minutes, second = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"


def join(found: dict[str, Any], answers: Sequence[tuple[float, float, int]]) -> Beats:
    """The beats that encrypt kept with the answers (output, probability, decision) of those that were classified."""
    classified = np.array(found["classified"], dtype=bool)
    output, probability = np.full((2, len(classified)), np.nan)
    code = np.full(len(classified), NOT_CLASSIFIED)
    output[classified], probability[classified], abnormal = np.array(answers, dtype=float).T
    code[classified] = np.where(abnormal == 1, ABNORMAL, NORMAL)
    sample = np.array(found["samples"], dtype=np.int64)
    name, reasons = Path(found["record"]).name, found["not_classified"]
    return Beats(name, found["fs"], sample, code, output, probability, reasons, found["origin"])


def check_ours(path: Path, start: bytes) -> None:
    """Raises InputError where `path` is there and does not begin like what this program writes."""
    if path.exists():
        with path.open("rb") as file:
            if not re.match(start, file.read(200), re.DOTALL):
                raise InputError(f"{path}: is there and not an earlier output of client.py; name another --output")


def check_files(folder: Path, name: str, annotations: str) -> None:
    """Raises InputError where a file to be written holds the beats that were encrypted, or is another program's."""
    if annotations:
        check_output(folder / f"{name}.fhe", [Path(annotations)])
    for ending, start in OURS.items():
        check_ours(folder / f"{name}{ending}", start)


def clock(fs: float) -> bytes:
    """How a WFDB annotation file states its time resolution, as wfdb writes it, or would: 4.1.2 fails at it."""
    note = f"## time resolution: {fs:.12g}".encode()
    return bytes((0, 22 << 2, len(note), 63 << 2)) + note + bytes(len(note) % 2) + b"\0\xec\xff\xff\xff\xff\1\0"


def write_annotations(path: Path, beats: Beats) -> None:
    """Write the beats as a WFDB annotation file with the probability as note, whole."""
    import wfdb

    notes = [WORDS[c] if c == NOT_CLASSIFIED else f"{p:.4f}" for c, p in zip(beats.code, beats.probability)]
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
        written = Path(temporary) / "beats.fhe"
        wfdb.wrann(written.stem, "fhe", beats.sample, beats.code.tolist(), aux_note=notes, write_dir=temporary)
        written.write_bytes(clock(beats.fs) + written.read_bytes())
        written.replace(path)


def write_table(path: Path, beats: Beats) -> None:
    """Write the beats as a .csv file with the columns COLUMNS; time in s."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for sample, code, *numbers in zip(beats.sample.tolist(), beats.code, beats.output, beats.probability):
            numbers = ("", "") if code == NOT_CLASSIFIED else map(float, numbers)
            writer.writerow((sample, round(sample / beats.fs, 3), *numbers, WORDS[code]))


def summary(beats: Beats) -> str:
    """Beats, abnormal ones, runs of them and those that are not classified, in a few lines."""
    counts = {code: int((beats.code == code).sum()) for code in WORDS}
    runs = beats.runs()
    lines = [f"{beats.name}: {len(beats.code)} beats, R peaks {beats.origin}"]
    lines += [f"{counts[NORMAL]} normal, {counts[ABNORMAL]} abnormal"]
    lines += [f"{counts[NOT_CLASSIFIED]} not classified{listed(beats.reasons)}"]
    if runs:
        first, end = max(runs, key=lambda run: run[1] - run[0])
        longest = f"; the longest has {end - first} beats, at {at(beats.sample[first] / beats.fs)}"
    what = f"{len(runs)} run{'s' * (len(runs) != 1)} of {RUN_BEATS} or more abnormal beats in a row"
    lines.append(what + (longest if runs else ""))
    return "\n".join(lines)


def choose_strips(beats: Beats) -> list[tuple[int, int]]:
    """Up to STRIPS runs of abnormal beats, the most certain ones in the order of time.

    A run is as certain as its least certain beat. Single beats and pairs only where runs are fewer; none begins in the
    strip of another.
    """
    runs = sorted(beats.runs(1), key=lambda r: (r[1] - r[0] < RUN_BEATS, -beats.output[r[0] : r[1]].min()))
    chosen: list[tuple[int, int]] = []
    for run in runs:
        apart = [abs(beats.sample[run[0]] - beats.sample[other]) > STRIP_S * beats.fs for other, _ in chosen]
        if all(apart) and len(chosen) < STRIPS:
            chosen.append(run)
    return sorted(chosen)


def draw_overview(rate: Axes, shares: Axes, beats: Beats) -> None:
    """Heart rate, and normal, abnormal and not classified beats, over the time of the recording."""
    time = beats.sample / beats.fs
    last = time[-1]
    width = next((w for w in BIN_S if last / w <= MAX_BINS), BIN_S[-1])
    edges = np.arange(int(last // width) + 2) * width
    hours = last > 2 * 3600
    unit = 3600 if hours else 60
    rr = np.diff(time)
    beat_rate, known = 60 / rr, (rr > 0) & (rr <= LONGEST_RR_S)
    if last <= EACH_BEAT_S:
        rate.plot(time[1:] / unit, np.where(known, beat_rate, np.nan), ".-", color="tab:blue", lw=0.6, ms=2.5)
    else:
        place = np.digitize(time[1:][known], edges) - 1
        groups = np.split(beat_rate[known][np.argsort(place, kind="stable")], np.cumsum(np.bincount(place))[:-1])
        bands = np.array([np.quantile(g, [0.05, 0.5, 0.95]) if len(g) else [np.nan] * 3 for g in groups])
        middle = (edges[: len(bands)] + width / 2) / unit
        rate.fill_between(middle, bands[:, 0], bands[:, 2], color="tab:blue", alpha=0.25, lw=0, label="5 to 95 %")
        rate.plot(middle, bands[:, 1], color="tab:blue", lw=1, label="median")
        rate.legend(loc="upper right", ncols=2, fontsize=8, frameon=False)
    rate.set_ylabel("beats a minute")
    rate.set_ylim(0, max(120, np.ceil(np.quantile(beat_rate[known], 0.999) / 20 + 1) * 20) if known.any() else 120)
    bottom = np.zeros(len(edges) - 1)
    for code in (ABNORMAL, NOT_CLASSIFIED, NORMAL):
        count = np.histogram(time[beats.code == code], edges)[0]
        color, alpha = COLORS[code], 0.35 if code == NORMAL else 1
        shares.bar(
            edges[:-1] / unit, count, width / unit, bottom, align="edge", color=color, alpha=alpha, label=WORDS[code]
        )
        bottom += count
    shares.set_ylabel(f"beats in {width} s" if width < 60 else f"beats in {width // 60} min")
    shares.set_ylim(0, bottom.max() * 1.3)
    shares.legend(loc="upper right", ncols=3, fontsize=8, frameon=False)
    shares.set_xlabel(f"time since the start of the recording ({'h' if hours else 'min'})")
    shares.set_xlim(0, edges[-1] / unit)


def draw_strip(axes: Axes, beats: Beats, run: tuple[int, int], signal: np.ndarray, leads: Sequence[str]) -> None:
    """Both leads (mV) around a run of abnormal beats, each beat with its decision above."""
    from matplotlib.ticker import MultipleLocator

    first, last = beats.sample[run[0]] / beats.fs, beats.sample[run[1] - 1] / beats.fs
    end = min(len(signal) / beats.fs, max(STRIP_S, (first + min(last, first + STRIP_S) + STRIP_S) / 2))
    start = max(0.0, end - STRIP_S)
    part = signal[round(start * beats.fs) : round(end * beats.fs)]
    part = part - np.nanmedian(part, axis=0)
    spread = np.ceil(np.nanmax(part[:, 1]) - np.nanmin(part[:, 0]) + 0.2)
    for x, shift in zip(part.T, (0, -spread)):
        axes.plot(start + np.arange(len(part)) / beats.fs, x + shift, color="black", lw=0.7)
    low, high = np.nanmin(part[:, 1]) - spread, np.nanmax(part[:, 0])
    for time, code in zip(beats.sample / beats.fs, beats.code):
        if start <= time < end:
            letter = "?" if code == NOT_CLASSIFIED else code
            color = "gray" if code == NOT_CLASSIFIED else COLORS[code]
            axes.text(time, high + 0.12 * (high - low), letter, color=color, ha="center", va="center", fontsize=9)
    axes.set_xlim(start, end)
    axes.set_ylim(low - 0.05 * (high - low), high + 0.22 * (high - low))
    axes.axvspan(first - 0.25, min(last + 0.25, end), color=COLORS[ABNORMAL], alpha=0.08, lw=0)
    axes.set_yticks([0, -spread], leads)
    axes.set_yticks(np.arange(np.ceil(low), high), minor=True)
    axes.grid(which="minor", axis="y", lw=0.4, alpha=0.6)
    axes.set_ylabel("1 mV a line")
    axes.xaxis.set_major_locator(MultipleLocator(2))
    axes.xaxis.set_major_formatter(lambda seconds, _: at(seconds))
    count, least = run[1] - run[0], beats.probability[run[0] : run[1]].min()
    what = "1 abnormal beat, probability"
    if count > 1:
        what = f"{count} abnormal beats in a row, probability of each at least"
    axes.set_title(f"{at(first)}: {what} {least:.3f}", fontsize=9, loc="left")


def draw(path: Path, beats: Beats, signal: np.ndarray | None, leads: Sequence[str]) -> None:
    """Write the picture: the recording at a glance and, with its signal (samples, 2) in mV, strips of abnormal runs."""
    from matplotlib.figure import Figure

    runs = choose_strips(beats) if signal is not None else []
    heights = [1.3, 1.3, *[1.6] * len(runs)]
    figure = Figure(figsize=(10, 1.2 + 1.4 * sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    rate = figure.add_subplot(grid[0])
    shares = figure.add_subplot(grid[1], sharex=rate)
    rate.tick_params(labelbottom=False)
    draw_overview(rate, shares, beats)
    for k, run in enumerate(runs):
        axes = figure.add_subplot(grid[2 + k])
        draw_strip(axes, beats, run, signal, leads)
    if runs:
        axes.set_xlabel("time since the start of the recording (h:mm:ss)")
    abnormal = int((beats.code == ABNORMAL).sum())
    figure.suptitle(f"Record {beats.name}: {len(beats.code):,} beats, {abnormal:,} decided abnormal", fontsize=12)
    figure.savefig(path, dpi=110, format="png", metadata={"Software": PROGRAM})


def write_all(folder: Path, beats: Beats, signal: np.ndarray | None, leads: Sequence[str]) -> None:
    """Write RECORD.fhe, RECORD.fhe.csv and RECORD.fhe.png into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_annotations(folder / f"{beats.name}.fhe", beats)
    write_table(folder / f"{beats.name}.fhe.csv", beats)
    draw(folder / f"{beats.name}.fhe.png", beats, signal, leads)
