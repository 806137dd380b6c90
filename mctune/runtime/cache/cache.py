"""``MemoryCache``: what the layers of a model remember of their sequences between two calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import ReferenceType, ref

import torch

from ..arguments import LARGEST, positive, shown, whole
from ..call import Call
from ..eager.ends import sequence_lengths
from ..errors import ArgumentError
from ..memory import LayerMemory
from ..ops.step import extend
from ..segments import check_bounds
from .convolution import Convolution, check_convolution, crop_convolution, in_common
from .crop import check_crop, crop_layer
from .file import read_layers, write_layers
from .prefill import between, joined, prefill
from .rewind import History, extend_recorded
from .rows import check_alike, check_rows, extend_prompt

Tensor = torch.Tensor
STATE_DTYPES = (torch.bfloat16, torch.float16)
"""What cached states may be kept in, besides the dtype that they are computed in."""


@dataclass(eq=False)
class _Layer:
    memory: LayerMemory
    history: History | None
    owner: ReferenceType[object] | None = None
    """Which layer of a model writes here, as long as it lives; copies and files of a cache do not know it."""

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"owner": None}


class MemoryCache:
    """The memories of all layers of a model, one row a sequence (arXiv:2602.24281); rows may be of unequal lengths.

    The first call of a layer is its prompt, all later ones go on from there. A layer holds, of each sequence, the end
    state and the mean key of every segment, and the state of the segment under way: it grows by one state a segment.

    Args:
        max_states: most cached states to keep of a sequence; the oldest is dropped. ``None`` keeps all.
        rewind: newest tokens that :meth:`crop` can take back wherever they end, by a snapshot every ``rewind`` tokens
            and the keys, values and gates since.
        state_dtype: ``torch.bfloat16`` or ``torch.float16`` keeps cached end states in 16 bits. A decoded token is
            bound by their bytes, so it takes half the time, at about the accuracy of a forward in that dtype, whose
            kernels round states in the same way. Each state is rounded once, when its segment has ended; later calls
            read it rounded and add in float32. A state beyond 65504 overflows float16. Everything else stays float32:
            states under way, mean keys, a deep memory's momentum. ``None`` rounds nothing: states are float32, or
            float64 for a float64 model. CPU kernels read float32 only; PyTorch serves 16-bit states there.

    Raises:
        ArgumentError: if a number is negative, or ``state_dtype`` is not one of these.

    Examples:
        >>> from mctune import MemoryCaching
        >>> layer, cache = MemoryCaching(64, segment_length=32, layer_idx=0), MemoryCache()
        >>> with torch.no_grad():
        ...     _ = layer(torch.randn(2, 40, 64), past_key_values=cache)  # the prompt
        ...     hidden, _, _ = layer(torch.randn(2, 1, 64), past_key_values=cache)  # the next token
        >>> hidden.shape, cache.lengths
        (torch.Size([2, 1, 64]), tensor([41, 41]))
    """

    def __init__(self, max_states: int | None = None, rewind: int = 0, state_dtype: torch.dtype | None = None) -> None:
        if max_states is not None:
            whole("max_states", max_states, 0, "; None keeps all states")
        whole("rewind", rewind, 0)
        if state_dtype is not None and not (isinstance(state_dtype, torch.dtype) and state_dtype in STATE_DTYPES):
            given = state_dtype if isinstance(state_dtype, torch.dtype) else shown(state_dtype)
            raise ArgumentError(
                f"state_dtype={given} is not one of {', '.join(map(str, STATE_DTYPES))}; None keeps what "
                "states are computed in, float32 unless the model is float64"
            )
        self.max_states, self.rewind, self.state_dtype = max_states, rewind, state_dtype
        self._layers: dict[int, _Layer] = {}
        self._convolutions: dict[int, Convolution] = {}

    def __len__(self) -> int:
        """Layers that hold something."""
        return len(self._layers)

    def layer(self, layer_idx: int) -> LayerMemory | None:
        """The memory of a layer; ``None`` before its first call."""
        layer = self._layers.get(layer_idx)
        return None if layer is None else layer.memory

    def extend(self, call: Call, layer_idx: int, backend: str = "auto", owner: object | None = None) -> Tensor:
        """Write and read the tokens of a checked call, as :func:`memory_caching` would with all tokens before them.

        Args:
            call: into an empty layer, B sequences, or those of a packed row, each of which becomes a row of the cache;
                after that, the next tokens of every row, without ``cu_seqlens``.
            layer_idx: whose memory.
            backend: as in :func:`memory_caching`.
            owner: the layer that calls, so that another one with the same index is noticed.

        Returns:
            y, [B, n, H, Dv], in the dtype of q.

        Raises:
            ArgumentError: if the call contradicts the memory, or the segmentation is logarithmic.
            BackendError: if the backend asked for by name cannot serve the call.
        """
        layer = self._layers.get(layer_idx)
        if layer is None:
            y: Tensor
            y, layer = self._begin(call, backend)
            self._layers[layer_idx] = layer
            layer.owner = None if owner is None else ref(owner)
            return y
        if owner is not None:
            _check_owner(layer, layer_idx, owner)
        layer.memory = layer.memory.writable()
        if call.cu_seqlens is not None:
            raise ArgumentError(
                f"cu_seqlens on a cache that holds {layer.memory.rows} sequences: only a prompt can be packed; pass "
                f"their next tokens as [B={layer.memory.rows}, n, ...] without cu_seqlens"
            )
        return _go_on(call, layer, backend)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin(self, call: Call, backend: str) -> tuple[Tensor, _Layer]:
        if call.cu_seqlens is not None:
            check_bounds(call.q.shape[1], call.cu_seqlens)
        if self.rewind == 0 or call.segmentation == "logarithmic":
            y, memory = prefill(call, backend, self.max_states, self.state_dtype)
            return y, _Layer(memory, None)
        # The newest tokens are written one snapshot later, so that they can be taken back.
        lengths = sequence_lengths(call)
        heads = [max(0, length - self.rewind) for length in lengths]
        outputs = []
        if max(heads) > 0:
            head = between(call, [0] * len(heads), heads)
            y, memory = prefill(head, backend, self.max_states, self.state_dtype)
            outputs.append(y)
        else:
            memory = LayerMemory.empty(call, len(heads), self.max_states, self.state_dtype)
        rest = between(call, heads, lengths)
        y, history = extend_prompt(rest, memory, self.rewind, backend)
        outputs.append(y)
        stops = [heads, lengths] if len(outputs) == 2 else [lengths]
        return joined(call, outputs, stops), _Layer(memory, history)

    def conv_state(self, layer_idx: int) -> tuple[Tensor, ...] | None:
        """What :meth:`set_conv_state` was given last, less what has been cropped; ``None`` if there is nothing."""
        kept = self._convolutions.get(layer_idx)
        return None if kept is None else kept.inputs

    def set_conv_state(self, layer_idx: int, inputs: tuple[Tensor, ...], spare: int = 0) -> None:
        """Keep the newest inputs of a layer's short convolutions for its next call.

        Args:
            layer_idx: whose.
            inputs: [B, K, width] each, the newest last; before a sequence's first token, zeros.
            spare: how many of the K, the oldest, the next call does not need: :meth:`crop` can go back by that many
                tokens. A layer keeps :attr:`rewind` of them.
        """
        before, floor = self._convolutions.get(layer_idx), (self._layers[layer_idx].memory.lengths - spare).clamp(min=0)
        if before is not None:
            floor = torch.maximum(floor, before.floor)
        self._convolutions[layer_idx] = Convolution(inputs, spare, floor)

    @property
    def lengths(self) -> Tensor:
        """int64 [B] on the CPU: tokens of each sequence; [0] while the cache is empty."""
        for layer in self._layers.values():
            return layer.memory.lengths
        return torch.zeros(0, dtype=torch.int64, device="cpu")

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the longest sequence in a layer; 0 before its first call."""
        memory = self.layer(layer_idx)
        return 0 if memory is None else int(memory.lengths.max())

    def reserve(self, tokens: int) -> None:
        """Make room for the states that ``tokens`` more tokens of every sequence add, in every layer in use.

        Without it a memory grows by itself, except in a graph of ``torch.compile``, which needs the room beforehand.
        """
        whole("tokens", tokens, 0)
        for layer in self._layers.values():
            layer.memory = layer.memory.writable()
            layer.memory.reserve(tokens)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was (beam search); ``beam_idx`` is an integer tensor, [B]."""
        self._select("beam_idx", beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order; a row may be kept several times. ``indices`` is an integer tensor, [rows]."""
        self._select("indices", indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times, copies side by side."""
        positive("repeats", repeats)
        self._map(lambda x: x.repeat_interleave(repeats, 0))

    def _select(self, name: str, indices: Tensor) -> None:
        check_rows(name, indices, next((layer.memory.rows for layer in self._layers.values()), None))
        self._map(lambda x: x.index_select(0, indices.to(x.device, torch.int64)))

    def _map(self, rowwise: Callable[[Tensor], Tensor]) -> None:
        for layer in self._layers.values():
            rows = layer.memory.rows
            layer.memory = layer.memory.map(rowwise)
            if layer.history is not None:
                layer.history = layer.history.map(rowwise, rows)
        for kept in self._convolutions.values():
            kept.inputs, kept.floor = tuple(rowwise(x) for x in kept.inputs), rowwise(kept.floor)

    def crop(self, max_length: int) -> None:
        """Keep only the first ``max_length`` tokens of each sequence; if it is negative, drop that many newest ones.

        The cache becomes what it would be had those tokens never been written, with one exception: beyond the
        reach of ``rewind``, under ``checkpoint``, a segment goes on from a cached state and keeps the rounding that
        ``state_dtype`` gave it. All layers are cropped, or none.

        Raises:
            ArgumentError: if the place cannot be restored: the message names those that can, and what to do.

        Examples:
            >>> from mctune import MemoryCaching
            >>> layer, cache = MemoryCaching(64, segment_length=32, layer_idx=0), MemoryCache(rewind=8)
            >>> _ = layer(torch.randn(1, 40, 64), past_key_values=cache)
            >>> cache.crop(-5)  # takes the newest 5 tokens back
            >>> cache.lengths
            tensor([35])
        """
        if not isinstance(max_length, int) or isinstance(max_length, bool):
            raise ArgumentError(
                f"max_length={shown(max_length)}: must be an integer; a negative one drops newest tokens"
            )
        if not self._layers:
            return
        lengths = self.lengths
        check_alike({index: layer.memory for index, layer in self._layers.items()})
        max_length = max(-LARGEST, min(max_length, LARGEST))
        targets = (lengths + max_length).clamp(min=0) if max_length < 0 else lengths.clamp(max=max_length)
        if bool((targets == lengths).all()):
            return
        if not bool(targets.any()):
            self.reset()
            return
        removed = lengths - targets
        for kept in self._convolutions.values():
            check_convolution(kept, lengths, removed, self.rewind)
        for layer in self._layers.values():
            check_crop(layer.memory, layer.history, targets)
        for layer in self._layers.values():
            layer.memory = layer.memory.writable()
            layer.history = crop_layer(layer.memory, layer.history, targets)
        for kept in self._convolutions.values():
            crop_convolution(kept, removed)

    def reset(self) -> None:
        """Forget everything: the next call of each layer is a prompt."""
        self._layers.clear()
        self._convolutions.clear()

    def to(self, device: torch.device | str) -> MemoryCache:
        """Move to a device, in place; returns itself. Counts stay on the CPU.

        Raises:
            ArgumentError: if torch knows no such device.
        """
        try:
            device = torch.device(device)
        except (TypeError, RuntimeError, ValueError) as error:
            raise ArgumentError(f"device={shown(device)} is no device of torch") from error

        def move(x: Tensor) -> Tensor:
            return x if x.dtype in (torch.int32, torch.int64) else x.to(device)

        for layer in self._layers.values():
            rows = layer.memory.rows
            layer.memory = layer.memory.to(device)
            if layer.history is not None:
                layer.history = layer.history.map(move, rows)
        for kept in self._convolutions.values():
            kept.inputs = tuple(move(x) for x in kept.inputs)
        return self

    @property
    def nbytes(self) -> int:
        """Bytes in use: states and mean keys so far, what the segments under way need, inputs of convolutions."""
        unused = 0
        for layer in self._layers.values():
            memory = layer.memory
            free = memory.rows * memory.capacity - int(memory.cached.sum())
            unused += sum(x[0, :, 0].nbytes * free for x in (*memory.states, memory.descriptors))
        held = sum(x.nbytes for layer in self._layers.values() for _, x in layer.memory.stores())
        return held - unused + sum(x.nbytes for kept in self._convolutions.values() for x in kept.inputs)

    @property
    def reserved_bytes(self) -> int:
        """Bytes held: :attr:`nbytes`, room for states to come, and what ``rewind`` keeps."""
        held = sum(x.nbytes for layer in self._layers.values() for _, x in layer.memory.stores())
        held += sum(layer.history.nbytes for layer in self._layers.values() if layer.history is not None)
        return held + sum(x.nbytes for kept in self._convolutions.values() for x in kept.inputs)

    def save(self, path: str | Path) -> None:
        """Write the cache to a safetensors file. What ``rewind`` keeps is left out.

        Args:
            path: of the file, which is overwritten.

        Raises:
            ArgumentError: without the safetensors package.
        """
        layers = {index: layer.memory for index, layer in self._layers.items()}
        convolutions = {index: in_common(kept, layers[index].lengths) for index, kept in self._convolutions.items()}
        write_layers(Path(path), layers, convolutions, self.max_states, self.rewind, self.state_dtype)

    @classmethod
    def load(cls, path: str | Path) -> MemoryCache:
        """The cache that :meth:`save` wrote, on the CPU; tokens from before it cannot be taken back one by one.

        Args:
            path: of the file.

        Raises:
            ArgumentError: without the safetensors package, or if the file holds something else.
        """
        layers, convolutions, max_states, rewind, state_dtype = read_layers(Path(path))
        cache = cls(max_states, rewind, state_dtype)
        for index, memory in layers.items():
            history = History(rewind) if rewind else None
            if history is not None:
                history.restart(memory)
            cache._layers[index] = _Layer(memory, history)
        for index, (inputs, spare) in convolutions.items():
            cache.set_conv_state(index, inputs, spare)
        return cache


def _check_owner(layer: _Layer, layer_idx: int, owner: object) -> None:
    """The first layer that calls is the one; what was not known, or is gone, is the layer that calls now."""
    known = None if layer.owner is None else layer.owner()
    if known is None:
        if not torch.compiler.is_compiling():
            layer.owner = ref(owner)
    elif known is not owner:
        raise ArgumentError(
            f"layer_idx={layer_idx} of the cache belongs to another layer: give every layer of a model its own "
            "layer_idx=0, 1, ...; to go on with another model's layer, pass copy.deepcopy(cache)"
        )


def _go_on(call: Call, layer: _Layer, backend: str) -> Tensor:
    if layer.history is None:
        return extend(call, layer.memory, backend)
    y: Tensor = extend_recorded(call, layer.memory, layer.history, backend)
    return y
