"""Your own clips as a world: windows that are drawn at random from your files.

`open_world` takes the name of a built-in world, or the path of a file or folder:
engine/clip_files.py says of which kinds. engine/layouts.py finds out what the axes of an array
mean, engine/pixel_values.py what its numbers mean, and engine/framing.py makes frames square.

Letters: F frames of a window, C channels (1 grey, 3 RGB), h, w pixels as kept.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch

from engine.clip_files import ARRAYS, Reader, Stack, clip_files, pictures_of
from engine.command_line import UserError
from engine.framing import Framing
from engine.layouts import check_layout, several
from engine.own_words import learn_words, read_captions
from engine.parallel import say
from toy_data import CAPTION_SLOTS, WORLDS, Clips, make_world

BLOCK = 2**20                              # bytes; of a large file 64 are hashed
BLOCKS = 64
HELD_OUT = 10                              # of so many clips one is held out,
ENOUGH = 40                                # if there are so many


# A damaged header overflows before it is refused: one line says so, not two.
@np.errstate(all="ignore")
def open_world(data: str, frames: int = 12, size: int = 16, seed: int = 0,
               layout: str | None = None, border: bool = False) -> Clips:
    """The built-in world called `data`, or the clips in the file or folder of that path.

    Its clips have `frames` frames of `size` x `size` pixels. `layout` names the axes of an
    array, e.g. "NTHW"; with `border` frames are kept whole instead of cut to a square.
    What looks wrong, and may be meant, is printed as a line "warning: ...". FileNotFoundError,
    ValueError or ModuleNotFoundError, one line each, says what is wrong and what would be right.
    """
    if data in WORLDS:
        if layout or border:
            raise UserError(f"--layout and --border are for clips of your own, and {data} is a "
                            "world of this program")
        world = make_world(data, frames, size, seed)
        world.fingerprint = fingerprint(world)
        return world
    path = Path(data)
    if not data or not path.exists():
        names = ", ".join(WORLDS)
        raise FileNotFoundError(f"no world and no file called {str(data)!r}; "
                                f"give {names} or a path to your clips")
    world = Stored(path, frames, size, seed, layout, border)
    for warning in world.warnings:
        say(f"warning: {warning}")
    return world


class Stored(Clips):
    """Windows of F frames from a user's clips, with the captions that lie beside them.

    A clip is drawn, each as often as any other, and then a window in it. Of 40 clips and more
    every tenth is held out: it is never drawn, and `to_judge` takes it. `fingerprint` tells
    these clips from others, `reads` says what is in the file and how it is read, and
    `warnings` are lines about what looks wrong.
    """

    def __init__(self, path: Path, frames: int, size: int, seed: int,
                 layout: str | None = None, border: bool = False):
        super().__init__(name_of(path), frames, size, seed)
        self.framing = Framing(size, border)
        if layout:
            layout = check_layout(layout)
        files = clip_files(path)
        if layout and files[0].suffix.lower() not in ARRAYS:
            raise UserError(f"{path}: --layout is for arrays; the axes of pictures are known")

        reader = Reader(self.framing, frames, layout)
        self.stacks = reader.read(files)
        self.warnings = reader.warnings() + reader.values.warnings()
        self.warnings += self.framing.warnings([stack.size for stack in self.stacks])
        self.scale = reader.values.scale()
        layouts = {stack.layout for stack in self.stacks}
        self.fingerprint = fingerprint_of_files(files, f"{sorted(layouts)} {border}")

        self.places = []                   # of each clip: its stack, and its number there
        for stack in self.stacks:
            for number in range(len(stack.clips)):
                self.places.append((stack, number))
        self.read_words(path)
        self.held_out = []                 # numbers of clips
        if len(self.places) >= ENOUGH:
            self.held_out = list(range(HELD_OUT - 1, len(self.places), HELD_OUT))
        held = set(self.held_out)
        self.drawn = [clip for clip in range(len(self.places)) if clip not in held]
        self.reads = "; ".join(self.in_words(path, reader.values.in_words()))

    def read_words(self, path: Path) -> None:
        """Captions, if there are any: their words, and four to show."""
        self.said = []
        counts = [len(stack.clips) for stack in self.stacks]
        files = [stack.path for stack in self.stacks]      # a short clip's is left out
        captions = read_captions(path, files, counts)
        if not captions:
            return
        self.vocabulary = learn_words(path, captions)
        self.said = [self.vocabulary.encode(caption) for caption in captions]
        distinct = list(dict.fromkeys(self.vocabulary.decode(ids) for ids in self.said))
        self.prompts = tuple((distinct * 4)[:4])
        spoken = " | ".join(captions).encode()
        digest = hashlib.blake2b(self.fingerprint.encode() + spoken, digest_size=8)
        self.fingerprint = digest.hexdigest()

    def encode(self, text: str) -> torch.Tensor:
        """As Clips, in the words of these clips if they have any."""
        return self.vocabulary.encode(text) if self.vocabulary else super().encode(text)

    def batch(self, indices):
        windows = []
        captions = []
        for index in indices:
            clip, first = self.draw(index)
            windows.append(self.window(clip, first))
            captions.append(self.caption(clip))
        return torch.stack(windows), torch.stack(captions)

    def draw(self, index: int) -> tuple[int, int]:
        """(number of the clip, first frame) of window `index`."""
        return self.draw_from(self.drawn, index)

    def draw_from(self, clips: list[int], index: int) -> tuple[int, int]:
        rng = np.random.default_rng((self.seed, int(index)))
        clip = clips[int(rng.integers(len(clips)))]
        stack, _ = self.places[clip]
        length = stack.clips.shape[1]
        first = int(rng.integers(length - self.frames + 1))
        return clip, first

    def to_judge(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """So many windows and their captions, of clips that are held out if any are."""
        windows = []
        captions = []
        for index in range(2**31, 2**31 + count):
            clip, first = self.draw_from(self.held_out or self.drawn, index)
            windows.append(self.window(clip, first))
            captions.append(self.caption(clip))
        return torch.stack(windows), torch.stack(captions)

    def window(self, clip: int, first: int) -> torch.Tensor:
        """The window of a clip from frame `first` on: float32 [F, 3, size, size] in [-1, 1]."""
        stack, number = self.places[clip]
        stored = stack.clips[number, first:first + self.frames]
        # Nothing changes here unless the clips were too large to be scaled when they were read.
        stored = self.framing.scale(stored)                # [F, h, w, C]
        pixels = torch.from_numpy(stored.astype(np.float32))   # a copy of this window alone
        video = pixels.permute(0, 3, 1, 2)                 # [F, C, h, w]
        video = video * self.scale.gain + self.scale.offset
        video = video.clamp(-1, 1).expand(-1, 3, -1, -1)
        return self.framing.add_border(video)

    def caption(self, clip: int) -> torch.Tensor:
        """The caption of a clip [S]; the null caption without any."""
        if self.said:
            return self.said[clip]
        return torch.zeros(CAPTION_SLOTS, dtype=torch.long)

    # -- in words

    def in_words(self, path: Path, values: str) -> list[str]:
        """The parts of `reads`."""
        said = [f"{path.name or self.name}: {what_it_holds(self.stacks)}", values]
        channels = {stack.clips.shape[-1] for stack in self.stacks}
        if channels == {1}:
            said.append("grey -> 3 equal channels")
        sizes = sorted({stack.size for stack in self.stacks})
        words = self.framing.in_words(*sizes[0])
        if len(sizes) > 1:
            words = f"each resized to {self.size}x{self.size}"
            if self.framing.border:
                words += " in a black border"
            elif any(height != width for height, width in sizes):
                words = f"the centre of {words}"
        if words:
            said.append(words)
        if self.vocabulary:
            said.append(f"captions of {len(self.vocabulary.words):,} different words, "
                        f"up to {self.vocabulary.slots} in one")
        if self.held_out:
            said.append(f"{len(self.held_out)} clips held out, to judge by")
        return said


def name_of(path: Path) -> str:
    """The file's name, and never that of a built-in world."""
    name = path.resolve().name
    return f"./{name}" if name in WORLDS else name


def what_it_holds(stacks: list[Stack]) -> str:
    """For instance "3 files, 3 clips of 20 to 64 frames of 640x272 at 12.5 a second"."""
    said = ""
    if len(stacks) > 1:
        kind = "folders" if stacks[0].path.is_dir() else "files"
        said = f"{len(stacks):,} {kind}; "
    if stacks[0].stored:
        said += f"{stacks[0].stored}; "
    clips = sum(len(stack.clips) for stack in stacks)
    lengths = from_to({stack.clips.shape[1] for stack in stacks})
    said += f"{several(clips, 'clip')} of {lengths} frames"
    sizes = sorted({stack.size for stack in stacks})       # [(H, W)]
    shown = [f"{width}x{height}" for height, width in (sizes[0], sizes[-1])]
    said += " of " + " to ".join(dict.fromkeys(shown))
    rates = set()
    for stack in stacks:
        rates.update(stack.rates)
    if rates:
        said += f" at {from_to(rates)} a second"
    return said


def from_to(numbers: set) -> str:
    """"20", or "20 to 64"."""
    ends = [f"{number:.4g}" for number in (min(numbers), max(numbers))]
    return " to ".join(dict.fromkeys(ends))


# ---- which data is it? -----------------------------------------------------------------------

def fingerprint(world: Clips) -> str:
    """A short hash that is the same for the same data, whatever its file is called."""
    if hasattr(world, "fingerprint"):
        return world.fingerprint
    what = f"{world.name} {world.frames} {world.size}"
    return hashlib.blake2b(what.encode(), digest_size=8).hexdigest()


def fingerprint_of_files(files: list[Path], reading: str) -> str:
    """The hash of the files' content, in their order, and of how they are read.

    A file's bytes hold shape and dtype too. Of a file above 64 MiB its length and 64 evenly
    spaced blocks of 1 MiB count, the first and the last among them: what is changed between
    those is not noticed.
    """
    digest = hashlib.blake2b(reading.encode(), digest_size=8)
    for path in files:
        parts = pictures_of(path) if path.is_dir() else [path]
        for part in parts:
            add_content(digest, part)
    return digest.hexdigest()


def add_content(digest, path: Path) -> None:
    length = path.stat().st_size
    digest.update(length.to_bytes(8, "little"))
    with open(path, "rb") as file:
        if length <= BLOCKS * BLOCK:
            digest.update(file.read())
            return
        for block in range(BLOCKS):
            file.seek(block * (length - BLOCK) // (BLOCKS - 1))
            digest.update(file.read(BLOCK))
