"""Asked to stop in every way there is, with processes that draw clips: nothing is lost, and the
user reads what is saved and how to go on. (Stops by the dozen: `python tests/kill.py --kills 20
--signal TERM --workers 2`.)"""

import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path

import pytest

import sample
import train
from engine import command_line
from engine.checkpoint import read_checkpoint, save_model
from engine.command_line import STOPS, between_steps, on_stop, run
from engine.loader import Batches
from mla_video import PRESETS, VideoDiT
from test_progress import set_width
from test_resume import same, saved
from toy_data import WORDS

ROOT = Path(__file__).parent.parent
SIZES = dict(dim=32, layers=1, heads=2, latent=8, query_latent=16, rope=6, ffn=32)
SMALL = [f"--config={name}={size}" for name, size in SIZES.items()]
FLAGS = [*SMALL, "--batch=2", "--evaluate=0", "--device=cpu"]
ENDLESS = [sys.executable, "train.py", *FLAGS, "--steps=100000", "--workers=2"]


def saved_step(out: Path) -> int:
    return read_checkpoint(out / "train.pt", {"step"})["step"]


# ---- the whole group -------------------------------------------------------------------------

def begin(out: Path, **how) -> subprocess.Popen:
    """A training run in a process group of its own, with workers, a few steps after its start."""
    process = subprocess.Popen([*ENDLESS, f"--out={out}"], cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True, start_new_session=True, **how)
    line = process.stderr.readline()
    assert "/100000" in line, line
    time.sleep(0.5)
    return process


def wait_for_group(group: int) -> None:
    """Until no process of it is left: torch's workers look every five seconds."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("a worker outlives the main process")


@pytest.mark.rest
@pytest.mark.parametrize("number", STOPS)
def test_a_signal_to_the_process_group_saves_and_says_so(tmp_path, number):
    """As `timeout`, schedulers, containers and terminals send it: to every process."""
    process = begin(tmp_path)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    step = saved_step(tmp_path)
    assert step > 0 and "Traceback" not in errors
    assert errors.endswith(f"\nstopped; saved at step {step}; go on with: python train.py "
                           f"--resume --out {tmp_path}\n"), errors
    wait_for_group(process.pid)


@pytest.mark.rest
def test_workers_die_with_the_main_process(tmp_path):
    process = begin(tmp_path)
    process.kill()
    process.communicate()
    train.main(["--resume", f"--out={tmp_path}", "--steps=1", "--evaluate=0"])  # lock is free
    wait_for_group(process.pid)


@pytest.mark.rest
def test_what_nohup_ignores_stays_ignored(tmp_path):
    def ignore():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    process = begin(tmp_path, preexec_fn=ignore)
    os.killpg(process.pid, signal.SIGHUP)
    time.sleep(2)
    assert process.poll() is None, "nohup did not help"
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM


@pytest.mark.rest
@pytest.mark.parametrize("width", [0, 80])
def test_a_terminal_that_closes_costs_nothing(tmp_path, width):
    """SIGHUP comes, and whatever is written from then on fails: lines, or a bar."""
    child, terminal = pty.fork()
    if not child:
        os.chdir(ROOT)
        os.execv(sys.executable, [*ENDLESS, f"--out={tmp_path}"])
    set_width(terminal, width)
    said = b""
    while b"/100000" not in said:
        assert select.select([terminal], [], [], 60)[0], said
        said += os.read(terminal, 10_000)
    time.sleep(0.5)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert saved_step(tmp_path) > 0
    assert os.WIFEXITED(status) and os.WEXITSTATUS(status) in (128 + signal.SIGHUP, 120)


# ---- a worker that dies ----------------------------------------------------------------------

DEADLY = """
import os, signal, sys
import train
from engine.loader import Batches

main = os.getpid()
plain = Batches.__getitem__
plain_update = train.Trainer.update

def draw(self, step):
    if step == 5 and os.getpid() != main:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, step)

def update(self, *batch):
    loss = plain_update(self, *batch)
    print("made", self.step)
    return loss

Batches.__getitem__ = draw
train.Trainer.update = update
train.main(sys.argv[1:])
"""


@pytest.mark.rest
def test_a_worker_that_dies_costs_no_step(tmp_path):
    """One line; every step that was made is saved, and the run that goes on ends where an
    unbroken one does. (What the worker has drawn and not delivered goes with it: not every batch
    before the fifth need be trained on.)"""
    parts = tmp_path / "parts"
    flags = [*FLAGS, "--steps=8"]
    ended = subprocess.run([sys.executable, "-c", DEADLY, *flags, "--workers=1",
                            f"--out={parts}"], cwd=ROOT, capture_output=True, text=True)
    said = [line for line in ended.stderr.splitlines() if "training tf" not in line]
    assert ended.returncode == 2 and len(said) == 1, ended
    made = ended.stdout.count("made ")
    assert saved_step(parts) == made <= 5, ended
    for words in ("has died", f"saved at step {made}; go on with", "--workers 0"):
        assert words in said[0], said
    train.main(["--resume", f"--out={parts}", "--workers=0"])
    train.main([*flags, f"--out={tmp_path / 'whole'}"])
    assert same(saved(tmp_path / "whole"), saved(parts))


def test_a_mistake_in_a_worker_is_a_mistake(tmp_path, monkeypatch):
    """And its traceback, which refers to everything, keeps no worker alive."""
    def draw(self, step):
        raise RuntimeError("a mistake in the world")

    monkeypatch.setattr(Batches, "__getitem__", draw)
    with pytest.raises(RuntimeError, match="a mistake in the world") as error:
        train.main([*FLAGS, "--steps=2", "--workers=2", f"--out={tmp_path}"])
    assert not active_children(), f"they outlive {error}"


FORGETS = """
from engine.loader import batches
from toy_data import make_world
drawn = batches(make_world("shapes"), 2, range(100), 2, False)
next(drawn)
print("one batch")
"""


def test_a_program_that_forgets_its_batches_ends(tmp_path):
    done = subprocess.run([sys.executable, "-c", FORGETS], cwd=ROOT, capture_output=True,
                          text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "one batch\n"), done.stderr


def test_a_hosts_handler_stays(tmp_path):
    """Of signals, and of children that end."""
    def mine(number, frame):
        pass

    numbers = (*STOPS, signal.SIGCHLD)
    before = [signal.signal(number, mine) for number in numbers]
    try:
        train.main([*FLAGS, "--steps=2", "--workers=1", f"--out={tmp_path}"])
        assert {signal.getsignal(number) for number in numbers} == {mine}
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


@pytest.mark.rest
def test_who_draws_the_clips_does_not_matter(tmp_path):
    for workers in (0, 1, 2):
        train.main([*FLAGS, "--steps=6", f"--workers={workers}", f"--out={tmp_path / str(workers)}"])
    one = saved(tmp_path / "0")
    assert same(one, saved(tmp_path / "1")) and same(one, saved(tmp_path / "2"))


# ---- handlers --------------------------------------------------------------------------------

def handlers() -> list:
    return [signal.getsignal(number) for number in STOPS]


def in_a_thread(main, argv: list[str]) -> list[BaseException]:
    """What main(argv) raised there."""
    raised = []

    def act():
        try:
            main(argv)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=act)
    thread.start()
    thread.join()
    return raised


@pytest.mark.parametrize("workers", [0, 1])
def test_both_programs_run_in_a_thread(tmp_path, workers):
    """They were refused: "signal only works in main thread"."""
    before = handlers()
    flags = [*FLAGS, "--steps=2", f"--workers={workers}", f"--out={tmp_path}"]
    assert in_a_thread(train.main, flags) == []
    model = tmp_path / "model.pt"
    flags = [f"--checkpoint={model}", "--frames=3", "--steps=1", f"--out={tmp_path / 'a.gif'}"]
    assert in_a_thread(sample.main, flags) == []
    assert (tmp_path / "a.gif").exists() and handlers() == before


def test_a_second_signal_at_once_is_the_same_request(monkeypatch):
    """`timeout` sends SIGTERM twice. One that comes later is a second request."""
    monkeypatch.setattr(command_line, "TOGETHER", 0.2)
    before = handlers()

    def act(args):
        with between_steps() as signals:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals == [signal.SIGTERM]
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGHUP)
        pytest.fail("the second request was not heard")

    with pytest.raises(SystemExit) as stop:
        run(act, None)
    assert stop.value.code == 128 + signal.SIGHUP
    assert handlers() == before


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with on_stop(lambda number, frame: pytest.fail("it was to be ignored")):
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, None)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", STOPS)
def test_sampling_stops_with_the_signals_number(tmp_path, monkeypatch, capsys, number):
    def begin(*arguments, **how):
        os.kill(os.getpid(), number)
        yield

    tiny = replace(PRESETS["toy"], **SIZES, words=len(WORDS))
    save_model(tmp_path / "model.pt", VideoDiT(tiny), data="shapes", stage="tf")
    monkeypatch.setattr(sample, "rollout", begin)
    with pytest.raises(SystemExit) as stop:
        sample.main([f"--checkpoint={tmp_path / 'model.pt'}", f"--out={tmp_path}"])
    assert stop.value.code == 128 + number
    assert capsys.readouterr().err.endswith("stopped\n")


def test_the_end_of_a_run_says_where_it_stopped(tmp_path, monkeypatch, capsys):
    """After the last step there are pictures and figures, and then --resume goes on with them."""
    monkeypatch.setattr(train, "report", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stop:
        train.main([*FLAGS, "--steps=2", f"--out={tmp_path}"])
    assert stop.value.code == 128 + signal.SIGTERM
    assert "saved at step 2; go on with" in capsys.readouterr().err
    assert saved_step(tmp_path) == 2
