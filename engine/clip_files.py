"""Clips from files: arrays, GIFs, videos, numbered pictures, and folders of them.

    clips.npy, clips.npz                      clips in an array
    clip.gif, clip.mp4, ...                   one clip
    folder/  0001.png 0002.png ...            one clip
    folder/  a.gif b.mp4 ...                  a clip each
    folder/  a.npy b.npy ...                  an array of clips each
    folder/  a/0001.png ... b/0001.png ...    a clip each

Frames are brought to the model's size as they are read, once: to resize them at every step
would take longer than the step. An array of that size already stays on disk, and is mapped.

Letters: N clips, T frames, (H, W) pixels as stored, (h, w) as kept, C channels.
"""

import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import numpy as np

from engine.command_line import UserError
from engine.framing import Framing
from engine.layouts import TooShort, as_clips, find_layout, several
from engine.parallel import rank
from engine.pixel_values import Values, pieces
from toy_data import require

ARRAYS = (".npy", ".npz")
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm")
FILMS = (".gif", *VIDEOS)
PICTURES = (".png", ".jpg", ".jpeg")
ROOM = 2**32                               # bytes of clips that are held in memory
MOST_PIXELS = 2**30                        # of a GIF: a small file may unfold to anything
TICK = 10                                  # milliseconds: the unit of a GIF's times
SILENCE = 5                                # seconds between two lines on how far it is


class Stack(NamedTuple):
    """Clips of one length and size."""
    clips: np.ndarray                      # [N, T, h, w, C], or as stored: [N, T, H, W, C]
    path: Path                             # the file or folder that they are from
    size: tuple[int, int]                  # (H, W)
    layout: str = ""                       # of an array
    stored: str = ""                       # its dtype, shape and layout in words
    rates: tuple[float, ...] = ()          # frames a second, where the file says it


def told(parts: list, what: str) -> Iterator:
    """The parts one by one, with a line now and then on how far it is."""
    spoken = time.monotonic()
    for number, part in enumerate(parts):
        if time.monotonic() - spoken > SILENCE:
            spoken = time.monotonic()
            if rank() == 0:
                print(f"{what}: {100 * number // len(parts)} %", file=sys.stderr, flush=True)
        yield part


# ---- what is at a path -----------------------------------------------------------------------

def clip_files(path: Path) -> list[Path]:
    """The files and folders of pictures that hold clips: `path` itself, or what is in that
    folder, in the order of their numbers. UserError if there are none, or of several kinds."""
    if not path.is_dir():
        return [path]
    kinds = defaultdict(list)
    for part in sorted(path.iterdir(), key=by_number):
        kind = kind_of(part)
        if kind and not part.name.startswith("."):
            kinds[kind].append(part)
    if not kinds:
        raise UserError(f"{path}: no clips in this folder; expected {' '.join(ARRAYS)}, "
                        f"{' '.join(FILMS)} files, numbered {' '.join(PICTURES)} pictures, or "
                        "folders of such pictures")
    if len(kinds) > 1:
        found = [f"{kind} ({parts[0].name})" for kind, parts in kinds.items()]
        raise UserError(f"{path}: holds {' and '.join(found)}; expected one kind in a folder")
    kind, parts = kinds.popitem()
    if kind == "pictures":
        return [path]
    return parts


def kind_of(path: Path) -> str:
    """"" for what is no clip."""
    if path.is_dir():
        pictures = [part for part in path.iterdir() if part.suffix.lower() in PICTURES]
        return "folders of pictures" if pictures else ""
    for kind, endings in (("arrays", ARRAYS), ("films", FILMS), ("pictures", PICTURES)):
        if path.suffix.lower() in endings:
            return kind
    return ""


def by_number(path: Path) -> list:
    """frame2 before frame10."""
    parts = re.split(r"(\d+)", path.name)                  # text and numbers take turns
    parts[1::2] = [int(number) for number in parts[1::2]]
    return parts


def pictures_of(folder: Path) -> list[Path]:
    """The pictures of one clip in their order. UserError unless they are numbered alike."""
    found = {}
    first = None
    for path in sorted(folder.iterdir(), key=by_number):
        if path.suffix.lower() not in PICTURES or path.name.startswith("."):
            continue
        numbered = re.fullmatch(r"(.*?)(\d+)(\D*)", path.stem)
        if not numbered:
            raise UserError(f"{path.name} has no number; expected pictures of one "
                            "clip, numbered 0001.png, 0002.png, ...")
        before, number, behind = numbered.groups()
        first = first or (before, behind, path.name)
        twice = found.setdefault(int(number), path) != path
        if twice or (before, behind) != first[:2]:
            other = found[int(number)].name if twice else first[2]
            raise UserError(f"{other} and {path.name} are not of one sequence; "
                            "expected a folder for each clip, its pictures numbered alike")
    return list(found.values())


# ---- reading ---------------------------------------------------------------------------------

class Reader:
    """Reads files one after the other, and keeps count of values and memory.

    `frames` is what a window needs, `layout` the one that was given, if any.
    """

    def __init__(self, framing: Framing, frames: int, layout: str | None):
        self.framing = framing
        self.frames = frames
        self.layout = layout
        self.values = Values()
        self.held = 0                      # bytes of clips in memory
        self.many = False                  # several files
        self.short = []                    # those of them that no window fits in
        self.slow = []                     # what to say of arrays that are scaled at each step

    def read(self, files: list[Path]) -> list[Stack]:
        """The clips of each; UserError that names the file for one that cannot be read. Of
        several files those that are too short are left out."""
        self.many = len(files) > 1
        stacks = []
        for path in told(files, "reading clips"):
            try:
                stacks.append(self.read_file(path))
            except TooShort:
                self.short.append(path)
                if len(self.short) == len(files):
                    raise
        return stacks

    def read_file(self, path: Path) -> Stack:
        read = self.reader_of(path)
        try:
            return read(path)
        except PermissionError:
            raise
        except UserError as error:
            kind = type(error)
            raise kind(f"{path}: {error}") from error
        # Whatever the decoder raised, the user learns which file, and why, in one line.
        except Exception as error:
            said = " ".join(str(error).split())
            why = said[:300] or type(error).__name__
            kind = path.suffix.lower() or "picture"
            raise UserError(f"{path}: damaged, or not really a {kind} file ({why})") from error

    def warnings(self) -> list[str]:
        said = list(self.slow)
        if self.short:
            said.append(f"{several(len(self.short), 'file')} of clips shorter than "
                        f"{self.frames} frames left out, e.g. {self.short[0].name}")
        return said

    def reader_of(self, path: Path):
        """The method for such a file; ModuleNotFoundError says what to install for it."""
        ending = path.suffix.lower()
        if not path.is_dir() and not path.is_file():
            ending = "no file"
        if path.is_dir() or ending == ".gif":
            require("PIL.Image", "pillow", "a picture")
            return self.read_pictures if path.is_dir() else self.read_gif
        if ending in ARRAYS:
            return self.read_array
        if ending in VIDEOS:
            require("av", "av", f"a {ending} file")
            return self.read_video
        raise UserError(f"{path}: not a kind of file that can be read; give "
                        f"{', '.join(ARRAYS)}, .gif, one of {' '.join(VIDEOS)}, a folder of "
                        "them, or of numbered pictures")

    def hold(self, size: int) -> None:
        """UserError if so many bytes more are too many."""
        self.held += size
        if self.held > ROOM:
            raise UserError(f"its clips of {self.framing.size} pixels would fill the memory "
                            f"(more than {ROOM >> 30} GiB): take fewer, or put them into one "
                            ".npy of that size, which stays on disk")

    # -- arrays

    def read_array(self, path: Path) -> Stack:
        name = ""
        if path.suffix.lower() == ".npz":
            array, name = array_of_archive(path)
        else:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        layout = find_layout(array, self.frames, self.layout)
        stored = f"{name}{array.dtype} {list(array.shape)} read as {layout}"
        if layout == "TNHW":
            stored += " (time first, as Moving MNIST)"
        clips = as_clips(array, layout)
        if clips.shape[-1] == 4:
            stored += ", alpha dropped"
        self.values.note_array(clips)
        size = clips.shape[2:4]
        clips = self.scaled(clips[..., :3], path)
        return Stack(clips, path, size, layout, stored)

    def scaled(self, clips: np.ndarray, path: Path) -> np.ndarray:
        """Clips [N, T, H, W, C] as [N, T, h, w, C]; as they are if the result is too large for
        the memory, and then each window is scaled when it is drawn."""
        cut = self.framing.cut(clips)
        count, length, height, width, channels = cut.shape
        h, w = self.framing.inner(height, width)
        same = (height, width) == (h, w)
        kind = np.uint8 if cut.dtype == np.uint8 else np.float32
        need = count * length * h * w * channels * np.dtype(kind).itemsize
        if self.many:                      # so many mapped files cannot be open at once
            self.hold(need)
            if same:
                return np.array(cut)
        if same:
            return cut
        if need > ROOM:
            self.slow.append(f"resized, these clips would take {need / 2**30:.0f} GiB, more "
                             "than is held in memory: each step resizes its own, which is "
                             "slow; store them resized")
            return cut
        scaled = np.empty((count, length, h, w, channels), kind)
        for which, when in told(list(pieces(cut)), f"{path.name}: resizing, once"):
            part = cut[which, when]
            frames = part.reshape(-1, *cut.shape[2:])      # [F, H, W, C]
            frames = self.framing.scale(frames)            # [F, h, w, C]
            scaled[which, when] = frames.reshape(*part.shape[:2], h, w, channels)
        return scaled

    # -- films

    def read_gif(self, path: Path) -> Stack:
        image = import_module("PIL.Image")
        sequence = import_module("PIL.ImageSequence")
        with image.open(path) as gif:
            if gif.n_frames * gif.width * gif.height > MOST_PIXELS:
                raise UserError(f"{gif.n_frames} pictures of {gif.width} x {gif.height} "
                                "would fill the memory")
            times = []                     # of each frame, in milliseconds

            def frames():
                for frame in sequence.Iterator(gif):
                    # An old rule of browsers: without a duration it is a tenth of a second.
                    times.append(frame.info.get("duration") or 100)
                    yield np.asarray(frame.convert("RGB"))

            clip = self.collect(frames(), path, set())
            return clip._replace(rates=rates_of(times))

    def read_video(self, path: Path) -> Stack:
        av = import_module("av")
        with av.open(str(path)) as video:
            stream = video.streams.video[0]
            stretch = float(stream.sample_aspect_ratio or 1)   # of pixels that are not square
            rates = {float(stream.average_rate)} if stream.average_rate else set()

            def frames():
                for frame in video.decode(stream):
                    shown = dict(width=round(frame.width * stretch), height=frame.height)
                    pixels = frame.to_ndarray(format="rgb24", **shown)
                    # A telephone held upright films lying frames, and notes the turn.
                    yield np.rot90(pixels, round(getattr(frame, "rotation", 0) / 90))

            return self.collect(frames(), path, rates)

    def read_pictures(self, folder: Path) -> Stack:
        paths = pictures_of(folder)

        def frames():
            for path in told(paths, f"{folder.name}: reading pictures"):
                yield picture(path)

        return self.collect(frames(), folder, set())

    def collect(self, frames: Iterator[np.ndarray], path: Path, rates: set) -> Stack:
        """Frames uint8 [H, W, 3] as one clip. They are scaled as they come, or a minute of film
        would fill the memory."""
        scaled = []
        size = None
        for frame in frames:
            size = size or frame.shape[:2]
            if frame.shape[:2] != size:
                raise UserError(f"frame {len(scaled)} has {frame.shape[1]}x{frame.shape[0]} "
                                f"pixels, and those before it {size[1]}x{size[0]}")
            self.values.note(frame)
            small = self.framing.scale(frame[None])
            self.hold(small.nbytes)
            scaled.append(small)
        if not scaled:
            raise UserError("no frames in it")
        if len(scaled) < self.frames:
            raise TooShort(f"a clip of {several(len(scaled), 'frame')} is too short; expected "
                           f"{self.frames} or more")
        clip = np.concatenate(scaled)                      # [T, h, w, 3]
        return Stack(clip[None], path, size, rates=tuple(rates))


def rates_of(times: list[float]) -> tuple[float, ...]:
    """Frames a second of a GIF whose frames last so many milliseconds each. A GIF counts in
    ticks of 10, so times that differ by no more than one are one rate: their mean's."""
    if max(times) - min(times) <= TICK:
        return (1000 / mean(times),)
    return tuple({1000 / time for time in times})


def array_of_archive(path: Path) -> tuple[np.ndarray, str]:
    """(the clips in an .npz file, their name for `reads`)"""
    with np.load(path, allow_pickle=False) as archive:
        # A file of 4 MB may unfold to more than that.
        unfolded = sum(member.file_size for member in archive.zip.infolist())
        if unfolded > ROOM:
            raise UserError("it unfolds to more than 4 GiB: unpack it; an .npy file stays "
                            "on disk")
        names = archive.files
        if len(names) > 1:
            names = [name for name in ("data", "clips", "video") if name in archive.files]
        if len(names) != 1:
            raise UserError(f"expected one array, or one that is called data, clips or video, "
                            f"and here are: {', '.join(archive.files) or 'none'}")
        return archive[names[0]], f"array {names[0]!r}, "


def picture(path: Path) -> np.ndarray:
    """uint8 [H, W, 3], upright."""
    image = import_module("PIL.Image")
    upright = import_module("PIL.ImageOps").exif_transpose
    try:
        with image.open(path) as file:
            turned = upright(file)
            if turned.mode.startswith("I;16"):             # sixteen bits of grey
                grey = np.asarray(turned) >> 8
                return np.repeat(grey[..., None], 3, -1).astype(np.uint8)
            return np.asarray(turned.convert("RGB"))
    except OSError as error:
        raise UserError(f"{path.name} is damaged, or no picture ({error})") from error
