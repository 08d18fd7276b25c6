"""Matrix products in int8, for CPUs with AVX-512 VNNI: the linear layers in the transformer of a vision tower.

Weights are quantized once, symmetrically, with a scale for each output channel. Activations are quantized while the
model runs, symmetrically, with a scale for each token. One scale for a whole batch would be cheaper, but an image's
embedding would then depend on the other images of its batch. Sums are exact, in int32.

The six products of each layer are 93 % of the base model's operations. The rest stays in bfloat16 or float32: patch
embedding, normalisation, softmax, residual sums, and the pooling head.

This does not protect a model in which a few channels are much larger than the others. Such a channel takes the whole
range of a token's scale, and the others are rounded to little or nothing. Such a model is refused by its cosines with
the embeddings of bfloat16: see `siglip.checkpoints.fidelity`.
"""

from __future__ import annotations

import torch
from torch import nn

from siglip.torch_internals import has_vnni, multiplies_int8_exactly, multiply_int8, pack_int8
from siglip.towers.naflex import NaFlexTower
from siglip.towers.transformer import ACTIVATIONS, MLP
from siglip.towers.vit import VisionTower

PRODUCTS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
"""The linear layers that are quantized, in each layer of the transformer."""
LARGEST = 127
"""The largest magnitude of a quantized number. -128 is not used, so that the range is symmetric."""
ZERO = 128
"""What is added to a quantized activation, so that it is stored as uint8. The CPU multiplies uint8 by int8."""
_SMALLEST_SCALE = 1e-30


def find_trouble() -> str:
    """Why this process cannot compute in int8, as the rest of a sentence, or an empty string if it can."""
    if not has_vnni():
        return "needs a CPU with AVX-512 VNNI, and this one does not have it"
    if not multiplies_int8_exactly():
        return "gives wrong sums here, because oneDNN is kept from AVX-512 VNNI (ONEDNN_MAX_CPU_ISA)"
    return ""


class Int8Linear(nn.Module):
    """A linear layer whose product is computed in int8: (..., K) to (..., N), of the input's dtype.

    `weight` is int8 (N, K) until `pack` replaces it. `scale` and `bias` are float32 (N,). `shift`, float32 (N,), is
    added to the scaled product, and takes back what `ZERO` has added to it.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        values = linear.weight.detach().float()
        largest = values.abs().amax(dim=1)
        scale = torch.where(largest > 0, largest / LARGEST, 1.0)
        quantized = (values / scale[:, None]).round().to(torch.int8)
        self.weight: torch.Tensor | None
        self.scale: torch.Tensor
        self.shift: torch.Tensor
        self.bias: torch.Tensor
        self.register_buffer("weight", quantized)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", -ZERO * scale * quantized.sum(dim=1))
        self.register_buffer("bias", linear.bias.detach().float())
        self.packed: torch.Tensor | None = None

    def pack(self) -> None:
        """Replace the weights by the layout that the CPU's kernels want. A layer that is to be compiled stays as it is.

        torch.compile packs the weights itself, when it freezes them.
        """
        assert self.weight is not None
        self.packed, self.weight = pack_int8(self.weight), None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        rows = inputs.flatten(0, -2).float()
        scale = rows.abs().amax(dim=1, keepdim=True).clamp(min=_SMALLEST_SCALE) / LARGEST
        quantized = ((rows * (1 / scale)).round() + ZERO).to(torch.uint8)
        packed = self.packed if self.weight is None else pack_int8(self.weight)
        assert packed is not None
        product = multiply_int8(quantized, packed, self.scale, self.shift, inputs.dtype)
        outputs = product.float() * scale + self.bias
        return outputs.to(inputs.dtype).view(*inputs.shape[:-1], -1)


def gelu_by_sigmoid(inputs: torch.Tensor) -> torch.Tensor:
    """The tanh approximation of GELU, in float32 and with one exponential instead of a tanh.

    The two are equal, because (1 + tanh(x)) / 2 is sigmoid(2 x). The kernel that applies it and quantizes the result
    took 3.4 ms instead of 7.5 ms for four images of the base model. In bfloat16 it is a part of the product's kernel.
    """
    values = inputs.float()
    return (values * torch.sigmoid(1.5957691216057308 * (values + 0.044715 * values**3))).to(inputs.dtype)


def quantize_tower(tower: VisionTower | NaFlexTower, dtype: torch.dtype) -> None:
    """Quantize the layers of a vision tower in float32. All the rest of the tower becomes `dtype`."""
    transformer = tower.encoder
    for module in list(transformer.modules()):
        for name, child in list(module.named_children()):
            if name in PRODUCTS and isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child))
    for module in tower.modules():
        if not isinstance(module, Int8Linear):  # whose scales stay in float32
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    for module in transformer.modules():
        if isinstance(module, MLP) and module.activate is ACTIVATIONS["gelu_pytorch_tanh"]:
            module.activate = gelu_by_sigmoid


def pack_tower(tower: nn.Module) -> None:
    """Pack the weights of all quantized layers, for a model that is not compiled."""
    for module in tower.modules():
        if isinstance(module, Int8Linear):
            module.pack()
