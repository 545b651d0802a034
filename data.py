"""Data: ActivityNet-style annotations and feature files -> labelled, unlabelled and test videos; the toy data.

This file alone knows seconds, JSON, file names and which videos are labelled. An unlabelled video has no label field, and
its crop is label-blind. Files from outside are read without executing anything. Bad input raises BadInput: one sentence
that names the file, the video and the value.
"""
import json
import math
import sys
import zipfile
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence


class BadInput(Exception):
    """Input from outside that cannot be used; the message is one sentence for the user."""


# Where a published dataset lies below --root, in the layout of the public ActionFormer, which also offers its features.
LAYOUTS = {
    "thumos": ("annotations/thumos14.json", "i3d_features"),
    "activitynet": ("annotations/anet1.3_i3d_filtered.json", "i3d_features"),
    "epic-verb": ("annotations/epic_kitchens_100_verb.json", "features"),
    "epic-noun": ("annotations/epic_kitchens_100_noun.json", "features"),
}
ORIGIN = "the README of the public ActionFormer (github.com/happyharrycn/actionformer_release) says where the features come from"


# ---- Seconds <-> grid -----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Grid:
    """The feature grid of a video: frames a second, frames between features, frames a feature sees."""
    fps: float
    stride: float
    frames: float

    def to_grid(self, t):
        """Seconds -> grid steps: g = (t * fps - frames / 2) / stride."""
        return (t * self.fps - self.frames / 2) / self.stride

    def to_seconds(self, g):
        """Grid steps -> seconds, the inverse of to_grid."""
        return (g * self.stride + self.frames / 2) / self.fps

    def span(self, steps):
        """Seconds from the start of the first feature to the end of the last of `steps`."""
        return ((steps - 1) * self.stride + self.frames) / self.fps


# ---- Annotations ----------------------------------------------------------------------------------------------------

@dataclass
class Annotation:
    """A video as its annotation file has it: segments (N, 2) in seconds, labels N names."""
    subset: str
    duration: float | None
    fps: float | None
    segments: np.ndarray
    labels: list
    label_ids: list = field(default_factory=list)


def read_json(path, what):
    """The content of a JSON file; raises BadInput if it is missing or no JSON. `what` names it in the message."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{what} not found: {path}") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{what} {path} cannot be read as JSON: {error}") from None


def _number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def read_annotations(path):
    """{video id: Annotation} of an ActivityNet-style JSON. Raises BadInput for what is not of that form."""
    content = read_json(path, "annotation file")
    if not isinstance(content, dict) or not isinstance(content.get("database"), dict):
        raise BadInput(f"annotation file {path} has no \"database\" of videos")
    videos = {}
    for name, entry in content["database"].items():
        where = f"annotation file {path}, video {name}:"
        if not isinstance(entry, dict) or not isinstance(entry.get("annotations", []), list):
            raise BadInput(f"{where} the entry must hold \"subset\" and a list of \"annotations\"")
        for key in ("duration", "fps"):
            if entry.get(key) is not None and not (_number(entry[key]) and entry[key] > 0):
                raise BadInput(f"{where} {key} must be a positive number, not {entry[key]!r}")
        segments, labels, ids = [], [], []
        for item in entry.get("annotations", []):
            segment = item.get("segment") if isinstance(item, dict) else None
            if not (isinstance(segment, list) and len(segment) == 2 and all(map(_number, segment))):
                raise BadInput(f"{where} a segment must be [start, end] in seconds, not {segment!r}")
            if item.get("label") is None:
                raise BadInput(f"{where} the segment {segment} has no label")
            segments.append(segment), labels.append(str(item["label"])), ids.append(item.get("label_id"))
        videos[name] = Annotation(str(entry.get("subset", "")), entry.get("duration"), entry.get("fps"),
                                  np.array(segments, dtype=np.float64).reshape(-1, 2), labels, ids)
    return videos


def good_segments(a, duration):
    """Which segments of an Annotation end after they start and lie at least half inside the video, (N,) bool."""
    starts, ends = a.segments.T
    inside = np.minimum(ends, duration) - np.maximum(starts, 0)
    return (ends > starts) & (inside >= 0.5 * (ends - starts))


def class_names(annotations):
    """Class names in the order of their label_id (numbers, or strings of numbers), else by name."""
    ids = {}
    for a in annotations:
        for label, number in zip(a.labels, a.label_ids or [None] * len(a.labels)):
            ids.setdefault(label, set()).add(str(number))
    if all(len(number) == 1 and next(iter(number)).isdigit() for number in ids.values()):
        return sorted(ids, key=lambda label: (int(next(iter(ids[label]))), label))
    return sorted(ids)


# ---- Splits ---------------------------------------------------------------------------------------------------------

def _read_split(path, videos):
    if path.suffix == ".json":
        content = read_json(path, "split file")
        ids = content.get("labelled") if isinstance(content, dict) else content
    else:
        try:
            ids = path.read_text(encoding="utf-8").split()
        except (OSError, ValueError) as error:
            raise BadInput(f"split file {path} cannot be read: {error}") from None
    if not isinstance(ids, list) or not ids or not all(isinstance(i, str) for i in ids):
        raise BadInput(f"split file {path} selects no labelled video; it must list their ids")
    ids = [i if i in videos else i.removeprefix("v_") for i in ids]
    unknown = [i for i in ids if i not in videos]
    if unknown:
        raise BadInput(f"split file {path} names {unknown[0]}, which is no training video")
    return sorted(set(ids))


def split_videos(videos, ratio, split, seed):
    """The labelled ids of the training videos {id: Annotation}.

    split "uniform" draws round(ratio * n) at random; "stratified" draws as many, each time a video with the most classes not
    yet drawn in this round; a file names them: our split.json, a JSON list, or one id a line (an id may carry the prefix
    v_). Raises BadInput if none is selected or one is unknown."""
    names, rng = sorted(videos), np.random.default_rng([seed, 1])
    if split not in ("uniform", "stratified"):
        return _read_split(Path(split), videos)
    count = round(ratio * len(names))
    if not 0 < count <= len(names):
        raise BadInput(f"--ratio {ratio} selects {count} of {len(names)} training videos; it must select between 1 and all")
    order = [names[i] for i in rng.permutation(len(names))]
    if split == "uniform":
        return sorted(order[:count])
    labels = {n: {l for l, good in zip(a.labels, good_segments(a, a.duration or math.inf)) if good} for n, a in videos.items()}
    chosen, covered = [], set()
    while len(chosen) < count:
        best = max(order, key=lambda name, covered=covered: len(labels[name] - covered))
        if covered and not labels[best] - covered:  # every class that is left has been drawn: the next round
            covered = set()
            continue
        order.remove(best), chosen.append(best)
        covered |= labels[best]
    return sorted(chosen)


# ---- Toy data -------------------------------------------------------------------------------------------------------

def toy_videos(seed, train=40, test=24, pairs=3, dim=32):
    """Synthetic videos made from the seed: ({id: Annotation}, {id: features (T, dim)}), 1 s = 1 step.

    What makes the real task hard is in them: classes come in pairs that look alike, half of the background looks like the mean of
    a pair, boundaries are blurred, durations spread over several pyramid levels, and each video has its own appearance."""
    rng = np.random.default_rng([seed, 0])
    shared, own = rng.normal(size=(pairs, dim)), rng.normal(size=(2 * pairs, dim))
    looks = np.repeat(shared, 2, 0) + 0.7 * own  # (K, dim)
    annotations, source = {}, {}
    for number in range(train + test):
        T, at, segments, labels = int(rng.integers(224, 353)), 4.0, [], []
        x = np.zeros((T, dim))
        while True:
            at += rng.uniform(3, 12)
            end = at + math.exp(rng.uniform(math.log(4), math.log(40)))
            if end > T - 4:
                break
            k = int(rng.integers(3 * pairs))  # the last third of the draws: background that looks like action
            clear = 1 / (1 + np.exp(-np.minimum(np.arange(T) - at, end - np.arange(T)) / 0.7))[:, None]  # blurred boundaries
            x += clear * (looks[k] if k < 2 * pairs else 0.8 * shared[k - 2 * pairs])
            if k < 2 * pairs:
                segments.append([at, end]), labels.append(f"class {k // 2} {'ab'[k % 2]}")
            at = end
        walk = np.cumsum(rng.normal(size=(T, dim)), 0) * 0.05
        x = x * rng.uniform(0.7, 1.3) + rng.normal(size=dim) * 0.4 + walk + rng.normal(size=(T, dim)) * 1.0
        name = f"toy_{number:03d}"
        annotations[name] = Annotation("training" if number < train else "validation", float(T), 1.0,
                                       np.array(segments).reshape(-1, 2), labels)
        source[name] = x.astype(np.float32)
    return annotations, source


# ---- Features -------------------------------------------------------------------------------------------------------

@dataclass
class Video:
    """A video without labels: unlabelled or test. `source` is a feature file or an array (T, D); `steps` is T on the grid, where
    a resized video has another T than its source."""
    id: str
    source: Path | np.ndarray
    key: str
    grid: Grid
    steps: int
    duration: float
    resized: bool


@dataclass
class LabelledVideo(Video):
    """A labelled video: segments (N, 2) in grid steps and labels (N,) besides."""
    segments: torch.Tensor
    labels: torch.Tensor


def blind(video):
    """The same video as an unlabelled one: no label field."""
    return Video(video.id, video.source, video.key, video.grid, video.steps, video.duration, video.resized)


def read_features(source, key, name):
    """Features (T, D) of a .npy file, of the array `key` of a .npz file (memory-mapped where possible) or of an array.

    Raises BadInput if the file is missing, truncated, pickled, of another shape or empty."""
    if isinstance(source, np.ndarray):
        return source
    try:
        feats = np.load(source, mmap_mode="r", allow_pickle=False)
        if isinstance(feats, np.lib.npyio.NpzFile):
            with feats as arrays:
                feats = arrays[key]
    except FileNotFoundError:
        raise BadInput(f"video {name}: feature file not found: {source}") from None
    except KeyError:
        raise BadInput(f"video {name}: feature file {source} holds no array named {key!r} (--feature-key)") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise BadInput(f"video {name}: feature file {source} cannot be read as an array: {error}") from None
    if feats.ndim != 2 or len(feats) == 0 or not np.issubdtype(feats.dtype, np.number):
        raise BadInput(f"video {name}: feature file {source} must hold numbers of shape (T, D), not {feats.dtype} {feats.shape}")
    return feats


def open_video(name, a, source, s, index, path, labelled):
    """The Video of an annotation, or LabelledVideo: reads its features once to check them. Returns it with the sums
    (steps, sum, sum of squares) over its features for standardisation. Raises BadInput for NaN or infinity, a segment that is
    empty or outside, and a missing fps."""
    feats = read_features(source, s.feature_key, name)
    total, square = np.zeros(feats.shape[1]), np.zeros(feats.shape[1])
    for at in range(0, len(feats), 4096):  # a long video is never held as a whole
        part = np.asarray(feats[at:at + 4096], dtype=np.float64)
        if not np.isfinite(part).all():
            step = int(np.argwhere(~np.isfinite(part))[0, 0])
            raise BadInput(f"video {name}: feature file {source} holds {part[step][~np.isfinite(part[step])][0]} at step {at + step}")
        total, square = total + part.sum(0), square + (part ** 2).sum(0)
    fps = s.fps or a.fps
    if not fps:
        raise BadInput(f"annotation file {path}, video {name}: it has no fps; give --fps")
    steps, grid = len(feats), Grid(fps, s.stride, s.frames)
    span = grid.span(steps)
    duration = a.duration or span
    if s.resize:  # the whole video on a fixed number of steps, as ActionFormer does for ActivityNet
        stride = ((steps - 1) * s.stride + s.frames) / s.resize
        steps, grid = s.resize, Grid(fps, stride, stride)
    good = good_segments(a, duration)
    if s.bad_segments == "error" and not good.all():  # THUMOS14 and ActivityNet hold some, left out in training
        raise BadInput(f"annotation file {path}, video {name}: the segment {a.segments[~good][0].tolist()} ends before it starts or "
                       f"lies outside the video (duration {duration}); --bad-segments skip leaves such segments out")
    video = Video(name, source, s.feature_key, grid, steps, duration, bool(s.resize))
    if labelled:
        segments = grid.to_grid(np.clip(a.segments[good], 0, duration))
        video = LabelledVideo(**vars(video), segments=torch.tensor(segments, dtype=torch.float32),
                              labels=torch.tensor([index[l] for l, ok in zip(a.labels, good) if ok], dtype=torch.long))
    return video, (len(feats), total, square)


def statistics(sums, standardize):
    """Mean and std (D,) over all steps of all training videos, from (steps, sum, sum of squares); 0 and 1 if switched off."""
    count, total, square = (sum(column) for column in zip(*sums))
    mean = total / count
    std = np.sqrt(np.maximum(square / count - mean ** 2, 0))
    if not standardize:
        mean, std = np.zeros_like(mean), np.ones_like(std)
    return torch.tensor(mean, dtype=torch.float32), torch.tensor(np.where(std > 1e-6, std, 1), dtype=torch.float32)


@dataclass
class Dataset:
    """Everything a run reads. ground_truth: {id: Annotation} of the test videos in seconds, for evaluation only;
    hidden: {id: LabelledVideo} of the unlabelled ones, filled for --audit alone; mean and std (D,) standardise the input."""
    classes: list
    labelled: list
    unlabelled: list
    test: list
    ground_truth: dict
    hidden: dict
    dim: int
    mean: torch.Tensor
    std: torch.Tensor
    missing: list


def locate(s):
    """The annotation file and the feature folder of the settings; raises BadInput if a published dataset lacks one."""
    if s.dataset in LAYOUTS:
        layout, folder = LAYOUTS[s.dataset]
        path, folder = Path(s.annotations or Path(s.root) / layout), Path(s.features or Path(s.root) / folder)
        for place in (path, folder):
            if not place.exists():
                raise BadInput(f"--dataset {s.dataset}: {place} is missing; expected are the annotations {path} and the features "
                               f"{folder}/{s.prefix}<id>{s.extension} (--root, or --annotations and --features, name other "
                               f"places); {ORIGIN}")
        return path, folder
    path = Path(s.annotations or s.dataset)
    return path, Path(s.features or path.parent / "features")


def load_dataset(s, trained=None):
    """The Dataset that the settings `s` name (the section "data" of train.Settings), every file read once and checked.

    `trained` (a checkpoint's {"classes", "mean", "std"}): open the test videos only, with those. Raises BadInput."""
    if s.dataset == "toy":
        path, annotations, source = "toy", *toy_videos(s.seed)
    else:
        path, folder = locate(s)
        annotations = read_annotations(path)
        source = {name: folder / f"{s.prefix}{name}{s.extension}" for name in annotations}
    subset = lambda wanted: {n: a for n, a in annotations.items() if a.subset.lower() == wanted.lower()}
    train, test = subset(s.train_subset), subset(s.test_subset)
    for wanted, found in ((s.train_subset, train), (s.test_subset, test)):
        if not found:
            raise BadInput(f"annotation file {path} has no video of the subset {wanted!r}, only of "
                           f"{sorted({a.subset for a in annotations.values()})} (--train-subset, --test-subset)")
    classes = trained["classes"] if trained else class_names([*train.values(), *test.values()])
    index = {label: i for i, label in enumerate(classes)}
    for name, a in (train | test).items():
        unknown = [label for label in a.labels if label not in index]
        if unknown:
            raise BadInput(f"annotation file {path}, video {name}: the label {unknown[0]!r} is unknown to the checkpoint")
    if not any(a.labels for a in test.values()):
        raise BadInput(f"annotation file {path}: the subset {s.test_subset!r} holds no instance to evaluate on")
    labelled_ids = set() if trained else set(split_videos(train, s.ratio, s.split, s.seed))
    opened, sums = {}, []
    for name, a in (test if trained else train | test).items():
        opened[name], sizes = open_video(name, a, source[name], s, index, path, name in train and (name in labelled_ids or s.audit))
        width = len(sums[0][1][1]) if sums else len(sizes[1])
        if len(sizes[1]) != width:
            raise BadInput(f"video {name}: feature file {source[name]} is {len(sizes[1])} wide, the others {width}")
        sums.append((name, sizes))
    off = [v for v in opened.values() if not 0.5 < v.grid.span(v.steps) / v.duration < 2]
    if off:
        print(f"warning: the features of {len(off)} videos span another time than their annotations, those of {off[0].id} "
              f"{off[0].grid.span(off[0].steps):.1f} s of {off[0].duration:.1f} s; are --stride, --frames and --fps right?",
              file=sys.stderr)
    if trained:
        mean, std = trained["mean"], trained["std"]
        if len(mean) != width:
            raise BadInput(f"the features of {path} are {width} wide, those of the checkpoint {len(mean)}")
    else:
        mean, std = statistics([sizes for name, sizes in sums if name in train], s.standardize)
    hidden = {n: opened[n] for n in sorted(train) if n not in labelled_ids} if s.audit and not trained else {}
    present = {classes[label] for name in labelled_ids for label in opened[name].labels.tolist()}
    return Dataset(classes, [opened[n] for n in sorted(labelled_ids)],
                   [] if trained else [blind(opened[n]) for n in sorted(train) if n not in labelled_ids],
                   [opened[n] for n in sorted(test)], test, hidden, width, mean, std, [c for c in classes if c not in present])


# ---- Items and batches ----------------------------------------------------------------------------------------------

def crop_segments(segments, start, length, keep):
    """Segments (N, 2) seen in the window of `length` steps from `start` (a step reaches half a step to either side): clipped and
    moved, with the boolean rows of which at least the share `keep` is left."""
    window = segments.clamp(start - 0.5, start + length - 0.5)
    left = window[:, 1] - window[:, 0]
    return window - start, (left > 0) & (left >= keep * (segments[:, 1] - segments[:, 0]))


def load_item(video, data, s, rng=None):
    """One video as tensors: {"id", "video", "feats" (T, D), "start"}, for a LabelledVideo also "segments" and "labels".

    With `rng` it is cropped at random, to at most s.max_steps and at least s.crop_min of its length; a labelled video tries
    s.crop_tries windows for one that holds an action (ActionFormer's crop), an unlabelled one takes the first: its crop cannot
    see labels. A resized video is never cropped."""
    feats = read_features(video.source, video.key, video.id)
    length, start, labelled = video.steps, 0, isinstance(video, LabelledVideo)
    if rng is not None and not video.resized:
        length = min(video.steps, s.max_steps)
        if length == video.steps:
            length = int(rng.integers(max(round(s.crop_min * length), 1), length + 1))
        for _ in range(s.crop_tries if labelled else 1):
            start = int(rng.integers(video.steps - length + 1))
            if labelled and crop_segments(video.segments, start, length, s.crop_keep)[1].any():
                break
        feats = feats[start:start + length]
    x = torch.from_numpy(np.array(feats, dtype=np.float32))
    if video.resized:
        x = F.interpolate(x.T[None], size=length, mode="linear", align_corners=False)[0].T
    item = {"id": video.id, "video": video, "feats": (x - data.mean) / data.std, "start": start}
    if labelled:
        segments, inside = crop_segments(video.segments, start, length, s.crop_keep)
        item |= {"segments": segments[inside], "labels": video.labels[inside]}
    return item


def collate(items):
    """Items -> {"videos", "feats" (B, T, D), "mask" (B, T), "starts"}, padded to the longest of the batch and no further;
    labelled ones also "segments" and "labels", lists of B."""
    feats = [item["feats"] for item in items]
    lengths = torch.tensor([len(x) for x in feats])
    batch = {"videos": [i["video"] for i in items], "feats": pad_sequence(feats, batch_first=True),
             "mask": torch.arange(int(lengths.max())) < lengths[:, None], "starts": [i["start"] for i in items]}
    if all("labels" in item for item in items):
        batch |= {key: [item[key] for item in items] for key in ("segments", "labels")}
    return batch


def ahead(load, plans):
    """load(plan) of every plan in turn; a thread loads the next two while the caller works on one."""
    with ThreadPoolExecutor(1) as thread:
        waiting = deque()
        for plan in plans:
            waiting.append(thread.submit(load, plan))
            if len(waiting) > 2:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def plan_batches(videos, s, steps, size, rng):
    """`steps` batches of `size` (index of a video, seed of its crop). Videos of like length share a batch, which saves padding: in
    each pass over all videos they are sorted by their length, randomly changed by a factor of about exp(+-s.length_noise), and cut
    into batches. Where the last would be short, two neighbours overlap, anywhere; fewer videos than `size` are repeated."""
    length = np.log([min(v.steps, s.max_steps) for v in videos])
    batches, count = [], -(-len(videos) // size)
    while len(batches) < steps:
        order = np.argsort(length + s.length_noise * rng.normal(size=len(videos)))
        order = np.resize(order, max(len(order), size))
        starts = size * np.arange(count)
        starts[rng.integers(1, max(count, 2)):] -= count * size - len(order)
        batches += [list(zip(order[start:start + size], rng.integers(2 ** 63, size=size))) for start in rng.permutation(starts)]
    return batches[:steps]


def training_batches(videos, data, s, steps, rng, rank=0, number=1):
    """`steps` batches of s.batch videos, cropped at random, loaded ahead: collate()'s, with "ids" of the whole batch.

    Each of `number` processes gets every number-th video, from `rank`, of a batch of number * s.batch."""
    def load(plan):
        mine = collate([load_item(videos[i], data, s, np.random.default_rng(seed)) for i, seed in plan[rank::number]])
        return mine | {"ids": [videos[i].id for i, _ in plan]}
    return ahead(load, plan_batches(videos, s, steps, s.batch * number, rng))
