"""A linear network under GLWE: all numbers of a beat in one ciphertext, times weights that the server knows.

There is no bootstrap, so no circuit of Concrete: concrete_ml_extensions packs 2,048 numbers each as the coefficients of
a polynomial and extracts the one of the products that is the sum. A payload holds a ciphertext a beat. The library
makes both keys at once, so that the secret one is stored with the evaluation keys.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import concrete_ml_extensions as glwe
import numpy as np

from fhe_mlp.encrypted import ANSWERS, BEATS, BEATS_PER_CALL, KEYS
from fhe_mlp.scaling import logits_of_sums, quantize

if TYPE_CHECKING:
    from fhe_mlp.quantized import QuantizedNetwork

# In place of the library's values; its dimensions and noise, on which security rests, stay. One level of 24 bits in the
# key switch takes half the time and half the keys of two of 14 bits. Numbers of a beat and of an answer are stored in
# as few bits as leave their noise at a hundredth of a logit; docs/EXPERIMENTS.md has the table.
PARAMETERS = {
    "packing_ks_level": 1,
    "packing_ks_base_log": 24,
    "input_storage_ciphertext_modulus": 25,
    "output_storage_ciphertext_modulus": 21,
}
LENGTH_BYTES = 8  # of the length before each value of a payload


class Scheme:
    """A network without neurons; both parts are JSON, with the layouts of what their side receives."""

    name, key_parameters = "packed", None

    def __init__(self, network: QuantizedNetwork, X: np.ndarray, beats: int = BEATS_PER_CALL) -> None:
        self.network, self.beats, self.weights = network, beats, {"weights": network.linear.tolist()}
        self.numbers = {**network.numbers, "beats": beats, "sum_bits": network.linear_bits}

    @staticmethod
    def accepts(network: QuantizedNetwork) -> bool:
        return network.neurons == 0

    @functools.cached_property
    def layouts(self) -> dict[str, Any]:
        """Layout of each kind of payload, from samples of it, which take seconds: for what others send only."""
        client, server, samples = self.client(), self.server(), {KEYS: [], BEATS: [], ANSWERS: []}
        for _ in range(2):  # keys, and two beats under each
            client.make_keys()
            server.load_keys(client.evaluation_keys())
            beats = client.encrypt(np.zeros((2, self.network.features)))
            for kind, payload in zip(samples, (client.evaluation_keys(), beats, server.run(beats))):
                samples[kind] += split(payload)
        return {kind: layout(values) for kind, values in samples.items()}

    def client(self) -> Client:
        """Return a client that does not check layouts: what it receives comes from this process."""
        return Client(self.numbers, b"{}")

    def server(self) -> Server:
        """Return a server that does not check layouts either."""
        return Server(json.dumps(self.weights).encode())

    def cost(self) -> dict[str, Any]:
        return {
            "pbs": 0,
            "complexity": 0.0,  # which counts bootstraps only
            "widest_integer_bits": self.network.linear_bits,
            "evaluation_keys_MB": 2 * 2048 * 2048 * 8 / 1e6,  # at PARAMETERS: two polynomials for each secret bit
            "security_bits": 128,  # of the library's parameters, which are those of TFHE-rs for 2,048 coefficients
        }

    def simulate(self, X: np.ndarray) -> None:
        """Return None: the noise of this scheme, a hundredth of a logit, is not simulated."""

    def client_part(self) -> bytes:
        return json.dumps({ANSWERS: self.layouts[ANSWERS]}).encode()

    def server_part(self) -> bytes:
        return json.dumps(self.weights | self.layouts).encode()


class Side:
    """What client and server share: checks of payloads by `layouts`, those known of each kind."""

    layouts: dict[str, Any]

    def check(self, kind: str, payload: bytes) -> None:
        """Raise ValueError for a value that is not whole or has another layout.

        The library takes memory for the sizes that a damaged value claims; where there is too little, the process ends.
        """
        values, layout = split(payload), self.layouts.get(kind)
        if layout and any(len(v) != layout[0] or words(v)[layout[1]].tolist() != layout[2] for v in values):
            raise ValueError("a value is not whole")


class Client(Side):
    """Keys, encryption and decryption by concrete_ml_extensions."""

    def __init__(self, numbers: Mapping[str, Any], content: bytes) -> None:
        self.numbers, self.layouts = numbers, json.loads(content)
        self.parameters = parameters(bits_reserved_for_computation=numbers["sum_bits"])

    def make_keys(self) -> None:
        self.secret_key, self.server_keys = glwe.create_private_key(self.parameters)

    def secret_keys(self) -> bytes:
        return join([self.secret_key.serialize(), *split(self.evaluation_keys())])

    def load_secret_keys(self, keys: bytes) -> None:
        secret, evaluation = split(keys)
        # The library does not export the class of secret keys: it is that of a key of a single coefficient.
        tiny, _ = glwe.create_private_key(parameters(polynomial_size=1, packing_ks_polynomial_size=1))
        self.secret_key = type(tiny).deserialize(secret)
        self.server_keys = glwe.deserialize_compression_key(evaluation)

    def evaluation_keys(self) -> bytes:
        return join([self.server_keys.serialize()])

    def encrypt(self, X: np.ndarray) -> bytes:
        x = quantize(X, self.numbers["input_bits"], self.numbers["input_step"]).astype(np.uint64)  # modulo 2^64
        return join(glwe.encrypt_matrix(self.secret_key, self.parameters, row[None]).serialize() for row in x)

    def decrypt(self, answer: bytes, beats: int) -> np.ndarray:
        self.check(ANSWERS, answer)
        products = split(answer)
        if len(products) != beats:
            raise ValueError("an answer to another number of beats")
        matrices = map(glwe.CompressedResultEncryptedMatrix.deserialize, products)
        sums = [glwe.decrypt_matrix(matrix, self.secret_key, self.parameters, 1)[0, 0] for matrix in matrices]
        return logits_of_sums(self.numbers, np.zeros(beats), np.array(sums).astype(np.int64))


class Server(Side):
    """Multiplication by concrete_ml_extensions."""

    def __init__(self, content: bytes) -> None:
        self.layouts = json.loads(content)
        self.weights = np.array(self.layouts["weights"], np.int64)[:, None].astype(np.uint64)  # modulo 2^64

    @staticmethod
    def versions() -> dict[str, str]:
        return {"concrete-ml-extensions": version("concrete-ml-extensions")}

    def load_keys(self, keys: bytes) -> None:
        self.check(KEYS, keys)
        (value,) = split(keys)
        self.keys = glwe.deserialize_compression_key(value)

    def run(self, beats: bytes) -> bytes:
        self.check(BEATS, beats)
        matrices = map(glwe.EncryptedMatrix.deserialize, split(beats))
        return join(glwe.matrix_multiplication(m, self.weights, self.keys).serialize() for m in matrices)


def parameters(**other: int) -> Any:
    """Return the library's own parameters, which have 128 bits of security, but for PARAMETERS and `other` values."""
    chosen = {**json.loads(glwe.default_params()), **PARAMETERS, **other}
    return glwe.MatmulCryptoParameters.deserialize(json.dumps(chosen))


def join(values: Iterable[bytes]) -> bytes:
    """Return values, each behind its length."""
    return b"".join(len(value).to_bytes(LENGTH_BYTES, "big") + value for value in values)


def split(payload: bytes) -> list[bytes]:
    """Return the values that `join` put behind each other. Raises ValueError where one is not whole."""
    values, start = [], 0
    while start < len(payload):
        end = start + LENGTH_BYTES + int.from_bytes(payload[start : start + LENGTH_BYTES], "big")
        values.append(payload[start + LENGTH_BYTES : end])
        start = end
    if start != len(payload) or not payload:
        raise ValueError("a value is not whole")
    return values


def words(value: bytes) -> np.ndarray:
    """Return the whole words of 8 bytes of a value, as integers."""
    return np.frombuffer(value, np.uint64, len(value) // 8)


def layout(values: Sequence[bytes]) -> tuple[int, list[int], list[int]]:
    """Return the length of values of a kind, and places and content of the words that all share: sizes, parameters."""
    first, *others = map(words, values)
    places = np.flatnonzero(np.all([other == first for other in others], axis=0))
    return len(values[0]), places.tolist(), first[places].tolist()
