"""``ig-dist plans``."""

import shlex
from pathlib import Path
from typing import Annotated

from ig_dist.commands.options import AsJson, argument, print_json
from ig_dist.terminal import console


def plans(run: Annotated[Path, argument("RUN", "Run directory of `ig-dist train`.")], as_json: AsJson = False) -> None:
    """List the samples of a run: how they were made, and scores."""
    from ig_dist.evaluation.tables import print_plans
    from ig_dist.plans.samples import list_plans

    found = list_plans(run)
    if as_json:
        told = [
            {
                "folder": listed.url,
                "plan": listed.plan and listed.plan.model_dump(mode="json"),
                "finished": listed.plan is not None,
                "images" if listed.plan else "units": listed.images,
                "scores": dict(listed.scores),
            }
            for listed in found
        ]
        print_json({"run": str(run), "plans": told})
    elif found:
        print_plans(found)
    else:
        console.print(f"no samples yet; make some with: ig-dist sample {shlex.quote(str(run))}")
