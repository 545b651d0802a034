"""One HTML page about a run: its videos on a time axis, curves, mAP, pseudo labels, Fig. 4.

    python -m extras.viewer runs/my                      writes runs/my/page.html
    python -m extras.viewer runs/my --out page.html

The page needs no network and no package: data, style and script are in it. All its numbers come
from the files that train.py writes into the run's folder; what a run does not have, the page
leaves out with a sentence. An address like page.html#video=3&score=0.5&zoom=4 opens it there.
"""
import argparse
import json
import math
import sys
from pathlib import Path

from plumbing.files import read_json, read_rows, write_text
from plumbing.runs import guard
from plumbing.words import BadInput, say, short

MOST = 100  # segments of a video that go into the page, the best ones
MOST_OF_ALL = 50_000  # about as many of all videos together
LEAST_OF_A_VIDEO = 10
LEAST_SCORE = 0.01  # detections below stay out
MOST_POINTS = 2000  # rows of a stage's curves
PARTS = ("test", "unlabelled", "labelled")  # the order of the videos
STATUS = ("kept", "dropped", "mined", "candidate")
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
NUMBER = (int, float)
INSTANCE = {"label": str, "segment": [NUMBER]}
FORMS = {
    "config.json": {"dataset": str, "seed": int, "*": (str, int, float)},
    "videos.json": {"*": {"part": PARTS, "duration": (*NUMBER, None),
                          "annotations": (None, [INSTANCE])}},
    "split.json": {"missing_classes": [str]},
    "metrics.json": {"tiou": [NUMBER], "mAP": [NUMBER], "average_mAP": NUMBER, "videos": int,
                     "instances": int, "weights": str, "ap": {"*": [NUMBER]}},
    "predictions.json": {"results": {"*": [INSTANCE | {"score": NUMBER}]}},
    "pseudo_labels.json": {"*": [INSTANCE | {
        "score": NUMBER, "status": STATUS, "class_score": NUMBER, "tIoU": (*NUMBER, None),
        "tND": (*NUMBER, None), "similarity": (*NUMBER, None)}]},
    "representation.json": {"classes": [str], "label": [int], "before": [[NUMBER]],
                            "after": [[NUMBER]]},
}


def has_form(x, form):
    """Whether a JSON value has a form.

    form  a type; None or a text: that value; (a, b): one of both; [a]: a list of such; {key: a}: a
          dict with that key, or, under "*", for all other keys"""
    if isinstance(form, tuple):
        return any(has_form(x, one) for one in form)
    if isinstance(form, list):
        return isinstance(x, list) and all(has_form(item, form[0]) for item in x)
    if isinstance(form, dict):
        named = form.keys() - {"*"}
        return isinstance(x, dict) and named <= x.keys() and all(
            has_form(value, form[key if key in named else "*"]) for key, value in x.items()
            if key in named or "*" in form)
    return isinstance(x, form) if isinstance(form, type) else x == form


def fits_itself(content, name):
    """Whether the lists of a file of a run are of lengths that belong together."""
    if name == "metrics.json":
        lists = [content["mAP"], *content["ap"].values()]
        return all(len(values) == len(content["tiou"]) for values in lists)
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
    found  its detections or pseudo labels, None where there cannot be any"""
    truth = entry["annotations"]
    shown = best(found or [], most)
    listed = [*(truth or []), *shown]
    ends = [one["segment"][1] for one in listed]
    return {
        "id": name,
        "part": entry["part"],
        "duration": entry.get("duration") or max(ends, default=1.0),
        "truth": None if truth is None else [segment_row(one, classes) for one in truth],
        "found": None if found is None else [segment_row(one, classes) for one in shown],
        "left_out": len(found or []) - len(shown),
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


def page_data(folder):
    """What the page shows of the run in a folder; raises BadInput."""
    config, videos = (read_file(folder, name, True) for name in ("config.json", "videos.json"))
    split, metrics, predictions, pseudo, representation = (read_file(folder, name) for name in (
        "split.json", "metrics.json", "predictions.json", "pseudo_labels.json",
        "representation.json"))
    rows, _ = read_rows(folder / "log.jsonl")
    try:
        found = {**(pseudo or {}), **(predictions or {"results": {}})["results"]}
        names = class_names(videos, found, metrics, representation)
        classes = {name: i for i, name in enumerate(names)}
        most = max(LEAST_OF_A_VIDEO, min(MOST, MOST_OF_ALL // max(len(videos), 1)))
        listed = sorted(videos, key=lambda name: (PARTS.index(videos[name]["part"]), name))
        shown = {
            "name": folder.resolve().name,
            "facts": facts_of(config, videos, split, metrics, rows),
            "settings": config,
            "limits": {"most": most, "score": LEAST_SCORE},
            "classes": names,
            "status": STATUS,
            "videos": [video_of(name, videos[name], found.get(name), classes, most)
                       for name in listed],
            "curves": curves_of(rows),
            "pulses": pulses_of(rows),
            "metrics": metrics,
            "representation": representation,
        }
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        reason = short(f"{type(error).__name__} {error}")
        raise BadInput(f"{folder} is no run of this version: its files are not as train.py writes "
                       f"them ({reason})") from error
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


def write_page(folder, path=None):
    """Write the page of the run in a folder to `path`, by default page.html in it -> the path.

    Raises BadInput."""
    folder = Path(folder)
    path = Path(path or folder / "page.html")
    write_text(path, page_of(page_data(folder)))
    return path


def main(argv=None):
    """The command line; returns the exit code, 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", help="the folder that train.py wrote, its --out")
    parser.add_argument("--out", help="the page to write (default: page.html in that folder)")
    args = parser.parse_args(argv)
    with guard() as stop:
        say(f"{write_page(args.run, args.out)} is written: open it in a browser")
    return stop.code


if __name__ == "__main__":
    sys.exit(main())
