"""Making a video chunk by chunk from a cache is the same computation as one masked pass over the whole clip.

Proved here, for both kinds of attention and any grid, chunk, window and sink: teacher forcing equals cached inference after clean commits;
the mask is the table of oracles.py cell by cell, and its block form the same mask; what a frame depends on is exactly what mask and depth
allow, read from gradients that are exactly zero (no future, no leaked answer); every attention layer inside the model is the paper's
equations; videos of a batch do not mix; dtype and device are kept; patches go back where they came from; caption and noise level count.
"""

import numpy as np
import pytest
import torch
from hypothesis import example
from hypothesis import strategies as st

import oracles
from lab import (CPU_ROUTES, EXACT, Dice, assert_alive, assert_same, assert_zero, configs, enliven, forall, numbers, seeds, weights)
from test_cache import a_clip, a_model

# Token counts that are multiples of 128: released code slices off "[-0:]" of padding there, and is left with nothing.
EVEN = dict(attention="mla", dim=16, heads=2, rope=6, layers=2, latent=4, query_latent=8, ffn=8, channels=1, patch=1, height=8, width=8,
            words=5, slots=2, frames=4, chunk=2, window=4, sink=0, norm=True)


def stream(model, clean, noisy, sigma, caption, route="auto"):
    """Every chunk of `noisy` denoised once, each on a cache of the clean chunks before it."""
    n, cache, v = model.config.chunk, model.make_cache(len(clean)), []
    with torch.no_grad():
        for start in range(0, clean.shape[1], n):
            now = slice(start, start + n)
            v.append(model.denoise(noisy[:, now], sigma[:, now], caption, cache, route))
            model.commit(clean[:, now], caption, cache, route)
    return torch.cat(v, dim=1)


def a_lesson(code, sizes, B, seed, frames=None):
    model, dice = a_model(code, sizes, seed)
    clean, sigma, caption = a_clip(model, dice, B, frames or model.config.frames)
    return model, clean, torch.randn(clean.shape, generator=dice.generator, dtype=clean.dtype), sigma, caption


# ---- the central theorem --------------------------------------------------------------------------------------------


@forall(sizes=configs(), B=st.integers(1, 2), route=st.sampled_from(CPU_ROUTES), seed=seeds)
@example(sizes=EVEN, B=1, route="materialised", seed=0)
@example(sizes=EVEN | {"attention": "dense", "frames": 8, "window": 6, "sink": 1, "chunk": 2}, B=2, route="reference", seed=1)
def test_teacher_forcing_is_streaming(code, sizes, B, route, seed):
    model, *lesson = a_lesson(code, sizes, B, seed)
    whole = model(*lesson, route=route)
    assert_same(stream(model, *lesson), whole, EXACT,
                "one masked pass and cached inference disagree. Clean half at sigma 0? same positions for both halves? strict < in the mask? "
                "commit at sigma 0, with the clean chunk? the same window on both sides?")
    assert_same(model(*lesson), whole, EXACT, f"the default route and {route} disagree")


@forall(sizes=configs(min_chunks=2), seed=seeds)
def test_teacher_forcing_is_streaming_in_float32_too(code, sizes, seed):
    model, *lesson = a_lesson(code, sizes, 1, seed)
    lesson = [part if part.dtype == torch.long else part.float() for part in lesson]
    # float32 rounds at 6e-8; a few layers of it add up to 1e-6 in the worst example seen. 1e-5 is what TRAINING.md asks.
    assert_same(stream(model.float(), *lesson), model(*lesson), 1e-5, "float32: one masked pass and cached inference disagree")


# ---- the mask -------------------------------------------------------------------------------------------------------


def frame_mask(code, config, frames):
    frame, noisy = torch.arange(frames).repeat(2), torch.arange(2 * frames) >= frames
    return code.mla_video.allowed(frame[:, None], noisy[:, None], frame[None], noisy[None], config)


def table(config, frames) -> np.ndarray:
    """The same mask, cell by cell."""
    rule = dict(chunk=config.chunk, window=config.window, sink=config.sink)
    return np.array([[oracles.may_look(q % frames, q >= frames, k % frames, k >= frames, **rule) for k in range(2 * frames)]
                     for q in range(2 * frames)])


@forall(sizes=configs())
def test_the_mask_is_the_table(code, sizes):
    config = code.mla_video.Config(**sizes)
    got, want = frame_mask(code, config, config.frames).numpy(), table(config, config.frames)
    wrong = [(("noisy " if q >= config.frames else "clean ") + str(q % config.frames), ("noisy " if k >= config.frames else "clean ")
              + str(k % config.frames), bool(got[q, k])) for q, k in np.argwhere(got != want)]
    assert not wrong, f"(query frame, key frame, may look) differ from the table, chunk {config.chunk}, window {config.window}, sink " \
                      f"{config.sink}: {wrong[:4]}"


@forall(sizes=configs(), first=st.integers(0, 3))
def test_spans_are_the_mask_in_block_form(code, sizes, first):
    config = code.mla_video.Config(**sizes)
    P, mask = config.tokens, frame_mask(code, config, config.frames)
    tokens = mask.repeat_interleave(P, 0).repeat_interleave(P, 1)
    blocks = code.mla_video.spans(mask, config)
    drop = min(first * config.chunk, config.frames) * P
    for spans, want in ((blocks, tokens), (code.mla_video.drop_queries(blocks, drop), code.mla_video.drop_queries(tokens, drop))):
        got, end = torch.zeros_like(want), 0
        for rows, keys in spans:
            assert rows.start == end, "query spans must follow each other without a gap"
            end = rows.stop
            for see in keys:
                got[rows, see] = True
        assert end == len(want) and torch.equal(got, want), "the spans are another mask"
    assert torch.equal(code.mla_video.drop_queries(tokens, drop), tokens[drop:]), "the first queries are dropped, not the last"


# ---- what depends on what -------------------------------------------------------------------------------------------


@forall(sizes=configs(min_chunks=2), seed=seeds)
def test_a_frame_depends_on_what_mask_and_depth_allow_and_on_nothing_else(code, sizes, seed):
    """n layers let information take n steps of the mask: gradients are non-zero exactly there. No future, and not its own answer."""
    model, clean, noisy, sigma, caption = a_lesson(code, sizes, 1, seed)
    c, F = model.config, model.config.frames
    v = model(clean.requires_grad_(), noisy.requires_grad_(), sigma, caption)
    reach = np.linalg.matrix_power(table(c, F).astype(np.int64), c.layers) > 0
    for start in range(0, F, c.chunk):
        chunk = slice(start, start + c.chunk)
        pull = Dice(seed + start).normal(*v[:, chunk].shape)
        of_clean, of_noisy = torch.autograd.grad((v[:, chunk] * pull).sum(), (clean, noisy), retain_graph=True)
        assert_zero(of_clean[:, start:], f"chunk at frame {start} sees its own answer or a clean future (leak)")
        assert_zero(of_noisy[:, start + c.chunk:], f"chunk at frame {start} sees the noisy future (not causal)")
        assert_zero(of_noisy[:, :start], f"chunk at frame {start} sees another chunk's noise")
        got = torch.cat((of_clean, of_noisy), 1).flatten(2).any(-1)[0].numpy()
        assert (got == reach[F + start]).all(), \
            f"noisy frame {start} depends on frames {np.flatnonzero(got)} of [clean | noisy], the mask allows {np.flatnonzero(reach[F + start])}"


@forall(sizes=configs(), chunks=st.integers(1, 3), seed=seeds)
def test_videos_of_a_batch_do_not_mix(code, sizes, chunks, seed):
    model, clean, noisy, sigma, caption = a_lesson(code, sizes, 3, seed)
    v = model(clean.requires_grad_(), noisy.requires_grad_(), sigma, caption)
    for part in torch.autograd.grad(v[1].square().sum(), (clean, noisy)):
        assert_zero(part[[0, 2]], "the answer for one video depends on another video of the batch")
    alone = model(*(part[1:2].detach() for part in (clean, noisy, sigma, caption)))
    assert_same(alone, v[1:2], EXACT, "a video alone and in a batch")
    lesson = [part.detach() for part in (clean, noisy, sigma, caption)]
    assert_same(stream(model, *(part[1:2] for part in lesson)), stream(model, *lesson)[1:2], EXACT,
                "a video streamed alone and in a batch")


@forall(sizes=configs(), seed=seeds)
def test_caption_and_noise_level_count(code, sizes, seed):
    model, clean, noisy, sigma, caption = a_lesson(code, sizes, 1, seed)
    v = model(clean, noisy, sigma, caption)
    assert (model(clean, noisy, sigma, (caption + 1) % 5) - v).norm() > 1e-6 * v.norm(), \
        "another caption changed nothing: it is ignored"
    last = sigma.index_add(1, torch.tensor([sigma.shape[1] - 1]), torch.full((1, 1), 0.1, dtype=sigma.dtype))
    changed = (model(clean, noisy, last, caption) - v).flatten(2).norm(dim=-1)[0]
    assert changed[-1] > 1e-6 * v[:, -1].norm(), "another noise level of a frame changed nothing for that frame"
    assert_zero(changed[:-model.config.chunk], "the noise level of the last chunk reached earlier chunks")


# ---- inside ---------------------------------------------------------------------------------------------------------


@forall(sizes=configs(), seed=seeds)
def test_every_layer_inside_the_model_is_the_papers_equations(code, sizes, seed):
    """What goes into and comes out of each attention layer during a teacher-forced pass, against numpy: positions, mask and all."""
    model, *lesson = a_lesson(code, sizes, 1, seed)
    c, taken = model.config, []
    for block in model.blocks:
        layer = block.attention
        layer.rows = lambda h, layer=layer: (taken.append([layer, h]), type(layer).rows(layer, h))[1]
        layer.register_forward_hook(lambda layer, args, y: taken[-1].extend((args[0], y)))
    model(*lesson)
    at = np.array([[t, y, x] for t in [*range(c.frames)] * 2 for y in range(c.height // c.patch) for x in range(c.width // c.patch)])
    visible = table(c, c.frames).repeat(c.tokens, 0).repeat(c.tokens, 1)
    for i, (layer, h, x, y) in enumerate(taken):
        L = x.shape[1]                                     # the last block asks for the noisy half only
        head = c.dim // c.heads
        places = dict(heads=c.heads, x_at=at[-L:], keys_at=at, visible=visible[-L:])
        if c.attention == "mla":
            places |= dict(head=head, scale=head ** -0.5)
        want, p = getattr(oracles, c.attention)(numbers(x[0]), numbers(h[0]), weights(layer), **places)
        assert_alive(p, visible[-L:])
        assert_same(y[0], want, EXACT, f"attention layer {i} of the model is not equations (1)-(8) at the right positions and mask")


@forall(sizes=configs(), seed=seeds)
def test_the_whole_network_is_a_page_of_numpy(code, sizes, seed):
    """Modulation, gates, norms, caption, FFN, head: nothing in between that the paper's block does not have. (The sinusoids are taken as
    they come, in float32; test_sigma_0_is_clean_and_sigma_1_is_noise looks at them.)"""
    model, clean, noisy, sigma, caption = a_lesson(code, sizes, 1, seed)
    c, given = model.config, []
    model.time.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    v = model(clean, noisy, sigma, caption)
    W = {name: numbers(value) for name, value in model.state_dict().items()}
    visible = table(c, c.frames).repeat(c.tokens, 0).repeat(c.tokens, 1)
    want = oracles.video_dit(W, numbers(torch.cat((clean, noisy), 1))[0], [*range(c.frames)] * 2, numbers(given[0])[0], caption[0].numpy(),
                             visible, c)
    assert_same(v[0], want[c.frames:], EXACT,
                "the network is not oracles.video_dit: shift, scale and gate in order? pre-norms? caption unmasked?")


@forall(sizes=configs(attention=("mla",)))
def test_weights_have_the_papers_sizes(code, sizes):
    E, H, C, Q, R = (sizes[name] for name in ("dim", "heads", "latent", "query_latent", "rope"))
    d = E // H
    want = dict(W_DKV=(C, E), W_KR=(R, E), W_DQ=(Q, E), W_UQ=(H * (d - R), Q), W_QR=(H * R, Q), W_UK=(H * (d - R), C), W_UV=(H * d, C),
                W_O=(E, H * d)) | (dict(norm_kv=(C,), norm_q=(Q,)) if sizes["norm"] else {})
    for block in code.mla_video.VideoDiT(code.mla_video.Config(**sizes)).blocks:
        got = {name: w.shape for name, w in weights(block.attention).items()}
        assert got == want, f"(1)-(5): N = d_h - R = {d - R}, V = d_h = {d}; R, one key for all heads; Q, C shared: got {got}"


@forall(sizes=configs(), B=st.integers(1, 2), seed=seeds)
def test_patches_go_back_where_they_came_from(code, sizes, B, seed):
    """Feed what the embedding was given to the output as if it were what the head said: the picture must come back, bit for bit."""
    model, dice = a_model(code, sizes, seed)
    x, sigma, caption = a_clip(model, dice, B, model.config.chunk)
    given = []
    model.embed.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    model.head.register_forward_hook(lambda module, args, out: given[-1])
    assert torch.equal(model.denoise(x, sigma, caption, model.make_cache(B)), x), "un-patchify scrambles what patchify cut"
    p = model.config.patch
    assert torch.equal(given[0][:, :, model.config.width // p - 1], x[:, :, :, :p, -p:].flatten(2)), \
        "token number w - 1 must be the patch at the right end of the first row"


@forall(sizes=configs(), seed=seeds)
def test_a_new_model_is_silent_until_it_learns(code, sizes, seed):
    torch.manual_seed(seed)
    model = code.mla_video.VideoDiT(code.mla_video.Config(**sizes)).double()
    x, sigma, caption = a_clip(model, Dice(seed), 1, model.config.chunk)
    assert_zero(model.denoise(x, sigma, caption, model.make_cache(1)), "the first prediction must be v = 0, the mean")
    states = []
    model.blocks[-1].register_forward_hook(lambda module, args, out: states.append(out[0]))
    model.denoise(x, sigma, caption, model.make_cache(1))
    tokens = x.unflatten(3, (-1, model.config.patch)).unflatten(5, (-1, model.config.patch)).permute(0, 1, 3, 5, 2, 4, 6)
    assert_same(states[0], model.embed(tokens.flatten(4).flatten(2, 3)), EXACT, "gates at zero: every new block is the identity")


def test_sigma_0_is_clean_and_sigma_1_is_noise(code):
    """One direction of time. At sigma = 0 the angle is 0: cosines 1, sines 0."""
    features = code.mla_video.sinusoid(torch.tensor([0.0, 1.0]), 256)
    assert torch.equal(features[0], torch.cat((torch.ones(128), torch.zeros(128))))
    sigma = torch.linspace(0, 1, 11)
    angle = 1000 * sigma.double()[:, None] * 10_000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    # An angle of 1000 radians is known to 1000 * 2^-24 = 6e-5 in float32, and twice that after one product.
    assert_same(code.mla_video.sinusoid(sigma, 256), torch.cat((angle.cos(), angle.sin()), 1), 2e-4,
                "cos, then sin, of 1000 sigma / 10^(4i/128)")


# ---- dtype, device, determinism -------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["mla", "dense"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtype_is_kept(code, attention, dtype):
    model, clean, noisy, sigma, caption = a_lesson(code, EVEN | {"attention": attention}, 1, 0)
    model, clean, noisy, sigma = (part.to(dtype) for part in (model, clean, noisy, sigma))
    cache = model.make_cache(1)
    assert {buffer.dtype for buffer in cache.buffers} == {dtype}, "the cache is as precise as the model"
    model.commit(clean[:, :2], caption, cache)
    assert model(clean, noisy, sigma, caption).dtype == model.denoise(noisy[:, 2:], sigma[:, 2:], caption, cache).dtype == dtype


@pytest.mark.parametrize("attention", ["mla", "dense"])
def test_device_is_kept_and_nothing_waits_for_it(code, attention):
    """On the meta device, where there are no numbers: a tensor made on the CPU would clash, and reading a value would raise."""
    model, *_ = a_model(code, EVEN | {"attention": attention, "frames": 6, "sink": 1}, 0)
    model = model.to("meta")
    x, sigma, caption = torch.empty(1, 6, 1, 8, 8, device="meta", dtype=torch.float64), torch.empty(1, 6, device="meta"), \
        torch.zeros(1, 2, dtype=torch.long, device="meta")
    assert model(x, x, sigma, caption).device.type == "meta"
    cache = model.make_cache(1)
    for _ in range(5):                                     # through filling, eviction and the horizon
        assert model.denoise(x[:, :2], sigma[:, :2], caption, cache).device.type == "meta"
        model.commit(x[:, :2], caption, cache)
    assert cache.buffers[0].device.type == "meta"


def test_a_saved_state_gives_the_same_bits(code, tmp_path):
    model, *lesson = a_lesson(code, EVEN, 1, 0)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other = enliven(code.mla_video.VideoDiT(model.config).double(), 99)
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(other(*lesson), model(*lesson)) and torch.equal(stream(other, *lesson), stream(model, *lesson))


# ---- impossible sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong, words", [
    (dict(dim=0), "dim must be a positive integer"), (dict(heads=2.0), "heads must be a positive integer"),
    (dict(attention="gqa"), "attention must be 'mla' or 'dense'"), (dict(heads=3), "3 heads do not divide"),
    (dict(height=18), "patches of 4 do not divide 18 x 16"), (dict(width=18), "patches of 4 do not divide 16 x 18"),
    (dict(frames=13), "not whole chunks"), (dict(rope=32), "leave no content channel"), (dict(sink=-1), "sink must be 0 frames or more"),
    (dict(window=4, sink=2), "it must be at least 5"), (dict(window=15), "longer than the 12 frames"), (dict(rope=7), "even number"),
    (dict(rope=4), "6 or more"), (dict(dim=16, heads=4, rope=2, attention="dense"), "6 or more")])
def test_impossible_sizes_are_refused_in_words(code, wrong, words):
    with pytest.raises(ValueError, match=words):
        code.mla_video.Config(**wrong)


def test_frames_of_another_size_are_refused_in_words(code):
    model, dice = a_model(code, EVEN, 0)
    x, sigma, caption = a_clip(model, dice, 1, 2)
    with pytest.raises(ValueError, match="takes frames of 1 x 8 x 8, got"):
        model.denoise(x[..., :4], sigma, caption, model.make_cache(1))


def test_the_presets_are_the_papers(code):
    toy, wan = code.mla_video.PRESETS["toy"], code.mla_video.PRESETS["wan1.3b"]
    assert (toy.latent, toy.query_latent, toy.rope) == (toy.dim // 8, toy.dim // 2, toy.dim // toy.heads // 4), \
        "the paper's proportions"
    assert (wan.dim, wan.layers, wan.heads, wan.ffn, wan.channels) == (1536, 30, 12, 8960, 16), "Wan2.1-T2V-1.3B"
    assert (wan.latent, wan.query_latent, wan.rope) == (192, 768, 32) and wan.norm and toy.norm, "the paper's latent sizes, normed"
    assert (wan.tokens, wan.chunk, wan.frames, wan.window, wan.sink) == (1560, 3, 21, 21, 1)
    assert wan.tokens * wan.chunk == 4680 and wan.tokens * wan.frames == 32_760
    for name, preset in code.mla_video.PRESETS.items():
        assert (preset.latent, preset.query_latent) == (preset.dim // 8, preset.dim // 2), f"{name}: C = E/8, Q = E/2"
