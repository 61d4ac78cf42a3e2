"""Configurations (networks at one number of bits, from the files of step 4), and the test rows that they run on."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from fhe_mlp.cli import InputError, digest
from fhe_mlp.dataset import Dataset
from fhe_mlp.encrypted import choose
from fhe_mlp.encrypted.post_training import Setting
from fhe_mlp.networks import STEP_3, STEP_4, load_onnx_mlp
from fhe_mlp.quantized import QuantizedNetwork, load_onnx, read_networks

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
    identity: dict[str, Any]  # shared by results that stand for each other: "scheme" and others
    key: str  # digest of all of it

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


@dataclass(frozen=True, eq=False)
class Draws:
    """Test rows that are drawn: the first of each batch, which is a stretch of an order of all."""

    order: np.ndarray  # (test rows,)
    size: int  # of a batch
    samples: int  # rows drawn from each
    batches: range

    def rows(self, batch: int) -> np.ndarray:
        """Return the rising numbers of the test rows drawn from a batch."""
        return np.sort(self.order[batch * self.size : (batch + 1) * self.size][: self.samples])

    def batch_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the batches of test rows, both (n,)."""
        return np.argsort(self.order)[rows] // self.size


def load_configuration(path: Path, bits: int, features: int, args: Namespace, basis: dict[str, Any]) -> Configuration:
    """Return the configuration of the float network in an .onnx file, as step 3 quantized it to `bits` if it did.

    args: step 5's scheme, post_training, rounding_bits and p_error; basis: of the Experiment. Raises InputError for a
    bad file.
    """
    graph = load_onnx_mlp(path, features).SerializeToString()
    source = path.parent / "quantized" / f"{path.stem}_{bits}bits.onnx"
    setting, asked = Setting(bits, args.rounding_bits, args.p_error), {}
    trained, h5 = source.exists(), path.with_suffix(".h5")
    if not (trained or args.post_training) and h5.exists() and bits in (n.bits for n in read_networks(h5, STEP_3)):
        raise InputError(f"{source}: not found, and step 3 trained it; make it with: {STEP_4}")
    if args.post_training or not trained:
        source, network, quantization, scheme = path, None, "post-training", CONCRETE_ML
        asked = {"asked_rounding_bits": args.rounding_bits, "asked_p_error": args.p_error}
    else:
        network, quantization = load_onnx(source, features), "quantization-aware"
        setting, scheme = Setting(bits, ROUNDING_BITS, P_ERROR), args.scheme or choose(network).name
    file = digest(source.read_bytes())
    identity = {"quantization": quantization, "scheme": scheme, **asked, "network_sha256": file, **basis}
    key = digest(repr((path.stem, bits, identity)))
    return Configuration(path.stem, bits, network, graph, setting, identity, key)


def versions() -> dict[str, Any]:
    """Return the versions of the program and the libraries on which results depend."""
    names = ("concrete-ml", "concrete-python", "concrete-ml-extensions", "onnx", "numpy")
    return {"result_version": RESULT_VERSION, **{name: version(name) for name in names}}
