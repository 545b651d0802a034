"""Tests of our own rules, which the paper does not give."""
import math
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


def test_absolute_similarities_need_their_own_thresholds(capsys):
    refused(["--icd-score", "absolute", "--check"], capsys, "theta_drop, -0.2", "--theta-drop 0.3")
    assert settings("--icd-score", "absolute", "--theta-drop", 0.3).theta_drop == 0.3


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


# Every key of the public ActionFormer's yaml files of THUMOS14, ActivityNet, EPIC verb and noun, or
# of its defaults where a file leaves it out, beside our setting. Epochs count the warm-up in.
PUBLIC = {
    "root": ("thumos", "anet_1.3", "epic_kitchens", "epic_kitchens"),  # json_file, feat_folder
    "train_subset": ("validation", "training", "training", "training"),
    "test_subset": ("test", "validation", "validation", "validation"),
    "prefix": ("", "v_", "", ""),
    "extension": (".npy", ".npy", ".npz", ".npz"),
    "stride": (4, 16, 16, 16),
    "frames": (16, 16, 32, 32),
    "fps": (0, 25, 30, 30),
    "crop_keep": (0.5, 0.5, 0.3, 0.3),  # trunc_thresh
    "crop_min": (0.9, 0.9, 0.9, 0.9),  # crop_ratio
    "max_steps": (2304, 2304, 2304, 2304),  # max_seq_len; ActivityNet's 192 is resize
    "resize": (0, 192, 0, 0),  # force_upsampling
    "channels": (512, 256, 512, 512),  # embd_dim, fpn_dim, head_dim
    "heads": (4, 4, 4, 4),
    "stem": (2, 2, 2, 2),  # backbone_arch
    "windows": ("19", "7,7,7,7,7,0", "9", "9"),  # n_mha_win_size
    "position": (False, True, False, False),  # use_abs_pe
    "drop_path": (0.1, 0.1, 0.1, 0.1),
    "lr": (1e-4, 1e-3, 1e-4, 1e-4),
    "supervised_epochs": (35, 15, 21, 21),
    "batch": (2, 16, 2, 2),
    "t_plus": (100, 200, 250, 250),  # init_loss_norm
    "clip": (1, 1, 1, 1),
    "radius": (1.5, 1.5, 1.5, 1.5),
    "label_smoothing": (0, 0.1, 0, 0.1),
    "lambda_reg": (1, 2, 1, 1),  # loss_weight
    "pre_nms": (2000, 2000, 5000, 5000),
    "max_detections": (200, 100, 2000, 2000),
    "min_score": (0.001, 0.001, 0.001, 0.001),
    "nms_sigma": (0.5, 0.75, 0.4, 0.4),
    "min_length": (0.05, 0.001, 0.05, 0.05),  # duration_thresh
    "nms_agnostic": (True, True, False, False),  # not multiclass_nms
    "vote": (0.7, 0.9, 0, 0),  # voting_thresh, which acts on class-agnostic Soft-NMS alone
    "weight_decay": (0.05, 0.05, 0.05, 0.05),
}
# The paper has another weight decay. THUMOS14's Soft-NMS there is class-agnostic, and votes, since
# external scores name the classes: ours come from the detector, and go class by class.
OURS = {
    "weight_decay": (1e-4, 1e-4, 1e-4, 1e-4),
    "nms_agnostic": (False, True, False, False),
    "vote": (0, 0.9, 0, 0),
}


def test_presets_are_those_of_the_public_files():
    presets = [settings("--dataset", name)
               for name in ("thumos", "activitynet", "epic-verb", "epic-noun")]
    for name, expected in (PUBLIC | OURS).items():
        values = tuple(getattr(s, name) for s in presets)
        if name == "root":
            values = tuple(Path(root).name for root in values)
        assert values == expected, name
    assert [round(s.supervised_epochs * s.warmup) for s in presets] == [5, 5, 5, 5]
    ranges = [s.ranges for s in presets]
    assert ranges[:2] == ["0:4,4:8,8:16,16:32,32:64,64:inf"] * 2
    assert ranges[2:] == ["0:4,2:8,4:16,8:32,16:64,32:inf"] * 2


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
    scores = torch.tensor([[.9, .8], [.7, .1], [.2, .6], [.3, .4], [.05, .01], [.02, .03]])
    points, labels = evaluate.best_pairs(scores, [4, 2], 3)
    assert points.tolist() == [0, 0, 1, 4, 5, 5]
    assert labels.tolist() == [0, 1, 0, 0, 1, 0]
    points, _ = evaluate.best_pairs(scores, [4, 2], 100)
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
