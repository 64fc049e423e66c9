"""Properties of engine/clips.py: files are read as `reads` says, or are refused in one line.

The stored content is a ramp: value = 10 * clip + frame (of 255), so that each frame of a
window tells which clip and which time it is from.
"""

import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from engine.clips import open_world
from toy_data import make_world


def ramp(count: int, length: int) -> np.ndarray:
    """uint8 [count, length, 16, 16]"""
    clip = 10 * np.arange(count)[:, None]
    value = clip + np.arange(length)                         # [count, length]
    shape = (count, length, 16, 16)
    return np.broadcast_to(value[..., None, None], shape).astype(np.uint8)


def stored_value(video: torch.Tensor) -> torch.Tensor:
    """What the file held: first channel of the first pixel of each frame, [B, F], 0 to 255."""
    pixel = video[:, :, 0, 0, 0]
    return ((pixel + 1) * 127.5).round()


@pytest.mark.parametrize("name", ["shapes", "digits", "occluder"])
def test_built_in_names_open_built_in_worlds(name):
    video, captions = open_world(name, frames=5, size=12, seed=3).batch([4, 7])
    same_video, same_captions = make_world(name, frames=5, size=12, seed=3).batch([4, 7])
    assert torch.equal(video, same_video)
    assert torch.equal(captions, same_captions)


# ---- layouts and ranges --------------------------------------------------------------------

LAYOUTS = {
    "[N, T, H, W]": lambda clips: clips,
    "[T, N, H, W]": lambda clips: clips.swapaxes(0, 1),
    "[N, T, H, W, C]": lambda clips: clips[..., None].repeat(3, -1),
    "[N, T, C, H, W]": lambda clips: clips[:, :, None],
}
RANGES = {
    "0..255": lambda clips: clips,
    "0..1": lambda clips: (clips / 255).astype(np.float32),
    "-1..1": lambda clips: clips / 127.5 - 1,
    "in 0..255": lambda clips: clips.astype(np.float16),
}


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("values", RANGES)
def test_every_layout_and_range_is_read_right(tmp_path, suffix, layout, values):
    count = 21 if layout == "[T, N, H, W]" else 6            # time first must be the shorter
    arranged = LAYOUTS[layout](ramp(count, 20))
    stored = RANGES[values](arranged)
    path = tmp_path / f"clips{suffix}"
    if suffix == ".npy":
        np.save(path, stored)
    else:
        np.savez(path, other=stored[:1] * 0, data=stored)

    world = open_world(str(path), frames=12)
    assert world.name == f"clips{suffix}"
    assert layout in world.reads
    assert values in world.reads
    assert "\n" not in world.reads
    assert suffix == ".npy" or "'data'" in world.reads

    video, captions = world.batch(range(40))
    assert video.shape == (40, 12, 3, 16, 16)
    assert (captions == 0).all()
    assert (video == video[:, :, :1, :1, :1]).all()
    value = stored_value(video)
    steps = value.diff(dim=1)
    assert (steps == 1).all(), "frames of a window are not consecutive frames of one clip"
    clips = value[:, 0] // 10
    assert len(clips.unique()) > 3, "windows must come from every clip"


def test_moving_mnist_layout_and_resize(tmp_path):
    stored = np.zeros((20, 8, 64, 64), np.uint8)
    stored[:, :, :, 32:] = 255
    np.save(tmp_path / "mnist.npy", stored)
    world = open_world(str(tmp_path / "mnist.npy"))
    for said in ("Moving MNIST", "64x64 resized to 16x16", "grey"):
        assert said in world.reads
    mapped = isinstance(world.array, np.memmap) or isinstance(world.array.base, np.memmap)
    assert mapped, "the file must not be read whole"
    video, _ = world.clip(0)
    frame = video[0, 0]
    halves = (frame[:, :7] < -0.99).all() and (frame[:, 9:] > 0.99).all()
    assert halves, "resizing must keep the left half black, the right half white"


def test_gif_is_one_clip_of_windows(tmp_path):
    frames = []
    for t in range(30):
        colour = (8 * t, 0, 255 - 8 * t)
        pixels = np.full((16, 16, 3), colour, np.uint8)
        frames.append(Image.fromarray(pixels))
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])

    world = open_world(str(tmp_path / "a.gif"))
    assert "30 frames" in world.reads
    video, _ = world.batch(range(30))
    red = stored_value(video)
    assert (red.diff(dim=1) == 8).all()
    first = red[:, 0]
    assert len(first.unique()) > 5


# ---- refusals ------------------------------------------------------------------------------

GOOD = ramp(3, 14)
BAD = [
    ("missing.npy", None, "no file"),
    ("a.txt", b"hello", "not a kind of file"),
    ("a.npy", b"hello", "damaged"),
    ("a.gif", b"GIF89a", "damaged"),
    ("a.npz", b"PK", "damaged"),
    ("a.mp4", b"hello", "pip install av"),
    ("a.npy", GOOD[:0], "empty"),
    ("a.npy", GOOD[0, 0], "cannot read shape"),
    ("a.npy", GOOD[None, None], "cannot read shape"),
    ("a.npy", GOOD.astype(np.int64), "int64"),
    ("a.npy", GOOD * 1j, "complex"),
    ("a.npy", GOOD * 1e3, "values from"),
    ("a.npy", np.where(GOOD == 3, math.nan, GOOD), "nan"),
    ("a.npy", np.where(GOOD == 3, math.inf, GOOD), "inf"),
    ("a.npy", GOOD[:, :5], "5 frames.*12 or more"),
    ("a.npy", np.array([{}], dtype=object), "damaged"),
]
REFUSALS = (ValueError, FileNotFoundError, ModuleNotFoundError)


@pytest.mark.parametrize("name, content, says", BAD)
def test_bad_files_get_one_line(tmp_path, monkeypatch, name, content, says):
    monkeypatch.setitem(sys.modules, "av", None)
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    with pytest.raises(REFUSALS, match=says) as caught:
        open_world(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [{"frames": 0}, {"size": 4}, {"seed": -1}])
def test_impossible_worlds_are_refused(bad):
    with pytest.raises(ValueError, match="a world needs"):
        open_world("shapes", **bad)
