"""The gallery in a real browser: Chromium, driven by Playwright. Both are optional."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imagevec.errors import IMAGE_ERROR_CODES
from imagevec.search.gallery import write_gallery
from imagevec.search.neighbours import nearest
from tests.helpers.tables import HOSTILE, write_images, write_table
from tests.search.test_gallery import write_groups

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("chromium is not installed", allow_module_level=True)

COUNT = 40
GONE = 7
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    made = np.random.default_rng(0).normal(size=(COUNT, 6)).astype(np.float32)
    made[20] = made[21]  # near-duplicates
    return made


@pytest.fixture(scope="module")
def gallery(vectors: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of 40 images in two folders; the last one has a hostile name, number 7 is gone."""
    folder = tmp_path_factory.mktemp("gallery")
    names = [f"{'ab'[number % 2]}/{number:02}.png" for number in range(COUNT - 1)]
    names = sorted(names) + ["z/" + HOSTILE]
    paths = write_images(folder / "photos", names)
    (folder / "photos" / names[GONE]).unlink()
    write_table(folder / "features", dict(zip(paths, vectors.tolist(), strict=True)))
    assert write_gallery(folder / "features", folder / "gallery.html") == COUNT
    return folder / "gallery.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Any, gallery: Path) -> Iterator[Any]:
    """Opens the gallery in a window of its own; fails where the page errs or asks the network."""
    contexts: list[Any] = []
    problems: list[str] = []

    def note_request(request: Any) -> None:
        if not request.url.startswith(("file:", "data:")):
            problems.append(f"request to {request.url}")

    def note_message(message: Any) -> None:
        if message.type in ("error", "warning"):
            problems.append(message.text)

    def opened(**options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 800}, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("request", note_request)
        page.on("console", note_message)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: problems.append("a dialog"))
        page.goto(gallery.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture
def page(open_page: Any) -> Any:
    return open_page()


def shown_neighbours(page: Any) -> list[int]:
    tiles = page.locator("#neighbours button")
    return [int(tile.get_attribute("data-index")) for tile in tiles.all()]


def expect_picked(page: Any, vectors: np.ndarray, index: int) -> None:
    """The page shows this image, with the right neighbours in the right order."""
    current = page.locator('#all button[aria-current="true"]')
    sync_api.expect(current).to_have_attribute("data-index", str(index))
    order, cosines = nearest(vectors[index : index + 1], vectors, COUNT)
    others = [(o, c) for o, c in zip(order[0], cosines[0], strict=True) if o != index][:12]
    assert shown_neighbours(page) == [other for other, _ in others]
    captions = page.locator("#neighbours .caption").all_inner_texts()
    assert all(caption.startswith("cosine ") for caption in captions)
    texts = page.locator("#neighbours .cosine").all_inner_texts()
    np.testing.assert_allclose([float(text) for text in texts], [c for _, c in others], atol=6e-4)


def focused_index(page: Any) -> int | None:
    index = page.evaluate("document.activeElement.dataset.index ?? null")
    return None if index is None else int(index)


def columns(page: Any) -> int:
    tops = page.locator("#all button").evaluate_all(
        "all => all.map(b => b.getBoundingClientRect().top)"
    )
    return tops.count(tops[0])


def test_it_opens_with_all_images(page, vectors):
    sync_api.expect(page.locator("#all button")).to_have_count(COUNT)
    sync_api.expect(page.locator("#summary")).to_have_text("40 images")
    expect_picked(page, vectors, 0)
    loaded = page.locator("#all img").evaluate_all(
        "all => all.map(i => i.complete && i.naturalWidth > 0)"
    )
    assert loaded == [True] * (COUNT - 1)
    assert page.locator('#all [role="img"]').count() == 1


def test_a_click_shows_the_neighbours_in_order(page, vectors):
    page.locator("#all button").nth(5).click()
    expect_picked(page, vectors, 5)
    first = shown_neighbours(page)[0]
    page.locator("#neighbours button").first.click()
    expect_picked(page, vectors, first)
    page.go_back()
    expect_picked(page, vectors, 5)


def test_the_address_keeps_the_pick(page, vectors):
    page.locator("#all button").nth(11).click()
    expect_picked(page, vectors, 11)
    page.reload()
    expect_picked(page, vectors, 11)


def test_near_duplicates_are_a_group(page, vectors):
    tiles = page.locator("#groups > li").first.locator("button")
    assert [tile.get_attribute("data-index") for tile in tiles.all()] == ["20", "21"]
    tiles.nth(1).click()
    expect_picked(page, vectors, 21)
    assert shown_neighbours(page)[0] == 20


def test_the_note_on_groups_of_the_page(page):
    note = page.locator("#duplicates-note")
    sync_api.expect(note).to_have_text("1 group, linked by cosines of 0.95 or more")


@pytest.mark.parametrize(
    ("groups", "metadata", "count", "note"),
    [
        (
            [[3, 4, 5], [8, 9]],
            {"min_cosine": 0.9},
            2,
            "2 groups in the whole table, linked by cosines of 0.9 or more",
        ),
        ([[3, 4]], None, 1, "1 group in the whole table"),
        ([[3, 4], [COUNT, COUNT + 1]], None, 1, "1 of 2 groups in the whole table"),
        ([], {"min_cosine": 0.9}, 0, "no groups in the whole table"),
    ],
)
def test_groups_of_the_whole_table(open_page, gallery, tmp_path, groups, metadata, count, note):
    names = [f"file:/x/{number:02}.png" for number in range(COUNT + 2)]
    write_table(tmp_path / "features", {name: [1.0, 2.0] for name in names[:COUNT]})
    named = [[names[index] for index in group] for group in groups]
    write_groups(tmp_path / "groups", named, metadata)
    write_gallery(tmp_path / "features", tmp_path / "gallery.html", groups=tmp_path / "groups")
    page = open_page()
    page.goto((tmp_path / "gallery.html").as_uri())
    sync_api.expect(page.locator("#duplicates-note")).to_have_text(note)
    found = [
        [int(tile.get_attribute("data-index")) for tile in row.locator("button").all()]
        for row in page.locator("#groups > li").all()
    ]
    assert found == groups[:count]


def test_a_click_on_the_map_picks(page, vectors):
    x, y = page.evaluate("centre(13)")
    nearest_index = page.evaluate("([x, y]) => indexAt({offsetX: x, offsetY: y})", [x, y])
    page.locator("#canvas").click(position={"x": x, "y": y})
    assert nearest_index == 13
    expect_picked(page, vectors, 13)


def test_the_map_is_drawn(page):
    page.wait_for_function(
        """() => {
          const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
          const colours = new Set(new Uint32Array(data.buffer));
          return colours.size > 1000;
        }"""
    )


def test_arrow_keys_move_and_enter_picks(page, vectors):
    wide = columns(page)
    assert wide > 2
    page.keyboard.press("ArrowRight")
    assert focused_index(page) == 1
    page.keyboard.press("ArrowDown")
    assert focused_index(page) == 1 + wide
    page.keyboard.press("ArrowLeft")
    assert focused_index(page) == wide
    page.keyboard.press("ArrowUp")
    assert focused_index(page) == 0
    page.keyboard.press("ArrowUp")
    assert focused_index(page) == 0
    page.keyboard.press("End")
    assert focused_index(page) == COUNT - 1
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect_picked(page, vectors, 1)
    assert focused_index(page) == 1


def test_focus_is_visible_and_stays_in_the_list_of_neighbours(page, vectors):
    page.keyboard.press("/")
    page.keyboard.press("Tab")
    first = shown_neighbours(page)[0]
    assert focused_index(page) == first
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("Enter")
    expect_picked(page, vectors, first)
    assert focused_index(page) == shown_neighbours(page)[0]


def test_each_part_has_one_tab_stop(page):
    for part in ("#neighbours", "#all", "#groups"):
        assert page.locator(f'{part} button[tabindex="0"]').count() == 1


def test_the_filter_leaves_what_matches(page):
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "filter"
    page.keyboard.type("B/ PNG")
    visible = page.locator("#all li:visible")
    sync_api.expect(visible).to_have_count(19)
    sync_api.expect(page.locator("#shown")).to_have_text("19 of 40")
    page.keyboard.press("Escape")
    assert focused_index(page) == 20  # the first of folder b
    assert page.locator("#filter").input_value() == "B/ PNG"
    page.keyboard.press("ArrowRight")
    assert focused_index(page) == 21
    page.locator("#filter").fill("no such path")
    sync_api.expect(page.locator("#shown")).to_have_text("no path matches")
    sync_api.expect(visible).to_have_count(0)
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement === document.body")


def test_enter_in_the_filter_goes_to_the_first_match(page, vectors):
    page.keyboard.press("/")
    page.keyboard.type("b/")
    page.keyboard.press("Enter")
    assert focused_index(page) == 20
    page.keyboard.press("Enter")
    expect_picked(page, vectors, 20)


def test_a_missing_file_says_so(page):
    gone = page.locator("#all button").nth(GONE)
    name = gone.get_attribute("title")
    sync_api.expect(gone.locator(".gone")).to_have_attribute(
        "aria-label", f"{name}: {IMAGE_ERROR_CODES['unreadable_path']}"
    )
    gone.click()
    sync_api.expect(page.locator("#picked-size")).to_have_text(IMAGE_ERROR_CODES["unreadable_path"])


def test_pictures_have_texts_and_the_page_has_headings(page):
    alts = page.locator("img").evaluate_all("all => all.map(image => image.alt)")
    assert all(alts)
    for heading in ("Nearest neighbours", "Images", "Map", "Near-duplicates"):
        sync_api.expect(page.get_by_role("heading", name=heading)).to_be_visible()
    assert page.locator("html").get_attribute("lang") == "en"
    sync_api.expect(page.get_by_role("searchbox", name="Filter by path")).to_be_visible()
    sync_api.expect(page.get_by_role("img", name="Map of 40 images")).to_be_visible()


def test_a_hostile_name_does_nothing(page, vectors):
    page.locator("#all button").last.click()
    expect_picked(page, vectors, COUNT - 1)
    assert page.locator("#picked-name").text_content() == "z/" + HOSTILE
    assert "– Gallery" in page.title()
    assert page.evaluate("document.querySelectorAll('[onerror]').length") == 0
    assert page.evaluate("document.images.length > 39")
    assert not page.title().startswith("harm")


@pytest.mark.parametrize("width", [320, 390, 768, 1000, 1200, 1920])
def test_nothing_is_wider_than_the_window(open_page, width):
    page = open_page(viewport={"width": width, "height": 844})
    page.locator("#all button").last.click()  # with the longest name
    sync_api.expect(page.locator("#picked-name")).to_contain_text("script")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for part in ("#picked", "#images", "#map", "#duplicates"):
        inner, outer = page.locator(part).evaluate("s => [s.scrollWidth, s.clientWidth]")
        assert inner <= outer, part


def test_names_on_a_phone_break_after_separators(open_page, tmp_path):
    names = ["shoes/IMG_20230714_123456_portrait_of_a_shoe.jpg", "b-2/c.png"]
    paths = write_images(tmp_path / "photos", names)
    write_table(tmp_path / "t", dict(zip(paths, [[1.0, 2.0], [2.0, 1.0]], strict=True)))
    write_gallery(tmp_path / "t", tmp_path / "g.html")
    page = open_page(viewport=PHONE)
    page.goto((tmp_path / "g.html").as_uri())
    lines_of_words = """name => [...name.childNodes].filter(node => node.data).map(word => {
      const range = document.createRange();
      range.selectNode(word);
      return range.getClientRects().length;
    })"""
    caption = page.locator("#neighbours .name")
    assert caption.inner_text().replace("\n", "") == names[0]
    assert caption.evaluate(lines_of_words) == [1] * 8
    page.locator("#neighbours button").click()
    sync_api.expect(page.locator("#picked-name")).to_have_text(names[0])
    assert page.locator("#picked-name").evaluate(lines_of_words) == [1] * 8


def test_a_touch_on_a_phone_picks_and_shows_the_pick(open_page, vectors):
    page = open_page(viewport=PHONE, has_touch=True, is_mobile=True, reduced_motion="reduce")
    page.locator("#all button").nth(30).tap()
    expect_picked(page, vectors, 30)
    sync_api.expect(page.locator("#picked-name")).to_be_in_viewport()
    sizes = page.locator("#all button").evaluate_all(
        "all => all.map(b => Math.min(b.clientWidth, b.clientHeight))"
    )
    assert min(sizes) >= 44


def test_dark_and_light_differ(open_page):
    colours = {
        scheme: open_page(color_scheme=scheme).evaluate(
            "getComputedStyle(document.body).backgroundColor"
        )
        for scheme in ("light", "dark")
    }
    assert colours["light"] != colours["dark"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(open_page, scheme):
    """WCAG 2.2, success criterion 1.4.3: at least 4.5 to 1."""
    page = open_page(color_scheme=scheme)
    style = "getComputedStyle(document.documentElement)"
    colours = {
        name: page.evaluate(f"{style}.getPropertyValue('--{name}').trim()")
        for name in ("paper", "card", "well", "ink", "faint", "accent")
    }
    for text, ground in [
        ("ink", "paper"),
        ("faint", "paper"),
        ("faint", "card"),
        ("faint", "well"),
    ]:
        assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    assert contrast(colours["accent"], colours["paper"]) >= 3  # of the outline


def contrast(one: str, other: str) -> float:
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(colour: str) -> float:
    """Relative luminance of ``#rrggbb``, WCAG 2.2."""
    channels = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])
