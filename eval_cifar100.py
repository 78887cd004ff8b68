"""Evaluate a trained network on small images, in both prediction modes.

    python eval_cifar100.py --data-root data --evaluate-from runs/boost/model_best.pth
    python eval_cifar100.py --data-root data --evaluate-from runs/boost/model_best.pth --evalmode dynamic --budget 40e6
"""
import sys
from pathlib import Path

from args import parse_args, require
from dataloader import build_data
from utils import checkpoint
from utils.errors import user_errors
from utils.evaluation import evaluate_anytime, evaluate_budgeted, header
from utils.restore import restore, take_over
from utils.run import choose_device


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    require(args, "evaluate_from")
    with user_errors():
        return evaluate(args)


def evaluate(args) -> int:
    saved = checkpoint.load(args.evaluate_from)
    split = take_over(args, saved)
    device = choose_device(args.device, args.gpu)
    data = build_data(dataset=args.dataset, data_root=args.data_root, image_size=args.image_size,
                      eval_batch_size=args.batch_size, device=device, split=split, val_workers=args.val_workers)
    args.num_classes = args.num_classes or data.num_classes
    model = restore(args, saved).to(device)

    folder = Path(args.result_dir or Path(args.evaluate_from).parent)
    folder.mkdir(parents=True, exist_ok=True)
    about = header(saved, folder, model, data)
    if args.evalmode == "dynamic":
        evaluate_budgeted(model, data, folder, about=about, budgets=args.budget, released=args.sweep == "released",
                          flat=args.flat_curve, suffix=args.save_suffix)
    else:
        evaluate_anytime(model, data, folder, about=about, suffix=args.save_suffix)
    return 0


if __name__ == "__main__":
    sys.exit(main())
