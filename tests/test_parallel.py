"""Two processes against one: every stage, its weights whole on each process or sharded; and a process that dies.

    python tests/test_parallel.py 50 report.json           as in CI, but 50 steps, and the differences go to a file
    python tests/test_parallel.py 50 report.json cuda      the same with nccl: two GPUs against one, whose steps are recorded graphs

Exit code 1 if a float32 loss is 1e-5 or more from that of one process.
"""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from checkpoint import read_checkpoint  # noqa: E402
from mla_video import PRESETS, VideoDiT  # noqa: E402
from parallel import join, mine, rank, whole, world  # noqa: E402
from toy_data import WORDS, make_world  # noqa: E402
from trainer import STAGES, Trainer, recipe_for  # noqa: E402

BATCH = 8
CONFIG = replace(PRESETS["toy"], dim=32, layers=2, heads=2, latent=8, query_latent=16, rope=6, ffn=32, words=len(WORDS), frames=6, window=6)


def train_all(steps: int, modes: tuple[bool, ...], dtype: torch.dtype, device: torch.device) -> dict[str, list[float]]:
    """Losses of every stage, {"stage": [...], "stage, sharded": [...]}. The recipe is the CPU's on a GPU, too. A CPU and a GPU draw
    different random numbers, so what is compared must be on the same kind of device."""
    found = {}
    torch.set_default_dtype(dtype)
    for sharded in modes:
        for stage in STAGES:
            torch.manual_seed(0)
            model = VideoDiT(CONFIG)
            torch.nn.init.normal_(model.head.weight, std=0.05)         # as if trained: a head of zeros hides half of the network
            recipe = recipe_for(stage, torch.device("cpu"), steps=steps, batch=BATCH)
            trainer = Trainer(model, recipe, make_world("shapes", frames=CONFIG.frames), device, model, sharded)
            trainer.precision = nullcontext                # bfloat16 would hide what the processes do
            losses = [trainer.update(x0.to(dtype), caption).item() for x0, caption in trainer.batches()]
            state = whole(trainer.state())
            Trainer(VideoDiT(CONFIG), recipe, trainer.world, trainer.device, VideoDiT(CONFIG), sharded).restore(state)       # goes back in
            found[stage + ", sharded" * sharded] = losses
    torch.set_default_dtype(torch.float32)
    return found


def two_processes(script: list[str], **more) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *script]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **more}   # of the environment nothing is lost: it may hold settings of nccl
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=600, env=env)


def differences(steps: int, folder: Path, dtype: str, device: str = "cpu") -> dict[str, float]:
    """The largest difference between a loss of two processes and that of one, by stage."""
    done = two_processes([__file__, str(steps), str(folder / "two.json"), device, dtype], WORKER="1")
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = train_all(steps, (False,), getattr(torch, dtype), torch.device(device)), json.loads((folder / "two.json").read_text())
    assert len(two) == 2 * len(one) == 2 * len(STAGES)
    assert all(len(losses) == steps and len(set(losses)) > 1 for losses in (*one.values(), *two.values())), "a loss that never changes"
    return {name: max(abs(a - b) for a, b in zip(losses, one[name.split(",")[0]], strict=True)) for name, losses in two.items()}


@pytest.mark.parametrize("dtype, steps, allowed", [("float64", 8, 1e-10), ("float32", 20, 1e-6)])
def test_two_processes_train_like_one(tmp_path, dtype, steps, allowed):
    """float64 shows that the mathematics is the same; float32, 20 steps, that no rounding is blown up on the way: 3e-7 after 50 steps
    (results/parallel.json), and 4e-6 after 20 where Muon's iteration begins by rounding to bfloat16."""
    for name, gap in differences(steps, tmp_path, dtype).items():
        assert gap < allowed, f"{name}, {dtype}: a loss of two processes is {gap:.1e} from that of one; rounding explains {allowed:.0e}"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_like_one(tmp_path):
    for name, gap in differences(20, tmp_path, "float32", "cuda").items():
        assert gap < 1e-5, f"{name}: a loss of two GPUs is {gap:.1e} from that of one"


@pytest.mark.parametrize("shape", [(32, 32), (8, 24), (24, 8)])
def test_muons_iteration_is_its_polynomial_and_no_rounding_grows_in_it(code, shape):
    """Five times  s <- a s + b s^3 + c s^5  of every singular value, in float64 from numpy's SVD. And two updates that differ by float32's
    rounding stay that close: the slope at s = 0 is a^5 = 485, so a little more than that times 6e-8, not bfloat16's 4e-3."""
    a, b, c = how = (3.4445, -4.7750, 2.0315)
    orthogonalise = code.parallel.orthogonalise
    update = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, v = torch.linalg.svd(update / update.norm(), full_matrices=False)
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    expected = u * s @ v
    assert (orthogonalise(update, how, 5, 1e-7) - expected).norm() < 1e-10 * expected.norm()
    single, near = update.float(), (update * (1 + 6e-8 * torch.randn(shape, generator=torch.Generator().manual_seed(1)))).float()
    one, other = orthogonalise(single, how, 5, 1e-7), orthogonalise(near, how, 5, 1e-7)
    assert not torch.equal(single, near) and one.dtype == torch.float32
    assert (one - other).norm() < 5e-5 * one.norm(), f"6e-8 became {((one - other).norm() / one.norm()).item():.1e}"
    assert (one - expected).norm() < 5e-5 * expected.norm()


SMALL = [f"--config={item}" for item in ("dim=32", "layers=1", "heads=2", "latent=8", "query_latent=16", "rope=6", "ffn=32")]
FLAGS = [*SMALL, "--batch=4", "--evaluate=0", "--device=cpu"]


@pytest.mark.parametrize("flag", [[], ["--shard"]])
def test_the_command_line_on_two_processes(tmp_path, flag):
    """One voice, one writer, and files that a single process goes on from."""
    import train
    done = two_processes(["train.py", *FLAGS, "--steps=6", "--save-every=3", f"--out={tmp_path / 'two'}", *flag])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("trained 6 steps") == 1, f"process 0 alone prints: {done.stdout}"
    train.main([*FLAGS, "--steps=6", f"--out={tmp_path / 'one'}"])
    two, one = (read_checkpoint(tmp_path / name / "train.pt", set()) for name in ("two", "one"))
    assert two["step"] == one["step"] == 6
    assert two["losses"]["tf"][0] == pytest.approx(one["losses"]["tf"][0], abs=1e-4)       # float32: see the test above for more
    assert {name: value.shape for name, value in one["ema"].items()} == {name: value.shape for name, value in two["ema"].items()}
    train.main([*FLAGS, "--steps=8", f"--out={tmp_path / 'two'}", "--resume"])


def test_a_process_that_dies_ends_the_run_and_costs_no_checkpoint(tmp_path):
    code = (f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); import train, trainer; plain = trainer.Trainer.update\n"
            "def update(self, *batch):\n    if self.step == 5 and os.environ['RANK'] == '1': os.kill(os.getpid(), 9)\n"
            "    return plain(self, *batch)\n"
            "trainer.Trainer.update = update; train.main(sys.argv[1:])")
    (tmp_path / "dies.py").write_text(code)
    done = two_processes([str(tmp_path / "dies.py"), *FLAGS, "--steps=50", "--save-every=2", f"--out={tmp_path / 'out'}"])
    assert done.returncode != 0, "a run that lost a process must not look like a success"
    assert read_checkpoint(tmp_path / "out" / "train.pt", {"step"})["step"] == 4


if __name__ == "__main__":
    torch.set_num_threads(1)
    steps, target, kind, *dtype = [*sys.argv[1:], "cpu"] if len(sys.argv) == 3 else sys.argv[1:]
    if os.environ.get("WORKER"):
        device = join(torch.device(mine(kind)))
        assert world() == 2, "two processes that never met prove nothing"
        report = train_all(int(steps), (False, True), getattr(torch, *dtype), device)
        if rank() == 0:
            Path(target).write_text(json.dumps(report))
    else:
        import tempfile
        from sample import provenance
        if kind == "cuda" and torch.cuda.device_count() < 2:
            sys.exit(f"error: two processes on GPUs need two GPUs, there are {torch.cuda.device_count()}")
        origin = provenance(torch.device(kind))
        with tempfile.TemporaryDirectory() as folder:
            gaps = {dtype: differences(int(steps), Path(folder), dtype, kind) for dtype in ("float32", "float64")}
        print(json.dumps(gaps, indent=1))
        report = {**origin, "processes": 2, "on": kind, "backend": "nccl" if kind == "cuda" else "gloo", "steps": int(steps),
                  "batch": BATCH, "largest_difference_of_a_loss": gaps}
        Path(target).write_text(json.dumps(report, indent=1))
        if max(gaps["float32"].values()) >= 1e-5:
            sys.exit("error: a float32 loss of two processes is 1e-5 or more from that of one")
