# SPDX-License-Identifier: Apache-2.0
"""How the paper's four data sets are stored; another layout is refused with its first misfit and the expected
tree.

The trees are those that the released code reads. Any other folder of videos is ``data.kind=folder``.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from latte.checks import InputError

if TYPE_CHECKING:
    from latte.data.skipped import ScanResult


@dataclass(frozen=True)
class Layout:
    """How one data set is stored."""

    frames: bool  # a clip is a folder of numbered images, not a video file
    tree: tuple[str, ...]  # the expected tree, line by line
    num_classes: int | None = None  # number of folders at the top; None: no labels


LAYOUTS = {
    "faceforensics": Layout(False, ("<root>/", "  <any folders>/", "    <clip>.mp4, .avi, ...")),
    "skytimelapse": Layout(
        True, ("<root>/", "  <any folders>/", "    <clip>/", "      <name>_0001.jpg, <name>_0002.jpg, ...")
    ),
    "ucf101": Layout(
        False,
        ("<root>/", "  ApplyEyeMakeup/", "    v_ApplyEyeMakeup_g01_c01.avi, ...", "  ... 101 folders in all"),
        101,
    ),
    "taichi": Layout(
        True, ("<root>/", "  <any folders>/", "    <clip>/", "      0000001.png, 0000002.png, ...")
    ),
}


def check_layout(name: str, found: "ScanResult") -> None:
    """InputError that names the first clip which does not fit layout ``name``, and shows the expected
    tree.
    """
    layout = LAYOUTS[name]
    introduction = f"a {name} folder looks like this; for any other folder of videos set data.kind=folder:"
    expected = "\n".join((introduction, *layout.tree))
    kinds = {True: "a folder of images", False: "a video file"}
    for path in [clip.info.path for clip in found.clips] + [bad["path"] for bad in found.skipped]:
        key = Path(path).relative_to(found.root).as_posix()
        is_folder = os.path.isdir(path)
        if is_folder != layout.frames:
            needed = "video files"
            if layout.frames:
                needed = "folders of numbered images"
            raise InputError(
                f"data.root {found.root!r}: {key!r} is {kinds[is_folder]}, but clips of {name} are {needed}\n"
                + expected
            )
        if layout.num_classes and len(Path(key).parts) != 2:
            raise InputError(f"data.root {found.root!r}: {key!r} is not at <class>/<clip>\n{expected}")
    num_classes = len(found.classes)
    if layout.num_classes and num_classes not in (0, layout.num_classes):
        raise InputError(
            f"data.root {found.root!r} holds {num_classes} classes, but {name} has {layout.num_classes}\n"
            + expected
        )
