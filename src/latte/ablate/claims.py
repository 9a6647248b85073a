# SPDX-License-Identifier: Apache-2.0
"""What the paper concludes from each ablation (Sec. 4.2: Fig. 6 and 8, Tables 1 and 2), and when it holds.

The paper compares the Frechet video distance on FaceForensics at XL during training; here other metrics are
compared, at other sizes. Runs of two settings with the same seed see the same data in the same order, so they
are compared by seed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

HOLDS = "holds"
FAILS = "does not hold"
WITHIN = "within the spread over seeds"
EQUAL = "no difference at all"
ONE_SEED = "one seed shows no spread"
UNMEASURED = "not measured"
RULE = (
    "A is better than B when the median over seeds of the difference (same seed against same seed) is "
    "larger than the range of that difference over seeds. A conclusion holds when that is so for all of "
    "its pairs, does not hold when any pair is clearly the other way round, and is within the spread over "
    "seeds otherwise."
)

Values = Mapping[str, Mapping[int, float]]
"""Name of a setting -> seed -> a measured value."""


@dataclass(frozen=True)
class Claim:
    """A conclusion, its place in the paper, pairs (better, worse); ``early``: at the first measured step."""

    text: str
    place: str
    pairs: tuple[tuple[str, str], ...]
    early: bool = False


@dataclass(frozen=True)
class Conclusions:
    """The claims about an axis, and a note. ``ascending``: each setting is better than the one before it."""

    claims: tuple[Claim, ...] = ()
    note: str = ""
    ascending: Claim | None = None

    def claims_about(self, names: Sequence[str]) -> tuple[Claim, ...]:
        """Return the claims for settings of these names, in this order."""
        if self.ascending is None:
            return self.claims
        pairs = tuple((after, before) for before, after in pairwise(names))
        return (*self.claims, Claim(self.ascending.text, self.ascending.place, pairs))


CONCLUSIONS = {
    "variant": Conclusions(
        (
            Claim("Variant 1 is the best of the four.", "Fig. 6d", (("1", "2"), ("1", "3"), ("1", "4"))),
            Claim("Variant 4 is the worst of the four.", "Fig. 6d", (("1", "4"), ("2", "4"), ("3", "4"))),
        ),
        "Parameters are kept about equal, as in Table 3. There variant 4 does a quarter of the "
        "operations, which its count at patch 4 explains; here all settings have the patch size of the "
        "recipe. Attention over all tokens at once (joint) is not in the paper.",
    ),
    "patch": Conclusions(
        (
            Claim(
                "Uniform patches are clearly better than compression patches.",
                "Fig. 6e",
                (("uniform", "compression"),),
            ),
        ),
        "Compression patches make fewer tokens, so this setting also does fewer operations.",
    ),
    "conditioning": Conclusions(
        (Claim("S-AdaLN is clearly better than all tokens.", "Fig. 6f", (("s_adaln", "all_tokens"),)),)
    ),
    "temporal_position": Conclusions(
        (Claim("Absolute positions are slightly better than rotary.", "Fig. 6b", (("absolute", "rotary"),)),)
    ),
    "objective": Conclusions(
        note="The paper trains one objective. The held-out loss is the error of the noise that a "
        "prediction stands for, so paper, v and min_snr can be compared; rectified_flow adds noise "
        "along another path, and its value (the error of its velocity) is not comparable with theirs."
    ),
    "joint": Conclusions(
        (
            Claim(
                "Training with images behind the clips gives better clips.", "Tables 1 and 2", (("4", "0"),)
            ),
        ),
        "The paper uses 8 images; the held-out loss is that of clips alone.",
    ),
    "interval": Conclusions(
        (Claim("Intervals differ early in training and hardly matter in the end.", "Fig. 6a", ()),),
        "Every setting is measured on its own clips (the same videos at its interval), and faster ones "
        "are harder to predict: these losses cannot be compared. It takes a score of generated clips.",
    ),
    "size": Conclusions(ascending=Claim("The larger the model, the better.", "Fig. 8", ())),
    "init": Conclusions(
        (
            Claim(
                "A start from DiT is ahead early in training.",
                "Fig. 6c",
                (("dit-all", "scratch"),),
                early=True,
            ),
            Claim(
                "In the end the start from DiT falls behind random weights.",
                "Fig. 6c",
                (("scratch", "dit-all"),),
            ),
        ),
        "The paper does not say which block of DiT goes where; its released loader matches names, which "
        "is dit-all.",
    ),
}


def gaps_of(better: Mapping[int, float], worse: Mapping[int, float], sign: int) -> list[float]:
    """Return how far ``better`` leads, per common seed; ``sign``: 1 if lower is better, -1 if higher is."""
    return [sign * (worse[seed] - better[seed]) for seed in better if seed in worse]


def clear(gaps: Sequence[float]) -> int:
    """Return 1 when the gaps show by RULE that the first is better, -1 that it is worse, else 0."""
    middle = median(gaps)
    if abs(middle) <= max(gaps) - min(gaps):
        return 0
    return int(math.copysign(1, middle))


def verdict(pairs: Sequence[tuple[str, str]], values: Values, sign: int) -> str:
    """Return HOLDS, FAILS or WITHIN by RULE, else EQUAL, ONE_SEED (no spread) or UNMEASURED (no values)."""
    if not pairs or any(not values.get(name) for pair in pairs for name in pair):
        return UNMEASURED
    gaps = [gaps_of(values[better], values[worse], sign) for better, worse in pairs]
    if min(map(len, gaps)) < 2:
        return ONE_SEED
    if not any(map(any, gaps)):
        return EQUAL
    found = [clear(one) for one in gaps]
    if -1 in found:
        return FAILS
    if all(found):
        return HOLDS
    return WITHIN
