"""Rows of measurements: one CSV a benchmark, each row with the device, versions and commit that it was measured at."""

import csv
import os
import shlex
import subprocess
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from formats.files import atomic_write

RESULTS = Path(__file__).parent / "results"


def provenance(device: str) -> dict[str, str]:
    """date, device, torch, triton, commit of a measurement made now. A tree with changes is marked -dirty."""
    # a machine that has the tree without its history can be told the commit
    if not (commit := os.environ.get("GIT_COMMIT", "")):
        git = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty", "--exclude", "*"]
        found = subprocess.run(git, capture_output=True, text=True)
        commit = found.stdout.strip() if found.returncode == 0 else "unknown"
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = ""
    return {
        "date": date.today().isoformat(),
        "device": device,
        "torch": version("torch"),
        "triton": triton,
        "commit": commit,
    }


def read_rows(name: str) -> list[dict[str, str]]:
    path = RESULTS / name
    if not path.exists():
        return []
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def write_rows(name: str, rows: list[dict], columns: list[str], key: list[str]) -> None:
    """Adds rows to results/<name>; a new row takes the place of an old one with the same values of `key`."""
    new = {tuple(str(row[k]) for k in key): {c: str(row[c]) for c in columns} for row in rows}
    kept = [row for row in read_rows(name) if tuple(row[k] for k in key) not in new]
    with atomic_write(RESULTS / name) as temporary, open(temporary, "w", newline="") as f:
        writer = csv.DictWriter(f, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *new.values()])


def command(module: str) -> str:
    """How this run of a benchmark was called."""
    return shlex.join(["python", "-m", module, *map(short, sys.argv[1:])])


def short(argument: str) -> str:
    """A command's argument without the folders of a path, which are this machine's."""
    return Path(argument).name if "/" in argument else argument
