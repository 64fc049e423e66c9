"""Exercise 6: context noise.

Teacher forcing shows the model clean real chunks as its past. At inference the past is its own work, a little wrong, and the model has
never seen a wrong past: errors feed errors (exposure bias). The cheapest remedy is to blur the past in training: context noise gives the
clean half of the teacher-forced sequence noise of its own, at a small level that the network is *told*, as it is told the noisy half's.
A network that was told can be asked for level 0 at inference. (In released code the upper limit of the level was an index into a table
that descends: what should have been a little noise was almost nothing but noise.) You write the forward pass with a noisy context, and
the loss.

Read first: `VideoDiT.forward` and `allowed` in mla_video.py; (F1) in sample.py; `teacher_forcing_loss` in objectives.py, whose draws you
repeat.
Hint: `VideoDiT.forward` differs from yours in one argument and one line; the mask of tokens will do, blocks are for speed. In the loss the
*target* stays as it was. Level and noise of the context are drawn after everything that teacher_forcing_loss draws, so that the same seed
gives the same lesson.

    python -m pytest exercises/ex6_context.py           today: NotImplementedError, "exercise 6: ..."
"""

import torch
from hypothesis import strategies as st
from torch import Tensor

from lab import EXACT, Dice, assert_same, assert_zero, configs, enliven, forall, seeds
from mla_video import Config, VideoDiT, allowed, sinusoid  # noqa: F401  (yours to use)
from objectives import teacher_forcing_loss, velocity_error, without_some  # noqa: F401
from sample import add_noise, shift  # noqa: F401
from trainer import Recipe


# ---- yours to write -------------------------------------------------------------------------------------------------


def forward(model: VideoDiT, context: Tensor, noisy: Tensor, context_sigma: Tensor, sigma: Tensor, caption: Tensor) -> Tensor:
    """`model.forward` for a context at noise levels context_sigma [B, F] instead of 0: v [B, F, ...] of the noisy frames.

    `context` already has its noise. Positions and mask are those of `model.forward`.
    """
    raise NotImplementedError("exercise 6: `forward`, teacher forcing whose past has a noise level")


def context_noise_loss(model: VideoDiT, x0: Tensor, caption: Tensor, recipe: Recipe, generator: torch.Generator, top: float):
    """`teacher_forcing_loss` given a past at levels U(0, top), one a chunk and video, with noise of its own.

    Returns (loss, sigma [B, F], squared error [B, F], context_sigma [B, F]).
    """
    raise NotImplementedError("exercise 6: `context_noise_loss`, the loss of stage 1 given a noisy past")


# ---- the tests ------------------------------------------------------------------------------------------------------


def a_lesson(sizes, B, seed):
    """A model in which everything counts, a clip, captions, and a recipe."""
    model, dice = enliven(VideoDiT(Config(**sizes)).double(), seed), Dice(seed)
    c = model.config
    return model, dice.normal(B, c.frames, c.channels, c.height, c.width), dice.below(5, B, c.slots), Recipe(drop=0.3)


def draws(seed):
    return torch.Generator().manual_seed(seed)


def listen(model, call):
    """What goes into the network during `call()`, patches [B, 2F, P, ...] and features of the noise level [B, 2F, 256]; and its result."""
    heard = []
    hooks = [module.register_forward_pre_hook(lambda _, args: heard.append(args[0].detach())) for module in (model.embed, model.time)]
    try:
        result = call()
    finally:
        for hook in hooks:
            hook.remove()
    assert len(heard) == 2, "one pass of the network is all it takes"
    return *heard, result


@forall(sizes=configs(layers=2), B=st.integers(1, 2), seed=seeds)
def test_no_noise_is_the_shipped_loss(sizes, B, seed):
    model, *lesson = a_lesson(sizes, B, seed)
    shipped, mine = teacher_forcing_loss(model, *lesson, draws(seed)), context_noise_loss(model, *lesson, draws(seed), top=0.0)
    for name, got, want in zip(("loss", "sigma", "squared error"), mine, shipped):
        assert_same(got, want, EXACT, f"top = 0 and the same seed: {name} is not that of teacher_forcing_loss. Drawn in another order?")
    assert_zero(mine[3], "top = 0, but the context has a level")
    grads = [torch.autograd.grad(loss[0], model.embed.weight)[0] for loss in (mine, shipped)]
    assert_same(*grads, EXACT, "top = 0: the gradient differs; it flows through the context too")


@forall(sizes=configs(min_chunks=2, layers=2), B=st.integers(1, 2), seed=seeds)
def test_a_noisy_past_is_told_and_streaming_agrees(sizes, B, seed):
    """The parity contract, now for any level: one masked pass is cached inference after commits at the context's levels."""
    model, context, caption, _ = a_lesson(sizes, B, seed)
    n, dice = model.config.chunk, Dice(seed + 1)
    noisy = dice.normal(*context.shape)
    sigma, context_sigma = (dice.normal(B, model.config.frames // n).sigmoid().repeat_interleave(n, dim=1) for _ in range(2))
    whole, cache, parts = forward(model, context, noisy, context_sigma, sigma, caption), model.make_cache(B), []
    assert whole.shape == noisy.shape, f"v of the noisy frames alone, {list(noisy.shape)}, not {list(whole.shape)}"
    with torch.no_grad():
        for now in torch.arange(model.config.frames).split(n):
            parts.append(model.denoise(noisy[:, now], sigma[:, now], caption, cache))
            cache.commit(model._cached(context[:, now], context_sigma[:, now], caption, cache, "auto", keep=True)[1])
    assert_same(torch.cat(parts, dim=1), whole, EXACT, "one pass and streaming disagree: the context's own level to the first half, the "
                "noisy half's to the second; the same positions for both; the mask of `allowed`")


@forall(sizes=configs(min_chunks=2, layers=1), B=st.integers(2, 3), top=st.floats(0.05, 0.9), seed=seeds)
def test_the_past_has_noise_of_its_own_at_the_level_it_is_told(sizes, B, top, seed):
    model, x0, caption, recipe = a_lesson(sizes, B, seed)
    F, n = model.config.frames, model.config.chunk
    lesson = x0, caption, recipe, draws(seed), top
    patches, features, (_, sigma, _, level) = listen(model, lambda: context_noise_loss(model, *lesson))
    clean, _, _ = listen(model, lambda: model(x0, x0, torch.zeros_like(sigma), caption))           # the same clip as patches
    assert level.shape == (B, F), f"a level for every frame, [{B}, {F}], not {list(level.shape)}"
    assert (level > 0).all() and (level < top).all(), f"levels must be drawn from U(0, {top:.2f}), got {level.tolist()}"
    by_chunk = level.unflatten(1, (-1, n))
    assert (by_chunk == by_chunk[..., :1]).all(), "one level for all frames of a chunk"
    assert by_chunk[..., 0].unique().numel() == B * (F // n), "every chunk of every video draws a level of its own"
    assert_same(features, sinusoid(torch.cat((level, sigma), dim=1), 256), 1e-6, "the network must be told each half's own level")
    s = torch.cat((level, sigma), dim=1)[..., None, None]
    own, other = ((patches - (1 - s) * clean) / s).unflatten(1, (2, F)).transpose(0, 1).flatten(1)     # (F1) solved for eps
    size = own.square().mean().sqrt().item()
    assert abs(size - 1) < 5 * (2 * len(own)) ** -0.5 + 1e-6, f"the context's noise has size {size:.2f}, must be 1 at the level told: (F1)"
    assert abs(torch.dot(own, other) / own.norm() / other.norm()) < 6 * len(own) ** -0.5 + 1e-6, \
        "context and noisy half share their noise: the past would give the answer away"


@forall(sizes=configs(min_chunks=2, layers=1), seed=seeds)
def test_the_target_does_not_know_of_it(sizes, seed):
    """The loss is the squared error against eps - x0 of the noisy half, whatever became of the context."""
    (model, x0, caption, _), recipe = a_lesson(sizes, 2, seed), Recipe(drop=0.0)
    F = model.config.frames
    with torch.no_grad():
        shipped, _, (_, plain_sigma, _) = listen(model, lambda: teacher_forcing_loss(model, x0, caption, recipe, draws(seed)))
        patches, _, (loss, sigma, error, level) = listen(model, lambda: context_noise_loss(model, x0, caption, recipe, draws(seed), 0.5))
        assert torch.equal(sigma, plain_sigma), "the same seed must draw the same levels for the noisy half, whatever `top`"
        assert_same(patches[:, F:], shipped[:, F:], EXACT, "the noisy half is not that of teacher_forcing_loss with the same seed")
        context, noisy = unpatch(patches[:, :F], model.config), unpatch(patches[:, F:], model.config)
        s = sigma[..., None, None, None]
        eps = (noisy - (1 - s) * x0) / s                                               # (F1) solved for eps
        want = velocity_error(forward(model, context, noisy, level, sigma, caption), x0, eps)
    # Levels and noise are drawn in float32, whose rounding the division by sigma magnifies.
    assert_same(error, want, 1e-4, "the target is eps - x0, of the clean clip and the noisy half's noise")
    assert_same(loss, error.mean(), EXACT, "the loss is the mean of the squared error")


def unpatch(patches: Tensor, c: Config) -> Tensor:
    """[B, F, P, channels * patch * patch] back to video."""
    h, w, p = c.height // c.patch, c.width // c.patch, c.patch
    grid = patches.unflatten(2, (h, w)).unflatten(4, (c.channels, p, p))               # b f h w c p q
    return grid.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)
