"""Building blocks of a command line: one-line errors, and text to values within their ranges. Knows no flag of its own."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import re
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from utils.core.errors import wait_unless_first


class OneLineParser(argparse.ArgumentParser):
    """argparse that answers a mistake with one line and exit code 2: a long usage listing would bury the message."""

    def error(self, message: str) -> NoReturn:
        one_line = " ".join(message.split())
        wait_unless_first()
        self.exit(2, f"{self.prog}: error: {one_line} (see {self.prog} --help)\n")

    def _get_values(self, action, arg_strings):
        # argparse strikes "--" out also where it was given as a value, and nothing checks the empty list that is left.
        if action.option_strings and "--" in arg_strings:
            self.error(f"argument {'/'.join(action.option_strings)}: expected a value, got --")
        return super()._get_values(action, arg_strings)

    def spelling(self, dest: str) -> str:
        """The flag behind a dest name, `--batch-size` for `batch_size`."""
        action = self._action(dest)
        return action.option_strings[0] if action else dest

    def words(self, dest: str, value: Any) -> str:
        """A flag with its value as on a command line, `--lr_milestones 150,225`; of a switch the flag alone, or nothing."""
        action = self._action(dest)
        if action and action.nargs == 0:
            return self.spelling(dest) if value else ""
        if isinstance(value, bool):
            value = str(value).lower()
        if isinstance(value, list):
            value = getattr(action and action.type, "separator", ",").join(map(_plain, value))
        return f"{self.spelling(dest)} {_plain(value)}"

    def _action(self, dest: str) -> argparse.Action | None:
        return next((action for action in self._actions if action.dest == dest), None)

    def defaults(self) -> dict[str, Any]:
        """Dest name -> value of every flag that is not given."""
        return vars(super().parse_args([]))

    def parse_given(self, argv: Sequence[str] | None) -> tuple[Namespace, frozenset[str]]:
        """The parsed flags, defaults filled in, and the dest names of those that were really on the command line."""
        defaults = self.defaults()
        # argparse leaves attributes alone that the namespace already has: what is still the marker was not given.
        not_given = object()
        found, unknown = self.parse_known_args(argv, Namespace(**dict.fromkeys(defaults, not_given)))
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            close = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1, cutoff=0.7)
            hint = f"; did you mean {close[0]}?" if close else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        given = {name: value for name, value in vars(found).items() if value is not not_given}
        return Namespace(**{**defaults, **given}), frozenset(given)


def whole(text: str) -> int:
    if not re.fullmatch(r"\s*[+-]?[0-9]{1,18}\s*", text):
        raise ArgumentTypeError(f"expected a whole number, got {text!r}")
    return int(text)


def number(text: str) -> float:
    try:
        value = math.nan if "_" in text else float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ArgumentTypeError(f"expected a finite number, got {text!r}")
    return value


def within(convert: Callable[[str], Any], low: float, high: float, *, above: bool = False,
           below: bool = False) -> Callable[[str], Any]:
    """A converter for values from `low` to `high`, without `low` (`above`) or without `high` (`below`)."""

    def parse(text: str) -> Any:
        value = convert(text)
        if not low <= value <= high or (above and value == low) or (below and value == high):
            raise ArgumentTypeError(f"must be {'above' if above else 'at least'} {low:.12g} and "
                                    f"{'below' if below else 'at most'} {high:.12g}, got {text.strip()}")
        return value

    return parse


def path(text: str) -> str:
    """A path that the system can take."""
    if not is_path(text):
        raise ArgumentTypeError(f"must be a path, got {text!r}")
    return text


def written_path(text: str) -> str:
    """A path for what the program writes, whose files hold it as text."""
    if not is_utf8(path(text)):
        raise ArgumentTypeError(f"must be a path in UTF-8, as the files in it, got {text!r}")
    return text


def true_false(text: str) -> bool:
    values = {"true": True, "false": False}
    if text.lower() not in values:
        raise ArgumentTypeError(f"expected true or false, got {text!r}")
    return values[text.lower()]


def list_of(convert: Callable[[str], Any], separator: str, example: str) -> Callable[[str], list]:
    """A converter for several values in one word, such as 1-2-4."""

    def parse(text: str) -> list:
        try:
            return [convert(part) for part in text.split(separator)]
        except ArgumentTypeError as error:
            raise ArgumentTypeError(f"{error}; the form is {example}") from None

    parse.separator = separator   # with which `OneLineParser.words` joins the values again
    return parse


def _plain(value: Any) -> str:
    """A value as it is typed."""
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def shown(value: Any) -> str:
    """A value as a message shows it."""
    return ", ".join(f"{item:g}" for item in value) if isinstance(value, list) else repr(value)


def rising(values: Sequence[float]) -> list[float]:
    """Differences of neighbours."""
    return [after - before for before, after in zip(values[:-1], values[1:], strict=True)]


def is_utf8(text: str) -> bool:
    """Whether every byte of `text` was part of a character."""
    try:
        return bool(text.encode())
    except UnicodeError:
        return False


def is_path(text: str) -> bool:
    """Whether the system can take `text` as a path."""
    try:
        return text != "" and b"\0" not in os.fsencode(text)
    except UnicodeError:
        return False
