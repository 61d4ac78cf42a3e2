"""Step 4: convert the ten best networks to ONNX and prove that they compute the same.

Reads   pruned_model_top_*.h5 in --workdir (python dynamic_pruning_eval.py makes them) and the test rows in --data-dir
Writes  an .onnx file of the same name to --workdir for each
Run     python h5_onnx_converter.py
        python h5_onnx_converter.py --models MLP_model_0.h5 tf_pruned_model.h5
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from preprocess_mitbih import (
    FEATURES,
    InputError,
    by_rank,
    check_writable,
    load_arrays,
    load_mlp,
    make_parser,
    quiet_tensorflow,
    run,
    start_tensorflow,
    whole_file,
)

if TYPE_CHECKING:
    import onnx
    import tf_keras

OPSET = 14  # what Concrete ML 1.9 asserts
MADE_BY = {
    "MLP_model_0": "python MLP_model_0.py",
    "tf_pruned_model": "python TF_pruning.py",
    "pruned_model": "python dynamic_pruning_eval.py",
}
TOLERANCE = 1e-5  # largest difference of a probability between Keras and ONNX Runtime


def convert(model: tf_keras.Sequential) -> onnx.ModelProto:
    """ONNX graph of a network, batch size free, checked by onnx.checker with its shapes inferred."""
    import onnx
    import tensorflow as tf
    import tf2onnx

    signature = [tf.TensorSpec((None, len(FEATURES)), tf.float32, name="features")]
    with quiet_tensorflow():
        graph, _ = tf2onnx.convert.from_keras(model, signature, opset=OPSET)
    onnx.checker.check_model(graph, full_check=True)
    return graph


def largest_difference(onnx_file: Path, model: Any, X: np.ndarray) -> float:
    """Largest absolute difference over the rows of X (n, 32) between the file in ONNX Runtime and `model` in Keras."""
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    (probability,) = session.run(None, {session.get_inputs()[0].name: X})
    expected = model(X).numpy()
    if probability.shape != expected.shape:
        return float("inf")
    return float(np.abs(probability - expected).max())


def main(argv: Sequence[str] | None = None) -> None:
    """Convert, check, compare."""
    parser = make_parser(__doc__)
    parser.add_argument("--models", type=Path, nargs="+", help=".h5 files (default: the ten of step 3)")
    args = parser.parse_args(argv)
    check_writable(args.workdir)
    X = load_arrays(args.data_dir)["test"][0]
    sources = args.models or by_rank(args.workdir, ".h5")
    if not sources:
        raise InputError(f"{args.workdir}: no pruned_model_top_*.h5 here; make them with: {MADE_BY['pruned_model']}")
    if len({source.stem for source in sources}) < len(sources):
        raise InputError("--models: two files have the same name, and so would their .onnx; convert them one by one")
    start_tensorflow(args.seed)
    models = {}
    for source in sources:  # all are read before one is written
        made_by = next((command for start, command in MADE_BY.items() if source.name.startswith(start)), "steps 1 to 3")
        models[source] = load_mlp(source, made_by)
    rows = []
    for source, model in models.items():
        target = args.workdir / f"{source.stem}.onnx"
        with whole_file(target) as temporary:
            graph = convert(model)
            temporary.write_bytes(graph.SerializeToString())
            difference = largest_difference(temporary, model, X)
            if not difference <= TOLERANCE:
                raise SystemExit(f"{source}: ONNX Runtime differs from Keras by {difference:.1e}, over {TOLERANCE:.0e}")
        rows.append({"file": target.name, "nodes": len(graph.graph.node), "largest difference": difference})
        print(f"{source.name} -> {target.name}, largest difference {difference:.1e} over {len(X)} rows")
    if not args.models:
        for old in by_rank(args.workdir, ".onnx"):
            if old.with_suffix(".h5") not in models:
                old.unlink()
    print(f"\n{pd.DataFrame(rows).to_string(index=False, float_format='{:.1e}'.format)}\n")
    print(f"wrote {len(rows)} checked .onnx files (opset {OPSET}) to {args.workdir}")


if __name__ == "__main__":
    run(main)
