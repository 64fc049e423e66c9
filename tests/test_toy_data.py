"""Properties of toy_data.py: worlds are pure functions of (seed, index), user files are read as `.reads` says, and the metrics call
true clips true and spoiled clips spoiled. Each spoiler must fail the metric it is aimed at: a gate that cannot fail proves nothing."""

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import toy_data as td

WORLDS = ("shapes", "digits", "occluder")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small tensors on a busy machine: threads that wait for each other made this file ten times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def true():
    """120 true clips of 24 frames of the shapes world, and their captions."""
    return td.make_world("shapes", frames=24, seed=7).batch(range(120))


@pytest.mark.parametrize("name", WORLDS)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**62), indices=st.lists(st.integers(0, 2**62), min_size=1, max_size=5), frames=st.integers(1, 15),
       size=st.integers(8, 24))
def test_a_batch_is_its_clips_bit_for_bit(name, seed, indices, frames, size):
    video, caption = td.make_world(name, frames, size, seed).batch(indices)
    assert video.shape == (len(indices), frames, 3, size, size) and video.dtype == torch.float32
    assert caption.shape == (len(indices), td.CAPTION_SLOTS) and caption.dtype == torch.long and (caption > 0).all()
    assert video.abs().max() <= 1, "frames must stay in [-1, 1]"
    for b, index in enumerate(indices):
        alone, words = td.make_world(name, frames, size, seed).clip(index)
        assert torch.equal(alone, video[b]) and torch.equal(words, caption[b]), f"clip {index} depends on its batch or on the object"


@pytest.mark.parametrize("name", WORLDS)
def test_seeds_and_indices_give_different_clips(name):
    clips = [clip for seed in (1, 2) for clip in td.make_world(name, seed=seed).batch(range(20))[0]]
    assert len({clip.numpy().tobytes() for clip in clips}) == 40, "two of 40 clips are the same: seed or index is ignored"


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.sampled_from([12, 16, 32]))
def test_the_subject_stays_whole_and_inside(seed, size):
    video = td.make_world("shapes", 60, size, seed).batch(range(4))[0]
    mass = td.subject_mass(video) / td.true_mass(size)
    assert mass.min() > 0.75 and mass.max() < 1.15, f"mass strays to {mass.min():.2f}..{mass.max():.2f} of the true one: cut by a wall?"
    centre = td.centroid(video) / size
    assert centre.min() > 0.2 and centre.max() < 0.85, "a centre may not come nearer to a wall than a shape's half size"


def test_speed_is_in_the_captions_band_between_bounces():
    video, captions = td.make_world("shapes", frames=16, size=64).batch(range(40))  # large pixels would blur the measured centroid
    for word, (low, high) in td.SPEEDS.items():
        step = td.speed(video[captions[:, 2] == td.WORDS.index(word)]) * 16 / 64
        assert step.max() < high + 0.05, f"a {word} subject moved {step.max():.2f} pixels in a frame; bounces can only shorten a step"
        typical = step.sort(dim=1).values[:, 11]                                    # a step of the upper third sees no bounce
        assert ((typical > low - 0.03) & (typical < high + 0.03)).all(), f"{word} is not {low}..{high} pixels a frame: {typical}"


@given(start=st.floats(2, 8), velocity=st.floats(-3, 3))
def test_bounce_is_stepwise_reflection(start, velocity):
    path = td.bounce(np.full(2, start), np.full(2, velocity), 40, 2.0, 8.0)[:, 0]
    x, v = start, velocity
    for frame in range(40):                                     # the naive simulation that the closed form replaces
        assert abs(path[frame] - x) < 1e-9, f"frame {frame}: {path[frame]} instead of {x}"
        x += v
        if not 2 <= x <= 8:
            x, v = (4 - x if x < 2 else 16 - x), -v


def test_the_three_shapes_are_about_equally_large():
    area = td.coverage(torch.arange(3), torch.full((3, 2), 8.0), 16, 16).sum((-2, -1))
    assert area.max() / area.min() < 1.15, f"areas {area.tolist()}: mass alone would give the shape away"


def test_occluder_hides_the_subject_and_gives_it_back():
    seen = td.subject_mass(td.make_world("occluder", frames=30).batch(range(60))[0])
    hidden = seen < 0.05
    assert (seen[:, 0] > 3).all(), "a clip must begin with its subject in view"
    assert (hidden.sum(1) >= 2).all(), "every subject must vanish for some frames"
    assert ((seen > 3) & (hidden.cumsum(1) > 0)).any(1).float().mean() > 0.95, "subjects must come out again"


def test_digits_are_sharp_enough_to_tell_apart():
    video, captions = td.make_world("digits", frames=1).batch(range(300))
    assert set(captions[:, 1].tolist()) == {td.WORDS.index(word) for word in td.DIGITS}
    assert (video.amax((1, 2, 3, 4)) > 0.4).all(), "a digit has faded in resampling"


def test_digits_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-learn"):
        td.make_world("digits")


@given(words=st.tuples(*(st.sampled_from(("",) + slot) for slot in td.SLOTS)), order=st.permutations(range(3)))
def test_caption_round_trip_in_any_order(words, order):
    ids = td.encode_caption(" ".join(words[i] for i in order))
    assert [td.WORDS[i] for i in ids] == list(words)
    assert torch.equal(td.encode_caption(td.decode_caption(ids)), ids)


@pytest.mark.parametrize("text, says", [("purple disc", "'purple'.*red.*disc"), ("red blue disc", "both 'red' and 'blue'"),
                                        ("disc seven", "both"), ("slow fast", "both"), ("red red", "both")])
def test_bad_captions_are_explained(text, says):
    with pytest.raises(ValueError, match=says) as caught:
        td.encode_caption(text)
    assert "\n" not in str(caught.value)


# Files. The content is a ramp: value = 10 * clip + frame (of 255), so each frame of a window tells which clip and time it is from.

def ramp(count, length):
    value = 10 * np.arange(count)[:, None] + np.arange(length)
    return np.broadcast_to(value[..., None, None], (count, length, 16, 16)).astype(np.uint8)


LAYOUTS = {"[N, T, H, W]": lambda a: a, "[T, N, H, W]": lambda a: a.swapaxes(0, 1),
           "[N, T, H, W, C]": lambda a: a[..., None].repeat(3, -1), "[N, T, C, H, W]": lambda a: a[:, :, None]}
KINDS = {"0..255": lambda a: a, "0..1": lambda a: (a / 255).astype(np.float32), "-1..1": lambda a: a / 127.5 - 1,
         "in 0..255": lambda a: a.astype(np.float16)}


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_and_range_is_read_right(tmp_path, suffix, layout, kind):
    stored = KINDS[kind](LAYOUTS[layout](ramp(21, 20) if layout == "[T, N, H, W]" else ramp(6, 20)))
    path = tmp_path / f"clips{suffix}"
    np.save(path, stored) if suffix == ".npy" else np.savez(path, other=stored[:1] * 0, data=stored)
    world = td.make_world(str(path), frames=12)
    assert layout in world.reads and kind in world.reads and "\n" not in world.reads, world.reads
    assert world.name == f"clips{suffix}" and (suffix == ".npy" or "'data'" in world.reads)
    video, captions = world.batch(range(40))
    assert video.shape == (40, 12, 3, 16, 16) and (captions == 0).all()
    value = ((video[:, :, 0, 0, 0] + 1) * 127.5).round()
    assert (value.diff(dim=1) == 1).all(), "frames of a window are not consecutive frames of one clip"
    assert (video == video[:, :, :1, :1, :1]).all() and len((value[:, 0] // 10).unique()) > 3, "windows must come from every clip"


def test_moving_mnist_layout_and_resize(tmp_path):
    stored = np.zeros((20, 8, 64, 64), np.uint8)
    stored[:, :, :, 32:] = 255
    np.save(tmp_path / "mnist.npy", stored)
    world = td.make_world(str(tmp_path / "mnist.npy"))
    assert "Moving MNIST" in world.reads and "64x64 resized to 16x16" in world.reads and "grey" in world.reads, world.reads
    assert isinstance(world.array.base, np.memmap) or isinstance(world.array, np.memmap), "the file must not be read whole"
    frame = world.clip(0)[0][0, 0]
    assert (frame[:, :7] < -0.99).all() and (frame[:, 9:] > 0.99).all(), "resizing must keep the left half black, the right half white"


def test_gif_is_one_clip_of_windows(tmp_path):
    frames = [Image.fromarray(np.full((16, 16, 3), (8 * t, 0, 255 - 8 * t), np.uint8)) for t in range(30)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    world = td.make_world(str(tmp_path / "a.gif"))
    red = ((world.batch(range(30))[0][:, :, 0, 0, 0] + 1) * 127.5).round()
    assert (red.diff(dim=1) == 8).all() and len(red[:, 0].unique()) > 5 and "30 frames" in world.reads, world.reads


GOOD = ramp(3, 14)
BAD = [("missing.npy", None, "no file"), ("a.txt", b"hello", "not a kind of file"), ("a.npy", b"hello", "damaged"),
       ("a.gif", b"GIF89a", "damaged"), ("a.npz", b"PK", "damaged"), ("a.mp4", b"hello", "pip install av"), ("a.npy", GOOD[:0], "empty"),
       ("a.npy", GOOD[0, 0], "cannot read shape"), ("a.npy", GOOD[None, None], "cannot read shape"),
       ("a.npy", GOOD.astype(np.int64), "int64"), ("a.npy", GOOD * 1j, "complex"), ("a.npy", GOOD * 1e3, "values from"),
       ("a.npy", np.where(GOOD == 3, math.nan, GOOD), "nan"), ("a.npy", np.where(GOOD == 3, math.inf, GOOD), "inf"),
       ("a.npy", GOOD[:, :5], "5 frames.*12 or more"), ("a.npy", np.array([{}], dtype=object), "damaged")]


@pytest.mark.parametrize("name, content, says", BAD)
def test_bad_files_get_one_line(tmp_path, monkeypatch, name, content, says):
    monkeypatch.setitem(sys.modules, "av", None)
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    with pytest.raises((ValueError, FileNotFoundError, ModuleNotFoundError), match=says) as caught:
        td.make_world(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [{"frames": 0}, {"size": 4}, {"seed": -1}])
def test_impossible_worlds_are_refused(bad):
    with pytest.raises(ValueError, match="a world needs"):
        td.make_world("shapes", **bad)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_metrics_are_right_on_true_clips(true, noise):
    video, captions = true
    video = video + noise * torch.randn(video.shape, generator=torch.Generator().manual_seed(0))
    assert td.alive(video).float().mean() >= 0.995
    assert (td.colour_index(video) == captions[:, :1] - 1).float().mean() >= 0.995
    assert (td.shape_index(video) == captions[:, 1:2] - td.WORDS.index("disc")).float().mean() >= 0.995
    assert td.caption_match(video, captions).float().mean() >= 0.99
    assert td.motion_residual(video).max() < 0.15, "straight lines with reflections must fit true motion"
    report = td.survival_report(video, captions)
    assert set(report) == {"alive", "colour", "shape", "moving", "survival"} and min(report.values()) >= 0.99, report
    assert td.survival_report(video, captions * 0)["colour"] >= 0.99, "without a colour word the first chunk's colour is the norm"


SPOILED = {"black": (lambda v: v * 0 - 1, "alive"), "grey": (lambda v: v * 0, "alive"),
           "noise": (lambda v: torch.rand(v.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1, "alive"),
           "faded": (lambda v: (v + 1) * 0.35 - 1, "alive"), "washed out": (lambda v: v * 0.2, "alive"),
           "grown": (lambda v: torch.nn.functional.max_pool2d(v.flatten(0, 1), 5, 1, 2).view_as(v), "alive"),
           "scattered": (lambda v: v.flatten(-2)[..., torch.arange(256) * 77 % 256].view_as(v), "alive"),
           "two subjects": (lambda v: torch.maximum(v, v.roll((8, 8), (-2, -1))), "alive"),
           "colour swapped": (lambda v: torch.cat([v[:, :12], v.roll(1, 2)[:, 12:]], 1), "colour"),
           "frozen": (lambda v: v[:, :1].expand_as(v), "moving"), "upside down": (lambda v: v.flip(-2), "shape")}


@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_clips_fail(true, name):
    (video, captions), (spoil, metric) = true, SPOILED[name]
    if name == "upside down":
        video, captions = (x[captions[:, 1] == td.WORDS.index("triangle")] for x in true)
    for words in (captions,) if metric == "shape" else (captions, captions * 0):   # unasked, upside down is as good as any shape
        report = td.survival_report(spoil(video), words)
        assert report[metric] <= 0.05, f"{name}: {metric} is {report[metric]:.2f}, the metric does not see the damage"
        assert metric == "shape" or report["survival"] <= 0.05, report
    assert td.caption_match(spoil(video), captions)[:, 12:].float().mean() < 0.3, f"{name} still matches its caption"


def test_jitter_is_not_smooth_motion(true):
    video = true[0].clone()
    rng = np.random.default_rng(0)
    for frame in video.flatten(0, 1):
        frame.copy_(frame.roll(tuple(rng.integers(-1, 2, 2).tolist()), (-2, -1)))
    assert td.motion_residual(video).median() > 0.5, "a pixel of jitter must show"
    assert td.motion_residual(video * 0 - 1).isnan().all(), "no subject has no motion"


def test_wrong_words_do_not_match(true):
    for slot, ids in ((0, (1, 2)), (1, (8, 9)), (2, (td.WORDS.index("slow"), td.WORDS.index("fast")))):
        video, wrong = true[0], true[1].clone()
        wrong[:, slot] = torch.where(wrong[:, slot] == ids[0], ids[1], ids[0])
        assert td.caption_match(video, wrong).float().mean() < 0.02, f"slot {slot} of the caption is not looked at"
