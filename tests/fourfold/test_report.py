"""The report shows what the claims say, escaped, from nowhere but itself."""

import base64
import dataclasses
import html.parser
import json
import math
import re

import numpy as np
import pytest

from fourfold.claims import Claim, Figure, Plot, store
from fourfold.report import describe_hardware, format_interval, format_number, render, write_report
from fourfold.runtime.hardware import hardware

# A PNG of one pixel.
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8AAAAASUVORK5CYII="
)
EVIL = "<img src=x onerror='alert(\"1\")'> & `co<de`"


def _claim(**changes):
    claim = Claim(
        name="c51",
        title="SN helps C51",
        paper="Gogianu et al., ICML 2021",
        text="First `paragraph`.\n\nSecond one.",
        figures=(
            Figure("median", 248.45, 240.2, 231.0, 251.0, "%", "54 games", seeds=3),
            Figure("atari", "248 (54 games)", None),
        ),
        plots=(Plot("curve", PNG, "over steps"),),
        command="fourfold reproduce --only c51",
        seeds=(0, 1, 2, 3, 4),
        hardware={"cpu": "EPYC", "cores": 2, "memory_gib": 23.5, "jax": "0.10.2", "device": "cpu"},
        seconds=372.4,
        scale="laptop",
        verdict="Holds in 3 of 4 games.",
        interval="95 % bootstrap",
        date="2026-01-02",
    )
    return dataclasses.replace(claim, **changes)


class _Reader(html.parser.HTMLParser):
    """Collects tags and text, and checks that every element is closed in order."""

    VOID = frozenset({"meta", "img"})

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def test_everything_a_reader_needs_is_there():
    page = _Reader(render([_claim()], "laptop"))
    for words in (
        "SN helps C51",
        "Gogianu et al., ICML 2021",
        "First paragraph .",
        "Second one.",
        "Holds in 3 of 4 games.",
        "median , % 54 games 248.45 240 231 to 251 3",
        "atari 248 (54 games) – – –",
        "Interval: 95 % bootstrap",
        "curve over steps",
        "fourfold reproduce --only c51",
        "Seeds 0 to 4",
        "EPYC, 2 cores, 23.5 GiB memory, 1 × cpu, JAX 0.10.2",
        "Run time 0:06:12",
        "2026-01-02",
        "1 claim at laptop scale",
    ):
        assert words in page.text, words


def test_the_page_stands_alone():
    page = render([_claim(), _claim(name="other")], "laptop")
    reader = _Reader(page)
    assert not {tag for tag, _ in reader.tags} & {"script", "link", "iframe", "object"}
    sources = [attrs["src"] for tag, attrs in reader.tags if tag == "img"]
    assert [base64.b64decode(s.removeprefix("data:image/png;base64,")) for s in sources] == [
        PNG,
        PNG,
    ]
    assert not re.search(r"https?://|url\(|@import", page)
    links = [attrs["href"] for tag, attrs in reader.tags if tag == "a"]
    ids = [attrs["id"] for tag, attrs in reader.tags if "id" in attrs]
    assert links == ["#c51", "#other"] and ids == ["c51", "other"]
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page


def test_every_text_is_escaped():
    texts = {
        field.name: EVIL
        for field in dataclasses.fields(Claim)
        if field.type == "str" and field.name != "name"
    }
    assert len(texts) >= 8
    claim = _claim(
        **texts,
        name="'><script>",
        figures=(Figure(EVIL, EVIL, EVIL, None, None, EVIL, EVIL),),
        plots=(Plot(EVIL, PNG, EVIL),),
        hardware={"cpu": EVIL, EVIL: EVIL},
    )
    for page in (
        render([claim, dataclasses.replace(claim, error=EVIL)], EVIL),
        render([dataclasses.replace(claim, verdict="")], EVIL),
    ):
        reader = _Reader(page)
        assert all(attrs["src"].startswith("data:") for tag, attrs in reader.tags if tag == "img")
        assert not any(name.startswith("on") for _, attrs in reader.tags for name in attrs)
        assert "script" not in [tag for tag, _ in reader.tags]
        assert "<img src=x" in reader.text


def test_a_failed_claim_shows_its_error():
    text = _Reader(render([_claim(error="ValueError: no pgx", text=""), _claim()], "gpu")).text
    assert "This claim failed to run. ValueError: no pgx" in text
    assert "Failed; see below." in text and "Holds in 3 of 4 games." in text


def test_a_page_of_nothing_is_still_a_page():
    assert "0 claims" in _Reader(render([], "laptop")).text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        ("about 3", "about 3"),
        (0, "0"),
        (-1.5, "−1.5"),
        (9999.4, "9999.4"),
        (12345.6, "12,346"),
        (math.nan, "nan"),
        (1e-5, "1e−05"),
        (np.float32(0.25), "0.25"),
    ],
)
def test_numbers(value, text):
    assert format_number(value) == text


@pytest.mark.parametrize(
    ("figure", "expected"),
    [
        ((12.3456, 10.21, 17.0), ("12.3", "10.2 to 17.0")),
        ((1.00012, 0.99998, 1.00025), ("1.00012", "0.99998 to 1.00025")),
        ((-5.5, -7.0, -4.0), ("−5.5", "−7.0 to −4.0")),
        ((123456.0, 120000.0, 130000.0), ("123,456", "120,000 to 130,000")),
        ((3.0, 3.0, 3.0), ("3", "3 to 3")),
        ((3.0, None, None), ("3", "–")),
        ((3.0, math.nan, 4.0), ("3", "nan to 4")),
        ((3.0, 2.5, None), ("3", "2.5 to –")),
    ],
)
def test_intervals(figure, expected):
    assert format_interval(*figure) == expected


def test_json_beside_the_page_is_strict_and_points_at_the_plots(tmp_path):
    claim = _claim(figures=(Figure("x", np.float32(0.5), math.nan, -math.inf, math.inf),))
    store.save(claim, tmp_path / "c51")
    page = write_report([claim], tmp_path, "laptop")
    assert page == tmp_path / "report.html"

    def refuse(name):
        raise ValueError(name)

    (data,) = json.loads((tmp_path / "claims.json").read_text(), parse_constant=refuse)
    assert data["figures"][0] == {
        "name": "x", "paper": 0.5, "ours": "NaN", "low": "-Infinity", "high": "Infinity",
        "unit": "", "note": "", "seeds": None,
    }  # fmt: skip
    assert (tmp_path / data["plots"][0]["file"]).read_bytes() == PNG
    again = store.load(tmp_path / "c51", "laptop")
    assert again is not None and math.isnan(again.figures[0].ours)  # pyright: ignore
    assert again.figures[0].high == math.inf


def test_a_stored_claim_comes_back_whole_or_not_at_all(tmp_path):
    claim = _claim(hardware=hardware())
    store.save(claim, tmp_path)
    assert store.load(tmp_path, "laptop") == claim
    assert store.load(tmp_path, "gpu") is None
    assert store.load(tmp_path / "nowhere", "laptop") is None
    (tmp_path / "plot_1.png").unlink()
    assert store.load(tmp_path, "laptop") is None
    text = (tmp_path / "claim.json").read_text()
    store.save(claim, tmp_path)
    (tmp_path / "claim.json").write_text(text[: len(text) // 2])
    assert store.load(tmp_path, "laptop") is None
    (tmp_path / "claim.json").write_text(text.replace('"verdict"', '"opinion"'))
    assert store.load(tmp_path, "laptop") is None


def test_a_matplotlib_figure_becomes_a_png():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure, axes = pyplot.subplots(figsize=(2, 1))
    axes.plot([0, 1])
    plot = Plot("curve", figure)
    pyplot.close(figure)
    assert plot.png.startswith(b"\x89PNG")


def test_hardware_of_several_devices_reads_well():
    text = describe_hardware(
        {"device": "H200", "devices": 16, "platform": "gpu", "processes": 2, "driver": "570"}
    )
    assert text == "16 × H200, gpu, 2 processes, driver 570"
