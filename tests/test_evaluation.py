"""What the two modes of evaluation write is what their array code says of the predictions, hold-out and test in their places."""
from __future__ import annotations

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from adaptive_inference import budget_curve, patience_curve, released_curve
from utils.core.errors import UserError
from utils.evaluation import calibration, modes
from utils.evaluation.operating_points import finite
from utils.evaluation.predict import Predictions, collect, predict, read

MACS = [10_000_000, 25_000_000, 60_000_000]
ABOUT = {"name": "run", "dataset": "cifar100", "method": "boost", "arch": "msdnet_ge", "ensemble": None, "policy": "confidence",
         "temperatures": [0.5] * 3, "epoch": 3, "epoch_kind": "best on hold-out", "n_valid": 90, "n_test": 120, "macs": MACS,
         "params": [1000, 3000, 7000]}
DATA = SimpleNamespace(valid=lambda: "valid", test=lambda: "test", n_valid=90, n_test=120, augment_valid=False)


def made_up(n_samples: int, seed: int) -> Predictions:
    """Later exits are a little better, and a certain answer is right more often."""
    draw = np.random.default_rng(seed)
    confidence = draw.random((3, n_samples), dtype=np.float32)
    correct = draw.random((3, n_samples)) < 0.2 + 0.1 * np.arange(3)[:, None] + 0.5 * confidence
    return Predictions(torch.from_numpy(confidence), torch.from_numpy(correct), torch.tensor([80.0, 85, 90 + seed]))


@pytest.fixture
def predictions(monkeypatch) -> dict[str, Predictions]:
    """Those of hold-out and test set, in place of a network's."""
    found = {"valid": made_up(90, seed=1), "test": made_up(120, seed=2)}
    for module in (modes, calibration):
        monkeypatch.setattr(module, "predict", lambda model, batches, measure=None, **more: found[batches])
    return found


def stored(folder, name):
    """Content of a JSON file, and the columns of the text file beside it."""
    rows = [[float(value) for value in line.split("\t")] for line in (folder / f"{name}.txt").read_text().splitlines()]
    return json.loads((folder / f"{name}.json").read_text()), [list(column) for column in zip(*rows)]


def columns(points):
    return [[point[key] for point in points] for key in ("test_mean_macs", "test_top1")]


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("family", ["eq9", "released"])
def test_budgeted_results_are_the_curve_of_these_predictions(predictions, tmp_path, capsys, family, flat):
    modes.evaluate_budgeted(None, DATA, tmp_path, header=ABOUT, released=family == "released", flat=flat, suffix="_x")
    curve = {"eq9": budget_curve, "released": released_curve}[family]
    valid, test = predictions["valid"], predictions["test"]
    plain, want = (curve(valid.confidence, valid.correct, test.confidence, test.correct, MACS, flat=f) for f in (False, flat))
    assert (want != plain) is flat
    result, text = stored(tmp_path, "dynamic_flat_x" if flat else "dynamic_x")
    assert result["points"] == [{**point, "thresholds": finite(point["thresholds"])} for point in want]
    assert text == columns(want)
    assert (result["family"], result["flat"], result["n_valid"], result["n_test"]) == (family, flat, 90, 120)
    assert torch.load(tmp_path / "flops.pth") == MACS
    table = capsys.readouterr().out
    cheapest = min(want, key=lambda point: point["test_mean_macs"])
    row = f"{cheapest['valid_mean_macs'] / 1e6:.2f} *{cheapest['test_mean_macs'] / 1e6:.2f} *{cheapest['valid_top1']:.2f} *"
    assert re.search(row + f"{cheapest['test_top1']:.2f}", table)


def test_budgets_that_are_given_are_the_ones_evaluated(predictions, tmp_path):
    valid, test = predictions["valid"], predictions["test"]
    modes.evaluate_budgeted(None, DATA, tmp_path, header=ABOUT, budgets=[3e7, 2e7])
    result, _ = stored(tmp_path, "dynamic")
    want = budget_curve(valid.confidence, valid.correct, test.confidence, test.correct, MACS, [2e7, 3e7])
    assert [point["test_top1"] for point in result["points"]] == [point["test_top1"] for point in want]
    assert [point["budget"] for point in result["points"]] == [2e7, 3e7]


def test_patience_is_chosen_on_the_hold_out_and_measured_on_the_test_set(predictions, tmp_path, monkeypatch):
    for part in predictions:   # numbers of exits in a row
        steps = (3 * predictions[part].confidence).ceil()
        predictions[part] = predictions[part]._replace(confidence=steps)
    valid, test = predictions["valid"], predictions["test"]
    modes.evaluate_patience(None, DATA, tmp_path, header=ABOUT | {"policy": "patience"})
    result, text = stored(tmp_path, "dynamic_patience")
    want = patience_curve(valid.confidence, valid.correct, test.confidence, test.correct, MACS)
    assert result["points"] == want and text == columns(want) and result["family"] == "patience"


def test_anytime_results_are_those_of_the_test_set(predictions, tmp_path, capsys):
    modes.evaluate_anytime(None, DATA, tmp_path, header=ABOUT)
    test = predictions["test"]
    top1 = (100 * test.correct.double().mean(dim=1)).tolist()
    result = json.loads((tmp_path / "anytime.json").read_text())
    assert (result["top1"], result["top5"], result["n_test"]) == (top1, [80.0, 85.0, 92.0], 120)
    rows = [line.split("\t") for line in (tmp_path / "any.txt").read_text().splitlines()]
    want = zip(MACS, ABOUT["params"], top1, result["top5"])
    assert [[float(value) for value in row] for row in rows] == [list(row) for row in want]
    table = capsys.readouterr().out
    assert re.search(rf"3 *60.00 *0.007 *{top1[2]:.2f} *92.00", table)


class Ranked(nn.Module):
    """Two exits that rank 12 classes: an image holds the place of its label, 1 for the first, at both exits."""

    n_exits = 2

    def __init__(self) -> None:
        super().__init__()
        self.anything = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        assert not self.training
        return [self._scores(images[:, n]) for n in range(2)]

    def _scores(self, place):
        others = torch.arange(11.0).expand(len(place), 11)   # of which place - 1 lie above the label's, that of class 3
        return torch.cat([others[:, :3], 11.5 - place[:, None], others[:, 3:]], dim=1)


class Pass(list):
    """Batches with the positions of their images."""

    def __init__(self, places: torch.Tensor, batch_size: int) -> None:
        super().__init__((part, torch.full((len(part),), 3), 1.0) for part in places.split(batch_size))
        self.insert(1, (places[:0], torch.zeros(0, dtype=torch.int64), 1.0))   # its two images could not be read
        self.index = torch.arange(len(places) + 2)


def test_top5_counts_labels_on_the_first_five_places():
    places = torch.tensor([[1, 6], [2, 5], [3, 4], [4, 6], [5, 7], [6, 6], [7, 1]])
    for training in (True, False):
        model = Ranked().train(training)
        found = predict(model, Pass(places, batch_size=3))
        assert model.training is training
    assert found.n_samples == 7 and found.confidence.shape == (2, 7)
    assert found.confidence.dtype == torch.float32 and found.correct.dtype == torch.bool
    assert found.top1 == pytest.approx([100 / 7, 100 / 7])
    assert found.top5.tolist() == pytest.approx([500 / 7, 300 / 7])
    assert found.correct.tolist() == (places == 1).T.tolist()


class Dropping(nn.Module):
    """Two exits that answer at random in training."""

    n_exits = 2

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(3, 4), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.linear(x), self.linear(3 * self.dropout(x))]


class Listed(list):
    """Batches of (images, labels, share) in file order."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        super().__init__((x, y, 1.0) for x, y in zip(images.split(1000), labels.split(1000)))
        self.index = torch.arange(len(labels))


def test_outputs_that_were_collected_give_what_predicting_gives():
    draw = torch.Generator().manual_seed(0)
    images, labels = torch.randn(5000, 3, generator=draw), torch.randint(4, (5000,), generator=draw)
    model, batches = Dropping().train(), Listed(images, labels)
    outputs = collect(model, batches)
    assert model.training and torch.equal(outputs.labels, labels)
    with torch.no_grad():
        torch.testing.assert_close(outputs.logits, torch.stack(model.eval()(images)))
    collect(model, batches)
    assert not model.training
    found, wanted = read(outputs), predict(model, batches)
    assert found.details is wanted.details is None and torch.equal(found.correct, wanted.correct)
    torch.testing.assert_close(found.confidence, wanted.confidence)
    with pytest.raises(UserError, match="no image of this set that can be read"):
        collect(model, Listed(images[:0], labels[:0]))
    nothing = predict(model, Listed(images[:0], labels[:0]), details=True)
    assert [column.dtype for column in nothing.details] == [torch.int64] + [torch.float32] * 4
    assert nothing.correct.dtype == torch.bool and nothing.confidence.shape == (2, 0)
