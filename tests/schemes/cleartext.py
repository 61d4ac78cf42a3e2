"""A scheme without any encryption, of linear networks, for tests: payloads are arrays that anybody can read."""

import hashlib
import os
import secrets

import numpy as np

from fhe_mlp import encrypted
from fhe_mlp.scaling import logits_of_sums, quantize

START = {encrypted.KEYS: b"keys", encrypted.BEATS: b"beat", encrypted.ANSWERS: b"sums"}  # of the payloads


def check(kind: str, payload: bytes) -> None:
    if payload[:4] != START[kind] or len(payload) % 4:
        raise ValueError("a value is not whole")


class Scheme:
    name, key_parameters = "cleartext", None

    def __init__(self, network, X, beats=encrypted.BEATS_PER_CALL):
        self.network, self.beats, self.numbers = network, beats, {**network.numbers, "beats": beats}

    @staticmethod
    def accepts(network):
        return network.neurons == 0

    def cost(self):
        return dict.fromkeys(("pbs", "complexity", "security_bits", "widest_integer_bits", "evaluation_keys_MB"), 0)

    def simulate(self, X):
        return self.network.logits(X)

    def client_part(self):
        return b""

    def server_part(self):
        return self.network.linear.astype(np.int64).tobytes()

    def client(self):
        return Client(self.numbers, b"")

    def server(self):
        return Server(self.server_part())


class Client:
    check = staticmethod(check)

    def __init__(self, numbers, content):
        self.numbers = numbers

    def make_keys(self):
        self.secret = secrets.token_bytes(1000)

    def secret_keys(self):
        return self.secret

    def load_secret_keys(self, keys):
        self.secret = keys

    def evaluation_keys(self):
        return b"keys" + hashlib.sha256(self.secret).digest()

    def encrypt(self, X):
        assert 0 < len(X) <= self.numbers["beats"]
        x = quantize(X, self.numbers["input_bits"], self.numbers["input_step"])
        return b"beat" + secrets.token_bytes(8) + x.tobytes()  # no two are equal, as where something is encrypted

    def decrypt(self, answer, beats):
        sums = np.frombuffer(answer[12:], np.int64)
        if len(sums) != beats:
            raise ValueError(f"{len(sums)} sums of {beats} beats")
        return logits_of_sums(self.numbers, np.zeros(beats), sums)


class Server:
    check = staticmethod(check)

    def __init__(self, content):
        self.weights = np.frombuffer(content, np.int64)

    @staticmethod
    def versions():
        return {"python": "any", "numpy": np.__version__}

    def load_keys(self, keys):
        exec(os.environ.get("CLEARTEXT_LOAD", ""))  # what a test wants to happen in the process that computes

    def run(self, beats):
        exec(os.environ.get("CLEARTEXT_RUN", ""))
        x = np.frombuffer(beats[12:], np.int64).reshape(-1, len(self.weights))
        return b"sums" + beats[4:12] + (x @ self.weights).tobytes()
