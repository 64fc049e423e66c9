"""The losses of the training stages, each beside its equation: what is minimised, given what,
and where the gradient stops.

    score   A bidirectional model of whole clips: every frame sees every other. It cannot
            stream, but can judge videos, which stage dmd needs. Stage tf may start from it. It
            stands where the paper has pretrained Wan.
    tf      1. Teacher forcing: denoise every chunk, given the *clean true* chunks before it.
    cd      2. Consistency distillation: given the same, every pass jumps to an answer. Four of
            them, with fresh noise between, replace 12 or more.
    dmd     3. Distribution matching distillation: given *its own* chunks before it, as in use.
            No clip is shown, only captions.

Why stage 3: in tf and cd the past is perfect. In use it is the model's own, and small errors
feed the next ones ("exposure bias"). dmd trains on what the model streamed itself.

The convention of flow matching, (F1) to (F4), stands in flow.py. sg(.) means stop-gradient: a
number, not a function of the weights. All random numbers come from `draws` (flow.Draws).
tests/test_objectives.py holds each loss against its equation, and traps that released
implementations fell into.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from flow import (FEW_SHIFT, FEW_STEPS, Draws, Stream, add_noise, answer_of, consistency,
                  consistency_passes, noise_for, noise_levels, per_frame, rollout, shift)
from mla_video import VideoDiT

GRID = 48                   # levels of consistency distillation; the sampler's 4 are among them


def velocity_error(v: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
    """Squared error of a velocity, mean over each frame: [B, F]."""
    true_velocity = eps - x0                                                          # (F2)
    error = (v - true_velocity).square()
    return error.flatten(2).mean(dim=2)


def without_some(caption: Tensor, drop: float, draws: Draws) -> Tensor:
    """Captions [B, S], or rows [B, S, text], a share `drop` of them replaced by "nothing said"
    (0 throughout): a model that also knows how to answer without one can be guided later."""
    one = [1] * (caption.dim() - 1)                         # a caption is dropped as a whole
    keep = draws.uniform(len(caption), *one) >= drop
    return caption * keep


# ---- stages score and tf: flow matching ------------------------------------------------------
#     L = mean (v_model(x_sigma, sigma) - (eps - x0))^2,    x_sigma = (1 - sigma) x0 + sigma eps
# with sigma = S_3(sigmoid(spread * n)) and n standard normal: the ends near 0 and 1, where most
# of the error cannot be learned away, are drawn less often than by a uniform u. No weight
# w(sigma) stands in the mean. (Released code has one that is 0 at sigma = 1, where every
# rollout starts. A pretrained model survives that; we do not risk it from scratch.)


def score_loss(model: VideoDiT, x0: Tensor, caption: Tensor, draws: Draws, *, drop: float = 0.1,
               spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Flow matching of whole clips: no mask, one noise level per *video*.

    x0 [B, F, ...] in [-1, 1], caption [B, S]. Returns the loss, sigma [B, F] and the squared
    error of each frame [B, F].
    """
    B, frames = x0.shape[:2]
    u = torch.sigmoid(spread * draws.normal(B, 1))
    sigma = shift(u).expand(B, frames)                                                 # [B, F]
    eps = draws.normal(*x0.shape)
    caption = without_some(caption, drop, draws)
    x = add_noise(x0, eps, sigma)
    v = model.bidirectional(x, sigma, caption)
    error = velocity_error(v, x0, eps)
    loss = error.mean()
    return loss, sigma, error.detach()


def teacher_forcing_loss(model: VideoDiT, x0: Tensor, caption: Tensor, draws: Draws, *,
                         drop: float = 0.1,
                         spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Flow matching with an independent noise level for each *chunk*; it sees the clean ones.

    One pass trains every chunk of the clip at some level. Arguments and answer as `score_loss`.
    """
    B, frames = x0.shape[:2]
    chunk = model.config.chunk
    u = torch.sigmoid(spread * draws.normal(B, frames // chunk))
    sigma = shift(u).repeat_interleave(chunk, dim=1)        # [B, F]: a chunk's frames share one
    eps = draws.normal(*x0.shape)
    caption = without_some(caption, drop, draws)
    x = add_noise(x0, eps, sigma)
    v = model(x0, x, sigma, caption)
    error = velocity_error(v, x0, eps)
    loss = error.mean()
    return loss, sigma, error.detach()


# ---- stage cd: consistency distillation ------------------------------------------------------

def guided(model: Callable[[Tensor], Tensor], caption: Tensor, weight: float) -> Tensor:
    """v(none) + w (v(caption) - v(none)) for `model`, a function of the caption alone.

    w = 1 is v(caption), in one call. (Self-Forcing's code writes v(caption) + 3 (v(caption) -
    v(none)), which is w = 4 here.)
    """
    v = model(caption)
    if weight == 1:
        return v
    v_none = model(torch.zeros_like(caption))
    return v_none + weight * (v - v_none)


def consistency_loss(student: VideoDiT, target: VideoDiT, teacher: VideoDiT, x0: Tensor,
                     caption: Tensor, draws: Draws, *, guidance: float = 1.0) -> Tensor:
    """Two neighbouring points of one path of the teacher must have one answer.

    The answer at (x, sigma) is f(x, sigma) = x - sigma v(x, sigma), (F4). At sigma = 0 it is x
    itself. So if neighbours agree all along the path, the answer at pure noise is the end of
    the path: many steps have become one.

        sigma_j = S_5(1 - j / 48),  j from 0 (noise) to 48 (clean); j is drawn below 48
        x_j     = (1 - sigma_j) x0 + sigma_j eps                                         (C1)
        x_next  = x_j - (sigma_j - sigma_(j+1)) v_teacher(x_j, sigma_j), a guided step   (C2)
        L       = mean (f_student(x_j, sigma_j) - sg f_target(x_next, sigma_(j+1)))^2    (C3)

    The teacher is the model of stage tf, frozen, and the student starts as its copy. All three
    see the clean clip as the past, by teacher forcing, at one noise level for the whole video.
    `target` is the student's moving average. At j = 47 the goal is x_next, the teacher's own
    end point: the anchor that holds all others. (Released code never draws it.) Only the
    teacher is guided; that is how guidance gets distilled in.
    """
    B, frames = x0.shape[:2]
    j = draws.integers(GRID, B, 1)
    j = j.expand(B, frames)
    sigma = shift(1 - j / GRID, FEW_SHIFT)                                             # [B, F]
    next_sigma = shift(1 - (j + 1) / GRID, FEW_SHIFT)                                  # [B, F]
    eps = draws.normal(*x0.shape)
    x = add_noise(x0, eps, sigma)                                                     # (C1)
    with torch.no_grad():
        v = guided(lambda words: teacher(x0, x, sigma, words), caption, guidance)
        step = per_frame(sigma) - per_frame(next_sigma)
        x_next = x - step * v                                                         # (C2)
        v_next = target(x0, x_next, next_sigma, caption)
        goal = answer_of(v_next, x_next, next_sigma)
    v = student(x0, x, sigma, caption)
    answer = answer_of(v, x, sigma)
    return (answer - goal).square().mean()                                            # (C3)


# ---- stage dmd: distribution matching on the model's own past --------------------------------
# The model in training is called the generator here; it starts as the model of stage cd. Two
# bidirectional models judge its videos, and both start as the model of stage score:
#     the real score (D0), frozen, knows true clips
#     the fake score, or critic, is trained on the generator's videos of the moment
# One step of the stage, put together in train.py:
#     every 5th step    video = self_rollout(...)           the generator makes a clip
#                       g = dmd_gradient(video, ...)        which way is *away* from true clips?
#                       dmd_loss(video, g)                  step against it
#     every step        video = self_rollout(...)           another clip
#                       critic_loss(critic, video, ...)     learn what is made now


def self_rollout(stream: Stream, draws: Draws, exit: int, record: bool) -> Tensor:
    """The next clip length of the videos of `stream`, [B, F, ...], made by the model itself.

    All chunks but the last are made as in use. The last one leaves the sampler after pass
    `exit` (0 to 3) with the answer of that pass. The caller draws `exit`, so that each of the
    four passes gets trained. (After an early exit the next clip has a rough chunk in its past;
    that is tolerated.) If `record`, this one pass records its gradient, and nothing else does:
    not the passes before it, not the commit, and what the cache keeps is detached. The pass
    reads copies of the cache (`peek`), so the commit that follows cannot change what its
    backward pass needs.

    A stream whose cache is empty begins new videos. One whose window is full is what most of a
    long video looks like; engine/trainer.py keeps streams from step to step, so that training
    sees videos as old as those in use.

    Why the last chunk alone (released code records all)? We think: the scores see a whole clip.
    Suppose a disc moves too fast. They want its early places moved forward and its late places
    moved back, towards the middle of the clip. Both chunks are made by the same weights, so
    these pushes cancel, and little is learned about speed. The last chunk is only ever told to
    come back.
    """
    c = stream.model.config
    past = c.frames - c.chunk
    chunks = []
    if past:
        chunks += rollout(stream, past, draws, consistency, FEW_STEPS)
    noise = noise_for(stream, draws)
    levels = noise_levels(FEW_STEPS, FEW_SHIFT)
    levels = levels[:exit + 1]                             # those of the passes until `exit`
    with torch.no_grad():
        x = consistency_passes(stream.velocity, noise, levels)
    with torch.set_grad_enabled(record):
        answer = x - levels[-1] * stream.velocity(x, levels[-1])                      # (F4)
    with torch.no_grad():
        stream.commit(answer)
    return torch.cat([*chunks, answer], dim=1)


def some_noise(video: Tensor, draws: Draws, k=FEW_SHIFT) -> tuple[Tensor, Tensor, Tensor]:
    """A video with noise of one level per video: (x [B, F, ...], sigma [B, F], eps).

    sigma = S_k(u) for a uniform u, clamped to [0.02, 0.98], as released: near 0 both answers
    are the video itself, and near 1 each is the mean of its own clips. A tenth of the draws
    lands on 0.98.
    """
    B, frames = video.shape[:2]
    u = draws.uniform(B, 1)
    sigma = shift(u, k).clamp(0.02, 0.98)
    sigma = sigma.expand(B, frames)
    eps = draws.normal(*video.shape)
    return add_noise(video, eps, sigma), sigma, eps


def dmd_gradient(video: Tensor, caption: Tensor, real: VideoDiT, fake: VideoDiT, draws: Draws,
                 *, guidance: float = 1.0, k: float = FEW_SHIFT) -> Tensor:
    """The direction in which the generator's videos are *less* like real ones, [B, F, ...]:
    gradient descent walks against it.

    The score of a distribution is the gradient of its log density at x: the direction in which
    x gets likelier. For x = (1 - sigma) x0 + sigma eps, given x0, it is ((1 - sigma) x0 - x) /
    sigma^2; not given, x0 becomes the mean mu of the clips that x may have come from, which is
    the answer (F4) of a model trained on them:

        mu(x)    = x - sigma v(x, sigma)                                                 (F4)
        score(x) = ((1 - sigma) mu(x) - x) / sigma^2                                     (D0)

    KL(generator || data) is the mean of log p_fake(x) - log p_real(x) over the generator's
    noised x. Its gradient by weights W is the mean of (score_fake - score_real) dx/dW, and of
    d log p_fake / dW at a fixed x, whose mean is 0. By (D0) the difference of scores is
    (1 - sigma) / sigma^2 times mu_fake - mu_real. That factor is replaced by a divisor of each
    video's own, so that all levels count about the same:

        g        = (mu_fake - mu_real) / max(mean |video - mu_real|, 0.001)              (D1)

    The floor is for a video that is already right. Only the real score is guided.
    """
    with torch.no_grad():
        x, sigma, _ = some_noise(video, draws, k)
        v_fake = fake.bidirectional(x, sigma, caption)
        v_real = guided(lambda words: real.bidirectional(x, sigma, words), caption, guidance)
        mu_fake = answer_of(v_fake, x, sigma)
        mu_real = answer_of(v_real, x, sigma)
        size = (video - mu_real).abs().flatten(1).mean(dim=1)                          # [B]
        size = size.clamp(min=1e-3)[:, None, None, None, None]
        return (mu_fake - mu_real) / size                                             # (D1)


def dmd_loss(video: Tensor, gradient: Tensor) -> Tensor:
    """L = 1/2 mean (video - sg(video - g))^2, whose gradient by the video is g / numel.    (D2)

    A way to hand autograd a gradient that was computed elsewhere.
    """
    goal = (video - gradient).detach()
    return 0.5 * (video - goal).square().mean()


def critic_loss(fake: VideoDiT, video: Tensor, caption: Tensor, draws: Draws, *,
                k: float = FEW_SHIFT) -> Tensor:
    """Flow matching of the critic on the generator's own videos, as they are now:

        L = mean (v_fake(x, sigma) - (eps - video))^2                                    (D3)
    """
    video = video.detach()
    x, sigma, eps = some_noise(video, draws, k)
    v = fake.bidirectional(x, sigma, caption)
    return velocity_error(v, video, eps).mean()
