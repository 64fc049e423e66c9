"""Captions that lie beside a user's clips: found, learned, carried by the checkpoint, refused."""

import json

import numpy as np
import pytest
import torch

import sample
import train
from engine.checkpoint import load_model
from engine.clips import open_world
from engine.command_line import UserError
from engine.own_words import Vocabulary
from test_cli import SMALL, fails_in_one_line

SAID = ["A red cat runs", "a dog", "", "the dog, red"]


def films(count=4):
    """So many clips of 14 frames, each of one grey of its own."""
    grey = (40 * np.arange(1, count + 1)).astype(np.uint8)
    return np.broadcast_to(grey[:, None, None, None], (count, 14, 16, 16)).copy()


def beside_an_array(path):
    np.save(path / "clips.npy", films())
    (path / "clips.txt").write_text("\n".join(SAID) + "\n")
    return path / "clips.npy"


def in_an_archive(path):
    np.savez(path / "clips.npz", clips=films(), captions=np.array(SAID))
    return path / "clips.npz"


def beside_a_folder(path):
    folder = in_a_folder(path)
    for text in folder.glob("*.txt"):
        text.unlink()
    (path / "folder.txt").write_text("\n".join(SAID))
    return folder


def in_a_folder(path):
    folder = path / "folder"
    folder.mkdir()
    for number, (clip, said) in enumerate(zip(films(), SAID)):
        np.save(folder / f"{number}.npy", clip[None])
        (folder / f"{number}.txt").write_text(said + "\n")
    return folder


@pytest.mark.parametrize("write", [beside_an_array, in_an_archive, beside_a_folder, in_a_folder])
def test_each_clip_has_its_own_caption(tmp_path, write):
    world = open_world(str(write(tmp_path)), layout="NTHW")
    assert world.vocabulary.words == ["a", "cat", "dog", "red", "runs", "the"]
    video, captions = world.batch(range(40))
    assert captions.shape == (40, 4) and video.shape == (40, 12, 3, 16, 16)
    shades = {}                                            # of a caption: its clip's grey
    for clip, ids in zip(video, captions):
        shades.setdefault(world.vocabulary.decode(ids), set()).add(clip.mean().item())
    assert set(shades) == {"a red cat runs", "a dog", "", "the dog red"}
    assert all(len(each) == 1 for each in shades.values()), "a caption belongs to one clip"
    by_shade = sorted(shades, key=lambda said: min(shades[said]))
    assert by_shade == ["a red cat runs", "a dog", "", "the dog red"]
    assert "6 different words" in world.reads


def test_captions_are_part_of_which_clips_they_are(tmp_path):
    path = beside_an_array(tmp_path)
    said = open_world(str(path), layout="NTHW").fingerprint
    (tmp_path / "clips.txt").write_text("cat\ndog\ncat\ndog\n")
    other = open_world(str(path), layout="NTHW").fingerprint
    (tmp_path / "clips.txt").unlink()
    silent = open_world(str(path), layout="NTHW")
    assert len({said, other, silent.fingerprint}) == 3
    assert silent.vocabulary is None and silent.batch([0])[1].tolist() == [[0, 0, 0]]


def test_encode_and_decode_are_inverse():
    words = Vocabulary(["cat", "dog", "red"], 3)
    for said in ("", "cat", "red dog", "dog dog cat"):
        assert words.decode(words.encode(said)) == said
    assert torch.equal(words.encode("Red, dog."), words.encode("red dog"))
    with pytest.raises(ValueError, match="unknown word 'fish'.*cat dog red"):
        words.encode("red fish")
    with pytest.raises(ValueError, match="4 words; this model takes 3"):
        words.encode("red cat dog cat")


def test_wrong_captions_are_refused(tmp_path):
    path = beside_an_array(tmp_path)
    text = tmp_path / "clips.txt"
    for content, complaint in [(b"one\ntwo\n", "2 captions, and there are 4 clips"),
                               (b"a\nb\nc\nd\ne\n", "5 captions, and there are 4 clips"),
                               (b"\xff\xfe\n", "cannot be read as captions"),
                               (b"\n\n\n\n", "no words")]:
        text.write_bytes(content)
        with pytest.raises(UserError, match=complaint):
            open_world(str(path), layout="NTHW")
    archive = in_an_archive(tmp_path)                      # and clips.txt lies beside it, too
    text.write_text("a\nb\nc\nd\n")
    with pytest.raises(UserError, match="keep one"):
        open_world(str(archive), layout="NTHW")
    text.unlink()
    for captions in (np.arange(4), np.array([["a"] * 4]), np.array(["a", None, "b", "c"])):
        np.savez(archive, clips=films(), captions=captions)
        with pytest.raises(UserError, match="captions must be"):
            open_world(str(archive), layout="NTHW")
    folder = in_a_folder(tmp_path)
    (folder / "2.txt").unlink()
    with pytest.raises(UserError, match="0.npy has captions and .*2.npy has none"):
        open_world(str(folder), layout="NTHW")


def test_a_model_carries_its_words(capsys, tmp_path):
    path = beside_an_array(tmp_path)
    out = tmp_path / "out"
    flags = [*SMALL, f"--out={out}", "--device=cpu"]
    train.main([f"--data={path}", "--layout=NTHW", "--steps=2", *flags])
    train.main(["--resume", "--steps=3", f"--out={out}", "--device=cpu"])
    model, about = load_model(out / "model.pt")
    assert (model.config.words, model.config.slots) == (7, 4)
    assert json.loads((out / "report_tf.json").read_text())["steps"] == 3
    capsys.readouterr()
    play = [f"--checkpoint={out / 'model.pt'}", "--frames=6", f"--out={out / 'a.gif'}",
            "--device=cpu"]
    sample.main(play)
    assert "a red cat runs, a dog" in capsys.readouterr().out
    sample.main([*play, "--prompt=Red dog", "--prompt=3: cat"])
    said = capsys.readouterr().out
    assert "red dog" in said and "from 3: cat" in said
    sample.main([f"--checkpoint={out / 'model.pt'}", "--about"])
    assert "words        a cat dog red runs the" in capsys.readouterr().out
    fails_in_one_line(capsys, sample.main, [*play, "--prompt=blue dog"], "blue", "a cat dog red")

    (tmp_path / "clips.txt").write_text("cat\ndog\ncat\ndog\n")
    fails_in_one_line(capsys, train.main, ["--resume", "--steps=4", f"--out={out}",
                                           "--device=cpu"], "cannot resume")
