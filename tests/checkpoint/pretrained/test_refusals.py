"""What cannot be imported or exported is refused in one sentence, before a byte is written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from importing import import_to
from layouts import TINY_JET, TINY_OURO, write_tiny
from safetensors.torch import save_file

from sleeptrain.checkpoint.huggingface.folder import Folder
from sleeptrain.checkpoint.huggingface.mapping import map_folder
from sleeptrain.convert import main
from sleeptrain.schema import ConfigError

LLAMA = {
    "model_type": "llama",
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "intermediate_size": 8,
    "vocab_size": 5,
}


def refusal(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        map_folder(Folder(folder))
    return str(caught.value)


def test_every_tensor_is_accounted_for_in_one_list(tmp_path: Path) -> None:
    tensors = write_tiny(tmp_path / "model", TINY_OURO)
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(24)
    tensors["model.layers.2.input_layernorm.weight"] = torch.zeros(23)
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    assert refusal(tmp_path / "model") == (
        f"the tensors in {tmp_path}/model do not fit its config.json: "
        "2 missing (model.layers.1.mlp.up_proj.weight, model.norm.weight); "
        "1 unexpected (model.layers.0.self_attn.q_proj.bias); "
        "1 of another shape (model.layers.2.input_layernorm.weight: [23], not [24]); fetch it again"
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"num_local_experts": 8},
            "num_local_experts=8 cannot be imported: mixture-of-experts layers are not",
        ),
        ({"model_type": "mixtral", "num_experts": 4}, "num_experts=4 cannot be imported: mixture-of-experts"),
        ({"model_type": "gpt2"}, "unknown model_type in .*config.json: 'gpt2'; known: .*llama.*ouro"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' cannot be imported: the MLPs here are SwiGLU"),
        ({"attention_bias": True}, "attention_bias=True cannot be imported: the output projection"),
        ({"mlp_bias": True}, "mlp_bias=True cannot be imported"),
        ({"quantization_config": {"bits": 4}}, "give weights that are not quantised"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rope_type='llama3' cannot be imported"),
        ({"hidden_size": None}, "config.json lacks hidden_size; give a folder with a complete one"),
        (
            {"layer_types": ["sliding_attention"]},
            "layer_types='sliding_attention' cannot be imported: the layers",
        ),
        ({"layer_types": []}, "it names 0 layers of 1"),
        ({"hidden_size": "wide"}, r"config.json is malformed \(.*\); give a complete one"),
        ({"intermediate_size": "wide"}, "model.mlp_dim='wide' is of the wrong type"),
        ({"rope_parameters": 5}, r"config.json is malformed"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_has_no_counterpart_here(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    write_llama(tmp_path, changes)
    with pytest.raises(ConfigError, match=reason):
        map_folder(Folder(tmp_path))


def write_llama(folder: Path, changes: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(LLAMA | changes))
    save_file({"model.norm.weight": torch.zeros(8)}, folder / "model.safetensors")


def test_pickles_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(
        ConfigError, match=r"pytorch_model.bin and no safetensors; pickles can run code and are"
    ):
        Folder(tmp_path)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "absent.safetensors"])
def test_an_index_names_files_beside_it(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write_llama(folder, {})
    save_file({"model.norm.weight": torch.zeros(8)}, tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ConfigError, match="which is no file beside it; fetch it"):
        Folder(folder)


def test_damaged_files_and_types(tmp_path: Path) -> None:
    write_llama(tmp_path, {})
    weights = tmp_path / "model.safetensors"
    save_file({"model.norm.weight": torch.zeros(8, dtype=torch.int8)}, weights)
    with pytest.raises(
        ConfigError, match=r"model.norm.weight is of type I8; give weights that are not quantised"
    ):
        Folder(tmp_path)
    weights.write_bytes(b"\0" * 50)
    with pytest.raises(ConfigError, match=r"model.safetensors cannot be read \(.*\); fetch it again"):
        Folder(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"config.json cannot be read \(it is no object\)"):
        Folder(tmp_path)
    with pytest.raises(ConfigError, match=r"absent is no folder; give one that holds config.json"):
        Folder(tmp_path / "absent")


def test_a_head_beside_a_tied_embedding_must_be_the_same(tmp_path: Path) -> None:
    tensors = write_tiny(tmp_path / "model", TINY_JET | {"tie_word_embeddings": True})
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    assert map_folder(Folder(tmp_path / "model")).left_out == ["lm_head.weight"]
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    assert "lm_head.weight differs from the embedding" in refusal(tmp_path / "model")


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny(tmp_path / "model", TINY_OURO)
    source, output = f"source={tmp_path}/model", f"output={tmp_path}/run"
    for arguments, reason in (
        ([], "'' is no command; write import or export, and see --help"),
        (["imprt", source], "'imprt' is no command"),
        (["import", source], "output is not given; write output=FOLDER"),
        (
            ["import", source, output, "model.d_model=3"],
            "model.d_model comes from the folder; only prelude_blocks",
        ),
        (["import", source, output, "sleep.num_passes=2"], "N=2 passes need a fast-weight block"),
        (["export", f"checkpoint={tmp_path}/run", f"output={tmp_path}/out"], "holds no checkpoint"),
    ):
        assert main(arguments) == 2
        assert reason in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
    import_to(tmp_path / "model", tmp_path / "run")
    assert main(["import", source, output]) == 2
    assert "holds a checkpoint already; choose another folder" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert main(["export", f"checkpoint={tmp_path}/run", f"output={tmp_path}/out"]) == 2
    assert "is not empty; choose another folder" in capsys.readouterr().err
