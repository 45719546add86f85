"""The inverse of a unit lower triangular matrix in float32, by forward substitution over blocks.

In the diagonal blocks of 16 rows it goes row by row, in all of them at once; then pairs of inverted blocks
become one of twice the size. Powers of the matrix (Neumann) would lose all digits where beta is near 2.
"""

import triton
import triton.language as tl


@triton.jit
def unit_lower_inverse(lower, C: tl.constexpr):
    """(I + ``lower``)^-1 ``[C, C]`` of a strictly lower triangular matrix; C is 16, 32 or 64."""
    blocks = _substitute(_diagonal(lower, 16, C))
    if C >= 32:
        blocks = _double(blocks, lower, 16, C)
    if C >= 64:
        blocks = _double(blocks, lower, 32, C)
    return tl.reshape(blocks, [C, C])


@triton.jit
def _diagonal(matrix, SIZE: tl.constexpr, C: tl.constexpr):
    """Its diagonal blocks ``[C / SIZE, SIZE, SIZE]``."""
    COUNT: tl.constexpr = C // SIZE
    block = tl.arange(0, COUNT)
    same = block[:, None, None, None] == block[None, None, :, None]
    return tl.sum(tl.where(same, tl.reshape(matrix, [COUNT, SIZE, COUNT, SIZE]), 0.0), axis=2)


@triton.jit
def _substitute(lower):
    """Inverse of each I + ``lower[n]``: row i is e_i minus the rows before it, weighted by row i of lower."""
    SIZE: tl.constexpr = lower.shape[1]
    row, column = tl.arange(0, SIZE)[None, :, None], tl.arange(0, SIZE)[None, None, :]
    inverse = tl.where(row == column, 1.0, 0.0) + tl.zeros_like(lower)
    for i in range(1, SIZE):
        weights = tl.sum(tl.where(row == i, lower, 0.0), axis=1)
        before = tl.sum(weights[:, :, None] * inverse, axis=1)
        inverse = tl.where(row == i, inverse - before[:, None, :], inverse)
    return inverse


@triton.jit
def _double(blocks, lower, SIZE: tl.constexpr, C: tl.constexpr):
    """[[X, 0], [Z, Y]]^-1 = [[X^-1, 0], [-Y^-1 Z X^-1, Y^-1]] for each pair of inverted diagonal blocks."""
    PAIRS: tl.constexpr = C // (2 * SIZE)
    wide = tl.reshape(_diagonal(lower, 2 * SIZE, C), [PAIRS, 2, SIZE, 2, SIZE])
    _, under = tl.split(tl.permute(wide, [0, 2, 4, 3, 1]))
    z, _ = tl.split(under)
    first, second = tl.split(tl.permute(tl.reshape(blocks, [PAIRS, 2, SIZE, SIZE]), [0, 2, 3, 1]))
    corner = -tl.dot(second, tl.dot(z, first, input_precision="ieee"), input_precision="ieee")
    whole = tl.join(tl.join(first, tl.zeros_like(first)), tl.join(corner, second))
    whole = tl.permute(whole, [0, 4, 1, 3, 2])
    return tl.reshape(whole, [PAIRS, 2 * SIZE, 2 * SIZE])
