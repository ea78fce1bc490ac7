"""What the playground does, in a real browser."""

from __future__ import annotations

import random
import re

import pytest
from playwright.sync_api import Browser, Page, expect

from retro_ray.generation.request import GenerationRequest
from retro_ray.generation.sampling import SamplingConfig
from retro_ray.serve.api import ApiSettings
from retro_ray.serve.keys import KeyRing, parse_keys
from tests.browser.opened_page import background, marks, write, written
from tests.browser.story_service import FIRST, FOX, HOSTILE, LEAD, MARKUP, OFF, SECOND, StoryService, served

KEY = "a-key-of-enough-letters"


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
    expect(fox.locator(".title")).to_have_attribute("title", f"Document {FOX.document_id}")
    expect(fox.locator(".source")).to_have_text(FOX.source)
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


def test_a_setting_out_of_range_is_shown_and_nothing_is_asked(page: Page, service: StoryService) -> None:
    page.get_by_text("More settings").click()
    page.get_by_label("Top p").fill("5")
    page.get_by_text("More settings").click()
    expect(page.get_by_label("Top p")).not_to_be_visible()
    write(page)
    expect(page.get_by_label("Top p")).to_be_focused()
    assert service.requests == []


def test_markup_in_documents_and_text_is_shown_and_not_run(page: Page) -> None:
    written(page, "hostile")
    shown = page.locator("#neighbours-1 .neighbour")
    expect(shown.locator(".title")).to_have_text(HOSTILE.title)
    expect(shown.locator(".source")).to_have_text(HOSTILE.source)
    expect(shown.locator(".title")).to_have_attribute("title", f"Document {HOSTILE.document_id}")
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
