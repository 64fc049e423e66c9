"""What train.py says at its end: its loss beside that of good runs, the next chunk of one's own
clips beside a still picture. And the commands that find out what is normal."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from engine import normal, run_files
from engine.checkpoint import read_checkpoint
from engine.clip_files import rates_of
from engine.clips import open_world
from engine.video_files import GifWriter
from experiments import flicker, tables
from experiments import normal as curves
from flow import SAMPLERS
from mla_video import PRESETS
from toy_data import WORDS, make_world
from train import recipe_for

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
SIZES = dict(dim=32, layers=1, heads=2, latent=8, query_latent=16, rope=6, ffn=32)
CONFIG = replace(PRESETS["toy"], words=len(WORDS), **SIZES)
FLAGS = [*(f"--config={name}={size}" for name, size in SIZES.items()), "--device=cpu",
         "--evaluate=0"]


# ---- the rule --------------------------------------------------------------------------------

def test_nineteen_good_runs_of_twenty_are_normal():
    """Of runs of one kind, three are known and a fourth ends."""
    dice = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        *known, fourth = np.exp(dice.normal(-3, 0.05, 4))
        low, high = normal.range_of(known)
        inside += low <= fourth <= high
    assert 0.93 < inside / 2000 < 0.97
    low, high = normal.range_of([math.exp(-1), 1.0, math.e])      # m = 0, s = 1
    assert math.isclose(math.log(high), 4.303 * math.sqrt(4 / 3), rel_tol=1e-6)
    assert math.isclose(low * high, 1.0)


def test_a_loss_is_the_mean_of_the_last_hundred_steps():
    points = [(10 * i, float(i)) for i in range(1, 31)]
    assert normal.loss_at(points, 300) == 25.5             # of 21 to 30
    assert normal.loss_at(points, 205) == 15.5             # of 11 to 20
    assert normal.loss_at(points, 25) == 1.5
    assert normal.loss_at(points, 5) is None


def ended(seed: int = 3, loss: float = 0.05, started: str = "scratch", **given):
    """Something like a trainer whose run is over."""
    recipe = recipe_for("tf", CPU, seed=seed, **given)
    points = [(step, loss) for step in range(10, recipe.steps + 1, 10)]
    asked = {"started": started, "fingerprint": "of shapes"}
    return SimpleNamespace(recipe=recipe, model=SimpleNamespace(config=CONFIG), asked=asked,
                           losses={"tf": points}, step=recipe.steps)


def write_good_runs(folder: Path, ends=(0.048, 0.05, 0.052), step: int | None = None) -> None:
    """A file of such runs as experiments/normal.py writes: they fell by half, and the last of
    them got as far as `step`, or to the end."""
    runs = []
    for seed, end in enumerate(ends):
        trainer = ended(seed)
        kind = normal.kind_of_run(asdict(trainer.recipe), asdict(CONFIG), trainer.asked)
        curve = [[800, 2 * end], [1600, end]]
        if step and seed == len(ends) - 1:
            curve = [point for point in curve if point[0] <= step]
        runs.append({"kind": kind, "curve": {"tf": curve}})
    content = {"device": "2 CPU cores", "runs": runs}
    (folder / "normal_cpu.json").write_text(json.dumps(content))


@pytest.mark.parametrize("loss, says", [
    (0.05, "good runs are between"), (0.08, "above normal"), (0.03, "below normal"),
])
def test_the_loss_is_put_beside_good_runs(tmp_path, loss, says):
    write_good_runs(tmp_path)
    line, = normal.loss_lines(ended(loss=loss), tmp_path)
    assert line.startswith(f"loss         {loss:.4f} at the end") and says in line
    assert "3 seeds, this recipe on a CPU" in line
    assert ("What is normal?" in line) == (loss != 0.05), "what to look at, if not normal"


@pytest.mark.parametrize("other", [
    dict(lr_muon=1e-3), dict(steps=1000), dict(batch=8), dict(started="score"),
])
def test_runs_of_another_kind_say_nothing(tmp_path, other):
    write_good_runs(tmp_path)
    line, = normal.loss_lines(ended(**other), tmp_path)
    assert line == "loss         0.0500 at the end"


def test_other_sizes_and_other_data_say_nothing(tmp_path):
    write_good_runs(tmp_path)
    other = ended()
    other.model.config = replace(CONFIG, layers=2)
    assert "good runs" not in normal.loss_lines(other, tmp_path)[0]
    other = ended()
    other.asked["fingerprint"] = "of digits"
    assert "good runs" not in normal.loss_lines(other, tmp_path)[0]


def test_two_runs_are_no_spread(tmp_path):
    write_good_runs(tmp_path, ends=(0.048, 0.052))
    assert "good runs" not in normal.loss_lines(ended(), tmp_path)[0]


def test_runs_that_did_not_end_say_what_was_normal_where_they_stopped(tmp_path):
    write_good_runs(tmp_path, step=1000)
    line, = normal.loss_lines(ended(loss=0.1), tmp_path)
    assert line.startswith("loss         0.1000 at the end, 0.1000 at step 800; good runs are")
    line, = normal.loss_lines(ended(loss=0.05), tmp_path)
    assert "at step 800, which is below normal" in line
    write_good_runs(tmp_path, step=700)
    assert "good runs" not in normal.loss_lines(ended(), tmp_path)[0], "no step is shared"


def test_a_size_that_was_no_choice_yet_is_at_its_default(tmp_path):
    write_good_runs(tmp_path)
    path = tmp_path / "normal_cpu.json"
    found = json.loads(path.read_text())
    for run in found["runs"]:
        del run["kind"]["config"]["eps_rms"], run["kind"]["config"]["text"]
    path.write_text(json.dumps(found))
    assert "good runs" in normal.loss_lines(ended(), tmp_path)[0]


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("normal_*.json")),
                         ids=lambda path: path.name)
def test_good_runs_are_of_todays_recipes(path):
    """Else train.py could compare nothing: python -m experiments.normal curves."""
    found = json.loads(path.read_text())
    device = torch.device("cpu" if "CPU" in found["device"] else "cuda")
    fingerprint = open_world("shapes").fingerprint
    config = replace(PRESETS["toy"], words=len(WORDS))
    for run in found["runs"]:
        recipe = recipe_for(run["stage"], device)
        asked = {"started": run["kind"]["started"], "fingerprint": fingerprint}
        kind = normal.kind_of_run(asdict(recipe), asdict(config), asked)
        assert normal.whole(run["kind"]) == kind


@pytest.mark.rest
def test_a_run_remembers_what_it_started_from(tmp_path, monkeypatch):
    """Also when it goes on, and a train.pt of before that was kept is still good."""
    monkeypatch.setattr(train, "report", lambda *_: None)
    flags = [*FLAGS, "--batch=2", f"--out={tmp_path}"]
    path = tmp_path / "train.pt"

    def started() -> str:
        return read_checkpoint(path, set())["asked"]["started"]

    train.main([*flags, "--stage=score", "--steps=1"])
    assert started() == "scratch"
    train.main([*flags, "--stage=tf", "--steps=1"])
    assert started() == "score"
    train.main(["--resume", "--steps=2", f"--out={tmp_path}", "--device=cpu"])
    assert started() == "score"
    state = read_checkpoint(path, set())
    del state["asked"]["started"], state["config"]["eps_rms"], state["config"]["text"]
    torch.save(state, path)
    train.main(["--resume", "--steps=3", f"--out={tmp_path}", "--device=cpu"])
    assert started() == "", "not known, and so not compared"


# ---- clips of one's own ----------------------------------------------------------------------

class Extrapolates:
    """A model that lets every pixel go on changing as between its last two frames."""
    config = CONFIG
    embed = SimpleNamespace(weight=torch.zeros(1))

    def make_cache(self, batch):
        return None

    def commit(self, x, caption, cache, attend):
        self.last = x

    def denoise(self, x, sigma, caption, cache, attend):
        change = self.last[:, -1:] - self.last[:, -2:-1]
        steps = torch.arange(1, 4)[None, :, None, None, None]
        goal = self.last[:, -1:] + steps * change
        return (x - goal) / sigma[..., None, None, None]


def test_the_next_chunk_is_judged_after_a_true_past():
    slope = 0.1 * torch.arange(12.0)[None, :, None, None, None]
    clips = (slope - 0.6).expand(5, -1, 3, 16, 16)
    captions = torch.zeros(5, 3, dtype=torch.long)
    made, repeated = normal.next_chunk_errors(Extrapolates(), clips, captions, 0,
                                              **SAMPLERS["tf"])
    assert made < 1e-10
    assert math.isclose(repeated, (0.01 + 0.04 + 0.09) / 3, rel_tol=1e-4)


def test_what_is_said_of_the_next_chunk():
    found = {"made": 0.01, "repeated": 0.05, "windows": 64, "held_out": 4}
    line = normal.next_chunk_line(found, 1600)
    assert "5.0 times as far off" in line
    assert "4 clips that it was not trained on" in line
    worse = normal.next_chunk_line({**found, "made": 0.06, "held_out": 0}, 1600)
    assert "no better than a still picture yet" in worse
    assert "--steps above 1600" in worse
    assert "clips that it was trained on" in worse
    assert "hardly move" in normal.next_chunk_line({**found, "repeated": 0.0}, 1600)


@pytest.mark.parametrize("count, held_out", [(39, []), (40, [9, 19, 29, 39])])
def test_of_forty_clips_every_tenth_is_held_out(tmp_path, count, held_out):
    """Clip n has the value n everywhere."""
    values = np.arange(count, dtype=np.uint8)
    clips = np.zeros((count, 14, 16, 16), np.uint8) + values[:, None, None, None]
    clips[0, 0, 0, 0] = 255                # the range is then that of bytes
    path = tmp_path / "clips.npy"
    np.save(path, clips)
    world = open_world(str(path), layout="NTHW")
    assert world.held_out == held_out
    assert ("4 clips held out" in world.reads) == bool(held_out)
    drawn = {world.draw(index)[0] for index in range(600)}
    assert drawn == set(range(count)) - set(held_out)
    videos, _ = world.to_judge(200)
    levels = (videos[:, 5, 0, 5, 5] + 1) * 127.5
    judged = set(levels.round().int().tolist())
    if held_out:
        assert judged == set(held_out)
    else:
        assert len(judged) > 30


def last_line_of_training(folder: Path, capsys, clips: np.ndarray, steps: int) -> str:
    folder.mkdir()
    np.save(folder / "clips.npy", clips)
    train.main([*FLAGS, f"--data={folder / 'clips.npy'}", f"--out={folder / 'out'}",
                f"--steps={steps}", "--layout=NTHW", "--batch=4"])
    lines = capsys.readouterr().out.splitlines()
    said, = [line for line in lines if line.startswith("next chunk")]
    figures = json.loads((folder / "out/report_tf.json").read_text())["next_chunk"]
    assert f"{figures['made']:.4f}" in said
    return said


@pytest.mark.rest
def test_training_says_whether_to_go_on(tmp_path, capsys, monkeypatch):
    """In the first clips the last chunk is always white after black, which is learned at once,
    and repeating is far off; in the second a grey drifts so slowly that repeating is good."""
    monkeypatch.setattr(run_files, "write_sample", lambda *_: None)    # it takes longest
    monkeypatch.setattr(run_files, "draw_losses", lambda *_: None)
    flash = np.zeros((40, 12, 16, 16), np.uint8)
    flash[:, 9:] = 255
    said = last_line_of_training(tmp_path / "flash", capsys, flash, 80)
    assert "times as far off" in said and "4 clips that it was not trained on" in said
    slow = np.arange(0, 96, 8, dtype=np.uint8)[None, :, None, None]
    slow = np.broadcast_to(slow, (3, 12, 16, 16)).copy()
    slow[0, 0, 0, 0] = 255
    said = last_line_of_training(tmp_path / "slow", capsys, slow, 2)
    assert "no better than a still picture yet" in said and "too few to hold some out" in said


# ---- rates -----------------------------------------------------------------------------------

def test_our_own_gifs_have_one_rate(tmp_path):
    """16 frames a second are 60 and 70 ms in a GIF."""
    gif = GifWriter(tmp_path / "clip.gif", fps=16)
    for shade in range(0, 256, 16):
        gif.append(np.full((1, 16, 16, 3), shade, np.uint8))
    world = open_world(str(tmp_path / "clip.gif"))
    assert "at 16 a second" in world.reads


def test_times_that_differ_by_more_than_a_tick_are_two_rates():
    assert rates_of([60, 70, 60, 60]) == (16.0,)
    assert sorted(rates_of([50, 100, 50])) == [10.0, 20.0]
    assert rates_of([40]) == (25.0,)


# ---- curves ----------------------------------------------------------------------------------

def work(folder: Path, *words: str) -> curves.Curves:
    """The curves' command as it would be, before it does anything."""
    given = []
    curves_action = curves.curves
    curves.curves = given.append
    try:
        curves.main(["curves", "--device=cpu", f"--runs={folder / 'runs'}",
                     f"--json={folder / 'normal.json'}", *words])
    finally:
        curves.curves = curves_action
    return curves.Curves(given[0])


def write_run(work: curves.Curves, job: curves.Job, step: int, steps: int = 100) -> None:
    """What train.py would leave of it."""
    folder = work.folder(job)
    folder.mkdir(parents=True, exist_ok=True)
    stage = curves.WAYS[job.way].stage
    losses = {stage: [(at, 1.0) for at in range(10, step + 1, 10)]}
    torch.save({"recipe": {"stage": stage, "steps": steps}, "config": {}, "step": step,
                "asked": {"fingerprint": ""}, "losses": losses, "seconds": 1.0},
               folder / "train.pt")
    work.weights(job).write_text("weights")


def test_what_a_stage_needs_comes_before_it(tmp_path):
    todo = work(tmp_path, "--stages", "dmd", "--seeds", "0", "1", "--jobs=3")
    wanted = todo.wanted()
    assert [job.way for job in wanted if job.seed == 1] == ["score", "tf-after-score", "cd",
                                                            "dmd"]
    assert todo.ready(wanted) == [("score", 0), ("score", 1)]
    todo.trained.add(curves.Job("score", 1))
    assert ("tf-after-score", 1) in todo.ready(wanted[1:])


def test_finished_runs_are_not_made_again(tmp_path):
    """Nor if only their folder, or only the file, is left. One that was stopped is, and what its
    weights are is not what the next stage needs."""
    todo = work(tmp_path, "--stages", "score", "tf-after-score", "--seeds", "0")
    score = curves.Job("score", 0)
    later = curves.Job("tf-after-score", 0)
    write_run(todo, score, step=60)
    assert todo.wanted() == [score, later]
    assert "--resume" in todo.command(score)
    write_run(todo, score, step=100)
    assert todo.wanted() == [later]
    entry, = json.loads((tmp_path / "normal.json").read_text())["runs"]
    assert entry["end"] == {"score": 1.0} and len(entry["curve"]["score"]) == curves.POINTS - 1
    again = work(tmp_path, "--stages", "score", "--seeds", "0", f"--runs={tmp_path / 'none'}")
    assert again.wanted() == []
    again = work(tmp_path, "--stages", "tf-after-score", "--seeds", "0",
                 f"--runs={tmp_path / 'none'}")
    assert again.wanted() == [score, later], "its weights are needed, and gone"


def good_entry(seed: int, loss: float, step: int = 200) -> dict:
    """Of a run of score whose loss halves in its middle, and ends at `loss`."""
    early = [(at, 2 * loss) for at in range(10, 101, 10)]
    late = [(at, loss) for at in range(110, step + 1, 10)]
    recipe = {"stage": "score", "steps": 200}
    state = {"recipe": recipe, "config": {}, "step": step, "asked": {"fingerprint": ""},
             "losses": {"score": early + late}, "seconds": 1.0}
    return curves.entry_of(curves.Job("score", seed), state)


def test_the_table_of_losses_has_mean_and_spread():
    runs = [good_entry(seed, loss) for seed, loss in enumerate((0.1, 0.2, 0.3))]
    text = curves.losses(runs, tables.markdown)
    head, _, *rows = text.splitlines()
    assert "`score`, 200 steps, 3 seeds" in head
    assert len(rows) == curves.POINTS + 1
    assert rows[9] == "| 50 % | 0.4 [0.2, 0.6] |"
    assert rows[14] == "| 75 % | 0.3 [0.15, 0.45] |", "half of its hundred steps are early"
    assert rows[19] == "| 100 % | 0.2 [0.1, 0.3] |"
    low, high = normal.range_of([0.1, 0.2, 0.3])
    assert rows[20] == f"| normal at the last of these | {low:.3g} to {high:.3g} |"


def test_the_table_of_runs_that_stopped_goes_as_far_as_they(tmp_path):
    runs = [good_entry(seed, loss, step=100) for seed, loss in enumerate((0.1, 0.2, 0.3))]
    head, _, *rows = curves.losses(runs, tables.markdown).splitlines()
    assert "`score`, 100 of 200 steps, 3 seeds" in head
    assert len(rows) == curves.POINTS // 2 + 1
    assert rows[9] == "| 50 % | 0.4 [0.2, 0.6] |"


@pytest.mark.rest
def test_curves_are_trained_and_kept(tmp_path):
    """By train.py itself."""
    flags = " ".join([*FLAGS[:-2], "--steps=20", "--batch=2"])
    words = ["curves", "--device=cpu", "--threads=1", "--seeds=0",
             f"--runs={tmp_path / 'runs'}", f"--json={tmp_path / 'normal.json'}"]
    curves.main([*words, f"--flags={flags}", "--stages=score"])
    entry, = json.loads((tmp_path / "normal.json").read_text())["runs"]
    assert entry["way"] == "score" and entry["step"] == 20
    assert entry["kind"]["started"] == "scratch" and entry["kind"]["recipe"]["steps"] == 20


@pytest.mark.rest
def test_curves_stop_in_time_and_lose_nothing(tmp_path, monkeypatch, capsys):
    """The time is over as soon as a run has a loss to keep."""
    path = tmp_path / "runs/cpu/score/seed_0/train.pt"
    plain = curves.Curves.look

    def look(self):
        state = self.state(curves.Job("score", 0))
        if state and state["losses"]:
            self.deadline = 0
        plain(self)

    monkeypatch.setattr(curves.Curves, "look", look)
    flags = " ".join([*FLAGS[:-2], "--steps=100000", "--batch=2", "--save-every=20"])
    curves.main(["curves", "--device=cpu", "--threads=1", "--seeds=0", "--stages=score",
                 f"--runs={tmp_path / 'runs'}", f"--json={tmp_path / 'normal.json'}",
                 f"--flags={flags}"])
    assert "the time is over" in capsys.readouterr().out
    assert read_checkpoint(path, {"step"})["step"] < 100_000
    found = json.loads((tmp_path / "normal.json").read_text())
    assert len(found["runs"]) == 1 and not found["whole"]


# ---- flicker ---------------------------------------------------------------------------------

def flicker_of(video: torch.Tensor) -> dict:
    chunks = video.split(3, dim=1)
    borders, insides = flicker.changes(chunks)
    return flicker.ratios(borders, insides)


def test_flicker_is_change_at_borders():
    steady = torch.arange(60.0).reshape(1, 60, 1, 1, 1)
    found = flicker_of(steady)
    assert found["ratio"] == 1
    assert found["by_tenth"] == [1.0] * 10
    chunks = steady.div(3, rounding_mode="floor")
    found = flicker_of(steady + chunks)    # a step more from chunk to chunk
    assert found["ratio"] == 2
    assert found["by_tenth"] == [2.0] * 10


def test_true_clips_do_not_flicker():
    clips, _ = make_world("shapes", frames=60).batch(range(64))
    found = flicker_of(clips)
    assert 0.95 < found["ratio"] < 1.05
