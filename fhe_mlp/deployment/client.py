"""The hospital's side: encrypts heartbeats for a server that cannot read them, and decrypts its answers.

    python client.py keys                               once: secret keys into keys/, and evaluation_keys.zip
    python client.py encrypt beats.csv                  -> encrypted_beats.zip
    python client.py decrypt encrypted_answers.zip      prints output, probability and decision of each beat

The three .zip files are all that travels. keys/ holds the secret key and stays here. client.zip, model.json and
boxes.py lie beside this file.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import re
import secrets
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from boxes import Refusal, check_output, first_line, read_box, run, same, sha256, without_log, write_box

HERE = Path(__file__).resolve().parent
CLIENT, MODEL = HERE / "client.zip", HERE / "model.json"
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)  # float() would also take 1_000, nan and inf
GROUPED = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+", re.ASCII)  # 1,234: a thousand or a decimal, nobody can say
FAR_SD = 10.0  # standard deviations from the training mean; a column with most of its values beyond: another unit


def read_model() -> dict[str, Any]:
    """model.json of the export. Raises Refusal."""
    try:
        return json.loads(MODEL.read_text())
    except (OSError, ValueError) as error:
        raise Refusal(f"{MODEL}: cannot be used ({first_line(error)}); restore it from the export") from None


def load_client(keys: Path) -> Any:
    """Concrete ML's client, which reads the keys in the folder `keys`, or makes them there. Raises Refusal."""
    from concrete.ml.deployment import FHEModelClient  # takes seconds, so only for input that is in order

    try:
        client = FHEModelClient(str(HERE), str(keys))
        client.generate_private_and_evaluation_keys()
    except (OSError, ValueError, KeyError, RuntimeError, AssertionError, zipfile.BadZipFile) as error:
        raise Refusal(f"{CLIENT}: cannot be used here ({first_line(error)})") from None
    return client


def make_keys(keys: Path, target: Path) -> None:
    """Make secret keys, readable by their owner only, and the evaluation keys for the server; both or nothing."""
    if keys.exists():
        raise Refusal(f"{keys}: is there already; what was encrypted with it can only be decrypted with it")
    model = read_model()["model"]
    os.umask(0o077)
    keys.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=keys.parent, prefix=f".{keys.name}.") as temporary:
        whole = Path(temporary) / "keys"
        whole.mkdir()
        client, name = load_client(whole), secrets.token_hex(8)
        files = {str(path.relative_to(whole)): sha256(path) for path in whole.rglob("*") if path.is_file()}
        (whole / "about.json").write_text(json.dumps({"model": model, "key": name, "files": files}))
        write_box(target, "evaluation keys", model, name, [client.get_serialized_evaluation_keys()])
        whole.rename(keys)


def check_keys(keys: Path, model: str) -> str:
    """The name of the keys in the folder `keys`, which is no secret.

    Raises Refusal where there are no keys, a file of them is damaged (Concrete ML would replace it by a new key), or
    they are for another model.
    """
    try:
        about = json.loads((keys / "about.json").read_text())
        name, given, files = about["key"], about["model"], about["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise Refusal(f"{keys}: no complete keys here; make them with: python client.py keys") from None
    same("model", keys, given, model, "name its own keys with --keys")
    for file, digest in files:
        if not (keys / file).is_file() or sha256(keys / file) != digest:
            raise Refusal(f"{keys / file}: is missing or damaged; restore the folder from a copy, or make new keys")
    return name


def decode(content: bytes) -> str:
    """Text of UTF-8 or UTF-16 with a byte order mark, else of UTF-8, else of Latin-1, which fits any bytes.

    Whatever the encoding, numbers and separators are ASCII. Raises UnicodeDecodeError for damaged UTF-16.
    """
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return content.decode("utf-16")
    content = content.removeprefix(b"\xef\xbb\xbf")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def read_table(path: Path, text: str, separator: str) -> list[tuple[int, list[str]]]:
    """Line number and cells of each row but of blank lines and of rows without content at the end. Raises Refusal."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    try:
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    except csv.Error as error:
        raise Refusal(f"{path}, line {reader.line_num}: {error}; mend its quotation marks") from None
    while rows and not any(rows[-1][1]):
        rows.pop()
    return rows


def read_beats(path: Path, features: Sequence[str]) -> np.ndarray:
    """Raw features (n, len(features)) of a .csv file whose first row names its columns, in any order.

    Commas, semicolons or tabs between columns; decimal points, or decimal commas where no value has a point and some
    value cannot be a thousand. Columns of other names are not looked at. All rows may end in one separator more than
    the first one. Raises Refusal, with line and column, for whatever could be meant in two ways.
    """
    try:
        text = decode(path.read_bytes())
    except UnicodeDecodeError as error:
        raise Refusal(f"{path}: is truncated or damaged ({error}); save it as .csv in UTF-8") from None
    if "\0" in text:
        raise Refusal(f"{path}: is not text; save it as .csv in UTF-8")
    first = next((line for line in io.StringIO(text, newline="") if line.strip()), "")
    separator = max(",;\t", key=lambda sign: sum(cell.strip(' "\r\n') in features for cell in first.split(sign)))
    (_, names), *rows = read_table(path, text, separator) or [(1, [])]
    for feature in features:
        if (count := names.count(feature)) != 1:
            raise Refusal(f"{path}: {count} columns are called {feature!r}; the first line needs each feature once")
    if not rows:
        raise Refusal(f"{path}: holds no beats, only names")
    if names[-1] in features and all(len(row) == len(names) + 1 and not row[-1] for _, row in rows):
        names.append("")  # had the rows a further cell in front instead, the last feature would be missing in all
    for line, row in rows:
        if len(row) != len(names):
            remedy = "give each value its own column, with a decimal point and no row names"
            raise Refusal(f"{path}, line {line}: {len(row)} values for {len(names)} columns; {remedy}")
    order = [names.index(feature) for feature in features]
    cells = [[row[column] for column in order] for _, row in rows]
    with_commas = [cell for row in cells for cell in row if "," in cell]
    decimal_commas = not all(map(GROUPED.fullmatch, with_commas)) and not any("." in c for row in cells for c in row)
    X = np.empty((len(rows), len(features)))
    for k, (line, _) in enumerate(rows):
        for j, cell in enumerate(cells[k]):
            number = cell.replace(",", ".") if decimal_commas else cell
            X[k, j] = float(number) if NUMBER.fullmatch(number) else np.nan
            if not np.isfinite(X[k, j]):
                what = f"{cell[:40]!r} is not a number written with a decimal point" if cell else "there is no value"
                raise Refusal(f"{path}, line {line}, column {features[j]}: {what}")
    return X


def scale(X: np.ndarray, model: dict[str, Any]) -> np.ndarray:
    """Raw features (n, features) as the network takes them: standardized, clipped, rounded to float32 as in training.

    Warns on stderr of a column that is in another unit than the training data.
    """
    scaler = model["scaler"]
    with np.errstate(over="ignore"):  # of numbers like 1e308, which are clipped
        z = (X - np.array(scaler["mean"])) / np.array(scaler["sd"])
    for feature, far in zip(model["features"], (np.abs(z) > FAR_SD).sum(axis=0), strict=True):
        if far > len(X) / 2:
            what = f"{far} of {len(X)} values are over {FAR_SD:g} standard deviations from the training data's mean"
            print(f"warning: {feature['name']}: {what}; its unit is {feature['unit']}", file=sys.stderr)
    return np.clip(z, -scaler["clip_sd"], scaler["clip_sd"]).astype(np.float32).astype(np.float64)


def encrypt(keys: Path, beats: Path, target: Path) -> None:
    """Scale, quantize and encrypt each beat of a .csv file. Raises Refusal."""
    model = read_model()
    X = scale(read_beats(beats, [feature["name"] for feature in model["features"]]), model)
    name = check_keys(keys, model["model"])
    client = load_client(keys)
    write_box(target, "encrypted beats", model["model"], name, (client.quantize_encrypt_serialize(x[None]) for x in X))


def decrypt(keys: Path, answers: Path) -> None:
    """Print output, probability and decision (1: abnormal) of each beat as .csv, in their order. Raises Refusal."""
    model = read_model()
    header, payloads = read_box(answers, "encrypted answers")
    same("model", answers, header["model"], model["model"], "server.zip and client.zip must come from one export")
    name = check_keys(keys, model["model"])
    same("key", answers, header["key"], name, "it can only be decrypted with the keys it was encrypted with")
    client, found = load_client(keys), []
    for payload in payloads:
        try:
            with without_log():
                output = float(client.deserialize_decrypt_dequantize(payload).ravel()[0])
        except (RuntimeError, ValueError, AssertionError) as error:
            raise Refusal(f"{answers}: holds no answer ({first_line(error)}); have it sent again") from None
        probability = output if model["output"] == "probability" else 1 / (1 + np.exp(-output))
        found.append((output, probability, int(output > model["threshold"])))
    csv.writer(sys.stdout, lineterminator="\n").writerows([("output", "probability", "abnormal"), *found])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command, reads, writes, what in (
        ("keys", None, "evaluation_keys.zip", "once: make secret keys, and the evaluation keys for the server"),
        ("encrypt", "beats", "encrypted_beats.zip", "encrypt the beats of a .csv file of raw features"),
        ("decrypt", "answers", None, "print output, probability and decision (1: abnormal) of each beat as .csv"),
    ):
        sub = commands.add_parser(command, help=what, description=what)
        sub.add_argument("--keys", type=Path, default=Path("keys"), help="folder of the secret keys (default: keys)")
        if reads:
            sub.add_argument("file", metavar=reads, type=Path)
        if writes:
            sub.add_argument("--output", type=Path, default=Path(writes), help=f"file to write (default: {writes})")
    args = parser.parse_args()
    if args.command == "decrypt":
        decrypt(args.keys, args.file)
        return
    check_output(args.output, [CLIENT, MODEL, args.keys, *([args.file] if "file" in args else [])])
    if args.command == "keys":
        make_keys(args.keys, args.output)
    else:
        encrypt(args.keys, args.file, args.output)


if __name__ == "__main__":
    run(main)
