"""experiments/wan_speed.py: the merged form is MLA, the rule can come out either way, and a run goes
on from what it has."""

import json

import pytest
import torch
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from attention import MLA, attend_absorbed, attend_materialised, attend_reference
from experiments import wan_speed
from experiments.wan_speed import CAN, CANNOT, WIDTHS, Merged, could_be, growing_operations, verdict
from lab import EXACT, Dice, Sizes, assert_same, enliven, forall, sizes
from mla_video import Config
from rope3d import Rope3D


@forall(s=sizes(), Q=st.integers(1, 12), masked=st.booleans())
def test_the_merged_form_is_the_reference(s: Sizes, Q: int, masked: bool):
    dice = Dice(s.seed)
    rope = Rope3D(s.R, s.head)
    layer = enliven(MLA(8, s.H, s.C, Q, s.N, s.V, rope).double(), s.seed)
    x = dice.normal(s.B, s.L, 8)
    rows = layer.rows(dice.normal(s.B, s.T, 8))
    mask = None
    if masked:
        mask = torch.arange(s.T) <= torch.arange(s.L)[:, None]             # [L, T]
    tables = [rope.table(dice.points(n), torch.float64) for n in (s.L, s.T)]
    want = layer(x, rows, *tables, mask, attend_reference)
    merged = Merged(layer)
    assert merged.A.shape == (s.H * s.C, Q) and merged.B.shape == (8, s.H * s.C)
    assert_same(merged(x, rows, *tables, mask), want, EXACT, "merged")


@pytest.mark.parametrize("form, attend", [("materialised", attend_materialised),
                                          ("absorbed", attend_absorbed), ("merged", None)])
def test_what_grows_with_the_width_is_counted_as_torch_counts(form, attend):
    """Two widths of one layer: the difference of torch's own counts."""
    config = Config(attention="mla", dim=24, heads=2, latent=4, query_latent=8, rope=6)
    L, T = 300, 400                                        # scores enough for torch's kernel
    counts = []
    for C in (4, 8):
        with torch.device("meta"):
            layer = MLA(24, 2, C, 8, 6, 12, Rope3D(6, 12))
            x = torch.empty(1, L, 24)
            rows = torch.empty(1, T, C), torch.empty(1, T, 6)
            if form == "merged":
                layer = Merged(layer)
            q_table = torch.empty(2, L, 3)
            k_table = torch.empty(2, T, 3)
            with FlopCounterMode(display=False) as count:
                layer.rows(x)
                layer(x, rows, q_table, k_table, None, attend)
        counts.append(count.get_total_flops())
    ends = [growing_operations(form, L, T, C, config) for C in (4, 8)]
    assert ends[1] - ends[0] == counts[1] - counts[0]


# ---- the rule --------------------------------------------------------------------------------

def section_of(growths: dict[str, list[float]]) -> dict:
    """A section `latent` in which forms grow by so many ms a frame of video, window by window."""
    rows = {}
    for form, by_window in growths.items():
        for window, grows in enumerate(by_window):
            times = {}
            of_a_block = grows * 12 / 30
            for C in WIDTHS:
                share = (C - 64) / 448
                ms = 10 + share * of_a_block
                times[str(C)] = dict(ms=ms, low=ms, high=ms)
            rows[f"{form} {window}"] = {"form": form, "by C": times}
    return {"layers": 30, "video frames": 12, "rows": rows}


NEAR = 0.9 * CAN
FAR = 1.1 * CANNOT


@pytest.mark.parametrize("rebuilt, merged, words", [
    ([FAR, NEAR], [FAR, FAR], "D.4, which rebuilds keys and values, can"),
    ([FAR, FAR], [FAR, NEAR], "Appendix E, which never forms keys and values, can"),
    ([NEAR, NEAR], [NEAR, FAR], "either"),
    ([FAR, FAR], [FAR, FAR], "neither"),
    ([CANNOT, CANNOT], [FAR, FAR], "cannot be told"),
    ([NEAR, FAR], [FAR, 1.1 * CAN], "cannot be told"),
])
def test_the_rule_can_come_out_either_way(rebuilt, merged, words):
    found = verdict(section_of({"materialised": rebuilt, "merged": merged}))
    assert found["verdict"].startswith(words), found


def test_a_width_without_a_time_decides_nothing():
    section = section_of({"materialised": [NEAR], "merged": [FAR, FAR]})
    section["rows"]["merged 1"]["by C"]["512"] = {"failed": "out of memory"}
    assert verdict(section)["verdict"].startswith("cannot be told")
    assert could_be([]) == could_be([None]) == "cannot be told"


def test_noise_that_spans_a_bound_is_not_decided():
    assert could_be([(0.0, 1.1 * CAN)]) == could_be([(0.9 * CANNOT, 2 * CANNOT)]) == "cannot be told"


# ---- the run ---------------------------------------------------------------------------------

def test_a_run_goes_on_from_its_rows_and_not_from_anothers(tmp_path, capsys):
    path = tmp_path / "speed.json"
    words = ["--quick", "--cpu", "--only=batch", f"--json={path}"]
    wan_speed.main(words)
    found = json.loads(path.read_text())
    rows = found["sections"]["batch"]["rows"]
    assert list(rows) == ["dense", *(f"C = {C // 8}" for C in WIDTHS)]
    for row in rows.values():
        assert row["bytes_a_video"] == row["cache_bytes_a_video"] > 0
    rows["dense"]["bytes_a_video"] = 17
    del rows["C = 8"]
    path.write_text(json.dumps(found))
    wan_speed.main(words)
    rows = json.loads(path.read_text())["sections"]["batch"]["rows"]
    assert rows["dense"]["bytes_a_video"] == 17 and "C = 8" in rows

    found["device"] = "another"
    path.write_text(json.dumps(found))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        wan_speed.main(words)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1 and "another" in said


@pytest.mark.parametrize("limit, predicted, found", [
    (93, 100, (92, 94)), (93, 90, (93, 94)), (93, 93, (93, 94)), (9, 12, (9, 10)), (0, 3, (None, 1)),
    (900, 300, (366, None)),
])
def test_the_largest_batch_is_looked_for_near_the_prediction(limit, predicted, found):
    args = wan_speed.parse(["--quick", "--cpu"])
    speed = wan_speed.WanSpeed(args)
    speed.fits = lambda model, videos, layers, turn: videos <= limit
    near = speed.near(None, predicted)
    assert (near["videos"], near["too_many"]) == found


def test_a_form_that_is_wrong_gets_no_time(monkeypatch):
    args = wan_speed.parse(["--quick", "--cpu"])
    args.budget = float("inf")
    speed = wan_speed.WanSpeed(args)
    monkeypatch.setattr(speed, "recorded", lambda calls: "ready")
    for form in ("materialised", "absorbed", "merged"):
        made = speed.recorded_block(form)
        assert made["error"] < 1e-5 and made["recorded"] == "ready"
    whole = Merged.__init__

    def wrong(layer, mla):
        whole(layer, mla)
        layer.scale *= 1.01

    monkeypatch.setattr(Merged, "__init__", wrong)
    with pytest.raises(ValueError, match="wrong: relative error"):
        speed.recorded_block("merged")


@pytest.mark.rest
def test_every_section_runs_on_a_cpu(tmp_path):
    path = tmp_path / "speed.json"
    wan_speed.main(["--quick", "--cpu", f"--json={path}"])
    found = json.loads(path.read_text())
    assert {"command", "commit", "device", "versions"} <= found.keys()
    sections = found["sections"]
    for row in sections["model"]["rows"].values():
        assert row["ms"] > 0 and row.get("recompiles", 0) == row.get("graph_breaks", 0) == 0
    forms = {row["form"] for row in sections["latent"]["rows"].values()}
    assert forms == {"materialised", "absorbed", "fused", "merged"}
    for row in sections["latent"]["rows"].values():
        timed = ["ms" in times and times["error"] < 1e-5 for times in row["by C"].values()]
        assert not any(timed) if row["form"] == "fused" else all(timed)
    assert "verdict" in sections["latent"]["judged"]
    heads = [head[0] for head, _ in wan_speed.tables(found)]
    assert len(heads) == 4 and "Verdict" in wan_speed.said(found)
