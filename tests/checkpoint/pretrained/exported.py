"""Run as a script of its own, where sleeptrain cannot be imported: loads exported folders as anybody would,
and writes what they predict beside them.

    python -I exported.py IDS.safetensors FOLDER ...
"""

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

PASSES = (1, 3)
NEW_TOKENS = 10
OF_BEAMS = ("ends", "mixed")  # between them they hold all that a memory can


def predictions(model: Any, ids: Tensor, num_passes: int) -> dict[str, Tensor]:
    """Logits ``[B, T, V]`` at once, in pieces and token by token, what is written greedily, and the most
    tokens that the memory ever held of each kind."""
    said = {"at_once": model(ids, num_passes=num_passes).logits}
    most = 0
    for name, piece_tokens in (("in_pieces", 5), ("by_token", 1)):
        logits, memory = [], None
        for piece in ids.split(piece_tokens, dim=1):
            out = model(piece, cache=memory, num_passes=num_passes)
            memory = out.cache
            logits.append(out.logits)
            held = [keys.shape[1] for block in memory.state + memory.start for keys, _ in block.caches]
            most = max(most, memory.hidden.shape[1], *held)
        said[name] = torch.cat(logits, dim=1)
    said["held"] = torch.tensor(most)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
    written = model.generate(ids, num_passes=num_passes, **options)
    said["written"] = written[:, ids.shape[1] :]
    return said


def written_by_beams(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Ids found with what the model remembers, and by reading everything anew for each token."""
    options = {"max_new_tokens": NEW_TOKENS, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    return {
        "beams": model.generate(ids, use_cache=True, **options),
        "beams_anew": model.generate(ids, use_cache=False, **options),
    }


def main(ids_file: str, *folders: str) -> None:
    ids = load_file(ids_file)["ids"]
    for folder in folders:
        model, told = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, output_loading_info=True
        )
        assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
        said: dict[str, Tensor] = {}
        with torch.no_grad():
            for num_passes in PASSES:
                found = predictions(model, ids, num_passes)
                said |= {f"{name}.{num_passes}": tensor for name, tensor in found.items()}
            if Path(folder).name in OF_BEAMS:
                said |= written_by_beams(model, ids)
            said["exactly"] = model.double()(ids).logits
            said["in_bfloat16"] = model.bfloat16()(ids, num_passes=1).logits
        save_file({name: tensor.contiguous() for name, tensor in said.items()}, f"{folder}.safetensors")


if __name__ == "__main__":
    sys.modules["sleeptrain"] = None  # type: ignore[assignment]  # an import of it is an ImportError
    torch.set_num_threads(1)
    main(*sys.argv[1:])
