"""Small records and arrays that the tests make, and the settings they share."""

from __future__ import annotations

import itertools
import os
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pandas as pd
import pytest
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

STATUS = pytest.StashKey[int]()
BEAT_COUNT = 60
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
    for middle, symbol in zip(times, symbols):
        wide = 1.0 if symbol == "N" else 2.2
        for height, centre, width in ((0.15, -0.17, 0.02), (-0.1, -0.03, 0.01), (1.0, 0, 0.012), (-0.2, 0.03, 0.01)):
            bump = height * np.exp(-0.5 * ((t - middle - centre * wide) / (width * wide)) ** 2)
            signal += np.outer(bump, [1.0, 0.6])
        signal += np.outer(0.3 * np.exp(-0.5 * ((t - middle - 0.28) / 0.04) ** 2), [1.0, 0.5])
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


def refusal(main, argv: list[str], capsys: pytest.CaptureFixture) -> str:
    """The one line on stderr with which a command refuses; fails unless it exits with 2 and without a traceback."""
    from fhe_mlp.cli import run

    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(lambda: main([str(a) for a in argv]))
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "%|" not in line]  # no bars
    assert not any("Traceback" in line for line in lines)
    assert len(lines) == 1 or lines[0].startswith("usage:"), lines  # argparse shows the usage before its line
    return lines[-1]


@pytest.fixture(scope="session")
def keras():
    """tf_keras, started."""
    from fhe_mlp.networks import start_tensorflow

    return start_tensorflow(0)


def random_layers(widths, seed=0):
    """Kernels and biases of a float network of these widths, whose logits are of order 1."""
    rng, layers = np.random.default_rng(seed), []
    for inputs, neurons in itertools.pairwise(widths):
        kernel, bias = rng.normal(0, inputs**-0.5, (inputs, neurons)), rng.normal(0, 0.25, neurons)
        layers.append((kernel.astype(np.float32), bias.astype(np.float32)))
    return layers


def small_network(path, widths=(32, 3, 2, 1), seed=0):
    """Write a float network of random_layers as an .onnx file like those of step 4."""
    nodes, constants, name = [], [], "x"
    for k, layer in enumerate(random_layers(widths, seed)):
        constants += [numpy_helper.from_array(array, f"{kind}{k}") for kind, array in zip("wb", layer)]
        nodes.append(helper.make_node("MatMul", [name, f"w{k}"], [f"m{k}"]))
        nodes.append(helper.make_node("Add", [f"m{k}", f"b{k}"], [f"a{k}"]))
        name, operator = ("y", "Sigmoid") if k + 2 == len(widths) else (f"r{k}", "Relu")
        nodes.append(helper.make_node(operator, [f"a{k}"], [name]))
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None, widths[i]]) for n, i in (("x", 0), ("y", -1))]
    graph = helper.make_graph(nodes, "small", ends[:1], ends[1:], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8), path)
    return path


def random_rows(rows, seed=1):
    """Rows of 32 features as a scaler leaves them."""
    return np.clip(np.random.default_rng(seed).normal(0, 1.2, (rows, 32)), -3, 3).astype(np.float32)


def small_data(*parts):
    """Data set of (X, y, record of each row) for training, validation and test; left out, they are as the last."""
    from fhe_mlp.dataset import Dataset, Part

    made = [
        Part(np.float32(X), y, pd.DataFrame({"record": names, "patient": names, "aami": np.where(y, "V", "N")}), True)
        for X, y, names in parts
    ]
    return Dataset(*made, *[made[-1]] * (3 - len(made)), {}, [], None, "none")


def most_off(network, X):
    """How far (n,) the logits of a quantized network move when each accumulator is rounded up or down, at most."""
    place = np.floor(network.accumulators(X) / network.rounding_unit + 0.5).astype(int) + network.tables.shape[1] // 2
    tables = np.hstack([network.tables, -network.tables])  # beyond its ends a table continues negated
    entries = [tables[np.arange(network.neurons), (place + step) % tables.shape[1]] for step in (-1, 0, 1)]
    return np.abs(np.array(entries) - entries[1]).max(axis=0).sum(axis=1) * network.table_step


def pytest_sessionfinish(session, exitstatus):
    session.config.stash[STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    """Leave with pytest's own status: Concrete's runtime ends every process with 0, failed tests or not."""
    sys.stdout.flush()
    sys.stderr.flush()
    if not hasattr(config, "workerinput"):  # not in a worker, whose status nobody asks for
        os._exit(config.stash.get(STATUS, 3))


def until(happens):
    """Wait until `happens()` is true."""
    while not happens():
        time.sleep(0.02)


def pytest_collection_modifyitems(items):
    """Run what kills child processes first: where Concrete is loaded, the death of a child can end its parent."""
    items.sort(key=lambda item: item.path.name != "test_workers.py")
