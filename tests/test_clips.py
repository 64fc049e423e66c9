"""Properties of a user's own clips (engine/clips.py and what it is made of): files and folders
are read as `reads` says, or are refused in one line.

The stored content is a ramp: value = 10 * clip + frame (of 255), so that each frame of a
window tells which clip and which time it is from. Where a frame's aspect matters it is one of
`striped`.
"""

import math
import sys
from fractions import Fraction
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import train
from engine import clip_files, clips, framing, pixel_values
from engine.clips import open_world
from toy_data import make_world


def ramp(count: int, length: int) -> np.ndarray:
    """uint8 [count, length, 16, 16]"""
    clip = 10 * np.arange(count)[:, None]
    value = clip + np.arange(length)                         # [count, length]
    shape = (count, length, 16, 16)
    value = value[..., None, None].astype(np.uint8)
    return np.broadcast_to(value, shape).copy()


def stored_value(video: torch.Tensor) -> torch.Tensor:
    """What the file held: first channel of the first pixel of each frame, [B, F], 0 to 255."""
    pixel = video[:, :, 0, 0, 0]
    return ((pixel + 1) * 127.5).round()


def check_ramp(world, count: int) -> None:
    """The windows of a world are those of a ramp of so many clips."""
    video, captions = world.batch(range(40))
    assert video.shape == (40, 12, 3, 16, 16)
    assert (captions == 0).all()
    assert (video == video[:, :, :1, :1, :1]).all()
    value = stored_value(video)
    steps = value.diff(dim=1)
    assert (steps == 1).all(), "frames of a window are not consecutive frames of one clip"
    found = len((value[:, 0] // 10).unique())
    assert found >= min(count, 4), "windows must come from every clip"


@pytest.fixture
def warned(monkeypatch) -> list[str]:
    """The lines that open_world prints."""
    lines = []
    monkeypatch.setattr(clips, "say", lines.append)
    return lines


def save(path, content) -> str:
    np.save(path, content)
    return str(path)


@pytest.mark.parametrize("name", ["shapes", "digits", "occluder"])
def test_built_in_names_open_built_in_worlds(name):
    video, captions = open_world(name, frames=5, size=12, seed=3).batch([4, 7])
    same_video, same_captions = make_world(name, frames=5, size=12, seed=3).batch([4, 7])
    assert torch.equal(video, same_video)
    assert torch.equal(captions, same_captions)


# ---- layouts and ranges --------------------------------------------------------------------

LAYOUTS = {
    "NTHW": lambda clips: clips,
    "TNHW": lambda clips: clips.swapaxes(0, 1),
    "NTHWC": lambda clips: clips[..., None].repeat(3, -1),
    "NTCHW": lambda clips: clips[:, :, None],
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
    arranged = LAYOUTS[layout](ramp(6, 20))
    stored = RANGES[values](arranged)
    path = tmp_path / f"clips{suffix}"
    if suffix == ".npy":
        np.save(path, stored)
    else:
        np.savez(path, other=stored[:1] * 0, data=stored)

    world = open_world(str(path), frames=12)
    assert world.name == f"clips{suffix}"
    assert f"read as {layout}" in world.reads
    assert values in world.reads
    assert "\n" not in world.reads
    assert suffix == ".npy" or "'data'" in world.reads
    check_ramp(world, 6)


WORDS = ["NTHW", "TNHW", "NHWT", "HWNT", "NTCHW", "NCTHW", "CNTHW", "TNCHW", "NTHWC", "THWNC",
         "nthw", "[N, T, H, W]"]


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("count", [16, 20, 23])
def test_a_layout_that_is_given_is_taken(tmp_path, word, count):
    """Where the shape tells nothing, too: 16 clips of 16 x 16, or 20 of 20 frames."""
    letters = [letter for letter in word.upper() if letter.isalpha()]
    stored = ramp(count, 20)[..., None].repeat(3, -1)        # [N, T, H, W, C]
    if "C" not in letters:
        stored = stored[..., 0]
    stored = stored.transpose(["NTHWC".index(letter) for letter in letters])
    world = open_world(save(tmp_path / "a.npy", stored), layout=word)
    assert f"read as {''.join(letters)}" in world.reads
    check_ramp(world, count)


@pytest.mark.parametrize("word", ["THW", "HWT", "THWC", "TCHW", "CTHW", "HWTC"])
def test_one_clip_needs_no_axis_of_clips(tmp_path, word):
    stored = ramp(1, 20)[0][..., None].repeat(3, -1)         # [T, H, W, C]
    if "C" not in word:
        stored = stored[..., 0]
    stored = stored.transpose(["THWC".index(letter) for letter in word])
    check_ramp(open_world(save(tmp_path / "a.npy", stored), layout=word), 1)


SHAPES = [                             # a shape, and the only way to read it
    ([6, 20, 64, 64], "NTHW"),
    ([6, 20, 48, 64], "NTHW"),
    ([40, 8, 64, 64], "TNHW"),
    ([20, 64, 64], "THW"),
    ([20, 64, 64, 3], "THWC"),
    ([5, 20, 64, 64, 3], "NTHWC"),
    ([50, 20, 32, 32, 3], "NTHWC"),    # five axes begin with time by the flag alone
    ([5, 20, 3, 64, 64], "NTCHW"),
    ([5, 3, 20, 64, 64], "NCTHW"),
    ([20, 1, 64, 64], "TNHW"),         # TCHW is the same
    ([1, 20, 64, 64], "NTHW"),         # CTHW is the same
    ([20, 10_000, 64, 64], "TNHW"),    # the published Moving MNIST
]


@pytest.mark.parametrize("shape, layout", SHAPES)
def test_a_shape_that_can_be_read_in_one_way_needs_no_flag(tmp_path, shape, layout):
    # Nothing but the header is on disk.
    stored = np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.uint8, tuple(shape))
    del stored
    world = open_world(str(tmp_path / "a.npy"), size=64)
    assert f"{shape} read as {layout}" in world.reads


AMBIGUOUS = [
    ([14, 40, 64, 64], ["NTHW", "TNHW"]),
    ([20, 16, 64, 64], ["NTHW", "TNHW"]),
    ([100, 20, 64, 64], ["NTHW", "TNHW"]),
    ([20, 9_999, 64, 64], ["NTHW", "TNHW"]),
    ([20, 3, 64, 64], ["TNHW", "TCHW"]),
    ([3, 20, 64, 64], ["NTHW", "CTHW"]),
    ([9, 64, 64, 20], ["NTHW", "NHWT"]),
    ([20, 64, 64, 20], ["NTHW", "TNHW", "NHWT"]),
    ([16, 16, 16], ["THW", "HWT"]),
    ([64, 64, 20], ["THW", "HWT"]),
]


@pytest.mark.parametrize("shape, readings", AMBIGUOUS)
def test_a_shape_that_can_be_read_in_several_ways_is_refused(tmp_path, shape, readings):
    path = tmp_path / "a.npy"
    stored = np.lib.format.open_memmap(path, "w+", np.uint8, tuple(shape))
    del stored
    with pytest.raises(ValueError, match="--layout") as caught:
        open_world(str(path))
    said = str(caught.value)
    assert "\n" not in said and str(shape) in said
    for word in readings:
        assert f"{word} (" in said, f"{said} must name {word}"
        open_world(str(path), size=64, layout=word)


# ---- what values mean ----------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["int8", "int16", "uint16", ">u2", "int32", "int64", "uint64"])
def test_integers_that_are_bytes_are_read_as_bytes(tmp_path, dtype):
    world = open_world(save(tmp_path / "a.npy", ramp(6, 20).astype(dtype)))
    assert f"{np.dtype(dtype)}" in world.reads
    assert "values 0 to 69 in 0..255" in world.reads
    check_ramp(world, 6)


@pytest.mark.parametrize("dtype", ["uint16", ">u2"])
def test_sixteen_bits_have_their_own_range(tmp_path, dtype):
    world = open_world(save(tmp_path / "a.npy", (ramp(6, 20) * 257.0).astype(dtype)))
    assert "values 0 to 17733 in 0..65535" in world.reads
    check_ramp(world, 6)


def test_booleans_are_black_and_white(tmp_path, warned):
    stored = ramp(6, 20) % 2 == 1
    world = open_world(save(tmp_path / "a.npy", stored))
    assert "bool" in world.reads and "values 0 to 1 in 0..1" in world.reads
    video, _ = world.batch(range(9))
    assert set(video.unique().tolist()) == {-1, 1}
    assert "binary" in warned[0]


def test_a_very_large_file_of_bytes_is_looked_at_in_part(tmp_path, monkeypatch):
    monkeypatch.setattr(pixel_values, "SAMPLE", 9000)
    monkeypatch.setattr(pixel_values, "PIECE", 2000)
    world = open_world(save(tmp_path / "a.npy", ramp(6, 20)))
    assert "(of a sample) in 0..255" in world.reads
    with pytest.raises(ValueError, match="nan"):             # of floats nothing is left out
        stored = ramp(6, 20).astype(np.float32)
        stored[4, 7, 3, 3] = math.nan
        open_world(save(tmp_path / "b.npy", stored))


WARNED = [
    (np.zeros((5, 14, 16, 16), np.uint8), "every value is 0: a constant"),
    (np.full((5, 14, 16, 16), 0.5), "every value is 0.5: a constant"),
    (ramp(5, 14) % 2, "values 0 to 1 of 0..255: almost one grey; of a mask make booleans"),
    ((ramp(5, 14) % 2).astype(np.int64), "almost one grey"),
    (ramp(5, 14) % 2 * 255, "binary: only the two values 0 and 255"),
    ((ramp(5, 14) % 2).astype(np.float32), "binary: only the two values 0 and 1"),
    (ramp(5, 14) % 20, "values 0 to 19 of 0..255: almost one grey; scale them"),
    (ramp(5, 14).astype(np.uint16) * 50, "almost one grey"),    # twelve bits in sixteen
]


@pytest.mark.parametrize("stored, says", WARNED)
def test_data_that_looks_wrong_is_warned_of(tmp_path, warned, stored, says):
    open_world(save(tmp_path / "a.npy", stored))
    assert len(warned) == 1
    assert warned[0].startswith("warning: ") and says in warned[0]
    assert "\n" not in warned[0]


def test_data_that_looks_right_is_not_warned_of(tmp_path, warned):
    for number, change in enumerate(RANGES.values()):
        open_world(save(tmp_path / f"{number}.npy", change(ramp(6, 20))))
    assert not warned


# ---- frames keep their aspect --------------------------------------------------------------

def striped(height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3]: a white centre square; what is outside it is green."""
    side = min(height, width)
    frame = np.zeros((height, width, 3), np.uint8)
    frame[..., 1] = 255
    top = (height - side) // 2
    left = (width - side) // 2
    frame[top:top + side, left:left + side] = 255
    return frame


def striped_npy(path, height, width):
    return save(path / "a.npy", np.stack([striped(height, width)] * 14))


def striped_gif(path, height, width):
    frames = [Image.fromarray(striped(height, width)) for _ in range(14)]
    for number, frame in enumerate(frames):                # Pillow drops a frame that repeats
        frame.putpixel((width // 2, height // 2), (255, 255, 240 + number))
    frames[0].save(path / "a.gif", save_all=True, append_images=frames[1:], duration=80)
    return str(path / "a.gif")


def striped_pictures(path, height, width):
    for number in range(14):
        Image.fromarray(striped(height, width)).save(path / f"frame{number}.png")
    return str(path)


KINDS = [striped_npy, striped_gif, striped_pictures]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("height, width", [(272, 640), (90, 160), (64, 48)])
def test_the_centre_is_cut_out(tmp_path, warned, kind, height, width):
    world = open_world(kind(tmp_path, height, width))
    side = min(height, width)
    assert f"the centre {side}x{side} of {width}x{height} resized to 16x16" in world.reads
    video, _ = world.clip(0)
    assert video.min() > 0.8, "nothing outside the centre square may be seen"
    cut = any("is cut off; --border" in line for line in warned)
    assert cut == (width > 1.5 * height), "only a cut that takes much is warned of"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("height, width, h, w", [(272, 640, 7, 16), (64, 48, 16, 12)])
def test_a_border_keeps_the_whole_frame(tmp_path, warned, kind, height, width, h, w):
    world = open_world(kind(tmp_path, height, width), border=True)
    assert f"{width}x{height} resized to {w}x{h} in a black border of 16x16" in world.reads
    video, _ = world.clip(0)
    black = (video[0] == -1).all(0)                          # [16, 16]
    top = (16 - h) // 2
    left = (16 - w) // 2
    picture = torch.zeros(16, 16, dtype=torch.bool)
    picture[top:top + h, left:left + w] = True
    assert torch.equal(~black, picture)
    first = video[0, :, top, left]
    assert first[1] > 0.9 and first[0] < 0.5, "the green ends must be seen"
    assert not any("cut off" in line for line in warned)


def test_a_border_is_black_whatever_the_values_are(tmp_path):
    for number, black in enumerate((0.0, -1.0)):
        stored = np.full((5, 14, 16, 32), black)
        stored[:, 0] = 1
        path = save(tmp_path / f"{number}.npy", stored)
        world = open_world(path, layout="NTHW", border=True)
        video, _ = world.batch(range(20))
        border = torch.cat((video[..., :4, :], video[..., 12:, :]), -2)
        assert (border == -1).all()


def test_great_reductions_are_warned_of(tmp_path, warned):
    large = ramp(6, 20).repeat(10, 2)
    large = large.repeat(10, 3)
    open_world(save(tmp_path / "a.npy", large))
    assert "frames become 10 times smaller" in warned[0] and len(warned) == 1


def test_moving_mnist_layout_and_resize(tmp_path):
    stored = np.zeros((20, 8, 64, 64), np.uint8)
    stored[:, :, :, 32:] = 255
    np.save(tmp_path / "mnist.npy", stored)
    world = open_world(str(tmp_path / "mnist.npy"))
    for said in ("Moving MNIST", "64x64 resized to 16x16", "grey"):
        assert said in world.reads
    assert world.stacks[0].clips.shape == (8, 20, 16, 16, 1), "only small clips are kept"
    video, _ = world.clip(0)
    frame = video[0, 0]
    halves = (frame[:, :7] < -0.99).all() and (frame[:, 9:] > 0.99).all()
    assert halves, "resizing must keep the left half black, the right half white"


@pytest.mark.parametrize("shape", [(8, 20, 16, 16), (8, 20, 16, 24)])
def test_a_file_of_the_right_size_stays_on_disk(tmp_path, shape):
    stored = np.broadcast_to(ramp(8, 20)[..., :1], shape)
    world = open_world(save(tmp_path / "a.npy", stored), layout="NTHW")
    array = world.stacks[0].clips
    while not isinstance(array, np.memmap):
        array = array.base
        assert array is not None, "the file must not be read whole"
    check_ramp(world, 8)


@pytest.mark.parametrize("change", RANGES.values())
@pytest.mark.parametrize("border", [False, True])
def test_frames_are_resized_once(tmp_path, monkeypatch, change, border):
    """When the file is opened and not at every step, unless the result would not fit: the same
    windows then."""
    rng = np.random.default_rng(0)
    stored = change(rng.integers(0, 256, (5, 14, 40, 60, 3), np.uint8))
    path = save(tmp_path / "a.npy", stored)
    monkeypatch.setattr(pixel_values, "PIECE", 20_000)     # pieces of some frames of a clip
    world = open_world(path, border=border)
    monkeypatch.setattr(clip_files, "ROOM", 1000)
    large = open_world(path, border=border)
    assert "each step resizes its own" in large.warnings[0]
    later, _ = large.batch(range(9))

    def resized_again(*_, **__):
        raise AssertionError("a step must not resize")

    monkeypatch.setattr(framing.nnf, "interpolate", resized_again)
    video, _ = world.batch(range(9))
    assert (video - later).abs().max() < 1e-5
    with pytest.raises(AssertionError):
        large.batch([0])


def test_how_far_it_is_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(clip_files, "SILENCE", -1)
    monkeypatch.setattr(pixel_values, "PIECE", 20_000)
    large = ramp(2, 14).repeat(2, 2)
    large = large.repeat(2, 3)
    open_world(save(tmp_path / "a.npy", large))
    said = capsys.readouterr().err.splitlines()
    assert "a.npy: resizing, once: 50 %" in said


# ---- GIFs and videos -----------------------------------------------------------------------

def write_gif(path, frames: int, step: int = 8, **how) -> None:
    """One clip: red rises by `step` from frame to frame."""
    pictures = []
    for t in range(frames):
        colour = (step * t, 0, 255 - step * t)
        pictures.append(Image.fromarray(np.full((16, 16, 3), colour, np.uint8)))
    pictures[0].save(path, save_all=True, append_images=pictures[1:], **how)


def test_gif_is_one_clip_of_windows(tmp_path):
    write_gif(tmp_path / "a.gif", 30, duration=80)
    world = open_world(str(tmp_path / "a.gif"))
    assert "30 frames of 16x16 at 12.5 a second; values 0 to 255" in world.reads
    video, _ = world.batch(range(30))
    red = stored_value(video)
    assert (red.diff(dim=1) == 8).all()
    first = red[:, 0]
    assert len(first.unique()) > 5


class FakeFrame:
    """A frame as PyAV gives it, of a film whose pixels are not square and that lies."""
    width = 36
    height = 64
    rotation = 90                                            # counterclockwise

    def to_ndarray(self, format, width, height):
        assert format == "rgb24"
        frame = striped(height, width)
        frame[:, -16:] = 0
        return frame


def fake_av(frames: int) -> ModuleType:
    class Video:
        average_rate = Fraction(24)
        sample_aspect_ratio = Fraction(2)
        streams = property(lambda self: SimpleNamespace(video=[self]))

        def decode(self, stream):
            return iter([FakeFrame()] * frames)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    module = ModuleType("av")
    module.open = lambda path: Video()
    return module


def test_a_video_is_shown_as_a_player_shows_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", fake_av(14))
    (tmp_path / "a.MP4").write_bytes(b"a film")
    world = open_world(str(tmp_path / "a.MP4"), border=True)
    assert "1 clip of 14 frames of 64x72 at 24 a second" in world.reads
    assert "64x72 resized to 14x16 in a black border" in world.reads
    video, _ = world.clip(0)
    assert video[0, :, 0, 8].max() < 0, "the black right edge belongs on top"
    assert video[0, :, -1, 8].max() > 0.9


@pytest.mark.parametrize("name, codec", [("a.mp4", "mpeg4"), ("a.webm", "libvpx-vp9")])
def test_real_videos(tmp_path, name, codec):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / name), "w") as file:
        stream = file.add_stream(codec, rate=24)
        stream.width = 640
        stream.height = 272
        stream.pix_fmt = "yuv420p"
        for _ in range(20):
            frame = av.VideoFrame.from_ndarray(striped(272, 640), "rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    world = open_world(str(tmp_path / name))
    assert "1 clip of 20 frames of 640x272 at 24 a second" in world.reads
    video, _ = world.clip(0)
    assert video.min() > 0.8, "nothing outside the centre square may be seen"


def test_a_video_without_frames(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", fake_av(0))
    (tmp_path / "a.mp4").write_bytes(b"a film")
    with pytest.raises(ValueError, match="a.mp4: no frames"):
        open_world(str(tmp_path / "a.mp4"))


# ---- folders -------------------------------------------------------------------------------

def test_a_folder_of_gifs(tmp_path, warned):
    for name, length in (("a.gif", 20), ("B.GIF", 26), ("short.gif", 5)):
        write_gif(tmp_path / name, length)
    for name in ("a.txt", "B.txt"):                        # that of a short clip is not asked for
        (tmp_path / name).write_text(f"caption of {name[0]}")
    world = open_world(str(tmp_path))
    assert world.name == tmp_path.name
    assert "2 files; 2 clips of 20 to 26 frames of 16x16" in world.reads
    assert warned == ["warning: 1 file of clips shorter than 12 frames left out, e.g. short.gif"]
    video, _ = world.batch(range(60))
    red = stored_value(video)
    assert world.vocabulary.words == ["a", "b", "caption", "of"]
    assert (red.diff(dim=1) == 8).all()
    assert red[:, 0].max() > 8 * 8, "windows must come from the longer clip too"


def test_a_folder_of_arrays_has_one_scale(tmp_path):
    """The brighter file alone would be taken for 0..1."""
    clips = ramp(6, 20)[..., None].astype(np.float32)
    for number, clip in enumerate(clips / 127.5 - 1):
        save(tmp_path / f"{number}.npy", clip)
    save(tmp_path / "10.npy", np.ones((12, 16, 16, 3), np.float32))
    world = open_world(str(tmp_path))
    assert "7 files" in world.reads and "values -1 to 1 in -1..1" in world.reads
    assert [stack.path.stem for stack in world.stacks[-2:]] == ["5", "10"]
    video, _ = world.batch(range(40))
    value = stored_value(video[video[:, 0, 0, 0, 0] < 1])
    assert (value.diff(dim=1) == 1).all()


def write_pictures(folder, clip: np.ndarray, name: str = "{}.png") -> None:
    folder.mkdir(exist_ok=True)
    for number, frame in enumerate(clip):
        Image.fromarray(frame).save(folder / name.format(number))


@pytest.mark.parametrize("name", ["{}.png", "{:05d}.png", "shot7_frame{}.PNG", "{}_left.png"])
def test_a_folder_of_pictures_is_one_clip(tmp_path, name):
    write_pictures(tmp_path, ramp(1, 25)[0], name)
    world = open_world(str(tmp_path))
    assert "1 clip of 25 frames of 16x16" in world.reads
    check_ramp(world, 1)


def test_a_folder_of_folders_of_pictures(tmp_path):
    for number, clip in enumerate(ramp(6, 20)):
        write_pictures(tmp_path / f"clip{number}", clip)
    (tmp_path / "notes").mkdir()
    world = open_world(str(tmp_path))
    assert "6 folders; 6 clips of 20 frames" in world.reads
    check_ramp(world, 6)


def test_sixteen_bit_pictures_keep_their_greys(tmp_path):
    write_pictures(tmp_path, ramp(1, 20)[0].astype(np.uint16) * 257)
    check_ramp(open_world(str(tmp_path)), 1)


def mixed(path):
    write_gif(path / "a.gif", 20)
    save(path / "b.npy", ramp(6, 20))


def two_sequences(path):
    write_pictures(path, ramp(1, 9)[0], "a{}.png")
    write_pictures(path, ramp(1, 9)[0], "b{}.png")


def one_number_twice(path):
    write_pictures(path, ramp(1, 14)[0], "a{}.png")
    write_pictures(path, ramp(1, 14)[0], "a{}.jpg")


def two_sizes(path):
    write_pictures(path, ramp(1, 14)[0])
    Image.new("RGB", (20, 16)).save(path / "14.png")


def not_numbered(path):
    Image.new("RGB", (20, 16)).save(path / "holiday.png")


def damaged_picture(path):
    write_pictures(path, ramp(1, 14)[0])
    (path / "14.png").write_bytes(b"hello")


def damaged_gif(path):
    write_gif(path / "a.gif", 20)
    (path / "b.gif").write_bytes(b"hello")


def two_dtypes(path):
    save(path / "a.npy", ramp(6, 20))
    save(path / "b.npy", ramp(6, 20).astype(np.float32))


def all_short(path):
    write_gif(path / "a.gif", 5)
    write_gif(path / "b.gif", 6)


FOLDERS = [
    (lambda path: None, "no clips in this folder"),
    (lambda path: (path / "a.txt").write_text("hello"), "no clips in this folder"),
    (lambda path: (path / "classes").mkdir(), "no clips in this folder"),
    (mixed, r"films \(a.gif\) and arrays \(b.npy\); expected one kind"),
    (two_sequences, "a0.png and b0.png are not of one sequence"),
    (one_number_twice, "a0.jpg and a0.png are not of one sequence"),
    (two_sizes, "frame 14 has 20x16 pixels, and those before it 16x16"),
    (not_numbered, "holiday.png has no number"),
    (damaged_picture, "14.png is damaged"),
    (damaged_gif, "b.gif: damaged"),
    (two_dtypes, "b.npy: values are float32, and uint8 in the files before it"),
    (all_short, "b.gif: a clip of 6 frames is too short; expected 12 or more"),
]


@pytest.mark.parametrize("fill, says", FOLDERS)
def test_folders_that_cannot_be_read_get_one_line(tmp_path, fill, says):
    fill(tmp_path)
    with pytest.raises(ValueError, match=says) as caught:
        open_world(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_clips_that_would_fill_the_memory_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(clip_files, "ROOM", 20_000)
    write_gif(tmp_path / "a.gif", 30)
    with pytest.raises(ValueError, match="a.gif: its clips .* would fill the memory"):
        open_world(str(tmp_path / "a.gif"))


# ---- which data is it? ---------------------------------------------------------------------

def test_a_fingerprint_is_of_the_content(tmp_path, monkeypatch):
    content = ramp(6, 20)
    first = open_world(save(tmp_path / "a.npy", content)).fingerprint
    (tmp_path / "a.npy").rename(tmp_path / "b.npy")
    assert open_world(str(tmp_path / "b.npy")).fingerprint == first
    # How it is read belongs to it; who said so, the shape or the user, does not.
    assert open_world(str(tmp_path / "b.npy"), layout="NTHW").fingerprint == first
    assert open_world(str(tmp_path / "b.npy"), layout="NTWH").fingerprint != first
    assert open_world(str(tmp_path / "b.npy"), border=True).fingerprint != first
    content[3, 10, 5, 5] += 1
    assert open_world(save(tmp_path / "a.npy", content)).fingerprint != first
    turned = save(tmp_path / "a.npy", ramp(6, 20).view(np.int8))
    assert open_world(turned).fingerprint != first
    # Of a large file blocks are read, the last among them.
    monkeypatch.setattr(clips, "BLOCK", 50)
    first = open_world(save(tmp_path / "a.npy", content)).fingerprint
    content[-1, -1, -1, -1] += 1
    assert open_world(save(tmp_path / "a.npy", content)).fingerprint != first


def test_a_folders_fingerprint_is_of_its_content(tmp_path):
    for name in ("one", "two"):
        write_pictures(tmp_path / name, ramp(1, 20)[0], name + "{}.png")
    first = open_world(str(tmp_path / "one")).fingerprint
    assert open_world(str(tmp_path / "two")).fingerprint == first
    Image.new("L", (16, 16)).save(tmp_path / "two" / "two7.png")
    assert open_world(str(tmp_path / "two")).fingerprint != first


def test_the_fingerprints_of_built_in_worlds(tmp_path):
    found = set()
    for name in ("shapes", "digits", "occluder"):
        for frames, size in ((12, 16), (24, 16), (12, 32)):
            world = open_world(name, frames, size, seed=1)
            assert world.fingerprint == open_world(name, frames, size, seed=2).fingerprint
            assert clips.fingerprint(make_world(name, frames, size)) == world.fingerprint
            found.add(world.fingerprint)
    assert len(found) == 9


def test_a_file_is_never_taken_for_a_built_in_world(tmp_path, monkeypatch):
    write_pictures(tmp_path / "shapes", ramp(1, 20)[0])
    monkeypatch.chdir(tmp_path)
    assert open_world("./shapes").name == "./shapes"
    monkeypatch.chdir(tmp_path / "shapes")
    assert open_world(".").name == "./shapes"


# ---- refusals ------------------------------------------------------------------------------

GOOD = ramp(5, 14)
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
    ("a.npy", GOOD * np.int64(100), r"int64 from 0 to 5300; .*\(array - 0\) / 5300"),
    ("a.npy", GOOD - np.int16(3), "int16 from -3 to 50"),
    ("a.npy", GOOD * 1j, "complex.*array.real"),
    ("a.npy", GOOD.astype("U3"), "<U3"),
    ("a.npy", GOOD * 1e3, r"values from 0 to 53000; .*\(array - 0\) / 53000"),
    ("a.npy", np.where(GOOD == 3, math.nan, GOOD), "a.npy: there is nan in frame 3 of clip 0"),
    ("a.npy", np.where(GOOD == 53, math.inf, GOOD), "there is inf in frame 13 of clip 4"),
    ("a.npy", np.where(GOOD == 53, -math.inf, GOOD), "there is -inf in frame 13 of clip 4"),
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
    assert "nan to nan" not in str(caught.value)


ARCHIVES = [
    (["a", "b"], "here are: a, b"),
    (["data", "video"], "here are: data, video"),
    ([], "here are: none"),
]


@pytest.mark.parametrize("names, says", ARCHIVES)
def test_an_archive_must_say_which_of_its_arrays_are_clips(tmp_path, names, says):
    np.savez(tmp_path / "a.npz", **dict.fromkeys(names, GOOD))
    with pytest.raises(ValueError, match=says) as caught:
        open_world(str(tmp_path / "a.npz"))
    assert "damaged" not in str(caught.value)


@pytest.mark.parametrize("names, taken", [(["a"], "'a'"), (["labels", "clips"], "'clips'")])
def test_an_archive_that_says_so(tmp_path, names, taken):
    np.savez(tmp_path / "a.npz", **dict.fromkeys(names, GOOD))
    assert f"array {taken}" in open_world(str(tmp_path / "a.npz")).reads


LAYOUT_FLAGS = [
    ("NTH", "a letter for each axis"),
    ("NTHH", "a letter for each axis"),
    ("NTHWX", "a letter for each axis"),
    ("THW", "--layout THW has 3 letters.* 4 axes"),
    ("CTHW", "--layout CTHW makes 5 channels"),
    ("NHWT", "too short|expected 12 or more"),
]


@pytest.mark.parametrize("layout, says", LAYOUT_FLAGS)
def test_layouts_that_cannot_be_get_one_line(tmp_path, layout, says):
    stored = GOOD[..., :8] if layout == "NHWT" else GOOD
    with pytest.raises(ValueError, match=says) as caught:
        open_world(save(tmp_path / "a.npy", stored), layout=layout)
    assert "\n" not in str(caught.value)


def test_flags_that_have_no_use_are_refused(tmp_path):
    write_gif(tmp_path / "a.gif", 20)
    with pytest.raises(ValueError, match="--layout is for arrays"):
        open_world(str(tmp_path / "a.gif"), layout="THW")
    for flags in (dict(layout="NTHW"), dict(border=True)):
        with pytest.raises(ValueError, match="clips of your own"):
            open_world("shapes", **flags)


def test_the_command_line_takes_the_flags(tmp_path, monkeypatch, capsys):
    """The refusal names the flag, and with it training would begin."""
    class Begun(Exception):
        pass

    def begin(model, recipe, world, *_):
        raise Begun(world.reads)

    monkeypatch.setattr(train, "Trainer", begin)
    path = save(tmp_path / "a.npy", np.repeat(ramp(14, 40), 2, axis=3))
    flags = [f"--data={path}", f"--out={tmp_path / 'out'}", "--device=cpu"]
    with pytest.raises(SystemExit) as caught:
        train.main(flags)
    assert caught.value.code == 2
    assert "--layout NTHW" in capsys.readouterr().err
    with pytest.raises(Begun, match="read as NTHW; 14 clips of 40 frames.*black border"):
        train.main([*flags, "--layout=NTHW", "--border"])


@pytest.mark.parametrize("bad", [{"frames": 0}, {"size": 4}, {"seed": -1}])
def test_impossible_worlds_are_refused(bad):
    with pytest.raises(ValueError, match="a world needs"):
        open_world("shapes", **bad)
