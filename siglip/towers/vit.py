"""SigLIP's vision tower (Zhai et al. 2023): a vision transformer with an attention-pooling head."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from siglip.checkpoints.settings import TowerSettings, VisionSettings
from siglip.towers.transformer import MLP, Transformer, attend, make_norm, make_table


class PatchEmbeddings(nn.Module):
    """Patch and position embeddings: (B, 3, S, S) to (B, T, D), with the patches row by row."""

    def __init__(self, settings: VisionSettings) -> None:
        super().__init__()
        width, patch = settings.hidden_size, settings.patch_size
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch)
        self.position_embedding = make_table((settings.image_size // patch) ** 2, width)

    def resize(self, size: int) -> None:
        """Make the table of positions one for images of `size` x `size` pixels, by bicubic interpolation.

        This is what transformers does for `interpolate_pos_encoding=True`: without antialiasing, in the table's dtype.
        The values of the table are lost.
        """
        table = self.position_embedding.weight
        old, new = int(len(table) ** 0.5), size // self.patch_embedding.kernel_size[0]
        grid = table.detach().view(1, old, old, -1).permute(0, 3, 1, 2)
        resized = functional.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
        self.position_embedding = make_table(new * new, table.shape[1])
        self.position_embedding.weight = nn.Parameter(resized.permute(0, 2, 3, 1).reshape(new * new, -1), False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches: torch.Tensor = self.patch_embedding(pixels)
        return patches.flatten(2).transpose(1, 2) + self.position_embedding.weight


class QueryAttention(nn.Module):
    """Attention of one query to all tokens, (1, 1, D) and (B, T, D) to (B, 1, D). See `attend` for `mask`.

    The weights have the names and layout of torch's `nn.MultiheadAttention`, because checkpoints have them. That module
    itself is not used: it puts the token dimension first, and then a matrix product in bfloat16 on a CPU copies the
    weights for each token. That took 0.5 s for a batch of eight images, 39 % of the base model's time.
    """

    def __init__(self, settings: TowerSettings) -> None:
        super().__init__()
        width = settings.hidden_size
        self.heads = settings.num_attention_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, learned: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        query, key, value = (
            functional.linear(rows, weight, bias)
            for rows, weight, bias in zip(
                (learned, tokens, tokens), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True
            )
        )
        mixed = attend(query.expand(len(tokens), -1, -1), key, value, self.heads, mask)
        output: torch.Tensor = self.out_proj(mixed)
        return output


class MAPHead(nn.Module):
    """Multihead attention pooling (MAP): a learned query attends to all patches, (B, T, D) to (B, D).

    Checkpoints call the query `probe`. It is not a linear probe.
    """

    def __init__(self, settings: TowerSettings) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, settings.hidden_size))
        self.attention = QueryAttention(settings)
        self.layernorm = make_norm(settings)
        self.mlp = MLP(settings)

    def forward(self, patches: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        pooled: torch.Tensor = self.attention(self.probe, patches, mask)
        pooled = pooled + self.mlp(self.layernorm(pooled))
        return pooled[:, 0]


class VisionTower(nn.Module):
    """The vision tower: normalised pixels (B, 3, S, S) to embeddings (B, D), not yet of unit norm."""

    def __init__(self, settings: VisionSettings) -> None:
        super().__init__()
        self.embeddings = PatchEmbeddings(settings)
        self.encoder = Transformer(settings)
        self.post_layernorm = make_norm(settings)
        self.head = MAPHead(settings)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = self.encoder(self.embeddings(pixels))
        output: torch.Tensor = self.head(self.post_layernorm(patches))
        return output
