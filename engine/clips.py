"""Your own clips as a world: .npy or .npz arrays, GIFs and video files.

`open_world` takes the name of a built-in world or the path of such a file.

Letters: N clips, T frames of a stored clip, F frames of a window, H, W pixels as stored,
C channels (1 grey, 3 RGB, 4 RGBA).
"""

from importlib import import_module
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf

from toy_data import CAPTION_SLOTS, WORLDS, Clips, make_world, require

VIDEO_FILES = (".mp4", ".avi", ".mov", ".mkv", ".webm")
FILES = (".npy", ".npz", ".gif") + VIDEO_FILES
CHANNELS = (1, 3, 4)


# A damaged header overflows before it is refused: one line says so, not two.
@np.errstate(all="ignore")
def open_world(data: str, frames: int = 12, size: int = 16, seed: int = 0) -> Clips:
    """The built-in world called `data`, or the clips in the file of that path.

    Its clips have `frames` frames of `size` x `size` pixels. FileNotFoundError, ValueError or
    ModuleNotFoundError, one line each, says what is wrong and what would be right.
    """
    if data in WORLDS:
        return make_world(data, frames, size, seed)
    path = Path(data)
    if not path.exists():
        names = ", ".join(WORLDS)
        raise FileNotFoundError(f"no world and no file called {str(data)!r}; "
                                f"give {names} or a path to your clips")
    return Stored(path, frames, size, seed)


class Stored(Clips):
    """Windows of F frames, drawn at random from the clips of a user's file, without captions.

    Only the window asked for is turned into floats; an .npy file stays on disk and is
    memory-mapped.
    """

    def __init__(self, path: Path, frames: int, size: int, seed: int):
        super().__init__(path.name, frames, size, seed)
        array, remark = read_file(path, size)
        self.array, layout = as_clips(array, frames, path)     # a view [N, T, H, W, C]
        self.gain, self.offset, values = value_range(array, path)
        count, length, height, width, channels = self.array.shape
        if length < frames:
            raise ValueError(f"{path}: clips of {length} frames (read as {layout}) "
                             f"are too short; expected {frames} or more")

        assumed = [
            f"{path.name}: {remark}{array.dtype} {list(array.shape)} read as {layout}",
            f"{count} clip(s) of {length} frames",
            values,
        ]
        if channels == 1:
            assumed.append("grey -> 3 equal channels")
        if channels == 4:
            assumed.append("alpha dropped")
        if (height, width) != (size, size):
            assumed.append(f"{height}x{width} resized to {size}x{size}")
        self.reads = "; ".join(assumed)

    def batch(self, indices):
        clips = [self.window(index) for index in indices]
        captions = torch.zeros(len(clips), CAPTION_SLOTS, dtype=torch.long)
        return torch.stack(clips), captions

    def window(self, index: int) -> torch.Tensor:
        """Window `index` as float32 [F, 3, size, size] in [-1, 1]."""
        rng = np.random.default_rng((self.seed, int(index)))
        count, length = self.array.shape[:2]
        which = rng.integers(count)
        first = rng.integers(length - self.frames + 1)
        stored = self.array[which, first:first + self.frames, ..., :3]

        pixels = torch.from_numpy(stored.astype(np.float32))   # a copy of this window alone
        video = pixels.permute(0, 3, 1, 2)                     # [F, C, H, W]
        video = video * self.gain + self.offset                # in [-1, 1]
        shape = (self.size, self.size)
        if video.shape[-2:] != shape:
            how = dict(mode="bilinear", antialias=True, align_corners=False)
            video = nnf.interpolate(video, shape, **how)
        return video.clamp(-1, 1).expand(-1, 3, -1, -1)


# ---- reading a file ------------------------------------------------------------------------

def read_file(path: Path, size: int) -> tuple[np.ndarray, str]:
    """(array as stored, a remark for `reads`). GIF and video come as uint8 [1, T, H, W, 3]."""
    kind = path.suffix.lower()
    if not path.is_file() or kind not in FILES:
        videos = " ".join(VIDEO_FILES)
        raise ValueError(f"{path}: not a kind of file that can be read; "
                         f"give .npy, .npz, .gif or one of {videos}")
    read = reader_of(kind)
    try:
        return read(path, size)
    # Whatever the decoder raised, the user learns which file, and why, in one line.
    except Exception as error:
        said = " ".join(str(error).split())
        why = said[:300] or type(error).__name__
        raise ValueError(f"{path}: damaged, or not really a {kind} file ({why})") from error


def reader_of(kind: str):
    """The function that reads such a file; ModuleNotFoundError says what to install for it."""
    if kind == ".npy":
        return read_npy
    if kind == ".npz":
        return read_npz
    if kind == ".gif":
        require("PIL.Image", "pillow", "a GIF")
        return read_gif
    require("av", "av", f"a {kind} file")
    return read_video


def read_npy(path: Path, size: int) -> tuple[np.ndarray, str]:
    return np.load(path, mmap_mode="r", allow_pickle=False), ""


def read_npz(path: Path, size: int) -> tuple[np.ndarray, str]:
    """The array called data, clips or video; else the first one."""
    with np.load(path, allow_pickle=False) as archive:
        # A file of 4 MB may unfold to more than that.
        unfolded = sum(member.file_size for member in archive.zip.infolist())
        if unfolded > 2**32:
            raise ValueError("it unfolds to more than 4 GiB: unpack it; "
                             "an .npy file stays on disk")
        known = [name for name in ("data", "clips", "video") if name in archive.files]
        names = known + archive.files
        if not names:
            return np.empty(0), "array '', "
        return archive[names[0]], f"array {names[0]!r}, "


def read_gif(path: Path, size: int) -> tuple[np.ndarray, str]:
    image = import_module("PIL.Image")
    sequence = import_module("PIL.ImageSequence")
    with image.open(path) as gif:
        if gif.n_frames * gif.width * gif.height > 2**30:
            raise ValueError(f"{gif.n_frames} pictures of {gif.width} x {gif.height} "
                             "would fill the memory")
        frames = [np.asarray(frame.convert("RGB")) for frame in sequence.Iterator(gif)]
    return np.stack(frames)[None], f"{len(frames)} frames, "


def read_video(path: Path, size: int) -> tuple[np.ndarray, str]:
    """Frames are shrunk as they are decoded, or a minute of film would fill the memory."""
    av = import_module("av")
    shrunk = dict(width=size, height=size, format="rgb24", interpolation="AREA")
    with av.open(str(path)) as video:
        frames = [frame.to_ndarray(**shrunk) for frame in video.decode(video=0)]
    return np.stack(frames)[None], f"{len(frames)} frames resized while decoding, "


# ---- what axes and values mean -------------------------------------------------------------

def as_clips(array: np.ndarray, frames: int, path: Path) -> tuple[np.ndarray, str]:
    """(view [N, T, H, W, C], the layout as words): what the axes mean.

    It is decided by this rule and by nothing else.
    """
    shape = list(array.shape)
    if not array.size:
        raise ValueError(f"{path}: the array is empty (shape {shape}); "
                         "expected clips such as [N, T, H, W]")
    if array.ndim == 5 and shape[4] in CHANNELS:
        return array, "[N, T, H, W, C]"
    if array.ndim == 5 and shape[2] in CHANNELS:
        return np.moveaxis(array, 2, 4), "[N, T, C, H, W]"
    if array.ndim == 4:
        return four_axes_as_clips(array, frames)
    if array.ndim == 3:
        return array[None, ..., None], "[T, H, W], one clip"
    raise ValueError(f"{path}: cannot read shape {shape} as clips; expected [N, T, H, W], "
                     "[T, N, H, W] (Moving MNIST) or [N, T, H, W, C] with C of 1, 3 or 4")


def four_axes_as_clips(array: np.ndarray, frames: int) -> tuple[np.ndarray, str]:
    """One clip with channels, or grey clips; Moving MNIST (time first) shows by its lengths."""
    first, second, _, last = array.shape
    if last in CHANNELS:                                       # no picture is that narrow
        return array[None], "[T, H, W, C], one clip"
    grey = array[..., None]
    if first == 20 or frames <= first < second:
        reason = f"the first axis is 20, or is the shorter and still holds {frames} frames"
        remedy = "add a last axis of 1 if clips come first"
        return grey.swapaxes(0, 1), f"[T, N, H, W] (Moving MNIST: {reason}; {remedy})"
    return grey, "[N, T, H, W]"


def value_range(array: np.ndarray, path: Path) -> tuple[float, float, str]:
    """(gain, offset, the range as words): gain * stored + offset is in [-1, 1]."""
    if array.dtype == np.uint8:
        low, high = 0, 255
    elif array.dtype.kind == "f":
        # One pass over the file, no copy. Both ends are NaN if any value is, and then no
        # range below fits.
        low = float(array.min())
        high = float(array.max())
    else:
        raise ValueError(f"{path}: values are {array.dtype}; "
                         "expected uint8 (0..255) or floats")
    for bottom, top in ((0, 1), (-1, 1), (0, 255)):
        if bottom - 1e-3 <= low and high <= top + 1e-3:
            gain = 2 / (top - bottom)
            return gain, -1 - gain * bottom, f"values in {bottom}..{top}"
    raise ValueError(f"{path}: values from {low:g} to {high:g}; "
                     "expected finite floats in [0, 1], [-1, 1] or [0, 255], or uint8")
