#!/usr/bin/env bash
# The ablations of the paper's figure 5 on CIFAR-100, ten runs and one figure: temperature 0, 0.2, 0.5, 0.8 and 1; batch size
# 32, 64, 128 and 256 (the learning rate stays, as nothing in the paper speaks of scaling it); without gradient rescaling; with
# a trainable ensemble.
#     bash msdnet_scripts/ablation_cifar100.sh [FLAG...]
# Flags given here win, so that they set the scale: --nBlocks 4 --base 1 --epochs 3 ... Started again, it leaves finished runs
# alone and goes on with the one that was interrupted.
# utils/shell.sh lists what the environment sets: DATA_ROOT, RESULT_ROOT, DRY_RUN=1, ...
source "$(dirname "${BASH_SOURCE[0]}")/recipes.sh"

given=("$@")
refuse --result_dir --method --arch --ensemble_reweight --batch-size --trainable_ensemble -- "$@"
folder=$RESULT_ROOT/ablation_cifar100

# setting NAME FLAG...: the run that these flags set apart from the others.
setting() {
    local name=$1
    shift
    train cifar100 any --result_dir "$folder/$name" --resume "$@" ${given[@]+"${given[@]}"}
}

setting reference # temperature 0.5, batch size 64, gradient rescaling, earlier exits' sum frozen
for temperature in 0 1 0.2 0.8; do setting "temperature_$temperature" --ensemble_reweight "$temperature"; done
setting without_rescaling --arch msdnet
setting trainable_ensemble --trainable_ensemble
for size in 256 128 32; do setting "batch_$size" --batch-size "$size"; done
cd "$ROOT" # where python -m finds utils
run "$(python_path)" -m utils.ablation "$folder"
