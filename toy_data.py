"""Toy worlds to learn from, your own clips, and metrics that are exact because the world is known.

`make_world("shapes" | "digits" | "occluder" | a file)` is an endless, seeded source of short captioned clips. The metrics, in the
second half, look at frames alone: is the subject still there, in which colour and shape, does it move as it should? Nothing learned.

Letters: B batch, F frames, h, w pixels of a frame; (y, x) order, y downwards, pixel (i, j) has its centre at (i + 0.5, j + 0.5).
"""

import math
from importlib import import_module
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf

# Pure colours: one channel at least is 1 and, except for white, one is 0. The metrics lean on that (`_subject`).
COLOURS = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0), "yellow": (1.0, 1.0, 0.0),
           "magenta": (1.0, 0.0, 1.0), "cyan": (0.0, 1.0, 1.0), "white": (1.0, 1.0, 1.0)}
SHAPES = ("disc", "square", "triangle")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPEEDS = {"slow": (0.5, 0.8), "fast": (1.1, 1.6)}      # pixels per frame in a frame of 16 pixels; scales with the frame
VIDEO_FILES = (".mp4", ".avi", ".mov", ".mkv", ".webm")
HUES = 6                                               # the first six colours; white is for digits only
SLOTS = (tuple(COLOURS), SHAPES + DIGITS, tuple(SPEEDS))  # a caption is one word, or none, from each of these
CAPTION_SLOTS = len(SLOTS)
WORDS = ("",) + sum(SLOTS, ())                         # ids are positions here; 0 is "no word", three of them the null caption
SLOT_OF = {word: slot for slot, words in enumerate(SLOTS) for word in words}

HALF_BOX = 3.75 / 16   # Half the side of the box that every shape fits in, as a share of the frame. The box's centre is what moves.
DISC, SQUARE = 3.1 / 16, 2.7 / 16  # Radius and half side that give about the area of the triangle filling the box (28 pixels).


def encode_caption(text: str) -> torch.Tensor:
    """"fast blue square", words in any order -> LongTensor [3] (colour, thing, speed); 0 where the text names none.
    ValueError, one line, for a word outside `WORDS` or for two words that compete for one slot."""
    ids = [0] * CAPTION_SLOTS
    for word in text.lower().split():
        if word not in SLOT_OF:
            raise ValueError(f"unknown word {word!r} in caption {text!r}; the words are: {' '.join(WORDS[1:])}")
        slot = SLOT_OF[word]
        if ids[slot]:
            raise ValueError(f"caption {text!r} has both {WORDS[ids[slot]]!r} and {word!r}; give at most one of: {' '.join(SLOTS[slot])}")
        ids[slot] = WORDS.index(word)
    return torch.tensor(ids, dtype=torch.long)


def decode_caption(ids) -> str:
    """Inverse of `encode_caption`, as one would say it: "fast blue square"; "" for the null caption."""
    return " ".join(WORDS[int(ids[slot])] for slot in (2, 0, 1) if ids[slot])


def bounce(start: np.ndarray, velocity: np.ndarray, frames: int, low: float, high: float) -> np.ndarray:
    """Positions [..., F, 2] of a point that starts at `start` [..., 2] and reflects elastically from walls at `low` and `high`.
    In the unfolded mirror images of the box the point flies straight; folding that line back gives a triangle wave of period
    2 x span. Closed form in time, so frame 1000 carries no accumulated error."""
    span = high - low
    straight = start[..., None, :] - low + velocity[..., None, :] * np.arange(frames)[:, None]
    return high - np.abs(straight % (2 * span) - span)


def coverage(kind: torch.Tensor, centre: torch.Tensor, h: int, w: int, scale: float = 1.0, edge: float = 1.0) -> torch.Tensor:
    """Share of each pixel [..., h, w] in [0, 1] that shape `kind` [...] (index into SHAPES) covers, box centre at `centre` [..., 2].
    Signed distance to the outline, made a ramp `edge` pixels wide: anti-aliased at every frame size. A pixel outside the box is at
    least half a pixel away from it, so a box that touches the wall loses nothing to the frame's edge."""
    unit, kind = min(h, w) * scale, kind[..., None, None]
    y, x = _offsets(centre, h, w)
    x, box = x.abs(), HALF_BOX * unit                                                                # all three are symmetric in x
    disc = DISC * unit - (y * y + x * x).sqrt()
    square = SQUARE * unit - torch.maximum(y.abs(), x)
    triangle = torch.minimum(box - y, (box + y - 2 * x) / math.sqrt(5))                              # apex up, flanks of slope 2
    return (0.5 + torch.where(kind == 0, disc, torch.where(kind == 1, square, triangle)) / edge).clamp(0, 1)


def _offsets(centre: torch.Tensor, h: int, w: int, pixel: float = 1.0):
    """y [..., h, 1] and x [..., 1, w] of each pixel, seen from `centre` [..., 2], in units of which a pixel is `pixel` wide."""
    y, x = ((torch.arange(n, device=centre.device) + 0.5) * pixel for n in (h, w))
    return y[:, None] - centre[..., 0, None, None], x - centre[..., 1, None, None]


class Clips:
    """A source of clips, each a pure function of (seed, index): any clip can be had again, in any order; index 0 to 2**62.
    Each world adds `batch(indices)` -> (float32 [B, F, 3, h, w] in [-1, 1], LongTensor [B, 3]); row b is, bit for bit,
    `clip(indices[b])` (test_a_batch_is_its_clips_bit_for_bit). `reads` says in one line what was assumed about a user's file."""
    channels, reads = 3, ""

    def __init__(self, name: str, frames: int, size: int, seed: int):
        if frames < 1 or size < 8 or seed < 0:
            raise ValueError(f"a world needs frames >= 1, size >= 8 and seed >= 0, not frames={frames}, size={size}, seed={seed}")
        self.name, self.frames, self.size, self.seed = name, frames, size, seed

    def clip(self, index: int):
        """(video float32 [F, 3, h, w] in [-1, 1], caption LongTensor [3])."""
        return tuple(part[0] for part in self.batch([index]))


class Shapes(Clips):
    """One coloured shape bounces on black, at a constant speed, in a direction that is as likely as any other."""
    half_box, hues = HALF_BOX, HUES

    def batch(self, indices):
        box, rows = self.half_box * self.size, []
        for index in indices:
            rng = np.random.default_rng((self.seed, int(index)))
            colour, pace = list(COLOURS)[rng.integers(self.hues)], list(SPEEDS)[rng.integers(len(SPEEDS))]
            word, thing = self._thing(rng)
            rows.append(((colour, word, pace), thing, *self._ride(rng, rng.uniform(*SPEEDS[pace]) * self.size / 16, box)))
        words, things, start, velocity = zip(*rows)
        centre = bounce(np.array(start), np.array(velocity), self.frames, box, self.size - box)       # [B, F, 2]
        rgb = torch.tensor([COLOURS[colour] for colour, _, _ in words])[:, None, :, None, None]
        video = self._cover(torch.from_numpy(np.array(things)), torch.from_numpy(centre).float())[:, :, None] * rgb * 2 - 1
        return video, torch.stack([encode_caption(" ".join(row)) for row in words])

    def _thing(self, rng):
        kind = int(rng.integers(len(SHAPES)))
        return SHAPES[kind], kind

    def _ride(self, rng, pace: float, box: float):                                                    # start and velocity, (y, x)
        angle = rng.uniform(0, 2 * math.pi)
        return rng.uniform(box, self.size - box, 2), (pace * math.sin(angle), pace * math.cos(angle))

    def _cover(self, things, centre):                                                                 # [B, ...], [B, F, 2] -> [B, F, h, w]
        return coverage(things[:, None], centre, self.size, self.size, self.half_box / HALF_BOX)


class Occluder(Shapes):
    """A smaller shape passes behind a grey bar that hides it, whole, for some frames: to draw it again one must remember it."""
    half_box = 0.6 * HALF_BOX
    BAR = (4.5 / 16, 11.5 / 16)   # left and right edge as shares of the frame; wider than the shape's box, so that it hides all of it

    def batch(self, indices):
        video, captions = super().batch(indices)
        video[..., round(self.BAR[0] * self.size):round(self.BAR[1] * self.size)] = 0.0               # mid grey
        return video, captions

    def _ride(self, rng, pace, box):                            # starts in view on either side, flies at the bar within 30 degrees
        (y, _), angle, side = rng.uniform(box, self.size - box, 2), rng.uniform(-math.pi / 6, math.pi / 6), rng.choice((-1, 1))
        x = self.size / 2 - side * (self.size / 2 - rng.uniform(box, self.BAR[0] * self.size - box / 2))
        return (y, x), (pace * math.sin(angle), side * pace * math.cos(angle))


class Digits(Shapes):
    """Real handwritten digits (scikit-learn's 1797 of 8x8; nothing is downloaded) in seven colours, 0.6 of the frame high, bounce."""
    half_box, hues = 0.3, len(COLOURS)

    def __init__(self, name: str, frames: int, size: int, seed: int):
        super().__init__(name, frames, size, seed)
        bundle = _require("sklearn.datasets", "scikit-learn", "the digits world").load_digits()
        self.images, self.labels = bundle.images.astype(np.float32) / 16, bundle.target               # [1797, 8, 8] in [0, 1]

    def _thing(self, rng):
        return DIGITS[self.labels[which := rng.integers(len(self.images))]], self.images[which]

    def _cover(self, things, centre):
        y, x = _offsets(centre.flatten(0, 1) / (self.half_box * self.size), self.size, self.size, 1 / (self.half_box * self.size))
        grid = torch.stack(torch.broadcast_tensors(x, y), -1)   # [B * F, h, w, 2]: the box is [-1, 1], grid_sample wants (x, y)
        picture = things[:, None].repeat_interleave(self.frames, 0)
        return nnf.grid_sample(picture, grid, align_corners=False).clamp(0, 1).view(*centre.shape[:2], self.size, self.size)


class Stored(Clips):
    """Windows of F frames, drawn at random from the clips of a user's file, without captions (all zeros). Only the window asked for
    is turned into floats; an .npy file stays on disk and is memory-mapped."""

    def __init__(self, path: Path, frames: int, size: int, seed: int):
        super().__init__(path.name, frames, size, seed)
        array, said = _read(path, size)
        self.array, layout = _as_clips(array, frames, path)                                          # [N, T, H, W, C], a view
        self.gain, values = _value_range(array, path)
        count, length, h, w, c = self.array.shape
        if length < frames:
            raise ValueError(f"{path}: clips of {length} frames (read as {layout}) are too short; expected {frames} or more")
        self.reads = (f"{path.name}: {said}{array.dtype} {list(array.shape)} read as {layout}; {count} clip(s) of {length} frames; {values}"
                      + {1: "; grey -> 3 equal channels", 3: "", 4: "; alpha dropped"}[c]
                      + (f"; {h}x{w} resized to {size}x{size}" if (h, w) != (size, size) else ""))

    def batch(self, indices):
        clips = []
        for index in indices:
            rng = np.random.default_rng((self.seed, int(index)))
            which, first = rng.integers(self.array.shape[0]), rng.integers(self.array.shape[1] - self.frames + 1)
            window = self.array[which, first:first + self.frames, ..., :3].astype(np.float32)        # a copy, of this window only
            video = torch.from_numpy(window).permute(0, 3, 1, 2) * self.gain[0] + self.gain[1]       # [F, C, H, W] in [-1, 1]
            if video.shape[-2:] != (self.size, self.size):
                video = nnf.interpolate(video, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False)
            clips.append(video.clamp(-1, 1).expand(-1, 3, -1, -1))
        return torch.stack(clips), torch.zeros(len(clips), CAPTION_SLOTS, dtype=torch.long)


@np.errstate(all="ignore")     # a damaged header overflows before it is refused: one line says so, not two
def make_world(data: str, frames: int = 12, size: int = 16, seed: int = 0) -> Clips:
    """The world named `data` ("shapes", "digits", "occluder"), or the clips in the file of that path, as `size` x `size` frames.
    FileNotFoundError, ValueError or ModuleNotFoundError, one line each, says what is wrong and what would be right."""
    worlds = {"shapes": Shapes, "digits": Digits, "occluder": Occluder}
    if data in worlds:
        return worlds[data](data, frames, size, seed)
    if not Path(data).exists():
        raise FileNotFoundError(f"no world and no file called {str(data)!r}; give {', '.join(worlds)} or a path to your clips")
    return Stored(Path(data), frames, size, seed)


def _require(module: str, package: str, what: str):
    try:
        return import_module(module)
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"{what} needs {package}, which is not installed: pip install {package}") from None


def _read(path: Path, size: int):
    """(array as stored, a remark for `.reads`). GIF and video come as uint8 [1, T, H, W, 3]."""
    kind = path.suffix.lower()
    if not path.is_file() or kind not in (".npy", ".npz", ".gif") + VIDEO_FILES:
        raise ValueError(f"{path}: not a kind of file that can be read; give .npy, .npz, .gif or one of {' '.join(VIDEO_FILES)}")
    tool = (_require("av", "av", f"a {kind} file") if kind in VIDEO_FILES else
            _require("PIL.Image", "pillow", "a GIF") if kind == ".gif" else np)
    try:
        if kind == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False), ""
        if kind == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                if sum(member.file_size for member in archive.zip.infolist()) > 2**32:       # a file of 4 MB may unfold to that
                    raise ValueError("it unfolds to more than 4 GiB: unpack it; an .npy file stays on disk")
                key = next((k for k in ("data", "clips", "video") if k in archive.files), (archive.files or [""])[0])
                return (archive[key] if key else np.empty(0)), f"array {key!r}, "
        if kind == ".gif":
            with tool.open(path) as gif:
                if gif.n_frames * gif.width * gif.height > 2**30:
                    raise ValueError(f"{gif.n_frames} pictures of {gif.width} x {gif.height} would fill the memory")
                pictures = [np.asarray(picture.convert("RGB")) for picture in import_module("PIL.ImageSequence").Iterator(gif)]
        else:
            with tool.open(str(path)) as video:              # shrunk as it is decoded, or a minute of film would fill the memory
                pictures = [f.to_ndarray(width=size, height=size, format="rgb24", interpolation="AREA") for f in video.decode(video=0)]
        return np.stack(pictures)[None], f"{len(pictures)} frames{' resized while decoding' if kind != '.gif' else ''}, "
    except Exception as error:    # whatever the decoder raised, the user learns which file, and why, in one line
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{path}: damaged, or not really a {kind} file ({why})") from error


def _as_clips(array: np.ndarray, frames: int, path: Path):
    """(view [N, T, H, W, C], the layout as words). What the axes mean is decided by this rule and by nothing else."""
    shape, rank = array.shape, array.ndim
    if not array.size:
        raise ValueError(f"{path}: the array is empty (shape {list(shape)}); expected clips such as [N, T, H, W]")
    if rank == 5 and shape[4] in (1, 3, 4):
        return array, "[N, T, H, W, C]"
    if rank == 5 and shape[2] in (1, 3, 4):
        return np.moveaxis(array, 2, 4), "[N, T, C, H, W]"
    if rank == 4 and shape[3] in (1, 3, 4):             # no picture is that narrow
        return array[None], "[T, H, W, C], one clip"
    if rank == 4 and (shape[0] == 20 or frames <= shape[0] < shape[1]):
        return array.swapaxes(0, 1)[..., None], ("[T, N, H, W] (Moving MNIST: the first axis is 20, or is the shorter and still holds "
                                                 f"{frames} frames; add a last axis of 1 if clips come first)")
    if rank in (3, 4):
        return (array[..., None], "[N, T, H, W]") if rank == 4 else (array[None, ..., None], "[T, H, W], one clip")
    raise ValueError(f"{path}: cannot read shape {list(shape)} as clips; expected [N, T, H, W], [T, N, H, W] (Moving MNIST) or "
                     "[N, T, H, W, C] with C of 1, 3 or 4")


def _value_range(array: np.ndarray, path: Path):
    """((gain, offset) that maps stored values to [-1, 1], the range as words)."""
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise ValueError(f"{path}: values are {array.dtype}; expected uint8 (0..255) or floats")
    # Floats: one pass over the file, no copy; both ends are NaN if any value is, and then no range below fits.
    low, high = (0, 255) if array.dtype == np.uint8 else (float(array.min()), float(array.max()))
    for bottom, top, gain in ((0, 1, (2.0, -1.0)), (-1, 1, (1.0, 0.0)), (0, 255, (2 / 255, -1.0))):
        if bottom - 1e-3 <= low and high <= top + 1e-3:
            return gain, f"values in {bottom}..{top}"
    raise ValueError(f"{path}: values from {low:g} to {high:g}; expected finite floats in [0, 1], [-1, 1] or [0, 255], or uint8")


# ---- metrics (shapes world): each takes video [B, F, 3, h, w] in [-1, 1] (clamped if beyond) and answers per frame: drift is a curve -

DROP = (0.0, 0.0, HALF_BOX / 3)  # a triangle's centre of mass is this far below its box's centre: a sixth of its height
EDGE = 0.6                       # width of the ramp in `_subject`; templates are drawn with the same
WINDOW = 10                      # frames that a straight line is fitted to: at 1.6 pixels a frame that is two reflections at most


@torch.no_grad()   # every metric below starts here, so none of them records a gradient
def _subject(video: torch.Tensor) -> torch.Tensor:
    """Where the subject is, [B, F, h, w] in [0, 1]: by chroma, so black, white and every grey (mush, the bar) are background."""
    chroma = (video.float().clamp(-1, 1) / 2).aminmax(dim=2)
    # A steeper edge: below 0.2 is nothing, so that pixel noise does not add up over 256 pixels, and the outline stays at 0.5.
    return (0.5 + (chroma.max - chroma.min - 0.5) / EDGE).clamp(0, 1)


def subject_mass(video: torch.Tensor) -> torch.Tensor:
    """Soft area of the subject in pixels, [B, F]."""
    return _subject(video).sum((-2, -1))


def true_mass(size: int) -> float:
    """What `subject_mass` says of a true frame of `size` pixels: mean over the three shapes, each in the middle of the frame."""
    return float(coverage(torch.arange(3), torch.full((3, 2), size / 2), size, size, edge=EDGE).sum() / 3)


def centroid(video: torch.Tensor) -> torch.Tensor:
    """Centre of mass of the subject, [B, F, 2] (y, x) in pixels; the middle of the frame where there is no subject at all."""
    cover, (h, w) = _subject(video), video.shape[-2:]
    middle = torch.tensor([h / 2, w / 2], device=video.device)
    moment = torch.stack([(cover * axis).sum((-2, -1)) for axis in _offsets(middle, h, w)], -1)
    return middle + moment / cover.sum((-2, -1)).clamp_min(1e-6)[..., None]


def alive(video: torch.Tensor) -> torch.Tensor:
    """Is there one subject? bool [B, F]: mass 0.5 to 1.8 times the true one, 90 % of it within a shape's reach of its centroid."""
    cover, side = _subject(video), min(video.shape[-2:])
    y, x = _offsets(centroid(video), *video.shape[-2:])
    near = y * y + x * x <= (4 / 3 * HALF_BOX * side + 0.5) ** 2     # the apex, farthest of all points, and half a soft edge
    mass, true = cover.sum((-2, -1)), true_mass(side)
    return (mass >= 0.5 * true) & (mass <= 1.8 * true) & ((cover * near).sum((-2, -1)) >= 0.9 * mass)


def colour_index(video: torch.Tensor) -> torch.Tensor:
    """Which of the first six COLOURS has the direction (cosine) nearest to the subject's mean colour, [B, F]; -1 where not alive."""
    rgb = (video.float().clamp(-1, 1) + 1) / 2
    mean = (rgb * _subject(video)[:, :, None]).sum((-2, -1))                                      # [B, F, 3]
    hues = nnf.normalize(torch.tensor([*COLOURS.values()][:HUES], device=video.device), dim=-1)
    return (mean @ hues.T).argmax(-1).masked_fill(~alive(video), -1)


def shape_index(video: torch.Tensor) -> torch.Tensor:
    """Which of SHAPES, drawn at the subject's centroid, has the highest cosine with the subject, [B, F]; -1 where not alive."""
    cover, (h, w) = _subject(video)[:, :, None], video.shape[-2:]
    drop = torch.tensor([[d * min(h, w), 0.0] for d in DROP], device=video.device)
    kinds = torch.arange(len(SHAPES), device=video.device)
    template = coverage(kinds, centroid(video)[:, :, None] - drop, h, w, edge=EDGE)                   # [B, F, 3 shapes, h, w]
    score = (cover * template).sum((-2, -1)) / template.square().sum((-2, -1)).sqrt().clamp_min(1e-6)
    return score.argmax(-1).masked_fill(~alive(video), -1)


def speed(video: torch.Tensor) -> torch.Tensor:
    """Distance that the centroid moves from frame to frame, [B, F - 1] in pixels; less than the true speed where it bounces."""
    return centroid(video).diff(dim=1).norm(dim=-1)


def motion_residual(video: torch.Tensor) -> torch.Tensor:
    """RMS distance in pixels, [B], from the centroids to the best straight path with elastic reflections, over windows of 10 frames.
    Unfolding: mirror the box at the wall instead of the velocity, and the path is a straight line. After n reflections, the first at
    wall p, the other wall being q, position x stands for u = x, 2p - x, x + 2(p - q) for n = 0, 1, 2. So: try every pair of frames
    at which n may rise, and both first walls; unfold; fit a line; keep the least residual, for each axis by itself. A triangle's
    centre of mass turns at lower walls than the others': both pairs are tried. Windows with fewer than half their frames alive are
    left out, and frames not alive in the others; NaN if nothing is left. A frozen subject scores 0: read this beside `speed`."""
    (f, _, h, w), device = video.shape[1:], video.device
    n = min(WINDOW, f)
    time, box = torch.arange(n, device=device), HALF_BOX * min(h, w)
    pick = torch.tensor([*range(0, f - n, n), f - n], device=device)[:, None] + time              # [windows, n]
    where, weight = centroid(video)[:, pick], alive(video)[:, pick].float()                       # [B, windows, n, 2], [B, windows, n]
    rises = torch.tensor([*combinations(range(1, n + 1), 2), (n, n)], device=device)              # rising at n: not in this window
    count = (time >= rises[..., None]).sum(1)                                                     # [hypotheses, n] reflections so far

    def misfit(x, low, high):                                                                     # [B, windows, n] -> [B, windows]
        shift = torch.cat([torch.tensor([0, 2 * p, 2 * (p - q)], device=device)[count] for p, q in ((high, low), (low, high))])
        u = (1 - 2 * (count % 2)).repeat(2, 1) * x[:, :, None] + shift                            # [B, windows, 2 hypotheses, n]
        share = (weight / weight.sum(-1, keepdim=True).clamp_min(1))[:, :, None]
        t, u = (z - (share * z).sum(-1, keepdim=True) for z in (time, u))
        slope = (share * t * u).sum(-1, keepdim=True) / (share * t * t).sum(-1, keepdim=True).clamp_min(1e-6)
        return (share * (u - slope * t).square()).sum(-1).amin(-1)

    across = misfit(where[..., 1], box, w - box)
    down = torch.minimum(*(misfit(where[..., 0], box + d, h - box + d) for d in (0.0, DROP[2] * min(h, w))))
    return (across + down).masked_fill(weight.sum(-1) < n / 2, math.nan).nanmean(-1).sqrt()


def caption_match(video: torch.Tensor, captions: torch.Tensor) -> torch.Tensor:
    """Does each frame show what its clip's caption [B, 3] says? bool [B, F]. An absent word matches anything alive; F >= 2.
    The speed word is judged over the 12 frames about each frame: per axis the median displacement (bounces shorten a few of them),
    then "slow" or "fast" by the middle between the two bands, within 0.5 x the slowest and 1.5 x the fastest speed."""
    colour, thing, pace = captions.to(video.device).T[..., None]                                  # [B, 1] each
    good = alive(video) & ((colour == 0) | (colour_index(video) == colour - 1))
    good &= (thing == 0) | (shape_index(video) == thing - WORDS.index(SHAPES[0]))
    steps, frames = centroid(video).diff(dim=1).abs(), torch.arange(video.shape[1], device=video.device)
    n = min(11, len(frames) - 1)
    pick = (frames - n // 2).clamp(0, len(frames) - 1 - n)[:, None] + torch.arange(n, device=video.device)
    steady = steps[:, pick].median(2).values.norm(dim=-1) * 16 / min(video.shape[-2:])               # [B, F] at size 16
    (slowest, slow), (fast, fastest) = SPEEDS.values()
    said = torch.where(steady < (slow + fast) / 2, WORDS.index("slow"), WORDS.index("fast"))
    return good & ((pace == 0) | ((said == pace) & (steady >= 0.5 * slowest) & (steady <= 1.5 * fastest)))


def survival_report(video: torch.Tensor, captions: torch.Tensor, last: int = 12, first: int = 3) -> dict[str, float]:
    """Fractions of the B rollouts that are still right at their end. Each is judged over the last `last` frames alone:
    alive     `alive` in at least 90 % of those frames
    colour    `colour_index` is the caption's colour in at least 90 % of them (a frame that is not alive has none)
    shape     the same for the shape
    moving    mean `speed` there is from 0.5 x the slowest to 1.5 x the fastest speed of the world
    survival  alive and colour and moving, all three by the same rollout: the number that the README quotes
    Where the caption names no colour (shape), the most frequent one of the first `first` frames, the first chunk, takes its place."""
    end, start, captions = video[:, -last:], video[:, :first], captions.to(video.device)

    def kept(index, ids, offset):
        wanted = torch.where(ids > 0, ids - offset, index(start).mode(1).values)[:, None]
        return ((index(end) == wanted) & (wanted >= 0)).float().mean(1) >= 0.9

    pace = speed(end).mean(1) * 16 / min(video.shape[-2:])
    held = {"alive": alive(end).float().mean(1) >= 0.9, "colour": kept(colour_index, captions[:, 0], 1),
            "shape": kept(shape_index, captions[:, 1], WORDS.index(SHAPES[0])),
            "moving": (pace >= 0.5 * SPEEDS["slow"][0]) & (pace <= 1.5 * SPEEDS["fast"][1])}
    held["survival"] = held["alive"] & held["colour"] & held["moving"]
    return {name: float(value.float().mean()) for name, value in held.items()}
