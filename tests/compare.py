"""Compare the decisions of client.py decrypt with a record's annotations: which beats were found, and decided rightly.

    python tests/compare.py data/mitdb/233 demo/client/233 --minutes 5

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
from fhe_mlp import cli, records

WINDOW_S = 0.15  # EC57's match window
DECISIONS = {"N": "normal", "Q": "abnormal", '"': "not classified"}  # by their codes in the .fhe file


def compare(record: str, decisions: str, minutes: float = np.inf) -> tuple[pd.DataFrame, int, int]:
    """Beats by class and decision, or "not found"; how many decisions match no beat, and how many of them are abnormal.

    Only the first `minutes` of the record are looked at.
    """
    decided = wfdb.rdann(decisions, "fhe")
    annotations, _ = records.read_annotations(record, decided.fs)
    annotations = annotations[annotations["time"] < minutes * 60 * decided.fs]
    beats = annotations[annotations["symbol"].isin(list(records.CLASS_OF_SYMBOL))]
    match = compare_annotations(beats["time"].to_numpy(int), decided.sample, int(WINDOW_S * decided.fs))
    words = np.array([DECISIONS[symbol] for symbol in decided.symbol])
    found = np.full(len(beats), "not found", dtype=object)
    found[match.matched_ref_inds] = words[match.matched_test_inds]
    classes = pd.Categorical(beats["symbol"].map(records.CLASS_OF_SYMBOL), list("NSVFQ"))
    table = pd.crosstab(classes, pd.Categorical(found, [*DECISIONS.values(), "not found"]), dropna=False)
    extra = np.delete(words, match.matched_test_inds)
    return table, len(extra), int((extra == "abnormal").sum())


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", help="path of the annotated record, without ending")
    parser.add_argument("decisions", help="path of the .fhe file, without ending")
    parser.add_argument("--minutes", type=cli.positive_float, default=np.inf, help="compare the first minutes only")
    args = parser.parse_args(argv)
    table, extra, extra_abnormal = compare(args.record, args.decisions, args.minutes)
    abnormal, normal = table.loc[list("SVF")].sum(), table.loc["N"]
    print(table.rename_axis(index="annotated as", columns="").to_string())
    print(f"decisions where no beat is annotated: {extra}, {extra_abnormal} of them abnormal")
    sensitivity, specificity = abnormal["abnormal"] / abnormal.sum(), normal["normal"] / normal.sum()
    alarms = table["abnormal"].drop("Q").sum() + extra_abnormal
    print(f"abnormal beats found: {sensitivity:.1%}; normal ones decided normal: {specificity:.1%}", end="; ")
    balanced, right = (sensitivity + specificity) / 2, abnormal["abnormal"] / alarms
    print(f"balanced accuracy {balanced:.1%}; alarms that are right: {right:.1%}")


if __name__ == "__main__":
    cli.run(main)
