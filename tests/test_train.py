"""Training: the objective, going on from a checkpoint, and being interrupted. Everything on
models small enough for seconds."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

import train
from engine.checkpoint import load_model, read_checkpoint, write_atomically
from engine.trainer import fast_products
from flow import Draws, Stream, add_noise, rollout, shift
from mla_video import PRESETS, VideoDiT
from objectives import teacher_forcing_loss
from toy_data import WORDS, make_world
from train import STAGES, Recipe, Trainer, decay_at, recipe_for

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
SIZES = dict(dim=32, layers=2, heads=2, latent=8, query_latent=16, rope=6, ffn=32)
SMALL = [f"--config={name}={size}" for name, size in SIZES.items()]
CONFIG = replace(PRESETS["toy"], words=len(WORDS), **SIZES)


def run_train(out: Path, *flags: str) -> None:
    train.main([*SMALL, "--batch=4", "--evaluate=2", "--device=cpu", f"--out={out}", *flags])


def take_step(trainer: Trainer) -> float:
    return trainer.update(*trainer.batch(trainer.step)).item()


# ---- flow matching ---------------------------------------------------------------------------

def test_flow_matching_has_one_direction_of_time():
    x0 = torch.randn(2, 3, 3, 8, 8)
    eps = torch.randn(2, 3, 3, 8, 8)
    sigma = torch.rand(2, 3)
    clean = add_noise(x0, eps, torch.zeros(2, 3))
    noise = add_noise(x0, eps, torch.ones(2, 3))
    assert torch.equal(clean, x0), "(F1) sigma = 0 must be the clean video"
    assert torch.equal(noise, eps), "(F1) sigma = 1 must be pure noise"
    v = eps - x0
    back = add_noise(x0, eps, sigma) - sigma[..., None, None, None] * v
    assert (back - x0).abs().max() < 1e-5, "(F4) x0 = x_sigma - sigma v must undo (F1) with (F2)"
    levels = [shift(u, 5.0) for u in (1.0, 0.75, 0.5, 0.25)]
    warped = [1.0, 0.9375, 5 / 6, 0.625]
    assert levels == pytest.approx(warped, abs=1e-12), "the warped step list of the literature"


class Oracle:
    """A model that answers with the true velocity."""
    config = CONFIG

    def __init__(self, x0):
        self.x0 = x0

    def __call__(self, clean, noisy, sigma, caption):
        assert torch.equal(clean, self.x0), "the context must be the clean clip"
        levels = sigma.unflatten(1, (-1, CONFIG.chunk))            # [B, chunks, chunk]
        first = levels[:, :, :1].expand_as(levels)
        assert torch.equal(levels, first), "one noise level per chunk"
        assert (levels[:, 0] != levels[:, 1]).all(), "independent levels between chunks"
        return (noisy - clean) / sigma[..., None, None, None]      # = eps - x0, by (F1)


def test_the_objective_is_the_error_of_the_velocity():
    """The true velocity has no loss."""
    x0 = torch.randn(2, 12, 3, 16, 16)
    caption = torch.zeros(2, 3, dtype=torch.long)
    draws = Draws(torch.Generator().manual_seed(0))
    loss, _, error = teacher_forcing_loss(Oracle(x0), x0, caption, draws, drop=0.0)
    assert loss < 1e-6, f"the true velocity must have no loss, got {loss}"
    assert error.shape == (2, 12)


# ---- learning --------------------------------------------------------------------------------

def test_the_loss_falls_and_captions_matter():
    torch.manual_seed(0)
    recipe = Recipe(steps=60, batch=8, warmup=5)
    trainer = Trainer(VideoDiT(CONFIG), recipe, make_world("shapes"), CPU)
    losses = [take_step(trainer) for _ in range(60)]
    early = np.mean(losses[:5])
    late = np.mean(losses[-10:])
    assert late < 0.6 * early, f"60 steps must learn something: {losses[::10]}"
    average = dict(trainer.ema.named_parameters())
    moved = set()
    idle = set()
    for name, weight in trainer.model.named_parameters():
        group = idle if torch.equal(weight, average[name]) else moved
        group.add(name)
    assert any("words" in name for name in moved), \
        "caption embeddings never moved: conditioning is not connected"
    assert not idle, f"these parameters never changed in training: {idle}"


@pytest.mark.parametrize("stage", ["score", "tf"])
def test_a_young_average_trails_by_a_tenth_of_the_run(stage):
    """The average of the numbers 0, 1, 2, ..., s, taken as the weights' is, is 0.9 s - 0.1 as
    long as it is young, and trails by ema / (1 - ema) steps once it is not."""
    recipe = Recipe(stage=stage, ema=0.99)
    average = -1.0
    for step in range(5000):
        decay = decay_at(step, recipe)
        average = decay * average + (1 - decay) * step
        if step < 800:
            assert average == pytest.approx(0.9 * step - 0.1, abs=1e-6)
    assert step - average == pytest.approx(0.99 / 0.01, rel=1e-6)


@pytest.mark.parametrize("stage", ["cd", "dmd"])
def test_the_average_of_a_distilled_model_has_one_length(stage):
    """It begins as weights that are good already."""
    recipe = Recipe(stage=stage, ema=0.98)
    assert {decay_at(step, recipe) for step in range(100)} == {0.98}


@pytest.mark.rest
# ---- going on --------------------------------------------------------------------------------

def test_resuming_gives_the_weights_of_an_unbroken_run(tmp_path):
    run_train(tmp_path / "whole", "--steps=8", "--evaluate=0")
    run_train(tmp_path / "parts", "--steps=8", "--evaluate=0")
    # The schedule depends on the number of steps in all, so an honest interruption is one in the
    # middle of the same run.
    torch.manual_seed(0)
    recipe = Recipe(steps=8, batch=4)
    trainer = Trainer(VideoDiT(CONFIG), recipe, make_world("shapes"), CPU)
    with fast_products():                                  # as train.py has them
        for _ in range(3):
            take_step(trainer)
    trainer.asked = read_checkpoint(tmp_path / "parts" / "train.pt", set())["asked"]
    write_atomically(tmp_path / "parts" / "train.pt", trainer.state())
    run_train(tmp_path / "parts", "--steps=8", "--evaluate=0", "--resume")
    whole = read_checkpoint(tmp_path / "whole" / "train.pt", set())
    parts = read_checkpoint(tmp_path / "parts" / "train.pt", set())
    assert parts["step"] == whole["step"] == 8
    pairs = [(whole["ema"], parts["ema"]),
             (whole["learner"]["model"], parts["learner"]["model"])]
    for mine, theirs in pairs:
        for name, value in mine.items():
            assert torch.equal(value, theirs[name]), \
                f"{name} differs after a resume: some state was not restored"


@pytest.mark.rest
def test_ctrl_c_leaves_a_loadable_checkpoint(tmp_path):
    command = [sys.executable, "train.py", *SMALL, "--batch=4", "--steps=100000",
               "--device=cpu", f"--out={tmp_path}"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)
    line = ""
    while "/100000" not in line:                           # of the progress
        line = process.stderr.readline()
        assert process.poll() is None, line
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors, errors[-500:]
    assert read_checkpoint(tmp_path / "train.pt", {"step"})["step"] > 0
    model, about = load_model(tmp_path / "model.pt")
    stream = Stream(model, torch.zeros(1, 3, dtype=torch.long))
    chunk = next(rollout(stream, 3, Draws(), steps=1))
    assert chunk.isfinite().all() and about["data"] == "shapes"


def test_a_save_that_fails_costs_nothing(tmp_path, monkeypatch):
    target = tmp_path / "train.pt"
    write_atomically(target, {"step": 1})

    def full_disk(content, path):
        path.write(b"half a file")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError):
        write_atomically(target, {"step": 2})
    kept = read_checkpoint(target, {"step"})
    assert kept == {"step": 1}, "the previous checkpoint must survive a save that dies half-way"


@pytest.mark.rest
# ---- other data, and other ways to compute -----------------------------------------------------

@pytest.mark.parametrize("data", ["digits", "occluder", "moving_mnist.npy"])
@pytest.mark.parametrize("attention", ["mla", "dense"])
def test_other_data_trains_and_samples(tmp_path, data, attention):
    if data.endswith(".npy"):              # the layout of the Moving MNIST file: [T, N, H, W]
        data = str(tmp_path / data)
        pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 64, 64), dtype=np.uint8)
        np.save(data, pixels)
    out = tmp_path / "out"
    run_train(out, "--steps=2", f"--data={data}", f"--attention={attention}")
    model, about = load_model(out / "model.pt")
    assert model.config.attention == attention and about["steps"] == 2
    assert (out / "sample.gif").stat().st_size > 1000
    report = json.loads((out / "report_tf.json").read_text())
    origin = {"command", "commit", "device", "versions"}
    assert origin | {"survival", "training_seconds"} <= report.keys()


def train_with(stage: str, backend: str | None):
    """(losses, the learner's weights at the end minus those at the start, in one vector)."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    model = VideoDiT(CONFIG)
    torch.nn.init.normal_(model.head.weight, std=0.05)
    recipe = recipe_for(stage, CPU, steps=4, batch=4)
    trainer = Trainer(model, recipe, make_world("shapes"), CPU, model, compile=backend)
    # The generator's first step in dmd is zero: real score and critic are the same yet.
    learner = trainer.critic or trainer.learner
    before = [weight.detach().clone() for weight in learner.weights]
    for x0, caption in trainer.batches():
        trainer.update(x0.double(), caption)
    trainer.read_losses()
    names = set(trainer.state()["ema"])
    assert names == set(model.state_dict()), \
        "a checkpoint must not show how its weights were trained"
    losses = []
    for pairs in trainer.losses.values():
        losses += [loss for _, loss in pairs]
    moved = [new.detach() - old for new, old in zip(learner.weights, before)]
    return losses, torch.cat([part.flatten() for part in moved])


@pytest.mark.rest
@pytest.mark.parametrize("stage", STAGES)
def test_compiled_passes_train_alike(stage):
    """`--compile` changes how a pass over whole clips is computed, not what: same losses, same
    steps to 1e-10 of their length, in float64. (Another order is off by 1e-13; a pass that loses
    a gradient by all of it.) By a backend that needs no compiler."""
    counters.clear()
    try:
        plain, moved = train_with(stage, None)
        fused, other = train_with(stage, "aot_eager")
    finally:
        torch.set_default_dtype(torch.float32)
    assert counters["stats"]["unique_graphs"] > 0, \
        "nothing was compiled: this comparison proves nothing"
    assert fused == pytest.approx(plain, rel=1e-10, abs=1e-14), \
        f"{stage}: losses of compiled passes differ"
    assert moved.norm() > 1e-4
    assert (moved - other).norm() < 1e-10 * moved.norm(), \
        f"{stage}: compiled passes leave other weights"
