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
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np

from benchmarks.truths import PREVALENCES, KnownTruth, make_binormal, make_rendered
from curation.estimates.cells import ACCEPT, NOT_WRITTEN, WrittenRegions
from curation.estimates.confidence import Estimate
from curation.quality.calibration import calibrate, make_label_set, plan_round
from curation.quality.evaluation import evaluate
from curation.sampling.sample import Exclusion, Goal, Sample, draw_sample
from siglip.heads import build_head

TRUTHS: dict[str, Callable[[], KnownTruth]] = {"synthetic": make_binormal, "rendered": make_rendered}
ANSWERS = (30, 100, 300)
WRONG = (0.0, 0.02)
PURPOSES = ("precision", "evaluation", "two rounds")
METRICS = ("precision", "recall", "f1", "prevalence")
TARGET = 0.9


@dataclass(frozen=True)
class Case:
    """One cell of the tables."""

    truth: str
    purpose: str
    answers: int
    wrong: float
    forecast: bool = False


@cache
def load(name: str) -> KnownTruth:
    """The truth of this name, made once in each process."""
    return TRUTHS[name]()


def repeat(case: Case, seed: int) -> list[tuple[str, float]]:
    """One repetition: observations by name. Whether an interval covers, or a promise is kept, is 1 or 0."""
    known = load(case.truth)
    goal = Goal("evaluation") if case.purpose == "evaluation" else Goal("precision", TARGET)
    random = np.random.default_rng([seed, 7])
    if case.purpose == "two rounds":
        return list(_judge_rounds(known, case, seed, random))
    sample = draw_sample(known.output, case.answers, seed, goal)
    truth = known.answer(case.wrong, random, sample)
    found = list(_judge_intervals(known, evaluate(known.output, truth, most_suspects=0)))
    if case.purpose == "precision":
        found += _judge_thresholds(known, calibrate(known.output, truth, TARGET))
    return found


def _judge_rounds(known: KnownTruth, case: Case, seed: int, random: np.random.Generator) -> Iterator[tuple[str, float]]:
    """Four tenths of the answers first, then the others where they are needed: `sightline sample --more`.

    Also whether the forecast after the first round comes true: how many answers of the second round are needed in fact,
    as a multiple of the forecast.
    """
    output = known.output
    first = draw_sample(output, round(0.4 * case.answers), seed, Goal("precision", TARGET))
    truth = known.answer(case.wrong, random, first)
    before = calibrate(output, truth, TARGET)
    plan = plan_round(output, truth, TARGET)
    samples = [first]
    if plan.from_scores:
        excluded = Exclusion(first.position, first.label)
        more = case.answers - round(0.4 * case.answers)
        scores = plan.from_scores
        samples.append(draw_sample(output, more, seed + 10**6, from_scores=scores, exclude=excluded))
    truth = known.answer(case.wrong, random, *samples)
    yield from _judge_thresholds(known, calibrate(output, truth, TARGET))
    if case.forecast and plan.from_scores:
        yield from _judge_forecasts(known, case, seed, before, plan.from_scores, first)


def _judge_forecasts(
    known: KnownTruth, case: Case, seed: int, before: object, scores: dict[int, float], first: Sample
) -> Iterator[tuple[str, float]]:
    """How many more answers are needed until the target is reached, by the forecast. At most five times as many."""
    rows = [row for row, one in enumerate(before) if row in scores]  # type: ignore[arg-type, var-annotated]
    most = min(5 * max(before[row].forecast.more for row in rows), 600)  # type: ignore[index]
    excluded = Exclusion(first.position, first.label)
    second = draw_sample(known.output, most, seed + 10**6, from_scores=scores, exclude=excluded)
    rank = np.arange(len(second.label)) - np.searchsorted(second.label, second.label)
    needed = dict.fromkeys(rows, math.inf)
    for count in np.unique(np.geomspace(3, most, 20).astype(int)):
        part = replace(second, position=second.position[rank < count], label=second.label[rank < count])
        random = np.random.default_rng([seed, 8])
        truth = known.answer(case.wrong, random, first, part)
        for row, one in enumerate(calibrate(known.output, truth, TARGET)):
            if row in needed and one.accept is not None:
                needed[row] = min(needed[row], count)
    for row in rows:
        yield "needed / forecast", needed[row] / before[row].forecast.more  # type: ignore[index]


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
        name = min(PREVALENCES, key=lambda value: abs(math.log(value / share)))
        yield f"reached {name:.2%}", float(one.accept is not None)
        if one.accept is not None:
            accepted = region[row] == ACCEPT
            yield "kept", float(known.right[accepted, row].mean() >= TARGET)
            yield f"found {name:.2%}", float(known.right[accepted, row].sum() / known.right[:, row].sum())


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
    parser.add_argument("--purposes", nargs="+", choices=PURPOSES, default=PURPOSES)
    arguments = parser.parse_args()
    cases = [
        Case(truth, purpose, answers, wrong, purpose == "two rounds" and answers == 100 and not wrong)
        for truth in arguments.truths
        for purpose in arguments.purposes
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
                middle = np.median if name.startswith("needed") else np.mean
                print(f"    {name:32s} {middle(observed[name]):6.3f}  of {len(observed[name]):6,}", flush=True)


if __name__ == "__main__":
    main()
