"""One training run on several processes: `torchrun --nproc_per_node=N train.py ...`, on
torch.distributed (gloo on CPUs, nccl on GPUs).

There is one stream of clips and noise, and each process has its part of it. Of a batch of B
clips process r of N takes clips r B / N to (r + 1) B / N. Of every random draw it takes the
same part of what a single process would have drawn. Losses are means over clips, so the mean
over the processes *is* the single process' loss, and its gradient, to rounding.
tests/test_parallel.py: two processes against one, every stage, whole and sharded.

Letters: B clips in a batch, N processes, r this one.
"""

import atexit
import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from flow import Draws


# ---- who is there ----------------------------------------------------------------------------

def rank() -> int:
    """r, which process this is: 0 to N - 1; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    """N, how many processes train together; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def my_device(name: str) -> str:
    """The name of this process' device. Of the processes that torchrun starts on a host, each
    has a GPU of its own."""
    if name.startswith("cuda") and "LOCAL_RANK" in os.environ:
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return name


def join(device: torch.device) -> None:
    """Meet the other processes, if torchrun started this one."""
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    if alone or dist.is_initialized():
        return
    backend = "gloo"
    if device.type == "cuda":
        backend = "nccl"
        torch.cuda.set_device(device)                      # NCCL takes the current one
    # A day, because process 0 judges rollouts alone while the others wait. That a process has
    # died the others learn from torchrun, and not from this clock.
    dist.init_process_group(backend, timeout=timedelta(days=1))
    atexit.register(leave)


def leave() -> None:
    """Part from the other processes, as the last thing that this one does.

    gloo's threads hold the tensors of the last messages and need the interpreter to let go of
    them. One that asks while the interpreter shuts down aborts the process ("terminate called
    without an active exception", exit code -6). Destroying the group ends these threads only
    where nothing else holds it, and what `fully_shard` made does. So they are given a moment.
    """
    dist.destroy_process_group()
    time.sleep(0.5)


def say(line: str) -> None:
    """Print a line once, and not N times: process 0 speaks for all."""
    if rank() == 0:
        print(line, flush=True)


# ---- a part for each -------------------------------------------------------------------------

def my_part(batch: int) -> slice:
    """Which clips of a batch of that size are this process'."""
    return slice(rank() * batch // processes(), (rank() + 1) * batch // processes())


class SharedDraws(Draws):
    """Draws the whole batch's numbers, as a single process would, and keeps this process' part.

    The first axis of every shape must be this process' part of the batch.
    """

    def normal(self, part: int, *rest: int) -> Tensor:
        batch = part * processes()
        return super().normal(batch, *rest)[my_part(batch)]

    def uniform(self, part: int, *rest: int) -> Tensor:
        batch = part * processes()
        return super().uniform(batch, *rest)[my_part(batch)]

    def integers(self, top: int, part: int, *rest: int) -> Tensor:
        batch = part * processes()
        return super().integers(top, batch, *rest)[my_part(batch)]


def all_parts(part: Tensor, axis: int = 0) -> Tensor:
    """What the processes hold of a batch, B / N along `axis`, put together: B along `axis`. All
    must ask."""
    if processes() == 1:
        return part
    part = part.movedim(axis, 0).contiguous()
    parts = [torch.empty_like(part) for _ in range(processes())]
    dist.all_gather(parts, part)
    return torch.cat(parts).movedim(0, axis)


def mean_over_processes(loss: Tensor, weights: list[Tensor]) -> Tensor:
    """Make the gradients of `weights` their means over all processes, and return the mean loss.

    It is one message. The gradients of sharded weights are means already: fully_shard takes
    them during the backward pass.
    """
    if processes() == 1:
        return loss
    grads = []
    for weight in weights:
        if weight.grad is not None and not isinstance(weight, DTensor):
            grads.append(weight.grad)
    parts = [loss.detach(), *grads]
    message = torch.cat([part.flatten() for part in parts])
    dist.all_reduce(message)
    means = (message / processes()).split([part.numel() for part in parts])
    for grad, mean in zip(grads, means[1:]):
        grad.copy_(mean.view_as(grad))
    return means[0].view(())


def any_of(flag: bool, device: torch.device) -> bool:
    """Is it true for one process at least? All must ask, and none goes on before all have."""
    if processes() == 1:
        return flag
    votes = torch.tensor(float(flag), device=device)
    dist.all_reduce(votes)
    return votes.item() > 0


def recordable(device: torch.device) -> bool:
    """May a step be recorded as a CUDA graph?

    Not with several processes. fully_shard waits for events of the step before, which a
    recording must not; and NCCL lets no process end while a recording of its messages exists.
    """
    return device.type == "cuda" and processes() == 1


# ---- models that outgrow a device ------------------------------------------------------------

def shard(model: nn.Module) -> None:
    """Keep 1/N of every weight on each process, and so of its optimiser's numbers. The weights
    of a block are put together while it runs (FSDP2)."""
    # Without a mesh fully_shard takes a GPU wherever there is one, and moves a model there that
    # shall train on CPUs.
    mesh = init_device_mesh(model.embed.weight.device.type, (processes(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    # The weights around the blocks are read between passes, so they must be sharded again, too.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    for verb in ("denoise", "commit", "bidirectional"):    # forward is one of four ways in
        register_fsdp_forward_method(model, verb)


def whole(state):
    """A state with its sharded tensors put together: what a checkpoint holds never depends on
    N. All processes must ask."""
    if isinstance(state, dict):
        return {name: whole(part) for name, part in state.items()}
    if isinstance(state, list):
        return [whole(part) for part in state]
    if isinstance(state, DTensor):
        return state.full_tensor()
    return state


def like(value, pattern: Tensor):
    """A whole tensor, sharded as `pattern` is, if it is. Anything else comes back as it is."""
    sharded = isinstance(pattern, DTensor) and isinstance(value, Tensor)
    if not sharded or value.shape != pattern.shape:
        return value
    value = value.to(pattern.device)
    # Every process has the whole value, so none needs to send its part (src_data_rank=None).
    return distribute_tensor(value, pattern.device_mesh, pattern.placements, src_data_rank=None)
