"""Latent attention *is* standard attention when the latent is wide enough, and misses it by
exactly what a narrow one must lose.

Proved here in float64, outputs and gradients, for any sizes, masks and weights (random,
rank-deficient, ill-conditioned):
(E1) content: a dense layer without position is reproduced as soon as C >= rank [W_K; W_V], for
     every route;
(E2) position: a dense layer with full 3D RoPE in every head is reproduced by a positional key
with
     a slice per head, C >= rank W_V;
the shared narrow key is exact if heads agree on it up to a complex factor a pair and the bands
     left out stand still: here the approximation starts; below full rank the error is the tail
     of the singular values (Eckart-Young), never grows with C, and rank(M) <= C.
"""

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import oracles
from lab import (CPU_ROUTES, EXACT, HEADS, NARROW, Dice, assert_alive, assert_same, assert_zero,
                 enliven, error, forall, numbers, route, seeds, weights)

ROUTES = (*CPU_ROUTES, "cheaper")
kinds = st.sampled_from(["random", "rank-deficient", "ill-conditioned"])
counts = st.integers(1, 12)


# ---- layers ---------------------------------------------------------------------------------


def matrix(dice: Dice, outputs: int, inputs: int, kind: str) -> torch.Tensor:
    """Full rank and well behaved, of half that rank, or with singular values from 1 down to
    1e-8."""
    W = dice.normal(outputs, inputs) / inputs**0.5
    if kind == "rank-deficient":
        half = max(1, min(outputs, inputs) // 2)
        up = dice.normal(outputs, half)
        down = dice.normal(half, inputs)
        W = up @ down / (half * inputs) ** 0.5
    elif kind == "ill-conditioned":
        U, S, Z = torch.linalg.svd(W, full_matrices=False)
        S = torch.logspace(0, -8, len(S), dtype=torch.float64)
        W = U @ torch.diag(S) @ Z
    return W


def make_dense(code, H: int, d: int, kind: str, seed: int, rope=None, v_scale: float = 1.0):
    """A dense layer whose keys and values together have the spectrum `kind`, and attention that
    is neither flat nor one-hot."""
    E = H * d
    layer = code.attention.Dense(E, H, rope, norm=False).double()
    enliven(layer, seed)
    K, V = matrix(Dice(seed), 2 * E, E, kind).chunk(2)
    K = K * (E**0.5 / K.norm())                           # keys of size 1 whatever the spectrum
    layer.W_K.weight.data.copy_(K)
    layer.W_V.weight.data.copy_(V * v_scale)
    return layer


def full_rope(code, d: int):
    """Every channel of a head turns."""
    return code.rope3d.Rope3D(d, d)


def rank(W) -> int:
    return int(np.linalg.matrix_rank(numbers(W)))


def product(W_up, W_down):
    return numbers(W_up.weight) @ numbers(W_down.weight)


def named(layer, what) -> dict:
    """what(parameter) of every weight, by the paper's name."""
    return {name.removesuffix(".weight"): what(p) for name, p in layer.named_parameters()}


def total_size(tensors) -> torch.Tensor:
    """The norm of all tensors together."""
    return sum(x.square().sum() for x in tensors).sqrt()


# ---- comparing two layers -------------------------------------------------------------------


class Scene:
    """Tokens, points and a mask for a layer of width E."""

    def __init__(self, code, E: int, B: int, L: int, T: int, masked: bool, seed: int):
        self.code = code
        dice = Dice(seed + 1)
        self.x = dice.normal(B, L, E)
        self.keys = dice.normal(B, T, E)
        self.pull = dice.normal(B, L, E)
        self.x_at = dice.points(L)
        self.keys_at = dice.points(T)
        self.mask = dice.mask(L, T) if masked else None
        self.visible = self.mask.numpy() if masked else np.ones((L, T), bool)

    def table(self, rope, at):
        if rope is None:                                  # no channel turns, tokens still count
            return torch.zeros(len(at), 0), torch.zeros(len(at), 0)
        return rope.table(at, torch.float64)

    def attend(self, layer, x, keys, name):
        q_table = self.table(layer.rope, self.x_at)
        k_table = self.table(layer.rope, self.keys_at)
        attend = route(self.code, name)
        return layer(x, layer.rows(keys), q_table, k_table, self.mask, attend)

    def run(self, layer, name="cheaper"):
        """What a layer answers by the route of that name. (Dense attention ignores it.)"""
        return self.attend(layer, self.x, self.keys, name)

    def oracle(self, dense, theta=1e4):
        places = {}
        if dense.rope is not None:
            places = dict(x_at=self.x_at.numpy(), keys_at=self.keys_at.numpy(), theta=theta)
        y, p = oracles.video_by_video(
            oracles.dense, self.x.numpy(), self.keys.numpy(), weights(dense), heads=dense.heads,
            visible=self.visible, **places)
        assert_alive(p, self.visible)
        return y

    def gradients(self, layer, name="cheaper") -> dict:
        """Of x, of the keys' tokens and of every weight, by name, for the sum of outputs,
        randomly weighted."""
        x = self.x.clone().requires_grad_()
        keys = self.keys.clone().requires_grad_()
        layer.zero_grad()
        y = self.attend(layer, x, keys, name)
        (y * self.pull).sum().backward()
        return dict(x=x.grad, keys=keys.grad) | named(layer, lambda p: p.grad)


def assert_same_layer(scene, dense, mla, what: str, theta=1e4):
    want = scene.oracle(dense, theta)
    assert_same(scene.run(dense), want, EXACT,
                "the dense layer itself is not standard attention")
    for name in ROUTES:
        assert_same(scene.run(mla, name), want, EXACT,
                    f"{what}: MLA by {name} is not the dense layer it was made from")


def expected_gradients(dense, G: dict, mla) -> dict:
    """What the dense layer's gradients G say about the factors of MLA: W = up @ down makes a
    factor's gradient the dense one times the other factor (the chain rule)."""
    H = dense.heads
    W = named(mla, lambda p: p.detach())
    want = dict(x=G["x"], keys=G["keys"], W_O=G["W_O"])
    want["W_UV"] = G["W_V"] @ W["W_DKV"].T
    want["W_DKV"] = W["W_UV"].T @ G["W_V"]
    if mla.rope is None:                               # (E1): scores come through W_UK and W_UQ
        want["W_UK"] = G["W_K"] @ W["W_DKV"].T
        want["W_DKV"] = want["W_DKV"] + W["W_UK"].T @ G["W_K"]
        want["W_UQ"] = G["W_Q"] @ W["W_DQ"].T
        want["W_DQ"] = W["W_UQ"].T @ G["W_Q"]
    else:                                 # (E2): through W_KR and each head's own slice of W_QR
        want["W_KR"] = G["W_K"]
        want["W_QR"] = (G["W_Q"] @ W["W_DQ"].T).unflatten(0, (H, -1))
    return want


def own_slices(W_QR, H: int):
    """Of the rope queries of H heads [H * H * d, Q], what each head has for its own slice of
    the wide key: [H, d, Q]."""
    slices = W_QR.unflatten(0, (H, H, -1))                 # [head, slice, d, Q]
    return torch.stack([slices[h, h] for h in range(H)])


def assert_same_gradients(scene, dense, mla, what: str):
    """Of inputs and W_O, which both sides share, and of every factor. Relative to all gradients
    together: that of the scores vanishes where a query sees one key."""
    G = scene.gradients(dense)
    want = expected_gradients(dense, G, mla)
    size = total_size(G[name] for name in ("W_Q", "W_K", "W_V", "W_O"))
    for way in ROUTES:
        found = scene.gradients(mla, way)
        if mla.rope is not None:
            found["W_QR"] = own_slices(found["W_QR"], dense.heads)
        for name, expected in want.items():
            wrong = ((found[name] - expected).norm() / size).item()
            assert wrong <= EXACT, \
                f"{what}, route {way}: the gradient of {name} differs from the dense layer's " \
                f"by {wrong:.1e}"


# ---- (E1) content ---------------------------------------------------------------------------


@forall(H=st.integers(1, 3), d=st.integers(2, 8), kind=kinds, B=st.integers(1, 2), L=counts,
        T=counts, masked=st.booleans(), wider=st.integers(0, 3), seed=seeds)
def test_content_at_full_rank_is_standard_attention(
        code, H, d, kind, B, L, T, masked, wider, seed):
    E = H * d
    dense = make_dense(code, H, d, kind, seed)
    scene = Scene(code, E, B, L, T, masked, seed)
    full = rank(torch.cat((dense.W_K.weight, dense.W_V.weight)))
    C = min(full + wider, E)
    mla = code.attention.MLA.from_dense(dense, C)
    assert mla.widths == (C, 0), "without position nothing but the content latent is cached"
    assert_same_layer(scene, dense, mla, f"(E1) C = {C} >= rank")
    if full > 1 and kind != "ill-conditioned":             # and the bound is sharp
        narrower = code.attention.MLA.from_dense(dense, full - 1)
        assert error(scene.run(narrower), scene.run(dense)) > 1e-8, \
            "exact below the rank: impossible"


@forall(H=st.integers(1, 3), d=st.integers(2, 6), kind=kinds, B=st.integers(1, 2), L=counts,
        T=counts, masked=st.booleans(), seed=seeds)
def test_content_at_full_rank_has_the_dense_gradients(code, H, d, kind, B, L, T, masked, seed):
    """At C = E: a gradient may leave the subspace that a rank-deficient layer lives in."""
    E = H * d
    dense = make_dense(code, H, d, kind, seed)
    scene = Scene(code, E, B, L, T, masked, seed)
    mla = code.attention.MLA.from_dense(dense, E)
    assert_same_gradients(scene, dense, mla, "(E1)")


# ---- (E2) position --------------------------------------------------------------------------


@forall(H=st.integers(1, 3), d=st.sampled_from(HEADS), kind=kinds, B=st.integers(1, 2),
        L=counts, T=counts, masked=st.booleans(), seed=seeds)
def test_a_slice_per_head_is_standard_attention_with_rope(
        code, H, d, kind, B, L, T, masked, seed):
    E = H * d
    dense = make_dense(code, H, d, kind, seed, full_rope(code, d))
    scene = Scene(code, E, B, L, T, masked, seed)
    C = rank(dense.W_V.weight)
    mla = code.attention.MLA.from_dense(dense, C, R=E)
    assert mla.widths == (C, E), "a slice of the positional key per head"
    slices = numbers(mla.W_QR.weight).reshape(H, H, d, E)
    for head in range(H):
        others = np.delete(slices[head], head, axis=0)
        assert not others.any(), "(E2): a head's rope query must be zero outside its own slice"
    assert_same_layer(scene, dense, mla, "(E2) R = H d_h")
    mla = code.attention.MLA.from_dense(dense, E, R=E)
    assert_same_gradients(scene, dense, mla, "(E2) R = H d_h")


def turned(code, K, alpha):
    """K [H, R, E] with each pair of channels of head h times the complex number alpha [H, R/2],
    in numpy's own complex numbers."""
    pairs = numbers(K).reshape(K.shape[0], -1, 2, K.shape[2])
    z = alpha[..., None] * (pairs[:, :, 0] + 1j * pairs[:, :, 1])
    return torch.tensor(np.stack((z.real, z.imag), axis=2).reshape(K.shape))


def complex_factors(seed: int, H: int, pairs: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    size = draw.uniform(0.5, 2.0, (H, pairs))
    return size * np.exp(2j * np.pi * draw.uniform(size=(H, pairs)))


@forall(shape=st.sampled_from([(R, d) for R, d in NARROW if d <= 14]), H=st.integers(1, 3),
        B=st.integers(1, 2), L=counts, T=counts, masked=st.booleans(),
        factors=st.booleans(), seed=seeds)
def test_a_shared_key_is_exact_where_heads_agree_up_to_a_complex_factor(
        code, shape, H, B, L, T, masked, factors, seed):
    """Two conditions, both needed: the heads' keys of the R fastest channels differ by a
    complex factor a pair at most, and the other bands stand still (theta so large that all
    bands but an axis' first turn by nothing, and none of those is left out)."""
    R, d = shape
    E = H * d
    theta = 1e250
    dense = make_dense(code, H, d, "random", seed, code.rope3d.Rope3D(d, d, theta))
    turning = code.attention.fastest_channels(R, d)
    # A view: what is written here, the layer has.
    K = dense.W_K.weight.data.unflatten(0, (H, d))
    K[:, turning] = K[:1, turning].clone()
    one = K[0, turning].clone()
    if factors:
        K[:, turning] = turned(code, K[:, turning], complex_factors(seed, H, R // 2))
    scene = Scene(code, E, B, L, T, masked, seed)
    mla = code.attention.MLA.from_dense(dense, E, R=R)
    assert mla.widths == (E, R)
    assert_same_layer(scene, dense, mla, f"shared key of R = {R} of {d} channels", theta)
    if not factors:                        # the mean over heads is the case of factors 1
        _, kappa = code.attention.shared_key(K[:, turning])
        sizes = [numbers(x).reshape(-1, 2, E) for x in (kappa, one)]
        assert_same(*[np.linalg.norm(x, axis=(1, 2)) for x in sizes], EXACT,
                    "the key of heads that agree is theirs, but for a turn")
    if H == 1:
        return

    # And this is where the approximation starts: heads that disagree.
    K[:, turning] += Dice(seed).normal(H, R, E) / d**0.5
    mla = code.attention.MLA.from_dense(dense, E, R=R)
    if L * T > 20 and not masked:
        assert error(scene.run(mla), scene.run(dense)) > 1e-6, \
            "heads disagree on their rope keys: one shared key cannot be exact"


@forall(H=st.integers(1, 4), pairs=st.integers(1, 4), E=st.integers(1, 6), seed=seeds)
def test_the_shared_key_is_the_nearest_of_all(code, H, pairs, E, seed):
    """Eckart-Young, pair by pair: what is missed is the tail of the singular values of a
    complex [H, E] matrix. So no factors do better, those of the mean (all 1) among them."""
    K = Dice(seed).normal(H, 2 * pairs, E)
    alpha, kappa = code.attention.shared_key(K)
    alpha = alpha.numpy()
    assert_same((abs(alpha) ** 2).mean(axis=0), np.ones(pairs), EXACT, "the scale of alpha")
    made = turned(code, kappa.expand(H, -1, -1), alpha)
    missed = numbers(made - K).reshape(H, pairs, 2, E)
    mean_missed = numbers(K.mean(0) - K).reshape(H, pairs, 2, E)
    whole = numbers(K).reshape(H, pairs, 2, E)
    for p in range(pairs):
        S = np.linalg.svd(whole[:, p, 0] + 1j * whole[:, p, 1], compute_uv=False)
        found = np.linalg.norm(missed[:, p])
        assert abs(found - tail(S, 1)) <= EXACT * S[0], "not the nearest key of rank 1"
        assert found <= np.linalg.norm(mean_missed[:, p]) + EXACT, "the mean is nearer"


# ---- below full rank ------------------------------------------------------------------------


def tail(S, kept: int) -> float:
    """What the best map of rank `kept` misses (Eckart-Young)."""
    return np.sqrt((S[kept:] ** 2).sum())


@forall(H=st.integers(1, 3), d=st.integers(2, 6), kind=kinds,
        v_scale=st.sampled_from([1e-3, 1.0, 50.0]), seed=seeds)
def test_below_full_rank_the_error_is_the_tail_of_the_singular_values(
        code, H, d, kind, v_scale, seed):
    E = H * d
    dense = make_dense(code, H, d, kind, seed, v_scale=v_scale)
    K = numbers(dense.W_K.weight)
    V = numbers(dense.W_V.weight)
    # The balance: keys and values count alike, whatever scales were learned.
    k_size = np.linalg.norm(K)
    v_size = np.linalg.norm(V)
    target = np.concatenate((K / k_size, V / v_size))
    S = np.linalg.svd(target, compute_uv=False)
    last = np.inf
    for C in range(1, E + 1):
        mla = code.attention.MLA.from_dense(dense, C)
        made_K = product(mla.W_UK, mla.W_DKV)
        made_V = product(mla.W_UV, mla.W_DKV)
        M = np.concatenate((made_K / k_size, made_V / v_size))
        missed = np.linalg.norm(M - target)
        best = tail(S, C)
        # The map has norm sqrt(2); what float64 leaves of it is the width of this equality.
        assert abs(missed - best) <= EXACT, \
            f"Eckart-Young: at C = {C} the best map misses {best:.3e} of [K; V], this one " \
            f"{missed:.3e}. K and V each divided by its norm before the SVD, and multiplied " \
            f"back after?"
        assert rank(M) <= C, f"rank(M) = {rank(M)} > C = {C}"
        assert missed <= last + EXACT, \
            f"the error grew from {last:.3e} to {missed:.3e} when C grew to {C}"
        last = missed


@forall(H=st.integers(1, 3), d=st.integers(2, 6), seed=seeds)
def test_a_narrow_query_latent_is_the_nearest_one(code, H, d, seed):
    E = H * d
    dense = make_dense(code, H, d, "random", seed)
    W_Q = numbers(dense.W_Q.weight)
    S = np.linalg.svd(W_Q, compute_uv=False)
    for Q in range(1, E + 1):
        mla = code.attention.MLA.from_dense(dense, E, Q)
        missed = np.linalg.norm(product(mla.W_UQ, mla.W_DQ) - W_Q)
        assert abs(missed - tail(S, Q)) <= EXACT * np.linalg.norm(W_Q), \
            f"at Q = {Q} the query map is not the nearest of its rank"


@forall(shape=st.sampled_from(NARROW[:8]), H=st.integers(1, 3), C=st.integers(1, 8),
        Q=st.integers(1, 8), seed=seeds)
def test_random_initialisation_keeps_the_sizes_and_nothing_else(code, shape, H, C, Q, seed):
    R, d = shape
    dense = make_dense(code, H, d, "random", seed, full_rope(code, d))
    make = code.attention.MLA.from_dense
    torch.manual_seed(seed)
    spectral = make(dense, C, Q, R, "spectral")
    fresh = make(dense, C, Q, R, "random")
    again = make(dense, C, Q, R, "random")
    assert fresh.scale == spectral.scale == dense.scale
    assert fresh.widths == spectral.widths == (C, R)
    assert fresh.rope == spectral.rope
    assert torch.equal(fresh.W_O.weight, dense.W_O.weight)
    like = dict(spectral.named_parameters())
    other = dict(again.named_parameters())
    for name, W in fresh.named_parameters():
        assert W.shape == like[name].shape and W.dtype == torch.float64, \
            f"{name}: sizes and dtype are those of the spectral layer"
        if not name.startswith("W_O"):
            assert not torch.equal(W, like[name]), f"{name} is not a fresh random draw"
            assert not torch.equal(W, other[name]), f"{name} is not a fresh random draw"
    made_K = product(fresh.W_UK, fresh.W_DKV)
    made_V = product(fresh.W_UV, fresh.W_DKV)
    assert rank(np.concatenate((made_K, made_V))) <= C, \
        "no initialisation can exceed the rank that the latent allows"


# ---- edges ----------------------------------------------------------------------------------


def test_values_that_are_all_zero_do_not_divide_by_zero(code):
    dense = make_dense(code, 2, 4, "random", 0, v_scale=0.0)
    mla = code.attention.MLA.from_dense(dense, 8)
    assert_zero(mla.W_UV.weight.abs() > 1e-12, "values were zero")
    assert_same(product(mla.W_UK, mla.W_DKV), dense.W_K.weight, EXACT,
                "keys are kept exactly at C = E")


def test_from_dense_refuses_in_words(code):
    rope = full_rope(code, 8)
    normed = code.attention.Dense(16, 2, rope)
    turning = code.attention.Dense(16, 2, rope, norm=False)
    plain = code.attention.Dense(16, 2, None, norm=False)
    refused = [
        ("a norm is not linear", normed, 4, dict(R=6)),
        ("'spectral' or 'random'", plain, 4, dict(init="zeros")),
        ("R must be H", turning, 4, {}),
        ("R must be H", turning, 4, dict(R=8)),
        ("between 1 and E", plain, 17, {}),
        ("between 1 and E", plain, 0, {}),
        ("between 1 and E", plain, 4, dict(Q=17)),
        ("between 1 and E", plain, 4, dict(Q=0))]
    for words, dense, C, more in refused:
        with pytest.raises(ValueError, match=words):
            code.attention.MLA.from_dense(dense, C, **more)
