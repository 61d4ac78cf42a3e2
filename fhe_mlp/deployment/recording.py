"""The client's recordings: two leads and R peaks of a WFDB record, an EDF file or a .csv file, to features of beats."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import csvfiles
import ecg_features
import numpy as np
import records
from cli import InputError, first_line

DETECTOR = "gqrs"  # --annotator that stands for wfdb's detector of R peaks
PEAK_S, PEAK_BAND_HZ = (-0.05, 0.09), (5.0, 25.0)  # around its marks; where QRS complexes are strongest
PACED = "/f"  # WFDB codes of paced beats, and of fusions with them


def find(path: Path, fs: float | None) -> Path | None:
    """The recording at `path`: a .csv file when fs is given, an .edf file, or a WFDB record; None for anything else.

    WFDB records are given with or without .hea or .dat, and returned without.
    """
    if fs is not None or (path.suffix.lower() == ".edf" and path.is_file()):
        return path
    name = path.with_suffix("") if path.suffix in (".hea", ".dat") else path
    return name if Path(f"{name}.hea").is_file() else None


def stem(path: Path, fs: float | None) -> Path:
    """A recording's path without ending, which its annotation files share."""
    return path.with_suffix("") if fs is not None or path.suffix.lower() == ".edf" else path


def read_signal(path: Path, fs: float | None) -> tuple[np.ndarray, float, list[str]]:
    """Two leads in mV (samples, 2), sampling rate (Hz) and lead names of what `find` found. Raises InputError."""
    try:
        if fs is None:
            return records.read_signal(str(path))
        records.check_rate(fs)
        signal, leads = csvfiles.read_leads(path)
        return signal, fs, leads
    except records.Unsuited as error:
        raise InputError(f"{path}: {error}") from None
    except (InputError, FileNotFoundError):
        raise
    except Exception as error:  # wfdb and soundfile raise a dozen unrelated types on damaged files
        raise InputError(f"{path}: cannot be read as a recording ({first_line(error)})") from None


def find_peaks(signal: np.ndarray, fs: float) -> np.ndarray:
    """Samples of the R peaks that wfdb's GQRS finds in channel 0 (mV). Raises ValueError for a flat or missing lead.

    GQRS marks narrow complexes 33 ms early and wide ones late, annotators their largest deflection, which is sought.
    """
    from wfdb.processing import gqrs_detect

    x = ecg_features.fill_missing(signal)[0][:, 0]
    peaks = np.asarray(gqrs_detect(x, fs), dtype=int)
    before, after = (round(seconds * fs) for seconds in PEAK_S)
    inside = (peaks + before >= 0) & (peaks + after < len(x))
    size = np.abs(ecg_features.band_pass(x[:, None], PEAK_BAND_HZ, fs)[:, 0])
    peaks[inside] = ecg_features.find_extremum(size, peaks[inside], PEAK_S, fs, np.argmax)
    return np.unique(peaks)


def read_beats(
    path: Path, fs: float | None, annotator: str | None, minutes: float | None, model: dict[str, Any]
) -> tuple[np.ndarray, dict[str, Any]]:
    """Raw features (m, 32) of a recording's beats, and what decrypt has to know of all its beats.

    fs: of a .csv file; annotator: the ending of the annotation file whose beats are taken, DETECTOR to have them found,
    or None for .atr where there is one, else the detector; minutes: how much of the recording is taken, None for all.
    Warns on stderr of leads and beats that the network was not trained on. Raises InputError.
    """
    ours, wanted = ([(f["name"], f["formula"]) for f in table] for table in (ecg_features.FEATURES, model["features"]))
    if ours != wanted:
        raise InputError(f"{path}: this model does not take the features of records; give a .csv file of its features")
    signal, fs_signal, leads = read_signal(path, fs)
    signal = signal[: None if minutes is None else max(1, round(min(minutes * 60 * fs_signal, len(signal))))]
    annotator = annotator or ("atr" if Path(f"{stem(path, fs)}.atr").exists() else DETECTOR)
    breaks, outside = [], 0
    try:
        if annotator == DETECTOR:
            beats = find_peaks(signal, fs_signal)
        else:
            annotations, _ = records.read_annotations(str(stem(path, fs)), fs_signal, annotator)
            if minutes is not None:
                annotations = annotations[annotations["time"] < len(signal)]
            table, outside = records.find_beats(annotations, len(signal))
            beats, breaks = table["time"].to_numpy(int), records.find_breaks(annotations)
            if paced := int(table["symbol"].isin(list(PACED)).sum()):
                what = f"{paced} paced beats, on which EC57 does not judge; their decisions mean little"
                print(f"warning: {path} has {what}", file=sys.stderr)
        X, index, dropped = ecg_features.beat_features(signal, fs_signal, beats, breaks)
    except (records.Unsuited, ValueError) as error:
        raise InputError(f"{path} ({annotator}): {error}; no beat can be classified") from None
    except FileNotFoundError:
        raise
    except Exception as error:  # of damaged annotation files
        raise InputError(f"{path}: its .{annotator} cannot be read ({first_line(error)})") from None
    if model.get("leads") and not records.are_expected(leads, model["leads"]):
        wanted = " and ".join(" or ".join(names) for names in model["leads"].values())
        got = " and ".join(name or "an unnamed one" for name in leads)
        print(f"warning: {path} has the leads {got}; the model was trained on {wanted}", file=sys.stderr)
    samples = beats[ecg_features.single_beats(beats, fs_signal)]
    reasons = {reason: n for reason, n in {**dropped, "outside the signal": outside}.items() if n}
    origin = f"found by the detector {DETECTOR}" if annotator == DETECTOR else f"of {stem(path, fs).name}.{annotator}"
    found = {"record": stem(path, fs).name, "path": str(path.resolve()), "table_fs": fs, "origin": origin}
    found |= {"annotations": "" if annotator == DETECTOR else f"{stem(path, fs).resolve()}.{annotator}"}
    found |= {"fs": fs_signal, "leads": leads, "not_classified": reasons}
    return X.astype(float), found | {"samples": samples.tolist(), "classified": np.isin(samples, beats[index]).tolist()}
