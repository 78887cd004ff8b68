"""The glyph images are the same for everybody, forever: results of different runs are only comparable on the same images."""
from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataloader import build_data
from utils.data import glyphs

SHEET = Path(__file__).parent / "data" / "glyphs.png"  # the first 36 training images, 6 rows of 6

# SHA-256 of the labels and difficulties, of the images of `sample()` and of all images; the same from Pillow 10.1 with
# FreeType 2.13.2 to Pillow 13.0 with FreeType 2.14.3.
PARAMETERS = "224a18ff5b98c936d27e5593b86902a2400f8ac1ff382e222b4888c0e7041d9c"
SAMPLE = "7386720c00e29427b38f4f9b9c0a5f7491efea8cffeeea8dc248b5b1d19783d6"
EVERYTHING = "12165b0bd30ad378f61c46392436f0bb6669095cf6bdd7f3b6ca0ec25472007b"
CHANGED = """The glyph images are not the ones that results were published on.
If utils/glyphs.py was edited: undo that. The difficulty was settled with the joint baseline and is never tuned again.
If only Pillow, FreeType or the kind of processor is new: test_images_look_like_the_committed_sheet tells whether more than
the rounding of single pixels differs. If it passes, let the hash test accept the new hash too and note the versions here;
if not, results on these images must not be compared with older ones."""


def sample() -> np.ndarray:
    """(150, 3, 32, 32): both ends of the training images and the beginning of the test images."""
    training, test = (*range(50), *range(19_950, 20_000)), range(50)
    return np.stack([*(glyphs.draw("train", number) for number in training), *(glyphs.draw("test", number) for number in test)])


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_image_parameters_are_frozen():
    """Labels and difficulties are arithmetic: no library version may change them."""
    numbers = range(0, 4000, 40)
    text = " ".join(f"{glyphs.label(i)} {glyphs.difficulty('train', i):.6f} {glyphs.difficulty('test', i):.6f}" for i in numbers)
    assert hashlib.sha256(text.encode()).hexdigest() == PARAMETERS, CHANGED


def test_images_are_frozen():
    assert hashlib.sha256(sample().tobytes()).hexdigest() == SAMPLE, CHANGED


def test_images_look_like_the_committed_sheet():
    """Holds for every version of Pillow and FreeType that draws the same outlines."""
    sheet = np.asarray(Image.open(SHEET)).astype(int)
    for number in range(36):
        row, column = 32 * (number // 6), 32 * (number % 6)
        expected = sheet[row:row + 32, column:column + 32].transpose(2, 0, 1)
        difference = np.abs(glyphs.draw("train", number) - expected)
        assert difference.mean() < 1 and (difference > 16).mean() < 0.01, f"image {number}. {CHANGED}"


def test_result_does_not_depend_on_the_number_of_processes(monkeypatch):
    monkeypatch.setattr(glyphs, "SIZES", {"train": 45, "test": 10})
    monkeypatch.setattr(glyphs, "CHUNK", 7)
    with_pool = glyphs.build(quiet=True)
    monkeypatch.setattr(glyphs, "in_parallel", map)
    alone = glyphs.build(quiet=True)
    assert all(np.array_equal(with_pool[name], alone[name]) for name in alone)
    assert np.array_equal(alone["test_images"][3], glyphs.draw("test", 3))


def test_classes_take_turns_and_parts_differ():
    assert len(glyphs.CLASS_NAMES) == len(set(glyphs.CLASS_NAMES)) == 36
    assert [glyphs.label(i) for i in (0, 35, 36)] == [0, 35, 0]
    assert not np.array_equal(glyphs.draw("train", 0), glyphs.draw("test", 0))
    assert glyphs.SIZES == {"train": 20_000, "test": 4_000}


def test_difficulty_spreads_and_hard_images_are_harder_to_tell_apart():
    difficulty = np.array([glyphs.difficulty("train", i) for i in range(2000)])
    assert difficulty.min() < 0.05 and difficulty.max() > 0.98 and 0.55 < difficulty.mean() < 0.7
    order = difficulty.argsort()

    def ink_against_noise(numbers) -> float:
        """Spread of brightness over the image; large strong ink makes it large."""
        return float(np.mean([glyphs.draw("train", int(i)).mean(0).std() for i in numbers]))

    assert ink_against_noise(order[:100]) > 1.3 * ink_against_noise(order[-100:])


def test_glyphs_are_built_once_and_batched_without_mirroring(monkeypatch, tmp_path):
    monkeypatch.setattr(glyphs, "SIZES", {"train": 80, "test": 40})
    data = build_data(dataset="glyphs", data_root=tmp_path / "absent", use_valid=True, valid_size=20, quiet=True)
    assert (data.n_train, data.n_valid, data.n_test, data.num_classes) == (60, 20, 40, 36)
    assert data.class_names[10] == "A" and not (tmp_path / "absent").exists()
    assert data._train_set.crop_flip.n_choices == 81  # shifts only: a mirrored 5 is nearly a 2
    monkeypatch.setattr(glyphs, "build", None)
    again = build_data(dataset="glyphs", data_root=tmp_path / "absent", quiet=True)
    assert torch.equal(again._train_set.images, data._train_set.images)


def test_pillow_without_freetype_is_reported(monkeypatch):
    monkeypatch.setattr(glyphs.features, "check", lambda feature: False)
    with pytest.raises(glyphs.UserError, match="pip install"):
        glyphs.versions()


@pytest.mark.slow
def test_all_images_are_frozen():
    arrays = glyphs.build(quiet=True)
    digest = hashlib.sha256(arrays["train_images"].tobytes() + arrays["test_images"].tobytes())
    assert digest.hexdigest() == EVERYTHING, CHANGED
