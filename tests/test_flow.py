"""Flow matching has one direction of time and one sign, and a rollout is autoregressive.

Proved with a stand-in whose velocity field is known exactly: its loss is zero, and the sampler
leads from any noise to the data; so loss and sampler cannot disagree about sign or direction. And
on real models: a chunk depends on its predecessors' noise, guidance keeps two caches, a seed gives
the same bits, memory does not grow with the video, a checkpoint gives back its weights.
"""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import strategies as st

from lab import EXACT, Dice, a_clip, a_model, assert_same, configs, forall, seeds


class Oracle:
    """A model that knows the answer: its flow leads there, so v = (x - answer) / sigma."""

    def __init__(self, answer, chunk: int = 2):
        _, frames, channels, height, width = answer.shape
        self.config = SimpleNamespace(chunk=chunk, frames=frames, channels=channels,
                                      height=height, width=width, words=2)
        self.embed = SimpleNamespace(weight=answer)
        self.answer = answer
        self.asked = []                                    # the noise level of every pass

    def velocity(self, x, sigma):
        return (x - self.answer[:, :x.shape[1]]) / sigma[..., None, None, None]

    def make_cache(self, batch, dtype=None, device=None):
        return []

    def denoise(self, x, sigma, caption, cache, attend=None):
        self.asked.append(sigma[0, 0].item())
        return self.velocity(x, sigma)

    def commit(self, x, caption, cache, attend=None, detach=True):
        cache.append(x)


class Teacher(Oracle):
    """The same for the loss, where the model is given (clean, noisy, sigma, caption)."""

    def __call__(self, clean, noisy, sigma, caption, attend=None):
        self.sigma = sigma
        self.caption = caption
        return self.velocity(noisy, sigma)


def a_generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draws(code, seed: int):
    return code.flow.Draws(a_generator(seed))


shapes = dict(B=st.integers(1, 3), chunks=st.integers(1, 3), size=st.integers(1, 4), seed=seeds)


# ---- the path --------------------------------------------------------------------------------


@forall(**shapes)
def test_the_loss_of_the_true_velocity_is_zero(code, B, chunks, size, seed):
    """(F1) and (F2): were one sign or the direction of sigma another, this loss would be of the
    order of the data."""
    x0 = Dice(seed).normal(B, 2 * chunks, 1, size, size)
    teacher = Teacher(x0)
    caption = torch.ones(B, 1, dtype=torch.long)
    loss, sigma, by_frame = code.objectives.teacher_forcing_loss(
        teacher, x0, caption, draws(code, seed), drop=0.0)
    # The noise level is a float32: 1 - sigma is rounded at 6e-8, divided by a sigma of 1e-2 at
    # the least, and squared.
    assert loss < 1e-10, (f"(F1) x = (1 - sigma) x0 + sigma eps, (F2) v = eps - x0: "
                          f"the exact velocity has a loss of {loss:.2e}")
    assert by_frame.shape == sigma.shape == (B, 2 * chunks)
    assert (0 < sigma).all() and (sigma < 1).all()
    assert torch.equal(teacher.sigma, sigma), "the model must be told the noise level"
    assert torch.equal(teacher.caption, caption), "the model must be told the caption"
    first = sigma[:, 0::2]
    second = sigma[:, 1::2]
    assert torch.equal(first, second), "frames of one chunk share one noise level"
    if chunks > 1:
        assert (first[:, 0] != first[:, 1]).all(), "chunks have noise levels of their own"


@forall(drop=st.sampled_from([0.0, 1.0]), seed=seeds)
def test_captions_are_dropped_as_often_as_the_recipe_says(code, drop, seed):
    x0 = Dice(seed).normal(4, 2, 1, 2, 2)
    teacher = Teacher(x0)
    caption = torch.ones(4, 3, dtype=torch.long)
    code.objectives.teacher_forcing_loss(teacher, x0, caption, draws(code, seed), drop=drop)
    told = 1 - int(drop)
    assert (teacher.caption == told).all(), f"drop = {drop}: word 0 is 'none'"


@forall(rows=st.integers(2, 4), width=st.integers(1, 3), seed=seeds)
def test_a_caption_of_rows_is_dropped_as_a_whole(code, rows, width, seed):
    """A text encoder's rows: all of a video's, or none; and the same videos as of words."""
    kept = {}
    for what, shape in {"words": (32, rows), "rows": (32, rows, width)}.items():
        caption = torch.ones(shape)
        made = code.objectives.without_some(caption, 0.5, draws(code, seed))
        assert made.shape == caption.shape
        told = made.flatten(1)
        assert (told == told[:, :1]).all(), f"{what} of a caption were dropped apart"
        kept[what] = told[:, 0]
    assert torch.equal(kept["words"], kept["rows"])
    assert 0 < kept["rows"].sum() < 32


@forall(steps=st.integers(1, 8), **shapes)
def test_the_sampler_follows_the_true_velocity_to_the_data(code, B, chunks, size, steps, seed):
    """(F3): all paths of this field are straight, so any number of Euler steps arrives."""
    answer = Dice(seed).normal(B, 2, 1, size, size)
    model = Oracle(answer)
    stream = code.flow.Stream(model, torch.ones(B, 1, dtype=torch.long))
    made = list(code.flow.rollout(stream, 2 * chunks, draws(code, seed), steps=steps))
    for chunk in made:
        assert_same(chunk, answer, EXACT,
                    f"(F3) x' = x - (sigma - sigma') v in {steps} steps misses the data")
    assert len(made) == chunks
    assert len(model.asked) == steps * chunks
    assert model.asked[0] == 1.0, "every chunk starts at sigma = 1, pure noise"
    falling = model.asked[:steps]
    assert falling == sorted(set(falling), reverse=True), \
        f"sigma must fall from 1 to 0, went {falling}"


@forall(u=st.floats(0, 1), k=st.floats(1, 10), seed=seeds)
def test_the_algebra_of_the_path(code, u, k, seed):
    sigma = code.flow.shift(u, k)
    assert u - 1e-12 <= sigma <= 1 + 1e-12, "S_k never lowers the noise"
    assert abs(sigma / (k - (k - 1) * sigma) - u) < 1e-9, "S_k has this inverse"
    dice = Dice(seed)
    x0 = dice.normal(2, 3, 1, 2, 2)
    eps = dice.normal(2, 3, 1, 2, 2)
    level = torch.rand(2, 3, generator=dice.generator, dtype=torch.float64)
    x = code.flow.add_noise(x0, eps, level)
    answer = x - level[..., None, None, None] * (eps - x0)
    assert_same(answer, x0, EXACT, "(F4): x0 = x_sigma - sigma v")
    clean = code.flow.add_noise(x0, eps, torch.zeros(2, 3))
    noise = code.flow.add_noise(x0, eps, torch.ones(2, 3))
    assert torch.equal(clean, x0), "(F1): sigma = 0 is clean"
    assert torch.equal(noise, eps), "(F1): sigma = 1 is noise"


def test_the_released_step_list_is_the_shifted_one(code):
    levels = [1000 * code.flow.shift(u, 5) for u in (1, 0.75, 0.5, 0.25)]
    assert levels == pytest.approx([1000, 937.5, 833.3333333333, 625], rel=1e-12)


any_shape = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@forall(shape=any_shape, top=st.integers(1, 50), seed=seeds)
def test_draws_are_the_generators_own_numbers(code, shape, top, seed):
    """Normal is normal, uniform is uniform in [0, 1), integers lie below their top: one after
    the other, from the one generator that was given."""
    mine = draws(code, seed)
    generator = a_generator(seed)
    for _ in range(2):
        assert torch.equal(mine.normal(*shape), torch.randn(shape, generator=generator))
        assert torch.equal(mine.uniform(*shape), torch.rand(shape, generator=generator))
        wanted = torch.randint(top, shape, generator=generator)
        assert torch.equal(mine.integers(top, *shape), wanted)


# ---- rollouts of real models -----------------------------------------------------------------


def play(code, model, caption, chunks, seed=0, steps=2, sampler=None, guidance=1.0,
         switch=None):
    """A whole video. `switch` maps a chunk's number to the caption from there on."""
    stream = code.flow.Stream(model, caption)
    if guidance != 1:
        plain = code.flow.Stream(model, torch.zeros_like(caption))
        stream = code.flow.GuidedStream(stream, plain, guidance)
    sampler = sampler or code.flow.euler
    frames = chunks * model.config.chunk
    video = code.flow.rollout(stream, frames, draws(code, seed), sampler=sampler, steps=steps)
    made = []
    for number in range(chunks):
        stream.caption = (switch or {}).get(number, stream.caption)
        made.append(next(video))
    return torch.cat(made, dim=1)


def two_euler_steps(code, velocity, x):
    """(F3) by hand, from sigma = 1 over S(1/2) to 0."""
    half = code.flow.shift(0.5)
    x = x - (1.0 - half) * velocity(x, x.new_full(x.shape[:2], 1.0))
    return x - half * velocity(x, x.new_full(x.shape[:2], half))


def a_forgetless_model(code, sizes, seed):
    """Its window is the whole clip, so every chunk sees all chunks before it."""
    return a_model(code, sizes | {"window": sizes["frames"], "sink": 0}, seed)


@forall(sizes=configs(min_chunks=2), chunks=st.integers(1, 5), B=st.integers(1, 2), seed=seeds)
def test_a_rollout_is_autoregressive_and_a_function_of_its_seed(code, sizes, chunks, B, seed):
    model, dice = a_forgetless_model(code, sizes, seed)
    caption = a_clip(model, dice, B, 1)[2]
    n = model.config.chunk
    video = play(code, model, caption, chunks, seed)
    assert video.shape[1] == chunks * n and video.isfinite().all()
    again = play(code, model, caption, chunks, seed)
    other = play(code, model, caption, chunks, seed + 1)
    assert torch.equal(again, video), "the same seed must give the same bits"
    assert not torch.equal(other, video), "another seed gave the same video"
    # By hand: each chunk looks at the chunks that were made, not at nothing, and not at noisy
    # versions of them.
    noise = a_generator(seed)
    cache = model.make_cache(B)
    made = []

    def velocity(x, sigma):
        return model.denoise(x, sigma, caption, cache)
    with torch.no_grad():
        for _ in range(chunks):
            start = torch.randn(B, n, *video.shape[2:], generator=noise).double()
            x = two_euler_steps(code, velocity, start)
            model.commit(x, caption, cache)
            made.append(x)
    assert_same(video, torch.cat(made, 1), EXACT,
                "a rollout is: denoise a chunk against the past, commit it clean, go on")


@forall(sizes=configs(min_chunks=2), seed=seeds)
def test_the_first_chunks_noise_reaches_the_second_chunk(code, sizes, seed):
    model, dice = a_forgetless_model(code, sizes, seed)
    caption = a_clip(model, dice, 1, 1)[2]
    n = model.config.chunk
    denoise = model.denoise
    calls = []

    def other_start(*args, **how):
        """Another first chunk (the first two calls, at two steps a chunk), and nothing else."""
        calls.append(1)
        return denoise(*args, **how) + (len(calls) <= 2)
    same = play(code, model, caption, 2)
    model.denoise = other_start
    other = play(code, model, caption, 2)
    assert (other[:, :n] != same[:, :n]).any()
    assert (other[:, n:] - same[:, n:]).norm() > 1e-9 * same.norm(), \
        "another first chunk gave the same second one: not autoregressive"


@forall(sizes=configs(min_chunks=2), weight=st.sampled_from([0.0, 2.0, 3.5]),
        chunks=st.integers(2, 4), B=st.integers(1, 2), seed=seeds)
def test_guidance_keeps_two_caches(code, sizes, weight, chunks, B, seed):
    """v = v(none) + w (v(caption) - v(none)): each side has a past under its own caption."""
    model, dice = a_model(code, sizes, seed)
    caption = 1 + dice.below(4, B, model.config.slots)
    none = torch.zeros_like(caption)
    video = play(code, model, caption, chunks, seed, guidance=weight)
    noise = a_generator(seed)
    n = model.config.chunk
    with_words = model.make_cache(B)
    without = model.make_cache(B)
    made = []

    def velocity(x, sigma):
        v = model.denoise(x, sigma, caption, with_words)
        v_none = model.denoise(x, sigma, none, without)
        return (1 - weight) * v_none + weight * v
    with torch.no_grad():
        for _ in range(chunks):
            start = torch.randn(B, n, *video.shape[2:], generator=noise).double()
            x = two_euler_steps(code, velocity, start)
            model.commit(x, caption, with_words)
            model.commit(x, none, without)
            made.append(x)
    assert_same(video, torch.cat(made, 1), EXACT,
                f"guidance {weight}: two caches, v(none) + w (v(caption) - v(none))")


def test_guidance_with_one_cache_is_refused(code):
    """Half of the past cannot be shared: it means something else under another caption."""
    model = Oracle(torch.zeros(1, 2, 1, 2, 2))
    stream = code.flow.Stream(model, torch.ones(1, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="guidance needs two caches"):
        code.flow.GuidedStream(stream, stream, 2.0)


@forall(sizes=configs(min_chunks=2), weight=st.sampled_from([1.0, 2.0]), seed=seeds)
def test_a_caption_changes_with_the_chunk_that_it_is_given_for(code, sizes, weight, seed):
    model, _ = a_forgetless_model(code, sizes, seed)
    n = model.config.chunk
    first = torch.full((1, model.config.slots), 1)
    second = torch.full((1, model.config.slots), 2)
    how = dict(seed=seed, guidance=weight)
    plain = play(code, model, first, 2, **how)
    switched = play(code, model, first, 2, **how, switch={1: second})
    assert torch.equal(switched[:, :n], plain[:, :n]), "before the switch nothing changes"
    assert (switched[:, n:] != plain[:, n:]).any(), \
        "the chunk that begins at the switch has the new caption"
    from_the_start = play(code, model, first, 2, **how, switch={0: second})
    assert torch.equal(from_the_start, play(code, model, second, 2, **how))


def test_memory_does_not_grow_with_the_video_and_streams_without_end(code):
    sizes = dict(attention="mla", dim=16, heads=2, rope=6, layers=1, latent=4, query_latent=4,
                 ffn=4, channels=1, patch=1, height=2, width=2, words=5, slots=1, frames=6,
                 chunk=2, window=6, sink=1)
    model, _ = a_model(code, sizes, 0)
    make_cache = model.make_cache
    caches = []

    def counted(*args, **how):
        caches.append(make_cache(*args, **how))
        return caches[-1]
    model.make_cache = counted
    stream = code.flow.Stream(model, torch.ones(1, 1, dtype=torch.long))
    video = code.flow.rollout(stream, 0, draws(code, 0), steps=1)
    next(video)
    before = [(buffer.data_ptr(), buffer.nbytes) for buffer in stream.cache.buffers]
    for _ in range(60):                                # 120 frames: twenty times the horizon
        assert next(video).isfinite().all()
    after = [(buffer.data_ptr(), buffer.nbytes) for buffer in stream.cache.buffers]
    assert after == before, "the same buffers, the same bytes"
    assert stream.cache.seen == 2 * 61, "every chunk that was yielded is committed, once"
    assert len(caches) == 1, "without guidance there is one cache"


@forall(sizes=configs(), seed=seeds)
def test_a_checkpoint_gives_back_its_weights_bit_for_bit(code, sizes, seed, tmp_path_factory):
    """Stored in half precision: what comes back is every weight, rounded to half."""
    path = tmp_path_factory.mktemp("checkpoint") / "model.pt"
    model, _ = a_model(code, sizes, seed)
    code.checkpoint.save_model(path, model, data="shapes", steps=7)
    loaded, about = code.checkpoint.load_model(path)
    again, _ = code.checkpoint.load_model(path)
    assert about == {"data": "shapes", "steps": 7}
    assert loaded.config == model.config and not loaded.training
    assert list(loaded.state_dict()) == list(model.state_dict())
    for name, value in model.state_dict().items():
        rounded = value.half().float()
        assert torch.equal(loaded.state_dict()[name], rounded), f"{name} changed in the file"
    x, sigma, caption = a_clip(model, Dice(seed), 1, model.config.chunk)
    first = loaded.denoise(x.float(), sigma.float(), caption, loaded.make_cache(1))
    second = again.denoise(x.float(), sigma.float(), caption, again.make_cache(1))
    assert torch.equal(first, second), "two loads of one file must compute the same bits"


# ---- a video and its neighbours --------------------------------------------------------------


def video_alone(code, model, caption, which: int, seed: int, weight: float, chunks: int):
    """Video `which` of a batch, as it is made when the other captions are changed and reordered
    around it, or left out after it."""
    others = (caption + 1) % model.config.words
    batch = others[:which + 1].clone()
    batch[which] = caption[which]
    return made_with(code, model, batch, seed, weight, chunks)[which]


def made_with(code, model, caption, seed: int, weight: float, chunks: int):
    stream = code.flow.Stream(model, caption)
    if weight != 1:
        plain = code.flow.Stream(model, torch.zeros_like(caption))
        stream = code.flow.GuidedStream(stream, plain, weight)
    draws = code.flow.VideoDraws(seed, len(caption))
    frames = chunks * model.config.chunk
    how = dict(sampler=code.flow.consistency, steps=3)
    return torch.cat(list(code.flow.rollout(stream, frames, draws, **how)), dim=1)


@forall(sizes=configs(min_chunks=2), chunks=st.integers(1, 3), B=st.integers(2, 4),
        weight=st.sampled_from([1.0, 2.0]), seed=seeds)
def test_a_video_depends_on_its_own_caption_and_number_alone(code, sizes, chunks, B, weight, seed):
    model, dice = a_model(code, sizes, seed)
    caption = dice.below(model.config.words, B, model.config.slots)
    together = made_with(code, model, caption, seed, weight, chunks)
    for which in range(B):
        alone = video_alone(code, model, caption, which, seed, weight, chunks)
        assert_same(alone, together[which], EXACT,
                    f"video {which} of {B} changes with the videos beside it")
    assert not torch.equal(together[0], together[1]), "each video has noise of its own"


@forall(seed=seeds, videos=st.integers(1, 5))
def test_the_draws_of_a_video_are_the_same_in_any_company(code, seed, videos):
    few = code.flow.VideoDraws(seed, videos)
    many = code.flow.VideoDraws(seed, videos + 3)
    for _ in range(2):
        assert torch.equal(few.normal(videos, 2, 3), many.normal(videos + 3, 2, 3)[:videos])
        assert torch.equal(few.uniform(videos, 4), many.uniform(videos + 3, 4)[:videos])
        assert torch.equal(few.integers(9, videos, 2), many.integers(9, videos + 3, 2)[:videos])
    numbers = many.normal(videos + 3, 50)
    assert len(numbers[:, 0].unique()) == videos + 3, "no two videos share their noise"
    with pytest.raises(ValueError, match=f"are for {videos} videos, not {videos + 1}"):
        few.normal(videos + 1, 2)


# ---- what a program that calls the library is told -------------------------------------------


def test_what_cannot_be_is_refused_in_words(code):
    flow = code.flow
    model = code.mla_video.VideoDiT(code.mla_video.Config())
    caption = torch.zeros(2, 3, dtype=torch.long)
    stream = flow.Stream(model, caption)
    draws = flow.VideoDraws(0, 2)
    x, cache = torch.zeros(2, 3, 3, 16, 16), model.make_cache(2)
    wrong = {
        "takes at least 1 step, got 0": lambda: next(flow.rollout(stream, 3, draws, steps=0)),
        "frames must be 0": lambda: next(flow.rollout(stream, -3, draws)),
        "must be a number, got nan": lambda: flow.GuidedStream(
            stream, flow.Stream(model, caption), float("nan")),
        "ids of words": lambda: flow.Stream(model, caption + model.config.words),
        "ids of words in": lambda: flow.Stream(model, caption - 1),
        "a noise level for each frame": lambda: model.denoise(x, torch.ones(2), caption, cache),
        "a caption is 3 words for each of 2": lambda: model.denoise(
            x, torch.ones(2, 3), caption[:, :2], cache),
        "makes 2 videos, and there are 1": lambda: setattr(stream, "caption", caption[:1]),
    }
    for words, call in wrong.items():
        with pytest.raises(ValueError, match=words):
            call()


# ---- half precision --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_half_precision_model_streams_and_is_told_exact_levels(code, dtype):
    """Scores of the shipped model pass float16's largest number unless queries are scaled first;
    and 0.8333 must reach the model as such, whatever its dtype."""
    from lab import ROOT
    model, _ = code.checkpoint.load_model(ROOT / "checkpoints/toy.pt")
    caption = torch.tensor([[1, 8, 18], [3, 9, 19]])
    exact = made_with(code, model, caption, 0, 1.0, 4)
    told = []
    low = model.to(dtype)
    denoise = low.denoise

    def watched(x, sigma, *rest):
        told.append(sigma)
        return denoise(x, sigma, *rest)

    low.denoise = watched
    video = made_with(code, low, caption, 0, 1.0, 4)
    assert video.dtype == dtype and video.isfinite().all(), "not a number: scores overflowed?"
    assert (video - exact).abs().mean() < 0.05, "a half precision video is another video"
    levels = {float(sigma[0, 0]) for sigma in told}
    wanted = {torch.tensor(level).item() for level in code.flow.noise_levels(3, 5.0)[:-1]}
    assert levels == wanted, f"levels {levels} are not {wanted} in float32"
