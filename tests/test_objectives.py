"""The objectives of the stages are their equations, and no trap of released code is open.

Each loss is computed a second time by hand: from the very numbers that it drew (`Ledger` keeps
them), with networks (`Opinion`) whose answer depends on everything that they are told, and is
wrong by an amount that depends on the noise level. So a weight, a level from another distribution,
a caption that is not passed on: each gives another number. Real models show where the gradient
goes.
"""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import strategies as st

from lab import (EXACT, Dice, a_clip, a_model, assert_same, assert_zero, configs, forall,
                 seeds)
from test_flow import Oracle, a_forgetless_model, a_generator, draws, play
from test_flow import shapes as sizes_of_clips



class Score(Oracle):
    """A model, causal or bidirectional, whose every answer is the clip it was given."""

    def __call__(self, *args):
        x, self.sigma, self.caption = args[-3:]
        level = self.sigma[..., None, None, None].clamp(min=1e-30)
        return (x - self.answer) / level

    bidirectional = __call__


class Opinion:
    """A network with an opinion of its own on everything that it is told."""

    def __init__(self, dice: Dice, shape: tuple, chunk: int = 2):
        self.config = SimpleNamespace(chunk=chunk)
        self.field = dice.normal(*shape)
        self.of_past, self.of_input, self.of_caption = dice.normal(3)

    def __call__(self, clean, x, sigma, caption):
        level = sigma.expand(x.shape[:2])[..., None, None, None]
        words = caption.sum(dim=1)[:, None, None, None, None]
        seen = self.of_past * clean + self.of_input * x + self.of_caption * words
        return seen + (1 + level) * self.field

    def bidirectional(self, x, sigma, caption):
        return self(torch.zeros_like(x), x, sigma, caption)


class Ledger:
    """Random numbers in float64, and a record of what was drawn."""

    def __init__(self, seed: int, level: int | None = None):
        self.dice = Dice(seed)
        self.level = level             # what to "draw" where an integer is wanted
        self.drawn = []                # (kind, numbers), in order

    def _keep(self, kind: str, numbers):
        self.drawn.append((kind, numbers))
        return numbers

    def normal(self, *shape):
        return self._keep("normal", self.dice.normal(*shape))

    def uniform(self, *shape):
        numbers = torch.rand(shape, generator=self.dice.generator, dtype=torch.float64)
        return self._keep("uniform", numbers)

    def integers(self, top, *shape):
        numbers = self.dice.below(top, *shape)
        if self.level is not None:
            numbers = torch.full(shape, self.level)
        return self._keep(f"integers below {top}", numbers)

    def the(self, kind: str, *shape):
        """The one draw of this kind and shape."""
        found = []
        for name, numbers in self.drawn:
            if name == kind and numbers.shape == shape:
                found.append(numbers)
        drawn = [f"{name} {list(numbers.shape)}" for name, numbers in self.drawn]
        assert len(found) == 1, f"needs one draw of {kind} numbers {list(shape)}, not {drawn}"
        return found[0]


# ---- the equations once more, by hand --------------------------------------------------------


def shifted(u, k: float):
    """S_k(u)."""
    return k * u / (1 + (k - 1) * u)


def spread_out(sigma):
    """Levels [B, 1] or [B, F] for video [B, F, channels, h, w]."""
    return sigma[..., None, None, None]


def mixed(x0, eps, sigma):
    """(F1)."""
    return (1 - spread_out(sigma)) * x0 + spread_out(sigma) * eps


def answer(network, x, sigma, caption):
    """(F4) of a score."""
    return x - spread_out(sigma) * network.bidirectional(x, sigma, caption)


def error_by_frame(v, x0, eps):
    """(F2): the squared error of a velocity, mean over each frame."""
    return (v - (eps - x0)).square().mean(dim=(2, 3, 4))


def told(caption, ledger, drop: float):
    """The captions after some are replaced by "none", all three words of a video together."""
    kept = ledger.the("uniform", len(caption), 1) >= drop
    return torch.where(kept, caption, torch.zeros_like(caption))


def some_level(ledger, video):
    """S_5(u) between 0.02 and 0.98, one level for a video."""
    u = ledger.the("uniform", len(video), 1)
    return shifted(u, 5.0).clamp(0.02, 0.98)


def a_problem(seed, B, chunks, size, networks: int):
    """A clip, its caption (no word is "none") and networks that disagree about it."""
    dice = Dice(seed)
    x0 = dice.normal(B, 2 * chunks, 1, size, size)
    caption = 1 + dice.below(4, B, 3)
    return x0, caption, [Opinion(dice, x0.shape) for _ in range(networks)]


# ---- stage score -----------------------------------------------------------------------------

recipes = dict(drop=st.sampled_from([0.0, 0.5, 1.0]), spread=st.sampled_from([0.5, 1.0, 2.0]))


@forall(**sizes_of_clips, **recipes)
def test_the_score_loss_is_its_equation(code, B, chunks, size, drop, spread, seed):
    """sigma = S_3(sigmoid(spread n)), n normal, one a video; L = mean |v - (eps - x0)|^2."""
    x0, caption, (model,) = a_problem(seed, B, chunks, size, 1)
    ledger = Ledger(seed)
    loss, sigma, error = code.objectives.score_loss(
        model, x0, caption, ledger, drop=drop, spread=spread)
    level = shifted(torch.sigmoid(spread * ledger.the("normal", B, 1)), 3.0)
    eps = ledger.the("normal", *x0.shape)
    v = model.bidirectional(mixed(x0, eps, level), level, told(caption, ledger, drop))
    wanted = error_by_frame(v, x0, eps)
    by_frame = level.expand(B, 2 * chunks)
    assert_same(sigma, by_frame, EXACT, "sigma is not S_3(sigmoid(spread n))")
    assert_same(error, wanted, EXACT, "the error of a frame is not mean |v - (eps - x0)|^2")
    assert_same(loss, wanted.mean(), EXACT, "the loss is not the plain mean over frames")


@forall(**sizes_of_clips)
def test_the_score_model_has_one_noise_level_per_video(code, B, chunks, size, seed):
    x0 = Dice(seed).normal(B, 2 * chunks, 1, size, size)
    model = Score(x0)
    caption = torch.ones(B, 1, dtype=torch.long)
    loss, sigma, by_frame = code.objectives.score_loss(
        model, x0, caption, draws(code, seed), drop=0.0)
    assert loss < 1e-10, f"the exact velocity has a loss of {loss:.2e}"
    assert (sigma == sigma[:, :1]).all(), "frames of a video share its level"
    assert torch.equal(model.sigma, sigma), "the model must be told the level"
    assert by_frame.shape == sigma.shape
    assert B == 1 or len(sigma[:, 0].unique()) == B, "videos have levels of their own"


@forall(sizes=configs(min_chunks=2), seed=seeds)
def test_the_score_model_sees_past_and_future(code, sizes, seed):
    model, dice = a_model(code, sizes, seed)
    x, sigma, caption = a_clip(model, dice, 1, sizes["frames"])
    before = model.bidirectional(x, sigma, caption)
    for changed, seen in ((-1, 0), (0, -1)):
        other = x.clone()
        other[:, changed] += 1
        after = model.bidirectional(other, sigma, caption)
        difference = after[:, seen] - before[:, seen]
        assert difference.abs().max() > 1e-9, \
            f"frame {changed} does not reach frame {seen}: a score of whole videos has no mask"


# ---- stage tf --------------------------------------------------------------------------------


@forall(**sizes_of_clips, **recipes)
def test_the_teacher_forcing_loss_is_its_equation(code, B, chunks, size, drop, spread, seed):
    """As the score's, with a level for each chunk; the model is told the clean clip, too."""
    x0, caption, (model,) = a_problem(seed, B, chunks, size, 1)
    ledger = Ledger(seed)
    loss, sigma, error = code.objectives.teacher_forcing_loss(
        model, x0, caption, ledger, drop=drop, spread=spread)
    by_chunk = shifted(torch.sigmoid(spread * ledger.the("normal", B, chunks)), 3.0)
    level = torch.stack((by_chunk, by_chunk), dim=2).flatten(1)    # a chunk is two frames here
    eps = ledger.the("normal", *x0.shape)
    v = model(x0, mixed(x0, eps, level), level, told(caption, ledger, drop))
    wanted = error_by_frame(v, x0, eps)
    assert_same(sigma, level, EXACT, "sigma is not S_3(sigmoid(spread n)), one n for a chunk")
    assert_same(error, wanted, EXACT, "the error of a frame is not mean |v - (eps - x0)|^2")
    assert_same(loss, wanted.mean(), EXACT, "the loss is not the plain mean over frames")


# ---- stage cd --------------------------------------------------------------------------------


@forall(**sizes_of_clips)
def test_models_that_agree_on_the_answer_have_no_consistency_loss(code, B, chunks, size, seed):
    """An answer that is the same along the whole path is consistent, whatever it is."""
    dice = Dice(seed)
    x0 = dice.normal(B, 2 * chunks, 1, size, size)
    says = dice.normal(B, 2 * chunks, 1, size, size)
    model = Score(says)
    other = Score(says + 1)
    caption = torch.ones(B, 1, dtype=torch.long)
    loss = code.objectives.consistency_loss
    agreed = loss(model, model, model, x0, caption, draws(code, seed))
    assert agreed < 1e-8
    apart = loss(other, model, model, x0, caption, draws(code, seed))
    assert apart > 0.5, "a student with another answer must have a loss"


@forall(j=st.integers(0, 47), weight=st.sampled_from([1.0, 2.5]), seed=seeds)
def test_the_consistency_target_is_the_answer_after_one_guided_euler_step(
        code, j, weight, seed):
    """(C1) to (C3) by hand. At j = 47 the target model does not count at all: the teacher's
    endpoint is the anchor."""
    here = shifted(1 - j / 48, 5.0)
    there = shifted(1 - (j + 1) / 48, 5.0)
    x0, caption, networks = a_problem(seed, 2, 1, 3, 3)
    student, target, teacher = networks
    seen = []

    def watched(name, network):
        def call(clean, x, sigma, caption):
            assert torch.equal(clean, x0), "the context is the clean clip"
            seen.append((name, x, sigma))
            return network(clean, x, sigma, caption)
        return call
    ledger = Ledger(seed, level=j)
    loss = code.objectives.consistency_loss(
        watched("student", student), watched("target", target), watched("teacher", teacher),
        x0, caption, ledger, guidance=weight)
    ledger.the("integers below 48", 2, 1)
    eps = ledger.the("normal", *x0.shape)
    level = torch.full((2, 1), here, dtype=torch.float64)
    next_level = torch.full((2, 1), there, dtype=torch.float64)
    x = mixed(x0, eps, level)
    v_none = teacher(x0, x, level, torch.zeros_like(caption))
    v = v_none + weight * (teacher(x0, x, level, caption) - v_none)
    after = x - (here - there) * v
    goal = after - there * target(x0, after, next_level, caption)
    said = x - here * student(x0, x, level, caption)
    # The level comes from integers and is a float32: rounded at 6e-8.
    assert_same(loss, (said - goal).square().mean(), 1e-5,
                "(C3) is not mean (f_student(x_j) - f_target(x_j'))^2")
    if j == 47:
        assert there == 0 and torch.equal(goal, after), "the last target is the Euler endpoint"
    for name, at, sigma in seen:
        point = after if name == "target" else x
        noise = there if name == "target" else here
        assert_same(at, point, 1e-5, f"the {name} looks at the wrong point")
        assert sigma.allclose(torch.tensor(noise, dtype=sigma.dtype)), \
            f"the {name} is told the wrong level"


# ---- stage dmd: the gradient -----------------------------------------------------------------


@forall(**sizes_of_clips)
def test_noise_for_scores_is_its_equation(code, B, chunks, size, seed):
    """sigma = S_5(u) between 0.02 and 0.98, u uniform, one for a video, and x as in (F1)."""
    video = Dice(seed).normal(B, 2 * chunks, 1, size, size)
    ledger = Ledger(seed)
    x, sigma, eps = code.objectives.some_noise(video, ledger)
    level = some_level(ledger, video)
    assert torch.equal(eps, ledger.the("normal", *video.shape)), "eps is not what was drawn"
    by_frame = level.expand(B, 2 * chunks)
    assert_same(sigma, by_frame, EXACT, "sigma is not S_5(u) in [0.02, 0.98]")
    assert_same(x, mixed(video, eps, level), EXACT, "(F1): x = (1 - sigma) video + sigma eps")


@forall(**sizes_of_clips)
def test_the_dmd_gradient_is_the_difference_of_the_answers(code, B, chunks, size, seed):
    dice = Dice(seed)
    video = dice.normal(B, 2 * chunks, 1, size, size)
    real = dice.normal(B, 2 * chunks, 1, size, size)
    fake = dice.normal(B, 2 * chunks, 1, size, size)
    caption = torch.ones(B, 1, dtype=torch.long)
    gradient = code.objectives.dmd_gradient
    g = gradient(video, caption, Score(real), Score(fake), draws(code, seed))
    size_of = (video - real).abs().flatten(1).mean(1).clamp(min=1e-3)
    # sigma is a float32 and as small as 0.02: the answers x - sigma v are rounded at 1e-6.
    assert_same(g, (fake - real) / size_of[:, None, None, None, None], 1e-4,
                "(D1) g = (mu_fake - mu_real) / mean |video - mu_real|, one number per video")
    x = video.clone().requires_grad_(True)
    code.objectives.dmd_loss(x, g).backward()
    assert_same(x.grad, g / g.numel(), 1e-9, "(D2) hands autograd exactly g / numel")
    same = gradient(video, caption, Score(real), Score(real), draws(code, seed))
    assert_zero(same, "a critic that equals the real score leaves nothing to learn")


@forall(weight=st.sampled_from([1.0, 2.5]), **sizes_of_clips)
def test_both_scores_are_told_the_caption_the_level_and_the_same_noisy_video(
        code, B, chunks, size, weight, seed):
    """(D1) by hand, with scores whose answers depend on caption, level and input."""
    video, caption, (real, fake) = a_problem(seed, B, chunks, size, 2)
    ledger = Ledger(seed)
    g = code.objectives.dmd_gradient(video, caption, real, fake, ledger, guidance=weight)
    level = some_level(ledger, video)
    x = mixed(video, ledger.the("normal", *video.shape), level)
    mu_fake = answer(fake, x, level, caption)
    mu_none = answer(real, x, level, torch.zeros_like(caption))
    mu_real = mu_none + weight * (answer(real, x, level, caption) - mu_none)
    size_of = (video - mu_real).abs().flatten(1).mean(dim=1).clamp(min=1e-3)
    wanted = (mu_fake - mu_real) / size_of[:, None, None, None, None]
    assert_same(g, wanted, 1e-9, "(D1) with both scores asked about the captioned video")


@forall(weight=st.sampled_from([2.0, 4.0]), seed=seeds)
def test_guidance_sharpens_the_real_score_alone(code, weight, seed):
    dice = Dice(seed)
    video = dice.normal(2, 2, 1, 2, 2)
    real = dice.normal(2, 2, 1, 2, 2)
    none = dice.normal(2, 2, 1, 2, 2)
    fake = dice.normal(2, 2, 1, 2, 2)

    class Real(Score):
        def bidirectional(self, x, sigma, caption):
            said = Score(real if caption.any() else none)
            return said.bidirectional(x, sigma, caption)
    caption = torch.ones(2, 1, dtype=torch.long)
    g = code.objectives.dmd_gradient(video, caption, Real(real), Score(fake), draws(code, seed),
                                     guidance=weight)
    guided = none + weight * (real - none)
    size_of = (video - guided).abs().flatten(1).mean(1)
    assert_same(g, (fake - guided) / size_of[:, None, None, None, None], 1e-4,
                "mu_real = none + w (captioned - none), the fake score unguided")


@forall(**sizes_of_clips)
def test_the_critics_loss_is_its_equation(code, B, chunks, size, seed):
    """(D3): mean |v - (eps - video)|^2 at the levels of `some_noise`."""
    video, caption, (critic,) = a_problem(seed, B, chunks, size, 1)
    ledger = Ledger(seed)
    loss = code.objectives.critic_loss(critic, video, caption, ledger)
    level = some_level(ledger, video)
    eps = ledger.the("normal", *video.shape)
    v = critic.bidirectional(mixed(video, eps, level), level, caption)
    wanted = error_by_frame(v, video, eps).mean()
    assert_same(loss, wanted, EXACT, "(D3) is not the plain mean of |v - (eps - video)|^2")


@forall(**sizes_of_clips)
def test_the_critic_learns_the_generators_videos_and_touches_them_not(
        code, B, chunks, size, seed):
    video = Dice(seed).normal(B, 2 * chunks, 1, size, size).requires_grad_(True)
    critic = Score(video.detach())
    caption = torch.ones(B, 1, dtype=torch.long)
    loss = code.objectives.critic_loss(critic, video, caption, draws(code, seed))
    assert loss < 1e-8, "the critic's loss is flow matching on the video"
    assert not loss.requires_grad, "the critic's loss must not reach the video: detach it"
    assert (0.0199 < critic.sigma).all() and (critic.sigma < 0.9801).all(), \
        "levels are clamped to [0.02, 0.98]"


# ---- stage dmd: the rollout ------------------------------------------------------------------


def test_the_few_step_sampler_has_the_literatures_levels_and_fresh_noise(code):
    wanted = torch.full((1, 2, 1, 2, 2), 0.5, dtype=torch.float64)
    model = Oracle(wanted)
    denoise = model.denoise
    seen = []

    def watched(x, *args, **how):
        seen.append(x)
        return denoise(x, *args, **how)
    model.denoise = watched
    stream = code.flow.Stream(model, torch.ones(1, 1, dtype=torch.long))
    video = code.flow.rollout(stream, 2, draws(code, 0), sampler=code.flow.consistency, steps=4)
    chunk = next(video)
    levels = [1000 * sigma for sigma in model.asked]
    released = [1000, 937.5, 2500 / 3, 625]
    assert levels == pytest.approx(released, abs=1e-9), "kept as floats: 937 is not 937.5"
    assert_same(chunk, wanted, EXACT, "the last pass jumps to the answer")
    # Going back to a level is no Euler step: answer and fresh noise are mixed anew.
    fresh = a_generator(0)
    for x, sigma in zip(seen, model.asked):
        noise = torch.randn(x.shape, generator=fresh).double()
        assert_same(x, (1 - sigma) * wanted + sigma * noise, EXACT,
                    f"at level {1000 * sigma:g}: not (1 - sigma) answer + sigma fresh noise")


class Watched:
    """A model's two verbs, noting each pass that records gradient: its input, level, past."""

    def __init__(self, model):
        self.model = model
        self.denoise = model.denoise
        self.commit = model.commit
        self.passes = []

    def __enter__(self):
        self.model.denoise = self.watched_denoise
        self.model.commit = self.watched_commit
        return self.passes

    def __exit__(self, *error):
        self.model.denoise = self.denoise
        self.model.commit = self.commit

    def watched_denoise(self, x, sigma, caption, cache, *args, **how):
        if torch.is_grad_enabled():
            past = self.model.make_cache(len(x))
            past.seen = cache.seen
            past.buffers = tuple(buffer.clone() for buffer in cache.buffers)
            self.passes.append((x, sigma, past))
        return self.denoise(x, sigma, caption, cache, *args, **how)

    def watched_commit(self, *args, **how):
        assert not torch.is_grad_enabled(), "the commit must record no gradient"
        self.commit(*args, **how)


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


def a_self_rollout(code, model, caption, exit, seed, record):
    """The video, and the cache that it ends with."""
    stream = code.flow.Stream(model, caption, model.make_cache(len(caption)))
    video = code.objectives.self_rollout(stream, draws(code, seed), exit, record)
    return video, stream.cache


@forall(sizes=configs(layers=2), exit=st.integers(0, 3), seed=seeds)
def test_the_gradient_is_that_of_one_pass_of_the_last_chunk_and_nothing_else(
        code, sizes, exit, seed):
    """By hand: replay the last chunk's exit pass alone, its input and its past as constants. The
    gradients are the same numbers, so nothing flows through the cache, the earlier passes,
    chunks or commits; and backward works with no checkpointing."""
    model, dice = a_forgetless_model(code, sizes, seed)
    caption = a_clip(model, dice, 2, 1)[2]
    n = model.config.chunk
    with Watched(model) as passes:
        video, cache = a_self_rollout(code, model, caption, exit, seed, True)
    assert video.shape[1] == cache.seen == model.config.frames
    assert len(passes) == 1, "one pass records gradient: the exit step of the last chunk"
    x, sigma, past = passes[0]
    level = shifted(1 - exit / 4, 5.0)
    assert sigma.allclose(torch.full_like(sigma, level)), \
        f"the answer is that of pass {exit}, at sigma = {level:.4g}, not at {sigma[0, 0]:.4g}"
    assert not x.requires_grad
    assert not any(buffer.requires_grad for buffer in past.buffers)
    replayed = x - spread_out(sigma) * model.denoise(x, sigma, caption, past)
    assert_same(video[:, -n:], replayed, EXACT, "the last chunk is the answer of its exit pass")
    weight = dice.normal(*video.shape)
    got = gradients(model, (video * weight).sum())
    want = gradients(model, (replayed * weight[:, -n:]).sum())
    for (name, _), mine, theirs in zip(model.named_parameters(), got, want):
        if theirs is not None and theirs.any():
            assert_same(mine, theirs, 1e-9,
                        f"gradient of {name}: something flows that is not the exit pass")
    if video.shape[1] > n:
        chunks = video.shape[1] // n - 1
        before = play(code, model, caption, chunks, seed, steps=4,
                      sampler=code.flow.consistency)
        assert torch.equal(video[:, :-n], before), "the chunks before it are made as in use"
    with torch.no_grad():
        silent, _ = a_self_rollout(code, model, caption, exit, seed, False)
    assert torch.equal(silent, video), "the critic's rollout is the same video"
    assert not silent.requires_grad, "the critic's rollout is without gradient"
