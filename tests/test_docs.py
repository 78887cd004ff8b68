"""README and docs: every link and anchor resolves, every command is one that the programs take."""
import importlib
import re
import shlex
from pathlib import Path

import pytest

from args import parse_args

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = re.compile(r"```(\w*)\n(.*?)```", re.S)


def prose(page):
    return CODE.sub("", page.read_text())


def anchors(page):
    """GitHub's anchors of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page):
    """Command lines of the page's shell blocks, and of single lines in backticks, as words."""
    for language, block in CODE.findall(page.read_text()):
        if language == "bash":
            variables = dict(re.findall(r'^([A-Z]+)="(.*)"$', block, re.M))
            for line in block.replace("\\\n", " ").splitlines():
                for name, value in variables.items():
                    line = line.replace(f"${name}", value)
                words = shlex.split(line, comments=True)
                if words:
                    yield words
    for line in re.findall(r"(?<!`)`((?:python|bash) [^`]+)`", " ".join(prose(page).split())):
        yield shlex.split(line, comments=True)


def words_after(words, *names):
    """What follows the first of `names`, up to a pipe or `&`; None where there is none."""
    for i, word in enumerate(words):
        if word in names:
            rest = words[i + 1:]
            ends = [n for n, later in enumerate(rest) if later in ("&", "|", ">", ";", "&&")]
            return rest[:ends[0]] if ends else rest
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_resolves(page):
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    assert links or page.name != "README.md"
    for link in links:
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}"


SCRIPTS = "train_cifar100.py", "train_imagenet.py", "eval_cifar100.py", "eval_imagenet.py"
# Of placeholders for more words, and of shell variables that hold flags.
PLACEHOLDERS = {"...", "[RUN", "...]"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_taken(page, capsys):
    for words in commands(page):
        flags = words_after(words, *SCRIPTS)
        if flags is not None:
            flags = [word for word in flags if word not in PLACEHOLDERS]
            try:
                parse_args(flags)
            except SystemExit as stop:
                assert not stop.code, f"{page.name}: {' '.join(words)}: {capsys.readouterr().err}"
        elif "-m" in words and words[words.index("-m") + 1].startswith("utils."):
            name = words[words.index("-m") + 1]
            if name == "utils.NAME":
                continue
            assert (ROOT / f"{name.replace('.', '/')}.py").is_file(), f"{page.name}: {name}"
            rest = words_after(words, name)
            with pytest.raises(SystemExit):
                program = importlib.import_module(name)
                benchmark = [word for word in rest[:1] if name == "utils.benchmark" and not word.startswith("-")]
                program.main([*benchmark, "--help"])
            known = capsys.readouterr().out
            for flag in (word.split("=")[0] for word in rest if word.startswith("--")):
                assert flag in known, f"{page.name}: {name} has no {flag}"
        for word in words:
            if re.fullmatch(r"(msdnet_scripts|ranet_scripts|tests)/\S+\.(sh|py)", word):
                assert (ROOT / word).is_file(), f"{page.name}: {word}"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 250
