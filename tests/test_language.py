# SPDX-License-Identifier: Apache-2.0
"""Sources, tests, help texts and documentation use the field's terms.

No hit of the banned list outside the reviewed exceptions. Underscores count as spaces: identifiers are read.
To list every hit of some files or folders: ``python tests/test_language.py [PATH ...]``.
"""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "tests", "tools", "benchmarks", "examples", "integrations", "docs")
SUFFIXES = {".py", ".md", ".yaml", ".html"}
PAGES = ("README.md", "README.zh-CN.md", "CONTRIBUTING.md", "pyproject.toml")
# this list; the diary of measurements quotes old commands, the table of migration old names
UNREAD = {"tests/test_language.py", "docs/LOG.md", "docs/migration.md"}

BANNED = {  # pattern: what to write instead
    r"stills|a still|(num|one|every|each|of|no|drawn|find|with|as) still|stills?(?=\()": "images",
    r"told|(?<!-)tells?|says of|tellings?": "condition, metadata, pass; name, state, report",
    r"(draw(s|n|ing)?|drew) ((the|an?|more|new|same|few|many) )*(clip|video|frame|image)s?": "generate",
    r"averaged? (weights|model)|average of the weights": "EMA weights",
    r"numbers? that (is|are) none|that (is|are) none|is none of": "NaN/Inf, non-finite; is not",
    r"it is a share|it counts|it is a norm|it is a step size|counts something": "must be at least 1",
    r"go(es|ing)? on (from|with|where)|going on|went on": "resume, continue",
    r"the rate (falls|at|of the optimi)": "the learning rate",
    r"(other people|somebody else|someone else|everyone else)'s|foreign": "external, pretrained",
    r"one door|the doors?|knock(s|ed)?": "the checkpoint loader",
    r"train(s|ed|ing)? (it |them )?further": "fine-tuning",
    r"fold(s|ed|ing)? (it |them )?in(to)?\b": "merge",
    r"eight[- ]bits?": "int8",
    r"one part at a time": "CPU offload",
    r"the plain model": "without guidance",
    r"wish(es)?|albums?|exams?|findings|banks?|learners?|tally": "SampleRequest, outputs, grading, features",
    r"known damage|damage of a|damages": "corruptions",
    r"identity of": "fingerprint",
    r"known frames?|known part|given frames?": "conditioning frames",
    r"figures?(?! ?\d| [a-z]\b)(?<!\.figure)(?<!<figure)(?<!</figure)": "number, value, metric",
    r"made up (its|their) mind|nobody|somebody|whoever|anybody|no-one": "name the actor, or use the passive",
    r"in (the|its|their|his) stead|henceforth|hitherto": "plain words",
    r"there(of|by|in|upon|from)|where(in|upon|to|fore)": "plain words",
    r"whence|hence|thence|besides,|lest|save for|so as to|at that,|by itself alone": "plain words",
    r"ways? out|to mend|mend(ed|s|ing)?|put right|sets? right": "fix, what to do",
    r"ways? to say|as words say|so to speak|say so": "plain words",
    r"storeys? above|upstairs|downstairs": "higher layer",
    r"pictures? (enter|come)s?": "images are read",
    r"led away from|lead(s|ing)? away": "negative prompt",
    r"crimes?|deeds?|back doors?|culprits?|innocents?": "violation, unsafe call",
    r"obey(s|ed|ing)?|obedien(t|ce(?!\.py))": "label accuracy, motion accuracy, follows the label",
    r"whole and part|wholly there|in one piece": "complete, atomic",
    r"(type|value|name|kind|number)s? in words": "as text",
    r"lie(s)? (beside|there|in)|lay (beside|there|in)|lying (beside|there)": "is stored in",
    r"made of (whole|nothing)|comes? to nothing|nothing is lost": "plain words",
    r"must not be asked|asked twice|asks? for nothing": "plain words",
    r"yardstick": "comparison key",
    r"(is|are|was|were) (kept|laid|dealt) (apart|aside)|dealt into": "separate, divisible by",
    r"twins?": "equivalent, variant",
    r"wild|hush|speak(s|ing)?|spoke|spoken|heard|hears?": "log, report, receive",
    r"it is a folder that|names a folder that it": "specific sentences",
}
NAMES = {  # identifiers that say nothing, or something else than the field's term
    *(
        "told",
        "tell",
        "say",
        "said",
        "says",
        "speak",
        "wanted",
        "mine",
        "theirs",
        "each_other",
        "way_out",
        "noted",
    ),
    *(
        "still",
        "stills",
        "album",
        "wish",
        "exam",
        "tally",
        "learner",
        "twin",
        "culprit",
        "crime",
        "deed",
        "yardstick",
    ),
}
REVIEWED: dict[tuple[str, str], str] = {  # (file, matched text in lower case): why the word is right there
    ("src/latte/page/html.py", "figure"): "the HTML element",
    ("tests/test_benchmarks.py", "obedience"): "the name of a benchmark",
    ("src/latte/page/plots.py", "figure"): "the HTML element",
    ("tests/autoencoder/test_builtin.py", "figures"): "the same key, in its test",
    ("src/latte/training/callbacks.py", "tally"): "the key of 0.1.0 in a checkpoint, which is still read",
    ("tests/training/test_custom.py", "tally"): "the same, in its test",
    ("tools/train_autoencoder.py", "figures"): "a key in the metadata of the packaged weights",
    ("benchmarks/int8.py", "eight bits"): "the key of a seed, which published numbers depend on",
    ("src/latte/interop/archive.py", "tell"): "the method of a Python file",
    ("src/latte/profile/memory.py", "save for"): "autograd's ctx.save_for_backward",
    ("src/latte/model/fused.py", "save for"): "autograd's ctx.save_for_backward",
    ("src/latte/evaluation/evaluate.py", "banks"): "a --json key of 0.1.0, kept beside the new one",
    ("src/latte/evaluation/external.py", "banks"): "a key of 0.1.0 that its hash covers",
    ("src/latte/evaluation/manifest.py", "banks"): "a value of 0.1.0 that the manifest hash covers",
    ("src/latte/cli/evaluate.py", "banks"): "a --json key of 0.1.0",
    ("src/latte/evaluation/sources.py", "album"): "the name of a file that 0.1.0 wrote",
    ("tests/evaluation/test_evaluate.py", "album"): "the name of a file that 0.1.0 wrote",
    ("src/latte/inference/outputs.py", "album"): "the name of a file that 0.1.0 wrote",
    ("tests/cli/test_sample.py", "album"): "the name of a file that 0.1.0 wrote",
    ("tools/train_detector.py", "figures"): "a key in the metadata of the built-in weights",
    ("tests/evaluation/test_builtin.py", "figures"): "a key in the metadata of the built-in weights",
}


ANY = re.compile(rf"\b(?:{'|'.join(BANNED)})\b".replace(" ", " +"))
"""One search for all of them, in lower case: eight times faster where there is no hit."""


def files() -> list[Path]:
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    found += [ROOT / page for page in PAGES if (ROOT / page).is_file()]
    return sorted(path for path in found if name_of(path) not in UNREAD)


def name_of(path: Path) -> str:
    return path.resolve().relative_to(ROOT).as_posix()


def hits(text: str) -> list[tuple[int, str, str]]:
    """(line, matched text, replacement) of every banned phrase, in the order of the lines."""
    words = re.sub(r"[\s_]", " ", text)  # as long as the text, so that places stay
    if not ANY.search(words.lower()):
        return []
    found = []
    for pattern, replacement in BANNED.items():
        for match in re.finditer(rf"\b(?:{pattern})\b".replace(" ", " +"), words, re.IGNORECASE):
            found.append((text.count("\n", 0, match.start()) + 1, match[0], replacement))
    return sorted(found)


def named(text: str) -> list[tuple[int, str, str]]:
    """(line, name, replacement) of every banned identifier of a Python file."""
    found = []
    for node in ast.walk(ast.parse(text)):
        name = getattr(node, "id", None) or getattr(node, "arg", None) or getattr(node, "name", None)
        if isinstance(name, str) and name.strip("_") in NAMES and not isinstance(node, ast.alias):
            found.append((getattr(node, "lineno", 0), name, "a name that says what it holds"))
    return sorted(set(found))


def complaints(path: Path) -> list[str]:
    text, name = path.read_text(encoding="utf-8"), name_of(path)
    found = hits(text)
    if path.suffix == ".py":
        found += named(text)
    return [
        f"{name}:{line}: {phrase!r}; write: {replacement}"
        for line, phrase, replacement in sorted(found)
        if (name, phrase.lower()) not in REVIEWED
    ]


@pytest.mark.parametrize("path", files(), ids=name_of)
def test_no_banned_phrase(path):
    assert complaints(path) == []


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
        ("folded\ninto the weights", 1),
        ("def draw_clips(given_frames):", 2),
        ("EMA weights of the run", 0),
    ],
)
def test_the_scan_finds_banned_phrases(sentence, count):
    assert len(hits(sentence)) >= count if count else hits(sentence) == []


@pytest.mark.parametrize(
    ("source", "count"), [("told = 1", 1), ("def f(mine): pass", 1), ("def say(): pass", 1), ("total = 1", 0)]
)
def test_the_scan_finds_banned_identifiers(source, count):
    assert len(named(source)) == count


def test_each_phrase_is_in_the_search_for_all():
    assert [phrase for phrase in BANNED if phrase != phrase.lower()] == []
    assert ANY.search("nothing of the kind") is None


def test_reviewed_exceptions_are_used():
    found = {(name, hit[1].lower()) for name, _ in REVIEWED for hit in hits((ROOT / name).read_text("utf-8"))}
    assert REVIEWED.keys() <= found


if __name__ == "__main__":
    chosen = [Path(word) for word in sys.argv[1:]] or files()
    inside = [path for word in chosen for path in ([word] if word.is_file() else sorted(word.rglob("*")))]
    lines = [line for path in inside if path.suffix in SUFFIXES for line in complaints(path)]
    print(*lines, f"{len(lines)} hits", sep="\n")
