"""Videos that begin with frames of one's own: those are kept, the rest follows from them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from PIL import Image

import sample
from engine.checkpoint import load_model, save_model
from engine.command_line import UserError
from engine.starts import Held, go_on_from, read_start
from engine.streaming import FastStream
from flow import GuidedStream, Stream, VideoDraws, consistency, euler, rollout
from lab import forall, seeds
from metrics import colour_index, speed
from mla_video import PRESETS, VideoDiT
from toy_data import WORDS, encode_caption, make_world

ROOT = Path(__file__).parent.parent
TINY = replace(PRESETS["toy"], dim=32, layers=2, heads=2, latent=8, query_latent=16, rope=6,
               ffn=32, words=len(WORDS), frames=9, window=9)
SAMPLERS = [(euler, 2), (consistency, 2)]


def untrained(seed: int) -> VideoDiT:
    """Weights that make every input matter: the layers that begin at zero, too."""
    torch.manual_seed(seed)
    model = VideoDiT(TINY).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model


def stream_of(model: VideoDiT, captions, guided: bool, kind=Stream):
    stream = kind(model, captions)
    if guided:
        return GuidedStream(stream, kind(model, torch.zeros_like(captions)), 2.0)
    return stream


def sides(stream) -> list[Stream]:
    return [stream.captioned, stream.plain] if isinstance(stream, GuidedStream) else [stream]


@forall(length=st.integers(0, 14), frames=st.integers(1, 10), guided=st.booleans(),
        which=st.integers(0, 1), seed=seeds)
def test_a_video_begins_with_its_start_and_goes_on(code, length, frames, guided, which, seed):
    """The start comes first, then as many frames as were asked for, in whole chunks; the cache
    has seen all of them."""
    sampler, steps = SAMPLERS[which]
    model = untrained(0)
    captions = encode_caption("red disc").expand(2, -1)
    start = torch.rand(1, length, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    stream = stream_of(model, captions, guided)
    draws = code.flow.VideoDraws(seed, 2)
    chunks = list(code.starts.go_on_from(start, stream, frames, draws, sampler=sampler,
                                         steps=steps))
    video = torch.cat(chunks, dim=1)
    assert all(chunk.shape[1] == 3 for chunk in chunks)
    assert 0 <= video.shape[1] - length - frames < 3
    for own in video[:, :length]:
        torch.testing.assert_close(own, start[0], atol=1e-5, rtol=0)
    for side in sides(stream):
        assert side.cache.seen == video.shape[1]


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("length", [3, 6, 15])
def test_what_follows_whole_chunks_is_what_follows_them_in_a_rollout(guided, length):
    """A video that the model made itself, taken as a start, goes on as it did: cache and noise
    are those of a rollout that has come so far."""
    model = untrained(1)
    captions = encode_caption("fast blue square")[None]
    draws = VideoDraws(3, 1)
    whole = torch.cat(list(rollout(stream_of(model, captions, guided), 21, draws, steps=2)), 1)

    draws = VideoDraws(3, 1)
    for _ in range(length // 3):
        draws.normal(1, 3, 3, 16, 16)              # what the rollout drew for those chunks
    stream = stream_of(model, captions, guided)
    chunks = list(go_on_from(whole[:, :length], stream, 21 - length, draws, steps=2))
    assert torch.equal(torch.cat(chunks, 1), whole)


def test_a_start_without_end_goes_on_without_end():
    stream = Stream(untrained(0), encode_caption("disc")[None])
    chunks = go_on_from(torch.zeros(1, 4, 3, 16, 16), stream, 0, VideoDraws(0, 1), steps=1)
    for _ in range(9):
        assert next(chunks).shape[1] == 3


@pytest.mark.parametrize("length, level", [(1, 0.9 * 0.5**3), (2, 0.9 * 0.5**3), (4, 0.5)])
@pytest.mark.parametrize("guided", [False, True])
def test_held_frames_are_shown_to_the_model_and_not_asked_for(monkeypatch, length, level, guided):
    """Noised to their own level, and the others as they are; the answer is theirs alone. With a
    past the level is that of the chunk."""
    model = untrained(2)
    captions = encode_caption("red disc")[None]
    stream = stream_of(model, captions, guided)
    known = torch.rand(1, length, 3, 16, 16)
    for first in range(0, length - 2, 3):
        stream.commit(known[:, first:first + 3])
    rest = known[:, length - length % 3:]
    n = rest.shape[1]
    held = Held(stream, rest, VideoDraws(0, 1), alone=length < 3)
    x = torch.randn(1, 3, 3, 16, 16)
    heard = []
    plain_denoise = model.denoise

    def denoise(y, sigma, *others):
        heard.append((y, sigma))
        return plain_denoise(y, sigma, *others)

    monkeypatch.setattr(model, "denoise", denoise)
    v = held.velocity(x, 0.5)
    assert len(heard) == 1 + guided
    for y, sigma in heard:
        assert sigma.tolist() == [pytest.approx([level] * n + [0.5] * (3 - n))]
        assert torch.equal(y[:, n:], x[:, n:])
        torch.testing.assert_close(y[:, :n], (1 - level) * rest + level * held.eps)
    torch.testing.assert_close(x[:, :n] - 0.5 * v[:, :n], rest)
    answers = [plain_denoise(y, sigma, side.caption, side.cache, side.attend)
               for (y, sigma), side in zip(heard, sides(stream))]
    wanted = answers[0]
    if guided:
        wanted = answers[1] + 2.0 * (answers[0] - answers[1])
    assert torch.equal(v[:, n:], wanted[:, n:])


@pytest.mark.rest
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("length", [1, 7, 12])
def test_a_compiled_stream_goes_on_as_any_other(guided, length):
    model = untrained(3)
    captions = encode_caption("red disc")[None]
    start = torch.rand(1, length, 3, 16, 16)
    videos = []
    for kind in (Stream, lambda model, captions: FastStream(model, captions, backend="eager")):
        stream = stream_of(model, captions, guided, kind)
        videos.append(torch.cat(list(go_on_from(start, stream, 12, VideoDraws(0, 1), steps=2)), 1))
    torch.testing.assert_close(videos[0], videos[1], atol=1e-4, rtol=1e-4)


# ---- what the shipped model makes of it ------------------------------------------------------

@pytest.fixture(scope="module")
def toy():
    model, _ = load_model(ROOT / "checkpoints/toy.pt")
    return model


def continued(model, start, captions, frames: int):
    stream = Stream(model, captions)
    draws = VideoDraws(0, len(captions))
    return torch.cat(list(go_on_from(start, stream, frames, draws, sampler=consistency,
                                     steps=4)), 1)


def test_a_clip_goes_on_without_a_seam(toy):
    clips, captions = make_world("shapes", frames=15, seed=30_000).batch(range(24))
    video = continued(toy, clips[:, :12], captions, 3)
    seam = speed(video)[:, 11].mean()
    true = speed(clips)[:, 11].mean()
    assert abs(seam / true - 1) < 0.1, f"{seam:.2f} pixels, and {true:.2f} are true"


@pytest.mark.parametrize("words", ["their own", "none"])
def test_a_single_picture_moves_and_stays_what_it_is(toy, words):
    """Three equal frames, committed, move by a tenth of the true step: they freeze."""
    clips, captions = make_world("shapes", frames=15, seed=30_000).batch(range(24))
    if words == "none":
        captions = torch.zeros_like(captions)
    video = continued(toy, clips[:, :1], captions, 14)
    true = speed(clips).mean()
    steps = speed(video)
    assert 0.8 < steps[:, 3:].mean() / true < 1.2
    assert 0.5 < steps[:, 0].mean() / true < 1.2, "no jump from the picture, and no pause"
    assert (steps[:, 3:].mean(1) < 0.25 * true).float().mean() < 0.1, "some are frozen"
    same = colour_index(video) == colour_index(video[:, :1])
    assert same.float().mean() > 0.9


# ---- files -----------------------------------------------------------------------------------

def write_clip(path: Path, frames: np.ndarray) -> None:
    """frames uint8 [F, h, w, 3]"""
    if path.suffix == ".npy":
        np.save(path, frames)
        return
    first, *others = [Image.fromarray(frame) for frame in frames]
    if path.suffix == ".gif":
        first.save(path, save_all=True, append_images=others, duration=60)
    else:
        first.save(path)


def some_clip(frames: int, height: int = 16, width: int = 16) -> np.ndarray:
    """A white field that grows from the left, on black."""
    clip = np.zeros((frames, height, width, 3), dtype=np.uint8)
    for i in range(frames):
        clip[i, :, :2 + i] = 255
    return clip


@pytest.mark.parametrize("name, frames", [("a.npy", 7), ("a.npy", 20), ("a.gif", 13), ("a.gif", 7), ("A.PNG", 1), ("a.jpg", 1)])
def test_clips_and_pictures_are_read_whole(tmp_path, name, frames):
    path = tmp_path / name
    clip = some_clip(frames)
    write_clip(path, clip)
    found, said = read_start(str(path), PRESETS["toy"])
    assert found.shape == (1, frames, 3, 16, 16)
    assert said.startswith(name)
    true = torch.from_numpy(clip).permute(0, 3, 1, 2) / 127.5 - 1
    tolerance = 0.3 if name == "a.jpg" else 0.01
    torch.testing.assert_close(found[0], true, atol=tolerance, rtol=0)


def test_a_start_is_cut_to_a_square_and_may_be_grey(tmp_path):
    path = tmp_path / "wide.png"
    picture = np.zeros((1, 32, 64, 3), dtype=np.uint8)
    picture[:, :, 16:48] = 255                     # the centre is white
    write_clip(path, picture)
    found, _ = read_start(str(path), PRESETS["toy"])
    assert found.shape == (1, 1, 3, 16, 16) and (found > 0.99).all()
    grey, _ = read_start(str(path), replace(PRESETS["toy"], channels=1))
    assert grey.shape == (1, 1, 1, 16, 16)


def test_a_start_that_cannot_be_read_is_refused_in_a_line(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    (tmp_path / "a.txt").write_bytes(b"no clip")
    tall = replace(PRESETS["toy"], height=32)
    for path, config, words in ((tmp_path / "a.png", PRESETS["toy"], "a.png"),
                                (tmp_path / "a.txt", PRESETS["toy"], "a.txt"),
                                (tmp_path / "no.gif", PRESETS["toy"], "no clip"),
                                (tmp_path / "a.png", tall, "square")):
        with pytest.raises(UserError, match=words) as found:
            read_start(str(path), config)
        assert "\n" not in str(found.value)


def test_a_film_is_a_start(tmp_path):
    pytest.importorskip("av")
    from engine.video_files import FilmWriter
    writer = FilmWriter(tmp_path / "a.mp4")
    writer.append(some_clip(5, 32, 32))
    writer.close()
    found, _ = read_start(str(tmp_path / "a.mp4"), PRESETS["toy"])
    assert found.shape == (1, 5, 3, 16, 16)


# ---- the command -----------------------------------------------------------------------------

@pytest.mark.parametrize("flags", [[], ["--guidance=2"], ["--compile"]])
@pytest.mark.parametrize("name, frames", [("a.gif", 7), ("a.png", 1)])
def test_sample_goes_on_from_a_clip(capsys, monkeypatch, tmp_path, flags, name, frames):
    """The file holds the clip's frames and then as many as were asked for; captions change at
    frames of that file."""
    if "--compile" in flags:
        monkeypatch.setattr(FastStream.__init__, "__defaults__",
                            (None, FastStream.__init__.__defaults__[1], "eager",
                             FastStream.__init__.__defaults__[3]))
    torch.manual_seed(0)
    save_model(tmp_path / "model.pt", VideoDiT(TINY), data="shapes", stage="tf", steps=0, seed=0)
    clip = some_clip(frames)
    write_clip(tmp_path / name, clip)
    sample.main([f"--checkpoint={tmp_path}", f"--start={tmp_path / name}", "--frames=13",
                 "--steps=1", "--device=cpu", f"--out={tmp_path / 'out.gif'}",
                 "--prompt=red disc", f"--prompt={frames + 3}: blue disc", *flags])
    said = capsys.readouterr()
    assert f"start        {name}" in said.out
    assert "never shown" not in said.err
    with Image.open(tmp_path / "out.gif") as gif:
        assert gif.n_frames == frames + 13
        for number in range(frames):
            gif.seek(number)
            shown = np.asarray(gif.convert("RGB"))[4::8, 4::8]
            assert np.abs(shown.astype(int) - clip[number]).max() <= 1, f"frame {number}"


def test_without_a_prompt_a_start_is_one_video(capsys, tmp_path):
    torch.manual_seed(0)
    save_model(tmp_path / "model.pt", VideoDiT(TINY), data="shapes", stage="tf", steps=0, seed=0)
    write_clip(tmp_path / "a.gif", some_clip(3))
    sample.main([f"--checkpoint={tmp_path}", f"--start={tmp_path / 'a.gif'}", "--frames=3",
                 "--steps=1", "--device=cpu", f"--out={tmp_path / 'out.gif'}"])
    assert "captions     (none)" in capsys.readouterr().out
    with Image.open(tmp_path / "out.gif") as gif:
        assert gif.size == (128, 128)
