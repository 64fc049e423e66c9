"""Training: the objective, going on from a checkpoint, and being interrupted. Everything on models small enough for seconds."""

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
from checkpoint import load_model, read_checkpoint, write_atomically
from mla_video import PRESETS, VideoDiT
from sample import add_noise, rollout, shift
from toy_data import WORDS, make_world
from objectives import teacher_forcing_loss
from trainer import STAGES, Recipe, Trainer, recipe_for

ROOT = Path(__file__).parent.parent
SMALL = [f"--config={item}" for item in ("dim=32", "layers=2", "heads=2", "latent=8", "query_latent=16", "rope=6", "ffn=32")]
CONFIG = replace(PRESETS["toy"], dim=32, layers=2, heads=2, latent=8, query_latent=16, rope=6, ffn=32, words=len(WORDS))


def run_train(out: Path, *flags: str) -> None:
    train.main([*SMALL, "--batch=4", "--evaluate=2", "--device=cpu", f"--out={out}", *flags])


def test_flow_matching_has_one_direction_of_time():
    x0, eps = torch.randn(2, 3, 3, 8, 8), torch.randn(2, 3, 3, 8, 8)
    sigma = torch.rand(2, 3)
    assert torch.equal(add_noise(x0, eps, torch.zeros(2, 3)), x0), "(F1) sigma = 0 must be the clean video"
    assert torch.equal(add_noise(x0, eps, torch.ones(2, 3)), eps), "(F1) sigma = 1 must be pure noise"
    back = add_noise(x0, eps, sigma) - sigma[..., None, None, None] * (eps - x0)
    assert (back - x0).abs().max() < 1e-5, "(F4) x0 = x_sigma - sigma v must undo (F1) with v of (F2)"
    levels = [shift(u, 5.0) for u in (1.0, 0.75, 0.5, 0.25)]
    assert levels == pytest.approx([1.0, 0.9375, 5 / 6, 0.625], abs=1e-12), "the warped step list of the literature"


def test_the_objective_is_the_error_of_the_velocity():
    """A model that answers with the true velocity has zero loss; one that answers 0 has the loss E|eps - x0|^2."""
    recipe, x0, caption = Recipe(drop=0.0), torch.randn(2, 12, 3, 16, 16), torch.zeros(2, 3, dtype=torch.long)

    class Oracle:
        config = CONFIG

        def __call__(self, clean, noisy, sigma, caption):
            assert torch.equal(clean, x0), "the context must be the clean clip"
            per_chunk = sigma.unflatten(1, (-1, CONFIG.chunk))
            assert torch.equal(per_chunk, per_chunk[:, :, :1].expand_as(per_chunk)), "one noise level per chunk"
            assert (per_chunk[:, 0] != per_chunk[:, 1]).all(), "independent levels between chunks"
            return (noisy - clean) / sigma[..., None, None, None]                        # = eps - x0, by (F1)

    loss, _, error = teacher_forcing_loss(Oracle(), x0, caption, recipe, torch.Generator().manual_seed(0))
    assert loss < 1e-6 and error.shape == (2, 12), f"the true velocity must have no loss, got {loss}"


def test_the_loss_falls_and_captions_matter():
    torch.manual_seed(0)
    trainer = Trainer(VideoDiT(CONFIG), Recipe(steps=60, batch=8, warmup=5), make_world("shapes"), torch.device("cpu"))
    losses = [trainer.update(*trainer.batch(trainer.step)).item() for _ in range(60)]
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:5]), f"60 steps must learn something: {losses[::10]}"
    grads = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, dict(trainer.ema.named_parameters())[name])}
    assert any("words" in name for name in grads), "caption embeddings never moved: conditioning is not connected"
    idle = [name for name, p in trainer.model.named_parameters() if name not in grads]
    assert not idle, f"these parameters never changed in training: {idle}"


def test_resuming_gives_the_weights_of_an_unbroken_run(tmp_path):
    run_train(tmp_path / "whole", "--steps=8", "--evaluate=0")
    run_train(tmp_path / "parts", "--steps=8", "--evaluate=0")
    # The schedule depends on the number of steps in all, so an honest interruption is one in the middle of the same run.
    torch.manual_seed(0)
    trainer = Trainer(VideoDiT(CONFIG), Recipe(steps=8, batch=4), make_world("shapes"), torch.device("cpu"))
    for _ in range(3):
        trainer.update(*trainer.batch(trainer.step))
    write_atomically(tmp_path / "parts" / "train.pt", trainer.state())
    run_train(tmp_path / "parts", "--steps=8", "--evaluate=0", "--resume")
    whole, parts = (read_checkpoint(tmp_path / name / "train.pt", set()) for name in ("whole", "parts"))
    assert parts["step"] == whole["step"] == 8
    for mine, theirs in ((whole["ema"], parts["ema"]), (whole["learner"]["model"], parts["learner"]["model"])):
        for name, value in mine.items():
            assert torch.equal(value, theirs[name]), f"{name} differs after a resume: some state was not restored"


def test_ctrl_c_leaves_a_loadable_checkpoint(tmp_path):
    process = subprocess.Popen([sys.executable, "train.py", *SMALL, "--batch=4", "--steps=100000", "--device=cpu", f"--out={tmp_path}"],
                               cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while "/100000" not in (line := process.stderr.read(200)):
        assert process.poll() is None, line
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors, errors[-500:]
    assert read_checkpoint(tmp_path / "train.pt", {"step"})["step"] > 0
    model, about = load_model(tmp_path / "model.pt")
    assert next(rollout(model, torch.zeros(1, 3, dtype=torch.long), 3, steps=1)).isfinite().all() and about["data"] == "shapes"


def test_a_save_that_fails_costs_nothing(tmp_path, monkeypatch):
    target = tmp_path / "train.pt"
    write_atomically(target, {"step": 1})

    def full_disk(content, path):
        path.write(b"half a file")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError):
        write_atomically(target, {"step": 2})
    assert read_checkpoint(target, {"step"}) == {"step": 1}, "the previous checkpoint must survive a save that dies half-way"


@pytest.mark.parametrize("data", ["digits", "occluder", "moving_mnist.npy"])
@pytest.mark.parametrize("attention", ["mla", "dense"])
def test_other_data_trains_and_samples(tmp_path, data, attention):
    if data.endswith(".npy"):                              # the layout of the Moving MNIST file: [T, N, H, W], uint8
        data = str(tmp_path / data)
        np.save(data, np.random.default_rng(0).integers(0, 256, (20, 8, 64, 64), dtype=np.uint8))
    run_train(tmp_path / "out", "--steps=2", f"--data={data}", f"--attention={attention}")
    model, about = load_model(tmp_path / "out" / "model.pt")
    assert model.config.attention == attention and about["steps"] == 2
    assert (tmp_path / "out" / "sample.gif").stat().st_size > 1000
    report = json.loads((tmp_path / "out" / "report_tf.json").read_text())
    assert {"command", "commit", "device", "versions", "survival", "training_seconds"} <= report.keys()


@pytest.mark.parametrize("stage", STAGES)
def test_compiled_passes_train_alike(stage):
    """`--compile` changes how a pass over whole clips is computed, not what: same losses, same steps to 1e-5 of their length (float32 in
    another order is off by less than 1e-7; a pass that loses a gradient by all of it). By a backend that needs no compiler."""
    def run(backend):
        torch.manual_seed(0)
        model = VideoDiT(CONFIG)
        torch.nn.init.normal_(model.head.weight, std=0.05)
        trainer = Trainer(model, recipe_for(stage, torch.device("cpu"), steps=4, batch=4), make_world("shapes"), torch.device("cpu"), model,
                          compile=backend)
        learner = trainer.critic or trainer.learner        # dmd's first generator step is zero: real score and critic are the same yet
        before = [weight.detach().clone() for weight in learner.weights]
        for batch in trainer.batches():
            trainer.update(*batch)
        trainer.read_losses()
        assert set(trainer.state()["ema"]) == set(model.state_dict()), "a checkpoint must not show how its weights were trained"
        return [value for pairs in trainer.losses.values() for _, value in pairs], \
            torch.cat([(new.detach() - old).flatten() for new, old in zip(learner.weights, before)])

    counters.clear()
    (plain, moved), (fused, other) = run(None), run("aot_eager")
    assert counters["stats"]["unique_graphs"] > 0, "nothing was compiled: this comparison proves nothing"
    assert fused == pytest.approx(plain, rel=1e-5, abs=1e-9), f"{stage}: losses of compiled passes differ"
    assert moved.norm() > 1e-4 and (moved - other).norm() < 1e-5 * moved.norm(), f"{stage}: compiled passes leave other weights"
