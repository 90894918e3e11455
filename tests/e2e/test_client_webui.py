"""The gradio page in a browser, with a real server behind it. $SHOAL_TEST_SCREENSHOTS keeps what was seen."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import server
from browser import browser_page

pytest.importorskip("gradio", reason="needs gradio: pip install 'shoal[webui]'")

WEBUI = (sys.executable, str(server.ROOT / "bin" / "webui"))
LONG = "Write a very long and detailed story about a lighthouse keeper, at least 2000 words."


@pytest.fixture(scope="module")
def api_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[server.Server]:
    with server.running_server(f"--data_dir={tmp_path_factory.mktemp('data')}") as running:
        yield running


@pytest.fixture(scope="module")
def url(api_server: server.Server) -> Iterator[str]:
    """Of the page."""
    command = [*WEBUI, api_server.url, "--server_name", "localhost", "--server_port", str(server.free_port())]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("the page is at http://localhost:"), line + process.stdout.read()
        yield line.split()[-1]
    finally:
        assert server.stop(process) == 0


@pytest.fixture
def page(url: str) -> Iterator[Any]:
    """The opened page, which asks no other host for anything."""
    foreign: list[str] = []
    with browser_page() as opened:
        opened.on(
            "request", lambda request: foreign.append(request.url) if not is_ours(request.url, url) else None
        )
        opened.goto(url)
        opened.wait_for_selector("#say textarea")
        yield opened
    assert foreign == []


def is_ours(address: str, url: str) -> bool:
    return address.startswith((url, "data:", "blob:"))


def say(page: Any, text: str) -> None:
    page.locator("#say textarea").fill(text)
    page.locator("#say textarea").press("Enter")


def wait_answered(page: Any) -> str:
    """The line with the counts, which stands there when the answer is complete."""
    page.wait_for_function("document.querySelector('#status').innerText.includes('tokens in')", timeout=60_000)
    text: str = page.locator("#status").inner_text()
    return text


def shoot(page: Any, name: str) -> None:
    folder = os.environ.get("SHOAL_TEST_SCREENSHOTS")
    if folder:
        page.screenshot(path=Path(folder) / f"webui-{name}.png")


def limit(page: Any, tokens: int) -> None:
    """Temperature 0, and no more than so many tokens."""
    page.get_by_label("number input for Temperature").fill("0")
    page.get_by_label("number input for Longest answer").fill(str(tokens))
    page.get_by_label("number input for Longest answer").press("Tab")


def test_answer_retry_and_undo(page: Any) -> None:
    limit(page, 40)
    say(page, "What is the capital of France?")
    assert "out" in wait_answered(page)
    bot = page.locator("#chatbot .bot.message")
    assert "Paris" in bot.inner_text()
    first = bot.inner_text()
    shoot(page, "answer")
    page.get_by_role("button", name="Retry").click()
    page.wait_for_function("!document.querySelector('#status').innerText.includes('tokens in')")
    assert "cached" in wait_answered(page)
    assert bot.inner_text() == first
    page.get_by_role("button", name="Undo").click()
    page.wait_for_selector("#chatbot .bot.message", state="detached")
    assert page.locator("#say textarea").input_value() == "What is the capital of France?"


def test_stop_reaches_the_server(page: Any, api_server: server.Server) -> None:
    limit(page, 0)
    say(page, LONG)
    page.wait_for_selector("button.stop-button")
    page.wait_for_function("document.querySelector('#chatbot .bot.message')?.innerText.length > 20")
    shoot(page, "running")
    page.locator("button.stop-button").click()
    page.wait_for_selector("button.submit-button")
    wait_idle(api_server)
    assert len(page.locator("#chatbot .bot.message").inner_text()) > 20, "what was said stays"


def wait_idle(api_server: server.Server) -> None:
    """Until the scheduler has nothing to do; the whole story would take much longer than ten seconds."""
    import time

    deadline_s = time.monotonic() + 10
    while any(server.metrics(api_server)[f"shoal:num_requests_{kind}"] for kind in ("running", "waiting")):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def kept(page: Any, title: str) -> Any:
    """An entry of the list of conversations."""
    return page.locator("button.gallery-item, tr, [role=row]", has_text=title).first


def test_conversations_stay_in_the_browser(page: Any) -> None:
    limit(page, 8)
    say(page, "The first conversation")
    kept(page, "The first conversation").wait_for()
    page.get_by_text("New chat").click()
    page.wait_for_selector("#chatbot .bot.message", state="detached")
    say(page, "The second conversation")
    page.wait_for_selector("#chatbot .bot.message")
    kept(page, "The second conversation").wait_for()
    page.reload()
    kept(page, "The second conversation").wait_for()
    kept(page, "The first conversation").click()
    page.wait_for_selector("#chatbot .user.message")
    assert page.locator("#chatbot .user.message").inner_text() == "The first conversation"
    shoot(page, "conversations")


def test_what_the_server_refuses_is_shown_and_not_sent_again(page: Any) -> None:
    limit(page, 8)
    say(page, "word " * 20_000)
    page.get_by_text("No answer").wait_for()
    assert "tokens" in page.locator("#chatbot .bot.message").inner_text()
    shoot(page, "refused")
    page.get_by_role("button", name="Undo").click()
    page.wait_for_selector("#chatbot .bot.message", state="detached")
    say(page, "What is the capital of France?")
    assert wait_answered(page).startswith("37 tokens in")


def test_text_that_looks_like_markup_is_shown_and_not_run(page: Any) -> None:
    limit(page, 8)
    say(page, "vector<int> <img src=x onerror=\"document.title='taken'\">")
    wait_answered(page)
    assert "vector<int>" in page.locator("#chatbot .user.message").inner_text()
    assert page.title() != "taken"
