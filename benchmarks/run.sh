#!/usr/bin/env bash
# The latency sweep: sparsity 0, 25, 40, 50, 65 % of the configs given, a table, benchmarks/results/decode.csv, a plot.
#   benchmarks/run.sh                        the default model; on a GPU llama-3-8b (random weights) as well
#   benchmarks/run.sh llama-3-8b mistral-7b  these named configs, random weights
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -gt 0 ]; then
  python -m benchmarks.decode --random_init "$@"
else
  python -m benchmarks.decode
  if python -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then
    python -m benchmarks.decode --random_init llama-3-8b
  fi
fi
python -m benchmarks.plot
