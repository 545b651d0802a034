"""How far a difference of mAP holds for other splits and other test videos: bootstrap intervals.

    python -m extras.intervals runs/a runs/b              a minus b, on the same test videos
    python -m extras.intervals runs/a0,runs/a1 runs/b0,runs/b1    of two seeds
    python -m extras.intervals a,a b,b c,c d,d            a minus b, c minus d, and their mean

Not given in the paper; extras/tables.py prints it for its rows.
"""
import statistics
import sys
from pathlib import Path

import numpy as np

from extras.analysis import (
    instances_of_all,
    paired,
    read_object,
    read_results,
    read_thresholds,
    read_videos,
    rows_of_classes,
)
from plumbing.runs import guard
from plumbing.settings import Parser
from plumbing.words import BadInput, several

RESAMPLES = 1000
MIDDLE = (2.5, 97.5)  # percentiles: 95 %


def average_mAPs(pairs, weights):
    """Average mAP of test sets in which each video stands as often as its weight says.

    A class without an instance there does not count, as in evaluate.mean_average_precision().
    Copies of a video stand at one rank, whose last has the largest precision, which interpolation
    takes for all.
    pairs    of extras/analysis.py
    weights  (R, V) whole numbers
    ->       (R,), NaN where no instance is left"""
    total = np.zeros(len(weights))
    classes = np.zeros(len(weights))
    for c, rows in rows_of_classes(pairs, pairs.positives):
        positives = weights[:, pairs.truth.video[pairs.truth.label == c]].sum(1)  # (R,)
        copies = weights[:, pairs.found.video[rows]]  # (R, M)
        ranks = copies.cumsum(1).clip(min=1)
        for hits in pairs.hits[:, rows]:
            tp = copies * hits
            precision = tp.cumsum(1) / ranks
            highest = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
            total += (tp * highest).sum(1) / positives.clip(min=1)
        classes += positives > 0
    with np.errstate(invalid="ignore"):
        return total / (classes * len(pairs.tious))


def seed_of(folder):
    """The seed of a run."""
    return read_object(folder / "config.json").get("seed")


def average_of(folder):
    """The average mAP of a finished run."""
    return read_object(folder / "metrics.json")["average_mAP"]


def resampled(folders, seed=0):
    """Average mAP of finished runs, each on the same RESAMPLES draws of test videos.

    folders  one a seed, which share their test videos; raises BadInput if not
    seed     of the draws: other data sets are drawn apart
    ->       (S, R)"""
    averages = []
    tious = {tuple(read_thresholds(folder / "metrics.json")) for folder in folders}
    if len(tious) > 1:
        raise BadInput(f"{folders[0]} and others were evaluated at other tIoU thresholds")
    for folder in folders:
        truth, predictions = read_results(folder, read_videos(folder / "videos.json"))
        tested = list(truth), instances_of_all(truth)
        if folder == folders[0]:
            first = tested
        if tested != first:
            raise BadInput(f"{folder} and {folders[0]} have other test videos, or other "
                           "annotations of them")
        pairs = paired(truth, predictions, *tious)
        drawn = np.random.default_rng([0, seed]).multinomial(
            len(truth), np.full(len(truth), 1 / len(truth)), size=RESAMPLES)  # (R, V)
        averages.append(average_mAPs(pairs, drawn))
    return np.stack(averages)


def resampled_difference(averages, others, seed=0):
    """The mean of averages - others on each draw of test videos and seeds, with replacement.

    averages, others  (S, R), as resampled() has them, of the same seeds
    seed              of the draws of seeds, as resampled() has it
    ->                (R,)"""
    differences = averages - others
    seeds, resamples = differences.shape
    drawn = np.random.default_rng([1, seed]).integers(seeds, size=(seeds, resamples))
    return np.take_along_axis(differences, drawn, axis=0).mean(0)


def interval(values):
    """The ends of the middle 95 % of resampled values (R,)."""
    return np.nanpercentile(values, MIDDLE)


def interval_text(difference, values):
    """A difference and the interval of its resampled values, in percent."""
    low, high = 100 * interval(values)
    return f"{100 * difference:+.1f} ({low:.1f} to {high:.1f})"


def compare(ones, others, number):
    """By how much some runs are better than others of the same seeds: the mean, and (R,) values.

    number  of their data set, which is drawn apart from others"""
    if len(ones) != len(others):
        raise BadInput(f"{len(ones)} runs are compared with {len(others)}: name a run of each seed "
                       "on either side")
    seeds, other = ([seed_of(run) for run in side] for side in (ones, others))
    if seeds != other or len(set(seeds)) < len(seeds):
        raise BadInput(f"runs are compared seed by seed, a run a seed: {several(seeds)} with "
                       f"{several(other)}")
    averages = np.split(resampled([*ones, *others], number), 2)
    values = resampled_difference(*averages, number)
    return statistics.mean(average_of(a) - average_of(b) for a, b in zip(ones, others)), values


def main(argv=None):
    """The command line; returns the exit code, 2 for bad input."""
    with guard() as stop:
        parser = Parser(__name__)
        parser.add_argument("runs", nargs="+", help="folders of runs, those of many seeds with "
                            "commas: ones, others; ones, others of another data set; ...")
        sides = [[Path(name) for name in side.split(",")] for side in parser.parse_args(argv).runs]
        if len(sides) % 2:
            raise BadInput("runs are compared in pairs: an even number of sides")
        pairs = zip(sides[::2], sides[1::2])
        found = [compare(*pair, number) for number, pair in enumerate(pairs)]
        for side, (difference, values) in zip(sides[::2], found):
            print(f"{side[0]}: {interval_text(difference, values)}")
        differences, values = zip(*found)
        print(f"mean: {interval_text(statistics.mean(differences), np.mean(values, 0))}")
    return stop.code


if __name__ == "__main__":
    sys.exit(main())
