"""Every method trains on real JPEGs in two processes, started by a script as a user does, and leaves what a user expects."""
from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from test_scripts import ROOT, bash

from utils import report
from utils.options.catalog import METHODS, method_title
from utils.runs import checkpoint

# Script and its arguments.
RUNS = {
    **{method: f"train_imagenet_any --method {method}" for method in ("boost", "joint", "boost_l2w", "boost_distill")},
    "l2w": "l2w_imagenet 4",
    "block_losses": "block_losses_imagenet overlap_final self",
    "imta": "train_imagenet_any --method imta --checkpoint {joint}/model_best.pth",
}
# 21 images are left to train on: three batches of 6, and one that leaves a process with a single image.
SMALL = ("--nBlocks 2 --base 1 --step 1 --nChannels 4 --growthRate 4 --epochs 1 --batch-size 3 --use-valid --valid_size 3 "
         "--workers 1 --val_workers 1 --device cpu --threads 1 --print-freq 2")


@pytest.fixture(scope="module")
def images(tmp_path_factory, real_data) -> Path:
    """4 class folders with 6 training and 2 validation images each. What they show is of other classes, too."""
    folder = tmp_path_factory.mktemp("imagenet")
    files = iter(sorted((real_data / "imagenet_sample").glob("*/*.JPEG")))
    for name in ("n01440764", "n01530575", "n01601694", "n01641577"):
        for part, n in (("train", 6), ("val", 2)):
            (folder / part / name).mkdir(parents=True)
            for file in (next(files) for _ in range(n)):
                (folder / part / name / file.name).symlink_to(file)
    return folder


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """Folders of finished runs, trained when first asked for."""
    root, known = tmp_path_factory.mktemp("results"), {}

    def run(method: str) -> Path:
        if method not in known:
            known[method] = root / method
            script, *more = RUNS[method].format(joint=run("joint") if "{joint}" in RUNS[method] else "").split()
            done = bash(ROOT / f"msdnet_scripts/{script}.sh", *more, *SMALL.split(), "--result_dir", str(known[method]), cwd=root,
                        timeout_s=600, DATA_ROOT=str(images), NPROC="2", PYTHON=sys.executable, OMP_NUM_THREADS="1")
            assert done.returncode == 0, done.stdout + done.stderr
        return known[method]

    return run


@pytest.mark.slow
@pytest.mark.realdata
@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_on_real_images_in_two_processes_through_its_script(finished, images, method):
    folder = finished(method)
    log = (folder / "train.log").read_text()
    for words in (f"imagenet ({images}): 21 training images of 4 classes, 3 held out, 8 test images",
                  f", {method}: 2 exits, ", "million parameters; on cpu", ", 2 processes", "epoch 1/1  lr ", "hold-out top-1",
                  "has only 4 of the 1000 classes"):
        assert log.count(words) == 1, log
    results = json.loads((folder / "results.json").read_text())
    assert (results["processes"], results["n_train"], results["config"]["method"]) == (2, 21, method)
    [entry] = results["epochs"]
    assert entry["skipped_steps"] == (1 if method == "imta" else 0)
    assert all(0 < loss < 100 for loss in entry["train_loss"]) and len(entry["train_loss"]) == len(entry["valid_top1"]) == 2
    assert results["test"]["n_test"] == 8 and len(results["test"]["top1"]) == 2
    saved = checkpoint.load(folder / checkpoint.LATEST)
    assert saved["epoch"] == 1 and saved["training"]["processes"] == 2 and (folder / checkpoint.BEST).exists()
    rows = {row[0]: list(row[1:]) for table in report.report([folder]) for row in table.rows}
    assert rows[method_title(method)] == [f"{top1:.2f}" for top1 in results["test"]["top1"]]
