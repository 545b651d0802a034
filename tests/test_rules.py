"""Tests of our own rules, which the paper does not give."""
import math
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import allclose, tensor

import alqa
import data
import evaluate
import icd
import model
import train
from extras import mean_teacher, spot
from plumbing import inputs
from tests.helpers import detections, own_argv, refused, settings, small_detector
from tests.users import actions


def test_thresholds_are_lower_for_a_rare_class():
    for d, expected, positive in (
            (detections(0.9, 0.2, 0.5, 0.11, 0.3, labels=[0, 0, 0, 0, 1]),
             [0.3, 0.3 * 0.5 / 1.5], [1, 0, 1, 0, 1]),
            (detections(0.2, 0.25, 0.29, labels=[0, 0, 1]), [0.3, 0.3], [0, 0, 0])):  # none is sure
        selected, theta = alqa.select({"v": d}, 0.1, "frequency", 0.3, "video")
        assert theta == pytest.approx(expected) and selected["v"]["positive"].tolist() == positive
    assert alqa.frequency_thresholds([], 0.3) == []


def test_label_smoothing_moves_the_targets_of_the_plain_detector_alone():
    out = small_detector(alqa="none")(torch.randn(1, 16, 6), torch.ones(1, 16, dtype=torch.bool))
    cls, off = model.assign_targets(out.points, [tensor([[2.0, 9.0]])], [tensor([1])], 3, 1.5)
    smoothed, plain = (alqa.plain_losses(out, cls, off, out.mask, train.Settings(
        alqa="none", label_smoothing=share))["cls"] for share in (0.1, 0.0))
    target = cls[out.mask] * 0.9 + 0.1 / 4
    expected = alqa.focal_loss(out.cls_logits[out.mask], target, 0.25, 2.0).sum()
    assert allclose(smoothed, expected) and not allclose(plain, expected)


def test_voting_averages_neighbours_by_score_and_overlap():
    segments, scores = tensor([[0.0, 10.0], [0.0, 9.0], [50.0, 60.0]]), tensor([0.8, 0.4, 0.5])
    voted = model.vote(segments[[0, 2]], segments, scores, 0.8)
    end = (0.8 * 10 + 0.4 * 0.9 * 9) / (0.8 + 0.4 * 0.9)
    assert allclose(voted, tensor([[0.0, end], [50.0, 60.0]]))
    assert torch.equal(model.vote(segments, segments, scores, 1.0), segments)
    assert model.vote(segments[:0], segments[:0], scores[:0], 0.9).shape == (0, 2)


def test_repeats_are_removed_within_their_class_and_scores_lowered_that_are_spread():
    segments = tensor([[0.0, 9.0], [0.0, 10.0], [0.0, 10.0], [8.0, 20.0], [0.0, 8.0]])
    d = detections(0.5, 0.9, 0.4, 0.3, 0.2, labels=[0, 0, 1, 0, 0]) | {"segments": segments}
    nothing = data.take(d, slice(0))
    for overlap, exclusive, left in ((0.5, False, [0.9, 0.4, 0.3]), (0.5, True, [0.9, 0.3]),
                                     (1.0, True, [0.9, 0.5, 0.4, 0.3, 0.2])):
        found = alqa.without_repeats(d, overlap, exclusive)["scores"].tolist()
        assert found == pytest.approx(left), (overlap, exclusive)
        assert len(alqa.without_repeats(nothing, overlap, exclusive)["scores"]) == 0
    segments = tensor([[0.0, 10.0], [0.0, 14.0], [50.0, 60.0], [0.0, 10.0]])
    d = detections(0.5, 0.5, 0.8, 0.4, labels=[0, 0, 0, 1]) | {"segments": segments}
    expected = [0.5 * math.exp(-2 / 10), 0.5 * math.exp(-2 / 14), 0.8, 0.4]
    assert alqa.rerank(d, 0.5)["scores"].tolist() == pytest.approx(expected, rel=1e-4)
    assert len(alqa.rerank(nothing, 0.5)["scores"]) == 0


def test_each_level_has_its_own_best_pairs():
    scores = tensor([[.9, .8], [.7, .1], [.2, .6], [.3, .4], [.05, .01], [.02, .03]])
    points, labels = evaluate.best_pairs(scores, [4, 2], 3)
    assert [points.tolist(), labels.tolist()] == [[0, 0, 1, 4, 5, 5], [0, 1, 0, 0, 1, 0]]
    points, _ = evaluate.best_pairs(scores, [4, 2], 100)
    assert sorted(points.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_a_window_clips_half_the_frames_of_a_feature_outside_and_the_whole_video_nothing():
    video = SimpleNamespace(steps=100, grid=data.Grid(25.0, 4.0, 16.0))
    segments = tensor([[-3.0, 30.0], [15.0, 19.0], [90.0, 104.0], [110.0, 120.0]])
    clipped, inside = data.crop_segments(segments, video, 20, 80, 0.5)
    assert clipped.tolist() == [[-2.0, 10.0], [-2.0, -1.0], [70.0, 82.0], [82.0, 82.0]]
    assert inside.tolist() == [False, False, True, False]
    whole, inside = data.crop_segments(segments, video, 0, 100, 0.5)
    assert torch.equal(whole, segments) and inside.tolist() == [True, True, True, False]


@pytest.mark.parametrize("noise", ["input_dropout", "input_jitter"])
def test_noise_of_the_input_acts_in_training_alone(noise):
    for training in (False, True):
        detector = small_detector(**{noise: 0.5}, drop_path=0.0).train(training)
        feats, mask = torch.randn(1, 16, 6), torch.ones(1, 16, dtype=torch.bool)
        assert torch.equal(*(detector(feats, mask).cls_logits for _ in range(2))) != training


@torch.no_grad()
def test_many_passes_are_the_mean_of_looks_with_noise_and_leave_the_rest_alone():
    detector = small_detector(input_dropout=0.3, input_jitter=0.5).eval()
    feats, mask = torch.randn(2, 16, 6), torch.ones(2, 16, dtype=torch.bool)
    plain, passes = detector(feats, mask), inputs.Passes(detector, 4)
    before = torch.get_rng_state()
    found = [passes(feats, mask) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before) and not detector.input.training
    detector.input.train()
    each = [detector(feats, mask).predictions() for _ in range(4)]
    for one, again, looks, alone in zip(*(out.predictions() for out in found), zip(*each),
                                        plain.predictions()):
        assert torch.equal(one, again) and allclose(one, torch.stack(looks).mean(0), atol=1e-6)
        assert not allclose(one, alone, atol=1e-3)
    assert torch.equal(found[0].mask, plain.mask)
    quiet = small_detector()
    quiet.register_forward_hook(lambda *_: looked.append(1))
    looked = []
    outputs = (network(feats, mask) for network in (inputs.Passes(quiet, 2), quiet))
    assert allclose(*(out.cls_logits for out in outputs))
    assert len(looked) == 2  # without noise one look is enough


def test_the_input_draws_as_much_for_short_videos_as_for_long_ones():
    noise = small_detector(input_dropout=0.5, input_jitter=0.5).input.train()
    kept = set()
    for T in (3, 40):
        torch.manual_seed(0)
        seen = noise(torch.ones(2, T, 6), torch.ones(2, T).bool())
        kept.add(float(torch.rand(())))
        assert 0 < (seen == 0).sum() < seen.numel()
    assert len(kept) == 1  # so processes with videos of other lengths stay in step


def test_jitter_scales_and_moves_each_channel_of_a_video_as_a_whole():
    levels = torch.arange(3.0)[:, None].expand(40, 3, 50)
    b, of_1, of_2 = inputs.jittered(levels, 0.3).unbind(1)  # (40, 50) each
    a = of_1 - b - 1
    assert torch.allclose(of_2, 2 * (1 + a) + b, atol=1e-6)  # the same at all steps
    for draws in (a, b):
        assert -0.3 <= draws.min() < -0.29 and 0.29 < draws.max() < 0.3
        assert draws.mean().abs() < 0.02 and len(draws.unique()) > 1900
    assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs() < 0.1


def test_a_video_seen_over_itself_has_no_level_or_strength_and_small_noise_stays_small():
    x = torch.randn(2, 30, 4)
    x[..., 3] *= 0.001
    mask = torch.arange(30) < torch.tensor([[30], [20]])
    own = inputs.over_itself(x * mask[..., None], mask)
    part = own[1, :20]
    assert allclose(part.mean(0), torch.zeros(4), atol=1e-5)
    assert allclose(part[:, :3].std(0, correction=0), torch.ones(3), atol=1e-4)
    assert part[:, 3].abs().max() < 0.1
    moved = torch.cat([3 * x[..., :3] - 7, x[..., 3:]], 2)
    moved[1, 20:] = 1e6  # padding
    assert allclose(inputs.over_itself(moved, mask)[mask], own[mask], atol=1e-4)


@pytest.mark.parametrize("view", inputs.VIEWS)
def test_what_is_seen_of_the_features(view):
    detector = small_detector(input_view=view)
    x, mask = torch.randn(1, 30, 6), torch.ones(1, 30, dtype=torch.bool)
    width, seen = detector.input.width, detector.input(x, mask)
    assert seen.shape == (1, 30, width) and width == (12 if view == "both" else 6)
    assert torch.equal(seen[..., :6], x) != (view == "own")
    scores = [detector(y, mask).cls_logits for y in (x, 2 * x + 1)]
    assert allclose(*scores, atol=1e-4) == (view == "own")


def test_exclusive_drops_second_classes_only_where_the_labels_have_none(own):
    argv = own_argv(own, "--theta-l", 0.0, "--min-score", 0.0, "--pre-nms", 200)
    labelled = data.training_data(settings(*argv)).labelled[0].id

    def overlapping(option):
        """Whether pseudo labels or candidates of two classes of a video have a tIoU over 0.5."""
        records = train.detect_unlabelled(train.launch(settings(*argv, option)))
        return alqa.classes_share_segments([SimpleNamespace(**r) for r in records.values()], 0.5)

    assert overlapping("--no-exclusive") and not overlapping("--exclusive")
    actions([labelled], 1, segment=[2.0, 8.0])(own)  # the first's, which is of the other class
    assert overlapping("--exclusive")
    quick = ("--stage", "supervised", "--acp", "none", "--supervised-epochs", 1, "--repeat", 1)
    assert train.main(own_argv(own, *quick)) == 0  # without repeats no tIoU is over the setting
    assert not evaluate.Localizer(own / "run").trust["exclusive"]
    # A repeat within one class, and one of another.
    apart, shared = (SimpleNamespace(segments=tensor([[0.0, 10], [8, 20], last]),
                                     labels=tensor([0, 1, 0])) for last in ([0, 9], [9, 20]))
    found = [alqa.classes_share_segments(videos, 0.5) for videos in ([], [apart], [apart, shared])]
    assert found == [False, False, True]

def test_relative_similarity_is_the_own_class_less_the_best_other_on_any_device():
    D = icd.Discriminator(4, 16, 0.5).eval()
    bank = {"feats": torch.randn(6, 4), "labels": tensor([0, 0, 1, 1, 2, 2]),
            "keys": torch.arange(6)}
    feats, labels = torch.randn(4, 4), tensor([0, 1, 2, 3])  # no labelled instance of class 3
    s = icd.own_minus_other(D, feats, labels, bank)
    for i in range(3):
        of_class = icd.similarity(D, feats[[i] * 3], labels[:3], bank).tolist()
        own = of_class.pop(i)
        assert float(s[i]) == pytest.approx(own - max(of_class), abs=1e-6)
    assert s[3].isnan()
    few = {key: value[:3] for key, value in bank.items()}  # one of class 1
    assert icd.own_minus_other(D, feats, labels, few).isnan().tolist() == [False] * 2 + [True] * 2
    one = {key: value[:2] for key, value in bank.items()}
    assert icd.own_minus_other(D, feats, labels * 0, one).isnan().all()
    steps = torch.arange(50.0)[:, None].expand(50, 2)  # a segment a step
    x = icd.features_of(torch.randn(50, 4) * 7 + 3, steps, "max", "relative")
    assert allclose(x.mean(0), torch.zeros(4), atol=1e-5)
    assert allclose(x.std(0, correction=0), torch.ones(4), atol=1e-5)
    # The labels of records lie on the CPU; "meta" is another device that every machine has.
    D, bank["feats"] = D.to("meta"), bank["feats"].to("meta")
    for similarity in (icd.similarity, icd.own_minus_other):
        s = similarity(D, feats[:3].to("meta"), tensor([0, 1, 3]), bank)
        assert (s.device.type, len(s)) == ("meta", 3), similarity

def test_settings_that_do_not_fit_are_refused(capsys):
    refused(["--check", "--icd-score", "absolute"], capsys, "theta_drop, -0.2", "--theta-drop 0.3")
    refused(["--check", "--beta", "0.9"], capsys, "beta", "at least 1", "0.9")
    assert settings("--icd-score", "absolute", "--theta-drop", 0.3).theta_drop == 0.3


# Each key of the public ActionFormer's yaml files, or of its defaults where a file leaves it out,
# under our name: crop_keep is its trunc_thresh, crop_min crop_ratio, max_steps max_seq_len (resize
# with force_upsampling), channels embd_dim, fpn_dim and head_dim, windows n_mha_win_size, position
# use_abs_pe, t_plus init_loss_norm, lambda_reg loss_weight, min_length duration_thresh,
# nms_agnostic not multiclass_nms, vote voting_thresh. Epochs count the warm-up in.
ALIKE = {
    "crop_min": 0.9, "max_steps": 2304, "heads": 4, "stem": 2, "drop_path": 0.1, "clip": 1,
    "radius": 1.5, "min_score": 0.001, "weight_decay": 1e-4}  # the last is the paper's; 0.05 there
WIDER = "0:4,4:8,8:16,16:32,32:64,64:inf"
PUBLIC = {  # of THUMOS14, of ActivityNet and of the verbs of EPIC-KITCHENS
    "root": ("thumos", "anet_1.3", "epic_kitchens"), "prefix": ("", "v_", ""),
    "train_subset": ("validation", "training", "training"), "extension": (".npy", ".npy", ".npz"),
    "test_subset": ("test", "validation", "validation"), "resize": (0, 192, 0),
    "stride": (4, 16, 16), "frames": (16, 16, 32), "fps": (0, 25, 30), "batch": (2, 16, 2),
    "channels": (512, 256, 512), "windows": ("19", "7,7,7,7,7,0", "9"), "lambda_reg": (1, 2, 1),
    "position": (False, True, False), "lr": (1e-4, 1e-3, 1e-4), "supervised_epochs": (35, 15, 21),
    "t_plus": (100, 200, 250), "label_smoothing": (0, 0.1, 0), "pre_nms": (2000, 2000, 5000),
    "max_detections": (200, 100, 2000), "nms_sigma": (0.5, 0.75, 0.4), "crop_keep": (0.5, 0.5, 0.3),
    "min_length": (0.05, 0.001, 0.05), "tiou": ("0.3:0.7:0.1", "0.5:0.95:0.05", "0.1:0.5:0.1"),
    "ranges": (WIDER, WIDER, "0:4,2:8,4:16,8:32,16:64,32:inf"),
    # THUMOS14: True and 0.7 there, where external scores name the classes; ours: the detector.
    "nms_agnostic": (False, True, False), "vote": (0, 0.9, 0)}


@pytest.mark.parametrize(("name", "column", "more"), [
    ("thumos", 0, {}), ("activitynet", 1, {"scope": "dataset"}), ("epic-verb", 2, {}),
    ("epic-noun", 2, {"label_smoothing": 0.1})])
def test_presets_are_those_of_the_public_files(name, column, more):
    s = settings("--dataset", name)
    public = ALIKE | {key: values[column] for key, values in PUBLIC.items()} | more
    ours = {key: getattr(s, key) for key in public}
    assert ours | {"root": Path(s.root).name} == public
    assert round(s.supervised_epochs * s.warmup) == 5
    assert settings("--dataset", name, "--lr", 0.5).lr == 0.5
    for dataset in (name, "toy", "x.json"):
        detector = model.Detector(8, 2, settings("--dataset", dataset))
        assert detector.ranges.shape == (6, 2)


def test_paper_takes_back_what_toy_and_own_data_change_of_the_method():
    own, paper = settings("--dataset", "own.json"), settings("--dataset", "own.json", "--paper")
    changed = {f.name for f in fields(paper) if getattr(paper, f.name) != getattr(own, f.name)}
    assert changed == set(data.PAPER)
    published = train.Settings(repeat=1.0)  # 1: no removal of repeats, which is ours
    assert all(getattr(paper, name) == getattr(published, name) for name in changed)
    assert settings("--paper", "--icd-pool", "mean").icd_pool == "mean"
    assert settings("--dataset", "activitynet", "--paper").scope == "dataset"


@pytest.mark.parametrize(("words", "told"), [
    ("--acp none --acp-tau 0.2", "without effect: --acp-tau, read where --acp is coarse"),
    ("--acp coarse --acp-tau 0.2", ""),
    ("--threshold mean --theta-fixed 0.5", "without effect: --theta-fixed"),
    ("--icd eap --theta-mine 0.5", "without effect: --theta-mine"),
    ("--alqa none --beta 3 --eps 0.1", "without effect: --beta and --eps"),
    ("--label-smoothing 0.1", "without effect: --label-smoothing"),
    ("--vote 0.9", "without effect: --vote, read where --nms-agnostic is True"),
    ("--vote 0.9 --nms-agnostic", ""),
    ("--alqa none --acp none --icd none --threshold fixed", "")])
def test_settings_that_others_leave_unread_are_told(words, told, capsys):
    settings(*words.split())
    assert told in capsys.readouterr().err if told else capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", [train.Settings, spot.Settings, mean_teacher.Settings])
def test_what_is_read_with_another_setting_exists(kind):
    names = {f.name for f in fields(kind)}
    for condition, idle in kind.READ_WITH.items():
        assert names >= {condition.split()[0], *idle.split()}
