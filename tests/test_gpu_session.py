"""The session on a GPU: its plan, its commands, and all of it on the CPU with stand-in sizes."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import gpu_session
import pytest
from gpu_session import EXACT, LIMITS, PLANNED_FOR, REAL, STAND_IN

from args import parse_args
from utils.benchmark import build_parser


@pytest.mark.parametrize("images_per_s", PLANNED_FOR)
def test_the_plan_fills_the_session_and_leaves_five_minutes_to_training(images_per_s):
    parts = gpu_session.plan(images_per_s)
    assert sum(parts.values()) == pytest.approx(gpu_session.SECONDS) and gpu_session.SECONDS < 600
    assert parts["training"] + parts["evaluation"] >= 300
    assert all(parts[name] <= limit for name, limit in LIMITS.items())


def test_the_table_has_a_column_for_each_speed(capsys):
    assert gpu_session.main(["--plan"]) == 0
    assert capsys.readouterr().out.split()[1:6] == list(map(str, PLANNED_FOR))
    assert gpu_session.main(["--plan", "3000"]) == 0
    assert capsys.readouterr().out.split()[1] == "3000"


def test_epochs_end_in_time_and_there_is_at_least_one():
    for images_per_s in PLANNED_FOR:
        epochs = gpu_session.epochs_that_fit(300, images_per_s)
        spent = epochs * (45_000 + 5_000 / 3) / images_per_s
        assert 300 - 60 - 2 * 46_667 / images_per_s - epochs < spent < 300 - 30, images_per_s
    assert gpu_session.epochs_that_fit(10, 100) == 1 and gpu_session.epochs_that_fit(1e9, 1e9) == REAL.most_epochs


def test_the_fastest_way_is_in_float32_without_a_compiler_and_of_this_network():
    def line(name, seconds, network="msdnet10"):
        return {"name": name, "median": seconds, "config": {"network": network, "batch size": 64}}

    lines = [line("released manner", 0.01), line("default", 0.5), line("cuda_graphs", 0.1), line("cuda_graphs", 0.01, "ranet8"),
             line("bf16+channels_last+cuda_graphs", 0.02), line("channels_last+compile+cuda_graphs", 0.03)]
    assert gpu_session.fastest(lines) == ("cuda_graphs", 640)
    with pytest.raises(ValueError):
        gpu_session.fastest(lines[:1])


@pytest.mark.parametrize("sizes", [REAL, STAND_IN], ids=["session", "dry run"])
def test_every_command_is_taken(sizes):
    for way in EXACT if sizes is REAL else EXACT[:2]:
        program, *flags = gpu_session.training(Path("out"), "data", 9, way, sizes)
        args = parse_args(flags, task="training")
        assert (program, args.epochs, args.lr_type, args.amp) == ("train_cifar100.py", 9, "cosine", "off")
        assert args.cuda_graphs == ("cuda_graphs" in way) and args.channels_last == ("channels_last" in way)
        assert sizes is STAND_IN or (args.batch_size, args.nBlocks, args.base) == (64, 10, 4)
    for _, *flags in gpu_session.evaluations(Path("out"), "data", sizes):
        assert parse_args(flags, task="evaluation").publish == "out/published"
    for fast in (sizes.fast, sizes.compiled):
        _, module, *flags = gpu_session.benchmark(Path("out"), "ranet8", fast, sizes)
        assert module == "utils.benchmark" and len(build_parser().parse_args(flags).fast) == fast.count(",") + 1


STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("told to stop", flush=True), sys.exit(0)))
child = subprocess.Popen(["sleep", "600"])
print("child", child.pid, flush=True)
time.sleep(600)
"""


def test_a_part_is_cut_off_with_all_that_it_has_started(tmp_path, capsys):
    start = time.monotonic()
    assert not gpu_session.part(tmp_path, "a part", ["-c", STUBBORN], 2)
    assert time.monotonic() - start < 60
    log = (tmp_path / "a_part.log").read_text()
    assert "told to stop" in log and "a part: cut off" in capsys.readouterr().out
    time.sleep(0.2)
    child = Path(f"/proc/{log.split()[1]}/stat")
    assert not child.exists() or child.read_text().split()[2] == "Z"
    assert gpu_session.part(tmp_path, "good", ["-c", "pass"], 60) and not gpu_session.part(tmp_path, "bad", ["-c", "1/0"], 60)


@pytest.mark.parametrize("line", [[], ["out"], ["--dry-run"]])
def test_a_session_without_folder_or_data_is_refused(line, capsys):
    with pytest.raises(SystemExit) as stop:
        gpu_session.main(line)
    assert stop.value.code == 2 and "needs FOLDER and --data-root" in capsys.readouterr().err


@pytest.mark.slow
def test_a_dry_run_does_all_parts(tmp_path):
    folder = tmp_path / "session"
    done = subprocess.run([sys.executable, gpu_session.__file__, str(folder), "--dry-run"], capture_output=True, text=True,
                          cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in (*LIMITS, "training", "evaluation"):
        assert f"[{name}: 0," in done.stdout, name
    assert json.loads((folder / "run/results.json").read_text())["test"]["epoch"] == STAND_IN.most_epochs
    assert {"model_anytime.pth", "model_dynamic.pth", "anytime.json", "dynamic.json"} <= {
        path.name for path in (folder / "published").iterdir()}
