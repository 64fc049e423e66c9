"""Clips as latents with rows of text, for a model of Wan's shape: train.py's --data when it names a
.safetensors file.

    latents   [clips, frames, channels, h, w]   of a VAE, as the model takes them: normalised
    text      [clips, rows, width]              of the model's text encoder, one caption a clip
    negative  [rows, width]                     optional: what "no caption" is

Nothing is read but the clips of a batch. A clip is drawn, each as often as any other, and its
first frames are taken: the first latent frame of Wan's VAE is of one picture, all later ones are
of four, so a clip must begin where its video began. Captions are filled up with rows of zeros,
Wan's rule. With `negative` a share of the captions is that, and no zeros are drawn any more.
tests/test_latent_clips.py.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.clips import fingerprint_of_files, name_of
from engine.command_line import UserError
from mla_video import Config

ENDING = ".safetensors"
AXES = {"latents": "[clips, frames, channels, h, w]", "text": "[clips, rows, width]",
        "negative": "[rows, width]"}
FLOATS = ("F32", "F16", "BF16")
DROP = 0.1                             # share of captions that are the negative one

# Learning rates for released weights: the paper's, of AdamW. Muon's moves a weight as far: its
# update is orthogonal, so an entry is 1 / sqrt(1536) of the rate, and one of AdamW's about 0.2.
RECIPE = dict(batch=2, lr_adamw=5e-6, lr_muon=4e-5)


def are_latents(data: str) -> bool:
    """Whether --data names a file of this kind."""
    return Path(data).suffix.lower() == ENDING


@contextmanager
def opened(path: Path) -> Iterator:
    """The file, of which only the header has been read; UserError if it cannot be."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise UserError(f"{path} needs the package safetensors: "
                        "pip install safetensors") from error
    if not path.is_file():
        raise UserError(f"there is no file {path}; --data names latents with rows of text")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file (cut short or damaged?): "
                        f"{str(error)[:100]}") from error


def shapes_of(path: Path) -> dict[str, list[int]]:
    """The shape of each tensor of such a file; UserError for a file of another kind."""
    with opened(path) as file:
        names = set(file.keys())
        if not {"latents", "text"} <= names <= set(AXES):
            raise UserError(f"{path} must hold latents and text, and may hold negative; it holds "
                            f"{', '.join(sorted(names))[:80] or 'nothing'}")
        shapes = {}
        for name in sorted(names):
            part = file.get_slice(name)
            shape = part.get_shape()
            fits = len(shape) == AXES[name].count(",") + 1 and min(shape, default=0) > 0
            if not fits or part.get_dtype() not in FLOATS:
                raise UserError(f"{name} in {path} must be numbers {AXES[name]}; it is "
                                f"{part.get_dtype()} {shape}")
            shapes[name] = shape
    clips = shapes["latents"][0]
    if shapes["text"][0] != clips:
        raise UserError(f"{path} has {clips} clips and {shapes['text'][0]} captions")
    return shapes


class Latents:
    """The clips of a file for a model of this config: a world, as train.py takes them.

    UserError if the file does not fit the model. `fingerprint`, `reads` and `recipe` (what the
    recipe is to be here) are as of any world.
    """

    vocabulary = None           # captions are rows of text, not words
    whole = 1                   # frames of a clip that shows what it is about

    def __init__(self, path: Path, config: Config, seed: int):
        shapes = shapes_of(path)
        clips, frames, *of_frame = shapes["latents"]
        rows, width = shapes["text"][1:]
        self.path = path
        self.name = name_of(path)
        self.frames = config.frames
        self.slots = config.slots
        self.seed = seed
        self.clips = clips
        self.negative = "negative" in shapes
        self.recipe = dict(RECIPE)
        if self.negative:
            self.recipe["drop"] = 0.0                      # it is dropped here
        self.fingerprint = fingerprint_of_files([path], "latents")
        self.reads = (f"{path.name}: {clips} clips of {frames} latent frames of "
                      f"{' x '.join(map(str, of_frame))}; captions of {rows} rows")

        taken = [config.channels, config.height, config.width]
        self.need("frames are", of_frame, taken)
        self.need("rows of text are as wide as", width, config.text)
        if "negative" in shapes:
            self.need("negative rows are as wide as", shapes["negative"][1], config.text)
            rows = max(rows, shapes["negative"][0])
        if frames < self.frames:
            chunks = frames // config.chunk
            better = f"--config frames={chunks * config.chunk}" if chunks else "give longer ones"
            raise UserError(f"{path} has clips of {frames} latent frames, and the model is to be "
                            f"trained on {self.frames}: {better}")
        if rows > self.slots:
            raise UserError(f"{path} has captions of {rows} rows, and the model takes "
                            f"{self.slots}: --config slots={rows}")

    def need(self, what: str, mine, models) -> None:
        if mine != models:
            raise UserError(f"{self.path}: its {what} {mine}, and the model's {models}")

    def batch(self, indices: Iterable[int]) -> tuple[Tensor, Tensor]:
        """(float32 [B, F, channels, h, w], float32 rows [B, slots, width]), a function of the
        seed and the indices alone. UserError for a clip with NaN or infinite numbers."""
        videos = []
        captions = []
        with opened(self.path) as file:
            latents = file.get_slice("latents")
            text = file.get_slice("text")
            for index in indices:
                clip, negative = self.draw(index)
                video = latents[clip:clip + 1, :self.frames][0].float()
                rows = text[clip:clip + 1][0].float()
                if negative:
                    rows = file.get_tensor("negative").float()
                if not (video.isfinite().all() and rows.isfinite().all()):
                    raise UserError(f"clip {clip} in {self.path} holds NaN or infinite numbers")
                videos.append(video)
                captions.append(self.padded(rows))
        return torch.stack(videos), torch.stack(captions)

    def clip(self, index: int) -> tuple[Tensor, Tensor]:
        video, rows = self.batch([index])
        return video[0], rows[0]

    def draw(self, index: int) -> tuple[int, bool]:
        """(number of the clip, whether its caption is the negative one) of index `index`."""
        rng = np.random.default_rng((self.seed, int(index)))
        clip = int(rng.integers(self.clips))
        return clip, self.negative and rng.random() < DROP

    def padded(self, rows: Tensor) -> Tensor:
        """Rows [S, width] -> [slots, width]."""
        return F.pad(rows, (0, 0, 0, self.slots - len(rows)))

    def first_captions(self) -> dict[str, Tensor]:
        """The rows of the first clip, and the negative ones, as sample.py's --text takes them."""
        with opened(self.path) as file:
            found = {"prompt_embeds": file.get_slice("text")[:1].float()}
            if self.negative:
                found["negative_prompt_embeds"] = file.get_tensor("negative").float()[None]
        return found
