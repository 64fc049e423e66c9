"""Frames of any size become square ones of the model's size, and keep their aspect.

By default the centre of a frame is cut out; with a border the whole frame is kept, and black
fills the square.

Letters: F frames, (H, W) pixels as stored, (h, w) pixels in the model's frame without border,
C channels.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as nnf

MUCH_LOST = 0.4                            # of a frame: of 3:2 a third goes, of 16:9 44 %
MUCH_SMALLER = 8                           # times


class Framing(NamedTuple):
    """size: the side of the square in pixels."""
    size: int
    border: bool

    def cut(self, frames: np.ndarray) -> np.ndarray:
        """The part of frames [..., H, W, C] that is kept, a view."""
        if self.border:
            return frames
        height, width = frames.shape[-3:-1]
        side = min(height, width)
        top = (height - side) // 2
        left = (width - side) // 2
        return frames[..., top:top + side, left:left + side, :]

    def inner(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of a frame of that size when it is scaled, and not yet bordered."""
        if not self.border:
            return self.size, self.size
        longer = max(height, width)
        h = max(1, round(self.size * height / longer))
        w = max(1, round(self.size * width / longer))
        return h, w

    def scale(self, frames: np.ndarray) -> np.ndarray:
        """Frames [F, H, W, C] cut and resized to [F, h, w, C]."""
        shape = self.inner(*frames.shape[1:3])
        return resize(self.cut(frames), shape)

    def add_border(self, video: torch.Tensor) -> torch.Tensor:
        """Frames [F, C, h, w] in [-1, 1] in the middle of black ones [F, C, size, size]."""
        h, w = video.shape[-2:]
        top = (self.size - h) // 2
        left = (self.size - w) // 2
        sides = (left, self.size - w - left, top, self.size - h - top)
        return nnf.pad(video, sides, value=-1)

    # -- what is said about it, sizes as width x height

    def in_words(self, height: int, width: int) -> str:
        """What becomes of frames of that size; "" if nothing does."""
        square = f"{self.size}x{self.size}"
        if (height, width) == (self.size, self.size):
            return ""
        if height == width:
            return f"{height}x{width} resized to {square}"
        if self.border:
            h, w = self.inner(height, width)
            return f"{width}x{height} resized to {w}x{h} in a black border of {square}"
        side = min(height, width)
        if side == self.size:
            return f"the centre {square} of {width}x{height}"
        return f"the centre {side}x{side} of {width}x{height} resized to {square}"

    def warnings(self, sizes: list[tuple[int, int]]) -> list[str]:
        """What is lost at those sizes (H, W), of the frames that lose most."""
        said = []
        height, width = max(sizes, key=lost)
        if lost((height, width)) > MUCH_LOST and not self.border:
            said.append(f"{lost((height, width)):.0%} of a frame of {width}x{height} is cut "
                        "off; --border keeps all of it")
        kept = max if self.border else min
        times = max(kept(size) for size in sizes) / self.size
        if times > MUCH_SMALLER:
            said.append(f"frames become {times:.0f} times smaller, and what is smaller than "
                        f"{times:.0f} pixels vanishes; larger --config height and width show "
                        "more, and take longer")
        return said


def lost(size: tuple[int, int]) -> float:
    """The share of a frame (H, W) outside its centre square."""
    return 1 - min(size) / max(size)


def resize(frames: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Frames [F, H, W, C] as [F, h, w, C] of that shape, each pixel a weighted mean of what it
    covers. uint8 stays uint8; all else becomes float32, in its own unit."""
    if frames.shape[1:3] == shape:
        return frames
    kind = np.uint8 if frames.dtype == np.uint8 else np.float32
    pixels = torch.from_numpy(frames.astype(kind))         # a copy: a mapped file is read-only
    pixels = pixels.permute(0, 3, 1, 2)                    # [F, C, H, W]
    how = dict(mode="bilinear", antialias=True, align_corners=False)
    pixels = nnf.interpolate(pixels, shape, **how)         # [F, C, h, w]
    return pixels.permute(0, 2, 3, 1).numpy()
