"""The page that a night leaves: whole, true to the report, and without anything outside it."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from retrieval.jobs.charts import bars, lines
from retrieval.jobs.report_page import page_of
from tests.jobs.nights import ITEMS, latest, night, write_log


class _Page(HTMLParser):
    """Collects text and what would be fetched, and holds every element to be closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.pictures = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe")
        assert not {name for name, _ in attrs} & {"src", "href"}
        self.pictures += tag == "svg"
        if tag not in ("meta", "br", "th", "i"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("line", "circle", "polyline", "rect")

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("th", "i"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(page: str) -> _Page:
    found = _Page()
    found.feed(page)
    assert found.open == []
    assert "url(" not in page
    return found


def test_a_published_and_a_refused_night_leave_a_page(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = read((latest(root) / "report.html").read_text(encoding="utf-8"))
    assert any("published as 000001-" in text for text in first.text)
    (root / "gates.json").write_text(json.dumps({"min_catalogue": 1.5}))
    write_log(root / "log", 5, items=ITEMS + 3)
    assert night(root / "log", root, "--gates", str(root / "gates.json")) == 3
    assert str(latest(root) / "report.html") in capsys.readouterr().err
    page = read((latest(root) / "report.html").read_text(encoding="utf-8"))
    report = json.loads((latest(root) / "report.json").read_text())
    text = " ".join(page.text)
    assert "refused" in page.text
    assert re.search(r"Refused: 000001-\w+ stays live", text)
    for gate in report["gates"]:
        assert gate["gate"] in text
        assert gate["note"] in text
    assert page.pictures == 4
    assert len(report["nights"]) == 1
    assert report["nights"][0]["vocabulary"]["items"] == ITEMS
    assert set(report["losses"]) == {"train", "finish"}
    assert all(len(points) > 1 for points in report["losses"].values())
    assert set(report["memory_mb"]) == set(report["seconds"]) == {"ingest", "train", "evaluate", "finish", "index"}
    assert len(list((root / "work" / "reports").glob("*.html"))) == 2


def test_what_stands_in_a_report_is_text_and_no_markup(root: Path) -> None:
    report = json.loads((latest(root) / "report.json").read_text())
    report["gates"][0]["note"] = "<script>alert(1)</script>"
    assert "<script>alert(1)</script>" in read(page_of(report)).text


def test_lines_and_bars_stand_where_their_figures_say() -> None:
    drawn = lines({"one": [(0, 0.0), (10, 100.0)], "none": []}, x_label="steps")
    (path,) = re.findall(r'points="([^"]+)"', drawn)
    (left, bottom), (right, top) = (map(float, point.split(",")) for point in path.split())
    assert left < right
    assert bottom > top
    assert "none" not in drawn
    assert lines({"none": []}) == ""
    widths = re.findall(r'class="bar"[^/]*width="([\d.]+)"', bars({"a": 2.0, "b": 1.0}, {"a": "2 s", "b": "1 s"}))
    assert float(widths[0]) == 2 * float(widths[1])
    assert bars({}, {}) == ""
