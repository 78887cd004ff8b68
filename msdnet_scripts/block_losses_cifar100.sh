#!/usr/bin/env bash
# Train the 7-exit MSDNet of block-dependent losses (TNNLS 2023) on CIFAR-100.
#     bash msdnet_scripts/block_losses_cifar100.sh VARIANT [DISTILL] [FLAG...]
# VARIANT: conventional, overlap (of 3 blocks), overlap_final (the last loss trains all blocks), local_error, no_overlap.
# DISTILL: plain (default), self (from the last exit), teacher with --teacher FILE. The released program takes a teacher too, but
# never loads it. Coefficients published: 0.25 to 0.35 (--distill_weight, here 0.35). Nothing is held out. Flags given here win.
# utils/shell.sh lists what the environment sets: DATA_ROOT, RESULT_ROOT, DRY_RUN=1, ...
source "$(dirname "${BASH_SOURCE[0]}")/methods.sh"

block_losses cifar100 7 3 2.5 "--arch msdnet --nBlocks 7 --stepmode even --step 2 --base 4 --nChannels 16" "$@"
