#!/usr/bin/env bash
# From a model to the paper's tables (arXiv 2408.14690) by one command: convert, calibrate, greedy and refined thresholds,
# perplexity by rule and on other texts, what the sparse model writes, the six tasks, latency; then report.md with plots.
#   benchmarks/paper.sh                                     the default model
#   benchmarks/paper.sh ORG/MODEL                           of the Hugging Face hub; or a checkpoint's folder
#   ESTIMATE=1 benchmarks/paper.sh ORG/MODEL                only how long it would take
# A step whose result is there is skipped, so a run that was stopped goes on. A step that fails is reported, and the rest
# is done. What is fetched: the model, C4 (one shard), WikiText-2, and the tasks' data, unless files are named here (paths
# from the repository's root):
#   CALIBRATION=c4.jsonl WIKITEXT=wiki.test.raw             text files
#   TEXTS="c4=held_out.jsonl code=code.txt"                 further texts of the robustness table (none by default)
#   TASKS="piqa=benchmarks/tasks/multiple_choice.yaml:piqa.jsonl mmlu"  lm-eval's names, or NAME=TASK.yaml:DATA[:FEWSHOT]
#   DEVICE=cpu PRECISION=bfloat16 OUT=paper/MODEL           where, in which dtype, and where the results go
# Smaller, which the report says:
#   NUM_WINDOWS=128 PROMPTS=200 LIMIT= NEW_TOKENS=200       of perplexity, generation, tasks (documents), latency
#   NUM_TOKENS= UPDATES=32                                  of calibrate and greedy, of refine
#   LEVELS="25 40 50 65" LONG=8192                          % cut; tokens of the long windows (0: none)
set -euo pipefail
cd "$(dirname "$0")/.."
model=${1:-}
CALIBRATION=${CALIBRATION:-c4} PRECISION=${PRECISION:-bfloat16} NUM_WINDOWS=${NUM_WINDOWS:-128} PROMPTS=${PROMPTS:-200}
LEVELS=${LEVELS:-25 40 50 65} UPDATES=${UPDATES:-32} NEW_TOKENS=${NEW_TOKENS:-200} LONG=${LONG:-8192}
LIMIT=${LIMIT:-} NUM_TOKENS=${NUM_TOKENS:-}
TASKS=${TASKS-mmlu arc_challenge hellaswag gsm8k piqa winogrande} TEXTS=${TEXTS:-}
rules="uniform greedy refined"

# the checkpoint's folder, a flag for each choice, the folder of the results
if [ -z "$model" ]; then
  folder=$(python -c 'from formats.default_model import resolve_checkpoint; print(resolve_checkpoint(None))')
elif [ -e "$model" ]; then folder=$model; else folder=checkpoints/$model; fi
OUT=${OUT:-paper/$(basename "$folder")}
mkdir -p "$OUT"/{perplexity,robustness,generation,tasks,latency}
run=(--precision "$PRECISION" ${DEVICE:+--device "$DEVICE"})
from=(--checkpoint_path "$folder" "${run[@]}")
text=(--data $CALIBRATION)
few=(${NUM_TOKENS:+--num_tokens "$NUM_TOKENS"})
limit=(${LIMIT:+--limit "$LIMIT"})
windows=(--num_windows "$NUM_WINDOWS")
settings="$folder, $PRECISION, windows $NUM_WINDOWS, prompts $PROMPTS, documents ${LIMIT:-all}, new tokens $NEW_TOKENS, \
calibration text $CALIBRATION, tokens of it ${NUM_TOKENS:-as by default}, updates $UPDATES"
if [ -e "$OUT/settings" ] && [ "$(cat "$OUT/settings")" != "$settings" ]; then
  echo "paper.sh: $OUT has results of other settings ($(cat "$OUT/settings")), now $settings: give another OUT" >&2
  exit 1
fi
echo "$settings" > "$OUT/settings"

# step COST RESULT COMMAND...: runs it unless the result is there; a result in OUT is the last line of its output.
# COST: tokens that a forward pass would take as long for. With mode=list it only says what is missing.
step() {
  local cost=$1 result=$2
  shift 2
  echo "python $*" >> "$OUT/commands.new"
  [ ! -e "$result" ] || return 0
  if [ "$mode" = list ]; then echo "$cost $result"; return; fi
  echo "== python $*" >&2
  if [[ $result != "$OUT"/* ]]; then python "$@" || echo "failed: $result" >&2; return 0; fi
  python "$@" > "$result.output" || { echo "failed: $result" >&2; return 0; }
  tail -n 1 "$result.output" > "$result.new"
  mv "$result.new" "$result"
  rm "$result.output"
}

# cut RULE LEVEL: the flags of a run at LEVEL % of the weights
cut() { [ "$2" = 0 ] || echo --sparsity "0.$2" --thresholds "$1"; }

plan() {
  : > "$OUT/commands.new"
  # thresholds; the default model's refined ones come with the repository
  if [ "$folder" = "checkpoints/$model" ]; then
    step 0 "$folder/config.json" convert_hf_checkpoint.py --repo_id "$model" --output_dir "$folder"
  fi
  step "${NUM_TOKENS:-20480}" "$folder/calibration.safetensors" calibrate.py "${from[@]}" "${text[@]}" "${few[@]}"
  step $((${NUM_TOKENS:-4096} * 200)) "$folder/thresholds_greedy.safetensors" greedy.py "${from[@]}" "${text[@]}" "${few[@]}"
  [ -z "$model" ] || step $((UPDATES * 5 * 16384 * 6)) "$folder/thresholds_refined.safetensors" \
    refine.py "${from[@]}" "${text[@]}" --updates "$UPDATES"

  # perplexity by rule
  local context=$(sed -n 's/.*"max_position_embeddings": *\([0-9]*\).*/\1/p' "$folder/config.json" 2> /dev/null)
  local wikitext=(eval.py "${from[@]}" --json --tasks wikitext --data "$WIKITEXT") cost=$((NUM_WINDOWS * 2560)) rule level
  step $cost "$OUT/perplexity/dense@0.json" "${wikitext[@]}" "${windows[@]}"
  for rule in $rules; do for level in $LEVELS; do
    step $cost "$OUT/perplexity/$rule@$level.json" "${wikitext[@]}" "${windows[@]}" $(cut $rule $level)
  done; done

  # other texts, and the text that it writes, at 50 %
  for rule in dense $rules; do
    level=$([ $rule = dense ] && echo 0 || echo 50)
    for pair in $TEXTS typos="$OUT/typos.txt"; do
      step $cost "$OUT/robustness/${pair%%=*}@$rule.json" \
        eval.py "${from[@]}" --json --data "${pair#*=}" "${windows[@]}" $(cut $rule $level)
    done
    if [ "$LONG" -gt 0 ] && [ "$LONG" -le "${context:-$LONG}" ]; then
      local long=(--num_windows $(((NUM_WINDOWS + 3) / 4)))
      step $((cost * LONG / 10240)) "$OUT/robustness/first-512-of-$LONG@$rule.json" \
        "${wikitext[@]}" --context 1 --window 511 "${long[@]}" $(cut $rule $level)
      step $((cost * LONG / 10240)) "$OUT/robustness/last-512-of-$LONG@$rule.json" \
        "${wikitext[@]}" --context $((LONG - 512)) "${long[@]}" $(cut $rule $level)
    fi
    step $((PROMPTS * 400)) "$OUT/generation/own-text@$rule.json" eval.py "${from[@]}" --json --tasks generation \
      --data "$WIKITEXT" --num_windows "$PROMPTS" $(cut $rule $level)
  done

  # the tasks; latency
  local task name each documents
  for level in 0 $LEVELS; do for task in $TASKS; do
    name=${task%%=*}
    case $name in # tokens of a document, all of its choices, and documents
      mmlu) each=700 documents=$((57 * ${LIMIT:-246})) ;;
      hellaswag) each=3600 documents=${LIMIT:-10042} ;;
      arc*) each=4000 documents=${LIMIT:-1172} ;;
      gsm8k) each=3000 documents=${LIMIT:-1319} ;;
      winogrande) each=300 documents=${LIMIT:-1267} ;;
      *) each=200 documents=${LIMIT:-1838} ;;
    esac
    IFS=: read -r yaml data shots <<< "${task#*=}"
    step $((each * documents)) "$OUT/tasks/$name@$level.json" eval.py "${from[@]}" --json --tasks "$yaml" \
      ${data:+--data "$data"} ${shots:+--num_fewshot "$shots"} "${limit[@]}" $(cut refined $level)
  done; done
  for level in 0 $LEVELS; do
    step $((NEW_TOKENS * 500)) "$OUT/latency/refined@$level.json" generate.py "${from[@]}" --json --compile \
      --no-compare_dense --max_new_tokens "$NEW_TOKENS" $(cut refined $level)
  done
  mv "$OUT/commands.new" "$OUT/commands.sh"
}

# WikiText-2's test split, and the same with typing errors
WIKITEXT=${WIKITEXT:-$OUT/wiki.test.raw}
[ -e "$WIKITEXT" ] || python -c "from datasets import load_dataset
text = load_dataset('Salesforce/wikitext', 'wikitext-2-raw-v1', split='test')['text']
open('$WIKITEXT', 'w').write(''.join(text))" || { echo "cannot fetch WikiText-2: WIKITEXT=wiki.test.raw names its file"; exit 1; }
[ -e "$OUT/typos.txt" ] || python -m benchmarks.paper typos "$WIKITEXT" "$OUT/typos.txt"

# how long it takes, without the download
described=$folder
[ -e "$folder/config.json" ] || described=$(dirname "$(python -c "from huggingface_hub import hf_hub_download
print(hf_hub_download('$model', 'config.json'))")")
mode=list plan | python -m benchmarks.paper estimate "$described" "${run[@]}" | tee -a "$OUT/runs"
[ -z "${ESTIMATE:-}" ] || exit 0
echo >> "$OUT/runs"
mode=run plan
mode=list plan > "$OUT/missing"
python -m benchmarks.paper report "$OUT" "$settings"
