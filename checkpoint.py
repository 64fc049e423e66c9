"""Checkpoints: tensors and plain values only, written whole or not at all, read without running anything that is in them.

`read_checkpoint` takes any file of this project, `load_model` a file of weights; each says in one line what is wrong with a file that it
refuses. tests/test_cli.py feeds them damaged, foreign and hostile files.
"""

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from mla_video import Config, VideoDiT


def save_model(path: Path, model: VideoDiT, **about) -> None:
    """Weights in half precision, the config and plain facts about the training run, written whole or not at all."""
    weights = {name: value.half() for name, value in model.state_dict().items()}
    write_atomically(path, {"config": asdict(model.config), "model": weights, "about": about})


def write_atomically(path: Path, content: dict) -> None:
    """Write beside the target, then rename over it: an interrupted save never costs the file that was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".part")
    torch.save(content, scratch)
    scratch.replace(path)


def read_checkpoint(path: Path, keys: set[str]) -> dict:
    """A checkpoint's content; ValueError in one line if it is missing, cut short, not one, or lacks one of `keys`. Only
    tensors and plain values are ever unpickled: a checkpoint cannot run code."""
    if not path.is_file():
        raise ValueError(f"there is no checkpoint at {path}: train one with `python train.py`, or name another with --checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                             # torch raises half a dozen kinds for a broken file
        raise ValueError(f"{path} is not a readable checkpoint (cut short, or not written by train.py): "
                         f"{type(error).__name__}") from error
    missing = keys - set(content) if isinstance(content, dict) else keys
    if missing:
        raise ValueError(f"{path} is a torch file but not a checkpoint of this project: it lacks {', '.join(sorted(missing))}")
    return content


def build_model(path: Path, config: dict, weights: dict) -> VideoDiT:
    """The model that a checkpoint describes, in evaluation mode; ValueError in one line if weights and config disagree."""
    if not all(isinstance(part, dict) for part in (config, weights)) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{path} is not a checkpoint of this project: config and weights must be dictionaries of values and tensors")
    unknown = set(config) - set(asdict(Config()))
    if unknown:
        raise ValueError(f"{path} was written for another version: unknown settings {', '.join(sorted(unknown))}")
    with torch.device("meta"):                             # nothing is allocated before the sizes are known to match
        model = VideoDiT(Config(**config))
    expected = {name: value.shape for name, value in model.state_dict().items()}
    wrong = [name for name in expected.keys() | weights.keys()
             if name not in expected or name not in weights or expected[name] != weights[name].shape]
    if wrong:
        raise ValueError(f"{path}: the weights are of another config: {len(wrong)} tensors differ, e.g. {min(wrong)}")
    if not all(value.isfinite().all() for value in weights.values()):
        raise ValueError(f"{path} holds NaN or infinite weights: the training run that wrote it had diverged")
    model.load_state_dict({name: value.float() for name, value in weights.items()}, assign=True)
    return model.eval()


def load_model(path: str | Path) -> tuple[VideoDiT, dict]:
    """(model, facts about its training) from a file written by `save_model`."""
    content = read_checkpoint(Path(path), {"config", "model", "about"})
    return build_model(Path(path), content["config"], content["model"]), content["about"]
