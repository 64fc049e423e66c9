"""Two processes, or two threads, never write to one --out; and no dead one stops the living."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest

import train
from engine import locks
from engine.command_line import UserError
from engine.locks import lock

ROOT = Path(__file__).parent.parent
SIZES = dict(dim=32, layers=1, heads=2, latent=8, query_latent=16, rope=6, ffn=32)
FLAGS = [f"--config={name}={size}" for name, size in SIZES.items()]
FLAGS += ["--batch=2", "--evaluate=0", "--device=cpu", "--steps=2"]

HOLD = """
import sys, time
from pathlib import Path
from engine.locks import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process, which has the lock of tmp_path."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def refused(folder: Path, *file: str) -> str:
    with pytest.raises(UserError) as error, lock(folder, *file):
        pytest.fail("two had the same lock")
    return str(error.value)


def test_who_comes_second_learns_who_is_there(tmp_path, holder):
    said = refused(tmp_path)
    assert str(holder.pid) in said and str(tmp_path) in said and "--out" in said
    with lock(tmp_path, "video.gif"):                      # one file is not the folder
        assert "video.gif" in refused(tmp_path, "video.gif")


def test_a_second_trainer_is_refused_in_one_line(tmp_path, holder, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main([*FLAGS, f"--out={tmp_path}"])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1, lines
    assert str(holder.pid) in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == [".lock"], "it wrote all the same"


def test_what_a_killed_process_leaves_stops_nobody(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / ".lock").exists()
    with lock(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"
    assert not list(tmp_path.iterdir())


def test_threads_are_kept_apart_too(tmp_path):
    found = []
    with lock(tmp_path):
        thread = threading.Thread(target=lambda: found.append(refused(tmp_path)))
        thread.start()
        thread.join()
    assert str(os.getpid()) in found[0]


def test_a_folder_that_stays_empty_goes_again(tmp_path):
    deep = tmp_path / "a/b"
    with lock(deep):
        assert deep.is_dir()
    assert not list(tmp_path.iterdir())
    with lock(deep):
        (deep / "file").touch()
    assert [path.name for path in deep.iterdir()] == ["file"]
    with pytest.raises(UserError), lock(Path("no\0path")):
        pytest.fail("this is no path")


def stay(let_go: bool, ready, end) -> None:
    """A worker of a process that has a lock."""
    if let_go:
        locks.let_go()
    ready.set()
    end.wait()


@pytest.mark.parametrize("let_go", [True, False])
def test_a_worker_that_outlives_its_process_does_not_keep_the_lock(tmp_path, let_go):
    """Without `let_go` it would: that is shown, too."""
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    end = fork.Event()
    with lock(tmp_path):
        worker = fork.Process(target=stay, args=(let_go, ready, end))
        worker.start()
        ready.wait()
        (held,) = locks.HELD
        held.close()                                       # as if this process had been killed
        locks.HELD.clear()
    if let_go:
        with lock(tmp_path):
            pass
    else:
        refused(tmp_path)
    end.set()
    worker.join()


def test_windows_locks_a_byte(tmp_path, monkeypatch):
    """Its module for that is played by one that knows what is locked."""
    locked = set()

    def locking(descriptor, mode, count):
        place = os.fstat(descriptor).st_ino, os.lseek(descriptor, 0, os.SEEK_CUR), count
        if place in locked:
            raise PermissionError(13, "Permission denied")
        locked.add(place)

    module = types.SimpleNamespace(locking=locking, LK_NBLCK=2)
    monkeypatch.setattr(locks, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", module)
    with lock(tmp_path):
        assert str(os.getpid()) in refused(tmp_path)
        assert [place for _, place, _ in locked] == [locks.BEYOND]


def test_a_file_system_without_locks_is_used_without(tmp_path, monkeypatch):
    def flock(*arguments):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with lock(tmp_path):
        assert (tmp_path / ".lock").exists()
