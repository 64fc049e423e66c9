"""Flow matching has one direction of time and one sign in the whole repository, and a rollout is autoregressive.

Proved here with a stand-in whose velocity field is known exactly: the loss is zero on it, and the sampler leads from any noise to the data;
so loss and sampler cannot disagree about sign or direction. And on real models: a chunk depends on its predecessors' noise, guidance keeps
two caches, a seed gives the same bits, memory does not grow with the video, a checkpoint gives back its weights.
"""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import strategies as st

from lab import EXACT, Dice, assert_same, configs, forall, seeds
from test_cache import a_clip, a_model


class Oracle:
    """A model that knows the answer: all of its flow leads to `answer`, so v = (x_sigma - answer) / sigma exactly."""

    def __init__(self, answer, chunk: int = 2):
        B, _, channels, height, width = answer.shape
        self.config = SimpleNamespace(chunk=chunk, channels=channels, height=height, width=width, frames=answer.shape[1])
        self.embed, self.answer, self.asked = SimpleNamespace(weight=answer), answer, []

    def __call__(self, x, sigma, caption, *_):
        return (x - self.answer[:, :x.shape[1]]) / sigma[..., None, None, None]

    def make_cache(self, batch):
        return []

    def denoise(self, x, sigma, caption, cache, route="auto"):
        self.asked.append(sigma[0, 0].item())
        return self(x, sigma, caption)

    def commit(self, x, caption, cache, route="auto"):
        cache.append(x)


class Teacher(Oracle):
    """The same for the loss, where the model is given (clean, noisy, sigma, caption)."""

    def __call__(self, clean, noisy, sigma, caption, *_):
        self.sigma, self.caption = sigma, caption
        return super().__call__(noisy, sigma, caption)


shapes = dict(B=st.integers(1, 3), chunks=st.integers(1, 3), size=st.integers(1, 4), seed=seeds)


@forall(**shapes)
def test_the_loss_of_the_true_velocity_is_zero(code, B, chunks, size, seed):
    """(F1) and (F2): were one sign or the direction of sigma another, this loss would be of the order of the data."""
    x0 = Dice(seed).normal(B, 2 * chunks, 1, size, size)
    teacher, caption = Teacher(x0), torch.ones(B, 1, dtype=torch.long)
    draw = torch.Generator().manual_seed(seed)
    loss, sigma, by_frame = code.train.teacher_forcing_loss(teacher, x0, caption, code.train.Recipe(drop=0.0), draw)
    # The noise level is a float32: 1 - sigma is rounded at 6e-8, divided by a sigma of 1e-2 at the least, and squared.
    assert loss < 1e-10, f"(F1) x = (1 - sigma) x0 + sigma eps, (F2) v = eps - x0: the exact velocity has a loss of {loss:.2e}"
    assert by_frame.shape == sigma.shape == (B, 2 * chunks) and (0 < sigma).all() and (sigma < 1).all()
    assert torch.equal(teacher.sigma, sigma) and torch.equal(teacher.caption, caption), \
        "the model must be told the noise level and caption"
    first, second = sigma[:, 0::2], sigma[:, 1::2]
    assert torch.equal(first, second), "frames of one chunk share one noise level"
    assert chunks == 1 or (first[:, 0] != first[:, 1]).all(), "chunks have noise levels of their own"


@forall(drop=st.sampled_from([0.0, 1.0]), seed=seeds)
def test_captions_are_dropped_as_often_as_the_recipe_says(code, drop, seed):
    x0, caption = Dice(seed).normal(4, 2, 1, 2, 2), torch.ones(4, 3, dtype=torch.long)
    teacher = Teacher(x0)
    code.train.teacher_forcing_loss(teacher, x0, caption, code.train.Recipe(drop=drop), torch.Generator().manual_seed(seed))
    assert (teacher.caption == (0 if drop else 1)).all(), f"drop = {drop}: word 0 is 'none'"


@forall(steps=st.integers(1, 8), **shapes)
def test_the_sampler_follows_the_true_velocity_to_the_data(code, B, chunks, size, steps, seed):
    """(F3): all paths of this field are straight, so any number of Euler steps arrives exactly."""
    answer = Dice(seed).normal(B, 2, 1, size, size)
    model = Oracle(answer)
    for chunk in code.sample.rollout(model, torch.ones(B, 1, dtype=torch.long), 2 * chunks, steps=steps,
                                     generator=torch.Generator().manual_seed(seed)):
        assert_same(chunk, answer, EXACT, f"(F3) x' = x - (sigma - sigma') v in {steps} steps does not arrive at the data")
    assert len(model.asked) == steps * chunks and model.asked[0] == 1.0, "every chunk starts at sigma = 1, pure noise"
    assert all(a > b for a, b in zip(model.asked[:steps], model.asked[1:steps])), \
        f"sigma must fall from 1 to 0, went {model.asked[:steps]}"


@forall(u=st.floats(0, 1), k=st.floats(1, 10), seed=seeds)
def test_the_algebra_of_the_path(code, u, k, seed):
    sigma = code.sample.shift(u, k)
    assert u - 1e-12 <= sigma <= 1 + 1e-12 and abs(sigma / (k - (k - 1) * sigma) - u) < 1e-9, \
        "S_k has this inverse and never lowers the noise"
    dice = Dice(seed)
    x0, eps = dice.normal(2, 3, 1, 2, 2), dice.normal(2, 3, 1, 2, 2)
    level = torch.rand(2, 3, generator=dice.generator, dtype=torch.float64)
    x = code.sample.add_noise(x0, eps, level)
    assert_same(x - level[..., None, None, None] * (eps - x0), x0, EXACT, "(F4): x0 = x_sigma - sigma v")
    assert torch.equal(code.sample.add_noise(x0, eps, torch.zeros(2, 3)), x0), "(F1): sigma = 0 is clean"
    assert torch.equal(code.sample.add_noise(x0, eps, torch.ones(2, 3)), eps), "(F1): sigma = 1 is noise"


def test_the_released_step_list_is_the_shifted_one(code):
    assert [1000 * code.sample.shift(u, 5) for u in (1, 0.75, 0.5, 0.25)] == pytest.approx([1000, 937.5, 833.3333333333, 625], rel=1e-12)


# ---- rollouts of real models ----------------------------------------------------------------------------------------


def play(code, model, caption, chunks, seed=0, **how):
    how.setdefault("steps", 2)
    noise = torch.Generator().manual_seed(seed)
    return torch.cat(list(code.sample.rollout(model, caption, chunks * model.config.chunk, generator=noise, **how)), dim=1)


@forall(sizes=configs(min_chunks=2), chunks=st.integers(1, 5), B=st.integers(1, 2), seed=seeds)
def test_a_rollout_is_autoregressive_and_a_function_of_its_seed(code, sizes, chunks, B, seed):
    model, dice = a_model(code, sizes | {"window": sizes["frames"], "sink": 0}, seed)
    caption, n = a_clip(model, dice, B, 1)[2], model.config.chunk
    video = play(code, model, caption, chunks, seed)
    assert video.shape[1] == chunks * n and video.isfinite().all()
    assert torch.equal(play(code, model, caption, chunks, seed), video), "the same seed must give the same bits"
    assert not torch.equal(play(code, model, caption, chunks, seed + 1), video), "another seed gave the same video"
    # By hand: each chunk looks at the chunks that were made, not at nothing, and not at noisy versions of them.
    noise, cache, made = torch.Generator().manual_seed(seed), model.make_cache(B), []
    with torch.no_grad():
        for _ in range(chunks):
            x = torch.randn(B, n, *video.shape[2:], generator=noise).double()
            for now, then in ((1.0, code.sample.shift(0.5)), (code.sample.shift(0.5), 0.0)):
                x = x - (now - then) * model.denoise(x, x.new_full((B, n), now), caption, cache)
            model.commit(x, caption, cache)
            made.append(x)
    assert_same(video, torch.cat(made, 1), EXACT, "a rollout is: denoise a chunk against the past, commit it clean, go on")


@forall(sizes=configs(min_chunks=2), seed=seeds)
def test_the_first_chunks_noise_reaches_the_second_chunk(code, sizes, seed):
    model, dice = a_model(code, sizes | {"window": sizes["frames"], "sink": 0}, seed)
    caption, n = a_clip(model, dice, 1, 1)[2], model.config.chunk

    denoise, calls = model.denoise, []

    def other_start(*args):
        """Another first chunk (the first two calls, at two steps a chunk), and nothing else."""
        calls.append(1)
        return denoise(*args) + (len(calls) <= 2)
    same = play(code, model, caption, 2)
    model.denoise = other_start
    other = play(code, model, caption, 2)
    assert (other[:, :n] != same[:, :n]).any()
    assert (other[:, n:] - same[:, n:]).norm() > 1e-9 * same.norm(), \
        "another first chunk gave the same second one: not autoregressive"


@forall(sizes=configs(min_chunks=2), weight=st.sampled_from([0.0, 2.0, 3.5]), chunks=st.integers(2, 4), B=st.integers(1, 2), seed=seeds)
def test_guidance_keeps_two_caches(code, sizes, weight, chunks, B, seed):
    """v = v(none) + w (v(caption) - v(none)), where each side remembers the past under its own caption."""
    model, dice = a_model(code, sizes, seed)
    caption, n = 1 + dice.below(4, B, model.config.slots), model.config.chunk
    video = play(code, model, caption, chunks, seed, guidance=weight)
    noise, with_words, without, made = torch.Generator().manual_seed(seed), model.make_cache(B), model.make_cache(B), []
    none = torch.zeros_like(caption)
    with torch.no_grad():
        for _ in range(chunks):
            x = torch.randn(B, n, *video.shape[2:], generator=noise).double()
            for now, then in ((1.0, code.sample.shift(0.5)), (code.sample.shift(0.5), 0.0)):
                sigma = x.new_full((B, n), now)
                v, v_none = model.denoise(x, sigma, caption, with_words), model.denoise(x, sigma, none, without)
                x = x - (now - then) * ((1 - weight) * v_none + weight * v)
            model.commit(x, caption, with_words)
            model.commit(x, none, without)
            made.append(x)
    assert_same(video, torch.cat(made, 1), EXACT, f"guidance {weight}: two caches, v(none) + w (v(caption) - v(none))")


def test_memory_does_not_grow_with_the_video_and_streams_without_end(code):
    sizes = dict(attention="mla", dim=16, heads=2, rope=6, layers=1, latent=4, query_latent=4, ffn=4, channels=1, patch=1, height=2, width=2,
                 words=5, slots=1, frames=6, chunk=2, window=6, sink=1)
    model, _ = a_model(code, sizes, 0)
    caches, make = [], model.make_cache
    model.make_cache = lambda *args: caches.append(make(*args)) or caches[-1]
    video = code.sample.rollout(model, torch.ones(1, 1, dtype=torch.long), 0, steps=1, generator=torch.Generator().manual_seed(0))
    next(video)
    before = [(buffer.data_ptr(), buffer.nbytes) for buffer in caches[0].buffers]
    for _ in range(60):                                    # 120 frames: twenty times the horizon
        assert next(video).isfinite().all()
    assert [(buffer.data_ptr(), buffer.nbytes) for buffer in caches[0].buffers] == before, "the same buffers, the same bytes"
    assert caches[0].seen == 2 * 61, "every chunk that was yielded is committed, once"
    assert len(caches) == 1, "without guidance there is one cache"


@forall(sizes=configs(), seed=seeds)
def test_a_checkpoint_gives_back_its_weights_bit_for_bit(code, sizes, seed, tmp_path_factory):
    """Stored in half precision: what comes back is every weight rounded to half, and nothing else."""
    path = tmp_path_factory.mktemp("checkpoint") / "model.pt"
    model, _ = a_model(code, sizes, seed)
    code.checkpoint.save_model(path, model, data="shapes", steps=7)
    loaded, about = code.checkpoint.load_model(path)
    assert about == {"data": "shapes", "steps": 7} and loaded.config == model.config and not loaded.training
    assert list(loaded.state_dict()) == list(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.half().float()), f"{name} changed on its way through the file"
    again, _ = code.checkpoint.load_model(path)
    x, sigma, caption = a_clip(model, Dice(seed), 1, model.config.chunk)
    answers = [m.denoise(x.float(), sigma.float(), caption, m.make_cache(1)) for m in (loaded, again)]
    assert torch.equal(*answers), "two loads of one file must compute the same bits"
