# SPDX-License-Identifier: Apache-2.0
"""The page of the demo: clips that play, grades, the fine-tuning before and after, and the commands to repeat
each.

Axes: t frames, h height, w width, c channels.
"""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from latte import __version__
from latte.checks import command_line
from latte.data.world.grading import Share
from latte.inference.pipeline import VideoPipeline
from latte.inference.requests import SampleRequest
from latte.page import html
from latte.page.plots import Series, line_plot, smooth

WINDOW = 10  # steps in the plotted mean of the loss


@dataclass(frozen=True)
class Clips:
    """Generated clips: prompt, seed, file and frames (t h w c) of each."""

    requests: Sequence[SampleRequest]
    folder: Path
    frames: Sequence[np.ndarray]

    @property
    def files(self) -> list[Path]:
        """Return the video of each clip."""
        return [self.folder / request.file for request in self.requests]

    def captioned(self) -> list[html.Html]:
        """Return each video above its prompt."""
        pairs = zip(self.files, self.requests, strict=True)
        return [html.media(file, str(item.prompt), width=128) for file, item in pairs]

    def videos(self) -> html.Html:
        """Return the videos side by side."""
        return html.row(*self.captioned())


@dataclass(frozen=True)
class Tuned:
    """A finished fine-tuning: the command that repeats it, its curve, held-out losses, clips and time."""

    command: str
    steps: Sequence[int]
    losses: Sequence[float]
    held_out: tuple[float, float]  # before and after
    before: Clips
    after: Clips
    seconds: float


@dataclass(frozen=True)
class Result:
    """Everything that the page shows: what was generated, what was read from it, and how long it took."""

    model: str
    seed: int
    pipe: VideoPipeline
    shown: Clips
    picture: Path  # the first frame of ``moved``
    moved: Clips
    guided_prompt: str
    guided: Mapping[float, Clips]  # guidance scale -> one clip
    sheet: Path
    shares: Mapping[str, Share]  # of clips of held-out combinations
    tuned: Tuned
    new_motion: tuple[Share, Share]  # clips that show it, before and after
    made: float  # seconds of generating and grading
    seconds: float  # in total


def report(result: Result) -> html.Html:
    """Return the page."""
    seconds = result.seconds
    before, after = result.tuned.held_out
    shown = result.new_motion
    tiles = {
        "of unseen combinations: kind, colour and direction right": f"{result.shares['all three'].value:.0%}",
        "consistent over all frames": f"{result.shares['consistent'].value:.0%}",
        f"held-out loss after fine-tuning, {before:.3f} before": f"{after:.3f}",
        f"of {shown[1].count} clips show an opening curtain, {shown[0].hits} before": shown[1].hits,
        "seconds in total": f"{seconds:.0f}",
    }
    return html.page(
        "Latte, the whole workflow",
        f"Generated, graded and fine-tuned on this machine in {seconds:.0f} seconds, offline.",
        html.tiles(tiles),
        clips_section(result),
        image_section(result),
        guidance_section(result),
        grades_section(result),
        training_section(result),
        machine_section(result),
    )


def clips_section(result: Result) -> html.Html:
    """Return the section with the clips of the demo's sentences."""
    settings = result.pipe.sample
    return html.section(
        "From sentences",
        html.prose(
            f"Model {result.model}, {parameters(result.pipe.model)} parameters, {settings.steps} steps of "
            f"{settings.sampler}, guidance {settings.guidance:g}. It reads English and Chinese. Not selected."
        ),
        result.shown.videos(),
        html.command(sample_command(result, result.shown)),
    )


def image_section(result: Result) -> html.Html:
    """Return the section with the clips that begin with an image."""
    image = html.media(result.picture, "The first frame of all clips.", width=128)
    line = sample_command(result, result.moved, "--first", result.picture.name)
    return html.section(
        "From an image and a sentence", html.row(image, *result.moved.captioned()), html.command(line)
    )


def guidance_section(result: Result) -> html.Html:
    """Return the section with one seed at several guidance scales."""
    clips = [
        html.media(clips.files[0], f"guidance {scale:g}", width=128) for scale, clips in result.guided.items()
    ]
    highest = max(result.guided)
    return html.section(
        "Guidance",
        html.prose(f"The same sentence ({result.guided_prompt}) and the same seed; guidance 1 is none."),
        html.row(*clips),
        html.command(sample_command(result, result.guided[highest], "--guidance", f"{highest:g}")),
    )


def sample_command(result: Result, clips: Clips, *options: str) -> str:
    """Return the command that repeats the first of the clips."""
    words = [clips.requests[0].prompt, "--seed", clips.requests[0].seed, *options]
    if result.model != "builtin":
        words = [result.model, "--prompt", *words]
    return command_line("sample", *words)


def grades_section(result: Result) -> html.Html:
    """Return the section with the grades of held-out combinations."""
    count = result.shares["consistent"].count
    rows = [
        (name, f"{share.hits} of {share.count}", "{:.0%} to {:.0%}".format(*share.interval))
        for name, share in result.shares.items()
    ]
    return html.section(
        "Are unseen combinations understood?",
        html.prose(
            f"{count} sentences with a combination of kind, colour and direction that was held out of "
            "training, in both languages. What the clips show is read from their pixels; a clip is "
            "consistent when every frame shows the same scene and nothing jumps."
        ),
        html.table(["right", "clips", "95 % interval"], rows),
        html.media(result.sheet, "All of them, not selected: a row per clip, every fourth frame."),
        html.command(command_line("demo", "--graded", count, "--seed", result.seed)),
    )


def training_section(result: Result) -> html.Html:
    """Return the section with the fine-tuning: clips before and after, its loss and its command."""
    tuned = result.tuned
    curve = [
        Series("every step", tuned.steps, tuned.losses, faint=True),
        Series(f"mean of {WINDOW}", tuned.steps, smooth(tuned.losses, WINDOW)),
    ]
    before, after = result.new_motion
    return html.section(
        "A motion that it has not seen",
        html.prose(
            f"Fine-tuned for {tuned.steps[-1]} steps on curtains that open. The sentences have "
            f"pairs of colours that were not trained on. Before, {before.hits} of {before.count} clips show "
            f"an opening curtain; after, {after.hits}. The loss on clips that were not trained on went from "
            f"{tuned.held_out[0]:.3f} to {tuned.held_out[1]:.3f}."
        ),
        html.tag("h3", {}, "Before"),
        tuned.before.videos(),
        html.tag("h3", {}, "After"),
        tuned.after.videos(),
        line_plot("Training loss", curve, "step", "loss", log_y=True),
        html.command(tuned.command),
    )


def machine_section(result: Result) -> html.Html:
    """Return the section with times and versions."""
    times = [
        ("generate and grade", result.made),
        ("fine-tune, with clips before and after", result.tuned.seconds),
        ("total", result.seconds),
    ]
    machine = {
        "device": result.pipe.device,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "latte": __version__,
    }
    return html.section(
        "This machine", html.table(["what", "seconds"], times), html.table(["", ""], list(machine.items()))
    )


def parameters(model: torch.nn.Module) -> str:
    """Return the number of parameters as text such as '2.6 million'."""
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2g} million"
