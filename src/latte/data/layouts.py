# SPDX-License-Identifier: Apache-2.0
"""How the paper's four data sets lie on disk; a folder that lies otherwise is refused with its first misfit and the expected tree.

The trees are those that the released code reads. Any other folder of videos is ``data.kind=folder``.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from latte.checks import InputError
from latte.data.skipped import ScanResult


@dataclass(frozen=True)
class Layout:
    """``frames``: is a clip a folder of numbered images (else a video file)? ``num_classes`` folders at the top, None for no labels."""

    frames: bool
    tree: tuple[str, ...]
    num_classes: int | None = None


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


def check_layout(name: str, found: ScanResult) -> None:
    """InputError that names the first clip which does not fit layout ``name``, and draws the tree."""
    layout = LAYOUTS[name]
    expected = "\n".join(
        (
            f"a {name} folder looks like this; for any other folder of videos set data.kind=folder:",
            *layout.tree,
        )
    )
    for path in [clip.info.path for clip in found.clips] + [bad["path"] for bad in found.skipped]:
        key = Path(path).relative_to(found.root).as_posix()
        if os.path.isdir(path) != layout.frames:
            what, wanted = (
                ("a folder of images", "video files")
                if os.path.isdir(path)
                else ("a video file", "folders of numbered images")
            )
            raise InputError(
                f"data.root {found.root!r}: {key!r} is {what}, but clips of {name} are {wanted}\n{expected}"
            )
        if layout.num_classes and len(Path(key).parts) != 2:
            raise InputError(f"data.root {found.root!r}: {key!r} does not lie at <class>/<clip>\n{expected}")
    if layout.num_classes and found.classes and len(found.classes) != layout.num_classes:
        raise InputError(
            f"data.root {found.root!r} holds {len(found.classes)} classes, but {name} has {layout.num_classes}\n{expected}"
        )
