"""What a folder says of itself beside its tensors."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sleeptrain.checkpoint.huggingface.folder import Folder, side_files


def folder(path: Path, config: dict, card: str | None = None) -> Folder:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.zeros(1)}, path / "model.safetensors")
    if card is not None:
        (path / "README.md").write_text(card)
    return Folder(path)


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlanguage: en\nlicense: apache-2.0\n---\n# A model", "apache-2.0"),
        ('---\nlicense: other\nlicense_name: "research-only"\n---\n', "research-only"),
        ("# A model\nlicense: mit", None),
        (None, None),
    ],
)
def test_the_licence_is_that_of_the_card(card: str | None, licence: str | None, tmp_path: Path) -> None:
    assert folder(tmp_path / "model", {}, card).licence() == licence


def test_else_it_is_the_first_line_of_a_licence_file(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("\n  The Licence\nof all this")
    found = folder(tmp_path / "model", {}, "# no front matter")
    (tmp_path / "model" / "LICENSE.md").symlink_to(tmp_path / "elsewhere")  # as in a cache
    (tmp_path / "model" / "modeling.py").write_text("raise SystemExit")
    assert found.licence() == "The Licence"
    assert [path.name for path in side_files(tmp_path / "model")] == ["LICENSE.md"]


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("Maker/Model-1.4B", "Maker/Model-1.4B"),
        ("/home/me/secret", "model"),
        (None, "model"),
        ("a\nb: c", "model"),
    ],
)
def test_the_name_is_no_path(said: str | None, name: str, tmp_path: Path) -> None:
    assert folder(tmp_path / "model", {"_name_or_path": said}).name == name


@pytest.mark.parametrize(
    ("said", "token"), [("<e>", "<e>"), ({"content": "<e>", "lstrip": False}, "<e>"), (None, "")]
)
def test_the_end_of_a_text_is_that_of_the_tokenizer(said: object, token: str, tmp_path: Path) -> None:
    found = folder(tmp_path / "model", {})
    assert found.end_token() == ""
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps({"eos_token": said}))
    assert found.end_token() == token
