"""Mistakes in a submission: one line that names the culprit and the remedy, exit code 2, nothing submitted or left."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import run_command
from tests.integration.test_bad_input import call
from tests.slurm_cluster import SlurmCluster
from tests.slurm_runs import launch, write_config

CASES = {
    "unknown partition": (["--partition", "main,hihg"], ["--partition main,hihg", "did you mean 'high'?"]),
    "tasks that are no number": (["--job", "sample", "--tasks", "8x", "runs/a"], ["--tasks '8x'", "16%4"]),
    "a misspelt option of the job": (
        ["--job", "sample", "runs/a", "--ig-scal", "2"],
        ["--job sample", "--ig-scal", "did you mean --ig-scale?"],
    ),
    "an encoding of nothing": (["--job", "encode", "--dest", "x"], ["--job encode", "--source"]),
    "more nodes than there are": (["--nodes", "4"], ["SLURM refuses", "node configuration", "--nodes"]),
    "more GPUs than a node has": (["--gpus-per-node", "8"], ["SLURM refuses", "node configuration", "--gpus-per-node"]),
    "more CPUs than a node has": (["--cpus-per-gpu", "64"], ["SLURM refuses", "configuration", "--cpus-per-gpu"]),
    "more memory than a node has": (["--mem", "9000G"], ["SLURM refuses", "node configuration", "--mem"]),
    "an unknown feature": (["--constraint", "h100"], ["SLURM refuses", "feature", "--constraint"]),
    "an unknown node": (["--exclude", "node77"], ["SLURM refuses", "node name", "--exclude"]),
    "more time than the partition gives": (
        ["--time", "2-00:00:00"],
        ["--time 2-00:00:00", "partition main", "0-02:00"],
    ),
    "a signal before the start": (["--time", "5", "--signal-delay", "300"], ["--signal-delay 300", "--time 5"]),
    "a time that is none": (["--time", "soon"], ["--time 'soon'", "HH:MM:SS"]),
    "a range upside down": (["--nodes", "8-4"], ["--nodes '8-4'", "4-8"]),
    "no range": (["--nodes", "two"], ["--nodes 'two'"]),
    "GPUs and tasks": (["--gpus-per-node", "2", "--tasks-per-node", "3"], ["--tasks-per-node", "without GPUs"]),
    "processes that do not divide": (
        ["--tasks-per-node", "3", "--gpus-per-node", "0"],
        ["--nodes 1 with 3 processes", "data.streams 8", "1, 2, 4, 8"],
    ),
    "a misspelt option": (["--partitoin", "main"], ["unknown option --partitoin", "--partition"]),
    "a verb instead of a config": (["sample", "runs/a"], ["'sample' stands where a config stands", "--job sample"]),
    "two configs": (["digits"], ["two configs", "digits"]),
    "a misspelt key": (["trian.steps=5"], ["trian", "train"]),
    "a missing index": (["data.index=nowhere"], ["data.index", "nowhere", "ig-dist encode"]),
    "a folder that cannot be written": (["run.dir=/proc/run"], ["/proc/run", "can be written"]),
    "a run that is a file": (["run.dir=FILE"], ["FILE", "run.dir"]),
    "a folder for a training": (["--folder", "x"], ["--folder is for arrays", "run.dir"]),
    "an option of sbatch that the job needs": (["--sbatch", "signal=USR1@5"], ["--sbatch signal", "as it is"]),
    "an option of sbatch that is ours": (["--sbatch", "--partition=high"], ["--sbatch partition", "use --partition"]),
    "nothing that may follow": (["--then", "smaple"], ["--then 'smaple'", "sample, sweep, evaluate"]),
    "a score of no samples": (["--then", "evaluate"], ["--then 'evaluate'", "put --then sample before it"]),
    "a misspelt option of what follows": (["--then", "sample --ig-scal 2"], ["--then sample", "--ig-scale?"]),
    "an image for pyxis": (["--container", "debian"], ["--container debian", "no pyxis", "FILE.sif"]),
    "no image": (["--container", "FILE.sif"], ["--container", "FILE.sif does not exist"]),
    "mounts of no image": (["--container-mounts", "/a:/b"], ["--container-mounts /a:/b", "--container IMAGE"]),
    "no option of sbatch": (["--sbatch", "=high"], ["--sbatch '=high'", "KEY=VALUE"]),
    "nodes for an array": (["--job", "sample", "--nodes", "2"], ["--nodes", "--tasks"]),
    "an array without a run": (["--job", "sample"], ["--job sample", "run directory"]),
    "an encoding without a place": (["--job", "encode", "--source", "digits"], ["--dest"]),
}


@pytest.fixture
def cluster(slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmCluster]:
    for name, value in slurm.environment().items():
        monkeypatch.setenv(name, value)
    yield slurm


def left(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_nothing_submitted(
    case: str, cluster: SlurmCluster, tmp_path: Path, digits_index: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, words = CASES[case]
    config, file = write_config(tmp_path, digits_index), tmp_path / "FILE"
    file.touch()
    before = left(tmp_path)
    given = [argument.replace("FILE", str(file)) for argument in arguments]
    first = [] if "--job" in arguments else ["--config", str(config)]
    code, errors = call(["launchers/slurm.py", *first, *given], capsys)
    assert code == 2 and errors.count("\n") == 1 and errors.startswith("error: "), errors
    for word in words:
        assert word in errors, errors
    assert left(tmp_path) == before and not cluster.run("squeue", "-h")


def test_no_slurm_here(
    tmp_path: Path, digits_index: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    code, errors = call(["launchers/slurm.py", "--config", str(write_config(tmp_path, digits_index))], capsys)
    assert code == 2 and "no sinfo on PATH" in errors and "ig-dist launch" in errors
    assert not (tmp_path / "run").exists()


def test_commands_without_a_cluster(
    tmp_path: Path, digits_index: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not shutil.which("sinfo") or Path("/etc/slurm/slurm.conf").exists():
        pytest.skip("no SLURM commands on this machine, or a cluster")
    monkeypatch.delenv("SLURM_CONF", raising=False)
    code, errors = call(["launchers/slurm.py", "--config", str(write_config(tmp_path, digits_index))], capsys)
    assert code == 2 and "knows of no cluster" in errors and "ig-dist launch" in errors
    assert not (tmp_path / "run").exists()


def test_a_controller_that_is_away(
    tmp_path: Path, digits_index: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not shutil.which("sinfo"):
        pytest.skip("no SLURM commands on this machine")
    (tmp_path / "slurm.conf").write_text(
        "ClusterName=x\nSlurmctldHost=x(127.0.0.1)\nSlurmctldPort=1\nAuthType=auth/none\nMessageTimeout=2\n"
    )
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    code, errors = call(["launchers/slurm.py", "--config", str(write_config(tmp_path, digits_index))], capsys)
    assert code == 1 and errors.count("\n") == 1 and "error: sinfo: " in errors, errors


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("partitoin: main", ["unknown option 'partitoin'", "'partition'"]),
        ("- 1", ["option: value"]),
        ("{: ]", ["not valid YAML"]),
    ],
)
def test_a_cluster_file_that_is_wrong(
    text: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    monkeypatch.setenv("IG_DIST_CLUSTER", str(file))
    code, errors = call(["launchers/slurm.py", "--nodes", "2"], capsys)
    assert code == 2 and errors.count("\n") == 1 and str(file) in errors, errors
    for word in words:
        assert word in errors
    code, errors = call(["launchers/slurm.py", "status", str(tmp_path)], capsys)
    assert code == 2 and "was never submitted" in errors, errors  # that file is no business of looking and ending


def test_dry_run_prints_the_script_of_an_h100_cluster(tmp_path: Path) -> None:
    """Without SLURM, nodes of eight GPUs are assumed; environment and cluster file say what was not typed."""
    (tmp_path / "cluster.yaml").write_text("account: vision\npartition: batch\nsetup: [module load cuda]\n")
    before = left(tmp_path)
    done = launch(
        "--dry-run",
        "--nodes",
        "8",
        f"run.dir={tmp_path / 'run'}",
        env={
            "PATH": str(tmp_path),
            "IG_DIST_CLUSTER": str(tmp_path / "cluster.yaml"),
            "IG_DIST_SLURM_PARTITION": "h100",
        },
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and "would be refused: data.index" in done.stderr
    lines = done.stdout.splitlines()
    folder = (
        next(line for line in lines if line.startswith("#SBATCH --output=")).split("=", 1)[1].rpartition("/log/")[0]
    )
    assert folder.startswith(f"{tmp_path}/run/slurm/")
    assert [line for line in lines if line.startswith("#SBATCH")] == [
        "#SBATCH --account=vision",
        f"#SBATCH --chdir={Path.cwd()}",
        "#SBATCH --cpus-per-task=12",
        "#SBATCH --exclusive",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --job-name=train-run",
        "#SBATCH --mem=0",
        "#SBATCH --nodes=8",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --open-mode=append",
        f"#SBATCH --output={folder}/log/batch.log",
        "#SBATCH --partition=h100",
        "#SBATCH --requeue",
        "#SBATCH --signal=B:USR2@120",
        "#SBATCH --time=1-00:00:00",
    ]
    assert lines.index("module load cuda") < lines.index(
        "export PYTHONSAFEPATH=1  # or the working directory would come before it"
    )
    assert f"export PYTHONPATH={folder}/source${{PYTHONPATH:+:$PYTHONPATH}}" in lines
    (started,) = (line for line in lines if line.startswith("#   srun"))
    for part in ("--nodes=8", "--ntasks=64", "--ntasks-per-node=8", "--cpus-per-task=12", "--kill-on-bad-exit=1"):
        assert part in started.split()
    assert f"# each process: python -m ig_dist.cli train {folder}/config.yaml train.accumulation=1" in lines
    assert (
        lines[-2] == "# of a batch of 256, a process has 4 images on 8 nodes"
        and "fewer nodes are hardly slower" in lines[-1]
    )
    assert left(tmp_path) == before


def test_dry_run_asks_the_cluster_where_there_is_one(cluster: SlurmCluster, tmp_path: Path, digits_index: Path) -> None:
    before = left(tmp_path)
    config = write_config(tmp_path, digits_index)
    done = launch("--dry-run", "--nodes", "1-2", "--config", config, "--partition", "cpu,main")
    assert done.returncode == 0 and not done.stderr, done.stderr
    for line in (
        "--partition=cpu,main",
        "--gpus-per-node=2",
        "--mincpus=8",
        "--nodes=1-2",
        "--time=0-02:00:00",
        "--exclusive",
    ):
        assert f"#SBATCH {line}" in done.stdout.splitlines()
    told = [line for line in done.stdout.splitlines() if line.startswith(("# on", "# each"))]
    assert [line.split(" train.")[-1] for line in told] == [
        "# on 1 node, 2 processes:",
        "accumulation=2",  # as many images at a time as on two
        "# on 2 nodes, 4 processes:",
        "accumulation=1",
    ]
    assert left(tmp_path) == [*before, str(config)] and not cluster.run("squeue", "-h")


def test_an_array_that_is_only_looked_at(
    cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever --dry-run stands, and whatever sbatch's own variables say: those of places are followed, others not."""
    monkeypatch.setenv("SBATCH_PARTITION", "cpu")
    monkeypatch.setenv("SBATCH_NO_REQUEUE", "1")
    words = ["--job", "encode", "--tasks", "4%2", "--source", "digits", "--dest", str(tmp_path / "x"), "--dry-run"]
    done = run_command(["python", "launchers/slurm.py", *words, "--sbatch", "hint=nomultithread"])
    out, errors = done.stdout, done.stderr
    assert (
        done.returncode == 0
        and errors == "warning: not followed, for the batch script says it all: SBATCH_NO_REQUEUE\n"
    )
    assert "#SBATCH --array=0-3%2" in out and "#SBATCH --dependency=afterany:ENCODE" in out
    assert out.count("#SBATCH --partition=cpu") == 2 and "gpus" not in out
    assert out.count("#SBATCH --cpus-per-task=2") == 2  # of four threads, one for each core
    assert not left(tmp_path) and not cluster.run("squeue", "-h")
