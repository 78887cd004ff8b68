# Sourced by the scripts beside it: the MSDNets of the paper.
source "$(dirname "${BASH_SOURCE[0]}")/../utils/shell.sh"

FAMILY=msdnet
IMAGENET_EVAL_BATCH=1024

# Budgeted-batch models by default; a size is k, the depth of the first block.
sizes() {
    case $1 in
        cifar100) echo 4 8 12 ;;
        imagenet) echo 4 6 7 ;;
    esac
}

# network DATASET SIZE: the flags of a model, nothing where there is no such model.
network() {
    local cifar100="--arch msdnet_ge --stepmode even --step 2 --nChannels 16"
    local imagenet="--arch msdnet_ge --stepmode even --nBlocks 5 --nChannels 32 --growthRate 16"
    imagenet+=" --grFactor 1-2-4-4 --bnFactor 1-2-4-4"
    case $1/$2 in
        cifar100/any) echo "$cifar100 --nBlocks 10 --base 4" ;;
        cifar100/4 | cifar100/8 | cifar100/12) echo "$cifar100 --nBlocks 6 --base $2 --use-valid" ;;
        imagenet/any) echo "$imagenet --step 7 --base 7" ;;
        imagenet/4 | imagenet/5 | imagenet/6 | imagenet/7) echo "$imagenet --step $2 --base $2 --use-valid" ;;
    esac
}
