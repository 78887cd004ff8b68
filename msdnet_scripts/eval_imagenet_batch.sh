#!/usr/bin/env bash
# Evaluate the MSDNets for budgeted-batch prediction on ImageNet (paper, figure 4).
#     bash msdnet_scripts/eval_imagenet_batch.sh [SIZE] [FLAG...]
# Sizes: 4, 6, 7 (5 on request); all in turn by default. Flags given here win.
# utils/shell.sh lists what the environment sets: DATA_ROOT, RESULT_ROOT, DRY_RUN=1, ...
source "$(dirname "${BASH_SOURCE[0]}")/recipes.sh"

each_size evaluate imagenet "$@"
