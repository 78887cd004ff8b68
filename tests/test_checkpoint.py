"""A checkpoint file is whole or absent, whenever its writer is killed, and a file that is not good is refused with one line."""
from __future__ import annotations

import errno
import math
import os
import pickle
import random
import resource
import signal
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from utils.core import files
from utils.core.errors import UserError
from utils.core.files import atomic_write, sweep
from utils.data.split import Split
from utils.runs import checkpoint
from utils.runs.checkpoint import DAMAGED, LATEST, PREVIOUS

ABOUT = {"architecture": {"arch": "msdnet"}, "dataset": "folder", "class_names": ["a", "b"], "method": "boost",
         "temperatures": [0.5, 0.5], "trainable_ensemble": False, "split": None, "epoch": 3, "epoch_kind": "epoch"}
TRAINING = {"optimizer": {}, "objective": {}, "figures": {}, "best": {}, "history": [], "rng": {}, "config": {},
            "n_train": 1, "labels_hash": "", "processes": 1}


def content(number: float = 0.0, size: int = 100) -> dict:
    return {"state_dict": {"w": torch.full((size,), number), "b": torch.arange(7)}, **ABOUT, "training": TRAINING}


def number_of(saved: dict) -> float:
    """The number that `content` put into every weight; no file may have two."""
    [number] = saved["state_dict"]["w"].unique().tolist()
    return number


# Written whole or not at all.

def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    checkpoint.save(tmp_path / "a.pth", content(4))
    saved = checkpoint.load(tmp_path / "a.pth")
    assert saved["format"] == 1 and saved["class_names"] == ["a", "b"] and number_of(saved) == 4
    assert [file.name for file in tmp_path.iterdir()] == ["a.pth"]


@pytest.mark.parametrize(("name", "epochs", "kind"), [
    (LATEST, 3, "last epoch"), (PREVIOUS, 3, "last epoch"), (LATEST, 9, "epoch"), ("model_best.pth", 3, "best on hold-out"),
    ("copy.pth", 3, "best on hold-out"), (LATEST, None, "best on hold-out")])
def test_the_latest_checkpoint_of_an_older_version_is_not_called_the_best(tmp_path, name, epochs, kind):
    training = {**TRAINING, "config": {"epochs": epochs}} if epochs else []
    checkpoint.save(tmp_path / name, {**content(), "epoch_kind": "best on hold-out", "training": training})
    assert checkpoint.load(tmp_path / name)["epoch_kind"] == kind


@pytest.mark.parametrize("hard_links", [True, False])
def test_the_checkpoint_before_stays_until_the_next_save(tmp_path, monkeypatch, hard_links):
    if not hard_links:
        def refuse(*_):
            raise OSError(errno.EPERM, "no hard links here")
        monkeypatch.setattr(os, "link", refuse)
    for number in range(3):
        checkpoint.save_latest(tmp_path, content(number))
    assert number_of(checkpoint.load(tmp_path / LATEST)) == 2
    assert number_of(checkpoint.load(tmp_path / PREVIOUS)) == 1
    assert {file.name for file in tmp_path.iterdir()} == {LATEST, PREVIOUS}


def save_until_killed(folder: Path, first: int) -> None:
    number = first
    while True:
        checkpoint.save_latest(folder, content(number, size=1_000_000))
        (folder / "done").write_text(str(number))
        number += 1


def kill_while_saving(folder: Path, first: int, after_s: float) -> int:
    """Save in a process of its own, SIGKILL it; the number of the last save that it said was done."""
    child = os.fork()
    if child == 0:
        try:
            save_until_killed(folder, first)
        finally:
            os._exit(1)
    time.sleep(after_s)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, "the child failed by itself"
    said = (folder / "done").read_text() if (folder / "done").exists() else ""
    return int(said or first - 1)   # it may have been killed while saying it


def test_forty_kills_at_random_moments_never_cost_a_checkpoint(tmp_path):
    draw, left_behind, first = random.Random(0), 0, 0
    checkpoint.save_latest(tmp_path, content(0, size=1_000_000))
    for _ in range(40):
        done = kill_while_saving(tmp_path, first, after_s=draw.uniform(0.01, 0.1))
        left_behind += len(list(tmp_path.glob("*.boostnet-tmp.*")))
        latest, previous = number_of(checkpoint.load(tmp_path / LATEST)), None
        if (tmp_path / PREVIOUS).exists():
            previous = number_of(checkpoint.load(tmp_path / PREVIOUS))
        assert latest >= done and previous in (None, latest - 1, latest)
        sweep(tmp_path, own=[LATEST, PREVIOUS])
        assert not list(tmp_path.glob("*.boostnet-tmp.*"))
        first = int(latest) + 1
    assert left_behind > 5, "the kills did not fall into the writing; they prove nothing"


def test_only_half_written_files_are_swept(tmp_path):
    for name in ("model_latest.pth.boostnet-tmp.123", "results.json.boostnet-tmp.4", "model_latest.pth", "notes.tmp.12", "a.tmp"):
        (tmp_path / name).touch()
    sweep(tmp_path, own=["model_latest.pth", "results.json"])
    assert {file.name for file in tmp_path.iterdir()} == {"model_latest.pth", "notes.tmp.12", "a.tmp"}


@pytest.mark.parametrize("save", [checkpoint.save_latest, lambda folder, content: checkpoint.save(folder / LATEST, content)])
def test_a_full_disk_is_reported_with_path_and_reason_and_leaves_the_old_checkpoint(tmp_path, save):
    for number in (1, 2):
        checkpoint.save_latest(tmp_path, content(number))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))   # the system then refuses to write more than that
    try:
        with pytest.raises(OSError, match="cannot be written: File too large.*model_latest.pth"):
            save(tmp_path, content(3, size=1_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert number_of(checkpoint.load(tmp_path / LATEST)) == 2 and number_of(checkpoint.load(tmp_path / PREVIOUS)) == 1
    assert {file.name for file in tmp_path.iterdir()} == {LATEST, PREVIOUS}


def test_a_disk_that_fails_at_the_last_moment_costs_neither_checkpoint(tmp_path, monkeypatch):
    for number in (1, 2):
        checkpoint.save_latest(tmp_path, content(number))

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("utils.core.files.os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save_latest(tmp_path, content(3))
    assert [number_of(checkpoint.load(tmp_path / name)) for name in (LATEST, PREVIOUS)] == [2, 1]


def test_no_link_is_left_where_both_checkpoints_are_one_file(tmp_path):
    checkpoint.save_latest(tmp_path, content(1))
    os.link(tmp_path / LATEST, tmp_path / PREVIOUS)   # as after a kill between the two
    checkpoint.save_latest(tmp_path, content(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == [LATEST, PREVIOUS]
    assert [number_of(checkpoint.load(tmp_path / name)) for name in (LATEST, PREVIOUS)] == [2, 1]


def test_the_data_reach_the_disk_before_the_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(files.os, name, lambda *arguments, name=name, real=real: (calls.append(name), real(*arguments))[1])
    with atomic_write(tmp_path / "a") as file:
        file.write(b"x")
    assert calls == ["fsync", "replace", "fsync"]


# Files that are not good.

def test_a_bit_flipped_anywhere_is_refused_or_does_no_harm(tmp_path):
    path = tmp_path / "a.pth"
    checkpoint.save(path, content(1, size=2000))
    good, whole = path.read_bytes(), checkpoint.load(path)
    draw, refused = random.Random(0), 0
    for _ in range(400):
        damaged = bytearray(good)
        damaged[draw.randrange(len(good))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            saved = checkpoint.load(path)
        except UserError as error:
            refused += 1
            assert str(path) in str(error)
        else:
            assert all(torch.equal(saved["state_dict"][name], tensor) for name, tensor in whole["state_dict"].items())
            assert {**saved, "state_dict": None} == {**whole, "state_dict": None}
    assert refused > 200   # the rest fell on padding


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    path = tmp_path / "a.pth"
    checkpoint.save(path, content(1))
    good = path.read_bytes()
    for length in [*range(0, 80), *range(80, len(good), 37)]:
        path.write_bytes(good[:length])
        with pytest.raises(UserError, match="a.pth"):
            checkpoint.load(path)


class Hostile:
    """A pickle of this runs a command when it is read carelessly."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_code_in_a_file_never_runs(tmp_path):
    marker = tmp_path / "marker"
    hostile = {"state_dict": {"w": torch.zeros(1)}, "extra": Hostile(marker)}
    plain, archive, legacy, split = (tmp_path / name for name in ("plain.pth", "archive.pth", "legacy.pth", "split.pth"))
    plain.write_bytes(pickle.dumps(hostile, protocol=2))
    torch.save(hostile, archive)
    torch.save(hostile, legacy, _use_new_zipfile_serialization=False)
    torch.save(hostile, split)
    for path in (archive, legacy):
        with pytest.raises(UserError, match="refused: it holds more than tensors.*"):
            checkpoint.load(path)
    with pytest.raises(UserError, match="a pickle that was not written by torch.save"):
        checkpoint.load(plain)
    with pytest.raises(UserError):
        Split.load(split)
    assert not marker.exists()
    pickle.loads(plain.read_bytes())
    assert marker.exists(), "the file is harmless: this test proves nothing"


def changed(**entries) -> dict:
    return {"format": 1, **content(), **entries}


@pytest.mark.parametrize(("stored", "message"), [
    ([1, 2], "under 'state_dict'"),
    (torch.zeros(3), "under 'state_dict'"),
    ({"weights": {}}, "under 'state_dict'"),
    ({"state_dict": {}}, "under 'state_dict'"),
    ({"state_dict": {"w": 1.0}}, "under 'state_dict'"),
    ({"state_dict": [torch.zeros(1)]}, "under 'state_dict'"),
    (changed(format=2), "format 2"),
    (changed(format=torch.ones(2)), "format"),
    ({"state_dict": {"w": torch.zeros(2, dtype=torch.uint8)}}, "under 'state_dict'"),
    (changed(architecture=None), "'architecture' is NoneType"),
    ({name: value for name, value in changed().items() if name != "dataset"}, "'dataset' is missing"),
    (changed(temperatures="0.5"), "'temperatures' is str"),
    (changed(split=[1]), "'split' is list"),
])
def test_a_file_of_something_else_is_refused(tmp_path, stored, message):
    torch.save(stored, tmp_path / "a.pth")
    with pytest.raises(UserError, match=message):
        checkpoint.load(tmp_path / "a.pth")


@pytest.mark.parametrize("stored", [b"", b"no archive", b"PK\x05\x06" + bytes(18), b"\x89PNG\r\n", b"\x80\x02.", b"\x80\x02N."])
def test_a_file_that_is_no_checkpoint_at_all_is_refused(tmp_path, stored):
    (tmp_path / "a.pth").write_bytes(stored)
    with pytest.raises(UserError, match="a.pth"):
        checkpoint.load(tmp_path / "a.pth")


def test_an_archive_of_something_else_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(UserError, match="a.pth"):
        checkpoint.load(tmp_path / "a.pth")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="a.pth: no such checkpoint"):
        checkpoint.load(tmp_path / "a.pth")


@pytest.mark.parametrize("released", [
    {"state_dict": {"module.w": torch.ones(2)}}, {"state_dict": {"w": torch.ones(2)}, "arch": "msdnet", "epoch": 5},
    {"state_dict": {"model": OrderedDict({"module.w": torch.ones(2)})}, "best_acc": 70.5}])
def test_the_released_forms_come_back_with_plain_names(tmp_path, released):
    torch.save(released, tmp_path / "a.pth")
    assert list(checkpoint.load(tmp_path / "a.pth")["state_dict"]) == ["w"]


def test_a_checkpoint_without_training_state_can_be_evaluated_but_not_resumed(tmp_path):
    checkpoint.save(tmp_path / LATEST, {**content(), "training": {"optimizer": {}}})   # as the first version wrote them
    assert number_of(checkpoint.load(tmp_path / LATEST)) == 0
    with pytest.raises(UserError, match="cannot be resumed.*'objective' is missing"):
        checkpoint.load_latest(tmp_path)


@pytest.mark.parametrize(("weights", "message"), [
    ({"weight": torch.zeros(2, 3)}, "it has no bias"),
    ({"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}, r"weight has shape \[2, 4\], expected \[2, 3\]"),
    ({"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "scale": torch.zeros(1)}, "it has scale, which"),
    ({"weight": torch.full((2, 3), float("nan")), "bias": torch.zeros(2)}, "NaN or infinite weights in weight"),
])
def test_weights_of_another_network_or_none_at_all_are_refused(weights, message):
    with pytest.raises(UserError, match=f"^a.pth .*{message}"):
        checkpoint.load_weights(nn.Linear(3, 2), weights, "a.pth")


# Which checkpoint a run goes on from.

def test_a_new_folder_has_nothing_to_go_on_from(tmp_path):
    assert checkpoint.load_latest(tmp_path) is None


def test_a_damaged_latest_checkpoint_is_set_aside_for_the_one_before(tmp_path, caplog):
    for number in (1, 2):
        checkpoint.save_latest(tmp_path, content(number))
    damage(tmp_path / LATEST)
    assert number_of(checkpoint.load_latest(tmp_path)) == 1
    [message] = caplog.messages
    assert LATEST in message and DAMAGED in message and PREVIOUS in message
    # Nor may the next save put the damaged file in the place of the good one.
    checkpoint.save_latest(tmp_path, content(3))
    assert number_of(checkpoint.load(tmp_path / PREVIOUS)) == 1
    assert number_of(checkpoint.load_latest(tmp_path)) == 3


def test_a_later_start_still_says_that_it_goes_on_from_the_file_before(tmp_path, caplog):
    """Between the damage and the next save another start must not pass over the lost epoch in silence."""
    caplog.set_level("INFO")
    for number in (1, 2):
        checkpoint.save_latest(tmp_path, content(number))
    checkpoint.load_latest(tmp_path)
    assert str(tmp_path / LATEST) in caplog.text
    damage(tmp_path / LATEST)
    for _ in range(2):
        caplog.clear()
        assert number_of(checkpoint.load_latest(tmp_path)) == 1
        assert "going on from " + PREVIOUS in caplog.text


@pytest.mark.parametrize("trouble", [OSError(errno.ESTALE, "stale"), OSError(errno.EMFILE, "too many open files"),
                                     PermissionError(errno.EACCES, "denied"), MemoryError()], ids=repr)
def test_a_file_that_cannot_be_read_ends_the_start_and_is_left_where_it_is(tmp_path, monkeypatch, trouble):
    """A stale handle of a network file system says nothing about the content: the next start may read it."""
    for number in (1, 2):
        checkpoint.save_latest(tmp_path, content(number))
    read = Path.read_bytes

    def fail(path):
        if path.name == LATEST:
            raise trouble
        return read(path)

    with monkeypatch.context() as patch, pytest.raises(type(trouble)):
        patch.setattr(Path, "read_bytes", fail)
        checkpoint.load_latest(tmp_path)
    assert number_of(checkpoint.load_latest(tmp_path)) == 2 and not (tmp_path / DAMAGED).exists()


def test_no_memory_for_the_content_is_no_damage_either(tmp_path, monkeypatch):
    checkpoint.save_latest(tmp_path, content(1))

    def fail(*_, **__):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="can't allocate"):
        patch.setattr(torch, "load", fail)
        checkpoint.load_latest(tmp_path)
    assert number_of(checkpoint.load_latest(tmp_path)) == 1


def test_only_the_first_process_moves_a_damaged_checkpoint(tmp_path, monkeypatch):
    for number in (1, 2):
        checkpoint.save_latest(tmp_path, content(number))
    damage(tmp_path / LATEST)
    monkeypatch.setattr(checkpoint.distributed, "is_main", lambda: False)
    assert number_of(checkpoint.load_latest(tmp_path)) == 1 and (tmp_path / LATEST).exists()


def test_two_damaged_checkpoints_are_both_reported_and_kept(tmp_path):
    for number in (1, 2):
        checkpoint.save_latest(tmp_path, content(number))
    damage(tmp_path / LATEST)
    (tmp_path / PREVIOUS).write_bytes(b"")
    with pytest.raises(UserError, match=f"{LATEST} is damaged.*{PREVIOUS} cannot be read"):
        checkpoint.load_latest(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {LATEST, PREVIOUS}


def damage(path: Path) -> None:
    """Change one byte of the weights, as a failing disk would."""
    stored = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    stored[largest.header_offset + largest.file_size // 2] ^= 255
    os.unlink(path)   # it may share its content with the previous checkpoint
    path.write_bytes(stored)


@pytest.mark.parametrize("spoil", [
    lambda saved: saved["architecture"].pop("base"), lambda saved: saved["architecture"].update(nBlocks="x"),
    lambda saved: saved["architecture"].update(more=1), lambda saved: saved.update(method="no such"),
    lambda saved: saved["architecture"].update(nBlocks=100_000), lambda saved: saved["architecture"].update(reduction=math.inf),
    lambda saved: saved.update(temperatures=[float("nan")] * 3)])
def test_a_checkpoint_that_makes_no_sense_is_no_network_either(tmp_path, spoil):
    from pathlib import Path

    from utils.evaluation.fast_form import load_model

    published = Path(__file__).parent.parent / "published/cifar100_small/msdnet_boost/model_anytime.pth"
    saved = checkpoint.load(published)
    assert load_model(published)[0].n_exits > 1
    spoil(saved)
    checkpoint.save(tmp_path / "a.pth", saved)
    with pytest.raises(UserError, match="makes no sense"):
        load_model(tmp_path / "a.pth")
