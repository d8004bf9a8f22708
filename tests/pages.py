"""What a person does with the page, and what its server may be made to say."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
Page = Any


def drop_in(page: Page, data: bytes, name: str = "card.png") -> None:
    page.set_input_files("#files", {"name": name, "mimeType": "image/png", "buffer": data})
    sync_api.expect(page.locator("#pictures figure")).to_have_count(1)


def ask(page: Page, question: str) -> None:
    page.fill("#question", question)
    page.press("#question", "Enter")
    sync_api.expect(page.locator("#send")).to_be_visible()


def settings(page: Page, **values: str) -> None:
    page.click("#open-settings")
    for name, value in values.items():
        page.fill(f"#{name}", value)
        page.locator(f"#{name}").blur()
    page.click("#open-settings")


def last_answer(page: Page) -> Any:
    return page.locator(".answer").last.locator("> div").first


def streamed(page: Page, text: str, rest: str) -> None:
    """The server's next answer is `text`, and `rest` as it is."""
    chunk = {"choices": [{"index": 0, "delta": {"content": text}}]}
    body = f"data: {json.dumps(chunk)}\n\n{rest}"
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=200, content_type="text/event-stream", body=body),
    )


def told(page: Page, text: str) -> None:
    streamed(page, text, "data: [DONE]\n\n")


def sent_picture(page: Page, data: bytes) -> bytes:
    drop_in(page, data)
    told(page, "x")
    with page.expect_request("**/v1/chat/completions") as request:
        ask(page, "x")
    (content,) = (message["content"] for message in request.value.post_data_json["messages"])
    return base64.b64decode(content[0]["image_url"]["url"].partition(",")[2])


def begin_endless(page: Page) -> None:
    """An answer of which a part has come, and nothing more will."""
    page.evaluate(
        """() => {
            const real = window.fetch;
            window.fetch = async (path, options) => {
                if (!path.includes("completions")) return real(path, options);
                const chunk = {choices: [{index: 0, delta: {content: "A part"}}]};
                return new Response(new ReadableStream({start(stream) {
                    stream.enqueue(new TextEncoder().encode(`data: ${JSON.stringify(chunk)}\\n\\n`));
                    options.signal.onabort = () => stream.error(options.signal.reason);
                }}));
            };
        }"""
    )
    page.fill("#question", "Go on.")
    page.click("#send")
    sync_api.expect(last_answer(page)).to_have_text(re.compile("A part"))
