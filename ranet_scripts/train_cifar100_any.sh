#!/usr/bin/env bash
# Train the 8-exit RANet for anytime prediction on CIFAR-100 (paper, table 1).
#     bash ranet_scripts/train_cifar100_any.sh [FLAG...]
# Flags given here win. utils/shell.sh lists what the environment sets: DATA_ROOT, RESULT_ROOT, DRY_RUN=1, ...
source "$(dirname "${BASH_SOURCE[0]}")/recipes.sh"

train cifar100 any "$@"
