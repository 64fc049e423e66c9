"""Making a video chunk by chunk from a cache is the same computation as one masked pass over
the whole clip.

Proved here, for both kinds of attention and any grid, chunk, window and sink: teacher forcing
equals cached inference after clean commits; the mask is the table of oracles.py cell by cell;
what a frame depends on is exactly what mask and depth allow, read from gradients that are
exactly zero (no future, no leaked answer); what nobody asks for is not computed, and changes
nothing; every attention layer inside the model is the paper's equations; videos of a batch do
not mix; dtype and device are kept; patches go back where they came from; caption and noise
level count.
"""

import functools

import numpy as np
import pytest
import torch
from hypothesis import example
from hypothesis import strategies as st

import oracles
from lab import (CPU_ROUTES, EXACT, Dice, a_clip, a_model, assert_alive, assert_same,
                 assert_zero, configs, enliven, forall, numbers, route, seeds, weights)

# Token counts that are multiples of 128: released code slices off "[-0:]" of padding there, and
# is left with nothing.
EVEN = dict(attention="mla", dim=16, heads=2, rope=6, layers=2, latent=4, query_latent=8,
            ffn=8, channels=1, patch=1, height=8, width=8, words=5, slots=2, frames=4, chunk=2,
            window=4, sink=0, norm=True)
ROLLING = EVEN | dict(attention="dense", frames=8, window=6, sink=1, chunk=2)


@torch.no_grad()
def stream(model, clean, noisy, sigma, caption):
    """Every chunk of `noisy` denoised once, each on a cache of the clean chunks before it."""
    chunk = model.config.chunk
    cache = model.make_cache(len(clean))
    answers = []
    for start in range(0, clean.shape[1], chunk):
        now = slice(start, start + chunk)
        answers.append(model.denoise(noisy[:, now], sigma[:, now], caption, cache))
        model.commit(clean[:, now], caption, cache)
    return torch.cat(answers, dim=1)


def a_lesson(code, sizes, B, seed):
    """A model and what teacher forcing takes: clean and noisy clip, noise levels, caption."""
    model, dice = a_model(code, sizes, seed)
    clean, sigma, caption = a_clip(model, dice, B, model.config.frames)
    noisy = dice.normal(*clean.shape)
    return model, clean, noisy, sigma, caption


def only(video: int, lesson) -> list:
    """The lesson of one video of the batch."""
    return [part[video:video + 1] for part in lesson]


# ---- the central theorem --------------------------------------------------------------------


@forall(sizes=configs(), B=st.integers(1, 2), name=st.sampled_from(CPU_ROUTES), seed=seeds)
@example(sizes=EVEN, B=1, name="materialised", seed=0)
@example(sizes=ROLLING, B=2, name="reference", seed=1)
def test_teacher_forcing_is_streaming(code, sizes, B, name, seed):
    model, *lesson = a_lesson(code, sizes, B, seed)
    whole = model(*lesson, attend=route(code, name))
    assert_same(stream(model, *lesson), whole, EXACT,
                "one masked pass and cached inference disagree. Clean half at sigma 0? same "
                "positions for both halves? strict < in the mask? commit at sigma 0, with the "
                "clean chunk? the same window on both sides?")
    assert_same(model(*lesson), whole, EXACT, f"the default route and {name} disagree")


@forall(sizes=configs(min_chunks=2), seed=seeds)
def test_teacher_forcing_is_streaming_in_float32_too(code, sizes, seed):
    model, clean, noisy, sigma, caption = a_lesson(code, sizes, 1, seed)
    model = model.float()
    lesson = clean.float(), noisy.float(), sigma.float(), caption
    # float32 rounds at 6e-8; a few layers of it add up to 1e-6 in the worst example seen.
    assert_same(stream(model, *lesson), model(*lesson), 1e-5,
                "float32: one masked pass and cached inference disagree")


# ---- the mask -------------------------------------------------------------------------------


def frame_mask(code, config):
    """`allowed` over [clean frames | noisy frames] of a clip."""
    frame = torch.arange(config.frames).repeat(2)
    noisy = torch.arange(2 * config.frames) >= config.frames
    allowed = code.mla_video.allowed
    return allowed(frame[:, None], noisy[:, None], frame[None], noisy[None], config)


def table(config) -> np.ndarray:
    """The same mask, cell by cell."""
    F = config.frames
    rule = dict(chunk=config.chunk, window=config.window, sink=config.sink)
    may = np.zeros((2 * F, 2 * F), bool)
    for q in range(2 * F):
        for k in range(2 * F):
            may[q, k] = oracles.may_look(q % F, q >= F, k % F, k >= F, **rule)
    return may


def token_table(config) -> np.ndarray:
    """The same, for tokens instead of frames."""
    return table(config).repeat(config.tokens, 0).repeat(config.tokens, 1)


def named_frame(index: int, frames: int) -> str:
    half = "noisy" if index >= frames else "clean"
    return f"{half} {index % frames}"


@forall(sizes=configs())
def test_the_mask_is_the_table(code, sizes):
    config = code.mla_video.Config(**sizes)
    got = frame_mask(code, config).numpy()
    wrong = []
    for q, k in np.argwhere(got != table(config)):
        query = named_frame(q, config.frames)
        key = named_frame(k, config.frames)
        wrong.append((query, key, bool(got[q, k])))
    assert not wrong, \
        f"(query frame, key frame, may look) differ from the table, chunk {config.chunk}, " \
        f"window {config.window}, sink {config.sink}: {wrong[:4]}"


# ---- what depends on what -------------------------------------------------------------------


@forall(sizes=configs(min_chunks=2), seed=seeds)
def test_a_frame_depends_on_what_mask_and_depth_allow_and_on_nothing_else(code, sizes, seed):
    """n layers let information take n steps of the mask: gradients are non-zero exactly there.
    No future, and not its own answer."""
    model, clean, noisy, sigma, caption = a_lesson(code, sizes, 1, seed)
    c = model.config
    v = model(clean.requires_grad_(), noisy.requires_grad_(), sigma, caption)
    steps = np.linalg.matrix_power(table(c).astype(np.int64), c.layers)
    reach = steps > 0                              # [query frame, key frame] of [clean | noisy]
    for start in range(0, c.frames, c.chunk):
        end = start + c.chunk
        answer = v[:, start:end]
        pull = Dice(seed + start).normal(*answer.shape)
        loss = (answer * pull).sum()
        of_clean, of_noisy = torch.autograd.grad(loss, (clean, noisy), retain_graph=True)
        assert_zero(of_clean[:, start:],
                    f"chunk at frame {start} sees its own answer or a clean future (leak)")
        assert_zero(of_noisy[:, end:],
                    f"chunk at frame {start} sees the noisy future (not causal)")
        assert_zero(of_noisy[:, :start], f"chunk at frame {start} sees another chunk's noise")
        gradient = torch.cat((of_clean, of_noisy), 1)
        got = gradient.flatten(2).any(-1)[0].numpy()       # [2 F]
        allowed = reach[c.frames + start]
        assert (got == allowed).all(), \
            f"noisy frame {start} depends on frames {np.flatnonzero(got)} of " \
            f"[clean | noisy], the mask allows {np.flatnonzero(allowed)}"


@forall(sizes=configs(), chunks=st.integers(1, 3), seed=seeds)
def test_videos_of_a_batch_do_not_mix(code, sizes, chunks, seed):
    model, *lesson = a_lesson(code, sizes, 3, seed)
    clean, noisy, sigma, caption = lesson
    v = model(clean.requires_grad_(), noisy.requires_grad_(), sigma, caption)
    loss_of_one = v[1].square().sum()
    for gradient in torch.autograd.grad(loss_of_one, (clean, noisy)):
        assert_zero(gradient[[0, 2]],
                    "the answer for one video depends on another video of the batch")
    lesson = [part.detach() for part in lesson]
    alone = only(1, lesson)
    assert_same(model(*alone), v[1:2], EXACT, "a video alone and in a batch")
    assert_same(stream(model, *alone), stream(model, *lesson)[1:2], EXACT,
                "a video streamed alone and in a batch")


@forall(sizes=configs(), seed=seeds)
def test_caption_and_noise_level_count(code, sizes, seed):
    model, clean, noisy, sigma, caption = a_lesson(code, sizes, 1, seed)
    v = model(clean, noisy, sigma, caption)
    other_caption = (caption + 1) % 5
    change = model(clean, noisy, sigma, other_caption) - v
    assert change.norm() > 1e-6 * v.norm(), "another caption changed nothing: it is ignored"

    other_sigma = sigma.clone()
    other_sigma[:, -1] += 0.1
    change = model(clean, noisy, other_sigma, caption) - v
    change = change.flatten(2).norm(dim=-1)[0]             # [F]
    assert change[-1] > 1e-6 * v[:, -1].norm(), \
        "another noise level of a frame changed nothing for that frame"
    assert_zero(change[:-model.config.chunk],
                "the noise level of the last chunk reached earlier chunks")


# ---- what nobody asks for -------------------------------------------------------------------


class AskEverybody(torch.nn.Module):
    """A block in which every frame asks; what nobody wanted is thrown away afterwards."""

    def __init__(self, block):
        super().__init__()
        self.block = block
        self.attention = block.attention

    def forward(self, *args, answer_from: int = 0, **rest):
        x, rows = self.block(*args, **rest)
        return x[:, answer_from:], rows


@forall(sizes=configs(), B=st.integers(1, 2), seed=seeds)
def test_the_answer_is_the_second_half_of_everybodys(code, sizes, B, seed):
    """The last block of teacher forcing answers the noisy half alone."""
    model, *lesson = a_lesson(code, sizes, B, seed)
    answer = model(*lesson)
    model.blocks[-1] = AskEverybody(model.blocks[-1])
    assert_same(answer, model(*lesson), EXACT,
                "frames that are only looked at changed the answer of those that ask")


@forall(sizes=configs(), B=st.integers(1, 2), masked=st.booleans(), data=st.data(), seed=seeds)
def test_a_block_answers_the_frames_that_ask_and_leaves_rows_of_all(
        code, sizes, B, masked, data, seed):
    model, dice = a_model(code, sizes, seed)
    c = model.config
    answer_from = data.draw(st.integers(0, c.frames - 1))
    x = dice.normal(B, c.frames, c.tokens, c.dim)
    level = dice.normal(B, c.frames, 6, c.dim)
    words = dice.normal(B, c.slots, c.dim)
    at = torch.tensor(oracles.all_places(c.frames, c.height // c.patch, c.width // c.patch))
    turn = c.make_rope().table(at, torch.float64)
    L = len(at)
    call = functools.partial(model.blocks[0], x, level, words, turn, turn,
                             mask=dice.mask(L, L) if masked else None)
    everybodys, rows = call()
    answer, rows_again = call(answer_from=answer_from)
    assert_same(answer, everybodys[:, answer_from:], EXACT,
                f"frames from {answer_from} on asked, and were not answered as among all")
    for got, want in zip(rows_again, rows):
        assert torch.equal(got, want), "a frame that does not ask leaves its rows all the same"


@forall(sizes=configs(), seed=seeds)
def test_what_nobody_asks_for_is_not_computed(code, sizes, seed):
    """The clean half of the last block: rows, and neither attention nor caption nor FFN."""
    model, *lesson = a_lesson(code, sizes, 1, seed)
    c = model.config
    computed = []

    def note(module, args, out):
        tokens = args[0].flatten(0, -2)                    # [tokens, E]
        computed.append(len(tokens))

    for block in model.blocks:
        for part in (block.attention, block.caption, block.ffn):
            part.register_forward_hook(note)
    model(*lesson)
    one_half = c.frames * c.tokens
    want = [2 * one_half] * 3 * (c.layers - 1) + [one_half] * 3
    assert computed == want, \
        f"attention, caption and FFN of the blocks were computed for {computed} tokens, " \
        f"should for {want}"


# ---- inside ---------------------------------------------------------------------------------


def watch_attention(model) -> list:
    """Of every attention layer, from the next call on: [layer, tokens that leave rows, tokens
    that ask, answers], in the order of the call."""
    seen = []

    def watch(layer):
        make_rows = layer.rows

        def rows(h):
            seen.append([layer, h])
            return make_rows(h)

        layer.rows = rows
        layer.register_forward_hook(lambda layer, args, y: seen[-1].extend((args[0], y)))

    for block in model.blocks:
        watch(block.attention)
    return seen


@forall(sizes=configs(), seed=seeds)
def test_every_layer_inside_the_model_is_the_papers_equations(code, sizes, seed):
    """What goes into and comes out of each attention layer during a teacher-forced pass,
    against numpy: positions, mask and all."""
    model, *lesson = a_lesson(code, sizes, 1, seed)
    c = model.config
    seen = watch_attention(model)
    model(*lesson)
    one_half = oracles.all_places(c.frames, c.height // c.patch, c.width // c.patch)
    at = np.array(one_half + one_half)          # clean and noisy frames stand at the same times
    visible = token_table(c)
    head = c.dim // c.heads
    for i, (layer, h, x, y) in enumerate(seen):
        L = x.shape[1]                             # the last block asks for the noisy half only
        places = dict(heads=c.heads, x_at=at[-L:], keys_at=at, visible=visible[-L:])
        if c.attention == "mla":
            places |= dict(head=head, scale=head ** -0.5)
        oracle = getattr(oracles, c.attention)
        want, p = oracle(numbers(x[0]), numbers(h[0]), weights(layer), **places)
        assert_alive(p, visible[-L:])
        assert_same(y[0], want, EXACT,
                    f"attention layer {i} of the model is not equations (1)-(8) at the right "
                    f"positions and mask")


@forall(sizes=configs(), seed=seeds)
def test_the_whole_network_is_a_page_of_numpy(code, sizes, seed):
    """Modulation, gates, norms, caption, FFN, head: nothing in between that the paper's block
    does not have. (The sinusoids are taken as they come, in float32;
    test_sigma_0_is_clean_and_sigma_1_is_noise looks at them.)"""
    model, clean, noisy, sigma, caption = a_lesson(code, sizes, 1, seed)
    c = model.config
    sinusoids = []
    model.time.register_forward_pre_hook(lambda module, args: sinusoids.append(args[0]))
    v = model(clean, noisy, sigma, caption)

    W = {name: numbers(value) for name, value in model.state_dict().items()}
    video = numbers(torch.cat((clean, noisy), 1))[0]
    times = [*range(c.frames)] * 2
    features = numbers(sinusoids[0])[0]
    want = oracles.video_dit(W, video, times, features, caption[0].numpy(), token_table(c), c)
    assert_same(v[0], want[c.frames:], EXACT,
                "the network is not oracles.video_dit: offset, scale and gate in order? "
                "pre-norms? caption unmasked?")


@forall(sizes=configs(attention=("mla",)))
def test_weights_have_the_papers_sizes(code, sizes):
    config = code.mla_video.Config(**sizes)
    E = config.dim
    H = config.heads
    C = config.latent
    Q = config.query_latent
    R = config.rope
    d = E // H
    N = d - R
    want = dict(
        W_DKV=(C, E),
        W_KR=(R, E),
        W_DQ=(Q, E),
        W_UQ=(H * N, Q),
        W_QR=(H * R, Q),
        W_UK=(H * N, C),
        W_UV=(H * d, C),
        W_O=(E, H * d))
    if config.norm:
        want |= dict(norm_kv=(C,), norm_q=(Q,))
    for block in code.mla_video.VideoDiT(config).blocks:
        got = {name: w.shape for name, w in weights(block.attention).items()}
        assert got == want, f"(1)-(5): N = d_h - R = {N}, V = d_h = {d}; R, one key for all " \
                            f"heads; Q, C shared: got {got}"


@forall(sizes=configs(), B=st.integers(1, 2), seed=seeds)
def test_patches_go_back_where_they_came_from(code, sizes, B, seed):
    """Feed what the embedding was given to the output as if it were what the head said: the
    picture must come back, bit for bit."""
    model, dice = a_model(code, sizes, seed)
    x, sigma, caption = a_clip(model, dice, B, model.config.chunk)
    given = []
    model.embed.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    model.head.register_forward_hook(lambda module, args, out: given[-1])
    got = model.denoise(x, sigma, caption, model.make_cache(B))
    assert torch.equal(got, x), "un-patchify scrambles what patchify cut"

    p = model.config.patch
    columns = model.config.width // p
    right_end_of_first_row = x[:, :, :, :p, -p:].flatten(2)
    assert torch.equal(given[0][:, :, columns - 1], right_end_of_first_row), \
        "token number w - 1 must be the patch at the right end of the first row"


@forall(sizes=configs(), seed=seeds)
def test_a_new_model_is_silent_until_it_learns(code, sizes, seed):
    torch.manual_seed(seed)
    model = code.mla_video.VideoDiT(code.mla_video.Config(**sizes)).double()
    c = model.config
    x, sigma, caption = a_clip(model, Dice(seed), 1, c.chunk)
    leave_the_blocks = []
    model.blocks[-1].register_forward_hook(
        lambda module, args, out: leave_the_blocks.append(out[0]))
    v = model.denoise(x, sigma, caption, model.make_cache(1))
    assert_zero(v, "the first prediction must be v = 0, the mean")

    places = oracles.all_places(c.chunk, c.height // c.patch, c.width // c.patch)
    patches = torch.from_numpy(oracles.cut_patches(x[0].numpy(), places, c.patch))
    tokens = leave_the_blocks[0].flatten(1, 2)[0]          # [L, E]
    assert_same(tokens, model.embed(patches), EXACT,
                "gates at zero: every new block is the identity")


def test_sigma_0_is_clean_and_sigma_1_is_noise(code):
    """One direction of time. At sigma = 0 the angle is 0: cosines 1, sines 0."""
    features = code.mla_video.sinusoid(torch.tensor([0.0, 1.0]), 256)
    at_zero = torch.cat((torch.ones(128), torch.zeros(128)))
    assert torch.equal(features[0], at_zero)

    sigma = torch.linspace(0, 1, 11)
    band = torch.arange(128, dtype=torch.float64) / 128
    omega = 10_000.0 ** -band
    angle = 1000 * sigma.double()[:, None] * omega
    want = torch.cat((angle.cos(), angle.sin()), 1)
    # An angle of 1000 radians is known to 1000 * 2^-24 = 6e-5 in float32, and twice that after
    # one product.
    assert_same(code.mla_video.sinusoid(sigma, 256), want, 2e-4,
                "cos, then sin, of 1000 sigma / 10^(4i/128)")


# ---- dtype, device, determinism -------------------------------------------------------------


@pytest.mark.parametrize("attention", ["mla", "dense"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtype_is_kept(code, attention, dtype):
    sizes = EVEN | {"attention": attention}
    model, clean, noisy, sigma, caption = a_lesson(code, sizes, 1, 0)
    model = model.to(dtype)
    clean = clean.to(dtype)
    noisy = noisy.to(dtype)
    sigma = sigma.to(dtype)
    cache = model.make_cache(1)
    for buffer in cache.buffers:
        assert buffer.dtype == dtype, "the cache is as precise as the model"
    model.commit(clean[:, :2], caption, cache)
    assert model(clean, noisy, sigma, caption).dtype == dtype
    assert model.denoise(noisy[:, 2:], sigma[:, 2:], caption, cache).dtype == dtype


@pytest.mark.parametrize("attention", ["mla", "dense"])
def test_device_is_kept_and_nothing_waits_for_it(code, attention):
    """On the meta device, where there are no numbers: a tensor made on the CPU would clash, and
    reading a value would raise."""
    sizes = EVEN | {"attention": attention, "frames": 6, "sink": 1}
    model, _ = a_model(code, sizes, 0)
    model = model.to("meta")
    x = torch.empty(1, 6, 1, 8, 8, device="meta", dtype=torch.float64)
    sigma = torch.empty(1, 6, device="meta")
    caption = torch.zeros(1, 2, dtype=torch.long, device="meta")
    assert model(x, x, sigma, caption).device.type == "meta"
    cache = model.make_cache(1)
    for _ in range(5):                               # through filling, eviction and the horizon
        v = model.denoise(x[:, :2], sigma[:, :2], caption, cache)
        assert v.device.type == "meta"
        model.commit(x[:, :2], caption, cache)
    assert cache.buffers[0].device.type == "meta"


def test_a_saved_state_gives_the_same_bits(code, tmp_path):
    model, *lesson = a_lesson(code, EVEN, 1, 0)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other = enliven(code.mla_video.VideoDiT(model.config).double(), 99)
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(other(*lesson), model(*lesson))
    assert torch.equal(stream(other, *lesson), stream(model, *lesson))


# ---- impossible sizes -----------------------------------------------------------------------


@pytest.mark.parametrize("wrong, words", [
    (dict(dim=0), "dim must be an integer, 1 to"),
    (dict(heads=2.0), "heads must be an integer, 1 to"),
    (dict(attention="gqa"), "attention must be 'mla' or 'dense'"),
    (dict(heads=3), "3 heads do not divide"),
    (dict(height=18), "patches of 4 do not divide 18 x 16"),
    (dict(width=18), "patches of 4 do not divide 16 x 18"),
    (dict(frames=13), "not whole chunks"),
    (dict(rope=32), "leave no content channel"),
    (dict(sink=-1), "sink must be 0 frames or more"),
    (dict(window=4, sink=2), "it must be at least 5"),
    (dict(window=15), "longer than the 12 frames"),
    (dict(rope=7), "even number"),
    (dict(rope=4), "6 or more"),
    (dict(dim=16, heads=4, rope=2, attention="dense"), "6 or more")])
def test_impossible_sizes_are_refused_in_words(code, wrong, words):
    with pytest.raises(ValueError, match=words):
        code.mla_video.Config(**wrong)


def test_frames_of_another_size_are_refused_in_words(code):
    model, dice = a_model(code, EVEN, 0)
    x, sigma, caption = a_clip(model, dice, 1, 2)
    narrower = x[..., :4]
    with pytest.raises(ValueError, match="takes frames of 1 x 8 x 8, got"):
        model.denoise(narrower, sigma, caption, model.make_cache(1))


def test_the_presets_are_the_papers(code):
    presets = code.mla_video.PRESETS
    for name, preset in presets.items():
        latents = preset.latent, preset.query_latent
        assert latents == (preset.dim // 8, preset.dim // 2), f"{name}: C = E/8, Q = E/2"

    toy = presets["toy"]
    head = toy.dim // toy.heads
    ranks = toy.latent, toy.query_latent, toy.rope
    assert ranks == (toy.dim // 8, toy.dim // 2, head // 4), "the paper's proportions"

    wan = presets["wan1.3b"]
    sizes = wan.dim, wan.layers, wan.heads, wan.ffn, wan.channels
    assert sizes == (1536, 30, 12, 8960, 16), "Wan2.1-T2V-1.3B"
    ranks = wan.latent, wan.query_latent, wan.rope
    assert ranks == (192, 768, 32) and wan.norm and toy.norm, "the paper's latent sizes, normed"
    assert (wan.tokens, wan.chunk, wan.frames, wan.window, wan.sink) == (1560, 3, 21, 21, 1)
    assert wan.tokens * wan.chunk == 4680
    assert wan.tokens * wan.frames == 32_760
