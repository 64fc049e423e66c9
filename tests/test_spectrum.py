"""The rank question: counting rules against closed forms, chance against its theory, and verdicts that can come out false."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch

from attention import MLA, Dense
from experiments import rank, spectrum
from experiments.rank import OPEN, REFUTED, REPRODUCED, decide, effective_rank, energy_kept, energy_rank
from mla_video import VideoDiT
from rope3d import Rope3D

E, H, C = 32, 2, 4


# ---- counting -------------------------------------------------------------------------------------------------------

def singular(matrix):
    return torch.linalg.svdvals(matrix.double())


def test_known_spectra():
    assert energy_rank(torch.tensor([2.0])) == pytest.approx(0.99)
    assert energy_rank(torch.full((16,), 3.0)) == pytest.approx(0.99 * 16)             # the flattest: the ceiling of the 99 % rule
    assert energy_rank(singular(torch.diag(torch.tensor([1.0, 0.0, 2.0]))), 0.8) == pytest.approx(1)  # energies 4/5, 1/5, 0
    assert energy_rank(singular(torch.diag(torch.tensor([1.0, 0.0, 2.0]))), 0.9) == pytest.approx(1.5)
    halves = 0.5 ** (0.5 * torch.arange(60).double())      # energy 2^-k: k directions hold 1 - 2^-k of it
    assert math.ceil(energy_rank(halves)) == math.ceil(math.log2(100)) == 7
    assert energy_kept(halves, 3) == pytest.approx(7 / 8)
    assert effective_rank(halves) == pytest.approx(4)      # entropy of a geometric law of ratio 1/2: 2 bits
    assert effective_rank(torch.tensor([3.0, 3.0, 0.0])) == pytest.approx(2)


def test_orthogonal_matrices_count_every_direction_and_rotations_none():
    g = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(24, 24, generator=g).double())[0]
    assert energy_rank(singular(Q)) == pytest.approx(0.99 * 24) and effective_rank(singular(Q)) == pytest.approx(24)
    low = Q[:, :5] @ Q[:5]                                 # five equal directions, hidden in a full matrix
    assert energy_rank(singular(low)) == pytest.approx(0.99 * 5) and effective_rank(singular(low)) == pytest.approx(5)
    steep = torch.diag(torch.arange(1.0, 25).double())
    assert energy_rank(singular(Q @ steep @ Q)) == pytest.approx(energy_rank(singular(7 * steep)))    # rotation, scale: no change


def test_a_matrix_of_zeros_has_no_rank():
    with pytest.raises(ValueError, match="zeros"):
        energy_rank(torch.zeros(4))


# ---- chance ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("beta", [0.1, 0.25, 0.5, 0.9])
def test_marchenko_pastur(beta):
    low, high = rank.marchenko_pastur_edges(beta)
    x = rank.marchenko_pastur(2000, beta).square()
    assert low <= x.min() and x.max() <= high and (x.diff() <= 0).all()
    assert x.mean().item() == pytest.approx(1, abs=2e-3) and x.square().mean().item() == pytest.approx(1 + beta, rel=5e-3)  # its moments
    n = 600
    W = torch.randn(round(n / beta), n, generator=torch.Generator().manual_seed(0))
    s = torch.linalg.svdvals(W).square() / W.shape[0]
    assert s.min() > low - 0.1 and s.max() < high + 0.1    # a real matrix ends where the edges say
    assert energy_rank(s.sqrt()) / n == pytest.approx(energy_rank(x.sqrt()) / 2000, abs=5e-3)


def test_what_the_docstring_says_of_chance():
    s = rank.marchenko_pastur(1536, 0.5)
    assert energy_kept(s, 192) == pytest.approx(0.29, abs=0.005) and energy_rank(s) / 1536 == pytest.approx(0.93, abs=0.005)
    noise = rank.random_product(12 * (96 + 128), 192, 1536, seed=0)                    # M of the paper's geometry, nothing learned
    assert energy_rank(noise) / 192 == pytest.approx(0.973, abs=0.002)
    assert energy_rank(rank.marchenko_pastur(1536, 1536 / (12 * (96 + 128)))[:192]) / 192 == pytest.approx(0.988, abs=0.002)


def test_random_product_is_a_product():
    g = torch.Generator().manual_seed(5)
    up, down = torch.randn(30, 4, generator=g, dtype=torch.float64), torch.randn(4, 20, generator=g, dtype=torch.float64)
    assert torch.allclose(rank.random_product(30, 4, 20, 5), singular(up @ down)[:4])


# ---- the decision rule ----------------------------------------------------------------------------------------------

def test_interval_and_slope():
    assert rank.interval([1.0, 2.0, 3.0]) == pytest.approx((2, 2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5))
    assert rank.slope([1, 2, 4], [5, 10, 20]) == pytest.approx(1) and rank.slope([1, 2, 4], [3, 3, 3]) == pytest.approx(0)


@pytest.mark.parametrize("values, verdict", [([0.94, 0.95, 0.96], REPRODUCED), ([0.5, 0.51, 0.52], REFUTED), ([0.8, 0.9, 1.0], OPEN),
                                             ([0.94, 0.9, 0.92], OPEN)])
def test_decide(values, verdict):
    sure = [0.97, 0.97, 0.97]
    assert decide({"a": values, "b": sure}, low=0.9)["verdict"] == verdict
    assert decide({"a": values, "b": sure}, low=0.9, needs={"it could come out otherwise": False})["verdict"] == OPEN


# ---- layers ---------------------------------------------------------------------------------------------------------

def dense(seed, rank_of_kv=E):
    """A dense layer; with rank_of_kv < E its [W_K; W_V] is of that rank."""
    torch.manual_seed(seed)
    layer = Dense(E, H, Rope3D(E // H, E // H), norm=False).double()
    if rank_of_kv < E:
        shared = torch.randn(rank_of_kv, E).double()
        for W in (layer.W_K, layer.W_V):
            W.weight.data = torch.randn(E, rank_of_kv).double() @ shared / E
    return layer


def latent(seed, width=C, collapsed=False):
    """An MLA layer; `collapsed` leaves M one direction that counts."""
    torch.manual_seed(seed)
    layer = MLA(E, H, width, E, N=10, V=16, rope=Rope3D(6, 16), norm=False)
    if collapsed:
        layer.W_DKV.weight.data *= torch.tensor([1.0] + [0.05] * (width - 1))[:, None]
    return layer


@pytest.mark.parametrize("width", [1, C, 20, E])
def test_the_tail_predicts_what_conversion_loses(width):
    old, cov = dense(0), torch.cov(torch.randn(E, 500, generator=torch.Generator().manual_seed(1)).double())
    lost = rank.reconstruction(old, MLA.from_dense(old, width, E, 6), cov)
    assert lost["measured"] == pytest.approx(lost["predicted"], abs=1e-12)             # Eckart-Young
    assert -1e-12 <= lost["data_best"] <= lost["data"] + 1e-12
    white = rank.reconstruction(old, MLA.from_dense(old, width, E, 6), torch.eye(E).double())
    assert white["data"] == pytest.approx(lost["measured"]) and white["data_best"] == pytest.approx(lost["predicted"])


def test_covariance_is_that_of_the_layer_inputs_on_clean_tokens():
    torch.manual_seed(0)
    model = VideoDiT(replace(TINY.config, attention="mla", query_latent=32, latent=C))
    video, caption = torch.randn(2, 6, 3, 8, 8), torch.zeros(2, 3, dtype=torch.long)
    seen, cache = [], model.make_cache(2)
    hook = model.blocks[0].attention.W_DKV.register_forward_hook(lambda layer, args, out: seen.append(args[0].detach()))
    with torch.no_grad():
        for chunk in video.split(3, dim=1):                # what streaming stores
            model.commit(chunk, caption, cache)
    hook.remove()
    got = rank.covariances(model, video, caption)[0]
    assert torch.allclose(got, torch.cov(torch.cat(seen, 1).flatten(0, 1).T).double(), atol=1e-5)


def test_conversion_replaces_self_attention_and_nothing_else():
    torch.manual_seed(0)
    model = VideoDiT(TINY.config)
    mla = spectrum.convert(model, C)
    old, new = model.state_dict(), mla.state_dict()
    rest = [name for name in old if ".attention." not in name]
    assert rest and all(torch.equal(old[name], new[name]) for name in rest)
    assert [block.attention.widths for block in mla.blocks] == [(C, TINY.config.rope)]
    assert torch.linalg.matrix_rank(rank.composite(mla.blocks[0].attention)) == C


@pytest.mark.parametrize("optimiser, kind", [("Muon", torch.optim.Muon), ("AdamW", torch.optim.AdamW)])
def test_each_arm_trains_the_matrices_by_its_own_optimiser(optimiser, kind, monkeypatch):
    made = []

    class Kept(spectrum.Trainer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append((self, self.learner.optimisers[0].param_groups[0]["params"]))

    monkeypatch.setattr(spectrum, "Trainer", Kept)
    torch.manual_seed(0)
    model, pool = VideoDiT(TINY.config), spectrum.Pool(4, TINY.config, 0, torch.device("cpu"))
    end, curve = spectrum.fit(model, TINY, optimiser, 2, pool, 0, torch.device("cpu"), lambda model: {"here": 1})
    (trainer, matrices), group = made[0], made[0][0].learner.optimisers[0].param_groups[0]
    assert type(trainer.learner.optimisers[0]) is kind and [id(p) for p in group["params"]] == [id(p) for p in matrices]
    assert group["lr"] == TINY.lr and [point["step"] for point in curve] == [0, 1, 2]
    found = rank.dense_spectrum(end.blocks[0].attention, model.blocks[0].attention)
    assert found["moved"] > 0                              # a copy was trained: the model that was given is still where it started


# ---- verdicts that can come out false -------------------------------------------------------------------------------

def used(layer):
    """`budget` of a layer that training has moved by all its norm."""
    return rank.budget([layer], [torch.zeros(1)]) | {"moved": 1.0}


def world_where_all_holds():
    """What `measure` finds, made up so that every claim holds: noise layers, quality kept at E / 8 and lost at C = 1."""
    old = [[dense(seed + 10)] for seed in range(3)]
    full = [[rank.dense_spectrum(dense(seed), start[0])] for seed, start in enumerate(old)]
    for layers in full:
        layers[0]["kept"] = 0.46
    good = dict(loss=0.1, colour=0.95, shape=0.9, place=0.9, survival=0.9)
    bad = dict(loss=0.2, colour=0.3, shape=0.3, place=0.1, survival=0.2)
    quality = {"dense": good, "dense_tuned": good, "converted": {"1": bad, "4": bad, "8": bad}, "tuned": {"1": bad, "4": good, "8": good}}
    curves = [[{"step": step, **used(latent(seed))} for step in (0, 1)] for seed in range(3)]
    latents = {kind: {str(n): {"effective": 10 * n**0.2} for n in (1, 2, 4)} for kind in ("trained", "untrained", "noise")}
    lost = {"predicted": 0.6, "measured": 0.6, "data": 0.2, "data_best": 0.1}
    return {"E": E, "C": C, "widths": [1, 4, 8], "chance_budget": {"rank99": [0.97], "effective": [0.9]}, "chance_energy": [1 / E] * E,
            "chance_widths": {"1": 0.99, "4": 3.9, "8": 7.7}, "spectra": {"untrained": full, "Muon": full, "AdamW": full},
            "quality": [copy.deepcopy(quality) for _ in range(3)], "reconstruction": [{w: lost for w in ("1", "4", "8")}] * 3,
            "rank_by_width": [{"1": 0.99, "4": 3.9, "8": 7.7} for _ in range(3)], "latents": [latents] * 3,
            "budget": {name: {"spectral": curves, "random": curves} for name in rank.OPTIMISERS}}


def verdict(found, words):
    """The verdict on the one claim that contains these words."""
    (one,) = [v["verdict"] for v in rank.judge(found) if words in v["claim"]]
    return one


def test_a_world_where_all_holds():
    assert {v["verdict"] for v in rank.judge(world_where_all_holds())} == {REPRODUCED}


def test_low_rank_attention_is_called_so():
    found = world_where_all_holds()
    found["spectra"]["Muon"] = [[rank.dense_spectrum(dense(seed, rank_of_kv=5), dense(seed + 10))] for seed in range(3)]
    assert verdict(found, "is not low-rank") == REFUTED
    assert verdict(found, "about 46 %") == REFUTED         # five directions of 32, four kept: nearly all of it
    for ranks, seed in zip(found["rank_by_width"], range(3)):                          # and converted at any C, M has no more than that
        for width in found["widths"]:
            ranks[str(width)] = width * used(MLA.from_dense(dense(seed, rank_of_kv=2), width, E, 6))["rank99"]
    assert verdict(found, "sets the rank") == REFUTED


@pytest.mark.parametrize("when, claim", [(0, "before training"), (-1, "after training")])
@pytest.mark.parametrize("init", ["spectral", "random"])
def test_a_collapsed_budget_is_called_so(when, claim, init):
    found = world_where_all_holds()
    found["budget"]["AdamW"][init] = copy.deepcopy(found["budget"]["AdamW"][init])
    for seed, curve in enumerate(found["budget"]["AdamW"][init]):
        curve[when] = {"step": curve[when]["step"], **used(latent(seed, collapsed=True))}
    assert verdict(found, claim) == REFUTED
    assert (verdict(found, "start alike") == REFUTED) == (when == -1)


def test_lost_quality_is_called_so_and_an_insensitive_test_is_not_believed():
    found = world_where_all_holds()
    for q in found["quality"]:
        q["tuned"]["4"] = q["tuned"]["1"]
    assert verdict(found, "true past") == verdict(found, "long rollouts") == REFUTED and rank.breaking(found)["survival"] == 4
    found = world_where_all_holds()
    for q in found["quality"]:
        q["tuned"]["1"] = q["tuned"]["4"]                  # one latent does as well: then nothing has been shown about four
    assert verdict(found, "true past") == verdict(found, "long rollouts") == OPEN and rank.breaking(found)["survival"] is None


def test_weights_that_training_left_alone_prove_nothing():
    found = world_where_all_holds()
    found["spectra"]["Muon"] = copy.deepcopy(found["spectra"]["Muon"])
    found["spectra"]["Muon"][1][0]["moved"] = 0.1
    assert verdict(found, "is not low-rank") == OPEN
    found["budget"]["Muon"]["random"][2][-1]["moved"] = 0.1
    assert verdict(found, "after training") == OPEN and verdict(found, "before training") == REPRODUCED


def test_what_noise_would_pass_is_marked():
    marked = {v["claim"]: v["noise"] for v in rank.judge(world_where_all_holds())}
    assert [value for words, value in marked.items() if "not low-rank" in words or "budget" in words] == [True, True]
    found = world_where_all_holds()
    for layers in found["spectra"]["untrained"]:
        layers[0]["kept"] = 0.29
    assert [v["noise"] for v in rank.judge(found) if "46 %" in v["claim"]] == [False]


@pytest.mark.parametrize("power, expected", [(1.0, REFUTED), (0.2, REPRODUCED)])
def test_the_prediction_about_objects(power, expected):
    found = world_where_all_holds()
    for run in found["latents"]:
        run["trained"] = {str(n): {"effective": 6 * n**power} for n in (1, 2, 4)}
    assert verdict(found, "degrees of freedom") == expected


# ---- the command ----------------------------------------------------------------------------------------------------

TINY = spectrum.Plan(replace(spectrum.QUICK.config, dim=32, ffn=32, layers=1), widths=(1, 4), dense_steps=3, tune_steps=2, object_steps=1,
                     batch=2, rollouts=1, frames=6, lr=1e-2, clips=4, held_out=2, euler=1)


def run(*arguments):
    try:
        spectrum.main([str(argument) for argument in arguments])
        return 0
    except SystemExit as stop:
        return stop.code


def test_one_command_measures_judges_and_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(spectrum, "QUICK", TINY)
    path = tmp_path / "new" / "spectrum.json"
    assert run("--quick", "--device", "cpu", "--json", path) == 0
    out = json.loads(path.read_text())
    assert {"command", "commit", "device", "versions", "plan", "found", "verdicts"} <= set(out) and len(out["verdicts"]) == 10
    assert all({len(v) for v in verdict["intervals"].values()} == {3} for verdict in out["verdicts"])
    for run_ in out["found"]["reconstruction"]:            # three seeds, each C: measured as predicted
        assert all(row["measured"] == pytest.approx(row["predicted"], abs=1e-5) for row in run_.values())
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert all(v["claim"] in said and v["verdict"].upper() in said for v in out["verdicts"])
    assert run("--redraw", path, "--figure", tmp_path / "again.png") == 0 and (tmp_path / "again.png").exists()


def test_what_was_measured_outlives_an_interrupted_run(tmp_path, monkeypatch):
    monkeypatch.setattr(spectrum, "QUICK", TINY)

    def interrupted(plan, seed, device, latents=spectrum.latents):
        if seed == 2:
            raise KeyboardInterrupt
        return latents(plan, seed, device)

    monkeypatch.setattr(spectrum, "latents", interrupted)
    path = tmp_path / "spectrum.json"
    assert run("--quick", "--device", "cpu", "--json", path) == 130
    monkeypatch.undo()
    assert run("--redraw", path) == 0                      # two seeds of three: wider intervals, same rules


def test_pool_of_several_objects():
    one, two = (spectrum.Pool(4, TINY.config, 0, torch.device("cpu"), objects, captions=False) for objects in (1, 2))
    assert (two.video >= one.video).all() and (two.video > one.video).any() and not two.caption.any()
    video, _ = two.batch(range(5))
    assert torch.equal(video[4], video[0])                 # round and round


@pytest.mark.parametrize("arguments", [["--device", "abacus"], ["--redraw", "nowhere.json"], ["--redraw", __file__], ["--json", "/"],
                                       ["--times", "0"], ["--redraw", "EMPTY"]])
def test_bad_input_is_one_line_and_code_2(arguments, tmp_path, capsys):
    (tmp_path / "empty.json").write_text("[]")
    arguments = [tmp_path / "empty.json" if a == "EMPTY" else a for a in arguments]
    assert run("--quick", *arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
