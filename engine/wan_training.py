"""Released weights become VideoMLA and learn on, on latents with rows of text:

    python train.py --from-dense wan.safetensors --data latents.safetensors

What train.py does otherwise for such a run stands here: its sizes, its start, its sample. Sizes
come from the weights (engine/wan.py), from the latents (engine/latent_clips.py), and from
--config for what neither tells. Every dense layer becomes MLA in homogeneous coordinates, with
its norms and biases (engine/homogeneous.py); where it is cut, the inputs on clips of the file
decide, or with --conversion weights the weights alone. Stage tf makes a bidirectional model
causal; cd starts from a causal one. A real score of rows is not trained here, so neither is dmd.
What is inside a block is made again in the backward pass (engine/trainer.py: recompute).
tests/test_latent_clips.py.
"""

import argparse
import shlex
from dataclasses import asdict, replace
from pathlib import Path

import torch

from engine.checkpoint import load_model
from engine.command_line import UserError, as_user_error, pick_device
from engine.convert import moments_of_weights, moments_on
from engine.homogeneous import HomogeneousConfig, HomogeneousDiT, config_of, replace_attention
from engine.latent_clips import Latents, shapes_of
from engine.latents import LATENTS, LatentWriter
from engine.parallel import my_device
from engine.progress import watched
from engine.trainer import Resumable
from engine.wan import FREE, is_wan, load_wan
from flow import SAMPLERS, Stream, VideoDraws, rollout
from mla_video import PRESETS, Config, VideoDiT

STAGES = ("tf", "cd")
NAMES = ("heads", "frames", "chunk", "window", "sink", "slots", "latent", "rope")
OF_PIXELS = ("preset", "layout", "border", "curve", "score")
TOKENS = 2**13                         # clean ones, that tell the second moment of a layer's inputs


# ---- sizes -----------------------------------------------------------------------------------

def config_for(args: argparse.Namespace, state: dict | None) -> Config:
    """The sizes of a run on latents: of train.pt, of the weights of --from-dense, or in stage
    cd of what it starts from. UserError for flags and files that do not go together."""
    check_flags(args)
    sizes = read_sizes(args.config)
    if state is not None:
        try:
            return replace(config_of(state["config"]), **sizes)
        except (TypeError, ValueError) as error:
            raise UserError(f"the sizes in train.pt are of no model: {str(error)[:200]}") from error
    if args.from_dense:
        return config_of_dense(args, sizes)
    start = Path(args.start or Path(args.out) / "tf.pt")
    if args.stage != "cd" or not start.is_file():
        raise UserError(f"{args.data} holds latents, for a model of Wan's shape: name its weights "
                        "with --from-dense (stage cd may start from such a model of stage tf)")
    model, _ = load_model(start)
    with as_user_error():
        return replace(model.config, **sizes)


def check_flags(args: argparse.Namespace) -> None:
    """UserError for flags that such a run has no use for."""
    strange = [name for name in OF_PIXELS if name in args.given]
    if strange:
        raise UserError(f"--{strange[0]} is for models of pixels; {args.data} holds latents")
    if args.attention == "dense":
        raise UserError("released weights are dense already; --from-dense makes MLA of them")
    if args.stage not in STAGES:
        raise UserError(f"on latents there are the stages {' and '.join(STAGES)}: what --stage "
                        f"{args.stage} needs, a score model of rows of text, is not trained here")


def read_sizes(items: list[str]) -> dict[str, int]:
    """The NAME=N of --config; UserError for anything else."""
    sizes = {}
    for item in items:
        name, _, value = item.partition("=")
        if name not in NAMES or not value.isdigit():
            raise UserError(f"with released weights --config takes NAME=N with one of "
                            f"{', '.join(NAMES)}; got {item!r}")
        sizes[name] = int(value)
    return sizes


def config_of_dense(args: argparse.Namespace, sizes: dict[str, int]) -> HomogeneousConfig:
    """What the released weights of --from-dense become, by default at the paper's widths, for
    latents of the size in the file of --data and a window of the whole clip."""
    if not is_wan(args.from_dense):
        raise UserError(f"--from-dense {args.from_dense} holds no released weights of Wan's shape, "
                        f"and {args.data} holds latents for such")
    paper = PRESETS["wan1.3b"]
    mine = {"latent": paper.latent, "rope": paper.rope, **sizes}
    _, _, _, height, width = shapes_of(Path(args.data))["latents"]
    free = {name: value for name, value in sizes.items() if name in FREE}
    free.setdefault("window", sizes.get("frames", FREE["frames"]))
    dense = load_wan(args.from_dense, height=height, width=width, **free).config
    settings = {**asdict(dense), "attention": "homogeneous"}
    for name in ("latent", "rope"):
        settings[name] = mine[name]
    with as_user_error():
        return HomogeneousConfig(**settings)


# ---- the start -------------------------------------------------------------------------------

def load_dense(args: argparse.Namespace, config: Config) -> VideoDiT:
    """The released weights, in float32; UserError if they are not what `config` is made of."""
    free = {name: getattr(config, name) for name in FREE}
    dense = load_wan(args.from_dense, **free).float()
    alike = {**asdict(config), "attention": "dense", "latent": dense.config.latent,
             "rope": dense.config.rope}
    if asdict(dense.config) != alike:
        raise UserError(f"{args.from_dense} has other sizes than this run: its config is "
                        f"{dense.config}")
    return dense


def become_mla(args: argparse.Namespace, config: Config, world: Latents) -> HomogeneousDiT:
    """The model of `config` that the weights of --from-dense become."""
    dense = load_dense(args, config)
    if args.conversion == "weights":
        moments = moments_of_weights(dense)
    else:
        device = pick_device(my_device(args.device))
        clips = -(-TOKENS // (config.frames * config.tokens))
        video, captions = world.batch(range(min(32, clips)))
        dense.to(device)
        moments = moments_on(dense, video.to(device), captions.to(device), args.seed)
        dense.cpu()
    return replace_attention(dense, config.latent - 1, config.rope, moments)


# ---- the end ---------------------------------------------------------------------------------

@torch.no_grad()
def write_sample(trainer: Resumable, out: Path) -> str:
    """One video of latents, twice as long as a training clip, in sample.safetensors, with the
    caption of the first clip, whose rows go to text.safetensors; the command that makes more."""
    from safetensors.torch import save_file

    found = trainer.world.first_captions()
    text = out / f"text{LATENTS}"
    save_file(found, text)
    captions = trainer.world.padded(found["prompt_embeds"][0])[None]
    frames = 2 * trainer.model.config.frames
    how = SAMPLERS[trainer.recipe.stage]
    draws = VideoDraws(trainer.recipe.seed, 1)
    made = rollout(Stream(trainer.ema, captions), frames, draws, **how)
    writer = LatentWriter(out / f"sample{LATENTS}")
    for chunk in watched(made, f"writing {writer.path.name}, latent frames", frames):
        writer.append(chunk)
    long = shlex.quote(str(out / f"long{LATENTS}"))
    return f"--text {shlex.quote(str(text))} --frames {10 * frames} --out {long}"
