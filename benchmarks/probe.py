"""Simulation of `sightline probe`: how often a probe is kept where nothing beats the prompts, and where a probe does.

    python -m benchmarks.probe --repetitions 200

The images have embeddings whose variance lies in a few directions, as a model's have, and a logit along one of them.
Without an effect, an answer is right with a probability that depends on the logit alone, so that no probe can be better
than the prompts. With an effect, a direction without correlation to the logit counts too; `true gain` is then the mean
difference in average precision of the trained probe and the prompts over the images without an answer. `stratified`
answers are drawn more often from high scores, with weights.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score

from curation.estimates.confidence import Doubles
from curation.quality.probe import LEVEL, MIN_ANSWERS, Comparison, compare
from curation.quality.regression import Examples

IMAGES, WIDTH = 4000, 64
SETTINGS = [(40, 0.3), (40, 0.5), (100, 0.15), (100, 0.4), (300, 0.1), (300, 0.3)]
"""Answers of a label, and about the share of them that is right."""
GAIN = 0.01


@dataclass(frozen=True)
class Drawn:
    """One simulated label: its answers, the number of images that each stands for, and the images without an answer."""

    examples: Examples
    weight: Doubles
    embeddings: Doubles  # (images, WIDTH)
    logits: Doubles  # (images,)
    right: NDArray[np.bool_]  # (images,)

    def compare(self) -> Comparison:
        """The comparison of `sightline probe`."""
        return compare(self.examples, np.arange(len(self.weight)), self.weight)

    def measure_gain(self, strength: float) -> float:
        """The difference in average precision of a probe of all answers and the prompts, over the other images."""
        weights, slope, bias = self.examples.fit(strength)
        probed = self.embeddings @ weights + slope * self.logits + bias
        return float(average_precision_score(self.right, probed) - average_precision_score(self.right, self.logits))


def draw_label(answers: int, share: float, effect: float, stratified: bool, seed: int) -> Drawn:
    """Draw a label with about these answers. It is drawn again until `MIN_ANSWERS` are right and as many are wrong."""
    random = np.random.default_rng([answers, int(1000 * share), stratified, seed])
    while True:
        embeddings, logits, other = _draw_images(random)
        signal = 0.7 * logits + effect * other
        bias = _find_bias(signal, share / 4 if stratified else share)
        right = random.random(IMAGES) < 1 / (1 + np.exp(-signal - bias))
        drawn, weight = _draw_answers(random, logits, answers, stratified)
        if MIN_ANSWERS <= right[drawn].sum() <= len(drawn) - MIN_ANSWERS:
            examples = Examples(embeddings[drawn], logits[drawn], right[drawn], np.ones(len(drawn)))
            others = np.setdiff1d(np.arange(IMAGES), drawn)
            return Drawn(examples, weight, embeddings[others], logits[others], right[others])


def is_kept(compared: Comparison) -> bool:
    """Whether `sightline probe` keeps this probe, with its default `--gain`."""
    return compared.after >= compared.before + GAIN and compared.chance <= LEVEL


def _draw_images(random: np.random.Generator) -> tuple[Doubles, Doubles, Doubles]:
    spread = np.arange(1, WIDTH + 1) ** -0.5
    axes = np.linalg.qr(random.standard_normal((WIDTH, WIDTH)))[0]
    centre = random.standard_normal(WIDTH) / np.sqrt(WIDTH)
    embeddings = (random.standard_normal((IMAGES, WIDTH)) * spread / np.linalg.norm(spread)) @ axes.T + centre
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    prompt, hidden = (axes[:, :10] @ random.standard_normal(10) for _ in range(2))
    own, other = embeddings @ prompt, embeddings @ hidden
    own = (own - own.mean()) / own.std()
    other -= np.polyval(np.polyfit(own, other, 1), own)
    return embeddings, 3 * own - 6, other / other.std()


def _find_bias(signal: Doubles, share: float) -> float:
    """The bias for which this share of the images is right."""
    from scipy.optimize import brentq

    return float(brentq(lambda bias: (1 / (1 + np.exp(-signal - bias))).mean() - share, -50, 50))


def _draw_answers(
    random: np.random.Generator, logits: Doubles, answers: int, stratified: bool
) -> tuple[NDArray[np.int64], Doubles]:
    if not stratified:
        return random.choice(IMAGES, answers, replace=False), np.ones(answers)
    strata = np.split(np.argsort(logits), [int(0.6 * IMAGES), int(0.9 * IMAGES)])
    counts = [round(answers * part) for part in (0.2, 0.3, 0.5)]
    drawn = [random.choice(stratum, count, replace=False) for stratum, count in zip(strata, counts, strict=True)]
    weight = [np.full(count, len(stratum) / count) for stratum, count in zip(strata, counts, strict=True)]
    return np.concatenate(drawn), np.concatenate(weight)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--effects", type=float, nargs="+", default=[0, 3])
    parser.add_argument("--answers", type=int, nargs="+", default=[40, 100, 300])
    arguments = parser.parse_args()
    print("effect  answers  right  drawn       gain alone    kept  true gain")
    for effect in arguments.effects:
        for answers, share in SETTINGS:
            for stratified in (False, True) if answers in arguments.answers else ():
                labels = [draw_label(answers, share, effect, stratified, n) for n in range(arguments.repetitions)]
                compared = [label.compare() for label in labels]
                alone = np.mean([one.after >= one.before + GAIN for one in compared])
                kept = np.mean([is_kept(one) for one in compared])
                true = np.mean([label.measure_gain(one.strength) for label, one in zip(labels, compared, strict=True)])
                kind = "stratified" if stratified else "random"
                print(
                    f"{effect:6.0f}  {answers:7d}  {share:5.0%}  {kind:10s} {alone:10.1%}  {kept:6.1%}  {true:+9.3f}",
                    flush=True,
                )
