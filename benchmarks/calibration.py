"""Simulation: do the intervals of `sightline evaluate` cover, and does `sightline calibrate` keep its promises?

    python -m benchmarks.calibration --repetitions 200

Two truths are known: 200,000 synthetic images with eight labels (`benchmarks.truths.make_binormal`), and 6,000 rendered
images with the shipped checkpoint (`make_rendered`). Each repetition draws a sample as `sightline sample` does, answers
it, with 0 or 2 % wrong answers, and looks at every printed figure. A figure that is not printed is not counted.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial

import numpy as np

from benchmarks.truths import KnownTruth, make_binormal
from curation.estimates.cells import ACCEPT, NOT_WRITTEN, WrittenRegions, weigh_answers
from curation.estimates.confidence import Estimate
from curation.quality.calibration import calibrate, make_label_set
from curation.quality.evaluation import evaluate
from curation.sampling.sample import Goal, draw_sample
from siglip.heads import build_head

TRUTHS = {"synthetic": make_binormal}
ANSWERS = (30, 100, 300)
WRONG = (0.0, 0.02)
METRICS = ("precision", "recall", "f1", "prevalence")
TARGET = 0.9


@dataclass(frozen=True)
class Case:
    """One cell of the tables."""

    truth: str
    purpose: str
    answers: int
    wrong: float


@cache
def load(name: str) -> KnownTruth:
    """The truth of this name, made once in each process."""
    return TRUTHS[name]()


def repeat(case: Case, seed: int) -> list[tuple[str, float]]:
    """One repetition: observations by name. A coverage is 1 or 0, a printed share likewise."""
    known = load(case.truth)
    goal = Goal("evaluation") if case.purpose == "evaluation" else Goal("precision", TARGET)
    sample = draw_sample(known.output, case.answers, seed, goal)
    truth = known.answer(sample, case.wrong, np.random.default_rng([seed, 7]))
    truth = weigh_answers(known.output, truth)
    found = list(_judge_intervals(known, evaluate(known.output, truth)))
    if case.purpose == "precision":
        found += _judge_thresholds(known, calibrate(known.output, truth, TARGET))
    return found


def _judge_intervals(known: KnownTruth, evaluation: object) -> Iterator[tuple[str, float]]:
    real, pooled = measure(known)
    for label in evaluation.labels:  # type: ignore[attr-defined]
        for metric in METRICS:
            yield from _judge(metric, getattr(label, metric), real[label.label][metric])
    for metric in ("micro_precision", "micro_recall", "micro_f1", "mean_f1"):
        yield from _judge(metric, getattr(evaluation, metric), pooled[metric])


def _judge(name: str, estimate: Estimate, real: float) -> Iterator[tuple[str, float]]:
    if math.isnan(real):
        return
    yield f"printed {name}", float(estimate.known)
    if estimate.known:
        yield f"covered {name}", float(estimate.low - 1e-12 <= real <= estimate.high + 1e-12)
        yield f"width {name}", estimate.high - estimate.low


def _judge_thresholds(known: KnownTruth, found: object) -> Iterator[tuple[str, float]]:
    labels = make_label_set(known.output, found)  # type: ignore[arg-type]
    output = known.output
    head = build_head(labels, output.head.vectors, output.table.scale, output.weights)
    regions = WrittenRegions(labels)
    every = np.arange(len(labels.names))
    region = np.concatenate([regions.assign(scores, every) for scores in output.scores(head)], axis=1)
    for row, one in enumerate(found):  # type: ignore[var-annotated, arg-type]
        share = known.right[:, row].mean()
        yield f"reached {share:.2%}", float(one.accept is not None)
        if one.accept is not None:
            accepted = region[row] == ACCEPT
            yield f"kept {share:.2%}", float(known.right[accepted, row].mean() >= TARGET)
            yield f"found {share:.2%}", float(known.right[accepted, row].sum() / known.right[:, row].sum())


@cache
def _measure(name: str) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    known = load(name)
    output = known.output
    every = np.arange(len(output.labels.names))
    regions = WrittenRegions(output.labels)
    written = np.concatenate([regions.assign(scores, every) for scores in output.scores()], axis=1) != NOT_WRITTEN
    hits, predicted = (written & known.right.T).sum(axis=1), written.sum(axis=1)
    positives = known.right.sum(axis=0)
    with np.errstate(invalid="ignore"):
        f1 = 2 * hits / (predicted + positives)
        figures = {"precision": hits / predicted, "recall": hits / positives, "f1": f1}
    figures["prevalence"] = positives / len(known.right)
    pooled = {
        "micro_precision": hits.sum() / predicted.sum(),
        "micro_recall": hits.sum() / positives.sum(),
        "micro_f1": 2 * hits.sum() / (predicted.sum() + positives.sum()),
        "mean_f1": float(np.mean(f1)),
    }
    names = output.labels.label_names()
    return {name: {key: float(of[row]) for key, of in figures.items()} for row, name in enumerate(names)}, pooled


def measure(known: KnownTruth) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """The real metrics of each label, and of all labels together."""
    return _measure(next(name for name in TRUTHS if load(name) is known))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--truths", nargs="+", choices=list(TRUTHS), default=list(TRUTHS))
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    cases = [
        Case(truth, purpose, answers, wrong)
        for truth in arguments.truths
        for purpose in ("precision", "evaluation")
        for answers in ANSWERS
        for wrong in WRONG
    ]
    with ProcessPoolExecutor(arguments.processes) as pool:
        for case in cases:
            observed = defaultdict(list)
            for found in pool.map(partial(repeat, case), range(arguments.repetitions), chunksize=5):
                for name, value in found:
                    observed[name].append(value)
            print(case, flush=True)
            for name in sorted(observed):
                print(f"    {name:32s} {np.mean(observed[name]):6.3f}  of {len(observed[name]):6,}", flush=True)


if __name__ == "__main__":
    main()
