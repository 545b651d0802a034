"""Data: annotations and feature files -> labelled, unlabelled and test videos, items, batches.

This file alone converts seconds to grid steps, reads and writes JSON, and knows which videos are
labelled. An unlabelled video has no label field, and its crop is label-blind. Files from outside
are read without executing anything. Bad input raises BadInput: one sentence that names the file,
the video and the value.
"""
import json
import math
import os
import sys
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import compress, zip_longest
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence


class BadInput(Exception):
    """Input from outside that cannot be used; the message is one sentence for the user."""


# Where a published dataset lies below --root, in the layout of the public ActionFormer.
LAYOUTS = {
    "thumos": ("annotations/thumos14.json", "i3d_features"),
    "activitynet": ("annotations/anet1.3_i3d_filtered.json", "i3d_features"),
    "epic-verb": ("annotations/epic_kitchens_100_verb.json", "features"),
    "epic-noun": ("annotations/epic_kitchens_100_noun.json", "features"),
}
ORIGIN = ("the README of the public ActionFormer (github.com/happyharrycn/actionformer_release) "
          "says where the features come from")


# ---- Settings -----------------------------------------------------------------------------------

RANGES = {
    "positive": (1e-12, 1e12),
    "not negative": (0, 1e12),
    "a share": (0, 1),
    "a share below 1": (0, 0.999),
    "finite": (-1e12, 1e12),
}


def setting(default, comment, allowed="not negative", stage="pretrain"):
    """A field of a settings class.

    comment  also the command line's help
    allowed  what a number may be, a name of RANGES, or a tuple of the words that it may be
    stage    the first stage that it matters in; "run" if it changes no result"""
    return field(
        default=default, metadata={"stage": stage, "allowed": allowed, "comment": comment})


from_stage_2 = partial(setting, stage="supervised")
from_stage_3 = partial(setting, stage="joint")
of_run = partial(setting, stage="run")


class CheckedSettings:
    """Base of the settings: refuses what a setting may not be with BadInput."""

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            allowed = f.metadata["allowed"]
            types = (int, float) if f.type is float else (f.type,)
            if type(value) not in types:
                raise BadInput(f"setting {f.name} must be of type {f.type.__name__}, not {value!r}")
            if isinstance(allowed, tuple) and value not in allowed:
                choices = ", ".join(allowed)
                raise BadInput(f"setting {f.name} must be one of {choices}, not {value!r}")
            if f.type in (int, float):
                least, most = RANGES[allowed]
                if not least <= value <= most:
                    raise BadInput(f"setting {f.name} must be {allowed}, but is {value}")


@dataclass(frozen=True)
class DataSettings(CheckedSettings):
    """Files, splits, crops and batches. [S] the paper, [A] the public ActionFormer, [J] neither."""
    dataset: str = setting(
        "toy", "toy, thumos, activitynet, epic-verb, epic-noun, or the path of an annotation JSON")
    root: str = setting(
        "",
        "folder of a published dataset, in ActionFormer's layout (default data/thumos and so on)")
    annotations: str = setting("", "annotation file, in place of the layout's")
    features: str = setting(
        "",
        "feature folder, in place of the layout's (of a JSON: the folder features beside it)")
    prefix: str = setting("", "what stands before a video's id in its feature file's name")
    extension: str = setting(".npy", "what stands after it")
    feature_key: str = setting("feats", "name of the array in .npz files")
    stride: float = setting(1.0, "frames between two features", "positive")
    frames: float = setting(1.0, "frames that a feature sees")
    fps: float = setting(0.0, "frames a second; 0: from the annotation")
    train_subset: str = setting("training", "subset of the training videos, in any letter case")
    test_subset: str = setting("validation", "subset of the test videos")
    bad_segments: str = setting(
        "error", "what a segment that is empty or outside its video does", ("error", "skip"))
    resize: int = setting(0, "resize every video to this number of steps; 0: keep its length")
    standardize: bool = setting(True, "standardise the input over all training videos [J]")
    ratio: float = setting(
        0.1, "share of labelled training videos [S: 0.1, 0.2, 0.4, 0.6]", "a share")
    split: str = setting("uniform", "uniform, stratified, or a file of labelled ids")
    seed: int = setting(0, "seed of everything: split, weights, batches, toy data")
    max_steps: int = setting(2304, "longest crop in training, in steps [A]", "positive")
    crop_min: float = setting(0.9, "shortest crop, as a share of the video [A]", "a share")
    crop_keep: float = setting(
        0.5, "share of a segment that a crop must hold to keep it [A]", "a share")
    crop_tries: int = setting(
        10, "windows tried for one that holds an action of a labelled video [J]", "positive")
    batch: int = setting(
        2, "videos a step and process; in stage 3 as many labelled and as many unlabelled [S]",
        "positive")
    length_noise: float = setting(
        0.3, "spread of the noise on log length by which videos are sorted into batches [J]")
    audit: bool = of_run(
        False, "report the pseudo labels' quality; reads hidden labels for this only")


# ---- Files --------------------------------------------------------------------------------------

def read_text(path, what):
    """The text of a file; `what` names it in the message. Raises BadInput."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadInput(f"{what} not found: {path}") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{what} {path} cannot be read: {error}") from None


def read_json(path, what):
    """The content of a JSON file; `what` names it in the message. Raises BadInput."""
    try:
        return json.loads(read_text(path, what))
    except ValueError as error:
        raise BadInput(f"{what} {path} cannot be read as JSON: {error}") from None


def write_atomically(path, write):
    """write(temporary path), then move it to `path`: never half-written."""
    temporary = Path(f"{path}.tmp")
    write(temporary)
    os.replace(temporary, path)


def write_json(path, content, indent=None):
    """Write JSON atomically."""
    text = json.dumps(content, indent=indent)
    write_atomically(path, lambda temporary: temporary.write_text(text))


def append_row(path, row):
    """Append a dict to a log of JSON lines."""
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def write_rows(path, content):
    """Write a log of JSON lines anew, atomically."""
    text = "".join(json.dumps(row) + "\n" for row in content)
    write_atomically(path, lambda temporary: temporary.write_text(text))


def read_rows(path):
    """The dicts of a log of JSON lines, [] where there is none, without a last line cut short."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


# ---- Processes that share a batch ---------------------------------------------------------------

def process_rank():
    """Which of the processes that torchrun started this one is; 0 alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def process_count():
    """How many processes torchrun started; 1 alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first():
    """Whether this is the process that writes and prints."""
    return process_rank() == 0


def share_of(items):
    """This process's share of the items: every process_count()-th, from its rank."""
    return items[process_rank()::process_count()]


def join_processes(device):
    """Join the processes that torchrun started; without torchrun nothing happens."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")


def sum_of_all(x):
    """The sum of a tensor over all processes.

    Its gradient is that of this process's part, so that gradients can be summed."""
    if process_count() == 1:
        return x
    whole = x.detach().clone()
    dist.all_reduce(whole)
    return x + (whole - x.detach())


def rows_of_all(x):
    """The rows (b, ...) of all processes in the order of the whole batch, (b * number, ...).

    Gradients reach this process's rows."""
    if process_count() == 1:
        return x
    mine = x.detach().contiguous()
    parts = [torch.empty_like(mine) for _ in range(process_count())]
    dist.all_gather(parts, mine)
    parts[process_rank()] = x
    return torch.stack(parts, 1).flatten(0, 1)


def dict_of_all(part):
    """The dicts of all processes as one dict."""
    if process_count() == 1:
        return part
    parts = [None] * process_count()
    dist.all_gather_object(parts, part)
    whole = {}
    for part in parts:
        whole |= part
    return whole


# ---- Records: dicts of tensors about the same N segments ----------------------------------------

def rows(record, which):
    """These rows of a record: `which` (N,) bool, or indices."""
    return {key: value[which] for key, value in record.items()}


def column(records, key):
    """A tensor of all records {id: record} as one; empty without a record."""
    parts = [record[key] for record in records.values()]
    return torch.cat(parts) if parts else torch.zeros(0)


# ---- Seconds <-> grid ---------------------------------------------------------------------------

@dataclass(frozen=True)
class Grid:
    """The feature grid of a video."""
    fps: float  # frames a second
    stride: float  # frames between two features
    frames: float  # frames that a feature sees

    def to_grid(self, t):
        """Seconds -> grid steps: g = (t * fps - frames / 2) / stride."""
        return (t * self.fps - self.frames / 2) / self.stride

    def to_seconds(self, g):
        """Grid steps -> seconds, the inverse of to_grid."""
        return (g * self.stride + self.frames / 2) / self.fps

    def span(self, steps):
        """Seconds from the start of the first feature to the end of the last of `steps`."""
        return ((steps - 1) * self.stride + self.frames) / self.fps


# ---- Annotations and predictions ----------------------------------------------------------------

@dataclass
class Annotation:
    """A video as its annotation file has it."""
    subset: str
    duration: float | None
    fps: float | None
    segments: np.ndarray  # (N, 2) in seconds
    labels: list  # N names
    label_ids: list = field(default_factory=list)


def is_number(value):
    """Whether a value of a JSON file is a finite number."""
    return type(value) in (int, float) and math.isfinite(value)


def is_segment(value):
    """Whether a value of a JSON file is a list of two finite numbers."""
    return isinstance(value, list) and len(value) == 2 and all(map(is_number, value))


def read_annotation(entry, where):
    """The Annotation of an entry of the database; `where` names it. Raises BadInput."""
    items = entry.get("annotations", []) if isinstance(entry, dict) else None
    if not isinstance(items, list):
        raise BadInput(f'{where} the entry must hold "subset" and a list of "annotations"')
    for key in ("duration", "fps"):
        value = entry.get(key)
        if value is not None and not (is_number(value) and value > 0):
            raise BadInput(f"{where} {key} must be a positive number, not {value!r}")
    segments = []
    labels = []
    label_ids = []
    for item in items:
        segment = item.get("segment") if isinstance(item, dict) else None
        if not is_segment(segment):
            raise BadInput(f"{where} a segment must be [start, end] in seconds, not {segment!r}")
        if item.get("label") is None:
            raise BadInput(f"{where} the segment {segment} has no label")
        segments.append(segment)
        labels.append(str(item["label"]))
        label_ids.append(item.get("label_id"))
    subset = str(entry.get("subset", ""))
    segments = np.array(segments, dtype=np.float64).reshape(-1, 2)
    return Annotation(
        subset, entry.get("duration"), entry.get("fps"), segments, labels, label_ids)


def read_videos(path, what, key):
    """{video id: entry} under the `key` of a JSON file; raises BadInput if it is missing."""
    content = read_json(path, what)
    videos = content.get(key) if isinstance(content, dict) else None
    if not isinstance(videos, dict):
        raise BadInput(f'{what} {path} has no "{key}" of videos')
    return videos


def read_annotations(path):
    """{video id: Annotation} of an ActivityNet-style JSON; raises BadInput for another form."""
    database = read_videos(path, "annotation file", "database")
    return {name: read_annotation(entry, f"annotation file {path}, video {name}:")
            for name, entry in database.items()}


def read_predictions(path):
    """{id: detections} of a file in ActivityNet's result format; raises BadInput for another."""
    results = read_videos(path, "prediction file", "results")
    for video, found in results.items():
        where = f"prediction file {path}, video {video}:"
        if not isinstance(found, list):
            raise BadInput(f"{where} it must list predictions, not {found!r}")
        for d in found:
            good = isinstance(d, dict) and isinstance(d.get("label"), (str, int))
            if not good or not is_segment(d.get("segment")) or not is_number(d.get("score")):
                raise BadInput(
                    f"{where} a prediction needs a label, a score and a segment, not {d!r}")
            d["label"] = str(d["label"])
    return results


def in_subset(annotations, subset):
    """The annotations {id: Annotation} of a subset, in any letter case."""
    return {name: a for name, a in annotations.items() if a.subset.lower() == subset.lower()}


def good_segments(a, duration):
    """Which segments of an Annotation end after they start and lie at least half inside the video.

    -> (N,) bool"""
    starts, ends = a.segments.T
    inside = np.minimum(ends, duration) - np.maximum(starts, 0)
    return (ends > starts) & (inside >= 0.5 * (ends - starts))


def class_names(annotations):
    """Class names in the order of their label_id (numbers, or strings of numbers), else by name."""
    pairs = set()
    for a in annotations:
        pairs |= {(label, str(number)) for label, number in zip_longest(a.labels, a.label_ids)}
    id_of = dict(pairs)
    if len(id_of) == len(pairs) and all(map(str.isdigit, id_of.values())):
        return sorted(id_of, key=lambda label: (int(id_of[label]), label))
    return sorted(id_of)


# ---- Splits -------------------------------------------------------------------------------------

def read_split(path, videos):
    """The labelled ids that a file lists; raises BadInput if there is none or one is unknown."""
    if path.suffix == ".json":
        content = read_json(path, "split file")
        ids = content.get("labelled") if isinstance(content, dict) else content
    else:
        ids = read_text(path, "split file").split()
    if not isinstance(ids, list) or not ids or not all(isinstance(name, str) for name in ids):
        raise BadInput(f"split file {path} selects no labelled video; it must list their ids")
    ids = [name if name in videos else name.removeprefix("v_") for name in ids]
    for name in ids:
        if name not in videos:
            raise BadInput(f"split file {path} names {name}, which is no training video")
    return sorted(set(ids))


def stratify(order, labels, count):
    """`count` of the ids `order`, each time the one with the most classes not yet drawn.

    labels: {id: set of classes}. When every class that is left has been drawn, a round begins."""
    order = list(order)
    chosen = []
    covered = set()
    while len(chosen) < count:
        best = max(order, key=lambda name: len(labels[name] - covered))
        if covered and not labels[best] - covered:
            covered = set()
            continue
        order.remove(best)
        chosen.append(best)
        covered |= labels[best]
    return chosen


def split_videos(videos, ratio, split, seed):
    """The labelled ids of the training videos {id: Annotation}.

    split   "uniform" draws round(ratio * n) at random, "stratified" as many, the classes in turn;
            a file names them: our split.json, a JSON list, or one id a line (an id may carry the
            prefix v_)
    Raises BadInput if none is selected or one is unknown."""
    if split not in ("uniform", "stratified"):
        return read_split(Path(split), videos)
    names = sorted(videos)
    count = round(ratio * len(names))
    if not 0 < count <= len(names):
        raise BadInput(f"--ratio {ratio} selects {count} of {len(names)} training videos; "
                       "it must select between 1 and all")
    rng = np.random.default_rng([seed, 1])
    order = [names[i] for i in rng.permutation(len(names))]
    if split == "uniform":
        return sorted(order[:count])
    labels = {}
    for name, a in videos.items():
        good = good_segments(a, a.duration or math.inf)
        labels[name] = set(compress(a.labels, good))
    return sorted(stratify(order, labels, count))


# ---- Toy data -----------------------------------------------------------------------------------

def toy_video(rng, looks, classes, subset):
    """A synthetic video: features (T, D) and Annotation.

    looks of what happens in it, (K + 3, D): the K classes and background that resembles them."""
    T = int(rng.integers(224, 353))
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
        k = int(rng.integers(len(looks)))
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


# ---- Videos -------------------------------------------------------------------------------------

@dataclass
class Video:
    """A video without labels: unlabelled or test."""
    id: str
    source: Path | np.ndarray  # a feature file, or an array (T, D)
    key: str  # of the array in an .npz file
    grid: Grid
    steps: int  # T on the grid; a resized video has another T than its source
    duration: float  # seconds
    resized: bool

    def in_seconds(self, segments):
        """Segments (N, 2) in grid steps -> (N, 2) seconds within the video."""
        return self.grid.to_seconds(segments.double()).clamp(0, self.duration)


@dataclass
class LabelledVideo(Video):
    """A labelled video."""
    segments: torch.Tensor  # (N, 2) in grid steps
    labels: torch.Tensor  # (N,)


def blind(video):
    """The same video as an unlabelled one: no label field."""
    return Video(**{f.name: getattr(video, f.name) for f in fields(Video)})


def read_features(source, key, name):
    """Features (T, D), memory-mapped where possible.

    source  a .npy file, a .npz file (its array `key`) or an array
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
        raise BadInput(f"video {name}: feature file {source} holds no array named {key!r} "
                       "(--feature-key)") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise BadInput(f"video {name}: feature file {source} cannot be read as an array: {error}"
                       ) from None
    if feats.ndim != 2 or len(feats) == 0 or not np.issubdtype(feats.dtype, np.number):
        raise BadInput(f"video {name}: feature file {source} must hold numbers of shape (T, D), "
                       f"not {feats.dtype} {feats.shape}")
    return feats


def sum_features(source, key, name):
    """(steps, sum (D,), sum of squares (D,)) of a video's features.

    Raises BadInput for NaN or infinity."""
    feats = read_features(source, key, name)
    total = square = 0
    for first in range(0, len(feats), 4096):  # a long video is never held as a whole
        part = np.asarray(feats[first:first + 4096], dtype=np.float64)
        wrong = np.argwhere(~np.isfinite(part))
        if len(wrong):
            step, column = wrong[0]
            raise BadInput(f"video {name}: feature file {source} holds {part[step, column]} "
                           f"at step {first + step}")
        total = total + part.sum(0)
        square = square + (part ** 2).sum(0)
    return len(feats), total, square


def statistics(sums, standardize):
    """Mean and std (D,) of sum_features()'s of many videos; 0 and 1 if switched off."""
    count, total, square = (sum(column) for column in zip(*sums))
    mean = total / count
    std = np.sqrt(np.maximum(square / count - mean ** 2, 0))
    std = np.where(std > 1e-6, std, 1)
    if not standardize:
        mean, std = 0 * mean, std ** 0
    return torch.from_numpy(mean).float(), torch.from_numpy(std).float()


def place_video(name, a, source, steps, s):
    """The Video of an Annotation and a source of `steps` features, without labels.

    A resized one lies as a whole on a fixed number of steps, as ActionFormer has ActivityNet."""
    grid = Grid(s.fps or a.fps, s.stride, s.frames)
    duration = a.duration or grid.span(steps)
    if s.resize:
        stride = ((steps - 1) * s.stride + s.frames) / s.resize
        grid = Grid(grid.fps, stride, stride)
        steps = s.resize
    return Video(name, source, s.feature_key, grid, steps, duration, bool(s.resize))


def label_video(video, a, classes):
    """The LabelledVideo of a Video and its Annotation, bad segments left out."""
    good = good_segments(a, video.duration)
    segments = video.grid.to_grid(np.clip(a.segments[good], 0, video.duration))
    labels = [classes.index(label) for label in compress(a.labels, good)]
    return LabelledVideo(**vars(video), segments=torch.tensor(segments, dtype=torch.float32),
                         labels=torch.tensor(labels, dtype=torch.long))


# ---- A data set: read, check, open, assemble ----------------------------------------------------

@dataclass
class Dataset:
    """Everything that a run reads."""
    classes: list  # names
    labelled: list  # LabelledVideo
    unlabelled: list  # Video
    test: list  # Video
    ground_truth: dict  # {id: Annotation} of the test videos, for evaluation only
    hidden: dict  # {id: LabelledVideo} of the unlabelled ones, filled for --audit alone
    dim: int  # D
    mean: torch.Tensor  # (D,), with std: standardises the input
    std: torch.Tensor
    missing: list  # classes without a labelled instance


def locate(s):
    """The annotation file and the feature folder of the settings.

    Raises BadInput if a published dataset lacks one."""
    if s.dataset not in LAYOUTS:
        path = Path(s.annotations or s.dataset)
        return path, Path(s.features or path.parent / "features")
    path, folder = (Path(s.root, part) for part in LAYOUTS[s.dataset])
    path = Path(s.annotations or path)
    folder = Path(s.features or folder)
    for file in (path, folder):
        if not file.exists():
            raise BadInput(
                f"--dataset {s.dataset}: {file} is missing; expected are the annotations {path} "
                f"and the features {folder}/{s.prefix}<id>{s.extension} (--root, or --annotations "
                f"and --features, name other places); {ORIGIN}")
    return path, folder


def read_dataset(s):
    """The path of the annotations, {id: Annotation} and {id: source of features}."""
    if s.dataset == "toy":
        return "toy", *toy_videos(s.seed)
    path, folder = locate(s)
    annotations = read_annotations(path)
    sources = {name: folder / f"{s.prefix}{name}{s.extension}" for name in annotations}
    return path, annotations, sources


def check_dataset(path, annotations, s, trained):
    """The training and test videos {id: Annotation} and the class names; raises BadInput."""
    train = in_subset(annotations, s.train_subset)
    test = in_subset(annotations, s.test_subset)
    for subset, found in ((s.train_subset, train), (s.test_subset, test)):
        if not found:
            present = sorted({a.subset for a in annotations.values()})
            raise BadInput(f"annotation file {path} has no video of the subset {subset!r}, only of "
                           f"{present} (--train-subset, --test-subset)")
    everything = train | test
    classes = trained["classes"] if trained else class_names(everything.values())
    for name, a in everything.items():
        for label in a.labels:
            if label not in classes:
                raise BadInput(f"annotation file {path}, video {name}: the label {label!r} is "
                               "unknown to the checkpoint")
    if not any(a.labels for a in test.values()):
        raise BadInput(f"annotation file {path}: the subset {s.test_subset!r} holds no instance to "
                       "evaluate on")
    return train, test, classes


def check_spans(videos):
    """Warn where features span a time that is far from the video's duration."""
    off = [v for v in videos if not 0.5 < v.grid.span(v.steps) / v.duration < 2]
    if off:
        v = off[0]
        print(f"warning: the features of {len(off)} videos span another time than their "
              f"annotations, those of {v.id} {v.grid.span(v.steps):.1f} s of {v.duration:.1f} s; "
              "are --stride, --frames and --fps right?", file=sys.stderr)


def open_videos(annotations, sources, s, path, dim):
    """({id: Video}, {id: sum_features()}): every file read once and checked; raises BadInput.

    dim: the checkpoint's D, or None."""
    others = "the checkpoint's" if dim else "the others"
    videos = {}
    sums = {}
    for name, a in annotations.items():
        where = f"annotation file {path}, video {name}:"
        sums[name] = sum_features(sources[name], s.feature_key, name)
        steps, total, _ = sums[name]
        dim = dim or len(total)
        if len(total) != dim:
            raise BadInput(f"video {name}: feature file {sources[name]} is {len(total)} wide, "
                           f"{others} {dim}")
        if not s.fps and not a.fps:
            raise BadInput(f"{where} it has no fps; give --fps")
        videos[name] = place_video(name, a, sources[name], steps, s)
        duration = videos[name].duration
        bad = a.segments[~good_segments(a, duration)].tolist()
        if bad and s.bad_segments == "error":
            raise BadInput(f"{where} the segment {bad[0]} ends before it starts or lies outside "
                           f"the video (duration {duration}); --bad-segments skip leaves such "
                           "segments out")
    check_spans(videos.values())
    return videos, sums


def load_dataset(s, trained=None):
    """The Dataset that the DataSettings `s` name; raises BadInput.

    trained: a checkpoint's {"classes", "mean", "std"}, to open the test videos alone."""
    path, annotations, sources = read_dataset(s)
    train, test, classes = check_dataset(path, annotations, s, trained)
    if trained:
        train = {}
        labelled = []
        mean, std = trained["mean"], trained["std"]
        videos, _ = open_videos(test, sources, s, path, len(mean))
    else:
        labelled = split_videos(train, s.ratio, s.split, s.seed)
        videos, sums = open_videos(train | test, sources, s, path, None)
        mean, std = statistics([sums[name] for name in train], s.standardize)
    unlabelled = sorted(set(train) - set(labelled))

    def label(names):
        return {name: label_video(videos[name], train[name], classes) for name in names}

    hidden = label(unlabelled) if s.audit else {}
    labelled = list(label(labelled).values())
    present = {classes[number] for video in labelled for number in video.labels}
    missing = [name for name in classes if name not in present]
    unlabelled = [videos[name] for name in unlabelled]
    tested = [videos[name] for name in sorted(test)]
    return Dataset(
        classes, labelled, unlabelled, tested, test, hidden, len(mean), mean, std, missing)


# ---- Items and batches --------------------------------------------------------------------------

def crop_segments(segments, start, length, keep):
    """Segments seen in the window of `length` steps from `start`: clipped and moved.

    A step reaches half a step to either side.
    segments  (N, 2)
    ->        (N, 2), and the rows (N,) bool of which at least the share `keep` is left"""
    window = segments.clamp(start - 0.5, start + length - 0.5)
    left = window[:, 1] - window[:, 0]
    whole = segments[:, 1] - segments[:, 0]
    return window - start, (left > 0) & (left >= keep * whole)


def draw_crop(video, s, rng):
    """A random window (start, length): at most s.max_steps, at least s.crop_min of the video.

    A labelled video tries s.crop_tries windows for one that holds an action (ActionFormer's
    crop), an unlabelled one takes the first: its crop cannot see labels."""
    labelled = isinstance(video, LabelledVideo)
    length = min(video.steps, s.max_steps)
    if length == video.steps:
        shortest = max(round(s.crop_min * length), 1)
        length = int(rng.integers(shortest, length + 1))
    for _ in range(s.crop_tries if labelled else 1):
        start = int(rng.integers(video.steps - length + 1))
        if labelled and crop_segments(video.segments, start, length, s.crop_keep)[1].any():
            break
    return start, length


def load_item(video, data, s, rng=None):
    """One video as tensors, cropped at random if `rng` is given; a resized one is never cropped.

    -> {"id", "video", "feats" (T, D), "start"}, of a LabelledVideo also "segments", "labels"."""
    feats = read_features(video.source, video.key, video.id)
    start, length = 0, video.steps
    if rng is not None and not video.resized:
        start, length = draw_crop(video, s, rng)
        feats = feats[start:start + length]
    x = torch.from_numpy(np.array(feats, dtype=np.float32))
    if video.resized:
        x = F.interpolate(x.T[None], size=length, mode="linear", align_corners=False)[0].T
    x = (x - data.mean) / data.std
    item = {"id": video.id, "video": video, "feats": x, "start": start}
    if isinstance(video, LabelledVideo):
        segments, inside = crop_segments(video.segments, start, length, s.crop_keep)
        item |= {"segments": segments[inside], "labels": video.labels[inside]}
    return item


def collate(items):
    """Items -> a batch, padded to its longest video and no further.

    -> {"videos", "feats" (B, T, D), "mask" (B, T), "starts"}, of labelled ones also "segments"
       and "labels", lists of B."""
    feats = [item["feats"] for item in items]
    valid = [torch.ones(len(x), dtype=torch.bool) for x in feats]
    batch = {
        "videos": [item["video"] for item in items],
        "feats": pad_sequence(feats, batch_first=True),
        "mask": pad_sequence(valid, batch_first=True),
        "starts": [item["start"] for item in items],
    }
    if all("labels" in item for item in items):
        batch |= {key: [item[key] for item in items] for key in ("segments", "labels")}
    return batch


def ahead(load, plans):
    """load(plan) of every plan in turn; a thread loads the next two while the caller works."""
    with ThreadPoolExecutor(1) as thread:
        waiting = []
        for plan in plans:
            waiting.append(thread.submit(load, plan))
            if len(waiting) > 2:
                yield waiting.pop(0).result()
        for last in waiting:
            yield last.result()


def plan_batches(videos, s, steps, size, rng):
    """`steps` batches of `size` pairs (index of a video, seed of its crop).

    Videos of like length share a batch, which saves padding: in each pass over all videos they
    are sorted by their length, randomly changed by a factor of about exp(+-s.length_noise), and
    cut into batches. Where the last would be short, two neighbours overlap, anywhere; fewer
    videos than `size` are repeated."""
    length = np.log([min(video.steps, s.max_steps) for video in videos])
    count = math.ceil(len(videos) / size)
    batches = []
    while len(batches) < steps:
        order = np.argsort(length + s.length_noise * rng.normal(size=len(videos)))
        order = np.resize(order, max(len(order), size))
        starts = size * np.arange(count)
        short = count * size - len(order)
        starts[rng.integers(1, max(count, 2)):] -= short
        for start in rng.permutation(starts):
            seeds = rng.integers(2 ** 63, size=size)
            batches.append(list(zip(order[start:start + size], seeds)))
    return batches[:steps]


def training_batches(videos, data, s, steps, rng):
    """`steps` batches of s.batch videos, cropped at random, loaded ahead.

    Of many processes each gets its share of the videos of a larger batch.
    -> collate()'s, with "ids" of the whole batch"""

    def load(plan):
        items = [load_item(videos[i], data, s, np.random.default_rng(seed))
                 for i, seed in share_of(plan)]
        return collate(items) | {"ids": [videos[i].id for i, _ in plan]}

    return ahead(load, plan_batches(videos, s, steps, s.batch * process_count(), rng))
