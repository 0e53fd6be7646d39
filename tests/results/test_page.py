"""Tests of report.html and of the pictures: layout, contrast and hover values in a real browser.

The browser tests need the package playwright and a Chromium: playwright's own (`playwright install
chromium`), or one on the PATH.
"""

import itertools
import json
import re
import shutil

import pytest
from helpers import invoke, write_run

from prefix_distill.display import short_time_text
from prefix_distill.results import curves, plots
from prefix_distill.results.cells import recommendation_text, saving_text
from prefix_distill.results.runs import collect_runs

STEPS = 300
TEXT = "A long answer with a_very_long_word_" + "x" * 400 + "\n\n\\boxed{12} ‖ <b>not bold</b>"
SCHEMES = ("light", "dark")
WIDTHS = (390, 1280)
# WCAG 2: the least contrast of text and of lines
TEXT_CONTRAST, LINE_CONTRAST = 4.5, 3.0


def write_rich_run(folder, seed, accuracies, prefix=4):
    """Write a run with metrics and stored texts."""
    write_run(folder, seed, accuracies, 1e12, prefix=prefix)
    result = json.loads((folder / "run.json").read_text())
    result["result"]["steps"] = 5 * (len(accuracies) - 1)
    (folder / "run.json").write_text(json.dumps(result))
    rows = [
        {"step": i, "loss/reverse_kl_nats": 1 / i, "optimizer/gradient_norm": 2.0 + i % 7}
        for i in range(1, STEPS + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("before", "after"):
        lines = []
        for i in range(7):
            response = {"text": TEXT, "tokens": 90, "finished": i > 0, "correct": i % 2 == 0}
            response["prefix_characters"] = 20
            row = {
                "problem": i,
                "prompt": f"{i} + {i}?",
                "reference": "12",
                "responses": [response],
            }
            lines.append(json.dumps(row) + "\n")
        (folder / f"examples-{name}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Return the path of a page about three arms, one of them with a long name."""
    root = tmp_path_factory.mktemp("page")
    for seed in (0, 1):
        write_rich_run(root / "runs" / "full" / f"seed-{seed}", seed, [0.2, 0.6, 0.8], prefix=10)
        write_rich_run(root / "runs" / "prefix" / f"seed-{seed}", seed, [0.2, 0.7, 0.9])
    write_rich_run(root / "runs" / ("long_name_" * 6) / "seed-0", 0, [0.2, 0.1, 0.0])
    code, _, err = invoke(
        "report", root / "runs", "--out", root / "out", "--reference", "full", "--title", "Arms"
    )
    assert code == 0, err
    return root / "out" / "report.html"


def test_the_page_has_answers_and_curves_without_scripts(page):
    text = page.read_text()
    assert "<script" not in text and "&lt;b&gt;not bold" in text
    assert not re.search(r"https?://|src=\"(?!data:)|href=|@import|url\(", text)
    assert text.count('<svg class="curves"') == 5
    assert text.count('class="answer ') == 3 * 2 * 5
    assert "before: right, 90 tokens, cut off" in text and 'class="mark"' in text


def test_curves_are_means_and_long_ones_have_few_points(page):
    runs = collect_runs([page.parents[1] / "runs"])
    panels = {panel.title.split(" (")[0]: panel for panel in curves.make_panels(runs)}
    assert list(panels) == [
        "training divergence",
        "held-out reverse KL",
        "gradient norm",
        "length of full answers",
        "accuracy on held-out problems",
    ]
    for panel in panels.values():
        for line in panel.lines:
            assert 2 <= len(line.points.split()) <= curves.POINTS
    accuracy = panels["accuracy on held-out problems"]
    assert [hover.title for hover in accuracy.hovers] == ["step 0", "step 5", "step 10"]
    last = [text.split()[0] for _, text in accuracy.hovers[-1].values]
    assert last == ["80", "0", "90"]
    for panel in panels.values():  # strips cover the panel without gaps
        ends = [(hover.left, hover.left + hover.width) for hover in panel.hovers]
        for (_, right), (left, _) in itertools.pairwise(ends):
            assert left == pytest.approx(right, abs=0.11)


def test_numbers_are_short():
    assert [curves.short(v) for v in (0.01234, 3.0, 1250, 2e6, 4.2e9)] == [
        *("0.0123", "3", "1.25k", "2M", "4.2G")
    ]
    assert [short_time_text(s) for s in (0.034, 5, 99.4, 130, 7200, 86400)] == [
        *("0.034 s", "5 s", "99 s", "2 min", "2.0 h", "24.0 h")
    ]
    prefix = {"full_rollouts": False, "flops_useful": 3.0}
    assert saving_text({**prefix, "full_rollout_cost": None}) == "–"
    assert saving_text({**prefix, "full_rollout_cost": 12.0}) == "4.0×"
    assert saving_text({"full_rollouts": True, "full_rollout_cost": 2.0}) == "1.0×"


def test_axes_have_readable_units(page):
    runs = collect_runs([page.parents[1] / "runs"])
    texts = {}
    for against in ("useful training FLOPs", "training time (s)", "steps"):
        figure = plots.draw_report(runs, against=against)
        figure.canvas.draw()
        [axes] = figure.axes
        texts[against] = [label.get_text() for label in axes.get_xticklabels()]
        assert axes.xaxis.get_offset_text().get_text() == ""
    assert any(re.fullmatch(r"[\d.]+ TFLOP", text) for text in texts["useful training FLOPs"])
    assert "10" in texts["steps"]


def test_a_probe_has_an_axis_for_the_kl_and_never_recommends_none(tmp_path, monkeypatch):
    from matplotlib import pyplot

    monkeypatch.setattr(pyplot, "close", str)  # keep the figure open
    share = {"tokens": 0.25, "divergence": 0.25}
    names = [f"{a} entropy, {b} divergence" for a in ("high", "low") for b in ("high", "low")]
    bins = [{"from": i, "to": i + 1, "kl": 0.01 * i, "entropy": 12.0} for i in range(9)]
    document = {
        "by_position": bins,
        "teacher_prefix_curve": [None],
        "teacher_decay_curve": [None],
        "quadrants": {"borders": [1, 1], "quadrants": dict.fromkeys(names, share)},
        "recommended_prefix": None,
    }
    plots.draw_probe(document, tmp_path / "probe.png")
    figure = pyplot.gcf()
    upper, lower, *_ = figure.axes
    assert upper.get_ylim()[1] < 0.1 < 10 < lower.get_ylim()[1]
    assert upper.get_shared_x_axes().joined(upper, lower)
    assert "None" not in figure.get_suptitle()
    assert recommendation_text(24) == "recommended: --prefix 24"
    assert "full rollouts" in recommendation_text("full")
    monkeypatch.undo()
    pyplot.close(figure)


# In a browser


@pytest.fixture(scope="module")
def browser():
    """Return a headless Chromium, or skip the tests."""
    playwright = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    with playwright.sync_playwright() as running:
        try:
            opened = running.chromium.launch(executable_path=program, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no browser: {str(error).splitlines()[0]}")
        yield opened
        opened.close()


@pytest.fixture(params=[(scheme, width) for scheme in SCHEMES for width in WIDTHS], ids=str)
def opened(request, browser, page):
    """Return the page in a window, and fail on an error in its console or a request."""
    scheme, width = request.param
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
    )
    window = context.new_page()
    found = []
    window.on("console", lambda message: found.append(message.text))
    window.on("pageerror", lambda error: found.append(str(error)))
    window.on("request", lambda request: found.append(request.url))
    window.goto(page.as_uri())
    yield window
    requested = [text for text in found if not text.startswith(("data:", page.as_uri()))]
    assert requested == []
    context.close()


@pytest.mark.long
def test_nothing_is_wider_than_the_window(opened):
    opened.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    wide, window = opened.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert wide <= window
    boxes = opened.evaluate(
        "[...document.querySelectorAll('img, svg, figure, .wide, .answer, p, h1, li')]"
        ".map(e => e.getBoundingClientRect()).map(b => [b.left, b.right])"
    )
    assert len(boxes) > 50
    assert min(left for left, _ in boxes) >= 0 and max(right for _, right in boxes) <= window


def luminance(color: str) -> float:
    """Return the relative luminance of a CSS color "rgb(r, g, b)", as WCAG defines it."""
    total = 0.0
    numbers = map(int, re.findall(r"\d+", color)[:3])
    for number, weight in zip(numbers, (0.2126, 0.7152, 0.0722), strict=True):
        part = number / 255
        linear = part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        total += weight * linear
    return total


def contrast(one: str, other: str) -> float:
    """Return the contrast ratio of two colors."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


# the colors of every element with a text of its own, and what is behind it
COLORS = """
[...document.querySelectorAll('body *')].filter(e => [...e.childNodes].some(
  n => n.nodeType == 3 && n.textContent.trim())).map(e => {
    const style = getComputedStyle(e);
    let behind = e;
    while (behind && ['rgba(0, 0, 0, 0)', 'transparent'].includes(
        getComputedStyle(behind).backgroundColor)) behind = behind.parentElement;
    const back = getComputedStyle(behind || document.body).backgroundColor;
    return [e.namespaceURI.includes('svg') ? style.fill : style.color, back, e.tagName];
}).filter(([color]) => color != 'none')
"""


@pytest.mark.long
def test_texts_and_lines_can_be_read(opened):
    colors = opened.evaluate(COLORS)
    assert len(colors) > 100
    for color, behind, tag in colors:
        assert contrast(color, behind) >= TEXT_CONTRAST, (color, behind, tag)
    back = opened.evaluate("getComputedStyle(document.body).backgroundColor")
    lines = opened.evaluate(
        "[...document.querySelectorAll('.series')].map(e => getComputedStyle(e).stroke)"
    )
    for color in lines:
        assert contrast(color, back) >= LINE_CONTRAST, color


@pytest.mark.long
def test_a_pointer_on_a_curve_shows_its_values(opened):
    panels = opened.locator("svg.curves")
    assert panels.count() == 5
    for i in range(panels.count()):
        strips = panels.nth(i).locator(".at")
        at = strips.nth(strips.count() // 2)
        tip = at.locator(".tip")
        assert not tip.is_visible()
        at.locator(".strip").hover(force=True)
        assert tip.is_visible()
        text = tip.text_content()
        assert re.match(r"step \d+", text) and "full" in text and "prefix" in text
        box, panel = tip.locator(".box").bounding_box(), panels.nth(i).bounding_box()
        assert box["x"] >= panel["x"] - 1
        assert box["x"] + box["width"] <= panel["x"] + panel["width"] + 1
