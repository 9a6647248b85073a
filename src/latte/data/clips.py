# SPDX-License-Identifier: Apache-2.0
"""Which frames of a video make a clip, and the way from its pixels to the model's range and back.

Three rules choose frames: "strict" keeps an even stride (the paper); "linspace" spreads the frames over
frames * interval as the released code does for FaceForensics and UCF101 (16 * 3 gives steps 3, 3, ..., 4);
"time" goes by the frames' time stamps, so that videos of different or uneven frame rates move at one speed.
Every rule also allows the last possible start. Axes: f = t frames, c channels, h height, w width.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from latte.checks import InputError, check
from latte.data.clip_rule import ClipRule as ClipRule
from latte.data.clip_rule import crop_box
from latte.data.clip_rule import span as span


def choose_frames(
    num_frames: int, rule: ClipRule, generator: torch.Generator | None = None, times: Sequence[float] = ()
) -> list[int]:
    """Return the frame numbers of one clip, its start uniform over all possible ones (the first without a
    ``generator``).

    ``times`` in seconds are needed by "time" alone. InputError when the video is too short for the rule.
    """
    reason = rule.needs(num_frames, times)
    if reason:
        raise InputError(
            f"no clip fits this video ({reason}); use longer videos, fewer frames or a smaller interval"
        )
    starts = rule.num_starts(num_frames, times)
    start = 0
    if generator:
        start = int(torch.randint(starts, (), generator=generator))
    return rule.frames_at(start, times)


def centre_crop_resize(
    frames: np.ndarray, height: int, width: int, place: tuple[float, float, float] | None = None
) -> np.ndarray:
    """Return uint8 (t height width c) of uint8 (t h w c): the largest centred box of the target's aspect,
    then one resize. With ``place`` it is a box of a share (0, 1] of its sides, at shares of the free rows and
    columns from top and left.

    The box is rounded to whole pixels. Frames of the right size are returned unchanged. The filter is torch's
    bicubic with antialias on uint8, within one level of Pillow's bicubic and several times as fast.
    """
    check(height > 0 and width > 0, f"resolution must be positive, got {(height, width)}")
    h, w = frames.shape[1:3]
    if (h, w) == (height, width) and place is None:
        return frames
    box_h, box_w = crop_box(h, w, height, width)
    top = (h - box_h) // 2
    left = (w - box_w) // 2
    if place is not None:
        box_h = max(round(box_h * place[0]), 1)
        box_w = max(round(box_w * place[0]), 1)
        top = round((h - box_h) * place[1])
        left = round((w - box_w) * place[2])
    box = np.ascontiguousarray(frames[:, top : top + box_h, left : left + box_w])
    pixels = torch.from_numpy(box).permute(0, 3, 1, 2)  # (t c h w)
    resized = interpolate(pixels, size=(height, width), mode="bicubic", antialias=True)
    return resized.permute(0, 2, 3, 1).contiguous().numpy()  # (t h w c)


def flip_horizontal(video: Tensor) -> Tensor:
    """Return (... h w) mirrored left to right."""
    return video.flip(-1)


def to_float(frames: np.ndarray) -> Tensor:
    """Return uint8 (t h w c) in [0, 255] as float32 (f c h w) in [-1, 1]."""
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)  # (f c h w)
    return pixels.to(torch.float32).div_(127.5).sub_(1).contiguous()


def to_uint8(video: Tensor) -> np.ndarray:
    """Return float (... f c h w) in [-1, 1], clamped, as uint8 (... f h w c): the exact inverse of
    ``to_float``.
    """
    levels = video.detach().to("cpu", torch.float32).add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return levels.movedim(-3, -1).contiguous().numpy()  # (... f h w c)


def shrink(frames: np.ndarray, side: int) -> np.ndarray:
    """Return frames, uint8 (t h w c), with sides of at most ``side`` pixels, for pictures of a page."""
    height, width = frames.shape[1:3]
    scale = min(1.0, side / max(height, width))
    if scale == 1.0:
        return frames
    return centre_crop_resize(frames, max(1, round(height * scale)), max(1, round(width * scale)))
