"""The trainer trains what it says, by the rates and averages that it says, and nothing else.

One step of every stage; who moves and who does not; what is averaged, and how fast; and the
long videos of stage dmd, whose windows are renamed so that they never grow old.
"""

import pytest
import torch
from hypothesis import strategies as st

from lab import EXACT, a_clip, a_model, assert_same, configs, forall, seeds
from test_flow import draws

STAGES = ("score", "tf", "cd", "dmd")

# ---- a long video's window -------------------------------------------------------------------


@forall(sizes=configs(), chunks=st.integers(1, 4), more=st.integers(1, 5),
        B=st.integers(1, 2), seed=seeds)
def test_an_old_window_can_be_renamed(code, sizes, chunks, more, B, seed):
    """Going on after `rename_window` is going on without it: the same video, far beyond the
    horizon, for any window and sink."""
    model, dice = a_model(code, sizes, seed)
    c = model.config
    caption = a_clip(model, dice, B, 1)[2]

    def streamed(stream, frames, seed):
        video = code.flow.rollout(stream, frames, draws(code, seed), steps=1)
        return torch.cat(list(video), dim=1)
    plain = code.flow.Stream(model, caption)
    renamed = code.flow.Stream(model, caption)
    for stream in (plain, renamed):
        streamed(stream, c.frames + chunks * c.chunk, seed)
    code.trainer.rename_window(renamed.cache)
    assert renamed.cache.seen <= plain.cache.seen
    assert renamed.cache.seen < c.frames + c.window
    wanted = streamed(plain, more * c.chunk, seed + 1)
    got = streamed(renamed, more * c.chunk, seed + 1)
    assert_same(got, wanted, EXACT, "a renamed window is another window")


def a_numbered_cache(code, sink: int, committed: int):
    """Sink and a ring of four; every frame carries its number."""
    window = sink + 5
    cache = code.cache.RollingCache(1, 1, (1, 1), tokens=1, chunk=1, window=window, sink=sink,
                                    horizon=window)
    for frame in range(committed):
        number = torch.full((1, 1, 1), float(frame))
        cache.commit([(number, number)])
    return cache


@pytest.mark.parametrize("sink", [0, 1])
@pytest.mark.parametrize("more", range(4, 12))
def test_a_renamed_window_keeps_its_order(code, sink, more):
    """The frame at each position is the same, wherever in the ring the oldest one was."""
    committed = sink + more
    cache = a_numbered_cache(code, sink, committed)
    before = cache.positions()[0].tolist()
    code.trainer.rename_window(cache)
    numbers = cache.buffers[0].flatten().tolist()
    held = dict(zip(cache.positions()[0].tolist(), numbers))
    wanted = {}
    for position in before:
        in_the_ring = committed - (sink + 4 - position)
        wanted[position] = position if position < sink else in_the_ring
    assert held == wanted, f"after {committed} frames, renamed: {held}; what was there: {wanted}"


def test_a_window_that_is_not_full_keeps_its_names(code):
    cache = code.cache.RollingCache(1, 1, (2, 2), tokens=1, chunk=1, window=4, sink=1,
                                    horizon=6)
    with pytest.raises(ValueError, match="only a full window"):
        code.trainer.rename_window(cache)


# ---- one step --------------------------------------------------------------------------------


def a_small_model(code):
    config = code.mla_video.Config(dim=32, layers=1, heads=2, latent=8, query_latent=16, rope=6,
                                   ffn=32, words=26)
    model = code.mla_video.VideoDiT(config)
    # A new head is silent, and silence teaches nothing. Nor does a new model hear captions.
    with torch.no_grad():
        model.head.weight.normal_(std=0.1)
        for block in model.blocks:
            block.caption.W_O.weight.normal_(std=0.1)
    return model


def a_trainer(code, stage, **how):
    torch.manual_seed(0)
    model = a_small_model(code)
    score = a_small_model(code)
    recipe = code.train.Recipe(stage=stage, steps=8, batch=4, warmup=1, **how)
    world = code.toy_data.make_world("shapes")
    return code.train.Trainer(model, recipe, world, torch.device("cpu"), score)


def step_on(trainer):
    """A whole step, on the clips of its number."""
    x0, caption = trainer.batch(trainer.step)
    return trainer.update(x0, caption)


def networks_of_dmd(trainer) -> dict:
    return {"generator": trainer.model, "critic": trainer.critic.model,
            "real score": trainer.on_clips["score"]}


def snapshot(model) -> list:
    return [weight.detach().clone() for weight in model.parameters()]


def moved(before: list, model) -> bool:
    return any(not torch.equal(old, new) for old, new in zip(before, model.parameters()))


def take_step(code, trainer, name: str):
    """One step of the generator or of the critic, on new videos; its loss."""
    one = torch.tensor(1.0)
    caption = trainer.batch(0)[1]
    if name == "critic":
        return code.train.critic_step(trainer, 3, one, caption)[0]
    return code.train.generator_step(trainer, 3, one, one, caption)[0]


def test_generator_and_critic_leave_each_other_alone(code):
    trainer = a_trainer(code, "dmd")
    networks = networks_of_dmd(trainer)
    for who in ("critic", "generator"):
        before = {name: snapshot(network) for name, network in networks.items()}
        take_step(code, trainer, who)
        for name, network in networks.items():
            assert all(weight.grad is None for weight in network.parameters())
            changed = moved(before[name], network)
            assert changed == (name == who), \
                f"the step of the {who} {'moved' if changed else 'did not move'} the {name}"


def test_the_first_generator_step_has_nothing_to_learn_from_a_critic_that_is_the_score(code):
    trainer = a_trainer(code, "dmd")
    loss = take_step(code, trainer, "generator")
    assert loss == 0, \
        "the critic starts as a copy of the real score, so the very first gradient is zero"
    trainer = a_trainer(code, "dmd")
    for _ in range(6):
        step_on(trainer)
    trainer.read_losses()
    _, loss = trainer.losses["generator"][-1]
    assert loss > 0, "once the critic knows the generator's videos there is something to learn"


NUMBERS = dict(drop=0.5, spread=2.0, guidance=2.5)


def objective_of(code, trainer, x0, caption):
    """The loss of a trainer's next step: its objective, at the recipe's numbers, and with the
    random numbers of (seed, step)."""
    mine = draws(code, trainer.recipe.seed * 1_000_003 + trainer.step)
    stage = trainer.recipe.stage
    model = trainer.model
    if stage == "cd":
        teacher = trainer.on_clips["teacher"]
        return code.objectives.consistency_loss(model, trainer.ema, teacher, x0, caption, mine,
                                                guidance=2.5)
    if stage == "tf":
        loss = code.objectives.teacher_forcing_loss
    else:
        loss = code.objectives.score_loss
    return loss(model, x0, caption, mine, drop=0.5, spread=2.0)[0]


def test_a_step_minimises_its_objective_at_the_recipes_numbers(code):
    for stage in ("score", "tf", "cd"):
        trainer = a_trainer(code, stage, **NUMBERS, ema=0.5)
        step_on(trainer)               # from here on model, average and teacher are different
        x0, caption = trainer.batch(1)
        wanted = objective_of(code, trainer, x0, caption)
        got = trainer.update(x0, caption)
        assert_same(got, wanted, 1e-6, f"stage {stage}: not the objective of the recipe")


def own_video(code, trainer, caption, mine):
    """What the model makes of four passes a chunk, by hand."""
    stream = code.flow.Stream(trainer.model, caption)
    with torch.no_grad():
        return code.objectives.self_rollout(stream, mine, 3, False)


def test_the_generators_step_minimises_its_objective_at_the_recipes_numbers(code):
    trainer = a_trainer(code, "dmd", **NUMBERS, shift=2.0)
    take_step(code, trainer, "critic")                     # the critic is no copy any more
    caption = trainer.batch(0)[1]
    mine = draws(code, 5)
    video = own_video(code, trainer, caption, mine)
    gradient = code.objectives.dmd_gradient(
        video, caption, trainer.on_clips["score"], trainer.critic.model, mine, guidance=2.5,
        k=2.0)
    wanted = code.objectives.dmd_loss(video, gradient)
    trainer.draws.generator.manual_seed(5)
    got = take_step(code, trainer, "generator")
    assert_same(got, wanted, 1e-6, "not (D2) of a guided real score, and of the critic")


def test_the_critics_step_minimises_its_objective(code):
    trainer = a_trainer(code, "dmd", shift=2.0)
    caption = trainer.batch(0)[1]
    mine = draws(code, 5)
    video = own_video(code, trainer, caption, mine)
    wanted = code.objectives.critic_loss(trainer.critic.model, video, caption, mine, k=2.0)
    trainer.draws.generator.manual_seed(5)
    got = take_step(code, trainer, "critic")
    assert_same(got, wanted, 1e-6, "not (D3) of the videos that the model makes now")


def test_the_papers_optimiser_is_adamw_of_all_weights(code):
    trainer = a_trainer(code, "tf", optimiser="adamw", lr_muon=0.02, lr_adamw=0.01)
    matrices, rest = trainer.learner.optimisers
    for optimiser, lr in ((matrices, 0.02), (rest, 0.01)):
        assert isinstance(optimiser, torch.optim.AdamW)
        group, = optimiser.param_groups
        assert group["betas"] == (0.0, 0.999) and group["lr"] == lr
    _, last = a_trainer(code, "tf").learner.optimisers
    assert last.param_groups[0]["betas"] == (0.9, 0.95), "ours stays as it is"
    before = snapshot(trainer.model)
    step_on(trainer)
    assert moved(before, trainer.model)


def test_captions_under_way_change_as_often_as_the_recipe_says(code):
    """Videos that go on from step to step: all of them, or none, are told the new caption."""
    for switch in (0.0, 1.0):
        trainer = a_trainer(code, "dmd", switch=switch, restart=0.0)
        step_on(trainer)
        step_on(trainer)
        wanted = trainer.batch(int(switch))[1]
        assert torch.equal(trainer.videos[0], wanted), f"switch = {switch}"


# ---- averages and rates ----------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_moves_its_model_and_averages_it(code, stage):
    # Gates that start at zero open layer by layer: three updates reach all.
    trainer = a_trainer(code, stage, every=2)
    before = {}
    for name, weight in trainer.model.named_parameters():
        before[name] = weight.detach().clone()
    for _ in range(8):
        step_on(trainer)
    trainer.read_losses()
    still = [name for name, weight in trainer.model.named_parameters()
             if torch.equal(weight, before[name])]
    assert not still, f"these weights never learned: {still}"
    for name, average in trainer.ema.named_parameters():
        assert not torch.equal(average, before[name]), f"the average of {name} never moved"
    assert moved(snapshot(trainer.ema), trainer.model), "the average is the model itself"
    names = {"generator", "critic"} if stage == "dmd" else {stage}
    assert set(trainer.losses) == names


def in_one(weights) -> torch.Tensor:
    """All numbers of some weights, in float64."""
    return torch.cat([weight.detach().double().flatten() for weight in weights])


def assert_average_is_its_formula(code, stage: str, ema: float) -> None:
    trainer = a_trainer(code, stage, ema=ema, every=2)
    start = in_one(trainer.model.parameters())
    average = start
    for step in range(8):
        step_on(trainer)
        decay = min(ema, (1 + step) / (10 + step))
        if stage in ("cd", "dmd"):
            decay = ema
        if stage == "dmd" and step % 2:                    # a step of the critic alone
            decay = 1.0
        average = decay * average + (1 - decay) * in_one(trainer.model.parameters())
    got = in_one(trainer.ema.parameters())
    assert_same(got - start, average - start, 1e-3,
                f"stage {stage}, ema {ema}: not average = d average + (1 - d) weights with "
                f"d = min(ema, (1 + step) / (10 + step)), in cd and dmd d = ema")


def test_the_average_is_its_formula(code):
    """By hand, from the weights after each step. With ema = 0.4 the limit is reached in the
    sixth step, with 0.99 never."""
    for ema in (0.4, 0.99):
        for stage in STAGES:
            assert_average_is_its_formula(code, stage, ema)


def test_a_diverging_run_names_the_loss_that_went_first_and_keeps_its_checkpoint(
        code, tmp_path):
    trainer = a_trainer(code, "dmd")
    step_on(trainer)
    code.train.save(trainer, tmp_path)
    before = (tmp_path / "train.pt").read_bytes()
    with torch.no_grad():
        trainer.critic.model.head.weight.fill_(float("nan"))
    message = ("the critic loss was the first to go, nan at step 1; "
               "the last good checkpoint is kept")
    with pytest.raises(ValueError, match=message):
        code.train.train(trainer, tmp_path, save_every=100)
    after = (tmp_path / "train.pt").read_bytes()
    assert after == before, "a diverged state was saved over the last good one"


def a_step_of(code, peak: float, share: float, seed: int) -> torch.Tensor:
    """How all weights move in one step with this peak rate, of which `share` is kept."""
    torch.manual_seed(seed)
    model = a_small_model(code)
    recipe = code.train.Recipe(lr_muon=3e-3 * peak, lr_adamw=1e-3 * peak)
    learner = code.train.Learner(model, recipe)
    x0 = torch.randn(2, 12, 3, 16, 16)
    sigma = torch.full(x0.shape[:2], 0.5)
    caption = torch.ones(2, 3, dtype=torch.long)
    loss = model(x0, x0, sigma, caption).square().mean()
    before = in_one(learner.weights)
    learner.step(loss, torch.tensor(share))
    return in_one(learner.weights) - before


@forall(rate=st.floats(0.01, 1.0), seed=st.integers(0, 100))
def test_a_step_drawn_back_is_a_step_at_a_lower_rate(code, rate, seed):
    """Learner.step takes the optimisers' step at the peak rate and keeps `rate` of it."""
    drawn_back = a_step_of(code, 1.0, rate, seed)
    lower = a_step_of(code, rate, 1.0, seed)
    assert_same(drawn_back, lower, 1e-3, "both rules move weights in proportion to their rate")
