"""Tests of the analysis: the public numbers, the rules by brute force, empty cases, the command."""
import json
import shutil

import numpy as np
import pytest

from evaluate import match, mean_average_precision, toolkits_tiou
from extras import analysis
from extras.intervals import MIDDLE, average_mAPs, interval, resampled_difference
from extras.intervals import main as compare_runs
from plumbing import forms
from plumbing.forms import Annotation
from tests.helpers import SHARED, needs_shared, read_result

TIOUS = np.array([0.3, 0.5, 0.7])
PUBLIC_NAMES = {
    "true positive": "True Positive", "double": "Double Detection Err",
    "localization": "Localization Err", "confusion": "Confusion Err",
    "wrong label": "Wrong Label Err", "background": "Background Err"}
GROUPS = {"length": "length", "coverage": "coverage", "instances": "num-instances"}


def video(*instances, duration=100.0):
    """The Annotation of (label, start, end)."""
    segments = np.array([times for _, *times in instances], dtype=float).reshape(-1, 2)
    return Annotation("test", duration, None, segments, [label for label, *_ in instances])


def said(*found):
    """Predictions of (label, score, start, end)."""
    return [{"label": label, "score": score, "segment": times} for label, score, *times in found]


def made_up(seed, videos=6, classes="abc", more=""):
    """Truth and predictions at random: near the instances, doubled, mislabelled, elsewhere.

    more: classes that are said and never there"""
    rng = np.random.default_rng(seed)
    truth = {}
    predictions = {}
    for name in map(str, range(videos)):
        starts = rng.integers(0, 60, rng.integers(1, 7)).astype(float)
        lengths = rng.integers(2, 25, len(starts))
        labels = rng.choice(list(classes), len(starts))
        truth[name] = video(*zip(labels, starts, starts + lengths))
        predictions[name] = []
        for _ in range(25):
            i = rng.integers(len(starts))
            start = starts[i] + rng.normal(scale=4)
            label = labels[i] if rng.random() < 0.6 else rng.choice(list(classes + more))
            end = start + lengths[i] * rng.uniform(0.6, 1.5)
            predictions[name] += said((str(label), float(rng.random()), start, end))
    return truth, predictions


def flat(predictions):
    """(video, prediction) of all, best score first."""
    every = [(name, d) for name, found in predictions.items() for d in found]
    return sorted(every, key=lambda one: -one[1]["score"])


def overlap_of(a, b):
    """The tIoU of two segments."""
    shared = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    return shared / (a[1] - a[0] + b[1] - b[0] - shared)


def judged(truth, predictions, threshold):
    """[(video, prediction, matched instance or None, kind)], best score first, by the rules."""
    taken = set()
    rows = []
    for name, d in flat(predictions):
        near = []
        for i, (label, segment) in enumerate(zip(truth[name].labels, truth[name].segments)):
            near.append((overlap_of(d["segment"], segment), i, label))
        free = [(t, i) for t, i, label in near
                if label == d["label"] and t >= threshold and (name, i) not in taken]
        mine = (name, max(free)[1]) if free else None
        taken.add(mine)
        best, _, label = max(near, key=lambda one: one[0])
        if mine:
            kind = "true positive"
        elif best < 0.1:
            kind = "background"
        elif label == d["label"]:
            kind = "double" if best >= threshold else "localization"
        else:
            kind = "wrong label" if best >= threshold else "confusion"
        rows.append((name, d, mine, kind))
    return rows


def area(hits, positives, normal):
    """Interpolated AP of normalised precision, rank by rank."""
    precision = []
    for n in range(1, len(hits) + 1):
        right = sum(hits[:n]) / positives * normal
        precision.append(right / (right + n - sum(hits[:n])))
    return sum(max(precision[i:]) for i, hit in enumerate(hits) if hit) / positives


def count_of(truth, label):
    """The number of instances of a class."""
    return sum(a.labels.count(label) for a in truth.values())


# ---- The public analysis ------------------------------------------------------------------------

def public_predictions(case):
    """The predictions of a case of the reference."""
    if case == "b_map":
        return forms.read_predictions(SHARED / "reference/map_thumos14_predictions.json")
    arrays = np.load(SHARED / "reference/actionformer_thumos14_detections.npz")
    found = {}
    rows = zip(*(arrays[key].tolist() for key in ("video_id", "label", "score", "start", "end")))
    for name, *one in rows:
        found.setdefault(name, []).extend(said(one))
    return found


@needs_shared
@pytest.mark.parametrize("number", [0, 1])
def test_all_numbers_of_the_public_error_analysis_are_met(number):
    public = read_result(SHARED / "reference/detad_expected.json")["cases"][number]
    annotations = forms.read_annotations(SHARED / "data/thumos14/thumos14.json")
    truth = forms.in_subset(annotations, "test")
    tious = np.array(public["settings"]["tious"])
    found = analysis.paired(truth, public_predictions(public["case"]), tious)
    errors, groups = (function(found, *more) for function, *more in (
        (analysis.errors_of,), (analysis.groups_of, analysis.EDGES["thumos"])))
    expected = public["false_positive"]
    assert errors["predictions"] == expected["predictions"]
    assert errors["mAP_N"] == pytest.approx(expected["mAP_N"], abs=1e-6)
    assert errors["average_mAP_N"] == pytest.approx(expected["average_mAP_N"], abs=1e-6)
    for ours, theirs in PUBLIC_NAMES.items():
        for block, other in zip(errors["blocks"], expected["by_range"], strict=True):
            assert block["counts"][ours] == other["counts"][theirs], (ours, block["block"])
            share = pytest.approx(other["share_avg"][theirs], abs=1e-6)
            assert block["share"][ours] == share, (ours, block["block"])
        assert errors["all"]["counts"][ours] == expected["total_counts"][theirs]
        if ours != "true positive":
            assert errors["gain"][ours] == pytest.approx(expected["gain"][theirs], abs=1e-6)
    assert groups["average_mAP_N"] == pytest.approx(public["sensitivity"]["average_mAP_N"])
    for ours, theirs in GROUPS.items():
        missed = public["false_negative"]["unmatched"][theirs]
        assert {g["group"] for g in groups[ours]} == missed["avg"].keys()
        for group in groups[ours]:
            key = group["group"]
            assert group["instances"] == public["sensitivity"]["group_sizes"][theirs][key]
            assert group["share"] == pytest.approx(missed["share_of_all"][key], abs=1e-6)
            assert group["missed"] == pytest.approx(missed["avg"][key], abs=1e-6)
            assert group["missed_by_tiou"] == pytest.approx(missed["by_tiou"][key], abs=1e-6)
            sensitivity = public["sensitivity"]["groups"][theirs][key]
            assert group["mAP_N"] == pytest.approx(sensitivity, abs=1e-6), (ours, key)


# ---- Matches and kinds of error -----------------------------------------------------------------

@pytest.mark.parametrize("seed", range(5))
def test_matches_are_those_of_the_map(seed):
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, 12, (40, 1)).astype(float)  # whole numbers: many overlap equally
    segments = np.hstack([starts, starts + rng.integers(1, 6, (40, 1))])
    taken = analysis.assign(segments[:30], segments[30:], TIOUS)
    assert ((taken >= 0) == match(segments[:30], segments[30:], TIOUS)).all()
    overlap = toolkits_tiou(segments[:30, None], segments[30:])
    for threshold, row in zip(TIOUS, taken):
        at = np.nonzero(row >= 0)[0]
        assert len(set(row[at])) == len(at)
        assert (overlap[at, row[at]] >= threshold).all()


@pytest.mark.parametrize("seed", range(5))
def test_blocks_and_gains_follow_the_rules(seed):
    truth, predictions = made_up(seed, more="x")
    classes = sorted({label for a in truth.values() for label in a.labels})
    normal = sum(count_of(truth, label) for label in classes) / len(classes)
    errors = analysis.errors_of(analysis.paired(truth, predictions, TIOUS))
    counts = {name: np.zeros((analysis.BLOCKS, len(TIOUS)), int) for name in analysis.TYPES}
    base = []
    without = {name: [] for name in analysis.TYPES}
    for a, threshold in enumerate(TIOUS):
        rows = judged(truth, predictions, threshold)
        for label in classes:
            n = count_of(truth, label)
            kinds = [kind for _, d, _, kind in rows if d["label"] == label][:analysis.BLOCKS * n]
            for rank, kind in enumerate(kinds):
                counts[kind][rank // n, a] += 1
            for name in analysis.TYPES:
                left = [kind == "true positive" for kind in kinds if kind != name]
                without[name].append(area(left, n, normal))
            base.append(area([kind == "true positive" for kind in kinds], n, normal))
    assert sum(len(counts[name].nonzero()[0]) > 0 for name in counts) == 6  # all kinds are there
    for block in errors["blocks"]:
        k = block["block"] - 1
        size = sum(c[k, 0] for c in counts.values())
        assert block["predictions"] == size
        for name in analysis.TYPES:
            assert block["counts"][name] == counts[name][k].tolist()
            share = counts[name][k].mean() / size if size else None
            assert block["share"][name] == (share and pytest.approx(share))
    assert errors["average_mAP_N"] == pytest.approx(np.mean(base))
    for name, gain in errors["gain"].items():
        assert gain == pytest.approx(np.mean(without[name]) - np.mean(base)), name
        assert gain >= 0


ONE = video(("a", 0, 10), ("b", 20, 30), ("a", 50, 60))
KINDS = [  # what is said of ONE beside a hit on its first instance, and its kind at tIoU 0.5
    (("a", 0.5, 0, 9), "double"),
    (("a", 0.5, 50, 60), "true positive"),
    (("b", 0.5, 1, 10), "wrong label"),
    (("a", 0.5, 5, 13), "localization"),
    (("a", 0.5, 28, 34), "confusion"),
    (("a", 0.5, 29.5, 40), "background"),
    (("c", 0.5, 0, 10), "wrong label"),  # a class of no instance
    (("a", 0.5, 70, 70), "background"),
]


@pytest.mark.parametrize(("one", "kind"), KINDS)
def test_each_kind_of_error(one, kind):
    pairs = analysis.paired({"v": ONE}, {"v": said(("a", 0.9, 0, 10), one)}, [0.5])
    types = analysis.error_types(pairs)[0]
    assert analysis.TYPES[types[pairs.order.argmax()]] == kind


def test_all_predictions_in_a_video_without_instances_are_background():
    found = said(("a", 0.5, 0, 10), ("a", 0.4, 20, 30))
    truth = {"u": ONE, "v": video()}
    pairs = analysis.paired(truth, {"v": found, "stranger": found}, [0.5])
    assert (analysis.error_types(pairs) == analysis.BACKGROUND).all()


# ---- Misses and sensitivity ---------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(3))
def test_groups_follow_the_rules(seed):
    truth, predictions = made_up(seed, more="x")
    ends = (6.0, 15.0, np.inf)
    edges = {"length": ends, "coverage": (0.1, np.inf), "instances": (3, np.inf)}
    groups = analysis.groups_of(analysis.paired(truth, predictions, TIOUS), edges)["length"]
    instances = [(name, i) for name, a in truth.items() for i in range(len(a.labels))]
    classes = sorted({label for a in truth.values() for label in a.labels})
    normal = len(instances) / len(classes)

    def in_group(instance, group):
        name, i = instance
        start, end = truth[name].segments[i]
        return (group["over"] or 0) < end - start <= (group["to"] or np.inf)

    judgements = [judged(truth, predictions, threshold) for threshold in TIOUS]
    for group in groups:
        members = [one for one in instances if in_group(one, group)]
        assert group["instances"] == len(members) > 0
        passing = np.ones(len(judgements[0]), bool)
        for rows in judgements:
            passing &= [one is None or in_group(one, group) for _, _, one, _ in rows]
        aps = []
        missed = []
        for rows in judgements:
            detected = set()
            for label in classes:
                mine = [row for row in rows if row[1]["label"] == label]
                n = count_of(truth, label)
                for rank, (_, _, one, _) in enumerate(mine, 1):
                    right = sum(row[2] is not None for row in mine[:rank]) / n * normal
                    if one and right / (right + sum(row[2] is None for row in mine[:rank])) > 0.05:
                        detected.add(one)
                n = sum(truth[name].labels[i] == label for name, i in members)
                hits = [row[2] is not None for row, passes in zip(rows, passing)
                        if passes and row[1]["label"] == label]
                if n:
                    aps.append(area(hits, n, normal))
            missed.append(np.mean([one not in detected for one in members]))
        assert group["missed_by_tiou"] == pytest.approx(missed)
        assert group["missed"] == pytest.approx(np.mean(missed))
        assert group["mAP_N"] == pytest.approx(np.mean(aps))


def test_a_match_at_a_low_normalised_precision_counts_as_missed():
    wrong = [("a", 0.9, 200 + i, 201 + i) for i in range(40)]
    for n, missed in ((18, 0.0), (19, 1.0)):  # 1 / (1 + 19) is the floor
        pairs = analysis.paired(
            {"v": video(("a", 0, 10))}, {"v": said(*wrong[:n], ("a", 0.5, 0, 10))}, [0.5])
        assert analysis.groups_of(pairs)["missed"] == missed, n


@pytest.mark.parametrize(("values", "ends"), [
    ([], []), ([2.0, 2.0], []), ([1.0, 2.0, np.nan], [1.2, 1.4, 1.6, 1.8]),
    ([1.0, 1.0, 1.0, 1.0, 5.0], [1.0, 1.8])])
def test_own_groups_are_fifths(values, ends):
    assert analysis.fifths(np.array(values)) == pytest.approx((*ends, np.inf))


def test_instances_lie_in_groups_closed_above_and_in_none_without_a_duration():
    truth = {"u": video(("a", 0, 3), ("a", 10, 16), ("b", 20, 90)),
             "v": video(("a", 0, 2), duration=None)}
    groups = analysis.groups_of(analysis.paired(truth, {}, [0.5]), analysis.EDGES["thumos"])
    sizes = {name: [g["instances"] for g in groups[name]] for name in GROUPS}
    assert sizes == {"length": [2, 1, 0, 0, 1], "coverage": [0, 1, 1, 0, 1],
                     "instances": [1, 3, 0, 0]}
    assert groups["length"][4]["to"] is None and groups["length"][2]["mAP_N"] is None


# ---- By score -----------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(3))
def test_curves_and_the_best_f1_are_those_of_a_count(seed):
    truth, predictions = made_up(seed)
    for found in predictions.values():
        for d in found:
            d["score"] = round(d["score"], 1)  # many are equal
    pairs = analysis.paired(truth, predictions, [0.5])
    curves = analysis.curves_of(pairs)
    for label in (None, *pairs.classes):
        curve = curves["by_class"][label] if label else curves["all"]
        mine = np.array([label in (None, pairs.classes[c]) for c in pairs.found.label])
        n = sum(count_of(truth, c) for c in ([label] if label else pairs.classes))
        scores = pairs.score[mine]

        def f1(score, mine=mine, n=n):
            chosen = mine & (pairs.score >= score)
            return 2 * (pairs.taken[0, chosen] >= 0).sum() / (chosen.sum() + n)

        best = max(map(f1, scores))
        assert curve["best"]["f1"] == pytest.approx(best)
        assert curve["best"]["score"] == max(s for s in scores if f1(s) == best)
        assert curve["best"] in curve["points"]
        assert [p["f1"] for p in curve["points"]] == pytest.approx(
            [f1(p["score"]) for p in curve["points"]])
        for p in curve["points"]:
            chosen = mine & (pairs.score >= p["score"])
            right = (pairs.taken[0, chosen] >= 0).sum()
            assert [p["precision"], p["recall"]] == pytest.approx(
                [right / chosen.sum(), right / n])


def test_reliability_is_the_precision_of_each_bin():
    score = np.array([0.05, 0.1, 0.19, 0.95, 1.0])
    bins = analysis.reliability_of(score, np.array([False, True, False, True, True]))
    assert [b["predictions"] for b in bins] == [1, 2, 0, 0, 0, 0, 0, 0, 0, 2]
    assert [bins[i]["precision"] for i in (0, 1, 2, 9)] == [0.0, 0.5, None, 1.0]
    assert bins[1]["score"] == pytest.approx(0.145) and bins[2]["score"] is None
    wide = analysis.reliability_of(np.array([-10.0, 90.0]), np.array([True, False]))
    assert [wide[0]["from"], wide[9]["to"], wide[0]["precision"]] == [-10, 90, 1.0]


PSEUDO = {
    "v": [one | {"status": status} for one, status in zip(
        said(("b", 0.7, 20, 30), ("a", 0.8, 0, 9), ("a", 0.9, 0, 10), ("a", 0.95, 50, 60)),
        ("mined", "mined", "kept", "dropped"))],
    "stranger": [said(("a", 0.9, 0, 10))[0] | {"status": "kept"}]}


def test_pseudo_labels_are_judged_by_status_and_those_not_taught_nowhere():
    found = analysis.pseudo_reliability({"v": ONE, "u": ONE}, PSEUDO)
    assert [found[key]["predictions"] for key in ("all", "kept", "mined")] == [3, 1, 2]
    assert [found[key]["precision"] for key in ("kept", "mined")] == [1.0, 0.5]
    assert found["all"]["precision"] == pytest.approx(2 / 3)
    assert [b["predictions"] for b in found["mined"]["bins"]] == [0] * 7 + [1, 1, 0]


# ---- By class and by video ----------------------------------------------------------------------

def test_ap_by_class_is_that_of_the_map_with_the_numbers_of_instances():
    truth, predictions = made_up(3)
    predictions["0"] += said(("only said", 0.99, 0, 10))
    labelled = {"x": video(("a", 0, 1), ("a", 2, 3), ("only taught", 4, 5))}
    classes = analysis.classes_of(analysis.paired(truth, predictions, TIOUS), labelled)
    expected = mean_average_precision(truth, predictions, TIOUS)["ap"]
    assert classes.keys() == {*expected, "only said", "only taught"}
    for label, ap in expected.items():
        assert classes[label]["ap"] == pytest.approx(ap)
        assert classes[label]["instances"] == count_of(truth, label)
    assert [classes[label]["labelled"] for label in ("a", "b", "only taught")] == [2, 0, 1]
    assert classes["only said"] == {"ap": None, "average_ap": None, "instances": 0, "labelled": 0}


def test_confusion_parts_what_was_taken_for_what():
    found = said(
        ("a", 0.9, 0, 10),  # right
        ("b", 0.8, 0, 10),  # its instance is taken: background
        ("c", 0.7, 20, 29),  # b taken for c
        ("a", 0.6, 20, 30),  # too late for that b: background
        ("a", 0.1, 50, 60))  # below the score
    pairs = analysis.paired({"v": ONE}, {"v": found}, [0.5])
    confusion = analysis.confusion_of(pairs, 0.5)
    assert confusion["rows"] == ["a", "b", "c", "background"]
    assert confusion["columns"] == ["a", "b", "c", "missed"]
    assert confusion["counts"] == [[1, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]]


@pytest.mark.parametrize("least", [0.0, 0.4, 0.9])
def test_confusion_counts_each_instance_and_prediction_once(least):
    truth, predictions = made_up(4)
    pairs = analysis.paired(truth, predictions, [0.5])
    counts = np.array(analysis.confusion_of(pairs, least)["counts"])
    chosen = pairs.score >= least
    assert counts[:-1].sum(1).tolist() == pairs.positives.tolist()
    said_of = np.bincount(pairs.found.label[chosen], minlength=len(pairs.classes))
    assert counts[:, :-1].sum(0).tolist() == said_of.tolist()
    assert counts.diagonal()[:-1].sum() == (chosen & pairs.hits[0]).sum()


def test_videos_stand_worst_first():
    truth = {"good": ONE, "bad": ONE, "silent": ONE, "empty": video(), "noise": video()}
    predictions = {
        "good": said(("a", 0.9, 0, 10), ("b", 0.9, 20, 30), ("a", 0.9, 50, 60)),
        "bad": said(("a", 0.9, 0, 10), ("a", 0.9, 1, 10), ("a", 0.1, 50, 60)),
        "noise": said(("a", 0.9, 0, 10)), "empty": said(("a", 0.1, 0, 10))}
    rows = analysis.videos_of(analysis.paired(truth, predictions, [0.5]), 0.5)
    found = [(r["video"], r["f1"], r["missed"], r["false"], r["instances"]) for r in rows]
    assert found == [("silent", 0.0, 3, 0, 3), ("noise", 0.0, 0, 1, 0), ("bad", 0.4, 2, 1, 3),
                     ("good", 1.0, 0, 0, 3), ("empty", None, 0, 0, 0)]


# ---- Empty cases --------------------------------------------------------------------------------

SOME = said(("a", 0.9, 0, 10), ("x", 0.5, 0, 10))


@pytest.mark.parametrize(("truth", "predictions"), [
    ({}, {}), ({"v": ONE}, {}), ({"v": ONE}, {"v": []}), ({"v": video()}, {}),
    ({"v": video()}, {"v": SOME}), ({}, {"v": SOME}), ({"v": ONE, "u": video()}, {"v": SOME}),
    ({"v": video(("a", 5, 5))}, {"v": SOME}), ({"v": video(("a", 0, 9), duration=None)}, {})])
@pytest.mark.filterwarnings("error")
def test_nothing_gives_numbers_or_none(truth, predictions):
    result = analysis.analysis_of(truth, predictions, TIOUS, labelled={})
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert analysis.table(result, "run").count("\n") >= 11
    instances = sum((a.segments[:, 1] > a.segments[:, 0]).sum() for a in truth.values())
    found = sum(map(len, predictions.values()))
    assert (result["errors"]["average_mAP_N"] is None) == (instances == 0)
    assert (result["operating_point"]["score"] is None) == (found == 0)
    assert (result["operating_point"]["recall"] is None) == (instances == 0)
    assert {row["video"] for row in result["videos"]} == truth.keys() | predictions.keys()
    assert analysis.pseudo_reliability(truth, {})["all"]["precision"] is None


# ---- Intervals ----------------------------------------------------------------------------------

def copied(content, counts):
    """{video: what it has}, each video as often as its count, under names of their own."""
    return {f"{name}.{copy}": content[name]
            for name, count in zip(content, counts) for copy in range(count)}


@pytest.mark.parametrize("seed", range(5))
def test_a_resample_is_a_test_set_that_holds_a_video_as_often_as_drawn(seed):
    truth, predictions = made_up(seed, classes="abcdefgh", more="z")
    weights = np.random.default_rng(seed).multinomial(len(truth), [1 / len(truth)] * len(truth), 20)
    averages = average_mAPs(analysis.paired(truth, predictions, TIOUS), weights)
    for counts, average in zip(weights, averages):
        told = mean_average_precision(copied(truth, counts), copied(predictions, counts), TIOUS)
        assert average == pytest.approx(told["average_mAP"], abs=1e-12)


def test_a_resample_without_an_instance_has_no_map():
    truth = {"v": video(("a", 0, 10)), "w": video()}
    pairs = analysis.paired(truth, {"v": said(("a", 0.9, 0, 10))}, [0.5])
    averages = average_mAPs(pairs, np.array([[1, 1], [0, 2]]))
    assert averages.tolist() == pytest.approx([1, np.nan], nan_ok=True)


def test_an_interval_holds_the_middle_of_resampled_seeds_and_videos():
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 3, 1000))
    offsets = np.array([[0.0], [6.0], [12.0]])  # of the seeds: drawn, they spread the mean
    drawn = offsets[rng.integers(3, size=(3, 1000)), 0].mean(0)
    low, high = interval(resampled_difference(one + offsets, other))
    assert [low, high] == pytest.approx(np.percentile(drawn, MIDDLE), abs=1)
    assert interval(resampled_difference(one + 7, one)).tolist() == pytest.approx([7, 7])
    assert interval(resampled_difference(one[:1], other[:1])) == pytest.approx(
        np.percentile((one - other)[0], MIDDLE))  # one seed: the videos alone


def test_seeds_of_unrelated_data_sets_are_drawn_apart():
    rising = np.repeat(np.arange(1.0, 6.0)[:, None], 1000, axis=1)
    both = [resampled_difference(sign * rising, 0 * rising, seed)
            for seed, sign in enumerate((1, -1))]
    low, high = interval(np.mean(both, 0))
    assert low < -0.5 and high > 0.5  # [0, 0] where a seed of one is drawn with that of the other


# ---- The command --------------------------------------------------------------------------------

def entry(a, **more):
    """The entry of a JSON file of an Annotation."""
    listed = forms.listed(a.segments.tolist(), a.labels)
    return {"duration": a.duration, "annotations": listed} | more


@pytest.fixture
def folder(tmp_path):
    """A folder with the files of a run, and my.json beside them, with the hidden labels too."""
    found = {"v": SOME, "u": SOME}
    unknown = {"part": "unlabelled", "duration": 100.0, "annotations": None}
    contents = {
        "config": {"dataset": "my.json", "one_class": False},
        "metrics": {"tiou": [0.3, 0.39999999999999997, 0.5]},
        "predictions": forms.result_format(found, {}),
        "pseudo_labels": {"u": PSEUDO["v"]},
        "videos": {"l": entry(ONE, part="labelled"), "u": unknown, "v": entry(ONE, part="test"),
                   "w": entry(video(), part="test")},
        "my": {"database": {"u": entry(ONE, subset="training"), "v": entry(ONE, subset="test"),
                            "w": entry(video(), subset="test")}},
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def change(path, function):
    """Change the content of a JSON file in place."""
    content = read_result(path)
    function(content)
    path.write_text(json.dumps(content))


def test_runs_are_compared_seed_by_seed_and_data_set_by_data_set(folder, capsys):
    for name, average in (("a", 0.75), ("b", 0.5), ("stranger", 0.5)):
        (folder / name).mkdir()
        for part in ("videos", "predictions"):
            (folder / f"{name}/{part}.json").write_bytes((folder / f"{part}.json").read_bytes())
        (folder / f"{name}/config.json").write_text('{"seed": 0}')
        metrics = {"tiou": [0.5], "average_mAP": average}
        (folder / f"{name}/metrics.json").write_text(json.dumps(metrics))
    change(folder / "stranger/videos.json", lambda content: content.pop("w"))
    for name in "ab":
        shutil.copytree(folder / name, folder / f"{name}2")
        change(folder / f"{name}2/config.json", lambda content: content.update(seed=1))
    a, b, stranger = (str(folder / name) for name in ("a", "b", "stranger"))
    assert compare_runs([f"{a},{a}2", f"{b},{b}2", b, a, a, b]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{a}: +25.0 (0.0 to 0.0)", f"{b}: -25.0 (0.0 to 0.0)", f"{a}: +25.0 (0.0 to 0.0)",
        "mean: +8.3 (0.0 to 0.0)"]
    for argv, words in (([a, b, a], "even number"), ([f"{a},{a}", b], "2 runs"),
                        ([f"{a},{a}2", f"{b}2,{b}"], "seed by seed"),
                        ([f"{a},{a}", f"{b},{b}"], "seed by seed"),
                        ([a, stranger], "other test videos"), ([a, f"{b}x"], "not found")):
        assert compare_runs(argv) == 2
        assert words in capsys.readouterr().err


def test_a_run_and_files_give_the_same_numbers(folder, capsys):
    out, other = folder / "all.json", folder / "other.json"
    hidden = ["--hidden", str(folder / "my.json")]
    assert analysis.main([str(folder), "--out", str(out), *hidden]) == 0
    text = capsys.readouterr().out
    for words in ("2 videos, 3 instances, 2 predictions", "localization", "best F1", "\nv  ",
                  "kept 100.0 of 1, mined 50.0 of 2"):
        assert words in text, text
    result = read_result(out)
    assert result["tiou"] == [0.3, 0.39999999999999997, 0.5]
    assert [result["classes"][label]["labelled"] for label in "ab"] == [2, 1]
    change(folder / "predictions.json", lambda content: content["results"].pop("u"))
    files = ["--pred", folder / "predictions.json", "--gt", folder / "my.json"]
    argv = [*files, "--subset", "test", "--tiou", "0.3:0.5:0.1", "--bins", "thumos",
            "--out", other]
    assert analysis.main([str(word) for word in argv]) == 0
    assert "1 of 2 predictions are left out" in capsys.readouterr().err
    assert read_result(other)["predictions"] == 1  # "x" is in no annotation
    (folder / "my.csv").write_text("video,start,end,label\nv,0,10,a\n")
    table = ["--pred", files[1], "--gt", folder / "my.csv", "--out", folder / "of_table.json"]
    assert analysis.main([str(word) for word in table]) == 0
    assert read_result(folder / "of_table.json")["instances"] == 1
    assert analysis.main([str(word) for word in (*table, "--ignore-labels", "a")]) == 2
    assert "no instance" in capsys.readouterr().err
    assert analysis.main([str(folder), "--fps", "9"]) == 2
    capsys.readouterr()
    change(folder / "predictions.json", lambda content: content["results"]["v"].pop())
    for words in (argv, [folder, "--bins", "thumos", "--tiou", "0.3:0.5:0.1", "--out", out]):
        assert analysis.main([str(word) for word in words]) == 0
    ours, theirs = read_result(out), read_result(other)
    for content in (ours, theirs):
        content.pop("classes")
    assert ours == theirs


def test_one_class_and_the_groups_of_a_published_dataset_come_from_the_config(folder):
    change(folder / "config.json", lambda c: c.update(one_class=True, dataset="thumos"))
    for one in ("u", "v"):
        change(folder / "my.json", lambda c, one=one: c["database"][one].update(subset="x"))
    change(folder / "pseudo_labels.json", lambda c: [d.update(label="action") for d in c["u"]])
    argv = [str(folder), "--out", str(folder / "all.json"), "--hidden", str(folder / "my.json")]
    assert analysis.main(argv) == 0
    result = read_result(folder / "all.json")
    assert result["pseudo_labels"]["kept"]["precision"] == 1.0
    assert [group["to"] for group in result["groups"]["length"]] == [3, 6, 12, 18, None]


def text(name, content):
    """A change: the file holds this text."""
    return lambda folder: (folder / name).write_text(content)


def edits(name, function):
    """A change: function(content of the file)."""
    return lambda folder: change(folder / name, function)


WRONG = [  # a change of the folder, more arguments, words of the sentence
    (text("videos.json", "[]"), (), ("videos.json", "object", "[]")),
    (text("videos.json", '{"v": 3}'), (), ("videos.json, video v", "object", "3")),
    (text("videos.json", "{"), (), ("videos.json", "JSON")),
    (edits("videos.json", lambda c: [c[v].update(annotations=None) for v in "vw"]), (),
     ("videos.json", "no test video with annotations")),
    (edits("videos.json", lambda c: c["v"]["annotations"][0].update(segment=["x", 1])), (),
     ("videos.json, video v", "'x'")),
    (text("predictions.json", "{}"), (), ("predictions.json", "results")),
    (edits("predictions.json", lambda c: c["results"]["v"][0].update(score=None)), (),
     ("predictions.json, video v", "score", "None")),
    (edits("metrics.json", lambda c: c.update(tiou=[0.5, 2])), (), ("metrics.json", "[0.5, 2]")),
    (edits("metrics.json", lambda c: c.update(tiou=None)), (), ("metrics.json", "None")),
    (lambda folder: (folder / "metrics.json").unlink(), (), ("not found", "metrics.json")),
    (text("config.json", "3"), (), ("config.json", "3")),
    (edits("pseudo_labels.json", lambda c: c["u"][0].update(status="x")), ("--hidden", "my.json"),
     ("pseudo_labels.json, video u", "status", "'x'")),
    (edits("my.json", lambda c: c["database"].pop("u")), ("--hidden", "my.json"),
     ("my.json", "none of the 1 videos")),
    (edits("my.json", lambda c: None), ("--gt", "my.json"), ("either", "--pred")),
    (edits("my.json", lambda c: None), ("--tiou", "2"), ("--tiou", "2")),
    (edits("my.json", lambda c: None), ("--bin", "own"), ("--bins",)),
    (edits("my.json", lambda c: None), ("--bins", "own"), ("--bins", "own")),
]


@pytest.mark.parametrize(("change_it", "more", "words"), WRONG)
def test_wrong_input_is_one_sentence_and_nothing_is_written(
        change_it, more, words, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    change_it(folder)
    assert analysis.main([str(folder), "--out", "all.json", *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    for word in words:
        assert word in error, error
    assert not (folder / "all.json").exists()


@pytest.mark.parametrize(("argv", "word"), [
    ([], "either"), (["--pred", "p.json"], "either"), (["--gt", "g.json"], "either"),
    (["--pred", "p.json", "--gt", "g.json", "--hidden", "h.json"], "--hidden goes with")])
def test_arguments_that_do_not_go_together_are_refused(argv, word, capsys):
    assert analysis.main(argv) == 2
    error = capsys.readouterr().err
    assert word in error and error.count("\n") == 1
