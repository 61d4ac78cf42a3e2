"""The records of the MIT-BIH Arrhythmia Database: downloaded from PhysioNet where missing, and checked (step 0)."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from pathlib import Path

from fhe_mlp.cli import InputError, sha256

DATABASE = "mitdb/1.0.0"  # PhysioNet name and version, of what is downloaded
DOWNLOAD_ATTEMPTS = 3  # tries a file before giving up; finished files are kept
# The records that it holds.
MITDB = set(
    "100 101 102 103 104 105 106 107 108 109 111 112 113 114 115 116 117 118 119 121 122 123 124 200 201 202 203 205 "
    "207 208 209 210 212 213 214 215 217 219 220 221 222 223 228 230 231 232 233 234".split()
)


def download(name: str, folder: Path, expected: str | None) -> None:
    """Fetch one file of DATABASE into `folder` through wfdb; it appears there only whole and with the right SHA-256.

    Finished files are kept, and a part that a killed run left is continued, so that the next run goes on from there.
    Raises InputError when DOWNLOAD_ATTEMPTS were in vain.
    """
    from wfdb.io.download import dl_pn_file

    part = folder / ".part" / name
    part.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(DOWNLOAD_ATTEMPTS):
        try:
            with contextlib.redirect_stdout(None):  # wfdb reports each continued file; the progress bar is enough
                dl_pn_file((name, "", DATABASE, str(part.parent), False, False))
            if expected is None or sha256(part) == expected:
                part.replace(folder / name)
                return
            reason = "its SHA-256 is not the published one"
            part.unlink()
        except OSError as error:  # what wfdb raises on any trouble with the network
            reason = str(error)
            time.sleep(attempt)
    raise InputError(f"{DATABASE}/{name}: download failed ({reason}); run the same command again, it goes on from here")


def read_sums(path: Path) -> dict[str, str]:
    """SHA-256 of each .hea, .dat and .atr that a list of checksums names in its own folder, by file name."""
    lines = [line for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines() if line.strip()]
    sums = [re.fullmatch(r"([0-9a-fA-F]{64})\s+\*?(?:\./)?(\S.*?)\s*", line) for line in lines]  # * of sha256sum -b
    if not sums or not all(sums):
        raise InputError(f"{path}: is truncated or not a valid list of checksums; delete it and run again")
    return {m[2]: m[1].lower() for m in sums if m[2].endswith((".hea", ".dat", ".atr")) and "/" not in m[2]}


def provide_records(folder: Path, may_download: bool) -> list[str]:
    """Sorted paths, without suffix, of the records in `folder`, downloaded where missing and checked where published.

    Only records of DATABASE are downloaded; files missing from another database are reported, and a folder without
    SHA256SUMS.txt is taken as it is. Files whose names start with a dot (macOS companions) are no records.
    """
    from tqdm import tqdm

    sums = folder / "SHA256SUMS.txt"
    if not sums.exists() and not list(folder.glob("[!.]*.hea")):
        if folder.exists() and any(p.name != ".part" for p in folder.iterdir()):
            raise InputError(f"{folder}: holds no WFDB header (.hea); name a folder of records with --records-dir")
        if not may_download:
            raise InputError(f"{folder}: no records here; run without --no-download or name them with --records-dir")
        download(sums.name, folder, None)
    if sums.exists():
        listed = read_sums(sums)
        missing = [name for name in listed if not (folder / name).exists()]
        ours = {Path(name).stem for name in listed} <= MITDB
        wanted = missing if ours else []
        if wanted and not may_download:
            what = f"{len(wanted)} files are missing, {wanted[0]} first"
            raise InputError(f"{folder}: {what}; run without --no-download")
        for name in tqdm(wanted, desc=f"downloading {DATABASE}", unit="file", disable=not wanted):
            download(name, folder, listed[name])
        for name, expected in listed.items():
            if (folder / name).exists() and sha256(folder / name) != expected:
                raise InputError(f"{folder / name}: SHA-256 is not the published one; delete the file and run again")
        if missing and not ours:
            print(f"{folder}: {len(missing)} listed files are missing, {missing[0]} first", file=sys.stderr)
    return sorted(str(p.with_suffix("")) for p in folder.glob("[!.]*.hea"))
