"""Rendering a summary as HTML and as Markdown."""

from __future__ import annotations

import html as escaping
import json
from collections.abc import Mapping, Sequence
from typing import Any

from llm_jax.lab.summary import Summary

COLUMNS = ("arm", "metric", "95% interval", "seeds", "tuned", "difference", "p (Holm)", "verdict")
METHOD = (
    "Where there is a grid, every arm is tuned over it on seeds of its own; the winner is trained on fresh seeds, and those are what is "
    "compared. Intervals of arms are Student's, of the mean over seeds. Differences are paired by seed, with their own 95% intervals, and "
    "tested by Student's paired t, Holm-corrected over arms (and, apart, over claims) at 5%. With one seed nothing is tested. An arm with a "
    "diverged final run gets no verdict."
)
PROFILE = (
    "Shares of all devices' time in the traced steps; idle is waiting for the host, for data or for each other, and for what was done "
    "between dispatches. The traces lie in profiles/, for XProf or TensorBoard."
)
TITLES = {
    "arms": "Arms: mean, its interval, and every seed",
    "length": "Beyond the trained length",
    "facts": "By how many facts ago it was told",
    "learning_curves_step": "Learning curves: steps",
    "learning_curves_tokens": "Learning curves: tokens",
    "learning_curves_flops": "Learning curves: FLOPs",
    "learning_curves_seconds": "Learning curves: seconds",
}
STYLE = """
:root{--ink:#1b1f24;--soft:#57606a;--line:#d8dee4;--paper:#fff;--good:#1a7f37;--bad:#cf222e}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9aa4ae;--line:#30363d;--paper:#0d1117;--good:#3fb950;--bad:#ff7b72}
figure{background:#fff;border-radius:6px}}
body{font:16px/1.55 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:1000px;margin:2.5rem auto;padding:0 1.2rem}
h1{font-size:1.7rem;line-height:1.25;margin:0 0 .6rem}h2{font-size:1.15rem;margin:2.2rem 0 .6rem;border-bottom:1px solid var(--line);padding-bottom:.3rem}
.answer{font-size:1.1rem}.soft,figcaption{color:var(--soft);font-size:.88rem}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .6rem;border-bottom:1px solid var(--line);text-align:right;vertical-align:top}th{color:var(--soft);font-weight:600}
th:first-child,td:first-child,th:last-child,td:last-child{text-align:left}.numbers th:last-child,.numbers td:last-child{text-align:right}
.better,.supported{color:var(--good);font-weight:600}.worse,.refuted{color:var(--bad);font-weight:600}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(420px,1fr));gap:1rem}figure{margin:0;padding:.4rem;break-inside:avoid}
svg{width:100%;height:auto}pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:.8rem;background:color-mix(in srgb,var(--line) 35%,transparent);padding:.8rem;border-radius:6px}
@media print{body{max-width:none;margin:0;font-size:11pt}details{display:block}.grid{grid-template-columns:1fr 1fr}}
"""


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """An arm's row of the main table, as text."""
    difference, interval = row["difference"], row["interval"]
    tuned = ", ".join(
        f"{path.split('.')[-1]} {value:g}{' (edge!)' if path in row['edges'] else ''}" for path, value in row["nuisance"].items()
    )
    return (
        row["arm"],
        _number(row["mean"]),
        f"[{_number(interval[0])}, {_number(interval[1])}]" if interval else "–",
        str(row["n"]),
        tuned or "–",
        _difference(difference),
        _number(row["p"], 2),
        row["verdict"],
    )


def _difference(difference: Mapping[str, Any] | None) -> str:
    if difference is None:
        return "–"
    spread = f" [{difference['low']:+.4f}, {difference['high']:+.4f}]" if difference["low"] is not None else ""
    return f"{difference['mean']:+.4f}{spread}"


def _number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}g}"


def _floor(data: Mapping[str, Any]) -> str:
    floor = data["noise_floor"]
    if floor is None:
        return "With fewer than two seeds there is no noise floor, and nothing can be tested."
    found = (
        ""
        if floor["detectable"] is None
        else (
            f" With {floor['seeds']} seeds a difference of about {floor['detectable']:.4f} "
            "is found four times in five, by the first of Holm's tests; smaller ones need more seeds."
        )
    )
    return f"From seed to seed the metric varies by {floor['deviation']:.4f} (standard deviation, pooled over arms).{found}"


def _claim(claim: Mapping[str, Any]) -> tuple[str, str, str, str]:
    return claim["text"], claim["metric"], _difference(claim["difference"]), claim["verdict"]


def _edges(data: Mapping[str, Any]) -> list[str]:
    return [
        f"{row['arm']}: the best {path} lies at the edge of the grid, so a wider grid may change its number"
        for row in data["arms"]
        for path in row["edges"]
    ]


def title(name: str) -> str:
    """What a picture shows."""
    return TITLES.get(name) or f"Sensitivity: {name.removeprefix('sensitivity_').replace('_', ' ')}"


# ── Markdown ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def markdown(summary: Summary, drawn: Sequence[str]) -> str:
    """The report as Markdown; the pictures are those in `plots/`."""
    data = summary.data
    parts = [
        f"# {data['question']}",
        data["answer"],
        f"Metric: `{data['metric']}`, {'lower' if data['mode'] == 'min' else 'higher'} is better. "
        f"Differences are from `{data['baseline']}`.",
        _grid(COLUMNS, [cells(row) for row in data["arms"]]),
        _floor(data),
    ]
    notes = data["problems"] + _edges(data)
    if notes:
        parts += ["## Take note", "\n".join(f"- {note}" for note in notes)]
    if data["claims"]:
        parts += ["## Claims", _grid(("claim", "metric", "difference", "verdict"), [_claim(c) for c in data["claims"]])]
    parts += ["## Pictures", "\n\n".join(f"![{title(name)}](plots/{name}.png)" for name in drawn)]
    parts += ["## All metrics", _grid(("metric", *[r["arm"] for r in data["arms"]]), _metric_rows(data))]
    if data["profiles"]:
        parts += ["## Where the time goes", _grid(_profile_headings(data), _profile_rows(data)), PROFILE]
    parts += [
        "## Arms",
        _grid(("arm", "differs from the base in"), [(arm, _changes(changes)) for arm, changes in data["scientific"].items()]),
    ]
    parts += ["## How it was made", METHOD, "```\n" + json.dumps(data["provenance"], indent=1) + "\n```"]
    return "\n\n".join(parts) + "\n"


def _grid(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    clean = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in (headings, ["---"] * len(headings), *clean))


def _metric_rows(data: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [(name, *[_number(values[row["arm"]]) for row in data["arms"]]) for name, values in data["metrics"].items()]


def _profile_headings(data: Mapping[str, Any]) -> tuple[str, ...]:
    kinds = dict.fromkeys(kind for found in data["profiles"] for kind in found["shares"])
    return "program of", "steps", *kinds, "most of it"


def _profile_rows(data: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Of each traced program the share of its devices' time that each kind of operation took, and the operations that took most."""
    kinds = _profile_headings(data)[2:-1]
    return [
        (
            found["label"],
            "{}–{}".format(*found["steps"]),
            *(f"{found['shares'].get(kind, 0.0):.1%}" for kind in kinds),
            ", ".join(f"{one['operation']} {one['share']:.1%}" for one in found["top"][:4]),
        )
        for found in data["profiles"]
    ]


def _changes(changes: Mapping[str, str]) -> str:
    return "; ".join(f"{path} = {value}" for path, value in changes.items()) or "nothing"


# ── HTML ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
def html(summary: Summary, pictures: Mapping[str, str]) -> str:
    """The whole page; pictures: name → `<svg>` element."""
    data, text = summary.data, escaping.escape
    notes = "".join(f"<li>{text(note)}</li>" for note in data["problems"] + _edges(data))
    figures = "".join(f"<figure><figcaption>{text(title(name))}</figcaption>{svg}</figure>" for name, svg in pictures.items())
    claims = table(("claim", "metric", "difference", "verdict"), [_claim(c) for c in data["claims"]], verdicts=True)
    metrics = table(("metric", *[r["arm"] for r in data["arms"]]), _metric_rows(data))
    profiles = table(_profile_headings(data), _profile_rows(data))
    better = "lower" if data["mode"] == "min" else "higher"
    parts = [
        f"<h1>{text(data['question'])}</h1><p class=answer>{text(data['answer'])}</p>",
        f"<p class=soft>Metric: <code>{text(data['metric'])}</code>, {better} is better. "
        f"Differences are from <code>{text(data['baseline'])}</code>. "
        f"Experiment {text(data['name'])}, scale {text(str(data['scale']))}.</p>",
        table(COLUMNS, [cells(row) for row in data["arms"]], verdicts=True),
        f"<p>{text(_floor(data))}</p>",
        f"<h2>Take note</h2><ul>{notes}</ul>" if notes else "",
        f"<h2>Claims</h2>{claims}" if data["claims"] else "",
        f"<h2>Pictures</h2><div class=grid>{figures}</div>",
        f"<h2>All metrics, mean over seeds</h2><div class=numbers>{metrics}</div>",
        f"<h2>Where the time goes</h2>{profiles}<p class=soft>{PROFILE}</p>" if data["profiles"] else "",
        "<h2>What the arms change</h2>",
        table(("arm", "differs from the base in"), [(a, _changes(c)) for a, c in data["scientific"].items()]),
        f"<details><summary>One arm's whole configuration</summary><pre>{text(json.dumps(data['base'], indent=1))}</pre></details>",
        f"<h2>How it was made</h2><p class=soft>{METHOD}</p><pre>{text(json.dumps(data['provenance'], indent=1))}</pre>",
    ]
    return document(data["question"], "".join(parts))


def document(title: str, body: str, *, style: str = "") -> str:
    """A whole page that needs no other file; style: rules besides the reports' own."""
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{escaping.escape(title)}</title><style>{STYLE}{style}</style>{body}</html>\n"
    )


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, verdicts: bool = False) -> str:
    """A table; verdicts: the last cells of its rows are some, which have a colour."""
    head = "".join(f"<th>{escaping.escape(h)}</th>" for h in headings)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="{escaping.escape(cell)}">{escaping.escape(cell)}</td>'
            if verdicts and i == len(row) - 1
            else f"<td>{escaping.escape(cell)}</td>"
            for i, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
