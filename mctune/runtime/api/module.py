"""``MemoryCaching``: a sequence-mixing layer around ``memory_caching``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn.functional import elu, relu, sigmoid, silu, softplus

from ..arguments import LARGEST, flag, known, positive, shown, whole
from ..cache.cache import MemoryCache
from ..call import GATES, check_call
from ..copies import own
from ..errors import ArgumentError
from ..kernels.dispatch import BACKENDS
from ..modes import without_autocast
from ..options import Options, given
from ..traits import AGGREGATIONS, RECURRENCES
from .conv import ShortConv
from .functional import memory_caching
from .gate import GateLinear
from .inputs import check_hidden, check_packed, check_past, check_rows, head_widths
from .packing import TAKES, refuse_rest, take_bounds
from .padding import as_row

Tensor = torch.Tensor
FEATURE_MAPS = ("relu", "elu", "silu", "softmax")
_UNIT_EPS = {None: 1e-2, "relu": 1e-2, "silu": 1e-2, "elu": 1e-4, "softmax": 1e-4}
"""Added to the square of a length that divides, so that a gradient grows by at most 10, also that of a row of zeros,
and stays within float16 behind the gain of the norm of an output of zeros. After elu and softmax no row is zero, and
the lengths of the latter's are small."""


class MemoryCaching(nn.Module):
    """Hidden states in, hidden states out, through a memory that caches its own past (arXiv:2602.24281).

    q, k, v and the connector u are linear in the hidden states; q, k and v may pass a short convolution, q and k a
    feature map, then q and k are scaled to unit length in each head. The output of each head passes an RMS norm and may
    be multiplied by silu of a gate that is linear in the hidden states; one projection mixes the heads. The memory's
    gates are linear in the hidden states, one value a head, computed in float32 also under autocast:
    g = -softplus(x) <= 0, beta, lam, eta and mu = sigmoid(x). Their weights start at zero, so at first each is the
    constant that its bias gives: e^g 0.95, lam 0.9, beta 0.1, mu 0.5, and an eta small enough that no memory diverges
    (:func:`first_eta`). Projections start
    normal with variance 1 / fan-in, as do the deep memory's first layers W_up; its last layers W_down start at a tenth
    of that.

    Args:
        hidden_size: width of the hidden states.
        num_heads: H.
        head_dim: Dk; ``None`` is hidden_size / num_heads.
        expand_v: Dv / Dk.
        recurrence, aggregation, segment_length, segmentation, state_init: as in :func:`memory_caching`.
        top_k, inner_chunk, memory_residual, backend: as in :func:`memory_caching`.
        expansion: E / Dk of a deep memory.
        connector: whether u has a projection of its own; otherwise u = q, the paper's form without parameters.
        feature_map: of q and k: ``None``, ``relu``, ``elu`` (elu + 1), ``silu`` or ``softmax`` over the head's width.
        qk_norm: whether q and k are scaled to unit length.
        use_short_conv: whether q, k and v pass a causal convolution over ``conv_size`` tokens, and silu.
        use_output_gate: whether the output has a gate.
        norm_eps: of the output's RMS norm.
        layer_idx: which layer of the cache is this one's; needed only with a cache.

    Raises:
        ArgumentError: if arguments contradict each other.

    Examples:
        >>> layer = MemoryCaching(hidden_size=64, num_heads=4, segment_length=32)
        >>> hidden, _, _ = layer(torch.randn(2, 96, 64))  # [B, T, hidden_size]
        >>> hidden.shape
        torch.Size([2, 96, 64])
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 4,
        *,
        head_dim: int | None = None,
        expand_v: float = 1.0,
        recurrence: str = "linear",
        aggregation: str = "grm",
        segment_length: int | None = 256,
        segmentation: str = "constant",
        state_init: str = "independent",
        top_k: int | None = 2,
        inner_chunk: int | None = 16,
        expansion: int = 4,
        memory_residual: bool | None = True,
        connector: bool = True,
        feature_map: str | None = None,
        qk_norm: bool = True,
        use_short_conv: bool = False,
        conv_size: int = 4,
        use_output_gate: bool = False,
        norm_eps: float = 1e-5,
        layer_idx: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        options = given(
            recurrence=recurrence,
            aggregation=aggregation,
            segmentation=segmentation,
            state_init=state_init,
            segment_length=segment_length,
            top_k=top_k,
            memory_residual=memory_residual,
            inner_chunk=inner_chunk,
        ).checked()
        known("backend", backend, BACKENDS)
        if feature_map is not None and not (isinstance(feature_map, str) and feature_map in FEATURE_MAPS):
            raise ArgumentError(f"feature_map={shown(feature_map)} is not None or one of {', '.join(FEATURE_MAPS)}")
        sizes = {"hidden_size": hidden_size, "num_heads": num_heads, "expansion": expansion, "conv_size": conv_size}
        for name, size in sizes.items():
            positive(name, size)
        if head_dim is not None:
            positive("head_dim", head_dim)
        if layer_idx is not None:
            whole("layer_idx", layer_idx, 0)
        flags = {"connector": connector, "qk_norm": qk_norm, "use_short_conv": use_short_conv}
        for name, value in (flags | {"use_output_gate": use_output_gate}).items():
            flag(name, value)
        for name, number in (("expand_v", expand_v), ("norm_eps", norm_eps)):
            if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number <= LARGEST:
                raise ArgumentError(f"{name}={shown(number)}: must be a number above 0, at most {LARGEST}")
        self.hidden_size, self.num_heads = hidden_size, num_heads
        self.head_dim, self.value_dim = head_widths(hidden_size, num_heads, head_dim, expand_v)
        if RECURRENCES[recurrence].deep and memory_residual and self.value_dim != self.head_dim:
            raise ArgumentError(
                f"memory_residual=True with expand_v={expand_v}: a memory can add its input only if Dk = Dv; pass "
                "memory_residual=False or expand_v=1"
            )
        self.recurrence, self.aggregation, self.segmentation = recurrence, aggregation, segmentation
        self.segment_length, self.state_init, self.top_k = options.segment_length, state_init, options.top_k
        self.inner_chunk, self.memory_residual, self.backend = options.inner_chunk, options.memory_residual, backend
        self.feature_map, self.qk_norm, self.layer_idx = feature_map, qk_norm, layer_idx
        self.conv_size = conv_size
        self._add_layers(connector, expansion, use_short_conv, use_output_gate, norm_eps)
        self.reset_parameters()

    def _add_layers(
        self, connector: bool, expansion: int, use_short_conv: bool, use_output_gate: bool, norm_eps: float
    ) -> None:
        """Everything that has parameters; :meth:`reset_parameters` draws them."""
        writes = RECURRENCES[self.recurrence]
        keys, values = self.num_heads * self.head_dim, self.num_heads * self.value_dim
        self.q_proj = nn.Linear(self.hidden_size, keys, bias=False)
        self.k_proj = nn.Linear(self.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(self.hidden_size, values, bias=False)
        reads_u = connector and AGGREGATIONS[self.aggregation].routed
        self.u_proj = nn.Linear(self.hidden_size, keys, bias=False) if reads_u else None
        self.convs = nn.ModuleList(ShortConv(width, self.conv_size) for width in (keys, keys, values) if use_short_conv)
        self.gates = nn.ModuleDict(
            {f"{name}_proj": GateLinear(self.hidden_size, self.num_heads) for name in writes.gates}
        )
        self.W_up: nn.Parameter | None = None
        self.W_down: nn.Parameter | None = None
        if writes.deep:
            width = expansion * self.head_dim
            self.W_up = nn.Parameter(torch.empty(self.num_heads, self.head_dim, width))
            self.W_down = nn.Parameter(torch.empty(self.num_heads, width, self.value_dim))
        self.norm = nn.RMSNorm(self.value_dim, eps=norm_eps)
        self.output_gate_proj = nn.Linear(self.hidden_size, values, bias=False) if use_output_gate else None
        self.o_proj = nn.Linear(values, self.hidden_size, bias=False)

    def reset_parameters(self) -> None:
        """Draw the parameters again, as the class describes."""
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.u_proj, self.output_gate_proj, self.o_proj):
            if layer is not None:
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        for conv in self.convs:
            assert isinstance(conv, ShortConv)
            conv.reset_parameters()
        # The values of sigmoid(x) at first. e^g is sigmoid(-x), so it starts at 0.95.
        starts = {"g": 0.05, "beta": 0.1, "lam": 0.9, "mu": 0.5}
        if self.W_up is not None:
            _, Dk, E = self.W_up.shape
            starts["eta"] = first_eta(self.recurrence, self.inner_chunk, Dk, E, self.qk_norm)
        for name in RECURRENCES[self.recurrence].gates:
            layer = self._gate_layer(name)
            nn.init.zeros_(layer.weight)
            nn.init.constant_(layer.bias, math.log(starts[name] / (1 - starts[name])))
        if self.W_up is not None and self.W_down is not None:
            nn.init.normal_(self.W_up, std=self.W_up.shape[1] ** -0.5)
            nn.init.normal_(self.W_down, std=0.1 * self.W_down.shape[1] ** -0.5)
        self.norm.reset_parameters()

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: MemoryCache | None = None,
        use_cache: bool | None = False,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None, MemoryCache | None]:
        """[B, T, hidden_size] to [B, T, hidden_size], in the same dtype, and the cache.

        Args:
            hidden_states: [B, T, hidden_size].
            attention_mask: [B, T], 0 at padding and 1 at tokens; the output at padding is 0. With a cache, padding is
                on the left, in the call that starts the sequences; after that the mask may also be [B, all tokens].
            past_key_values: what earlier calls left; this call goes on from it, and changes it.
            use_cache: whether to start a cache if there is none.
            cu_seqlens: int32 [S + 1], from 0 to T, the bounds of the sequences of a packed row (and then B = 1).
            kwargs: other names of the same: ``cu_seq_lens_q``, ``cu_seq_lens_k``, ``seq_idx``, [B, T], the number of
                each token's sequence, ``position_ids``, [B, T], which start again with every sequence. What asks for
                nothing (``None``, ``False``) may be passed too; all else is refused.

        Returns:
            The output, ``None`` in the place of attention's weights, and the cache, ``None`` without one.

        Raises:
            ArgumentError: if the shape is another, or arguments contradict each other, the segmentation or the cache.
        """
        check_hidden(hidden_states, self.hidden_size)
        cache = MemoryCache() if use_cache and past_key_values is None else past_key_values
        if cache is not None:
            self._check_cache(cache)
        bounds = take_bounds(kwargs, hidden_states.shape[:2], cu_seqlens, attention_mask)
        refuse_rest("MemoryCaching.forward", kwargs, TAKES)
        if cache is not None and bounds is None:
            check_rows(cache, self._index, hidden_states)
        started = None if cache is None else cache.layer(self._index) is not None
        found = as_row(hidden_states, attention_mask, bounds, started)
        if found is None:
            return self._mix(hidden_states, None, cache), None, cache
        row, bounds, restored = found
        return restored(self._mix(row, bounds, cache)), None, cache

    def extra_repr(self) -> str:
        """The options, for ``print(module)``."""
        segments = "" if self.segmentation == "logarithmic" else f", segment_length={self.segment_length}"
        return (
            f"recurrence={self.recurrence}, aggregation={self.aggregation}, segmentation={self.segmentation}{segments}"
            f", state_init={self.state_init}"
        )

    @property
    def _index(self) -> int:
        assert self.layer_idx is not None
        return self.layer_idx

    def _check_cache(self, cache: MemoryCache) -> None:
        own("past_key_values", cache, MemoryCache)
        if self.layer_idx is None:
            raise ArgumentError("layer_idx=None with a cache: give every MemoryCaching its own layer_idx=0, 1, ...")
        if self.segmentation == "logarithmic":
            raise ArgumentError(
                "segmentation='logarithmic' with a cache: its segments depend on how long the sequence will be; use "
                "segmentation='constant'"
            )

    def _mix(self, x: Tensor, cu_seqlens: Tensor | None, cache: MemoryCache | None) -> Tensor:
        segmentation = self.segmentation
        started = cache is not None and cache.layer(self._index) is not None
        if cu_seqlens is not None:
            check_packed(x, cu_seqlens, read=bool(self.convs))
            if started:
                raise ArgumentError(
                    "cu_seqlens after the first call with this cache: its sequences are rows now; pass their next "
                    "tokens as [B, n, hidden_size]"
                )
            if segmentation == "logarithmic":
                raise ArgumentError(
                    "segmentation='logarithmic' with several sequences in one row (cu_seqlens, or padding in "
                    "attention_mask): packed segments are of one length; use segmentation='constant'"
                )
            segmentation = "packed"
        elif started:
            # The sequences of a packed row go on as rows.
            segmentation = "constant"
        parts = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        kept = []
        if self.convs:
            past = None if cache is None else check_past(cache, self._index, self.convs, x)
            keep = self.conv_size - 1 + (0 if cache is None else cache.rewind)
            for number, conv in enumerate(self.convs):
                parts[number], newest = conv(parts[number], None if past is None else past[number], cu_seqlens, keep)
                kept.append(newest)
        q, k, v = (self._heads(part) for part in parts)
        u = None if self.u_proj is None else self._heads(self.u_proj(x))
        y = self._remember(self._features(q), self._features(k), v, u, self._gates(x), segmentation, cu_seqlens, cache)
        if kept and cache is not None:
            cache.set_conv_state(self._index, tuple(kept), kept[0].shape[1] - self.conv_size + 1)
        y = self.norm(y).flatten(2)
        if self.output_gate_proj is not None:
            y = y * silu(self.output_gate_proj(x))
        out: Tensor = self.o_proj(y)
        return out

    def _features(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        match self.feature_map:
            case "relu":
                x = relu(x)
            case "elu":
                x = elu(x) + 1
            case "silu":
                x = silu(x)
            case "softmax":
                x = x.softmax(-1)
        if self.qk_norm:
            # In 16 bits the squares leave the range, and an epsilon is zero.
            x = x if x.dtype == torch.float64 else x.float()
            x = x * (x.square().sum(-1, keepdim=True) + _UNIT_EPS[self.feature_map]).rsqrt()
        # Autocast widens some of these.
        return x.to(dtype)

    def _remember(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        u: Tensor | None,
        gates: dict[str, Tensor | None],
        segmentation: str,
        cu_seqlens: Tensor | None,
        cache: MemoryCache | None,
    ) -> Tensor:
        if cache is None:
            return memory_caching(
                q,
                k,
                v,
                u,
                recurrence=self.recurrence,
                aggregation=self.aggregation,
                segment_length=self.segment_length,
                segmentation=segmentation,
                state_init=self.state_init,
                top_k=self.top_k,
                W_up=self.W_up,
                W_down=self.W_down,
                memory_residual=self.memory_residual,
                inner_chunk=self.inner_chunk,
                cu_seqlens=cu_seqlens,
                backend=self.backend,
                g=gates["g"],
                beta=gates["beta"],
                lam=gates["lam"],
                eta=gates["eta"],
                mu=gates["mu"],
            )
        options = Options(
            recurrence=self.recurrence,
            aggregation=self.aggregation,
            segment_length=self.segment_length,
            segmentation=segmentation,
            state_init=self.state_init,
            top_k=self.top_k,
            memory_residual=self.memory_residual,
            inner_chunk=self.inner_chunk,
        )
        weights = {"W_up": self.W_up, "W_down": self.W_down}
        call = check_call(q, k, v, u, options, gates=gates, **weights, cu_seqlens=cu_seqlens)
        return cache.extend(call, self._index, self.backend, self)

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.num_heads, -1)

    def _gate_layer(self, name: str) -> nn.Linear:
        layer = self.gates[f"{name}_proj"]
        assert isinstance(layer, nn.Linear)
        return layer

    def _gates(self, x: Tensor) -> dict[str, Tensor | None]:
        takes = RECURRENCES[self.recurrence].gates
        return {name: self._gate(name, x) if name in takes else None for name in GATES}

    def _gate(self, name: str, hidden_states: Tensor) -> Tensor:
        # Called, not read: an adapter, a hook, a quantised or a sharded layer may stand there.
        x: Tensor = self.gates[f"{name}_proj"](hidden_states)
        with without_autocast(hidden_states.device):
            x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
            return -softplus(x) if name == "g" else sigmoid(x)


def first_eta(recurrence: str, inner_chunk: int, Dk: int, E: int, unit_keys: bool) -> float:
    """The eta that a fresh layer's memory starts with: its writes converge, one by one and together.

    The tokens of an inner chunk share their gradient's state and must not overshoot together; few of them leave a
    bound by the curvature along one key, which grows with its squared length and with the width of the hidden layer.
    Without a decay (dla) what is written only adds up, so the bound is lower.
    """
    alone = 0.05 if "g" in RECURRENCES[recurrence].gates else 0.01
    # Of keys without a norm some are much longer than most, the more so the narrower they are.
    squared_length = 1 if unit_keys else 2 * (Dk + 4)
    return min(0.5 / inner_chunk, alone) / (squared_length * max(1.0, E / (4 * Dk)))
