"""One training run on several processes: `torchrun --nproc_per_node=N train.py ...`, on torch.distributed (gloo on CPUs, nccl on GPUs).

One stream of clips and noise, divided by rows: of a batch of B clips process r of N takes rows r B / N to (r + 1) B / N, and of every
random draw the same rows of what a single process would have drawn. Losses are means over rows, so the mean over processes *is* the single
process' loss and gradient, to rounding; and nothing after that may make much of a rounding (`orthogonalise`). tests/test_parallel.py:
two processes against one, every stage, whole and sharded.

Letters: B clips in a batch, N processes, r this one.
"""

import atexit
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.overrides import TorchFunctionMode


def rank() -> int:
    """Which process this is, 0 to N - 1; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """N, how many processes train together; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def mine(device: str) -> str:
    """The name of this process' device: of those that torchrun starts on a host, each has a GPU of its own."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device.startswith("cuda") and "LOCAL_RANK" in os.environ else device


def join(device: torch.device) -> torch.device:
    """Meet the other processes, if torchrun started this one; returns the device. Process 0 alone speaks."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return device
    if device.type == "cuda":
        torch.cuda.set_device(device)                      # NCCL takes the current one
    # A day: process 0 judges rollouts alone while the others wait. That one has died they learn from torchrun, not from a clock.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
    atexit.register(dist.destroy_process_group)            # its threads must be gone before the process is
    if rank():
        sys.stdout = open(os.devnull, "w")
    return device


def my_rows(rows: int) -> slice:
    """This process' rows of a batch."""
    return slice(rank() * rows // world(), (rank() + 1) * rows // world())


class OneStream(TorchFunctionMode):
    """Within it, a draw from a generator is this process' rows of the whole batch's draw. The first axis must be the batch."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function not in (torch.rand, torch.randn, torch.randint) or kwargs.get("generator") is None:
            return function(*args, **kwargs)
        high, size = (args[:1], args[1]) if function is torch.randint else ((), args if isinstance(args[0], int) else args[0])
        return function(*high, (size[0] * world(), *size[1:]), **kwargs)[my_rows(size[0] * world())]


def mean_over_processes(loss: Tensor, weights: list[Tensor]) -> Tensor:
    """Make the gradients of `weights` their means over all processes, and return the mean loss: one message. Sharded weights' gradients
    are means already, since fully_shard takes them on the way back."""
    grads = [weight.grad for weight in weights if weight.grad is not None and not isinstance(weight, DTensor)]
    message = torch.cat([loss.detach().view(1), *(grad.flatten() for grad in grads)])
    dist.all_reduce(message)
    loss, *means = (message / world()).split([1, *(grad.numel() for grad in grads)])
    for grad, value in zip(grads, means):
        grad.copy_(value.view_as(grad))
    return loss[0]


def all_rows(rows: Tensor, axis: int = 0) -> Tensor:
    """What the processes hold of a batch, [.. B / N ..], as the batch [.. B ..]; all must ask."""
    if world() == 1:
        return rows
    rows = rows.movedim(axis, 0).contiguous()
    parts = [torch.empty_like(rows) for _ in range(world())]
    dist.all_gather(parts, rows)
    return torch.cat(parts).movedim(0, axis)


def recordable(device: torch.device) -> bool:
    """May a step be recorded as a CUDA graph? Not with several processes: fully_shard waits for events of the step before, which a
    recording must not, and NCCL lets no process end while a recording that it is part of exists."""
    return device.type == "cuda" and world() == 1


def any_of(flag: bool, device: torch.device) -> bool:
    """Is it true for one process at least? All must ask."""
    if world() == 1:
        return flag
    votes = torch.tensor(float(flag), device=device)
    dist.all_reduce(votes)
    return votes.item() > 0


# ---- models that outgrow a device -----------------------------------------------------------------------------------

def shard(model: nn.Module) -> nn.Module:
    """Each process keeps 1/N of every weight and of its optimiser's numbers; a block's are put together while it runs (FSDP2)."""
    # Left to itself fully_shard takes a GPU wherever there is one, and moves a model there that shall train on CPUs.
    mesh = init_device_mesh(model.embed.weight.device.type, (world(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)      # the root, too: its weights are read between passes
    for verb in ("denoise", "commit", "bidirectional"):    # forward is one of four ways in
        register_fsdp_forward_method(model, verb)
    return model


def orthogonalise(update: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Muon's iteration  X <- a X + (b G + c G G) X,  G = X X^T,  from X = update / |update|: torch's, with two differences.

    It stays in the update's own precision. torch's begins by rounding to bfloat16, whose numbers lie u = 2^-8 apart (relative): two
    updates that differ by d = 6e-8, a rounding of float32, then land on different ones with probability d / u, so that their root mean
    square distance becomes sqrt(d u), 250 times d. After 50 steps the losses of two processes were 1e-5 from those of one; now they are
    4e-7. (To sum the gradients' message in float64 changed nothing: what differs is rounded before it is sent.)
    And a sharded matrix is put together once; left to itself each of the 15 products of shards is a message.
    """
    if isinstance(update, DTensor):
        return like(orthogonalise(update.full_tensor(), coefficients, steps, eps), update)
    a, b, c = coefficients
    x = update.T if update.shape[0] > update.shape[1] else update      # G is the smaller of X X^T and X^T X
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        G = x @ x.T
        x = torch.addmm(x, torch.addmm(G, G, G, beta=b, alpha=c), x, beta=a)
    return x.T if update.shape[0] > update.shape[1] else x


def whole(state):
    """A state with sharded tensors put together; all processes must ask. What a checkpoint holds never depends on N."""
    if isinstance(state, dict):
        return {name: whole(part) for name, part in state.items()}
    if isinstance(state, list):
        return [whole(part) for part in state]
    return state.full_tensor() if isinstance(state, DTensor) else state


def like(value, pattern: Tensor):
    """A whole tensor, sharded as `pattern` is if it is one."""
    if not isinstance(pattern, DTensor) or not isinstance(value, Tensor) or value.shape != pattern.shape:
        return value
    return distribute_tensor(value.to(pattern.device), pattern.device_mesh, pattern.placements, src_data_rank=None)  # all have it: no message
