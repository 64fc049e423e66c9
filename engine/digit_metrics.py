"""metrics.py for the digits world: the same names, for a handwritten digit in seven colours.

    alive, centroid, speed, colour_index, digit_index, caption_match, survival_report

What differs. White has no chroma, so the subject is what is bright. And which digit it is no
template says: a small classifier does (`Classifier`), the one thing here that is learned. It
learns in seconds from scikit-learn's digits, as the world draws them, and its accuracy on true
frames of pictures that it has not learned from stands beside every report.

Letters: B batch, F frames, h, w pixels of a frame, n frames of any number of videos.
tests/test_digit_metrics.py.
"""

from functools import lru_cache

import torch
import torch.nn.functional as nnf
from torch import Tensor

from metrics import (FASTEST, FIRST_COLOUR, SLOWEST, as_said, asked_or_usual, at_16_pixels, between,
                     centre_of_mass, clamped, in_one_place, kept, mostly, nearest_colour,
                     over_pixels, pace_of, side, steady_steps)
from toy_data import COLOURS, DIGITS, WORDS, Digits

FIRST_DIGIT = WORDS.index("zero")
DIM = 0.2                      # what is darker than this share of white is background
SAMPLES = 8                    # of a digit along each axis: its picture has as many pixels
MARGIN = 1.15                  # how far they reach, in halves of the box
HELD_OUT = 360                 # of the 1797 pictures: for testing the classifier alone
NARROW = 3.0                   # width of the kernel: distances count in a third of their median
RIDGE = 1e-2
LIKE_A_DIGIT = 0.4             # least answer to the best of ten questions; 1 is sure


# ---- the subject ---------------------------------------------------------------------------

@torch.no_grad()
def subject(video: Tensor) -> Tensor:
    """How bright the subject is, [B, F, h, w] in [0, 1]: the brightest channel, which is 1 in
    every colour of the world."""
    bright = (clamped(video).amax(2) + 1) / 2
    return bright * (bright > DIM)


def centroid(video: Tensor) -> Tensor:
    """Its centre of mass, [B, F, 2] (y, x) in pixels."""
    return centre_of_mass(subject(video))


def speed(video: Tensor) -> Tensor:
    """Distance that the centroid moves from frame to frame, [B, F - 1] in pixels."""
    return centroid(video).diff(dim=1).norm(dim=2)


def alive(video: Tensor) -> Tensor:
    """Is there one subject? bool [B, F].

    Its mass is that of a true digit, within a quarter, and 90 % of it lies within the box.
    """
    size = side(video)
    lightest, heaviest = classifier(size).masses
    least = 0.75 * lightest
    most = 1.25 * heaviest
    reach = 1.25 * Digits.half_box * size + 0.5
    return in_one_place(subject(video), least, most, reach)


def colour_index(video: Tensor) -> Tensor:
    """Which of COLOURS the subject has, [B, F]; -1 where not alive."""
    best = nearest_colour(video, subject(video), len(COLOURS))
    gone = ~alive(video)
    return best.masked_fill(gone, -1)


def digit_index(video: Tensor) -> Tensor:
    """Which digit it is, 0 to 9, [B, F]; -1 where not alive, or where it is like none."""
    cover = subject(video)
    B, F, h, w = cover.shape
    judge = classifier(side(video))
    answers = judge(cover.view(B * F, h, w))                 # [B F, 10]
    sure, best = answers.view(B, F, 10).max(2)
    none = ~alive(video) | (sure < LIKE_A_DIGIT)
    return best.masked_fill(none, -1)


# ---- the classifier ------------------------------------------------------------------------

def normalised(cover: Tensor) -> Tensor:
    """Covers [n, h, w], seen from their own centre of mass and at one length: [n, 64]."""
    n, h, w = cover.shape
    half = MARGIN * Digits.half_box * min(h, w)
    edge = half * (1 - 1 / SAMPLES)
    steps = torch.linspace(-edge, edge, SAMPLES, device=cover.device)      # from the centre
    y, x = centre_of_mass(cover).T[..., None]                # [n, 1] each
    y = 2 * (y + steps) / h - 1                              # grid_sample's unit: [-1, 1]
    x = 2 * (x + steps) / w - 1                              # [n, 8]
    x = x[:, None, :].expand(n, SAMPLES, SAMPLES)
    y = y[:, :, None].expand(n, SAMPLES, SAMPLES)
    grid = torch.stack([x, y], 3)
    seen = nnf.grid_sample(cover[:, None], grid, align_corners=False)
    return nnf.normalize(seen.flatten(1), dim=1)


class Classifier:
    """Kernel ridge regression on true frames: which digit is it?

        answers(u) = k(u, X) (k(X, X) + ridge)^-1 Y,   k(u, x) = exp(-narrow |u - x|^2 / median)

    X are the frames that it knows, as `normalised` sees them, Y their digits, one-hot. Solved at
    once: nothing is random but the places at which the digits are drawn, and these are seeded.
    Where a frame is like none that it knows, all ten answers are about 0. `accuracy` is its share
    of right answers on frames of the HELD_OUT pictures, `masses` the least and the greatest mass
    of a true digit.
    """

    def __init__(self, size: int):
        world = Digits("digits", frames=1, size=size, seed=0)
        draw = torch.Generator().manual_seed(0)
        order = torch.randperm(len(world.images), generator=draw)
        known = order[HELD_OUT:]
        unknown = order[:HELD_OUT]
        digits = torch.from_numpy(world.labels).long()

        frames = drawn(world, known, draw)                   # [1437, h, w]
        self.masses = over_pixels(frames).aminmax()
        frames[::2] = softened(frames[::2], draw)            # as a model's frames are
        self.X = normalised(frames)
        square = torch.cdist(self.X, self.X).square()
        self.width = square.median().item() / NARROW
        Y = nnf.one_hot(digits[known], len(DIGITS)).double()
        K = (-square / self.width).exp().double()
        K.diagonal().add_(RIDGE)
        self.weights = torch.linalg.solve(K, Y).float()      # [1437, 10]

        tested = unknown.repeat(4)                           # each at four places
        answers = self(drawn(world, tested, draw))
        right = answers.argmax(1) == digits[tested]
        self.pictures = known, unknown                       # their numbers in the world
        self.accuracy = right.float().mean().item()

    def __call__(self, cover: Tensor) -> Tensor:
        """Answers [n, 10] for covers [n, h, w]."""
        X = self.X.to(cover.device)
        weights = self.weights.to(cover.device)
        answers = []
        for part in cover.split(4096):                       # its likeness to all X is large
            square = torch.cdist(normalised(part), X).square()
            likeness = (-square / self.width).exp()
            answers.append(likeness @ weights)
        return torch.cat(answers)


def drawn(world: Digits, which: Tensor, draw: torch.Generator) -> Tensor:
    """True frames [n, h, w] of the pictures `which` [n], each anywhere in its frame."""
    place = torch.rand(len(which), 1, 2, generator=draw)
    centre = world.box + place * (world.size - 2 * world.box)
    pictures = torch.from_numpy(world.images)[which]
    bright = world.cover(pictures, centre)[:, 0]
    return bright * (bright > DIM)


def softened(frames: Tensor, draw: torch.Generator) -> Tensor:
    """Frames [n, h, w], each pixel half itself and half its neighbourhood, and noisy."""
    around = nnf.avg_pool2d(frames[:, None], 3, stride=1, padding=1)[:, 0]
    noise = 0.05 * torch.randn(frames.shape, generator=draw)
    soft = ((frames + around) / 2 + noise).clamp(0, 1)
    return soft * (soft > DIM)


@lru_cache(maxsize=4)
@torch.no_grad()
def classifier(size: int) -> Classifier:
    """The one for frames of `size` pixels: it is made once in a process."""
    return Classifier(size)


def accuracy_line(size: int) -> str:
    """What the judge itself is worth."""
    share = 100 * classifier(size).accuracy
    return (f"the judge of digits is right on {share:.1f} % of true frames, of {HELD_OUT} "
            "pictures that it has not learned from")


# ---- judgements ----------------------------------------------------------------------------

def caption_match(video: Tensor, captions: Tensor) -> Tensor:
    """Does each frame show what its clip's caption [B, 3] says? bool [B, F], as in metrics.py."""
    colour, thing, pace = captions.to(video.device).T[..., None]           # [B, 1] each
    right_colour = colour_index(video) == colour - FIRST_COLOUR
    right_thing = digit_index(video) == thing - FIRST_DIGIT
    steps = steady_steps(centroid(video))
    right_pace = pace_of(at_16_pixels(steps, video)) == pace

    words = ((colour, right_colour), (thing, right_thing), (pace, right_pace))
    return as_said(alive(video), words)


def survival_report(
    video: Tensor, captions: Tensor, last: int = 12, first: int = 3,
) -> dict[str, float]:
    """Shares of the B rollouts that are still right in their last `last` frames.

    `alive`, `colour` and `moving` are those of metrics.survival_report. `class`: in at least
    90 % of those frames it is the caption's digit (that of the first chunk where the caption
    names none). survival: all four, by the same rollout.
    """
    colour_ids, thing_ids, _ = captions.to(video.device).T   # [B] each
    start = video[:, :first]
    end = video[:, -last:]

    colour = asked_or_usual(colour_ids, FIRST_COLOUR, colour_index(start))
    digit = asked_or_usual(thing_ids, FIRST_DIGIT, digit_index(start))
    pace = speed(end).mean(1)
    pace = at_16_pixels(pace, video)
    held = {
        "alive": mostly(alive(end)),
        "colour": kept(colour_index(end), colour),
        "class": kept(digit_index(end), digit),
        "moving": between(pace, SLOWEST, FASTEST),
    }
    held["survival"] = torch.stack([*held.values()]).all(0)
    report = {}
    for name, rollouts in held.items():
        share = rollouts.float().mean()
        report[name] = share.item()
    return report
