"""Released weights: Wan2.1-T2V-1.3B, and models of its shape such as Self-Forcing and
Causal-Forcing, as a `VideoDiT` with dense attention.

    model = load_wan("self_forcing_dmd.pt")                            the original names
    model = load_wan("Wan2.1-T2V-1.3B-Diffusers")                      diffusers', in shards
    model = load_wan("wan.safetensors", window=9, sink=3, frames=81)   another window

Every number has its place: names and shapes must agree in both directions, or one line says
which tensor does not. Files are mapped into memory and not read, so weights are in memory once,
from the moment on at which they are used; a file must stay as it is while its model lives.

This is the only file that knows the names in other people's files. What differs besides names:
patches are a convolution there; the rows of the head are in the order (p q c), ours in (c p q);
modulation tables have an axis more. Nothing is scaled. tests/test_wan.py holds the loaded model
against outputs of diffusers' WanTransformer3DModel, and its stream against a plain restatement
of Self-Forcing's cache; no real weights have been loaded here.
"""

import json
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from engine.checkpoint import WEIGHTS, check_archive
from engine.command_line import UserError, as_user_error
from mla_video import Config, VideoDiT

# ---- names -----------------------------------------------------------------------------------

# Of this repository -> (the original, diffusers').
NAMES = {
    "embed": ("patch_embedding", "patch_embedding"),
    "words.0": ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    "words.2": ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    "time.0": ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    "time.2": ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    "level.1": ("time_projection.1", "condition_embedder.time_proj"),
    "head": ("head.head", "proj_out"),
    "head_modulation": ("head.modulation", "scale_shift_table"),
}
NAMES_IN_BLOCK = {
    "attention.W_Q": ("self_attn.q", "attn1.to_q"),
    "attention.W_K": ("self_attn.k", "attn1.to_k"),
    "attention.W_V": ("self_attn.v", "attn1.to_v"),
    "attention.W_O": ("self_attn.o", "attn1.to_out.0"),
    "attention.norm_q": ("self_attn.norm_q", "attn1.norm_q"),
    "attention.norm_k": ("self_attn.norm_k", "attn1.norm_k"),
    "caption.W_Q": ("cross_attn.q", "attn2.to_q"),
    "caption.W_K": ("cross_attn.k", "attn2.to_k"),
    "caption.W_V": ("cross_attn.v", "attn2.to_v"),
    "caption.W_O": ("cross_attn.o", "attn2.to_out.0"),
    "caption.norm_q": ("cross_attn.norm_q", "attn2.norm_q"),
    "caption.norm_k": ("cross_attn.norm_k", "attn2.norm_k"),
    "norm_caption": ("norm3", "norm2"),
    "ffn.0": ("ffn.0", "ffn.net.0.proj"),
    "ffn.2": ("ffn.2", "ffn.net.2"),
    "modulation": ("modulation", "scale_shift_table"),
}

# What wrappers put before a name: Self-Forcing's own, and those of torch's tools for training.
PREFIXES = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
SELF_FORCING = "model."

# Files of another kind, by a part of a name that only they have.
OTHERS = {
    "lora": "a LoRA: it changes a model and is none; merge it into the model's weights first",
    "img": "an image-to-video model; this program takes the text-to-video one",
    "image": "an image-to-video model; this program takes the text-to-video one",
    "add_k_proj": "an image-to-video model; this program takes the text-to-video one",
    "vace": "a VACE model; this program takes the text-to-video one",
}


def their_name(ours: str, style: int) -> str:
    """A tensor's name in such a file; style 0 is the original, 1 diffusers'."""
    before = ""
    table = NAMES
    if ours.startswith("blocks."):
        _, number, ours = ours.split(".", 2)
        before = f"blocks.{number}."
        table = NAMES_IN_BLOCK
    if ours in table:                                      # a table of modulation
        return before + table[ours][style]
    stem, ending = ours.rsplit(".", 1)                     # ending: weight or bias
    return f"{before}{table[stem][style]}.{ending}"


def plain_name(name: str) -> str:
    """A name without what wrappers put before it."""
    for prefix in PREFIXES:
        name = name.replace(prefix, "")
    return name.removeprefix(SELF_FORCING)


# ---- files -----------------------------------------------------------------------------------

def is_wan(path: str | Path) -> bool:
    """Whether `load_wan` is who should read this: a .safetensors file, a folder of them without a
    model.pt of train.py, or a .pt file that names a patch embedding. Nothing in it is run."""
    path = Path(path)
    if path.is_dir():
        if (path / "model.pt").is_file():
            return False                                   # a folder of train.py
        folder = weights_folder(path)
        return any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json"))
    if path.suffix.lower() == ".safetensors":
        return path.is_file()
    return path.is_file() and (_is_safetensors(path) or _mentions(path, b"patch_embedding"))


def weights_folder(path: Path) -> Path:
    """The folder itself, or the transformer's in a pipeline of diffusers."""
    inside = path / "transformer"
    return inside if inside.is_dir() else path


def _is_safetensors(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(10)[8:] == b'{"'      # eight bytes say how long the JSON behind them is


def _mentions(path: Path, word: bytes) -> bool:
    """Whether the pickle of a torch file holds this word. It is only looked through; what
    unfolds is not even that."""
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                stored = member.compress_type == zipfile.ZIP_STORED
                small = member.file_size <= path.stat().st_size
                if member.filename.endswith("data.pkl") and stored and small:
                    return word in archive.read(member)
    except Exception:                          # of a damaged file anything can be raised
        return False                           # `load_model` will say what is wrong with it
    return False


def files_of(path: Path) -> list[Path]:
    """The .safetensors files that a folder's index names, or all of them if it has none;
    UserError if one is missing."""
    folder = weights_folder(path)
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if not indices:
        return sorted(folder.glob("*.safetensors"))
    try:
        shards = set(json.loads(indices[0].read_text())["weight_map"].values())
        names = sorted(Path(shard).name for shard in shards)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{indices[0]} is no index of shards") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} lacks {len(missing)} of the {len(names)} files of its index, "
                        f"e.g. {missing[0][:80]}")
    return [folder / name for name in names]


def map_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of the source by the names in it, as views of the files; UserError if it
    cannot be read."""
    if path.is_dir():
        files = files_of(path)
    elif path.suffix.lower() == ".safetensors" or _is_safetensors(path):
        files = [path]
    else:
        return _map_torch_file(path)
    weights = {}
    for file in files:
        weights |= _map_safetensors(file)
    return weights


def _map_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise UserError(f"{path} needs the package safetensors: "
                        "pip install safetensors") from error
    weights = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                weights[name] = file.get_tensor(name)      # a view: nothing is read
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not a readable safetensors file (cut short or damaged?): "
                        f"{str(error)[:100]}") from error
    return weights


def _map_torch_file(path: Path) -> dict[str, Tensor]:
    """The average of the weights (`generator_ema`), or else the weights, of Self-Forcing's
    training, or a plain state_dict. Loaded without running anything, as all checkpoints are."""
    try:
        check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        # As in read_checkpoint: a broken file has a dozen ways to fail.
        why = str(error) if isinstance(error, UserError) else type(error).__name__
        raise UserError(f"{path} is not a readable checkpoint: {why}") from error
    for key in ("generator_ema", "generator"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(x, Tensor) for x in content.values()):
        raise UserError(f"{path} holds no weights by name, neither under generator_ema nor "
                        "as they are")
    if sum(value.nbytes for value in content.values()) > path.stat().st_size:
        raise UserError(f"{path} declares more numbers than the file holds")
    return content


# ---- sizes -----------------------------------------------------------------------------------

# What weights do not tell. The defaults are of the 1.3B model at 480 x 832 pixels, in latents.
FREE = dict(heads=None, height=60, width=104, frames=21, chunk=3, window=21, sink=0, slots=512)
HEADS = {1536: 12}                             # by the width of the model: Wan2.1-T2V-1.3B


def config_of(path: Path, shapes: dict[str, torch.Size], style: int, given: dict) -> Config:
    """The Config that the shapes in the file say, with what the caller says; UserError if
    either says what is no model."""
    unknown = given.keys() - FREE.keys()
    if unknown:
        raise UserError(f"{min(unknown)!r} is not for the caller to say; "
                        f"what weights do not tell is {', '.join(FREE)}")
    try:
        dim, channels, of_time, patch, _ = shapes["patch_embedding.weight"]
        text = shapes[their_name("words.0.weight", style)][1]
        ffn = shapes[their_name("blocks.0.ffn.0.weight", style)][0]
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{path} is no Wan text-to-video model: it lacks a patch embedding, "
                        f"a text embedding, or blocks; it has {example(shapes)}") from error
    if of_time != 1:
        raise UserError(f"{path} makes a patch of {of_time} frames; here it is of one")
    free = FREE | given
    heads = free.pop("heads") or HEADS.get(dim)
    if heads is None:
        raise UserError(f"{path} is not Wan's 1.3B model, of width 1536: its width is {dim} "
                        f"(Wan's 14B has 5120), and how many heads it has is not in the file; "
                        "load_wan(..., heads=N) takes it untried")
    with as_user_error():
        return Config(attention="dense", dim=dim, channels=channels, patch=patch, ffn=ffn,
                      text=text, layers=count_blocks(shapes), heads=heads, place=False,
                      bias=True, eps_rms=1e-6, eps_layer=1e-6, **free)


def count_blocks(names: Iterable[str]) -> int:
    """How many numbers stand in blocks.N."""
    return len({name.split(".")[1] for name in names if name.startswith("blocks.")})


def example(names: Iterable[str]) -> str:
    """The first of these names, short enough for a line."""
    return repr(min(names, default="nothing"))[:80]


# ---- loading ---------------------------------------------------------------------------------

def load_wan(source: str | Path, *, dtype: torch.dtype | None = None, **config) -> VideoDiT:
    """The model whose weights `source` holds, in evaluation mode.

    `source` is a .safetensors file, a folder of them, or a .pt file of Self-Forcing's kind.
    `config` says what weights do not tell: heads, height and width (of latents), frames (the
    horizon), chunk, window, sink, slots (rows of a caption). `dtype` None keeps the file's, that
    of the attention where a file has several. Nothing is copied unless it is cast. Raises
    UserError, one line, for anything else than a text-to-video model of Wan's shape.
    """
    path = Path(source)
    if not path.exists():
        raise UserError(f"there is no checkpoint at {path}")
    weights = {plain_name(name): value for name, value in map_weights(path).items()}
    refuse_others(path, weights)
    style = int(any(name.startswith("condition_embedder.") for name in weights))
    shapes = {name: value.shape for name, value in weights.items()}
    settings = config_of(path, shapes, style, config)
    with torch.device("meta"):                             # allocates nothing
        model = VideoDiT(settings)
    expected = model.state_dict()
    theirs = {their_name(name, style): name for name in expected}
    check_names(path, shapes, theirs)
    dtype = dtype or weights[their_name("blocks.0.attention.W_Q.weight", style)].dtype
    ours = {}
    for their, name in theirs.items():
        value = as_ours(path, their, name, weights.pop(their), expected[name].shape, settings)
        ours[name] = checked(path, their, value).to(dtype)
    model.load_state_dict(ours, assign=True)
    return model.eval().requires_grad_(False)


def refuse_others(path: Path, names: Iterable[str]) -> None:
    """UserError if a name tells that this is a file of another kind."""
    for name in names:
        for part, kind in OTHERS.items():
            if part in name.lower():
                raise UserError(f"{path} is {kind} ({name[:80]} has no place)")


def check_names(path: Path, found: Iterable[str], expected: Iterable[str]) -> None:
    """UserError for a tensor too many or too few."""
    found = set(found)
    expected = set(expected)
    over = found - expected
    if over:
        raise UserError(f"{path} is no Wan text-to-video model: {len(over)} of its "
                        f"{len(found)} tensors have no place, e.g. {example(over)}")
    missing = expected - found
    if missing:
        raise UserError(f"{path} is a part of a model: it lacks {len(missing)} of "
                        f"{len(expected)} tensors, e.g. {example(missing)}")


def checked(path: Path, name: str, value: Tensor) -> Tensor:
    """The tensor, if it can be computed with; UserError if not."""
    if value.dtype not in WEIGHTS:
        kinds = ", ".join(str(dtype) for dtype in WEIGHTS)
        raise UserError(f"{path}: {name} is of type {value.dtype}; expected {kinds}")
    if not value.isfinite().all():
        raise UserError(f"{path}: {name} holds NaN or infinite numbers")
    return value


def as_ours(path: Path, their: str, name: str, value: Tensor, shape: torch.Size,
            c: Config) -> Tensor:
    """A tensor of theirs in our layout, of this `shape`; UserError if it is of another size."""
    wanted = shape
    if name == "embed.weight":                             # a convolution over patches
        wanted = c.dim, c.channels, 1, c.patch, c.patch
    if name.endswith("modulation"):
        wanted = 1, *shape
    if value.shape != wanted:
        raise UserError(f"{path}: {their} is {list(value.shape)}, and the model's other "
                        f"tensors say {list(wanted)}")
    if name.startswith("head."):
        return rearrange(value, "(p q c) ... -> (c p q) ...", p=c.patch, q=c.patch)
    return value.reshape(shape)
