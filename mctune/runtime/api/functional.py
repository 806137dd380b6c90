"""``memory_caching``: the operation, on whichever backend serves the call."""

from __future__ import annotations

import torch

from ..arguments import known
from ..call import check_call
from ..kernels.dispatch import BACKENDS
from ..ops.serve import serve
from ..options import given

Tensor = torch.Tensor


def memory_caching(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor | None = None,
    *,
    recurrence: str = "linear",
    aggregation: str = "grm",
    segment_length: int | None = 256,
    segmentation: str = "constant",
    state_init: str = "independent",
    top_k: int | None = 2,
    scale: float | None = None,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    lam: Tensor | None = None,
    eta: Tensor | None = None,
    mu: Tensor | None = None,
    W_up: Tensor | None = None,
    W_down: Tensor | None = None,
    memory_residual: bool | None = True,
    inner_chunk: int | None = 16,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Memory Caching (arXiv:2602.24281): a recurrent memory that also reads its own past states.

    The sequence is cut into segments. Within one, token t writes to a memory M and then reads it; the memory at the end
    of every segment is kept. In segment s, token t reads ``y_t = sum over i <= s of gamma_t^(i) M^(i)(scale q_t)``.
    ``M^(s)`` is the memory as token t has left it. The aggregation says what gamma is: for ``grm`` the softmax of
    ``<u_t, p^(i)>`` over i, where ``p^(i)`` is the mean key of segment i (Eq. 8-10).

    Args:
        q, k: queries and keys, [B, T, H, Dk], float32, bfloat16, float16 or float64.
        v: values, [B, T, H, Dv], same dtype.
        u: connectors, [B, T, H, Dk], same dtype: what the gates compare with the segments (Eq. 10). ``None`` is u = q.
        recurrence: how the memory is written: ``linear`` (Eq. 2), ``swla`` (Eq. 26-27), ``dla`` (Eq. 30-31) or
            ``titans`` (Eq. 34-36).
        aggregation: how the states are read: ``residual`` (Eq. 6-7), ``grm`` (Eq. 8-10), ``soup`` (Eq. 14-15), ``ssc``
            (Eq. 16-17) or ``mean`` (section 4.3).
        segment_length: tokens of a segment; ignored by ``logarithmic``.
        segmentation: ``constant``, ``logarithmic`` (powers of two of T, longest first) or ``packed`` (``cu_seqlens``).
        state_init: what a segment starts from: ``independent`` (the initial state) or ``checkpoint`` (the end state of
            the segment before it).
        top_k: cached segments that ``ssc`` reads for each token, besides the one that the token is in.
        scale: multiplies q where a memory is read, and nowhere else; ``None`` is Dk ** -0.5. A number: to learn one,
            pass q * scale as q, q as u, and scale=1.0.
        g, beta, lam, eta, mu: gates, [B, T, H], float32; swla takes g, beta, lam, dla takes eta, titans g, eta, mu. g
            is the logarithm of a decay, at most 0. Absent ones are 0, 0, 1, 1, 0.
        W_up, W_down: what a deep memory (dla, titans) starts from, [H, Dk, E] and [H, E, Dv].
        memory_residual: a deep memory adds its input to its output, which needs Dk = Dv.
        inner_chunk: tokens of a deep memory that share the state at which gradients are taken.
        cu_seqlens: int32 [S + 1], the bounds of the sequences of a packed row, from 0 to T; B is 1.
        backend: ``auto`` (a tuned kernel where one fits, else eager), or one of ``eager``, ``tvm``, ``triton``.

    Returns:
        y, [B, T, H, Dv], in the dtype of q. States, gates and sums are float32 (float64 for float64 inputs).

    Raises:
        ArgumentError: if arguments contradict each other, or one is of another type. An option that the call does not
            use may be ``None``.
        BackendError: if the backend asked for by name cannot serve the call.

    Examples:
        >>> q, k, v, u = torch.randn(4, 2, 96, 4, 16).unbind()  # B=2, T=96, H=4, Dk=Dv=16
        >>> y = memory_caching(q, k, v, u, aggregation="grm", segment_length=32)
        >>> y.shape
        torch.Size([2, 96, 4, 16])
    """
    known("backend", backend, BACKENDS)
    options = given(
        recurrence=recurrence,
        aggregation=aggregation,
        segment_length=segment_length,
        segmentation=segmentation,
        state_init=state_init,
        top_k=top_k,
        scale=scale,
        memory_residual=memory_residual,
        inner_chunk=inner_chunk,
    )
    gates = {"g": g, "beta": beta, "lam": lam, "eta": eta, "mu": mu}
    call = check_call(q, k, v, u, options, gates=gates, W_up=W_up, W_down=W_down, cu_seqlens=cu_seqlens)
    return serve(call, backend)
