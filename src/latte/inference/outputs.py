# SPDX-License-Identifier: Apache-2.0
"""A folder of generated clips: one mp4 per seed, a gif of all of them, a contact sheet, and a record of what
they are.

The record (clips.json) holds what the clips are a function of, their prompts if
they have any, and the hash of each finished file. A second run into the same folder generates only what is
missing, in the same batches, so a killed job that is repeated ends with the same files as one that was never
killed. Several processes share the batches; each has a record of its own until all are merged.
Axes: b clips, t frames, h height, w width, c channels.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latte.checks import InputError, RunError, check, choose
from latte.data.media import contact_sheet, probe, read_frames, write_gif, write_mp4
from latte.diffusion.frame_conditioning import DEFAULT_STRENGTH
from latte.distributed import ALONE, Group, Team
from latte.files import commit_file, reported
from latte.inference.requests import SampleRequest
from latte.model.compiled import is_compiled

FORMAT = 1
RECORD = "clips.json"
OLD_RECORD = "album.json"  # of 0.1.0
PART = ".clips-{}.json"  # record of one of several processes, by its rank
MAX_SHOWN = 16  # clips on the sheet and in the gif
Frames = np.ndarray | Tensor | list[list[Image.Image]]
Generate = Callable[[int, Sequence[SampleRequest]], Iterable[tuple[int, np.ndarray]]]

OUTPUT_TYPES: dict[str, Callable[[np.ndarray], Frames]] = {  # from uint8 (b t h w c)
    "np": lambda frames: frames.astype(np.float32) / 255,
    "pt": lambda frames: torch.from_numpy(frames).movedim(-1, 2).float() / 255,  # (b t c h w)
    "pil": lambda frames: [[Image.fromarray(frame) for frame in clip] for clip in frames],
    "uint8": lambda frames: frames,
}


class CallOptions(TypedDict, total=False):
    """Further options of a call, which diffusers' pipelines do not have."""

    quality: str  # a name in QUALITIES, in the place of sampler and steps
    sampler: str  # a name in SAMPLERS
    eta: float  # noise of ddim, 0 to 1
    order: int  # of dpmpp and unipc, 1 to 3
    guidance_interval: tuple[float, float]  # noise levels noise / signal that are guided; all by default
    preview: bool  # the callback gets {"preview": uint8 (b t h w c)}, small
    cache: float  # threshold of the step cache; none by default
    batch_size: int  # videos generated at once; it does not change them
    window: int  # for longer videos than in training: latent frames that the model sees at a time
    longer: str  # how windows become one video, a name in LONG_VIDEO_METHODS
    overlap: int  # latent frames that adjacent windows share; half a window by default
    conditioning_strength: float  # guidance strength of image and last_image on the other frames


@dataclass(frozen=True)
class VideoPipelineOutput:
    """``frames`` of all videos, in the ``output_type`` asked for, and the seed of each."""

    frames: Frames
    seeds: list[int]


def export_to_video(
    frames: np.ndarray | Tensor | Sequence[Image.Image | np.ndarray], path: str | Path, fps: float = 8
) -> str:
    """Write one video to an mp4 (or gif) file and return its path.

    ``frames``: an array (t h w c), a tensor (t c h w), or a list of PIL images or arrays (h w c), as uint8 or
    floats in [0, 1]. InputError for anything else and for another file ending, RunError when the disk
    refuses.
    """
    write = choose("file ending", Path(path).suffix.lower(), {".mp4": write_mp4, ".gif": write_gif})
    write(path, to_frames(frames), fps)
    return str(path)


def to_frames(frames: np.ndarray | Tensor | Sequence[Image.Image | np.ndarray]) -> np.ndarray:
    """Convert one video in any output type to uint8 (t h w c)."""
    if isinstance(frames, Tensor):
        check(frames.ndim == 4, f"frames have the shape {tuple(frames.shape)}; pass one video (t c h w)")
        frames = frames.detach().cpu().movedim(1, -1).numpy()  # (t h w c)
    elif not isinstance(frames, np.ndarray):
        check(len(frames) > 0, "frames are empty; pass at least one")
        frames = np.stack(
            [
                np.asarray(frame.convert("RGB") if isinstance(frame, Image.Image) else frame)
                for frame in frames
            ]
        )
    check(
        frames.ndim == 4 and frames.shape[-1] == 3,
        f"frames have the shape {frames.shape}; pass one video (t h w 3), e.g. frames[0] of the output",
    )
    if frames.dtype == np.uint8:
        return frames
    in_range = np.issubdtype(frames.dtype, np.floating) and bool(((frames >= 0) & (frames <= 1)).all())
    check(in_range, f"frames are {frames.dtype} and not all in [0, 1]; pass uint8, or floats in [0, 1]")
    return np.rint(frames * 255).astype(np.uint8)


def clip_facts(pipe: Any, options: Mapping[str, Any], negative: str = "") -> dict[str, Any]:
    """Return everything but seed, label and prompt that decides the pixels of a clip, as plain data; images
    by their hash. Frames are those of the video, windows count latent frames.

    ``options`` are those of ``VideoPipeline.generate``. The keys, and so the default folder names, are those
    of 0.1.0.
    """
    images = options["conditioning_frames"]
    window = options["window"]
    facts = {key: value for key, value in options["config"].recorded().items() if key != "batch"}
    facts |= {"weights": pipe.weights, "codec": pipe.codec.fingerprint}
    facts |= {"frames": options["frames"], "size": options["size"], "dtype": str(options["dtype"])}
    if pipe.codec.temporal_factor > 1:
        facts["frames"] = options["frames"] or pipe.num_frames
    if window is not None:
        facts |= {"window": window, "longer": options["longer"], "overlap": options["overlap"]}
    if images:
        hashes = {str(frame): hashlib.sha256(image.tobytes()).hexdigest() for frame, image in images.items()}
        facts |= {"given": hashes, "given_strength": DEFAULT_STRENGTH}
    if is_compiled(pipe.model):
        facts["compile"] = True
    if options.get("sequence_parallel", 1) > 1:
        facts["sequence_parallel"] = options["sequence_parallel"]
    if pipe.decoder:
        facts["decoder"] = pipe.decoder.fingerprint
    if pipe.reader:
        facts |= {"text_encoder": pipe.reader.used, "negative": negative}
    return facts


def default_folder(pipe: Any, facts: Mapping[str, Any]) -> Path:
    """Return samples/NAME-HASH, so that the same command finds its own clips again."""
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]
    return Path("samples") / f"{Path(pipe.name).name}-{digest}"


def check_output_folder(folder: str | Path, num_bytes: int = 0) -> Path:
    """Return ``folder`` as a path; InputError for a name that cannot be a folder, RunError where it cannot be
    written.

    ``num_bytes`` is the space that the outputs need at least.
    """
    check(str(folder) != "", "--out is empty; give the name of a folder")
    path = Path(folder)
    try:
        exists = os.path.lexists(path)
        is_folder = path.is_dir()
        parent = next(place for place in (path, *path.absolute().parents) if place.is_dir())
    except (OSError, ValueError) as error:  # names that no file can have
        raise InputError(
            f"--out {str(folder)[:80]!r} cannot be a folder ({error}); give another name"
        ) from None
    check(is_folder or not exists, f"--out {str(folder)!r} exists and is not a folder; give another name")
    blocked = next(
        (place for place in path.absolute().parents if os.path.lexists(place) and not place.is_dir()), None
    )
    check(
        blocked is None,
        f"--out {str(folder)!r} is below {str(blocked)!r}, which is not a folder; give another name",
    )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise RunError(
            f"--out {str(folder)!r} cannot be written: no permission for {parent}; give another folder"
        )
    free = shutil.disk_usage(parent).free
    if num_bytes > free:
        raise RunError(
            f"the outputs need at least {num_bytes:,} bytes in {str(folder)!r}, but only {free:,} are free; "
            "make room, or ask for fewer, shorter or smaller clips"
        )
    return path


def smallest_clip(frames: int, height: int, width: int) -> int:
    """Return a lower bound of a clip's mp4 in bytes: container, and a little per frame and pixel."""
    return 1500 + 40 * frames + frames * height * width * 3 // 1000


def write_clips(
    folder: Path,
    requests: Sequence[SampleRequest],
    generate: Generate,
    facts: Mapping[str, Any],
    batch: int,
    fps: float,
    ranks: Group = ALONE,
    team: Team | None = None,
) -> tuple[Path, Path]:
    """Make ``folder`` hold a file per request and return (contact sheet, gif).

    ``generate(batch number, its requests)`` yields (seed, uint8 (t h w c)) for each. ``facts`` (plain data)
    is everything but the requests that decides the pixels. The folder is created with the first clip.
    All processes of ``ranks`` must call it, those of a ``team`` for the same clips, which its first writes.
    InputError when its clips were made with other facts, RunError when it cannot be written.
    """
    folder = check_output_folder(folder)
    record = ranks.run_on_rank0(whole_record, folder, facts)
    parts = [requests[start : start + batch] for start in range(0, len(requests), batch)]
    missing = [[one.file for one in part if not is_finished(folder, one, record)] for part in parts]
    missing = ranks.run_on_rank0(lambda: missing)
    todo = [number for number, files in enumerate(missing) if files]
    own = RECORD if ranks.size == 1 else PART.format(ranks.rank)
    for index in ranks.share(len(todo), team):
        number = todo[index]
        for request, (_, clip) in zip(parts[number], generate(number, parts[number]), strict=True):
            if request.file not in missing[number] or (team and team.rank):
                continue
            with reported("clips", folder):
                folder.mkdir(parents=True, exist_ok=True)
            write_mp4(folder / request.file, clip, fps)
            record["files"][request.file] = file_sha256(folder / request.file)
            if request.prompt is not None:
                record.setdefault("prompts", {})[request.file] = request.prompt
            write_record(folder / own, record)
    ranks.run_on_rank0(whole_record, folder, facts)
    return ranks.run_on_rank0(write_overview, folder, requests[:MAX_SHOWN], fps)


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a folder's record, or that of one process."""
    with reported(RECORD, path.parent):
        commit_file(path, json.dumps(record, indent=1, sort_keys=True) + "\n")


def whole_record(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the folder's record, after merging those of several processes into it, also of a job that was
    killed.
    """
    record = read_record(folder, facts)
    parts = sorted(folder.glob(PART.format("*")))
    for path in parts:
        part = read_record(folder, facts, path.name)
        record["files"] |= part["files"]
        if "prompts" in part:
            record["prompts"] = record.get("prompts", {}) | part["prompts"]
    if parts:
        write_record(folder / RECORD, record)
    for path in parts:
        path.unlink()
    return record


def read_record(folder: Path, facts: Mapping[str, Any], name: str = RECORD) -> dict[str, Any]:
    """Return the folder's record, or a new one; InputError when it is damaged or belongs to other facts."""
    now = json.loads(json.dumps(facts))
    path = folder / (name if (folder / name).exists() else OLD_RECORD)
    if not path.exists():
        return {"format": FORMAT, "facts": now, "files": {}}
    try:
        record = json.loads(path.read_text("utf-8"))
        before = record["facts"]
        files = dict(record["files"])
        prompts = dict(record.get("prompts", {}))
        keys = [key for key in dict.fromkeys([*before, *now]) if before.get(key) != now.get(key)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{path} is damaged; delete {folder}, or give another --out") from None
    if keys:
        changes = ", ".join(f"{key} ({before.get(key)} there, {now.get(key)} now)" for key in keys)
        raise InputError(f"--out {folder} holds clips of other settings: {changes}; give another --out")
    return {**record, "files": files, **({"prompts": prompts} if prompts else {})}


def is_finished(folder: Path, request: SampleRequest, record: Mapping[str, Any]) -> bool:
    """Return whether the request's file is there, unaltered and of the same prompt (shortened names can
    collide).
    """
    name = request.file
    files = record["files"]
    same = record.get("prompts", {}).get(name) == request.prompt
    return same and name in files and (folder / name).is_file() and file_sha256(folder / name) == files[name]


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_overview(folder: Path, requests: Sequence[SampleRequest], fps: float) -> tuple[Path, Path]:
    """Write the contact sheet and the gif from the clips' files; return their paths."""
    clips = []
    for request in requests:
        info = probe(folder / request.file)
        clips.append(read_frames(info, range(info.frames)))
    captions = [caption_of(request) for request in requests]
    sheet = folder / "sheet.png"
    gif = folder / "clips.gif"
    with reported("the contact sheet", sheet):
        contact_sheet(clips, captions=captions).save(sheet)
    write_gif(gif, mosaic(clips), fps)
    return sheet, gif


def caption_of(request: SampleRequest) -> str:
    """Return the line above a clip on the contact sheet."""
    name = request.prompt or request.word
    if name is None and request.label is not None:
        name = str(request.label)
    return ", ".join(filter(None, [f"seed {request.seed}", name]))


def mosaic(clips: Sequence[np.ndarray], gap: int = 2) -> np.ndarray:
    """Arrange clips of one shape, uint8 (t h w c), in a square of rows and columns; return uint8 (t H W
    c), white between them.
    """
    columns = math.ceil(math.sqrt(len(clips)))
    rows = math.ceil(len(clips) / columns)
    t, h, w, c = clips[0].shape
    board = np.full((t, rows * (h + gap) - gap, columns * (w + gap) - gap, c), 255, np.uint8)
    for index, clip in enumerate(clips):
        y = index // columns * (h + gap)
        x = index % columns * (w + gap)
        board[:, y : y + h, x : x + w] = clip
    return board
