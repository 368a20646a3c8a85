"""Claims as one self-contained HTML page: no scripts, no fonts or pictures from elsewhere."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from fourfold.claims import Claim, Figure, Plot
from fourfold.claims.store import to_data, write_atomically
from fourfold.runtime.progress import format_seconds


def format_number(value: float | str | None) -> str:
    """A figure as a reader wants it: five digits (248.45), thousands apart, a dash for none.

    >>> format_number(248.4534), format_number(1234567.8), format_number(-0.00012345)
    ('248.45', '1,234,568', '−0.00012345')
    """
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if not math.isfinite(value):
        return str(float(value))
    text = f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.5g}"
    return text.replace("-", "−")


def format_interval(
    ours: float | str | None, low: float | None, high: float | None
) -> tuple[str, str]:
    """A figure and its interval, to the decimals that the interval's width can tell apart.

    >>> format_interval(12.3456, 10.21, 17.0)
    ('12.3', '10.2 to 17.0')
    """
    ends = (low, high)
    numbers = [x for x in (ours, *ends) if isinstance(x, (int, float)) and math.isfinite(x)]
    if len(numbers) < 3 or low is None or high is None or low >= high:
        text = "–" if ends == (None, None) else " to ".join(map(format_number, ends))
        return format_number(ours), text
    decimals = min(8, max(0, 1 - math.floor(math.log10(high - low))))
    value, *around = (f"{x:,.{decimals}f}".replace("-", "−") for x in numbers)
    return value, " to ".join(around)


def write_report(claims: Sequence[Claim], out: Path, scale: str) -> Path:
    """Writes `report.html` and `claims.json` into a folder, replacing older ones whole.

    Args:
      claims: in the order to show them, failed ones among them.
      out: the folder; a claim's plots are in `out/NAME`, as `claims.json` says.
      scale: at which they ran.

    Returns:
      The page's path.
    """
    out.mkdir(parents=True, exist_ok=True)
    data = [to_data(claim) for claim in claims]
    for claim in data:
        for plot in claim["plots"]:
            plot["file"] = f"{claim['name']}/{plot['file']}"
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(out / "claims.json", text + "\n")
    path = out / "report.html"
    write_atomically(path, render(claims, scale))
    return path


def render(claims: Sequence[Claim], scale: str) -> str:
    """The page's HTML. Every text of a claim is escaped."""
    css = resources.files("fourfold").joinpath("report.css").read_text(encoding="utf-8")
    dates = sorted({claim.date for claim in claims if claim.date})
    when = f", {dates[0]}" if len(dates) == 1 else f", {dates[0]} to {dates[-1]}" if dates else ""
    count = f"{len(claims)} claim{'' if len(claims) == 1 else 's'}"
    body = "".join(_claim(claim) for claim in claims)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>fourfold: published results beside ours</title>
<style>
{css}</style>
</head>
<body>
<main>
<header>
<h1>Published results beside ours</h1>
<p class="lede">fourfold, {count} at {escape(scale)} scale<span>{escape(when)}</span></p>
{_contents(claims)}
</header>
{body}</main>
</body>
</html>
"""


def _contents(claims: Sequence[Claim]) -> str:
    if len(claims) < 2:
        return ""
    rows = "".join(
        f'<tr><th scope="row"><a href="#{escape(claim.name)}">{escape(claim.title)}</a></th>'
        f'<td class="outcome">{_inline(_outcome(claim))}</td>'
        f'<td class="n">{format_seconds(claim.seconds)}</td></tr>\n'
        for claim in claims
    )
    head = '<th scope="col">Claim</th><th scope="col">Outcome</th>'
    return _table(f'{head}<th scope="col" class="n">Run time</th>', rows, "All claims")


def _outcome(claim: Claim) -> str:
    return "Failed; see below." if claim.error is not None else claim.verdict or "See below."


def _claim(claim: Claim) -> str:
    parts = [
        f'<section id="{escape(claim.name)}">',
        f'<p class="label">{escape(claim.name)}</p>',
        f"<h2>{_inline(claim.title)}</h2>",
        f'<p class="cite">{escape(claim.paper)}</p>' if claim.paper else "",
    ]
    if claim.error is not None:
        parts.append(
            f'<p class="verdict">This claim failed to run.</p>\n<pre>{escape(claim.error)}</pre>'
        )
    elif claim.verdict:
        parts.append(f'<p class="verdict">{_inline(claim.verdict)}</p>')
    parts += [
        f"<p>{_inline(text)}</p>" for text in re.split(r"\n\s*\n", claim.text.strip()) if text
    ]
    if claim.figures:
        parts.append(_figures(claim))
    parts += [_plot(plot) for plot in claim.plots]
    parts += [_facts(claim), "</section>\n"]
    return "\n".join(part for part in parts if part)


def _figures(claim: Claim) -> str:
    head = '<th scope="col">Measure</th>' + "".join(
        f'<th scope="col" class="n">{name}</th>' for name in ("Paper", "Ours", "Interval", "Seeds")
    )
    rows = "".join(_figure(figure, len(claim.seeds)) for figure in claim.figures)
    aside = f'<p class="aside">Interval: {_inline(claim.interval)}</p>' if claim.interval else ""
    return _table(head, rows, f"{claim.title}: figures") + aside


def _figure(figure: Figure, seeds: int) -> str:
    ours, interval = format_interval(figure.ours, figure.low, figure.high)
    unit = f'<span class="unit">, {escape(figure.unit)}</span>' if figure.unit else ""
    note = f'<span class="aside">{_inline(figure.note)}</span>' if figure.note else ""
    runs: int | str = seeds if figure.seeds is None else figure.seeds
    if figure.ours is None or not runs:
        runs = "–"
    cells = [
        f'<th scope="row">{_inline(figure.name)}{unit}{note}</th>',
        f'<td class="n">{escape(format_number(figure.paper))}</td>',
        f'<td class="n ours">{escape(ours)}</td>',
        f'<td class="n">{escape(interval)}</td>',
        f'<td class="n">{runs}</td>',
    ]
    return f"<tr>{''.join(cells)}</tr>\n"


def _plot(plot: Plot) -> str:
    data = base64.b64encode(plot.png).decode("ascii")
    caption = f" {_inline(plot.caption)}" if plot.caption else ""
    return (
        f'<figure><img alt="{escape(plot.title)}" src="data:image/png;base64,{data}">'
        f"<figcaption><b>{_inline(plot.title)}</b>{caption}</figcaption></figure>"
    )


def _facts(claim: Claim) -> str:
    facts = {
        "Command": f"<pre>{escape(claim.command)}</pre>" if claim.command else "",
        "Scale": escape(claim.scale),
        "Seeds": escape(_seeds(claim.seeds)),
        "Hardware": escape(describe_hardware(claim.hardware)),
        "Run time": format_seconds(claim.seconds),
        "Date": escape(claim.date),
    }
    items = "".join(f"<dt>{name}</dt><dd>{text}</dd>\n" for name, text in facts.items() if text)
    return f"<dl>\n{items}</dl>"


def _seeds(seeds: Sequence[int]) -> str:
    if len(seeds) > 4 and list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))


def describe_hardware(hardware: Mapping[str, Any]) -> str:
    """`fourfold.runtime.hardware.hardware` in a line; unknown fields are added as they are."""
    left = dict(hardware)
    cpu, cores, memory = (left.pop(name, None) for name in ("cpu", "cores", "memory_gib"))
    count, kind, platform = (left.pop(name, None) for name in ("devices", "device", "platform"))
    python, jax, processes = (left.pop(name, None) for name in ("python", "jax", "processes"))
    parts = [
        str(cpu) if cpu else "",
        f"{cores} core{'' if cores == 1 else 's'}" if cores else "",
        f"{memory} GiB memory" if memory else "",
        f"{count or 1} × {kind}" if kind else "",
        str(platform) if platform and platform != kind else "",
        f"{processes} processes" if processes and processes > 1 else "",
        f"JAX {jax}" if jax else "",
        f"Python {python}" if python else "",
        *(f"{name} {value}" for name, value in left.items()),
    ]
    return ", ".join(part for part in parts if part)


def _table(head: str, rows: str, label: str) -> str:
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">'
        f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody></table></div>"
    )


def _inline(text: str) -> str:
    """Escaped text, with `backticks` as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
