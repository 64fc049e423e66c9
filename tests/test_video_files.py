"""Videos as files: what is read back is what was written, at the speed that was asked for.

That a file is whole at every moment, whatever stops the program, is shown in test_robust.py.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from PIL import Image

from lab import forall, seeds


def some_frames(number: int, seed: int) -> np.ndarray:
    """Noise [number, 4, 6, 3]: no two frames are alike."""
    dice = np.random.default_rng((seed, number))
    return dice.integers(0, 256, (number, 4, 6, 3), dtype=np.uint8)


def shown(code, parts: list[int], seed: int, **how) -> list[int]:
    """Milliseconds that each frame of a GIF is shown which was written in these parts."""
    found = []
    with TemporaryDirectory() as folder:
        path = Path(folder) / "sample.gif"
        video = code.video_files.GifWriter(path, **how)
        for number in parts:
            video.append(some_frames(number, seed))
        with Image.open(path) as gif:
            for number in range(gif.n_frames):
                gif.seek(number)
                found.append(gif.info["duration"])
    return found


pieces = st.lists(st.integers(1, 3), min_size=1, max_size=4)


@forall(fps=st.integers(1, 50), parts=pieces, seed=seeds)
def test_frames_of_a_gif_last_as_long_as_they_should(code, fps, parts, seed):
    """1 / fps seconds each, as near as hundredths come to it, in however many pieces the frames
    were written. What is lost by one frame is made good by the next, so that every frame ends
    within half a hundredth of its time."""
    times = shown(code, parts, seed, fps=fps)
    assert len(times) == sum(parts), "every frame is in the file, once"
    end = 0
    for number, milliseconds in enumerate(times, 1):
        assert abs(milliseconds - 1000 / fps) < 10, f"{milliseconds} ms a frame, {fps} a second"
        end += milliseconds
        assert abs(end - 1000 * number / fps) <= 5, f"frame {number} ends at {end} ms"


def test_a_gif_shows_sixteen_frames_a_second_unless_told_otherwise(code):
    assert sum(shown(code, [16], 0)) == 1000


@forall(levels=st.lists(st.sampled_from([0, 255]), min_size=3, max_size=3))
def test_a_gif_keeps_pure_colours(code, levels):
    """The worlds are drawn in them: red, green, blue, their mixtures, white and black."""
    frames = np.broadcast_to(np.array(levels, dtype=np.uint8), (1, 4, 6, 3)).copy()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "sample.gif"
        code.video_files.GifWriter(path).append(frames)
        with Image.open(path) as gif:
            assert np.array_equal(np.asarray(gif.convert("RGB")), frames[0])


def frames_of(path: Path) -> np.ndarray:
    with Image.open(path) as gif:
        frames = []
        for number in range(gif.n_frames):
            gif.seek(number)
            frames.append(np.asarray(gif.convert("RGB")))
    return np.stack(frames)


def photographs() -> list[np.ndarray]:
    """Two pictures of scikit-learn, uint8 [h, w, 3]: a temple and a flower."""
    datasets = pytest.importorskip("sklearn.datasets")
    return [image[::2, ::2] for image in datasets.load_sample_images().images]


def film(picture: np.ndarray, frames: int) -> np.ndarray:
    """A camera moves over a picture: [frames, 160, 240, 3]."""
    return np.stack([picture[i:i + 160, 2 * i:2 * i + 240] for i in range(frames)])


def off(path: Path, true: np.ndarray) -> np.ndarray:
    """How far each frame of a GIF is from the true one, of 255, on average."""
    return np.abs(frames_of(path) - true.astype(int)).mean((1, 2, 3))


@pytest.mark.parametrize("which", [0, 1])
def test_a_gif_of_real_film_has_its_colours(code, tmp_path, which):
    """With the pure colours that fit drawn shapes it was 11 of 255 off."""
    true = film(photographs()[which], 24)
    gif = code.video_files.GifWriter(tmp_path / "film.gif")
    for first in range(0, 24, 3):
        gif.append(true[first:first + 3])
    assert off(gif.path, true).max() < 5
    size = true[0].size // 3
    assert gif.path.stat().st_size < 24 * size


def test_a_gif_follows_when_the_picture_leaves_its_colours(code, tmp_path):
    """Another scene: a red night, then a photograph."""
    night = np.zeros((6, 160, 240, 3), dtype=np.uint8)
    night[:, 40:120, 60:180, 0] = np.arange(6)[:, None, None] * 40 + 55
    scenes = np.concatenate((night, film(photographs()[0], 6), night))
    gif = code.video_files.GifWriter(tmp_path / "scenes.gif")
    for first in range(0, 18, 3):
        gif.append(scenes[first:first + 3])
    found = off(gif.path, scenes)
    assert found.max() < 6, found
    assert found[:3].max() < 0.1


def test_what_stays_dark_in_a_gif_does_not_flicker(code, tmp_path):
    """Black stays black, and a grey stays what it was, while something else changes."""
    true = np.zeros((12, 32, 64, 3), dtype=np.uint8)
    true[:, :, 40:] = 90
    dice = np.random.default_rng(0)
    true[:, :16, :16] = dice.integers(0, 256, (12, 16, 16, 3))
    gif = code.video_files.GifWriter(tmp_path / "dark.gif")
    for first in range(0, 12, 3):
        gif.append(true[first:first + 3])
    found = frames_of(gif.path)
    assert (found[:, :, 16:40] == 0).all()
    assert (found[:, :, 40:] == found[0, 0, 40]).all()


# ---- which file ------------------------------------------------------------------------------

@pytest.mark.parametrize("out, pictures, written", [
    ("out", False, "out/sample.gif"),
    ("deep/er", False, "deep/er/sample.gif"),
    ("a.gif", False, "a.gif"),
    ("A.GIF", False, "A.GIF"),
    ("a.Mp4", False, "a.Mp4"),
    ("a.webm", False, "a.webm"),
    ("run_0.5", False, "run_0.5/sample.gif"),
    (".hidden", False, ".hidden/sample.gif"),
    ("out", True, "out/sample"),
])
def test_out_names_a_file_or_a_folder(code, tmp_path, monkeypatch, out, pictures, written):
    monkeypatch.chdir(tmp_path)
    assert code.video_files.path_of(out, pictures) == Path(written)


def test_a_folder_may_have_any_name_if_it_is_there(code, tmp_path):
    folder = tmp_path / "run.webp"
    with pytest.raises(ValueError, match="ends in .webp"):
        code.video_files.path_of(str(folder), False)
    folder.mkdir()
    assert code.video_files.path_of(str(folder), False) == folder / "sample.gif"


@pytest.mark.parametrize("out, kind", [
    ("a.gif", "GifWriter"), ("A.GIF", "GifWriter"), ("sample", "PictureWriter")])
def test_each_path_gets_its_writer(code, tmp_path, out, kind):
    assert type(code.video_files.open_video(tmp_path / out)).__name__ == kind


# ---- films -----------------------------------------------------------------------------------

def test_a_film_says_what_to_install(code, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    for name in ("a.mp4", "a.WEBM"):
        with pytest.raises(ModuleNotFoundError, match="pip install av") as found:
            code.video_files.open_video(tmp_path / name)
        assert "\n" not in str(found.value)


@pytest.mark.parametrize("name", ["a.mp4", "A.WEBM"])
def test_a_film_has_its_frames_at_its_rate_and_can_be_cut_short(code, tmp_path, name):
    """40 frames, 7 at a time, of an odd size; and what is there before the end can be read."""
    av = pytest.importorskip("av")
    true = film(photographs()[1], 40)[:, :159, :239]
    path = tmp_path / "new" / name
    writer = code.video_files.open_video(path)
    assert not path.exists(), "nothing is written before there is a frame"
    for first in range(0, 40, 7):
        writer.append(true[first:first + 7])
    cut = tmp_path / f"cut{path.suffix}"
    cut.write_bytes(path.read_bytes())
    writer.close()
    writer.close()
    for file, least in ((path, 40), (cut, 16)):
        with av.open(str(file)) as video:
            assert video.streams.video[0].average_rate == 16
            shown = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
        assert len(shown) >= least
        found = np.stack(shown)[:, :159, :239]
        assert np.abs(found - true[:len(found)].astype(int)).mean() < 6


class FakeStream:
    """As far as FilmWriter knows PyAV's: an encoder that holds back two frames."""

    def __init__(self):
        self.codec_context = self
        self.held = []

    def encode(self, frame):
        if frame is None:
            return self.held
        self.held.append(frame)
        return [self.held.pop(0)] if len(self.held) > 2 else []


class FakeAv:
    """A module that notes what is written."""

    def __init__(self):
        self.VideoFrame = self
        self.written = []
        self.closed = False

    def from_ndarray(self, picture):
        assert picture.shape[0] % 2 == picture.shape[1] % 2 == 0, "yuv420p halves both sides"
        return picture

    def open(self, path, mode, format, options):
        assert (mode, format) == ("w", "mp4")
        return self

    def add_stream(self, codec, rate, options):
        self.codec, self.rate = codec, rate
        return FakeStream()

    def mux(self, packets):
        self.written += packets

    def close(self):
        self.closed = True


def test_a_film_is_written_to_its_last_frame(code, tmp_path, monkeypatch):
    """Where PyAV is not installed, too."""
    av = FakeAv()
    monkeypatch.setitem(sys.modules, "av", av)
    writer = code.video_files.open_video(tmp_path / "a.MP4")
    frames = np.stack([np.full((5, 7, 3), i, dtype=np.uint8) for i in range(6)])
    writer.append(frames[:3])
    writer.append(frames[3:])
    assert len(av.written) == 4
    writer.close()
    assert [picture[0, 0, 0] for picture in av.written] == list(range(6))
    assert av.closed and av.codec == "libx264" and av.rate == 16


def test_a_chunk_that_is_not_finite_is_an_error_and_not_a_grey_picture(code):
    for number in (float("nan"), float("inf")):
        chunk = torch.zeros(2, 3, 3, 4, 4)
        chunk[1, 2, 0, 3, 3] = number
        with pytest.raises(ValueError, match="not finite"):
            code.video_files.to_pixels(chunk)
