"""A dense layer with Wan's norms and biases *is* MLA in homogeneous coordinates, where the
latent is wide enough: norms and biases on and off, both routes, masks, and a whole model that
streams."""

import pytest
import torch
from hypothesis import strategies as st
from torch import nn

from lab import EXACT, HEADS, NARROW, Dice, assert_same, enliven, error, forall, seeds
from test_full_rank import Scene, complex_factors, turned

counts = st.integers(1, 9)


def a_layer(code, H: int, d: int, seed: int, rope, norm: bool, bias: bool):
    """A dense layer with everything that Wan's has, as asked."""
    E = H * d
    layer = code.attention.Dense(E, H, rope, norm).double()
    for name in ("W_Q", "W_K", "W_V", "W_O"):
        if bias:
            setattr(layer, name, nn.Linear(E, E).double())
    if norm:
        layer.norm_q = nn.RMSNorm(E, 1e-2).double()        # an eps that nobody can overlook
        layer.norm_k = nn.RMSNorm(E, 1e-2).double()
    return enliven(layer, seed)


def assert_both_routes(code, scene, dense, mla, what: str) -> None:
    want = scene.run(dense)
    for name in ("materialised", "absorbed"):
        assert_same(scene.run(mla, name), want, EXACT, f"{what}, route {name}")


@forall(H=st.integers(1, 3), d=st.integers(2, 8), norm=st.booleans(), bias=st.booleans(),
        B=st.integers(1, 2), L=counts, T=counts, masked=st.booleans(), moment=st.booleans(),
        seed=seeds)
def test_content_with_norms_and_biases(code, H, d, norm, bias, B, L, T, masked, moment, seed):
    E = H * d
    dense = a_layer(code, H, d, seed, None, norm, bias)
    scene = Scene(code, E, B, L, T, masked, seed)
    M = None
    if moment:
        mixing = Dice(seed).normal(E, E)
        M = mixing @ mixing.T + torch.eye(E).double()
    mla = code.homogeneous.from_dense(dense, E, moment=M)
    assert mla.widths == (E + 1, 0)
    assert_both_routes(code, scene, dense, mla, "no rope")


@forall(H=st.integers(1, 3), d=st.sampled_from(HEADS), norm=st.booleans(), bias=st.booleans(),
        L=counts, T=counts, masked=st.booleans(), seed=seeds)
def test_full_rope_with_norms_and_biases(code, H, d, norm, bias, L, T, masked, seed):
    E = H * d
    dense = a_layer(code, H, d, seed, code.rope3d.Rope3D(d, d), norm, bias)
    scene = Scene(code, E, 1, L, T, masked, seed)
    mla = code.homogeneous.from_dense(dense, E, R=E)
    assert mla.widths == (E + 1, E)
    assert_both_routes(code, scene, dense, mla, "a slice of the key a head")


@forall(shape=st.sampled_from([(R, d) for R, d in NARROW if d <= 14]), H=st.integers(1, 3),
        norm=st.booleans(), bias=st.booleans(), L=counts, T=counts, masked=st.booleans(),
        seed=seeds)
def test_a_shared_key_with_norms_and_biases(code, shape, H, norm, bias, L, T, masked, seed):
    """Heads agree up to complex factors on rope keys and their biases, gains of pairs are
    equal, and the other channels stand still."""
    R, d = shape
    E = H * d
    dense = a_layer(code, H, d, seed, code.rope3d.Rope3D(d, d, 1e250), norm, bias)
    turning = code.attention.fastest_channels(R, d)
    factors = complex_factors(seed, H, R // 2)
    if norm:
        gains = dense.norm_k.weight.data.unflatten(0, (H, d))
        gains[:, turning] = 1.0
    parts = [dense.W_K.weight.data]
    if bias:
        parts.append(dense.W_K.bias.data[:, None])
    for part in parts:
        K = part.unflatten(0, (H, d))
        K[:, turning] = turned(code, K[:1, turning].expand(H, -1, -1), factors)
    scene = Scene(code, E, 1, L, T, masked, seed)
    mla = code.homogeneous.from_dense(dense, E, R=R)
    assert mla.widths == (E + 1, R)
    assert_both_routes(code, scene, dense, mla, "a shared key")


@forall(H=st.integers(1, 3), d=st.integers(2, 6), seed=seeds)
def test_the_last_number_of_a_row_is_the_keys_norm(code, H, d, seed):
    """(H1), (H2) and (H7), against the dense layer's own divisor."""
    E = H * d
    dense = a_layer(code, H, d, seed, None, True, True)
    mla = code.homogeneous.from_dense(dense, E)
    x = Dice(seed).normal(2, 5, E)
    s, _ = mla.rows(x)
    rho = (dense.W_K(x).square().mean(-1) + 1e-2).sqrt()
    assert_same(s[..., -1], 1 / rho, EXACT, "1 / rho")
    assert_same(s[..., :-1] / s[..., -1:], mla.W_DKV(x), EXACT, "c")


def test_gradients_reach_every_weight(code):
    """Both routes: the layer can be trained on."""
    dense = a_layer(code, 2, 8, 0, code.rope3d.Rope3D(8, 8), True, True)
    scene = Scene(code, 16, 1, 4, 5, False, 0)
    for name in ("materialised", "absorbed"):
        mla = code.homogeneous.from_dense(dense, 5, R=6)
        scene.run(mla, name).square().sum().backward()
        for weight, p in mla.named_parameters():
            assert p.grad is not None and p.grad.abs().sum() > 0, f"{weight}, route {name}"


def test_a_model_streams_as_the_dense_one_does(code):
    """Committed chunk by chunk, beyond the horizon, with a sink: the same velocities at full
    rank; with a narrow latent others, and a cache of C + 1 + R numbers."""
    config = code.mla_video.Config(attention="dense", dim=24, layers=2, heads=2, latent=4,
                                   query_latent=8, rope=6, ffn=24, height=8, width=8,
                                   frames=9, window=6, sink=1)
    dense = enliven(code.mla_video.VideoDiT(config).double(), 0)
    dice = Dice(1)
    full = code.homogeneous.replace_attention(dense, 24, 24)
    small = code.homogeneous.replace_attention(dense, 3, 6)
    assert small.make_cache(1).bytes_per_token == 8 * (3 + 1 + 6)
    models = dict(dense=dense, full=full, small=small)
    caches = {name: model.make_cache(1) for name, model in models.items()}
    caption = torch.ones(1, config.slots, dtype=torch.long)
    attend = code.attention.attend_absorbed
    with torch.no_grad():
        for _ in range(5):
            chunk = dice.normal(1, 3, 3, 8, 8)
            sigma = torch.full((1, 3), 0.5).double()
            said = {}
            for name, model in models.items():
                said[name] = model.denoise(chunk, sigma, caption, caches[name], attend)
                model.commit(chunk, caption, caches[name], attend)
            assert_same(said["full"], said["dense"], EXACT, "at full rank")
            assert error(said["small"], said["dense"]) > 1e-3


def test_it_refuses_in_words(code):
    dense = a_layer(code, 2, 8, 0, code.rope3d.Rope3D(8, 8), True, True)
    for words, C, R in (("between 1 and E", 17, 6), ("between 1 and E", 0, 6),
                        ("R must be H", 4, 8), ("R must be H", 4, None)):
        with pytest.raises(ValueError, match=words):
            code.homogeneous.from_dense(dense, C, R)
