"""--paper_protocol reads what the released code reads, in front of everybody; ordinary runs leave the test set alone."""
from __future__ import annotations

import json

import pytest
import torch
from tiny import command, differences, make_images, outcome, signal_at_step

import eval_cifar100
import train_cifar100
from dataloader import Data, build_data
from utils.core.errors import STOPPED
from utils.runs import checkpoint
from utils.training import trainer


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "paper"
    assert train_cifar100.main(command(images, folder, "--paper_protocol")) == 0
    return folder


@pytest.fixture
def reads(monkeypatch):
    """Epochs that are complete whenever the test set is opened."""
    seen, epochs = [], []
    finish, test = trainer.Trainer._finish_epoch, Data.test

    def finish_and_count(self):
        finish(self)
        epochs.append(self.epoch)

    def note(self):
        seen.append(len(epochs))
        return test(self)

    monkeypatch.setattr(trainer.Trainer, "_finish_epoch", finish_and_count)
    monkeypatch.setattr(Data, "test", note)
    return seen


def test_an_ordinary_run_opens_the_test_set_once_after_the_last_epoch(images, tmp_path, reads):
    assert train_cifar100.main(command(images, tmp_path)) == 0
    assert reads == [2]
    assert not (tmp_path / checkpoint.TEST_BEST).exists()
    results = json.loads((tmp_path / "results.json").read_text())
    assert "best_on_test" not in results and all("test_top1" not in entry for entry in results["epochs"])


def test_a_run_of_the_papers_protocol_opens_it_in_every_epoch_and_says_so(images, tmp_path, reads):
    assert train_cifar100.main(command(images, tmp_path, "--paper_protocol")) == 0
    assert reads == [0, 1, 2]
    log = (tmp_path / "train.log").read_text()
    assert log.count("test data choose model_test_best.pth") == 2 and "for comparison with the paper only" in log
    assert log.count("augmented hold-out top-1") == 2


def test_the_epoch_that_test_data_like_best_is_kept_beside_the_others(images, tmp_path, monkeypatch):
    scores = iter([[9.0, 60.0], [70.0, 50.0], [80.0, 60.0]])
    predict = trainer.predict

    def scored(model, batches):
        found = predict(model, batches)
        return found if found.correct.shape[1] == 8 else type("Scored", (), {"top1": next(scores)})   # 8 are held out

    monkeypatch.setattr(trainer, "predict", scored)
    assert train_cifar100.main(command(images, tmp_path, "--paper_protocol", "--epochs", "3")) == 0
    saved = checkpoint.load(tmp_path / checkpoint.TEST_BEST)
    assert (saved["epoch"], saved["epoch_kind"]) == (1, "best on test set")   # of equal epochs the first
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["best_on_test"] == {"epoch": 1, "top1": [9.0, 60.0], "chosen_on": "test set"}
    assert results["best"]["chosen_on"] == "augmented hold-out"
    assert [entry["test_top1"][-1] for entry in results["epochs"]] == [60, 50, 60]


def test_training_itself_is_that_of_an_ordinary_run(images, run, tmp_path):
    assert train_cifar100.main(command(images, tmp_path)) == 0
    latest = [checkpoint.load(folder / checkpoint.LATEST) for folder in (run, tmp_path)]
    assert not list(differences(latest[0]["state_dict"], latest[1]["state_dict"]))
    results = [json.loads((folder / "results.json").read_text()) for folder in (run, tmp_path)]
    assert results[0]["test"]["top1"] == results[1]["test"]["top1"] == results[0]["epochs"][-1]["test_top1"]


@pytest.mark.parametrize("step", [3, 5, 7])
def test_a_run_that_is_stopped_and_resumed_ends_with_the_same_bits(images, run, tmp_path, monkeypatch, step):
    line = command(images, tmp_path, "--paper_protocol")
    with monkeypatch.context() as patch:
        signal_at_step(patch, step)
        assert train_cifar100.main(line) == STOPPED
    assert train_cifar100.main([*line, "--resume"]) == 0
    whole, cut = outcome(run), outcome(tmp_path)
    assert not list(differences(cut, whole))
    chosen = [json.loads((folder / "results.json").read_text())["best_on_test"] for folder in (run, tmp_path)]
    assert chosen[0] == chosen[1]
    assert not list(differences(*(checkpoint.load(folder / checkpoint.TEST_BEST) for folder in (run, tmp_path))))


def test_the_augmented_hold_out_is_cropped_and_flipped_anew_in_every_epoch_but_the_same_again(images):
    def hold_out(augment: bool, epoch: int) -> torch.Tensor:
        data = build_data(dataset="folder", data_root=images, use_valid=True, valid_size=8, augment_valid=augment)
        return torch.cat([batch.images for batch in data.valid(epoch)])

    plain, first, again, second = hold_out(False, 0), hold_out(True, 0), hold_out(True, 0), hold_out(True, 1)
    assert plain.shape == first.shape and torch.equal(first, again) and torch.equal(plain, hold_out(False, 1))
    assert not torch.equal(plain, first) and not torch.equal(first, second)


def test_evaluation_fits_thresholds_on_the_augmented_hold_out_and_names_the_file_for_it(images, run, capsys):
    base = ["--data-root", str(images), "--evaluate-from", str(run / "model_best.pth"), "--device", "cpu",
            "--evalmode", "dynamic"]
    assert eval_cifar100.main(base) == 0
    assert eval_cifar100.main([*base, "--paper_protocol"]) == 0
    assert "8 held-out images with training augmentation" in capsys.readouterr().out
    plain, augmented = (json.loads((run / name).read_text()) for name in ("dynamic.json", "dynamic_augmented.json"))
    assert (plain["augmented_hold_out"], augmented["augmented_hold_out"]) == (False, True)
    assert [p["budget"] for p in plain["points"]] == [p["budget"] for p in augmented["points"]]
    assert [p["thresholds"] for p in plain["points"]] != [p["thresholds"] for p in augmented["points"]]
