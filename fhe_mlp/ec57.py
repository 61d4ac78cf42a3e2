"""Figures of beat classification as ANSI/AAMI EC57 reports them: gross, over all beats, and average, over records.

The sample is the patient, not the beat: beats of one patient are right or wrong together. So intervals come from a
bootstrap that draws whole records (Efron & Tibshirani, An Introduction to the Bootstrap, 1993).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

DRAWS = 2000  # of the bootstrap
GROUPS = 50  # of beats, in place of records where these are unknown
SEED = 0  # of the bootstrap: the same decisions have the same interval
FIGURES = ("balanced_accuracy", "sensitivity", "specificity", "positive_predictive_value")
THRESHOLDS = np.arange(5, 96) / 100  # probabilities that are tried


def rates(tp: Any, fn: Any, fp: Any, tn: Any) -> dict[str, Any]:
    """FIGURES of counts (numbers or arrays of one shape); NaN where there is no beat to count."""
    with np.errstate(invalid="ignore"):
        sensitivity, specificity = np.true_divide(tp, np.add(tp, fn)), np.true_divide(tn, np.add(tn, fp))
        predictive = np.true_divide(tp, np.add(tp, fp))
    return dict(zip(FIGURES, ((sensitivity + specificity) / 2, sensitivity, specificity, predictive)))


def balanced_accuracy(decision: np.ndarray, y: np.ndarray) -> float:
    """Mean of the shares of normal and of abnormal beats that are decided rightly; decision, y: (n,), true or 1."""
    right, abnormal = decision == y, y == 1
    counts = [np.sum(one) for one in (right & abnormal, ~right & abnormal, ~right & ~abnormal, right & ~abnormal)]
    return float(rates(*counts)["balanced_accuracy"])


def by_record(y: np.ndarray, decision: np.ndarray, beats: pd.DataFrame) -> pd.DataFrame:
    """A row a record, by name: its beats, those of each AAMI class, tp, fn, fp, tn, and FIGURES.

    y, decision: labels and decisions (n,) of 0 and 1; beats: columns record and aami of the same beats.
    """
    wrong = y != decision
    counts = {"beats": 1, **{c: beats["aami"].to_numpy() == c for c in "NSVFQ"}}
    counts |= {"tp": (y == 1) & ~wrong, "fn": (y == 1) & wrong, "fp": (y == 0) & wrong, "tn": (y == 0) & ~wrong}
    table = pd.DataFrame(counts, index=pd.Index(beats["record"], name="record")).astype(int)
    table = table.groupby("record").sum()
    return table.assign(**rates(*(table[kind] for kind in ("tp", "fn", "fp", "tn"))))


def intervals(table: pd.DataFrame) -> dict[str, list[float]]:
    """95 % interval [low, high] of each gross figure of by_record's table: percentiles over drawn records.

    None for a figure where there are fewer than two records.
    """
    if len(table) < 2:
        return dict.fromkeys(FIGURES)
    times = np.random.default_rng(SEED).multinomial(len(table), np.full(len(table), 1 / len(table)), DRAWS)
    drawn = rates(*(times @ table[kind].to_numpy() for kind in ("tp", "fn", "fp", "tn")))
    return {name: np.nanpercentile(values, [2.5, 97.5]).tolist() for name, values in drawn.items()}


def figures(y: np.ndarray, decision: np.ndarray, beats: pd.DataFrame | None) -> dict[str, Any]:
    """Accuracy, FIGURES gross with intervals and average over records, counts, and the share found of each class.

    y, decision: labels and decisions (n,) of 0 and 1; beats: columns record and aami of the same beats, None where
    unknown. Figures of a record without the beats they count are left out of the average.
    """
    known = pd.DataFrame({"record": "all", "aami": "?"}, index=range(len(y))) if beats is None else beats
    table = by_record(y, decision, known)
    counts = {kind: int(table[kind].sum()) for kind in ("tp", "fn", "fp", "tn")}
    found: dict[str, Any] = {"beats": len(y), "accuracy": float(np.mean(decision == y))}
    found |= {name: float(value) for name, value in rates(*counts.values()).items()}
    found |= {"f1": 2 * counts["tp"] / max(1, 2 * counts["tp"] + counts["fn"] + counts["fp"]), "counts": counts}
    if beats is not None:
        aami = beats["aami"].to_numpy()
        found["found"] = {c: float(decision[aami == c].mean()) for c in "SVFQ" if (aami == c).any()}
        found["interval95"] = intervals(table)
        found["average"] = {name: float(table[name].mean()) for name in FIGURES}
    return found


def columns(found: dict[str, Any]) -> dict[str, float]:
    """What tables show of `figures`: FIGURES, the interval of the first, and the share found of each class."""
    shown = {name: found[name] for name in FIGURES}
    if (found.get("interval95") or {}).get(FIGURES[0]):
        shown |= dict(zip((f"{FIGURES[0]}_low95", f"{FIGURES[0]}_high95"), found["interval95"][FIGURES[0]]))
    return shown | {f"found_{c}": share for c, share in found.get("found", {}).items()}


def choose_threshold(probability: np.ndarray, y: np.ndarray, records: np.ndarray, usual: float) -> float:
    """The probability (of THRESHOLDS) above which a beat is called abnormal, for the best balanced accuracy.

    It is the `usual` one unless the best is better by more than two standard errors of the difference, which come from
    the bootstrap over records: a few validation records say little about the next patient. Beats of one record, or of
    unknown ones, are drawn in GROUPS groups. probability, y, records: (n,).
    """
    if len(set(records)) == 1:
        records = np.arange(len(y)) % GROUPS
    names, owner = np.unique(records, return_inverse=True)
    above = probability[:, None] > THRESHOLDS
    tp, fp = (np.zeros((len(names), len(THRESHOLDS))) for _ in range(2))
    np.add.at(tp, owner[y == 1], above[y == 1])
    np.add.at(fp, owner[y == 0], above[y == 0])
    positives, negatives = (np.bincount(owner[y == label], minlength=len(names))[:, None] for label in (1, 0))

    def balanced(times: np.ndarray) -> np.ndarray:
        fn, tn = times @ (positives - tp), times @ (negatives - fp)
        return rates(times @ tp, fn, times @ fp, tn)["balanced_accuracy"]

    times = np.random.default_rng(SEED).multinomial(len(names), np.full(len(names), 1 / len(names)), DRAWS)
    drawn = balanced(np.vstack([np.ones((1, len(names))), times]))  # the records as they are, then draws of them
    best, first = int(np.argmax(drawn[0])), int(np.argmin(np.abs(THRESHOLDS - usual)))
    gain = drawn[:, best] - drawn[:, first]
    return float(THRESHOLDS[best if gain[0] > 2 * np.nanstd(gain[1:]) else first])
