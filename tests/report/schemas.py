"""What the published schemas of the exchange formats demand, written down from them; JSON Schema, 2020-12.

T4: odgaard/TuningSchema (branch T4, results-schema.json, 1.0.0), as kernel_tuner carries it, and the later one of
AutoTuningAssociation/autotuning_methodology (schemas/T4.json), which also confines ``correctness``, the units and the
API. T1: odgaard/TuningSchema (TuningSchema.json), as kernel_tuner carries it; and as it once was in its own repository,
where a device needs an ``Id``.
"""

from __future__ import annotations

from typing import Any

TEXT, NUMBER, FLAG, INTEGER = ({"type": name} for name in ("string", "number", "boolean", "integer"))


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _object(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": properties}


_TIMES = (
    "compilation_time",
    "framework",
    "search_algorithm",
    "validation",
    "data",
    "kernel_overhead",
    "profiling_runs",
    "profiling_overhead",
)
_COUNTER = {"enum": ["Int", "UnsignedInt", "Double", "Percent", "Throughput", "UtilizationLevel"]}
_RESULT = _object(
    ("configuration", "times", "invalidity", "correctness"),
    timestamp=TEXT,
    configuration={"type": "object"},
    objectives=_list(TEXT),
    times=_object(runtimes=_list(NUMBER), **{name: NUMBER for name in _TIMES}),
    invalidity={"enum": ["timeout", "compile", "runtime", "correctness", "constraints", "correct"]},
    correctness={"type": "number", "enum": [0, 1]},
    measurements=_list(_object(name=TEXT, value={"type": ["number", "string", "array"]}, unit=TEXT, type=_COUNTER)),
)
T4 = _object(
    schema_version={"type": "string", "pattern": r"^[0-9]{1,}\.[0-9]{1,}\.[0-9]{1,}$"},
    metadata=_object(
        compute_api={"enum": ["OpenCL", "CUDA", "Vulkan"]},
        platform=TEXT,
        device=TEXT,
        autotuner=TEXT,
        autotuner_version=TEXT,
        timestamp=TEXT,
        timeunit={"enum": ["nanoseconds", "microseconds", "milliseconds", "seconds"]},
    ),
    results=_list(_RESULT),
)

_API = {"enum": ["OpenCL", "CUDA", "Vulkan"]}
_SIZE = _object(("X",), X=TEXT, Y=TEXT, Z=TEXT)
T1 = _object(
    ("ConfigurationSpace", "KernelSpecification"),
    ConfigurationSpace=_object(
        ("TuningParameters",),
        TuningParameters=_list(
            _object(
                ("Name", "Type", "Values"),
                Name=TEXT,
                Type={"enum": ["int", "uint", "float", "bool", "string"]},
                Values=TEXT,
            )
        ),
        Conditions=_list(_object(("Parameters", "Expression"), Parameters=_list(TEXT), Expression=TEXT)),
    ),
    General=_object(
        FormatVersion=INTEGER,
        LoggingLevel={"enum": ["Off", "Error", "Warning", "Info", "Debug"]},
        TimeUnit={"enum": ["Nanoseconds", "Microseconds", "Milliseconds", "Seconds"]},
        OutputFile=TEXT,
        OutputFormat={"enum": ["JSON", "XML"]},
    ),
    KernelSpecification=_object(
        ("Language", "KernelName", "KernelFile", "GlobalSize", "LocalSize"),
        Device=_object(PlatformId=INTEGER, DeviceId=INTEGER, Name=TEXT),
        Language=_API,
        CompilerOptions=_list(TEXT),
        Profiling=FLAG,
        KernelName=TEXT,
        KernelFile=TEXT,
        GlobalSizeType=_API,
        SharedMemory=INTEGER,
        SimulationInput=TEXT,
        GlobalSize=_SIZE,
        LocalSize=_SIZE,
    ),
)
T1_WITH_IDS = {"allOf": [T1, _object(KernelSpecification=_object(Device=_object(("Id",), Id=INTEGER, Name=TEXT)))]}

# What flash-linear-attention's runner writes (benchmarks/ops/run.py) and its comparison reads; it has no schema.
_RESULT_OF_FLA = _object(
    ("op", "mode", "B", "T", "H", "D", "median_ms", "p20_ms", "p80_ms"),
    op=TEXT,
    mode={"enum": ["fwd", "fwdbwd"]},
    **{name: INTEGER for name in "BTHD"},
    median_ms=NUMBER,
    # Null, which the comparison does not read, where the median alone is known.
    p20_ms={"type": ["number", "null"]},
    p80_ms={"type": ["number", "null"]},
)
_MACHINE = {name: TEXT for name in ("hostname", "platform", "pytorch_version", "cuda_version", "triton_version")}
_MACHINE |= {"gpu_name": TEXT, "gpu_count": INTEGER, "gpu_memory_gb": NUMBER}
FLA = _object(
    ("machine_info", "results"), machine_info=_object(tuple(_MACHINE), **_MACHINE), results=_list(_RESULT_OF_FLA)
)
