"""Small checkpoints of each family with random weights. Their files have the layout of the real checkpoints."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from siglip.checkpoint import quiet_transformers

TEXTS = [
    "a photo of a cat",
    "This is a photo of golden_retriever.",
    "C++",
    "C#",
    "50% off, today only!",
    "ΟΔΟΣ ΣΑΣ",
    "東京タワーの夜景",
    "красная площадь",
    "गेटवे ऑफ़ इंडिया",
    "برج خليفة",
    "naïve café №5",
    "🦜 parrot",
    "  two   spaces ",
    "a very long text " * 40,
    "x" * 300,
]
"""Texts in many scripts. The last two are longer than 64 tokens, the limit of every model."""

_CORPUS = [text.lower() for text in TEXTS[:-2]] * 20
_IMAGES: dict[str, Any] = {
    "do_convert_rgb": None,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "rescale_factor": 1 / 255,
}
_TOWER = {"hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 2, "num_attention_heads": 4}


def make_siglip(directory: Path, vision: dict[str, Any] | None = None) -> Path:
    """Write a checkpoint like google/siglip-*-i18n: a SentencePiece tokenizer for many scripts, bicubic resizing."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_CORPUS), model_writer=model, model_type="unigram", vocab_size=160, minloglevel=2,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, character_coverage=1.0, hard_vocab_limit=False,
    )  # fmt: skip
    size = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()
    tower = vision or {**_TOWER, "image_size": 256}
    text = {**_TOWER, "vocab_size": size, "projection_size": tower["hidden_size"]}
    _write(directory, tower, text, resample=3)
    (directory / "spiece.model").write_bytes(model.getvalue())
    tokens = {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    _write_json(directory / "special_tokens_map.json", tokens)
    settings = {"do_lower_case": True, "model_input_names": ["input_ids"], "model_max_length": 64}
    _write_json(directory / "tokenizer_config.json", {**settings, **tokens, "tokenizer_class": "SiglipTokenizer"})
    return directory


def make_so400m(directory: Path) -> Path:
    """Write a checkpoint like google/siglip-so400m-patch14-384.

    Its patches do not fill the image, its attention heads have 72 dimensions, and its MLP has an unusual width.
    """
    tower = {"hidden_size": 144, "intermediate_size": 538, "num_hidden_layers": 2, "num_attention_heads": 2}
    return make_siglip(directory, {**tower, "image_size": 384, "patch_size": 14})


def make_exact_gelu(directory: Path) -> Path:
    """Write a checkpoint whose image tower has another activation and another epsilon than the published ones."""
    return make_siglip(directory, {**_TOWER, "image_size": 256, "hidden_act": "gelu", "layer_norm_eps": 1e-2})


def make_siglip2(directory: Path, **tokenizer: Any) -> Path:
    """Write a checkpoint like google/siglip2-*.

    Gemma's tokenizer is in tokenizer.json, resizing is bilinear, and config.json leaves out what has its default.
    """
    directory.mkdir(parents=True)
    size = _write_gemma_tokenizer(directory, tokenizer)
    _write(directory, {**_TOWER, "image_size": 256}, {**_TOWER, "vocab_size": size}, resample=2)
    return directory


def make_naflex(directory: Path, vision: dict[str, Any] | None = None, **images: Any) -> Path:
    """Write a checkpoint like google/siglip2-*-patch16-naflex, with `images` in its preprocessor_config.json."""
    import torch
    from transformers import Siglip2Config, Siglip2Model

    quiet_transformers()
    directory.mkdir(parents=True)
    tower = {**_TOWER, **(vision or {})}
    text = {**_TOWER, "vocab_size": _write_gemma_tokenizer(directory, {}), "projection_size": tower["hidden_size"]}
    torch.manual_seed(7)
    _save(Siglip2Model(Siglip2Config(vision_config=dict(tower), text_config=dict(text))), directory)
    towers = {
        "text_config": {"model_type": "siglip2_text_model", **text},
        "vision_config": {"model_type": "siglip2_vision_model", **tower},
    }
    _write_json(directory / "config.json", {"architectures": ["Siglip2Model"], "model_type": "siglip2", **towers})
    names = {"image_processor_type": "Siglip2ImageProcessor", "processor_class": "Siglip2Processor"}
    sizes = {"patch_size": tower.get("patch_size", 16), "max_num_patches": 256, "resample": 2}
    _write_json(directory / "preprocessor_config.json", {**_IMAGES, **names, **sizes, **images})
    return directory


def _write_gemma_tokenizer(directory: Path, changes: dict[str, Any]) -> int:
    """Write Gemma's tokenizer, with `changes` in its tokenizer_config.json. Return the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokens = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    special = [*tokens.values(), "<mask>"]
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, limit_alphabet=60, show_progress=False, initial_alphabet=list("abc▁+#")
    )
    backend.train_from_iterator(_CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(single="$A:0 <eos>:0", special_tokens=[("<eos>", 1)])
    content = json.loads(backend.to_str())
    vocabulary = content["model"]["vocab"]
    for byte in range(256):
        vocabulary.setdefault(f"<0x{byte:02X}>", len(vocabulary))
    _write_json(directory / "tokenizer.json", content)
    _write_json(directory / "special_tokens_map.json", tokens)
    settings = {"add_bos_token": False, "add_eos_token": True, "padding_side": "right", "model_max_length": 64}
    names = {"model_input_names": ["input_ids"], "tokenizer_class": "GemmaTokenizer"}
    _write_json(directory / "tokenizer_config.json", {**settings, **tokens, **names, **changes})
    return len(vocabulary)


def _write(directory: Path, vision: dict[str, Any], text: dict[str, Any], resample: int) -> None:
    """Write the weights, a config.json with only the given keys, and preprocessor_config.json."""
    import torch
    from transformers import SiglipConfig, SiglipModel

    quiet_transformers()
    torch.manual_seed(7)
    _save(SiglipModel(SiglipConfig(vision_config=dict(vision), text_config=dict(text))), directory)
    _write_json(
        directory / "config.json",
        {
            "architectures": ["SiglipModel"],
            "model_type": "siglip",
            "text_config": {"model_type": "siglip_text_model", **text},
            "vision_config": {"model_type": "siglip_vision_model", **vision},
        },
    )
    size = vision["image_size"]
    names = {"image_processor_type": "SiglipImageProcessor", "processor_class": "SiglipProcessor"}
    sizes = {"resample": resample, "size": {"height": size, "width": size}}
    _write_json(directory / "preprocessor_config.json", {**_IMAGES, **names, **sizes})


def _save(model: Any, directory: Path) -> None:
    """Save a model of transformers in which no bias is zero, with a scale and a bias like SigLIP's."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
        model.logit_scale.fill_(4.7)
        model.logit_bias.fill_(-12.9)
    model.save_pretrained(directory)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
