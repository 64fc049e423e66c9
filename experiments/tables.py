"""The tables of README.md and RESULTS.md, made from results/: nothing measured is typed by
hand.

    python -m experiments.tables --write             puts every table between its markers
    python -m experiments.tables attention rank      prints these two

A table stands between <!-- table: NAME --> and <!-- end -->. tests/test_repo.py: the files hold
exactly what is generated. Which row wins is not known before a run, so sentences that depend on
figures are generated as well.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean

if not __package__:                    # started by its path
    sys.path.insert(0, str(Path(__file__).parent.parent))

from engine.command_line import short_commit
from experiments import convert, paper, paper_tables, verdicts
from experiments import eight_bits as cache_bits
from experiments import wan_speed as wan_size
from experiments.fast_path import judge
from experiments.memory import table as recall_table
from experiments.normal import section
from experiments.worlds import table as table_of_worlds
from mla_video import PRESETS

ROOT = Path(__file__).resolve().parent.parent
BENCH = "bench_h100.json"
NAMES = {"mla": "MLA", "dense": "dense"}


def results(name: str) -> dict:
    return json.loads((ROOT / "results" / name).read_text())


# ---- text ------------------------------------------------------------------------------------

def row(cells: Iterable) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def markdown(head: list, rows: list[list]) -> str:
    ruler = ["---"] * len(head)
    return "\n".join(row(cells) for cells in [head, ruler, *rows])


def origin(name: str, command: str = "") -> str:
    """Where figures come from, as a paragraph: command, machine, torch, commit, file, and what
    was edited by hand."""
    found = results(name)
    command = command or found["command"]
    torch_version = found["versions"].split(",")[0]
    commit = short_commit(found["commit"])
    text = f"`{command}` on {found['device']}, {torch_version}, commit {commit}: "
    text += f"[{name}](results/{name})."
    if edited := found.get("edited_by_hand"):
        text += f" Edited by hand: {edited}."
    return text


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min"


def number(value: float) -> str:
    return f"{value:.2f}"


def spread(values: list[float], show: Callable = number) -> str:
    """Mean over seeds and, if there are several, the least and the most."""
    middle = show(mean(values))
    if len(values) == 1:
        return middle
    least = show(min(values)).removesuffix(" %")
    most = show(max(values)).removesuffix(" %")
    return f"{middle} [{least}, {most}]"


def bold(values: list[float], show: Callable = percent) -> str:
    return f"**{spread(values, show)}**"


# ---- quality: a minute of video --------------------------------------------------------------

def late(run: dict, stage: str, metric: str) -> float:
    """Mean over the last 120 frames: one stretch of 12 frames alone is noise."""
    curve = run["stages"][stage]["curves"][metric]
    return mean(curve[-10:])


def over_seeds(attention: str, stage: str, metric: str) -> list[float]:
    """`late`, one value a seed."""
    runs = results("quality.json")["runs"]
    return [late(run, stage, metric) for run in runs if run["attention"] == attention]


MINUTE = {  # column: (metric, how a value is shown)
    "frames that show their caption": ("match", percent),
    "survive": ("survival", percent),
    "speed / true": ("speed", number),
    "distance of speeds": ("speeds", number),
    "jerkiness / true": ("residual", number),
}


def minute_row(attention: str, stage: str, runs: list[dict]) -> list[str]:
    switched = [run["stages"][stage]["switch"][2] for run in runs]
    name, comma, detail = stage.partition(",")
    cells = [f"{NAMES[attention]}, `{name}`{comma}{detail}"]
    for metric, show in MINUTE.values():
        cells.append(spread([late(run, stage, metric) for run in runs], show))
    cells.append(spread(switched, percent))
    return cells


def minute() -> str:
    found = results("quality.json")
    rows = []
    for attention in NAMES:
        runs = [run for run in found["runs"] if run["attention"] == attention]
        for stage in runs[0]["stages"]:
            rows.append(minute_row(attention, stage, runs))
    head = ["model, stage", *MINUTE, "new caption shown, third chunk"]
    seeds = sorted({run["seed"] for run in found["runs"]})
    said = (f"{found['rollouts']} videos of {found['frames']} frames at once, mean [least, most] of "
            f"{len(seeds)} seeds, means over the last 120 frames.")
    return f"{markdown(head, rows)}\n\n{said} {origin('quality.json')}"


def worlds() -> str:
    head, rows, below = table_of_worlds(results("worlds.json"))
    return f"{markdown(head, rows)}\n\n{below}"


STAGES = {  # stage: (given, learns, passes a chunk)
    "score": (
        "a whole clip, past and future",
        "its velocity: the judge that `dmd` needs",
        "-",
    ),
    "tf": (
        "the clean *real* past",
        "teacher forcing: the velocity of every chunk at every noise level",
        "12 + 1 to commit",
    ),
    "cd": (
        "the same",
        "consistency distillation: to jump where the teacher's flow leads",
        "4 + 1",
    ),
    "dmd": (
        "*its own* past, through the real cache",
        "distribution matching: videos that the judge cannot tell from real ones",
        "4 + 1",
    ),
}


def earlier_recipe(found: dict) -> str:
    """What must be said of the runs that were timed before dmd's recipe changed."""
    if found["commit"] == "e8f78cc":                       # restart was 0.25
        return "; `dmd` is an earlier recipe's"
    return ""


def stages() -> str:
    found = results("stages_cpu.json")
    rows = []
    total = 0
    for stage, (given, learns, passes) in STAGES.items():
        report = found["stages"][stage]
        seconds = report["training_seconds"]
        total += seconds
        survival = "-"
        if report["survival"]:
            survival = percent(report["survival"]["survival"])
        rows.append([f"`{stage}`", given, learns, passes, minutes(seconds), survival])
    head = ["stage", "given", "learns", "passes a chunk", "training", "survive 120 frames"]
    said = f"{minutes(total)} in all, one seed{earlier_recipe(found)}."
    shipped = f"The shipped `checkpoints/toy.pt`: {origin('toy.json')}"
    return f"{markdown(head, rows)}\n\n{said} {origin('stages_cpu.json')}\n\n{shipped}"


# ---- speed: which row wins is read off -------------------------------------------------------

def ms(point: dict, name: str) -> float | None:
    """Milliseconds of one row at one point; None if it was not timed, or failed."""
    return point.get("timing", {}).get(name, {}).get("ms")


def fastest_dense(point: dict) -> float:
    times = []
    for name in point["timing"]:
        time = ms(point, name)
        if name.startswith("dense") and time is not None:
            times.append(time)
    return min(times)


def over_dense(point: dict) -> float:
    """Fused MLA's time over that of the fastest dense row."""
    return ms(point, "fused") / fastest_dense(point)


def faster_up_to(points: list[dict]) -> int:
    """The most query tokens, of those measured in one window, up to which fused MLA was faster
    than dense attention everywhere; 0: nowhere. Between two points nothing is known."""
    most = 0
    for point in sorted(points, key=lambda point: point["L"]):
        if over_dense(point) >= 1:
            break
        most = point["L"]
    return most


def attention_points(found: dict) -> dict[int, list[dict]]:
    """{keys: points by query tokens} at which fused was timed, the longest window first."""
    windows = {}
    for point in found["sections"]["attention"]["points"]:
        if ms(point, "fused") is not None:
            windows.setdefault(point["T"], []).append(point)
    for points in windows.values():
        points.sort(key=lambda point: point["L"])
    return dict(sorted(windows.items(), reverse=True))


def worst_error(points: list[dict]) -> float:
    worst = 0
    for point in points:
        for timed in point["timing"].values():
            worst = max(worst, timed.get("error_ratio") or 0)
    return worst


ATTENTION = {  # row of the bench: its name here
    "dense cuDNN, K V ready": "dense, cuDNN",
    "dense flash, K V ready": "dense, flash",
    "dense FA4, K V ready": "dense, FA4",
    "dense cuDNN waves + flash": "dense, split into whole waves",
    "dense FA4 waves + flash": "dense, FA4, split into whole waves",
    "materialised": "MLA, materialised",
    "absorbed": "MLA, absorbed",
    "fused": "MLA, **fused**",
}
SHOWN = (16, 64, 256, 512, 1024, 1560, 2340, 4680)         # query tokens


def attention_window(T: int, points: list[dict]) -> str:
    shown = [point for point in points if point["L"] in SHOWN]
    rows = []
    for name, label in ATTENTION.items():
        times = [ms(point, name) for point in shown]
        if not any(times):                                 # FA4 was not installed
            continue
        rows.append([label, *("" if time is None else f"{time:.3f}" for time in times)])
    rows.append(["fused / fastest dense", *(number(over_dense(point)) for point in shown)])
    return markdown([f"{T:,} keys, ms; L =", *(point["L"] for point in shown)], rows)


def attention() -> str:
    found = results(BENCH)
    section = found["sections"]["attention"]
    windows = attention_points(found)
    tables = [attention_window(T, points) for T, points in windows.items()]
    every = sum(windows.values(), [])
    crossings = []
    for T in windows:
        absorbing = section["crossing"][f"absorbed / materialised, T={T}"]
        crossings.append(f"{absorbing:.0f} for {T:,} keys")
    limit = found["ceilings"]["matmul_tflops"]
    said = [
        "Error in bf16 against float64, on the tensors that are timed: at most "
        f"{worst_error(every):.1f} times dense's.",
        "Absorbing and materialising take the same time at the L of "
        f"{', '.join(crossings)}; in operations they cost the same at {section['L_star']:.0f}.",
    ]
    for L, predicted in found["sections"]["b200"].items():
        said.append(f"For a B200 public figures predict {predicted['ratio']:.2f} times dense's time "
                    f"at L = {L}; that was never measured.")
    said.append(f"This card's limit in a large product: {limit:.0f} TFLOP/s.")
    said.append(origin(BENCH))
    return "\n\n".join(tables) + "\n\n" + " ".join(said)


def model() -> str:
    """A block and a whole model, not attention alone."""
    sections = results(BENCH)["sections"]
    blocks = []
    for name, timed in sections["block"].items():
        blocks.append([name, f"{timed['ms']:.1f}", number(timed["over_dense"])])
    blocks = markdown(["one block, five passes a chunk", "ms", "over dense"], blocks)

    rollouts = []
    for name, timed in sections["rollout"].items():
        if name.startswith(tuple(NAMES)):
            shown = NAMES.get(name, name.replace("mla", NAMES["mla"]))
            rollouts.append([shown, number(timed["frames_per_s"]), f"{timed['ms']:.0f}"])
    head = ["whole model, full window (or 10 frames)", "latent frames a second", "ms a chunk"]
    rollouts = markdown(head, rollouts)

    batch = sections["batch"]
    videos = []
    for how in ("all at once", "in turns of 1 video"):
        dense = batch[f"dense, {how}"]["videos"]
        mla = batch[f"mla, {how}"]["videos"]
        videos.append([f"attention {how}", dense, mla, f"{mla / dense:.1f}"])
    head = ["largest batch before out-of-memory", "dense", "MLA", "MLA / dense"]
    videos = markdown(head, videos)
    return "\n\n".join([blocks, rollouts, videos, origin(BENCH)])


def targets() -> str:
    """What the fast path was to reach, met or missed."""
    rows = []
    for row in judge(results(BENCH)["sections"]):
        measured = "" if row["measured"] is None else number(row["measured"])
        rows.append([row["target"], f"{row['sense']} {row['limit']:g}", measured, row["verdict"]])
    return markdown(["what", "is to be", "measured", "verdict"], rows)


def memory() -> str:
    rows = []
    for preset, found in results(BENCH)["sections"]["memory"].items():
        rows.append([
            f"`{preset}`",
            found["mla"],
            found["dense"],
            f"{100 * found['saved']:.1f} %",
            f"{found['mla_bytes']:,}",
            f"{found['dense_bytes']:,}",
        ])
    head = ["preset", "MLA, bytes a token and layer", "dense", "saved", "MLA, bytes a video",
            "dense"]
    command = "python -m experiments.bench --only memory"
    return f"{markdown(head, rows)}\n\n{origin(BENCH, command)}"


# ---- rank ------------------------------------------------------------------------------------

def judged() -> list[dict]:
    """Today's verdicts on what was measured: the file has those of its own day, too."""
    return verdicts.judge(results("spectrum.json")["found"])


def word(verdict: dict) -> str:
    if verdict["noise"] and verdict["verdict"] == "reproduced":
        return "true, and noise passes"
    return verdict["verdict"]


def shown(triple: tuple[float, float, float]) -> str:
    middle, low, high = triple
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def deciding(verdict: dict) -> str:
    """The intervals that decide; of more than two, the span of their means."""
    intervals = verdict["intervals"]
    if len(intervals) > 2:
        middles = [triple[0] for triple in intervals.values()]
        said = f"{min(middles):.3f} to {max(middles):.3f} in {len(middles)} runs"
    else:
        parts = []
        for name, triple in intervals.items():
            parts.append(f"{name} {shown(triple)}")
        said = ", ".join(parts)
    for need in verdict["unmet"]:
        said += f"; not met: {need}"
    return said.replace("|", "/")


def gaps_after_a_true_past() -> str:
    """MLA minus dense attention, both tuned, at C = E / 8."""
    found = results("spectrum.json")["found"]
    keys = ("colour", "shape", "place")
    return verdicts.mean_gap(found, "tuned", str(found["C"]), keys)


def energy_kept(found: dict) -> str:
    """By either optimiser, the paper's first, and whether that alone would do."""
    claim = verdicts.kept_by_an_eighth(found)
    said = []
    intervals = claim.verdict()["intervals"]
    for name, triple in sorted(intervals.items()):         # AdamW, Muon
        inside = claim.low <= triple[1] and triple[2] <= claim.high
        where = "inside" if inside else "outside"
        whose = "the paper's optimiser" if name == "AdamW" else "ours"
        said.append(f"with {name}, {whose}, {shown(triple)}, {where} the rule's {claim.low} to "
                    f"{claim.high}")
    return "; ".join(said)


def rank() -> str:
    found = results("spectrum.json")
    rows = []
    for verdict in judged():
        control = verdict["control"] or "-"
        if verdict["noise"]:
            control = f"noise passes; {control}"
        rows.append([verdict["claim"], f"**{word(verdict)}**", deciding(verdict), control])
    E = found["found"]["E"]
    C = found["found"]["C"]
    head = [f"claim (here E = {E}, C = {C})", "verdict", "the number that decides", "control"]
    plan = found["plan"]
    said = [
        f"{len(found['seeds'])} seeds, 95 % intervals, {minutes(found['seconds'])}.",
        f"Long rollouts are of {plan['frames']} frames; training clips have "
        f"{plan['config']['frames']}.",
        f"After a true past MLA minus dense is {gaps_after_a_true_past()}; no rule asks for shape.",
        f"Of the energy of [W_K; W_V] (squared singular values) its best E / 8 directions keep, "
        f"{energy_kept(found['found'])}.",
        "Verdicts are judged anew from the file's measurements.",
        origin("spectrum.json"),
    ]
    return markdown(head, rows) + "\n\n" + " ".join(said)


def conversion() -> str:
    """Small models that learn on after the cut, and toys by the GPU's recipe, cut alone."""
    parts = []
    for name in ("convert.json", "convert_toy.json"):
        found = results(name)
        parts += [convert.table(found), f"{convert.sentences(found)} {origin(name)}"]
    return "\n\n".join(parts)


# ---- runs that are exact, and do not end -----------------------------------------------------

def largest(differences: dict[str, float]) -> str:
    return f"{max(differences.values()):.0e}"


def layers_of(cache_bytes: int) -> int:
    """Layers of a toy model whose cache of one video, in float32, has so many bytes."""
    toy = PRESETS["toy"]
    rows = (toy.window - toy.chunk) * toy.tokens
    return cache_bytes // (4 * rows * (toy.latent + toy.rope))


def exact() -> str:
    kills = results("kills.json")
    endless = results("endurance.json")
    layers = layers_of(endless["cache_bytes"])
    model_then = f"a model of {layers} layers; today's has {PRESETS['toy'].layers}"
    deterministic = results("deterministic_h100.json")
    counts = deterministic["tensors_of_STAGE.pt_and_those_equal_bit_for_bit"].values()
    stops = results("stops.json")
    rows = [
        ["SIGTERMs to the whole process group, loader workers on; restarts that went on exactly",
         f"{stops['good_restarts']} of {stops['kills']}", origin("stops.json")],
        ["SIGKILLs at random moments of a training run; restarts that went on exactly",
         f"{kills['good_restarts']} of {kills['kills']}", origin("kills.json")],
        [f"memory that frames 1,000 to {endless['frames']:,} of one stream took ({model_then})",
         f"{endless['memory_growth_kib']} KiB", origin("endurance.json")],
        ["time of its chunks over that of a young video's, timed right after; slowest tenth",
         f"{max(endless['time_against_a_young_video_by_tenth']):.3f}", "the same"],
    ]
    for name in ("parallel.json", "parallel_h100.json"):
        found = results(name)
        differences = found["largest_difference_of_a_loss"]["float32"]
        rows.append([f"losses of {found['processes']} processes ({found['backend']}) and of one, "
                     f"{found['steps']} steps: largest difference", largest(differences), origin(name)])
    equal = sum(same for _, same in counts)
    tensors = sum(all_ for all_, _ in counts)
    rows.append(["tensors of two runs with `--deterministic` that are equal bit for bit",
                 f"{equal} of {tensors}", origin("deterministic_h100.json")])
    return markdown(["what", "result", "from"], rows)


# ---- captions, switches, starts ---------------------------------------------------------------

def captions() -> str:
    found = results("captions.json")
    shares = {}
    for subset in found["subsets"]:
        shares[subset["said"], subset["guidance"]] = percent(subset["videos"])
    rows = []
    for said, guidance in shares:
        if guidance == 1:
            rows.append([said, shares[said, 1.0], shares[said, 3.0]])
    note = (f"{found['videos']} videos for each row; the words that are left out are drawn. "
            f"{origin('captions.json')}")
    return markdown(["the caption names", "videos that show it at frame 120", "with guidance 3"],
                    rows) + f"\n\n{note}"


def switches() -> str:
    found = results("switches.json")
    rows = []
    for way in ("keep", "recache", "cut"):
        seen = found[way]
        rows.append([f"`{way}`", percent(seen["shown"][0]), percent(seen["shown"][1]),
                     percent(seen["speed"][1]), f"{seen['step']:.2f} px",
                     f"{seen['step elsewhere']:.2f} px", f"{seen['ms']:.0f} ms"])
    head = ["`--switch`", "colour and shape shown in the first chunk", "in the second",
            "speed word shown in the second", "step at the switch", "step elsewhere", "costs"]
    note = f"{found['videos']} videos. {origin('switches.json')}"
    return markdown(head, rows) + f"\n\n{note}"


def starts() -> str:
    found = results("starts.json")
    rows = []
    for seen in found["rows"]:
        if seen["caption"] == "own":
            rows.append([seen["start"], f"{seen['seam']:.2f}", f"{seen['true at the seam']:.2f}",
                         f"{seen['later']:.2f}", f"{seen['true']:.2f}",
                         percent(seen["frozen"]), percent(seen["shape kept"])])
    head = ["true frames", "first step, px", "true there", "later steps", "true ones", "frozen",
            "shape kept"]
    note = f"{found['videos']} clips that the model has not seen. {origin('starts.json')}"
    return markdown(head, rows) + f"\n\n{note}"


def recall() -> str:
    found = results("memory.json")
    facts = (f"{found['videos']} videos for each seed, from 6 true frames on; mean [least, most] "
             f"of the seeds. {found['steps']} steps of {found['batch']} clips of "
             f"{found['frames']} frames.")
    return f"{recall_table(found)}\n\n{facts} {origin('memory.json')}"


def normal() -> str:
    return section(results, markdown, origin)


# ---- the README's ----------------------------------------------------------------------------

def link(name: str) -> str:
    return f"[{name}](results/{name})"


def clips_and_minutes(stages: Iterable[dict]) -> tuple[str, str]:
    """Of some stages together. What train.py measured, without its start."""
    stages = list(stages)
    clips = sum(stage["steps"] * stage["batch"] for stage in stages)
    return f"{clips:,}", minutes(sum(stage["training_seconds"] for stage in stages))


def training() -> str:
    """The commands that train. A GPU's recipe is another one, so its clips are said, too."""
    first = results("train_mla_cpu.json")
    cpu = results("stages_cpu.json")
    gpu = results("toy.json")
    not_compiled = []
    for name, stage in gpu["stages"].items():
        if "--compile" not in stage["command"]:
            not_compiled.append(f"`{name}`")
    machine = gpu["device"]
    if "Two other runs shared the card" in gpu.get("edited_by_hand", ""):
        machine += ", shared with two other runs"
    head = ["command", "makes", "clips seen or made", "training", "machine", "from"]
    return markdown(head, [
        ["`python train.py`", "a model of 12 passes a chunk",
         *clips_and_minutes([first]), first["device"], link("train_mla_cpu.json")],
        ["`python train.py --stage all --out out/all`",
         f"models of 4 passes, too{earlier_recipe(cpu)}",
         *clips_and_minutes(cpu["stages"].values()), cpu["device"], link("stages_cpu.json")],
        ["the same on a GPU, whose recipe is longer, with `--compile` "
         f"(not for {', '.join(not_compiled)})", "the shipped model",
         *clips_and_minutes(gpu["stages"].values()), machine, link("toy.json")],
    ])


def where_faster(windows: dict[int, list[dict]]) -> str:
    """Up to how many queries fused MLA beats dense attention, for each number of keys."""
    said = []
    for T, points in windows.items():
        most = faster_up_to(points)
        when = f"at {most} queries and fewer" if most else "at none"
        said.append(f"{when} on {T:,} keys")
    return ", ".join(said)


def four() -> str:
    """Memory, captions kept, time, videos per GPU: the number, and the command that gives
    it."""
    bench = results(BENCH)
    cache = bench["sections"]["memory"]["wan1.3b"]
    memory_row = [
        "bytes a cached token and layer, at the paper's sizes in bf16",
        f"**{cache['mla']}** ({100 * cache['saved']:.1f} % less)",
        cache["dense"],
        "`python -m experiments.bench --only memory`",
    ]
    mla = over_seeds("mla", "dmd", "match")
    dense = over_seeds("dense", "dmd", "match")
    caption_row = [
        "frames that still show their caption after a minute, `dmd`, mean [least, most] of "
        f"{len(mla)} seeds",
        bold(mla),
        spread(dense, percent),
        "`python -m experiments.quality`",
    ]
    windows = attention_points(bench)
    chunk = windows[max(windows)][-1]
    times = [f"{ms(chunk, 'fused'):.2f}", f"{fastest_dense(chunk):.2f}"]
    best = 1 if over_dense(chunk) > 1 else 0
    times[best] = f"**{times[best]}**"
    time_row = [
        f"ms of attention for a chunk, {chunk['L']} queries on {chunk['T']:,} keys, "
        f"{bench['device']}, MLA with fused.py (of the points measured it is faster "
        f"{where_faster(windows)})",
        *times,
        "`python -m experiments.bench`",
    ]
    batch = bench["sections"]["batch"]
    video_row = [
        f"videos at once in the memory of one {bench['device']}",
        f"**{batch['mla, all at once']['videos']}**",
        batch["dense, all at once"]["videos"],
        "`python -m experiments.bench`",
    ]
    return markdown(["", "MLA", "dense", "command"], [memory_row, caption_row, time_row, video_row])


def speed(found: dict) -> str:
    """Of the whole model, and why it is not that of attention alone."""
    wan = PRESETS["wan1.3b"]
    rollout = found["sections"]["rollout"]
    dense = [name for name in rollout if name.startswith("dense") and "10 frames" not in name]
    fastest = max(dense, key=lambda name: rollout[name]["frames_per_s"])
    mla = rollout["mla"]["frames_per_s"]
    turning = mla / rollout["dense"]["frames_per_s"]
    best = mla / rollout[fastest]["frames_per_s"]
    return (f"{turning:.2f} times those of the same model with dense attention, which turns "
            f"{wan.dim} channels of each key at every read (MLA: {wan.rope}); {best:.2f} times "
            f"those of the fastest dense one ({fastest.removeprefix('dense, ')}; the dense kernel "
            f"of MLA is FA4, too); {found['device']}")


def ends(found: dict, form: str) -> str:
    """Frames of video a second over a whole clip's window, at C = 64, 192 and 512."""
    row = found["sections"]["latent"]["rows"][f"{form}, 21 frames"]["by C"]
    return ", ".join(f"{row[C]['video_frames_per_s']:.1f}" for C in ("64", "192", "512"))


def claims() -> str:
    """What the paper says, and what is found here. Claims for which there is no result are left
    out."""
    bench = results(BENCH)
    cache = bench["sections"]["memory"]["wan1.3b"]
    batch = bench["sections"]["batch"]
    times = batch["mla, all at once"]["videos"] / batch["dense, all at once"]["videos"]
    block = bench["sections"]["block"]
    absorbed = block["MLA absorbed, compiled"]["ms"] / block["MLA materialised, compiled"]["ms"]
    wan = results("wan_speed.json")
    rebuilt, merged = (ends(wan, form) for form in ("materialised", "merged"))
    return markdown(["the paper", "here"], [
        ["92.7 % less cache a token and layer",
         f"{100 * cache['saved']:.1f} %, of the buffers that exist"],
        ["1.23 times the frames/s (of another model, LongSANA); by its table 1.33 times those "
         "of dense Self-Forcing; B200", speed(bench)],
        ["8.0 times as many videos fit a B200",
         f"{times:.1f} times as many fit an {bench['device']}"],
        ["Appendix E: inference absorbs, and forms no keys and values (its D.4 forms them); by its "
         "table 5a frames/s hardly depend on the latent: 26.93 at C = 64, 26.79 at 512",
         f"absorbing, a block takes {absorbed:.2f} times as long as with keys and values formed; "
         f"frames/s by blocks alone, at C = 64, 192, 512, are {rebuilt} with them formed, {merged} "
         f"by Appendix E, which cannot have been timed; {wan['device']}"],
    ])


def digits() -> str:
    """Both runs of one command: how far apart they are is part of the result."""
    rows = []
    for run in ("first", "second"):
        for stage in ("tf", "cd", "dmd"):
            name = f"digits_{run}_{stage}.json"
            if not (ROOT / "results" / name).exists():
                rows.append([run, f"`{stage}`", "stopped before it", "", ""])
                continue
            rows.append(digits_row(run, stage, name))
    on_cpu = "digits_cpu_tf.json"
    rows.append(digits_row("the CPU's recipe, default size", "tf", on_cpu))
    head = ["run", "stage", "class right", "survival", "training"]
    colour = percent(results(on_cpu)["survival"]["colour"])
    return markdown(head, rows) + ("\n\n64 videos of 120 frames each, last 12 frames; one "
                                   "command and one seed, twice. By chance one class of ten is "
                                   f"right. After the CPU's recipe the colour is, in {colour}.")


def digits_row(run: str, stage: str, name: str) -> list[str]:
    found = results(name)
    shares = found["survival"]
    return [run, f"`{stage}`", percent(shares["class"]), percent(shares["survival"]),
            f"{found['training_seconds'] / 60:.1f} min, {found['device']}, "
            f"commit {short_commit(found['commit'])}, [{name}](results/{name})"]


def eight_bits() -> str:
    found = results("eight_bits.json")
    said = cache_bits.conditions(found)
    head, rows = cache_bits.verdict(found, results("quality.json"))
    judged = markdown(head, rows) if rows else "One seed, or a short video: no verdict."
    parts = [markdown(*cache_bits.table(found)), said, judged, origin("eight_bits.json")]
    return "\n\n".join(parts)


def wan_speed() -> str:
    """At Wan's real size. It takes a GPU, so it may not have been measured yet."""
    name = "wan_speed.json"
    if not (ROOT / "results" / name).exists():
        return ("Not measured yet: `python -m experiments.wan_speed --json "
                "results/wan_speed.json` does it, on one H100.")
    found = results(name)
    parts = [markdown(head, rows) for head, rows in wan_size.tables(found)]
    return "\n\n".join([*parts, f"{wan_size.said(found)} {origin(name)}"])


# ---- the paper's choices: each takes a GPU, so they may not have been measured yet --------------

def paper_found() -> dict[str, dict]:
    """{table: what its file holds}, of those that there are; "speed" is Wan's."""
    names = {table: f"paper_{table}.json" for table in paper.TABLES}
    names["speed"] = "wan_speed.json"
    return {table: results(name) for table, name in names.items()
            if (ROOT / "results" / name).exists()}


def paper_choice(table: str) -> str:
    found = paper_found()
    if table not in found:
        return f"Not measured yet: `{paper_tables.command(table)}` does it, on one H100."
    return paper_tables.one_table(found[table], markdown, origin)


def paper_latent() -> str:
    return paper_choice("latent")


def paper_split() -> str:
    return paper_choice("split")


def paper_start() -> str:
    return paper_choice("start")


def paper_window() -> str:
    return paper_choice("window")


def paper_recipe() -> str:
    return paper_choice("recipe")


def paper_claims() -> str:
    return paper_tables.verdicts(paper_found(), markdown)


# ---- both files ------------------------------------------------------------------------------

FILES = {
    "README.md": (training, four, claims),
    "RESULTS.md": (memory, minute, recall, worlds, digits, eight_bits, captions, switches, starts,
                   stages, normal, attention, targets, model, wan_speed, rank, conversion,
                   paper_claims, paper_latent, paper_split, paper_start, paper_window,
                   paper_recipe, exact),
}
TABLES = {table.__name__: table for tables in FILES.values() for table in tables}


def filled(name: str, text: str) -> str:
    """The text of a file with every table made anew. ValueError for a table that nobody makes,
    or that has no place."""
    wanted = sorted(table.__name__ for table in FILES[name])
    there = re.findall(r"<!-- table: (\w+) -->", text)
    if sorted(there) != wanted or text.count("<!-- end -->") != len(there):
        raise ValueError(f"{name} must hold each of {', '.join(wanted)} once, each with its end; it "
                         f"has {', '.join(there)}")

    def made(block: re.Match) -> str:
        start, table = block.groups()
        return f"{start}{TABLES[table]()}\n"

    pattern = r"(<!-- table: (\w+) -->\n).*?(?=<!-- end -->)"
    return re.sub(pattern, made, text, flags=re.DOTALL)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", nargs="*",
                        help="which to print (default: all): " + ", ".join(TABLES))
    parser.add_argument("--write", action="store_true",
                        help="put all of them into " + " and ".join(FILES))
    args = parser.parse_args(argv)
    if wrong := set(args.table) - set(TABLES):
        parser.error(f"no table {', '.join(sorted(wrong))}; there are {', '.join(TABLES)}")
    if args.write:
        for name in FILES:
            path = ROOT / name
            path.write_text(filled(name, path.read_text()))
        return
    for name in args.table or TABLES:
        print(f"<!-- table: {name} -->\n{TABLES[name]()}\n<!-- end -->\n")


if __name__ == "__main__":
    main()
