"""The quickstart's story: what it says is what it does, at first, when it goes on and when all is there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ig_dist.commands import quickstart
from ig_dist.config.file import load_config, to_yaml
from ig_dist.errors import ConfigError

# a training that logs and then waits for the signal
TRAINING = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
open(sys.argv[1], "a").write('{"step": 60}\\n')
time.sleep(60)
"""


def left_at(step: int, out: Path) -> None:
    """What an earlier quickstart left."""
    run = out / "run"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(load_config("digits", ["train.steps=180"])))
    (run / "metrics.jsonl").write_text(f'{{"step": {step}}}\n' if step else "")


@pytest.mark.parametrize(
    ("step", "said", "not_said"),
    [
        (0, ["and interrupt it", "we send SIGTERM", "3. Resume"], []),
        (100, ["took it to step 100 of 180", "goes on from"], ["interrupt", "SIGTERM", "3. Resume"]),
        (180, ["took it to step 180 of 180", "nothing to do"], ["interrupt", "SIGTERM", "3. Resume"]),
    ],
)
def test_it_announces_what_it_does(
    step: int,
    said: list[str],
    not_said: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    left_at(step, tmp_path)
    commands: list[list[str]] = []

    def stand_in(command: list[str]) -> list[str]:
        first = command[1] == "train" and step == 0 and not any(other[1] == "train" for other in commands)
        commands.append(command)
        return [sys.executable, "-c", TRAINING if first else "", str(tmp_path / "run/metrics.jsonl")]

    monkeypatch.setattr(quickstart, "_command", stand_in)
    for name in ("_real_features", "_conclude"):
        monkeypatch.setattr(quickstart, name, lambda *_, **__: "")
    quickstart.quickstart(tmp_path, short=True)
    text = " ".join(capsys.readouterr().out.split())
    assert all(words in text for words in said) and not any(words in text for words in not_said)
    trainings = 2 if step == 0 else 1
    assert [command[1] for command in commands] == ["encode", *["train"] * trainings, "export", "sweep", "report"]


def test_one_of_another_length_is_left_alone(tmp_path: Path) -> None:
    left_at(100, tmp_path)
    with pytest.raises(ConfigError, match=r"holds a quickstart of 180 steps, this one has 900: give another --out"):
        quickstart.quickstart(tmp_path, short=False)


def test_commands_where_files_have_the_names_of_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)
    command = quickstart._command(["ig-dist", "report", "my run", "ema.decays=[0.97]"])
    assert capsys.readouterr().out == "$ ig-dist report 'my run' 'ema.decays=[0.97]'\n"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "not this one" not in done.stderr


def test_the_end_names_files_and_commands_as_a_shell_takes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    folder = tmp_path / "my [run]" / "sweeps" / "ig_scale"
    folder.mkdir(parents=True)
    rows = [{"ig_scale": scale, "scores": {"fd_pixel": fd}} for scale, fd in ((1.0, 4.0), (1.4, 3.0))]
    (folder / "sweep.json").write_text(json.dumps({"rows": rows}))
    quickstart._conclude(tmp_path / "my [run]", Path("my data"), 60.0, "")
    out = capsys.readouterr().out
    assert "IG scale 1.4 has 0.75 of the unguided distance" in out and f"{folder}/grid.png" in out
    assert f"ig-dist sample '{tmp_path}/my [run]' --ig-scale" in out and "'data.index=my data'" in out
    assert f"source {sys.prefix}/bin/activate" in out
