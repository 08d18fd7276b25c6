"""`POST /`: Hugging Face's shape. `POST /v2/embed`: Cohere's."""

from __future__ import annotations

from fastapi import FastAPI, Request
from pydantic import RootModel

from serve.answers import Reply, documented, trace_of
from serve.embeddings import Source, embed_sources, encode_vector, read_image_url
from serve.errors import ApiError
from serve.schemas import CohereAnswer, CohereInput, CohereRequest, HuggingFaceRequest, LabelQuestion, LabelScore
from serve.service import Service
from siglip.labels import DEFAULT_TEMPLATE


class Scores(RootModel[list[LabelScore]]):
    """An image's labels, best first."""


class Vectors(RootModel[list[list[float]]]):
    """Embeddings of unit norm."""


class HuggingFaceAnswer(RootModel[list[LabelScore] | list[list[float]]]):
    """Scores for an image with labels, embeddings for texts."""


def add_vendor_routes(app: FastAPI, service: Service) -> None:
    """Register the routes."""

    @app.post("/", response_model=HuggingFaceAnswer, responses=documented(400), tags=["other clients"])
    async def infer(body: HuggingFaceRequest, request: Request) -> Reply:
        """What `huggingface_hub.InferenceClient(model=URL)` sends.

        `zero_shot_image_classification` gives every label's score, `feature_extraction` embeddings.
        """
        trace = trace_of(request)
        service.check_width(body.dimensions, "dimensions")
        if body.normalize is False:
            raise ApiError("invalid_request", "normalize: embeddings always have unit norm", param="normalize")
        if body.parameters is None:
            texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
            if not texts:
                raise ApiError("invalid_request", "inputs: nothing to embed", param="inputs")
            vectors = await service.embed_texts(texts, [f"inputs.{n}" for n in range(len(texts))], trace)
            return Reply(Vectors(vectors.tolist()))
        if not isinstance(body.inputs, str):
            raise ApiError("unsupported_input", "inputs: one image with candidate_labels, not a list", param="inputs")
        template = body.parameters.hypothesis_template or DEFAULT_TEMPLATE
        question = LabelQuestion(labels=body.parameters.candidate_labels, templates=[template])
        images = await service.read_images([body.inputs], ["inputs"], trace)
        asked = await service.ask(question, trace)
        [row] = service.classify(await service.embed_images(images, ["inputs"], trace), asked, question)
        return Reply(Scores([LabelScore(label=name, score=score) for name, score in row]))

    @app.post("/v2/embed", response_model=CohereAnswer, responses=documented(400, 404), tags=["other clients"])
    async def embed(body: CohereRequest, request: Request) -> Reply:
        """What `cohere.ClientV2(base_url=URL).embed` sends. `input_type` and `truncate` mean nothing to SigLIP."""
        trace = trace_of(request)
        service.check_model(body.model)
        service.check_width(body.output_dimension, "output_dimension")
        vectors = await embed_sources(_list_sources(body), service, trace)
        embeddings: dict[str, list[list[float]] | list[str]] = {}
        if "float" in body.embedding_types:
            embeddings["float"] = vectors.tolist()
        if "base64" in body.embedding_types:
            embeddings["base64"] = [encode_vector(vector) for vector in vectors]
        usage = service.usage(trace)
        return Reply(
            CohereAnswer(
                id=trace.request_id,
                embeddings=embeddings,
                texts=body.texts or [],
                meta={
                    "api_version": {"version": "2"},
                    "billed_units": {"input_tokens": usage.prompt_tokens, "images": usage.images},
                },
                fingerprint=service.fingerprint(),
            )
        )


def _list_sources(body: CohereRequest) -> list[Source]:
    """What a request wants embedded. Raises `ApiError`."""
    given = [name for name in ("texts", "images", "inputs") if getattr(body, name)]
    if len(given) != 1:
        raise ApiError("invalid_request", "give exactly one of texts, images and inputs", param="texts")
    if body.texts:
        return [Source("text", text, f"texts.{n}") for n, text in enumerate(body.texts)]
    if body.images:
        return [Source("image", image, f"images.{n}") for n, image in enumerate(body.images)]
    return [_read_input(item, f"inputs.{n}") for n, item in enumerate(body.inputs or ())]


def _read_input(item: CohereInput, param: str) -> Source:
    if len(item.content) != 1:
        raise ApiError(
            "unsupported_input",
            f"{param}: {len(item.content)} parts; each input is one text or one image, which SigLIP embeds separately",
            param=param,
        )
    [part] = item.content
    if part.type == "image_url":
        return read_image_url(part.image_url, param)
    return Source("text", part.text or "", param)
