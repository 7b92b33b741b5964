"""report.html in a browser: no request to the network, nothing on the console, all plots drawn, no sideways scroll."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from headless_chromium import chromium_page, chromium_path
from small_report import full_report

from reap_serve.compare.page import report_page
from reap_serve.plan.record import Plan, PlanLayer, Unbound

pytestmark = [
    pytest.mark.skipif(chromium_path() is None, reason="Chromium is not installed"),
    # Its DevTools connection may time out on a machine under load before the test's own limit does.
    pytest.mark.timeout(900),
]
pytest.importorskip("plotly")

PLAN = Plan(
    schema_version=1,
    model=Unbound(),
    criterion="reap",
    layers=tuple(
        PlanLayer(layer=f"layers.{index}", index=index, kept=(0, 2), dropped=(1, 3), saliency=(4.0, 1.0, 3.0, 0.5))
        for index in range(6)
    ),
)

# Marks of traces that have an area: a plot that failed to draw has none.
DRAWN = """
[...document.querySelectorAll('.plotly-graph-div')].map(plot => [plot.id,
  [...plot.querySelectorAll('.point path, path.point, path.js-line')].filter(mark => {
    const box = mark.getBoundingClientRect(); return box.width > 0 || box.height > 0; }).length,
  plot.getBoundingClientRect().right])
"""


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    page = report_page(full_report(("code", "prose & <b>more</b>", "tools")), PLAN)
    assert page is not None
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


@pytest.mark.parametrize("width", [1200, 390])
def test_page(page_file: Path, width: int) -> None:
    expected = re.findall(r'<div id="(plot-[\w-]+)"', page_file.read_text())
    with chromium_page() as page:
        page.open(page_file, width)
        drawn = page.value(DRAWN)
        scroll_width, picture = page.value(
            "[document.documentElement.scrollWidth, document.querySelector('.plan svg').getBoundingClientRect().height]"
        )
        text = page.value("document.body.innerText")
    assert page.requests == []
    assert page.problems == []
    assert [name for name, _, _ in drawn] == expected
    # Quality 3, percentiles 4, their curves 4, throughput, goodput, memory 8, candidates, recovery.
    assert len(expected) == 23
    for name, marks, right in drawn:
        assert marks > 0, name
        assert right <= width, name
    assert scroll_width <= width
    assert picture > 50
    assert "1 of 3 slices beyond the limits: code" in text
    assert "prose & <b>more</b>" in text


def test_print(page_file: Path, tmp_path: Path) -> None:
    with chromium_page() as page:
        page.open(page_file, 1200)
        page.print(tmp_path / "report.pdf")
        assert page.problems == []
    content = (tmp_path / "report.pdf").read_bytes()
    assert content.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", content)) >= 2
