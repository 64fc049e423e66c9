"""Every exercise fails today, for the reason it states and for no other; and `pytest` alone does not run them.

An exercise is one file under exercises/: the task, a hole for the student, and tests. Proved here, without starting pytest anew for each:
a hole announces itself (NotImplementedError with the exercise's own words) and every test of its file reaches a hole before it could fail
otherwise; the bug of the last exercise is noticed by one assertion, in the exercise's own words, while the other tests of that file pass.
That right solutions pass cannot be shown here: they are not in the repository.
"""

import ast
import configparser
import fnmatch
import importlib.util
import inspect
import re
import traceback

import pytest

from lab import ROOT

FILES = sorted((ROOT / "exercises").glob("ex*.py"))
BUG, SYMPTOM = "ex8_bug", "test_samples_of_a_perfect_model_are_spread_like_the_data"

each = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def collect(path) -> dict:
    """The tests of an exercise by name, from a module that nobody else sees."""
    spec = importlib.util.spec_from_file_location(f"exercise_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {name: test for name, test in vars(module).items() if name.startswith("test_")}


def failure(test) -> Exception | None:
    """What a test raises, of a property's first counterexample (no shrinking)."""
    test = getattr(test, "hunt", test)
    assert not inspect.signature(test).parameters, f"{test.__name__} needs a fixture, and cannot be called from here"
    try:
        test()
    except Exception as error:
        return error


def holes(path) -> set[str]:
    """Names of the functions that a student has to write: their body is a docstring and a raise."""
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)
            and isinstance(node.body[-1], ast.Raise) and "NotImplementedError" in ast.unparse(node.body[-1])}


def test_there_are_eight():
    assert [path.name[:3] for path in FILES] == [f"ex{n}" for n in range(1, 9)], [path.name for path in FILES]


@each
def test_it_fails_today_for_the_stated_reason_and_only_for_it(path):
    number, tests, mine = path.stem[2], collect(path), holes(path)
    errors = {name: failure(test) for name, test in tests.items()}
    if path.stem == BUG:
        failed = {name for name, error in errors.items() if error}
        assert not mine and len(tests) > 1 and failed == {SYMPTOM}, f"{path.name}: failed are {failed}, should be {SYMPTOM} alone"
        assert isinstance(errors[SYMPTOM], AssertionError) and str(errors[SYMPTOM]).startswith("exercise 8: "), repr(errors[SYMPTOM])
        return
    reached = set()
    for name, error in errors.items():
        assert isinstance(error, NotImplementedError), f"{path.name}, {name}: {error!r}, but only what is not written yet may fail"
        assert re.match(rf"exercise {number}: `[\w.]+`, ", str(error)), f"{path.name}, {name}: fails with {error}, not in its own words"
        last = traceback.extract_tb(error.__traceback__)[-1]
        assert last.filename == str(path) and last.name in mine, f"{path.name}, {name}: fails in {last.name}, which is not a hole"
        reached.add(last.name)
    assert reached, f"{path.name} has no test"


@each
def test_it_says_what_why_and_where_to_begin(path):
    text = path.read_text()
    head = ast.get_docstring(ast.parse(text))
    assert head.startswith(f"Exercise {path.stem[2]}: "), head[:40]
    for part in ("Read first:", "Hint:", f"python -m pytest exercises/{path.name} ", "today: ", f'"exercise {path.stem[2]}: ..."'):
        assert part in head, f"{path.name}: its docstring lacks {part!r}"
    assert text.count("# ---- yours to ") == text.count("# ---- the tests ") == 1, f"{path.name}: where does the student write?"
    named = re.search(r"Read first:(.*?)\nHint:", head, re.DOTALL)[1]
    for name in re.findall(r"\b\w+\.py\b", named):
        assert (ROOT / name).exists(), f"{path.name} sends the reader to {name}, which does not exist"
    source = "".join(file.read_text() for file in ROOT.glob("*.py"))
    for name in re.findall(r"`([\w.]+)`", named):
        assert re.search(rf"(def|class) {name.split('.')[-1]}\b", source), f"{path.name} sends the reader to {name}, which does not exist"
    for tag in re.findall(r"\(([A-Z]?\d+)\)", named):
        assert f"({tag})" in source, f"{path.name} sends the reader to equation ({tag}), which does not exist"


def test_plain_pytest_leaves_them_alone():
    """Red tests that are meant to be red must not stand among those that prove something."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "pytest.ini")
    patterns = settings["pytest"].get("python_files", "test_*.py *_test.py").split()
    assert settings["pytest"]["testpaths"].split() == ["tests"]
    assert not [path.name for path in FILES if any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns)]
