# SPDX-License-Identifier: Apache-2.0
"""Windows: the clips of a video that are encoded when the codec compresses time.

Such a codec mixes frames, so the latents of a whole video hold no clip but the one that starts with it: the
latent of a clip's first frame covers one frame and has no past. Encoding therefore decides the clips. A video
is cut into windows by the rule of the configuration, and every window is encoded by itself. Training draws
windows instead of start frames, and may take the first frames of a window alone.
Axes: f frames, f' latent frames, c channels, h w latent size, H W pixels.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from latte.checks import check
from latte.data.clips import ClipRule
from latte.runtime import generator

AGAIN = "encode again with: latte data encode"
PROBE_SIDE = 4  # latent rows and columns of the clip that ``has_exact_prefixes`` encodes
TOLERANCE = 0.02  # of latents, whose variance is about 1: more than rounding, less than any dependence


@dataclass(frozen=True)
class Windows:
    """The windows of a folder of latents: the rule of their frames, and source frames from one to the next.

    Without a ``stride`` a window begins after the last frame of the one before. InputError on construction
    for a stride below 1.
    """

    rule: ClipRule
    stride: int | None = None

    def __post_init__(self) -> None:
        check(
            self.stride is None or self.stride >= 1,
            f"--stride must be at least 1 source frame, got {self.stride}",
        )

    def starts(self, num_frames: int, times: Sequence[float] = ()) -> tuple[int, ...]:
        """Return the first frame of every window of a video of ``num_frames`` at ``times``; () if it is too
        short.

        The last window ends where the video ends, so every frame is in reach.
        """
        count = self.rule.num_starts(num_frames, times)
        starts = []
        start = 0
        while start < count:
            starts.append(start)
            start += self.stride or self.rule.frames_at(start, times)[-1] + 1 - start
        if starts and starts[-1] < count - 1:
            starts.append(count - 1)
        return tuple(starts)

    def settings(self) -> dict[str, Any]:
        """Return what decides the windows, as plain data."""
        return {**asdict(self.rule), "stride": self.stride}


def check_clips(root: str, windows: dict[str, Any], exact_prefix: bool, rule: ClipRule) -> None:
    """InputError unless clips of ``rule`` can be taken from ``windows`` (``Windows.settings``) in ``root``.

    Fewer frames are the beginning of a window. They need a rule whose shorter clips begin alike, and latents
    that do not depend on later frames (``exact_prefix``).
    """
    made = ClipRule(**{key: value for key, value in windows.items() if key != "stride"})
    text = f"the latents in {root} are windows of {describe(made)}"
    for name in ("interval", "rule", "fps"):
        given = getattr(rule, name)
        kept = getattr(made, name)
        check(given == kept, f"data.{name} is {given}, but {text}; give data.{name}={kept}, or {AGAIN}")
    frames = f"data.frames is {rule.frames}, but {text}"
    check(rule.frames <= made.frames, f"{frames}; give at most {made.frames}, or {AGAIN}")
    if rule.frames == made.frames:
        return
    fix = f"give data.frames={made.frames}, or {AGAIN}"
    check(
        rule.rule == "time" or rule.frames_at(0) == made.frames_at(0)[: rule.frames],
        f'{frames}, and rule "{rule.rule}" spreads fewer frames differently; {fix}',
    )
    check(
        exact_prefix,
        f"{frames}, and this codec's latents depend on later frames, so the beginning of a window is no clip "
        f"of fewer frames; {fix}",
    )


def describe(rule: ClipRule) -> str:
    """Return the rule of windows in words."""
    rate = "" if rule.fps is None else f", fps {rule.fps:g}"
    return f"{rule.frames} frames (interval {rule.interval}, rule {rule.rule}{rate})"


def has_exact_prefixes(codec: Any, num_frames: int) -> bool:
    """Return whether the beginning of a clip of ``num_frames`` has the latents of the beginning alone.

    It is measured, on a synthetic clip whose brightness and contrast rise: causal convolutions pass, norms
    over time do not.
    """
    lead = codec.compression.lead
    if num_frames <= lead:
        return True
    side = PROBE_SIDE * codec.compression.spatial_factor
    level = torch.linspace(0, 1, num_frames).view(-1, 1, 1, 1)
    noise = torch.randn(num_frames, 3, side, side, generator=generator("prefix"))
    clip = (level * noise + level - 0.5).clamp(-1, 1)[None]  # (1 f 3 H W)
    whole: Tensor = codec.encode(clip)[:, :1]
    alone: Tensor = codec.encode(clip[:, :lead])
    return bool((whole - alone).abs().max() <= TOLERANCE)
