#!/usr/bin/env bash
# Evaluate the 8-exit RANet for anytime prediction on ImageNet (paper, table 2).
#     bash ranet_scripts/eval_imagenet_any.sh [FLAG...]
# Flags given here win. utils/shell.sh lists what the environment sets: DATA_ROOT, RESULT_ROOT, DRY_RUN=1, ...
source "$(dirname "${BASH_SOURCE[0]}")/recipes.sh"

evaluate imagenet any "$@"
