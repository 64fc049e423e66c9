"""Videos as files: what is read back is what was written, at the speed that was asked for.

That a file is whole at every moment, whatever stops the program, is shown in test_robust.py.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
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
    were written."""
    times = shown(code, parts, seed, fps=fps)
    assert len(times) == sum(parts), "every frame is in the file, once"
    for milliseconds in times:
        assert abs(milliseconds - 1000 / fps) <= 5, f"{milliseconds} ms a frame, {fps} a second"


def test_a_gif_shows_sixteen_frames_a_second_unless_told_otherwise(code):
    assert shown(code, [3], 0) == pytest.approx([1000 / 16] * 3, abs=5)


@forall(levels=st.lists(st.sampled_from([0, 255]), min_size=3, max_size=3))
def test_a_gif_keeps_pure_colours(code, levels):
    """The worlds are drawn in them: red, green, blue, their mixtures, white and black."""
    frames = np.broadcast_to(np.array(levels, dtype=np.uint8), (1, 4, 6, 3)).copy()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "sample.gif"
        code.video_files.GifWriter(path).append(frames)
        with Image.open(path) as gif:
            assert np.array_equal(np.asarray(gif.convert("RGB")), frames[0])
