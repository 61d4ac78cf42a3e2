"""Workbooks and pictures: what they show."""

from __future__ import annotations

import itertools
import json

import openpyxl
import pandas as pd
import pytest

from fhe_mlp import ec57, pictures, report, steps
from fhe_mlp.cli import InputError


def run(identity, batch, seconds=1.0, right=1):
    facts = {"identity": identity, "batch": batch, "label": 1, "decision_fhe": right, "decision_clear": 1}
    facts |= {"output_fhe": 1.0, "output_clear": 1.0, "encrypt_seconds": 0.0, "decrypt_seconds": 0.0}
    return facts | {"input_bytes": 1000, "output_bytes": 1, "run_seconds": seconds}


def configuration(name, batch=0, **facts):
    base = {"model_name": name, "q_bits": 3, "identity": name, "status": "ok", "complexity": 1e9, "cores": 2}
    base |= {
        "balanced_accuracy_validation": 0.9,
        "balanced_accuracy_test_set": 0.9,
        "test_set_rows": 10,
        "processor": "fast",
    }
    return {**base, "batch": batch, **facts}


def test_front_holds_what_nothing_of_lower_or_the_same_cost_equals():
    cost = pd.Series([1.0, 2, 2, 3, 4, 5], index=list("abcdef"))
    accuracy = pd.Series([0.9, 0.95, 0.96, 0.96, 0.93, 0.99], index=list("abcdef"))
    assert list(report.pareto(cost, accuracy)[lambda on: on].index) == ["a", "c", "f"]


def test_wilson_interval_and_medians():
    runs = pd.DataFrame([run("a", 0, s, r) for s, r in ((1.0, 1), (2, 1), (3, 1), (10, 0))])
    runs["output_fhe"] = [1.0, 1, 1, -1]
    row = report.encrypted_columns(runs)
    assert row["accuracy_fhe"] == 0.75
    assert row["accuracy_fhe_low95"] == pytest.approx(0.3006, abs=1e-4)
    assert row["accuracy_fhe_high95"] == pytest.approx(0.9544, abs=1e-4)
    assert row["decisions_equal_clear"] == row["outputs_equal_clear"] == 3
    assert (row["run_seconds"], row["fhe_time"], row["input_ciphertext_kB"]) == (2.5, 16, 1)


def test_times_of_unlike_machines_are_not_averaged():
    rows = pd.DataFrame([configuration("m", b, processor=p) for b, p in enumerate(("fast", "fast", "slow"))])
    predictions = pd.DataFrame([run("m", b, s) for b, s in ((0, 1.0), (1, 2.0), (2, 9.0))])
    summary = report.summarize(rows, predictions, 1e12).set_index("processor")
    assert summary["run_seconds"].to_dict() == {"fast": 1.5, "slow": 9}
    assert list(summary["n"]) == [2, 1]
    assert summary["on_front"].all()
    assert (summary["complexity_ratio_default_ptq"] == 1000).all()
    seconds = report.pivots(summary.reset_index())["seconds by bits"]
    assert seconds[["processor", "3 bits"]].to_numpy().tolist() == [["fast", 1.5], ["slow", 9]]


def test_a_configuration_that_failed_everywhere_is_in_the_summary():
    rows = pd.DataFrame([{"identity": "a", "batch": 0, "model_name": "m", "q_bits": 2, "status": "failed"}])
    summary = report.summarize(rows, pd.DataFrame(columns=["identity", "batch"]), float("nan"))
    assert summary[["model_name", "status"]].to_numpy().tolist() == [["m", "failed"]]
    assert not summary["on_front"].any()


NAMES = ["NA", "null", "007", "1e3", "=1+1", "a\x01b", "@x", " ", "-1"]


def test_names_stay_the_text_they_are(tmp_path):
    rows = pd.DataFrame([configuration(name, reason="=cmd()") for name in NAMES])
    report.write_batch(tmp_path / "b.xlsx", rows, pd.DataFrame(columns=["identity"]), {"=2": "=3"})
    book = openpyxl.load_workbook(tmp_path / "b.xlsx")
    cells = [row[0] for row in book["results"].iter_rows(min_row=2)]
    assert [cell.value for cell in cells] == [name.replace("\x01", "?") for name in NAMES]
    assert "f" not in {cell.data_type for sheet in book for row in sheet.iter_rows() for cell in row}  # no formula


def test_a_workbook_is_fit_to_be_read_and_printed(tmp_path):
    table = pd.DataFrame({"model_name": ["m", "n"], "accuracy_fhe": [0.98765, None], "complexity": [2.5e9, 3e9]})
    table["reason"] = ["x" * 150, ""]
    report.write_workbook(tmp_path / "w.xlsx", {"one": table, "empty": table[:0]})
    sheet = openpyxl.load_workbook(tmp_path / "w.xlsx")["one"]
    assert sheet.freeze_panes == "B2"
    assert [sheet.cell(2, k).number_format for k in (2, 3)] == ["0.0000", "0.00E+00"]
    assert sheet.row_dimensions[2].height == 3 * report.LINE_POINTS  # 150 characters in lines of 60
    assert sheet.page_setup.orientation == "landscape"
    assert list(tmp_path.iterdir()) == [tmp_path / "w.xlsx"]


def test_the_picture_draws_accuracies_where_they_are(tmp_path, monkeypatch):
    summary = report.summarize(
        pd.DataFrame(
            [configuration("m", balanced_accuracy_test_set=0.998), configuration("n", balanced_accuracy_test_set=1.0)]
        ),
        pd.DataFrame([run("m", 0), run("n", 0)]),
        float("nan"),
    )
    others = pd.DataFrame(
        [{"name": "other", "kind": "CKKS", "balanced_accuracy": 0.97, "complexity": None, "seconds": 0.5}],
        columns=report.COMPARISON_COLUMNS,
    )
    drawn = []
    monkeypatch.setattr(report, "save_figure", lambda figure, path: drawn.append(figure))
    report.plot_frontier(summary, others, tmp_path / "f.png")
    left, right = drawn[0].axes
    heights = [y for points in left.collections for y in points.get_offsets()[:, 1]]
    assert sorted(heights) == [0.998, report.DRAWN[1]]
    assert 0.97 in [y for points in right.collections for y in points.get_offsets()[:, 1]]
    low, high = right.get_ylim()
    assert low < 0.97
    assert high > report.DRAWN[1]


def test_networks_of_two_folders_stand_side_by_side_by_what_was_removed(tmp_path, monkeypatch):
    def results(accuracy, rank, patients):
        folder = tmp_path / patients
        folder.mkdir()
        found = dict.fromkeys(ec57.FIGURES, accuracy) | {"interval95": {"balanced_accuracy": [0.6, 0.95]}}
        (folder / "MLP_model_0_metrics.json").write_text(json.dumps({"test": found}))
        rates = {"rates": [{"rate_percent": 90, "test_balanced_accuracy": accuracy - 0.01}]}
        (folder / "dynamic_pruning_metrics.json").write_text(json.dumps(rates))
        name = f"pruned_model_top_{rank}_prune_90_acc_0.9876"
        summary = pd.DataFrame([configuration(name, balanced_accuracy_test_set=accuracy - 0.02, accuracy_fhe=1.0)])
        table = steps.steps_table(folder, summary, patients)
        table.to_csv(folder / steps.STEPS, index=False)
        return folder, table

    (_, known), (folder, unseen) = results(0.9, 1, "known patients"), results(0.8, 3, "unseen patients")
    joined = steps.side_by_side([known, steps.read_steps(folder)]).set_index("network")
    assert list(joined.index) == ["baseline", "90 % of neurons removed", "90 % of neurons removed, 3 bits"]
    assert joined["balanced_accuracy, known patients"].to_list() == pytest.approx([0.9, 0.89, 0.88])
    assert joined["balanced_accuracy, unseen patients"].to_list() == pytest.approx([0.8, 0.79, 0.78])
    assert joined["accuracy_fhe, unseen patients"].to_list()[2] == 1
    drawn = []
    monkeypatch.setattr(steps, "save_figure", lambda figure, path: drawn.append(figure))
    steps.plot_steps([known, unseen], tmp_path / "s.png")
    heights = sorted(y for container in drawn[0].axes[0].containers for y in container.lines[0].get_ydata())
    assert heights == pytest.approx([78, 79, 80, 88, 89, 90])
    assert not len(
        steps.side_by_side([steps.steps_table(tmp_path, pd.DataFrame(columns=["balanced_accuracy_test_set"]), "x")])
    )
    (folder / steps.STEPS).write_text("a,b\n1,2\n")
    for damaged in (folder, tmp_path):
        with pytest.raises(InputError, match="fhe_steps.csv: .*; make it with: python fhe_experiments.py"):
            steps.read_steps(damaged)


def test_names_in_the_frontier_picture_lie_inside_and_clear_of_each_other():
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots()
    axis.set(xlim=(0, 10), ylim=(0, 10))
    pictures.label_points(axis, [f"name of number {k}" for k in range(5)], [9.9, 9.9, 0.1, 0.1, 0.1], [5, 5, 5, 5, 5.1])
    boxes = [note.get_window_extent() for note in axis.texts if note.get_visible()]
    assert len(boxes) == 5
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    edge = axis.get_window_extent()
    assert all(edge.x0 <= box.x0 and box.x1 <= edge.x1 for box in boxes)
    plt.close(figure)
