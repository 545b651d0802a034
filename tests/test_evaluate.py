"""Tests of evaluate.py: mAP, detection of whole videos, the audit of pseudo labels."""
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import evaluate
import model
from plumbing.forms import Annotation, read_annotations, read_predictions
from plumbing.settings import thresholds_of
from plumbing.words import BadInput
from tests.helpers import (
    SHARED,
    TINY,
    needs_shared,
    own_argv,
    read_result,
    record,
    refused,
    settings,
    small_detector,
)
from tests.users import TESTED, entries, predict, score_of


def ap_by_hand(truth, found, tiou):
    """The toolkit's definition: truth [(video, segment)], found [(video, segment, score)]."""
    used, tp = set(), []
    for video, segment, _ in sorted(found, key=lambda detection: -detection[2]):
        free = [(model.tiou(np.array(segment), np.array(instance)), i)
                for i, (name, instance) in enumerate(truth) if name == video and i not in used]
        overlap, best = max(free, default=(0, None))
        tp.append(overlap >= tiou)
        if tp[-1]:
            used.add(best)
    precision = np.cumsum(tp) / np.arange(1, len(tp) + 1)
    return sum(max(precision[i:]) / len(truth) for i, hit in enumerate(tp) if hit)


def test_map_against_a_loop_and_of_perfect_empty_and_repeated_predictions():
    rng = np.random.default_rng(0)
    truth, found = {}, {}
    for name in ("v0", "v1", "v2", "v3", "unknown"):
        segments = np.cumsum(rng.uniform([0, 2], [30, 8], (45, 2)), 1)
        truth[name] = Annotation("test", 40.0, 1.0, segments[:5], list("aabab"))
        found[name] = [{"label": str(rng.choice(["a", "b"])), "score": rng.uniform(),
                        "segment": segment} for segment in segments[5:].tolist()]
    del truth["unknown"]
    metrics = evaluate.mean_average_precision(truth, found, [0.3, 0.5, 0.7])
    for label in "ab":
        instances = [(video, segment.tolist()) for video, a in truth.items()
                     for segment, name in zip(a.segments, a.labels) if name == label]
        detections = [(video, d["segment"], d["score"]) for video, of_video in found.items()
                      for d in of_video if d["label"] == label]
        expected = [ap_by_hand(instances, detections, tiou) for tiou in (0.3, 0.5, 0.7)]
        assert metrics["ap"][label] == pytest.approx(expected, abs=1e-9)
    assert metrics["average_mAP"] == pytest.approx(np.mean(metrics["mAP"]))
    segments = np.array([[0.0, 2.0], [0.0, 2.0], [4.0, 5.0]])
    truth = {"v": Annotation("test", 9.0, 1.0, segments, ["a", "b", "a"])}
    hits = [{"label": label, "score": 0.5, "segment": segment}
            for label, segment in zip("aba", segments.tolist())]
    perfect, empty, none, twice = (evaluate.mean_average_precision(truth, found, [0.5])
                                   for found in ({"v": hits}, {"v": []}, {}, {"v": hits + hits}))
    assert (perfect["mAP"], empty["mAP"], none["average_mAP"]) == ([1.0], [0.0], 0.0)
    assert twice["ap"]["b"] == [1.0]  # a repeat behind all true ones costs nothing


def toolkits_mAP(truth, found, tious):
    """mAP of {class: {video: (N, 2)}} and {class: [(video, score, segment)]}, as the public toolkit
    sorts and matches: a loop."""
    ap = []
    for label, instances in truth.items():
        ranked = sorted(found[label], key=lambda detection: -detection[1])
        for tiou in tious:
            taken = {video: np.zeros(len(segments), bool) for video, segments in instances.items()}
            tp = []
            for video, _, segment in ranked:
                overlap = model.tiou(np.array(segment), instances.get(video, np.zeros((0, 2))))
                best = [i for i in overlap.argsort()[::-1]
                        if overlap[i] >= tiou and not taken[video][i]][:1]
                if best:
                    taken[video][best] = True
                tp.append(bool(best))
            precision = np.cumsum(tp) / np.arange(1, len(tp) + 1)
            most = sum(map(len, instances.values()))
            ap.append(sum(precision[i:].max() for i in np.nonzero(tp)[0]) / most)
    return np.mean(np.reshape(ap, (len(truth), -1)), 0)


@pytest.mark.parametrize("seed", range(3))
def test_where_instances_overlap_a_detection_equally_the_toolkits_is_taken(seed):
    rng = np.random.default_rng(seed)
    tious = [0.1, 0.2, 0.25, 0.5]
    changed = 0
    for _ in range(100):
        truth, found, classes = {}, {}, {}
        for name in ("v0", "v1"):
            segments = 4.0 * rng.permutation(rng.integers(2, 24))[:, None] + [0, 2]
            truth[name] = Annotation("test", 99.0, 1.0, segments, ["a"] * len(segments))
            classes.setdefault("a", {})[name] = truth[name].segments
            ends = 2.0 * np.sort(rng.choice(48, (rng.integers(20), 2)), 1) + [0, 2]
            found[name] = [{"label": "a", "score": rng.uniform(), "segment": segment}
                           for segment in ends.tolist()]
        rows = {"a": [(name, d["score"], d["segment"]) for name in found for d in found[name]]}
        if not rows["a"]:
            continue
        metrics = evaluate.mean_average_precision(truth, found, tious)
        assert metrics["mAP"] == pytest.approx(toolkits_mAP(classes, rows, tious), abs=1e-12)
        others = {name: Annotation("test", 99.0, 1.0, a.segments[::-1], a.labels)
                  for name, a in truth.items()}
        other = evaluate.mean_average_precision(others, found, tious)
        changed += other["mAP"] != metrics["mAP"]
    assert changed > 3  # the order of equal instances matters


def test_precision_and_recall_by_score_are_those_of_a_loop():
    rng = np.random.default_rng(1)
    truth, found = {}, {}
    for name in ("v0", "v1", "v2"):
        segments = np.cumsum(rng.uniform([0, 2], [9, 8], (20, 2)), 1)
        truth[name] = Annotation("test", 40.0, 1.0, segments[:6], list("aabbab"))
        found[name] = [{"label": str(rng.choice(["a", "b"])), "score": round(rng.uniform(), 2),
                        "segment": (segment + rng.normal(size=2)).tolist()}
                       for segment in segments[:14]]
    trust = evaluate.mean_average_precision(truth, found, [0.3])["trust"]

    def by_hand(least, labels):
        listed = right = instances = 0
        for name, a in truth.items():
            for label in labels:
                segments = [s for s, of in zip(a.segments, a.labels) if of == label]
                mine = [d["segment"] for d in sorted(found[name], key=lambda d: -d["score"])
                        if d["label"] == label and d["score"] >= least]
                right += evaluate.match(np.reshape(mine, (-1, 2)), np.reshape(segments, (-1, 2)),
                                        np.array([0.5])).sum()
                listed, instances = listed + len(mine), instances + len(segments)
        return right / max(listed, 1), right / instances, 2 * right / (listed + instances)

    for labels, point in {"ab": trust, **trust["classes"]}.items():
        columns = ("precision", "recall", "f1")
        curve = point["curve"]
        for i, least in enumerate(curve["score"]):
            assert [curve[key][i] for key in columns] == pytest.approx(by_hand(least, labels))
        assert [point[key] for key in columns] == pytest.approx(by_hand(point["score"], labels))
        best = max(by_hand(least, labels)[2] for least in np.arange(0, 1, 0.001))
        assert point["f1"] == pytest.approx(best)
    none = evaluate.mean_average_precision(truth, {}, [0.3])["trust"]
    assert (none["precision"], none["recall"], none["f1"]) == (0, 0, 0)


@needs_shared
def test_published_detections_have_the_toolkits_mAP():
    folder = SHARED / "reference"
    truth = read_annotations(folder / "stpn_gt.json")
    found = read_predictions(folder / "stpn_results.json")
    metrics = evaluate.mean_average_precision(truth, found, thresholds_of("0.1:0.9:0.1"))
    expected = read_result(folder / "stpn_expected.json")["toolkit_mAP"]
    assert metrics["mAP"] == pytest.approx(expected, abs=1e-7)


def test_predictions_of_a_class_that_the_subset_lacks_count_nowhere(own, capsys):
    instances = [{"segment": [t, t + 6.0], "label": "A"} for t in (2.0, 12.0)]
    entries(TESTED, annotations=instances)(own)
    found = [{"label": label, "score": 0.5, "segment": [2, 8]} for label in "AB"]
    argv = [*predict(own, {"v10": found}), "--subset", "validation"]
    assert score_of(own, argv) > 0
    assert set(read_result(own / "out.json")["ap"]) == {"A"}
    entries(TESTED, annotations=[])(own)
    capsys.readouterr()
    for command in (argv, own_argv(own)):
        refused(command, capsys, "own.json", "no instance")


def test_threshold_lists():
    assert thresholds_of("0.3:0.7:0.1") == pytest.approx([0.3, 0.4, 0.5, 0.6, 0.7])
    assert len(thresholds_of("0.5:0.95:0.05")) == 10
    assert thresholds_of("0.5") == pytest.approx([0.5])
    for bad in ("x", "0.3:0.7", "0.3:0.7:0", "0", "1.5", ""):
        with pytest.raises(BadInput):
            thresholds_of(bad)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""
    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.size = max([self.size, *(x.numel() for x in tensors)])
        return result


def test_detection_of_a_long_video_needs_memory_in_proportion_to_its_length():
    detector, sizes = small_detector(windows="5,5,5"), []
    for T in (10_000, 100_000):
        with Largest() as largest, torch.no_grad():
            outputs = detector(torch.randn(1, T, 6), torch.ones(1, T, dtype=torch.bool))
            evaluate.suppress(outputs, settings())
        sizes.append(largest.size)
    assert outputs.mask.sum() == 175_000 and 10_000 < sizes[0] and sizes[1] < 10.1 * sizes[0]


def test_detection_decodes_suppresses_and_exports_seconds():
    s, d = settings(*TINY), data.training_data(settings())
    detector = model.Detector(d.dim, len(d.classes), s)
    detector.cls_out.bias.data.fill_(0.0)
    videos = d.test[:3]
    detections = evaluate.detect(detector, videos, d, s)
    assert list(detections) == [video.id for video in videos]
    columns = {"label": "labels", "score": "scores", "segment": "segments"}
    results = evaluate.export(videos, detections, columns, {"labels": d.classes})
    for video in videos:
        scores = detections[video.id]["scores"]
        assert 0 < len(scores) <= s.max_detections and (scores.diff() <= 0).all()
        for found in results[video.id]:
            start, end = found["segment"]
            assert 0 <= start <= end <= video.duration and found["label"] in d.classes


KEYS = ("class_accuracy", "mean_tIoU", "positive_accuracy", "precision", "recall")
NOTHING = ([], [])
TWO = ([[0.0, 4.0], [10.0, 20.0]], [0, 1])
TWICE = ([[0.0, 4.0], [0.0, 4.0]], [0, 1])
HIT_REPEAT_WRONG_MISS = ([[0.0, 4.0], [0.0, 3.0], [10.0, 19.0], [25.0, 29.0]], [0, 0, 2, 1])


@pytest.mark.parametrize(("found", "hidden", "expected"), [
    (HIT_REPEAT_WRONG_MISS, TWO, [0.5, (1 + 0.75 + 0.9) / 4, 0.5, 0.25, 0.5]),
    (TWICE, TWICE, [0.5, 1, 0.5, 1, 1]),  # of instances that overlap alike the first has the class
    (NOTHING, NOTHING, [0] * 5),
    (TWO, NOTHING, [0] * 5)])
def test_pseudo_label_quality(found, hidden, expected):
    found, hidden = record(*found, [0] * len(found[1])), record(*hidden, [])
    video = data.LabelledVideo("v", None, "", data.Grid(1, 1, 1), 30, 30.0, 30,
                               hidden["segments"], hidden["labels"])
    found["scores"] = torch.linspace(0.9, 0.6, len(found["scores"]))
    quality = evaluate.pseudo_label_quality({"v": found}, {"v": video})
    assert quality == pytest.approx(dict(zip(KEYS, expected)))
    assert set(evaluate.pseudo_label_quality({}, {}).values()) == {0.0}
