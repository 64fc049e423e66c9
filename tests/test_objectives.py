"""The objectives of the stages are their equations, and none of the traps that released code fell into is open here.

Stand-ins whose answers are known make each loss a number that can be written down; real models show where the gradient goes.
"""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import strategies as st

from lab import EXACT, Dice, assert_same, assert_zero, configs, forall, seeds
from test_cache import a_clip, a_model
from test_flow import Oracle, play

sizes_of_clips = dict(B=st.integers(1, 3), chunks=st.integers(1, 3), size=st.integers(1, 4), seed=seeds)


class Score(Oracle):
    """A model, causal or bidirectional, whose every answer is the clip it was given: v = (x - answer) / sigma."""

    def __call__(self, *args):
        x, sigma, self.caption = args[-3:]
        self.sigma = sigma
        return (x - self.answer) / sigma[..., None, None, None].clamp(min=1e-30)

    bidirectional = __call__


def draws(seed):
    return torch.Generator().manual_seed(seed)


# ---- stage 0 --------------------------------------------------------------------------------------------------------


@forall(**sizes_of_clips)
def test_the_score_model_has_one_noise_level_per_video(code, B, chunks, size, seed):
    x0 = Dice(seed).normal(B, 2 * chunks, 1, size, size)
    model = Score(x0)
    loss, sigma, by_frame = code.objectives.score_loss(model, x0, torch.ones(B, 1, dtype=torch.long), code.trainer.Recipe(drop=0.0), draws(seed))
    assert loss < 1e-10, f"the exact velocity has a loss of {loss:.2e}"
    assert torch.equal(sigma, sigma[:, :1].expand_as(sigma)) and torch.equal(model.sigma, sigma) and by_frame.shape == sigma.shape
    assert B == 1 or len(sigma[:, 0].unique()) == B, "videos have levels of their own"


@forall(sizes=configs(min_chunks=2), seed=seeds)
def test_the_score_model_sees_past_and_future(code, sizes, seed):
    model, dice = a_model(code, sizes, seed)
    x, sigma, caption = a_clip(model, dice, 1, sizes["frames"])
    before = model.bidirectional(x, sigma, caption)
    for changed, seen in ((-1, 0), (0, -1)):
        other = x.clone()
        other[:, changed] += 1
        assert (model.bidirectional(other, sigma, caption)[:, seen] - before[:, seen]).abs().max() > 1e-9, \
            f"frame {changed} does not reach frame {seen}: a mask stands where a score of whole videos has none"


# ---- stage 2 --------------------------------------------------------------------------------------------------------


@forall(**sizes_of_clips)
def test_models_that_agree_on_the_answer_have_no_consistency_loss(code, B, chunks, size, seed):
    dice = Dice(seed)
    x0, answer = dice.normal(B, 2 * chunks, 1, size, size), dice.normal(B, 2 * chunks, 1, size, size)
    model, other = Score(answer), Score(answer + 1)
    args = x0, torch.ones(B, 1, dtype=torch.long), code.trainer.Recipe(), draws(seed)
    # An answer that is the same along the whole path is consistent, whatever it is.
    assert code.objectives.consistency_loss(model, model, model, *args) < 1e-8
    assert code.objectives.consistency_loss(other, model, model, *args) > 0.5, "a student with another answer must have a loss"


@forall(j=st.integers(0, 47), weight=st.sampled_from([1.0, 2.5]), seed=seeds)
def test_the_consistency_target_is_the_answer_after_one_guided_euler_step(code, j, weight, seed):
    """(C1) to (C3) by hand. At j = 47 the target model does not count at all: the teacher's endpoint is the anchor."""
    dice = Dice(seed)
    x0, teacher_says, none_says, target_says, student_says = (dice.normal(2, 2, 1, 3, 3) for _ in range(5))
    here, there = code.sample.shift(1 - j / 48, 5), code.sample.shift(1 - (j + 1) / 48, 5)
    seen = []

    class Fixed(SimpleNamespace):                          # v does not depend on x: easy to step by hand
        def __call__(self, clean, x, sigma, caption):
            assert torch.equal(clean, x0), "the context is the clean clip"
            seen.append((self.name, x, sigma))
            return self.none if self.none is not None and not caption.any() else self.v

    student, target, teacher = (Fixed(name=name, v=v, none=none) for name, v, none in (
        ("student", student_says, None), ("target", target_says, None), ("teacher", teacher_says, none_says)))
    draw, randint = draws(seed), torch.randint
    code.objectives.torch.randint = lambda top, shape, **how: torch.full(shape, j)
    try:
        loss = code.objectives.consistency_loss(student, target, teacher, x0, torch.ones(2, 1, dtype=torch.long), code.trainer.Recipe(guidance=weight), draw)
    finally:
        code.objectives.torch.randint = randint
    x = (1 - here) * x0 + here * torch.randn(x0.shape, generator=draws(seed))
    after = x - (here - there) * (none_says + weight * (teacher_says - none_says))
    goal = after - there * target_says
    assert_same(loss, (x - here * student_says - goal).square().mean(), 1e-5, "(C3) is not mean (f_student(x_j) - f_target(x_j'))^2")
    assert j < 47 or there == 0 and torch.equal(goal, after), "the last target is the teacher's Euler endpoint"
    for name, at, sigma in seen:
        assert_same(at, after if name == "target" else x, 1e-5, f"the {name} looks at the wrong point")
        assert sigma.allclose(torch.tensor(there if name == "target" else here, dtype=sigma.dtype)), f"the {name} is told the wrong level"


# ---- stage 3: the gradient --------------------------------------------------------------------------------------------


@forall(**sizes_of_clips)
def test_the_dmd_gradient_is_the_difference_of_the_answers(code, B, chunks, size, seed):
    dice = Dice(seed)
    video, real, fake = (dice.normal(B, 2 * chunks, 1, size, size) for _ in range(3))
    caption = torch.ones(B, 1, dtype=torch.long)
    g = code.objectives.dmd_gradient(video, caption, Score(real), Score(fake), 1.0, draws(seed))
    size_of = (video - real).abs().flatten(1).mean(1).clamp(min=1e-3)[:, None, None, None, None]
    # sigma is a float32 and as small as 0.02: the answers x - sigma v are rounded at 1e-6.
    assert_same(g, (fake - real) / size_of, 1e-4, "(D1) g = (mu_fake - mu_real) / mean |video - mu_real|, one number per video")
    x = video.clone().requires_grad_(True)
    code.objectives.dmd_loss(x, g).backward()
    assert_same(x.grad, g / g.numel(), 1e-9, "(D2) hands autograd exactly g / numel")
    same = code.objectives.dmd_gradient(video, caption, Score(real), Score(real), 1.0, draws(seed))
    assert_zero(same, "a critic that equals the real score leaves nothing to learn")


@forall(weight=st.sampled_from([2.0, 4.0]), seed=seeds)
def test_guidance_sharpens_the_real_score_alone(code, weight, seed):
    dice = Dice(seed)
    video, real, none, fake = (dice.normal(2, 2, 1, 2, 2) for _ in range(4))

    class Real(Score):
        def bidirectional(self, x, sigma, caption):
            return Score(real if caption.any() else none).bidirectional(x, sigma, caption)
    g = code.objectives.dmd_gradient(video, torch.ones(2, 1, dtype=torch.long), Real(real), Score(fake), weight, draws(seed))
    guided = none + weight * (real - none)
    size_of = (video - guided).abs().flatten(1).mean(1)[:, None, None, None, None]
    assert_same(g, (fake - guided) / size_of, 1e-4, "mu_real = none + w (captioned - none), the fake score unguided")


@forall(**sizes_of_clips)
def test_the_critic_learns_the_generators_videos_and_touches_them_not(code, B, chunks, size, seed):
    video = Dice(seed).normal(B, 2 * chunks, 1, size, size).requires_grad_(True)
    critic = Score(video.detach())
    loss = code.objectives.critic_loss(critic, video, torch.ones(B, 1, dtype=torch.long), draws(seed))
    assert loss < 1e-8 and not loss.requires_grad, "the critic's loss is flow matching on the video, detached"
    assert (0.0199 < critic.sigma).all() and (critic.sigma < 0.9801).all(), "levels are clamped to [0.02, 0.98]"


# ---- stage 3: the rollout ---------------------------------------------------------------------------------------------


def test_the_few_step_sampler_has_the_literatures_levels_and_fresh_noise(code):
    answer = torch.full((1, 2, 1, 2, 2), 0.5, dtype=torch.float64)
    model, seen = Oracle(answer), []
    denoise = model.denoise
    model.denoise = lambda x, sigma, *rest: seen.append(x) or denoise(x, sigma, *rest)
    chunk = next(code.sample.rollout(model, torch.ones(1, 1, dtype=torch.long), 2, steps=4, sampler="consistency", generator=draws(0)))
    assert [1000 * sigma for sigma in model.asked] == pytest.approx([1000, 937.5, 2500 / 3, 625], abs=1e-9), "kept as floats: 937 is not 937.5"
    assert_same(chunk, answer, EXACT, "the last pass jumps to the answer")
    fresh = draws(0)
    for x, sigma in zip(seen, model.asked):                # going back to a level is no Euler step: answer and fresh noise, mixed anew
        noise = torch.randn(x.shape, generator=fresh).double()
        assert_same(x, (1 - sigma) * answer + sigma * noise, EXACT, f"at level {1000 * sigma:g} the input is not (1 - sigma) answer + sigma fresh noise")


@forall(sizes=configs(layers=2), exit=st.integers(0, 3), seed=seeds)
def test_the_gradient_is_that_of_one_pass_of_the_last_chunk_and_nothing_else(code, sizes, exit, seed):
    """By hand: replay the last chunk's exit pass alone, its input and its past as constants. The gradients are the same numbers, so nothing
    flows through the cache, the earlier passes, chunks or commits; and backward works with no checkpointing."""
    model, dice = a_model(code, sizes | {"window": sizes["frames"], "sink": 0}, seed)
    caption, passes = a_clip(model, dice, 2, 1)[2], []
    denoise, commit = model.denoise, model.commit

    def watched(x, sigma, caption, cache, route="auto"):
        if torch.is_grad_enabled():
            past = model.make_cache(2)
            past.seen, past.buffers = cache.seen, tuple(buffer.clone() for buffer in cache.buffers)
            passes.append((x, sigma, past))
        return denoise(x, sigma, caption, cache, route)

    def commit_watched(*args, **how):
        assert not torch.is_grad_enabled(), "the commit must record no gradient"
        commit(*args, **how)
    model.denoise, model.commit = watched, commit_watched
    memory = model.make_cache(2)
    video = code.objectives.self_rollout(model, caption, memory, exit, draws(seed), True)
    model.denoise, model.commit = denoise, commit
    n = model.config.chunk
    assert video.shape[1] == memory.seen == model.config.frames
    assert len(passes) == 1, "one pass records gradient: the exit step of the last chunk"
    (x, sigma, past), = passes
    assert not x.requires_grad and not any(buffer.requires_grad for buffer in past.buffers)
    answer = x - sigma[..., None, None, None] * model.denoise(x, sigma, caption, past)
    assert_same(video[:, -n:], answer, EXACT, "the last chunk of the rollout is the answer of its exit pass")
    weight = dice.normal(*video.shape)
    got = torch.autograd.grad((video * weight).sum(), list(model.parameters()), allow_unused=True)
    want = torch.autograd.grad((answer * weight[:, -n:]).sum(), list(model.parameters()), allow_unused=True)
    for name, mine, theirs in zip(dict(model.named_parameters()), got, want):
        if theirs is not None and theirs.any():
            assert_same(mine, theirs, 1e-9, f"gradient of {name}: something flows that is not the exit pass")
    if video.shape[1] > n:
        before = play(code, model, caption, video.shape[1] // n - 1, seed, steps=4, sampler="consistency")
        assert torch.equal(video[:, :-n], before), "the chunks before it are made as in use"
    with torch.no_grad():
        silent = code.objectives.self_rollout(model, caption, model.make_cache(2), exit, draws(seed), False)
    assert torch.equal(silent, video) and not silent.requires_grad, "the critic's rollout is the same video, without gradient"


@forall(sizes=configs(), chunks=st.integers(1, 4), more=st.integers(1, 5), B=st.integers(1, 2), seed=seeds)
def test_an_old_window_can_be_renamed(code, sizes, chunks, more, B, seed):
    """Going on after `rewind` is going on without it: same video, far beyond the horizon, any window and sink."""
    model, dice = a_model(code, sizes, seed)
    caption, c = a_clip(model, dice, B, 1)[2], model.config
    memories = [model.make_cache(B) for _ in range(2)]
    for memory in memories:
        noise = draws(seed)
        list(code.sample.rollout(model, caption, c.frames + chunks * c.chunk, steps=1, generator=noise, memory=memory))
    memories[1].rewind()
    assert memories[1].seen <= memories[0].seen and memories[1].seen < c.frames + c.window
    rest = [torch.cat(list(code.sample.rollout(model, caption, more * c.chunk, steps=1, generator=draws(seed + 1), memory=memory)), 1)
            for memory in memories]
    assert_same(rest[1], rest[0], EXACT, "a renamed window is another window")


def test_a_memory_is_refused_where_it_would_be_half_of_the_past(code):
    model = code.mla_video.VideoDiT(code.mla_video.Config())
    for how in ({"guidance": 2.0}, {"compile": "eager"}):
        with pytest.raises(ValueError, match="memory is one plain cache"):
            next(code.sample.rollout(model, torch.zeros(1, 3, dtype=torch.long), 3, memory=model.make_cache(1), **how))


def test_a_renamed_window_keeps_its_order(code):
    """Each frame carries its number. After `rewind` the frame at each position is the same, whatever slot the oldest one was in."""
    for sink, committed in ((sink, sink + more) for sink in (0, 1) for more in range(4, 12)):
        cache = code.cache.RollingCache(1, 1, (1, 1), tokens=1, chunk=1, window=sink + 5, sink=sink, horizon=sink + 5)
        for frame in range(committed):
            cache.commit([(torch.full((1, 1, 1), float(frame)),) * 2])
        before = cache.positions()[0].tolist()
        cache.rewind()
        held = dict(zip(cache.positions()[0].tolist(), cache.buffers[0].flatten().tolist()))
        wanted = {position: position if position < sink else committed - (sink + 4 - position) for position in before}
        assert held == wanted, f"after {committed} frames, renamed: {held} (position: frame); what was there: {wanted}"


def test_a_window_that_is_not_full_keeps_its_names(code):
    cache = code.cache.RollingCache(1, 1, (2, 2), tokens=1, chunk=1, window=4, sink=1, horizon=6)
    with pytest.raises(ValueError, match="only a full window"):
        cache.rewind()


@forall(sizes=configs(min_chunks=3), seed=seeds)
def test_a_caption_changes_with_the_chunk_that_it_is_given_for(code, sizes, seed):
    model, dice = a_model(code, sizes | {"window": sizes["frames"], "sink": 0}, seed)
    n, (first, second) = model.config.chunk, torch.ones(2, 1, model.config.slots, dtype=torch.long) * torch.tensor([1, 2])[:, None, None]
    plain, switched = play(code, model, first, 3, seed), play(code, model, first, 3, seed, switch={n: second})
    late = play(code, model, first, 3, seed, switch={n + 1: second})
    assert torch.equal(switched[:, :n], plain[:, :n]), "before the switch nothing changes"
    assert (switched[:, n:2 * n] != plain[:, n:2 * n]).any(), "the chunk that begins at the switch has the new caption"
    assert torch.equal(late[:, :2 * n], plain[:, :2 * n]) if n > 1 else True, "a switch inside a chunk waits for the next one"
    assert torch.equal(play(code, model, first, 3, seed, switch={0: second}), play(code, model, second, 3, seed))


# ---- the trainer ----------------------------------------------------------------------------------------------------


def a_trainer(code, stage, **how):
    sizes = dict(dim=32, layers=1, heads=2, latent=8, query_latent=16, rope=6, ffn=32, words=26)
    torch.manual_seed(0)
    model, score = (code.mla_video.VideoDiT(code.mla_video.Config(**sizes)) for _ in range(2))
    with torch.no_grad():                                  # a new head is silent, and silence teaches nothing
        model.head.weight.normal_(std=0.1)
        score.head.weight.normal_(std=0.1)
    recipe = code.trainer.Recipe(stage=stage, steps=8, batch=4, warmup=1, **how)
    return code.trainer.Trainer(model, recipe, code.train.make_world("shapes"), torch.device("cpu"), score)


def test_generator_and_critic_leave_each_other_alone(code):
    trainer = a_trainer(code, "dmd")
    rate, caption = torch.tensor(1.0), trainer.batch(0)[1]

    def snapshot():
        return [[p.detach().clone() for p in model.parameters()] for model in (trainer.model, trainer.critic.model, trainer.score)]
    for step, changes in ((lambda: trainer._critic_step(3, rate, caption), 1), (lambda: trainer._generator_step(3, rate, rate, caption), 0)):
        before = snapshot()
        step()
        assert all(p.grad is None for model in (trainer.model, trainer.critic.model, trainer.score) for p in model.parameters())
        for i, name in enumerate(("generator", "critic", "real score")):
            same = all(torch.equal(a, b) for a, b in zip(before[i], snapshot()[i]))
            assert same == (i != changes), f"the step of the {('generator', 'critic')[changes]} {'moved' if not same else 'did not move'} the {name}"


def test_the_first_generator_step_has_nothing_to_learn_from_a_critic_that_is_the_score(code):
    trainer = a_trainer(code, "dmd")
    loss, *_ = trainer._generator_step(1, torch.tensor(1.0), torch.tensor(1.0), trainer.batch(0)[1])
    assert loss == 0, "the critic starts as a copy of the real score, so the very first gradient is zero"
    trainer = a_trainer(code, "dmd")
    for _ in range(6):
        trainer.update(*trainer.batch(trainer.step))
    trainer.read_losses()
    assert trainer.losses["generator"][-1][1] > 0, "once the critic knows the generator's videos there is something to learn"


@pytest.mark.parametrize("stage", ["score", "tf", "cd", "dmd"])
def test_every_stage_moves_its_model_and_averages_it(code, stage):
    trainer = a_trainer(code, stage, every=2)              # gates that start at zero open layer by layer: three updates reach all
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    for _ in range(8):
        trainer.update(*trainer.batch(trainer.step))
    trainer.read_losses()
    still = [name for name, p in trainer.model.named_parameters() if torch.equal(p, before[name])]
    assert not still, f"these weights never learned: {still}"
    for name, average in trainer.ema.named_parameters():
        assert not torch.equal(average, before[name]), f"the average of {name} never moved"
    assert any(not torch.equal(a, b) for a, b in zip(trainer.ema.parameters(), trainer.model.parameters()))
    assert set(trainer.losses) == ({"generator", "critic"} if stage == "dmd" else {stage})


def test_a_diverging_run_names_the_loss_that_went_first_and_keeps_its_checkpoint(code, tmp_path):
    trainer = a_trainer(code, "dmd")
    trainer.update(*trainer.batch(0))
    code.train.save(trainer, tmp_path)
    before = (tmp_path / "train.pt").read_bytes()
    with torch.no_grad():
        trainer.critic.model.head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="the critic loss was the first to go, nan at step 1; the last good checkpoint is kept"):
        code.train.train(trainer, tmp_path, save_every=100)
    assert (tmp_path / "train.pt").read_bytes() == before, "a diverged state was saved over the last good one"


@forall(rate=st.floats(0.01, 1.0), seed=st.integers(0, 100))
def test_a_step_drawn_back_is_a_step_at_a_lower_rate(code, rate, seed):
    """Learner.step takes the optimisers' step at the peak rate and keeps `rate` of it."""
    results = []
    for peak, share in ((1.0, rate), (rate, 1.0)):
        trainer = a_trainer(code, "tf", lr_muon=3e-3 * peak, lr_adamw=1e-3 * peak)
        loss = trainer.model(*trainer.batch(0)[:1] * 2, torch.full((4, 12), 0.5), trainer.batch(0)[1]).square().mean()
        before = [p.detach().clone() for p in trainer.learner.weights]
        trainer.learner.step(loss, torch.tensor(share))
        results.append(torch.cat([(p.detach() - old).flatten() for p, old in zip(trainer.learner.weights, before)]))
    assert_same(results[0], results[1], 1e-3, "both rules move weights in proportion to their rate")
