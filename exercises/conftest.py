"""The settings of tests/conftest.py hold here too: the same examples on every run, no deadline.

What is not begun yet fails in one line, the exercise's own ("exercise 1: ..."), once for each
hole, and not with a page of traceback for each test that meets it. A wrong answer fails as
usual. Its counterexample is made small, but not explained: that takes hypothesis longer than it
takes a student.
"""

import re
import runpy
from pathlib import Path

import pytest
from hypothesis import Phase, settings

HERE = Path(__file__).resolve().parent

runpy.run_path(str(HERE.parent / "tests/conftest.py"))
settings.register_profile(
    "exercises", settings(), phases=(Phase.explicit, Phase.generate, Phase.shrink))
settings.load_profile("exercises")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Note on the report of a failed test that it failed in an exercise's own words."""
    report = (yield).get_result()
    if call.excinfo is None:
        return
    message = str(call.excinfo.value).partition("\n")[0]
    if re.match(r"exercise \d: ", message):
        report.to_do = message


def pytest_report_teststatus(report):
    """Such a test has failed, and so has the run; but pytest prints no traceback for it."""
    if hasattr(report, "to_do"):
        return "to do", "t", "TO DO"


def pytest_terminal_summary(terminalreporter):
    reports = terminalreporter.getreports("to do")
    reports.sort(key=lambda report: report.location[:2])   # several processes mix them
    messages = dict.fromkeys(report.to_do for report in reports)       # each once, in order
    for message in messages:
        terminalreporter.write_line(message)
