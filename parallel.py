"""One training run on several processes: `torchrun --nproc_per_node=N train.py ...`, on torch.distributed (gloo on CPUs, nccl on GPUs).

One stream of clips and noise, divided by rows: of a batch of B clips process r of N takes rows r B / N to (r + 1) B / N, and of every
random draw the same rows of what a single process would have drawn. Losses are means over rows, so the mean over processes *is* the single
process' loss and gradient, to rounding. tests/test_parallel.py: two processes against one, every stage, whole and sharded.

Letters: B clips in a batch, N processes, r this one.
"""

import atexit
import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import _muon as muon
from torch.overrides import TorchFunctionMode


def rank() -> int:
    """Which process this is, 0 to N - 1; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """N, how many processes train together; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def join(device: torch.device) -> torch.device:
    """Meet the other processes, if torchrun started this one; the device to use. Process 0 alone speaks."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
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
    muon._zeropower_via_newtonschulz = orthogonalise
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model, reshard_after_forward=True)         # the root, too: its weights are read between passes
    for verb in ("denoise", "commit", "bidirectional"):    # forward is one of four ways in
        register_fsdp_forward_method(model, verb)
    return model


def orthogonalise(update: Tensor, *how, plain=muon._zeropower_via_newtonschulz) -> Tensor:
    """Muon's Newton-Schulz iteration, on the matrix put together once. Left to itself it multiplies shards, with a message for each of its
    15 products, whose partial sums are rounded to bfloat16: then losses are those of one process to 2e-5 and not to 1e-5."""
    return like(plain(update.full_tensor(), *how), update) if isinstance(update, DTensor) else plain(update, *how)


def whole(state):
    """A state with sharded tensors put together; all processes must ask. What a checkpoint holds never depends on N."""
    if isinstance(state, dict):
        return {name: whole(part) for name, part in state.items()}
    if isinstance(state, list):
        return [whole(part) for part in state]
    return state.full_tensor() if isinstance(state, DTensor) else state


def like(value, model: Tensor):
    """A whole tensor, sharded as `model` is if it is one."""
    if not isinstance(model, DTensor) or not isinstance(value, Tensor) or value.shape != model.shape:
        return value
    return distribute_tensor(value.to(model.device), model.device_mesh, model.placements, src_data_rank=None)     # all have it: no message
