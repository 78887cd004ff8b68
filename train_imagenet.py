"""Train an early-exit network on ImageNet, or any folder of large images, on one or many GPUs.

    torchrun --standalone --nproc_per_node=4 train_imagenet.py --data-root data/imagenet --result_dir runs/msdnet \\
        --arch msdnet_ge --nBlocks 5 --step 7 --base 7 --nChannels 32 --growthRate 16 --grFactor 1-2-4-4 --bnFactor 1-2-4-4 \\
        --epochs 90 --lr_milestones 30,60 --gpu 0,1,2,3
    torchrun --nnodes=2 --nproc_per_node=4 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train_imagenet.py ...
    python train_imagenet.py ...                         # one process, CPU or GPU

The run itself is that of train_cifar100.py, by several processes where torchrun has started them.
"""
import sys

from args import parse_args
from train_cifar100 import train
from utils.core.distributed import process_group
from utils.core.errors import user_errors
from utils.core.machine import choose_device
from utils.core.signals import StopSignals


@user_errors()
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv, datasets=("imagenet", "folder"), task="training")
    device = choose_device(args.device, args.gpu, args.threads)
    with StopSignals(begun=False) as signals, process_group(device, args.dist_backend):
        return train(args, device, signals)


if __name__ == "__main__":
    sys.exit(main())
