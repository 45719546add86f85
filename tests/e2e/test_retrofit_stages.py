"""A retrofit by the command line: an Ouro-like folder is imported and gets Jet blocks; these are trained
alone, then everything; what comes out is evaluated by operations and N."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from layouts import TINY_OURO, write_tiny
from torch import Tensor

from sleeptrain import convert, evaluate
from sleeptrain.engine.metrics import read_metrics
from sleeptrain.engine.resilience import EXIT_REQUEUE
from sleeptrain.engine.restored import find
from sleeptrain.engine.trainer import Trainer
from sleeptrain.pretrain import main

NEW = ("stack.blocks.2.", "stack.blocks.5.")
PATTERNS = ",".join(f"{start}*" for start in NEW)
ALL_BUT_NEW = "'*'," + ",".join(f"'!{start}*'" for start in NEW)
SMALL = [
    *(
        "model.d_model=24",
        "model.head_dim=6",
        "model.mlp_dim=40",
        "model.rope_theta=500",
        "model.vocab_multiple=62",
    ),
    *("model.pattern=attn attn jet", "model.pattern_repeats=2", "run.max_new_fraction=0.6"),
    *("data.batch_sequences=4", "optim.warmup_steps=0", "eval.num_examples=4", "run.device=cpu"),
]


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: values.float() for name, values in find(folder).read_all("model").items()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def imported_ouro(folder: Path) -> Path:
    write_tiny(folder / "model", TINY_OURO, torch.bfloat16)
    assert convert.main(["import", f"source={folder / 'model'}", f"output={folder / 'ouro'}"]) == 0
    return folder / "ouro"


def stage1_of(start: Path, folder: Path) -> list[str]:
    new = [f"run.init_new=[{PATTERNS}]", f"optim.frozen=[{ALL_BUT_NEW}]", "optim.num_steps=3"]
    return [
        *("experiment=ouro_sliding_tiny_stage1", f"run.dir={folder}", f"run.init_from={start}"),
        *(*SMALL, *new),
    ]


def stage2_of(start: Path, folder: Path) -> list[str]:
    length = ["optim.num_steps=2", "optim.decay_fraction=0"]
    return ["experiment=ouro_sliding_tiny", f"run.dir={folder}", f"run.init_from={start}", *SMALL, *length]


@pytest.mark.more
def test_from_a_folder_through_both_stages_to_an_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    imported, first, second = imported_ouro(tmp_path), tmp_path / "stage1", tmp_path / "stage2"
    assert main(stage1_of(imported, first)) == 0
    said = capsys.readouterr().out
    assert "are new: run.init_new" in said
    assert "are trained: optim.frozen" in said
    there, after_one = weights(imported), weights(first)
    places = {"0": "0", "1": "1", "3": "2", "4": "3"}
    old = {name for name in after_one if not name.startswith(NEW)}
    assert len(old) == len(there)
    for name in old:
        head, _, rest = name.removeprefix("stack.blocks.").partition(".")
        saved = f"stack.blocks.{places[head]}.{rest}" if name.startswith("stack.blocks.") else name
        assert torch.equal(after_one[name], there[saved]), name
    assert all(after_one[f"{start}mixer.o_proj.weight"].any() for start in NEW)

    assert main(stage2_of(first, second)) == 0
    assert moved(after_one, weights(second)) == after_one.keys()
    shutil.rmtree(first)  # a run that has checkpoints needs it no more
    rows = read_metrics(second)
    assert main(stage2_of(first, second)) == 0
    assert read_metrics(second) == rows
    assert "step 2 of 2" in capsys.readouterr().out

    assert (
        evaluate.main([f"checkpoint={second}", "num_passes=[1,2]", "difficulties=[2,3]", "num_examples=8"])
        == 0
    )
    said = capsys.readouterr().out
    assert all(text in said for text in ("ops 2", "ops 3", "N=1", "N=2"))


@pytest.mark.more
def test_stopped_in_both_stages_it_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported = imported_ouro(tmp_path)
    for name in ("whole", "stopped"):
        folder = tmp_path / name
        stages = (stage1_of(imported, folder / "1"), stage2_of(folder / "1", folder / "2"))
        for settings, stop_at in zip(stages, (2, 1)):
            if name == "stopped":
                with monkeypatch.context() as patch:
                    patch.setattr(Trainer, "train_step", stopping(stop_at))
                    assert main(settings) == EXIT_REQUEUE
            assert main(settings) == 0
    for stage_number in ("1", "2"):
        whole, stopped = (weights(tmp_path / name / stage_number) for name in ("whole", "stopped"))
        assert not moved(whole, stopped)


def stopping(at_step: int) -> Callable[[Trainer], object]:
    """``Trainer.train_step``, and a signal to stop at the beginning of that step."""
    train_step = Trainer.train_step

    def step(trainer: Trainer) -> object:
        if trainer.step + 1 == at_step:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(trainer)

    return step
