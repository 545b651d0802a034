"""Tests of our own rules, which the paper does not give."""
import math
from types import SimpleNamespace

import pytest
import torch

import alqa
import data
import evaluate
import icd
import model
import train
from tests.helpers import (
    detections,
    edit,
    own_argv,
    refused,
    settings,
    small_detector,
)


def test_thresholds_by_class_frequency_are_lower_for_rare_classes():
    d = detections(0.9, 0.2, 0.5, 0.11, 0.3, labels=[0, 0, 0, 0, 1])
    selected, theta = alqa.select({"v": d}, 0.1, "frequency", 0.3, "video")
    assert theta == pytest.approx([0.3, 0.3 * 0.5 / 1.5])
    assert selected["v"]["positive"].tolist() == [True, False, True, False, True]


def test_without_a_sure_detection_the_frequency_rule_is_the_fixed_threshold():
    d = detections(0.2, 0.25, 0.29, labels=[0, 0, 1])
    selected, theta = alqa.select({"v": d}, 0.1, "frequency", 0.3, "video")
    assert theta == [0.3, 0.3]
    assert not selected["v"]["positive"].any()
    assert alqa.frequency_thresholds([], 0.3) == []


def test_label_smoothing_moves_the_targets_of_the_plain_detector_alone():
    detector = small_detector(alqa="none")
    out = detector(torch.randn(1, 16, 6), torch.ones(1, 16, dtype=torch.bool))
    cls, off = model.assign_targets(
        out.points, [torch.tensor([[2.0, 9.0]])], [torch.tensor([1])], 3, 1.5)

    def cls_of(smoothing):
        s = train.Settings(alqa="none", label_smoothing=smoothing)
        return alqa.plain_losses(out, cls, off, out.mask, s)["cls"]

    target = cls[out.mask] * 0.9 + 0.1 / 4
    expected = alqa.focal_loss(out.cls_logits[out.mask], target, 0.25, 2.0).sum()
    assert torch.allclose(cls_of(0.1), expected)
    assert not torch.allclose(cls_of(0.0), expected)


def test_beta_below_1_is_refused(capsys):
    refused(["--beta", "0.9", "--check"], capsys, "beta", "at least 1", "0.9")


def test_voting_averages_neighbours_by_score_and_overlap():
    segments = torch.tensor([[0.0, 10.0], [0.0, 9.0], [50.0, 60.0]])
    scores = torch.tensor([0.8, 0.4, 0.5])
    voted = model.vote(segments[[0, 2]], segments, scores, 0.8)
    end = (0.8 * 10 + 0.4 * 0.9 * 9) / (0.8 + 0.4 * 0.9)
    assert torch.allclose(voted, torch.tensor([[0.0, end], [50.0, 60.0]]))
    assert torch.equal(model.vote(segments, segments, scores, 1.0), segments)
    assert model.vote(segments[:0], segments[:0], scores[:0], 0.9).shape == (0, 2)


def test_presets_are_those_of_the_public_files():
    anet = settings("--dataset", "activitynet")
    assert (anet.vote, anet.min_length, anet.label_smoothing) == (0.9, 0.001, 0.1)
    assert (anet.supervised_epochs, anet.crop_min) == (15, 0.9)
    assert round(anet.supervised_epochs * anet.warmup) == 5
    noun, verb = (settings("--dataset", f"epic-{part}") for part in ("noun", "verb"))
    assert (noun.label_smoothing, verb.label_smoothing) == (0.1, 0.0)
    assert (noun.crop_keep, noun.supervised_epochs) == (0.3, 21)
    assert round(noun.supervised_epochs * noun.warmup) == 5
    thumos = settings("--dataset", "thumos")
    assert (thumos.crop_keep, thumos.supervised_epochs, thumos.vote) == (0.5, 35, 0.0)


def test_relative_similarity_is_the_own_class_less_the_best_other():
    D = icd.Discriminator(4, 16, 0.5).eval()
    bank = {"feats": torch.randn(5, 4), "labels": torch.tensor([0, 0, 1, 2, 2])}
    feats = torch.randn(4, 4)
    labels = torch.tensor([0, 1, 2, 3])  # no labelled instance of class 3
    s = icd.own_minus_other(D, feats, labels, bank)
    for i in range(3):
        of_class = [float(icd.similarity(D, feats[i:i + 1], torch.tensor([c]), bank))
                    for c in range(3)]
        other = max(value for c, value in enumerate(of_class) if c != i)
        assert float(s[i]) == pytest.approx(of_class[i] - other, abs=1e-6)
    assert s[3].isnan()
    one = {"feats": bank["feats"][:2], "labels": bank["labels"][:2]}
    first = icd.similarity(D, feats[:1], labels[:1], one)
    assert torch.equal(icd.own_minus_other(D, feats[:1], labels[:1], one), first)
    x = icd.standardised(torch.randn(50, 4) * 7 + 3)
    assert torch.allclose(x.mean(0), torch.zeros(4), atol=1e-5)
    assert torch.allclose(x.std(0, correction=0), torch.ones(4), atol=1e-5)


def test_input_dropout_acts_in_training_alone():
    detector = small_detector(input_dropout=0.5)
    feats = torch.randn(1, 16, 6)
    mask = torch.ones(1, 16, dtype=torch.bool)
    first, second = (detector(feats, mask).cls_logits for _ in range(2))
    assert torch.equal(first, second)
    detector.train()
    first, second = (detector(feats, mask).cls_logits for _ in range(2))
    assert not torch.equal(first, second)


def test_reranking_lowers_what_is_spread_over_its_length():
    segments = torch.tensor([[0.0, 10.0], [0.0, 14.0], [50.0, 60.0], [0.0, 10.0]])
    d = detections(0.5, 0.5, 0.8, 0.4, labels=[0, 0, 0, 1]) | {"segments": segments}
    scores = alqa.rerank(d, 0.5)["scores"].tolist()
    spread = [0.5 * math.exp(-2 / 10), 0.5 * math.exp(-2 / 14)]
    assert scores == pytest.approx([*spread, 0.8, 0.4], rel=1e-4)
    assert len(alqa.rerank(data.rows(d, slice(0)), 0.5)["scores"]) == 0


def test_a_window_clips_half_the_frames_of_a_feature_outside_and_the_whole_video_nothing():
    video = SimpleNamespace(steps=100, grid=data.Grid(25.0, 4.0, 16.0))
    segments = torch.tensor([[-3.0, 30.0], [15.0, 19.0], [90.0, 104.0], [110.0, 120.0]])
    clipped, inside = data.crop_segments(segments, video, 20, 80, 0.5)
    assert clipped.tolist() == [[-2.0, 10.0], [-2.0, -1.0], [70.0, 82.0], [82.0, 82.0]]
    assert inside.tolist() == [False, False, True, False]
    whole, inside = data.crop_segments(segments, video, 0, 100, 0.5)
    assert torch.equal(whole, segments)
    assert inside.tolist() == [True, True, True, False]


def test_each_level_has_its_own_best_pairs():
    masks = [torch.ones(1, 4).bool(), torch.ones(1, 2).bool()]
    scores = torch.tensor([[.9, .8], [.7, .1], [.2, .6], [.3, .4], [.05, .01], [.02, .03]])
    points, labels = evaluate.best_pairs(scores, masks, 3)
    assert points.tolist() == [0, 0, 1, 4, 5, 5]
    assert labels.tolist() == [0, 1, 0, 0, 1, 0]
    points, _ = evaluate.best_pairs(scores, masks, 100)
    assert sorted(points.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


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
