"""One training step of each stage: recipe, optimisers, the networks a stage needs, and how a step becomes one launch on a GPU.

The losses themselves are in objectives.py; files, progress and the command line in train.py.
"""

import copy
import gc
import math
import random
import signal
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from statistics import mean

import torch
from torch import Tensor
from torch.optim import _muon
from torch.utils.data import DataLoader, Dataset

from mla_video import VideoDiT
from objectives import consistency_loss, critic_loss, dmd_gradient, dmd_loss, score_loss, self_rollout, teacher_forcing_loss
from parallel import OneStream, all_rows, like, mean_over_processes, my_rows, orthogonalise, recordable, shard, whole, world as processes
from sample import FEW_STEPS

STAGES = ("score", "tf", "cd", "dmd")                      # in this order; each starts from the weights of the one before


@dataclass(frozen=True)
class Recipe:
    """How to train. Muon (momentum whose update is made orthogonal: every direction of a matrix learns at the same pace)
    for the matrices of the blocks, AdamW for everything else."""

    stage: str = "tf"
    steps: int = 2000                                      # dmd: updates of the critic; every fifth comes with one of the generator
    batch: int = 16
    lr_muon: float = 3e-3
    lr_adamw: float = 1.5e-3
    warmup: int = 50
    final: float = 0.05                                    # the rate at the end, as a share of the peak
    ema: float = 0.99
    clip: float = 1.0
    drop: float = 0.1                                      # score, tf: captions replaced by "none", so that guidance exists
    spread: float = 1.0                                    # of the logit-normal noise level before its shift
    guidance: float = 1.0                                  # of the teacher in cd, of the real score in dmd
    critic: float = 1.0                                    # the critic's rates, as a multiple of the generator's
    every: int = 5                                         # critic updates for one of the generator
    exits: tuple[int, ...] = tuple(range(FEW_STEPS))       # sampler steps at which a self-rollout's last chunk may end
    restart: float = 0.01                                  # share of self-rollouts that begin new videos. Few: old ones are what is used, and
                                                           # a speed that is right on average over young and old is too fast in the old
    switch: float = 0.1                                    # share of videos under way whose caption changes with the next clip length
    seed: int = 0


# What differs from the recipe above, by stage and by machine. Distillation moves little, and at a high rate it shakes what teacher forcing
# has learned: motion turns jerky. The target of cd must pass an answer down 48 levels, so its memory is short; where there are steps enough
# (on a GPU) rates are lower and it is longer. The critic's own (critic x lr) is the same on both: it must keep up.
DISTILL = {"cd": dict(lr_muon=1.5e-4, lr_adamw=7.5e-5, ema=0.98), "dmd": dict(lr_muon=1e-4, lr_adamw=5e-5, critic=4.0)}
ON_CPU = {"score": dict(steps=1000), "tf": dict(steps=1600), "cd": dict(steps=300), "dmd": dict(steps=300)}
ON_GPU = {"score": dict(steps=14_000, batch=64, lr_muon=4.5e-3, ema=0.998), "tf": dict(steps=20_000, batch=64, lr_muon=4.5e-3, ema=0.998),
          "cd": dict(steps=2000, batch=64, lr_muon=7.5e-5, lr_adamw=4e-5, ema=0.99),
          "dmd": dict(steps=1600, batch=64, lr_muon=4e-5, lr_adamw=2e-5, critic=10.0)}


def recipe_for(stage: str, device: torch.device, **given) -> Recipe:
    """The recipe of a stage on this kind of device, with what is given."""
    return Recipe(**{"stage": stage, **DISTILL.get(stage, {}), **(ON_CPU if device.type == "cpu" else ON_GPU)[stage], **given})


# ---- one step -------------------------------------------------------------------------------------------------------

def blend(into: list[Tensor], other: list[Tensor], share: Tensor) -> None:
    """into += share * (other - into), for lists of tensors; `share` is a tensor, so a recorded graph may be given another."""
    difference = torch._foreach_sub(other, into)
    torch._foreach_mul_(difference, share)
    torch._foreach_add_(into, difference)


def side_by_side(actions: list, device: torch.device) -> None:
    """Do them all; where steps are recorded each on a stream of its own, since the small products of one leave most of a GPU idle."""
    if not recordable(device):
        for action in actions:
            action()
        return
    here, streams = torch.cuda.current_stream(device), [torch.cuda.Stream(device) for _ in actions]
    for action, stream in zip(actions, streams):
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            action()
    for stream in streams:
        here.wait_stream(stream)


class Learner:
    """A network and its optimisers, a Muon for each block and an AdamW for the rest. A step is taken at the peak rate and then drawn back
    to `rate` of its length: both rules move weights in proportion to their rate, and this way no number changes inside a recorded graph."""

    def __init__(self, model: VideoDiT, recipe: Recipe, times: float = 1.0):
        self.model, self.clip, self.weights = model, recipe.clip, list(model.parameters())
        blocks = [[p for p in block.parameters() if p.dim() == 2 and min(p.shape) > 6] for block in model.blocks]     # modulation: 6 rows
        chosen = {id(p) for matrices in blocks for p in matrices}
        others = [p for p in self.weights if id(p) not in chosen]
        _muon._zeropower_via_newtonschulz = orthogonalise  # instead of torch's, which rounds to bfloat16
        muon = dict(lr=times * recipe.lr_muon, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        self.optimisers = [
            *(torch.optim.Muon(matrices, **muon) for matrices in blocks),
            torch.optim.AdamW(others, lr=times * recipe.lr_adamw, betas=(0.9, 0.95), weight_decay=0.0,
                              capturable=recordable(others[0].device))]

    def step(self, loss: Tensor, rate: Tensor) -> Tensor:
        loss.backward()
        if processes() > 1:
            loss = mean_over_processes(loss, self.weights)
        torch.nn.utils.clip_grad_norm_(self.weights, self.clip)
        before = [weight.detach().clone() for weight in self.weights]
        side_by_side([optimiser.step for optimiser in self.optimisers], loss.device)
        for weight in self.weights:
            weight.grad = None
        with torch.no_grad():
            blend(self.weights, before, 1 - rate)
        return loss.detach()

    def state(self) -> dict:
        return {"model": self.model.state_dict(), "optimisers": [optimiser.state_dict() for optimiser in self.optimisers]}

    def restore(self, state: dict) -> None:
        """ValueError if the state is of other weights. Rates come from the recipe and not from the file."""
        put(state["model"], self.model)
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            known = {"momentum_buffer"} if isinstance(optimiser, torch.optim.Muon) else {"step", "exp_avg", "exp_avg_sq"}
            groups = optimiser.state_dict()["param_groups"]
            weights, memory = optimiser.param_groups[0]["params"], {}
            for i, entry in saved["state"].items():
                if set(entry) != known or any(value.shape not in ((), weights[i].shape) for value in entry.values()):
                    raise ValueError("its optimisers are of another model")
                memory[i] = {name: like(value, weights[i]) for name, value in entry.items()}
            optimiser.load_state_dict({"state": memory, "param_groups": groups})


def put(weights: dict[str, Tensor], model: VideoDiT) -> None:
    """Whole weights into a model, which may be sharded."""
    own = model.state_dict()
    model.load_state_dict({name: like(value, own[name]) if name in own else value for name, value in weights.items()})


class Recorded:
    """A function of tensors, to a tuple of tensors, that draws from `generator`. On a GPU its second call is recorded as a CUDA graph, which
    that and every later call replays: one launch for the thousands of small kernels that a toy step is. On a CPU just the function."""

    def __init__(self, function, generator: torch.Generator, pool):
        self.function, self.generator, self.pool, self.graph, self.warm = function, generator, pool, None, False

    def __call__(self, *inputs: Tensor):
        if self.pool is None:
            return self.function(*inputs)
        if not self.warm:                                  # first-time work (optimiser states, library handles) must not be recorded
            self.warm, stream = True, torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                result = self.function(*inputs)
            torch.cuda.current_stream().wait_stream(stream)
            return tuple(part.clone() for part in result)
        if self.graph is None:
            self.inputs, self.graph = [value.clone() for value in inputs], torch.cuda.CUDAGraph()
            self.graph.register_generator_state(self.generator)
            gc.collect()                                   # freeing GPU memory spoils a recording: Python must not clear away an earlier
            gc.disable()                                   # stage's graphs in the middle of this one
            try:
                # thread_local: the loader's thread pins memory meanwhile, which must not spoil the recording
                with torch.cuda.graph(self.graph, pool=self.pool, capture_error_mode="thread_local"):  # records, and runs nothing
                    self.result = self.function(*self.inputs)
            finally:
                gc.enable()
        for mine, value in zip(self.inputs, inputs):
            mine.copy_(value)
        self.graph.replay()
        return tuple(part.clone() for part in self.result)


def compiled(model: VideoDiT, backend: str = "inductor") -> VideoDiT:
    """The same weights, with blocks that torch.compile fuses, for the passes over whole clips: all blocks share one graph. Rollouts take
    the model itself: their shapes grow from chunk to chunk."""
    twin = copy.copy(model)
    twin._modules = model._modules | {"blocks": [torch.compile(block, dynamic=False, backend=backend) for block in model.blocks]}
    return twin


class Steps(Dataset):
    """Batches by the number of their step. (Holds no trainer: worker processes must not inherit a GPU.)"""

    def __init__(self, trainer):
        self.world, self.size, self.rows = trainer.world, trainer.recipe.batch, my_rows(trainer.recipe.batch)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        return self.world.batch(range(step * self.size, (step + 1) * self.size)[self.rows])


def leave_interrupts_alone(worker: int) -> None:
    """Ctrl-C reaches every process; the main one saves and ends, and its workers with it."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Trainer:
    """The networks of a stage, their optimisers and the step counter. All randomness of step s (clips, noise, captions
    dropped, where a rollout ends) is a function of (seed, s), so going on from a checkpoint needs no generator state.

    `model` is trained, `ema` its moving average, what the stage ends with. cd: the frozen teacher is the model as it was given, the target
    is `ema`. dmd: `score` is the frozen real score, and the critic starts as its copy. `compile` names a torch.compile backend.
    """

    def __init__(self, model: VideoDiT, recipe: Recipe, world, device: torch.device, score: VideoDiT | None = None, sharded: bool = False,
                 compile: str | None = None):
        self.model, self.recipe, self.world, self.device = model.to(device).train(), recipe, world, device
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        if recipe.stage == "cd":
            self.teacher = copy.deepcopy(self.ema)
        if recipe.stage == "dmd":
            self.score = copy.deepcopy(score).to(device).eval().requires_grad_(False)
            critic = copy.deepcopy(self.score).train().requires_grad_(True)
        if sharded:                                        # after the copies and before the optimisers, which must hold the shards
            frozen = [getattr(self, name) for name in ("teacher", "score") if hasattr(self, name)]
            for network in (self.model, self.ema, *frozen, *([critic] if recipe.stage == "dmd" else [])):
                shard(network)
        self.learner = Learner(self.model, recipe)
        self.critic = Learner(critic, recipe, recipe.critic) if recipe.stage == "dmd" else None
        self.step, self.seconds, self.saving = 0, 0.0, 0.0     # seconds of training with its saves; seconds of all saves since the start
        self.losses, self.recent = defaultdict(list), []   # means of ten steps, as numbers; those since, still on the device
        self.generator = torch.Generator(device)
        self.videos = None                                 # dmd: captions and cache of the videos under way
        # bfloat16 where the GPU has it, in the losses over whole clips: float32's range, so no loss scale and no overflow. Weights, averages,
        # optimisers, losses and everything sampled stay float32. Its cache of cast weights is off: filled in a pass without gradients, it
        # would cut off those of a later pass with them.
        half = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        self.precision = lambda: torch.autocast(device.type, torch.bfloat16, enabled=half, cache_enabled=False)
        torch._dynamo.reset()                              # graphs of an earlier stage do not count against the limit of this one's
        fast = (lambda network: compiled(network, compile)) if compile else (lambda network: network)
        self.on_clips = {name: fast(network) for name, network in (
            ("model", self.model), ("ema", self.ema), ("teacher", getattr(self, "teacher", None)), ("score", getattr(self, "score", None)),
            ("critic", self.critic and self.critic.model)) if network is not None}     # as the losses call them, on whole clips
        self.recorded, self.pool = {}, torch.cuda.graph_pool_handle() if recordable(device) else None

    def rate(self) -> float:
        """Warm-up, then a cosine down to `final`: the share of the peak rate at this step."""
        r = self.recipe
        if self.step < r.warmup:
            return (self.step + 1) / r.warmup
        progress = (self.step - r.warmup) / max(1, r.steps - r.warmup)
        return r.final + (1 - r.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Clips and captions of a step."""
        return Steps(self)[step]

    def batches(self) -> DataLoader:
        """Those of every step from now to the last. A GPU takes them faster than one process draws them."""
        workers = 4 if self.device.type == "cuda" else 0
        return DataLoader(Steps(self), batch_size=None, sampler=range(self.step, self.recipe.steps), num_workers=workers,
                          pin_memory=workers > 0, worker_init_fn=leave_interrupts_alone)

    def update(self, x0: Tensor, caption: Tensor) -> Tensor:
        """One step on one batch; returns its loss (a tensor on the device: reading it would wait for the GPU)."""
        r, x0, caption = self.recipe, x0.to(self.device, non_blocking=True), caption.to(self.device, non_blocking=True)
        self.generator.manual_seed(r.seed * 1_000_003 + self.step)
        distilled = r.stage in ("cd", "dmd")
        decay = r.ema if distilled else min(r.ema, (1 + self.step) / (10 + self.step))      # a short memory while it learns fast
        rate, fresh = (torch.full((), value, device=self.device) for value in (self.rate(), 1 - decay))
        if r.stage == "dmd":
            dice = random.Random(f"{r.seed} {self.step}")  # Python's: the shape of the computation depends on it
            if self.step % r.every == 0:
                self._self_forced(self._generator_step, "generator", dice, caption, rate, fresh)
            loss = self._self_forced(self._critic_step, "critic", dice, caption, rate)
        else:
            loss, = self._run(r.stage, self._step, x0, caption, rate, fresh)
            self.recent.append((self.step, r.stage, loss))
        self.step += 1
        return loss

    def _run(self, key, function, *inputs: Tensor) -> tuple[Tensor, ...]:
        if key not in self.recorded:
            self.recorded[key] = Recorded(function, self.generator, self.pool)
        with OneStream() if processes() > 1 else nullcontext():
            return self.recorded[key](*inputs)

    def _self_forced(self, function, name: str, dice: random.Random, caption, *numbers) -> Tensor:
        """A step on a self-rollout: of new videos now and then, else of those of the last step, a clip length older each time; some of them
        change their caption. Exit and kind of start change the computation: one recording for each."""
        exit, new = dice.choice(self.recipe.exits), self.videos is None or dice.random() < self.recipe.restart
        videos = () if new else self.videos
        loss, *self.videos = self._run((name, exit, new), lambda *inputs: function(exit, *inputs), *numbers, caption, *videos)
        self.recent.append((self.step, name, loss))
        return loss

    def _rollout(self, exit, record, caption, before=None, *buffers):
        """(video, its captions, what the next step needs to go on with it)."""
        memory = self.model.make_cache(len(caption))
        if buffers:
            memory.seen, memory.buffers = memory.renamed, tuple(buffer.clone() for buffer in buffers)
            change = torch.rand(len(caption), 1, generator=self.generator, device=self.device) < self.recipe.switch
            caption = torch.where(change, caption, before)
        video = self_rollout(self.model, caption, memory, exit, self.generator, record)
        memory.rewind()
        return video, caption, (caption, *memory.buffers)

    def _step(self, x0, caption, rate, fresh):
        r = self.recipe
        with self.precision():
            if r.stage == "cd":
                loss = consistency_loss(*(self.on_clips[name] for name in ("model", "ema", "teacher")), x0, caption, r, self.generator)
            else:
                loss = (score_loss if r.stage == "score" else teacher_forcing_loss)(self.on_clips["model"], x0, caption, r, self.generator)[0]
        return self._averaged(self.learner.step(loss, rate), fresh),

    def _averaged(self, loss, fresh):
        with torch.no_grad():
            blend(list(self.ema.parameters()), self.learner.weights, fresh)
        return loss

    def _generator_step(self, exit, rate, fresh, *start):
        video, caption, end = self._rollout(exit, True, *start)
        with self.precision():
            gradient = dmd_gradient(video, caption, self.on_clips["score"], self.on_clips["critic"], self.recipe.guidance, self.generator)
        return self._averaged(self.learner.step(dmd_loss(video, gradient), rate), fresh), *end

    def _critic_step(self, exit, rate, *start):
        video, caption, end = self._rollout(exit, False, *start)
        with self.precision():
            loss = critic_loss(self.on_clips["critic"], video, caption, self.generator)
        return self.critic.step(loss, rate), *end

    # ---- going on, and stopping -----------------------------------------------------------------------------------

    def state(self) -> dict:
        """All that `--resume` needs, as tensors and plain values. All processes must ask: what they share is put together."""
        state = {"config": asdict(self.model.config), "recipe": asdict(self.recipe), "data": self.world.name, "step": self.step,
                 "seconds": self.seconds, "losses": dict(self.losses), "recent": list(self.recent),
                 "videos": self.videos and [all_rows(part, min(i, 1)) for i, part in enumerate(self.videos)],
                 "ema": self.ema.state_dict(), "learner": self.learner.state(), "critic": self.critic.state() if self.critic else None}
        return whole({**state, "frozen": {name: getattr(self, name).state_dict() for name in ("teacher", "score") if hasattr(self, name)}})

    def restore(self, state: dict) -> None:
        """Go on from `state()`. ValueError if it is the state of something else."""
        try:
            self.learner.restore(state["learner"])
            put(state["ema"], self.ema)
            for name in ("teacher", "score"):
                if hasattr(self, name):
                    put(state["frozen"][name], getattr(self, name))
            if self.critic:
                self.critic.restore(state["critic"])
                self._restore_videos(state["videos"])
            self.step, self.seconds = int(state["step"]), float(state["seconds"])
            self.losses = defaultdict(list, {str(name): [(int(step), float(loss)) for step, loss in pairs]
                                             for name, pairs in state["losses"].items()})
            self.recent = [(int(step), str(name), loss.to(self.device).view(())) for step, name, loss in state["recent"]]
        except (KeyError, IndexError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
            raise ValueError(f"not the state of a {self.recipe.stage} run of this model ({type(error).__name__})") from error

    def _restore_videos(self, videos: list[Tensor] | None) -> None:
        B, c = self.recipe.batch, self.model.config
        wanted = [torch.Size((B, c.slots)), *(buffer.shape for buffer in self.model.make_cache(B).buffers)]
        if videos and [part.shape for part in videos] != wanted:
            raise ValueError("its videos under way are of another model")
        self.videos = videos and [part.to(self.device)[(slice(None),) * (i > 0) + (my_rows(B),)] for i, part in enumerate(videos)]

    def put_together(self) -> None:
        """Training is over: the average as an ordinary model again, on every process."""
        weights, self.ema = whole(self.ema.state_dict()), VideoDiT(self.model.config).to(self.device).eval().requires_grad_(False)
        self.ema.load_state_dict(weights)

    def read_losses(self) -> None:
        """Take the losses since the last call off the device; ValueError that names the first one that says training diverged."""
        for step, name, loss in self.recent:
            value = loss.item()
            # A velocity that answers nothing has a loss of about 2, so twice that is worse than knowing nothing.
            if not math.isfinite(value) or (name not in ("cd", "generator") and value > 4):
                raise ValueError(f"training diverged: the {name} loss was the first to go, {value:.3g} at step {step}")
        for name in {name for _, name, _ in self.recent}:
            self.losses[name].append((self.step, mean(loss.item() for _, other, loss in self.recent if other == name)))
        self.recent.clear()
