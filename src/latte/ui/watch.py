# SPDX-License-Identifier: Apache-2.0
"""The tabs that look at what is there: a run that trains, data sets, reports. It needs gradio."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.themes import Base

from latte.checks import choose
from latte.page import html
from latte.ui import runs, shelf, views
from latte.ui.clips import MAX_PROMPT, Output, seeds, whole
from latte.ui.desk import Job, explain
from latte.ui.tabs import (
    LIVE,
    OWN,
    QUICK,
    Page,
    buttons,
    compare_tab,
    gallery_tab,
    generate_tab,
    guarded,
    offered,
)

REFRESH = 4.0  # seconds between two looks at a run


def look() -> dict[str, Any]:
    """Return theme and style: fonts of the system, colours of gradio's plain theme."""
    fonts = ["system-ui", "sans-serif"]
    theme = Base(primary_hue="blue", neutral_hue="stone", font=fonts, font_mono=["ui-monospace", "monospace"])
    return {"theme": theme, "css": views.STYLE}


def build(page: Page) -> gr.Blocks:
    """Return the page."""
    with gr.Blocks(title="Latte", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        with gr.Tab("Generate"):
            generate_tab(page, blocks)
        with gr.Tab("Compare") as compare:
            compare_tab(page, compare)
        with gr.Tab("Gallery") as gallery:
            gallery_tab(page, gallery)
        with gr.Tab("Follow a run") as follow:
            follow_tab(page, follow)
        with gr.Tab("Data"):
            data_tab(page)
        with gr.Tab("Reports") as reports:
            reports_tab(page, reports)

        def leave(request: gr.Request) -> None:
            page.desk.cancel_all(request.session_hash or "")

        blocks.unload(leave)
    return blocks


def follow_tab(page: Page, tab: gr.Tab) -> None:
    """Build the tab that follows a run, pauses it, tries its newest weights and continues it."""
    with gr.Row():
        name = gr.Dropdown(list(page.shelf.runs()), label="Run", filterable=False, scale=3)
        pause = gr.Button("Pause", elem_id="pause", scale=1)
        resume = gr.Button("Continue", elem_id="continue", scale=1)
    hint = "Pause saves a checkpoint at the end of the step and stops the process; Continue resumes exactly."
    words = gr.HTML(views.note(hint), padding=False)
    status = gr.HTML(elem_id="status", padding=False)
    plots = gr.HTML(elem_id="plots", padding=False)
    step = gr.Dropdown([], label="Samples of step", filterable=False)
    samples = gr.HTML(elem_id="samples", padding=False)
    try_row(page, name)
    seen = gr.State({})
    timer = gr.Timer(REFRESH)

    def folder(name: str) -> Path:
        return choose("run", name, page.shelf.runs())

    def refresh(name: str | None, seen: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
        keep = gr.skip()
        if not name:
            return views.note("No run: start latte ui with --runs FOLDER."), None, keep, seen
        try:
            state = runs.read_run(folder(name))
            lines = [name, len(state.history.metrics), len(state.history.held_out)]
            steps = [name, *state.samples]
            drawn = keep
            if lines != seen.get("lines"):
                drawn = views.wrap(runs.curves(state))
            newest = keep
            if steps != seen.get("steps"):
                newest = gr.update(choices=steps[1:], value=next(iter(steps[1:]), None))
            return views.note(state.status), drawn, newest, {"lines": lines, "steps": steps}
        except Exception as error:
            return views.fault(explain(error)), keep, keep, seen

    @guarded
    def show(name: str, step: Any) -> html.Html:
        if step is None:
            return views.note("No samples yet.")
        return views.sample_cards(choose("step", whole("step", step), runs.read_run(folder(name)).samples))

    @guarded
    def stop(name: str) -> html.Html:
        return views.note(runs.pause(folder(name), page.signalled))

    @guarded
    def proceed(name: str) -> html.Html:
        return views.note(runs.resume(folder(name)))

    pause.click(stop, name, words, **QUICK)
    resume.click(proceed, name, words, **QUICK)
    for event in (tab.select, name.change, timer.tick):
        event(refresh, [name, seen], [status, plots, step, seen], **QUICK)
    tab.select(lambda name: offered(name, page.shelf.runs()), name, name, **QUICK)
    step.change(show, [name, step], samples, **QUICK)


def try_row(page: Page, name: gr.Dropdown) -> None:
    """Build the fields that generate a clip with the newest weights of a run."""
    with gr.Row():
        condition = gr.Textbox(
            label="Try the newest weights", placeholder="a prompt or a class", max_length=MAX_PROMPT, scale=3
        )
        seed = gr.Number(0, label="Seed", minimum=0, precision=0, scale=1)
    start = buttons(page, "Try")
    stage = gr.HTML(elem_id="tried", padding=False)

    async def attempt(request: gr.Request, name, condition, seed) -> AsyncIterator[Any]:
        try:
            settings = page.settings(name, condition, None, OWN, OWN, None, None, "")
            number = seeds(whole("the seed", seed), 1)[0]
        except Exception as error:
            yield views.fault(explain(error))
            return

        def work(job: Job) -> list[Output]:
            return [page.studio.make(job, settings, number)]

        async for shown in page.stage(work, request.session_hash or ""):
            yield shown

    for event in (start.click, condition.submit):
        event(attempt, [name, condition, seed], stage, **LIVE)


def data_tab(page: Page) -> None:
    """Build the tab that shows data sets."""
    with gr.Row():
        name = gr.Dropdown(list(page.shelf.data()), label="Data set", filterable=False, scale=3)
        number = gr.Number(1, label="Page", minimum=1, precision=0, scale=1)
        start = gr.Button("Open", variant="primary", elem_id="open-data", scale=1)
    stage = gr.HTML(
        views.note("Start latte ui with --data FOLDER to see your own clips here."),
        elem_id="data",
        padding=False,
    )

    @guarded
    def show(name: str, number: Any, again: bool = False) -> html.Html:
        found = page.data(name, again)
        clips = found.page(whole("page", number))
        words = f"{found.summary}; page {whole('page', number)} of {found.pages}"
        return html.tag(
            "div", {}, views.note(words), views.wrap(shelf.clips_table(clips), shelf.skipped_table(found))
        )

    start.click(lambda name, number: show(name, number, True), [name, number], stage)
    number.change(show, [name, number], stage)


def reports_tab(page: Page, tab: gr.Tab) -> None:
    """Build the tab that opens reports of runs, evaluations and ablations."""
    name = gr.Dropdown(list(page.shelf.reports()), label="Report", filterable=False)
    stage = gr.HTML(elem_id="report", padding=False)

    @guarded
    def show(name: str | None) -> html.Html:
        if not name:
            return views.note("No report: start latte ui with --runs FOLDER, which holds runs and reports.")
        return views.wrap(shelf.report_frame(choose("report", name, page.shelf.reports())))

    def choices(name: str | None) -> Any:
        return offered(name, page.shelf.reports())

    tab.select(choices, name, name, **QUICK).then(show, name, stage, **QUICK)
    name.change(show, name, stage, **QUICK)
