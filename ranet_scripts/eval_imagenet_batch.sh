#!/usr/bin/env bash
# Evaluate the RANets for budgeted-batch prediction on ImageNet (paper, figure 4).
#     bash ranet_scripts/eval_imagenet_batch.sh [SIZE] [FLAG...]
# Sizes: 1, 2; all in turn by default. Flags given here win.
# utils/shell.sh lists what the environment sets: DATA_ROOT, RESULT_ROOT, DRY_RUN=1, ...
source "$(dirname "${BASH_SOURCE[0]}")/recipes.sh"

each_size evaluate imagenet "$@"
