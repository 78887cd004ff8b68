"""The training loop: epochs, validation, checkpoints, log lines. CIFAR and ImageNet share it."""
from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from models import BoostedNet
from utils import checkpoint, distributed
from utils.engine import EpochFigures, predict, train_epoch
from utils.evaluation import evaluate_anytime, header
from utils.methods import build_model
from utils.objective import ExitLosses
from utils.optim import build_optimizer, build_scheduler
from utils.restore import describe
from utils.rng import rng_state, seed_all, set_rng_state
from utils.run import Run, plain, start_run


def prepare(args: argparse.Namespace, data, device: torch.device) -> Trainer:
    """Everything a training run needs, from the parsed flags and opened data; resumes or loads weights where asked to.

    Raises:
        UserError: for flags that fit no network or a folder that cannot be used; nothing has been written then.
    """
    args.num_classes = data.num_classes
    seed_all(args.seed)
    model = build_model(args).to(device)
    if args.checkpoint:
        checkpoint.load_weights(model.backbone, checkpoint.load(args.checkpoint)["state_dict"], args.checkpoint)
    optimizer = build_optimizer(model.backbone, name=args.optimizer, lr=args.lr_f, momentum=args.momentum,
                                weight_decay=args.weight_decay)
    scheduler = build_scheduler(optimizer, kind=args.lr_type, milestones=args.lr_milestones, decay_rate=args.decay_rate,
                                epochs=args.epochs)
    run = start_run(args.result_dir, tensorboard_dir=args.tensorboard_dir, config=plain(vars(args)), split=data.split,
                    device=device)
    trainer = Trainer(model, data, run, optimizer=optimizer, scheduler=scheduler, objective=ExitLosses(args.loss_equal),
                      description=describe(args, model, data), epochs=args.epochs, start_epoch=args.start_epoch,
                      print_freq=args.print_freq)
    if args.resume:
        trainer.resume()
    return trainer


class Trainer:
    """A model in training and all that belongs to its state.

    Args:
        model: the network; checkpoints hold its backbone.
        data: with `train(epoch, first_batch)`, `valid()`, `n_train`, `n_valid`.
        run: folder, log and results.
        description: what a checkpoint says about the network besides its weights.
        epochs, start_epoch: train epochs start_epoch ... epochs - 1.
        print_freq: steps between looks at the loss; nothing else in an epoch waits for the device.
        wrapped: what to call for the training forward pass (DistributedDataParallel); the model itself by default.
    """

    def __init__(self, model: BoostedNet, data, run: Run, *, optimizer: torch.optim.Optimizer,
                 scheduler: torch.optim.lr_scheduler.LRScheduler, objective: ExitLosses, description: dict[str, Any],
                 epochs: int, start_epoch: int = 0, print_freq: int = 10, wrapped: nn.Module | None = None) -> None:
        self.model, self.data, self.run, self.description = model, data, run, description
        self.optimizer, self.scheduler, self.objective = optimizer, scheduler, objective
        self.epochs, self.epoch, self.print_freq = epochs, start_epoch, print_freq
        self.wrapped = wrapped or model
        self.device = next(model.parameters()).device
        self.best = {"epoch": 0, "top1": -1.0, "chosen_on": "hold-out" if data.n_valid else "last epoch"}
        self.history: list[dict[str, Any]] = []
        for _ in range(start_epoch):
            self.optimizer.step()   # no gradients yet: moves nothing, but the schedule expects it in front of its own step
            self.scheduler.step()

    def fit(self) -> None:
        """Train to the last epoch."""
        while self.epoch < self.epochs:
            self._train_one_epoch()

    def test(self) -> None:
        """Accuracy of the last epoch's network on the test set, which nothing before has looked at."""
        about = header(self.content(), self.run.folder, self.model, self.data)
        self.run.results["test"] = evaluate_anytime(self.model, self.data, self.run.folder, about=about)
        self.run.save_results()

    def resume(self) -> bool:
        """Go on from the latest checkpoint of the run folder; False when there is none yet."""
        path = self.run.folder / checkpoint.LATEST
        if not path.exists():
            return False
        saved = checkpoint.load(path)
        checkpoint.load_weights(self.model.backbone, saved["state_dict"], path)
        state = saved["training"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.objective.load_state_dict(state["objective"])
        self.epoch, self.best, self.history = saved["epoch"], state["best"], state["history"]
        set_rng_state(state["rng"])
        return True

    def _train_one_epoch(self) -> None:
        lr = self.optimizer.param_groups[0]["lr"]
        figures = EpochFigures(self.model.n_exits, self.device)
        batches = self.data.train(self.epoch)
        started = time.perf_counter()
        with tqdm(total=len(batches), desc=f"epoch {self.epoch + 1}/{self.epochs}", unit="step", leave=False,
                  disable=None if distributed.is_main() else True) as progress:
            def after_step(step: int) -> bool:
                progress.update()
                if step % self.print_freq == 0:
                    figures.check(self.epoch, lr)
                    if not progress.disable:
                        progress.set_postfix(loss=f"{(figures.sums[0].sum() / figures.samples).item():.3f}", refresh=False)
                return False

            train_epoch(self.wrapped, self.objective, batches, self.optimizer, figures, after_step=after_step)
        figures.check(self.epoch, lr)
        entry = {"epoch": self.epoch + 1, "lr": lr, **figures.summary()}
        seconds = time.perf_counter() - started
        entry |= {"seconds": round(seconds, 3), "images_per_s": round(self.data.n_train / seconds, 1)}
        entry["valid_top1"] = predict(self.model, self.data.valid()).top1 if self.data.n_valid else None
        self.scheduler.step()
        self.epoch += 1
        self.history.append(entry)
        self._finish_epoch(entry)

    def _finish_epoch(self, entry: dict[str, Any]) -> None:
        # Without a hold-out nothing may choose an epoch: the last one is the result.
        score = entry["valid_top1"][-1] if entry["valid_top1"] else None
        is_best = score is None or score > self.best["top1"]
        if is_best:
            self.best |= {"epoch": self.epoch, "top1": entry["train_top1"][-1] if score is None else score}
        self._report(entry)
        if distributed.is_main():
            content = self.content()
            if is_best:
                checkpoint.save(self.run.folder / checkpoint.BEST, content)
            checkpoint.save_latest(self.run.folder, {**content, "training": self._training_state()})
        self.run.results |= {"epochs": self.history, "best": self.best}
        self.run.save_results()

    def content(self) -> dict[str, Any]:
        """What a checkpoint for evaluation holds."""
        kind = "last epoch" if self.epoch == self.epochs else "epoch"
        if self.best["chosen_on"] == "hold-out" and self.best["epoch"] == self.epoch:
            kind = "best on hold-out"
        return {"state_dict": self.model.backbone.state_dict(), **self.description, "epoch": self.epoch, "epoch_kind": kind}

    def _training_state(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict(),
                "objective": self.objective.state_dict(), "best": self.best, "history": self.history, "rng": rng_state()}

    def _report(self, entry: dict[str, Any]) -> None:
        eta = (self.epochs - self.epoch) * entry["seconds"]
        line = (f"epoch {entry['epoch']}/{self.epochs}  lr {entry['lr']:.4g}  {entry['images_per_s']:.0f} images/s  "
                f"ETA {tqdm.format_interval(eta)}  train top-1 {_join(entry['train_top1'])}")
        if entry["valid_top1"]:
            line += f"  hold-out top-1 {_join(entry['valid_top1'])}"
        if distributed.is_main():
            self.run.log.info(line)
        scalars = {"lr": entry["lr"], "images_per_s": entry["images_per_s"]}
        for name in ("train_loss", "train_top1", "valid_share", "valid_top1"):
            scalars |= {f"{name}/exit{n + 1}": value for n, value in enumerate(entry[name] or [])}
        self.run.scalars(scalars, entry["epoch"])


def _join(values: list[float]) -> str:
    return " ".join(f"{value:.2f}" for value in values)
