"""The command that trains all methods at equal recipe: what it runs, what it leaves alone, and what it shows."""
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tiny

import eval_cifar100
import train_cifar100
from args import parse_args
from utils import compare, footprint
from utils.core.errors import UserError
from utils.reports import comparison
from utils.runs.result_files import stem

ROOT = Path(__file__).parent.parent


def flags(images):
    given = tiny.command(images, Path("x"), "--nBlocks", "3")
    start = given.index("--result_dir")
    return given[:start] + given[start + 2:]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny.make_images(tmp_path_factory.mktemp("data") / "images")


def call_here(command, quiet=False):
    """`compare._call` without a process of its own, which takes seconds to start."""
    if command[0].endswith("footprint.py"):
        footprint.write_largest(Path(command[1]), {"peak_rss_bytes": footprint.peak_rss_bytes(), "peak_cuda_bytes": 0})
        command = command[2:]
    try:
        code = {"train_cifar100": train_cifar100, "eval_cifar100": eval_cifar100}[Path(command[0]).stem].main(command[1:])
    except SystemExit as error:
        code = error.code
    if code:
        raise compare.Failed(code)


@pytest.fixture(scope="module")
def compared(images, tmp_path_factory):
    """Folder of two methods that have really been trained and evaluated."""
    folder = tmp_path_factory.mktemp("runs") / "compare"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "_call", call_here)
        assert compare.main(["--result_dir", str(folder), "--methods", "boost,joint", *flags(images)]) == 0
    return folder


@pytest.fixture
def calls(monkeypatch):
    """The commands that would be run."""
    made = []
    monkeypatch.setattr(compare, "_call", lambda command, quiet=False: made.append(list(command)))
    return made


def test_table_figure_and_markdown_come_from_the_runs(compared):
    rows = [comparison.read_row(compared / "boost", {}),
            *(comparison.read_row(compared / "joint", how) for how in compare.readings("joint", compared, [0.5]))]
    assert [row.label for row in rows] == ["BoostNet", "joint training", "joint training, exits added up",
                                           "joint training, exits averaged", "joint training, product of exits"]
    table = (compared / "compare.md").read_text()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")]
    assert lines[0] == ["method", *(f"exit {n + 1} ({x:.2f})" for n, x in enumerate(rows[0].millions)), *lines[0][4:7],
                        "train s", "peak MiB"]
    for row, cells in zip(rows, lines[2:], strict=True):
        assert cells[:4] == [row.label, *(f"{top1:.2f}" for top1 in row.anytime["top1"])]
    results = json.loads((compared / "boost" / "results.json").read_text())
    assert float(lines[2][7]) == pytest.approx(sum(e["seconds"] for e in results["epochs"]), abs=0.06)
    assert results["test"]["top1"] == rows[0].anytime["top1"]   # of the last epoch
    assert lines[4][7:] == ["", ""]   # reading the exits in another way is not training
    assert (compared / "compare.png").read_bytes().startswith(b"\x89PNG")
    for words in ("12 test images", "8 held-out images", "2 epochs, seed 0", "1 CPU thread, torch"):
        assert words in table
    assert 100 < int(lines[2][8]) < 4000


def test_what_is_done_is_not_done_again(compared, images, calls, capsys):
    command = ["--result_dir", str(compared), "--methods", "boost,joint", *flags(images)]
    assert compare.main(command) == 0 and calls == []
    assert "joint training, product of exits" in capsys.readouterr().out
    (compared / "joint" / "dynamic_poe.json").touch()
    stale = compared / "joint" / "anytime_average.json"
    os.utime(stale, (0, 0))   # older than the checkpoint
    assert compare.main(command) == 0
    evaluation, = calls
    assert evaluation[1:5] == ["--evaluate-from", str(compared / "joint" / "model_latest.pth"), "--evalmode", "anytime"]
    assert evaluation[-2:] == ["--ensemble", "average"] and "--data-root" in evaluation and "--nBlocks" not in evaluation
    stale.touch()


@pytest.mark.parametrize("name, changes", [
    ("anytime.json", {"epoch": 1}), ("dynamic.json", {"points": []}), ("dynamic.json", {"epoch": 1}),
    ("dynamic.json", {"flat": True}), ("anytime_poe.json", {"ensemble": None}), ("anytime.json", None)])
def test_evaluation_files_of_other_flags_are_written_again(compared, images, calls, name, changes):
    path = compared / "joint" / name
    usual = path.read_text()
    path.write_text(json.dumps(changes and json.loads(usual) | changes))
    compare.evaluate("joint", compared, [], [0.5])
    path.write_text(usual)
    evaluation, = calls
    assert evaluation[4] == name.partition(".")[0].partition("_")[0] and ("poe" in evaluation) == ("poe" in name)
    calls.clear()
    compare.evaluate("joint", compared, [], [0.5])
    assert not calls


def test_other_flags_make_the_trainer_look_again_and_refuse(compared, images, capsys, monkeypatch):
    monkeypatch.setattr(compare, "_call", call_here)
    before = (compared / "boost" / "results.json").read_bytes()
    for _ in range(2):   # the refusal must not be forgotten
        assert compare.main(["--result_dir", str(compared), "--methods", "boost", *flags(images), "--lr_f", "0.2"]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and "--lr_f 0.2 (was 0.1)" in message
    assert (compared / "boost" / "results.json").read_bytes() == before


def test_recipe_and_own_flags_reach_the_trainer_and_the_users_win(tmp_path, calls, monkeypatch):
    monkeypatch.setattr(compare, "report", lambda *arguments, **options: None)
    monkeypatch.setattr(compare, "evaluate", lambda *arguments: None)
    monkeypatch.setattr(compare, "method_names", lambda: ["imta", "joint", "block_losses"])
    assert compare.main(["--result_dir", str(tmp_path), "--epochs", "9"]) == 0

    methods, starts = [], []
    for call in calls:
        assert call[0].endswith("footprint.py") and call[2].endswith("train_cifar100.py")
        method = call[call.index("--method") + 1]
        methods.append(method)
        common = [word for word in call[3:] if word not in ("--method", method, "--overlap", "3")]
        args = parse_args(common)
        assert (args.dataset, args.epochs, args.arch, args.use_valid) == ("glyphs", 9, "msdnet_ge", True)
        starts.append(args.checkpoint or args.resume)
    assert methods == ["joint", "block_losses", "imta"]   # behind what it starts from
    assert starts == [True, True, str(tmp_path / "joint" / "model_latest.pth")]
    assert calls[1][calls[1].index("--method"):][1:4] == ["block_losses", "--overlap", "3"] and calls[1][-1] == "--resume"


def test_a_run_that_starts_from_another_is_resumed_once_it_has_saved(tmp_path, calls, monkeypatch):
    (tmp_path / "imta").mkdir()
    compare.train("imta", tmp_path, [])
    assert calls[-1][-2] == "--checkpoint"
    (tmp_path / "imta" / "model_latest.pth").write_text("")
    (tmp_path / "imta" / "command.json").unlink()
    compare.train("imta", tmp_path, [])
    assert calls[-1][-1] == "--resume" and "--checkpoint" not in calls[-1]


@pytest.mark.parametrize("more, words", [
    (["--methods", "boots"], "there is no method 'boots'; choose from boost,joint"),
    (["--method", "joint"], "--method"),
    (["--budget", "40e6"], "--budget"),
    (["--resume"], "--resume"),
    (["--publish", "x"], "--publish cannot be chosen here"),
    (["--n-blocks", "4"], "did you mean --nBlocks?"),
    (["--epochs", "ten"], "--epochs"),
    (["--result_dir", ""], "--result_dir"),
])
def test_a_mistake_is_one_line_before_anything_is_run(tmp_path, capsys, calls, more, words):
    message = tiny.one_line_error(capsys, lambda: compare.main(["--result_dir", str(tmp_path), *more]))
    assert words in message and calls == []


def test_a_method_needs_the_one_it_starts_from(capsys, monkeypatch, calls):
    monkeypatch.setattr(compare, "method_names", lambda: ["boost", "joint", "imta"])
    assert "add that" in tiny.one_line_error(capsys, lambda: compare.main(["--methods", "boost,imta"]))


def test_a_failing_method_costs_what_builds_on_it_and_no_other(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "method_names", lambda: ["boost", "joint", "imta"])
    monkeypatch.setattr(compare, "evaluate", lambda *arguments: None)
    shown, codes = [], {"joint": 1}

    def train(method, folder, given):
        if codes.get(method):
            raise compare.Failed(codes[method])

    monkeypatch.setattr(compare, "train", train)
    monkeypatch.setattr(compare, "report", lambda folder, done, failed, temperatures, svg: shown.append((done, failed)))
    assert compare.main(["--result_dir", str(tmp_path)]) == 1
    assert shown.pop() == (["boost"], ["joint", "imta"])
    for code, ended in ((2, 2), (75, 75), (130, 130), (-9, 1)):   # a mistake and a signal are for all methods
        codes["joint"] = code
        assert compare.main(["--result_dir", str(tmp_path)]) == ended and not shown
    assert "the same command goes on" in capsys.readouterr().out
    codes |= {"boost": 1, "joint": 1}
    assert "no method" in tiny.one_line_error(capsys, lambda: compare.main(["--result_dir", str(tmp_path)]))


@pytest.mark.parametrize("name", ["anytime.json", "dynamic_poe.json", "results.json", "footprint.json"])
def test_a_missing_file_is_named(compared, tmp_path, name):
    for path in (compared / "joint").glob("*.json"):
        if path.name != name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises((UserError, FileNotFoundError), match=name):
        comparison.read_row(tmp_path, {"ensemble": "poe"} if "poe" in name else {})


@pytest.mark.parametrize("name", ["results.json", "footprint.json"])
@pytest.mark.parametrize("content", ["{}", "[]", "null"])
def test_a_file_of_something_else_is_one_error(compared, tmp_path, name, content):
    for path in (compared / "joint").glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"{name} is damaged or of something else"):
        comparison.read_row(tmp_path, {})


def made_up(compared, method="boost", **changes):
    row = comparison.read_row(compared / method, {})
    return row._replace(**changes)


def test_budgeted_columns_read_the_curves_between_common_costs(compared):
    first = made_up(compared)
    points = [{"test_mean_macs": x * 1e6, "test_top1": 10 * x} for x in (4, 1, 2)]   # in any order
    other = first._replace(anytime={**first.anytime, "macs": [1_500_000, 2_000_000, 3_500_000]},
                           dynamic={**first.dynamic, "points": points})
    same = other._replace(anytime={**first.anytime, "macs": [1_000_000, 2_000_000, 4_000_000]})
    header, (cells, _) = comparison._cells([other, same])
    costs = [1.5 + share * 2 for share in (0.25, 0.5, 0.75)]
    assert header[4:7] == [f"mean {x:.2f}" for x in costs] and header[1] == "exit 1"   # costs differ: they stand in the cells
    assert [float(cell) for cell in cells[4:7]] == pytest.approx([10 * x for x in costs], abs=0.01)
    assert cells[1].endswith("(1.50)")


def test_a_run_that_started_from_another_carries_its_time(compared):
    alone = comparison.read_row(compared / "boost", {}).train_s
    before = comparison.read_row(compared / "joint", {}).train_s
    assert comparison.read_row(compared / "boost", {}, after=compared / "joint").train_s == pytest.approx(alone + before)


def test_the_figure_has_four_labelled_panels_and_tells_eleven_rows_apart(compared):
    rows = [made_up(compared, colour=colour) for colour in range(7)]
    rows += [comparison.read_row(compared / "joint", {"ensemble": name}, colour=1, line=line)
             for line, name in enumerate(("boost", "average", "poe"), 1)]
    figure = comparison.draw(rows)
    anytime, budgeted, seconds, memory = figure.axes
    for axes in figure.axes:
        assert axes.get_title() and axes.get_xlabel()
    looks = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in anytime.lines]
    assert len(set(looks)) == len(rows)
    assert [line.get_color() for line in budgeted.lines] == [line.get_color() for line in anytime.lines]
    assert np.allclose(anytime.lines[0].get_xdata(), rows[0].millions)
    assert len(seconds.patches) == len(memory.patches) == 7
    assert len(figure.legends[0].get_texts()) == len(rows)


# Memory

def test_footprint_runs_a_script_as_python_does_and_keeps_the_larger_memory(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys, beside\n"
                      "hoard = bytearray(int(sys.argv[1]) * 2**20)\nhoard[::4096] = b'x' * len(hoard[::4096])\n"
                      "print(__name__, sys.argv[1:])\nsys.exit(75)\n")
    (tmp_path / "beside.py").write_text("")
    peaks = []
    for size in ("300", "10"):
        done = subprocess.run([sys.executable, str(ROOT / "utils" / "footprint.py"), "out.json", str(script), size], cwd=tmp_path,
                              capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (75, f"__main__ ['{size}']\n"), done.stderr
        peaks.append(json.loads((tmp_path / "out.json").read_text()))
    assert peaks[0] == peaks[1] and peaks[0]["peak_cuda_bytes"] == 0
    assert 300 * 2**20 < peaks[0]["peak_rss_bytes"] < 400 * 2**20
    assert {path.name for path in tmp_path.iterdir()} == {"script.py", "beside.py", "out.json"} | (
        {"__pycache__"} if (tmp_path / "__pycache__").exists() else set())


def test_memory_is_that_of_the_program_and_not_of_its_parent():
    hoard = bytearray(400 * 2**20)
    hoard[::4096] = b"x" * len(hoard[::4096])
    code = "from utils.footprint import peak_rss_bytes; print(peak_rss_bytes())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert int(done.stdout) < 100 * 2**20
    assert footprint.peak_rss_bytes() > 400 * 2**20


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_passed_on_and_the_runs_answer_to_it_reported(tmp_path, number):
    script = tmp_path / "script.py"
    script.write_text("import pathlib, signal, sys, time\n"
                      f"signal.signal({int(number)}, lambda *_: sys.exit(75))\n"
                      "pathlib.Path(sys.argv[1]).touch()\ntime.sleep(60)\n")

    def send():
        while not (tmp_path / "ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    sender = threading.Thread(target=send)
    sender.start()
    with pytest.raises(compare.Failed) as failed:
        compare._call([str(script), str(tmp_path / "ready")])
    sender.join()
    assert failed.value.code == 75 and signal.getsignal(number) is before


@pytest.mark.slow
def test_a_signal_reaches_the_run_and_the_same_command_goes_on(images, tmp_path):
    command = [sys.executable, "-m", "utils.compare", "--result_dir", str(tmp_path / "c"), "--methods", "boost", *flags(images)]
    long = [*command, "--epochs", "2000"]
    with subprocess.Popen(long, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        deadline = time.monotonic() + 90
        while not (tmp_path / "c" / "boost" / "model_latest.pth").exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=90)
    assert process.returncode == 75 and "the same command goes on" in out
    done = json.loads((tmp_path / "c" / "boost" / "results.json").read_text())["epochs"]
    more = [*command, "--epochs", str(len(done) + 1)]
    finished = subprocess.run(more, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    assert "resuming at" in finished.stdout and f"{len(done) + 1} epochs" in (tmp_path / "c" / "compare.md").read_text()


def test_flags_that_one_method_refuses_are_refused_before_anything_is_trained(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        compare.main(["--result_dir", str(tmp_path / "compare"), "--methods", "boost,l2w", "--optimizer", "adam"])
    message = capsys.readouterr().err
    assert ended.value.code == 2 and "these flags do not suit --method l2w" in message and message.count("\n") == 1
    assert not (tmp_path / "compare").exists()


def test_temperatures_reach_the_exits_that_are_added_up_and_name_their_files(compared, images, calls):
    own, _, place = compare.parse(["--methods", "joint", "--ensemble_reweight", "0.2,0.4", *flags(images)])
    compare.evaluate("joint", compared, place, own.temperatures)
    assert [call[-4:] for call in calls] == [["--ensemble", "boost", "--ensemble_reweight", "0.2,0.4"]] * 2
    assert all(stem(mode, compare.readings("joint", compared, [0.2, 0.4])[1]) == f"{mode}_boost_t0.3-0.4"
               for mode in ("anytime", "dynamic"))


def test_a_network_that_more_epochs_make_another_is_no_start_for_a_finished_run(compared, images, calls, capsys, monkeypatch):
    monkeypatch.setattr(compare, "recipe_of", lambda name: compare.Recipe(after="joint" if name == "boost" else None))
    command = ["--result_dir", str(compared), "--methods", "boost,joint", *flags(images)]
    assert compare.main(command) == 0
    message = tiny.one_line_error(capsys, lambda: compare.main([*command, "--epochs", "3"]))
    assert "started from the network of joint after 2 epochs" in message and not calls


def test_evaluation_is_told_how_images_are_read():
    given = ["--dataset", "folder", "--image_size", "224", "--grFactor", "1-2-4-4", "--bnFactor", "1-2-4-4", "--skip_unreadable",
             "--decoder", "pillow", "--methods", "boost"]
    assert compare.parse(given)[2][-3:] == ["--decoder", "pillow", "--skip_unreadable"]


@pytest.mark.parametrize("given, wanted", [("", (None, 3)), ("--overlap 2", (None, 2)), ("--groups 3-1", ([3, 1], None))])
def test_flags_given_win_over_those_of_a_methods_own_recipe(given, wanted):
    training = compare.parse(["--methods", "block_losses", *given.split()])[1]
    args = parse_args(compare.flags_of("block_losses", training))
    assert (args.groups, args.overlap) == wanted


@pytest.mark.parametrize("name, content", [
    ("anytime.json", "5"), ("dynamic.json", '{"points": null}'), ("results.json", "5"), ("results.json", '{"test": 5}'),
    ("results.json", "[" * 100_000), ("footprint.json", ""), ("footprint.json", '{"peak_rss_bytes": "x", "peak_cuda_bytes": 0}')])
def test_damaged_files_end_with_one_line_or_are_written_again(compared, images, tmp_path, capsys, monkeypatch, name, content):
    folder = tmp_path / "compare"
    shutil.copytree(compared, folder)
    (folder / "boost" / name).write_text(content)
    monkeypatch.setattr(compare, "_call", call_here)
    capsys.readouterr()
    try:
        code = compare.main(["--result_dir", str(folder), "--methods", "boost", *flags(images)])
    except SystemExit as error:
        code = error.code
    message = capsys.readouterr().err
    assert code == 0 or (code == 2 and message.count("\n") == 1 and name in message), message


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_during_evaluation_ends_like_one_during_training(tmp_path, monkeypatch, capsys, number):
    def killed(*arguments):
        raise compare.Failed(-number)

    monkeypatch.setattr(compare, "train", lambda *arguments: None)
    monkeypatch.setattr(compare, "evaluate", killed)
    assert compare.main(["--result_dir", str(tmp_path), "--methods", "boost"]) == 75
    assert "the same command goes on" in capsys.readouterr().out


def test_a_damaged_footprint_does_not_spoil_a_finished_training(tmp_path):
    (tmp_path / "f.json").write_text("[]")
    footprint.write_largest(tmp_path / "f.json", {"peak_rss_bytes": 5})
    assert json.loads((tmp_path / "f.json").read_text()) == {"peak_rss_bytes": 5}
