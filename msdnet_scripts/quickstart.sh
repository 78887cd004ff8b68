#!/usr/bin/env bash
# From a fresh clone to both curves of a small BoostNet on `glyphs`, which needs no download, in a few minutes on a CPU.
#     bash msdnet_scripts/quickstart.sh [TRAINING FLAG...]
# Makes .venv and installs requirements.txt the first time. Run again, it goes on where it was and evaluates again.
# utils/shell.sh lists what the environment sets: RESULT_ROOT, PYTHON, DRY_RUN=1, ...
source "$(dirname "${BASH_SOURCE[0]}")/../utils/shell.sh"

refuse --result_dir --dataset -- "$@"
place_of "$@"
prepare_environment requirements.txt
python=$(python_path)
# So small a network gains little from a second thread, and on a busy machine loses much by it.
data=(--threads 1 --dataset glyphs --data-root "${DATA_ROOT:-$ROOT/data/glyphs}")
result=$RESULT_ROOT/quickstart

run "$python" "$ROOT/train_cifar100.py" "${data[@]}" --use-valid --result_dir "$result" --resume \
    --arch msdnet_ge --nBlocks 4 --base 1 --step 2 --stepmode even --nChannels 4 --growthRate 4 \
    --epochs 4 --lr_milestones 2,3 --batch-size 64 "$@"
for mode in anytime dynamic; do
    run "$python" "$ROOT/eval_cifar100.py" "${data[@]}" --evaluate-from "$result/model_best.pth" --evalmode $mode \
        ${place[@]+"${place[@]}"}
done
cd "$ROOT" # where python -m finds utils
run "$python" -m utils.plots "$result"
