"""From a prompt to the rows that Wan's models take, and from their latents to pixels, by the text
encoder and the VAE that diffusers and transformers have: their parts, not ours.

FOLDER is diffusers' folder of Wan2.1 (with `tokenizer`, `text_encoder` and `vae`), on this disk;
nothing is downloaded. These two steps have never run on real weights here. Where diffusers is
installed, tests/test_wan.py goes the whole way with random parts of a small size, and finds a
video that is decoded chunk by chunk to be the video decoded at once.
"""

import gc
from pathlib import Path

import torch
from torch import Tensor

from engine.command_line import UserError
from engine.video_files import open_video, to_pixels

SLOTS = 512                    # rows of a caption
# Wan's own advice, in short: what its models are led away from.
NEGATIVE = ("bright tones, overexposed, static, blurred details, subtitles, worst quality, "
            "low quality, JPEG artefacts, deformed, still picture, messy background")


def needed(package: str, name: str):
    """A class of an optional package; UserError, one line, without it."""
    try:
        return getattr(__import__(package), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"--prompt and videos need {name} of {package}: pip install diffusers "
                        "transformers ftfy sentencepiece; or give --text and an --out that ends "
                        "in .safetensors") from error


def part_of(folder: Path | None, name: str) -> Path:
    """A folder of a part; UserError if it is not there."""
    if folder is None:
        raise UserError("give --parts FOLDER: diffusers' folder of Wan2.1, with tokenizer, "
                        "text_encoder and vae")
    if not (folder / name).is_dir():
        raise UserError(f"{folder} has no folder {name}: give diffusers' folder of Wan2.1")
    return folder / name


@torch.no_grad()
def encode(folder: Path | None, prompts: list[str], device: str) -> tuple[Tensor, Tensor]:
    """Rows [B, 512, width] of the prompts and [1, 512, width] of the negative one, on the CPU;
    the rows behind a prompt's end are zeros. The encoder is forgotten afterwards."""
    tokenizer = needed("transformers", "AutoTokenizer")
    encoder = needed("transformers", "UMT5EncoderModel")
    words = part_of(folder, "tokenizer")
    weights = part_of(folder, "text_encoder")
    tokenizer = tokenizer.from_pretrained(words, local_files_only=True)
    encoder = encoder.from_pretrained(weights, dtype=torch.bfloat16, local_files_only=True)
    encoder = encoder.to(device).eval()
    texts = [" ".join(text.split()) for text in [*prompts, NEGATIVE]]
    found = tokenizer(texts, padding="max_length", max_length=SLOTS, truncation=True,
                      return_attention_mask=True, return_tensors="pt").to(device)
    rows = encoder(found.input_ids, found.attention_mask).last_hidden_state
    rows = (rows * found.attention_mask[..., None]).cpu()
    del encoder
    gc.collect()                                           # 11 GB
    return rows[:-1], rows[-1:]


class LatentDecoder:
    """A VAE of diffusers (AutoencoderKLWan), given a video's latents chunk by chunk.

    The decoder remembers the last frames that each of its convolutions over time has seen; that
    memory is kept here, so that chunks join without a seam. The first latent frame is one frame
    of video, each later one is four.
    """

    def __init__(self, vae):
        self.vae = vae
        self.memory = []
        for module in vae.decoder.modules():
            if type(module).__name__ == "WanCausalConv3d":
                self.memory.append(None)
        self.first = True

    @torch.no_grad()
    def __call__(self, chunk: Tensor) -> Tensor:
        """Latents [B, F, channels, h, w] to video [B, frames, 3, 8 h, 8 w] in [-1, 1]."""
        weight = self.vae.post_quant_conv.weight
        config = self.vae.config
        mean = torch.tensor(config.latents_mean).to(weight).view(-1, 1, 1, 1)
        std = torch.tensor(config.latents_std).to(weight).view(-1, 1, 1, 1)
        z = chunk.transpose(1, 2).to(weight) * std + mean          # [B, channels, F, h, w]
        z = self.vae.post_quant_conv(z)
        frames = []
        for frame in z.split(1, dim=2):
            frames.append(self.vae.decoder(frame, feat_cache=self.memory, feat_idx=[0],
                                           first_chunk=self.first))
            self.first = False
        return torch.cat(frames, dim=2).clamp(-1, 1).transpose(1, 2)


class VideoOfLatents:
    """A writer of chunks of latents that writes the video they decode to, chunk by chunk."""

    def __init__(self, path: Path, folder: Path | None, device: torch.device):
        vae = needed("diffusers", "AutoencoderKLWan")
        weights = part_of(folder, "vae")
        vae = vae.from_pretrained(weights, local_files_only=True)
        self.decode = LatentDecoder(vae.to(device).eval())
        self.video = open_video(path)

    def append(self, chunk: Tensor) -> None:
        """Add a chunk [B, F, channels, h, w]."""
        self.video.append(to_pixels(self.decode(chunk), zoom=1))

    def close(self) -> None:
        """Write what the encoder of the video still holds."""
        self.video.close()
