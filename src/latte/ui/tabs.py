# SPDX-License-Identifier: Apache-2.0
"""What the tabs share, and the tabs that make and show clips: Generate, Compare, Gallery. It needs gradio."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Collection
from typing import Any

import gradio as gr

from latte.checks import RunError, check, choose
from latte.diffusion.config import SAMPLERS
from latte.inference.quality import QUALITIES
from latte.page import html
from latte.ui import views
from latte.ui.clips import (
    MAX_COUNT,
    MAX_PROMPT,
    MAX_STEPS,
    ClipSettings,
    Output,
    Studio,
    difference,
    seeds,
    whole,
)
from latte.ui.desk import Desk, Job, explain
from latte.ui.shelf import PER_PAGE, DataSet, Shelf, UiConfig, open_data

POLL = 0.15  # seconds between two looks at a job
OWN = "the model's own"
EXAMPLE = "a red ball bounces over a blue floor, moving right"
LIVE: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden"}
QUICK: dict[str, Any] = {"show_progress": "hidden"}
Show = Callable[[list[Output]], html.Html]


class Page:
    """What the tabs have in common: the shelf, the desk, the studio, and the data sets that are open."""

    def __init__(self, config: UiConfig):
        self.config = config
        self.shelf = Shelf(config)
        self.desk = Desk()
        self.studio = Studio(self.shelf)
        self.signalled: set[int] = set()
        self.opened: dict[str, DataSet] = {}
        self.opening = threading.Lock()

    async def follow(self, work: Callable[[Job], Any], owner: str) -> AsyncIterator[Job]:
        """Submit ``work`` and yield its job whenever it has changed, finished at last; cancel it when the
        visitor has left. RunError when the queue is full.
        """
        job = self.desk.submit(work, owner)
        seen = None
        try:
            while not job.finished.is_set():
                now = (job.state, job.step, self.desk.position(job))
                if now != seen:
                    yield job
                seen = now
                await asyncio.sleep(POLL)
        finally:
            self.desk.cancel(job)
        yield job

    async def stage(
        self, work: Callable[[Job], list[Output]], owner: str, show: Show | None = None
    ) -> AsyncIterator[html.Html]:
        """Run ``work`` and yield what the page shows: queue, preview, and the clips as ``show`` does."""
        try:
            async for job in self.follow(work, owner):
                if job.state == "done":
                    yield (show or self.show)(job.result)
                elif job.state == "failed":
                    yield views.fault(job.error)
                elif job.state == "cancelled":
                    yield views.empty("Cancelled.")
                else:
                    yield views.progress(job, self.desk.position(job))
        except RunError as error:
            yield views.fault(str(error))

    def show(self, outputs: list[Output]) -> html.Html:
        """Return generated clips."""
        return views.clips(outputs, self.config.out)

    def settings(self, model: str, condition: Any, upload: str | None, *own: Any) -> ClipSettings:
        """Return the values of the page's fields as settings; InputError for those that do not fit."""
        quality, sampler, steps, guidance, negative = own
        choose("model", model, self.shelf.models())
        return ClipSettings(
            model,
            str(condition or ""),
            str(negative or ""),
            chosen(quality),
            chosen(sampler),
            steps and whole("steps", steps),
            guidance,
            self.studio.keep_image(upload),
        )

    def data(self, name: str, again: bool = False) -> DataSet:
        """Return a data set, scanned at its first use and on demand; InputError for an unknown name."""
        root = choose("data set", name, self.shelf.data())
        with self.opening:
            if again or name not in self.opened:
                self.opened[name] = open_data(name, root)
            return self.opened[name]


def chosen(name: str | None) -> str | None:
    """Return the name of a field with choices, None for the model's own."""
    return {OWN: None}.get(name or OWN, name)


def guarded(work: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``work`` that shows the message of an error in the place of its result."""

    def safe(*values: Any) -> Any:
        try:
            return work(*values)
        except Exception as error:
            return views.fault(explain(error))

    return safe


def offered(name: str | None, table: Collection[str]) -> Any:
    """Return the update of a field to the names of ``table``; ``name`` stays if it is one of them."""
    names = list(table)
    return gr.update(choices=names, value=name if name in names else next(iter(names), None))


def own_fields() -> tuple[Any, ...]:
    """Return the fields of sampling: quality, sampler, steps, guidance, negative prompt."""
    quality = gr.Radio([OWN, *QUALITIES], value=OWN, label="Quality", info="Sampler and steps by one word")
    with gr.Accordion("Sampler, steps, guidance", open=False):
        sampler = gr.Dropdown([OWN, *SAMPLERS], value=OWN, label="Sampler")
        with gr.Row():
            steps = gr.Number(
                None, label="Steps", minimum=1, maximum=MAX_STEPS, precision=0, placeholder=OWN, min_width=100
            )
            guidance = gr.Number(
                None, label="Guidance", minimum=0, maximum=50, step=0.1, placeholder=OWN, min_width=100
            )
        negative = gr.Textbox(label="Negative prompt", info="For text models", max_length=MAX_PROMPT)
    return quality, sampler, steps, guidance, negative


def buttons(page: Page, word: str) -> gr.Button:
    """Return the button that starts, beside one that cancels all jobs of the visitor."""
    with gr.Row():
        start = gr.Button(word, variant="primary", elem_id=word.lower())
        stop = gr.Button("Cancel", elem_id=f"cancel-{word.lower()}")

    def cancel(request: gr.Request) -> None:
        page.desk.cancel_all(request.session_hash or "")

    stop.click(cancel, None, None, **LIVE)
    return start


def generate_tab(page: Page, blocks: gr.Blocks) -> None:
    """Build the tab that generates from a prompt, a class or a first frame."""
    with gr.Row():
        with gr.Column(scale=5):
            model = gr.Dropdown(list(page.shelf.models()), label="Model", filterable=False)
            about = gr.HTML(views.note("loading the model"), padding=False)
            prompt = gr.Textbox(
                label="Prompt", value=EXAMPLE, placeholder=EXAMPLE, max_length=MAX_PROMPT, visible=False
            )
            label = gr.Radio([], label="Class", visible=False)
            with gr.Row():
                seed = gr.Number(0, label="Seed", minimum=0, precision=0, min_width=100)
                count = gr.Slider(1, MAX_COUNT, 1, step=1, label="Clips", min_width=100)
            start = buttons(page, "Generate")
            own = own_fields()
            with gr.Accordion("First frame", open=False):
                image = gr.File(type="filepath", label="PNG, JPEG or WebP", height=120, buttons=[])
        with gr.Column(scale=6):
            stage = gr.HTML(views.empty("The clip appears here"), elem_id="stage", padding=False)

    async def describe(request: gr.Request, name: str) -> AsyncIterator[Any]:
        async for fields in described(page, name, request.session_hash or ""):
            yield fields

    async def generate(
        request: gr.Request, name, prompt, label, seed, count, image, *own
    ) -> AsyncIterator[Any]:
        try:
            settings = page.settings(name, label or prompt, image, *own)
            numbers = seeds(whole("the seed", seed), whole("the number of clips", count))
        except Exception as error:
            yield views.fault(explain(error))
            return

        def work(job: Job) -> list[Output]:
            return [page.studio.make(job, settings, n, i, len(numbers)) for i, n in enumerate(numbers)]

        async for shown in page.stage(work, request.session_hash or ""):
            yield shown

    for event in (start.click, prompt.submit):
        event(generate, [model, prompt, label, seed, count, image, *own], stage, **LIVE)
    model.change(describe, model, [about, prompt, label], **LIVE)

    def names(name: str | None) -> Any:
        return offered(name, page.shelf.models())

    blocks.load(names, model, model, **QUICK)
    blocks.load(describe, model, [about, prompt, label], **LIVE)


async def described(page: Page, name: str, owner: str) -> AsyncIterator[tuple[Any, Any, Any]]:
    """Load a model and yield what the fields (about, prompt, label) show of it."""
    keep = gr.skip()
    try:
        async for job in page.follow(lambda job: page.studio.describe(job, name), owner):
            if job.state == "failed":
                yield views.fault(job.error), keep, keep
            elif job.state != "done":
                yield views.note("loading the model"), keep, keep
            else:
                classes = job.result["classes"]
                prompt = gr.update(visible=job.result["text"], value="")
                if job.result["text"]:
                    prompt = gr.update(visible=True)
                label = gr.update(visible=False, value=None)
                if classes:
                    label = gr.update(visible=True, choices=[*classes, "none"], value=classes[0])
                yield views.note(job.result["about"]), prompt, label
    except RunError as error:
        yield views.fault(str(error)), keep, keep


def compare_tab(page: Page, tab: gr.Tab) -> None:
    """Build the tab that generates one seed with two settings."""
    names = list(page.shelf.models())
    with gr.Row():
        condition = gr.Textbox(
            label="Prompt or class", value=EXAMPLE, placeholder=EXAMPLE, max_length=MAX_PROMPT, scale=4
        )
        seed = gr.Number(0, label="Seed", minimum=0, precision=0, scale=1)
    sides = []
    with gr.Row():
        for side in "AB":
            with gr.Column():
                model = gr.Dropdown(names, label=f"Model {side}", filterable=False)
                sides.append([model, *own_fields()])
    start = buttons(page, "Compare")
    stage = gr.HTML(
        views.note("Both clips start from the noise of the same seed."), elem_id="comparison", padding=False
    )

    async def compare(request: gr.Request, condition, seed, *values) -> AsyncIterator[Any]:
        half = len(values) // 2
        try:
            halves = (values[:half], values[half:])
            two = [page.settings(part[0], condition, None, *part[1:]) for part in halves]
            number = seeds(whole("the seed", seed), 1)[0]
        except Exception as error:
            yield views.fault(explain(error))
            return

        def work(job: Job) -> list[Output]:
            return [page.studio.make(job, settings, number, i, 2) for i, settings in enumerate(two)]

        def show(outputs: list[Output]) -> html.Html:
            folder = page.config.out
            apart = difference(*(folder / output.file for output in outputs))
            words = "The clips differ in size."
            if apart is not None:
                words = f"Mean difference of a pixel: {apart:.2f} of 255."
            return html.tag("div", {}, views.clips(outputs, folder, "pair"), views.note(words))

        async for shown in page.stage(work, request.session_hash or "", show):
            yield shown

    def names_now(name: str | None) -> Any:
        return offered(name, page.shelf.models())

    for side in sides:
        tab.select(names_now, side[0], side[0], **QUICK)
    fields = [condition, seed, *sides[0], *sides[1]]
    start.click(compare, fields, stage, **LIVE)
    condition.submit(compare, fields, stage, **LIVE)


def gallery_tab(page: Page, tab: gr.Tab) -> None:
    """Build the tab with the clips of the folder of outputs."""
    with gr.Row():
        number = gr.Number(1, label="Page", minimum=1, precision=0, scale=1)
        again = gr.Button("Refresh", scale=1)
    stage = gr.HTML(elem_id="gallery", padding=False)

    @guarded
    def show(number: Any) -> html.Html:
        outputs = page.studio.outputs()
        pages = max(1, -(-len(outputs) // PER_PAGE))
        at = whole("page", number)
        check(1 <= at <= pages, f"page must be in [1, {pages}], got {at}")
        words = (
            f"{len(outputs)} clips, page {at} of {pages}; each is deleted {page.config.keep_hours:g} hours "
            "after it was made. A command generates the same clip again; click it to select all of it."
        )
        found = outputs[PER_PAGE * (at - 1) : PER_PAGE * at]
        return html.tag("div", {}, views.note(words), views.clips(found, page.config.out, "cards"))

    for event in (tab.select, again.click, number.change):
        event(show, number, stage, **QUICK)
