"""The batches of a training run, drawn by processes of their own (workers) where one is too slow.

A batch is a function of the number of its step, so it does not matter who draws it. What matters
is how workers end. They leave alone what asks the main process to stop: it saves and ends, and
they end with it (torch's workers look every few seconds whether it is still there). And if one
dies of itself, the main process learns it between two steps, when it can still save.
tests/test_stop.py.
"""

import atexit
import contextlib
import functools
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing import active_children

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from engine import locks
from engine.command_line import STOPS, UserError
from engine.parallel import my_part


# How torch begins to say so: of a worker itself, or of the thread that had to fetch from it.
DIED = ("DataLoader worker (pid", "Pin memory thread exited")


class WorkerDied(UserError):
    """A process that draws clips has died."""


class Batches(Dataset):
    """Clips and captions by the number of their step. It holds no trainer: worker processes
    must not inherit a GPU."""

    def __init__(self, world, batch: int):
        self.world = world
        self.batch = batch
        self.part = my_part(batch)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        clips = range(step * self.batch, (step + 1) * self.batch)
        return self.world.batch(clips[self.part])


def batches(world, batch: int, steps: range, workers: int, pin: bool) -> Iterator:
    """(clips, captions) of these steps, in their order. WorkerDied if a worker has died."""
    loader = DataLoader(
        Batches(world, batch), batch_size=None, sampler=steps, num_workers=workers,
        pin_memory=pin, worker_init_fn=begin_worker)
    if workers == 0:
        yield from loader
        return
    others = set(active_children())
    with no_news_of_children() as listen_no_more:
        with held_back(STOPS):
            drawn = iter(loader)
        listen_no_more()
        # They ignore the signal by which multiprocessing would end them.
        end_mine = functools.partial(end, set(active_children()) - others)
        atexit.register(end_mine)
        try:
            while (part := fetch(drawn)) is not None:
                yield part
        finally:
            del drawn                      # torch asks them to end, and waits
            end_mine()                     # but not if a traceback has them yet
            atexit.unregister(end_mine)


def fetch(drawn: Iterator) -> tuple[Tensor, Tensor] | None:
    """The next batch, or None after the last."""
    try:
        return next(drawn, None)
    except RuntimeError as error:
        if not str(error).startswith(DIED):
            raise                                          # a mistake in the world
        raise WorkerDied(f"a process that draws clips has died ({error})") from error


def end(workers: set) -> None:
    """They have nothing to lose."""
    for worker in workers:
        worker.kill()
        worker.join()


def begin_worker(worker: int) -> None:
    """What a worker does first."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    locks.let_go()
    torch.set_num_threads(1)


@contextlib.contextmanager
def held_back(numbers: list[int]) -> Iterator[None]:
    """Within it these signals wait; and a process that is started in it never gets them. A
    worker is safe so before it can say that it ignores them."""
    if not hasattr(signal, "pthread_sigmask"):             # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def no_news_of_children() -> Iterator[Callable]:
    """Torch tells of a dead worker from a signal handler, which is in the middle of a step.
    Without that handler it tells when the next batch is asked for. Yields a function that takes
    the handler away, for when torch has set it."""
    main = threading.current_thread() is threading.main_thread()
    mine = main and hasattr(signal, "SIGCHLD")             # Windows has none
    before = signal.getsignal(signal.SIGCHLD) if mine else None

    def listen_no_more() -> None:
        if before is not None:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    try:
        yield listen_no_more
    finally:
        if before is not None:
            signal.signal(signal.SIGCHLD, before)
