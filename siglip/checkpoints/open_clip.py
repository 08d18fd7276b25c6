"""open_clip's layout of a SigLIP: its settings and the names of its weights, in those of the hub's layout.

open_clip's SigLIP is a vision transformer of timm (`visual.trunk`) and a text transformer of its own (`text`). The
mapping is exact: the tensors stay as they are, except that a fused matrix is divided into its parts or two are joined.

The activation is the one that open_clip computes with, which is not always the one that Google trained with: timm's
model names and `act_kwargs` say exact GELU for SigLIP and for some sizes of SigLIP 2, and Google's own checkpoints the
approximation by tanh. Read from open_clip 3.3.0 and timm 1.0.31.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from siglip.checkpoints.files import OPEN_CLIP, CheckpointError
from siglip.checkpoints.settings import parse
from siglip.config import ImageSpec

Weights = dict[str, torch.Tensor]
_TRUNK = re.compile(r"vit_(base|large|so400m|giantopt)_patch(\d+)_siglip_(\d+)")
_HEADS = {"base": 12, "large": 16, "so400m": 16, "giantopt": 16}
"""Attention heads of timm's vision transformers: the only size that their weights do not show."""
_TANH = re.compile(r"vit_(base_patch32|large_patch16_siglip_512|so400m_patch16|giantopt)")
"""The names of timm's SigLIP trunks with `act_layer="gelu_tanh"`. The others have `nn.GELU`, without approximation."""
_TRUNK_EPS = 1e-6
_FILTERS = {"bilinear": 2, "bicubic": 3}


class _Strict(BaseModel):
    """Settings in which a key that is not known is refused, because it may change the numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Vision(_Strict):
    """`vision_cfg` of a SigLIP: a trunk of timm with attention pooling and without a projection."""

    image_size: Annotated[int, Field(gt=0, strict=True)]
    timm_model_name: Annotated[str, Field(pattern=f"^{_TRUNK.pattern}$")]
    timm_pool: Literal["map"]
    timm_proj: Literal["none"]
    timm_model_pretrained: bool = False
    timm_drop: float = 0.0
    timm_drop_path: float | None = None


class Activation(_Strict):
    """`act_kwargs`: the arguments of `nn.GELU`."""

    approximate: Literal["tanh", "none"] = "none"


class Norm(_Strict):
    """`norm_kwargs`: the arguments of `nn.LayerNorm`."""

    eps: float = 1e-5


class Text(_Strict):
    """`text_cfg` of a SigLIP: a transformer without a mask, whose last position is the embedding."""

    context_length: Annotated[int, Field(gt=0, strict=True)]
    vocab_size: Annotated[int, Field(gt=0, strict=True)]
    width: Annotated[int, Field(gt=0, strict=True)]
    heads: Annotated[int, Field(gt=0, strict=True)]
    layers: Annotated[int, Field(gt=0, strict=True)]
    no_causal_mask: Literal[True]
    pool_type: Literal["last"]
    hf_tokenizer_name: str = ""
    tokenizer_kwargs: dict[str, Any] = {}
    mlp_ratio: float = 4.0
    proj_bias: bool = False
    proj_type: Literal["linear", "none"] = "linear"
    norm_kwargs: Norm = Norm()
    act_kwargs: Activation = Activation()


class Model(_Strict):
    """`model_cfg` of a SigLIP. `embed_dim` is the width of both towers' embeddings."""

    embed_dim: Annotated[int, Field(gt=0, strict=True)]
    vision_cfg: Vision
    text_cfg: Text
    init_logit_bias: float
    init_logit_scale: float | None = None
    custom_text: bool = True
    quick_gelu: Literal[False] = False


class Preprocessing(_Strict):
    """`preprocess_cfg`: how images are prepared. open_clip's own default is to cut, as for a CLIP."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bilinear", "bicubic"]
    resize_mode: Literal["squash"]
    size: Any = None
    mode: Literal["RGB"] = "RGB"
    fill_color: int = 0


class Settings(_Strict):
    """An `open_clip_config.json` of a SigLIP."""

    model_cfg: Model
    preprocess_cfg: Preprocessing


def read_settings(values: Mapping[str, Any], source: str) -> Settings:
    """Read an `open_clip_config.json`. Raises `CheckpointError` for another model than a SigLIP of fixed resolution."""
    model = values.get("model_cfg")
    text = model.get("text_cfg") if isinstance(model, dict) else None
    vision = model.get("vision_cfg") if isinstance(model, dict) else None
    if isinstance(vision, dict) and str(vision.get("timm_model_name")).startswith("naflexvit"):
        raise CheckpointError(
            f"model.source: {source}: {OPEN_CLIP}: its image tower is timm's for NaFlex ({vision['timm_model_name']}), "
            "which is not converted: use google/siglip2-base-patch16-naflex or google/siglip2-so400m-patch16-naflex"
        )
    if isinstance(text, dict) and text.get("hf_model_name"):
        raise CheckpointError(
            f"model.source: {source}: {OPEN_CLIP}: its text tower is {text['hf_model_name']}, and not SigLIP's"
        )
    if isinstance(model, dict) and "init_logit_bias" not in model:
        raise CheckpointError(
            f"model.source: {source}: {OPEN_CLIP}: it is a CLIP and not a SigLIP: its logits have no bias "
            "(init_logit_bias)"
        )
    return parse(values, Settings, OPEN_CLIP, source)


def make_config(settings: Settings, weights: Weights) -> dict[str, Any]:
    """The `config.json` for weights with the hub's names, of a checkpoint with these settings."""
    model, vision, text = settings.model_cfg, settings.model_cfg.vision_cfg, settings.model_cfg.text_cfg
    patches = weights["vision_model.embeddings.patch_embedding.weight"]
    return {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "text_config": {
            "model_type": "siglip_text_model",
            "hidden_size": text.width,
            "intermediate_size": len(weights["text_model.encoder.layers.0.mlp.fc1.weight"]),
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "hidden_act": _name_gelu(text.act_kwargs.approximate == "tanh"),
            "layer_norm_eps": text.norm_kwargs.eps,
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length,
            "projection_size": model.embed_dim,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": len(patches),
            "intermediate_size": len(weights["vision_model.encoder.layers.0.mlp.fc1.weight"]),
            "num_hidden_layers": sum(name.endswith(".layer_norm1.bias") for name in weights if name.startswith("vis")),
            "num_attention_heads": _HEADS[_split_name(vision.timm_model_name)],
            "hidden_act": _name_gelu(bool(_TANH.match(vision.timm_model_name))),
            "layer_norm_eps": _TRUNK_EPS,
            "image_size": vision.image_size,
            "patch_size": patches.shape[-1],
        },
    }


def make_spec(settings: Settings) -> ImageSpec:
    """The preprocessing of a checkpoint with these settings."""
    images = settings.preprocess_cfg
    return ImageSpec(
        size=settings.model_cfg.vision_cfg.image_size,
        resample=_FILTERS[images.interpolation],
        mean=images.mean,
        std=images.std,
    )


def rename_weights(weights: Weights, settings: Settings, source: str) -> Weights:
    """The weights with the hub's names. Raises `CheckpointError` for one that is not SigLIP's, or is missing."""
    text = settings.model_cfg.text_cfg
    renamed: Weights = {}
    unknown = []
    try:
        for name, tensor in weights.items():
            found = list(_rename(name, tensor))
            renamed.update(found)
            if not found and not _JOINED.fullmatch(name):
                unknown.append(name)
        for part in ("weight", "bias"):
            query, both = (weights[f"visual.trunk.attn_pool.{one}.{part}"] for one in ("q", "kv"))
            renamed[f"vision_model.head.attention.in_proj_{part}"] = torch.cat([query, both])
        table = renamed["vision_model.embeddings.patch_embedding.weight"]
        renamed.update(_make_head(weights, text, table.dtype))
        _check_first(renamed, _TRUNK.fullmatch(settings.model_cfg.vision_cfg.timm_model_name))
    except KeyError as error:
        raise CheckpointError(f"model.source: {source}: its weights have no {error.args[0]}") from None
    except (RuntimeError, ValueError, IndexError) as error:  # what torch raises for tensors that cannot be divided
        reason = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"model.source: {source}: its weights have not the shapes of a SigLIP: {reason}"
        ) from None
    if unknown:
        raise CheckpointError(
            f"model.source: {source}: its weights have {unknown[0]}"
            f"{f' and {len(unknown) - 1} more' if unknown[1:] else ''}, which no SigLIP of open_clip has"
        )
    return renamed


_PARTS = {
    "visual.trunk.patch_embed.proj": "vision_model.embeddings.patch_embedding",
    "visual.trunk.norm": "vision_model.post_layernorm",
    "visual.trunk.attn_pool.proj": "vision_model.head.attention.out_proj",
    "visual.trunk.attn_pool.norm": "vision_model.head.layernorm",
    "visual.trunk.attn_pool.mlp.fc1": "vision_model.head.mlp.fc1",
    "visual.trunk.attn_pool.mlp.fc2": "vision_model.head.mlp.fc2",
    "text.token_embedding": "text_model.embeddings.token_embedding",
    "text.ln_final": "text_model.final_layer_norm",
}
_BLOCKS = {
    "visual.trunk.blocks": "vision_model.encoder.layers",
    "text.transformer.resblocks": "text_model.encoder.layers",
}
_IN_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_JOINED = re.compile(r"visual\.trunk\.attn_pool\.(q|kv)\.(weight|bias)|text\.text_projection(\.weight|\.bias)?")
"""The weights of which several become one, or that are not always there."""
_FUSED = re.compile(r"attn\.(?:qkv\.|in_proj_)(weight|bias)")


def _rename(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """What becomes of one weight. Nothing, for what is made from several, and for what is not known."""
    if name in ("logit_scale", "logit_bias"):
        yield name, tensor.reshape(1)
    elif name == "visual.trunk.pos_embed":
        yield "vision_model.embeddings.position_embedding.weight", tensor[0]
    elif name == "text.positional_embedding":
        yield "text_model.embeddings.position_embedding.weight", tensor
    elif name == "visual.trunk.attn_pool.latent":
        yield "vision_model.head.probe", tensor
    else:
        part, _, kind = name.rpartition(".")
        if part in _PARTS:
            yield f"{_PARTS[part]}.{kind}", tensor
        for prefix, new in _BLOCKS.items():
            if not name.startswith(f"{prefix}."):
                continue
            number, _, rest = name.removeprefix(f"{prefix}.").partition(".")
            part, _, kind = rest.rpartition(".")
            if part in _IN_BLOCK:
                yield f"{new}.{number}.{_IN_BLOCK[part]}.{kind}", tensor
            elif fused := _FUSED.fullmatch(rest):
                for letter, one in zip("qkv", tensor.chunk(3), strict=True):
                    yield f"{new}.{number}.self_attn.{letter}_proj.{fused[1]}", one


def _check_first(renamed: Weights, trunk: re.Match[str] | None) -> None:
    """Check the weights from which `make_config` reads sizes. Raises `KeyError` or `ValueError`."""
    for tower in ("vision_model", "text_model"):
        if renamed[f"{tower}.encoder.layers.0.mlp.fc1.weight"].ndim != 2:
            raise ValueError(f"{tower} has a layer that is no matrix")
    patches = tuple(renamed["vision_model.embeddings.patch_embedding.weight"].shape)
    if trunk is None or len(patches) != 4 or patches[-1] != int(trunk[2]):
        raise ValueError(f"the patches are {patches}, and timm_model_name is {trunk and trunk[0]}")


def _make_head(weights: Weights, text: Text, dtype: torch.dtype) -> Weights:
    """The text tower's projection. Without a bias it is stored the other way round; without a projection it is 1.

    Raises `KeyError` if the settings have a projection and the weights have none, and `ValueError` for the opposite.
    """
    head, out = "text_model.head", "text.text_projection"
    if text.proj_type == "none":
        if any(name.startswith(out) for name in weights):
            raise ValueError(f"{out} is there, and proj_type is none")
        matrix = torch.eye(text.width, dtype=dtype)
    elif text.proj_bias:
        return {f"{head}.{part}": weights[f"{out}.{part}"] for part in ("weight", "bias")}
    else:
        matrix = weights[out].T.contiguous()
    return {f"{head}.weight": matrix, f"{head}.bias": torch.zeros(len(matrix), dtype=dtype)}


def _split_name(trunk: str) -> str:
    found = _TRUNK.fullmatch(trunk)
    assert found is not None  # the settings are checked for it
    return found[1]


def _name_gelu(tanh: bool) -> str:
    return "gelu_pytorch_tanh" if tanh else "gelu"
