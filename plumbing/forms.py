"""Forms: annotation, prediction, score and split files as the world writes them, in and out.

Times are in seconds. Bad input raises BadInput: the file, the video and the value.
"""
import csv
import io
import json
import math
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path

import numpy as np

from plumbing.files import read_json, read_text, write_text
from plumbing.words import BadInput, refuse, several, short, shown

# ---- Annotations ---------------------------------------------------------------------------------

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
    left_out: list = field(default_factory=list)  # labels of --ignore-labels that it has


# Names under which public annotation files have the same thing.
DURATIONS = ("duration", "duration_second", "duration_seconds")
RATES = ("fps", "frame_rate")
FORM = ('{"subset": "training", "duration": 60.0, "fps": 30.0, "annotations": [{"segment": '
        '[5.0, 24.6], "label": "walk"}]}')  # as a message shows an entry


def number(value, where, what):
    """The finite number that a JSON value is, written as text or not; raises BadInput."""
    try:
        x = float(str(value))  # as text True and None are no numbers, and no whole one overflows
    except ValueError:
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
    if value is None or not str(value).strip():
        raise BadInput(f"{where} a segment has no label")
    if type(value) not in (str, int, float):
        raise BadInput(f"{where} a label must be text or a number, not {shown(value)}")
    return str(value)


def read_instances(items, where):
    """(segment, label, label id) of each item of "annotations"; a list of labels is as many."""
    for item in items:
        if not isinstance(item, dict):
            raise BadInput(f"{where} an annotation must hold a segment and a label, not "
                           f"{shown(item)}")
        segment = read_segment(item.get("segment"), where)
        labels, numbers = item.get("label"), item.get("label_id")
        if not isinstance(labels, list):
            labels, numbers = [labels], [numbers]
        if not isinstance(numbers, list) or len(numbers) != len(labels):
            numbers = []
        for label, label_id in zip_longest(labels or [None], numbers):
            yield segment, read_label(label, where), label_id


def is_table(value):
    """Whether a JSON value is a list of lists or objects, as what happens is written."""
    return isinstance(value, list) and any(isinstance(item, list | dict) for item in value)


def read_annotation(entry, where, ignored, fps):
    """The Annotation of an entry of the database; `where` names it. Raises BadInput.

    ignored  the labels that are left out
    fps      of all videos, where it is given: what the entry says of it is not read"""
    items = entry.get("annotations")
    other = [key for key, value in entry.items() if items is None and is_table(value)]
    if other or not isinstance(items, list | None):
        raise BadInput(f'{where} the entry holds {several(other or ["annotations"])}, but no list '
                       f'of "annotations"; it must look like {FORM}')
    subset = entry.get("subset") or ""
    if not isinstance(subset, str):
        raise BadInput(f"{where} subset must be text, not {shown(subset)}")
    rows = [*read_instances(items or [], where)]
    kept = [row for row in rows if row[1].strip() not in ignored]
    segments, labels, label_ids = zip(*kept) if kept else ((), (), ())
    return Annotation(
        subset.strip(),
        positive_number(entry, DURATIONS, where),
        fps or positive_number(entry, RATES, where),
        np.array(segments).reshape(-1, 2),
        list(labels),
        list(label_ids),
        items is not None,
        [label.strip() for _, label, _ in rows if label.strip() in ignored])


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


def names_in(text):
    """The names in a text with commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def annotations_of(entries, ignored, fps, what):
    """{id: Annotation} of the entries of a database; the rest as read_annotations() has it."""
    read = partial(read_annotation, ignored=names_in(ignored), fps=fps)
    return read_each(entries, read, what)


def never_ignored(annotations, ignored, path):
    """Yield a warning about each label to ignore that no Annotation of a file has left out."""
    left_out = {label for a in annotations.values() for label in a.left_out}
    known = {label for a in annotations.values() for label in a.labels}
    for label in names_in(ignored):
        if label not in left_out:
            yield (f"annotation file {path} has no label {shown(label)}, which --ignore-labels "
                   f"names; its labels are {several(sorted(known | left_out))}")


def tool_of(content):
    """The labelling tool that has exported a JSON value, which extras/annotations.py reads; ""."""
    match content:
        case [{"data": dict()}, *_]:
            return "Label Studio"
        case {"project": dict(), "metadata": dict(), "view": dict()}:
            return "VIA"
    return ""


def read_annotations(path, ignored="", fps=0):
    """{video id: Annotation} of an ActivityNet-style JSON, or of its "database" alone.

    ignored  labels that are left out, with commas
    fps      of all videos; 0: as the file says
    Raises BadInput for another form."""
    content = read_json(path, "annotation file")
    tool = tool_of(content)
    if tool:
        raise BadInput(f"annotation file {path} is an export of {tool}: python -m "
                       f"extras.annotations {path} --out my.json converts it")
    if isinstance(content, dict) and "database" not in content and "results" in content:
        raise BadInput(f"annotation file {path} is a list of detections; evaluate.py --out "
                       "found.csv writes one to correct and to train on")
    database = content.get("database", content) if isinstance(content, dict) else None
    if not isinstance(database, dict) or not all(isinstance(e, dict) for e in database.values()):
        raise BadInput(f'annotation file {path} has no "database" of videos, each a JSON object')
    known = {"subset", "annotations", *DURATIONS, *RATES}
    if database and not any(known & entry.keys() for entry in database.values()):
        raise BadInput(f"annotation file {path}: none of its entries, {several(database)}, is a "
                       f"video; one must look like {FORM}")
    return annotations_of(database, ignored, fps, f"annotation file {path}")


def unknown_video(duration, fps):
    """The Annotation of a video of which nothing more is known, or may be read."""
    return Annotation("", duration, fps, np.zeros((0, 2)), [], annotated=False)


# ---- Annotations, chosen and changed -------------------------------------------------------------

# What else a subset is called, where none has its name.
ALIASES = {
    "training": "train", "train": "training", "test": "testing", "testing": "test",
    "val": "valid validation", "valid": "val validation", "validation": "val valid test testing",
}


def in_subset(annotations, subset):
    """The annotations {id: Annotation} of a subset, in any letter case, or of one of its ALIASES.
    """
    subset = subset.lower()
    for wanted in (subset, *ALIASES.get(subset, "").split()):
        found = {name: a for name, a in annotations.items() if a.subset.lower() == wanted}
        if found:
            return found
    return {}


def subsets_of(annotations):
    """The names of the subsets, with the number of videos of each, as a message shows them."""
    names = [a.subset or "none" for a in annotations.values()]
    return several([f"{name} ({names.count(name)})" for name in sorted(set(names))])


def as_one_class(annotations):
    """The annotations {id: Annotation} with one class for all instances."""
    return {name: replace(a, labels=["action"] * len(a.labels), label_ids=[])
            for name, a in annotations.items()}


def half_inside(segments, duration):
    """Which segments (N, 2) lie at least half inside the video -> (N,) bool."""
    return (np.diff(segments.clip(0, duration)) >= 0.5 * np.diff(segments))[:, 0]


def good_segments(a, duration):
    """Which segments of an Annotation end after they start and lie at least half inside the video.

    -> (N,) bool"""
    return (np.diff(a.segments)[:, 0] > 0) & half_inside(a.segments, duration)


def class_names(annotations):
    """Class names in the order of their label_id (numbers, or strings of numbers), else by name."""
    pairs = set()
    for a in annotations:
        pairs.update(zip_longest(a.labels, map(str, a.label_ids), fillvalue=""))
    id_of = dict(pairs)
    numbered = all(text.isdecimal() and len(text) < 19 for text in id_of.values())
    if numbered and len(id_of) == len(pairs):
        return sorted(id_of, key=lambda label: (int(id_of[label]), label))
    return sorted(id_of)


# ---- Splits, predictions, scores -----------------------------------------------------------------

def read_split(path, videos):
    """The labelled ids that a file lists; raises BadInput if there is none or one is unknown."""
    if path.suffix == ".json":
        content = read_json(path, "split file")
        ids = content.get("labelled") if isinstance(content, dict) else content
    else:
        ids = [*filter(None, map(str.strip, read_text(path, "split file").splitlines()))]
    if not isinstance(ids, list) or not ids or not all(isinstance(name, str) for name in ids):
        raise BadInput(f"split file {path} selects no labelled video; it must list their ids")
    ids = [name if name in videos else name.removeprefix("v_") for name in ids]
    unknown = [name for name in ids if name not in videos]
    if unknown:
        raise BadInput(f"split file {path} names {several(unknown)}: no annotated training video "
                       f"({len(unknown)} of {len(ids)} ids; one id a line)")
    return sorted(set(ids))


def read_results(path, what):
    """The content of a JSON file that has {id: ...} under "results"; raises BadInput."""
    content = read_json(path, what)
    match content:
        case {"results": dict()}:
            return content
    raise BadInput(f'{what} {path} has no "results" of videos')


def read_detections(found, where):
    """The detections [{"label", "score", "segment"}] of a video; raises BadInput."""
    if not isinstance(found, list) or not all(isinstance(d, dict) for d in found):
        raise BadInput(f"{where} it must list predictions, not {shown(found)}")
    detections = []
    for d in found:
        start, end = segment = read_segment(d.get("segment"), where)
        if end < start:
            raise BadInput(f"{where} the segment {segment} ends before it starts")
        detections.append({"label": read_label(d.get("label"), where), "segment": segment,
                           "score": number(d.get("score"), where, "a score")})
    return detections


def read_predictions(path):
    """{id: detections} of a file in ActivityNet's result format; raises BadInput for another."""
    if Path(path).suffix.lower() in (".csv", ".srt"):
        raise BadInput(f"prediction file {path}: predictions are read as JSON, as evaluate.py "
                       "--out found.json and a run's predictions.json have them")
    results = read_results(path, "prediction file")["results"]
    return read_each(results, read_detections, f"prediction file {path}")


def read_video_scores(path):
    """{id: {label: score}} of a file of video-level scores; raises BadInput.

    The file holds "results": {id: scores}, and scores are {label: score}, or as many as the names
    under "class" (the form that ActivityNet's classifiers are published in)."""
    content = read_results(path, "score file")
    names = content.get("class")

    def read(scores, where):
        if isinstance(scores, list) and isinstance(names, list) and len(names) == len(scores):
            scores = dict(zip(map(str, names), scores))
        if not isinstance(scores, dict) or not scores:
            raise BadInput(f"{where} it must hold a score for each class, not {shown(scores)}")
        found = {label: number(score, where, "a score") for label, score in scores.items()}
        if min(found.values()) < 0:
            raise BadInput(f"{where} a score must not be negative, as {min(found.values()):g} is: "
                           "probabilities are expected, no logits")
        return found

    return read_each(content["results"], read, f"score file {path}")


# ---- What is written for others -----------------------------------------------------------------

def listed(segments, labels):
    """Instances as ActivityNet's annotation files have them."""
    return [{"segment": segment, "label": label} for segment, label in zip(segments, labels)]


def with_video_scores(results, scores_of):
    """Detections of one class -> of the two classes that score best for their whole video.

    The score is the geometric mean of both, as the public ActionFormer has it. A video without
    scores of its own has no detection.
    results  {id: [{"label", "score", "segment"}]}, scores_of {id: {label: score}}"""
    found = {}
    for video, detections in results.items():
        scores = scores_of.get(video) or scores_of.get(f"v_{video}", {})
        best = sorted(scores, key=scores.get, reverse=True)[:2]
        named = [d | {"label": label, "score": math.sqrt(d["score"] * scores[label])}
                 for d in detections for label in best]
        found[video] = sorted(named, key=lambda d: -d["score"])
    return found


def result_format(found, external):
    """Detections {id: [{"label", "score", "segment"}]} in ActivityNet's result format.

    external  what else than the features was used, as the format asks"""
    return {"version": "VERSION 1.3", "results": found, "external_data": external}


def table(metrics, title):
    """A table of mAP in percent, with the number of videos, instances and classes."""
    head = "".join(f"{threshold:8.2f}" for threshold in metrics["tiou"])
    body = "".join(f"{100 * value:8.2f}" for value in metrics["mAP"])
    if metrics.get("external_scores"):
        title += " with external video-level scores"
    return (f"{title}: {metrics['videos']} videos, {metrics['instances']} instances, "
            f"{len(metrics['ap'])} classes\n"
            f"tIoU  {head}    Avg.\n"
            f"mAP % {body}{100 * metrics['average_mAP']:8.2f}")


def clock(seconds):
    """Seconds as m:ss.s."""
    minutes, rest = divmod(round(10 * seconds), 600)
    return f"{minutes}:{rest / 10:04.1f}"


def subtitle_clock(seconds):
    """Seconds as hh:mm:ss,mmm, as a subtitle has them."""
    minutes, rest = divmod(round(1000 * seconds), 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02},{rest % 1000:03}"


def actions(segments, labels, scores, least):
    """The actions of at least a score, as they are printed and written."""
    return [
        {"segment": [round(start, 4), round(end, 4)], "label": label, "score": round(score, 4)}
        for (start, end), label, score in zip(segments.tolist(), labels, scores.tolist())
        if score >= least]


def listing(actions):
    """Actions [{"segment", "label", "score"}] in lines for people."""
    return "\n".join(
        f"{clock(a['segment'][0]):>9} - {clock(a['segment'][1]):>8}  {a['score']:.2f}  "
        f"{short(a['label'])}" for a in actions)


def json_text(found):
    """The text of a .json file of the actions of videos, in ActivityNet's result format."""
    return json.dumps(result_format(found, {}), indent=1)


def as_cell(text):
    """A text as a cell of a table, in which a spreadsheet finds no formula."""
    return f"'{text}" if text.lstrip("'").startswith(("=", "+", "-", "@", "\t", "\r")) else text


def from_cell(cell):
    """The text that as_cell() has made a cell of."""
    escaped = cell.startswith("'") and as_cell(cell[1:]) == cell
    return cell[1:] if escaped else cell


def csv_text(found):
    """The text of a .csv file of the actions of videos, which tables.py reads; a video without an
    action has a row that says so."""
    rows = [("video", "start", "end", "label", "score")]
    for video, actions in found.items():
        rows += [(as_cell(video), *a["segment"], as_cell(a["label"]), a["score"])
                 for a in actions] or [(as_cell(video), "", "", "", "")]
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue()


def srt_text(found):
    """The text of an .srt file of the actions of one video, in their order in time."""
    [actions] = found.values()
    in_time = sorted(actions, key=lambda a: a["segment"])
    return "\n".join(
        f"{number}\n{subtitle_clock(a['segment'][0])} --> {subtitle_clock(a['segment'][1])}\n"
        f"{' '.join(a['label'].split())} {a['score']:.2f}\n" for number, a in enumerate(in_time, 1))


def track_text(found):
    """The text of a .txt file of the actions of one video: a label track, as Audacity reads it."""
    [actions] = found.values()
    return "".join("{}\t{}\t{}\n".format(*a["segment"], " ".join(a["label"].split()))
                   for a in actions)


TEXTS = {".json": json_text, ".csv": csv_text, ".srt": srt_text, ".txt": track_text}


def check_new(path):
    """Raise BadInput where the file to write exists: somebody may have corrected it."""
    if not Path(path).absolute().parent.is_dir():
        raise BadInput(f"--out {path} cannot be written: there is no folder {Path(path).parent}")
    if Path(path).exists():
        raise BadInput(f"--out {path} exists: name another file, or remove it if nobody has "
                       "corrected it")


def check_ending(path, videos):
    """Raise BadInput for an ending that write_found() does not know, or not for several videos."""
    ending = Path(path).suffix
    if ending not in TEXTS or ending in (".srt", ".txt") and videos > 1:
        raise BadInput(f"--out {path} must end in .json, .csv or, for one video, .srt or .txt")


def write_found(path, found):
    """Write {video: [{"segment", "label", "score"}]} in the form that the ending says."""
    write_text(path, TEXTS[Path(path).suffix](found))
