"""Mutation testing: if one sign, number or comparison of the mathematics is changed, does a test of its room fail?

    nox -s mutation                                          # 200 of all mutants, drawn with seed 0
    nox -s mutation -- --count 50 --seed 1 times/grids.py    # of one module, or of a room: times

The mutants are cosmic-ray's, less those that are not mathematics: annotations, argument checks and their messages,
pictures. Its own runner would start Python and import Keras for each; here one process imports what is not under test,
and each mutant is a fork of it, which imports kdiff with the mutated source and runs the tests of the module alone, the
quickest first: most mutants fall within seconds. Those that survive meet all tests of the room, where laws over a
family of classes stand.
"""

import argparse
import ast
import importlib.util
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.abc import MetaPathFinder
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGE, TESTS = ROOT / "kdiff", ROOT / "tests"
ROOMS = (
    "conversion",
    "gaussian",
    "guidance",
    "objectives",
    "predictions",
    "sampling",
    "schedules",
    "solvers",
    "times",
    "weightings",
)
ARITHMETIC, COMPARISONS = ("Add", "Sub", "Mul", "Div", "Pow"), ("Lt", "LtE", "Gt", "GtE", "Eq", "NotEq")
OPERATORS = (
    *(f"ReplaceBinaryOperator_{a}_{b}" for a, b in itertools.permutations(ARITHMETIC, 2)),
    *(f"ReplaceComparisonOperator_{a}_{b}" for a, b in itertools.permutations(COMPARISONS, 2)),
    "ReplaceUnaryOperator_USub_UAdd",
    "NumberReplacer",
    "ReplaceAndWithOr",
    "ReplaceOrWithAnd",
    "AddNot",
)


class Mutant(NamedTuple):
    module: str  # "times/grids.py"
    operator: str
    occurrence: int
    line: int


def modules(chosen: list[str]) -> list[str]:
    """The modules of the rooms, or of those among them that are named."""
    files = [file for room in ROOMS for file in [*PACKAGE.glob(f"{room}.py"), *sorted(PACKAGE.glob(f"{room}/*.py"))]]
    names = [file.relative_to(PACKAGE).as_posix() for file in files if file.name != "__init__.py"]
    return [name for name in names if not chosen or any(name == c or name.startswith(f"{c}/") for c in chosen)]


def tests_of(module: str) -> list[str]:
    """Those named after the module, room/name.py: test_room_name.py, or test_name.py where no other has that name, and
    what goes on with an underscore; if there are none, all of the room. test_room.py in any case; diffusers last.
    """
    room, *rest = module.removesuffix(".py").split("/")
    names = ["_".join([room, *rest]), *(name for name in rest if not (PACKAGE / f"{name}.py").exists())]
    patterns = [pattern for name in names for pattern in (f"test_{name}.py", f"test_{name}_*.py")]
    own = {file for pattern in patterns for file in TESTS.glob(pattern)} or set(TESTS.glob(f"test_{room}_*.py"))
    files = own | {*TESTS.glob(f"test_{room}.py"), *TESTS.glob(f"test_{room}_reference.py")}
    return [str(file) for file in sorted(files, key=lambda file: ("reference" in file.name, file not in own, file))]


def tests_of_room(module: str) -> list[str]:
    """Those of all modules of the room."""
    return sorted({file for name in modules([module.split("/")[0]]) for file in tests_of(name)})


def excluded(source: str) -> list[tuple]:
    """Where nothing is mutated: (start, end) of annotations, of raises and what leads to them, of checks and plots."""
    places = []
    for node in ast.walk(ast.parse(source)):
        called = ast.unparse(node.func).split(".")[-1].lstrip("_") if isinstance(node, ast.Call) else ""
        if isinstance(node, (ast.Raise, ast.JoinedStr)) or called.startswith("check"):
            places.append(node)
        elif isinstance(node, ast.If) and isinstance(node.body[-1], ast.Raise):
            places.append(node.test)
        elif isinstance(node, ast.FunctionDef) and node.name.lstrip("_").startswith(("check", "plot")):
            places.append(node)
        places += [value for name in ("annotation", "returns") if (value := getattr(node, name, None)) is not None]
    return [((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)) for node in places]


def mutants(module: str) -> Iterator[Mutant]:
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator

    source = (PACKAGE / module).read_text(encoding="utf-8")
    places, nodes = excluded(source), list(ast_nodes(get_ast(source)))
    for name in OPERATORS:
        operator = get_operator(f"core/{name}")()
        found = (position for node in nodes for position in operator.mutation_positions(node))
        for occurrence, (start, _) in enumerate(found):
            if not any(low <= start < high for low, high in places):
                yield Mutant(module, name, occurrence, start[0])


def mutated(mutant: Mutant) -> str:
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    source = (PACKAGE / mutant.module).read_text(encoding="utf-8")
    return mutate_code(source, get_operator(f"core/{mutant.operator}")(), mutant.occurrence)


class Mutated(SourceFileLoader, MetaPathFinder):
    """Finds one module, and compiles it from another source."""

    def __init__(self, module: str, source: str):
        super().__init__("kdiff." + module.removesuffix(".py").replace("/", "."), str(PACKAGE / module))
        self.source = source

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, name):
        return compile(self.source, self.path, "exec", dont_inherit=True)


class QuickestFirst:
    """A plugin of pytest: without a mutation it writes down how long each test takes, then it orders them by that."""

    def __init__(self, notes: Path, written: str | None):
        self.file = written and notes / written
        self.seconds = {}
        for file in () if written else notes.iterdir():
            self.seconds |= json.loads(file.read_text())

    def pytest_collection_modifyitems(self, items):
        items.sort(key=lambda item: self.seconds.get(item.nodeid, 0.0))

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration

    def pytest_sessionfinish(self):
        if self.file:
            self.file.write_text(json.dumps(self.seconds))


def start(files: list[str], mutation: tuple[str, str] | None, notes: Path) -> int:
    """Runs files of tests in a fork, with (module, mutated source) if there is one; returns the process id."""
    if child := os.fork():
        return child
    os.setpgid(0, 0)
    with tempfile.TemporaryFile() as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
    import pytest

    if mutation:
        sys.meta_path.insert(0, Mutated(*mutation))
    quickest = QuickestFirst(notes, None if mutation else Path(*files).name)
    options = ["-x", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    os._exit(pytest.main([*options, *files], plugins=[quickest]))


def run(tasks: list, notes: Path, jobs: int, limit: float) -> Iterator[tuple]:
    """(index, exit status or None if it ran out of time, seconds) of each task of `start`, as they end."""
    waiting, running = list(enumerate(tasks)), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            index, task = waiting.pop(0)
            running[start(*task, notes)] = (index, time.monotonic())
        time.sleep(0.05)
        for child, (index, begun) in list(running.items()):
            seconds = time.monotonic() - begun
            ended, status = os.waitpid(child, os.WNOHANG)
            if not ended and seconds > limit:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
            if ended or seconds > limit:
                del running[child]
                yield index, os.waitstatus_to_exitcode(status) if ended else None, seconds


def unmutated(files: list[str], notes: Path, jobs: int, limit: float) -> None:
    """Notes how long each test of these files takes. All must pass."""
    for index, status, seconds in run([([file], None) for file in files], notes, jobs, limit):
        print(f"  {Path(files[index]).name} takes {seconds:.0f} s", flush=True)
        if status not in (0, 5):  # 5: none of its tests runs here
            sys.exit(f"{files[index]} fails without a mutation (status {status})")


def shown(mutant: Mutant) -> str:
    """The place, and the line before and after."""
    before = (PACKAGE / mutant.module).read_text(encoding="utf-8").splitlines()
    after = mutated(mutant).splitlines()
    line = mutant.line - 1
    return f"kdiff/{mutant.module}:{mutant.line}\n  - {before[line].strip()}\n  + {after[line].strip()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "modules", nargs="*", help="such as times/grids.py, or a room, times; none: all the mathematics"
    )
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for one mutant; one that hangs is killed")
    parser.add_argument("--least", type=float, default=0.9, help="the share that must be killed")
    options = parser.parse_args()

    every = [mutant for module in modules(options.modules) for mutant in mutants(module)]
    drawn = random.Random(options.seed).sample(every, min(options.count, len(every)))
    print(f"{len(drawn)} of {len(every)} mutants")

    sys.path.insert(0, str(ROOT))
    # What is imported here is imported once; not kdiff, which is mutated.
    import keras  # noqa: F401
    import scipy.stats  # noqa: F401

    touched = sorted({mutant.module for mutant in drawn})
    if untested := [module for module in touched if not tests_of(module)]:
        sys.exit(f"No file of tests/ is named after {untested}")
    notes = Path(tempfile.mkdtemp(prefix="kdiff-mutation-"))
    survivors, how = drawn, (options.jobs, options.limit)
    for tests, whose in ((tests_of, "its module"), (tests_of_room, "its room")):
        files = {file for mutant in survivors for file in tests(mutant.module)}
        unmutated(sorted(file for file in files if not (notes / Path(file).name).exists()), notes, *how)
        left, tasks = [], [(tests(one.module), (one.module, mutated(one))) for one in survivors]
        for done, (index, status, seconds) in enumerate(run(tasks, notes, *how), 1):
            if status == 0:
                left.append(survivors[index])
                shares = f"{done - len(left)} of {done} are killed"
                print(f"survived the tests of {whose}, {seconds:.0f} s, {shares}: {shown(left[-1])}", flush=True)
        survivors = left
    killed = len(drawn) - len(survivors)
    print("\nSurvivors:\n" + "\n".join(map(shown, sorted(survivors))) if survivors else "")
    print(f"\n{killed} of {len(drawn)} killed: {killed / len(drawn):.1%}")
    sys.exit(killed < options.least * len(drawn))


if __name__ == "__main__":
    main()
