"""What version 0.1 wrote is read by this one, and its runs go on as it would have gone on itself."""
from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest
from tiny import make_images, one_line_error

import eval_cifar100
import train_cifar100
import utils
from utils.runs import checkpoint

DATA = Path(__file__).parent / "data"
# Runs of commit 13865f9 (version 0.1) on `make_images`, stopped in the middle of the second of three epochs, and what became of
# them when that version resumed them. So that the files pack well, large tensors were made to repeat their first values.
RUNS = json.loads((DATA / "version_0.1.json").read_text())


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


def stopped_run(name: str, folder: Path) -> Path:
    """Folder with the checkpoint of a run that version 0.1 left."""
    folder.mkdir()
    (folder / checkpoint.LATEST).write_bytes(lzma.decompress((DATA / f"version_0.1_{name}.pth.xz").read_bytes()))
    return folder


def resume(images: Path, folder: Path, flags: str) -> int:
    return train_cifar100.main(["--dataset", "folder", "--data-root", str(images), "--result_dir", str(folder), *flags.split(),
                                "--resume"])


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_version_0_1_goes_on_as_with_that_version(images, tmp_path, name):
    """On the machine that made the files the weights had the same bits; on another one convolutions may round differently."""
    run, folder = RUNS[name], stopped_run(name, tmp_path / "run")
    assert resume(images, folder, run["flags"]) == 0
    results, latest = json.loads((folder / "results.json").read_text()), checkpoint.load(folder / checkpoint.LATEST)
    assert [entry["lr"] for entry in results["epochs"]] == run["lr"]
    assert [entry["valid_top1"] for entry in results["epochs"]] == run["valid_top1"]
    for entry, losses in zip(results["epochs"], run["train_loss"], strict=True):
        assert entry["train_loss"] == pytest.approx(losses, rel=1e-4)
    if name == "l2w":   # the rate of the weight network in the last of three epochs: half of 1 + cos(2/3 pi)
        [group] = latest["training"]["objective"]["meta_optimizer"]["param_groups"]
        assert group["lr"] == pytest.approx(0.25e-4, rel=1e-9)
    weights = sum(tensor.double().abs().sum().item() for tensor in latest["state_dict"].values())
    assert weights == pytest.approx(run["weights_abs_sum"], rel=1e-6)


def test_a_run_that_left_bad_steps_out_is_refused_and_told_which_version_can_do_it(images, tmp_path, capsys):
    folder = stopped_run("cosine", tmp_path / "run")
    saved = checkpoint.load(folder / checkpoint.LATEST)
    assert "version" not in saved and saved["training"]["config"]["on_nan"] == "stop"
    saved["training"]["config"]["on_nan"] = "skip"
    checkpoint.save(folder / checkpoint.LATEST, saved)
    message = one_line_error(capsys, lambda: resume(images, folder, RUNS["cosine"]["flags"]))
    assert "--on_nan skip" in message and "version 0.1" in message


def test_every_file_says_which_version_wrote_it(images, tmp_path):
    folder = stopped_run("cosine", tmp_path / "run")
    assert resume(images, folder, RUNS["cosine"]["flags"]) == 0
    for mode in ("dynamic", "realtime"):
        line = ["--data-root", str(images), "--evaluate-from", str(folder / checkpoint.BEST), "--device", "cpu"]
        assert eval_cifar100.main([*line, "--evalmode", mode]) == 0
    written = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    written |= {name: checkpoint.load(folder / name) for name in (checkpoint.LATEST, checkpoint.BEST)}
    assert {"results.json", "anytime.json", "dynamic.json", "realtime.json", checkpoint.LATEST, checkpoint.BEST} <= set(written)
    assert {content["version"] for content in written.values()} == {utils.__version__} == {"0.2"}
