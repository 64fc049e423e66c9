"""Checkpoints made by hand by someone who means harm, or knows better than to trust torch.load:
each is refused in one line, at once, and no code of it runs. `play` calls sample.py's main in
this process and holds it to that (test_hostile.py).
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

pytestmark = pytest.mark.rest             # pytest.ini says what that means

HARM = "open('owned', 'w').write('code ran')"


class Code:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Attributes(OrderedDict):
    def __reduce__(self):
        return OrderedDict, (), {"values": 3, "items": 3}


# ---- whole files -----------------------------------------------------------------------------

def code_without_a_zip(content: dict, good: bytes) -> bytes:
    return pickle.dumps(Code(exec, HARM))


def compressed_zeros(content: dict, good: bytes) -> bytes:
    content["about"] = {"zeros": torch.zeros(50_000_000)}
    return zipped(content, zipfile.ZIP_DEFLATED)


def a_flipped_bit(content: dict, good: bytes) -> bytes:
    weights = content["model"]
    weight = weights["head.weight"]
    if not weight.any():                           # a new model's head is zero: not to be found
        weight = weights["embed.weight"]
    at = good.index(weight.numpy().tobytes()[:64])
    return good[:at + 3] + bytes([good[at + 3] ^ 1]) + good[at + 4:]


def longer_than_its_record(content: dict, good: bytes) -> bytes:
    head = content["model"]["head.weight"]
    content["model"] = {"head.weight": head}
    # In the pickle the numbers of a storage are counted in two bytes (opcode M) or in four (J).
    said = b"M" + head.numel().to_bytes(2, "little") + b"t"
    claim = b"J\x00\x00\x00\x40t"
    return zipped(content, edit=lambda name, data: data.replace(said, claim, 1))


def anothers_project(content: dict, good: bytes) -> bytes:
    return zipped({"state_dict": content["model"]})


FILES = {"code without a zip": code_without_a_zip, "compressed zeros": compressed_zeros,
         "a flipped bit in a weight": a_flipped_bit,
         "longer than its record": longer_than_its_record,
         "another project's": anothers_project}


# ---- right files with wrong content ----------------------------------------------------------

def forge_content(kind: str, content: dict) -> None:
    weights = content["model"]
    config = content["config"]
    head = weights["head.weight"]
    if kind == "code":
        content["about"] = Code(exec, HARM)
    if kind == "a bomb among the allowed calls":
        content["about"] = Code(bytearray, 10**12)
    if kind == "one number seen as many":
        weights["head.weight"] = torch.zeros(1).expand(10**6, 10**6)
    if kind == "one tensor under many names":
        content["about"] = {str(i): head for i in range(200)}
    if kind == "a list of itself":
        loop = []
        loop += [loop] * 10
        content["about"] = {"data": loop}
    if kind == "a million layers":
        config["layers"] = 10**6
    if kind == "a thousand layers":
        config["layers"] = 1000
    if kind == "a number of 240 digits":
        config["dim"] = 16**200
    if kind == "an endless window":
        config["height"] = 2**18
        config["width"] = 2**18
    if kind == "attributes for methods":
        content["model"] = Attributes()
    if kind == "integers":
        weights["head.weight"] = torch.ones(head.shape, dtype=torch.int64)
    if kind == "complex numbers":
        weights["head.weight"] = torch.ones(head.shape, dtype=torch.complex64)
    if kind == "sparse":
        weights["head.weight"] = torch.ones(head.shape).to_sparse()
    if kind == "without memory":
        weights["head.weight"] = torch.ones(head.shape, device="meta")
    if kind == "nan":
        head[0, 0] = torch.nan


def forged(kind: str, good: bytes) -> bytes | dict:
    content = torch.load(io.BytesIO(good), weights_only=True)
    if kind in FILES:
        return FILES[kind](content, good)
    forge_content(kind, content)
    return content


@pytest.mark.parametrize("kind, word", [
    ("code", "it names"),
    ("code without a zip", "BadZipFile"),
    ("a bomb among the allowed calls", "it names"),
    ("compressed zeros", "compressed"),
    ("one number seen as many", "more numbers"),
    ("one tensor under many names", "more numbers"),
    ("a list of itself", "more numbers"),
    ("a million layers", "layers"),
    ("a thousand layers", "1000 layers"),
    ("a number of 240 digits", "dim"),
    ("an endless window", "more than a clip"),
    ("attributes for methods", "plain values"),
    ("integers", "int64"),
    ("complex numbers", "it names"),
    ("sparse", "it names"),
    ("without memory", "it names"),
    ("nan", "NaN"),
    ("a flipped bit in a weight", "checksum"),
    ("longer than its record", "not a readable"),
    ("another project's", "lacks"),
])
def test_a_forged_checkpoint_is_refused(good, tmp_path, monkeypatch, kind, word):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    content = forged(kind, good)
    start = time.process_time()            # its own seconds: a busy machine's do not count
    said = play(content)
    assert said and word in said, f"{kind}: expected a refusal with {word!r}, got {said!r}"
    assert not Path("owned").exists(), "code from a checkpoint was executed"
    seconds = time.process_time() - start
    assert seconds < 5, f"{kind}: refused, but only after {seconds:.0f} s"


def test_the_untouched_checkpoint_plays(good):  # noqa: F811
    again = zipped(torch.load(io.BytesIO(good), weights_only=True))
    assert play(good) is None, "else the refusals above prove nothing"
    assert play(again) is None, "else the refusals above prove nothing"


def test_torch_alone_does_not_see_a_flipped_bit(good, tmp_path):  # noqa: F811
    """Why engine/checkpoint.py reads the checksums: torch.load does not. If this fails, it does
    now, and that line may go."""
    (tmp_path / "bad.pt").write_bytes(forged("a flipped bit in a weight", good))
    torch.load(tmp_path / "bad.pt", weights_only=True)
