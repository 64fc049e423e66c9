"""The settings of tests/conftest.py hold here too (the same examples on every run, no deadline, one thread); a counterexample is made
small, but not explained: that takes hypothesis longer than it takes a student."""

import runpy
from pathlib import Path

from hypothesis import Phase, settings

runpy.run_path(str(Path(__file__).resolve().parent.parent / "tests/conftest.py"))
settings.register_profile("exercises", settings(), phases=(Phase.explicit, Phase.generate, Phase.shrink))
settings.load_profile("exercises")
