"""The model card of an export: origin and licence, how the model was trained, and how good it is."""

import json
from pathlib import Path
from typing import Any

from sleeptrain.checkpoint.reader import Checkpoint


def model_card(checkpoint: Checkpoint, origin: dict[str, Any]) -> str:
    """Markdown with the front matter that Hugging Face reads."""
    config = checkpoint.documents["config"]
    licence = origin["licence"] or "unknown"
    known = licence if licence.replace("-", "").replace(".", "").isalnum() else "other"
    lines = [
        "---",
        f"license: {known}",
        f"base_model: {json.dumps(origin['name'])}",
        "tags: [sleeptrain]",
        "---",
        "",
    ]
    lines += [f"# {config['run']['id']}", ""]
    if checkpoint.step:
        sleep = config["sleep"]
        lines.append(
            f"Trained from {origin['name']} by sleeptrain for {checkpoint.step} steps on the task "
            f"{config['task']['name']}, with N = {sleep['num_passes']} passes over windows of "
            f"{sleep['window_tokens']} tokens. Loaded here, it makes one pass and never sleeps; sleeptrain "
            "itself lets it sleep, from its own checkpoint."
        )
    else:
        lines.append(f"The weights of {origin['name']}, as they were imported.")
    lines += ["", f"Licence of the origin: {licence}."]
    if origin["left_out"]:
        lines += [
            "",
            f"Left out: {len(origin['left_out'])} tensors, of which {origin['left_out'][0]} is one.",
        ]
    scores = last_scores(checkpoint.path.parent.parent / "metrics.jsonl", checkpoint.step)
    if scores:
        lines += ["", "| held out | value |", "|---|---|"]
        lines += [f"| {name} | {value:.4g} |" for name, value in scores.items()]
    return "\n".join(lines) + "\n"


def last_scores(path: Path, step: int) -> dict[str, float]:
    """The newest evaluation of the run up to this step; none where there is no such file."""
    if not path.is_file():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    scored = [row for row in rows if row.get("step", 0) <= step and any(k.startswith("eval/") for k in row)]
    newest = scored[-1] if scored else {}
    return {k: v for k, v in newest.items() if k.startswith("eval/") and isinstance(v, (int, float))}
