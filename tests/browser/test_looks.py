"""The playground by keyboard, on a phone, in light and in dark."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.opened_page import background, opened, written
from tests.browser.story_service import StoryService


def test_everything_can_be_done_by_keyboard(page: Page) -> None:
    def tab_to(name: str) -> None:
        for _ in range(20):
            page.keyboard.press("Tab")
            focused = page.locator(":focus")
            assert focused.evaluate("element => getComputedStyle(element).outlineStyle") != "none" or (
                focused.evaluate("element => getComputedStyle(element.nextElementSibling).outlineStyle") != "none"
            ), "what has the focus does not show it"
            if focused.evaluate(
                "element => element.ariaLabel || element.labels?.[0]?.innerText || element.innerText"
            ).startswith(name):
                return
        pytest.fail(f"Tab does not lead to {name}")

    tab_to("Write")  # the tab
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Search")).to_be_focused()
    tab_to("Dark theme")
    tab_to("What to look for")
    page.keyboard.type("fox")
    page.keyboard.press("Enter")
    expect(page.locator("#hits .neighbour")).to_have_count(3)
    tab_to("Use as prompt")
    page.keyboard.press("Enter")
    expect(page.get_by_label("Prompt")).to_be_focused()
    tab_to("On")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    tab_to("Temperature")
    tab_to("Write")
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text("Finished.")
    expect(page.locator(".completion")).to_have_count(2)
    expect(page.get_by_role("button", name="Write")).to_be_focused()
    tab_to("Neighbours of passage 1")
    page.keyboard.press("Enter")
    expect(page.locator("#neighbours-1")).to_be_focused()
    tab_to("Passage 1")
    page.keyboard.press("Enter")
    expect(page.locator("#passage-1")).to_be_focused()
    page.get_by_label("Prompt").focus()
    with page.expect_request("**/v1/completions"):
        page.keyboard.press("Control+Enter")


@pytest.mark.parametrize("mode", ["on", "compare"])
def test_a_phone_shows_everything_in_one_column(
    browser: Browser, address: str, service: StoryService, mode: str
) -> None:
    with opened(browser, address, viewport={"width": 360, "height": 800}, has_touch=True) as page:
        page.get_by_text("More settings").click()
        written(page, mode=mode)
        assert page.evaluate("() => document.documentElement.scrollWidth") == 360
        text, neighbours = page.locator("#results").bounding_box(), page.locator("#margin").bounding_box()
        assert text
        assert neighbours
        assert text["y"] + text["height"] <= neighbours["y"]
        page.locator("#passage-2 .words").tap()
        expect(page.locator("#neighbours-2")).to_be_in_viewport()
        page.get_by_role("tab", name="Search").click()
        page.get_by_label("What to look for").fill("fox " * 60)
        page.keyboard.press("Enter")
        expect(page.locator("#hits .neighbour")).to_have_count(3)
        assert page.evaluate("() => document.documentElement.scrollWidth") == 360


@pytest.mark.parametrize("system", ["light", "dark"])
def test_the_theme_is_the_systems_until_one_is_chosen(
    browser: Browser, address: str, service: StoryService, system: str
) -> None:
    with opened(browser, address, color_scheme=system) as page:
        body = page.locator("body")
        before = background(body)
        assert (brightness(before) < 100) == (system == "dark")
        page.get_by_role("button", name="Dark theme").click()
        after = background(body)
        assert (brightness(after) < 100) == (system == "light")
        page.reload()
        assert background(body) == after


def brightness(colour: str) -> float:
    return sum(float(number) for number in re.findall(r"[\d.]+", colour)[:3]) / 3


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out_from_its_ground_in_every_colour(
    browser: Browser, address: str, service: StoryService, theme: str
) -> None:
    """WCAG's contrast of 4.5, measured on the pixels that the browser would paint."""
    with opened(browser, address, color_scheme=theme) as page:
        written(page)
        for colour in range(8):
            ratios = page.evaluate(CONTRASTS, colour)
            assert len(ratios) == 5
            assert min(ratios.values()) >= 4.5, (colour, ratios)


CONTRASTS = """colour => {
  const passage = document.getElementById("passage-1");
  const lookup = document.getElementById("neighbours-1");
  passage.dataset.colour = lookup.dataset.colour = colour;
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
  const luminance = (...layers) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const layer of layers) { canvas.fillStyle = layer; canvas.fillRect(0, 0, 1, 1); }
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((value) => {
      const part = value / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const of = (element, property) => getComputedStyle(element)[property];
  const paper = of(document.body, "backgroundColor");
  const contrast = (text, ...grounds) => {
    const [low, high] = [luminance(...grounds, text), luminance(...grounds)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const mark = passage.querySelector("mark");
  mark.dataset.run = "long";
  const far = lookup.querySelector("mark");
  far.dataset.run = "long";
  const number = passage.querySelector(".number");
  return {
    passage: contrast(of(passage, "color"), paper, of(passage, "backgroundColor")),
    mark: contrast(of(mark, "color"), paper, of(passage, "backgroundColor"), of(mark, "backgroundColor")),
    number: contrast(of(number, "color"), paper, of(number, "backgroundColor")),
    found: contrast(of(lookup.querySelector(".found"), "color"), paper),
    shared: contrast(of(far, "color"), paper, of(far, "backgroundColor")),
  };
}"""
