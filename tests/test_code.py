"""The hash of a program's code changes with its code, and with nothing else."""

from pathlib import Path

from engine.code import code_hash, files_of
from engine.command_line import _archived

ROOT = Path(__file__).parent.parent


def program(folder: Path, body: str, helper: str = "x = 1") -> str:
    (folder / "helper.py").write_text(helper + "\n")
    (folder / "main.py").write_text(f"import helper\n{body}\n")
    (folder / "other.py").write_text("nobody = 'imports this'\n")
    return code_hash(folder / "main.py", folder)


def test_comments_and_docstrings_change_nothing(tmp_path):
    plain = program(tmp_path, "def f():\n    return 1")
    spoken = program(tmp_path, "def f():\n    'says so'\n    return 1  # why", "# y\nx  =  1")
    assert plain == spoken


def test_code_changes_it_wherever_it_stands(tmp_path):
    plain = program(tmp_path, "y = 1")
    assert program(tmp_path, "y = 2") != plain
    assert program(tmp_path, "y = 1", "x = 2") != plain, "what it imports counts"
    program(tmp_path, "y = 1")
    other = tmp_path / "other.py"
    other.write_text("z = 2\n")
    main = tmp_path / "main.py"
    assert code_hash(main, tmp_path) == plain


def test_a_program_of_this_repository_has_its_model_in_it():
    found = files_of(ROOT / "train.py")
    for name in ("train.py", "attention.py", "engine/muon.py"):
        assert ROOT / name in found
    folders = {path.parent.name for path in found}
    assert not folders & {"tests", "experiments"}


def test_what_is_no_program_of_ours_has_none(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("x = 1\n")
    assert code_hash(mine) == ""
    assert code_hash(Path("pytest")) == ""


def test_an_archive_names_its_commit():
    assert _archived("$" + "Format:%h$\n") == ""
    assert _archived("1234abc\n") == "1234abc"
