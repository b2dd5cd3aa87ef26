#!/usr/bin/env bash
# Quality of the default model for every rule: calibrates, makes the cut tables, measures perplexity, draws the plot.
#   benchmarks/quality.sh c4.jsonl wiki.test.raw              # calibration text (or c4: fetched), evaluation text
#   benchmarks/quality.sh c4.jsonl wiki.test.raw --device cpu --num_windows 8       # the rest goes to the measurement
# Statistics and cut tables stay beside the checkpoint; --thresholds best uses them from then on.
set -euo pipefail
[ $# -ge 2 ] || { sed -n 2,5p "$0"; exit 1; }
calibration=$1 data=$2
shift 2
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
device=()
for ((i = 1; i < $#; i++)); do
  if [ "${!i}" = --device ]; then j=$((i + 1)) device=(--device "${!j}"); fi
done
python "$root/calibrate.py" --data "$calibration" --precision float32 "${device[@]}"
python "$root/greedy.py" --data "$calibration" --precision float32 "${device[@]}"
python "$root/refine.py" --data "$calibration" "${device[@]}"
python -m benchmarks.quality --calibration "$calibration" --data "$data" "$@"
python -m benchmarks.plot
