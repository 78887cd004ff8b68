"""Train an early-exit network on ImageNet, or any folder of large images, on one or many GPUs.

    torchrun --standalone --nproc_per_node=4 train_imagenet.py --data-root data/imagenet --result_dir runs/msdnet \\
        --arch msdnet_ge --nBlocks 5 --step 7 --base 7 --nChannels 32 --growthRate 16 --grFactor 1-2-4-4 --bnFactor 1-2-4-4 \\
        --epochs 90 --lr_milestones 30,60 --gpu 0,1,2,3
    torchrun --nnodes=2 --nproc_per_node=4 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train_imagenet.py ...
    python train_imagenet.py ...                         # one process, CPU or GPU
"""
import sys

from args import forbid, parse_args, require, require_unchanged
from dataloader import build_data
from utils.core.distributed import process_group, rank, world_size
from utils.core.errors import STOPPED, user_errors
from utils.core.machine import choose_device
from utils.core.signals import StopSignals
from utils.runs.folder import claim, epochs_begun, find_run, stored_split
from utils.training.trainer import prepare


@user_errors()
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv, datasets=("imagenet", "folder"))
    require(args, "result_dir")
    forbid(args, "evaluate_from", "evalmode", "ensemble", "policy", "budget", "sweep", "flat_curve", "publish", "images", "cost")
    device = choose_device(args.device, args.gpu, args.threads)
    with StopSignals(begun=False) as signals, process_group(device, args.dist_backend), claim(args.result_dir):
        saved = find_run(args.result_dir, args.resume)
        if saved:
            require_unchanged(args, saved["training"]["config"], epochs_begun=epochs_begun(saved))
        data = build_data(dataset=args.dataset, data_root=args.data_root, image_size=args.image_size,
                          batch_size=args.batch_size, device=device, seed=args.seed, use_valid=args.use_valid,
                          valid_size=args.valid_size, split=stored_split(saved), augment_valid=args.paper_protocol,
                          workers=args.workers, val_workers=args.val_workers, decoder=args.decoder,
                          skip_unreadable=args.skip_unreadable, rank=rank(), world=world_size())
        trainer = prepare(args, data, device, saved)
        if not trainer.fit(signals):
            return STOPPED
        trainer.test()
    return 0


if __name__ == "__main__":
    sys.exit(main())
