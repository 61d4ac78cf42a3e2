"""One record's two leads and beats to 32 features a beat; numpy and scipy only.

Nothing here depends on labels or on a file format: features come from the signal and the positions of the beats. They
are relative to the same recording, so that they carry over between patients; published_features.py has raw values.

Beats are compared with the record's own normal ones, found without labels. "Normal" must not mean "most beats": in a
patient with mostly premature beats the record's medians are those of the arrhythmia. So rhythm is also measured against
the long intervals between beats of the record's dominant shape, as premature beats come early and sinus beats late.

RR intervals. The time between two beats is no RR interval when a break lies in it (flutter, fibrillation, an
unreadable stretch), when it is longer than LAPSE_S, or when it is unusually long and signal is missing in it, so that
beats may be hidden there. Such a time enters no feature. The beats on both sides are kept, because they are often the
ones of interest (the beat that starts an episode, the escape beat that ends it), with the local median in its place.
Pauses over PAUSE_S, as in sinus arrest, are kept as PAUSE_S, but enter no statistic of the rhythm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.ndimage import median_filter
from scipy.signal import butter, sosfiltfilt

BAND_HZ = (0.5, 40.0)  # baseline wander below, muscle and mains noise above
MIN_FS_HZ = 100.0  # the band's upper edge needs more than 80 Hz
PAUSE_S = 3.0  # longer is a pause (2018 ACC/AHA/HRS guideline on bradycardia), no interval of a rhythm
LAPSE_S = 10.0  # longer ones are lapses of the annotation; the longest pause of MIT-BIH has 5.9 s (record 232)
SAME_BEAT_S = 0.15  # marks closer than EC57's match window are of one beat; no heart beats faster
MIN_GAP_S, MIN_FLAT_S = 0.1, 1.0  # missing samples could hide a QRS complex; a constant value means no electrode
DOUBTFUL_RR = 1.5  # an interval over a gap is doubted from this multiple of the record's median on

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
_RHYTHM = [
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
]
_SHAPE = [
    (
        "shape_corr",
        "1",
        "correlation of J with the dominant QRS shape",
        "Hu, Palreddy & Tompkins 1997 (patient-adapted)",
    ),
    ("shape_corr_previous", "1", "the same of the beat before", _OWN),
    ("corr_previous", "1", "correlation of J with the beat before", _OWN),
    ("corr_next", "1", "correlation of J with the beat after", _OWN),
    ("ch0_QRS_corr", "1", "correlation of x in QRS_S with the median like beat", _OWN),
    ("ch1_QRS_corr", "1", "the same of channel 1", _OWN),
    ("ch0_QRS_residual", "1", "root mean square of centred x in QRS_S minus the median like beat", _OWN),
    ("ch1_QRS_residual", "1", "the same of channel 1", _OWN),
    (
        "ch0_QRS_sharpness",
        "1",
        "ln(sd of slope / sd of x) in COMPLEX_S, minus its median over like beats",
        "Hjorth 1970",
    ),
    ("ch1_QRS_sharpness", "1", "the same of channel 1", "Hjorth 1970"),
    (
        "ch0_QRS_interval",
        "s",
        "time between 5 and 95 % of the squared slope in SLOPE_S, minus its median over like beats",
        _CHAZAL,
    ),
    ("ch1_QRS_amplitude", "1", "ln of peak-to-peak x in COMPLEX_S, minus its median over like beats", _OWN),
    ("ch1_S_peak", "1", "least centred x in QRS_S, minus its median over like beats", _OWN),
    ("ch0_T_residual", "1", "ln rms of x in T_S minus the median like beat, minus its median over like beats", _OWN),
    ("ch0_T_amplitude", "1", "ln of peak-to-peak x in T_S, minus its median over like beats", _OWN),
]
_P_WAVE = [
    ("ch0_P_size", "1", "peak-to-peak x in P_S", _OWN),
    ("ch0_P_amplitude", "1", "the same minus its median over late beats", _OWN),
    ("ch1_P_amplitude", "1", "the same of channel 1", _OWN),
    ("PR_corr_previous", "1", "correlation of both leads' straightened x in PR_S with the beat before", _OWN),
    (
        "PR_corr",
        "1",
        "correlation of both leads' x in PR_S with the median late beat, minus its median over late beats",
        _OWN,
    ),
    (
        "PR_residual",
        "1",
        "ln rms of both leads' x in PR_S minus the median late beat, minus its median over late beats",
        _OWN,
    ),
]
FEATURES = [
    {"name": name, "unit": unit, "formula": formula, "source": source}
    for name, unit, formula, source in (*_RHYTHM, *_SHAPE, *_P_WAVE)
]


# ----------------------------------------------------------------------------------------------------- RR intervals
def single_beats(beats: np.ndarray, fs: float) -> np.ndarray:
    """Indices of the beats in the order of time; of marks within SAME_BEAT_S, as of two leads, only the first."""
    order = np.argsort(beats, kind="stable")
    return order[np.diff(beats[order], prepend=-np.inf) >= SAME_BEAT_S * fs]


def overlap(start: np.ndarray, end: np.ndarray, spans: Any) -> np.ndarray:
    """Whether any of `spans`, (start, end) pairs, has a part in common with each open interval from start to end."""
    starts, ends = np.sort(np.array(spans, dtype=float).reshape(-1, 2), axis=0).T
    return np.searchsorted(starts, end) > np.searchsorted(ends, start, side="right")


def runs(mask: np.ndarray, shortest: float) -> np.ndarray:
    """(k, 2) first and behind-last positions of the stretches of True in mask (n,), `shortest` or longer."""
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
    return edges[edges[:, 1] - edges[:, 0] >= shortest]


def rr_known(signal: np.ndarray, fs: float, beats: np.ndarray, breaks: Any = ()) -> np.ndarray:
    """(n - 1,): whether the time from each beat to the next is an RR interval (see above). beats: rising."""
    rr = np.diff(beats) / fs
    gaps = [runs(~np.isfinite(signal).all(axis=1), MIN_GAP_S * fs)]
    gaps += [runs(np.diff(x, prepend=np.nan) == 0, MIN_FLAT_S * fs) for x in signal.T]
    doubtful = overlap(beats[:-1], beats[1:], np.concatenate(gaps)) & (rr > DOUBTFUL_RR * np.median(rr))
    return ~overlap(beats[:-1], beats[1:], breaks) & ~doubtful & (rr <= LAPSE_S)


# ------------------------------------------------------------------------------------------------------ usable beats
def fill_missing(signal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Signal (samples, 2) with NaN interpolated, and where it was missing. ValueError for a missing or flat lead."""
    missing = ~np.isfinite(signal)
    if missing.all(axis=0).any():
        raise ValueError("has a missing signal")
    at = np.arange(len(signal))
    filled = np.column_stack([np.interp(at, at[~m], x[~m]) if m.any() else x for x, m in zip(signal.T, missing.T)])
    if (np.ptp(filled, axis=0) == 0).any():
        raise ValueError("has a flat signal")
    return filled, missing


def usable_beats(
    filled: np.ndarray, missing: np.ndarray, beats: np.ndarray, breaks: Any, before: int, after: int
) -> tuple[np.ndarray, dict[str, int]]:
    """Indices (m,) of the beats (rising) whose features are defined, and the others counted by reason.

    before, after: the samples around a beat that must lie in the record, present and not flat in both leads.
    Raises ValueError where none is left.
    """
    if len(beats) < 3:
        raise ValueError("has fewer than three beats")
    index = np.arange(1, len(beats) - 1)
    dropped = {"first or last beat": 2}

    def keep(usable: np.ndarray, reason: str) -> np.ndarray:
        dropped[reason] = int((~usable).sum())
        return index[usable]

    index = keep(~overlap(beats[index], beats[index], breaks), "inside an episode without beats")
    index = keep((beats[index] >= before) & (beats[index] + after < len(filled)), "window leaves the record")
    lost = np.concatenate([np.zeros((1, 2), int), np.cumsum(missing, axis=0)])
    moves = np.concatenate([np.zeros((1, 2), int), np.cumsum(np.diff(filled, axis=0) != 0, axis=0)])
    start, end = beats[index] - before, beats[index] + after
    whole = (lost[end + 1] == lost[start]) & (moves[end] > moves[start])
    index = keep(whole.all(axis=1), "signal missing or flat")
    if not len(index):
        raise ValueError("has no usable beat")
    return index, dropped


# ------------------------------------------------------------------------------------------------------- small parts
def cut(x: np.ndarray, at: np.ndarray, window: tuple[float, float], fs: float) -> np.ndarray:
    """x (samples,) in a window (s) around each sample `at` (n,): (n, width)."""
    return x[at[:, None] + np.arange(round(window[0] * fs), round(window[1] * fs) + 1)]


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows (n, width) centred and of length 1, so that a product of two is their correlation; a flat row is zeros."""
    rows = rows - rows.mean(axis=1, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


def find_extremum(
    x: np.ndarray, centre: np.ndarray, window: tuple[float, float], fs: float, pick: Callable
) -> np.ndarray:
    """Sample index (n,) of the extremum `pick` (np.argmax, np.argmin) of x in a window (s) around each centre."""
    return centre + round(window[0] * fs) + pick(cut(x, centre, window, fs), axis=1)


def band_pass(x: np.ndarray, band: tuple[float, float], fs: float) -> np.ndarray:
    """Zero-phase second-order Butterworth band-pass of each column."""
    return sosfiltfilt(butter(2, band, "bandpass", fs=fs, output="sos"), x, axis=0)


# -------------------------------------------------------------------------------------- features for unseen patients
def rhythm_features(
    previous: np.ndarray, before: np.ndarray, after: np.ndarray, corr: np.ndarray, like: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Columns of _RHYTHM by name, and which beats are "late": of the dominant shape after a long interval.

    previous, before, after: the RR intervals (m,) in seconds that end one beat earlier, end at, and begin at each beat,
    NaN where unknown; corr: correlation with the dominant shape; like: beats of that shape.
    Intervals over PAUSE_S enter no statistic and count as PAUSE_S; unknown ones are the local median.
    Raises ValueError where no interval is known.
    """
    known = before <= PAUSE_S
    if not known.any():
        raise ValueError("has no RR interval between its usable beats")
    nearest = np.searchsorted(np.flatnonzero(known), np.arange(len(before))).clip(max=known.sum() - 1)

    def local(values: np.ndarray) -> np.ndarray:
        """Running median over the known intervals, mirrored at the ends."""
        return median_filter(values[known], 2 * RHYTHM_BEATS + 1, mode="reflect")[nearest]

    rhythm = local(before)
    previous, pre, post = (np.where(np.isnan(rr), rhythm, np.minimum(rr, PAUSE_S)) for rr in (previous, before, after))
    normal = corr > NORMAL_CORR if (corr > NORMAL_CORR).mean() > LIKE_SHARE[0] else like
    nn = known & normal & np.roll(normal, 1)
    nn[0] = False
    if not nn.any():
        nn = known
    nn_rr = np.sort(pre[nn])
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
    units = unit(rows)
    template = np.median(rows, axis=0)
    for _ in range(3):
        corr = units @ unit(template[None])[0]
        template = np.median(rows[corr >= np.median(corr)], axis=0)
    return units @ unit(template[None])[0]


def log_rms(rows: np.ndarray) -> np.ndarray:
    """ln of the root mean square of each row, at least FLOOR."""
    return np.log(np.sqrt(np.mean(rows**2, axis=1)) + FLOOR)


def centred(rows: np.ndarray) -> np.ndarray:
    """Rows (n, width) without their mean."""
    return rows - rows.mean(axis=1, keepdims=True)


def straightened(rows: np.ndarray) -> np.ndarray:
    """Rows (n, width) without their mean and slope, that is, without the tail of the T wave before."""
    ramp = np.linspace(-1, 1, rows.shape[1], dtype=rows.dtype)
    rows = centred(rows)
    return rows - np.outer(rows @ ramp, ramp / (ramp @ ramp))


def with_previous(rows: np.ndarray) -> np.ndarray:
    """Correlation (m,) of each row with the one before it; the first is compared with itself."""
    rows = unit(rows)
    return np.concatenate([[1.0], np.sum(rows[1:] * rows[:-1], axis=1)])


def beat_features(
    signal: np.ndarray, fs: float, beats: np.ndarray, breaks: Any = (), only: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """The features of FEATURES of a record's usable beats.

    signal: two leads in the order of records.choose_leads, (samples, 2), in any unit of voltage (amplitudes are
    relative), NaN where missing; fs in Hz; beats: samples of the R peaks (n,), whole numbers in any order; breaks:
    (start, end) samples of episodes without beats, start < end, which may be infinite; only: indices in `beats` of
    those that have features, as if the record had no others (in medians, templates and comparisons with the beat
    before); RR intervals stay those of all beats. None: all.
    Returns features (m, 32) float32 in the order of time, the indices (m,) in `beats` of the usable ones, and the
    dropped ones counted by reason. Raises ValueError when the record cannot be used at all.
    """
    order = single_beats(beats, fs)
    repeated, beats = len(beats) - len(order), np.asarray(beats, dtype=np.int64)[order]
    filled, missing = fill_missing(signal)
    index, dropped = usable_beats(filled, missing, beats, breaks, -round(PR_S[0] * fs), round(T_S[1] * fs))
    dropped["annotated twice"] = repeated
    if only is not None:
        index = index[np.isin(order[index], only)]
        if not len(index):
            raise ValueError("has no usable beat among those asked for")
    rr = np.where(rr_known(signal, fs, beats, breaks), np.diff(beats) / fs, np.nan)
    at = beats[index]
    leads = []
    for x in filled.T:
        x = band_pass(x, BAND_HZ, fs).astype(np.float32)
        amplitude = np.median(np.ptp(cut(x, at, COMPLEX_S, fs), axis=1))
        leads.append(x / max(amplitude, 1e-6))

    joined = np.hstack([centred(cut(x, at, QRS_S, fs)) for x in leads])
    corr = dominant_shape(joined)
    low, high = np.quantile(corr, LIKE_SHARE)
    like = corr >= min(max(LIKE_CORR, low), high)
    before_previous = np.where(index > 1, rr[np.maximum(index - 2, 0)], np.nan)
    f, late = rhythm_features(before_previous, rr[index - 1], rr[index], corr, like)

    f["shape_corr"] = corr
    f["shape_corr_previous"] = np.concatenate([corr[:1], corr[:-1]])
    f["corr_previous"] = with_previous(joined)
    f["corr_next"] = np.concatenate([f["corr_previous"][1:], [1.0]])
    for c, x in enumerate(leads):
        qrs, complexes = centred(cut(x, at, QRS_S, fs)), cut(x, at, COMPLEX_S, fs)
        template = np.median(qrs[like], axis=0)
        f[f"ch{c}_QRS_corr"] = unit(qrs) @ unit(template[None])[0]
        f[f"ch{c}_QRS_residual"] = np.sqrt(np.mean((qrs - template) ** 2, axis=1))
        slope = np.diff(complexes, axis=1).std(axis=1) * fs
        sharpness = np.log(slope + FLOOR) - np.log(complexes.std(axis=1) + FLOOR)
        f[f"ch{c}_QRS_sharpness"] = sharpness - np.median(sharpness[like])
        energy = np.cumsum(np.diff(cut(x, at, SLOPE_S, fs), axis=1) ** 2, axis=1)
        energy /= np.maximum(energy[:, -1:], 1e-9)
        width = ((energy < 0.95).sum(axis=1) - (energy < 0.05).sum(axis=1)) / fs
        f[f"ch{c}_QRS_interval"] = width - np.median(width[like])
        amplitude = np.log(np.ptp(complexes, axis=1) + FLOOR)
        f[f"ch{c}_QRS_amplitude"] = amplitude - np.median(amplitude[like])
        trough = qrs.min(axis=1)
        f[f"ch{c}_S_peak"] = trough - np.median(trough[like])
        t_wave = cut(x, at, T_S, fs)
        residual = log_rms(t_wave - np.median(t_wave[like], axis=0))
        f[f"ch{c}_T_residual"] = residual - np.median(residual[like])
        amplitude = np.log(np.ptp(t_wave, axis=1) + 5 * FLOOR)
        f[f"ch{c}_T_amplitude"] = amplitude - np.median(amplitude[like])
        f[f"ch{c}_P_size"] = np.ptp(cut(x, at, P_S, fs), axis=1)
        f[f"ch{c}_P_amplitude"] = f[f"ch{c}_P_size"] - np.median(f[f"ch{c}_P_size"][late])

    pr = [cut(x, at, PR_S, fs) for x in leads]
    f["PR_corr_previous"] = with_previous(np.hstack([straightened(x) for x in pr]))
    pr = np.hstack([centred(x) for x in pr])
    template = np.median(pr[late], axis=0)
    pr_corr, residual = unit(pr) @ unit(template[None])[0], log_rms(pr - template)
    f["PR_corr"] = pr_corr - np.median(pr_corr[late])
    f["PR_residual"] = residual - np.median(residual[late])
    X = np.column_stack([f[feature["name"]] for feature in FEATURES]).astype(np.float32)
    if not np.isfinite(X).all():
        raise ValueError("has amplitudes that are no voltages")
    return X, order[index], dropped
