#!/usr/bin/env bash
# Train the 5-exit MSDNet for anytime prediction on ImageNet with torchrun (paper, table 2).
#     bash msdnet_scripts/train_imagenet_any.sh [FLAG...]
# Flags given here win. utils/shell.sh lists what the environment sets: DATA_ROOT, RESULT_ROOT, DRY_RUN=1, ...
source "$(dirname "${BASH_SOURCE[0]}")/recipes.sh"

train imagenet any "$@"
