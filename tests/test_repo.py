"""The repository keeps its promises: every command, flag, path and figure of the README is looked up or run.

What cannot be checked by a program (is it clear? is it true?) is not here; what rots in silence is. A number of the README is in a block
that experiments/tables.py makes out of results/, or it is in `said`, beside the code or the result that says the same.
"""

import ast
import contextlib
import importlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import tokenize
from dataclasses import replace
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from attention import crossing, route_flops
from checkpoint import load_model, save_model
from experiments import pictures, stamp, tables
from mla_video import PRESETS, VideoDiT
from trainer import Recipe

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SOURCES = [path for folder in ("", "experiments", "tests", "exercises") for path in sorted((ROOT / folder).glob("*.py"))]
# A file may import those that stand before it: bottom to top.
ORDER = ["rope3d", "cache", "fused", "attention", "mla_video", "checkpoint", "compiled", "toy_data", "sample", "objectives", "parallel",
         "trainer", "train"]
EXPERIMENTS = ["stamp", "measure", "rank", "endurance", "bench", "spectrum", "quality", "pictures", "tables"]
STARTED = r"(?:HYPOTHESIS\S+ )?(?:python|torchrun) .*"
LINES = [part.strip() for block in re.findall(r"^```\n(.*?)^```", README, re.M | re.S) for line in block.splitlines()
         for part in line.split(" && ")]
COMMANDS = sorted({line for line in LINES if re.fullmatch(STARTED, line)} | set(re.findall(rf"`({STARTED[:-2]}[^`]+)`", README)))


def results(name: str) -> dict:
    return json.loads((ROOT / "results" / name).read_text())


def program(command: str):
    """(the module that a command of the README starts, its arguments)."""
    words = [word for word in shlex.split(command) if not re.match(r"[A-Z_]+=", word)]
    words = words[1:] if words[0] == "python" else [word for word in words[1:] if not word.startswith("--nproc")]
    if words[0] == "-m":
        return words[1], words[2:]
    return words[0].removesuffix(".py").replace("/", "."), words[1:]


# ---- commands -------------------------------------------------------------------------------------------------------

def test_there_are_commands_to_check():
    assert len(COMMANDS) > 16 and {"train", "sample", "pytest"} | {f"experiments.{name}" for name in (
        "bench", "quality", "spectrum", "endurance", "pictures", "tables")} <= {program(command)[0] for command in COMMANDS}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_readmes_flags_exist(command):
    name, arguments = program(command)
    if name == "pytest":
        for path in (word for word in arguments if word.endswith(".py")):
            assert (ROOT / path).is_file(), f"README runs {path}, which does not exist"
        return
    path = ROOT / (name.replace(".", "/") + ".py")
    assert path.is_file(), f"README runs {path.name}, which does not exist"
    for flag in (word.split("=")[0].replace("--no-", "--") for word in arguments if word.startswith("--")):
        assert f'"{flag}"' in path.read_text(), f"README gives {path.name} the flag {flag}, which it does not know"


@pytest.mark.parametrize("command", [command for command in COMMANDS if re.match("python (sample|train)", command)])
def test_the_readmes_commands_run(command, tmp_path, monkeypatch):
    """At sizes for a test. Later arguments win, so the README's own are given first."""
    name, arguments = program(command)
    monkeypatch.chdir(tmp_path)
    small = ["--device=cpu", f"--out={tmp_path / 'out'}", "--evaluate=0"]
    if name == "sample":
        small += ["--frames=6", "--steps=1", f"--checkpoint={ROOT / 'checkpoints/toy.pt'}"]
    else:
        np.save("clips.npy", np.zeros((3, 16, 16, 16), dtype=np.uint8))
        small += ["--steps=1", "--batch=2"] + [f"--config={item}" for item in (
            "dim=32", "layers=1", "heads=2", "latent=8", "query_latent=16", "rope=6", "ffn=32")]
        if "--resume" in arguments:
            train.main(small)
    {"sample": sample, "train": train}[name].main(arguments + small)
    assert (tmp_path / "out" / "sample.gif").is_file()


@pytest.fixture(scope="module")
def dense_checkpoint(tmp_path_factory):
    """A dense model that has learned nothing, for what wants to be shown one."""
    path = tmp_path_factory.mktemp("dense") / "model.pt"
    save_model(path, VideoDiT(replace(PRESETS["toy"], attention="dense")), stage="dmd", data="shapes")
    return path


def test_the_experiments_run(tmp_path, monkeypatch, dense_checkpoint):
    """For seconds each (all of bench: test_fast_path.py; quality and spectrum train for minutes: here they read)."""
    def run(name, *words):
        importlib.import_module(f"experiments.{name}").main([*words])

    monkeypatch.chdir(tmp_path)
    toy = ROOT / "checkpoints/toy.pt"
    run("bench", "--only=memory", "--cpu", "--json=bench.json")
    assert json.loads(Path("bench.json").read_text())["sections"]["memory"] == results("bench_h100.json")["sections"]["memory"]
    run("endurance", "--frames=300", f"--checkpoint={toy}", "--json=endurance.json")
    assert json.loads(Path("endurance.json").read_text())["frames"] == 300
    run("pictures", "cache", "--out=cache.png")
    run("pictures", "hero", f"--mla={toy}", f"--dense={dense_checkpoint}", "--frames=24", "--out=hero.gif")
    made = json.loads(Path("hero.json").read_text())["models"]
    assert made["dense"]["cache_bytes"] > 10 * made["MLA"]["cache_bytes"] and Image.open("hero.gif").n_frames == 12
    for name, words in {"quality": ("--redraw", "--json"), "spectrum": ("--redraw",)}.items():
        source = f"{name}.json"
        shutil.copy(ROOT / "results" / source, source)
        run(name, *words, source)
        assert Path(source).with_suffix(".png").stat().st_size > 10_000
    run("tables", "bench", "rank")


def test_the_readmes_names_exist():
    """Whatever stands in `...` and is a flag, a file or a name is one of this repository (out/ is what its commands make)."""
    code = "\n".join(path.read_text() for path in SOURCES)
    for inline in re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", README, flags=re.M | re.S)):
        for flag in re.findall(r"(?<!\S)--[a-z-]+", inline) * (not inline.startswith("torchrun")):
            assert f'"{flag.replace("--no-", "--")}"' in code, f"no program here knows {flag}"
        if re.fullmatch(r"[\w/]+\.(py|pt|json|gif|png)", inline) and not inline.startswith("out/"):
            assert (ROOT / inline).exists(), f"the README names {inline}, which does not exist"
        elif re.fullmatch(r"[A-Za-z_]\w+(\.\w+)*", inline):
            assert re.search(rf"\b{re.escape(inline)}\b", code), f"the README names {inline}, which is nowhere in the code"


# ---- numbers --------------------------------------------------------------------------------------------------------

def test_the_readmes_tables_are_generated():
    assert tables.filled(README) == README, "results/ or a file has changed since: python -m experiments.tables --write"


def said() -> dict[str, bool]:
    """Every number that stands in the README's prose (single digits aside), and whether code and results say the same."""
    wan, toy, hero = PRESETS["wan1.3b"], PRESETS["toy"], results("hero.json")
    head, chunk, T = wan.dim // wan.heads, wan.chunk * wan.tokens, wan.window * wan.tokens
    sizes = dict(H=wan.heads, N=head - wan.rope, R=wan.rope, V=head, C=wan.latent)
    cost = {route: route_flops(route, chunk, T, **sizes) for route in ("absorbed", "materialised")}
    with torch.device("meta"):
        mine, dense = (VideoDiT(replace(toy, attention=kind)).make_cache(len(sample.PROMPTS)).nbytes for kind in ("mla", "dense"))
        parameters = sum(weight.numel() for weight in VideoDiT(toy).parameters())
    toy_seconds = sum(stage["training_seconds"] for stage in results("toy.json")["stages"].values())
    late_jerk = lambda kind: mean(tables.late(run, "dmd", "residual") for run in results("quality.json")["runs"] if run["attention"] == kind)
    endless, profiles = results("endurance.json"), (ROOT / "tests/conftest.py").read_text()
    return {
        "2605.30351": True, "2405.04434": True, "2506.08009": True,                    # names of papers
        "12": toy.frames == wan.heads == 12 and "last: int = 12" in (ROOT / "toy_data.py").read_text(),
        "471": hero["frames"] - hero["given"] == 471 and hero["given"] == 9 and hero["shown_every"] == 2,
        "120": '"--frames", type=int, default=120' in (ROOT / "sample.py").read_text(),
        "48": '"48: fast blue square"' in README,
        "276,480": mine == 276_480, "2,949,120": dense == 2_949_120, "90.6 %": round(100 * (1 - mine / dense), 1) == 90.6,
        "1,000": endless["frames"] > 1000 and "max_examples=1000" in profiles, "40": "max_examples=40" in profiles,
        "100,002": endless["frames"] == 100_002 and max(endless["time_against_a_young_video_by_tenth"]) < 1.01,
        "412": endless["memory_growth_kib"] == endless["peak_memory_growth_kib"] == 412,
        "100": results("kills.json")["good_restarts"] == 100,
        "192": wan.latent == 192, "32": wan.rope == 32, "96": head - wan.rope == 96, "128": head == 128,
        "269": round(crossing(sizes["N"], sizes["V"], sizes["C"])) == 269, "4680": chunk == 4680,
        "1.57": round(cost["absorbed"] / cost["materialised"], 2) == 1.57,
        "11": "(11)" in (ROOT / "attention.py").read_text(), "13": "(13)" in (ROOT / "attention.py").read_text(),
        "125": len(importlib.import_module("test_mutants").MUTANTS) == 125,
        "1.3": late_jerk("mla") < 1.3 < late_jerk("dense"),
        "0.5": "0.5 * SPEEDS" in (ROOT / "toy_data.py").read_text(), "1.5": "1.5 * SPEEDS" in (ROOT / "toy_data.py").read_text(),
        "16": toy.height == toy.width == 16, "1.4": round(parameters / 1e6, 1) == 1.4,
        "11.8": round(toy_seconds / 60, 1) == 11.8, "1200": round(toy.frames / Recipe.restart) == 1200,
        "14": True,                                        # billions of parameters of the paper's judge
    }


def test_the_readmes_other_numbers_are_true():
    text = re.sub(r"<!-- table: .*?<!-- end -->", "", README, flags=re.S)              # generated
    text = re.sub(rf"^python.*$|`{STARTED[:-2]}[^`]+`", "", text, flags=re.M)          # commands
    text = re.sub(r"\]\([^)]*\)|(src|width)=\S+|sm_\d+|[Ww]an ?\d\.\d\w?|uint8|float\d\d|#\S+", "", text)     # paths and names
    found = set(re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?: %)?(?![\w])", text))
    found = {number.rstrip(",") for number in found if len(number.rstrip(",")) > 1}
    known = said()
    assert not (found - set(known)), f"the README says {found - set(known)}, and `said` does not know where that comes from"
    assert not (set(known) - found), f"nobody says {set(known) - found} any more"
    assert not [number for number in known if not known[number]], f"not true any more: {[n for n in known if not known[n]]}"


def test_the_readme_quotes_what_sample_prints(capsys):
    line = sample.cache_line(load_model(ROOT / "checkpoints/toy.pt")[0], len(sample.PROMPTS))
    assert line in README.splitlines(), f"sample.py prints {line!r}"


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "results").glob("*.json")))
def test_every_result_says_where_it_comes_from(name):
    missing = {"command", "commit", "device", "versions"} - results(name).keys()
    assert not missing, f"results/{name} does not name its {missing}"
    assert not re.search(r"(?<![\w.])/(tmp|home|root|work)/", (ROOT / "results" / name).read_text()), "a result names a path of one machine"


# ---- pictures -------------------------------------------------------------------------------------------------------

def drawn_from(path: Path, functions: list[str]):
    """What a picture of results/ was drawn from, as it is today; None: from a trained model that is not here."""
    if path.stem == "cache":
        return pictures.layout()
    found = results(f"{path.stem}.json") if path.with_suffix(".json").exists() else None
    return found["found"] if path.stem == "spectrum" else found["models"] if path.stem == "hero" else found


@pytest.mark.parametrize("path", sorted([*(ROOT / "results").glob("*.png"), *(ROOT / "results").glob("*.gif")]), ids=lambda path: path.name)
def test_no_picture_is_older_than_its_code(path):
    """By the stamp inside, of the drawing functions and of what they drew (experiments/stamp.py). Comments age nothing."""
    assert path.stat().st_size < 2e6, f"{path.name} takes {path.stat().st_size / 1e6:.1f} MB: too long to load"
    if path.name == "toy.gif":                             # written by sample.py; the stronger test below is its own
        return
    made = stamp.read_stamp(path)
    assert made, f"{path.name} does not say what drew it"
    module, functions, code, data = made
    drawers = [getattr(importlib.import_module(f"experiments.{module}"), function) for function in functions]
    assert stamp.code_hash(*drawers) == code, f"{path.name} was drawn by older {', '.join(functions)} of {module}.py: draw it again"
    today = drawn_from(path, functions)
    assert stamp.data_hash(today) == data, f"{path.name} shows other results than the JSON of its name: draw it again"


def test_the_hero_compares_equals():
    """As its caption says: four passes a chunk, so both models are distilled, and the subjects stay what they are."""
    found = results("hero.json")
    assert {model["stage"] for model in found["models"].values()} <= {"cd", "dmd"}, "draw it again, from two distilled models"
    assert all(model["survival"][key] == 1 for model in found["models"].values() for key in ("survival", "shape")), "the caption says too much"


def test_the_toy_gif_is_what_sample_makes(tmp_path):
    """Its first frames, made again: the checkpoint, the sampler and the picture belong together."""
    sample.main(["--frames=12", f"--out={tmp_path}", "--device=cpu"])
    for frame in (0, 5, 11):
        shown, made = (Image.open(path) for path in (ROOT / "results/toy.gif", tmp_path / "sample.gif"))
        shown.seek(frame), made.seek(frame)
        off = (np.asarray(shown.convert("RGB"), dtype=int) - np.asarray(made.convert("RGB"))).__abs__().max(-1) > 0
        assert off.mean() < 0.01, f"frame {frame}: {100 * off.mean():.1f} % of the pixels differ: python sample.py --out results/toy.gif"


# ---- links and files ------------------------------------------------------------------------------------------------

def test_the_readme_leads_somewhere_and_ends():
    for target in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", README):
        target = "".join(target)
        assert target.startswith("https://") or (ROOT / target).exists(), f"README links to {target}, which does not exist"
    assert {name for name, _, _ in tables.READING} == set(ORDER) == {path.stem for path in ROOT.glob("*.py")}, "a file misses in an order"
    assert {path.stem for path in (ROOT / "experiments").glob("*.py")} == set(EXPERIMENTS)
    assert all(f"](exercises/{path.name})" in README for path in (ROOT / "exercises").glob("ex*.py"))
    assert len(README.splitlines()) <= 250, "the README is for reading in one sitting"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short_enough_to_read(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 400, f"{path.name} has {len(lines)} lines: nobody reads that from top to bottom; move something out"
    wide = [i + 1 for i, line in enumerate(lines) if len(line) > 142 and path.parent.name != "tests"]
    assert not wide, f"{path.name}: lines {wide} are wider than a window"


def comment_share(names) -> float:
    """Characters of comments and docstrings over all characters, white space aside: what a reader's eyes pass over."""
    said = whole = 0
    for name in names:
        text = (ROOT / name).read_text()
        parts = [token.string for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type == tokenize.COMMENT]
        parts += [ast.get_source_segment(text, node.body[0]) for node in ast.walk(ast.parse(text))
                  if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node)]
        said, whole = said + len("".join("".join(parts).split())), whole + len("".join(text.split()))
    return said / whole


def test_comments_are_where_the_ideas_are():
    """STYLE: 0.4 to 0.5 in the core, 0.2 to 0.3 in scripts; of all files of a kind together, as some carry a derivation and some do not."""
    core, programs = ("rope3d.py", "cache.py", "mla_video.py"), (
        "sample.py", "train.py", "trainer.py", "toy_data.py", "checkpoint.py", "compiled.py", "parallel.py",
        *(f"experiments/{name}.py" for name in EXPERIMENTS))
    assert 0.4 <= comment_share(core) <= 0.5, f"{comment_share(core):.3f}"
    assert 0.2 <= comment_share(programs) <= 0.3, f"{comment_share(programs):.3f}"


# ---- imports --------------------------------------------------------------------------------------------------------

def imported(path: Path) -> set[str]:
    """Names of modules that a file imports, anywhere in it: "cache", "experiments.rank"."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("name", ORDER + [f"experiments.{name}" for name in EXPERIMENTS])
def test_imports_go_upwards(name):
    """No file needs one that comes later, so nothing is circular either; and what is read first needs no experiment and no test."""
    order = ORDER + [f"experiments.{name}" for name in EXPERIMENTS] + [path.stem for path in (ROOT / "tests").glob("*.py")]
    later = (imported(ROOT / (name.replace(".", "/") + ".py")) & set(order)) - set(order[:order.index(name)])
    assert not later, f"{name}.py imports {later}, which the reader has not met yet"


def test_importing_does_nothing(tmp_path):
    """In a process of its own, one file after another: nothing is printed, written, seeded, set, or put on a GPU; and no file pulls in
    what it does not need (Triton: fused.py defines kernels; matplotlib, scikit-learn, PyAV: inside the functions that want them)."""
    program = f"""
import contextlib, importlib, io, json, os, random, signal, sys, threading
import numpy, torch
sys.path.insert(0, {str(ROOT)!r})
heavy = {{"triton", "matplotlib", "sklearn", "av", "hypothesis", "pytest"}}
def state():
    return dict(dtype=str(torch.get_default_dtype()), precision=torch.get_float32_matmul_precision(), threads=torch.get_num_threads(),
                grad=torch.is_grad_enabled(), seed=torch.initial_seed(), torch=torch.get_rng_state().tolist(),
                numpy=str(numpy.random.get_state()), python=str(random.getstate()), cuda=torch.cuda.is_initialized(), exact=torch.are_deterministic_algorithms_enabled(),
                tf32=[torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark],
                environ=dict(os.environ), signals=[str(signal.getsignal(n)) for n in (2, 15)], where=os.getcwd(), files=os.listdir("."),
                threading=threading.active_count(), path=list(sys.path))
before, found = state(), {{}}
for name in {ORDER + [f"experiments.{name}" for name in EXPERIMENTS]!r}:
    modules, said = set(sys.modules), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        importlib.import_module(name)
    after = state()
    found[name] = dict(said=said.getvalue(), changed=[key for key in before if after[key] != before[key]],
                       pulled=sorted({{module.split(".")[0] for module in set(sys.modules) - modules}} & heavy))
    before = after
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-B", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    for name, seen in json.loads(done.stdout).items():
        allowed = [["triton"], []] if name == "fused" else [[]]
        assert not seen["said"] and not seen["changed"] and seen["pulled"] in allowed, f"importing {name}: {seen}"
