"""NumPy arrays as torch tensors in the same memory."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray


def view_as_tensor(array: NDArray[np.uint8]) -> torch.Tensor:
    """A tensor in the memory of `array`, which may be read-only. The caller must not write to a read-only array's.

    `torch.from_numpy` warns about read-only arrays. Suppressing a warning changes the state of the whole process, which
    is not safe in threads. So a read-only array is wrapped in one that claims to be writable.
    """
    return torch.from_numpy(array if array.flags.writeable else np.asarray(_WritableClaim(array)))


class _WritableClaim:
    """NumPy's array interface of an array, without the read-only flag. Keeps the array alive."""

    def __init__(self, array: NDArray[np.uint8]) -> None:
        self._array = array
        interface = array.__array_interface__
        address, _ = interface["data"]
        self.__array_interface__ = {**interface, "data": (address, False)}
