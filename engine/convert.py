"""A dense model becomes MLA and learns on from there: `python train.py --from-dense PATH`.

`MLA.from_dense` (attention.py) converts one plain layer, and cuts as if every direction of its
input counted alike. Here a layer is first brought into coordinates in which that is so, and
brought back afterwards, which changes nothing in what it computes.

Inputs (C1). M = E[x x^T] is the second moment of a layer's inputs [E, E]. Then

    W x = (W M^1/2) (M^-1/2 x),     and E[y y^T] = 1 for y = M^-1/2 x

so the mean square of (W - W') x is the squared distance of W M^1/2 and W' M^1/2. These are what
is cut, and M^-1/2 is multiplied back into what reads x: W_DKV, W_KR, W_DQ.

Norms (C2). Wan's RMSNorm of queries is g * W_Q x / rho(x), rho(x) = sqrt(mean (W_Q x)^2). It is
not linear, nor is that of keys. Their gains g go into W, and rho becomes one number,
sqrt(E[rho^2]). Then it comes back: MLA divides its latents by their root mean square, T c is as
good a latent as c for any invertible T, and |T c|^2 is whatever quadratic form of c one likes.
T is chosen so that |T W_DQ x| is nearest to |W_Q x|, and |T W_DKV x| to |W_K x|. At Q = E and C
= E these are the dense layer's norms of queries and of content keys, exactly. (Values are
divided, too, where dense attention does not; k_rope is not. engine/homogeneous.py keeps all of
it exact, in a layer of another kind.)

tests/test_convert.py.
"""

import copy
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor, nn

from attention import MLA, Dense
from flow import Draws, shift
from mla_video import Config, VideoDiT, sinusoid
from objectives import teacher_forcing_loss

CLIPS = 32                                 # whose tokens tell the second moments


# ---- the inputs of the layers ----------------------------------------------------------------

@torch.no_grad()
def moments_on(model: VideoDiT, video: Tensor, caption: Tensor, seed: int = 0) -> list[Tensor]:
    """M [E, E] of every self-attention of a dense model, in float64, over the tokens that
    teacher forcing makes of these clips: clean ones and noisy ones. Model and clips are on one
    device, the answer is on the CPU."""
    found = []

    def keep(layer, arguments, output):
        x = arguments[0].flatten(0, 1).double()            # [B L, E]
        M = x.T @ x / len(x)
        found.append(M.cpu())

    hooks = [block.attention.W_K.register_forward_hook(keep) for block in model.blocks]
    draws = Draws(torch.Generator(video.device).manual_seed(seed))
    teacher_forcing_loss(model, video, caption, draws)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def moments_of_weights(model: VideoDiT, levels: int = 64) -> list[Tensor]:
    """M [E, E] of every self-attention without any clip. x = LayerNorm(h) (1 + scale) + offset:
    scale and offset are known for every noise level, and of LayerNorm(h) it is known that its
    mean is 0 and its mean square 1. For the rest it is taken for noise."""
    E = model.config.dim
    u = (torch.arange(levels) + 0.5) / levels
    noisy = shift(torch.sigmoid(torch.special.ndtri(u)))   # as in training
    sigma = torch.cat((torch.zeros(levels), noisy))[None]                  # [1, 2 levels]
    sigma_emb = model.time(sinusoid(sigma, 256))
    level = model.level(sigma_emb)[0].unflatten(-1, (6, E))                # [2 levels, 6, E]
    centred = torch.eye(E).double() - 1 / E
    normed = centred * E / (E - 1)                         # of LayerNorm(h)
    found = []
    for block in model.blocks:
        steer = (level + block.modulation).double()
        offset = steer[:, 0]
        times = 1 + steer[:, 1]
        M = times.T @ times * normed + offset.T @ offset
        found.append(M / len(steer))
    return found


def roots(M: Tensor) -> tuple[Tensor, Tensor]:
    """(S, S^-1) with S S^T = M, for a symmetric M [n, n]; directions that hardly occur count as
    a little."""
    sizes, directions = torch.linalg.eigh(M)
    floor = 1e-12 * sizes[-1].clamp_min(1e-300)
    sizes = sizes.clamp_min(floor).sqrt()
    return (directions * sizes) @ directions.T, (directions / sizes) @ directions.T


# ---- one layer -------------------------------------------------------------------------------

@torch.no_grad()
def convert_layer(dense: Dense, M: Tensor, C: int, Q: int, R: int, norm: bool,
                  make: Callable[..., MLA] = MLA.from_dense) -> MLA:
    """An MLA layer (float64, on the CPU) made of `dense`; `M` [E, E] is the second moment of
    its inputs. `norm` puts an RMSNorm on both latents (C2); `make` converts the plain layer
    that (C1) and (C2) lead to.

    Raises ValueError for C, Q, R out of range, and for a layer with biases.
    """
    if dense.W_K.bias is not None:
        raise ValueError("a dense layer with biases becomes MLA in homogeneous coordinates "
                         "alone (engine/homogeneous.py)")
    plain = linearised(dense, M)
    S, inverse = roots(M)
    for projection in (plain.W_Q, plain.W_K, plain.W_V):
        projection.weight.copy_(projection.weight @ S)                                 # (C1)
    mla = make(plain, C, Q, R)
    for projection in (mla.W_DKV, mla.W_KR, mla.W_DQ):
        projection.weight.copy_(projection.weight @ inverse)
    if norm:
        mla.norm_kv = nn.RMSNorm(C, dense.norm_k.eps).double()
        mla.norm_q = nn.RMSNorm(Q, dense.norm_q.eps).double()
        like_rho(mla.W_DKV, (mla.W_UK, mla.W_UV), dense.W_K.weight.cpu().double(), M)
        like_rho(mla.W_DQ, (mla.W_UQ, mla.W_QR), dense.W_Q.weight.cpu().double(), M)
    return mla


def linearised(dense: Dense, M: Tensor) -> Dense:
    """`dense` without its norms (C2): their gains are in the weights, their divisors constants.
    In float64, on the CPU."""
    dense = copy.deepcopy(dense).cpu().double().requires_grad_(False)
    for W, norm in ((dense.W_Q, dense.norm_q), (dense.W_K, dense.norm_k)):
        if isinstance(norm, nn.RMSNorm):
            rho = mean_square(W.weight, M).mean().sqrt()
            W.weight.mul_(norm.weight[:, None] / rho)
    dense.norm_q = nn.Identity()
    dense.norm_k = nn.Identity()
    return dense


def mean_square(W: Tensor, M: Tensor) -> Tensor:
    """E[(W x)^2] of every output [outputs] of W [outputs, E]."""
    return (W @ M * W).sum(dim=1)


def like_rho(down: nn.Linear, ups: tuple[nn.Linear, ...], W: Tensor, M: Tensor) -> None:
    """(C2), in place: the latent c = down x becomes T c of the size of W x, as near as can be,
    and `ups`, which read the normed latent, go back to c."""
    D = down.weight
    size = D @ M @ D.T                                     # E[c c^T]
    guess = W @ M @ D.T @ torch.linalg.pinv(size)          # guess c is nearest to W x
    G = guess.T @ guess
    T, inverse = roots(G)
    down.weight.copy_(T @ D)
    rms = mean_square(down.weight, M).mean().sqrt()
    for up in ups:
        up.weight.copy_(rms * up.weight @ inverse)


# ---- a model ---------------------------------------------------------------------------------

@torch.no_grad()
def convert(dense: VideoDiT, config: Config, moments: list[Tensor], **how) -> VideoDiT:
    """The model of `config` (attention "mla") that a dense one becomes, in its dtype: every
    self-attention by `convert_layer` (which `how` is for), with the moment of its layer, and
    everything else as it is. ValueError if the two differ in more than attention does."""
    check_alike(dense.config, config)
    mla = VideoDiT(config).to(dense.embed.weight.dtype)
    weights = dense.state_dict()
    for layer, (block, M) in enumerate(zip(dense.blocks, moments)):
        prefix = f"blocks.{layer}.attention."
        weights = {name: weights[name] for name in weights if not name.startswith(prefix)}
        made = convert_layer(block.attention, M, config.latent, config.query_latent,
                             config.rope, config.norm, **how)
        weights |= {prefix + name: value for name, value in made.state_dict().items()}
    mla.load_state_dict(weights)
    return mla


MLA_ALONE = ("attention", "latent", "query_latent", "rope")    # what dense attention has not


def check_alike(dense: Config, mla: Config) -> None:
    """ValueError that names both sides unless they differ in `MLA_ALONE` at most, and latents
    are no wider than the model."""
    theirs = asdict(dense)
    for name, value in asdict(mla).items():
        if name not in MLA_ALONE and theirs[name] != value:
            raise ValueError(f"the dense model's {name} is {theirs[name]}, and the MLA model's "
                             f"is {value}: they must be the same")
    for name in ("latent", "query_latent"):
        value = getattr(mla, name)
        if value > mla.dim:
            raise ValueError(f"a dense model of width {mla.dim} becomes MLA with {name} "
                             f"{mla.dim} at most, got {value}")
