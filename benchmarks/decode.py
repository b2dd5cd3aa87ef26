"""The latency sweep: tokens/s of single-batch decoding over models and sparsities, beside our own dense model.

python -m benchmarks.decode                                          # the default model
python -m benchmarks.decode --random_init llama-3-8b llama-3-8b-int8 # latency of a shape, random weights
python -m benchmarks.decode --random_init llama-3-8b --prompt 4096   # at a longer context

Every row is what `generate.py` prints for the command in it: sampling included, prefill included in tokens_per_sec and
not in ms_per_token. Rows go to benchmarks/results/decode.csv; `python -m benchmarks.plot` draws them.
"""

import argparse
import gc
import math
import shlex

import torch

from benchmarks.results import form, model_columns, provenance, short, write_rows
from cli import add_device_arguments, command_line
from formats.default_model import resolve_checkpoint
from generate import main as generate
from model import ModelArgs, read_config

SPARSITIES = [0.0, 0.25, 0.4, 0.5, 0.65]
KEY = "device model quant weights dtype batch gpus draft sparsity prompt_tokens new_tokens"


def measure(options: dict, sparsity: float) -> dict:
    """One row: a run of generate.py with these options, compiled."""
    name, path = options.get("random_init"), options.get("checkpoint_path")
    config = ModelArgs.from_name(name) if name else read_config(resolve_checkpoint(path))
    result = generate(**options, sparsity=sparsity, compile=True)

    # the command that makes this row again, without what is left at its default
    flags = [f"--sparsity {sparsity}"]
    for flag, value in options.items():
        if value:
            text = short(str(value)) if flag == "checkpoint_path" else str(value)
            flags.append(f"--{flag}" if value is True else f"--{flag} {shlex.quote(text)}")

    columns = {
        "weights": "random" if name else "trained",
        "dtype": result["dtype"],
        "batch": 1,
        "gpus": 1,
        "draft": result.get("draft", "none"),
        "sparsity": sparsity,
        "achieved_sparsity": f"{result['achieved_sparsity']:.4f}",
        "prompt_tokens": result["prompt_tokens"],
        "new_tokens": result["new_tokens"],
        "tokens_per_sec": f"{result['tokens_per_sec']:.2f}",
        "ms_per_token": f"{result['ms_per_token'] or math.nan:.4f}",
        "ttft_ms": result.get("ttft_ms", ""),
        "bytes_per_token": result["bytes_per_token"],
        "bandwidth_gbps": f"{result['bandwidth_gbps'] or math.nan:.1f}",
        "command": " ".join(["python generate.py --compile", *flags]),
    }
    return provenance(result["device"]) | model_columns(config) | columns


def print_table(rows: list[dict]) -> None:
    first = rows[0]
    dense = next((float(row["tokens_per_sec"]) for row in rows if row["sparsity"] == 0), None)
    print(f"\n{first['model']}, {first['weights']} weights, {form(first)}, {first['device']}")
    print(f"{'sparsity':>9}{'achieved':>10}{'tokens/s':>10}{'speed-up':>10}{'ms/token':>10}{'GB/s':>8}")
    for row in rows:
        speedup = f"{float(row['tokens_per_sec']) / dense:.2f}x" if dense else ""
        print(
            f"{row['sparsity']:>9.0%}{float(row['achieved_sparsity']):>10.1%}{float(row['tokens_per_sec']):>10.1f}"
            f"{speedup:>10}{float(row['ms_per_token']):>10.3f}{float(row['bandwidth_gbps']):>8.0f}"
        )


def main(random_init: list[str], checkpoint_path: list[str], sparsities: list[float], **options) -> None:
    """Measures, prints a table and writes the rows, model by model. Raises ValueError as generate.py does.

    `options` are further arguments of generate.py.
    """
    sources = [{"random_init": name} for name in random_init] + [{"checkpoint_path": path} for path in checkpoint_path]
    tables = []
    for source in sources or [{}]:
        rows = []
        for sparsity in sparsities:
            rows.append(measure(source | options, sparsity))
            gc.collect()  # the next model takes this one's place on the GPU
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        write_rows("decode.csv", rows, KEY)
        tables.append(rows)

    # all tables last: generate.py prints much between them
    for rows in tables:
        print_table(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random_init", nargs="+", default=[], metavar="NAME", help="named configs, random weights")
    parser.add_argument("--checkpoint_path", nargs="+", default=[], metavar="DIR", help="default: the default model")
    parser.add_argument("--sparsities", type=float, nargs="+", default=SPARSITIES)
    parser.add_argument("--prompt", help="text, or a number of tokens")
    parser.add_argument("--compile_prefill", action="store_true", help="torch.compile the prompt's pass too")
    parser.add_argument("--thresholds", default="uniform", help="as generate.py's; rows of another replace each other")
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument("--num_samples", type=int, default=5)
    add_device_arguments(parser)
    command_line(main, parser.parse_args())
