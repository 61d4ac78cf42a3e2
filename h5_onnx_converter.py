"""Step 4: convert the ten best networks to ONNX and prove that they compute the same.

Reads   pruned_model_top_*.h5 in --workdir (python dynamic_pruning_eval.py makes them) and the test rows in --data-dir
Writes  an .onnx file of the same name to --workdir for each, and to its folder quantized/ one for each bit width that
        step 3 trained, {name}_{bits}bits.onnx, with Quant nodes that Concrete ML imports
Run     python h5_onnx_converter.py
        python h5_onnx_converter.py --models MLP_model_0.h5 tf_pruned_model.h5
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from fhe_mlp.arrays import load_arrays
from fhe_mlp.cli import InputError, check_writable, make_parser, run, whole_file
from fhe_mlp.graphs import to_onnx
from fhe_mlp.networks import by_rank, load_mlp, public_map, quiet_tensorflow, start_tensorflow
from fhe_mlp.quantized import QuantizedNetwork, read_h5

if TYPE_CHECKING:
    import onnx
    import tf_keras

OPSET = 14  # what Concrete ML 1.9 asserts
MADE_BY = {
    "MLP_model_0": "python MLP_model_0.py",
    "tf_pruned_model": "python TF_pruning.py",
    "pruned_model": "python dynamic_pruning_eval.py",
}
TOLERANCE = 1e-5  # largest difference of a probability in ONNX Runtime


def convert(model: tf_keras.Sequential) -> onnx.ModelProto:
    """ONNX graph of a network, batch size free, checked by onnx.checker with its shapes inferred."""
    import onnx
    import tensorflow as tf
    import tf2onnx

    signature = [tf.TensorSpec(model.input_shape, tf.float32, name="features")]
    with quiet_tensorflow():
        graph, _ = tf2onnx.convert.from_keras(model, signature, opset=OPSET)
    onnx.checker.check_model(graph, full_check=True)
    return graph


def differences(onnx_file: Path, expected: np.ndarray, X: np.ndarray) -> np.ndarray:
    """Absolute differences (n,) of `expected` (n, 1) from what the file gives in ONNX Runtime for rows X."""
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    (probability,) = session.run(None, {session.get_inputs()[0].name: X})
    if probability.shape != expected.shape:
        return np.full(len(expected), np.inf)
    return np.abs(probability - expected)[:, 0]


def write_checked(graph: onnx.ModelProto, target: Path, expected: np.ndarray, X: np.ndarray) -> float:
    """Write a graph that gives all rows X (n, features) the probabilities `expected` (n, 1), else stop.

    Returns the largest absolute difference.
    """
    with whole_file(target) as temporary:
        temporary.write_bytes(graph.SerializeToString())
        largest = float(differences(temporary, expected, X).max())
        if not largest <= TOLERANCE:
            raise SystemExit(f"{target}: ONNX Runtime differs by {largest:.1e}, over {TOLERANCE:.0e}")
    return largest


def probabilities(network: QuantizedNetwork, X: np.ndarray) -> np.ndarray:
    """Probabilities (n, 1) for rows X (n, features), as the encrypted graph computes them."""
    return (1 / (1 + np.exp(-network.run(X)[0])))[:, None].astype(np.float32)


def main(argv: Sequence[str] | None = None) -> None:
    """Convert, check, compare."""
    parser = make_parser(__doc__)
    parser.add_argument("--models", type=Path, nargs="+", help=".h5 files (default: the ten of step 3)")
    args = parser.parse_args(argv)
    check_writable(args.workdir)
    X = load_arrays(args.data_dir, public_map(args.workdir))["test"][0]
    sources = args.models or by_rank(args.workdir, ".h5")
    if not sources:
        raise InputError(f"{args.workdir}: no pruned_model_top_*.h5 here; make them with: {MADE_BY['pruned_model']}")
    if len({source.stem for source in sources}) < len(sources):
        raise InputError("--models: two files have the same name, and so would their .onnx; convert them one by one")
    start_tensorflow(args.seed)
    models, quantized = {}, {}
    for source in sources:  # all are read before one is written
        made_by = next((command for start, command in MADE_BY.items() if source.name.startswith(start)), "steps 1 to 3")
        models[source] = load_mlp(source, made_by, X.shape[1])
        quantized[source] = read_h5(source, made_by)
    rows, written = [], set()
    folder = args.workdir / "quantized"
    for source, model in models.items():
        target = args.workdir / f"{source.stem}.onnx"
        graph = convert(model)
        row = {"file": target.name, "nodes": len(graph.graph.node)}
        row["largest difference"] = write_checked(graph, target, model(X).numpy(), X)
        for network in quantized[source]:
            target = folder / f"{source.stem}_{network.bits}bits.onnx"
            write_checked(to_onnx(network, OPSET), target, probabilities(network, X), X)
            written.add(target)
        row |= {"quantized to bits": " ".join(str(network.bits) for network in quantized[source]) or "none"}
        rows.append(row)
        print(f"{source.name} -> .onnx and {len(quantized[source])} quantized, over {len(X)} rows", flush=True)
    if not args.models:
        for old in by_rank(args.workdir, ".onnx"):
            if old.with_suffix(".h5") not in models:
                print(f"{old.name} removed: its .h5 is gone")
                old.unlink()
        for old in by_rank(folder, ".onnx"):
            if old not in written:
                old.unlink()
    print(f"\n{pd.DataFrame(rows).to_string(index=False, float_format='{:.4g}'.format)}\n")
    print(f"wrote {len(rows)} checked .onnx files (opset {OPSET}) to {args.workdir}, {len(written)} to its quantized/")


if __name__ == "__main__":
    run(main)
