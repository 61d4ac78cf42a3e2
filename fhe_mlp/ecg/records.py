"""Records, WFDB or EDF, from many programs: their two leads and annotations.

Every file is checked before it is read: a header that claims too much would fill the memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fhe_mlp.ecg.beats import Unsuited
from fhe_mlp.ecg.features import MIN_FS_HZ

# From the lead most like MLII (upright QRS) to the one most like V1; leads of other names stand between them.
LEADS = "II V5 V6 V4 I AVF III AVL ? V3 AVR V2 V1".split()
EXPECTED_LEADS = {"ch0": ["MLII"], "ch1": ["V1", "V2", "V4", "V5"]}  # of MIT-BIH, but for its records 102 and 104

MILLIVOLTS = {"nv": 1e-6, "uv": 1e-3, "µv": 1e-3, "mv": 1.0, "v": 1e3}  # of the units of voltage that a lead may have
HEADER_BYTES = 1_000_000  # no header is longer
SAMPLES_PER_BYTE, SPARE_SAMPLES = 16, 10_000_000  # that a header may claim: of compressed files; of gaps in segments

# Notes of an .atr that wfdb understands, each after its length and code.
RESOLUTION = re.compile(rb"[\x15-\xff]\xfc## time resolution: \d")
DEFINITIONS = re.compile(rb"\x1e\xfc## annotation type definitions.*?\x15\xfc## end of definitions", re.DOTALL)

# Names, units and samples a frame of all signals, frames a second, and what loads the signals at some positions.
Signals = tuple[list[str], list[str], list[int], float, Callable[[list[int]], list[np.ndarray]]]


def lead_name(text: str | None) -> str:
    """A lead's name as in LEADS, whatever way it is written: II for "MLII", "ml 2", "ECG lead II"; else in capitals."""
    name = re.sub(r"^(ECG|EKG)(?=\D)", "", re.sub(r"[^A-Z0-9]", "", (text or "").upper()))  # but "ECG 2" is a channel
    lead = re.fullmatch(r"(?:LEAD|ML|D)?(I{1,3})|(?:LEAD|ML|D)([123])|(?:LEAD)?(V[1-6]|AV[RLF])", name)
    return (lead[1] or lead[3] or "I" * int(lead[2])) if lead else name


def choose_leads(names: Sequence[str | None]) -> tuple[int, int]:
    """Positions of the leads for ch0 and ch1 among two or more: the one most like MLII and the one most like V1."""
    ranks = {name: k for k, name in enumerate(LEADS)}
    keys = sorted((ranks.get(lead_name(n), ranks["?"]), lead_name(n), n or "", k) for k, n in enumerate(names))
    return keys[0][-1], keys[-1][-1]


def are_expected(names: Sequence[str | None], expected: Mapping[str, Sequence[str]] = EXPECTED_LEADS) -> bool:
    """Whether the names of ch0 and ch1 are among the expected ones."""
    return all(lead_name(name) in map(lead_name, others) for name, others in zip(names, expected.values()))


def check_claims(folder: Path, header: Any, segments: list[Any]) -> None:
    """Raise ValueError when a header (wfdb.rdheader's) contradicts itself or claims more than its files can hold."""
    first = segments[0]
    if header.n_sig != len(first.sig_name):
        raise ValueError(f"its .hea announces {header.n_sig} signals and describes {len(first.sig_name)}")
    for segment in segments[1:]:
        described, signals = (list(zip(s.sig_name, s.units, s.samps_per_frame)) for s in (first, segment))
        same = set(signals) <= set(described) if header.layout == "variable" else signals == described
        if not same or segment.fs != header.fs:
            raise ValueError("its segments hold other signals, units or sampling rates")
    held = sum((folder / f).stat().st_size for f in {f for s in segments for f in s.file_name} - {"~"})
    lengths = [((s.sig_len or 0) + max(k or 0 for k in s.skew), s) for s in segments] + [(header.sig_len or 0, first)]
    if max(n * sum(k or 1 for k in s.samps_per_frame) for n, s in lengths) > SAMPLES_PER_BYTE * held + SPARE_SAMPLES:
        raise ValueError("its .hea claims more samples than its files can hold")


def ecg_signals(names: Sequence[str], units: Sequence[str]) -> list[int]:
    """Positions of the signals in a unit of voltage whose names are not another kind's in wfdb's table."""
    from wfdb.io.record import SIGNAL_CLASSES

    other = set(SIGNAL_CLASSES.drop(["ecg", "unknown"])["signal_names"].sum())
    voltages = [unit.lower() in MILLIVOLTS for unit in units]
    return [k for k, name in enumerate(names) if voltages[k] and not other & set(re.findall("[a-z]+", name.lower()))]


def read_edf(path: str) -> Signals:
    """Read the header of an EDF or EDF+ file (edfplus.info). Raises ValueError for a damaged file."""
    size = Path(path).stat().st_size
    with Path(path).open("rb") as file:
        start = file.read(256)
        if start[:8].strip() != b"0" or len(start) < 256:
            raise ValueError("is no EDF file")
        if start[192:197] == b"EDF+D":
            raise Unsuited("is an EDF+ file with interruptions, which are not supported; convert it to WFDB")
        count = int(start[252:256])
        if not 0 < count <= 9999 or len(fields := file.read(256 * count)) < 256 * count:
            raise ValueError("has a truncated header")

    def column(offset: int, width: int) -> list[str]:
        """One field of all signals; `offset` and `width` in bytes of a signal."""
        text = fields[offset * count : (offset + width) * count].decode("latin-1")
        return ["".join(filter(str.isprintable, text[k : k + width])).strip() for k in range(0, len(text), width)]

    per_frame, data = [int(n) for n in column(216, 8)], 256 * (count + 1)
    frames, seconds, width = int(start[236:244]), float(start[244:252]), sum(per_frame)
    if min(per_frame) < 1 or not 0 < seconds < np.inf:
        raise ValueError("has a header without a sampling rate")
    held = (size - data) // (2 * width)
    frames = held if frames == -1 else frames
    if not 0 < frames <= held:
        raise ValueError("holds fewer samples than its header says")

    def load(chosen: list[int]) -> list[np.ndarray]:
        samples, signals = np.memmap(path, "<i2", "r", data, (frames, width)), []
        for k in chosen:
            low, high, least, most = (float(column(offset, 8)[k]) for offset in (104, 112, 120, 128))
            if not (np.isfinite(high - low) and most > least):
                raise ValueError("has a header without a scale")
            digital = np.hsplit(samples, np.cumsum(per_frame))[k].ravel()
            signals.append((digital - least) * (high - low) / (most - least) + low)
        return signals

    return column(0, 16), column(96, 8), per_frame, 1 / seconds, load


def read_wfdb(path: str) -> Signals:
    """Read the header of a WFDB record. Raises what wfdb raises on a damaged file."""
    import wfdb

    if Path(f"{path}.hea").stat().st_size > HEADER_BYTES:
        raise ValueError("its .hea is longer than any header")
    header = wfdb.rdheader(path, rd_segments=True)
    segments = [s for s in getattr(header, "segments", [header]) if s is not None]
    if not header.n_sig:
        raise Unsuited("has no signals")
    check_claims(Path(path).parent, header, segments)

    def load(chosen: list[int]) -> list[np.ndarray]:
        with np.errstate(all="ignore"):  # absurd gains of damaged headers end as missing signal
            return wfdb.rdrecord(path, channels=chosen, smooth_frames=False).e_p_signal

    names, per_frame = [name or "" for name in segments[0].sig_name], [k or 1 for k in segments[0].samps_per_frame]
    return names, segments[0].units, per_frame, header.fs, load


def read_signal(path: str) -> tuple[np.ndarray, float, list[str]]:
    """Return what two_leads returns of a WFDB record (path without ending) or of an .edf file.

    Raises Unsuited, or what wfdb raises on a damaged file.
    """
    return two_leads((read_edf if path.lower().endswith(".edf") else read_wfdb)(path))


def two_leads(signals: Signals) -> tuple[np.ndarray, float, list[str]]:
    """Return two leads in mV, (samples, 2) in choose_leads' order, their sampling rate (Hz) and their names.

    Leads with several samples a frame come at their own rate; of two rates, at the highest that divides both. Of leads
    with the same name, the one with more upright QRS complexes is first. Raises Unsuited.
    """
    from scipy.stats import skew

    names, units, per_frame, hz, load = signals
    ecg = ecg_signals(names, units)
    if len(ecg) < 2:
        listed = ", ".join(f"{name or 'unnamed'} in {unit or 'no unit'}" for name, unit in zip(names, units))
        raise Unsuited(f"has {len(ecg)} ECG signals ({listed}); two are needed")
    chosen = [ecg[k] for k in choose_leads([names[k] for k in ecg])]
    names, units, per_frame = ([table[k] for k in chosen] for table in (names, units, per_frame))
    times = np.gcd(*per_frame)
    fs = hz * int(times)
    if not MIN_FS_HZ <= fs < np.inf:
        raise Unsuited(f"is sampled at {fs} Hz; at least {MIN_FS_HZ:.0f} Hz are needed")
    leads = [x.reshape(-1, k // times).mean(axis=1) for x, k in zip(load(chosen), per_frame)]
    leads = np.column_stack(leads) * [MILLIVOLTS[unit.lower()] for unit in units]
    if lead_name(names[0]) == lead_name(names[1]):
        upright = [skew(x, nan_policy="omit") for x in leads.T]
        if upright[0] < upright[1]:
            return leads[:, ::-1], fs, names[::-1]
    return leads, fs, names


def read_annotations(path: str, fs: float, annotator: str = "atr") -> tuple[pd.DataFrame, int]:
    """Return time (samples at fs Hz), symbol and subtype of each annotation, by time, and how many were out of order.

    annotator: the ending of the file. Its clock is the time resolution it states, else the header's frames a second.
    """
    import wfdb

    content = Path(f"{path}.{annotator}").read_bytes()
    if content[-2:] != b"\0\0":  # WFDB annot(5): A = I = 0 is the end of the file
        raise ValueError(f"its .{annotator} lacks its end")
    notes = DEFINITIONS.sub(b"|", content)
    if notes.count(b"## ") > min(len(RESOLUTION.findall(notes)), 1):  # wfdb 4.1.2 would try to read them for ever
        raise ValueError(f"its .{annotator} has notes of a program that wfdb does not know")
    annotation = wfdb.rdann(path, annotator)
    if not (annotation.fs and annotation.fs > 0):
        raise ValueError(f"its .{annotator} has no clock")
    time = np.rint(annotation.sample * float(fs) / annotation.fs)
    table = pd.DataFrame({"time": time, "symbol": annotation.symbol, "subtype": annotation.subtype})
    return table.sort_values("time", kind="stable", ignore_index=True), int((np.diff(time) < 0).sum())
