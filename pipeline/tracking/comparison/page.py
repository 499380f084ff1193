"""The comparison as one HTML page that needs nothing else: no script, no address, pictures and charts inside.

Its first line answers which group should be champion and how sure that is; all else is evidence, the strongest first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np

from pipeline.tracking.comparison import charts, groups
from pipeline.tracking.comparison.evidence import CURVES, Trial
from pipeline.tracking.comparison.groups import NONE, Group
from pipeline.tracking.comparison.verdict import NAMES, Changes, Verdict, percent, points, probability

MAX_CLASSES = 24
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #212529; background: #f8f9fa; margin: 0; }
main { max-width: 900px; margin: 0 auto; padding: 28px 20px 60px; }
section { background: #fff; border: 1px solid #e9ecef; border-radius: 10px; padding: 18px 20px; margin-top: 18px; }
h1 { font-size: 21px; line-height: 1.4; margin: 0; } h2 { font-size: 17px; margin: 0 0 10px; }
h3 { font-size: 14px; margin: 18px 0 6px; }
p { margin: 6px 0; } .small, figcaption { color: #6c757d; font-size: 13px; }
.answer { border-left: 6px solid #868e96; } .answer.sure { border-left-color: #2b8a3e; }
.answer.open { border-left-color: #e8a200; } .answer.refused { border-left-color: #c92a2a; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
.wide { overflow-x: auto; } svg { max-width: 100%; height: auto; display: block; font-family: inherit; }
th { text-align: left; font-weight: 600; color: #495057; } th, td { padding: 5px 14px 5px 0; vertical-align: top; }
tr + tr { border-top: 1px solid #f1f3f5; } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
code { font-size: 12.5px; overflow-wrap: anywhere; } .dot { display: inline-block; width: 10px; height: 10px;
border-radius: 5px; margin-right: 7px; } .side { display: flex; flex-wrap: wrap; gap: 10px; }
figure { margin: 0; width: 128px; } figure img { width: 112px; height: 112px; object-fit: contain; background: #f1f3f5;
border-radius: 6px; }
figure figcaption { font-size: 11.5px; line-height: 1.35; overflow-wrap: anywhere; }
.good { color: #2b8a3e; } .bad { color: #c92a2a; }
"""


@dataclass(frozen=True)
class Pair:
    """Two groups looked at class by class and, through their typical runs, image by image.

    Attributes:
        changes: on which images the later one changed its mind.
        pictures: data URIs by image id, as far as they could be had.
    """

    earlier: Group
    later: Group
    changes: Changes | None = None
    pictures: Mapping[str, str] = field(default_factory=dict)


def html(verdict: Verdict, pair: Pair | None, notes: Sequence[str], *, server: str, max_pictures: int) -> str:
    """The whole page."""
    sections = [
        _answer(verdict, notes),
        _values(verdict),
        _tests(verdict),
        _parameters(verdict.ranked),
        _metrics(verdict.ranked),
        _curves(verdict.ranked),
        "" if pair is None else _classes(pair),
        "" if pair is None else _pictures(pair, verdict, max_pictures),
        _cost(verdict.ranked),
        _runs(verdict.ranked, server),
    ]
    title = f"{verdict.leader.name} and {len(verdict.ranked) - 1} others" if verdict.contrasts else verdict.leader.name
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style>\n</head>\n'
        f"<body>\n<main>\n{''.join(sections)}</main>\n</body>\n</html>\n"
    )


def _answer(verdict: Verdict, notes: Sequence[str]) -> str:
    kind = "sure" if verdict.champion else "open" if verdict.contrasts else ""
    first = verdict.leader.trials[0]
    told = next((trial for trial in verdict.leader.trials if trial.predictions is not None), None)
    data = "" if told is None or told.predictions is None else (
        f"{len(told.predictions):,} images of {told.predictions.origin.dataset}, "
    )  # fmt: skip
    facts = f"{data}split {first.split}, data {first.measured_on}; decided by {NAMES[verdict.metric]}."
    if not verdict.comparable:
        kind, facts = "refused", "The runs were evaluated on different or unknown data: see the list of runs."
    sentence = escape(verdict.sentence()).replace(" %", "&nbsp;%")
    lines = "".join(f'<p class="small">{escape(note)}</p>' for note in notes)
    return f'<section class="answer {kind}"><h1>{sentence}</h1><p class="small">{escape(facts)}</p>{lines}</section>\n'


def _values(verdict: Verdict) -> str:
    rows = [
        charts.Row(group.name, tuple(100 * value for value in group.values(verdict.metric))) for group in verdict.ranked
    ]
    label = f"{NAMES[verdict.metric]}, percent: runs as dots, their mean, one standard deviation to each side"
    return _section("The groups", charts.dots(rows, label))


def _tests(verdict: Verdict) -> str:
    if not verdict.contrasts or not verdict.comparable:
        return ""
    rows = []
    for each in verdict.contrasts:
        low, high = (each.images.low, each.images.high) if each.images else (math.nan, math.nan)
        rows.append(
            [
                _named(verdict.ranked, each.other),
                points(each.difference),
                f"{100 * low:+.2f} to {100 * high:+.2f}" if each.images else NONE,
                *(_p(value) for value in (each.mcnemar_p, each.images.p if each.images else None, each.seeds_p)),
                f"<b>{_p(each.p)}</b>",
                '<b class="good">real</b>' if each.holds(verdict.alpha) else "not shown",
            ]
        )
    head = ["", "behind by", "95 % interval", "p McNemar", "p bootstrap", "p seeds", "p, all", "difference"]
    explained = (
        f"Each group against {verdict.leader.name}. Over images: McNemar's exact test between the typical runs, and "
        "the bootstrap of paired images over all seeds, which gives the interval too. Over seeds: Welch's t test, "
        "where both sides have several. The last p is the weakest of them, raised for the number of groups (Holm); a "
        f"difference counts as real where it is below {verdict.alpha:g}."
    )
    return _section("How sure", _table(head, rows, left=(0, 7)) + f'<p class="small">{escape(explained)}</p>')


def _parameters(ranked: Sequence[Group]) -> str:
    rows = groups.differences(ranked)
    if not rows:
        return "" if len(ranked) < 2 else _section("Parameters that differ", "<p>None but the seed.</p>")
    cells = [
        [f"<code>{escape(row.key)}</code>", *(f"<code>{escape(value)}</code>" for value in row.values)] for row in rows
    ]
    head = ["", *(_named(ranked, group) for group in ranked)]
    return _section("Parameters that differ", _table(head, cells, left=range(len(head))))


def _metrics(ranked: Sequence[Group]) -> str:
    keys = sorted(
        {key for group in ranked for trial in group.trials for key in trial.metrics if key.startswith("final/")}
    )
    if not keys:
        return ""
    rows = [
        [f"<code>{escape(key.removeprefix('final/'))}</code>", *(_mean(group.logged(key)) for group in ranked)]
        for key in keys
    ]
    head = ["", *(_named(ranked, group) for group in ranked)]
    return _section(
        "Metrics", _table(head, rows) + '<p class="small">Mean over seeds, with the standard deviation.</p>'
    )


def _curves(ranked: Sequence[Group]) -> str:
    drawn = [
        charts.curves([charts.Series(group.name, _histories(group, key)) for group in ranked], key) for key in CURVES
    ]
    if not any(drawn):
        return ""
    names = "".join(f'<span class="small">{_named(ranked, group)}</span>' for group in ranked)
    return _section("Learning curves", f'<p class="side">{names}</p><div class="side">{"".join(drawn)}</div>')


def _histories(group: Group, key: str) -> tuple[tuple[tuple[int, float], ...], ...]:
    return tuple(trial.curves[key] for trial in group.trials if trial.curves.get(key))


def _classes(pair: Pair) -> str:
    """Recall by class, the largest differences first."""
    said = [[trial.predictions for trial in group.trials if trial.predictions] for group in (pair.earlier, pair.later)]
    if not all(said):
        return ""
    first = said[0][0]
    rows = []
    for label, name in enumerate(first.origin.classes):
        of_class = first.labels == label
        if of_class.any():
            before, after = (float(np.mean([each.right()[of_class].mean() for each in side])) for side in said)
            note = f"{percent(before)} to {percent(after)} of {of_class.sum()}"
            rows.append(charts.Bar(name, 100 * (after - before), note))
    rows = sorted(rows, key=lambda row: (-abs(row.value), row.name))
    shown = sorted(rows[:MAX_CLASSES], key=lambda row: -row.value)
    more = f" The {MAX_CLASSES} largest differences of {len(rows)} classes." if len(rows) > MAX_CLASSES else ""
    axis = "points of recall (mean over seeds)"
    intro = f"What {pair.later.name} finds of each class, against {pair.earlier.name}.{more}"
    return _section("Class by class", f'<p class="small">{escape(intro)}</p>{charts.bars(shown, axis)}')


def _pictures(pair: Pair, verdict: Verdict, limit: int) -> str:
    if pair.changes is None:
        return ""
    before, after = pair.earlier.typical(verdict.metric), pair.later.typical(verdict.metric)
    intro = f"{before.name} against {after.name}, the typical runs of {pair.earlier.name} and {pair.later.name}."
    lost = _gallery(
        "From right to wrong", "bad", pair.changes.lost[:limit].tolist(), len(pair.changes.lost), after, pair
    )
    won = _gallery(
        "From wrong to right", "good", pair.changes.won[:limit].tolist(), len(pair.changes.won), before, pair
    )
    return _section("Images that changed", f'<p class="small">{escape(intro)}</p>{lost}{won}')


def _gallery(title: str, kind: str, rows: Sequence[int], total: int, wrong: Trial, pair: Pair) -> str:
    """The images of one kind with their class and what the run that is wrong about them took them for."""
    said = wrong.predictions
    assert said is not None
    classes, shown = said.origin.classes, []
    for row in rows:
        image_id = str(said.ids[row])
        known = image_id in pair.pictures
        picture = f'<img src="{pair.pictures[image_id]}" alt="">' if known else f"<code>{escape(image_id)}</code>"
        caption = (
            f"{escape(classes[said.labels[row]])}, taken for {escape(classes[said.predicted[row]])} "
            f"{said.confidence[row]:.2f}"
        )
        shown.append(f'<figure title="{escape(image_id)}">{picture}<figcaption>{caption}</figcaption></figure>')
    part = f", the first {len(rows)} by the score of the error" if len(rows) < total else ""
    return f'<h3 class="{kind}">{title}: {total}{part}</h3><div class="side">{"".join(shown)}</div>'


def _cost(ranked: Sequence[Group]) -> str:
    rows = []
    for group in ranked:
        workers = {groups.params(trial).get("cluster.num_workers", NONE) for trial in group.trials}
        seconds = float(np.mean([trial.seconds for trial in group.trials]))
        known = len(workers) == 1 and min(workers).isdecimal()  # evaluations have none, resumed runs may have two
        kind = "GPU" if group.trials[0].params.get("cluster.gpu") == "true" else "CPU"
        speed, waits = group.averaged("images_per_s"), group.averaged("data_wait_share")
        hosts = sorted({trial.tags.get("host", NONE) for trial in group.trials})
        rows.append(
            [
                _named(ranked, group),
                f"{np.mean(speed):,.0f}" if speed else NONE,
                f"{np.mean(waits):.1%}" if waits else NONE,
                f"{seconds:,.0f}",
                f"{min(workers)} {kind}" if known else escape(", ".join(sorted(workers))),
                f"{seconds * int(min(workers)) / 3600:.3g}" if known else NONE,
                escape(", ".join(hosts)),
            ]
        )
    head = ["", "training images/s", "data wait", "seconds a run", "workers", "worker hours a run", "host"]
    return _section("Speed and cost", _table(head, rows, left=(0, 6)))


def _runs(ranked: Sequence[Group], server: str) -> str:
    rows = [
        [
            _named(ranked, group),
            escape(trial.name),
            escape(groups.seed(trial) or NONE),
            f"<code>{escape(trial.id)}</code>",
            f"<code>{escape(trial.tags.get(groups.COMMIT, NONE)[:8])}</code>",
            f"<code>{escape(trial.digest[:12] or NONE)}</code>",
        ]
        for group in ranked
        for trial in group.trials
    ]
    where = f'<p class="small">In MLflow at <code>{escape(server.partition("//")[2])}</code>.</p>'
    return _section("Runs", _table(["group", "run", "seed", "id", "commit", "data"], rows, left=range(6)) + where)


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] | range = (0,)) -> str:
    """Cells are HTML already; those of the columns `left` are text, the others numbers."""
    kinds = ["" if column in left else ' class="n"' for column in range(len(head))]
    top = "".join(f"<th{kind}>{cell}</th>" for cell, kind in zip(head, kinds, strict=True))
    lines = (
        "<tr>" + "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(row, kinds, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><tr>{top}</tr>{"".join(lines)}</table></div>'


def _named(ranked: Sequence[Group], group: Group) -> str:
    place = next(number for number, each in enumerate(ranked) if each is group)
    return f'<span class="dot" style="background:{charts.colour(place)}"></span>{escape(group.name)}'


def _mean(values: Sequence[float]) -> str:
    if not values:
        return NONE
    std = groups.spread(values)
    return f"{np.mean(values):.4f}" + ("" if std is None else f' <span class="small">&#177; {std:.4f}</span>')


def _p(value: float | None) -> str:
    return NONE if value is None else escape(probability(value))
