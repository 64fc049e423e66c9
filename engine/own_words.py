"""The captions of your own clips, and their words. tests/test_own_words.py.

    clips.npz     with an array `captions`, one for each clip
    clips.npy     beside clips.txt, one line for each clip
    folder/       beside folder.txt, one line for each clip
    folder/       a.gif a.txt b.gif b.txt: a text file beside each clip file, a line for a clip

A caption is any words in any number; an empty one asks for nothing. The words are learned from
the captions: word i of a `Vocabulary` has id i + 1, and 0 is "no word", as in toy_data.py. A
checkpoint carries them in its facts, so sample.py takes these words and no others.
"""

import re
from pathlib import Path

import numpy as np
import torch

from engine.command_line import UserError

MOST_WORDS = 10_000            # different ones, in a file
LONGEST = 64                   # words of a caption


def spoken(text: str) -> list[str]:
    """The words of a caption, in small letters, without what stands between them."""
    return [word for word in re.split(r"[\s,.;:!?\"()]+", text.lower()) if word]


class Vocabulary:
    """Words that a model has seen, and how many a caption has at most (`slots`, S)."""

    def __init__(self, words: list[str], slots: int):
        self.words = words
        self.slots = slots
        self.ids = {word: number for number, word in enumerate(words, start=1)}

    def encode(self, text: str) -> torch.Tensor:
        """LongTensor [S] of ids in the order of the words, then zeros. ValueError, one line, for
        a word that was never seen and for too many words."""
        words = spoken(text)
        for word in words:
            if word not in self.ids:
                raise ValueError(f"unknown word {word!r} in caption {text!r}; this model has "
                                 f"seen: {' '.join(self.words)[:500]}")
        if len(words) > self.slots:
            raise ValueError(f"caption {text!r} has {len(words)} words; this model takes "
                             f"{self.slots} at most")
        ids = [self.ids[word] for word in words]
        return torch.tensor(ids + [0] * (self.slots - len(ids)), dtype=torch.long)

    def decode(self, ids) -> str:
        """Inverse of `encode`; "" for the null caption."""
        return " ".join(self.words[int(number) - 1] for number in ids if number)


def vocabulary_of(about: dict, slots: int) -> Vocabulary | None:
    """Of a checkpoint's facts; None for a model whose words are those of toy_data.py."""
    words = about.get("words")
    return Vocabulary(str(words).split(), slots) if words else None


def learn_words(path: Path, captions: list[str]) -> Vocabulary:
    """The words of these captions, in the order of the alphabet; UserError if there are none,
    or more than a model takes."""
    said = [spoken(caption) for caption in captions]
    words = sorted({word for caption in said for word in caption})
    slots = max(len(caption) for caption in said)
    if not words:
        raise UserError(f"{path}: its captions have no words")
    if len(words) > MOST_WORDS or slots > LONGEST:
        raise UserError(f"{path}: its captions have {len(words):,} different words, and up to "
                        f"{slots} in one; at most {MOST_WORDS:,} and {LONGEST} are learned")
    return Vocabulary(words, slots)


# ---- where they stand ------------------------------------------------------------------------

def read_captions(path: Path, files: list[Path], counts: list[int]) -> list[str]:
    """A caption for each clip of `path`, whose `files` hold so many (`counts`) that are long
    enough to be used; [] if there are none.

    UserError, one line, for another number of captions than of clips, for captions in two
    places, and for a text that is none.
    """
    sources = []                                           # (whose they are, captions)
    whole = path.resolve()                                 # "." has no name
    beside = whole.parent / f"{whole.name}.txt"
    if path.is_file():
        beside = whole.with_suffix(".txt")
    if beside.is_file():
        sources.append((beside, lines_of(beside, sum(counts))))
    inside = captions_inside(path, files, counts)
    if inside:
        sources.append((path, inside))
    if len(sources) > 1:
        raise UserError(f"{path} has captions, and so has {beside}: keep one of them")
    return sources[0][1] if sources else []


def captions_inside(path: Path, files: list[Path], counts: list[int]) -> list[str]:
    """Of .npz files that have `captions`, or of a text beside each file of a folder."""
    found = []
    without = []
    captions = []
    for file, count in zip(files, counts):
        own = None
        if file.suffix.lower() == ".npz":
            own = captions_of_archive(file, count)
        if own is None and file != path and file.with_suffix(".txt").is_file():
            own = lines_of(file.with_suffix(".txt"), count)
        if own is None:
            without.append(file)
        else:
            found.append(file)
            captions += own
    if found and without:
        raise UserError(f"{found[0]} has captions and {without[0]} has none: give all of them "
                        "captions, or none")
    return captions


def lines_of(path: Path, count: int) -> list[str]:
    """The lines of a text file; an empty one is a caption, too, but for those at the end."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as captions: {error}") from None
    while len(lines) > count and not lines[-1].strip():
        lines.pop()
    return checked(path, lines, count)


def captions_of_archive(path: Path, count: int) -> list[str] | None:
    with np.load(path, allow_pickle=False) as archive:
        if "captions" not in archive.files:
            return None
        try:
            captions = archive["captions"]
        except ValueError:                                 # Python objects are not loaded
            raise UserError(f"{path}: captions must be an array of strings") from None
    if captions.dtype.kind != "U" or captions.ndim != 1:
        raise UserError(f"{path}: captions must be one string for each clip, not "
                        f"{captions.dtype} {list(captions.shape)}")
    return checked(path, captions.tolist(), count)


def checked(path: Path, captions: list[str], count: int) -> list[str]:
    if len(captions) != count:
        raise UserError(f"{path} has {len(captions):,} captions, and there are {count:,} clips "
                        "that are long enough")
    return captions
