"""Train an early-exit network on small images (CIFAR-100, CIFAR-10, glyphs or a folder of your own) on one device.

    python train_cifar100.py --data-root data --result_dir runs/boost --arch msdnet_ge --nBlocks 10 --step 2 --nChannels 16 \\
        --lr_milestones 150,225
    python train_cifar100.py ... --method joint          # the baseline, everything else equal
    python train_cifar100.py ... --resume                # the same command: continue runs/boost as if it had never stopped
"""
import sys
from argparse import Namespace

import torch

from args import choose_network, keep_lr_step, parse_args, require_unchanged
from dataloader import build_data
from utils.core.distributed import rank, refuse_other_processes, world_size, wrap
from utils.core.errors import STOPPED, user_errors
from utils.core.log import note
from utils.core.machine import choose_device
from utils.core.rng import make_deterministic, seed_all
from utils.core.signals import StopSignals
from utils.evaluation.fast_form import load_teacher
from utils.methods import build_method
from utils.options.catalog import METHODS
from utils.options.network import NetworkSpec
from utils.runs.checkpoint import hash_weights
from utils.runs.folder import claim, epochs_begun, find_run, start_run
from utils.runs.restore import build_model, describe, require_same_file, stored_split
from utils.training.average import WeightAverage
from utils.training.fast_forward import training_forward
from utils.training.optim import Schedule, build_optimizer
from utils.training.start import (
    freeze_backbone,
    introduce,
    load_start,
    require_same_flags,
    require_same_start,
    require_statistics,
)
from utils.training.trainer import Trainer


@user_errors()
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv, task="training")
    refuse_other_processes("train_imagenet.py")
    device = choose_device(args.device, args.gpu, args.threads)
    with StopSignals(begun=False) as signals:
        return train(args, device, signals)


def train(args: Namespace, device: torch.device, signals: StopSignals) -> int:
    """A whole run, or what is left of it, of this process or of all that `process_group` has joined; returns the exit code."""
    with claim(args.result_dir):
        saved = find_run(args.result_dir, args.resume)
        note(choose_network(args, saved and saved["training"]["config"]))
        if saved:
            keep_lr_step(args, saved["training"]["config"])
            require_unchanged(args, saved["training"]["config"], epochs_begun=epochs_begun(saved))
        require_same_flags(args)

        data = build_data(dataset=args.dataset, data_root=args.data_root, image_size=args.image_size, stem=args.stem,
                          batch_size=args.batch_size, device=device, seed=args.seed, use_valid=args.use_valid,
                          valid_size=args.valid_size, images_per_class=args.images_per_class, split=stored_split(saved),
                          augment_valid=args.paper_protocol,
                          workers=args.workers, val_workers=args.val_workers, decoder=args.decoder,
                          skip_unreadable=args.skip_unreadable, rank=rank(), world=world_size())
        args.num_classes = data.num_classes

        seed_all(args.seed)
        if args.deterministic:
            make_deterministic()
        spec = NetworkSpec.from_args(args)
        if saved:
            require_same_file(spec, saved, args.result_dir)
        model = build_model(spec).to(device)
        if not saved:
            load_start(args, model, data)
        if args.freeze_backbone:
            freeze_backbone(model)
        teacher = load_teacher(args.teacher, data, args.arch).to(device) if args.teacher else None
        teacher_hash = hash_weights(teacher.state_dict()) if teacher else None
        require_same_start(saved, data, model, teacher_hash)
        # What runs in training has the parameters of `model`, which is evaluated and saved.
        network = training_forward(model, batch_size=args.batch_size, amp=args.amp, channels_last=args.channels_last,
                                   compiled=args.compile, cuda_graphs=args.cuda_graphs)
        optimizer = build_optimizer(model.backbone, name=args.optimizer, lr=args.lr_f, momentum=args.momentum,
                                    weight_decay=args.weight_decay, nesterov=args.nesterov)
        schedule = Schedule(args.lr_type, args.lr_f, args.epochs, args.lr_milestones, args.decay_rate, args.lr_step,
                            args.warmup_epochs)
        method = build_method(args, model, optimizer, network=network, teacher=teacher)
        # Not before: a method may need the network as it is without several processes.
        method.network = wrap(network, device, averages=METHODS[args.method].one_call)
        require_statistics(method, data)

        run = start_run(args, data, device, saved)
        introduce(args, data, model, device)
        description = describe(spec, model, data, dataset=args.dataset, seed=args.seed)
        trainer = Trainer(method, data, run, schedule=schedule, description=description, epochs=args.epochs,
                          start_epoch=args.start_epoch, print_freq=args.print_freq,
                          save_every_minutes=args.save_every_minutes, paper_protocol=args.paper_protocol,
                          teacher_hash=teacher_hash, average=WeightAverage(model, args.ema) if args.ema else None)
        if saved:
            trainer.resume(saved)
        elif args.resume:
            run.log.info("nothing to resume in %s: starting from the beginning", run.folder)
        if not trainer.fit(signals):
            return STOPPED
        trainer.test()
    return 0


if __name__ == "__main__":
    sys.exit(main())
