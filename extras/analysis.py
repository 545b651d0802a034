"""What is wrong with a run's detections: kinds of error, misses, where to cut, which videos.

    python -m extras.analysis runs/my                           prints the main numbers of a run
    python -m extras.analysis runs/my --out analysis.json       writes all of them as well
    python -m extras.analysis runs/my --hidden my.json          and judges its pseudo labels
    python -m extras.analysis --pred pred.json --gt my.json --subset test

Kinds of error, normalised mAP, sensitivity and misses are those of DETAD (Alwassel et al.,
"Diagnosing Error in Temporal Action Detectors", ECCV 2018), as its public code computes them.
Only there all predictions in a video without instances are background, and an instance that is
longer than its video counts among the largest coverages.

Truth is {video: Annotation}, predictions are {video: [{"label", "score", "segment"}]}, in seconds.
Instances of no length are left out. What cannot be computed, like a mean of nothing, is None.
"""
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluate import assign, interpolated_ap, toolkits_tiou
from icd import STATUS
from plumbing import checks, forms, tables
from plumbing.arguments import add_truth
from plumbing.files import check_replaced, read_json, write_json
from plumbing.runs import guard
from plumbing.settings import Parser, thresholds_of
from plumbing.words import BadInput, say, several, short, shown, warn

TYPES = ("true positive", "double", "localization", "confusion", "wrong label", "background")
TRUE, DOUBLE, LOCALIZATION, CONFUSION, WRONG_LABEL, BACKGROUND = range(6)
BLOCKS = 10  # 1G .. 10G: as many times the instances of a class are its predictions looked at
NEAR = 0.1  # tIoU from which a prediction is near an instance, and no background
FLOOR = 0.05  # normalised precision at or under which a match does not count as found
HALF = 0.5  # the tIoU of all that is judged at one
POINTS = 101  # scores of a curve
BINS = 10  # of the score
TAUGHT = ("kept", "mined")  # the pseudo labels that stage 3 learns from
DEFAULT_TIOU = "0.3:0.7:0.1"

# Upper ends of the groups of instances; each group begins above the one before.
SIZES = ("XS", "S", "M", "L", "XL")
EDGES = {
    "thumos": {"length": (3, 6, 12, 18, np.inf), "coverage": (0.02, 0.04, 0.06, 0.08, np.inf),
               "instances": (1, 40, 80, np.inf)},
    "activitynet": {"length": (30, 60, 120, 180, np.inf), "coverage": (0.2, 0.4, 0.6, 0.8, np.inf),
                    "instances": (1, 4, 8, np.inf)},
}


# ---- Numbers ------------------------------------------------------------------------------------

def fraction(part, whole):
    """part / whole, None of nothing."""
    return float(part / whole) if whole else None


def mean_of(values):
    """The mean of the numbers that are not NaN, None without one."""
    values = np.asarray(values, dtype=np.float64)
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else None


def members(keys):
    """{key: numbers of the rows that have it, rising} of keys (N,)."""
    order = np.argsort(keys, kind="stable")
    values, firsts = np.unique(keys[order], return_index=True)
    return dict(zip(values.tolist(), np.split(order, firsts[1:])))


# ---- Matches ------------------------------------------------------------------------------------

@dataclass
class Rows:
    """Instances or predictions, one a row."""
    video: np.ndarray  # (N,) its number
    label: np.ndarray  # (N,) the number of its class
    segment: np.ndarray  # (N, 2) in seconds


@dataclass
class Pairs:
    """Truth and predictions as rows, with the instance that each prediction is matched to.

    Predictions stand by class, best score first, of equal scores the last of the file."""
    tious: np.ndarray  # (A,) thresholds
    videos: list  # names: those of the truth, then others that have predictions
    classes: list  # names: those of the truth, then others that were predicted
    durations: np.ndarray  # (V,) seconds, NaN where nobody says
    truth: Rows  # N instances
    found: Rows  # M predictions
    score: np.ndarray  # (M,)
    order: np.ndarray  # (M,) the place that each prediction had in the file
    taken: np.ndarray  # (A, M) number of the matched instance, -1 without
    nearest: np.ndarray  # (M,) number of the instance of any class with the largest tIoU, or -1
    overlap: np.ndarray  # (M,) that tIoU

    @property
    def hits(self):
        """Which predictions are true positives -> (A, M) bool."""
        return self.taken >= 0

    @property
    def positives(self):
        """The number of instances of each class -> (C,)."""
        return np.bincount(self.truth.label, minlength=len(self.classes))

    @property
    def rank(self):
        """The place of each prediction in its class, from 0 -> (M,)."""
        first = np.searchsorted(self.found.label, np.arange(len(self.classes)))
        return np.arange(len(self.score)) - first[self.found.label]


def rows_of(listed, videos, classes):
    """The Rows of a list of (video, label, segment); videos, classes: all names, in order."""
    video_of = {name: number for number, name in enumerate(videos)}
    class_of = {name: number for number, name in enumerate(classes)}
    names, labels, segments = zip(*listed) if listed else ((), (), ())
    return Rows(
        np.array([video_of[name] for name in names], dtype=np.int64),
        np.array([class_of[label] for label in labels], dtype=np.int64),
        np.array(segments, dtype=np.float64).reshape(-1, 2))


def assign_within(mine, theirs, segments, truth, tious):
    """evaluate.assign() among the segments and instances of equal keys.

    mine      (M,) keys of the segments (M, 2), which stand best score first within a key
    theirs    (N,) keys of the instances (N, 2)
    ->        (A, M) numbers of instances, -1 without one"""
    taken = np.full((len(tious), len(mine)), -1)
    instances_of = members(theirs)
    for key, rows in members(mine).items():
        if key in instances_of:
            instances = instances_of[key]
            place = assign(segments[rows], truth[instances], tious)
            taken[:, rows] = np.where(place >= 0, instances[place], -1)
    return taken


def nearest_of(found, truth):
    """Of each prediction the instance of its video, of any class, with the largest tIoU.

    ->  (M,) its number, the first of equals, -1 in a video without; (M,) the tIoU"""
    nearest = np.full(len(found.video), -1)
    overlap = np.zeros(len(found.video))
    instances_of = members(truth.video)
    for video, rows in members(found.video).items():
        if video in instances_of:
            instances = instances_of[video]
            each = toolkits_tiou(found.segment[rows][:, None], truth.segment[instances])
            nearest[rows] = instances[each.argmax(1)]
            overlap[rows] = each.max(1)
    return nearest, overlap


def instances_of_all(truth):
    """[(video, label, segment)] of the instances of {video: Annotation} that have a length."""
    listed = []
    for video, a in truth.items():
        for label, (start, end) in zip(a.labels, a.segments):
            if end > start:
                listed.append((video, label, (start, end)))
    return listed


def paired(truth, predictions, tious):
    """The Pairs of truth and predictions at tIoU thresholds, matched class by class."""
    tious = np.asarray(tious, dtype=np.float64)
    instances = instances_of_all(truth)
    listed = []
    scores = []
    for video, detections in predictions.items():
        listed += [(video, d["label"], d["segment"]) for d in detections]
        scores += [d["score"] for d in detections]
    videos = list(dict.fromkeys([*truth, *predictions]))
    classes = list(dict.fromkeys(label for _, label, _ in instances + listed))
    durations = [truth[name].duration if name in truth else None for name in videos]
    real, found = (rows_of(rows, videos, classes) for rows in (instances, listed))
    score = np.array(scores, dtype=np.float64)
    order = np.lexsort((-np.arange(len(score)), -score, found.label))
    found = Rows(found.video[order], found.label[order], found.segment[order])
    mine, theirs = (rows.label * len(videos) + rows.video for rows in (found, real))
    taken = assign_within(mine, theirs, found.segment, real.segment, tious)
    return Pairs(tious, videos, classes, np.array(durations, dtype=np.float64), real, found,
                 score[order], order, taken, *nearest_of(found, real))


# ---- Normalised precision -----------------------------------------------------------------------

def normalised_precision(hits, positives, normal):
    """Precision at each rank as if a class of `positives` instances had `normal` -> (M,)."""
    weighed = hits.cumsum() * normal / positives
    return weighed / (weighed + (~hits).cumsum())


def normalised_ap(hits, positives, normal):
    """AP of normalised precision; hits (M,) bool, best score first."""
    precision = normalised_precision(hits, positives, normal)
    highest = np.maximum.accumulate(precision[::-1])[::-1]  # at this recall or a larger one
    return highest[hits].sum() / positives


def normal_of(pairs):
    """The mean number of instances of a class that has any; 0 without one."""
    positives = pairs.positives
    return positives.sum() / max((positives > 0).sum(), 1)


def rows_of_classes(pairs, positives):
    """(class, its rows as a slice) of each class with positives (C,)."""
    first = np.searchsorted(pairs.found.label, np.arange(len(pairs.classes) + 1))
    return [(c, slice(first[c], first[c + 1])) for c in np.nonzero(positives)[0]]


def normalised_aps(pairs, hits, kept, positives):
    """Normalised AP at each threshold of each class.

    hits       (A, M) bool, the true positives
    kept       (A, M) or (M,) bool, the predictions that are looked at
    positives  (C,), the number of instances; a class without any has NaN
    ->         (A, C)"""
    kept = np.broadcast_to(kept, hits.shape)
    aps = np.full((len(hits), len(pairs.classes)), np.nan)
    normal = normal_of(pairs)
    for c, rows in rows_of_classes(pairs, positives):
        for a, looked_at in enumerate(kept[:, rows]):
            aps[a, c] = normalised_ap(hits[a, rows][looked_at], positives[c], normal)
    return aps


# ---- Kinds of error -----------------------------------------------------------------------------

def error_types(pairs):
    """The kind of each prediction at each threshold -> (A, M) numbers of TYPES.

    Of the instance of any class that overlaps most, only its class and tIoU decide."""
    own = np.append(pairs.truth.label, -1)[pairs.nearest] == pairs.found.label
    reached = pairs.overlap >= pairs.tious[:, None]
    near = pairs.overlap >= NEAR
    return np.select(
        [pairs.hits, reached & own, reached, near & own, near],
        [TRUE, DOUBLE, WRONG_LABEL, LOCALIZATION, CONFUSION], BACKGROUND)


def shares_of(counts):
    """What is said of some predictions; shares are means over the thresholds.

    counts  (A, 6), how many are of each of TYPES"""
    total = int(counts[0].sum())
    return {
        "predictions": total,
        "counts": dict(zip(TYPES, counts.T.tolist())),
        "share": {name: fraction(mean, total) for name, mean in zip(TYPES, counts.mean(0))},
    }


def errors_of(pairs):
    """Kinds of error of the best predictions, and what each costs.

    Block k holds, of every class with N instances, the predictions of rank (k - 1) N + 1 .. k N.
    ->  {"predictions", how many stand in the blocks,
         "blocks": [{"block", "predictions", "counts": {type: [of each threshold]}, "share"}],
         "all": the same of all blocks, "mAP_N" of each threshold, "average_mAP_N",
         "gain": {type: rise of average_mAP_N where such predictions are taken away}}"""
    types, positives = error_types(pairs), pairs.positives
    mine = positives[pairs.found.label]
    looked_at = pairs.rank < BLOCKS * mine
    block = pairs.rank[looked_at] // mine[looked_at]
    counts = np.zeros((len(pairs.tious), BLOCKS, len(TYPES)), dtype=np.int64)
    for a, kind in enumerate(types[:, looked_at]):
        np.add.at(counts[a], (block, kind), 1)
    aps = normalised_aps(pairs, pairs.hits, looked_at, positives)
    gain = {}
    for kind, name in enumerate(TYPES[1:], 1):
        without = normalised_aps(pairs, pairs.hits, looked_at & (types != kind), positives)
        gain[name] = mean_of(without - aps)
    return {
        "predictions": int(looked_at.sum()),
        "blocks": [{"block": k + 1} | shares_of(counts[:, k]) for k in range(BLOCKS)],
        "all": shares_of(counts.sum(1)),
        "mAP_N": [mean_of(row) for row in aps],
        "average_mAP_N": mean_of(aps),
        "gain": gain,
    }


# ---- Misses and sensitivity ---------------------------------------------------------------------

def characteristics_of(pairs):
    """{name: value of each instance (N,)}: length in seconds, coverage of its video, NaN where its
    duration is unknown, and number of instances of its video, of all classes."""
    truth = pairs.truth
    length = truth.segment[:, 1] - truth.segment[:, 0]
    of_video = np.bincount(truth.video, minlength=len(pairs.videos))
    return {
        "length": length,
        "coverage": length / pairs.durations[truth.video],
        "instances": of_video[truth.video].astype(np.float64),
    }


def fifths(values):
    """Upper ends of groups that hold about a fifth of the values each; fewer where many are equal.
    """
    known = values[~np.isnan(values)]
    ends = np.quantile(known, [0.2, 0.4, 0.6, 0.8]) if known.size else known
    ends = np.unique(ends[ends < known.max(initial=-np.inf)])
    return (*ends.tolist(), np.inf)


def hits_over_floor(pairs):
    """The true positives (A, M) without those at ranks where normalised precision is too low."""
    hits, positives = pairs.hits, pairs.positives
    normal = normal_of(pairs)
    for c, rows in rows_of_classes(pairs, positives):
        for row in hits[:, rows]:
            row &= normalised_precision(row, positives[c], normal) > FLOOR
    return hits


def detected_of(pairs):
    """Which instances are found -> (A, N) bool: matched, at a normalised precision over FLOOR."""
    detected = np.zeros((len(pairs.tious), len(pairs.truth.label)), dtype=bool)
    for a, row in enumerate(hits_over_floor(pairs)):
        detected[a, pairs.taken[a, row]] = True
    return detected


def group_of(pairs, inside, detected):
    """What is said of a group of instances.

    inside    (N,) bool, which they are
    detected  (A, N) bool
    A prediction that is matched to an instance outside at one threshold is looked at at none: so
    the public code has it, which filters threshold by threshold what the one before left."""
    passing = np.append(inside, True)[pairs.taken].all(0)
    positives = np.bincount(pairs.truth.label[inside], minlength=len(pairs.classes))
    missed = [mean_of(row) for row in ~detected[:, inside]]
    return {
        "instances": int(inside.sum()),
        "share": fraction(inside.sum(), len(inside)),
        "missed": mean_of(~detected[:, inside]),
        "missed_by_tiou": missed,
        "mAP_N": mean_of(normalised_aps(pairs, pairs.hits, passing, positives)),
    }


def groups_of(pairs, edges=None):
    """Missed instances, and sensitivity, by length, coverage and number of instances of a video.

    edges  as EDGES["thumos"]; None: fifths() of the instances
    ->     {"average_mAP_N", of all, "missed", of all,
            "length" and so on: [{"group", "over", "to", None at the ends, "instances", "share" of
            all, "missed", mean over the thresholds, "missed_by_tiou", "mAP_N", of the group}]}"""
    detected = detected_of(pairs)
    everything = np.ones(len(pairs.truth.label), dtype=bool)
    whole = group_of(pairs, everything, detected)
    found = {"average_mAP_N": whole["mAP_N"], "missed": whole["missed"]}
    for name, values in characteristics_of(pairs).items():
        ends = edges[name] if edges else fifths(values)
        place = np.searchsorted(ends, values)  # NaN comes after all
        found[name] = []
        for i, (size, end) in enumerate(zip(SIZES, ends)):
            borders = {"group": size, "over": ends[i - 1] if i else None,
                       "to": end if np.isfinite(end) else None}
            found[name].append(borders | group_of(pairs, place == i, detected))
    return found


# ---- By score, at the first threshold of the Pairs ----------------------------------------------

def point_of(score, hits, found, instances):
    """Precision, recall and F1 of all predictions of at least a score.

    hits  of them are true positives, of so many found"""
    return {
        "score": score,
        "precision": fraction(hits, found),
        "recall": fraction(hits, instances),
        "f1": fraction(2 * hits, found + instances),
    }


def curve_of(score, hits, instances):
    """Precision, recall and F1 by score.

    score, hits  (M,) of the predictions, in any order; instances: their number
    ->           {"best": the point of the largest F1, its highest score, with "score" None
                  without predictions; "points": [{"score", "precision", "recall", "f1"}], rising}
    """
    if not len(score):
        return {"best": point_of(None, 0, 0, instances), "points": []}
    order = np.argsort(-score)
    falling = score[order]
    total = np.append(0, np.cumsum(hits[order]))  # true positives among the first n
    each = np.unique(score)[::-1]
    count = np.searchsorted(-falling, -each, side="right")  # equal scores are not parted
    best = each[(total[count] / (count + instances)).argmax()]
    shown_at = np.union1d(np.linspace(falling[-1], falling[0], POINTS), best)
    count = np.searchsorted(-falling, -shown_at, side="right")
    points = [point_of(float(s), int(total[n]), int(n), instances)
              for s, n in zip(shown_at, count)]
    return {"best": points[int(np.searchsorted(shown_at, best))], "points": points}


def curves_of(pairs):
    """{"all": curve_of() all classes, "by_class": {class: curve_of()}}."""
    hits = pairs.hits[0]
    by_class = {}
    for c, name in enumerate(pairs.classes):
        mine = pairs.found.label == c
        by_class[name] = curve_of(pairs.score[mine], hits[mine], int(pairs.positives[c]))
    return {"all": curve_of(pairs.score, hits, len(pairs.truth.label)), "by_class": by_class}


def reliability_of(score, hits):
    """Precision by bin of the score.

    score, hits  (M,); bins are tenths of 0 .. 1, or of what the scores span where they lie outside
    ->           [{"from", "to", "predictions", "score", their mean, "precision"}]"""
    low, high = score.min(initial=0), score.max(initial=1)
    borders = low + (high - low) * np.arange(BINS + 1) / BINS
    place = (np.searchsorted(borders, score, side="right") - 1).clip(max=BINS - 1)
    bins = []
    for i in range(BINS):
        mine = place == i
        bins.append({
            "from": float(borders[i]),
            "to": float(borders[i + 1]),
            "predictions": int(mine.sum()),
            "score": mean_of(score[mine]),
            "precision": mean_of(hits[mine]),
        })
    return bins


def pseudo_reliability(hidden, pseudo):
    """How right the pseudo labels are that stage 3 learns from, at tIoU 0.5, one to one.

    hidden  {video: Annotation}; a video without is left out
    pseudo  {video: [{"label", "score", "segment", "status"}]}
    ->      {"all", "kept", "mined": {"predictions", "precision", "bins": reliability_of()}}"""
    taught = {}
    for video in pseudo.keys() & hidden.keys():
        taught[video] = [one for one in pseudo[video] if one["status"] in TAUGHT]
    pairs = paired({video: hidden[video] for video in taught}, taught, [HALF])
    listed = [one["status"] for found in taught.values() for one in found]
    status = np.array(listed, dtype=object)[pairs.order]
    found = {}
    for name in ("all", *TAUGHT):
        mine = (status == name) | (name == "all")
        hits = pairs.hits[0, mine]
        found[name] = {"predictions": len(hits), "precision": mean_of(hits),
                       "bins": reliability_of(pairs.score[mine], hits)}
    return found


# ---- By class and by video ----------------------------------------------------------------------

def classes_of(pairs, labelled=None):
    """AP of each class, with the numbers of its instances.

    labelled  {video: Annotation} that training was given; None: nobody says
    ->        {class: {"ap": [of each threshold], None without an instance, "average_ap",
                       "instances", "labelled"}}"""
    taught = Counter(label for _, label, _ in instances_of_all(labelled or {}))
    found = {}
    for name in dict.fromkeys([*pairs.classes, *taught]):
        found[name] = {"ap": None, "average_ap": None, "instances": 0,
                       "labelled": None if labelled is None else taught[name]}
    for c, rows in rows_of_classes(pairs, pairs.positives):
        instances = int(pairs.positives[c])
        ap = [interpolated_ap(hits, instances) for hits in pairs.hits[:, rows]]
        found[pairs.classes[c]] |= {"ap": ap, "average_ap": mean_of(ap), "instances": instances}
    return found


def confusion_of(pairs, least):
    """Which class is taken for which, of the predictions of at least a score, None: of none.

    Matches of the own class come first; of what is left, each prediction, best score first, takes
    the free instance of any class that overlaps most, at the first threshold.
    ->  {"rows": [classes, "background"], what is there,
         "columns": [classes, "missed"], what was said, "counts": a list a row}"""
    truth, found = pairs.truth, pairs.found
    chosen = pairs.score >= (np.inf if least is None else least)
    partner = np.where(chosen, pairs.taken[0], -1)
    left = np.nonzero(chosen & (partner < 0))[0]
    left = left[np.argsort(-pairs.score[left], kind="stable")]
    free = np.setdiff1d(np.arange(len(truth.label)), partner)
    others = assign_within(found.video[left], truth.video[free], found.segment[left],
                           truth.segment[free], pairs.tious[:1])[0]
    partner[left] = np.append(free, -1)[others]
    background = missed = len(pairs.classes)
    there = np.append(truth.label, background)[partner[chosen]]
    alone = np.setdiff1d(np.arange(len(truth.label)), partner)
    counts = np.zeros((background + 1, missed + 1), dtype=np.int64)
    np.add.at(counts, (there, found.label[chosen]), 1)
    np.add.at(counts, (truth.label[alone], missed), 1)
    return {"rows": [*pairs.classes, "background"], "columns": [*pairs.classes, "missed"],
            "counts": counts.tolist()}


def worst_first(row):
    """The key by which videos stand: the lowest F1 first, one without F1 last."""
    without = row["f1"] is None
    return without, row["f1"] or 0, -row["missed"] - row["false"], row["video"]


def videos_of(pairs, least):
    """Each video at an operating point: the predictions of at least a score, None: none.

    ->  [{"video", "f1", None with neither instance nor prediction, "missed", "false",
          "instances"}], the worst first"""
    chosen = pairs.score >= (np.inf if least is None else least)
    size = len(pairs.videos)
    instances = np.bincount(pairs.truth.video, minlength=size).tolist()
    found = np.bincount(pairs.found.video[chosen], minlength=size).tolist()
    right = np.bincount(pairs.found.video[chosen & pairs.hits[0]], minlength=size).tolist()
    rows = []
    for name, n, m, hits in zip(pairs.videos, instances, found, right):
        rows.append({"video": name, "f1": fraction(2 * hits, n + m), "missed": n - hits,
                     "false": m - hits, "instances": n})
    return sorted(rows, key=worst_first)


# ---- All of it ----------------------------------------------------------------------------------

def analysis_of(truth, predictions, tious, edges=None, labelled=None):
    """All of the above on truth and predictions, the content of analysis.json.

    tious     thresholds of errors, groups and AP; the others are at tIoU 0.5
    edges     of groups_of()
    labelled  of classes_of()
    "confusion" and "videos" are at the operating point, the score of the best F1"""
    pairs = paired(truth, predictions, tious)
    half = paired(truth, predictions, [HALF])
    curves = curves_of(half)
    least = curves["all"]["best"]["score"]
    return {
        "tiou": pairs.tious.tolist(),
        "instances": len(pairs.truth.label),
        "predictions": len(pairs.score),
        "operating_point": curves["all"]["best"],
        "errors": errors_of(pairs),
        "groups": groups_of(pairs, edges),
        "curves": curves,
        "reliability": reliability_of(half.score, half.hits[0]),
        "pseudo_labels": None,
        "classes": classes_of(pairs, labelled),
        "confusion": confusion_of(half, least),
        "videos": videos_of(half, least),
    }


# ---- Files --------------------------------------------------------------------------------------

def read_object(path):
    """The JSON object in a file of a run; raises BadInput for another value."""
    content = read_json(path, "file of a run")
    if not isinstance(content, dict):
        raise BadInput(f"{path} is not as train.py writes it: it must hold a JSON object, not "
                       f"{shown(content)}")
    return content


def read_videos(path):
    """{video: Annotation} of a run's videos.json, whose subset is the part of the run."""
    def read(entry, where):
        if not isinstance(entry, dict):
            raise BadInput(f"{where} it must be a JSON object, not {shown(entry)}")
        return forms.read_annotation(entry | {"subset": entry.get("part")}, where, (), 0)
    return forms.read_each(read_object(path), read, f"file of a run {path}")


def read_pseudo_labels(path):
    """{video: [{"label", "score", "segment", "status"}]} of a run's pseudo_labels.json."""
    def read(found, where):
        detections = forms.read_detections(found, where)
        for detection, one in zip(detections, found):
            if one.get("status") not in STATUS:
                raise BadInput(f"{where} the status of a pseudo label must be one of "
                               f"{', '.join(STATUS)}, not {shown(one.get('status'))}")
            detection["status"] = one["status"]
        return detections
    return forms.read_each(read_object(path), read, f"file of a run {path}")


def read_thresholds(path):
    """The tIoU thresholds of a run's metrics.json; raises BadInput."""
    values = read_object(path).get("tiou")
    try:
        return thresholds_of(",".join(map(str, values)))
    except (BadInput, TypeError):
        raise BadInput(f'{path} is not as train.py writes it: its "tiou" must list numbers in '
                       f"(0, 1], not {shown(values)}") from None


def judge_pseudo_labels(folder, config, args):
    """pseudo_reliability() of a run against the annotations of --hidden; raises BadInput."""
    path = args.hidden
    ignored = args.ignore_labels or config.get("ignore_labels")
    annotations = tables.read_any(path, ignored, args.fps or config.get("fps"))
    if config.get("one_class"):
        annotations = forms.as_one_class(annotations)
    hidden = {video: a for video, a in annotations.items() if a.annotated}
    pseudo = read_pseudo_labels(folder / "pseudo_labels.json")
    if not pseudo.keys() & hidden.keys():
        raise BadInput(f"--hidden {path} annotates none of the {len(pseudo)} videos that "
                       f"{folder / 'pseudo_labels.json'} has")
    lacking = pseudo.keys() - hidden.keys()
    if lacking:
        warn([f"--hidden {path} lacks {len(lacking)} of {len(pseudo)} videos with pseudo labels, "
              f"which are not judged: {several(sorted(lacking))}"])
    return pseudo_reliability(hidden, pseudo)


def truth_of(videos):
    """The annotated test videos of a run, of what read_videos() gives."""
    return {name: a for name, a in videos.items() if a.subset == "test" and a.annotated}


def read_results(folder, videos):
    """The annotated test videos of a run and what it found in them; raises BadInput.

    videos  as read_videos() has them
    ->      {video: Annotation}, {video: [{"label", "score", "segment"}]}"""
    truth = truth_of(videos)
    if not truth:
        raise BadInput(f"{folder / 'videos.json'} has no test video with annotations")
    found = forms.read_predictions(folder / "predictions.json")
    return truth, {name: found[name] for name in truth if name in found}


def analyse_run(args):
    """analysis_of() the test videos of the run in a folder; raises BadInput."""
    folder = Path(args.run)
    config = read_object(folder / "config.json")
    videos = read_videos(folder / "videos.json")
    truth, predictions = read_results(folder, videos)
    labelled = {name: a for name, a in videos.items() if a.subset == "labelled"}
    tious = thresholds_of(args.tiou) if args.tiou else read_thresholds(folder / "metrics.json")
    edges = EDGES.get(args.bins or str(config.get("dataset")))
    analysis = analysis_of(truth, predictions, tious, edges, labelled)
    if args.hidden:
        analysis["pseudo_labels"] = judge_pseudo_labels(folder, config, args)
    return analysis


def analyse_files(args):
    """analysis_of() --pred against --gt; raises BadInput.

    Predictions whose label no annotation has are left out, as the warning says."""
    annotations = tables.read_any(args.gt, args.ignore_labels, args.fps)
    predictions = forms.read_predictions(args.pred)
    truth, _ = checks.truth_for(predictions, annotations, args.subset, args.gt)
    warn(checks.odd_predictions(predictions, truth, annotations))
    known = {label for a in annotations.values() for label in a.labels}
    for video, found in predictions.items():
        predictions[video] = [d for d in found if d["label"] in known]
    tious = thresholds_of(args.tiou or DEFAULT_TIOU)
    return analysis_of(truth, predictions, tious, EDGES.get(args.bins))


# ---- The table ----------------------------------------------------------------------------------

def percent(value):
    """A fraction in percent, six letters wide; a dash without one."""
    return f"{'-':>6}" if value is None else f"{100 * value:6.1f}"


def error_lines(errors, tious):
    """The lines about kinds of error."""
    lines = [f"normalised mAP {percent(errors['average_mAP_N']).strip()} % on average of tIoU "
             f"{tious[0]:.2f} to {tious[-1]:.2f}; gain: its rise without such predictions",
             "% of the best:      1G   1G-10G    gain   (1G: as many as instances, by class)"]
    for name in TYPES:
        first, every = (block["share"][name] for block in (errors["blocks"][0], errors["all"]))
        gain = "" if name == TYPES[TRUE] else percent(errors["gain"][name])
        lines.append(f"{name:<15} {percent(first)}   {percent(every)}  {gain}".rstrip())
    return lines


def missed_line(groups):
    """The line about missed instances, by length where they have several."""
    whole = f"missed, %: {percent(groups['missed']).strip()}"
    if len(groups["length"]) == 1:
        return whole
    parts = []
    for group in groups["length"]:
        to = f"to {group['to']:.3g} s" if group["to"] is not None else "longer"
        parts.append(f"{to} {percent(group['missed']).strip()}")
    return f"{whole}; by length: {', '.join(parts)}"


def point_line(point):
    """The line about the operating point."""
    if point["score"] is None:
        return "best F1: there is no prediction"
    values = [percent(point[key]).strip() for key in ("precision", "recall", "f1")]
    return (f"best F1 at tIoU {HALF}: {values[2]} % from a score of {point['score']:.3g} on, "
            f"precision {values[0]}, recall {values[1]}")


def pseudo_line(pseudo):
    """The line about pseudo labels."""
    parts = [f"{name} {percent(pseudo[name]['precision']).strip()} of "
             f"{pseudo[name]['predictions']}" for name in TAUGHT]
    return f"pseudo labels that are right at tIoU {HALF}, %: {', '.join(parts)}"


def table(analysis, title):
    """The main numbers, for people."""
    videos = analysis["videos"]
    lines = [f"{title}: {len(videos)} videos, {analysis['instances']} instances, "
             f"{analysis['predictions']} predictions"]
    lines += error_lines(analysis["errors"], analysis["tiou"])
    lines += [missed_line(analysis["groups"]), point_line(analysis["operating_point"])]
    if analysis["pseudo_labels"]:
        lines.append(pseudo_line(analysis["pseudo_labels"]))
    lines.append(f"{'worst videos there':<30}   F1 %  missed  false  instances")
    for row in videos[:5]:
        lines.append(f"{short(row['video'], 26):<30} {percent(row['f1'])}  {row['missed']:6}  "
                     f"{row['false']:5}  {row['instances']:9}")
    return "\n".join(lines)


def arguments_of(argv):
    """The arguments of a command line; raises BadInput."""
    parser = Parser(__name__, prog="python -m extras.analysis")
    parser.add_argument("run", nargs="?", help="the folder that train.py wrote, its --out")
    parser.add_argument("--hidden", help="annotations of a run's unlabelled videos, against which "
                        "its pseudo labels are judged")
    parser.add_argument("--pred", help="predictions in ActivityNet's result format, without a run")
    add_truth(parser, required=False)
    parser.add_argument("--subset", help="of the ground truth (default: the predictions')")
    parser.add_argument("--tiou", help="thresholds (default: the run's, or 0.3:0.7:0.1)")
    parser.add_argument("--bins", choices=(*EDGES, "fifths"), help="groups of length, coverage and "
                        "number of instances (default: those of the run's dataset, or fifths)")
    parser.add_argument("--out", help="a .json file for all numbers")
    args = parser.parse_args(argv)
    of_files = [args.pred, args.gt]
    if args.run and any([*of_files, args.subset]) or not args.run and not all(of_files):
        parser.error("give either the folder of a run, or --pred and --gt")
    if args.hidden and not args.run:
        parser.error("--hidden goes with the folder of a run")
    if (args.fps or args.ignore_labels) and not (args.hidden or args.gt):
        parser.error("--fps and --ignore-labels are of --gt or --hidden")
    return args


def main(argv=None):
    """The command line; returns the exit code, 2 for bad input."""
    with guard() as stop:
        args = arguments_of(argv)
        if args.out:
            check_replaced(args.out, '"errors"', "file of an analysis")
        analysis = analyse_run(args) if args.run else analyse_files(args)
        if args.out:
            write_json(args.out, analysis)
        say(table(analysis, args.run or args.pred))
    return stop.code


if __name__ == "__main__":
    sys.exit(main())
