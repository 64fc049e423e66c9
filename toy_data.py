"""Toy worlds to learn from: an endless, seeded source of short captioned clips.

    shapes     a coloured disc, square or triangle bounces on black
    digits     a handwritten digit bounces on black
    occluder   a small shape passes behind a grey bar, and must be remembered meanwhile
    recall     a curtain hides a shape for longer than a small window remembers

A clip is a pure function of (seed, index): the pair seeds a random generator, the generator
draws a `Plan` (what, in which colour, from where, how fast), and the rest is geometry. So any
clip can be had again, in any order, on any machine.

    world = make_world("shapes", frames=12, size=16, seed=0)
    video, captions = world.batch([5, 6])              # [2, 12, 3, 16, 16] in [-1, 1], [2, 3]
    decode_caption(captions[0])                        # for instance "fast blue square"

Letters: B batch, F frames, h, w pixels of a frame. Points are (y, x), y downwards; pixel (i, j)
has its centre at (i + 0.5, j + 0.5). metrics.py looks at such frames and says what they show;
engine/clips.py makes a world of a file of your own.
"""

import math
import re
from importlib import import_module
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as nnf

# ---- the words -----------------------------------------------------------------------------

# Pure colours: one channel at least is 1 and, except for white, one is 0.
# The metrics lean on that (`metrics.subject`).
COLOURS = {
    "red": (1.0, 0.0, 0.0),
    "green": (0.0, 1.0, 0.0),
    "blue": (0.0, 0.0, 1.0),
    "yellow": (1.0, 1.0, 0.0),
    "magenta": (1.0, 0.0, 1.0),
    "cyan": (0.0, 1.0, 1.0),
    "white": (1.0, 1.0, 1.0),
}
HUES = 6                       # shapes have one of the first six; white is for digits only
SHAPES = ("disc", "square", "triangle")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPEEDS = {                     # pixels per frame in a frame of 16 pixels; they grow with it
    "slow": (0.5, 0.8),
    "fast": (1.1, 1.6),
}

# A caption is one word, or none, for each slot: colour, thing, speed. A word's id is its place
# in WORDS. Id 0 is "no word"; three of them are the null caption, which asks for nothing.
SLOTS = (tuple(COLOURS), SHAPES + DIGITS, tuple(SPEEDS))
CAPTION_SLOTS = len(SLOTS)
WORDS = ("",) + tuple(COLOURS) + SHAPES + DIGITS + tuple(SPEEDS)
SLOT_OF = {word: slot for slot, words in enumerate(SLOTS) for word in words}
UNHEARD = ("", "a", "an", "the", "and")


def encode_caption(text: str) -> torch.Tensor:
    """"fast blue square", words in any order -> LongTensor [3] of ids (colour, thing, speed).

    An id is 0 where the text names no such word. "A fast, blue square" is the same, and so are
    "squares". ValueError, one line, for a word outside WORDS or for two words that compete for
    one slot.
    """
    ids = [0] * CAPTION_SLOTS
    for spoken in re.split(r"[\s,.;!?]+", text.lower()):
        if spoken in UNHEARD:
            continue
        word = singular(spoken)
        if word not in SLOT_OF:
            known = " ".join(WORDS[1:])
            raise ValueError(f"unknown word {spoken!r} in caption {text!r}; "
                             f"the words are: {known}")
        slot = SLOT_OF[word]
        if ids[slot]:
            earlier = WORDS[ids[slot]]
            choice = " ".join(SLOTS[slot])
            raise ValueError(f"caption {text!r} has both {earlier!r} and {word!r}; "
                             f"give at most one of: {choice}")
        ids[slot] = WORDS.index(word)
    return torch.tensor(ids, dtype=torch.long)


def singular(word: str) -> str:
    """disc for discs, six for sixes; any other word as it is."""
    for ending in ("s", "es"):
        stem = word.removesuffix(ending)
        if word not in SLOT_OF and stem in SLOT_OF:
            return stem
    return word


def decode_caption(ids) -> str:
    """Inverse of `encode_caption`, as one would say it: "fast blue square".

    "" for the null caption.
    """
    colour, thing, speed = ids
    spoken = [WORDS[int(word)] for word in (speed, colour, thing)]
    return " ".join(word for word in spoken if word)


def check_words(caption: torch.Tensor, data: str) -> None:
    """ValueError, one line, for a word that a model of the world `data` has never seen."""
    for slot, words in enumerate(words_of(data)):
        word = WORDS[caption[slot]]
        if word and word not in words:
            seen = " ".join(sum(words_of(data), ())) or "none at all"
            raise ValueError(f"a model of {data} has never seen the word {word!r}; "
                             f"it knows: {seen}")


def fill_in(caption: torch.Tensor, data: str, seed: int) -> torch.Tensor:
    """A caption [3] of the world `data`, the words that it leaves open drawn at random.

    That is what leaving a word out means: words are independent, so videos of "red disc" are
    those of "slow red disc" and of "fast red disc", half of each. (Training with words left out
    teaches the model to trust the past more than the speed word.) The null caption stays, since
    training drops whole captions. A seed draws the same words each time.
    """
    if not caption.any():
        return caption
    generator = torch.Generator().manual_seed(seed)
    filled = caption.clone()
    for slot, words in enumerate(words_of(data)):
        share = torch.rand((), generator=generator)         # drawn even where it is not used
        if words and caption[slot] == 0:
            filled[slot] = WORDS.index(words[int(share * len(words))])
    return filled


# ---- the geometry --------------------------------------------------------------------------

# All are shares of the frame. What moves is the centre of a box that every shape fits in.
HALF_BOX = 3.75 / 16           # half the side of that box; the triangle fills it
DISC = 3.1 / 16                # radius; gives about the triangle's area, 28 pixels of 16 x 16
SQUARE = 2.7 / 16              # half the side; the same area, about


def bounce(start: np.ndarray, velocity: np.ndarray, frames: int, low: float, high: float):
    """Positions [..., F, 2] of points that fly from `start` [..., 2] with `velocity` [..., 2].

    Walls at `low` and `high` reflect them elastically. Mirror the box at a wall instead of the
    velocity, and the point flies straight on. Folding the mirrored boxes back onto the first
    makes a triangle wave of period 2 x span:

        high            .               .
                    .       .       .       .       position of the point
        low     .               .               .
                0     span    2 span  3 span        way of the straight flight

    Closed form in time, so frame 1000 carries no accumulated error
    (test_bounce_is_stepwise_reflection).
    """
    span = high - low
    time = np.arange(frames)[:, None]                        # [F, 1]
    path = velocity[..., None, :] * time                     # [..., F, 2]
    straight = start[..., None, :] - low + path              # [..., F, 2], from the low wall
    return high - np.abs(straight % (2 * span) - span)


def offsets(centre: torch.Tensor, h: int, w: int, pixel: float = 1.0):
    """(y [..., h, 1], x [..., 1, w]) of each pixel, seen from `centre` [..., 2].

    `pixel` is the width of a pixel in the unit of the answer and of `centre`.
    """
    y = (torch.arange(h, device=centre.device) + 0.5) * pixel
    x = (torch.arange(w, device=centre.device) + 0.5) * pixel
    y = y[:, None] - centre[..., 0, None, None]              # [..., h, 1]
    x = x - centre[..., 1, None, None]                       # [..., 1, w]
    return y, x


def coverage(kind: torch.Tensor, centre: torch.Tensor, h: int, w: int, scale=1.0, edge=1.0):
    """Share of each pixel, [..., h, w] in [0, 1], that shape `kind` [...] covers.

    `kind` is an index into SHAPES; `centre` [..., 2] is where its box stands, in pixels. The
    signed distance to the outline becomes a ramp `edge` pixels wide: anti-aliased at every
    frame size. A pixel outside the box is at least half a pixel away from it, so a box that
    touches the wall loses nothing to the frame's edge.
    """
    unit = min(h, w) * scale
    box = HALF_BOX * unit
    y, x = offsets(centre, h, w)
    x = x.abs()                                              # all three are symmetric in x

    # Distance to the outline in pixels, positive inside.
    disc = DISC * unit - (y * y + x * x).sqrt()              # [..., h, w]
    square = SQUARE * unit - torch.maximum(y.abs(), x)
    triangle = (box + y - 2 * x) / math.sqrt(5)              # apex up, flanks of slope 2
    triangle = torch.minimum(triangle, box - y)              # and a base

    kind = kind[..., None, None]
    inside = torch.where(kind == 1, square, triangle)
    inside = torch.where(kind == 0, disc, inside)
    return (0.5 + inside / edge).clamp(0, 1)                 # the outline itself is at 0.5


# ---- the worlds ----------------------------------------------------------------------------

class Clips:
    """A source of clips, each a pure function of (seed, index); an index is 0 to 2**62.

    Every world adds `batch(indices)`, which answers (float32 [B, F, 3, h, w] in [-1, 1],
    LongTensor [B, 3]). Clip b of a batch is, bit for bit, `clip(indices[b])`
    (test_a_batch_is_its_clips_bit_for_bit). `reads` says in one line what was assumed about a
    user's file; it is empty for the worlds below.
    """
    channels = 3
    reads = ""
    prompts = ("",) * 4        # captions of four videos that show what the world is
    vocabulary = None          # of a user's captions: engine/own_words.py
    whole = 1                  # frames of a clip that shows what the world is about

    @staticmethod
    def encode(text: str) -> torch.Tensor:
        """A caption of this world as ids."""
        return encode_caption(text)

    def __init__(self, name: str, frames: int, size: int, seed: int):
        if frames < 1 or size < 8 or seed < 0:
            raise ValueError("a world needs frames >= 1, size >= 8 and seed >= 0, "
                             f"not frames={frames}, size={size}, seed={seed}")
        self.name = name
        self.frames = frames
        self.size = size
        self.seed = seed

    def clip(self, index: int):
        """(video float32 [F, 3, h, w] in [-1, 1], caption LongTensor [3])."""
        video, captions = self.batch([index])
        return video[0], captions[0]


class Plan(NamedTuple):
    """All that is random in one clip."""
    colour: str
    word: str                  # the thing's name
    pace: str                  # "slow" or "fast"
    thing: int | np.ndarray    # an index into SHAPES, or a picture of a digit [8, 8]
    start: tuple               # (y, x) of the box's centre in frame 0, in pixels
    velocity: tuple            # (y, x) in pixels a frame


class Shapes(Clips):
    """One coloured shape bounces on black, at a constant speed, all directions alike."""
    half_box = HALF_BOX
    colours = tuple(COLOURS)[:HUES]
    things = SHAPES
    paces = tuple(SPEEDS)
    prompts = ("slow red disc", "slow blue square", "fast green triangle", "fast yellow disc")

    def __init__(self, name: str, frames: int, size: int, seed: int):
        super().__init__(name, frames, size, seed)
        self.box = self.half_box * size                      # half the box's side, in pixels

    def walls(self):
        """(lowest, highest) place of the box's centre, in pixels: for y and x alike, or [2]."""
        return self.box, self.size - self.box

    def plan(self, index: int) -> Plan:
        """What happens in clip `index`. Drawn in another order, these are other clips."""
        rng = np.random.default_rng((self.seed, int(index)))
        colour = self.colours[rng.integers(len(self.colours))]
        pace = self.paces[rng.integers(len(self.paces))]
        word, thing = self.draw_thing(rng)
        slowest, fastest = SPEEDS[pace]
        step = rng.uniform(slowest, fastest) * self.size / 16
        start, velocity = self.draw_flight(rng, step)
        return Plan(colour, word, pace, thing, start, velocity)

    def draw_thing(self, rng):
        """(word, what to draw)"""
        kind = int(rng.integers(len(SHAPES)))
        return SHAPES[kind], kind

    def draw_flight(self, rng, step: float):
        """(start, velocity), each (y, x), of a thing that moves `step` pixels a frame."""
        angle = rng.uniform(0, 2 * math.pi)
        start = rng.uniform(*self.walls(), 2)
        return start, (step * math.sin(angle), step * math.cos(angle))

    def batch(self, indices):
        plans = [self.plan(index) for index in indices]
        captions = [encode_caption(f"{plan.colour} {plan.word} {plan.pace}") for plan in plans]

        # Where the thing is: its whole flight at once.
        start = np.array([plan.start for plan in plans])                 # [B, 2]
        velocity = np.array([plan.velocity for plan in plans])           # [B, 2]
        flight = bounce(start, velocity, self.frames, *self.walls())     # [B, F, 2]
        centre = torch.from_numpy(flight).float()                        # [B, F, 2]

        # How much of each pixel it covers, and in which colour.
        things = np.array([plan.thing for plan in plans])                # [B] or [B, 8, 8]
        cover = self.cover(torch.from_numpy(things), centre)             # [B, F, h, w]
        rgb = torch.tensor([COLOURS[plan.colour] for plan in plans])     # [B, 3]
        light = 2 * rgb[:, None, :, None, None]                          # [B, 1, 3, 1, 1]
        video = cover[:, :, None] * light                                # [B, F, 3, h, w]
        video -= 1                                                       # black is -1
        return video, torch.stack(captions)

    def cover(self, things: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
        """Things [B] with their boxes at `centre` [B, F, 2] -> [B, F, h, w] in [0, 1]."""
        scale = self.half_box / HALF_BOX
        return coverage(things[:, None], centre, self.size, self.size, scale)


class Occluder(Shapes):
    """A smaller shape passes behind a grey bar that hides all of it for some frames.

    Whoever draws it again afterwards must have remembered it.
    """
    half_box = 0.6 * HALF_BOX
    BAR = (4.5 / 16, 11.5 / 16)    # its edges, shares of the frame: wider than the shape's box

    def draw_flight(self, rng, step):
        """Start in view, on either side, and fly at the bar within 30 degrees."""
        y, _ = rng.uniform(self.box, self.size - self.box, 2)
        angle = rng.uniform(-math.pi / 6, math.pi / 6)
        towards = rng.choice((-1, 1))                        # 1: from the left to the right
        nearest = self.BAR[0] * self.size - self.box / 2
        from_wall = rng.uniform(self.box, nearest)
        middle = self.size / 2
        x = middle - towards * (middle - from_wall)
        return (y, x), (step * math.sin(angle), towards * step * math.cos(angle))

    def batch(self, indices):
        video, captions = super().batch(indices)
        left, right = self.BAR
        bar = slice(round(left * self.size), round(right * self.size))
        video[..., bar] = 0.0                                # mid grey, in front of everything
        return video, captions


class Digits(Shapes):
    """Handwritten digits in seven colours, 0.6 of the frame high, bounce on black.

    They are scikit-learn's 1797 pictures of 8 x 8; nothing is downloaded.
    """
    half_box = 0.3
    colours = tuple(COLOURS)
    things = DIGITS
    prompts = ("slow red seven", "slow blue three", "fast green eight", "fast white two")

    def __init__(self, name: str, frames: int, size: int, seed: int):
        super().__init__(name, frames, size, seed)
        datasets = require("sklearn.datasets", "scikit-learn", "the digits world")
        digits = datasets.load_digits()
        self.images = digits.images.astype(np.float32) / 16  # [1797, 8, 8] in [0, 1]
        self.labels = digits.target                          # [1797], 0 to 9

    def draw_thing(self, rng):
        which = rng.integers(len(self.images))
        return DIGITS[self.labels[which]], self.images[which]

    def cover(self, things, centre):
        """Pictures [B, 8, 8], resampled to fill their boxes at `centre` -> [B, F, h, w]."""
        centre = centre.flatten(0, 1) / self.box             # [B F, 2]; the unit is half a box
        y, x = offsets(centre, self.size, self.size, 1 / self.box)
        x, y = torch.broadcast_tensors(x, y)
        # grid_sample takes the picture as [-1, 1] and wants x first.
        grid = torch.stack([x, y], -1)                       # [B F, h, w, 2]
        pictures = things[:, None].repeat_interleave(self.frames, 0)
        cover = nnf.grid_sample(pictures, grid, align_corners=False).clamp(0, 1)
        return cover.view(-1, self.frames, self.size, self.size)


class Recall(Shapes):
    """A subject of the shapes world is in view for 6 frames, a curtain hides it for 24, and so
    on for ever. Nothing is said: the caption is the null caption.

    The subject flies on behind the curtain, so what comes out is known: colour, shape, place.
    A gauge at the frame's foot shows *when*: its grey track is as long as the curtain, an eighth
    of the frame for 3 frames; its white part fills while the subject is in view and runs down
    while it is not. So every frame tells all about the curtain, to a model that sees 3 frames
    as to one that sees 36, and what needs memory is the subject alone.

    With `vary`, as make_world has it, a clip has a curtain of its own length, a multiple of 3
    up to `curtain`, and every other clip begins anywhere in its period: that is for training,
    since a stream meets its curtain at any place of the window. Without, every clip begins as
    above. The subject of clip i is the same in both.
    """
    prompts = ("",) * 4
    colours = things = paces = ()      # the words of its captions: none
    SEEN = 6                           # frames in view
    LONGEST = 24                       # frames of a curtain whose gauge is as wide as the frame
    whole = SEEN + LONGEST + SEEN
    CHUNK = 3                          # lengths and beginnings are whole chunks
    GAUGE = 2 / 16                     # its height, a share of the frame
    CURTAIN = 0.0                      # mid grey

    def __init__(self, name: str, frames: int, size: int, seed: int, curtain: int = LONGEST,
                 vary: bool = True):
        super().__init__(name, frames, size, seed)
        if curtain % self.CHUNK or not self.CHUNK <= curtain <= self.LONGEST:
            raise ValueError(f"a curtain closes for 3, 6, ... {self.LONGEST} frames, not for "
                             f"{curtain}")
        self.curtain = curtain
        self.vary = vary
        self.gauge = round(self.GAUGE * size)                # rows of pixels

    def walls(self):
        """The subject stays above the gauge."""
        highest = np.array([self.size - self.gauge, self.size]) - self.box
        return self.box, highest

    def plan(self, index):
        rng = np.random.default_rng((self.seed, int(index)))
        colour = tuple(COLOURS)[rng.integers(HUES)]
        word, kind = self.draw_thing(rng)
        step = rng.uniform(SPEEDS["slow"][0], SPEEDS["fast"][1]) * self.size / 16
        start, velocity = self.draw_flight(rng, step)
        return Plan(colour, word, "", kind, start, velocity)

    def schedule(self, index: int) -> tuple[int, int]:
        """(length of the curtain, frame of the period at which the clip begins)."""
        if not self.vary:
            return self.curtain, 0
        rng = np.random.default_rng((self.seed, int(index), 1))
        length = self.CHUNK * int(rng.integers(1, self.curtain // self.CHUNK + 1))
        anywhere = rng.integers(2)
        begin = self.CHUNK * int(rng.integers((self.SEEN + length) // self.CHUNK))
        return length, begin * int(anywhere)

    def batch(self, indices):
        video, captions = super().batch(indices)
        schedules = torch.tensor([self.schedule(index) for index in indices])    # [B, 2]
        length, begin = schedules.T[..., None]                                   # [B, 1] each
        time = (torch.arange(self.frames) + begin) % (self.SEEN + length)        # [B, F]
        closed = time >= self.SEEN
        video.masked_fill_(closed[..., None, None, None], self.CURTAIN)

        filling = (time + 1) * length / self.SEEN
        emptying = self.SEEN + length - 1 - time
        left = torch.where(closed, emptying, filling)                            # [B, F]
        track = self.bar(length)                                                 # [B, 1, w]
        gauge = track + self.bar(left) - 1                                       # [B, F, w]
        video[..., -self.gauge:, :] = gauge[:, :, None, None]
        return video, torch.zeros_like(captions)

    def bar(self, length: torch.Tensor) -> torch.Tensor:
        """A bar for so many frames [...]: the share of each pixel that it covers, [..., w]."""
        pixels = length[..., None] * self.size / self.LONGEST
        return (pixels - torch.arange(self.size)).clamp(0, 1)


WORLDS = {"shapes": Shapes, "digits": Digits, "occluder": Occluder, "recall": Recall}


def words_of(data: str) -> tuple[tuple[str, ...], ...]:
    """The words that captions of the world `data` use, by slot; none for your own clips."""
    if data not in WORLDS:
        return ((),) * CAPTION_SLOTS
    world = WORLDS[data]
    return world.colours, world.things, world.paces


def prompts_of(data: str) -> tuple[str, ...]:
    """Captions of four videos that show what the world `data` is; empty for your own clips."""
    return WORLDS.get(data, Clips).prompts


def make_world(name: str, frames: int = 12, size: int = 16, seed: int = 0) -> Clips:
    """The built-in world of that name: clips of `frames` frames of `size` x `size` pixels.

    ValueError, one line, for another name or for sizes that make no world.
    """
    if name not in WORLDS:
        raise ValueError(f"no world called {name!r}; the worlds are {', '.join(WORLDS)}")
    return WORLDS[name](name, frames, size, seed)


def require(module: str, package: str, what: str):
    """The module, imported; or a ModuleNotFoundError of one line that says what to install."""
    try:
        return import_module(module)
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"{what} needs {package}, which is not installed: "
                                  f"pip install {package}") from None
