#!/usr/bin/env bash
# Learn to weight samples on CIFAR-100 as L2W-DEN does, which published no command for it: its weighting with a meta step for
# every batch, the MSDNets for budgeted-batch prediction, and the usual schedule.
#     bash msdnet_scripts/l2w_cifar100.sh [SIZE] [FLAG...]
# Sizes: 4, 8, 12; all in turn by default. Nothing is held out, except with --use-valid. Flags given here win.
# utils/shell.sh lists what the environment sets: DATA_ROOT, RESULT_ROOT, DRY_RUN=1, ...
source "$(dirname "${BASH_SOURCE[0]}")/methods.sh"

each_size l2w cifar100 "$@"
