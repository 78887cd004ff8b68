"""Train an early-exit network on small images (CIFAR-100, CIFAR-10, glyphs or a folder of your own) on one device.

    python train_cifar100.py --data-root data --result_dir runs/boost --arch msdnet_ge --nBlocks 10 --step 2 --nChannels 16 \\
        --lr_milestones 150,225
    python train_cifar100.py ... --method joint          # the baseline, everything else equal
    python train_cifar100.py ... --resume                # continue runs/boost from its latest checkpoint
"""
import sys

from args import parse_args, require
from dataloader import build_data
from utils import checkpoint
from utils.errors import user_errors
from utils.evaluation import evaluate_anytime, header
from utils.methods import build_model
from utils.objective import ExitLosses
from utils.optim import build_optimizer, build_scheduler
from utils.restore import describe
from utils.rng import seed_all
from utils.run import choose_device, plain, saved_split, start_run
from utils.trainer import Trainer


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    require(args, "result_dir")
    with user_errors():
        return train(args)


def train(args) -> int:
    device = choose_device(args.device, args.gpu)
    data = build_data(dataset=args.dataset, data_root=args.data_root, image_size=args.image_size, batch_size=args.batch_size,
                      device=device, seed=args.seed, use_valid=args.use_valid, valid_size=args.valid_size,
                      split=saved_split(args.result_dir, args.resume), workers=args.workers, val_workers=args.val_workers)
    args.num_classes = data.num_classes
    seed_all(args.seed)
    model = build_model(args).to(device)
    optimizer = build_optimizer(model.backbone, name=args.optimizer, lr=args.lr_f, momentum=args.momentum,
                                weight_decay=args.weight_decay)
    scheduler = build_scheduler(optimizer, kind=args.lr_type, milestones=args.lr_milestones, decay_rate=args.decay_rate,
                                epochs=args.epochs)
    if args.checkpoint:
        checkpoint.load_weights(model.backbone, checkpoint.load(args.checkpoint)["state_dict"], args.checkpoint)

    # Everything that can be refused has been by now: only here is the run folder touched.
    run = start_run(args.result_dir, tensorboard_dir=args.tensorboard_dir, config=plain(vars(args)), split=data.split,
                    device=device)
    trainer = Trainer(model, data, run, optimizer=optimizer, scheduler=scheduler, objective=ExitLosses(args.loss_equal),
                      description=describe(args, model, data), epochs=args.epochs, start_epoch=args.start_epoch,
                      print_freq=args.print_freq)
    if args.resume:
        trainer.resume()
    trainer.fit()
    run.results["test"] = evaluate_anytime(model, data, run.folder, about=header(trainer.content(), run.folder, model, data))
    run.save_results()
    run.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
