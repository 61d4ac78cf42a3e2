"""Writes a network as two new folders, client/ for the hospital and server/, each with a slice of this package."""

import hashlib
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fhe_mlp.cli import InputError, check_writable, write_json
from fhe_mlp.deployment.exchange import CLIENT_PART, MODEL, SERVER_PART
from fhe_mlp.encrypted import scheme_module

HERE = Path(__file__).parent
SLICE = ("__init__.py", "cli.py", "workers.py", "scaling.py", "ecg/*.py", "encrypted/__init__.py", "deployment/*.py")
LIBRARIES = {  # besides those of the scheme; Concrete needs setuptools and does not say so
    "client": ("numpy", "scipy", "pandas", "wfdb", "matplotlib", "setuptools"),
    "server": ("numpy", "tqdm", "distributed", "setuptools"),
}


def check_new(folder: Path) -> None:
    """Raise InputError when `folder` exists or cannot be made."""
    if folder.exists() or folder.is_symlink():
        raise InputError(f"{folder}: exists already; name a new folder with --export")
    check_writable(folder.absolute().parent)


def export_network(scheme: Any, model: dict[str, Any], X_example: np.ndarray, folder: Path) -> None:
    """Write client/, server/ and README.md into the new `folder`, all or nothing.

    scheme: a Scheme of fhe_mlp.encrypted. model: for model.json: name, p_error, security_bits, test_balanced_accuracy,
    test_rows, complexity, pbs, features (name, unit and formula of each), scaler (of scaling.fit_scaler), map (of
    scaling.public_map) and leads. X_example: scaled rows (n, features) for example_beats.csv, in which clipped values
    stay clipped.
    """
    parts = {CLIENT_PART: scheme.client_part(), SERVER_PART: scheme.server_part()}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in parts.items()}
    libraries = {name: found for name, found in scheme.server().versions().items() if name != "python"}
    export = {"scheme": scheme.name, "numbers": scheme.numbers, "versions": libraries, "parts": digests}
    model = {"model": digests[SERVER_PART], **model, **export}
    readme = (HERE / "README.md").read_text(encoding="utf-8").format(**model, count=len(model["features"]))
    raw = X_example * np.array(model["scaler"]["sd"]) + np.array(model["scaler"]["mean"])
    package = HERE.parent
    modules = {path: path.relative_to(package) for pattern in SLICE for path in package.glob(pattern)}
    modules[Path(scheme_module(scheme.name).__file__)] = Path("encrypted", f"{scheme.name}.py")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        whole = Path(temporary) / "whole"
        for name, part in (("client", CLIENT_PART), ("server", SERVER_PART)):
            side = whole / name
            for path, module in modules.items():
                copy = side / package.name / module
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, copy)
            shutil.copy(HERE / f"{name}.py", side)
            write_json(side / MODEL, model)
            (side / part).write_bytes(parts[part])
            (side / "README.md").write_text(readme, encoding="utf-8")
            required = {library: version(library) for library in LIBRARIES[name]} | libraries
            (side / "requirements.txt").write_text("".join(f"{library}=={v}\n" for library, v in required.items()))
        examples = pd.DataFrame(raw, columns=[feature["name"] for feature in model["features"]])
        examples.to_csv(whole / "client" / "example_beats.csv", index=False)
        (whole / "README.md").write_text(readme, encoding="utf-8")
        whole.replace(folder)
