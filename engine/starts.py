"""A video that begins with frames of one's own, and goes on from there.

Whole chunks of true frames are committed, as if the model had made them. What is left, one or
two frames of a chunk, is *held* while the rest of its chunk is made: at every pass the model
sees the true frames beside the noisy ones, and is asked for the others alone. A single picture
is held, too. (To repeat it until it fills a chunk would freeze the video: three equal frames
are a past in which nothing moves.)

tests/test_starts.py. experiments/starts.py measures the seam, and how videos move on from a
single picture.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.clip_files import PICTURES, picture
from engine.clips import Stored
from engine.command_line import UserError
from engine.framing import Framing
from engine.layouts import TooShort
from flow import Draws, GuidedStream, Stream, add_noise, one_level, rollout
from mla_video import Config


# ---- reading ---------------------------------------------------------------------------------

def read_start(path: str, config: Config, layout: str | None = None) -> tuple[Tensor, str]:
    """(frames [1, F, channels, h, w] of a clip or a picture, cut to the square frames of the
    model; a line on what was read). UserError in one line if that cannot be."""
    size = config.height
    if config.width != size:
        raise UserError("--start is for models of square frames, and these have "
                        f"{config.width} x {size} pixels")
    file = Path(path)
    if not file.exists():
        raise UserError(f"there is no clip and no picture at {path}")
    if file.suffix.lower() in PICTURES:
        frames, said = read_picture(file, size)
    else:
        frames, said = read_clip(file, config, layout)
    if config.channels == 1:
        frames = frames.mean(1, keepdim=True)
    return frames[None], said


def read_picture(file: Path, size: int) -> tuple[Tensor, str]:
    """(frames [1, 3, size, size] in [-1, 1], what was read)"""
    pixels = picture(file)                                 # [H, W, 3]
    framing = Framing(size, border=False)
    said = [f"{file.name}: a picture", framing.in_words(*pixels.shape[:2])]
    pixels = np.array(framing.scale(pixels[None]))         # a copy that torch may write to
    frames = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    return frames, "; ".join(filter(None, said))


def read_clip(file: Path, config: Config, layout: str | None) -> tuple[Tensor, str]:
    """(frames [F, 3, size, size] in [-1, 1] of the first clip, what was read)"""
    # The more frames a clip must have, the fewer readings an array has: no axis of channels is
    # 5 long.
    for fewest in (config.frames, 5, 1):
        try:
            clips = Stored(file, fewest, config.height, 0, layout)
            break
        except TooShort:
            if fewest == 1:
                raise
    stack, _ = clips.places[0]
    clips.frames = stack.clips.shape[1]                    # a window is now the whole clip
    said = clips.reads
    if len(clips.places) > 1:
        said = f"{said}; its first clip"
    return clips.window(0, 0), said


# ---- going on --------------------------------------------------------------------------------

@torch.no_grad()
def go_on_from(start: Tensor, stream: Stream | GuidedStream, frames: int, draws: Draws,
               **how) -> Iterator[Tensor]:
    """As `rollout`, but the videos begin with the frames `start` [1 or B, F, ...], and then
    come `frames` more, in whole chunks; 0 has no end. `how` goes to `rollout`."""
    like = stream.chunk_like()
    videos, chunk = like.shape[:2]
    start = start.to(like).expand(videos, -1, -1, -1, -1)
    length = start.shape[1]
    whole = length - length % chunk
    for first in range(0, whole, chunk):
        part = start[:, first:first + chunk]
        stream.commit(part)
        yield part
    rest = start[:, whole:]                                # less than a chunk
    made = 0
    if rest.shape[1]:
        held = Held(stream, rest, draws, alone=whole == 0)
        yield from rollout(held, chunk, draws, **how)
        made = chunk - rest.shape[1]
    if frames == 0 or made < frames:
        more = frames and frames - made
        yield from rollout(stream, more, draws, **how)


class Held:
    """A stream whose next chunk begins with the frames `known` [B, n, ...].

    Where they are known, the velocity is the one that leads to them: v = (x - known) / sigma,
    by (F4). So every sampler arrives at them exactly. The model sees them at a noise level of
    their own: after a true past at that of the whole chunk, as in training. If they stand
    `alone`, at the beginning of a video, they say what is shown and where, and that level would
    hide it while the rest is decided. So they are less noisy then; yet not clean at once, which
    freezes the video (experiments/starts.py tries levels).
    """

    def __init__(self, stream: Stream | GuidedStream, known: Tensor, draws: Draws, alone: bool):
        self.stream = stream
        self.known = known
        self.eps = draws.normal(*known.shape).to(known)
        self.alone = alone

    def chunk_like(self) -> Tensor:
        """As Stream's."""
        return self.stream.chunk_like()

    def level(self, sigma: float) -> float:
        """The noise level of the known frames when the others are at sigma."""
        return 0.9 * sigma**3 if self.alone else sigma

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        """As Stream's."""
        n = self.known.shape[1]
        levels = one_level(x, sigma)                       # [B, F]
        levels[:, :n] = self.level(sigma)
        shown = add_noise(self.known, self.eps, levels[:, :n])
        v = velocity_at(self.stream, torch.cat((shown, x[:, n:]), 1), levels)
        v_known = (x[:, :n] - self.known) / sigma
        return torch.cat((v_known, v[:, n:]), 1)

    def commit(self, x: Tensor) -> None:
        """As Stream's."""
        self.stream.commit(x)


def velocity_at(stream: Stream | GuidedStream, x: Tensor, levels: Tensor) -> Tensor:
    """`stream.velocity` with a noise level for each frame, [B, F]."""
    if isinstance(stream, GuidedStream):
        v = velocity_at(stream.captioned, x, levels)
        v_plain = velocity_at(stream.plain, x, levels)
        return v_plain + stream.weight * (v - v_plain)
    return stream.model.denoise(x, levels, stream.caption, stream.cache, stream.attend)
