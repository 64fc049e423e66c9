"""Videos as files that grow with the video: each is whole at every moment, whatever stops the
program. tests/test_robust.py stops it after every byte.

Letters: B videos of a batch, F frames, (h, w) pixels of a frame.
"""

from pathlib import Path

import numpy as np
import torch.nn.functional as nnf
from PIL import GifImagePlugin, Image
from torch import Tensor

from engine.command_line import UserError


def to_pixels(chunk: Tensor, zoom: int = 8) -> np.ndarray:
    """A chunk [B, F, 1 or 3, h, w] in about [-1, 1] as one picture a frame, the videos side by
    side: uint8 [F, zoom * h, zoom * (B * (w + 1) - 1), 3].

    Every pixel is blown up to zoom x zoom, and one grey pixel stands between two videos.
    """
    levels = (chunk.float().clamp(-1, 1) + 1) * 127.5      # 0 ... 255
    pixels = levels.round().byte().cpu()                   # [B, F, c, h, w]
    pixels = pixels.permute(1, 0, 3, 4, 2)                 # [F, B, h, w, c]
    pixels = pixels.repeat_interleave(zoom, 2)
    pixels = pixels.repeat_interleave(zoom, 3)             # [F, B, zoom * h, zoom * w, c]
    pixels = nnf.pad(pixels, (0, 0, 0, zoom), value=128)   # a grey gap right of each video
    rows = pixels.permute(0, 2, 1, 3, 4)                   # [F, zoom * h, B, zoom * (w + 1), c]
    picture = rows.flatten(2, 3)[:, :, :-zoom]             # no gap right of the last
    return picture.expand(-1, -1, -1, 3).numpy()


def fixed_palette() -> list[int]:
    """Red, green and blue of 7 x 7 x 5 colours, one after the other."""
    values = []
    for red in range(7):
        for green in range(7):
            for blue in range(5):
                values.append(round(255 * red / 6))
                values.append(round(255 * green / 6))
                values.append(round(255 * blue / 4))
    return values


class GifWriter:
    """A GIF that frames can be appended to.

    All frames share one fixed palette, so nothing that is written has to be looked at again:
    memory does not grow with the video.
    """

    def __init__(self, path: Path, fps: int = 16):
        self.path = path
        self.end = 0                               # where the trailer stands; 0: no file yet
        self.duration = round(100 / fps) * 10      # milliseconds, which a GIF counts by tens
        self.palette = Image.new("P", (1, 1))
        self.palette.putpalette(fixed_palette())

    def append(self, frames: np.ndarray) -> None:
        """Add frames, uint8 [F, h, w, 3]. The first call moves a whole file over an older one;
        what fails before that leaves the older one as it was."""
        pictures = [self._in_palette(frame) for frame in frames]
        data = b"".join(self._block(picture) for picture in pictures) + b";"
        if self.end == 0:
            self._begin(pictures[0], data)
        else:
            self._go_on(data)

    def _in_palette(self, frame: np.ndarray) -> Image.Image:
        return Image.fromarray(frame).quantize(palette=self.palette, dither=Image.Dither.NONE)

    def _block(self, picture: Image.Image) -> bytes:
        """A frame as it stands in the file, without colours of its own."""
        how = dict(duration=self.duration, include_color_table=False)
        return b"".join(GifImagePlugin.getdata(picture, **how))

    def _begin(self, picture: Image.Image, data: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_name(self.path.name + ".part")
        header, _ = GifImagePlugin.getheader(picture, info={"loop": 0})
        content = b"".join(header) + data
        scratch.write_bytes(content)
        scratch.replace(self.path)
        self.end = len(content) - 1

    def _go_on(self, data: bytes) -> None:
        """Readers stop at the trailer ";". So first all that belongs behind it is written, then
        the one byte that turns it into the beginning of the next frame."""
        first = data[:1]
        rest = data[1:]
        with open(self.path, "r+b", buffering=0) as file:
            file.seek(self.end + 1)
            if file.write(rest) < len(rest):
                raise OSError(f"the disk is full: {self.path} ends here")
            file.seek(self.end)
            file.write(first)
        self.end += len(rest)


class PictureWriter:
    """The same as PNG files 000000000.png, 000000001.png, ...: each is whole from the moment on
    at which it has its name, and none is touched again.

    UserError if the folder has pictures already: those of an older, longer video would stay
    behind the new ones.
    """

    def __init__(self, path: Path):
        self.path = path
        self.end = 0                                       # the number of the next picture
        if any(path.glob("*.png")):
            raise UserError(f"{path} has pictures already: choose another folder with --out, "
                            "or empty it")

    def append(self, frames: np.ndarray) -> None:
        """Add frames, uint8 [F, h, w, 3]."""
        self.path.mkdir(parents=True, exist_ok=True)
        scratch = self.path / "next.part"
        for frame in frames:
            Image.fromarray(frame).save(scratch, "PNG")
            scratch.replace(self.path / f"{self.end:09d}.png")
            self.end += 1
