"""A network without neurons under FHE: all numbers of a beat in one ciphertext, times weights that the server knows.

There is no bootstrap, so no circuit of Concrete: concrete_ml_extensions packs 2,048 numbers each as the coefficients of
a polynomial (GLWE) and extracts the one of the products that is the sum. Client and Server have the methods of Concrete
ML's FHEModelClient and FHEModelServer that are used here.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

LIBRARY = "concrete-ml-extensions"  # as it is installed
KINDS = ("evaluation keys", "encrypted beats", "encrypted answers")  # of what travels, as boxes name it
SECRET_KEY = "secret_key"  # file in the folder of keys
DESCRIPTION = "linear.json"  # entry of server.zip
# In place of the library's values; its dimensions and noise, on which security rests, stay. One level of 24 bits in the
# key switch takes half the time and half the keys of two of 14 bits. Numbers of a beat and of an answer are stored in
# as few bits as leave their noise at a hundredth of a logit; docs/METHOD.md has what each gives.
PARAMETERS = {
    "packing_ks_level": 1,
    "packing_ks_base_log": 24,
    "input_storage_ciphertext_modulus": 25,
    "output_storage_ciphertext_modulus": 21,
}
SAMPLES = 8  # of beats and answers under each of two keys, that show which words of theirs never change


def parameters(**other: int) -> Any:
    """The library's own, which have 128 bits of security, but for PARAMETERS and `other` values."""
    import concrete_ml_extensions as glwe

    chosen = {**json.loads(glwe.default_params()), **PARAMETERS, **other}
    return glwe.MatmulCryptoParameters.deserialize(json.dumps(chosen))


def secret_key_type() -> type:
    """The class of secret keys, which the library does not export: that of a key of a single coefficient."""
    import concrete_ml_extensions as glwe

    key, _ = glwe.create_private_key(parameters(polynomial_size=1, packing_ks_polynomial_size=1))
    return type(key)


class Client:
    """Encrypts and decrypts. linear: of model.json; keys: folder of the secret key, None for keys in memory only."""

    def __init__(self, linear: Mapping[str, Any], keys: Path | None) -> None:
        self.linear, self.keys = linear, keys
        self.parameters = parameters(bits_reserved_for_computation=linear["sum_bits"])
        self.secret_key = self.evaluation_keys = None

    def generate_private_and_evaluation_keys(self) -> None:
        """Read the secret key where there is one, else make both keys."""
        import concrete_ml_extensions as glwe

        path = self.keys / SECRET_KEY if self.keys else None
        if path and path.exists():
            self.secret_key = secret_key_type().deserialize(path.read_bytes())
            return
        self.secret_key, self.evaluation_keys = glwe.create_private_key(self.parameters)
        if path:
            path.write_bytes(self.secret_key.serialize())

    def get_serialized_evaluation_keys(self) -> bytes:
        """What the server needs, of keys that were made just now."""
        return self.evaluation_keys.serialize()

    def quantize_encrypt_serialize(self, x: np.ndarray) -> bytes:
        """One beat (1, columns)."""
        import concrete_ml_extensions as glwe

        top = 2 ** (self.linear["input_bits"] - 1) - 1
        integers = np.clip(np.rint(x.astype(np.float64) / self.linear["input_step"]), -top, top).astype(np.int64)
        # Negative numbers modulo 2^64.
        return glwe.encrypt_matrix(self.secret_key, self.parameters, integers.astype(np.uint64)).serialize()

    def deserialize_decrypt_dequantize(self, answer: bytes) -> np.ndarray:
        """The logit (1, 1)."""
        import concrete_ml_extensions as glwe

        product = glwe.CompressedResultEncryptedMatrix.deserialize(answer)
        integers = glwe.decrypt_matrix(product, self.secret_key, self.parameters, 1).astype(np.int64)
        return integers * self.linear["output_step"] + self.linear["offset"]


class Server:
    """Multiplies. network: the content of server.zip."""

    def __init__(self, network: bytes) -> None:
        self.weights = np.array(read_description(network)["weights"], np.int64)[:, None].astype(np.uint64)

    def run(self, beat: bytes, evaluation_keys: Any) -> bytes:
        """The encrypted logit; evaluation_keys: of `load_keys`."""
        import concrete_ml_extensions as glwe

        return glwe.matrix_multiplication(
            encrypted_matrix=glwe.EncryptedMatrix.deserialize(beat), data=self.weights, compression_key=evaluation_keys
        ).serialize()


def load_keys(keys: bytes) -> Any:
    """Evaluation keys as `Server.run` takes them."""
    import concrete_ml_extensions as glwe

    return glwe.deserialize_compression_key(keys)


def archive(weights: Sequence[int], **more: Any) -> bytes:
    """The content of server.zip."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr(DESCRIPTION, json.dumps({"weights": list(map(int, weights)), **more}))
    return content.getvalue()


def describe(weights: Sequence[int], linear: Mapping[str, Any]) -> tuple[dict[str, Any], bytes]:
    """What a network is to its client, the "linear" of model.json, and to its server, the content of server.zip.

    linear: input_bits, input_step, sum_bits (into which every sum fits), output_step (of a sum, in logits) and offset.
    Both learn the layout of what travels.
    """
    server, samples = Server(archive(weights)), {kind: [] for kind in KINDS}
    for _ in range(2):
        client = Client(linear, None)
        client.generate_private_and_evaluation_keys()
        beats = [client.quantize_encrypt_serialize(np.zeros((1, len(weights)))) for _ in range(SAMPLES)]
        answers = [server.run(beat, client.evaluation_keys) for beat in beats]
        for kind, values in zip(KINDS, ([client.get_serialized_evaluation_keys()], beats, answers)):
            samples[kind] += values
    layouts = {kind: layout(values) for kind, values in samples.items()}
    return {**linear, "layouts": layouts}, archive(weights, layouts=layouts)


def read_description(network: bytes) -> dict[str, Any] | None:
    """What server.zip says of a linear network; None for one of Concrete's circuits. network: its content."""
    with zipfile.ZipFile(io.BytesIO(network)) as file:
        return json.loads(file.read(DESCRIPTION)) if DESCRIPTION in file.namelist() else None


def layout(samples: Sequence[bytes]) -> dict[str, Any]:
    """Length of values of one kind, and the words of 8 bytes that all share: sizes and parameters, in hexadecimal."""
    words = np.array([np.frombuffer(value, np.uint64, len(value) // 8) for value in samples])
    shared = (words == words[0]).all(axis=0)
    edges = 8 * np.flatnonzero(np.diff(np.concatenate([[False], shared, [False]])))
    return {"bytes": len(samples[0]), "fixed": {str(a): samples[0][a:b].hex() for a, b in edges.reshape(-1, 2)}}


def has_layout(value: bytes, wanted: Mapping[str, Any]) -> bool:
    """Whether a value has the length and the fixed bytes of its kind.

    The library would take memory for sizes that a damaged value claims, and end the process where there is too little.
    """
    return len(value) == wanted["bytes"] and all(
        value.startswith(bytes.fromhex(run), int(start)) for start, run in wanted["fixed"].items()
    )
