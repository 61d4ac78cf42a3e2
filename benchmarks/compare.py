"""Compare the decisions of client.py decrypt with a record's annotations: which beats were found, and decided rightly.

    python benchmarks/compare.py data/mitdb/233 demo/client/233 --minutes 5

reads 233.atr of the first folder and 233.fhe of the second. A beat is found if a decision lies within 150 ms of it.
Abnormal are the classes S, V and F; beats of class Q are counted, but enter no figure.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import wfdb
from wfdb.processing import compare_annotations

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fhe_mlp import cli, ecg
from fhe_mlp.deployment import decisions

WINDOW_S = 0.15  # EC57's match window


def compare(record: str, answers: str, minutes: float = np.inf) -> tuple[pd.DataFrame, pd.Series]:
    """Return the first `minutes` of beats by class and decision, or "not found", and the decisions without a beat."""
    decided = wfdb.rdann(answers, "fhe")
    annotations, _ = ecg.read_annotations(record, decided.fs)
    beats = annotations[annotations["symbol"].isin(list(ecg.CLASS_OF_SYMBOL))]
    beats = beats[beats["time"] < minutes * 60 * decided.fs]
    match = compare_annotations(beats["time"].to_numpy(int), decided.sample, int(WINDOW_S * decided.fs))
    words = pd.Series(decided.symbol, dtype=object).map(decisions.WORDS)
    outcome = np.full(len(beats), "not found", dtype=object)
    outcome[match.matched_ref_inds] = words[match.matched_test_inds]
    classes = pd.Categorical(beats["symbol"].map(ecg.CLASS_OF_SYMBOL), list(ecg.AAMI_CLASSES))
    table = pd.crosstab(classes, pd.Categorical(outcome, [*decisions.WORDS.values(), "not found"]), dropna=False)
    return table.rename_axis(index="annotated as", columns=""), words.drop(match.matched_test_inds)


def main(argv: list[str] | None = None) -> None:
    """Compare, and print table and figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", help="path of the annotated record, without ending")
    parser.add_argument("decisions", help="path of the .fhe file, without ending")
    parser.add_argument("--minutes", type=cli.positive_float, default=np.inf, help="compare the first minutes only")
    args = parser.parse_args(argv)
    table, unmatched = compare(args.record, args.decisions, args.minutes)
    normal, abnormal, false_alarms = table.loc["N"], table.loc[list("SVF")].sum(), (unmatched == "abnormal").sum()
    sensitivity, specificity = abnormal["abnormal"] / abnormal.sum(), normal["normal"] / normal.sum()
    print(table.to_string())
    print(f"decisions where no beat is annotated: {len(unmatched)}, {false_alarms} of them abnormal")
    print(f"abnormal beats found: {sensitivity:.1%}; normal ones decided normal: {specificity:.1%}", end="; ")
    right = abnormal["abnormal"] / (abnormal["abnormal"] + normal["abnormal"] + false_alarms)
    print(f"balanced accuracy {(sensitivity + specificity) / 2:.1%}; alarms that are right: {right:.1%}")


if __name__ == "__main__":
    cli.run(main)
