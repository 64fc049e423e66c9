"""What a checkpoint is, in a few lines."""

from engine.judging import cache_line
from mla_video import VideoDiT
from toy_data import words_of

NAMED = ("dim", "layers", "heads", "latent", "query_latent", "rope", "ffn")


def about_lines(model: VideoDiT, about: dict) -> list[str]:
    """What a user may ask of a model and of the facts that were saved with it."""
    c = model.config
    weights = sum(weight.numel() for weight in model.parameters())
    sizes = ", ".join(f"{name} {getattr(c, name)}" for name in NAMED)
    data = str(about.get("data"))[:200]
    words = [" ".join(slot) for slot in words_of(data) if slot]
    if about.get("words"):                                 # of its own clips
        words = [str(about["words"])[:500]]
    look = f"a window of {c.window}"
    if c.sink:
        look += f" with {c.sink} sink frames"
    return [
        f"stage        {about.get('stage')}, {about.get('steps', '?')} steps of training, seed "
        f"{about.get('seed', '?')}",
        f"data         {data}",
        f"words        {', '.join(words) or 'none: its clips had no captions'}",
        f"frames       {c.channels} x {c.height} x {c.width} pixels in patches of {c.patch}, "
        f"{c.chunk} a chunk, {c.frames} a training clip, {look}",
        f"model        {c.attention}, {weights:,} weights: {sizes}",
        cache_line(model, 1),
    ]
