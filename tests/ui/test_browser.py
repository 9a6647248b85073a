# SPDX-License-Identifier: Apache-2.0
"""The page in headless Chromium: load, generate, play, cancel, compare, gallery, follow, data, report; no
console error and no request to another host.
"""

import json
import shutil
from urllib.parse import urlsplit

import pytest

from ui.server import served

pytest.importorskip("gradio", reason="needs gradio: pip install 'latte-video[ui]'")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs the program chromium")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    run = folder / "runs" / "first"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("train:\n  steps: 100\n")
    lines = [{"step": n, "loss": 2 - n / 50, "lr": 0.1, "seconds": n / 2} for n in range(1, 41)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "report.html").write_text("<!DOCTYPE html><title>a</title><h1>A report</h1>")
    with served(folder) as found:
        yield found


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.nightly)])
def test_every_tab_works_without_an_error_and_without_another_host(address, scheme):
    hosts = set()
    complaints = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(color_scheme=scheme)
        page.set_default_timeout(60_000)
        page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
        page.on("console", lambda line: complaints.append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("response", lambda answer: complaints.append(answer.url) if answer.status >= 400 else None)
        page.goto(address)
        page.wait_for_selector("text=4 frames of 16 x 16")

        page.get_by_label("Seed").first.fill("300")
        page.click("#generate")
        page.wait_for_selector("#stage img.pixels")
        page.wait_for_selector("#stage video")
        page.wait_for_function("() => document.querySelector('#stage video').currentTime > 0.05")
        page.get_by_label("Seed").first.fill("60000")
        page.click("#generate")
        page.wait_for_selector("#stage img.pixels")
        page.click("#cancel-generate")
        page.wait_for_selector("text=Cancelled.")

        page.get_by_role("tab", name="Compare").click()
        page.get_by_label("Seed").nth(1).fill("20")
        page.click("#compare")
        page.wait_for_function("() => document.querySelectorAll('#comparison video').length == 2")
        page.wait_for_selector("text=Mean difference of a pixel: 0.00")
        page.get_by_role("tab", name="Gallery").click()
        page.wait_for_function("() => document.querySelectorAll('#gallery video').length >= 3")
        page.get_by_role("tab", name="Follow a run").click()
        page.wait_for_selector("#plots svg")
        page.wait_for_selector("text=step 40 of 100; not training")
        page.get_by_role("tab", name="Data").click()
        page.click("#open-data")
        page.wait_for_selector("#data .card img")
        page.get_by_role("tab", name="Reports").click()
        page.frame_locator("iframe.report").locator("text=A report").wait_for()
        browser.close()
    assert hosts - {""} == {address.removeprefix("http://")}
    assert complaints == []
