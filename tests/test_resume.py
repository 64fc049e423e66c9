"""Stopped in any way and gone on with: every stage, bit for bit. (Kills by the hundred: `python tests/kill.py`.)"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train
import trainer
from checkpoint import previous, read_checkpoint, read_last_good, write_atomically
from mla_video import PRESETS, VideoDiT
from test_robust import NoWideNumbers
from toy_data import WORDS, make_world
from trainer import STAGES, Trainer, recipe_for

ROOT = Path(__file__).parent.parent
CONFIG = replace(PRESETS["toy"], dim=32, layers=1, heads=2, latent=8, query_latent=16, rope=6, ffn=32, words=len(WORDS), frames=6, window=6)
FLAGS = [*(f"--config={name}={getattr(CONFIG, name)}" for name in ("dim", "layers", "heads", "latent", "query_latent", "rope", "ffn")),
         "--batch=2", "--evaluate=0", "--device=cpu"]


def make_trainer(stage: str, seed: int = 0) -> Trainer:
    torch.manual_seed(seed)
    model, score = VideoDiT(CONFIG), VideoDiT(CONFIG)
    for network in (model, score):                         # as if trained: a head of zeros hides half of the network
        torch.nn.init.normal_(network.head.weight, std=0.05)
    recipe = recipe_for(stage, torch.device("cpu"), steps=12, batch=2, warmup=3)
    return Trainer(model, recipe, make_world("shapes", frames=CONFIG.frames), torch.device("cpu"), score)


def tensors(state, path: str = "") -> dict[str, torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return {path: state}
    pairs = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    return {name: value for key, part in pairs for name, value in tensors(part, f"{path}.{key}").items()}


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_goes_on_bit_for_bit(stage, tmp_path):
    """Saved and read back after steps 1, 5 and 6 (of the generator and not), into networks of other weights."""
    whole, parts, losses = make_trainer(stage), make_trainer(stage), ([], [])
    for step in range(12):
        if step in (1, 5, 6):
            write_atomically(tmp_path / "train.pt", parts.state(), keep=True)
            parts = make_trainer(stage, seed=1)
            parts.restore(read_last_good(tmp_path / "train.pt", set()))
        for run, said in zip((whole, parts), losses):
            said.append(run.update(*run.batch(run.step)).item())
            if run.step % 4 == 0:
                run.read_losses()
        assert losses[0] == losses[1], f"the losses part at step {step}"
    assert whole.losses == parts.losses, "the curve of the losses is not the unbroken run's"
    mine, theirs = tensors(whole.state()), tensors(parts.state())
    assert mine.keys() == theirs.keys() and len(mine) > 40
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), f"{name} differs after a resume: some state was not restored"


@pytest.mark.parametrize("stage", STAGES)
def test_no_float64_and_no_complex_in_a_training_step(stage):
    run = make_trainer(stage)
    batch = run.batch(0)
    with NoWideNumbers():
        run.update(*batch)
        run.update(*batch)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_the_middle_of_a_step_waits_for_its_end(tmp_path, monkeypatch, capsys, number, code):
    """Half a step must not be saved: weights moved, average not. The run that goes on ends where an unbroken one does."""
    plain = trainer.Trainer._averaged

    def signalled(self, loss, fresh):                      # after the optimisers, before the average
        if self.step == 4:
            os.kill(os.getpid(), number)
        return plain(self, loss, fresh)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(trainer.Trainer, "_averaged", signalled)
        train.main([*FLAGS, "--steps=8", f"--out={tmp_path / 'parts'}"])
    assert stop.value.code == code and "Traceback" not in capsys.readouterr().err
    assert read_checkpoint(tmp_path / "parts" / "train.pt", {"step"})["step"] == 5 and (tmp_path / "parts" / "model.pt").exists()
    train.main([*FLAGS, "--steps=8", f"--out={tmp_path / 'parts'}", "--resume"])
    train.main([*FLAGS, "--steps=8", f"--out={tmp_path / 'whole'}"])
    parts, whole = (tensors(read_checkpoint(tmp_path / name / "train.pt", set())) for name in ("parts", "whole"))
    assert all(torch.equal(parts[name], value) for name, value in whole.items())


def test_deterministic_gives_the_same_bits_and_is_over_afterwards(tmp_path, monkeypatch, capsys):
    """On two threads, whose sums are those of no single one. That the flag reaches torch is looked up in the midst of a step."""
    plain, threads, found = trainer.Trainer.update, torch.get_num_threads(), []

    def update(self, *batch):
        found.append(torch.are_deterministic_algorithms_enabled())
        return plain(self, *batch)

    monkeypatch.setattr(trainer.Trainer, "update", update)
    torch.set_num_threads(2)
    try:
        for run, flags in (("a", ["--deterministic"]), ("b", ["--deterministic"]), ("c", ["--deterministic", "--seed=1"]), ("d", [])):
            train.main([*FLAGS, "--steps=4", f"--out={tmp_path / run}", *flags])
    finally:
        torch.set_num_threads(threads)
    assert found == [True] * 12 + [False] * 4, "torch is told before the first step, and left as it was after the last"
    a, b, c = (tensors(read_checkpoint(tmp_path / run / "train.pt", set())) for run in "abc")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), "the same flags gave other bits"
    assert not all(torch.equal(a[name], c[name]) for name in a), "another seed gave the same bits: this comparison could not fail"
    assert json.loads((tmp_path / "a" / "report_tf.json").read_text())["deterministic"] is True


def test_deterministic_names_the_operation_that_cannot_be(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trainer.Trainer, "update", lambda *_: torch.zeros(3).put_(torch.tensor([0]), torch.ones(1)))
    with pytest.raises(SystemExit) as stop:
        train.main([*FLAGS, "--steps=4", f"--out={tmp_path}", "--deterministic"])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert stop.value.code == 2 and len(said) == 1 and "put_" in said[0] and "--deterministic" in said[0], said
    assert not torch.are_deterministic_algorithms_enabled() and (tmp_path / "train.pt").exists()


def test_deterministic_looks_after_cublas(monkeypatch):
    """Its scratch memory is chosen by the environment; what the user chose is refused and not overwritten. (No GPU is touched.)"""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with train.repeatable(True, torch.device("cuda")):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    for device, word in (("cuda", ":4096:8 or :16:8"), ("mps", "MPS")):
        with pytest.raises(ValueError, match=word), train.repeatable(True, torch.device(device)):
            pytest.fail("the run began")
    with train.repeatable(False, torch.device("cuda")):
        assert not torch.are_deterministic_algorithms_enabled()


def test_a_disk_that_takes_nothing_is_known_before_training(tmp_path, monkeypatch, capsys):
    def full(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(trainer.Trainer, "update", lambda *_: pytest.fail("trained before it knew that nothing can be written"))
    with pytest.raises(SystemExit) as stop:
        train.main([*FLAGS, "--steps=8", f"--out={tmp_path}"])
    assert stop.value.code == 2 and "No space left" in capsys.readouterr().err


def test_a_damaged_newest_save_costs_its_interval_and_not_the_run(tmp_path, capsys):
    train.main([*FLAGS, "--steps=6", "--save-every=3", f"--out={tmp_path}"])
    whole = tensors(read_checkpoint(tmp_path / "train.pt", set()))
    (tmp_path / "train.pt").write_bytes((tmp_path / "train.pt").read_bytes()[:-1000])
    assert read_checkpoint(previous(tmp_path / "train.pt"), {"step"})["step"] == 3
    train.main([*FLAGS, "--steps=6", "--save-every=3", f"--out={tmp_path}", "--resume"])
    assert "train.prev.pt" in capsys.readouterr().err, "three steps are done again: that must be said"
    assert all(torch.equal(value, whole[name]) for name, value in tensors(read_checkpoint(tmp_path / "train.pt", set())).items())


def test_three_kills_and_as_many_good_restarts():
    """`python tests/kill.py` in short."""
    command = [sys.executable, "tests/kill.py", "--kills=3", "--steps=120", "--longest=1.5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]
