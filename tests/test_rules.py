"""Tests of our own rules, which the paper does not give."""
import math
from types import SimpleNamespace

import pytest
import torch

import alqa
import data
import train
from tests.helpers import detections, edit, own_argv, settings


def test_thresholds_by_class_frequency_are_lower_for_rare_classes():
    d = detections(0.9, 0.2, 0.5, 0.11, 0.3, labels=[0, 0, 0, 0, 1])
    selected, theta = alqa.select({"v": d}, 0.1, "frequency", 0.3, "video")
    assert theta == pytest.approx([0.3, 0.3 * 0.5 / 1.5])
    assert selected["v"]["positive"].tolist() == [True, False, True, False, True]


def test_reranking_lowers_what_is_spread_over_its_length():
    segments = torch.tensor([[0.0, 10.0], [0.0, 14.0], [50.0, 60.0], [0.0, 10.0]])
    d = detections(0.5, 0.5, 0.8, 0.4, labels=[0, 0, 0, 1]) | {"segments": segments}
    scores = alqa.rerank(d, 0.5)["scores"].tolist()
    spread = [0.5 * math.exp(-2 / 10), 0.5 * math.exp(-2 / 14)]
    assert scores == pytest.approx([*spread, 0.8, 0.4], rel=1e-4)
    assert len(alqa.rerank(data.rows(d, slice(0)), 0.5)["scores"]) == 0


def test_repeats_are_removed_within_their_class():
    segments = torch.tensor([[0.0, 9.0], [0.0, 10.0], [0.0, 10.0], [8.0, 20.0], [0.0, 8.0]])
    d = detections(0.5, 0.9, 0.4, 0.3, 0.2, labels=[0, 0, 1, 0, 0]) | {"segments": segments}

    def left(d, overlap, exclusive):
        return alqa.without_repeats(d, overlap, exclusive)["scores"].tolist()

    assert left(d, 0.5, exclusive=False) == pytest.approx([0.9, 0.4, 0.3])
    assert left(d, 0.5, exclusive=True) == pytest.approx([0.9, 0.3])
    assert len(left(d, 1.0, exclusive=True)) == 5
    assert left(data.rows(d, slice(0)), 0.5, exclusive=True) == []


def test_classes_share_segments_where_two_labels_overlap():
    def video(segments, labels):
        return SimpleNamespace(segments=torch.tensor(segments), labels=torch.tensor(labels))

    # A repeat of one class is none of another.
    apart = video([[0.0, 10.0], [8.0, 20.0], [0.0, 9.0]], [0, 1, 0])
    shared = video([[0.0, 10.0], [1.0, 10.0]], [0, 1])
    assert not alqa.classes_share_segments([apart], 0.5)
    assert alqa.classes_share_segments([apart, shared], 0.5)
    assert not alqa.classes_share_segments([], 0.5)


def test_exclusive_drops_second_classes_only_where_the_labels_have_none(own):
    argv = own_argv(own, "--theta-l", 0.0, "--min-score", 0.0, "--pre-nms", 200)
    labelled = data.load_dataset(settings(*argv)).labelled[0].id

    def overlapping(option):
        """Whether pseudo labels or candidates of two classes of a video have a tIoU over 0.5."""
        run = train.launch(settings(*argv, option))
        records, _ = train.make_pseudo_labels(run)
        return alqa.classes_share_segments([SimpleNamespace(**r) for r in records.values()], 0.5)

    assert overlapping("--no-exclusive")
    assert not overlapping("--exclusive")

    def label_twice(database):
        annotations = database[labelled]["annotations"]
        other = "A" if annotations[0]["label"] == "B" else "B"
        annotations.append(annotations[0] | {"label": other})

    edit(own, label_twice)
    assert overlapping("--exclusive")
