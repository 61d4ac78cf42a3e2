"""Float networks that Concrete ML quantizes after training and compiles to TFHE; for step 5 only, never exported.

Circuit, Client and Server have the methods of a scheme's three classes, so that step 5 runs them alike.
"""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

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
        self.setting, self.calibration = setting, calibration
        rounding = {"n_bits": setting.rounding_bits, "method": "APPROXIMATE"}
        # Concrete ML writes whole arrays into the messages of its checks, also of those that hold: most of its time.
        with warnings.catch_warnings(), np.printoptions(threshold=0, edgeitems=1):
            from concrete.ml.torch.compile import build_quantized_module

            warnings.simplefilter("ignore")  # Concrete ML's own use of deprecated NumPy and ONNX calls
            self.module = build_quantized_module(
                without_sigmoid(graph), calibration, n_bits=setting.bits, rounding_threshold_bits=rounding
            )

    @functools.cached_property
    def circuit(self) -> Any:
        """The compiled circuit."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.module.compile(self.calibration, p_error=self.setting.p_error)

    def logits(self, X: np.ndarray) -> np.ndarray:
        """Return the logits (n,) of rows X (n, features) in cleartext, quantized."""
        return self.module.forward(X.astype(np.float64), fhe="disable")[:, 0]

    def cost(self) -> dict[str, Any]:
        """Compile, and return what a scheme's cost does."""
        circuit = self.circuit
        return {
            "pbs": circuit.programmable_bootstrap_count,
            "complexity": circuit.complexity,
            "rounding_bits": self.setting.rounding_bits,
            "p_error": self.setting.p_error,
            "p_any_pbs_off": 1 - (1 - self.setting.p_error) ** circuit.programmable_bootstrap_count,
            "widest_integer_bits": circuit.graph.maximum_integer_bit_width(),
            "evaluation_keys_MB": (circuit.size_of_bootstrap_keys + circuit.size_of_keyswitch_keys) / 1e6,
            "security_bits": int(circuit.configuration.security_level),
            "secret_keys_kB": circuit.size_of_secret_keys / 1e3,
        }

    def simulate(self, X: np.ndarray) -> np.ndarray:
        """Return the logits (n,) of rows X (n, features) with rounding and the noise of p_error."""
        if self.circuit.packing_key_switch_count:  # wide tables, which Concrete ML only simulates
            return self.module.forward(X.astype(np.float64), fhe="simulate")[:, 0]
        # Concrete ML would ask for the circuit's statistics before every row, which takes longer than the row.
        rows = [self.circuit.simulate(row[None]) for row in self.module.quantize_input(X.astype(np.float64))]
        return self.module.dequantize_output(np.concatenate(rows))[:, 0]

    def client(self) -> Client:
        return Client(self)

    def server(self) -> Server:
        return Server(self)


class Client:
    """Keys, encryption and decryption of a row; methods as a scheme's Client."""

    def __init__(self, network: PostTraining) -> None:
        self.module, self.circuit = network.module, network.circuit

    def make_keys(self) -> None:
        self.circuit.keygen(force=True)

    def evaluation_keys(self) -> bytes:
        return self.circuit.client.evaluation_keys.serialize()

    def encrypt(self, X: np.ndarray) -> bytes:
        return self.circuit.encrypt(self.module.quantize_input(X.astype(np.float64))).serialize()

    def decrypt(self, answer: bytes, beats: int) -> np.ndarray:
        from concrete import fhe

        return self.module.dequantize_output(self.circuit.decrypt(fhe.Value.deserialize(answer)))[:, 0]


class Server:
    """Computation; methods as a scheme's Server."""

    def __init__(self, network: PostTraining) -> None:
        self.circuit, self.keys = network.circuit, None

    def load_keys(self, keys: bytes) -> None:
        from concrete import fhe

        self.keys = fhe.EvaluationKeys.deserialize(keys)

    def run(self, beats: bytes) -> bytes:
        from concrete import fhe

        return self.circuit.server.run(fhe.Value.deserialize(beats), evaluation_keys=self.keys).serialize()


def without_sigmoid(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a network that ends in the logit; the client evaluates the sigmoid, at no cost."""
    import onnx
    from onnx import helper

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    (logit,) = copy.graph.node.pop().input
    del copy.graph.output[:]
    copy.graph.output.append(helper.make_tensor_value_info(logit, onnx.TensorProto.FLOAT, [None, 1]))
    return copy
