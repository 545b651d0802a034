"""Tests of evaluate.py: mAP, detection of whole videos, the audit of pseudo labels."""
import json

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import evaluate
import model
from tests.helpers import (
    TINY,
    edit,
    evaluated,
    own_argv,
    read_result,
    refused,
    settings,
    small_detector,
)

# ---- mAP ----------------------------------------------------------------------------------------

def ap_by_hand(truth, found, tiou):
    """The toolkit's definition, detection by detection.

    truth  [(video, segment)], found [(video, segment, score)]"""
    used = set()
    tp = []
    for video, segment, _ in sorted(found, key=lambda detection: -detection[2]):
        free = []
        for i, (name, instance) in enumerate(truth):
            if name == video and i not in used:
                overlap = model.tiou(torch.tensor(segment), torch.tensor(instance))
                free.append((float(overlap), i))
        overlap, best = max(free, default=(0, None))
        tp.append(overlap >= tiou)
        if tp[-1]:
            used.add(best)
    recall = np.cumsum(tp) / len(truth)
    precision = np.cumsum(tp) / np.arange(1, len(tp) + 1)
    steps = np.diff(np.concatenate([[0], recall]))
    return sum(step * max(precision[i:]) for i, step in enumerate(steps))


def test_map_against_a_loop():
    rng = np.random.default_rng(0)

    def draw():
        return np.cumsum([rng.uniform(0, 30), rng.uniform(2, 8)]).tolist()

    truth = {}
    for v in range(4):
        segments = np.array([draw() for _ in range(5)])
        truth[f"v{v}"] = data.Annotation("test", 40.0, 1.0, segments, list("aabab"))
    found = {}
    for v in range(5):
        found[f"v{v}"] = []
        for _ in range(40):
            label = "ab"[int(rng.integers(2))]
            score = float(rng.uniform())
            found[f"v{v}"].append({"label": label, "score": score, "segment": draw()})
    metrics = evaluate.mean_average_precision(truth, found, [0.3, 0.5, 0.7])
    for label in "ab":
        instances = [(video, segment.tolist()) for video, a in truth.items()
                     for segment, name in zip(a.segments, a.labels) if name == label]
        detections = [(video, d["segment"], d["score"]) for video, of_video in found.items()
                      for d in of_video if d["label"] == label]
        expected = [ap_by_hand(instances, detections, tiou) for tiou in (0.3, 0.5, 0.7)]
        assert metrics["ap"][label] == pytest.approx(expected, abs=1e-9)
    assert metrics["average_mAP"] == pytest.approx(np.mean(metrics["mAP"]))


def test_perfect_and_empty_predictions():
    segments = np.array([[0.0, 2.0], [0.0, 2.0], [4.0, 5.0]])
    truth = {"v": data.Annotation("test", 9.0, 1.0, segments, ["a", "b", "a"])}
    perfect = [{"label": label, "score": 0.5, "segment": segment}
               for label, segment in zip("aba", segments.tolist())]

    def metrics(found):
        return evaluate.mean_average_precision(truth, found, [0.5])

    assert metrics({"v": perfect})["mAP"] == [1.0]
    assert metrics({"v": []})["mAP"] == [0.0]
    assert metrics({})["average_mAP"] == 0.0
    # A duplicate is a false positive, but behind all true ones it costs nothing.
    assert metrics({"v": perfect + perfect})["ap"]["b"] == [1.0]


def test_predictions_of_a_class_that_the_subset_lacks_count_nowhere(own, capsys):
    tested = ("v10", "v11", "v12", "v13")

    def only_a(database):
        for name in tested:
            for a in database[name]["annotations"]:
                a["label"] = "A"

    def nothing(database):
        for name in tested:
            database[name]["annotations"] = []

    edit(own, only_a)
    found = [{"label": label, "score": 0.5, "segment": [2, 8]} for label in "AB"]
    (own / "pred.json").write_text(json.dumps({"results": {"v10": found}}))
    argv = ("--pred", own / "pred.json", "--gt", own / "own.json", "--subset", "validation",
            "--json", own / "out.json")
    assert evaluated(*argv) == 0
    assert set(read_result(own / "out.json")["ap"]) == {"A"}
    edit(own, nothing)
    capsys.readouterr()
    refused(["evaluate", *argv], capsys, "own.json", "no instance")
    refused(own_argv(own), capsys, "own.json", "no instance")


def test_threshold_lists():
    assert evaluate.parse_tious("0.3:0.7:0.1") == pytest.approx([0.3, 0.4, 0.5, 0.6, 0.7])
    assert len(evaluate.parse_tious("0.5:0.95:0.05")) == 10
    assert evaluate.parse_tious("0.5") == pytest.approx([0.5])
    for bad in ("x", "0.3:0.7", "0.3:0.7:0", "0", "1.5", ""):
        with pytest.raises(data.BadInput):
            evaluate.parse_tious(bad)


# ---- Detection ----------------------------------------------------------------------------------

class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""
    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.size = max([self.size, *(x.numel() for x in tensors)])
        return result


def test_detection_of_a_long_video_needs_memory_in_proportion_to_its_length():
    detector = small_detector(windows="5,5,5")
    s = settings()
    sizes = []
    for T in (10_000, 100_000):
        with Largest() as largest, torch.no_grad():
            outputs = detector(torch.randn(1, T, 6), torch.ones(1, T, dtype=torch.bool))
            evaluate.suppress(outputs, s)
        sizes.append(largest.size)
    assert outputs.mask.sum() == 175_000
    assert sizes[0] > 10_000
    assert sizes[1] < 10.1 * sizes[0]


def test_detection_decodes_suppresses_and_exports_seconds():
    s = settings(*TINY)
    d = data.load_dataset(settings())
    detector = model.Detector(d.dim, len(d.classes), s)
    detector.cls_out.bias.data.fill_(0.0)
    videos = d.test[:3]
    name = videos[1].id
    detections = evaluate.detect(detector, videos, d, s)
    assert list(detections) == [video.id for video in videos]
    scores = detections[name]["scores"]
    assert 0 < len(scores) <= s.max_detections
    assert (scores.diff() <= 0).all()
    alone = evaluate.detect(detector, videos[1:2], d, s)[name]["scores"]
    n = min(20, len(alone))
    assert torch.allclose(scores[:n], alone[:n], atol=1e-5)
    results = evaluate.export(videos, detections, d.classes)["results"]
    for video in videos:
        for found in results[video.id]:
            start, end = found["segment"]
            assert 0 <= start <= end <= video.duration
    assert {found["label"] for found in results[name]} <= set(d.classes)


# ---- The audit of pseudo labels -----------------------------------------------------------------

def test_pseudo_label_quality_by_hand():
    video = data.LabelledVideo(
        "v", None, "", data.Grid(1, 1, 1), 30, 30.0, False,
        segments=torch.tensor([[0.0, 4.0], [10.0, 20.0]]), labels=torch.tensor([0, 1]))
    found = {
        "segments": torch.tensor([[0.0, 4.0], [0.0, 3.0], [10.0, 19.0], [25.0, 29.0]]),
        "labels": torch.tensor([0, 0, 2, 1]),
        "scores": torch.tensor([0.9, 0.8, 0.7, 0.6]),
    }
    q = evaluate.pseudo_label_quality({"v": found}, {"v": video})
    # A duplicate, a wrong class and a miss.
    assert (q["precision"], q["recall"]) == (0.25, 0.5)
    assert q["class_accuracy"] == 0.5
    assert q["positive_accuracy"] == 0.5
    assert q["mean_tIoU"] == pytest.approx((1 + 0.75 + 0.9) / 4)


def test_quality_without_pseudo_labels_or_instances():
    nothing = {"segments": torch.zeros(0, 2), "labels": torch.zeros(0, dtype=torch.long),
               "scores": torch.zeros(0)}
    one = {"segments": torch.tensor([[1.0, 4.0]]), "labels": torch.tensor([0]),
           "scores": torch.tensor([0.9])}
    empty = data.LabelledVideo(
        "v", None, "", data.Grid(1, 1, 1), 30, 30.0, False,
        segments=torch.zeros(0, 2), labels=torch.zeros(0, dtype=torch.long))
    for records in ({}, {"v": nothing}, {"v": one}):
        quality = evaluate.pseudo_label_quality(records, {"v": empty})
        assert set(quality.values()) == {0.0}


def test_of_two_instances_that_overlap_alike_the_first_gives_the_class():
    twice = torch.tensor([[0.0, 4.0], [0.0, 4.0]])
    video = data.LabelledVideo(
        "v", None, "", data.Grid(1, 1, 1), 30, 30.0, False,
        segments=twice, labels=torch.tensor([0, 1]))
    found = {"segments": twice, "labels": torch.tensor([0, 1]), "scores": torch.tensor([0.9, 0.8])}
    quality = evaluate.pseudo_label_quality({"v": found}, {"v": video})
    assert quality["class_accuracy"] == 0.5
    assert quality["precision"] == 1.0
