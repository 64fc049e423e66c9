"""Released weights become VideoMLA and learn on: latents as a world, the model of homogeneous
coordinates as a model of this project, and train.py from the weights to a stream. All weights are
random."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch

import sample
import train
import wan_by_hand
from engine.checkpoint import load_model, save_model
from engine.command_line import UserError
from engine.homogeneous import HomogeneousConfig, HomogeneousDiT, model_of, replace_attention
from engine.latent_clips import DROP, Latents, shapes_of
from engine.trainer import compiled, recompute
from engine.wan import load_wan
from engine.streaming import FastStream
from flow import Draws, Stream
from lab import EXACT, Dice, assert_same, error
from mla_video import Config
from objectives import teacher_forcing_loss
from wan_by_hand import Sizes

safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors")

SMALL = Sizes(heads=2, head=12, layers=2, ffn=20, channels=2, text=6)
FREE = dict(heads=2, height=4, width=6, frames=6, window=6, slots=5)
CONFIG = Config(attention="dense", dim=24, heads=2, channels=2, height=4, width=6, patch=2,
                frames=6, window=6, slots=5, text=6, place=False, bias=True)
FLAGS = ["--config=heads=2", "--config=frames=6", "--config=latent=8", "--config=rope=6",
         "--config=slots=5", "--device=cpu"]


def tensors(**changes) -> dict:
    dice = torch.Generator().manual_seed(0)
    made = {"latents": torch.randn(5, 7, 2, 4, 6, generator=dice),
            "text": torch.randn(5, 4, 6, generator=dice)}
    made |= changes
    return {name: value for name, value in made.items() if value is not None}


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "latents.safetensors"
    safetensors.save_file(tensors(), path)
    return path


@pytest.fixture
def wan_file(tmp_path) -> Path:
    path = tmp_path / "wan.safetensors"
    weights = wan_by_hand.weights(SMALL, seed=7)
    weights["head.head.weight"] *= 0.3                     # answers of a size to be trained on
    safetensors.save_file(weights, path)
    return path


# ---- the world -------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_clip_is_the_beginning_of_one_in_the_file(tmp_path, dtype):
    kept = {name: value.to(dtype) for name, value in tensors().items()}
    path = tmp_path / "a.safetensors"
    safetensors.save_file(kept, path)
    world = Latents(path, CONFIG, seed=3)
    video, rows = world.batch(range(40))
    assert video.shape == (40, 6, 2, 4, 6) and rows.shape == (40, 5, 6)
    assert video.dtype == rows.dtype == torch.float32
    drawn = set()
    for i in range(40):
        clip, negative = world.draw(i)
        drawn.add(clip)
        assert not negative
        assert torch.equal(video[i], kept["latents"][clip, :6].float())
        assert torch.equal(rows[i, :4], kept["text"][clip].float()) and not rows[i, 4:].any()
    assert drawn == set(range(5))
    one, its_rows = world.clip(17)
    assert torch.equal(one, video[17]) and torch.equal(its_rows, rows[17])
    other, _ = Latents(path, CONFIG, seed=4).batch(range(40))
    assert not torch.equal(other, video)


def test_a_share_of_captions_is_the_negative_one(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.save_file(tensors(negative=torch.full((2, 6), 7.0)), path)
    world = Latents(path, CONFIG, seed=0)
    _, rows = world.batch(range(1000))
    negative = (rows[:, :2] == 7).all((1, 2)) & ~rows[:, 2:].any(2).any(1)
    assert abs(negative.float().mean().item() - DROP) < 0.03
    assert world.recipe["drop"] == 0.0, "zeros must not be drawn on top of it"
    assert world.first_captions()["negative_prompt_embeds"].shape == (1, 2, 6)


def test_only_the_clips_of_a_batch_are_read(tmp_path, monkeypatch):
    """A file with one bad clip serves all others."""
    bad = tensors()
    bad["latents"][2, 1] = torch.nan
    path = tmp_path / "a.safetensors"
    safetensors.save_file(bad, path)
    world = Latents(path, CONFIG, seed=0)
    good = [i for i in range(40) if world.draw(i)[0] != 2]
    assert world.batch(good)[0].isfinite().all()
    worst = [i for i in range(40) if world.draw(i)[0] == 2]
    with pytest.raises(UserError, match="clip 2 in .* holds NaN"):
        world.batch(worst[:1])


def test_other_latents_have_another_fingerprint(data, tmp_path):
    world = Latents(data, CONFIG, 0)
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(data.read_bytes())
    assert Latents(copy, CONFIG, 0).fingerprint == world.fingerprint
    safetensors.save_file(tensors(text=torch.ones(5, 4, 6)), copy)
    assert Latents(copy, CONFIG, 0).fingerprint != world.fingerprint


@pytest.mark.parametrize("changes, words", [
    (dict(text=None), "must hold latents and text"),
    (dict(video=torch.ones(2)), "must hold latents and text"),
    (dict(latents=torch.ones(5, 7, 2, 4)), r"latents in .* must be numbers \[clips, frames"),
    (dict(latents=torch.ones(5, 7, 2, 4, 6).long()), "latents in .* must be numbers .* I64"),
    (dict(latents=torch.ones(0, 7, 2, 4, 6)), "latents in .* must be numbers"),
    (dict(text=torch.ones(5, 6)), "text in .* must be numbers"),
    (dict(text=torch.ones(3, 4, 6)), "5 clips and 3 captions"),
    (dict(text=torch.ones(5, 4, 9)), "rows of text are as wide as 9, and the model's 6"),
    (dict(text=torch.ones(5, 9, 6)), "captions of 9 rows, and the model takes 5: --config slots=9"),
    (dict(negative=torch.ones(2, 9)), "negative rows are as wide as 9"),
    (dict(negative=torch.ones(9, 6)), "captions of 9 rows"),
    (dict(latents=torch.ones(5, 5, 2, 4, 6)), "clips of 5 latent frames.* --config frames=3"),
    (dict(latents=torch.ones(5, 2, 2, 4, 6)), "clips of 2 latent frames.* give longer ones"),
    (dict(latents=torch.ones(5, 7, 3, 4, 6)), r"frames are \[3, 4, 6\], and the model's \[2, 4, 6\]"),
])
def test_files_that_do_not_fit_are_refused(tmp_path, changes, words):
    path = tmp_path / "a.safetensors"
    safetensors.save_file(tensors(**changes), path)
    with pytest.raises(UserError, match=words) as raised:
        Latents(path, CONFIG, 0)
    assert "\n" not in str(raised.value)


def test_damaged_and_missing_files_are_refused(data, tmp_path):
    data.write_bytes(data.read_bytes()[:-10])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        shapes_of(data)
    with pytest.raises(UserError, match="there is no file"):
        shapes_of(tmp_path / "none.safetensors")


# ---- the model -------------------------------------------------------------------------------

def dense_of(path: Path, **free):
    return load_wan(path, dtype=torch.float64, **FREE | free)


def test_at_full_rank_it_is_the_released_model(wan_file):
    """A slice of the key a head, and a latent as wide as the model: teacher forcing, and every
    gradient of what both have, in float64; rebuilt from config and weights alone."""
    dense = dense_of(wan_file).requires_grad_(True)
    made = replace_attention(dense, C=24, R=24)
    assert made.config == HomogeneousConfig(**{**vars(dense.config), "attention": "homogeneous",
                                               "latent": 25, "rope": 24})
    mla = model_of(made.config).double()
    mla.load_state_dict(made.state_dict())
    assert isinstance(mla, HomogeneousDiT)
    dice = Dice(0)
    x0 = dice.normal(2, 6, 2, 4, 6)
    rows = dice.normal(2, 5, 6)
    found = []
    for model in (dense, mla):
        draws = Draws(torch.Generator().manual_seed(1))
        loss, _, _ = teacher_forcing_loss(model, x0, rows, draws, drop=0.5)
        loss.backward()
        found.append(loss)
    assert_same(found[1], found[0], EXACT, "the loss")
    own = dict(mla.named_parameters())
    for name, weight in dense.named_parameters():
        if name in own and weight.grad.abs().max() > 1e-12:
            assert_same(own[name].grad, weight.grad, 1e-8, f"the gradient of {name}")


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_what_is_made_again_for_the_backward_pass_is_the_same(wan_file, backend):
    """Loss and gradients with and without recomputation; and less is kept meanwhile."""
    made = replace_attention(dense_of(wan_file), C=7, R=6)
    again = copy.deepcopy(made)
    recompute(again)
    dice = Dice(0)
    x0 = dice.normal(2, 6, 2, 4, 6)
    rows = dice.normal(2, 5, 6)
    kept = []
    found = []
    for model in (made, compiled(again, backend)):
        sizes = []
        draws = Draws(torch.Generator().manual_seed(1))
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x,
                                                      lambda x: x):
            loss, _, _ = teacher_forcing_loss(model, x0, rows, draws)
        loss.backward()
        found.append(loss)
        kept.append(sum(sizes))
    assert_same(found[1], found[0], EXACT, "the loss")
    others = dict(again.named_parameters())
    for name, weight in made.named_parameters():
        assert error(others[name].grad, weight.grad) < EXACT, name
    assert backend or kept[1] < kept[0] / 3


def test_below_full_rank_it_is_exact_for_inputs_of_few_directions(code):
    """C of 24, content alone: where tokens lie in C directions and the moment says so, nothing is
    lost, norms and biases included; where the moment is not known, much is."""
    homogeneous = code.homogeneous
    dense = code.attention.Dense(24, 2, None, bias=True, eps=1e-2).double()
    dice = Dice(0)
    for weight in dense.parameters():
        weight.data = weight.data + 0.3 * dice.normal(*weight.shape)
    C = 5
    directions = dice.normal(C, 24)
    x = dice.normal(1, 9, C) @ directions
    want = dense(x, dense.rows(x))
    M = directions.T @ directions
    for moment, bound in ((M, 1e-4), (None, None)):
        mla = homogeneous.from_dense(dense, C, moment=moment)
        for route in (code.attention.attend_materialised, code.attention.attend_absorbed):
            off = error(mla(x, mla.rows(x), _no_turn(9), _no_turn(9), attend=route), want)
            assert off < bound if bound else off > 0.01, off


def _no_turn(tokens: int) -> tuple:
    return torch.ones(tokens, 0).double(), torch.zeros(tokens, 0).double()


def test_a_checkpoint_of_it_is_one_of_this_project(wan_file, tmp_path):
    made = replace_attention(dense_of(wan_file), C=7, R=6).float()
    path = tmp_path / "model.pt"
    save_model(path, made, stage="tf", data="a")
    model, about = load_model(path)
    assert isinstance(model, HomogeneousDiT) and model.config == made.config
    assert model.make_cache(1).bytes_per_token == 4 * (7 + 1 + 6)
    for name, value in made.state_dict().items():
        assert torch.equal(model.state_dict()[name], value.half().float()), name


def test_it_streams_compiled_as_it_does_plainly(wan_file):
    """One graph once the window is full, as on a GPU."""
    model = replace_attention(dense_of(wan_file, frames=9, window=6, sink=1), C=7, R=6).float()
    rows = Dice(0).normal(1, 5, 6).float()
    plain = Stream(model, rows)
    fast = FastStream(model, rows, backend="aot_eager")
    for chunk in range(4):
        x = Dice(chunk).normal(1, 3, 2, 4, 6).float()
        assert error(fast.velocity(x, 0.8), plain.velocity(x, 0.8)) < 1e-5
        fast.commit(x)
        plain.commit(x)
    assert fast.fast is not None, "the window was never full"


@pytest.mark.parametrize("changes, words", [
    (dict(latent=26), "latent between 2 and 25"), (dict(latent=1), "latent between 2 and 25"),
    (dict(rope=12), "less than a head's 12 channels"), (dict(rope=7), "even number"),
    (dict(attention="mla"), "must be 'homogeneous'"), (dict(heads=5), "do not divide"),
])
def test_sizes_that_make_no_such_model_are_refused(changes, words):
    sizes = {**vars(CONFIG), "attention": "homogeneous", "latent": 8, "rope": 6, **changes}
    with pytest.raises(ValueError, match=words):
        HomogeneousConfig(**sizes)


# ---- train.py --------------------------------------------------------------------------------

def refused(capsys, flags: list[str], run=train.main) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(flags)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.strip().count("\n") == 0, said
    return said


@pytest.mark.parametrize("flags, words", [
    (["--stage=dmd"], "the stages tf and cd"), (["--stage=all"], "the stages tf and cd"),
    (["--preset=small"], "--preset is for models of pixels"),
    (["--attention=dense"], "dense already"),
    (["--config=dim=3"], "--config takes NAME=N with one of heads"),
    (["--config=latent=99"], "latent between 2 and 25"),
    (["--config=rope=12"], "less than a head's 12"),
    (["--config=window=9"], "longer than the 6 frames"),
    (["--config=slots=3"], "captions of 4 rows"),
    (["--from-dense=none.safetensors"], "no released weights"),
    (["--rate=0"], "--rate must be at least"),
])
def test_flags_that_do_not_go_together_are_refused(wan_file, data, tmp_path, capsys, flags, words):
    given = [f"--from-dense={wan_file}", f"--data={data}", f"--out={tmp_path / 'out'}", *FLAGS]
    assert words in refused(capsys, given + flags)
    assert not list((tmp_path / "out").glob("*.pt"))


def test_weights_and_latents_need_each_other(wan_file, data, tmp_path, capsys):
    out = f"--out={tmp_path / 'out'}"
    assert "latents with rows" in refused(capsys, [f"--from-dense={wan_file}", out])
    assert "--from-dense" in refused(capsys, [f"--data={data}", out])
    (tmp_path / "model.pt").write_bytes(b"nothing")
    said = refused(capsys, [f"--data={data}", f"--from-dense={tmp_path / 'model.pt'}", out])
    assert "no released weights" in said


def test_without_any_clip_the_weights_decide_where_to_cut(wan_file, data, tmp_path):
    """--conversion weights makes another model of the same sizes."""
    made = {}
    for conversion in ("data", "weights"):
        out = tmp_path / conversion
        train.main([f"--from-dense={wan_file}", f"--data={data}", f"--out={out}", *FLAGS,
                    f"--conversion={conversion}", "--steps=1"])
        made[conversion] = load_model(out / "tf.pt")[0]
    assert made["data"].config == made["weights"].config
    first, second = (model.blocks[0].attention.W_DKV.weight for model in made.values())
    assert error(first, second) > 0.1


def test_a_run_that_is_gone_on_with_is_the_same_run(wan_file, data, tmp_path):
    """From the save half-way: bit for bit the weights of the run that was not interrupted."""
    whole = tmp_path / "whole"
    train.main([f"--from-dense={wan_file}", f"--data={data}", f"--out={whole}", *FLAGS,
                "--steps=4", "--save-every=2", "--rate=100"])
    part = tmp_path / "part"
    part.mkdir()
    shutil.copy(whole / "train.prev.pt", part / "train.pt")
    assert torch.load(part / "train.pt", weights_only=True)["step"] == 2
    train.main(["--resume", f"--out={part}", "--device=cpu"])
    want = load_model(whole / "tf.pt")[0].state_dict()
    for name, value in load_model(part / "tf.pt")[0].state_dict().items():
        assert torch.equal(value, want[name]), name


def test_from_released_weights_to_a_stream(wan_file, data, tmp_path, capsys):
    """20 steps on a CPU, at a hundred times the rate for real weights: the loss falls; the run is
    gone on with; its checkpoint streams; cd starts from it."""
    out = tmp_path / "out"
    flags = [f"--from-dense={wan_file}", f"--data={data}", f"--out={out}", *FLAGS]
    train.main([*flags, "--steps=20", "--rate=100", "--batch=4", "--deterministic"])
    config = load_model(out / "tf.pt")[0].config
    assert (config.attention, config.latent, config.rope) == ("homogeneous", 8, 6)
    wan_file.unlink()                                      # it is not needed to go on
    train.main(["--resume", f"--out={out}", "--steps=25", "--device=cpu"])
    state = torch.load(out / "train.pt", weights_only=True)
    losses = [loss for _, loss in state["losses"]["tf"]]
    assert state["step"] == 25 and len(losses) == 3 and losses[-1] < 0.97 * losses[0], losses
    assert state["recipe"]["lr_adamw"] == pytest.approx(100 * 5e-6)
    capsys.readouterr()
    assert "--rate 100" in refused(capsys, ["--resume", f"--out={out}", "--rate=1"])

    made = safetensors.load_file(out / "sample.safetensors")["latents"]
    assert made.shape == (12, 1, 2, 4, 6) and made.isfinite().all()
    video = tmp_path / "long.safetensors"
    stream = [f"--checkpoint={out / 'model.pt'}", f"--text={out / 'text.safetensors'}",
              "--frames=18", f"--out={video}", "--device=cpu", "--steps=2"]
    for route in ("materialised", "absorbed"):
        sample.main([*stream, f"--route={route}"])
        made = safetensors.load_file(video)["latents"]
        assert made.shape == (18, 1, 2, 4, 6) and made.isfinite().all()
    capsys.readouterr()
    assert "--route fused is not for" in refused(capsys, [*stream, "--route=fused"], sample.main)
    assert "--cache int8 would" in refused(capsys, [*stream, "--cache=int8"], sample.main)

    train.main(["--stage=cd", f"--data={data}", f"--out={out}", "--device=cpu", "--steps=2"])
    assert json.loads((out / "report_cd.json").read_text())["attention"] == "homogeneous"
