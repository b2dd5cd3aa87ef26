"""What benchmarks/paper.sh needs beside the scripts: a text with errors, an estimate of the time, and the report.

python -m benchmarks.paper typos TEXT FILE        # every 50th letter left out, doubled or replaced
python -m benchmarks.paper report DIR NOTE        # DIR/<table>/<row>@<column>.json, as eval.py and generate.py print
... | python -m benchmarks.paper estimate DIR     # of a checkpoint; lines "tokens of forward passes, result"
"""

import options

if __name__ == "__main__":
    options.run_script("benchmarks.paper")

import random
import sys
import time
from pathlib import Path

import torch

from benchmarks.plot import RULES, grid, ticks
from benchmarks.results import provenance
from cli import placement
from formats.files import read_json, write_output
from formats.text import read_text
from model import Transformer, read_config

START, EFFICIENCY = 12, 0.3  # seconds until a script computes; of a large product's speed, what a forward pass reaches
ORDER = ("dense", "uniform", "greedy", "refined")  # of rows and columns; then sparsities, then names
SCORES = ("acc_norm", "acc", "exact_match,strict-match")  # the metric of a task that counts; else its first one


def with_typos(text: str) -> str:
    draw, letters = random.Random(0), "abcdefghijklmnopqrstuvwxyz"
    wrong = ((draw.random() < 0.02 and c.isalpha(), draw.choice(("", 2 * c, draw.choice(letters))), c) for c in text)
    return "".join(error if is_wrong else c for is_wrong, error, c in wrong)


def estimate(folder: Path, steps: list[str], device: torch.device, dtype: torch.dtype) -> str:
    """On what, and how long the steps take there, rather too long, to a factor of four: by one large product."""
    a = torch.ones(2048, 4096, device=device, dtype=dtype)
    for _ in range(2):  # the first one warms up
        start = time.perf_counter()
        (a @ a.t()).sum().item()
        speed = EFFICIENCY * 2 * 2048**2 * 4096 / (time.perf_counter() - start)
    weights = sum(parameter.numel() for parameter in Transformer(read_config(folder), device="meta").parameters())
    minutes = sum(START + int(step.split()[0]) * 2 * weights / speed for step in steps) / 60
    made = provenance(torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu")
    versions = ", ".join(f"{name} {value}" for name, value in made.items() if value)
    return f"{versions}: {len(steps)} steps, about {minutes:.0f} minutes for {weights / 1e6:.0f} M weights"


# of each table the title, and what a cell shows of a result; see `results_of`
TABLES = {
    "perplexity": ("WikiText-2: perplexity (% of the weights cut), by % asked", "{perplexity:.2f} ({cut:.1f})"),
    "tasks": ("Tasks: score in % (acc_norm, acc or exact match), refined thresholds, by % asked", "{score:.2f}"),
    "robustness": ("Other texts, 50 %: perplexity (% cut)", "{perplexity:.2f} ({cut:.1f})"),
    "generation": ("Own text, 50 %: perplexity under dense; repetition", "{perplexity:.2f}; {repetition:.1%}"),
    "latency": ("Decoding one text: tokens/s (% cut), by % asked", "{tokens_per_sec:.1f} ({cut:.1f})"),
}
PANELS = {"perplexity": "perplexity", "tasks": "score", "latency": "tokens_per_sec"}  # what is drawn of a table


def results_of(folder: Path) -> dict[str, dict[str, dict]]:
    """What was printed by row and column, and of each `cut` and a task's `score`, in %."""
    place = {name: f"{i:9}" for i, name in enumerate(ORDER)}  # numbers by their size, then names
    names = [path.stem.split("@") for path in folder.glob("*@*.json")]
    found = sorted(names, key=lambda pair: [place.get(name, name.rjust(9)) for name in pair])
    rows: dict = {row: {} for row, _ in found}
    for row, column in found:
        result = rows[row][column] = read_json(folder / f"{row}@{column}.json")
        scores = next(iter(result.get("results", {"": {"": 0.0}}).values()))
        score = next((scores[name] for name in SCORES if name in scores), next(iter(scores.values())))
        result |= {"cut": 100 * result["achieved_sparsity"], "score": 100 * score}
    return rows


def draw(path: Path, tables: dict[str, dict]) -> None:
    """A panel for each table that is given."""
    figure, axes = grid(len(tables))
    for axis, (name, rows) in zip(axes, tables.items(), strict=True):
        for row, found in rows.items():
            # the dense model is where every rule begins, and drawn above them
            points = list(found.values()) + list(rows.get("dense", {}).values()) * (row in RULES)
            points = sorted((result["cut"], result[PANELS[name]]) for result in points)
            color = (RULES | {"dense": "black"}).get(row)
            axis.plot(*zip(*points, strict=True), "o-", color=color, label=row, zorder=2 + (row == "dense"))
        axis.legend(fontsize=8)
        axis.set(xlabel="weights cut, %", ylabel=TABLES[name][0].split(" (")[0])
        axis.grid(alpha=0.3)
        if name == "perplexity":
            axis.set_yscale("log")
            ticks(axis, (4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 60, 100, 200, 300, 1000))
        else:
            axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
    figure.savefig(path, dpi=150)


def report(out: Path, note: str) -> str:
    """Writes report.md and, if there is what to draw, report.png; the path of the former. `note`: "MODEL, settings"."""
    tables = {name: results for name in TABLES if (results := results_of(out / name))}
    text = [f"# {Path(note.split(',')[0]).name}", f"{note}.", (out / "runs").read_text().strip()]
    if missing := (out / "missing").read_text().split()[1::2]:
        text.append(f"**Missing**, because the step failed: {', '.join(missing)}")

    for name, found in tables.items():
        title, cell = TABLES[name]
        columns = list(dict.fromkeys(column for cells in found.values() for column in cells))
        lines = [[name, *columns], ["---"] * (1 + len(columns))]
        lines += [[row, *(cell.format(**r[c]) if c in r else "" for c in columns)] for row, r in found.items()]
        text += [f"## {title}", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    if drawn := {name: tables[name] for name in PANELS if name in tables}:
        draw(out / "report.png", drawn)
        text.append(f"![{', '.join(drawn)}](report.png)")
    text.append(f"## Commands\n\n```\n{(out / 'commands.sh').read_text()}```\n")
    write_output(out / "report.md", "\n\n".join(text).encode())
    return str(out / "report.md")


def main(argv: list[str] | None = None) -> None:
    o = options.paper(argv)
    if o.action == "typos":
        write_output(o.paths[1], with_typos("".join(read_text(o.paths[0]))).encode())
    elif o.action == "estimate":
        print(estimate(Path(o.paths[0]), sys.stdin.readlines(), *placement(o)))
    else:
        print(report(Path(o.paths[0]), o.paths[1]))
