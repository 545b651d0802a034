"""Data: the grid, videos, the split, crops, items and batches.

This file alone converts seconds to grid steps, and knows which videos are labelled. An unlabelled
video has no label field, and its crop is label-blind. How files are read is in plumbing/.
"""
import math
from dataclasses import dataclass, field, fields
from itertools import compress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from plumbing import checks, forms, sources
from plumbing.files import Reading, fingerprint_of, read_features, statistics, sum_all
from plumbing.processes import prefetch, process_count, share_of
from plumbing.settings import (
    SPLITS,
    Count,
    FileSettings,
    Flag,
    Frames,
    NotNegative,
    OneOf,
    Share,
    Text,
    Whole,
    WholePositive,
    Width,
    WidthOrNone,
)
from plumbing.splits import split_videos
from plumbing.words import BadInput, refuse, short

# ---- Settings -----------------------------------------------------------------------------------

@dataclass(frozen=True)
class DataSettings(FileSettings):
    """The grid, splits, crops and batches. [S] the paper, [A] the public ActionFormer, [J] neither.
    """
    since = "pretrain"
    stride: Frames(
        "frames between two features; 0: every video is cut into as many as it has") = 1.0
    frames: Frames("frames that a feature sees") = 1.0
    fps: Frames("frames a second; 0: from the annotation") = 0.0
    train_subset: Text("subset of the training videos, in any letter case") = "training"
    unlabelled_subset: Text("subset of more training videos, whose labels are not read") = ""
    ignore_labels: Text("labels that neither teach nor count, with commas") = ""
    one_class: Flag(
        "detect actions without their classes, which --ext-scores may add [A: ActivityNet]") = False
    bad_segments: OneOf(
        ("error", "skip"), "what a segment that is empty or outside its video does") = "error"
    resize: WidthOrNone(
        "resize every video to this number of steps; 0: keep its length [A: 192 ActivityNet]") = 0
    standardize: Flag("standardise the input over all training videos [J]") = True
    ratio: Share(
        "share of the annotated training videos that are labelled [S: 0.1, 0.2, 0.4, 0.6]; 0: all "
        "of own data, or if some training videos lack annotations, otherwise, and with --split, "
        "0.1") = 0.0
    seed: Whole("seed of everything: split, weights, batches, toy data") = 0
    max_steps: WholePositive("longest crop in training, in steps [A]") = 2304
    crop_min: Share("shortest crop, as a share of the video [A]") = 0.9
    crop_keep: Share("share of a segment that a crop must hold to keep it [A]") = 0.5
    crop_tries: Count("windows tried for one that holds an action of a labelled video [J]") = 10
    batch: Width(
        "videos a step and process [S]; in stage 3 as many labelled and as many unlabelled [J]") = 2
    length_noise: NotNegative(
        "spread of the noise on log length by which videos are sorted into batches [J]") = 0.3

    def __post_init__(self):
        super().__post_init__()
        if self.ext_scores and not self.one_class:
            raise BadInput("setting ext_scores gives classes to a detector without: it needs "
                           "--one-class")
        if self.ratio and self.split not in SPLITS:
            raise BadInput(f"the split file {short(self.split, 200)} names the labelled videos: it "
                           "does not go with --ratio")


# What a data set changes in all settings: as the public ActionFormer or the paper has it, OWN as we
# found it best. The command line changes these in turn.
PUBLISHED = {"bad_segments": "skip", "standardize": False}
THUMOS = PUBLISHED | {
    "root": "data/thumos", "stride": 4.0, "frames": 16.0,
    "train_subset": "validation", "test_subset": "test",
}
ACTIVITYNET = PUBLISHED | {
    "root": "data/anet_1.3", "prefix": "v_", "stride": 16.0, "frames": 16.0, "fps": 25.0,
    "resize": 192, "channels": 256, "windows": "7,7,7,7,7,0", "position": True,
    "t_plus": 200.0, "lambda_reg": 2.0, "label_smoothing": 0.1, "min_length": 0.001,
    "nms_sigma": 0.75, "nms_agnostic": True, "vote": 0.9, "max_detections": 100,
    "tiou": "0.5:0.95:0.05", "batch": 16, "lr": 1e-3, "supervised_epochs": 15, "warmup": 1 / 3,
    "acp_clusters": 2, "joint_epochs": 15, "scope": "dataset",
}
EPIC = PUBLISHED | {
    "root": "data/epic_kitchens", "extension": ".npz", "stride": 16.0, "frames": 32.0, "fps": 30.0,
    "windows": "9", "ranges": "0:4,2:8,4:16,8:32,16:64,32:inf", "t_plus": 250.0,
    "nms_sigma": 0.4, "pre_nms": 5000, "max_detections": 2000, "tiou": "0.1:0.5:0.1",
    "crop_keep": 0.3, "supervised_epochs": 21, "warmup": 0.238,  # 5 of 21 epochs
}
OWN = {  # a user's own data; bfloat16 saves nothing in narrow layers
    "channels": 128, "windows": "9", "precision": "float32",
    "input_dropout": 0.3, "input_jitter": 0.5,
    "lr": 1e-3, "supervised_steps": 400, "joint_epochs": 10, "passes": 8,
    "acp": "none", "acp_after": "none",  # its gain goes from 2 points up to 4 down
    "icd_pool": "mean", "icd_score": "relative", "theta_drop": -0.2, "theta_mine": 0.2,
    "threshold": "mean-std", "scope": "class", "exclusive": True, "icd": "eap",
}
PRESETS = {
    "toy": OWN | {"channels": 64, "acp": "coarse+fine"},  # all three stages
    "thumos": THUMOS,
    "activitynet": ACTIVITYNET,
    "epic-verb": EPIC,
    "epic-noun": EPIC | {"label_smoothing": 0.1},
}
# What the paper states, but for epochs, which go by the data, and our reading of its Eq. (6),
# where our defaults are others.
PAPER = {
    "input_dropout": 0.0, "input_jitter": 0.0, "passes": 0,
    "acp": "coarse+fine", "acp_after": "labelled+unlabelled",
    "icd_pool": "max", "icd_score": "absolute", "theta_drop": 0.3, "theta_mine": 0.7,
    "threshold": "mean+std", "scope": "video", "exclusive": False, "repeat": 1.0, "icd": "eap+mpp",
}


def preset(dataset, paper=False):
    """What --dataset changes, and --paper; a published data set keeps its own scope."""
    chosen = PRESETS.get(dataset, OWN)
    changes = PAPER if paper else {}
    return changes | chosen if dataset in sources.LAYOUTS else chosen | changes


# ---- Records: dicts of tensors about the same N segments ----------------------------------------

def take(record, which):
    """These rows of a record: `which` (N,) bool, or indices."""
    return {key: value[which] for key, value in record.items()}


def gather(records, key):
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


# ---- Videos -------------------------------------------------------------------------------------

@dataclass
class Video:
    """A video without labels: unlabelled or test."""
    id: str
    source: Path | np.ndarray  # a feature file, or an array (T, D)
    reading: Reading  # how the source is read
    grid: Grid
    steps: int  # T on the grid; a resized video has another T than its source
    duration: float  # seconds
    source_steps: int  # the source's T

    def in_seconds(self, segments):
        """Segments (N, 2) in grid steps -> (N, 2) seconds within the video."""
        return self.grid.to_seconds(segments.double()).clamp(0, self.duration)


@dataclass
class LabelledVideo(Video):
    """A labelled video."""
    segments: torch.Tensor  # (N, 2) in grid steps
    labels: torch.Tensor  # (N,)

    def on_a_step(self):
        """Which instances hold a grid step and so can have a positive point -> (N,) bool."""
        first = self.segments[:, 0].ceil().clamp(min=0)
        last = self.segments[:, 1].floor().clamp(max=self.steps - 1)
        return first <= last

    def in_a_crop(self, s):
        """Which instances are not too long for a crop to hold enough of them -> (N,) bool."""
        length = self.segments.diff()[:, 0]
        longest_crop = s.max_steps + self.grid.frames / self.grid.stride
        return (s.crop_keep * length <= longest_crop) | (self.steps <= s.max_steps)


def blind(video):
    """The same video as an unlabelled one: no label field."""
    return Video(**{f.name: getattr(video, f.name) for f in fields(Video)})


def place_video(name, a, source, steps, s):
    """The Video of an Annotation and a source of `steps` features, without labels.

    A resized one lies as a whole on a fixed number of steps, as ActionFormer has ActivityNet; with
    s.stride 0 the source already does."""
    fps = s.fps or a.fps or 1.0  # open_videos() lets a video without fps pass for s.stride 0 alone
    grid = Grid(fps, s.stride, s.frames)
    if s.stride == 0:
        stride = a.duration * fps / steps
        grid = Grid(fps, stride, stride)
    duration = a.duration or grid.span(steps)
    if s.resize:
        stride = ((steps - 1) * grid.stride + grid.frames) / s.resize
        grid = Grid(fps, stride, stride)
    return Video(name, source, s.reading(), grid, s.resize or steps, duration, steps)


def label_video(video, a, classes):
    """The LabelledVideo of a Video and its Annotation, bad segments left out."""
    good = forms.good_segments(a, video.duration)
    segments = video.grid.to_grid(np.clip(a.segments[good], 0, video.duration))
    labels = [classes.index(label) for label in compress(a.labels, good)]
    return LabelledVideo(**vars(video), segments=torch.tensor(segments, dtype=torch.float32),
                         labels=torch.tensor(labels, dtype=torch.long))


# ---- A data set ---------------------------------------------------------------------------------

@dataclass
class Dataset:
    """Everything that a run reads. Evaluation alone has no training videos."""
    classes: list  # names
    mean: torch.Tensor  # (D,), with std: standardises the input
    std: torch.Tensor
    test: list  # Video
    truth: dict  # {id: Annotation} of the annotated test videos, for evaluation only
    labelled: list = field(default_factory=list)  # LabelledVideo
    unlabelled: list = field(default_factory=list)  # Video
    hidden: dict = field(default_factory=dict)  # {id: LabelledVideo} of the unlabelled, for --audit
    missing: list = field(default_factory=list)  # classes without a labelled instance
    fingerprint: dict = field(default_factory=dict)  # {id: [T, mean, spread]} of training features
    ignored: list = field(default_factory=list)  # what was not taken, in words
    warnings: list = field(default_factory=list)  # what is odd, in words

    @property
    def dim(self):
        """The width D of the features."""
        return len(self.mean)


def open_videos(chosen, s, trained=None):
    """({id: Video}, {id: files.Sums}): every file checked; raises BadInput.

    trained  as test_data() has it"""
    annotations = chosen.everything()
    files = {name: chosen.sources[name] for name in annotations}
    found, faults = sum_all(files, s.reading())
    videos = {}
    for name, sums in found.items():
        where = f"annotation file {chosen.path}, video {short(name)}:"
        try:
            checks.check_channels(name, files[name], found, trained, s.skip_columns)
            checks.check_grid(annotations[name], s, where)
            videos[name] = place_video(name, annotations[name], files[name], sums.steps, s)
            if s.bad_segments == "error":
                checks.check_segments(annotations[name], videos[name], where)
        except BadInput as fault:
            faults[name] = fault
    refuse({name: faults[name] for name in annotations if name in faults})
    chosen.warnings += checks.odd_features(found)
    return videos, found


def training_data(s):
    """The Dataset of a training and its test; raises BadInput."""
    chosen = sources.choose_training_data(s)
    everything = chosen.everything()
    train = chosen.annotated | chosen.bare
    classes = forms.class_names(everything.values())
    ratio = sources.labelled_share(chosen, s)
    names = split_videos(chosen.annotated, ratio, s.split, s.seed)
    videos, sums = open_videos(chosen, s)

    def label(names):
        return [label_video(videos[name], train[name], classes) for name in names]

    labelled = label(names)
    unlabelled = sorted(train.keys() - set(names))
    hidden = label(filter(chosen.annotated.__contains__, unlabelled)) if s.audit else []
    present = {classes[number] for video in labelled for number in video.labels}
    mean, std = map(torch.from_numpy, statistics([sums[name] for name in train]))
    if not s.standardize:
        mean, std = torch.zeros_like(mean), torch.ones_like(std)
    dataset = Dataset(
        classes, mean, std, [videos[name] for name in sorted(chosen.test)], chosen.truth, labelled,
        unlabelled=[videos[name] for name in unlabelled],
        hidden={video.id: video for video in hidden},
        missing=[name for name in classes if name not in present],
        fingerprint={name: fingerprint_of(sums[name]) for name in [*names, *unlabelled]},
        ignored=chosen.ignored,
        warnings=chosen.warnings)
    dataset.warnings += checks.look(dataset, videos, everything, chosen.path, s)
    return dataset


def test_data(s, trained):
    """The Dataset of an evaluation alone; raises BadInput.

    trained  what has a checkpoint's `classes`, `columns`, `mean` and `std`"""
    chosen = sources.choose_test_data(s)
    checks.check_known(chosen.path, chosen.test, trained.classes)
    videos, _ = open_videos(chosen, s, trained)
    dataset = Dataset(
        trained.classes, trained.mean, trained.std, [videos[name] for name in sorted(chosen.test)],
        chosen.truth, warnings=chosen.warnings)
    dataset.warnings += checks.check_spans(videos, chosen.test, s, dataset.dim)
    return dataset


# ---- Items and batches --------------------------------------------------------------------------

def crop_segments(segments, video, start, length, keep):
    """Segments seen in the window of `length` steps of a video from `start`: clipped and moved.

    A window reaches as far beyond its steps as half the frames of a feature. The whole video
    clips nothing. Both as the public ActionFormer has them.
    segments  (N, 2)
    ->        (N, 2), and the rows (N,) bool of which at least the share `keep` is left; of the
              whole video, those that reach into it"""
    beyond = video.grid.frames / 2 / video.grid.stride
    window = segments.clamp(start - beyond, start + length + beyond)
    left = window[:, 1] - window[:, 0]
    if length == video.steps:
        return segments - start, left > 0
    whole = segments[:, 1] - segments[:, 0]
    return window - start, (left > 0) & (left >= keep * whole)


def draw_crop(video, s, rng):
    """A random window (start, length): s.max_steps, of a video no longer than that s.crop_min or
    more of it.

    A labelled video tries s.crop_tries windows for one that holds an action (ActionFormer's
    crop), an unlabelled one takes the first: its crop cannot see labels."""
    labelled = isinstance(video, LabelledVideo)
    length = min(video.steps, s.max_steps)
    if length == video.steps:
        shortest = max(round(s.crop_min * length), 1)
        length = int(rng.integers(shortest, length + 1))
    for _ in range(s.crop_tries if labelled else 1):
        start = int(rng.integers(video.steps - length + 1))
        if not labelled:
            break
        _, inside = crop_segments(video.segments, video, start, length, s.crop_keep)
        if inside.any():
            break
    return start, length


def read_steps(video, window, dim):
    """The features of a window, a slice, as a tensor (steps, dim), a resized video's resized.

    What is float64 stays so until it is standardised: far from 0 float32 has no digits left.
    Raises BadInput where the file is not what it was when the run began."""
    feats = read_features(video.source, video.reading, video.id, (video.source_steps, dim))
    resized = video.source_steps != video.steps
    if not resized:
        feats = feats[window]
    kind = np.float64 if feats.dtype == np.float64 else np.float32
    x = torch.from_numpy(np.array(feats, dtype=kind))
    if resized:
        x = F.interpolate(x.T[None], size=video.steps, mode="linear", align_corners=False)[0].T
        x = x[window]
    return x


def load_item(video, data, s, rng=None):
    """One video as tensors, cropped at random if `rng` is given, a resized one after resizing.

    -> {"id", "video", "feats" (T, D), "start"}, of a LabelledVideo also "segments", "labels"."""
    start, length = (0, video.steps) if rng is None else draw_crop(video, s, rng)
    x = read_steps(video, slice(start, start + length), len(data.mean))
    x = ((x - data.mean.to(x.dtype)) / data.std.to(x.dtype)).float()
    checks.check_float32(x, video, start)
    item = {"id": video.id, "video": video, "feats": x, "start": start}
    if isinstance(video, LabelledVideo):
        segments, inside = crop_segments(video.segments, video, start, length, s.crop_keep)
        item |= {"segments": segments[inside], "labels": video.labels[inside]}
    return item


def collate(items):
    """Items -> a batch: lists of B; "feats" (B, T, D), padded to its longest, and "mask" (B, T)."""
    batch = {key: [item[key] for item in items] for key in items[0]}
    valid = [torch.ones(len(x), dtype=torch.bool) for x in batch["feats"]]
    feats = pad_sequence(batch["feats"], batch_first=True)
    return batch | {"feats": feats, "mask": pad_sequence(valid, batch_first=True)}


def plan_batches(videos, s, steps, size, rng):
    """`steps` batches of `size` pairs (index of a video, seed of its crop).

    Videos of like length share a batch (not in the paper), which saves padding: in each pass over
    all videos they are sorted by their length, randomly changed by a factor of about
    exp(+-s.length_noise), and cut into batches. Where the last would be short, two neighbours
    overlap, anywhere; fewer videos than `size` are repeated."""
    length = np.log([min(video.steps, s.max_steps) for video in videos])
    count = math.ceil(len(videos) / size)
    batches = []
    while len(batches) < steps:
        order = np.argsort(length + s.length_noise * rng.normal(size=len(videos)))
        order = np.resize(order, max(len(order), size))
        starts = size * np.arange(count)
        starts[rng.integers(1, max(count, 2)):] -= count * size - len(order)
        for start in rng.permutation(starts):
            seeds = rng.integers(2 ** 63, size=size)
            batches.append(list(zip(order[start:start + size], seeds)))
    return batches[:steps]


def training_batches(videos, data, s, steps, rng, done=0):
    """`steps` batches of s.batch videos, cropped at random, loaded ahead; the first `done` are not.

    Of many processes each gets its share of the videos of a larger batch.
    -> collate()'s, with "ids" of the whole batch beside "id" of the share"""

    def load(plan):
        items = [load_item(videos[i], data, s, np.random.default_rng(seed))
                 for i, seed in share_of(plan)]
        return collate(items) | {"ids": [videos[i].id for i, _ in plan]}

    plans = plan_batches(videos, s, steps, s.batch * process_count(), rng)
    return prefetch(load, plans[done:])


def ground_truth(batch):
    """The instances of a labelled batch, B records {"segments", "labels", "rejected"}."""
    return [{"segments": segments, "labels": labels, "rejected": segments[:0]}
            for segments, labels in zip(batch["segments"], batch["labels"])]


def mixed(batch, alpha):
    """MixUp (Zhang et al. 2017) of each video with the one opposite in the batch, for Table 1.

    lam * x + (1 - lam) * x', lam ~ Beta(alpha, alpha). The losses are mixed alike, which for
    cross-entropy is to mix the targets. Under torchrun partners come from the process's own share
    of the batch.
    -> the batch, lam"""
    lam = float(torch.distributions.Beta(alpha, alpha).sample())
    feats, mask = batch["feats"], batch["mask"]
    feats = lam * feats + (1 - lam) * feats.flip(0)
    return batch | {"feats": feats, "mask": mask | mask.flip(0)}, lam
