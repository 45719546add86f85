"""A study that takes seconds: Rule 110 on strings of 6 bits."""

from pathlib import Path

from e2e_runs import TINY

from sleeptrain.study.spec import Asked, ask

SIZES = [setting for setting in TINY if not setting.startswith(("eval.", "optim.", "log.", "checkpoint."))]
FEW = ("optim.num_steps=12", "optim.warmup_steps=2", "log.every_steps=3", "eval.every_steps=6")
FEWER = ("eval.num_examples=16", "study.num_examples=32", "checkpoint.every_steps=6")
GRID = "study.grid={sleep.num_passes: [1, 2], task.steps: [2]}"
TWO_RUNS = ("study.seeds=[0]", "study.budgets=[tokens]", "study.controls=[]")
SMALL = ("study=rule110_n", GRID, "study.seeds=[0,1]", "study.controls=[deeper]", "study.eval_passes=[1,3]")


def arguments(folder: Path, *settings: str) -> list[str]:
    return [*SMALL, f"study.dir={folder}", *SIZES, *FEW, *FEWER, "run.device=cpu", *settings]


def tiny(folder: Path, *settings: str) -> Asked:
    return ask(arguments(folder, *settings))
