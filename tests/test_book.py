# SPDX-License-Identifier: Apache-2.0
"""The book is true: its commands exist and run, its links lead somewhere, nothing lacks a description, and
the site is built without a warning where the extra ``docs`` is installed.
"""

import json
import re
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

from book import (
    DATED,
    PAGES,
    SMALL,
    broken,
    call,
    complaint,
    has_text_models,
    inline_lines,
    prepare,
    shell_lines,
    text_of,
    words_of,
)
from tools import book as site

UNDATED = [page for page in PAGES if page not in DATED]
SHOWN_ONLY = {  # a command that a page shows and no test here runs: why
    r"^(?!latte|\.venv/bin/latte|python -m latte)": "another program",
    r"^\.venv/bin/latte demo|^latte demo": "tests/cli/test_demo.py runs it",
    r"latte ui": "a server: tests/ui",
    r"--to hub": "the network",
    r"latte data caption": "a downloaded model; tests/data/test_captioner.py makes one",
    r"latte (bench|doctor)": "measures or judges this machine",
    r"latte ablate ffs": "many runs; the sweep of shapes-tiny is run",
    r"--protocol styleganv-isv2048-ucf|UCF-101": "101 classes",
}
SMALLER = [  # (in a command, what the test writes for it)
    (r"--protocol (clean|latte-paper)( --clips \d+)?", "--protocol random-i3d --clips 4 --allow-mixed"),
    # here the autoencoder is a folder, whose place a weights folder does not record as it does a hub id
    (r"latte sample (ours|mine-weights)", r"latte sample \1 --codec-path stabilityai/sd-vae-ft-ema"),
    (r"data\.num_clips=32768", "data.num_clips=10"),
    (r"data\.hold_out=0\.02", "data.hold_out=0.2"),
    (r"--axes variant$", "--axes variant --seeds 0 --steps 2 --points 1 --heldout 4 --generated 0"),
    (r" --text-bits 8| --offload", ""),
    (r"--device cuda", ""),
    (r"--gpus \d+|--processes \d+", lambda found: found[0].split()[0] + " 2"),  # shares of two clips
    (r"--nodes \d+", "--nodes 1"),
    (r"model\.num_classes=\d+", "model.num_classes=2"),
]


@pytest.mark.parametrize("page", UNDATED)
def test_every_command_of_a_page_is_understood(page):
    text = text_of(page)
    found = [(line, complaint(line)) for line in shell_lines(text)]
    found += [(line, complaint(line, complete=False)) for line in inline_lines(text)]
    assert [(line, problem) for line, problem in found if problem] == []


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("latte brew", "brew"),
        ("latte sample --sugar 2", "--sugar"),
        ("latte train skyy", "skyy"),
        ("latte train sky train.stps=2", "train.stps"),
        ("latte train sky train.steps=many", "train.steps"),
        ("torchrun --standalone -m latte train skyy", "skyy"),
        ("python benchmarks/none.py", "none.py"),
        ("python -m pip install -e '.[sugar]'", "sugar"),
        ("brew latte", "brew"),
    ],
)
def test_a_command_that_does_not_exist_is_noticed(line, word):
    assert word in (complaint(line) or "")


def test_the_book_has_commands():
    lines = [line for page in UNDATED for line in shell_lines(text_of(page)) if words_of(line) is not None]
    assert len(lines) >= 60
    assert {"train", "sample", "evaluate", "convert", "plan", "data", "report"} <= {
        words_of(line)[0] for line in lines
    }


@pytest.mark.parametrize("page", PAGES)
def test_no_link_is_broken(page):
    assert broken(page, text_of(page)) == []


def test_a_broken_link_is_noticed():
    text = (
        "# A title\n[a](docs/none.md) [b](#a-title) [c](#none) [d](docs/sampling.md#samplers) ![e](x.png)\n"
    )
    text += "[f](docs/sampling.md#none)\n```\n[g](none.md)\n```\n"
    assert broken("README.md", text) == ["docs/none.md", "#none", "x.png", "docs/sampling.md#none"]


def test_every_command_option_and_key_has_a_description():
    from latte.config.describe import describe_keys

    lacking = [name for name, command in site.commands() if not (command.help or "").strip()]
    rows = 0
    for name, command in site.commands():
        found = list(site.parameters(command))
        rows += len(found)
        lacking += [f"{name} {option}" for option, _, text in found if len(text.split()) < 1]
    keys = describe_keys()
    lacking += [key.name for key in keys if len(key.description.split()) < 2]
    assert lacking == []
    assert rows >= 200
    assert len(keys) >= 90


def test_the_generated_pages_hold_every_command_key_and_public_name():
    import latte
    from latte.config.run import HINTS, recipes

    pages = site.generated()
    assert [name for name, _ in site.commands() if f"## {name}\n" not in pages[site.GENERATED[0]]] == []
    assert [key for key in HINTS if f"| `{key}` |" not in pages[site.GENERATED[1]]] == []
    assert [
        name for name in (*recipes(), "dpmpp", "clean") if f"`{name}`" not in pages[site.GENERATED[2]]
    ] == []
    public = [name for name in latte.__all__ if name not in ("__version__", "Trained")]
    assert [name for name in public if f".{name}\n" not in pages[site.GENERATED[3]]] == []


def test_every_page_is_in_the_table_of_contents():
    named = re.findall(r'"([\w/-]+\.md)"', (site.DOCS / "zensical.toml").read_text("utf-8"))
    pages = [path.relative_to(site.DOCS).as_posix() for path in site.DOCS.rglob("*.md")]
    pages = [page for page in pages if not page.startswith("reference/")]
    assert set(pages) - set(named) == set(), "pages that docs/zensical.toml lacks"
    assert set(named) - {*pages, *site.GENERATED} == set(), "pages that do not exist"


def test_links_out_of_the_book_become_plain_names():
    page = site.DOCS / "zh" / "x.md"
    text = "[a](../../README.md) [b](../sampling.md#samplers) [c](https://x.org)"
    assert site.within(page, text) == "`README.md` [b](../sampling.md#samplers) [c](https://x.org)"


def test_without_the_extra_the_build_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(site, "NEEDED", ("zensical_of_another_world", "nothing_here.python"))
    with pytest.raises(SystemExit) as left:
        site.build(Path("site"))
    lines = capsys.readouterr().err.splitlines()
    assert (left.value.code, len(lines)) == (2, 1)
    assert "zensical_of_another_world" in lines[0]
    assert "pip install -e '.[docs]'" in lines[0]


def requests_of(html: str) -> list[str]:
    """What a browser would load from another host."""
    found = re.findall(r'<(?:script|img|iframe|source|video)\b[^>]*?\bsrc="((?:https?:)?//[^"]+)"', html)
    found += [tag for tag in re.findall(r"<link\b[^>]*>", html) if re.search(r'href="(https?:)?//', tag)]
    return [one for one in found if 'rel="canonical"' not in one]


def lost_links(page: Path, html: str) -> list[str]:
    """Links of a built page to a file or an anchor that does not exist."""
    found = []
    for target in re.findall(r'<a\b[^>]*?\bhref="([^"]+)"', html):
        if target.startswith(("http", "mailto:", "javascript:")) or target in ("#", ".", ".."):
            continue
        name, _, anchor = target.partition("#")
        other = page
        if name:
            other = (page.parent / name).resolve()
        if not other.exists() or (anchor and f'id="{unquote(anchor)}"' not in other.read_text("utf-8")):
            found.append(f"{page.name}: {target}")
    return found


@pytest.mark.skipif(bool(site.missing()), reason="needs the extra docs")
def test_the_site_is_built_strictly_and_asks_no_other_host(tmp_path):
    site.build(tmp_path / "site", tmp_path / "book")
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) >= 25
    assert [one for page in pages for one in requests_of(page.read_text("utf-8"))] == []
    inside = [page for page in pages if page.name != "404.html"]
    assert [one for page in inside for one in lost_links(page, page.read_text("utf-8"))] == []


def test_requests_and_lost_links_of_a_page_are_noticed(tmp_path):
    html = '<script src="https://x.org/a.js"></script><link href="//x.org/a.css"><img src="a.png">'
    html += '<a href="none.html">a</a><a href="#here">b</a><a href="#there">c</a><h1 id="here"></h1>'
    assert len(requests_of(html)) == 2
    page = tmp_path / "page.html"
    page.write_text(html)
    assert lost_links(page, html) == ["page.html: none.html", "page.html: #there"]


def reason_not_to_run(line: str) -> str | None:
    for pattern, reason in SHOWN_ONLY.items():
        if re.search(pattern, line):
            return reason
    if re.search(r"google/t5|maxin-cn|t2v|train\.init=PixArt", line) and not has_text_models():
        return "needs the extra t2v"
    return None


def chinese(page: str) -> bool:
    return page.startswith("docs/zh/") or page.endswith(".zh-CN.md")


@pytest.mark.parametrize("page", [page for page in UNDATED if chinese(page)])
def test_chinese_pages_have_the_commands_of_the_english_ones(page):
    english = page.replace("docs/zh/", "docs/").replace(".zh-CN", "")
    lines = [
        [re.sub(r'"[^"]*"', '""', line) for line in shell_lines(text_of(one))] for one in (english, page)
    ]
    assert [line for line in lines[1] if line not in lines[0]] == []
    assert page == "README.zh-CN.md" or set(lines[0]) - set(lines[1]) <= {"latte ui"}


def run_page(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch, only: str = "") -> list[str]:
    """Run the commands of a page in ``folder``, one after the other; return a line for each."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    for key, value in SMALL.items():
        monkeypatch.setenv(f"LATTE_{key}", value)
    prepare(folder, text_of(page))
    report = []
    for line in shell_lines(text_of(page)):
        if reason := reason_not_to_run(line):
            report.append(f"shown  {line}  ({reason})")
            continue
        for pattern, smaller in SMALLER:
            line = re.sub(pattern, smaller, line)
        if only and not re.search(only, line):
            continue
        answer = call(words_of(line) or [])
        report.append(f"exit {answer.code}  {line}")
        if answer.code:
            report.append(answer.output[-1500:])
    return report


RUN = [page for page in UNDATED if shell_lines(text_of(page)) and not chinese(page)]
QUICK = r"data scan my_videos|data inspect my_videos|config show"


def test_quick_commands_of_the_chapter_on_own_videos_run(tmp_path, monkeypatch):
    report = run_page("docs/your-videos.md", tmp_path, monkeypatch, QUICK)
    ran = [line for line in report if line.startswith("exit")]
    assert len(ran) == 3, report
    assert all(line.startswith("exit 0") for line in ran), "\n".join(report)
    assert (tmp_path / "clips.png").is_file()


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "page", [page for page in UNDATED if shell_lines(text_of(page)) and not chinese(page)]
)
def test_every_command_of_a_page_runs(page, tmp_path, monkeypatch):
    report = run_page(page, tmp_path, monkeypatch)
    print(page, *report, sep="\n", file=sys.stderr)
    failed = [line for line in report if re.match(r"exit [^0]", line)]
    assert failed == [], "\n".join(report)


@pytest.mark.nightly
def test_the_expected_cost_is_that_of_the_plan():
    answer = call(["plan", "ffs", "--processes", "8", "--device", "cuda", "--json"])
    found = json.loads(answer.output.splitlines()[-1])
    training = 3 * found["operations"] * found["clips_seen"]
    encoded = training + found["encoding"]["operations"] * found["clips_seen"]
    costs = [f"{round(cost / 1e18)}" for cost in (training, encoded)]
    for peak in (312e12, 989e12):
        hours = [round(cost / (0.4 * peak) / 3600) for cost in (training, encoded)]
        costs.append(f"{hours[0]}, with encoding {hours[1]}")
    page = text_of("docs/paper.md")
    assert f"| 6,000,000 | {' | '.join(costs)} |" in page
    assert f"{found['memory']['total'] / 2**30:.1f} GiB" in page
    assert f"{found['disk']['checkpoint'] / 2**30:.1f} GiB" in page
