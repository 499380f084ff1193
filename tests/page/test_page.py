"""What people do on the page, in a real Chromium, against real models."""

from __future__ import annotations

import base64
import io
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import requests
from PIL import Image
from ray.serve.exceptions import BackPressureError

from serve.gate import Gate
from serve.roster import Roster, Standing
from tests.page.conftest import KEY, MARKUP, MOST_BYTES, RUN, Models

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

Files = Callable[[str, bytes], Path]
LOWEST = 0.05
"""Of the scores that the page asks a detector for."""
PIXEL = 1.0


def quarters(encoding: str, orientation: int = 1, height: int = 120, width: int = 200) -> bytes:
    """Red and green above blue and white, as they are stored, and how they are to be turned."""
    pixels = np.full((height, width, 3), 255, np.uint8)
    pixels[: height // 2, : width // 2] = (255, 0, 0)
    pixels[: height // 2, width // 2 :] = (0, 255, 0)
    pixels[height // 2 :, : width // 2] = (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, encoding, exif=exif, quality=95)
    return encoded.getvalue()


def choose(page: Page, path: Path, model: str = "digits") -> None:
    """A file by the button, asked of a model; waits for an answer or a refusal."""
    page.select_option("#model", model)
    page.set_input_files("#file", path)
    settle(page)


def settle(page: Page) -> None:
    page.wait_for_selector("#result:not([hidden]), #problem p", state="attached")


def drop(page: Page, data: bytes, name: str, kind: str = "drop") -> None:
    """Let go of a file over the page, or paste it."""
    page.evaluate(
        """([text, name, kind]) => {
            const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
            const moved = new DataTransfer();
            moved.items.add(new File([bytes], name, {type: "image/png"}));
            const about = {bubbles: true, cancelable: true, dataTransfer: moved, clipboardData: moved};
            if (kind === "paste") document.body.dispatchEvent(new ClipboardEvent("paste", about));
            else for (const type of ["dragenter", "dragover", "drop"])
                document.querySelector("#drop").dispatchEvent(new DragEvent(type, about));
        }""",
        [base64.b64encode(data).decode(), name, kind],
    )
    settle(page)


def told(url: str, model: str, data: bytes, **asked: float) -> dict[str, Any]:
    answer = requests.post(f"{url}/predict/{model}", data=data, params=asked, timeout=30)
    assert answer.status_code == 200
    return dict(answer.json())


def texts(page: Page, selector: str) -> list[str]:
    return [text.strip() for text in page.locator(selector).all_text_contents()]


def slide(page: Page, percent: int) -> None:
    page.locator("#score").fill(str(percent))


# Answers


@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_file_that_is_dropped_or_pasted_is_answered_with_the_endpoints_classes(page: Page, url: str, kind: str) -> None:
    data = quarters("PNG")
    drop(page, data, "four.png", kind)
    answer = told(url, "digits", data)
    assert texts(page, "#rows th") == [one["class_name"] for one in answer["predictions"]]
    assert texts(page, "#rows .score") == [f"{one['score']:.3f}" for one in answer["predictions"]]
    track, fill = (page.locator(f"#rows .{part}").first.bounding_box() for part in ("track", "fill"))
    assert track
    assert fill
    assert fill["width"] / track["width"] == pytest.approx(answer["predictions"][0]["score"], abs=0.02)
    assert page.locator("#result-title").text_content() == answer["predictions"][0]["class_name"]
    assert "digits, version 3 (champion)" in str(page.locator("#result-model").text_content())
    assert page.locator("#result-model a").get_attribute("href") == RUN
    assert "four.png" in str(page.locator("#file-name").text_content())
    assert "class" in str(page.locator("#status").text_content())
    assert page.locator("#drop.over").count() == 0


def test_times_add_up_to_the_round_trip(page: Page, files: Files) -> None:
    choose(page, files("four.png", quarters("PNG")))
    assert texts(page, "#times dt") == ["Decode", "Queue", "Inference", "Network and the rest", "Round trip"]
    parts = [float(text.removesuffix(" ms")) for text in texts(page, "#times dd")]
    assert sum(parts[:-1]) == pytest.approx(parts[-1], abs=1.0)
    assert parts[-1] > max(parts[:-1]) > 0


def test_class_names_and_addresses_that_are_markup_stay_text(page: Page, files: Files) -> None:
    choose(page, files("four.png", quarters("PNG")), "markup")
    assert texts(page, "#rows th")[0].startswith(MARKUP)
    assert str(page.locator("#result-title").text_content()).startswith(MARKUP)
    assert page.locator("#result a, #result img").count() == 0  # the run's address is javascript:
    assert page.title() == "Ventral: try a model"


def test_lines_to_copy_give_what_the_page_shows(page: Page, files: Files) -> None:
    path = files("it's 4 $(touch x).png", quarters("PNG"))
    choose(page, path)
    assert "@photo.jpg" in str(page.locator("#curl").text_content())  # no name that a shell could mistake
    path = files("a picture (4).png", quarters("PNG"))
    for model in ("digits", "insects"):
        choose(page, path, model)
        if model == "insects":
            slide(page, 20)
        page.locator("[data-copies=curl]").click()
        curl = page.evaluate("navigator.clipboard.readText()")
        python = str(page.locator("#python").text_content())
        assert shlex.split(curl)[:3] == ["curl", "--data-binary", "@a picture (4).png"]
        for command in (["bash", "-c", curl.replace("curl", "curl -s", 1)], [sys.executable, "-c", python]):
            done = subprocess.run(command, cwd=path.parent, capture_output=True, text=True, timeout=60, check=True)
            said = json.loads(done.stdout) if command[0] == "bash" else eval(done.stdout)
            assert [f"{one['score']:.3f}" for one in said["predictions"]] == texts(page, "#rows .score")


# Boxes


TURNED = [(encoding, turned) for encoding in ("JPEG", "PNG", "WEBP") for turned in (1, 2, 3, 4, 5, 6, 7, 8)]


def colours(page: Page) -> list[list[int]]:
    """Of the picture as it is shown: upper left, upper right, lower left, lower right."""
    shown: list[list[int]] = page.evaluate(
        """() => {
            const picture = document.querySelector("#picture");
            const [canvas, w, h] = [document.createElement("canvas"), picture.naturalWidth, picture.naturalHeight];
            [canvas.width, canvas.height] = [w, h];
            const context = canvas.getContext("2d", {willReadFrequently: true});
            context.drawImage(picture, 0, 0);
            const at = (x, y) => [...context.getImageData(x * w, y * h, 1, 1).data].slice(0, 3);
            return [at(0.2, 0.2), at(0.8, 0.2), at(0.2, 0.8), at(0.8, 0.8)];
        }"""
    )
    return shown


@pytest.mark.parametrize(("encoding", "turned"), TURNED)
def test_boxes_lie_where_the_answer_says_on_the_upright_picture(
    page: Page, url: str, files: Files, encoding: str, turned: int
) -> None:
    data = quarters(encoding, turned)
    choose(page, files(f"turned.{encoding.lower()}", data), "insects")
    slide(page, 5)
    expected = told(url, "insects", data, score_threshold=LOWEST)["predictions"]
    assert len(expected) > 5
    height, width = (200, 120) if turned > 4 else (120, 200)
    assert page.evaluate("[picture.naturalWidth, picture.naturalHeight]") == [width, height]
    stored = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]])
    upright = stored.swapaxes(0, 1) if turned > 4 else stored
    upright = upright[::-1] if turned in {3, 4, 7, 8} else upright
    upright = upright[:, ::-1] if turned in {2, 3, 6, 7} else upright
    assert np.abs(np.array(colours(page)) - upright.reshape(4, 3)).max() < 40
    assert_boxes(page, [one["box"] for one in expected], width)


def assert_boxes(page: Page, boxes: Sequence[Sequence[float]], width: int) -> None:
    """Those on the screen, brought back to pixels of the picture, which may be shown at any size."""
    drawn = page.evaluate(
        """() => {
            const base = document.querySelector("#picture").getBoundingClientRect();
            const rects = [...document.querySelectorAll("#boxes rect:not(.halo)")].map((one) => {
                const matrix = one.getScreenCTM();
                const [x, y, w, h] = ["x", "y", "width", "height"].map((key) => one[key].baseVal.value);
                const corners = [new DOMPoint(x, y), new DOMPoint(x + w, y + h)];
                const [from, to] = corners.map((corner) => corner.matrixTransform(matrix));
                return [from.x - base.x, from.y - base.y, to.x - base.x, to.y - base.y];
            });
            return {width: base.width, rects};
        }"""
    )
    found = np.array(drawn["rects"]) * width / drawn["width"]
    assert found.shape == (len(boxes), 4)
    assert np.abs(found - np.array(boxes)).max() < PIXEL


@pytest.mark.parametrize("viewport", [(320, 600), (1280, 800)])
def test_boxes_of_a_picture_larger_than_the_screen_lie_right(
    page: Page, url: str, files: Files, viewport: tuple[int, int]
) -> None:
    page.set_viewport_size({"width": viewport[0], "height": viewport[1]})
    data = quarters("JPEG", 6, 1500, 2600)
    choose(page, files("large.jpg", data), "insects")
    slide(page, 5)
    shown = page.locator("#picture").bounding_box()
    assert shown
    assert shown["width"] < viewport[0]
    assert shown["height"] < viewport[1]
    assert_boxes(page, [one["box"] for one in told(url, "insects", data, score_threshold=LOWEST)["predictions"]], 1500)


def test_slider_leaves_out_what_scores_less_without_another_request(page: Page, url: str, files: Files) -> None:
    data = quarters("PNG")
    choose(page, files("four.png", data), "insects")
    scores = [one["score"] for one in told(url, "insects", data, score_threshold=LOWEST)["predictions"]]
    asked = list[str]()
    page.on("request", lambda request: asked.append(request.url))
    for percent in (5, 20, 30, 100):
        slide(page, percent)
        expected = sum(score >= percent / 100 for score in scores)
        assert page.locator("#rows tr").count() == page.locator("#boxes g").count() == expected
        assert str(page.locator("#score-note").text_content()).startswith(f"{expected} of {len(scores)} objects")
    assert page.locator("#result-title").text_content() == "No object"
    assert not asked


def test_row_under_the_pointer_or_with_the_focus_marks_its_box(page: Page, files: Files) -> None:
    choose(page, files("four.png", quarters("PNG")), "insects")
    slide(page, 5)
    marked = "[...document.querySelectorAll('#boxes g')].findIndex((one) => one.classList.contains('on'))"
    assert page.evaluate(marked) == -1
    page.locator("#rows tr").nth(2).hover()
    assert page.evaluate(marked) == 2
    page.locator("#rows button").nth(1).focus()
    assert page.evaluate(marked) == 1
    page.keyboard.press("Enter")
    page.locator("#score").focus()
    page.mouse.move(0, 0)
    assert page.evaluate(marked) == 1  # it stays
    assert page.locator("#rows button").nth(1).get_attribute("aria-pressed") == "true"


# Refusals


def refusal(page: Page) -> str:
    page.wait_for_selector("#problem p")
    assert page.locator("#result").is_hidden()
    return str(page.locator("#problem").text_content())


def test_broken_file_shows_the_endpoints_sentence_and_its_request(page: Page, url: str, files: Files) -> None:
    data = quarters("JPEG")[:300]
    choose(page, files("broken.jpg", data))
    said = refusal(page)
    assert requests.post(f"{url}/predict/digits", data=data, timeout=30).json()["error"] in said
    assert "HTTP 422 · image_" in said
    assert len(str(page.locator("#problem code").text_content())) == 32
    assert page.locator("#again").is_hidden()
    choose(page, files("four.png", quarters("PNG")))
    assert page.locator("#problem p").count() == 0


def test_file_that_is_no_image_is_refused_as_one_whatever_it_is_called(page: Page, files: Files) -> None:
    choose(page, files("words.json", b'{"images": []}'))
    assert "HTTP 415 · image_format" in refusal(page)
    assert "This browser cannot show it" in str(page.locator("#file-name").text_content())


def test_too_large_a_file_says_so(page: Page, files: Files) -> None:
    choose(page, files("noise.png", b"\x89PNG\r\n\x1a\n" + bytes(2 * MOST_BYTES)))
    assert f"The body is larger than {MOST_BYTES} bytes." in refusal(page)


def test_busy_endpoint_says_when_to_try_again_and_is_tried_again(page: Page, reached: Models, files: Files) -> None:
    reached.failures.append(BackPressureError(9, 8))
    choose(page, files("four.png", quarters("PNG")))
    assert "The endpoint asks to wait 1 second before the next try." in refusal(page)
    page.locator("#again").click()
    page.wait_for_selector("#rows tr")
    assert page.locator("#problem p").count() == 0


RENEWED = "The list of models has been renewed; try again."


def swap(gate: Gate) -> None:
    """Have the next version of every model served instead."""
    after = [replace(one, version=f"{int(one.version) + 1}") for one in gate.roster.versions]
    gate.roster = Roster.of([Standing(one.name, one) for one in after])


def test_version_that_is_no_longer_served_renews_the_list_and_keeps_the_model(
    page: Page, gate: Gate, files: Files
) -> None:
    page.select_option("#model", "insects")
    swap(gate)
    choose(page, files("four.png", quarters("PNG")), "insects")
    assert refusal(page).startswith(
        f"insects: version 1 is not served, version 2 is.{RENEWED}HTTP 404 · unknown_version"
    )
    assert [page.locator(f"#{part}").input_value() for part in ("model", "version")] == ["insects", "2"]
    assert texts(page, "#version option") == ["2"]
    assert "/versions/2" in str(page.locator("#curl").text_content())
    page.locator("#again").click()
    page.wait_for_selector("#result:not([hidden])")
    assert "insects, version 2" in str(page.locator("#result-model").text_content())
    assert page.locator("#problem p").count() == 0


def test_model_that_is_no_longer_served_leaves_the_list_and_another_can_be_asked(
    page: Page, gate: Gate, files: Files
) -> None:
    live = gate.roster.standings["digits"].live
    assert live
    page.select_option("#model", "markup")
    older = replace(live, version="1", alias=None)  # the number that markup had
    gate.roster = Roster.of([Standing("digits", live, kept=(older,))])
    choose(page, files("four.png", quarters("PNG")), "markup")
    said = refusal(page)
    assert RENEWED in said
    assert "HTTP 404 · unknown_model" in said
    assert texts(page, "#model option") == ["digits"]
    assert texts(page, "#version option") == ["3 (champion)", "1"]
    page.locator("#again").click()
    page.wait_for_selector("#result:not([hidden])")
    assert "digits, version 3 (champion)" in str(page.locator("#result-model").text_content())


def test_list_that_cannot_be_renewed_says_why_and_is_renewed_by_the_next_try(
    page: Page, gate: Gate, files: Files
) -> None:
    before, gate.roster = gate.roster, Roster.of([])
    choose(page, files("four.png", quarters("PNG")))
    assert "No model is served here yet." in refusal(page)
    gate.roster = before
    swap(gate)
    page.locator("#again").click()
    page.wait_for_selector(f"#problem :text('{RENEWED}')")
    page.locator("#again").click()
    page.wait_for_selector("#result:not([hidden])")
    assert "digits, version 4" in str(page.locator("#result-model").text_content())


def test_other_refusal_with_404_renews_nothing(page: Page, files: Files) -> None:
    asked = list[str]()
    page.on("request", lambda request: asked.append(request.url))
    page.route("**/predict/**", lambda route: route.fulfill(status=404, body="none", content_type="text/plain"))
    choose(page, files("four.png", quarters("PNG")))
    assert RENEWED not in refusal(page)
    assert [one for one in asked if one.endswith("/models")] == []


def test_endpoint_that_is_away_says_so_and_is_tried_again(page: Page, files: Files) -> None:
    page.context.set_offline(True)
    choose(page, files("four.png", quarters("PNG")))
    assert "does not answer" in refusal(page)
    page.context.set_offline(False)
    page.locator("#again").click()
    page.wait_for_selector("#rows tr")


@pytest.mark.parametrize(("body", "words"), [("no room", "The server refused: no room"), ("<b>x</b>", "<b>x</b>")])
def test_plain_refusal_in_front_of_the_application_is_shown_as_text(
    page: Page, files: Files, body: str, words: str
) -> None:
    page.route("**/predict/**", lambda route: route.fulfill(status=503, body=body, content_type="text/html"))
    choose(page, files("four.png", quarters("PNG")))
    assert words in refusal(page)
    assert page.locator("#problem b").count() == 0


def test_endpoint_with_keys_asks_for_one_and_sends_it_from_then_on(page: Page, reached: Models, files: Files) -> None:
    assert page.locator("#key-form").is_hidden()
    reached.needs_key = True
    page.reload()
    page.wait_for_selector("#key-form:not([hidden])")
    assert "Expected a key" in refusal(page)
    assert page.evaluate("document.activeElement.id") == "key"
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    page.wait_for_selector("#key[aria-invalid=true]")
    page.locator("#key").fill(KEY)
    page.keyboard.press("Enter")
    page.wait_for_selector("#model option", state="attached")
    assert page.locator("#key-form").is_hidden()
    choose(page, files("four.png", quarters("PNG")))
    assert page.locator("#rows tr").count() == 5
    said = str(page.locator("#code").text_content())
    assert "Authorization: Bearer $VENTRAL_KEY" in said
    assert KEY not in said
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]


def test_key_that_is_revoked_is_asked_for_again_and_the_picture_is_answered(
    page: Page, reached: Models, files: Files
) -> None:
    reached.needs_key = True
    choose(page, files("four.png", quarters("PNG")))
    assert "HTTP 401" in refusal(page)
    page.locator("#key").fill(KEY)
    page.keyboard.press("Enter")
    page.wait_for_selector("#rows tr")


# For everybody


def test_page_is_used_with_the_keyboard_alone(page: Page, files: Files) -> None:
    def tab_to(identity: str) -> None:
        for _ in range(20):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.id") == identity:
                return
        pytest.fail(f"no tab leads to {identity}")

    tab_to("model")
    page.keyboard.type("insects")
    assert page.locator("#version").input_value() == "1"
    tab_to("file")
    assert page.evaluate("getComputedStyle(document.querySelector('#file-label')).outlineStyle") == "solid"
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Space")
    chooser.value.set_files(files("four.png", quarters("PNG")))
    settle(page)
    tab_to("score")
    for _ in range(60):
        page.keyboard.press("ArrowLeft")
    assert page.locator("#score").input_value() == "5"
    page.keyboard.press("Tab")
    assert page.locator("#rows tr.on").count() == 1
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_every_control_has_a_name_and_what_changes_is_told(page: Page, files: Files) -> None:
    choose(page, files("four.png", quarters("PNG")), "insects")
    slide(page, 30)
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, a, img")].filter((one) => {
            const name = one.labels?.[0]?.textContent || one.textContent || one.alt;
            return !name?.trim() && one.getAttribute("alt") !== "";
        }).map((one) => one.outerHTML)"""
    )
    assert nameless == []
    levels = page.evaluate(
        "[...document.querySelectorAll('h1, h2, h3')].filter((one) => one.checkVisibility()).map((one) => one.tagName)"
    )
    assert levels == ["H1", "H2", "H3", "H2", "H3", "H3"]
    assert page.locator("[role=status]").count() == page.locator("[role=alert]").count() == 1
    assert "objects" in str(page.locator("#score").get_attribute("aria-valuetext"))
    assert str(page.locator("#picture").get_attribute("alt")) == "The chosen picture, 200 by 120 pixels"
    assert page.locator("main").get_by_role("button", name="Copy").count() == 2


CONTRASTS = """() => {
    const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
        .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, at) => sum + v * [0.2126, 0.7152, 0.0722][at], 0);
    const behind = (one) => {
        const found = one ? numbers(getComputedStyle(one).backgroundColor) : [0, 0, 0];
        return found.length < 4 || found[3] > 0 ? found : behind(one.parentElement);
    };
    const written = [...document.querySelectorAll("body *")].filter((one) => one.checkVisibility() &&
        [...one.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim()));
    return written.map((one) => {
        const pair = [light(numbers(getComputedStyle(one).color)), light(behind(one))].sort((a, b) => b - a);
        return [(pair[0] + 0.05) / (pair[1] + 0.05), one.tagName + " " + one.textContent.slice(0, 40)];
    });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_in_either_scheme(page: Page, files: Files, scheme: Any) -> None:
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    for name, data, model in [
        ("four.png", quarters("PNG"), "digits"),
        ("four.png", quarters("PNG"), "insects"),
        ("broken.jpg", b"no", "digits"),
    ]:
        choose(page, files(name, data), model)
        if model == "insects":
            slide(page, 20)
        found = page.evaluate(CONTRASTS)
        assert len(found) > 12
        assert [(round(ratio, 2), text) for ratio, text in found if ratio < 4.5] == []
    assert page.evaluate("document.getAnimations().length") == 0


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_page_never_scrolls_sideways(page: Page, files: Files, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 700})
    for model in ("digits", "insects", "markup"):
        choose(page, files("a" * 120 + ".png", quarters("PNG")), model)
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


def test_page_without_scripts_says_what_to_do(browser: Browser, url: str) -> None:
    context = browser.new_context(java_script_enabled=False)
    shown = context.new_page()
    shown.goto(url)
    assert "POST /predict/<model>" in str(shown.locator("noscript").text_content())
    context.close()
