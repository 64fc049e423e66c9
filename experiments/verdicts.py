"""From three seeds to a verdict: one decision rule, the claims it is put to, and what would
make each of them false.

`found` is what experiments/spectrum.py measures. Every claim is a function of it; `judge` asks
all of them. Claims of the paper come first, then predictions of ours ("ours: ..."). Rules were
written before the data, but for quality "after a true past": that one was added when a first
quick run had given no long rollouts worth judging.

Each claim says whether noise would pass its rule, too: matrices of noise, or a model without
training. A claim that noise passes is true and no discovery. tests/test_spectrum.py makes up
worlds in which each claim is false and asks that it be called so.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import mean, median, stdev

REPRODUCED = "reproduced"
REFUTED = "not reproduced"
OPEN = "cannot be told here"

OPTIMISERS = ("Muon", "AdamW")
OBJECTS = (1, 2, 4)
METRICS = ("colour", "shape", "place", "survival")
# The 97.5 % point of Student's t, by the number of values.
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}


# ---- the rule --------------------------------------------------------------------------------

def interval(values: list[float]) -> tuple[float, float, float]:
    """(mean, low, high): Student's 95 % interval of the mean over seeds. With 3 seeds it is 2.5
    standard deviations to either side. nan, if one of them is."""
    middle = mean(values)
    if math.isnan(middle):
        return math.nan, math.nan, math.nan
    half = STUDENT[len(values)] * stdev(values) / len(values) ** 0.5
    return middle, middle - half, middle + half


def slope(x: list[float], y: list[float]) -> float:
    """Least squares d log y / d log x: 1 if y is proportional to x, 0 if it does not care."""
    x = [math.log(value) for value in x]
    y = [math.log(value) for value in y]
    x_mean = mean(x)
    y_mean = mean(y)
    products = sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y))
    squares = sum((a - x_mean) ** 2 for a in x)
    return products / squares


def extent(values: list[float]) -> tuple[float, float, float]:
    """(mean, least, most) of values that are all there are, and no sample of more."""
    return mean(values), min(values), max(values)


def decide(conditions: dict[str, list[float]], low: float = -math.inf, high: float = math.inf,
           needs: dict[str, bool] | None = None, strict: bool = False,
           bracket: Callable = interval) -> dict:
    """The one decision rule. Each condition is a list of values over seeds; the claim says that
    all lie in [low, high], `strict`: between the two, so that nothing but zeros is not "> 0".

    reproduced      the interval of every condition lies inside
    not reproduced  that of at least one lies outside, wholly
    cannot be told  anything else; or a need is not met, that is, the measurement could not have
                    come out otherwise
    """
    found = {name: bracket(values) for name, values in conditions.items()}
    inside = True
    outside = False
    for _, bottom, top in found.values():
        beyond = top < low or bottom > high
        within = low <= bottom and top <= high             # nan is neither
        if strict:
            beyond = top <= low or bottom >= high
            within = low < bottom and top < high
        inside = inside and within
        outside = outside or beyond
    unmet = [need for need, met in (needs or {}).items() if not met]

    if unmet:
        verdict = OPEN
    elif inside:
        verdict = REPRODUCED
    elif outside:
        verdict = REFUTED
    else:
        verdict = OPEN
    intervals = {}
    for name, triple in found.items():
        intervals[name] = [round(value, 4) for value in triple]
    return {"verdict": verdict, "unmet": unmet, "intervals": intervals}


@dataclass
class Claim:
    """What is said, and all that decides about it."""
    words: str
    rule: str
    conditions: dict[str, list[float]]                     # {name: a value a seed}
    low: float = -math.inf
    high: float = math.inf
    needs: dict[str, bool] = field(default_factory=dict)
    strict: bool = False                                   # the bounds themselves are outside
    bracket: Callable = interval
    noise: float | None = None                             # the value that noise would have
    control: str = ""

    def verdict(self) -> dict:
        """As results/spectrum.json holds it. "noise": does noise pass the rule? None: nobody
        asked."""
        decided = decide(self.conditions, self.low, self.high, self.needs, self.strict,
                         self.bracket)
        passes = None
        if self.noise is not None:
            passes = self.low <= self.noise <= self.high
        return {
            "claim": self.words,
            "rule": self.rule,
            **decided,
            "control": self.control,
            "noise": passes,
        }


# ---- claims about the weights ----------------------------------------------------------------

def per_seed(found: dict, name: str, key: str, summary: Callable) -> list[float]:
    """One value a seed: the `summary` (min, median, mean) of the layers' `key`."""
    values = []
    for layers in found["spectra"][name]:
        values.append(summary([layer[key] for layer in layers]))
    return values


def per_optimiser(found: dict, key: str, summary: Callable) -> dict[str, list[float]]:
    return {name: per_seed(found, name, key, summary) for name in OPTIMISERS}


def means(found: dict, key: str, summary: Callable) -> str:
    """ "0.921 and 0.706": the mean over seeds of `summary`, of either optimiser."""
    values = per_optimiser(found, key, summary).values()
    return " and ".join(f"{mean(seeds):.3f}" for seeds in values)


def dense_moved(found: dict) -> dict[str, bool]:
    least = min(min(values) for values in per_optimiser(found, "moved", min).values())
    return {"training moved every [W_K; W_V] by at least half its norm": least >= 0.5}


def not_low_rank(found: dict) -> Claim:
    noise = mean(per_seed(found, "untrained", "rank99", mean))
    return Claim(
        "trained attention is not low-rank: 99 %-energy rank of [W_K; W_V] above 1300 of 1536 in "
        "every layer",
        "worst layer's rank / E >= 0.846, both optimisers",
        per_optimiser(found, "rank99", min),
        low=1300 / 1536,
        needs=dense_moved(found),
        noise=noise,
        control=f"untrained {noise:.3f}; what training added: {means(found, 'rank99_update', mean)}",
    )


def kept_by_an_eighth(found: dict) -> Claim:
    noise = mean(per_seed(found, "untrained", "kept", median))
    balanced = means(found, "kept_balanced", median)
    return Claim(
        "the best E / 8 directions keep about 46 % of the energy in the median layer",
        "0.46 +- 0.08, both optimisers",
        per_optimiser(found, "kept", median),
        low=0.38,
        high=0.54,
        needs=dense_moved(found),
        noise=noise,
        control=f"untrained {noise:.3f}; with K and V balanced {balanced}",
    )


# ---- claims about quality: what is lost by the cut, against dense attention trained as long --

def gap(found: dict, kind: str, width: str, keys: tuple[str, ...]) -> dict[str, list[float]]:
    """MLA minus dense at one C, for each metric of `keys`; kind "converted" (right after the
    cut) or "tuned"."""
    gaps = {}
    for key in keys:
        gaps[key] = [q[kind][width][key] - q["dense_tuned"][key] for q in found["quality"]]
    return gaps


def mean_gap(found: dict, kind: str, width: str, keys: tuple[str, ...]) -> str:
    gaps = gap(found, kind, width, keys)
    return ", ".join(f"{key} {mean(values):+.3f}" for key, values in gaps.items())


def keeps_quality(found: dict, where: str, keys: tuple[str, ...], share: str) -> Claim:
    C = str(found["C"])
    narrow = str(min(found["widths"]))
    dense = [mean(q["dense_tuned"][key] for q in found["quality"]) for key in keys]
    narrow_gaps = gap(found, "tuned", narrow, keys).values()
    nearest = max(interval(values)[2] for values in narrow_gaps)
    after_cut = mean_gap(found, "converted", C, keys)
    after_tuning = mean_gap(found, "tuned", narrow, keys)
    return Claim(
        f"cut to C = E / 8 and tuned, MLA keeps the quality {where} ({' and '.join(keys)})",
        f"share of {share} within 0.10 of dense attention that was trained as long",
        gap(found, "tuned", C, keys),
        low=-0.10,
        needs={
            f"dense has it in at least half the {share}": min(dense) >= 0.5,
            f"it can be lost: C = {narrow} is behind by more than 0.10": nearest < -0.10,
        },
        control=f"right after the cut {after_cut}; C = {narrow} tuned {after_tuning}",
    )


def keeps_quality_after_a_true_past(found: dict) -> Claim:
    """For models too small to give long rollouts that the next claim could judge."""
    return keeps_quality(found, "after a true past", ("colour", "place"), "frames")


def keeps_quality_in_long_rollouts(found: dict) -> Claim:
    return keeps_quality(found, "in long rollouts", ("survival",), "rollouts")


# ---- claims about the budget: how much of its C does M use? ----------------------------------

def of_runs(found: dict, when: int, key: str) -> dict[str, list[float]]:
    """A value a seed for each of the four runs, at the first (0) or the last (-1) point of
    their curves."""
    values = {}
    for optimiser in OPTIMISERS:
        for start in ("spectral", "random"):
            curves = found["budget"][optimiser][start]
            values[f"{start}, {optimiser}"] = [curve[when][key] for curve in curves]
    return values


def latents_moved(found: dict) -> dict[str, bool]:
    least = min(min(values) for values in of_runs(found, -1, "moved").values())
    return {"training moved every M by at least half its norm": least >= 0.5}


def uses_its_budget_at_first(found: dict) -> Claim:
    noise = mean(found["chance_budget"]["rank99"])
    return Claim(
        "M uses nearly all of its budget C before training, from either start",
        "99 %-energy rank / C >= 0.93, four runs",
        of_runs(found, 0, "rank99"),
        low=0.93,
        noise=noise,
        control=f"a product of two matrices of noise {noise:.3f}",
    )


def uses_its_budget_at_last(found: dict) -> Claim:
    noise = mean(found["chance_budget"]["rank99"])
    return Claim(
        "... and after training (the paper: 0.98, in students that began as an SVD)",
        "99 %-energy rank / C >= 0.93, four runs",
        of_runs(found, -1, "rank99"),
        low=0.93,
        needs=latents_moved(found),
        noise=noise,
        control=f"a product of two matrices of noise {noise:.3f}",
    )


def either_start_ends_alike(found: dict) -> Claim:
    end = of_runs(found, -1, "rank99")
    differences = {}
    for name in OPTIMISERS:
        spectral = end[f"spectral, {name}"]
        random = end[f"random, {name}"]
        differences[name] = [a - b for a, b in zip(spectral, random)]
    return Claim(
        "... from spectral and random start alike",
        "difference after training within 0.05",
        differences,
        low=-0.05,
        high=0.05,
        needs=latents_moved(found),
    )


def bottleneck_sets_the_rank(found: dict) -> Claim:
    """How far M moved was kept at one C alone, E / 8. So this claim has the need of those above,
    which asks it of all four runs there."""
    widths = [width for width in found["widths"] if width <= found["E"] // 4]

    def growth(ranks: dict[str, float]) -> float:
        return slope(widths, [ranks[str(width)] for width in widths])

    noise = growth(found["chance_widths"])
    return Claim(
        "the bottleneck, not the spectrum, sets the rank: that of M grows in proportion to C",
        f"slope of log rank on log C in [0.9, 1.1], C <= {found['E'] // 4}, tuned",
        {"slope": [growth(ranks) for ranks in found["rank_by_width"]]},
        low=0.9,
        high=1.1,
        needs=latents_moved(found),
        noise=noise,
        control=f"products of noise {noise:.3f}",
    )


# ---- predictions of ours ---------------------------------------------------------------------

def weights_overstate_the_loss(found: dict) -> Claim:
    at_C = [run[str(found["C"])] for run in found["reconstruction"]]
    lost = {key: mean(run[key] for run in at_C) for key in ("predicted", "data", "data_best")}
    return Claim(
        "ours: weights overstate what the data loses at C = E / 8",
        "share of [K; V] lost on data / in weights <= 0.5",
        {"data / weights": [run["data"] / run["predicted"] for run in at_C]},
        high=0.5,
        control=f"lost in weights {lost['predicted']:.3f}, on data {lost['data']:.3f}; "
                f"by the data's best cut {lost['data_best']:.3f}",
    )


def latents_follow_tokens(found: dict) -> Claim:
    """An object has 4 degrees of freedom that move (position, velocity) and 2 that stay
    (colour, shape): 6, 12, 24 for 1, 2, 4 objects. Were a latent a code of the world's state,
    its rank would double with them, slope 1. But a latent belongs to a *token*, a patch of 4 x
    4 pixels, and a patch seldom sees more than one or two: we predict a slope below 0.5."""
    slopes = {}
    for kind in ("trained", "untrained"):
        slopes[kind] = []
        for run in found["latents"]:
            ranks = [run[kind][str(objects)]["effective"] for objects in OBJECTS]
            slopes[kind].append(slope(OBJECTS, ranks))
    noise = mean(slopes["untrained"])
    return Claim(
        "ours: the rank of the latents grows more slowly than the world's degrees of freedom",
        "slope of log effective rank on log objects <= 0.5",
        {"slope": slopes["trained"]},
        high=0.5,
        noise=noise,
        control=f"untrained {noise:.3f}; degrees of freedom 1",
    )


# ---- all of them -----------------------------------------------------------------------------

CLAIMS = (
    not_low_rank,
    kept_by_an_eighth,
    keeps_quality_after_a_true_past,
    keeps_quality_in_long_rollouts,
    uses_its_budget_at_first,
    uses_its_budget_at_last,
    either_start_ends_alike,
    bottleneck_sets_the_rank,
    weights_overstate_the_loss,
    latents_follow_tokens,
)


def judge(found: dict) -> list[dict]:
    """The verdict on every claim, in the order of CLAIMS."""
    return [claim(found).verdict() for claim in CLAIMS]


def reached(found: dict) -> list[str]:
    """The metrics that dense attention itself has in at least a fifth of the cases: another one
    cannot break."""
    metrics = []
    for key in METRICS:
        dense = mean(q["dense_tuned"][key] for q in found["quality"])
        if dense >= 0.2:
            metrics.append(key)
    return metrics


def behind(q: dict, width: str, key: str) -> float:
    """How far tuned MLA at one C is behind dense: a share of cases, or of the loss."""
    mla = q["tuned"][width][key]
    dense = q["dense_tuned"][key]
    return mla / dense - 1 if key == "loss" else dense - mla


def breaking(found: dict) -> dict[str, int | None]:
    """For each metric the widest C at which tuned MLA is behind dense by more than 5 points
    (loss: by more than 5 %), interval and all. None: no C breaks it."""
    widest = {}
    for key in (*reached(found), "loss"):
        widest[key] = None
        for width in sorted(found["widths"]):
            values = [behind(q, str(width), key) for q in found["quality"]]
            if interval(values)[1] > 0.05:
                widest[key] = width
    return widest
