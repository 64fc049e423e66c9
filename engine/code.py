"""What code a program consists of, as a hash: results that name it need no git to be compared.

The code is the program's file and whatever of this repository it imports, directly or through
others, anywhere in the files. Docstrings, comments and white space are left out, for they
change nothing. tests/test_code.py.
"""

import ast
import hashlib
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent              # the repository


def bare(text: str) -> str:
    """Python without comments, docstrings and white space. (A syntax tree would leave them out,
    too, but looks different in another Python.)"""
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, documented) and ast.get_docstring(node):
            first = node.body[0]
            for number in range(first.lineno, first.end_lineno + 1):
                lines[number - 1] = ""
    return "".join("".join(lines).split())


def imported(path: Path, root: Path = ROOT) -> set[Path]:
    """The files of the repository that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    found = set()
    for name in names:
        for folder in (root, root / "tests"):
            file = folder / (name.replace(".", "/") + ".py")
            if file.is_file():
                found.add(file)
    return found


def files_of(program: Path, root: Path = ROOT) -> list[Path]:
    """The program's file, and all that it needs of this repository."""
    found = set()
    ahead = {program.resolve()}
    while ahead:
        path = ahead.pop()
        found.add(path)
        ahead |= imported(path, root) - found
    return sorted(found)


def code_hash(program: Path, root: Path = ROOT) -> str:
    """Of a program of this repository; "" for any other, e.g. a test runner."""
    program = program.resolve()
    if program.suffix != ".py" or not program.is_relative_to(root):
        return ""
    text = "".join(bare(path.read_text()) for path in files_of(program, root))
    return hashlib.sha256(text.encode()).hexdigest()[:12]
