"""One encrypted beat after another: what a process of server.py does, or a Dask worker, to which this file and
packing.py are sent."""

from __future__ import annotations

import platform
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import packing

_LOADED: dict[str, Any] = {}  # the network and the evaluation keys of this process, under the keys' name


def versions(network: bytes) -> dict[str, str]:
    """What has to be the same wherever beats of one server, whose server.zip is `network`, are computed."""
    library = packing.LIBRARY if packing.read_description(network) else "concrete-ml"
    return {"python": ".".join(platform.python_version_tuple()[:2]), library: version(library)}


def load(wanted: dict[str, str], network: bytes, keys: bytes | Path) -> tuple[Any, Any]:
    """What computes `network`, the bytes of server.zip, and the keys, which may still be in their box.

    Raises ValueError on a machine with other versions than `wanted`.
    """
    for name, mine in versions(network).items():
        if wanted[name] != mine:
            raise ValueError(f"{platform.node()}: its {name} is {mine}, the server's is {wanted[name]}; install that")
    linear = packing.read_description(network)
    if isinstance(keys, Path):
        from boxes import read_payloads, whole

        keys = next(read_payloads(keys, whole(linear, "evaluation keys")))
    if linear:
        return packing.Server(network), packing.load_keys(keys)
    from concrete.fhe import EvaluationKeys
    from concrete.ml.deployment import FHEModelServer

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "server.zip").write_bytes(network)
        server = FHEModelServer(folder)
    return server, EvaluationKeys.deserialize(keys)


def answer(name: str, wanted: dict[str, str], network: bytes, keys: bytes | Path, beat: bytes) -> tuple[bytes, ...]:
    """The network's encrypted answer to one beat, whose parts the client adds.

    name: of the keys; a process loads them once. For the rest see load.

    Raises RuntimeError, ValueError or AssertionError for what Concrete cannot compute with.
    """
    if name not in _LOADED:
        _LOADED.clear()  # keys are large
        _LOADED[name] = load(wanted, network, keys)
    server, evaluation_keys = _LOADED[name]
    found = server.run(beat, evaluation_keys)
    return found if isinstance(found, tuple) else (found,)
