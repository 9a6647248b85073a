# SPDX-License-Identifier: Apache-2.0
"""What the page shows, as HTML: the state of a job, clips that play, cards, and the style of all of it."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from latte.checks import printable
from latte.page import html
from latte.ui.desk import Job

if TYPE_CHECKING:
    from latte.ui.clips import Output

STYLE = (
    f"""
.gradio-container{{{html.LIGHT}}}.dark .gradio-container,.gradio-container.dark{{{html.DARK}}}
.latte{{{html.PLOTS}}}
"""
    + """.gradio-container{--soft:var(--body-text-color-subdued);--rule:var(--border-color-primary);
--card:var(--background-fill-primary);max-width:1180px!important}
.latte{color:var(--body-text-color);font-size:14px;line-height:1.5;margin:2px 0 10px}
.latte .soft,.latte .caption+.soft,.latte th,.latte details,.latte .plots figcaption{color:var(--soft);
font-size:13px}
.latte .pixels,.latte video{display:block;width:100%;border-radius:8px;image-rendering:pixelated;
background:var(--rule)}
.latte .stage{max-width:440px;margin:0 auto;display:grid;gap:12px}
.latte .empty{display:grid;place-items:center;aspect-ratio:1;border:1px dashed var(--rule);
border-radius:8px;
color:var(--soft);text-align:center;padding:16px}
.latte .bar{height:6px;border-radius:3px;background:var(--rule);overflow:hidden}
.latte .bar div{height:100%;background:var(--s0)}
.latte .fault{border:1px solid var(--s1);border-radius:8px;padding:8px 12px;overflow-wrap:anywhere}
.latte pre{margin:6px 0 0;padding:8px 10px;border:1px solid var(--rule);border-radius:8px;
white-space:pre-wrap;
overflow-wrap:anywhere;font:12px/1.5 ui-monospace,monospace;background:var(--background-fill-secondary);
user-select:all}
.latte a{margin:0!important;padding:0!important;color:var(--s0);text-decoration:none}
.latte a:hover{text-decoration:underline}
.latte .cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(200px,1fr));gap:16px}
.latte .pair{display:grid;grid-template-columns:1fr 1fr;gap:16px}
.latte .small{grid-template-columns:repeat(auto-fill,minmax(130px,1fr))}
.latte .card{min-width:0;overflow-wrap:anywhere}.latte .caption{margin-top:6px}
.latte .plots section{display:grid;gap:16px;
grid-template-columns:repeat(auto-fit,minmax(min(400px,100%),1fr))}.latte .plots h2{display:none}
.latte .plots section>*{margin:0;padding:12px 14px;border:1px solid var(--rule);border-radius:8px;min-width:0}
.latte .scroll{overflow-x:auto;margin-top:16px}
.latte table,.latte tr,.latte th,.latte td{border:0!important;font-size:13px;border-collapse:collapse}
.latte th,.latte td{padding:4px 16px 4px 0;border-bottom:1px solid var(--rule)!important;text-align:left;
vertical-align:top}
.latte .report{width:100%;height:75vh;border:1px solid var(--rule);border-radius:8px;background:var(--card)}
"""
)


def wrap(*parts: object) -> html.Html:
    """Return parts in the style of the page."""
    return html.tag("div", {"class": "latte"}, *parts)


def note(text: str) -> html.Html:
    """Return a quiet line."""
    return wrap(html.tag("div", {"class": "soft"}, printable(text)))


def fault(text: str) -> html.Html:
    """Return a message about what went wrong."""
    return wrap(html.tag("div", {"class": "fault", "role": "alert"}, printable(text)))


def empty(text: str) -> html.Html:
    """Return the place of a clip that is not there yet."""
    return wrap(html.tag("div", {"class": "stage"}, html.tag("div", {"class": "empty"}, text)))


def progress(job: Job, before: int) -> html.Html:
    """Return the state of an unfinished job: its place in the queue, or its preview and its steps."""
    if job.state == "waiting":
        return empty(f"Waiting: {before} before this one.")
    done = job.step / max(job.steps, 1)
    bar = html.tag("div", {"class": "bar"}, html.tag("div", {"style": f"width:{done:.0%}"}))
    words = f"step {job.step} of {job.steps}" if job.steps else "loading the model"
    picture = html.tag("div", {"class": "empty"}, "Preview after the first step")
    if job.shown is not None:
        picture = html.tag("img", {"class": "pixels", "src": html.animation(job.shown), "alt": "preview"})
    state = html.tag("div", {"class": "soft"}, words)
    return wrap(html.tag("div", {"class": "stage"}, picture, bar, state))


def player(file: Path, alt: str = "") -> html.Html:
    """Return a clip that plays."""
    play = dict.fromkeys(("autoplay", "loop", "muted", "playsinline", "controls"), "")
    try:
        content = file.read_bytes()
    except OSError:
        return html.tag("div", {"class": "empty"}, "This clip was deleted.")
    return html.tag("video", {"src": html.data_uri("video/mp4", content), **play, "aria-label": alt})


def clip(output: "Output", folder: Path) -> html.Html:
    """Return a generated clip with its download and its command."""
    settings = output.settings
    video = player(folder / output.file, settings.condition)
    parts = [video, html.tag("div", {"class": "caption"}, printable(settings.condition or "no condition"))]
    age = round((time.time() - output.made) / 60)
    when = f"{age} min ago" if age else "now"
    link = html.tag("span", {})
    try:
        content = html.data_uri("video/mp4", (folder / output.file).read_bytes())
        link = html.tag("a", {"href": content, "download": f"latte-{output.id[:8]}.mp4"}, "download")
    except OSError:
        pass  # the player has said so
    facts = f"{settings.model}, seed {output.seed}, {output.seconds:.1f} s, {when}"
    parts += [html.tag("div", {"class": "soft"}, facts), link, html.tag("pre", {}, output.command)]
    return html.tag("div", {"class": "card"}, *parts)


def clips(outputs: Sequence["Output"], folder: Path, look: str = "") -> html.Html:
    """Return generated clips in cards, pairs or one stage; by default as their number demands."""
    cards = [clip(output, folder) for output in outputs]
    return wrap(html.tag("div", {"class": look or ("stage" if len(cards) == 1 else "cards")}, *cards))


def sample_cards(paths: Sequence[Path]) -> html.Html:
    """Return the samples of a run: its clips, or the sheet where there are none."""
    cards = []
    for path in paths:
        shown = player(path, path.stem)
        if path.suffix == ".png":
            shown = html.tag("img", {"src": html.data_uri("image/png", path.read_bytes()), "alt": path.stem})
        cards.append(html.tag("div", {"class": "card"}, shown, html.tag("div", {"class": "soft"}, path.stem)))
    return wrap(html.tag("div", {"class": "cards small"}, *cards))
