"""Train an early-exit network on small images (CIFAR-100, CIFAR-10, glyphs or a folder of your own) on one device.

    python train_cifar100.py --data-root data --result_dir runs/boost --arch msdnet_ge --nBlocks 10 --step 2 --nChannels 16 \\
        --lr_milestones 150,225
    python train_cifar100.py ... --method joint          # the baseline, everything else equal
    python train_cifar100.py ... --resume                # the same command: continue runs/boost as if it had never stopped
"""
import sys

from args import forbid, parse_args, require, require_unchanged
from dataloader import build_data
from utils.core.errors import STOPPED, user_errors
from utils.core.machine import choose_device
from utils.core.signals import StopSignals
from utils.runs.folder import claim, epochs_begun, find_run, stored_split
from utils.training.trainer import prepare


@user_errors()
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    require(args, "result_dir")
    forbid(args, "evaluate_from", "evalmode", "ensemble", "policy", "budget", "sweep", "flat_curve", "publish", "images", "cost")
    device = choose_device(args.device, args.gpu, args.threads)
    with StopSignals(begun=False) as signals, claim(args.result_dir):
        saved = find_run(args.result_dir, args.resume)
        if saved:
            require_unchanged(args, saved["training"]["config"], epochs_begun=epochs_begun(saved))
        data = build_data(dataset=args.dataset, data_root=args.data_root, image_size=args.image_size,
                          batch_size=args.batch_size, device=device, seed=args.seed, use_valid=args.use_valid,
                          valid_size=args.valid_size, split=stored_split(saved), augment_valid=args.paper_protocol,
                          workers=args.workers, val_workers=args.val_workers, decoder=args.decoder,
                          skip_unreadable=args.skip_unreadable)
        trainer = prepare(args, data, device, saved)
        if not trainer.fit(signals):
            return STOPPED
        trainer.test()
    return 0


if __name__ == "__main__":
    sys.exit(main())
