#!/usr/bin/env bash
# RET-CLIP from a CSV to its numbers in one call: TSV and JSONL, LMDB, training, evaluation. ./run_retclip.sh help
set -euo pipefail

# ---- change these here, or set them in the environment
TRAIN_CSV="${TRAIN_CSV:-}" VAL_CSV="${VAL_CSV:-}" TEST_CSV="${TEST_CSV:-}"
DATASET="${DATASET:-}" IMAGE_DIR="${IMAGE_DIR:-}"
VISION_MODEL="${VISION_MODEL:-ViT-B-16}"
TEXT_MODEL="${TEXT_MODEL:-RoBERTa-wwm-ext-base-chinese}"
VOCAB="${VOCAB:-}" PRETRAINED="${PRETRAINED:-none}"
BATCH_SIZE="${BATCH_SIZE:-64}" MAX_EPOCHS="${MAX_EPOCHS:-10}"
USE_FLASH_ATTN="${USE_FLASH_ATTN:-False}"
NUM_GPUS="${NUM_GPUS:-1}" SEED="${SEED:-42}"
OUT="${OUT:-}"
RUN_NAME="${RUN_NAME:-retclip_training}" # not NAME, which some systems set to that of the machine
read -ra PREPARE_FLAGS <<<"${PREPARE_FLAGS:-}"
read -ra EVALUATE_FLAGS <<<"${EVALUATE_FLAGS:-}"

# ---- the demo: phantoms, then a small model trained on them from random weights
DEMO_N="${DEMO_N:-600}" DEMO_EPOCHS="${DEMO_EPOCHS:-8}"
DEMO_RECIPE=(
    --vision-model tiny --text-model tiny --image-size 64 --batch-size 16 --epochs "$DEMO_EPOCHS"
    --lr 5e-4 --warmup 30 --no-augment --num-workers 0
)

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$HERE/setup.sh"

usage() {
    cat <<'TEXT'
./run_retclip.sh CSV [IMAGE_DIR] [flags of train_retclip.py]        one CSV; the splits are in its column 'split'
TRAIN_CSV=... TEST_CSV=... ./run_retclip.sh [flags of train_retclip.py]              a CSV for each split
./run_retclip.sh demo [flags]    installs, draws fundus phantoms, trains, evaluates: minutes on two CPU cores

The same command again goes on where it was stopped or killed; what is finished is not done again, but the evaluation.
Set at the top of this file or in the environment:
  TRAIN_CSV, VAL_CSV, TEST_CSV   tables, e.g. of dataset_index, label, prompt; one of the last two may be missing
  DATASET         the pictures: hub id (HF_TOKEN is read) or folder of parquet, whose rows dataset_index counts
  IMAGE_DIR       the pictures: folder of files (that of the CSV)
  VISION_MODEL, TEXT_MODEL       sizes of the encoders (ViT-B-16, RoBERTa-wwm-ext-base-chinese)
  VOCAB           vocab.txt of the text encoder (the one beside the CSV)
  PRETRAINED      weights to begin with: file, folder or hub id (none)
  BATCH_SIZE      pairs per GPU and step (64)
  MAX_EPOCHS      passes over the training data (10)
  USE_FLASH_ATTN  True: an error where a GPU would take slow attention; it takes the fast one anyway if it can (False)
  NUM_GPUS        more than 1: that many processes by torchrun (1)
  SEED            of weights, data order and dropout; of the demo's data, too (42)
  OUT             folder of data/, lmdb/, logs/, evaluation/ (./outputs/retclip; of the demo ./outputs/retclip_demo)
  RUN_NAME        folder of the run in logs/ (retclip_training)
  PREPARE_FLAGS, EVALUATE_FLAGS   more flags of prepare_retclip.py and evaluate.py, divided at spaces

Exit codes: 0 done, 2 bad input, 3 done, but without pictures that could not be read, 143 stopped by a signal.
TEXT
}

fail() {
    echo "error: $*" >&2
    exit 2
}

# stage COMMAND...: prints it as one could type it, and runs it. A signal to this script goes to the command, which then
# saves. Exit code 3 (done, but something could not be read) is kept for the end; any other ends the script.
unread=0
stage() {
    local child code
    printf '+%s\n' "$(printf ' %q' "$@")"
    "$@" &
    child=$!
    trap 'kill -TERM "$child" 2>/dev/null || true' INT TERM USR1
    until wait "$child" && code=0 || code=$? && ! kill -0 "$child" 2>/dev/null; do :; done # a signal ends `wait` early
    trap - INT TERM USR1
    ((code != 3)) || { unread=3 && return; }
    ((code < 128)) || echo "stopped; the same command goes on from here" >&2
    ((code == 0)) || exit "$code"
}

# table_of CSV COPY: the file to prepare, and its splits. A CSV without them is copied with a split for each patient.
table_of() {
    "$PYTHON" - "$1" "$2" <<'PYTHON'
import csv, hashlib, pathlib, re, sys

source, copy = map(pathlib.Path, sys.argv[1:])
try:
    with source.open(newline="", encoding="utf-8-sig") as file:
        head, *rows = filter(None, csv.reader(file))
    rows = [[*row, *[""] * (len(head) - len(row))] for row in rows]
except (OSError, ValueError, csv.Error) as e:
    sys.exit(f"error: {source}: not a readable CSV ({e})")
if "split" not in head:
    plain = [re.sub(r"\W", "_", name.strip().lower()) for name in head]
    k = next((plain.index(n) for n in ("patient_id", "patient", "dataset_index", "image_id", "id") if n in plain), None)
    patients = {row[k] for row in rows} if k is not None else ()
    if len(patients) < 3:
        sys.exit(f"error: {source}: no column 'split', and no three patients' ids to divide it by (give it one)")
    part = max(1, round(0.15 * len(patients)))
    patients = sorted(patients, key=lambda name: hashlib.blake2b(name.encode()).digest())
    split = {name: "test" if i < part else "val" if i < 2 * part else "train" for i, name in enumerate(patients)}
    head, rows = [*head, "split"], [[*row, split[row[k]]] for row in rows]
    with copy.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *rows])
    print(f"{source}: no column 'split'; {copy} has one: of the patients 70 % train, 15 % val, test", file=sys.stderr)
    source = copy
print(source, " ".join({row[head.index("split")].strip() for row in rows}), sep="\n")
PYTHON
}

summary() {
    "$PYTHON" - "$1" <<'PYTHON'
import json, sys

results = json.load(open(sys.argv[1]))

def show(title, row, name, chance=None):
    value, low, high = ((row or {}).get(name + end) for end in ("", "_low", "_high"))
    if value is not None:
        spread = "" if low is None else f" [{low:.3f}, {high:.3f}]"
        chance = f"{row[name + '_chance']:.3f}, fixed order {row[name + '_fixed']:.3f}" if chance is None else chance
        print(f"  {title:<38}{value:.3f}{spread:<18}chance {chance}")

print(f"\n{results['evaluated']} on {results['evaluated_on']}, {results['n_patients']} patients [95 % interval]:")
for way, heads in results.get("retrieval", {}).items():
    show(f"{way.replace('_', ' ')}: same report, R@1", heads["patient"], "recall@1")
    show(f"{way.replace('_', ' ')}: same class, MAP", heads["patient"], "class_map")
show("classes: macro AUROC", results["macro"], "auroc", "0.5")
PYTHON
}

# ---- what is asked for, and whether it can be done
mode=csvs csv=$TRAIN_CSV
case ${1:-} in
    help | -h | --help) usage && exit ;;
    "" | -*) [[ $csv ]] || fail "no CSV (./run_retclip.sh CSV IMAGE_DIR, or TRAIN_CSV and TEST_CSV; see help)" ;;
    demo) mode=demo OUT=${OUT:-./outputs/retclip_demo} && shift ;;
    *) mode=csv csv=$1 VAL_CSV='' TEST_CSV='' && shift ;;
esac
[[ $mode != csv || ${1:--} == -* ]] || { IMAGE_DIR=$1 && shift; }
OUT=${OUT:-./outputs/retclip}
for name in BATCH_SIZE MAX_EPOCHS NUM_GPUS DEMO_N DEMO_EPOCHS; do
    [[ ${!name} =~ ^[1-9][0-9]*$ ]] || fail "$name '${!name}' is not a number above 0"
done
[[ $SEED =~ ^[0-9]+$ ]] || fail "SEED '$SEED' is not a whole number"
[[ ! " $* " =~ \ (--(logs|name|output-dir|overwrite|train-data|val-data|valid-data|convert))[=\ ] ]] ||
    fail "${BASH_REMATCH[1]}: not here (OUT and RUN_NAME say where the run is; a new run wants a new name)"
if [[ $mode == demo ]]; then
    csv=$OUT/fundus_${DEMO_N}_$SEED/pairs.csv DATASET='' IMAGE_DIR=''
    training=("${DEMO_RECIPE[@]}" --vocab "$(dirname "$csv")/vocab.txt")
else
    [[ $mode == csv || $TEST_CSV || $VAL_CSV ]] || fail "TEST_CSV or VAL_CSV is missing (there is only TRAIN_CSV)"
    for file in "$csv" "$VAL_CSV" "$TEST_CSV"; do
        [[ -z $file || -f $file ]] || fail "CSV '$file' does not exist"
    done
    [[ $DATASET ]] || IMAGE_DIR=${IMAGE_DIR:-$(dirname "$csv")}
    [[ -z $IMAGE_DIR || -d $IMAGE_DIR ]] || fail "IMAGE_DIR '$IMAGE_DIR' does not exist"
    [[ $PRETRAINED == none || -e $PRETRAINED || $PRETRAINED =~ ^[A-Za-z0-9][^/]*/[^/]+$ ]] ||
        fail "PRETRAINED '$PRETRAINED' does not exist (a weight file, a folder, a hub id, or none)"
    [[ $VOCAB || ! -f $(dirname "$csv")/vocab.txt ]] || VOCAB=$(dirname "$csv")/vocab.txt
    [[ -e $VOCAB || (-z $VOCAB && " $* " =~ \ --vocab[=\ ]) ]] ||
        fail "VOCAB '$VOCAB' does not exist (vocab.txt of the text encoder)"
    training=(--vision-model "$VISION_MODEL" --text-model "$TEXT_MODEL" --pretrained "$PRETRAINED"
        --batch-size "$BATCH_SIZE" --max-epochs "$MAX_EPOCHS" ${VOCAB:+--vocab "$VOCAB"})
    [[ ! $USE_FLASH_ATTN =~ ^([Tt]rue|1)$ ]] || training+=(--use-flash-attention)
fi
mkdir -p "$OUT/data" 2>/dev/null && [[ -w $OUT/data ]] || fail "OUT '$OUT' cannot be written to"
[[ $mode != demo ]] || set_up "$HERE/requirements.txt"
choose_python "$HERE/requirements.txt" ||
    fail "packages of requirements.txt are missing (pip install -r requirements.txt, or run ./run_retclip.sh demo once)"
training+=(--seed "$SEED" "$@")
if [[ $mode != demo && ! -d $OUT/lmdb/train ]]; then # a wrong flag shows before hours of preparation
    said=$(PYTHONPATH=$HERE "$PYTHON" -c 'import sys, train_retclip; train_retclip.parse_args(sys.argv[1:])' \
        --train-data . --val-data . "${training[@]}" 2>&1) || fail "$(tail -n 1 <<<"$said" | sed 's/.*rror: //')"
fi

# ---- the stages
[[ -f $csv ]] || stage "$PYTHON" "$HERE/demo_data.py" fundus --out "$(dirname "$csv")" --n "$DEMO_N" --seed "$SEED"
if [[ $mode == csvs ]]; then
    data=(--train-csv "$csv" ${VAL_CSV:+--val-csv "$VAL_CSV"} ${TEST_CSV:+--test-csv "$TEST_CSV"})
    splits="train ${VAL_CSV:+val} ${TEST_CSV:+test}"
else
    found=$(table_of "$csv" "$OUT/data/split.csv") || exit 2
    data=(--csv "${found%$'\n'*}" --split-column split) splits=${found##*$'\n'}
fi
data+=(${DATASET:+--dataset "$DATASET"} ${IMAGE_DIR:+--image-dir "$IMAGE_DIR"})
valid='' scored=''
for name in test validation valid val; do
    [[ " $splits " != *" $name "* ]] || { valid=$name && scored=${scored:-$name}; }
done
[[ $valid && " $splits " == *" train "* ]] || fail "$csv: its splits are not train, and val or test: $splits"
# The validation data choose best_model.pt. Where they are also what is scored, that choice would have seen the answers.
[[ $scored == "$valid" ]] && checkpoint=epoch_latest.pt || checkpoint=best_model.pt
launcher=("$PYTHON") # with `--`, or else torchrun takes --logs and --monitor for its own
((NUM_GPUS == 1)) || launcher+=(-m torch.distributed.run --standalone --nproc_per_node "$NUM_GPUS" --)
stage "$PYTHON" "$HERE/prepare_retclip.py" "${data[@]}" --out "$OUT/data" --lmdb "$OUT/lmdb" --resume \
    "${PREPARE_FLAGS[@]}"
stage "${launcher[@]}" "$HERE/train_retclip.py" --train-data "$OUT/lmdb/train" --val-data "$OUT/lmdb/$valid" \
    --logs "$OUT/logs" --name "$RUN_NAME" --resume auto "${training[@]}"
stage "${launcher[@]}" "$HERE/evaluate.py" --test-only "$OUT/logs/$RUN_NAME/checkpoints/$checkpoint" \
    --val-data "$OUT/lmdb/$scored" --output "$OUT/evaluation" "${EVALUATE_FLAGS[@]}"
summary "$OUT/evaluation/evaluation_results.json"
echo "Open $OUT/evaluation/report.html in a browser. This took $((SECONDS / 60)) min $((SECONDS % 60)) s."
exit "$unread"
