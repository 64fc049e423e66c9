"""What makes training exact, resumable and fast. What is trained, and how, stands in train.py.

    Resumable      the base of train.Trainer: its batches, its losses, its state
    Recorded       a training step as one launch on a GPU, and as a plain call on a CPU
    rename_window  a long video's cache, as if the video were young
"""

import contextlib
import copy
import functools
import gc
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict
from statistics import mean

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cache import RollingCache
from engine.command_line import UserError
from engine.homogeneous import model_of
from engine.loader import Batches, batches
from engine.parallel import (SharedDraws, all_parts, like, my_part, processes, recordable,
                             whole)
from flow import Draws
from mla_video import VideoDiT

# Losses of an answer: not of a velocity, so nothing says when they are too large.
ANSWERS = ("cd", "generator")


# ---- settings of torch -----------------------------------------------------------------------

@contextlib.contextmanager
def fast_products() -> Iterator[None]:
    """Within it products of float32 matrices may use the fast units: TF32 on a GPU, oneDNN on a
    CPU (on AMD severalfold faster than MKL)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with warnings.catch_warnings():
            # RMSNorm under autocast is right, if slower.
            warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def half_precision(device: torch.device):
    """Autocast to bfloat16 where the GPU has it, for the losses over whole clips.

    bfloat16 has float32's range, so there is no loss scale and no overflow. Weights, averages,
    optimisers, losses and everything sampled stay float32. The cache of cast weights is off:
    filled in a pass without gradients, it would cut off those of a later pass with them.
    """
    cuda = device.type == "cuda"
    able = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=able, cache_enabled=False)


# ---- networks --------------------------------------------------------------------------------

def frozen_copy(model: VideoDiT) -> VideoDiT:
    return copy.deepcopy(model).eval().requires_grad_(False)


def compiled(model: VideoDiT, backend: str | None) -> VideoDiT:
    """The same weights, with blocks that torch.compile fuses, for passes over whole clips; the
    model itself if `backend` is None. Rollouts take the model: their shapes grow."""
    if backend is None:
        return model
    same_weights = {id(weight): weight for weight in model.parameters()}
    twin = copy.deepcopy(model, same_weights)
    for block in twin.blocks:
        block.compile(dynamic=False, backend=backend)
    return twin


def recompute(model: VideoDiT) -> None:
    """From now on a backward pass makes what is inside each block once more, and only the
    block's input is kept for it: a third more time, for a fraction of the memory. Passes
    without gradients are as they were."""
    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False,
                                          preserve_rng_state=False)


def put(weights: dict[str, Tensor], model: VideoDiT) -> None:
    """Whole weights into a model, which may be sharded."""
    own = model.state_dict()
    parts = {}
    for name, value in weights.items():
        parts[name] = like(value, own[name]) if name in own else value
    model.load_state_dict(parts)


def learner_state(learner) -> dict:
    optimisers = [optimiser.state_dict() for optimiser in learner.optimisers]
    return {"model": learner.model.state_dict(), "optimisers": optimisers}


def restore_learner(learner, state: dict) -> None:
    """UserError if the state is of other weights. Rates come from the recipe and not from the
    file."""
    put(state["model"], learner.model)
    for optimiser, saved in zip(learner.optimisers, state["optimisers"], strict=True):
        groups = optimiser.state_dict()["param_groups"]
        moments = moments_of(optimiser, saved["state"])
        optimiser.load_state_dict({"state": moments, "param_groups": groups})


def moments_of(optimiser: torch.optim.Optimizer, saved: dict) -> dict:
    """Saved moments, sharded as the optimiser's weights are."""
    known = {"step", "exp_avg", "exp_avg_sq"}
    if isinstance(optimiser, torch.optim.Muon):
        known = {"momentum_buffer"}
    weights = optimiser.param_groups[0]["params"]
    moments = {}
    for i, entry in saved.items():
        fits = all(value.shape in ((), weights[i].shape) for value in entry.values())
        if set(entry) != known or not fits:
            raise UserError("its optimisers are of another model")
        moments[i] = {name: like(value, weights[i]) for name, value in entry.items()}
    return moments


# ---- weights, on the device ------------------------------------------------------------------

@torch.no_grad()
def blend(into: list[Tensor], other: list[Tensor], share: Tensor) -> None:
    """into += share * (other - into), for lists of tensors. `share` is a tensor, so a recorded
    step may be given another."""
    difference = torch._foreach_sub(other, into)
    torch._foreach_mul_(difference, share)
    torch._foreach_add_(into, difference)


def side_by_side(items: list, device: torch.device) -> Iterator:
    """Iterate over `items`. Where steps are recorded, what is done with each goes to a stream
    of its own, since the small products of one leave most of a GPU idle."""
    if not recordable(device):
        yield from items
        return
    here = torch.cuda.current_stream(device)
    streams = []
    for item in items:
        stream = torch.cuda.Stream(device)
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            yield item
        streams.append(stream)
    for stream in streams:
        here.wait_stream(stream)


class Recorded:
    """A function of tensors to a tuple of tensors. On a GPU its second call is recorded as a
    CUDA graph, which that and every later call replays: one launch for the thousands of small
    kernels that a toy step is. On a CPU (`pool` None) it is just the function.

    It must draw from `generator` alone, and do the same work at every call.
    """

    def __init__(self, function: Callable, generator: torch.Generator, pool):
        self.function = function
        self.generator = generator
        self.pool = pool
        self.warm = False
        self.graph = None

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if self.pool is None:
            return self.function(*inputs)
        if not self.warm:
            self.warm = True
            result = self._aside(*inputs)
        else:
            if self.graph is None:
                self._record(*inputs)
            for mine, value in zip(self.inputs, inputs):
                mine.copy_(value)
            self.graph.replay()
            result = self.result
        return tuple(part.clone() for part in result)      # the next call overwrites them

    def _aside(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """A plain call: what is done the first time only (moments, library handles) must not be
        recorded."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = self.function(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        return result

    def _record(self, *inputs: Tensor) -> None:
        """Recording runs nothing."""
        self.inputs = [value.clone() for value in inputs]
        self.graph = torch.cuda.CUDAGraph()
        self.graph.register_generator_state(self.generator)
        # Freeing GPU memory spoils a recording, so Python must not clear away the graphs of an
        # earlier stage in the middle of this one.
        gc.collect()
        gc.disable()
        # thread_local: the data loader's thread pins memory meanwhile, which is no part of it.
        how = dict(pool=self.pool, capture_error_mode="thread_local")
        try:
            with torch.cuda.graph(self.graph, **how):
                self.result = self.function(*self.inputs)
        finally:
            gc.enable()


# ---- a long video's cache --------------------------------------------------------------------

def age_at_the_horizon(cache: RollingCache) -> int:
    """`seen` after `rename_window`, the same for every video: the first whole turn of the ring
    with the chunk at the horizon."""
    ring = max(cache.ring, 1)
    frames = cache.horizon - cache.chunk - cache.sink
    turns = -(-frames // ring)                             # rounded up
    return cache.sink + turns * ring


def rename_window(cache: RollingCache) -> None:
    """Name the frames of a full window anew, as if the video were as young as it can be with a
    full window and its chunk at the horizon.

    What is visible, its positions and the order of eviction stay. So long videos of any age are
    one case for what must not change from call to call (a recorded step), and `seen` never
    overflows. ValueError if the window is not full and at the horizon.
    tests/test_objectives.py: test_an_old_window_can_be_renamed.
    """
    if cache.seen < cache.horizon - cache.chunk:
        raise ValueError(f"only a full window at the horizon can be renamed; {cache.seen} "
                         "frames were seen")
    if cache.ring:
        oldest = (cache.seen - cache.sink) % cache.ring    # its place becomes the first
        buffers = []
        for buffer in cache.buffers:
            frames = buffer.unflatten(2, (cache.capacity, cache.tokens))
            sink = frames[:, :, :cache.sink]
            ring = frames[:, :, cache.sink:].roll(-oldest, 2)
            buffers.append(torch.cat((sink, ring), 2).flatten(2, 3))
        cache.buffers = tuple(buffers)
    cache.seen = age_at_the_horizon(cache)


def reopen_window(cache: RollingCache, buffers: tuple[Tensor, ...]) -> None:
    """Make `cache` go on from the buffers that `rename_window` left. They are copied: a commit
    may overwrite."""
    cache.buffers = tuple(buffer.clone() for buffer in buffers)
    cache.seen = age_at_the_horizon(cache)


# ---- the run ---------------------------------------------------------------------------------

class Resumable:
    """What a training run has besides its steps: batches, random numbers, recordings, losses,
    and a state that can be saved and gone on from.

    All randomness of step s is a function of (seed, s), so that state needs no generator's. A
    subclass has `model`, its moving average `ema`, networks that never change (`frozen`, by
    name), and the `learner` of the model and, in dmd, of the critic (`critic`, else None).
    """

    def __init__(self, recipe, world, device: torch.device):
        self.recipe = recipe
        self.world = world
        self.device = device
        self.step = 0                                      # steps done
        self.seconds = 0.0                                 # of training, with its saves
        self.saving = 0.0                                  # seconds of saves since the start
        self.saved = None                                  # the step of the last save
        self.asked = {}                    # flags of the run, plain values: run_files.asked_for
        self.losses = defaultdict(list)                    # {name: [(step, mean of ten)]}
        self.recent = []                                   # (step, name, loss) since then
        self.videos = None                                 # dmd: captions and cache under way
        kind = SharedDraws if processes() > 1 else Draws
        self.draws = kind(torch.Generator(device), device)
        self._recordings = {}
        self._pool = torch.cuda.graph_pool_handle() if recordable(device) else None

    # -- what a step needs

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Clips [B, F, ...] and captions [B, S] of a step."""
        return Batches(self.world, self.recipe.batch)[step]

    def batches(self, workers: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Those of every step from now to the last, drawn by so many processes besides this one.
        UserError if one of them dies."""
        cuda = self.device.type == "cuda"
        if workers is None:
            workers = 4 if cuda else 0     # a GPU takes them faster than one process draws them
        steps = range(self.step, self.recipe.steps)
        pin = cuda and workers > 0
        return batches(self.world, self.recipe.batch, steps, workers, pin)

    def to_device(self, part: Tensor) -> Tensor:
        return part.to(self.device, non_blocking=True)

    def number(self, value: float) -> Tensor:
        """A number that differs from step to step, in a form that a recorded step can take."""
        return torch.full((), value, device=self.device)

    def seed_draws(self) -> None:
        self.draws.generator.manual_seed(self.recipe.seed * 1_000_003 + self.step)

    def precision(self):
        return half_precision(self.device)

    def recorded(self, key, function: Callable, *inputs: Tensor) -> tuple[Tensor, ...]:
        """function(self, *inputs), by the recording of that key; the first call makes it."""
        if key not in self._recordings:
            bound = functools.partial(function, self)
            self._recordings[key] = Recorded(bound, self.draws.generator, self._pool)
        return self._recordings[key](*inputs)

    def close(self) -> None:
        """Give up the recordings, which refer to this object: gigabytes of a GPU would stay."""
        self._recordings.clear()

    # -- losses

    def note(self, name: str, loss: Tensor) -> None:
        """Keep a loss of this step, on the device: to read it would wait for the GPU."""
        self.recent.append((self.step, name, loss))

    def read_losses(self) -> None:
        """Take the losses since the last call off the device; UserError that names the first
        one that says training diverged."""
        found = defaultdict(list)
        for step, name, loss in self.recent:
            value = loss.item()
            # A velocity that answers nothing has a loss of about 2, so twice that is worse than
            # knowing nothing.
            hopeless = name not in ANSWERS and value > 4
            if hopeless or not math.isfinite(value):
                raise UserError(f"training diverged: the {name} loss was the first to go, "
                                f"{value:.3g} at step {step}")
            found[name].append(value)
        for name, values in found.items():
            self.losses[name].append((self.step, mean(values)))
        self.recent.clear()

    # -- going on

    def state(self) -> dict:
        """All that `--resume` needs, as tensors and plain values. All processes must ask: what
        they share is put together."""
        frozen = {name: network.state_dict() for name, network in self.frozen.items()}
        return whole({
            "config": asdict(self.model.config),
            "recipe": asdict(self.recipe),
            "asked": self.asked,
            "step": self.step,
            "seconds": self.seconds,
            "losses": dict(self.losses),
            "recent": list(self.recent),
            "videos": self._all_videos(),
            "ema": self.ema.state_dict(),
            "learner": learner_state(self.learner),
            "critic": learner_state(self.critic) if self.critic else None,
            "frozen": frozen})

    def restore(self, state: dict) -> None:
        """Go on from `state()`; UserError if it is the state of something else."""
        try:
            self._restore(state)
        except UserError:
            raise
        except (KeyError, IndexError, TypeError, AttributeError, RuntimeError, OverflowError,
                ValueError) as error:
            raise UserError(f"not the state of a {self.recipe.stage} run of this model "
                            f"({type(error).__name__})") from error

    def _restore(self, state: dict) -> None:
        restore_learner(self.learner, state["learner"])
        put(state["ema"], self.ema)
        for name, network in self.frozen.items():
            put(state["frozen"][name], network)
        if self.critic:
            restore_learner(self.critic, state["critic"])
            self.videos = self._my_videos(state["videos"])
        self.step = self.saved = int(state["step"])
        self.seconds = float(state["seconds"])
        self.losses = defaultdict(list)
        for name, pairs in state["losses"].items():
            self.losses[str(name)] = [(int(step), float(loss)) for step, loss in pairs]
        self.recent = []
        for step, name, loss in state["recent"]:
            self.recent.append((int(step), str(name), loss.to(self.device).view(())))

    def _all_videos(self) -> list[Tensor] | None:
        """The videos of all processes: captions [B, S], buffers [layers, B, tokens, width]."""
        if self.videos is None:
            return None
        captions, *buffers = self.videos
        return [all_parts(captions), *(all_parts(buffer, axis=1) for buffer in buffers)]

    def _my_videos(self, videos: list[Tensor] | None) -> list[Tensor] | None:
        """This process' part of them; UserError if they are of another model."""
        if not videos:
            return None
        batch = self.recipe.batch
        wanted = [(batch, self.model.config.slots)]
        wanted += [buffer.shape for buffer in self.model.make_cache(batch).buffers]
        if [part.shape for part in videos] != wanted:
            raise UserError("its videos under way are of another model")
        captions, *buffers = [part.to(self.device) for part in videos]
        part = my_part(batch)
        return [captions[part], *(buffer[:, part] for buffer in buffers)]

    def put_together(self) -> None:
        """Training is over: the average as an ordinary model again, on every process."""
        weights = whole(self.ema.state_dict())
        model = model_of(self.model.config).to(self.device)
        self.ema = model.eval().requires_grad_(False)
        self.ema.load_state_dict(weights)
