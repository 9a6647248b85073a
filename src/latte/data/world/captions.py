# SPDX-License-Identifier: Apache-2.0
"""Captions of the procedural world: a small grammar with paraphrases, in English and Chinese.

Every template names kind and colour, and the direction where the kind has one; some name the background too.
A new kind adds its templates here.
"""

from latte.checks import InputError
from latte.data.world.scenes import Scene

TEMPLATES = {
    "en": {
        "ball": (
            "a {colour} ball bounces to the {direction}",
            "a {colour} ball bounces {direction} over a {ground} floor",
            "a {colour} ball bounces over a {ground} floor, moving {direction}",
        ),
        "clouds": (
            "clouds drift {direction} in a {colour} sky",
            "white clouds move to the {direction} across a {colour} sky",
            "a {colour} sky with clouds drifting {direction}",
        ),
        "waves": (
            "{colour} waves roll to the {direction}",
            "waves roll {direction} over a {colour} sea",
            "a {colour} sea with waves moving {direction}",
        ),
        "pendulum": (
            "a {colour} pendulum swings",
            "a pendulum with a {colour} bob swings back and forth",
            "a {colour} pendulum swings in front of a {ground} wall",
        ),
        "snow": (
            "snow falls on a {colour} house, blown to the {direction}",
            "a {colour} house in the snow, the wind blows {direction}",
            "snow blows {direction} over a {colour} house",
        ),
        "cube": (
            "a {colour} cube turns to the {direction}",
            "a {colour} cube rotates {direction}",
            "a {colour} cube spins {direction} on a {ground} ground",
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
            "a {colour} star moves {direction}",
            "a {colour} star glides {direction}",
            "a {colour} star moves {direction} on a {ground} ground",
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


def paraphrases(scene: Scene, language: str = "en") -> list[str]:
    """Return every caption of the scene in ``language``: "en", "zh", or "mixed" for those of both.
    InputError for another language.
    """
    if language == MIXED:
        return [text for name in LANGUAGES for text in paraphrases(scene, name)]
    if language not in TEMPLATES:
        raise InputError(f"language must be one of {', '.join(TEMPLATES)}, got {language!r}")
    words = {"colour": scene.colour, "ground": scene.background, "direction": scene.direction}
    if language == "zh":
        words = {key: CHINESE[word] for key, word in words.items()}
    return [template.format(**words) for template in TEMPLATES[language][scene.kind]]


def caption(scene: Scene, language: str = "en") -> str:
    """Return one caption of the scene; its last number chooses the language of "mixed" and the paraphrase."""
    number = scene.numbers[-1]
    if language == MIXED:
        number *= len(LANGUAGES)
        language = LANGUAGES[int(number)]
        number %= 1
    choices = paraphrases(scene, language)
    return choices[int(number * len(choices))]
