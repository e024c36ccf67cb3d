"""The page by keyboard, by screen reader and on a narrow screen, as far as its HTML and its style sheet tell."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import pytest
from PIL import Image

from ptq_tdq.quantized_model import QuantizedModel
from ptq_tdq.report.data import report_data
from ptq_tdq.report.page import render_page
from ptq_tdq.report.survey import Subject, Survey

TEMPLATES = files("ptq_tdq.report").joinpath("templates")
VOID = {"meta", "input", "img", "br", "wbr", "link", "hr"}


@dataclass(eq=False)
class Element:
    """A part of the page."""

    tag: str
    attributes: dict[str, str]
    parent: Element | None = None
    children: list[Element | str] = field(default_factory=list)

    def all(self, *tags: str) -> Iterator[Element]:
        for child in self.children:
            if isinstance(child, Element):
                if not tags or child.tag in tags:
                    yield child
                yield from child.all(*tags)

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children).strip()

    @property
    def hidden(self) -> bool:
        return "hidden" in self.attributes or (self.parent is not None and self.parent.hidden)

    def inside(self, tag: str) -> bool:
        return self.parent is not None and (self.parent.tag == tag or self.parent.inside(tag))


class Builder(HTMLParser):
    """The tree of a page; every element must be closed."""

    def __init__(self) -> None:
        super().__init__()
        self.root = self.at = Element("", {})

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        made = Element(tag, {key: value or "" for key, value in attributes}, self.at)
        self.at.children.append(made)
        self.at = self.at if tag in VOID else made

    def handle_endtag(self, tag: str) -> None:
        assert self.at.tag == tag and self.at.parent is not None
        self.at = self.at.parent

    def handle_data(self, data: str) -> None:
        self.at.children.append(data)


@pytest.fixture(scope="module")
def page(quantized: QuantizedModel) -> Element:
    """A page of three artifacts, with pictures."""
    artifact = quantized.to_artifact()
    subjects = tuple(Subject(name, Path(name), artifact) for name in ("a", "b", "c"))
    pictures = {name: Image.new("RGB", (32, 32)) for name in ("full precision", "a", "b", "c")}
    builder = Builder()
    builder.feed(render_page(report_data(Survey(subjects, notices=("A notice.",))), pictures))
    assert builder.at is builder.root
    return builder.root


def test_headings_are_in_order_and_one_names_the_page(page: Element) -> None:
    levels = [int(heading.tag[1]) for heading in page.all("h1", "h2", "h3", "h4") if not heading.hidden]
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all(heading.text for heading in page.all("h1", "h2", "h3", "h4"))


def test_there_are_landmarks_and_a_way_past_the_header(page: Element) -> None:
    for tag in ("header", "nav", "main", "footer"):
        assert len(list(page.all(tag))) == 1
    (body,) = page.all("body")
    first = next(element for element in body.all("a", "button", "select", "input"))
    (main,) = page.all("main")
    assert first.attributes["href"] == f"#{main.attributes['id']}" and main.attributes["tabindex"] == "-1"
    (html,) = page.all("html")
    (title,) = page.all("title")
    assert html.attributes["lang"] == "en" and title.text


def test_links_lead_to_parts_of_the_page_whose_names_are_used_once(page: Element) -> None:
    names = [element.attributes["id"] for element in page.all() if "id" in element.attributes]
    assert len(names) == len(set(names))
    assert {link.attributes["href"][1:] for link in page.all("a")} <= set(names)


def test_every_control_has_a_name_and_none_jumps_the_queue(page: Element) -> None:
    for control in page.all("button", "select", "input"):
        named = control.attributes.get("aria-label") or (control.tag == "button" and control.text)
        assert named or control.inside("label"), control.attributes
    assert all(int(element.attributes.get("tabindex", 0)) <= 0 for element in page.all())
    assert not [element for element in page.all() if any(name.startswith("on") for name in element.attributes)]


def test_pictures_and_drawings_have_words(page: Element) -> None:
    images = list(page.all("img"))
    assert len(images) == 4 and all(image.attributes["alt"] for image in images)
    for drawing in page.all("canvas"):
        assert drawing.attributes.get("aria-label") or drawing.attributes.get("aria-hidden") == "true"


def test_tables_have_captions_and_headings(page: Element) -> None:
    tables = list(page.all("table"))
    assert len(tables) > 6
    for table in tables:
        captions, heads = list(table.all("caption")), list(table.all("th"))
        assert len(captions) == 1 and captions[0].text
        assert heads or table.attributes["id"] == "table"  # that one is drawn by the script
        assert all(head.attributes["scope"] in ("row", "col") for head in heads)


def test_what_the_script_draws_can_be_reached_by_keys() -> None:
    charts, script = (TEMPLATES.joinpath(name).read_text() for name in ("charts.js", "page.js"))
    assert 'role: "slider", tabindex: 0' in charts and "aria-valuetext" in charts
    assert 'scope: "col"' in script and "aria-expanded" in script and "aria-pressed" in script


COLORS = re.compile(r"--([a-z0-9-]+): (#[0-9a-f]{6})")


def luminance(color: str) -> float:
    """Relative luminance of sRGB (WCAG 2.2)."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_that_of_the_standard() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)  # the known example that just fails


@pytest.mark.parametrize("sheet", ["style.css", "dark.css"])
def test_text_stands_out_from_what_is_behind_it(sheet: str) -> None:
    """WCAG 2.2, level AA: 4.5 to 1 for text, 3 to 1 for lines and dots that mean something."""
    colors = dict(COLORS.findall(TEMPLATES.joinpath(sheet).read_text().split("}")[0]))
    for behind in ("bg", "surface", "soft"):
        for text in ("ink", "muted", "accent"):
            assert contrast(colors[text], colors[behind]) >= 4.5, (text, behind)
    for mark in ("good", "warn", "unknown", "learned", "best", "magnitude", "inputs", "accumulated"):
        assert contrast(colors[mark], colors["surface"]) >= 3, mark
    for mark in ("good", "warn", "unknown"):  # a sign in the page's colour on a dot of this one
        assert contrast(colors["surface"], colors[mark]) >= 4.5, mark


def test_nothing_is_wider_than_a_phone() -> None:
    """Boxes are as wide as there is room; what must not break has a box that scrolls."""
    sheet = TEMPLATES.joinpath("style.css").read_text()
    for rule in re.findall(r"[{;] *((?:min-)?width|grid-template-columns): *([^;}]+)", sheet):
        fixed = [int(size) for size in re.findall(r"(?<![\w(-])(\d+)px", re.sub(r"min\(100%, \d+px\)", "", rule[1]))]
        assert all(size <= 250 for size in fixed), rule
    plain = [TEMPLATES.joinpath(name).read_text() for name in ("page.html", "differences.html")]
    assert all(
        text.count('<table class="plain">')
        == text.count('<div class="scroll"><table class="plain">') + text.count("Files and their sizes")
        for text in plain
    )
    assert re.search(r"\.scroll \{[^}]*overflow-x: auto", sheet)
