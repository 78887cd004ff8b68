# Sourced by the scripts beside it: the RANets of the paper.
source "$(dirname "${BASH_SOURCE[0]}")/../utils/shell.sh"

FAMILY=ranet
IMAGENET_EVAL_BATCH=64

# Budgeted-batch models; a size is the number the paper gives the model.
sizes() {
    case $1 in
        cifar100) echo 1 2 3 ;;
        imagenet) echo 1 2 ;;
    esac
}

# network DATASET SIZE: the flags of a model, nothing where there is no such model.
network() {
    local any="--arch ranet --nBlocks 2 --stepmode even --step 4 --nChannels 16"
    local batch="--arch ranet --nBlocks 2 --stepmode lin_grow --step 2 --nChannels 16 --use-valid"
    local imagenet="--arch ranet --nBlocks 2 --stepmode even --step 8 --growthRate 16"
    imagenet+=" --scale-list 1-2-3-4 --grFactor 4-2-2-1 --bnFactor 4-2-2-1"
    case $1/$2 in
        cifar100/any) echo "$any --scale-list 1-2-3-3 --grFactor 4-2-1-1 --bnFactor 4-2-1-1" ;;
        cifar100/1) echo "$batch --scale-list 1-2-3 --grFactor 4-2-1 --bnFactor 4-2-1" ;;
        cifar100/2) echo "$batch --scale-list 1-2-2-3 --grFactor 4-2-2-1 --bnFactor 4-2-2-1" ;;
        cifar100/3) echo "$batch --scale-list 1-2-3-3 --grFactor 4-2-1-1 --bnFactor 4-2-1-1" ;;
        imagenet/any) echo "$imagenet --nChannels 64" ;;
        imagenet/1) echo "$imagenet --nChannels 32 --use-valid" ;;
        imagenet/2) echo "$imagenet --nChannels 64 --use-valid" ;;
    esac
}
