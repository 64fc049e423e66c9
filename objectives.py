"""The objectives of the three stages, each beside its equation: what is minimised, given what, and where the gradient stops.

    score   a bidirectional model of whole clips. Stage 3 needs one twice (real score, critic), and stage 1 starts from it.
    tf      1. teacher forcing: denoise every chunk given *clean real* chunks before it.
    cd      2. consistency distillation: the same context, but jump to the answer in one pass. 4 passes a chunk instead of 12 to 48.
    dmd     3. distribution matching: given *its own* chunks before it, as when it is used. No clip is shown: only captions.

(F1) to (F4), the convention of flow matching, stand in sample.py. sg(.) is the stop-gradient. All randomness comes from `generator`.
tests/test_objectives.py holds each equation against its definition, and each trap that a released implementation fell into.
"""

import torch
from torch import Tensor

from sample import FEW_STEPS, FEW_SHIFT, add_noise, rollout, shift

GRID = 48                                                  # levels of the consistency grid; the sampler's 4 are among them


def velocity_error(v: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
    """Squared error of a velocity, mean over each frame: [B, F]."""
    return (v - (eps - x0)).square().flatten(2).mean(dim=2)                                                   # (F2)


def without_some(caption: Tensor, drop: float, generator: torch.Generator) -> Tensor:
    """Captions [B, slots], a share `drop` of them replaced by "none" (word 0), so that guidance exists later."""
    return caption * (torch.rand(len(caption), 1, generator=generator, device=caption.device) >= drop)


# ---- stage 0 and stage 1: flow matching -----------------------------------------------------------------------------

def score_loss(model, x0: Tensor, caption: Tensor, recipe, generator: torch.Generator):
    """Flow matching of whole clips: no mask, one noise level per *video*. Same arguments and answer as `teacher_forcing_loss`."""
    draw = dict(generator=generator, device=x0.device)
    sigma = shift(torch.sigmoid(recipe.spread * torch.randn(len(x0), 1, **draw))).expand(x0.shape[:2])
    eps = torch.randn(x0.shape, **draw)
    caption = without_some(caption, recipe.drop, generator)
    error = velocity_error(model.bidirectional(add_noise(x0, eps, sigma), sigma, caption), x0, eps)
    return error.mean(), sigma, error.detach()


def teacher_forcing_loss(model, x0: Tensor, caption: Tensor, recipe, generator: torch.Generator):
    """Flow matching with an independent noise level per *chunk*: one pass trains every chunk at some level.

    x0 [B, F, ...] in [-1, 1], caption [B, slots]. Returns (loss, sigma [B, F], squared error [B, F]). The weight is 1 at
    every level: the released weight is 0 at sigma = 1, where every rollout starts, and a pretrained model survives
    that, one from scratch does not.
    """
    B, frames = x0.shape[:2]
    draw = dict(generator=generator, device=x0.device)
    chunk = model.config.chunk
    u = torch.sigmoid(recipe.spread * torch.randn(B, frames // chunk, **draw))
    sigma = shift(u).repeat_interleave(chunk, dim=1)                                   # one level for a chunk's frames
    eps = torch.randn(x0.shape, **draw)
    caption = without_some(caption, recipe.drop, generator)
    error = velocity_error(model(x0, add_noise(x0, eps, sigma), sigma, caption), x0, eps)
    return error.mean(), sigma, error.detach()


# ---- stage 2: consistency distillation ------------------------------------------------------------------------------

def guided(model, caption: Tensor, weight: float) -> Tensor:
    """v(none) + w (v(c) - v(none)) for `model`, a function of the caption; w = 1 is v(c) in one call. Self-Forcing's code writes
    v(c) + 3 (v(c) - v(none)), which is w = 4 here: one convention per repository."""
    v = model(caption)
    if weight == 1:
        return v
    none = model(torch.zeros_like(caption))
    return none + weight * (v - none)


def consistency_loss(student, target, teacher, x0: Tensor, caption: Tensor, recipe, generator: torch.Generator) -> Tensor:
    """Two neighbouring points of one trajectory of the teacher must have the same answer, f(x, sigma) = x - sigma v(x, sigma):

        j ~ U{0 .. 47},  sigma_j = S_5(1 - j / 48),  sigma_48 = 0            one level for the whole video
        x_j  = (1 - sigma_j) x0 + sigma_j eps                                                                 (C1)
        x_j' = x_j - (sigma_j - sigma_j') v_teacher(x_j, sigma_j)            j' = j + 1: one guided Euler step     (C2)
        L    = mean (f_student(x_j, sigma_j) - sg f_target(x_j', sigma_j'))^2                                  (C3)

    All three models see the clean clip as the past, under the teacher-forcing mask; `target` is the student's moving average. At the
    last j the target is x_48 itself, the teacher's own endpoint: the anchor that holds all the others. (Released code never draws it
    and is held by its initialisation alone.) Student and target never see guidance: it is distilled in.
    """
    j = torch.randint(GRID, (len(x0), 1), generator=generator, device=x0.device).expand(x0.shape[:2])
    here, there = shift(1 - j / GRID, FEW_SHIFT), shift(1 - (j + 1) / GRID, FEW_SHIFT)
    level, next_level = here[..., None, None, None], there[..., None, None, None]
    x = add_noise(x0, torch.randn(x0.shape, generator=generator, device=x0.device), here)                     # (C1)
    with torch.no_grad():
        v = guided(lambda caption: teacher(x0, x, here, caption), caption, recipe.guidance)
        x_next = x - (level - next_level) * v                                                                 # (C2)
        goal = x_next - next_level * target(x0, x_next, there, caption)
    answer = x - level * student(x0, x, here, caption)
    return (answer - goal).square().mean()                                                                    # (C3)


# ---- stage 3: distribution matching on the model's own past -----------------------------------------------------------

def self_rollout(model, caption: Tensor, memory, exit: int, generator: torch.Generator, record: bool) -> Tensor:
    """The next clip length [B, F, ...] of the videos in `memory`, made by the model itself through the real cache.

    All chunks but the last are made as in use. The last leaves the sampler at step `exit` with its answer of that one pass: with `record`
    the gradient is there and nowhere else, since the sampler's earlier steps and the commit record none and the cache stores detached
    rows. Backward needs no checkpointing: nothing that it reads is ever overwritten. An empty memory begins videos; a full one is what
    most of a long video looks like, and as trainer.py keeps it from step to step, training sees videos as old as those in use.

    Why the last chunk alone (released code records all): the judge sees a whole clip. To a chunk with a future it says: fit what comes
    before you and after. But what comes after was made from this chunk and would move with it, which detached rows do not show. A video
    that is too fast it tells to shrink towards its middle, early chunks forward, late ones back: on average little is learned of speed.
    """
    c, how = model.config, dict(steps=FEW_STEPS, sampler="consistency", memory=memory, generator=generator)
    past = rollout(model, caption, c.frames - c.chunk, **how) if c.frames > c.chunk else ()
    return torch.cat([*past, *rollout(model, caption, c.chunk, exit=exit, record=record, **how)], dim=1)


def some_noise(video: Tensor, generator: torch.Generator):
    """(x, sigma, eps): a video at one noise level each, S_5(u) clamped to [0.02, 0.98], where scores are worth comparing."""
    draw = dict(generator=generator, device=video.device)
    sigma = shift(torch.rand(len(video), 1, **draw), FEW_SHIFT).clamp(0.02, 0.98).expand(video.shape[:2])
    eps = torch.randn(video.shape, **draw)
    return add_noise(video, eps, sigma), sigma, eps


def dmd_gradient(video: Tensor, caption: Tensor, real, fake, guidance: float, generator: torch.Generator) -> Tensor:
    """The direction in which the generator's videos are more likely than real ones, [B, F, ...]:

        mu_s(x) = x - sigma v_s(x, sigma)             the answer of score s, real (guided) or fake            (F4)
        g = (mu_fake - mu_real) / mean |video - mu_real|       the mean over each video                            (D1)

    The gradient of KL(generator || data) is the difference of their scores; at equal noise the scores differ as the two answers do. The
    normaliser makes every noise level weigh the same; its floor keeps a video that is already right from dividing by zero.
    """
    with torch.no_grad():
        x, sigma, _ = some_noise(video, generator)
        level = sigma[..., None, None, None]
        mu_fake = x - level * fake.bidirectional(x, sigma, caption)
        mu_real = x - level * guided(lambda caption: real.bidirectional(x, sigma, caption), caption, guidance)
        size = (video - mu_real).abs().flatten(1).mean(dim=1).clamp(min=1e-3)
        return (mu_fake - mu_real) / size[:, None, None, None, None]                                          # (D1)


def dmd_loss(video: Tensor, gradient: Tensor) -> Tensor:
    """L = 1/2 mean (video - sg(video - g))^2, whose gradient is g / numel: a way to hand autograd a gradient.       (D2)"""
    return 0.5 * (video - (video - gradient).detach()).square().mean()


def critic_loss(fake, video: Tensor, caption: Tensor, generator: torch.Generator) -> Tensor:
    """Flow matching of the critic on the generator's own videos: it must know what is generated *now*.                 (D3)"""
    video = video.detach()
    x, sigma, eps = some_noise(video, generator)
    return velocity_error(fake.bidirectional(x, sigma, caption), video, eps).mean()
