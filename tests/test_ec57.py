"""Figures of EC57 against numbers by hand, their intervals, and the threshold."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from fhe_mlp import ec57

Y = np.array([0, 0, 0, 0, 1, 1, 1, 1])
DECISION = np.array([0, 0, 0, 1, 1, 1, 1, 0])
BEATS = pd.DataFrame({"record": list("aabbaabc"), "aami": list("NNNNSVVF")})


def test_gross_average_and_by_record_against_numbers_by_hand():
    found = ec57.figures(Y, DECISION, BEATS)
    assert found["counts"] == {"tp": 3, "fn": 1, "fp": 1, "tn": 3}
    for name in (*ec57.FIGURES, "accuracy", "f1"):
        assert found[name] == 0.75
    assert found["found"] == {"S": 1, "V": 1, "F": 0}
    table = ec57.by_record(Y, DECISION, BEATS)
    assert table[["beats", "N", "S", "V", "F"]].to_numpy().tolist() == [
        [4, 2, 1, 1, 0],
        [3, 2, 0, 1, 0],
        [1, 0, 0, 0, 1],
    ]
    assert table["sensitivity"].to_list() == [1, 1, 0]
    assert table.loc[["a", "b"], "specificity"].to_list() == [1, 0.5]
    assert np.isnan(table.loc["c", "specificity"])  # it has no normal beat, and is left out of the average
    average = found["average"]
    assert average == {
        "balanced_accuracy": 0.875,
        "sensitivity": pytest.approx(2 / 3),
        "specificity": 0.75,
        "positive_predictive_value": 0.75,
    }
    assert ec57.columns(found)["found_V"] == 1


def test_intervals_are_of_records_not_of_beats():
    one = pd.DataFrame({"record": np.repeat(list("abcdefghij"), 100), "aami": np.tile(list("NV"), 500)})
    y = (one["aami"] == "V").to_numpy().astype(int)
    wrong = one["record"].isin(["a", "b"]).to_numpy()  # two of ten patients are all wrong
    low, high = ec57.figures(y, np.where(wrong, 1 - y, y), one)["interval95"]["balanced_accuracy"]
    assert (low, high) == (pytest.approx(0.5, abs=0.11), 1.0)
    spread = np.arange(1000) % 5 == 0  # as many wrong beats in every patient
    low, high = ec57.figures(y, np.where(spread, 1 - y, y), one)["interval95"]["balanced_accuracy"]
    assert low == high == pytest.approx(0.8)


def test_the_threshold_leaves_the_usual_one_only_where_the_records_agree():
    rng = np.random.default_rng(0)
    records = np.repeat(list("abcdefghij"), 200)
    y = np.tile([0, 1], 1000)
    clear = np.where(y, 0.3, 0.1) + rng.uniform(-0.05, 0.05, 2000)  # all are told apart at 0.2, none at 0.5
    assert 0.15 <= ec57.choose_threshold(clear, y, records, 0.5) <= 0.25
    some = np.where(records == "a", clear, np.where(y, 0.8, 0.2))  # one patient in ten would have it lower
    assert ec57.choose_threshold(some, y, records, 0.5) == 0.5
    assert ec57.choose_threshold(some, y, records, 0.7) == 0.7
    unknown = np.full(2000, "unknown")
    assert 0.15 <= ec57.choose_threshold(clear, y, unknown, 0.5) <= 0.25
    one = np.where(np.arange(2000) == 1, 0.45, np.where(y, 0.8, 0.2))  # a single beat would have it lower
    assert ec57.choose_threshold(one, y, unknown, 0.5) == 0.5
