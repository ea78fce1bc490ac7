"""The page as the tests use it."""

from __future__ import annotations

from playwright.sync_api import Browser, Locator, Page, expect

PATIENCE_MS = 60_000
"""A busy machine is no failure."""
NOT_ANSWERED = "Failed to load resource: "
"""How the browser itself notes a refusal or a failure in its console, which no page can prevent."""


class opened:
    """A new page, which fails at its end if anything went wrong in it or was asked of another host."""

    def __init__(self, browser: Browser, address: str, **options) -> None:
        self.context = browser.new_context(reduced_motion="reduce", **options)
        self.context.set_default_timeout(PATIENCE_MS)
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
