"""A quantized network without neurons as step 5 runs it: not a circuit of Concrete but one packed product."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np

from fhe_mlp import packing
from fhe_mlp.quantized import QuantizedNetwork

SECURITY_BITS = 128  # of concrete_ml_extensions' parameters, which are those of TFHE-rs for 2,048 coefficients


class PackedNetwork:
    """network: without hidden layers."""

    def __init__(self, network: QuantizedNetwork) -> None:
        last = network.last
        self.network, self.keys = network, None
        most = (2 ** (network.input_bits - 1) - 1) * int(np.abs(last.linear).sum())  # of a sum, whatever the row
        self.linear = {
            "input_bits": network.input_bits,
            "input_step": network.input_step,
            "sum_bits": most.bit_length() + 1,
            "output_step": network.input_step * last.linear_scale,
            "offset": last.offset,
        }

    def facts(self) -> dict[str, Any]:
        """What `circuit.cost` says of a circuit, but for rounding bits and p_error, which only bootstraps have.

        Complexity counts nothing else, so it is 0.
        """
        keys = self.key_bytes()
        return {
            "pbs": 0,
            "complexity": 0.0,
            "widest_integer_bits": self.linear["sum_bits"],
            "evaluation_keys_MB": keys / 1e6,
            "security_bits": SECURITY_BITS,
        }

    @staticmethod
    def key_bytes() -> int:
        """Of the evaluation keys: a packing key switch, levels x (dimension + 1) polynomials for each secret bit."""
        known = json.loads(packing.parameters().serialize())
        secret_bits = known["encryption_glwe_dimension"] * known["polynomial_size"]
        numbers = known["packing_ks_level"] * (known["packing_ks_glwe_dimension"] + 1)
        numbers *= secret_bits * known["packing_ks_polynomial_size"]
        return numbers * known["ciphertext_modulus_bit_count"] // 8

    def outputs(self, X: np.ndarray) -> np.ndarray:
        """Logits (n,) of rows X (n, columns) in cleartext."""
        return self.network.run(X)[0]

    def describe(self) -> tuple[dict[str, Any], bytes]:
        """As packing.describe."""
        return packing.describe(self.network.last.linear, self.linear)

    def make_keys(self) -> None:
        """New keys for run_encrypted, in memory."""
        client = packing.Client(self.linear, None)
        client.generate_private_and_evaluation_keys()
        self.keys = client, packing.Server(packing.archive(self.network.last.linear))

    def run_encrypted(self, row: np.ndarray) -> dict[str, float]:
        """As circuit.run_encrypted; times include the conversion from and to bytes."""
        client, server = self.keys
        started = time.perf_counter()
        beat = client.quantize_encrypt_serialize(row[None])
        sent = time.perf_counter()
        answer = server.run(beat, client.evaluation_keys)
        received = time.perf_counter()
        output = client.deserialize_decrypt_dequantize(answer)
        return {
            "output_fhe": float(output[0, 0]),
            "encrypt_seconds": sent - started,
            "run_seconds": received - sent,
            "decrypt_seconds": time.perf_counter() - received,
            "input_bytes": len(beat),
            "output_bytes": len(answer),
        }
