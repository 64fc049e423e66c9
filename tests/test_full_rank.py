"""Latent attention *is* standard attention when the latent is wide enough, and misses it by exactly what a narrow one must lose.

Proved here in float64, outputs and gradients, for any sizes, masks and weights (random, rank-deficient, ill-conditioned):
(E1) content: a dense layer without position is reproduced as soon as C >= rank [W_K; W_V], for every route;
(E2) position: a dense layer with full 3D RoPE in every head is reproduced by a positional key with a slot per head, C >= rank W_V;
the shared narrow key is exact if heads agree on it and the bands left out stand still: here the approximation starts;
below full rank the error is the tail of the singular values (Eckart-Young), never grows with C, and rank(M) <= C.
"""

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import oracles
from lab import (CPU_ROUTES, EXACT, HEADS, NARROW, Dice, assert_alive, assert_same, assert_zero, enliven, error, forall, numbers,
                 seeds, weights)

kinds = st.sampled_from(["random", "rank-deficient", "ill-conditioned"])
counts = st.integers(1, 12)
NO_TABLE = (torch.zeros(0, 0), torch.zeros(0, 0))          # MLA without position: zero rope channels


def matrix(dice: Dice, rows: int, columns: int, kind: str) -> torch.Tensor:
    """Full rank and well behaved, of half that rank, or with singular values from 1 down to 1e-8."""
    W = dice.normal(rows, columns) / columns**0.5
    if kind == "rank-deficient":
        r = max(1, min(rows, columns) // 2)
        W = dice.normal(rows, r) @ dice.normal(r, columns) / (r * columns) ** 0.5
    elif kind == "ill-conditioned":
        U, S, Z = torch.linalg.svd(W, full_matrices=False)
        W = U @ torch.diag(torch.logspace(0, -8, len(S), dtype=torch.float64)) @ Z
    return W


def make_dense(code, H: int, d: int, kind: str, seed: int, rope=None, v_scale: float = 1.0):
    """A dense layer whose keys and values together have the spectrum `kind`, and attention that is neither flat nor one-hot."""
    dice, E = Dice(seed), H * d
    layer = enliven(code.attention.Dense(E, H, rope, norm=False).double(), seed)
    with torch.no_grad():
        K, V = matrix(dice, 2 * E, E, kind).chunk(2)
        layer.W_K.weight.copy_(K * (E**0.5 / K.norm()))    # keys of size 1 whatever the spectrum
        layer.W_V.weight.copy_(V * v_scale)
    return layer


def rank(W) -> int:
    return int(np.linalg.matrix_rank(numbers(W)))


def product(W_up, W_down):
    return numbers(W_up.weight) @ numbers(W_down.weight)


class Scene:
    """Tokens, points and a mask for a layer of width E."""

    def __init__(self, code, E: int, B: int, L: int, T: int, masked: bool, seed: int):
        dice = Dice(seed + 1)
        self.x, self.keys, self.pull = dice.normal(B, L, E), dice.normal(B, T, E), dice.normal(B, L, E)
        self.x_at, self.keys_at = dice.points(L), dice.points(T)
        self.mask = dice.mask(L, T) if masked else None
        self.visible = np.ones((L, T), bool) if self.mask is None else self.mask.numpy()

    def tables(self, rope):
        return [rope.table(at, torch.float64) for at in (self.x_at, self.keys_at)] if rope else [NO_TABLE, NO_TABLE]

    def run(self, layer, route="auto", x=None, keys=None):
        x, keys = self.x if x is None else x, self.keys if keys is None else keys
        tables = self.tables(layer.rope)
        if layer.rope is None:                             # a rotation of zero channels still counts the tokens
            tables = [(torch.zeros(n, 0),) * 2 for n in (x.shape[1], keys.shape[1])]
        return layer(x, layer.rows(keys), *tables, self.mask, route)

    def oracle(self, dense, theta=1e4):
        places = dict(x_at=self.x_at.numpy(), keys_at=self.keys_at.numpy(), theta=theta) if dense.rope else {}
        each = [oracles.dense(x.numpy(), keys.numpy(), weights(dense), heads=dense.heads, visible=self.visible, **places)
                for x, keys in zip(self.x, self.keys)]
        assert_alive(np.stack([p for _, p in each]), self.visible)
        return np.stack([y for y, _ in each])

    def gradients(self, layer, route="auto"):
        """(of x, of the keys' tokens, {weight name: gradient}) of the sum of outputs, randomly weighted."""
        x, keys = self.x.clone().requires_grad_(), self.keys.clone().requires_grad_()
        layer.zero_grad()
        (self.run(layer, route, x, keys) * self.pull).sum().backward()
        return x.grad, keys.grad, {name.removesuffix(".weight"): p.grad for name, p in layer.named_parameters()}


def assert_same_layer(scene, dense, mla, what: str, theta=1e4):
    want = scene.oracle(dense, theta)
    assert_same(scene.run(dense), want, EXACT, "the dense layer itself is not standard attention")
    for route in (*CPU_ROUTES, "auto"):
        assert_same(scene.run(mla, route), want, EXACT, f"{what}: MLA by {route} is not the dense layer it was made from")


def assert_same_gradients(scene, dense, mla, what: str):
    """Of inputs and W_O, which both sides share; and of every factor, because W = up @ down makes its gradient the dense one times the
    other factor (the chain rule). Relative to all gradients together: that of the scores vanishes where a query sees one key."""
    x, keys, G = scene.gradients(dense)
    H, size = dense.heads, sum(g.square().sum() for g in scene.gradients(dense)[2].values()).sqrt()
    per_head = lambda W: W.unflatten(0, (H, -1))
    for route in (*CPU_ROUTES, "auto"):
        mla_x, mla_keys, g = scene.gradients(mla, route)
        W = {name.removesuffix(".weight"): p.detach() for name, p in mla.named_parameters()}
        pairs = {"x": (mla_x, x), "keys": (mla_keys, keys), "W_O": (g["W_O"], G["W_O"]), "W_UV": (g["W_UV"], G["W_V"] @ W["W_DKV"].T)}
        down = W["W_UV"].T @ G["W_V"]
        if mla.rope is None:                               # (E1): scores come through W_UK and W_UQ
            pairs |= {"W_UK": (g["W_UK"], G["W_K"] @ W["W_DKV"].T), "W_UQ": (g["W_UQ"], G["W_Q"] @ W["W_DQ"].T),
                      "W_DQ": (g["W_DQ"], W["W_UQ"].T @ G["W_Q"])}
            down = down + W["W_UK"].T @ G["W_K"]
        else:                                              # (E2): scores come through W_KR, and head h's own slot of W_QR
            slots = torch.stack([per_head(g["W_QR"])[h].unflatten(0, (H, -1))[h] for h in range(H)])
            pairs |= {"W_KR": (g["W_KR"], G["W_K"]), "W_QR": (slots, per_head(G["W_Q"] @ W["W_DQ"].T))}
        pairs["W_DKV"] = g["W_DKV"], down
        for name, (got, expected) in pairs.items():
            wrong = ((got - expected).norm() / size).item()
            assert wrong <= EXACT, f"{what}, route {route}: the gradient of {name} differs from the dense layer's by {wrong:.1e}"


# ---- (E1) content ---------------------------------------------------------------------------------------------------


@forall(H=st.integers(1, 3), d=st.integers(2, 8), kind=kinds, B=st.integers(1, 2), L=counts, T=counts, masked=st.booleans(),
        wider=st.integers(0, 3), seed=seeds)
def test_content_at_full_rank_is_standard_attention(code, H, d, kind, B, L, T, masked, wider, seed):
    dense, scene = make_dense(code, H, d, kind, seed), Scene(code, H * d, B, L, T, masked, seed)
    full = rank(torch.cat((dense.W_K.weight, dense.W_V.weight)))
    C = min(full + wider, H * d)
    mla = code.attention.MLA.from_dense(dense, C)
    assert mla.widths == (C, 0), "without position nothing but the content latent is cached"
    assert_same_layer(scene, dense, mla, f"(E1) C = {C} >= rank")
    if full > 1 and kind != "ill-conditioned":             # and the bound is sharp
        assert error(scene.run(code.attention.MLA.from_dense(dense, full - 1)), scene.run(dense)) > 1e-8, \
            "exact below the rank: impossible"


@forall(H=st.integers(1, 3), d=st.integers(2, 6), kind=kinds, B=st.integers(1, 2), L=counts, T=counts, masked=st.booleans(), seed=seeds)
def test_content_at_full_rank_has_the_dense_gradients(code, H, d, kind, B, L, T, masked, seed):
    """At C = E, since a gradient may leave the subspace that a rank-deficient layer lives in."""
    dense, scene = make_dense(code, H, d, kind, seed), Scene(code, H * d, B, L, T, masked, seed)
    assert_same_gradients(scene, dense, code.attention.MLA.from_dense(dense, H * d), "(E1)")


# ---- (E2) position --------------------------------------------------------------------------------------------------


@forall(H=st.integers(1, 3), d=st.sampled_from(HEADS), kind=kinds, B=st.integers(1, 2), L=counts, T=counts, masked=st.booleans(),
        seed=seeds)
def test_a_slot_per_head_is_standard_attention_with_rope(code, H, d, kind, B, L, T, masked, seed):
    dense = make_dense(code, H, d, kind, seed, code.rope3d.Rope3D(d, d))
    scene, E = Scene(code, H * d, B, L, T, masked, seed), H * d
    C = rank(dense.W_V.weight)
    mla = code.attention.MLA.from_dense(dense, C, R=E)
    assert mla.widths == (C, E), "a slot of the positional key per head"
    own = numbers(mla.W_QR.weight).reshape(H, H, d, E)
    assert all(not own[h, other].any() for h in range(H) for other in range(H) if other != h), \
        "(E2): a head's rope query must be zero outside its own slot"
    assert_same_layer(scene, dense, mla, "(E2) R = H d_h")
    assert_same_gradients(scene, dense, code.attention.MLA.from_dense(dense, E, R=E), "(E2) R = H d_h")


@forall(shape=st.sampled_from([(R, d) for R, d in NARROW if d <= 14]), H=st.integers(1, 3), B=st.integers(1, 2), L=counts, T=counts,
        masked=st.booleans(), seed=seeds)
def test_a_shared_narrow_key_is_exact_where_heads_agree(code, shape, H, B, L, T, masked, seed):
    """Two conditions, both needed: the heads share the keys of the R fastest channels, and the other bands stand still (theta so
    large that all bands but an axis' first turn by nothing, and none of those is left out)."""
    (R, d), theta = shape, 1e250
    dense = make_dense(code, H, d, "random", seed, code.rope3d.Rope3D(d, d, theta))
    turning = code.attention.fastest_channels(R, d)
    K = dense.W_K.weight.data.unflatten(0, (H, d))         # a view: what is written here, the layer has
    K[:, turning] = K[:1, turning].clone()
    scene = Scene(code, H * d, B, L, T, masked, seed)
    mla = code.attention.MLA.from_dense(dense, H * d, R=R)
    assert mla.widths == (H * d, R)
    assert_same_layer(scene, dense, mla, f"shared key of R = {R} of {d} channels", theta)
    if H > 1:                                              # and this is where the approximation starts: heads that disagree
        K[:, turning] += Dice(seed).normal(H, R, H * d) / d**0.5
        mla = code.attention.MLA.from_dense(dense, H * d, R=R)
        assert_same(mla.W_KR.weight, K[:, turning].mean(0), EXACT, "the shared key nearest to all heads' is their mean")
        if L * T > 20 and not masked:
            assert error(scene.run(mla), scene.run(dense)) > 1e-6, \
                "heads disagree on their rope keys: one shared key cannot be exact"


# ---- below full rank ------------------------------------------------------------------------------------------------


@forall(H=st.integers(1, 3), d=st.integers(2, 6), kind=kinds, v_scale=st.sampled_from([1e-3, 1.0, 50.0]), seed=seeds)
def test_below_full_rank_the_error_is_the_tail_of_the_singular_values(code, H, d, kind, v_scale, seed):
    dense, E = make_dense(code, H, d, kind, seed, v_scale=v_scale), H * d
    K, V = numbers(dense.W_K.weight), numbers(dense.W_V.weight)
    k_size, v_size = np.linalg.norm(K), np.linalg.norm(V)  # the balance: keys and values count alike, whatever scales were learned
    target = np.concatenate((K / k_size, V / v_size))
    S, last = np.linalg.svd(target, compute_uv=False), np.inf
    for C in range(1, E + 1):
        mla = code.attention.MLA.from_dense(dense, C)
        M = np.concatenate((product(mla.W_UK, mla.W_DKV) / k_size, product(mla.W_UV, mla.W_DKV) / v_size))
        missed = np.linalg.norm(M - target)
        # The map has norm sqrt(2); what float64 leaves of it is the width of this equality.
        assert abs(missed - np.sqrt((S[C:] ** 2).sum())) <= EXACT, \
            f"Eckart-Young: at C = {C} the best map misses {np.sqrt((S[C:] ** 2).sum()):.3e} of [K; V], this one {missed:.3e}. " \
            f"K and V each divided by its norm before the SVD, and multiplied back after?"
        assert rank(M) <= C, f"rank(M) = {rank(M)} > C = {C}"
        assert missed <= last + EXACT, f"the error grew from {last:.3e} to {missed:.3e} when C grew to {C}"
        last = missed


@forall(H=st.integers(1, 3), d=st.integers(2, 6), seed=seeds)
def test_a_narrow_query_latent_is_the_nearest_one(code, H, d, seed):
    dense, E = make_dense(code, H, d, "random", seed), H * d
    W_Q = numbers(dense.W_Q.weight)
    S = np.linalg.svd(W_Q, compute_uv=False)
    for Q in range(1, E + 1):
        mla = code.attention.MLA.from_dense(dense, E, Q)
        missed = np.linalg.norm(product(mla.W_UQ, mla.W_DQ) - W_Q)
        assert abs(missed - np.sqrt((S[Q:] ** 2).sum())) <= EXACT * np.linalg.norm(W_Q), \
            f"at Q = {Q} the query map is not the nearest of its rank"


@forall(shape=st.sampled_from(NARROW[:8]), H=st.integers(1, 3), C=st.integers(1, 8), Q=st.integers(1, 8), seed=seeds)
def test_random_initialisation_keeps_the_sizes_and_nothing_else(code, shape, H, C, Q, seed):
    R, d = shape
    dense = make_dense(code, H, d, "random", seed, code.rope3d.Rope3D(d, d))
    torch.manual_seed(seed)
    spectral, fresh, again = (code.attention.MLA.from_dense(dense, C, Q, R, init) for init in ("spectral", "random", "random"))
    assert fresh.scale == spectral.scale == dense.scale and fresh.widths == spectral.widths == (C, R)
    assert fresh.rope == spectral.rope and torch.equal(fresh.W_O.weight, dense.W_O.weight)
    for (name, a), (_, b), (_, c) in zip(fresh.named_parameters(), spectral.named_parameters(), again.named_parameters()):
        assert a.shape == b.shape and a.dtype == torch.float64, f"{name}: sizes and dtype are those of the spectral layer"
        if not name.startswith("W_O"):
            assert not torch.equal(a, b) and not torch.equal(a, c), f"{name} is not a fresh random draw"
    M = np.concatenate((product(fresh.W_UK, fresh.W_DKV), product(fresh.W_UV, fresh.W_DKV)))
    assert rank(M) <= C, "no initialisation can exceed the rank that the latent allows"


# ---- edges ----------------------------------------------------------------------------------------------------------


def test_values_that_are_all_zero_do_not_divide_by_zero(code):
    dense = make_dense(code, 2, 4, "random", 0, v_scale=0.0)
    mla = code.attention.MLA.from_dense(dense, 8)
    assert_zero(mla.W_UV.weight.abs() > 1e-12, "values were zero")
    assert_same(product(mla.W_UK, mla.W_DKV), dense.W_K.weight, EXACT, "keys are kept exactly at C = E")


def test_from_dense_refuses_in_words(code):
    rope = code.rope3d.Rope3D(8, 8)
    Dense, make = code.attention.Dense, code.attention.MLA.from_dense
    dense, plain = Dense(16, 2, rope, norm=False), Dense(16, 2, None, norm=False)
    for match, call in (("a norm is not linear", lambda: make(Dense(16, 2, rope), 4, R=6)),
                        ("'spectral' or 'random'", lambda: make(plain, 4, init="zeros")),
                        ("R must be H", lambda: make(dense, 4)), ("R must be H", lambda: make(dense, 4, R=8)),
                        ("between 1 and E", lambda: make(plain, 17)), ("between 1 and E", lambda: make(plain, 0)),
                        ("between 1 and E", lambda: make(plain, 4, Q=17)), ("between 1 and E", lambda: make(plain, 4, Q=0))):
        with pytest.raises(ValueError, match=match):
            call()
