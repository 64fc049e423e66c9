"""The paper's choices (experiments/paper.py): which runs a table makes and by which commands, how
it goes on, what one judging finds; and that every verdict can come out three ways."""

import contextlib
import copy
import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from engine.checkpoint import load_model, read_checkpoint, save_model, write_atomically
from engine.clips import open_world
from engine.command_line import UserError
from engine.run_files import overrides
from experiments import normal, paper, paper_models, paper_tables, paper_verdicts, tables
from experiments.convert import random_start
from experiments.paper import FULL, QUICK, TABLES, Job, Tables
from experiments.paper_verdicts import CLAIMS
from experiments.verdicts import OPEN, REFUTED, REPRODUCED
from mla_video import PRESETS, VideoDiT
from toy_data import WORDS
from train import Recipe

ROOT = Path(__file__).parent.parent
SIZES = dict(dim=32, layers=1, heads=2, latent=4, query_latent=16, rope=6, ffn=32)
CONFIG = replace(PRESETS["toy"], **SIZES, words=len(WORDS))
FLAGS = [*(f"--config={name}={size}" for name, size in SIZES.items()), "--device=cpu",
         "--batch=2", "--evaluate=0"]


# ---- what is trained -------------------------------------------------------------------------

@pytest.mark.parametrize("plan", [FULL, QUICK])
def test_equal_folders_are_equal_trainings(plan):
    """Tables share runs by their folders, so no two runs may meet in one."""
    ways = {}
    for table in TABLES.values():
        waiting = [way for row in table(plan) for way in row.needs()]
        while waiting:
            way = waiting.pop()
            waiting += way.needs()
            assert ways.setdefault(way.name, way) == way
    names = [row.name for table in TABLES.values() for row in table(plan)]
    assert len(ways) > 30 and len(names) == 6 + 4 + 18 + 8 + 7


def test_a_quick_table_has_the_rows_of_the_full_one():
    for table in TABLES.values():
        assert [row.name for row in table(QUICK)] == [row.name for row in table(FULL)]
        for quick, full in zip(table(QUICK), table(FULL)):
            assert [model.label for model in quick.models] == \
                [model.label for model in full.models]


def test_the_papers_values_are_among_the_rows():
    widths = [dict(row.facts).get("C") for row in paper.latent(FULL)]
    assert widths == [4, 8, 16, 32, 64, None], "E / 32 to E / 2 of 128, and dense"
    splits = [dict(row.facts) for row in paper.split(FULL)]
    assert [row["R"] for row in splits] == [8, 16, 32, 48]
    assert all(row["N"] + row["R"] == 64 for row in splits)
    horizons = [model.horizon for row in paper.window(FULL) for model in row.models]
    assert {0, 7, 10, paper.NEVER} == set(horizons)
    for way in (model.way for row in paper.recipe(FULL) for model in row.models):
        assert way.start.name == "C16/cd", "all begin alike"
        overrides([word.removeprefix("--recipe=") for word in way.flags], Recipe())
    together = paper.recipe(FULL)[-1].models[0].way.flags
    assert overrides([word.removeprefix("--recipe=") for word in together], Recipe()) == \
        {"critic": 0.2, "guidance": 3.0, "optimiser": "adamw", "lr_muon": 8e-6,
         "lr_adamw": 4e-6, "ema": 0.97}


# ---- the commands ----------------------------------------------------------------------------

def a_table(tmp_path, name: str, plan=QUICK, **given) -> Tables:
    args = Namespace(device="cpu", results=tmp_path / "results", runs=tmp_path, minutes=1, jobs=2,
                     threads=1, seeds=1, flags="", quick=True, workers=0, anew=False)
    vars(args).update(given)
    return Tables(args, list(TABLES) if name == "all" else [name], plan)


@pytest.fixture
def processes(monkeypatch):
    """In the place of processes: the commands that were begun."""
    monkeypatch.setattr(normal, "subprocess", SimpleNamespace(Popen=Fake, STDOUT=-2))
    monkeypatch.setattr(normal, "PAUSE", 0.0)
    monkeypatch.setattr(Tables, "begins_from", lambda *_: [])
    monkeypatch.setattr(Fake, "begun", [])
    return Fake.begun


def words_of(work: Tables, way) -> list[str]:
    return work.command(Job(way, 0))


def test_a_chain_is_built_from_one_dense_model(tmp_path):
    work = a_table(tmp_path, "latent", FULL, flags="--compile")
    tf, cd, dmd = paper.paper_chain(FULL)
    judge = work.weights(Job(paper.dense_score(FULL), 0))
    assert str(judge).startswith(f"{tmp_path}/cpu/dense/score/seed_0_")
    words = words_of(work, tf)
    assert words[1:4] == ["train.py", "--stage=tf", f"--steps={FULL.tf}"]
    assert f"--from-dense={judge}" in words and "--config=latent=16" in words
    assert "--compile" in words
    assert f"--start={work.weights(Job(tf, 0))}" in words_of(work, cd)
    words = words_of(work, dmd)
    assert f"--start={work.weights(Job(cd, 0))}" in words
    assert f"--score={judge}" in words, "the dense model judges MLA"
    folder = work.folder(Job(dmd, 0))
    folder.mkdir(parents=True)
    (folder / "train.pt").touch()
    words = words_of(work, dmd)
    assert words[-1] == "--resume" and not any(word.startswith("--start") for word in words)
    assert [job.way.name for job in Job(dmd, 0).needs()] == ["C16/cd", "dense/score"]


def test_every_command_is_one_that_train_py_takes(tmp_path, monkeypatch):
    """Its parser, its recipe and its sizes: for each run of each table, as if it went on."""
    for name in TABLES:
        for plan in (FULL, QUICK):
            work = a_table(tmp_path, name, plan)
            for row in work.rows:
                for way in row.needs():
                    monkeypatch.setattr(Tables, "begins_from", lambda *_: [])
                    args = train.read_flags(train.make_parser(), words_of(work, way)[2:])
                    args.machine = "cuda"
                    config = train.make_config(args)
                    assert config.latent <= config.dim
                    recipe = train.make_recipe(args, way.stage, SimpleNamespace())
                    assert recipe.steps == way.steps


@pytest.fixture
def dense_file(tmp_path):
    return a_dense_file(tmp_path / "dense/tf.pt", "tf")


def a_dense_file(path: Path, stage: str) -> Path:
    """Like a dense model that a table has trained."""
    torch.manual_seed(0)
    config = replace(CONFIG, attention="dense")
    model = VideoDiT(config)
    with torch.no_grad():
        model.head.weight.normal_(std=0.1)
    fingerprint = open_world("shapes", 12, 16, 0, None, False).fingerprint
    save_model(path, model, data="shapes", fingerprint=fingerprint, stage=stage, steps=0, seed=0)
    return path


@pytest.mark.parametrize("table, row", [("window", 1), ("start", 0), ("start", 6)])
def test_what_is_made_for_a_run_starts_it(tmp_path, monkeypatch, table, row):
    """Dense weights with the window of the run; starts with the mean key, and at random."""
    monkeypatch.setattr(train, "report", lambda *rest: None)
    plan = replace(QUICK, dim=32, flags=tuple(FLAGS), tf=1, short=1)
    work = a_table(tmp_path, table, plan)
    way = work.rows[row].models[0].way
    if table == "window":
        way = way.start                                    # tf; what is judged first is cd
    dense_file = a_dense_file(work.weights(Job(way.dense, 0)), way.dense.stage)
    words = words_of(work, way)
    train.main(words[2:])
    folder = work.folder(Job(way, 0))
    model, about = load_model(folder / "tf.pt")
    assert about["steps"] == 1
    assert model.config.attention == "mla" and model.config.latent == 4
    if table == "window":
        assert (model.config.window, model.config.sink) == (10, 1)
        return
    start, _ = load_model(folder / "start.pt")
    dense, _ = load_model(dense_file)
    assert torch.equal(start.embed.weight, dense.embed.weight)
    if way.made == "mean":
        W_K = dense.blocks[0].attention.W_K.weight
        assert start.blocks[0].attention.W_KR.weight.shape[0] == 6 < len(W_K)
    else:
        other = random_start(dense, start.config, 1).blocks[0].attention.W_KR.weight
        assert not torch.equal(start.blocks[0].attention.W_KR.weight, other.half().float())


# ---- going on --------------------------------------------------------------------------------

class Fake:
    """In the place of a process: it writes at once what the process would, and has ended."""
    begun = []

    def __init__(self, words, **how):
        Fake.begun.append(words)
        self.returncode = 0
        out = Path(next(word for word in words if word.startswith("--out=")).removeprefix("--out="))
        if "train.py" not in words:
            models = {}
            for place, word in enumerate(words):
                if word == "--model":
                    models[words[place + 1]] = found_of(0.5)
            out.write_text(json.dumps({"models": models, "commit": "abc", "device": "a card"}))
            return
        named = dict(word.removeprefix("--").split("=", 1) for word in words if "=" in word)
        report = {"steps": int(named["steps"]), "training_seconds": 2.0}
        (out / f"report_{named['stage']}.json").write_text(json.dumps(report))

    def poll(self):
        return 0


def found_of(share: float) -> dict:
    """What is found of a model all of whose shares are this."""
    metrics = dict.fromkeys(("match", "survival", "speed", "speeds", "residual"), share)
    return {"place": share, "loss": share, "early": dict(metrics), "late": dict(metrics),
            "bytes_per_token": 96, "cache_bytes": 960, "seconds_per_chunk": 0.01}


def test_a_table_trains_judges_writes_and_goes_on(tmp_path, processes):
    work = a_table(tmp_path, "latent")
    work.work()
    assert work.judged() == (6, 6)
    assert len(processes) == 1 + 6 * 3 + 6, "the judge once, three stages a row, six judgings"
    found = json.loads(work.path("latent").read_text())
    assert [entry["row"] for entry in found["rows"]] == [row.name for row in work.rows]
    assert found["rows"][0]["training_seconds"] == {"tf": 2.0, "cd": 2.0, "dmd": 2.0}
    assert found["rows"][0]["commit"] == "abc", "of the judging, whoever wrote the file last"
    assert found["steps"] == {"score": [20], "tf": [20], "cd": [6], "dmd": [6]}
    head, rows = paper_tables.head_and_rows(found)
    assert len(rows) == 6 and all(len(row) == len(head) for row in rows)

    processes.clear()
    written = work.path("latent").stat().st_mtime_ns
    a_table(tmp_path, "latent").work()
    assert not processes, "all is known"
    assert work.path("latent").stat().st_mtime_ns == written, "nothing new, no new stamp"
    work = a_table(tmp_path, "recipe")
    work.work()
    assert work.judged() == (7, 7)
    assert len(processes) == 6 + 7, "ours is the row E / 8 of the other table"
    work.path("recipe").unlink()
    processes.clear()
    again = a_table(tmp_path, "recipe")
    again.work()
    assert again.judged() == (7, 7) and not processes, "the file was lost, the folders were not"


@pytest.mark.parametrize("change, trained", [
    ({"dmd": QUICK.dmd + 1}, 6), ({"videos": 8}, 0), ({"flags": (*QUICK.flags, "--batch=8")}, 19),
])
def test_nothing_of_another_plan_is_taken(tmp_path, processes, change, trained):
    """Neither from the files nor from the folders, and no more is done again than must be."""
    a_table(tmp_path, "latent").work()
    processes.clear()
    other = replace(QUICK, **change)
    assert a_table(tmp_path, "latent").judged() == (6, 6)
    with pytest.raises(UserError, match="6 rows of another plan.* --anew"):
        a_table(tmp_path, "latent", other)
    work = a_table(tmp_path, "latent", other, anew=True)
    assert work.judged() == (0, 6)
    work.work()
    assert work.judged() == (6, 6)
    assert sum("train.py" in words for words in processes) == trained
    assert len(processes) == trained + 6


def test_rows_of_other_code_are_judged_again(tmp_path, processes, monkeypatch):
    a_table(tmp_path, "latent").work()
    assert a_table(tmp_path, "latent", workers=2, jobs=9).judged() == (6, 6), "who draws is no plan"
    monkeypatch.setattr(paper, "code_of", lambda program: f"new {program.count('experiments')}")
    with pytest.raises(UserError, match="other code"):
        a_table(tmp_path, "latent")
    assert a_table(tmp_path, "latent", anew=True).judged() == (0, 6)


def test_fewer_seeds_lose_no_rows(tmp_path, processes):
    a_table(tmp_path, "split", seeds=2).work()
    assert len(processes) == 2 * (4 + 4)
    a_table(tmp_path, "split", seeds=1).work()
    work = a_table(tmp_path, "split", seeds=3, jobs=1, minutes=0)
    work.work()
    found = json.loads(work.path("split").read_text())
    assert found["whole"] and len(found["rows"]) == 8, "the third seed has not begun"
    work = a_table(tmp_path, "split", seeds=1)
    work.path("split").write_text(json.dumps({**found, "rows": found["rows"][:5]}))
    work = a_table(tmp_path, "split", seeds=1)
    work.work()
    found = json.loads(work.path("split").read_text())
    assert len(found["rows"]) == 5 + 1, "of the first seed a row was lacking"
    assert {entry["seed"] for entry in found["rows"]} == {0, 1}


def test_all_tables_together_train_once_what_they_share(tmp_path, processes):
    work = a_table(tmp_path, "all")
    work.work()
    rows = sum(len(table(QUICK)) for table in TABLES.values())
    assert work.judged() == (rows, rows)
    folders = [next(word for word in words if word.startswith("--out=")) for words in processes]
    assert len(folders) == len(set(folders)), "no training is made twice"
    for table in TABLES:
        found = json.loads(work.path(table).read_text())
        assert found["whole"] and len(found["rows"]) == len(TABLES[table](QUICK))
        processes.clear()
        alone = a_table(tmp_path, table)
        alone.work()
        assert alone.judged() == (len(alone.rows), len(alone.rows)) and not processes


def test_a_run_that_was_stopped_is_not_done(tmp_path):
    work = a_table(tmp_path, "latent")
    way = work.rows[0].models[0].way
    folder = work.folder(Job(way, 0))
    folder.mkdir(parents=True)
    (folder / "tf.pt").touch()
    work.look_for_weights(Job(way, 0))
    assert Job(way, 0) not in work.trained, "weights without a report"
    (folder / "report_tf.json").write_text('{"steps": 2')
    work.look_for_weights(Job(way, 0))
    assert Job(way, 0) not in work.trained, "a report of which half is there"
    (folder / "report_tf.json").write_text(json.dumps({"steps": way.steps}))
    work.look_for_weights(Job(way, 0))
    assert Job(way, 0) in work.trained
    row = Job(work.rows[0], 0)
    work.folder(row).mkdir(parents=True)
    for labels, done in ((["tf", "cd"], False), (["tf", "cd", "dmd"], True)):
        work.report(row).write_text(json.dumps({"models": dict.fromkeys(labels)}))
        work.look_for_weights(row)
        assert (row in work.trained) == done, "a judging that was stopped has some of its models"


# ---- one judging -----------------------------------------------------------------------------

def once():
    """Something like fast_products that can be entered once."""
    left = [contextlib.nullcontext()]
    return lambda: left.pop()


def test_one_judging_is_whole(tmp_path, monkeypatch):
    """Every number of a table is in its file, and a horizon of 7 is not one that never comes."""
    torch.manual_seed(1)
    model = VideoDiT(replace(CONFIG, window=7, sink=1))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    path = tmp_path / "tf.pt"
    save_model(path, model, data="shapes", stage="tf", steps=0, seed=0)
    out = tmp_path / "judged.json"
    flags = ["judge", "--weights", "a", str(path), "--weights", "b", str(path), "--videos=2",
             "--device=cpu", f"--out={out}"]
    paper.main([*flags, "--model", "a", "0", "24"])
    first = json.loads(out.read_text())["models"]["a"]
    monkeypatch.setattr(paper, "fast_products", once())
    paper.main([*flags, "--model", "a", "0", "24", "--model", "b", "7", "24"])
    models = json.loads(out.read_text())["models"]
    assert models["a"] == first, "what was there is not judged again"
    assert set(models) == {"a", "b"} and models["a"]["loss"] == models["b"]["loss"]
    assert models["a"]["bytes_per_token"] == 4 * (4 + 6)
    for column in sum(paper_tables.COLUMNS.values(), ()):
        assert column.path[-1] in (*models["a"], *models["a"]["late"])


@pytest.mark.parametrize("model, says", [
    (["a", "0", "11"], "11 frames are too few"), (["a", "none", "24"], "two whole numbers"),
    (["b", "0", "24"], "--weights b PATH"),
])
def test_a_judging_that_cannot_be_is_refused(tmp_path, capsys, model, says):
    with pytest.raises(SystemExit):
        paper.main(["judge", "--weights", "a", "a.pt", "--model", *model, "--device=cpu",
                    f"--out={tmp_path / 'judged.json'}"])
    assert says in capsys.readouterr().err


def test_quick_tables_are_no_results(capsys):
    with pytest.raises(SystemExit):
        paper.main(["latent", "--quick", "--results=results"])
    assert "tiny models" in capsys.readouterr().err


def test_means_leave_out_what_was_not_there():
    assert paper_models.plain([1.0, float("nan"), 3.0]) == 2.0
    assert paper_models.plain([float("nan")]) is None


# ---- what train.py takes for it --------------------------------------------------------------

@pytest.mark.parametrize("item, says", [
    ("warmth=3", "warmup"), ("guidance", "a number"), ("guidance=nan", "a number"),
    ("every=1.5", "a whole number"), ("optimiser=sgd", "muon, adamw"), ("critic=-1", "above 0"),
    ("steps=3", "lr_muon"), ("ema=2", "from 0 to 1"), ("every=0", "above 0"), ("shift=0", "above 0"),
    ("warmup=-1", "0 or more"), ("lr_adamw=inf", "above 0"),
])
def test_a_recipe_is_changed_by_values_that_it_has(item, says):
    with pytest.raises(UserError, match=says):
        overrides([item], Recipe())


def test_what_a_stage_has_no_use_for_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main([*FLAGS, "--stage=tf", "--recipe=shift=3", f"--out={tmp_path}", "--steps=1"])
    assert "stage tf has no use for it; dmd has" in capsys.readouterr().err


def test_a_dense_score_judges_mla_and_the_run_goes_on(tmp_path, dense_file, monkeypatch, capsys):
    """Its config is not that of the model; a train.pt that is older than both choices goes on as
    what it was."""
    monkeypatch.setattr(train, "report", lambda *rest: None)
    score = a_dense_file(tmp_path / "dense/score.pt", "score")
    train.main([*FLAGS, "--from-dense", str(dense_file), "--steps=1", f"--out={tmp_path}/tf"])
    run = [*FLAGS, "--stage=dmd", f"--start={tmp_path}/tf/tf.pt", f"--score={score}",
           "--recipe=restart=1", "--recipe=shift=3"]
    for name, steps in (("whole", 2), ("parts", 1)):
        train.main([*run, f"--steps={steps}", f"--out={tmp_path}/{name}"])
    resumed = ["--resume", f"--out={tmp_path}/parts", "--device=cpu", "--steps=2"]
    train.main([*resumed, "--recipe=shift=3.0", "--recipe=restart=1"])
    state = read_checkpoint(tmp_path / "parts/train.pt", set())
    assert state["asked"]["judge"] == "dense" and state["recipe"]["shift"] == 3.0
    assert any("W_K.weight" in name for name in state["critic"]["model"])
    assert state["config"]["attention"] == "mla"
    capsys.readouterr()
    with pytest.raises(SystemExit):
        train.main([*resumed, "--recipe=shift=4"])
    assert "--recipe" in capsys.readouterr().err
    for name in ("judge", "recipe"):
        del state["asked"][name]
    for name in ("shift", "optimiser"):
        del state["recipe"][name]
    state["config"].pop("horizon")
    old = run_of_its_own(tmp_path, state)
    with pytest.raises(SystemExit):                        # a dense critic, where it was MLA's
        train.main(["--resume", f"--out={old}", "--device=cpu", "--steps=3"])
    assert "not the state" in capsys.readouterr().err


def run_of_its_own(tmp_path, state: dict) -> Path:
    write_atomically(tmp_path / "old/train.pt", state)
    return tmp_path / "old"


def test_stage_dmd_takes_no_horizon_beyond_a_clip(tmp_path, dense_file, capsys):
    with pytest.raises(SystemExit):
        train.main([*FLAGS, "--stage=dmd", "--config=horizon=24", f"--out={tmp_path}/out",
                    "--steps=1"])
    assert "leave --config horizon away" in capsys.readouterr().err


# ---- the verdicts ----------------------------------------------------------------------------

def put(found: dict, row: str, model: str, path: str, value: float, spread: float = 0.002):
    """A number of every seed of the rows whose names begin so, a little apart."""
    *keys, last = path.split()
    for entry in found["rows"]:
        if entry["row"].startswith(row):
            part = entry["models"].setdefault(model, found_of(0.5))
            for key in keys:
                part = part[key]
            part[last] = value + spread * (entry["seed"] - 1)


def a_world() -> dict:
    """Tables in which every claim holds."""
    found = {}
    for table, rows in TABLES.items():
        entries = []
        for row in rows(FULL):
            for seed in range(3):
                models = {model.label: found_of(0.5) for model in row.models}
                entries.append({"row": row.name, "seed": seed, **dict(row.facts),
                                "models": models})
        found[table] = {"table": table, "rows": entries, "E": 128, "frames": 960,
                        "whole": True, "steps": {"tf": [6000]}}
    for row, model, path, value in GOOD["latent"]:
        put(found["latent"], row, model, path, value)
    for name in ("speed", "residual"):
        put(found["window"], "", "dmd", f"late {name}", 1.1)
    for table in ("split", "start", "window", "recipe"):
        for row, model, path, value in GOOD[table]:
            put(found[table], row, model, path, value)
    rows = {}
    for form, slow in (("materialised", 1.01), ("merged", 1.02)):
        for window, wobble in ((21, 0.0), (10, 0.001), (7, -0.001)):
            times = {"64": {"ms": 10.0}, "512": {"ms": 10 * (slow + wobble)}}
            rows[f"{form}, {window} frames"] = {"form": form, "by C": times}
    found["speed"] = {"sections": {"latent": {"rows": rows}}}
    return found


SCORE = "late match"
GOOD = {
    "latent": [("E/32", "tf", "place", 0.1), ("E/", "dmd", SCORE, 0.85), ("dense", "dmd", SCORE, 0.86),
               ("E/32", "dmd", SCORE, 0.4), ("E/8", "cd", SCORE, 0.5),
               ("E/32", "tf", "loss", 0.6), ("E/8", "tf", "loss", 0.5)],
    "split": [("48/16", "tf", SCORE, 0.8), ("32/32", "tf", SCORE, 0.7), ("16/48", "tf", SCORE, 0.6),
              ("56/8", "tf", SCORE, 0.5), ("48/16", "tf", "loss", 0.5),
              ("32/32", "tf", "loss", 0.6), ("16/48", "tf", "loss", 0.7),
              ("56/8", "tf", "loss", 0.8)],
    "start": [("", "tf", "loss", 0.7), ("by weights, mean key, rate 1,", "tf", "loss", 0.52),
              ("by inputs, better key, rate 1,", "tf", "loss", 0.5),
              ("random, rate 1, long", "tf", "loss", 0.51),
              ("random, rate 1, short", "tf", "loss", 0.65)],
    "window": [("1 + 6", "dmd", SCORE, 0.8), ("1 + 6", "dmd", "early match", 0.82),
               ("1 + 6, then the chunk, never", "dmd", SCORE, 0.2),
               ("1 + 6 with the chunk, never", "dmd", SCORE, 0.2), ("whole", "dmd", SCORE, 0.8),
               ("whole clip, old", "dmd", SCORE, 0.95)],
    "recipe": [("", "dmd", SCORE, 0.9)],
}
# What makes each claim false: (table, row, model, path, value).
BAD = {
    "an_eighth_is_enough": [("latent", "E/8", "dmd", SCORE, 0.6)],
    "an_eighth_keeps_the_place": [("latent", "E/8", "tf", "place", 0.2)],
    "more_adds_little": [("latent", "E/2", "dmd", SCORE, 0.98)],
    "more_adds_little_to_the_loss": [("latent", "E/2", "tf", "loss", 0.4)],
    "too_narrow_loses": [("latent", "E/32", "dmd", SCORE, 0.84)],
    "too_narrow_costs_loss": [("latent", "E/32", "tf", "loss", 0.5)],
    "as_good_as_dense_by_loss": [("latent", "dense", "tf", "loss", 0.4)],
    "as_smooth_as_dense": [("latent", "E/8", "dmd", "late residual", 0.7)],
    "a_quarter_is_best": [("split", "32/32", "tf", SCORE, 0.9)],
    "a_quarter_is_best_by_loss": [("split", "56/8", "tf", "loss", 0.4)],
    "the_order_of_splits": [("split", "56/8", "tf", SCORE, 0.65)],
    "the_order_of_splits_by_loss": [("split", "56/8", "tf", "loss", 0.65)],
    "the_split_matters_more": [("latent", "E/4", "tf", "loss", 2.0)],
    "a_cut_is_no_better": [("start", "random, rate 1, long", "tf", "loss", 0.65)],
    "a_better_cut_is_no_better": [("start", "random, rate 1, long", "tf", "loss", 0.65)],
    "a_cut_helps_at_first": [("start", "random, rate 1, short", "tf", "loss", 0.4)],
    "the_better_cut_stays_ahead": [("start", "by weights, mean key, rate 1, long", "tf", "loss", 0.45)],
    "one_and_six_hold": [("window", "1 + 6, then", "dmd", SCORE, 0.3)],
    "one_and_six_with_the_chunk_hold": [("window", "1 + 6 with", "dmd", SCORE, 0.3)],
    "one_and_six_are_as_good": [("window", "1 + 6, then", "dmd", SCORE, 0.3)],
    "new_times_make_it_work": [("window", "1 + 6, then the chunk, never", "dmd", SCORE, 0.8)],
    "either_horizon": [("window", "1 + 6 with the chunk, clip", "dmd", SCORE, 0.6)],
    "old_videos_help": [("window", "whole clip, old", "dmd", SCORE, 0.82)],
    "its_critic": [("recipe", "critic", "dmd", SCORE, 0.6)],
    "its_guidance": [("recipe", "guidance 3", "dmd", SCORE, 0.6)],
    "its_guidance_in_code": [("recipe", "guidance 4", "dmd", SCORE, 0.6)],
    "its_optimiser": [("recipe", "AdamW", "dmd", SCORE, 0.6)],
    "its_recipe": [("recipe", "all", "dmd", SCORE, 0.6)],
    "its_shift": [("recipe", "ours", "dmd", SCORE, 0.7)],
}
SPEED = ("rebuilding_is_flat", "merging_is_flat")


def outcomes(found: dict) -> dict[str, str]:
    names = [claim.__name__ for claim in CLAIMS]
    verdicts = paper_verdicts.judge(found)
    assert len(verdicts) == len(names)
    return {name: verdict["verdict"] for name, verdict in zip(names, verdicts)}


def test_in_the_papers_world_every_claim_holds():
    assert set(outcomes(a_world()).values()) == {REPRODUCED}


@pytest.mark.parametrize("claim", [claim.__name__ for claim in CLAIMS])
def test_every_claim_can_be_false(claim):
    found = a_world()
    if claim in SPEED:
        form = {"rebuilding_is_flat": "materialised", "merging_is_flat": "merged"}[claim]
        for row in found["speed"]["sections"]["latent"]["rows"].values():
            if row["form"] == form:
                row["by C"]["512"]["ms"] *= 2
    else:
        for table, row, model, path, value in BAD[claim]:
            put(found[table], row, model, path, value)
    assert outcomes(found)[claim] == REFUTED


@pytest.mark.parametrize("claim", [claim.__name__ for claim in CLAIMS])
def test_where_seeds_disagree_a_claim_cannot_be_told(claim):
    """What it reads is far apart from seed to seed, so no interval lies on one side."""
    found = a_world()
    for name, row in found["speed"]["sections"]["latent"]["rows"].items():
        _, window, _ = name.split()
        row["by C"]["512"]["ms"] *= {"21": 0.5, "10": 1.0, "7": 1.6}[window]
    for table, row, model, path, _ in BAD.get(claim, ()):
        put(found[table], row, model, path, 0.7, spread=0.5)
    assert outcomes(found)[claim] == OPEN


def test_a_need_that_is_not_met_decides():
    found = a_world()
    for width in ("E/32", "E/16", "E/8", "E/4", "E/2", "dense"):
        put(found["latent"], width, "dmd", SCORE, 0.95)
    for model in ("tf", "cd", "dmd"):
        put(found["latent"], "E/8", model, SCORE, 0.95)
    judged = outcomes(found)
    assert judged["an_eighth_is_enough"] == OPEN, "nothing can be lost"
    assert judged["more_adds_little"] == OPEN, "no room for more"
    assert judged["its_critic"] == OPEN, "the stage itself changes nothing"
    found = a_world()
    for row in ("dense", "E/8", "E/32"):
        put(found["latent"], row, "dmd", SCORE, 0.0)
    assert outcomes(found)["an_eighth_is_enough"] == OPEN, "nothing is there to be as good as"
    assert outcomes(found)["too_narrow_loses"] == OPEN
    found = a_world()
    put(found["start"], "random, rate 3, long", "tf", "loss", 0.1)
    assert outcomes(found)["a_cut_is_no_better"] == OPEN, "it may be better still at a higher rate"
    found = a_world()
    put(found["latent"], "E/8", "dmd", "late speed", 0.1)
    assert outcomes(found)["as_smooth_as_dense"] == OPEN, "what stands still is smooth"
    found = a_world()
    for entry in found["latent"]["rows"]:
        if entry["row"] == "E/8":
            entry["models"]["dmd"]["late"]["residual"] = None
    assert outcomes(found)["as_smooth_as_dense"] == OPEN, "nobody was there to be judged"


def test_no_difference_is_no_lead():
    """Zeros in every seed: "> 0" is false of them."""
    found = a_world()
    for row in ("48/16", "32/32"):
        put(found["split"], row, "tf", SCORE, 0.8, spread=0.0)
    assert outcomes(found)["a_quarter_is_best"] == REFUTED


def test_what_is_not_measured_yet_is_left_out():
    found = a_world()
    del found["split"]
    found["start"]["rows"] = [entry for entry in found["start"]["rows"] if entry["seed"] == 0]
    found["window"]["rows"] = found["window"]["rows"][3:]
    judged = paper_verdicts.judge(found)
    assert len(judged) == len(CLAIMS) - 5 - 4 - 6
    text = paper_tables.verdicts(found, tables.markdown)
    assert f"15 of {len(CLAIMS)} claims wait" in text


def test_tables_with_other_seeds_are_compared_where_both_have_them():
    found = a_world()
    found["split"]["rows"] = [entry for entry in found["split"]["rows"]
                              if (entry["row"], entry["seed"]) != ("48/16", 2)]
    assert outcomes(found)["the_split_matters_more"] == REPRODUCED
    found["latent"]["rows"] = [entry for entry in found["latent"]["rows"] if entry["seed"]]
    assert len(paper_verdicts.judge(found)) == len(CLAIMS) - 1, "one seed is no comparison"


def test_every_table_is_shown(monkeypatch):
    found = a_world()
    for table in TABLES:
        text = paper_tables.one_table(copy.deepcopy(found[table]), tables.markdown,
                                      lambda name: name)
        assert text.count("\n|") == len(TABLES[table](FULL)) + 1
        assert f"paper_{table}.json" in text
    monkeypatch.setattr(tables, "paper_found", dict)
    assert "Not measured yet: `python -m experiments.paper latent --jobs 6`" in tables.paper_latent()


def test_a_run_is_given_one_of_the_cards_that_it_may_use(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert normal.name_of_card(2) == "2"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert normal.name_of_card(1) == "5"
