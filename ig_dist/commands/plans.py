"""``ig-dist plans``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

from ig_dist.commands.options import AsJson, argument, print_json
from ig_dist.terminal import console


def plans(
    run: Annotated[Path, argument("RUN", "Run directory of `ig-dist train`.")],
    as_json: AsJson = False,
) -> None:
    """List the plans that a run has samples of: how they were made, how many, their scores and their folder."""
    from ig_dist.evaluation.tables import print_plans
    from ig_dist.plans.samples import list_plans

    found = list_plans(run)
    if not as_json and not found:
        return console.print(f"no samples yet; make some with: ig-dist sample {shlex.quote(str(run))}")
    if not as_json:
        return print_plans(found)
    print_json(
        {
            "run": str(run),
            "plans": [
                {
                    "folder": listed.url,
                    "plan": None if listed.plan is None else listed.plan.model_dump(mode="json"),
                    "finished": listed.plan is not None,
                    "images" if listed.plan else "units": listed.images,
                    "scores": dict(listed.scores),
                }
                for listed in found
            ],
        }
    )
