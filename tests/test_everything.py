"""The command that makes all results again: what it finds out of date, and how it runs jobs."""

import argparse
import json

import pytest

from experiments import everything
from experiments.everything import JOBS, Job, Runner, program_of, reasons, why


def test_every_job_has_a_program_and_known_needs():
    names = {job.name for job in JOBS}
    assert len(names) == len(JOBS)
    for job in JOBS:
        assert program_of(job).is_file()
        assert set(job.needs.split()) <= names
        assert job.where in ("gpu", "2 gpus", "gpus", "2 cores", "cpu")


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(everything, "ROOT", tmp_path)
    monkeypatch.setattr(everything, "LOGS", tmp_path)
    (tmp_path / "good.py").write_text("open('good.json', 'w').write('{}')\n")
    (tmp_path / "bad.py").write_text("raise SystemExit('it is broken')\n")
    return tmp_path


def test_what_is_of_todays_code_is_up_to_date(root, monkeypatch):
    monkeypatch.setattr(everything, "code_hash", lambda program: "today")
    job = Job("good", "python good.py", "good.json", "", "cpu", 0.1)
    assert why(job) == "there is no good.json"
    (root / "good.json").write_text(json.dumps({"code": "yesterday"}))
    assert why(job) == "made by other code"
    (root / "good.json").write_text(json.dumps({"code": "today", "whole": False}))
    assert why(job) == "good.json lacks a part"
    (root / "good.json").write_text(json.dumps({"code": "today"}))
    assert why(job) == ""


def test_a_training_runs_for_those_who_need_it(root):
    train = Job("train", "python good.py", "out/t.json", "", "gpu", 1, goes_on=True)
    user = Job("user", "python good.py", "u.json", "train", "cpu", 1)
    assert set(reasons([train, user], [])) == {"train", "user"}
    assert not reasons([train], [])
    assert set(reasons([train, user], ["train"])) == {"train"}
    data = Job("data", "python good.py", "out/d.npz", "", "cpu", 1)
    train = train._replace(needs="data")
    assert set(reasons([data, train, user], ["train"])) == {"data", "train"}
    assert set(reasons([data, train, user], [])) == {"data", "train", "user"}


def test_one_that_fails_is_named_and_the_others_go_on(root):
    bad = Job("bad", "python bad.py", "bad.json", "", "cpu", 0.1)
    after = Job("after", "python good.py", "after.json", "bad", "cpu", 0.1)
    good = Job("good", "python good.py", "good.json", "", "cpu", 0.1)
    long = Job("long", "python good.py", "long.json", "", "cpu", 99)
    cards = Job("cards", "python good.py", "cards.json", "", "gpus", 0.1)
    args = argparse.Namespace(gpus=0, per_gpu=1, minutes=0.5)
    runner = Runner([bad, after, good, long, cards], args)
    runner.work()
    assert runner.failed == ["bad: it is broken"]
    assert runner.done == {"good"}
    assert runner.waiting == [after, long, cards], "where no GPU is, what takes all of them waits"
    assert (root / "good.json").exists()
