"""JSON files are read in one place: what is missing or something else is named with its place."""
from __future__ import annotations

import json

import pytest

from utils.core.errors import UserError
from utils.core.files import misfit, read_json

SHAPE = {"n": int, "x": (float, None), "kind": ("a", "b"), "points": [{"y": float, "on": bool}], "name": str}
GOOD = {"n": 3, "x": None, "kind": "b", "points": [{"y": 1, "on": True}, {"y": -0.5, "on": False}], "name": "", "more": []}


@pytest.mark.parametrize("change, problem", [
    ({}, None), ({"x": 2}, None), ({"x": 2.5}, None), ({"n": True}, "n cannot be True"), ({"n": 3.0}, "n cannot be 3.0"),
    ({"x": "2"}, "x cannot be '2'"), ({"x": float("nan")}, "x cannot be nan"), ({"x": float("inf")}, "x cannot be inf"),
    ({"x": True}, "x cannot be True"), ({"kind": "c"}, "kind cannot be 'c'"), ({"points": []}, "points cannot be []"),
    ({"points": {}}, "points cannot be {}"), ({"points": [GOOD["points"][0], {"y": 1}]}, "points[1].on is missing"),
    ({"points": [{"y": None, "on": True}]}, "points[0].y cannot be None"), ({"name": None}, "name cannot be None")])
def test_a_misfit_is_named_with_its_place(change, problem):
    assert misfit({**GOOD, **change}, SHAPE) == problem


@pytest.mark.parametrize("name", SHAPE)
def test_what_is_missing_is_named(name):
    assert misfit({key: value for key, value in GOOD.items() if key != name}, SHAPE) == f"{name} is missing"


@pytest.mark.parametrize("value, shape, problem", [
    (1, 1, None), (True, 1, "its content cannot be True"), (2, 1, "its content cannot be 2"), ([], ([float], []), None),
    ([1, "x"], [float], "[1] cannot be 'x'"), (None, dict, "its content cannot be None"),
    (10**400, float, "its content cannot be")])
def test_shapes_of_single_values(value, shape, problem):
    found = misfit(value, shape)
    assert found == problem or (problem and found.startswith(problem))


def test_a_file_is_read_whole_and_what_older_versions_lack_is_filled_in(tmp_path):
    (tmp_path / "file.json").write_text(json.dumps(GOOD))
    assert read_json(tmp_path / "file.json", SHAPE, {"n": 5, "new": None}) == {**GOOD, "new": None}
    with pytest.raises(UserError, match="file.json is damaged or of something else: new is missing"):
        read_json(tmp_path / "file.json", {"new": str})


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff", b"[]", b"null", b"3"])
def test_a_damaged_file_is_one_error_that_names_it(tmp_path, content):
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(UserError, match="file.json is damaged"):
        read_json(tmp_path / "file.json")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "missing.json")
