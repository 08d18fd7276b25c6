"""SigLIP's two towers (Zhai et al. 2023): what its checkpoints' weights are multiplied with.

Modules are named as in a checkpoint, so that its weights load as they are. transformers has the same model and more
around it: to import that took two of the five CPU seconds until a process was ready, and 86 MiB. Here is what a
checkpoint of fixed resolution needs, and transformers is what it is tested against.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from siglip.checkpoint import Architecture, TextSettings, TowerSettings, VisionSettings

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
    "gelu": functional.gelu,
}


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int) -> torch.Tensor:
    """What each query (B, Q, D) takes of the values (B, T, D), by the keys (B, T, D), head by head: (B, Q, D)."""
    query, key, value = (rows.view(*rows.shape[:2], heads, -1).transpose(1, 2) for rows in (query, key, value))
    return functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Self-attention of every token to every token; no mask: SigLIP was trained without one. (B, T, D) to the same."""

    def __init__(self, settings: TowerSettings) -> None:
        super().__init__()
        width = settings.hidden_size
        self.heads = settings.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        mixed = attend(self.q_proj(tokens), self.k_proj(tokens), self.v_proj(tokens), self.heads)
        output: torch.Tensor = self.out_proj(mixed)
        return output


class Perceptron(nn.Module):
    """The two layers behind an attention, (B, T, D) to the same."""

    def __init__(self, settings: TowerSettings) -> None:
        super().__init__()
        self.fc1 = nn.Linear(settings.hidden_size, settings.intermediate_size)
        self.fc2 = nn.Linear(settings.intermediate_size, settings.hidden_size)
        self.activate = ACTIVATIONS[settings.hidden_act]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.fc2(self.activate(self.fc1(tokens)))
        return output


class Layer(nn.Module):
    """One of a transformer's layers, normalised before each half, (B, T, D) to the same."""

    def __init__(self, settings: TowerSettings) -> None:
        super().__init__()
        self.layer_norm1, self.layer_norm2 = (make_norm(settings) for _ in range(2))
        self.self_attn = Attention(settings)
        self.mlp = Perceptron(settings)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens + self.self_attn(self.layer_norm1(tokens))
        output: torch.Tensor = tokens + self.mlp(self.layer_norm2(tokens))
        return output


class Transformer(nn.Module):
    """A tower's layers one after the other, (B, T, D) to the same."""

    def __init__(self, settings: TowerSettings) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(settings) for _ in range(settings.num_hidden_layers))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            tokens = layer(tokens)
        return tokens


class PatchEmbeddings(nn.Module):
    """Squares of pixels as tokens, each with its place: (B, 3, S, S) to (B, T, D), row by row."""

    def __init__(self, settings: VisionSettings) -> None:
        super().__init__()
        width, patch = settings.hidden_size, settings.patch_size
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch)
        self.position_embedding = make_table((settings.image_size // patch) ** 2, width)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches: torch.Tensor = self.patch_embedding(pixels)
        return patches.flatten(2).transpose(1, 2) + self.position_embedding.weight


class TokenEmbeddings(nn.Module):
    """Token ids, each with its place: int64 (B, T) to (B, T, D)."""

    def __init__(self, settings: TextSettings) -> None:
        super().__init__()
        self.token_embedding = make_table(settings.vocab_size, settings.hidden_size)
        self.position_embedding = make_table(settings.max_position_embeddings, settings.hidden_size)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        tokens: torch.Tensor = self.token_embedding(ids)
        return tokens + self.position_embedding.weight[: ids.shape[1]]


class ProbeAttention(nn.Module):
    """One query's attention to all tokens, (1, 1, D) and (B, T, D) to (B, 1, D), with a checkpoint's names and layout.

    Those are torch's `nn.MultiheadAttention`, which puts the tokens first; for a matrix product in bfloat16 on a CPU
    the weights are then copied for each token. It took 0.5 s a batch, 39 % of eight images of the base model's.
    """

    def __init__(self, settings: VisionSettings) -> None:
        super().__init__()
        width = settings.hidden_size
        self.heads = settings.num_attention_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, probe: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            functional.linear(rows, weight, bias)
            for rows, weight, bias in zip(
                (probe, tokens, tokens), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True
            )
        )
        output: torch.Tensor = self.out_proj(attend(query.expand(len(tokens), -1, -1), key, value, self.heads))
        return output


class Pool(nn.Module):
    """One learned query's attention to all patches, (B, T, D) to (B, D)."""

    def __init__(self, settings: VisionSettings) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, settings.hidden_size))
        self.attention = ProbeAttention(settings)
        self.layernorm = make_norm(settings)
        self.mlp = Perceptron(settings)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        pooled: torch.Tensor = self.attention(self.probe, patches)
        pooled = pooled + self.mlp(self.layernorm(pooled))
        return pooled[:, 0]


class VisionTower(nn.Module):
    """Normalised pixels (B, 3, S, S) to embeddings (B, D), not yet of unit norm."""

    def __init__(self, settings: VisionSettings) -> None:
        super().__init__()
        self.embeddings = PatchEmbeddings(settings)
        self.encoder = Transformer(settings)
        self.post_layernorm = make_norm(settings)
        self.head = Pool(settings)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = self.encoder(self.embeddings(pixels))
        output: torch.Tensor = self.head(self.post_layernorm(patches))
        return output


class TextTower(nn.Module):
    """Token ids, int64 (B, T), to embeddings (B, D), not yet of unit norm.

    Of the last token, be it the end of a text or the padding behind it. `vocabulary` is how many ids there are.
    """

    def __init__(self, settings: TextSettings) -> None:
        super().__init__()
        self.vocabulary = settings.vocab_size
        self.embeddings = TokenEmbeddings(settings)
        self.encoder = Transformer(settings)
        self.final_layer_norm = make_norm(settings)
        self.head = nn.Linear(settings.hidden_size, settings.projection_size or settings.hidden_size)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        tokens = self.final_layer_norm(self.encoder(self.embeddings(ids)))
        output: torch.Tensor = self.head(tokens[:, -1])
        return output


class Siglip(nn.Module):
    """Both towers, and the scale and bias of their cosines: a checkpoint's whole weights."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.text_model = TextTower(architecture.text_config)
        self.vision_model = VisionTower(architecture.vision_config)
        self.logit_scale, self.logit_bias = (nn.Parameter(torch.empty(1)) for _ in range(2))


def make_norm(settings: TowerSettings) -> nn.LayerNorm:
    """The normalisation that both towers use everywhere."""
    return nn.LayerNorm(settings.hidden_size, eps=settings.layer_norm_eps)


def make_table(rows: int, width: int) -> nn.Embedding:
    """Embeddings that are loaded later: not filled with random numbers first, as `nn.Embedding(rows, width)` is.

    On torch's `meta` device that imports all of torch.compile: 1 to 1.5 CPU seconds of each process that loads weights.
    """
    return nn.Embedding(rows, width, _weight=torch.empty(rows, width))
