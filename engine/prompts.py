"""Prompts: which caption each video has from which frame on. tests/test_prompts.py.

    "fast red disc"         a video
    "48: blue square"       changes the caption of the video before it, from frame 48 on; a word
                            that it leaves out (here the speed) stays
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from toy_data import check_words, encode_caption, fill_in


# A caption as ids [S]: of toy_data, or of a model that has words of its own.
Encode = Callable[[str], Tensor]


class Change(NamedTuple):
    """A video is told a caption [S] from a frame on. `prompt` is how it was typed."""
    frame: int
    video: int
    caption: Tensor
    prompt: str


def read_changes(prompts: list[str], encode: Encode = encode_caption) -> list[Change]:
    """What the prompts say, in their order; each video has a first one, at frame 0. ValueError
    for a word that is none, or a change that has no video before it."""
    changes = []
    video = -1
    for prompt in prompts:
        parts = re.fullmatch(r"(?:\s*(\d+)\s*:)?(.*)", prompt, re.DOTALL)
        frame, text = parts.groups()               # "48: blue" gives "48" and " blue"
        if frame is None:
            video += 1
        elif video < 0:
            raise ValueError(f"prompt {prompt!r} changes the caption of the video before it, "
                             "and there is none: give a prompt without a frame first")
        changes.append(Change(int(frame or 0), video, encode(text), prompt))
    return changes


def read_prompts(prompts: list[str], encode: Encode = encode_caption) -> dict[int, Tensor]:
    """{frame: captions [B, S] from there on}, beginning with frame 0. ValueError as above."""
    changes = read_changes(prompts, encode)
    videos = changes[-1].video + 1
    now = torch.zeros(videos, len(changes[0].caption), dtype=torch.long)
    schedule = {0: now}
    for change in sorted(changes, key=lambda change: change.frame):
        now = now.clone()
        now[change.video] = change.caption
        schedule[change.frame] = now
    return schedule


def complete(schedule: dict[int, Tensor], data: str, seed: int) -> dict[int, Tensor]:
    """The same, with all words: those that a first caption leaves out are drawn
    (`toy_data.fill_in`), video i's by (seed, i), and those that a later one leaves out stay. The
    null caption stays one. ValueError for a word that a model of the world `data` has never
    seen. (A model with words of its own is told captions as they are typed: which of its words
    could take another's place is not known.)"""
    completed = {}
    now = None
    for frame, captions in sorted(schedule.items()):
        filled = []
        for video, caption in enumerate(captions):
            check_words(caption, data)
            if now is not None and caption.any():
                caption = torch.where(caption == 0, now[video], caption)
            filled.append(fill_in(caption, data, seed + video))
        now = completed[frame] = torch.stack(filled)
    return completed


def captions_at(frame: int, schedule: dict[int, Tensor]) -> Tensor:
    """The latest captions that begin at `frame` or before."""
    latest = max(start for start in schedule if start <= frame)
    return schedule[latest]


def never_shown(prompts: list[str], chunk: int, frames: int,
                encode: Encode = encode_caption) -> list[str]:
    """A line for each prompt that no chunk will be made under; `frames` 0 has no end.

    A chunk is made under the captions of its first frame, so a change waits for the next one.
    """
    lines = []
    last_at = {}                                   # what comes last for a video and a chunk
    changes = read_changes(prompts, encode)
    for change in sorted(changes, key=lambda change: change.frame):
        begins = -(-change.frame // chunk) * chunk         # the next chunk's first frame
        if frames and begins >= frames:
            lines.append(f"{change.prompt!r} is never shown: the last of {frames} frames is made "
                         "before it")
            continue
        earlier = last_at.get((change.video, begins))
        if earlier is not None:
            lines.append(f"{earlier.prompt!r} is never shown: {change.prompt!r} takes its "
                         f"place in the chunk that begins at frame {begins}")
        last_at[change.video, begins] = change
    return lines
