"""What all tests share: one thread, fixed examples, and `code`, the modules under test.

    pytest                                40 examples per property, the same ones on every
                                          machine and every run
    HYPOTHESIS_PROFILE=thorough pytest    1,000 examples per property
"""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

# Derandomised: what passes here passes there. No deadline: a slow machine is not a wrong one.
settings.register_profile(
    "quick", max_examples=40, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
settings.register_profile("thorough", settings.get_profile("quick"), max_examples=1000)

PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "quick")
settings.load_profile(PROFILE)

# A runner that was started in the background, or by nohup, ignores these signals, and its
# children would do so, too. The tests of Ctrl-C and of a closed terminal need them.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# These tensors are tiny: a second thread costs more than it brings. So it is for the programs
# that tests start, beside which another test is running.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_report_header(config):
    examples = settings().max_examples
    return f"hypothesis: profile {PROFILE!r}, {examples} examples per property"


@pytest.fixture(autouse=True)
def short_gifs(monkeypatch):
    """A training in a test ends with a GIF of one clip, not of ten: it would take longest."""
    from engine import run_files
    monkeypatch.setattr(run_files, "GIF_CLIPS", 1)


@pytest.fixture(scope="session")
def code():
    """The shipped modules. test_mutants.py calls the same tests with broken copies instead."""
    from lab import shipped
    return shipped()
