"""The published networks through torch.hub, as another project loads them."""
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import hubconf
from utils.core.errors import UserError
from utils.evaluation.fast_form import load_model
from utils.evaluation.published import open_published

ROOT = Path(__file__).parent.parent
PUBLISHED = ROOT / "published"
SMALL = PUBLISHED / "cifar100_small/msdnet_boost/model_anytime.pth"
ENTRIES = [name for name, value in vars(hubconf).items() if inspect.isfunction(value) and not name.startswith("_")]


def weights_of(name, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(hubconf, "_open", lambda weights, early_exit, device: PUBLISHED / weights)
        return getattr(hubconf, name)()


def test_every_published_file_of_weights_has_an_entry_point(monkeypatch):
    assert {weights_of(name, monkeypatch) for name in ENTRIES} == set(PUBLISHED.rglob("model_*.pth"))
    assert sorted(ENTRIES) == sorted(   # what torch.hub.list takes for one
        name for name in dir(hubconf) if callable(getattr(hubconf, name)) and not name.startswith("_"))


OTHER_PROJECT = """
import sys
import torch
early = "{early}"
if early:
    import utils
    import models.net
before = sys.modules.get("utils")
images = torch.load("images.pth")
model = torch.hub.load({root!r}, "msdnet5_boost_cifar100", source="local")
predict = torch.hub.load({root!r}, "msdnet5_boost_cifar100", source="local", early_exit="15e6")
assert type(model) is type(predict.model) and model.class_names[:2] == predict.model.class_names[:2] == ["apple", "aquarium_fish"]
assert {root!r} not in sys.path and not {{"torchvision", "PIL", "matplotlib"}} & sys.modules.keys()
with torch.no_grad():
    torch.save([model(images), *predict(images)], "out.pth")
assert predict.summary().n_images == len(images)
if "{theirs}":
    import utils
    import models.net
    assert utils.mine and models.net.mine and before in (None, utils)
    assert not any(name.startswith(("utils.", "models.inference")) for name in sys.modules)
"""


@pytest.mark.parametrize("theirs, early", [("", ""), ("theirs", ""), ("theirs", "early")],
                         ids=["no such names", "imported later", "imported before"])
def test_from_another_folder_whatever_modules_lie_there(tmp_path, theirs, early):
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.save(images, tmp_path / "images.pth")
    if theirs:
        (tmp_path / "models").mkdir()
        for name in ("utils.py", "models/net.py"):   # `models` without __init__.py, as many have it
            (tmp_path / name).write_text("mine = True\n")
    (tmp_path / "script.py").write_text(OTHER_PROJECT.format(root=str(ROOT), theirs=theirs, early=early))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    logits, prediction, confidence, exit_ = torch.load(tmp_path / "out.pth")
    with torch.no_grad():
        expected = load_model(SMALL)[0](images)
    assert len(logits) == 5 and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(logits, expected))
    chosen = torch.stack(expected).softmax(dim=2)[exit_, torch.arange(6)]
    assert torch.equal(chosen.argmax(dim=1), prediction) and torch.allclose(chosen.amax(dim=1), confidence, atol=1e-4)


def test_a_budget_has_the_thresholds_that_the_evaluation_fitted(monkeypatch):
    checked = 0
    for name in ENTRIES:
        weights = weights_of(name, monkeypatch)
        points = json.loads(weights.with_name("dynamic.json").read_text())["points"]
        for point in points[5::15]:
            predict = getattr(hubconf, name)(early_exit=str(point["budget"]))
            stored = np.float32([t if -1 < t < 2 else t * np.inf for t in point["thresholds"]])[:-1]
            assert np.allclose(predict.thresholds[:-1], stored, rtol=0, atol=1e-7), (name, point["budget"])
            assert predict.monitor.held_out_share == pytest.approx(point["valid_exit_share"])
            checked += 1
    assert checked >= 6


@pytest.mark.parametrize("budget, message", [("25 ms", "budget in MACs per image, such as"), ([1], "budget in MACs per image"),
                                             ("1e6", "budget"), ("nan", "budget"), ("25e9", "budget")])
def test_what_is_no_budget_of_this_network_is_refused(budget, message):
    with pytest.raises(ValueError, match=message):
        hubconf.msdnet5_boost_cifar100(early_exit=budget)


@pytest.mark.parametrize("device", ["foo", "cuda:99", 1.5, ""])
def test_what_is_no_device_here_is_refused(device):
    with pytest.raises(ValueError, match="where the network computes"):
        hubconf.msdnet5_boost_cifar100(device=device)


def test_arrays_of_other_weights_give_no_thresholds(tmp_path):
    weights = tmp_path / SMALL.name
    weights.write_bytes(SMALL.read_bytes())
    (tmp_path / "arrays_dynamic.npz").write_bytes((PUBLISHED / "cifar100_small/msdnet_joint/arrays_dynamic.npz").read_bytes())
    assert open_published(weights).n_exits == 5
    with pytest.raises(UserError, match="holds no confidences of model_anytime.pth"):
        open_published(weights, 15e6)
