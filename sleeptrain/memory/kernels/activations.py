"""Functions of logits that are exact at both ends, in float32, and never meet an infinity."""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0.0, 1.0, small) / (1.0 + small)


@triton.jit
def silu_slope(x):
    """The derivative of x sigmoid(x)."""
    s = sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


@triton.jit
def softplus(x):
    """max(x, 0) + log(1 + u), u = exp(-|x|), and log(1 + u) = 2 artanh(u / (2 + u)) as a series: a logarithm
    near 1 would lose the digits of a slow decay."""
    u = tl.exp(-tl.abs(x))
    z = u / (2.0 + u)  # at most 1/3, so that nine terms reach float32's last digit
    square, series = z * z, tl.zeros_like(z)
    for i in tl.static_range(9):
        series = series * square + 1.0 / (17 - 2 * i)
    return tl.maximum(x, 0.0) + 2.0 * z * series
