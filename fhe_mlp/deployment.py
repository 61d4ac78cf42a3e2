"""What a hospital and a server need to use one configuration (step 5, --export)."""

from __future__ import annotations

import csv
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fhe_mlp.circuit import CIRCUIT_ERRORS
from fhe_mlp.common import InputError, first_line, sha256
from fhe_mlp.experiment import Data, Job, accuracies, compile_job, versions
from preprocess_mitbih import FEATURES, load_scaler

SAME_PRICE = 0.01  # relative difference of complexity that nobody would notice
EXAMPLE_BEATS = 5  # of the training part, in example_beats.csv

README = """# Encrypted classification of heartbeats

{label}: {accuracy:.2%} of {rows:,} test beats right (quantized, in clear). One beat costs complexity {complexity:.3g},
{pbs} programmable bootstraps.

Each side gets its own folder; both need Python 3.10 to 3.12 and `pip install -r requirements.txt`. Every command takes
some seconds to start, and explains itself with `--help`.

## The hospital: folder `client/`

```
cd client
python encrypted_beats.py keys                            # once: keys/ (secret) and evaluation_keys.zip
python encrypted_beats.py encrypt example_beats.csv       # -> encrypted_beats.zip
                                                          # send both .zip files, get encrypted_answers.zip back
python encrypted_beats.py decrypt encrypted_answers.zip   # output, probability and decision (1: abnormal) of each beat
```

## The server: folder `server/`

```
cd server
python encrypted_beats.py run encrypted_beats.zip evaluation_keys.zip    # -> encrypted_answers.zip
```

A beats file is a .csv whose first line names the {features} features; `model.json` lists each with its unit and formula
(`preprocess_mitbih.py` computes them), and the mean and standard deviation by which the client scales them.

## What is secret, and how secret

- `keys/` holds the secret key, readable by its owner only. It never leaves the hospital. `evaluation_keys.zip` lets the
  server compute and decrypts nothing.
- Keys and ciphertexts have Concrete's default security level, {security} bits. The server learns how many beats there
  are, and who sends them. The network itself is in the clear on the server.
- p_error is {p_error:.3g}: each of the {pbs} bootstraps of a beat fails by chance at most that often (in {any_off:.1%}
  of the beats at least one does). Where accumulators are rounded, one that lies between two steps may besides be taken
  for either, so that outputs are often some steps off those in clear, and now and then a decision near the threshold is
  another one. Networks of step 3 were trained with such noise. It is a matter of accuracy, not of the keys' security,
  but an answer that is decrypted and given back to the server in the clear, as the raw output, could tell it something
  about the key: share decisions, not outputs.
- A file of other keys, of another model, or cut short is refused. That guards against mistakes, not against a server
  that lies: FHE keeps beats secret, it does not prove that the right network was computed.
- It is a research pipeline, no medical device.
"""


def choose(jobs: Sequence[Job], data: Data, max_loss: float) -> Job:
    """The cheapest configuration whose validation accuracy is at most `max_loss` below the best of `jobs`.

    Of those that cost the same but for SAME_PRICE, the most accurate one on validation rows.
    Raises InputError when none can be compiled.
    """
    nothing = np.array([], dtype=int)
    found = []
    for job in tqdm(jobs, desc="choosing", unit="circuit", disable=len(jobs) == 1):
        try:
            module = compile_job(job)
            accuracy = accuracies(module, job, data, nothing)["accuracy_clear_validation"]
            found.append((module.fhe_circuit.complexity, accuracy, job))
        except CIRCUIT_ERRORS as error:
            print(f"{job.label}: {first_line(error)}")
    if not found:
        raise InputError("none of the configurations can be compiled; see --models and --bits")
    least = max(accuracy for _, accuracy, _ in found) - max_loss
    good = [f for f in found if f[1] >= least]
    dearest = min(complexity for complexity, _, _ in good) * (1 + SAME_PRICE)
    return max((f for f in good if f[0] <= dearest), key=lambda f: f[1])[2]


def example_beats(X: np.ndarray, scaler: dict) -> list[dict[str, float]]:
    """Rows X (n, 32) as they were before scaling, by feature name; what was clipped stays so."""
    raw = X * np.array(scaler["sd"]) + np.array(scaler["mean"])
    return [dict(zip((feature["name"] for feature in FEATURES), map(float, row))) for row in raw]


def check_new(folder: Path) -> None:
    """Raises InputError when `folder` is there already or cannot be made."""
    if folder.exists() or folder.is_symlink():
        raise InputError(f"{folder}: is there already; name a new folder with --export")
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise InputError(f"{folder}: {parent} cannot be written; name another folder with --export")


def export(jobs: Sequence[Job], data: Data, max_loss: float, data_dir: Path, folder: Path) -> None:
    """Write client/, server/ and README.md for the one that `choose` takes, all or nothing.

    data: as load_arrays gives for `data_dir`. `folder` must not be there yet (check_new).
    """
    from concrete.ml.deployment import FHEModelDev

    job = choose(jobs, data, max_loss)
    module = compile_job(job)
    facts = accuracies(module, job, data, np.array([], dtype=int))
    pbs = module.fhe_circuit.programmable_bootstrap_count
    security = int(module.fhe_circuit.configuration.security_level)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        whole = Path(temporary) / "whole"
        FHEModelDev(str(whole / "client"), module).save()
        (whole / "server").mkdir()
        shutil.move(whole / "client" / "server.zip", whole / "server")
        scaler = load_scaler(data_dir)
        model = {
            "model": sha256(whole / "server" / "server.zip"),
            "name": job.label,
            "output": "logit" if job.setting.threshold == 0 else "probability",
            "threshold": job.setting.threshold,
            "p_error": job.setting.p_error,
            "security_bits": security,
            "test_accuracy": facts["accuracy_clear_test_set"],
            "features": FEATURES,
            "scaler": scaler,
        }
        (whole / "client" / "model.json").write_text(json.dumps(model, indent=1) + "\n")
        with (whole / "client" / "example_beats.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [feature["name"] for feature in FEATURES])
            writer.writeheader()
            writer.writerows(example_beats(data["train"][0][:EXAMPLE_BEATS], scaler))
        for side in ("client", "server"):
            shutil.copy(Path(__file__).with_name("encrypted_beats.py"), whole / side)
        readme = README.format(
            label=job.label,
            accuracy=facts["accuracy_clear_test_set"],
            rows=facts["test_set_rows"],
            complexity=module.fhe_circuit.complexity,
            pbs=pbs,
            features=len(FEATURES),
            security=security,
            p_error=job.setting.p_error,
            any_off=1 - (1 - job.setting.p_error) ** pbs,
        )
        (whole / "README.md").write_text(readme)
        for side in ("client", "server"):
            shutil.copy(whole / "README.md", whole / side)
            (whole / side / "requirements.txt").write_text(f"concrete-ml=={versions()['concrete-ml']}\n")
        whole.replace(folder)
    print(f"wrote client/, server/ and README.md for {job.label} to {folder}")
