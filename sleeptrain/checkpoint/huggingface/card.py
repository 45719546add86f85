"""The model card of an export: origin and licence, how the model was trained and sleeps, how good it is."""

import json
import math
from pathlib import Path
from typing import Any

from sleeptrain.checkpoint.reader import Checkpoint
from sleeptrain.config import ModelConfig, SleepConfig
from sleeptrain.schema import from_dict

_USE = """\
It needs torch and transformers 5 alone; its modelling file lies beside the weights.

```python
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
torch.set_grad_enabled(False)
ids = torch.tensor([[0, 1, 0]])
model.generate(ids, max_new_tokens=20)  # sleeps whenever a window is full
out = model(ids, num_passes={num_passes})  # out.logits; out.cache is what it remembers
out = model(torch.tensor([[1, 1]]), cache=out.cache)  # reads on, from a cache that does not grow
model.sleep(out.cache)  # before the window is full
```

{ids} All rows of a batch have the same length: pads are refused."""


def model_card(checkpoint: Checkpoint, origin: dict[str, Any] | None, sleeps: bool) -> str:
    """Markdown with the front matter that Hugging Face reads. ``origin``: None for a model that was trained
    from scratch. ``sleeps``: whether the folder has the modelling file that lets it."""
    run_id = checkpoint.documents["config"]["run"]["id"]
    parts = [_front_matter(origin, sleeps), f"# {run_id}", _past(checkpoint, origin, sleeps)]
    if sleeps:
        parts += [_sleep(checkpoint), _settings(checkpoint), "## Use", _use(checkpoint, origin)]
    parts.append(_licence(origin))
    left_out = [] if origin is None else origin["left_out"] + (list(origin["kept"]) if sleeps else [])
    if left_out:
        parts.append(f"Left out: {len(left_out)} tensors, of which {left_out[0]} is one.")
    scores = last_scores(checkpoint.path.parent.parent / "metrics.jsonl", checkpoint.step)
    if scores:
        parts.append(_table(["held out", "value"], {name: f"{value:.4g}" for name, value in scores.items()}))
    return "\n\n".join(parts) + "\n"


def last_scores(path: Path, step: int) -> dict[str, float]:
    """The newest evaluation of the run up to this step; none where there is no such file."""
    if not path.is_file():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    scored = [row for row in rows if row.get("step", 0) <= step and any(k.startswith("eval/") for k in row)]
    newest = scored[-1] if scored else {}
    return {k: v for k, v in newest.items() if k.startswith("eval/") and isinstance(v, (int, float))}


def _front_matter(origin: dict[str, Any] | None, sleeps: bool) -> str:
    lines = []
    if origin is not None:
        licence = origin["licence"] or "unknown"
        known = licence if licence.replace("-", "").replace(".", "").isalnum() else "other"
        lines += [f"license: {known}", f"base_model: {json.dumps(origin['name'])}"]
    if sleeps:
        lines += ["library_name: transformers", "pipeline_tag: text-generation"]
    return "\n".join(["---", *lines, "tags: [sleeptrain]", "---"])


def _past(checkpoint: Checkpoint, origin: dict[str, Any] | None, sleeps: bool) -> str:
    """Where the weights come from."""
    config, steps = checkpoint.documents["config"], f"{checkpoint.step} steps"
    task, sleep = config["task"]["name"], config["sleep"]
    if origin is None:
        return (
            f"Trained from scratch by sleeptrain for {steps} on the task {task}: it stems from no other "
            "model."
        )
    if not checkpoint.step:
        return f"The weights of {origin['name']}, as they were imported."
    said = f"Trained from {origin['name']} by sleeptrain for {steps} on the task {task}"
    if sleeps:
        return f"{said}."
    return (
        f"{said}, with N = {sleep['num_passes']} passes over windows of {sleep['window_tokens']} tokens. "
        "Loaded here, it makes one pass and never sleeps; sleeptrain itself lets it sleep, from its own "
        "checkpoint, and exports it with sleeping=true as a folder that does."
    )


def _sleep(checkpoint: Checkpoint) -> str:
    """What it does when its window is full."""
    config = checkpoint.documents["config"]
    sleep = from_dict(SleepConfig, config["sleep"], "sleep.")
    if not sleep.window_tokens:
        return "It reads everything as one window, and sleeps only where it is told to."
    kept = "clears its KV cache"
    if sleep.eviction == "sliding":
        kept = f"keeps the keys and values of the newest {sleep.window_tokens - 1} tokens"
    passes = f"{sleep.num_passes} passes" if sleep.num_passes > 1 else "one pass"
    return (
        f"It sleeps: over each {sleep.window_tokens} tokens it makes {passes}, reading included; then it "
        f"{kept}, and goes on. What it remembers "
        "of older ones is in the fast weights of its gdn and jet blocks. A prediction takes one pass, "
        "however long it slept. Method: Lee, McLeish, Goldstein and Fanti, *Do Language Models Need Sleep? "
        "Offline Recurrence for Improved Online Inference* (arXiv 2605.26099)."
    )


def _settings(checkpoint: Checkpoint) -> str:
    config = checkpoint.documents["config"]
    model, sleep = from_dict(ModelConfig, config["model"], "model."), config["sleep"]
    sizes = [checkpoint.shape("model", name) for name in checkpoint.names("model")]
    rows = {
        "weights": f"{sum(math.prod(size) for size in sizes):,}",
        "blocks": model.pattern + (f", {model.pattern_repeats} times" if model.pattern_repeats > 1 else ""),
        "prelude, coda": f"{model.prelude_blocks}, {model.coda_blocks} blocks that do not loop",
        "width": model.d_model,
        "fast weights": f"{model.memory_heads} heads of {model.memory_key_dim} x {model.memory_value_dim}",
        "rule": model.rule,
        "window": f"{sleep['window_tokens']} tokens",
        "passes": f"N = {sleep['num_passes']}, reading included",
        "eviction": sleep["eviction"],
        "schedule": sleep["schedule"],
    }
    return _table(["setting", "value"], rows)


def _use(checkpoint: Checkpoint, origin: dict[str, Any] | None) -> str:
    """How it is loaded, and what its ids are."""
    config = checkpoint.documents["config"]
    task = config["task"]
    ids = f"Ids are those of sleeptrain's task {task['name']}."
    if task["name"] == "text" and task["tokenizer"] == "bytes":
        ids = "Ids are the bytes of a text in UTF-8; 256 ends it."
    elif task["name"] == "text" or origin is not None:
        ids = "Ids are those of the tokenizer that it was trained with."
    return _USE.format(num_passes=config["sleep"]["num_passes"], ids=ids)


def _licence(origin: dict[str, Any] | None) -> str:
    if origin is None:
        return "Licence: none was chosen for these weights; who publishes them chooses one."
    return f"Licence of the origin: {origin['licence'] or 'unknown'}."


def _table(head: list[str], rows: dict[str, Any]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows.items())])
