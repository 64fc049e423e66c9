"""A causal video diffusion transformer, shaped like Wan and small. Its self-attention is MLA or
dense; nothing else differs between the two.

Video is made chunk by chunk. A chunk starts as noise and is denoised in a few passes, while it
looks back at a cache of the chunks before it (`denoise`). When it is clean, one more pass at
noise level 0 leaves its rows in the cache (`commit`).

Training makes all chunks of a clip in one pass (`forward`). That is possible because the past
of every chunk is known: it is the true clip. So the sequence is the clip twice, once clean and
once noisy; a noisy chunk looks at the clean chunks before it and at itself ("teacher forcing").
For a clip of three chunks, `x` marks who may look at whom:

                         clean keys        noisy keys
                         0   1   2         0   1   2
    clean queries  0     x   .   .         .   .   .       a clean chunk sees the clean chunks
                   1     x   x   .         .   .   .       before it and itself, as in `commit`
                   2     x   x   x         .   .   .
    noisy queries  0     .   .   .         x   .   .       a noisy chunk sees the clean chunks
                   1     x   .   .         .   x   .       before it and itself, as in `denoise`
                   2     x   x   .         .   .   x

Letters: B batch, F frames, P tokens per frame, L tokens of this call, S words of a caption, E
model width; more in attention.py. Reading order: Config, allowed, Block, VideoDiT.
tests/test_streaming.py proves that both ways of running give the same numbers.
"""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from attention import MLA, RMS_EPS, Dense, Route, attend_cheaper, attend_materialised
from cache import RollingCache, Rows
from rope3d import Rope3D, Table, grid_coords


@dataclass(frozen=True)
class Config:
    """Every size of the model. Defaults are the `toy` preset, in the paper's proportions: C =
    E/8, Q = E/2, R = d_h/4. Raises ValueError for sizes that do not go together."""

    attention: str = "mla"             # or "dense"
    dim: int = 128                     # E
    layers: int = 5
    heads: int = 4                     # H
    latent: int = 16                   # C
    query_latent: int = 64             # Q
    rope: int = 8                      # R; the rest of a head is content, N = d_h - R
    ffn: int = 512                     # width inside the feed-forward network
    channels: int = 3                  # of a pixel
    height: int = 16                   # pixels
    width: int = 16
    patch: int = 4                     # a token is a patch of 4 x 4 pixels
    words: int = 32                    # caption vocabulary; word 0 means "not said"
    slots: int = 3                     # S, words of a caption
    frames: int = 12                   # of a training clip
    horizon: int = 0                   # no time is beyond (cache.py); 0: the clip's frames
    chunk: int = 3                     # frames made together
    window: int = 12                   # frames seen, the sink and the chunk itself included
    sink: int = 0                      # first frames that are never forgotten
    norm: bool = True                  # RMSNorm of the latents; in dense attention of q and k
    place: bool = True                 # a learned vector for each place in the frame
    bias: bool = False                 # in the projections of dense attention, as in Wan
    text: int = 0                      # width of a text encoder's rows as captions; 0: words
    eps_rms: float = RMS_EPS           # of the RMSNorms
    eps_layer: float = 1e-5            # of the LayerNorms

    def __post_init__(self):
        check_sizes(self)

    @property
    def tokens(self) -> int:
        """P, tokens per frame."""
        return (self.height // self.patch) * (self.width // self.patch)

    def make_rope(self) -> Rope3D:
        """MLA rotates R channels, the fastest of each axis; dense attention the whole head."""
        head = self.dim // self.heads
        return Rope3D(self.rope if self.attention == "mla" else head, head)


def allowed(q_frame: Tensor, q_noisy: Tensor, k_frame: Tensor, k_noisy: Tensor,
            config: Config) -> Tensor:
    """Who may look at whom in the teacher-forced sequence: bool; the arguments broadcast.

    A token is given by its frame and by whether it is of the noisy half. This is the one
    definition of causality, the picture above with a window:

        query \\ key     clean, chunk b                        noisy, chunk b
        clean, chunk a   b <= a, in the window or a sink       never
        noisy, chunk a   b <  a, in the window or a sink       b = a

    With <= for < a noisy chunk would read its own answer. The window is the cache's: the last
    window - chunk - sink frames before the chunk.
    """
    a = q_frame // config.chunk
    b = k_frame // config.chunk
    ring = config.window - config.chunk - config.sink
    recent = k_frame >= a * config.chunk - ring
    sink = k_frame < config.sink
    past = (b < a) & (recent | sink)
    own = (b == a) & (q_noisy == k_noisy)                  # clean sees clean, noisy sees noisy
    return own | (past & ~k_noisy)


def sinusoid(sigma: Tensor, width: int) -> Tensor:
    """Noise levels sigma [...] as features [..., width]: cosines, then sines, of 1000 * sigma
    at geometric frequencies; in float32 at least. sigma = 0 is clean and sigma = 1 is noise."""
    dtype = torch.promote_types(sigma.dtype, torch.float32)
    half = width // 2
    band = torch.arange(half, device=sigma.device, dtype=dtype) / half
    omega = torch.exp(-math.log(10_000) * band)                            # [width / 2]
    angle = 1000 * sigma[..., None].to(dtype) * omega
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


def modulate(x: Tensor, offset: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm of x [B, F, P, E], then a scale and an offset per frame, each [B, F, 1, E]."""
    normed = F.layer_norm(x.to(scale.dtype), x.shape[-1:], eps=eps)
    return torch.addcmul(offset, normed, 1 + scale).to(x.dtype)    # offset + normed (1 + scale)


class Block(nn.Module):
    """Wan's block. The noise level steers it: scale, offset and gate depend on each frame's.

        x ---- norm, scale, offset ---- self-attention to past and chunk ---- * gate ---- + x
        x ---- norm ------------------- cross-attention to the caption ------------------ + x
        x ---- norm, scale, offset ---- feed-forward network ---------------- * gate ---- + x

    In a new VideoDiT gates and the caption's W_O are zero: its blocks are the identity.
    """

    def __init__(self, config: Config):
        super().__init__()
        E = config.dim
        H = config.heads
        d = E // H
        rope = config.make_rope()
        norm = config.norm
        if config.attention == "mla":
            self.attention = MLA(E, H, config.latent, config.query_latent, N=d - config.rope,
                                 V=d, rope=rope, norm=norm, eps=config.eps_rms)
        else:
            self.attention = Dense(E, H, rope, norm, config.bias, config.eps_rms)
        self.caption = Dense(E, H, None, norm, config.bias, config.eps_rms)
        self.ffn = nn.Sequential(nn.Linear(E, config.ffn), nn.GELU(approximate="tanh"),
                                 nn.Linear(config.ffn, E))
        self.eps = config.eps_layer
        self.norm_caption = nn.LayerNorm(E, self.eps)
        self.modulation = nn.Parameter(torch.zeros(6, E))

    def forward(self, x: Tensor, level: Tensor, caption: Tensor, q_table: Table, k_table: Table,
                *, cache: RollingCache | None = None, layer: int = 0,
                mask: Tensor | None = None, attend: Route = attend_cheaper,
                answer_from: int = 0) -> tuple[Tensor, Rows]:
        """x [B, F, P, E] one block further, and the rows that its tokens leave.

        level [B, F, 6, E]: six numbers per frame and channel made of sigma (`enter`); caption
        [B, S, E]. With a `cache` (or whatever has its verb `peek`) the tokens see what it keeps
        for `layer` and themselves; without one they see each other, as `mask` [L, L] allows.
        Frames before `answer_from` are only looked at: their rows are made, but they ask
        nothing, and their x is not returned.
        """
        steer = (level + self.modulation)[:, :, :, None]                   # [B, F, 6, 1, E]
        offset, scale = steer[:, :, :2].unbind(2)                          # [B, F, 1, E] each
        h = modulate(x, offset, scale, self.eps).flatten(1, 2)             # [B, L, E]
        rows = self.attention.rows(h)
        visible = rows if cache is None else cache.peek(layer, rows)

        if answer_from:
            first = answer_from * x.shape[2]                               # its first token
            x = x[:, answer_from:]
            steer = steer[:, answer_from:]
            h = h[:, first:]
            q_table = (q_table[0][first:], q_table[1][first:])
            if mask is not None:
                mask = mask[first:]

        gate, ffn_offset, ffn_scale, ffn_gate = steer[:, :, 2:].unbind(2)
        o = self.attention(h, visible, q_table, k_table, mask, attend)
        x = torch.addcmul(x, gate, o.view_as(x)).to(x.dtype)               # x + gate * o

        # No mask: a word that is not said is word 0, whose embedding says so; a text row, zeros.
        o = self.caption(self.norm_caption(x).flatten(1, 2), self.caption.rows(caption))
        x = x + o.view_as(x)

        o = self.ffn(modulate(x, ffn_offset, ffn_scale, self.eps))
        x = torch.addcmul(x, ffn_gate, o).to(x.dtype)                      # x + ffn_gate * o
        return x, rows


class VideoDiT(nn.Module):
    """v(x, sigma | past, caption): the velocity eps - x0 of flow matching (flow.py), for every
    frame of a chunk or of a clip.

    Video is [B, F, channels, height, width]; sigma [B, F] in [0, 1]; caption LongTensor [B, S],
    or rows of a text encoder [B, S, text].
    `attend` says by which route MLA is computed (attention.py); the answer is the same. Over
    whole clips the default is to materialise, as in the paper's training; in a stream it is the
    cheaper one.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        E = config.dim
        pixels = config.channels * config.patch**2
        self.embed = nn.Linear(pixels, E)
        # RoPE tells a token how far others are, not where it stands itself. In our toy worlds,
        # where shapes bounce off the edges of a black frame, no token of black could know where
        # an edge is. This vector says where in the frame, never which frame, so what is cached
        # still has no place in time. (Wan has no such vector.)
        self.place = nn.Parameter(torch.zeros(config.tokens, E)) if config.place else None
        if config.text:
            self.words = nn.Sequential(nn.Linear(config.text, E), nn.GELU(approximate="tanh"),
                                       nn.Linear(E, E))
        else:
            self.words = nn.Embedding(config.words, E)
        self.time = nn.Sequential(nn.Linear(256, E), nn.SiLU(), nn.Linear(E, E))   # of sigma
        # Wan's economy: one projection of the noise level to 6 E numbers serves all blocks. A
        # block owns no more than an offset to it (`Block.modulation`).
        self.level = nn.Sequential(nn.SiLU(), nn.Linear(E, 6 * E))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head_modulation = nn.Parameter(torch.zeros(2, E))
        self.head = nn.Linear(E, pixels)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Random projections, and zeros where the model must start silent."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    module.bias.zero_()
        if not self.config.text:
            nn.init.normal_(self.words.weight, std=1.0)
        self.level[1].weight.zero_()                      # gates are 0: blocks are the identity
        self.head.weight.zero_()                           # the first prediction is v = 0
        for block in self.blocks:
            block.caption.W_O.weight.zero_()

    def make_cache(self, batch: int, dtype: torch.dtype | None = None,
                   device=None) -> RollingCache:
        """An empty cache for `batch` videos; by default in the model's dtype, on its device."""
        c = self.config
        weight = self.embed.weight
        return RollingCache(c.layers, batch, self.blocks[0].attention.widths, tokens=c.tokens,
                            chunk=c.chunk, window=c.window, sink=c.sink,
                            horizon=c.horizon or c.frames, device=device or weight.device,
                            dtype=dtype or weight.dtype)

    # ---- the ways to run it ------------------------------------------------------------------

    def forward(self, clean: Tensor, noisy: Tensor, sigma: Tensor, caption: Tensor,
                attend: Route = attend_materialised) -> Tensor:
        """Teacher forcing: v of the `noisy` clip, each chunk given the `clean` ones before.

        The clean half runs at sigma = 0 and at the same positions, so its rows are those that
        `commit` would have left. Nobody asks for its answer, so the last block gives none.
        """
        frames = clean.shape[1]
        frame = torch.arange(frames, device=clean.device).repeat(2)        # [2 F]
        is_noisy = torch.arange(2 * frames, device=clean.device) >= frames
        mask = allowed(frame[:, None], is_noisy[:, None], frame, is_noisy, self.config)
        P = self.config.tokens
        mask = mask.repeat_interleave(P, 0).repeat_interleave(P, 1)       # [2 F P, 2 F P]

        video = torch.cat((clean, noisy), dim=1)                           # [B, 2 F, ...]
        sigma = torch.cat((torch.zeros_like(sigma), sigma), dim=1)         # [B, 2 F]
        x, sigma_emb, level, words = self.enter(video, sigma, caption)
        table = self._table(frame, x.dtype)
        for block in self.blocks:
            last = block is self.blocks[-1]
            x, _ = block(x, level, words, table, table, mask=mask, attend=attend,
                         answer_from=frames if last else 0)
        return self.leave(x, sigma_emb[:, frames:])

    def bidirectional(self, video: Tensor, sigma: Tensor, caption: Tensor,
                      attend: Route = attend_materialised) -> Tensor:
        """v of a whole clip in which every frame sees every other.

        It judges whole videos in training (objectives.py: the stages score and dmd).
        """
        frame = torch.arange(video.shape[1], device=video.device)
        x, sigma_emb, level, words = self.enter(video, sigma, caption)
        table = self._table(frame, x.dtype)
        for block in self.blocks:
            x, _ = block(x, level, words, table, table, attend=attend)
        return self.leave(x, sigma_emb)

    def denoise(self, chunk: Tensor, sigma: Tensor, caption: Tensor, cache: RollingCache,
                attend: Route = attend_cheaper) -> Tensor:
        """v of one chunk given the past that `cache` keeps. The cache is only looked at."""
        x, sigma_emb, level, words = self.enter(chunk, sigma, caption)
        q_table, k_table = self.tables(cache, x.dtype)
        for layer, block in enumerate(self.blocks):
            x, _ = block(x, level, words, q_table, k_table, cache=cache, layer=layer,
                         attend=attend)
        return self.leave(x, sigma_emb)

    def commit(self, chunk: Tensor, caption: Tensor, cache: RollingCache,
               attend: Route = attend_cheaper, detach: bool = True) -> None:
        """Run a finished chunk once at sigma = 0 and keep its rows.

        The rows of the last denoising pass will not do. They describe a noisy input, and
        training only ever reads rows of clean ones.
        """
        sigma = chunk.new_zeros(chunk.shape[:2])
        x, _, level, words = self.enter(chunk, sigma, caption)
        q_table, k_table = self.tables(cache, x.dtype)
        rows_of_layers = []
        for layer, block in enumerate(self.blocks):
            x, rows = block(x, level, words, q_table, k_table, cache=cache, layer=layer,
                            attend=attend)
            rows_of_layers.append(rows)
        cache.commit(rows_of_layers, detach)

    # ---- what all of them begin and end with -------------------------------------------------

    def enter(self, video: Tensor, sigma: Tensor, caption: Tensor):
        """Tokens x [B, F, P, E]; the noise level as sigma_emb [B, F, E] and level [B, F, 6, E];
        the caption's words [B, S, E]."""
        c = self.config
        if video.shape[2:] != (c.channels, c.height, c.width):
            raise ValueError(f"the model takes frames of {c.channels} x {c.height} x "
                             f"{c.width}, got {tuple(video.shape[2:])}")
        if sigma.shape != video.shape[:2]:
            raise ValueError("sigma has a noise level for each frame, "
                             f"{tuple(video.shape[:2])}; got {tuple(sigma.shape)}")
        expected = len(video), c.slots
        if c.text:
            expected = *expected, c.text
        if caption.shape != expected:
            raise ValueError(f"a caption is {c.slots} words for each of {len(video)} videos, or "
                             f"as many rows: {expected}; got {tuple(caption.shape)}")
        patches = rearrange(video, "b f c (h p) (w q) -> b f (h w) (c p q)",
                            p=c.patch, q=c.patch)
        x = self.embed(patches)                                            # [B, F, P, E]
        if self.place is not None:
            x = x + self.place
        sigma_emb = self.time(sinusoid(sigma, 256).to(x.dtype))            # [B, F, E]
        level = self.level(sigma_emb).unflatten(-1, (6, c.dim))            # [B, F, 6, E]
        fine = torch.promote_types(x.dtype, torch.float32)     # 1 + scale in bfloat16 is coarse
        return x, sigma_emb.to(fine), level.to(fine), self.words(caption)

    def tables(self, cache: RollingCache, dtype: torch.dtype) -> tuple[Table, Table]:
        """Rotations of the tokens of the chunk being made, and of all that it may look at."""
        past, own = cache.positions()
        return self._table(own, dtype), self._table(torch.cat((past, own)), dtype)

    def _table(self, frame: Tensor, dtype: torch.dtype) -> Table:
        """Rotations of all tokens of the frames at times `frame` [F]."""
        c = self.config
        coords = grid_coords(frame, c.height // c.patch, c.width // c.patch)
        return self.blocks[0].attention.rope.table(coords, dtype)

    def leave(self, x: Tensor, sigma_emb: Tensor) -> Tensor:
        """x [B, F, P, E] to a video of velocities [B, F, channels, height, width]."""
        c = self.config
        # As in Wan, offset and scale of the head share one embedding, without a projection.
        steer = sigma_emb[:, :, None] + self.head_modulation               # [B, F, 2, E]
        offset, scale = steer[:, :, :, None].unbind(2)                     # [B, F, 1, E] each
        patches = self.head(modulate(x, offset, scale, c.eps_layer))
        return rearrange(patches, "b f (h w) (c p q) -> b f c (h p) (w q)",
                         h=c.height // c.patch, p=c.patch, q=c.patch)


# ---- which sizes go together, and three sets that do ----------------------------------------

def check_sizes(c: Config) -> None:
    """ValueError in one line for a Config that describes no model.

    Sizes come from files and flags, so they are refused before anything is allocated.
    """
    switches = ("norm", "place", "bias")
    for name, value in asdict(c).items():
        got = f"got {str(value)[:40]!r}"
        if name in switches:
            need(value in (True, False), f"{name} must be True or False, {got}")
        elif name.startswith("eps"):
            need(type(value) is float and 0 < value < 1,
                 f"{name} must be a number between 0 and 1, {got}")
        elif name not in ("attention", "sink"):
            least = int(name not in ("text", "horizon"))
            top = 1024 if name == "layers" else 2**20
            need(type(value) is int and least <= value <= top,
                 f"{name} must be an integer, {least} to {top}, {got}")
    need(c.attention in ("mla", "dense"),
         f"attention must be 'mla' or 'dense', got {str(c.attention)[:40]!r}")
    need(c.dim % c.heads == 0, f"{c.heads} heads do not divide a width of {c.dim}")
    need(c.height % c.patch == 0 and c.width % c.patch == 0,
         f"patches of {c.patch} do not divide {c.height} x {c.width} pixels; "
         "give a size that is a multiple")
    need(c.frames % c.chunk == 0, f"{c.frames} frames are not whole chunks of {c.chunk}")
    head = c.dim // c.heads
    need(c.attention == "dense" or c.rope < head,
         f"{c.rope} rope channels leave no content channel in a head of {head}")
    need(type(c.sink) is int and c.sink >= 0, f"sink must be 0 frames or more, got {c.sink!r}")
    need(c.window >= c.sink + c.chunk,
         f"a window of {c.window} frames cannot hold {c.sink} sink frames and a chunk of "
         f"{c.chunk}: it must be at least {c.sink + c.chunk}")
    need(c.window <= c.frames,
         f"a window of {c.window} frames is longer than the {c.frames} frames of a training "
         "clip: nothing would have trained those positions")
    need(c.horizon == 0 or c.horizon >= c.window,
         f"a horizon of {c.horizon} frames is shorter than the window of {c.window}")
    pixels = c.frames * c.channels * c.height * c.width
    need(c.frames * c.tokens <= 2**19 and pixels <= 2**27,
         f"a clip of {c.frames} x {c.height} x {c.width} pixels in patches of {c.patch} is "
         "more than a clip of this program")
    c.make_rope()                                          # raises for an impossible rope split


def need(ok: bool, message: str) -> None:
    """ValueError with `message` unless `ok`."""
    if not ok:
        raise ValueError(message)


PRESETS = {
    "toy": Config(),
    "small": Config(dim=384, layers=8, heads=6, latent=48, query_latent=192, rope=16, ffn=1536,
                    height=32, width=32),
    # Wan2.1-T2V-1.3B with the paper's latents. 832 x 480 pixels are 104 x 60 after Wan's VAE;
    # in patches of 2 that makes 52 x 30 tokens a frame.
    "wan1.3b": Config(dim=1536, layers=30, heads=12, latent=192, query_latent=768, rope=32,
                      ffn=8960, channels=16, height=60, width=104, patch=2, slots=512,
                      frames=21, window=21, sink=1, place=False, bias=True, text=4096,
                      eps_rms=1e-6, eps_layer=1e-6),
}
