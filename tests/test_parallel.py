"""Two processes against one: every stage, its weights whole on each process or sharded; and a process that dies.

    python tests/test_parallel.py 50 report.json           as in CI, but 50 steps, and the differences go to a file
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from checkpoint import read_checkpoint  # noqa: E402
from mla_video import PRESETS, VideoDiT  # noqa: E402
from parallel import join, rank, whole, world  # noqa: E402
from toy_data import WORDS, make_world  # noqa: E402
from trainer import STAGES, Trainer, recipe_for  # noqa: E402

BATCH = 8
CONFIG = replace(PRESETS["toy"], dim=32, layers=2, heads=2, latent=8, query_latent=16, rope=6, ffn=32, words=len(WORDS), frames=6, window=6)


def train_all(steps: int, modes: tuple[bool, ...], dtype: torch.dtype) -> dict[str, list[float]]:
    """Losses of every stage, {"stage": [...], "stage, sharded": [...]}, and the sum of all weights at the end, as the last number."""
    found = {}
    torch.set_default_dtype(dtype)
    for sharded in modes:
        for stage in STAGES:
            torch.manual_seed(0)
            model = VideoDiT(CONFIG)
            torch.nn.init.normal_(model.head.weight, std=0.05)         # as if trained: a head of zeros hides half of the network
            recipe = recipe_for(stage, torch.device("cpu"), steps=steps, batch=BATCH)
            trainer = Trainer(model, recipe, make_world("shapes", frames=CONFIG.frames), torch.device("cpu"), model, sharded)
            losses = [trainer.update(x0.to(dtype), caption).item() for x0, caption in trainer.batches()]
            state = whole(trainer.state())
            Trainer(VideoDiT(CONFIG), recipe, trainer.world, trainer.device, VideoDiT(CONFIG), sharded).restore(state)       # goes back in
            found[stage + ", sharded" * sharded] = [*losses, sum(value.abs().sum().item() for value in state["ema"].values())]
    torch.set_default_dtype(torch.float32)
    return found


def two_processes(script: list[str], **more) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *script]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **more}
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=600, env=env)


def differences(steps: int, folder: Path, dtype: str) -> dict[str, float]:
    """The largest difference between a loss of two processes and that of one, by stage."""
    done = two_processes([__file__, str(steps), str(folder / "two.json"), dtype], WORKER="1")
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = train_all(steps, (False,), getattr(torch, dtype)), json.loads((folder / "two.json").read_text())
    assert len(two) == 2 * len(one) == 2 * len(STAGES)
    return {name: max(abs(a - b) for a, b in zip(losses[:-1], one[name.split(",")[0]])) for name, losses in two.items()}


def test_two_processes_train_like_one(tmp_path):
    for name, gap in differences(8, tmp_path, "float64").items():
        assert gap < 1e-10, f"{name}: a loss of two processes is {gap:.1e} from that of one"


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
    if os.environ.get("WORKER"):
        join(torch.device("cpu"))
        assert world() == 2, "two processes that never met prove nothing"
        report = train_all(int(sys.argv[1]), (False, True), getattr(torch, sys.argv[3]))
        if rank() == 0:
            Path(sys.argv[2]).write_text(json.dumps(report))
    else:
        import tempfile
        from sample import provenance
        origin = provenance(torch.device("cpu"))
        with tempfile.TemporaryDirectory() as folder:
            gaps = {dtype: differences(int(sys.argv[1]), Path(folder), dtype) for dtype in ("float32", "float64")}
        print(json.dumps(gaps, indent=1))
        report = {**origin, "processes": 2, "steps": int(sys.argv[1]), "batch": BATCH, "largest_difference_of_a_loss": gaps}
        Path(sys.argv[2]).write_text(json.dumps(report, indent=1))
