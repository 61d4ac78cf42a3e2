"""The hospital's side: encrypts heartbeats for a server that cannot read them, and decrypts its answers.

    python client.py keys                               once: secret keys into keys/, and evaluation_keys.zip
    python client.py encrypt 208                        a WFDB record -> encrypted_beats.zip, and encrypted_beats.json
    python client.py decrypt encrypted_answers.zip      -> 208.fhe (WFDB annotations), .fhe.csv, .fhe.png, a summary

encrypt also takes an .edf file, with --fs a .csv file of two leads, and without it a .csv file of features, of which
decrypt prints output, probability and decision. The three .zip files are all that travels. keys/ holds the secret key
and stays here, as does encrypted_beats.json, which holds the beats' times. model.json, client.zip (of a network with
bootstraps) and all .py files of the export lie beside this file.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import secrets
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import answers
import expansion
import numpy as np
import packing
import recording
from boxes import check_output, read_box, same, whole, write_box
from cli import InputError, first_line, positive_float, run_and_leave, sha256
from csvfiles import read_beats

HERE = Path(__file__).resolve().parent
CLIENT, MODEL = HERE / "client.zip", HERE / "model.json"
# How the files of encrypt begin, which a new run may replace.
BOX, TIMES = rb"PK\x03\x04.{26}payloads\.bin", rb'\{"beats": "'
NEEDED = {"model", "outputs", "linear", "output", "threshold", "expand", "leads", "features", "scaler"}  # in model.json
KEPT = {"record", "path", "table_fs", "origin", "annotations", "fs", "leads", "not_classified"}  # of a recording
FAR_SD = 10.0  # standard deviations from the training mean; a column with most of its values beyond: another unit


def read_model() -> dict[str, Any]:
    """model.json of the export. Raises InputError."""
    try:
        model = json.loads(MODEL.read_text())
        if missing := NEEDED - model.keys():
            raise ValueError(f"it has no {min(missing)}; it may be of another version")
        return model
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{MODEL}: cannot be used ({first_line(error)}); restore it from the export") from None


def load_client(model: dict[str, Any], keys: Path) -> Any:
    """What encrypts and decrypts; it reads the keys in the folder `keys`, or makes them there. Raises InputError."""
    try:
        if model["linear"]:
            client = packing.Client(model["linear"], keys)
        else:
            from concrete.ml.deployment import FHEModelClient  # takes seconds, so only for input that is in order

            client = FHEModelClient(str(HERE), str(keys))
        client.generate_private_and_evaluation_keys()
    except (OSError, ValueError, KeyError, RuntimeError, AssertionError, zipfile.BadZipFile) as error:
        raise InputError(f"{MODEL if model['linear'] else CLIENT}: cannot be used here ({first_line(error)})") from None
    return client


def make_keys(keys: Path, target: Path) -> None:
    """Make secret keys, readable by their owner only, and the evaluation keys for the server; both or nothing."""
    if keys.exists():
        raise InputError(f"{keys}: is there already; what was encrypted with it can only be decrypted with it")
    model = read_model()
    os.umask(0o077)
    keys.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=keys.parent, prefix=f".{keys.name}.") as temporary:
        whole = Path(temporary) / "keys"
        whole.mkdir()
        client, name = load_client(model, whole), secrets.token_hex(8)
        files = {str(path.relative_to(whole)): sha256(path) for path in whole.rglob("*") if path.is_file()}
        (whole / "about.json").write_text(json.dumps({"model": model["model"], "key": name, "files": files}))
        names = {"model": model["model"], "key": name, "beats": "0"}
        write_box(target, "evaluation keys", names, [client.get_serialized_evaluation_keys()])
        whole.rename(keys)


def check_keys(keys: Path, model: str) -> str:
    """The name of the keys in the folder `keys`, which is no secret.

    Raises InputError where there are no keys, a file of them is damaged (Concrete ML would replace it by a new key), or
    they are for another model.
    """
    try:
        about = json.loads((keys / "about.json").read_text())
        name, given, files = about["key"], about["model"], about["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{keys}: no complete keys here; make them with: python client.py keys") from None
    same("model", keys, given, model, "name its own keys with --keys")
    for file, digest in files:
        if not (keys / file).is_file() or sha256(keys / file) != digest:
            raise InputError(f"{keys / file}: is missing or damaged; restore the folder from a copy, or make new keys")
    return name


def scale(X: np.ndarray, model: dict[str, Any]) -> np.ndarray:
    """Raw features (n, features) as the network takes them: standardized, clipped, float32 as in training, and mapped.

    Warns on stderr of a column that is in another unit than the training data.
    """
    scaler = model["scaler"]
    with np.errstate(over="ignore"):  # of numbers like 1e308, which are clipped
        z = (X - np.array(scaler["mean"])) / np.array(scaler["sd"])
    for feature, far in zip(model["features"], (np.abs(z) > FAR_SD).sum(axis=0), strict=True):
        if far > len(X) / 2:
            what = f"{far} of {len(X)} values are over {FAR_SD:g} standard deviations from the training data's mean"
            print(f"warning: {feature['name']}: {what}; its unit is {feature['unit']}", file=sys.stderr)
    z = np.clip(z, -scaler["clip_sd"], scaler["clip_sd"]).astype(np.float32)
    return expansion.expand_scaled(z, model["expand"], scaler["clip_sd"]).astype(np.float64)


def encrypt(
    keys: Path, path: Path, target: Path, fs: float | None, annotator: str | None, minutes: float | None
) -> None:
    """Scale, quantize and encrypt each beat of a recording or of a .csv file. Raises InputError.

    Of a recording, the beats' times are kept in a .json file beside `target`. fs, annotator, minutes: see recording.py.
    """
    model, times, found = read_model(), target.with_suffix(".json"), None
    for output, start in ((target, BOX), (times, TIMES)):
        answers.check_ours(output, start)
    if source := recording.find(path, fs):
        X, found = recording.read_beats(source, fs, annotator, minutes, model)
    elif annotator or minutes:
        raise InputError(f"{path}: is no recording; --annotator and --minutes do not fit a table of features")
    else:
        X = read_beats(path, [feature["name"] for feature in model["features"]])
    X = scale(X, model)
    names = {"model": model["model"], "key": check_keys(keys, model["model"]), "beats": secrets.token_hex(8)}
    client = load_client(model, keys)
    if found:  # written before the beats, which must not travel without it
        beats = f"{len(found['samples'])} beats, R peaks {found['origin']}"
        print(f"{found['record']}: {beats}; {len(X)} can be classified{answers.listed(found['not_classified'])}")
        target.parent.mkdir(parents=True, exist_ok=True)
        times.write_text(json.dumps({"beats": names["beats"], **found}))
    write_box(target, "encrypted beats", names, (client.quantize_encrypt_serialize(x[None]) for x in X))


def read_times(path: Path, given: Path | None, beats: str, count: int) -> dict[str, Any] | None:
    """What encrypt kept of the record whose beats are answered; None for beats of a .csv file. Raises InputError.

    given: the file that was asked for; without one, `path` is taken where it is of these beats.
    """
    path = given or path
    if not path.exists() and not given:
        return None
    try:
        found = json.loads(path.read_text())
        name, classified = found["beats"], sum(found["classified"])
        whole = len(found["classified"]) == len(found["samples"]) and found.keys() >= KEPT
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: is damaged ({first_line(error)}); name the right file with --beats") from None
    if name != beats:
        if given:
            raise InputError(f"{path}: is of other beats than the answers")
        print(f"warning: {path} is of other beats; name the right file with --beats", file=sys.stderr)
        return None
    if not whole or classified != count:
        raise InputError(f"{path}: is damaged or of another version; it holds {classified} beats for {count} answers")
    return found


def read_signal(found: dict[str, Any]) -> np.ndarray | None:
    """The signal (samples, 2) that encrypt read; None, with a warning on stderr, where it is not there any more."""
    try:
        signal, fs, _ = recording.read_signal(Path(found["path"]), found["table_fs"])
        if fs == found["fs"] and len(signal) > max(found["samples"]):
            return signal
        why = f"{found['path']}: has changed"
    except (InputError, OSError) as error:
        why = first_line(error)
    print(f"warning: {why}; the picture has no signal", file=sys.stderr)
    return None


def decrypt(keys: Path, path: Path, folder: Path, given: Path | None) -> None:
    """Decrypt the answers: of a recording into files of their own in `folder`, else onto stdout. Raises InputError.

    given: the .json file that encrypt wrote, if it was named.
    """
    model = read_model()
    is_whole = whole(model["linear"], "encrypted answers")
    header, payloads = read_box(path, "encrypted answers", is_whole, model["model"])
    name = check_keys(keys, model["model"])
    same("key", path, header["key"], name, "it can only be decrypted with the keys it was encrypted with")
    count, rest = divmod(header["count"], model["outputs"])
    if rest:
        raise InputError(f"{path}: a part of an answer is missing; have it sent again")
    found = read_times(Path("encrypted_beats.json"), given, header["beats"], count)
    if found:
        answers.check_files(folder, found["record"], found["annotations"])
    client, decided = load_client(model, keys), []
    for parts in zip(*[payloads] * model["outputs"]):  # the logit is the sum of what the circuit returns
        try:
            outputs = client.deserialize_decrypt_dequantize(*parts)
            output = float(np.sum(outputs if isinstance(outputs, tuple) else (outputs,)))
        except (RuntimeError, ValueError, AssertionError) as error:
            raise InputError(f"{path}: holds no answer ({first_line(error)}); have it sent again") from None
        probability = output if model["output"] == "probability" else 1 / (1 + np.exp(-output))
        decided.append((output, probability, int(output > model["threshold"])))
    if found:
        beats = answers.join(found, decided)
        answers.write_all(folder, beats, read_signal(found), found["leads"])
        print(answers.summary(beats))
        print(f"wrote {folder / beats.name}{{{','.join(answers.OURS)}}}")
    else:
        csv.writer(sys.stdout, lineterminator="\n").writerows([("output", "probability", "abnormal"), *decided])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command, reads, writes, what in (
        ("keys", None, "evaluation_keys.zip", "once: make secret keys, and the evaluation keys for the server"),
        ("encrypt", "beats", "encrypted_beats.zip", "encrypt the beats of a recording or of a .csv of features"),
        ("decrypt", "answers", ".", "decrypt the answers; of a recording: annotations, table, picture"),
    ):
        sub = commands.add_parser(command, help=what, description=what)
        sub.add_argument("--keys", type=Path, default=Path("keys"), help="folder of the secret keys (default: keys)")
        if reads:
            sub.add_argument("file", metavar=reads, type=Path)
        kind = "folder of what is written" if command == "decrypt" else "file to write"
        sub.add_argument("--output", type=Path, default=Path(writes), help=f"{kind} (default: {writes})")
        if command == "encrypt":
            detector = recording.DETECTOR
            what = f"ending of the file whose beats are taken, or {detector} to detect them (default: atr if there)"
            sub.add_argument("--annotator", metavar="NAME", help=what)
            what = "sampling rate in Hz; the file is then a .csv of two leads, named in its first line, as 'MLII (mV)'"
            sub.add_argument("--fs", type=positive_float, help=what)
            sub.add_argument("--minutes", type=positive_float, help="how much of the recording is taken (default: all)")
        if command == "decrypt":
            what = "the .json file that encrypt wrote for these beats (default: encrypted_beats.json)"
            sub.add_argument("--beats", type=Path, metavar="FILE", help=what)
    args = parser.parse_args()
    if args.command == "decrypt":
        decrypt(args.keys, args.file, args.output, args.beats)
        return
    check_output(args.output, [CLIENT, MODEL, args.keys, *([args.file] if "file" in args else [])])
    if args.command == "keys":
        make_keys(args.keys, args.output)
    else:
        check_output(args.output.with_suffix(".json"), [MODEL, args.file, args.output])
        encrypt(args.keys, args.file, args.output, args.fs, args.annotator, args.minutes)


if __name__ == "__main__":
    run_and_leave(main, "run the same command again")
