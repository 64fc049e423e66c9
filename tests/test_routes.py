"""Three ways to compute latent attention give one answer, and cost what the cost model says.

Proved here, for any sizes (more keys than queries, fewer, multiples of 128): every route equals the paper's equations in numpy and torch's
own attention on keys and values made by hand, in outputs and in the gradients of every input; in bfloat16, float16 and float32 no route
strays more than twice as far as the reference itself; equations (11) and (12) equal torch's count of operations exactly, and (13) is
where they cross. `CPU_ROUTES` names the routes; one that needs a GPU has its own test file.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import example
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import oracles
from lab import (CPU_ROUTES, EXACT, HEADS, NARROW, Dice, Sizes, assert_alive, assert_same, enliven, entropy, error, forall, numbers,
                 seeds, sizes, weights)

masks = st.sampled_from(["none", "random", "window"])
LONG = Sizes(B=1, L=260, T=300, H=2, N=4, R=6, V=5, C=3, head=8, seed=1)   # beyond the 2^16 scores where sdpa changes kernels


def inputs(code, s: Sizes, mask: str, dtype=torch.float64, device="cpu"):
    """(tensors by name, tables, scale, mask) in the signature of every route; scores have a spread of about 1.5."""
    dice = Dice(s.seed)
    tensors = dict(q_nope=1.5 * dice.normal(s.B, s.L, s.H, s.N), q_rope=1.5 * dice.normal(s.B, s.L, s.H, s.R),
                   c_kv=dice.normal(s.B, s.T, s.C), k_rope=dice.normal(s.B, s.T, s.R),
                   W_UK=dice.normal(s.H, s.N, s.C) / s.C**0.5, W_UV=dice.normal(s.H, s.V, s.C) / s.C**0.5)
    at = dice.points(s.L), dice.points(s.T)
    may = None
    if mask == "random":
        may = dice.mask(s.L, s.T)
    elif mask == "window":                                 # the last queries are the last keys, as in a video: bottom right, not top left
        behind = torch.arange(s.L)[:, None] + max(s.T - s.L, 0) - torch.arange(s.T)[None]
        may = (behind >= 0) & (behind < 5) | (torch.arange(s.T) == 0)
    tables = [code.rope3d.Rope3D(s.R, s.head).table(p.to(device), dtype) for p in at]
    tensors = {name: x.to(device, dtype) for name, x in tensors.items()}
    return tensors, at, tables, (s.N + s.R) ** -0.5, may if may is None else may.to(device)


def run(code, route, tensors, tables, scale, mask):
    return code.attention.ROUTES[route](*tensors.values(), *tables, scale, mask)


def by_hand(s: Sizes, tensors, at):
    """Rotated queries, keys and values of every head, [B, H, tokens, width], from (4) and (5) in numpy."""
    x = {name: numbers(value) for name, value in tensors.items()}
    q = np.concatenate((x["q_nope"].swapaxes(1, 2), oracles.rope(x["q_rope"].swapaxes(1, 2), at[0].numpy(), s.head)), -1)
    k = np.stack([[np.concatenate((x["c_kv"][b] @ W.T, oracles.rope(x["k_rope"][b], at[1].numpy(), s.head)), -1) for W in x["W_UK"]]
                  for b in range(s.B)])
    v = np.stack([[x["c_kv"][b] @ W.T for W in x["W_UV"]] for b in range(s.B)])
    return q, k, v


@forall(s=sizes(), mask=masks)
@example(s=LONG, mask="none")
@example(s=LONG, mask="window")
def test_every_route_is_the_papers_equations(code, s, mask):
    tensors, at, tables, scale, may = inputs(code, s, mask)
    visible = np.ones((s.L, s.T), bool) if may is None else may.numpy()
    q, k, v = by_hand(s, tensors, at)
    o, p = zip(*(oracles.attention(q[b], k[b], v[b], scale, visible) for b in range(s.B)))
    assert_alive(np.stack(p), visible)
    want = np.stack(o).swapaxes(1, 2)
    for route in CPU_ROUTES:
        assert_same(run(code, route, tensors, tables, scale, may), want, EXACT,
                    f"{route}, mask {mask}: not equations (5)-(8). Each rotated once? scale and mask passed on? a mask row per (l, h)?")


@forall(s=sizes(), mask=masks)
def test_every_route_is_torchs_own_attention(code, s, mask):
    tensors, at, tables, scale, may = inputs(code, s, mask)
    q, k, v = (torch.from_numpy(x) for x in by_hand(s, tensors, at))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=may, scale=scale).transpose(1, 2)
    for route in CPU_ROUTES:
        assert_same(run(code, route, tensors, tables, scale, may), want, EXACT,
                    f"{route}, mask {mask}: differs from torch's attention")


@forall(s=sizes(), mask=masks)
def test_the_routes_have_the_same_gradients(code, s, mask):
    tensors, _, tables, scale, may = inputs(code, s, mask)
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    pull = Dice(s.seed + 1).normal(s.B, s.L, s.H, s.V)
    found = {route: torch.autograd.grad(run(code, route, leaves, tables, scale, may), leaves.values(), pull) for route in CPU_ROUTES}
    size = sum(g.square().sum() for g in found["reference"]).sqrt()
    for route in CPU_ROUTES[1:]:
        for name, got, want in zip(leaves, found[route], found["reference"]):
            # Relative to all gradients together: with one visible key those of the scores are zero, and only their rounding is left.
            wrong = ((got - want).norm() / size).item()
            assert wrong <= EXACT, \
                f"{route}, mask {mask}: the gradient of {name} differs from the reference by {wrong:.1e}; (9) (10)?"


def test_the_references_gradients_are_finite_differences(code):
    tensors, _, tables, scale, may = inputs(code, Sizes(B=1, L=2, T=3, H=2, N=2, R=6, V=2, C=3, head=8, seed=3), "random")
    leaves = [x.requires_grad_() for x in tensors.values()]
    torch.autograd.gradcheck(lambda *x: code.attention.attend_reference(*x, *tables, scale, may), leaves, eps=1e-6, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@forall(R_head=st.sampled_from(NARROW), N=st.integers(8, 16), C=st.integers(8, 24), L=st.integers(8, 32), T=st.integers(32, 160),
        mask=masks, seed=seeds)
def test_in_low_precision_no_route_errs_twice_as_much_as_the_reference(code, low, R_head, N, C, L, T, mask, seed):
    s = Sizes(2, L, T, 3, N, R_head[0], N, C, R_head[1], seed)
    tensors, _, tables, scale, may = inputs(code, s, mask, dtype=low)
    truth = run(code, "reference", {name: x.double() for name, x in tensors.items()},
                [[part.double() for part in table] for table in tables], scale, may)
    allowed = 2 * error(run(code, "reference", tensors, tables, scale, may), truth)
    for route in CPU_ROUTES[1:]:
        got = run(code, route, tensors, tables, scale, may)
        assert got.dtype == low, f"{route} changed the dtype from {low} to {got.dtype}"
        assert_same(got, truth, allowed, f"{route} in {low}: more than twice the reference's own error against float64")


def test_typical_attention_is_neither_flat_nor_one_hot(code):
    """The statistic that lets every comparison here fail: over many draws the softmax keeps between a third and nine tenths of the
    largest entropy there can be, and the most looked-at key gets neither everything nor its equal share."""
    shares, tops = [], []
    for seed in range(30):
        s = Sizes(B=1, L=8, T=24, H=2, N=8, R=6, V=4, C=8, head=8, seed=seed)
        tensors, at, _, scale, _ = inputs(code, s, "none")
        q, k, v = by_hand(s, tensors, at)
        p = oracles.attention(q[0], k[0], v[0], scale, np.ones((s.L, s.T), bool))[1]
        shares.append(entropy(p, np.ones((s.L, s.T), bool))[0])
        tops.append(p.max(-1).mean())
    assert 0.33 < np.mean(shares) < 0.9 and 2 / 24 < np.mean(tops) < 0.6, \
        f"mean entropy {np.mean(shares):.2f}, mean maximum {np.mean(tops):.2f}"


# ---- the two layers -------------------------------------------------------------------------------------------------


@forall(s=sizes(), mask=masks, norm=st.booleans(), E=st.integers(2, 16), Q=st.integers(2, 12))
def test_the_latent_layer_is_the_papers_equations(code, s, mask, norm, E, Q):
    """(1) to (8) from token vectors: norms, up-projections, scale, order of heads, output projection; by every route and by "auto"."""
    dice, may = Dice(s.seed), inputs(code, s, mask)[-1]
    layer = code.attention.MLA(E, s.H, s.C, Q, s.N, s.V, code.rope3d.Rope3D(s.R, s.head), norm).double()
    enliven(layer, s.seed)
    x, keys, x_at, keys_at = dice.normal(s.B, s.L, E), dice.normal(s.B, s.T, E), dice.points(s.L), dice.points(s.T)
    visible = np.ones((s.L, s.T), bool) if may is None else may.numpy()
    want = [oracles.mla(x[b].numpy(), keys[b].numpy(), weights(layer), heads=s.H, scale=1 / math.sqrt(s.N + s.R), head=s.head,
                        x_at=x_at.numpy(), keys_at=keys_at.numpy(), visible=visible) for b in range(s.B)]
    assert_alive(np.stack([p for _, p in want]), visible)
    rows = layer.rows(keys)
    assert tuple(row.shape[-1] for row in rows) == layer.widths == (s.C, s.R), \
        "what is cached: C content and R position channels a token"
    tables = layer.rope.table(x_at, torch.float64), layer.rope.table(keys_at, torch.float64)
    for route in (*CPU_ROUTES, "auto"):
        assert_same(layer(x, rows, *tables, may, route), np.stack([y for y, _ in want]), EXACT,
                    f"MLA by {route}: not equations (1)-(8). Both latents normed (1) (3)? scale 1/sqrt(N + R) (6)? heads in order (8)?")


@forall(head=st.sampled_from(HEADS), H=st.integers(1, 3), B=st.integers(1, 2), L=st.integers(1, 12), T=st.integers(1, 12),
        norm=st.booleans(), rope=st.booleans(), masked=st.booleans(), seed=seeds)
def test_the_dense_baseline_is_standard_attention(code, head, H, B, L, T, norm, rope, masked, seed):
    dice, E = Dice(seed), H * head
    layer = enliven(code.attention.Dense(E, H, code.rope3d.Rope3D(head, head) if rope else None, norm).double(), seed)
    x, keys, x_at, keys_at = dice.normal(B, L, E), dice.normal(B, T, E), dice.points(L), dice.points(T)
    may = dice.mask(L, T) if masked else None
    visible = np.ones((L, T), bool) if may is None else may.numpy()
    places = dict(x_at=x_at.numpy(), keys_at=keys_at.numpy()) if rope else {}
    want = [oracles.dense(x[b].numpy(), keys[b].numpy(), weights(layer), heads=H, visible=visible, **places) for b in range(B)]
    assert_alive(np.stack([p for _, p in want]), visible)
    tables = [layer.rope.table(at, torch.float64) for at in (x_at, keys_at)] if rope else (None, None)
    assert_same(layer(x, layer.rows(keys), *tables, may), np.stack([y for y, _ in want]), EXACT, "Dense is not standard attention")


def test_a_dense_layer_refuses_a_rope_narrower_than_its_heads(code):
    with pytest.raises(ValueError, match="rotates whole heads"):
        code.attention.Dense(32, 2, code.rope3d.Rope3D(8, 16))


# ---- what it costs --------------------------------------------------------------------------------------------------


PAPER = Sizes(B=1, L=4680, T=32_760, H=12, N=96, R=32, V=128, C=192, head=128, seed=0)


@forall(s=sizes(least=2), mask=st.sampled_from(["none", "random"]))
@example(s=PAPER, mask="none")
def test_the_cost_model_is_torchs_own_count(code, s, mask):
    """On the meta device nothing is computed and everything is counted, the paper's full size too (on a CPU torch has no count for its
    tiled kernel). No size is 1: a product over one channel is no matrix product to torch, and it does not count it."""
    tensors, _, tables, scale, may = inputs(code, s, mask, device="meta")
    for route in CPU_ROUTES:
        with FlopCounterMode(display=False) as count:
            run(code, route, tensors, tables, scale, may)
        model = s.B * code.attention.route_flops(route, s.L, s.T, s.H, s.N, s.R, s.V, s.C)
        assert count.get_total_flops() == model, f"({12 if route == 'absorbed' else 11}) says {model} operations for {route}, torch " \
                                                 f"counted {count.get_total_flops()}"


@forall(s=sizes(least=2), E=st.integers(2, 16), Q=st.integers(2, 12))
@example(s=Sizes(B=1, L=16, T=64, H=2, N=4, R=6, V=12, C=10, head=8, seed=0), E=4, Q=4)
@example(s=Sizes(B=1, L=16, T=64, H=12, N=4, R=6, V=2, C=8, head=8, seed=0), E=4, Q=4)
def test_a_layer_left_to_itself_takes_the_cheaper_route(code, s, E, Q):
    layer = code.attention.MLA(E, s.H, s.C, Q, s.N, s.V, code.rope3d.Rope3D(s.R, s.head)).to("meta")
    x, keys = torch.empty(s.B, s.L, E, device="meta"), torch.empty(s.B, s.T, E, device="meta")
    tables = [layer.rope.table(torch.empty(n, 3, device="meta")) for n in (s.L, s.T)]
    count = {}
    for route in ("materialised", "absorbed", "auto"):
        with FlopCounterMode(display=False) as counter:
            layer(x, layer.rows(keys), *tables, None, route)
        count[route] = counter.get_total_flops()
    assert count["auto"] == min(count.values()), \
        f"route='auto' did not take the cheaper one of {count}: wrong sizes given to the cost model?"


@forall(L=st.integers(1, 5000), T=st.integers(1, 40_000), H=st.integers(1, 16), N=st.integers(0, 128), R=st.integers(0, 64),
        V=st.integers(1, 128), C=st.one_of(st.integers(1, 128), st.integers(1, 512)))
@example(L=7, T=9, H=2, N=10, R=6, V=10, C=9)              # N + V between 2 C and 3 C: absorbed is cheaper at every L
def test_auto_takes_the_route_with_fewer_operations(code, L, T, H, N, R, V, C):
    a = code.attention
    cost = {route: a.route_flops(route, L, T, H, N, R, V, C) for route in ("materialised", "absorbed")}
    assert cost[a.choose_route(L, T, H, N, R, V, C)] == min(cost.values()), f"auto took the dearer route of {cost}"
    star, far = a.crossing(N, V, C), 10**12                # T >> L: the rule of (13)
    near = [L] if math.isinf(star) else [L, max(1, math.floor(0.999 * star)), math.ceil(1.001 * star)]
    for L in near:
        if abs(L - star) > 1e-4 * L:                       # at the crossing itself the neglected term decides
            dear, cheap = (a.route_flops(route, L, far, H, N, R, V, C) for route in ("materialised", "absorbed"))
            assert (cheap < dear) == (L < star), \
                f"(13): the crossing is {star:.2f}, yet at L = {L} absorbed costs {cheap / dear:.4f} of materialised"


def test_the_crossing_at_the_papers_geometry_is_269_tokens(code):
    a = code.attention
    assert round(a.crossing(N=96, V=128, C=192)) == 269
    assert a.crossing(N=24, V=32, C=16) == math.inf, "toy sizes: 2 C <= N + V, absorbed is always cheaper"
    assert a.crossing(N=8, V=8, C=8) == math.inf, "on the edge, 2 C = N + V, too"
    paper = dict(T=32_760, H=12, N=96, R=32, V=128, C=192)
    assert a.choose_route(L=1, **paper) == "absorbed" and a.choose_route(L=4680, **paper) == "materialised", \
        "one token of a language model: absorb; a chunk of a video: materialise"
    ratio = a.route_flops("absorbed", 4680, **paper) / a.route_flops("materialised", 4680, **paper)
    assert round(ratio, 2) == 1.57, f"absorbing a whole chunk costs 1.57x the operations, here {ratio:.2f}"
