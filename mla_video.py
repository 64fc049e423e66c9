"""A causal video diffusion transformer, Wan-shaped and small, whose self-attention is MLA or dense and nothing else differs.

Video is made chunk by chunk. A chunk is denoised in a few passes while it looks at a rolling cache of past chunks;
when it is clean, one more pass at noise level 0 commits it (`commit`). Training does all chunks of a clip in one
pass (`forward`, teacher forcing): the sequence is [clean frames | noisy frames], and who sees whom is `allowed`.

Letters: B batch, F frames, P tokens per frame, L tokens of this call, M caption words, E model width; more in attention.py.
Reading order: Config, allowed, Block, VideoDiT. tests/test_streaming.py proves that the two ways of running agree.
"""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from attention import MLA, ROUTES, Dense, Spans, choose_route, crossing, route_flops  # noqa: F401  (one import for users)
from cache import RollingCache
from rope3d import Rope3D, grid_coords


@dataclass(frozen=True)
class Config:
    """Every size of the model. Defaults are the `toy` preset: the paper's proportions (C = E/8, Q = E/2, R = d_h/4)."""

    attention: str = "mla"                                 # or "dense"
    dim: int = 128                                         # E
    layers: int = 5
    heads: int = 4                                         # H
    latent: int = 16                                       # C
    query_latent: int = 64                                 # Q
    rope: int = 8                                          # R; the rest of the head, d_h - R, is N
    ffn: int = 512
    channels: int = 3
    height: int = 16
    width: int = 16
    patch: int = 4
    words: int = 32                                        # caption vocabulary; word 0 = absent
    slots: int = 3                                         # caption length
    frames: int = 12                                       # frames of a training clip; positions never go beyond
    chunk: int = 3
    window: int = 12                                       # visible frames: sink and the chunk itself included
    sink: int = 0
    norm: bool = True                                      # RMSNorm on the latents; in dense attention on queries and keys
    place: bool = True                                     # a learned vector for each place in the frame (Wan has none)

    def __post_init__(self):
        def need(ok: bool, message: str):
            if not ok:
                raise ValueError(message)

        for name, value in asdict(self).items():
            if name not in ("attention", "norm", "place", "sink"):
                top = 1024 if name == "layers" else 2**20      # sizes come from files and flags: refuse before anything is allocated
                need(type(value) is int and 0 < value <= top, f"{name} must be a positive integer up to {top}, got {str(value)[:40]}")
        need(self.attention in ("mla", "dense"), f"attention must be 'mla' or 'dense', got {str(self.attention)[:40]!r}")
        for name in ("norm", "place"):
            need(getattr(self, name) in (True, False), f"{name} must be True or False, got {str(getattr(self, name))[:40]!r}")
        need(self.dim % self.heads == 0, f"{self.heads} heads do not divide a width of {self.dim}")
        need(self.height % self.patch == 0 and self.width % self.patch == 0,
             f"patches of {self.patch} do not divide {self.height} x {self.width} pixels; give a size that is a multiple")
        need(self.frames % self.chunk == 0, f"{self.frames} frames are not whole chunks of {self.chunk}")
        need(self.rope < self.dim // self.heads, f"{self.rope} rope channels leave no content channel in a head of "
             f"{self.dim // self.heads}")
        need(type(self.sink) is int and self.sink >= 0, f"sink must be 0 frames or more, got {self.sink!r}")
        need(self.window >= self.sink + self.chunk, f"a window of {self.window} frames cannot hold {self.sink} sink frames "
             f"and a chunk of {self.chunk}: it must be at least {self.sink + self.chunk}")
        need(self.window <= self.frames, f"a window of {self.window} frames is longer than the {self.frames} frames of a "
             f"training clip: nothing would have trained those positions")
        need(self.frames * self.tokens <= 2**19 and self.frames * self.channels * self.height * self.width <= 2**27, f"a clip of "
             f"{self.frames} x {self.height} x {self.width} pixels in patches of {self.patch} is more than a clip of this program")
        self.make_rope()                                   # raises on an odd or impossible rope split

    @property
    def tokens(self) -> int:
        """P, tokens per frame."""
        return (self.height // self.patch) * (self.width // self.patch)

    def make_rope(self) -> Rope3D:
        """MLA rotates R channels, the fastest bands of a head; dense attention rotates the whole head."""
        head = self.dim // self.heads
        return Rope3D(self.rope if self.attention == "mla" else head, head)


PRESETS = {
    "toy": Config(),
    "small": Config(dim=384, layers=8, heads=6, latent=48, query_latent=192, rope=16, ffn=1536, height=32, width=32),
    # Wan2.1-T2V-1.3B with the paper's latent sizes: 832 x 480 video, 8x in the VAE, patch 2, so 30 x 52 tokens a frame.
    "wan1.3b": Config(dim=1536, layers=30, heads=12, latent=192, query_latent=768, rope=32, ffn=8960, channels=16, height=60,
                      width=104, patch=2, words=1024, slots=512, frames=21, window=21, sink=1, place=False),
}


def allowed(q_frame: Tensor, q_noisy: Tensor, k_frame: Tensor, k_noisy: Tensor, config: Config) -> Tensor:
    """Who may look at whom in the teacher-forced sequence; broadcasts, bool. The one definition of causality here.

        query \\ key     clean, chunk b                        noisy, chunk b
        clean, chunk a   b <= a, in the window or a sink       never
        noisy, chunk a   b <  a, in the window or a sink       b = a

    The strict < is the anti-leak condition: with <= a noisy chunk would read its own answer. The window is that
    of the cache: the last window - chunk - sink frames before the chunk.
    """
    a, b = q_frame // config.chunk, k_frame // config.chunk
    recent = k_frame >= a * config.chunk - (config.window - config.chunk - config.sink)
    past = (b < a) & (recent | (k_frame < config.sink))
    own = (b == a) & (q_noisy == k_noisy)                  # clean a sees clean a; noisy a sees noisy a
    return own | (past & ~k_noisy)


def spans(mask: Tensor, config: Config) -> Spans:
    """A mask over frames [Fq, Fk] in block form: for each chunk of queries, the runs of key tokens that it sees (all frames
    of a chunk see the same). tests/test_streaming.py: same answer as the mask."""
    P, n = config.tokens, config.chunk
    edge = F.pad(mask[::n].int(), (1, 1)).diff()                                       # +1 where a run begins, -1 after it
    runs = [zip(row.eq(1).nonzero().flatten().tolist(), row.eq(-1).nonzero().flatten().tolist()) for row in edge]
    return [(slice(i * n * P, (i + 1) * n * P), [slice(a * P, b * P) for a, b in run]) for i, run in enumerate(runs)]


def drop_queries(mask: Tensor | Spans, first: int) -> Tensor | Spans:
    """The mask or spans of query tokens from `first` on."""
    if isinstance(mask, Tensor):
        return mask[first:]
    return [(slice(rows.start - first, rows.stop - first), keys) for rows, keys in mask if rows.start >= first]


def sinusoid(sigma: Tensor, width: int) -> Tensor:
    """Features [..., width] of the noise level: cos and sin of 1000 * sigma at geometric frequencies. The time axis has
    one direction in this repository: sigma = 0 is clean, sigma = 1 is noise."""
    omega = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=sigma.device) / (width // 2))
    angle = 1000 * sigma[..., None].float() * omega
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [B, F, P, E] by per-frame shift and scale [B, F, 1, E]."""
    return torch.addcmul(shift, x, 1 + scale)


class Block(nn.Module):
    """Wan's block: self-attention, cross-attention to the caption, FFN. The noise level gives six numbers per frame and channel: shift,
    scale and gate of the first, then of the last. Gates and the caption's W_O start at zero: a new block is the identity."""

    def __init__(self, config: Config):
        super().__init__()
        E = config.dim
        layer = MLA if config.attention == "mla" else Dense
        sizes = dict(C=config.latent, Q=config.query_latent, N=E // config.heads - config.rope, V=E // config.heads)
        self.attention = layer(E, config.heads, rope=config.make_rope(), norm=config.norm,
                               **(sizes if config.attention == "mla" else {}))
        self.caption = Dense(E, config.heads, rope=None, norm=config.norm)
        self.ffn = nn.Sequential(nn.Linear(E, config.ffn), nn.GELU(approximate="tanh"), nn.Linear(config.ffn, E))
        self.norm_caption = nn.LayerNorm(E)
        self.modulation = nn.Parameter(torch.zeros(6, E))

    def forward(self, x, level, caption, see, q_table, k_table, mask, route, ask):
        """x [B, F, P, E], level [B, F, 6, E], caption [B, M, E]. `see` turns this call's rows into all visible rows
        (cached ones first); only frames from `ask` on are queries and leave the block. Returns them and the rows."""
        E = x.shape[-1]
        s1, c1, g1, s2, c2, g2 = (level + self.modulation).unsqueeze(3).unbind(2)      # each [B, F, 1, E]
        h = modulate(F.layer_norm(x, (E,)), s1, c1).flatten(1, 2)                      # [B, L, E]
        rows = self.attention.rows(h)                      # of every frame, those before `ask` too: they are looked at
        if ask:
            first = ask * x.shape[2]
            x, h, q_table, mask = x[:, ask:], h[:, first:], tuple(part[first:] for part in q_table), drop_queries(mask, first)
            g1, s2, c2, g2 = (part[:, ask:] for part in (g1, s2, c2, g2))
        o = self.attention(h, see(rows), q_table, k_table, mask, route)
        x = torch.addcmul(x, g1, o.view_as(x))
        # No mask: an absent word is word 0, which has an embedding of its own, so "nothing said" is something to attend to.
        x = x + self.caption(self.norm_caption(x).flatten(1, 2), self.caption.rows(caption)).view_as(x)
        x = torch.addcmul(x, g2, self.ffn(modulate(F.layer_norm(x, (E,)), s2, c2)))
        return x, rows


class VideoDiT(nn.Module):
    """v(x, sigma | past, caption): the velocity eps - x0 of flow matching, for every frame of a chunk.

    Video is [B, F, channels, height, width]; sigma [B, F] in [0, 1]; caption LongTensor [B, slots].
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config, E = config, config.dim
        pixels = config.channels * config.patch**2
        self.embed = nn.Linear(pixels, E)
        # RoPE tells a token how far others are, not where it stands: on black, no token could know the wall that it will bounce from. It
        # says which row and column, never which frame, so what is cached still has no place in time.
        self.place = nn.Parameter(torch.zeros(config.tokens, E)) if config.place else None
        self.words = nn.Embedding(config.words, E)
        self.time = nn.Sequential(nn.Linear(256, E), nn.SiLU(), nn.Linear(E, E))
        # Wan's economy: one projection of the noise level to 6 E numbers serves all blocks; a block owns an offset to it alone.
        self.level = nn.Sequential(nn.SiLU(), nn.Linear(E, 6 * E))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head_modulation = nn.Parameter(torch.zeros(2, E))
        self.head = nn.Linear(E, pixels)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Weights of all projections; zeros where the model must start silent: gates, captions, head."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    module.bias.zero_()
        nn.init.normal_(self.words.weight, std=1.0)
        self.level[1].weight.zero_()                       # gates 0
        self.head.weight.zero_()                           # first prediction: v = 0, the mean
        for block in self.blocks:
            block.caption.W_O.weight.zero_()

    def make_cache(self, batch: int, dtype: torch.dtype | None = None, device=None) -> RollingCache:
        """An empty cache for `batch` videos, on the model's device and in its dtype unless told otherwise."""
        c, weight = self.config, self.embed.weight
        return RollingCache(c.layers, batch, self.blocks[0].attention.widths, tokens=c.tokens, chunk=c.chunk, window=c.window,
                            sink=c.sink, horizon=c.frames, device=device or weight.device, dtype=dtype or weight.dtype)

    # ---- the ways to run it -----------------------------------------------------------------------------------------

    def forward(self, clean: Tensor, noisy: Tensor, sigma: Tensor, caption: Tensor, route: str = "materialised") -> Tensor:
        """Teacher forcing: v of the noisy frames of a whole clip, each chunk given the clean chunks before it.

        The clean half runs at sigma = 0 and at the same positions, so it is what `commit` would have computed.
        """
        frames = torch.arange(clean.shape[1], device=clean.device)
        x = torch.cat((clean, noisy), dim=1)                                           # [B, 2F, ...]
        sigma = torch.cat((torch.zeros_like(sigma), sigma), dim=1)
        frame, half = torch.cat((frames, frames)), torch.arange(2 * len(frames), device=clean.device) >= len(frames)
        mask = allowed(frame[:, None], half[:, None], frame[None], half[None], self.config)        # [2F, 2F], of frames
        if route == "materialised" and x.device.type == "cpu":
            mask = spans(mask, self.config)                # skips what is masked; on a GPU one masked launch is faster
        else:
            mask = mask.repeat_interleave(self.config.tokens, 0).repeat_interleave(self.config.tokens, 1)
        return self._run(x, sigma, caption, frame, frame, route, mask=mask, ask=len(frames))[0]

    def bidirectional(self, x: Tensor, sigma: Tensor, caption: Tensor, route: str = "materialised") -> Tensor:
        """v of a whole clip in which every frame sees every other: the score of whole videos that stages 0 and 3 work with."""
        frames = torch.arange(x.shape[1], device=x.device)
        return self._run(x, sigma, caption, frames, frames, route)[0]

    def denoise(self, x: Tensor, sigma: Tensor, caption: Tensor, cache: RollingCache, route: str = "auto") -> Tensor:
        """v of one chunk [B, chunk, ...] given the committed past. The cache is only looked at."""
        return self._cached(x, sigma, caption, cache, route)[0]

    def commit(self, x: Tensor, caption: Tensor, cache: RollingCache, route: str = "auto", detach: bool = True) -> None:
        """Run a finished chunk once at sigma = 0 and store its rows. (The rows of the last denoising pass will not
        do: they describe a noisy input, and training only ever reads rows of clean ones.)"""
        rows = self._cached(x, x.new_zeros(x.shape[:2]), caption, cache, route, keep=True)[1]
        cache.commit(rows, detach)

    # ---- the one way it is computed ---------------------------------------------------------------------------------

    def _cached(self, x, sigma, caption, cache, route, keep=False):
        past, own = cache.positions()
        return self._run(x, sigma, caption, own, torch.cat((past, own)), route, cache=cache, keep=keep)

    def _run(self, x, sigma, caption, q_frames, k_frames, route, cache=None, mask=None, ask=0, keep=False):
        """Patchify, blocks, un-patchify. Queries stand at times q_frames, visible keys at k_frames; frames before `ask`
        are there to be looked at: in the last block they give rows and are not queries."""
        c = self.config
        if x.shape[2:] != (c.channels, c.height, c.width):
            raise ValueError(f"the model takes frames of {c.channels} x {c.height} x {c.width}, got {tuple(x.shape[2:])}")
        grid = c.height // c.patch, c.width // c.patch
        x = rearrange(x, "b f c (h p) (w q) -> b f (h w) (c p q)", p=c.patch, q=c.patch)
        x = self.embed(x) if self.place is None else self.embed(x) + self.place        # [B, F, P, E]
        rope = self.blocks[0].attention.rope
        q_table = rope.table(grid_coords(q_frames, *grid), x.dtype)
        k_table = q_table if k_frames is q_frames else rope.table(grid_coords(k_frames, *grid), x.dtype)
        time = self.time(sinusoid(sigma, 256).to(x.dtype))                             # [B, F, E]
        level = self.level(time).unflatten(-1, (6, c.dim))                             # [B, F, 6, E]
        caption = self.words(caption)                                                  # [B, M, E]
        all_rows = []
        for i, block in enumerate(self.blocks):
            see = (lambda rows: rows) if cache is None else (lambda rows, i=i: cache.peek(i, rows))
            last = i == c.layers - 1
            x, rows = block(x, level, caption, see, q_table, k_table, mask, route, ask if last else 0)
            all_rows += [rows] if keep else []             # of all layers: dense, 0.86 GB a video at the paper's size
        shift, scale = (time[:, ask:, None] + self.head_modulation).unsqueeze(3).unbind(2)
        x = self.head(modulate(F.layer_norm(x, (c.dim,)), shift, scale))
        x = rearrange(x, "b f (h w) (c p q) -> b f c (h p) (w q)", h=grid[0], c=c.channels, p=c.patch)
        return x, all_rows
