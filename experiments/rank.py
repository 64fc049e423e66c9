"""How many directions does a matrix use? Counting rules, what chance alone gives, and how three seeds become a verdict.

Everything here takes singular values `s` (any order) and weighs directions by *energy*, s_i^2 / sum s^2: the share of the squared
error that leaving out direction i would cost (Eckart-Young). Pure functions; tests/test_spectrum.py holds them to closed forms.
"""

import math
from statistics import mean, stdev

import torch
from torch import Tensor

REPRODUCED, REFUTED, OPEN = "reproduced", "not reproduced", "cannot be told here"
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


# ---- from seeds to a verdict ----------------------------------------------------------------------------------------

def interval(values: list[float]) -> tuple[float, float, float]:
    """(mean, low, high): Student's 95 % interval of the mean over seeds. With 3 seeds it is 2.5 standard deviations to either side."""
    half = STUDENT[len(values)] * stdev(values) / len(values) ** 0.5
    return mean(values), mean(values) - half, mean(values) + half


def slope(x: list[float], y: list[float]) -> float:
    """Least squares d log y / d log x: 1 if y is proportional to x, 0 if it does not care."""
    x, y = ([math.log(value) for value in values] for values in (x, y))
    return sum((a - mean(x)) * (b - mean(y)) for a, b in zip(x, y)) / sum((a - mean(x)) ** 2 for a in x)


def decide(conditions: dict[str, list[float]], low: float = -math.inf, high: float = math.inf, needs: dict[str, bool] | None = None) -> dict:
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
