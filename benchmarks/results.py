"""Rows of measurements: one CSV per benchmark, each row with the device, versions and commit of the measurement."""

import csv
import os
import shlex
import subprocess
import sys
from datetime import date
from importlib.metadata import distributions, version
from pathlib import Path

from formats.files import atomic_write
from model import ModelArgs

RESULTS = Path(__file__).parent / "results"


def provenance(device: str) -> dict[str, str]:
    """date, device, torch, triton, commit of a measurement made now. A tree with changes is marked -dirty."""
    # a machine that has the tree without its history can be told the commit
    git = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty", "--exclude", "*"]
    commit = os.environ.get("GIT_COMMIT") or subprocess.run(git, capture_output=True, text=True).stdout.strip()
    triton = next((found.version for found in distributions(name="triton")), "")
    today = date.today().isoformat()
    return {"date": today, "device": device, "torch": version("torch"), "triton": triton, "commit": commit or "unknown"}


def model_columns(config: ModelArgs) -> dict[str, str]:
    """The columns `model`, a name that does not say how the weights are stored, and `quant`, which does."""
    return {"model": config.name.removesuffix(f"-{config.quant}"), "quant": config.quant}


def form(row: dict[str, str]) -> str:
    """How the weights of a row are stored: bfloat16, float16, float32, packed, int8 or int4."""
    return row["dtype"] if row["quant"] == "none" else row["quant"]


def read_rows(name: str) -> list[dict[str, str]]:
    if not (RESULTS / name).exists():
        return []
    with open(RESULTS / name, newline="") as f:
        return list(csv.DictReader(f))


def write_rows(name: str, rows: list[dict], key: str) -> None:
    """Adds rows to results/<name>; its columns are those of the rows, in their order.

    A new row takes the place of an old one with the same values of `key`, names of columns between spaces.
    """
    columns, new = list(rows[0]), {tuple(str(row[k]) for k in key.split()): row for row in rows}
    kept = [row for row in read_rows(name) if tuple(row[k] for k in key.split()) not in new]
    with atomic_write(RESULTS / name) as temporary, open(temporary, "w", newline="") as f:
        writer = csv.DictWriter(f, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *new.values()])


def command(module: str, argv: list[str] | None) -> str:
    """How this run of a benchmark was called; argv None: by the command line."""
    return shlex.join(["python", "-m", module, *map(short, sys.argv[1:] if argv is None else argv)])


def short(argument: str) -> str:
    """A command's argument without the folders of a path, which differ between machines."""
    return Path(argument).name if "/" in argument else argument
