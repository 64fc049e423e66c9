"""Two processes against one: every stage, its weights whole on each process or sharded; and a
process that dies.

    python tests/test_parallel.py 50 report.json         as in CI, but 50 steps, and the
                                                         differences go to a file
    python tests/test_parallel.py 50 report.json cuda    the same with nccl: two GPUs against one,
                                                         whose steps are recorded graphs

Exit code 1 if a float32 loss is 1e-5 or more from that of one process.
"""

import json
import os
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from engine import parallel  # noqa: E402
from engine.checkpoint import read_checkpoint  # noqa: E402
from engine.command_line import provenance  # noqa: E402
from mla_video import PRESETS, VideoDiT  # noqa: E402
from toy_data import WORDS, make_world  # noqa: E402
from train import STAGES, Trainer, recipe_for  # noqa: E402

pytestmark = pytest.mark.rest             # pytest.ini says what that means

BATCH = 8
SIZES = dict(dim=32, layers=2, heads=2, latent=8, query_latent=16, rope=6, ffn=32)
CONFIG = replace(PRESETS["toy"], words=len(WORDS), frames=6, window=6, **SIZES)
MUONS = (3.4445, -4.7750, 2.0315)                          # torch's own coefficients


# ---- two processes against one -----------------------------------------------------------------

def train_stage(stage: str, sharded: bool, steps: int, dtype: torch.dtype,
                device: torch.device) -> list[float]:
    """The losses. The recipe is the CPU's on a GPU, too. A CPU and a GPU draw different random
    numbers, so what is compared must be on the same kind of device."""
    torch.manual_seed(0)
    model = VideoDiT(CONFIG)
    torch.nn.init.normal_(model.head.weight, std=0.05)     # a head of zeros hides half of it
    recipe = recipe_for(stage, torch.device("cpu"), steps=steps, batch=BATCH)
    world = make_world("shapes", frames=CONFIG.frames)
    trainer = Trainer(model, recipe, world, device, model, sharded)
    trainer.precision = nullcontext                        # bfloat16 would hide the processes
    losses = []
    for x0, caption in trainer.batches():
        losses.append(trainer.update(x0.to(dtype), caption).item())
    state = parallel.whole(trainer.state())
    other = Trainer(VideoDiT(CONFIG), recipe, world, device, VideoDiT(CONFIG), sharded)
    other.restore(state)                                   # it goes back in
    return losses


def train_all(steps: int, modes: tuple[bool, ...], dtype: torch.dtype,
              device: torch.device) -> dict[str, list[float]]:
    """Losses of every stage, {"stage": [...], "stage, sharded": [...]}."""
    found = {}
    torch.set_default_dtype(dtype)
    for sharded in modes:
        for stage in STAGES:
            name = f"{stage}, sharded" if sharded else stage
            found[name] = train_stage(stage, sharded, steps, dtype, device)
    torch.set_default_dtype(torch.float32)
    return found


def two_processes(script: list[str], **more) -> subprocess.CompletedProcess:
    return together(script, 2, **more)


def together(script: list[str], processes: int, **more) -> subprocess.CompletedProcess:
    """A script on that many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc_per_node={processes}", *script]
    # Of the environment nothing is lost: it may hold settings of nccl.
    env = {**os.environ, "OMP_NUM_THREADS": "1", **more}
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=600,
                          env=env)


def differences(steps: int, folder: Path, dtype: str, device: str = "cpu") -> dict[str, float]:
    """The largest difference between a loss of two processes and that of one, by stage."""
    path = folder / "two.json"
    done = two_processes([__file__, str(steps), str(path), device, dtype], WORKER="1")
    assert done.returncode == 0, done.stderr[-3000:]
    one = train_all(steps, (False,), getattr(torch, dtype), torch.device(device))
    two = json.loads(path.read_text())
    assert len(two) == 2 * len(one) == 2 * len(STAGES)
    for losses in (*one.values(), *two.values()):
        assert len(losses) == steps and len(set(losses)) > 1, "a loss that never changes"
    found = {}
    for name, losses in two.items():
        pairs = zip(losses, one[name.split(",")[0]], strict=True)
        found[name] = max(abs(a - b) for a, b in pairs)
    return found


@pytest.mark.parametrize("dtype, steps, allowed",
                         [("float64", 4, 1e-10), ("float32", 20, 1e-6)])
def test_two_processes_train_like_one(tmp_path, dtype, steps, allowed):
    """float64 shows that the mathematics is the same; float32, 20 steps, that no rounding is
    blown up on the way: 3e-7 after 50 steps (results/parallel.json), and 4e-6 after 20 where
    Muon's iteration begins by rounding to bfloat16."""
    for name, gap in differences(steps, tmp_path, dtype).items():
        assert gap < allowed, (f"{name}, {dtype}: a loss of two processes is {gap:.1e} from that "
                               f"of one; rounding explains {allowed:.0e}")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_like_one(tmp_path):
    for name, gap in differences(20, tmp_path, "float32", "cuda").items():
        assert gap < 1e-5, f"{name}: a loss of two GPUs is {gap:.1e} from that of one"


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_the_parts_of_a_draw_are_the_whole_draw(code, monkeypatch, processes):
    """What N processes draw, put together, is what one draws."""
    flow = code.flow
    shared = code.parallel.SharedDraws

    def draw_all(draws, batch):
        return [draws.normal(batch, 2, 3), draws.uniform(batch, 1), draws.integers(9, batch, 4),
                draws.normal(batch)]

    def generator():
        return torch.Generator().manual_seed(0)

    monkeypatch.setattr(code.parallel, "processes", lambda: processes)
    parts = []
    for rank in range(processes):
        monkeypatch.setattr(code.parallel, "rank", lambda: rank)
        parts.append(draw_all(shared(generator()), 2))
    whole = draw_all(flow.Draws(generator()), 2 * processes)
    for i, expected in enumerate(whole):
        together = torch.cat([part[i] for part in parts])
        assert torch.equal(together, expected)


# ---- Muon --------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(32, 32), (8, 24), (24, 8)])
def test_muons_iteration_is_its_polynomial_and_no_rounding_grows_in_it(code, shape):
    """Five times  s <- a s + b s^3 + c s^5  of every singular value, in float64 from numpy's SVD.
    And two updates that differ by float32's rounding stay that close: the slope at s = 0 is
    a^5 = 485, so a little more than that times 6e-8, not bfloat16's 4e-3."""
    a, b, c = MUONS

    def orthogonal(update):
        return code.muon.orthogonalise(update, MUONS, 5, 1e-7)

    update = normal(shape, 0, torch.float64)
    u, s, v = torch.linalg.svd(update / update.norm(), full_matrices=False)
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    expected = u * s @ v
    assert (orthogonal(update) - expected).norm() < 1e-10 * expected.norm()

    rounding = 1 + 6e-8 * normal(shape, 1)
    single = update.float()
    near = (update * rounding).float()
    one = orthogonal(single)
    other = orthogonal(near)
    apart = ((one - other).norm() / one.norm()).item()
    assert not torch.equal(single, near) and one.dtype == torch.float32
    assert apart < 5e-5, f"6e-8 became {apart:.1e}"
    assert (one - expected).norm() < 5e-5 * expected.norm()


@pytest.mark.parametrize("shape", [(32, 32), (8, 24), (24, 8)])
def test_muon_takes_torchs_steps_but_for_their_rounding(code, shape):
    """Three steps on the same gradients: the same moments bit for bit, and weights as far apart
    as bfloat16's 4e-3, blown up by the iteration, explains."""
    start = normal(shape, 0)
    mine = torch.nn.Parameter(start.clone())
    theirs = torch.nn.Parameter(start.clone())
    muon = code.muon.Muon([mine], lr=0.1, weight_decay=0.01)
    torchs = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.01,
                              adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        mine.grad = normal(shape, 1 + step)
        theirs.grad = mine.grad.clone()
        muon.step()
        torchs.step()
    assert muon.state_dict()["param_groups"] == torchs.state_dict()["param_groups"]
    one = muon.state_dict()["state"][0]
    other = torchs.state_dict()["state"][0]
    assert one.keys() == other.keys()
    assert torch.equal(one["momentum_buffer"], other["momentum_buffer"])
    moved = (theirs - start).norm()
    assert (mine - theirs).norm() < 0.03 * moved and moved > 0.1


def normal(shape, seed: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- the command line --------------------------------------------------------------------------

SMALL = [f"--config={name}={size}" for name, size in {**SIZES, "layers": 1}.items()]
FLAGS = [*SMALL, "--batch=4", "--evaluate=0", "--device=cpu"]


@pytest.mark.parametrize("flag", [[], ["--shard"]])
def test_the_command_line_on_two_processes(tmp_path, flag):
    """One voice, one writer, and files that a single process goes on from."""
    folders = {"two": tmp_path / "two", "one": tmp_path / "one"}
    done = two_processes(["train.py", *FLAGS, "--steps=6", "--save-every=3",
                          f"--out={folders['two']}", *flag])
    assert done.returncode == 0, done.stderr[-3000:]
    for words in ("trained 6 steps", "parameters;", "bytes for 1 video"):
        assert done.stdout.count(words) == 1, f"process 0 alone prints: {done.stdout}"
    train.main([*FLAGS, "--steps=6", f"--out={folders['one']}"])
    two = read_checkpoint(folders["two"] / "train.pt", set())
    one = read_checkpoint(folders["one"] / "train.pt", set())
    assert two["step"] == one["step"] == 6
    # In float32: see the test above for more.
    assert two["losses"]["tf"][0] == pytest.approx(one["losses"]["tf"][0], abs=1e-4)
    shapes = [{name: value.shape for name, value in run["ema"].items()} for run in (one, two)]
    assert shapes[0] == shapes[1]
    train.main([*FLAGS, "--steps=8", f"--out={folders['two']}", "--resume"])


DIES = """
plain = train.Trainer.update

def update(self, *batch):
    if self.step == 5 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), 9)
    return plain(self, *batch)

train.Trainer.update = update
"""

LATE = """
plain = train.check_nothing_is_lost

def check(*arguments):
    if os.environ["RANK"] == "1":
        time.sleep(5)
    plain(*arguments)

train.check_nothing_is_lost = check
"""


def script_with(change: str, path: Path) -> str:
    """train.py, changed."""
    lines = ["import os, sys, time", f"sys.path.insert(0, {str(ROOT)!r})", "import train", change,
             "train.main(sys.argv[1:])"]
    path.write_text("\n".join(lines))
    return str(path)


def test_a_process_that_dies_ends_the_run_and_costs_no_checkpoint(tmp_path):
    script = script_with(DIES, tmp_path / "dies.py")
    done = two_processes([script, *FLAGS, "--steps=50", "--save-every=2",
                          f"--out={tmp_path / 'out'}"])
    assert done.returncode != 0, "a run that lost a process must not look like a success"
    assert read_checkpoint(tmp_path / "out" / "train.pt", {"step"})["step"] == 4


def test_a_late_process_does_not_take_the_first_save_for_another_run(tmp_path):
    script = script_with(LATE, tmp_path / "late.py")
    done = two_processes([script, *FLAGS, "--steps=2", f"--out={tmp_path / 'out'}"])
    assert done.returncode == 0, done.stderr[-3000:]


PARTS = """
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from engine import parallel

parallel.join(torch.device("cpu"))
mesh = init_device_mesh("cpu", (6,))           # keeps the group, as fully_shard's memory does

def last_messages():
    numbers = [torch.empty(1000) for _ in range(6)]
    for _ in range(3):
        message = torch.ones(1000)
        dist.all_gather(numbers, message)
        dist.all_reduce(message)

last_messages()
"""


def test_processes_part_in_peace_right_after_their_last_message(tmp_path):
    """A thread of gloo that still holds a tensor of the last message, and asks for the
    interpreter while it shuts down, aborts its process: so ended some of these runs."""
    script = tmp_path / "parts.py"
    script.write_text(PARTS)
    done = together([str(script)], 6, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr[-3000:]


# ---- as a program ------------------------------------------------------------------------------

def work(steps: int, target: Path, kind: str, dtype: str) -> None:
    """One of two processes."""
    device = torch.device(parallel.my_device(kind))
    parallel.join(device)
    assert parallel.processes() == 2, "two processes that never met prove nothing"
    losses = train_all(steps, (False, True), getattr(torch, dtype), device)
    if parallel.rank() == 0:
        target.write_text(json.dumps(losses))


def report(steps: int, target: Path, kind: str = "cpu") -> None:
    if kind == "cuda" and torch.cuda.device_count() < 2:
        sys.exit("error: two processes on GPUs need two GPUs, there are "
                 f"{torch.cuda.device_count()}")
    origin = provenance(torch.device(kind))
    backend = "nccl" if kind == "cuda" else "gloo"
    gaps = {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("float32", "float64"):
            gaps[dtype] = differences(steps, Path(folder), dtype, kind)
    print(json.dumps(gaps, indent=1))
    found = {**origin, "processes": 2, "on": kind, "backend": backend, "steps": steps,
             "batch": BATCH, "largest_difference_of_a_loss": gaps}
    target.write_text(json.dumps(found, indent=1))
    if max(gaps["float32"].values()) >= 1e-5:
        sys.exit("error: a float32 loss of two processes is 1e-5 or more from that of one")


if __name__ == "__main__":
    torch.set_num_threads(1)
    steps, target, *rest = sys.argv[1:]
    act = work if os.environ.get("WORKER") else report
    act(int(steps), Path(target), *rest)
