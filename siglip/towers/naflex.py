"""The vision tower of SigLIP 2's NaFlex models (Tschannen et al. 2025), which see an image in its own proportions.

It differs from `siglip.towers.vit` in three places: patches come as they are cut, position embeddings are resized for
the grid of each image, and positions without a patch are masked in all attentions. The reference is transformers'
`Siglip2VisionModel`.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from siglip.checkpoints.settings import NaFlexSettings
from siglip.towers.transformer import Transformer, make_norm, make_table
from siglip.towers.vit import MAPHead


def weigh_neighbours(index: torch.Tensor, count: torch.Tensor, side: int) -> torch.Tensor:
    """Return the weights by which `side` cells become `count` cells, for the new cells `index`: float32 (B, T, side).

    `index` is int (B, T), at least 0 and less than `count`, int (B, 1). The weights are those of
    `torch.nn.functional.interpolate(mode="bilinear", antialias=True, align_corners=False)`: a triangle around the
    centre of the new cell, which is wider than two cells only if there are fewer new cells than old ones. As numbers
    they make the same graph for all grids, where `interpolate` needs one call for each grid, and cannot be compiled.
    """
    scale = (side / count.float())[..., None]
    centres = (index.float()[..., None] + 0.5) * scale
    cells = torch.arange(side, device=index.device) + 0.5
    weights = (1 - (cells - centres).abs() / scale.clamp(min=1)).clamp(min=0)
    return weights / weights.sum(dim=-1, keepdim=True)


class GridEmbeddings(nn.Module):
    """Patch and position embeddings: normalised patches (B, T, 3 * P * P) and grids (B, 2) to (B, T, D)."""

    def __init__(self, settings: NaFlexSettings) -> None:
        super().__init__()
        self.side = math.isqrt(settings.num_patches)
        self.patch_embedding = nn.Linear(3 * settings.patch_size**2, settings.hidden_size)
        self.position_embedding = make_table(settings.num_patches, settings.hidden_size)

    def forward(self, patches: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        rows, columns = grids[:, :1], grids[:, 1:]
        place = torch.arange(patches.shape[1], device=grids.device)
        # Positions without a patch get the embedding of some other one: they are masked, but must be finite.
        down = weigh_neighbours(torch.minimum(place // columns, rows - 1), rows, self.side)
        across = weigh_neighbours(place % columns, columns, self.side)
        weights = (down[..., None] * across[..., None, :]).flatten(2)
        # In float32, as in the reference: bfloat16 has too few bits for weights that are multiplied and added.
        positions = weights @ self.position_embedding.weight.float()
        embedded: torch.Tensor = self.patch_embedding(patches)
        return embedded + positions.to(embedded.dtype)


class NaFlexTower(nn.Module):
    """The vision tower: normalised patches (B, T, 3 * P * P) and grids to embeddings (B, D), not yet of unit norm.

    `grids` is int (B, 2), the rows and columns of each image, which has their product of patches. What is in the
    other rows of `patches` has no influence.
    """

    def __init__(self, settings: NaFlexSettings) -> None:
        super().__init__()
        self.embeddings = GridEmbeddings(settings)
        self.encoder = Transformer(settings)
        self.post_layernorm = make_norm(settings)
        self.head = MAPHead(settings)

    def forward(self, patches: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        count = grids.prod(dim=1)
        mask = (torch.arange(patches.shape[1], device=grids.device) < count[:, None])[:, None, None, :]
        tokens = self.encoder(self.embeddings(patches, grids), mask)
        output: torch.Tensor = self.head(self.post_layernorm(tokens), mask)
        return output
