"""Records, WFDB or EDF, from many programs: their two leads and annotations.

Every file is checked before it is read: a header that claims too much would fill the memory.
"""

from __future__ import annotations

import os
import re
import tempfile
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from fhe_mlp.ecg.beats import Unsuited
from fhe_mlp.ecg.features import MIN_FS_HZ

# From the lead most like MLII (upright QRS) to the one most like V1; leads of other names stand between them.
LEADS = "II V5 V6 V4 I AVF III AVL ? V3 AVR V2 V1".split()
EXPECTED_LEADS = {"ch0": ["MLII"], "ch1": ["V1", "V2", "V4", "V5"]}  # of MIT-BIH, but for its records 102 and 104

# Names of ECG leads, as lead_name writes them, besides LEADS and those with the letters ECG: Frank's, bipolar chest
# leads, right and posterior ones, EASI's, and names that say nothing.
ECG_NAME = re.compile(
    r"(MOD|LEAD|ML|MV|MCL|C[MSCRB]|D|V|CH|CHAN|CHANNEL|SIG|SIGNAL)*\d{0,2}|(V\d){2}|V\dR|V?[XYZ]|[EA]S|AI|IV"
)
MILLIVOLTS = {"nv": 1e-6, "uv": 1e-3, "mv": 1.0, "v": 1e3}  # of the units of voltage that a lead may have
SPAN_S, SPAN_MV = 2.0, (0.01, 20.0)  # from trough to peak of a lead in that time: QRS complexes have 0.1 to 5 mV
HEADER_BYTES = 1_000_000  # no header is longer
SAMPLES_PER_BYTE, SPARE_SAMPLES = 16, 10_000_000  # that a header may claim: of compressed files; of gaps in segments

# Notes of an .atr that wfdb understands, each after its length and code.
RESOLUTION = re.compile(rb"[\x15-\xff]\xfc## time resolution: \d")
DEFINITIONS = re.compile(rb"\x1e\xfc## annotation type definitions.*?\x15\xfc## end of definitions", re.DOTALL)


class Signals(NamedTuple):
    """Header of a file; the first four fields have an item for each signal."""

    names: Sequence[str | None]
    units: Sequence[str]
    per_frame: Sequence[int]  # samples a frame
    gains: Sequence[float | None]  # A/D units per unit; None where numbers are as written
    hz: float  # frames a second
    load: Callable[[list[int]], Sequence[np.ndarray]]  # positions of signals to their samples in their units


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


def is_ecg(name: str) -> bool:
    """Whether a signal with this name can be an ECG lead: a breath or a snore beside one is none."""
    from wfdb.io.record import SIGNAL_CLASSES

    other = set(SIGNAL_CLASSES.drop(["ecg", "unknown"])["signal_names"].sum())
    if other & set(re.findall("[a-z]+", name.lower())):
        return False
    lead = lead_name(name)
    return lead in LEADS or bool(re.search("ECG|EKG", name.upper()) or ECG_NAME.fullmatch(lead))


def plain_unit(unit: str) -> str:
    """A unit in small letters, with u for whichever micro sign it is written with."""
    return unicodedata.normalize("NFKC", unit).replace("\u03bc", "u").lower()


def printable(name: str | None) -> str:
    """A name without characters that would break a line."""
    return "".join(filter(str.isprintable, name or "")).strip()


def decode(content: bytes) -> str:
    """Text in UTF-8 or else Latin-1, of which headers name neither."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content.decode("latin-1")


def read_edf(path: str) -> Signals:
    """Read the header of an EDF or EDF+ file (edfplus.info). Raises ValueError for a damaged file."""
    size = Path(path).stat().st_size
    with Path(path).open("rb") as file:
        start = file.read(256)
        if start[:8].strip() != b"0" or len(start) < 256:
            raise ValueError("is no EDF file")
        count = int(start[252:256])
        if not 0 < count <= 9999 or len(fields := file.read(256 * count)) < 256 * count:
            raise ValueError("has a truncated header")

    def column(offset: int, width: int) -> list[str]:
        """One field of all signals; `offset` and `width` in bytes of a signal."""
        cells = (fields[start : start + width] for start in range(offset * count, (offset + width) * count, width))
        return [printable(decode(cell)) for cell in cells]

    names, per_frame, data = column(0, 16), [int(n) for n in column(216, 8)], 256 * (count + 1)
    frames, seconds, width = int(start[236:244]), float(start[244:252]), sum(per_frame)
    if min(per_frame) < 1 or not 0 < seconds < np.inf:
        raise ValueError("has a header without a sampling rate")
    held = (size - data) // (2 * width)
    frames = held if frames == -1 else frames
    if not 0 < frames <= held:
        raise ValueError("holds fewer samples than its header says")
    samples = np.hsplit(np.memmap(path, "<i2", "r", data, (frames, width)), np.cumsum(per_frame))
    if start[192:197] == b"EDF+D":  # each frame begins with its time; "D" says that they may be apart
        times = [samples[k] for k, name in enumerate(names) if name == "EDF Annotations"][:1]
        starts = [re.match(rb"([+-]\d+(?:\.\d+)?)\x14", row.tobytes()) for rows in times for row in rows]
        if not starts or not all(starts):
            raise ValueError("does not say when its frames begin, which may be apart (EDF+D)")
        at = [float(time[1]) for time in starts]
        if np.abs(np.array(at) - at[0] - seconds * np.arange(frames)).max() > 0.5 * seconds / max(per_frame):
            raise Unsuited("is an EDF+ file with interruptions, which are not supported; convert it to WFDB")
    ends = (pd.to_numeric(column(offset, 8), errors="coerce") for offset in (104, 112, 120, 128))
    low, high, least, most = (end.astype(float) for end in ends)
    with np.errstate(all="ignore"):
        gains = (most - least) / (high - low)

    def load(chosen: list[int]) -> list[np.ndarray]:
        if not (np.isfinite(gains[chosen]) & (most[chosen] > least[chosen])).all():
            raise ValueError("has a header without a scale")
        return [(samples[k].ravel() - least[k]) / gains[k] + low[k] for k in chosen]

    return Signals(names, column(96, 8), per_frame, gains, 1 / seconds, load)


def beside(path: str, ending: str) -> Path:
    """Path of a record's file, whose ending is in capitals where only that is there, as on old disks."""
    usual, capital = Path(f"{path}.{ending}"), Path(f"{path}.{ending.upper()}")
    return capital if capital.exists() and not usual.exists() else usual


def link_record(path: str, folder: Path, name: str = "record", part: bool = False) -> str:
    """Make the WFDB record at `path` readable in another folder as `name`; return its new path.

    Its signals are links. Its header has no more than wfdb 4.1.2 reads right: without date and comments, which can stop
    it, and in ASCII, of which it drops the rest, so that a microvolt would be a volt. part: a segment of a record.
    """
    header = beside(path, "hea")
    if header.stat().st_size > HEADER_BYTES:
        raise ValueError("its .hea is longer than any header")
    lines = [line.split(None, 1) for line in header.read_bytes().splitlines() if line.strip()[:1] not in (b"", b"#")]
    if not lines or len(lines[0]) < 2:
        raise ValueError("its .hea has no record line")
    first, slash, segments = lines[0][0].partition(b"/")
    if slash and part:
        raise ValueError("its segments have segments")
    links = {
        file: f"{name}_{k}" for k, file in enumerate(dict.fromkeys(file for file, *_ in lines[1:] if file != b"~"))
    }
    for file, link in links.items():
        source = header.with_name(os.fsdecode(file))
        if slash:
            link_record(str(source), folder, link, part=True)
            continue
        if not source.exists():  # in other capitals?
            source = next((p for p in header.parent.iterdir() if p.name.lower() == source.name.lower()), source)
        if not source.exists():
            raise ValueError(f"its file {source.name} is missing")
        Path(folder, link).symlink_to(source.absolute())
    text = [[name.encode() + slash + segments, *lines[0][1].split()[:3]]]
    text += [[links.get(file, "~").encode(), *rest] for file, *rest in lines[1:]]
    plain = unicodedata.normalize("NFKC", decode(b"\n".join(b" ".join(fields) for fields in text)))
    Path(folder, f"{name}.hea").write_text(plain.replace("\u03bc", "u") + "\n", "ascii", "ignore")
    return str(folder / name)


def read_wfdb(path: str) -> Signals:
    """Read the header of a WFDB record of link_record. Raises what wfdb raises on a damaged file."""
    import wfdb

    header = wfdb.rdheader(path, rd_segments=True)
    segments = [s for s in getattr(header, "segments", [header]) if s is not None]
    if not header.n_sig:
        raise Unsuited("has no signals")
    check_claims(Path(path).parent, header, segments)

    def load(chosen: list[int]) -> list[np.ndarray]:
        with np.errstate(all="ignore"):  # absurd gains of damaged headers end as missing signal
            return wfdb.rdrecord(path, channels=chosen, smooth_frames=False).e_p_signal

    first = segments[0]
    per_frame = [k or 1 for k in first.samps_per_frame]
    return Signals(first.sig_name, first.units, per_frame, first.adc_gain, header.fs, load)


def read_signal(path: str) -> tuple[np.ndarray, float, list[str]]:
    """Return what two_leads returns of a WFDB record (path without ending) or of an .edf file.

    Raises Unsuited, or what wfdb raises on a damaged file.
    """
    if path.lower().endswith(".edf"):
        return two_leads(read_edf(path))
    with tempfile.TemporaryDirectory() as folder:
        return two_leads(read_wfdb(link_record(path, Path(folder))))


def two_leads(signals: Signals) -> tuple[np.ndarray, float, list[str]]:
    """Return two leads in mV, (samples, 2) in choose_leads' order, their sampling rate (Hz) and their names.

    Leads with several samples a frame come at their own rate; of two rates, at the highest that divides both. Of leads
    with the same name, the one with more upright QRS complexes is first. Raises Unsuited.
    """
    from scipy.stats import skew

    names = [printable(name) for name in signals.names]
    ecg = [k for k, unit in enumerate(signals.units) if plain_unit(unit) in MILLIVOLTS and is_ecg(names[k])]
    if len(ecg) < 2:
        listed = (f"{n or 'unnamed'} in {printable(unit) or 'no unit'}" for n, unit in zip(names, signals.units))
        raise Unsuited(f"has {len(ecg)} ECG signals ({', '.join(listed)}); two are needed")
    chosen = [ecg[k] for k in choose_leads([names[k] for k in ecg])]
    names, units, per_frame, gains = ([table[k] for k in chosen] for table in (names, *signals[1:4]))
    times = np.gcd(*per_frame)
    fs = signals.hz * int(times)
    if not MIN_FS_HZ <= fs < np.inf:
        raise Unsuited(f"is sampled at {fs} Hz; at least {MIN_FS_HZ:.0f} Hz are needed")
    leads = [x.reshape(-1, k // times).mean(axis=1) for x, k in zip(signals.load(chosen), per_frame)]
    leads = np.column_stack(leads) * [MILLIVOLTS[plain_unit(unit)] for unit in units]
    for x, *lead in zip(leads.T, names, units, gains):
        check_size(x, fs, *lead)
    if lead_name(names[0]) == lead_name(names[1]):
        upright = [skew(x, nan_policy="omit") for x in leads.T]
        if upright[0] < upright[1]:
            return leads[:, ::-1], fs, names[::-1]
    return leads, fs, names


def check_size(x: np.ndarray, fs: float, name: str, unit: str, gain: float | None) -> None:
    """Raise Unsuited where a lead x (mV), at times that it is not flat, is smaller or larger than an ECG can be."""
    x = x[np.isfinite(x)]
    width = max(1, min(round(SPAN_S * fs), len(x)))
    spans = np.ptp(x[: len(x) // width * width].reshape(-1, width), axis=1)
    large, usual = np.quantile(spans[spans > 0], (0.9, 0.5)) if spans.any() else SPAN_MV
    if large < SPAN_MV[0] or usual > SPAN_MV[1]:
        lead = f"{name or 'unnamed'} ({unit}, {f'gain {gain:g} per {unit}' if gain else 'no gain'})"
        size = f"spans {usual:.3g} mV in {SPAN_S:g} s, an ECG {SPAN_MV[0]:g} to {SPAN_MV[1]:g}"
        raise Unsuited(f"has a wrong unit or gain: its lead {lead} {size}")


def read_annotations(path: str, fs: float, annotator: str = "atr") -> tuple[pd.DataFrame, int]:
    """Return time (samples at fs Hz), symbol and subtype of each annotation, by time, and how many were out of order.

    annotator: the ending of the file. Its clock is the time resolution it states, else the frames a second of the
    record's header; an EDF or .csv file has none, and its annotations count samples at fs.
    """
    import wfdb

    content = beside(path, annotator).read_bytes()
    if content[-2:] != b"\0\0":  # WFDB annot(5): A = I = 0 is the end of the file
        raise ValueError(f"its .{annotator} lacks its end")
    notes = DEFINITIONS.sub(b"|", content)
    if notes.count(b"## ") > min(len(RESOLUTION.findall(notes)), 1):  # wfdb 4.1.2 would try to read them for ever
        raise ValueError(f"its .{annotator} has notes of a program that wfdb does not know")
    with tempfile.TemporaryDirectory() as folder:
        if header := beside(path, "hea").exists():
            link_record(path, Path(folder))
        Path(folder, "record.beats").write_bytes(content)
        annotation = wfdb.rdann(f"{folder}/record", "beats")
    clock = annotation.fs if header else annotation.fs or fs
    if not (clock and clock > 0):
        raise ValueError(f"its .{annotator} has no clock")
    time = np.rint(annotation.sample * float(fs) / clock)
    table = pd.DataFrame({"time": time, "symbol": annotation.symbol, "subtype": annotation.subtype})
    return table.sort_values("time", kind="stable", ignore_index=True), int((np.diff(time) < 0).sum())
