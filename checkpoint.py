"""Checkpoints: tensors and plain values only, written whole or not at all, read without running anything that is in them.

`write_atomically` survives a kill, a full disk and a power cut at any moment; `read_checkpoint` takes any file of this project and
`load_model` a file of weights; each says in one line what is wrong with a file that it refuses. Three questions are asked before a byte is
believed: is it what was written (checksums), can it grow (nothing compressed, nothing counted twice), can it act (which names its
pickle may mention). tests/test_hostile.py feeds them damaged and hostile files, tests/test_robust.py kills and full disks.
"""

import os
import pickletools
import sys
import warnings
import zipfile
from collections import OrderedDict
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from mla_video import Config, VideoDiT

# All that a checkpoint's pickle may name. torch.load(weights_only=True) allows more, e.g. bytearray, and bytearray(10**12) is a bomb.
NAMES = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"} | {
    f"torch {kind}Storage" for kind in ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Bool", "Byte")}
WEIGHTS = (torch.float32, torch.float16, torch.bfloat16)


# ---- writing --------------------------------------------------------------------------------------------------------

def save_model(path: Path, model: VideoDiT, **about) -> None:
    """Weights in half precision, the config and plain facts about the training run, written whole or not at all."""
    weights = {name: value.half() for name, value in model.state_dict().items()}
    write_atomically(path, {"config": asdict(model.config), "model": weights, "about": about})


def previous(path: Path) -> Path:
    """Where `write_atomically(path, ..., keep=True)` leaves the save before: train.pt -> train.prev.pt."""
    return path.with_name(f"{path.stem}.prev{path.suffix}")


def write_atomically(path: Path, content: dict, keep: bool = False) -> None:
    """Write beside the target and rename over it: whatever happens, what was there stays until the new file is whole *on the disk*.
    (A rename alone is not enough: after a power cut the new name may stand before the new bytes do, hence fsync.) With `keep`
    the file that was there becomes `previous(path)`; between the two renames it is the only one, and `read_last_good` finds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".part")
    try:
        with open(scratch, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:               # torch hides the disk's own words behind a RuntimeError
        scratch.unlink(missing_ok=True)                    # half a file on a full disk helps nobody
        raise OSError(f"{path} could not be written ({error.__context__ or error}); what was there before is untouched") from error
    if keep and path.exists():
        path.replace(previous(path))
    scratch.replace(path)
    if os.name == "posix":                                 # the folder is a file too: without this the rename may not last
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


# ---- reading --------------------------------------------------------------------------------------------------------

def read_checkpoint(path: Path, keys: set[str]) -> dict:
    """A checkpoint's content; ValueError in one line if it is missing, damaged, not one, or lacks one of `keys`."""
    if not path.is_file():
        raise ValueError(f"there is no checkpoint at {path}: train one with `python train.py`, or name another with --checkpoint")
    try:
        with warnings.catch_warnings():                    # one line says what is wrong, and not two
            warnings.simplefilter("ignore")
            _check_archive(path)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                             # zipfile, pickle and torch raise a dozen kinds for a broken file
        why = str(error) if type(error) is ValueError else type(error).__name__
        raise ValueError(f"{path} is not a readable checkpoint (cut short, damaged, or not written by train.py): {why}") from error
    missing = keys - set(content) if isinstance(content, dict) else keys
    if missing:
        raise ValueError(f"{path} is a torch file but not a checkpoint of this project: it lacks {', '.join(sorted(missing))}")
    _check_content(path, content)
    return content


def read_last_good(path: Path, keys: set[str]) -> dict:
    """`read_checkpoint`, or else the save before it, said aloud: steps are lost."""
    try:
        return read_checkpoint(path, keys)
    except ValueError as error:
        if not previous(path).exists():
            raise
        content = read_checkpoint(previous(path), keys)
        print(f"warning: {error}; going on from the save before it, {previous(path)}", file=sys.stderr)
        return content


def _check_archive(path: Path) -> None:
    """Before torch opens it: nothing in the zip can unfold, every checksum holds, every name that its pickle mentions is known."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members) or \
                sum(member.file_size for member in members) > path.stat().st_size:
            raise ValueError("it is compressed, or declares more than the file holds")
        if broken := archive.testzip():
            raise ValueError(f"the checksum of {broken!r} is wrong")
        for member in members:
            if member.filename.endswith(".pkl"):
                for opcode, argument, _ in pickletools.genops(archive.read(member)):
                    if opcode.name == "PROTO" and argument != 2:
                        raise ValueError(f"its pickle is of version {argument}")
                    if opcode.name == "GLOBAL" and argument not in NAMES:
                        raise ValueError(f"it names {argument!r}, which is no tensor of a kind that training writes")


def _check_content(path: Path, content: dict) -> None:
    """Everything is a plain tensor or a plain value, finite, and the whole is no larger than the file. Views of one stored number
    (stride 0), or a list that holds itself ten times over, take no room until somebody copies or prints them."""
    room, todo = path.stat().st_size, [content]
    while todo:
        part = todo.pop()
        if type(part) not in (dict, OrderedDict, list, tuple, Tensor, str, int, float, bool, type(None)) or \
                isinstance(part, dict) and not all(type(key) in (str, int) for key in part) or \
                type(part) is OrderedDict and vars(part).keys() - {"_metadata"}:       # an attribute may stand for a method
            raise ValueError(f"{path} is not a checkpoint of this project: it holds more than tensors and plain values")
        children = part.values() if isinstance(part, dict) else part if type(part) in (list, tuple) else ()
        room -= part.nbytes if type(part) is Tensor else len(children)
        if room < 0:
            raise ValueError(f"{path} is not a checkpoint of this project: it declares more numbers than the file holds")
        if type(part) is Tensor and part.is_floating_point() and not part.isfinite().all():
            raise ValueError(f"{path} holds NaN or infinite numbers: the training run that wrote it had diverged")
        todo += children


def check_weights(path: Path, weights: dict, expected: dict[str, Tensor]) -> None:
    """ValueError in one line unless `weights` has the names and shapes of `expected`, in a type that training writes."""
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{path} is not a checkpoint of this project: weights must be a dictionary of tensors")
    wrong = [name for name in expected.keys() | weights.keys()
             if name not in expected or name not in weights or expected[name].shape != weights[name].shape]
    if wrong:
        raise ValueError(f"{path}: the weights are of another config: {len(wrong)} tensors differ, e.g. {min(map(repr, wrong))[:80]}")
    odd = {str(value.dtype) for value in weights.values() if value.dtype not in WEIGHTS}
    if odd:
        raise ValueError(f"{path} holds weights of type {', '.join(sorted(odd))}; expected {', '.join(map(str, WEIGHTS))}")


def build_model(path: Path, config: dict, weights: dict) -> VideoDiT:
    """The model that a checkpoint describes, in evaluation mode; ValueError in one line if weights and config disagree."""
    if not isinstance(config, dict) or not isinstance(weights, dict):
        raise ValueError(f"{path} is not a checkpoint of this project: config and weights must be dictionaries of values and tensors")
    unknown = [name for name in config if name not in asdict(Config())]
    if unknown:
        raise ValueError(f"{path} was written for another version: unknown settings {', '.join(sorted(map(repr, unknown)))[:200]}")
    try:
        config = Config(**config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} describes no model: {str(error)[:200]}") from error
    if config.layers > len(weights):                       # building a million layers takes an hour even without their memory
        raise ValueError(f"{path}: the weights are of another config: {config.layers} layers of {len(weights)} tensors")
    with torch.device("meta"):                             # nothing is allocated before the sizes are known to match
        model = VideoDiT(config)
    check_weights(path, weights, model.state_dict())
    model.load_state_dict({name: value.float() for name, value in weights.items()}, assign=True)
    return model.eval()


def load_model(path: str | Path) -> tuple[VideoDiT, dict]:
    """(model, facts about its training) from a file written by `save_model`."""
    content = read_checkpoint(Path(path), {"config", "model", "about"})
    about = content["about"]
    if not isinstance(about, dict) or any(isinstance(fact, (dict, list, tuple, Tensor)) for fact in about.values()):
        raise ValueError(f"{path} is not a checkpoint of this project: its facts about the training run must be names and plain values")
    return build_model(Path(path), content["config"], content["model"]), about
