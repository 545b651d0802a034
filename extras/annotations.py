"""What labelling tools export as JSON, in ActivityNet's form, which train.py reads.

    python -m extras.annotations export.json --out my.json --fps 25    of Label Studio
    python -m extras.annotations project.json --out my.json            of VIA 3, a video project

Label Studio (export as JSON, not JSON-MIN): its timeline labels count frames from 1, the last one
included, so that --fps must say how many a second has; those of a recording's sound are in seconds;
those of a time series (.csv, .tsv) are taken as seconds too.
A task has no annotations until one is submitted: it is an unlabelled video. VIA: the segments of
the timeline, which are in seconds; a video without any is unlabelled, as nobody may have seen it.
All videos are of the subset "training", and named as their files are, without the ending.

The tables that BORIS, ELAN, Audacity and spreadsheets write train.py reads as they are.
"""
import re
import sys
from functools import partial
from pathlib import PureWindowsPath
from urllib.parse import unquote

from plumbing import forms
from plumbing.files import VIDEOS, read_json, write_json
from plumbing.runs import guard
from plumbing.settings import Parser
from plumbing.tables import id_of
from plumbing.words import BadInput, say, several, short, warn

OF_SERIES = "timeserieslabels"
IN_SECONDS = ("labels", OF_SERIES)  # Label Studio's labels of times in seconds
SERIES = (".csv", ".tsv")  # files of time series
SEGMENT = "FILE1_Z2_XY0"  # as VIA calls what a segment of a recording has
DELETED = 1  # VIA's flag


# ---- Label Studio -------------------------------------------------------------------------------

def recording_of(task, where):
    """The id of a task's recording, else of its time series, of the first of its data that is one.

    It may be an address with a query, a file of local storage, or an upload, which has a number
    before its name. Raises BadInput."""
    texts = [text for text in task["data"].values() if isinstance(text, str)]
    for endings in (VIDEOS, SERIES):
        for text in texts:
            name = unquote(text.rpartition("?d=")[2].partition("?")[0])
            if name.lower().endswith(endings):
                bare = PureWindowsPath(name).stem  # of any system
                return re.sub("^[0-9a-f]{8}-", "", bare) if "/upload/" in text else bare
    raise BadInput(f"{where}: task {short(task.get('id'))} names no file of a recording, only "
                   f"{several(texts) or 'data of its own'}")


def segments_of(value, fps, where):
    """[start, end] in seconds of each range of what Label Studio says of a region."""
    if "ranges" in value and not fps:
        raise BadInput(f"{where} its timeline labels count frames: give --fps")
    for part in value.get("ranges", ()):
        first, last = (forms.number(part[key], where, f"{key} of a range")
                       for key in ("start", "end"))
        yield [(first - 1) / fps, last / fps]
    if "ranges" not in value:
        yield [value["start"], value["end"]]


def given_of(task):
    """The annotations of a task that were submitted."""
    return [a for a in task.get("annotations", ()) if not a.get("was_cancelled")]


def regions_of(task):
    """The regions of a task: of several annotations of that which is marked as ground truth, else
    of the first."""
    given = given_of(task)
    chosen = [a for a in given if a.get("ground_truth")] or given
    regions = chosen[0]["result"] if chosen else []
    return [region for region in regions if region.get("type") != "relation"]


def labels_of(value):
    """The labels that a region's value has for a time; None of a box, a text, a choice."""
    kinds = [kind for kind in ("timelinelabels", *IN_SECONDS) if kind in value]
    if not kinds or not {"ranges", "start"} & value.keys() or "text" in value:
        return None
    return value[kinds[0]] or [None]


def read_task(task, where, fps):
    """The entry of a task in ActivityNet's form."""
    if not given_of(task):
        return {"subset": "training"}
    annotations = []
    duration = None
    for region in regions_of(task):
        value = region["value"]
        labels = labels_of(value)
        if labels is None:
            continue
        duration = region.get("original_length", value.get("original_length", duration))
        annotations += [{"segment": segment, "label": label}
                        for segment in segments_of(value, fps, where) for label in labels]
    return {"subset": "training", "duration": duration, "annotations": annotations}


def from_label_studio(tasks, fps, where):
    """{id: entry} of the tasks that Label Studio exports; raises BadInput."""
    named = {}
    for task in tasks:
        name = recording_of(task, where)
        if name in named:
            raise BadInput(f"{where}: two tasks are of the recording {short(name)}")
        named[name] = task
    return forms.read_each(named, partial(read_task, fps=fps), where)


def odd_tasks(tasks, fps, where):
    """Yield warnings about what is left out of tasks that can be read."""
    many = [recording_of(task, where) for task in tasks if len(given_of(task)) > 1]
    if many:
        yield (f"{where}: {len(many)} tasks have several annotations; the one marked as ground "
               f"truth, else the first, is read: {several(many)}")
    regions = [region for task in tasks for region in regions_of(task)]
    if any(OF_SERIES in region["value"] for region in regions):
        yield (f"{where}: times in a time series are taken as seconds from its first row, whatever "
               "its column of time counts")
    if fps and not any("ranges" in region["value"] for region in regions):
        yield f"{where}: its times are in seconds: --fps is not used"
    kinds = [region.get("type") for region in regions if labels_of(region["value"]) is None]
    if kinds:
        yield (f"{where}: {len(kinds)} regions have no label of a time and are left out, of the "
               f"kinds {several(sorted(set(map(str, kinds))))}")


# ---- VIA ----------------------------------------------------------------------------------------

def via_labels(attributes, values):
    """The labels that a segment's values {attribute: value} give it.

    The value of an attribute with options is the key of one, or of several with commas."""
    labels = []
    for key, value in values.items():
        attribute = attributes.get(key, {})
        options = attribute.get("options") or {}
        if attribute.get("anchor_id") != SEGMENT or not value:
            continue
        parts = value.split(",") if options and value not in options else [value]
        labels += [options.get(part, part) for part in parts]
    return labels


def regions_left(project):
    """The regions of a project that nobody has deleted."""
    return [r for r in project["metadata"].values() if not r.get("flg", 0) & DELETED]


def odd_regions(project, fps, where):
    """Yield warnings about what is left out of a project that can be read."""
    other = [region for region in regions_left(project) if len(region["z"]) != 2]
    if other:
        yield f"{where}: {len(other)} regions are no segments, as of one moment, and are left out"
    if fps:
        yield f"{where}: its times are in seconds: --fps is not used"


def from_via(project, where):
    """{id: entry} of a video project of VIA 3; raises BadInput."""
    files = {number: view["fid_list"][0] for number, view in project["view"].items()}
    names = {number: id_of(project["file"][file]["fname"]) for number, file in files.items()}
    entries = {}
    for name in names.values():
        if name in entries:
            raise BadInput(f"{where}: two views are of a recording named {short(name)}")
        entries[name] = {"subset": "training"}
    for region in regions_left(project):
        if len(region["z"]) != 2:
            continue  # of one moment, or of the whole recording
        found = entries[names[region["vid"]]].setdefault("annotations", [])
        labels = via_labels(project["attribute"], region["av"])
        found += [{"segment": region["z"], "label": label} for label in labels or [None]]
    return entries


# ---- The command line ---------------------------------------------------------------------------

def convert(path, fps):
    """{id: entry} in ActivityNet's form of an export of Label Studio or of VIA; raises BadInput."""
    where = f"export {path}"
    content = read_json(path, "export")
    tool = forms.tool_of(content)
    if not tool:
        raise BadInput(f"{where} is none of Label Studio's (export as JSON) or of VIA 3's")
    try:
        entries = (from_via(content, where) if tool == "VIA"
                   else from_label_studio(content, fps, where))
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        reason = short(f"{type(error).__name__} {error}")
        raise BadInput(f"{where} is not as {tool} writes it ({reason})") from None
    forms.annotations_of(entries, "", 0, where)  # raises what reading it would
    odd = odd_regions if tool == "VIA" else odd_tasks
    warn(odd(content, fps, where))
    return entries


def main(argv=None):
    """The command line; returns the exit code, 2 for bad input."""
    with guard() as stop:
        parser = Parser(__name__)
        parser.add_argument("export", help="the JSON that the tool wrote")
        parser.add_argument("--out", required=True, help="the JSON to write")
        parser.add_argument("--fps", type=float, default=0, help="frames a second")
        args = parser.parse_args(argv)
        if not 0 <= args.fps < 1e6:
            raise BadInput(f"--fps must be positive and below a million, not {args.fps:g}")
        forms.check_new(args.out)
        entries = convert(args.export, args.fps)
        write_json(args.out, {"database": entries}, indent=1)
        counts = [len(entry["annotations"]) for entry in entries.values() if "annotations" in entry]
        say(f"{args.out} has {len(entries)} videos, {len(counts)} of them labelled, with "
            f"{sum(counts)} instances: train.py takes it as --dataset")
    return stop.code


if __name__ == "__main__":
    sys.exit(main())
