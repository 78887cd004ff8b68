"""Large images: the same pixels as torchvision's pipeline, whatever the number of workers and processes."""
from __future__ import annotations

import json
import logging
import os
import resource
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import nn
from torch.utils.data import DataLoader

import train_cifar100
from dataloader import build_data
from models import BoostedNet, MSDNet
from utils.core.errors import UserError
from utils.core.machine import require_open_files
from utils.data import large_images as imagefolder
from utils.data.augment import IMAGENET_STATISTICS
from utils.data.decoders import DECODERS, PillowDecoder, decode, random_box, sample_generator, scaled_size
from utils.data.folders import scan
from utils.evaluation import predict as predictions
from utils.evaluation.classify import read_images
from utils.training import engine
from utils.training.engine import EpochMeters

ROOT = Path(__file__).parent.parent
SIZES = [(320, 240), (240, 321), (500, 260), (261, 262), (230, 400), (300, 300)]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth random image: noise would make JPEG's losses drown everything else."""
    small = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def make_folder(root: Path, test_name: str = "val") -> Path:
    for part in ("train", test_name):
        for label, name in enumerate(("n01", "n02")):
            (root / part / name).mkdir(parents=True)
            for i, size in enumerate(SIZES):
                picture(*size, seed=10 * label + i).save(root / part / name / f"{name}_{i}.JPEG", quality=90)
    return root


def open_folder(root: Path, **options):
    return build_data(**{"dataset": "folder", "data_root": root, "image_size": 224, "batch_size": 4, "workers": 0,
                         "val_workers": 0, "quiet": True, **options})


@pytest.fixture(autouse=True)
def cache_home(tmp_path_factory, monkeypatch):
    home = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shared and only read: JPEGs of many sizes, one of them grey, one CMYK and one a PNG in disguise."""
    root = make_folder(tmp_path_factory.mktemp("imagenet"))
    picture(300, 280).convert("L").save(root / "val/n01/grey.JPEG")
    picture(300, 280).convert("CMYK").save(root / "val/n01/print.JPEG")
    picture(300, 280).save(root / "val/n02/disguised.JPEG", format="png")
    return root


def images_of(batches) -> torch.Tensor:
    return torch.cat([batch.images for batch in batches])


def assert_equals_torchvision(data, test_folder: Path) -> None:
    import torchvision.transforms as T
    from torchvision.datasets import ImageFolder

    transform = T.Compose([T.Resize(256), T.CenterCrop(224), T.ToTensor(), T.Normalize(*IMAGENET_STATISTICS)])
    reference = ImageFolder(test_folder, transform)
    batches = list(data.test())
    assert torch.cat([batch.labels for batch in batches]).tolist() == reference.targets
    assert data.class_names == reference.classes
    for image, (expected, _) in zip(images_of(batches), reference, strict=True):
        assert torch.equal(image, expected)


def test_evaluation_images_are_torchvisions_to_the_last_bit(folder):
    assert_equals_torchvision(open_folder(folder), folder / "val")


def test_training_images_are_torchvisions_resized_crops_to_the_last_bit(folder):
    import torchvision.transforms as T
    import torchvision.transforms.functional as TF

    data = open_folder(folder, seed=3)
    batches = data.train(epoch=2)
    files = scan(folder / "train")
    flips = 0
    for i, image in zip(batches.index.tolist(), images_of(batches)):
        generator = sample_generator(3, 2, i)
        original = Image.open(files.path(i)).convert("RGB")
        left, top, right, bottom = random_box(generator, *original.size)
        expected = TF.resized_crop(original, top, left, bottom - top, right - left, [224, 224])
        if generator.random() < 0.5:
            flips, expected = flips + 1, TF.hflip(expected)
        assert torch.equal(image, T.Normalize(*IMAGENET_STATISTICS)(T.ToTensor()(expected)))
    assert 0 < flips < 12


def test_random_boxes_are_distributed_as_torchvisions():
    from torchvision.transforms import RandomResizedCrop

    image, generator = Image.new("L", (400, 300)), np.random.default_rng(0)
    torch.manual_seed(0)
    ours = np.array([random_box(generator, 400, 300) for _ in range(6000)])
    ours = np.stack([ours[:, 1], ours[:, 0], ours[:, 3] - ours[:, 1], ours[:, 2] - ours[:, 0]], 1)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(6000)])
    for quantile in (0.1, 0.3, 0.5, 0.7, 0.9):  # top, left, height, width
        difference = np.quantile(ours, quantile, 0) - np.quantile(theirs, quantile, 0)
        assert np.abs(difference).max() <= 8, (quantile, difference)


@pytest.mark.parametrize("size", [(1000, 10), (10, 1000), (1, 7), (1, 1)])
def test_images_too_long_for_any_box_give_torchvisions_middle_or_a_box_inside(size):
    from torchvision.transforms import RandomResizedCrop

    box = random_box(np.random.default_rng(0), *size)
    assert 0 <= box[0] < box[2] <= size[0] and 0 <= box[1] < box[3] <= size[1]
    if max(size) == 1000:
        top, left, height, width = RandomResizedCrop.get_params(Image.new("L", size), [0.08, 1.0], [3 / 4, 4 / 3])
        assert box == (left, top, left + width, top + height)


TURNS = {1: None, 2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90", 7: "TRANSVERSE",
         8: "ROTATE_270"}   # from upright to how it is stored


def save_turned(upright: Image.Image, path: Path, orientation: int, **options) -> None:
    """As a camera does that was held another way: the pixels turned, and a tag that says so."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    turn = TURNS.get(orientation)
    stored = upright.transpose(Image.Transpose[turn]) if turn else upright
    stored.save(path, exif=exif, **options)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_read_upright(tmp_path, orientation):
    upright = picture(60, 40)
    for kind in ("png", "webp"):
        save_turned(upright, tmp_path / "turned.jpg", orientation, format=kind, lossless=True)
        assert np.array_equal(decode(tmp_path / "turned.jpg"), upright)
    save_turned(upright, tmp_path / "turned.jpg", orientation)
    with Image.open(tmp_path / "turned.jpg") as image:
        assert np.array_equal(decode(tmp_path / "turned.jpg"), ImageOps.exif_transpose(image))


def test_training_evaluation_and_a_users_own_files_see_the_same_side_up(tmp_path):
    """Lossless files, so that a stored-upright and a turned copy have the same pixels."""
    for i, root in enumerate((tmp_path / "upright", tmp_path / "turned")):
        for part in ("train", "val"):
            for label in "ab":
                (root / part / label).mkdir(parents=True)
                save_turned(picture(320, 240, seed=ord(label)), root / part / label / "0.png", 6 if i else 1)
    upright, turned = (open_folder(tmp_path / name) for name in ("upright", "turned"))
    for read in (lambda data: data.train(0), lambda data: data.test()):
        assert torch.equal(images_of(read(upright)), images_of(read(turned)))
    own = [read_images([str(tmp_path / name / "val" / label / "0.png") for label in "ab"], "folder", 224)
           for name in ("upright", "turned")]
    assert torch.equal(*own) and torch.equal(own[0], images_of(turned.test()))


def test_small_images_are_read_upright_too(tmp_path):
    for part in ("train", "test"):
        (tmp_path / part / "a").mkdir(parents=True)
        for orientation in (1, 6):
            save_turned(picture(32, 32), tmp_path / part / "a" / f"{orientation}.png", orientation)
    upright, turned = images_of(open_folder(tmp_path, image_size=32).test())
    assert torch.equal(upright, turned)


@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense, nonsense", b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01", b"Exif\0\0"])
def test_damaged_exif_data_do_not_make_an_image_unreadable(tmp_path, exif):
    picture(60, 40).save(tmp_path / "a.jpg", exif=exif, dpi=(72, 72))   # else Pillow itself looks there for the resolution
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        assert decode(tmp_path / "a.jpg").size == (60, 40)
    assert shown == []


def test_shorter_side_is_scaled_and_the_longer_one_rounded_down():
    assert scaled_size(500, 375, 256) == (341, 256) and scaled_size(375, 500, 256) == (256, 341)
    assert scaled_size(256, 256, 256) == (256, 256)


def test_crops_do_not_depend_on_workers_ranks_or_the_starting_batch(folder):
    alone = open_folder(folder).train(1)
    by_image = dict(zip(alone.index.tolist(), images_of(alone)))
    with_workers = open_folder(folder, workers=2).train(1)
    assert torch.equal(with_workers.index, alone.index) and torch.equal(images_of(with_workers), images_of(alone))
    rest = open_folder(folder).train(1, first_batch=2)
    assert len(rest) == 1 and torch.equal(images_of(rest), images_of(alone)[8:])
    ranks = [open_folder(folder, batch_size=2, rank=rank, world=2).train(1) for rank in range(2)]
    assert sum(batches.n_samples for batches in ranks) == 12
    for batches in ranks:
        assert all(torch.equal(image, by_image[i]) for i, image in zip(batches.index.tolist(), images_of(batches)))
    assert not torch.equal(images_of(open_folder(folder).train(2)), images_of(alone))


def test_evaluation_shards_of_three_ranks_join_to_the_single_pass(folder):
    whole = images_of(open_folder(folder).test())
    parts = [open_folder(folder, rank=rank, world=3, eval_batch_size=2).test() for rank in range(3)]
    joined = {i: image for part in parts for i, image in zip(part.index.tolist(), images_of(part))}
    assert len(whole) == 15 and all(torch.equal(joined[i], image) for i, image in enumerate(whole))


def test_held_out_images_are_not_augmented(folder):
    data = open_folder(folder, use_valid=True, valid_size=4)
    assert torch.equal(images_of(data.valid()), images_of(data.valid()))
    files, decoder = scan(folder / "train"), PillowDecoder()
    first = decoder.centre_crop(decoder.load(files.path(int(data.split.valid_index[0]))), 256, 224)
    expected = data._train_set.normalise(torch.from_numpy(first.copy()).permute(2, 0, 1)[None])
    assert torch.equal(next(iter(data.valid())).images[:1], expected)


def test_loading_leaves_the_global_random_state_alone(folder):
    state = torch.get_rng_state()
    list(open_folder(folder).train(0))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def damaged(tmp_path):
    root = make_folder(tmp_path)
    for name in ("train/n01/n01_0.JPEG", "train/n02/n02_4.JPEG", "val/n01/n01_1.JPEG"):
        content = (root / name).read_bytes()
        (root / name).write_bytes(content[:len(content) // 2])
    return root


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_stops_with_its_name_in_one_line(damaged, workers):
    with pytest.raises(UserError, match=r"n0\d_\d.JPEG cannot be read as an image.*--skip_unreadable") as caught:
        list(open_folder(damaged, workers=workers).train(0))
    assert "\n" not in str(caught.value)


def test_unreadable_images_are_skipped_counted_and_logged_once_when_asked(damaged, caplog):
    data = open_folder(damaged, skip_unreadable=True)
    batches = list(data.train(0))
    list(data.train(1))
    assert sum(len(batch.labels) for batch in batches) == 10
    assert sum(batch.share for batch in batches) == pytest.approx(3 - 2 / 4)  # each lost image weighs one of four
    assert len(data._train_set.unreadable) == 2
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(messages) == 2 and "n01_0.JPEG" in " ".join(messages) and messages[-1].endswith("2 so far")
    assert sum(len(batch.labels) for batch in data.test()) == 11


def test_hold_out_and_test_images_have_the_workers_of_evaluation(folder, monkeypatch):
    started = []

    def load(*arguments, num_workers, **options):
        started.append(num_workers)
        return DataLoader(*arguments, num_workers=num_workers, **options)

    monkeypatch.setattr(imagefolder, "DataLoader", load)
    data = open_folder(folder, use_valid=True, valid_size=4, workers=1, val_workers=2)
    for batches in (data.train(0), data.valid(), data.test()):
        list(batches)
    assert started == [1, 2, 2]


def test_results_count_the_images_that_could_be_read(damaged, tmp_path, capsys):
    flags = ("--dataset folder --image_size 224 --skip_unreadable --arch msdnet_ge --nBlocks 2 --base 1 --step 1 --nChannels 4 "
             "--growthRate 2 --grFactor 1-1-1-1 --bnFactor 1-1-1-1 --batch-size 4 --epochs 1 --use-valid --valid_size 2 "
             "--device cpu --threads 1 --workers 0 --val_workers 0").split()
    folder = tmp_path / "run"
    assert train_cifar100.main(["--data-root", str(damaged), "--result_dir", str(folder), *flags]) == 0
    assert json.loads((folder / "anytime.json").read_text())["n_test"] == 11 and "11 test images" in capsys.readouterr().out


def test_a_bad_file_alone_in_its_batch_is_left_out_like_any_other(damaged, tmp_path):
    flags = ("--dataset folder --image_size 224 --skip_unreadable --arch msdnet_ge --nBlocks 2 --base 1 --step 1 --nChannels 4 "
             "--growthRate 2 --grFactor 1-1-1-1 --bnFactor 1-1-1-1 --batch-size 11 --epochs 8 --device cpu --threads 1 "
             "--workers 0 --val_workers 0").split()   # the last of 12 images is alone, and 2 are bad
    run = tmp_path / "run"
    assert train_cifar100.main(["--data-root", str(damaged), "--result_dir", str(run), *flags]) == 0
    assert sum(epoch["skipped_steps"] for epoch in json.loads((run / "results.json").read_text())["epochs"]) > 0
    assert len(list(open_folder(damaged, batch_size=1, skip_unreadable=True).train(0))) == 12


def test_predictions_of_the_images_that_could_be_read_are_gathered_with_as_many_positions(damaged, monkeypatch):
    gathered = []
    monkeypatch.setattr(predictions, "gather_samples", lambda x, index: gathered.append((x, index)) or x)
    model = BoostedNet(MSDNet(n_blocks=1, n_channels=4, base=1, gr_factor=(1, 1, 1, 1), bn_factor=(1, 1, 1, 1),
                              image_size=224), [0.5])
    assert predictions.predict(model, open_folder(damaged, skip_unreadable=True).test()).n_samples == 11
    assert len(gathered) == 2
    for x, index in gathered:
        assert x.shape[1] == len(index) == 11


def test_a_share_without_a_readable_image_ends_several_processes_in_place_of_a_hang(monkeypatch):
    monkeypatch.setattr(engine, "world_size", lambda: 2)
    method = SimpleNamespace(network=nn.Identity(), step=None)
    batch = (torch.zeros(0, 3, 32, 32), torch.zeros(0, dtype=torch.int64), 0.0)
    with pytest.raises(UserError, match="a batch without an image that can be read"):
        engine.train_epoch(method, [batch], EpochMeters(1, torch.device("cpu")), after_step=lambda step: False)


def test_batch_without_one_readable_image_is_an_error(damaged):
    for name in ("train/n01", "train/n02"):
        for path in (damaged / name).iterdir():
            path.write_bytes(b"")
    with pytest.raises(UserError, match="not one of the 4 images of a batch can be read"):
        list(open_folder(damaged, skip_unreadable=True).train(0))


def test_images_added_under_equal_times_are_seen_at_the_next_start(tmp_path):
    make_folder(tmp_path)
    folder = tmp_path / "train/n02"
    before = folder.stat()
    assert open_folder(tmp_path).n_train == 12
    picture(300, 300).save(folder / "new.JPEG")
    os.utime(folder, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert open_folder(tmp_path).n_train == 13
    for name in ("new.JPEG", "n02_0.JPEG"):
        (folder / name).unlink()
    os.utime(folder, ns=(before.st_atime_ns, before.st_mtime_ns))
    data = open_folder(tmp_path)
    assert data.n_train == 11 and sum(len(batch.labels) for batch in data.train(0)) == 11


def test_folders_inside_a_class_and_all_formats_are_read_as_torchvision_reads_them(tmp_path):
    from torchvision.datasets import ImageFolder

    make_folder(tmp_path)
    for place in ("n01/b", "n01/b/c", "n01/b-c", "n02/Z"):
        (tmp_path / "train" / place).mkdir(parents=True)
        for suffix in ("jpg", "JPEG", "png", "ppm", "bmp", "pgm", "tif", "tiff", "webp"):
            picture(40, 40).save(tmp_path / "train" / place / f"x.{suffix}")
    files = scan(tmp_path / "train")
    reference = ImageFolder(tmp_path / "train")
    assert [(files.path(i), label) for i, label in enumerate(files.labels.tolist())] == reference.samples
    assert len(reference.samples) == 12 + 36 and not files.left_out
    assert sum(len(batch.labels) for batch in open_folder(tmp_path).train(0)) == 48


def test_what_is_left_out_is_said_once_with_its_kinds(tmp_path, caplog):
    make_folder(tmp_path)
    for name in ("1.gif", "2.GIF", "3.svg", "README", ".DS_Store", "._1.png"):
        (tmp_path / "train/n01" / name).write_bytes(b"")
    (tmp_path / "train/n02/gone.png").symlink_to("nowhere")
    (tmp_path / "train/n02/around").symlink_to("..")
    picture(40, 40).save(tmp_path / "train/loose.png")
    open_folder(tmp_path)
    [record] = caplog.records
    message = record.getMessage()
    assert "train: 9 files and links left out" in message
    for part in ("2 .gif", "1 .svg", "1 without extension", "2 hidden"):
        assert part in message
    assert scan(tmp_path / "train").left_out["images outside class folders"] == 1
    assert scan(tmp_path / "train").left_out["dangling links"] == 1
    caplog.clear()
    open_folder(tmp_path, rank=1, world=2)
    assert not caplog.text   # the first process speaks for all


def test_a_link_to_a_folder_around_it_ends_no_scan(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "train/n01/inner").mkdir()
    picture(40, 40).save(tmp_path / "train/n01/inner/x.png")
    (tmp_path / "train/n01/inner/up").symlink_to("..")
    files = scan(tmp_path / "train")
    assert len(files.files) == 13 and files.left_out == {"links to a folder around them": 1}


@pytest.mark.parametrize("dataset", ["folder", "imagenet"])
def test_a_complete_val_beside_a_flat_test_is_taken_and_said(tmp_path, caplog, dataset):
    make_folder(tmp_path)
    (tmp_path / "test/images").mkdir(parents=True)
    picture(300, 300).save(tmp_path / "test/images/unlabelled.JPEG")
    assert open_folder(tmp_path, dataset=dataset).n_test == 12
    assert "the test images are those in val; test is left out" in caplog.text


def test_tiny_imagenets_flat_val_is_refused_with_what_to_move_where(tmp_path):
    make_folder(tmp_path, "unused")
    (tmp_path / "test/images").mkdir(parents=True)
    (tmp_path / "val/images").mkdir(parents=True)
    lines = []
    for i, name in enumerate(("n01", "n02", "n01")):
        picture(64, 64, seed=i).save(tmp_path / f"val/images/val_{i}.JPEG")
        lines.append(f"val_{i}.JPEG\t{name}\t0\t0\t63\t63\n")
    (tmp_path / "val/val_annotations.txt").write_text("".join(lines))
    with pytest.raises(UserError, match="val_annotations.txt; move each image to") as caught:
        open_folder(tmp_path)
    assert "\n" not in str(caught.value)
    subprocess.run(["bash", "-ec", str(caught.value).partition("for example: ")[2]], check=True)
    data = open_folder(tmp_path)
    assert data.n_test == 3 and torch.cat([batch.labels for batch in data.test()]).tolist() == [0, 0, 1]


def test_test_images_are_enough_where_no_others_are_needed(tmp_path):
    make_folder(tmp_path)
    whole = open_folder(tmp_path, use_valid=True, valid_size=4)
    (tmp_path / "train").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="train: no such folder"):
        open_folder(tmp_path)
    data = open_folder(tmp_path, needs_train=False, split=whole.split)
    assert (data.n_train, data.n_valid, data.n_test, data.class_names) == (0, 4, 12, ["n01", "n02"])
    assert torch.equal(images_of(data.test()), images_of(whole.test()))
    with pytest.raises(UserError, match="no training images here"):
        data.valid()


def test_a_root_one_level_off_is_named(tmp_path):
    make_folder(tmp_path / "data/mine")
    for wrong in ("data", "data/mine/train"):
        with pytest.raises(FileNotFoundError, match=f"pass --data-root {tmp_path}/data/mine"):
            open_folder(tmp_path / wrong)


def test_imagenet_takes_val_even_beside_a_flat_test_folder(tmp_path, caplog):
    make_folder(tmp_path)
    (tmp_path / "test").mkdir()
    picture(300, 300).save(tmp_path / "test/unlabelled.JPEG")
    data = open_folder(tmp_path, dataset="imagenet")
    assert (data.n_test, data.num_classes) == (12, 1000) and "only 2 of the 1000 classes" in caplog.text


def test_differing_classes_and_flat_folders_are_named(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "val/n02").rename(tmp_path / "val/n03")
    with pytest.raises(UserError, match="n02"):
        open_folder(tmp_path)
    for name in ("n01", "n03"):
        (tmp_path / "val" / name).rename(tmp_path / f"spare_{name}")
    with pytest.raises(UserError, match="val has no class folders"):
        open_folder(tmp_path)


def test_links_that_lead_to_themselves_are_left_out_like_links_that_lead_nowhere(tmp_path):
    make_folder(tmp_path)
    before = list(scan(tmp_path / "train").files)
    for place, suffix in ((tmp_path / "train/n01", ".JPEG"), (tmp_path / "train", "")):
        (place / f"nowhere{suffix}").symlink_to("absent")
        (place / f"itself{suffix}").symlink_to(f"itself{suffix}")
    files = scan(tmp_path / "train")
    assert list(files.files) == before and files.class_names == ["n01", "n02"]


def test_names_that_are_no_text_are_listed(tmp_path):
    names = ["n01/a b.png", "n01/köln.png", "n01/" + os.fsdecode(b"\xff.png")]
    (tmp_path / "n01").mkdir()
    for name in names:
        (tmp_path / name).write_bytes(b"")
    files = scan(tmp_path)
    assert [files.path(i) for i in range(3)] == [f"{tmp_path}/{name}" for name in sorted(names)]


def test_unknown_or_missing_decoder_is_reported(folder, monkeypatch):
    with pytest.raises(UserError, match="unknown decoder 'fast'; choose one of pillow, torchcodec"):
        open_folder(folder, decoder="fast")
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    with pytest.raises(UserError, match="pip install torchcodec"):
        open_folder(folder, decoder="torchcodec")


def assert_close_to_pillow(paths: list[str]) -> None:
    """What the docstring of utils/decoders.py promises."""
    fast, faithful = DECODERS["torchcodec"](), DECODERS["pillow"]()
    differences = []
    for i, path in enumerate(paths):
        image, expected = fast.load(path), faithful.load(path)
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(expected)), path
        box = random_box(sample_generator(0, 0, i), *expected.size)
        for got, want in ((fast.resized_crop(image, box, 224, True), faithful.resized_crop(expected, box, 224, True)),
                          (fast.centre_crop(image, 256, 224), faithful.centre_crop(expected, 256, 224))):
            differences.append(np.abs(got.astype(int) - want))
    differences = np.stack(differences)
    assert differences.max() <= 2 and (differences > 1).mean() < 1e-5 and (differences > 0).mean() < 0.05


def test_torchcodec_decodes_the_same_pixels_and_scales_nearly_the_same(folder):
    pytest.importorskip("torchcodec")
    files = scan(folder / "val")
    assert_close_to_pillow([files.path(i) for i in range(len(files.files))])


def test_both_decoders_turn_images_and_take_the_first_frame(tmp_path):
    pytest.importorskip("torchcodec")
    for orientation in range(10):
        for kind in ("jpeg", "png", "webp"):
            save_turned(picture(320, 240), tmp_path / f"{kind}{orientation}.jpg", orientation, format=kind)
    frames = [picture(300, 260, seed=seed) for seed in range(3)]
    for kind in ("gif", "webp", "png"):
        frames[0].save(tmp_path / f"moving_{kind}.jpg", format=kind, save_all=True, append_images=frames[1:])
    picture(300, 260).convert("RGBA").save(tmp_path / "seen_through.jpg", format="png")
    picture(300, 260).save(tmp_path / "odd.jpg", exif=b"Exif\0\0nonsense, nonsense")
    assert_close_to_pillow(sorted(map(str, tmp_path.iterdir())))


def test_torchcodec_reports_unreadable_images_too(damaged):
    pytest.importorskip("torchcodec")
    data = open_folder(damaged, skip_unreadable=True, decoder="torchcodec")
    assert sum(len(batch.labels) for batch in data.train(0)) == 10


@pytest.mark.realdata
def test_real_images_are_torchvisions_to_the_last_bit(tmp_path, real_data):
    sample = real_data / "imagenet_sample"
    for part in ("train", "val"):
        (tmp_path / part).symlink_to(sample, target_is_directory=True)
    data = open_folder(tmp_path, dataset="imagenet")
    assert (data.n_test, len(data.class_names)) == (100, 100)
    assert_equals_torchvision(data, sample)
    for batch in data.train(0):
        assert batch.images.is_contiguous() and batch.images.shape[1:] == (3, 224, 224) and batch.images.isfinite().all()


@pytest.mark.realdata
def test_torchcodec_is_as_close_on_real_images(real_data):
    pytest.importorskip("torchcodec")
    assert_close_to_pillow(sorted(map(str, (real_data / "imagenet_sample").glob("*/*.JPEG"))))


NO_LIMIT = resource.RLIM_INFINITY


@pytest.mark.parametrize("limits, workers, after", [((100, 4096), 2, 100), ((60, 4096), 2, 80), ((60, NO_LIMIT), 8, 128),
                                                    ((NO_LIMIT, NO_LIMIT), 8, NO_LIMIT)])
def test_the_limit_of_open_files_is_raised_as_far_as_the_workers_need(monkeypatch, limits, workers, after):
    now = [limits]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: now[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: now.append(limits))
    require_open_files(workers)
    assert now[-1] == (after, limits[1])


def test_too_few_open_files_end_the_program_with_one_line(tmp_path):
    """Before, the loader hung for ever over workers that it could not start."""
    make_folder(tmp_path)
    code = ("from dataloader import build_data; from utils.core.errors import user_errors\n"
            f"with user_errors(): build_data(dataset='folder', data_root={str(tmp_path)!r}, image_size=224, workers=8)")
    done = subprocess.run(["bash", "-c", 'ulimit -n 52; exec "$@"', "bash", sys.executable, "-c", code], cwd=ROOT,
                          capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "52 files open" in done.stderr and "ulimit -n 128" in done.stderr
