#!/usr/bin/env bash
# The latency sweep: sparsity 0, 25, 40, 50, 65 % of the configs given, a table, benchmarks/results/decode.csv, a plot.
#   benchmarks/run.sh                        the default model; on a GPU llama-3-8b (random weights) as well
#   benchmarks/run.sh llama-3-8b mistral-7b  these named configs, random weights
#   benchmarks/run.sh --gpus 2 llama-3-70b   over two GPUs
set -euo pipefail
cd "$(dirname "$0")/.."
prefill=() # compiling the prompt's pass takes a CPU longer than the sweep
gpu=$(python -c 'import torch; print(torch.cuda.is_available())')
if [ "$gpu" = True ]; then prefill=(--compile_prefill); fi
if [ "${1:-}" = --gpus ]; then
  torchrun --nproc_per_node "$2" -m benchmarks.decode --random_init "${@:3}"
elif [ $# -gt 0 ]; then
  python -m benchmarks.decode "${prefill[@]}" --random_init "$@"
else
  python -m benchmarks.decode "${prefill[@]}"
  if [ "$gpu" = True ]; then python -m benchmarks.decode "${prefill[@]}" --random_init llama-3-8b; fi
fi
python -m benchmarks.plot
