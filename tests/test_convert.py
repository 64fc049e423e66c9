"""A dense model becomes MLA: where it is exact, that it loses least on its own inputs, and the
command line of `train.py --from-dense`.

(C1) to (C3) are in engine/convert.py; the shared key of (E4) is in test_full_rank.py.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import nn

import train
from engine.checkpoint import load_model, read_checkpoint, save_model, write_atomically
from engine.clips import open_world
from experiments import convert as experiment
from lab import (EXACT, NARROW, Dice, assert_same, enliven, error, forall, numbers, seeds)
from mla_video import PRESETS, VideoDiT
from test_cli import fails_in_one_line
from test_full_rank import Scene, complex_factors, turned
from toy_data import WORDS, make_world

SHAPES = st.sampled_from([(R, d) for R, d in NARROW if d <= 14])
STILL = 1e250              # theta, for bands that do not turn but for an axis' first


def a_layer(code, R: int, d: int, H: int, seed: int, norm: bool):
    """A dense layer whose heads' rope keys differ by complex factors, and M of its inputs."""
    E = H * d
    rope = code.rope3d.Rope3D(d, d, STILL)
    layer = enliven(code.attention.Dense(E, H, rope, norm).double(), seed)
    K = layer.W_K.weight.data.unflatten(0, (H, d))
    turning = code.attention.fastest_channels(R, d)
    K[:, turning] = turned(code, K[:1, turning].expand(H, -1, -1),
                           complex_factors(seed, H, R // 2))
    mixing = Dice(seed + 2).normal(E, E)
    return layer, mixing @ mixing.T / E + 0.1 * torch.eye(E, dtype=torch.float64)


def content_of(code, R: int, d: int) -> list[int]:
    """The channels of a head of d that no longer turn."""
    turning = code.attention.fastest_channels(R, d)
    return [channel for channel in range(d) if channel not in turning]


# ---- where it is exact -----------------------------------------------------------------------

@forall(shape=SHAPES, H=st.integers(1, 3), weighed=st.booleans(), masked=st.booleans(),
        seed=seeds)
def test_heads_that_agree_are_kept_whatever_the_inputs(code, shape, H, weighed, masked, seed):
    """(C1) and (C2) are changes of coordinates: at full rank nothing is lost by them."""
    R, d = shape
    E = H * d
    dense, M = a_layer(code, R, d, H, seed, norm=False)
    scene = Scene(code, E, 1, 5, 7, masked, seed)
    mla = code.convert.convert_layer(dense, M, E, E, R, norm=False, weighed=weighed)
    for name in ("materialised", "absorbed"):
        assert_same(scene.run(mla, name), scene.run(dense), 1e-8,
                    f"a dense layer at full rank, inputs of any covariance, route {name}")


@forall(shape=SHAPES, H=st.integers(1, 3), seed=seeds)
def test_the_norm_of_the_query_latent_is_the_dense_norm(code, shape, H, seed):
    """(C3) at Q = E, for the content channels (those that turn have alpha folded in)."""
    R, d = shape
    E = H * d
    dense, M = a_layer(code, R, d, H, seed, norm=True)
    mla = code.convert.convert_layer(dense, M, E, E, R, norm=True, weighed=False)
    x = 3 * Dice(seed).normal(2, 5, E)
    content = content_of(code, R, d)
    q = dense.norm_q(dense.W_Q(x))
    want = q.unflatten(-1, (H, d))[..., content]
    latent = mla.norm_q(mla.W_DQ(x))
    got = mla.W_UQ(latent).unflatten(-1, (H, -1))
    assert_same(got, want, 1e-7, "queries with Wan's norm")


@forall(shape=SHAPES, H=st.integers(1, 3), seed=seeds)
def test_keys_and_values_keep_their_size_under_the_norm_of_the_latent(code, shape, H, seed):
    """(C3): keys are divided by the dense layer's own norm at C = E; values, which dense
    attention does not divide, keep their mean square roughly."""
    R, d = shape
    E = H * d
    dense, M = a_layer(code, R, d, H, seed, norm=True)
    mla = code.convert.convert_layer(dense, M, E, E, R, norm=True, weighed=False)
    S, _ = code.convert.roots(M)
    x = Dice(seed).normal(400, E) @ S
    content = content_of(code, R, d)
    c_kv, _ = mla.rows(x)
    k = dense.norm_k(dense.W_K(x))
    want = k.unflatten(-1, (H, d))[..., content]
    got = mla.W_UK(c_kv).unflatten(-1, (H, -1))
    assert_same(got, want, 1e-6, "keys with Wan's norm")
    assert error(mla.W_UV(c_kv), dense.W_V(x)) < 0.8


# ---- what it loses ---------------------------------------------------------------------------

@forall(shape=SHAPES, H=st.integers(1, 3), C=st.integers(1, 6), seed=seeds)
def test_no_map_of_this_rank_loses_less_on_these_inputs(code, shape, H, C, seed):
    """(C1): the mean square of what keys and values miss is the tail of the singular values of
    [K; V] M^1/2, both balanced. Cut by the weights alone it is that or more."""
    R, d = shape
    dense, M = a_layer(code, R, d, H, seed, norm=False)
    S, _ = code.convert.roots(M)
    content = content_of(code, R, d)
    K = dense.W_K.weight.detach().unflatten(0, (H, d))[:, content].flatten(0, 1)
    V = dense.W_V.weight.detach()
    sizes = [(K @ S).norm(), (V @ S).norm()]
    whole = torch.cat((K / sizes[0], V / sizes[1])) @ S
    best = np.linalg.svd(numbers(whole), compute_uv=False)[C:]

    def missed(mla) -> float:
        made_K = mla.W_UK.weight @ mla.W_DKV.weight
        made_V = mla.W_UV.weight @ mla.W_DKV.weight
        made = torch.cat((made_K / sizes[0], made_V / sizes[1])) @ S
        return (made - whole).norm().item()

    how = dict(C=C, Q=H * d, R=R, norm=False, weighed=False)
    mla = code.convert.convert_layer(dense, M, **how)
    assert abs(missed(mla) - np.linalg.norm(best)) < 1e-8
    assert missed(code.convert.convert_layer(dense, torch.eye(H * d).double(), **how)) \
        >= missed(mla) - 1e-8


def test_second_moments_without_clips_are_those_of_white_tokens(code):
    """x = LayerNorm(h) (1 + scale) + offset for noise h, at the levels that training draws."""
    config = replace(PRESETS["toy"], attention="dense", layers=1, dim=32, heads=2, rope=6)
    model = enliven(code.mla_video.VideoDiT(config), 0)
    (M,) = code.convert.moments_of_weights(model)
    u = torch.rand(200, 1, generator=torch.Generator().manual_seed(0))
    sigma = code.flow.shift(torch.sigmoid(torch.special.ndtri(u)))
    sigma = torch.cat((torch.zeros_like(sigma), sigma))    # as many clean ones
    with torch.no_grad():
        level = model.level(model.time(code.mla_video.sinusoid(sigma, 256)))
        steer = level.unflatten(-1, (6, 32)) + model.blocks[0].modulation      # [400, 1, 6, 32]
        offset, scale = steer[:, :, :2, None].unbind(2)    # [400, 1, 1, 32] each
        normed = nn.functional.layer_norm(torch.randn(400, 1, 200, 32), [32])
        x = normed * (1 + scale) + offset
    x = x.flatten(0, 2).double()
    assert error(M, x.T @ x / len(x)) < 0.05


def test_moments_are_of_what_keys_are_made_of_clean_and_noisy(code):
    config = replace(PRESETS["toy"], attention="dense", layers=2, dim=32, heads=2, rope=6,
                     words=len(WORDS), frames=6, window=6)
    model = enliven(code.mla_video.VideoDiT(config), 0)
    video, caption = make_world("shapes", frames=6).batch(range(2))
    heard = []
    for block in model.blocks:
        rows = block.attention.rows

        def listen(x, rows=rows):
            heard.append(x)
            return rows(x)

        block.attention.rows = listen
    moments = code.convert.moments_on(model, video, caption)
    for M, x in zip(moments, heard):
        assert x.shape == (2, 2 * 6 * 16, 32), "the clip twice: clean and noisy"
        products = torch.einsum("b t i, b t j -> i j", x, x)
        assert_same(M, products / (2 * 2 * 6 * 16), 1e-5, "M")


def test_everything_but_self_attention_stays(code):
    torch.manual_seed(0)
    config = replace(PRESETS["toy"], layers=2, dim=32, heads=2, query_latent=16, rope=6)
    dense = VideoDiT(replace(config, attention="dense"))
    mla = code.convert.convert(dense, config, code.convert.moments_of_weights(dense))
    old = dense.state_dict()
    new = mla.state_dict()
    rest = [name for name in old if ".attention." not in name]
    assert rest and all(torch.equal(old[name], new[name]) for name in rest)
    assert isinstance(mla.blocks[1].attention.norm_kv, nn.RMSNorm)
    with pytest.raises(ValueError, match="ffn is 512"):
        code.convert.convert(dense, replace(config, ffn=64), [])


# ---- train.py --from-dense -------------------------------------------------------------------

SIZES = dict(dim=32, layers=1, heads=2, latent=8, query_latent=16, rope=6, ffn=32, frames=6,
             window=6)
SMALL = [f"--config={name}={size}" for name, size in SIZES.items()]
FLAGS = [*SMALL, "--device=cpu", "--batch=2", "--evaluate=0"]
CONFIG = replace(PRESETS["toy"], **SIZES, words=len(WORDS))


@pytest.fixture
def dense_file(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "report", lambda *rest: None)   # no pictures: seconds each
    torch.manual_seed(0)
    model = enliven(VideoDiT(replace(CONFIG, attention="dense", rope=8)), 0)
    path = tmp_path / "dense.pt"
    world = open_world("shapes", 6, 16, 0, None, False)
    save_model(path, model, data="shapes", fingerprint=world.fingerprint, stage="tf", steps=0,
               seed=0)
    return path


@pytest.mark.parametrize("conversion", [
    "data",
    pytest.param("weights", marks=pytest.mark.rest),
])
def test_a_dense_model_learns_on_as_mla(code, tmp_path, dense_file, capsys, conversion):
    """It starts from the converted weights; stopped and gone on with, it is an unbroken run;
    and it keeps what it was begun with."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    begin = [*FLAGS, f"--from-dense={dense_file}", f"--conversion={conversion}"]
    train.main([*begin, "--steps=4", f"--out={whole}"])
    said = capsys.readouterr().out
    assert f"starts from {dense_file}, made MLA by its {conversion}" in said
    model, _ = load_model(whole / "tf.pt")
    assert model.config == CONFIG

    dense, _ = load_model(dense_file)
    if conversion == "data":
        clips = make_world("shapes", frames=6).batch(range(code.convert.CLIPS))
        moments = code.convert.moments_on(dense, *clips, 0)
    else:
        moments = code.convert.moments_of_weights(dense)
    expected = code.convert.convert(dense, CONFIG, moments).state_dict()
    moved = [error(value, expected[name]) for name, value in model.state_dict().items()
             if name.endswith(("W_DKV.weight", "W_UQ.weight", "W_KR.weight"))]
    assert len(moved) == 3 and max(moved) < 0.02, "four small steps away from where it began"

    stop = train.Trainer.update

    def stopped(trainer, *batch):
        if trainer.step == 2 and not list(parts.glob("*.prev.pt")):
            train.save(trainer, parts)
            raise KeyboardInterrupt
        return stop(trainer, *batch)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train.Trainer, "update", stopped)
        train.main([*begin, "--steps=4", f"--out={parts}"])
    dense_file.unlink()                                    # it has served
    train.main([*SMALL, "--device=cpu", "--evaluate=0", "--resume", f"--out={parts}"])
    ends = [read_checkpoint(out / "train.pt", set()) for out in (whole, parts)]
    for name, value in ends[0]["ema"].items():
        assert torch.equal(value, ends[1]["ema"][name]), f"{name} differs after a resume"
    assert ends[1]["asked"]["from_dense"] == str(dense_file)
    assert ends[1]["asked"]["conversion"] == conversion
    capsys.readouterr()
    fails_in_one_line(capsys, train.main, ["--resume", f"--out={parts}", "--from-dense=other"],
                      "--from-dense", "other", "dense.pt")


def test_a_train_pt_without_the_flag_goes_on(tmp_path, dense_file):
    """As one that was written before there was --from-dense."""
    out = f"--out={tmp_path}"
    train.main([*FLAGS, "--steps=1", out])
    path = tmp_path / "train.pt"
    state = read_checkpoint(path, set())
    del state["asked"]["from_dense"], state["asked"]["conversion"]
    write_atomically(path, state)
    train.main(["--resume", "--steps=2", "--device=cpu", "--evaluate=0", out])
    assert read_checkpoint(path, set())["step"] == 2


@pytest.mark.parametrize("flags, words", [
    (["--from-dense=missing.pt"], ["missing.pt", "--attention dense"]),
    (["--config=heads=1"], ["its heads is 2", "1 is needed"]),
    (["--config=rope=16"], ["16 rope channels", "head of 16"]),
    (["--config=latent=33"], ["width 32", "latent 32 at most", "33"]),
    (["--config=query_latent=64"], ["query_latent 32 at most", "64"]),
    (["--config=norm=0"], ["its norm is True"]),
    (["--data=occluder"], ["its data is shapes", "occluder is needed"]),
    (["--attention=dense"], ["--from-dense", "--attention dense"]),
    (["--stage=score"], ["--from-dense", "--stage score"]),
    (["--start=x.pt"], ["--from-dense", "--start"]),
    (["--conversion=luck"], ["luck", "weights"]),
])
def test_what_cannot_become_mla_is_said_in_one_line(
        capsys, tmp_path, dense_file, flags, words):
    out = tmp_path / "new"
    argv = [*FLAGS, "--steps=1", f"--out={out}", f"--from-dense={dense_file}", *flags]
    fails_in_one_line(capsys, train.main, argv, *words)
    assert not list(out.glob("*")), "a refused command must not write anything"


def test_a_model_that_is_mla_already_is_named(capsys, tmp_path, dense_file):
    save_model(dense_file, VideoDiT(CONFIG), data="shapes", stage="tf")
    argv = [*FLAGS, f"--out={tmp_path / 'new'}", f"--from-dense={dense_file}"]
    fails_in_one_line(capsys, train.main, argv, "its attention is mla", "dense is needed")
    fails_in_one_line(capsys, train.main, [*FLAGS, "--conversion=weights"], "--conversion",
                      "--from-dense")


@pytest.mark.rest
def test_in_all_stages_tf_is_what_starts_from_it(tmp_path, dense_file, capsys):
    train.main([*FLAGS, "--stage=all", "--steps=1", f"--from-dense={dense_file}",
                f"--out={tmp_path / 'all'}"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "starts from" in line]
    starts = {line.split(":")[0]: line.split("starts from ")[1] for line in lines}
    assert starts["score"] == "scratch"
    assert starts["tf"].startswith(str(dense_file))
    assert starts["cd"].endswith("tf.pt")


# ---- the experiment --------------------------------------------------------------------------

def a_finding(mean, factors, weighed):
    """(error, loss) of each key as experiments/convert.py keeps them, for one model."""
    keys = dict(mean=mean, factors=factors, weighed=weighed)
    cut = {f"E/8, data, {key}": {"error": pair[0]} for key, pair in keys.items()}
    tuned = {key: {"loss": pair[1]} for key, pair in keys.items()}
    return {"cut": cut, "tuned": tuned}


def test_the_rule_can_come_out_either_way():
    better = [a_finding((0.3, 0.2), (0.1, 0.2), (0.1, 0.2)),
              a_finding((0.2, 0.21), (0.07, 0.2), (0.07, 0.2)),
              a_finding((0.25, 0.2), (0.08, 0.21), (0.08, 0.21))]
    factors, weighed = experiment.judge(better)
    assert factors["holds"] is True and factors["new"] == "factors"
    assert weighed["holds"] is False, "no better than what it would replace"
    worse_later = [a_finding((0.3, 0.2), (0.1, 0.25), (0.1, 0.2)),
                   a_finding((0.2, 0.2), (0.07, 0.25), (0.07, 0.2)),
                   a_finding((0.25, 0.2), (0.08, 0.26), (0.08, 0.2))]
    assert experiment.judge(worse_later)[0]["holds"] is False
    assert experiment.judge(better[:1])[0]["holds"] is None, "one model decides nothing"


def test_the_mean_key_is_the_heads_mean(code):
    dense, _ = a_layer(code, 6, 8, 2, 0, norm=False)
    with torch.no_grad():
        mla = experiment.by_the_mean(dense, 16, 16, 6)
    turning = code.attention.fastest_channels(6, 8)
    K = dense.W_K.weight.unflatten(0, (2, 8))[:, turning]
    assert_same(mla.W_KR.weight, K.mean(0), EXACT, "W_KR")
    Q = dense.W_Q.weight.unflatten(0, (2, 8))[:, turning].flatten(0, 1)
    assert_same(mla.W_QR.weight @ mla.W_DQ.weight, Q, EXACT, "queries as they were")


@pytest.mark.rest
def test_it_is_measured_from_the_command_line(tmp_path, dense_file, capsys, monkeypatch):
    monkeypatch.setattr(experiment, "CLIPS", 2)
    monkeypatch.setattr(experiment, "BATCH", 2)
    path = tmp_path / "found.json"
    experiment.main(["--dense", str(dense_file), "--steps=1", f"--json={path}", "--device=cpu"])
    said = capsys.readouterr().out
    assert "mean of the heads' keys" in said and "random" in said
    save_model(dense_file, VideoDiT(CONFIG), data="shapes", stage="tf")
    argv = ["--dense", str(dense_file)]
    fails_in_one_line(capsys, experiment.main, argv, "not a dense model")
