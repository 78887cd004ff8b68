#!/usr/bin/env bash
# Both stages of improved techniques for adaptive networks (arXiv:1908.06294) on CIFAR-100: the 10-exit MSDNet trained jointly with
# gradient rescaling, then collaborating exits on it, which learn from its last one. 5,000 images are held out of both.
#     bash msdnet_scripts/imta_cifar100.sh [FLAG...]
# Flags given here win, in both stages. Started again, it goes on where it was stopped.
# utils/shell.sh lists what the environment sets: DATA_ROOT, RESULT_ROOT, DRY_RUN=1, ...
source "$(dirname "${BASH_SOURCE[0]}")/methods.sh"

refuse --result_dir --tensorboard_dir --method --checkpoint --resume --start-epoch -- "$@"
first=$RESULT_ROOT/imta_cifar100_first second=$RESULT_ROOT/imta_cifar100
start=(--checkpoint "$first/model_best.pth")
if [ -e "$second/model_latest.pth" ] || [ -e "$second/model_previous.pth" ]; then start=(--resume); fi
train cifar100 any --result_dir "$first" --resume --method joint --use-valid "$@"
train cifar100 any --result_dir "$second" "${start[@]}" --method imta --use-valid "$@"
