"""How many directions does a matrix use? Counting rules, what chance alone gives, and how three seeds become a verdict.

Everything here takes singular values `s` (any order) and weighs directions by *energy*, s_i^2 / sum s^2: the share of the squared
error that leaving out direction i would cost (Eckart-Young). Pure functions; tests/test_spectrum.py holds them to closed forms.
"""

import math
from statistics import mean, median, stdev

import torch
from torch import Tensor

from attention import MLA, Dense, fastest_channels
from mla_video import VideoDiT

REPRODUCED, REFUTED, OPEN = "reproduced", "not reproduced", "cannot be told here"
OPTIMISERS = ("Muon", "AdamW")
OBJECTS = (1, 2, 4)
METRICS = ("colour", "shape", "place", "survival")
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}        # 97.5 % point of Student's t, by the number of values


# ---- counting -------------------------------------------------------------------------------------------------------

def energy(s: Tensor) -> Tensor:
    """Share of each direction, largest first; sums to 1. ValueError for a matrix of zeros, which has no directions."""
    p = s.double().square().sort(descending=True).values
    if not p.numel() or not p.sum() > 0:
        raise ValueError("the rank of a matrix of zeros (or of none) is not defined by energy")
    return p / p.sum()


def energy_kept(s: Tensor, k: int) -> float:
    """Share of the energy in the best k directions; 1 minus this is the error of the best rank-k copy (the tail)."""
    return energy(s)[:k].sum().item()


def energy_rank(s: Tensor, share: float = 0.99) -> float:
    """Directions that hold `share` of the energy. The paper counts whole ones, which is the ceiling of this number; the last
    direction is counted in part here, because at C = 16 a whole one is 6 % of the budget, at C = 192 half a percent. The flattest
    matrix there is, n equal singular values, scores `share` * n: with the 99 % rule no budget can be used beyond 0.99."""
    p = energy(s)
    total = p.cumsum(0)
    k = int((total < share - 1e-12).sum())                 # whole directions that do not reach it; rounding must not add one
    return k + ((share - (total[k - 1] if k else 0)) / p[k]).item()


def effective_rank(s: Tensor) -> float:
    """exp of the entropy of the energies: n for n equal directions, 1 for one. Unlike the 99 % rule it sees inequality among the
    strong directions, so it does not saturate where a spectrum is full but steep."""
    p = energy(s)
    return math.exp(-torch.special.xlogy(p, p).sum().item())


# ---- chance ---------------------------------------------------------------------------------------------------------

def marchenko_pastur_edges(beta: float) -> tuple[float, float]:
    """Where the eigenvalues of W^T W / m end, for W [m, n] of independent entries of variance 1 and beta = n / m <= 1."""
    return (1 - beta**0.5) ** 2, (1 + beta**0.5) ** 2


def marchenko_pastur(n: int, beta: float) -> Tensor:
    """Singular values [n], largest first, that chance gives such a matrix: the quantiles of the limiting law

        density(x) = sqrt((b - x) (x - a)) / (2 pi beta x)   between the edges a < b, for beta < 1.

    x = middle + half * cos(theta) takes the square roots out: density dx = half^2 sin^2(theta) / (2 pi beta x) dtheta."""
    a, b = marchenko_pastur_edges(beta)
    theta = torch.linspace(0, math.pi, 20_001, dtype=torch.float64)                    # theta = 0 is the upper edge
    x = (a + b) / 2 + (b - a) / 2 * theta.cos()
    above = torch.cumulative_trapezoid(((b - a) / 2 * theta.sin()).square() / (2 * math.pi * beta * x), theta)
    above = torch.cat((above.new_zeros(1), above / above[-1]))                         # share of eigenvalues above x
    at = torch.searchsorted(above, (torch.arange(n, dtype=torch.float64) + 0.5) / n)
    return x[at].sqrt()


def random_product(rows: int, C: int, E: int, seed: int) -> Tensor:
    """Singular values [C] of a product of two matrices of noise, [rows, C] [C, E]: M with nothing learned."""
    g = torch.Generator().manual_seed(seed)
    up, down = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((rows, C), (C, E)))
    return torch.linalg.svdvals(up @ torch.linalg.qr(down.T)[1].T)                     # down = R^T Q^T: Q^T changes no singular value


# ---- layers -----------------------------------------------------------------------------------------------------------

def weight(linear) -> Tensor:
    return linear.weight.detach().cpu().double()


def composite(layer: MLA) -> Tensor:
    """M [H (N + V), E]: what a layer makes of its input for keys and values together, of rank C at most."""
    return torch.cat((weight(layer.W_UK), weight(layer.W_UV))) @ weight(layer.W_DKV)


def stacked(layer: Dense, balanced: bool = False) -> Tensor:
    """[W_K; W_V] [2 E, E], as the paper takes it, or each divided by its Frobenius norm first (what from_dense balances by)."""
    return torch.cat([W / W.norm() if balanced else W for W in (weight(layer.W_K), weight(layer.W_V))])


def dense_spectrum(layer: Dense, start: Dense | None = None) -> dict:
    """The spectrum of one layer; with `start`, the layer before training, also how far training has moved it."""
    W, C = stacked(layer), layer.W_K.in_features // 8
    s, balanced = torch.linalg.svdvals(W), torch.linalg.svdvals(stacked(layer, balanced=True))
    found = {"rank99": energy_rank(s) / len(s), "kept": energy_kept(s, C), "kept_balanced": energy_kept(balanced, C),
             "rank99_balanced": energy_rank(balanced) / len(s), "K_over_V": (weight(layer.W_K).norm() / weight(layer.W_V).norm()).item(),
             "energy": [round(share, 6) for share in energy(s).tolist()]}
    if start is not None:
        old = stacked(start)
        added = torch.linalg.svdvals(W - old)
        found |= {"moved": (added.norm() / old.norm()).item(), "rank99_update": energy_rank(added) / len(s)}
    return found


def budget(layers: list[MLA], start: list[Tensor]) -> dict:
    """Share of its budget C that M uses, mean over layers: by the 99 % rule (0.99 at most), and by entropy (1 at most); and how far the
    least moved of them is from M at the `start`, relative to that."""
    now = [composite(layer) for layer in layers]
    s = [torch.linalg.svdvals(M)[:layer.widths[0]] for M, layer in zip(now, layers)]
    return {"rank99": mean(energy_rank(x) / len(x) for x in s), "effective": mean(effective_rank(x) / len(x) for x in s),
            "moved": min(((M - old).norm() / old.norm()).item() for M, old in zip(now, start))}


@torch.no_grad()
def covariances(model: VideoDiT, video: Tensor, caption: Tensor) -> list[Tensor]:
    """Covariance [E, E] of the input of every self-attention over the tokens of clean clips, as `commit` sees them. Centred: a constant in
    all keys changes no softmax, one in all values is a bias."""
    inputs = []
    first = [block.attention.W_DKV if isinstance(block.attention, MLA) else block.attention.W_K for block in model.blocks]
    hooks = [layer.register_forward_hook(lambda layer, args, out: inputs.append(args[0].detach())) for layer in first]
    model(video, video, video.new_zeros(video.shape[:2]), caption)
    for hook in hooks:
        hook.remove()
    tokens = video.shape[1] * model.config.tokens          # the clean half of the sequence
    return [torch.cov(x[:, :tokens].flatten(0, 1).cpu().double().T) for x in inputs]


def latent_rank(model: VideoDiT, video: Tensor, caption: Tensor) -> dict:
    """Effective rank of the latents on these clips, mean over layers: of the covariance of M x, since that of c_kv alone would depend on
    the basis of the latent space, which nothing fixes."""
    M = [composite(block.attention) for block in model.blocks]
    ranks = [torch.linalg.eigvalsh(W @ cov @ W.T).clamp_min(0).sqrt() for W, cov in zip(M, covariances(model, video, caption))]
    return {"effective": mean(effective_rank(s) for s in ranks), "rank99": mean(energy_rank(s) for s in ranks)}


def reconstruction(dense: Dense, mla: MLA, cov: Tensor) -> dict:
    """Share of [K; V] that the conversion loses, K and V balanced. In weights: predicted by the tail of the singular values, and measured.
    On data, i.e. weighted by the covariance of the inputs: measured, and the least that any map of rank C could lose."""
    H, C, N = dense.heads, mla.widths[0], mla.W_UK.out_features // dense.heads
    W_K, W_V = weight(dense.W_K).unflatten(0, (H, -1)), weight(dense.W_V)
    turning = fastest_channels(mla.widths[1], W_K.shape[1])                            # W_KR carries these; M carries the rest
    content = W_K[:, [i for i in range(W_K.shape[1]) if i not in turning]].flatten(0, 1)
    sizes = content.norm(), W_V.norm()
    whole = torch.cat((content / sizes[0], W_V / sizes[1]))
    M = composite(mla)
    error = whole - torch.cat((M[:H * N] / sizes[0], M[H * N:] / sizes[1]))
    lost = lambda X, by: (torch.trace(X @ by @ X.T) / torch.trace(whole @ by @ whole.T)).item()
    values, vectors = torch.linalg.eigh(cov)
    root = vectors * values.clamp_min(0).sqrt()
    return {"predicted": 1 - energy_kept(torch.linalg.svdvals(whole), C), "measured": lost(error, torch.eye(len(cov)).double()),
            "data": lost(error, cov), "data_best": 1 - energy_kept(torch.linalg.svdvals(whole @ root), C)}


# ---- from seeds to a verdict ----------------------------------------------------------------------------------------

def interval(values: list[float]) -> tuple[float, float, float]:
    """(mean, low, high): Student's 95 % interval of the mean over seeds. With 3 seeds it is 2.5 standard deviations to either side."""
    half = STUDENT[len(values)] * stdev(values) / len(values) ** 0.5
    return mean(values), mean(values) - half, mean(values) + half


def slope(x: list[float], y: list[float]) -> float:
    """Least squares d log y / d log x: 1 if y is proportional to x, 0 if it does not care."""
    x, y = ([math.log(value) for value in values] for values in (x, y))
    return sum((a - mean(x)) * (b - mean(y)) for a, b in zip(x, y)) / sum((a - mean(x)) ** 2 for a in x)


def decide(conditions: dict[str, list[float]], low: float = -math.inf, high: float = math.inf,
           needs: dict[str, bool] | None = None) -> dict:
    """The one decision rule. Each condition is a list of values over seeds; the claim says that all of them lie in [low, high].
    reproduced      the interval of every condition lies inside
    not reproduced  that of at least one lies outside, wholly
    cannot be told  anything else; or a need is not met (the measurement could not have come out otherwise), whatever the values say
    """
    found = {name: interval(values) for name, values in conditions.items()}
    inside = all(low <= a and b <= high for _, a, b in found.values())
    outside = any(b < low or a > high for _, a, b in found.values())
    unmet = [need for need, met in (needs or {}).items() if not met]
    return {"verdict": OPEN if unmet else REPRODUCED if inside else REFUTED if outside else OPEN, "unmet": unmet,
            "intervals": {name: [round(value, 4) for value in triple] for name, triple in found.items()}}


# ---- what is claimed, and when it is false --------------------------------------------------------------------------

def judge(found: dict) -> list[dict]:
    """Claims of the paper, then predictions of ours ("ours: ..."), each with its rule, a `control`, and `noise`: would matrices of noise,
    or a model without training, pass the same rule? A claim that they pass is true and no discovery. Rules were written before the data,
    but for quality "after a true past": it was added when a first quick run had given no long rollouts worth judging.

    Prediction about objects. An object has 4 degrees of freedom that move (position, velocity) and 2 that stay (colour, shape): 6, 12,
    24 for 1, 2, 4 objects. Were a latent a code of the world's state, its rank would double with them, slope 1. But a latent belongs to a
    *token*, a patch of 4 x 4 pixels, and a patch seldom sees more than one or two: we predict a slope below 0.5."""
    E, C, spectra, Q, verdicts = found["E"], str(found["C"]), found["spectra"], found["quality"], []
    narrow = str(min(found["widths"]))
    per_seed = lambda name, key, how: [how([layer[key] for layer in layers]) for layers in spectra[name]]

    def claim(words: str, rule: str, conditions: dict, low=-math.inf, high=math.inf, needs=None, noise=None, control=""):
        verdicts.append({"claim": words, "rule": rule, **decide(conditions, low, high, needs), "control": control,
                         "noise": None if noise is None else low <= noise <= high})

    moved = min(min(per_seed(name, "moved", min)) for name in OPTIMISERS)
    needs = {"training moved every [W_K; W_V] by at least half its norm": moved >= 0.5}
    noise, added = mean(per_seed("untrained", "rank99", mean)), [mean(per_seed(name, "rank99_update", mean)) for name in OPTIMISERS]
    claim("trained attention is not low-rank: 99 %-energy rank of [W_K; W_V] above 1300 of 1536 in every layer",
          "worst layer's rank / E >= 0.846, both optimisers", {name: per_seed(name, "rank99", min) for name in OPTIMISERS}, 1300 / 1536,
          needs=needs, noise=noise, control=f"untrained {noise:.3f}; what training added: {added[0]:.3f} and {added[1]:.3f}")
    noise, balanced = mean(per_seed("untrained", "kept", median)), [mean(per_seed(name, "kept_balanced", median)) for name in OPTIMISERS]
    claim("the best E / 8 directions keep about 46 % of the energy in the median layer", "0.46 +- 0.08, both optimisers",
          {name: per_seed(name, "kept", median) for name in OPTIMISERS}, 0.38, 0.54, needs, noise,
          f"untrained {noise:.3f}; with K and V balanced {balanced[0]:.3f} and {balanced[1]:.3f}")

    # Two claims of quality, the first for models too small to give rollouts that the second could judge.
    for where, keys, share in (("after a true past", ("colour", "place"), "frames"), ("in long rollouts", ("survival",), "rollouts")):
        gap = lambda kind, width: {key: [q[kind][width][key] - q["dense_tuned"][key] for q in Q] for key in keys}
        middle = lambda kind, width: ", ".join(f"{key} {mean(values):+.3f}" for key, values in gap(kind, width).items())
        nearest = max(interval(values)[2] for values in gap("tuned", narrow).values())
        claim(f"cut to C = E / 8 and tuned, MLA keeps the quality {where}",
              f"share of {share} within 0.10 of dense attention that was trained as long", gap("tuned", C), -0.10,
              needs={f"dense has it in at least half the {share}": min(mean(q["dense_tuned"][key] for q in Q) for key in keys) >= 0.5,
                     f"it can be lost: C = {narrow} is behind by more than 0.10": nearest < -0.10},
              control=f"right after the cut {middle('converted', C)}; C = {narrow} tuned {middle('tuned', narrow)}")

    runs = {f"{init}, {name}": found["budget"][name][init] for name in OPTIMISERS for init in ("spectral", "random")}
    at = lambda when, key: {name: [curve[when][key] for curve in curves] for name, curves in runs.items()}
    noise = mean(found["chance_budget"]["rank99"])
    control = f"a product of two matrices of noise {noise:.3f}"
    claim("M uses about 0.98 of its budget C before training, from either start", "99 %-energy rank / C >= 0.93, four runs",
          at(0, "rank99"), 0.93, noise=noise, control=control)
    end, needs = at(-1, "rank99"), {"training moved every M by at least half its norm": min(map(min, at(-1, "moved").values())) >= 0.5}
    claim("... and after training", "99 %-energy rank / C >= 0.93, four runs", end, 0.93, needs=needs, noise=noise, control=control)
    claim("... from spectral and random start alike", "difference after training within 0.05",
          {name: [a - b for a, b in zip(end[f"spectral, {name}"], end[f"random, {name}"])] for name in OPTIMISERS}, -0.05, 0.05, needs)
    few = [width for width in found["widths"] if width <= E // 4]
    grow = lambda ranks: slope(few, [ranks[str(width)] for width in few])
    noise = grow(found["chance_widths"])
    claim("the bottleneck, not the spectrum, sets the rank: that of M grows in proportion to C",
          f"slope of log rank on log C in [0.9, 1.1], C <= {E // 4}, tuned", {"slope": [grow(ranks) for ranks in found["rank_by_width"]]},
          0.9, 1.1, noise=noise, control=f"products of noise {noise:.3f}")

    lost = {key: mean(r[C][key] for r in found["reconstruction"]) for key in ("predicted", "data", "data_best")}
    claim("ours: weights overstate what the data loses at C = E / 8", "share of [K; V] lost on data / in weights <= 0.5",
          {"data / weights": [r[C]["data"] / r[C]["predicted"] for r in found["reconstruction"]]}, high=0.5,
          control=f"lost in weights {lost['predicted']:.3f}, on data {lost['data']:.3f}; by the data's best cut {lost['data_best']:.3f}")
    rise = {kind: [slope(OBJECTS, [run[kind][str(n)]["effective"] for n in OBJECTS]) for run in found["latents"]]
            for kind in ("trained", "untrained")}
    claim("ours: the rank of the latents grows more slowly than the world's degrees of freedom",
          "slope of log effective rank on log objects <= 0.5", {"slope": rise["trained"]}, high=0.5, noise=mean(rise["untrained"]),
          control=f"untrained {mean(rise['untrained']):.3f}; degrees of freedom 1")
    return verdicts


def reached(found: dict) -> list[str]:
    """The metrics that dense attention itself has in at least a fifth of the cases: another one cannot break."""
    return [key for key in METRICS if mean(q["dense_tuned"][key] for q in found["quality"]) >= 0.2]


def breaking(found: dict) -> dict[str, int | None]:
    """For each metric the widest C at which tuned MLA is behind dense by more than 5 points (loss: by more than 5 %), interval and all."""
    def behind(q, width, key):
        return q["dense_tuned"][key] - q["tuned"][width][key] if key != "loss" else q["tuned"][width][key] / q["dense_tuned"][key] - 1

    broken = {key: [width for width in found["widths"] if interval([behind(q, str(width), key) for q in found["quality"]])[1] > 0.05]
              for key in (*reached(found), "loss")}
    return {key: max(widths, default=None) for key, widths in broken.items()}
