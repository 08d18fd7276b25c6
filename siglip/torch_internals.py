"""Everything that this package uses of torch's private interface, with the reason for each.

`tests/quick/siglip/test_internals.py` fails with a clear message when a version of torch no longer has one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from itertools import count
from types import FunctionType, MethodType

import torch

ResizeOperator = Callable[..., torch.Tensor]
"""Called with the input (1, 3, H, W), the output's [height, width], align_corners, and `out`. It resizes into `out`."""

RESIZE_BILINEAR: ResizeOperator = torch.ops.aten._upsample_bilinear2d_aa.out
RESIZE_BICUBIC: ResizeOperator = torch.ops.aten._upsample_bicubic2d_aa.out
"""Resizing with antialiasing, by fast uint8 kernels.

These operators are behind `torch.nn.functional.interpolate`. That function returns separate colour planes for
interleaved input; separating the colours and interleaving them again takes as long as the resize itself. The operators
can write into interleaved memory.
"""


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 matrix products. torch has no public function for it."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def freeze_weights(frozen: bool) -> AbstractContextManager[None]:
    """A context in which `torch.compile` treats weights as constants, if `frozen`, and else does not.

    Freezing packs the weights once into the layout that the CPU's matrix kernels want. The setting exists only in
    torch's inductor backend. It belongs to the thread, so it must be made where the compilation runs.
    """
    from torch._inductor import config  # half a second: not for models that are not compiled

    context: AbstractContextManager[None] = config.patch(freezing=frozen)
    return context


def has_vnni() -> bool:
    """Whether this CPU multiplies int8 with AVX-512 VNNI instructions. torch has no public function for it.

    Without them, oneDNN adds products of uint8 and int8 in 16 bits, which overflow without a word. Whether it uses them
    is another question: see `multiplies_int8_exactly`.
    """
    return bool(torch.cpu._is_vnni_supported())


@cache
def multiplies_int8_exactly() -> bool:
    """Whether sums of the largest products of uint8 and int8 are right in this process.

    They are not if oneDNN is kept from using VNNI, as ONEDNN_MAX_CPU_ISA does: it then adds two products in 16 bits,
    and such sums are half of what they should be. A model's own images may show little of that.
    """
    with torch.inference_mode():
        rows = torch.full((1, 64), 255, dtype=torch.uint8)
        packed = pack_int8(torch.full((16, 64), 127, dtype=torch.int8))
        found = multiply_int8(rows, packed, torch.ones(16), torch.zeros(16), torch.float32)
    return bool((found == 64 * 255 * 127).all())


@torch.library.custom_op("sightline::pack_int8", mutates_args=())
def pack_int8(weight: torch.Tensor) -> torch.Tensor:
    """Pack weights, int8 (N, K), into the layout of oneDNN's kernels: a tensor (K, N) that only `multiply_int8` reads.

    torch's own operator cannot be traced by torch.compile, which is why it is wrapped in one that says what its result
    looks like. torch.compile calls it once, when it freezes the weights.
    """
    packed: torch.Tensor = torch.ops.onednn.qlinear_prepack(weight, None)
    return packed


@pack_int8.register_fake
def _describe_packed(weight: torch.Tensor) -> torch.Tensor:
    return weight.new_empty(weight.shape[1], weight.shape[0])


def multiply_int8(
    rows: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Multiply `rows`, uint8 (M, K), by packed weights, add in int32, and return `scale * sum + shift` as `dtype`.

    `scale` and `shift` are float32 (N,), the result is (M, N). torch has no public function for it: `torch._int_mm`
    multiplies int8 by int8, which torch.compile turns into this operator with int8 rows, for which oneDNN has only a
    reference implementation. It took 1,700 times as long.
    """
    # The third and the sixth argument are the zero points of the rows and of the weights, the eighth and ninth the
    # scale and the zero point of the result; the last three are an operation on the result.
    zeros = torch.zeros_like(scale, dtype=torch.int32)
    product: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
        rows, 1.0, 0, packed, scale, zeros, shift, 1.0, 0, dtype, "none", [], ""
    )
    return product


class CompiledBySize:
    """A method, compiled by torch.compile once for each number of rows that it is called with.

    torch keeps the graphs of a function with the function's code, and looks for the right one by their guards. With
    torch 2.13 that goes wrong if two threads look at the same time and there are several: now and then it finds none,
    and compiles a graph once more in the middle of the work, without `freeze_weights`. So each graph has code of its
    own here, which is the same code under another name. Two encoders in one process do not share graphs either.

    The first call with a number of rows must not be made by two threads at the same time.
    """

    _made = count()

    def __init__(self, method: Callable[[torch.Tensor], torch.Tensor]) -> None:
        assert isinstance(method, MethodType)
        self._method = method
        self._graphs: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {}

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        graph = self._graphs.get(len(rows))
        if graph is None:
            graph = self._graphs[len(rows)] = torch.compile(self._copy(), dynamic=False)
        return graph(rows)

    def _copy(self) -> MethodType:
        function = self._method.__func__
        name = f"{function.__name__}_{next(self._made)}"
        code = function.__code__.replace(co_name=name)
        copy = FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
        return MethodType(copy, self._method.__self__)
