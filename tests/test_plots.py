"""Figures from small made-up run folders."""
import json
import logging
import os
import resource
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from utils import plots
from utils.core.errors import UserError
from utils.reports.finished_runs import read_evaluations
from utils.reports.paper import ANYTIME, BUDGETED

MACS = [10_000_000, 20_000_000, 40_000_000]


def write_run(folder, *, anytime=True, dynamic=True, points=((10, 60, 61), (20, 66, 65), (40, 70, 69)), base=4, arch="msdnet_ge",
              method="boost", dataset="cifar100", family="eq9", flat=False, split_hash="a" * 64, suffix="",
              n_test=10_000, **more):
    """A run folder with evaluation files; points are (10^6 MACs, hold-out accuracy, test accuracy)."""
    folder.mkdir(exist_ok=True)
    header = {"format": 1, "name": folder.name, "arch": arch, "method": method, "dataset": dataset, "n_test": n_test,
              "config": {"arch": arch, "base": base}, "split_hash": split_hash, "macs": MACS, "params": [1, 2, 3],
              **more}
    if anytime:
        (folder / f"anytime{suffix}.json").write_text(json.dumps({**header, "top1": [60.0, 65.0, 69.0], "top5": [90.0] * 3}))
    if dynamic:
        entries = [{"budget": None if family == "released" else macs * 1e6, "p": 1.0, "valid_mean_macs": macs * 1e6,
                    "test_mean_macs": macs * 1e6, "valid_top1": valid, "test_top1": test} for macs, valid, test in points]
        name = f"dynamic{'_flat' if flat else ''}{suffix}.json"
        (folder / name).write_text(json.dumps({**header, "family": family, "flat": flat, "points": entries}))
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """The figures of `plot_runs` by name, in place of files."""
    figures = {}

    def keep(figure, stem, *, svg):
        figures[stem.name] = figure
        return []

    monkeypatch.setattr(plots, "save", keep)
    return figures


def legend(figure):
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def line(figure, label):
    return next(line for line in figure.axes[0].lines if line.get_label() == label)


def test_two_figures_land_in_the_first_run_folder(tmp_path):
    runs = [write_run(tmp_path / "boost"), write_run(tmp_path / "joint", method="joint")]
    assert plots.plot_runs(runs) == [runs[0] / "anytime.png", runs[0] / "budgeted.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in runs[0].glob("*.png"))
    assert not list(runs[1].glob("*.png"))


def test_svg_files_are_written_on_request_and_are_well_formed(tmp_path):
    written = plots.plot_runs([write_run(tmp_path / "run")], tmp_path / "new" / "folder", svg=True)
    assert [path.name for path in written] == ["anytime.png", "anytime.svg", "budgeted.png", "budgeted.svg"]
    ElementTree.parse(tmp_path / "new" / "folder" / "anytime.svg")


def test_staircase_has_the_exits_as_steps_and_stays_level_after_the_last(tmp_path, drawn):
    plots.plot_runs([write_run(tmp_path / "run", dynamic=False)], paper="none")
    assert drawn.keys() == {"anytime"}
    staircase = line(drawn["anytime"], "BoostNet, MSDNet")
    x, y = staircase.get_data()
    assert list(x[:3]) == [10, 20, 40] and x[3] > 40
    assert list(y) == [60, 65, 69, 69]
    assert staircase.get_drawstyle() == "steps-post"


def test_axes_name_units_and_the_title_names_data_set_and_family(tmp_path, drawn):
    plots.plot_runs([write_run(tmp_path / "run")])
    axes = drawn["budgeted"].axes[0]
    assert "MACs" in axes.get_xlabel() and "10^6" in axes.get_xlabel() and "%" in axes.get_ylabel()
    assert "CIFAR-100, 10,000 test images" in axes.get_title() and "eq. 9" in axes.get_title()


def test_synthetic_data_are_called_synthetic_and_never_compared_with_the_paper(tmp_path, drawn):
    plots.plot_runs([write_run(tmp_path / "run", dataset="glyphs", family="released")])
    for figure in drawn.values():
        assert "synthetic" in figure.axes[0].get_title()
        assert not any("paper" in label for label in legend(figure))


def test_families_in_one_figure_are_named_in_the_legend(tmp_path, drawn):
    plots.plot_runs([write_run(tmp_path / "one"), write_run(tmp_path / "two", family="released", flat=True)], paper="none")
    assert legend(drawn["budgeted"]) == ["BoostNet, MSDNet, eq. 9", "BoostNet, MSDNet, released sweep, flat curve"]


def test_runs_of_the_same_configuration_are_told_apart_by_name(tmp_path, drawn):
    runs = [write_run(tmp_path / "seed0"), write_run(tmp_path / "seed1", split_hash="b" * 64)]
    plots.plot_runs(runs, paper="none")
    for figure in drawn.values():
        assert legend(figure) == ["BoostNet, MSDNet (seed0)", "BoostNet, MSDNet (seed1)"]


def test_sizes_combine_by_hold_out_accuracy_though_test_accuracy_says_otherwise(tmp_path, drawn):
    small = write_run(tmp_path / "small", base=4, points=[(10, 60, 99), (20, 65, 99), (30, 66, 99)])
    large = write_run(tmp_path / "large", base=8, points=[(20, 64, 50), (30, 70, 50), (40, 72, 50)])
    plots.plot_runs([small, large], paper="none")
    assert legend(drawn["budgeted"]) == ["BoostNet, MSDNet, 2 sizes combined"]
    x, y = line(drawn["budgeted"], "BoostNet, MSDNet, 2 sizes combined").get_data()
    assert (list(x), list(y)) == ([10, 20, 30, 40], [99, 99, 50, 50])
    assert legend(drawn["anytime"]) == ["BoostNet, MSDNet (small)", "BoostNet, MSDNet (large)"]


def test_the_cost_of_a_point_is_what_the_test_set_spent(tmp_path, drawn):
    file = write_run(tmp_path / "run", anytime=False, points=[(10, 60, 61)]) / "dynamic.json"
    content = json.loads(file.read_text())
    content["points"][0]["test_mean_macs"] = 12e6
    file.write_text(json.dumps(content))
    plots.plot_runs([file.parent], paper="none")
    x, y = line(drawn["budgeted"], "BoostNet, MSDNet").get_data()
    assert (list(x), list(y)) == ([12], [61])


def test_sizes_with_different_splits_are_refused_and_nothing_is_written(tmp_path, capsys):
    runs = [write_run(tmp_path / "small", base=4), write_run(tmp_path / "large", base=8, split_hash="b" * 64)]
    with pytest.raises(SystemExit) as stop:
        plots.main([str(run) for run in runs])
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert message.count("\n") == 1 and "split_hash" in message and "--separate" in message
    assert not list(tmp_path.glob("*/*.png"))
    assert plots.main([*map(str, runs), "--separate"]) == 0


def test_paper_tables_appear_for_the_same_data_and_backbone_within_the_costs_of_the_runs(tmp_path, drawn):
    plots.plot_runs([write_run(tmp_path / "run")])
    x, y = line(drawn["anytime"], "paper's BoostNet, MSDNet (table 1)").get_data()
    assert (list(x), list(y)) == ([15.14, 25.51, 37.79], [65.32, 70.01, 72.34])
    assert not any("paper" in label for label in legend(drawn["budgeted"]))  # eq. 9 is another family than the paper's figure


def test_paper_figure_points_appear_beside_the_released_sweep_as_read_by_eye(tmp_path, drawn):
    plots.plot_runs([write_run(tmp_path / "run", arch="ranet", family="released")])
    assert "paper's baseline, RANet (figure, read by eye)" in legend(drawn["budgeted"])


def test_paper_numbers_can_be_left_out_or_asked_for(tmp_path, drawn):
    run = write_run(tmp_path / "run")
    plots.plot_runs([run], paper="none")
    assert legend(drawn["anytime"]) == ["BoostNet, MSDNet"]
    plots.plot_runs([run], paper="ranet")
    assert "paper's BoostNet, RANet (table 1)" in legend(drawn["anytime"])
    with pytest.raises(UserError, match="no numbers"):
        plots.plot_runs([write_run(tmp_path / "glyphs", dataset="glyphs")], paper="msdnet")


def test_results_written_with_a_suffix_are_found_and_named(tmp_path, drawn):
    run = write_run(tmp_path / "run")
    write_run(run, suffix="_reweight")
    plots.plot_runs([run, write_run(tmp_path / "other")], paper="none")
    assert legend(drawn["budgeted"]) == [f"BoostNet, MSDNet ({name})" for name in ("run", "other", "run_reweight")]


def test_a_flat_curve_is_one_by_its_content_and_not_by_a_suffix(tmp_path):
    run = write_run(tmp_path / "run", anytime=False, flat=True, suffix="_x")
    assert [(result["name"], result["suffix"]) for result in read_evaluations(run)] == [("run_x", "_x")]


def test_anytime_results_of_the_last_epoch_give_way_to_those_with_a_suffix(tmp_path, drawn):
    run = write_run(tmp_path / "run")
    write_run(run, suffix="_best")
    plots.plot_runs([run], paper="none")
    assert legend(drawn["anytime"]) == ["BoostNet, MSDNet"]
    write_run(run, suffix="_half")
    plots.plot_runs([run], paper="none")
    assert legend(drawn["anytime"]) == ["BoostNet, MSDNet (run_best)", "BoostNet, MSDNet (run_half)"]


def test_names_that_look_like_broken_formulas_are_shown_as_they_are(tmp_path):
    run = write_run(tmp_path / "$a^b_c{$", dataset="my $x_{$", family="released")
    write_run(run, dataset="my $x_{$", suffix="_\udcff\\$q^{$")
    write_run(run, dataset="my $x_{$", suffix="_b")
    assert len(plots.plot_runs([run], svg=True)) == 4


@pytest.mark.parametrize("kind", ["anytime", "dynamic"])
def test_files_that_lack_something_or_hold_something_else_are_refused_and_named(tmp_path, kind):
    file = write_run(tmp_path / "run", anytime=kind == "anytime", dynamic=kind == "dynamic") / f"{kind}.json"
    good = json.loads(file.read_text())
    keys = {"format", "name", "dataset", "method", "arch", "config", "n_test", "macs"}
    keys |= {"top1"} if kind == "anytime" else {"family", "flat", "points"}
    bad = [None, [], 1, {}, {**good, "macs": "x"}, {**good, "n_test": "x"}, {**good, "config": "x"},
           *({**good, key: value} for key in keys for value in (None, [], [None])),
           *({name: value for name, value in good.items() if name != key} for key in keys)]
    if kind == "anytime":
        bad += [{**good, "top1": good["top1"][:-1]}, {**good, "macs": [*MACS, 10**400]}]
    else:
        point = good["points"][0]
        swept = {name: value for name, value in point.items() if name != "p"}   # which only the sweep's files need
        bad += [{**good, "family": "released", "points": [other]} for other in (swept, {**point, "p": "x"})]
        point = swept
        bad += [{**good, "points": [point, other]} for other in (
            1, None, *({**point, key: value} for key in point for value in ("x", float("nan"), [])))]
        bad += [{**good, "points": [{name: value for name, value in point.items() if name != key}]} for key in point]
        bad += [{**good, "family": "mine"}, {**good, "split_hash": []}]
    for content in bad:
        file.write_text(json.dumps(content))
        with pytest.raises(UserError, match=f"{kind}.json is damaged"):
            read_evaluations(file.parent)
    file.write_text(json.dumps({**good, "more": None}))
    assert len(read_evaluations(file.parent)) == 1
    assert plots.plot_runs([file.parent])


def test_a_full_disk_ends_with_the_path_and_leaves_the_old_figure(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    figure = plots.plot_runs([run], tmp_path / "figures", paper="none")[0]
    before, limit = figure.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))   # the system then refuses to write more than that
    try:
        with pytest.raises(SystemExit) as stop:
            plots.main([str(run), "--output", str(figure.parent)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.count("\n") == 1 and f"{figure}: cannot be written" in error
    assert figure.read_bytes() == before and {path.name for path in figure.parent.iterdir()} == {"anytime.png", "budgeted.png"}
    assert not logging.getLogger("matplotlib.font_manager").isEnabledFor(logging.WARNING)


@pytest.mark.parametrize("prepare, message", [
    (lambda folder: None, "not a folder"),
    (lambda folder: folder.mkdir(), "evaluate its checkpoint first"),
    (lambda folder: [folder.mkdir(), (folder / "anytime.json").write_text('{"format": 1, "top')], "is damaged"),
    (lambda folder: [folder.mkdir(), (folder / "dynamic.json").write_text('{"format": 1}')], "is damaged"),
    (lambda folder: [folder.mkdir(), (folder / "anytime.json").write_text('[]')], "is damaged")])
def test_folders_without_results_end_with_one_line_and_code_2(tmp_path, capsys, prepare, message):
    prepare(tmp_path / "run")
    with pytest.raises(SystemExit) as stop:
        plots.main([str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and message in error


@pytest.mark.parametrize("other, message", [
    ({"dataset": "glyphs"}, "cifar100, 10,000 images; glyphs, 10,000 images"),
    ({"n_test": 500}, "cifar100, 10,000 images; cifar100, 500 images")])
def test_different_test_sets_do_not_share_a_figure(tmp_path, other, message):
    with pytest.raises(UserError, match=message):
        plots.plot_runs([write_run(tmp_path / "one"), write_run(tmp_path / "two", **other)])


def test_networks_that_test_data_chose_are_named_in_both_figures(tmp_path, drawn):
    plots.plot_runs([write_run(tmp_path / "run", epoch=7, epoch_kind="best on test set")], paper="none")
    for figure in drawn.values():
        assert legend(figure) == ["BoostNet, MSDNet, best on test set"]


def test_kinds_of_epoch_are_named_where_they_differ(tmp_path, drawn):
    runs = [write_run(tmp_path / "boost", epoch=7, epoch_kind="best on hold-out"),
            write_run(tmp_path / "joint", method="joint", epoch=12, epoch_kind="last epoch")]
    plots.plot_runs(runs[:1], paper="none")
    assert [legend(figure) for figure in drawn.values()] == [["BoostNet, MSDNet"]] * 2
    plots.plot_runs(runs, paper="none")
    for figure in drawn.values():
        assert legend(figure) == ["BoostNet, MSDNet, best on hold-out", "joint training, MSDNet, last epoch"]


def test_sizes_of_different_kinds_of_epoch_are_not_combined(tmp_path, drawn):
    runs = [write_run(tmp_path / str(base), base=base, epoch=base, epoch_kind=kind)
            for base, kind in ((4, "best on hold-out"), (8, "best on hold-out"), (12, "best on test set"))]
    plots.plot_runs(runs, paper="none")
    assert legend(drawn["budgeted"]) == ["BoostNet, MSDNet, best on hold-out, 2 sizes combined",
                                         "BoostNet, MSDNet, best on test set"]


def test_published_numbers_are_complete_and_in_order_of_cost():
    for table in (ANYTIME, BUDGETED):
        assert table.keys() == {(data, net) for data in ("cifar100", "imagenet") for net in ("msdnet", "ranet")}
        for numbers in table.values():
            assert len(numbers.millions) == len(numbers.baseline) == len(numbers.boostnet)
            assert list(numbers.millions) == sorted(numbers.millions)
            assert all(50 < top1 < 80 for top1 in (*numbers.baseline, *numbers.boostnet))


def test_a_backend_of_a_notebook_that_is_not_installed_here_is_no_obstacle():
    code = "import os; from utils.reports.style import new_figure; new_figure(2, 2); print(os.environ['MPLBACKEND'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True, text=True,
                          timeout=120, env={**os.environ, "MPLBACKEND": "inline"})
    assert (done.returncode, done.stdout) == (0, "inline\n"), done.stderr


# Reliability, and the ideal score

def write_reliability(folder, *, calibration=None, weights_hash="w", n_exits=3, **more):
    bins = [{"confidence": [0.2, 0.5 + 0.1 * n], "accuracy": [0.1, 0.9], "share": [0.5, 0.5]} for n in range(n_exits)]
    content = {"format": 1, "name": folder.name, "arch": "msdnet_ge", "method": "boost", "dataset": "cifar100", "n_test": 10_000,
               "config": {}, "macs": MACS[:n_exits], "ece": [0.1, 0.056, 0.3][:n_exits], "bins": bins,
               "weights_hash": weights_hash, "ideal": {"top1": 80.0, "mean_macs": 12e6},
               **({"calibration": calibration} if calibration else {}), **more}
    (folder / f"reliability{'_calibrated' if calibration else ''}.json").write_text(json.dumps(content))


def test_reliability_is_drawn_on_request_and_where_exits_were_calibrated(tmp_path, drawn):
    run = write_run(tmp_path / "run")
    with pytest.raises(UserError, match="anytime evaluation writes one"):
        plots.plot_runs([run], reliability=True)
    write_reliability(run)
    plots.plot_runs([run])
    assert drawn.keys() == {"anytime", "budgeted"}
    plots.plot_runs([run], reliability=True)
    assert len(drawn.pop("reliability").axes[1].lines) == 2   # and the diagonal
    write_reliability(run, calibration=[1.5, 1.5, 1.5])
    plots.plot_runs([run])
    axes = drawn["reliability"].axes
    assert [panel.get_title() for panel in axes] == ["exit 1", "exit 2", "exit 3"]
    _, plain, scaled = axes[1].lines
    assert plain.get_xydata().tolist() == scaled.get_xydata().tolist() == [[0.2, 0.1], [0.6, 0.9]]
    assert (plain.get_linestyle(), scaled.get_linestyle()) == ("-", "--") and plain.get_color() == scaled.get_color()
    assert scaled.get_label() == "BoostNet, MSDNet, calibrated"
    assert [text.get_text() for text in axes[1].texts] == ["ECE 5.6, 5.6 %"]


def test_runs_with_few_exits_and_many_share_the_panels(tmp_path, drawn):
    runs = [write_run(tmp_path / "few"), write_run(tmp_path / "many", method="joint")]
    write_reliability(runs[0], n_exits=2)
    write_reliability(runs[1], weights_hash="v", method="joint", ece=[0.1] * 7, macs=list(range(1, 8)),
                      bins=[{"confidence": [0.5], "accuracy": [0.5], "share": [1.0]}] * 7)
    plots.plot_runs(runs, reliability=True)
    axes = drawn["reliability"].axes
    assert [len(panel.lines) for panel in axes] == [3, 3, *[2] * 5, 0, 0, 0]
    assert [len(panel.texts) for panel in axes[:3]] == [2, 2, 1]


@pytest.mark.parametrize("change", [{"ece": [0.1]}, {"bins": []}, {"macs": None}, {"ideal": None}, {"calibration": ["x"]},
                                    {"bins": [{"confidence": [0.5], "accuracy": [0.5, 0.6], "share": [1.0]}] * 3}])
def test_damaged_reliability_ends_with_one_line(tmp_path, change):
    run = write_run(tmp_path / "run")
    write_reliability(run, **change)
    with pytest.raises(UserError, match="json is damaged"):
        plots.plot_runs([run], reliability=True)


def test_the_ideal_score_is_that_of_the_curves_weights(tmp_path, drawn):
    run = write_run(tmp_path / "run", weights_hash="w")
    write_run(run, anytime=False, weights_hash="w", family="optimised", suffix="_optimised")
    with pytest.raises(UserError, match="evaluate the same checkpoint with --evalmode anytime"):
        plots.plot_runs([run], ideal=True)
    write_reliability(run, weights_hash="v")   # of other weights
    with pytest.raises(UserError, match="says nothing of single test images"):
        plots.plot_runs([run], ideal=True)
    write_reliability(run, weights_hash="w")
    plots.plot_runs([run], ideal=True, paper="none")
    stars = [line for line in drawn["budgeted"].axes[0].lines if line.get_marker() == "*"]
    assert [star.get_xydata().tolist() for star in stars] == [[[12, 80]]]   # once for both curves
    assert stars[0].get_label() == "ideal score, BoostNet, MSDNet, eq. 9"


def test_the_ideal_score_without_a_curve_is_refused(tmp_path):
    run = write_run(tmp_path / "run", dynamic=False, weights_hash="w")
    write_reliability(run, weights_hash="w")
    with pytest.raises(UserError, match="--ideal adds to budgeted curves"):
        plots.plot_runs([run], ideal=True)
    assert not list(run.glob("*.png"))


def test_the_ideal_score_of_published_arrays_needs_no_other_file(tmp_path, drawn):
    folder = Path(__file__).parent.parent / "published" / "cifar100_small" / "msdnet_joint"
    plots.plot_runs([folder], tmp_path, ideal=True)
    star, = (line for line in drawn["budgeted"].axes[0].lines if line.get_label().startswith("ideal score"))
    top1, exits = star.get_ydata()[0], json.loads((folder / "dynamic.json").read_text())["points"]
    assert max(point["test_top1"] for point in exits) + 5 < top1 < 100
