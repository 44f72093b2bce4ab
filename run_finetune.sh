#!/usr/bin/env bash
# Presets of finetune_siglip.py, and a demo that needs no data. ./run_finetune.sh help
set -euo pipefail

# ---- change these here, or set them in the environment
CSV_FILE="${CSV_FILE:-all_ct_wlabels.csv}"
PRETRAINED_PATH="${PRETRAINED_PATH:-/opt/project/logs/ckpt/pytorch_model.bin}"
OUTPUT_BASE_DIR="${OUTPUT_BASE_DIR:-./outputs}"
NUM_GPUS="${NUM_GPUS:-1}"
SEED="${SEED:-42}"

# ---- the demo: phantoms, then a small model trained on them from random weights
DEMO_DIR="${DEMO_DIR:-demo}"
DEMO_N="${DEMO_N:-1000}"
DEMO_EPOCHS="${DEMO_EPOCHS:-15}"
DEMO_RECIPE=(
    --pretrained none --arch siglip-tiny --num-slices 16 --image-size 64 --no-augment --feature-norm batch
    --lr 1.5e-3 --weight-decay 0.05 --scheduler cosine --warmup 50 --use-ema --ema-decay 0.995
    --monitor macro_auroc --num-workers 0
)

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$HERE/setup.sh"

usage() {
    cat <<'TEXT'
./run_finetune.sh MODE [flags of finetune_siglip.py, which win over those of the mode]

  basic      50 epochs, batch 8, plain BCE
  focal      100 epochs, batch 12 x 2, focal loss, 30 layers frozen, dropout 0.15, mixed precision, patience 15
  balanced   75 epochs, batch 10, class-balanced BCE, mixed precision, patience 12
  advanced   150 epochs, batch 16 x 4, focal loss (gamma 2.5, alpha 0.8), cosine with 1000 steps of warm-up, lr 2e-4,
             50 layers frozen, dropout 0.2, mixed precision, EMA, patience 20
  debug      5 epochs, batch 4
  inference  the newest best_model.pth of basic, focal or balanced; threshold 0.4; writes ./predictions.csv
  demo       installs, makes synthetic CT volumes, trains and evaluates: minutes on two CPU cores, no data needed
  help       this text

Set at the top of this file or in the environment:
  CSV_FILE         table of volumes and labels (all_ct_wlabels.csv)
  PRETRAINED_PATH  weights: file, folder or hub id (/opt/project/logs/ckpt/pytorch_model.bin)
  OUTPUT_BASE_DIR  runs go to OUTPUT_BASE_DIR/MODE_DATE_TIME (./outputs)
  NUM_GPUS         more than 1: that many processes by torchrun (1)
  SEED             of data order, weights and dropout; of the demo's data, too (42)

An interrupted run goes on: ./run_finetune.sh MODE --output-dir ITS_FOLDER --resume auto
TEXT
}

fail() {
    echo "error: $*" >&2
    exit 2
}

# Prints a command as one could type it, and runs it.
run() {
    printf '+'
    printf ' %q' "$@"
    printf '\n'
    "$@"
}

# finetune FLAGS...: the training script, under torchrun for more than one GPU.
finetune() {
    local launcher=("$PYTHON")
    if ((NUM_GPUS > 1)); then
        launcher+=(-m torch.distributed.run --standalone --nproc_per_node "$NUM_GPUS" --) # else it takes --monitor
    fi
    run "${launcher[@]}" "$HERE/finetune_siglip.py" --seed "$SEED" "$@"
}

check_inputs() {
    [[ $NUM_GPUS =~ ^[1-9][0-9]*$ ]] || fail "NUM_GPUS '$NUM_GPUS' is not a number above 0"
    [[ $SEED =~ ^[0-9]+$ ]] || fail "SEED '$SEED' is not a whole number"
    mkdir -p "$OUTPUT_BASE_DIR" 2>/dev/null && [[ -w $OUTPUT_BASE_DIR ]] ||
        fail "OUTPUT_BASE_DIR '$OUTPUT_BASE_DIR' cannot be written to"
    [[ $1 == demo ]] && return
    [[ -f $CSV_FILE ]] || fail "CSV_FILE '$CSV_FILE' does not exist (set it here or in the environment)"
    case "$1:$PRETRAINED_PATH" in
        inference:* | *:none) ;; # a checkpoint brings its weights
        *:[./~]*) [[ -e $PRETRAINED_PATH ]] || fail "PRETRAINED_PATH '$PRETRAINED_PATH' does not exist (a weight file," \
            "a folder, a hub id, or none with --arch)" ;;
    esac
}

system_information() {
    "$PYTHON" - "$OUTPUT_BASE_DIR" <<'PYTHON'
import os, platform, shutil, sys, torch

memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
print(f"System   {platform.system()}, Python {platform.python_version()}, torch {torch.__version__}")
print(f"CPU      {os.cpu_count()} cores, {memory:.0f} GiB memory")
for i in range(torch.cuda.device_count()):
    card = torch.cuda.get_device_properties(i)
    print(f"GPU {i}    {card.name}, {card.total_memory / 2**30:.0f} GiB")
if not torch.cuda.is_available():
    print("GPU      none, this runs on the CPU")
print(f"Disk     {shutil.disk_usage(sys.argv[1]).free / 2**30:.0f} GiB free in {sys.argv[1]}")
PYTHON
}

newest_model() {
    local file newest=
    for file in "$OUTPUT_BASE_DIR"/{basic,focal,balanced}_*/best_model.pth; do
        if [[ -f $file && (-z $newest || $file -nt $newest) ]]; then
            newest=$file
        fi
    done
    echo "$newest"
}

demo() {
    local data=$DEMO_DIR/ct/all_ct_wlabels.csv cache=$DEMO_DIR/cache out=$OUTPUT_BASE_DIR/demo
    run "$PYTHON" "$HERE/demo_data.py" ct --out "$DEMO_DIR" --n "$DEMO_N" --seed "$SEED" --no-nifti
    run "$PYTHON" "$HERE/prepare_ct.py" cache --csv "$data" --out "$cache" --num-slices 16 --image-size 64
    finetune --csv "$cache/volumes.csv" --epochs "$DEMO_EPOCHS" "${DEMO_RECIPE[@]}" --output-dir "$out" --overwrite "$@"
    run "$PYTHON" "$HERE/evaluate.py" --test-only "$out/best_model.pth" --split test --output "$out/eval"
    "$PYTHON" - "$out/eval/results.json" <<'PYTHON'
import json, sys

results = json.load(open(sys.argv[1]))
auroc, low, high, f1 = (
    "undefined" if value is None else f"{value:.3f}"
    for value in map(results["macro"].get, ("auroc", "auroc_low", "auroc_high", "f1"))
)
print(f"\nDemo: macro AUROC {auroc} [{low}, {high}], macro F1 {f1} on {results['n']} phantoms the model has not seen")
PYTHON
    echo "Open $out/eval/report.html in a browser. This took $((SECONDS / 60)) min $((SECONDS % 60)) s."
}

mode=${1:-}
shift || true
case $mode in
    basic) flags=(--epochs 50 --batch-size 8 --loss bce) ;;
    focal) flags=(--epochs 100 --batch-size 12 --accum-steps 2 --loss focal --focal-gamma 2.0 --focal-alpha 1.0
        --freeze-up-to 30 --dropout-rate 0.15 --amp --early-stopping-patience 15) ;;
    balanced) flags=(--epochs 75 --batch-size 10 --loss balanced --amp --early-stopping-patience 12) ;;
    advanced) flags=(--epochs 150 --batch-size 16 --accum-steps 4 --lr 2e-4 --weight-decay 1e-5
        --scheduler cosine --warmup 1000 --loss focal --focal-gamma 2.5 --focal-alpha 0.8 --freeze-up-to 50
        --dropout-rate 0.2 --amp --max-grad-norm 0.5 --use-ema --early-stopping-patience 20) ;;
    debug) flags=(--epochs 5 --batch-size 4) ;;
    inference) flags=(--threshold 0.4 --test-output ./predictions.csv) ;;
    demo) flags=() ;;
    help | -h | --help) usage && exit ;;
    "") usage >&2 && exit 2 ;;
    *) fail "mode '$mode' is not known (basic, focal, balanced, inference, debug, advanced, demo, help)" ;;
esac

check_inputs "$mode"
if [[ $mode == demo ]]; then
    set_up "$HERE/requirements.txt"
elif ! choose_python "$HERE/requirements.txt"; then
    fail "packages of requirements.txt are missing (pip install -r requirements.txt, or run ./run_finetune.sh demo once)"
fi
system_information

case $mode in
    demo) demo "$@" ;;
    inference)
        model=$(newest_model)
        [[ -n $model ]] || fail "no best_model.pth of basic, focal or balanced in $OUTPUT_BASE_DIR (train one first)"
        finetune --csv "$CSV_FILE" --test-only "$model" "${flags[@]}" "$@"
        ;;
    *)
        output=$OUTPUT_BASE_DIR/${mode}_$(date +%Y%m%d_%H%M%S)
        finetune --csv "$CSV_FILE" --pretrained "$PRETRAINED_PATH" "${flags[@]}" --output-dir "$output" "$@"
        ;;
esac
