"""One record's signal and beats to 32 features a beat (16 a lead); numpy and scipy only.

Nothing here depends on labels: features come from the signal and the positions of the beats.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

BAND_HZ = (0.5, 40.0)  # baseline wander below, muscle and mains noise above
MIN_FS_HZ = 100.0  # the band's upper edge needs more than 80 Hz
# Search windows in seconds; P, R, T and the QRS complex around the annotated beat, Q and S around the R peak.
R_WINDOW, Q_WINDOW, S_WINDOW = (-0.05, 0.05), (-0.10, 0.0), (0.0, 0.12)
P_WINDOW, T_WINDOW, QRS_WINDOW = (-0.28, -0.08), (0.14, 0.45), (-0.12, 0.18)
MORPHOLOGY_S = (-0.06, -0.03, 0.03, 0.06, 0.09)  # where the five QRS samples are taken
RR_HISTORY = 10  # intervals whose mean is the rhythm that a beat is compared with

# Name, unit and formula; x is the band-passed lead, RR10 the mean of the last ten RR intervals up to the beat,
# A the record's median peak-to-peak amplitude of x in QRS_WINDOW ("1" marks quantities relative to the patient).
_RHYTHM = [
    ("pre_RR", "1", "R[i] - R[i-1], over RR10"),
    ("post_RR", "1", "R[i+1] - R[i], over RR10"),
]
_CONTEXT = [  # in place of the two RR columns that the published arrays repeat for their second channel
    ("mean_RR", "s", "RR10 itself: the patient's rhythm"),
    ("template_corr", "1", "correlation of the QRS complex with the record's median one, mean of both leads"),
]
_LEAD = [
    ("P_peak", "1", "max of x in P_WINDOW, over A"),
    ("T_peak", "1", "max of x in T_WINDOW, over A"),
    ("R_peak", "1", "max of x in R_WINDOW, over A"),
    ("S_peak", "1", "min of x in S_WINDOW after the R peak, over A"),
    ("Q_peak", "1", "min of x in Q_WINDOW before the R peak, over A"),
    ("QRS_interval", "s", "time from Q peak to S peak"),
    ("PQ_interval", "s", "time from P peak to Q peak"),
    ("QT_interval", "s", "time from Q peak to T peak"),
    ("ST_interval", "s", "time from S peak to T peak"),
    *(
        (f"QRS_morph_{k}", "1", f"x at {t * 1000:+.0f} ms from the annotation, over A")
        for k, t in enumerate(MORPHOLOGY_S)
    ),
]
FEATURES = [
    {"name": f"ch{channel}_{name}", "unit": unit, "formula": formula}
    for channel, first in enumerate((_RHYTHM, _CONTEXT))
    for name, unit, formula in (*first, *_LEAD)
]


def find_extremum(
    x: np.ndarray, centre: np.ndarray, window: tuple[float, float], fs: float, pick: Callable
) -> np.ndarray:
    """Sample index (n,) of the extremum `pick` (np.argmax, np.argmin) of x in a window (s) around each centre."""
    offsets = np.arange(round(window[0] * fs), round(window[1] * fs) + 1)
    return centre + offsets[pick(x[centre[:, None] + offsets], axis=1)]


def lead_features(x: np.ndarray, beats: np.ndarray, fs: float) -> tuple[np.ndarray, np.ndarray]:
    """Features of one lead: (n, 14) in the order of _LEAD, and (n,) correlation with the median QRS complex.

    x: band-passed lead in mV, (samples,); beats: annotated samples (n,). Raises ValueError for a flat lead.
    """
    r = find_extremum(x, beats, R_WINDOW, fs, np.argmax)
    q = find_extremum(x, r, Q_WINDOW, fs, np.argmin)
    s = find_extremum(x, r, S_WINDOW, fs, np.argmin)
    p = find_extremum(x, beats, P_WINDOW, fs, np.argmax)
    t = find_extremum(x, beats, T_WINDOW, fs, np.argmax)
    complexes = x[beats[:, None] + np.arange(round(QRS_WINDOW[0] * fs), round(QRS_WINDOW[1] * fs) + 1)]
    amplitude = np.median(np.ptp(complexes, axis=1))
    template = np.median(complexes, axis=0)
    template -= template.mean()
    complexes = complexes - complexes.mean(axis=1, keepdims=True)
    norms = np.sqrt(np.sum(complexes**2, axis=1) * np.sum(template**2))
    if not amplitude > 0 or not np.all(norms > 0):
        raise ValueError("has a flat signal")
    morphology = x[beats[:, None] + np.rint(np.array(MORPHOLOGY_S) * fs).astype(int)]
    peaks = np.column_stack([x[p], x[t], x[r], x[s], x[q]])
    intervals = np.column_stack([s - q, q - p, t - q, t - s]) / fs
    return np.hstack([peaks / amplitude, intervals, morphology / amplitude]), (complexes * template).sum(axis=1) / norms


def beat_features(signal: np.ndarray, fs: float, beats: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """All features of a record's usable beats.

    signal: two leads in mV, (samples, 2), NaN where missing; fs in Hz; beats: annotated samples (n,), rising.
    Returns features (m, 32) float32, the indices (m,) of the usable beats, and the dropped ones counted by reason.
    Raises ValueError when the record cannot be used at all.
    """
    from scipy.signal import butter, sosfiltfilt

    if len(beats) < 3:
        raise ValueError("has fewer than three beat annotations")
    before, after = round(min(P_WINDOW[0], R_WINDOW[0] + Q_WINDOW[0]) * fs), round(T_WINDOW[1] * fs)
    missing = ~np.isfinite(signal)
    if missing.all(axis=0).any():
        raise ValueError("has a missing signal")
    samples = np.arange(len(signal))
    filled = np.column_stack([np.interp(samples, samples[~m], x[~m]) for x, m in zip(signal.T, missing.T)])
    if (np.ptp(filled, axis=0) == 0).any():
        raise ValueError("has a flat signal")

    rr = np.diff(beats) / fs
    index = np.arange(1, len(beats) - 1)
    dropped = {"first or last beat": 2}
    apart = (rr[index - 1] > 0) & (rr[index] > 0)
    dropped["annotated twice or out of order"] = int((~apart).sum())
    index = index[apart]
    inside = (beats[index] + before >= 0) & (beats[index] + after < len(signal))
    dropped["window leaves the record"] = int((~inside).sum())
    index = index[inside]
    windows = beats[index, None] + np.arange(before, after + 1)
    whole = np.ones(len(index), bool)
    for x, m in zip(filled.T, missing.T):
        whole &= ~m[windows].any(axis=1) & (np.ptp(x[windows], axis=1) > 0)
    dropped["signal missing or flat"] = int((~whole).sum())
    index = index[whole]
    if not len(index):
        raise ValueError("has no usable beat")

    elapsed = np.concatenate([[0.0], np.cumsum(rr)])
    start = np.maximum(index - RR_HISTORY, 0)
    mean_rr = (elapsed[index] - elapsed[start]) / (index - start)
    leads = sosfiltfilt(butter(2, BAND_HZ, "bandpass", fs=fs, output="sos"), filled, axis=0).T
    (first, corr0), (second, corr1) = (lead_features(x, beats[index], fs) for x in leads)
    rhythm = np.column_stack([rr[index - 1] / mean_rr, rr[index] / mean_rr])
    context = np.column_stack([mean_rr, (corr0 + corr1) / 2])
    return np.hstack([rhythm, first, context, second]).astype(np.float32), index, dropped
