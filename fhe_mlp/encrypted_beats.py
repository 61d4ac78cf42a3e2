"""Heartbeats classified on a server that cannot read them: the hospital's and the server's side.

Hospital (folder client/: client.zip, model.json, this file)
    python encrypted_beats.py keys                        once: secret keys into keys/, and evaluation_keys.zip
    python encrypted_beats.py encrypt beats.csv           -> encrypted_beats.zip
    python encrypted_beats.py decrypt encrypted_answers.zip
Server (folder server/: server.zip, this file)
    python encrypted_beats.py run encrypted_beats.zip evaluation_keys.zip     -> encrypted_answers.zip

The three .zip files between them are all that travels. The folder keys/ holds the secret key: it stays at the hospital.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import secrets
import sys
import tempfile
import traceback
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

BOX_VERSION = 1  # of the layout of the files that travel


class Refusal(Exception):
    """What was given cannot be used; the message names the file, what is wrong and what to do."""


def first_line(error: BaseException) -> str:
    """What an exception says in one line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def write_box(path: Path, header: dict[str, Any], payloads: Sequence[bytes]) -> None:
    """Write a file that travels: header.json and numbered payloads in a .zip, whose checksums tell a broken one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}"
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as box:
            box.writestr("header.json", json.dumps({**header, "version": BOX_VERSION, "count": len(payloads)}))
            for number, payload in enumerate(payloads):
                box.writestr(f"{number:06d}.bin", payload)
        temporary.replace(path)
        print(f"wrote {path} ({path.stat().st_size / 1e6:.2f} MB)")
    except OSError as error:
        raise Refusal(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        temporary.unlink(missing_ok=True)


def read_box(path: Path, kind: str) -> tuple[dict[str, Any], list[bytes]]:
    """Header and payloads of a file that travels. Raises Refusal for a missing, damaged or other file."""
    if not path.exists():
        raise Refusal(f"{path}: not found")
    try:
        with zipfile.ZipFile(path) as box:
            header = json.loads(box.read("header.json"))
            payloads = [box.read(f"{number:06d}.bin") for number in range(header["count"])]
            if not payloads:
                raise ValueError("nothing in it")
        found = header["kind"], header["version"], header["model"], header["key"]
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise Refusal(f"{path}: is truncated or damaged ({error}); have it sent again") from None
    if found[:2] != (kind, BOX_VERSION):
        raise Refusal(f"{path}: holds {found[0]} (version {found[1]}), {kind} (version {BOX_VERSION}) are wanted here")
    return header, payloads


def sha256(path: Path) -> str:
    """SHA-256 of a file as a hexadecimal string."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def same(what: str, path: Path, given: str, wanted: str, remedy: str) -> None:
    """Raises Refusal unless both are the same."""
    if given != wanted:
        raise Refusal(f"{path}: is for {what} {given}, here is {what} {wanted}; {remedy}")


def load_client(folder: Path, keys: Path) -> tuple[Any, dict[str, Any]]:
    """Concrete ML's client, which reads and writes keys in the folder `keys`, and model.json."""
    from concrete.ml.deployment import FHEModelClient

    if not (folder / "client.zip").exists():
        raise Refusal(f"{folder}: no client.zip here; this command is the hospital's, for its folder client/")
    try:
        model = json.loads((folder / "model.json").read_text())
        return FHEModelClient(str(folder), str(keys)), model
    except (OSError, ValueError, KeyError, AssertionError, zipfile.BadZipFile) as error:
        raise Refusal(f"{folder}: client.zip or model.json cannot be used here ({error})") from None


def load_keys(folder: Path, keys: Path) -> tuple[Any, dict[str, Any], str]:
    """Client with the secret keys in `keys` loaded, model.json, and the keys' name, which is no secret.

    Raises Refusal where there are no keys, a file of them is damaged, or they are for another model.
    """
    client, model = load_client(folder, keys)
    try:
        about = json.loads((keys / "about.json").read_text())
        same("model", keys, about["model"], model["model"], "name its own keys with --keys")
        for name, digest in about["files"].items():  # of a damaged one Concrete ML would make a new key and go on
            if not (keys / name).is_file() or sha256(keys / name) != digest:
                raise Refusal(f"{keys / name}: is missing or damaged; restore the folder from a copy, or make new keys")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise Refusal(f"{keys}: no whole keys here; make them with: python encrypted_beats.py keys") from None
    client.generate_private_and_evaluation_keys()  # reads them: it only makes keys where there are none
    return client, model, about["key"]


def make_keys(folder: Path, keys: Path, target: Path) -> None:
    """Make secret keys, readable by their owner only, and the evaluation keys that the server needs."""
    if keys.exists():
        raise Refusal(f"{keys}: is there already; what was encrypted with it can only be decrypted with it")
    keys.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=keys.parent, prefix=f".{keys.name}."
    ) as temporary:  # so that all or none is left
        whole = Path(temporary) / "keys"
        client, model = load_client(folder, whole)
        whole.mkdir(mode=0o700)
        client.generate_private_and_evaluation_keys()
        name = secrets.token_hex(8)
        files = {str(path.relative_to(whole)): sha256(path) for path in whole.rglob("*") if path.is_file()}
        (whole / "about.json").write_text(json.dumps({"model": model["model"], "key": name, "files": files}))
        header = {"kind": "evaluation keys", "model": model["model"], "key": name}
        write_box(target, header, [client.get_serialized_evaluation_keys()])
        whole.rename(keys)


def read_beats(path: Path, features: Sequence[str]) -> np.ndarray:
    """Raw features (n, len(features)) of a .csv file with their names in its first line. Raises Refusal."""
    if not path.exists():
        raise Refusal(f"{path}: not found")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # with or without the mark that Excel writes
            reader = csv.DictReader(file)
            names, rows = list(reader.fieldnames or []), list(reader)
        for name in features:
            if names.count(name) != 1:
                raise Refusal(
                    f"{path}: {names.count(name)} columns {name} (one is wanted, with commas between columns)"
                )
        X = np.array([[float(row[name]) for name in features] for row in rows])
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise Refusal(f"{path}: one number for each feature of model.json is wanted in each line ({error})") from None
    if not len(X) or not np.isfinite(X).all():
        raise Refusal(f"{path}: holds no beat, or NaN or infinity")
    return X


def encrypt(folder: Path, keys: Path, beats: Path, target: Path) -> None:
    """Standardise, clip, quantize and encrypt each beat."""
    client, model, name = load_keys(folder, keys)
    X = read_beats(beats, [feature["name"] for feature in model["features"]])
    scaler = model["scaler"]
    scaled = (X - np.array(scaler["mean"])) / np.array(scaler["sd"])
    scaled = np.clip(scaled, -scaler["clip_sd"], scaler["clip_sd"]).astype(np.float32).astype(np.float64)
    payloads = [client.quantize_encrypt_serialize(row[None]) for row in scaled]
    write_box(target, {"kind": "encrypted beats", "model": model["model"], "key": name}, payloads)


def run_server(folder: Path, beats: Path, evaluation_keys: Path, target: Path) -> None:
    """Compute the network on encrypted beats; nothing in this folder can decrypt them or the answers."""
    from concrete.ml.deployment import FHEModelServer

    if not (folder / "server.zip").exists():
        raise Refusal(f"{folder}: no server.zip here; this command is the server's, for its folder server/")
    try:
        model = sha256(folder / "server.zip")
        server = FHEModelServer(str(folder))
    except (OSError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile) as error:
        raise Refusal(f"{folder}: server.zip cannot be used here ({error})") from None
    header, payloads = read_box(beats, "encrypted beats")
    keys_header, (keys, *_) = read_box(evaluation_keys, "evaluation keys")
    for path, given in ((beats, header), (evaluation_keys, keys_header)):
        same("model", path, given["model"], model, "server.zip and client.zip must come from one export")
    remedy = "beats and evaluation keys must come from the same keys"
    same("key", evaluation_keys, keys_header["key"], header["key"], remedy)
    try:
        answers = [server.run(payload, keys) for payload in payloads]
    except (RuntimeError, ValueError, AssertionError) as error:
        raise Refusal(f"{beats}, {evaluation_keys}: cannot be computed with ({first_line(error)})") from None
    write_box(target, {**header, "kind": "encrypted answers"}, answers)


def decrypt(folder: Path, keys: Path, answers: Path) -> list[dict[str, Any]]:
    """Logit, probability and decision of each beat, in their order."""
    client, model, name = load_keys(folder, keys)
    header, payloads = read_box(answers, "encrypted answers")
    same("model", answers, header["model"], model["model"], "server.zip and client.zip must come from one export")
    same("key", answers, header["key"], name, "it can only be decrypted with the keys it was encrypted with")
    found = []
    for payload in payloads:
        try:
            output = float(client.deserialize_decrypt_dequantize(payload).ravel()[0])
        except (RuntimeError, ValueError, AssertionError) as error:
            raise Refusal(f"{answers}: holds no answer ({first_line(error)}); have it sent again") from None
        probability = output if model["output"] == "probability" else 1 / (1 + np.exp(-output))
        found.append({"output": output, "probability": probability, "abnormal": int(output > model["threshold"])})
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).resolve().parent
    parser.add_argument("--folder", type=Path, default=here, help="of client.zip or server.zip (default: this file's)")
    parser.add_argument("--keys", type=Path, default=Path("keys"), help="folder of the secret keys (default: keys)")
    commands = parser.add_subparsers(dest="command", required=True)
    for command, inputs, output, what in (
        (
            "keys",
            (),
            "evaluation_keys.zip",
            "Hospital, once: make secret keys, and the evaluation keys for the server.",
        ),
        ("encrypt", ("beats",), "encrypted_beats.zip", "Hospital: encrypt the beats of a .csv file of raw features."),
        ("run", ("beats", "evaluation_keys"), "encrypted_answers.zip", "Server: compute on what the hospital sent."),
        ("decrypt", ("answers",), None, "Hospital: print output, probability and decision of each beat as .csv."),
    ):
        sub = commands.add_parser(command, help=what, description=what)
        for name in inputs:
            sub.add_argument(name, type=Path)
        if output:
            sub.add_argument("--output", type=Path, default=Path(output), help=f"(default: {output})")
    args = parser.parse_args(argv)
    given = [getattr(args, name).resolve() for name in ("beats", "evaluation_keys", "answers") if name in args]
    if "output" in args and args.output.resolve() in given:
        parser.error(f"--output {args.output} would overwrite what is read")
    if args.command == "keys":
        before = os.umask(0o077)  # secret keys are their owner's only
        try:
            make_keys(args.folder, args.keys, args.output)
        finally:
            os.umask(before)
    elif args.command == "encrypt":
        encrypt(args.folder, args.keys, args.beats, args.output)
    elif args.command == "run":
        run_server(args.folder, args.beats, args.evaluation_keys, args.output)
    else:
        found = decrypt(args.folder, args.keys, args.answers)
        writer = csv.DictWriter(sys.stdout, ["output", "probability", "abnormal"])
        writer.writeheader()
        writer.writerows(found)


if __name__ == "__main__":
    status = 0
    try:
        main()
    except Refusal as refusal:
        print(f"encrypted_beats.py: {refusal}", file=sys.stderr)
        status = 2
    except OSError as error:
        print(f"encrypted_beats.py: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
        status = 2
    except (Exception, KeyboardInterrupt):
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    os._exit(status)  # Concrete's runtime, once it has started, would end the process with status 0
