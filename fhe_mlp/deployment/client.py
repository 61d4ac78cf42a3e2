"""The hospital's side: encrypts heartbeats for a server that cannot read them, and decrypts its answers.

    python client.py keys                               once: secret keys into keys/, and evaluation_keys.zip
    python client.py encrypt 208                        a WFDB record -> encrypted_beats.zip, and 208.NUMBER.json
    python client.py decrypt encrypted_answers.zip      -> 208.fhe (WFDB annotations), .fhe.csv, .fhe.png, a summary

encrypt also reads an .edf file, with --fs a .csv file of two leads, and without it a .csv file of features, for which
decrypt prints output, probability and decision. The three .zip files are all that travels. keys/ holds the secret keys
and stays here, as does the .json file, which holds the beats' times.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import expit

from fhe_mlp import scaling
from fhe_mlp.cli import HelpFormatter, InputError, check_writable, first_line, positive_float, run_and_leave, write_json
from fhe_mlp.deployment import decisions, exchange, recordings
from fhe_mlp.deployment.exchange import Archive, Header
from fhe_mlp.encrypted import ANSWERS, BEATS, KEYS, scheme_module

HERE = Path(__file__).resolve().parent
SECRETS = "secret_keys.zip"  # in the folder of keys
FAR_SD = 10.0  # standard deviations from the training mean; a column with most of its values beyond: another unit


def open_client() -> tuple[dict[str, Any], Any]:
    """Return the content of model.json and the scheme's client, still without keys. Raises InputError."""
    model, content = exchange.read_export(HERE, exchange.CLIENT_PART)
    return model, scheme_module(model["scheme"]).Client(model["numbers"], content)


def load_keys(folder: Path, model: dict[str, Any], client: Any) -> str:
    """Let the client use the secret keys in `folder`; return their name, which is no secret. Raises InputError."""
    if not (folder / SECRETS).exists():
        raise InputError(f"{folder}: no keys here; make them with: python client.py keys")
    archive = Archive(folder / SECRETS, exchange.SECRET_KEYS, model)
    client.load_secret_keys(archive.payload())
    return archive.header.key


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait until no other command has this folder locked, and lock it: keys of two must not mix."""
    folder.mkdir(parents=True, exist_ok=True)
    number = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)


def make_keys(args: argparse.Namespace) -> None:
    """Write evaluation keys for the server, of new secret keys where there are none yet. Raises InputError."""
    check_writable(args.output.absolute().parent)
    model, client = open_client()
    with locked(args.keys):
        if args.output.exists():
            raise InputError(f"{args.output}: exists already; move it away to have it written again")
        if (args.keys / SECRETS).exists():
            name = load_keys(args.keys, model, client)
        else:
            name = secrets.token_hex(8)
            client.make_keys()
            secret = Header(exchange.SECRET_KEYS, model["model"], name)
            exchange.write_archive(args.keys / SECRETS, secret, [client.secret_keys()])
        exchange.write_archive(args.output, Header(KEYS, model["model"], name), [client.evaluation_keys()])


def warn_of_units(X: np.ndarray, model: dict[str, Any]) -> None:
    """Warn on stderr of a column of raw features X (n, features) that is in another unit than the training data."""
    far = np.abs(X - np.array(model["scaler"]["mean"])) > FAR_SD * np.array(model["scaler"]["sd"])
    for feature, count in zip(model["features"], far.sum(axis=0), strict=True):
        if count > len(X) / 2:
            what = f"{count} of {len(X)} values are over {FAR_SD:g} standard deviations from the training data's mean"
            print(f"warning: {feature['name']}: {what}; its unit is {feature['unit']}", file=sys.stderr)


def encrypt(args: argparse.Namespace) -> None:
    """Encrypt the beats of a recording, with their times in a .json file beside, or of a .csv file of features."""
    recording = None
    exchange.check_replaceable(args.output, exchange.START % BEATS.encode())
    model, client = open_client()
    if path := recordings.find_recording(args.file, args.fs):
        X, recording = recordings.read_recording(path, args.fs, args.annotator, args.minutes, model)
    elif args.annotator or args.minutes:
        raise InputError(f"{args.file}: is no recording; --annotator and --minutes do not fit a table of features")
    else:
        X = recordings.read_features(args.file, [feature["name"] for feature in model["features"]])
    warn_of_units(X, model)
    X = scaling.prepare(X, model["scaler"], model["map"])
    beats = secrets.token_hex(8) if recording else ""
    header = Header(BEATS, model["model"], load_keys(args.keys, model, client), beats, len(X))
    if recording:  # its times are written before the beats, which must not travel without them
        print(f"{recording.title}; {len(X)} can be classified{recording.reasons}")
        times = args.output.with_name(f"{recording.name}.{beats}.json")  # a new one: answers to others may be open
        write_json(times, {"beats": beats, "recording": dataclasses.asdict(recording)})
    size = model["numbers"]["beats"]
    payloads = (client.encrypt(X[first : first + size]) for first in range(0, len(X), size))
    exchange.write_archive(args.output, header, payloads)


def read_times(folder: Path, beats: str) -> recordings.Recording:
    """Return the recording that encrypt stored in `folder` with these beats. Raises InputError."""
    for path in folder.glob("*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            times = json.loads(path.read_text(encoding="utf-8"))
            if times["beats"] == beats:
                return recordings.Recording(**times["recording"])
    what = f"the times of these beats, RECORD.{beats[:40]}.json, are not here or damaged"
    raise InputError(f"{folder}: {what}; name the folder where encrypt wrote them with --times")


def read_signal_again(recording: recordings.Recording) -> np.ndarray | None:
    """Return the signal (samples, 2) that encrypt read; None, with a warning, where it is not there any more."""
    try:
        signal, fs, _ = recordings.read_signal(Path(recording.path), recording.csv_fs)
        if recordings.identify(signal, fs, recording.samples) != recording.identity:
            raise InputError(f"{recording.path}: is not the signal that was encrypted")
        return signal
    except (InputError, OSError) as error:
        print(f"warning: {first_line(error)}; the picture has no signal", file=sys.stderr)
        return None


def decrypt(args: argparse.Namespace) -> None:
    """Decrypt the answers: of a recording into files of their own, else onto stdout. Raises InputError."""
    model, client = open_client()
    archive = Archive(args.file, ANSWERS, model, client.check)
    if load_keys(args.keys, model, client) != archive.header.key:
        raise InputError(f"{args.file}: can only be decrypted with the keys with which its beats were encrypted")
    recording = read_times(args.times, archive.header.beats) if archive.header.beats else None
    if recording:
        for ending, start in decisions.OUTPUTS.items():
            path = args.output / f"{recording.name}{ending}"
            exchange.check_replaceable(path, start % recording.identity.encode())
    try:
        parts = [client.decrypt(archive.payload(k), len(span)) for k, span in enumerate(archive.spans)]
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{args.file}: holds no answers ({first_line(error)}); have it sent again") from None
    logits = np.concatenate(parts)
    if recording:
        beats = decisions.join(recording, logits)
        decisions.write_files(args.output, recording, beats, read_signal_again(recording))
        print(decisions.summary(recording, beats))
        print(f"wrote {args.output / recording.name}{{{','.join(decisions.OUTPUTS)}}}")
    else:
        columns = {"output": logits, "probability": expit(logits), "abnormal": (logits > 0).astype(int)}
        print(pd.DataFrame(columns).to_csv(index=False), end="")


def main() -> None:
    """The command line."""
    os.umask(0o077)  # nobody else can read keys, times of beats and decisions
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    commands = parser.add_subparsers(required=True)

    def add(function: Callable, name: str, output: str, what: str) -> Callable:
        command = commands.add_parser(name, help=what, description=what, formatter_class=HelpFormatter)
        command.set_defaults(function=function)
        command.add_argument("--keys", type=Path, default=Path("keys"), help="folder of the secret keys")
        written = "folder of what is written" if function is decrypt else "file to write"
        command.add_argument("--output", type=Path, default=Path(output), help=written)
        return command.add_argument

    add(make_keys, "keys", "evaluation_keys.zip", "once: make secret keys, and the evaluation keys for the server")
    what = "encrypt the beats of a recording or of a .csv file of features"
    option = add(encrypt, "encrypt", "encrypted_beats.zip", what)
    option("file", metavar="beats", type=Path, help="recording, or .csv file of features")
    what = f"ending of the annotation file with the beats, or {recordings.DETECTOR} to detect them"
    option("--annotator", metavar="NAME", help=f"{what} (default: atr if it exists)")
    what = "sampling rate in Hz; the file is then a .csv of two leads, named in its first line, as 'MLII (mV)'"
    option("--fs", type=positive_float, help=what)
    option("--minutes", type=positive_float, help="used part of the recording (default: all)")
    what = "decrypt the answers; of a recording: annotations, .csv file, picture"
    option = add(decrypt, "decrypt", ".", what)
    option("file", metavar="answers", type=Path, help="encrypted_answers.zip of server.py")
    what = "folder where encrypt wrote encrypted_beats.zip and the .json file of its beats' times"
    option("--times", type=Path, default=Path(), metavar="DIR", help=what)
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    run_and_leave(main, "run the same command again")
