"""The rank question: counting rules against closed forms, chance against its theory, and
verdicts that can come out false."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from pytest import approx

from attention import MLA, Dense
from engine.checkpoint import save_model
from experiments import rank, spectrum, verdicts
from experiments.rank import effective_rank, energy_kept, energy_rank
from experiments.verdicts import OPEN, REFUTED, REPRODUCED, decide
from mla_video import VideoDiT
from rope3d import Rope3D

E, H, C = 32, 2, 4
CPU = torch.device("cpu")


def singular(matrix):
    return torch.linalg.svdvals(matrix.double())


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# ---- counting --------------------------------------------------------------------------------

def test_known_spectra():
    assert energy_rank(torch.tensor([2.0])) == approx(0.99)
    flattest = torch.full((16,), 3.0)
    assert energy_rank(flattest) == approx(0.99 * 16)      # the ceiling of the 99 % rule

    values = torch.tensor([1.0, 0.0, 2.0])                 # energies 1/5, 0, 4/5
    three = singular(torch.diag(values))
    assert energy_rank(three, 0.8) == approx(1)
    assert energy_rank(three, 0.9) == approx(1.5)
    equal = torch.tensor([3.0, 3.0, 0.0])
    assert effective_rank(equal) == approx(2)

    # A geometric law of energy 2^-k: k directions hold 1 - 2^-k of it, and its entropy is 2
    # bits.
    powers = torch.arange(60).double()
    halves = 0.5 ** (powers / 2)
    whole = math.ceil(energy_rank(halves))
    assert whole == math.ceil(math.log2(100)) == 7
    assert energy_kept(halves, 3) == approx(7 / 8)
    assert effective_rank(halves) == approx(4)


def test_orthogonal_matrices_count_every_direction_and_rotations_none():
    noise = torch.randn(24, 24, generator=seeded(0)).double()
    Q = torch.linalg.qr(noise)[0]
    ones = singular(Q)
    assert energy_rank(ones) == approx(0.99 * 24)
    assert effective_rank(ones) == approx(24)

    five = singular(Q[:, :5] @ Q[:5])                      # five equal directions in a full matrix
    assert energy_rank(five) == approx(0.99 * 5)
    assert effective_rank(five) == approx(5)

    values = torch.arange(1.0, 25).double()
    steep = torch.diag(values)
    turned = singular(Q @ steep @ Q)
    scaled = singular(7 * steep)
    assert energy_rank(turned) == approx(energy_rank(scaled))


def test_a_matrix_of_zeros_has_no_rank():
    with pytest.raises(ValueError, match="zeros"):
        energy_rank(torch.zeros(4))


# ---- chance ----------------------------------------------------------------------------------

@pytest.mark.parametrize("beta", [0.1, 0.25, 0.5, 0.9])
def test_marchenko_pastur(beta):
    low, high = rank.marchenko_pastur_edges(beta)
    x = rank.marchenko_pastur(2000, beta).square()
    assert low <= x.min() and x.max() <= high
    assert (x.diff() <= 0).all()
    # The law's first two moments.
    assert x.mean() == approx(1, abs=2e-3)
    assert x.square().mean() == approx(1 + beta, rel=5e-3)

    # A real matrix ends where the edges say, and counts as many directions.
    n = 600
    m = round(n / beta)
    s = singular(torch.randn(m, n, generator=seeded(0)))
    eigenvalues = s.square() / m
    assert eigenvalues.min() > low - 0.1
    assert eigenvalues.max() < high + 0.1
    real = energy_rank(s) / n
    law = energy_rank(x.sqrt()) / 2000
    assert real == approx(law, abs=5e-3)


def test_what_the_docstring_says_of_chance():
    s = rank.marchenko_pastur(1536, 0.5)
    rank99 = energy_rank(s) / 1536
    assert energy_kept(s, 192) == approx(0.29, abs=0.005)
    assert rank99 == approx(0.93, abs=0.005)

    # M at the paper's geometry: a product of noise, and a matrix of noise that is cut.
    height = 12 * (96 + 128)
    product = rank.random_product(height, 192, 1536, seed=0)
    noise = rank.marchenko_pastur(1536, 1536 / height)
    used_by_product = energy_rank(product) / 192
    used_by_cut = energy_rank(noise[:192]) / 192
    assert used_by_product == approx(0.973, abs=0.002)
    assert used_by_cut == approx(0.988, abs=0.002)


def test_random_product_is_a_product():
    g = seeded(5)
    up = torch.randn(30, 4, generator=g, dtype=torch.float64)
    down = torch.randn(4, 20, generator=g, dtype=torch.float64)
    product = singular(up @ down)[:4]
    assert torch.allclose(rank.random_product(30, 4, 20, 5), product)


# ---- the decision rule -----------------------------------------------------------------------

def test_interval_and_slope():
    half = 4.303 / 3**0.5
    assert verdicts.interval([1.0, 2.0, 3.0]) == approx((2, 2 - half, 2 + half))
    assert verdicts.slope([1, 2, 4], [5, 10, 20]) == approx(1)
    assert verdicts.slope([1, 2, 4], [3, 3, 3]) == approx(0)


@pytest.mark.parametrize("values, verdict", [
    ([0.94, 0.95, 0.96], REPRODUCED),
    ([0.5, 0.51, 0.52], REFUTED),
    ([0.8, 0.9, 1.0], OPEN),
    ([0.94, 0.9, 0.92], OPEN),
])
def test_decide(values, verdict):
    conditions = {"a": values, "b": [0.97, 0.97, 0.97]}
    assert decide(conditions, low=0.9)["verdict"] == verdict
    needs = {"it could come out otherwise": False}
    assert decide(conditions, low=0.9, needs=needs)["verdict"] == OPEN


# ---- layers ----------------------------------------------------------------------------------

def dense(seed, rank_of_kv=E):
    """A dense layer; with rank_of_kv < E its [W_K; W_V] is of that rank."""
    torch.manual_seed(seed)
    head = E // H
    layer = Dense(E, H, Rope3D(head, head), norm=False).double()
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
        shrink = torch.full((width, 1), 0.05)
        shrink[0] = 1
        layer.W_DKV.weight.data *= shrink
    return layer


@pytest.mark.parametrize("width", [1, C, 20, E])
def test_the_tail_predicts_what_conversion_loses(width):
    old = dense(0)
    new = MLA.from_dense(old, width, E, 6)
    inputs = torch.randn(E, 500, generator=seeded(1)).double()
    lost = rank.reconstruction(old, new, torch.cov(inputs))
    assert lost["measured"] == approx(lost["predicted"], abs=1e-12)        # Eckart-Young
    assert -1e-12 <= lost["data_best"] <= lost["data"] + 1e-12

    white = rank.reconstruction(old, new, torch.eye(E).double())
    assert white["data"] == approx(lost["measured"])
    assert white["data_best"] == approx(lost["predicted"])


def test_covariance_is_that_of_the_layer_inputs_on_clean_tokens():
    torch.manual_seed(0)
    model = VideoDiT(replace(TINY.config, attention="mla", query_latent=32, latent=C))
    video = torch.randn(2, 6, 3, 8, 8)
    caption = torch.zeros(2, 3, dtype=torch.long)

    inputs = []
    first = model.blocks[0].attention.W_DKV
    hook = first.register_forward_hook(lambda layer, args, out: inputs.append(args[0].detach()))
    cache = model.make_cache(2)
    with torch.no_grad():
        for chunk in video.split(3, dim=1):                # what streaming stores
            model.commit(chunk, caption, cache)
    hook.remove()

    tokens = torch.cat(inputs, dim=1).flatten(0, 1)
    expected = torch.cov(tokens.T).double()
    assert torch.allclose(rank.covariances(model, video, caption)[0], expected, atol=1e-5)


def test_conversion_replaces_self_attention_and_nothing_else():
    torch.manual_seed(0)
    model = VideoDiT(TINY.config)
    mla = spectrum.convert(model, C)
    old = model.state_dict()
    new = mla.state_dict()
    rest = [name for name in old if ".attention." not in name]
    assert rest and all(torch.equal(old[name], new[name]) for name in rest)
    assert [block.attention.widths for block in mla.blocks] == [(C, TINY.config.rope)]
    assert torch.linalg.matrix_rank(rank.composite(mla.blocks[0].attention)) == C


@pytest.mark.parametrize("optimiser, kind", [
    ("Muon", torch.optim.Muon),
    ("AdamW", torch.optim.AdamW),
])
def test_each_arm_trains_the_matrices_by_its_own_optimiser(optimiser, kind, monkeypatch):
    made = []

    class Kept(spectrum.Trainer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            matrices = self.learner.optimisers[0].param_groups[0]["params"]
            made.append((self, matrices))

    monkeypatch.setattr(spectrum, "Trainer", Kept)
    torch.manual_seed(0)
    model = VideoDiT(TINY.config)
    pool = spectrum.Pool(4, TINY.config, 0, CPU)
    end, curve = spectrum.fit(model, TINY, optimiser, 2, pool, 0, CPU)

    trainer, matrices = made[0]
    used = trainer.learner.optimisers[0]
    group = used.param_groups[0]
    assert isinstance(used, kind)
    assert [id(p) for p in group["params"]] == [id(p) for p in matrices]
    assert group["lr"] == TINY.lr
    assert [point["step"] for point in curve] == [0, 1, 2]
    # A copy was trained: the model that was given is still where it started.
    found = rank.dense_spectrum(end.blocks[0].attention, model.blocks[0].attention)
    assert found["moved"] > 0


# ---- verdicts that can come out false --------------------------------------------------------

def used(layer):
    """`budget` of a layer that training has moved by all its norm."""
    found = rank.budget([layer], [torch.zeros(1)])
    return {**found, "moved": 1.0}


def ranks_of(power, first=10):
    """Effective ranks of latents that grow as objects^power."""
    return {str(n): {"effective": first * n**power} for n in (1, 2, 4)}


def world_where_all_holds():
    """What `measure` finds, made up so that every claim holds: layers of noise, and quality
    that is kept at E / 8 and lost at C = 1."""
    spectra = []
    curves = []
    for seed in range(3):
        layer = rank.dense_spectrum(dense(seed), dense(seed + 10))
        layer["kept"] = 0.46
        spectra.append([layer])
        curves.append([{"step": step, **used(latent(seed))} for step in (0, 1)])
    good = dict(loss=0.1, colour=0.95, shape=0.9, place=0.9, survival=0.9)
    bad = dict(loss=0.2, colour=0.3, shape=0.3, place=0.1, survival=0.2)
    quality = {
        "dense": good,
        "dense_tuned": good,
        "converted": {"1": bad, "4": bad, "8": bad},
        "tuned": {"1": bad, "4": good, "8": good},
    }
    lost = {"predicted": 0.6, "measured": 0.6, "data": 0.2, "data_best": 0.1}
    ranks = {"1": 0.99, "4": 3.9, "8": 7.7}
    latents = {kind: ranks_of(0.2) for kind in ("trained", "untrained", "noise")}
    starts = {"spectral": curves, "random": curves}
    return {
        "E": E,
        "C": C,
        "widths": [1, 4, 8],
        "chance_energy": [1 / E] * E,
        "chance_budget": {"rank99": [0.97], "effective": [0.9]},
        "chance_widths": ranks,
        "spectra": {"untrained": spectra, "Muon": spectra, "AdamW": spectra},
        "quality": [copy.deepcopy(quality) for _ in range(3)],
        "reconstruction": [{"1": lost, "4": lost, "8": lost}] * 3,
        "rank_by_width": [dict(ranks) for _ in range(3)],
        "latents": [latents] * 3,
        "budget": {"Muon": dict(starts), "AdamW": dict(starts)},
    }


def verdict(found, words):
    """The verdict on the one claim that contains these words."""
    (one,) = [v for v in verdicts.judge(found) if words in v["claim"]]
    return one["verdict"]


def test_a_world_where_all_holds():
    judged = verdicts.judge(world_where_all_holds())
    assert {one["verdict"] for one in judged} == {REPRODUCED}


def test_low_rank_attention_is_called_so():
    found = world_where_all_holds()
    found["spectra"]["Muon"] = []
    for seed in range(3):
        layer = rank.dense_spectrum(dense(seed, rank_of_kv=5), dense(seed + 10))
        found["spectra"]["Muon"].append([layer])
    assert verdict(found, "is not low-rank") == REFUTED
    # Five directions of 32, and four kept: that is nearly all of the energy.
    assert verdict(found, "about 46 %") == REFUTED

    # Converted at any C, M has no more directions than the dense layer.
    for seed, ranks in enumerate(found["rank_by_width"]):
        low = dense(seed, rank_of_kv=2)
        for width in found["widths"]:
            converted = MLA.from_dense(low, width, E, 6)
            ranks[str(width)] = width * used(converted)["rank99"]
    assert verdict(found, "sets the rank") == REFUTED


@pytest.mark.parametrize("when, claim", [(0, "before training"), (-1, "after training")])
@pytest.mark.parametrize("init", ["spectral", "random"])
def test_a_collapsed_budget_is_called_so(when, claim, init):
    found = world_where_all_holds()
    curves = copy.deepcopy(found["budget"]["AdamW"][init])
    found["budget"]["AdamW"][init] = curves
    for seed, curve in enumerate(curves):
        step = curve[when]["step"]
        curve[when] = {"step": step, **used(latent(seed, collapsed=True))}
    assert verdict(found, claim) == REFUTED
    assert (verdict(found, "start alike") == REFUTED) == (when == -1)


def test_lost_quality_is_called_so():
    found = world_where_all_holds()
    for q in found["quality"]:
        q["tuned"]["4"] = q["tuned"]["1"]
    assert verdict(found, "true past") == REFUTED
    assert verdict(found, "long rollouts") == REFUTED
    assert verdicts.breaking(found)["survival"] == 4


def test_an_insensitive_test_of_quality_is_not_believed():
    """Where one latent does as well as four, nothing has been shown about four."""
    found = world_where_all_holds()
    for q in found["quality"]:
        q["tuned"]["1"] = q["tuned"]["4"]
    assert verdict(found, "true past") == OPEN
    assert verdict(found, "long rollouts") == OPEN
    assert verdicts.breaking(found)["survival"] is None


def test_weights_that_training_left_alone_prove_nothing():
    found = world_where_all_holds()
    spectra = copy.deepcopy(found["spectra"]["Muon"])
    found["spectra"]["Muon"] = spectra
    spectra[1][0]["moved"] = 0.1
    assert verdict(found, "is not low-rank") == OPEN

    found["budget"]["Muon"]["random"][2][-1]["moved"] = 0.1
    assert verdict(found, "after training") == OPEN
    assert verdict(found, "sets the rank") == OPEN
    assert verdict(found, "before training") == REPRODUCED


def noise_passes(found, words):
    return [v["noise"] for v in verdicts.judge(found) if words in v["claim"]]


def test_what_noise_would_pass_is_marked():
    found = world_where_all_holds()
    assert noise_passes(found, "not low-rank") == [True]
    assert noise_passes(found, "budget") == [True]
    for layers in found["spectra"]["untrained"]:
        layers[0]["kept"] = 0.29
    assert noise_passes(found, "46 %") == [False]


@pytest.mark.parametrize("power, expected", [(1.0, REFUTED), (0.2, REPRODUCED)])
def test_the_prediction_about_objects(power, expected):
    found = world_where_all_holds()
    for run in found["latents"]:
        run["trained"] = ranks_of(power, first=6)
    assert verdict(found, "degrees of freedom") == expected


# ---- the command -----------------------------------------------------------------------------

TINY = spectrum.Plan(
    replace(spectrum.QUICK.config, dim=32, ffn=32, layers=1), widths=(1, 4), dense_steps=3,
    tune_steps=2, object_steps=1, batch=2, rollouts=1, frames=6, lr=1e-2, clips=4, held_out=2,
    euler=1)


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
    assert {"command", "commit", "device", "versions", "plan", "found", "verdicts"} <= set(out)
    assert len(out["verdicts"]) == 10
    for one in out["verdicts"]:
        assert {len(triple) for triple in one["intervals"].values()} == {3}
    for seed in out["found"]["reconstruction"]:
        for lost in seed.values():                         # at each C: measured as predicted
            assert lost["measured"] == approx(lost["predicted"], abs=1e-5)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    said = capsys.readouterr().out
    for one in out["verdicts"]:
        assert one["claim"] in said
        assert one["verdict"].upper() in said
    again = tmp_path / "again.png"
    assert run("--redraw", path, "--figure", again) == 0
    assert again.exists()


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
    # Two seeds of three: wider intervals, the same rules.
    assert run("--redraw", path) == 0


def test_pool_of_several_objects():
    one = spectrum.Pool(4, TINY.config, 0, CPU, objects=1, captions=False)
    two = spectrum.Pool(4, TINY.config, 0, CPU, objects=2, captions=False)
    assert (two.video >= one.video).all()
    assert (two.video > one.video).any()
    assert not two.caption.any()
    video, _ = two.batch(range(5))
    assert torch.equal(video[4], video[0])                 # round and round


@pytest.mark.parametrize("arguments", [
    ["--device", "abacus"],
    ["--redraw", "nowhere.json"],
    ["--redraw", __file__],
    ["--redraw", "EMPTY"],
    ["--json", "/"],
    ["--times", "0"],
])
def test_bad_input_is_one_line_and_code_2(arguments, tmp_path, capsys):
    empty = tmp_path / "empty.json"
    empty.write_text("[]")
    arguments = [empty if word == "EMPTY" else word for word in arguments]
    assert run("--quick", *arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1


# ---- figure 1 of any file --------------------------------------------------------------------

@pytest.mark.parametrize("attention", ["dense", "mla"])
def test_figure_one_of_a_checkpoint(tmp_path, capsys, attention):
    torch.manual_seed(0)
    config = replace(TINY.config, attention=attention, norm=True, query_latent=16, latent=4)
    path = tmp_path / "model.pt"
    model = VideoDiT(config)
    save_model(path, model)
    spectrum.main([f"--weights={path}", f"--json={tmp_path / 'found.json'}"])
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    W = rank.stacked(model.blocks[0].attention) if attention == "dense" \
        else rank.composite(model.blocks[0].attention)
    s = torch.linalg.svdvals(W)
    row = found["layers"][0]
    assert row["C"] == (config.dim // 8 if attention == "dense" else 4)
    assert row["kept"] == approx(rank.energy_kept(s, row["C"]), abs=1e-3)  # stored in half
    assert abs(row["rank99"] - rank.energy_rank(s)) < 1.01
    assert f"{row['kept']:.3f}" in said and "noise" in said
    assert len(found["layers"]) == config.layers


def test_singular_values_by_the_gram_matrix():
    W = torch.randn(20, 12, generator=seeded(0)).double()
    slow = torch.linalg.svdvals(W)
    quick = rank.quick_singular_values(W).flip(0)
    assert torch.allclose(quick, slow, atol=1e-12)
