"""torch.optim.Muon, with its iteration in the precision of the weights.

Muon makes an update orthogonal, so that every direction of a matrix learns at the same pace.
torch's begins by rounding the update to bfloat16. That is right for large models on GPUs, and
costs two things here:

    time     a CPU without units for bfloat16 (a laptop with AVX2, say) takes longer for the
             iteration than for all the rest of a toy step
    digits   numbers of bfloat16 lie u = 2^-8 apart (relative). Two updates that differ by
             d = 6e-8, a rounding of float32, land on different ones with probability d / u:
             their root mean square distance becomes sqrt(d u), which is 250 times d. So two
             processes drift away from one
"""

import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from engine.parallel import like

Coefficients = tuple[float, float, float]


class Muon(torch.optim.Muon):
    """torch's optimiser with its state and its numbers; only `step` is written anew. Weights
    may be sharded. tests/test_parallel.py: torch's own steps, but for the rounding."""

    def __init__(self, weights: list[Tensor], lr: float, weight_decay: float):
        super().__init__(weights, lr, weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)

    def _update(self, weight: Tensor, group: dict) -> None:
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight.grad)
        average = state["momentum_buffer"]
        average.lerp_(weight.grad, 1 - group["momentum"])
        update = weight.grad.lerp(average, group["momentum"])          # Nesterov's look ahead
        update = orthogonalise(update, group["ns_coefficients"], group["ns_steps"],
                               group["eps"])
        # An orthogonal update has entries of root mean square 1 / sqrt(longer side); AdamW's
        # have about 0.2. With the same size both may share one learning rate.
        size = 0.2 * math.sqrt(max(weight.shape))
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(update, alpha=-group["lr"] * size)


def orthogonalise(update: Tensor, coefficients: Coefficients, steps: int, eps: float) -> Tensor:
    """Muon's iteration  X <- a X + (b G + c G G) X,  G = X X^T,  from X = update / |update|.

    It takes every singular value s to a s + b s^3 + c s^5, and after five steps to about 1.
    """
    if isinstance(update, DTensor):
        # Left to itself each of the 15 products of a sharded matrix would be a message.
        x = orthogonalise(update.full_tensor(), coefficients, steps, eps)
        return like(x, update)
    a, b, c = coefficients
    tall = update.shape[0] > update.shape[1]
    x = update.T if tall else update                       # G is the smaller of X X^T and X^T X
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        G = x @ x.T
        polynomial = torch.addmm(G, G, G, beta=b, alpha=c)
        x = torch.addmm(x, polynomial, x, beta=a)
    return x.T if tall else x
