#!/usr/bin/env bash
# Learn to weight samples on ImageNet as L2W-DEN does (arXiv:2209.08310): batches of 4096 images in 8 processes, 100 epochs.
#     bash msdnet_scripts/l2w_imagenet.sh [SIZE] [--smooth] [FLAG...]
# Sizes: 4, 6, 7; all in turn by default. --smooth: 300 epochs with label smoothing. Nothing is held out. Flags given here win.
# utils/shell.sh lists what the environment sets: DATA_ROOT, RESULT_ROOT, NPROC (here 8), DRY_RUN=1, ...
NPROC=${NPROC:-8}
source "$(dirname "${BASH_SOURCE[0]}")/methods.sh"

each_size l2w imagenet "$@"
