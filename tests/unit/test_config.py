"""Config: precedence, resolution, and messages that name the culprit and the remedy."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ig_dist.config import Config
from ig_dist.config.file import load_config, load_run, to_yaml, with_guidance
from ig_dist.errors import ConfigError, IgDistError

MINIMAL: dict[str, Any] = {
    "model": {"preset": "SiT-B/2", "aux_depth": 4},
    "data": {"index": "somewhere"},
    "train": {"steps": 10},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def test_precedence_is_defaults_file_overrides(file: Path) -> None:
    config = load_config(
        file, ["train.steps=20", "optimizer.lr=3e-4", "ema.decays=[0.9, 0.99]", "model.aux_depth=null"]
    )
    assert config.train.steps == 20 and config.optimizer.lr == 3e-4 and config.ema.decays == [0.9, 0.99]
    assert config.model.aux_depth is None and config.model.depth == 12 and config.optimizer.betas == (0.9, 0.999)
    assert config.run.dir == "runs/small"


def test_a_list_item_is_overridden_by_its_number(file: Path) -> None:
    file.write_text(yaml.safe_dump({**MINIMAL, "guidance": [{"kind": "ig", "scale": 1.4}]}))
    assert load_config(file, ["guidance.0.scale=1.9"]).guidance[0].scale == 1.9
    with pytest.raises(ConfigError, match="guidance has items 0 to 0, not '1'"):
        load_config(file, ["guidance.1.scale=1.9"])


def test_the_resolved_config_reads_back_the_same(file: Path, tmp_path: Path) -> None:
    config = load_config(file).with_data((4, 32, 32), 1000)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    again = load_run(tmp_path)
    assert again.model_dump(exclude={"run"}) == config.model_dump(exclude={"run"})
    assert again.run.dir == str(tmp_path)


@pytest.mark.parametrize("name", sorted(p.name for p in Path("configs").glob("*.yaml")))
def test_every_config_in_the_repository_is_valid_and_says_how_to_use_it(name: str) -> None:
    config = load_config(Path("configs") / name)
    header = Path("configs", name).read_text().split("\nmodel:")[0]
    assert f"train configs/{name}" in header and "Hardware:" in header
    assert not config.warnings()
    if config.model.preset:
        shape = (32, 16, 16) if config.model.preset.startswith("Lightning") else (4, 32, 32)
        assert config.with_data(shape, 1000).model.to_dit().num_classes == 1000


def test_epochs_become_steps(file: Path) -> None:
    config = load_config(file, ["train.steps=null", "train.epochs=2.5", "train.global_batch_size=64"])
    assert config.total_steps(1000) == 40


def test_scales_keep_the_interval(file: Path) -> None:
    file.write_text(yaml.safe_dump({**MINIMAL, "guidance": [{"kind": "cfg", "scale": 1.3, "interval": [0, 0.7]}]}))
    terms = with_guidance(load_config(file), ig_scale=1.5, cfg_scale=2).guidance
    assert [(t.kind, t.scale, t.interval) for t in terms] == [("cfg", 2, (0, 0.7)), ("ig", 1.5, (0, 1))]


def test_world_sizes_that_do_not_divide_name_those_that_do(file: Path) -> None:
    config = load_config(file, ["data.streams=8", "train.accumulation=3", "train.global_batch_size=64"])
    with pytest.raises(ConfigError, match="use 1, 2, 4, 8 processes"):
        config.check_world_size(3)
    with pytest.raises(ConfigError, match="use train.accumulation=1"):
        config.check_world_size(2)


@pytest.mark.parametrize(
    ("replicate", "processes", "per_node", "fitting"),
    [
        (3, 16, 8, "1 or 2 or 4 or 8 or 16"),
        (16, 8, 8, "1 or 2 or 4 or 8"),
        (2, 24, 8, "1 or 3 or 6 or 12 or 24"),  # groups of 12 would lie in one machine and a half
        (4, 24, 6, "1 or 2 or 4 or 8 or 12 or 24"),
    ],
)
def test_groups_that_do_not_fit_the_machines_name_those_that_do(
    file: Path, replicate: int, processes: int, per_node: int, fitting: str
) -> None:
    config = load_config(file, ["data.streams=48", "train.global_batch_size=48", "engine.kind=fsdp2"])
    config.check_world_size(24, 8)
    config.engine.replicate = replicate
    if str(replicate) in fitting.split(" or "):
        return config.check_world_size(processes, per_node)
    with pytest.raises(ConfigError, match=rf"{processes} processes, {per_node} on each .*engine\.replicate={fitting}$"):
        config.check_world_size(processes, per_node)
    return None


keys = st.sampled_from(
    [
        "train.steps",
        "model.aux_depth",
        "optimizer.betas",
        "guidance",
        "guidance.0.kind",
        "ema.decays",
        "run",
        "x",
        "model",
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.text(max_size=30), st.builds("{}={}".format, keys, st.text(max_size=15))), max_size=3))
def test_no_override_gives_a_traceback(overrides: list[str]) -> None:
    try:
        load_config("configs/digits.yaml", overrides)
    except IgDistError as error:
        assert error.exit_code == 2 and "\n" not in str(error)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimiser.lr=1e-3", "overrides: unknown key 'optimiser'; did you mean 'optimizer'?"),
        ("engine.kind=fdsp2", "overrides: engine.kind: .*did you mean 'fsdp2'?"),
        ("sample.rtol=0.5", "overrides: sample.rtol=0.5 needs sample.solver=dopri5, it is heun"),
    ],
)
def test_what_is_wrong_is_told_of_the_overrides_or_of_the_file(file: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(file, [override])
    file.write_text(yaml.safe_dump({**MINIMAL, "optimiser": {}}))
    with pytest.raises(ConfigError, match=f"{file.name}: unknown key 'optimiser'"):
        load_config(file, [override])


def test_keys_of_another_engine_are_refused(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"set engine\.kind=fsdp2 or engine\.reshard_after_forward=null"):
        load_config(file, ["engine.reshard_after_forward=false"])
    with pytest.raises(ConfigError, match=r"set engine\.kind=deepspeed or engine\.zero_stage=null"):
        load_config(file, ["engine.kind=fsdp2", "engine.zero_stage=3"])
    with pytest.raises(ConfigError, match=r"set engine\.kind=fsdp2 or engine\.replicate=1"):
        load_config(file, ["engine.replicate=2"])
    assert load_config(file, ["engine.kind=deepspeed", "engine.zero_stage=3"]).engine.zero_stage == 3
    assert load_config(file, ["engine.kind=fsdp2", "engine.reshard_after_forward=false"]).engine.kind == "fsdp2"


def test_muon_has_the_settings_of_the_published_run_and_whole_matrices(file: Path, tmp_path: Path) -> None:
    muon = load_config(file, ["optimizer.kind=muon", "engine.kind=fsdp2"]).optimizer
    assert (muon.lr, muon.betas, muon.eps, muon.weight_decay, muon.grad_clip) == (2e-4, (0.9, 0.95), 1e-8, 0.01, 1.0)
    config = load_config(file, ["optimizer.kind=muon", "optimizer.lr=1e-3", "optimizer.betas=[0.5, 0.6]"])
    assert config.optimizer.lr == 1e-3 and config.optimizer.betas == (0.5, 0.6)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_run(tmp_path).optimizer == config.optimizer
    with pytest.raises(ConfigError, match=r"optimizer\.kind=muon needs whole matrices.*use engine\.kind=fsdp2 or ddp"):
        load_config(file, ["optimizer.kind=muon", "engine.kind=deepspeed"])


@pytest.mark.parametrize("other", ["optimizer.kind=muon", "engine.kind=deepspeed"])
def test_apex_is_for_adamw_whose_step_is_ours(file: Path, other: str) -> None:
    assert load_config(file, ["optimizer.implementation=apex"]).optimizer.implementation == "apex"
    with pytest.raises(ConfigError, match=r"is for adamw under ddp and fsdp2, not for .*implementation=fused"):
        load_config(file, ["optimizer.implementation=apex", other])


def test_every_field_is_described() -> None:
    def walk(schema: dict[str, Any]) -> None:
        for definition in schema["$defs"].values():
            for name, field in definition.get("properties", {}).items():
                assert field.get("description"), f"{definition['title']}.{name}"

    walk(Config.model_json_schema())
