#!/usr/bin/env bash
# Train the 5-exit MSDNet of block-dependent losses (TNNLS 2023) on ImageNet with torchrun.
#     bash msdnet_scripts/block_losses_imagenet.sh VARIANT [DISTILL] [FLAG...]
# VARIANT and DISTILL as in block_losses_cifar100.sh, with an overlap of 2 blocks; with distillation T is 1.5. As published, 50,000
# images are held out; many of their runs take fewer images of each class (--images_per_class 300, ...). Flags given here win.
# utils/shell.sh lists what the environment sets: DATA_ROOT, RESULT_ROOT, NPROC, DRY_RUN=1, ...
source "$(dirname "${BASH_SOURCE[0]}")/methods.sh"

block_losses imagenet 5 2 1.5 "$(plain_network imagenet 4) --use-valid" "$@"
