"""Ranks in a container: by pyxis, whose options srun has, or by Apptainer (Singularity), which stands before Python."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from ig_dist.errors import ConfigError, IgDistError
from ig_dist.slurm.commands import slurm


def in_container(
    image: str, mounts: str, needed: Sequence[Path], source: Path, *, gpus: bool
) -> tuple[dict[str, str | bool], list[str]]:
    """How ranks are started in an image: more options of srun; Python and what stands before it, none: as here.

    Args:
        image: a file (.sif, .sqsh) or a name in a registry; empty: no container.
        mounts: ``A:B,C``, a folder of the node and its place in the container.
        needed: folders that must be there too, at their own place.
        source: the copy of the code.
        gpus: the ranks have some.

    Raises:
        ConfigError: the image is not there, or is for pyxis, which srun does not know.
    """
    if not image:
        if mounts:
            raise ConfigError(f"--container-mounts {mounts}: name the image too, --container IMAGE")
        return {}, []
    file = Path(image)
    if image.endswith((".sif", ".sqsh")) and not file.exists():
        raise ConfigError(f"--container {image} does not exist: give a file, or a name in a registry")
    pairs = [(part.split(":") * 2)[:2] if ":" not in part else part.split(":") for part in mounts.split(",") if part]

    def inside(path: Path) -> bool:
        return any(path.is_relative_to(pair[1]) for pair in pairs)

    # without the code that is installed there: what was submitted is run, and an image may set variables of its own
    python = sys.executable if inside(Path(sys.prefix)) else "python3"
    own = ["env", f"PYTHONPATH={source}", "PYTHONSAFEPATH=1", python]
    pairs += [[str(path)] * 2 for path in dict.fromkeys(needed) if not inside(path)]
    bound, image = ",".join(":".join(pair) for pair in pairs), str(file.absolute()) if file.exists() else image
    pyxis = False if image.endswith(".sif") or file.is_dir() else _srun_knows_pyxis()
    if pyxis:
        return {"container-image": image, "container-mounts": bound}, own
    if not (image.endswith(".sif") or file.is_dir() or "://" in image):
        raise ConfigError(
            f"--container {image}: srun knows no --container-image here (no pyxis): give what Apptainer reads,"
            " FILE.sif, a folder or docker://NAME"
        )
    program = "singularity" if shutil.which("singularity") and not shutil.which("apptainer") else "apptainer"
    return {}, [program, "exec", *(["--nv"] if gpus else []), "--bind", bound, image, *own]


def check_lines(python: Sequence[str]) -> list[str]:
    """Shell lines that end a start on a node that has no such program."""
    if python[:1] in ([], ["env"]):
        return []
    said = f"error: $SLURMD_NODENAME: no {python[0]} on PATH (--container): load its module, see --setup"
    return [f'command -v {python[0]} > /dev/null || {{ echo "{said}" >&2; exit 2; }}']


def _srun_knows_pyxis() -> bool:
    try:
        return "--container-image" in slurm("srun", "--help")
    except IgDistError:  # a dry run without SLURM
        return True
