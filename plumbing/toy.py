"""Toy data: synthetic videos with what makes the real task hard."""
import math

import numpy as np

from plumbing.forms import Annotation


def toy_video(rng, looks, classes, subset):
    """A synthetic video: features (T, D) and Annotation.

    looks of what happens in it, (K + 3, D): the K classes and background that resembles them."""
    T = rng.integers(224, 353)
    x = np.zeros((T, looks.shape[1]))
    steps = np.arange(T)
    segments = []
    labels = []
    start = 4.0
    while True:
        start += rng.uniform(3, 12)
        end = start + math.exp(rng.uniform(math.log(4), math.log(40)))
        if end > T - 4:
            break
        k = rng.integers(len(looks))
        inside = np.minimum(steps - start, end - steps)
        clear = 1 / (1 + np.exp(-inside / 0.7))[:, None]  # blurred boundaries
        x += clear * looks[k]
        if k < len(classes):
            segments.append([start, end])
            labels.append(classes[k])
        start = end
    walk = np.cumsum(rng.normal(size=x.shape), 0) * 0.05
    strength = rng.uniform(0.7, 1.3)
    appearance = rng.normal(size=x.shape[1]) * 0.4
    x = x * strength + appearance + walk + rng.normal(size=x.shape)
    segments = np.array(segments).reshape(-1, 2)
    return x.astype(np.float32), Annotation(subset, float(T), 1.0, segments, labels)


def toy_videos(seed, train=40, test=24, pairs=3, dim=32):
    """Synthetic videos: ({id: Annotation}, {id: features (T, dim)}), 1 s = 1 step.

    What makes the real task hard is in them: classes come in pairs that look alike, a third of
    what happens is background that looks like the mean of a pair, boundaries are blurred,
    durations spread over several pyramid levels, and each video has its own appearance."""
    rng = np.random.default_rng([seed, 0])
    alike = rng.normal(size=(pairs, dim))
    own = rng.normal(size=(2 * pairs, dim))
    looks = np.concatenate([np.repeat(alike, 2, 0) + 0.7 * own, 0.8 * alike])
    classes = [f"class {pair} {letter}" for pair in range(pairs) for letter in "ab"]
    annotations = {}
    features = {}
    for number in range(train + test):
        name = f"toy_{number:03d}"
        subset = "training" if number < train else "validation"
        features[name], annotations[name] = toy_video(rng, looks, classes, subset)
    return annotations, features
