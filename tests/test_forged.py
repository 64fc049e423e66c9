"""Checkpoints made by hand by someone who means harm, or knows better than to trust torch.load: each is refused in one line, at once, and no
code of it runs. `play` calls sample.py's main in this process and holds it to that (test_hostile.py).
"""

import io
import pickle
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from test_hostile import good, play, zipped  # noqa: F401  (a fixture is used by its name)


class Code:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Attributes(OrderedDict):
    def __reduce__(self):
        return OrderedDict, (), {"values": 3, "items": 3}


def forged(kind: str, good: bytes):
    content = torch.load(io.BytesIO(good), weights_only=True)
    weights, config, loop = content["model"], content["config"], []
    shape = weights["head.weight"].shape
    loop += [loop] * 10
    if kind == "code":
        content["about"] = Code(exec, "open('owned', 'w').write('code ran')")
    if kind == "code without a zip":
        return pickle.dumps(Code(exec, "open('owned', 'w').write('code ran')"))
    if kind == "a bomb among the allowed calls":
        content["about"] = Code(bytearray, 10**12)
    if kind == "compressed zeros":
        content["about"] = {"zeros": torch.zeros(50_000_000)}
        return zipped(content, zipfile.ZIP_DEFLATED)
    if kind == "one number seen as many":
        weights["head.weight"] = torch.zeros(1).expand(10**6, 10**6)
    if kind == "one tensor under many names":
        content["about"] = {str(i): weights["head.weight"] for i in range(200)}
    if kind == "a list of itself":
        content["about"] = {"data": loop}
    if kind == "a million layers":
        config["layers"] = 10**6
    if kind == "a thousand layers":
        config["layers"] = 1000
    if kind == "a number of 240 digits":
        content = {**content, "config": {**config, "dim": 16**200}}
    if kind == "an endless window":
        config |= dict(height=2**18, width=2**18)
    if kind == "attributes for methods":
        content["model"] = Attributes()
    if kind == "integers":
        weights["head.weight"] = torch.ones(shape, dtype=torch.int64)
    if kind == "complex numbers":
        weights["head.weight"] = torch.ones(shape, dtype=torch.complex64)
    if kind == "sparse":
        weights["head.weight"] = torch.ones(shape).to_sparse()
    if kind == "without memory":
        weights["head.weight"] = torch.ones(shape, device="meta")
    if kind == "nan":
        weights["head.weight"][0, 0] = torch.nan
    if kind == "a flipped bit in a weight":
        at = good.index(weights["head.weight"].add(0).numpy().tobytes()[:64] if weights["head.weight"].any() else
                        weights["embed.weight"].numpy().tobytes()[:64])
        return good[:at + 3] + bytes([good[at + 3] ^ 1]) + good[at + 4:]
    if kind == "longer than its record":
        size = weights["head.weight"].numel()
        content["model"] = {"head.weight": weights["head.weight"]}
        return zipped(content, edit=lambda name, data: data.replace(b"M" + size.to_bytes(2, "little") + b"t", b"J\x00\x00\x00\x40t", 1))
    if kind == "another project's":
        return zipped({"state_dict": weights})
    return content


@pytest.mark.parametrize("kind, word", [
    ("code", "it names"), ("code without a zip", "BadZipFile"), ("a bomb among the allowed calls", "it names"),
    ("compressed zeros", "compressed"), ("one number seen as many", "more numbers"), ("one tensor under many names", "more numbers"),
    ("a list of itself", "more numbers"), ("a million layers", "layers"), ("a thousand layers", "1000 layers"),
    ("a number of 240 digits", "dim"), ("an endless window", "more than a clip"), ("attributes for methods", "plain values"),
    ("integers", "int64"), ("complex numbers", "it names"), ("sparse", "it names"), ("without memory", "it names"),
    ("nan", "NaN"), ("a flipped bit in a weight", "checksum"), ("longer than its record", "not a readable"),
    ("another project's", "lacks")])
def test_a_forged_checkpoint_is_refused(good, tmp_path, monkeypatch, kind, word):
    monkeypatch.chdir(tmp_path)
    content = forged(kind, good)
    start = time.process_time()                            # its own seconds: a busy machine's do not count
    said = play(content)
    assert said and word in said, f"{kind}: expected a refusal with {word!r}, got {said!r}"
    assert not Path("owned").exists(), "code from a checkpoint was executed"
    assert time.process_time() - start < 5, f"{kind}: refused, but only after {time.process_time() - start:.0f} s"


def test_the_untouched_checkpoint_plays(good):
    again = zipped(torch.load(io.BytesIO(good), weights_only=True))
    assert play(good) is None and play(again) is None, "else the refusals above prove nothing"


def test_torch_alone_does_not_see_a_flipped_bit(good, tmp_path):
    """Why checkpoint.py reads the checksums: torch.load does not. If this fails, it does now, and that line may go."""
    (tmp_path / "bad.pt").write_bytes(forged("a flipped bit in a weight", good))
    torch.load(tmp_path / "bad.pt", weights_only=True)
