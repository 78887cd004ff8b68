"""The frame of the benchmarks, on sizes that take no time."""
import json
import sys

import numpy as np
import pytest
import torch

from models import BoostedNet, MSDNet
from utils import benchmark
from utils.benchmarks import early_exit, training
from utils.benchmarks.measure import Measurement, peak_memory, time_calls

QUICK = ["sweep", "--samples", "50", "--exits", "3", "--repeats", "3"]


def test_sweep_prints_a_table_and_appends_one_json_line_per_measurement(tmp_path, capsys):
    file = tmp_path / "speed.jsonl"
    assert benchmark.main([*QUICK, "--json", str(file)]) == 0
    assert benchmark.main([*QUICK, "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "released sweep, 39 points" in printed and "p90" in printed and "samples 50, exits 3" in printed
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == 4
    for line in lines:
        assert line["config"] == {"samples": 50, "exits": 3} and line["n"] == 3 and line["unit"] == "s"
        assert 0 < line["p10"] <= line["median"] <= line["p90"]
        assert {"torch", "device", "threads", "commit"} <= line.keys()


@pytest.mark.parametrize("unit, factor, code", [("s", 1.1, 0), ("s", 1.3, 1), ("s", 0.5, 0),
                                                ("images/s", 0.9, 0), ("images/s", 0.7, 1), ("images/s", 2.0, 0)])
def test_compare_fails_only_on_what_became_slower(unit, factor, code, capsys):
    earlier = Measurement("thing", (1.0, 1.0, 1.0), unit).summary()
    now = Measurement("thing", (factor,) * 3, unit).summary()
    assert benchmark.compare([now], [earlier], tolerance=0.2) == code
    assert ("SLOWER" in capsys.readouterr().out) == bool(code)


def test_compare_uses_results_of_the_same_configuration_only(capsys):
    earlier = Measurement("thing", (1.0,), config={"exits": 5}).summary()
    assert benchmark.compare([Measurement("thing", (9.0,), config={"exits": 6}).summary()], [earlier], 0.2) == 0
    assert "nothing to compare with" in capsys.readouterr().out


@pytest.mark.parametrize("name, value", [("device", "a GPU"), ("threads", 16), ("unit", "ms")])
def test_compare_uses_results_of_the_same_machine_only(name, value, capsys):
    line = Measurement("thing", (9.0,)).summary() | {"device": "a CPU", "threads": 1}
    assert benchmark.compare([line], [{**line, "median": 1.0}], 0.2) == 1
    assert benchmark.compare([line], [{**line, "median": 1.0, name: value}], 0.2) == 0
    assert "nothing to compare with" in capsys.readouterr().out


@pytest.fixture
def tiny_networks(monkeypatch):
    for name in early_exit.NETWORKS:
        monkeypatch.setitem(early_exit.NETWORKS, name, lambda: MSDNet(n_blocks=2, n_channels=4, base=1, step=1))


def test_early_exit_and_the_whole_network_are_timed_in_turn_on_both_runtimes(tiny_networks, monkeypatch, tmp_path, capsys):
    """Each after an untimed pass of its own, and against the fastest of the whole networks of that batch size."""
    monkeypatch.setattr(early_exit, "use_all_cores", lambda threads: None)   # once for a process, which other tests share
    exported, export = [], early_exit._export   # the two networks are equal here

    def export_once(*of):
        exported.extend([] if exported else [export(*of)])
        return exported[0]

    monkeypatch.setattr(early_exit, "_export", export_once)
    calls, seconds = [], early_exit._seconds
    monkeypatch.setattr(early_exit, "_seconds", lambda device, call, x: calls.append(call) or seconds(device, call, x))
    file = tmp_path / "speed.jsonl"
    line = f"early_exit --device cpu --threads 1 --images 20 --batch-sizes 10,1 --budgets 0.6,0.8 --repeats 2 --json {file}"
    assert benchmark.main(line.split()) == 0
    kinds = [list(dict.fromkeys(calls)).index(call) for call in calls]
    one_network = [kind for batches in (2, 20) for _ in range(2) for kind in range(7) for _ in range(2 * batches)]
    assert kinds == one_network + [7 + kind for kind in one_network]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["config"]["network"] for line in lines] == ["msdnet10"] * 14 + ["ranet8"] * 14
    for table in (lines[i:i + 7] for i in range(0, 28, 7)):
        assert [line["name"] for line in table] == [
            *(f"all exits, {way}" for way in ("PyTorch eager", "PyTorch", "ONNX")),
            *(f"early exit at {budget}, {way}" for budget in (0.6, 0.8) for way in ("PyTorch", "ONNX"))]
        fastest = max(table[:3], key=lambda line: line["median"])
        assert fastest["ratio"] == 1 and {line["fastest"] for line in table} == {fastest["name"]}
        for line in table[3:]:
            assert line["ratio without losses"] > 0 and line["MACs share"] == pytest.approx(line["budget"], abs=0.05)
        assert all(("p99 ms" in line) == (table[0]["config"]["batch size"] == 1) for line in table)
    printed = capsys.readouterr().out
    assert printed.count("ms per image of every step, ONNX: ") == 4 and printed.count("p50 ms  p95 ms  p99 ms") == 2


def test_without_onnx_early_exit_is_measured_on_pytorch_alone(tiny_networks, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    line = "early_exit --device cpu --network ranet8 --images 2 --batch-sizes 2 --budgets 0.7 --repeats 1"
    assert benchmark.main(line.split()) == 0
    printed = capsys.readouterr().out
    assert "without ONNX: ONNX needs onnxruntime: pip install" in printed and "early exit at 0.7, PyTorch" in printed


@pytest.mark.parametrize("flags, message", [
    ("--budgets 0.7 --openvino", "--openvino needs OpenVINO: pip install"),
    ("--budgets 0.001", "--budgets 0.001: the first exit of msdnet10"),
    ("--budgets 0", "above 0"), ("--network vgg", "unknown network 'vgg'")])
def test_mistakes_in_the_flags_of_early_exit_end_with_one_line(flags, message, tiny_networks, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(SystemExit) as stop:
        benchmark.main(["early_exit", "--device", "cpu", *flags.split()])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and message in error


def test_the_first_call_is_not_timed():
    calls = []
    seconds = time_calls(lambda: calls.append(None), 4, torch.device("cpu"))
    assert len(seconds) == 4 and len(calls) == 5


@pytest.mark.parametrize("argv", [["nope"], ["sweep", "--samples", "0"], ["sweep", "--repeats", "x"],
                                  [*QUICK, "--compare", "missing.jsonl"], [*QUICK, "--compare", ""], [*QUICK, "--json", ""],
                                  *([*QUICK, "--tolerance", value] for value in ("nan", "inf", "-0.1", "x"))])
def test_mistakes_end_with_one_line_and_code_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(argv)
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("line", ["[1]", "1", "{}", "null", "{", "[" * 100_000, '{"name": "thing", "median": 1}',
                                  *(f'{{"name": "thing", "config": {{}}, "median": {median}}}'
                                    for median in ("0", '"x"', "null", "NaN", "-1", "true", "1" + "0" * 400))])
def test_lines_that_are_no_results_are_refused_before_anything_is_measured(line, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark.sweep, "run", None)
    file = tmp_path / "speed.jsonl"
    file.write_text(f"{json.dumps(Measurement('thing', (1.0,)).summary())}\n{line}\n")
    with pytest.raises(SystemExit) as stop:
        benchmark.main([*QUICK, "--compare", str(file)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and f"{file} is not a file of --json results" in error


@pytest.fixture
def tiny_network(monkeypatch):
    monkeypatch.setitem(training.NETWORKS, "msdnet10", lambda: MSDNet(n_blocks=2, n_channels=4, base=1, step=1))


def test_training_is_timed_in_the_released_manner_by_default_and_fast(tiny_network, tmp_path, capsys):
    file = tmp_path / "speed.jsonl"
    line = f"train --device cpu --batch-size 4 --steps 2 --repeats 2 --workers 1 --fast channels_last,bf16 --json {file}"
    assert benchmark.main(line.split()) == 0
    lines = {line["name"]: line for line in map(json.loads, file.read_text().splitlines())}
    assert list(lines) == ["released manner", "default", "channels_last", "bf16"]
    for name, line in lines.items():
        steps_and_input = 12_500 * line["median"]   # batches of 4 of 50,000 images
        assert line["epoch_s"] > 0.5 * (steps_and_input + line["second_pass_s"])
        assert (line["second_pass_s"] > 0) == (name == "released manner")
        assert sum(line["time_shares"].values()) == pytest.approx(1) and line["time_shares"]["convolution"] > 0
    assert "x1.00" in capsys.readouterr().out


def test_the_released_manner_looks_at_every_image_alone_and_at_every_exit(tiny_network):
    args = benchmark.build_parser().parse_args("train --batch-size 4 --workers 1".split())
    torch.manual_seed(0)
    backbone = training.NETWORKS["msdnet10"]()
    images = np.full((8, 32, 32, 3), 255, np.uint8)
    loop = training.PlainLoop(BoostedNet(backbone, [0.5, 0.5]), images, np.arange(8), args, torch.device("cpu"))
    assert loop.model.backbone is backbone   # every convolution by itself, as in the released program
    batch, labels = next(loop.batches)
    assert batch.shape == (4, 3, 32, 32) and labels.shape == (4,)
    black = ((batch - batch.amin(dim=(0, 2, 3), keepdim=True)) < 1e-6).flatten(1).any(dim=1)
    assert len({tuple(image.flatten().tolist()) for image in batch}) > 1 and black.any()   # shifted, each its own way
    before = [p.clone() for p in backbone.parameters()]
    loop.judge(1)
    assert all(map(torch.equal, before, backbone.parameters()))
    loop.train(1)
    assert not all(map(torch.equal, before, backbone.parameters()))


def test_growing_work_is_compared_per_unit(tmp_path, capsys):
    file = tmp_path / "speed.jsonl"
    line = f"scaling --device cpu --repeats 1 --batch-sizes 1,2 --exits 1,2 --large-batch 1 --samples 4,8 --json {file}"
    assert benchmark.main(line.split()) == 0
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    series = [line["config"]["series"] for line in lines]
    assert series == [name for name in ("batch size", "exits", "image size", "predict", "thresholds of 40 budgets") for _ in "12"]
    sizes = [line["units"] for line in lines]
    assert sizes[:2] == [1, 2] and sizes[6:8] == [4, 8] and sizes[3] > sizes[2]
    assert capsys.readouterr().out.count("1.00") >= 5


@pytest.mark.skipif(sys.platform != "linux", reason="memory of a process is measured on Linux")
def test_peak_memory_is_what_a_call_needs_beside_what_is_there():
    there = torch.ones(2**24)   # 64 MiB
    found = peak_memory(lambda: torch.ones(2**23).sum(), torch.device("cpu"))
    assert 30 * 2**20 < found < 60 * 2**20, found
    assert there.sum() == 2**24


@pytest.mark.parametrize("flags", ["--fast channels_first", "--fast channels_last+", "--batch-size 0", "--network vgg"])
def test_mistakes_in_the_flags_of_the_training_benchmark_end_with_one_line(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(["train", *flags.split()])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_fast_paths_are_named_as_on_the_command_line():
    for text in ("channels_last", "bf16+channels_last+compile+cuda_graphs"):
        assert training._name(training.options(text)) == text
