"""Schemes of encryption behind one interface, a file each in this folder; its name is the scheme's.

Step 5, export, client and server know nothing of a scheme but these three classes of its file:

    Scheme(network, X, beats)     a compiled network; X: prepared training rows (n, features), which show the widths of
                                  all integers; beats: that one payload holds at most. Raises one of CIRCUIT_ERRORS
        accepts(network)          whether the scheme can compute the network (static)
        beats                     of a payload at most
        cost()                    dictionary of pbs, complexity of a beat, widest_integer_bits, evaluation_keys_MB,
                                  security_bits, and other columns of step 5
        simulate(X)               logits (n,) with the noise of encryption; None where it is not simulated
        numbers, client_part()    what a Client needs: numbers for a .json file, and bytes
        server_part()             what a Server needs: bytes
        key_parameters            text; keys of one network fit another of equal key_parameters. None: they fit no other
        client(), server()        the two sides in this process
    Client(numbers, content)      the side that has the secret key
        make_keys()               makes new keys
        secret_keys()             them, as bytes for a safe place, enough to have the evaluation keys again
        load_secret_keys(keys)    takes such keys in use
        evaluation_keys()         bytes that the server needs to compute, and which decrypt nothing
        encrypt(X)                payload of up to `beats` prepared rows X (n, features) float32
        decrypt(answer, beats)    logits (beats,) float64 of the answer to a payload of so many beats
        check(kind, payload)      raises ValueError for damaged ANSWERS, before a library sees them
    Server(content)               the side that computes
        versions()                libraries whose versions must be equal wherever payloads are computed (static)
        load_keys(keys)           takes evaluation keys in use
        run(payload)              the encrypted answers to a payload
        check(kind, payload)      raises ValueError for damaged KEYS or BEATS, before a library sees them

Damaged bytes raise ValueError or RuntimeError.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fhe_mlp.quantized import QuantizedNetwork

BEATS_PER_CALL = 16  # beats in one payload, which share the constant part of a call; 32 gain a tenth more
KEYS, BEATS, ANSWERS = "evaluation keys", "encrypted beats", "encrypted answers"  # kinds of payloads
# What Concrete and Concrete ML raise on a network they cannot handle, besides running out of memory.
CIRCUIT_ERRORS = (RuntimeError, ValueError, AssertionError, NotImplementedError, MemoryError)


def scheme_names() -> list[str]:
    """Return the names of the schemes: those of the files in this folder that have the class Scheme."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    return [name for name in names if hasattr(importlib.import_module(f"{__name__}.{name}"), "Scheme")]


def scheme_module(name: str) -> ModuleType:
    """Return the module of a scheme. Raises ValueError where there is none of that name."""
    if name not in scheme_names():
        raise ValueError(f"there is no scheme {name[:40]!r}; this program has {', '.join(scheme_names())}")
    return importlib.import_module(f"{__name__}.{name}")


def choose(network: QuantizedNetwork, name: str | None = None) -> type:
    """Return the Scheme of that name, or the first that accepts the network. Raises ValueError where none does."""
    for one in [name] if name else scheme_names():
        scheme = scheme_module(one).Scheme
        if scheme.accepts(network):
            return scheme
    raise ValueError(f"{name or 'no scheme'} cannot compute a network of {network.neurons} neurons")
