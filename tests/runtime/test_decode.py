"""A step over a memory against the oracle's forward over the whole sequence, by pieces of every size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from calls import GATES, arguments, make_call
from tables import DLA, LINEAR, TITANS, Table, checked, decode_table, draw, problem_id

from mctune.core.problem import Problem
from mctune.reference import memory_caching as oracle
from mctune.runtime.api.step import memory_caching_step
from mctune.runtime.call import Call
from mctune.runtime.errors import ArgumentError, BackendError
from mctune.runtime.kernels import dispatch
from mctune.runtime.memory import LayerMemory
from mctune.runtime.ops.step import _operator, extend, tokens
from mctune.runtime.traits import AGGREGATIONS, STATE_INITS
from mctune.verify.judge import poisoned_memory

T, C, B = 17, 5, 2
SPLITS = ((1,) * T, (4, 1, 6, 1, 5), (5, 5, 5, 2), (T,), (3, 12, 2))


def call_of(x: dict[str, torch.Tensor], **options: Any) -> Call:
    """The checked call on all tokens of ``x``."""
    return make_call(**({"segment_length": C, "top_k": 1, "inner_chunk": 3} | x | options))


def stepped(call: Call, memory: LayerMemory, sizes: tuple[int, ...], backend: str = "eager") -> torch.Tensor:
    """The outputs of consecutive steps of these sizes."""
    outputs, begin = [], 0
    for size in sizes:
        outputs.append(extend(tokens(call, begin, begin + size), memory, backend))
        begin += size
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("state_init", STATE_INITS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("recurrence", GATES)
def test_steps_are_the_forward(recurrence: str, aggregation: str, state_init: str) -> None:
    x = arguments(recurrence, B=B, T=T, dtype=torch.float64)
    options = {"recurrence": recurrence, "aggregation": aggregation, "state_init": state_init}
    wanted = oracle(**x, **options, segment_length=C, top_k=1, inner_chunk=3)
    call = call_of(x, **options)
    for sizes in SPLITS:
        with poisoned_memory():
            y = stepped(call, LayerMemory.empty(call, B), sizes)
        torch.testing.assert_close(y, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_inputs_keep_float32_states(dtype: torch.dtype) -> None:
    x = arguments("swla", B=B, T=T, dtype=dtype)
    call = call_of(x, recurrence="swla", aggregation="grm")
    memory = LayerMemory.empty(call, B)
    y = stepped(call, memory, SPLITS[1])
    assert y.dtype == dtype and {t.dtype for _, t in memory.stores()} == {torch.float32, torch.int32}
    wanted = oracle(**x, recurrence="swla", aggregation="grm", segment_length=C)
    torch.testing.assert_close(y.double(), wanted, rtol=2e-2, atol=1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("aggregation", ["grm", "ssc", "mean"])
@pytest.mark.parametrize("recurrence", ["linear", "dla"])
def test_sequences_at_different_places(recurrence: str, aggregation: str) -> None:
    x = arguments(recurrence, B=1, T=T, dtype=torch.float64)
    call = call_of(x, recurrence=recurrence, aggregation=aggregation)
    early, late = LayerMemory.empty(call, 1), LayerMemory.empty(call, 1)
    stepped(call, early, (2,))
    stepped(call, late, (11,))
    both = early.map(lambda e: torch.cat([e, e]))
    for name, store in late.stores():
        if not name.startswith("initial"):
            dict(both.stores())[name][1:] = store
    pair = call_of(
        {n: t if n.startswith("W") else torch.cat([t[:, 2:8], t[:, 11:17]]) for n, t in x.items()},
        recurrence=recurrence,
        aggregation=aggregation,
    )
    wanted = oracle(**x, recurrence=recurrence, aggregation=aggregation, segment_length=C, top_k=1, inner_chunk=3)
    for sizes in ((1,) * 6, (6,), (4, 2)):
        copy = both.map(torch.clone)
        y = stepped(pair, copy, sizes)
        torch.testing.assert_close(y, torch.cat([wanted[:, 2:8], wanted[:, 11:17]]), rtol=1e-9, atol=1e-9)
        assert copy.lengths.tolist() == [8, 17]


@pytest.mark.parametrize("state_init", STATE_INITS)
@pytest.mark.parametrize("bound", [0, 1, 2])
def test_a_bound_drops_the_oldest(bound: int, state_init: str) -> None:
    x = arguments("linear", B=B, T=T, dtype=torch.float64)
    call = call_of(x, recurrence="linear", aggregation="grm", state_init=state_init)
    ways = [stepped(call, LayerMemory.empty(call, B, bound), sizes) for sizes in SPLITS]
    for y in ways[1:]:
        torch.testing.assert_close(y, ways[0], rtol=1e-9, atol=1e-9)
    if state_init == "independent":
        # A segment that sees only ``bound`` others is the last one of a sequence that starts with them.
        for begin in range(0, T, C):
            seen = {n: t[:, max(0, begin - bound * C) : begin + C] for n, t in x.items()}
            wanted = oracle(**seen, aggregation="grm", segment_length=C)[:, -(min(begin + C, T) - begin) :]
            torch.testing.assert_close(ways[0][:, begin : begin + C], wanted, rtol=1e-9, atol=1e-9)


def test_steps_within_capacity_copy_nothing() -> None:
    call = call_of(arguments("titans", B=B, T=T), recurrence="titans", aggregation="grm")
    memory = LayerMemory.empty(call, B)
    places = {name: store.data_ptr() for name, store in memory.stores()}
    stepped(call, memory, (1,) * T)
    assert {name: store.data_ptr() for name, store in memory.stores()} == places
    memory.reserve(40)
    assert memory.states[0].data_ptr() != places["states.0"] and memory.capacity == 11


def test_operator_keeps_its_schema() -> None:
    call = call_of(arguments("swla", B=B, T=4), recurrence="swla", aggregation="ssc")
    memory = LayerMemory.empty(call, B)
    stepped(call, memory, (4,))
    inputs = (call.q, call.k, call.v, call.u, call.g, call.beta, call.lam, None, None, None, None)
    stores = (memory.states, memory.descriptors, memory.online, memory.key_sum, memory.last_key, memory.last_value)
    stores = (*(list(s) if isinstance(s, tuple) else s for s in stores), [], [], memory.cached, memory.filled)
    options = ("swla", "ssc", C, "independent", 1, 0.5, True, 3, "eager")
    torch.library.opcheck(_operator, (*inputs, *stores, *options), test_utils=("test_schema", "test_faketensor"))


def test_compiled_steps() -> None:
    x = arguments("linear", B=B, T=T)
    call = call_of(x, recurrence="linear", aggregation="grm")
    memory = LayerMemory.empty(call, B)
    memory.reserve(T)

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return memory_caching_step(q, k, v, u, memory=memory, segment_length=C, backend="eager")

    run = torch.compile(step, backend="aot_eager", fullgraph=True)
    y = torch.cat([run(*(x[name][:, t : t + 1] for name in ("q", "k", "v", "u"))) for t in range(T)], 1)
    wanted = oracle(**x, segment_length=C)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=1e-5)
    memory.filled.fill_(C - 1)
    memory.cached.fill_(memory.capacity)
    with pytest.raises(ArgumentError, match=r"room for 5 states.*memory.reserve"):
        run(*(x[name][:, :1] for name in ("q", "k", "v", "u")))


def test_there_is_no_backward() -> None:
    x = arguments("linear", B=1, T=3)
    call = call_of(x | {"k": x["k"].requires_grad_()}, recurrence="linear", aggregation="grm")
    y = extend(call, LayerMemory.empty(call, 1), "eager")
    with pytest.raises(RuntimeError):
        y.sum().backward()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segment_length": 4}, "segment_length=4 on a memory written with 5: start with an empty memory"),
        ({"state_init": "checkpoint"}, "state_init='checkpoint' on a memory written with 'independent'"),
        ({"recurrence": "swla"}, "recurrence='swla' on a memory written with 'linear'"),
    ],
)
def test_other_rules_are_refused(changes: dict[str, Any], message: str) -> None:
    x = arguments("linear", B=1, T=3)
    memory = LayerMemory.empty(call_of(x, recurrence="linear", aggregation="grm"), 1)
    with pytest.raises(ArgumentError, match=message):
        extend(call_of(x, **({"recurrence": "linear", "aggregation": "grm"} | changes)), memory, "eager")


def test_other_shapes_and_backends_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "TABLE", Table())
    options = {"recurrence": "linear", "aggregation": "grm"}
    memory = LayerMemory.empty(call_of(arguments("linear", B=2), **options), 2)
    one = call_of(arguments("linear", B=1), **options)
    with pytest.raises(ArgumentError, match=r"\[1, 2, 4, 4\] on a memory of \[2, 2, 4, 4\]"):
        extend(one, memory, "eager")
    with pytest.raises(BackendError, match="no tuned kernels"):
        extend(one, LayerMemory.empty(one, 1), "tvm")
    with pytest.raises(ArgumentError, match="backend='cuda' is not one of auto, eager, tvm, triton"):
        memory_caching_step(one.q, one.k, one.v, memory=memory, backend="cuda")
    with pytest.raises(ArgumentError, match=r"memory is a dict; it must be a LayerMemory, a layer of a .*cache.layer"):
        memory_caching_step(one.q, one.k, one.v, memory={})  # type: ignore[arg-type]
    elsewhere = type("LayerMemory", (), {"__module__": "mctune_cpu.runtime.memory"})()
    with pytest.raises(ArgumentError, match="memory is a LayerMemory of mctune_cpu, and this is mctune: take both"):
        memory_caching_step(one.q, one.k, one.v, memory=elsewhere)


@pytest.mark.parametrize("problem", (LINEAR, DLA, TITANS), ids=problem_id)
def test_a_tuned_kernel_takes_the_steps(problem: Problem, kernel_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "TABLE", decode_table(kernel_folder, problem))
    leaves, options = draw(problem.replace(T=43))
    call, wanted = checked(leaves, options), oracle(**leaves, **options)
    for sizes in ((1,) * 20, (7, 13)):
        memory = LayerMemory.empty(call, problem.B)
        y = stepped(call, memory, (23, *sizes), "tvm")
        torch.testing.assert_close(y.double(), wanted, rtol=1e-3, atol=1e-3)
        eager = LayerMemory.empty(call, problem.B)
        stepped(call, eager, (23, *sizes), "eager")
        for (name, store), (_, other) in zip(memory.stores(), eager.stores(), strict=True):
            # Of a matrix memory, kernels leave alone what its recurrence has no use for.
            if not name.startswith("last_"):
                torch.testing.assert_close(store, other, rtol=1e-3, atol=1e-3, msg=name)


def test_compiled_steps_of_a_deep_memory(kernel_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator writes all stores of the memory in place, on a kernel too."""
    monkeypatch.setattr(dispatch, "TABLE", decode_table(kernel_folder, TITANS))
    leaves, options = draw(TITANS)
    call, T = checked(leaves, options), TITANS.T
    steps = {name: x for name, x in options.items() if name not in ("segmentation", "cu_seqlens")}
    weights = {name: x for name, x in leaves.items() if name.startswith("W_")}
    rows, results = {name: x for name, x in leaves.items() if name not in weights}, []
    for backend in ("tvm", "eager"):
        memory = LayerMemory.empty(call, TITANS.B)
        memory.reserve(T)

        def step(memory: LayerMemory = memory, backend: str = backend, **x: torch.Tensor) -> torch.Tensor:
            return memory_caching_step(**x, **weights, memory=memory, **steps, backend=backend)

        run = torch.compile(step, backend="aot_eager", fullgraph=True)
        y = torch.cat([run(**{name: x[:, t : t + 1] for name, x in rows.items()}) for t in range(T)], 1)
        results.append((y, dict(memory.stores())))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[0][0].double(), oracle(**leaves, **options), rtol=1e-4, atol=1e-5)
