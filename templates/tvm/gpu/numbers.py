"""Numbers of 16 and of 32 bits, as memory holds them and as kernels compute with them: float32."""

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

# Conversions are the PTX instructions' own: rounding is to the nearest, ties to even.
_LOAD = {
    "float16": 'float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x)); return y;',
    "bfloat16": "return __uint_as_float((unsigned int)x << 16);",
}
_ROUND = {
    "float16": 'unsigned short y; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y;',
    "bfloat16": 'unsigned short y; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y;',
}


@dataclass(frozen=True)
class Number:
    """One dtype of q, k, v, u.

    Args:
        dtype: ``float16``, ``bfloat16`` or ``float32``.
    """

    dtype: str

    @property
    def wide(self) -> bool:
        """Whether it has 32 bits."""
        return self.dtype == "float32"

    @property
    def stored(self) -> str:
        """The type of the bits in memory."""
        return "float32" if self.wide else "uint16"

    @property
    def size(self) -> int:
        """Bytes."""
        return 4 if self.wide else 2

    @property
    def lanes(self) -> int:
        """Numbers of a 16-byte access."""
        return 16 // self.size

    def load(self, bits: Any) -> Any:
        """float32 from what memory holds."""
        if self.wide:
            return bits
        name = f"load_{self.dtype}"
        code = f"__forceinline__ __device__ float {name}(unsigned short x) {{ {_LOAD[self.dtype]} }}\n"
        return T.cuda.func_call(name, bits, source_code=code, return_type="float32")

    def round(self, value: Any) -> Any:
        """What memory holds, from float32."""
        if self.wide:
            return value
        name = f"round_{self.dtype}"
        code = f"__forceinline__ __device__ unsigned short {name}(float x) {{ {_ROUND[self.dtype]} }}\n"
        return T.cuda.func_call(name, value, source_code=code, return_type="uint16")

    def pair(self, low: Any, high: Any) -> Any:
        """Two of 16 bits in a word, the first in its low half."""
        return T.cast(self.round(low), "uint32") | (T.cast(self.round(high), "uint32") << T.uint32(16))

    def halves(self, word: Any) -> tuple[Any, Any]:
        """The two of a word, as float32."""
        return (
            self.load(T.cast(word & T.uint32(0xFFFF), "uint16")),
            self.load(T.cast(word >> T.uint32(16), "uint16")),
        )
