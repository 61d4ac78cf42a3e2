"""One encrypted beat after another: what a process of server.py does, or a Dask worker, to which this file is sent."""

from __future__ import annotations

import platform
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

_LOADED: dict[str, Any] = {}  # the network and the evaluation keys of this process, under the keys' name


def versions() -> dict[str, str]:
    """What has to be the same wherever beats of one server are computed."""
    return {"python": ".".join(platform.python_version_tuple()[:2]), "concrete-ml": version("concrete-ml")}


def load(wanted: dict[str, str], network: bytes, keys: bytes | Path) -> tuple[Any, Any]:
    """Concrete ML's server for `network`, the bytes of server.zip, and the keys, which may still be in their box.

    Raises ValueError on a machine with other versions than `wanted`.
    """
    for name, mine in versions().items():
        if wanted[name] != mine:
            raise ValueError(f"{platform.node()}: its {name} is {mine}, the server's is {wanted[name]}; install that")
    from concrete.fhe import EvaluationKeys
    from concrete.ml.deployment import FHEModelServer

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "server.zip").write_bytes(network)
        server = FHEModelServer(folder)
    if isinstance(keys, Path):
        from boxes import read_payloads

        keys = next(read_payloads(keys))
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
