"""Videos as files that grow with the video: each is whole at every moment, whatever stops the
program. tests/test_robust.py stops it after every byte.

    GifWriter        .gif
    FilmWriter       .mp4 and .webm, where PyAV is installed
    PictureWriter    a folder of PNG files

Letters: B videos of a batch, F frames, (h, w) pixels of a frame.
"""

import re
from fractions import Fraction
from itertools import product
from pathlib import Path

import numpy as np
import torch.nn.functional as nnf
from PIL import GifImagePlugin, Image
from torch import Tensor

from engine.command_line import UserError
from toy_data import require

FPS = 16
FILMS = (".mp4", ".webm")
ENDINGS = (".gif", *FILMS)


def to_pixels(chunk: Tensor, zoom: int = 8) -> np.ndarray:
    """A chunk [B, F, 1 or 3, h, w] in about [-1, 1] as one picture a frame, the videos side by
    side: uint8 [F, zoom * h, zoom * (B * (w + 1) - 1), 3].

    Every pixel is blown up to zoom x zoom, and one grey pixel stands between two videos.
    UserError for a chunk with numbers that are not finite: it would be a grey picture.
    """
    if not chunk.isfinite().all():
        raise UserError("the model made numbers that are not finite, so this video ends here: "
                        "its weights or its dtype do not suit the model")
    levels = (chunk.float().clamp(-1, 1) + 1) * 127.5      # 0 ... 255
    pixels = levels.round().byte().cpu()                   # [B, F, c, h, w]
    pixels = pixels.permute(1, 0, 3, 4, 2)                 # [F, B, h, w, c]
    pixels = pixels.repeat_interleave(zoom, 2)
    pixels = pixels.repeat_interleave(zoom, 3)             # [F, B, zoom * h, zoom * w, c]
    pixels = nnf.pad(pixels, (0, 0, 0, zoom), value=128)   # a grey gap right of each video
    rows = pixels.permute(0, 2, 1, 3, 4)                   # [F, zoom * h, B, zoom * (w + 1), c]
    picture = rows.flatten(2, 3)[:, :, :-zoom]             # no gap right of the last
    return picture.expand(-1, -1, -1, 3).numpy()


# ---- which file ------------------------------------------------------------------------------

def path_of(out: str, pictures: bool) -> Path:
    """Where --out says that a video goes: the name of a file, or a folder and the name that a
    video gets there. UserError for an ending that is of no kind of file written here.

    In a folder of training sample.gif is training's own; what is played there is played.gif.
    """
    path = Path(out)
    ending = path.suffix.lower()
    if path.is_dir() or not re.fullmatch(r"\.[a-z][a-z0-9]*", ending):
        if pictures:
            return path / "sample"
        trained = (path / "train.pt").exists()
        return path / ("played.gif" if trained else "sample.gif")
    if pictures:
        raise UserError(f"--pictures writes a folder of PNG files, and --out {out} names a "
                        f"file: give --out a folder")
    if ending not in ENDINGS:
        raise UserError(f"--out {out} ends in {path.suffix}: give a name that ends in "
                        f"{', '.join(ENDINGS)}, or a folder")
    return path


# ---- GIF: colours ----------------------------------------------------------------------------

CORNERS = np.array(list(product((0, 255), repeat=3)), dtype=np.uint8)  # black, blue, ... white
NEAR = 8                       # Pillow looks for the nearest colour no more precisely


class Palette:
    """The up to 256 colours that suit some frames best: the pure ones, so that black stays
    black, and those that median cut finds."""

    def __init__(self, frames: np.ndarray):
        strip = Image.fromarray(frames.reshape(-1, *frames.shape[2:]))
        found = strip.quantize(256 - len(CORNERS), method=Image.Quantize.MEDIANCUT)
        colours = np.array(found.getpalette(), dtype=np.uint8).reshape(-1, 3)
        distance = np.abs(colours[:, None].astype(int) - CORNERS)      # [colours, 8, 3]
        far = (distance.max(2) >= NEAR).all(1)
        self.colours = np.concatenate((CORNERS, colours[far]))
        self.image = Image.new("P", (1, 1))
        self.image.putpalette(self.colours.tobytes())
        self.worst = 1 + 1.2 * self.error(frames)

    def paint(self, frame: np.ndarray) -> Image.Image:
        """A frame [h, w, 3] in these colours. There is no dithering: it would flicker."""
        return Image.fromarray(frame).quantize(palette=self.image, dither=Image.Dither.NONE)

    def error(self, frames: np.ndarray) -> float:
        """How far painted values are from the true ones, of 255, on the average of the worst
        frame."""
        worst = 0.0
        for frame in frames:
            painted = np.asarray(self.paint(frame).convert("RGB"), dtype=int)
            worst = max(worst, np.abs(painted - frame).mean())
        return worst

    def suits(self, frames: np.ndarray) -> bool:
        """Are these frames painted about as well as those that it was made for?"""
        return self.error(frames) <= self.worst


# ---- writers ---------------------------------------------------------------------------------
# A writer has `path`; `append(frames)`, uint8 [F, h, w, 3]; and `close()`, when no more come.

class GifWriter:
    """A GIF that frames can be appended to.

    The colours are those of the first frames. When the picture leaves them (another scene,
    another caption), later frames bring a palette of their own. Nothing that is written has to
    be looked at again: memory does not grow with the video.
    """

    def __init__(self, path: Path, fps: int = FPS):
        self.path = path
        self.fps = fps
        self.end = 0                               # where the trailer stands; 0: no file yet
        self.frames = 0
        self.common = None                         # the palette that stands in the header
        self.palette = None                        # the one that suits the latest frames

    def append(self, frames: np.ndarray) -> None:
        """Add frames, uint8 [F, h, w, 3]. The first call moves a whole file over an older one;
        what fails before that leaves the older one as it was."""
        if self.common is None:
            self.common = self.palette = Palette(frames)
        if not self.palette.suits(frames):
            self.palette = self.common if self.common.suits(frames) else Palette(frames)
        pictures = [self.palette.paint(frame) for frame in frames]
        data = b"".join(self._block(picture) for picture in pictures) + b";"
        if self.end == 0:
            self._begin(pictures[0], data)
        else:
            self._go_on(data)

    def close(self) -> None:
        """Nothing is left to do."""

    def _block(self, picture: Image.Image) -> bytes:
        """The next frame as it stands in the file, with its palette if that is a later one."""
        # Time is counted in hundredths of a second. Frames end at the hundredth that is
        # nearest, so the whole lasts as long as it should.
        begins = round(100 * self.frames / self.fps)
        self.frames += 1
        ends = round(100 * self.frames / self.fps)
        own = self.palette is not self.common
        how = dict(duration=10 * (ends - begins), include_color_table=own)
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


class FilmWriter:
    """An .mp4 (H.264) or .webm (VP9) file by PyAV; ModuleNotFoundError in one line without it.

    It is written in pieces of a second, each of which can be played when those behind it are
    missing; the last piece is in the file after `close`. An older file is replaced by the first
    frame.
    """

    def __init__(self, path: Path, fps: int = FPS):
        self.path = path
        self.fps = fps
        self.av = require("av", "av", f"a {path.suffix.lower()} file")
        self.container = None

    def append(self, frames: np.ndarray) -> None:
        """Add frames, uint8 [F, h, w, 3], all of one size; an odd side gets one pixel more."""
        h, w = frames.shape[1:3]
        even = ((0, 0), (0, h % 2), (0, w % 2), (0, 0))
        frames = np.pad(frames, even, mode="edge")
        if self.container is None:
            self._begin(*frames.shape[1:3])
        for frame in frames:
            picture = self.av.VideoFrame.from_ndarray(np.ascontiguousarray(frame))
            self.container.mux(self.stream.encode(picture))

    def close(self) -> None:
        """Write what the encoder still holds."""
        if self.container is not None:
            self.container.mux(self.stream.encode(None))
            self.container.close()
            self.container = None

    def _begin(self, height: int, width: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        mp4 = self.path.suffix.lower() == ".mp4"
        options = {"flush_packets": "1"}
        if mp4:                                    # without an index, which would come last
            options["movflags"] = "frag_keyframe+empty_moov+default_base_moof"
        codec = "libx264"
        how = {"crf": "18", "tune": "zerolatency"}
        if not mp4:
            codec = "libvpx-vp9"
            how = {"crf": "24", "b:v": "0", "deadline": "realtime", "lag-in-frames": "0"}
        self.container = self.av.open(str(self.path), "w", format=self.path.suffix[1:].lower(),
                                      options=options)
        self.stream = self.container.add_stream(codec, rate=Fraction(self.fps), options=how)
        self.stream.height = height
        self.stream.width = width
        self.stream.pix_fmt = "yuv420p"
        self.stream.codec_context.gop_size = self.fps


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

    def close(self) -> None:
        """Nothing is left to do."""


Writer = GifWriter | FilmWriter | PictureWriter


def open_video(path: Path) -> Writer:
    """The writer for a path that `path_of` gave."""
    ending = path.suffix.lower()
    if ending == ".gif":
        return GifWriter(path)
    if ending in FILMS:
        return FilmWriter(path)
    return PictureWriter(path)
