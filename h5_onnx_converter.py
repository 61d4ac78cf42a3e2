"""Step 4: convert the ten best networks to ONNX and prove that they compute the same.

Reads   pruned_model_top_*.h5 in --workdir (python dynamic_pruning_eval.py makes them) and the test rows in --data-dir
Writes  an .onnx file of the same name to --workdir for each, and to its folder quantized/ one for each bit width that
        step 3 trained, {name}_{bits}bits.onnx, in integer arithmetic
Run     python h5_onnx_converter.py
        python h5_onnx_converter.py --models MLP_model_0.h5 tf_pruned_model.h5
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from fhe_mlp import cli, networks, quantized
from fhe_mlp.dataset import load_dataset

if TYPE_CHECKING:
    import onnx

OPSET = 14  # what Concrete ML 1.9 asserts
TOLERANCE = 1e-5  # largest difference of a float network's probability in ONNX Runtime


def convert(mlp: networks.MLP) -> onnx.ModelProto:
    """Return the ONNX graph of a float network, batch size free, checked by onnx.checker with its shapes inferred."""
    import onnx
    import tensorflow as tf
    import tf2onnx

    signature = [tf.TensorSpec((None, mlp.features), tf.float32, name="features")]
    with networks.quiet_tensorflow():
        graph, _ = tf2onnx.convert.from_keras(networks.to_keras(mlp), signature, opset=OPSET)
    onnx.checker.check_model(graph, full_check=True)
    return graph


def outputs(onnx_file: Path, X: np.ndarray) -> dict[str, np.ndarray]:
    """Return the outputs (n,) of the file, by name, that ONNX Runtime computes for rows X (n, features)."""
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    values = session.run(None, {session.get_inputs()[0].name: X})
    return {output.name: value[:, 0] for output, value in zip(session.get_outputs(), values)}


def write_float(mlp: networks.MLP, expected: np.ndarray, target: Path, X: np.ndarray) -> tuple[int, float]:
    """Write a float network whose probabilities of rows X (n, features) are in ONNX Runtime those of Keras, else stop.

    expected: these probabilities (n,), as Keras computes them with the .h5 file that it loads itself.

    Returns the nodes of its graph and the largest difference.
    """
    graph = convert(mlp)
    with cli.whole_file(target) as temporary:
        temporary.write_bytes(graph.SerializeToString())
        (probability,) = outputs(temporary, X).values()
        largest = float(np.abs(probability - expected).max())
        if not largest <= TOLERANCE:
            raise SystemExit(f"{target}: ONNX Runtime differs by {largest:.1e}, over {TOLERANCE:.0e}")
    return len(graph.graph.node), largest


def write_quantized(network: quantized.QuantizedNetwork, target: Path, X: np.ndarray) -> None:
    """Write a quantized network whose integer sums of rows X (n, features) are equal in ONNX Runtime, else stop."""
    with cli.whole_file(target) as temporary:
        temporary.write_bytes(quantized.to_onnx(network).SerializeToString())
        found = outputs(temporary, X)
        for name, expected in zip(("tables", "linear"), network.sums(X)):
            if not np.array_equal(found.get(name, np.zeros(len(X))), expected):
                raise SystemExit(f"{target}: ONNX Runtime computes other integers than the network ({name})")


def main(argv: Sequence[str] | None = None) -> None:
    """Convert, check, compare."""
    parser = cli.make_parser(__doc__)
    parser.add_argument("--models", type=Path, nargs="+", help=".h5 files (default: the ten of step 3)")
    args = parser.parse_args(argv)
    workdir, made_by = args.workdir, "steps 1 to 3" if args.models else networks.STEP_3
    cli.check_writable(workdir)
    sources = args.models or networks.by_rank(workdir, ".h5")
    if not sources:
        raise cli.InputError(f"{workdir}: no pruned_model_top_*.h5 here; make them with: {networks.STEP_3}")
    if len({source.stem for source in sources}) < len(sources):
        raise cli.InputError("--models: two files have the same name, and so would their .onnx; convert one by one")
    loaded = [(networks.load_mlp(path, made_by), quantized.read_networks(path, made_by)) for path in sources]
    data = load_dataset(args.data_dir, loaded[0][0].map)
    for source, (mlp, _) in zip(sources, loaded):
        networks.check_features(mlp, source, data)
    networks.start_tensorflow(args.seed)
    rows, written, X = [], [], data.test.X
    for source, (mlp, found) in zip(sources, loaded):
        target = workdir / f"{source.stem}.onnx"
        nodes, largest = write_float(mlp, networks.probabilities_in_keras(source, X, made_by), target, X)
        written.append(target)
        for network in found:
            written.append(workdir / "quantized" / f"{source.stem}_{network.bits}bits.onnx")
            write_quantized(network, written[-1], X)
        bits = " ".join(str(network.bits) for network in found) or "none"
        rows.append({"file": target.name, "nodes": nodes, "largest difference": largest, "quantized to bits": bits})
        print(f"{source.name} -> .onnx and {len(found)} quantized, over {len(X)} rows", flush=True)
    ranked = [*networks.by_rank(workdir, ".onnx"), *networks.by_rank(workdir / "quantized", ".onnx")]
    for path in [] if args.models else ranked:
        if path not in written:
            print(f"{path.name} removed: its .h5 is gone")
            path.unlink()
    print(f"\n{pd.DataFrame(rows).to_string(index=False, float_format='{:.4g}'.format)}\n")
    print(f"wrote {len(rows)} checked .onnx files (opset {OPSET}) and {len(written) - len(rows)} in quantized/", end="")
    print(f", in {workdir}")


if __name__ == "__main__":
    cli.run(main)
