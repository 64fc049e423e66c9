"""Flow matching: how noise becomes video. The path, two samplers, and the loop over chunks.

A model that draws pictures must turn noise into data. Flow matching draws a straight line from
every clip x0 to a noise eps of the same shape and walks it with sigma, from 1 (noise) to 0:

    x_sigma  = (1 - sigma) x0 + sigma eps                                              (F1)
    v        = d x_sigma / d sigma = eps - x0       the velocity along the line        (F2)

The network is shown x_sigma and predicts v. Many lines cross at a noisy point, and what is
learned is their mean velocity, where the squared error is least. At sigma = 1 a step against it
leads towards the mean of all clips, which is a blur. But after a small step towards it fewer
clips are possible, the mean is over those, and so on, until one is left. That the videos made
so, by many small steps (F3), are distributed as the data are is the theorem of flow matching
(Lipman et al., arXiv 2210.02747). The same velocity implies an answer at once, (F4): the mean
of the clips that are still possible. From pure noise it is the blur. Stage cd (objectives.py)
teaches a model to answer with the end of the path.

    x_sigma' = x_sigma - (sigma - sigma') v         one Euler step towards the data    (F3)
    x0       = x_sigma - sigma v                    the answer that v implies          (F4)

(F3) and (F4) stand here with the training path (F1), which objectives.py imports from here, so
sign and direction cannot disagree.

How a video streams, chunk by chunk:

    noise --> pass --> pass --> ... --> pass --> clean chunk --> commit --> next chunk
               |        |                 |                        |
               +--------+------ look -----+                      write
                               at the cache of past chunks <-------+

tests/test_flow.py.
"""

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from attention import Route, attend_cheaper
from cache import RollingCache

SHIFT = 3.0                  # how long to dwell at high noise, in training and in sampling
FEW_STEPS = 4                # passes a chunk, for a distilled model
FEW_SHIFT = 5.0              # its levels are then the literature's: 1, 0.9375, 0.8333, 0.625


# ---- the path --------------------------------------------------------------------------------

def shift(u, k: float = SHIFT):
    """S_k(u) = k u / (1 + (k - 1) u): a uniform u in [0, 1] becomes a noise level that dwells
    near 1.

    The more pixels a frame has, the more noise it takes to hide it, since averaging sees
    through noise: the literature gives large latents k = 5; here it is 3 until distillation.
    """
    return k * u / (1 + (k - 1) * u)


def per_frame(sigma: Tensor) -> Tensor:
    """Noise levels [B, F] as [B, F, 1, 1, 1], to go with video."""
    return sigma[..., None, None, None]


def add_noise(x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
    """(F1) for video [B, F, ...] with one sigma per frame [B, F]."""
    sigma = per_frame(sigma)
    return ((1 - sigma) * x0 + sigma * eps).to(x0.dtype)


def answer_of(v: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """(F4): the clean video that a velocity v at x [B, F, ...] implies; sigma is [B, F]."""
    return x - per_frame(sigma) * v


def one_level(x: Tensor, sigma: float) -> Tensor:
    """sigma for every frame of x [B, F, ...]: [B, F], in float32 at least.

    bfloat16 would round 0.8333 to 0.832, while the step that is taken uses the exact number.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.full(x.shape[:2], sigma, device=x.device, dtype=dtype)


def noise_levels(steps: int, k: float) -> list[float]:
    """The levels of a sampler, S_k(1 - i / steps): steps + 1 of them, from 1 to 0. ValueError
    for less than one step."""
    if steps < 1:
        raise ValueError(f"a chunk takes at least 1 step, got {steps}")
    return [shift(1 - i / steps, k) for i in range(steps + 1)]


class Draws:
    """Where random numbers come from: torch's generator, behind three verbs.

    Losses and rollouts draw from such an object and from nothing else. So what is drawn can be
    decided outside (several processes divide one batch: engine/parallel.py). For a loss it must
    draw on the device of the clips; a rollout moves the noise to where its model is.
    """

    def __init__(self, generator: torch.Generator | None = None, device="cpu"):
        self.generator = generator
        self.device = device if generator is None else generator.device

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers. The first axis is the batch, here and below."""
        return torch.randn(*shape, generator=self.generator, device=self.device)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1)."""
        return torch.rand(*shape, generator=self.generator, device=self.device)

    def integers(self, top: int, *shape: int) -> Tensor:
        """Integers from 0 to top - 1."""
        return torch.randint(top, shape, generator=self.generator, device=self.device)


class VideoDraws(Draws):
    """`Draws` for a rollout, with a generator for each video: what video i is given depends on
    the seed and on i alone, on every device, however many videos are made beside it."""

    def __init__(self, seed: int, videos: int):
        seeds = torch.Generator().manual_seed(seed)
        self.generators = []
        for _ in range(videos):
            own_seed = torch.randint(2**63 - 1, (1,), generator=seeds)
            self.generators.append(torch.Generator().manual_seed(own_seed.item()))

    def _each(self, draw: Callable[[torch.Generator], Tensor], videos: int) -> Tensor:
        if videos != len(self.generators):
            raise ValueError(f"these draws are for {len(self.generators)} videos, not {videos}")
        return torch.stack([draw(generator) for generator in self.generators])

    def normal(self, videos: int, *shape: int) -> Tensor:
        """As Draws."""
        return self._each(lambda own: torch.randn(shape, generator=own), videos)

    def uniform(self, videos: int, *shape: int) -> Tensor:
        """As Draws."""
        return self._each(lambda own: torch.rand(shape, generator=own), videos)

    def integers(self, top: int, videos: int, *shape: int) -> Tensor:
        """As Draws."""
        return self._each(lambda own: torch.randint(top, shape, generator=own), videos)


# ---- from noise to a clean chunk -------------------------------------------------------------
# A sampler is given `velocity(x, sigma) -> v`, `noise() -> eps` of a chunk's shape, and how
# many passes to make, at levels shifted by k; it returns the clean chunk.

Velocity = Callable[[Tensor, float], Tensor]
Noise = Callable[[], Tensor]


def euler(velocity: Velocity, noise: Noise, steps: int, k: float = SHIFT) -> Tensor:
    """Follow the flow in `steps` straight pieces, (F3). For models that were not distilled."""
    levels = noise_levels(steps, k)
    x = noise()
    for sigma, next_sigma in itertools.pairwise(levels):
        v = velocity(x, sigma)
        x = x - (sigma - next_sigma) * v                                              # (F3)
    return x


def consistency(velocity: Velocity, noise: Noise, steps: int, k: float = FEW_SHIFT) -> Tensor:
    """Jump to the answer, go back to the next level with *fresh* noise, jump again.

    For distilled models (stages cd and dmd). Their first answer is rough. Noise hides its
    faults, and the next jump, from less noise, repairs them.
    """
    levels = noise_levels(steps, k)
    x = consistency_passes(velocity, noise, levels[:-1])       # down to the last level above 0
    sigma = levels[-2]
    return x - sigma * velocity(x, sigma)                                             # (F4)


def consistency_passes(velocity: Velocity, noise: Noise, levels: list[float]) -> Tensor:
    """From noise to a noisy chunk at the last of `levels`, by a pass at each level before."""
    x = noise()
    for sigma, next_sigma in itertools.pairwise(levels):
        answer = x - sigma * velocity(x, sigma)                                       # (F4)
        x = add_noise(answer, noise(), one_level(x, next_sigma))                      # (F1)
    return x


# How a model is meant to be sampled after each stage of training (objectives.py): tf, teacher
# forcing; cd, consistency distillation; dmd, distribution matching.
SAMPLERS = {
    "tf": dict(sampler=euler, steps=12),
    "cd": dict(sampler=consistency, steps=FEW_STEPS),
    "dmd": dict(sampler=consistency, steps=FEW_STEPS),
}


# ---- from chunk to chunk ---------------------------------------------------------------------

class Stream:
    """Videos in the making: a model, their captions (words [B, S], or rows [B, S, text]), and
    the cache of what was made.

    `rollout` asks for `chunk_like`, `velocity` and `commit`, and for nothing else. The caption
    may be replaced between two chunks: the next chunk is made under the new one. To continue a
    clip of one's own, commit its chunks first.

    Of a model it needs what VideoDiT has: config.chunk, .channels, .height, .width, .words;
    embed.weight, for dtype and device; make_cache(batch); denoise(x, sigma [B, F], caption,
    cache, attend) and commit(x, caption, cache, attend).
    """

    def __init__(self, model, caption: Tensor, cache: RollingCache | None = None,
                 attend: Route = attend_cheaper):
        self.model = model
        self.caption = caption
        self.cache = model.make_cache(len(caption)) if cache is None else cache
        self.attend = attend

    @property
    def caption(self) -> Tensor:
        """The captions [B, ...], on the model's device; rows in its dtype, too."""
        return self._caption

    @caption.setter
    def caption(self, caption: Tensor) -> None:
        """ValueError for another number of videos than before, or for words that the model does
        not know."""
        weight = self.model.embed.weight
        if caption.is_floating_point():                    # rows of a text encoder
            caption = caption.to(weight.dtype)
        elif caption.device.type == "cpu":                 # ids; a GPU would be waited for
            top = self.model.config.words - 1
            if not ((0 <= caption) & (caption <= top)).all():
                raise ValueError(f"the ids of words in a caption are 0 to {top}, got {caption}")
        if hasattr(self, "_caption") and len(caption) != len(self._caption):
            raise ValueError(f"this stream makes {len(self._caption)} videos, and there are "
                             f"{len(caption)} captions")
        self._caption = caption.to(weight.device)

    def chunk_like(self) -> Tensor:
        """An empty tensor with the shape, the dtype and the device of this stream's chunks."""
        c = self.model.config
        shape = len(self.caption), c.chunk, c.channels, c.height, c.width
        return self.model.embed.weight.new_empty(shape)

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        """v of the chunk x, all of whose frames are at noise level sigma."""
        return self.model.denoise(x, one_level(x, sigma), self.caption, self.cache, self.attend)

    def commit(self, x: Tensor) -> None:
        """The chunk x is finished: it belongs to the past of the next."""
        self.model.commit(x, self.caption, self.cache, self.attend)


class GuidedStream:
    """Classifier-free guidance: exaggerate what the caption changes, by a `weight` w > 1.

        v = v(no caption) + w (v(caption) - v(no caption))

    `captioned` and `plain` are streams of the same videos, the second with word 0 throughout
    or the rows of a negative caption. Each has *its own* cache: the past means something else
    to a model that was told something else. (Sharing one cache is a classic silent bug.)
    """

    def __init__(self, captioned: Stream, plain: Stream, weight: float):
        if not math.isfinite(weight):
            raise ValueError(f"the weight of guidance must be a number, got {weight}")
        if captioned.cache is plain.cache:
            raise ValueError("guidance needs two caches, one with the caption and one without")
        self.captioned = captioned
        self.plain = plain
        self.weight = weight

    @property
    def caption(self) -> Tensor:
        """The captions; assign to it between chunks, as to a Stream's."""
        return self.captioned.caption

    @caption.setter
    def caption(self, caption: Tensor) -> None:
        self.captioned.caption = caption

    def chunk_like(self) -> Tensor:
        """As Stream's."""
        return self.captioned.chunk_like()

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        """The guided v of the chunk x at noise level sigma."""
        v = self.captioned.velocity(x, sigma)
        v_plain = self.plain.velocity(x, sigma)
        return v_plain + self.weight * (v - v_plain)

    def commit(self, x: Tensor) -> None:
        """The chunk x becomes the past of both sides."""
        self.captioned.commit(x)
        self.plain.commit(x)


def noise_for(stream: Stream | GuidedStream, draws: Draws) -> Noise:
    """A function that draws the noise of one chunk of this stream."""
    like = stream.chunk_like()

    def noise() -> Tensor:
        return draws.normal(*like.shape).to(like.device, like.dtype)

    return noise


@torch.no_grad()
def rollout(stream: Stream | GuidedStream, frames: int, draws: Draws, sampler=euler,
            steps: int = 12) -> Iterator[Tensor]:
    """Make `frames` frames, rounded up to whole chunks, or without end if 0; yield each chunk
    [B, chunk, channels, height, width], in about [-1, 1], when it is made and committed.

    How a model wants to be sampled: pass **SAMPLERS[stage], or for another shift a
    functools.partial(euler, k=5.0). Once the window is full, memory and time per chunk do not
    depend on how long the video is. Captions may be changed between two chunks (assign to
    stream.caption). Nothing records gradients; stage dmd has its own last chunk for that
    (objectives.self_rollout).
    """
    if frames < 0:
        raise ValueError(f"frames must be 0 (without end) or more, got {frames}")
    noise = noise_for(stream, draws)
    chunk = stream.chunk_like().shape[1]
    starts = itertools.count(0, chunk) if frames == 0 else range(0, frames, chunk)
    for _ in starts:
        x = sampler(stream.velocity, noise, steps)
        stream.commit(x)
        yield x
