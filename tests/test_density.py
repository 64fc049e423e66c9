"""No file asks its reader to hold too much in the head at once: a few counts, and a limit for
each kind of file.

The counts are those that made readers of this project stop. They are a check and not the aim: a
line that is split in two at a comma is no clearer.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OPERATIONS = (ast.Call, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Subscript, ast.IfExp, ast.Lambda, ast.ListComp,
              ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Starred, ast.NamedExpr)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
STATEMENTS = (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Return, ast.Expr, ast.Assert, ast.Raise, ast.If, ast.While, ast.For,
              ast.With, ast.Delete)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)

# The book is what a student reads; the annex is everything else.
BOOK = sorted(ROOT.glob("*.py"))
ANNEX = []
for folder in ("engine", "experiments", "exercises", "tests"):
    ANNEX += sorted((ROOT / folder).glob("*.py"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


class Source:
    """A file, its statements, and its docstrings."""

    def __init__(self, path: Path):
        self.text = path.read_text()
        self.lines = self.text.splitlines()
        self.nodes = list(ast.walk(ast.parse(self.text)))
        self.docstrings = []
        for node in self.nodes:
            if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
                self.docstrings.append(node.body[0])

    def statements(self) -> list[ast.stmt]:
        return [node for node in self.nodes if isinstance(node, STATEMENTS) and node not in self.docstrings]

    def share(self, count: int) -> float:
        """A count over 1000 lines."""
        return 1000 * count / len(self.lines)


def own_parts(statement: ast.AST):
    """The expressions of a statement, without the statements inside it."""
    for child in ast.iter_child_nodes(statement):
        if not isinstance(child, (ast.stmt, ast.ExceptHandler)):
            yield child
            yield from own_parts(child)


def operations(statement: ast.stmt) -> int:
    return sum(isinstance(part, OPERATIONS) for part in own_parts(statement))


def operations_per_statement(source: Source) -> float:
    statements = source.statements()
    total = sum(operations(statement) for statement in statements)
    return total / max(1, len(statements))


def wide_share(source: Source) -> float:
    wide = sum(len(line) > 96 for line in source.lines)
    return wide / max(1, len(source.lines))


def unpackings(source: Source, kind) -> int:
    """Assignments to several names of a value of this kind: tuples, or comprehensions."""
    found = 0
    for node in source.statements():
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
            found += isinstance(node.value, kind)
    return found


def nested_comprehensions(source: Source) -> int:
    found = 0
    for outer in source.nodes:
        if isinstance(outer, COMPREHENSIONS):
            inside = [node for node in ast.walk(outer) if isinstance(node, COMPREHENSIONS)]
            found += len(inside) - 1
    return found


def longest_function(source: Source) -> int:
    """Lines of the longest function, its docstring not counted."""
    longest = 0
    for node in source.nodes:
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            first = node.body[0]
            if first in source.docstrings:
                lines -= first.end_lineno - first.lineno + 1
            longest = max(longest, lines)
    return longest


@pytest.mark.parametrize("path", BOOK, ids=name)
def test_the_book_is_read_without_stopping(path):
    source = Source(path)
    kernel = path.name == "fused.py"
    conditions = sum(isinstance(node, ast.IfExp) for node in source.nodes)
    assert operations_per_statement(source) <= (2.2 if kernel else 1.8)
    assert wide_share(source) <= 0.03
    assert unpackings(source, COMPREHENSIONS) == 0
    assert source.share(unpackings(source, ast.Tuple)) <= 8
    assert nested_comprehensions(source) == 0
    assert source.share(conditions) <= 15
    assert longest_function(source) <= (60 if kernel else 40)


@pytest.mark.parametrize("path", ANNEX, ids=name)
def test_the_annex_is_readable(path):
    source = Source(path)
    assert operations_per_statement(source) <= 2.1
    assert wide_share(source) <= 0.05


def test_the_model_and_learning_are_an_evening():
    """Six files, comments included."""
    six = ("rope3d", "cache", "attention", "mla_video", "flow", "objectives")
    lines = sum(len(Source(ROOT / f"{stem}.py").lines) for stem in six)
    assert lines <= 1900


def test_the_counts_count():
    """On two lines of which one is dense."""
    code = ast.parse("a = b\nx, y = (f(c[i]) for i in [j for j in d])")
    plain, dense = code.body
    assert operations(plain) == 0
    assert operations(dense) == 4                          # two comprehensions, a call, a subscript
