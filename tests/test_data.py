"""Reading, caching and augmenting small images."""

import errno
import os
import pickle
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from dataloader import build_data
from utils.core.errors import UserError
from utils.core.files import LEFT_OVER_S, TEMPORARY
from utils.core.log import close_log
from utils.data import cache as array_cache
from utils.data import cifar, glyphs
from utils.data import small_images as images
from utils.data.augment import CIFAR_STATISTICS, CropFlip, Normalise, statistics_of
from utils.data.split import Split


def make_folder(root, n_train=6, n_test=3, classes=("ant", "bee", "cow"), size=32, test_name="test", seed=0):
    """Random images in class folders; returns the training pixels (n, H, W, 3) in file order."""
    generator = np.random.default_rng(seed)
    pixels = []
    for split, n in (("train", n_train), (test_name, n_test)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                image = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(image).save(root / split / name / f"{i:03}.png")
                if split == "train":
                    pixels.append(image)
    return np.stack(pixels)


def open_folder(root, **options):
    return build_data(**{"dataset": "folder", "data_root": root, "batch_size": 4, "quiet": True, **options})


@pytest.fixture(autouse=True)
def cache_home(tmp_path_factory, monkeypatch):
    home = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home


def test_class_folders_give_sorted_names_labels_and_pixels(tmp_path):
    pixels = make_folder(tmp_path)
    data = open_folder(tmp_path)
    assert data.class_names == ["ant", "bee", "cow"] and data.num_classes == 3
    assert (data.n_train, data.n_valid, data.n_test) == (18, 0, 9)
    assert torch.equal(data._train_set.images, torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert torch.cat([batch.labels for batch in data.test()]).tolist() == [0] * 3 + [1] * 3 + [2] * 3


def test_test_folder_may_be_called_val(tmp_path):
    make_folder(tmp_path, test_name="val")
    assert open_folder(tmp_path).n_test == 9


def test_augmented_batch_equals_per_image_pad_crop_flip_and_torchvision_normalisation(tmp_path):
    """Bit for bit what the paper's torchvision transforms do to each image, given the same draws."""
    import torchvision.transforms as T

    pixels = make_folder(tmp_path)
    data = open_folder(tmp_path, seed=5)
    batches = data.train(epoch=3)
    crop_flip = data._train_set.crop_flip
    dy, dx, flip = (part.tolist() for part in crop_flip.decode(crop_flip.draw(18, seed=5, epoch=3)))
    to_tensor, normalise = T.ToTensor(), T.Normalize(*CIFAR_STATISTICS)
    got = torch.cat([batch.images for batch in batches])
    assert len({(dy[i], dx[i], flip[i]) for i in range(18)}) > 9
    for row, i in enumerate(batches.index.tolist()):
        padded = ImageOps.expand(Image.fromarray(pixels[i]), 4)
        image = padded.crop((dx[i], dy[i], dx[i] + 32, dy[i] + 32))
        image = ImageOps.mirror(image) if flip[i] else image
        assert torch.equal(got[row], normalise(to_tensor(image)))


@pytest.mark.parametrize(("dataset", "size", "white", "black"), [
    ("cifar100", 32, [(1 - 0.5071) / 0.2675, (1 - 0.4867) / 0.2565, (1 - 0.4408) / 0.2761],
     [-0.5071 / 0.2675, -0.4867 / 0.2565, -0.4408 / 0.2761]),
    ("folder", 32, [1.8426, 2.0012, 2.0253], [-1.8957, -1.8975, -1.5965]),
    ("imagenet", 224, [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225],
     [-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225]),
    ("folder", 224, [2.2489, 2.4286, 2.64], [-2.1179, -2.0357, -1.8044])])
def test_normalisation_uses_the_published_statistics(dataset, size, white, black):
    images = torch.tensor([255, 0], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 2, 2)
    normalised = Normalise(*statistics_of(dataset, size))(images)
    torch.testing.assert_close(normalised[:, :, 0, 0], torch.tensor([white, black]), rtol=1e-4, atol=1e-4)


def test_every_crop_and_flip_is_drawn_equally_often():
    crop_flip = CropFlip(32)
    counts = torch.bincount(crop_flip.draw(162_000, seed=0, epoch=0), minlength=162)
    assert crop_flip.n_choices == len(counts) == 162
    assert counts.min() > 850 and counts.max() < 1150  # 1000 +- 5 sigma


def by_image(passes):
    """{image number: pixels} over several ranks' passes."""
    return {i: x for batches in passes for i, x in zip(batches.index.tolist(), torch.cat([b.images for b in batches]))}


def test_augmentation_of_an_image_depends_on_seed_epoch_and_image_only(tmp_path):
    make_folder(tmp_path)
    single = by_image([open_folder(tmp_path).train(2)])
    held_out = by_image([open_folder(tmp_path, use_valid=True, valid_size=5).train(2)])
    two_ranks = by_image([open_folder(tmp_path, batch_size=3, rank=rank, world=2).train(2) for rank in range(2)])
    assert len(single) == len(two_ranks) == 18 and len(held_out) == 13
    assert all(torch.equal(two_ranks[i], single[i]) for i in single)
    assert all(torch.equal(held_out[i], single[i]) for i in held_out)
    for other in (open_folder(tmp_path).train(3), open_folder(tmp_path, seed=1).train(2)):
        assert not all(torch.equal(x, single[i]) for i, x in by_image([other]).items())


def test_epoch_continues_at_any_batch_and_repeats_when_iterated_again(tmp_path):
    make_folder(tmp_path)
    data = open_folder(tmp_path)
    batches = list(data.train(1))
    assert [len(batch.labels) for batch in batches] == [4, 4, 4, 4, 2] and len(data.train(1)) == 5
    rest = data.train(1, first_batch=3)
    assert len(rest) == 2 and rest.n_samples == 6
    for first, again in ((batches[3:], list(rest)), (batches[3:], list(rest))):
        assert all(torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in zip(first, again, strict=True))


def test_what_is_left_of_an_epoch_keeps_the_weight_of_every_batch(tmp_path):
    """A resumed run of several processes, whose last batch is not shared evenly."""
    make_folder(tmp_path)
    for rank, last in ((0, 2 / 3), (1, 4 / 3)):   # 15 images in global batches of 4, the last of which has 3
        data = open_folder(tmp_path, batch_size=2, rank=rank, world=2, use_valid=True, valid_size=3)
        for first in range(5):
            rest = list(data.train(1, first_batch=first))
            assert [batch.share for batch in rest] == pytest.approx([1, 1, 1, last][first:])
            assert [len(batch.labels) for batch in rest] == [2, 2, 2, 1 + rank][first:]


def test_reading_batches_leaves_the_global_random_state_alone(tmp_path):
    make_folder(tmp_path)
    state = torch.get_rng_state()
    list(open_folder(tmp_path, use_valid=True, valid_size=2).train(0))
    assert torch.equal(torch.get_rng_state(), state)


def test_held_out_images_come_in_file_order_without_augmentation(tmp_path):
    pixels = make_folder(tmp_path)
    data = open_folder(tmp_path, use_valid=True, valid_size=6, eval_batch_size=4)
    batches = data.valid()
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)[data.split.valid_index]
    assert torch.equal(batches.index, data.split.valid_index)
    assert torch.equal(torch.cat([batch.images for batch in batches]), Normalise(*CIFAR_STATISTICS)(images))
    assert not set(data.train(0).index.tolist()) & set(data.split.valid_index.tolist())


def test_given_split_is_used_and_a_foreign_one_refused(tmp_path):
    make_folder(tmp_path)
    split = Split.draw(open_folder(tmp_path)._train_set.labels, 4, seed=9)
    assert open_folder(tmp_path, split=split).split.hash == split.hash
    with pytest.raises(UserError, match="other data"):
        open_folder(tmp_path, split=Split.draw(torch.zeros(18, dtype=torch.int64), 4, seed=9))


def test_a_tenth_of_a_folder_is_held_out_unless_told(tmp_path):
    make_folder(tmp_path, n_train=10)
    assert open_folder(tmp_path, use_valid=True).n_valid == 3


def test_no_hold_out_is_an_error_that_names_the_flag(tmp_path):
    make_folder(tmp_path)
    with pytest.raises(UserError, match="--use-valid"):
        open_folder(tmp_path).valid()


def test_only_a_last_batch_smaller_than_the_number_of_ranks_is_dropped_and_logged(tmp_path, caplog):
    make_folder(tmp_path, n_train=3, classes=("a", "b", "c"))  # 9 images
    ranks = [open_folder(tmp_path, batch_size=2, rank=rank, world=2) for rank in range(2)]
    passes = [data.train(0) for data in ranks]
    assert [batches.n_samples for batches in passes] == [4, 4]
    assert "the last 1 of 9 training images" in caplog.text
    assert len(caplog.records) == 1  # rank 0 speaks for all


def test_every_pillow_mode_becomes_rgb(tmp_path):
    make_folder(tmp_path, n_train=1, n_test=1, classes=("a",))
    folder = tmp_path / "train" / "a"
    grey = Image.fromarray(np.arange(1024, dtype=np.uint8).reshape(32, 32))
    grey.save(folder / "1.png")
    grey.convert("RGB").convert("CMYK").save(folder / "2.JPG", quality=100)
    grey.convert("RGB").quantize(256).save(folder / "3.png", transparency=0)
    grey.convert("LA").save(folder / "4.webp", lossless=True)
    grey.convert("1").save(folder / "5.bmp")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(folder / "6.png")
    grey.save(folder / "7.jpeg", format="png")
    (folder / "Thumbs.db").write_bytes(b"not an image, and not named like one")
    (folder / "._8.png").write_bytes(b"a file manager's own")
    read = open_folder(tmp_path)._train_set.images
    assert len(read) == 8
    for i in (1, 3, 4, 6, 7):
        assert torch.equal(read[i], torch.from_numpy(np.asarray(grey).copy()).expand(3, 32, 32)), i
    assert (read[2].float() - torch.from_numpy(np.asarray(grey).copy()).float()).abs().mean() < 3


def break_file(root: Path):
    (root / "train/ant/000.png").write_bytes((root / "train/ant/000.png").read_bytes()[:300])


def wrong_size(root: Path):
    Image.new("RGB", (31, 32)).save(root / "test/bee/000.png")


def empty_class(root: Path):
    (root / "train/elk").mkdir()


def other_classes(root: Path):
    (root / "test/cow").rename(root / "test/dog")


def no_test(root: Path):
    (root / "test").rename(root / "spare")


def no_classes(root: Path):
    for folder in (root / "train").iterdir():
        folder.rename(root / f"moved_{folder.name}")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (break_file, r"train/ant/000.png cannot be read as an image"),
        (wrong_size, r"test/bee/000.png is 31x32 pixels.*--image_size 32"),
        (empty_class, r"train/elk has no images"),
        (other_classes, r"test lacks 1 of the class folders of .*train \(cow\)"),
        (no_test, r"has no 'test' or 'val' folder"),
        (no_classes, r"train has no class folders"),
    ],
)
def test_unusable_folders_are_named_in_one_line(tmp_path, harm, message):
    make_folder(tmp_path)
    harm(tmp_path)
    with pytest.raises((UserError, FileNotFoundError), match=message) as caught:
        open_folder(tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / ".boostnet_images.npz").exists()


def test_error_in_a_decoding_process_arrives_unchanged(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "CHUNK", 2)  # several tasks, so that a pool is used
    make_folder(tmp_path)
    wrong_size(tmp_path)
    with pytest.raises(UserError, match="test/bee/000.png is 31x32 pixels"):
        open_folder(tmp_path)


def test_missing_data_folder_is_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="unknown data set 'mnist'"):
        open_folder(tmp_path, dataset="mnist")


def test_images_are_decoded_once_and_again_only_when_a_file_changes(tmp_path, monkeypatch):
    make_folder(tmp_path)
    decoded = []
    decode_all = images.decode_all
    monkeypatch.setattr(images, "decode_all", lambda listing, *rest: decoded.append(listing) or decode_all(listing, *rest))
    first = open_folder(tmp_path)
    again = open_folder(tmp_path)
    assert len(decoded) == 2 and torch.equal(first._train_set.images, again._train_set.images)
    Image.new("RGB", (32, 32), "red").save(tmp_path / "train/ant/000.png")
    assert open_folder(tmp_path)._train_set.images[0, 0].min() == 255
    os.utime(tmp_path / "test/cow/000.png", ns=(1, 1))
    open_folder(tmp_path)
    (tmp_path / "train/ant/000.png").rename(tmp_path / "train/ant/900.png")
    assert open_folder(tmp_path)._train_set.images[5, 0].min() == 255
    assert len(decoded) == 8


@pytest.mark.parametrize("harm", ["truncated", "flipped", "empty"])
def test_damaged_cache_is_rebuilt(tmp_path, harm, caplog):
    make_folder(tmp_path)
    first = open_folder(tmp_path)._train_set.images
    cache = tmp_path / ".boostnet_images.npz"
    content = bytearray(cache.read_bytes())
    if harm == "flipped":
        content[20_000] ^= 0xFF  # one byte among the pixels, which only the check sum can tell
    cache.write_bytes({"truncated": content[: len(content) // 2], "flipped": content, "empty": b""}[harm])
    assert torch.equal(open_folder(tmp_path)._train_set.images, first)
    assert "damaged" in caplog.text
    caplog.clear()
    open_folder(tmp_path)
    assert not caplog.text


def store(place, **arrays):
    with open(place, "wb") as file:
        np.savez(file, **arrays)


def store_unknown_compression(place, **arrays):
    store(place, **arrays)
    content = bytearray(place.read_bytes())
    for magic, offset in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        content[content.index(magic) + offset] = 99
    place.write_bytes(content)


@pytest.mark.parametrize("harm", [
    lambda place, arrays: store(place, **{name: array for name, array in arrays.items() if name != "test_labels"}),
    lambda place, arrays: store(place, **{**arrays, "train_labels": arrays["train_labels"][:-1]}),
    lambda place, arrays: store(place, **{**arrays, "train_images": arrays["train_images"].astype(np.float32)}),
    lambda place, arrays: store(place, key=arrays["key"]),
    lambda place, arrays: np.save(place.open("wb"), arrays["train_labels"]),
    lambda place, arrays: store_unknown_compression(place, **arrays)])
def test_cache_with_the_right_key_and_other_content_is_rebuilt(tmp_path, harm, caplog):
    make_folder(tmp_path)
    first = open_folder(tmp_path)._train_set
    cache = tmp_path / ".boostnet_images.npz"
    with np.load(cache) as stored:
        harm(cache, dict(stored))
    again = open_folder(tmp_path)._train_set
    assert torch.equal(again.images, first.images) and torch.equal(again.labels, first.labels)
    assert f"{cache} is damaged" in caplog.text
    caplog.clear()
    open_folder(tmp_path)
    assert not caplog.text


def test_cache_of_read_only_data_goes_to_the_users_cache_folder(tmp_path, cache_home, monkeypatch):
    make_folder(tmp_path)
    real = array_cache.atomic_write

    def refuse_beside_the_data(path):
        if tmp_path in Path(path).parents:
            raise PermissionError(f"{path} is read-only")
        return real(path)

    monkeypatch.setattr(array_cache, "atomic_write", refuse_beside_the_data)
    first = open_folder(tmp_path)
    assert len(list((cache_home / "boostnet").glob("images-*.npz"))) == 1 and not (tmp_path / ".boostnet_images.npz").exists()
    monkeypatch.setattr(images, "decode_all", None)
    assert torch.equal(open_folder(tmp_path)._train_set.images, first._train_set.images)


def test_one_line_says_what_is_read_once_and_where_it_is_kept(tmp_path, cache_home, monkeypatch, capsys):
    make_folder(tmp_path)
    close_log()   # of another test in this process
    n_files = len(list(tmp_path.rglob("*.png")))
    open_folder(tmp_path, quiet=False)
    assert capsys.readouterr().out == f"reading {n_files} images of {tmp_path} once; kept in {tmp_path}/.boostnet_images.npz\n"
    assert (tmp_path / ".boostnet_images.npz").is_file()
    open_folder(tmp_path, quiet=False)
    assert capsys.readouterr().out == ""
    (tmp_path / ".boostnet_images.npz").unlink()
    access = os.access   # for root, everything is writable
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and access(path, mode))
    open_folder(tmp_path, quiet=False)
    assert f"kept in {cache_home / 'boostnet' / 'images-'}" in capsys.readouterr().out
    (tmp_path / ".boostnet_images.npz").unlink()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    open_folder(tmp_path, quiet=False)
    assert capsys.readouterr().out == f"reading {n_files} images of {tmp_path}\n"


def test_data_are_usable_where_nothing_is_writable(tmp_path, monkeypatch, caplog):
    make_folder(tmp_path)

    def refuse(path):
        raise PermissionError("read-only")

    monkeypatch.setattr(array_cache, "atomic_write", refuse)
    assert open_folder(tmp_path).n_train == 18
    assert "prepared again next time" in caplog.text


def test_interrupted_cache_write_leaves_no_file(tmp_path, monkeypatch):
    make_folder(tmp_path)

    def interrupted(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(array_cache.np, "savez", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_folder(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test", "train"]


def test_a_cache_folder_that_may_not_be_searched_does_not_keep_the_data_from_being_read():
    def build():
        return {"x": np.arange(3)}

    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o777)
        home, beside = Path(root, "home"), Path(root, "cache.npz")
        array_cache.load_or_build([beside], "other", build)   # now everything is imported
        beside.unlink()
        home.mkdir()
        home.chmod(0o000)
        try:
            if not os.getuid():
                os.seteuid(65534)   # root, as which a container may run the tests, may search everything
            assert array_cache.load_or_build([home / "boostnet/x.npz", beside], "key", build)["x"].tolist() == [0, 1, 2]
            assert beside.exists()
        finally:
            os.seteuid(os.getuid())
            home.chmod(0o700)


@pytest.mark.parametrize("home", [None, "relative"])
def test_without_a_home_folder_no_folder_of_that_name_is_made(tmp_path, monkeypatch, home):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    if home:
        monkeypatch.setenv("XDG_CACHE_HOME", home)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)   # what Python answers for a user it knows nothing of
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(glyphs, "SIZES", {"train": 4, "test": 2})
    build_data(dataset="glyphs", data_root="data", quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert [path.name for path in (tmp_path / "data").iterdir()] == [".boostnet_glyphs.npz"]


def test_what_killed_processes_left_of_a_cache_is_removed_and_what_another_writes_is_not(tmp_path):
    make_folder(tmp_path)
    cache = tmp_path / ".boostnet_images.npz"
    dead, alive = (cache.with_name(f"{cache.name}{TEMPORARY}{number}") for number in (99999999, 99999998))
    for path in (dead, alive):
        path.write_bytes(b"half")
    os.utime(dead, (time.time() - 2 * LEFT_OVER_S,) * 2)
    open_folder(tmp_path)
    assert not dead.exists() and alive.exists() and cache.exists()


def write_archive(root, protocol=2):
    """A small cifar-100-python folder; returns training pixels (n, 3, 32, 32)."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 3072), dtype=np.uint8)
    labels = [i % 100 for i in range(8)]
    for name in ("train", "test"):
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "fine_labels": labels}, protocol))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class{i:02}" for i in range(100)]}, protocol))
    return pixels.reshape(-1, 3, 32, 32)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_python_archive_is_read_directly(tmp_path, protocol):
    pixels = write_archive(tmp_path, protocol)
    data = build_data(dataset="cifar100", data_root=tmp_path)
    assert torch.equal(data._train_set.images, torch.from_numpy(pixels))
    assert data.num_classes == 100 and data.class_names[3] == "class03"
    assert torch.cat([batch.labels for batch in data.test()]).tolist() == list(range(8))


def test_archive_of_cifar10_joins_its_five_files(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for number, name in enumerate(["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"]):
        content = {"data": np.full((2, 3072), number, np.uint8), "labels": [number, 9]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    data = build_data(dataset="cifar10", data_root=tmp_path)
    assert data._train_set.images[:, 0, 0, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4] and data.n_test == 2


def test_crafted_archive_cannot_run_code(tmp_path):
    write_archive(tmp_path)

    class Crafted:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    (tmp_path / "cifar-100-python" / "train").write_bytes(pickle.dumps({"data": Crafted(), "fine_labels": []}))
    with pytest.raises(UserError, match="train is damaged"):
        build_data(dataset="cifar100", data_root=tmp_path)
    assert not (tmp_path / "ran").exists()


def test_damaged_or_incomplete_archive_is_named(tmp_path):
    write_archive(tmp_path)
    file = tmp_path / "cifar-100-python" / "train"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="train is damaged"):
        build_data(dataset="cifar100", data_root=tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="train is missing"):
        build_data(dataset="cifar100", data_root=tmp_path)


PIXELS = np.zeros((8, 3072), np.uint8)


@pytest.mark.parametrize("name, content", [
    *(("train", {"data": data, "fine_labels": [0] * 8}) for data in (
        PIXELS.astype(np.float32), PIXELS[:, :-1], PIXELS[:0], PIXELS[0], PIXELS.tolist(), "x", None)),
    *(("test", {"data": PIXELS, "fine_labels": labels}) for labels in (
        [0] * 7, [], [100] + [0] * 7, [-1] + [0] * 7, [0.5] * 8, ["0"] * 8, [None] * 8, [[0], [0, 1]] * 4, 10**30, None)),
    ("train", {"data": PIXELS[:0], "fine_labels": []}), ("train", [PIXELS]), ("train", None),
    *(("meta", {"fine_label_names": names}) for names in ([0] * 100, ["name"] * 99, "a" * 100, None))])
def test_archive_that_unpickles_to_something_else_is_named_as_damaged(tmp_path, name, content):
    write_archive(tmp_path)
    (tmp_path / "cifar-100-python" / name).write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=f"{name} is damaged") as caught:
        build_data(dataset="cifar100", data_root=tmp_path)
    assert "\n" not in str(caught.value)


def test_archive_that_was_written_anew_with_keys_of_bytes_is_read(tmp_path):
    write_archive(tmp_path)
    for path in (tmp_path / "cifar-100-python").iterdir():
        content = pickle.loads(path.read_bytes())
        encoded = {key.encode(): [name.encode() for name in value] if key == "fine_label_names" else value
                   for key, value in content.items()}
        path.write_bytes(pickle.dumps(encoded))
    data = build_data(dataset="cifar100", data_root=tmp_path)
    assert data.n_train == 8 and data.class_names[3] == "class03"


def test_a_warning_of_numpys_does_not_make_an_archive_damaged(tmp_path, monkeypatch):
    write_archive(tmp_path)
    load = pickle.Unpickler.load

    def load_and_warn(self):
        warnings.warn("dtype(): align should be passed as Python or NumPy boolean", stacklevel=1)
        return load(self)

    monkeypatch.setattr(cifar._ArrayUnpickler, "load", load_and_warn)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build_data(dataset="cifar100", data_root=tmp_path).n_train == 8


def test_only_a_damaged_archive_is_to_be_deleted(tmp_path, monkeypatch):
    write_archive(tmp_path)
    file = tmp_path / "cifar-100-python/train"
    content = file.read_bytes()
    file.write_bytes(content[:1000])
    with pytest.raises(UserError, match="is damaged.*to download it again"):
        build_data(dataset="cifar100", data_root=tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="is missing; .* has to be the whole") as missing:
        build_data(dataset="cifar100", data_root=tmp_path)
    file.write_bytes(content)

    def refuse(self):
        raise PermissionError(errno.EACCES, "Permission denied", str(file))

    monkeypatch.setattr(cifar._ArrayUnpickler, "load", refuse)
    with pytest.raises(PermissionError) as unreadable:
        build_data(dataset="cifar100", data_root=tmp_path)
    assert "download" not in str(missing.value) + str(unreadable.value)


def no_download(monkeypatch):
    import torchvision.datasets

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", lambda *_, **__: pytest.fail("a download was tried"))


@pytest.mark.parametrize("wrong", ["data/cifar-100-python", ""])
def test_an_archive_one_level_off_is_named_before_anything_is_downloaded(tmp_path, monkeypatch, wrong):
    no_download(monkeypatch)
    write_archive(tmp_path / "data")
    with pytest.raises(UserError, match=f"no cifar100, but {tmp_path}/data has; pass --data-root {tmp_path}/data"):
        build_data(dataset="cifar100", data_root=tmp_path / wrong)


@pytest.mark.parametrize("wrong", ["cifar100/train", ""])
def test_class_folders_one_level_off_are_named_before_anything_is_downloaded(tmp_path, monkeypatch, wrong):
    no_download(monkeypatch)
    make_folder(tmp_path / "cifar100", n_train=1, n_test=1, classes=[f"c{i:02}" for i in range(100)])
    with pytest.raises(UserError, match=f"pass --data-root {tmp_path}/cifar100"):
        build_data(dataset="cifar100", data_root=tmp_path / wrong)


def test_other_data_nearby_do_not_keep_cifar_from_being_downloaded(tmp_path, monkeypatch):
    import torchvision.datasets

    make_folder(tmp_path / "data/others", n_train=1, n_test=1)
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", lambda root, train, download: write_archive(Path(root)))
    assert build_data(dataset="cifar100", data_root=tmp_path / "data").n_train == 8


def test_test_images_of_an_archive_or_of_class_folders_are_enough_where_no_others_are_needed(tmp_path, monkeypatch):
    no_download(monkeypatch)
    write_archive(tmp_path)
    (tmp_path / "cifar-100-python/train").unlink()
    with pytest.raises(FileNotFoundError, match="train is missing"):
        build_data(dataset="cifar100", data_root=tmp_path)
    data = build_data(dataset="cifar100", data_root=tmp_path, needs_train=False)
    assert (data.n_train, data.n_test) == (0, 8) and data.class_names[3] == "class03"
    folders = tmp_path / "folders"
    make_folder(folders, n_train=1, n_test=2)
    whole = open_folder(folders)
    (folders / "train").rename(tmp_path / "elsewhere")
    data = build_data(dataset="cifar100", data_root=folders, needs_train=False, quiet=True)
    assert torch.equal(data._test_set.images, whole._test_set.images) and data.n_train == 0


def test_absent_cifar_is_downloaded_by_torchvision(tmp_path, monkeypatch):
    import torchvision.datasets

    calls = []

    def fake_download(root, train, download):
        calls.append(download)
        assert Path(root).parent == tmp_path / "data"   # beside the place where it will be, and moved there as a whole
        write_archive(Path(root))
        (Path(root) / "cifar-100-python.tar.gz").write_bytes(b"packed")

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", fake_download)
    for _ in range(2):
        assert build_data(dataset="cifar100", data_root=tmp_path / "data").n_train == 8
    assert calls == [True]
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["cifar-100-python", "cifar-100-python.tar.gz"]


def test_a_download_that_was_killed_while_unpacking_begins_anew(tmp_path, monkeypatch):
    import torchvision.datasets

    def killed(root, train, download):
        write_archive(Path(root))
        (Path(root) / "cifar-100-python/train").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(cifar.shutil, "rmtree", lambda *_, **__: None)   # as if the process ended there
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", killed)
    with pytest.raises(KeyboardInterrupt):
        build_data(dataset="cifar100", data_root=tmp_path)
    assert not (tmp_path / "cifar-100-python").exists()
    monkeypatch.undo()
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", lambda root, train, download: write_archive(Path(root)))
    assert build_data(dataset="cifar100", data_root=tmp_path).n_train == 8


def test_of_two_first_starts_one_downloads_and_the_other_waits_for_it(tmp_path, monkeypatch):
    import torchvision.datasets

    calls = []

    def slow(root, train, download):
        calls.append(root)
        (Path(root) / "cifar-100-python").mkdir()
        time.sleep(0.5)
        (Path(root) / "cifar-100-python").rmdir()
        write_archive(Path(root))

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", slow)
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(build_data, dataset="cifar100", data_root=tmp_path) for _ in range(2)]
        assert [run.result().n_train for run in runs] == [8, 8]
    assert len(calls) == 1


def test_an_archive_downloaded_by_hand_is_used_and_stays(tmp_path, monkeypatch):
    import torchvision.datasets

    packed = tmp_path / "cifar-100-python.tar.gz"
    packed.write_bytes(b"packed")

    def unpack(root, train, download):
        assert (Path(root) / packed.name).read_bytes() == b"packed"
        write_archive(Path(root))

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", unpack)
    assert build_data(dataset="cifar100", data_root=tmp_path).n_train == 8
    assert packed.read_bytes() == b"packed" and not packed.is_symlink()


def test_failed_download_says_what_to_put_where(tmp_path, monkeypatch):
    import torchvision.datasets

    def no_network(root, train, download):
        os.makedirs(root, exist_ok=True)
        raise OSError("Network is unreachable")

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", no_network)
    with pytest.raises(UserError, match=r"unreachable.*cifar-100-python.*\{train,test\}/<class>"):
        build_data(dataset="cifar100", data_root=tmp_path / "new" / "data")
    assert not (tmp_path / "new").exists()
    with pytest.raises(FileNotFoundError):  # only the first process downloads
        build_data(dataset="cifar100", data_root=tmp_path / "data", rank=1, world=2)


def test_more_classes_than_the_data_set_has_is_an_error_and_fewer_a_warning(tmp_path, caplog):
    make_folder(tmp_path, n_train=1, n_test=1, classes=[f"c{i:02}" for i in range(11)])
    with pytest.raises(UserError, match="11 classes but cifar10 has 10"):
        build_data(dataset="cifar10", data_root=tmp_path, quiet=True)
    data = build_data(dataset="cifar100", data_root=tmp_path, quiet=True)
    assert data.num_classes == 100 and len(data.class_names) == 11 and "only 11 of the 100 classes" in caplog.text


@pytest.mark.gpu
def test_batches_on_the_gpu_equal_the_cpus_and_never_wait_for_it(tmp_path):
    make_folder(tmp_path)
    on_cpu, on_gpu = open_folder(tmp_path).train(0), open_folder(tmp_path, device="cuda").train(0)
    for _ in on_gpu:  # warm-up
        pass
    batches = iter(on_gpu)
    collected = [next(batches)]  # the plan itself is moved before the first batch
    torch.cuda.set_sync_debug_mode("error")
    try:
        collected += list(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for expected, got in zip(on_cpu, collected, strict=True):
        assert torch.equal(expected.labels, got.labels.cpu())
        torch.testing.assert_close(got.images.cpu(), expected.images, rtol=1e-6, atol=1e-6)


@pytest.mark.realdata
def test_real_cifar100_has_its_published_sizes_and_statistics(real_data):
    data = build_data(dataset="cifar100", data_root=real_data / "cifar100", use_valid=True)
    assert (data.n_train, data.n_valid, data.n_test, data.num_classes) == (45_000, 5000, 10_000, 100)
    assert data.class_names[:2] == ["apple", "aquarium_fish"] and data.class_names[-1] == "worm"
    pixels = data._train_set.images.permute(1, 0, 2, 3).flatten(1).float() / 255
    torch.testing.assert_close(pixels.mean(1), torch.tensor(CIFAR_STATISTICS[0]), rtol=0, atol=2e-4)
    torch.testing.assert_close(pixels.std(1), torch.tensor(CIFAR_STATISTICS[1]), rtol=0, atol=2e-3)
    assert all(len(torch.unique(batch.labels)) > 1 for batch in data.train(0))
