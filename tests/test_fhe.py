"""Step 5: really encrypted runs of a small network, and the plain functions around them."""

from __future__ import annotations

import numpy as np
import openpyxl
import pandas as pd
import pytest
from conftest import refusal, small_network

import fhe_experiments as step5
import preprocess_mitbih as pre
from fhe_mlp import circuit, experiment
from fhe_mlp.results import PUBLISHED_COLUMNS


@pytest.fixture(scope="module")
def results(arrays, tmp_path_factory):
    """The command on one small network, two bit widths, two batches; p_error so small that nothing may differ."""
    folder = tmp_path_factory.mktemp("fhe")
    model = small_network(folder / "small.onnx")
    options = ["--bits", "2", "5", "--batches", "2", "--start-batch", "3", "--samples", "3", "--p-error", str(2.0**-40)]
    step5.main(["--data-dir", str(arrays), "--workdir", str(folder), "--models", str(model), *options])
    return folder


def test_encrypted_decisions_equal_the_quantized_clear_ones(results, arrays):
    labels = pre.load_arrays(arrays)["test"][1]
    for batch in (3, 4):
        sheets = pd.read_excel(results / f"results_batch_{batch}.xlsx", sheet_name=None)
        rows, predictions = sheets["results"], sheets["predictions"]
        assert list(rows.columns[:15]) == PUBLISHED_COLUMNS
        assert list(rows["q_bits"]) == [2, 5]
        assert (rows["status"] == "ok").all()
        assert (rows["pbs"] == 5).all()
        assert (rows["decisions_equal_clear"] == rows["num_items"]).all()
        assert (rows["num_items"] == 3).all()
        positive = ["compile_time", "keygen_time", "encrypt_seconds", "run_seconds", "decrypt_seconds", "complexity"]
        positive += ["evaluation_keys_MB", "secret_keys_kB", "input_ciphertext_kB", "output_ciphertext_kB"]
        assert (rows[positive] > 0).all(axis=None)
        assert len(predictions) == 6
        assert (predictions["decision_fhe"] == predictions["decision_clear"]).all()
        assert predictions["test_row"].between(50 * batch, 50 * batch + 49).all()
        np.testing.assert_array_equal(predictions["label"], labels[predictions["test_row"]])
        for _, row in rows.iterrows():
            mine = predictions[predictions["q_bits"] == row["q_bits"]]
            assert row["accuracy_fhe"] == pytest.approx((mine["decision_fhe"] == mine["label"]).mean())
            assert row["perc_ones_pred_fhe"] == pytest.approx(100 * mine["decision_fhe"].mean())
            assert row["perc_ones_gt"] == pytest.approx(100 * mine["label"].mean())
            assert row["fhe_time"] == pytest.approx(
                mine[["encrypt_seconds", "run_seconds", "decrypt_seconds"]].to_numpy().sum(), rel=1e-4
            )
            assert row["accuracy_fhe_low95"] < row["accuracy_fhe"] + 1e-9
            assert row["accuracy_fhe"] - 1e-9 < row["accuracy_fhe_high95"]
        settings = dict(sheets["settings"].to_numpy())
        assert settings["p_error"] == 2.0**-40
        assert settings["concrete-ml"] == "1.9.0"
    sheet = openpyxl.load_workbook(results / "results_batch_3.xlsx")["results"]
    assert sheet.freeze_panes == "B2"
    assert sheet["G2"].number_format == "0.0000"
    assert (results / "fhe_frontier.png").read_bytes().startswith(b"\x89PNG")


def test_clear_accuracy_is_that_of_the_quantized_network_on_the_whole_test_set(results, arrays):
    data = pre.load_arrays(arrays)
    model = circuit.without_sigmoid(circuit.load_network(results / "small.onnx"))
    calibration = data["train"][0][np.random.default_rng(42).permutation(3000)[: step5.CALIBRATION_ROWS]]
    module = circuit.compile_network(model, 5, calibration, circuit.Setting(step5.ROUNDING_BITS, 2.0**-40, 0.0))
    accuracy = np.mean((circuit.outputs(module, data["test"][0], "disable") > 0) == data["test"][1])
    rows = pd.read_excel(results / "results_batch_3.xlsx")
    assert rows.loc[1, "accuracy_clear_test_set"] == pytest.approx(accuracy, abs=1e-9)
    assert rows.loc[1, "test_set_rows"] == len(data["test"][1])


def test_what_is_too_dear_or_cannot_compile_is_a_row(arrays, tmp_path, monkeypatch):
    model = small_network(tmp_path / "small.onnx")
    common = ["--data-dir", str(arrays), "--workdir", str(tmp_path), "--models", str(model), "--samples", "1"]
    compile_network = experiment.compile_network

    def fails_at_three(network, bits, *rest):
        if bits == 3:
            raise RuntimeError("NoParametersFound\nsecond line")
        if bits == 5:
            raise AssertionError
        return compile_network(network, bits, *rest)

    monkeypatch.setattr(experiment, "compile_network", fails_at_three)
    step5.main([*common, "--bits", "2", "3", "5", "--max-seconds", "0.0001"])
    rows = pd.read_excel(tmp_path / "results_batch_0.xlsx").set_index("q_bits")
    assert list(rows["status"]) == ["too slow", "cannot compile", "cannot compile"]
    assert rows.loc[5, "reason"] == "AssertionError"
    assert "--max-seconds" in rows.loc[2, "reason"]
    assert rows.loc[3, "reason"] == "NoParametersFound"
    assert rows["accuracy_fhe"].isna().all()
    assert rows.loc[2, "accuracy_clear_test_set"] > 0


def test_keys_that_memory_cannot_hold_are_not_made(monkeypatch):
    import psutil

    class Memory:
        available = 10e9

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory)
    for megabytes, status in ((8800, "ok"), (11000, "too large")):
        facts = {"status": "ok", "predicted_memory_MB": megabytes}
        experiment.judge_memory(facts)
        assert facts["status"] == status
    assert facts["reason"] == "needs about 11.0 GB of memory, 10.0 GB are free"


def test_what_breaks_while_running_is_a_row_and_what_was_finished_stays(arrays, tmp_path, monkeypatch):
    model = small_network(tmp_path / "small.onnx", widths=(32, 2, 1))
    common = ["--data-dir", str(arrays), "--workdir", str(tmp_path), "--models", str(model), "--samples", "2"]
    run_encrypted, calls = experiment.run_encrypted, []

    def breaks_at_the_second_network(module, row):
        calls.append(row)
        if len(calls) == 3 + 2:  # the first configuration and its warm-up, a sample of the second
            raise MemoryError
        if len(calls) == 3 + 3:
            raise KeyboardInterrupt
        return run_encrypted(module, row)

    monkeypatch.setattr(experiment, "run_encrypted", breaks_at_the_second_network)
    with pytest.raises(KeyboardInterrupt):
        step5.main([*common, "--bits", "2", "3", "4", "--batches", "1"])
    rows = pd.read_excel(tmp_path / "results_batch_0.xlsx").set_index("q_bits")
    assert list(rows.index) == [2, 3]
    assert rows.loc[2, "status"] == "ok"
    assert rows.loc[3, "status"] == "failed"
    assert rows.loc[3, "reason"] == "MemoryError"


def test_the_reference_keeps_the_sigmoid_and_does_not_round(arrays, tmp_path):
    model = small_network(tmp_path / "small.onnx", widths=(32, 2, 1))
    common = [
        "--data-dir",
        str(arrays),
        "--workdir",
        str(tmp_path),
        "--models",
        str(model),
        "--samples",
        "1",
        "--bits",
        "2",
    ]
    step5.main([*common, "--reference"])
    sheets = pd.read_excel(tmp_path / "results_batch_0.xlsx", sheet_name=None)
    assert sheets["results"].loc[0, "pbs"] == 3  # two ReLU and the sigmoid
    assert sheets["predictions"]["output_clear"].between(0, 1).all()
    assert sheets["results"].loc[0, "outputs_equal_clear"] == 1  # without rounding the encrypted output is exact
    settings = dict(sheets["settings"].to_numpy())
    assert sheets["results"].loc[0, "way"] == "plain"
    assert pd.isna(sheets["results"].loc[0, "rounding_bits"])
    assert settings["p_error"] == 2.0**-40


def test_logit_decides_as_the_probability_does(tmp_path):
    import onnxruntime

    model = circuit.load_network(small_network(tmp_path / "small.onnx"))
    X = np.random.default_rng(0).normal(size=(200, 32)).astype(np.float32)

    def outputs(graph):
        return onnxruntime.InferenceSession(graph.SerializeToString()).run(None, {"x": X})[0]

    logit, probability = outputs(circuit.without_sigmoid(model)), outputs(model)
    np.testing.assert_allclose(1 / (1 + np.exp(-logit)), probability, atol=1e-6)
    assert model.graph.node[-1].op_type == "Sigmoid"  # the original is left whole


def test_rows_are_drawn_from_their_batch_whatever_else_is_run():
    first = experiment.drawn_rows(7, 50, 10, 1000, 42)
    assert len(set(first)) == 10
    assert first.min() >= 350
    assert first.max() < 400
    np.testing.assert_array_equal(first, experiment.drawn_rows(7, 50, 10, 1000, 42))
    assert list(first) != list(experiment.drawn_rows(7, 50, 10, 1000, 43))
    assert len(experiment.drawn_rows(2, 50, 10, 105, 42)) == 5


def test_wilson_interval_and_medians():
    runs = pd.DataFrame({"label": [1, 0, 1, 1], "decision_fhe": [1, 0, 1, 0], "decision_clear": [1, 0, 1, 1]})
    runs["output_fhe"], runs["output_clear"] = [1.0, -1, 1, -1], [1.0, -1, 1, 1]
    for name in ("encrypt_seconds", "run_seconds", "decrypt_seconds"):
        runs[name] = [1.0, 2, 3, 10]
    runs["input_bytes"] = runs["output_bytes"] = 5000
    row = experiment.encrypted_columns(runs)
    assert row["accuracy_fhe"] == 0.75
    assert row["accuracy_fhe_low95"] == pytest.approx(0.3006, abs=1e-4)
    assert row["accuracy_fhe_high95"] == pytest.approx(0.9544, abs=1e-4)
    assert row["decisions_equal_clear"] == row["outputs_equal_clear"] == 3
    assert row["run_seconds"] == 2.5
    assert row["fhe_time"] == 48
    assert row["input_ciphertext_kB"] == 5


def test_bad_input_is_refused_before_anything_is_written(arrays, tmp_path, capsys):
    common = ["--data-dir", arrays, "--workdir", tmp_path]

    def refused(*options):
        return refusal(step5.main, [*common, *options], capsys)

    assert "h5_onnx_converter.py" in refused()
    good = small_network(tmp_path / "good.onnx")
    assert "not found" in refused("--models", good, tmp_path / "none.onnx")
    whole = good.read_bytes()
    for name, content in (("cut", whole[: len(whole) // 2]), ("text", b"hello"), ("empty", b"")):
        (tmp_path / f"{name}.onnx").write_bytes(content)
        assert f"{name}.onnx" in refused("--models", good, tmp_path / f"{name}.onnx")
    assert "features" in refused("--models", small_network(tmp_path / "narrow.onnx", widths=(31, 2, 1)))
    assert "MLP" in refused("--models", small_network(tmp_path / "two.onnx", widths=(32, 2, 2)))
    assert "sigmoid" in refused("--models", small_network(tmp_path / "tanh.onnx", last="Tanh"))
    holes = small_network(tmp_path / "nan.onnx", edit=lambda w: {**w, "w0": w["w0"] * np.nan})
    assert "NaN" in refused("--models", holes)
    assert "batch 99 does not exist" in refused("--models", good, "--start-batch", "99")
    assert "--bits" in refused("--models", good, "--bits", "1")
    assert "--rounding-bits" in refused("--models", good, "--rounding-bits", "9")
    assert "--max-seconds" in refused("--models", good, "--max-seconds", "nan")
    assert "same name" in refused("--models", good, good)
    assert "--p-error" in refused("--models", good, "--p-error", "1.5")
    for other in (["--dry-run"], ["--scheduler", "local:1"]):
        assert "--export" in refused("--models", good, "--export", tmp_path / "new", *other)
    assert "none.onnx" in refused("--models", tmp_path / "none.onnx", "--workdir", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert "preprocess_mitbih.py" in refused("--data-dir", tmp_path)
    assert not list(tmp_path.glob("*.xlsx")) + list(tmp_path.glob("*.png"))
