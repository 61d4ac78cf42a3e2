"""The float network as a numpy dataclass, and its .h5 and .onnx files."""

from __future__ import annotations

import argparse
import json
import math
import re
import struct
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
HEAP = re.compile(rb"GCOL\x01...(.{8})", re.DOTALL)  # start of a global heap of an HDF5 file, and its size
MOST_NEURONS = 4096  # a layer, inputs too; more in a file are a damaged number


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
        """Return the balanced accuracy on a part of the data."""
        return balanced_accuracy(self.decisions(part.X), part.y)


def open_h5(path: Path) -> h5py.File:
    """Open an .h5 file to read. Raises ValueError for damage on which the HDF5 library stays for ever, deaf to Ctrl-C.

    It walks through the global heaps, which hold all texts, from item to item: index (0: free space, to the end) and
    size. Zeros, as of a part that was never written, are free space of size 0.
    """
    content, place = path.read_bytes(), 0
    while heap := HEAP.search(content, place):
        place, end = heap.end(), heap.start() + int.from_bytes(heap[1], "little")
        while place + 16 <= end:
            index, size = struct.unpack_from("<H6xQ", content, place)
            step = 16 + -(-size // 8) * 8 if index else size
            if not 0 < step <= end - place:
                raise ValueError("a heap of its texts is damaged")
            place += step
    return h5py.File(path)


def claimed_bytes(dataset: h5py.Dataset, path: Path) -> int:
    """Return the memory that reading a data set of the HDF5 file at `path` takes.

    Raises ValueError unless it holds numbers, and in this file.
    """
    if dataset.file.filename != str(path) or dataset.external or dataset.is_virtual or dataset.dtype.kind not in "if":
        raise ValueError(f"{dataset.name} holds no numbers of its own")
    return math.prod(dataset.shape) * dataset.dtype.itemsize


def read_dense(group: h5py.Group, config: dict[str, Any], inputs: int, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return kernel and bias of a Dense layer. Raises ValueError, or others, where its parts do not fit together."""
    stored = [group[config["name"]][name] for name in group[config["name"]].attrs["weight_names"]]
    if sum(claimed_bytes(dataset, path) for dataset in stored) > path.stat().st_size:
        raise ValueError("its weights claim to be larger than the file")
    kernel, bias = (dataset[()].astype(np.float32) for dataset in stored)
    if (kernel.shape, bias.shape) != ((inputs, config["units"]), (config["units"],)):
        raise ValueError(f"weights of {config['name']} whose shapes do not fit")
    return kernel, bias


def load_mlp(path: Path, made_by: str) -> MLP:
    """Return the network in an .h5 file of Keras or of this pipeline; no code in it is run.

    made_by: the command that makes the file. Raises InputError unless it is a sequence of Dense (ReLU, at the end one
    sigmoid), GaussianNoise and Dropout layers, all weights finite.
    """
    remedy = f"make it with: {made_by}"
    if not path.exists():
        raise InputError(f"{path}: not found; {remedy}")
    layers: Layers = []
    try:
        with open_h5(path) as file:
            config = json.loads(file.attrs["model_config"])["config"]["layers"]
            first, noise = config[0]["config"], 0.0
            width = int((first.get("batch_input_shape") or first["batch_shape"])[1])  # as Keras 2 and 3 name it
            if not 0 < width <= MOST_NEURONS:
                raise ValueError(f"{width} inputs")
            for layer in config:
                kind, own = layer["class_name"], layer["config"]
                if kind == "Dense":
                    activation = "sigmoid" if layer is config[-1] else "relu"
                    if own["activation"] != activation or not 0 < own["units"] <= MOST_NEURONS:
                        raise ValueError(f"{own['units']} neurons with activation {own['activation']} in {own['name']}")
                    layers.append(read_dense(file["model_weights"], own, width, path))
                    width = own["units"]
                elif kind == "GaussianNoise":
                    noise = float(own["stddev"])
                elif kind not in ("InputLayer", "Dropout"):
                    raise ValueError(f"layer {kind}")
            threshold = float(file.attrs.get("threshold", 0.5))
            mlp = MLP(layers, noise, threshold, public_map(str(file.attrs.get("map", NONE))))
        if not (0 < threshold < 1 and 0 <= noise < math.inf):
            raise ValueError(f"threshold {threshold}, noise {noise}")
    except (Exception, argparse.ArgumentTypeError) as error:  # HDF5 and json raise a dozen unrelated types
        reason = first_line(error)
        raise InputError(f"{path}: is truncated or not a valid network of this pipeline ({reason}); {remedy}") from None
    if width != 1 or not layers:
        raise InputError(f"{path}: does not end in one sigmoid output; {remedy}")
    if not all(np.isfinite(w).all() for layer in layers for w in layer):
        raise InputError(f"{path}: holds NaN or infinite weights; {remedy}")
    return mlp


def load_with_data(path: Path, made_by: str, data_dir: Path) -> tuple[MLP, Dataset]:
    """Return the network in an .h5 file and the data set, mapped as the network's features are.

    Raises InputError, as load_mlp and load_dataset do, and where the network takes another number of features.
    """
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
def read_graph(path: Path) -> onnx.ModelProto:
    """Return a checked ONNX file without functions of its own; data outside the file is not followed.

    Raises ValueError and what the parsers of protobuf and ONNX raise, a dozen unrelated types.
    """
    import onnx
    from onnx.external_data_helper import uses_external_data

    model = onnx.load_model(path, load_external_data=False)
    if model.functions:  # on one that calls itself ONNX's checker ends the process
        raise ValueError("it holds functions")
    if any(map(uses_external_data, model.graph.initializer)):  # which numpy_helper would look for in this folder
        raise ValueError("its weights are in another file")
    onnx.checker.check_model(model, full_check=True)
    return model


def load_onnx_mlp(path: Path, features: int) -> onnx.ModelProto:
    """Return a checked ONNX file of step 4: MatMul/Gemm, Add and Relu layers from `features` inputs to one sigmoid.

    Raises InputError for anything else.
    """
    from onnx import numpy_helper

    remedy = "make it with: python h5_onnx_converter.py"
    if not path.exists():
        raise InputError(f"{path}: not found; {remedy}")
    try:
        model = read_graph(path)
        inputs, outputs = (
            [[d.dim_value for d in value.type.tensor_type.shape.dim][1:] for value in values]
            for values in (model.graph.input, model.graph.output)
        )
        finite = all(np.isfinite(numpy_helper.to_array(w)).all() for w in model.graph.initializer)
    except Exception as error:
        raise InputError(f"{path}: is truncated or not a valid ONNX network ({first_line(error)}); {remedy}") from None
    nodes = [node.op_type for node in model.graph.node]
    if (inputs, outputs) != ([[features]], [[1]]) or set(nodes[:-1]) - {"MatMul", "Gemm", "Add", "Relu"}:
        raise InputError(f"{path}: is not an MLP from the arrays' {features} features to one output; {remedy}")
    if nodes[-1:] != ["Sigmoid"]:
        raise InputError(f"{path}: does not end in a sigmoid; {remedy}")
    if not finite:
        raise InputError(f"{path}: holds NaN or infinite weights; {remedy}")
    return model
