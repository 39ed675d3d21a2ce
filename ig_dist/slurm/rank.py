"""One process of a job on a node, started by srun: ``python -m ig_dist.slurm.rank FOLDER START``.

It tells the job who it is in torchrun's words, and leaves its exit code for the job's first process, which decides what
comes next. A rank that was killed leaves none.
"""

import os
import runpy
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType

from ig_dist.errors import ConfigError
from ig_dist.launching.endings import STOPPED
from ig_dist.parallel.blame import VARIABLE
from ig_dist.slurm.record import ACCUMULATION, BLAME_NAME, Folder
from ig_dist.terminal import MERGED_LATER, leave


def main(folder: str, start: str) -> None:
    """Run the job's command as this rank."""
    number = os.environ["SLURM_PROCID"]
    exits = Path(folder) / "exits" / start
    task, local = int(os.environ.get("SLURM_ARRAY_TASK_ID", "0")), int(os.environ["LOCAL_WORLD_SIZE"])
    os.environ["RANK"] = str(task * local + int(number))
    os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
    os.environ["IG_DIST_NODE"] = os.environ["SLURMD_NODENAME"]  # as users know it
    exits.mkdir(parents=True, exist_ok=True)
    os.environ[VARIABLE] = str(exits / BLAME_NAME)

    def note(code: int) -> None:
        (exits / number).write_text(str(code))

    def stop(signal_number: int, frame: FrameType | None) -> None:
        note(STOPPED)
        os._exit(0)

    # The trainer puts its own handler in its place. Until then nothing is lost, nor is it in jobs whose work is in
    # units that are written whole. SIGTERM is no such wish: srun sends it to the others when a rank has failed.
    signal.signal(signal.SIGUSR2, stop)
    submission = Folder(Path(folder)).read()
    try:
        os.chdir(submission.cwd or ".")  # SLURM would go on in /tmp, and a container begins in a folder of its own
    except OSError as error:
        said = f"{submission.cwd}, where it was submitted: {error.strerror}: submit from a folder that all nodes share"
        print(f"error: {os.environ['IG_DIST_NODE']}: {said}", flush=True)
        note(ConfigError.exit_code)
        leave(ConfigError.exit_code)
    if submission.array:
        os.environ[MERGED_LATER] = "1"
    (command,) = submission.commands
    code = run([part.replace(ACCUMULATION, os.environ["IG_DIST_ACCUMULATION"]) for part in command])
    note(code)
    # srun ends the other ranks when one ends badly; one that has saved and stopped has not: rank 0 may still be writing
    leave(0 if code == STOPPED else code)


def run(arguments: list[str]) -> int:
    """``python -m MODULE ...`` in this process; its exit code."""
    sys.argv = arguments[1:]
    try:
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    main(*sys.argv[1:])
