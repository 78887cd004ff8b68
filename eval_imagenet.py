"""Evaluate a trained network on ImageNet, or any folder of large images, in both prediction modes.

    python eval_imagenet.py --data-root data/imagenet --evaluate-from runs/msdnet/model_best.pth
    torchrun --standalone --nproc_per_node=4 eval_imagenet.py ... --evalmode dynamic --gpu 0,1,2,3
"""
import sys

from args import choose_network, parse_args, require_effect
from dataloader import Data, build_data
from utils.core.distributed import process_group, rank, world_size
from utils.core.errors import user_errors
from utils.core.log import note
from utils.core.machine import choose_device
from utils.evaluation.classify import classify_files, require_own_table
from utils.evaluation.modes import evaluate
from utils.runs import checkpoint
from utils.runs.restore import hold_out, take_over


@user_errors()
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv, datasets=("imagenet", "folder"), task="evaluation")
    device = choose_device(args.device, args.gpu, args.threads)
    with process_group(device, args.dist_backend):
        if args.predictions:
            require_own_table(args.predictions)
        saved = checkpoint.load(args.evaluate_from, args.checkpoint_key)
        split = take_over(args, saved)   # what was trained decides what is evaluated
        if "architecture" not in saved:
            note(choose_network(args))
        require_effect(args)
        held_out = hold_out(args, saved, split)

        def open_data() -> Data:
            return build_data(dataset=args.dataset, data_root=args.data_root, image_size=args.image_size, stem=args.stem,
                              eval_batch_size=args.batch_size, device=device, seed=args.seed, **held_out,
                              augment_valid=args.paper_protocol, val_workers=args.val_workers, decoder=args.decoder,
                              skip_unreadable=args.skip_unreadable,
                              needs_train=args.evalmode != "anytime" or args.calibrate or bool(args.images),
                              rank=rank(), world=world_size())

        if args.images:
            classify_files(args, saved, open_data, device)
        else:
            evaluate(args, saved, open_data(), device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
