"""What the command lines share: errors, signals, the device, and where figures come from.

Two kinds of mistake are kept apart. What a user can mend (a flag, a file, a full disk) is said
in one line, exit code 2: it is a `UserError`, or one of `MENDABLE`. A mistake in the program
itself, e.g. in a model that somebody is changing, is any other exception, and ends in a
traceback, exit code 1. So a ValueError is turned into a `UserError` where input is read
(`as_user_error`), and never where the model runs. tests/test_cli.py holds both sides of this.
"""

import argparse
import contextlib
import math
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from engine.code import ROOT, code_hash


# ---- errors ----------------------------------------------------------------------------------

class UserError(ValueError):
    """Something that whoever typed the command can mend. Its text is the one line to say."""


# Besides wrong input: no such file, a full disk, an optional package, too little memory.
MENDABLE = (UserError, OSError, ModuleNotFoundError, MemoryError, torch.OutOfMemoryError)


@contextlib.contextmanager
def as_user_error() -> Iterator[None]:
    """Within it input is read, so a ValueError is about that input: it becomes a
    `UserError`."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


def check_bounds(args: argparse.Namespace, **bounds: tuple[float, float]) -> None:
    """UserError unless every flag that was given lies within its (lowest, highest) value."""
    for name, (low, high) in bounds.items():
        value = getattr(args, name)
        if value is None or low <= value <= high:
            continue
        flag = "--" + name.replace("_", "-")
        raise UserError(f"{flag} must be at least {low} and at most {high}, got {value}")


# ---- running ---------------------------------------------------------------------------------

def read_flags(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """What the parser makes of `argv` (None: the process' own), and in `given` the names of the
    flags that stand in it: their values are asked for, the others are defaults."""
    args = parser.parse_args(argv)
    # argparse writes a default only where nothing stands yet.
    blank = argparse.Namespace(**dict.fromkeys(vars(args)))
    found = vars(parser.parse_args(argv, blank))
    args.given = {name for name, value in found.items() if value is not None}
    return args


def run(action: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """action(args) as a command line.

    Its reader may stop early (`| head`); the program then ends without a word.

    What is `MENDABLE` is said in one line, exit code 2. What asks it to stop (`STOPS`) is no
    error: it raises a KeyboardInterrupt of the signal's number and, if there is more to say, a
    line. The exit code is then 128 + the number, as shells count. Anything else is a mistake in
    the program, and keeps its traceback.
    """
    def stop(number, frame):
        raise KeyboardInterrupt(number)

    _acted[0] = -math.inf
    with on_stop(stop):
        try:
            action(args)
            sys.stdout.flush()                 # a reader's end shows here, and not at exit
        except BrokenPipeError:
            if not reader_is_gone():           # but a worker's, say: that is a mistake
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(128 + 13)                 # as if by SIGPIPE, which Windows has not
        except MENDABLE as error:
            words = str(error).split() or ["out", "of", "memory"]  # a MemoryError says nothing
            tell("error: " + " ".join(words))              # in one line, whatever it quotes
            sys.exit(2)
        except KeyboardInterrupt as stopped:
            number, *words = stopped.args or (signal.SIGINT,)
            tell("\n" + "; ".join(["stopped", *words]))
            sys.exit(128 + number)


def reader_is_gone() -> bool:
    """Has whoever read this program's output enough of it (`| head`)? Its pipe then is at an
    error, which a poll tells; where there is none (Windows), no other pipe is thought of."""
    if not hasattr(select, "poll"):
        return True
    watch = select.poll()
    watch.register(sys.stdout, 0)              # errors are told unasked
    return bool(watch.poll(0))


def tell(line: str) -> None:
    """Print to stderr; nothing happens if nobody is there any more."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


# ---- signals ---------------------------------------------------------------------------------

# What asks a process to end: Ctrl-C; `timeout`, schedulers and containers; a terminal that
# closes. (Windows has no SIGHUP.)
STOPS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGHUP"):
    STOPS.append(signal.SIGHUP)
TOGETHER = 1.0                 # seconds, within which signals are one request
_acted = [-math.inf]           # when a signal was last acted on


@contextlib.contextmanager
def on_stop(handler: Callable) -> Iterator[None]:
    """Within it handler(number, frame) is called for signals of `STOPS`.

    A second one within a second is the same request: `timeout` sends SIGTERM twice, and so do
    torchrun and its scheduler. What the process was told to ignore (by nohup) stays ignored.
    Only a program's main thread may handle signals: in another nothing is changed, since they
    are the business of whoever started it.
    """
    def once(number, frame):
        now = time.monotonic()
        if now - _acted[0] >= TOGETHER:
            _acted[0] = now
            handler(number, frame)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in STOPS:
            # None is a handler that Python did not set, and could not set again.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, once)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextlib.contextmanager
def between_steps() -> Iterator[list[int]]:
    """Within it whatever asks to stop waits until a training step is whole: weights saved at
    once would be half-way between two steps. Yields the list of signals so far. A second
    request does not wait."""
    asked = []

    def ask(number, frame):
        if asked:
            raise KeyboardInterrupt(number)
        asked.append(number)

    with on_stop(ask):
        yield asked


# ---- the device ------------------------------------------------------------------------------

def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def pick_device(name: str) -> torch.device:
    """The device of that name; UserError if there is none."""
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        why = str(error).split(". ")[0].splitlines()[0]    # torch has a page to say of some
        raise UserError(f"no device {name[:40]!r} here: {why[:150]}") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"{name!r} is no device that this program runs on; "
                        "give cpu, cuda, cuda:N or mps")
    if device.type == "cpu":
        return torch.device("cpu")                         # "cpu:1" is the same one
    return device


@contextlib.contextmanager
def repeatable(asked: bool, device: torch.device) -> Iterator[None]:
    """Within it, if asked, torch takes only algorithms that give the same bits every time;
    UserError where an operation has none.

    Data and noise depend on (seed, step) alone. What is left is the order in which threads add.
    On a GPU that matters in index_add and its kind, and in attention's backward pass, where
    torch now takes flash or memory-efficient attention in their ordered form, never cuDNN's. On
    a CPU the order is that of the threads, so their number must be the same.
    """
    if not asked:
        yield
        return
    if device.type == "mps":
        raise UserError("--deterministic is for cpu and cuda: "
                        "Apple's MPS makes no such promise")
    if device.type == "cuda":
        _order_cublas()
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if "determinis" not in str(error).lower():
            raise
        operation = str(error).split(". ")[0]              # the first sentence names it
        raise UserError(f"--deterministic cannot be kept on this {device.type}: "
                        f"{operation}") from error
    finally:
        torch.use_deterministic_algorithms(before)


def _order_cublas() -> None:
    """cuBLAS adds in an order that depends on its scratch memory. It reads the size of that
    from the environment when it starts, which is at the first product: after this call."""
    ordered = (":4096:8", ":16:8")
    size = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ordered[0])
    if size not in ordered:
        raise UserError("--deterministic needs the environment's CUBLAS_WORKSPACE_CONFIG to be "
                        f"{' or '.join(ordered)}, or not set; it is {size!r}")


# ---- where figures come from -----------------------------------------------------------------

def provenance(device: torch.device) -> dict[str, str]:
    """Command, commit, device and versions: they go into every file of results/. And a hash of
    the program's code (engine/code.py), which says whether today's would make the same."""
    python = sys.version.split()[0]
    return {"command": _command(),
            "commit": _commit() or "not in a git checkout",
            "code": code_hash(Path(sys.argv[0])),
            "device": _device_name(device),
            "versions": f"torch {torch.__version__}, numpy {np.__version__}, Python {python}"}


def _command() -> str:
    """The command line as one would type it in the root of the repository."""
    arguments = [_portable(argument) for argument in sys.argv[1:]]
    spec = sys.modules["__main__"].__spec__                # set by `python -m`
    if spec:
        return " ".join(["python", "-m", spec.name, *arguments])
    return " ".join(["python", _portable(str(Path(sys.argv[0]).resolve())), *arguments])


def _portable(argument: str) -> str:
    """A whole path within the repository from its root on; of one elsewhere the name alone.

    Where the folders of a machine lie says nothing to others. `--flag=PATH` likewise.
    """
    flag, equals, value = argument.rpartition("=")
    path = Path(value)
    if not path.is_absolute():
        return argument
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
    return f"{flag}{equals}{shown}"


def _commit() -> str:
    """The commit that runs, "-dirty" if files differ from it; "" where nothing tells.

    A copy of the tree has no git: then the environment's COMMIT names it, or the file that
    `git archive` fills in. They come first, since a copy may lie in another's checkout.
    """
    commit = os.environ.get("COMMIT", "") or _archived((ROOT / "engine/commit.txt").read_text())
    if commit or not shutil.which("git"):
        return commit
    question = ["git", "describe", "--always", "--dirty"]
    answer = subprocess.run(question, cwd=ROOT, capture_output=True, text=True)
    return answer.stdout.strip()


def short_commit(commit: str) -> str:
    """A whole hash as git abbreviates it; anything else as it is."""
    return commit[:7] if len(commit) == 40 else commit


def _archived(text: str) -> str:
    """The commit in a file that `git archive` has filled in; "" as it lies in a checkout."""
    words = text.split()
    return "" if "Format" in text or not words else words[-1]


def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{os.cpu_count()} CPU cores"
    return torch.cuda.get_device_name(device).replace("NVIDIA ", "").replace(" HBM3", "")
