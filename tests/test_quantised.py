"""engine/quantised.py: a cache in eight bits is the rolling cache, up to the rounding of what
was committed.

Proved here, at random sizes: a number that comes back errs by half a scale at most (fp8: by a
sixteenth of itself), whatever the size of its row, and zeros stay zeros; the same frames are
kept at the same times as RollingCache keeps them, and every one reads the same for as long as
it is there; the chunk being made is exact; a stream in eight bits stays within a stated
distance of one in floats; bytes are those of the buffers, scales included; the full window of
engine/streaming.py, compiled, makes the same video; a new caption finds a cache of its kind.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import sample  # noqa: E402
from engine.judging import cache_line  # noqa: E402
from engine.quantised import FP8, INT8, FORMATS, make_cache, why_not  # noqa: E402
from engine.streaming import FastStream, FullWindow  # noqa: E402
from engine.switching import SWITCHES  # noqa: E402
from experiments import eight_bits, tables  # noqa: E402
from flow import Draws, GuidedStream, Stream, rollout  # noqa: E402
from lab import Dice, a_clip, a_model, configs, error, forall, seeds  # noqa: E402
from mla_video import PRESETS, VideoDiT  # noqa: E402
from test_cli import TINY, fails_in_one_line, model_file  # noqa: E402, F401
from test_fast_stream import NONE, lively_model, video_of  # noqa: E402

names = pytest.mark.parametrize("name", ["int8", "fp8"])


def format_named(code, name: str):
    return code.quantised.FORMATS[name]


# ---- a row -----------------------------------------------------------------------------------

def allowed_error(name: str, x, scale):
    """How far each number [..., groups, n] of x may come back from where it was."""
    half_step = scale[..., None] / 2
    if name == "int8":
        return half_step.expand_as(x)
    # Floats of 3 bits behind the point; below the smallest normal one, 2^-6, they are as
    # coarse as there.
    return torch.maximum(x.abs() / 16, half_step * 2**-9)


@forall(name=st.sampled_from(["int8", "fp8"]), shape=st.tuples(*[st.integers(1, 4)] * 4),
        size=st.integers(-30, 30), seed=seeds)
def test_a_number_comes_back_within_half_a_step(code, name, shape, size, seed):
    format = format_named(code, name)
    dice = Dice(seed)
    B, T, groups, width = shape
    parts = dice.normal(*shape)
    parts = parts * torch.exp(3 * dice.normal(B, T, groups, 1)) * 10.0**size
    x = parts.flatten(-2)                                  # [B, T, groups * width]
    values, scale = format.quantise(x, groups)
    assert values.dtype == torch.int8 and values.shape == x.shape, "a byte for each number"
    assert scale.dtype == torch.float32 and scale.shape == (B, T, groups), \
        "one scale for each token and part"
    back = format.dequantise(values, scale, x.dtype)
    assert back.dtype == x.dtype
    wrong = (back - x).abs().unflatten(-1, (groups, width))
    bound = allowed_error(name, parts, scale.double())
    worst = (wrong / bound).max().item()
    assert worst <= 1 + 1e-4, f"off by {worst:.2f} times what {name} may be off by"
    largest = values.view(format.dtype).double().unflatten(-1, (groups, width)).abs().amax(-1)
    assert (largest == format.top).all(), \
        f"the largest of a part must become {format.top}, not {largest.unique().tolist()}"


@names
def test_no_number_of_a_byte_is_left_unused(name):
    format = FORMATS[name]
    info = torch.finfo if format.dtype.is_floating_point else torch.iinfo
    assert format.top == info(format.dtype).max, "half the range costs a bit"


@names
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zeros_and_next_to_nothing_stay_what_they_are(name, dtype):
    format = FORMATS[name]
    smallest = torch.finfo(dtype).tiny
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [smallest, -smallest]], dtype=dtype)
    back = format.dequantise(*format.quantise(x), dtype)
    assert back.dtype == dtype and back.isfinite().all()
    assert torch.equal(back[:2], x[:2])
    assert (back[2] - x[2]).abs().max() <= smallest / 2


# ---- the cache -------------------------------------------------------------------------------

LAYERS = 2
WIDTHS = (4, 6)                                            # of two groups each


class Pair:
    """The same rows through RollingCache and through one in eight bits."""

    def __init__(self, code, name: str, groups: int, seed: int, **sizes):
        self.dice = Dice(seed)
        self.format = format_named(code, name)
        self.groups = groups
        self.exact = code.cache.RollingCache(LAYERS, 1, WIDTHS, dtype=torch.float64, **sizes)
        self.small = code.quantised.QuantisedCache(
            LAYERS, 1, WIDTHS, format=self.format, groups=groups, dtype=torch.float64, **sizes)

    def rows(self) -> list:
        tokens = self.exact.chunk * self.exact.tokens
        return [tuple(self.dice.normal(1, tokens, width) for width in WIDTHS)
                for _ in range(LAYERS)]

    def rounded(self, part):
        """A row as it must come back: rounded once."""
        return self.format.dequantise(*self.format.quantise(part, self.groups), part.dtype)

    def look(self) -> None:
        """Both caches are read in every layer."""
        past = self.exact.filled * self.exact.tokens
        before = [buffer.clone() for buffer in self.small.buffers]
        for layer, rows in enumerate(self.rows()):
            got = self.small.peek(layer, rows)
            want = self.exact.peek(layer, rows)
            for mine, theirs in zip(got, want):
                assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
                assert torch.equal(mine[:, past:], theirs[:, past:]), \
                    "the chunk being made is not committed: it stays exact"
                assert torch.equal(mine[:, :past], self.rounded(theirs[:, :past])), \
                    "a committed row must read as it was rounded, once, for as long as it is kept"
        for old, buffer in zip(before, self.small.buffers):
            assert torch.equal(old.view(torch.uint8), buffer.view(torch.uint8)), "peek wrote"

    def commit(self) -> None:
        rows = self.rows()
        self.exact.commit(rows)
        self.small.commit(rows)


SIZES = dict(tokens=st.integers(1, 3), chunk=st.integers(1, 3), sink=st.integers(0, 3),
             ring=st.integers(0, 4), spare=st.integers(0, 4))


@forall(name=st.sampled_from(["int8", "fp8"]), groups=st.integers(1, 2),
        chunks=st.integers(1, 8), seed=seeds, recorded=st.booleans(), **SIZES)
def test_it_is_the_rolling_cache_of_rounded_rows(
        code, name, groups, chunks, seed, recorded, tokens, chunk, sink, ring, spare):
    window = sink + ring + chunk
    pair = Pair(code, name, groups, seed, tokens=tokens, chunk=chunk, window=window, sink=sink,
                horizon=window + spare)
    with torch.set_grad_enabled(recorded):
        for _ in range(chunks):
            pair.look()
            pair.commit()
            assert torch.equal(pair.small.frames(), pair.exact.frames())
            for mine, theirs in zip(pair.small.positions(), pair.exact.positions()):
                assert torch.equal(mine, theirs)
        pair.look()
        per_token = sum(WIDTHS) + 2 * 4 * groups
        assert pair.small.bytes_per_token == per_token
        assert pair.small.nbytes == LAYERS * (window - chunk) * tokens * per_token
        with pytest.raises(ValueError, match="have no gradients"):
            pair.small.commit(pair.rows(), detach=False)


@pytest.mark.parametrize("attention, whole, eight", [("mla", 448, 232), ("dense", 6144, 3168)])
@names
def test_bytes_at_the_papers_size(attention, whole, eight, name):
    """192 + 32 bytes and two scales; dense: 2 * 1536 bytes and 2 * 12 scales."""
    config = replace(PRESETS["wan1.3b"], attention=attention, layers=1)
    with torch.device("meta"):
        model = VideoDiT(config).bfloat16()
    assert make_cache(model, 1).bytes_per_token == whole
    cache = make_cache(model, 1, FORMATS[name])
    assert cache.bytes_per_token == eight
    assert cache.nbytes == 18 * 1560 * eight and cache.buffers[0].device.type == "meta"


# ---- in the model ----------------------------------------------------------------------------

@forall(sizes=configs(min_chunks=2, layers=2), name=st.sampled_from(["int8", "fp8"]),
        chunks=st.integers(1, 6), seed=seeds)
@torch.no_grad()
def test_a_stream_in_eight_bits_is_one_in_floats_within_rounding(
        code, sizes, name, chunks, seed):
    """Chunks of one clip, committed to both caches: v is off by 5 % at most (fp8: 15 %), and
    not off at all while nothing is kept."""
    model, dice = a_model(code, sizes, seed)
    exact = model.make_cache(1)
    small = code.quantised.make_cache(model, 1, format_named(code, name))
    bound = {"int8": 0.05, "fp8": 0.15}[name]
    for _ in range(chunks):
        x, sigma, caption = a_clip(model, dice, 1, model.config.chunk)
        want = model.denoise(x, sigma, caption, exact)
        got = model.denoise(x, sigma, caption, small)
        wrong = error(got, want)
        assert wrong <= bound, f"v is off by {wrong:.1%} after {exact.seen} frames"
        if exact.filled == 0:
            assert wrong == 0, "nothing is kept, and yet v is another"
        model.commit(x, caption, exact)
        model.commit(x, caption, small)


# ---- the full window -------------------------------------------------------------------------

@names
@pytest.mark.parametrize("window, sink", [(9, 1), (5, 1), (4, 1), (6, 0), (3, 0)])
def test_the_full_window_keeps_the_same_bytes(name, window, sink):
    """For rings shorter and longer than a chunk, and none at all."""
    model = lively_model("dense")
    model.config = replace(model.config, window=window, sink=sink)
    cache = make_cache(model, 2, FORMATS[name])
    size = cache.chunk * cache.tokens

    def new_rows():
        return [(torch.randn(2, size, 32), torch.randn(2, size, 32)) for _ in range(2)]

    while cache.filled < cache.capacity:
        cache.commit(new_rows())
    full = FullWindow(cache)
    assert full.format == FORMATS[name] and full.bytes_per_token == cache.bytes_per_token
    provisional = 2 * 2 * size * (32 + 32) * 4             # layers, videos; float32
    assert full.nbytes == cache.nbytes + provisional
    for _ in range(5):
        rows = new_rows()
        for layer in range(2):
            seen = cache.peek(layer, rows[layer])
            for mine, theirs in zip(full.peek(layer, rows[layer]), seen):
                assert torch.equal(mine, theirs)
        with torch.no_grad():
            cache.commit(rows)
            full.commit(rows)
        assert torch.equal(full.frames(), cache.frames())


@pytest.mark.rest
@pytest.mark.parametrize("kind, name", [("mla", "int8"), ("dense", "fp8")])
def test_a_compiled_stream_makes_the_same_video(kind, name):
    """aot_eager: one graph, functionalised, without Inductor; guided, past the horizon."""
    model = lively_model(kind)
    caption = torch.randint(1, 20, (2, 3))

    def video(stream_of):
        sides = [stream_of(words, make_cache(model, 2, FORMATS[name]))
                 for words in (caption, NONE)]
        return video_of(GuidedStream(*sides, 2.0), 18)

    want = video(lambda words, cache: Stream(model, words, cache))
    torch._dynamo.reset()
    got = video(lambda words, cache: FastStream(model, words, cache, backend="aot_eager"))
    # One number that rounding takes to the next step moves what follows by a step of 127.
    assert want.std() > 0.1 and (got - want).abs().max() <= 0.02 * want.abs().max()


@pytest.mark.parametrize("switch, compiled", [
    ("recache", False),
    ("cut", False),
    pytest.param("recache", True, marks=pytest.mark.rest),
])
def test_a_new_caption_finds_a_cache_of_its_kind(switch, compiled):
    """What is put into a cache in eight bits is in eight bits: recached under its own caption,
    a video goes on as if nothing had happened."""
    model = lively_model("mla")
    first = torch.randint(1, 20, (2, 3))
    cache = make_cache(model, 2, INT8)
    stream = Stream(model, first, cache)
    if compiled:
        stream = FastStream(model, first, cache, backend="eager")
    change = SWITCHES[switch](stream, steps=2)
    made = []
    for chunk in rollout(stream, 18, Draws(torch.Generator().manual_seed(1)), steps=2):
        made.append(chunk)
        change.remember(chunk)
        change.chunks += 1
    before = stream.cache.peek(0, zero_rows(model))
    before = [part.clone() for part in before]
    change.change(torch.tensor([0]))
    after = stream.cache.peek(0, zero_rows(model))
    for old, new in zip(before, after):
        assert torch.equal(old[1], new[1]), "the other video must not notice"
        moved = error(new[0], old[0])
        # Rows of the first layer hear no caption and no past: recached, they are what they were.
        assert moved <= 0.02 if switch == "recache" else 0.02 < moved < 2, f"moved by {moved}"


def zero_rows(model):
    tokens = model.config.chunk * model.config.tokens
    return tuple(torch.zeros(2, tokens, width) for width in model.blocks[0].attention.widths)


# ---- the command -----------------------------------------------------------------------------

@names
@pytest.mark.parametrize("more", [[], ["--guidance=2"], ["--switch=cut", "--prompt=red disc",
                                                         "--prompt=9: blue disc"]])
def test_sample_takes_the_flag(capsys, tmp_path, model_file, name, more):  # noqa: F811
    sample.main([f"--checkpoint={model_file}", f"--cache={name}", "--frames=18", "--steps=1",
                 "--device=cpu", f"--out={tmp_path}", *more])
    said = capsys.readouterr().out
    videos = 1 if "--prompt=red disc" in more else 4
    # 2 layers would be twice that: 9 frames of 16 tokens, 8 + 6 bytes and two scales.
    kept = videos * 9 * 16 * (8 + 6 + 2 * 4)
    assert f"{kept:,} bytes in {name} for {videos} video" in said
    assert (tmp_path / "sample.gif").is_file()


@pytest.mark.parametrize("compiled", ["--compile", "--no-compile"])
def test_both_sides_of_guidance_keep_what_was_asked_for(compiled):
    model = VideoDiT(TINY)
    args = sample.read_flags(["--cache=int8", "--guidance=2", compiled])
    stream = sample.open_stream(args, model, NONE)
    assert stream.captioned.cache.format == stream.plain.cache.format == INT8
    assert stream.captioned.cache.nbytes == make_cache(model, 2, INT8).nbytes


def test_the_line_on_the_cache_counts_real_buffers():
    model = VideoDiT(TINY)
    assert cache_line(model, 1, INT8).startswith("cache        3,168 bytes in int8 for 1 video,")
    assert cache_line(model, 1, INT8).endswith("keeps 36,864 in float32 (91.4 % less)")
    assert "in float32" not in cache_line(model, 1), "as it was"


def test_fp8_is_refused_where_there_is_none(capsys, monkeypatch, model_file):  # noqa: F811
    assert why_not(FP8, torch.device("cpu")) is None and why_not(None, torch.device("mps")) is None
    assert why_not(INT8, torch.device("mps")) is None
    assert "mps has no 8-bit floats" in why_not(FP8, torch.device("mps"))
    for capability, reason in {(8, 9): False, (9, 0): False, (8, 0): True}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert bool(why_not(FP8, torch.device("cuda"))) == reason
    monkeypatch.setattr(sample, "why_not", lambda format, device: "this device has none")
    fails_in_one_line(capsys, sample.main, [f"--checkpoint={model_file}", "--cache=fp8"],
                      "--cache fp8: this device has none", "use --cache int8")
    fails_in_one_line(capsys, sample.main, ["--cache=int2"], "int2", "float32", "int8", "fp8")


# ---- the experiment --------------------------------------------------------------------------

def found_with(moved: float, seeds: int) -> dict:
    """Results in which float32's metrics are 0.5 and 0.6 by seed, int8's `moved` from there."""
    runs = {}
    for name, by in {"float32": 0.0, "int8": moved}.items():
        judged = []
        for seed in range(seeds):
            values = dict.fromkeys(eight_bits.METRICS, 0.5 + 0.1 * seed + by)
            judged.append(values | {"apart": by})
        runs[name] = {"bytes": {"model": 32, "paper": 232}, "runs": judged}
    model = {"stage": "dmd", "steps": 1, "seed": 0, "formats": runs}
    return {"videos": 8, "frames": 960, "models": {"mla": model}}


@pytest.mark.parametrize("moved, seeds, said", [
    (0.09, 2, "of sampling: 0 of 9"),
    (0.11, 2, "of sampling: 9 of 9"),
    (-0.11, 2, "of sampling: 9 of 9"),
    (0.0, 1, "of training: 0 of 9"),
])
def test_the_verdict_is_on_the_spread_of_seeds(moved, seeds, said):
    quality = tables.results("quality.json")
    found = found_with(moved, seeds)
    verdicts = eight_bits.verdict(found, quality)[1]
    assert ["MLA, int8", said] in [row[:2] for row in verdicts]
    by_sampling = [row for row in verdicts if "of sampling" in row[1]]
    assert len(by_sampling) == (seeds == 2), "one seed has no spread"
    head, rows = eight_bits.table(found)
    assert len(rows) == 2 and all(len(row) == len(head) for row in rows)
    assert rows[1][:3] == ["MLA, `dmd`, int8", "232", "32"]
    found["frames"] = 120
    verdicts = eight_bits.verdict(found, quality)[1]
    assert not [row for row in verdicts if "of training" in row[1]], \
        "the spread over training seeds is that of a minute"


@pytest.mark.rest
def test_the_experiment_runs(tmp_path):
    path = tmp_path / "found.json"
    eight_bits.main([f"--checkpoint={ROOT / 'checkpoints/toy.pt'}", "--videos=2", "--seeds=1",
                     "--frames=120", "--formats", "float32", "int8", "--device=cpu",
                     f"--json={path}"])
    found = json.loads(path.read_text())
    formats = found["models"]["mla"]["formats"]
    apart = {name: row["runs"][0]["apart"] for name, row in formats.items()}
    assert apart["float32"] == 0 < apart["int8"] < 0.1, "the same noise, and nearly the same video"
    assert formats["int8"]["bytes"] == {"model": 32, "paper": 232}
    assert found["frames"] == 120 and "commit" in found


@pytest.mark.rest
def test_an_interrupted_run_goes_on(tmp_path, monkeypatch, capsys):
    """With a recall model, too; a seed that lacks a format is judged again, and no other."""
    from engine.checkpoint import save_model
    from experiments.memory import FULL
    from mla_video import VideoDiT
    torch.manual_seed(0)
    small = replace(FULL.config_of("mla"), layers=1, ffn=32)
    save_model(tmp_path / "recall.pt", VideoDiT(small), data="recall", stage="tf", steps=1, seed=0)
    path = tmp_path / "found.json"
    flags = [f"--checkpoint={ROOT / 'checkpoints/toy.pt'}", f"--recall={tmp_path / 'recall.pt'}",
             "--videos=2", "--seeds=1", "--frames=120", "--formats", "int8", "--device=cpu",
             f"--json={path}"]
    eight_bits.main(flags)
    whole = json.loads(path.read_text())
    assert "colour" in whole["models"]["recall"]["formats"]["int8"]["runs"][0]
    head, rows = eight_bits.table(whole)
    assert len(rows) == 4
    broken = json.loads(path.read_text())
    del broken["models"]["recall"]["formats"]["int8"]["runs"][0]
    path.write_text(json.dumps(broken))
    capsys.readouterr()
    eight_bits.main(flags)
    printed = capsys.readouterr().out
    assert "recall int8 0" in printed and "mla int8 0" not in printed
    assert json.loads(path.read_text())["models"] == whole["models"]
