"""Everything that this package uses of torch's private interface, with the reason for each.

`tests/quick/siglip/test_internals.py` fails with a clear message when a version of torch no longer has one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

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
