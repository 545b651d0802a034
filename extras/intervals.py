"""How far a difference of mAP holds for other splits and other test videos: bootstrap intervals.

extras/tables.py prints them. Not given in the paper.
"""
import numpy as np

from extras.analysis import paired, read_results, read_thresholds, rows_of_classes

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


def resampled(folders):
    """Average mAP of a row's runs, each on the same RESAMPLES draws of test videos.

    folders  of finished runs, one a seed, which share their test videos
    ->       (S, R)"""
    averages = []
    for folder in folders:
        truth, predictions = read_results(folder)
        pairs = paired(truth, predictions, read_thresholds(folder / "metrics.json"))
        drawn = np.random.default_rng(0).multinomial(
            len(truth), np.full(len(truth), 1 / len(truth)), size=RESAMPLES)  # (R, V)
        averages.append(average_mAPs(pairs, drawn))
    return np.stack(averages)


def interval(averages, others):
    """The 95 % interval of the mean of averages - others, over seeds and test videos.

    Each resample draws seeds as well, both with replacement; a percentile bootstrap.
    averages, others  (S, R), as resampled() has them, of the same seeds
    ->                its lower and upper end"""
    differences = averages - others
    seeds, resamples = differences.shape
    drawn = np.random.default_rng(0).integers(seeds, size=(seeds, resamples))
    means = np.take_along_axis(differences, drawn, axis=0).mean(0)
    return np.nanpercentile(means, MIDDLE)
