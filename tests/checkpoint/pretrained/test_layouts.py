"""Ouro and Jet-Nemotron: full-sized checkpoints map name by name, tiny ones predict what is described and are
written back bit for bit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from importing import fed, import_to, imported
from layouts import JET, OURO, TINY_JET, TINY_OURO, jet_sizes, predict, shapes_of, write_sparse, write_tiny
from safetensors.torch import save_file

from sleeptrain.checkpoint.huggingface.folder import Folder
from sleeptrain.checkpoint.huggingface.incoming import from_text
from sleeptrain.checkpoint.huggingface.mapping import map_folder, read_config
from sleeptrain.checkpoint.huggingface.outgoing import export_checkpoint
from sleeptrain.config import ModelConfig, SleepConfig
from sleeptrain.engine.restored import find
from sleeptrain.model.flops import count_parameters
from sleeptrain.pretrain import CONFIGS
from sleeptrain.schema import from_dict

OURO_BIG = OURO | {"num_hidden_layers": 48}
JET_BIG = JET | {
    "hidden_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "intermediate_size": 11008,
    "layer_types": [
        {17: "attn", 20: "attn", 32: "attn"}.get(i, "swa" if i in (5, 16, 19, 21, 22, 25, 27) else "jet")
        for i in range(36)
    ],
    "efficient_attention_config": {
        "jet": {**JET["efficient_attention_config"]["jet"], "head_dim": 128, "num_heads": 16, "expand_v": 2},
        "swa": {"window_size": 2048},
    },
}


@pytest.mark.parametrize(
    ("config", "num_parameters"),
    [(OURO, 1_434_652_673), (OURO_BIG, 2_667_974_657), (JET, None), (JET_BIG, None)],
    ids=["ouro 1.4B", "ouro 2.6B", "jet 2B", "jet 4B"],
)
def test_a_full_sized_checkpoint_maps_without_a_missing_or_unexpected_name(
    config: dict[str, Any], num_parameters: int | None, tmp_path: Path
) -> None:
    write_sparse(tmp_path / "model", config, shapes_of(config))
    mapped = map_folder(Folder(tmp_path / "model"))
    kept = sum(torch.Size(Folder(tmp_path / "model").tensors[name].shape).numel() for name in mapped.kept)
    assert mapped.num_parameters + kept == (num_parameters or whole(config))
    assert sorted(mapped.shapes) == sorted(name for pair in mapped.pairs for name in pair.ours)
    assert mapped.left_out == []


def whole(config: dict[str, Any]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes_of(config).values())


def test_sizes_of_the_released_jet_block() -> None:
    assert jet_sizes(JET) == (12, 96, 256, 384)
    own = sum(torch.Size(s).numel() for n, s in shapes_of(JET).items() if ".layers.0.self_attn." in n)
    assert own == pytest.approx(23.05e6, rel=1e-3)
    assert whole(JET) == pytest.approx(1.965e9, rel=1e-3)


@pytest.mark.parametrize("config", [TINY_OURO, TINY_JET], ids=["ouro", "jet"])
def test_predictions_are_those_of_the_description(config: dict[str, Any], tmp_path: Path) -> None:
    weights = write_tiny(tmp_path / "model", config)
    model = imported(tmp_path / "model", tmp_path / "run")
    for num_tokens in (1, 7, 23):
        ids = torch.randint(61, (2, num_tokens), generator=torch.Generator().manual_seed(num_tokens))
        expected = predict(config, weights, ids)
        assert expected.std() > 0.3
        torch.testing.assert_close(fed(model, ids).double(), expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(fed(model, ids, 1).double(), expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(fed(model.double(), ids), expected, rtol=0, atol=1e-9)
        model.float()


@pytest.mark.parametrize("config", [TINY_OURO, TINY_JET], ids=["ouro", "jet"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_comes_in_goes_out_bit_for_bit(
    config: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    weights = write_tiny(tmp_path / "model", config, dtype)
    import_to(tmp_path / "model", tmp_path / "run")
    told: list[str] = []
    export_checkpoint(find(tmp_path / "run"), tmp_path / "out", told.append, shard_bytes=20_000)
    out = Folder(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert out.config == config
    assert out.tensors.keys() == weights.keys()
    for name, weight in weights.items():
        assert out.read(name).dtype == dtype
        assert torch.equal(out.read(name), weight), name


def test_a_tensor_of_another_type_than_the_rest_keeps_it(tmp_path: Path) -> None:
    weights = write_tiny(tmp_path / "model", TINY_JET, torch.bfloat16)
    weights = {name: w.float() if name.endswith(("A_log", "dt_bias")) else w for name, w in weights.items()}
    save_file(weights, tmp_path / "model" / "model.safetensors")
    import_to(tmp_path / "model", tmp_path / "run")
    export_checkpoint(find(tmp_path / "run"), tmp_path / "out", lambda name: None)
    before, after = Folder(tmp_path / "model"), Folder(tmp_path / "out")
    assert {n: t.dtype for n, t in before.tensors.items()} == {n: t.dtype for n, t in after.tensors.items()}
    assert all(torch.equal(before.read(name), after.read(name)) for name in weights)


def test_the_exit_gate_of_ouro_is_kept_with_the_checkpoint(tmp_path: Path) -> None:
    weights = write_tiny(tmp_path / "model", TINY_OURO, torch.bfloat16)
    import_to(tmp_path / "model", tmp_path / "run")
    kept = find(tmp_path / "run").documents["origin"]["kept"]
    assert sorted(kept) == ["model.early_exit_gate.bias", "model.early_exit_gate.weight"]
    assert all(torch.equal(from_text(said), weights[name]) for name, said in kept.items())


def test_ouro_goes_round_through_its_final_norm(tmp_path: Path) -> None:
    write_tiny(tmp_path / "model", TINY_OURO)
    assert imported(tmp_path / "model", tmp_path / "run").sleep.norm_between_passes


@pytest.mark.parametrize(
    ("name", "published", "changes"),
    [
        ("ouro_1b4", OURO, {"pattern": "attn", "pattern_repeats": 24}),
        ("jet_nemotron_2b", JET, {"prelude_blocks": 7, "coda_blocks": 7}),
    ],
)
def test_the_settings_in_configs_are_those_that_are_read_from_the_published_ones(
    name: str, published: dict[str, Any], changes: dict[str, Any]
) -> None:
    written = yaml.safe_load((CONFIGS / "model" / f"{name}.yaml").read_text())
    has_head = not published.get("tie_word_embeddings", "jet" in name)
    model = read_config(published, name, has_head).model
    assert from_dict(ModelConfig, written) == replace(model, **changes)


def test_the_inserted_jet_blocks_are_less_than_a_tenth_new() -> None:
    written = [
        yaml.safe_load((CONFIGS / "model" / f"{n}.yaml").read_text()) for n in ("ouro_1b4", "ouro_1b4_jet")
    ]
    plain, with_jet = (
        sum(count_parameters(from_dict(ModelConfig, w), SleepConfig(num_passes=1), 49152)) for w in written
    )
    assert plain == 1_434_652_673 - 2049  # its exit gate is kept beside the weights
    assert with_jet / plain - 1 == pytest.approx(0.081, abs=5e-4)
