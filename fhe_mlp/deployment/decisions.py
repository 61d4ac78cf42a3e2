"""The decisions on a recording's beats: WFDB annotations, a .csv file, a summary and a picture."""

import re
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import expit

from fhe_mlp.cli import whole_file
from fhe_mlp.deployment.recordings import Recording, shown

# WFDB codes of the decisions: the beat code that names no class, since the network names none, and that of a comment.
NORMAL, ABNORMAL, NOT_CLASSIFIED = "N", "Q", '"'
WORDS = {NORMAL: "normal", ABNORMAL: "abnormal", NOT_CLASSIFIED: "not classified"}
COLORS = {NORMAL: "cornflowerblue", ABNORMAL: "tab:red", NOT_CLASSIFIED: "gray"}
PROGRAM = "client.py of fhe_mlp"  # named in the picture
OUTPUTS = {  # the files, with the pattern of how each begins; %b: the recording's identity
    ".fhe": rb"\0\x58.\xfc## time resolution: .{1,40}recording %b",
    ".fhe.csv": rb"recording,sample,time,output,probability,decision\s+%b,",
    ".fhe.png": rb"\x89PNG.{20,99}" + PROGRAM.encode() + b", recording %b",
}
RUN_BEATS = 3  # abnormal beats in a row that count as a run, as three ventricular ones do; any other beat ends it
LONGEST_RR_S = 3.0  # of a heart rate; longer ones are pauses, gaps or missed beats
MAX_BINS, BIN_S = 300, 10  # of the picture's time axis; bins are a multiple of 10 s
STRIPS, STRIP_S = 4, 10.0


def join(recording: Recording, logits: np.ndarray) -> pd.DataFrame:
    """Return all beats of a recording with the logits (m,) of those that were classified.

    Columns: sample; time in s; output and probability, NaN where not classified; code, one of those of WORDS.
    """
    output = np.full(len(recording.samples), np.nan)
    output[np.array(recording.classified, dtype=bool)] = logits
    code = np.select([np.isnan(output), output > 0], [NOT_CLASSIFIED, ABNORMAL], NORMAL)
    columns = {"sample": recording.samples, "time": np.array(recording.samples) / recording.fs, "output": output}
    return pd.DataFrame({**columns, "probability": expit(output), "code": code})


def abnormal_runs(beats: pd.DataFrame, shortest: int = RUN_BEATS) -> list[tuple[int, int]]:
    """Return the first and the behind-last position of each run of abnormal beats."""
    return [run.span() for run in re.finditer(f"{ABNORMAL}{{{shortest},}}", "".join(beats["code"]))]


def summary(recording: Recording, beats: pd.DataFrame) -> str:
    """Return some lines: beats, abnormal ones, beats that are not classified, and runs of abnormal ones."""
    normal, abnormal, others = ((beats["code"] == code).sum() for code in WORDS)
    runs, longest = abnormal_runs(beats), ""
    if runs:
        first, end = max(runs, key=lambda run: run[1] - run[0])
        longest = f"; the longest has {end - first} beats, at {timedelta(seconds=int(beats['time'][first]))}"
    return (
        f"{recording.title}\n{normal} normal, {abnormal} abnormal\n{others} not classified{recording.reasons}\n"
        f"{len(runs)} run{'s' * (len(runs) != 1)} of {RUN_BEATS} or more abnormal beats in a row{longest}"
    )


def write_files(folder: Path, recording: Recording, beats: pd.DataFrame, signal: np.ndarray | None) -> None:
    """Write all OUTPUTS of a recording; signal: its leads in mV (samples, 2), None where they are gone."""
    import wfdb

    annotations, table, picture = (folder / f"{recording.name}{ending}" for ending in OUTPUTS)
    notes = beats["probability"].map("{:.4f}".format).mask(beats["code"] == NOT_CLASSIFIED, WORDS[NOT_CLASSIFIED])
    clock = f"## time resolution: {recording.fs:.12g}"  # a comment at sample 0; with its option fs wrann fails
    samples, codes = np.array([0, 0, *beats["sample"]]), [NOT_CLASSIFIED, NOT_CLASSIFIED, *beats["code"]]
    notes = [clock, f"recording {recording.identity}", *notes]
    with whole_file(annotations) as temporary, tempfile.TemporaryDirectory(dir=folder, prefix=".") as scratch:
        wfdb.wrann("beats", "fhe", samples, codes, aux_note=notes, write_dir=scratch)
        Path(scratch, "beats.fhe").replace(temporary)
    rounded = beats.assign(time=beats["time"].round(3), decision=beats["code"].map(WORDS)).drop(columns="code")
    rounded.insert(0, "recording", recording.identity)
    with whole_file(table) as temporary:
        rounded.to_csv(temporary, index=False)
    with whole_file(picture) as temporary:
        draw(temporary, recording, beats, signal)


def choose_strips(beats: pd.DataFrame) -> list[tuple[int, int]]:
    """Return up to STRIPS runs of abnormal beats in the order of time, none of which begins in the strip of another.

    Those of RUN_BEATS come first, then the most certain ones; a run is as certain as its least certain beat.
    """
    rank = {run: (run[1] - run[0] < RUN_BEATS, -beats["output"][slice(*run)].min()) for run in abnormal_runs(beats, 1)}
    chosen = []
    for run in sorted(rank, key=rank.get):
        apart = all(abs(beats["time"][run[0]] - beats["time"][other]) > STRIP_S for other, _ in chosen)
        if apart and len(chosen) < STRIPS:
            chosen.append(run)
    return sorted(chosen)


def draw(path: Path, recording: Recording, beats: pd.DataFrame, signal: np.ndarray | None) -> None:
    """Write the picture: the recording at a glance and, with its signal (samples, 2) in mV, strips of abnormal runs."""
    from matplotlib.figure import Figure

    runs = choose_strips(beats) if signal is not None else []
    heights = [1.3, 1.3, *[1.6] * len(runs)]
    figure = Figure(figsize=(10, 1.2 + 1.4 * sum(heights)), layout="constrained")
    rate, shares, *strips = figure.subplots(len(heights), height_ratios=heights)
    seconds = beats["time"].iloc[-1]
    unit, length = ("h", 3600) if seconds > 2 * 3600 else ("min", 60)
    time, rr = beats["time"] / length, beats["time"].diff()
    beat_rate = (60 / rr).where((rr > 0) & (rr <= LONGEST_RR_S))
    rate.plot(time, beat_rate, ".-", color="tab:blue", lw=0.6, ms=2.5)
    rate.set(ylabel="beats a minute", ylim=(0, np.nanmax([120, beat_rate.quantile(0.999) + 20])))
    rate.tick_params(labelbottom=False)
    width = BIN_S * max(1, int(np.ceil(seconds / BIN_S / MAX_BINS)))
    edges = np.arange(seconds // width + 2) * width / length
    codes = (ABNORMAL, NOT_CLASSIFIED, NORMAL)
    style = {"color": [COLORS[code] for code in codes], "label": [WORDS[code] for code in codes], "alpha": 0.7}
    count, *_ = shares.hist([time[beats["code"] == code] for code in codes], edges, stacked=True, **style)
    shares.legend(loc="upper right", ncols=3, fontsize=8, frameon=False)
    label = f"time since the start of the recording ({unit})"
    shares.set(xlabel=label, ylabel=f"beats in {width} s", xlim=(0, edges[-1]), ylim=(0, 1.3 * np.max(count)))
    rate.sharex(shares)
    for axes, run in zip(strips, runs):
        draw_strip(axes, recording, beats, run, signal)
        axes.set_xlabel("time since the start of the recording (h:mm:ss)" if run == runs[-1] else "")
    abnormal = (beats["code"] == ABNORMAL).sum()
    figure.suptitle(f"Record {shown(recording.name)}: {len(beats):,} beats, {abnormal:,} decided abnormal", fontsize=12)
    program = f"{PROGRAM}, recording {recording.identity}"
    figure.savefig(path, dpi=110, format="png", metadata={"Software": program})


def draw_strip(axes: Any, recording: Recording, beats: pd.DataFrame, run: tuple[int, int], signal: np.ndarray) -> None:
    """Draw both leads (mV) around a run of abnormal beats, each beat with its decision above."""
    fs, abnormal = recording.fs, beats[slice(*run)]
    first, last = abnormal["time"].iloc[[0, -1]]
    end = min(len(signal) / fs, max(STRIP_S, (first + min(last, first + STRIP_S) + STRIP_S) / 2))
    start = max(0.0, end - STRIP_S)
    part = signal[round(start * fs) : round(end * fs)]
    part = part - np.nanmedian(part, axis=0)
    spread = np.ceil(np.nanmax(part[:, 1]) - np.nanmin(part[:, 0]) + 0.2)
    part[:, 1] -= spread
    axes.plot(start + np.arange(len(part)) / fs, part, color="black", lw=0.7)
    low, high = np.nanmin(part[:, 1]), np.nanmax(part[:, 0])
    for time, code in zip(beats["time"], beats["code"]):
        if start <= time < end:
            letter = "?" if code == NOT_CLASSIFIED else code
            axes.text(time, high + 0.06 * (high - low), letter, color=COLORS[code], ha="center", fontsize=9)
    axes.set(xlim=(start, end), ylim=(low - 0.05 * (high - low), high + 0.22 * (high - low)), ylabel="1 mV a line")
    axes.axvspan(first - 0.25, min(last + 0.25, end), color=COLORS[ABNORMAL], alpha=0.08, lw=0)
    axes.set_yticks([0, -spread], recording.leads)
    axes.set_yticks(np.arange(np.ceil(low), high), minor=True)
    axes.grid(which="minor", axis="y", lw=0.4, alpha=0.6)
    axes.set_xticks(np.arange(np.ceil(start / 2) * 2, end, 2))
    axes.xaxis.set_major_formatter(lambda seconds, _: str(timedelta(seconds=int(seconds))))
    count, least = len(abnormal), abnormal["probability"].min()
    what = "abnormal beats in a row, probability of each at least" if count > 1 else "abnormal beat, probability"
    axes.set_title(f"{timedelta(seconds=int(first))}: {count} {what} {least:.3f}", fontsize=9, loc="left")
