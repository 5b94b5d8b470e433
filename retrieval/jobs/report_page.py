"""A night's report as one HTML page: nothing outside it is needed to read it, now or in a year."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

from retrieval.jobs.charts import bars, lines

__all__ = ["page_of"]

_NAMES = {"candidate": "tonight's", "live": "the live snapshot", "popularity": "popularity"}

_STYLE = """
:root{--ink:#1d2430;--soft:#5d6878;--paper:#f5f6f8;--card:#fff;--edge:#e1e5eb;--good:#1a7f4b;--bad:#c0362c;
--wait:#8a6d1a;--c1:#2f6fde;--c2:#e08a1e;--c3:#8b95a5;--c4:#9a5fd0}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ef;--soft:#9aa5b5;--paper:#14181f;--card:#1c222c;--edge:#2d3542;
--good:#4cc38a;--bad:#f0776c;--wait:#d9b44a;--c1:#6d9ff5;--c2:#f0a955;--c3:#7f8a9b;--c4:#b98be8}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1180px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:24px;margin:0 0 4px}h2{font-size:16px;margin:0 0 10px}
.sub{color:var(--soft);margin:0 0 20px}
.pill{display:inline-block;padding:2px 12px;border-radius:99px;color:#fff;font-size:14px;vertical-align:4px;
margin-left:10px}
.pill.good{background:var(--good)}.pill.bad{background:var(--bad)}.pill.wait{background:var(--wait)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(165px,1fr));gap:12px;margin-bottom:16px}
.card,section{background:var(--card);border:1px solid var(--edge);border-radius:10px;padding:14px 16px}
.card b{display:block;font-size:23px;line-height:1.25;font-variant-numeric:tabular-nums}
.card span,.note{color:var(--soft);font-size:13px}
.why{border-color:var(--bad);margin-bottom:16px}.why h2{color:var(--bad)}.why ul{margin:0;padding-left:20px}
.grid2{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));gap:16px;margin-bottom:16px}
.wide{margin-bottom:16px;overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th{text-align:left;color:var(--soft);font-weight:500;font-size:13px;padding:4px 10px 6px 0;
border-bottom:1px solid var(--edge)}
td{padding:7px 10px 7px 0;border-bottom:1px solid var(--edge);vertical-align:top}tr:last-child td{border:0}
td.n,th.n{text-align:right}.ok{color:var(--good);font-weight:600}.no{color:var(--bad);font-weight:600}
.pm{color:var(--soft);font-size:12px;white-space:nowrap}
svg{display:block;width:100%;height:auto}
svg .grid{stroke:var(--edge)}svg .tick{fill:var(--soft);font-size:11px}svg .name{fill:var(--ink);font-size:13px}
svg .bar{fill:var(--c1)}svg .line{fill:none;stroke-width:2}
svg .line.c1{stroke:var(--c1)}svg .line.c2{stroke:var(--c2)}svg .line.c3{stroke:var(--c3)}svg .line.c4{stroke:var(--c4)}
svg .dot.c1{fill:var(--c1)}svg .dot.c2{fill:var(--c2)}svg .dot.c3{fill:var(--c3)}svg .dot.c4{fill:var(--c4)}
.legend{font-size:13px;color:var(--soft);margin-bottom:6px}.legend span{margin-right:16px}
.key{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:6px}
.key.c1{background:var(--c1)}.key.c2{background:var(--c2)}.key.c3{background:var(--c3)}.key.c4{background:var(--c4)}
"""


def page_of(report: Mapping[str, Any]) -> str:
    """The page of a report that says what became of its night."""
    outcome = report["outcome"]
    pill = ("good", "published") if outcome.startswith("published") else ("wait", "not published")
    if outcome == "refused":
        pill = "bad", "refused"
    live = report["live"]
    before = f"live before: {live}" if live is not None else "nothing was live before"
    told = f"{outcome} · {before} · started from {report['start']} · {report['optimiser']}"
    night = _day(report["last_event"])
    parts = [
        f'<h1>Night of {night}<span class="pill {pill[0]}">{pill[1]}</span></h1>',
        f'<p class="sub">{escape(told)}<br>written {escape(report["written"])}, report of night {report["night"]}</p>',
        _refusals(report),
        _cards(report),
        _section("Gates", _gates(report), "wide"),
        '<div class="grid2">',
        _section("Loss", lines(_losses(report["losses"]), x_label="steps")),
        _section("Time and peak memory by stage", _stages(report)),
        _section(f"{_metric(report)} by night", _recall_by_night(report)),
        _section("Items by night", _vocabulary_by_night(report)),
        "</div>",
        _section("Events held out", _held_out(report), "wide"),
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    title = f"<title>Night of {night}: {pill[1]}</title>"
    body = "\n".join(part for part in parts if part)
    head = f'<!doctype html>\n<html lang="en"><head>{head}{title}<style>{_STYLE}</style></head>'
    return f"{head}\n<body><main>\n{body}\n</main></body></html>\n"


def _day(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _metric(report: Mapping[str, Any]) -> str:
    return f"recall@{report['k']}"


def _section(title: str, content: str, kind: str = "") -> str:
    if not content:
        content = '<p class="note">Nothing to show yet.</p>'
    return f'<section class="{kind}"><h2>{escape(title)}</h2>{content}</section>'


def _refusals(report: Mapping[str, Any]) -> str:
    refused = [gate for gate in report["gates"] if not gate["passed"]]
    if not refused:
        return ""
    items = "".join(f"<li><b>{escape(gate['gate'])}</b>: {escape(gate['note'])}</li>" for gate in refused)
    stays = f"{report['live']} stays live" if report["live"] is not None else "nothing is published"
    return f'<section class="why"><h2>Refused: {escape(stays)}</h2><ul>{items}</ul></section>'


def _cards(report: Mapping[str, Any]) -> str:
    vocabulary, metric = report["vocabulary"], _metric(report)
    held_out, index = report["held_out"], report["index"]
    rival = "live" if "live" in held_out else "popularity"
    changes = [f"+{vocabulary['new']:,} new", f"−{vocabulary['gone']:,} gone"]
    if vocabulary["back"]:
        changes.insert(1, f"+{vocabulary['back']:,} back")
    tombstones = vocabulary["rows"] - vocabulary["items"]
    cards = [
        (f"{report['events']:,}", f"events of {report['users']:,} users"),
        (f"{vocabulary['items']:,}", f"items served: {', '.join(changes)}"),
        (f"{tombstones:,}", "expired rows kept for histories"),
        (
            f"{held_out['candidate'][metric]['mean']:.3f}",
            f"{metric}; {_NAMES[rival]}: {held_out[rival][metric]['mean']:.3f}",
        ),
        (f"{index['recall@100']:.3f}", "recall@100 of the index against exact search"),
        (
            _duration(sum(report["seconds"].values())),
            f"in all; at most {max(report['memory_mb'].values()) / 1024:.1f} GB",
        ),
    ]
    shown = "".join(
        f'<div class="card"><b>{escape(figure)}</b><span>{escape(said)}</span></div>' for figure, said in cards
    )
    return f'<div class="cards">{shown}</div>'


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _gates(report: Mapping[str, Any]) -> str:
    rows = []
    for gate in report["gates"]:
        verdict = '<td class="ok">passed</td>' if gate["passed"] else '<td class="no">refused</td>'
        figures = f'<td class="n">{gate["figure"]:.4g}</td><td class="n">{gate["limit"]:.4g}</td>'
        rows.append(f"<tr><td>{escape(gate['gate'])}</td>{verdict}{figures}<td>{escape(gate['note'])}</td></tr>")
    head = '<tr><th>gate<th>verdict<th class="n">figure<th class="n">limit<th>what was found</tr>'
    index = f"index {report['index']['spec']}: {report['index']['why']}"
    return f'<table>{head}{"".join(rows)}</table><p class="note">{escape(index)}</p>'


def _stages(report: Mapping[str, Any]) -> str:
    """Seconds as bars, each with its share and the stage's peak of memory."""
    seconds, total = report["seconds"], sum(report["seconds"].values())
    notes = {
        name: f"{taken:.1f} s · {taken / max(total, 1e-9):.0%} · {report['memory_mb'][name] / 1024:.1f} GB"
        for name, taken in seconds.items()
    }
    return bars(seconds, notes)


def _losses(losses: Mapping[str, Sequence[tuple[int, float]]]) -> dict[str, list[tuple[float, float]]]:
    """Both trainings on one axis, one after the other."""
    found: dict[str, list[tuple[float, float]]] = {}
    done = 0
    for name, points in losses.items():
        found[name] = [(done + step, loss) for step, loss in points]
        done += points[-1][0] if points else 0
    return found


def _recall_by_night(report: Mapping[str, Any]) -> str:
    metric = _metric(report)
    nights = [night for night in report["nights"] if night["metric"] == metric]
    tonight = {name: found[metric]["mean"] for name, found in report["held_out"].items()}
    figures = [*(night["recall"] for night in nights), tonight]
    series = {
        said: [(number, one[name]) for number, one in enumerate(figures) if name in one]
        for name, said in _NAMES.items()
    }
    return lines(series, ticks=_nights(nights))


def _vocabulary_by_night(report: Mapping[str, Any]) -> str:
    found = [*(night["vocabulary"] for night in report["nights"]), report["vocabulary"]]
    series = {
        said: [(number, one[name]) for number, one in enumerate(found) if name in one]
        for name, said in (("items", "served"), ("new", "new"), ("gone", "gone"))
    }
    # What a first night finds is all new, and would dwarf the rest.
    series["new"] = series["new"][1:]
    series["gone"] = series["gone"][1:]
    return lines(series, ticks=_nights(report["nights"]))


def _nights(before: Sequence[Mapping[str, Any]]) -> dict[float, str]:
    """Labels of a few nights, tonight among them."""
    labels = [night["version"].partition("-")[0].lstrip("0") or "0" for night in before] + ["tonight"]
    step = -(-len(labels) // 8)
    return {number: label for number, label in enumerate(labels) if (len(labels) - 1 - number) % step == 0}


def _held_out(report: Mapping[str, Any]) -> str:
    held_out = report["held_out"]
    metrics = list(held_out["candidate"])
    head = "".join(f'<th class="n">{escape(metric)}</th>' for metric in metrics)
    rows = []
    for name, found in held_out.items():
        cells = "".join(
            f'<td class="n">{one["mean"]:.4f} <span class="pm">[{one["low"]:.4f}, {one["high"]:.4f}]</span></td>'
            for one in (found[metric] for metric in metrics)
        )
        rows.append(f"<tr><td>{escape(_NAMES[name])}</td>{cells}</tr>")
    note = f"{report['queries']:,} users, each asked for the first item from {_day(report['held_out_since'])} on"
    note = f'<p class="note">{escape(note)}; 95% intervals over users</p>'
    return f"{note}<table><tr><th></th>{head}</tr>{''.join(rows)}</table>"
