"""Train the checkpoint that ships with Sightline: a SigLIP of 1.5 M parameters that recognises coloured shapes.

    python scripts/train_tiny.py siglip/checkpoints/tiny

Takes about ten minutes on two cores. Images are rendered in mixed sizes and aspect ratios, saved as JPEG and decoded by
the project's own preprocessing, so that training and inference see the same pixels. The loss is SigLIP's sigmoid loss
over all pairs of image and prompt; a pair is positive when all words of the prompt are true of the image.
"""

from __future__ import annotations

import argparse
import io
import math
import random
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import sentencepiece
import torch

from sightline.demo.shapes import COLORS, LABELS, SHAPES, render
from siglip.checkpoint import pin_model
from siglip.checkpoints.architectures import ARCHITECTURES, build_model, write_checkpoint
from siglip.config import ImageSpec, Limits, ModelConfig
from siglip.encoder import Encoder
from siglip.families.siglip import canonicalize
from siglip.images.decode import decode_image
from siglip.labels import DEFAULT_TEMPLATE, LabelSet, fill
from siglip.scoring import score_pairs, sigmoid

TEMPLATES = ("a photo of a {label}", DEFAULT_TEMPLATE, "{label}", "an image of a {label}")
QUERIES = [*LABELS, *COLORS, *SHAPES]
SIZE = ARCHITECTURES["tiny"]["vision"]["image_size"]
BATCH = 128


def render_jpeg(label: str, rng: random.Random) -> bytes:
    """Render one image of random size as a JPEG of random quality."""
    side = rng.randint(64, 320)
    width, height = side, max(48, int(side * rng.uniform(0.62, 1.6)))
    buffer = io.BytesIO()
    render(label, rng, (width, height)).save(buffer, "JPEG", quality=rng.randint(60, 95))
    return buffer.getvalue()


def render_chunk(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Render `count` images: pixels uint8 (count, S, S, 3) and label indices (count,)."""
    rng = random.Random(seed)
    numbers = [rng.randrange(len(LABELS)) for _ in range(count)]
    spec, limits = ImageSpec(size=SIZE), Limits()
    pixels = [decode_image(render_jpeg(LABELS[n], rng), spec, limits).pixels for n in numbers]
    return np.stack(pixels), np.array(numbers)


def render_images(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Render `count` images (a multiple of 500) in two processes. Returns arrays as `render_chunk` does."""
    chunk = 500
    seeds = range(seed * 1_000_000, seed * 1_000_000 + count // chunk)
    with ProcessPoolExecutor(2) as pool:
        parts = list(pool.map(render_chunk, seeds, [chunk] * len(seeds)))
    return np.concatenate([p for p, _ in parts]), np.concatenate([n for _, n in parts])


def train_tokenizer(directory: Path) -> Path:
    """Train a SentencePiece BPE model on the captions. `</s>` is id 1 and `<unk>` id 2, as in SigLIP's tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    captions = [canonicalize(fill(template, query)) for template in TEMPLATES for query in QUERIES]
    alphabet = [" ".join("abcdefghijklmnopqrstuvwxyz0123456789")] * 4
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*captions, *alphabet]),
        model_prefix=str(directory / "spiece"),
        model_type="bpe",
        vocab_size=ARCHITECTURES["tiny"]["text"]["vocab_size"],
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (directory / "spiece.vocab").unlink()
    return directory / "spiece.model"


def matches() -> np.ndarray:
    """Whether each query is true of each label: bool (64 labels, 80 queries)."""
    return np.array([[set(query.split()) <= set(label.split()) for query in QUERIES] for label in LABELS])


def train(directory: Path, seed: int, steps: int, count: int) -> None:
    """Train from random weights and write the checkpoint."""
    from transformers import SiglipTokenizer

    spiece = train_tokenizer(directory)
    model = build_model("tiny", seed)
    write_checkpoint(model, spiece, directory)
    tokenizer = SiglipTokenizer.from_pretrained(directory)
    length = model.config.text_config.max_position_embeddings
    prompts = {
        template: tokenizer(
            [canonicalize(fill(template, query)) for query in QUERIES],
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        )["input_ids"]
        for template in TEMPLATES
    }
    started = time.perf_counter()
    pixels, numbers = render_images(seed, count)
    print(f"{count} images rendered in {time.perf_counter() - started:.0f} s", flush=True)
    images, truth = torch.from_numpy(pixels), torch.from_numpy(matches())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    rng = np.random.default_rng(seed)
    model.train()
    for step in range(steps):
        chosen = rng.integers(0, count, BATCH)
        batch = images[chosen].permute(0, 3, 1, 2).float() / 127.5 - 1
        ids = prompts[TEMPLATES[int(rng.integers(len(TEMPLATES)))]]
        vision = torch.nn.functional.normalize(model.vision_model(pixel_values=batch).pooler_output, dim=-1)
        text = torch.nn.functional.normalize(model.text_model(input_ids=ids).pooler_output, dim=-1)
        logits = vision @ text.T * model.logit_scale.exp() + model.logit_bias
        signs = truth[torch.from_numpy(numbers[chosen])].float() * 2 - 1
        loss = -torch.nn.functional.logsigmoid(signs * logits).sum(dim=-1).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step} loss {loss.item():.4f} {time.perf_counter() - started:.0f} s", flush=True)
    model.eval()
    write_checkpoint(model, spiece, directory)


def evaluate(directory: Path, seed: int, count: int) -> None:
    """Print the accuracy on held-out images, and the scores of right and wrong labels."""
    encoder = Encoder(pin_model(ModelConfig(source=str(directory), compile=False)))
    pixels, numbers = render_images(seed, count)
    embeddings = encoder.embed_images(pixels)
    rows = np.arange(count)
    for template in TEMPLATES:
        texts = encoder.embed_labels(LabelSet(names=LABELS, templates=(template,)))
        scores = sigmoid(score_pairs(embeddings, texts, encoder.scale))
        right = scores[rows, numbers]
        wrong = np.sort(np.where(np.eye(len(LABELS), dtype=bool)[numbers], 0, scores).max(axis=1))
        print(
            f"{template!r}: top-1 {(scores.argmax(axis=1) == numbers).mean():.4f} of {count}; right label scores "
            f"{np.quantile(right, 0.01):.3f} (1 %) {np.median(right):.3f} (median); best wrong label "
            f"{np.median(wrong):.3f} (median) {np.quantile(wrong, 0.99):.3f} (99 %)"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="folder of the checkpoint: to write, or to evaluate")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--images", type=int, default=40_000)
    parser.add_argument("--evaluate-only", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    if not arguments.evaluate_only:
        train(arguments.directory, arguments.seed, arguments.steps, arguments.images)
    evaluate(arguments.directory, arguments.seed + 1, 4000)
