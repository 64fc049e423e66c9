"""Stopped in any way and gone on with: every stage, bit for bit. (Kills by the hundred:
`python tests/kill.py`.)"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from engine.checkpoint import previous, read_checkpoint, read_last_good, write_atomically
from engine.command_line import UserError, repeatable
from mla_video import PRESETS, VideoDiT
from test_robust import NoWideNumbers
from toy_data import WORDS, make_world
from train import STAGES, Trainer, recipe_for

pytestmark = pytest.mark.rest             # pytest.ini says what that means

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
SIZES = dict(dim=32, layers=1, heads=2, latent=8, query_latent=16, rope=6, ffn=32)
CONFIG = replace(PRESETS["toy"], words=len(WORDS), frames=6, window=6, **SIZES)
SMALL = [f"--config={name}={size}" for name, size in SIZES.items()]
FLAGS = [*SMALL, "--batch=2", "--evaluate=0", "--device=cpu"]


def make_trainer(stage: str, seed: int = 0) -> Trainer:
    torch.manual_seed(seed)
    model = VideoDiT(CONFIG)
    score = VideoDiT(CONFIG)
    for network in (model, score):         # as if trained: a head of zeros hides half of it
        torch.nn.init.normal_(network.head.weight, std=0.05)
    recipe = recipe_for(stage, CPU, steps=12, batch=2, warmup=3)
    world = make_world("shapes", frames=CONFIG.frames)
    return Trainer(model, recipe, world, CPU, score)


def tensors(state, path: str = "") -> dict[str, torch.Tensor]:
    """Every tensor of a state by its path: ".learner.model.head.weight"."""
    if isinstance(state, torch.Tensor):
        return {path: state}
    pairs = ()
    if isinstance(state, dict):
        pairs = state.items()
    elif isinstance(state, (list, tuple)):
        pairs = enumerate(state)
    found = {}
    for key, part in pairs:
        found |= tensors(part, f"{path}.{key}")
    return found


def saved(out: Path) -> dict[str, torch.Tensor]:
    return tensors(read_checkpoint(out / "train.pt", set()))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(other[name], value) for name, value in one.items())


# ---- exact resumption ------------------------------------------------------------------------

@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_goes_on_bit_for_bit(stage, tmp_path):
    """Saved and read back after steps 1, 5 and 6 (of the generator and not), into networks of
    other weights."""
    path = tmp_path / "train.pt"
    whole = make_trainer(stage)
    parts = make_trainer(stage)
    for step in range(12):
        if step in (1, 5, 6):
            write_atomically(path, parts.state(), keep=True)
            parts = make_trainer(stage, seed=1)
            parts.restore(read_last_good(path, set()))
        losses = [run.update(*run.batch(run.step)).item() for run in (whole, parts)]
        assert losses[0] == losses[1], f"the losses part at step {step}"
        if whole.step % 4 == 0:
            whole.read_losses()
            parts.read_losses()
    assert whole.losses == parts.losses, "the curve of the losses is not the unbroken run's"
    mine = tensors(whole.state())
    theirs = tensors(parts.state())
    assert mine.keys() == theirs.keys() and len(mine) > 40
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), \
            f"{name} differs after a resume: some state was not restored"


@pytest.mark.parametrize("stage", STAGES)
def test_no_float64_and_no_complex_in_a_training_step(stage):
    run = make_trainer(stage)
    batch = run.batch(0)
    with NoWideNumbers():
        run.update(*batch)
        run.update(*batch)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_the_middle_of_a_step_waits_for_its_end(tmp_path, monkeypatch, capsys,
                                                            number, code):
    """Half a step must not be saved: weights moved, average not. The run that goes on ends where
    an unbroken one does."""
    plain = Trainer.average

    def signalled(self, fresh):                            # after the optimisers
        if self.step == 4:
            os.kill(os.getpid(), number)
        return plain(self, fresh)

    parts = tmp_path / "parts"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(Trainer, "average", signalled)
        train.main([*FLAGS, "--steps=8", f"--out={parts}"])
    assert stop.value.code == code and "Traceback" not in capsys.readouterr().err
    assert read_checkpoint(parts / "train.pt", {"step"})["step"] == 5
    assert (parts / "model.pt").exists()
    train.main([*FLAGS, "--steps=8", f"--out={parts}", "--resume"])
    train.main([*FLAGS, "--steps=8", f"--out={tmp_path / 'whole'}"])
    assert same(saved(tmp_path / "whole"), saved(parts))


# ---- what a run was begun with -----------------------------------------------------------------

@pytest.fixture
def no_report(monkeypatch):
    """Pictures and figures take longer than these runs."""
    monkeypatch.setattr(train, "report", lambda *_: None)


def write_clips(path: Path, seed: int) -> None:
    """Two clips of noise, as a file of one's own."""
    pixels = np.random.default_rng(seed).integers(0, 256, (2, 13, 16, 16, 3), dtype=np.uint8)
    np.save(path, pixels)


def refused(capsys, argv: list[str]) -> str:
    """The one line with which train.py refuses these flags."""
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2, lines
    assert len(lines) == 1, lines
    return lines[0]


def begin_and_break_off(out: Path, monkeypatch, flags: list[str], step: int) -> None:
    """A run that is stopped after so many steps."""
    plain = Trainer.update

    def update(self, *batch):
        if self.step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, *batch)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Trainer, "update", update)
        train.main([*flags, f"--out={out}"])
    assert read_checkpoint(out / "train.pt", {"step"})["step"] == step


def test_resume_needs_no_flag_again(tmp_path, monkeypatch, capsys, no_report):
    """Data, batch, config, seed, attention, steps and --deterministic are those of train.pt, and
    the stages that follow are those that were asked for."""
    data = tmp_path / "clips.npy"
    write_clips(data, 0)
    flags = [*SMALL, "--batch=3", "--device=cpu", "--steps=6", "--seed=7", "--attention=dense",
             "--deterministic", f"--data={data}", "--stage=all"]
    flags.remove("--config=latent=8")
    parts = tmp_path / "parts"
    whole = tmp_path / "whole"
    begin_and_break_off(parts, monkeypatch, flags, 4)
    train.main(["--resume", f"--out={parts}", "--device=cpu"])
    assert "starts from train.pt" in capsys.readouterr().out
    train.main([*flags, f"--out={whole}"])
    assert same(saved(whole), saved(parts))
    assert read_checkpoint(parts / "train.pt", set())["recipe"]["stage"] == "dmd"
    train.main(["--resume", f"--out={parts}", *flags])     # all of them again: no contradiction
    assert same(saved(whole), saved(parts))


@pytest.mark.parametrize("flag, words", [
    ("--batch=3", ("batch 2", "3")),
    ("--seed=1", ("seed 0", "1")),
    ("--attention=dense", ("mla", "dense")),
    ("--config=latent=4", ("{'latent': 8}", "{'latent': 4}")),
    ("--preset=small", ("{'height': 16, 'width': 16}", "{'height': 32, 'width': 32}")),
    ("--data=digits", ("'shapes'", "'digits'")),
    ("--stage=cd", ("at stage tf", "cd")),
])
def test_what_contradicts_the_run_is_refused_by_both_names(tmp_path, capsys, no_report, flag,
                                                          words):
    train.main([*FLAGS, "--steps=1", f"--out={tmp_path}"])
    capsys.readouterr()
    said = refused(capsys, ["--resume", f"--out={tmp_path}", flag])
    for word in words:
        assert word in said, said


def test_data_are_what_they_hold_and_not_what_they_are_called(tmp_path, capsys, no_report):
    """The same file renamed is the same data, for --resume and for the next stage; another file
    of the same name is not."""
    mine = tmp_path / "mine.npy"
    write_clips(mine, 0)
    out = tmp_path / "out"
    train.main([*FLAGS, "--steps=1", f"--data={mine}", f"--out={out}"])
    resume = ["--resume", f"--out={out}", "--steps=2"]
    next_stage = [*FLAGS, "--stage=cd", "--steps=1", f"--start={out / 'tf.pt'}"]

    write_clips(mine, 1)
    capsys.readouterr()
    said = refused(capsys, resume)
    assert said.count("mine.npy") == 2 and "other clips" in said, said
    there = [f"--data={mine}", f"--out={tmp_path / 'cd'}"]
    assert "its data is mine.npy" in refused(capsys, [*next_stage, *there])

    mine.unlink()
    said = refused(capsys, resume)
    assert "mine.npy" in said and "--data" in said, said

    renamed = tmp_path / "renamed.npy"
    write_clips(renamed, 0)
    train.main([*resume, f"--data={renamed}"])
    train.main(["--resume", f"--out={out}", "--steps=3"])  # and now that is its name
    assert read_checkpoint(out / "train.pt", set())["step"] == 3
    train.main([*next_stage, f"--data={renamed}", f"--out={tmp_path / 'cd'}"])


def test_the_recipe_is_that_of_train_pt_on_any_machine(tmp_path, monkeypatch, capsys, no_report):
    """A GPU's run goes on with a GPU's rates, batch and average on a CPU, and says so; also in
    the stages that follow."""
    train.main([*FLAGS, "--steps=2", "--stage=all", f"--out={tmp_path}"])
    path = tmp_path / "train.pt"
    state = torch.load(tmp_path / "train.pt", weights_only=True)
    seen = []

    def train_stage(args, recipe, *others):
        seen.append((recipe, args.machine))

    gpu = recipe_for("cd", torch.device("cuda"), batch=2)
    state["recipe"] = asdict(gpu)
    state["asked"] |= {"machine": "cuda", "steps": None}
    torch.save(state, path)
    monkeypatch.setattr(train, "train_stage", train_stage)
    train.main(["--resume", f"--out={tmp_path}", "--device=cpu"])
    dmd = recipe_for("dmd", torch.device("cuda"), batch=2)
    assert seen == [(gpu, "cuda"), (dmd, "cuda")]
    assert gpu != recipe_for("cd", CPU, batch=2), "this comparison could not fail"


def test_a_recipe_of_another_machine_is_said(tmp_path, capsys, no_report):
    train.main([*FLAGS, "--steps=2", f"--out={tmp_path}"])
    path = tmp_path / "train.pt"
    state = torch.load(path, weights_only=True)
    state["asked"]["machine"] = "cuda"
    torch.save(state, path)
    capsys.readouterr()
    train.main(["--resume", f"--out={tmp_path}"])
    assert "cpu, by train.pt's recipe, which is for cuda;" in capsys.readouterr().out


def test_more_steps_say_what_becomes_of_the_rate(tmp_path, capsys, no_report):
    """At the end of 60 steps the rate is 5 % of its peak; of 600 it would be all of it still."""
    train.main([*FLAGS, "--steps=60", f"--out={tmp_path}"])
    capsys.readouterr()
    train.main(["--resume", f"--out={tmp_path}"])
    said = capsys.readouterr().out
    assert "stage tf is at its end, step 60 of 60 (further: more --steps)" in said
    with pytest.raises(SystemExit):
        train.main(["--resume", f"--out={tmp_path}", "--steps=59"])
    assert "has made 60 steps already" in capsys.readouterr().err
    train.main(["--resume", f"--out={tmp_path}", "--steps=61"])
    said = capsys.readouterr().out
    assert "61 steps instead of 60: the learning rate is now that of a run of 61" in said
    assert "from 5% of its peak to 7%" in said, said
    train.main(["--resume", f"--out={tmp_path}"])          # the new number stays
    assert "step 61 of 61" in capsys.readouterr().out


@pytest.mark.parametrize("part, value", [
    ("asked", {}), ("asked", None), ("recipe", {"stage": "tf", "steps": 2, "batch": 2, "seed": 0}),
    ("stage", "flow"), ("preset", "large"), ("config", "latent=8"), ("machine", "abacus"),
])
def test_a_state_that_never_was_is_refused(tmp_path, capsys, no_report, part, value):
    train.main([*FLAGS, "--steps=1", f"--out={tmp_path}"])
    path = tmp_path / "train.pt"
    state = torch.load(path, weights_only=True)
    owner = state if part in state and part != "config" else state["asked"]
    owner[part] = value
    torch.save(state, path)
    capsys.readouterr()
    refused(capsys, ["--resume", f"--out={tmp_path}"])


def test_nothing_to_resume_names_what_train_py_has(tmp_path, capsys):
    """It said --checkpoint, which is a flag of sample.py."""
    said = refused(capsys, ["--resume", f"--out={tmp_path / 'nowhere'}"])
    assert "there is no checkpoint" in said and "--out" in said
    assert "--checkpoint" not in said
    assert not list(tmp_path.iterdir())


def test_presets_that_cannot_be_trained_are_not_offered(capsys):
    with pytest.raises(SystemExit):
        train.main(["--preset=wan1.3b"])
    _, offered = capsys.readouterr().err.split("invalid choice: 'wan1.3b'")
    assert "toy" in offered and "small" in offered and "wan" not in offered


# ---- the same bits every time ----------------------------------------------------------------

def test_deterministic_gives_the_same_bits_and_is_over_afterwards(tmp_path, monkeypatch):
    """On two threads, whose sums are those of no single one. That the flag reaches torch is
    looked up in the midst of a step."""
    plain = Trainer.update
    threads = torch.get_num_threads()
    found = []

    def update(self, *batch):
        found.append(torch.are_deterministic_algorithms_enabled())
        return plain(self, *batch)

    monkeypatch.setattr(Trainer, "update", update)
    runs = {"a": ["--deterministic"], "b": ["--deterministic"],
            "c": ["--deterministic", "--seed=1"], "d": []}
    torch.set_num_threads(2)
    try:
        for run, flags in runs.items():
            train.main([*FLAGS, "--steps=4", f"--out={tmp_path / run}", *flags])
    finally:
        torch.set_num_threads(threads)
    assert found == [True] * 12 + [False] * 4, \
        "torch is told before the first step, and left as it was after the last"
    a = saved(tmp_path / "a")
    b = saved(tmp_path / "b")
    c = saved(tmp_path / "c")
    assert a.keys() == b.keys() and same(a, b), "the same flags gave other bits"
    assert not same(a, c), "another seed gave the same bits: this comparison could not fail"
    report = json.loads((tmp_path / "a" / "report_tf.json").read_text())
    assert report["deterministic"] is True


def test_deterministic_names_the_operation_that_cannot_be(tmp_path, monkeypatch, capsys):
    def update(*_):
        return torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))

    monkeypatch.setattr(Trainer, "update", update)
    with pytest.raises(SystemExit) as stop:
        train.main([*FLAGS, "--steps=4", f"--out={tmp_path}", "--deterministic"])
    lines = capsys.readouterr().err.splitlines()
    said = [line for line in lines if line.startswith("error")]
    assert stop.value.code == 2 and len(said) == 1, said
    assert "put_" in said[0] and "--deterministic" in said[0], said
    assert not torch.are_deterministic_algorithms_enabled()
    assert (tmp_path / "train.pt").exists()


def test_deterministic_looks_after_cublas(monkeypatch):
    """Its scratch memory is chosen by the environment; what the user chose is refused and not
    overwritten. (No GPU is touched.)"""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with repeatable(True, torch.device("cuda")):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    for device, word in (("cuda", ":4096:8 or :16:8"), ("mps", "MPS")):
        with pytest.raises(UserError, match=word), repeatable(True, torch.device(device)):
            pytest.fail("the run began")
    with repeatable(False, torch.device("cuda")):
        assert not torch.are_deterministic_algorithms_enabled()


def test_torch_is_left_as_it_was(tmp_path, monkeypatch):
    """A run takes fast products and hides a warning, and both end with it, also if it fails."""
    import warnings
    before = torch.get_float32_matmul_precision(), list(warnings.filters)
    found = []

    def update(self, *batch):
        found.append(torch.get_float32_matmul_precision())
        raise UserError("enough")

    monkeypatch.setattr(Trainer, "update", update)
    with pytest.raises(SystemExit):
        train.main([*FLAGS, "--steps=4", f"--out={tmp_path}"])
    assert found == ["medium"]
    assert before == (torch.get_float32_matmul_precision(), list(warnings.filters))


# ---- mistakes, disks and kills -----------------------------------------------------------------

def test_a_mistake_in_a_model_gives_a_traceback(tmp_path, monkeypatch):
    """A ValueError of whoever is changing the model is not taken for one of the input."""
    def forward(*_, **__):
        raise ValueError("too many values to unpack (expected 2)")

    monkeypatch.setattr(VideoDiT, "forward", forward)
    with pytest.raises(ValueError, match="too many values"):
        train.main([*FLAGS, "--steps=4", f"--out={tmp_path}"])


def test_a_disk_that_takes_nothing_is_known_before_training(tmp_path, monkeypatch, capsys):
    def full(*arguments):
        raise OSError("No space left on device")

    def update(*_):
        pytest.fail("trained before it knew that nothing can be written")

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(Trainer, "update", update)
    with pytest.raises(SystemExit) as stop:
        train.main([*FLAGS, "--steps=8", f"--out={tmp_path}"])
    assert stop.value.code == 2 and "No space left" in capsys.readouterr().err


def test_a_damaged_newest_save_costs_its_interval_and_not_the_run(tmp_path, capsys):
    path = tmp_path / "train.pt"
    flags = [*FLAGS, "--steps=6", "--save-every=3", f"--out={tmp_path}"]
    train.main(flags)
    whole = saved(tmp_path)
    path.write_bytes(path.read_bytes()[:-1000])
    assert read_checkpoint(previous(path), {"step"})["step"] == 3
    train.main([*flags, "--resume"])
    assert "train.prev.pt" in capsys.readouterr().err, \
        "three steps are done again: that must be said"
    assert same(saved(tmp_path), whole)


@pytest.mark.parametrize("flags", [[], ["--signal=TERM", "--workers=2"]])
def test_kills_and_as_many_good_restarts(flags):
    """`python tests/kill.py` in short."""
    command = [sys.executable, "tests/kill.py", "--kills=2", "--steps=120", "--longest=1.5",
               *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]
