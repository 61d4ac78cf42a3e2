"""The database of step 5's results, and the workbooks and pictures that are written from it."""

from __future__ import annotations

import csv
import itertools
import json

import numpy as np
import openpyxl
import pandas as pd
import pytest
from conftest import ROOT

from fhe_mlp import ecg
from fhe_mlp.cli import InputError
from fhe_mlp.experiments import figures, report, workbooks
from fhe_mlp.experiments.results import LAYOUT, RUN_COLUMNS, Results


def configuration(name, **facts):
    """Facts of a configuration, as the database stores them."""
    base = {"identity": name, "model_name": name, "q_bits": 3, "status": "ok", "complexity": 1e9}
    base |= {"balanced_accuracy_validation": 0.9, "balanced_accuracy_test_set": 0.9, "test_set_rows": np.int64(10)}
    return {**base, **facts}


def run(test_row=0, seconds=1.0, beats=1, **more):
    """A test row that ran encrypted."""
    row = dict.fromkeys(RUN_COLUMNS[2:], 0.5) | {"test_row": test_row, "run_seconds": seconds, "beats": beats}
    return {**row, "processor": "fast", "cores": 2, **more}


def described(identity, right=1, batch=0, **more):
    """The same, with what the report adds."""
    known = {"identity": identity, "model_name": identity, "q_bits": 3, "batch": batch, "label": 1, "aami": "V"}
    known |= {"record": "100", "decision_fhe": right, "decision_clear": 1, "output_clear": 0.5}
    return run(**more) | known


# The database


def test_what_is_added_is_there_after_reopening_in_the_order_asked_for(tmp_path):
    with Results(tmp_path / "r.sqlite") as results:
        results.add(configuration("b"), np.arange(3.0), [run(7), run(3)])
        results.add(configuration("a", status="failed"))
        results.add(configuration("a"), runs=[run(2)])  # in place of the first attempt
        results.add(configuration("b", more=1), runs=[run(7, seconds=2.0)])
        for accuracy in (0.1, 0.2):
            results.compare("x", {"name": "other", "accuracy": np.float64(accuracy)})
    with Results(tmp_path / "r.sqlite", write=False) as results:
        assert [f["identity"] for f in results.facts(["a", "b", "c"])] == ["a", "b"]
        assert [f["status"] for f in results.facts(["a"])] == ["ok"]
        runs = results.runs(["b", "a"])
        assert runs[["identity", "test_row", "run_seconds"]].to_numpy().tolist() == [
            ["b", 3, 1],
            ["b", 7, 2],
            ["a", 2, 1],
        ]
        assert results.clear("b").tolist() == [0, 1, 2]
        assert results.clear("a") is None
        assert results.comparison("x")["accuracy"].tolist() == [0.2]
        assert results.comparison("y").empty


@pytest.mark.parametrize(
    "content", [b"hello, this is no database" * 100, b"SQLite format 3\x00" + bytes(4000), LAYOUT - 1]
)
def test_a_file_that_is_no_database_of_this_layout_is_refused_and_stays(tmp_path, content):
    path = tmp_path / "r.sqlite"
    assert Results(path, write=False).facts(["a"]) == [] and not path.exists()
    message = "cannot be used as a database"
    if isinstance(content, int):
        message = f"has layout {content}, this program writes layout {LAYOUT}"
        with Results(path) as results:
            results.connection.execute(f"PRAGMA user_version = {content}")
    else:
        path.write_bytes(content)
    before = path.read_bytes()
    for write in (True, False):
        with pytest.raises(InputError, match=message):
            Results(path, write)
    assert path.read_bytes() == before


def test_a_full_disk_is_one_line_and_what_was_there_stays_and_no_half_is_added(tmp_path):
    with Results(tmp_path / "r.sqlite") as results:
        results.add(configuration("a"))
        (pages,) = results.connection.execute("PRAGMA page_count").fetchone()
        results.connection.execute(f"PRAGMA max_page_count = {pages + 2}")  # SQLite's own way to run out of space
        with pytest.raises(InputError, match="cannot be written .*full"):
            results.add(configuration("b"), runs=[run(row) for row in range(1000)])
        assert [facts["identity"] for facts in results.facts(["a", "b"])] == ["a"]
        results.connection.execute("INSERT INTO configurations VALUES ('b', '{}', NULL)")  # the process ends before
    with Results(tmp_path / "r.sqlite") as results:
        assert [facts["identity"] for facts in results.facts(["a", "b"])] == ["a"]
        assert results.runs(["a", "b"]).empty


# Tables


def test_the_interval_is_that_of_the_agreement_and_times_are_those_of_beats_alone():
    runs = [described("a", right, seconds=s) for s, right in ((1.0, 1), (2, 1), (3, 1), (10, 0))]
    runs = pd.DataFrame([*runs, described("a", seconds=0.25, beats=4)])
    runs.loc[0, "label"] = 0
    row = report.encrypted_columns(runs)
    assert row["accuracy_fhe"] == 0.6
    assert (row["decisions_equal_clear"], row["agreement"]) == (4, 0.8)
    assert row["agreement_low95"] == pytest.approx(0.3755, abs=1e-4)
    assert row["agreement_high95"] == pytest.approx(0.9638, abs=1e-4)
    assert (row["run_seconds"], row["run_seconds_iqr"], row["run_seconds_grouped"]) == (2.5, 3, 0.25)
    assert row["fhe_time"] == pytest.approx(16.25 + 5)


def test_times_of_unlike_machines_are_not_averaged():
    runs = [("fast", 1.0), ("fast", 2.0), ("slow", 9.0)]
    runs = pd.DataFrame([described("m", batch=b, processor=p, seconds=s) for b, (p, s) in enumerate(runs)])
    summary = report.summarize(pd.DataFrame([configuration("m")]), runs)
    assert summary.set_index("processor")["run_seconds"].to_dict() == {"fast": 1.5, "slow": 9}
    assert summary[["n", "batches"]].to_numpy().tolist() == [[2, 2], [1, 1]]
    assert summary["on_front"].all()
    seconds = report.pivots(summary)["seconds by bits"]
    assert seconds[["processor", "3 bits"]].to_numpy().tolist() == [["fast", 1.5], ["slow", 9]]


def test_a_summary_is_sorted_by_cost_model_and_bits_and_holds_what_failed():
    facts = [configuration(f"m{n}{b}", model_name=f"m{n}", q_bits=b, complexity=0) for b in (3, 2) for n in (2, 1)]
    facts = [{"identity": "x", "model_name": "x", "q_bits": 2, "status": "failed"}, *facts]
    summary = report.summarize(pd.DataFrame(facts), pd.DataFrame([described("m13")]))
    assert summary["identity"].tolist() == ["m12", "m13", "m22", "m23", "x"]
    assert summary["on_front"].sum() == 1  # of equal ones
    only_failed = report.summarize(pd.DataFrame(facts[:1]), pd.DataFrame([described("m13")]))
    assert only_failed[["model_name", "status", "on_front"]].to_numpy().tolist() == [["x", "failed", False]]


def test_front_holds_what_nothing_of_lower_or_the_same_cost_equals():
    points = {"a": (1, 0.9), "b": (2, 0.95), "c": (2, 0.96), "d": (3, 0.96), "e": (4, 0.93), "f": (5, 0.99)}
    facts = [configuration(n, complexity=c, balanced_accuracy_validation=a) for n, (c, a) in points.items()]
    facts[5] |= {"noisy_balanced_accuracy_validation": 0.97, "balanced_accuracy_validation": 0.1}  # the first counts
    summary = report.summarize(pd.DataFrame(facts), pd.DataFrame([described("a")]))
    assert summary["identity"][summary["on_front"]].tolist() == ["a", "c", "f"]


def metrics(folder, accuracy):
    """Write what steps 1 and 3 do, and return the table that step 5 makes of them and of one network."""
    folder.mkdir(parents=True)
    found = dict.fromkeys(ecg.FIGURES, accuracy) | {"interval95": {"balanced_accuracy": [0.6, 0.95]}}
    (folder / "MLP_model_0_metrics.json").write_text(json.dumps({"test": found}))
    rates = {"rates": [{"rate_percent": 90, "test_balanced_accuracy": accuracy - 0.01}]}
    (folder / "dynamic_pruning_metrics.json").write_text(json.dumps(rates))
    name = "pruned_model_top_1_prune_90_acc_0.9876"
    summary = pd.DataFrame([configuration(name, balanced_accuracy_test_set=accuracy - 0.02, agreement=1.0)])
    table = report.steps_table(folder, summary, "known patients")
    table.to_csv(folder / report.STEPS, index=False)
    return table


@pytest.mark.parametrize(("one", "other"), [("plain", "packed"), ("a/results", "b/results")])
def test_networks_of_any_two_folders_stand_side_by_side(tmp_path, monkeypatch, one, other):
    tables = [metrics(tmp_path / folder, accuracy) for folder, accuracy in ((one, 0.9), (other, 0.8))]
    name, beside = report.read_beside(tmp_path / one, tmp_path / other)
    shown = {name: tables[0], **beside}
    assert list(shown) == ([one, other] if one == "plain" else [str(tmp_path / one), str(tmp_path / other)])
    joined = report.side_by_side(shown).set_index("network")
    assert list(joined.index) == ["baseline", "90 % of neurons removed", "90 % of neurons removed, 3 bits"]
    for name, first in zip(shown, (0.9, 0.8)):
        accuracies = joined[f"balanced_accuracy, {name}"].to_list()
        assert accuracies == pytest.approx([first, first - 0.01, first - 0.02])
        assert joined[f"agreement, {name}"].to_list()[2] == 1
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: drawn.append(figure))
    figures.plot_steps(shown, tmp_path / "s.png")
    heights = sorted(y for container in drawn[0].axes[0].containers for y in container.lines[0].get_ydata())
    assert heights == pytest.approx([78, 79, 80, 88, 89, 90])
    assert f"{next(iter(shown))} (known patients), float" in drawn[0].axes[0].get_legend_handles_labels()[1]
    (tmp_path / other / report.STEPS).write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="fhe_steps.csv: .*; make it with: python fhe_experiments.py"):
        report.read_beside(tmp_path / one, tmp_path / other)


# Workbooks and pictures


def test_the_table_of_columns_is_complete():
    _, *rows = csv.reader((ROOT / "fhe_mlp" / "experiments" / "columns.csv").open())
    assert {len(row) for row in rows} == {4}
    assert len({row[0] for row in rows}) == len(rows)
    sheets = {sheet for row in rows for sheet in row[1].split()}
    assert sheets == {"batch", "predictions", "summary", "printed", "comparison", "steps", "class"}
    assert workbooks.number_format("balanced_accuracy, any, folder") == "0.0000"
    assert workbooks.number_format("quantized_val_balanced_accuracy_simulated") == "0.0000"


NAMES = ["NA", "null", "007", "1e3", "=1+1", "a\x01b", "@x", " ", "-1"]


def test_a_workbook_is_fit_to_be_read_and_names_stay_the_text_they_are(tmp_path):
    table = pd.DataFrame({"model_name": NAMES, "accuracy_fhe": [0.98765, None, *[1] * 7], "complexity": 2.5e9})
    table["reason"] = ["x" * 150, "=cmd()", *[""] * 7]
    workbooks.write_workbook(tmp_path / "w.xlsx", {"one": table, "empty": table[:0]})
    book = openpyxl.load_workbook(tmp_path / "w.xlsx")
    sheet = book["one"]
    assert [sheet.cell(row, 1).value for row in range(2, 11)] == [name.replace("\x01", "?") for name in NAMES]
    assert "f" not in {cell.data_type for sheet in book for row in sheet.iter_rows() for cell in row}  # no formula
    assert sheet.freeze_panes == "B2"
    assert [sheet.cell(2, column).number_format for column in (2, 3)] == ["0.0000", "0.00E+00"]
    assert sheet.row_dimensions[2].height == 3 * workbooks.LINE_POINTS  # 150 characters in lines of 60
    assert sheet.page_setup.orientation == "landscape"
    assert list(tmp_path.iterdir()) == [tmp_path / "w.xlsx"]


def test_the_picture_draws_accuracies_where_they_are(tmp_path, monkeypatch):
    facts = [configuration("m", balanced_accuracy_test_set=0.998), configuration("n", balanced_accuracy_test_set=1.0)]
    summary = report.summarize(pd.DataFrame(facts), pd.DataFrame([described("m"), described("n")]))
    others = [{"name": "other", "kind": "CKKS", "balanced_accuracy": 0.97, "complexity": None, "seconds": 0.5}]
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: drawn.append(figure))
    figures.plot_frontier(summary, pd.DataFrame(others), tmp_path / "f.png")
    left, right = drawn[0].axes
    heights = [y for points in left.collections for y in points.get_offsets()[:, 1]]
    assert sorted(heights) == [0.998, figures.DRAWN[1]]
    assert 0.97 in [y for points in right.collections for y in points.get_offsets()[:, 1]]
    low, high = right.get_ylim()
    assert low < 0.97
    assert high > figures.DRAWN[1]


def test_names_in_the_frontier_picture_lie_inside_and_clear_of_each_other():
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots()
    axis.set(xlim=(0, 10), ylim=(0, 10))
    figures.label_points(axis, [f"name of number {k}" for k in range(5)], [9.9, 9.9, 0.1, 0.1, 0.1], [5, 5, 5, 5, 5.1])
    boxes = [note.get_window_extent() for note in axis.texts if note.get_visible()]
    assert len(boxes) == 5
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    edge = axis.get_window_extent()
    assert all(edge.x0 <= box.x0 and box.x1 <= edge.x1 for box in boxes)
    plt.close(figure)
