"""The paper's tables with this project's rows, from made-up results files."""
from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
from tiny import one_line_error

from args import parse_args
from utils import report
from utils.core.tables import Table
from utils.reports.paper import ANYTIME
from utils.runs.folder import plain

ROOT = Path(__file__).resolve().parent.parent
MACS = {config["name"]: config for config in json.loads((ROOT / "tests/data/macs.json").read_text())["configs"]}
PAPERS = {"msdnet": "msdnet_cifar100_anytime", "ranet": "ranet_cifar100_anytime"}
SCHEDULE = "--epochs 300 --lr_milestones 150,225"


def write_run(folder: Path, top1: float = 70.0, network: str = "msdnet", flags: str = "", split: str | None = None,
              on_test: float | None = None, n_train: int | None = 50_000, **test) -> Path:
    """A finished run whose exit k (from 0) has accuracy top1 + k."""
    config = MACS[PAPERS.get(network, network)]
    args = parse_args([*config["flags"].split(), *SCHEDULE.split(), *flags.split()])
    n = len(config["macs"])
    content = {"format": 1, "config": plain(vars(args)), "processes": 1, "n_train": n_train, "split_hash": split,
               "epochs": [], "best": {},
               "test": {"dataset": args.dataset, "method": args.method, "arch": args.arch, "config": {}, "n_test": 10_000,
                        "macs": config["macs"], "top1": [top1 + k for k in range(n)], "epoch": args.epochs, **test}}
    if on_test:
        content["best_on_test"] = {"epoch": 290, "top1": [on_test + k for k in range(n)], "chosen_on": "test set"}
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(content))
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
    assert set(rows(tables, RANET)["BoostNet, here"]) == {"not run"} and len(tables) == 2


@pytest.mark.parametrize("change", [
    "--epochs 299", "--lr_milestones 150,226", "--batch-size 128", "--lr_f 0.05", "--ensemble_reweight 0.4", "--arch msdnet",
    "--base 5", "--use-valid", "--trainable_ensemble", "--optimizer adam", "--weight-decay 5e-4", "--loss_equal"])
def test_a_run_of_other_settings_never_enters_the_papers_table(tmp_path, change):
    macs = {"macs": [m + 10**6 for m in MACS["msdnet_cifar100_anytime"]["macs"]]} if change == "--base 5" else {}
    tables = report.report([write_run(tmp_path / "run", flags=change, **macs)])
    assert set(rows(tables, MSDNET)["BoostNet, here"]) == {"not run"}
    [own] = [table for table in tables if "last epoch" in table.title]
    assert own.rows[1][0] == "BoostNet" and "Not the paper's" in own.notes[0]
    assert "--nBlocks 10" in own.title and ("299 epochs" if "299" in change else "300 epochs") in own.title


def test_seeds_become_mean_standard_deviation_and_n(tmp_path):
    values = [65.0, 66.0, 68.5]
    runs = [write_run(tmp_path / str(seed), top1, flags=f"--seed {seed} --device cpu --workers {seed}")
            for seed, top1 in enumerate(values)]
    found = rows(report.report(runs), MSDNET)
    cell = f"{statistics.fmean(values):.2f} +- {statistics.stdev(values):.2f}"
    assert found["BoostNet, here, n = 3"][0] == cell == "66.50 +- 1.80"
    assert found["  less the paper"][0] == f"{66.5 - 65.32:+.2f}"


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


def test_ranet_has_its_own_table_and_no_rescaling(tmp_path):
    runs = [write_run(tmp_path / "r", 70.0, network="ranet"), write_run(tmp_path / "ge", 71.0, network="ranet",
                                                                        flags="--arch ranet_ge")]
    tables = report.report(runs)
    assert rows(tables, RANET)["BoostNet, here"][0] == "70.00" and len(tables) == 3


def test_imagenet_counts_the_images_of_all_processes(tmp_path):
    run = write_run(tmp_path / "i", network="msdnet_imagenet_step7", flags="--epochs 90 --lr_milestones 30,60",
                    n_train=1_281_167, n_test=50_000)
    assert rows(report.report([run]), "ImageNet, MSDNet")["BoostNet, here"][0] == "not run"
    results = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps({**results, "processes": 4}))
    assert rows(report.report([run]), "ImageNet, MSDNet")["BoostNet, here"][0] == "70.00"


@pytest.mark.parametrize("counts", [{"n_test": 500}, {"n_train": 49_999}, {"n_train": None}])
def test_a_run_on_a_part_of_the_images_never_enters_the_papers_table(tmp_path, counts):
    tables = report.report([write_run(tmp_path / "run", **counts)])
    assert set(rows(tables, MSDNET)["BoostNet, here"]) == {"not run"}


def test_half_precision_arithmetic_is_named_in_the_papers_table(tmp_path):
    found = rows(report.report([write_run(tmp_path / "run", flags="--amp bf16")]), MSDNET)
    assert "BoostNet, --amp bf16, here" in found


def test_a_difference_of_methods_is_shown_of_runs_that_differ_in_nothing_else(tmp_path):
    def difference(name, flags):
        runs = [write_run(tmp_path / f"{name}0", flags="--epochs 3 --lr_milestones 2"),
                write_run(tmp_path / f"{name}1", flags=f"--epochs 3 --lr_milestones 2 --method joint {flags}")]
        return rows(report.report(runs), "last epoch").get("BoostNet less joint training")

    assert difference("a", "") == ["+0.00"] * 10 and difference("b", "--lr_f 0.2") is None


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
    (None, "holds no finished run"), ("no", "is not the results.json"), ("[]", "is not the results.json"),
    ('{"config": {}}', "holds no finished run"), ('{"config": {}, "test": {}}', "is not the results.json")])
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
    ("best_on_test", {"top1": [None] * 10}), ("test.top1", None), ("config.lr_f", "fast")])
def test_results_that_make_no_sense_end_with_one_line(tmp_path, capsys, path, value):
    file = write_run(tmp_path / "run") / "results.json"
    results = json.loads(file.read_text())
    *outer, name = path.split(".")
    place = results
    for key in outer:
        place = place[key]
    place[name] = value
    file.write_text(json.dumps(results))
    assert "is not the results.json of a run" in one_line_error(capsys, lambda: report.main([str(file.parent)]))


def test_runs_on_other_data_are_not_averaged(tmp_path):
    runs = [write_run(tmp_path / str(seed), flags=f"--seed {seed}") for seed in (0, 1)]
    for run, data_hash in zip(runs, "ab"):
        results = json.loads((run / "results.json").read_text())
        (run / "results.json").write_text(json.dumps({**results, "data_hash": data_hash}))
    assert not any("n = 2" in row for row in rows(report.report(runs), MSDNET))


def test_the_same_run_twice_is_refused(tmp_path, capsys):
    runs = [str(write_run(tmp_path / name)) for name in ("a", "b")]
    assert "are runs of the same flags, seed 0 included; give one" in one_line_error(capsys, lambda: report.main(runs))
