"""Checkpoints: tensors and plain values alone, written whole or not at all, and read without
running anything that is in them.

`write_atomically` survives a kill, a full disk and a power cut at any moment. `read_checkpoint`
takes any file of this project, `load_model` a file of weights. Before a byte is believed, three
questions are asked:

    is it what was written?     the checksums hold
    can it grow?                nothing is compressed, and nothing is counted twice
    can it act?                 its pickle names nothing but tensors

A file that is refused gives a `UserError`, one line that says what is wrong with it.
tests/test_hostile.py and test_forged.py bring damaged and hostile files, tests/test_robust.py
kills and full disks.
"""

import os
import pickletools
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from engine.command_line import UserError
from engine.homogeneous import config_of, model_of
from mla_video import Config, VideoDiT

# All that the pickle of a checkpoint may name. torch.load(weights_only=True) allows more, among
# it bytearray, and bytearray(10**12) is a bomb.
STORAGES = ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Bool", "Byte")
NAMES = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"}
NAMES |= {f"torch {kind}Storage" for kind in STORAGES}

PLAIN = (dict, OrderedDict, list, tuple, Tensor, str, int, float, bool, type(None))
WEIGHTS = (torch.float32, torch.float16, torch.bfloat16)


# ---- writing ---------------------------------------------------------------------------------

def save_model(path: Path, model: VideoDiT, **about) -> None:
    """Write weights in half precision, the config, and plain facts about the training run."""
    weights = {name: value.half() for name, value in model.state_dict().items()}
    write_atomically(path, {"config": asdict(model.config), "model": weights, "about": about})


def previous(path: Path) -> Path:
    """Where `write_atomically(path, ..., keep=True)` leaves the save before: train.prev.pt."""
    return path.with_name(f"{path.stem}.prev{path.suffix}")


def write_atomically(path: Path, content: dict, keep: bool = False) -> None:
    """Write beside the target and rename over it: whatever happens, what was there stays until
    the new file is whole *on the disk*. OSError if it cannot be written.

    Tensors are written as a CPU's, wherever they are: a plain torch.load opens the file on any
    machine.
    With `keep` the file that was there becomes `previous(path)`. Between the two renames that
    is the only one, and `read_last_good` finds it.
    """
    content = _on_cpu(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".part")
    try:
        with open(scratch, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())                # the bytes first, and then the name
    except (OSError, RuntimeError) as error:
        scratch.unlink(missing_ok=True)            # half a file on a full disk helps nobody
        why = error.__context__ or error           # torch hides the disk's own words
        raise OSError(f"{path} could not be written ({why}); "
                      "what was there before is untouched") from error
    if keep and path.exists():
        path.replace(previous(path))
    scratch.replace(path)
    if os.name == "posix":
        _sync_folder(path.parent)


def _on_cpu(part):
    """The same tensors and values, all in the memory of the CPU."""
    if isinstance(part, Tensor):
        return part.cpu()
    if isinstance(part, dict):
        return {key: _on_cpu(value) for key, value in part.items()}
    if isinstance(part, (list, tuple)):
        return type(part)(_on_cpu(value) for value in part)
    return part


def _sync_folder(path: Path) -> None:
    """A folder is a file too: without this a rename in it may not outlast a power cut."""
    folder = os.open(path, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


# ---- reading ---------------------------------------------------------------------------------

def read_checkpoint(path: Path, keys: set[str]) -> dict:
    """The content of a checkpoint; UserError if it is missing, of another kind, damaged, or
    lacks one of `keys`."""
    if not path.is_file():
        raise UserError(f"there is no checkpoint at {path}: train one with `python train.py`")
    _check_kind(path)
    try:
        content = _load(path)
    except Exception as error:
        # For a broken file zipfile, pickle and torch raise a dozen kinds, of which the name
        # says enough. `check_archive` says what it found.
        why = type(error).__name__
        if isinstance(error, UserError):
            why = str(error)
        raise UserError(f"{path} is not a readable checkpoint (cut short, damaged, "
                        f"or not written by train.py): {why}") from error
    found = set()
    if isinstance(content, dict):
        found = set(content)
    missing = keys - found
    if missing and {"step", "recipe"} <= found:
        raise UserError(f"{path} is a training state, from which `python train.py --resume` goes "
                        f"on; the weights to play are in {path.with_name('model.pt')} when a "
                        "stage has ended")
    if missing:
        lacks = ", ".join(sorted(missing))
        raise UserError(f"{path} is a torch file but not a checkpoint of this project: "
                        f"it lacks {lacks}")
    _check_content(path, content)
    return content


def read_last_good(path: Path, keys: set[str]) -> dict:
    """`read_checkpoint`, or else the save before it, said aloud: steps are lost."""
    try:
        return read_checkpoint(path, keys)
    except UserError as error:
        before = previous(path)
        if not before.exists():
            raise
        content = read_checkpoint(before, keys)
        print(f"warning: {error}; going on from the save before it, {before}", file=sys.stderr)
        return content


def _check_kind(path: Path) -> None:
    """UserError for files that are no torch files, but known."""
    with open(path, "rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a pointer of Git LFS, and the file itself has not been "
                        "downloaded: `git lfs pull` fetches it")
    # Eight bytes say how long the JSON is that follows them.
    if path.suffix.lower() == ".safetensors" or start[8:10] == b'{"':
        raise UserError(f"{path} is a safetensors file, as other projects write them; sample.py "
                        "takes one of Wan's shape, and here a model.pt of train.py is needed")


def _load(path: Path):
    with warnings.catch_warnings():                # one line says what is wrong, and not two
        warnings.simplefilter("ignore")
        check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)


def check_archive(path: Path) -> None:
    """Before torch opens it: nothing in the zip can unfold, every checksum holds, and every
    name that its pickle mentions is known."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        compressed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
        declared = sum(member.file_size for member in members)
        if compressed or declared > path.stat().st_size:
            raise UserError("it is compressed, or declares more than the file holds")
        broken = archive.testzip()
        if broken:
            raise UserError(f"the checksum of {broken!r} is wrong")
        for member in members:
            if member.filename.endswith(".pkl"):
                _check_pickle(archive.read(member))


def _check_pickle(code: bytes) -> None:
    for opcode, argument, _ in pickletools.genops(code):
        if opcode.name == "PROTO" and argument != 2:
            raise UserError(f"its pickle is of version {argument}")
        if opcode.name == "GLOBAL" and argument not in NAMES:
            raise UserError(f"it names {argument!r}, which is no tensor of a kind "
                            "that training writes")


def _check_content(path: Path, content: dict) -> None:
    """Everything is a plain tensor or a plain value, finite, and the whole is no larger than
    the file. (Views of one stored number, of stride 0, or a list that holds itself ten times
    over, take no room until somebody copies or prints them.)"""
    foreign = f"{path} is not a checkpoint of this project"
    room = path.stat().st_size
    waiting = [content]
    while waiting:
        part = waiting.pop()
        if not _is_plain(part):
            raise UserError(f"{foreign}: it holds more than tensors and plain values")
        if isinstance(part, Tensor):
            room -= part.nbytes
            if room >= 0 and part.is_floating_point() and not part.isfinite().all():
                raise UserError(f"{path} holds NaN or infinite numbers: "
                                "the training run that wrote it had diverged")
        elif isinstance(part, dict):
            room -= len(part)
            waiting += part.values()
        elif isinstance(part, (list, tuple)):
            room -= len(part)
            waiting += part
        if room < 0:
            raise UserError(f"{foreign}: it declares more numbers than the file holds")


def _is_plain(part) -> bool:
    """Exactly a tensor, a number, a word or a collection with plain keys; no subclass."""
    if type(part) not in PLAIN:
        return False
    if isinstance(part, dict) and any(type(key) not in (str, int) for key in part):
        return False
    if type(part) is OrderedDict:
        # A state_dict carries `_metadata`. Any other attribute may stand in for a method.
        return vars(part).keys() <= {"_metadata"}
    return True


# ---- models ----------------------------------------------------------------------------------

def find_model(path: Path) -> Path:
    """The file at `path`, or model.pt in the folder there; UserError if there is none."""
    if not path.is_dir():
        return path
    if (path / "model.pt").is_file():
        return path / "model.pt"
    names = {file.name for file in path.iterdir()}
    if names & {"model_index.json", "config.json", "transformer"}:
        raise UserError(f"{path} is a folder of weights as Hugging Face keeps them; this project "
                        "plays the model.pt that its train.py writes")
    if "train.pt" in names:
        raise UserError(f"{path} has no model.pt yet, only a training state: a stage writes it "
                        "at its end")
    raise UserError(f"there is no checkpoint model.pt in the folder {path}")


def load_model(path: str | Path) -> tuple[VideoDiT, dict]:
    """(model, facts about its training) from a file that `save_model` wrote, or from model.pt
    in a folder."""
    path = find_model(Path(path))
    content = read_checkpoint(path, {"config", "model", "about"})
    about = content["about"]
    collections = (dict, list, tuple, Tensor)
    if not isinstance(about, dict) or any(isinstance(x, collections) for x in about.values()):
        raise UserError(f"{path} is not a checkpoint of this project: "
                        "its facts about the training run must be names and plain values")
    return build_model(path, content["config"], content["model"]), about


def build_model(path: Path, config: dict, weights: dict[str, Tensor]) -> VideoDiT:
    """The model that a checkpoint describes, in evaluation mode; UserError if its weights and
    its config disagree."""
    if not isinstance(config, dict) or not isinstance(weights, dict):
        raise UserError(f"{path} is not a checkpoint of this project: "
                        "config and weights must be dictionaries of values and tensors")
    config = _read_config(path, config)
    if config.layers > len(weights):
        # Asked first: a million layers take an hour to build, even without their memory.
        raise UserError(f"{path}: the weights are of another config: "
                        f"{config.layers} layers of {len(weights)} tensors")
    with torch.device("meta"):                     # allocates nothing: the sizes may not match
        model = model_of(config)
    check_weights(path, weights, model.state_dict())
    single = {name: value.float() for name, value in weights.items()}
    model.load_state_dict(single, assign=True)
    return model.eval()


def _read_config(path: Path, settings: dict) -> Config:
    unknown = settings.keys() - asdict(Config()).keys()
    if unknown:
        names = ", ".join(sorted(map(repr, unknown)))
        raise UserError(f"{path} was written for another version: "
                        f"unknown settings {names[:200]}")
    try:
        return config_of(settings)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} describes no model: {str(error)[:200]}") from error


def _all_tensors(values: Iterable) -> bool:
    return all(isinstance(value, Tensor) for value in values)


def check_weights(path: Path, weights: dict, expected: dict[str, Tensor]) -> None:
    """UserError unless `weights` has the names and shapes of `expected`, in a type that
    training writes."""
    if not isinstance(weights, dict) or not _all_tensors(weights.values()):
        raise UserError(f"{path} is not a checkpoint of this project: "
                        "weights must be a dictionary of tensors")
    wrong = expected.keys() ^ weights.keys()
    for name in expected.keys() & weights.keys():
        if expected[name].shape != weights[name].shape:
            wrong.add(name)
    if wrong:
        example = min(repr(name) for name in wrong)
        raise UserError(f"{path}: the weights are of another config: "
                        f"{len(wrong)} tensors differ, e.g. {example[:80]}")
    odd = {str(value.dtype) for value in weights.values() if value.dtype not in WEIGHTS}
    if odd:
        raise UserError(f"{path} holds weights of type {', '.join(sorted(odd))}; "
                        f"expected {', '.join(map(str, WEIGHTS))}")
