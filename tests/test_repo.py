"""The repository keeps its promises: every command, flag, path, picture and figure of README.md
and RESULTS.md is looked up or run.

What cannot be checked by a program (is it clear? is it true?) is not here; what rots in silence
is. A number stands in a table that experiments/tables.py makes out of results/, or it is in
`said`, beside the code or the result that says the same.
"""

import ast
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

import cache as cache_module
import mla_video
import sample
import train
from attention import crossing, route_flops
from cache import RollingCache
from engine.checkpoint import load_model, save_model
from engine.judging import cache_line
from experiments import bench, paper, pictures, stamp, tables
from mla_video import PRESETS, VideoDiT, allowed
from toy_data import Recall, Shapes

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "RESULTS.md").read_text()
PAGES = {"README.md": README, "RESULTS.md": RESULTS}

# A file may import those that stand before it: bottom to top. What a student reads first needs
# nothing of the rest.
MODEL = ["rope3d", "cache", "attention", "mla_video"]
LEARNING = ["flow", "objectives"]
WORLDS = ["toy_data", "metrics"]
ENGINE = ["engine", *(f"engine.{stem}" for stem in (
    "code", "command_line", "convert", "homogeneous", "locks", "progress", "quantised",
    "flash4", "expand", "finish", "routes", "streaming", "switching", "parallel", "muon", "loader", "checkpoint",
    "video_files", "terminal", "own_words", "prompts",
    "digit_metrics", "passages", "judging", "about", "layouts", "pixel_values", "framing",
    "clip_files", "clips", "starts", "trainer", "normal", "wan", "wan_video",
    "latents", "latent_clips", "wan_training", "run_files"))]
COMMANDS = ["train", "sample"]
EXPERIMENTS = [f"experiments.{stem}" for stem in (
    "stamp", "measure", "rank", "verdicts", "spectrum_figure", "endurance", "fast_path", "bench",
    "spectrum", "quality", "eight_bits", "pictures", "captions", "starts", "switches",
    "wan_memory", "wan_speed", "convert", "worlds", "flicker", "failures", "normal",
    "memory_figure", "memory", "digit_pairs", "paper_models", "paper", "paper_verdicts", "paper_tables", "ship",
    "tables", "everything")]
BOOK = MODEL + LEARNING + WORLDS + ["fused"] + COMMANDS
ORDER = MODEL + LEARNING + WORLDS + ["fused"] + ENGINE + COMMANDS + EXPERIMENTS

SOURCES = []
for folder in ("", "engine", "experiments", "tests", "exercises"):
    SOURCES += sorted((ROOT / folder).glob("*.py"))


def results(name: str) -> dict:
    return json.loads((ROOT / "results" / name).read_text())


def without_tables(text: str) -> str:
    return re.sub(r"<!-- table: .*?<!-- end -->", "", text, flags=re.S)


def fenced(text: str, language: str = "") -> list[str]:
    """The code blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def without_fences(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def words_in_code(text: str) -> list[str]:
    """Whatever stands in `...`."""
    return re.findall(r"`([^`\n]+)`", without_fences(text))


def module_path(name: str) -> Path:
    path = ROOT / name.replace(".", "/")
    if path.is_dir():
        return path / "__init__.py"
    return path.with_suffix(".py")


# ---- commands --------------------------------------------------------------------------------

def commands(text: str) -> list[str]:
    """Commands that a page gives, in its blocks and in its sentences."""
    found = set()
    for block in fenced(text):
        for line in block.splitlines():
            found |= set(line.split(" && "))
    found |= set(words_in_code(text))
    return sorted(command for command in found if re.match(r"(python|torchrun) ", command))


def program(command: str) -> tuple[str, list[str]]:
    """(the module that a command starts, its arguments)."""
    words = shlex.split(command)[1:]
    if command.startswith("torchrun"):
        words = [word for word in words if not word.startswith("--nproc")]
    if words[0] == "-m":
        return words[1], words[2:]
    return words[0].removesuffix(".py").replace("/", "."), words[1:]


OF_README = commands(README)
OF_BOTH = sorted({*OF_README, *commands(RESULTS)})


def test_there_are_commands_to_check():
    assert len(OF_README) > 12
    started = {program(command)[0] for command in OF_BOTH}
    assert {"train", "sample", "pytest"} <= started
    for name in ("bench", "quality", "spectrum", "endurance", "pictures", "tables"):
        assert f"experiments.{name}" in started


@pytest.mark.parametrize("command", OF_BOTH)
def test_the_flags_exist(command):
    name, arguments = program(command)
    if name == "pytest":
        for word in arguments:
            if word.endswith(".py"):
                assert (ROOT / word).is_file(), f"{word} does not exist"
        return
    path = module_path(name)
    assert path.is_file(), f"{path.name} does not exist"
    for word in arguments:
        if word.startswith("--"):
            flag = word.split("=")[0].replace("--no-", "--")
            assert f'"{flag}"' in path.read_text(), f"{path.name} does not know {flag}"


@pytest.mark.rest
@pytest.mark.parametrize("command", [command for command in OF_README if re.match("python (sample|train)", command)])
def test_the_readmes_commands_run(command, tmp_path, monkeypatch):
    """At sizes for a test. Later arguments win, so the README's own are given first."""
    name, arguments = program(command)
    monkeypatch.chdir(tmp_path)
    small = ["--device=cpu", f"--out={tmp_path / 'out'}", "--evaluate=0"]
    if name == "sample":
        small += ["--frames=6", "--steps=1", f"--checkpoint={ROOT / 'checkpoints/toy.pt'}"]
        sample.main(arguments + small)
    else:
        np.save("clips.npy", np.zeros((2, 13, 16, 16), dtype=np.uint8))
        small += ["--steps=1", "--batch=2"]
        for size in ("dim=32", "layers=1", "heads=2", "latent=8", "query_latent=16", "rope=6", "ffn=32"):
            small.append(f"--config={size}")
        if "--resume" in arguments:
            train.main(small)
        train.main(arguments + small)
    assert (tmp_path / "out" / "sample.gif").is_file()


def test_ci_runs_what_the_readme_says():
    """The first block, the proof, and the rest; the proof leaves out what is marked `rest`."""
    script = (ROOT / ".ci/run").read_text()
    for command in ("python -m pytest", "python -m pytest -m rest"):
        assert f"`{command}`" in README
        assert f'"{command}"' in script
    assert '-m "not rest"' in (ROOT / "pytest.ini").read_text()
    assert "pip install -r requirements.txt && python sample.py" in fenced(README)[0]


# ---- experiments -----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def dense_checkpoint(tmp_path_factory):
    """A dense model that has learned nothing, for what wants to be shown one."""
    path = tmp_path_factory.mktemp("dense") / "model.pt"
    model = VideoDiT(replace(PRESETS["toy"], attention="dense"))
    save_model(path, model, stage="dmd", data="shapes")
    return path


def run_experiment(name: str, *words: str) -> None:
    importlib.import_module(f"experiments.{name}").main([*words])


def read(path: str) -> dict:
    return json.loads(Path(path).read_text())


def test_the_cache_bytes_are_measured_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_experiment("bench", "--only=memory", "--cpu", "--json=bench.json")
    measured = read("bench.json")["sections"]["memory"]
    assert measured == results("bench_h100.json")["sections"]["memory"]


@pytest.mark.rest
def test_the_experiments_run(tmp_path, monkeypatch, dense_checkpoint):
    """For seconds each (all of bench: test_bench.py; quality and spectrum train for
    minutes: here they read)."""
    monkeypatch.chdir(tmp_path)
    toy = ROOT / "checkpoints/toy.pt"
    run_experiment("endurance", "--frames=300", f"--checkpoint={toy}", "--json=endurance.json")
    assert read("endurance.json")["frames"] == 300
    run_experiment("pictures", "cache", "--out=cache.png")
    run_experiment("pictures", "hero", f"--mla={toy}", f"--dense={dense_checkpoint}", "--frames=24", "--out=hero.gif")
    models = read("hero.json")["models"]
    assert models["dense"]["cache_bytes"] > 10 * models["MLA"]["cache_bytes"]
    assert Image.open("hero.gif").n_frames == 12
    for name, words in {"quality": ["--redraw", "--json"], "spectrum": ["--redraw"]}.items():
        shutil.copy(ROOT / "results" / f"{name}.json", f"{name}.json")
        run_experiment(name, *words, f"{name}.json")
        assert Path(f"{name}.png").stat().st_size > 10_000
    run_experiment("tables", "attention", "rank")


# ---- names and links -------------------------------------------------------------------------

def test_the_names_exist():
    """Whatever stands in `...` and is a flag, a file or a name is one of this repository (out/
    is what its commands make)."""
    code = "\n".join(path.read_text() for path in SOURCES)
    for word in words_in_code(README) + words_in_code(RESULTS):
        if not word.startswith("torchrun"):
            for flag in re.findall(r"(?<!\S)--[a-z-]+", word):
                assert f'"{flag.replace("--no-", "--")}"' in code, f"no program here knows {flag}"
        if re.fullmatch(r"[\w/]+\.(py|pt|json|gif|png)", word) and not word.startswith("out/"):
            assert (ROOT / word).exists(), f"there is no {word}"
        elif re.fullmatch(r"[A-Za-z_]\w+(\.\w+)*", word):
            assert re.search(rf"\b{re.escape(word)}\b", code), f"{word} is nowhere in the code"


@pytest.mark.parametrize("page", PAGES)
def test_the_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)\)", PAGES[page])
    links += re.findall(r'src="([^"]+)"', PAGES[page])
    for target in links:
        assert target.startswith("https://") or (ROOT / target).exists(), f"{page} links to {target}"


def test_the_readme_leads_through_the_book_and_ends():
    lines = README.splitlines()
    assert len(lines) <= 170, "the README is for reading in one sitting"
    for line in without_fences(without_tables(README)).splitlines():
        if not re.match(r"[|<]", line):
            assert len(line) <= 115, f"too wide: {line}"
    places = [README.index(f"]({stem}.py)") for stem in MODEL + LEARNING + WORLDS]
    assert places == sorted(places), "the reading order is that of the imports"
    for stem in BOOK:
        assert f"]({stem}.py)" in README
    for path in (ROOT / "exercises").glob("ex*.py"):
        assert f"](exercises/{path.name})" in README


def test_the_layout_is_the_one_that_is_described():
    book = {path.stem for path in ROOT.glob("*.py")}
    engine = {f"engine.{path.stem}" for path in (ROOT / "engine").glob("*.py")}
    experiments = {f"experiments.{path.stem}" for path in (ROOT / "experiments").glob("*.py")}
    assert book == set(BOOK)
    assert engine - {"engine.__init__"} == set(ENGINE) - {"engine"}
    assert experiments == set(EXPERIMENTS)


@pytest.mark.parametrize("word", [
    "chunk", "pass", "commit", "latent frame", "velocity", "sigma", "sink", "window", "horizon", "row", "absorb",
    "materialise", "teacher forcing", "consistency distillation", "DMD", "critic", "real score", "guidance"])
def test_the_glossary_has(word):
    assert re.search(rf"\| {word} \| [^|]+ \|", README)


# ---- what the README shows, run --------------------------------------------------------------

def test_the_readmes_example_runs():
    (example,) = fenced(README, "python")
    torch.manual_seed(0)
    found = {}
    with torch.enable_grad():                              # the example turns it off, for all
        exec(example, found)
    assert found["y"].shape == (2, 48, 64)
    assert [list(part.shape) for part in found["rows"]] == [[2, 48, 16], [2, 48, 8]]
    assert found["cache"].frames().tolist() == [0, 13, 14]                 # sink and the last two
    for shape in ("[2, 48, 64]", "[2, 48, 16]", "[2, 48, 8]"):
        assert shape in example


def test_the_ring_that_is_drawn_is_the_caches():
    """Row by row: what a chunk sees at which index, and at which times."""
    drawn = re.findall(r"^ +((?:(?:\d+|-) +){11}\d+)$", cache_module.__doc__, flags=re.M)
    assert len(drawn) == 4
    cache = RollingCache(1, 1, (1, 1), tokens=1, chunk=3, window=6, sink=1, horizon=9)
    for row in drawn:
        numbers = [int(word) for word in row.replace("-", "").split()]
        kept = cache.frames().tolist()
        past_times, now = cache.positions()
        chunk = [cache.seen + i for i in range(3)]
        assert numbers == chunk + kept + past_times.tolist() + now.tolist()
        cache.commit([(torch.zeros(1, 3, 1), torch.zeros(1, 3, 1))])


def test_the_mask_that_is_drawn_is_the_models():
    """x where `allowed` says so; a window of the whole clip, and one frame of each chunk for
    all."""
    config = PRESETS["toy"]
    frame = torch.arange(3) * config.chunk
    frame = torch.cat((frame, frame))
    noisy = torch.arange(6) >= 3
    mask = allowed(frame[:, None], noisy[:, None], frame[None], noisy[None], config)
    drawn = re.findall(r"\d ((?: +[x.]){6})(?: |$)", mla_video.__doc__, flags=re.M)
    marks = [["x" if looks else "." for looks in row] for row in mask.tolist()]
    assert [row.split() for row in drawn] == marks


def test_the_readme_quotes_what_sample_prints():
    model, _ = load_model(ROOT / "checkpoints/toy.pt")
    line = cache_line(model, len(Shapes.prompts))
    assert line in README.splitlines(), f"sample.py prints {line!r}"


# ---- numbers ---------------------------------------------------------------------------------

@pytest.mark.parametrize("page", PAGES)
def test_the_tables_are_generated(page):
    made = tables.filled(page, PAGES[page])
    assert made == PAGES[page], "results/ has changed since: python -m experiments.tables --write"


def test_faster_means_at_every_measured_point():
    """A crossing between two points is not claimed, nor a win behind a loss."""
    def point(L, mla):
        return {"L": L, "timing": {"fused": {"ms": mla}, "dense": {"ms": 1.0}}}

    wins = [point(16, 0.5), point(64, 0.9)]
    assert tables.faster_up_to([*wins, point(1024, 1.1)]) == 64
    assert tables.faster_up_to([point(1024, 0.8), point(512, 1.1), *wins]) == 64
    assert tables.faster_up_to([point(16, 1.0), *wins[1:]]) == 0


def names_and_versions() -> dict[str, bool]:
    """Numbers that are names."""
    versions = (ROOT / "requirements.txt").read_text()
    return {
        "2405.04434": True,                                # DeepSeek-V2
        "2506.08009": True,                                # Self-Forcing
        "3.10": 'python_version < "3.11"' in versions,
        "3.13": True,                                      # the newest Python that was tried
    }


def numbers_of_the_paper() -> dict[str, bool]:
    wan = PRESETS["wan1.3b"]
    head = wan.dim // wan.heads
    N = head - wan.rope
    queries = wan.chunk * wan.tokens
    keys = wan.window * wan.tokens
    sizes = dict(H=wan.heads, N=N, R=wan.rope, V=head, C=wan.latent)
    absorbed = route_flops("absorbed", queries, keys, **sizes)
    materialised = route_flops("materialised", queries, keys, **sizes)
    saved = results("bench_h100.json")["sections"]["memory"]["wan1.3b"]["saved"]
    return {
        "192": wan.latent == 192,
        "96": N == 96,
        "128": head == 128,
        "4680": queries == 4680,
        "269": round(crossing(N, head, wan.latent)) == 269,
        "1.57": round(absorbed / materialised, 2) == 1.57,
        "92.7 %": round(100 * saved, 1) == 92.7,
    }


def numbers_of_the_toy() -> dict[str, bool]:
    toy = PRESETS["toy"]
    bytes_of = {}
    with torch.device("meta"):
        for attention in ("mla", "dense"):
            model = VideoDiT(replace(toy, attention=attention))
            bytes_of[attention] = model.make_cache(len(Shapes.prompts)).nbytes
        parameters = sum(weight.numel() for weight in VideoDiT(toy).parameters())
    saved = 1 - bytes_of["mla"] / bytes_of["dense"]
    metrics = (ROOT / "metrics.py").read_text()
    return {
        "12": toy.frames == 12,
        "16": toy.height == toy.width == 16,
        "1.4": round(parameters / 1e6, 1) == 1.4,
        "276,480": bytes_of["mla"] == 276_480,
        "2,949,120": bytes_of["dense"] == 2_949_120,
        "90.6 %": round(100 * saved, 1) == 90.6,
        "120": '"--frames", type=int, default=120' in (ROOT / "sample.py").read_text(),
        "48": '"48: fast blue square"' in README,
        "0.5": "0.5 * " in metrics,
        "1.5": "1.5 * " in metrics,
        "64": paper.HEAD == 64 == PRESETS["small"].dim // PRESETS["small"].heads,
    }


def numbers_over_seeds() -> dict[str, bool]:
    """What is found behind the longest curtain, and right after a dense model is cut."""
    found = results("memory.json")

    def runs(kind: str) -> list[dict]:
        made = [run for run in found["runs"] if run["kind"] == kind]
        assert len(made) == 3, "three seeds"
        return made

    def percent(kind: str, name: str) -> str:
        seen = [run["curtains"]["24"]["openings"][0][name] for run in runs(kind)]
        share = 100 * mean(seen)
        return f"{share:.0f} %"

    def bytes_of(kind: str) -> int:
        run, *_ = runs(kind)
        return run["cache_bytes"]

    def error(width: str, start: str) -> str:
        cut = f"{width}, data, {start}"
        seen = [cuts["cut"][cut]["error"] for cuts in results("convert.json")["found"]]
        assert len(seen) == 3, "three seeds"
        return f"{mean(seen):.3f}"

    small = bytes_of("dense") / bytes_of("mla")
    wide = bytes_of("wide") / bytes_of("mla")
    return {
        "15": 14 < results("train_mla_cpu.json")["training_seconds"] / 60 < 15,
        "24": Recall.LONGEST == 24,
        "36": found["frames"] == 36,
        "100 %": percent("mla", "colour") == "100 %",
        "99 %": percent("mla", "shape") == "99 %",
        "19 %": percent("dense", "colour") == "19 %" and 0.95 < small < 1.05,
        "32 %": percent("dense", "shape") == "32 %",
        "10.7": round(wide, 1) == 10.7,
        "0.077": error("E", "factors") == "0.077",
        "0.083": error("E/8", "factors") == "0.083",
        "0.201": error("E/8", "mean") == "0.201",
    }


def numbers_of_results() -> dict[str, bool]:
    hero = results("hero.json")
    mla = mean(tables.over_seeds("mla", "dmd", "residual"))
    dense = mean(tables.over_seeds("dense", "dmd", "residual"))
    made = hero["frames"] - hero["given"]
    return {
        "471": made == 471 and hero["given"] == 9 and hero["shown_every"] == 2,
        "1.3": mla < 1.3 < dense,
    }


def numbers_of_the_b200() -> dict[str, bool]:
    """Public figures, in TFLOP/s."""
    public = bench.B200
    wan = PRESETS["wan1.3b"]
    keys = wan.window * wan.tokens
    return {
        "1,670": public["cuDNN"] == 1.670e15,
        "1,613": public["FA4, paper"] == 1.613e15,
        "1,749": public["FA4, best"] == 1.749e15,
        "85 %": public["memory taken"] == 0.85,
        "32,760": keys == 32_760,
    }


def said() -> dict[str, bool]:
    """Every number that stands in the prose of both pages (single digits aside), and whether
    code and results say the same."""
    return {**names_and_versions(), **numbers_of_the_paper(), **numbers_of_the_toy(),
            **numbers_over_seeds(), **numbers_of_results(), **numbers_of_the_b200()}


def numbers(text: str) -> set[str]:
    """Those of the prose: without tables, pictures, commands, names, and the example, which is
    run."""
    text = without_tables(text)
    for block in fenced(text, "python"):
        text = text.replace(block, "")
    text = re.sub(r"^python.*$|`(python|torchrun) [^`]+`", "", text, flags=re.M)
    text = re.sub(r"\]\([^)]*\)|(src|width)=\S+|[Ww]an ?\d\.\d\w?|float\d\d|B200|H100|bf16|int8", "", text)
    found = re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?: %)?(?![\w])", text)
    return {number.rstrip(",") for number in found if len(number.rstrip(",")) > 1}


def test_the_other_numbers_are_true():
    found = numbers(README) | numbers(RESULTS)
    known = said()
    assert not (found - set(known)), f"`said` does not know where {found - set(known)} come from"
    assert not (set(known) - found), f"nobody says {set(known) - found} any more"
    wrong = [number for number, true in known.items() if not true]
    assert not wrong, f"not true any more: {wrong}"


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "results").glob("*.json")))
def test_every_result_says_where_it_comes_from(name):
    missing = {"command", "commit", "device", "versions"} - results(name).keys()
    assert not missing, f"results/{name} does not name its {missing}"
    text = (ROOT / "results" / name).read_text()
    assert not re.search(r"(?<![\w.])/(tmp|home|root|work)/", text), "it names a path of one machine"


# These were put together, or changed, by hand. A file that its command made again leaves the set.
BY_HAND = {"deterministic_h100.json", "quality.json",
           "toy.json", "worlds.json"}


def test_no_result_is_edited_by_hand():
    """Nothing of an earlier recipe or of a shared card either; the exceptions can only become
    fewer."""
    edited = set()
    for path in (ROOT / "results").glob("*.json"):
        text = path.read_text()
        if re.search(r"edited_by_hand|earlier recipe|shared (the|a) card", text):
            edited.add(path.name)
    assert not edited - BY_HAND, f"{edited - BY_HAND} are edited by hand: run their commands"
    assert not BY_HAND - edited, f"{BY_HAND - edited} are made by command now: leave the set"


# ---- pictures --------------------------------------------------------------------------------

def drawn_from(path: Path):
    """What a picture of results/ was drawn from, as it is today; None: from a trained model
    that is not here."""
    if path.stem == "cache":
        return pictures.layout()
    if not path.with_suffix(".json").exists():
        return None
    found = results(f"{path.stem}.json")
    part = {"spectrum": "found", "hero": "models"}.get(path.stem)
    return found[part] if part else found


PICTURES = sorted([*(ROOT / "results").glob("*.png"), *(ROOT / "results").glob("*.gif")])


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.name)
def test_no_picture_is_older_than_its_code(path):
    """By the stamp inside, of the drawing functions and of what they drew
    (experiments/stamp.py). Comments age nothing."""
    megabytes = path.stat().st_size / 1e6
    assert megabytes < 2, f"{path.name} takes {megabytes:.1f} MB: too long to load"
    if path.name == "toy.gif":                             # sample.py wrote it: see below
        return
    made = stamp.read_stamp(path)
    assert made, f"{path.name} does not say what drew it"
    module, functions, code, data = made
    drawers = [getattr(importlib.import_module(f"experiments.{module}"), function) for function in functions]
    assert stamp.code_hash(*drawers) == code, f"{path.name} was drawn by older code of {module}.py: draw it again"
    today = stamp.data_hash(drawn_from(path))
    assert today == data, f"{path.name} shows other results than the JSON of its name: draw it again"


def test_the_hero_compares_equals():
    """As its caption says: both models are distilled, and colours and shapes stay."""
    for model in results("hero.json")["models"].values():
        assert model["stage"] in ("cd", "dmd"), "draw it again, from two distilled models"
        assert model["survival"]["survival"] == model["survival"]["shape"] == 1, "the caption says too much"


def pixels(path: Path, frame: int) -> np.ndarray:
    image = Image.open(path)
    image.seek(frame)
    return np.asarray(image.convert("RGB"), dtype=int)


def test_the_toy_gif_is_what_sample_makes(tmp_path):
    """Its first frames, made again: the checkpoint, the sampler and the picture belong
    together."""
    sample.main(["--frames=12", f"--out={tmp_path}", "--device=cpu"])
    for frame in (0, 5, 11):
        shown = pixels(ROOT / "results/toy.gif", frame)
        made = pixels(tmp_path / "sample.gif", frame)
        off = np.abs(shown - made).max(-1) > 0
        assert off.mean() < 0.01, f"frame {frame} differs: python sample.py --out results/toy.gif"


# ---- comments --------------------------------------------------------------------------------

def solid(text: str) -> int:
    """Characters without white space."""
    return len("".join(text.split()))


def comments(text: str) -> str:
    """Comments and docstrings: what a reader's eyes pass over."""
    found = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            found.append(token.string)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            found.append(ast.get_source_segment(text, node.body[0]))
    return "".join(found)


def comment_share(names: list[str]) -> float:
    """Of all files of a kind together, as some carry a derivation and some do not."""
    texts = [module_path(name).read_text() for name in names]
    return sum(solid(comments(text)) for text in texts) / sum(solid(text) for text in texts)


def test_comments_are_where_the_ideas_are():
    """0.4 to 0.5 in the core, 0.2 to 0.3 in scripts."""
    core = comment_share(["rope3d", "cache", "mla_video"])
    programs = comment_share(COMMANDS + WORLDS + ENGINE + EXPERIMENTS)
    assert 0.4 <= core <= 0.5, f"{core:.3f}"
    assert 0.2 <= programs <= 0.3, f"{programs:.3f}"


# ---- imports ---------------------------------------------------------------------------------

def imported(name: str) -> set[str]:
    """Names of modules that a module imports, anywhere in it: "cache", "experiments.rank"."""
    names = set()
    for node in ast.walk(ast.parse(module_path(name).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("name", ORDER)
def test_imports_go_upwards(name):
    """No file needs one that comes later, so nothing is circular either; and what is read first
    needs no experiment and no test."""
    order = ORDER + [path.stem for path in (ROOT / "tests").glob("*.py")]
    later = set(order[order.index(name):])
    early = imported(name) & later
    assert not early, f"{name} imports {early}, which the reader has not met yet"


@pytest.mark.parametrize("name", MODEL)
def test_the_model_needs_torch_and_einops_alone(name):
    """So it can be lifted into another program file by file: no Triton, no engine."""
    allowed_ones = {"torch", "einops", *sys.stdlib_module_names, *MODEL}
    roots = {module.split(".")[0] for module in imported(name)}
    assert roots <= allowed_ones, f"{name} imports {roots - allowed_ones}"


@pytest.mark.parametrize("name", LEARNING + WORLDS)
def test_learning_and_worlds_need_no_engine(name):
    roots = {module.split(".")[0] for module in imported(name)}
    assert not roots & {"engine", "fused", "triton", *COMMANDS, "experiments"}


# Run in a process of its own. It imports one file after another, and prints what that said,
# changed, and pulled in.
IMPORTER = """
import contextlib, importlib, io, json, os, random, signal, sys, threading
import numpy, torch

root, names, heavy = json.loads(sys.argv[1])
sys.path.insert(0, root)


def state():
    return dict(
        dtype=str(torch.get_default_dtype()),
        precision=torch.get_float32_matmul_precision(),
        threads=torch.get_num_threads(),
        grad=torch.is_grad_enabled(),
        seed=torch.initial_seed(),
        torch=torch.get_rng_state().tolist(),
        numpy=str(numpy.random.get_state()),
        python=str(random.getstate()),
        cuda=torch.cuda.is_initialized(),
        exact=torch.are_deterministic_algorithms_enabled(),
        tf32=[torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32],
        benchmark=torch.backends.cudnn.benchmark,
        environ=dict(os.environ),
        signals=[str(signal.getsignal(number)) for number in (2, 15)],
        where=os.getcwd(),
        files=os.listdir("."),
        threading=threading.active_count(),
        path=list(sys.path))


found = {}
before = state()
for name in names:
    modules = set(sys.modules)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        importlib.import_module(name)
    after = state()
    new = {module.split(".")[0] for module in set(sys.modules) - modules}
    found[name] = dict(said=said.getvalue(), changed=[key for key in before if after[key] != before[key]],
                       pulled=sorted(new & set(heavy)))
    before = after
print(json.dumps(found))
"""


def test_importing_does_nothing(tmp_path):
    """Nothing is printed, written, seeded, set, or put on a GPU; and no file pulls in what it
    does not need (Triton: fused.py defines kernels; matplotlib, scikit-learn, PyAV: inside the
    functions that want them)."""
    heavy = ["triton", "matplotlib", "sklearn", "av", "hypothesis", "pytest"]
    given = json.dumps([str(ROOT), ORDER, heavy])
    done = subprocess.run([sys.executable, "-B", "-c", IMPORTER, given], cwd=tmp_path, capture_output=True, text=True, check=True)
    for name, seen in json.loads(done.stdout).items():
        assert not seen["said"], f"importing {name} says {seen['said']}"
        assert not seen["changed"], f"importing {name} changes {seen['changed']}"
        pulled = set(seen["pulled"])
        if name == "fused":
            pulled -= {"triton"}
        assert not pulled, f"importing {name} pulls in {pulled}"
