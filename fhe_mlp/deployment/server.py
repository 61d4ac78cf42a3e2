"""The server's side: classifies encrypted heartbeats and cannot read them, nor the answers.

    python server.py encrypted_beats.zip evaluation_keys.zip      -> encrypted_answers.zip

Both files come from the hospital's client.py; the answers go back to it. server.zip and boxes.py lie beside this file.
"""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path

from boxes import Refusal, check_output, first_line, read_box, run, same, sha256, without_log, write_box

SERVER = Path(__file__).resolve().with_name("server.zip")


def classify(beats: Path, evaluation_keys: Path, target: Path) -> None:
    """Run the network on each encrypted beat and write the encrypted answers, in the same order. Raises Refusal."""
    header, payloads = read_box(beats, "encrypted beats")
    keys_header, (serialized, *_) = read_box(evaluation_keys, "evaluation keys")
    model = sha256(SERVER)
    for path, given in ((beats, header), (evaluation_keys, keys_header)):
        same("model", path, given["model"], model, "server.zip and client.zip must come from one export")
    remedy = "beats and evaluation keys must come from the same keys"
    same("key", evaluation_keys, keys_header["key"], header["key"], remedy)

    from concrete.fhe import EvaluationKeys  # takes seconds, so only for files that fit
    from concrete.ml.deployment import FHEModelServer

    try:
        server = FHEModelServer(str(SERVER.parent))
    except (OSError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile) as error:
        raise Refusal(f"{SERVER}: cannot be used here ({first_line(error)})") from None
    try:
        with without_log():
            keys = EvaluationKeys.deserialize(serialized)  # once; FHEModelServer.run would do it for every beat
            write_box(target, "encrypted answers", model, header["key"], (server.run(beat, keys) for beat in payloads))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise Refusal(f"{beats}, {evaluation_keys}: cannot be computed with ({first_line(error)})") from None


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("beats", type=Path, help="encrypted_beats.zip as client.py encrypt wrote it")
    parser.add_argument("evaluation_keys", type=Path, help="evaluation_keys.zip as client.py keys wrote it")
    output = Path("encrypted_answers.zip")
    parser.add_argument("--output", type=Path, default=output, help=f"file to write (default: {output})")
    args = parser.parse_args()
    check_output(args.output, [args.beats, args.evaluation_keys, SERVER])
    classify(args.beats, args.evaluation_keys, args.output)


if __name__ == "__main__":
    run(main)
