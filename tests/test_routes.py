"""Three ways to compute latent attention give one answer, and cost what the cost model says.

Proved here, for any sizes (more keys than queries, fewer, multiples of 128): every route equals
the paper's equations in numpy and torch's own attention on keys and values made by hand, in
outputs and in the gradients of every input, however large the scores; in bfloat16, float16 and
float32 no route strays more than twice as far as the reference itself; equations (11) and (12)
equal torch's count of operations exactly, and (13) is where they cross. `CPU_ROUTES` names the
routes; one that needs a GPU has its own test file.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import oracles
from lab import (CPU_ROUTES, EXACT, HEADS, NARROW, Dice, Sizes, assert_alive, assert_same,
                 enliven, entropy, error, forall, numbers, route, seeds, sizes, weights)

masks = st.sampled_from(["none", "random", "window"])
# Beyond the 2^16 scores where sdpa changes kernels.
LONG = Sizes(B=1, L=260, T=300, H=2, N=4, R=6, V=5, C=3, head=8, seed=1)


# ---- inputs ---------------------------------------------------------------------------------


def window_mask(L: int, T: int) -> torch.Tensor:
    """Five keys behind each query and the first of all. The last queries are the last keys, as
    in a video: the window starts at the bottom right, not at the top left."""
    last_queries_are_last_keys = max(T - L, 0)
    query = torch.arange(L)[:, None] + last_queries_are_last_keys
    key = torch.arange(T)
    behind = query - key
    near = (behind >= 0) & (behind < 5)
    return near | (key == 0)


def make_mask(kind: str, dice: Dice, L: int, T: int):
    if kind == "random":
        return dice.mask(L, T)
    if kind == "window":
        return window_mask(L, T)
    return None


def who_sees(mask, L: int, T: int) -> np.ndarray:
    """The mask for numpy; no mask: everybody sees everybody."""
    if mask is None:
        return np.ones((L, T), bool)
    return mask.numpy()


def inputs(code, s: Sizes, mask: str, dtype=torch.float64, device="cpu"):
    """(tensors by name, points, tables, scale, mask) for every route; scores have a spread of
    about 1.5."""
    dice = Dice(s.seed)
    tensors = dict(
        q_nope=1.5 * dice.normal(s.B, s.L, s.H, s.N),
        q_rope=1.5 * dice.normal(s.B, s.L, s.H, s.R),
        c_kv=dice.normal(s.B, s.T, s.C),
        k_rope=dice.normal(s.B, s.T, s.R),
        W_UK=dice.normal(s.H, s.N, s.C) / s.C**0.5,
        W_UV=dice.normal(s.H, s.V, s.C) / s.C**0.5)
    at = dice.points(s.L), dice.points(s.T)
    may = make_mask(mask, dice, s.L, s.T)
    if may is not None:
        may = may.to(device)
    rope = code.rope3d.Rope3D(s.R, s.head)
    tables = [rope.table(points.to(device), dtype) for points in at]
    tensors = {name: x.to(device, dtype) for name, x in tensors.items()}
    scale = (s.N + s.R) ** -0.5
    return tensors, at, tables, scale, may


def run(code, name: str, tensors, tables, scale, mask):
    """The answer [B, L, H, V] of a route to what `inputs` made."""
    attend = route(code, name)
    return attend(*tensors.values(), *tables, scale, mask)


def by_hand(s: Sizes, tensors, at):
    """Rotated queries, keys and values of every head, [B, H, tokens, width], by (4) and (5)."""
    x = {name: numbers(value) for name, value in tensors.items()}
    q_nope = x["q_nope"].swapaxes(1, 2)                             # [B, H, L, N]
    q_rope = x["q_rope"].swapaxes(1, 2)
    q_rope = oracles.rope(q_rope, at[0].numpy(), s.head)
    q = np.concatenate((q_nope, q_rope), -1)                        # [B, H, L, N + R]

    k_rope = oracles.rope(x["k_rope"], at[1].numpy(), s.head)       # [B, T, R]
    k = np.zeros((s.B, s.H, s.T, s.N + s.R))
    v = np.zeros((s.B, s.H, s.T, s.V))
    for b in range(s.B):
        for h in range(s.H):
            k[b, h, :, :s.N] = x["c_kv"][b] @ x["W_UK"][h].T
            k[b, h, :, s.N:] = k_rope[b]
            v[b, h] = x["c_kv"][b] @ x["W_UV"][h].T
    return q, k, v


def by_the_oracle(q, k, v, scale: float, visible):
    """o [B, L, H, V] and p [B, H, L, T], video by video."""
    outputs = []
    probabilities = []
    for b in range(len(q)):
        o, p = oracles.attention(q[b], k[b], v[b], scale, visible)
        outputs.append(o.swapaxes(0, 1))
        probabilities.append(p)
    return np.stack(outputs), np.stack(probabilities)


def torchs_count(call) -> int:
    """How many operations torch itself counts in a call."""
    with FlopCounterMode(display=False) as count:
        call()
    return count.get_total_flops()


# ---- one answer -----------------------------------------------------------------------------


@forall(s=sizes(), mask=masks)
@example(s=LONG, mask="none")
@example(s=LONG, mask="window")
def test_every_route_is_the_papers_equations(code, s, mask):
    tensors, at, tables, scale, may = inputs(code, s, mask)
    visible = who_sees(may, s.L, s.T)
    want, p = by_the_oracle(*by_hand(s, tensors, at), scale, visible)
    assert_alive(p, visible)
    for name in CPU_ROUTES:
        got = run(code, name, tensors, tables, scale, may)
        assert_same(got, want, EXACT,
                    f"{name}, mask {mask}: not equations (5)-(8). Each rotated once? scale "
                    f"and mask passed on? a mask row per (l, h)?")


@forall(s=sizes(), mask=masks)
def test_every_route_is_torchs_own_attention(code, s, mask):
    tensors, at, tables, scale, may = inputs(code, s, mask)
    q, k, v = map(torch.from_numpy, by_hand(s, tensors, at))
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=may, scale=scale)
    for name in CPU_ROUTES:
        got = run(code, name, tensors, tables, scale, may)
        assert_same(got, want.transpose(1, 2), EXACT,
                    f"{name}, mask {mask}: differs from torch's attention")


def lift_scores(tensors, scale: float, lifted, height: float) -> None:
    """Change the tensors so that every score of the keys `lifted` [T] is `height` more than it
    would be. The first latent channel says which keys those are. W_UK makes the first content
    channel of it and of nothing else, and every query asks for that one."""
    tensors["c_kv"][:, :, 0] = lifted.double()
    tensors["W_UK"][:, 0, :] = 0
    tensors["W_UK"][:, :, 0] = 0
    tensors["W_UK"][:, 0, 0] = 1
    tensors["q_nope"][:, :, :, 0] = height / scale


@forall(s=sizes(), mask=masks, who=st.sampled_from(["all", "one", "some"]),
        height=st.sampled_from([50.0, 1000.0, -50.0, -1000.0]))
@example(s=LONG, mask="none", who="all", height=1000.0)
@example(s=LONG, mask="window", who="some", height=50.0)
def test_large_scores_give_the_exact_softmax(code, s, mask, who, height):
    """A softmax has no largest score: one key far ahead of all, or behind, some keys ahead of
    the others, and all together far from zero, where only differences count."""
    s = replace(s, C=s.C + 1)                  # one latent channel says which keys are lifted
    tensors, at, tables, scale, may = inputs(code, s, mask)
    dice = Dice(s.seed + 1)
    lifted = {"all": torch.ones(s.T, dtype=torch.bool),
              "one": torch.arange(s.T) == dice.below(s.T, 1),
              "some": dice.mask(1, s.T)[0]}[who]
    lift_scores(tensors, scale, lifted, height)
    visible = who_sees(may, s.L, s.T)
    want, p = by_the_oracle(*by_hand(s, tensors, at), scale, visible)
    if who == "all":
        assert_alive(p, visible)
    for name in CPU_ROUTES:
        got = run(code, name, tensors, tables, scale, may)
        assert_same(got, want, EXACT, f"{name}: scores of {who} keys {height:+.0f} higher: not "
                                      f"the softmax of (7). Scores clamped, or exp without the "
                                      f"largest taken off?")


# ---- masks ----------------------------------------------------------------------------------


@st.composite
def runs_of_queries(draw):
    """How many neighbouring queries see the same keys, run by run: long runs, as in teacher
    forcing, or none longer than one query."""
    longest = draw(st.sampled_from([1, 8, 40]))
    return draw(st.lists(st.integers(max(1, longest // 2), longest), min_size=1, max_size=5))


def mask_of_runs(dice: Dice, runs: list[int], T: int) -> torch.Tensor:
    """Each run sees keys at random, and somebody."""
    patterns = dice.mask(len(runs), T)
    return patterns.repeat_interleave(torch.tensor(runs), 0)


def heads_of(dice: Dice, B: int, H: int, L: int, T: int, d: int, V: int):
    """q, k, v of `sdpa`, with scores of a spread of about 1.5."""
    q = 1.5 * dice.normal(B, H, L, d)
    return q, dice.normal(B, H, T, d), dice.normal(B, H, T, V)


@forall(B=st.integers(1, 2), H=st.integers(1, 2), runs=runs_of_queries(), T=st.integers(1, 40),
        d=st.integers(1, 8), V=st.integers(1, 8), seed=seeds)
@example(B=1, H=1, runs=[300, 280], T=400, d=4, V=4, seed=0)    # many scores: torch's kernel
@example(B=1, H=1, runs=[16, 1, 16], T=9, d=4, V=4, seed=0)
def test_sdpa_is_the_masked_formula_for_any_mask(code, B, H, runs, T, d, V, seed):
    """On a CPU runs of queries that see the same keys are computed together, from these keys
    alone. Nothing of that shows: any mask, with runs or without."""
    dice = Dice(seed)
    L = sum(runs)
    q, k, v = heads_of(dice, B, H, L, T, d, V)
    mask = mask_of_runs(dice, runs, T)
    scale = d ** -0.5
    got = code.attention.sdpa(q, k, v, mask, scale)
    for b in range(B):
        want, p = oracles.attention(numbers(q[b]), numbers(k[b]), numbers(v[b]), scale,
                                    mask.numpy())
        assert_alive(p, mask.numpy())
        assert_same(got[b], want, EXACT,
                    f"runs of {runs} queries: not softmax over the keys that the mask allows")


@forall(runs=st.lists(st.integers(8, 40), min_size=1, max_size=5), T=st.integers(2, 40),
        seed=seeds)
def test_what_a_mask_hides_from_a_run_of_queries_is_not_computed(code, runs, T, seed):
    dice = Dice(seed)
    q, k, v = heads_of(dice, 1, 2, sum(runs), T, d=4, V=6)
    mask = mask_of_runs(dice, runs, T)
    mask[:, :2] = True                    # a product over one key is no matrix product to torch
    counted = torchs_count(lambda: code.attention.sdpa(q, k, v, mask, 0.5))
    visible_scores = 2 * mask.sum().item()                          # of two heads
    assert counted == 2 * visible_scores * (4 + 6), \
        f"{counted} operations for {visible_scores} scores that the mask allows"


# ---- gradients and rounding -----------------------------------------------------------------


def gradients(code, name: str, s: Sizes, tensors, tables, scale, may):
    """Of every input, for one random weight on every output."""
    pull = Dice(s.seed + 1).normal(s.B, s.L, s.H, s.V)
    answer = run(code, name, tensors, tables, scale, may)
    return torch.autograd.grad(answer, tensors.values(), pull)


@forall(s=sizes(), mask=masks)
def test_the_routes_have_the_same_gradients(code, s, mask):
    tensors, _, tables, scale, may = inputs(code, s, mask)
    for x in tensors.values():
        x.requires_grad_()
    reference = gradients(code, "reference", s, tensors, tables, scale, may)
    # Relative to all gradients together: with one visible key those of the scores are zero, and
    # only their rounding is left.
    size = sum(g.square().sum() for g in reference).sqrt()
    for way in CPU_ROUTES[1:]:
        found = gradients(code, way, s, tensors, tables, scale, may)
        for name, got, want in zip(tensors, found, reference):
            wrong = ((got - want).norm() / size).item()
            assert wrong <= EXACT, \
                f"{way}, mask {mask}: the gradient of {name} differs from the reference by " \
                f"{wrong:.1e}; (9) (10)?"


def test_the_references_gradients_are_finite_differences(code):
    s = Sizes(B=1, L=2, T=3, H=2, N=2, R=6, V=2, C=3, head=8, seed=3)
    tensors, _, tables, scale, may = inputs(code, s, "random")
    leaves = [x.requires_grad_() for x in tensors.values()]

    def reference(*tensors):
        return code.attention.attend_reference(*tensors, *tables, scale, may)

    torch.autograd.gradcheck(reference, leaves, eps=1e-6, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@forall(R_head=st.sampled_from(NARROW), N=st.integers(8, 16), C=st.integers(8, 24),
        L=st.integers(8, 32), T=st.integers(32, 160), mask=masks, seed=seeds)
def test_in_low_precision_no_route_errs_twice_as_much_as_the_reference(
        code, low, R_head, N, C, L, T, mask, seed):
    R, head = R_head
    s = Sizes(B=2, L=L, T=T, H=3, N=N, R=R, V=N, C=C, head=head, seed=seed)
    tensors, _, tables, scale, may = inputs(code, s, mask, dtype=low)
    exact_tensors = {name: x.double() for name, x in tensors.items()}
    exact_tables = [(cos.double(), sin.double()) for cos, sin in tables]
    truth = run(code, "reference", exact_tensors, exact_tables, scale, may)
    allowed = 2 * error(run(code, "reference", tensors, tables, scale, may), truth)
    for name in CPU_ROUTES[1:]:
        got = run(code, name, tensors, tables, scale, may)
        assert got.dtype == low, f"{name} changed the dtype from {low} to {got.dtype}"
        assert_same(got, truth, allowed, f"{name} in {low}: more than twice the reference's "
                                         f"own error against float64")


def test_typical_attention_is_neither_flat_nor_one_hot(code):
    """The statistic that lets every comparison here fail: over many draws the softmax keeps
    between a third and nine tenths of the largest entropy there can be, and the most looked-at
    key gets neither everything nor its equal share."""
    shares = []
    tops = []
    everything = np.ones((8, 24), bool)
    for seed in range(30):
        s = Sizes(B=1, L=8, T=24, H=2, N=8, R=6, V=4, C=8, head=8, seed=seed)
        tensors, at, _, scale, _ = inputs(code, s, "none")
        _, p = by_the_oracle(*by_hand(s, tensors, at), scale, everything)
        share, _ = entropy(p, everything)
        shares.append(share)
        tops.append(p.max(-1).mean())
    share = np.mean(shares)
    top = np.mean(tops)
    assert 0.33 < share < 0.9 and 2 / 24 < top < 0.6, \
        f"mean entropy {share:.2f}, mean maximum {top:.2f}"


# ---- the two layers -------------------------------------------------------------------------


@forall(s=sizes(), mask=masks, norm=st.booleans(), E=st.integers(2, 16), Q=st.integers(2, 12))
def test_the_latent_layer_is_the_papers_equations(code, s, mask, norm, E, Q):
    """(1) to (8) from token vectors: norms, up-projections, scale, order of heads, output
    projection; by every route, the cheaper one of two among them."""
    may = inputs(code, s, mask)[-1]
    visible = who_sees(may, s.L, s.T)
    rope = code.rope3d.Rope3D(s.R, s.head)
    layer = code.attention.MLA(E, s.H, s.C, Q, s.N, s.V, rope, norm).double()
    enliven(layer, s.seed)
    dice = Dice(s.seed)
    x = dice.normal(s.B, s.L, E)
    keys = dice.normal(s.B, s.T, E)
    x_at = dice.points(s.L)
    keys_at = dice.points(s.T)

    want, p = oracles.video_by_video(
        oracles.mla, x.numpy(), keys.numpy(), weights(layer), heads=s.H, head=s.head,
        scale=1 / math.sqrt(s.N + s.R), x_at=x_at.numpy(), keys_at=keys_at.numpy(),
        visible=visible)
    assert_alive(p, visible)

    rows = layer.rows(keys)
    assert tuple(row.shape[-1] for row in rows) == layer.widths == (s.C, s.R), \
        "what is cached: C content and R position channels a token"
    q_table = rope.table(x_at, torch.float64)
    k_table = rope.table(keys_at, torch.float64)
    for name in (*CPU_ROUTES, "cheaper"):
        got = layer(x, rows, q_table, k_table, may, route(code, name))
        assert_same(got, want, EXACT,
                    f"MLA by {name}: not equations (1)-(8). Both latents normed (1) (3)? "
                    f"scale 1/sqrt(N + R) (6)? heads in order (8)?")


@forall(head=st.sampled_from(HEADS), H=st.integers(1, 3), B=st.integers(1, 2),
        L=st.integers(1, 12), T=st.integers(1, 12), norm=st.booleans(), rope=st.booleans(),
        masked=st.booleans(), seed=seeds)
def test_the_dense_baseline_is_standard_attention(
        code, head, H, B, L, T, norm, rope, masked, seed):
    E = H * head
    rotation = code.rope3d.Rope3D(head, head) if rope else None
    layer = enliven(code.attention.Dense(E, H, rotation, norm).double(), seed)
    dice = Dice(seed)
    x = dice.normal(B, L, E)
    keys = dice.normal(B, T, E)
    x_at = dice.points(L)
    keys_at = dice.points(T)
    may = dice.mask(L, T) if masked else None
    visible = who_sees(may, L, T)

    places = {}
    tables = (None, None)
    if rope:
        places = dict(x_at=x_at.numpy(), keys_at=keys_at.numpy())
        tables = [rotation.table(at, torch.float64) for at in (x_at, keys_at)]
    want, p = oracles.video_by_video(oracles.dense, x.numpy(), keys.numpy(), weights(layer),
                                     heads=H, visible=visible, **places)
    assert_alive(p, visible)
    got = layer(x, layer.rows(keys), *tables, may)
    assert_same(got, want, EXACT, "Dense is not standard attention")


def test_a_dense_layer_refuses_a_rope_narrower_than_its_heads(code):
    rope = code.rope3d.Rope3D(8, 16)
    with pytest.raises(ValueError, match="rotates whole heads"):
        code.attention.Dense(32, 2, rope)


# ---- what it costs --------------------------------------------------------------------------


PAPER = Sizes(B=1, L=4680, T=32_760, H=12, N=96, R=32, V=128, C=192, head=128, seed=0)


@forall(s=sizes(least=2), mask=st.sampled_from(["none", "random"]))
@example(s=PAPER, mask="none")
def test_the_cost_model_is_torchs_own_count(code, s, mask):
    """On the meta device nothing is computed and everything is counted, the paper's full size
    too (on a CPU torch has no count for its tiled kernel). No size is 1: a product over one
    channel is no matrix product to torch, and it does not count it."""
    tensors, _, tables, scale, may = inputs(code, s, mask, device="meta")
    for name in CPU_ROUTES:
        counted = torchs_count(lambda: run(code, name, tensors, tables, scale, may))
        model = s.B * code.attention.route_flops(name, s.L, s.T, s.H, s.N, s.R, s.V, s.C)
        equation = 12 if name == "absorbed" else 11
        assert counted == model, \
            f"({equation}) says {model} operations for {name}, torch counted {counted}"


@forall(s=sizes(least=2), E=st.integers(2, 16), Q=st.integers(2, 12))
@example(s=Sizes(B=1, L=16, T=64, H=2, N=4, R=6, V=12, C=10, head=8, seed=0), E=4, Q=4)
@example(s=Sizes(B=1, L=16, T=64, H=12, N=4, R=6, V=2, C=8, head=8, seed=0), E=4, Q=4)
def test_a_layer_left_to_itself_takes_the_cheaper_route(code, s, E, Q):
    rope = code.rope3d.Rope3D(s.R, s.head)
    layer = code.attention.MLA(E, s.H, s.C, Q, s.N, s.V, rope).to("meta")
    x = torch.empty(s.B, s.L, E, device="meta")
    keys = torch.empty(s.B, s.T, E, device="meta")
    q_table = rope.table(torch.empty(s.L, 3, device="meta"))
    k_table = rope.table(torch.empty(s.T, 3, device="meta"))

    def operations(**by):
        return torchs_count(lambda: layer(x, layer.rows(keys), q_table, k_table, **by))

    left_to_itself = operations()
    count = {}
    for name in ("materialised", "absorbed"):
        count[name] = operations(attend=route(code, name))
    assert left_to_itself == min(count.values()), \
        f"a layer left to itself did not take the cheaper one of {count}: wrong sizes given " \
        f"to the cost model?"


@forall(L=st.integers(2, 5000), T=st.integers(2, 40_000), H=st.integers(2, 16),
        N=st.integers(2, 128), R=st.sampled_from([6, 16, 64]), V=st.integers(2, 128),
        C=st.one_of(st.integers(2, 128), st.integers(2, 512)))
# N + V between 2 C and 3 C: absorbed is cheaper at every L.
@example(L=7, T=9, H=2, N=10, R=6, V=10, C=9)
def test_the_cheaper_route_is_the_one_with_fewer_operations(code, L, T, H, N, R, V, C):
    s = Sizes(B=1, L=L, T=T, H=H, N=N, R=R, V=V, C=C, head=2 * R, seed=0)
    tensors, _, tables, scale, _ = inputs(code, s, "none", torch.bfloat16, "meta")
    taken = torchs_count(lambda: run(code, "cheaper", tensors, tables, scale, None))
    costs = {name: code.attention.route_flops(name, L, T, H, N, R, V, C)
             for name in ("materialised", "absorbed")}
    assert taken == min(costs.values()), \
        f"the cheaper route took {taken} operations, there are {costs}"


@forall(L=st.integers(1, 5000), H=st.integers(1, 16), N=st.integers(0, 128),
        R=st.integers(0, 64), V=st.integers(1, 128),
        C=st.one_of(st.integers(1, 128), st.integers(1, 512)))
# N + V between 2 C and 3 C: absorbed is cheaper at every L.
@example(L=7, H=2, N=10, R=6, V=10, C=9)
def test_below_the_crossing_and_nowhere_else_absorbing_is_cheaper(code, L, H, N, R, V, C):
    """The rule of (13), for T >> L, at any L and on both sides of the crossing."""
    many = 10**12
    star = code.attention.crossing(N, V, C)
    lengths = [L]
    if star < math.inf:
        lengths.append(max(1, math.floor(0.999 * star)))
        lengths.append(math.ceil(1.001 * star))
    for L in lengths:
        if abs(L - star) <= 1e-4 * L:
            continue                         # at the crossing itself the neglected term decides
        dear = code.attention.route_flops("materialised", L, many, H, N, R, V, C)
        cheap = code.attention.route_flops("absorbed", L, many, H, N, R, V, C)
        assert (cheap < dear) == (L < star), \
            f"(13): the crossing is {star:.2f}, yet at L = {L} absorbed costs " \
            f"{cheap / dear:.4f} of materialised"


def test_the_crossing_at_the_papers_geometry_is_269_tokens(code):
    crossing = code.attention.crossing
    assert round(crossing(N=96, V=128, C=192)) == 269
    assert crossing(N=24, V=32, C=16) == math.inf, \
        "toy sizes: 2 C <= N + V, absorbed is always cheaper"
    assert crossing(N=8, V=8, C=8) == math.inf, "on the edge, 2 C = N + V, too"

    paper = dict(T=32_760, H=12, N=96, R=32, V=128, C=192)

    def times_the_operations(L):
        """Of absorbing, against materialising."""
        absorbed = code.attention.route_flops("absorbed", L, **paper)
        return absorbed / code.attention.route_flops("materialised", L, **paper)

    assert times_the_operations(1) < 1, "one token of a language model: absorb"
    ratio = times_the_operations(4680)
    assert round(ratio, 2) == 1.57, \
        f"a chunk of a video, materialise: absorbing it costs 1.57x the operations, here " \
        f"{ratio:.2f}"


A_BLIND_QUERY = torch.ones(4, 6, dtype=torch.bool) & (torch.arange(4) > 0)[:, None]


@pytest.mark.parametrize("mask, said", [
    (torch.ones(1, 6, dtype=torch.bool), "a mask is bool"),             # torch would spread it
    (torch.ones(2, 1, 4, 6, dtype=torch.bool), "a mask is bool"),
    (torch.ones(4, 6), "float32"),
    (A_BLIND_QUERY, "sees no key"),
])
@pytest.mark.parametrize("name", CPU_ROUTES)
def test_another_kind_of_mask_is_refused_by_every_route(code, name, mask, said):
    s = Sizes(B=1, L=4, T=6, H=2, N=4, R=6, V=4, C=8, head=8, seed=0)
    tensors, _, tables, scale, _ = inputs(code, s, "none")
    with pytest.raises(ValueError, match=said):
        run(code, name, tensors, tables, scale, mask)
