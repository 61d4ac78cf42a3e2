"""Two leads and the beats of one record to 32 features of each beat, which depend on no label and no file format.

beat_features are relative to the same recording, so that they carry over between patients; published_features are the
raw values of the published arrays.

Beats are compared with the record's own normal ones, found without labels. "Normal" must not mean "most beats": in a
patient with mostly premature beats the record's medians are those of the arrhythmia. So rhythm is also measured against
the long intervals between beats of the record's dominant shape, as premature beats come early and sinus beats late.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.ndimage import median_filter
from scipy.signal import butter, sosfiltfilt

from fhe_mlp.ecg.beats import Unsuited, Window, rr_known, usable_beats

BAND_HZ = (0.5, 40.0)  # baseline wander below, muscle and mains noise above
MIN_FS_HZ = 100.0  # the band's upper edge needs more than 80 Hz
PAUSE_S = 3.0  # longer is a pause (2018 ACC/AHA/HRS guideline on bradycardia), no interval of a rhythm

RHYTHM_BEATS = 30  # beats to each side whose median is the local rhythm
LIKE_CORR, LIKE_SHARE = 0.9, (0.3, 0.5)  # beats of the dominant shape: over 0.9, yet between 50 and 70 % of the record
NORMAL_CORR = 0.85  # both beats of a normal-to-normal interval correlate so with the dominant shape
# Windows in seconds around the annotated sample.
QRS_S, COMPLEX_S, SLOPE_S = (-0.10, 0.14), (-0.12, 0.18), (-0.15, 0.20)
P_S, PR_S, T_S = (-0.25, -0.07), (-0.40, -0.07), (0.16, 0.44)
FLOOR = 0.01  # of the lead's amplitude: smaller residuals are noise, their logarithm means nothing
COMMON = 1.08  # RR intervals within this factor of each other count as alike

# Name, unit, formula, source. "1" marks quantities relative to the recording. x is a band-passed lead over its
# amplitude A (median peak-to-peak in COMPLEX_S); J both leads' x in QRS_S, centred and joined; "like" beats are of
# the dominant QRS shape, "late" ones are like and follow a long interval; NN an interval between two normal beats.
_OWN = "chosen on cross-validation over the patients of DS1"
_CHAZAL = "de Chazal et al. 2004, made relative to the recording"
_HU = "Hu, Palreddy & Tompkins 1997 (patient-adapted)"
_LIKE, _LATE = "minus its median over like beats", "minus its median over late beats"
_FEATURES = [
    ("pre_RR", "s", "RR before the beat: R[i] - R[i-1] of the annotations", "de Chazal et al. 2004"),
    ("pre_local", "1", "RR before / running median of RR over RHYTHM_BEATS to each side", _CHAZAL),
    ("previous_local", "1", "RR before the beat before / that running median", _CHAZAL),
    ("pre_mean", "1", "RR before / mean RR of the recording", _CHAZAL),
    ("pre_post", "1", "ln(RR before / RR after): early, then a pause", _CHAZAL),
    ("pre_previous", "1", "ln(RR before / RR before the beat before): the onset of a run", _OWN),
    ("irregularity", "1", "running median of |RR before - RR before the beat before| / that of RR", "fibrillation"),
    ("pre_long", "1", "RR before / 90 % quantile of NN: early even where most beats are", _OWN),
    ("post_long", "1", "RR after / 90 % quantile of NN", _OWN),
    ("long_normal", "1", "90 % quantile of NN / median of NN: how often the rhythm changes", _OWN),
    ("common", "1", "share of NN within a factor COMMON of the RR before", _OWN),
    ("shape_corr", "1", "correlation of J with the dominant QRS shape", _HU),
    ("shape_corr_previous", "1", "the same of the beat before", _OWN),
    ("corr_previous", "1", "correlation of J with the beat before", _OWN),
    ("corr_next", "1", "correlation of J with the beat after", _OWN),
    ("ch0_QRS_corr", "1", "correlation of x in QRS_S with the median like beat", _OWN),
    ("ch1_QRS_corr", "1", "the same of channel 1", _OWN),
    ("ch0_QRS_residual", "1", "root mean square of centred x in QRS_S minus the median like beat", _OWN),
    ("ch1_QRS_residual", "1", "the same of channel 1", _OWN),
    ("ch0_QRS_sharpness", "1", f"ln(sd of slope / sd of x) in COMPLEX_S, {_LIKE}", "Hjorth 1970"),
    ("ch1_QRS_sharpness", "1", "the same of channel 1", "Hjorth 1970"),
    ("ch0_QRS_interval", "s", f"time between 5 and 95 % of the squared slope in SLOPE_S, {_LIKE}", _CHAZAL),
    ("ch1_QRS_amplitude", "1", f"ln of peak-to-peak x in COMPLEX_S, {_LIKE}", _OWN),
    ("ch1_S_peak", "1", f"least centred x in QRS_S, {_LIKE}", _OWN),
    ("ch0_T_residual", "1", f"ln rms of x in T_S minus the median like beat, {_LIKE}", _OWN),
    ("ch0_T_amplitude", "1", f"ln of peak-to-peak x in T_S, {_LIKE}", _OWN),
    ("ch0_P_size", "1", "peak-to-peak x in P_S", _OWN),
    ("ch0_P_amplitude", "1", "the same minus its median over late beats", _OWN),
    ("ch1_P_amplitude", "1", "the same of channel 1", _OWN),
    ("PR_corr_previous", "1", "correlation of both leads' straightened x in PR_S with the beat before", _OWN),
    ("PR_corr", "1", f"correlation of both leads' x in PR_S with the median late beat, {_LATE}", _OWN),
    ("PR_residual", "1", f"ln rms of both leads' x in PR_S minus the median late beat, {_LATE}", _OWN),
]
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
# Search windows of the published set in seconds; P, R and T around the annotated beat, Q and S around the R peak.
R_WINDOW, Q_WINDOW, S_WINDOW = (-0.05, 0.05), (-0.10, 0.0), (0.0, 0.12)
P_WINDOW, T_WINDOW = (-0.28, -0.08), (0.14, 0.45)

_KEYS = ("name", "unit", "formula", "source")  # as dataset.json lists a feature
FEATURES = [dict(zip(_KEYS, row)) for row in _FEATURES]
PUBLISHED = [dict(zip(_KEYS, (f"ch{c}_{row[0]}", *row[1:], "published arrays"))) for c in (0, 1) for row in _PUBLISHED]


# ------------------------------------------------------------------------------------------------------- small parts
def cut(x: np.ndarray, at: np.ndarray, window: Window, fs: float) -> np.ndarray:
    """x (samples,) in a window (s) around each sample `at` (n,): (n, width)."""
    return x[at[:, None] + np.arange(round(window[0] * fs), round(window[1] * fs) + 1)]


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows (n, width) centred and of length 1, so that a product of two is their correlation; a flat row is zeros."""
    rows = centred(rows)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


def correlation(rows: np.ndarray, template: np.ndarray) -> np.ndarray:
    """Correlation (n,) of each row (n, width) with a template (width,)."""
    return unit(rows) @ unit(template[None])[0]


def find_extremum(x: np.ndarray, centre: np.ndarray, window: Window, fs: float, pick: Callable) -> np.ndarray:
    """Sample index (n,) of the extremum `pick` (np.argmax, np.argmin) of x in a window (s) around each centre."""
    return centre + round(window[0] * fs) + pick(cut(x, centre, window, fs), axis=1)


def band_pass(x: np.ndarray, band: tuple[float, float], fs: float) -> np.ndarray:
    """Zero-phase second-order Butterworth band-pass of each column."""
    return sosfiltfilt(butter(2, band, "bandpass", fs=fs, output="sos"), x, axis=0)


def stack(columns: Sequence[np.ndarray]) -> np.ndarray:
    """Return columns (m,) as float32 (m, columns). Raises Unsuited for what is too large."""
    X = np.column_stack(columns).astype(np.float32)
    if not np.isfinite(X).all():
        raise Unsuited("has amplitudes that are no voltages")
    return X


# ---------------------------------------------------------------------------------------------------- relative features
def rhythm_features(
    previous: np.ndarray, before: np.ndarray, after: np.ndarray, corr: np.ndarray, like: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return features of the rhythm by name, and which beats are "late": of the dominant shape after a long interval.

    previous, before, after: the RR intervals (m,) in seconds that end one beat earlier, end at, and begin at each beat,
    NaN where unknown; corr: correlation with the dominant shape; like: beats of that shape. Intervals over PAUSE_S
    enter no statistic and count as PAUSE_S; unknown ones are the local median. Raises Unsuited where all are unknown.
    """
    known = before <= PAUSE_S
    if not known.any():
        raise Unsuited("has no RR interval between its usable beats")
    nearest = np.searchsorted(np.flatnonzero(known), np.arange(len(before))).clip(max=known.sum() - 1)

    def local(values: np.ndarray) -> np.ndarray:
        """Running median over the known intervals, mirrored at the ends."""
        return median_filter(values[known], 2 * RHYTHM_BEATS + 1, mode="reflect")[nearest]

    rhythm = local(before)
    previous, pre, post = (np.where(np.isnan(rr), rhythm, np.minimum(rr, PAUSE_S)) for rr in (previous, before, after))
    normal = corr > NORMAL_CORR if (corr > NORMAL_CORR).mean() > LIKE_SHARE[0] else like
    nn = known & normal & np.append(False, normal[:-1])
    nn_rr = np.sort(pre[nn if nn.any() else known])
    n50, n80, n90 = np.quantile(nn_rr, [0.5, 0.8, 0.9])
    late = like & known & (pre >= n80)
    if not late.any():
        late = like & (pre >= np.median(pre[like]))
    near = np.searchsorted(nn_rr, pre * COMMON) - np.searchsorted(nn_rr, pre / COMMON)
    return {
        "pre_RR": pre,
        "pre_local": pre / rhythm,
        "previous_local": previous / rhythm,
        "pre_mean": pre / pre[known].mean(),
        "pre_post": np.log(pre / post),
        "pre_previous": np.log(pre / previous),
        "irregularity": local(np.abs(pre - previous)) / rhythm,
        "pre_long": pre / n90,
        "post_long": post / n90,
        "long_normal": np.full(len(pre), n90 / n50),
        "common": near / len(nn_rr),
    }, late


def dominant_shape(rows: np.ndarray) -> np.ndarray:
    """Correlation (m,) of each beat's samples (m, width) with the median beat, refined on its better half."""
    template = np.median(rows, axis=0)
    for _ in range(3):
        corr = correlation(rows, template)
        template = np.median(rows[corr >= np.median(corr)], axis=0)
    return correlation(rows, template)


def log_rms(rows: np.ndarray) -> np.ndarray:
    """ln of the root mean square of each row, to which FLOOR is added."""
    return np.log(np.sqrt(np.mean(rows**2, axis=1)) + FLOOR)


def centred(rows: np.ndarray) -> np.ndarray:
    """Rows (n, width) without their mean."""
    return rows - rows.mean(axis=1, keepdims=True)


def with_previous(rows: np.ndarray) -> np.ndarray:
    """Correlation (m,) of each row with the one before it; the first is compared with itself."""
    rows = unit(rows)
    return np.concatenate([[1.0], np.sum(rows[1:] * rows[:-1], axis=1)])


def lead_features(
    x: np.ndarray, at: np.ndarray, like: np.ndarray, late: np.ndarray, fs: float
) -> dict[str, np.ndarray]:
    """Features of the waves in one lead x (samples,) by name, without its channel; at: samples of the beats (m,)."""

    def relative(values: np.ndarray, beats: np.ndarray = like) -> np.ndarray:
        return values - np.median(values[beats])

    qrs, complexes, t_wave = centred(cut(x, at, QRS_S, fs)), cut(x, at, COMPLEX_S, fs), cut(x, at, T_S, fs)
    template = np.median(qrs[like], axis=0)
    slope = np.diff(complexes, axis=1).std(axis=1) * fs
    energy = np.cumsum(np.diff(cut(x, at, SLOPE_S, fs), axis=1) ** 2, axis=1)
    energy /= np.maximum(energy[:, -1:], 1e-9)
    p_size = np.ptp(cut(x, at, P_S, fs), axis=1)
    return {
        "QRS_corr": correlation(qrs, template),
        "QRS_residual": np.sqrt(np.mean((qrs - template) ** 2, axis=1)),
        "QRS_sharpness": relative(np.log(slope + FLOOR) - np.log(complexes.std(axis=1) + FLOOR)),
        "QRS_interval": relative(((energy < 0.95).sum(axis=1) - (energy < 0.05).sum(axis=1)) / fs),
        "QRS_amplitude": relative(np.log(np.ptp(complexes, axis=1) + FLOOR)),
        "S_peak": relative(qrs.min(axis=1)),
        "T_residual": relative(log_rms(t_wave - np.median(t_wave[like], axis=0))),
        "T_amplitude": relative(np.log(np.ptp(t_wave, axis=1) + 5 * FLOOR)),
        "P_size": p_size,
        "P_amplitude": relative(p_size, late),
    }


def beat_features(
    signal: np.ndarray, fs: float, beats: np.ndarray, breaks: Any = (), only: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """Return FEATURES (m, 32) float32 by time, the indices (m,) in `beats` of these beats, and the dropped by reason.

    signal: two leads in the order of records.choose_leads, (samples, 2), in any unit of voltage (amplitudes are
    relative), NaN where missing; fs in Hz; beats: samples of the R peaks (n,), whole numbers in any order; breaks:
    (start, end) samples of episodes without beats, start < end, which may be infinite; only: indices in `beats` of
    those that have features, as if the record had no others but in RR intervals; None: all. Raises Unsuited when the
    record cannot be used at all.
    """
    filled, order, index, dropped = usable_beats(signal, fs, beats, breaks, (PR_S[0], T_S[1]))
    index = index if only is None else index[np.isin(order[index], only)]
    if not len(index):
        raise Unsuited("has no usable beat among those asked for")
    beats = beats[order]
    rr = np.where(rr_known(signal, fs, beats, breaks), np.diff(beats) / fs, np.nan)
    at = beats[index]
    leads = [band_pass(x, BAND_HZ, fs).astype(np.float32) for x in filled.T]
    leads = [x / max(np.median(np.ptp(cut(x, at, COMPLEX_S, fs), axis=1)), 1e-6) for x in leads]

    joined = np.hstack([centred(cut(x, at, QRS_S, fs)) for x in leads])
    corr = dominant_shape(joined)
    low, high = np.quantile(corr, LIKE_SHARE)
    like = corr >= min(max(LIKE_CORR, low), high)
    before_previous = np.where(index > 1, rr[np.maximum(index - 2, 0)], np.nan)
    f, late = rhythm_features(before_previous, rr[index - 1], rr[index], corr, like)
    f |= {"shape_corr": corr, "shape_corr_previous": np.concatenate([corr[:1], corr[:-1]])}
    f["corr_previous"] = with_previous(joined)
    f["corr_next"] = np.concatenate([f["corr_previous"][1:], [1.0]])
    for channel, x in enumerate(leads):
        f |= {f"ch{channel}_{name}": column for name, column in lead_features(x, at, like, late, fs).items()}
    pr = [centred(cut(x, at, PR_S, fs)) for x in leads]
    ramp = np.linspace(-1, 1, pr[0].shape[1], dtype=np.float32)  # the tail of the T wave before
    straightened = [rows - np.outer(rows @ ramp, ramp / (ramp @ ramp)) for rows in pr]
    f["PR_corr_previous"] = with_previous(np.hstack(straightened))
    pr = np.hstack(pr)
    template = np.median(pr[late], axis=0)
    for name, values in (("PR_corr", correlation(pr, template)), ("PR_residual", log_rms(pr - template))):
        f[name] = values - np.median(values[late])
    return stack([f[feature["name"]] for feature in FEATURES]), order[index], dropped


# --------------------------------------------------------------------------------------------------- published features
def published_features(
    signal: np.ndarray, fs: float, beats: np.ndarray, breaks: Any = ()
) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """Return PUBLISHED of a signal in mV, as beat_features; RR intervals are the annotations' whatever lies in them."""
    window = (min(P_WINDOW[0], R_WINDOW[0] + Q_WINDOW[0]), T_WINDOW[1])
    filled, order, index, dropped = usable_beats(signal, fs, beats, breaks, window)
    at, rr = beats[order[index]], np.diff(beats[order]) / fs
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
    return stack(columns), order[index], dropped
