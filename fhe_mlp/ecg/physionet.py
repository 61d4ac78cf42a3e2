"""The records of the MIT-BIH Arrhythmia Database: downloaded from PhysioNet where missing, and checked (step 0)."""

from __future__ import annotations

import re
import sys
import tempfile
import time
from pathlib import Path

from fhe_mlp.cli import InputError, sha256

DATABASE = "mitdb/1.0.0"  # PhysioNet name and version, of what is downloaded
HEADERS = "[!.]*.[hH][eE][aA]"  # pattern of their names; what starts with a dot is a companion that macOS writes
DOWNLOAD_ATTEMPTS = 3  # tries a file before giving up; finished files are kept
# Inter-patient split of de Chazal, O'Dwyer & Reilly, IEEE Trans. Biomed. Eng. 51(7):1196-1206, 2004.
DS1 = "101 106 108 109 112 114 115 116 118 119 122 124 201 203 205 207 208 209 215 220 223 230".split()
DS2 = "100 103 105 111 113 117 121 123 200 202 210 212 213 214 219 221 222 228 231 232 233 234".split()
MITDB = {*DS1, *DS2, "102", "104", "107", "217"}  # all records; the four of paced beats are in neither part


def download(name: str, folder: Path, expected: str | None) -> None:
    """Fetch one file of DATABASE into `folder` through wfdb; it appears there only whole and with the right SHA-256.

    Raises InputError when DOWNLOAD_ATTEMPTS were in vain.
    """
    from wfdb.io.download import dl_pn_file

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as temporary:
        for attempt in range(DOWNLOAD_ATTEMPTS):
            try:
                dl_pn_file((name, "", DATABASE, temporary, False, True))
                if expected in (None, sha256(Path(temporary, name))):
                    Path(temporary, name).replace(folder / name)
                    return
                reason = "its SHA-256 is not the published one"
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
    SHA256SUMS.txt is taken as it is.
    """
    from tqdm import tqdm

    sums = folder / "SHA256SUMS.txt"
    if not sums.exists() and not list(folder.glob(HEADERS)):
        if list(folder.glob("[!.]*")):
            raise InputError(f"{folder}: holds no WFDB header (.hea); name a folder of records with --records-dir")
        if not may_download:
            raise InputError(f"{folder}: no records here; run without --no-download or name them with --records-dir")
        download(sums.name, folder, None)
    listed = read_sums(sums) if sums.exists() else {}
    missing = [name for name in listed if not (folder / name).exists()]
    if missing and not {Path(name).stem for name in listed} <= MITDB:
        print(f"{folder}: {len(missing)} listed files are missing, {missing[0]} first", file=sys.stderr)
    elif missing and not may_download:
        raise InputError(f"{folder}: {len(missing)} files are missing, {missing[0]} first; run without --no-download")
    else:
        for name in tqdm(missing, desc=f"downloading {DATABASE}", unit="file", disable=not missing):
            download(name, folder, listed[name])
    for name, expected in listed.items():
        if (folder / name).exists() and sha256(folder / name) != expected:
            raise InputError(f"{folder / name}: SHA-256 is not the published one; move the file away and run again")
    return sorted(str(p.with_suffix("")) for p in folder.glob(HEADERS))
