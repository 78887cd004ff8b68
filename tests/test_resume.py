"""A run that is stopped anywhere and resumed ends with the bits of a run that never stopped."""
from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import command, differences, make_images, one_line_error, outcome, signal_at_step

import args as cli
import train_cifar100
from models import BoostedNet
from utils.core.errors import STOPPED
from utils.core.machine import peak_memory
from utils.methods.losses import ExitLosses
from utils.runs import checkpoint
from utils.training import trainer
from utils.training.optim import Schedule

# Between them every kind of state: momentum and Adam's averages, both schedules, the averages of --loss_equal.
SETUPS = {
    "boosted": [],
    "joint": "--method joint --optimizer adam --lr_f 0.01 --lr-type cosine --loss_equal --arch msdnet".split(),
    "linear": "--lr-type linear --nesterov --warmup_epochs 0.5".split(),
    "averaged": "--ema 0.8 --lr-type cosine".split(),
}
STEPS = 10   # two epochs of five


@pytest.fixture(autouse=True)
def noisy_network(monkeypatch):
    """As with dropout, every step draws random numbers, here from all generators: a state not restored must show."""
    forward = BoostedNet.forward

    def noisy_forward(self, x):
        if self.training:
            x = x + 0.01 * (torch.randn_like(x) + random.random() + np.random.rand())
        return forward(self, x)

    monkeypatch.setattr(BoostedNet, "forward", noisy_forward)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def uninterrupted(images, tmp_path_factory):
    """Outcome of an uninterrupted run of a setup, computed when first asked for."""
    known = {}

    def run(setup: str):
        if setup not in known:
            folder = tmp_path_factory.mktemp(setup)
            assert train_cifar100.main(command(images, folder, *SETUPS[setup])) == 0
            known[setup] = outcome(folder)
        return known[setup]

    return run


def stop_and_resume(images, folder, setup, step, monkeypatch) -> None:
    line = command(images, folder, *SETUPS[setup])
    with monkeypatch.context() as patch:
        signal_at_step(patch, step)
        assert train_cifar100.main(line) == STOPPED
    assert train_cifar100.main([*line, "--resume"]) == 0


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_run_stopped_after_any_step_ends_as_if_it_had_not_been(images, uninterrupted, tmp_path, monkeypatch, step):
    stop_and_resume(images, tmp_path, "boosted", step, monkeypatch)
    assert not list(differences(outcome(tmp_path), uninterrupted("boosted")))


@pytest.mark.parametrize("setup", ["joint", "linear", "averaged"])
@pytest.mark.parametrize("step", [2, 5, 8])
def test_adam_rates_per_batch_and_averages_come_back_as_they_were(images, uninterrupted, tmp_path, monkeypatch, step, setup):
    stop_and_resume(images, tmp_path, setup, step, monkeypatch)
    assert not list(differences(outcome(tmp_path), uninterrupted(setup)))


def rates(monkeypatch, line) -> tuple[int, list[float]]:
    """Exit code of a training, and the learning rate of each of its steps."""
    seen, step = [], torch.optim.SGD.step
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", lambda self: seen.append(self.param_groups[0]["lr"]) or step(self))
        return train_cifar100.main(line), seen


def test_every_step_has_the_rate_of_its_place_in_the_run(images, tmp_path, monkeypatch):
    expected = [0.05 * (1 + math.cos(math.pi * n / STEPS)) for n in range(STEPS)]
    code, seen = rates(monkeypatch, command(images, tmp_path, "--lr-type", "cosine"))
    assert code == 0 and seen == pytest.approx(expected, rel=1e-12)
    assert [entry["lr"] for entry in outcome(tmp_path)["results"]["epochs"]] == pytest.approx([0.1, 0.05])


@pytest.mark.parametrize("lr_type", ["cosine", "multistep"])
def test_a_run_from_before_the_flag_goes_on_with_one_rate_per_epoch_however_often_it_is_stopped(images, tmp_path, monkeypatch,
                                                                                                lr_type, capsys):
    line = command(images, tmp_path, "--lr-type", lr_type)
    with monkeypatch.context() as patch:
        signal_at_step(patch, 2)
        assert train_cifar100.main([*line, *(["--lr_step", "epoch"] if lr_type == "cosine" else [])]) == STOPPED
    saved = checkpoint.load(tmp_path / checkpoint.LATEST)
    for name in ("lr_step", "warmup_epochs", "nesterov"):
        del saved["training"]["config"][name]
    checkpoint.save(tmp_path / checkpoint.LATEST, saved)
    capsys.readouterr()
    if lr_type == "cosine":
        message = one_line_error(capsys, lambda: train_cifar100.main([*line, "--resume", "--lr_step", "batch"]))
        assert "--lr_step 'batch' (was 'epoch')" in message
    seen = []
    for stop in (2, 3, None):   # the steps 2 to 9 are left
        with monkeypatch.context() as patch:
            if stop:
                signal_at_step(patch, stop)
            code, more = rates(patch, [*line, "--resume"])
        assert code == (STOPPED if stop else 0)
        seen += more
    second = Schedule(lr_type, 0.1, epochs=2, milestones=[1], step="epoch")(1)
    assert seen == [0.1] * 3 + [second] * 5


def test_a_run_may_be_stopped_many_times(images, uninterrupted, tmp_path, monkeypatch):
    line = command(images, tmp_path)
    for _ in range(4):
        with monkeypatch.context() as patch:
            signal_at_step(patch, 2)
            assert train_cifar100.main([*line, "--resume"]) == STOPPED   # the first time there is nothing to resume yet
    assert train_cifar100.main([*line, "--resume"]) == 0
    assert not list(differences(outcome(tmp_path), uninterrupted("boosted")))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("arch", ["msdnet_ge", "ranet_ge"])
def test_deterministic_runs_resume_to_the_same_bits(images, tmp_path, monkeypatch, deterministic, device, arch):
    more = f"--deterministic --device {device} --arch {arch} --grFactor 4-2-1 --bnFactor 4-2-1".split()
    more += ["--block-step", "1"] if arch == "ranet_ge" else []
    assert train_cifar100.main(command(images, tmp_path / "whole", *more)) == 0
    assert torch.are_deterministic_algorithms_enabled()
    with monkeypatch.context() as patch:
        signal_at_step(patch, 7)
        assert train_cifar100.main(command(images, tmp_path / "cut", *more)) == STOPPED
    assert train_cifar100.main(command(images, tmp_path / "cut", *more, "--resume")) == 0
    assert not list(differences(outcome(tmp_path / "cut"), outcome(tmp_path / "whole")))


def test_the_best_epoch_so_far_stays_the_best(images, tmp_path, monkeypatch):
    scores = iter([50.0, 40.0])
    monkeypatch.setattr(trainer, "predict", lambda *_: SimpleNamespace(top1=[0.0, next(scores)]))
    stop_and_resume(images, tmp_path, "boosted", 7, monkeypatch)
    assert checkpoint.load(tmp_path / checkpoint.BEST)["epoch"] == 1
    assert outcome(tmp_path)["results"]["best"] == {"epoch": 1, "top1": 50.0, "chosen_on": "hold-out"}


def test_more_epochs_continue_a_finished_run(images, uninterrupted, tmp_path):
    for line in (command(images, tmp_path, "--epochs", "1"), command(images, tmp_path, "--resume")):
        assert train_cifar100.main(line) == 0
    assert not list(differences(outcome(tmp_path), uninterrupted("boosted")))


@pytest.mark.parametrize(("missing", "owner", "function"), [
    ("model_best.pth", checkpoint, "save"), ("model_latest.pth", checkpoint, "save_latest"),
    ("results.json", trainer.Run, "save_results")])
def test_a_run_that_dies_among_the_saves_of_an_epoch_ends_as_if_it_had_not(images, uninterrupted, tmp_path, monkeypatch,
                                                                           missing, owner, function):
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(owner, function, killed)
        train_cifar100.main(command(images, tmp_path))
    assert not (tmp_path / missing).exists()
    assert train_cifar100.main([*command(images, tmp_path), "--resume"]) == 0
    assert not list(differences(outcome(tmp_path), uninterrupted("boosted")))


def test_results_that_a_killed_run_did_not_write_are_written_when_it_is_resumed(images, tmp_path, monkeypatch):
    line = command(images, tmp_path, "--epochs", "1")
    assert train_cifar100.main(line) == 0
    complete = outcome(tmp_path)
    (tmp_path / "results.json").unlink()
    assert train_cifar100.main([*line, "--resume"]) == 0   # no epoch is left to do
    assert not list(differences(outcome(tmp_path), complete))


def test_a_finished_run_that_is_resumed_is_left_as_it_is(images, tmp_path, monkeypatch, capsys):
    line = command(images, tmp_path, "--epochs", "1")
    assert train_cifar100.main(line) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.[jp]*")}
    monkeypatch.setattr(trainer, "evaluate_anytime", lambda *_, **__: pytest.fail("the test set is read again"))
    assert train_cifar100.main([*line, "--resume"]) == 0
    assert "is finished: nothing to do" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.[jp]*")} == before


def test_after_a_kill_between_the_saves_of_an_epoch_the_best_file_is_that_of_the_results(images, tmp_path, monkeypatch):
    """On a GPU a repeated epoch may score otherwise, and then would not be the best that its file claims."""
    scores = iter([50.0, 60.0, 40.0, 30.0])
    monkeypatch.setattr(trainer, "predict", lambda *_: SimpleNamespace(top1=[0.0, next(scores)]))
    assert train_cifar100.main(command(images, tmp_path, "--epochs", "1")) == 0
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(checkpoint, "save", killed)
        train_cifar100.main(command(images, tmp_path, "--resume"))
    assert train_cifar100.main(command(images, tmp_path, "--epochs", "3", "--resume")) == 0
    assert checkpoint.load(tmp_path / checkpoint.BEST)["epoch"] == outcome(tmp_path)["results"]["best"]["epoch"] == 2


def killed(*_):
    raise RuntimeError("killed")


@pytest.mark.parametrize(("scores", "best"), [
    ([60.0, 70.0, 50.0], (1, 60.0)),         # the first epoch is the best again: the previous checkpoint has its weights
    ([60.0, 50.0, 70.0, 40.0], (3, 40.0)),   # its weights are lost, and so is the epoch whose weights the best file has
])
def test_when_the_latest_checkpoint_is_lost_the_best_file_still_fits_the_results(images, tmp_path, monkeypatch, scores, best):
    epochs, scores = str(len(scores) - 1), iter(scores)
    monkeypatch.setattr(trainer, "predict", lambda *_: SimpleNamespace(top1=[0.0, next(scores)]))
    assert train_cifar100.main(command(images, tmp_path, "--epochs", epochs)) == 0
    (tmp_path / checkpoint.LATEST).unlink()
    assert train_cifar100.main(command(images, tmp_path, "--epochs", epochs, "--resume")) == 0
    said = outcome(tmp_path)["results"]["best"]
    assert (said["epoch"], said["top1"]) == best and checkpoint.load(tmp_path / checkpoint.BEST)["epoch"] == best[0]


@pytest.mark.parametrize("setup", ["boosted", "linear", "averaged"])
def test_a_run_that_is_killed_in_mid_epoch_goes_on_from_what_it_saved_by_the_clock(images, uninterrupted, tmp_path, monkeypatch,
                                                                                   setup):
    """Every third step is a look at the clock, which here always says that it is time."""
    line = command(images, tmp_path, "--save_every_minutes", "1e-9", *SETUPS[setup])
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        add, steps = trainer.EpochMeters.add, iter(range(1, 10**9))
        patch.setattr(trainer.EpochMeters, "add", lambda self, *a: killed() if next(steps) == 10 else add(self, *a))
        train_cifar100.main(line)
    saved = checkpoint.load(tmp_path / checkpoint.LATEST)
    assert (saved["epoch"], saved["epoch_kind"]) == (1, "step 3 of epoch 2") and saved["training"]["figures"]["seconds"] > 0
    assert train_cifar100.main([*line, "--resume"]) == 0
    assert not list(differences(outcome(tmp_path), uninterrupted(setup)))


def test_the_clock_is_that_of_the_first_process_and_starts_again_with_every_save(images, tmp_path, monkeypatch):
    now, saved = [0.0], []
    monkeypatch.setattr(trainer.time, "monotonic", lambda: now[0])
    add, save = trainer.EpochMeters.add, checkpoint.save_latest

    def minute_passes(self, *arguments):
        now[0] += 60
        add(self, *arguments)

    monkeypatch.setattr(trainer.EpochMeters, "add", minute_passes)
    monkeypatch.setattr(checkpoint, "save_latest", lambda *a: saved.append(a[1]["epoch_kind"]) or save(*a))
    line = command(images, tmp_path, "--save_every_minutes", "2", "--epochs", "1", "--print-freq", "1")
    assert train_cifar100.main(line) == 0
    assert saved[:2] == ["step 2 of epoch 1", "step 4 of epoch 1"] and len(saved) == 3


def test_a_job_that_torchrun_starts_again_resumes_its_own_run_and_no_other(images, uninterrupted, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job a")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    line = command(images, tmp_path)
    with monkeypatch.context() as patch:
        signal_at_step(patch, 7)
        assert train_cifar100.main(line) == STOPPED
    capsys.readouterr()
    assert "already holds a run" in one_line_error(capsys, lambda: train_cifar100.main(line))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with monkeypatch.context() as patch:
        patch.setenv("TORCHELASTIC_RUN_ID", "job b")
        assert "already holds a run" in one_line_error(capsys, lambda: train_cifar100.main(line))
    assert train_cifar100.main(line) == 0
    assert not list(differences(outcome(tmp_path), uninterrupted("boosted")))


def test_whether_a_run_is_finished_the_first_process_says_for_all(images, finished, monkeypatch):
    """Another one may not see the results yet, and would wait alone for the others in the test pass."""
    asked = []
    monkeypatch.setattr(trainer, "finished", lambda *_: asked.append(True) or True)
    monkeypatch.setattr(trainer.distributed, "is_main", lambda: False)
    monkeypatch.setattr(trainer.distributed, "any_rank", lambda flag: asked.append(flag) or True)
    trainer.Trainer.test(SimpleNamespace(run=None, epoch=1))
    assert asked == [False]


# What a resumed run would go wrong without, and the setup that notices.
PIECES = {
    "weights": (checkpoint, "load_weights", "boosted"), "momentum": (torch.optim.SGD, "load_state_dict", "boosted"),
    "Adam's averages": (torch.optim.Adam, "load_state_dict", "joint"),
    "loss averages": (ExitLosses, "load_state_dict", "joint"),
    "place in the epoch": (trainer.EpochMeters, "load_state_dict", "boosted"),
    "random.random": (random, "setstate", "boosted"), "np.random": (np.random, "set_state", "boosted"),
    "torch.rand": (torch, "set_rng_state", "boosted"),
    "average": (checkpoint, "load_weights", "averaged"),
}


@pytest.mark.parametrize("piece", PIECES)
def test_the_comparison_notices_a_piece_of_state_that_is_not_restored(images, uninterrupted, tmp_path, monkeypatch, piece):
    owner, name, setup = PIECES[piece]
    line = command(images, tmp_path, *SETUPS[setup])
    with monkeypatch.context() as patch:
        signal_at_step(patch, 8)
        assert train_cifar100.main(line) == STOPPED
    monkeypatch.setattr(owner, name, lambda *_: None)
    assert train_cifar100.main([*line, "--resume"]) == 0
    assert list(differences(outcome(tmp_path), uninterrupted(setup)))


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    assert train_cifar100.main(command(images, folder, "--epochs", "1")) == 0
    return folder


CHANGES = ["--nBlocks 3", "--nChannels 8", "--arch msdnet", "--method joint", "--ensemble_reweight 0.2", "--trainable_ensemble",
           "--seed 1", "--valid_size 9", "--batch-size 16", "--optimizer adam", "--lr_f 0.2", "--lr-type cosine",
           "--lr-type linear", "--lr_milestones 2", "--decay-rate 0.5", "--nesterov", "--warmup_epochs 0.5",
           "--label_smoothing 0.1", "--ema 0.9", "--momentum 0.8", "--weight-decay 0", "--loss_equal", "--dataset glyphs",
           "--amp bf16", "--channels_last", "--compile"]


@pytest.mark.parametrize("change", CHANGES)
def test_a_flag_that_changes_model_data_or_schedule_is_refused(images, finished, capsys, change):
    line = command(images, finished, "--epochs", "1", "--resume", *change.split())
    assert f"{change.split()[0]} " in one_line_error(capsys, lambda: train_cifar100.main(line))


def test_all_changes_are_listed_with_both_values(images, finished, capsys):
    line = command(images, finished, "--resume", "--lr_f", "0.2", "--batch-size", "16", "--lr_milestones", "2,4")
    message = one_line_error(capsys, lambda: train_cifar100.main(line))
    assert all(part in message for part in ("--lr_f 0.2 (was 0.1)", "--batch-size 16 (was 8)", "--lr_milestones 2, 4 (was 1)"))


def test_flags_about_where_and_how_a_run_is_shown_may_change(images, finished, tmp_path):
    more = f"--workers 2 --val_workers 0 --device auto --gpu 1 --print-freq 1 --save_every_minutes 9 --tensorboard_dir {tmp_path}"
    assert train_cifar100.main(command(images, finished, "--epochs", "1", "--resume", *more.split())) == 0


def test_every_flag_is_either_free_or_compared(capsys):
    args = cli.parse_args(["--result_dir", "r"])
    for name in vars(cli.build_parser().parse_args([])):
        other = {**vars(args), name: "another value"}
        if name in cli.FREE_ON_RESUME | {"epochs"}:
            cli.require_unchanged(args, other, epochs_begun=0)
        else:
            message = one_line_error(capsys, lambda other=other: cli.require_unchanged(args, other, epochs_begun=0))
            assert "another value" in message


def test_the_number_of_epochs_makes_a_schedule_to_zero_and_may_never_fall_below_those_done(capsys):
    for lr_type in ("cosine", "linear"):
        args = cli.parse_args(f"--result_dir r --lr-type {lr_type} --epochs 9".split())
        assert "--epochs 9 (was 8)" in one_line_error(
            capsys, lambda args=args: cli.require_unchanged(args, {**vars(args), "epochs": 8}, epochs_begun=8))
    args = cli.parse_args("--result_dir r --epochs 9".split())
    cli.require_unchanged(args, {**vars(args), "epochs": 20}, epochs_begun=9)
    assert "has begun epoch 10" in one_line_error(
        capsys, lambda: cli.require_unchanged(args, {**vars(args), "epochs": 20}, epochs_begun=10))


def test_an_epoch_that_has_begun_counts_when_epochs_are_taken_back(images, tmp_path, monkeypatch, capsys):
    """Otherwise its half-trained weights would pass for those of the epoch before."""
    with monkeypatch.context() as patch:
        signal_at_step(patch, 8)   # of 5 in an epoch
        assert train_cifar100.main(command(images, tmp_path / "run")) == STOPPED
    line = command(images, tmp_path / "run", "--resume", "--epochs", "1")
    assert "has begun epoch 2" in one_line_error(capsys, lambda: train_cifar100.main(line))


def saved_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".pth", ".json")}


def test_a_run_killed_before_its_first_checkpoint_starts_again_with_the_same_command(images, finished, tmp_path):
    line = command(images, tmp_path / "run", "--checkpoint", str(finished / checkpoint.BEST), "--epochs", "1")
    assert train_cifar100.main(line) == 0
    again = tmp_path / "again"
    again.mkdir()
    (tmp_path / "run" / "split.pth").rename(again / "split.pth")   # all that there is by then
    line[line.index("--result_dir") + 1] = str(again)
    assert train_cifar100.main(line) == 0
    assert not list(differences(outcome(again), outcome(tmp_path / "run")))


def test_a_tensorboard_folder_that_cannot_be_is_named_before_the_first_step(images, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    line = command(images, tmp_path / "run", "--tensorboard_dir", str(tmp_path / "file"))
    assert f"{tmp_path / 'file'} cannot be written" in one_line_error(capsys, lambda: train_cifar100.main(line))


@pytest.mark.parametrize("broken", ["missing", "import", "start", "write"])
def test_a_run_goes_on_without_a_tensorboard_that_is_missing_or_broken(images, tmp_path, monkeypatch, capsys, broken):
    import torch.utils.tensorboard as module

    def fail(*arguments, **options):
        raise AttributeError("module 'distutils' has\nno attribute 'version'")

    if broken == "missing":
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    elif broken == "import":
        monkeypatch.delattr(module, "SummaryWriter")
    else:
        monkeypatch.setattr(module.SummaryWriter, "__init__" if broken == "start" else "add_scalar", fail)
    assert train_cifar100.main(command(images, tmp_path)) == 0
    lines = capsys.readouterr().out.splitlines()
    warning, = [n for n, line in enumerate(lines) if "TensorBoard does not work here" in line]
    first_epoch = next(n for n, line in enumerate(lines) if line.startswith("epoch 1/2"))
    assert (warning < first_epoch) == (broken in ("missing", "import"))
    assert len(outcome(tmp_path)["results"]["epochs"]) == 2


def test_peak_memory_is_the_larger_one_of_all_starts(images, tmp_path, monkeypatch):
    for rss, cuda, epochs, expected in ((500, 7, 1, (500, 7)), (400, 9, 2, (500, 9)), (600, 8, 3, (600, 9))):
        monkeypatch.setattr("utils.runs.folder.peak_memory",
                            lambda device, rss=rss, cuda=cuda: {"peak_rss_bytes": rss, "peak_cuda_bytes": cuda})
        assert train_cifar100.main(command(images, tmp_path / "run", "--resume", "--epochs", str(epochs))) == 0
        results = json.loads((tmp_path / "run" / "results.json").read_text())
        assert (results["peak_rss_bytes"], results["peak_cuda_bytes"]) == expected


def test_resident_memory_is_that_of_the_program_and_not_of_its_parent():
    hoard = bytearray(2**30)
    hoard[::4096] = b"x" * len(hoard[::4096])
    code = "import torch; from utils.core.machine import peak_memory; print(*peak_memory(torch.device('cpu')).values())"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(cli.__file__).parent, capture_output=True, text=True, timeout=60)
    resident, on_gpu = map(int, done.stdout.split())
    assert 50 * 2**20 < resident < 900 * 2**20 and on_gpu == 0
    assert peak_memory(torch.device("cpu"))["peak_rss_bytes"] > 2**30


@pytest.mark.parametrize("kept", [["results.json"], ["model_best.pth"]])
def test_resume_never_trains_over_results_whose_checkpoint_is_gone(images, finished, tmp_path, capsys, kept):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in kept:
        (folder / name).write_bytes((finished / name).read_bytes())
    before = saved_files(folder)
    message = one_line_error(capsys, lambda: train_cifar100.main(command(images, folder, "--resume", "--seed", "5")))
    assert f"holds {kept[0]} of a run, but no checkpoint" in message
    assert before.items() <= saved_files(folder).items()


@pytest.mark.parametrize("spoil", [
    lambda training: training["optimizer"]["param_groups"][0]["params"].pop(),
    lambda training: training["figures"].pop("steps"),
    lambda training: training["objective"].pop("average"),
    lambda training: training["rng"].pop("numpy"),
])
def test_a_training_state_that_makes_no_sense_ends_with_one_line(images, finished, tmp_path, capsys, spoil):
    folder = tmp_path / "run"
    folder.mkdir()
    saved = checkpoint.load(finished / checkpoint.LATEST)
    spoil(saved["training"])
    checkpoint.save(folder / checkpoint.LATEST, saved)
    line = command(images, folder, "--resume", "--epochs", "3")
    assert "cannot be resumed" in one_line_error(capsys, lambda: train_cifar100.main(line))


@pytest.mark.parametrize(("hold_out", "message"), [(True, "hold-out split belongs to other data"), (False, ": labels_hash was ")])
def test_other_data_are_refused(tmp_path, capsys, hold_out, message):
    line = command(make_images(tmp_path / "data", classes=2), tmp_path / "run", "--epochs", "1")
    if not hold_out:
        line = [word for word in line if word not in ("--use-valid", "--valid_size")]
        line.remove("8")
    assert train_cifar100.main(line) == 0
    capsys.readouterr()
    (tmp_path / "data/train/class0/0.png").rename(tmp_path / "data/train/class1/99.png")   # as many images, other labels
    assert message in one_line_error(capsys, lambda: train_cifar100.main([*line, "--resume"]))


def test_a_folder_with_a_run_needs_resume_to_be_used_again(images, finished, capsys):
    assert "--resume" in one_line_error(capsys, lambda: train_cifar100.main(command(images, finished)))


def test_checkpoints_hold_plain_types_only(finished):
    def kinds(content):
        yield type(content)
        if isinstance(content, dict):
            content = [*content.keys(), *content.values()]
        if isinstance(content, (list, tuple)):
            for entry in content:
                yield from kinds(entry)

    for name in (checkpoint.LATEST, checkpoint.BEST):
        found = set(kinds(torch.load(finished / name, weights_only=True)))
        assert {kind.__name__ for kind in found} <= {"dict", "OrderedDict", "Counter", "list", "tuple", "str", "int", "float",
                                                      "bool", "NoneType", "Tensor"}


def test_a_resumed_run_still_says_what_it_began_with(images, finished, tmp_path):
    start = str(finished / checkpoint.LATEST)
    assert train_cifar100.main(command(images, tmp_path / "run", "--checkpoint", start, "--start-epoch", "1")) == 0
    assert train_cifar100.main(command(images, tmp_path / "run", "--resume", "--epochs", "3")) == 0
    config = json.loads((tmp_path / "run" / "results.json").read_text())["config"]
    assert (config["checkpoint"], config["start_epoch"], config["epochs"]) == (start, 1, 3)


def test_the_number_of_epochs_makes_the_schedule_of_the_weight_network(capsys):
    flags = ["--method", "l2w", "--result_dir", "run", "--epochs"]
    before = vars(cli.parse_args([*flags, "2"]))
    message = one_line_error(capsys, lambda: cli.require_unchanged(cli.parse_args([*flags, "3", "--resume"]), before, 2))
    assert "--epochs 3 (was 2)" in message
