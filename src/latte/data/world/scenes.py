# SPDX-License-Identifier: Apache-2.0
"""The procedural world: nine kinds of moving scenes, every attribute known, every frame a pure function of
(seed, time); and their captions, a small grammar with paraphrases, in English and Chinese.

Scene ``index`` of seed ``s`` is a pure function of (s, index): no download, no disk, no state.
``latte.data.world.grading`` reads its attributes back from pixels. Every template of a caption names kind and
colour, and the direction where the kind has one; some name the background too. A new kind adds its templates
here. Axes: t frames, h height, w width, c channels.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from latte.checks import InputError, check
from latte.data.world.canvas import Canvas
from latte.data.world.kinds import BACKGROUNDS, COLOURS, KINDS
from latte.runtime import generator

FPS = 8.0
MIN_FRAMES = 4  # of a clip that the grader reads
Combination = tuple[str, str, str]
"""Kind, colour, direction."""


@dataclass(frozen=True)
class Scene:
    """What one clip shows.

    ``numbers`` are uniform in [0, 1); the kind turns them into size, speed, phase and places.
    """

    kind: str
    colour: str
    background: str
    direction: str
    numbers: tuple[float, ...]

    @property
    def combination(self) -> Combination:
        """(kind, colour, direction): what a caption asks for and what is held out together."""
        return self.kind, self.colour, self.direction


def combinations() -> list[Combination]:
    """All (kind, colour, direction) that exist, in a fixed order."""
    return [
        (name, colour, direction)
        for name, kind in KINDS.items()
        for colour in kind.colours
        for direction in kind.directions
    ]


def split_combinations(hold_out: int) -> tuple[list[Combination], list[Combination]]:
    """Return (trained, held out) combinations: one in ``hold_out`` of each kind is held out, none for 0.

    The held-out ones lie on diagonals of colour and direction, so every direction of a kind is still seen in
    training, and so is every colour of a kind that has directions; of a kind without, some colours are seen
    with other kinds only.
    """
    if not hold_out:
        return combinations(), []
    trained, held_out = [], []
    for combination in combinations():
        kind = KINDS[combination[0]]
        diagonal = kind.colours.index(combination[1]) + 3 * kind.directions.index(combination[2])
        target = held_out if diagonal % hold_out == hold_out - 1 else trained
        target.append(combination)
    return trained, held_out


def check_hold_out(hold_out: int) -> None:
    """InputError for a share that leaves a kind or colour untrained, or holds nothing out of a kind."""
    allowed = [0, *(share for share in range(2, len(combinations())) if _is_balanced(share))]
    check(
        hold_out in allowed,
        f"data.hold_out must be one of {', '.join(map(str, allowed))} for data.scenes=world, got {hold_out}; "
        "other shares leave a colour untrained or hold nothing out of a kind",
    )


@lru_cache
def _is_balanced(hold_out: int) -> bool:
    """Return whether every colour is still trained and every kind has held-out combinations."""
    trained, held_out = split_combinations(hold_out)
    return {c[1] for c in trained} == set(COLOURS) and {c[0] for c in held_out} == set(KINDS)


def backgrounds_of(kind: str, colour: str) -> list[str]:
    """Return the backgrounds that a scene of this kind and colour can have."""
    return [background for background in KINDS[kind].backgrounds if background != colour]


@lru_cache
def _combinations_of(kind: str, hold_out: int, held_out: bool) -> tuple[Combination, ...]:
    """Return the trained, or the held-out, combinations of one kind."""
    return tuple(c for c in split_combinations(hold_out)[held_out] if c[0] == kind)


def sample_scene(seed: int, index: int, hold_out: int = 0, held_out: bool = False) -> Scene:
    """Sample the scene of clip ``index``: kinds in turn, colour and direction uniform among the trained (or
    held-out) combinations.
    """
    import torch

    draws = torch.rand(16, generator=generator(seed, "world", index), dtype=torch.float64).tolist()
    name = list(KINDS)[index % len(KINDS)]
    pool = _combinations_of(name, hold_out, held_out)
    _, colour, direction = pool[int(draws[0] * len(pool))]
    backgrounds = backgrounds_of(name, colour)
    background = backgrounds[int(draws[1] * len(backgrounds))]
    return Scene(name, colour, background, direction, tuple(draws[2:]))


def render_frame(scene: Scene, time: float, height: int, width: int) -> np.ndarray:
    """Render the scene at ``time`` seconds -> uint8 (h w c)."""
    canvas = Canvas(height, width, BACKGROUNDS[scene.background])
    KINDS[scene.kind].draw(
        canvas, scene.numbers, time, COLOURS[scene.colour], BACKGROUNDS[scene.background], scene.direction
    )
    return canvas.pixels()


def render(scene: Scene, frames: int, height: int, width: int, fps: float = FPS) -> np.ndarray:
    """Render ``frames`` frames at ``fps`` per second -> uint8 (t h w c)."""
    return np.stack([render_frame(scene, frame / fps, height, width) for frame in range(frames)])


TEMPLATES = {
    "en": {
        "ball": (
            "{a_colour} ball bounces to the {direction}",
            "{a_colour} ball bounces {direction} over {a_ground} floor",
            "{a_colour} ball bounces over {a_ground} floor, moving {direction}",
        ),
        "clouds": (
            "clouds drift {direction} in {a_colour} sky",
            "white clouds move to the {direction} across {a_colour} sky",
            "{a_colour} sky with clouds drifting {direction}",
        ),
        "waves": (
            "{colour} waves roll to the {direction}",
            "waves roll {direction} over {a_colour} sea",
            "{a_colour} sea with waves moving {direction}",
        ),
        "pendulum": (
            "{a_colour} pendulum swings",
            "a pendulum with {a_colour} bob swings back and forth",
            "{a_colour} pendulum swings in front of {a_ground} wall",
        ),
        "snow": (
            "snow falls on {a_colour} house, blown to the {direction}",
            "{a_colour} house in the snow, the wind blows {direction}",
            "snow blows {direction} over {a_colour} house",
        ),
        "cube": (
            "{a_colour} cube turns to the {direction}",
            "{a_colour} cube rotates {direction}",
            "{a_colour} cube spins {direction} on {a_ground} ground",
        ),
        "fireworks": (
            "{colour} fireworks burst in the night sky",
            "{colour} fireworks over a dark city",
            "fireworks with {colour} sparks at night",
        ),
        "walker": (
            "a person in {colour} walks to the {direction}",
            "a child in {colour} clothes walks {direction}",
            "a person in {colour} clothes walks {direction} on {ground} ground",
        ),
        "star": (
            "{a_colour} star moves {direction}",
            "{a_colour} star glides {direction}",
            "{a_colour} star moves {direction} on {a_ground} ground",
        ),
    },
    "zh": {
        "ball": ("一个{colour}的球{direction}弹跳", "{colour}的球在{ground}的地板上{direction}弹跳"),
        "clouds": ("云在{colour}的天空中{direction}飘动", "{colour}的天空，白云{direction}飘"),
        "waves": ("{colour}的海浪{direction}翻滚", "{colour}的海面上波浪{direction}移动"),
        "pendulum": ("一个{colour}的钟摆在摆动", "{colour}的钟摆在{ground}的墙前来回摆动"),
        "snow": ("雪落在{colour}的房子上，风{direction}吹", "{colour}的房子，雪{direction}飘"),
        "cube": ("一个{colour}的方块{direction}旋转", "{colour}的方块在{ground}的地面上{direction}旋转"),
        "fireworks": ("{colour}的烟花在夜空绽放", "夜晚城市上空的{colour}烟花"),
        "walker": (
            "一个穿{colour}衣服的人{direction}走",
            "穿{colour}衣服的人在{ground}的地面上{direction}走",
        ),
        "star": ("一颗{colour}的星星{direction}移动", "{colour}的星星在{ground}的背景上{direction}移动"),
    },
}
CHINESE = {
    "red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色", "blue": "蓝色", "purple": "紫色",
    "pink": "粉色", "white": "白色", "black": "黑色", "grey": "灰色", "brown": "棕色",
    "left": "向左", "right": "向右", "up": "向上", "down": "向下", "none": "",
}  # fmt: skip
LANGUAGES = tuple(TEMPLATES)
MIXED = "mixed"  # half of the clips are captioned in each language


def with_article(word: str) -> str:
    """Return "a" or "an" and the word."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def paraphrases(scene: Scene, language: str = "en") -> list[str]:
    """Return every caption of the scene in ``language``: "en", "zh", or "mixed" for those of both.
    InputError for another language.
    """
    if language == MIXED:
        return [text for name in LANGUAGES for text in paraphrases(scene, name)]
    if language not in TEMPLATES:
        raise InputError(f"language must be one of {', '.join(TEMPLATES)}, got {language!r}")
    words = {"colour": scene.colour, "ground": scene.background, "direction": scene.direction}
    articles = {"a_colour": with_article(scene.colour), "a_ground": with_article(scene.background)}
    if language == "zh":
        words = {key: CHINESE[word] for key, word in words.items()}
    return [template.format(**words, **articles) for template in TEMPLATES[language][scene.kind]]


def caption(scene: Scene, language: str = "en") -> str:
    """Return one caption of the scene; its last number chooses the language of "mixed" and the paraphrase."""
    number = scene.numbers[-1]
    if language == MIXED:
        number *= len(LANGUAGES)
        language = LANGUAGES[int(number)]
        number %= 1
    choices = paraphrases(scene, language)
    return choices[int(number * len(choices))]
