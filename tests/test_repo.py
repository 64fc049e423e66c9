"""The repository keeps its promises: every command, flag, path and figure of the README is looked up or run.

What cannot be checked by a program (is it clear? is it true?) is not here; what rots in silence is.
"""

import ast
import contextlib
import importlib
import io
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

import sample
import train

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SOURCES = [path for folder in ("", "experiments", "tests", "exercises") for path in sorted((ROOT / folder).glob("*.py"))]
# A file may import those that stand before it: bottom to top, as one reads.
ORDER = ["rope3d", "cache", "fused", "attention", "mla_video", "checkpoint", "compiled", "toy_data", "sample", "objectives", "parallel",
         "trainer", "train"]
COMMANDS = sorted({line.strip() for block in re.findall(r"^```\n(.*?)^```", README, re.M | re.S) for line in block.splitlines()
                   if re.match(r"(HYPOTHESIS\S+ )?(python|torchrun) ", line)}
                  | set(re.findall(r"`((?:python|torchrun) [^`]+)`", README)))


def results(name: str) -> dict:
    return json.loads((ROOT / "results" / name).read_text())


def program(command: str):
    """(the module that a command of the README starts, its arguments)."""
    words = [word for word in shlex.split(command) if not re.match(r"[A-Z_]+=", word)]
    words = words[1:] if words[0] == "python" else [word for word in words[1:] if not word.startswith("--nproc")]
    if words[0] == "-m":
        return words[1], words[2:]
    return words[0].removesuffix(".py").replace("/", "."), words[1:]


def test_there_are_commands_to_check():
    assert len(COMMANDS) > 12 and any(command.startswith("python train.py") for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_readmes_flags_exist(command):
    name, arguments = program(command)
    if name == "pytest":
        for path in (word for word in arguments if word.endswith(".py")):
            assert (ROOT / path).is_file(), f"README runs {path}, which does not exist"
        return
    path = ROOT / (name.replace(".", "/") + ".py")
    assert path.is_file(), f"README runs {path.name}, which does not exist"
    for flag in (word.split("=")[0] for word in arguments if word.startswith("--")):
        assert f'"{flag}"' in path.read_text(), f"README gives {path.name} the flag {flag}, which it does not know"


@pytest.mark.parametrize("command", [command for command in COMMANDS if program(command)[0] in ("sample", "train") and "torchrun" not in command])
def test_the_readmes_commands_run(command, tmp_path, monkeypatch):
    """At sizes for a test. Later arguments win, so the README's own are given first."""
    name, arguments = program(command)
    monkeypatch.chdir(tmp_path)
    small = ["--device=cpu", f"--out={tmp_path / 'out'}", "--evaluate=0"]
    if name == "sample":
        small += ["--frames=6", "--steps=1", f"--checkpoint={ROOT / 'checkpoints/toy.pt'}"]
    else:
        np.save("clips.npy", np.zeros((3, 16, 16, 16), dtype=np.uint8))
        small += ["--steps=1", "--batch=2"] + [f"--config={item}" for item in ("dim=32", "layers=1", "heads=2", "latent=8", "query_latent=16",
                                                                                "rope=6", "ffn=32")]
        before = {"cd": ["tf"], "dmd": ["score", "tf", "cd"]}.get(next((b for a, b in zip(arguments, arguments[1:]) if a == "--stage"), ""), [])
        for stage in before + ["tf"] * ("--resume" in arguments):
            with contextlib.redirect_stdout(io.StringIO()):
                train.main([f"--stage={stage}", *small])
    {"sample": sample, "train": train}[name].main(arguments + small)
    assert (tmp_path / "out" / "sample.gif").is_file()


def test_the_readmes_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), f"README links to {target}, which does not exist"
    listed = set(re.findall(r"^\|.*?\[([\w/]+\.py)\]", README, re.M)) | set(re.findall(r"\[(\w+\.py)\]\(\w+\.py\)", README))
    assert {f"{name}.py" for name in ORDER} <= listed, f"the reading order leaves out {({f'{name}.py' for name in ORDER} - listed)}"


def test_the_readmes_table_of_times_is_the_measured_one():
    points = {point["L"]: point["timing"] for point in results("bench_h100.json")["sections"]["attention"]["points"] if point["T"] == 32760}
    header = re.search(r"^\| query tokens L \|(.*)\|$", README, re.M)
    lengths = [int(cell) for cell in header.group(1).split("|")]
    rows = {"dense, cuDNN": "dense cuDNN, K V ready", "dense, flash": "dense flash, K V ready", "MLA, materialised": "materialised",
            "MLA, absorbed": "absorbed", "MLA, **fused** (what `auto` takes)": "fused"}
    for row, name in rows.items():
        cells = re.search(rf"^\| {re.escape(row)} \|(.*)\|$", README, re.M).group(1).split("|")
        for L, cell in zip(lengths, cells, strict=True):
            found = points[L][name]["ms"]
            assert abs(found - float(cell)) < 6e-4, f"README says {row} takes {cell} ms at L = {L}; results/bench_h100.json says {found:.4f}"


def test_the_readmes_other_figures_are_the_measured_ones():
    bench = results("bench_h100.json")["sections"]
    memory, block, rollout, batch = bench["memory"]["wan1.3b"], bench["block"], bench["rollout"], bench["batch"]
    tables = {name: results(f"train_{name}.json") for name in ("mla_cpu", "dense_cpu", "mla_h100", "dense_h100")}
    said = [
        f"| MLA: one latent of 192, one positional key of 32 | {memory['mla']} bytes (**{100 * memory['saved']:.1f} % less**)",
        f"five passes a chunk: MLA {block['MLA auto, compiled']['ms']:.1f} ms, dense {block['dense, compiled']['ms']:.1f} ms",
        f"MLA {rollout['mla']['frames_per_s']:.2f} latent frames/s, dense {rollout['dense']['frames_per_s']:.2f}",
        f"dense {batch['dense, in turns of 1 video']['videos']}; MLA {batch['mla, in turns of 1 video']['videos']}, tried on one layer only",
        *(f"| {table['training_seconds'] / 60:.1f} min | {100 * table['survival']['survival']:.0f} % |" for table in tables.values())]
    for stage, found in results("stages_cpu.json")["stages"].items():
        judged = found["survival"]
        said.append(f"| {found['training_seconds'] / 60:.1f} min | " + (f"{100 * judged['survival']:.0f} % |" if judged else "- |"))
    minute, clock = (results(name)["runs"][0]["stages"] for name in ("quality_cpu.json", "quality_clock_cpu.json"))
    for stage in ("cd", "dmd"):
        late = {name: sum(points[-10:]) / 10 for name, points in minute[stage]["curves"].items()}
        said.append(f"| `{stage}`, 4 passes | {100 * late['survival']:.0f} % | {100 * late['match']:.0f} % | {late['speed']:.2f} | "
                    f"{late['residual']:.1f} | {1000 * clock[stage]['seconds_per_chunk']:.0f} |")
    text = " ".join(README.split())
    for phrase in said:
        assert phrase in text, f"the results say: {phrase!r}; the README does not"
    mutants = importlib.import_module("test_mutants").MUTANTS
    assert f"| {len(mutants)} one-line breakages" in README, f"there are {len(mutants)} mutants"


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "results").glob("*.json")))
def test_every_result_says_where_it_comes_from(name):
    missing = {"command", "commit", "device", "versions"} - results(name).keys()
    assert not missing, f"results/{name} does not name its {missing}"
    assert not re.search(r"(?<![\w.])/(tmp|home|root|work)/", (ROOT / "results" / name).read_text()), "a result names a path of one machine"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short_enough_to_read(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 400, f"{path.name} has {len(lines)} lines: nobody reads that from top to bottom; move something out"


@pytest.mark.parametrize("name", ORDER)
def test_imports_go_upwards(name):
    """In the reading order no file needs one that comes later, so nothing is circular either."""
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names} \
        | {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    later = (modules & set(ORDER)) - set(ORDER[:ORDER.index(name)])
    assert not later, f"{name}.py imports {later}, which the reader has not met yet"
    assert {path.stem for path in ROOT.glob("*.py")} == set(ORDER), "a file at the top is missing in the reading order"
