"""The split: which of the annotated training videos are labelled."""
import math
from itertools import compress
from pathlib import Path

import numpy as np

from plumbing import forms
from plumbing.settings import SPLITS
from plumbing.words import BadInput


def stratify(order, labels, count):
    """`count` of the ids `order`, each time the one with the most classes not yet drawn.

    labels: {id: set of classes}. When every class that is left has been drawn, a round begins."""
    classes = sorted(set().union(*labels.values()))
    has = np.array([np.isin(classes, list(labels[name])) for name in order])
    whole = has.sum(1)  # classes of a video; -1 of one that is chosen
    new = whole.copy()  # of them, those not yet drawn
    covered = np.zeros(len(classes), dtype=bool)
    chosen = []
    while len(chosen) < count:
        best = new.argmax()
        if covered.any() and new[best] == 0:
            covered[:] = False
            new = whole.copy()
            continue
        chosen.append(order[best])
        new -= has[:, has[best] & ~covered].sum(1)
        covered |= has[best]
        new[best] = whole[best] = -1
    return chosen


def split_videos(videos, ratio, split, seed):
    """The labelled ids of the annotated training videos {id: Annotation}.

    split   "uniform" or "" draws round(ratio * n) at random, "stratified" as many, the classes in
            turn; a file names them: our split.json, a JSON list, or one id a line (an id may carry
            the prefix v_)
    Raises BadInput if none is selected or one is unknown."""
    if split not in SPLITS:
        return forms.read_split(Path(split), videos)
    names = sorted(videos)
    count = round(ratio * len(names))
    if not 0 < count <= len(names):
        raise BadInput(f"a share of {ratio} (--ratio) selects {count} of {len(names)} annotated "
                       "training videos; it must select between 1 and all")
    rng = np.random.default_rng([seed, 1])
    order = [names[i] for i in rng.permutation(len(names))]
    if split != "stratified":
        return sorted(order[:count])
    labels = {name: {*compress(a.labels, forms.good_segments(a, a.duration or math.inf))}
              for name, a in videos.items()}
    return sorted(stratify(order, labels, count))
