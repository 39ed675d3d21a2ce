"""``import ig_dist``: what a notebook types makes what the command line makes."""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import ig_dist
from ig_dist.commands.encode import encode as encode_command
from ig_dist.commands.sweep import sweep as sweep_command
from ig_dist.encoding.loader import helpers
from ig_dist.errors import ConfigError
from ig_dist.pipeline import Pipeline
from tests.conftest import ROOT, TINY, run_command, succeed

GUIDED = "--ig-scale 1.4 --ig-interval 0.2,1 --cfg-scale 1.35 --cfg-interval 0,0.7"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, digits_index: Path) -> Path:
    """A run that was trained here, from groups in a dict."""
    groups = {**TINY, "data": {**TINY["data"], "index": str(digits_index)}}
    before = signal.getsignal(signal.SIGTERM)
    trained = ig_dist.train(groups, "train.steps=40", run={"dir": tmp_path_factory.mktemp("api") / "run"})
    assert signal.getsignal(signal.SIGTERM) is before
    return trained


@pytest.fixture(scope="module")
def pipe(run: Path) -> Pipeline:
    return ig_dist.load(run)


def by_command(run: Path, options: str) -> np.ndarray[Any, Any]:
    """The images of ``ig-dist sample``, and the units that they were merged from."""
    done = succeed(["ig-dist", "sample", run, *options.split()])
    file = next(word for word in done.stdout.replace(",", " ").split() if word.endswith("samples.npz"))
    with np.load(file) as stored:
        return np.asarray(stored["arr_0"])


@pytest.mark.parametrize("solver", ["euler", "heun", "euler_maruyama"])
def test_images_are_bitwise_those_of_the_command_line(run: Path, pipe: Pipeline, solver: str) -> None:
    expected = by_command(run, f"--num 21 --seed 3 --solver {solver} --steps 5 {GUIDED}")
    guided: dict[str, Any] = {"ig_scale": 1.4, "ig_interval": (0.2, 1), "cfg_scale": 1.35, "cfg_interval": (0, 0.7)}
    images = pipe(num=21, seed=3, solver=solver, steps=5, output="numpy", **guided)
    assert images.shape == (21, 8, 8, 1) and np.array_equal(images, expected)  # units of 16, batches of 8
    assert len(np.unique(images.reshape(21, -1), axis=0)) == 21


def test_labels_are_classes_by_number_or_name_and_every_output_holds_the_same(run: Path, pipe: Pipeline) -> None:
    expected = by_command(run, "--num 5 --class 3,7,7")
    images = pipe(labels=[3, "7", 7], num=5)
    assert images.labels == [3, 7, 7, 3, 7]
    assert np.array_equal(np.stack([np.asarray(image) for image in images])[..., None], expected)
    tensor, latents = pipe([3, 7, 7], num=5, output="torch"), pipe(np.array([3, 7, 7]), num=5, output="latents")
    assert np.array_equal(tensor.numpy(), expected)
    assert np.array_equal(pipe.decode(latents, output="numpy"), expected)
    assert len(pipe(labels=range(4))) == 4 and pipe("random", num=9).labels != list(range(9))

    picture = ig_dist.grid([images[:2], images[2:]])  # rows
    assert picture.size == (3 * 48 + 4, 2 * 48 + 2) and picture.getpixel((147, 0)) == 255
    assert np.array_equal(np.asarray(images.grid(columns=2))[3:48:6, 53:98:6], expected[1, ..., 0])
    assert images._repr_png_().startswith(b"\x89PNG") and images[1:3].labels == [7, 7]
    large = [Image.new("RGB", (256, 256), colour) for colour in ("red", "blue")]
    assert ig_dist.grid(large, side=100).size == (202, 100)


def test_autoguidance_exports_and_averages(run: Path, pipe: Pipeline) -> None:
    expected = by_command(run, f"--num 6 --weak {run}@20 --auto-scale 2 --ema 0.9")
    other = ig_dist.load(run, ema=0.9)
    images = other(num=6, weak=f"{run}@20", auto_scale=2.0, output="numpy")
    assert np.array_equal(images, expected) and not np.array_equal(pipe(num=6, output="numpy"), expected)
    lone = ig_dist.load(other.export)  # its plan is the run's, which it lies in
    assert np.array_equal(lone(num=6, weak=f"{run}@20", auto_scale=2.0, output="numpy"), expected)
    assert ig_dist.load(f"{run}@20").info.step == 20
    with pytest.raises(ConfigError, match="guides nothing without a scale"):
        pipe(num=2, weak=f"{run}@20")
    assert "step 40, EMA 0.99" in repr(pipe) and "auxiliary head after block 1" in repr(pipe)


def test_velocity_is_what_the_heads_say(pipe: Pipeline) -> None:
    x, labels = pipe.noise(3, seed=5), [1, "2", len(pipe.classes)]
    assert x.shape == (3, 1, 8, 8) and torch.equal(x, pipe.noise(4, seed=5)[:3])
    output = pipe.model(x.float(), torch.full((3,), 0.5), torch.tensor([1, 2, 10]))
    assert torch.equal(pipe.velocity(x, 0.5, labels), output.velocity.double())
    assert torch.allclose(pipe.velocity(x, 0.5, labels, ig_scale=0), output.aux_velocity.double())
    null = pipe.velocity(x, 0.5, 10)
    guided = pipe.velocity(x, 0.5, labels, cfg_scale=2.0)
    assert torch.allclose(guided, 2 * output.velocity.double() - null, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda pipe: pipe(), "say how many images"),
        (lambda pipe: pipe(["cat"]), "there is no class 'cat'"),
        (lambda pipe: pipe(num=2, stesp=3), "did you mean 'sample.steps'"),
        (lambda pipe: pipe(num=2, output="jpeg"), "use 'pil'"),
        (lambda pipe: pipe(num=2, auto_scale=2.0), "sample.weak_model"),
        (lambda pipe: pipe(num=2, preset="papre"), "did you mean 'paper'"),
        (lambda pipe: pipe.velocity(pipe.noise(3), 0.5, [1, 2]), "2 labels for 3 rows"),
        (lambda pipe: ig_dist.load("nowhere"), "no run and no weights there"),
        (lambda pipe: ig_dist.train("digitz"), "did you mean digits"),
        (lambda pipe: ig_dist.train({**TINY, "data": {"index": "x"}}), "run.dir"),
        (lambda pipe: ig_dist.encode("digits", "x", max_rejected=2), "is not a fraction"),
    ],
)
def test_mistakes_are_the_command_lines_errors(
    pipe: Pipeline, wrong: Callable[[Any], Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        wrong(pipe)
    assert words in str(caught.value)
    assert caught.value._render_traceback_() == [f"ConfigError: {caught.value}"]  # what IPython shows
    assert not list(tmp_path.iterdir())


def test_the_verbs_write_what_the_command_line_writes(
    run: Path, digits_index: Path, tmp_path: Path, tiny_config: Callable[..., Path]
) -> None:
    ig_dist.encode("digits", tmp_path / "data")
    assert (tmp_path / "data/index.json").read_bytes() == (digits_index / "index.json").read_bytes()

    succeed(["ig-dist", "train", tiny_config(train={"steps": 40})])
    theirs = ig_dist.load(tmp_path / "runs/tiny")
    assert theirs.info.weights_sha256 == ig_dist.load(run).info.weights_sha256

    url = ig_dist.sample(run, "sample.num=70", seed=2, ig_scale=1.4)
    scored = ig_dist.evaluate(url)
    assert scored is not None and scored.result["protocol"]["num"] == 70 and scored.file is not None
    done = run_command(["ig-dist", "evaluate", url, "--json"])
    assert yaml.safe_load(done.stdout)["scores"] == scored.result["scores"]
    found = ig_dist.sweep(run, "sample.num=70", "sample.seed=2", ig_scale=[1.4])
    assert found["rows"][0]["scores"] == scored.result["scores"]
    assert ig_dist.write_report(run, tmp_path / "report.html").stat().st_size > 1000


def test_a_training_that_is_interrupted_leaves_the_process_as_it_was(
    tiny_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)]
    config = tiny_config(train={"steps": 30})

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("ig_dist.training.trainer.train_step", interrupted)
        ig_dist.train(config)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)] == before
    assert not torch.distributed.is_initialized()

    def stopped(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)  # the kernel is interrupted
        return train_step(*arguments)

    from ig_dist.training.learner import train_step

    with monkeypatch.context() as patch, pytest.raises(ig_dist.IgDistError, match="of 30; run the same"):
        patch.setattr("ig_dist.training.trainer.train_step", stopped)
        ig_dist.train(str(config))
    run = ig_dist.train(config)  # goes on
    assert ig_dist.load(run).info.step == 30
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)] == before


def test_a_hang_is_said_and_left_to_the_user(
    tiny_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from ig_dist.training.learner import train_step

    def slow(*arguments: Any) -> Any:
        learner, _, step, _ = arguments
        if step == 3:
            learner.meter.phases.enter("forward")
            time.sleep(1.6)
        return train_step(*arguments)

    monkeypatch.setattr("ig_dist.training.trainer.train_step", slow)
    run = ig_dist.train(tiny_config(train={"steps": 4, "timeout_s": 1}))
    assert "no progress for" in capfd.readouterr().err and list((run / "hang").iterdir())
    assert ig_dist.load(run).info.step == 4


def test_helper_processes_do_not_run_the_users_script_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "mine.py"
    script.write_text("raise SystemExit('run again')")
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(script), raising=False)
    with helpers() as context, ProcessPoolExecutor(1, mp_context=context) as pool:
        assert pool.submit(abs, -1).result() == 1


def test_functions_have_the_defaults_of_their_commands() -> None:
    for function, command in ((ig_dist.encode, encode_command), (ig_dist.sweep, sweep_command)):
        ours, theirs = inspect.signature(function).parameters, inspect.signature(command).parameters
        assert ours.keys() - theirs.keys() <= {"source", "ema", "checkpoint"}, function
        for name in ours.keys() & theirs.keys() - {"overrides"}:
            given, default = theirs[name].default, ours[name].default
            if isinstance(given, str) and isinstance(default, tuple):
                given = tuple(map(float, given.split(",")))
            assert default == given or (given is None and default == (None,)), name


def test_the_package_is_typed_and_imports_torch_when_it_is_needed() -> None:
    script = "import sys, ig_dist; dir(ig_dist); ig_dist.IgDistError; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
    assert set(ig_dist.__all__) <= set(dir(ig_dist)) and all(getattr(ig_dist, name) for name in ig_dist.__all__)
    assert (ROOT / "ig_dist/py.typed").is_file()
    assert "tests/typed_api.py" in (ROOT / "pyproject.toml").read_text()  # what mypy must say of a user's code
