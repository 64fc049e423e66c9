"""Exercise 8: find the bug.

After distillation a chunk is made in four passes: jump to the answer, go back part of the way
by adding noise, jump again (the consistency sampler). Below is such a sampler, a plausible copy
of `consistency` in flow.py. It runs, its shapes are right, it is a function of its seed,
with one pass it is even exact, and its pictures look like pictures. They are only too loud:
over-saturated, as generated video often is, and blamed on guidance or on training.

One line is wrong. The test gives the sampler a model that *cannot* be wrong, the exact answer
for data that are Gaussian. So what comes out must be distributed as the data are, after every
number of passes.

Read first: the convention of flow matching, (F1) to (F4), in the header of flow.py, then
`consistency` there; (C1) to (C3) in objectives.py.
Hint: the spread is right after one pass and wrong after two, so look at what the second pass is
given. For x at level sigma to have the spread that a model was trained on, what must be true of
the two terms of (F1)? Print their correlation.

    python -m pytest exercises/ex8_bug.py           today: one line, "exercise 8: ..."

(Three of its tests pass today, and must go on passing.)
"""

import itertools

import torch
from torch import Tensor

from flow import FEW_SHIFT, add_noise, noise_levels, one_level

# ---- yours to mend: one line ----------------------------------------------------------------


def sample_chunk(answer, shape: tuple[int, ...], steps: int, seed: int) -> Tensor:
    """A chunk [B, F, ...] in `steps` passes of `answer`; a function of its seed.

    `answer` is a function of x and sigma [B, F] that gives x0.
    """
    def noise() -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    levels = noise_levels(steps, FEW_SHIFT)                                    # from 1 to 0
    x = noise()
    for sigma, next_sigma in itertools.pairwise(levels):
        x = answer(x, one_level(x, sigma))                                     # (F4)
        if next_sigma > 0:
            x = add_noise(x, noise(), one_level(x, next_sigma))                # (F1)
    return x


# ---- the tests ------------------------------------------------------------------------------

MEAN = 0.3                     # of the data: every pixel on its own, x0 ~ N(MEAN, SPREAD^2)
SPREAD = 0.5
SHAPE = (4, 3, 3, 32, 32)      # 36,864 pixels: their spread is known to 0.4 %
SMALL = (2, 3, 1, 4, 4)


def exact(x: Tensor, sigma: Tensor) -> Tensor:
    """Where the flow of these data takes x.

    By (F1) x at level sigma is N((1 - sigma) MEAN, (1 - sigma)^2 SPREAD^2 + sigma^2), and in
    one dimension the flow keeps every point at its quantile.
    """
    sigma = sigma[..., None, None, None]
    mean = (1 - sigma) * MEAN
    spread = ((1 - sigma)**2 * SPREAD**2 + sigma**2).sqrt()
    return MEAN + SPREAD * (x - mean) / spread


def test_samples_of_a_perfect_model_are_spread_like_the_data():
    spread = {}
    for steps in (1, 2, 3, 4, 8):
        x = sample_chunk(exact, SHAPE, steps, seed=0)
        spread[steps] = round(x.std().item(), 3)
    off = [abs(got / SPREAD - 1) for got in spread.values()]
    assert max(off) < 0.03, (
        f"exercise 8: the data are spread by {SPREAD}, samples, by number of passes, by "
        f"{spread}. The model is exact: it is the sampler")


def test_samples_of_a_perfect_model_have_the_mean_of_the_data():
    for steps in (1, 4):
        mean = sample_chunk(exact, SHAPE, steps, seed=0).mean().item()
        assert abs(mean - MEAN) < 0.02, \
            f"{steps} passes: the mean is {mean:.3f}, that of the data {MEAN}"


def test_a_sample_is_a_function_of_its_seed():
    sample = sample_chunk(exact, SMALL, 4, seed=0)
    again = sample_chunk(exact, SMALL, 4, seed=0)
    other = sample_chunk(exact, SMALL, 4, seed=1)
    assert torch.equal(sample, again), "the same seed gave two samples"
    assert not torch.equal(sample, other), "another seed gave the same sample"


def test_every_pass_stands_at_its_level():
    asked = []

    def listening(x, sigma):
        asked.append(sigma)
        return exact(x, sigma)

    sample_chunk(listening, SMALL, 4, seed=0)
    levels = [sigma[0, 0].item() for sigma in asked]
    assert levels == [1.0, 0.9375, 0.8333333333333334, 0.625], (
        "the four levels of the few-step sampler are 1, 0.9375, 0.8333, 0.625, not "
        f"{levels}")
    for sigma in asked:
        assert sigma.shape == (2, 3), f"a level for every frame, [2, 3], not {[*sigma.shape]}"
