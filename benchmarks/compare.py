"""Compare the decisions of client.py decrypt with a record's annotations: which beats were found, and decided rightly.

    python benchmarks/compare.py data/mitdb/233 demo/client/233 --minutes 5

reads the record of the first folder and 233.fhe.csv of the second, which must be decisions on its signal. A beat is
found if a decision lies within 150 ms of it.
Abnormal are the classes S, V and F; beats of class Q are counted, but enter no figure.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from wfdb.processing import compare_annotations

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fhe_mlp import cli, ecg
from fhe_mlp.deployment import decisions, recordings

WINDOW_S = 0.15  # EC57's match window


def compare(record: str, answers: str, minutes: float = np.inf) -> tuple[pd.DataFrame, pd.Series]:
    """Return the first `minutes` of beats by class and decision, or "not found", and the decisions without a beat.

    Raises InputError for decisions on another recording.
    """
    decided = pd.read_csv(f"{answers}.fhe.csv", dtype={"recording": str})
    signal, fs, _ = recordings.read_signal(Path(record), None)
    if set(decided.get("recording", ())) != {recordings.identify(signal, fs, decided["sample"])}:
        raise cli.InputError(f"{answers}.fhe.csv: are decisions on another recording than {record}")
    annotations, _ = ecg.read_annotations(record, fs)
    beats = annotations[annotations["symbol"].isin(list(ecg.CLASS_OF_SYMBOL))]
    beats = beats[beats["time"] < minutes * 60 * fs]
    match = compare_annotations(beats["time"].to_numpy(int), decided["sample"].to_numpy(), int(WINDOW_S * fs))
    words = decided["decision"]
    outcome = np.full(len(beats), "not found", dtype=object)
    outcome[match.matched_ref_inds] = words[match.matched_test_inds]
    classes = pd.Categorical(beats["symbol"].map(ecg.CLASS_OF_SYMBOL), list(ecg.AAMI_CLASSES))
    table = pd.crosstab(classes, pd.Categorical(outcome, [*decisions.WORDS.values(), "not found"]), dropna=False)
    return table.rename_axis(index="annotated as", columns=""), words.drop(match.matched_test_inds)


def main(argv: list[str] | None = None) -> None:
    """Compare, and print table and figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", help="path of the annotated record, without ending")
    parser.add_argument("decisions", help="path of the .fhe.csv file, without ending")
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
