"""A real browser with the page in it, as tests drive it.

`python -m tests.browser docs` renews the screenshots, `web_light.png` and `web_dark.png`.
"""

import base64
import contextlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from selenium import webdriver
from selenium.common import exceptions

from tests.commands import SECONDS
from tests.paths import CIRCLES, PICTURES
from tests.serving_helpers import CAPTION, open_door, wait_until


INTERRUPTIONS = (
    exceptions.StaleElementReferenceException,
    exceptions.ElementNotInteractableException,
    exceptions.ElementClickInterceptedException,
    IndexError,  # nothing has been found yet
    StopIteration,  # nothing that is looked for has been found yet
)
REMOVE = "#picture button[aria-label='Remove Image']"
# Keeps every text that the latest answer shows, and counts what a page may not contain.
RECORD_ANSWERS = """
    window.seen = [];
    new MutationObserver(() => {
        const texts = [...document.querySelectorAll('#chat [data-testid=bot]')].map(each => each.innerText.trim());
        if (texts.length && texts.at(-1) != window.seen.at(-1)) window.seen.push(texts.at(-1));
    }).observe(document.querySelector('#chat'), {subtree: true, childList: true, characterData: true});
"""


def patiently(act: Callable[[], Any]) -> Any:
    """Do what a page may interrupt for a moment, by drawing the element that it is done to anew; return the result."""
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            return act()
        except INTERRUPTIONS:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


class Tab:
    """A tab of the browser with the demo's page in it."""

    def __init__(self, browser, url: str, language: str = "zh-CN"):
        browser.switch_to.new_window("tab")
        self.browser, self.handle = browser, browser.current_window_handle
        browser.execute_cdp_cmd("Network.setUserAgentOverride", {"userAgent": "test", "acceptLanguage": language})
        browser.get(url)
        wait_until(lambda: self.find("#question textarea") and self.find("#picture input[type=file]"))
        browser.execute_script(RECORD_ANSWERS)

    def find(self, selector: str) -> list:
        return self.browser.find_elements("css selector", selector)

    def focus(self) -> None:
        self.browser.switch_to.window(self.handle)

    def close(self) -> None:
        """Leave the page, with nothing left in the browser for the next test, and close the tab."""
        self.focus()
        origin = self.browser.execute_script("return window.origin")
        self.browser.get("about:blank")
        self.browser.execute_cdp_cmd("Storage.clearDataForOrigin", {"origin": origin, "storageTypes": "local_storage"})
        self.browser.close()
        self.browser.switch_to.window(self.browser.window_handles[0])

    def upload(self, path: Path) -> None:
        self.remove_picture()
        patiently(lambda: self.find("#picture input[type=file]")[0].send_keys(str(path)))

    def remove_picture(self) -> None:
        if self.find(REMOVE):
            self.click_first(REMOVE)
        wait_until(lambda: self.find("#picture input[type=file]"))

    def ask(self, question: str) -> None:
        patiently(lambda: self.find("#question textarea")[0].send_keys(question + "\ue007"))  # the Enter key

    def click(self, name: str) -> None:
        self.click_first(f"#{name}")

    def click_first(self, selector: str, which=lambda element: True) -> None:
        patiently(lambda: next(filter(which, self.find(selector))).click())

    def allow_clipboard(self) -> None:
        origin = self.browser.execute_script("return window.origin")
        permissions = {"origin": origin, "permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
        self.browser.execute_cdp_cmd("Browser.grantPermissions", permissions)
        self.browser.execute_cdp_cmd("Emulation.setFocusEmulationEnabled", {"enabled": True})

    def copy(self, path: Path) -> None:
        """Put a PNG into the clipboard, as another program does."""
        self.allow_clipboard()
        script = """
            const [data, done] = arguments;
            fetch("data:image/png;base64," + data).then(response => response.blob())
                .then(blob => navigator.clipboard.write([new ClipboardItem({"image/png": blob})]))
                .then(() => done(null), error => done(String(error)));
        """
        error = self.browser.execute_async_script(script, base64.b64encode(path.read_bytes()).decode())
        assert error is None, error

    def click_example(self, path: Path) -> None:
        patiently(lambda: self.find("button.gallery-item")[PICTURES.index(path)].click())

    def click_labelled(self, text: str) -> None:
        self.click_first("#picture button", lambda button: text in (button.text, button.get_attribute("aria-label")))

    @property
    def messages(self) -> list[str]:
        bubbles = "document.querySelectorAll('#chat :is([data-testid=user], [data-testid=bot])')"
        script = f"return [...{bubbles}].map(each => each.innerText.trim())"
        return self.browser.execute_script(script)

    @property
    def seen(self) -> list[str]:
        """All that the answers have shown, in its order."""
        return self.browser.execute_script("return window.seen")

    @property
    def question(self) -> str:
        return patiently(lambda: self.find("#question textarea")[0].get_attribute("value"))

    @property
    def warnings(self) -> str:
        return patiently(lambda: " ".join(each.text for each in self.find("[data-testid=toast-body]")))

    def wait_for(self, *messages: str) -> None:
        """Wait until the chat has as many messages, each with the text, at least for a moment."""
        found: list[str] = []

        def is_there() -> bool:
            found[:] = self.messages
            return len(found) == len(messages) and all(text in each for text, each in zip(messages, found, strict=True))

        with contextlib.suppress(AssertionError):  # the comparison below says more
            wait_until(is_there)
        assert len(found) == len(messages), found
        assert all(text in each for text, each in zip(messages, found, strict=True)), found


def change_of_picture(config: dict) -> int:
    """The number of the event that a new picture makes, in what gradio tells a browser of a page."""
    [picture] = [each["id"] for each in config["components"] if each["props"].get("elem_id") == "picture"]
    [number] = [each["id"] for each in config["dependencies"] if [picture, "change"] in each["targets"]]
    return number


@contextlib.contextmanager
def start_browser(*more_options: str) -> Iterator[webdriver.Chrome]:
    """Chromium with an empty profile, a webcam and no window."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for option in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "use-fake-device-for-media-stream",  # a webcam with a green picture
        "use-fake-ui-for-media-stream",
        "window-size=1280,1080",
        *more_options,
    ):
        options.add_argument(f"--{option}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options.add_argument(f"--user-data-dir={profile}")
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            yield driver
        finally:
            driver.quit()


# What is asked about `CIRCLES` for a screenshot, and what must be in the answer: theme -> language and turns.
SHOWN = {
    "light": (
        "zh-CN",
        [("描述这张图片。", CAPTION), ("图片的背景是什么？", "草地"), ("What colour are the shapes?", "Red.")],
    ),
    "dark": (
        "en",
        [
            ("Describe the image.", "red circles"),
            ("What colour are the shapes?", "Red."),
            ("图片的背景是什么？", "草地"),
        ],
    ),
}


def take_screenshots(folder: Path) -> None:
    """Conversations about an example, whose answers are checked; fonts for Chinese must be installed."""
    with open_door(script="web_demo_hf.py") as (url, _, _), start_browser("hide-scrollbars") as browser:
        for theme, (language, turns) in SHOWN.items():
            tab = Tab(browser, f"{url}/?__theme={theme}", language)
            temperature = patiently(lambda tab=tab: tab.find("#temperature input[type=number]")[0])
            temperature.clear()
            temperature.send_keys("0\ue004")  # the Tab key; no chance: the same pictures each time
            tab.click_example(CIRCLES)
            for number in range(len(turns)):
                if number:
                    tab.ask(turns[number][0])
                    wait_until(lambda tab=tab: not tab.question or tab.ask(""))  # Enter does nothing while it answers
                tab.wait_for(*(text for turn in turns[: number + 1] for text in turn))
            wait_until(lambda tab=tab: tab.question == "")
            path = folder / f"web_{theme}.png"
            browser.save_screenshot(str(path))
            Image.open(path).quantize(256).save(path, optimize=True)
            tab.close()


if __name__ == "__main__":
    take_screenshots(Path(sys.argv[1]))
