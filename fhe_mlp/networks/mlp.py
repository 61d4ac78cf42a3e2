"""The float network as a numpy dataclass, and its .h5 and .onnx files."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from scipy.special import expit

from fhe_mlp.cli import InputError, first_line
from fhe_mlp.dataset import Dataset, Part, load_dataset
from fhe_mlp.ecg import balanced_accuracy
from fhe_mlp.scaling import NONE, public_map

if TYPE_CHECKING:
    import onnx

Layers = list[tuple[np.ndarray, np.ndarray]]  # kernel (inputs, neurons) and bias (neurons,), float32, of each layer
STEP_3 = "python dynamic_pruning_eval.py"  # makes the .h5 files of the ten best networks
STEP_4 = "python h5_onnx_converter.py"  # makes the .onnx files


@dataclass(frozen=True, eq=False)
class MLP:
    """Dense layers with ReLU, then one logit, whose sign is the decision.

    noise: standard deviation of what training adds to the features; threshold: probability of an abnormal beat that
    decides, which the last bias has moved to 0.5; map: public map of the features (scaling.public_map).
    """

    layers: Layers
    noise: float = 0.0
    threshold: float = 0.5
    map: str = NONE

    @property
    def features(self) -> int:
        """Columns of its input."""
        return len(self.layers[0][0])

    @property
    def widths(self) -> list[int]:
        """Neurons of each hidden layer."""
        return [len(bias) for _, bias in self.layers[:-1]]

    @property
    def parameters(self) -> int:
        """Weights and biases."""
        return sum(kernel.size + bias.size for kernel, bias in self.layers)

    @property
    def shift(self) -> float:
        """Sum that the threshold has added to the logit."""
        return float(-np.log(self.threshold / (1 - self.threshold))) + 0.0  # no -0.0

    def moved(self, by: float) -> MLP:
        """Return the network with `by` added to the logit of every row."""
        kernel, bias = self.layers[-1]
        return replace(self, layers=[*self.layers[:-1], (kernel, bias + np.float32(by))])

    def decided_at(self, threshold: float) -> MLP:
        """Return the network, so far decided at 0.5, with another probability as its threshold."""
        moved = replace(self, threshold=threshold)
        return moved.moved(moved.shift)

    def logits(self, X: np.ndarray) -> np.ndarray:
        """Return the logits (n,) float32 of rows X (n, features) float32."""
        for kernel, bias in self.layers[:-1]:
            X = np.maximum(X @ kernel + bias, 0)
        kernel, bias = self.layers[-1]
        return (X @ kernel + bias)[:, 0]

    def probabilities(self, X: np.ndarray) -> np.ndarray:
        """Return the probabilities (n,) float32; over 0.5, a beat is abnormal."""
        return expit(self.logits(X))

    def decisions(self, X: np.ndarray) -> np.ndarray:
        """Return 1 for each row that is decided abnormal, else 0: (n,) int64."""
        return (self.logits(X) > 0).astype(np.int64)

    def balanced_accuracy(self, part: Part) -> float:
        return balanced_accuracy(self.decisions(part.X), part.y)


@contextlib.contextmanager
def refusing(path: Path, what: str, made_by: str) -> Iterator[None]:
    """Turn what reading a damaged or unsuitable file raises, a dozen unrelated types, into InputError.

    made_by: the command that makes the file.
    """
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{path}: not found; make it with: {made_by}") from None
    except Exception as error:
        remedy = f"move it away, then make it with: {made_by}"
        raise InputError(f"{path}: is not a valid {what} ({first_line(error)}); {remedy}") from None


def load_mlp(path: Path, made_by: str) -> MLP:
    """Return the network in an .h5 file of Keras or of this pipeline; no code in it is run.

    made_by: the command that makes the file. Raises InputError unless it is a chain of Dense (ReLU, at the end one
    sigmoid), GaussianNoise and Dropout layers, each applied once, all weights finite.
    """
    with refusing(path, "network of this pipeline", made_by), h5py.File(path) as file:
        model = json.loads(file.attrs["model_config"])["config"]
        check_chain(model)
        config = model["layers"]
        first, noise, layers = config[0]["config"], 0.0, []
        width = int((first.get("batch_input_shape") or first["batch_shape"])[1])  # as Keras 2 and 3 name it
        for layer in config:
            kind, own = layer["class_name"], layer["config"]
            if kind == "Dense":
                if own["activation"] != ("sigmoid" if layer is config[-1] else "relu"):
                    raise ValueError(f"activation {own['activation']} in {own['name']}")
                group = file["model_weights"][own["name"]]
                kernel, bias = (group[name][()].astype(np.float32) for name in group.attrs["weight_names"])
                if (kernel.shape, bias.shape) != ((width, own["units"]), (own["units"],)):
                    raise ValueError(f"weights of {own['name']} whose shapes do not fit")
                layers.append((kernel, bias))
                width = own["units"]
            elif kind == "GaussianNoise":
                noise = float(own["stddev"])
            elif kind not in ("InputLayer", "Dropout"):
                raise ValueError(f"layer {kind}")
        threshold = float(file.attrs.get("threshold", 0.5))
        if not (0 < threshold < 1 and 0 <= noise < math.inf):
            raise ValueError(f"threshold {threshold}, noise {noise}")
        if width != 1 or not layers:
            raise ValueError("no sigmoid output at its end")
        if not all(np.isfinite(w).all() for layer in layers for w in layer):
            raise ValueError("NaN or infinite weights")
        return MLP(layers, noise, threshold, public_map(str(file.attrs.get("map", NONE))))


def tensors(config: Any) -> list[list[Any]]:
    """Return each [layer, which time it is applied, which output] inside a configuration of Keras 2 or 3."""
    if isinstance(config, list) and [type(item) for item in config[:3]] == [str, int, int]:
        return [config[:3]]
    parts = config.values() if isinstance(config, dict) else config if isinstance(config, list) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def check_chain(model: dict[str, Any]) -> None:
    """Raise ValueError where a layer of a Keras model's configuration takes more or else than the one before gives."""
    names = [layer["config"]["name"] for layer in model["layers"]]
    if "output_layers" in model:  # else it is Sequential, which names no tensors
        taken = [*(layer["inbound_nodes"] for layer in model["layers"]), model["output_layers"]]
        if [tensors(calls) for calls in taken] != [[], *([[name, 0, 0]] for name in names)]:
            raise ValueError("layers that are no plain chain, each applied once")
    if len(set(names)) < len(names):
        raise ValueError("two layers of one name")


def load_with_data(path: Path, made_by: str, data_dir: Path) -> tuple[MLP, Dataset]:
    """Return the network in an .h5 file and the data set with its map. Raises InputError where they do not fit, too."""
    mlp = load_mlp(path, made_by)
    data = load_dataset(data_dir, mlp.map)
    check_features(mlp, path, data)
    return mlp, data


def check_features(mlp: MLP, path: Path, data: Dataset) -> None:
    """Raise InputError where the network of this file takes another number of features than the data set has."""
    if mlp.features != data.train.X.shape[1] or mlp.map != data.map:
        own, theirs = (f"{x.map}, {n} columns" for x, n in ((mlp, mlp.features), (data, data.train.X.shape[1])))
        raise InputError(f"{path}: takes other features (map {own}) than the arrays have (map {theirs})")


def by_rank(workdir: Path, suffix: str) -> list[Path]:
    """Return step 3's networks pruned_model_top_{rank}_... in `workdir`, as .h5 or .onnx files, the best first."""
    ranked = [(path.name.split("_")[3], path) for path in workdir.glob(f"pruned_model_top_*{suffix}") if path.is_file()]
    return [path for _, path in sorted((int(rank), path) for rank, path in ranked if rank.isdecimal())]


# ---------------------------------------------------------------------------------------------------------- .onnx files
def load_onnx_mlp(path: Path, features: int) -> onnx.ModelProto:
    """Return a checked ONNX file of step 4: MatMul/Gemm, Add and Relu layers from `features` inputs to one sigmoid.

    Raises InputError for anything else.
    """
    import onnx

    with refusing(path, "ONNX network", STEP_4):
        model = onnx.load_model(path)
        onnx.checker.check_model(model, full_check=True)
        inputs, outputs = (
            [[d.dim_value for d in value.type.tensor_type.shape.dim][1:] for value in values]
            for values in (model.graph.input, model.graph.output)
        )
        *nodes, last = (node.op_type for node in model.graph.node)
        layers = last == "Sigmoid" and {"MatMul", "Gemm", "Add", "Relu"}.issuperset(nodes)
        if not layers or (inputs, outputs) != ([[features]], [[1]]):
            raise ValueError(f"no MLP from the arrays' {features} features to one sigmoid")
        return model
