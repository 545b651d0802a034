"""One HTML page about a run: its videos on a time axis, its errors, curves, mAP, Fig. 4.

    python -m extras.viewer runs/my                      writes runs/my/page.html
    python -m extras.viewer runs/my --out page.html
    python -m extras.viewer runs/my runs/other           compares it with another run
    python -m extras.viewer runs/my --videos recordings  plays recordings/<id>.mp4, .webm, ...

The page needs no network and no package: data, style and script are in it, only recordings stay
where they are. All its numbers come from the files that train.py writes into the run's folder;
what a run does not have, the page leaves out. Kinds of error and the like are extras/analysis.py's.
An address like page.html#video=3&score=0.5&zoom=4 opens it there.
"""
import json
import math
import os
import shlex
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from types import UnionType
from urllib.parse import quote

import numpy as np

from extras import analysis
from icd import STATUS
from plumbing.files import (
    VIDEOS,
    check_replaced,
    files_in,
    read_features,
    read_json,
    read_rows,
    write_text,
)
from plumbing.runs import guard
from plumbing.settings import Parser, flag, settings_from, thresholds_of
from plumbing.sources import feature_file, locate
from plumbing.toy import toy_videos
from plumbing.words import BadInput, say, several, short, warn
from train import Settings

MOST = 100  # segments of a video that go into the page, the best ones
MOST_OF_ALL = 50_000  # about as many of all videos together
LEAST_OF_A_VIDEO = 10
LEAST_SCORE = 0.01  # detections below stay out
MOST_POINTS = 2000  # rows of a stage's curves
MOST_CHANNELS = 4  # feature curves of a video
MOST_STEPS = 500  # of a feature curve
MOST_STEPS_OF_ALL = 200_000  # as of 400 videos
LEAST_STEPS = 50  # with fewer there are no curves
PARTS = ("test", "unlabelled", "labelled")  # the order of the videos
NOT_CURVES = ("stage", "epoch", "step", "of", "steps_a_second", "seconds_left")
QUALITY = ("class_accuracy", "mean_tIoU", "positive_accuracy", "precision", "recall")


# ---- What the page shows ------------------------------------------------------------------------

def compact(value):
    """A JSON value with numbers of six digits; what is no finite number becomes None."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: compact(item) for key, item in value.items()}
    if isinstance(value, list):
        return [compact(item) for item in value]
    return value


# The form of each file of a run, as has_form() takes it.
NUMBER = int | float
INSTANCE = {"label": str, "segment": [NUMBER]}
POINT = dict.fromkeys(("score", "precision", "recall", "f1"), NUMBER)
CURVE = dict.fromkeys(POINT, [NUMBER])
TRUST = POINT | {"classes": {"*": POINT | {"curve": CURVE}}}  # of metrics.json, where it is there
FORMS = {
    "config.json": {"dataset": str, "seed": int, "*": str | NUMBER},
    "videos.json": {"*": {"part": PARTS, "duration": NUMBER | None,
                          "annotations": (None, [INSTANCE])}},
    "split.json": {"missing_classes": [str]},
    "metrics.json": {"tiou": [NUMBER], "mAP": [NUMBER], "average_mAP": NUMBER, "videos": int,
                     "instances": int, "weights": str, "ap": {"*": [NUMBER]}},
    "predictions.json": {"results": {"*": [INSTANCE | {"score": NUMBER}]}},
    "pseudo_labels.json": {"*": [INSTANCE | {
        "score": NUMBER, "status": STATUS, "class_score": NUMBER,
        "tIoU": NUMBER | None, "tND": NUMBER | None, "similarity": NUMBER | None}]},
    "representation.json": {"classes": [str], "label": [int], "before": [[NUMBER]],
                            "after": [[NUMBER]]},
}


def has_form(x, form):
    """Whether a JSON value has a form.

    form  a type, or some with | between; None or a text: that value; (a, b): one of both; [a]: a
          list of such; {key: a}: a dict with that key, or, under "*", for all other keys"""
    if isinstance(form, tuple):
        return any(has_form(x, one) for one in form)
    if isinstance(form, list):
        return isinstance(x, list) and all(has_form(item, form[0]) for item in x)
    if isinstance(form, dict):
        named = form.keys() - {"*"}
        return isinstance(x, dict) and named <= x.keys() and all(
            has_form(value, form[key if key in named else "*"]) for key, value in x.items()
            if key in named or "*" in form)
    return isinstance(x, form) if isinstance(form, type | UnionType) else x == form


def fits_itself(content, name):
    """Whether the lists of a file of a run are of lengths that belong together."""
    if name == "metrics.json":
        lists = [content["mAP"], *content["ap"].values()]
        return (all(len(values) == len(content["tiou"]) for values in lists)
                and has_form(content.get("trust"), (None, TRUST)))
    if name == "representation.json":
        points = content["before"] + content["after"]
        labels, classes = content["label"], len(content["classes"])
        return (all(len(point) == 2 for point in points)
                and len(content["before"]) == len(content["after"]) == len(labels)
                and all(0 <= label < classes for label in labels))
    return True


def read_file(folder, name, needed=False):
    """The content of a JSON file of a run, None where there is none; raises BadInput."""
    path = folder / name
    if not needed and not path.exists():
        return None
    content = read_json(path, "file of a run")
    if not has_form(content, FORMS[name]) or not fits_itself(content, name):
        raise BadInput(f"{path} is not as train.py writes it: the folder is no run of this version")
    return content


def best(found, most):
    """The best `most` of the detections or pseudo labels of a video; candidates come last."""
    good = [one for one in found if one["score"] >= LEAST_SCORE or "status" in one]
    good.sort(key=lambda one: (one.get("status") == "candidate", -one["score"]))
    return good[:most]


def hundredths(found):
    """How many of some detections have which score, rounded down: {hundredths: number}."""
    return Counter(math.floor(100 * one["score"] + 1e-9) for one in found)


def segment_row(one, classes):
    """An instance as a list: class, start, end, score, status, class score, tIoU, tND, similarity.

    Ground truth ends after the second, a detection after the score."""
    row = [classes[one["label"]], *one["segment"]]
    if "score" in one:
        row.append(one["score"])
    if "status" in one:
        scores = [one[key] for key in ("class_score", "tIoU", "tND", "similarity")]
        row += [STATUS.index(one["status"]), *scores]
    return row


def class_names(videos, found, metrics, representation):
    """The names of all classes, in the order of representation.json where there is one."""
    instances = [*found.values(), *(entry["annotations"] or [] for entry in videos.values())]
    names = {one["label"] for listed in instances for one in listed}
    names |= set(metrics["ap"] if metrics else [])
    first = representation["classes"][:-1] if representation else []
    return list(dict.fromkeys([*first, *sorted(names)]))


def video_of(name, entry, found, classes, most):
    """What the page shows of a video.

    entry  of videos.json
    found  its detections, which marked() may have seen, or pseudo labels; None where there cannot
           be any"""
    truth = entry["annotations"]
    shown = best(found or [], most)
    kept = {id(one) for one in shown}
    left_out = hundredths(one for one in found or [] if id(one) not in kept)
    listed = [*(truth or []), *shown]
    ends = [one["segment"][1] for one in listed]
    return {
        "id": name,
        "part": entry["part"],
        "duration": entry.get("duration") or max(ends, default=1.0),
        "truth": None if truth is None else [segment_row(one, classes) for one in truth],
        "found": None if found is None else [segment_row(one, classes) for one in shown],
        "kinds": [one["kind"] for one in shown if "kind" in one],
        "takes": [one["takes"] for one in shown if "takes" in one],
        "left_out": len(found or []) - len(shown),
        "left_out_by_score": left_out,
    }


def curves_of(rows):
    """The losses of a log by stage: {stage: {"every", "x": steps, "y": {name: values}}}."""
    stages = {}
    for row in rows:
        if "loss" in row:
            stages.setdefault(row["stage"], []).append(row)
    curves = {}
    for stage, mine in stages.items():
        every = math.ceil(len(mine) / MOST_POINTS)
        mine = mine[::every]
        names = dict.fromkeys(key for row in mine for key in row if key not in NOT_CURVES)
        curves[stage] = {
            "every": every,
            "x": [row["step"] for row in mine],
            "y": {name: [row.get(name) for row in mine] for name in names},
        }
    return curves


def pulses_of(rows):
    """Numbers of pseudo labels by epoch, and where audited their quality.

    -> {"x": epochs, "count", "quality"}, None where the log has none"""
    mine = [row for row in rows if "theta_h" in row]
    if not mine:
        return None
    audited = [key for key in QUALITY if any(key in row for row in mine)]
    return {
        "x": [row["epoch"] for row in mine],
        "count": {
            "kept": [row["positives"] - row["dropped"] for row in mine],
            "dropped": [row["dropped"] for row in mine],
            "mined": [row["mined"] for row in mine],
            "candidate": [row["candidates"] - row["mined"] for row in mine],
        },
        "quality": {key: [row.get(key) for row in mine] for key in audited},
    }


def percent(fraction):
    """A fraction as the page's header shows it."""
    return f"{100 * fraction:.1f} %"


def facts_of(config, videos, split, metrics, rows):
    """The header of the page: [[name, text]]."""
    count = {part: sum(entry["part"] == part for entry in videos.values()) for part in PARTS}
    training = count["labelled"] + count["unlabelled"]
    share = percent(count["labelled"] / max(training, 1))
    facts = [
        ["data set", Path(str(config["dataset"])).stem],
        ["labelled", f"{share}, {count['labelled']} of {training} training videos"],
        ["test videos", str(count["test"])],
        ["seed", str(config["seed"])],
        ["stages", ", ".join(dict.fromkeys(row["stage"] for row in rows)) or "none in the log"],
    ]
    if split and split["missing_classes"]:
        facts.append(["classes without a label", str(len(split["missing_classes"]))])
    if metrics is None:
        return facts
    if "supervised_mAP" in metrics:
        facts.append(["average mAP, supervised only", percent(metrics["supervised_mAP"])])
    facts.append([f"average mAP, {metrics['weights']} weights", percent(metrics["average_mAP"])])
    for other in ("raw", "ema"):
        average = metrics.get(f"average_mAP_{other}")
        if average is not None:
            facts.append([f"average mAP, {other} weights", percent(average)])
    return facts


# ---- The top ------------------------------------------------------------------------------------

def command_of(config):
    """The command line of a run, with the settings that are not the defaults.

    None where it has other settings than train.py, as another detector's run"""
    if config.keys() != {f.name for f in fields(Settings)}:
        return None
    usual = {f.name: f.default for f in fields(Settings)} | Settings.preset(config["dataset"])
    words = ["python", "train.py"]
    for name, value in config.items():
        if value == usual[name] or name in ("overwrite", "check", "resume"):
            continue
        if isinstance(value, bool):
            words.append(flag(name) if value else flag(f"no_{name}"))
        else:
            words += [flag(name), shlex.quote(str(value))]
    return " ".join(words)


def duration_of(rows):
    """How long the training steps of a log took, in words; None where it does not say."""
    last = {row["stage"]: row for row in rows if row.get("steps_a_second")}
    if not last:
        return None
    seconds = sum(row["step"] / row["steps_a_second"] for row in last.values())
    return f"{timedelta(seconds=round(seconds))} of training steps"


def about(folder, config, metrics, rows):
    """Date, duration, gain and command of a run, where its files have them: [[name, text]]."""
    begun = time.localtime((folder / "config.json").stat().st_mtime)
    facts = [["begun, or last resumed", time.strftime("%Y-%m-%d %H:%M", begun)],
             ["took", duration_of(rows)]]
    if metrics and "supervised_mAP" in metrics:
        gain = 100 * (metrics["average_mAP"] - metrics["supervised_mAP"])
        facts.append(["gain over the supervised stage", f"{gain:+.1f} points of average mAP"])
    facts.append(["command", command_of(config)])
    return [[name, text] for name, text in facts if text]


# ---- What is wrong with the detections ----------------------------------------------------------

def operating_point(metrics, curve):
    """The point from which detections are listed: the one of metrics.json, else of a curve.

    Its score is rounded down, as there. -> {"score", None without detections, "precision", ...}"""
    trust = (metrics or {}).get("trust")
    if trust:
        return {key: trust[key] for key in POINT}
    point = curve["best"]
    if point["score"] is None:
        return point
    return point | {"score": math.floor(1000 * point["score"]) / 1000}


def sparse(confusion):
    """analysis.confusion_of() without zeros: "cells" lists [row, column, number]."""
    cells = [[i, j, number] for i, row in enumerate(confusion["counts"])
             for j, number in enumerate(row) if number]
    return {"rows": confusion["rows"], "columns": confusion["columns"], "cells": cells}


def marked(pairs, truth, predictions):
    """The predictions with "kind", the number of analysis.TYPES, and "takes", the number of the
    instance of the video that each is matched to, -1 without."""
    kinds, takes = (np.empty(len(pairs.score), dtype=np.int64) for _ in range(2))
    kinds[pairs.order] = analysis.error_types(pairs)[0]
    takes[pairs.order] = pairs.taken[0]
    places = []
    for a in truth.values():
        places += np.nonzero(a.segments[:, 1] > a.segments[:, 0])[0].tolist()
    takes = np.append(places, -1)[takes]
    found = {}
    at = 0
    for video, detections in predictions.items():
        found[video] = [
            one | {"kind": int(kinds[i]), "takes": int(takes[i])}
            for i, one in enumerate(detections, at)]
        at += len(detections)
    return found


def judged(folder, config, metrics, predictions):
    """What extras/analysis.py says of a run -> (what the page shows, predictions as marked()).

    predictions  the content of predictions.json, None without
    None and the predictions as they are where no test video has annotations, or no predictions"""
    predictions = predictions["results"] if predictions else {}
    videos = analysis.read_videos(folder / "videos.json")
    truth = analysis.truth_of(videos)
    found = {name: predictions[name] for name in truth if name in predictions}
    if not found:
        return None, predictions
    labelled = {name: a for name, a in videos.items() if a.subset == "labelled"}
    tious = metrics["tiou"] if metrics else thresholds_of(analysis.DEFAULT_TIOU)
    pairs, half = (analysis.paired(truth, found, at) for at in (tious, [analysis.HALF]))
    hits = half.hits[0]
    curve = analysis.curve_of(half.score, hits, len(half.truth.label))
    point = operating_point(metrics, curve)
    shown = {
        "types": analysis.TYPES,
        "point": point,
        "curve": curve["points"],
        "errors": analysis.errors_of(pairs),
        "groups": analysis.groups_of(pairs, analysis.EDGES.get(str(config["dataset"]))),
        "bins": analysis.reliability_of(half.score, hits),
        "classes": analysis.classes_of(pairs, labelled),
        "confusion": sparse(analysis.confusion_of(half, point["score"])),
        "videos": {row["video"]: row for row in analysis.videos_of(half, point["score"])},
    }
    return shown, predictions | marked(half, truth, found)


@contextmanager
def as_written(folder):
    """Raises BadInput for what goes wrong inside with files that are not as train.py writes them.
    """
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        reason = short(f"{type(error).__name__} {error}")
        raise BadInput(f"{folder} is no run of this version: its files are not as train.py writes "
                       f"them ({reason})") from error


def check_comparable(folder, metrics, analysed):
    """Raise BadInput for a run in a folder that has nothing to compare."""
    if metrics is None or analysed is None:
        raise BadInput(f"{folder} has no annotated test video that was evaluated: there is nothing "
                       "to compare")


def compared(folder):
    """What the page shows of another run beside the first; raises BadInput."""
    config = read_file(folder, "config.json", True)
    read_file(folder, "videos.json", True)
    metrics, predictions = (read_file(folder, name) for name in (
        "metrics.json", "predictions.json"))
    with as_written(folder):
        analysed, _ = judged(folder, config, metrics, predictions)
    check_comparable(folder, metrics, analysed)
    return compact({"name": folder.resolve().name, "metrics": metrics,
                    "errors": analysed["errors"], "classes": analysed["classes"]})


# ---- Recordings and features --------------------------------------------------------------------

def recordings_of(videos, folder, page):
    """{id: address, as seen from the page} of the recordings <id>.mp4, .webm, ... in a folder.

    Raises BadInput where it has none of the videos."""
    folder = Path(folder)
    listed = [file for _, file in files_in(folder) if file.suffix.lower() in VIDEOS]
    listed.sort(key=lambda file: -VIDEOS.index(file.suffix.lower()))  # the last counts: .mp4
    files = {}
    for file in listed:
        place = file.relative_to(folder)
        files[place.as_posix()] = files[place.with_suffix("").as_posix()] = file
    found = {name: files[name] for name in videos if name in files}
    if not found:
        endings = ", ".join(sorted(VIDEOS))
        raise BadInput(f"--videos {folder} holds no recording <id> ({endings}) of the "
                       f"{len(videos)} videos of the run")
    played = set(found.values())
    unused = [file.relative_to(folder).as_posix() for file in listed if file not in played]
    if unused:
        warn([f"--videos {folder}: {len(unused)} recordings are not used: {several(unused)}"])
    if len(found) < len(videos):
        warn([f"--videos {folder}: {len(videos) - len(found)} of {len(videos)} videos of the run "
              "have no recording"])
    base = Path(page).resolve().parent
    try:
        return {name: quote(Path(os.path.relpath(file.resolve(), base)).as_posix())
                for name, file in found.items()}
    except ValueError:  # another drive
        return {name: file.resolve().as_uri() for name, file in found.items()}


def feature_curves(feats, most):
    """The channels of the largest variance of features (T, D), thinned to `most` steps.

    ->  {"channels": their numbers, "y": a list each of 0 .. 99, lowest to highest}"""
    steps = np.linspace(0, len(feats) - 1, min(len(feats), most)).round().astype(np.int64)
    values = np.nan_to_num(np.asarray(feats[steps], dtype=np.float64))
    channels = np.argsort(-values.var(0), kind="stable")[:MOST_CHANNELS]
    values = values[:, channels]
    low, high = values.min(0), values.max(0)
    scaled = 99 * (values - low) / np.where(high > low, high - low, 1)
    return {"channels": channels.tolist(), "y": scaled.round().astype(np.int64).T.tolist()}


def curves_of_features(folder, config, names):
    """{id: feature_curves()} of the videos whose features are still there and readable."""
    most = min(MOST_STEPS, MOST_STEPS_OF_ALL // max(len(names), 1))
    if most < LEAST_STEPS:
        return {}
    try:
        s = settings_from(config, Settings, folder / "config.json")
        arrays = toy_videos(s.seed)[1] if s.dataset == "toy" else None
        place = None if arrays else locate(s)[1]
    except BadInput:
        return {}
    found = {}
    for name in names:
        try:
            source = arrays[name] if arrays else feature_file(place, name, s)
            found[name] = feature_curves(read_features(source, s.reading(), name), most)
        except (BadInput, KeyError):
            continue
    return found


# ---- All of it ----------------------------------------------------------------------------------

def page_data(folder, recordings=None, page=None):
    """What the page shows of the run in a folder; raises BadInput.

    recordings  a folder of video files, which the page at the path `page` plays"""
    config, videos = (read_file(folder, name, True) for name in ("config.json", "videos.json"))
    split, metrics, predictions, pseudo, representation = (read_file(folder, name) for name in (
        "split.json", "metrics.json", "predictions.json", "pseudo_labels.json",
        "representation.json"))
    rows, _ = read_rows(folder / "log.jsonl")
    with as_written(folder):
        analysed, predicted = judged(folder, config, metrics, predictions)
        found = (pseudo or {}) | predicted
        names = class_names(videos, found, metrics, representation)
        classes = {name: i for i, name in enumerate(names)}
        most = max(LEAST_OF_A_VIDEO, min(MOST, MOST_OF_ALL // max(len(videos), 1)))
        listed = sorted(videos, key=lambda name: (PARTS.index(videos[name]["part"]), name))
        files = recordings_of(listed, recordings, page) if recordings else {}
        others = [name for name in listed if name not in files]
        shown = {
            "name": folder.resolve().name,
            "about": about(folder, config, metrics, rows),
            "facts": facts_of(config, videos, split, metrics, rows),
            "settings": config,
            "limits": {"most": most, "score": LEAST_SCORE},
            "classes": names,
            "status": STATUS,
            "videos": [video_of(name, videos[name], found.get(name), classes, most)
                       for name in listed],
            "recordings": files,
            "features": curves_of_features(folder, config, others),
            "curves": curves_of(rows),
            "pulses": pulses_of(rows),
            "metrics": metrics,
            "analysis": analysed,
            "representation": representation,
            "other": None,
        }
    return compact(shown)


# ---- The page -----------------------------------------------------------------------------------

def embedded(content):
    """Content as JSON that no HTML parser takes for an end of the script or a tag.

    All but ASCII is escaped by json.dumps, line separators included."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def page_of(content):
    """The page as one text: page.html beside this file, with the content in it."""
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return template.replace("__RUN__", embedded(content))


def tested(folder):
    """What a run is tested on: ids, and what happens."""
    truth = analysis.truth_of(analysis.read_videos(Path(folder, "videos.json")))
    return truth.keys(), sorted(analysis.instances_of_all(truth))


def write_page(folder, path=None, other=None, recordings=None):
    """Write the page of the run in a folder to `path`, by default page.html in it -> the path.

    other       the folder of a run to compare it with
    recordings  a folder of video files
    Raises BadInput."""
    folder = Path(folder)
    path = Path(path or folder / "page.html")
    check_replaced(path, '<script type="application/json" id="run">', "page of a run")
    content = page_data(folder, recordings, path)
    if other:
        check_comparable(folder, content["metrics"], content["analysis"])
        content["other"] = compared(Path(other))
        if content["other"]["metrics"]["tiou"] != content["metrics"]["tiou"]:
            raise BadInput(f"{folder} and {other} were evaluated at other tIoU thresholds")
        if tested(folder) != tested(other):
            warn([f"{folder} and {other} have other test videos, or other annotations of them"])
    write_text(path, page_of(content))
    return path


def arguments_of(argv):
    """The arguments of a command line; raises BadInput."""
    parser = Parser(__name__, prog="python -m extras.viewer")
    parser.add_argument("runs", nargs="+", metavar="run",
                        help="the folder that train.py wrote, its --out; a second one to compare")
    parser.add_argument("--out", help="the page to write (default: page.html in the first folder)")
    parser.add_argument("--videos", help="a folder of recordings <id>.mp4, .webm, ... to play")
    args = parser.parse_args(argv)
    if len(args.runs) > 2:
        raise BadInput(f"the page compares two runs, not {len(args.runs)}: {' '.join(args.runs)}")
    return args


def main(argv=None):
    """The command line; returns the exit code, 2 for bad input."""
    with guard() as stop:
        args = arguments_of(argv)
        page = write_page(args.runs[0], args.out, *args.runs[1:], recordings=args.videos)
        say(f"{page} is written: open it in a browser")
    return stop.code


if __name__ == "__main__":
    sys.exit(main())
