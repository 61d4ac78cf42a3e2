"""How well detectors of R peaks find the beats of the MIT-BIH records, by lead and library (docs/RESULTS.md).

    pip install --no-deps --target detectors sleepecg==0.5.9 neurokit2==0.2.12 pywavelets==1.9.0 biosppy==2.2.4 \\
        peakutils==1.3.5 bidict==0.24.1 shortuuid==1.0.13 mock==5.2.0 six==1.17.0 py-ecg-detectors==1.3.5 gatspy==0.3 \\
        astroml==1.0.2.post1 pathlib2==2.3.7.post1
    MITDB_DIR=data/mitdb PYTHONPATH=detectors python tests/detectors.py

A library that is not there is left out. Each detector sees one lead of a whole record. A beat of the .atr is found if a
detection lies within 150 ms (wfdb.processing.compare_annotations); detections in flutter of record 207 are not counted.
Gross figures are over all beats, mean ones over records.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from fhe_mlp import ecg_features, records  # noqa: E402

MITDB = Path(os.environ.get("MITDB_DIR", ROOT / "data" / "mitdb"))
WINDOW_S = 0.15  # EC57's match window
# Methods of the libraries, but for those that another one has too or that need a further library.
NEUROKIT = "neurokit pantompkins gamboa2008 zong2003 hamilton2002 christov2004 engzeemod2012 elgendi2010 kalidas2017"
OWN_CLEANING = "nabian2018 rodrigues2021 manikandan2012 martinez2004"  # of neurokit2, which has none for them
ECGDETECTORS = "pan_tompkins swt"
BIOSPPY = "hamilton gamboa ASI Pan_Tompkins_Plus_Plus"
BOTH_LEADS = ("wfdb XQRS", "wfdb GQRS", "sleepecg", "neurokit2 neurokit")  # the others see ch0 only


def xqrs(x: np.ndarray, fs: float) -> np.ndarray:
    """wfdb's XQRS."""
    from wfdb.processing import XQRS

    detector = XQRS(x, fs)
    detector.detect(verbose=False)
    return detector.qrs_inds


def gqrs(x: np.ndarray, fs: float) -> np.ndarray:
    """wfdb's GQRS."""
    from wfdb.processing import gqrs_detect

    return gqrs_detect(x, fs)


def sleepecg(x: np.ndarray, fs: float) -> np.ndarray:
    """sleepecg's variant of Pan and Tompkins' detector."""
    from sleepecg import detect_heartbeats

    return detect_heartbeats(x, fs)


def neurokit(x: np.ndarray, fs: float, method: str) -> np.ndarray:
    """One of neurokit2's, with the cleaning that belongs to it, else neurokit2's own."""
    import neurokit2

    cleaning = "neurokit" if method in OWN_CLEANING else method
    cleaned = neurokit2.ecg_clean(x, sampling_rate=int(fs), method=cleaning)
    return neurokit2.ecg_peaks(cleaned, sampling_rate=int(fs), method=method)[1]["ECG_R_Peaks"]


def ecgdetectors(x: np.ndarray, fs: float, method: str) -> np.ndarray:
    """One of py-ecg-detectors'."""
    from ecgdetectors import Detectors

    return getattr(Detectors(fs), f"{method}_detector")(x)


def biosppy(x: np.ndarray, fs: float, method: str) -> np.ndarray:
    """One of biosppy's, with the band and the correction of its own ecg()."""
    from biosppy.signals import ecg, tools

    order = int(1.5 * fs)
    filtered, _, _ = tools.filter_signal(x, "FIR", "bandpass", order, [0.67, 45], fs)
    (peaks,) = getattr(ecg, f"{method}_segmenter")(signal=filtered, sampling_rate=fs)
    return ecg.correct_rpeaks(signal=filtered, rpeaks=peaks, sampling_rate=fs, tol=0.05)[0]


def all_detectors() -> dict[str, Callable[[np.ndarray, float], np.ndarray]]:
    """Each detector whose library is installed, by name."""
    found = {"wfdb XQRS": xqrs, "wfdb GQRS": gqrs}
    if importlib.util.find_spec("sleepecg"):
        found["sleepecg"] = sleepecg
    for library, detect, methods in (
        ("neurokit2", neurokit, f"{NEUROKIT} {OWN_CLEANING}"),
        ("ecgdetectors", ecgdetectors, ECGDETECTORS),
        ("biosppy", biosppy, BIOSPPY),
    ):
        if importlib.util.find_spec(library):
            found |= {f"{library} {method}": partial(detect, method=method) for method in methods.split()}
    return found


def measure(path: str) -> pd.DataFrame:
    """Of one record: beats, V beats, found ones, detections and seconds of each detector on each lead."""
    from wfdb.processing import compare_annotations

    signal, fs, _ = records.read_signal(path)
    annotations, _ = records.read_annotations(path, fs)
    beats, breaks = records.find_beats(annotations, len(signal))[0], records.find_breaks(annotations)
    ventricular = beats["symbol"].map(records.CLASS_OF_SYMBOL).to_numpy() == "V"
    at, rows = beats["time"].to_numpy(int), []
    for name, detect in all_detectors().items():
        for lead, x in enumerate(signal.T if name in BOTH_LEADS else signal.T[:1]):
            started = time.monotonic()
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                try:
                    peaks = np.unique(np.asarray(detect(x, fs), dtype=float))
                except Exception:  # many fail on some record; whatever is not detected is missed
                    peaks = np.empty(0)
            peaks = peaks[~ecg_features.overlap(peaks, peaks, breaks)]
            found = np.zeros(len(at), bool)
            if len(peaks):
                match = compare_annotations(at, peaks.astype(int), int(WINDOW_S * fs))
                found[match.matched_ref_inds] = True
            row = {"record": Path(path).name, "detector": name, "lead": lead, "beats": len(at), "found": found.sum()}
            row |= {"detections": len(peaks), "v": ventricular.sum(), "v_found": found[ventricular].sum()}
            rows.append({**row, "seconds": time.monotonic() - started})
    return pd.DataFrame(rows)


def main() -> None:
    """Measure all detectors on all records and print the table, the best first."""
    paths = sorted(str(path.with_suffix("")) for path in MITDB.glob("[0-9]*.hea"))
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        table = pd.concat(tqdm(pool.map(measure, paths), total=len(paths), unit="record"))
    table["sensitivity"], table["ppv"] = table["found"] / table["beats"], table["found"] / table["detections"].clip(1)
    groups = table.groupby(["detector", "lead"])
    total, mean = groups.sum(numeric_only=True), groups[["sensitivity", "ppv"]].mean()
    shown = pd.DataFrame(
        {
            "sensitivity": total["found"] / total["beats"],
            "PPV": total["found"] / total["detections"].clip(1),
            "mean sensitivity": mean["sensitivity"],
            "mean PPV": mean["ppv"],
            "V beats found": total["v_found"] / total["v"],
            "least sensitivity of a record": groups["sensitivity"].min(),
        }
    ).sort_values("sensitivity", ascending=False)
    print(f"{len(paths)} records, {total['beats'].iloc[0]} beats, {total['v'].iloc[0]} of them V; in percent:")
    shown = (100 * shown).round(2)
    shown["seconds an hour"] = (total["seconds"] / len(paths) * 2).round(1)
    print(shown.to_string())


if __name__ == "__main__":
    main()
