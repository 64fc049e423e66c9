"""Every exercise fails today, for the reason it states and for no other, and says so in a line.

An exercise is one file under exercises/: the task, a hole for the student, and tests. Most is
proved here without starting pytest for each. A hole announces itself (NotImplementedError with
the exercise's own words), and every test of its file reaches a hole before it could fail
otherwise. The bug of the last exercise is noticed by one assertion, in the exercise's own
words, while the other tests of that file pass. That right solutions pass cannot be shown here:
they are not in the repository.
"""

import ast
import configparser
import fnmatch
import importlib.util
import inspect
import re
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from lab import ROOT

FILES = sorted((ROOT / "exercises").glob("ex*.py"))
BUG = "ex8_bug"
SYMPTOM = "test_samples_of_a_perfect_model_are_spread_like_the_data"

each = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def collect(path: Path) -> dict:
    """The tests of an exercise by name, from a module that nobody else sees."""
    spec = importlib.util.spec_from_file_location(f"exercise_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {name: test for name, test in vars(module).items() if name.startswith("test_")}


def failure(test) -> Exception | None:
    """What a test raises, of a property's first counterexample (no shrinking)."""
    test = getattr(test, "hunt", test)
    assert not inspect.signature(test).parameters, \
        f"{test.__name__} needs a fixture, and cannot be called from here"
    try:
        test()
    except Exception as error:
        return error


def is_hole(node: ast.AST) -> bool:
    """A function that a student has to write: its body ends in raising NotImplementedError."""
    if not isinstance(node, ast.FunctionDef):
        return False
    last = node.body[-1]
    return isinstance(last, ast.Raise) and "NotImplementedError" in ast.unparse(last)


def holes(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {node.name for node in ast.walk(tree) if is_hole(node)}


def test_there_are_eight():
    names = [path.name for path in FILES]
    assert [name[:3] for name in names] == [f"ex{n}" for n in range(1, 9)], names


@each
def test_it_fails_today_for_the_stated_reason_and_only_for_it(path):
    errors = {name: failure(test) for name, test in collect(path).items()}
    assert errors, f"{path.name} has no test"
    if path.stem == BUG:
        assert_only_the_symptom(path, errors)
        return
    for name, error in errors.items():
        assert_reaches_a_hole(path, name, error)


def assert_only_the_symptom(path: Path, errors: dict) -> None:
    failed = {name for name, error in errors.items() if error}
    assert not holes(path) and len(errors) > 1 and failed == {SYMPTOM}, \
        f"{path.name}: failed are {failed}, should be {SYMPTOM} alone"
    error = errors[SYMPTOM]
    assert isinstance(error, AssertionError), repr(error)
    assert str(error).startswith("exercise 8: "), repr(error)


def assert_reaches_a_hole(path: Path, name: str, error: Exception | None) -> None:
    number = path.stem[2]
    assert isinstance(error, NotImplementedError), \
        f"{path.name}, {name}: {error!r}, but only what is not written yet may fail"
    assert re.match(rf"exercise {number}: `[\w.]+`, ", str(error)), \
        f"{path.name}, {name}: fails with {error}, not in its own words"
    last = traceback.extract_tb(error.__traceback__)[-1]
    assert last.filename == str(path) and last.name in holes(path), \
        f"{path.name}, {name}: fails in {last.name}, which is not a hole"


@pytest.mark.rest
def test_what_is_not_begun_ends_in_one_line_for_each_hole():
    """Its tests fail, and so does the run; but pages of traceback would say no more.

    In a process of its own. The holes are those that a test meets first.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    files = ["exercises/ex3_merged.py", f"exercises/{BUG}.py"]
    done = subprocess.run(command + files, cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    said = [line for line in lines if line.startswith("exercise ")]
    assert done.returncode == 1, f"exit status {done.returncode}: {done.stdout}{done.stderr}"
    begins = [" ".join(line.split()[:3]) for line in said]
    assert begins == ["exercise 3: `merge`,", "exercise 3: `factored_cost`,",
                      "exercise 3: `break_even`,", "exercise 8: the"], done.stdout
    assert re.match("3 passed, 5 to do in ", lines[-1]), done.stdout
    assert len(lines) <= len(said) + 6, f"that is more than a line each:\n{done.stdout}"


@each
def test_it_says_what_why_and_where_to_begin(path):
    number = path.stem[2]
    text = path.read_text()
    head = ast.get_docstring(ast.parse(text))
    assert head.startswith(f"Exercise {number}: "), head[:40]
    command = f"python -m pytest exercises/{path.name} "
    own_words = f'"exercise {number}: ..."'
    for part in ("Read first:", "Hint:", command, "today: ", own_words):
        assert part in head, f"{path.name}: its docstring lacks {part!r}"
    for mark in ("# ---- yours to ", "# ---- the tests "):
        assert text.count(mark) == 1, f"{path.name}: where does the student write?"


@each
def test_it_sends_the_reader_to_what_exists(path):
    head = ast.get_docstring(ast.parse(path.read_text()))
    named = re.search(r"Read first:(.*?)\nHint:", head, re.DOTALL)[1]
    source = "".join(file.read_text() for file in ROOT.glob("*.py"))
    complaint = f"{path.name} sends the reader to {{}}, which does not exist"
    for name in re.findall(r"\b\w+\.py\b", named):
        assert (ROOT / name).exists(), complaint.format(name)
    for name in re.findall(r"`([\w.]+)`", named):
        last = name.split(".")[-1]
        assert re.search(rf"(def|class) {last}\b", source), complaint.format(name)
    for tag in re.findall(r"\(([A-Z]?\d+)\)", named):
        assert f"({tag})" in source, complaint.format(f"equation ({tag})")


def test_plain_pytest_leaves_them_alone():
    """Red tests that are meant to be red must not stand among those that prove something."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "pytest.ini")
    assert settings["pytest"]["testpaths"].split() == ["tests"]
    patterns = settings["pytest"].get("python_files", "test_*.py *_test.py").split()
    for path in FILES:
        taken = [pattern for pattern in patterns if fnmatch.fnmatch(path.name, pattern)]
        assert not taken, f"{path.name} would be collected by {taken}"
