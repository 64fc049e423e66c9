"""Metrics that look at frames alone. Nothing is learned: the world is known, so is the answer.

Each takes video [B, F, 3, h, w] in [-1, 1] (clamped if beyond) and answers per frame, so that
drift is a curve:

    subject            [B, F, h, w]   where something coloured is: all below start here
    centroid           [B, F, 2]      where its middle is
    speed              [B, F - 1]     how far that went
    alive              [B, F]         is there one subject, of about the true size?
    colour_index       [B, F]         which of COLOURS
    shape_index        [B, F]         which of SHAPES
    caption_match      [B, F]         does the frame show what its caption says?
    motion_residual    [B]            how far from true flight and bounce, in pixels
    survival_report                   a summary of many rollouts
    recall_report                     the same for the recall world

All are for the shapes world: one coloured subject, which is one of three shapes. The other
worlds are judged by engine/digit_metrics.py and engine/passages.py, with what they share from
here; engine/judging.py has the list of all.

Letters: B batch, F frames, h, w pixels of a frame, n frames of a window. Points are (y, x), y
downwards, in pixels. tests/test_metrics.py: true clips pass, and each way of spoiling a clip
fails the metric it is aimed at.
"""

import math
from itertools import combinations

import torch
import torch.nn.functional as nnf

from toy_data import COLOURS, HALF_BOX, HUES, SHAPES, SPEEDS, WORDS, coverage, offsets

EDGE = 0.6                            # width of the ramp in `subject`, and of templates
TRIANGLE = SHAPES.index("triangle")
TRIANGLE_DROP = HALF_BOX / 3          # its centre of mass is so far below its box's centre
TRIANGLE_APEX = 4 / 3 * HALF_BOX      # from there to its apex, the farthest point of all shapes
WINDOW = 10                           # frames of a fitted path: at most two bounces, if fast
FIRST_COLOUR = WORDS.index("red")     # ids of words, less these, index COLOURS and SHAPES
FIRST_SHAPE = WORDS.index("disc")
SLOW = WORDS.index("slow")
FAST = WORDS.index("fast")
SLOWEST = 0.5 * SPEEDS["slow"][0]     # what counts as motion, in pixels a frame at 16 pixels
FASTEST = 1.5 * SPEEDS["fast"][1]


# ---- small helpers -------------------------------------------------------------------------

def clamped(video: torch.Tensor) -> torch.Tensor:
    """The video in float32, its values within [-1, 1]."""
    return video.float().clamp(-1, 1)


def over_pixels(x: torch.Tensor) -> torch.Tensor:
    """The sum over each frame's pixels, [..., h, w] -> [...]."""
    return x.sum((-2, -1))


def side(video: torch.Tensor) -> int:
    """The shorter side of a frame in pixels: what sizes and speeds are shares of."""
    return min(video.shape[-2:])


def between(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """bool, in the shape of x: is it from low to high, both included?"""
    return (x >= low) & (x <= high)


# ---- the subject ---------------------------------------------------------------------------

@torch.no_grad()   # every metric starts here, so none of them records a gradient
def subject(video: torch.Tensor) -> torch.Tensor:
    """Where the subject is, [B, F, h, w] in [0, 1].

    By chroma, so that black, white and every grey (mush, the occluder's bar) are background.
    """
    least, most = clamped(video).aminmax(dim=2)              # [B, F, h, w]
    chroma = (most - least) / 2
    # The ramp is steeper than the picture's own. Chroma below 0.2 is nothing, so that pixel
    # noise does not add up over 256 pixels, and the outline stays at 0.5.
    return (0.5 + (chroma - 0.5) / EDGE).clamp(0, 1)


def subject_mass(video: torch.Tensor) -> torch.Tensor:
    """Soft area of the subject in pixels, [B, F]."""
    return over_pixels(subject(video))


def true_mass(size: int) -> float:
    """What `subject_mass` says of a true frame of `size` pixels.

    The mean over the three shapes, each in the middle of the frame.
    """
    kinds = torch.arange(3)
    middle = torch.full((3, 2), size / 2)
    shapes = coverage(kinds, middle, size, size, edge=EDGE)  # [3, h, w]
    return float(shapes.sum() / 3)


def centroid(video: torch.Tensor) -> torch.Tensor:
    """Centre of mass of the subject, [B, F, 2] (y, x) in pixels.

    It is the middle of the frame where there is no subject at all.
    """
    return centre_of_mass(subject(video))


def centre_of_mass(cover: torch.Tensor) -> torch.Tensor:
    """Of each frame of cover [..., h, w]: [..., 2] (y, x) in pixels; its middle if all is 0."""
    *_, h, w = cover.shape
    middle = torch.tensor([h / 2, w / 2], device=cover.device)
    y, x = offsets(middle, h, w)                             # [h, 1], [1, w]
    moment_y = over_pixels(cover * y)                        # [...]
    moment_x = over_pixels(cover * x)
    moment = torch.stack([moment_y, moment_x], dim=-1)       # [..., 2]
    mass = over_pixels(cover).clamp_min(1e-6)
    return middle + moment / mass[..., None]


def alive(video: torch.Tensor) -> torch.Tensor:
    """Is there one subject? bool [B, F].

    Its mass is 0.5 to 1.8 times the true one, and 90 % of it lies within a shape's reach of
    its centroid.
    """
    true = true_mass(side(video))
    least = 0.5 * true
    most = 1.8 * true
    reach = TRIANGLE_APEX * side(video) + 0.5                # and half a soft edge
    return in_one_place(subject(video), least, most, reach)


def in_one_place(cover: torch.Tensor, least: float, most: float, reach: float) -> torch.Tensor:
    """bool [B, F]: is the mass of cover [B, F, h, w] from `least` to `most`, and do 90 % of it
    lie within `reach` pixels of its centre?"""
    *_, h, w = cover.shape
    mass = over_pixels(cover)                                # [B, F]
    y, x = offsets(centre_of_mass(cover), h, w)              # [B, F, h, 1], [B, F, 1, w]
    distance_square = y * y + x * x                          # [B, F, h, w]
    near = distance_square <= reach**2
    mass_near = over_pixels(cover * near)
    right_size = between(mass, least, most)
    return right_size & (mass_near >= 0.9 * mass)


def where_alive(index: torch.Tensor, video: torch.Tensor) -> torch.Tensor:
    """`index` [B, F] in frames with a subject, -1 in the others."""
    gone = ~alive(video)
    return index.masked_fill(gone, -1)


# ---- colour and shape ----------------------------------------------------------------------

def colour_index(video: torch.Tensor) -> torch.Tensor:
    """Which of the first six COLOURS the subject has, [B, F]; -1 where not alive.

    The one whose direction is nearest (cosine) to the subject's mean colour.
    """
    best = nearest_colour(video, subject(video), HUES)
    return where_alive(best, video)


def nearest_colour(video: torch.Tensor, cover: torch.Tensor, number: int) -> torch.Tensor:
    """Which of the first `number` COLOURS is nearest (cosine) to the mean colour of a frame,
    weighted by cover [B, F, h, w]? [B, F]"""
    rgb = (clamped(video) + 1) / 2
    cover = cover[:, :, None]                                # [B, F, 1, h, w]
    mean = over_pixels(rgb * cover)                          # [B, F, 3]
    colours = list(COLOURS.values())
    hues = torch.tensor(colours[:number], device=video.device)
    hues = nnf.normalize(hues, dim=1)                        # [number, 3]
    likeness = mean @ hues.T                                 # [B, F, number]
    return likeness.argmax(2)


def shape_index(video: torch.Tensor) -> torch.Tensor:
    """Which of SHAPES the subject has, [B, F]; -1 where not alive.

    The one whose picture, drawn at the subject's centroid, has the highest cosine with it.
    """
    *_, h, w = video.shape
    cover = subject(video)[:, :, None]                       # [B, F, 1, h, w]

    # A template of each shape, its centre of mass on the subject's.
    kinds = torch.arange(len(SHAPES), device=video.device)
    drop = torch.zeros(len(SHAPES), 2, device=video.device)
    drop[TRIANGLE, 0] = TRIANGLE_DROP * side(video)
    centres = centroid(video)[:, :, None] - drop             # [B, F, 3 shapes, 2]
    template = coverage(kinds, centres, h, w, edge=EDGE)     # [B, F, 3 shapes, h, w]

    overlap = over_pixels(cover * template)                  # [B, F, 3 shapes]
    length = over_pixels(template.square()).sqrt()
    # The subject's own length is missing here: it is the same for all three.
    cosine = overlap / length.clamp_min(1e-6)
    best = cosine.argmax(2)
    return where_alive(best, video)


# ---- speed ---------------------------------------------------------------------------------

def speed(video: torch.Tensor) -> torch.Tensor:
    """Distance that the centroid moves from frame to frame, [B, F - 1] in pixels.

    It is less than the true speed where the subject bounces.
    """
    return centroid(video).diff(dim=1).norm(dim=2)


def at_16_pixels(distance: torch.Tensor, video: torch.Tensor) -> torch.Tensor:
    """A distance in this video's pixels, as in a frame of 16 pixels: the unit of SPEEDS."""
    return distance * 16 / side(video)


def steady_speed(video: torch.Tensor) -> torch.Tensor:
    """Speed about each frame as if without bounces, [B, F], at 16 pixels; needs F >= 2.

    Along each axis it is the median of the 11 steps about the frame: bounces shorten only a
    few of them.
    """
    steps = steady_steps(centroid(video))
    return at_16_pixels(steps, video)


def steady_steps(path: torch.Tensor) -> torch.Tensor:
    """`steady_speed` of a path [B, F, 2], in its own unit."""
    F = path.shape[1]
    n = min(11, F - 1)
    steps = path.diff(dim=1).abs()                           # [B, F - 1, 2]
    windows = steps.unfold(1, n, 1)                          # [B, F - n, 2, n]
    typical = windows.median(3).values.norm(dim=2)           # [B, F - n]

    frames = torch.arange(F, device=path.device)
    first_step = frames - n // 2                             # where each frame's window begins
    first_step = first_step.clamp(0, F - 1 - n)
    return typical[:, first_step]


def pace_word(video: torch.Tensor) -> torch.Tensor:
    """Id of the word for each frame's speed, slow or fast, [B, F].

    0 below 0.5 x the slowest speed of the world and above 1.5 x its fastest.
    """
    return pace_of(steady_speed(video))


def pace_of(steady: torch.Tensor) -> torch.Tensor:
    """The id of the word for a speed at 16 pixels, as above, in the shape of `steady`."""
    _, top_of_slow = SPEEDS["slow"]
    bottom_of_fast, _ = SPEEDS["fast"]
    middle = (top_of_slow + bottom_of_fast) / 2
    word = torch.where(steady < middle, SLOW, FAST)
    moving = between(steady, SLOWEST, FASTEST)
    return word.masked_fill(~moving, 0)


# ---- motion: a straight line, once it is unfolded ------------------------------------------

def motion_residual(video: torch.Tensor) -> torch.Tensor:
    """RMS distance, [B] in pixels, from the centroids to the best path with elastic bounces.

    Judged over windows of 10 frames. A path with unknown bounces is hard to fit, and a line is
    easy. So guess at which frames the subject bounced, undo those bounces (`unfolded`), fit a
    line (`misfit`), and keep the best guess, for each axis by itself.

    Frames that are not alive are left out, and so are windows with fewer than half of their
    frames alive; NaN if nothing is left. A frozen subject scores 0: read this beside `speed`.
    """
    _, F, _, h, w = video.shape
    n = min(WINDOW, F)
    window = window_frames(F, n, video.device)               # [windows, n]
    path = centroid(video)[:, window]                        # [B, windows, n, 2]
    y, x = path.unbind(3)                                    # [B, windows, n] each
    weight = alive(video)[:, window].float()                 # [B, windows, n]
    bounces = bounce_counts(n, video.device)                 # [guesses, n]

    box = HALF_BOX * side(video)
    drop = TRIANGLE_DROP * side(video)
    across = misfit(x, weight, bounces, box, w - box)        # [B, windows]
    # A triangle's centre of mass turns at lower walls than the others'. Try both pairs.
    down = misfit(y, weight, bounces, box, h - box)
    down_low = misfit(y, weight, bounces, box + drop, h - box + drop)
    square = across + torch.minimum(down, down_low)

    frames_alive = weight.sum(2)
    too_few = frames_alive < n / 2
    square = square.masked_fill(too_few, math.nan)
    return square.nanmean(1).sqrt()


def window_frames(F: int, n: int, device) -> torch.Tensor:
    """The frames of each window, [windows, n].

    Windows lie side by side; the last one ends with the video and may overlap its neighbour.
    """
    last = F - n
    first = torch.tensor([*range(0, last, n), last], device=device)
    return first[:, None] + torch.arange(n, device=device)


def bounce_counts(n: int, device) -> torch.Tensor:
    """Every way to bounce at most twice in n frames: bounces so far, [guesses, n], 0 to 2.

    A guess says at which frame the first bounce shows and at which the second; frame n means
    "not in this window". With n = 5 the guess (2, 4) is 0 0 1 1 2.
    """
    pairs = combinations(range(1, n + 1), 2)
    guesses = [*pairs, (n, n)]                               # the last: no bounce at all
    shows = torch.tensor(guesses, device=device)[..., None]  # [guesses, 2, 1]
    time = torch.arange(n, device=device)
    happened = time >= shows                                 # [guesses, 2, n]
    return happened.sum(1)


def unfolded(x: torch.Tensor, bounces: torch.Tensor, first: float, other: float):
    """Positions x [B, windows, n], the bounces of each guess undone: [B, windows, guesses, n].

    Mirror the box at the wall instead of the velocity, and the path flies straight on. Here p
    is the wall that is hit first, q the other, x the path in the box and u the unfolded one:

                                u          bounces so far     u
                             u                   0            x
        wall p  - - - - - u - - - - -            1 (at p)     2 p - x
                       x     x                   2 (at q)     2 (p - q) + x
                    x           x
        wall q  - - - - - - - - - - -
    """
    round_trip = 2 * (first - other)
    sign = torch.tensor([1, -1, 1], device=x.device)         # by bounces so far
    offset = torch.tensor([0, 2 * first, round_trip], device=x.device)
    x = x[:, :, None]                                        # [B, windows, 1, n]
    return sign[bounces] * x + offset[bounces]


def misfit(x, weight, bounces, low: float, high: float) -> torch.Tensor:
    """Mean square distance, [B, windows], from the unfolded path to its best straight line.

    x and weight are [B, windows, n], weight 1 where a frame counts and 0 elsewhere. Either
    wall, `low` or `high`, may be hit first; the least distance of all guesses is the answer.
    """
    high_first = unfolded(x, bounces, high, low)
    low_first = unfolded(x, bounces, low, high)
    u = torch.cat([high_first, low_first], 2)                # [B, windows, guesses, n]
    time = torch.arange(x.shape[2], device=x.device)

    counted = weight.sum(2, keepdim=True).clamp_min(1)
    share = weight / counted                                 # [B, windows, n], adds up to 1
    share = share[:, :, None]                                # the same for every guess

    # Least squares about the weighted means: slope = covariance / variance.
    t = time - over_frames(share * time)                     # [B, windows, 1, n]
    u = u - over_frames(share * u)
    covariance = over_frames(share * t * u)                  # [B, windows, guesses, 1]
    variance = over_frames(share * t * t)
    slope = covariance / variance.clamp_min(1e-6)
    distance = u - slope * t
    square = share * distance.square()
    return square.sum(3).amin(2)


def over_frames(x: torch.Tensor) -> torch.Tensor:
    """The sum over each window's frames, [..., n] -> [..., 1]."""
    return x.sum(3, keepdim=True)


# ---- judgements ----------------------------------------------------------------------------

def caption_match(video: torch.Tensor, captions: torch.Tensor) -> torch.Tensor:
    """Does each frame show what its clip's caption [B, 3] says? bool [B, F], F >= 2.

    An absent word matches anything that is alive. The speed word is judged over the 12 frames
    about each frame (`pace_word`).
    """
    captions = captions.to(video.device)
    colour, thing, pace = captions.T[..., None]              # [B, 1] each; 0 asks for nothing
    right_colour = colour_index(video) == colour - FIRST_COLOUR
    right_thing = shape_index(video) == thing - FIRST_SHAPE
    right_pace = pace_word(video) == pace

    words = ((colour, right_colour), (thing, right_thing), (pace, right_pace))
    return as_said(alive(video), words)


def as_said(match: torch.Tensor, words: tuple) -> torch.Tensor:
    """`match` [B, F], where of each pair in `words` (a word's ids [B, 1], where it is shown
    [B, F]) the word is shown or was not said."""
    for word, right in words:
        match = match & (right | (word == 0))
    return match


def survival_report(
    video: torch.Tensor, captions: torch.Tensor, last: int = 12, first: int = 3,
) -> dict[str, float]:
    """Fractions of the B rollouts that are still right at their end.

    Each is judged over the last `last` frames alone:

    alive     `alive` in at least 90 % of those frames
    colour    `colour_index` is the caption's colour in at least 90 % of them (a frame that is
              not alive has none)
    shape     the same for the shape
    moving    mean `speed` there is from 0.5 x the slowest to 1.5 x the fastest speed of the
              world
    survival  alive and colour and moving, all three by the same rollout: the number that the
              README quotes

    Where the caption names no colour (shape), the most frequent one of the first `first`
    frames, the first chunk, takes its place.
    """
    colour_ids, thing_ids, _ = captions.to(video.device).T   # [B] each
    start = video[:, :first]
    end = video[:, -last:]

    alive_at_end = mostly(alive(end))                        # [B], as are all below
    colour = asked_or_usual(colour_ids, FIRST_COLOUR, colour_index(start))
    colour_kept = kept(colour_index(end), colour)
    shape = asked_or_usual(thing_ids, FIRST_SHAPE, shape_index(start))
    shape_kept = kept(shape_index(end), shape)
    pace = speed(end).mean(1)
    pace = at_16_pixels(pace, video)
    moving = between(pace, SLOWEST, FASTEST)
    survival = alive_at_end & colour_kept & moving

    held = dict(alive=alive_at_end, colour=colour_kept, shape=shape_kept, moving=moving)
    held["survival"] = survival
    report = {}
    for name, rollouts in held.items():
        share = rollouts.float().mean()
        report[name] = share.item()
    return report


# ---- recall: behind the curtain --------------------------------------------------------------

def in_view(video: torch.Tensor) -> torch.Tensor:
    """Is the curtain of the recall world open? bool [B, F].

    A closed one is mid grey all over; else a frame is black but for its subject and the gauge.
    """
    light = clamped(video).mean((2, 3, 4))
    return light < -0.5


def recalled(video: torch.Tensor, colour: torch.Tensor, shape: torch.Tensor,
             when: torch.Tensor) -> dict[str, torch.Tensor]:
    """For each video the share, [B], of the frames `when` [B, F] that show a subject (alive),
    one of index `colour` [B], one of index `shape` [B], and one of both (survival). All are 0
    without such a frame.
    """
    there = alive(video) & when                              # [B, F]
    right_colour = colour_index(video) == colour[:, None]
    right_shape = shape_index(video) == shape[:, None]
    frames = when.sum(1)
    frames = frames.clamp_min(1)                             # [B]
    right = {"alive": there, "colour": there & right_colour, "shape": there & right_shape}
    right["survival"] = there & right_colour & right_shape
    shares = {}
    for name, seen in right.items():
        shares[name] = seen.sum(1) / frames
    return shares


def recall_report(video: torch.Tensor, captions: torch.Tensor) -> dict[str, float]:
    """How much of the subject comes back, of B videos of the recall world: means of `recalled`.

    The subject is what is in view before the first curtain, by its most frequent colour and
    shape. Judged are all frames in view after that curtain; a video that never opens it again
    has 0 of everything. The captions are null and say nothing.
    """
    view = in_view(video)                                    # [B, F]
    closes = view[:, :-1] & ~view[:, 1:]                     # a curtain that hides something
    curtains = closes.cumsum(1)
    curtains = nnf.pad(curtains, (1, 0))                     # [B, F], so far
    before = view & (curtains == 0)
    after = view & (curtains > 0)
    colour = most_frequent(colour_index(video), before, HUES)
    shape = most_frequent(shape_index(video), before, len(SHAPES))
    report = {}
    for name, share in recalled(video, colour, shape, after).items():
        mean = share.mean()
        report[name] = mean.item()
    return report


def most_frequent(index: torch.Tensor, when: torch.Tensor, kinds: int) -> torch.Tensor:
    """The most frequent index, 0 to kinds - 1, in the frames `when` [B, F] of each video: [B];
    -1 where there is none."""
    every = torch.arange(kinds, device=index.device)
    shows = index[..., None] == every                        # [B, F, kinds]
    shows &= when[..., None]
    count = shows.sum(1)                                     # [B, kinds]
    most, best = count.max(1)
    return best.masked_fill(most == 0, -1)


def asked_or_usual(ids: torch.Tensor, first_id: int, seen: torch.Tensor) -> torch.Tensor:
    """The index, [B], that each caption's word asks for.

    Where ids [B] has no word, it is the most frequent one of `seen` [B, frames].
    """
    usual = seen.mode(1).values
    return torch.where(ids > 0, ids - first_id, usual)


def kept(seen: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Is `seen` [B, frames] mostly the index `wanted` [B]? bool [B]; no, where that is -1."""
    wanted = wanted[:, None]
    right = (seen == wanted) & (wanted >= 0)
    return mostly(right)


def mostly(right: torch.Tensor) -> torch.Tensor:
    """bool [B, frames] -> bool [B]: in at least 90 % of the frames."""
    return right.float().mean(1) >= 0.9
