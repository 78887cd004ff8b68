#!/usr/bin/env bash
# Evaluate the 8-exit RANet for anytime prediction on CIFAR-100 (paper, table 1).
#     bash ranet_scripts/eval_cifar100_any.sh [FLAG...]
# Flags given here win. utils/shell.sh lists what the environment sets: DATA_ROOT, RESULT_ROOT, DRY_RUN=1, ...
source "$(dirname "${BASH_SOURCE[0]}")/recipes.sh"

evaluate cifar100 any "$@"
