"""What tables and figures read of finished runs and of evaluation files, piece by piece."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_report import write_curve, write_run

from utils.core.errors import UserError
from utils.reports.finished_runs import (
    by_exit,
    differences,
    kinds_of_epoch,
    mean_and_deviation,
    mode_of,
    of_one_training,
    read_evaluation,
    read_evaluations,
    read_reliability,
    read_run,
    read_runs,
    require_folder,
    seeds_together,
)


def change(folder: Path, **parts) -> Path:
    """Replace entries of parts of a run's results.json; None takes one out."""
    path = folder / "results.json"
    content = json.loads(path.read_text())
    for part, entries in parts.items():
        target = content if part == "top" else content[part]
        for name, value in entries.items():
            target.pop(name, None) if value is None else target.update({name: value})
    path.write_text(json.dumps(content))
    return folder


def write_anytime(folder: Path, name: str = "anytime.json", **changes) -> Path:
    content = {"format": 1, "name": folder.name, "dataset": "cifar100", "method": "boost", "arch": "msdnet_ge", "config": {},
               "n_test": 10, "macs": [1.0, 2], "top1": [50.0, 60], **changes}
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    return folder / name


def test_a_run_as_it_is_read(tmp_path):
    run = read_run(write_run(tmp_path / "a", 60.0, flags="--seed 3 --nChannels 8", split="s", on_test=65.0, n_train=45_000,
                             processes=2, data_hash="d"))
    assert (run.folder, run.seed, run.split_hash) == (tmp_path / "a", 3, "s")
    assert (run.dataset, run.method, run.n_test) == ("cifar100", "boost", 10_000)
    assert run.top1 == [60.0 + k for k in range(10)] and run.on_test == [65.0 + k for k in range(10)] and len(run.macs) == 10
    named = {"processes": 2, "training images": 45_000, "test images": 10_000, "data": "d", "tested epoch": 300, "nChannels": 8,
             "stem": "small", "ensemble_reweight": [0.5], "lr_step": None}
    assert {name: run.settings[name] for name in named} == named
    assert not {"seed", "paper_protocol", "result_dir", "threads", "publish"} & set(run.settings)
    assert {"checkpoint", "start_epoch", "epochs"} <= set(run.settings)   # which make another training


def test_settings_without_an_effect_make_no_difference(tmp_path):
    for n, (flags, reweight, lr_step) in enumerate((
            ("--method joint", None, None), ("--method boost", [0.5], None), ("--method boost --lr-type cosine", [0.5], "batch"),
            ("--method l2w", None, "batch"), ("--method boost_l2w", [0.5], "batch"))):
        settings = read_run(write_run(tmp_path / str(n), flags=flags)).settings
        assert (settings["ensemble_reweight"], settings["lr_step"]) == (reweight, lr_step), flags


def test_files_of_older_versions_lack_some_entries(tmp_path):
    run = change(write_run(tmp_path / "a"), top={"processes": None, "n_train": None, "data_hash": None},
                 config={"stem": None, "lr_step": None})
    read = read_run(run)
    expected = {"processes": 1, "training images": None, "data": None, "stem": "small"}
    assert {name: read.settings[name] for name in expected} == expected and read.on_test is None


def test_a_run_without_a_test_is_not_finished_and_numbers_that_are_not_one_for_each_exit_are_damage(tmp_path):
    (tmp_path / "empty").mkdir()
    assert read_run(tmp_path / "empty") is None
    assert read_run(change(write_run(tmp_path / "a"), top={"test": None})) is None
    for n, parts in enumerate(({"test": {"macs": [1.0]}}, {"test": {"top1": [1.0]}}, {"best_on_test": {"top1": [1.0]}})):
        with pytest.raises(UserError, match="not one number for each exit"):
            read_run(change(write_run(tmp_path / f"b{n}", on_test=70.0), **parts))


def test_folders_that_cannot_be_read_are_named_and_the_others_are_read(tmp_path):
    good, later = write_run(tmp_path / "good"), write_run(tmp_path / "later", flags="--seed 1")
    damaged = change(write_run(tmp_path / "damaged"), test={"macs": [1.0]})
    (tmp_path / "empty").mkdir()
    runs, left_out = read_runs([damaged, good, tmp_path / "empty", later])
    assert [run.folder for run in runs] == [good, later]
    assert left_out == [f"{damaged} is left out: {damaged / 'results.json'} is damaged: its accuracies are not one number for "
                        "each exit", f"{tmp_path / 'empty'} holds no finished run and is left out."]
    for path in (tmp_path / "nowhere", good / "results.json"):
        for call in (lambda path=path: read_runs([path]), lambda path=path: require_folder(path)):
            with pytest.raises(UserError, match="is not a folder"):
                call()


def test_seeds_of_one_training_go_together_and_a_seed_counts_once(tmp_path):
    first, second, other = (
        read_run(write_run(tmp_path / name, 60.0 + n, flags=f"--seed {n} {flags}", split=name, on_test=80.0 - n))
        for n, (name, flags) in enumerate((("a", ""), ("b", ""), ("c", "--nChannels 8"))))
    assert seeds_together([first, other, second]) == [[first, second], [other]] == of_one_training([first, other, second])
    assert by_exit([first, second])[:2] == [(60.0, 61.0), (61.0, 62.0)]
    assert by_exit([first, second], best=True)[:2] == [(80.0, 79.0), (81.0, 80.0)]
    assert differences(first, other) == ["nChannels"] and differences(first, second) == []
    assert differences(first, other, ("nChannels",)) == [] == differences(first, second, ("nChannels",))
    for name, split, words in (("d", "a", "included; give one"), ("e", "x", "included and trained on other images; give one")):
        same = read_run(write_run(tmp_path / name, flags="--seed 0", split=split))
        with pytest.raises(UserError, match=words):
            seeds_together([first, second, same])


def test_the_cell_of_a_mean():
    assert mean_and_deviation([70.126]) == "70.13"
    assert mean_and_deviation([70.0, 71.0]) == "70.50 +- 0.71"   # of a sample


@pytest.mark.parametrize(("name", "changes", "suffix"), [
    ("dynamic.json", {}, ""), ("dynamic_x.json", {}, "_x"), ("dynamic_flat.json", {"flat": True}, ""),
    ("dynamic_flat_x.json", {"flat": True}, "_x"), ("dynamic_optimised.json", {"family": "optimised"}, ""),
    ("dynamic_optimised_x.json", {"family": "optimised"}, "_x"), ("dynamic_optimised.json", {}, "_optimised")])
def test_the_suffix_of_a_curve_becomes_part_of_its_name(tmp_path, name, changes, suffix):
    result = read_evaluation(write_curve(tmp_path / "run", name, **changes) / name)
    assert (result["name"], result["suffix"]) == (f"run{suffix}", suffix)
    assert (result["ensemble"], result["policy"], result["temperatures"], result["ema"]) == (None, "confidence", [], None)
    assert result["config"] == {"stem": "small"}


def test_the_suffix_of_an_anytime_file_and_what_damages_one(tmp_path):
    assert read_evaluation(write_anytime(tmp_path / "run"))["suffix"] == ""
    result = read_evaluation(write_anytime(tmp_path / "run", "anytime_optimised.json"))
    assert (result["name"], result["suffix"]) == ("run_optimised", "_optimised")
    with pytest.raises(UserError, match="damaged: top1 and macs have different lengths"):
        read_evaluation(write_anytime(tmp_path / "run", top1=[50.0]))
    for family in ("eq9", "released"):
        points = [{"valid_mean_macs": 1, "valid_top1": 1, "test_mean_macs": 1, "test_top1": 1, "budget": None, "p": "0.5"}]
        with pytest.raises(UserError, match="damaged: points"):
            read_evaluation(write_curve(tmp_path / "run", family=family, points=points) / "dynamic.json")
    modes = [mode_of(Path(name)) for name in ("anytime.json", "dynamic.json", "x_dynamic.json")]
    assert modes == ["anytime", "dynamic", "anytime"]


def test_the_anytime_file_of_training_gives_way_to_those_with_a_suffix(tmp_path):
    def names() -> list[str]:
        return [f"{'points' in result} {result['suffix']}" for result in read_evaluations(tmp_path / "run")]

    write_anytime(tmp_path / "run")
    assert names() == ["False "]
    write_curve(tmp_path / "run")
    write_curve(tmp_path / "run", "dynamic_a.json")
    write_anytime(tmp_path / "run", "anytime_average.json", ensemble="average", temperatures=[0.0, 0.0])
    assert names() == ["False ", "False _average", "True ", "True _a"]   # another reading of the exits, or a curve, is no reason
    write_anytime(tmp_path / "run", "anytime_b.json")
    assert names() == ["False _average", "False _b", "True ", "True _a"]
    (tmp_path / "empty").mkdir()
    for folder, words in ((tmp_path / "empty", "has no anytime"), (tmp_path / "nowhere", "is not a folder")):
        with pytest.raises(UserError, match=words):
            read_evaluations(folder)


def test_reliability_is_read_without_temperatures_first_and_its_exits_are_those_of_macs(tmp_path):
    bins = {"confidence": [0.5, 0.9], "accuracy": [0.4, 0.8], "share": [0.3, 0.7]}

    def write(name: str, **changes) -> None:
        write_anytime(tmp_path / "run", name, **{"ece": [1.0, 2.0], "bins": [bins, bins], "calibration": None,
                                                 "ideal": {"top1": 1.0, "mean_macs": 1.0}, **changes})

    (tmp_path / "run").mkdir()
    assert read_reliability(tmp_path / "run") == []
    write("reliability_a.json", calibration=[1.0, 2.0])
    write("reliability_b.json")
    write("reliability.json", calibration=[1.0, 2.0])
    assert [result["name"] for result in read_reliability(tmp_path / "run")] == ["run_b", "run", "run_a"]
    unequal = {"confidence": [0.5], "accuracy": [0.4, 0.8], "share": [0.3, 0.7]}
    for changes, words in (({"ece": [1.0]}, "not those of macs"), ({"macs": [1.0]}, "not those of macs"),
                           ({"bins": [bins, unequal]}, "different numbers")):
        write("reliability.json", **changes)
        with pytest.raises(UserError, match=words):
            read_reliability(tmp_path / "run")


@pytest.mark.parametrize(("kinds", "shown"), [
    ([("last epoch", 3), ("last epoch", 3)], ["", ""]),
    ([("best on hold-out", 3), ("last epoch", 4)], ["best on hold-out", "last epoch"]),
    ([("best on test set", 3)], ["best on test set"]), ([("epoch", 3), ("epoch", 3)], ["", ""]),
    ([("epoch", 3), ("epoch", 4)], ["epoch 3", "epoch 4"]), ([(None, None), ("last epoch", 3)], ["", "last epoch"])])
def test_how_an_epoch_was_chosen_is_shown_where_it_differs_or_test_data_chose(kinds, shown):
    assert kinds_of_epoch([{"epoch_kind": kind, "epoch": epoch} for kind, epoch in kinds]) == shown
