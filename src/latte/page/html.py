# SPDX-License-Identifier: Apache-2.0
"""A page of results: tables, images and clips in one HTML file that loads nothing from elsewhere.

A page is a tree of ``tag`` calls. Text is escaped unless it is ``Html`` already, so no value can become
markup. The result is well-formed XML, follows the reader's light or dark theme, and embeds images or names
files beside it.
"""

import base64
import io
import math
import mimetypes
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from latte.checks import check

VOID = {"br", "img", "input", "link", "meta"}

# Colours of the lines of plots, and the look of plots on any page that defines --soft and --rule.
LIGHT = "--s0:#2f6fde;--s1:#d9730d;--s2:#2b9357;--s3:#8a4fd3;--s4:#cf3f4a;--s5:#138a9e"
DARK = "--s0:#7aa8ff;--s1:#ffa24d;--s2:#63cf92;--s3:#c09bff;--s4:#ff8089;--s5:#55c7da"
PLOTS = """
svg{display:block;width:100%;height:auto}svg text{font:12px system-ui,sans-serif;fill:var(--soft)}
.axis,.grid{stroke:var(--rule)}.grid{opacity:.6}
.line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}.faint{stroke-width:1;opacity:.35}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:14px;color:var(--soft)}
.legend i{display:inline-block;width:18px;height:3px;margin-right:6px;vertical-align:4px}
.switch{font-size:13px;color:var(--soft)}.toggle{margin:0 6px 0 0;vertical-align:-2px}
.toggle:checked~.first,.toggle:not(:checked)~.second,[hidden]{display:none!important}
"""
COLOURS = f":root{{{LIGHT}}}@media(prefers-color-scheme:dark){{:root{{{DARK}}}}}"
STYLE = """
:root{color-scheme:light dark;--ground:#fbfaf8;--card:#fff;--ink:#23211e;--soft:#6d6860;--rule:#e3dfd8}
@media(prefers-color-scheme:dark){:root{
--ground:#191817;--card:#222120;--ink:#ebe8e2;--soft:#a09a90;--rule:#3a3835}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:16px/1.55 system-ui,sans-serif}
main{max-width:860px;margin:0 auto;padding:40px 20px 72px}
h1{font-size:30px;line-height:1.2;margin:0 0 6px}h2{font-size:20px;margin:44px 0 10px}
p{margin:8px 0;max-width:70ch}.lead,figcaption,.tile span,th,details{color:var(--soft)}
figcaption,.tile span,details{font-size:14px}figcaption,details{margin-top:8px}
figure,.tile,pre{
background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:12px 14px;margin:14px 0}
figure img,figure video{
display:block;max-width:100%;margin:0 auto;border-radius:4px}.pixels{image-rendering:pixelated}
.row{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px}.row>*{margin:0}
h3{font-size:16px;margin:18px 0 8px}
.gallery{display:flex;flex-wrap:wrap;gap:10px;margin:10px 0}
.gallery figure{margin:0;padding:8px;max-width:160px}
.gallery figcaption{overflow-wrap:anywhere;font-size:12px;margin-top:4px}
.tile b{display:block;font-size:23px;line-height:1.25}
.scroll{overflow-x:auto;margin:14px 0}table{border-collapse:collapse;font-size:15px}
th,td{padding:5px 18px 5px 0;border-bottom:1px solid var(--rule);text-align:left;vertical-align:top}
td:last-child{overflow-wrap:anywhere}
.number{text-align:right;font-variant-numeric:tabular-nums}
pre{overflow-x:auto;font:14px/1.5 ui-monospace,monospace}summary{cursor:pointer}
.slides input{width:100%;accent-color:var(--s0)}.bad{color:var(--s4)}.good{color:var(--s2)}
"""
# Shows one slide at a time. Without < and &, so that it is the same text in HTML and XML.
SCRIPT = """
document.querySelectorAll(".slides").forEach(box => {
  const slides = box.querySelectorAll(".slide");
  const range = box.querySelector("input");
  const show = () => slides.forEach((slide, k) => {
    const on = k == range.value;
    slide.hidden = !on;
    if (on) box.querySelector("output").textContent = slide.dataset.name;
    slide.querySelectorAll("video").forEach(video => {
      if (!on) return video.pause();
      video.currentTime = 0;
      video.play().catch(() => {});
    });
  });
  range.addEventListener("input", show);
  show();
});
"""


class Html(str):
    """Markup. Everything else is text and is escaped when it is put into a page."""


def tag(name: str, attributes: Mapping[str, object] | None = None, *inside: object) -> Html:
    """Return ``<name attributes>inside</name>``, without attributes that are unset (None)."""
    given = {key: value for key, value in (attributes or {}).items() if value is not None}
    written = "".join(f' {key}="{_clean(value)}"' for key, value in given.items())
    if name in VOID:
        return Html(f"<{name}{written} />")
    return Html(f"<{name}{written}>{''.join(map(_markup, inside))}</{name}>")


def _markup(part: object) -> str:
    return part if isinstance(part, Html) else _clean(part)


def _clean(value: object) -> str:
    return escape(re.sub(r"[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "", str(value)))


def number(value: float, digits: int = 4) -> str:
    """Return a number for people: ``digits`` significant digits, thousands separated, no trailing zeros."""
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return str(value)
    if not 1e-4 <= abs(value) < 1e9:
        return f"{value:.{digits}g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{decimals}f}"
    if "." in text:
        return text.rstrip("0").rstrip(".")
    return text


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Html:
    """Return a table; columns of numbers are aligned to the right."""
    body = [list(row) for row in rows]
    right = [bool(body) and all(isinstance(row[k], int | float) for row in body) for k in range(len(columns))]

    def cell(kind: str, k: int, value: object) -> Html:
        if isinstance(value, float):
            value = number(value)
        elif type(value) is int:
            value = f"{value:,}"
        return tag(kind, {"class": "number" if right[k] else None}, value)

    head = tag("tr", {}, *(cell("th", k, name) for k, name in enumerate(columns)))
    lines = [tag("tr", {}, *(cell("td", k, value) for k, value in enumerate(row))) for row in body]
    return tag("div", {"class": "scroll"}, tag("table", {}, tag("thead", {}, head), tag("tbody", {}, *lines)))


def media(
    path: Path, caption: str = "", *, beside: Path | None = None, width: int | None = None, plays: bool = True
) -> Html:
    """Return an image, gif or mp4, ``width`` pixels wide with sharp pixels if given.

    A video ``plays`` by itself, or when the slide that it is on is shown.
    The file goes into the page as a data URI; with ``beside`` (the page's folder, which must hold it) the
    page only names it.
    """
    kind = mimetypes.guess_type(path.name)[0] or ""
    known = kind.startswith(("image/", "video/"))
    check(known, f"{path.name!r} is neither an image nor a video; give a png, jpg, gif or mp4 file")
    if beside is None:
        source = data_uri(kind, path.read_bytes())
    else:
        source = quote(path.resolve().relative_to(beside.resolve()).as_posix())
    looks = {"src": source, "width": width, "class": "pixels" if width else None}
    if kind.startswith("video/"):
        play = dict.fromkeys(("loop", "muted", "playsinline"), "")
        play |= {"autoplay": ""} if plays else {"preload": "none"}
        shown = tag("video", {**looks, **play}, caption)
    else:
        shown = tag("img", {**looks, "alt": caption})
    return framed(shown, caption)


def framed(shown: Html, caption: str = "") -> Html:
    """Return a picture or video in a frame, over its caption if it has one."""
    return tag("figure", {}, shown, *([tag("figcaption", {}, caption)] if caption else []))


def data_uri(kind: str, content: bytes) -> str:
    """Return a file's ``content`` of MIME type ``kind`` as an address that holds it."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def animation(frames: Iterable[Any], fps: float = 8) -> str:
    """Return frames, uint8 (h w c) each, as the data URI of a picture that plays."""
    from PIL import Image

    pictures = [Image.fromarray(frame) for frame in frames]
    file = io.BytesIO()
    delay = max(round(1000 / fps), 20)
    moving = {"save_all": True, "append_images": pictures[1:], "duration": delay, "loop": 0}
    pictures[0].save(file, "WEBP", quality=60, method=0, **moving)
    return data_uri("image/webp", file.getvalue())


def slides(name: str, parts: Sequence[tuple[str, Html]]) -> Html:
    """Return parts, each with its label, of which one is shown: a slider chooses, at first the last one.

    Without scripts the last one is shown.
    """
    last = len(parts) - 1
    shown = [
        tag("div", {"class": "slide", "data-name": label, "hidden": None if k == last else ""}, part)
        for k, (label, part) in enumerate(parts)
    ]
    chooser = {"type": "range", "min": 0, "max": last, "value": last, "aria-label": name}
    label = tag("p", {}, f"{name} ", tag("output", {}, parts[-1][0]))
    return tag("div", {"class": "slides"}, label, tag("input", chooser) if last else Html(), *shown)


def row(*parts: Html) -> Html:
    """Return parts side by side, as many as fit the window."""
    return tag("div", {"class": "row"}, *parts)


def gallery(*parts: Html) -> Html:
    """Return small clips next to each other, at their own size."""
    return tag("div", {"class": "gallery"}, *parts)


def tiles(numbers: Mapping[str, object]) -> Html:
    """Return a few headline numbers: name -> value."""
    items = (
        tag("div", {"class": "tile"}, tag("b", {}, value), tag("span", {}, name))
        for name, value in numbers.items()
    )
    return row(*items)


def command(line: str) -> Html:
    """Return a command line to copy."""
    return tag("pre", {}, line)


def prose(text: str) -> Html:
    """Return a paragraph."""
    return tag("p", {}, text)


def section(heading: str, *parts: Html) -> Html:
    """Return a heading and its parts."""
    return tag("section", {}, tag("h2", {}, heading), *parts)


def page(title: str, lead: str, *parts: Html) -> Html:
    """Return the whole document: title, one introductory sentence, sections."""
    head = tag(
        "head",
        {},
        tag("meta", {"charset": "utf-8"}),
        tag("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        tag("title", {}, title),
        tag("link", {"rel": "icon", "href": "data:,"}),  # else a browser asks the server for one
        tag("style", {}, Html(COLOURS + STYLE + PLOTS)),
    )
    script = [tag("script", {}, Html(SCRIPT))] if any('class="slides"' in part for part in parts) else []
    main = tag("main", {}, tag("h1", {}, title), tag("p", {"class": "lead"}, lead), *parts)
    body = tag("body", {}, main, *script)
    return Html(f"<!DOCTYPE html>\n{tag('html', {'lang': 'en'}, head, body)}\n")
