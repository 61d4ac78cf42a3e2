"""Which marks of a record are beats with usable signal around them, and which times between them are RR intervals.

The time between two beats is no RR interval when a break lies in it (flutter, fibrillation, an unreadable stretch),
when it is longer than LAPSE_S, or when it is unusually long and signal is missing in it, so that beats may be hidden
there. Such a time enters no feature. The beats on both sides stay, because they are often the ones of interest (the
beat that starts an episode, the escape beat that ends it), with the local median in its place.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

# WFDB's beat annotations (archive.physionet.org/physiobank/annotations.shtml) in the classes that WFDB's own evaluation
# by ANSI/AAMI EC57 gives them (bxb.c): escape beats e, j, n are N, r is V, ? (learning) is Q. wfdb's table is_qrs also
# counts flutter waves (!), which are no beats in either.
AAMI_CLASSES = {"N": "NLRBejn", "S": "AaJS", "V": "VEr", "F": "F", "Q": "/fQ?"}
CLASS_OF_SYMBOL = {symbol: name for name, symbols in AAMI_CLASSES.items() for symbol in symbols}
LAPSE_S = 10.0  # longer ones are lapses of the annotation; the longest pause of MIT-BIH has 5.9 s (record 232)
SAME_BEAT_S = 0.15  # marks closer than EC57's match window are of one beat; no heart beats faster
MIN_GAP_S, MIN_FLAT_S = 0.1, 1.0  # missing samples could hide a QRS complex; a constant value means no electrode
DOUBTFUL_RR = 1.5  # an interval over a gap is doubted from this multiple of the record's median on
OUTSIDE_BEATS, OUTSIDE_SHARE = 3, 0.01  # most beats that may lie outside the signal, whichever is more

Window = tuple[float, float]  # from and to, in seconds around a beat


class Unsuited(ValueError):
    """The record can be read but not used; the message follows "it"."""


def find_breaks(annotations: pd.DataFrame) -> list[tuple[float, float]]:
    """(start, end) samples of flutter or fibrillation ([ to ], and each flutter wave !) and of unreadable signals.

    ~ with subtype -1 says that no signal is readable from there to the next ~. What is not closed lasts to the end.
    """
    breaks, episode, unreadable = [], None, None
    for at, symbol, subtype in annotations[annotations["symbol"].isin(list("[]!~"))].itertuples(index=False):
        if symbol == "!":
            breaks.append((at - 1, at + 1))
        elif symbol == "[":
            episode = at if episode is None else episode
        elif symbol == "]":
            breaks.append((at - 1 if episode is None else episode, at))
            episode = None
        else:
            breaks += [] if unreadable is None else [(unreadable, at)]
            unreadable = at if subtype == -1 else None
    return breaks + [(start, np.inf) for start in (episode, unreadable) if start is not None]


def find_beats(annotations: pd.DataFrame, samples: int) -> tuple[pd.DataFrame, int]:
    """Return the annotations of beats in a signal of so many samples, with their AAMI class, and how many lie outside.

    Raises Unsuited where more than a few do.
    """
    beats = annotations.assign(aami=annotations["symbol"].map(CLASS_OF_SYMBOL)).dropna(subset="aami")
    outside = ~beats["time"].between(0, samples - 1)
    if outside.sum() > max(OUTSIDE_BEATS, OUTSIDE_SHARE * len(beats)):
        what = f"{outside.sum()} of {len(beats)} beats outside its signal"
        raise Unsuited(f"has {what}; its header, signal or annotation file is damaged")
    return beats[~outside], int(outside.sum())


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


def fill_missing(signal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Signal (samples, 2) with NaN interpolated, and where it was missing. Unsuited for a missing or flat lead."""
    missing = ~np.isfinite(signal)
    if missing.all(axis=0).any():
        raise Unsuited("has a missing signal")
    at = np.arange(len(signal))
    filled = np.column_stack([np.interp(at, at[~m], x[~m]) if m.any() else x for x, m in zip(signal.T, missing.T)])
    if (np.ptp(filled, axis=0) == 0).any():
        raise Unsuited("has a flat signal")
    return filled, missing


def usable_beats(
    signal: np.ndarray, fs: float, beats: np.ndarray, breaks: Any, window: Window
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, int]]:
    """Find the beats whose features are defined; signal, fs, beats and breaks as in beat_features.

    window: what must lie in the record, present and not flat in both leads.
    Returns the signal without gaps, the indices (n,) of the single beats in `beats` in the order of time, the positions
    (m,) among these of the usable ones, and the others counted by reason. Raises Unsuited where none is usable.
    """
    order = single_beats(beats, fs)
    filled, missing = fill_missing(signal)
    if len(order) < 3:
        raise Unsuited("has fewer than three beats")
    at, index, dropped = beats[order], np.arange(1, len(order) - 1), {"first or last beat": 2}

    def keep(usable: np.ndarray, reason: str) -> np.ndarray:
        dropped[reason] = int((~usable).sum())
        return index[usable]

    index = keep(~overlap(at[index], at[index], breaks), "inside an episode without beats")
    start, end = (at + round(seconds * fs) for seconds in window)
    index = keep((start[index] >= 0) & (end[index] < len(filled)), "window leaves the record")
    lost = np.cumsum(missing, axis=0)
    moves = np.cumsum(np.diff(filled, axis=0, prepend=filled[:1]) != 0, axis=0)
    start, end = start[index], end[index]
    whole = (lost[end] == lost[start]) & ~missing[start] & (moves[end] > moves[start])
    index = keep(whole.all(axis=1), "signal missing or flat")
    if not len(index):
        raise Unsuited("has no usable beat")
    return filled, order, index, dropped | {"annotated twice": len(beats) - len(order)}
