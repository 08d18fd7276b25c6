"""The options of other vendors' requests that change the numbers of a response or their encoding.

Each is done, or refused with its name in `param`; fields in no table are for `serve.options.unknown`.
`EMBEDDING_OPTIONS` and `SCORE_OPTIONS` are the tables; the table of docs/endpoint.md is made from them
(`python -m serve.options.table`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from serve.embedding.vector_encoding import NumberType
from serve.options.choices import (
    Apply,
    activate,
    encode,
    ignore,
    limit,
    never,
    only,
    refuse,
    set_endianness,
    set_multi_label,
    set_precision,
    set_threshold,
    set_top_k,
    truncate,
)
from siglip.label_text.values import Count, Share


@dataclass(frozen=True)
class VendorOption:
    """An option: its field's name, the vendors whose clients send it, the type of its value, and what it does here."""

    name: str
    vendors: str
    type: Any
    meaning: str
    apply: Apply

    @cached_property
    def adapter(self) -> TypeAdapter[Any]:
        """Validates a value. Numbers and booleans may be strings, as in forms."""
        return TypeAdapter(self.type)


NORMALIZED = "embeddings always have unit norm: leave it out"
_POOLING = "the model has one way of pooling: leave it out"
ONE_VECTOR = "each input has one embedding of its own"
_NORM = only(True, instead=NORMALIZED)
_WIDTH = "Must be the width of the model's embeddings."
_USE = "No effect: the model has one embedding for all uses."
_PROMPT = "Refused: the model has no prompts. Write the prompt into the text."
_MOST = "A text with more tokens is refused, unless this is the model's input length or more."
_TEMPLATE = "Refused, unless it is empty."
_PLAIN = only(False, instead="messages are embedded as they are, without a template")
Tokens = Annotated[int, Field(ge=-1)]

DIMENSIONS = (
    *("dimensions", "output_dimension", "dimensionality", "truncate_dim", "outputDimensionality", "dimension"),
    "output_dimensionality",
)
"""The options whose value must be the width of the model's embeddings."""
EMBEDDING_OPTIONS: tuple[VendorOption, ...] = (
    *(
        VendorOption(name, vendors, int, _WIDTH, ignore)  # `read_embedding_options` checks them
        for name, vendors in zip(
            DIMENSIONS,
            (
                *("OpenAI, TEI, vLLM, jina, infinity", "Voyage, Cohere, Mistral", "Nomic"),
                *("Sentence Transformers", "Google", "Google", "Google"),
            ),
            strict=True,
        )
    ),
    VendorOption(
        "encoding_format",
        "OpenAI, vLLM, infinity, Voyage",
        Literal["float", "base64"],
        "Done. `base64` is of little-endian float32, if nothing else is asked for. OpenAI's client asks for base64 and "
        "reads float32, so for other numbers it must send `float`.",
        encode,
    ),
    VendorOption(
        "embedding_type",
        "jina, NVIDIA",
        Literal["float", "base64", "int8", "uint8", "binary", "ubinary"],
        "Done, for one type. Lists of types are refused.",
        encode,
    ),
    VendorOption(
        "output_dtype",
        "Voyage, Mistral",
        NumberType,
        "Done. With `encoding_format: base64` it is base64 of these bytes.",
        encode,
    ),
    VendorOption(
        "output_encoding",
        "Voyage",
        Literal["base64"],
        "Done, as `encoding_format: base64`.",
        encode,
    ),
    VendorOption(
        "precision",
        "Sentence Transformers",
        str,
        "Only `float32` is accepted.",
        only("float32", "float", instead="send float32, or embedding_type for other numbers"),
    ),
    *(
        VendorOption(name, vendors, str, "Refused: the model has one way of pooling.", refuse(_POOLING))
        for name, vendors in (
            ("pooling", "Cloudflare, Sentence Transformers"),
            ("pooling_type", "vLLM, llama.cpp"),
            ("pooling_mode", "Sentence Transformers"),
        )
    ),
    VendorOption(
        "embedding_types",
        "Cohere",
        list[str],
        'Done on Cohere\'s paths. Elsewhere only `["float"]` is accepted.',
        only(["float"], instead="send embedding_type, or use Cohere's path /v2/embed"),
    ),
    VendorOption(
        "embed_dtype", "vLLM", Literal["float32", "float16"], "Done for base64, others are refused.", set_precision
    ),
    VendorOption("endianness", "vLLM", Literal["native", "little", "big"], "Done for base64.", set_endianness),
    *(
        VendorOption(name, vendors, bool, "`false` is refused: embeddings always have unit norm.", _NORM)
        for name, vendors in (
            ("normalize", "TEI, Hugging Face, vLLM"),
            ("normalized", "jina"),
            ("normalize_embeddings", "Sentence Transformers"),
            ("use_activation", "vLLM"),
            ("activation", "vLLM"),
        )
    ),
    VendorOption(
        "embd_normalize", "llama.cpp", int, "Only `2`, the unit norm, is accepted.", only(2, instead=NORMALIZED)
    ),
    VendorOption(
        "softmax", "vLLM", bool, "`true` is refused.", only(False, instead="embeddings are vectors, not probabilities")
    ),
    VendorOption(
        "add_special_tokens",
        "vLLM",
        bool,
        "`false` is refused.",
        only(True, instead="the model's texts always have an end token"),
    ),
    VendorOption("late_chunking", "jina", bool, "`true` is refused.", only(False, instead=ONE_VECTOR)),
    VendorOption("return_multivector", "jina", bool, "`true` is refused.", only(False, instead=ONE_VECTOR)),
    *(
        VendorOption(name, vendors, str, _USE, ignore)
        for name, vendors in (("input_type", "Cohere, Voyage, NVIDIA"), ("task", "jina"), ("task_type", "Nomic"))
    ),
    *(
        VendorOption(name, vendors, Any, _PROMPT, never)
        for name, vendors in (
            ("prompt_name", "TEI, Hugging Face"),
            ("prompt", "Sentence Transformers"),
            ("instruction", "several"),
            ("prompt_template", "Fireworks"),
            ("title", "Google"),
        )
    ),
    *(
        VendorOption(name, "vLLM", Any, _TEMPLATE, never)
        for name in ("chat_template", "chat_template_kwargs", "mm_processor_kwargs", "media_io_kwargs")
    ),
    *(
        VendorOption(name, "vLLM", bool, "`true` is refused.", _PLAIN)
        for name in ("add_generation_prompt", "continue_final_message")
    ),
    *(
        VendorOption(name, vendors, bool | str, meaning, truncate)
        for name, vendors, meaning in (
            (
                "truncate",
                "TEI, Hugging Face, jina, Cohere, NVIDIA",
                "`true` and `END` are the default. With `false` or `NONE` a text that is too long is refused, and with "
                "`START` too.",
            ),
            ("truncation", "Voyage", "As `truncate`."),
            ("auto_truncate", "Vertex", "As `truncate`."),
            ("autoTruncate", "Vertex", "As `truncate`."),
            ("truncation_direction", "TEI, Hugging Face", "With `left` a text that is too long is refused."),
            ("truncation_side", "vLLM", "With `left` a text that is too long is refused."),
        )
    ),
    VendorOption("truncate_prompt_tokens", "vLLM", Tokens, _MOST, limit),
    VendorOption("max_tokens", "Cohere", Tokens, _MOST, limit),
    VendorOption("max_length", "Sentence Transformers, Hugging Face", Tokens, _MOST, limit),
    VendorOption("max_seq_length", "Sentence Transformers", Tokens, _MOST, limit),
    VendorOption("truncate_input_tokens", "IBM watsonx", Tokens, _MOST, limit),
    VendorOption(
        "long_text_mode",
        "Nomic",
        str,
        "Only `truncate` is accepted.",
        only("truncate", instead="long texts are cut, and not averaged"),
    ),
)
"""Options of requests for embeddings, on the routes of all vendors."""
SCORE_OPTIONS: tuple[VendorOption, ...] = (
    VendorOption(
        "function_to_apply",
        "Hugging Face",
        Literal["sigmoid", "softmax", "none"],
        "With `candidate_labels`: done, `none` is refused.",
        activate,
    ),
    VendorOption(
        "multi_label",
        "Hugging Face",
        bool,
        "With `candidate_labels`: done. `true` is sigmoid, the default, and `false` is softmax.",
        set_multi_label,
    ),
    VendorOption("top_k", "Hugging Face", Count, "With `candidate_labels`: done.", set_top_k),
    VendorOption("threshold", "Hugging Face", Share, "With `candidate_labels`: done.", set_threshold),
    VendorOption(
        "tokenizer_kwargs",
        "Hugging Face",
        Any,
        "With `candidate_labels`: refused, unless it is empty.",
        only({}, instead="the tokenizer's settings are the model's own"),
    ),
)
"""Options of Hugging Face's classifications."""


def schema_of(options: Sequence[VendorOption]) -> Callable[[dict[str, Any]], None]:
    """What adds options to the JSON schema of a request, for the API reference (pydantic's `json_schema_extra`)."""

    def extend(schema: dict[str, Any]) -> None:
        for option in options:
            known = option.adapter.json_schema()
            schema.setdefault("properties", {})[option.name] = {**known, "description": option.meaning}

    return extend


def describe_options() -> str:
    """A Markdown table of all options, for docs/endpoint.md."""
    rows = ["| Field | Clients that send it | Here |", "|---|---|---|"]
    rows += [
        f"| `{option.name}` | {option.vendors} | {option.meaning} |" for option in (*EMBEDDING_OPTIONS, *SCORE_OPTIONS)
    ]
    return "\n".join(rows)


if __name__ == "__main__":
    print(describe_options())
