"""A linear network under GLWE: all numbers of a beat in one ciphertext, times weights that the server knows.

There is no bootstrap, so no circuit of Concrete: concrete_ml_extensions packs 2,048 numbers each as the coefficients of
a polynomial and extracts the one of the products that is the sum. A payload holds a
ciphertext a beat. The library makes both keys at once, so that the secret one is stored with the evaluation keys.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from fhe_mlp.encrypted import ANSWERS, BEATS, BEATS_PER_CALL, KEYS
from fhe_mlp.scaling import logits_of_sums, quantize

if TYPE_CHECKING:
    from fhe_mlp.quantized import QuantizedNetwork

LIBRARY = "concrete-ml-extensions"  # as it is installed
# In place of the library's values; its dimensions and noise, on which security rests, stay. One level of 24 bits in the
# key switch takes half the time and half the keys of two of 14 bits. Numbers of a beat and of an answer are stored in
# as few bits as leave their noise at a hundredth of a logit; docs/METHOD.md has what each gives.
PARAMETERS = {
    "packing_ks_level": 1,
    "packing_ks_base_log": 24,
    "input_storage_ciphertext_modulus": 25,
    "output_storage_ciphertext_modulus": 21,
}
SECURITY_BITS = 128  # of the library's parameters, which are those of TFHE-rs for 2,048 coefficients
SAMPLES = 8  # of beats and answers under each of two keys, that show which words of theirs never change
LENGTH_BYTES = 8  # of the length before each value of a payload


class Scheme:
    """A network without neurons; client_part is empty, and server_part is JSON."""

    name, key_parameters = "packed", None

    def __init__(self, network: QuantizedNetwork, X: np.ndarray, beats: int = BEATS_PER_CALL) -> None:
        self.network, self.beats = network, beats
        self.own_numbers = {**network.numbers, "beats": beats, "sum_bits": network.linear_bits}

    @staticmethod
    def accepts(network: QuantizedNetwork) -> bool:
        return network.neurons == 0

    @functools.cached_property
    def layouts(self) -> dict[str, Any]:
        """Layout of each kind of payload, from samples of it, which take seconds: for what others send only."""
        client, server, samples = self.client(), self.server(), {KEYS: [], BEATS: [], ANSWERS: []}
        for _ in range(2):
            client.make_keys()
            samples[KEYS].append(client.evaluation_keys())
            server.load_keys(samples[KEYS][-1])
            for _ in range(SAMPLES):
                samples[BEATS].append(client.encrypt(np.zeros((1, self.network.features))))
                samples[ANSWERS].append(server.run(samples[BEATS][-1]))
        return {kind: layout(values) for kind, values in samples.items()}

    @property
    def numbers(self) -> dict[str, Any]:
        return {**self.own_numbers, "layout": self.layouts[ANSWERS]}

    def client(self) -> Client:
        """Return a client that does not check what it receives: it comes from this process."""
        return Client(self.own_numbers, b"")

    def server(self) -> Server:
        """Return a server that does not check either."""
        return Server(self.server_part(layouts=None))

    def cost(self) -> dict[str, Any]:
        known = json.loads(parameters().serialize())  # the keys: levels x (dimension + 1) polynomials a secret bit
        keys = known["packing_ks_level"] * (known["packing_ks_glwe_dimension"] + 1)
        keys *= known["encryption_glwe_dimension"] * known["polynomial_size"] * known["packing_ks_polynomial_size"]
        return {
            "pbs": 0,
            "complexity": 0.0,  # which counts bootstraps only
            "widest_integer_bits": self.own_numbers["sum_bits"],
            "evaluation_keys_MB": keys * known["ciphertext_modulus_bit_count"] / 8e6,
            "security_bits": SECURITY_BITS,
        }

    def simulate(self, X: np.ndarray) -> None:
        """Return None: the noise of this scheme, a hundredth of a logit, is not simulated."""

    def client_part(self) -> bytes:
        return b""

    def server_part(self, **more: Any) -> bytes:
        known = {"weights": self.network.linear.tolist(), **(more or {"layouts": self.layouts})}
        return json.dumps(known).encode()


class Client:
    """Keys, encryption and decryption by concrete_ml_extensions."""

    def __init__(self, numbers: Mapping[str, Any], content: bytes) -> None:
        self.numbers = numbers
        self.parameters = parameters(bits_reserved_for_computation=numbers["sum_bits"])

    def make_keys(self) -> None:
        import concrete_ml_extensions as glwe

        self.secret_key, self.server_keys = glwe.create_private_key(self.parameters)

    def secret_keys(self) -> bytes:
        return join([self.secret_key.serialize(), *split(self.evaluation_keys())])

    def load_secret_keys(self, keys: bytes) -> None:
        import concrete_ml_extensions as glwe

        secret, evaluation = split(keys)
        # The library does not export the class of secret keys: it is that of a key of a single coefficient.
        tiny, _ = glwe.create_private_key(parameters(polynomial_size=1, packing_ks_polynomial_size=1))
        self.secret_key = type(tiny).deserialize(secret)
        self.server_keys = glwe.deserialize_compression_key(evaluation)

    def evaluation_keys(self) -> bytes:
        return join([self.server_keys.serialize()])

    def encrypt(self, X: np.ndarray) -> bytes:
        import concrete_ml_extensions as glwe

        x = quantize(X, self.numbers["input_bits"], self.numbers["input_step"]).astype(np.uint64)  # modulo 2^64
        return join(glwe.encrypt_matrix(self.secret_key, self.parameters, row[None]).serialize() for row in x)

    def decrypt(self, answer: bytes, beats: int) -> np.ndarray:
        import concrete_ml_extensions as glwe

        self.check(ANSWERS, answer)
        sums, products = [], split(answer)
        if len(products) != beats:
            raise ValueError("an answer to another number of beats")
        for product in products:
            matrix = glwe.CompressedResultEncryptedMatrix.deserialize(product)
            sums.append(glwe.decrypt_matrix(matrix, self.secret_key, self.parameters, 1).astype(np.int64)[0, 0])
        return logits_of_sums(self.numbers, np.zeros(beats), np.array(sums))

    def check(self, kind: str, payload: bytes) -> None:
        check_layout(split(payload), self.numbers.get("layout"))


class Server:
    """Multiplication by concrete_ml_extensions."""

    def __init__(self, content: bytes) -> None:
        known = json.loads(content)
        self.weights = np.array(known["weights"], np.int64)[:, None].astype(np.uint64)
        self.layouts, self.keys = known["layouts"], None

    @staticmethod
    def versions() -> dict[str, str]:
        return {LIBRARY: version(LIBRARY)}

    def load_keys(self, keys: bytes) -> None:
        import concrete_ml_extensions as glwe

        self.check(KEYS, keys)
        (value,) = split(keys)
        self.keys = glwe.deserialize_compression_key(value)

    def run(self, beats: bytes) -> bytes:
        import concrete_ml_extensions as glwe

        self.check(BEATS, beats)
        matrices = map(glwe.EncryptedMatrix.deserialize, split(beats))
        return join(glwe.matrix_multiplication(m, self.weights, self.keys).serialize() for m in matrices)

    def check(self, kind: str, payload: bytes) -> None:
        check_layout(split(payload), self.layouts and self.layouts[kind])


def parameters(**other: int) -> Any:
    """Return the library's own parameters, which have 128 bits of security, but for PARAMETERS and `other` values."""
    import concrete_ml_extensions as glwe

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


def layout(samples: Sequence[bytes]) -> dict[str, Any]:
    """Return the length of single values of one kind, and the words of 8 bytes that all share: sizes and parameters."""
    words = np.array([np.frombuffer(value, np.uint64, len(value) // 8) for (value,) in map(split, samples)])
    shared = (words == words[0]).all(axis=0)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], shared, [False]]))).reshape(-1, 2)
    fixed = {str(8 * a): words[0, a:b].tobytes().hex() for a, b in edges}
    return {"bytes": len(split(samples[0])[0]), "fixed": fixed}


def check_layout(values: Sequence[bytes], wanted: Mapping[str, Any] | None) -> None:
    """Raise ValueError for a value of another length or other fixed words than `wanted`, where that is known.

    The library would take memory for sizes that a damaged value claims, and end the process where there is too little.
    """
    fixed = [(int(start), bytes.fromhex(words)) for start, words in (wanted or {"fixed": {}})["fixed"].items()]
    for value in values:
        size = wanted["bytes"] if wanted else len(value)
        if len(value) != size or not all(value.startswith(words, at) for at, words in fixed):
            raise ValueError("a value is not whole")
