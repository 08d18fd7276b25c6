"""Transformer layers that the vision and the text tower share (Zhai et al. 2023), in PyTorch.

Modules have the names of a checkpoint's weights, so weights load without renaming. transformers' own model is not
used, because importing it takes two CPU seconds and 86 MiB more. Tests compare the embeddings with those of
transformers' model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from siglip.checkpoints.settings import TowerSettings

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
    "gelu": functional.gelu,
}


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Multihead attention without projections: queries (B, Q, D), keys and values (B, T, D) to (B, Q, D).

    `mask` is bool (B, 1, 1, T): false for keys that are not attended to. Without it all are.
    """
    query, key, value = (rows.view(*rows.shape[:2], heads, -1).transpose(1, 2) for rows in (query, key, value))
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Self-attention, (B, T, D) to (B, T, D).

    Texts and square images have no mask, because SigLIP was trained without one. NaFlex models have: see `attend`.
    """

    def __init__(self, settings: TowerSettings) -> None:
        super().__init__()
        width = settings.hidden_size
        self.heads = settings.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        mixed = attend(self.q_proj(tokens), self.k_proj(tokens), self.v_proj(tokens), self.heads, mask)
        output: torch.Tensor = self.out_proj(mixed)
        return output


class MLP(nn.Module):
    """The two linear layers after an attention, (B, T, D) to (B, T, D)."""

    def __init__(self, settings: TowerSettings) -> None:
        super().__init__()
        self.fc1 = nn.Linear(settings.hidden_size, settings.intermediate_size)
        self.fc2 = nn.Linear(settings.intermediate_size, settings.hidden_size)
        self.activate = ACTIVATIONS[settings.hidden_act]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.fc2(self.activate(self.fc1(tokens)))
        return output


class Layer(nn.Module):
    """One pre-norm layer of a transformer, (B, T, D) to (B, T, D)."""

    def __init__(self, settings: TowerSettings) -> None:
        super().__init__()
        self.layer_norm1, self.layer_norm2 = (make_norm(settings) for _ in range(2))
        self.self_attn = Attention(settings)
        self.mlp = MLP(settings)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        tokens = tokens + self.self_attn(self.layer_norm1(tokens), mask)
        output: torch.Tensor = tokens + self.mlp(self.layer_norm2(tokens))
        return output


class Transformer(nn.Module):
    """All layers of a tower, (B, T, D) to (B, T, D). See `attend` for `mask`."""

    def __init__(self, settings: TowerSettings) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(settings) for _ in range(settings.num_hidden_layers))

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        for layer in self.layers:
            tokens = layer(tokens, mask)
        return tokens


def make_norm(settings: TowerSettings) -> nn.LayerNorm:
    """A layer normalisation, as both towers use it everywhere."""
    return nn.LayerNorm(settings.hidden_size, eps=settings.layer_norm_eps)


def make_table(rows: int, width: int) -> nn.Embedding:
    """An embedding table (rows, width) without initial values, for weights that are loaded later.

    `nn.Embedding(rows, width)` would fill it with random numbers. On torch's `meta` device that imports all of
    torch.compile, which takes 1 to 1.5 CPU seconds in each process that loads weights.
    """
    return nn.Embedding(rows, width, _weight=torch.empty(rows, width))
