"""From the uint8 arrays of images to what the vision towers take."""

from __future__ import annotations

import torch

from siglip.config import ImageSpec


class InputLayer:
    """Normalises images on the device, with the checkpoint's mean and standard deviation of the colours.

    Called with uint8 (B, *spec.shape) and a dtype, it returns the arguments of the vision tower: pixels (B, 3, S, S)
    or, for a NaFlex model, patches (B, T, 3 * P * P) and grids, int32 (B, 2).
    """

    def __init__(self, spec: ImageSpec, device: torch.device) -> None:
        self._patches = spec.patches
        mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
        # (pixel / 255 - mean) / std as one multiply and one add.
        gain, offset = 1 / (255 * std), -mean / std
        if spec.patches is None:
            gain, offset = gain.view(1, 3, 1, 1), offset.view(1, 3, 1, 1)
        else:  # the samples of a patch are in the order of its pixels
            gain, offset = gain.repeat(spec.patches.size**2), offset.repeat(spec.patches.size**2)
        self._gain, self._offset = gain.to(device), offset.to(device)

    def __call__(self, images: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        if self._patches is None:
            return ((images.permute(0, 3, 1, 2).float() * self._gain + self._offset).to(dtype),)
        patches = (images[:, :-1].float() * self._gain + self._offset).to(dtype)
        low, high = images[:, -1, 0:4:2].int(), images[:, -1, 1:4:2].int()
        return patches, 1 + low + 256 * high  # see `siglip.images.patches.pack_patches`
