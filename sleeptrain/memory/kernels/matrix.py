"""What the kernels share: matrices in memory, products, decays.

Shape letters, in all kernels: C tokens of a chunk, K key size, V value size. ``left`` is the number of tokens
from the chunk's first one to the end of the sequence: rows beyond it read as zero and are not written.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def product(a, b, TYPE: tl.constexpr):
    """a b, summed in float32, of factors rounded to TYPE; float32 ones as three products of TF32, which come
    near to float32 on the matrix units."""
    a, b = a.to(TYPE), b.to(TYPE)
    if INTERPRETED:  # whose product of bfloat16 is silently wrong
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def load(x, rows, columns, num_rows, num_columns, stride):
    """Part of a matrix whose rows are ``stride`` elements apart; zero outside."""
    inside = (rows[:, None] < num_rows) & (columns[None, :] < num_columns)
    return tl.load(x + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def store(x, value, rows, columns, num_rows, num_columns, stride):
    """Writes what of ``value`` lies inside, rounded to the type of ``x``."""
    inside = (rows[:, None] < num_rows) & (columns[None, :] < num_columns)
    tl.store(x + rows[:, None] * stride + columns[None, :], value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def at(batch, token, head, T, H, D):
    """Where the D elements of a token and head begin in ``[B, T, H, D]``, which may exceed 2^31 elements."""
    return ((batch.to(tl.int64) * T + token) * H + head) * D


@triton.jit
def decay(logs):
    """From differences of sums in float64, which survive -60 next to 0; a positive one counts as 0."""
    return tl.exp(tl.minimum(logs, 0.0).to(tl.float32))


@triton.jit
def decay_between(total, rows):
    """D_ij = exp(G_i - G_j) for i >= j else 0, ``[C, C]``."""
    return tl.where(rows[:, None] >= rows[None, :], decay(total[:, None] - total[None, :]), 0.0)
