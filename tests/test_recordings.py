"""The client's recordings and tables: WFDB, EDF and .csv to features; decisions to annotations, a table, a picture."""

import csv
import io
import re
from datetime import datetime, timedelta

import numpy as np
import pandas as pd
import pytest
import wfdb
from conftest import BEAT_COUNT, make_record, write_atr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import preprocess_mitbih as pre
from fhe_mlp import ecg
from fhe_mlp.cli import InputError
from fhe_mlp.deployment import client, decisions, exchange, recordings
from fhe_mlp.ecg import EXPECTED_LEADS, FEATURES
from fhe_mlp.ecg.records import SPAN_MV

MODEL = {"features": FEATURES, "leads": EXPECTED_LEADS}
NAMES = ["a", "b", "c"]  # of the features in the tests of the .csv reader
TENTH = (-3276.8, 3276.7, -32768, 32767)  # physical values are a tenth of the digital ones
MANY = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read(path, fs=None, annotator=None, minutes=None, model=MODEL):
    """Return a recording as encrypt stores it."""
    return recordings.read_recording(recordings.find_recording(path, fs), fs, annotator, minutes, model)


def check_refusal(path, why, function, *arguments):
    """Check that reading a file is refused in one line, which begins with its path."""
    with pytest.raises(InputError, match=re.escape(why)) as refusal:
        function(path, *arguments)
    assert str(refusal.value).startswith(str(path))
    assert len(str(refusal.value).splitlines()) == 1


def write_edf(path, signals, rates, names, units, seconds=1.0, kind="", frames=None, ends=TENTH):
    """Write signals (whole numbers), each at its own rate, as EDF; ends: physical and digital ones."""
    per_frame, count = [round(rate * seconds) for rate in rates], len(signals)
    held = len(signals[0]) // per_frame[0]
    columns = [
        names,
        [""] * count,
        units,
        *([f"{end:g}"] * count for end in ends),
        [""] * count,
        per_frame,
        [""] * count,
    ]
    start = ("0", 8), ("", 160), ("01.01.2000.00.00", 16), (256 * (count + 1), 8), (kind, 44)
    fields = [*start, (held if frames is None else frames, 8), (seconds, 8), (count, 4)]
    fields += [(cell, width) for table, width in zip(columns, (16, 80, 8, 8, 8, 8, 8, 80, 8, 32)) for cell in table]
    data = np.hstack([x[: held * n].reshape(held, n) for x, n in zip(signals, per_frame)]).astype("<i2")
    path.write_bytes("".join(f"{cell!s:<{width}}" for cell, width in fields).encode("latin-1") + data.tobytes())
    return path


def test_a_record_gives_the_features_of_the_data_set(tmp_path):
    samples = make_record(tmp_path, "r")
    X, recording = read(tmp_path / "r")
    wanted = pre.read_record(str(tmp_path / "r"))
    np.testing.assert_allclose(X, wanted.X, atol=1e-6)
    np.testing.assert_array_equal(np.array(recording.samples)[recording.classified], wanted.beats["sample"])
    np.testing.assert_array_equal(recording.samples, samples)
    assert (recording.title, recording.reasons) == ("r: 60 beats, R peaks of r.atr", "; 2 first or last beat")
    _, first = read(tmp_path / "r", minutes=0.5)
    assert first.samples == [sample for sample in samples.tolist() if sample < 0.5 * 60 * 360]
    assert "outside the signal" not in first.reasons
    for name, found in (("r.hea", tmp_path / "r"), ("r.dat", tmp_path / "r"), ("nothing", None)):
        assert recordings.find_recording(tmp_path / name, None) == found


def test_edf_and_csv_files_are_read_as_the_record_they_were_written_from(tmp_path):
    make_record(tmp_path, "r", clock=360)
    signal, fs, leads = recordings.read_signal(tmp_path / "r", None)
    tenths = np.rint(signal * 10_000).astype(int)  # of a microvolt
    names, units = ["EDF Annotations", "ECG V1", "ECG II"], ["", "\xb5V", "uV"]
    signals = [np.arange(len(signal) // 36), tenths[:, 1], tenths[:, 0]]
    write_edf(tmp_path / "e.EDF", signals, [10, 360, 360], names, units, seconds=0.5, kind="EDF+C")
    rows = [f"{k / fs:.4f};{b:.4f};{1000 * a:.1f};x".replace(".", ",") for k, (a, b) in enumerate(signal)]
    rows[5000:5300] = [f"{row.split(';')[0]};;;x" for row in rows[5000:5300]]  # an empty cell is missing signal
    (tmp_path / "c.csv").write_text("\n".join(["time (s);V1;MLII [\u00b5V];note", *rows]), encoding="utf-8")
    for name, csv_fs, expected in (("e.EDF", None, ["ECG II", "ECG V1"]), ("c.csv", 360.0, leads)):
        again, again_fs, again_leads = recordings.read_signal(tmp_path / name, csv_fs)
        assert (again_fs, again_leads) == (fs, expected)
        assert len(signal) - len(again) < 180
        np.testing.assert_allclose(again, np.where(np.isnan(again), np.nan, signal[: len(again)]), atol=1e-4)
        (tmp_path / name).with_suffix(".atr").write_bytes((tmp_path / "r.atr").read_bytes())
        _, recording = read(tmp_path / name, csv_fs)
        assert recording.title.endswith(f"R peaks of {name[0]}.atr")
        assert ("signal missing or flat" in recording.reasons) == (name == "c.csv")


def test_damaged_edf_files_are_refused_in_one_line(tmp_path):
    path, good = tmp_path / "r.edf", {"rates": [360, 360], "names": ["II", "V1"], "units": ["mV", "mV"]}
    for why, case in {
        "holds fewer samples than its header": {"frames": 10**7},
        "r.edf: has 1 ECG signals (II in mV, V1 in degC)": {"names": ["II", "V\n1\0"], "units": ["mV", "degC"]},
        "r.edf: is sampled at 10": {"rates": [10, 10]},
        "without a sampling rate": {"seconds": 0.5, "rates": [360, 0]},
    }.items():
        check_refusal(write_edf(path, [np.arange(3600)] * 2, **{**good, **case}), why, read)
    whole = write_edf(path, [np.arange(3600)] * 2, **good).read_bytes()
    for damaged in (b"", whole[:200], whole[:700], b"\xffBIOSEMI" + whole[8:], whole[:244] + b"nan     " + whole[252:]):
        path.write_bytes(damaged)
        check_refusal(path, "cannot be read as a recording", read)


def test_an_edf_file_that_could_have_interruptions_is_read_where_it_has_none(tmp_path):
    x = np.rint(1e4 * np.sin(np.arange(3600) / 50)).astype(int)
    for gap in (0, 0.5):
        texts = [f"+{k + gap * (k > 4):g}\x14\x14".encode().ljust(40, b"\0") for k in range(10)]
        marks = np.frombuffer(b"".join(texts), "<i2")
        path = write_edf(
            tmp_path / "r.edf",
            [x, marks, x],
            [360, 20, 360],
            ["II", "EDF Annotations", "V1"],
            ["uV", "", "uV"],
            kind="EDF+D",
        )
        if gap:
            check_refusal(path, "r.edf: is an EDF+ file with interruptions", read)
        else:
            signal, fs, leads = recordings.read_signal(path, None)
            assert (fs, leads) == (360, ["II", "V1"])
            np.testing.assert_allclose(signal, np.column_stack([x, x]) / 10_000, atol=1e-9)


@MANY
@given(gain=st.floats(-5, 5).map(lambda power: 10**power), how=st.sampled_from(["csv", "edf", "wfdb"]))
def test_a_signal_of_a_size_that_no_ecg_has_is_refused_with_unit_and_gain(tmp_path, gain, how):
    x, path, fs = 0.5 * np.sin(np.arange(3600) / 57)[:, None] * [1, 0.5], tmp_path / "r", None  # 1 and 0.5 mV high
    digital, names, units = np.rint(2e4 * x).astype(int), ["MLII", "V1"], ["mV", "mV"]
    if how == "csv":
        path, fs = tmp_path / "r.csv", 360.0
        path.write_text("\n".join(["MLII,V1", *(f"{a:.9g},{b:.9g}" for a, b in gain * x + gain)]))
    elif how == "wfdb":
        scale = {"fmt": ["16"] * 2, "adc_gain": [2e4 / gain] * 2, "baseline": [0, 0]}
        wfdb.wrsamp("r", 360, units, names, d_signal=digital, write_dir=str(tmp_path), **scale)
    else:
        gain = 10.0 ** round(np.log10(gain))
        path = write_edf(tmp_path / "r.edf", digital.T, [360] * 2, names, units, ends=(-gain, gain, -20_000, 20_000))
    if 0.5 * gain < 0.99 * SPAN_MV[0] or gain > 1.01 * SPAN_MV[1]:
        check_refusal(path, "has a wrong unit or gain: its lead ", recordings.read_signal, fs)
    elif 0.5 * gain > 1.01 * SPAN_MV[0] and gain < 0.99 * SPAN_MV[1]:
        np.testing.assert_allclose(np.ptp(recordings.read_signal(path, fs)[0], axis=0), [gain, gain / 2], rtol=0.01)


def write_times(path, times, name="time (s)"):
    """Write a .csv file of two leads with a column of times."""
    x = np.sin(np.arange(len(times)) / 57)
    path.write_text("\n".join([f"{name},MLII,V1", *(f"{t},{a:.4f},{a / 2:.4f}" for t, a in zip(times, x))]))
    return path


CLOCKS = {  # how programs write the time of sample k at fs
    "time (s)": lambda k, fs: f"{k / fs:.4f}",
    "Time": lambda k, fs: f"{17.5 + k / fs:.3f}",
    "t [ms]": lambda k, fs: f"{1000 * k / fs:.1f}",
    "time_ms": lambda k, fs: f"{1000 * k / fs:.2f}",
    "time (\u00b5s)": lambda k, fs: f"{1e6 * k / fs:.0f}",
    "t": lambda k, fs: "" if k % 7 == 3 else f"{1e9 * k / fs:.0f}",
    "time [hh:mm:ss.mmm]": lambda k, fs: "" if k % 5 == 0 else f"[00:00:{k / fs:06.3f}]",
    "'Elapsed time'": lambda k, fs: f"{datetime(2020, 1, 1, 23, 59, 58) + timedelta(seconds=k / fs):%H:%M:%S.%f}",
    "Timestamp": lambda k, fs: f"{datetime(2020, 1, 1, 23, 59, 58) + timedelta(seconds=k / fs)}",
}


@MANY
@given(
    clock=st.sampled_from(list(CLOCKS)),
    rates=st.tuples(*[st.sampled_from([125, 128, 200, 250, 256, 360, 500, 720, 1000])] * 2),
    lost=st.one_of(st.none(), st.integers(1, 1500)),
)
def test_a_column_of_times_decides_whether_the_sampling_rate_is_right(tmp_path, clock, rates, lost):
    given, true = rates
    rows = [k for k in range(2500) if lost is None or not lost <= k < lost + 900]
    path = write_times(tmp_path / "r.csv", [CLOCKS[clock](k, true) for k in rows], clock)
    if given == true and lost is None:
        assert recordings.read_signal(path, float(given))[1] == given
    else:
        check_refusal(
            path, f"is not this row's time at --fs {given}; the column has ", recordings.read_signal, float(given)
        )


def test_samples_are_counted_in_a_column_of_times_and_what_is_no_time_is_refused(tmp_path):
    assert recordings.read_signal(write_times(tmp_path / "r.csv", range(5, 2000), "sample #"), 250.0)[1] == 250
    for times in (["x"] * 900, ["3"] * 900, [""] * 900):
        check_refusal(write_times(tmp_path / "r.csv", times), "holds no times", recordings.read_signal, 360.0)
    times = [f"{k / 360:.4f}" for k in range(900)]
    check_refusal(write_times(tmp_path / "r.csv", times), "--fs 720; the column has 360", recordings.read_signal, 720.0)
    for cell, why in (
        ("n/a", "line 7, column time (s): 'n/a' is not a number"),
        ("0.0139,1", "line 7: 4 values for 3"),
    ):
        path = write_times(tmp_path / "r.csv", [*times[:5], cell, *times[6:]])
        check_refusal(path, why, recordings.read_signal, 360.0)


ECG = [
    "MLII",
    "V1",
    "ECG",
    "EKG",
    "ECG R-L",
    "ECG 2",
    "aVF",
    "D1",
    "CM5",
    "mod.V1",
    "V5",
    "ch1",
    "",
    "Vx",
    "MCL1",
    *("lead III", "V1-V2", "D4", "CHAN1", "IV"),
]
OTHERS = [
    "EOG left",
    "EEG C3-A2",
    "C4-M1",
    "EMG chin",
    "Leg",
    "Snore",
    "Flow",
    "Nasal",
    "ECG Resp",
    "SpO2",
    "ABP",
    "Pleth",
    "Thorax",
]


@MANY
@given(st.lists(st.sampled_from(ECG + OTHERS), min_size=1, max_size=6, unique=True), st.randoms(use_true_random=False))
def test_only_ecg_leads_are_taken_from_what_else_was_recorded(names, _):
    ecg_names = [name for name in names if name in ECG]
    x = np.sin(np.arange(3600) / 57)
    signals = ecg.Signals(
        names, ["mV"] * len(names), [1] * len(names), [200.0] * len(names), 360.0, lambda chosen: [x] * len(chosen)
    )
    if len(ecg_names) > 1:
        assert set(ecg.two_leads(signals)[2]) <= set(ecg_names)
    else:
        with pytest.raises(ecg.Unsuited, match=f"has {len(ecg_names)} ECG signals .*; two are needed"):
            ecg.two_leads(signals)


@pytest.mark.parametrize("unit", ["\u00b5V", "\u03bcV", "uV", "\u00b5V in Latin-1"])
@pytest.mark.parametrize("date", ["", " 12:00:00 2014-05-08", " 12:00 2006", " 08.05.2014"])
@pytest.mark.parametrize("ending", ["hea", "HEA"])
def test_a_header_is_read_whatever_its_date_its_micro_sign_and_its_capitals(tmp_path, unit, date, ending):
    samples = make_record(tmp_path, "r", units=("uV", "uV"), edit=lambda x: 1000 * x)
    wanted = recordings.read_signal(tmp_path / "r", None)
    header = tmp_path / "r.hea"
    text = header.read_text().replace("uV", unit.split()[0]).split("\n", 1)
    content = f"{text[0].rstrip()}{date}\n{text[1]}# age: 60, M\u00fcller\n".encode(
        "latin-1" if "Latin" in unit else "utf-8"
    )
    header.write_bytes(content)
    if ending == "HEA":
        for path in list(tmp_path.iterdir()):
            path.rename(path.with_suffix(path.suffix.upper()))
        (tmp_path / "r.HEA").write_bytes(content.replace(b"r.dat", b"r.DAT"))
    found = recordings.read_signal(recordings.find_recording(tmp_path / f"r.{ending}", None), None)
    np.testing.assert_array_equal(found[0], wanted[0])
    assert found[1:] == wanted[1:]
    _, recording = read(tmp_path / "r")
    assert recording.samples == samples.tolist()


def test_what_is_odd_beside_the_leads_stops_no_recording(tmp_path):
    samples = make_record(tmp_path, "r")
    (tmp_path / "r.old").mkdir()
    (tmp_path / "r.zip").write_bytes(b"\0\0")
    (tmp_path / "R2.HEA").write_text((tmp_path / "r.hea").read_text().replace("r.dat", "R1.dat"))
    (tmp_path / "r.dat").rename(tmp_path / "R1.DAT")
    signal, fs, leads = recordings.read_signal(tmp_path / "R2", None)
    assert leads == ["MLII", "V1"]
    tenths = np.rint(signal * 10_000).astype(int)
    path = write_edf(tmp_path / "e.edf", [*tenths.T, tenths[:, 0]], [360] * 3, ["II", "V1", "mark"], ["uV", "uV", ""])
    content, count = path.read_bytes(), 3
    for offset, cells in ((104, b"0       "), (112, b"N/A     ")):  # physical limits of the third signal
        place = 256 + count * offset + 2 * 8
        content = content[:place] + cells + content[place + 8 :]
    path.write_bytes(content)
    np.testing.assert_allclose(recordings.read_signal(path, None)[0], signal[: len(signal) // 360 * 360], atol=1e-4)
    step = signal + 300 * (np.abs(np.arange(len(signal)) - 9000) < 90)[:, None]  # an electrode that slips
    near = [np.abs(recordings.find_peaks(step, fs) - sample).min() < 0.05 * fs for sample in samples]
    assert sum(near) >= BEAT_COUNT - 4
    dead = np.where(
        np.arange(len(signal))[:, None] < 0.7 * len(signal), 0.005 * (np.arange(len(signal)) % 2)[:, None], signal
    )
    make_record(tmp_path, "dead", edit=lambda x: dead)
    assert len(recordings.read_signal(tmp_path / "dead", None)[0]) == len(signal)
    for header in ("", "# nothing\n", "r\n"):
        (tmp_path / "r.hea").write_text(header)
        check_refusal(tmp_path / "r", "its .hea has no record line", recordings.read_signal, None)


def test_beats_are_found_in_other_annotation_files_which_are_named(tmp_path):
    samples = make_record(tmp_path, "r", marks=lambda samples, symbols: [(samples[0], "+", "(N\0")])
    write_atr(tmp_path / "r.qrs", [(sample, "N") for sample in samples])
    for annotator in (None, "wqrs"):
        check_refusal(
            tmp_path / "r", "--annotator qrs" if annotator is None else "--annotator atr or qrs", read, None, annotator
        )
    signal, fs, _ = recordings.read_signal(tmp_path / "r", None)
    write_edf(tmp_path / "e.edf", list(np.rint(1e4 * signal.T).astype(int)), [360] * 2, ["II", "V1"], ["uV"] * 2)
    write_atr(tmp_path / "e.edf.qrs", [(sample, "N") for sample in samples])
    _, recording = read(tmp_path / "e.edf", annotator="qrs")
    assert recording.samples == samples[samples < len(signal) // 360 * 360].tolist()
    assert recording.title.endswith("R peaks of e.edf.qrs")


def test_a_table_of_leads_that_could_mean_something_else_is_refused(tmp_path):
    for text, why in (
        ("time,MLII\n0,1\n", "has 1 ECG signals (time in no unit, MLII in mV); two are needed"),
        ('"MLII\n (mV)",V1\n0.1,\nx,0.2\n', "line 4, column MLII (mV): 'x' is not a number"),
        ("", "has 0 ECG signals"),
    ):
        (tmp_path / "r.csv").write_text(text)
        check_refusal(tmp_path / "r.csv", why, read, 360.0)


@settings(MANY, max_examples=10)
@given(gain=st.floats(-1, 1).map(lambda power: 10**power), fs=st.sampled_from([128.0, 250.0, 360.0, 1000.0]))
def test_the_same_beats_are_detected_at_any_gain(tmp_path, gain, fs):
    samples = make_record(tmp_path, "r", fs=fs)
    signal = recordings.read_signal(tmp_path / "r", None)[0]
    found = recordings.find_peaks(signal, fs)
    np.testing.assert_array_equal(recordings.find_peaks(gain * signal, fs), found)
    assert sum(np.abs(found - sample).min() < 0.05 * fs for sample in samples) >= BEAT_COUNT - 2


def test_beats_are_detected_in_a_record_without_annotations(tmp_path):
    samples = make_record(tmp_path, "r", annotate=False, names=("V1", "III"))
    X, recording = read(tmp_path / "r", model={**MODEL, "leads": None})
    assert recording.title.endswith("R peaks found by the detector gqrs")
    near = [np.abs(np.array(recording.samples) - sample).min() < 0.05 * 360 for sample in samples]
    assert sum(near) >= BEAT_COUNT - 2
    assert len(X) == sum(recording.classified)


def test_paced_beats_and_other_leads_give_a_warning(tmp_path, capsys):
    make_record(tmp_path, "r", symbols=["/", "N", "f"] * 10, names=("V2", "V5"))
    read(tmp_path / "r", annotator="atr")
    warnings = capsys.readouterr().err
    assert "r has 20 paced beats" in warnings
    assert "r has the leads V5 and V2; the model was trained on MLII and V1" in warnings


def test_records_that_cannot_be_classified_are_refused(tmp_path, capsys):
    for what, why in (
        ({"edit": lambda x: x * [0, 1], "annotate": False}, "r (gqrs): has a flat signal; no beat can be classified"),
        ({"marks": lambda samples, symbols: [(samples[0], "+", "(N\0")]}, "r (atr): has fewer than three beats"),
        ({"leads": 1}, "r: has 1 ECG signals"),
    ):
        make_record(tmp_path, "r", **what)
        check_refusal(tmp_path / "r", why, read)
    make_record(tmp_path, "r")
    check_refusal(tmp_path / "r", "r (atr): has ", read, None, None, 1e-9)
    _, recording = read(tmp_path / "r")
    assert len(client.read_signal_again(recording)) > recording.samples[-1]
    other = {"features": FEATURES[:5]}
    check_refusal(tmp_path / "r", "does not use the features of records", read, None, None, None, other)
    check_refusal(tmp_path / "r", "r (qrs): there is no such annotation file", read, None, "qrs")
    for name, content, why in (("r.atr", b"\0", "lacks its end"), ("r.dat", b"", "cannot be read as a recording")):
        (tmp_path / name).write_bytes(content)
        check_refusal(tmp_path / "r", why, read)
    assert client.read_signal_again(recording) is None
    assert capsys.readouterr().err.endswith("; the picture has no signal\n")


@pytest.mark.parametrize(
    "text",
    [
        "a,b,c\n1.5,-2,3e-2\n4,5.25,6\n",
        "a, b , c\r\n 1.5, -2, 0.03\r\n4 ,5.25,6\r\n\r\n",
        'a,b,c\r\r\n1.5,"-2", "0.03"\r\r\n4,5.25,6\r\r\n,,\n,,,,\n',
        "a;b;c\n1,5;-2;0,03\n4;5,250;6\n",
        'a,b,c\n"1,5",-2,"0,03"\n4,"5,25",6\n',
        "a\tb\tc\n1,5\t-2\t3,0E-2\n4\t5,25\t6\n",
        "comment,a,b,c,x,x\ngood,1.5,-2,0.03,,\nn\xe4,4,5.25,6,1;2,NaN\n",
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_a_beats_file_is_read_as_spreadsheets_and_programs_write_it(tmp_path, text, encoding):
    (tmp_path / "beats.csv").write_bytes(text.encode(encoding))
    X = recordings.read_features(tmp_path / "beats.csv", NAMES)
    np.testing.assert_array_equal(X, [[1.5, -2.0, 3e-2], [4.0, 5.25, 6.0]])


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("a,b,c\n1,2,3\n0,5,1,2\n", "line 3: 4 values for 3 columns"),
        ("a,b,c\n1,2,3,\n4,5,6,\n", "line 2: 4 values"),
        ("a,b,c,a\n1,2,3,4\n", "2 columns are called 'a'"),
        ("a,b,c\n1,,3\n", "line 2, column b: there is no value"),
        ("a,b,c\n,,\n1,2,3\n", "line 2, column a: there is no value"),
        ('a,b,c\n1,2,"1,234"\n', "line 2, column c: '1,234'"),
        ("a;b;c\n1;0.5;0,5\n", "line 2, column c: '0,5'"),
        ("a;b;c\n1;2;1.234,5\n", "line 2, column c: '1.234,5'"),
        *((f"a,b,c\n1,2,{cell}\n", "line 2, column c: ") for cell in ("nan", "1e999", "x", "1_0", "1 0")),
        (f"a,b,c\n1,2,{'1' * 130_000}x\n", "column c"),  # the longest cell; a bad pattern would try it in every way
        ('a,b,c,d\n1,2,3,"x\n4,5,6,y\n', "line 3: unexpected end of data"),
        ("a,b,c\n", "has no rows"),
        ("a\0b", "0 columns are called 'a'"),
    ],
)
def test_what_a_beats_file_could_mean_in_two_ways_is_refused_with_its_place(tmp_path, text, where):
    (tmp_path / "beats.csv").write_text(text, newline="")
    check_refusal(tmp_path / "beats.csv", where, recordings.read_features, NAMES)


@MANY
@given(
    values=st.lists(st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=3), min_size=1, max_size=4),
    separator=st.sampled_from(",;\t"),
    comma=st.booleans(),
    comment=st.text(max_size=5),
    row_names=st.booleans(),
)
def test_no_way_of_writing_a_table_shifts_or_changes_a_number(tmp_path, values, separator, comma, comment, row_names):
    rows = [[f"{value:.4f}".replace(".", "," if comma else ".") for value in row] for row in values]
    table = [["b", "note", "a", "c"], *([*[str(k)] * row_names, r[1], comment, r[0], r[2]] for k, r in enumerate(rows))]
    text = io.StringIO()
    csv.writer(text, delimiter=separator).writerows(table)
    unquoted = comma and separator == ","
    content = text.getvalue().replace('"', "") if unquoted else text.getvalue()
    (tmp_path / "beats.csv").write_bytes(content.encode("utf-8", "replace"))
    try:
        X = recordings.read_features(tmp_path / "beats.csv", NAMES)
        np.testing.assert_array_equal(X, [[float(f"{value:.4f}") for value in row] for row in values])
        assert not row_names
    except InputError as refusal:
        assert row_names or unquoted or "\0" in comment, refusal


@MANY
@given(st.one_of(st.binary(), st.text('abc,;\t"\n\r 0123456789.eE+-').map(lambda text: b"a,b,c\n" + text.encode())))
def test_any_bytes_are_a_table_of_finite_numbers_or_one_line(tmp_path, beats):
    (tmp_path / "beats.csv").write_bytes(beats)
    try:
        assert np.isfinite(recordings.read_features(tmp_path / "beats.csv", NAMES)).all()
    except InputError as refusal:
        assert len(str(refusal).splitlines()) == 1


def decided(codes):
    """A recording of beats, 0.8 s apart, that were given these codes (N, Q or a quotation mark), and its table."""
    classified, logits = [code != decisions.NOT_CLASSIFIED for code in codes], np.arange(1.0, len(codes) + 1)
    samples, leads = (100 + np.arange(len(codes)) * 288).tolist(), ["MLII", "V1"]
    recording = recordings.Recording("0123abcd", "r", "r", None, "r", 360.0, leads, samples, classified, "; 2 lost")
    logits *= [1 if code == decisions.ABNORMAL else -1 for code in codes]
    return recording, decisions.join(recording, logits[classified])


def test_runs_of_abnormal_beats_are_counted_and_the_most_certain_are_shown_in_the_order_of_time():
    assert decisions.summary(*decided('"NQQNQQQN' + "N" * 100 + 'QQQQ"QQ"')).splitlines() == [
        "r",
        "103 normal, 11 abnormal",
        "3 not classified; 2 lost",
        "2 runs of 3 or more abnormal beats in a row; the longest has 4 beats, at 0:01:27",
    ]
    assert "0 runs of 3 or more" in decisions.summary(*decided("NNQQN"))
    codes = "N" * 20 + "QQQ" + "N" * 20 + "QQQQ" + "N" * 20 + "QQQ" + "NQN" + "N" * 20 + "QQ" + "N" * 20 + "Q"
    assert decisions.choose_strips(decided(codes)[1]) == [(20, 23), (43, 47), (67, 70), (115, 116)]
    assert decisions.choose_strips(decided("NNNN")[1]) == []


@pytest.mark.parametrize("codes", ["NNNN", '""', "Q", "NQNQQQ" * 40, "NQQQNNNNN" * 200], ids=len)
def test_the_files_hold_every_beat_and_are_replaced_by_the_next_run_only(tmp_path, codes):
    recording, beats = decided(codes)
    signal = np.random.default_rng(0).normal(size=(recording.samples[-1] + 500, 2))
    signal[: len(signal) // 3, 0] = np.nan
    sizes = []
    for leads in (None, signal):
        decisions.write_files(tmp_path, recording, beats, leads)
        sizes.append((tmp_path / "r.fhe.png").stat().st_size)
    assert (sizes[1] > sizes[0] > 10_000) == ("Q" in codes)
    table = pd.read_csv(tmp_path / "r.fhe.csv")
    assert list(table) == ["recording", "sample", "time", "output", "probability", "decision"]
    assert table["decision"].tolist() == [decisions.WORDS[code] for code in codes]
    np.testing.assert_allclose(table["output"], beats["output"], rtol=1e-12)
    assert wfdb.rdann(str(tmp_path / "r"), "fhe").symbol == list(codes)
    for ending, start in decisions.OUTPUTS.items():
        exchange.check_replaceable(tmp_path / f"r{ending}", start % b"0123abcd")
        with pytest.raises(InputError, match="not an earlier output of this command for these beats"):
            exchange.check_replaceable(tmp_path / f"r{ending}", start % b"0123abce")
