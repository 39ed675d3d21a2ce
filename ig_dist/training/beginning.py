"""Where a run begins: its own newest checkpoint, another run's, given weights, or the initial weights."""

from collections.abc import Callable
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from pydantic import ValidationError

from ig_dist.checkpoints.exchange import Loaded
from ig_dist.checkpoints.reading import Checkpoint
from ig_dist.checkpoints.store import CheckpointStore, checkpoint_store
from ig_dist.config import Config
from ig_dist.config.file import load_run, saved_config
from ig_dist.data.index import ShardIndex
from ig_dist.errors import ConfigError, DamagedError
from ig_dist.export import Meta
from ig_dist.models.dit import DiT
from ig_dist.parallel.dist import Dist, from_main
from ig_dist.run_dir import Identity, differences, new_identity, read_identity, refuse_other_config


def find_checkpoint(
    store: CheckpointStore, config: Config, index: ShardIndex, dist: Dist, beat: Callable[[], None], *, force: bool
) -> tuple[Loaded | None, Identity]:
    """What to go on from: the run's own newest whole checkpoint, else that of ``run.fork_from``. COLLECTIVE.

    Returns:
        It, and which run this is.

    Raises:
        ConfigError: no such checkpoint, or one that this run cannot go on from.
        DataError: the run has checkpoints and none is whole.
    """
    own, new = from_main((read_identity(Path(config.run.dir)), new_identity()) if dist.is_main else None, dist)

    def fits(checkpoint: Checkpoint) -> None:
        theirs = _run_of(checkpoint)
        if own.id and theirs.id and own.id != theirs.id:
            raise ConfigError(
                f"{checkpoint.url} is of another run, {theirs.id}, and not of {own.id} ({config.run.dir}): take it"
                " away, or begin from it with run.fork_from or train.init_from"
            )
        if not own.id and (differ := differences(checkpoint.meta["config"], config)):
            refuse_other_config(checkpoint.url, differ, force=force)
        if checkpoint.meta["index_sha256"] != index.sha256:
            raise ConfigError(
                f"the index at {index.folder} is not the one that {checkpoint.url} was trained on:"
                " restore it, or train in another run.dir"
            )
        _check_same_model(checkpoint, config)

    checkpoint = store.find(dist, keep=True, fits=fits, beat=beat)
    theirs = Identity("") if checkpoint is None else _run_of(checkpoint)
    if checkpoint is None and config.run.fork_from:
        checkpoint = _fork(config, dist, beat)
        new = Identity(new.id, _run_of(checkpoint).id)
    identity = next(one for one in (own, theirs, new) if one.id)
    return None if checkpoint is None else Loaded(checkpoint, dist), identity


def _run_of(checkpoint: Checkpoint) -> Identity:
    """The run that saved a checkpoint.

    Raises:
        DamagedError: what a training stores beside its tensors is not there.
    """
    try:
        return Meta.model_validate(checkpoint.meta).run
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise DamagedError(f"meta.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _fork(config: Config, dist: Dist, beat: Callable[[], None]) -> Checkpoint:
    run, _, step = config.run.fork_from.partition("@")
    other = checkpoint_store(load_run(run))
    if step and not step.isdecimal():
        raise ConfigError(f"run.fork_from {config.run.fork_from!r}: {step!r} is no step; write RUN or RUN@1000")

    def fits(checkpoint: Checkpoint) -> None:
        _check_same_model(checkpoint, config)
        if config.train.steps is not None and checkpoint.step >= config.train.steps:
            raise ConfigError(
                f"run.fork_from: {run} is at step {checkpoint.step}, train.steps is {config.train.steps}:"
                " raise train.steps, or fork from an earlier step with RUN@STEP"
            )

    checkpoint = other.find(dist, int(step) if step else None, keep=True, fits=fits, beat=beat)
    if checkpoint is None:
        raise ConfigError(f"run.fork_from: {run} has no checkpoint yet")
    return checkpoint


def _check_same_model(checkpoint: Checkpoint, config: Config) -> None:
    """Refuse what this run cannot go on from.

    Raises:
        ConfigError: it is of another model, optimizer or average.
        DamagedError: its tensors are not those of its own model.
    """
    _run_of(checkpoint)
    theirs = saved_config(checkpoint.meta["config"], checkpoint.url)
    if theirs.model.to_dit() != config.model.to_dit():
        raise ConfigError(
            f"{checkpoint.url} is of another model than this config: use its model group, or begin a new run.dir"
            " (with train.init_from for its weights)"
        )
    if theirs.optimizer.kind != config.optimizer.kind:
        raise ConfigError(
            f"{checkpoint.url} has the state of optimizer.kind={theirs.optimizer.kind}, this config has"
            f" {config.optimizer.kind}: use that kind, or begin a new run.dir (with train.init_from for its weights)"
        )
    if theirs.optimizer.decay_pos_embed != config.optimizer.decay_pos_embed:
        decays = "decays" if theirs.optimizer.decay_pos_embed else "is constant"
        raise ConfigError(
            f"{checkpoint.url} is of a run whose table of positions {decays}: set optimizer.decay_pos_embed="
            f"{str(theirs.optimizer.decay_pos_embed).lower()}, or begin a new run.dir (with train.init_from)"
        )
    missing = [decay for decay in config.ema.decays if decay not in theirs.ema.decays]
    if missing:
        raise ConfigError(
            f"{checkpoint.url} has averages with decay {theirs.ema.decays}, none with {missing}:"
            " use those in ema.decays, or begin a new run.dir"
        )
    _check_tensors(checkpoint, theirs, [f"ema/{decay}" for decay in config.ema.decays])


def _check_tensors(checkpoint: Checkpoint, config: Config, averages: list[str]) -> None:
    """Refuse tensors that are not those that a training with this config saves."""
    with torch.device("meta"):
        model = DiT(config.model.to_dit())
    parameters = dict(model.named_parameters())
    averaged = parameters | ({"pos_embed": model.pos_embed} if config.optimizer.decay_pos_embed else {})
    groups = {"model": model.state_dict(), **dict.fromkeys(averages, averaged)}
    if checkpoint.optimizer_steps:
        muon = config.optimizer.kind == "muon"  # it has one moment of a matrix
        groups["exp_avg"] = parameters
        groups["exp_avg_sq"] = {name: p for name, p in parameters.items() if p.ndim < 2 or not muon}
    for group, tensors in groups.items():
        for name, tensor in tensors.items():
            entry = checkpoint.manifest["tensors"].get(f"{group}/{name}", {"shape": None, "dtype": None})
            if entry["shape"] != list(tensor.shape) or entry["dtype"] != "float32":
                raise DamagedError(
                    f"{group}/{name} is {entry['dtype']} of shape {entry['shape']}, the model has float32 of"
                    f" {list(tensor.shape)}"
                )


def load_weights(model: DiT, source: str) -> None:
    """Begin with the weights of an export folder or safetensors file; a missing auxiliary head keeps its own.

    Raises:
        ConfigError: no such file, or weights of another model.
    """
    file = Path(source) / "model.safetensors" if Path(source).is_dir() else Path(source)
    try:
        weights = safetensors.torch.load_file(file)
    except (OSError, safetensors.SafetensorError):
        raise ConfigError(
            f"train.init_from {source}: no safetensors weights there; give a folder of `ig-dist export` or a file"
        ) from None
    own = model.state_dict()
    for name, tensor in weights.items():
        if name not in own:
            hint = ": set model.aux_depth" if name.startswith("aux_layer.") else ""
            raise ConfigError(f"train.init_from {source}: {name} is not part of this model{hint}")
        if tensor.shape != own[name].shape:
            shapes = f"{tuple(tensor.shape)}, this model has {tuple(own[name].shape)}"
            raise ConfigError(f"train.init_from {source} is of another model: {name} is {shapes}")
    missing = [name for name in own if name not in weights and not name.startswith("aux_layer.")]
    if missing:
        raise ConfigError(f"train.init_from {source} is of another model: it lacks {missing[0]}")
    model.load_state_dict(weights, strict=False)
