"""The laboratory: loading the code under test, drawing sizes and numbers, comparing answers.

`forall` is hypothesis.given. Tests take `code`, a namespace of modules, and never import the
modules by name: pytest passes the shipped ones, test_mutants.py passes broken copies, so every
mutant meets the very test, with the very examples, that guards the shipped code.
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

# The modules under test. fused.py is not among them: it registers an operator, and a process
# can hold one operator of a name.
BOOK = ("rope3d", "cache", "attention", "mla_video", "flow", "objectives", "toy_data",
        "metrics", "train", "sample")
ENGINE = tuple(f"engine.{path.stem}" for path in sorted((ROOT / "engine").glob("[a-z]*.py")))
FILES = BOOK + ENGINE

# The routes of attention.py, by name. One that needs a GPU has its own test file.
CPU_ROUTES = ("reference", "materialised", "absorbed")

# float64 rounds at 1.1e-16; sums of some hundred products through a few layers stay below 1e-13
# here, whereas the mildest of the mutants is wrong by 1e-4 or more. 1e-10 has three digits of
# room on one side and six on the other.
EXACT = 1e-10


# ---- the code under test --------------------------------------------------------------------


def source_of(module: str) -> str:
    """Where a module lies below the root: engine.trainer -> engine/trainer.py."""
    return module.replace(".", "/") + ".py"


class Code:
    """The modules under test as attributes, by their last name: code.cache, code.trainer."""

    def __init__(self, name: str):
        self.name = name
        for module in FILES:
            attribute = module.split(".")[-1]
            setattr(self, attribute, importlib.import_module(module))

    def __repr__(self):
        return self.name


def shipped() -> Code:
    return Code("shipped")


def forget_our_modules() -> dict:
    """Take the modules under test, and the packages that hold them, out of what Python has
    imported, and return them."""
    packages = {module.split(".")[0] for module in FILES}
    ours = [name for name in sys.modules if name.split(".")[0] in packages]
    return {name: sys.modules.pop(name) for name in ours}


def load_from(folder: Path) -> Code:
    """The modules of a folder, imported afresh beside the shipped ones, which stay what
    `import` finds afterwards."""
    kept = forget_our_modules()
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        return Code(f"copy_in_{folder.name}")
    finally:
        sys.path.remove(str(folder))
        forget_our_modules()
        sys.modules.update(kept)


def route(code: Code, name: str):
    """The function that computes attention by a route: attend_reference, ..."""
    return getattr(code.attention, f"attend_{name}")


def forall(**strategies):
    """`given`, read as in mathematics. The same test without shrinking is kept as `.hunt`: to
    kill a mutant the first counterexample is enough."""
    first_counterexample = settings(phases=(Phase.explicit, Phase.generate),
                                    report_multiple_bugs=False)

    def decorate(test):
        proof = given(**strategies)(test)
        proof.hunt = first_counterexample(given(**strategies)(test))
        return proof

    return decorate


# ---- comparing ------------------------------------------------------------------------------


def numbers(x) -> np.ndarray:
    """A tensor, or anything like an array, in numpy's float64."""
    if isinstance(x, torch.Tensor):
        x = x.detach().double().cpu().numpy()
    return np.asarray(x, dtype=np.float64)


def error(got, want) -> float:
    """||got - want|| / ||want||. Refuses what would make any comparison pass or mean nothing:
    NaN, and an all-zero answer."""
    got = numbers(got)
    want = numbers(want)
    assert got.shape == want.shape, f"shape {got.shape}, expected {want.shape}"
    assert np.isfinite(want).all(), \
        "the expected answer itself is NaN or infinite: the test is broken"
    size = np.linalg.norm(want)
    assert size > 0, "the expected answer is all zero: this comparison could not fail"
    lost = ~np.isfinite(got)
    assert not lost.any(), f"{lost.sum()} of {got.size} numbers are NaN or infinite"
    return float(np.linalg.norm(got - want) / size)


def assert_same(got, want, tolerance: float, message: str) -> None:
    wrong = error(got, want)
    assert wrong <= tolerance, \
        f"{message}\n    relative error {wrong:.2e}, allowed {tolerance:.0e}"


def assert_zero(x, message: str) -> None:
    """Exactly zero: not small. A dependency that does not exist leaves no rounding behind."""
    if x is None or not x.any():
        return
    largest = x.abs().max().item()
    raise AssertionError(f"{message}\n    largest value {largest:.2e}, must be exactly 0")


def entropy(p, visible) -> tuple[float, int]:
    """Mean entropy of probability rows as a share of the uniform row's, log(number of visible
    keys), and how many rows that is. Rows with fewer than three keys are left out."""
    keys = np.broadcast_to(visible.sum(-1), p.shape[:-1])
    enough = keys >= 3
    if not enough.any():
        return 0.5, 0
    p = p[enough]                                                   # [rows, T]
    logarithm = np.log(np.where(p > 0, p, 1))                       # 0 log 0 is 0
    entropies = -(p * logarithm).sum(-1)                            # [rows]
    shares = entropies / np.log(keys[enough])
    return float(shares.mean()), len(shares)


def assert_alive(p, visible) -> None:
    """Softmax neither one-hot nor uniform: one-hot attention hides wrong values of all other
    keys, uniform attention hides wrong scores. 99.99 % of uniform is a spread of scores of
    about 0.02, still eight digits above the tolerance; the sane middle is asserted where many
    draws can be averaged (test_routes.test_typical_attention_is_neither_flat_nor_one_hot)."""
    share, rows = entropy(p, visible)
    if rows >= 6:
        assert 0.02 < share < 0.9999, f"attention is degenerate (entropy {share:.2%} of " \
                                      f"uniform): this comparison could not fail"


# ---- drawing numbers ------------------------------------------------------------------------


class Dice:
    """Standard normal float64 tensors from a seed."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64)

    def below(self, top: int, *shape: int) -> torch.Tensor:
        return torch.randint(top, shape, generator=self.generator)

    def points(self, tokens: int) -> torch.Tensor:
        """Integer points (t, y, x)."""
        return self.below(12, tokens, 3)

    def mask(self, L: int, T: int) -> torch.Tensor:
        """Who may look, at random; everybody sees somebody."""
        mask = torch.rand(L, T, generator=self.generator) < 0.6
        somebody = self.below(T, L)
        mask[torch.arange(L), somebody] = True
        return mask


def typical_size(name: str, p: torch.Tensor) -> float:
    """The standard deviation at which a parameter matters. Matrices keep the variance of what
    they map, queries are 1.5x that (scores with a spread of about 1.5), vectors stray."""
    if p.dim() != 2 or p.shape[-1] == 0:
        return 0.3
    makes_queries = any(part in name for part in ("W_UQ", "W_QR", "W_Q."))
    gain = 1.5 if makes_queries else 1.0
    return gain * p.shape[-1] ** -0.5


@torch.no_grad()
def enliven(module: torch.nn.Module, seed: int):
    """Give every parameter random values of a size at which each matters. (A new model is
    deliberately mute: its head is zero.)"""
    dice = Dice(seed)
    for name, p in module.named_parameters():
        value = dice.normal(*p.shape) * typical_size(name, p)
        if "norm" in name and name.endswith("weight"):
            value = value + 1                                       # stray from the default, 1
        p.copy_(value)
    return module


def weights(layer) -> dict[str, np.ndarray]:
    """A layer's weights by the paper's names, for the oracles."""
    return {name.removesuffix(".weight"): numbers(p) for name, p in layer.named_parameters()}


def a_model(code, sizes: dict, seed: int):
    """A model of these sizes in float64 with every parameter alive, and dice for its inputs."""
    model = code.mla_video.VideoDiT(code.mla_video.Config(**sizes)).double()
    return enliven(model, seed), Dice(seed + 1)


def a_clip(model, dice: Dice, B: int, frames: int):
    """Video [B, frames, channels, height, width], sigma [B, frames], caption [B, slots]."""
    c = model.config
    video = dice.normal(B, frames, c.channels, c.height, c.width)
    sigma = dice.uniform(B, frames)
    caption = dice.below(c.words, B, c.slots)
    return video, sigma, caption


# ---- drawing sizes --------------------------------------------------------------------------


def fits(R: int, head: int) -> bool:
    """Does a head have, on every axis, the bands that R rope channels ask for?"""
    return all(mine <= full for mine, full in zip(axis_split(R), axis_split(head)))


def narrow_keys() -> list[tuple[int, int]]:
    """All (R, width of the full head that R is taken from) of small size."""
    pairs = []
    for head in range(8, 22, 2):
        pairs += [(R, head) for R in range(6, head, 2)]
    return [pair for pair in pairs if fits(*pair)]


seeds = st.integers(0, 2**31)
NARROW = narrow_keys()
HEADS = [6, 8, 10, 12, 14]       # widths of full heads: all three remainders of pairs by 3
COUNTS = st.one_of(              # tokens: ragged, and a multiple of 128
    st.integers(1, 20),
    st.sampled_from([1, 2, 128]))


@dataclass(frozen=True)
class Sizes:
    """The letters of attention.py; R rope channels are taken from a full head of `head`."""
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
    counts = COUNTS.map(lambda tokens: max(tokens, least))
    R, head = draw(st.sampled_from(NARROW))
    N = draw(st.integers(least, 12))
    # With equal widths no shape error gives swapped weights away.
    V = draw(st.one_of(st.just(N), st.integers(least, 12)))
    return Sizes(
        B=draw(st.integers(1, 3)),
        L=draw(counts),
        T=draw(counts),
        H=draw(st.integers(least, 4)),
        N=N, R=R, V=V,
        C=draw(st.integers(least, 16)),
        head=head,
        seed=draw(seeds))


@st.composite
def configs(draw, min_chunks: int = 1, attention=("mla", "dense"), layers: int = 3, **fixed):
    """Sizes of a whole model, as keywords of Config: any grid, chunk, window and sink that are
    possible together."""

    def between(low, high):
        return draw(st.integers(low, high))

    rope, head = draw(st.sampled_from(NARROW[:8]))
    heads = between(1, 3)
    chunk = between(1, 3)
    patch = between(1, 2)
    frames = chunk * between(min_chunks, 4)
    window = between(chunk, frames)
    chosen = dict(
        attention=draw(st.sampled_from(attention)),
        dim=heads * head,
        heads=heads,
        rope=rope,
        layers=between(1, layers),
        latent=between(2, 12),
        query_latent=between(2, 16),
        ffn=between(1, 12),
        channels=between(1, 3),
        patch=patch,
        height=patch * between(1, 3),
        width=patch * between(1, 3),
        words=5,
        slots=between(1, 3),
        frames=frames,
        chunk=chunk,
        window=window,
        sink=between(0, window - chunk),
        norm=draw(st.booleans()),
        place=draw(st.booleans()))
    return chosen | fixed
