"""What diffusers' WanTransformer3DModel answers for the random weights of wan_by_hand.py: writes
tests/fixtures/wan_outputs.json, which test_wan.py reads. So the tests need no diffusers.

    pip install diffusers transformers
    python tests/make_wan_outputs.py

Names go from the original ones to diffusers' by diffusers' own converter. Its model rounds to
float32 in places, by .float(); for the answers in float64 that is made .double(), and the
sinusoids of its noise levels, which it makes in float32, are Wan's own, in float64. How far its
bfloat16 is from those answers stands beside them: once with all of it in bfloat16, once with the
modules in float32 that diffusers keeps so.
"""

import base64
import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import wan_by_hand  # noqa: E402
from engine.command_line import provenance  # noqa: E402

OUT = HERE / "fixtures/wan_outputs.json"
CASES = [
    (wan_by_hand.Sizes(heads=2, head=20, layers=2, ffn=56, channels=3, text=10), 1, 3),
    (wan_by_hand.Sizes(heads=1, head=6, layers=1, ffn=8, channels=1, text=4), 2, 1),
    (wan_by_hand.Sizes(heads=4, head=24, layers=6, ffn=200, channels=2, text=12), 3, 2),
    (wan_by_hand.Sizes(heads=4, head=24, layers=6, ffn=200, channels=2, text=12), 4, 2),
]
# What diffusers keeps in float32 when it loads the model in bfloat16.
IN_FLOAT32 = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")


class Sinusoid(nn.Module):
    """Wan's, in float64."""

    def forward(self, time: Tensor) -> Tensor:
        band = 10_000.0 ** (-torch.arange(128).double() / 128)
        angle = time.double()[..., None] * band
        return torch.cat((angle.cos(), angle.sin()), dim=-1)


def model_of(s: wan_by_hand.Sizes, weights: dict) -> nn.Module:
    from diffusers import WanTransformer3DModel
    sizes = dict(num_attention_heads=s.heads, attention_head_dim=s.head, num_layers=s.layers,
                 ffn_dim=s.ffn, in_channels=s.channels, out_channels=s.channels, text_dim=s.text)
    model = WanTransformer3DModel(**sizes)
    model.load_state_dict(weights)
    return model


def answer(model: nn.Module, video: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
    """v [B, F, channels, h, w]; each frame has its own noise level."""
    tokens = video.shape[3] // 2 * (video.shape[4] // 2)
    time = (1000 * sigma).round().repeat_interleave(tokens, 1)
    with torch.no_grad():
        return model(video.transpose(1, 2), time, text).sample.transpose(1, 2)


def in_float64(s: wan_by_hand.Sizes, weights: dict, given: tuple) -> Tensor:
    rounding = Tensor.float
    Tensor.float = Tensor.double
    try:
        model = model_of(s, weights).double()
        model.condition_embedder.timesteps_proj = Sinusoid()
        return answer(model, *given)
    finally:
        Tensor.float = rounding


def in_bfloat16(s: wan_by_hand.Sizes, weights: dict, given: tuple, keep: tuple) -> Tensor:
    """With the modules of these names in float32."""
    model = model_of(s, weights).bfloat16()
    for name, weight in model.named_parameters():
        if set(name.split(".")) & set(keep):
            weight.data = weight.data.float()
    video, sigma, text = given
    return answer(model, video.bfloat16(), sigma.float(), text.bfloat16()).double()


def renamed(original: dict) -> dict[str, str]:
    """{original name: diffusers'}."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
    # Each tensor gets a number, to be recognised by under its new name.
    numbered = {name: torch.full((1,), i) for i, name in enumerate(original)}
    converted = convert_wan_transformer_to_diffusers(dict(numbered))
    old = list(original)
    return {old[int(number)]: new for new, number in converted.items()}


def case(s: wan_by_hand.Sizes, seed: int, frames: int) -> dict:
    original = wan_by_hand.weights(s, seed)
    names = renamed(original)
    weights = {names[name]: value for name, value in original.items()}
    given = wan_by_hand.inputs(s, seed, frames)
    v = in_float64(s, weights, given)
    errors = {}
    for label, keep in (("all", ()), ("mixed", IN_FLOAT32)):
        off = in_bfloat16(s, weights, given, keep) - v
        errors[label] = (off.norm() / v.norm()).item()
    found = base64.b64encode(v.contiguous().numpy().tobytes()).decode()
    return {"sizes": s._asdict(), "seed": seed, "frames": frames, "v": found,
            "bfloat16": errors}


def main() -> None:
    import diffusers
    torch.set_num_threads(1)
    out = {**provenance(torch.device("cpu")), "diffusers": diffusers.__version__}
    one_block, seed, _ = CASES[1]
    out["names"] = renamed(wan_by_hand.weights(one_block, seed))
    out["cases"] = [case(*given) for given in CASES]
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(out, indent=1) + "\n")
    for made in out["cases"]:
        print(made["sizes"], made["bfloat16"])


if __name__ == "__main__":
    main()
