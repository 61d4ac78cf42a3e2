"""Configurations: networks at one number of bits, from the files of step 4, each with an identity of its own."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from fhe_mlp.cli import InputError, digest
from fhe_mlp.dataset import Dataset
from fhe_mlp.encrypted import choose
from fhe_mlp.encrypted.post_training import Setting
from fhe_mlp.networks import load_mlp, load_onnx_mlp
from fhe_mlp.quantized import QuantizedNetwork, load_onnx
from fhe_mlp.scaling import NONE

RESULT_VERSION = 6  # raised by hand when the program returns other results, so that all are computed anew
ROUNDING_BITS = 6  # leading accumulator bits where Concrete ML quantizes; step 3's networks have their own
P_ERROR = 2.0**-13  # there: probability that one bootstrap is off by a step; Concrete ML's default is 2^-40
CONCRETE_ML = "concrete-ml"  # in place of a scheme's name where Concrete ML quantizes and compiles


@dataclass(frozen=True, eq=False)
class Configuration:
    """One network at one number of bits, and how it is encrypted."""

    model_name: str
    bits: int
    network: QuantizedNetwork | None  # of step 3; None: Concrete ML quantizes the float network
    graph: bytes  # the float network in ONNX
    setting: Setting  # of Concrete ML
    identity: dict[str, Any]  # shared by results that stand for each other: "scheme" and others, and their digest

    @property
    def key(self) -> str:
        """Digest of the identity."""
        return self.identity["identity"]

    @property
    def label(self) -> str:
        """Name in messages."""
        return f"{self.model_name} at {self.bits} bits"


@dataclass(frozen=True, eq=False)
class Experiment:
    """Data and settings that each worker receives once."""

    data: Dataset
    basis: dict[str, Any]  # part of every identity: versions, seed, digest of the data
    calibration: np.ndarray  # training rows (n, features) from which Concrete ML takes ranges
    simulated: np.ndarray  # test rows (n,) that are simulated with the noise of encryption
    beats: int  # of a payload at most
    max_seconds: float  # per beat; what is slower is not run
    configurations: dict[str, Configuration]  # by key


@dataclass(frozen=True)
class Terms:
    """How the networks of one command are encrypted."""

    scheme: str | None  # name; None: the first that accepts a network
    post_training: bool  # whether Concrete ML quantizes also networks that step 3 has quantized
    rounding_bits: int  # of networks that Concrete ML quantizes, as is p_error
    p_error: float
    basis: dict[str, Any]  # as an Experiment has it

    def load(self, path: Path, bits: int, features: int) -> Configuration:
        """Return the configuration of the float network in an .onnx file, as step 3 quantized it to `bits` if it did.

        Raises InputError for a bad file.
        """
        graph, source = load_onnx_mlp(path, features).SerializeToString(), quantized_path(path, bits)
        setting, asked = Setting(bits, self.rounding_bits, self.p_error), {}
        if self.post_training or not source.exists():
            source, network, quantization, scheme = path, None, "post-training", CONCRETE_ML
            asked = {"asked_rounding_bits": self.rounding_bits, "asked_p_error": self.p_error}
        else:
            network, quantization = load_onnx(source, features), "quantization-aware"
            setting, scheme = Setting(bits, ROUNDING_BITS, P_ERROR), self.scheme or choose(network).name
        file = digest(source.read_bytes())
        identity = {"quantization": quantization, "scheme": scheme, **asked, "network_sha256": file, **self.basis}
        identity["identity"] = digest(repr((path.stem, bits, identity)))
        return Configuration(path.stem, bits, network, graph, setting, identity)


def quantized_path(path: Path, bits: int) -> Path:
    """Return the path to which step 4 writes the network that step 3 quantized from the one in `path`."""
    return path.parent / "quantized" / f"{path.stem}_{bits}bits.onnx"


def versions() -> dict[str, Any]:
    """Return the versions of the program and the libraries on which results depend."""
    names = ("concrete-ml", "concrete-python", "concrete-ml-extensions", "onnx", "numpy")
    return {"result_version": RESULT_VERSION, **{name: version(name) for name in names}}


def public_map(paths: list[Path]) -> str:
    """Return the public map of the networks in these .onnx files, from the .h5 files beside them.

    Raises InputError where they have several.
    """
    files = [path.with_suffix(".h5") for path in paths if path.with_suffix(".h5").exists()]
    maps = {load_mlp(file, "python dynamic_pruning_eval.py").map for file in files} or {NONE}
    if len(maps) > 1:
        raise InputError(f"--models: networks of several public maps ({', '.join(sorted(maps))}); run them one by one")
    return maps.pop()
