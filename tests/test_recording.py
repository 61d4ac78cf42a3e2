"""The client's recordings: WFDB, EDF and .csv to features, and answers to annotations, a table and a picture."""

from __future__ import annotations

import csv
import sys

import numpy as np
import pytest
import wfdb
from conftest import BEAT_COUNT, ROOT, make_record

import preprocess_mitbih as pre
from fhe_mlp.ecg_features import FEATURES
from fhe_mlp.records import EXPECTED_LEADS

sys.path.insert(0, str(ROOT / "fhe_mlp" / "deployment"))
sys.path.append(str(ROOT / "fhe_mlp"))  # of which an export has records.py and ecg_features.py
import answers
import boxes
import client
import recording
from compare import compare

MODEL = {"features": FEATURES, "leads": EXPECTED_LEADS}


def read(path, fs=None, annotator=None, minutes=None, model=MODEL):
    """What encrypt has of a recording."""
    return recording.read_beats(recording.find(path, fs), fs, annotator, minutes, model)


def write_edf(path, signals, rates, names, units, seconds=1.0, kind="", frames=None):
    """Write signals (whole numbers), each at its own rate, as EDF; physical values are a tenth of the digital ones."""
    per_frame, count = [round(rate * seconds) for rate in rates], len(signals)
    held = len(signals[0]) // per_frame[0]
    scale = [[v] * count for v in (-3276.8, 3276.7, -32768, 32767)]
    columns = [names, [""] * count, units, *scale, [""] * count, per_frame, [""] * count]
    start = ("0", 8), ("", 160), ("01.01.2000.00.00", 16), (256 * (count + 1), 8), (kind, 44)
    fields = [*start, (held if frames is None else frames, 8), (seconds, 8), (count, 4)]
    fields += [(cell, width) for table, width in zip(columns, (16, 80, 8, 8, 8, 8, 8, 80, 8, 32)) for cell in table]
    data = np.hstack([x[: held * n].reshape(held, n) for x, n in zip(signals, per_frame)]).astype("<i2")
    path.write_bytes("".join(f"{cell!s:<{width}}" for cell, width in fields).encode("latin-1") + data.tobytes())
    return path


@pytest.mark.parametrize("given", ["r", "r.hea", "r.dat"])
def test_a_record_gives_the_features_of_the_data_set(tmp_path, given):
    samples = make_record(tmp_path, "r")
    X, found = read(tmp_path / given)
    want = pre.read_record(str(tmp_path / "r"))
    np.testing.assert_allclose(X, want["X"], atol=1e-6)
    np.testing.assert_array_equal(np.array(found["samples"])[found["classified"]], want["beats"]["sample"])
    np.testing.assert_array_equal(found["samples"], samples)
    assert found["origin"] == "of r.atr"
    assert found["not_classified"] == {"first or last beat": 2}


def test_edf_and_csv_files_are_read_as_the_record_they_were_written_from(tmp_path):
    make_record(tmp_path, "r", clock=360)
    signal, fs, _ = recording.read_signal(tmp_path / "r", None)
    tenths = np.rint(signal * 10_000).astype(int)  # of a microvolt
    annotations = (np.arange(len(signal) // 36), [5], "EDF Annotations", "")
    columns = [annotations, (tenths[:, 1], 360, "ECG V1", "\xb5V"), (tenths[:, 0], 360, "ECG II", "uV")]
    signals, rates, names, units = zip(*((x, 10 if len(x) < 10**4 else 360, n, u) for x, *_, n, u in columns))
    write_edf(tmp_path / "e.EDF", signals, rates, names, units, seconds=0.5, kind="EDF+C")
    rows = (f"{k / fs:.4f};{b / 10_000:.4f};{a / 10:.1f};x".replace(".", ",") for k, (a, b) in enumerate(tenths))
    (tmp_path / "c.csv").write_text("\n".join(["time (s);V1;MLII [\u00b5V];note", *rows]), encoding="utf-8")
    for path, given_fs, leads in ((tmp_path / "e.EDF", None, ["ECG II", "ECG V1"]), (tmp_path / "c.csv", 360.0, None)):
        again, again_fs, again_leads = recording.read_signal(path, given_fs)
        assert again_fs == 360
        assert again_leads == (leads or ["MLII", "V1"])
        np.testing.assert_allclose(again, signal[: len(again)], atol=1e-4)
        assert len(signal) - len(again) < 180
        path.with_suffix(".atr").write_bytes((tmp_path / "r.atr").read_bytes())
        assert read(path, given_fs)[1]["origin"] == f"of {path.stem}.atr"


def test_an_empty_cell_of_a_table_is_missing_signal(tmp_path):
    make_record(tmp_path, "r", clock=360)
    signal, _, _ = recording.read_signal(tmp_path / "r", None)
    rows = [f"{a:.4f},{b:.4f}" if not 5000 <= k < 5300 else "," for k, (a, b) in enumerate(signal)]
    (tmp_path / "r.csv").write_text("\n".join(["MLII,V1", *rows]))
    assert np.isnan(recording.read_signal(tmp_path / "r.csv", 360.0)[0]).all(axis=1).sum() == 300
    assert read(tmp_path / "r.csv", 360.0)[1]["not_classified"]["signal missing or flat"] > 0


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("time,MLII\n0,1\n", "1 columns are ECG leads and two are needed; name them"),
        ("MLII (mV),ABP (mmHg)\n0,1\n", "1 columns are ECG leads"),
        ("MLII,V1\n0.1,0.2\n0.1,x\n", "line 3, column V1: 'x' is not a number"),
        ("MLII,V1\nmV,mV\n0.1,0.2\n", "line 2, column MLII: 'mV'"),
        ("MLII,V1\n0.1,0.2,0.3\n", "line 2: 3 values for 2 columns"),
        ('"MLII\n (mV)",V1\nx,0.2\n', r"line 3, column MLII \(mV\): 'x'"),
        ("MLII,V1\n", "holds no samples"),
        ("", "0 columns are ECG leads"),
    ],
)
def test_a_table_of_leads_that_could_mean_something_else_is_refused(tmp_path, text, why):
    (tmp_path / "r.csv").write_text(text)
    with pytest.raises(boxes.InputError, match=why) as refusal:
        read(tmp_path / "r.csv", 360.0)
    assert len(str(refusal.value).splitlines()) == 1


def test_damaged_edf_files_are_refused_in_one_line(tmp_path):
    good = {"signals": [np.arange(3600)] * 2, "rates": [360, 360], "names": ["II", "V1"], "units": ["mV", "mV"]}
    cases = {
        "holds fewer samples than its header": {**good, "frames": 10**7},
        "interruptions": {**good, "kind": "EDF+D"},
        "1 ECG signals .II in mV, V1 in degC": {**good, "names": ["II", "V\n1\0"], "units": ["mV", "degC"]},
        "sampled at 10": {**good, "rates": [10, 10]},
        "without a sampling rate": {**good, "seconds": 0.5, "rates": [360, 0]},
    }
    for why, case in cases.items():
        path = write_edf(tmp_path / "r.edf", **case)
        with pytest.raises(boxes.InputError, match=why) as refusal:
            read(path)
        assert len(str(refusal.value).splitlines()) == 1
    whole = write_edf(tmp_path / "r.edf", **good).read_bytes()
    assert recording.read_signal(path, None)[0].shape == (3600, 2)
    for damaged in (b"", whole[:200], whole[:700], b"\xffBIOSEMI" + whole[8:], whole[:244] + b"nan     " + whole[252:]):
        path.write_bytes(damaged)
        with pytest.raises(boxes.InputError, match="cannot be read as a recording"):
            read(path)


def test_beats_are_detected_in_a_record_without_annotations(tmp_path):
    samples = make_record(tmp_path, "r", annotate=False, names=("V1", "III"))
    X, found = read(tmp_path / "r", model={**MODEL, "leads": None})
    assert found["origin"] == f"found by the detector {recording.DETECTOR}"
    assert sum(np.abs(np.array(found["samples"]) - sample).min() < 0.05 * 360 for sample in samples) >= BEAT_COUNT - 2
    assert len(X) == sum(found["classified"])


@pytest.mark.parametrize("fs", [128.0, 250.0, 1000.0])
def test_any_sampling_rate_gives_nearly_the_same_features(tmp_path, fs):
    make_record(tmp_path, "r")
    make_record(tmp_path, "other", fs=fs)
    X, _ = read(tmp_path / "r")
    other, found = read(tmp_path / "other")
    assert found["fs"] == fs
    names = [feature["name"] for feature in FEATURES]
    np.testing.assert_allclose(other[:, names.index("pre_RR")], X[:, names.index("pre_RR")], atol=1 / fs + 1 / 360)
    assert np.corrcoef(other[:, names.index("shape_corr")], X[:, names.index("shape_corr")])[0, 1] > 0.9


def test_the_first_minutes_are_those_of_a_shorter_recording(tmp_path):
    samples = make_record(tmp_path, "r")
    _, found = read(tmp_path / "r", minutes=0.5)
    assert found["samples"] == [sample for sample in samples.tolist() if sample < 0.5 * 60 * 360]
    assert "outside the signal" not in found["not_classified"]


def test_beats_in_a_gap_are_reported_as_not_classified(tmp_path):
    def with_gap(signal):
        signal[7200:9000] = np.nan
        return signal

    samples = make_record(tmp_path, "r", edit=with_gap)
    X, found = read(tmp_path / "r")
    lost = found["not_classified"]["signal missing or flat"]
    assert lost >= ((samples > 7200) & (samples < 9000)).sum() > 3
    assert found["samples"] == samples.tolist()
    assert len(X) == sum(found["classified"]) == len(samples) - 2 - lost


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ({"leads": 1}, "1 ECG signals"),
        ({"edit": lambda x: x * [1, 0]}, "flat signal"),
        ({"edit": lambda x: x * [0, 1], "annotate": False}, "flat signal"),
        ({"edit": lambda x: np.cumsum(np.full_like(x, 1e-5), axis=0), "annotate": False}, "fewer than three beats"),
        ({"marks": lambda samples, symbols: [(samples[0], "+", "(N\0")]}, "fewer than three beats"),
        ({"fs": 50.0}, "sampled at 50"),
        ({"marks": lambda samples, symbols: [(sample + 10**7, "N") for sample in samples]}, "outside its signal"),
        ({"marks": lambda samples, symbols: [(0, "["), *zip(samples, symbols)]}, "no usable beat"),
    ],
)
def test_a_record_that_cannot_be_classified_is_one_line(tmp_path, what, why):
    make_record(tmp_path, "r", **what)
    with pytest.raises(boxes.InputError, match=why) as refusal:
        read(tmp_path / "r")
    assert len(str(refusal.value).splitlines()) == 1
    assert str(refusal.value).startswith(str(tmp_path / "r"))


def test_a_record_of_ten_beats_is_classified_but_for_the_first_and_the_last(tmp_path):
    make_record(tmp_path, "r", symbols=list("NNVNNNVVNN"))
    X, found = read(tmp_path / "r")
    assert found["classified"] == [False, *[True] * 8, False]
    assert X.shape == (8, 32)


def test_paced_beats_and_other_leads_give_a_warning(tmp_path, capsys):
    make_record(tmp_path, "r", symbols=["/", "N", "f"] * 10, names=("V2", "V5"))
    read(tmp_path / "r", annotator="atr")
    warnings = capsys.readouterr().err
    assert "r has 20 paced beats" in warnings
    assert "r has the leads V5 and V2; the model was trained on MLII and V1" in warnings


def test_other_features_and_damaged_records_are_refused(tmp_path):
    make_record(tmp_path, "r")
    with pytest.raises(boxes.InputError, match="does not take the features of records"):
        read(tmp_path / "r", model={"features": FEATURES[:5]})
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "r", annotator="qrs")
    (tmp_path / "r.atr").write_bytes((tmp_path / "r.atr").read_bytes()[:-1])
    with pytest.raises(boxes.InputError, match="lacks its end"):
        read(tmp_path / "r")
    (tmp_path / "r.dat").write_bytes(b"")
    with pytest.raises(boxes.InputError, match="cannot be read as a recording"):
        read(tmp_path / "r")
    assert recording.find(tmp_path / "nothing", None) is None


def test_a_signal_that_is_gone_or_has_changed_is_a_warning(tmp_path, capsys):
    make_record(tmp_path, "r")
    _, found = read(tmp_path / "r")
    assert len(client.read_signal(found)) > found["samples"][-1]
    assert client.read_signal({**found, "samples": [10**7]}) is None
    assert "r: has changed; the picture has no signal" in capsys.readouterr().err
    (tmp_path / "r.dat").unlink()
    assert client.read_signal(found) is None
    assert "r.dat" in capsys.readouterr().err


def answered(beats, fs=360.0, seconds=0.8):
    """Beats of the codes in `beats` (N, Q or a quotation mark), `seconds` apart, with outputs that rise."""
    code = np.array(list(beats))
    output = np.where(code == answers.NOT_CLASSIFIED, np.nan, np.arange(len(code), dtype=float))
    sample = (100 + np.arange(len(code)) * seconds * fs).astype(int)
    probability, reasons = 1 / (1 + np.exp(-output)), {"first or last beat": 2}
    return answers.Beats("r", fs, sample, code, output, probability, reasons, "of r.atr")


def test_the_summary_counts_beats_and_runs_of_abnormal_ones():
    lines = answers.summary(answered('"NQQNQQQN' + "N" * 100 + 'QQQQ"QQ"')).splitlines()
    assert lines == [
        "r: 117 beats, R peaks of r.atr",
        "103 normal, 11 abnormal",
        "3 not classified; 2 first or last beat",
        "2 runs of 3 or more abnormal beats in a row; the longest has 4 beats, at 0:01:27",
    ]
    assert "0 runs of 3 or more" in answers.summary(answered("NNQQN"))


def test_strips_show_the_most_certain_runs_apart_from_each_other_in_the_order_of_time():
    beats = answered("N" * 20 + "QQQ" + "N" * 20 + "QQQQ" + "N" * 20 + "QQQ" + "NQN" + "N" * 20 + "QQ" + "N" * 20 + "Q")
    assert answers.choose_strips(beats) == [(20, 23), (43, 47), (67, 70), (115, 116)]
    assert answers.choose_strips(answered("NNNN")) == []


@pytest.mark.parametrize("codes", ["NNNN", '""', "Q", "NQNQQQ" * 40, "NQQQNNNNN" * 200], ids=len)
def test_the_picture_is_drawn_for_any_record_with_and_without_its_signal(tmp_path, codes):
    beats = answered(codes)
    signal = np.random.default_rng(0).normal(size=(beats.sample[-1] + 500, 2))
    signal[: len(signal) // 3, 0] = np.nan
    sizes = []
    for x in (None, signal):
        answers.write_all(tmp_path, beats, x, ["MLII", "V1"])
        sizes.append((tmp_path / "r.fhe.png").stat().st_size)
        answers.check_files(tmp_path, "r", "")
    assert (sizes[1] > sizes[0]) == ("Q" in codes)
    assert [row["decision"] for row in csv.DictReader((tmp_path / "r.fhe.csv").open())] == [
        answers.WORDS[code] for code in codes
    ]
    assert wfdb.rdann(str(tmp_path / "r"), "fhe").symbol == list(codes)


def test_decisions_are_compared_with_the_annotations_of_their_beats(tmp_path):
    samples = make_record(tmp_path, "r", symbols=list("NNVNA/NN"))
    decided = answered('"QQNNQ')  # of the first six of the eight beats, and of none
    answers.write_annotations(tmp_path / "r.fhe", decided._replace(sample=np.append(samples[:5], samples[5] + 100)))
    table, extra, extra_abnormal = compare(str(tmp_path / "r"), str(tmp_path / "r"))
    assert table.loc["N"].to_dict() == {"normal": 1, "abnormal": 1, "not classified": 1, "not found": 2}
    assert table.loc["S"].to_dict() == {"normal": 1, "abnormal": 0, "not classified": 0, "not found": 0}
    assert table.loc["V", "abnormal"] == table.loc["Q", "not found"] == 1
    assert (extra, extra_abnormal) == (1, 1)
    first, _, _ = compare(str(tmp_path / "r"), str(tmp_path / "r"), minutes=(samples[1] + 1) / 360 / 60)
    assert first.to_numpy().sum() == 2
