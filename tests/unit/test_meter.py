"""What a line of metrics says of memory and recompiles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ig_dist.config.file import load_config
from ig_dist.data.index import read_index
from ig_dist.data.stream import Batch
from ig_dist.export import ALONE
from ig_dist.models.dit import DiT
from ig_dist.parallel.engine import StepResult
from ig_dist.training.meter import Meter
from ig_dist.training.objective import TaskMaker, open_reader, training_loss
from ig_dist.training.phases import Phases


def test_a_recompile_is_counted_but_not_the_first_step_nor_validation(tiny_config: Callable[..., Path]) -> None:
    config = load_config(tiny_config(), [])
    index = read_index(config.data.index)
    config = config.with_data(index.info.latent.shape, len(index.info.classes))
    model = DiT(config.model.to_dit())
    for block in model.blocks:
        block.compile(fullgraph=True, backend="eager", dynamic=False)  # no code generation needed
    phases = Phases()
    meter, reader = Meter(config, model, ALONE, phases), open_reader(index, config)
    phases.last_warm_up = 1

    def losses_of(rows: int) -> tuple[Batch, torch.Tensor]:
        latents, _ = reader.read_ids(0, rows)
        numbers = torch.arange(rows)
        batch = Batch(torch.from_numpy(latents), torch.zeros_like(numbers), numbers, numbers, torch.zeros_like(numbers))
        return batch, training_loss(model, TaskMaker(config, index.info, ALONE.device)(batch), config, step=0).detach()

    def recompiles(step: int, rows: int) -> object:
        phases.enter("forward", step)
        batch, losses = losses_of(rows)
        result = StepResult(torch.ones(()), torch.ones(()))
        meter.count(result, batch, losses, step)
        line = meter.read(losses, result, batch, step, reader)
        assert isinstance(line["peak_memory_bytes"], int) and line["peak_memory_bytes"] > 100 * 2**20  # torch alone
        return line["recompiles"]

    torch.compiler.reset()
    assert recompiles(1, 8) == 0  # compiles
    assert recompiles(2, 8) == 0
    assert recompiles(3, 7) == 1  # a batch of another size
    assert recompiles(4, 8) == 1
    phases.enter("validation")
    losses_of(5)
    meter.pause()
    assert recompiles(5, 8) == 1
    assert recompiles(6, 6) == 2
