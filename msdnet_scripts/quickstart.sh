#!/usr/bin/env bash
# From a fresh clone to both curves of a small BoostNet on `glyphs`, which needs no download, in two minutes on two CPU cores.
#     bash msdnet_scripts/quickstart.sh [TRAINING FLAG...]
# Makes .venv and installs requirements.txt the first time. Run again, it goes on where it was and evaluates again.
# utils/shell.sh lists what the environment sets: RESULT_ROOT, PYTHON, DRY_RUN=1, ...
source "$(dirname "${BASH_SOURCE[0]}")/../utils/shell.sh"

refuse --result_dir --dataset -- "$@"
place_of "$@"
prepare_environment requirements.txt
python=$(python_path)
threads=$(getconf _NPROCESSORS_ONLN)
[ "$threads" -lt 2 ] || threads=2 # so small a network gains nothing from a third
data=(--threads "$threads" --dataset glyphs --data-root "${DATA_ROOT:-$ROOT/data/glyphs}")
result=$RESULT_ROOT/quickstart

run "$python" "$ROOT/train_cifar100.py" "${data[@]}" --use-valid --result_dir "$result" --resume \
    --arch msdnet_ge --nBlocks 4 --base 1 --step 2 --stepmode even --nChannels 4 --growthRate 4 \
    --epochs 3 --images_per_class 400 --batch-size 64 --optimizer adam --lr_f 8e-3 --lr-type linear "$@"
for mode in anytime dynamic; do
    run "$python" "$ROOT/eval_cifar100.py" "${data[@]}" --evaluate-from "$result/model_best.pth" --evalmode $mode \
        ${place[@]+"${place[@]}"}
done
cd "$ROOT" # where python -m finds utils
run "$python" -m utils.plots "$result"
