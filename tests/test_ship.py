"""experiments/ship.py: what is shipped comes from one run, and says which."""

import json

import pytest

from engine.checkpoint import load_model
from experiments import ship, tables
from train import STAGES

SIZES = dict(dim=32, layers=1, heads=2, latent=8, query_latent=16, rope=6, ffn=32)
FLAGS = " ".join([*(f"--config={name}={size}" for name, size in SIZES.items()), "--steps=1",
                  "--batch=2", "--evaluate=0"])


def read(root, name: str) -> dict:
    path = root / "results" / name
    return json.loads(path.read_text())


@pytest.mark.rest
def test_runs_become_what_is_shipped(tmp_path, monkeypatch):
    """The CPU's runs by its own command; then the second as if it had been a GPU's."""
    monkeypatch.setattr(ship.sample, "main", lambda words: words)
    runs = tmp_path / "runs"
    ship.main(["cpu", f"--root={tmp_path}", f"--runs={runs}", f"--flags={FLAGS}"])
    alone = read(tmp_path, "train_mla_cpu.json")
    assert alone["stage"] == "tf"
    assert alone["steps"] == 1
    whole = read(tmp_path, "stages_cpu.json")
    assert tuple(whole["stages"]) == STAGES
    assert {"command", "device", "code"} <= set(whole)
    clips, _ = tables.clips_and_minutes(whole["stages"].values())
    assert clips == "8"

    before = (runs / "all/dmd.pt").read_bytes()
    ship.main(["cpu", f"--root={tmp_path}", f"--runs={runs}", f"--flags={FLAGS}"])
    again = (runs / "all/dmd.pt").read_bytes()
    assert again == before, "what is at its end is not trained again"
    ship.main(["toy", str(runs / "all"), f"--root={tmp_path}"])
    model, about = load_model(tmp_path / "checkpoints/toy.pt")
    assert about["stage"] == "dmd"
    assert model.config.dim == 32
    assert read(tmp_path, "toy.json")["stages"] == whole["stages"]


def write_reports(folder, **differs) -> None:
    for stage in STAGES:
        origin = {"command": "python train.py", "commit": "abc", "device": "a card",
                  "versions": "torch"}
        if stage == "cd":
            origin |= differs
        (folder / f"report_{stage}.json").write_text(json.dumps(origin))


@pytest.mark.parametrize("name", ["commit", "device", "versions"])
def test_a_run_of_several_origins_is_refused(tmp_path, capsys, name):
    write_reports(tmp_path, **{name: "another"})
    with pytest.raises(SystemExit):
        ship.main(["toy", str(tmp_path), f"--root={tmp_path}"])
    assert f"of several {name}: " in capsys.readouterr().err
    assert not (tmp_path / "checkpoints").exists()


def test_a_run_that_is_not_at_its_end_is_refused(tmp_path, capsys):
    write_reports(tmp_path)
    (tmp_path / "report_dmd.json").unlink()
    with pytest.raises(SystemExit):
        ship.main(["toy", str(tmp_path), f"--root={tmp_path}"])
    assert "has not come to its end" in capsys.readouterr().err
