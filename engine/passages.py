"""Metrics of the occluder world: does the subject come out from behind the bar as it went in,
where and when it must?

The world is deterministic. A subject turns at a wall, crosses behind the bar and turns at the
wall beyond it, so its course between two turns is known from what was seen before:

    wall         bar          wall
     |  x(t)   |######|         |        x(t) = low + v |t - turn|    on the left, mirrored right
     |\\        |######|         |
     | `-.     |######|         |        next turn = turn + span / v,   span = high - low
     |    `-.  |######|         |
     |       `-|##hidden        |        y(next turn): straight on, folded at floor and ceiling
     |         |###`-.|         |        (toy_data.bounce)
     |         |######`-.       |
     |         |######|  `-.    |
     |         |######|     `-. |
     |         |######|        `|

A *visit* is a run of frames in which the subject is seen beside the bar, on one side. In every
frame of it `seen_beside` finds the shape and place that, drawn by the world's own geometry,
match the pixels best. `fit` makes of them the turn and the speed, and `judge_video` compares
each visit with what the one before it foretells.

Letters: B batch, F frames, h, w pixels of a frame, n frames seen on one side, S shapes,
G places of a grid. Points are (y, x), y downwards, in pixels. tests/test_passages.py.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from metrics import FIRST_COLOUR, FIRST_SHAPE, clamped, nearest_colour, over_pixels
from toy_data import HALF_BOX, HUES, SHAPES, SPEEDS, Occluder, coverage

FINE = 1 / 8                   # pixel of a frame of 16 pixels: between two places that are tried
ENOUGH = 0.15                  # of the subject must be beside the bar, or it counts as hidden
FAINT = 0.25                   # what has less chroma does not count for that
SLOWEST = 0.8 * SPEEDS["slow"][0] * math.cos(math.pi / 6)      # along x, at 16 pixels: with a
FASTEST = 1.2 * SPEEDS["fast"][1]      # margin, what a course of the world can be
TURNS = np.arange(-12, 12, 0.05)       # turns that are tried, in frames before and after a visit
LATE = 1.0                     # frame: a turn may be so much too early or too late
AWAY = 1.5                     # pixels at 16 pixels: and so far from its place at the turn
SHOWN = 3                      # frames of a visit from which a course can be told
USUAL = 12                     # frames of a crossing, about: where no subject is ever seen
PARTS = ("out", "colour", "shape", "time", "place")
ESSENTIAL = PARTS[:4]          # of survival: a place drifts with every small error of speed


class Visit(NamedTuple):
    """What is seen of the subject from its coming out to its going in."""
    right: bool                # on which side of the bar
    frames: np.ndarray         # [n] their numbers
    mass: np.ndarray           # [n] how much is seen, as a share of the whole subject
    y: np.ndarray              # [n] where its box stands ...
    x: np.ndarray              # ... with x from the nearest edge of the frame
    shape: int                 # index into SHAPES: the best for all these frames together
    colour: int                # index into COLOURS


class Course(NamedTuple):
    """How it moves: x(t) = low + speed |t - turn|, from the nearest edge of the frame."""
    turn: float                # frame at which it is at the wall
    speed: float               # along x, pixels a frame
    y: float                   # where it is at the turn ...
    y_speed: float             # ... and how fast it moves along y then, downwards


# ---- seeing --------------------------------------------------------------------------------

@lru_cache(maxsize=4)
def templates(size: int) -> tuple[Tensor, Tensor]:
    """(places [Gy, Gx, 2], pictures [S, Gy Gx, h edge]): what can be seen left of the bar."""
    box = Occluder.half_box * size
    edge = bar_edge(size)
    step = FINE * size / 16
    y = torch.arange(box, size - box + step, step)
    x = torch.arange(box, edge + box, step)
    places = torch.cartesian_prod(y, x)                      # [Gy Gx, 2]
    kinds = torch.arange(len(SHAPES))
    pictures = drawn(kinds[:, None], places, size)           # [S, Gy Gx, h, w]
    places = places.view(len(y), len(x), 2)
    return places, pictures[..., :edge].flatten(2)


def bar_edge(size: int) -> int:
    """Pixels on either side of the bar."""
    left, _ = Occluder.BAR
    return round(left * size)


def drawn(kinds: Tensor, places: Tensor, size: int) -> Tensor:
    """Shapes as the world draws them, without the bar: [..., size, size] in [0, 1]."""
    return coverage(kinds, places, size, size, Occluder.half_box / HALF_BOX)


def whole_mass(size: int) -> float:
    """Pixels that a subject covers, the mean over the three shapes."""
    middle = torch.full((len(SHAPES), 2), size / 2)
    kinds = torch.arange(len(SHAPES))
    mass = over_pixels(drawn(kinds, middle, size))
    return mass.mean().item()


def colourful(video: Tensor) -> Tensor:
    """Chroma, [..., h, w] in [0, 1]: black, white and the grey bar have none."""
    least, most = clamped(video).aminmax(dim=-3)
    return (most - least) / 2


def seen_beside(cover: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """For covers [n, h, edge] beside the bar, the bar on their right: (places [n, S, 2], misfit
    [n, S]), each shape's best place and the sum of its squared differences there."""
    places = []
    misfits = []
    for part in cover.flatten(1).split(256):                 # all places of 256 frames are large
        place, misfit = best_places(part, size)
        places.append(place)
        misfits.append(misfit)
    return torch.cat(places), torch.cat(misfits)


def best_places(cover: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """`seen_beside` of covers [n, h edge]."""
    places, pictures = templates(size)
    high, wide, _ = places.shape
    # |cover - picture|^2, for every picture at once, less |cover|^2.
    overlap = cover @ pictures.flatten(0, 1).T               # [n, S Gy Gx]
    square = pictures.square().sum(2).flatten() - 2 * overlap
    square = square.unflatten(1, (-1, high * wide))          # [n, S, Gy Gx]
    least, best = square.min(2)                              # [n, S]
    row = best // wide
    column = best % wide

    # A parabola through the best place and its neighbours: finer than the grid.
    square = square.unflatten(2, (high, wide))
    on_column = column[..., None, None].expand(-1, -1, high, 1)
    on_row = row[..., None, None].expand(-1, -1, 1, wide)
    along_y = square.gather(3, on_column).squeeze(3)         # [n, S, Gy]
    along_x = square.gather(2, on_row).squeeze(2)            # [n, S, Gx]
    beyond = torch.stack([vertex(along_y, row), vertex(along_x, column)], 2)
    step = places[1, 1] - places[0, 0]                       # [2]
    place = places.flatten(0, 1)[best] + beyond * step
    misfit = least + cover.square().sum(1, keepdim=True)
    return place, misfit


def vertex(values: Tensor, best: Tensor) -> Tensor:
    """How far beyond index `best` [n, S] the least of values [n, S, G] is, in steps, -0.5 to
    0.5; 0 at the ends."""
    inside = best.clamp(1, values.shape[2] - 2)[..., None]
    before = values.gather(2, inside - 1)
    here = values.gather(2, inside)
    after = values.gather(2, inside + 1)
    bend = before - 2 * here + after
    beyond = (before - after) / (2 * bend.clamp_min(1e-6))
    beyond = beyond.clamp(-0.5, 0.5)
    return torch.where(inside[..., 0] == best, beyond[..., 0], 0.0)


class Beside(NamedTuple):
    """A batch of videos beside the bar: both sides, the right one mirrored, frame by frame."""
    seen: Tensor               # bool [2, B, F]
    mass: Tensor               # [2, B, F] share of the whole subject
    colour: Tensor             # [2, B, F] index into COLOURS
    place: Tensor              # [2, B, F, S, 2] each shape's best place
    misfit: Tensor             # [2, B, F, S]


def look(video: Tensor) -> Beside:
    """What video [B, F, 3, h, h] in [-1, 1] shows beside the bar."""
    size = video.shape[-1]
    edge = bar_edge(size)
    mirrored = video.flip(-1)
    both = torch.stack([video[..., :edge], mirrored[..., :edge]])          # [2, B, F, 3, h, edge]
    cover = colourful(both)                                  # [2, B, F, h, edge]
    shown = cover * (cover > FAINT)                          # noise must not add up
    mass = over_pixels(shown) / whole_mass(size)             # [2, B, F]
    seen = mass >= ENOUGH
    colour = nearest_colour(both.flatten(0, 1), cover.flatten(0, 1), HUES)
    place = torch.zeros(*seen.shape, len(SHAPES), 2)
    misfit = torch.zeros(*seen.shape, len(SHAPES))
    if seen.any():
        place[seen], misfit[seen] = seen_beside(cover[seen], size)
    return Beside(seen, mass, colour.view(seen.shape), place, misfit)


def visits_of(beside: Beside, b: int) -> list[Visit]:
    """The visits of video `b`, in their order."""
    visits = []
    for right in (0, 1):
        for frames in runs(beside.seen[right, b]):
            at = (right, b, frames)
            shape = beside.misfit[at].sum(0).argmin().item()
            colour = beside.colour[at].mode().values.item()
            y, x = beside.place[at][:, shape].double().numpy().T
            mass = beside.mass[at].double().numpy()
            visits.append(Visit(bool(right), frames.numpy(), mass, y, x, shape, colour))
    return sorted(visits, key=lambda visit: visit.frames[0])


def runs(seen: Tensor) -> list[Tensor]:
    """The frames of each unbroken run in seen [F]; a gap of one frame does not break it."""
    frames = seen.nonzero().flatten()
    if len(frames) == 0:
        return []
    breaks = frames.diff() > 2
    ends = breaks.nonzero().flatten() + 1
    return list(frames.tensor_split(ends))


# ---- the course ----------------------------------------------------------------------------

def fit(visit: Visit, size: int) -> Course:
    """The course that fits the places of a visit best, weighted by how much is seen.

    For every turn that is tried the best speed is known: least squares of x - low against
    |t - turn|, through 0.
    """
    low = Occluder.half_box * size
    weight = visit.mass / visit.mass.sum()
    turns = visit.frames.mean() + TURNS[:, None]             # [turns, 1]
    away = np.abs(visit.frames - turns)                      # [turns, n]
    x = np.maximum(visit.x - low, 0)
    product = weight * away * x
    square = weight * away**2
    speed = product.sum(1) / square.sum(1).clip(1e-9)        # [turns]
    speed = speed.clip(SLOWEST * size / 16, FASTEST * size / 16)
    distance = x - speed[:, None] * away
    misfit = weight * distance**2
    best = misfit.sum(1).argmin()
    turn = turns[best].item()
    y, y_speed = straight(visit, turn, low, size - low)
    return Course(turn, speed[best].item(), y, y_speed)


def straight(visit: Visit, turn: float, low: float, high: float) -> tuple[float, float]:
    """(y at the turn, speed along y then) of the best line through the visit's y, of which the
    second part may be mirrored at the floor or the ceiling: one bounce at most."""
    time = visit.frames - turn
    n = len(time)
    found = []
    for wall in (low, high):
        for bounce in range(1, n + 1):                       # the frame that shows it; n: none
            after = np.arange(n) >= bounce
            y = np.where(after, 2 * wall - visit.y, visit.y)
            misfit, slope, at_turn = line(time, y, visit.mass)
            if bounce < n and time[bounce] <= 0:             # it had bounced before the turn
                slope = -slope
                at_turn = 2 * wall - at_turn
            found.append((misfit, at_turn, slope))
    _, y, y_speed = min(found)
    return y, y_speed


def line(time: np.ndarray, y: np.ndarray, weight: np.ndarray) -> tuple[float, float, float]:
    """(mean squared misfit, slope, y at time 0) of the best line, weighted."""
    share = weight / weight.sum()
    mean_time = (share * time).sum()
    mean_y = (share * y).sum()
    t = time - mean_time
    covariance = (share * t * y).sum()
    variance = (share * t * t).sum()
    slope = covariance / max(variance, 1e-9)
    distance = y - mean_y - slope * t
    misfit = (share * distance**2).sum()
    return misfit, slope, mean_y - slope * mean_time


def folded(y: float, low: float, high: float) -> float:
    """Where a straight flight to y is, with elastic reflections at low and high."""
    span = high - low
    return high - abs((y - low) % (2 * span) - span)


# ---- judgements ----------------------------------------------------------------------------

class Foretold(NamedTuple):
    """What must come of a course."""
    right: bool                # on which side of the bar the subject comes out
    turn: float                # frame at which it is at the wall there
    y: float                   # where it is then
    crossing: float            # frames from wall to wall


def foretell(visit: Visit, course: Course, size: int) -> Foretold:
    low = Occluder.half_box * size
    high = size - low
    crossing = (high - low) / course.speed
    y = folded(course.y + course.y_speed * crossing, low, high)
    return Foretold(not visit.right, course.turn + crossing, y, crossing)


def judge_video(visits: list[Visit], twice: np.ndarray, size: int, colour: int,
                shape: int) -> list[dict[str, bool]]:
    """Of each passage of a video that could be foretold: what was right about it?

    `twice` [F]: frames with a subject on both sides. Wanted are this colour and this shape; -1
    is that of the first visit. A subject that stays away fails a passage for every crossing
    that there was time for.
    """
    F = len(twice)
    if not visits:
        return missed(F / USUAL)
    if colour < 0:
        colour = visits[0].colour
    if shape < 0:
        shape = visits[0].shape

    passages = []
    told = None
    since = 0
    for visit in visits:
        course = fit(visit, size)
        ends = visit.frames[-1]
        if told:
            if ends == F - 1 and told.turn > F - 2:
                return passages                              # it had no time to turn
            passages += missed((course.turn - told.turn) / told.crossing)
            right = compare(course, told, size)
            on_its_side = visit.right == told.right
            right["out"] = on_its_side and not twice[since:ends + 1].any()
            right["colour"] = visit.colour == colour
            right["shape"] = visit.shape == shape
            passages.append(right)
        since = visit.frames[0]
        if len(visit.frames) >= SHOWN:
            told = foretell(visit, course, size)
        elif told:                                           # too short to tell: as before
            told = told._replace(right=not visit.right, turn=course.turn + told.crossing)
    if not told:                                             # it went after a glimpse or two
        return missed((F - 1 - visits[-1].frames[-1]) / USUAL)
    # In the last frames it is out already, if all is right.
    late = F - 1 - LATE - told.turn
    return passages + missed(late / told.crossing + 1)


def compare(course: Course, told: Foretold, size: int) -> dict[str, bool]:
    """Are time and place as foretold?"""
    late = abs(course.turn - told.turn)
    away = abs(course.y - told.y) * 16 / size
    return {"time": bool(late <= LATE), "place": bool(away <= AWAY)}


def missed(number: float) -> list[dict[str, bool]]:
    """So many passages, rounded down, at which nothing came out."""
    wrong = dict.fromkeys(PARTS, False)
    return [wrong] * max(0, int(number))


@torch.no_grad()
def passage_report(video: Tensor, captions: Tensor) -> dict[str, float]:
    """Shares of the passages behind the bar, in all of video [B, F, 3, h, h], that are right.

    out       a subject comes out on the other side of the bar, and meanwhile there is no second
    colour    it has the caption's colour (where that names none, the first visit's)
    shape     the same for the shape
    time      it turns at the wall within LATE frames of when the visit before foretells
    place     it does so within AWAY pixels of where that foretells
    survival  out and colour and shape and time

    NaN where no passage could be foretold, as in videos of a few frames.
    """
    size = video.shape[-1]
    beside = look(video.float().cpu())
    twice = beside.seen.all(0).numpy()
    passages = []
    for b, (colour, thing, _) in enumerate(captions.tolist()):
        wanted = colour - FIRST_COLOUR if colour else -1
        shape = thing - FIRST_SHAPE if thing else -1
        passages += judge_video(visits_of(beside, b), twice[b], size, wanted, shape)

    report = dict.fromkeys((*PARTS, "survival"), math.nan)
    for name in report:
        needed = ESSENTIAL if name == "survival" else (name,)
        right = [all(passage[part] for part in needed) for passage in passages]
        if right:
            report[name] = sum(right) / len(right)
    return report
