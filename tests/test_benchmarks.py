"""The measuring programs: rivals decide encrypted as cleartext, counts are those by hand, a table is reproduced."""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, make_record

sys.path.insert(0, str(ROOT / "benchmarks"))

import bench
import compare
import measure_pbs

from fhe_mlp import cli, networks, quantized
from fhe_mlp.dataset import load_dataset
from fhe_mlp.deployment import recordings

DRAWN = 12  # test rows that run encrypted


@pytest.fixture
def data(arrays, monkeypatch):
    monkeypatch.setattr(bench, "SAMPLES", DRAWN)
    networks.start_tensorflow(0)
    return load_dataset(arrays)


def test_a_packed_linear_network_decides_encrypted_as_cleartext(arrays, data, monkeypatch):
    monkeypatch.setattr(bench, "MAPS", ("fourier:64",))
    monkeypatch.setattr(bench, "LINEAR_EPOCHS", 2)
    baseline = networks.MLP([(np.zeros((32, 1), np.float32), np.zeros(1, np.float32))], noise=0.1)
    targets = data.train.y.astype(np.float32)
    row = bench.measure(*bench.packed_linear(arrays, baseline, targets, 0), data)
    assert row["balanced_accuracy"] > 0.85
    assert row["n"] == row["decisions_equal_clear"] == DRAWN + 16  # one by one, and a payload
    assert row["client_computes"] == "a public map to 64 numbers"
    assert 5 < row["down_kB"] < row["up_kB"] < 20


def test_ckks_decides_as_cleartext_one_beat_at_a_time_and_packed(data, monkeypatch):
    pytest.importorskip("tenseal")
    import ckks

    monkeypatch.setattr(ckks, "EPOCHS", 2)
    monkeypatch.setattr(bench, "MOST_SECONDS", 0)  # no second beat
    single, packed = (bench.measure(model, data) for model in bench.ckks_models(data, 0.1, 0))
    assert single["n"] == single["decisions_equal_clear"] == 1
    assert packed["n"] == ckks.SLOTS
    assert packed["decisions_equal_clear"] >= 0.99 * packed["n"]
    assert packed["beats_per_second"] > 0 and "seconds" not in packed  # of a beat, which packing does not have
    assert packed["up_kB"] < single["up_kB"] / 50


def test_a_model_of_concrete_ml_decides_encrypted_as_cleartext(data):
    models = dict(zip(range(1), bench.library_models(data, 0.1, 0)))  # the first needs no bootstrap
    row = bench.measure(models[0], data)
    assert row["balanced_accuracy"] > 0.85
    assert row["n"] == row["decisions_equal_clear"] == DRAWN


def test_decisions_are_compared_with_the_annotations_of_their_beats(tmp_path):
    samples = make_record(tmp_path, "r", symbols=list("NNVNA/NN"))
    decided = np.append(samples[:5], samples[5] + 100)  # of the first five of the eight beats, and of none
    identity = recordings.identify(recordings.read_signal(tmp_path / "r", None)[0], 360.0, decided)
    words = ["not classified", "abnormal", "abnormal", "normal", "normal", "abnormal"]
    table = pd.DataFrame({"recording": identity, "sample": decided, "decision": words})
    table.to_csv(tmp_path / "r.fhe.csv", index=False)
    table, unmatched = compare.compare(str(tmp_path / "r"), str(tmp_path / "r"))
    assert table.loc["N"].to_dict() == {"normal": 1, "abnormal": 1, "not classified": 1, "not found": 2}
    assert table.loc["S"].to_dict() == {"normal": 1, "abnormal": 0, "not classified": 0, "not found": 0}
    assert table.loc["V", "abnormal"] == table.loc["Q", "not found"] == 1
    assert list(unmatched) == ["abnormal"]
    first, _ = compare.compare(str(tmp_path / "r"), str(tmp_path / "r"), minutes=(samples[1] + 1) / 360 / 60)
    assert first.to_numpy().sum() == 2
    make_record(tmp_path, "other", symbols=list("NNVNA/NN"), seed=1)
    with pytest.raises(cli.InputError, match="decisions on another recording"):
        compare.compare(str(tmp_path / "other"), str(tmp_path / "r"))


def test_the_shipped_complexities_are_reproduced():
    table = pd.read_csv(quantized.COSTS, comment="#")
    known = table.query("p_error == 2**-6 and rounding_bits == 6 and output_bits == 9")
    assert [measure_pbs.measure(2.0**-6, 6, 9)] == list(known.itertuples(index=False, name=None))
