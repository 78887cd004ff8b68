"""The paper's tables with this project's rows, from made-up results files."""
from __future__ import annotations

import json
import re
import shlex
import statistics
from pathlib import Path

import pytest
from tiny import one_line_error

from args import parse_args
from utils import report
from utils.core.tables import Table
from utils.options.catalog import method_title
from utils.reports.finished_runs import read_run, read_runs, seeds_together
from utils.reports.paper import ANYTIME
from utils.reports.published_runs import published_runs
from utils.runs.folder import plain

ROOT = Path(__file__).resolve().parent.parent
MACS = {config["name"]: config for config in json.loads((ROOT / "tests/data/macs.json").read_text())["configs"]}
PAPERS = {"msdnet": "msdnet_cifar100_anytime", "ranet": "ranet_cifar100_anytime"}
SCHEDULE = "--epochs 300 --lr_milestones 150,225"


def write_run(folder: Path, top1: float = 70.0, network: str = "msdnet", flags: str = "", split: str | None = None,
              on_test: float | None = None, n_train: int | None = 50_000, processes: int = 1, data_hash: str | None = None,
              **test) -> Path:
    """A finished run whose exit k (from 0) has accuracy top1 + k."""
    config = MACS[PAPERS.get(network, network)]
    args = parse_args([*config["flags"].split(), *SCHEDULE.split(), *flags.split()])
    n = len(config["macs"])
    content = {"format": 1, "config": plain(vars(args)), "processes": processes, "n_train": n_train, "split_hash": split,
               "data_hash": data_hash,
               "epochs": [], "best": {},
               "test": {"dataset": args.dataset, "method": args.method, "arch": args.arch, "config": {}, "n_test": 10_000,
                        "macs": config["macs"], "top1": [top1 + k for k in range(n)], "epoch": args.epochs, **test}}
    if on_test:
        content["best_on_test"] = {"epoch": 290, "top1": [on_test + k for k in range(n)], "chosen_on": "test set"}
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(content))
    return folder


def write_curve(folder: Path, name: str = "dynamic.json", budgets=(10, 20, 30), **changes) -> Path:
    """A budgeted evaluation in which every number is another one; budgets in 10^6 MACs."""
    points = [{"budget": 1e6 * b, "p": b / 100, "valid_mean_macs": 1e6 * (b + 1), "valid_top1": 20 + b,
               "test_mean_macs": 1e6 * (b + 2), "test_top1": 50.5 + b} for b in budgets]
    content = {"format": 1, "name": folder.name, "dataset": "cifar100", "method": "boost", "arch": "msdnet_ge", "config": {},
               "n_test": 10_000, "macs": [10**7, 3 * 10**7], "family": "eq9", "flat": False, "split_hash": "s", "epoch": 12,
               "epoch_kind": "best on hold-out", "points": points, **changes}
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    return folder


def rows(tables: list[Table], title: str) -> dict[str, list[str]]:
    """Rows of the one table whose title holds these words."""
    [table] = [table for table in tables if title in table.title]
    return {row[0]: list(row[1:]) for row in table.rows}


MSDNET, RANET = "CIFAR-100, MSDNet", "CIFAR-100, RANet"


def test_the_papers_table_has_its_rows_this_projects_and_the_difference(tmp_path):
    tables = report.report([write_run(tmp_path / "boost", 65.0), write_run(tmp_path / "joint", 64.0, flags="--method joint")])
    found = rows(tables, MSDNET)
    assert found["10^6 MACs"] == ["15.14", "25.51", "37.79", "52.06", "62.18", "74.07", "87.73", "100.0", "110.1", "121.7"]
    assert found["BoostNet, paper"][0] == "65.32" and found["BoostNet, here"][:2] == ["65.00", "66.00"]
    assert list(found) == ["10^6 MACs", "baseline, paper", "baseline, here", "  less the paper", "BoostNet, paper",
                           "BoostNet, here", "BoostNet less baseline, paper", "BoostNet less baseline, here"]
    [table] = [table for table in tables if MSDNET in table.title]
    assert table.rows[3][1] == "-0.60" and table.rows[6][1] == "-0.32"   # 64 - 64.60, 65 - 65.32
    assert found["BoostNet less baseline, here"] == ["+1.00"] * 10
    assert found["BoostNet less baseline, paper"][::9] == ["+0.72", "+0.32"]
    assert "chosen by test accuracy; rows here are of the last epoch" in table.notes[0]
    assert set(rows(tables, RANET)["BoostNet, here"]) == {"not run"} and len(tables) == 2


@pytest.mark.parametrize("change", [
    "--epochs 299", "--lr_milestones 150,226", "--batch-size 128", "--lr_f 0.05", "--ensemble_reweight 0.4", "--arch msdnet",
    "--base 5", "--use-valid", "--trainable_ensemble", "--optimizer adam", "--weight-decay 5e-4", "--loss_equal", "--nesterov",
    "--warmup_epochs 5", "--label_smoothing 0.1", "--ema 0.999"])
def test_a_run_of_other_settings_never_enters_the_papers_table(tmp_path, change):
    macs = {"macs": [m + 10**6 for m in MACS["msdnet_cifar100_anytime"]["macs"]]} if change == "--base 5" else {}
    tables = report.report([write_run(tmp_path / "run", flags=change, **macs)])
    assert set(rows(tables, MSDNET)["BoostNet, here"]) == {"not run"}
    [own] = [table for table in tables if "last epoch" in table.title]
    assert own.rows[1][0] == "BoostNet" and "Not the paper's" in own.notes[0]
    assert "--nBlocks 10" in own.title and ("299 epochs" if "299" in change else "300 epochs") in own.title


def test_another_run_has_a_column_for_each_exit_and_its_best_epoch_on_test(tmp_path):
    runs = [write_run(tmp_path / "run", 65.0, on_test=65.5, flags="--epochs 2 --paper_protocol")]
    [own] = [table for table in report.report(runs) if "last epoch" in table.title]
    assert list(own.columns) == ["exit", *map(str, range(1, 11))] and "2 epochs:" in own.title
    assert {row[0]: row[1] for row in own.rows}["  best epoch on the test set"] == "65.50"


def test_a_network_costs_what_is_published_where_every_exit_does_but_for_the_fifth_digit():
    for macs, same in (([1e6, 2e6], True), ([1e6, 3e6], False), ([3e6, 2e6], False), ([1e6], False), ([999_500.5, 2e6], True),
                       ([1e6, 2_000_999], True), ([1e6, 2_001_001], False)):
        assert report.has_costs(macs, [1.0, 2.0]) is same


def test_seeds_become_mean_standard_deviation_and_n(tmp_path):
    values = [65.0, 66.0, 68.5]
    runs = [write_run(tmp_path / str(seed), top1, flags=f"--seed {seed} --device cpu --workers {seed}")
            for seed, top1 in enumerate(values)]
    found = rows(report.report(runs), MSDNET)
    cell = f"{statistics.fmean(values):.2f} +- {statistics.stdev(values):.2f}"
    assert found["BoostNet, here, n = 3"][0] == cell == "66.50 +- 1.80"
    assert found["  less the paper"][0] == f"{66.5 - 65.32:+.2f}"


def test_temperatures_make_no_other_training_where_exits_predict_alone(tmp_path):
    runs = [write_run(tmp_path / str(seed), flags=f"--method joint --seed {seed} --ensemble_reweight 0.{seed + 3}")
            for seed in (0, 1)]
    assert "baseline, here, n = 2" in rows(report.report(runs), MSDNET)


def test_every_seed_has_a_hold_out_of_its_own(tmp_path, capsys):
    runs = [write_run(tmp_path / split, top1, flags=f"--epochs 12 --use-valid --seed {seed}", split=split)
            for seed, split, top1 in ((0, "one", 60.0), (1, "two", 62.0), (1, "three", 62.0))]
    assert "61.00 +- 1.41" in "\n".join(table.text() for table in report.report(runs[:2]))
    assert "and trained on other images" in one_line_error(capsys, lambda: report.main(list(map(str, runs))))


def test_runs_judged_on_other_images_are_not_averaged(tmp_path):
    runs = [write_run(tmp_path / "a", 60.0, flags="--epochs 12 --use-valid", split="one"),
            write_run(tmp_path / "b", 62.0, flags="--epochs 12 --use-valid --seed 1", split="two", n_test=9_000)]
    text = "\n".join(table.text() for table in report.report(runs))
    assert ", n = 2" not in text and "+-" not in text
    shown = [line.split()[-10] for line in text.splitlines() if line.startswith("BoostNet")]
    assert shown[-2:] == ["60.00", "62.00"]


def test_the_best_epoch_on_test_stands_beside_the_last_one(tmp_path):
    runs = [write_run(tmp_path / "a", 65.0, on_test=65.5, flags="--paper_protocol"),
            write_run(tmp_path / "b", 66.0, on_test=66.7, flags="--paper_protocol --seed 1")]
    found = rows(report.report(runs), MSDNET)
    assert found["BoostNet, here, n = 2"][0] == "65.50 +- 0.71"
    assert found["  best epoch on the test set"][0] == "66.10 +- 0.85"
    assert found["    less the last epoch"][0] == "+0.60" and found["    less the paper"][0] == f"{66.1 - 65.32:+.2f}"


def test_a_run_of_the_papers_protocol_and_an_ordinary_one_are_seeds_of_one_training(tmp_path):
    runs = [write_run(tmp_path / "a", 65.0, on_test=66.0, flags="--paper_protocol"), write_run(tmp_path / "b", flags="--seed 1")]
    found = rows(report.report(runs), MSDNET)
    assert "BoostNet, here, n = 2" in found and "  best epoch on the test set" not in found   # one of them does not know it


@pytest.mark.parametrize(("flags", "together"), [("", True), ("--lr-type cosine", False), ("--method l2w", False),
                                                 ("--lr-type cosine --lr_step epoch", True)])
def test_a_run_from_before_lr_step_had_one_rate_per_epoch_which_makes_no_difference_to_multistep(tmp_path, flags, together):
    older = write_run(tmp_path / "older", flags=flags)
    results = json.loads((older / "results.json").read_text())
    del results["config"]["lr_step"]
    (older / "results.json").write_text(json.dumps(results))
    runs, _ = read_runs([older, write_run(tmp_path / "newer", flags=f"--seed 1 {flags}")])
    assert (len(seeds_together(runs)) == 1) == together


def test_ranet_has_its_own_table_and_no_rescaling(tmp_path):
    runs = [write_run(tmp_path / "r", 70.0, network="ranet"), write_run(tmp_path / "ge", 71.0, network="ranet",
                                                                        flags="--arch ranet_ge")]
    tables = report.report(runs)
    assert rows(tables, RANET)["BoostNet, here"][0] == "70.00" and len(tables) == 3


IMAGENET = {"network": "msdnet_imagenet_step7", "flags": "--epochs 90 --lr_milestones 30,60", "n_train": 1_281_167,
            "n_test": 50_000, "processes": 4}


def test_imagenet_counts_the_images_of_all_processes(tmp_path):
    run = write_run(tmp_path / "one", **{**IMAGENET, "processes": 1})
    assert rows(report.report([run]), "ImageNet, MSDNet")["BoostNet, here"][0] == "not run"
    run = write_run(tmp_path / "four", **IMAGENET)
    assert rows(report.report([run]), "ImageNet, MSDNet")["BoostNet, here"][0] == "70.00"


def test_a_run_enters_the_table_of_its_own_data_set_alone(tmp_path):
    tables = report.report([write_run(tmp_path / "imagenet", 60.0, **IMAGENET), write_run(tmp_path / "cifar", 65.0),
                            write_run(tmp_path / "own", 66.0, dataset="folder")])
    assert rows(tables, "own images")["BoostNet"][0] == "66.00"
    assert rows(tables, MSDNET)["BoostNet, here"][0] == "65.00"
    assert rows(tables, "ImageNet, MSDNet")["BoostNet, here"][0] == "60.00"
    assert set(rows(tables, RANET)["BoostNet, here"]) == {"not run"} and len(tables) == 5   # two of each data set


def test_a_run_that_was_tested_before_its_last_epoch_stays_out_of_the_papers_table(tmp_path):
    tables = report.report([write_run(tmp_path / "run", epoch=200)])
    assert set(rows(tables, MSDNET)["BoostNet, here"]) == {"not run"}
    assert "BoostNet" in rows(tables, "200 epochs: top-1 % on 10,000 test images, last epoch")


@pytest.mark.parametrize("method, flags", [("l2w", ""), ("boost_l2w", ""), ("boost_distill", ""), ("block_losses", "--overlap 1"),
                                           ("imta", "--checkpoint x")])
def test_no_method_vanishes_from_the_report(tmp_path, method, flags):
    tables = report.report([write_run(tmp_path / "run", flags=f"--method {method} {flags}")])
    paper = rows(tables, MSDNET)
    assert set(paper["BoostNet, here"]) == set(paper["baseline, here"]) == {"not run"}
    assert rows(tables, "300 epochs")[method_title(method)][0] == "70.00"


@pytest.mark.parametrize("counts", [{"n_test": 500}, {"n_train": 49_999}, {"n_train": None}])
def test_a_run_on_a_part_of_the_images_never_enters_the_papers_table(tmp_path, counts):
    tables = report.report([write_run(tmp_path / "run", **counts)])
    assert set(rows(tables, MSDNET)["BoostNet, here"]) == {"not run"}


def test_half_precision_arithmetic_is_named_in_the_papers_table(tmp_path):
    found = rows(report.report([write_run(tmp_path / "run", flags="--amp bf16")]), MSDNET)
    assert "BoostNet, --amp bf16, here" in found


@pytest.mark.parametrize("schedule, title, row", [
    ("--epochs 3 --lr_milestones 2", "last epoch", "BoostNet less joint training"), ("", MSDNET, "BoostNet less baseline, here")])
@pytest.mark.parametrize("flags, other", [
    ("", {}), ("--amp bf16", {}), ("--batch-size 32", {"processes": 2}), ("", {"data_hash": "b"}), ("", {"n_train": 45_000})])
def test_a_difference_of_methods_is_shown_of_runs_that_differ_in_nothing_else(tmp_path, schedule, title, row, flags, other):
    runs = [write_run(tmp_path / "boost", 65.5, flags=schedule, data_hash="a"),
            write_run(tmp_path / "joint", 64.0, flags=f"{schedule} --method joint {flags}", **{"data_hash": "a", **other})]
    assert rows(report.report(runs), title).get(row) == (None if flags or other else ["+1.50"] * 10)


def test_the_papers_numbers_are_complete():
    for (dataset, backbone), numbers in ANYTIME.items():
        assert len(numbers.millions) == len(numbers.baseline) == len(numbers.boostnet), (dataset, backbone)


def test_text_and_markdown_are_one_table(tmp_path, capsys):
    run = str(write_run(tmp_path / "run", 65.0))
    assert report.main([run]) == 0
    text = capsys.readouterr().out
    assert report.main([run, "--markdown"]) == 0
    markdown = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line.startswith("|")]
    assert ["exit", *map(str, range(1, 11))] in cells and ["---", *["---:"] * 10] in cells
    for row in cells:
        if "---" not in row:
            assert " ".join(row).split() in [line.split() for line in text.splitlines()], row


def test_settings_that_differ_are_named_and_equal_ones_are_not(tmp_path):
    runs = [write_run(tmp_path / name, flags=f"--epochs 3 {flags}")
            for name, flags in (("a", ""), ("b", "--batch-size 256"), ("c", "--method joint"))]
    [own] = [table for table in report.report(runs) if "3 epochs" in table.title]
    assert [row[0] for row in own.rows[1:]] == ["BoostNet, --batch-size 64", "BoostNet, --batch-size 256",
                                               "joint training, --batch-size 64"]


def test_published_results_are_shown_with_their_budgets(capsys):
    assert report.main([str(ROOT / f"published/cifar100_small/msdnet_{method}") for method in ("boost", "joint")]) == 0
    text = capsys.readouterr().out
    assert "12 epochs" in text and "55.91" in text and "budgets solved by eq. 9" in text and "released sweep" in text


@pytest.mark.parametrize("content, message", [
    (None, "holds no finished run"), ("no", "is damaged"), ("[]", "is damaged or of something else"),
    ('{"config": {}}', "holds no finished run"), ('{"config": {}, "test": {}}', "format is missing")])
def test_folders_without_a_finished_run_end_with_one_line(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    assert message in one_line_error(capsys, lambda: report.main([str(tmp_path)]))


def test_runs_without_results_yet_do_not_keep_the_others_from_being_shown(tmp_path, capsys):
    write_run(tmp_path / "done")
    (tmp_path / "begun").mkdir()
    assert report.main([str(path) for path in sorted(tmp_path.iterdir())]) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path / 'begun'} holds no finished run and is left out." in out and "70.00" in out
    assert "not a folder" in one_line_error(capsys, lambda: report.main([str(tmp_path / "no*where")]))


@pytest.mark.parametrize("name", ["epochs", "batch_size"])
def test_settings_that_are_no_numbers_end_with_one_line(tmp_path, capsys, name):
    path = write_run(tmp_path / "run") / "results.json"
    results = json.loads(path.read_text())
    results["config"][name] = "many"
    path.write_text(json.dumps(results))
    assert f"{name} cannot be 'many'" in one_line_error(capsys, lambda: report.main([str(path.parent)]))


@pytest.mark.parametrize("path, value", [
    ("config.arch", None), ("config.seed", float("inf")), ("processes", float("inf")), ("test.n_test", "60"),
    ("test.dataset", []), ("config.ensemble_reweight", ["x"]), ("config.ensemble_reweight", []),
    ("config.arch", []), ("test.macs", [10**400] * 10),
    ("best_on_test", {"top1": [None] * 10}), ("best_on_test", {"top1": [1.0]}), ("test.top1", None), ("test.top1", [1.0]),
    ("test.method", "magic"), ("format", 2)])
def test_results_that_make_no_sense_end_with_one_line(tmp_path, capsys, path, value):
    file = write_run(tmp_path / "run") / "results.json"
    results = json.loads(file.read_text())
    *outer, name = path.split(".")
    place = results
    for key in outer:
        place = place[key]
    place[name] = value
    file.write_text(json.dumps(results))
    message = one_line_error(capsys, lambda: report.main([str(file.parent)]))
    assert f"{file} is damaged" in message and (f"{path}" in message or "not one number for each exit" in message)


@pytest.mark.parametrize("other", [{"data_hash": "b"}, {"n_train": 45_000}, {"processes": 2}, {"epoch": 299},
                                   {"macs": [macs + 1 for macs in MACS[PAPERS["msdnet"]]["macs"]]}])
def test_runs_of_other_data_processes_epochs_or_costs_are_not_averaged(tmp_path, other):
    schedule = "--epochs 300 --lr_milestones 100"
    runs = [write_run(tmp_path / "0", data_hash="a", flags=schedule),
            write_run(tmp_path / "1", flags=f"{schedule} --seed 1", **{"data_hash": "a", **other})]
    text = "\n".join(table.text() for table in report.report(runs))
    assert "n = 2" not in text and "+-" not in text


def test_what_else_differs_is_named(tmp_path):
    runs = [write_run(tmp_path / str(n), flags="--epochs 3", n_train=n, processes=n // 25_000) for n in (25_000, 50_000)]
    assert [name for name in rows(report.report(runs), "3 epochs") if "BoostNet" in name] == [
        "BoostNet, processes 1, training images 25000", "BoostNet, processes 2, training images 50000"]


def test_runs_that_differ_in_what_an_older_one_does_not_say_are_named_by_their_folders(tmp_path):
    runs = [write_run(tmp_path / str(data), flags="--epochs 3", data_hash=data) for data in (None, "a")]
    assert [name for name in rows(report.report(runs), "3 epochs") if "BoostNet" in name] == ["BoostNet (None)", "BoostNet (a)"]


def test_help_says_what_the_tables_are_of(capsys):
    with pytest.raises(SystemExit):
        report.main(["--help"])
    printed = capsys.readouterr().out
    assert report.__doc__.splitlines()[0][:40] in printed and "RESULT_DIR" in printed


# Budgets

def test_budgets_show_test_figures(tmp_path):
    [table] = report.report([write_curve(tmp_path / "run")])
    assert table.title == ("Budgeted batch, CIFAR-100, msdnet_ge with 2 exits, budgets solved by eq. 9: top-1 % on 10,000 test "
                           "images, 10^6 MACs per image")
    assert [table.columns, *table.rows] == [["budget", "10.00", "20.00", "30.00"],
                                            ["BoostNet (run)", "60.50", "70.50", "80.50"],
                                            ["  MACs spent", "12.00", "22.00", "32.00"]]


def test_of_many_budgets_eight_are_shown_from_the_first_to_the_last(tmp_path):
    [table] = report.report([write_curve(tmp_path / "run", budgets=range(40))])
    assert [float(cell) for cell in table.columns[1:]] == [0, 6, 11, 17, 22, 28, 33, 39]
    assert [float(cell) for cell in table.rows[0][1:]] == [50.5, 56.5, 61.5, 67.5, 72.5, 78.5, 83.5, 89.5]


def test_the_released_sweep_is_shown_by_its_q(tmp_path):
    [table] = report.report([write_curve(tmp_path / "run", family="released", flat=True)])
    assert table.columns == ["q", "0.10", "0.20", "0.30"] and "flat curve" in table.title and "released sweep" in table.title


@pytest.mark.parametrize("other", [{"split_hash": "t"}, {"family": "released"}, {"flat": True}, {"n_test": 500},
                                   {"config": {"base": 2}}, {"budgets": (10, 20, 31)}, {"dataset": "cifar10"}])
def test_curves_of_other_images_or_networks_stand_in_a_table_of_their_own(tmp_path, other):
    folders = [write_curve(tmp_path / "a"), write_curve(tmp_path / "b"), write_curve(tmp_path / "c", **other)]
    first, second = report.report(folders)
    assert [row[0] for row in first.rows[::2]] == ["BoostNet (a)", "BoostNet (b)"]
    assert [row[0] for row in second.rows[::2]] == ["BoostNet (c)"]


def test_how_an_epoch_was_chosen_is_named_where_it_differs_or_test_data_chose_it(tmp_path):
    kinds = ["best on hold-out", "last epoch", "epoch", None]
    folders = [write_curve(tmp_path / str(i), epoch_kind=kind) for i, kind in enumerate(kinds)]
    [table] = report.report(folders)
    assert [row[0] for row in table.rows[::2]] == ["BoostNet, best on hold-out (0)", "BoostNet, last epoch (1)",
                                                   "BoostNet, epoch 12 (2)", "BoostNet (3)"]
    [table] = report.report([write_curve(tmp_path / name, epoch_kind="best on test set") for name in "ab"])
    assert [row[0] for row in table.rows[::2]] == ["BoostNet, best on test set (a)", "BoostNet, best on test set (b)"]


def test_patience_has_no_budgets(tmp_path, capsys):
    run = write_curve(write_run(tmp_path / "run"), family="patience", points=[{
        "budget": None, "patience": 1, **dict.fromkeys(("valid_mean_macs", "valid_top1", "test_mean_macs", "test_top1"), 1)}])
    assert not any("Budgeted" in table.title for table in report.report([run]))


# What cannot be read

def test_what_cannot_be_read_is_named_and_does_not_keep_the_others_from_being_shown(tmp_path, capsys):
    write_curve(write_run(tmp_path / "good", 65.0))
    (write_run(tmp_path / "cut") / "results.json").write_text('{"format": 1, ')
    (tmp_path / "folder" / "results.json").mkdir(parents=True)
    (write_curve(tmp_path / "curve") / "dynamic.json").write_text("{}")
    assert report.main([str(path) for path in sorted(tmp_path.iterdir())]) == 0
    out = capsys.readouterr().out
    assert "65.00" in out and "60.50" in out
    for path in ("cut/results.json is damaged", "folder is left out", "curve/dynamic.json is left out"):
        assert f"{tmp_path}/{path}" in out


def test_files_of_anytime_evaluations_are_not_read(tmp_path):
    folder = write_curve(tmp_path / "run")
    (folder / "anytime.json").write_text("no")
    assert len(report.report([folder])) == 1


def test_the_same_run_twice_is_refused(tmp_path, capsys):
    runs = [str(write_run(tmp_path / name)) for name in ("a", "b")]
    assert "are runs of the same flags, seed 0 included; give one" in one_line_error(capsys, lambda: report.main(runs))


def test_curves_of_one_network_stand_side_by_side_whatever_the_order_of_its_settings(tmp_path):
    folders = [write_curve(tmp_path / "a", config={"nBlocks": 5, "base": 4}),
               write_curve(tmp_path / "b", config={"base": 4, "nBlocks": 5})]
    [table] = report.report(folders)
    assert [row[0] for row in table.rows if "(" in row[0]] == ["BoostNet (a)", "BoostNet (b)"]


# The table of published runs

def table_and_commands(folder: Path) -> list[tuple[list[str], list[str]]]:
    """Of every row of the table its cells and the words of its whole command."""
    table, block = published_runs(folder, folder.parent / "docs/page.md").split("\n```bash\n")
    commands = dict(re.findall(r"# (\d+)\n([^#`]*)", block))
    rows = []
    for line in (line for line in table.splitlines()[4:] if line.startswith("|")):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        number, _, more = cells[-1].partition(" ")
        rows.append((cells, shlex.split(commands[number].replace("\\\n", " ") + more.strip("`"))))
    return rows


def test_the_page_has_the_table_of_published_runs(capsys):
    assert report.main([]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") > 6
    assert printed in report.PAGE.read_text(), "paste what `python -m utils.report` prints into docs/results.md"


def test_every_command_in_the_table_trains_its_run(tmp_path):
    schedule = "--epochs 6 --lr_milestones 3,5 --images_per_class 250"
    flags = ["", "--method joint --loss_equal", "--method l2w --meta_interval 4", "--method block_losses --groups 3-7",
             "--method boost_distill --distill_T 4", "--method imta --checkpoint joint/model_latest.pth",
             "--arch msdnet --nesterov", "--trainable_ensemble --weight-decay 1e-4,5e-4",
             "--ensemble_reweight 0.25 --bottleneck false --amp bf16 --compile",
             "--dataset folder --image_size 64 --use-valid --valid_size 500"]
    for i, more in enumerate(flags):
        write_run(tmp_path / f"run{i}", flags=f"{schedule} {more}")
    for folder, least in ((tmp_path, len(flags)), (report.PUBLISHED, 6)):
        table = table_and_commands(folder)
        assert len(table) >= least
        for cells, words in table:
            args = parse_args(words[2:], task="training")
            runs = [read_run((folder.parent / "docs" / link).resolve()) for link in re.findall(r"\[\d+\]\((.*?)\)", cells[8])]
            for name, value in ((name, value) for run in runs for name, value in run.settings.items() if value is not None):
                if hasattr(args, name) and (name, value) != ("lr_step", "epoch"):
                    assert getattr(args, name) == value, (words, name)


def test_a_published_run_is_a_folder_and_nothing_else(tmp_path):
    folder = tmp_path / "published"
    (folder / "later").mkdir(parents=True)
    write_run(folder / "first", 60.0, flags="--epochs 30")
    write_run(folder / "later" / "seed1", 62.0, flags="--epochs 30 --seed 1")
    (folder / "first" / "model_dynamic.pth").write_bytes(b"0" * 1_500_000)
    [(cells, words)] = table_and_commands(folder)
    assert cells[:10] == ["MSDNet", "BoostNet", "10", "15.14 - 121.68", "61.00 +- 1.41", "70.00 +- 1.41", "30",
                          "CIFAR-100, 50,000", "[0](../published/first), [1](../published/later/seed1)",
                          "[model_dynamic.pth](../published/first/model_dynamic.pth) (1.5 MB)"]
    assert words[:2] == ["python", "train_cifar100.py"] and "30" in words
    write_run(folder / "again", 64.0, flags="--epochs 30 --seed 1")   # no further seed
    write_run(folder / "joint", 50.0, flags="--epochs 30 --method joint")
    write_run(folder / "imagenet", 50.0, **IMAGENET)
    (folder / "begun").mkdir()
    (folder / "begun" / "results.json").write_text("{}")
    rows = table_and_commands(folder)
    assert [(row[0][1], row[0][4]) for row in rows] == [
        ("BoostNet", "62.00 +- 2.83"), ("BoostNet", "62.00"), ("joint training", "50.00"), ("BoostNet", "50.00")]
    assert rows[2][0][-1] == "1 `--method joint`" and rows[0][0][-1] == "1"
    assert rows[3][1][:3] == ["torchrun", "--nproc_per_node=4", "train_imagenet.py"]
    assert "begun holds no finished run" in published_runs(folder, tmp_path / "page.md").splitlines()[-1]


# Recipes of other projects.

def write_l2w(folder: Path, size: int = 4, flags: str = "", **more) -> Path:
    """A finished run as msdnet_scripts/l2w_imagenet.sh starts it in 8 processes, its flags apart."""
    recipe = ("--arch msdnet --method l2w --epochs 100 --lr_f 0.8 --lr-type cosine --batch-size 512 --meta_interval 100 "
              f"--meta_net_hidden_size 500 {flags}")
    return write_run(folder, **{"network": f"msdnet_imagenet_step{size}", "flags": recipe, "n_train": 1_281_167, "processes": 8,
                                "n_test": 50_000, **more})


@pytest.mark.parametrize(("size", "flags", "title", "first"), [
    (4, "", "L2W-DEN, 100 epochs", 59.54), (6, "", "L2W-DEN, 100 epochs", 60.05), (7, "", "L2W-DEN, 100 epochs", 59.24),
    (4, "--epochs 300 --label_smoothing 0.1", "L2W-DEN, 300 epochs, label smoothing 0.1", 61.64),
    (7, "--epochs 300 --label_smoothing 0.1", "L2W-DEN, 300 epochs, label smoothing 0.1", 60.94)])
def test_a_run_of_another_projects_recipe_stands_beside_what_that_publishes(tmp_path, size, flags, title, first):
    found = rows(report.report([write_l2w(tmp_path / "run", size, flags)]), "ImageNet, msdnet")
    assert found[f"{title}, published"][0] == f"{first:.2f}" and len(found[f"{title}, published"]) == 5
    assert sum(", published" in row and not row.startswith("  ") for row in found) == 2
    assert found[f"  less {title}, published"][0] == f"{70 - first:+.2f}"
    assert sum(row.startswith("  less") for row in found) == 1


@pytest.mark.parametrize(("flags", "other"), [
    *((flag, {}) for flag in ("--lr_f 0.4", "--label_smoothing 0.1", "--epochs 90", "--lr_step epoch", "--lr-type linear",
                              "--meta_interval 1", "--use-valid", "--epsilon 0.2", "--arch msdnet_ge", "--batch-size 256")),
    ("", {"processes": 4}), ("", {"n_train": 1_231_167}), ("", {"epoch": 90})])
def test_a_run_of_another_recipe_is_not_compared_with_it(tmp_path, flags, other):
    tables = report.report([write_l2w(tmp_path / "run", 4, flags, **other)])
    found = rows(tables, "ImageNet, msdnet")
    assert "L2W-DEN, 100 epochs, published" in found and not any(row.startswith("  less") for row in found)
    assert any("where its recipe is theirs" in note for table in tables for note in table.notes)


def test_published_rows_of_other_networks_stay_away(tmp_path):
    text = "\n".join(table.text() for table in report.report([write_run(tmp_path / "run", flags="--epochs 3")]))
    assert "L2W-DEN" not in text
