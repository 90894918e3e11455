"""The pages in a real browser: the API page, the reference, the chat. Answers that a model would rarely give, hostile
ones for instance, are put in the server's place by the browser."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from browser import launched
from server import Server, running_server

DONE = ".assistant[aria-busy=false]"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(f"--data_dir={tmp_path_factory.mktemp('data')}") as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as chromium:
        yield chromium


class Tab:
    """A fresh browser profile with one page; remembers what went wrong and what left for elsewhere."""

    def __init__(self, browser: Any, server: Server, **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1200, "height": 800}, **options})
        self.context.grant_permissions(["clipboard-read", "clipboard-write"])
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.url = server.url
        self.errors: list[str] = []
        self.foreign: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self._note(request.url))
        self.page.on("dialog", lambda dialog: self._alarm(dialog))

    def _note(self, url: str) -> None:
        if not url.startswith((self.url, "data:", "blob:")):
            self.foreign.append(url)

    def _alarm(self, dialog: Any) -> None:
        self.errors.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def open(self, path: str) -> Any:
        self.page.goto(self.url + path)
        return self.page

    def says(self, *texts: str, reasoning: str = "", end: str = "stop") -> list[Any]:
        """The next answers are these texts; the bodies of the requests arrive in the list."""
        bodies: list[Any] = []
        left = list(texts)

        def answer(route: Any) -> None:
            bodies.append(route.request.post_data_json)
            text = left.pop(0) if len(left) > 1 else left[0]
            route.fulfill(content_type="text/event-stream", body=stream(text, reasoning, end))

        self.page.route("**/v1/chat/completions", answer)
        return bodies

    def refuses(self, status: int, message: str, code: str = "", **headers: str) -> None:
        body = json.dumps({"error": {"message": message, "type": "x", "param": None, "code": code}})
        self.page.route(
            "**/v1/chat/completions",
            lambda route: route.fulfill(
                status=status, body=body, content_type="application/json", headers={**headers}
            ),
        )

    def ask(self, text: str) -> None:
        self.page.fill("#prompt", text)
        self.page.press("#prompt", "Enter")

    @property
    def answer(self) -> Any:
        self.page.wait_for_selector(f"#messages > li:last-child{DONE}")
        return self.page.locator("#messages > li:last-child")


def stream(text: str, reasoning: str = "", end: str = "stop") -> str:
    """A chat completion's events, a few characters each."""
    deltas = [{"role": "assistant", "content": ""}]
    deltas += [{"reasoning_content": piece} for piece in _pieces(reasoning)]
    deltas += [{"content": piece} for piece in _pieces(text)]
    choices: list[Any] = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    choices.append({"index": 0, "delta": {}, "finish_reason": end})
    chunks = [
        {"model": "m", "choices": [choice], "usage": {"completion_tokens": number}}
        for number, choice in enumerate(choices)
    ]
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


def _pieces(text: str) -> Sequence[str]:
    return [text[start : start + 7] for start in range(0, len(text), 7)]


@pytest.fixture
def tab(browser: Any, server: Server) -> Iterator[Tab]:
    opened = Tab(browser, server)
    yield opened
    opened.context.close()
    assert opened.errors == []
    assert opened.foreign == []


def test_the_api_page_tries_a_route(tab: Tab) -> None:
    page = tab.open("/")
    page.wait_for_selector(".opblock")
    assert page.locator(".opblock").count() > 20
    page.click("#operations-default-available_models_v1_models_get")
    page.click(".opblock.is-open .execute")
    page.wait_for_selector(".live-responses-table")
    assert page.locator(".live-responses-table tbody .response-col_status").inner_text().startswith("200")
    assert "SmolLM2" in page.locator(".live-responses-table").inner_text()


def test_the_api_page_sends_the_key_that_was_entered(tab: Tab) -> None:
    page = tab.open("/docs")
    page.click(".auth-wrapper .authorize")
    page.fill("input[aria-label='auth-bearer-value']", "sk-secret")
    page.click(".auth-container .authorize >> nth=0")
    page.click(".btn-done >> nth=0")
    page.click("#operations-default-available_models_v1_models_get")
    with page.expect_request("**/v1/models") as request:
        page.click(".opblock.is-open .execute")
    assert request.value.headers["authorization"] == "Bearer sk-secret"


def test_the_reference_shows_the_routes(tab: Tab) -> None:
    page = tab.open("/redoc")
    page.get_by_text("/v1/chat/completions").first.wait_for()
    assert "Continue a conversation" in page.content()
    assert page.locator("a[href='https://redocly.com/redoc/'] img").count() == 0, (
        "a picture of another server's"
    )


def test_a_chat_with_the_model(tab: Tab) -> None:
    page = tab.open("/ui")
    page.locator("#welcome-model", has_text="SmolLM2").wait_for()
    tab.ask("What is the capital of France?")
    assert "Paris" in tab.answer.locator(".markdown").last.inner_text()
    figures = tab.answer.locator(".figures").inner_text()
    assert re.search(r"\d+ tokens · \d+(\.\d)? tokens/s · first after [\d.]+ m?s", figures), figures
    assert page.locator(".entry").inner_text() == "What is the capital of France?"
    page.reload()
    assert "Paris" in page.locator(".assistant").inner_text(), "it is kept in the browser"


def test_with_keys_the_browser_asks_for_one_and_the_chat_goes_on_with_it(
    browser: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = tmp_path_factory.mktemp("data")
    with running_server(f"--data_dir={data}", env={"SHOAL_API_KEYS": "sk-page"}) as guarded:
        stranger = Tab(browser, guarded)
        answer = stranger.page.request.get(f"{guarded.url}/ui")
        assert answer.status == 401
        assert answer.headers["www-authenticate"].startswith("Basic ")
        stranger.context.close()
        tab = Tab(browser, guarded, http_credentials={"username": "", "password": "sk-page"})
        page = tab.open("/ui")
        page.locator("#welcome-model", has_text="SmolLM2").wait_for()
        tab.ask("What is the capital of France?")
        assert "Paris" in tab.answer.locator(".markdown").last.inner_text()
        tab.open("/").get_by_text("/v1/chat/completions").first.wait_for()
        assert not tab.errors
        tab.context.close()


def test_stop_keeps_what_came_and_again_answers_anew(tab: Tab) -> None:
    page = tab.open("/ui")
    tab.ask("Write a very long and detailed story about a lighthouse keeper, at least 2000 words.")
    page.locator(".assistant .markdown", has_text=re.compile(".{5}")).wait_for()
    assert page.locator("#stop").is_visible()
    page.keyboard.press("Escape")
    assert "stopped" in tab.answer.locator(".figures").inner_text()
    assert page.locator("#send").is_visible()
    tab.says("A new answer.")
    page.click(".again")
    page.wait_for_selector("text=A new answer.")
    assert page.locator(".assistant").count() == 1


HOSTILE = """# Title <img src=x onerror=alert(1)>

<script>alert(2)</script> **bold <b onclick=alert(3)>** and [click](javascript:alert(4)) [data](data:text/html,x)

![image](https://evil.example/pixel.png) [fine](https://example.org/?a=1&b=2 "t")

```html
<script>alert(5)</script>
```

| a | <svg onload=alert(6)> |
| - | - |
| `x` | [j](  JaVaScRiPt:alert(7)) |
"""


def test_what_a_model_writes_is_never_code(tab: Tab) -> None:
    page = tab.open("/ui")
    tab.says(HOSTILE)
    tab.ask("<img src=x onerror=alert(0)>")
    text = tab.answer.locator(".markdown").last
    assert "<script>alert(2)</script>" in text.inner_text()
    assert text.locator("script, img, svg, b, [onclick], [onerror]").count() == 0
    targets = [link.get_attribute("href") for link in text.locator("a").all()]
    assert targets == ["https://evil.example/pixel.png", "https://example.org/?a=1&b=2"]
    assert page.locator(".bubble").inner_text() == "<img src=x onerror=alert(0)>"
    assert page.locator(".bubble img").count() == 0


RICH = """## Steps

1. First **bold** and *slanted*
2. Second with `code`
   - nested ~~gone~~
   - [ ] open
   - [x] done

> quoted

snake_case_name and 2 * 3 * 4

```python
def f(x):  # a comment
    return "s" + str(x)
```

| left | right |
| :--- | ---: |
| 1 | 2 |
"""


def test_markdown_becomes_elements_and_code_can_be_copied(tab: Tab) -> None:
    page = tab.open("/ui")
    tab.says(RICH)
    tab.ask("show")
    text = tab.answer.locator(".markdown").last
    assert text.locator("ol > li").count() == 2
    assert text.locator("ol ul > li").count() == 3
    assert text.locator("input[type=checkbox]").count() == 2
    assert [mark.inner_text() for mark in text.locator("strong, em, del").all()] == ["bold", "slanted", "gone"]
    assert "snake_case_name and 2 * 3 * 4" in text.inner_text()
    assert text.locator("td.end").inner_text() == "2"
    assert text.locator("pre .k").first.inner_text() == "def"
    page.click("figure.code button")
    page.wait_for_selector("figure.code button:has-text('Copied')")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == 'def f(x):  # a comment\n    return "s" + str(x)'


@pytest.mark.parametrize(
    "text", ["*" * 60_000, "[" * 60_000, "`" * 9 + "a`" * 30_000, "> " * 20_000, "_a " * 20_000, "- " * 20_000]
)
def test_no_text_keeps_the_page_busy(tab: Tab, text: str) -> None:
    page = tab.open("/ui")
    elapsed_ms = page.evaluate(
        """async (text) => {
            const { render } = await import("/ui/markdown.js");
            const box = document.createElement("div");
            const begun = performance.now();
            render(box, text);
            return performance.now() - begun;
        }""",
        text,
    )
    assert elapsed_ms < 2000


def test_thoughts_are_folded_away(tab: Tab) -> None:
    page = tab.open("/ui")
    tab.says("Forty-two.", reasoning="I multiply six by nine.")
    tab.ask("why")
    thoughts = tab.answer.locator(".reasoning")
    assert thoughts.get_attribute("open") is None
    assert not thoughts.locator(".markdown").is_visible()
    page.click(".reasoning summary")
    assert thoughts.locator(".markdown").inner_text() == "I multiply six by nine."


def test_edit_sends_the_message_anew_without_what_followed(tab: Tab) -> None:
    page = tab.open("/ui")
    bodies = tab.says("one", "two", "three")
    tab.ask("first")
    page.wait_for_selector("text='one'")
    tab.ask("second")
    page.wait_for_selector("text='two'")
    page.locator(".user").first.hover()
    page.click(".user >> nth=0 >> text=Edit")
    page.fill(".editor textarea", "changed")
    page.press(".editor textarea", "Enter")
    page.wait_for_selector("text='three'")
    assert page.locator("#messages > li").count() == 2
    assert bodies[-1]["messages"] == [{"role": "user", "content": "changed"}]
    assert [message["role"] for message in bodies[1]["messages"]] == ["user", "assistant", "user"]


def test_settings_are_sent_and_unset_ones_are_not(tab: Tab) -> None:
    page = tab.open("/ui")
    bodies = tab.says("ok")
    page.keyboard.press("Alt+s")
    page.fill("#system", "Be brief.")
    page.fill("#temperature", "0.5")
    page.fill("#seed", "7")
    page.click("#settings .primary")
    tab.ask("hi")
    tab.answer.wait_for()
    (body,) = bodies
    assert (body["temperature"], body["seed"]) == (0.5, 7)
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert not {"top_p", "max_tokens"} & set(body)


@pytest.mark.parametrize(
    ("status", "code", "told"),
    [
        (400, "context_length_exceeded", "too long for this model"),
        (401, "invalid_api_key", "asks for an API key"),
        (429, "", "Try again in 3 s"),
        (503, "", "cannot answer now"),
    ],
)
def test_refusals_are_told_in_words(tab: Tab, status: int, code: str, told: str) -> None:
    page = tab.open("/ui")
    tab.refuses(status, "the server's own words", code, **{"Retry-After": "3"})
    tab.ask("hi")
    error = tab.answer.locator(".error").inner_text()
    assert told in error
    assert "the server's own words" in error
    tab.says("better now")
    page.click(".error button")
    if status == 401:
        page.fill("#key", "sk-1")
        with page.expect_request("**/v1/models") as request:
            page.click("#settings .primary")
        assert request.value.headers["authorization"] == "Bearer sk-1"
    else:
        page.wait_for_selector("text=better now")
        assert page.locator(".error:visible").count() == 0


def test_a_stream_that_breaks_off_says_so(tab: Tab) -> None:
    tab.open("/ui")
    whole = stream("half of it")
    broken = whole[: whole.index('"finish_reason": "stop"') - 60].rpartition("\n\n")[0] + "\n\n"
    tab.page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=broken)
    )
    tab.ask("hi")
    assert "connection was lost" in tab.answer.locator(".error").inner_text()
    assert "half" in tab.answer.locator(".markdown").last.inner_text()


def test_conversations_are_listed_renamed_exported_and_deleted(tab: Tab) -> None:
    page = tab.open("/ui")
    tab.says("first answer", "second answer")
    tab.ask("about fish")
    page.wait_for_selector("text=first answer")
    page.keyboard.press("Alt+n")
    tab.ask("about birds")
    page.wait_for_selector("text=second answer")
    assert page.locator(".entry").all_inner_texts() == ["about birds", "about fish"]
    page.fill("#search", "fish")
    assert page.locator(".entry").all_inner_texts() == ["about fish"]
    page.fill("#search", "")

    page.click(".more >> nth=0")
    page.click(".menu >> text=Rename")
    page.fill(".rename", "Birds!")
    page.press(".rename", "Enter")
    assert page.locator(".entry").first.inner_text() == "Birds!"

    page.click(".more >> nth=0")
    with page.expect_download() as download:
        page.click(".menu >> text=Export as JSON")
    exported = json.loads(download.value.path().read_text())
    assert [message["content"] for message in exported["messages"]] == ["about birds", "second answer"]

    page.click(".more >> nth=0")
    page.click(".menu >> text=Delete")
    assert page.locator(".entry").all_inner_texts() == ["about fish"]
    page.click("#toast >> text=Undo")
    assert page.locator(".entry").count() == 2


def test_the_theme_follows_the_system_and_can_be_chosen(browser: Any, server: Server) -> None:
    tab = Tab(browser, server, color_scheme="dark")
    page = tab.open("/ui")
    paper = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(paper)
    page.click("#theme")
    light = page.evaluate(paper)
    assert light != dark
    page.reload()
    assert page.evaluate(paper) == light
    page.click("#theme")
    assert page.evaluate(paper) == dark
    tab.context.close()


def test_it_fits_a_phone(browser: Any, server: Server) -> None:
    tab = Tab(browser, server, viewport={"width": 360, "height": 700})
    page = tab.open("/ui")
    tab.says(RICH + "\n" + "word" * 200 + "\n\n```\n" + "wide " * 100 + "\n```\n")
    tab.ask("long " * 60)
    tab.answer.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("document.querySelector('#scroller').scrollWidth") <= 360
    assert not page.locator("#sidebar").is_visible()
    page.click("#open-sidebar")
    page.wait_for_selector("#new-chat", state="visible")
    page.keyboard.press("Escape")
    page.wait_for_selector("#sidebar", state="hidden")
    tab.context.close()


def test_everything_has_a_name_for_those_who_cannot_see(tab: Tab) -> None:
    page = tab.open("/ui")
    tab.says("done")
    tab.ask("hi")
    tab.answer.wait_for()
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, textarea, a")].filter((each) => {
            const label = each.labels?.[0]?.textContent ?? "";
            return !(each.getAttribute("aria-label") || each.textContent.trim() || label.trim());
        }).map((each) => each.outerHTML.slice(0, 120))"""
    )
    assert nameless == []
    assert page.locator("#status").inner_text() == "The answer is complete"
    page.keyboard.press("Control+a")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("?")
    assert page.locator("#shortcuts").is_visible()
