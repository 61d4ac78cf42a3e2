"""What a hospital and a server need to use one compiled network, written into a new folder.

client.py, server.py, compute.py and boxes.py run there without this package; both sides get a copy of cli.py and
packing.py, the client also of the rooms that read records.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np

from fhe_mlp import packing
from fhe_mlp.cli import InputError, sha256
from fhe_mlp.packed import PackedNetwork

if TYPE_CHECKING:
    from concrete.ml.quantization import QuantizedModule

HERE = Path(__file__).parent
NOISE = """p_error is {p_error:.3g}: the probability that one of the {pbs} bootstraps of a beat returns a wrong value by
  chance (at least one of them: {p_any_pbs_off:.2g}). Where accumulators are rounded, a value between two steps may be
  rounded to either. So outputs often differ from the cleartext ones by a few steps."""  # of a network with bootstraps
PACKED_NOISE = "Encryption adds noise to the output, mostly under a hundred steps of the sum of products."
CLIENT_ONLY = ("client.py", "recording.py", "csvfiles.py", "answers.py")
CLIENT_COPIES = ("records.py", "ecg_features.py", "expansion.py")  # of this package


def check_new(folder: Path) -> None:
    """Raises InputError when `folder` is there already or cannot be made."""
    if folder.exists() or folder.is_symlink():
        raise InputError(f"{folder}: is there already; name a new folder with --export")
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise InputError(f"{folder}: {parent} cannot be written; name another folder with --export")


def export(module: QuantizedModule | PackedNetwork, model: dict[str, Any], X: np.ndarray, folder: Path) -> None:
    """Write client/, server/ and README.md into the new `folder`, all or nothing.

    module: compiled. model: what model.json tells the client: name, output ("logit" or "probability"), threshold,
    p_error, security_bits, test_balanced_accuracy, test_rows, complexity, pbs, features (a list of name, unit and
    formula), scaler (mean and sd of each feature, clip_sd) and expand (their public map). X: scaled rows (n, features)
    for example_beats.csv; what was clipped stays so. Raises InputError when `folder` is there already.
    """
    from concrete.ml.deployment import FHEModelDev

    check_new(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        whole = Path(temporary) / "whole"
        client, server = whole / "client", whole / "server"
        server.mkdir(parents=True)
        if isinstance(module, PackedNetwork):
            client.mkdir()
            linear, network = module.describe()
            (server / "server.zip").write_bytes(network)
            outputs = 1
        else:
            FHEModelDev(str(client), module).save()
            shutil.move(client / "server.zip", server)
            linear, outputs = None, len(module.fhe_circuit.graph.output_nodes)
        model = {"model": sha256(server / "server.zip"), "outputs": outputs, "linear": linear, **model}
        (client / "model.json").write_text(json.dumps(model, indent=1) + "\n")
        with (client / "example_beats.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(feature["name"] for feature in model["features"])
            writer.writerows((X * np.array(model["scaler"]["sd"]) + np.array(model["scaler"]["mean"])).tolist())
        readme = Template((HERE / "README.md").read_text(encoding="utf-8")).substitute(
            name=model["name"],
            accuracy=f"{model['test_balanced_accuracy']:.2%}",
            rows=f"{model['test_rows']:,}",
            complexity=f"{model['complexity']:.3g}",
            pbs=f"{model['pbs']:,}",
            features=len(model["features"]),
            security=model["security_bits"],
            noise=PACKED_NOISE
            if linear
            else NOISE.format(**model, p_any_pbs_off=1 - (1 - model["p_error"]) ** model["pbs"]),
            python=".".join(platform.python_version_tuple()[:2]),
        )
        (whole / "README.md").write_text(readme, encoding="utf-8")
        for side in (client, server):
            (side / "README.md").write_text(readme, encoding="utf-8")
            packages = ("concrete-ml",) if not linear else (packing.LIBRARY, "numpy")
            if side == client:  # Concrete ML fixes pandas; a newer one would be installed, with which wfdb cannot read
                packages += ("pandas", "wfdb", "matplotlib")
            else:
                packages += ("distributed",)
            (side / "requirements.txt").write_text("".join(f"{name}=={version(name)}\n" for name in packages))
            for path in (HERE / "boxes.py", HERE.parent / "cli.py", HERE.parent / "packing.py"):
                shutil.copy(path, side)
        for name in ("server.py", "compute.py"):
            shutil.copy(HERE / name, server)
        for path in (*(HERE / name for name in CLIENT_ONLY), *(HERE.parent / name for name in CLIENT_COPIES)):
            shutil.copy(path, client)
        whole.replace(folder)
