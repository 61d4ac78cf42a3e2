"""Small records and arrays that the tests make, and the settings they share."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fhe_mlp.ecg_features import FEATURES  # noqa: E402
from fhe_mlp.records import EXPECTED_LEADS  # noqa: E402

STATUS = pytest.StashKey[int]()
BEAT_COUNT = 60
SMALL = {  # settings of step 5 in tests: wide circuits of default PTQ take half a minute to compile
    "DEFAULT_PTQ_BITS": (2,),
    "SIMULATED_ROWS": 60,
    "ROUNDING_BITS": 4,
    "P_ERROR": 2.0**-40,  # the keys of 2^-13 are larger, and take longer
}
SMALL_LAYER = {"MEASURED_NEURONS": 2, "MEASURED_ROUNDING_BITS": 4}  # the same, of the layer that measures the machine
SPEED = {"unit": 1e-10, "key_byte": 1e-8, "simulated_pbs": 1e-5}  # of this machine, where it need not be measured
RUN = {"output_fhe": 1.0, "encrypt_seconds": 0.1, "run_seconds": 0.1, "decrypt_seconds": 0.1}  # of a beat, where keys
RUN |= {"input_bytes": 1000, "output_bytes": 1000}  # need not be made: what circuit.run_encrypted returns
RATES = ("--rates", "25", "75", "90", "100")  # of step 3
ABNORMAL = ("V", "A", "F")  # abnormal symbols that the records hold besides N


def write_atr(path: Path, marks, clock: float | None = None) -> None:
    """Write an .atr of (sample, code, *((kind, value) or note)) in any order, which wfdb 4.1.2 cannot: annot(5).

    code: a symbol or a number; kind: "sub", "chan" or "num"; clock: the time resolution (Hz) that the file states.
    """
    from wfdb.io.annotation import ann_label_table

    codes = dict(zip(ann_label_table["symbol"], ann_label_table["label_store"]))
    marks, content, last = list(marks), b"", 0
    if clock is not None:
        marks.insert(0, (0, '"', f"## time resolution: {clock:g}"))
    for sample, code, *more in marks:
        step, last = int(sample) - last, int(sample)
        if not 0 <= step < 1024:
            high, low = divmod(step % 2**32, 2**16)
            content += bytes([0, 59 << 2, *high.to_bytes(2, "little"), *low.to_bytes(2, "little")])
            step = 0
        content += (step + (codes.get(code, code) << 10)).to_bytes(2, "little")
        for item in more:
            if isinstance(item, str):
                content += bytes([len(item), 63 << 2]) + item.encode() + bytes(len(item) % 2)
            else:
                content += bytes([item[1] % 256, {"num": 60, "sub": 61, "chan": 62}[item[0]] << 2])
    path.write_bytes(content + b"\0\0")


def make_record(
    folder: Path,
    name: str,
    fs: float = 360.0,
    seed: int = 0,
    leads: int = 2,
    annotate: bool = True,
    symbols: list[str] | None = None,
    edit=lambda signal: signal,
    names: tuple[str, ...] = ("MLII", "V1"),
    units: tuple[str, ...] = ("mV", "mV"),
    fmt: str = "16",
    marks=lambda samples, symbols: [(samples[0], "+", "(N\0"), *zip(samples, symbols)],
    clock: float | None = None,
) -> np.ndarray:
    """Write an ECG-like WFDB record and return its beats' samples; every third beat is abnormal, wide and early.

    marks: what the .atr holds of the beats' samples (on `clock`, where given) and symbols, as write_atr takes it; by
    default the beats and a rhythm change, which is none.
    """
    import wfdb

    rng = np.random.default_rng(seed)
    symbols = symbols or [ABNORMAL[(k // 3) % 3] if k % 3 == 2 else "N" for k in range(BEAT_COUNT)]
    rr = np.array([0.55 if s != "N" else 0.85 for s in symbols]) + rng.normal(0, 0.02, len(symbols))
    times = 0.8 + np.cumsum(rr)
    t = np.arange(int((times[-1] + 1.0) * fs)) / fs
    signal = rng.normal(0, 0.01, (len(t), 2))
    for time, symbol in zip(times, symbols):
        wide = 1.0 if symbol == "N" else 2.2
        for height, centre, width in ((0.15, -0.17, 0.02), (-0.1, -0.03, 0.01), (1.0, 0, 0.012), (-0.2, 0.03, 0.01)):
            bump = height * np.exp(-0.5 * ((t - time - centre * wide) / (width * wide)) ** 2)
            signal += np.outer(bump, [1.0, 0.6])
        signal += np.outer(0.3 * np.exp(-0.5 * ((t - time - 0.28) / 0.04) ** 2), [1.0, 0.5])
    folder.mkdir(parents=True, exist_ok=True)
    signal = edit(signal)[:, :leads]
    count = signal.shape[1]
    unique = [f"lead{k}" for k in range(count)]  # wfdb writes no equal names, which other programs do
    wfdb.wrsamp(name, fs, list(units[:count]), unique, signal, fmt=[fmt] * count, write_dir=str(folder))
    header = folder / f"{name}.hea"
    for lead, given in zip(unique, names):
        header.write_text(header.read_text().replace(lead, given))
    if annotate:
        write_atr(folder / f"{name}.atr", marks(np.rint(times * (clock or fs)).astype(int), symbols), clock)
    return np.rint(times * fs).astype(int)


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """A folder of four small two-lead records, two of DS1 and two of DS2."""
    folder = tmp_path / "records"
    for seed, name in enumerate(("101", "106", "100", "103")):
        make_record(folder, name, seed=seed)
    return folder


@pytest.fixture(scope="session")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first rows of the shipped arrays, without dataset.json, as somebody else's arrays would come."""
    folder = tmp_path_factory.mktemp("arrays")
    for split, rows in (("train", 3000), ("val", 600), ("test", 600)):
        for kind in "Xy":
            array = np.load(ROOT / "data" / f"Arryth_MITBIH_{split}_{kind}.npy")
            np.save(folder / f"Arryth_MITBIH_{split}_{kind}.npy", array[:rows])
    return folder


@pytest.fixture(scope="session")
def workdir(arrays: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which steps 1 to 4 have run on small settings."""
    import dynamic_pruning_eval
    import h5_onnx_converter
    import MLP_model_0
    import TF_pruning

    folder = tmp_path_factory.mktemp("work")
    common = ["--data-dir", str(arrays), "--workdir", str(folder)]
    MLP_model_0.main([*common, "--epochs", "8"])
    TF_pruning.main([*common, "--epochs", "4"])
    dynamic_pruning_eval.main([*common, *RATES, "--fine-tune-epochs", "1", "--quantization-epochs", "1"])
    h5_onnx_converter.main(common)
    return folder


def refusal(main, argv: list[str], capsys: pytest.CaptureFixture) -> str:
    """The one line on stderr with which a command refuses; fails unless it exits with 2 and without a traceback."""
    from fhe_mlp.cli import run

    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(lambda: main([str(a) for a in argv]))
    assert stop.value.code == 2
    lines = [
        line for line in capsys.readouterr().err.splitlines() if "%|" not in line and line.strip()
    ]  # less progress bars
    assert not any("Traceback" in line for line in lines)
    assert len(lines) == 1 or lines[0].startswith("usage:"), lines  # argparse shows the usage before its line
    return lines[-1]


def small_network(path, widths=(32, 3, 2, 1), last="Sigmoid", edit=lambda weights: weights, seed=0):
    """Write a small ONNX MLP as step 4 does."""
    rng = np.random.default_rng(seed)
    nodes, weights, name = [], {}, "x"
    for k, (a, b) in enumerate(itertools.pairwise(widths)):
        weights |= {f"w{k}": rng.normal(size=(a, b)), f"b{k}": rng.normal(size=b) / 4}
        nodes += [
            helper.make_node("MatMul", [name, f"w{k}"], [f"m{k}"]),
            helper.make_node("Add", [f"m{k}", f"b{k}"], [f"a{k}"]),
        ]
        name = f"r{k}" if k + 2 < len(widths) else "y"
        nodes.append(helper.make_node("Relu" if name != "y" else last, [f"a{k}"], [name]))
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, widths[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, widths[-1]])],
        [numpy_helper.from_array(w.astype(np.float32), n) for n, w in edit(weights).items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8), path)
    return path


def three_inputs(weights):
    """Of small_network, without the others: at 2 and 3 bits, 5 rounding bits then hold the whole accumulators."""
    return {**weights, "w0": np.where(np.arange(len(weights["w0"]))[:, None] < 3, weights["w0"], 0)}


def command(*argv: str, prelude: str, measured: bool = False) -> list[str]:
    """Step 5 in a process of its own, with the settings SMALL; prelude: code before it starts, with step 5 as `s`.

    measured: measure the machine's speed, on the layer of SMALL_LAYER.
    """
    code = (
        "import sys, fhe_experiments as s\nfrom fhe_mlp.cli import run_in_child\n"
        + "".join(f"s.{name} = {value!r}\n" for name, value in SMALL.items())
        + "from fhe_mlp import circuit\n"
        + "".join(f"circuit.{name} = {value!r}\n" for name, value in SMALL_LAYER.items())
        + ("" if measured else f"circuit.measure_speed = lambda *_: circuit.Speed(**{SPEED})\n")
        + f"{prelude}\nsys.argv[0] = 'fhe_experiments.py'\n"
        "run_in_child(lambda: s.main(sys.argv[1:]), s.RESUME, s.show_saved)\n"
    )
    return [sys.executable, "-c", code, *argv]


@pytest.fixture(scope="session", autouse=True)
def small_settings():
    """Step 5 with the settings SMALL, on a machine of known speed; yields the function that would measure it."""
    import fhe_experiments
    from fhe_mlp import circuit

    measure_speed = circuit.measure_speed
    with pytest.MonkeyPatch.context() as patch:
        for module, settings in ((circuit, SMALL_LAYER), (fhe_experiments, SMALL)):
            for name, value in settings.items():
                patch.setattr(module, name, value)
        patch.setattr(circuit, "measure_speed", lambda *_: circuit.Speed(**SPEED))
        yield measure_speed


def pytest_sessionfinish(session, exitstatus):
    session.config.stash[STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    """Leave with pytest's own status: Concrete's runtime ends every process with 0, failed tests or not."""
    sys.stdout.flush()
    sys.stderr.flush()
    if not hasattr(config, "workerinput"):  # not in a worker, whose status nobody asks for
        os._exit(config.stash.get(STATUS, 3))


def call(folder, script, *argv, status=0):
    """Run one side's script in its own folder, without this checkout; what it printed, of a refusal the one line."""
    command = [sys.executable, "-E", "-s", script, *map(str, argv)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    lines = [line for line in done.stderr.splitlines() if not re.search("CUDA|KeySetCache", line)]
    if not status:
        return done.stdout
    assert len(lines) == 1, lines
    assert done.stdout == ""
    return lines[0]


def exchange(hospital, server):
    """Keys, encryption of the example beats, their answers, and everything that travels in its place."""
    call(hospital, "client.py", "keys")
    call(hospital, "client.py", "encrypt", "example_beats.csv")
    for name in ("encrypted_beats.zip", "evaluation_keys.zip"):
        shutil.copy(hospital / name, server)
    call(server, "server.py", "encrypted_beats.zip", "evaluation_keys.zip")
    shutil.copy(server / "encrypted_answers.zip", hospital)


def describe(features):
    """What the script passes to export, for a network of as many features."""
    return {
        "name": f"small with {features} features",
        "output": "logit",
        "threshold": 0.0,
        "p_error": 2.0**-40,
        "security_bits": 128,
        "test_balanced_accuracy": 0.9876,
        "test_rows": 12345,
        "complexity": 1.5e9,
        "pbs": 3,
        "expand": "none",
        "leads": EXPECTED_LEADS,
        "features": FEATURES
        if features == len(FEATURES)
        else [{"name": f"ampl, {k}", "unit": "mV", "formula": "as measured"} for k in range(features)],
        "scaler": {"mean": list(range(features)), "sd": [0.5] * features, "clip_sd": 3.0},
    }


def options(arrays, folder, *more, **network):
    """Arguments of step 5 for one small network in `folder`, which is made there."""
    if not (folder / "small.onnx").exists():
        small_network(folder / "small.onnx", **{"widths": (32, 3, 1), "edit": three_inputs, **network})
    common = ["--data-dir", arrays, "--workdir", folder, "--models", folder / "small.onnx", "--samples", "2", *more]
    return [str(word) for word in common]
