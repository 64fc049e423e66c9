"""experiments/bench.py: every section runs, and its JSON has what results/ needs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments import fast_path
from experiments.bench import SECTIONS, main

pytestmark = pytest.mark.rest             # pytest.ini says what that means

ROOT = Path(__file__).resolve().parent.parent
FLASH = "dense FA4, K V ready"


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
    assert set(sections) == set(SECTIONS)
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


def point(L, **times):
    timing = {name.replace("FA4", FLASH): {"ms": ms} for name, ms in times.items()}
    return dict(L=L, T=32760, timing=timing, auto_over_best=1.0)


def test_targets_are_judged_by_the_figures():
    """Met, missed, or not measured. The fastest dense is the fastest of all rows of that name."""
    points = [point(4680, fused=1.6, FA4=1.5), point(2340, fused=1.0, FA4=0.7),
              point(64, fused=0.5, FA4=2.0, dense_cuDNN=0.9)]
    rollout = {"mla": dict(frames_per_s=1.1, recompiles=0, graph_breaks=0, chunks=10,
                           chunks_of_2_passes=190),
               "dense": dict(frames_per_s=0.9), "dense, keys stored rotated": dict(frames_per_s=1.0),
               "dense, 10 frames": dict(frames_per_s=9.0)}
    sections = {"attention": {"points": points}, "rollout": rollout,
                "up": {"taken": "product", "timing": {"product": {"ms": 0.12}}},
                "lifetime": {"mib_growth": 0.0}}
    found = {}
    for row in fast_path.judge(sections):
        found[row["target"]] = row["verdict"], row["measured"]
    assert len(found) == len(fast_path.TARGETS) == 17

    def of(word):
        name, *_ = [name for name in found if word in name]
        return found[name]

    assert of("L = 4680:")[0] == "missed"                  # 1.067 against 1.06
    assert of("L = 2340:")[0] == "missed"
    assert of("L = 1024:") == ("not measured", None)
    assert of("L = 64:") == ("met", 1.8)
    assert of("up-projection") == ("missed", 0.12)
    assert of("frames/s") == ("met", 1.1)                  # the other window does not count
    assert of("block:") == ("not measured", None)
    assert of("recompilations") == ("met", 0)
    assert of("watched") == ("met", 200)
    assert of("rollouts") == ("met", 0.0)


def test_a_second_call_adds_to_the_first(tmp_path, monkeypatch):
    """Of the same commit and card; anything else is refused."""
    target = str(tmp_path / "bench.json")
    some = ["--cpu", "--json", target]
    first = main([*some, "--only", "memory"])["command"]
    out = main([*some, "--add", "--only", "b200"])
    assert list(out["sections"]) == ["memory", "b200"]
    assert out["command"] == f"{first}; {first}", "both, and in a test they are the runner's"
    assert json.loads(Path(target).read_text()) == out
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    with pytest.raises(SystemExit, match="of another torch"):
        main([*some, "--add", "--only", "b200"])
    with pytest.raises(SystemExit, match="needs --json"):
        main(["--cpu", "--add", "--only", "b200"])


def test_a_way_holds_for_a_call_alone():
    before = fast_path.routes.UP
    other = next(way for way in fast_path.routes.UPS if way != before)
    taken = fast_path.by_way(other, lambda: fast_path.routes.UP)
    assert taken() == other
    assert fast_path.routes.UP == before
