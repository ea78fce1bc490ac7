"""The page for people in a real browser, before the real HTTP face with a fixed story behind it."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from retro_ray.generation.request import GenerationRequest
from retro_ray.generation.sampling import SamplingConfig
from retro_ray.serve.api import ApiSettings
from retro_ray.serve.keys import KeyRing, parse_keys
from tests.e2e.playground_service import FIRST, FOX, HOSTILE, LEAD, MARKUP, OFF, SECOND, StoryService, served

CHROMIUM = shutil.which("chromium")
KEY = "a-key-of-enough-letters"
NOT_ANSWERED = "Failed to load resource: "
"""How the browser itself notes a refusal or a failure in its console, which no page can prevent."""

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no `chromium` here; `apt-get install chromium` lets these tests run"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Without its sandbox, which a container's root has not; it opens no page but ours.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def story() -> StoryService:
    return StoryService()


@pytest.fixture(scope="module")
def address(story: StoryService) -> Iterator[str]:
    with served(story) as address:
        yield address


@pytest.fixture
def service(story: StoryService) -> Iterator[StoryService]:
    story.requests.clear()
    story.searches.clear()
    yield story
    story.may_finish.set()


@pytest.fixture
def page(browser: Browser, address: str, service: StoryService) -> Iterator[Page]:
    with opened(browser, address) as page:
        yield page


class opened:
    """A new page, which fails at its end if anything went wrong in it or was asked of another host."""

    def __init__(self, browser: Browser, address: str, **options) -> None:
        self.context = browser.new_context(reduced_motion="reduce", **options)
        self.context.set_default_timeout(10_000)
        self.address = address
        self.problems: list[str] = []

    def __enter__(self) -> Page:
        page = self.context.new_page()
        # A violation of the page's policy is an error of the console, too.
        page.on("console", self._note_message)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("request", self._note_request)
        page.goto(self.address)
        expect(page.locator("#served")).not_to_be_empty()
        return page

    def __exit__(self, kind, *_details) -> None:
        self.context.close()
        assert kind is not None or self.problems == []

    def _note_message(self, message) -> None:
        if message.type in ("error", "warning") and not message.text.startswith(NOT_ANSWERED):
            self.problems.append(message.text)

    def _note_request(self, request) -> None:
        if not request.url.startswith(self.address):
            self.problems.append(f"asked for {request.url}")


def write(page: Page, prompt: str = "Tell me", *, mode: str = "on") -> None:
    page.get_by_label("Prompt").fill(prompt)
    page.locator(f"input[name=mode][value={mode}]").check(force=True)
    page.get_by_role("button", name="Write").click()


def written(page: Page, prompt: str = "Tell me", *, mode: str = "on") -> None:
    """Write, and wait until that is done."""
    write(page, prompt, mode=mode)
    expect(page.locator("#status")).to_have_text("Finished.")


def marks(locator: Locator) -> list[str]:
    return locator.locator("mark").all_text_contents()


def background(locator: Locator) -> str:
    return locator.evaluate("element => getComputedStyle(element).backgroundColor")


def test_text_streams_in_coloured_passages_beside_their_neighbours(page: Page, service: StoryService) -> None:
    service.may_finish.clear()
    write(page)
    # The first passage is there, with its neighbours, before the second is written.
    expect(page.locator("#passage-1 .words")).to_have_text(FIRST)
    expect(page.locator("#neighbours-1 .neighbour")).to_have_count(2)
    expect(page.locator("#status")).to_have_text("Writing passage 1 with 2 neighbours\u2026")
    expect(page.locator(".text")).to_have_attribute("aria-busy", "true")
    assert page.locator("#passage-2").count() == 0
    service.may_finish.set()
    expect(page.locator("#status")).to_have_text("Finished.")
    expect(page.locator(".text")).to_have_attribute("aria-busy", "false")
    expect(page.locator("#passage-2 .words")).to_have_text(SECOND)
    expect(page.locator(".text > .passage").first).to_have_text(LEAD)
    expect(page.locator(".summary")).to_contain_text("30 tokens")
    assert background(page.locator("#passage-1")) != background(page.locator("#passage-2"))


def test_a_neighbour_has_title_source_distance_text_and_continuation(page: Page) -> None:
    written(page)
    fox, dog = page.locator("#neighbours-1 .neighbour").all()
    expect(fox.locator(".title")).to_have_text(FOX.title)
    expect(fox.locator(".source")).to_have_text(f"{FOX.source} \u00b7 {FOX.document_id}")
    expect(fox.locator(".distance")).to_have_text("distance 0.25")
    expect(fox.locator(".found")).to_have_text(FOX.text.strip())
    expect(fox.locator(".continuation")).to_have_text(FOX.continuation)
    expect(dog.locator(".title")).to_have_text("fables/dog.txt")  # for want of a title
    expect(page.locator("#neighbours-1 .query")).to_have_text("what chunk 3 says")


def test_runs_of_shared_words_are_marked_on_both_sides(page: Page) -> None:
    written(page)
    # Three words and more, whatever the case and the punctuation; single words that both have are not.
    assert marks(page.locator("#passage-1 .words")) == ["the Quick, brown fox jumps"]
    assert marks(page.locator("#neighbours-1 .neighbour").first) == ["The quick brown fox jumps"]
    assert marks(page.locator("#passage-2 .words")) == ["a hungry fox saw grapes"]
    assert marks(page.locator("#neighbours-2 .neighbour").first) == ["A hungry fox saw grapes"]


def test_missing_shards_are_shown_where_they_were_missed(page: Page) -> None:
    written(page)
    expect(page.locator("#neighbours-2 .missing")).to_contain_text("Shards 3, 5 did not answer")
    assert page.locator("#neighbours-1 .missing").count() == 0


def test_a_passage_and_its_neighbours_point_at_each_other(page: Page) -> None:
    written(page)
    active = page.locator("[data-passage].active")
    page.locator("#passage-2 .words").hover()
    assert [one.get_attribute("id") for one in active.all()] == ["passage-2", "neighbours-2"]
    page.locator("#neighbours-1 .title").first.hover()
    assert [one.get_attribute("id") for one in active.all()] == ["passage-1", "neighbours-1"]
    page.locator("h1").hover()
    expect(active).to_have_count(0)
    page.get_by_role("link", name="Neighbours of passage 2").focus()
    expect(page.locator("#neighbours-2")).to_have_class(re.compile("active"))
    page.keyboard.press("Enter")
    expect(page.locator("#neighbours-2")).to_be_focused()
    expect(page.locator("#neighbours-2")).to_be_in_viewport()


def test_on_and_off_are_compared_on_the_same_seed(page: Page, service: StoryService) -> None:
    written(page, mode="compare")
    on, off = page.locator(".completion").all()
    expect(on.locator("h2")).to_have_text("Retrieval on")
    expect(on.locator(".text")).to_contain_text(SECOND)
    expect(off.locator("h2")).to_have_text("Retrieval off")
    expect(off.locator(".text")).to_have_text(f"Tell me{OFF}")
    assert off.locator("[data-passage]").count() == 0
    box, other = on.bounding_box(), off.bounding_box()
    assert box
    assert other
    assert box["y"] == other["y"]
    assert box["x"] + box["width"] <= other["x"]
    first, second = service.requests
    assert {first.retrieval, second.retrieval} == {True, False}
    assert first.sampling.seed is not None
    assert first.sampling == second.sampling


def test_every_setting_reaches_the_service(page: Page, service: StoryService) -> None:
    page.get_by_text("More settings").click()
    page.get_by_label("Tokens").fill("77")
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Neighbours per chunk").fill("5")
    page.get_by_label("Seed").fill("42")
    page.get_by_label("Top p").fill("0.9")
    page.get_by_label("Top k").fill("7")
    page.get_by_label("Min p").fill("0.05")
    page.get_by_label("Repetition penalty").fill("1.2")
    page.get_by_label("Stop before").fill(r"\n\n|END")
    page.get_by_label("Order of neighbours").select_option("overlap")
    written(page, "a prompt")
    assert service.requests == [
        GenerationRequest(
            prompt="a prompt",
            max_tokens=77,
            sampling=SamplingConfig(temperature=0.5, top_p=0.9, top_k=7, min_p=0.05, repetition_penalty=1.2, seed=42),
            stop=("\n\n", "END"),
            num_neighbours=5,
            rerank="overlap",
            deadline_s=600.0,
        )
    ]


def test_what_is_left_empty_is_left_to_the_service(page: Page, service: StoryService) -> None:
    written(page, mode="off")
    (request,) = service.requests
    assert request.sampling == SamplingConfig(temperature=0.7, seed=request.sampling.seed)
    assert (request.retrieval, request.num_neighbours, request.rerank, request.stop) == (False, None, None, ())
    expect(page.locator("#margin")).to_have_text("Retrieval is off: the model writes by itself.")


def test_markup_in_documents_and_text_is_shown_and_not_run(page: Page) -> None:
    written(page, "hostile")
    shown = page.locator("#neighbours-1 .neighbour")
    expect(shown.locator(".title")).to_have_text(HOSTILE.title)
    expect(shown.locator(".source")).to_have_text(f"{HOSTILE.source} \u00b7 {HOSTILE.document_id}")
    expect(shown.locator(".found")).to_have_text(HOSTILE.text)
    expect(shown.locator(".continuation")).to_have_text(HOSTILE.continuation)
    expect(page.locator("#passage-1 .words")).to_have_text(MARKUP)
    page.get_by_role("tab", name="Search").click()
    page.get_by_label("What to look for").fill(MARKUP)
    page.keyboard.press("Enter")
    expect(page.locator("#hits .title").last).to_have_text(HOSTILE.title)
    assert page.locator("main :is(script, img, b, [onerror], [href^=javascript])").count() == 0
    assert page.evaluate("() => window.hacked") is None


def test_the_search_shows_what_the_database_holds(page: Page, service: StoryService) -> None:
    page.get_by_role("tab", name="Search").click()
    page.get_by_label("What to look for").fill("quick grapes and a dog")
    page.get_by_label("Results").fill("3")
    page.keyboard.press("Enter")
    hits = page.locator("#hits .neighbour")
    expect(hits).to_have_count(3)
    assert service.searches == [(["quick grapes and a dog"], 3)]
    expect(page.locator("#search-status")).to_contain_text("3 chunks")
    expect(page.locator("#search-status")).to_contain_text("Shard 4 did not answer")
    expect(hits.first.locator(".distance")).to_have_text("distance 0.25")
    # One shared word is enough here, if it is longer than "a" and "dog".
    assert marks(hits.first) == ["grapes", "quick"]
    hits.first.get_by_role("button", name="Use as prompt").click()
    expect(page.get_by_label("Prompt")).to_have_value(FOX.text)
    expect(page.get_by_label("Prompt")).to_be_focused()


def test_errors_are_shown_as_the_service_words_them(page: Page) -> None:
    page.get_by_label("Tokens").fill("2000")
    write(page)
    expect(page.get_by_role("alert")).to_have_text("max_tokens is 2000; the limit is 1000")
    page.get_by_label("Tokens").fill("20")
    write(page, "break off")
    expect(page.get_by_role("alert")).to_have_text("shard 2 did not answer in 2.0 s; raise timeout_s")
    expect(page.locator("#passage-1 .words")).to_have_text(FIRST)  # what had come stays
    written(page)
    expect(page.get_by_role("alert")).to_have_count(0)
    page.route("**/v1/completions", lambda route: route.abort())
    write(page)
    expect(page.get_by_role("alert")).to_have_text("The service does not answer. Is it still running?")


def test_a_search_that_fails_says_why(page: Page) -> None:
    page.route("**/v1/retrieve", lambda route: route.fulfill(status=429, headers={"Retry-After": "7"}, body="no"))
    page.get_by_role("tab", name="Search").click()
    page.get_by_label("What to look for").fill("anything")
    page.keyboard.press("Enter")
    alert = page.get_by_role("alert")
    expect(alert).to_have_text("The service answered 429 Too Many Requests. (Try again in 7 s.)")


def test_an_answer_without_its_end_is_called_broken_off(page: Page) -> None:
    event = 'data: {"choices": [{"text": "half a", "citations": []}]}\r\n\r\n'
    page.route("**/v1/completions", lambda route: route.fulfill(content_type="text/event-stream", body=event))
    write(page)
    expect(page.get_by_role("alert")).to_have_text("The answer broke off: the connection ended before the text did.")
    expect(page.locator(".text")).to_have_text("Tell mehalf a")


@pytest.mark.parametrize("way", ["button", "escape"])
def test_stopping_ends_the_work_of_the_service(page: Page, service: StoryService, way: str) -> None:
    service.may_finish.clear()
    write(page)
    expect(page.locator("#passage-1 .words")).to_have_text(FIRST)
    assert service.num_open == 1
    if way == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    expect(page.locator("#status")).to_have_text("Stopped.")
    expect(page.locator("#passage-1 .words")).to_have_text(FIRST)
    expect(page.get_by_role("button", name="Write")).to_be_visible()
    while service.num_open:  # the test's own timeout ends it
        page.wait_for_timeout(10)


def test_a_key_is_asked_for_where_one_is_needed(browser: Browser) -> None:
    settings = ApiSettings(keys=KeyRing(parse_keys(KEY, "here")))
    with served(StoryService(), settings) as address:
        context = browser.new_context()
        page = context.new_page()
        page.goto(address)
        expect(page.get_by_role("alert")).to_contain_text("a valid API key is needed")
        expect(page.get_by_label("API key")).to_be_focused()
        page.keyboard.type(KEY)
        page.keyboard.press("Tab")
        expect(page.locator("#served")).to_have_text("story \u00b7 step 12 \u00b7 database 01234567")
        expect(page.get_by_role("alert")).to_have_count(0)
        written(page)
        assert KEY not in page.url
        context.close()


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
def test_a_phone_shows_everything_in_one_column(browser: Browser, address: str, service: StoryService, mode) -> None:
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
def test_the_theme_is_the_systems_until_one_is_chosen(browser: Browser, address: str, service, system) -> None:
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
def test_text_stands_out_from_its_ground_in_every_colour(browser: Browser, address: str, service, theme) -> None:
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


def test_an_address_brings_the_form_back_and_starts_nothing(page: Page, address: str, service: StoryService) -> None:
    page.get_by_label("Tokens").fill("55")
    written(page, "a & b # c\n\u00e9", mode="compare")
    kept = page.url
    assert len(service.requests) == 2
    page.goto("about:blank")
    page.goto(kept)
    expect(page.locator("#served")).not_to_be_empty()
    expect(page.get_by_label("Prompt")).to_have_value("a & b # c\n\u00e9")
    expect(page.get_by_label("Tokens")).to_have_value("55")
    expect(page.locator("input[value=compare]")).to_be_checked()
    assert len(service.requests) == 2


def test_shared_runs_are_those_that_a_plain_search_finds(page: Page) -> None:
    """For each word: the longest run around it that occurs in the other text, by trying all of them."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices(["one", "two", "three"], k=rng.randrange(12))) for _ in range(300)]
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    found = page.evaluate(
        """async pairs => {
          const {sharedRuns} = await import("/playground/overlap.js");
          return pairs.map(([text, other]) => sharedRuns(text, [other]));
        }""",
        pairs,
    )
    assert [covered(text, runs) for (text, _), runs in zip(pairs, found, strict=True)] == [
        longest_runs(text.split(), other.split()) for text, other in pairs
    ]
    assert any(run["length"] > 5 for runs in found for run in runs)


def covered(text: str, runs: list[dict]) -> list[int]:
    """The length of the run that each word of `text` is in; 0: none."""
    starts = [match.start() for match in re.finditer(r"\S+", text)]
    return [next((run["length"] for run in runs if run["start"] <= start < run["end"]), 0) for start in starts]


def longest_runs(words: list[str], other: list[str], fewest: int = 3) -> list[int]:
    inside = {tuple(other[i:j]) for i in range(len(other)) for j in range(i + fewest, len(other) + 1)}
    lengths = [0] * len(words)
    for i in range(len(words)):
        for j in range(i + fewest, len(words) + 1):
            if tuple(words[i:j]) in inside:
                lengths[i:j] = [max(length, j - i) for length in lengths[i:j]]
    return lengths
