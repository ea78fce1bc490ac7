"""A browser, and the page in it, before the real HTTP face with a fixed story behind it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.browser.opened_page import PATIENCE_MS, opened
from tests.browser.story_service import StoryService, served


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no `chromium` here; `apt-get install chromium` lets the playground be tested")
    with sync_playwright() as playwright:
        # Without its sandbox, which a container's root has not; it opens no page but ours.
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        expect.set_options(timeout=PATIENCE_MS)
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def story() -> StoryService:
    return StoryService()


@pytest.fixture(scope="package")
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
