"""The latency sweep: tokens/s of single-batch decoding over models and sparsities, beside our own dense model.

python -m benchmarks.decode                                          # the default model
python -m benchmarks.decode --random_init llama-3-8b llama-3-8b-int8 # latency of a shape, random weights
python -m benchmarks.decode --random_init llama-3-8b --prompt 4096   # at a longer context
python -m benchmarks.decode --random_init llama-3-8b --batch_size 4  # rows of different prompts at once
torchrun --nproc_per_node 2 -m benchmarks.decode --random_init llama-3-70b  # over two GPUs

Every row is what `generate.py` prints for the command in it: sampling included, prefill included in tokens_per_sec and
not in ms_per_token; of a batch tokens_per_sec counts all rows, and ttft_ms waits for each. All other flags go to
generate.py; thresholds are uniform unless they say otherwise. Rows go to benchmarks/results/decode.csv;
`python -m benchmarks.plot` draws them.
"""

import options

if __name__ == "__main__":
    options.run_script("benchmarks.decode")

import gc
import math
import shlex

import torch

import tp
from benchmarks.results import form, model_columns, provenance, short, write_rows
from cli import resolve_device
from decoder import why_unfused
from formats.default_model import resolve_checkpoint
from generate import main as generate
from model import ModelArgs, read_config

KEY = "device model quant weights dtype batch gpus draft step sparsity prompt_tokens new_tokens"
# the numbers of generate.py's JSON that a row keeps, as it writes them
FORMATS = {"achieved_sparsity": ".4f", "prompt_tokens": "", "new_tokens": "", "tokens_per_sec": ".2f"}
FORMATS |= {"ms_per_token": ".4f", "ttft_ms": ".2f", "bytes_per_token": "", "bandwidth_gbps": ".1f"}


def measure(flags: list[str], config: ModelArgs) -> dict:
    """One row: the run of generate.py with these flags, compiled."""
    flags = ["--compile", "--no-compare_dense", "--thresholds", "uniform", *flags]
    o, result = options.generate(flags), generate(flags)
    unfused = o.unfused or why_unfused(config, resolve_device(o.device), result["batch"], o.top_k)
    row = provenance(result["device"]) | model_columns(config)
    row |= {"weights": "random" if "--random_init" in flags else "trained", "dtype": result["dtype"]}
    row |= {"batch": result["batch"], "gpus": result["ranks"], "draft": result.get("draft", "none")}
    row |= {"step": "compiled" if unfused else "fused", "sparsity": result["sparsity"]}
    numbers = {name: math.nan if result[name] is None else result[name] for name in FORMATS}
    row |= {name: format(value, FORMATS[name]) for name, value in numbers.items()}
    start = f"torchrun --nproc_per_node {result['ranks']}" if result["ranks"] > 1 else "python"
    return row | {"command": shlex.join([*start.split(), "generate.py", *map(short, flags)])}


def print_table(rows: list[dict]) -> None:
    first = rows[0]
    dense = next((float(row["tokens_per_sec"]) for row in rows if row["sparsity"] == 0), None)
    print(f"\n{first['model']}, {first['weights']} weights, {form(first)}, {first['device']}")
    print(f"{'sparsity':>9}{'achieved':>10}{'tokens/s':>10}{'speed-up':>10}{'ms/token':>10}{'GB/s':>8}")
    for row in rows:
        speedup = f"{float(row['tokens_per_sec']) / dense:.2f}x" if dense else ""
        counted = f"{row['sparsity']:>9.0%}{float(row['achieved_sparsity']):>10.1%}"
        speed = f"{float(row['tokens_per_sec']):>10.1f}{speedup:>10}{float(row['ms_per_token']):>10.3f}"
        print(f"{counted}{speed}{float(row['bandwidth_gbps']):>8.0f}")


def main(argv: list[str] | None = None) -> None:
    """Measures, prints a table and writes the rows, model by model. Raises ValueError as generate.py does."""
    o, flags = options.decode(argv)

    # the models, each with the flags that load it
    models = [(["--random_init", name], ModelArgs.from_name(name)) for name in o.random_init]
    models += [(["--checkpoint_path", path], read_config(resolve_checkpoint(path))) for path in o.checkpoint_path]
    models = models or [([], read_config(resolve_checkpoint(None)))]

    tables = []
    for source, config in models:
        rows = []
        for sparsity in o.sparsities:
            rows.append(measure(["--sparsity", str(sparsity), *source, *flags], config))
            gc.collect()  # the next model takes this one's place on the GPU
            torch.cuda.empty_cache()
        if tp.rank() == 0:
            write_rows("decode.csv", rows, KEY)
        tables.append(rows)

    # all tables last: generate.py prints much between them
    for rows in tables:
        print_table(rows)
