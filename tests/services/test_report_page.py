"""The report in Chromium: both widths, light and dark, without scripts, on paper, and with the keyboard."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_train.report.chart import LIGHT
from dist_train.report.page import write_report
from tests.launching import records
from tests.services.browser import Page, browser, needs_chromium, picture_folder
from tests.unit.report_study import make_run, make_study, treatments, write_status

WIDTHS = (1280, 390)
PAPER = 720
SUBJECTS = ("study", "run", "folder")

pytestmark = [pytest.mark.services, needs_chromium]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The reports of a study with a missing and a failed run, of one run, and of a folder of runs."""
    folder = tmp_path_factory.mktemp("report")
    study = make_study(folder / "study")
    shutil.rmtree(study / "lb-noise-amplitude-0.03-seed-2")
    write_status(study / "sb-seed-1", "failed", 300, "the loss is not finite at step 300")
    large = treatments()[6]
    make_run(folder / "run", large, 0, large.settings)
    for treatment in treatments()[4:6]:
        make_run(folder / "folder" / treatment.name, treatment, 0, treatment.settings)
    for name in SUBJECTS:
        write_report(folder / name, folder / f"{name}.html")
    return {name: folder / f"{name}.html" for name in SUBJECTS}


@pytest.fixture(scope="module")
def tab() -> Iterator[Page]:
    with browser() as page:
        yield page


@pytest.mark.parametrize(("width", "dark"), [(WIDTHS[0], False), (1100, False), (WIDTHS[1], True)])
@pytest.mark.parametrize("subject", SUBJECTS)
def test_page_fits_without_errors(
    pages: dict[str, Path], tab: Page, tmp_path: Path, subject: str, width: int, dark: bool
) -> None:
    tab.show(pages[subject], width=width, dark=dark)
    tab.save_picture(picture_folder(tmp_path) / f"report_{subject}_{width}_{'dark' if dark else 'light'}.png")
    assert tab.complaints == []
    assert [address for address in tab.requests if not address.startswith("data:")] == [pages[subject].as_uri()]
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate("document.querySelectorAll('svg .series .line').length") > 5
    background = tab.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (background == "rgb(20, 23, 26)") is dark


def test_text_and_lines_have_enough_contrast(pages: dict[str, Path], tab: Page) -> None:
    """WCAG requires 4.5 for text and 3 for lines."""
    for dark in (False, True):
        tab.show(pages["study"], width=1280, dark=dark)
        assert tab.evaluate(f"({CONTRAST})(['--ink', '--soft', '--link', '--good', '--warn', '--bad'])") >= 4.5
        colours = [f"--c{number}" for number in range(len(LIGHT))]
        assert tab.evaluate(f"({CONTRAST})({colours})") >= 3


CONTRAST = """names => {
  const channel = value => value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const light = colour => {
    const probe = document.createElement('canvas').getContext('2d');
    probe.fillStyle = colour;
    const parts = [1, 3, 5].map(at => channel(parseInt(probe.fillStyle.slice(at, at + 2), 16) / 255));
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const style = getComputedStyle(document.documentElement);
  const paper = light(style.getPropertyValue('--paper').trim());
  return Math.min(...names.map(name => {
    const other = light(style.getPropertyValue(name).trim());
    return (Math.max(paper, other) + 0.05) / (Math.min(paper, other) + 0.05);
  }));
}"""


def test_chart_shows_values_under_the_pointer(pages: dict[str, Path], tab: Page, tmp_path: Path) -> None:
    for width in WIDTHS:
        tab.show(pages["study"], width=width)
        tab.evaluate("document.querySelector('#curve-0-1-title').closest('svg').scrollIntoView({block: 'center'})")
        box = tab.evaluate(
            "(() => { const b = document.querySelector('#curve-0-1-title').closest('svg').getBoundingClientRect();"
            "return [b.left, b.top, b.width, b.height] })()"
        )
        tab.point_at(box[0] + 0.8 * box[2], box[1] + 0.5 * box[3])
        tooltip = tab.evaluate("document.querySelector('.tip:not([hidden])').innerText")
        assert tooltip.startswith("epoch 3")
        assert [line.split(" ")[0] for line in tooltip.splitlines()[1:]].count("noise,") == 3
        assert "baseline" in tooltip
        assert "± " in tooltip
        inside = "(() => { const t = document.querySelector('.tip:not([hidden])').getBoundingClientRect();"
        assert tab.evaluate(inside + "return t.left >= 0 && t.right <= innerWidth && t.height > 20 })()")
        tab.save_picture(picture_folder(tmp_path) / f"report_pointed_{width}.png", whole=False)
        assert tab.complaints == []


def test_scatter_names_the_run_under_the_pointer(pages: dict[str, Path], tab: Page) -> None:
    tab.show(pages["study"], width=1280)
    mark = "document.querySelector('#scatter-0-title').closest('svg').querySelector('.squares .mark')"
    tab.evaluate(f"{mark}.scrollIntoView({{block: 'center'}})")
    x, y = tab.evaluate(f"(b => [b.left + b.width / 2, b.top + b.height / 2])({mark}.getBoundingClientRect())")
    tab.point_at(x, y)
    tooltip = tab.evaluate("document.querySelector('.tip:not([hidden])').innerText")
    assert tooltip.strip().startswith("LB, baseline, seed ")


def test_arrow_keys_move_along_a_chart(pages: dict[str, Path], tab: Page) -> None:
    tab.show(pages["study"], width=1280)
    tab.evaluate("document.querySelector('#curve-0-0-title').closest('svg').focus()")
    seen = []
    for key in ("ArrowRight", "ArrowRight", "End", "ArrowLeft", "Home"):
        tab.press(key)
        seen.append(tab.evaluate("document.querySelector('.tip:not([hidden]) b').innerText"))
    assert seen == ["epoch 1", "epoch 2", "epoch 20", "epoch 19", "epoch 1"]
    tab.press("Escape")
    assert tab.evaluate("document.querySelector('.tip:not([hidden])') === null")


def test_chart_shows_the_replay_command_of_an_update(pages: dict[str, Path], tab: Page) -> None:
    tab.show(pages["run"], width=1280)
    tab.evaluate("document.querySelector('svg[data-kind=lines]').focus()")
    tab.press("End")
    tooltip = tab.evaluate("document.querySelector('.tip:not([hidden])').innerText")
    run = pages["run"].parent / "run"
    last = records(run, "train")[-1]["step"]
    assert tooltip.splitlines()[-1] == f"dist-train replay {run}@{last}"


@pytest.mark.parametrize("scripts", [True, False], ids=["scripts", "none"])
def test_series_can_be_hidden_also_without_scripts(pages: dict[str, Path], tab: Page, scripts: bool) -> None:
    tab.show(pages["study"], width=1280, scripts=scripts)
    drawn = "[...document.querySelectorAll('svg[data-kind=lines] .series.s1')]"
    shown = f"{drawn}.filter(s => getComputedStyle(s).display !== 'none').length"
    before = tab.evaluate(shown)
    box = "document.querySelector('section.figure input[value=s1]')"
    tab.evaluate(f"{box}.click()")
    assert before == 8
    assert tab.evaluate(shown) == 0
    assert tab.evaluate(shown.replace("s1", "s2")) == 8
    tab.evaluate(f"{box}.click()")
    assert tab.evaluate(shown) == before


def test_page_prints(pages: dict[str, Path], tab: Page, tmp_path: Path) -> None:
    tab.show(pages["study"], width=1280, dark=True)
    boxes = "[...document.querySelectorAll('.keys input')].filter(box => getComputedStyle(box).display !== 'none')"
    assert tab.evaluate(f"{boxes}.length") > 0
    path = picture_folder(tmp_path) / "report_study.pdf"
    tab.save_pdf(path)
    assert tab.width_on_paper() <= PAPER
    assert tab.evaluate(f"{boxes}.length") == 0
    content = path.read_bytes()
    assert content.startswith(b"%PDF")
    assert 3 <= content.count(b"/Type /Page\n") <= 18
    assert tab.complaints == []
