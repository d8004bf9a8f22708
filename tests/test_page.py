"""The page in a real browser, asking the packaged model; what it shows is held against the truth."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from demo import cases
from films import encoded
from pages import (
    Page,
    ask,
    begin_endless,
    drop_in,
    last_answer,
    sent_picture,
    settings,
    streamed,
    sync_api,
    told,
)
from serving import WHAT, Serving, card, png, serving

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")

FIRST_SEED = 2_000_000
FAKE_CAMERA = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
ANSWER_WITH_BOXES = (
    "<|object_ref_start|>a<|object_ref_end|><|box_start|>(10,20),(40,60)<|box_end|>"
    "<|box_start|>(500, 500),(600, 600)<|box_end|> and <|object_ref_start|>b<|object_ref_end|>; "
    "<|object_ref_start|>c<|object_ref_end|><|box_start|>(750,760),(700,700)<|box_end|>.<|box_start|>(1,2"
)


@pytest.fixture(scope="module")
def served() -> Iterator[Serving]:
    with serving() as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *FAKE_CAMERA])
        yield found
        found.close()


@pytest.fixture
def page(served: Serving, browser: Any) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1000, "height": 760}, color_scheme="light")
    found = context.new_page()
    wrong: list[str] = []
    found.on("pageerror", lambda error: wrong.append(str(error)))
    found.on("console", lambda line: wrong.append(line.text) if line.type == "error" else None)
    found.goto(f"http://127.0.0.1:{served.port}/")
    sync_api.expect(found.locator("#model")).to_have_text("demo")
    found.wrong = wrong
    yield found
    context.close()
    assert wrong == []


def test_a_right_answer_streams(page: Page, served: Serving) -> None:
    picture, truth = card(0)
    settings(page, temperature="0")
    drop_in(page, png(picture))
    ask(page, WHAT)
    sync_api.expect(last_answer(page)).to_have_text(truth)
    sync_api.expect(page.locator(".facts").last).to_contain_text(re.compile(r"first token .* tokens/s"))
    ask(page, "How many shapes are there?")
    sync_api.expect(last_answer(page)).to_have_text("2 shapes.")
    page.reload()
    sync_api.expect(last_answer(page)).to_have_text("2 shapes.")
    sync_api.expect(page.locator(".question figure img")).to_have_count(1)
    page.click("#open-talks")
    assert WHAT in page.locator("#talks").inner_text()
    page.click("#new")
    sync_api.expect(page.locator(".welcome")).to_be_visible()


def test_boxes_are_where_the_truth_is(page: Page) -> None:
    settings(page, temperature="0")
    found = cases.case("box", 900_000)
    drop_in(page, found.images[0])
    ask(page, found.turns[-1].question)
    rect = page.locator(".question figure rect").first
    x, y, width, height = (int(rect.get_attribute(name)) for name in ("x", "y", "width", "height"))
    truth = found.turns[-1].box
    assert truth is not None
    assert cases.iou((x, y, x + width, y + height), truth) > 0.7
    assert "box_start" not in last_answer(page).inner_text()


def test_stop(page: Page, served: Serving) -> None:
    """What has come stays; the server stops within a step."""
    ends = {str(token): -100 for token in served.model.config.eos_token_ids}

    def endless(route: Any) -> None:
        body = {**route.request.post_data_json, "logit_bias": ends, "temperature": 2, "max_tokens": 3000}
        route.continue_(post_data=json.dumps(body))

    page.route("**/v1/chat/completions", endless)
    page.fill("#question", "Go on.")
    page.click("#send")
    sync_api.expect(last_answer(page)).not_to_have_text("")
    page.click("#stop")
    sync_api.expect(page.locator(".facts").last).to_contain_text("stopped")
    served.wait_until_idle()
    assert len(last_answer(page).inner_text()) > 0


@pytest.mark.parametrize(
    "hostile",
    [
        "<img src=x onerror=alert(1)>",
        "<script>alert(1)</script>",
        "**<b onclick=alert(1)>x</b>**",
        "```\n<iframe src=javascript:alert(1)>\n```",
        "| <img src=x onerror=alert(1)> |\n|---|\n| x |",
        "[x](javascript:alert(1))",
        '<|object_ref_start|><img src=x onerror="alert(1)"><|object_ref_end|>'
        "<|box_start|>(1,1),(9,9)<|box_end|>",
    ],
)
def test_a_hostile_answer_stays_text(page: Page, hostile: str) -> None:
    page.on("dialog", lambda dialog: page.wrong.append("a dialog"))
    drop_in(page, png(card(0)[0]))
    told(page, hostile)
    ask(page, "x")
    sync_api.expect(last_answer(page)).not_to_have_text("")
    assert page.locator(".answer :is(img, script, iframe, b, [onclick])").count() == 0
    assert page.locator("a[href^=javascript]").count() == 0
    shown = last_answer(page).inner_text()
    assert "alert(1)" in shown


def test_markdown(page: Page) -> None:
    told(
        page,
        "# Title\n\nSome **bold** and *thin* `code` [link](https://example.org).\n\n"
        "- a\n  - b\n- c\n\n3. d\n4. e\n\n"
        "| x | y |\n|---|---|\n| 1 | 2 |\n\n```python\nprint(1)\n```\n> said",
    )
    ask(page, "x")
    answer = last_answer(page)
    for selector, text in {
        "h3": "Title",
        "strong": "bold",
        "em": "thin",
        "p code": "code",
        "a[rel='noopener noreferrer']": "link",
        "ul ul li": "b",
        "ol[start='3'] li >> nth=1": "e",
        "td >> nth=1": "2",
        "pre code": "print(1)",
        "blockquote p": "said",
    }.items():
        sync_api.expect(answer.locator(selector)).to_have_text(text)


def test_errors_are_shown(page: Page) -> None:
    settings(page, max_tokens="999999")
    ask(page, "hello")
    sync_api.expect(page.locator(".answer .wrong")).to_contain_text("max_tokens")
    page.wrong[:] = [line for line in page.wrong if "400" not in line]  # the browser's own note
    settings(page, max_tokens="3")
    page.click(".again:visible")
    sync_api.expect(page.locator(".facts").last).to_contain_text("cut at its longest")


def test_a_key(browser: Any) -> None:
    with serving(keys=["a-long-key"]) as served:
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{served.port}/")
        sync_api.expect(page.locator("#key")).to_be_focused()
        page.fill("#key", "a-long-key")
        page.locator("#key").blur()
        sync_api.expect(page.locator("#model")).to_have_text("demo")
        ask(page, "hello")
        sync_api.expect(page.locator(".answer .wrong")).to_have_count(0)
        page.close()


def test_conversations(page: Page) -> None:
    settings(page, max_tokens="2")
    ask(page, "first one")
    page.click("#new")
    ask(page, "second one")
    page.click("#open-talks")
    entries = page.locator("#talks li button:first-child")
    sync_api.expect(entries).to_have_text(["second one", "first one"])
    entries.nth(1).click()
    sync_api.expect(page.locator(".question p")).to_have_text("first one")
    page.once("dialog", lambda dialog: dialog.accept("renamed"))
    page.get_by_label("Rename first one").click()
    sync_api.expect(entries).to_have_text(["second one", "renamed"])
    asked: list[str] = []

    def leave(dialog: sync_api.Dialog) -> None:
        asked.append(dialog.message)
        dialog.dismiss()

    page.once("dialog", leave)
    page.get_by_label("Delete second one").click()
    sync_api.expect(entries).to_have_text(["second one", "renamed"])
    assert asked == ["Delete “second one”? It is kept nowhere else."]
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_label("Delete second one").click()
    sync_api.expect(entries).to_have_text(["renamed"])


@pytest.mark.parametrize(
    "event",
    [
        "new ClipboardEvent('paste', {clipboardData: data, bubbles: true})",
        "new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true})",
    ],
)
def test_pictures_are_pasted_and_dropped(page: Page, event: str) -> None:
    page.evaluate(
        """(bytes) => {
            const data = new DataTransfer();
            for (const name of ["a.png", "b.png"])
                data.items.add(new File([new Uint8Array(bytes)], name, {type: "image/png"}));
            document.querySelector("#log").dispatchEvent(EVENT);
        }""".replace("EVENT", event),
        list(png(card(0)[0])),
    )
    sync_api.expect(page.locator("#pictures figure")).to_have_count(2)
    page.get_by_label("Remove picture 1").click()
    sync_api.expect(page.locator("#pictures figure")).to_have_count(1)


@pytest.mark.parametrize("width", [320, 390, 1000])
def test_it_fits_and_can_be_used_without_a_mouse(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 640})
    settings(page, max_tokens="2")
    ask(page, "hello " * 40 + "x" * 200)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    names = page.evaluate(
        """[...document.querySelectorAll("button, input, textarea, select, img")].map((node) =>
            (node.ariaLabel || node.labels?.[0]?.textContent || node.alt || node.textContent).trim())"""
    )
    assert all(names)
    page.locator("#question").focus()
    page.keyboard.type("typed")
    page.keyboard.press("Shift+Enter")
    assert page.input_value("#question") == "typed\n"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "choose"


def test_nothing_comes_from_elsewhere(served: Serving) -> None:
    from qwen2vl_q.serve.app import PAGE

    for file in Path(PAGE).iterdir():
        text = file.read_text("utf-8")
        addresses = set(re.findall(r"https?://[a-z][^\s\"'`)]*\.[a-z]+", text))
        assert addresses <= {"http://www.w3.org"}, file
        assert "innerHTML" not in text


def test_what_is_announced_has_no_markers(page: Page) -> None:
    drop_in(page, png(card(0)[0]))
    told(page, ANSWER_WITH_BOXES)
    ask(page, "x")
    sync_api.expect(page.locator("#status")).to_have_text("Answer: a and b; c.")


def test_every_box_of_an_answer_is_drawn(page: Page) -> None:
    """Two under one label, one without, one with its corners the other way round; the last is not whole."""
    drop_in(page, png(card(0)[0]))
    told(page, ANSWER_WITH_BOXES)
    ask(page, "x")
    rects = page.locator(".question figure rect:nth-of-type(even)")
    found = rects.evaluate_all(
        "nodes => nodes.map(n => ['x', 'y', 'width', 'height'].map(name => n.getAttribute(name)).join())"
    )
    assert found == ["10,20,30,40", "500,500,100,100", "700,700,50,60"]
    sync_api.expect(page.locator(".question figcaption")).to_have_text(["a", "a", "c"])
    sync_api.expect(last_answer(page)).to_have_text("a and b; c.")


@pytest.mark.parametrize("size", [(40, 900), (900, 40), (30, 30)])
def test_a_picture_keeps_its_shape(page: Page, size: tuple[int, int]) -> None:
    """And boxes, which are over the figure, are over the picture."""
    drop_in(page, png(Image.new("RGB", size, "grey")))
    told(page, "x")
    ask(page, "x")
    image, figure = page.evaluate(
        """['.question img', '.question figure'].map((selector) => {
            const {width, height} = document.querySelector(selector).getBoundingClientRect();
            return [width, height];
        })"""
    )
    assert image == pytest.approx(figure, abs=0.5)
    assert image[0] / image[1] == pytest.approx(size[0] / size[1], rel=0.1)


def test_a_small_picture_is_sent_as_it_is(page: Page) -> None:
    data = png(card(0)[0])
    assert sent_picture(page, data) == data


def test_a_photo_is_made_smaller(page: Page) -> None:
    """A phone's has more pixels than a request may bring, and conversations have to be kept."""
    with Image.open(io.BytesIO(sent_picture(page, png(Image.new("RGB", (4000, 3000), "teal"))))) as sent:
        assert 2**20 < sent.width * sent.height <= 2**21
        assert sent.width / sent.height == pytest.approx(4 / 3, rel=0.01)
        assert sent.getpixel((sent.width - 1, sent.height - 1)) == pytest.approx((0, 128, 128), abs=4)


def test_escape_stops(page: Page) -> None:
    begin_endless(page)
    page.keyboard.press("Escape")
    sync_api.expect(page.locator(".facts")).to_contain_text("stopped")
    sync_api.expect(page.locator("#send")).to_be_visible()


def test_what_is_no_picture_is_said(page: Page) -> None:
    page.set_input_files("#files", {"name": "a.txt", "mimeType": "text/plain", "buffer": b"x"})
    sync_api.expect(page.locator("#pictures .wrong")).to_have_text("a.txt is neither a picture nor a clip.")
    drop_in(page, png(card(0)[0]))
    sync_api.expect(page.locator("#pictures .wrong")).to_have_count(0)


def test_a_clip(page: Page) -> None:
    pytest.importorskip("av", reason="needs the extra video")
    case = cases.case("move", FIRST_SEED)
    frames = [Image.open(io.BytesIO(data)).convert("RGB").resize((140, 140)) for data in case.images]
    film = encoded([np.asarray(frame) for frame in frames], fps=2)
    clip = {"name": "a.mp4", "mimeType": "video/mp4"}
    page.set_input_files("#files", {**clip, "buffer": film})
    sync_api.expect(page.get_by_label("Clip 1", exact=True)).to_be_visible()
    ask(page, case.turns[0].question)
    sync_api.expect(last_answer(page)).to_have_text(case.turns[-1].answer)
    assert page.locator(".question video").get_attribute("src").startswith("data:video/mp4;base64,")
    page.set_input_files("#files", {**clip, "buffer": bytes(20 * 2**20 + 1)})
    sync_api.expect(page.locator("#pictures .wrong")).to_have_text(
        "a.mp4 is too large: a clip may have 20 MiB."
    )


def test_the_camera(page: Page) -> None:
    page.click("#take")
    page.click("#shoot")
    sync_api.expect(page.locator("#pictures figure")).to_have_count(1)
    assert page.evaluate("document.querySelector('video').srcObject") is None


def test_without_a_camera_the_device_is_asked(page: Page) -> None:
    """Browsers give pages without TLS no camera; a phone's own may still take a picture."""
    page.evaluate("Object.defineProperty(navigator, 'mediaDevices', {value: undefined})")
    with page.expect_file_chooser() as chooser:
        page.click("#take")
    assert chooser.value.element.get_attribute("capture") == "environment"
    chooser.value.set_files({"name": "a.png", "mimeType": "image/png", "buffer": png(card(0)[0])})
    sync_api.expect(page.locator("#pictures figure")).to_have_count(1)


@pytest.mark.parametrize("rest", ["", 'data: {"choices"'])
def test_an_answer_that_breaks_off_is_an_error(page: Page, rest: str) -> None:
    streamed(page, "so", rest)
    ask(page, "x")
    sync_api.expect(page.locator(".answer .wrong")).to_have_text("The answer broke off.")


def test_a_deep_answer_is_shown(page: Page) -> None:
    told(page, ">" * 20_000 + "\n\nend")
    ask(page, "x")
    sync_api.expect(last_answer(page)).to_contain_text("end")


def test_leaving_a_conversation_stops_and_keeps_its_answer(page: Page) -> None:
    begin_endless(page)
    page.click("#new")
    page.click("#open-talks")
    entries = page.locator("#talks li button:first-child")
    sync_api.expect(entries).to_have_text(["Go on."])
    entries.first.click()
    sync_api.expect(page.locator(".facts")).to_contain_text("stopped")
    sync_api.expect(last_answer(page)).to_have_text("A part")


def test_a_deleted_conversation_does_not_come_back(page: Page) -> None:
    page.click("#open-talks")
    begin_endless(page)
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_label("Delete Go on.").click()
    sync_api.expect(page.locator(".welcome")).to_be_visible()
    page.reload()
    sync_api.expect(page.locator("#model")).to_have_text("demo")
    page.click("#open-talks")
    sync_api.expect(page.locator("#talks li")).to_have_count(0)


def test_a_question_outlives_its_page(page: Page) -> None:
    begin_endless(page)
    page.reload()
    sync_api.expect(page.locator(".question p")).to_have_text("Go on.")
    settings(page, max_tokens="2")
    page.click(".again:visible")
    sync_api.expect(page.locator(".facts")).to_contain_text("first token")


def test_settings_are_sent(page: Page) -> None:
    wanted = {"temperature": 0.5, "top_p": 0.9, "max_tokens": 7, "seed": 3}
    settings(page, system="Be short.", **{name: str(value) for name, value in wanted.items()})
    page.reload()
    told(page, "x")
    with page.expect_request("**/v1/chat/completions") as request:
        ask(page, "hello")
    body = request.value.post_data_json
    assert {name: body[name] for name in wanted} == wanted
    assert body["messages"] == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "hello"},
    ]


def test_colours(page: Page) -> None:
    """The system's, unless others are chosen; also after a reload."""
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(background)
    assert dark != light
    page.click("#open-settings")
    page.select_option("#theme", "light")
    assert page.evaluate(background) == light
    page.reload()
    assert page.evaluate(background) == light
    page.emulate_media(color_scheme="light")
    page.click("#open-settings")
    page.select_option("#theme", "dark")
    assert page.evaluate(background) == dark
