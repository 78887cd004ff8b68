"""What goes wrong while training ends it with one clear line, spoils nothing that was saved, and shows no traceback."""
from __future__ import annotations

import errno
import os
import pickle
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import command, differences, files_no_larger_than, make_images, one_line_error, outcome, signal_at_step

import eval_cifar100
import train_cifar100
from models import BoostedNet
from utils.core import lock
from utils.core.errors import FAILURE, STOPPED
from utils.evaluation import modes
from utils.methods import Method
from utils.runs import checkpoint
from utils.runs.result_files import RESULTS
from utils.training.engine import EpochMeters, TrainingDiverged


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory) -> Path:
    """A run of one epoch of five steps; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    assert train_cifar100.main(command(images, folder, "--epochs", "1")) == 0
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of `finished`, to go on with."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def saved_files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (checkpoint.LATEST, checkpoint.BEST, RESULTS)}


def spoil_step(monkeypatch, step: int, exit_number: int = 2) -> None:
    """Make the predictions of an exit NaN in the `step`-th training step from now."""
    forward, steps = BoostedNet.forward, iter(range(1, 10**9))

    def spoilt_forward(self, x):
        predictions = forward(self, x)
        if self.training and next(steps) == step:
            predictions[exit_number - 1] = predictions[exit_number - 1] * float("nan")
        return predictions

    monkeypatch.setattr(BoostedNet, "forward", spoilt_forward)


# Bad numbers.

def test_a_loss_that_is_not_finite_ends_training_and_leaves_the_last_good_checkpoint(images, run, monkeypatch, capsys):
    before = saved_files(run)
    spoil_step(monkeypatch, step=2)
    message = one_line_error(capsys, lambda: train_cifar100.main(command(images, run, "--resume")), FAILURE)
    for part in ("exit 2", "epoch 2", "step 2", "learning rate 0.01"):
        assert part in message
    assert saved_files(run) == before


def test_a_learning_rate_that_is_far_too_high_is_found_out(images, tmp_path, capsys):
    message = one_line_error(capsys, lambda: train_cifar100.main(command(images, tmp_path, "--lr_f", "1e30")), FAILURE)
    assert "NaN or infinite at epoch 1, step " in message and "learning rate 1e+30" in message
    assert not list(tmp_path.glob("*.pth")) or [path.name for path in tmp_path.glob("*.pth")] == ["split.pth"]


def test_nothing_is_saved_when_a_signal_comes_after_the_bad_step_and_before_the_next_look(images, run, monkeypatch, capsys):
    before = saved_files(run)
    spoil_step(monkeypatch, step=1)
    signal_at_step(monkeypatch, step=2, number=signal.SIGTERM)
    one_line_error(capsys, lambda: train_cifar100.main(command(images, run, "--resume")), FAILURE)
    assert saved_files(run) == before


def test_weights_spoilt_by_the_last_step_of_an_epoch_are_not_saved_though_no_loss_showed_it(images, run, monkeypatch, capsys):
    before, step, steps = saved_files(run), torch.optim.SGD.step, iter(range(10**9))

    def spoiling_step(self, *arguments):
        step(self, *arguments)
        if next(steps) == 4:
            self.param_groups[0]["params"][0].data[0] = float("inf")

    monkeypatch.setattr(torch.optim.SGD, "step", spoiling_step)
    message = one_line_error(capsys, lambda: train_cifar100.main(command(images, run, "--resume")), FAILURE)
    assert "the weights became NaN or infinite by step 5 of epoch 2" in message
    assert saved_files(run) == before


def test_the_loss_is_looked_at_once_per_log_interval_and_at_the_end(images, tmp_path, monkeypatch):
    looks, check = [], EpochMeters.check
    monkeypatch.setattr(EpochMeters, "check", lambda self, *arguments: (looks.append(self.steps), check(self, *arguments)))
    assert train_cifar100.main(command(images, tmp_path, "--epochs", "1", "--print-freq", "2")) == 0
    assert looks == [2, 4, 5]


def test_figures_remember_the_first_bad_step_of_each_exit():
    meters, labels = EpochMeters(2, torch.device("cpu")), torch.tensor([0, 1])
    predictions = [torch.zeros(2, 2)] * 2
    for losses in ([[1., 1.], [1., 1.]], [[1., 1.], [1., float("inf")]], [[float("nan"), 1.], [float("nan"), 1.]]):
        meters.add(predictions, labels, torch.tensor(losses))
    assert meters.first_bad.tolist() == [2, 1]
    with pytest.raises(TrainingDiverged, match="exit 2 became NaN or infinite at epoch 8, step 2 .*0.5"):
        meters.check(epoch=7, lr=0.5)


# Files that cannot be written or read.

def test_a_disk_that_fills_up_ends_training_with_path_and_reason_and_leaves_the_checkpoint(images, run, capsys):
    before = saved_files(run)
    with files_no_larger_than(50_000):
        message = one_line_error(capsys, lambda: train_cifar100.main(command(images, run, "--resume")), FAILURE)
    assert f"{run}/model_" in message and "File too large" in message
    assert saved_files(run) == before and not list(run.glob("*.boostnet-tmp.*"))
    assert train_cifar100.main(command(images, run, "--resume")) == 0   # when there is room again


def test_a_result_folder_that_cannot_be_made_is_named(images, tmp_path, capsys):
    (tmp_path / "file").touch()
    message = one_line_error(capsys, lambda: train_cifar100.main(command(images, tmp_path / "file/run")))
    assert f"--result_dir {tmp_path}/file/run cannot be written: Not a directory" in message


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS], ids=errno.errorcode.get)
def test_a_read_only_result_folder_is_named(images, tmp_path, monkeypatch, capsys, number):
    def refuse(path, *_):
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(lock, "open", refuse, raising=False)   # root could write into a folder with any permissions
    message = one_line_error(capsys, lambda: train_cifar100.main(command(images, tmp_path)))
    assert f"--result_dir {tmp_path} cannot be written: {os.strerror(number)}" in message


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_to_the_same_bits(images, tmp_path, capsys):
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    assert train_cifar100.main(command(images, cut, "--epochs", "3")) == 0
    (cut / checkpoint.LATEST).unlink()
    (cut / checkpoint.LATEST).write_bytes(b"")
    capsys.readouterr()
    assert train_cifar100.main(command(images, cut, "--epochs", "4", "--resume")) == 0
    printed = capsys.readouterr().out
    assert f"{checkpoint.LATEST} cannot be read" in printed and "going on from model_previous.pth" in printed
    assert "resuming at the end of epoch 2" in printed
    assert train_cifar100.main(command(images, whole, "--epochs", "4")) == 0
    assert not list(differences(outcome(cut), outcome(whole)))


def test_a_run_without_a_good_checkpoint_is_not_started_over(images, run, capsys):
    (run / checkpoint.LATEST).write_bytes(b"nothing")
    message = one_line_error(capsys, lambda: train_cifar100.main(command(images, run, "--resume")))
    assert checkpoint.LATEST in message and (run / checkpoint.LATEST).read_bytes() == b"nothing"


def test_half_written_files_are_swept_when_a_run_starts(images, tmp_path):
    """All that is the run's own, and what an evaluation left long ago; one that writes beside it is not disturbed."""
    for name in ("model_latest.pth", "results.json", "dynamic.json", "anytime.json"):
        (tmp_path / f"{name}.boostnet-tmp.12345").touch()
    os.utime(tmp_path / "anytime.json.boostnet-tmp.12345", (time.time() - 4000,) * 2)
    assert train_cifar100.main(command(images, tmp_path, "--epochs", "1")) == 0
    assert [path.name for path in tmp_path.glob("*.boostnet-tmp.*")] == ["dynamic.json.boostnet-tmp.12345"]


def test_a_signal_after_steps_that_were_all_left_out_saves_like_any_other(images, finished, run, monkeypatch):
    """Batches whose images cannot be read, say: nothing has diverged."""
    step, skip = Method.step, EpochMeters.skip

    def skip_and_signal(self):
        skip(self)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Method, "step", lambda *_: None)
        patch.setattr(EpochMeters, "skip", skip_and_signal)
        assert train_cifar100.main(command(images, run, "--resume")) == STOPPED
    saved = checkpoint.load(run / checkpoint.LATEST)
    assert (saved["epoch"], saved["training"]["figures"]["steps"], saved["training"]["figures"]["samples"]) == (1, 1, [0])
    assert step is Method.step and train_cifar100.main(command(images, run, "--resume")) == 0


def test_an_epoch_without_an_image_ends_training_with_one_line(images, run, monkeypatch, capsys):
    before = saved_files(run)
    monkeypatch.setattr(Method, "step", lambda *_: None)
    message = one_line_error(capsys, lambda: train_cifar100.main(command(images, run, "--resume")))
    assert "epoch 2 had no image to train on" in message and saved_files(run) == before


def test_a_result_folder_that_cannot_be_written_is_named_before_the_evaluation(images, finished, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(modes, "predict", lambda *_: pytest.fail("evaluated first"))
    line = ["--data-root", str(images), "--evaluate-from", str(finished / checkpoint.BEST), "--device", "cpu"]
    message = one_line_error(capsys, lambda: eval_cifar100.main([*line, "--result_dir", str(tmp_path / "file/here")]))
    assert f"--result_dir {tmp_path}/file/here cannot be written: Not a directory" in message

    def refuse(**_):   # root may write anywhere but in a read-only file system
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    message = one_line_error(capsys, lambda: eval_cifar100.main([*line, "--result_dir", str(tmp_path)]))
    assert f"--result_dir {tmp_path} cannot be written: Read-only file system" in message


# A user's mistakes, from end to end.

def empty_class(folder):
    for file in (folder / "train/class1").iterdir():
        file.unlink()


def another_size(folder):
    Image.new("RGB", (40, 32)).save(folder / "train/class0/0.png")


def half_an_image(folder):
    path = folder / "test/class2/1.png"
    path.write_bytes(path.read_bytes()[:50])


def no_image_at_all(folder):
    (folder / "train/class0/0.png").write_text("hello")


def missing_test_folder(folder):
    shutil.rmtree(folder / "test")


def missing_class(folder):
    shutil.rmtree(folder / "test/class1")


@pytest.mark.parametrize(("harm", "words"), [
    (empty_class, "train/class1 has no images"), (another_size, "class0/0.png is 40x32 pixels"),
    (half_an_image, "class2/1.png cannot be read as an image"), (no_image_at_all, "class0/0.png cannot be read as an image"),
    (missing_test_folder, "has no 'test' or 'val' folder"), (missing_class, "lacks 1 of the class folders")],
    ids=lambda value: getattr(value, "__name__", None))
def test_data_that_are_not_right_end_training_with_one_line(tmp_path, capsys, harm, words):
    images = make_images(tmp_path / "images", train=4, test=2)
    harm(images)
    assert words in one_line_error(capsys, lambda: train_cifar100.main(command(images, tmp_path / "run")))


def test_labels_outside_the_range_end_training_with_one_line(tmp_path, capsys):
    archive = tmp_path / "cifar-100-python"
    archive.mkdir()
    import numpy as np
    part = {"data": np.zeros((20, 3072), np.uint8), "fine_labels": [*range(19), 100]}
    for name in ("train", "test"):
        (archive / name).write_bytes(pickle.dumps(part, 2))
    (archive / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class{i}" for i in range(100)]}, 2))
    line = command(tmp_path, tmp_path / "run", "--dataset", "cifar100")
    assert "train is damaged (its labels go from 0 to 100)" in one_line_error(capsys, lambda: train_cifar100.main(line))


def evaluate(images: Path, file: Path, *more: str) -> int:
    return eval_cifar100.main(["--data-root", str(images), "--evaluate-from", str(file), "--device", "cpu", *more])


def test_evaluation_with_a_hold_out_of_other_data_is_refused(finished, tmp_path, capsys):
    images = make_images(tmp_path / "images", train=17)
    shutil.copy(finished / checkpoint.BEST, tmp_path)
    message = one_line_error(capsys, lambda: evaluate(images, tmp_path / checkpoint.BEST))
    assert "hold-out split is of 48 training images, but the data folder has 51" in message


def test_evaluation_on_other_classes_is_refused(finished, images, tmp_path, capsys):
    other = Path(shutil.copytree(images, tmp_path / "images"))
    for part in ("train", "test"):
        (other / part / "class2").rename(other / part / "zebra")
    shutil.copy(finished / checkpoint.BEST, tmp_path)
    assert "other classes" in one_line_error(capsys, lambda: evaluate(other, tmp_path / checkpoint.BEST))


@pytest.mark.parametrize(("budget", "message"), [
    ("nan", "expected a finite number, got 'nan'"), ("inf", "expected a finite number, got 'inf'"), ("-1", "above 0"),
    ("0", "above 0"), ("1", "budget 1 is out of range"), ("1e30", "budget 1e+30 is out of range"),
    ("1e6,nan", "expected a finite number, got 'nan'"), ("x", "expected a finite number, got 'x'")])
def test_a_budget_that_is_none_is_refused(finished, images, tmp_path, capsys, budget, message):
    shutil.copy(finished / checkpoint.BEST, tmp_path)
    line = ["--evalmode", "dynamic", f"--budget={budget}"]
    assert message in one_line_error(capsys, lambda: evaluate(images, tmp_path / checkpoint.BEST, *line))


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", pickle.dumps(print, 2)])
@pytest.mark.parametrize("flag", ["--evaluate-from", "--checkpoint"])
def test_a_file_that_is_no_checkpoint_is_refused(images, tmp_path, capsys, flag, content):
    file = tmp_path / "file.pth"
    file.write_bytes(content)
    message = one_line_error(capsys, (lambda: evaluate(images, file)) if flag == "--evaluate-from" else
                             (lambda: train_cifar100.main(command(images, tmp_path / "run", flag, str(file)))))
    assert str(file) in message
