"""How many directions does a matrix use? Counting rules, what chance alone gives, and the
matrices of the layers.

Everything here takes singular values `s`, in any order, and weighs directions by *energy*,
s_i^2 / sum s^2. That is the share of the squared error that leaving out direction i would cost
(Eckart-Young).

M is what an MLA layer makes of its input for keys and values together:
[W_UK W_DKV; W_UV W_DKV], of shape [H (N + V), E].

Letters: E width, C latent width, H heads, N and V content and value channels per head.
These are pure functions. tests/test_spectrum.py holds them to closed forms.
"""

import math
from statistics import mean

import torch
from torch import Tensor

from attention import MLA, Dense, fastest_channels
from mla_video import VideoDiT


# ---- counting --------------------------------------------------------------------------------

def energy(s: Tensor) -> Tensor:
    """Share of each direction, largest first; sums to 1. ValueError for a matrix of zeros,
    which has no directions."""
    squares = s.double().square()
    if not squares.sum() > 0:
        raise ValueError("the rank of a matrix of zeros (or of none) is not defined by energy")
    squares = squares.sort(descending=True).values
    return squares / squares.sum()


def energy_kept(s: Tensor, k: int) -> float:
    """Share of the energy in the best k directions. 1 minus this is the tail: the error of the
    best copy of rank k."""
    return energy(s)[:k].sum().item()


def energy_rank(s: Tensor, share: float = 0.99) -> float:
    """Directions that hold `share` of the energy, the last one counted in part.

    Counting whole ones gives the ceiling of this number: at C = 192 a whole direction is half a
    percent of the budget, at our C = 16 it is 6 %. (The paper does not say how it counts, nor
    whether energy is sigma or its square.) The flattest matrix there is, with n equal singular
    values, scores `share` * n: with the 99 % rule no budget can be used beyond 0.99.
    """
    shares = energy(s)
    reached = shares.cumsum(0)
    whole = int((reached < share - 1e-12).sum())           # rounding must not add a direction
    before = reached[whole - 1] if whole else 0
    part = (share - before) / shares[whole]
    return whole + part.item()


def effective_rank(s: Tensor) -> float:
    """exp of the entropy of the energies: n for n equal directions, 1 for one. Unlike the 99 %
    rule it sees inequality among the strong directions, so it does not saturate where a
    spectrum is full but steep."""
    shares = energy(s)
    entropy = -torch.special.xlogy(shares, shares).sum()
    return math.exp(entropy.item())


# ---- chance ----------------------------------------------------------------------------------

def marchenko_pastur_edges(beta: float) -> tuple[float, float]:
    """Where the eigenvalues of W^T W / m end, for W [m, n] of independent entries of variance 1
    and beta = n / m <= 1."""
    return (1 - beta**0.5) ** 2, (1 + beta**0.5) ** 2


def marchenko_pastur(n: int, beta: float) -> Tensor:
    """Singular values [n], largest first, that chance gives such a matrix: the quantiles of the
    law

        density(x) = sqrt((b - x) (x - a)) / (2 pi beta x)

    between the edges a < b, for beta < 1.

    With x = middle + half * cos(theta) the square roots go:
    density dx = half^2 sin^2(theta) / (2 pi beta x) dtheta.
    """
    a, b = marchenko_pastur_edges(beta)
    middle = (a + b) / 2
    half = (b - a) / 2
    theta = torch.linspace(0, math.pi, 20_001, dtype=torch.float64)        # 0 is the upper edge
    x = middle + half * theta.cos()
    height = (half * theta.sin()).square()
    density = height / (2 * math.pi * beta * x)
    above = torch.cumulative_trapezoid(density, theta)     # eigenvalues above x,
    above = above / above[-1]                              # as a share of all
    above = torch.cat((above.new_zeros(1), above))
    quantiles = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    at = torch.searchsorted(above, quantiles)
    return x[at].sqrt()


def random_product(height: int, C: int, E: int, seed: int) -> Tensor:
    """Singular values [C] of a product of two matrices of noise, [height, C] [C, E]: M with
    nothing learned."""
    g = torch.Generator().manual_seed(seed)
    up = torch.randn(height, C, generator=g, dtype=torch.float64)
    down = torch.randn(C, E, generator=g, dtype=torch.float64)
    # down = triangle^T Q^T, and Q^T changes no singular value.
    triangle = torch.linalg.qr(down.T)[1]
    return torch.linalg.svdvals(up @ triangle.T)


# ---- layers ----------------------------------------------------------------------------------

def weight(linear) -> Tensor:
    return linear.weight.detach().cpu().double()


def composite(layer: MLA) -> Tensor:
    """M [H (N + V), E], of rank C at most."""
    up = torch.cat((weight(layer.W_UK), weight(layer.W_UV)))
    return up @ weight(layer.W_DKV)


def stacked(layer: Dense, balanced: bool = False) -> Tensor:
    """[W_K; W_V] [2 E, E], as the paper takes it. Balanced: each is first divided by its
    Frobenius norm, which is what `MLA.from_dense` balances by."""
    W_K = weight(layer.W_K)
    W_V = weight(layer.W_V)
    if balanced:
        W_K = W_K / W_K.norm()
        W_V = W_V / W_V.norm()
    return torch.cat((W_K, W_V))


def dense_spectrum(layer: Dense, start: Dense | None = None) -> dict:
    """The spectrum of one layer. With `start`, the layer before training, also how far training
    has moved it."""
    W = stacked(layer)
    E = layer.W_K.in_features
    s = torch.linalg.svdvals(W)
    balanced = torch.linalg.svdvals(stacked(layer, balanced=True))
    K_over_V = weight(layer.W_K).norm() / weight(layer.W_V).norm()
    shares = energy(s).tolist()
    found = {
        "rank99": energy_rank(s) / E,
        "kept": energy_kept(s, E // 8),
        "kept_balanced": energy_kept(balanced, E // 8),
        "rank99_balanced": energy_rank(balanced) / E,
        "K_over_V": K_over_V.item(),
        "energy": [round(share, 6) for share in shares],
    }
    if start is not None:
        before = stacked(start)
        added = torch.linalg.svdvals(W - before)
        found["moved"] = (added.norm() / before.norm()).item()
        found["rank99_update"] = energy_rank(added) / E
    return found


def of_weights(model: VideoDiT) -> list[dict]:
    """The paper's figure 1, a row a layer: of [W_K; W_V] of a dense one, of M of an MLA one.

    rank99   whole directions that hold 99 % of the energy
    kept     energy of the best E / 8 directions, or C of an MLA layer
    """
    rows = []
    for block in model.blocks:
        layer = block.attention
        latent = isinstance(layer, MLA)
        W = composite(layer) if latent else stacked(layer)
        C = layer.widths[0] if latent else W.shape[1] // 8
        s = quick_singular_values(W)
        rows.append({"rank99": math.ceil(energy_rank(s)), "kept": energy_kept(s, C), "C": C})
    return rows


def quick_singular_values(W: Tensor) -> Tensor:
    """Those of a tall W by the eigenvalues of W^T W: in a tenth of the time, and exact but for
    values below 1e-8 of the largest, which hold no energy."""
    return torch.linalg.eigvalsh(W.T @ W).clamp_min(0).sqrt()


def budget(layers: list[MLA], start: list[Tensor]) -> dict:
    """Share of its budget C that M uses, mean over layers: by the 99 % rule (0.99 at most) and
    by entropy (1 at most). `moved` is how far the least moved of them is from its M at the
    `start`, relative to the norm of that."""
    ranks = []
    entropies = []
    moved = []
    for layer, before in zip(layers, start):
        C = layer.widths[0]
        M = composite(layer)
        s = torch.linalg.svdvals(M)[:C]
        ranks.append(energy_rank(s) / len(s))
        entropies.append(effective_rank(s) / len(s))
        distance = (M - before).norm() / before.norm()
        moved.append(distance.item())
    return {"rank99": mean(ranks), "effective": mean(entropies), "moved": min(moved)}


@torch.no_grad()
def covariances(model: VideoDiT, video: Tensor, caption: Tensor) -> list[Tensor]:
    """Covariance [E, E] of the input of every self-attention over the tokens of clean clips, as
    `commit` sees them. Centred: a constant in all keys changes no softmax, and a constant in
    all values is a bias."""
    inputs = []

    def keep_input(layer, arguments, output):
        inputs.append(arguments[0].detach())

    hooks = []
    for block in model.blocks:
        attention = block.attention
        first = attention.W_DKV if isinstance(attention, MLA) else attention.W_K
        hooks.append(first.register_forward_hook(keep_input))
    sigma = video.new_zeros(video.shape[:2])
    model(video, video, sigma, caption)
    for hook in hooks:
        hook.remove()

    clean = video.shape[1] * model.config.tokens           # tokens of the sequence's clean half
    found = []
    for x in inputs:
        tokens = x[:, :clean].flatten(0, 1)                # [B * clean, E]
        found.append(torch.cov(tokens.cpu().double().T))
    return found


def latent_rank(model: VideoDiT, video: Tensor, caption: Tensor) -> dict:
    """Effective rank of the latents on these clips, mean over layers. It is that of the
    covariance of M x: that of c_kv alone would depend on the basis of the latent space, which
    nothing fixes."""
    effective = []
    rank99 = []
    for block, cov in zip(model.blocks, covariances(model, video, caption)):
        M = composite(block.attention)
        variances = torch.linalg.eigvalsh(M @ cov @ M.T)
        s = variances.clamp_min(0).sqrt()
        effective.append(effective_rank(s))
        rank99.append(energy_rank(s))
    return {"effective": mean(effective), "rank99": mean(rank99)}


def content_keys(dense: Dense, R: int) -> Tensor:
    """The part of W_K [H * N, E] that a conversion puts into the latent. The R fastest channels
    of each head turn, and W_KR carries those."""
    W_K = weight(dense.W_K).unflatten(0, (dense.heads, -1))                # [H, d_h, E]
    channels = W_K.shape[1]
    turning = fastest_channels(R, channels)
    rest = [i for i in range(channels) if i not in turning]
    return W_K[:, rest].flatten(0, 1)


def lost_share(error: Tensor, whole: Tensor, cov: Tensor) -> float:
    """What share of the mean squared output of `whole` is `error`, for inputs of covariance
    `cov`."""
    lost = torch.trace(error @ cov @ error.T)
    total = torch.trace(whole @ cov @ whole.T)
    return (lost / total).item()


def reconstruction(dense: Dense, mla: MLA, cov: Tensor) -> dict:
    """Share of [K; V] that the conversion loses, K and V balanced.

    predicted   in weights: the tail of the singular values
    measured    in weights: what the converted layer differs by
    data        on data, that is weighted by the covariance of the inputs
    data_best   the least that any map of rank C could lose on that data
    """
    C, R = mla.widths
    keys = content_keys(dense, R)
    values = weight(dense.W_V)
    whole = torch.cat((keys / keys.norm(), values / values.norm()))

    M = composite(mla)
    cut = torch.cat((M[:len(keys)] / keys.norm(), M[len(keys):] / values.norm()))
    error = whole - cut

    identity = torch.eye(len(cov), dtype=cov.dtype)
    variances, directions = torch.linalg.eigh(cov)
    root = directions * variances.clamp_min(0).sqrt()
    return {
        "predicted": 1 - energy_kept(torch.linalg.svdvals(whole), C),
        "measured": lost_share(error, whole, identity),
        "data": lost_share(error, whole, cov),
        "data_best": 1 - energy_kept(torch.linalg.svdvals(whole @ root), C),
    }
