"""A run that starts from imported weights (``run.init_from``): inserted blocks are new, all else is there."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from importing import import_to
from layouts import TINY_JET, TINY_OURO, write_tiny

from sleeptrain.checkpoint.huggingface.folder import Folder
from sleeptrain.checkpoint.huggingface.outgoing import export_checkpoint
from sleeptrain.config import (
    Config,
    DataConfig,
    EvalConfig,
    OptimConfig,
    Rule110Config,
    RunConfig,
    SleepConfig,
)
from sleeptrain.data.stream import TrainStream
from sleeptrain.engine.restored import find
from sleeptrain.engine.resume import initial_weights
from sleeptrain.engine.trainer import train
from sleeptrain.parallel.backend import LocalBackend
from sleeptrain.schema import ConfigError
from sleeptrain.tasks import make_task

VOCAB = 62
NEW = ("stack.blocks.1.*", "stack.blocks.5.*")
INSERTED = {
    "pattern": "attn jet attn attn attn jet",
    "memory_mlp": False,
    "memory_heads": 2,
    "jet_reduction": 2,
}


@pytest.fixture
def ouro(tmp_path: Path) -> Config:
    """Settings of a run on the automaton that starts from a tiny Ouro, in tmp_path/ouro."""
    write_tiny(tmp_path / "model", TINY_OURO, torch.bfloat16)
    config = import_to(tmp_path / "model", tmp_path / "ouro")
    return Config(
        run=RunConfig(id="run", dir=str(tmp_path / "run"), init_from=str(tmp_path / "ouro"), device="cpu"),
        model=config.model,
        sleep=SleepConfig(window_tokens=6, num_passes=1, norm_between_passes=True),
        task=Rule110Config(width=6, num_strings=2, steps=1),
        data=DataConfig(batch_sequences=4),
        optim=OptimConfig(num_steps=2, muon_lr=1e-3, adamw_lr=1e-3),
        eval=EvalConfig(num_examples=4, every_steps=0),
    )


def with_jet(config: Config, new: tuple[str, ...] = NEW) -> Config:
    return replace(
        config,
        model=replace(config.model, **INSERTED),
        sleep=replace(config.sleep, num_passes=2),
        run=replace(config.run, init_new=new),
    )


def test_inserted_blocks_are_new_and_the_others_are_those_of_the_checkpoint(ouro: Config) -> None:
    config = with_jet(ouro)
    drawn = dict(LocalBackend(config, VOCAB).model.named_parameters())
    backend, source = LocalBackend(config, VOCAB), find(Path(config.run.init_from)).read_all("model")
    backend.start_from(initial_weights(config, VOCAB))
    there = {"0": "0", "2": "1", "3": "2", "4": "3"}
    seen = set()
    for name, parameter in backend.model.named_parameters():
        block = name.removeprefix("stack.blocks.").split(".")[0]
        if block in ("1", "5"):
            is_drawn = not name.endswith("o_proj.weight")
            assert torch.equal(parameter, drawn[name] if is_drawn else torch.zeros_like(parameter)), name
            continue
        own = name.replace(f"blocks.{block}.", f"blocks.{there[block]}.") if "blocks" in name else name
        assert torch.equal(parameter, source[own].float()), name
        seen.add(own)
    assert seen == source.keys()


@pytest.mark.parametrize("memory_mlp", [False, True])
def test_with_inserted_blocks_it_predicts_at_first_what_it_did(ouro: Config, memory_mlp: bool) -> None:
    """Bit for bit, in every window; and the first gradient reaches what ends the new blocks."""
    config = with_jet(ouro)
    config = replace(config, model=replace(config.model, memory_mlp=memory_mlp))
    batch = TrainStream(make_task(config.task), 0, 4, config.sleep.window_tokens).batch(0)
    batch = replace(batch, windows_with_loss=(True,) * len(batch.windows_with_loss))  # nothing is left out
    losses = []
    for of_run in (ouro, config):
        backend = LocalBackend(of_run, VOCAB)
        backend.start_from(initial_weights(of_run, VOCAB))
        losses.append(backend.evaluate(batch, num_passes=1).nll)
    assert torch.equal(*losses)
    backend.forward_backward(batch, num_passes=2)
    ends = ("mixer.o_proj", "mlp.down_proj") if memory_mlp else ("mixer.o_proj",)
    assert all(backend.model.get_parameter(f"stack.blocks.1.{end}.weight").grad.any() for end in ends)


@pytest.mark.more
def test_training_goes_on_from_there_resumes_and_remembers_the_origin(ouro: Config) -> None:
    config, folder = with_jet(ouro), Path(ouro.run.dir)
    assert train(config, "") == 0
    shutil.rmtree(config.run.init_from)  # a run that has checkpoints needs it no more
    more = replace(config, optim=replace(config.optim, num_steps=3))
    assert train(replace(more, run=replace(more.run, allow_config_change=True)), "") == 0
    found = find(folder)
    assert found.step == 3
    assert found.documents["origin"]["config"] == TINY_OURO
    assert export_checkpoint(found, folder / "out", lambda name: None)  # a folder that sleeps
    after = Folder(folder / "out")
    assert after.tensors.keys() == set(found.names("model"))
    assert after.config["model"]["pattern"] == INSERTED["pattern"]
    card = (folder / "out" / "README.md").read_text()
    assert "Trained from model by sleeptrain for 3 steps on the task rule110." in card
    assert 'base_model: "model"' in card


def test_a_trained_model_of_the_same_architecture_is_exported(ouro: Config, tmp_path: Path) -> None:
    assert train(ouro, "") == 0
    export_checkpoint(find(tmp_path / "run"), tmp_path / "out", lambda name: None)
    before, after = Folder(tmp_path / "model"), Folder(tmp_path / "out")
    assert after.tensors.keys() == before.tensors.keys()
    changed = {name for name in before.tensors if not torch.equal(before.read(name), after.read(name))}
    assert "model.layers.0.mlp.up_proj.weight" in changed
    assert not any("exit_gate" in name for name in changed)
    assert {found.dtype for found in after.tensors.values()} == {"bfloat16"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'base_model: "model"' in card
    assert "for 2 steps on the task rule110, with N = 1 passes over windows of 6 tokens" in card
    assert "| eval/exact_accuracy |" in card


def test_what_does_not_fit_is_told_in_one_list(ouro: Config) -> None:
    for config, reason in (
        (
            with_jet(ouro, ()),
            r"34 missing there \(.*, and 14 more\); 6 not known here \(.*\); 4 of another",
        ),
        (
            with_jet(ouro, ("stack.blocks.9.*",)),
            r"run.init_new='stack.blocks.9.\*' names no weight of this model",
        ),
        (
            replace(ouro, model=replace(ouro.model, pattern="attn attn attn")),
            r"11 not known here \(stack.blocks.3",
        ),
        (
            replace(ouro, model=replace(ouro.model, mlp_dim=48)),
            r"12 of another shape \(stack.*\[40, 24\] there, ",
        ),
        (
            replace(ouro, model=replace(ouro.model, rope_theta=1e4)),
            r"rope_theta was 500.0, is 10000.0; set model",
        ),
        (
            replace(ouro, run=replace(ouro.run, init_from="absent")),
            r"run.init_from=absent holds no checkpoint",
        ),
    ):
        with pytest.raises(ConfigError, match=reason):
            train(config, "")
    assert not Path(ouro.run.dir).exists()
    with pytest.raises(ConfigError, match=r"run.init_new=.* is for run.init_from, which is not given"):
        RunConfig(init_new=NEW)


def test_settings_of_fast_weights_count_where_there_are_some(tmp_path: Path) -> None:
    write_tiny(tmp_path / "model", TINY_JET)
    config = import_to(tmp_path / "model", tmp_path / "jet")
    config = replace(config, run=RunConfig(init_from=str(tmp_path / "jet")))
    assert initial_weights(config, VOCAB).holds("stack.blocks.0.mixer.A_log")
    other = replace(config, model=replace(config.model, memory_norm_eps=None))
    with pytest.raises(ConfigError, match=r"memory_norm_eps was 1e-05, is 1e-06"):
        initial_weights(other, VOCAB)
