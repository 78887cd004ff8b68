#!/usr/bin/env bash
# Evaluate the MSDNets for budgeted-batch prediction on CIFAR-100 (paper, figure 4).
#     bash msdnet_scripts/eval_cifar100_batch.sh [SIZE] [FLAG...]
# Sizes: 4, 8, 12; all in turn by default. Flags given here win.
# utils/shell.sh lists what the environment sets: DATA_ROOT, RESULT_ROOT, DRY_RUN=1, ...
source "$(dirname "${BASH_SOURCE[0]}")/recipes.sh"

each_size evaluate cifar100 "$@"
