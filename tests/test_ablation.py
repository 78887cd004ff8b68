"""The ablation script's runs and their figure."""
from __future__ import annotations

import json

import pytest
from test_report import write_run
from test_scripts import commands, flags
from tiny import one_line_error

from utils import ablation

SETTINGS = {"reference": "", "t0": "--ensemble_reweight 0", "joint": "--method joint", "t1": "--ensemble_reweight 1",
            "b256": "--batch-size 256", "plain": "--arch msdnet", "free": "--trainable_ensemble"}


def write_runs(folder, *names, more=""):
    folder.mkdir(exist_ok=True)
    for name in names:
        write_run(folder / name, flags=f"{SETTINGS[name]} {more}")
    return folder


def test_the_script_varies_one_factor_at_a_time_around_one_reference(tmp_path):
    *trainings, figure = commands("msdnet_scripts/ablation_cifar100.sh", "--epochs", "3", cwd=tmp_path, RESULT_ROOT=str(tmp_path))
    places = []
    for command in trainings:
        args = flags(command)
        assert (args.epochs, args.resume, args.nBlocks) == (3, True, 10)
        assert args.result_dir.startswith(f"{tmp_path}/ablation_cifar100/")
        places.append((args.ensemble_reweight[0], args.batch_size, args.arch, args.trainable_ensemble))
    reference = (0.5, 64, "msdnet_ge", False)
    assert places[0] == reference and len(set(places)) == len(places) == 10
    assert all(sum(a != b for a, b in zip(place, reference)) == 1 for place in places[1:])
    assert {place[0] for place in places} == {0, 0.2, 0.5, 0.8, 1} and {place[1] for place in places} == {32, 64, 128, 256}
    assert figure[1:] == ["-m", "utils.ablation", f"{tmp_path}/ablation_cifar100"]
    assert len({flags(command).result_dir for command in trainings}) == 10


def test_every_panel_has_the_reference_and_its_own_runs(tmp_path):
    groups, _ = ablation.read_settings(write_runs(tmp_path / "runs", "reference", "t0", "t1", "b256", "plain", "free"))
    assert [list(ablation.panel_settings(groups, panel)) for panel in ablation.PANELS] == [
        [0, 0.5, 1], [64, 256], ["as proposed", "without rescaling", "trainable sum"]]
    figure = ablation.draw(groups)
    for axes in figure.axes:
        assert "MACs" in axes.get_xlabel() and all(len(line.get_xdata()) == 10 for line in axes.lines)
        assert not axes.collections   # one seed has no range
    assert "top-1" in figure.axes[0].get_ylabel()
    assert figure.get_suptitle() == ("Ablations: CIFAR-100, MSDNet with 10 exits, 300 epochs, seed 0, 10,000 test images, "
                                     "last epoch")


def test_several_seeds_become_their_mean_and_their_range(tmp_path, capsys):
    folder = write_runs(tmp_path / "runs", "reference", "t1")
    for seed, top1 in ((1, 71.0), (2, 74.5)):   # the reference of seed 0 has 70
        write_run(folder / f"reference_{seed}", top1, flags=f"--seed {seed}")
    groups, _ = ablation.read_settings(folder)
    axes = ablation.draw(groups).axes[0]
    assert [line.get_label() for line in axes.lines] == ["0.5 (n = 3)", "1"]
    assert list(axes.lines[0].get_xdata()[:2]) == pytest.approx([15.14, 25.51], abs=0.01)
    assert list(axes.lines[0].get_ydata()[:2]) == pytest.approx([215.5 / 3, 215.5 / 3 + 1])
    assert list(axes.lines[1].get_ydata()[:2]) == [70, 71]
    [band] = axes.collections
    assert {y for x, y in band.get_paths()[0].vertices if x == axes.lines[0].get_xdata()[0]} == {70, 74.5}
    assert ablation.main([str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "mean and range over n seeds" in lines[0]
    [line] = [line for line in lines if line.startswith("temperature 0.5 (n = 3) ")]
    assert "71.83 (70.00 to 74.50)  72.83 (71.00 to 75.50)" in line
    assert [line.split()[2] for line in lines if line.startswith("temperature 1 ")] == ["70.00"]


def test_the_table_has_every_setting_under_its_panel(tmp_path, capsys):
    folder = write_runs(tmp_path / "runs", "reference", "t0", "b256", "free")
    assert ablation.main([str(folder), "--markdown"]) == 0
    names = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert names == ["top-1 % at exit", "---", "10^6 MACs", "temperature 0", "temperature 0.5", "batch size 64", "batch size 256",
                     "as proposed", "trainable sum"]


def test_the_batch_is_that_of_all_processes(tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    for name, size in (("reference", 32), ("large", 128)):
        write_run(folder / name, flags=f"--batch-size {size}", processes=2)
    assert list(ablation.panel_settings(ablation.read_settings(folder)[0], "batch_size")) == [64, 256]


def test_joint_training_is_temperature_zero(tmp_path):
    groups, _ = ablation.read_settings(write_runs(tmp_path / "runs", "reference", "joint"))
    assert list(ablation.panel_settings(groups, "temperature")) == [0, 0.5]


def test_the_figure_is_written_where_it_is_asked_for(tmp_path, capsys):
    folder = write_runs(tmp_path / "runs", "reference", "t1")
    assert ablation.main([str(folder), "--output", str(tmp_path / "figures" / "a.png")]) == 0
    assert (tmp_path / "figures" / "a.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "figures" / "a.png")


def test_folders_that_make_no_ablation_are_refused(tmp_path, capsys):
    def refused(folder) -> str:
        return one_line_error(capsys, lambda: ablation.main([str(folder)]))

    assert "not a folder" in refused(tmp_path / "nowhere")
    assert "no finished run with temperature 0.5" in refused(write_runs(tmp_path / "a", "t1"))
    folder = write_runs(tmp_path / "b", "reference")
    write_runs(folder, "t1", more="--lr_f 0.2")
    assert "differ in lr_f" in refused(folder)
    folder = write_runs(tmp_path / "c", "reference")
    write_run(folder / "ranet", network="ranet")
    assert "none of the settings" in refused(folder)


def test_no_run_vanishes_without_a_word(tmp_path, capsys):
    folder = write_runs(tmp_path / "runs", "reference", "t0", "joint")
    assert "t0 are of the same setting" in one_line_error(capsys, lambda: ablation.main([str(folder)]))
    (folder / "joint" / "results.json").unlink()
    write_run(folder / "both", flags="--ensemble_reweight 0 --batch-size 256")
    write_run(folder / "young")
    results = json.loads((folder / "young" / "results.json").read_text())
    del results["test"]
    (folder / "young" / "results.json").write_text(json.dumps(results))
    (write_run(folder / "cut") / "results.json").write_text("{")
    assert ablation.main([str(folder)]) == 0
    cut, young, both, figure = capsys.readouterr().out.splitlines()[-4:]
    assert cut.startswith(f"{folder / 'cut'} is left out: {folder / 'cut' / 'results.json'} is damaged")
    assert young == f"{folder / 'young'} holds no finished run and is left out."
    assert both == f"{folder / 'both'} differs from the reference in more than one factor and is in no panel"
    assert figure == str(folder / "ablation.png")


@pytest.mark.parametrize("output", ["fig.v2", "fig.pdf", "folder", ".", "/"])
def test_the_figure_is_never_written_under_another_name(tmp_path, capsys, output):
    folder = write_runs(tmp_path / "runs", "reference", "t1")
    (tmp_path / "fig.png").write_text("precious")
    (tmp_path / "folder").mkdir()
    assert "ends in .png" in one_line_error(capsys, lambda: ablation.main([str(folder), "--output", str(tmp_path / output)]))
    assert (tmp_path / "fig.png").read_text() == "precious" and not (tmp_path / "folder.png").exists()


@pytest.mark.parametrize("other, named", [({"n_train": 45_000}, "training images"), ({"data_hash": "b"}, "data"),
                                          ({"n_test": 500}, "test images"), ({"processes": 2}, "processes")])
def test_runs_of_other_data_or_processes_are_no_part_of_it(tmp_path, capsys, other, named):
    folder = write_runs(tmp_path / "runs", "reference")
    write_run(folder / "t1", flags=f"{SETTINGS['t1']} --batch-size {32 if 'processes' in other else 64}", **other)
    message = one_line_error(capsys, lambda: ablation.main([str(folder)]))
    assert f"differ in {named}, which is no part of the ablation" in message


def test_a_seed_counts_once(tmp_path, capsys):
    folder = write_runs(tmp_path / "runs", "reference", "t1")
    write_run(folder / "again", flags=SETTINGS["t1"])
    assert "are runs of the same flags, seed 0 included" in one_line_error(capsys, lambda: ablation.main([str(folder)]))


def test_methods_that_the_paper_does_not_vary_are_no_part_of_it(tmp_path, capsys):
    for i, method in enumerate(("l2w", "boost_l2w")):
        folder = write_runs(tmp_path / str(i), "reference")
        write_run(folder / "zzz", flags=f"--method {method}")
        assert f"--method {method}" in one_line_error(capsys, lambda folder=folder: ablation.main([str(folder)]))
