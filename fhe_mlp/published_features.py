"""One record's two leads and beats to the 32 columns of the published arrays: raw values in mV and seconds."""

from __future__ import annotations

from typing import Any

import numpy as np

from fhe_mlp.ecg_features import BAND_HZ, band_pass, fill_missing, find_extremum, single_beats, usable_beats

# The published arrays: the same 16 columns for channel 0, then channel 1.
_PUBLISHED = [
    ("pre_RR", "s", "R[i] - R[i-1], of the annotations"),
    ("post_RR", "s", "R[i+1] - R[i], of the annotations"),
    ("P_peak", "mV", "max of the band-passed lead in P_WINDOW"),
    ("T_peak", "mV", "max in T_WINDOW"),
    ("R_peak", "mV", "max in R_WINDOW"),
    ("S_peak", "mV", "min in S_WINDOW after the R peak"),
    ("Q_peak", "mV", "min in Q_WINDOW before the R peak"),
    ("QRS_interval", "s", "time from Q peak to S peak"),
    ("PQ_interval", "s", "time from P peak to Q peak"),
    ("QT_interval", "s", "time from Q peak to T peak"),
    ("ST_interval", "s", "time from S peak to T peak"),
    *((f"QRS_morph_{k}", "mV", f"sample {k} of five spread evenly from Q peak to S peak") for k in range(5)),
]
PUBLISHED = [
    {"name": f"ch{channel}_{name}", "unit": unit, "formula": formula, "source": "published arrays"}
    for channel in (0, 1)
    for name, unit, formula in _PUBLISHED
]
# Search windows of the published set in seconds; P, R and T around the annotated beat, Q and S around the R peak.
R_WINDOW, Q_WINDOW, S_WINDOW = (-0.05, 0.05), (-0.10, 0.0), (0.0, 0.12)
P_WINDOW, T_WINDOW = (-0.28, -0.08), (0.14, 0.45)


def published_features(
    signal: np.ndarray, fs: float, beats: np.ndarray, breaks: Any = ()
) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """The features of PUBLISHED, raw values of a signal in mV; arguments, result and errors as beat_features.

    The RR intervals are those of the annotations, whatever lies in them, as in the published arrays.
    """
    order = single_beats(beats, fs)
    repeated, beats = len(beats) - len(order), np.asarray(beats, dtype=np.int64)[order]
    filled, missing = fill_missing(signal)
    before = -round(min(P_WINDOW[0], R_WINDOW[0] + Q_WINDOW[0]) * fs)
    index, dropped = usable_beats(filled, missing, beats, breaks, before, round(T_WINDOW[1] * fs))
    dropped["annotated twice"] = repeated
    at, rr = beats[index], np.diff(beats) / fs
    columns = []
    for x in band_pass(filled, BAND_HZ, fs).T:
        r = find_extremum(x, at, R_WINDOW, fs, np.argmax)
        q = find_extremum(x, r, Q_WINDOW, fs, np.argmin)
        s = find_extremum(x, r, S_WINDOW, fs, np.argmin)
        p = find_extremum(x, at, P_WINDOW, fs, np.argmax)
        t = find_extremum(x, at, T_WINDOW, fs, np.argmax)
        spread = np.rint(q[:, None] + (s - q)[:, None] * np.linspace(0, 1, 5)).astype(int)
        columns += [rr[index - 1], rr[index], *x[[p, t, r, s, q]], *np.stack([s - q, q - p, t - q, t - s]) / fs]
        columns += [*x[spread].T]
    X = np.column_stack(columns).astype(np.float32)
    if not np.isfinite(X).all():
        raise ValueError("has amplitudes that are no voltages")
    return X, order[index], dropped
