"""Train an early-exit network on small images (CIFAR-100, CIFAR-10, glyphs or a folder of your own) on one device.

    python train_cifar100.py --data-root data --result_dir runs/boost --arch msdnet_ge --nBlocks 10 --step 2 --nChannels 16 \\
        --lr_milestones 150,225
    python train_cifar100.py ... --method joint          # the baseline, everything else equal
    python train_cifar100.py ... --resume                # continue runs/boost from its latest checkpoint
"""
import sys

from args import parse_args, require
from dataloader import build_data
from utils.errors import user_errors
from utils.run import choose_device, saved_split
from utils.trainer import prepare


@user_errors()
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    require(args, "result_dir")
    device = choose_device(args.device, args.gpu, args.threads)
    data = build_data(dataset=args.dataset, data_root=args.data_root, image_size=args.image_size, batch_size=args.batch_size,
                      device=device, seed=args.seed, use_valid=args.use_valid, valid_size=args.valid_size,
                      split=saved_split(args.result_dir, args.resume), workers=args.workers, val_workers=args.val_workers)
    trainer = prepare(args, data, device)
    trainer.fit()
    trainer.test()
    return 0


if __name__ == "__main__":
    sys.exit(main())
