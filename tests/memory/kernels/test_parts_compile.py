"""The kernels around the rule, and that of one token, compile for Hopper, with the tiles that their functions
choose, on a machine without a GPU; as test_kernels_compile.py does for the others of the rule."""

import json
import sys

import own_process
import pytest
from test_kernels_compile import MOST_SPILLED_BYTES, SHARED_BYTES, compile_one

pytestmark = [
    pytest.mark.more,
    pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux"),
]

FORMS = ("static", "per token", "no convolution", "not normalised", "one token")
LABELS = [
    *(f"{kernel} {form}" for kernel in ("convolution", "activation_gradient") for form in FORMS),
    *(f"input_gradient {form}" for form in ("static", "per token", "one token")),
    *(f"{kernel} {size}" for kernel in ("gated_norm", "gated_norm_gradient") for size in (64, 128, 256)),
    *(f"{kernel} {form}" for kernel in ("gates", "gates_gradient") for form in ("many tokens", "one token")),
    *(f"step {size}" for size in (64, 128, 256)),
]
INTEGERS = dict.fromkeys(("T", "C", "WIDTH", "N", "H", "Hk", "Hv"), "i32")
TYPES = INTEGERS | {"length": "fp32", "eps": "fp32", "valid": "*i1", "d_y": "*fp32", "weight": "*fp32"}


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, int]]:
    return own_process.compiled(__file__)


@pytest.mark.parametrize("label", LABELS)
def test_fits_a_multiprocessor(label: str, compiled: dict[str, dict[str, int]]) -> None:
    assert compiled[label]["shared bytes"] <= SHARED_BYTES
    assert compiled[label]["spilled bytes"] <= MOST_SPILLED_BYTES


def compile_all() -> dict[str, dict[str, int]]:
    return compile_convolutions() | compile_norms() | compile_gates() | compile_steps()


def compile_convolutions() -> dict[str, dict[str, int]]:
    from sleeptrain.memory.kernels import convolution
    from sleeptrain.memory.kernels.fused_convolution import CHANNELS, ELEMENTS, SPAN_TOKENS

    results = {}
    for form in FORMS:
        has_taps, per_token = form != "no convolution", form == "per token"
        normalised = form != "not normalised"
        columns = 256 if normalised else CHANNELS
        tile = {"ROWS": ELEMENTS // columns, "COLUMNS": columns, "W": 4 if has_taps else 1}
        tile |= {"PER_TOKEN": per_token} | ({"T": 1} if form == "one token" else {})
        forward = tile | {"NORMALISED": normalised} | ({} if has_taps else {"taps": None, "tail": None})
        backward = forward | {"SPAN": SPAN_TOKENS, "TAPS": tile["W"]} | ({} if has_taps else {"d_taps": None})
        types = TYPES | ({} if per_token else {"taps": "*fp32", "d_taps": "*fp32"})
        chosen = {"convolution": forward, "activation_gradient": backward}
        if has_taps and normalised:
            chosen["input_gradient"] = tile
        for name, constants in chosen.items():
            kernel = getattr(convolution, f"{name}_kernel")
            results[f"{name} {form}"] = compile_one(kernel, constants, {}, types, "*bf16")
    return results


def compile_norms() -> dict[str, dict[str, int]]:
    from sleeptrain.memory.kernels.gated_norm import (
        ELEMENTS,
        SPAN_TILES,
        gated_norm_gradient_kernel,
        gated_norm_kernel,
    )

    results = {}
    for size in (64, 128, 256):
        tile = {"V": size, "COLUMNS": size, "ROWS": ELEMENTS // size}
        results[f"gated_norm {size}"] = compile_one(gated_norm_kernel, tile, {}, TYPES, "*bf16")
        results[f"gated_norm_gradient {size}"] = compile_one(
            gated_norm_gradient_kernel,
            tile | {"SPAN": tile["ROWS"] * SPAN_TILES},
            {},
            TYPES | {"d_weight": "*fp32"},
            "*bf16",
        )
    return results


def compile_gates() -> dict[str, dict[str, int]]:
    from sleeptrain.memory.kernels.gates import ELEMENTS, gates_gradient_kernel, gates_kernel

    results = {}
    for form, of_form in (("many tokens", {}), ("one token", {"N": 1, "H": 1})):
        tile = {"SCALE": 1.0, "HEADS": 16, "ROWS": ELEMENTS // 16} | of_form
        for name, kernel in (("gates", gates_kernel), ("gates_gradient", gates_gradient_kernel)):
            results[f"{name} {form}"] = compile_one(kernel, tile, {}, TYPES, "*fp32")
    return results


def compile_steps() -> dict[str, dict[str, int]]:
    from sleeptrain.memory.kernels.step import STEP_VALUES, STEP_WARPS, step_kernel

    types = TYPES | dict.fromkeys(("log_decay", "beta", "state", "last_state"), "*fp32")
    results = {}
    for size in (64, 128, 256):
        tile = {"K": size, "V": size, "KEYS": size, "VALUES": STEP_VALUES}
        tile |= {"DECAYS": True, "ERASES": True, "READS": True}
        results[f"step {size}"] = compile_one(step_kernel, tile, {"num_warps": STEP_WARPS}, types, "*bf16")
    return results


if __name__ == "__main__":
    print(json.dumps(compile_all()))
