# SPDX-License-Identifier: Apache-2.0
"""``latte plan``: what a run costs, before anything runs and without its data or weights."""

from dataclasses import asdict

from latte.cli.options import OVERRIDABLE, Debug, Json, Overrides, Run, show, table

__all__ = ["OVERRIDABLE", "plan"]


def plan(run: Run, overrides: Overrides = None, as_json: Json = False, debug: Debug = False) -> None:
    """Parameters and operations of a run's model, exactly and by the paper's counting rule."""
    from latte.build import plan as plan_of
    from latte.config import load_run

    found = plan_of(load_run(run, overrides or [])[0])
    rows = [
        ("parameters", f"{found.parameters:,}"),
        ("operations per clip", f"{found.operations:,}"),
        ("as in Table 3", f"{found.table3.parameters:,} parameters, {found.table3.operations_g:,.6f} G operations"),
        ("latent", " x ".join(map(str, found.latent)) + " (frames, channels, height, width)"),
        ("tokens per clip", f"{found.tokens:,}"),
        ("clips seen in training", f"{found.clips_seen:,}"),
    ]
    show(asdict(found), as_json, table(rows))
