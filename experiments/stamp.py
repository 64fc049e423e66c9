"""Which code drew a picture, and from which results: a short text inside the picture, so that none grows old in silence.

Hashed are the drawing functions without docstrings, comments and white space, which age nothing (not syntax trees: those look different in
another Python), and the results as canonical JSON. tests/test_repo.py: every picture in results/ is of today's drawing code and of the
results that lie beside it.
"""

import ast
import hashlib
import inspect
import io
import json
import re
import textwrap
import tokenize
from pathlib import Path


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def code_hash(*functions) -> str:
    return digest("".join(map(bare, functions)).encode())


def bare(function) -> str:
    """What a function does, as text."""
    text = textwrap.dedent(inspect.getsource(function))
    lines, node = text.splitlines(), ast.parse(text).body[0]
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0] - 1] = lines[token.start[0] - 1][:token.start[1]]
    if ast.get_docstring(node):
        del lines[node.body[0].lineno - 1:node.body[0].end_lineno]
    return "".join("".join(lines).split())


def data_hash(data) -> str:
    return digest(json.dumps(json.loads(json.dumps(data)), sort_keys=True).encode())


def stamp(data, *functions) -> str:
    """"module:function,function=hash data=hash"; by its file, as a program that runs is called __main__."""
    name = Path(inspect.getfile(functions[0])).stem
    return f"{name}:{','.join(function.__name__ for function in functions)}={code_hash(*functions)} data={data_hash(data)}"


def read_stamp(path: Path) -> tuple[str, list[str], str, str] | None:
    """(module, functions, hash of their code, hash of the data) of a stamped PNG or GIF. Both keep such a text as it is."""
    found = re.search(rb"drawn_by[\0 ](\w+):([\w,]+)=(\w+) data=(\w{12})", path.read_bytes())
    if found:
        module, functions, code, data = (part.decode() for part in found.groups())
        return module, functions.split(","), code, data
