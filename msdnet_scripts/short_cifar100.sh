#!/usr/bin/env bash
# Train on CIFAR-100 in few epochs, with a learning rate that reaches zero at the last of them.
#     bash msdnet_scripts/short_cifar100.sh [EPOCHS] [FLAG...]
# 12 epochs without an argument; the network is the paper's 10-exit MSDNet, or what the flags say, for example
#     bash msdnet_scripts/short_cifar100.sh 12 --nBlocks 5 --base 2 --nChannels 16 --use-valid --method joint
# Flags given here win. Each method has a run folder of its own; --resume goes on with a run that was stopped.
# utils/shell.sh lists what the environment sets: DATA_ROOT, RESULT_ROOT, DRY_RUN=1, ...
source "$(dirname "${BASH_SOURCE[0]}")/../utils/shell.sh"

# Compared one by one in docs/results.md, "A recipe for few epochs".
recipe=(
    --batch-size 64 --lr_f 0.1 --lr-type linear --momentum 0.9 --nesterov --weight-decay 5e-4 --label_smoothing 0.1 --ema 0.99
)

epochs=12
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
    [[ $1 =~ ^[1-9][0-9]*$ ]] || fail "EPOCHS is the number of epochs, got '$1'"
    epochs=$1
    shift
fi
method=$(value_of --method boost "$@")
run "$(python_path)" "$ROOT/train_cifar100.py" --dataset cifar100 --data-root "${DATA_ROOT:-$ROOT/data/cifar100}" \
    --result_dir "$RESULT_ROOT/short_cifar100_$method" --epochs "$epochs" "${recipe[@]}" "$@"
