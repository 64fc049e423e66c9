"""Proof that the proof can fail: break the code on purpose, one line at a time, and see.

Every entry of tests/mutants.py changes one expression or statement in a *copy* of the source
files. The copy is imported, and the very test that guards the shipped code runs on it, with the
very same examples. The mutant must die by an assertion of that test (or by the error that its
entry names). A mutant that survives is a missing test.

A mutant finds its place by syntax: it names a function and gives the piece to be changed as
Python source. Spaces, line breaks, parentheses and comments do not matter. A piece that no
longer occurs exactly once in its function is a stale mutant, and fails too. Try it by hand: make
one of the changes, run pytest, read the message.
"""

import ast
import functools
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from lab import FILES, ROOT, load_from, source_of
from mutants import ARGUMENTS, MUTANTS

# ---- the surgery -----------------------------------------------------------------------------


class Stale(AssertionError):
    """A mutant whose line is not where the mutant says."""


class Place(NamedTuple):
    """A spot of a syntax tree: a field of a node, or entries `field` to `stop` of a list."""
    parent: object
    field: object
    stop: int | None = None

    def put(self, new: list) -> None:
        if self.stop is not None:
            self.parent[self.field:self.stop] = new
        else:
            setattr(self.parent, self.field, new[0])


def tree_of(source: str) -> ast.Module:
    """The syntax of some source. Whether a name is read or assigned to is left out of it."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if hasattr(node, "ctx"):
            node.ctx = ast.Load()
    return tree


def written(nodes: list) -> list[str]:
    """What makes two pieces of syntax the same: everything but their place in the file."""
    return [ast.dump(node) if isinstance(node, ast.AST) else repr(node) for node in nodes]


def pieces(old: str, new: str) -> tuple[list, list]:
    """Old and new: two expressions if both can be read as one, else two lists of statements."""
    old_statements = tree_of(old).body
    new_statements = tree_of(new).body
    both = old_statements + new_statements
    if len(both) == 2 and all(isinstance(statement, ast.Expr) for statement in both):
        return [old_statements[0].value], [new_statements[0].value]
    return old_statements, new_statements


def definitions(tree: ast.AST, name: str) -> list[ast.AST]:
    """All that is defined under a dotted name, such as "Rope3D.table": a property may be
    defined twice, to read and to assign to. For "" the whole module."""
    inside = [tree]
    for part in filter(None, name.split(".")):
        below = [node for outer in inside for node in ast.walk(outer) if node is not outer]
        inside = [node for node in below if getattr(node, "name", None) == part]
    return inside


def places(tree: ast.AST, piece: list) -> list[Place]:
    """Every spot below `tree` that holds the piece."""
    wanted, length, found = written(piece), len(piece), []
    for node in ast.walk(tree):
        for field, value in ast.iter_fields(node):
            if isinstance(value, ast.AST):
                if written([value]) == wanted:
                    found.append(Place(node, field))
            elif isinstance(value, list):
                for start in range(len(value) - length + 1):
                    if written(value[start:start + length]) == wanted:
                        found.append(Place(value, start, start + length))
    return found


def changed(source: str, mutant) -> str:
    """The source with the mutant's change. Stale unless that is possible in exactly one way."""
    tree = tree_of(source)
    where = f"the mutant {mutant.name!r} is stale: `{mutant.old}`"
    inside = definitions(tree, mutant.function)
    if not inside:
        raise Stale(f"{where} should be in {mutant.function} of {mutant.path}, and nothing "
                    f"there has that name. The code moved on: move the mutant to its line")
    old, new = pieces(mutant.old, mutant.new)
    found = [place for definition in inside for place in places(definition, old)]
    if len(found) != 1:
        raise Stale(f"{where} occurs {len(found)} times in {mutant.function or mutant.path}, "
                    f"must be once. The code moved on: move the mutant, or give more of the line")
    if written(old) == written(new):
        raise Stale(f"{where} is replaced by itself: this mutant breaks nothing")
    found[0].put(new)
    return ast.unparse(tree)


def sources() -> list[Path]:
    """The modules under test, from the root: those at the top, and all of the packages."""
    paths = [Path(source_of(module)) for module in FILES if "." not in module]
    packages = {module.split(".")[0] for module in FILES if "." in module}
    for package in sorted(packages):
        paths += [path.relative_to(ROOT) for path in sorted((ROOT / package).glob("*.py"))]
    return paths


@functools.cache
def printed(path: Path) -> str:
    """A file as Python prints its syntax: without comments, and laid out in another way."""
    return ast.unparse(ast.parse((ROOT / path).read_text()))


def copy_of_the_source(folder: Path, mutant=None):
    """The shipped modules as printed, one of them changed: copied and imported."""
    for path in sources():
        source = printed(path)
        if mutant and mutant.path == str(path):
            source = changed(source, mutant)
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(source)
    return load_from(folder)


def check(test, code) -> None:
    """Run a test of another file on `code`, without shrinking what it finds."""
    hunt = getattr(test, "hunt", test)
    hunt(code=code, **ARGUMENTS.get(test, {}))


# ---- the mutants -----------------------------------------------------------------------------


def label(mutant) -> str:
    return re.sub(r"\W+", "-", mutant.name).strip("-")


@pytest.mark.parametrize("mutant", MUTANTS, ids=label)
def test_a_broken_line_is_noticed(mutant, tmp_path):
    code = copy_of_the_source(tmp_path, mutant)
    try:
        check(mutant.test, code)
    except mutant.dies:
        return
    pytest.fail(f"SURVIVED: {mutant.name}. {mutant.function} of {mutant.path} with "
                f"`{mutant.new}` for `{mutant.old}` passes {mutant.test.__name__}: "
                f"that test cannot fail where it should")


GUARDS = sorted({mutant.test for mutant in MUTANTS}, key=lambda test: test.__name__)


@pytest.fixture(scope="module")
def unbroken_copy(tmp_path_factory):
    return copy_of_the_source(tmp_path_factory.mktemp("unbroken"))


@pytest.mark.rest
@pytest.mark.parametrize("test", GUARDS, ids=lambda test: test.__name__)
def test_an_unbroken_copy_passes(test, unbroken_copy):
    """Parsing, printing and importing break nothing: what kills a mutant is its one line."""
    check(test, unbroken_copy)


def test_the_copies_leave_the_shipped_modules_alone(code, tmp_path):
    broken = copy_of_the_source(tmp_path, MUTANTS[0])
    import attention
    assert code.attention is attention
    assert broken.attention is not attention
    assert broken.attention.rotate is broken.rope3d.rotate


# ---- the surgery itself ----------------------------------------------------------------------

PATIENT = '''
class Ring:
    def place(self, frame):
        """(frame - sink) % ring"""
        return self.sink + (frame - self.sink) % self.ring

    def forget(self):
        self.seen = 0
        self.rows = []
'''

LAID_OUT_ANOTHER_WAY = '''
class Ring:

    def place(self,
              frame):
        """(frame - sink) % ring"""
        return (self.sink           # the sink stays
                + (frame  -  self.sink) % (self.ring))

    def forget(self):
        self.seen = 0; self.rows = []
'''

# function, old, new, and what is then to be read in the file
CHANGES = {
    "an expression": ("Ring.place", "frame - self.sink", "frame - 1", "(frame - 1) % self.ring"),
    "a statement": ("Ring.forget", "self.seen = 0", "pass", "pass"),
    "two statements": ("Ring.forget", "self.seen = 0\nself.rows = []", "return 7", "return 7"),
    "anywhere in a module": ("", "frame - self.sink", "frame", "+ frame % self.ring"),
}


def a_mutant(function: str, old: str, new: str):
    return MUTANTS[0]._replace(place="cache:" + function, old=old, new=new)


@pytest.mark.parametrize("change", CHANGES)
def test_a_mutant_finds_its_line_however_that_is_laid_out(change):
    function, old, new, wanted = CHANGES[change]
    broken = changed(PATIENT, a_mutant(function, old, new))
    assert broken == changed(LAID_OUT_ANOTHER_WAY, a_mutant(function, old, new))
    assert wanted in broken and wanted not in ast.unparse(ast.parse(PATIENT))


@pytest.mark.parametrize("function, old, new, message", [
    ("Ring.place", "frame + self.sink", "0", "occurs 0 times"),
    ("Ring.place", "self.sink", "0", "occurs 2 times"),
    ("Ring.forget", "frame - self.sink", "0", "occurs 0 times"),
    ("Ring.remember", "frame - self.sink", "0", "nothing there has that name"),
    ("Ring.place", "frame - self.sink", "(frame   - self.sink)", "breaks nothing")])
def test_a_mutant_that_has_lost_its_line_says_so(function, old, new, message):
    with pytest.raises(Stale, match=message):
        changed(PATIENT, a_mutant(function, old, new))


def test_no_two_mutants_have_one_name():
    names = [label(mutant) for mutant in MUTANTS]
    assert len(set(names)) == len(names)
