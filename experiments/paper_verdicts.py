"""What the paper says of its choices, each put to a rule that can come out three ways.

`found` is {table: content of results/paper_TABLE.json}, and under "speed" that of
results/wan_speed.json; what is not measured yet is missing, and its claims are left out. The
decision rule is that of verdicts.py: Student's 95 % interval over seeds lies inside the rule's
bounds, wholly outside, or neither. Rules were written before any of these tables was run on a
GPU; the times of "speed" were known, which its claim says.

    match   the share of the last 120 frames of 960 that show what their caption says, its speed
            word included. A difference of 0.10 counts
    loss    of teacher forcing on unseen clips. A twentieth counts
    place   the share of frames of a last chunk, after a true past, where they should be

But where a rule says > 0, > 1 or < 1, any difference counts that all seeds show. A claim
whose need is not met cannot be told: it could not have come out otherwise, or the comparison
would not be fair. Claims that begin with "ours" are questions that the paper leaves open.
tests/test_paper.py makes up tables in which each claim is true, is false, and cannot be told.
"""

import math
from collections.abc import Callable
from statistics import mean

from experiments.paper import FULL, TABLES
from experiments.verdicts import Claim, extent

MARGIN = 0.10                          # of a share
TWENTIETH = 0.05                       # of a loss
TENTH = 0.10                           # of jerkiness
SOMETHING = 0.2                        # a match below which nothing is there to compare with
Values = list[float]                   # one a seed


# ---- reading a table -------------------------------------------------------------------------

def seeds_of(table: dict) -> list[int]:
    """Those that every row has."""
    by_row = {}
    for entry in table["rows"]:
        by_row.setdefault(entry["row"], set()).add(entry["seed"])
    return sorted(set.intersection(*by_row.values()))


def values(table: dict, row: str, model: str, *path: str,
           seeds: list[int] | None = None) -> Values:
    """What was found at `path` of this model, a value a seed; nan where nothing was there to be
    judged, which no rule lets pass."""
    entries = {(entry["row"], entry["seed"]): entry for entry in table["rows"]}
    found = []
    for seed in seeds or seeds_of(table):
        value = entries[row, seed]["models"][model]
        for key in path:
            value = value[key]
        found.append(math.nan if value is None else value)
    return found


def match(table: dict, row: str, model: str) -> Values:
    return values(table, row, model, "late", "match")


def common_seeds(tables) -> list[int]:
    return sorted(set.intersection(*(set(seeds_of(table)) for table in tables)))


def less(a: Values, b: Values) -> Values:
    return [x - y for x, y in zip(a, b, strict=True)]


def over(a: Values, b: Values) -> Values:
    return [x / y for x, y in zip(a, b, strict=True)]


def means(**named: Values) -> str:
    return ", ".join(f"{name} {mean(found):.3f}" for name, found in named.items())


def names(table: dict) -> list[str]:
    return list(dict.fromkeys(entry["row"] for entry in table["rows"]))


def shows(table: dict, row: str, model: str, least: float = SOMETHING) -> dict[str, bool]:
    """The need that what others are compared with is not itself worth nothing."""
    return {f"{row} has a match of {least} or more": mean(match(table, row, model)) >= least}


# ---- the content latent: table 5a ------------------------------------------------------------

WIDTHS = ("E/32", "E/16", "E/8", "E/4", "E/2")


def can_be_lost(table: dict, read: Callable[[str], Values]) -> dict[str, bool]:
    """Is some width behind dense attention by more than the margin, in the mean?"""
    dense = mean(read("dense"))
    least = min(mean(read(width)) for width in WIDTHS)
    return {"some C is behind dense by more than 0.10": least < dense - MARGIN}


def an_eighth_is_enough(found: dict) -> Claim:
    table = found["latent"]
    by_width = {width: match(table, width, "dmd") for width in WIDTHS}
    dense = match(table, "dense", "dmd")
    return Claim(
        "ours: C = E / 8 (192) is enough: videos are as good as those of a dense model that "
        "learned by the same recipe",
        "match less that of dense >= -0.10",
        {"E/8": less(by_width["E/8"], dense)},
        low=-MARGIN,
        needs={**shows(table, "dense", "dmd"),
               **can_be_lost(table, lambda row: match(table, row, "dmd"))},
        control="match " + means(**by_width, dense=dense),
    )


def an_eighth_keeps_the_place(found: dict) -> Claim:
    table = found["latent"]

    def place(row: str) -> Values:
        return values(table, row, "tf", "place")

    by_width = {width: place(width) for width in WIDTHS}
    dense = place("dense")
    return Claim(
        "ours: ... and subjects are where a true past puts them",
        "place less that of dense >= -0.10",
        {"E/8": less(by_width["E/8"], dense)},
        low=-MARGIN,
        needs={f"dense has a place of {SOMETHING} or more": mean(dense) >= SOMETHING,
               **can_be_lost(table, place)},
        control="place " + means(**by_width, dense=dense),
    )


def more_adds_little(found: dict) -> Claim:
    table = found["latent"]
    eighth = match(table, "E/8", "dmd")
    gains = {width: less(match(table, width, "dmd"), eighth) for width in ("E/4", "E/2")}
    return Claim(
        "a larger C adds little (256 and 512 of 1536; here E / 4 and E / 2)",
        "match less that of E / 8 <= 0.10",
        gains,
        high=MARGIN,
        needs={**shows(table, "E/8", "dmd"),
               "at E / 8 there is room for 0.10 more": mean(eighth) <= 1 - MARGIN},
        control=means(**{"E/8": eighth}),
    )


def loss_can_be_lost(table: dict) -> dict[str, bool]:
    """Much of a loss cannot be learned away: is there something left that C decides?"""
    narrow = values(table, "E/32", "tf", "loss")
    eighth = values(table, "E/8", "tf", "loss")
    ratio = mean(over(narrow, eighth))
    return {"at E / 32 the loss is a twentieth higher than at E / 8": ratio >= 1 + TWENTIETH}


def more_adds_little_to_the_loss(found: dict) -> Claim:
    table = found["latent"]
    eighth = values(table, "E/8", "tf", "loss")
    ratios = {width: over(values(table, width, "tf", "loss"), eighth)
              for width in ("E/4", "E/2")}
    return Claim("ours: ... nor does it lower the loss of teacher forcing",
                 "loss over that of E / 8 >= 0.95", ratios, low=1 - TWENTIETH,
                 needs=loss_can_be_lost(table))


def too_narrow_loses(found: dict) -> Claim:
    table = found["latent"]
    change = less(match(table, "E/32", "dmd"), match(table, "E/8", "dmd"))
    return Claim("the smallest C loses (64 of 1536; here E / 32)",
                 "match less that of E / 8 <= -0.10", {"E/32": change}, high=-MARGIN,
                 needs=shows(table, "E/8", "dmd"))


def too_narrow_costs_loss(found: dict) -> Claim:
    table = found["latent"]
    eighth = values(table, "E/8", "tf", "loss")
    ratio = over(values(table, "E/32", "tf", "loss"), eighth)
    return Claim("ours: ... and its loss of teacher forcing is higher",
                 "loss over that of E / 8 >= 1.05", {"E/32": ratio}, low=1 + TWENTIETH)


def as_good_as_dense_by_loss(found: dict) -> Claim:
    table = found["latent"]
    dense = values(table, "dense", "tf", "loss")
    ratio = over(values(table, "E/8", "tf", "loss"), dense)
    half = over(values(table, "E/2", "tf", "loss"), dense)
    return Claim("ours: by the same recipe C = E / 8 learns as well as dense attention",
                 "loss over that of dense <= 1.05", {"E/8": ratio}, high=1 + TWENTIETH,
                 needs=loss_can_be_lost(table),
                 control=f"E/2 {mean(half):.3f}")


def as_smooth_as_dense(found: dict) -> Claim:
    """Jerkiness is that of the videos whose subject is there."""
    table = found["latent"]
    mla = values(table, "E/8", "dmd", "late", "residual")
    dense = values(table, "dense", "dmd", "late", "residual")
    needs = {}
    for row in ("E/8", "dense"):
        for metric in ("survival", "speed"):
            half = mean(values(table, row, "dmd", "late", metric)) >= 0.5
            needs[f"{row} has a {metric} of 0.5 or more"] = half
    return Claim("ours: its motion is as smooth",
                 "jerkiness over that of dense <= 1.10", {"E/8": over(mla, dense)},
                 high=1 + TENTH, needs=needs, control=means(mla=mla, dense=dense))


# ---- the split of a head: table 5b -----------------------------------------------------------

QUARTER = "48/16"                      # content and position; the paper's 96/32
PAPERS_ORDER = (QUARTER, "32/32", "16/48", "56/8")         # of 64; from its best to its worst


def shows_something(table: dict) -> dict[str, bool]:
    best = max(mean(match(table, row, "tf")) for row in names(table))
    return {f"the best split has a match of {SOMETHING} or more": best >= SOMETHING}


def by_split(table: dict, *path: str) -> dict[str, Values]:
    return {row: values(table, row, "tf", *path) for row in PAPERS_ORDER}


def pairs() -> list[tuple[str, str]]:
    """Neighbours in the paper's order: better, worse."""
    return list(zip(PAPERS_ORDER, PAPERS_ORDER[1:]))


def a_quarter_is_best(found: dict) -> Claim:
    table = found["split"]
    by_row = by_split(table, "late", "match")
    leads = {row: less(by_row[QUARTER], by_row[row]) for row in PAPERS_ORDER[1:]}
    return Claim("a quarter of the head for position is the best split (96/32)",
                 "its match less that of each other > 0", leads, low=0.0, strict=True,
                 needs=shows_something(table), control=means(**by_row))


def a_quarter_is_best_by_loss(found: dict) -> Claim:
    losses = by_split(found["split"], "loss")
    ratios = {row: over(losses[QUARTER], losses[row]) for row in PAPERS_ORDER[1:]}
    return Claim("ours: ... and by the loss of teacher forcing",
                 "its loss over that of each other < 1", ratios, high=1.0, strict=True,
                 control=means(**losses))


def the_order_of_splits(found: dict) -> Claim:
    """Its first step is one of the claim's above: where 1/2 beats 1/4, both are false."""
    table = found["split"]
    by_row = by_split(table, "late", "match")
    steps = {f"{better} to {worse}": less(by_row[better], by_row[worse])
             for better, worse in pairs()}
    return Claim("the order of splits is R = 1/4, 1/2, 3/4, 1/8 of the head",
                 "each match less the next > 0", steps, low=0.0, strict=True,
                 needs=shows_something(table))


def the_order_of_splits_by_loss(found: dict) -> Claim:
    losses = by_split(found["split"], "loss")
    steps = {f"{better} to {worse}": over(losses[better], losses[worse])
             for better, worse in pairs()}
    return Claim("ours: ... and by the loss of teacher forcing",
                 "each loss over the next < 1", steps, high=1.0, strict=True)


def worst_over_best(losses: dict[str, Values]) -> Values:
    """Of the two rows that are so in the mean: the largest of each seed would be noise, too."""
    ordered = sorted(losses.values(), key=mean)
    return over(ordered[-1], ordered[0])


def the_split_matters_more(found: dict) -> Claim:
    """The matches of the two tables are of models of different sizes and stages; of losses the
    ratio can be compared. Either has three values: the paper's choice, half and twice."""
    split = found["split"]
    latent = found["latent"]
    seeds = common_seeds([split, latent])

    def range_of(table: dict, *rows: str) -> Values:
        losses = {}
        for row in rows:
            losses[row] = values(table, row, "tf", "loss", seeds=seeds)
        return worst_over_best(losses)

    splits = range_of(split, "56/8", QUARTER, "32/32")
    widths = range_of(latent, "E/16", "E/8", "E/4")
    return Claim("ours: the split matters more than C (VBench: 7.4 points; 0.65 from C = 128)",
                 "worst loss over best, R a half to twice the paper's, over that of C so > 1",
                 {"splits / widths": over(splits, widths)}, low=1.0, strict=True,
                 needs={"the splits differ by a twentieth": mean(splits) >= 1 + TWENTIETH},
                 control=means(splits=splits, widths=widths))


# ---- how MLA begins --------------------------------------------------------------------------

WEIGHTS = "by weights, mean key"
INPUTS = "by inputs, better key"
RANDOM = "random"


def best_rate(table: dict, start: str, length: str) -> Values:
    """The loss of a start, by the rate that is best for it in the mean."""
    rows = [row for row in names(table) if row.startswith(start) and row.endswith(length)]
    return min((values(table, row, "tf", "loss") for row in rows), key=mean)


def within_the_rates(found: dict, length: str, *starts: str) -> dict[str, bool]:
    """The need that no start might be better still at a rate beyond those tried."""
    table = found["start"]
    needs = {}
    for start in starts:
        rows = [row for row in names(table) if row.startswith(start) and row.endswith(length)]
        best = min(rows, key=lambda row: mean(values(table, row, "tf", "loss")))
        inner = "rate 1," in best
        needs[f"{start}: its best rate is the middle one"] = inner
    return needs


def ahead_at_first(found: dict, start: str) -> dict[str, bool]:
    """The need that a start can be seen in the loss at all."""
    first = mean(compared(found, start, RANDOM, "short"))
    return {"after few steps it is ahead by a twentieth": first <= 1 - TWENTIETH}


def compared(found: dict, start: str, other: str, length: str) -> Values:
    table = found["start"]
    return over(best_rate(table, start, length), best_rate(table, other, length))


def losses_of_starts(found: dict, length: str) -> str:
    table = found["start"]
    return means(**{start: best_rate(table, start, length)
                    for start in (WEIGHTS, INPUTS, RANDOM)})


def a_cut_is_no_better(found: dict) -> Claim:
    return Claim("ours: a start from an SVD of dense weights is no better than a random one",
                 "loss over that of the random start >= 0.95, the best rate of each",
                 {"cut by weights": compared(found, WEIGHTS, RANDOM, "long")}, low=0.95,
                 needs={**within_the_rates(found, "long", WEIGHTS, RANDOM),
                        **ahead_at_first(found, WEIGHTS)},
                 control=losses_of_starts(found, "long"))


def a_better_cut_is_no_better(found: dict) -> Claim:
    return Claim("ours: ... nor is the better cut, by inputs and with the better key",
                 "loss over that of the random start >= 0.95, the best rate of each",
                 {"cut by inputs": compared(found, INPUTS, RANDOM, "long")}, low=0.95,
                 needs={**within_the_rates(found, "long", INPUTS, RANDOM),
                        **ahead_at_first(found, INPUTS)})


def a_cut_helps_at_first(found: dict) -> Claim:
    return Claim("ours: after few steps the better cut is ahead of the random start",
                 "loss over that of the random start <= 0.95, the best rate of each",
                 {"cut by inputs": compared(found, INPUTS, RANDOM, "short")}, high=0.95,
                 needs=within_the_rates(found, "short", INPUTS, RANDOM),
                 control=losses_of_starts(found, "short"))


def the_better_cut_stays_ahead(found: dict) -> Claim:
    return Claim("ours: the better cut is ahead of the cut by weights, in the end",
                 "loss over that of the cut by weights < 1, the best rate of each",
                 {"cut by inputs": compared(found, INPUTS, WEIGHTS, "long")}, high=1.0,
                 strict=True, needs=within_the_rates(found, "long", INPUTS, WEIGHTS))


# ---- sink, window, times ---------------------------------------------------------------------

SEVEN_BEFORE = "1 + 6, then the chunk"
SEVEN_IN_ALL = "1 + 6 with the chunk"


def early_is_good(table: dict, row: str) -> dict[str, bool]:
    early = mean(values(table, row, "dmd", "early", "match"))
    return {"early frames have a match of 0.5 or more": early >= 0.5}


def goes_on(table: dict, row: str) -> dict[str, bool]:
    """The need that a window is of use: colour, shape and pace are told by the caption at every
    chunk, but a subject that jumps from chunk to chunk has forgotten its past."""
    jerks = mean(values(table, row, "dmd", "late", "residual"))
    speed = mean(values(table, row, "dmd", "late", "speed"))
    return {f"{row}: jerkiness of 2 or less": jerks <= 2,
            f"{row}: speed within a quarter of the true one": 0.75 <= speed <= 1.25}


def holds(found: dict, name: str, words: str) -> Claim:
    table = found["window"]
    row = f"{name}, window"
    late = match(table, row, "dmd")
    early = values(table, row, "dmd", "early", "match")
    return Claim(words, "match of the last 120 frames less that of the first >= -0.10",
                 {row: less(late, early)}, low=-MARGIN,
                 needs={**early_is_good(table, row), **goes_on(table, row)},
                 control=means(early=early, late=late))


def one_and_six_hold(found: dict) -> Claim:
    return holds(found, SEVEN_BEFORE, "1 sink frame and 6 more before the chunk hold a minute, "
                                      "times counted from the window")


def one_and_six_with_the_chunk_hold(found: dict) -> Claim:
    return holds(found, SEVEN_IN_ALL, "... or with the chunk among the 6 (the paper does not "
                                      "say)")


def one_and_six_are_as_good(found: dict) -> Claim:
    table = found["window"]
    row = f"{SEVEN_BEFORE}, window"
    whole = match(table, "whole clip", "dmd")
    place = values(table, "whole clip", "dmd", "place")
    own_place = values(table, row, "dmd", "place")
    gaps = {"match": less(match(table, row, "dmd"), whole), "place": less(own_place, place)}
    return Claim("ours: 1 + 6 are as good as a window of the whole clip",
                 "match and place less those of the whole clip >= -0.10", gaps, low=-MARGIN,
                 needs={**shows(table, "whole clip", "dmd"), **goes_on(table, row)},
                 control=means(match=whole, place=place))


def new_times_make_it_work(found: dict) -> Claim:
    table = found["window"]
    window = match(table, f"{SEVEN_BEFORE}, window", "dmd")
    never = match(table, f"{SEVEN_BEFORE}, never", "dmd")
    return Claim("ours: without counting times anew long videos do not work",
                 "match without less that with it <= -0.10", {"1 + 6": less(never, window)},
                 high=-MARGIN, needs=early_is_good(table, f"{SEVEN_BEFORE}, window"),
                 control=means(never=never, window=window))


def either_horizon(found: dict) -> Claim:
    table = found["window"]
    gaps = {}
    needs = {}
    for name in (SEVEN_BEFORE, SEVEN_IN_ALL):
        window = match(table, f"{name}, window", "dmd")
        never = match(table, f"{name}, never", "dmd")
        needs |= shows(table, f"{name}, window", "dmd")
        apart = abs(mean(never) - mean(window))
        needs[f"{name}: times matter, never is off by more than 0.10"] = apart > MARGIN
        gaps[name] = less(match(table, f"{name}, clip", "dmd"), window)
    return Claim("ours: times counted anew from the clip's length on are as good as from the "
                 "window's", "matches differ by 0.10 at most", gaps, low=-MARGIN, high=MARGIN,
                 needs=needs)


def old_videos_help(found: dict) -> Claim:
    table = found["window"]
    old = match(table, "whole clip, old videos in dmd", "dmd")
    young = match(table, "whole clip", "dmd")
    return Claim("ours: dmd on videos as old as those in use is better than on clips alone",
                 "match less that of new videos at every step >= 0.10",
                 {"gain": less(old, young)}, low=MARGIN,
                 needs={**shows(table, "whole clip", "dmd"),
                        "there is room for 0.10 more": mean(young) <= 1 - MARGIN},
                 control=means(old=old, young=young))


# ---- the recipe of stage dmd -----------------------------------------------------------------

def dmd_matters(found: dict) -> dict[str, bool]:
    """Does the stage itself change more than what its recipe may lose?"""
    before = mean(match(found["latent"], "E/8", "cd"))
    ours = mean(match(found["recipe"], "ours", "dmd"))
    return {"dmd adds more than 0.10 to the match": ours - before > MARGIN}


def as_good(found: dict, row: str, words: str) -> Claim:
    table = found["recipe"]
    ours = match(table, "ours", "dmd")
    theirs = match(table, row, "dmd")
    jerks = {name: values(table, name, "dmd", "late", "residual") for name in ("ours", row)}
    return Claim(words, "match less that of ours >= -0.10", {row: less(theirs, ours)},
                 low=-MARGIN, needs=dmd_matters(found),
                 control=f"{means(ours=ours, theirs=theirs)}; jerkiness {means(**jerks)}")


def its_critic(found: dict) -> Claim:
    return as_good(found, "critic 0.2", "ours: a critic at 0.2 of the generator's rate is as "
                                        "good as ours, at 10 times")


def its_guidance(found: dict) -> Claim:
    return as_good(found, "guidance 3", "ours: a real score with guidance 3 is as good as "
                                        "without")


def its_guidance_in_code(found: dict) -> Claim:
    return as_good(found, "guidance 4 (3 in Self-Forcing's code)",
                   "ours: ... and with 4, which is 3 as Self-Forcing's code counts")


def its_optimiser(found: dict) -> Claim:
    return as_good(found, "AdamW", "ours: AdamW (0, 0.999) is as good as Muon, for updates of "
                                   "one size")


def its_recipe(found: dict) -> Claim:
    return as_good(found, "all three, guidance 3", "ours: ... all three at once")


def its_shift(found: dict) -> Claim:
    table = found["recipe"]
    ours = match(table, "ours", "dmd")
    other = match(table, "shift 3", "dmd")
    return Claim("ours: shift 5, the paper's and ours, is as good as that of stage tf, 3",
                 "match less that of shift 3 >= -0.10", {"shift 5": less(ours, other)},
                 low=-MARGIN, needs=dmd_matters(found), control=means(five=ours, three=other))


# ---- speed -----------------------------------------------------------------------------------

FORMS = {"materialised": "keys and values rebuilt (D.4)", "merged": "never formed (App. E)"}


def speed_by_width(speed: dict, form: str) -> Values:
    """Frames/s at the widest C over those at the narrowest, a value a window."""
    found = []
    for row in speed["sections"]["latent"]["rows"].values():
        by_C = row["by C"]
        widths = sorted(by_C, key=int)
        if row["form"] == form and "ms" in by_C[widths[0]] and "ms" in by_C[widths[-1]]:
            found.append(by_C[widths[0]]["ms"] / by_C[widths[-1]]["ms"])
    return found


def speed_is_flat(found: dict, form: str) -> Claim:
    return Claim(f"frames/s do not depend on C from 64 to 512: {FORMS[form]}",
                 "at C = 512 over C = 64 within 5 %, over windows of 21, 10 and 7 frames",
                 {form: speed_by_width(found["speed"], form)}, low=0.95, high=1.05,
                 bracket=extent,
                 control="least and most of the windows; the times were known before this rule")


def rebuilding_is_flat(found: dict) -> Claim:
    return speed_is_flat(found, "materialised")


def merging_is_flat(found: dict) -> Claim:
    return speed_is_flat(found, "merged")


# ---- all of them -----------------------------------------------------------------------------

CLAIMS = {                             # {claim: the tables that it needs}
    an_eighth_is_enough: "latent",
    an_eighth_keeps_the_place: "latent",
    more_adds_little: "latent",
    more_adds_little_to_the_loss: "latent",
    too_narrow_loses: "latent",
    too_narrow_costs_loss: "latent",
    as_good_as_dense_by_loss: "latent",
    as_smooth_as_dense: "latent",
    a_quarter_is_best: "split",
    a_quarter_is_best_by_loss: "split",
    the_order_of_splits: "split",
    the_order_of_splits_by_loss: "split",
    the_split_matters_more: "split latent",
    a_cut_is_no_better: "start",
    a_better_cut_is_no_better: "start",
    a_cut_helps_at_first: "start",
    the_better_cut_stays_ahead: "start",
    one_and_six_hold: "window",
    one_and_six_with_the_chunk_hold: "window",
    one_and_six_are_as_good: "window",
    new_times_make_it_work: "window",
    either_horizon: "window",
    old_videos_help: "window",
    its_critic: "recipe latent",
    its_guidance: "recipe latent",
    its_guidance_in_code: "recipe latent",
    its_optimiser: "recipe latent",
    its_recipe: "recipe latent",
    its_shift: "recipe latent",
    rebuilding_is_flat: "speed",
    merging_is_flat: "speed",
}


def ready(found: dict, table: str) -> bool:
    """Every row is known of two seeds, at least; of "speed", two windows."""
    if table not in found:
        return False
    if table == "speed":
        return all(len(speed_by_width(found[table], form)) > 1 for form in FORMS)
    rows = {row.name for row in TABLES[table](FULL)}
    return rows <= set(names(found[table])) and len(seeds_of(found[table])) > 1


def judge(found: dict) -> list[dict]:
    """The verdict on every claim whose tables there are, in the order of CLAIMS."""
    verdicts = []
    for claim, needed in CLAIMS.items():
        tables = needed.split()
        if not all(ready(found, table) for table in tables):
            continue
        if len(tables) == 1 or len(common_seeds(found[table] for table in tables)) > 1:
            verdicts.append(claim(found).verdict())
    return verdicts
