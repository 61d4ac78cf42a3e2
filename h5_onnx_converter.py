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
MADE_BY = {
    "MLP_model_0": "python MLP_model_0.py",
    "tf_pruned_model": "python TF_pruning.py",
    "pruned_model": "python dynamic_pruning_eval.py",
}
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


def write_float(mlp: networks.MLP, target: Path, X: np.ndarray) -> tuple[int, float]:
    """Write a float network that has all probabilities of rows X (n, features) in ONNX Runtime, else stop.

    Returns the nodes of its graph and the largest difference.
    """
    graph = convert(mlp)
    with cli.whole_file(target) as temporary:
        temporary.write_bytes(graph.SerializeToString())
        (probability,) = outputs(temporary, X).values()
        largest = float(np.abs(probability - mlp.probabilities(X)).max())
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


def remove_outdated(folder: Path, written: set[Path]) -> None:
    """Delete the .onnx files of step 3's networks in `folder` that are not in `written`."""
    for path in networks.by_rank(folder, ".onnx"):
        if path not in written:
            print(f"{path.name} removed: its .h5 is gone")
            path.unlink()


def main(argv: Sequence[str] | None = None) -> None:
    """Convert, check, compare."""
    parser = cli.make_parser(__doc__)
    parser.add_argument("--models", type=Path, nargs="+", help=".h5 files (default: the ten of step 3)")
    args = parser.parse_args(argv)
    cli.check_writable(args.workdir)
    sources = args.models or networks.by_rank(args.workdir, ".h5")
    if not sources:
        made_by = MADE_BY["pruned_model"]
        raise cli.InputError(f"{args.workdir}: no pruned_model_top_*.h5 here; make them with: {made_by}")
    if len({source.stem for source in sources}) < len(sources):
        raise cli.InputError(
            "--models: two files have the same name, and so would their .onnx; convert them one by one"
        )
    commands = [next((c for start, c in MADE_BY.items() if s.name.startswith(start)), "steps 1 to 3") for s in sources]
    mlps = [networks.load_mlp(source, made_by) for source, made_by in zip(sources, commands)]
    quantizeds = [quantized.read_networks(source, made_by) for source, made_by in zip(sources, commands)]
    if len({mlp.map for mlp in mlps}) > 1:
        raise cli.InputError("--models: the networks are of different public maps; convert them one by one")
    X = load_dataset(args.data_dir, mlps[0].map).test.X
    for source, mlp in zip(sources, mlps):
        if mlp.features != X.shape[1]:
            raise cli.InputError(f"{source}: takes {mlp.features} features, the arrays have {X.shape[1]}")
    networks.start_tensorflow(args.seed)
    rows, written = [], set()
    for source, mlp, found in zip(sources, mlps, quantizeds):
        target = args.workdir / f"{source.stem}.onnx"
        nodes, largest = write_float(mlp, target, X)
        written.add(target)
        for network in found:
            target = args.workdir / "quantized" / f"{source.stem}_{network.bits}bits.onnx"
            write_quantized(network, target, X)
            written.add(target)
        bits = " ".join(str(network.bits) for network in found) or "none"
        row = {"file": f"{source.stem}.onnx", "nodes": nodes, "largest difference": largest, "quantized to bits": bits}
        rows.append(row)
        print(f"{source.name} -> .onnx and {len(found)} quantized, over {len(X)} rows", flush=True)
    if not args.models:
        for folder in (args.workdir, args.workdir / "quantized"):
            remove_outdated(folder, written)
    print(f"\n{pd.DataFrame(rows).to_string(index=False, float_format='{:.4g}'.format)}\n")
    print(
        f"wrote {len(rows)} checked .onnx files (opset {OPSET}) and {len(written) - len(rows)} in quantized/, in",
        end="",
    )
    print(f" {args.workdir}")


if __name__ == "__main__":
    cli.run(main)
