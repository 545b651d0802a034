"""Data: annotations and feature files -> labelled, unlabelled and test videos, items, batches.

This file alone converts seconds to grid steps, reads and writes JSON, and knows which videos are
labelled. An unlabelled video has no label field, and its crop is label-blind. Files from outside
are read without executing anything. Bad input raises BadInput: one sentence that names the file,
the video and the value.
"""
import hashlib
import json
import math
import os
import reprlib
import stat
import sys
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
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
ORIGIN = "both are ActionFormer's: github.com/happyharrycn/actionformer_release"


# ---- Words for the terminal ---------------------------------------------------------------------

def printable(text):
    """Text without what a terminal would act on: control characters are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def short(text, most=60):
    """A name from outside as a message shows it: escaped, and cut to `most` letters."""
    text = printable(str(text)[:most + 1])
    return text if len(text) <= most else text[:most] + "..."


def shown(value):
    """A value from outside as a message shows it: as Python writes it, cut."""
    writer = reprlib.Repr()
    writer.maxstring = writer.maxother = writer.maxlong = 60
    return printable(writer.repr(value))


def several(names, most=5):
    """"a, b, c, d, e and 7 more"."""
    text = ", ".join(short(name, 40) for name in list(names)[:most])
    return text if len(names) <= most else f"{text} and {len(names) - most} more"


def say(text, stream=None):
    """Print lines at once; letters that the terminal cannot show are escaped.

    Where nobody reads any more, only the printing ends."""
    stream = stream or sys.stdout
    if stream is None:  # closed from the start
        return
    encoding = stream.encoding or "utf-8"
    text = "\n".join(printable(line) for line in text.split("\n"))
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # for what follows, and for Python's own last flush


def complain(error):
    """Print an error as one line of at most 400 letters."""
    if sys.stderr is not None:
        say("error: " + short(error, 380), sys.stderr)


def refuse(faults):
    """Raise BadInput for the faults {video: sentence}: the first, and which videos have any."""
    if faults:
        sentence = str(next(iter(faults.values())))
        if len(faults) > 1:
            sentence += f"; {len(faults)} videos have such faults: {several(faults)}"
        raise BadInput(sentence)


# ---- Settings -----------------------------------------------------------------------------------

MILLION = 10 ** 6
RANGES = {
    "positive": (1e-12, 1e12),
    "at least 1": (1, 1e12),
    "not negative": (0, 1e12),
    "a share": (0, 1),
    "a share below 1": (0, 0.999),
    "finite": (-1e12, 1e12),
    "from -1 to 1": (-1, 1),
    "from 0 to 64": (0, 64),
    "from 0 to 8192": (0, 8192),
    "from 1 to 8192": (1, 8192),
    "from 0 to a million": (0, MILLION),
    "from 1 to a million": (1, MILLION),
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
                raise BadInput(
                    f"setting {f.name} must be of type {f.type.__name__}, not {shown(value)}")
            if f.type is str and "\0" in value:
                raise BadInput(f"setting {f.name} must hold no NUL, but is {shown(value)}")
            if isinstance(allowed, tuple) and value not in allowed:
                choices = ", ".join(allowed)
                raise BadInput(f"setting {f.name} must be one of {choices}, not {shown(value)}")
            if f.type in (int, float):
                least, most = RANGES[allowed]
                if not least <= value <= most:
                    raise BadInput(f"setting {f.name} must be {allowed}, but is {shown(value)}")


# Where the files are: a run that moves has them elsewhere.
PLACES = (
    "dataset", "root", "annotations", "features", "unlabelled_features", "split", "ext_scores")
SPLITS = ("uniform", "stratified")


@dataclass(frozen=True)
class DataSettings(CheckedSettings):
    """Files, splits, crops and batches. [S] the paper, [A] the public ActionFormer, [J] neither."""
    dataset: str = of_run(
        "toy", "toy, thumos, activitynet, epic-verb, epic-noun, or the path of an annotation JSON")
    root: str = of_run(
        "",
        "folder of a published dataset, in ActionFormer's layout")
    annotations: str = of_run("", "annotation file, in place of the layout's")
    features: str = of_run(
        "",
        "feature folder; none: the layout's, or the folder features beside a JSON")
    unlabelled_features: str = of_run(
        "", "folder whose feature files without an annotation entry are unlabelled videos")
    prefix: str = of_run("", "what stands before a video's id in its feature file's name")
    extension: str = of_run(".npy", "what stands after it: .npy, .npz, .pt or .csv")
    feature_key: str = of_run("feats", "name of the array in .npz and .pt files")
    missing: str = of_run(
        "error", "what a video without a feature file does", ("error", "skip"))
    stride: float = setting(
        1.0, "frames between two features; 0: every video is cut into as many as it has")
    frames: float = setting(1.0, "frames that a feature sees")
    fps: float = setting(0.0, "frames a second; 0: from the annotation")
    trust_grid: bool = of_run(
        False, "go on where the features span another time than the annotations say")
    train_subset: str = setting("training", "subset of the training videos, in any letter case")
    test_subset: str = of_run("validation", "subset of the test videos; none: no test")
    unlabelled_subset: str = setting(
        "", "subset of more training videos, whose labels are not read")
    ignore_labels: str = setting("", "labels that neither teach nor count, with commas")
    one_class: bool = setting(
        False, "detect actions without their classes, which --ext-scores may add [A: ActivityNet]")
    bad_segments: str = setting(
        "error", "what a segment that is empty or outside its video does", ("error", "skip"))
    resize: int = setting(
        0, "resize every video to this number of steps; 0: keep its length [A: 192 ActivityNet]",
        "from 0 to 8192")
    standardize: bool = setting(True, "standardise the input over all training videos [J]")
    ratio: float = setting(
        0.0,
        "share of the annotated training videos that are labelled [S: 0.1, 0.2, 0.4, 0.6]; 0: 0.1, "
        "or all of them where other training videos have no annotations", "a share")
    split: str = of_run("uniform", "uniform, stratified, or a file of labelled ids")
    seed: int = setting(0, "seed of everything: split, weights, batches, toy data")
    max_steps: int = setting(2304, "longest crop in training, in steps [A]", "positive")
    crop_min: float = setting(0.9, "shortest crop, as a share of the video [A]", "a share")
    crop_keep: float = setting(
        0.5, "share of a segment that a crop must hold to keep it [A]", "a share")
    crop_tries: int = setting(
        10, "windows tried for one that holds an action of a labelled video [J]",
        "from 1 to a million")
    batch: int = setting(
        2, "videos a step and process; in stage 3 as many labelled and as many unlabelled [S]",
        "from 1 to 8192")
    length_noise: float = setting(
        0.3, "spread of the noise on log length by which videos are sorted into batches [J]")
    ext_scores: str = of_run(
        "", "JSON of video-level scores from elsewhere, which name the classes of --one-class")
    audit: bool = of_run(
        False, "report the pseudo labels' quality; reads hidden labels for this only")

    def __post_init__(self):
        super().__post_init__()
        if self.ext_scores and not self.one_class:
            raise BadInput("setting ext_scores gives classes to a detector without: it needs "
                           "--one-class")
        for name in ("fps", "stride", "frames"):
            value = getattr(self, name)
            if 0 < value < 1e-6:
                raise BadInput(f"setting {name} must be 0 or at least 1e-6, but is {value}")
        if self.ratio and self.split not in SPLITS:
            raise BadInput(f"the split file {short(self.split, 200)} names the labelled videos: it "
                           "does not go with --ratio")


# ---- Files --------------------------------------------------------------------------------------

MOST_TEXT = 200 * MILLION  # bytes of a JSON or text file; the largest published one has 30 million
MOST_UNPACKED = 2 ** 31  # bytes of features read at once; a .npy file is read piece by piece


def check_file(path, what, most=None):
    """Raise BadInput unless the path is a regular file of at most `most` bytes.

    A device or a pipe might never end, or give what is not there twice."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise BadInput(f"{what} not found: {path}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "its name is none"
        raise BadInput(f"{what} {short(path, 200)} cannot be read: {reason}") from None
    if not stat.S_ISREG(found.st_mode):
        raise BadInput(f"{what} {path} cannot be read: it is no regular file")
    if most and found.st_size > most:
        raise BadInput(f"{what} {path} cannot be read: it has {found.st_size} bytes, over {most}")


def read_text(path, what):
    """The text of a file; `what` names it in the message. Raises BadInput."""
    check_file(path, what, MOST_TEXT)
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except OSError as error:
        raise BadInput(f"{what} {path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise BadInput(f"{what} {path} cannot be read: it is no UTF-8 text") from None


def without_repeated_keys(pairs):
    """A dict of the pairs of a JSON object; raises KeyError for a key that comes twice."""
    content = {}
    for key, value in pairs:
        if key in content:
            raise KeyError(key)
        content[key] = value
    return content


def read_json(path, what):
    """The content of a JSON file; `what` names it in the message. Raises BadInput."""
    text = read_text(path, what)
    try:
        return json.loads(text, object_pairs_hook=without_repeated_keys)
    except RecursionError:
        reason = "it is nested too deeply"
    except KeyError as error:
        reason = f"the key {shown(*error.args)} comes twice"
    except json.JSONDecodeError as error:
        reason = f"{error.msg} in line {error.lineno}"
    except ValueError:
        reason = "a number has too many digits"
    raise BadInput(f"{what} {path} cannot be read as JSON: {reason}")


def write_atomically(path, write):
    """write(file), a binary file beside `path`, then move it there: never half-written.

    What is no regular file, like /dev/null, is written as it is. Raises BadInput where the disk
    is full or closed; what lay at `path` is still there then."""
    try:
        path = Path(os.path.realpath(path))
        if path.exists() and not path.is_file():
            with open(path, "wb") as file:
                write(file)
            return
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.unlink(missing_ok=True)
        try:
            with open(temporary, "xb") as file:  # a new file, no link that somebody planted
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except ValueError:
        raise BadInput(f"{short(path, 200)} cannot be written: its name is none") from None
    except (OSError, RuntimeError) as error:  # torch.save: "failed writing", the cause behind it
        cause = error if isinstance(error, OSError) else error.__context__
        reason = getattr(cause, "strerror", None) or "the disk may be full"
        raise BadInput(f"{short(path, 200)} cannot be written: {reason}") from None


def write_text(path, text):
    """Write a text file atomically."""
    write_atomically(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))


def write_json(path, content, indent=None):
    """Write JSON atomically."""
    write_text(path, json.dumps(content, indent=indent))


def append_row(path, row):
    """Append a dict to a log of JSON lines."""
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def write_rows(path, content):
    """Write a log of JSON lines anew, atomically."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in content))


def read_rows(path):
    """The dicts of a log of JSON lines, [] where there is none, without a last line cut short."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return [row for row in found if isinstance(row, dict)]


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


def warn(texts):
    """Print warnings, a line each; the first process does."""
    for text in texts:
        if is_first() and sys.stderr is not None:
            say(f"warning: {text}", sys.stderr)


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
    annotated: bool = True  # whether it says what happens; without a segment: nothing does


# Names under which public annotation files have the same thing.
DURATIONS = ("duration", "duration_second", "duration_seconds")
RATES = ("fps", "frame_rate")


def number(value, where, what):
    """The finite number that a JSON value is, written as text or not; raises BadInput."""
    try:
        x = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        x = math.nan
    if not math.isfinite(x):
        raise BadInput(f"{where} {what} must be a number, not {shown(value)}")
    return x


def positive_number(entry, keys, where):
    """The positive number under the first key that an entry has, None without one."""
    for key in keys:
        if entry.get(key) is not None:
            value = number(entry[key], where, key)
            if value <= 0:
                raise BadInput(f"{where} {key} must be positive, not {shown(entry[key])}")
            return value
    return None


def read_segment(value, where):
    """[start, end] in seconds of a JSON value; raises BadInput."""
    if not isinstance(value, list) or len(value) != 2:
        raise BadInput(f"{where} a segment must be [start, end] in seconds, not {shown(value)}")
    return [number(t, where, f"each time of the segment {shown(value)}") for t in value]


def read_label(value, where):
    """The name of a class, which may be written as a number; raises BadInput."""
    if value is None or isinstance(value, str) and not value.strip():
        raise BadInput(f"{where} a segment has no label")
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise BadInput(f"{where} a label must be text or a number, not {shown(value)}")
    return str(value)


def read_instances(items, where):
    """(segment, label, label id) of each item of "annotations"; a list of labels is as many."""
    for item in items:
        if not isinstance(item, dict):
            raise BadInput(f"{where} an annotation must hold a segment and a label, not "
                           f"{shown(item)}")
        segment = read_segment(item.get("segment"), where)
        labels = item.get("label")
        numbers = item.get("label_id")
        if not isinstance(labels, list):
            labels, numbers = [labels], [numbers]
        if not labels:
            raise BadInput(f"{where} the segment {segment} has no label")
        if not isinstance(numbers, list) or len(numbers) != len(labels):
            numbers = [None] * len(labels)
        for label, label_id in zip(labels, numbers):
            yield segment, read_label(label, where), label_id


def read_annotation(entry, where):
    """The Annotation of an entry of the database; `where` names it. Raises BadInput."""
    items = entry.get("annotations") if isinstance(entry, dict) else 0
    if items is not None and not isinstance(items, list):
        raise BadInput(f'{where} the entry must hold "subset" and a list of "annotations"')
    subset = entry.get("subset") or ""
    if not isinstance(subset, str):
        raise BadInput(f"{where} subset must be text, not {shown(subset)}")
    instances = list(read_instances(items or [], where))
    segments, labels, label_ids = zip(*instances) if instances else ((), (), ())
    return Annotation(
        subset.strip(),
        positive_number(entry, DURATIONS, where),
        positive_number(entry, RATES, where),
        np.array(segments, dtype=np.float64).reshape(-1, 2),
        list(labels),
        list(label_ids),
        items is not None)


def read_each(content, read, what):
    """{id: read(entry, where)} of a file's videos; raises BadInput, which counts the faults."""
    found = {}
    faults = {}
    for name, entry in content.items():
        try:
            found[name] = read(entry, f"{what}, video {short(name)}:")
        except BadInput as fault:
            faults[name] = fault
    refuse(faults)
    return found


def read_annotations(path):
    """{video id: Annotation} of an ActivityNet-style JSON, or of its "database" alone.

    Raises BadInput for another form."""
    content = read_json(path, "annotation file")
    database = content
    if isinstance(content, dict) and "database" in content:
        database = content["database"]
    if not isinstance(database, dict) or not all(isinstance(e, dict) for e in database.values()):
        raise BadInput(f'annotation file {path} has no "database" of videos, each a JSON object')
    return read_each(database, read_annotation, f"annotation file {path}")


def read_results(path, what):
    """({id: ...} under "results" of a JSON file, its whole content); raises BadInput."""
    content = read_json(path, what)
    results = content.get("results") if isinstance(content, dict) else None
    if not isinstance(results, dict):
        raise BadInput(f'{what} {path} has no "results" of videos')
    return results, content


def read_detections(found, where):
    """The detections [{"label", "score", "segment"}] of a video; raises BadInput."""
    if not isinstance(found, list) or not all(isinstance(d, dict) for d in found):
        raise BadInput(f"{where} it must list predictions, not {shown(found)}")
    return [{
        "label": read_label(d.get("label"), where),
        "score": number(d.get("score"), where, "a score"),
        "segment": read_segment(d.get("segment"), where),
    } for d in found]


def read_predictions(path):
    """{id: detections} of a file in ActivityNet's result format; raises BadInput for another."""
    results, _ = read_results(path, "prediction file")
    return read_each(results, read_detections, f"prediction file {path}")


def read_video_scores(path):
    """{id: {label: score}} of a file of video-level scores; raises BadInput.

    The file holds "results": {id: scores}, and scores are {label: score}, or as many as the names
    under "class" (the form that ActivityNet's classifiers are published in)."""
    results, content = read_results(path, "score file")
    names = content.get("class")

    def read(scores, where):
        if isinstance(scores, list) and isinstance(names, list) and len(names) == len(scores):
            scores = dict(zip(map(str, names), scores))
        if not isinstance(scores, dict) or not scores:
            raise BadInput(f"{where} it must hold a score for each class, not {shown(scores)}")
        return {label: number(score, where, "a score") for label, score in scores.items()}

    return read_each(results, read, f"score file {path}")


def in_subset(annotations, subset):
    """The annotations {id: Annotation} of a subset, in any letter case."""
    return {name: a for name, a in annotations.items() if a.subset.lower() == subset.lower()}


def subsets_of(annotations):
    """The names of the subsets, with the number of videos of each, as a message shows them."""
    names = [a.subset or "none" for a in annotations.values()]
    return several([f"{name} ({names.count(name)})" for name in sorted(set(names))])


def rows_of_annotation(a, which):
    """These instances of an Annotation: `which` N bools."""
    return replace(
        a,
        segments=a.segments[np.array(which, dtype=bool)],
        labels=list(compress(a.labels, which)),
        label_ids=list(compress(a.label_ids, which)))


def as_one_class(annotations):
    """The annotations {id: Annotation} with one class for all instances."""
    return {name: replace(a, labels=["action"] * len(a.labels), label_ids=[])
            for name, a in annotations.items()}


def without_labels(annotations, ignored):
    """The annotations {id: Annotation} without the labels that a text with commas names."""
    ignored = {label.strip() for label in ignored.split(",")}
    return {name: rows_of_annotation(a, [label.strip() not in ignored for label in a.labels])
            for name, a in annotations.items()}


def good_segments(a, duration):
    """Which segments of an Annotation end after they start and lie at least half inside the video.

    -> (N,) bool"""
    starts, ends = a.segments.T
    inside = np.minimum(ends, duration) - np.maximum(starts, 0)
    return (ends > starts) & (inside >= 0.5 * (ends - starts))


def unit_of(a, duration, fps):
    """A guess at the unit of segments that lie outside their video, in words; "" without one."""
    last = a.segments.max()
    for unit, a_second in (("frames", fps or 0), ("milliseconds", 1e3), ("microseconds", 1e6)):
        if a_second and 0.1 * duration < last / a_second <= duration:
            return f"; are its times {unit}, not seconds?"
    return ""


def class_names(annotations):
    """Class names in the order of their label_id (numbers, or strings of numbers), else by name."""
    pairs = set()
    for a in annotations:
        pairs |= {(label, str(number)) for label, number in zip_longest(a.labels, a.label_ids)}
    id_of = dict(pairs)
    numbered = all(text.isdecimal() and len(text) < 19 for text in id_of.values())
    if len(id_of) == len(pairs) and numbered:
        return sorted(id_of, key=lambda label: (int(id_of[label]), label))
    return sorted(id_of)


def alike_labels(classes):
    """Groups of class names that differ by letter case or blanks alone."""
    groups = {}
    for name in classes:
        groups.setdefault("".join(name.lower().split()), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


# ---- Splits -------------------------------------------------------------------------------------

def read_split(path, videos):
    """The labelled ids that a file lists; raises BadInput if there is none or one is unknown."""
    if path.suffix == ".json":
        content = read_json(path, "split file")
        ids = content.get("labelled") if isinstance(content, dict) else content
    else:
        lines = read_text(path, "split file").splitlines()
        ids = [line.strip() for line in lines if line.strip()]
    if not isinstance(ids, list) or not ids or not all(isinstance(name, str) for name in ids):
        raise BadInput(f"split file {path} selects no labelled video; it must list their ids")
    ids = [name if name in videos else name.removeprefix("v_") for name in ids]
    unknown = [name for name in ids if name not in videos]
    if unknown:
        raise BadInput(f"split file {path} names {several(unknown)}: no annotated training video "
                       f"({len(unknown)} of {len(ids)} ids; one id a line)")
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
    """The labelled ids of the annotated training videos {id: Annotation}.

    split   "uniform" draws round(ratio * n) at random, "stratified" as many, the classes in turn;
            a file names them: our split.json, a JSON list, or one id a line (an id may carry the
            prefix v_)
    Raises BadInput if none is selected or one is unknown."""
    if split not in SPLITS:
        return read_split(Path(split), videos)
    names = sorted(videos)
    count = round(ratio * len(names))
    if not 0 < count <= len(names):
        raise BadInput(f"--ratio {ratio} selects {count} of {len(names)} annotated training "
                       "videos; it must select between 1 and all")
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


# ---- Feature files ------------------------------------------------------------------------------

def open_zip(path, what):
    """Check a zip archive before anything is unpacked: its sizes, and its checksums.

    Raises BadInput."""
    check_file(path, what)
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            size = sum(member.file_size for member in archive.infolist())
            if size > max(MOST_UNPACKED, 2 * os.path.getsize(path)):
                raise BadInput(f"{what} {path} cannot be read: it unpacks to {size} bytes")
            broken = archive.testzip() if len(set(names)) == len(names) else "two of one name"
    except BadInput:
        raise
    except Exception:  # zipfile raises a dozen kinds for damaged archives
        raise BadInput(f"{what} {path} cannot be read: it is no whole archive") from None
    if broken:
        raise BadInput(f"{what} {path} cannot be read: its part {short(broken)} is damaged")


def load_torch(path, what):
    """The content of a file of torch.save, on the CPU; raises BadInput."""
    open_zip(path, what)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch.load raises a dozen kinds, and its words advise to unpickle
        raise BadInput(f"{what} {path} cannot be read: it holds no tensors alone") from None


def read_npy(path, key, what):
    """The array of a .npy file, memory-mapped."""
    feats = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(feats, np.ndarray):
        raise ValueError("an archive")
    return feats


def read_npz(path, key, what):
    """The array `key` of an .npz file, or its only one without a name."""
    open_zip(path, what)
    with zipfile.ZipFile(path) as archive, np.load(path, allow_pickle=False) as arrays:
        if key not in arrays and arrays.files == ["arr_0"]:
            key = "arr_0"
        if key not in arrays:
            raise BadInput(f"{what} {path} holds no array named {key!r} (--feature-key), only "
                           f"{several(arrays.files)}")
        with archive.open(f"{key}.npy") as member:
            version = np.lib.format.read_magic(member)
            read_header = {(1, 0): np.lib.format.read_array_header_1_0,
                           (2, 0): np.lib.format.read_array_header_2_0}[version]
            shape, _, dtype = read_header(member)
        if math.prod(shape) * dtype.itemsize > archive.getinfo(f"{key}.npy").file_size:
            raise ValueError("the header promises more than the file holds")
        return arrays[key]


def read_pt(path, key, what):
    """The tensor of a .pt file, or that under `key` of its dict."""
    content = load_torch(path, what)
    if isinstance(content, dict):
        if key not in content:
            raise BadInput(f"{what} {path} holds no tensor named {key!r} (--feature-key), only "
                           f"{several(content)}")
        content = content[key]
    if not isinstance(content, torch.Tensor) or content.nbytes > MOST_UNPACKED:
        raise ValueError("no tensor of a sane size")
    content = content.detach()
    return (content.float() if content.dtype == torch.bfloat16 else content).numpy()


def is_header(cells):
    """Whether the first line of a .csv file names its columns: in words, or as 0, 1, 2, ..."""
    numbers = []
    for cell in cells:
        try:
            numbers.append(float(cell))
        except ValueError:
            pass
    return not numbers or len(cells) > 1 and numbers == list(range(len(cells)))


def read_csv(path, key, what):
    """The numbers of a .csv file, a line a step, without its header."""
    check_file(path, what, MOST_UNPACKED // 8)
    with open(path, encoding="utf-8-sig") as file:
        header = is_header(file.readline().split(","))
    return np.loadtxt(
        path, delimiter=",", skiprows=int(header), ndmin=2, encoding="utf-8-sig", comments=None)


READERS = {".npy": read_npy, ".npz": read_npz, ".pt": read_pt, ".pth": read_pt, ".csv": read_csv}


def check_array(feats, where):
    """The features, if they are real numbers of shape (T, D), T and D over 0; else BadInput."""
    if feats.ndim != 2 or 0 in feats.shape or feats.dtype.kind not in "fiu":
        raise BadInput(f"{where} must hold real numbers of shape (T, D), not "
                       f"{short(feats.dtype)} {short(feats.shape)}")
    return feats


def read_features(source, key, name):
    """Features (T, D), memory-mapped where possible, read without executing anything.

    source  a file .npy, .npz, .pt or .csv, or an array
    key     the name of the array in .npz and .pt files
    Raises BadInput if the file is missing, truncated, pickled, of another shape or empty."""
    what = f"video {short(name)}: feature file"
    if isinstance(source, np.ndarray):
        return check_array(source, f"video {short(name)}: the array")
    check_file(source, what)
    suffix = Path(source).suffix
    if suffix not in READERS:
        raise BadInput(f"{what} {source} is of no kind that is read: {', '.join(READERS)} "
                       "(--extension)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong is said below
            feats = READERS[suffix](source, key, what)
    except BadInput:
        raise
    except Exception:  # numpy and torch raise a dozen kinds, whose words advise to unpickle
        raise BadInput(f"{what} {source} cannot be read as an array of numbers: it is damaged, "
                       "pickled or of another kind") from None
    return check_array(feats, f"{what} {source}")


def sum_features(source, key, name):
    """(steps, mean (D,), spread (D,)) of a video's features: the sum of squares about the mean.

    Raises BadInput for NaN, infinity, and what float32 cannot hold."""
    feats = read_features(source, key, name)
    total = square = 0
    for first in range(0, len(feats), 4096):  # a long video is never held as a whole
        with np.errstate(over="ignore", invalid="ignore"):  # what is wrong is said below
            part = np.asarray(feats[first:first + 4096], dtype=np.float64)
            wrong = np.argwhere(~np.isfinite(part.astype(np.float32)))
        if len(wrong):
            step, channel = wrong[0]
            raise BadInput(f"video {short(name)}: feature file {source} holds "
                           f"{part[step, channel]} at step {first + step}, channel {channel}")
        if first == 0:
            origin = part[0]  # far from 0 the squares would swallow the variance
        part = part - origin
        total = total + part.sum(0)
        square = square + (part ** 2).sum(0)
    steps = len(feats)
    return steps, origin + total / steps, np.maximum(square - total ** 2 / steps, 0)


def statistics(sums, standardize):
    """Mean and std (D,) of sum_features()'s of many videos; 0 and 1 if switched off."""
    steps, means, spreads = (np.array(column) for column in zip(*sums))
    share = (steps / steps.sum())[:, None]
    mean = (share * means).sum(0)
    variance = spreads.sum(0) / steps.sum() + (share * (means - mean) ** 2).sum(0)
    std = np.sqrt(variance)
    std = np.where(std > 1e-6, std, 1)
    if not standardize:
        mean, std = 0 * mean, std ** 0
    return torch.from_numpy(mean), torch.from_numpy(std)


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

    def on_a_step(self):
        """Which instances hold a grid step and so can have a positive point -> (N,) bool."""
        first = self.segments[:, 0].ceil().clamp(min=0)
        last = self.segments[:, 1].floor().clamp(max=self.steps - 1)
        return first <= last


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
        steps = s.resize
    return Video(name, source, s.feature_key, grid, steps, duration, bool(s.resize))


def label_video(video, a, classes):
    """The LabelledVideo of a Video and its Annotation, bad segments left out."""
    good = good_segments(a, video.duration)
    segments = video.grid.to_grid(np.clip(a.segments[good], 0, video.duration))
    labels = [classes.index(label) for label in compress(a.labels, good)]
    return LabelledVideo(**vars(video), segments=torch.tensor(segments, dtype=torch.float32),
                         labels=torch.tensor(labels, dtype=torch.long))


# ---- A data set: read, choose, open, look, assemble ---------------------------------------------

@dataclass
class Dataset:
    """Everything that a run reads. Evaluation alone has no training videos."""
    classes: list  # names
    test: list  # Video
    ground_truth: dict  # {id: Annotation} of the annotated test videos, for evaluation only
    mean: torch.Tensor  # (D,), with std: standardises the input
    std: torch.Tensor
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


@dataclass
class Chosen:
    """Which videos of an annotation file are taken, each {id: Annotation}."""
    annotated: dict  # training videos that may be labelled
    bare: dict  # training videos without annotations
    test: dict
    ignored: list = field(default_factory=list)  # what was not taken, in words
    warnings: list = field(default_factory=list)

    def everything(self):
        """All videos that are taken."""
        return self.annotated | self.bare | self.test


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
                f"--dataset {s.dataset}: {file.name} is missing; expected are {path} and {folder}/"
                f"{s.prefix}<id>{s.extension} (or --root, --annotations, --features); {ORIGIN}")
    return path, folder


def feature_file(folder, name, s):
    """The feature file of a video id, which may name sub-folders; raises BadInput for a way out."""
    parts = Path(name).parts
    if Path(name).is_absolute() or ".." in parts or "\0" in name:
        raise BadInput(f"the video id {shown(name)} leads out of the feature folder {folder}")
    *folders, last = parts or [name]
    return Path(folder, *folders, f"{s.prefix}{last}{s.extension}")


def feature_ids(folder, s):
    """{id: file} of the feature files in a folder and its sub-folders."""
    found = {}
    for file in sorted(Path(folder).rglob(f"*{s.extension}")):
        name = file.name.removesuffix(s.extension)
        if name.startswith(s.prefix) and name != s.prefix:
            name = name.removeprefix(s.prefix)
            found[file.relative_to(folder).with_name(name).as_posix()] = file
    return found


def read_dataset(s):
    """The path of the annotations, {id: Annotation} and {id: source of features}."""
    if s.dataset == "toy":
        return "toy", *toy_videos(s.seed)
    path, folder = locate(s)
    annotations = without_labels(read_annotations(path), s.ignore_labels)
    sources = {name: feature_file(folder, name, s) for name in annotations}
    return path, annotations, sources


def check_subset(path, annotations, subset, flag):
    """The annotations {id: Annotation} of a subset; raises BadInput if there is none."""
    found = in_subset(annotations, subset)
    if not found:
        raise BadInput(f"annotation file {path} has no video of the subset {shown(subset)} "
                       f"({flag}), only of {subsets_of(annotations)}")
    return found


def unknown_video(subset, duration, fps):
    """The Annotation of a video of which nothing more is known, or may be read."""
    return Annotation(subset, duration, fps, np.zeros((0, 2)), [], annotated=False)


def choose_training(path, annotations, s):
    """(annotated, bare) training videos {id: Annotation}; raises BadInput without an annotated.

    Without any subset in the file all its videos are training videos."""
    if s.test_subset == "none" and not any(a.subset for a in annotations.values()):
        train = annotations
    else:
        train = check_subset(path, annotations, s.train_subset, "--train-subset")
    bare = {name: a for name, a in train.items() if not a.annotated}
    annotated = {name: a for name, a in train.items() if a.annotated}
    if not annotated:
        raise BadInput(f"annotation file {path}: no video of the subset {s.train_subset!r} has "
                       "annotations")
    if s.unlabelled_subset:
        more = check_subset(path, annotations, s.unlabelled_subset, "--unlabelled-subset")
        for name in more.keys() - annotated.keys():
            bare[name] = unknown_video(s.unlabelled_subset, more[name].duration, more[name].fps)
    return annotated, bare


def take_files_without_entry(chosen, annotations, sources, s):
    """Add the feature files without an entry to the Chosen, or say that they are ignored.

    Their sources are added as well. Raises BadInput where --unlabelled-features has none."""
    folder = s.unlabelled_features or locate(s)[1]
    loose = {name: file for name, file in feature_ids(folder, s).items() if name not in annotations}
    if loose and not s.unlabelled_features:
        chosen.ignored.append(f"{len(loose)} feature files without an entry: {several(loose, 2)} "
                              "(--unlabelled-features takes them)")
        return
    if s.unlabelled_features and not loose:
        raise BadInput(f"--unlabelled-features {short(folder, 150)} holds no file {s.prefix}<id>"
                       f"{s.extension} without an annotation entry")
    rates = {a.fps for a in annotations.values()}
    fps = rates.pop() if len(rates) == 1 else None
    for name, file in loose.items():
        sources[name] = file
        chosen.bare[name] = unknown_video("", None, fps)


def choose_videos(path, annotations, sources, s, trained):
    """The Chosen videos; adds the sources of files without an entry. Raises BadInput."""
    chosen = Chosen({}, {}, {})
    to_train = {s.train_subset.lower()} | {s.unlabelled_subset.lower()} - {""}
    to_test = {a.subset.lower() for a in annotations.values()} - to_train
    wanted = trained or to_test or s.test_subset.lower() in to_train
    if wanted and s.test_subset != "none":
        flag = "--subset" if trained else "--test-subset NAME, or none"
        chosen.test = check_subset(path, annotations, s.test_subset, flag)
    if trained:
        return chosen
    if not chosen.test:
        chosen.warnings.append("there are no test videos, so no mAP")
    chosen.annotated, chosen.bare = choose_training(path, annotations, s)
    overlap = (chosen.annotated | chosen.bare).keys() & chosen.test.keys()
    if overlap:
        chosen.warnings.append(f"{len(overlap)} test videos are training videos too: the mAP says "
                               "nothing of new ones")
    other = {name: a for name, a in annotations.items() if name not in chosen.everything()}
    if other:
        chosen.ignored.append(f"{len(other)} entries of other subsets: {subsets_of(other)}")
    if s.dataset != "toy":
        take_files_without_entry(chosen, annotations, sources, s)
    return chosen


def hint_at_files(folder, name, s):
    """What the files of a folder are called that hold a missing one's id, in words; else ""."""
    if not Path(folder).is_dir():
        return f"; there is no folder {short(folder, 100)}"
    stem = Path(name).name
    hints = []
    for file in sorted(Path(folder).iterdir()):
        bare = file.name.removesuffix(file.suffix)
        there = f"; there is {short(file.name)}:"
        if file.suffix not in READERS:
            continue
        if bare.startswith(stem):
            hints.append((len(bare), f"{there} --extension {short(file.name[len(stem):])}"))
        elif bare.endswith(stem):
            hints.append((len(bare), f"{there} --prefix {short(bare.removesuffix(stem))}"))
        elif stem.endswith(bare):
            prefix = short(stem.removesuffix(bare))
            hints.append((len(stem), f"{there} the ids have the prefix {prefix}, the files not"))
    return min(hints, default=(0, ""))[1]


def drop_missing(chosen, sources, s):
    """Without the videos that have no feature file, if the settings allow it; raises BadInput."""
    everything = chosen.everything()
    files = {name: sources[name] for name in everything
             if not isinstance(sources[name], np.ndarray)}
    absent = [name for name, file in files.items() if not os.path.lexists(file)]
    if not absent:
        return
    first = files[absent[0]]
    if s.missing == "error" or len(absent) == len(files):
        raise BadInput(
            f"video {short(absent[0])}: feature file not found: {short(first, 150)}"
            f"{hint_at_files(first.parent, absent[0], s)}; of {len(files)} videos {len(absent)} "
            f"lack theirs: {several(absent)} (--missing skip leaves them out)")
    for part in (chosen.annotated, chosen.bare, chosen.test):
        for name in absent:
            part.pop(name, None)
    chosen.warnings.append(
        f"{len(absent)} videos are left out, here and in the mAP: they have no feature file: "
        f"{several(absent)}")


def memory_of(s):
    """The file, in the user's cache, that remembers sum_features() of a folder's files."""
    folder = os.path.abspath(locate(s)[1])
    name = hashlib.sha256(f"{folder}\n{s.feature_key}".encode("utf-8", "surrogateescape"))
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache, "apl", f"{name.hexdigest()[:16]}.npz")


def state_of(source):
    """What changes with a file's content: its size, the times of its content and of its entry.

    None for an array, and where there is no file."""
    if isinstance(source, np.ndarray) or not os.path.isfile(source):
        return None
    state = os.stat(source)
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns


def recall(memory):
    """What remember() wrote, {file: (state, row)}; {} where that is not there."""
    try:
        with np.load(memory, allow_pickle=False) as content:
            files, states, rows = (content[name] for name in ("files", "states", "rows"))
        found = zip(files.tolist(), states.tolist(), rows, strict=True)
        return {file: (tuple(state), row) for file, state, row in found}
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return {}


def remember(memory, known):
    """Write {file: (state_of(), sum_features() in one row)}, if the disk lets us."""
    states, rows = zip(*known.values())
    content = {"files": list(known), "states": states, "rows": rows}
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(memory, lambda file: np.savez(file, **content))
    except (BadInput, OSError, ValueError):
        return  # it would only have saved time


def sum_all(sources, s):
    """({id: sum_features()}, {id: BadInput}) of all sources; a file is read once until it changes.

    A video that is bad is in the second."""
    memory = memory_of(s)
    states = {name: state_of(source) for name, source in sources.items()}
    known = recall(memory) if any(states.values()) else {}
    read = {}
    sums = {}
    faults = {}
    for name, source in sources.items():
        state = states[name]
        file = state and os.path.abspath(source)
        then, row = known.get(file, (None, None))
        if state is None or then != state:
            try:
                row = np.hstack(sum_features(source, s.feature_key, name))
            except BadInput as fault:
                faults[name] = fault
                continue
            if state:
                read[file] = state, row
        sums[name] = int(row[0]), *np.split(row[1:], 2)
    if read and is_first():
        remember(memory, known | read)
    return sums, faults


def check_segments(a, video, where):
    """Raise BadInput for the segments of an Annotation that lie outside their Video."""
    bad = rows_of_annotation(a, ~good_segments(a, video.duration)).segments.tolist()
    if bad:
        others = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise BadInput(
            f"{where} the segment {bad[0]}{others} ends before it starts or lies outside the video "
            f"(duration {video.duration:g}){unit_of(a, video.duration, video.grid.fps)}; "
            "--bad-segments skip leaves such segments out")


def open_videos(annotations, sources, s, path, dim):
    """({id: Video}, {id: sum_features()}): every file checked; raises BadInput.

    dim: the checkpoint's D, or None."""
    others = "the checkpoint's" if dim else "the others"
    videos = {}
    sums, faults = sum_all({name: sources[name] for name in annotations}, s)
    for name, (steps, mean, _) in sums.items():
        a = annotations[name]
        where = f"annotation file {path}, video {short(name)}:"
        try:
            dim = dim or len(mean)
            if len(mean) != dim:
                like = steps == dim or all(steps == other for other, *_ in sums.values())
                turned = "; transposed it would fit: features are (T, D)" if like else ""
                raise BadInput(f"video {short(name)}: feature file {sources[name]} is {len(mean)} "
                               f"wide, {others} {dim}{turned}")
            if s.stride == 0 and not a.duration:
                raise BadInput(f"{where} it has no duration, which --stride 0 needs")
            if s.stride and not s.fps and not a.fps:
                raise BadInput(f"{where} it has no fps; give --fps")
            videos[name] = place_video(name, a, sources[name], steps, s)
            if s.bad_segments == "error":
                check_segments(a, videos[name], where)
        except BadInput as fault:
            faults[name] = fault
    refuse({name: faults[name] for name in annotations if name in faults})
    return videos, sums


def check_spans(videos, annotations, s, dim):
    """Warnings where features span another time than the annotations say; raises BadInput.

    A median off by more than a window and 5 % is a warning, one off by half an error.
    dim: the features' width, their length if they are transposed."""
    known = [v for v in videos.values() if annotations[v.id].duration and s.stride]
    if not known:
        return []
    spans = np.array([v.grid.span(v.steps) for v in known])
    durations = np.array([v.duration for v in known])
    ratio = float(np.median(spans / durations))
    frames = min(max(s.stride, s.frames), 8 * s.stride)  # where --frames is wrong, not more
    window = frames / np.median([v.grid.fps for v in known])
    far = np.abs(spans - durations) > window
    if abs(ratio - 1) > 0.05 and np.median(np.abs(spans - durations)) > window:
        text = (f"the features span {ratio:.2f} times the duration that the annotations say "
                f"(median of {len(known)} videos; {short(known[0].id)}: {spans[0]:.1f} s of "
                f"{durations[0]:.1f} s); are --stride, --frames and --fps right? --stride "
                f"{s.stride / ratio:.4g} would fit")
        turned = np.median([v.grid.span(dim) for v in known] / durations)
        if abs(turned - 1) < 0.05:
            text += "; transposed they would fit: features are (T, D)"
        if not 2 / 3 < ratio < 3 / 2 and not s.trust_grid:
            raise BadInput(f"{text}; --trust-grid goes on")
        return [text]
    off = [v.id for v, much in zip(known, far & (np.abs(spans / durations - 1) > 0.5)) if much]
    if off:
        return [f"the features of {len(off)} videos span another time than their annotations say, "
                f"by more than half: {several(off)}"]
    return []


def check_labelled(labelled, path):
    """Warnings about the LabelledVideos; raises BadInput where there is nothing to learn."""
    instances = sum(len(video.labels) for video in labelled)
    on_step = sum(int(video.on_a_step().sum()) for video in labelled)
    if on_step == 0:
        raise BadInput(
            f"annotation file {path}: none of the {instances} labelled instances of "
            f"{several([video.id for video in labelled])} holds a grid step: there is nothing to "
            "learn (are --stride, --frames and --fps right?)")
    if on_step < instances:
        return [f"{instances - on_step} of {instances} labelled instances hold no grid step and "
                "teach nothing"]
    return []


def check_classes(classes, missing):
    """Warnings about the names of the classes."""
    found = [f"the labels {' and '.join(map(shown, names))} differ by letter case or blanks alone"
             for names in alike_labels(classes)]
    if missing:
        found.append(f"{len(missing)} of {len(classes)} classes have no labelled instance: "
                     f"{several(missing)}")
    return found


def check_known(path, test, classes):
    """Raise BadInput for a label of a test video that a checkpoint does not know."""
    faults = {}
    for name, a in test.items():
        unknown = [label for label in a.labels if label not in classes]
        if unknown:
            faults[name] = (f"annotation file {path}, video {short(name)}: the label "
                            f"{shown(unknown[0])} is unknown to the checkpoint")
    refuse(faults)


def truth_of(path, chosen, s):
    """The annotated test videos {id: Annotation}; raises BadInput if they hold no instance."""
    truth = {name: a for name, a in chosen.test.items() if a.annotated}
    if truth and not any(a.labels for a in truth.values()):
        raise BadInput(f"annotation file {path}: the subset {s.test_subset!r} holds no instance to "
                       "evaluate on")
    bare = len(chosen.test) - len(truth)
    if bare:
        chosen.warnings.append(f"{bare} of {len(chosen.test)} test videos have no annotations: "
                               "they are predicted, but not in the mAP")
    return truth


def fingerprint_of(sums):
    """[T, mean, spread] of a video's features: what changes when they do, or their order."""
    steps, mean, spread = sums
    weight = np.linspace(1, 2, len(mean))
    return [steps, float(weight @ mean), float(weight @ spread)]


def training_part(chosen, names, videos, sums, s):
    """The fields of a Dataset that training reads; `names` are the labelled videos."""
    train = chosen.annotated | chosen.bare
    classes = class_names(chosen.everything().values())
    if s.one_class:
        train, classes = as_one_class(train), ["action"]

    def label(names):
        return {name: label_video(videos[name], train[name], classes) for name in names}

    labelled = list(label(names).values())
    present = {classes[number] for video in labelled for number in video.labels}
    unlabelled = sorted(train.keys() - set(names))
    mean, std = statistics([sums[name] for name in train], s.standardize)
    return {
        "classes": classes,
        "labelled": labelled,
        "unlabelled": [videos[name] for name in unlabelled],
        "hidden": label(chosen.annotated.keys() - set(names)) if s.audit else {},
        "mean": mean,
        "std": std,
        "missing": [name for name in classes if name not in present],
        "fingerprint": {name: fingerprint_of(sums[name]) for name in [*names, *unlabelled]},
    }


def load_dataset(s, trained=None):
    """The Dataset that the DataSettings `s` name; raises BadInput.

    trained: a checkpoint's {"classes", "mean", "std"}, to open the test videos alone."""
    path, annotations, sources = read_dataset(s)
    chosen = choose_videos(path, annotations, sources, s, trained)
    drop_missing(chosen, sources, s)
    truth = truth_of(path, chosen, s)
    names = []
    if s.one_class and not s.ext_scores:
        truth = as_one_class(truth)
    if trained:
        if not s.one_class:
            check_known(path, chosen.test, trained["classes"])
    else:
        ratio = s.ratio or (1.0 if chosen.bare else 0.1)
        names = split_videos(chosen.annotated, ratio, s.split, s.seed)
    everything = chosen.everything()
    dim = len(trained["mean"]) if trained else None
    videos, sums = open_videos(everything, sources, s, path, dim)
    part = {key: trained[key] for key in ("classes", "mean", "std")} if trained else training_part(
        chosen, names, videos, sums, s)
    dataset = Dataset(
        test=[videos[name] for name in sorted(chosen.test)],
        ground_truth=truth,
        ignored=chosen.ignored,
        warnings=chosen.warnings,
        **part)
    dataset.warnings += check_spans(videos, everything, s, dataset.dim)
    if not trained:
        dataset.warnings += check_labelled(dataset.labelled, path)
        dataset.warnings += check_classes(dataset.classes, dataset.missing)
    return dataset


def percent(count, whole):
    """A share in whole percent, as text."""
    return f"{100 * count / max(whole, 1):.0f} %"


def describe(dataset, s):
    """What a run has taken, what it leaves out and what it can learn from, in a few lines.

    s: also the DetectorSettings, for the levels that regress the labelled segments."""
    labelled, unlabelled, test = dataset.labelled, dataset.unlabelled, dataset.test
    lines = [f"{len(labelled)} labelled, {len(unlabelled)} unlabelled, {len(test)} test videos; "
             f"ignored: {'; '.join(dataset.ignored) or 'nothing'}"]
    on_step = [video.on_a_step() for video in labelled]
    instances = sum(map(len, on_step))
    holding = sum(int(on.sum()) for on in on_step)
    lines.append(f"{instances} labelled instances, {instances - holding} of them without a grid "
                 f"step; {len(dataset.classes)} classes, {len(dataset.missing)} without a labelled "
                 "instance")
    steps = np.array([video.steps for video in labelled + unlabelled + test])
    lines.append(f"{steps.min()} to {steps.max()} steps a video, median {np.median(steps):.0f}, "
                 f"of {dataset.dim} channels")
    half = torch.cat([(v.segments[:, 1] - v.segments[:, 0]) / 2 for v in labelled])
    shares = []
    for low, high in s.levels()[1]:
        inside = int(((half >= low) & (half <= high)).sum())
        shares.append(f"{low:g}-{high:g} {percent(inside, instances)}".replace("-inf", "+"))
    lines.append(f"segments by level (half their steps): {', '.join(shares)}")
    return lines


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
        if not labelled:
            break
        _, inside = crop_segments(video.segments, video, start, length, s.crop_keep)
        if inside.any():
            break
    return start, length


def load_item(video, data, s, rng=None):
    """One video as tensors, cropped at random if `rng` is given, a resized one after resizing.

    -> {"id", "video", "feats" (T, D), "start"}, of a LabelledVideo also "segments", "labels"."""
    feats = read_features(video.source, video.key, video.id)
    start, length = 0, video.steps
    if rng is not None:
        start, length = draw_crop(video, s, rng)
    window = slice(start, start + length)
    if not video.resized:
        feats = feats[window]
    kind = np.float64 if feats.dtype == np.float64 else np.float32  # far from 0, first to 0
    x = torch.from_numpy(np.array(feats, dtype=kind))
    if video.resized:
        x = F.interpolate(x.T[None], size=video.steps, mode="linear", align_corners=False)[0].T
        x = x[window]
    x = ((x - data.mean.to(x.dtype)) / data.std.to(x.dtype)).float()
    if not x.isfinite().all():
        step = int((~x.isfinite()).any(1).nonzero()[0, 0])
        raise BadInput(f"video {short(video.id)}: feature file {video.source} is beyond float32 at "
                       f"step {start + step}, standardised")
    item = {"id": video.id, "video": video, "feats": x, "start": start}
    if isinstance(video, LabelledVideo):
        segments, inside = crop_segments(video.segments, video, start, length, s.crop_keep)
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


def training_batches(videos, data, s, steps, rng, done=0):
    """`steps` batches of s.batch videos, cropped at random, loaded ahead; the first `done` are not.

    Of many processes each gets its share of the videos of a larger batch.
    -> collate()'s, with "ids" of the whole batch"""

    def load(plan):
        items = [load_item(videos[i], data, s, np.random.default_rng(seed))
                 for i, seed in share_of(plan)]
        return collate(items) | {"ids": [videos[i].id for i, _ in plan]}

    plans = plan_batches(videos, s, steps, s.batch * process_count(), rng)
    return ahead(load, plans[done:])
