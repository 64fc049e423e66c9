"""Exercise 6: context noise.

Teacher forcing shows the model clean real chunks as its past. At inference the past is its own
work, a little wrong, and the model has never seen a wrong past: errors feed errors (exposure
bias). The cheapest remedy is to blur the past in training: context noise gives the clean half
of the teacher-forced sequence noise of its own, at a small level that the network is *told*, as
it is told the noisy half's. A network that was told can be asked for level 0 at inference. (In
released code the upper limit of the level was an index into a table that descends: what should
have been a little noise was almost nothing but noise.) You write the forward pass with a noisy
context, and the loss.

Read first: `VideoDiT.forward` and `allowed` in mla_video.py; (F1) in flow.py;
`teacher_forcing_loss` in objectives.py, whose draws you repeat.
Hint: `VideoDiT.forward` differs from yours in one argument and one line. In the loss the
*target* stays as it was. Level and noise of the context are drawn after everything that
teacher_forcing_loss draws, so that the same seed gives the same lesson.

    python -m pytest exercises/ex6_context.py       today: two lines, "exercise 6: ..."
"""

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from flow import Draws, add_noise, shift  # noqa: F401  (yours to use)
from lab import EXACT, Dice, assert_same, assert_zero, configs, enliven, forall, seeds
from mla_video import Config, VideoDiT, allowed, sinusoid  # noqa: F401
from objectives import teacher_forcing_loss, velocity_error, without_some  # noqa: F401

# ---- yours to write -------------------------------------------------------------------------


def forward(model: VideoDiT, context: Tensor, noisy: Tensor, context_sigma: Tensor,
            sigma: Tensor, caption: Tensor) -> Tensor:
    """`model.forward` for a context at noise levels context_sigma [B, F] instead of 0.

    `context` already has its noise. Positions and mask are those of `model.forward`.
    Returns v [B, F, ...] of the noisy frames.
    """
    raise NotImplementedError(
        "exercise 6: `forward`, teacher forcing whose past has a noise level")


def context_noise_loss(model: VideoDiT, x0: Tensor, caption: Tensor, draws: Draws, top: float,
                       *, drop: float = 0.1, spread: float = 1.0):
    """`teacher_forcing_loss` given a past with noise of its own.

    Its levels are drawn from U(0, top), one a chunk and video.
    Returns (loss, sigma [B, F], squared error [B, F], context_sigma [B, F]).
    """
    raise NotImplementedError(
        "exercise 6: `context_noise_loss`, the loss of stage 1 given a noisy past")


# ---- the tests ------------------------------------------------------------------------------


def a_model(sizes, seed):
    """One in which every parameter counts."""
    return enliven(VideoDiT(Config(**sizes)).double(), seed)


def a_lesson(c: Config, B: int, seed: int):
    """Clips [B, F, ...] and captions [B, S]."""
    dice = Dice(seed)
    x0 = dice.normal(B, c.frames, c.channels, c.height, c.width)
    return x0, dice.below(5, B, c.slots)


def draws(seed):
    return Draws(torch.Generator().manual_seed(seed))


class Heard(NamedTuple):
    patches: Tensor            # [B, 2F, P, channels * patch * patch]
    features: Tensor           # [B, 2F, 256], of the noise level
    result: object


def listen(model, call) -> Heard:
    """What goes into the network during `call()`, and its result."""
    heard = []

    def note(module, inputs):
        heard.append(inputs[0].detach())

    hooks = [module.register_forward_pre_hook(note) for module in (model.embed, model.time)]
    try:
        result = call()
    finally:
        for hook in hooks:
            hook.remove()
    assert len(heard) == 2, "one pass of the network is all it takes"
    return Heard(*heard, result)


@forall(sizes=configs(layers=2), B=st.integers(1, 2), seed=seeds)
def test_no_noise_is_the_shipped_loss(sizes, B, seed):
    model = a_model(sizes, seed)
    lesson = a_lesson(model.config, B, seed)
    shipped = teacher_forcing_loss(model, *lesson, draws(seed), drop=0.3)
    mine = context_noise_loss(model, *lesson, draws(seed), top=0.0, drop=0.3)
    for name, got, want in zip(("loss", "sigma", "squared error"), mine, shipped):
        assert_same(got, want, EXACT, f"top = 0 and the same seed: {name} is not that of "
                    "teacher_forcing_loss. Drawn in another order?")
    assert_zero(mine[3], "top = 0, but the context has a level")
    got, = torch.autograd.grad(mine[0], model.embed.weight)
    want, = torch.autograd.grad(shipped[0], model.embed.weight)
    assert_same(got, want, EXACT,
                "top = 0: the gradient differs; it flows through the context too")


@forall(sizes=configs(min_chunks=2, layers=2), B=st.integers(1, 2), seed=seeds)
def test_a_noisy_past_is_told_and_streaming_agrees(sizes, B, seed):
    """The parity contract, now for any level.

    One masked pass is cached inference after commits at the context's levels.
    """
    model = a_model(sizes, seed)
    c = model.config
    context, caption = a_lesson(c, B, seed)
    dice = Dice(seed + 1)
    noisy = dice.normal(*context.shape)
    chunks = c.frames // c.chunk
    sigma = dice.normal(B, chunks).sigmoid().repeat_interleave(c.chunk, dim=1)
    context_sigma = dice.normal(B, chunks).sigmoid().repeat_interleave(c.chunk, dim=1)
    whole = forward(model, context, noisy, context_sigma, sigma, caption)
    assert whole.shape == noisy.shape, \
        f"v of the noisy frames alone, {list(noisy.shape)}, not {list(whole.shape)}"

    cache = model.make_cache(B)
    parts = []
    with torch.no_grad():
        for now in torch.arange(c.frames).split(c.chunk):
            parts.append(model.denoise(noisy[:, now], sigma[:, now], caption, cache))
            commit(model, context[:, now], context_sigma[:, now], caption, cache)
    assert_same(torch.cat(parts, dim=1), whole, EXACT,
                "one pass and streaming disagree: the context's own level to the first half, "
                "the noisy half's to the second; the same positions for both; the mask of "
                "`allowed`")


def commit(model, context, context_sigma, caption, cache) -> None:
    """`model.commit` at another level than 0: keeps the rows that a denoising pass leaves."""
    rows = []

    def keep(block, inputs, outputs):
        rows.append(outputs[1])

    hooks = [block.register_forward_hook(keep) for block in model.blocks]
    model.denoise(context, context_sigma, caption, cache)
    for hook in hooks:
        hook.remove()
    cache.commit(rows)


@forall(sizes=configs(min_chunks=2, layers=1), B=st.integers(2, 3), top=st.floats(0.05, 0.9),
        seed=seeds)
def test_the_past_has_noise_of_its_own_at_the_level_it_is_told(sizes, B, top, seed):
    model = a_model(sizes, seed)
    F = model.config.frames
    chunk = model.config.chunk
    x0, caption = a_lesson(model.config, B, seed)
    heard = listen(model, lambda: context_noise_loss(
        model, x0, caption, draws(seed), top, drop=0.3))
    _, sigma, _, level = heard.result
    assert level.shape == (B, F), f"a level for every frame, [{B}, {F}], not {[*level.shape]}"
    assert 0 < level.min() and level.max() < top, \
        f"levels must be drawn from U(0, {top:.2f}), got {level.tolist()}"
    by_chunk = level.unflatten(1, (-1, chunk))             # [B, chunks, chunk]
    first = by_chunk[..., :1]
    assert (by_chunk == first).all(), "one level for all frames of a chunk"
    assert first.unique().numel() == first.numel(), \
        "every chunk of every video draws a level of its own"
    told = torch.cat((level, sigma), dim=1)                # [B, 2F]
    assert_same(heard.features, sinusoid(told, 256), 1e-6,
                "the network must be told each half's own level")

    clean = listen(model, lambda: model(x0, x0, torch.zeros_like(sigma), caption)).patches
    s = told[..., None, None]
    eps = (heard.patches - (1 - s) * clean) / s            # (F1) solved for eps
    own = eps[:, :F].flatten()
    other = eps[:, F:].flatten()
    size = own.square().mean().sqrt().item()
    assert abs(size - 1) < 5 * (2 * len(own))**-0.5 + 1e-6, \
        f"the context's noise has size {size:.2f}, must be 1 at the level told: (F1)"
    correlation = torch.dot(own, other) / own.norm() / other.norm()
    assert abs(correlation) < 6 * len(own)**-0.5 + 1e-6, \
        "context and noisy half share their noise: the past would give the answer away"


@forall(sizes=configs(min_chunks=2, layers=1), seed=seeds)
def test_the_target_does_not_know_of_it(sizes, seed):
    """The loss is the squared error against eps - x0 of the noisy half.

    Whatever became of the context.
    """
    model = a_model(sizes, seed)
    F = model.config.frames
    x0, caption = a_lesson(model.config, 2, seed)
    with torch.no_grad():
        shipped = listen(model, lambda: teacher_forcing_loss(
            model, x0, caption, draws(seed), drop=0.0))
        mine = listen(model, lambda: context_noise_loss(
            model, x0, caption, draws(seed), 0.5, drop=0.0))
        loss, sigma, error, level = mine.result
        assert torch.equal(sigma, shipped.result[1]), \
            "the same seed must draw the same levels for the noisy half, whatever `top`"
        assert_same(mine.patches[:, F:], shipped.patches[:, F:], EXACT,
                    "the noisy half is not that of teacher_forcing_loss with the same seed")
        context = unpatch(mine.patches[:, :F], model.config)
        noisy = unpatch(mine.patches[:, F:], model.config)
        v = forward(model, context, noisy, level, sigma, caption)
        s = sigma[..., None, None, None]
        eps = (noisy - (1 - s) * x0) / s                   # (F1) solved for eps
        want = velocity_error(v, x0, eps)
    # Levels and noise are drawn in float32, whose rounding the division by sigma magnifies.
    assert_same(error, want, 1e-4,
                "the target is eps - x0, of the clean clip and the noisy half's noise")
    assert_same(loss, error.mean(), EXACT, "the loss is the mean of the squared error")


def unpatch(patches: Tensor, c: Config) -> Tensor:
    """[B, F, P, channels * patch * patch] back to video."""
    rows = c.height // c.patch
    x = patches.unflatten(2, (rows, -1))                   # b f h w (c p q)
    x = x.unflatten(4, (c.channels, c.patch, c.patch))     # b f h w c p q
    x = x.permute(0, 1, 4, 2, 5, 3, 6)                     # b f c h p w q
    return x.flatten(5, 6).flatten(3, 4)                   # b f c (h p) (w q)
