"""Figures of beat classification as ANSI/AAMI EC57 reports them: gross, over all beats, and average, over records.

The sample is the patient, not the beat: beats of one patient are right or wrong together. So intervals come from a
bootstrap that draws whole records (Efron & Tibshirani, An Introduction to the Bootstrap, 1993).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

DRAWS = 2000  # of the bootstrap
GROUPS = 50  # of beats, in place of patients where these are unknown
SEED = 0  # of the bootstrap: the same decisions have the same interval
FIGURES = ("balanced_accuracy", "sensitivity", "specificity", "positive_predictive_value")
COUNTS = ["tp", "fn", "fp", "tn"]  # abnormal beats that are found and missed, normal ones called abnormal and normal
LEAST_BEATS = 50  # of a label, from which figures and a threshold are worth something
THRESHOLDS = np.arange(5, 96) / 100  # probabilities that are tried
LEVEL = 0.05  # chance of leaving the usual threshold where no other is better


def rates(tp: Any, fn: Any, fp: Any, tn: Any) -> dict[str, Any]:
    """FIGURES of counts (numbers or arrays of one shape); NaN where there is no beat to count."""
    with np.errstate(invalid="ignore"):
        sensitivity, specificity = np.true_divide(tp, np.add(tp, fn)), np.true_divide(tn, np.add(tn, fp))
        predictive = np.true_divide(tp, np.add(tp, fp))
    return dict(zip(FIGURES, ((sensitivity + specificity) / 2, sensitivity, specificity, predictive)))


def balanced_accuracy(decision: np.ndarray, y: np.ndarray) -> float:
    """Mean of the shares of normal and of abnormal beats that are decided rightly; decision, y: (n,), true or 1."""
    right = decision == y
    return float((np.mean(right[y == 1]) + np.mean(right[y == 0])) / 2)


def by_record(y: np.ndarray, decision: np.ndarray, beats: pd.DataFrame) -> pd.DataFrame:
    """A row for each record, by name: its beats, those of each AAMI class, tp, fn, fp, tn, and FIGURES.

    y, decision: labels and decisions (n,) of 0 and 1; beats: columns record and aami of the same beats.
    """
    wrong = y != decision
    counts = {"beats": 1, **{c: beats["aami"].to_numpy() == c for c in "NSVFQ"}}
    counts |= {"tp": (y == 1) & ~wrong, "fn": (y == 1) & wrong, "fp": (y == 0) & wrong, "tn": (y == 0) & ~wrong}
    table = pd.DataFrame(counts, index=pd.Index(beats["record"], name="record")).astype(int)
    table = table.groupby("record").sum()
    return table.assign(**rates(*(table[kind] for kind in COUNTS)))


def draws(count: int) -> np.ndarray:
    """How often each of so many records comes in each of DRAWS bootstrap samples: (DRAWS, count)."""
    return np.random.default_rng(SEED).multinomial(count, np.full(count, 1 / count), DRAWS)


def figures(y: np.ndarray, decision: np.ndarray, beats: pd.DataFrame | None) -> dict[str, Any]:
    """Accuracy, FIGURES gross and average over records, counts, and the share found of each class.

    interval95, of two or more records, has the 95 % interval [low, high] of each gross figure: percentiles over drawn
    records. Figures of a record without the beats they count are left out of the average. y, decision: labels and
    decisions (n,) of 0 and 1; beats: columns record and aami of the same beats, None where unknown.
    """
    named = pd.DataFrame({"record": "all", "aami": "?"}, index=range(len(y))) if beats is None else beats
    table = by_record(y, decision, named)
    counts = {kind: int(table[kind].sum()) for kind in COUNTS}
    result: dict[str, Any] = {"beats": len(y), "accuracy": float(np.mean(decision == y))}
    result |= {name: float(value) for name, value in rates(*counts.values()).items()}
    result |= {"f1": 2 * counts["tp"] / max(1, 2 * counts["tp"] + counts["fn"] + counts["fp"]), "counts": counts}
    if beats is not None:
        aami = beats["aami"].to_numpy()
        result["found"] = {c: float(decision[aami == c].mean()) for c in "SVFQ" if (aami == c).any()}
        if len(table) > 1:
            drawn = rates(*(draws(len(table)) @ table[COUNTS].to_numpy()).T)
            result["interval95"] = {f: np.nanpercentile(values, [2.5, 97.5]).tolist() for f, values in drawn.items()}
        result["average"] = {name: float(table[name].mean()) for name in FIGURES}
    return result


def columns(result: dict[str, Any]) -> dict[str, float]:
    """Return columns of tables from `figures`: FIGURES, the interval of the first, the share found of each class."""
    shown = {name: result[name] for name in FIGURES}
    if "interval95" in result:
        shown |= dict(zip((f"{FIGURES[0]}_low95", f"{FIGURES[0]}_high95"), result["interval95"][FIGURES[0]]))
    return shown | {f"found_{c}": share for c, share in result.get("found", {}).items()}


def choose_threshold(probability: np.ndarray, y: np.ndarray, patients: np.ndarray, usual: float) -> float:
    """Return the probability (of THRESHOLDS) above which a beat is called abnormal, for the best balanced accuracy.

    It is the `usual` one unless the best gains more over it than chance explains. The best of so many thresholds gains
    something by chance too, so its gain, in standard errors, has to exceed what the greatest deviation of all
    thresholds' gains, in standard errors as well, exceeds in a share LEVEL of samples that draw whole patients (Hansen,
    A Test for Superior Predictive Ability, J. Bus. Econ. Stat. 2005). Beats of unknown patients are drawn in GROUPS
    groups. With fewer than LEAST_BEATS of a label it stays the usual one. probability, y, patients: (n,).
    """
    if np.bincount(y, minlength=2).min() < LEAST_BEATS:
        return usual
    if len(set(patients)) == 1:
        patients = np.arange(len(y)) % GROUPS
    owned = (np.unique(patients)[:, None] == patients).astype(float)  # (patients, n)
    above = probability[:, None] > THRESHOLDS
    tp, fp = (owned[:, y == label] @ above[y == label] for label in (1, 0))
    positives, negatives = (owned[:, y == label].sum(axis=1, keepdims=True) for label in (1, 0))

    def gains(times: np.ndarray) -> np.ndarray:
        """Gain (samples, thresholds) over the usual threshold; times: (samples, patients)."""
        fn, tn = times @ (positives - tp), times @ (negatives - fp)
        accuracy = rates(times @ tp, fn, times @ fp, tn)["balanced_accuracy"]
        return accuracy - accuracy[:, [np.argmin(np.abs(THRESHOLDS - usual))]]

    gain = gains(np.ones((1, len(owned))))[0]
    drawn = gains(draws(len(owned)))
    error = np.maximum(np.nanstd(drawn, axis=0), 1e-9)  # where all patients gain alike, only rounding is left
    by_chance = np.nanquantile(((drawn - gain) / error).max(axis=1), 1 - LEVEL)
    best = np.argmax(gain)
    return float(THRESHOLDS[best]) if gain[best] / error[best] > by_chance else usual
