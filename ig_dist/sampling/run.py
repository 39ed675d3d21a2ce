"""From a run to samples: plan, units with their features, one npz as ADM's evaluator reads it, pictures for people."""

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from ig_dist.config import Config
from ig_dist.config.catalogue import extractors_of
from ig_dist.errors import ConfigError, IgDistError
from ig_dist.export import load_export
from ig_dist.features.extractors.extractor import Extractor, get_extractor
from ig_dist.features.features import FeatureFiles, feature_name
from ig_dist.features.images import plan_images
from ig_dist.features.npz import Streamed, open_npz, remove_stale, write_npz
from ig_dist.plans.plan import class_names, image_numbers, make_plan
from ig_dist.plans.samples import Samples, existing, read_unit, samples_url, unit_name, write_file, write_plan
from ig_dist.sampling.generate import generate_units
from ig_dist.sampling.pictures import pictures_in_rows, pil_images, png
from ig_dist.sampling.solving import Models, autoguided, decoder, load_second
from ig_dist.storage.files import open_url
from ig_dist.storage.urls import is_local
from ig_dist.storage.writable import why_unwritable
from ig_dist.terminal import console, is_first_process, is_main_process
from ig_dist.terminal.progress import progress
from ig_dist.this_process import this_device

LIST_EVERY_S = 1.0  # the folder, for the units of other workers
NPZ_NAME = "samples.npz"
SHOWN, IN_A_ROW = 64, 8  # images in the picture of a plan


def sample_run(
    config: Config,
    export: Path,
    metrics: Sequence[str] = (),
    *,
    num: int | None = None,
    collected: bool = True,
    out: str | None = None,
) -> tuple[Samples, FeatureFiles]:
    """Make all images of the config's plan with exported weights, and the features that scores need of them.

    Under several processes each is a worker; the first one collects the images into ``samples.npz`` and a picture.
    Workers need not start together, and may die and be started again.

    Args:
        config: the run's.
        export: folder of the weights.
        metrics: scores whose features are made beside the images.
        num: only the units of the first so many images; None: all.
        collected: write the npz and the picture.
        out: folder of these samples; None: one of the plan's hash among those of the run.

    Raises:
        ConfigError: the config asks for what these weights cannot do, or ``out`` holds samples of another plan.
    """
    device = this_device()
    extractors = [config_extractor(config, name, device) for name in extractors_of(metrics)]
    model, info = load_export(export, device)
    tokenizer = decoder(config, info, device)
    weak_model, weak = load_second(config, device) if autoguided(config) else (None, None)
    plan = make_plan(config, info, info.weights_sha256, weak)
    keep_images = config.sample.keep_images
    if not keep_images and not extractors:
        raise ConfigError(
            "sample.keep_images=false keeps the features alone, and none are asked for: sample with --evaluate, or keep"
            " the images"
        )
    url = out.rstrip("/") if out else f"{samples_url(config)}/{plan.digest}"
    samples = Samples(plan, info, url, tokenizer.uint8_rule, config.sample.tokenizer, weak)
    if out:
        _claim(samples)
    counted_by = unit_name if keep_images else lambda number: feature_name(number, extractors[-1].name)
    models = Models(model, info, tokenizer, weak_model)
    with _plan_progress(samples, counted_by, num) as told:
        files = generate_units(models, samples, extractors, num=num, keep_images=keep_images, on_progress=told)
    write_plan(samples, config)  # every worker: all units are there, and who scores now may be faster than the first
    if collected and is_main_process():
        _collect(samples, config)
    return samples, files


def check_places(config: Config, out: str | None = None) -> None:
    """Find out before the work whether its samples can be written."""
    place, asked = out or samples_url(config), out or config.sample.url
    if reason := why_unwritable(place):
        mend = "choose another folder" if asked else "give --out FOLDER, or sample.url=FOLDER, one that can be written"
        raise ConfigError(f"{'--out' if out else 'sample.url'} {place} cannot be written ({reason}): {mend}")


def config_extractor(config: Config, name: str, device: torch.device) -> Extractor:
    """An extractor with the weights that the config says."""
    return get_extractor(name, weights=config.evaluate.weights.get(name, ""), device=device)


def _claim(samples: Samples) -> None:
    """Mark a folder as that of this plan; the names of units do not say whose they are."""
    fs, path = open_url(samples.url, "--out")
    mark, found = f".plan-{samples.plan.digest}", existing(fs, path)
    if any(name.startswith((".plan-", "unit_")) for name in found) and mark not in found:
        raise ConfigError(f"--out {samples.url} holds samples of another plan: choose another folder")
    write_file(fs, f"{path}/{mark}", b"")


@contextlib.contextmanager
def _plan_progress(
    samples: Samples, file_name: Callable[[int], str], num: int | None
) -> Iterator[Callable[[int], None]]:
    """Progress of a plan over all of its workers, shown by the first one: finished units count, whoever made them."""
    plan, wanted = samples.plan, min(num or samples.plan.num, samples.plan.num)
    fs, path = open_url(samples.url, "sample.url")

    def finished() -> int:
        names, units = existing(fs, path), range(-(-wanted // plan.unit_size))
        return min(sum(len(plan.unit(number)) for number in units if file_name(number) in names), wanted)

    first = finished() if is_first_process() else 0
    if is_first_process():
        console.print(f"sample {plan.describe()}: {wanted} images, {first} of them are there")
    due, before, made = time.monotonic() + LIST_EVERY_S, 0, 0

    with progress("sample", wanted, "images", first) as advance:

        def update(in_hand: int) -> None:
            nonlocal due, before, made
            made, before = made + max(0, in_hand - before), in_hand
            if is_first_process() and time.monotonic() >= due:
                advance(made, min(finished() + in_hand, wanted))  # another worker may have made the unit in hand
                due, made = time.monotonic() + LIST_EVERY_S, 0

        yield update


def _collect(samples: Samples, config: Config) -> None:
    """The npz, single pictures where they are asked for, and a picture of some."""
    names = class_names(config, samples.info)
    if config.sample.png:
        write_pngs(samples, config.sample.png, samples.info.classes)
    made = f"{samples.plan.num} images: {samples.url}"
    if config.sample.keep_images:
        write_samples_npz(samples)
        made += f"/{NPZ_NAME}"
    console.print(f"{made}, some of them: {write_picture(samples, Path(config.run.dir), names)}")


def write_samples_npz(samples: Samples) -> None:
    """All images of a plan in order as ``samples.npz`` beside the units (arr_0 images, arr_1 labels), unit by unit.

    Consecutive blocks of 5,000 are mixed in their classes, whatever the plan's labels, as the inception score wants it.
    One that is there and whole is left as it is. What killed workers left of their units is removed.
    """
    plan, (fs, path) = samples.plan, open_url(samples.url, "sample.url")
    if is_local(fs):
        remove_stale(Path(path), "unit_*.tmp")
    with contextlib.suppress(IgDistError):  # none, or a part of one
        if open_npz(f"{samples.url}/{NPZ_NAME}").member("arr_0").shape[0] == plan.num:
            return
    units, shape = range(plan.num_units), read_unit(plan, samples.url, 0).images.shape[1:]

    def images() -> Iterator[NDArray[Any]]:
        return (read_unit(plan, samples.url, number).images for number in units)

    arrays = {
        "arr_0": Streamed((plan.num, *shape), "uint8", images),
        "arr_1": Streamed((plan.num,), "int64", lambda: map(plan.unit_labels, units)),
    }
    write_npz(fs, f"{path}/{NPZ_NAME}", arrays)


def write_picture(samples: Samples, run: Path, classes: Sequence[str]) -> str:
    """The first images with their classes as one PNG, in the run or beside samples elsewhere; gives its place."""
    plan, images = samples.plan, read_unit(samples.plan, samples.url, 0).images[:SHOWN]
    names = [classes[label] for label in plan.unit_labels(0)]
    rows = [("", images[i : i + IN_A_ROW], names[i : i + IN_A_ROW]) for i in range(0, len(images), IN_A_ROW)]
    inside, (place, _, name) = run / "samples", samples.url.rpartition("/")
    if name != plan.digest:  # a folder that was asked for
        file = f"{samples.url}/samples.png"
    elif Path(place) != inside and (run / "config.yaml").is_file() and not why_unwritable(inside):
        file = f"{inside}/{plan.digest}.png"
    else:
        file = f"{samples.url}.png"
    fs, path = open_url(file, "sample.url")
    write_file(fs, path, png(pictures_in_rows(rows, plan.describe())))
    return file


def write_pngs(samples: Samples, num: int, classes: list[str]) -> None:
    """The first ``num`` images as ``png/000000_class.png`` beside the units."""
    plan, images, (fs, path) = samples.plan, plan_images(samples), open_url(samples.url, "sample.url")
    labels = plan.image_labels(image_numbers(range(min(num, plan.num)))).tolist()
    for number, label in enumerate(labels):
        picture = pil_images(images.read(range(number, number + 1)).images)[0]
        name = re.sub(r"[^\w-]+", "_", classes[label])
        write_file(fs, f"{path}/png/{number:06d}_{name}.png", png(picture))
