"""The script that trains every method with one recipe, and the table and figure of its runs."""
from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
from test_scripts import ROOT, bash, commands, flags

from utils import methods_table
from utils.core.errors import UserError
from utils.options.catalog import METHODS
from utils.runs.result_files import result_name

PUBLISHED = ROOT / "published" / "cifar100_methods"
SCRIPT = "msdnet_scripts/compare_methods.sh"


@pytest.fixture
def runs(tmp_path):
    """A copy of the published runs of four methods."""
    folder = tmp_path / "runs"
    for name in ("boost", "joint", "l2w", "imta"):
        shutil.copytree(PUBLISHED / name, folder / name)
    return folder


def change(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def results(folder, name):
    return json.loads((folder / name / "results.json").read_text())


def cells(folder):
    found = methods_table.table(methods_table.read_comparison(folder))
    return found, {row[0]: dict(zip(found.columns, row)) for row in found.rows}


def test_the_table_has_the_numbers_of_the_files(runs):
    table, rows = cells(runs)
    assert list(rows) == ["BoostNet", "joint training", "joint training, exits added up", "joint training, exits averaged",
                          "joint training, product of exits", "sample weighting", "collaborating exits"]
    for label, name, kind in (("BoostNet", "boost", ""), ("joint training, product of exits", "joint", "_poe")):
        evaluated = json.loads((runs / name / f"anytime{kind}.json").read_text())
        expected = [f"{top1:.2f} ({macs / 1e6:.2f})" for top1, macs in zip(evaluated["top1"], evaluated["macs"])]
        assert [rows[label][f"exit {n}"] for n in range(1, 5)] == expected
        points = json.loads((runs / name / f"dynamic{kind}.json").read_text())["points"]
        near = min(points, key=lambda point: abs(point["test_mean_macs"] - 9.30e6))
        assert float(rows[label]["mean 9.30"]) == pytest.approx(near["test_top1"], abs=0.15)
    assert table.title == "Methods at equal recipe: msdnet_ge, CIFAR-100, 3 epochs, seed 0"
    for words in ("10000 test images", "1000 held-out images", "1 CPU thread, torch 2.15.0"):
        assert words in table.text()


def test_time_and_memory_are_those_of_training_and_of_what_it_started_from(runs):
    _, rows = cells(runs)
    seconds = {name: sum(epoch["seconds"] for epoch in results(runs, name)["epochs"]) for name in ("joint", "imta")}
    assert float(rows["joint training"]["train s"]) == pytest.approx(seconds["joint"], abs=0.06)
    assert float(rows["collaborating exits"]["train s"]) == pytest.approx(sum(seconds.values()), abs=0.06)
    assert rows["BoostNet"]["peak MiB"] == f"{results(runs, 'boost')['peak_rss_bytes'] / 2**20:.0f}"
    assert rows["joint training, exits averaged"]["train s"] == ""   # reading the exits in another way is not training
    change(runs / "joint" / "results.json", peak_cuda_bytes=5000 * 2**20)
    _, rows = cells(runs)
    assert rows["joint training"]["peak MiB"] == rows["collaborating exits"]["peak MiB"] == "5000"


def test_what_older_runs_did_not_measure_is_left_open(runs):
    for name in ("boost", "imta"):
        path = runs / name / "results.json"
        path.write_text(json.dumps({key: value for key, value in results(runs, name).items() if not key.startswith("peak")}))
    shutil.rmtree(runs / "joint")
    found = methods_table.read_comparison(runs)
    _, rows = cells(runs)
    assert (rows["BoostNet"]["peak MiB"], rows["collaborating exits"]["train s"]) == ("", "") and rows["BoostNet"]["train s"]
    assert any("started from joint/model_latest.pth" in note for note in found.notes)
    assert [len(axes.patches) for axes in methods_table.draw(found).axes[2:]] == [2, 1]


def test_the_figure_has_four_labelled_panels_and_tells_all_rows_apart(tmp_path):
    found = methods_table.read_comparison(PUBLISHED)
    anytime, budgeted, seconds, memory = methods_table.draw(found).axes
    assert all(axes.get_title() and axes.get_xlabel() for axes in (anytime, budgeted, seconds, memory))
    looks = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in anytime.lines]
    assert len(set(looks)) == len(found.rows) == 10
    assert [line.get_color() for line in budgeted.lines] == [line.get_color() for line in anytime.lines]
    assert np.allclose(anytime.lines[0].get_xdata(), found.rows[0].millions)
    assert len(seconds.patches) == len(memory.patches) == 7


def test_files_go_where_they_should(runs, capsys):
    assert methods_table.main([str(runs), "--svg"]) == 0
    assert all((runs / f"methods.{kind}").stat().st_size for kind in ("png", "svg", "md"))
    assert "BoostNet" in capsys.readouterr().out and "| BoostNet |" in (runs / "methods.md").read_text()
    assert "ends in .png" in tiny.one_line_error(capsys, lambda: methods_table.main([str(runs), "--output", "x.pdf"]))


def test_budgets_beyond_a_curve_have_no_number(runs):
    path = runs / "l2w" / "dynamic.json"
    change(path, points=json.loads(path.read_text())["points"][20:])
    _, rows = cells(runs)
    assert rows["sample weighting"]["mean 6.50"] == "" and rows["sample weighting"]["mean 12.11"] != ""


def test_an_unfinished_run_is_left_out_and_named(runs):
    change(runs / "boost" / "results.json", test=None)
    (runs / "l2w" / "results.json").write_text("{")
    table, rows = cells(runs)
    assert not {"BoostNet", "sample weighting"} & rows.keys()
    assert all(any(name in note for note in table.notes) for name in ("boost", "l2w"))


@pytest.mark.parametrize("flag, value, words", [("epochs", 9, "differ in epochs"), ("seed", 3, "differ in seed"),
                                                ("lr_f", 0.2, "differ in lr_f"), ("batch_size", 32, "differ in batch_size")])
def test_runs_that_differ_in_more_than_their_method_are_refused(runs, flag, value, words):
    change(runs / "l2w" / "results.json", config={**results(runs, "l2w")["config"], flag: value})
    with pytest.raises(UserError, match=words):
        methods_table.read_comparison(runs)


def test_a_second_run_of_a_method_is_refused(runs):
    shutil.copytree(runs / "boost", runs / "boost again")
    with pytest.raises(UserError, match="seed 0 included"):
        methods_table.read_comparison(runs)
    change(runs / "boost again" / "results.json", config={**results(runs, "boost")["config"], "ensemble_reweight": [0.2]})
    with pytest.raises(UserError, match="are of the same method"):
        methods_table.read_comparison(runs)


def test_several_seeds_of_a_method_are_their_mean(runs):
    again = runs / "joint, seed 1"
    shutil.copytree(runs / "joint", again)
    change(again / "results.json", config={**results(runs, "joint")["config"], "seed": 1}, peak_rss_bytes=7000 * 2**20)
    anytime, dynamic = (json.loads((again / f"{mode}.json").read_text()) for mode in ("anytime", "dynamic"))
    change(again / "anytime.json", top1=[top1 + 4 for top1 in anytime["top1"]])
    change(again / "dynamic.json", points=[{**point, "test_top1": point["test_top1"] + 1,
                                            "test_mean_macs": 0.9 * point["test_mean_macs"]} for point in dynamic["points"]])
    alone = cells(PUBLISHED)[1]["joint training"]
    table, rows = cells(runs)
    mean = rows["joint training (n = 2)"]
    assert "mean over n seeds" in table.title and rows["BoostNet"] and len(rows) == 7
    for n in range(1, 5):
        assert float(mean[f"exit {n}"].split()[0]) == pytest.approx(float(alone[f"exit {n}"].split()[0]) + 2, abs=0.011)
    assert (mean["train s"], mean["peak MiB"]) == (alone["train s"], "7000")
    found = next(row for row in methods_table.read_comparison(runs).rows if row.label == "joint training (n = 2)")
    costs, top1 = found.curve
    points = sorted((point["test_mean_macs"] / 1e6, point["test_top1"]) for point in dynamic["points"])
    assert costs[0] == points[0][0] and costs[-1] <= 0.9 * points[-1][0]   # nothing is said beyond either seed's curve
    macs, plain = np.array(points).T
    assert np.allclose(top1, (np.interp(costs, macs, plain) + np.interp(costs, 0.9 * macs, plain + 1)) / 2)
    (again / "anytime_poe.json").unlink()
    with pytest.raises(UserError, match="not evaluated with the same --ensemble"):
        methods_table.read_comparison(runs)


@pytest.mark.parametrize("name, changes, words", [
    ("anytime.json", {"epoch": 2}, "anytime.json is of epoch 2"), ("dynamic.json", {"epoch": 1}, "dynamic.json is of epoch 1"),
    ("dynamic.json", {"family": "released"}, "dynamic.json"), ("dynamic.json", {"flat": True}, "not a whole curve"),
    ("anytime.json", None, "anytime.json is missing"), ("dynamic.json", None, "dynamic.json"),
    ("dynamic_poe.json", None, "dynamic_poe.json")])
def test_an_evaluation_of_something_else_is_named(runs, capsys, name, changes, words):
    path = runs / "joint" / name
    if changes is None:
        path.unlink()
    else:
        change(path, **changes)
    assert words in tiny.one_line_error(capsys, lambda: methods_table.main([str(runs)]))


def test_a_folder_without_runs_is_one_line(tmp_path, capsys):
    assert "holds no finished run" in tiny.one_line_error(capsys, lambda: methods_table.main([str(tmp_path)]))
    assert "nowhere is not a folder" in tiny.one_line_error(capsys, lambda: methods_table.main([str(tmp_path / "nowhere")]))


# The script

def script(tmp_path, *given, **environment):
    """The commands of training, of evaluation, and of the table."""
    found = commands(SCRIPT, *given, cwd=tmp_path, RESULT_ROOT=str(tmp_path), **environment)
    training, evaluation = ([command for command in found if command[1].endswith(f"{name}_cifar100.py")]
                            for name in ("train", "eval"))
    table, = [command for command in found if "utils.methods_table" in command]
    return training, evaluation, table


def test_every_method_is_trained_with_the_same_flags_and_those_given_win(tmp_path):
    training, evaluation, table = script(tmp_path, "--epochs", "9", "--dataset=cifar10", "--data-root", "d")
    parsed = [flags(command) for command in training]
    assert {args.method for args in parsed} == {*METHODS} and len(parsed) == len(METHODS)
    assert all((args.epochs, args.dataset, args.data_root, args.use_valid) == (9, "cifar10", "d", True) for args in parsed)
    assert [args.result_dir for args in parsed] == [f"{tmp_path}/compare_methods/{args.method}" for args in parsed]
    starts = {args.method: args.checkpoint or args.resume for args in parsed}
    joint = f"{tmp_path}/compare_methods/joint/model_latest.pth"
    assert starts == {**dict.fromkeys(METHODS, True), "imta": joint}
    assert [args.method for args in parsed].index("imta") > [args.method for args in parsed].index("joint")
    assert {args.overlap for args in parsed} == {None, 3}
    assert table[-1] == f"{tmp_path}/compare_methods"
    read = [flags(command) for command in evaluation]
    assert all((args.dataset, args.data_root, args.explicit & {"epochs", "nBlocks"}) == ("cifar10", "d", set()) for args in read)
    assert all(args.evaluate_from.endswith("/model_latest.pth") for args in read)
    for method in METHODS:
        own = [(args.evalmode, args.ensemble) for args in read if f"/{method}/" in args.evaluate_from]
        kinds = [None, *(["boost", "average", "poe"] if method == "joint" else [])]
        assert own == [(mode, kind) for kind in kinds for mode in ("anytime", "dynamic")]


@pytest.mark.parametrize("given", ["--overlap 2", "--groups 3-1"])
def test_flags_given_win_over_those_of_a_methods_own(tmp_path, given):
    training, _, _ = script(tmp_path, *given.split(), METHODS="block_losses")
    args = flags(training[0])
    assert (args.groups, args.overlap) == (([3, 1], None) if "groups" in given else (None, 2))


def test_temperatures_and_how_images_are_read_reach_the_evaluation(tmp_path):
    given = "--ensemble_reweight 0.2,0.4 --decoder pillow --skip_unreadable --dataset folder --image_size 224 " \
            "--grFactor 1-2-4-4 --bnFactor 1-2-4-4"
    _, evaluation, _ = script(tmp_path, *given.split(), METHODS="joint")
    assert all("--skip_unreadable" in command and "pillow" in command for command in evaluation)
    boost = [command for command in evaluation if "boost" in command]
    assert len(boost) == 2 and all(command[-2:] == ["--ensemble_reweight", "0.2,0.4"] for command in boost)


def test_a_run_that_starts_from_another_is_resumed_once_it_has_saved_and_refused_once_that_has_gone_on(tmp_path):
    for name in ("joint", "imta"):
        (tmp_path / "compare_methods" / name).mkdir(parents=True)
        (tmp_path / "compare_methods" / name / "model_latest.pth").write_text("")
    joint, imta = (tmp_path / "compare_methods" / name / "model_latest.pth" for name in ("joint", "imta"))
    os.utime(joint, (1, 1))
    training, _, _ = script(tmp_path, METHODS="joint imta")
    assert training[-1][-1] == "--resume" and "--checkpoint" not in training[-1]
    os.utime(imta, (0, 0))
    done = bash(ROOT / SCRIPT, cwd=tmp_path, DRY_RUN="1", METHODS="joint imta", RESULT_ROOT=str(tmp_path))
    assert done.returncode == 2 and "started from another network than joint has now" in done.stderr


@pytest.mark.parametrize("methods, given, words", [
    ("boots", "", "there is no method 'boots'"), ("boost imta", "", "add joint"), ("boost", "--method joint", "--method cannot"),
    ("boost", "--result_dir x", "--result_dir cannot"), ("boost", "--checkpoint=x", "--checkpoint cannot"),
    ("boost l2w", "--optimizer adam", "l2w works with sgd only"), ("boost", "--n-blocks 4", "did you mean --nBlocks?"),
    ("boost", "--epochs ten", "--epochs"), ("boost", "--budget 40e6", "--budget")])
def test_a_mistake_is_one_line_before_anything_is_trained(tmp_path, methods, given, words):
    done = bash(ROOT / SCRIPT, *given.split(), cwd=tmp_path, PYTHON=sys.executable, METHODS=methods, RESULT_ROOT=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "") and words in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "compare_methods").exists()


def stub(tmp_path, **codes):
    """A Python that ends the training of each method with its code, and does nothing else."""
    python = tmp_path / "python"
    cases = "\n".join(f"*train_cifar100.py' --result_dir '*'--method {method} '*) exit {code} ;;"
                      for method, code in codes.items())
    python.write_text(f'#!/bin/bash\necho "$*" >>{tmp_path}/calls\ncase "$* " in\n{cases}\nesac\n')
    python.chmod(0o755)
    return str(python)


def test_a_failing_method_costs_what_builds_on_it_and_no_other(tmp_path):
    def run(**codes):
        return bash(ROOT / SCRIPT, cwd=tmp_path, PYTHON=stub(tmp_path, **codes), METHODS="boost joint imta",
                    RESULT_ROOT=str(tmp_path))

    done = run(joint=1)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert done.returncode == 1 and done.stderr.splitlines()[-1].endswith("not in the table: joint imta")
    assert "methods_table" in calls[-1] and not any("train_cifar100.py --result_dir" in call and "imta" in call for call in calls)
    for code in (2, 75, 130):   # a mistake and a signal are for all methods
        (tmp_path / "calls").unlink()
        assert run(boost=code).returncode == code
        calls = (tmp_path / "calls").read_text()
        assert "train_cifar100.py --result_dir" in calls and "eval_cifar100.py" not in calls and "methods_table" not in calls


@pytest.mark.slow
def test_the_script_trains_evaluates_stops_resumes_and_shows(tmp_path):
    images = tiny.make_images(tmp_path / "images")
    line = tiny.command(images, Path("x"), "--nBlocks", "3")
    start = line.index("--result_dir")
    given = line[:start] + line[start + 2:]
    environment = {**os.environ, "PYTHON": sys.executable, "RESULT_ROOT": str(tmp_path), "METHODS": "boost"}
    folder = tmp_path / "compare_methods"
    long = ["bash", str(ROOT / SCRIPT), *given, "--epochs", "2000"]
    with subprocess.Popen(long, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        deadline = time.monotonic() + 120
        while not (folder / "boost" / "model_latest.pth").exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=90)
    assert process.returncode == 75 and "stopped at" in out
    done = len(json.loads((folder / "boost" / "results.json").read_text())["epochs"])
    more = ["bash", str(ROOT / SCRIPT), *given, "--epochs", str(done + 1)]
    finished = subprocess.run(more, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    assert "resuming at" in finished.stdout and f"{done + 1} epochs" in (folder / "methods.md").read_text()
    _, rows = cells(folder)
    trained = results(folder, "boost")
    assert list(rows) == ["BoostNet"] and (folder / "methods.png").stat().st_size
    assert list(rows["BoostNet"].values())[1:4] == [f"{top1:.2f}" for top1 in trained["test"]["top1"]]
    assert 100 * 2**20 < trained["peak_rss_bytes"] < 4000 * 2**20 and trained["peak_cuda_bytes"] == 0
    files = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.json")}

    def run():
        return subprocess.run(more, env=environment, capture_output=True, text=True, timeout=300)

    again = run()
    assert again.returncode == 0 and again.stdout.count("nothing to do") == 1
    assert files == {path: path.stat().st_mtime_ns for path in folder.glob("*/*.json")}
    assert "eval_cifar100.py" not in again.stderr
    os.utime(folder / "boost" / "dynamic.json", (0, 0))   # older than the checkpoint
    assert run().stderr.count("eval_cifar100.py") == 1


@pytest.mark.parametrize("ensemble", ["boost", "average", "poe"])
def test_the_script_knows_the_names_of_the_files_that_it_need_not_write_again(tmp_path, ensemble):
    folder = tmp_path / "compare_methods" / "joint"
    folder.mkdir(parents=True)
    (folder / "model_latest.pth").write_text("")
    os.utime(folder / "model_latest.pth", (0, 0))
    for mode in ("anytime", "dynamic"):
        (folder / f"{result_name(mode, {'ensemble': ensemble, 'temperatures': [0, 0.5]})}.json").write_text("")
    _, evaluation, _ = script(tmp_path, METHODS="joint")
    assert len(evaluation) == 6 and not any(ensemble in command for command in evaluation)
