"""The training loop: epochs, validation, checkpoints, log lines. CIFAR and ImageNet share it."""
from __future__ import annotations

import time
from typing import Any

from tqdm import tqdm

from utils.core import distributed
from utils.core.errors import Stopped, TrainingDiverged, UserError
from utils.core.rng import rng_state, set_rng_state
from utils.core.signals import StopSignals
from utils.evaluation.modes import evaluate_anytime, result_header
from utils.evaluation.predict import predict
from utils.methods import Method
from utils.runs import checkpoint
from utils.runs.folder import Run, finished
from utils.training.average import WeightAverage
from utils.training.engine import EpochMeters, all_finite, train_epoch
from utils.training.optim import Schedule


class Trainer:
    """A model in training and all that belongs to its state.

    Args:
        method: with the network, of which checkpoints hold the backbone, and the optimiser.
        data: with `train(epoch, first_batch)`, `valid()`, `n_train`, `n_valid`.
        run: folder, log and results.
        schedule: the learning rate, set before every step.
        description: what a checkpoint says about the network besides its weights.
        epochs, start_epoch: train epochs start_epoch ... epochs - 1.
        print_freq: steps between looks at the loss; nothing else in an epoch waits for the device.
        save_every_minutes: save in the middle of an epoch when this long has passed since the last save.
        paper_protocol: read the test set after every epoch and keep the weights it likes best as well, as the released code does.
        teacher_hash: of the weights of another network that the method learns from.
        average: of the weights, which then is what is judged, and what checkpoints hold for all but `resume`.
    """

    def __init__(self, method: Method, data, run: Run, *, schedule: Schedule, description: dict[str, Any], epochs: int,
                 start_epoch: int = 0, print_freq: int = 10, save_every_minutes: float | None = None,
                 paper_protocol: bool = False, teacher_hash: str | None = None,
                 average: WeightAverage | None = None) -> None:
        self.method, self.data, self.run, self.description = method, data, run, description
        self.model, self.optimizer, self.schedule = method.model, method.optimizer, schedule
        self.average, self.judged = average, average.model if average else method.model
        if average:
            self.optimizer.register_step_post_hook(lambda *_: average.update())
        self.schedules = [(self.optimizer, schedule),
                          *((other, schedule.cosine(other.defaults["lr"])) for other in method.other_optimizers)]
        self.epochs, self.epoch, self.print_freq = epochs, start_epoch, print_freq
        self.save_every_minutes, self.last_save = save_every_minutes, time.monotonic()
        self.device = next(self.model.parameters()).device
        self.paper_protocol, self.teacher_hash = paper_protocol, teacher_hash
        hold_out = "augmented hold-out" if paper_protocol else "hold-out"
        self.best = {"epoch": 0, "top1": -1.0, "chosen_on": hold_out if data.n_valid else "last epoch"}
        self.history: list[dict[str, Any]] = []
        self.meters = EpochMeters(self.model.n_exits, self.device)   # of the epoch under way: its steps are the place in it

    def fit(self, signals: StopSignals | None = None) -> bool:
        """Train to the last epoch; False when a signal ended it before that, with everything saved.

        Raises:
            TrainingDiverged: when a loss or a weight is no longer finite; nothing is saved then.
        """
        signals = signals or StopSignals()
        signals.begun = True
        if self.paper_protocol and distributed.is_main():
            self.run.log.info("--paper_protocol: the test set is read after every epoch and chooses %s, and the hold-out, if "
                              "any, is augmented, as in the released code; for comparison with the paper only",
                              checkpoint.TEST_BEST)
        if self.average and distributed.is_main():
            self.run.log.info("--ema %g: figures of hold-out and test, and what checkpoints hold for evaluation, are of the "
                              "averaged weights", self.average.decay)
        try:
            while self.epoch < self.epochs:
                if self._stop(signals):   # the end of the last epoch is saved already
                    return self._log_stopped(signals)
                if not self._train_steps(signals):
                    self._save()
                    return self._log_stopped(signals)
                self._finish_epoch()
        except Stopped:   # between two steps, or after the last one of an epoch, while the hold-out was read
            self._require_finite()
            self._save()   # in here, where the loader is still open: to close it takes long if its file system does not answer
            return self._log_stopped(signals)
        finally:
            self.run.close()
        return True

    @staticmethod
    def _stop(signals: StopSignals) -> bool:
        # Agreed on between two steps, since ranks that stop at different steps would wait for each other for ever.
        return distributed.any_rank(signals.received is not None)

    def _log_stopped(self, signals: StopSignals) -> bool:
        if distributed.is_main():
            self.run.log.info("%s: stopped at %s, all saved; the same command with --resume goes on from there",
                              signals.received or "signal to another process", self._place())
        return False

    def _place(self) -> str:
        return f"step {self.meters.steps} of epoch {self.epoch + 1}" if self.meters.steps else f"the end of epoch {self.epoch}"

    def test(self) -> None:
        """Accuracy of the last epoch's network on the test set, which nothing but --paper_protocol has looked at before."""
        # The first process decides for all, which may not see the same files.
        if distributed.any_rank(distributed.is_main() and finished(self.run.folder, self.epoch)):
            return
        header = result_header(self.content(), self.run.folder, self.judged, self.data)
        self.run.results["test"] = evaluate_anytime(self.judged, self.data, self.run.folder, header=header)
        self.run.save_results()

    def resume(self, saved: dict[str, Any]) -> None:
        """Go on from a checkpoint of this run (from `checkpoint.load_latest`).

        Raises:
            UserError: when it is of other data, another network or another number of processes.
        """
        state, source = saved["training"], f"the run in {self.run.folder}"
        for name, now in self._origin().items():
            then = state.get(name, now)   # older versions did not write all of them down
            if then != now:
                raise UserError(f"{source} cannot be resumed with other data, processes or teacher: {name} was {then}, now {now}")
        checkpoint.load_weights(self.judged.backbone, saved["state_dict"], source)
        if self.average:
            checkpoint.load_weights(self.model.backbone, state.get("weights", {}), source)
        try:
            if self.average:
                self.average.n_averaged = state["n_averaged"]
            self.optimizer.load_state_dict(state["optimizer"])
            self.method.load_state_dict(state["objective"])
            self.meters.load_state_dict(state["figures"])
            set_rng_state(state["rng"])
            self.epoch, self.best, self.history = saved["epoch"], state["best"], state["history"]
            self._note_results()   # the run may have been killed before it wrote them
        except Exception as error:   # whatever a state raises that is another method's, or another optimiser's
            raise UserError(f"{source} cannot be resumed: {type(error).__name__} {error}") from error
        self._reconcile_best(source)
        if distributed.is_main():
            self.run.log.info("resuming at %s", self._place())

    def _reconcile_best(self, source: str) -> None:
        """Make the files of the best epochs those of this history, which a kill between the saves of an epoch may have prevented.

        Where the best file is of an epoch that was lost with the latest checkpoint, or is gone, the best is chosen anew.
        """
        if not distributed.is_main():
            return
        content = self.content()
        for name in self._chosen_files():
            if self._saved_epoch(name, content["state_dict"]) != self.epoch:
                self._save_chosen(name, content)
        if self.best["epoch"] and self._saved_epoch(checkpoint.BEST) != self.best["epoch"]:
            self.run.log.warning("%s has no %s of epoch %d: the best epoch is chosen from the next one on", source,
                                 checkpoint.BEST, self.best["epoch"])
            self.best |= {"epoch": 0, "top1": -1.0}

    def _saved_epoch(self, name: str, weights: dict[str, Any] | None = None) -> int | None:
        """Epoch of a checkpoint of this run; None where it cannot be read, or has other weights than these."""
        try:
            saved = checkpoint.load(self.run.folder / name)
        except (FileNotFoundError, UserError):
            return None
        same = weights is None or checkpoint.hash_weights(saved["state_dict"]) == checkpoint.hash_weights(weights)
        return saved.get("epoch") if same else None

    def _origin(self) -> dict[str, Any]:
        """What makes the batches of an epoch besides the flags: with another value there is no going on."""
        return {"n_train": self.data.n_train, "labels_hash": self.data.labels_hash, "processes": distributed.world_size(),
                "teacher_hash": self.teacher_hash}

    def _set_learning_rates(self, progress: float) -> None:
        for optimizer, schedule in self.schedules:
            lr = schedule(progress)
            for group in optimizer.param_groups:
                group["lr"] = lr

    @property
    def _learning_rate(self) -> float:
        """Of the step under way, or the last one."""
        return self.optimizer.param_groups[0]["lr"]

    def _train_steps(self, signals: StopSignals) -> bool:
        """The steps of an epoch that are still to do; False when a signal came before its end."""
        meters, smoothing = self.meters, self.method.label_smoothing
        batches = self.data.train(self.epoch, first_batch=meters.steps)
        n_steps = meters.steps + len(batches)
        counted = time.perf_counter()

        def count_seconds() -> None:
            nonlocal counted
            now = time.perf_counter()
            meters.seconds, counted = meters.seconds + now - counted, now

        with tqdm(total=n_steps, initial=meters.steps, desc=f"epoch {self.epoch + 1}/{self.epochs}",
                  unit="step", leave=False, disable=None if distributed.is_main() else True) as progress:
            def before_step(step: int) -> None:
                self._set_learning_rates(self.epoch + step / n_steps)

            def after_step(step: int) -> bool:
                progress.update()
                if step % self.print_freq == 0:
                    meters.check(self.epoch, self._learning_rate)
                    if self._save_is_due():
                        count_seconds()
                        self._require_finite()
                        self._save()
                    if not progress.disable:
                        loss = meters.sums[0].sum() / max(meters.samples, 1)
                        progress.set_postfix({"smoothed loss" if smoothing else "loss": f"{loss.item():.3f}"}, refresh=False)
                # Several processes agree only now and then: asking all of them makes each wait for its device.
                return (distributed.world_size() == 1 or step % self.print_freq == 0) and self._stop(signals)

            try:
                complete = train_epoch(self.method, batches, meters, before_step=before_step, after_step=after_step)
            finally:
                count_seconds()
        self._require_finite()
        if complete and not distributed.any_rank(meters.samples > 0):
            raise UserError(f"epoch {self.epoch + 1} had no image to train on: not one could be read")
        return complete

    def _save_is_due(self) -> bool:
        if self.save_every_minutes is None:
            return False
        due = time.monotonic() - self.last_save >= 60 * self.save_every_minutes
        return distributed.any_rank(distributed.is_main() and due)   # by one clock: all have to come to the save

    def _require_finite(self) -> None:
        """Raise TrainingDiverged when a loss of this epoch or a weight is not finite.

        The last update may have spoilt the weights without any loss having shown it.
        """
        self.meters.check(self.epoch, self._learning_rate)
        if not all_finite(self.model.state_dict().values()):
            raise TrainingDiverged(f"the weights became NaN or infinite by {self._place()} (learning rate "
                                   f"{self._learning_rate:g}); try a lower --lr_f, or look at the data")

    def _finish_epoch(self) -> None:
        """Validate, write down and save an epoch whose steps are done."""
        meters = self.meters
        smoothing = self.method.label_smoothing
        entry = {"epoch": self.epoch + 1, "lr": self.schedule(self.epoch), **meters.summary(),
                 **({"label_smoothing": smoothing} if smoothing else {}),   # of train_loss
                 **({"ema": self.average.decay} if self.average else {}),   # of valid_top1 and test_top1
                 "skipped_steps": meters.skipped, "seconds": round(meters.seconds, 3),
                 "images_per_s": round(self.data.n_train / meters.seconds, 1)}
        distributed.share_buffers(self.model)
        if self.average:
            distributed.share_buffers(self.judged)
        entry["valid_top1"] = predict(self.judged, self.data.valid(self.epoch)).top1 if self.data.n_valid else None
        if self.paper_protocol:
            entry["test_top1"] = predict(self.judged, self.data.test()).top1
        self.epoch += 1
        self.meters = EpochMeters(self.model.n_exits, self.device)
        self.history.append(entry)
        # Without a hold-out nothing may choose an epoch: the last one is the result.
        score = entry["valid_top1"][-1] if entry["valid_top1"] else None
        is_best = score is None or score > self.best["top1"]
        if is_best:
            self.best |= {"epoch": self.epoch, "top1": entry["train_top1"][-1] if score is None else score}
        self._log(entry)
        self._save()
        self._note_results()
        self.run.save_results()
        self._write_scalars(entry)   # last: what goes wrong there costs no epoch

    def _note_results(self) -> None:
        self.run.results |= {"epochs": self.history, "best": self.best}
        if self.paper_protocol and self.history:
            chosen = best_on_test(self.history)
            self.run.results["best_on_test"] = {"epoch": chosen["epoch"], "top1": chosen["test_top1"], "chosen_on": "test set"}

    def _save(self) -> None:
        """Write the latest checkpoint and, at the end of an epoch that is the best so far, the file of the best."""
        meters = self.meters.state_dict()   # of all processes, so that all of them have to come here
        self.last_save = time.monotonic()
        if not distributed.is_main():
            return
        content = self.content()
        # The latest one first: it has all that is in the others, which a run that was killed in between writes when it resumes.
        checkpoint.save_latest(self.run.folder, {**content, "training": self._training_state(meters)})
        for name in self._chosen_files():
            self._save_chosen(name, content)

    def _chosen_files(self) -> list[str]:
        """Names of the checkpoints that hold the epoch just done, because it is the best so far."""
        chosen = {checkpoint.BEST: self.best["epoch"]}
        if self.paper_protocol and self.history:
            chosen[checkpoint.TEST_BEST] = best_on_test(self.history)["epoch"]
        return [name for name, epoch in chosen.items() if epoch == self.epoch and not self.meters.steps]

    def _save_chosen(self, name: str, content: dict[str, Any]) -> None:
        kind = content["epoch_kind"]
        if name == checkpoint.TEST_BEST:
            kind = "best on test set"
        elif self.data.n_valid:
            kind = f"best on {self.best['chosen_on']}"
        checkpoint.save(self.run.folder / name, {**content, "epoch_kind": kind})

    def content(self) -> dict[str, Any]:
        """What a checkpoint for evaluation holds, the latest one, which is taken whether or not it is the best."""
        kind = "last epoch" if self.epoch == self.epochs else "epoch"
        if self.meters.steps:
            kind = self._place()
        averaged = {"ema": self.average.decay} if self.average else {}
        return {"state_dict": self.judged.backbone.state_dict(), **averaged, **self.description, "epoch": self.epoch,
                "epoch_kind": kind}

    def _training_state(self, meters: dict[str, Any]) -> dict[str, Any]:
        weights = {"weights": self.model.backbone.state_dict(), "n_averaged": self.average.n_averaged} if self.average else {}
        return {**weights, "optimizer": self.optimizer.state_dict(), "objective": self.method.state_dict(), "figures": meters,
                "best": self.best, "history": self.history, "rng": rng_state(), "config": self.run.results["config"],
                "job": distributed.job(), **self._origin()}

    def _log(self, entry: dict[str, Any]) -> None:
        averaged = " of averaged weights" if self.average else ""
        eta = (self.epochs - self.epoch) * entry["seconds"]
        line = (f"epoch {entry['epoch']}/{self.epochs}  lr {entry['lr']:.4g}  {entry['images_per_s']:.0f} images/s  "
                f"ETA {tqdm.format_interval(eta)}  train top-1 {_join(entry['train_top1'])}")
        if entry["valid_top1"]:
            line += f"  {'augmented ' if self.paper_protocol else ''}hold-out top-1{averaged} {_join(entry['valid_top1'])}"
        if self.paper_protocol:
            line += (f"  test top-1{averaged} {_join(entry['test_top1'])} (test data choose {checkpoint.TEST_BEST}: "
                     f"epoch {best_on_test(self.history)['epoch']} so far)")
        if distributed.is_main():
            self.run.log.info(line)

    def _write_scalars(self, entry: dict[str, Any]) -> None:
        scalars = {"lr": entry["lr"], "images_per_s": entry["images_per_s"]}
        smoothed, averaged = "_smoothed" if "label_smoothing" in entry else "", "_averaged" if self.average else ""
        for name, what in (("train_loss", smoothed), ("train_top1", ""), ("valid_share", ""), ("valid_top1", averaged),
                           ("test_top1", averaged)):
            scalars |= {f"{name}{what}/exit{n + 1}": value for n, value in enumerate(entry.get(name) or [])}
        self.run.scalars(scalars, entry["epoch"])


def best_on_test(history: list[dict[str, Any]]) -> dict[str, Any]:
    """The first epoch with the best accuracy of the last exit on the test set."""
    return max(history, key=lambda entry: entry["test_top1"][-1])


def _join(values: list[float]) -> str:
    return " ".join(f"{value:.2f}" for value in values)
