"""Which code drew a picture, and from which results: a short text inside the picture.

So no picture grows old in silence. Hashed are the text of the drawing functions and the results
that they drew, as canonical JSON. Docstrings, comments and white space are left out of the
text, for they age nothing. (A syntax tree would leave them out, too, but looks different in
another Python.) tests/test_repo.py: every picture in results/ was drawn by today's code, from
the results that lie beside it.
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
from typing import NamedTuple


class Stamp(NamedTuple):
    module: str                # of the drawing functions, by its file
    functions: list[str]
    code: str                  # hash of what they say
    data: str                  # hash of what they drew


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def code_hash(*functions) -> str:
    texts = [bare(function) for function in functions]
    return digest("".join(texts).encode())


def bare(function) -> str:
    """What a function does, as text without comments, docstring and white space."""
    text = textwrap.dedent(inspect.getsource(function))
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    node = ast.parse(text).body[0]
    if ast.get_docstring(node):
        docstring = node.body[0]
        del lines[docstring.lineno - 1:docstring.end_lineno]
    return "".join("".join(lines).split())


def data_hash(data) -> str:
    as_read = json.loads(json.dumps(data))     # tuples are lists by then, keys strings
    return digest(json.dumps(as_read, sort_keys=True).encode())


def stamp(data, *functions) -> str:
    """The text "module:function,function=hash data=hash".

    The module is named by its file, because a program that runs is called __main__.
    """
    module = Path(inspect.getfile(functions[0])).stem
    names = ",".join(function.__name__ for function in functions)
    return f"{module}:{names}={code_hash(*functions)} data={data_hash(data)}"


def read_stamp(path: Path) -> Stamp | None:
    """The stamp of a PNG or a GIF, which keep such a text as it is. None if it has none."""
    pattern = r"drawn_by[\0 ](\w+):([\w,]+)=(\w+) data=(\w{12})"
    found = re.search(pattern, path.read_bytes().decode("latin-1"), re.ASCII)
    if found is None:
        return None
    module, functions, code, data = found.groups()
    return Stamp(module, functions.split(","), code, data)
