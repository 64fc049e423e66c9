"""experiments/bench.py: every section runs, and its JSON has what results/ needs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.rest             # pytest.ini says what that means

ROOT = Path(__file__).resolve().parent.parent


def test_bench_runs_on_a_cpu(tmp_path):
    """Every section, small. Errors were measured on the tensors that were timed."""
    target = tmp_path / "bench.json"
    command = [sys.executable, "-m", "experiments.bench", "--cpu", "--markdown", "--json"]
    subprocess.run([*command, str(target)], cwd=ROOT, check=True, timeout=120,
                   capture_output=True)
    out = json.loads(target.read_text())
    expected = {"command", "commit", "device", "torch", "triton", "cudnn", "date", "ceilings"}
    assert expected <= set(out)
    assert out["command"].startswith("python -m experiments.bench --cpu")
    sections = out["sections"]
    assert set(sections) == {"memory", "attention", "block", "rollout", "batch", "b200"}
    assert not any("failed" in section for section in sections.values())
    wan = sections["memory"]["wan1.3b"]
    assert wan["mla"] == 448
    assert wan["dense"] == 6144
    for point in sections["attention"]["points"]:
        for row in point["timing"].values():
            assert row["error"] < 1e-5
            assert row["low"] <= row["ms"] <= row["high"]
    for row in sections["rollout"].values():
        assert row["recompiles"] == 0
        assert row["graph_breaks"] == 0
        assert row["finite"]
