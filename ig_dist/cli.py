"""The command line: ``ig-dist VERB``. Thin: what a verb does is imported when it runs, so that help is quick."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ig_dist.errors import ConfigError
from ig_dist.terminal import console, is_main_process, run_app, warn

app = typer.Typer(
    help="Train, sample and score diffusion transformers with Internal Guidance.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[a.b=c ...]", help="Config values to replace.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory of `ig-dist train`.")]
Ema = Annotated[float | None, typer.Option(help="Decay of the average to use; default: the first of ema.decays.")]
Raw = Annotated[bool, typer.Option("--raw", help="Use the weights themselves instead of an average.")]
Weak = Annotated[str | None, typer.Option(help="Second model of autoguidance: RUN, RUN@STEP or an export folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, e.g. configs/digits.yaml.")],
    overrides: Overrides = None,
    force_config: Annotated[
        bool, typer.Option("--force-config", help="Go on under a changed config; what changed is printed.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what the run will take (memory, days); train nothing.")
    ] = False,
    gpus: Annotated[int, typer.Option(min=1, help="With --dry-run: GPUs.")] = 8,
    mfu: Annotated[float, typer.Option(min=0.01, max=1.0, help="With --dry-run: share of the peak reached.")] = 0.4,
    peak_tflops: Annotated[float, typer.Option(min=0.1, help="With --dry-run: peak of a GPU (H100: 989).")] = 989.0,
) -> None:
    """Train a model; run the same command again to resume."""
    from ig_dist.config_file import load_config

    loaded = load_config(config, overrides or [])
    if is_main_process():
        for line in loaded.warnings():
            warn(line)
    if dry_run:
        from ig_dist.dry_run import dry_run as tell

        return tell(loaded, gpus=gpus, mfu=mfu, peak_tflops=peak_tflops)

    from ig_dist.training.trainer import train as run_training

    run_training(loaded, force=force_config)


@app.command()
def export(run: Run, ema: Ema = None, raw: Raw = False) -> None:
    """Export the newest checkpoint as safetensors, for sampling and for others to use."""
    from ig_dist.config_file import load_run
    from ig_dist.export import export_run

    console.print(str(export_run(load_run(run), ema=ema, raw=raw)))


@app.command()
def sample(
    run: Run,
    overrides: Overrides = None,
    preset: Annotated[
        str | None, typer.Option(help="Sample as published: paper, or paper-ig (no CFG). Other options come on top.")
    ] = None,
    num: Annotated[int | None, typer.Option(min=1, help="Number of images (sample.num).")] = None,
    labels: Annotated[str | None, typer.Option(help="balanced or random (sample.labels).")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Image i depends on (seed, i) only (sample.seed).")] = None,
    solver: Annotated[str | None, typer.Option(help="euler, heun or euler_maruyama (sample.solver).")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the solver (sample.steps).")] = None,
    ig_scale: Annotated[float | None, typer.Option(help="Internal Guidance scale; 1: off.")] = None,
    cfg_scale: Annotated[float | None, typer.Option(help="Classifier-free guidance scale; 1: off.")] = None,
    ig_interval: Annotated[str | None, typer.Option(help="Times LOW,HIGH at which IG is on (t = 1 is noise).")] = None,
    cfg_interval: Annotated[str | None, typer.Option(help="Times LOW,HIGH at which CFG is on.")] = None,
    weak: Weak = None,
    auto_scale: Annotated[float | None, typer.Option(help="Scale of autoguidance by --weak; 1: off.")] = None,
    auto_interval: Annotated[str | None, typer.Option(help="Times LOW,HIGH at which autoguidance is on.")] = None,
    ema: Ema = None,
    raw: Raw = False,
    png: Annotated[
        int | None, typer.Option(min=0, help="Write the first so many as PNG files too (sample.png).")
    ] = None,
    drop_images: Annotated[
        bool, typer.Option("--drop-images", help="With --evaluate: keep features only (sample.keep_images=false).")
    ] = False,
    score: Annotated[bool, typer.Option("--evaluate", help="Score them too, as `ig-dist evaluate` does.")] = False,
) -> None:
    """Make the images of a plan: one npz and a picture of some of them. Any number of processes may share the work."""
    from ig_dist.config_file import load_run, with_guidance
    from ig_dist.evaluation.recipes import recipe
    from ig_dist.evaluation.sampling import sample_run
    from ig_dist.export import export_run

    given: dict[str, Any] = {
        "num": num,
        "labels": labels,
        "seed": seed,
        "solver": solver,
        "steps": steps,
        "weak_model": weak,
    }
    given |= {"png": png, "keep_images": False if drop_images else None}
    options = [f"sample.{key}={value}" for key, value in given.items() if value is not None]
    published = [] if preset is None else recipe(preset, load_run(run).model)
    config = with_guidance(
        load_run(run, [*published, *(overrides or []), *options]),
        ig_scale=ig_scale,
        cfg_scale=cfg_scale,
        auto_scale=auto_scale,
        ig_interval=_interval("--ig-interval", ig_interval),
        cfg_interval=_interval("--cfg-interval", cfg_interval),
        auto_interval=_interval("--auto-interval", auto_interval),
    )
    made = sample_run(config, export_run(config, ema=ema, raw=raw), config.evaluate.metrics if score else ())
    if score:
        evaluate(made.samples.url)


@app.command()
def evaluate(
    samples: Annotated[
        str | None,
        typer.Argument(metavar="SAMPLES", help="Folder of a plan's samples, an npz (arr_0), or a folder of pictures."),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="Real images: an npz of statistics (ADM's), an index, pictures. Default: the training data."),
    ] = None,
    metrics: Annotated[str | None, typer.Option(help="Scores, comma separated (evaluate.metrics).")] = None,
    protocol: Annotated[str | None, typer.Option(help="adm or torch-fidelity, where the two differ.")] = None,
    num: Annotated[int | None, typer.Option(min=2, help="Score the first so many images only.")] = None,
    weights: Annotated[
        list[str] | None, typer.Option(metavar="EXTRACTOR=PATH", help="Weights of an extractor that lie elsewhere.")
    ] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Cut pictures of files to this side, as ADM.")] = None,
    nearest: Annotated[
        int | None, typer.Option(min=1, help="Draw so many samples above the nearest real pictures.")
    ] = None,
    check_against_adm: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Score ADM's own files; they must give what ADM published.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score images; every score comes with its protocol. Any number of processes may share the work."""
    from ig_dist.evaluation import evaluate as evaluation
    from ig_dist.evaluation.referee import check_against_adm as check
    from ig_dist.evaluation.tables import print_result, print_verdicts

    console.stderr = as_json  # stdout is the JSON alone
    places = dict(_pair("--weights", text) for text in weights or [])
    if check_against_adm is not None:
        verdicts = check(check_against_adm, places)
        if is_main_process():
            print_verdicts(verdicts)
        raise typer.Exit(0 if all(verdict.passed for verdict in verdicts) else 4)
    if samples is None:
        raise ConfigError(
            "name what to score: a folder of samples, an npz or a folder of pictures, e.g. `ig-dist evaluate"
            " RUN/samples/PLAN`"
        )
    done = evaluation.evaluate(
        samples,
        reference=reference,
        metrics=_metrics(metrics),
        protocol=_choice("--protocol", protocol, ("adm", "torch-fidelity")),  # type: ignore[arg-type]
        num=num,
        weights=places,
        image_size=image_size,
        nearest=nearest,
    )
    if done is None:  # not the first of several processes
        return
    if as_json:
        return _print_json(done.result)
    print_result(done.result)
    if done.file is not None:
        console.print(f"written to {done.file}", markup=False)


@app.command()
def reference(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Index, folder, npz or tars of real pictures.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The npz to write; FILE.json beside it says of what.")],
    extractors: Annotated[
        str, typer.Option(help="Comma separated: inception, dinov2, efficientnet_lite0.")
    ] = "inception",
    image_size: Annotated[int | None, typer.Option(min=1, help="Cut pictures of files to this side, as ADM.")] = None,
    weights: Annotated[
        list[str] | None, typer.Option(metavar="EXTRACTOR=PATH", help="Weights of an extractor that lie elsewhere.")
    ] = None,
    tokenizer: Annotated[str, typer.Option(help="Of an index, where it is not found under its name.")] = "",
) -> None:
    """Make statistics of real pictures, as ADM's files have them. Any number of processes may share the work."""
    from ig_dist.evaluation.making_references import make_reference

    places = dict(_pair("--weights", text) for text in weights or [])
    made = make_reference(
        source, out, extractors=extractors.split(","), image_size=image_size, weights=places, tokenizer=tokenizer
    )
    if made is not None:
        console.print(made, markup=False)


@app.command()
def sweep(
    run: Run,
    overrides: Overrides = None,
    ig_scale: Annotated[str, typer.Option(help="IG scales, comma separated.")] = "1.0,1.2,1.4,1.7,2.0,2.5",
    cfg_scale: Annotated[str, typer.Option(help="CFG scales, comma separated.")] = "1.0",
    ig_interval: Annotated[
        list[str] | None, typer.Option(help="Times LOW,HIGH at which IG is on; give it again for more.")
    ] = None,
    cfg_interval: Annotated[
        list[str] | None, typer.Option(help="Times LOW,HIGH at which CFG is on; give it again for more.")
    ] = None,
    weak: Weak = None,
    auto_scale: Annotated[str, typer.Option(help="Scales of autoguidance by --weak, comma separated.")] = "1.0",
    auto_interval: Annotated[str | None, typer.Option(help="Times LOW,HIGH at which autoguidance is on.")] = None,
    emas: Annotated[str | None, typer.Option("--ema", help="Decays of averages, comma separated.")] = None,
    steps: Annotated[str | None, typer.Option("--checkpoint", help="Steps of checkpoints, comma separated.")] = None,
    metrics: Annotated[str | None, typer.Option(help="Scores, comma separated (evaluate.metrics).")] = None,
    target: Annotated[str | None, typer.Option(help="The score to search for. Default: the first one.")] = None,
    halving: Annotated[
        bool, typer.Option("--halving", help="All points on few images, the better half on twice as many, and so on.")
    ] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds per point; scores become means with deviations.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Score a grid of guidance scales with common noise: table, sweep.json, plot and picture grid."""
    from ig_dist.config_file import load_run
    from ig_dist.evaluation.sweep import Axes, sweep_run
    from ig_dist.evaluation.tables import print_sweep

    console.stderr = as_json  # stdout is the JSON alone
    given = {"sample.weak_model": weak, "evaluate.metrics": metrics and f"[{metrics}]"}
    axes = Axes(
        _numbers("--ig-scale", ig_scale),
        _numbers("--cfg-scale", cfg_scale),
        _numbers("--auto-scale", auto_scale),
        [_interval("--ig-interval", text) for text in ig_interval or []] or [None],
        [_interval("--cfg-interval", text) for text in cfg_interval or []] or [None],
        [None] if emas is None else _numbers("--ema", emas),
        [None] if steps is None else [int(step) for step in _numbers("--checkpoint", steps)],
    )
    result = sweep_run(
        load_run(run, [*(overrides or []), *(f"{key}={value}" for key, value in given.items() if value)]),
        axes,
        auto_interval=_interval("--auto-interval", auto_interval),
        seeds=seeds,
        target=target,
        halving=halving,
    )
    if not result:  # not the first of several processes
        return
    if as_json:
        return _print_json(result)
    print_sweep(result)
    console.print(f"written: {run}/sweep.json, {run}/sweep.png, {run}/grid.png", markup=False)


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="Published checkpoint; or a folder of ours, to go back.")
    ],
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="Folder to make; or the file, to go back.")],
    format: Annotated[
        str | None,
        typer.Option(help="sit, repa, ig-sit, lightningdit or ig-lightningdit, where the weights do not tell."),
    ] = None,
    aux_depth: Annotated[
        int | None, typer.Option(min=1, help="Block whose output the auxiliary head reads; of XL models: 8.")
    ] = None,
    num_heads: Annotated[
        int | None, typer.Option(min=1, help="Attention heads of a size that is not published.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Take `model` of a checkpoint instead of `ema`.")] = False,
    data: Annotated[
        str | None, typer.Option(metavar="INDEX", help="Its latents' index: DEST can then be sampled from like a run.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Instead of --data, of latents with a fixed scale: sd-vae-ft-ema.")
    ] = None,
) -> None:
    """Convert published weights (SiT, REPA, IG, LightningDiT) to ours, or ours back; nothing in a file is run."""
    from ig_dist.convert import convert_back, convert_published
    from ig_dist.convert_checks import known_format

    published = None if format is None else known_format(format)
    if source.is_dir():
        done = convert_back(source, dest, published=published)
    else:
        done = convert_published(
            source,
            dest,
            published=published,
            aux_depth=aux_depth,
            num_heads=num_heads,
            raw=raw,
            index=data,
            tokenizer=tokenizer,
        )
    console.print(f"{done.published}: {done.describe()}", markup=False)
    console.print(f"{done.parameters:,} parameters, sha256 {done.weights_sha256}")
    console.print(
        "self-check: converting back gives the same bits; velocities at t = 0.25 and 0.75 are finite and differ from"
        f" those of the untouched weights in their own time by {done.difference:g}"
    )
    if source.is_dir():
        console.print(f"written: {dest}")
    elif (dest / "config.yaml").is_file():
        console.print(f"written: {dest}; sample from it with `ig-dist sample {dest}`", markup=False)
    else:
        console.print(f"written: {dest}; train on from it with train.init_from={dest}", markup=False)


@app.command()
def report(
    run: Run,
    out: Annotated[Path | None, typer.Option(help="The HTML file; default: RUN/report.html.")] = None,
) -> None:
    """Write one HTML file of a run: curves, pictures, scores with their protocol, config."""
    from ig_dist.report.page import write_report

    console.print(f"written: {write_report(run, out)}")


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for everything that it makes.")] = Path("quickstart"),
    short: Annotated[bool, typer.Option("--short", help="A fifth of the training, a third of the images.")] = False,
) -> None:
    """The whole system on real digits, in about six minutes on two cores."""
    from ig_dist.quickstart import run_quickstart

    run_quickstart(out, short=short)


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text!r}: give numbers separated by commas, e.g. 1.0,1.4") from None


def _interval(option: str, text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    numbers = _numbers(option, text)
    if len(numbers) != 2 or not 0 <= numbers[0] <= numbers[1] <= 1:
        raise ConfigError(f"{option} {text!r}: give LOW,HIGH with 0 <= LOW <= HIGH <= 1, e.g. 0.3,1")
    return numbers[0], numbers[1]


def _pair(option: str, text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator:
        raise ConfigError(f"{option} {text!r}: give EXTRACTOR=PATH, e.g. inception=weights.pth")
    return name, value


def _choice(option: str, value: str | None, known: tuple[str, ...]) -> str | None:
    if value is not None and value not in known:
        raise ConfigError(f"{option} {value!r}: use {' or '.join(known)}")
    return value


def _metrics(text: str | None) -> list[str]:
    from ig_dist.evaluation.catalogue import check_metrics

    return [] if text is None else check_metrics(text.split(","), "--metrics")


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=1))


def main() -> None:
    """Entry point of ``ig-dist``."""
    run_app(app)


if __name__ == "__main__":
    main()
