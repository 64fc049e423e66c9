"""The README's tables, from results/: nothing measured is typed by hand.

    python -m experiments.tables --write        puts every table between its markers in the README
    python -m experiments.tables bench rank     prints these two

A block of the README stands between <!-- table: NAME --> and <!-- end -->. tests/test_repo.py: the README holds exactly what is generated.
Sentences that depend on figures are generated as well: which row wins is not known before the run.
"""

import argparse
import json
import re
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent

# Reading order: a file, the one question it answers, minutes.
READING = (
    ("rope3d", "how does a token know where and when it is?", 5),
    ("cache", "how can memory stay constant and nothing ever be moved?", 10),
    ("attention", "what is MLA, why do its routes agree, what do they cost?", 20),
    ("mla_video", "who may look at whom, in training and in streaming?", 15),
    ("checkpoint", "what can a file do to a program that reads it?", 3),
    ("compiled", "what is left to do in Python when nothing changes from chunk to chunk?", 5),
    ("toy_data", "how is quality measured without a judge?", 10),
    ("sample", "how does noise become the next chunk?", 10),
    ("objectives", "what does each stage minimise, and where does its gradient stop?", 15),
    ("parallel", "how do N processes compute what one would?", 4),
    ("trainer", "what makes a run repeatable, and a step one launch?", 10),
    ("train", "what does the command line promise?", 5),
    ("fused", "how does the kernel use one tile as key and as value?", 20))

STAGES = (  # stage, given, learns, passes a chunk
    ("score", "a whole clip, past and future", "its velocity: the judge that `dmd` needs", "-"),
    ("tf", "the clean *real* past", "teacher forcing: the velocity of every chunk at every noise level", "12 + 1 to commit"),
    ("cd", "the same", "consistency distillation: to jump where the teacher's flow leads", "4 + 1"),
    ("dmd", "*its own* past, through the real cache", "distribution matching: videos the judge cannot tell from real ones", "4 + 1"))


def results(name: str) -> dict:
    return json.loads((ROOT / "results" / name).read_text())


def markdown(head: list[str], rows: list[list]) -> str:
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows))


def origin(name: str, result: dict) -> str:
    """Where figures come from, in one clause."""
    edited = " (edited by hand: it says what)" if result.get("edited_by_hand") else ""
    return f"{result['device']}, {result['versions'].split(',')[0]}, commit {result['commit']}, [results/{name}](results/{name}){edited}"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min"


def spread(values: list[float], show) -> str:
    """Mean over seeds and, if there are several, the least and the most."""
    few = [show(value) for value in (mean(values), min(values), max(values))]
    return few[0] if len(values) == 1 else f"{few[0]} [{few[1].removesuffix(' %')}, {few[2].removesuffix(' %')}]"


def late(run: dict, stage: str, metric: str) -> float:
    """Mean over the last 120 frames: one stretch of 12 frames alone is noise."""
    return mean(run["stages"][stage]["curves"][metric][-10:])


# ---- the tables -----------------------------------------------------------------------------------------------------

def three() -> str:
    """Memory, quality, speed: the number, its machine, its command."""
    bench, found = results("bench_h100.json"), results("quality.json")
    memory, points, rollout = bench["sections"]["memory"]["wan1.3b"], attention_points(bench), bench["sections"]["rollout"]
    runs = {kind: [late(run, "dmd", "survival") for run in found["runs"] if run["attention"] == kind] for kind in ("mla", "dense")}
    survive = ", ".join(f"{label} **{spread(runs[kind], percent)}**" for kind, label in (("mla", "MLA"), ("dense", "dense")) if runs[kind])
    last = points[-1]
    return markdown(["", "result", "from"], [
        ["memory", f"**{100 * memory['saved']:.1f} % less** cache: {memory['mla']} bytes a token and layer, dense {memory['dense']} "
         f"(the paper's geometry, bf16, from buffers)", "`python -m experiments.bench --only memory`, anywhere"],
        ["quality", f"of {found['rollouts']} videos of {found['frames']} frames, {found['frames'] // 12} times a training clip, after `dmd` "
         f"survive: {survive}{of_seeds(runs['mla'])}; speed, captions, smoothness: [below](#three-stages-of-training)",
         f"`python -m experiments.quality`, {found['device']}"],
        ["speed", f"attention over {last['T']:,} tokens for a chunk of {last['L']}: MLA {ms(last, 'fused')} ms, dense "
         f"{fastest_dense(last):.3f}; whole model: MLA {rollout['mla']['frames_per_s']:.2f} frames/s, dense "
         f"{rollout['dense']['frames_per_s']:.2f}", f"`python -m experiments.bench`, {bench['device']}"]])


def of_seeds(values: list) -> str:
    return f" (mean of {len(values)} seeds [least, most])" if len(values) > 1 else ""


def training() -> str:
    rows = []
    for name, note in (("mla_cpu", ""), ("dense_cpu", " (an earlier recipe)")):
        run = results(f"train_{name}.json")
        rows.append([f"{run['attention'].replace('mla', 'MLA')}, {run['device']}{note}", f"{run['steps']} x {run['batch']}",
                     minutes(run["training_seconds"]), percent(run["survival"]["survival"])])
    return markdown(["`python train.py`, one run each", "steps x clips", "training", "survive 120 frames, of 64"], rows)


def stages() -> str:
    found = results("stages_cpu.json")
    rows = []
    for stage, given, learns, passes in STAGES:
        report = found["stages"][stage]
        rows.append([f"`{stage}`", given, learns, passes, minutes(report["training_seconds"]),
                     percent(report["survival"]["survival"]) if report["survival"] else "-"])
    whole = minutes(sum(report["training_seconds"] for report in found["stages"].values()))
    return markdown(["stage", "given", "learns", "passes a chunk", f"training, {found['device']}", "survive 120 frames"], rows) + \
        f"\n\n({whole} in all, one seed; {origin('stages_cpu.json', found)}; `dmd` is an earlier recipe's.)"


def minute() -> str:
    found, rows = results("quality.json"), []
    for kind in dict.fromkeys(run["attention"] for run in found["runs"]):
        runs = [run for run in found["runs"] if run["attention"] == kind]
        for stage in runs[0]["stages"]:
            cells = [spread([late(run, stage, metric) for run in runs], show) for metric, show in (
                ("survival", percent), ("match", percent), *((metric, "{:.2f}".format) for metric in ("speed", "speeds", "residual")))]
            switched = [run["stages"][stage]["switch"][2] for run in runs]
            seconds = min(run["stages"][stage]["seconds_per_chunk"] for run in runs)       # the run least disturbed: several may share a GPU
            rows.append([f"{kind.replace('mla', 'MLA')}, `{stage.split(',')[0]}`{stage[2:] if ',' in stage else ''}", *cells,
                         spread(switched, percent), f"{1000 * seconds:.0f}"])
    head = ["", "survive", "frames that show their caption", "speed / true", "distance of speeds", "jerkiness / true",
            "new caption, third chunk", "ms a chunk, least of seeds"]
    numbers = sorted({run["seed"] for run in found["runs"]})
    how = f"mean [least, most] of seeds {', '.join(map(str, numbers))}" if len(numbers) > 1 else "one seed"
    said = f"{found['rollouts']} videos of {found['frames']} frames at once, {how}, means over the last 120; {origin('quality.json', found)}"
    which = ("curves", ""), ("tf", "_tf"), ("cd", "_cd"), ("dmd", "_dmd")
    pictures = ", ".join(f"[{what}](results/quality{end}.png)" for what, end in which)
    return markdown(head, rows) + f"\n\n({said}; {pictures}.)"


# ---- attention: which row wins is read off --------------------------------------------------------------------------

def attention_points(bench: dict) -> list[dict]:
    """The points with the longest window, by query tokens."""
    points = [point for point in bench["sections"]["attention"]["points"] if "timing" in point]
    longest = max(point["T"] for point in points)
    return sorted((point for point in points if point["T"] == longest), key=lambda point: point["L"])


def ms(point: dict, row: str) -> str:
    found = point.get("timing", {}).get(row, {})
    return f"{found['ms']:.3f}" if "ms" in found else ""


def fastest_dense(point: dict) -> float:
    return min(row["ms"] for name, row in point["timing"].items() if name.startswith("dense") and "ms" in row)


def bench() -> str:
    found = results("bench_h100.json")
    points, sections = attention_points(found), found["sections"]
    every = [point for point in sections["attention"]["points"] if ms(point, "fused")]
    shown = [point for point in points if point["L"] not in (32, 128)]
    names = {"dense cuDNN, K V ready": "dense, cuDNN", "dense flash, K V ready": "dense, flash",
             "dense cuDNN waves + flash": "dense, split into whole waves", "materialised": "MLA, materialised", "absorbed": "MLA, absorbed",
             "fused": "MLA, **fused**" + " (what `auto` takes)" * all(point["auto"] == "fused" for point in shown)}
    ratio = {point["L"]: point["timing"]["fused"]["ms"] / fastest_dense(point) for point in points if ms(point, "fused")}
    rows = [[label, *(ms(point, name) for point in shown)] for name, label in names.items()]
    rows.append(["fused / fastest dense", *(f"{ratio[point['L']]:.2f}" if point["L"] in ratio else "" for point in shown)])
    block, rollout, batch = sections["block"], sections["rollout"], sections["batch"]
    text = [f"Fused MLA against the fastest dense row: {losses(every)}. Error in bf16 against float64, on the "
            f"tensors that are timed: at most {worst_error(every):.1f} times dense's.",
            f"A Wan-shaped block, compiled, five passes a chunk: MLA {block['MLA auto, compiled']['ms']:.1f} ms, dense "
            f"{block['dense, compiled']['ms']:.1f} ms, dense that stores its keys rotated, as released code does, "
            f"{block['dense, keys stored rotated, compiled']['ms']:.1f}. The whole model with a full window: MLA "
            f"{rollout['mla']['frames_per_s']:.2f} latent frames/s, dense that rotates at read {rollout['dense']['frames_per_s']:.2f}.",
            "Largest batch before out-of-memory: " + ", ".join(
                f"{label} dense {batch[f'dense, {how}']['videos']}, MLA {batch[f'mla, {how}']['videos']}" for how, label in
                (("all at once", "all at once"), ("in turns of 1 video", "or with attention for one video after the other"))) + "."]
    if crossing := sections["attention"]["crossing"].get(f"absorbed / materialised, T={points[0]['T']}"):
        text.append(f"Absorbing and materialising cost the same at L = {crossing:.0f}, measured at {points[0]['T']:,} keys; in operations, "
                    f"at {sections['attention']['L_star']:.0f}.")
    if rows_b200 := sections.get("b200"):
        said = ", ".join(f"{row['ratio']:.2f} times dense at L = {L}" for L, row in rows_b200.items())
        text.append(f"For a B200 public figures predict {said}; that was never measured.")
    said = f"{origin('bench_h100.json', found)}; this card's limit in a large product: {found['ceilings']['matmul_tflops']:.0f} TFLOP/s"
    head = [f"attention of one layer, {points[0]['T']:,} keys, ms; L =", *(point["L"] for point in shown)]
    return f"{markdown(head, rows)}\n\n{' '.join(text)} ({said}.)"


def losses(points: list[dict]) -> str:
    """In one clause for each window, the longest first: where fused is slower, and by how much at most."""
    found = []
    for T in sorted({point["T"] for point in points}, reverse=True):
        ratio = {point["L"]: point["timing"]["fused"]["ms"] / fastest_dense(point) for point in points if point["T"] == T}
        lost = [str(L) for L, value in ratio.items() if value > 1]
        most = f"slower at L = {', '.join(lost)}, {max(ratio.values()):.2f} times at most"
        found.append(f"at {T:,} keys {most if lost else 'never slower'}")
    return "; ".join(found)


def worst_error(points: list[dict]) -> float:
    return max(row.get("error_ratio") or 0 for point in points for row in point["timing"].values())


# ---- rank -----------------------------------------------------------------------------------------------------------

def rank() -> str:
    found = results("spectrum.json")
    rows = []
    for verdict in found["verdicts"]:
        triples = {name: [f"{value:.3f}" for value in triple] for name, triple in verdict["intervals"].items()}
        said = ", ".join(f"{name} {a} [{low}, {high}]" for name, (a, low, high) in triples.items())
        if len(triples) > 2:
            middles = [triple[0] for triple in verdict["intervals"].values()]
            said = f"{min(middles):.3f} to {max(middles):.3f} in {len(middles)} runs"
        unmet = "".join(f"; not met: {need}" for need in verdict["unmet"])
        control = "; ".join(["noise passes"] * bool(verdict["noise"]) + [verdict["control"]] * bool(verdict["control"]))
        word = "true, and noise passes" if verdict["noise"] and verdict["verdict"] == "reproduced" else verdict["verdict"]
        rows.append([verdict["claim"], f"**{word}**", (said + unmet).replace("|", "/"), control or "-"])
    E, C = found["found"]["E"], found["found"]["C"]
    said = f"{len(found['seeds'])} seeds, 95 % intervals, {minutes(found['seconds'])}; {origin('spectrum.json', found)}, `{found['command']}`"
    return markdown([f"claim (here E = {E}, C = {C})", "verdict", "the number that decides", "control"], rows) + f"\n\n({said}.)"


def reading() -> str:
    lines = {name: len((ROOT / f"{name}.py").read_text().splitlines()) for name, _, _ in READING}
    rows = [[f"[{name}.py]({name}.py)", question, lines[name], time] for name, question, time in READING]
    core = ("rope3d", "cache", "attention", "mla_video")
    total = sum(lines[name] for name in core), sum(time for name, _, time in READING if name in core)
    rows.insert(len(core), ["", "*so far: the model*", *(f"*{value}*" for value in total)])
    return markdown(["file", "the one question it answers", "lines", "minutes"], rows)


TABLES = {table.__name__: table for table in (three, training, stages, minute, reading, bench, rank)}


def filled(text: str) -> str:
    """The README with every block made anew; ValueError for a block that nobody makes, or a table that has no place."""
    names = re.findall(r"<!-- table: (\w+) -->", text)
    if sorted(names) != sorted(TABLES) or text.count("<!-- end -->") != len(names):
        raise ValueError(f"the README must hold each of {', '.join(TABLES)} once, each with its end; it has {', '.join(names)}")
    return re.sub(r"(<!-- table: (\w+) -->\n).*?(?=<!-- end -->)", lambda block: f"{block[1]}{TABLES[block[2]]()}\n", text, flags=re.DOTALL)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", nargs="*", help="which to print (default: all): " + ", ".join(TABLES))
    parser.add_argument("--write", action="store_true", help="put all of them into README.md")
    args = parser.parse_args(argv)
    if wrong := set(args.table) - set(TABLES):
        parser.error(f"no table {', '.join(sorted(wrong))}; there are {', '.join(TABLES)}")
    if args.write:
        path = ROOT / "README.md"
        path.write_text(filled(path.read_text()))
        return
    for name in args.table or TABLES:
        print(f"<!-- table: {name} -->\n{TABLES[name]()}\n<!-- end -->\n")


if __name__ == "__main__":
    main()
