"""The frame of the benchmarks, on sizes that take no time."""
import json

import pytest
import torch

from utils import benchmark
from utils.benchmarks.measure import Measurement, time_calls

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
