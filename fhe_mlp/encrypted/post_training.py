"""Float networks that Concrete ML quantizes after training and compiles to TFHE; for step 5 only, never exported.

PostTraining has the methods of a scheme's three classes, so that step 5 runs both alike.
"""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fhe_mlp.encrypted.tfhe import circuit_cost, prepare_linker

if TYPE_CHECKING:
    import onnx


class Setting(NamedTuple):
    """How Concrete ML quantizes: bits of weights and activations, rounding bits of accumulators, p_error of a PBS."""

    bits: int
    rounding_bits: int
    p_error: float


class PostTraining:
    """A float network quantized by Concrete ML, and compiled when its cost is asked for.

    graph: of networks.load_onnx_mlp; calibration: training rows (n, features), which fix the ranges. Raises one of
    CIRCUIT_ERRORS where Concrete ML cannot quantize it.
    """

    beats, key_parameters = 1, None

    def __init__(self, graph: onnx.ModelProto, setting: Setting, calibration: np.ndarray) -> None:
        from concrete.ml.torch.compile import build_quantized_module
        from onnx.utils import Extractor

        self.setting, self.calibration = setting, calibration
        # It ends in the logit; the client evaluates the sigmoid, at no cost.
        logit = Extractor(graph).extract_model([graph.graph.input[0].name], [graph.graph.node[-1].input[0]])
        rounding = {"n_bits": setting.rounding_bits, "method": "APPROXIMATE"}
        options = {"n_bits": setting.bits, "rounding_threshold_bits": rounding}
        # Concrete ML writes whole arrays into the messages of its checks, also of those that hold: most of its time.
        with np.printoptions(threshold=0, edgeitems=1):
            self.module = build_quantized_module(logit, calibration, **options)

    @functools.cached_property
    def circuit(self) -> Any:
        prepare_linker()
        return self.module.compile(self.calibration, p_error=self.setting.p_error)

    def logits(self, X: np.ndarray) -> np.ndarray:
        """Return the logits (n,) of rows X (n, features) in cleartext, quantized."""
        return self.module.forward(X.astype(np.float64), fhe="disable")[:, 0]

    def cost(self) -> dict[str, Any]:
        """Compile, and return what a scheme's cost does."""
        return circuit_cost(self.circuit, self.circuit, self.setting.rounding_bits, self.setting.p_error)

    def simulate(self, X: np.ndarray) -> np.ndarray:
        """Return the logits (n,) of rows X (n, features) with rounding and the noise of p_error."""
        if self.circuit.packing_key_switch_count:  # wide tables, which Concrete ML only simulates
            return self.module.forward(X.astype(np.float64), fhe="simulate")[:, 0]
        # Concrete ML would ask for the circuit's statistics before every row, which takes longer than the row.
        rows = [self.circuit.simulate(row[None]) for row in self.module.quantize_input(X.astype(np.float64))]
        return self.module.dequantize_output(np.concatenate(rows))[:, 0]

    def client(self) -> PostTraining:
        """Return a copy, with which its keys leave the memory."""
        return copy.copy(self)

    server = client

    def make_keys(self) -> None:
        from concrete import fhe

        self.fhe_client = fhe.Client(self.circuit.client.specs)
        self.fhe_client.keygen(force=True)

    def evaluation_keys(self) -> bytes:
        return self.fhe_client.evaluation_keys.serialize()

    def load_keys(self, keys: bytes) -> None:
        from concrete import fhe

        self.keys = fhe.EvaluationKeys.deserialize(keys)

    def encrypt(self, X: np.ndarray) -> bytes:
        return self.fhe_client.encrypt(self.module.quantize_input(X.astype(np.float64))).serialize()

    def run(self, beats: bytes) -> bytes:
        from concrete import fhe

        return self.circuit.server.run(fhe.Value.deserialize(beats), evaluation_keys=self.keys).serialize()

    def decrypt(self, answer: bytes, beats: int) -> np.ndarray:
        from concrete import fhe

        return self.module.dequantize_output(self.fhe_client.decrypt(fhe.Value.deserialize(answer)))[:, 0]
