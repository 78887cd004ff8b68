"""Mutation testing: one small fault at a time in the code, and whether a test notices it. `bash tests/mutation.sh` runs it.

    bash tests/mutation.sh                          # every module of TARGETS
    bash tests/mutation.sh sampling split           # some of them
    bash tests/mutation.sh report --sample 50       # 50 mutants drawn with a fixed seed

The tests of a module are collected once. A first pass notes which of its lines each test runs, and for how long. Every mutant
then has a process of its own, forked from this one: the changed function's code takes the place of the original's, and the
tests that run the changed line follow, the fastest first, until one fails. What survives is printed. Mutants that compute the
same as the original stand with a reason in mutation_equivalent.txt and do not count.

Why none of the usual tools: mutmut leaves decorated functions alone (class methods, properties, inference mode), cosmic-ray
starts a process with PyTorch for every mutant, and neither exchanges arguments.
"""
from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import importlib
import inspect
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from _pytest.runner import runtestprotocol
from hypothesis import Phase, settings

ROOT = Path(__file__).parent.parent
EQUIVALENT = Path(__file__).parent / "mutation_equivalent.txt"
# By module: test files, and which of their tests (pytest's -k).
TARGETS = {
    "adaptive_inference": ("test_adaptive_inference", "not takes_about"),   # measures time
    "utils.evaluation.operating_points": ("test_operating_points", ""),
    "utils.evaluation.thresholds": ("test_optimised_thresholds", "hull or single_exit or corner or cost_their or regression or "
                                    "earns or beyond or out_of_use or degenerate or saves or certified or betting or spread or "
                                    "formula or loss_is or halved or numbers_of or between_two or become or by_hand or points_of "
                                    "or one_line or in_words or end_the_search or a_gain_of_nothing or rounding_alone"),
    "utils.evaluation.early_exit": ("test_early_exit test_drift", "(test_early_exit and not forms_for_inference) or counted or "
                                    "cut_short or no_decision or mistakes"),
    "utils.evaluation.predict": ("test_evaluation test_calibration", "test_evaluation or definitions or details_are or no_answer "
                                 "or read_as_the"),
    "utils.evaluation.drift": ("test_drift", ""),
    "utils.evaluation.reliability": ("test_calibration", "definitions or order_of_equally or ideal_score"),
    "utils.evaluation.scores": ("test_scores", ""),
    "models.boosted_head": ("test_models", "boosted_head or temperatures or ablation"),
    "utils.data.sampling": ("test_split", ""),
    "utils.data.split": ("test_split", ""),
    "op_counter": ("test_models", "macs or counted or pool or functions"),
    "models.backbone": ("test_chain", "protocol or backbone or frozen"),
    "models.folding": ("test_chain", "folded or answers_otherwise"),
    "utils.report": ("test_report", ""),
    "utils.reports.finished_runs": ("test_finished_runs test_report", "test_finished_runs or every_command"),
    "utils.methods.losses": ("test_objective test_methods", "test_objective or distillation or teacher_s or by_hand"),
    "utils.methods.base": ("test_methods test_steps", "lowers or epsilon_zero or a_start_takes or sum_over or exchange or lost"),
    "utils.methods.distillation": ("test_methods", "distillation and not refused or teacher_s"),
    "utils.methods.block_losses": ("test_methods test_method_flags", "routed or groups_that or blocks_that or arrives"),
    "utils.methods.imta": ("test_methods test_image_sizes",
                           "smallest_pass or by_hand or collaborating_exits_have or collaborating_exits_start"),
    "utils.methods.l2w": ("test_methods test_methods_golden test_method_flags test_steps test_image_sizes",
                          "epsilon or meta_step or halves or leave_in or weight_network or trial or state_of_sample or samples "
                          "or built_by_hand or smallest_pass or A-8 or B-8-mat"),
}
FIRST_PASS = 10_000   # seconds of processor time it may take
# Swapping the arguments of these changes nothing, or nothing but types.
SYMMETRIC = {"min", "max", "maximum", "logical_and", "equal", "isinstance", "getattr", "hasattr", "cast"}
COMPARISONS: dict[type, tuple[type, ...]] = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,)}
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
             ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift}
NAMES = {a: b for pair in (("min", "max"), ("any", "all"), ("argmax", "argmin"), ("amax", "amin"), ("floor", "ceil"),
                           ("zeros", "ones"), ("sum", "mean"), ("stdev", "pstdev"), ("vstack", "hstack"))
         for a, b in (pair, pair[::-1])}


class Mutant(NamedTuple):
    """One fault.

    Attributes:
        name: function, code before and after; unique in its module.
        line: that it changes.
        lines: first and last one of its statement; of a default value, which tests may read without a call, all of the module.
        scope: qualified name of the outermost function around it; of an assignment in the module, its target.
        code: of the whole module with the fault.
    """

    name: str
    line: int
    lines: tuple[int, int]
    scope: str
    code: types.CodeType


def replacements(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in place of a piece of code."""
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            for other in COMPARISONS[type(op)]:
                yield ast.Compare(node.left, [*node.ops[:i], other(), *node.ops[i + 1:]], node.comparators)
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        yield ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)
    elif isinstance(node, ast.AugAssign):
        yield ast.Pass()
        if type(node.op) in OPERATORS:
            yield ast.AugAssign(node.target, OPERATORS[type(node.op)](), node.value)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        yield ast.Constant(not node.value if isinstance(node.value, bool) else node.value + 1)
    elif isinstance(node, (ast.If, ast.IfExp)):
        yield type(node)(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
    elif isinstance(node, ast.Raise) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        yield ast.Pass()
    elif isinstance(node, ast.Break):
        yield ast.Continue()
    elif isinstance(node, ast.Continue):
        yield ast.Break()
    elif isinstance(node, ast.Call):
        yield from _other_calls(node)


def _other_calls(call: ast.Call) -> Iterator[ast.AST]:
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if name in NAMES:
        function = copy.copy(call.func)
        setattr(function, "attr" if isinstance(function, ast.Attribute) else "id", NAMES[name])
        yield ast.Call(function, call.args, call.keywords)
    if len(call.args) > 1 and name not in SYMMETRIC and not any(isinstance(a, ast.Starred) for a in call.args[:2]):
        yield ast.Call(call.func, [call.args[1], call.args[0], *call.args[2:]], call.keywords)
    for i, keyword in enumerate(call.keywords):
        if keyword.arg not in (None, "help"):
            yield ast.Call(call.func, call.args, call.keywords[:i] + call.keywords[i + 1:])


def mutants_of(path: Path) -> list[Mutant]:
    """All mutants of a file. Left alone are texts, what an error says, annotations, decorators, and fields of classes."""
    tree, found, seen = ast.parse(path.read_text()), [], Counter()

    def visit(parent: ast.AST, scope: str, inside: bool, lines: tuple[int, int]) -> None:
        for field, value in ast.iter_fields(parent):
            if field in ("annotation", "returns", "decorator_list", "bases", "ctx", "op", "ops"):
                continue
            for i, node in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(node, ast.AST):
                    look_at(parent, field, i if isinstance(value, list) else None, node, scope, inside, lines)

    def look_at(parent, field, i, node, scope, inside, lines) -> None:
        if isinstance(node, (ast.Import, ast.ImportFrom, ast.JoinedStr)):
            return
        if isinstance(node, ast.FunctionDef) or (isinstance(node, ast.stmt) and not hasattr(node, "body")):
            lines = node.lineno, node.end_lineno
        elif isinstance(node, ast.stmt):
            lines = node.lineno, max(node.lineno, node.body[0].lineno - 1)
        elif isinstance(node, ast.arguments):
            lines = 1, sys.maxsize
        if parent is tree and isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            scope, inside = node.targets[0].id, True
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not inside:
            scope, inside = f"{scope}.{node.name}".lstrip("."), isinstance(node, ast.FunctionDef)
        elif inside:
            for other in replacements(node):
                put(parent, field, i, ast.copy_location(other, node))
                text = f"{scope}: {_short(node)} -> {_short(other)}"
                seen[text] += 1
                name = text if seen[text] == 1 else f"{text} (#{seen[text]})"
                code = compile(ast.fix_missing_locations(tree), str(path), "exec")
                found.append(Mutant(name, node.lineno, lines, scope, code))
                put(parent, field, i, node)
        if not isinstance(node, ast.Raise):
            visit(node, scope, inside, lines)

    def put(parent, field, i, node) -> None:
        if i is None:
            setattr(parent, field, node)
        else:
            getattr(parent, field)[i] = node

    visit(tree, "", False, (0, 0))
    return found


def _short(node: ast.AST) -> str:
    text = ast.unparse(node).split("\n")[0]
    return text if len(text) <= 100 else text[:97] + "..."


def install(module: types.ModuleType, mutant: Mutant) -> None:
    """Let a loaded module compute what the mutant says. References to its functions in other modules see it too."""
    changed = dict(vars(module))
    exec(mutant.code, changed)
    *outer, name = mutant.scope.split(".")
    old_home, new_home = vars(module), changed
    for part in outer:
        owner = old_home[part]
        old_home, new_home = vars(owner), vars(new_home[part])
    old, new = _function(old_home[name]), _function(new_home[name])
    if not isinstance(old, types.FunctionType):   # a constant, which other modules may have imported
        for other in list(sys.modules.values()):
            if getattr(other, "__dict__", {}).get(name) is old_home[name] and other is not module:
                setattr(other, name, changed[name])
        setattr(module, name, changed[name])
    elif len(old.__code__.co_freevars) == len(new.__code__.co_freevars):
        old.__code__, old.__defaults__, old.__kwdefaults__ = new.__code__, new.__defaults__, new.__kwdefaults__
    else:   # a call of super() that is gone
        setattr(owner, name, types.FunctionType(new.__code__, vars(module), name, new.__defaults__))


def _function(member: Any) -> Any:
    member = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
    return inspect.unwrap(member) if callable(member) else member


class Tests:
    """A plugin of pytest that runs the collected tests once for every mutant, in place of once."""

    def __init__(self, target: str, chosen: argparse.Namespace) -> None:
        self.module_name, self.options, self.score = target, chosen, None

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.items = session.items
        self.module = importlib.import_module(self.module_name)
        self.path = Path(self.module.__file__)
        session.config._tmp_path_factory.getbasetemp()   # one folder for all children
        known = self.first_pass()
        mutants = mutants_of(self.path)
        total, names = len(mutants), {mutant.name for mutant in mutants}
        if 0 < self.options.sample < total:
            mutants = random.Random(0).sample(mutants, self.options.sample)
        reasons, results = _equivalent(self.module_name), Counter()
        for name in sorted(reasons.keys() - names):
            print(f"  no such mutant any more: {name}")
        for mutant in sorted(mutants, key=lambda m: m.line):
            if mutant.name in reasons:
                results["equivalent"] += 1
                continue
            ended = self.fate(mutant, known)
            results[ended] += 1
            if ended == "survived" or self.options.verbose:
                print(f"  {ended} {self.path.relative_to(ROOT)}:{mutant.line} {mutant.name}", flush=True)
        self.score = {**results, "mutants": len(mutants), "all": total}
        return True

    def first_pass(self) -> dict[str, Any]:
        """Of every test: processor seconds, and the lines of the module that it runs."""
        with tempfile.NamedTemporaryFile() as file:
            status = self.forked(lambda: Path(file.name).write_text(json.dumps(self._watched())), limit=FIRST_PASS)
            if status:
                raise SystemExit(f"{self.module_name}: the first pass over its tests failed (status {status})")
            known, modules = json.loads(Path(file.name).read_text())
        for name in modules:   # what tests load while they run would have to be loaded for every mutant
            if name not in sys.modules:
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
        return known

    def _watched(self) -> tuple[dict[str, Any], list[str]]:
        lines, name = set(), str(self.path)

        def local(frame, event, arg):
            lines.add(frame.f_lineno)
            return local

        known = {}
        for item, following in zip(self.items, [*self.items[1:], None]):
            start = time.process_time()
            lines = set()
            sys.settrace(lambda frame, event, arg: local(frame, event, arg) if frame.f_code.co_filename == name else None)
            try:
                reports = runtestprotocol(item, log=False, nextitem=following)
            finally:
                sys.settrace(None)
            if any(report.failed for report in reports):
                raise SystemExit(f"{item.nodeid} fails without a mutant: {[r.longreprtext for r in reports if r.failed]}")
            known[item.nodeid] = [time.process_time() - start, sorted(lines)]
        return known, list(sys.modules)

    def fate(self, mutant: Mutant, known: dict[str, Any]) -> str:
        everywhere = not any(mutant.scope == getattr(f, "__qualname__", None) for f in _functions(self.module))
        start, end = mutant.lines
        first = [i for i in self.items if everywhere or any(start <= line <= end for line in known[i.nodeid][1])]
        files = {i.path for i in first} if self.options.thorough else ()   # a shared fixture may have run the line
        rest = [i for i in self.items if i not in first and i.path in files]
        chosen = sorted(first, key=lambda i: known[i.nodeid][0]) + rest
        seconds = sum(known[i.nodeid][0] for i in chosen)

        def run() -> None:
            install(self.module, mutant)
            for item, following in zip(chosen, [*chosen[1:], None]):
                if any(report.failed for report in runtestprotocol(item, log=False, nextitem=following)):
                    os._exit(1)

        return "killed" if self.forked(run, limit=5 + 2 * seconds) else "survived"

    def forked(self, work, limit: float) -> int:
        """How a process ends that does the work; 0 is well. `limit` is in processor seconds."""
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGXCPU, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + limit) + 1,) * 2)
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            if limit < FIRST_PASS:
                os.dup2(silent, 2)
            try:
                work()
            except BaseException as error:
                os.write(2, f"{type(error).__name__}: {error}\n".encode())
                os._exit(1)
            os._exit(0)
        return os.waitpid(child, 0)[1]


def _functions(module: types.ModuleType) -> Iterator[Any]:
    for member in vars(module).values():
        yield _function(member)
        if inspect.isclass(member):
            yield from map(_function, vars(member).values())


def _equivalent(module: str) -> dict[str, str]:
    """Reasons of mutants that compute the same, by their names."""
    lines = EQUIVALENT.read_text().splitlines() if EQUIVALENT.is_file() else []
    rows = [line.split(" | ") for line in lines if line and not line.startswith("#")]
    return {name: reason for of, name, reason in rows if of == module}


def main() -> int:
    parser = argparse.ArgumentParser(description="Mutation testing of the modules in TARGETS.")
    parser.add_argument("modules", nargs="*", help="last words of their names; default: all")
    parser.add_argument("--sample", type=int, default=0, help="mutants of each module, drawn with a fixed seed; default: all")
    parser.add_argument("--thorough", action="store_true", help="then run the other tests of the same files too")
    parser.add_argument("--verbose", action="store_true", help="print the killed ones as well")
    options = parser.parse_args()
    settings.register_profile("mutation", derandomize=True, database=None, deadline=None,
                              phases=(Phase.explicit, Phase.generate))
    settings.load_profile("mutation")
    sums = Counter()
    for target, (files, expression) in TARGETS.items():
        if options.modules and target.split(".")[-1] not in options.modules:
            continue
        arguments = ["-qq", "-s", "-p", "no:cacheprovider", "--no-header", "--no-summary", "-k", expression,
                     *(str(ROOT / "tests" / f"{name}.py") for name in files.split())]
        with tempfile.NamedTemporaryFile() as file:
            child = os.fork()   # what the tests of one module load or change does not reach another's
            if child == 0:
                tests = Tests(target, options)
                pytest.main(arguments, plugins=[tests])
                Path(file.name).write_text(json.dumps(tests.score))
                os._exit(0)
            os.waitpid(child, 0)
            score = json.loads(Path(file.name).read_text() or "null")
        if score is None:
            return 1
        print(_line(target, score), flush=True)
        sums.update(score)
    print(_line("together", sums))
    return 0


def _line(name: str, score: dict[str, int]) -> str:
    killed, judged = score.get("killed", 0), score.get("killed", 0) + score.get("survived", 0)
    return (f"{name}: {killed} of {judged} killed ({100 * killed / max(judged, 1):.1f} %), "
            f"{score.get('equivalent', 0)} equivalent; {score['mutants']} of {score['all']} mutants")


if __name__ == "__main__":
    sys.exit(main())
