"""The section of RESULTS.md on the paper's choices, from results/paper_*.json; experiments/
tables.py puts it there, a table that is not measured yet as its command."""

from collections.abc import Callable
from statistics import mean
from typing import NamedTuple

from experiments.paper_verdicts import CLAIMS, judge, seeds_of


class Column(NamedTuple):
    """Of a table: its head, which model of a row it reads, and where."""
    head: str
    model: str
    path: tuple[str, ...]
    show: str = "{:.2f}"


SHARE = "{:.0%}"
LATE = (
    Column("frames that show their caption, last 120, `dmd`", "dmd", ("late", "match"), SHARE),
    Column("survive", "dmd", ("late", "survival"), SHARE),
    Column("jerkiness / true", "dmd", ("late", "residual")),
)
LOSS = Column("loss of `tf`", "tf", ("loss",), "{:.4f}")
PLACE = Column("in their place after a true past, `tf`", "tf", ("place",), SHARE)
MINUTE_OF_TF = (
    Column("frames that show their caption, first 120", "tf", ("early", "match"), SHARE),
    Column("last 120", "tf", ("late", "match"), SHARE),
    Column("survive", "tf", ("late", "survival"), SHARE),
    Column("jerkiness / true", "tf", ("late", "residual")),
)
COLUMNS = {
    "latent": (
        Column("bytes a token and layer", "dmd", ("bytes_per_token",), "{:.0f}"), LOSS, PLACE,
        Column("frames that show their caption, `tf`, of 120", "tf", ("late", "match"), SHARE),
        Column("last 120, `cd`", "cd", ("late", "match"), SHARE),
        LATE[0]._replace(head="last 120, `dmd`"), *LATE[1:]),
    "split": (LOSS, PLACE, *MINUTE_OF_TF),
    "start": (LOSS, PLACE, MINUTE_OF_TF[0]),
    "window": (
        Column("frames that show their caption, last 120, `cd`", "cd", ("late", "match"),
               SHARE),
        Column("first 120, `dmd`", "dmd", ("early", "match"), SHARE),
        LATE[0]._replace(head="last 120, `dmd`"), *LATE[1:],
        Column("in their place after a true past", "dmd", ("place",), SHARE)),
    "recipe": (*LATE, Column("speed / true", "dmd", ("late", "speed")),
               Column("distance of speeds", "dmd", ("late", "speeds"))),
}
# Its tables 5a and 5b: VBench's total score at its C of E = 1536 and its N/R of 128. It names
# neither seeds nor a spread.
PAPER = {
    "latent": "The paper's total score of VBench: 78.30 at C = 64 (E/24), 83.24 at "
              "128, 83.66 at 256, 83.40 at 512 (E/3).",
    "split": "The paper's total score of VBench, R of 128: 76.47 at 16, 83.89 at 32, "
             "80.83 at 64, 78.31 at 96.",
}
FIRST = {"latent": "C", "split": "N/R", "start": "start", "window": "window and times",
         "recipe": "what differs"}


def command(table: str) -> str:
    return f"python -m experiments.paper {table} --jobs 6"


def read(entry: dict, column: Column) -> float | None:
    """None where the row has no such model, or nothing was there to be judged."""
    value = entry["models"].get(column.model)
    for key in column.path:
        value = value.get(key) if value else None
    return value


def cell(entries: list[dict], column: Column) -> str:
    """Mean [least, most] of the seeds; of how many, where some had nothing to be judged."""
    values = [read(entry, column) for entry in entries]
    there = [value for value in values if value is not None]
    if not there:
        return "-"
    show = column.show.format
    said = show(mean(there)).replace("%", " %")
    least = show(min(there)).removesuffix("%")
    most = show(max(there)).removesuffix("%")
    if least != most:
        said += f" [{least}, {most}]"
    if len(there) < len(values):
        said += f", {len(there)} of {len(values)} seeds"
    return said


def head_and_rows(found: dict) -> tuple[list[str], list[list[str]]]:
    table = found["table"]
    columns = COLUMNS[table]
    by_row = {}
    for entry in found["rows"]:
        by_row.setdefault(entry["row"], []).append(entry)
    rows = []
    for name, entries in by_row.items():
        shown = name
        if "C" in entries[0]:
            shown = f"{entries[0]['C']} ({name})"
        rows.append([shown, *(cell(entries, column) for column in columns)])
    return [FIRST[table], *(column.head for column in columns)], rows


def conditions(found: dict) -> str:
    """Seeds, steps, and what the paper has."""
    seeds = len(seeds_of(found))
    steps = []
    for stage, numbers in sorted(found["steps"].items()):
        steps.append(f"`{stage}` {' or '.join(f'{number:,}' for number in numbers)}")
    part = "" if found["whole"] else "**In part.** "
    many = str(seeds) if found["whole"] else f"{seeds} or more"
    said = (f"{part}Mean [least, most] of {many} seeds, E = {found['E']}, "
            f"{found['frames']} frames; steps: {', '.join(steps)}.")
    return f"{said} {PAPER.get(found['table'], '')}".strip()


def one_table(found: dict, markdown: Callable, origin: Callable) -> str:
    head, rows = head_and_rows(found)
    name = f"paper_{found['table']}.json"
    return f"{markdown(head, rows)}\n\n{conditions(found)} {origin(name)}"


# ---- the verdicts ----------------------------------------------------------------------------

def deciding(verdict: dict) -> str:
    """The intervals that decide, and the needs that are not met."""
    parts = []
    for name, (middle, low, high) in verdict["intervals"].items():
        parts.append(f"{name}: {middle:.3f} [{low:.3f}, {high:.3f}]")
    said = "; ".join(parts)
    for need in verdict["unmet"]:
        said += f"; not met: {need}"
    return said


def verdicts(found: dict[str, dict], markdown: Callable) -> str:
    """A row for each claim whose tables there are, and how many wait."""
    rows = []
    for verdict in judge(found):
        rows.append([verdict["claim"], f"**{verdict['verdict']}**", verdict["rule"],
                     deciding(verdict), verdict["control"] or "-"])
    head = ["claim", "verdict", "rule", "the numbers that decide", "beside it"]
    waiting = len(CLAIMS) - len(rows)
    said = "Brackets are 95 % intervals over seeds, of the last two the least and the most."
    if waiting:
        said += f" {waiting} of {len(CLAIMS)} claims wait for their tables."
    return f"{markdown(head, rows)}\n\n{said}"
