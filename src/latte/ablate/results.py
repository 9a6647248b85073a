# SPDX-License-Identifier: Apache-2.0
"""What the paper concluded from each ablation (Latte, Sec. 4.2: Fig. 6, Fig. 8, Tables 1 and 2), and when we say that it holds here.

The paper compares the Frechet video distance on FaceForensics at XL over training; here other numbers are compared, at other sizes.
Runs of two arms with the same seed saw the same data in the same order, so they are compared seed by seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

HOLDS, FAILS, WITHIN, EQUAL = "holds", "does not hold", "within the spread over seeds", "no difference at all"
ONE_SEED, UNMEASURED = "one seed shows no spread", "not measured"
RULE = (
    "A is better than B when the median over seeds of the difference (same seed against same seed) is larger than the range of that "
    "difference over seeds. A conclusion holds when that is so for every pair it speaks of, does not hold when any pair is clearly the "
    "other way round, and is within the spread over seeds otherwise."
)

Values = Mapping[str, Mapping[int, float]]
"""Arm's name -> seed -> a measured value."""


@dataclass(frozen=True)
class Claim:
    """A conclusion, its place in the paper, and the pairs (better, worse) that it comes to; ``early``: at the first measured step."""

    text: str
    place: str
    pairs: tuple[tuple[str, str], ...]
    early: bool = False


@dataclass(frozen=True)
class Finding:
    """The paper's claims about an axis, and what else its reader must know. ``ascending``: besides, each arm beats the one before it."""

    claims: tuple[Claim, ...] = ()
    note: str = ""
    ascending: Claim | None = None

    def claims_about(self, names: Sequence[str]) -> tuple[Claim, ...]:
        """The claims, once the arms and their order are known."""
        if self.ascending is None:
            return self.claims
        pairs = tuple((after, before) for before, after in pairwise(names))
        return (*self.claims, Claim(self.ascending.text, self.ascending.place, pairs))


FINDINGS = {
    "variant": Finding(
        (
            Claim("Variant 1 is the best of the four.", "Fig. 6d", (("1", "2"), ("1", "3"), ("1", "4"))),
            Claim("Variant 4 is the worst of the four.", "Fig. 6d", (("1", "4"), ("2", "4"), ("3", "4"))),
        ),
        "Parameters are kept about equal, as in Table 3. There variant 4 does a quarter of the operations, which its count at patch 4 "
        "explains; here all arms have the patch size of the recipe. Attention over all tokens at once (joint) is not in the paper.",
    ),
    "patch": Finding(
        (
            Claim(
                "Uniform patches are clearly better than compression patches.",
                "Fig. 6e",
                (("uniform", "compression"),),
            ),
        ),
        "Compression patches make fewer tokens, so this arm also does fewer operations.",
    ),
    "conditioning": Finding(
        (Claim("S-AdaLN is clearly better than all tokens.", "Fig. 6f", (("s_adaln", "all_tokens"),)),)
    ),
    "temporal_position": Finding(
        (Claim("Absolute positions are slightly better than rotary.", "Fig. 6b", (("absolute", "rotary"),)),)
    ),
    "objective": Finding(
        note="The paper trains one objective. The held-out loss is the error of the noise that a prediction stands for, so paper, v and "
        "min_snr can be compared; rectified_flow adds noise along another path, and its number (the error of its velocity) cannot be set "
        "beside theirs."
    ),
    "joint": Finding(
        (
            Claim(
                "Training with stills behind the clips gives better clips.", "Tables 1 and 2", (("4", "0"),)
            ),
        ),
        "The paper uses 8 stills; the held-out loss is that of clips alone.",
    ),
    "interval": Finding(
        (Claim("Intervals differ early in training and hardly matter in the end.", "Fig. 6a", ()),),
        "Every arm is measured on its own clips, the same videos at its interval, and faster ones are harder to predict: these losses "
        "cannot be compared. It takes a score of generated clips.",
    ),
    "size": Finding(ascending=Claim("The larger the model, the better.", "Fig. 8", ())),
    "init": Finding(
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
        "The paper does not say which block of DiT goes where; its released loader matches names, which is dit-all.",
    ),
}


def gaps_of(better: Mapping[int, float], worse: Mapping[int, float], sign: int) -> list[float]:
    """By how much ``better`` is ahead, for each seed that both have; ``sign``: 1 when lower values are better, -1 when higher ones are."""
    return [sign * (worse[seed] - better[seed]) for seed in better if seed in worse]


def clear(gaps: Sequence[float]) -> int:
    """1 when the gaps show by RULE that the first is better, -1 that it is worse, 0 when the seeds do not tell."""
    middle = median(gaps)
    return 0 if abs(middle) <= max(gaps) - min(gaps) else 1 if middle > 0 else -1


def verdict(pairs: Sequence[tuple[str, str]], values: Values, sign: int) -> str:
    """HOLDS, FAILS or WITHIN by RULE, and what cannot be judged: EQUAL, ONE_SEED (no spread), UNMEASURED (an arm is missing)."""
    if not pairs or any(not values.get(name) for pair in pairs for name in pair):
        return UNMEASURED
    gaps = [gaps_of(values[better], values[worse], sign) for better, worse in pairs]
    if min(map(len, gaps)) < 2:
        return ONE_SEED
    if not any(map(any, gaps)):
        return EQUAL
    found = [clear(one) for one in gaps]
    return FAILS if -1 in found else HOLDS if all(found) else WITHIN
