"""SigLIP's text tower (Zhai et al. 2023): a transformer whose output at the last position is the embedding."""

from __future__ import annotations

import torch
from torch import nn

from siglip.checkpoints.settings import TextSettings
from siglip.towers.transformer import Transformer, make_norm, make_table


class TokenEmbeddings(nn.Module):
    """Token and position embeddings: int64 (B, T) to (B, T, D)."""

    def __init__(self, settings: TextSettings) -> None:
        super().__init__()
        self.token_embedding = make_table(settings.vocab_size, settings.hidden_size)
        self.position_embedding = make_table(settings.max_position_embeddings, settings.hidden_size)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        tokens: torch.Tensor = self.token_embedding(ids)
        return tokens + self.position_embedding.weight[: ids.shape[1]]


class TextTower(nn.Module):
    """The text tower: token ids, int64 (B, T), to embeddings (B, D), not yet of unit norm.

    The embedding is that of the last position, which is the end token or padding. `vocabulary` is the number of ids.
    """

    def __init__(self, settings: TextSettings) -> None:
        super().__init__()
        self.vocabulary = settings.vocab_size
        self.embeddings = TokenEmbeddings(settings)
        self.encoder: nn.Module = Transformer(settings)
        self.final_layer_norm = make_norm(settings)
        self.head = nn.Linear(settings.hidden_size, settings.projection_size or settings.hidden_size)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        tokens = self.final_layer_norm(self.encoder(self.embeddings(ids)))
        output: torch.Tensor = self.head(tokens[:, -1])
        return output
