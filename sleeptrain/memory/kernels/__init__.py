"""Triton kernels of the memory rules and of what stands around them; imported only where they run
(``dispatch.py``).

With G the running sum of log decays in a chunk, D_ij = exp(G_i - G_j) for i >= j else 0, S the state before
the chunk and b the write strengths (the mathematics of ``chunked.py``, with U and W never formed):

    A = I + strictly_lower(diag(b) (K K^T * D))          factors.py, all chunks at once: A^-1 and P
    P = Q K^T * D                                        (stored as A^-1 - I: the ones are exact)
    Y = A^-1 diag(b) (V - diag(exp(G)) K S)              scan.py, chunk after chunk
    out = diag(exp(G)) Q S + P Y
    S' = exp(G_C) S + K^T diag(exp(G_C - G)) Y

    dY = diag(exp(G_C - G)) K dS' + P^T d_out            scan.py, in reverse
    dR = A^-T dY
    dS = exp(G_C) dS' + Q^T diag(exp(G)) d_out - K^T diag(b exp(G)) dR
    dq, dk, dv, d_log_decay, d_beta                      gradients.py, all chunks at once

``rule.py`` joins them behind the contract; ``split.py`` scans a long sequence in parts, side by side;
``step.py`` is for one token alone; ``tiles.py`` has the sizes. ``fused_convolution.py`` (the kernels of
``convolution.py``), ``gates.py`` and ``gated_norm.py`` are what stands around a rule. ``check.py`` proves all
of them on a device.
"""
