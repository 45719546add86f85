"""Entry point: Hugging Face folders in and out.

``python -m sleeptrain.convert import source=FOLDER output=runs/NAME``
"""

import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sleeptrain.evaluate import parse
from sleeptrain.schema import ConfigError, RunError, describe, from_dict, setting, to_dict

if TYPE_CHECKING:
    from sleeptrain.checkpoint.huggingface.folder import Folder
    from sleeptrain.checkpoint.huggingface.mapping import Mapped
    from sleeptrain.config import Config

USAGE = """\
usage: python -m sleeptrain.convert import source=FOLDER output=FOLDER [SECTION.KEY=VALUE ...]
       python -m sleeptrain.convert export checkpoint=FOLDER output=FOLDER [KEY=VALUE ...]

import makes a checkpoint of a Hugging Face folder (config.json and safetensors, already on this disk), to be
evaluated, generated from, or trained on with run.init_from. model.yaml beside it has the settings of the
model for configs/model/. export writes what was imported back as such a folder, trained or not. Any other
model, one with inserted blocks or trained from scratch, becomes a folder that sleeps: with a modelling file
of its own, which needs torch and transformers alone.

  python -m sleeptrain.convert import source=Ouro-1.4B output=runs/ouro sleep.window_tokens=2000
  python -m sleeptrain.generate checkpoint=runs/ouro prompt="Once upon a time"
  python -m sleeptrain.convert export checkpoint=runs/ouro output=Ouro-again

Known are model_type llama, qwen2, qwen3, ouro, jet_nemotron, qwen3_5 (dense), olmo_hybrid, and sleeptrain: a
folder that sleeps. Nothing is downloaded, no code of the folder is run, no pickle is read. Of SECTION.KEY
those of sleep and task, and model.prelude_blocks and model.coda_blocks.
"""

SECTIONS: tuple[str, ...] = ("sleep", "task", "model")
FREE_MODEL = ("prelude_blocks", "coda_blocks")


@dataclass(frozen=True)
class ImportConfig:
    """A folder in."""

    source: str = setting("", "import: folder with config.json and *.safetensors")
    output: str = setting("", "import: run folder to write; export: folder to write, empty or new")

    def __post_init__(self) -> None:
        for name in ("source", "output"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is not given; write {name}=FOLDER")


@dataclass(frozen=True)
class ExportConfig:
    """A checkpoint out."""

    checkpoint: str = setting("", "export: run folder (its newest valid checkpoint) or one checkpoint folder")
    output: str = setting("", "folder to write")
    shard_gib: float = setting(1.0, "export: most that one file of weights holds")
    files_from: str = setting(
        "",
        "export: folder whose tokenizer and licence files are copied along; empty: the run folder",
    )
    sleeping: bool = setting(
        False, "export: as a folder that sleeps, also where it could be written as it was imported"
    )

    def __post_init__(self) -> None:
        for name in ("checkpoint", "output"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is not given; write {name}=FOLDER")
        if self.shard_gib <= 0:
            raise ConfigError(f"shard_gib={self.shard_gib} must be above 0")


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0 done, 2 a setting, a folder or the checkpoint is wrong."""
    if "--help" in arguments or "-h" in arguments:
        print(USAGE)
        for name, default, text in [*describe(ImportConfig), *describe(ExportConfig)]:
            if text.startswith(("import:", "export:")):
                first = f"  {name + '=' + str(default):<16} "
                print(textwrap.fill(text, 100, initial_indent=first, subsequent_indent=" " * 19))
        return 0
    try:
        command, rest = arguments[0] if arguments else "", arguments[1:]
        if command not in COMMANDS:
            raise ConfigError(f"{command!r} is no command; write import or export, and see --help")
        for argument in rest:
            if "=" not in argument:
                raise ConfigError(f"{argument!r} is no setting; write KEY=VALUE, and see --help for the keys")
        COMMANDS[command](parse(rest))
        return 0
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run_import(given: dict[str, Any]) -> None:
    """Reads the folder's lists, says what is in it, then copies tensor by tensor."""
    from omegaconf import OmegaConf

    from sleeptrain.checkpoint.durable import replace_file
    from sleeptrain.checkpoint.huggingface.folder import Folder
    from sleeptrain.checkpoint.huggingface.incoming import import_folder
    from sleeptrain.checkpoint.huggingface.mapping import map_folder

    changes = {section: given.pop(section) for section in SECTIONS if section in given}
    settings = from_dict(ImportConfig, given)
    folder, output = Folder(Path(settings.source)), Path(settings.output)
    mapped = map_folder(folder)
    config = run_config(mapped, output, folder, changes)
    print(f"{folder.config['model_type']}, {mapped.num_parameters:,} weights, licence: {folder.licence()}")
    for names, what in ((mapped.kept, "kept beside the weights"), (mapped.left_out, "left out")):
        if names:
            print(f"{what}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''} ({len(names)} tensors)")
    with _bar(len(mapped.pairs)) as tell:
        written = import_folder(folder, mapped, config, output, tell)
    replace_file(output / "model.yaml", OmegaConf.to_yaml(OmegaConf.create(to_dict(config.model))).encode())
    print(f"wrote {written}")
    if not (output / "tokenizer.json").exists():
        print("there is no tokenizer.json: generate takes ids=[...], and no prompt")


def run_config(mapped: "Mapped", output: Path, folder: "Folder", changes: dict[str, Any]) -> "Config":
    """The settings that the imported checkpoint has: one pass, one window, unless the folder says how it
    sleeps, and next-token prediction, unless changed. Raises ConfigError for a change that would make it
    another model.
    """
    from sleeptrain.config import Config, RunConfig, TextConfig

    for section, values in changes.items():
        if not isinstance(values, dict):
            raise ConfigError(f"{section}={values} is no setting here; write {section}.KEY=VALUE")
    unknown = sorted(set(changes.get("model", {})) - set(FREE_MODEL))
    if unknown:
        raise ConfigError(
            f"model.{unknown[0]} comes from the folder; only {', '.join(FREE_MODEL)} may be set"
        )
    task = TextConfig()
    if (folder.path / "tokenizer.json").is_file():
        task = TextConfig(tokenizer=str(output / "tokenizer.json"), end_token=folder.end_token())
    whole = to_dict(Config(RunConfig(output.name, str(output)), task=task))
    whole["model"] = to_dict(mapped.described.model)
    usual = {"window_tokens": 0, "num_passes": 1, "schedule": "predict_then_consolidate"}
    whole["sleep"] |= usual | mapped.described.sleep | changes.get("sleep", {})
    if isinstance(whole["sleep"]["window_tokens"], int):  # anything else is refused below
        whole["task"]["sequence_tokens"] = max(task.sequence_tokens, whole["sleep"]["window_tokens"])
    for section, values in changes.items():
        whole[section] |= values
    return from_dict(Config, whole)


def run_export(given: dict[str, Any]) -> None:
    """Joins tensor by tensor and writes shard by shard."""
    from shutil import copyfile

    from sleeptrain.checkpoint.huggingface.folder import side_files
    from sleeptrain.checkpoint.huggingface.outgoing import export_checkpoint
    from sleeptrain.engine import restored

    settings = from_dict(ExportConfig, given)
    found, output = restored.find(Path(settings.checkpoint)), Path(settings.output)
    beside = Path(settings.files_from) if settings.files_from else found.path.parent.parent
    with _bar(len(found.names("model"))) as tell:
        sleeps = export_checkpoint(found, output, tell, int(settings.shard_gib * 2**30), settings.sleeping)
    for path in side_files(beside):
        copyfile(path, output / path.name)
    print(f"wrote {output}: {'it sleeps, by its own modelling file' if sleeps else 'as it was imported'}")


@contextmanager
def _bar(count: int) -> Iterator[Callable[[str], None]]:
    """A progress bar over tensors, on a terminal; what it gives hears of each."""
    from tqdm import tqdm

    with tqdm(total=count, unit="tensor", disable=None) as bar:

        def tell(name: str) -> None:
            bar.update()

        yield tell


COMMANDS = {"import": run_import, "export": run_export}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
