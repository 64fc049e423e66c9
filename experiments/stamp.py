"""Which code drew a picture, and from which results: a short text inside the picture, so that none grows old in silence.

Hashed are the *syntax trees* of the drawing functions, without docstrings (a comment or a line break ages nothing), and the results as
canonical JSON. tests/test_repo.py: every picture in results/ is of today's drawing code and of the results that lie beside it.
"""

import ast
import hashlib
import inspect
import json
import re
import textwrap
from pathlib import Path


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def code_hash(*functions) -> str:
    trees = [ast.parse(textwrap.dedent(inspect.getsource(function))).body[0] for function in functions]
    for tree in trees:
        tree.body = tree.body[1:] if ast.get_docstring(tree) else tree.body
    return digest("".join(map(ast.dump, trees)).encode())


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
