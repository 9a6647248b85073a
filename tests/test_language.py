# SPDX-License-Identifier: Apache-2.0
"""Sources, help texts and documentation use the field's terms: no hit of the banned list outside the reviewed exceptions."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "tools", "benchmarks", "examples", "docs")
SUFFIXES = {".py", ".md", ".yaml", ".html"}
PAGES = ("README.md", "README.zh-CN.md", "CONTRIBUTING.md", "CHANGELOG.md", "pyproject.toml")

BANNED = {  # pattern: what to write instead
    r"stills?(?! (more|less|better|larger|smaller|holds?|open|there|the|a|an|in|be|has|have|read|run|works?)\b)": "images",
    r"told|(?<!-)tells?|saying|says of": "condition, metadata, pass; name, state, report",
    r"draw(s|n|ing)? (the |a |more |new |same |few |many )*(clip|video|frame|picture|image)s?": "generate, sample",
    r"averaged? (weights|model)|average of the weights": "EMA weights",
    r"numbers? that (is|are) none|that is none|that are none": "NaN/Inf, non-finite",
    r"it is a share|it counts|it is a norm|it is a step size": "must be in [0, 1), must be at least 1",
    r"go(es|ing)? on (from|with|where)|going on": "resume, continue",
    r"the rate (falls|at|of the optimi)": "the learning rate",
    r"(other people|somebody else|someone else)'s|foreign": "external, pretrained",
    r"one door|the door|knocks?": "the checkpoint loader",
    r"train(s|ed|ing)? (it |them )?further": "fine-tuning",
    r"fold(s|ed|ing)? (it |them )?in(to)?\b": "merge",
    r"eight[- ]bits?": "int8",
    r"one part at a time": "CPU offload",
    r"the plain model": "without guidance",
    r"wish(es)?|album|exam|findings|bank|learner|tally": "SampleRequest, outputs, grading, results, features, TrainState",
    r"damage(s|d)? of|known damage": "corruptions",
    r"identity of": "fingerprint",
    r"quarantine[ds]?": "skipped",
    r"known frames?|known part|given frames?": "conditioning frames",
    r"figures?(?! \d)": "number, value, metric",
    r"made up (its|their) mind|nobody|somebody|asks? nobody|whoever": "name the actor, or use the passive",
    r"in the stead of|in its stead|in their stead|henceforth|hitherto|thereof|wherein|whence": "plain words",
    r"way out|to mend|mended|mends": "fix, what to do",
    r"ways? to say|as words say": "plain words",
    r"storeys? above|upstairs": "higher layer",
    r"pictures? (enter|come)s?": "images are read",
    r"led away from": "negative prompt",
    r"crime|deed|back doors?": "violation, unsafe call",
    r"clips? obeys?|obeys?|obedience|obeyed": "label accuracy",
    r"whole and part|wholly there": "complete",
    r"in words": "as text",
    r"lie(s)? (beside|there|in)": "is stored in",
}
REVIEWED: dict[tuple[str, str], str] = {  # (file, matched text in lower case): why the word is right there
}


def files() -> list[Path]:
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    return sorted(found + [ROOT / page for page in PAGES if (ROOT / page).is_file()])


def hits(text: str) -> list[tuple[int, str, str]]:
    """(line, matched text, replacement) of every banned phrase, in the order of the lines."""
    found = []
    for pattern, replacement in BANNED.items():
        for match in re.finditer(rf"\b(?:{pattern})\b", text, re.IGNORECASE):
            found.append((text.count("\n", 0, match.start()) + 1, match[0], replacement))
    return sorted(found)


@pytest.mark.parametrize("path", files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_banned_phrase(path):
    name = path.relative_to(ROOT).as_posix()
    found = [
        f"{name}:{line}: {phrase!r}; write: {replacement}"
        for line, phrase, replacement in hits(path.read_text(encoding="utf-8"))
        if (name, phrase.lower()) not in REVIEWED
    ]
    assert found == []


@pytest.mark.parametrize(
    ("sentence", "count"),
    [
        ("eight stills behind every clip", 1),
        ("it is still open", 0),
        ("what the model is told of a clip", 1),
        ("numbers that are none", 1),
        ("a figure of a run", 1),
        ("Figure 6 shows", 0),
        ("fold the adapters\nfolded into the weights", 1),
        ("EMA weights of the run", 0),
    ],
)
def test_the_scan_finds_banned_phrases(sentence, count):
    assert len(hits(sentence)) >= count if count else hits(sentence) == []


def test_reviewed_exceptions_are_used():
    unused = [
        (name, phrase)
        for name, phrase in REVIEWED
        if phrase not in {hit[1].lower() for hit in hits((ROOT / name).read_text(encoding="utf-8"))}
    ]
    assert unused == []
