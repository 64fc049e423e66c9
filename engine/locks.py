"""One process at a time writes to an --out.

A lock is a file ".lock" that the operating system holds for the process that has it, and lets
go of when that process ends, however it ends. So what a dead process leaves behind stops nobody.
In the file stands the process' number, for whoever is refused. tests/test_locks.py.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from engine.command_line import UserError, as_user_error

try:
    import fcntl
except ImportError:                                        # Windows
    fcntl = None

# What the system says if another process has the lock. Anything else says that this file system
# has no locks: then there is none, as it was before.
TAKEN = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)
BEYOND = 2**30                 # Windows locks bytes, and nobody may read those: none of ours

HELD: set[TextIO] = set()      # the locks of this process


@contextlib.contextmanager
def lock(folder: Path, file: str = "") -> Iterator[None]:
    """Within it no other process, and no other thread, has this lock: that of the whole folder,
    or of one file in it.

    UserError with the number of the process that has it. A folder that is missing is made, and
    taken away again if nothing was written into it.
    """
    path = folder / f".{file}.lock" if file else folder / ".lock"
    with as_user_error():                                  # it may be no path at all
        made = _make(folder)
    try:
        held = _take(path, folder / file)
        try:
            yield
        finally:
            _give_back(held, path)
    finally:
        for empty in made:
            with contextlib.suppress(OSError):             # it is not empty, or gone
                empty.rmdir()


def let_go() -> None:
    """A process that was forked has its parent's locks, too, and would keep them if the parent
    died. Closing them here takes nothing from the parent."""
    for held in HELD:
        held.close()
    HELD.clear()


def _make(folder: Path) -> list[Path]:
    """Make a folder; returns those that were made, the innermost first."""
    missing = [part for part in (folder, *folder.parents) if not part.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _take(path: Path, what: Path) -> TextIO:
    while True:
        held = open(path, "a+")
        try:
            _ask_system(held)
        except OSError as error:
            if error.errno in TAKEN:
                _refuse(held, what)
        if _is_still(path, held):
            break
        held.close()                       # its owner took it away a moment ago: a new one
    held.truncate(0)
    print(os.getpid(), file=held, flush=True)
    HELD.add(held)
    return held


def _ask_system(held: TextIO) -> None:
    if fcntl:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    import msvcrt
    os.lseek(held.fileno(), BEYOND, os.SEEK_SET)
    msvcrt.locking(held.fileno(), msvcrt.LK_NBLCK, 1)


def _refuse(held: TextIO, what: Path) -> None:
    held.seek(0)
    number = held.read(20).strip() or "unknown"
    held.close()
    raise UserError(f"another process (number {number}) is writing to {what}: wait until it "
                    "ends, or choose another --out")


def _is_still(path: Path, held: TextIO) -> bool:
    try:
        return os.path.samestat(os.fstat(held.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _give_back(held: TextIO, path: Path) -> None:
    """The file first: as long as it is locked, nobody else can take it for a lock of theirs."""
    if held not in HELD:                                   # `let_go` closed it
        return
    HELD.remove(held)
    with contextlib.suppress(OSError):                     # Windows keeps what is open
        path.unlink()
    held.close()
