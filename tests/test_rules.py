"""Tests of our own rules, which the paper does not give."""
import math
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import alqa
import data
import evaluate
import icd
import model
import train
from tests.helpers import detections, edit, own_argv, refused, settings, small_detector


@pytest.mark.parametrize(("scores", "labels", "expected", "positive"), [
    ((0.9, 0.2, 0.5, 0.11, 0.3), [0, 0, 0, 0, 1], [0.3, 0.3 * 0.5 / 1.5], [1, 0, 1, 0, 1]),
    ((0.2, 0.25, 0.29), [0, 0, 1], [0.3, 0.3], [0, 0, 0]),  # none is sure: the fixed threshold
], ids=["lower for a rare class", "fixed"])
def test_thresholds_by_class_frequency(scores, labels, expected, positive):
    videos = {"v": detections(*scores, labels=labels)}
    selected, theta = alqa.select(videos, 0.1, "frequency", 0.3, "video")
    assert theta == pytest.approx(expected)
    assert selected["v"]["positive"].tolist() == positive
    assert alqa.frequency_thresholds([], 0.3) == []


def test_label_smoothing_moves_the_targets_of_the_plain_detector_alone():
    detector = small_detector(alqa="none")
    out = detector(torch.randn(1, 16, 6), torch.ones(1, 16, dtype=torch.bool))
    cls, off = model.assign_targets(
        out.points, [torch.tensor([[2.0, 9.0]])], [torch.tensor([1])], 3, 1.5)
    smoothed, plain = (
        alqa.plain_losses(
            out, cls, off, out.mask, train.Settings(alqa="none", label_smoothing=share))["cls"]
        for share in (0.1, 0.0))
    target = cls[out.mask] * 0.9 + 0.1 / 4
    expected = alqa.focal_loss(out.cls_logits[out.mask], target, 0.25, 2.0).sum()
    assert torch.allclose(smoothed, expected)
    assert not torch.allclose(plain, expected)


@pytest.mark.parametrize(("argv", "words"), [
    (["--icd-score", "absolute"], ["theta_drop, -0.2", "--theta-drop 0.3"]),
    (["--beta", "0.9"], ["beta", "at least 1", "0.9"]),
], ids=["absolute similarities need their own thresholds", "beta below 1"])
def test_settings_that_do_not_fit_are_refused(argv, words, capsys):
    refused([*argv, "--check"], capsys, *words)
    assert settings("--icd-score", "absolute", "--theta-drop", 0.3).theta_drop == 0.3


def test_voting_averages_neighbours_by_score_and_overlap():
    segments = torch.tensor([[0.0, 10.0], [0.0, 9.0], [50.0, 60.0]])
    scores = torch.tensor([0.8, 0.4, 0.5])
    voted = model.vote(segments[[0, 2]], segments, scores, 0.8)
    end = (0.8 * 10 + 0.4 * 0.9 * 9) / (0.8 + 0.4 * 0.9)
    assert torch.allclose(voted, torch.tensor([[0.0, end], [50.0, 60.0]]))
    assert torch.equal(model.vote(segments, segments, scores, 1.0), segments)
    assert model.vote(segments[:0], segments[:0], scores[:0], 0.9).shape == (0, 2)


# Each key of the public ActionFormer's yaml files, or of its defaults where a file leaves it out,
# under our name: crop_keep is its trunc_thresh, crop_min crop_ratio, max_steps max_seq_len (resize
# with force_upsampling), channels embd_dim, fpn_dim and head_dim, windows n_mha_win_size, position
# use_abs_pe, t_plus init_loss_norm, lambda_reg loss_weight, min_length duration_thresh,
# nms_agnostic not multiclass_nms, vote voting_thresh. Epochs count the warm-up in.
EVERYWHERE = {
    "crop_min": 0.9, "max_steps": 2304, "heads": 4, "stem": 2, "drop_path": 0.1, "clip": 1,
    "radius": 1.5, "min_score": 0.001,
    "weight_decay": 1e-4}  # the paper's; 0.05 there
THUMOS = EVERYWHERE | {
    "root": "thumos", "train_subset": "validation", "test_subset": "test", "prefix": "",
    "extension": ".npy", "stride": 4, "frames": 16, "fps": 0, "crop_keep": 0.5, "resize": 0,
    "channels": 512, "windows": "19", "position": False, "lr": 1e-4, "supervised_epochs": 35,
    "batch": 2, "t_plus": 100, "label_smoothing": 0, "lambda_reg": 1, "pre_nms": 2000,
    "max_detections": 200, "nms_sigma": 0.5, "min_length": 0.05,
    "ranges": "0:4,4:8,8:16,16:32,32:64,64:inf",
    # True and 0.7 there, where external scores name the classes; ours come from the detector.
    "nms_agnostic": False, "vote": 0}
ACTIVITYNET = THUMOS | {
    "root": "anet_1.3", "train_subset": "training", "test_subset": "validation", "prefix": "v_",
    "stride": 16, "fps": 25, "resize": 192, "channels": 256, "windows": "7,7,7,7,7,0",
    "position": True, "lr": 1e-3, "supervised_epochs": 15, "batch": 16, "t_plus": 200,
    "label_smoothing": 0.1, "lambda_reg": 2, "max_detections": 100, "nms_sigma": 0.75,
    "min_length": 0.001, "nms_agnostic": True, "vote": 0.9}
EPIC_VERB = THUMOS | {
    "root": "epic_kitchens", "train_subset": "training", "test_subset": "validation",
    "extension": ".npz", "stride": 16, "frames": 32, "fps": 30, "crop_keep": 0.3, "windows": "9",
    "supervised_epochs": 21, "t_plus": 250, "pre_nms": 5000, "max_detections": 2000,
    "nms_sigma": 0.4, "ranges": "0:4,2:8,4:16,8:32,16:64,32:inf"}


@pytest.mark.parametrize(("name", "public"), [
    ("thumos", THUMOS), ("activitynet", ACTIVITYNET), ("epic-verb", EPIC_VERB),
    ("epic-noun", EPIC_VERB | {"label_smoothing": 0.1})])
def test_presets_are_those_of_the_public_files(name, public):
    s = settings("--dataset", name)
    ours = {key: getattr(s, key) for key in public}
    assert ours | {"root": Path(s.root).name} == public
    assert round(s.supervised_epochs * s.warmup) == 5


@pytest.mark.parametrize("similarity", [icd.similarity, icd.own_minus_other])
def test_the_labels_of_records_lie_on_the_cpu_whatever_the_device_of_icd(similarity):
    D = icd.Discriminator(4, 16, 0.5).eval().to("meta")  # a device that every machine has
    bank = {"feats": torch.randn(5, 4, device="meta"), "labels": torch.tensor([0, 0, 1, 2, 2])}
    s = similarity(D, torch.randn(3, 4, device="meta"), torch.tensor([0, 1, 3]), bank)
    assert (s.device.type, len(s)) == ("meta", 3)


def test_relative_similarity_is_the_own_class_less_the_best_other():
    D = icd.Discriminator(4, 16, 0.5).eval()
    bank = {"feats": torch.randn(5, 4), "labels": torch.tensor([0, 0, 1, 2, 2])}
    feats = torch.randn(4, 4)
    labels = torch.tensor([0, 1, 2, 3])  # no labelled instance of class 3
    s = icd.own_minus_other(D, feats, labels, bank)
    for i in range(3):
        of_class = icd.similarity(D, feats[[i] * 3], labels[:3], bank).tolist()
        own = of_class.pop(i)
        assert float(s[i]) == pytest.approx(own - max(of_class), abs=1e-6)
    assert s[3].isnan()
    one = {"feats": bank["feats"][:2], "labels": bank["labels"][:2]}
    first = icd.similarity(D, feats[:1], labels[:1], one)
    assert torch.equal(icd.own_minus_other(D, feats[:1], labels[:1], one), first)
    steps = torch.arange(50.0)[:, None].expand(50, 2)  # a segment a step
    x = icd.features_of(torch.randn(50, 4) * 7 + 3, steps, "max", "relative")
    assert torch.allclose(x.mean(0), torch.zeros(4), atol=1e-5)
    assert torch.allclose(x.std(0, correction=0), torch.ones(4), atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_input_dropout_acts_in_training_alone(training):
    detector = small_detector(input_dropout=0.5, drop_path=0.0).train(training)
    feats, mask = torch.randn(1, 16, 6), torch.ones(1, 16, dtype=torch.bool)
    first, second = (detector(feats, mask).cls_logits for _ in range(2))
    assert torch.equal(first, second) != training


def test_reranking_lowers_what_is_spread_over_its_length():
    segments = torch.tensor([[0.0, 10.0], [0.0, 14.0], [50.0, 60.0], [0.0, 10.0]])
    d = detections(0.5, 0.5, 0.8, 0.4, labels=[0, 0, 0, 1]) | {"segments": segments}
    spread = [0.5 * math.exp(-2 / 10), 0.5 * math.exp(-2 / 14)]
    assert alqa.rerank(d, 0.5)["scores"].tolist() == pytest.approx([*spread, 0.8, 0.4], rel=1e-4)
    assert len(alqa.rerank(data.take(d, slice(0)), 0.5)["scores"]) == 0


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
    scores = torch.tensor([[.9, .8], [.7, .1], [.2, .6], [.3, .4], [.05, .01], [.02, .03]])
    points, labels = evaluate.best_pairs(scores, [4, 2], 3)
    assert points.tolist() == [0, 0, 1, 4, 5, 5]
    assert labels.tolist() == [0, 1, 0, 0, 1, 0]
    points, _ = evaluate.best_pairs(scores, [4, 2], 100)
    assert sorted(points.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


@pytest.mark.parametrize(("overlap", "exclusive", "left"), [
    (0.5, False, [0.9, 0.4, 0.3]), (0.5, True, [0.9, 0.3]), (1.0, True, [0.9, 0.5, 0.4, 0.3, 0.2])])
def test_repeats_are_removed_within_their_class(overlap, exclusive, left):
    segments = torch.tensor([[0.0, 9.0], [0.0, 10.0], [0.0, 10.0], [8.0, 20.0], [0.0, 8.0]])
    d = detections(0.5, 0.9, 0.4, 0.3, 0.2, labels=[0, 0, 1, 0, 0]) | {"segments": segments}
    found = alqa.without_repeats(d, overlap, exclusive)["scores"].tolist()
    assert found == pytest.approx(left)
    assert len(alqa.without_repeats(data.take(d, slice(0)), overlap, exclusive)["scores"]) == 0


def test_classes_share_segments_where_two_labels_overlap():
    apart, shared = (
        SimpleNamespace(segments=torch.tensor(segments), labels=torch.tensor(labels))
        for segments, labels in (
            ([[0.0, 10.0], [8.0, 20.0], [0.0, 9.0]], [0, 1, 0]),  # a repeat within one class
            ([[0.0, 10.0], [1.0, 10.0]], [0, 1])))
    assert not alqa.classes_share_segments([apart], 0.5)
    assert alqa.classes_share_segments([apart, shared], 0.5)
    assert not alqa.classes_share_segments([], 0.5)


def test_exclusive_drops_second_classes_only_where_the_labels_have_none(own):
    argv = own_argv(own, "--theta-l", 0.0, "--min-score", 0.0, "--pre-nms", 200)
    labelled = data.training_data(settings(*argv)).labelled[0].id

    def overlapping(option):
        """Whether pseudo labels or candidates of two classes of a video have a tIoU over 0.5."""
        records = train.detect_unlabelled(train.launch(settings(*argv, option)))
        return alqa.classes_share_segments([SimpleNamespace(**r) for r in records.values()], 0.5)

    def label_twice(database):
        annotations = database[labelled]["annotations"]
        other = "A" if annotations[0]["label"] == "B" else "B"
        annotations.append(annotations[0] | {"label": other})

    assert overlapping("--no-exclusive")
    assert not overlapping("--exclusive")
    edit(own, label_twice)
    assert overlapping("--exclusive")


# ---- The paper's own choices --------------------------------------------------------------------

def test_paper_takes_back_what_toy_and_own_data_change_of_the_method():
    own = settings("--dataset", "own.json")
    paper = settings("--dataset", "own.json", "--paper")
    changed = {f.name for f in fields(paper) if getattr(paper, f.name) != getattr(own, f.name)}
    assert changed == set(data.PAPER)
    published = train.Settings(repeat=1.0)  # 1: no removal of repeats, which is ours
    assert all(getattr(paper, name) == getattr(published, name) for name in changed)
    assert settings("--paper", "--icd-pool", "mean").icd_pool == "mean"
    assert settings("--dataset", "activitynet", "--paper").scope == "dataset"
