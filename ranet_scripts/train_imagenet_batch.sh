#!/usr/bin/env bash
# Train the RANets for budgeted-batch prediction on ImageNet with torchrun (paper, figure 4).
#     bash ranet_scripts/train_imagenet_batch.sh [SIZE] [FLAG...]
# Sizes: 1, 2; all in turn by default. Flags given here win.
# utils/shell.sh lists what the environment sets: DATA_ROOT, RESULT_ROOT, DRY_RUN=1, ...
source "$(dirname "${BASH_SOURCE[0]}")/recipes.sh"

each_size train imagenet "$@"
