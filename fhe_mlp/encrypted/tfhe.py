"""TFHE with Concrete: a network with neurons, its integers compiled as they are, a lookup table (PBS) a neuron.

The circuit has two functions that share their keys: `beat` computes one beat, `beats` as many as a payload holds, which
is filled up with zeros. Concrete converts the bootstrapping key anew at each call, which takes as long as a beat of a
few neurons, so that many beats in one call take half the time of as many calls. The two parts are Concrete's
specification of the client and its server.zip with the program in MLIR, which is the same after each compilation and
which the server translates for its own processor.
"""

from __future__ import annotations

import ctypes
import io
import json
import re
import shutil
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fhe_mlp.cli import InputError, zip_entry
from fhe_mlp.encrypted import BEATS, BEATS_PER_CALL, KEYS
from fhe_mlp.scaling import logits_of_sums, quantize

if TYPE_CHECKING:
    from fhe_mlp.quantized import QuantizedNetwork

FUNCTIONS = ("beat", "beats")  # of the circuit; a payload begins with the number of its function in one byte
# Concrete asks for some 0.2 GB of memory at each call. Kept by the process, it need not be cleared page by page anew.
MALLOPT = {-3: 2**30, -1: 2**31 - 1, -2: 2**28}  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD of glibc


class Scheme:
    """Compiled by Concrete."""

    name = "tfhe"

    def __init__(self, network: QuantizedNetwork, X: np.ndarray, beats: int = BEATS_PER_CALL) -> None:
        from concrete import fhe

        prepare_linker()
        self.network, self.beats, self.function = network, beats, integer_function(network)
        self.numbers = {**network.numbers, "beats": beats}
        self.rows = extreme_rows(network, X)

        @fhe.module()
        class Circuit:
            @fhe.function({"x": "encrypted"})
            def beat(x):
                return self.function(x)

            @fhe.function({"x": "encrypted"})
            def beats(x):
                return self.function(x)

            composition = fhe.Wired(set())  # no output is an input

        inputs = {"beat": list(self.rows), "beats": self._batches(beats)}
        options = {"compress_input_ciphertexts": True, "compress_evaluation_keys": True}
        self.circuit = Circuit.compile(inputs, fhe.Configuration(p_error=network.p_error, **options))
        self.key_parameters = json.dumps(json.loads(self.client_part())["keyset"], sort_keys=True)

    @staticmethod
    def accepts(network: QuantizedNetwork) -> bool:
        return network.neurons > 0

    def _batches(self, beats: int) -> list[np.ndarray]:
        """Return the rows in batches of `beats`, repeated where they do not fill the last one."""
        return list(np.resize(self.rows, (-(-len(self.rows) // beats), beats, self.rows.shape[1])))

    def cost(self) -> dict[str, Any]:
        cost = circuit_cost(self.circuit, self.circuit.beat, self.network.rounding_bits, self.network.p_error)
        return {**cost, "complexity": self.circuit.complexity / (1 + self.beats)}

    def simulate(self, X: np.ndarray) -> np.ndarray:
        from concrete import fhe

        options = fhe.Configuration(p_error=self.network.p_error, fhe_execution=False, fhe_simulation=True)
        circuit = fhe.Compiler(self.function, {"x": "encrypted"}).compile(self._batches(len(X)), options)
        x = quantize(X, self.network.input_bits, self.network.input_step)
        return logits_of_sums(self.numbers, *circuit.simulate(x))

    def client_part(self) -> bytes:
        return self.circuit.client.specs.serialize()

    def server_part(self) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            path, buffer = Path(folder) / "server.zip", io.BytesIO()
            self.circuit.server.save(path, via_mlir=True)
            with zipfile.ZipFile(path) as saved, zipfile.ZipFile(buffer, "w") as whole:
                for name in sorted(saved.namelist()):
                    whole.writestr(zip_entry(name), saved.read(name), zipfile.ZIP_DEFLATED)
            return buffer.getvalue()

    def client(self) -> Client:
        return Client(self.numbers, self.client_part())

    def server(self) -> Server:
        return Server(self.server_part())


class Client:
    """Keys, encryption and decryption by Concrete."""

    def __init__(self, numbers: Mapping[str, Any], content: bytes) -> None:
        from concrete import fhe

        self.numbers, self.client = numbers, fhe.Client(fhe.ClientSpecs.deserialize(content))

    def make_keys(self) -> None:
        self.client.keygen(force=True)

    def secret_keys(self) -> bytes:
        return self.client.keys.serialize()

    def load_secret_keys(self, keys: bytes) -> None:
        from concrete import fhe

        self.client.keys = fhe.Keys.deserialize(keys)

    def evaluation_keys(self) -> bytes:
        return self.client.evaluation_keys.serialize()

    def encrypt(self, X: np.ndarray) -> bytes:
        x = quantize(X, self.numbers["input_bits"], self.numbers["input_step"])
        if len(x) == 1:
            return b"\0" + self.client.encrypt(x[0], function_name="beat").serialize()
        filled = np.pad(x, ((0, self.numbers["beats"] - len(x)), (0, 0)))
        return b"\1" + self.client.encrypt(filled, function_name="beats").serialize()

    def decrypt(self, answer: bytes, beats: int) -> np.ndarray:
        from concrete import fhe

        values = [fhe.Value.deserialize(message) for message in messages(answer, 2)]
        if answer[0] != (beats > 1):
            raise ValueError("an answer to another number of beats")
        tables, linear = self.client.decrypt(*values, function_name=FUNCTIONS[answer[0]])
        return logits_of_sums(self.numbers, np.atleast_1d(tables), np.atleast_1d(linear))[:beats]

    def check(self, kind: str, payload: bytes) -> None:
        messages(payload, 2)


class Server:
    """Computation by Concrete, which is loaded with the keys: until then a process stays free of its runtime."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    @staticmethod
    def versions() -> dict[str, str]:
        return {"python": "{}.{}".format(*sys.version_info), "concrete-python": version("concrete-python")}

    def load_keys(self, keys: bytes) -> None:
        from concrete import fhe

        self.check(KEYS, keys)
        prepare_linker()
        for parameter, value in MALLOPT.items():
            ctypes.CDLL(None).mallopt(parameter, value)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "server.zip"
            path.write_bytes(self.content)
            self.server, self.keys = fhe.Server.load(path), fhe.EvaluationKeys.deserialize(keys)

    def run(self, beats: bytes) -> bytes:
        from concrete import fhe

        self.check(BEATS, beats)
        value, name = fhe.Value.deserialize(beats[1:]), FUNCTIONS[beats[0]]
        found = self.server.run(value, evaluation_keys=self.keys, function_name=name)
        return beats[:1] + b"".join(part.serialize() for part in found)

    def check(self, kind: str, payload: bytes) -> None:
        messages(b"\0" + payload if kind == KEYS else payload, 1)


def prepare_linker() -> None:
    """Let Concrete link what it compiles. Raises InputError where there is no linker."""
    from concrete import compiler
    from concrete.fhe.compilation import server

    if shutil.which("ld") is None:
        raise InputError("the linker ld, which Concrete needs, is not on this machine; install the package binutils")
    runtime = re.sub(r"([^\w/.-])", r"\\\1", compiler.lookup_runtime_lib())  # goes to a shell without quotation marks
    server.lookup_runtime_lib = lambda: runtime


def circuit_cost(circuit: Any, function: Any, rounding_bits: int, p_error: float) -> dict[str, Any]:
    """Return a Scheme's cost of a circuit of Concrete whose `function` computes a beat."""
    pbs = function.programmable_bootstrap_count
    return {
        "pbs": pbs,
        "complexity": circuit.complexity,
        "rounding_bits": rounding_bits,
        "p_error": p_error,
        "p_any_pbs_off": 1 - (1 - p_error) ** pbs,
        "widest_integer_bits": function.graph.maximum_integer_bit_width(),
        "evaluation_keys_MB": (circuit.size_of_bootstrap_keys + circuit.size_of_keyswitch_keys) / 1e6,
        "security_bits": int(circuit.configuration.security_level),
        "secret_keys_kB": circuit.size_of_secret_keys / 1e3,
    }


def integer_function(network: QuantizedNetwork) -> Callable[[Any], tuple[Any, Any]]:
    """Return what is compiled: integers x (features,) or (beats, features) to the sums of tables and linear path."""
    from concrete import fhe

    half = network.tables.shape[1] // 2
    from_zero = np.roll(network.tables, -half, axis=1)  # negative accumulators count from the end
    by_index = np.repeat(from_zero, network.rounding_unit, axis=1)
    tables = fhe.LookupTable(np.array([fhe.LookupTable(entries) for entries in by_index]))
    removed = network.accumulator_bits - network.rounding_bits

    def function(x: Any) -> tuple[Any, Any]:
        k = x @ network.weights.astype(np.int64) + network.bias.astype(np.int64)
        if removed:
            k = fhe.round_bit_pattern(k, lsbs_to_remove=removed, exactness=fhe.Exactness.APPROXIMATE)
        return np.sum(tables[k], axis=-1), np.sum(x * network.linear.astype(np.int64), axis=-1)

    return function


def extreme_rows(network: QuantizedNetwork, X: np.ndarray) -> np.ndarray:
    """Return the integers (m, features) of those training rows X that have an integer's minimum or maximum.

    From them Concrete finds the widths that step 3 found; it evaluates rows one by one, and more show no more.
    """
    x = quantize(X, network.input_bits, network.input_step)
    columns = [x.min(axis=1), x.max(axis=1), *network.accumulators(X).T, *network.sums(X)]
    return x[np.unique([end for values in columns for end in (values.argmin(), values.argmax())])]


def messages(payload: bytes, count: int) -> list[bytes]:
    """Split a payload: the number of a function, then messages of Cap'n Proto, in which Concrete stores its values.

    Raises ValueError unless there are `count` whole ones. A message states the number of its segments less one, their
    sizes in units of 8 bytes, then come the segments. Where bytes are missing, up to 32 GB, its reader asks for them
    again and again, 8 kB at a time, which takes up to hours.
    """
    found, start = [], 1
    while start < len(payload):
        segments = int.from_bytes(payload[start : start + 4], "little") + 1
        size = 4 + 4 * segments
        if start + size <= len(payload):
            size = -(-size // 8) * 8 + 8 * sum(struct.unpack_from(f"<{segments}I", payload, start + 4))
        found.append(payload[start : start + size])
        start += size
    if start != len(payload) or len(found) != count or payload[0] >= len(FUNCTIONS):
        raise ValueError("a value is not whole")
    return found
