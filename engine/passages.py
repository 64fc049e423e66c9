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
from collections import Counter
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
    edge = round(Occluder.BAR[0] * size)
    step = FINE * size / 16
    y = torch.arange(box, size - box + step, step)
    x = torch.arange(box, edge + box, step)
    places = torch.cartesian_prod(y, x)                      # [Gy Gx, 2]
    kinds = torch.arange(len(SHAPES))[:, None]               # [S, 1]
    scale = Occluder.half_box / HALF_BOX
    pictures = coverage(kinds, places, size, size, scale)    # [S, Gy Gx, h, w]
    return places.view(len(y), len(x), 2), pictures[..., :edge].flatten(2)


def whole_mass(size: int) -> float:
    """Pixels that a subject covers, the mean over the three shapes."""
    middle = torch.full((len(SHAPES), 2), size / 2)
    kinds = torch.arange(len(SHAPES))
    scale = Occluder.half_box / HALF_BOX
    return float(coverage(kinds, middle, size, size, scale).sum() / len(SHAPES))


def colourful(video: Tensor) -> Tensor:
    """Chroma, [B, F, h, w] in [0, 1]: black, white and the grey bar have none."""
    least, most = clamped(video).aminmax(dim=2)
    return (most - least) / 2


def seen_beside(cover: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """For covers [n, h, edge] beside the bar, the bar on their right: (places [n, S, 2], misfit
    [n, S]), each shape's best place and the sum of its squared differences there."""
    places, pictures = templates(size)                       # [Gy, Gx, 2], [S, Gy Gx, pixels]
    high, wide = places.shape[:2]
    found = []
    misfits = []
    for part in cover.flatten(1).split(256):
        overlap = part @ pictures.flatten(0, 1).T            # [n, S Gy Gx]
        square = pictures.square().sum(2).flatten() - 2 * overlap
        square = square.unflatten(1, (-1, high, wide))       # [n, S, Gy, Gx]
        least, best = square.flatten(2).min(2)               # [n, S]
        row = best // wide
        column = best % wide
        # A parabola through the best place and its neighbours: finer than the grid.
        along_y = square.gather(3, column[..., None, None].expand(-1, -1, high, 1))[..., 0]
        along_x = square.gather(2, row[..., None, None].expand(-1, -1, 1, wide))[..., 0, :]
        beyond = torch.stack([vertex(along_y, row), vertex(along_x, column)], 2)
        step = places[1, 1] - places[0, 0]                   # [2]
        found.append(places.flatten(0, 1)[best] + beyond * step)
        misfits.append(least + part.square().sum(1, keepdim=True))
    return torch.cat(found), torch.cat(misfits)


def vertex(values: Tensor, best: Tensor) -> Tensor:
    """How far beyond index `best` [n, S] the least of values [n, S, G] is, in steps, -0.5 to
    0.5; 0 at the ends."""
    inside = best.clamp(1, values.shape[2] - 2)
    before, here, after = (values.gather(2, inside[..., None] + i)[..., 0] for i in (-1, 0, 1))
    bend = (before - 2 * here + after).clamp_min(1e-6)
    beyond = (before - after) / (2 * bend)
    return torch.where(inside == best, beyond.clamp(-0.5, 0.5), 0.0)


def visits_of(video: Tensor) -> tuple[list[list[Visit]], np.ndarray]:
    """(of each video its visits in their order, twice [B, F]: is it on both sides at once?)

    Video [B, F, 3, h, w] in [-1, 1] of square frames."""
    size = video.shape[-1]
    edge = round(Occluder.BAR[0] * size)
    beside = torch.stack([video[..., :edge], video.flip(-1)[..., :edge]])  # [2, B, F, 3, h, edge]
    cover = torch.stack([colourful(side) for side in beside])
    shown = cover * (cover > FAINT)                          # noise must not add up
    mass = over_pixels(shown) / whole_mass(size)             # [2, B, F]
    seen = mass >= ENOUGH
    colours = torch.stack([nearest_colour(side, part, HUES)
                           for side, part in zip(beside, cover)])
    places, misfit = seen_beside(cover[seen], size)          # [n, S, 2], [n, S]
    number = torch.full(seen.shape, -1)
    number[seen] = torch.arange(len(places))                 # where in them a frame stands

    videos = []
    for b in range(len(video)):
        visits = []
        for right in (False, True):
            for frames in runs(seen[int(right), b]):
                at = (int(right), b, frames)
                rows = number[at]
                shape = int(misfit[rows].sum(0).argmin())
                colour = Counter(colours[at].tolist()).most_common(1)[0][0]
                y, x = places[rows, shape].T.double().numpy()
                visits.append(Visit(right, frames.numpy(), mass[at].double().numpy(), y, x,
                                    shape, colour))
        videos.append(sorted(visits, key=lambda visit: visit.frames[0]))
    return videos, seen.all(0).numpy()


def runs(seen: Tensor) -> list[Tensor]:
    """The frames of each unbroken run in seen [F]; a gap of one frame does not break it."""
    frames = seen.nonzero().flatten()
    if not len(frames):
        return []
    ends = (frames.diff() > 2).nonzero().flatten() + 1
    return list(frames.tensor_split(ends))


# ---- the course ----------------------------------------------------------------------------

def fit(visit: Visit, size: int) -> Course:
    """The course that fits the places of a visit best, weighted by how much is seen.

    For every turn that is tried the best speed is known: least squares of x - low against
    |t - turn|, through 0.
    """
    low = Occluder.half_box * size
    weight = visit.mass / visit.mass.sum()
    middle = visit.frames.mean()
    turns = middle + TURNS[:, None]                          # [turns, 1]
    away = np.abs(visit.frames - turns)                      # [turns, n]
    x = np.maximum(visit.x - low, 0)
    speed = (weight * away * x).sum(1) / (weight * away**2).sum(1).clip(1e-9)
    speed = speed.clip(SLOWEST * size / 16, FASTEST * size / 16)
    misfit = (weight * (x - speed[:, None] * away)**2).sum(1)
    best = misfit.argmin()
    turn = float(turns[best, 0])
    y, y_speed = straight(visit, turn, low, size - low)
    return Course(turn, float(speed[best]), y, y_speed)


def straight(visit: Visit, turn: float, low: float, high: float) -> tuple[float, float]:
    """(y at the turn, speed along y then) of the best line through the visit's y, of which the
    second part may be mirrored at the floor or the ceiling: one bounce at most."""
    best = (np.inf, 0.0, 0.0)
    time = visit.frames - turn
    for wall in (low, high):
        for bounce in range(1, len(time) + 1):               # the last: none
            after = np.arange(len(time)) >= bounce
            y = np.where(after, 2 * wall - visit.y, visit.y)
            slope, at_turn, misfit = line(time, y, visit.mass)
            if misfit < best[0] - 1e-9:
                mirrored = bounce < len(time) and time[bounce] <= 0
                sign = -1 if mirrored else 1                 # it had bounced before the turn
                at_turn = 2 * wall - at_turn if mirrored else at_turn
                best = (misfit, at_turn, sign * slope)
    return best[1], best[2]


def line(time: np.ndarray, y: np.ndarray, weight: np.ndarray) -> tuple[float, float, float]:
    """(slope, y at time 0, mean squared misfit) of the best line, weighted."""
    share = weight / weight.sum()
    t = time - (share * time).sum()
    slope = (share * t * y).sum() / max((share * t * t).sum(), 1e-9)
    middle = (share * y).sum()
    misfit = (share * (y - middle - slope * t)**2).sum()
    return slope, middle - slope * (share * time).sum(), misfit


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
    span = size - 2 * low
    crossing = span / course.speed
    y = folded(course.y + course.y_speed * crossing, low, size - low)
    return Foretold(not visit.right, course.turn + crossing, y, crossing)


def judge_video(visits: list[Visit], twice: np.ndarray, size: int, colour: int,
                shape: int) -> list[dict[str, bool]]:
    """Of each passage of a video that could be foretold: what was right about it?

    `twice` [F]: frames with a subject on both sides. Wanted are this colour and this shape; -1
    is that of the first visit. A subject that stays away fails a passage for every crossing
    that there was time for.
    """
    F = len(twice)
    crossing = 16 / SPEEDS["fast"][0]      # about that of the world's mean speed
    if not visits:
        return missed(F / crossing)
    if colour < 0:
        colour = visits[0].colour
    if shape < 0:
        shape = visits[0].shape

    passages = []
    next_one = None
    for i, visit in enumerate(visits):
        course = fit(visit, size)
        if next_one:
            if visit.frames[-1] == F - 1 and next_one.turn > F - 2:
                return passages                              # it had no time to turn
            meanwhile = slice(visits[i - 1].frames[0], visit.frames[-1] + 1)
            away = abs(course.y - next_one.y) * 16 / size
            passages += missed((course.turn - next_one.turn) / next_one.crossing)
            passages.append({
                "out": visit.right == next_one.right and not twice[meanwhile].any(),
                "colour": visit.colour == colour,
                "shape": visit.shape == shape,
                "time": bool(abs(course.turn - next_one.turn) <= LATE),
                "place": bool(away <= AWAY),
            })
        if len(visit.frames) >= SHOWN:
            next_one = foretell(visit, course, size)
        elif next_one:                                       # too short a visit to tell: as before
            next_one = next_one._replace(right=not visit.right,
                                         turn=course.turn + next_one.crossing)
    if next_one:
        # In the last frames it is out already, if all is right.
        late = F - 1 - LATE - next_one.turn
        passages += missed(late / next_one.crossing + 1)
    return passages


def missed(number: float) -> list[dict[str, bool]]:
    """So many passages, rounded down, at which nothing came out."""
    wrong = dict.fromkeys(("out", "colour", "shape", "time", "place"), False)
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
    visits, twice = visits_of(video.float().cpu())
    passages = []
    for b, (colour, thing, _) in enumerate(captions.tolist()):
        wanted = colour - FIRST_COLOUR if colour else -1
        shape = thing - FIRST_SHAPE if thing else -1
        passages += judge_video(visits[b], twice[b], size, wanted, shape)

    held = {name: [right[name] for right in passages]
            for name in ("out", "colour", "shape", "time", "place")}
    all_four = [held[name] for name in ("out", "colour", "shape", "time")]
    held["survival"] = [all(right) for right in zip(*all_four)]
    if not passages:
        return dict.fromkeys(held, math.nan)
    return {name: sum(right) / len(right) for name, right in held.items()}
