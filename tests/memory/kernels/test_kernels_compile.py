"""The Triton kernels compile for Hopper, with the tiles of its table, on a machine without a GPU.

What compiles need not be right: that is for test_kernels.py here and test_kernels_on_gpu.py there.
"""

import contextlib
import io
import json
import re
import sys

import own_process
import pytest

pytestmark = [
    pytest.mark.more,
    pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux"),
]

SHARED_BYTES = 227 * 2**10  # of a multiprocessor, for one program
MOST_SPILLED_BYTES = 256  # what does not fit in a thread's registers goes to slow memory
KERNELS = ("factors", "scan", "scan_backward", "gradients", "scan_of_segments", "scan_backward_of_segments")
KEY_DIMS = (64, 96, 128, 256)  # and values of the same size
FLOAT32 = ("log_decay", "beta", "state", "last_state", "d_last_state", "d_state", "d_log_decay", "d_beta")


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, int]]:
    return own_process.compiled(__file__)


@pytest.mark.parametrize("key_dim", KEY_DIMS)
@pytest.mark.parametrize("name", KERNELS)
def test_fits_a_multiprocessor_and_uses_its_matrix_units(
    name: str, key_dim: int, compiled: dict[str, dict[str, int]]
) -> None:
    found = compiled[f"{name} bf16 {key_dim}"]
    assert found["shared bytes"] <= SHARED_BYTES
    assert found["spilled bytes"] <= MOST_SPILLED_BYTES
    assert found["wgmma"] > 0


@pytest.mark.parametrize("name", KERNELS)
def test_float32_fits_too(name: str, compiled: dict[str, dict[str, int]]) -> None:
    assert compiled[f"{name} fp32 256"]["shared bytes"] <= SHARED_BYTES


def compile_all() -> dict[str, dict[str, int]]:
    import triton.language as tl

    from sleeptrain.memory.kernels import factors, gradients, scan
    from sleeptrain.memory.kernels.tiles import choose_tiles, power_of_2

    results = {}
    for key_dim, low in (*((dim, "bf16") for dim in KEY_DIMS), (256, "fp32")):
        tiles = choose_tiles(8192, 128, key_dim, key_dim, 2 if low == "bf16" else 4)
        common = {"K": key_dim, "C": tiles.chunk_tokens, "ERASES": True, "READS": True}
        common |= {"TYPE": tl.bfloat16 if low == "bf16" else tl.float32}
        scanned = common | {"V": key_dim, "KEYS": power_of_2(key_dim), "VALUES": tiles.scan_values}
        columns = {"KEYS": tiles.gradient_keys, "VALUES": tiles.gradient_values}
        scan_options = {"num_warps": tiles.scan_warps, "num_stages": tiles.scan_stages}
        options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
        keeps, without = {"WIDTH": key_dim, "KEEPS": True}, {"READS": False, "KEEPS": False}
        for name, kernel, constants, chosen in (
            ("factors", factors.factors_kernel, common | {"KEYS": tiles.factor_keys}, options),
            ("scan", scan.scan_kernel, scanned | keeps, scan_options),
            ("scan_backward", scan.scan_backward_kernel, scanned | {"KEEPS": True}, scan_options),
            ("gradients", gradients.gradients_kernel, common | {"V": key_dim} | columns, options),
            # Those of split.py, before the state of a segment is known.
            ("scan_of_segments", scan.scan_kernel, scanned | without | {"WIDTH": 2 * key_dim}, scan_options),
            (
                "scan_backward_of_segments",
                scan.scan_backward_kernel,
                scanned | {"KEEPS": False},
                scan_options,
            ),
        ):
            types = dict.fromkeys(FLOAT32, "*fp32") | {"total": "*fp64", "T": "i32", "Hk": "i32", "Hv": "i32"}
            results[f"{name} {low} {key_dim}"] = compile_one(kernel, constants, chosen, types, f"*{low}")
    return results


def compile_one(kernel, constants: dict, options: dict, types: dict[str, str], other: str) -> dict[str, int]:
    """Bytes of shared memory, bytes spilled by a thread, and matrix instructions. ``types`` of parameters by
    name, ``other`` for those not named."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = types | dict.fromkeys(constants, "constexpr")
    signature = {p.name: types.get(p.name, other) for p in kernel.params}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, t in enumerate(signature.values())
        if t not in ("constexpr", "fp32")
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    triton.knobs.nvidia.dump_ptxas_log = True
    with contextlib.redirect_stdout(io.StringIO()) as said:
        binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return {
        "shared bytes": binary.metadata.shared,
        "spilled bytes": max(map(int, re.findall(r"(\d+) bytes spill stores", said.getvalue()))),
        "wgmma": binary.asm["ptx"].count("wgmma.mma_async"),
    }


if __name__ == "__main__":
    print(json.dumps(compile_all()))
