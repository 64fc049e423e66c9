"""The laboratory: loading the code under test, drawing sizes and numbers, comparing answers.

`forall` is hypothesis.given. Tests take `code`, a namespace of modules, and never import the modules by name: pytest passes the shipped
ones, test_mutants.py passes broken copies, so every mutant meets the very test, with the very examples, that guards the shipped code.
"""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from oracles import axis_split

ROOT = Path(__file__).resolve().parent.parent
FILES = ("rope3d", "cache", "attention", "mla_video", "checkpoint", "compiled", "sample", "parallel", "objectives", "trainer", "train")
CPU_ROUTES = ("reference", "materialised", "absorbed")     # routes that refuse the CPU have tests of their own

# float64 rounds at 1.1e-16; sums of some hundred products through a few layers stay below 1e-13 here, whereas the mildest of the
# mutants is wrong by 1e-4 or more. 1e-10 has three digits of room on one side and six on the other.
EXACT = 1e-10


class Code:
    """The modules under test, as attributes: code.cache, code.attention, ..."""

    def __init__(self, name: str):
        self.name = name
        vars(self).update({file: importlib.import_module(file) for file in FILES})

    def __repr__(self):
        return self.name


def shipped() -> Code:
    return Code("shipped")


def load_from(folder: Path) -> Code:
    """The modules of a folder, imported afresh beside the shipped ones, which stay what `import` finds afterwards."""
    kept = {name: sys.modules.pop(name) for name in FILES if name in sys.modules}
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        return Code(f"copy_in_{folder.name}")
    finally:
        sys.path.remove(str(folder))
        for name in FILES:
            sys.modules.pop(name, None)
        sys.modules.update(kept)


def forall(**strategies):
    """`given`, read as in mathematics. The same test without shrinking is kept as `.hunt`: to kill a mutant the first
    counterexample is enough."""
    def decorate(test):
        proof = given(**strategies)(test)
        proof.hunt = settings(phases=(Phase.explicit, Phase.generate), report_multiple_bugs=False)(given(**strategies)(test))
        return proof
    return decorate


# ---- comparing ------------------------------------------------------------------------------------------------------


def numbers(x) -> np.ndarray:
    return x.detach().double().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x, dtype=np.float64)


def error(got, want) -> float:
    """||got - want|| / ||want||. Refuses what would make any comparison pass or mean nothing: NaN, and an all-zero answer."""
    got, want = numbers(got), numbers(want)
    assert got.shape == want.shape, f"shape {got.shape}, expected {want.shape}"
    assert np.isfinite(want).all(), "the expected answer itself is NaN or infinite: the test is broken"
    assert np.linalg.norm(want) > 0, "the expected answer is all zero: this comparison could not fail"
    assert np.isfinite(got).all(), f"{(~np.isfinite(got)).sum()} of {got.size} numbers are NaN or infinite"
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def assert_same(got, want, tolerance: float, message: str) -> None:
    wrong = error(got, want)
    assert wrong <= tolerance, f"{message}\n    relative error {wrong:.2e}, allowed {tolerance:.0e}"


def assert_zero(x, message: str) -> None:
    """Exactly zero: not small. A dependency that does not exist leaves no rounding behind."""
    assert x is None or not x.any(), f"{message}\n    largest value {x.abs().max().item():.2e}, must be exactly 0"


def entropy(p, visible) -> tuple[float, int]:
    """Mean entropy of probability rows as a share of the uniform row's, log(number of visible keys), and how many rows that is. Rows with
    fewer than three keys are left out."""
    count = np.broadcast_to(visible.sum(-1), p.shape[:-1])
    rows = count >= 3
    plogp = np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0)
    return float((-plogp.sum(-1)[rows] / np.log(count[rows])).mean()) if rows.any() else 0.5, int(rows.sum())


def assert_alive(p, visible) -> None:
    """Softmax neither one-hot nor uniform: one-hot attention hides wrong values of all other keys, uniform attention hides wrong
    scores. 99.99 % of uniform is a spread of scores of about 0.02, still eight digits above the tolerance; the sane middle is
    asserted where many draws can be averaged (test_routes.test_typical_attention_is_neither_flat_nor_one_hot)."""
    share, rows = entropy(p, visible)
    if rows >= 6:
        assert 0.02 < share < 0.9999, f"attention is degenerate (entropy {share:.2%} of uniform): this comparison could not fail"


# ---- drawing --------------------------------------------------------------------------------------------------------


class Dice:
    """Standard normal float64 tensors from a seed."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def below(self, top: int, *shape: int) -> torch.Tensor:
        return torch.randint(top, shape, generator=self.generator)

    def points(self, tokens: int) -> torch.Tensor:
        """Integer points (t, y, x)."""
        return self.below(12, tokens, 3)

    def mask(self, L: int, T: int) -> torch.Tensor:
        """Who may look, at random; everybody sees somebody."""
        mask = torch.rand(L, T, generator=self.generator) < 0.6
        return mask.index_put((torch.arange(L), self.below(T, L)), torch.tensor(True))


def enliven(module: torch.nn.Module, seed: int):
    """Give every parameter random values of a size at which each matters: matrices keep the variance of what they map, queries are 1.5x
    that (scores with a spread of about 1.5), vectors stray from their defaults. (A new model is deliberately mute: its head is zero.)"""
    dice = Dice(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            gain = 1.5 if any(part in name for part in ("W_UQ", "W_QR", "W_Q.")) else 1.0
            value = dice.normal(*p.shape) * (gain * p.shape[-1] ** -0.5 if p.dim() == 2 and p.shape[-1] else 0.3)
            p.copy_(value + ("norm" in name and name.endswith("weight")))
    return module


def weights(layer) -> dict[str, np.ndarray]:
    """A layer's weights by the paper's names, for the oracles."""
    return {name.removesuffix(".weight"): numbers(p) for name, p in layer.named_parameters()}


seeds = st.integers(0, 2**31)
# (R, width of the full head it is taken from) for which every axis has the bands that R asks for
NARROW = [(R, d) for d in range(8, 22, 2) for R in range(6, d, 2) if all(m <= f for m, f in zip(axis_split(R), axis_split(d)))]
HEADS = [6, 8, 10, 12, 14]                                 # widths of full heads, among them all three remainders of pairs by 3
COUNTS = st.one_of(st.integers(1, 20), st.sampled_from([1, 2, 128]))   # tokens: ragged, and a multiple of 128


@dataclass(frozen=True)
class Sizes:
    """The letters of attention.py; `head` is the full head that the R rope channels are taken from."""
    B: int
    L: int
    T: int
    H: int
    N: int
    R: int
    V: int
    C: int
    head: int
    seed: int


@st.composite
def sizes(draw, least: int = 1):
    """Any sizes, none below `least`."""
    R, head = draw(st.sampled_from(NARROW))
    N, counts = draw(st.integers(least, 12)), COUNTS.map(lambda tokens: max(tokens, least))
    V = draw(st.one_of(st.just(N), st.integers(least, 12)))    # with equal widths no shape error gives swapped weights away
    return Sizes(draw(st.integers(1, 3)), draw(counts), draw(counts), draw(st.integers(least, 4)), N, R, V, draw(st.integers(least, 16)),
                 head, draw(seeds))


@st.composite
def configs(draw, min_chunks: int = 1, attention=("mla", "dense"), layers: int = 3, **fixed):
    """Sizes of a whole model, as keywords of Config: any grid, chunk, window and sink that are possible together."""
    rope, head = draw(st.sampled_from(NARROW[:8]))
    heads, chunk, patch = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    frames = chunk * draw(st.integers(min_chunks, 4))
    window = draw(st.integers(chunk, frames))
    chosen = dict(
        attention=draw(st.sampled_from(attention)), dim=heads * head, heads=heads, rope=rope, layers=draw(st.integers(1, layers)),
        latent=draw(st.integers(2, 12)), query_latent=draw(st.integers(2, 16)), ffn=draw(st.integers(1, 12)),
        channels=draw(st.integers(1, 3)), patch=patch, height=patch * draw(st.integers(1, 3)), width=patch * draw(st.integers(1, 3)),
        words=5, slots=draw(st.integers(1, 3)), frames=frames, chunk=chunk, window=window, sink=draw(st.integers(0, window - chunk)),
        norm=draw(st.booleans()), place=draw(st.booleans()))
    return chosen | fixed
