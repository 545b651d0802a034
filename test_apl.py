"""Tests of the paper's equations, and of the reference outputs of the public tools.

What else is tested lies in tests/: our own rules, data, evaluation, runs, bad input, the extras,
the form of the project. Tests against ../shared are skipped where it is absent.
"""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import acp
import alqa
import data
import evaluate
import icd
import model
import train
from extras import tables
from tests import conftest
from tests.helpers import (
    SHARED,
    detections,
    generator,
    needs_shared,
    read_result,
    settings,
    small_detector,
    states,
)

# Fixtures.
seeded = conftest.seeded
tiny = conftest.tiny
NO_SEGMENT = torch.zeros(0, 2)
NO_LABEL = torch.zeros(0, dtype=torch.long)


# ---- Reference outputs of the public tools ------------------------------------------------------

def test_public_checkpoint_gives_the_public_outputs(tiny):
    out, _, ref = tiny
    assert len(out.levels) == 4
    start = 0
    for level in range(4):
        T = ref[f"mask_{level}"].shape[-1]
        mask = ref[f"mask_{level}"][:, 0]
        assert torch.equal(out.masks[level], mask)
        rows = slice(start, start + T)
        found = {
            "fpn": out.levels[level],
            "cls_logits": out.cls_logits[:, rows],
            "offsets": out.offsets[:, rows],
        }
        for name, mine in found.items():
            theirs = ref[f"{name}_{level}"].transpose(1, 2)
            assert torch.allclose(mine[mask], theirs[mask], rtol=0, atol=1e-5), (name, level)
        time, stride, low, high = out.points
        points = torch.stack([time, low, high, stride], 1)[rows]
        assert torch.equal(points, ref[f"points_{level}"])
        start += T


def test_public_checkpoint_gives_the_public_targets_and_losses(tiny):
    out, config, ref = tiny
    segments = [torch.tensor(part) for part in config["segments"]]
    labels = [torch.tensor(part) for part in config["labels"]]
    cls_target, offset_target = model.assign_targets(
        out.points, segments, labels, config["num_classes"], 1.5)
    positive = ref["gt_cls"].any(-1)
    assert torch.equal(cls_target, ref["gt_cls"])
    mine, theirs = offset_target[positive], ref["gt_offsets"][positive]
    assert torch.allclose(mine, theirs, rtol=0, atol=1e-5)
    losses = alqa.plain_losses(
        out, cls_target, offset_target, out.mask, train.Settings(alqa="none"))
    t_plus = 0.9 * float(ref["init_loss_norm"]) + 0.1 * max(int(losses["positives"]), 1)
    for name in ("cls", "reg"):
        mine, theirs = float(losses[name].detach()) / t_plus, float(ref[f"{name}_loss"])
        assert mine == pytest.approx(theirs, abs=1e-5)


@needs_shared
def test_diou_and_focal_loss_match_the_public_ones():
    arrays = np.load(SHARED / "reference/losses.npz")
    ref = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    L_diou = alqa.diou_loss(ref["pred_offsets"], ref["gt_offsets"])
    assert torch.allclose(L_diou, ref["diou_loss"], rtol=0, atol=1e-6)
    s = train.Settings()
    focal = alqa.focal_loss(ref["logits"], ref["targets"], s.focal_alpha, s.focal_gamma)
    assert torch.allclose(focal, ref["focal"], rtol=0, atol=1e-6)


@needs_shared
@pytest.mark.parametrize("case", range(6))
def test_soft_nms_matches_the_public_one(case):
    arrays = np.load(SHARED / "reference/soft_nms.npz")
    ref = {name[2:]: arrays[name] for name in arrays.files if name.startswith(f"{case}_")}
    segments, scores, labels = (
        torch.from_numpy(ref[name]) for name in ("segments", "scores", "labels"))
    number = int(ref["max_num"])
    index, decayed = model.soft_nms(
        segments, scores, labels, float(ref["sigma"]), float(ref["min_score"]), number)
    index, decayed = index[:number], decayed[:number]
    out_segments, out_scores = (
        torch.from_numpy(ref[name]) for name in ("out_segments", "out_scores"))
    assert torch.equal(labels[index], torch.from_numpy(ref["out_labels"]))
    assert torch.allclose(segments[index], out_segments, rtol=0, atol=1e-5)
    assert torch.allclose(decayed, out_scores, rtol=0, atol=1e-5)


def thumos_predictions():
    """The detections of the public ActionFormer on THUMOS14, by video."""
    arrays = np.load(SHARED / "reference/actionformer_thumos14_detections.npz")
    columns = (arrays[key].tolist() for key in ("video_id", "label", "start", "end", "score"))
    found = {}
    for video, label, start, end, score in zip(*columns):
        detection = {"label": label, "score": score, "segment": [start, end]}
        found.setdefault(video, []).append(detection)
    return found


@needs_shared
@pytest.mark.parametrize("name", ["actionformer_thumos14", "map_thumos14"])
def test_map_matches_the_activitynet_toolkit(name):
    expected = read_result(SHARED / f"reference/{name}_expected.json")
    annotations = data.read_annotations(SHARED / "data/thumos14/thumos14.json")
    truth = {video: a for video, a in annotations.items() if a.subset == "Test"}
    if name == "actionformer_thumos14":
        found = thumos_predictions()
    else:
        found = data.read_predictions(SHARED / "reference/map_thumos14_predictions.json")
    metrics = evaluate.mean_average_precision(truth, found, expected["tious"])
    mine = np.array([metrics["ap"][label] for label in expected["labels"]]).T
    assert np.abs(mine - np.array(expected["ap"])).max() < 1e-9
    assert metrics["average_mAP"] == pytest.approx(expected["average_mAP"], abs=1e-9)
    assert (metrics["videos"], metrics["instances"]) == (212, 3358)


def test_complexity_table_is_the_papers(capsys):
    tables.complexity_table()
    table = capsys.readouterr().out
    for quoted in ("26.017 M, 30.608 G", "3.179 M, 14.422 G", "3.182 M, 14.436 G"):
        assert quoted in table
        table = table.replace(quoted, "")
    figures = ("26,016,768", "3,179,542", "3,182,616", "524,545", "30.608", "14.422", "14.436")
    for figure in figures:
        assert figure in table


# ---- model.py: segments and layers --------------------------------------------------------------

def test_tiou_and_tnd_by_hand():
    a = torch.tensor([[0.0, 4.0]])
    b = torch.tensor([[2.0, 6.0], [10.0, 12.0], [0.0, 4.0], [1.0, 1.0]])
    assert torch.allclose(model.tiou(a, b), torch.tensor([2 / 6, 0, 1, 0]))
    assert torch.allclose(model.tnd(a, b), torch.tensor([4 / 36, 81 / 144, 0, 1 / 16]))
    assert model.tiou(torch.zeros(2), torch.zeros(2)) == 0


def test_tiou_of_arrays_is_that_of_tensors():
    a = torch.rand(50, 1, 2).cumsum(-1)
    b = torch.rand(1, 60, 2).cumsum(-1)
    assert np.allclose(model.tiou(a.numpy(), b.numpy()), model.tiou(a, b).numpy())


def test_segments_that_share_a_point_have_tnd_of_a_quarter_at_most():
    p = 10 * torch.rand(1000, 2)
    q = 10 * torch.rand(1000, 2)
    _, tND = alqa.tiou_and_tnd(p, q)
    assert tND.max() <= 0.25
    assert alqa.diou_loss(p, q).min() >= 0


def test_convolutions_match_torch():
    x = torch.randn(2, 11, 4)
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[1, 9:] = False
    conv = model.Conv(4, 5)
    conv.bias.data.normal_()
    x.requires_grad_()
    mine = conv(x, mask)
    theirs = F.conv1d(x.transpose(1, 2), conv.weight.permute(1, 2, 0), conv.bias, padding=1)
    theirs = theirs.transpose(1, 2) * mask[..., None]
    assert torch.allclose(mine, theirs, atol=1e-6)
    wanted = torch.randn(2, 11, 5)
    leaves = [x, conv.weight, conv.bias]
    mine = torch.autograd.grad((mine * wanted).sum(), leaves)
    theirs = torch.autograd.grad((theirs * wanted).sum(), leaves)
    for a, b in zip(mine, theirs):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_convolutions_match_torch(stride):
    x = torch.randn(2, 11, 4)
    conv = model.DepthwiseConv(4)
    weight = conv.weight.T[:, None]
    theirs = F.conv1d(x.transpose(1, 2), weight, groups=4, padding=1, stride=stride)
    mine = conv(model.shifted(x, stride))
    assert torch.allclose(mine, theirs.transpose(1, 2), atol=1e-6)


@pytest.mark.parametrize(("T", "half"), [(1, 3), (7, 2), (40, 4), (64, 9), (33, 100)])
def test_local_attention_equals_dense_attention_with_a_band(T, half):
    q, k, v = torch.randn(3, 2, T, 8)
    mask = torch.ones(2, T, dtype=torch.bool)
    mask[1, T // 2 + 1:] = False

    def by_head(x):
        return x.view(2, T, 2, 4).transpose(1, 2)

    gap = (torch.arange(T)[:, None] - torch.arange(T)).abs()
    seen = ((gap <= half) & mask[:, None, None]) | (gap == 0)
    logits = by_head(q) @ by_head(k).transpose(2, 3) / 2
    dense = logits.masked_fill(~seen, -torch.inf).softmax(-1) @ by_head(v)
    dense = dense.transpose(1, 2).reshape(2, T, 8)
    assert torch.allclose(model.local_attention(q, k, v, mask, 2, half), dense, atol=1e-5)


@pytest.mark.parametrize("position", [False, True])
def test_padding_changes_no_valid_output(position):
    detector = small_detector(position=position)
    for p in detector.parameters():  # trained weights: every bias counts
        p.data.add_(0.2 * torch.randn_like(p))
    feats = torch.randn(3, 37, 6)
    lengths = [37, 32, 1]
    mask = torch.arange(37) < torch.tensor(lengths)[:, None]
    together = detector(feats, mask)
    for b, T in enumerate(lengths):
        alone = detector(feats[b:b + 1, :T], torch.ones(1, T, dtype=torch.bool))
        rows = together.mask[b]
        assert alone.mask.all()
        assert rows.sum() == alone.mask.shape[1] == sum(-(-T // 2 ** level) for level in range(3))
        for name in ("cls_logits", "offsets", "p_tiou", "p_tnd"):
            mine, theirs = getattr(together, name)[b][rows], getattr(alone, name)[0]
            assert torch.allclose(mine, theirs, atol=1e-5), name


def test_quality_branches_start_apart_so_that_the_joint_score_has_a_gradient():
    out = small_detector()(torch.randn(2, 20, 6), torch.ones(2, 20, dtype=torch.bool))
    assert (out.p_tiou - out.p_tnd).min() > 0.1
    plain = small_detector(alqa="none")(torch.randn(1, 8, 6), torch.ones(1, 8, dtype=torch.bool))
    assert (plain.p_tiou == 1).all()
    assert (plain.p_tnd == 0).all()
    assert "quality.tnd.weight" not in dict(small_detector(alqa="diou").named_parameters())


def test_offsets_start_positive_so_that_neither_side_dies():
    detector = small_detector(offset_bias=1.0)
    outputs = detector(0.1 * torch.randn(2, 40, 6), torch.ones(2, 40, dtype=torch.bool))
    assert (outputs.offsets > 0).float().mean((0, 1)).min() > 0.9


def test_windows_and_ranges_must_agree():
    with pytest.raises(data.BadInput, match="2 windows for 3 regression ranges"):
        model.DetectorSettings(windows="5,5", ranges="0:4,4:8,8:inf")


# ---- model.py: targets and suppression ----------------------------------------------------------

def assign_by_hand(points, segments, labels, num_classes, radius):
    """The target assignment, point by point."""
    cls = torch.zeros(len(points.time), num_classes)
    off = torch.zeros(len(points.time), 2)
    for p, (t, stride, low, high) in enumerate(zip(*(part.tolist() for part in points))):
        positive = []
        for n, (start, end) in enumerate(segments.tolist()):
            middle = (start + end) / 2
            first = max(middle - radius * stride, start)
            last = min(middle + radius * stride, end)
            if first < t < last and low <= max(t - start, end - t) <= high:
                positive.append((end - start, n))
        for length, n in positive:
            if length <= min(positive)[0] + 1e-3:
                cls[p, labels[n]] = 1
        if positive:
            start, end = segments[min(positive)[1]].tolist()
            off[p] = torch.tensor([t - start, end - t]) / stride
    return cls, off


def test_target_assignment_against_a_loop_with_a_twice_labelled_segment():
    rng = np.random.default_rng(0)
    points = small_detector().points(50)
    start = rng.uniform(0, 40, 8)
    end = start + rng.uniform(0.5, 20, 8)
    segments = torch.tensor(np.stack([start, end], 1), dtype=torch.float32)
    segments = torch.cat([segments, segments[:1]])  # the same segment with another class
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2])
    cls, off = model.assign_targets(points, [segments, NO_SEGMENT], [labels, NO_LABEL], 3, 1.5)
    cls_by_hand, off_by_hand = assign_by_hand(points, segments, labels, 3, 1.5)
    positive = cls[0].any(-1)
    assert torch.equal(cls[0], cls_by_hand)
    assert torch.allclose(off[0][positive], off_by_hand[positive], atol=1e-5)
    assert (cls[0].sum(-1) == 2).any()  # the twice labelled one
    assert not cls[1].any()
    decoded = model.decode(points, off)[0][positive]
    assert (torch.cdist(decoded, segments).min(1).values < 1e-3).all()


def test_assignment_of_a_batch_without_any_segment():
    points = small_detector().points(9)
    cls, off = model.assign_targets(points, [NO_SEGMENT] * 2, [NO_LABEL] * 2, 3, 1.5)
    assert cls.shape == (2, 9 + 5 + 3, 3)
    assert not cls.any()
    assert not off.any()


def test_soft_nms_against_a_loop():
    rng = np.random.default_rng(1)
    start = rng.uniform(0, 20, 60)
    segments = torch.tensor(np.stack([start, start + rng.uniform(1, 6, 60)], 1))
    scores = torch.tensor(rng.uniform(0.1, 1, 60))
    groups = torch.tensor(rng.integers(0, 4, 60)) * 7
    index, decayed = model.soft_nms(segments, scores, groups, 0.5, 0.2, 10)
    expected = []
    for g in groups.unique():
        left = {i: float(scores[i]) for i in (groups == g).nonzero()[:, 0].tolist()}
        for _ in range(10):
            if not left or max(left.values()) < 0.2:
                break
            best = max(left, key=left.get)
            expected.append((left.pop(best), best))
            for i in left:
                left[i] *= math.exp(-float(model.tiou(segments[best], segments[i])) ** 2 / 0.5)
    expected.sort(reverse=True)
    assert index.tolist() == [i for _, i in expected]
    expected = torch.tensor([score for score, _ in expected], dtype=decayed.dtype)
    assert torch.allclose(decayed, expected)


def test_soft_nms_gives_each_detection_once_even_where_scores_vanish():
    segments = torch.tensor([[0.0, 10.0]]).expand(120, 2)
    groups = torch.zeros(120, dtype=torch.long)
    index, decayed = model.soft_nms(segments, torch.rand(120), groups, 0.5, 0.0, 200)
    assert len(index.unique()) == len(index)
    assert decayed.min() > 0


def test_soft_nms_of_nothing():
    for scores in (torch.zeros(0), torch.tensor([0.0001])):
        n = len(scores)
        groups = torch.zeros(n, dtype=torch.long)
        index, decayed = model.soft_nms(torch.zeros(n, 2), scores, groups, 0.5, 0.001, 5)
        assert len(index) == len(decayed) == 0


# ---- alqa.py: the losses ------------------------------------------------------------------------

def test_classification_loss_has_its_minimum_at_the_soft_label_and_focal_loss_has_not():
    p = torch.linspace(0.01, 0.99, 99)
    certain = (torch.ones(99), torch.zeros(99))
    for y in (0.12, 0.3, 0.9):
        Y = torch.full((99, 1), y)
        loss = alqa.classification_loss(torch.logit(p)[:, None], *certain, Y, 2.0, 1e-6)
        assert abs(float(p[loss.argmin()]) - y) < 0.011
        focal = alqa.focal_loss(torch.logit(p), Y[:, 0], 0.25, 2.0)
        assert abs(float(p[focal.argmin()]) - y) > 0.08


def test_joint_score_clamps_a_negative_reliability():
    p_cls = torch.tensor([[0.5, 0.2]])
    P = alqa.joint_score(p_cls, torch.tensor([0.1]), torch.tensor([0.4]), 1e-6)
    assert torch.allclose(P, torch.tensor([[0.5e-6, 0.2e-6]]))
    P = alqa.joint_score(p_cls[:, :1], torch.tensor([0.9]), torch.tensor([0.1]), 1e-6)
    assert torch.allclose(P, torch.tensor([[0.4]]))


@pytest.mark.parametrize("branches", model.BRANCHES)
@pytest.mark.parametrize("form", ["bce", "kl"])
def test_losses_are_finite_with_and_without_positives(branches, form):
    s = settings("--alqa", branches, "--quality-form", form)
    losses_of = alqa.plain_losses if branches == "none" else alqa.alqa_losses
    detector = small_detector(alqa=branches).train()
    out = detector(torch.randn(2, 16, 6), torch.ones(2, 16, dtype=torch.bool))
    some = (torch.tensor([[2.0, 9.0]]), torch.tensor([1]))
    for segments, labels in (some, (NO_SEGMENT, NO_LABEL)):
        cls, off = model.assign_targets(out.points, [segments] * 2, [labels] * 2, 3, 1.5)
        losses = losses_of(out, cls, off, out.mask, s)
        total = losses["cls"] + losses["reg"] + losses["quality"]
        gradients = torch.autograd.grad(
            total, list(detector.parameters()), allow_unused=True, retain_graph=True)
        assert all(g.isfinite().all() for g in gradients if g is not None)
        assert (losses["positives"] > 0) == (len(labels) > 0)
        assert (losses["quality"] > 0) == (len(labels) > 0 and branches != "none")


@pytest.mark.parametrize("form", ["bce", "kl"])
def test_quality_loss_is_least_at_the_target(form):
    p = torch.linspace(0.01, 0.99, 99)
    zero = torch.zeros(99)
    tIoU = torch.full((99,), 0.7)
    loss = alqa.quality_loss(p, zero, tIoU, zero, "tiou", form)
    assert float(p[loss.argmin()]) == pytest.approx(0.7, abs=0.011)
    loss = alqa.quality_loss(p, zero, tIoU, torch.full((99,), 0.2), "diou", form)
    assert float(p[loss.argmin()]) == pytest.approx(0.5, abs=0.011)


def test_kl_is_another_loss_than_bce():
    p = torch.tensor([0.2], requires_grad=True)
    zero = torch.zeros(1)
    gradients = []
    for form in ("bce", "kl"):
        loss = alqa.quality_loss(p, zero, torch.tensor([0.7]), zero, "tiou", form)
        gradients.append(torch.autograd.grad(loss.sum(), p)[0])
    assert not torch.allclose(*gradients, rtol=0.1)


@pytest.mark.parametrize("source", alqa.SOFT_LABELS)
def test_quality_targets_and_soft_labels_carry_no_gradient(source):
    s = settings("--soft-label", source)
    out = small_detector().train()(torch.randn(1, 16, 6), torch.ones(1, 16, dtype=torch.bool))
    leaves = {}
    for name in ("offsets", "cls_logits", "p_tiou", "p_tnd"):
        leaves[name] = getattr(out, name).detach().requires_grad_()
    out = out._replace(**leaves)
    segments, labels = [torch.tensor([[2.0, 9.0]])], [torch.tensor([1])]
    cls, off = model.assign_targets(out.points, segments, labels, 3, 1.5)
    losses = alqa.alqa_losses(out, cls, off, out.mask, s)

    def gradients(loss, *names):
        inputs = [leaves[name] for name in names]
        return torch.autograd.grad(loss, inputs, allow_unused=True, retain_graph=True)

    assert gradients(losses["cls"] + losses["quality"], "offsets") == (None,)
    assert gradients(losses["reg"], "offsets")[0].abs().sum() > 0
    positive = cls.any(-1)
    label_of = (out.p_tiou[positive], out.p_tnd[positive])
    if source == "computed":
        label_of = alqa.tiou_and_tnd(out.offsets[positive], off[positive])
    Y = torch.zeros_like(cls)
    Y[positive] = alqa.soft_label(cls[positive], *label_of, "tiou+tnd", s.eps).detach()
    L_cls = alqa.classification_loss(
        out.cls_logits, out.p_tiou, out.p_tnd, Y, s.beta, s.eps)[out.mask].sum()
    names = ("cls_logits", "p_tiou", "p_tnd")
    for mine, theirs in zip(gradients(losses["cls"], *names), gradients(L_cls, *names)):
        assert torch.allclose(mine, theirs, atol=1e-6)
        assert mine.abs().sum() > 0


# ---- alqa.py: selection -------------------------------------------------------------------------

def test_theta_h_is_equation_6():
    scores = torch.tensor([0.9, 0.5])
    assert float(alqa.theta_h(scores, 1)) == pytest.approx(0.7 + 0.2)  # the population std
    assert float(alqa.theta_h(scores, 0)) == pytest.approx(0.7)
    assert float(alqa.theta_h(scores, -1)) == pytest.approx(0.7 - 0.2)


def test_selection_keeps_scores_of_mean_plus_std():
    videos = {"a": detections(0.9, 0.5, 0.1), "b": detections(0.3, 0.2), "empty": detections()}
    selected, theta = alqa.select(videos, 0.15, "mean+std", 0.3, "video")
    assert selected["a"]["scores"].tolist() == pytest.approx([0.9, 0.5])  # theta_l dropped 0.1
    assert selected["a"]["positive"].tolist() == [True, False]  # 0.7 + 0.2 reaches 0.9
    assert selected["b"]["positive"].tolist() == [True, False]
    assert theta == pytest.approx([0.9, 0.3])
    assert len(selected["empty"]["positive"]) == 0
    assert all(r.keys() == {"scores", "labels"} for r in videos.values())  # the input stays


def test_selection_scopes_and_thresholds():
    a = detections(0.9, 0.5, labels=[0, 1])
    b = detections(0.3, 0.2, labels=[0, 1])

    def pick(threshold, scope):
        selected, _ = alqa.select({"a": a, "b": b}, 0.15, threshold, 0.3, scope)
        return [r["positive"].tolist() for r in selected.values()]

    assert pick("mean+std", "dataset") == [[True, False], [False, False]]
    assert pick("mean", "dataset") == [[True, True], [False, False]]
    assert pick("mean-std", "dataset") == [[True, True], [True, False]]  # 0.475 - 0.268
    assert pick("mean", "class") == [[True, True], [False, False]]
    assert pick("mean+std", "class") == [[True, True], [False, False]]
    assert pick("fixed", "video") == [[True, True], [True, False]]
    assert alqa.select({}, 0.15, "mean", 0.3, "dataset") == ({}, [])


# ---- icd.py -------------------------------------------------------------------------------------

def bank(labels, keys=None):
    """Labelled instances of random features, D = 4."""
    n = len(labels)
    keys = list(range(n)) if keys is None else keys
    return {
        "feats": torch.randn(n, 4),
        "labels": torch.tensor(labels),
        "keys": torch.tensor(keys),
    }


def test_sampled_sets_hold_the_class_and_never_the_same_segment():
    # Instance 3 is instance 0 under another class.
    b = bank([0, 0, 0, 1, 1, 2], keys=[0, 1, 2, 0, 3, 4])
    for seed in range(20):
        F_pos, F_neg = icd.sample_sets(b, 0, 10, generator(seed))
        assert len(F_pos) == len(F_neg) == 10  # with replacement, there being fewer
        assert set(F_pos.tolist()) <= {1, 2}
        assert set(F_neg.tolist()) <= {4, 5}
    F_pos, F_neg = icd.sample_sets(bank([0] * 30 + [1] * 30), 0, 10, generator())
    assert len(set(F_pos.tolist())) == 10  # without, there being enough
    assert len(set(F_neg.tolist())) == 10
    F_pos, F_neg = icd.sample_sets(bank([0]), 0, 10, generator())
    assert len(F_pos) == len(F_neg) == 0


def test_icd_loss_learns_and_survives_a_single_instance():
    D = icd.Discriminator(4, 128, 0.5)
    alone = icd.icd_loss(D, bank([0]), [0], 10, generator())
    assert float(alone.detach()) == 0
    alone.backward()
    assert float(icd.icd_loss(D, bank([0, 1]), [], 10, generator()).detach()) == 0
    b = bank([0, 1] * 20)
    b["feats"][:, 0] = 6.0 * b["labels"] - 3
    adam = torch.optim.Adam(D.parameters(), lr=1e-2)
    losses = []
    for step in range(150):
        loss = icd.icd_loss(D, b, range(10), 10, generator(step))
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_similarity_is_the_mean_over_labelled_instances_of_the_class():
    D = icd.Discriminator(4, 128, 0.5).eval()
    b = bank([0, 0, 2])
    feats = torch.randn(3, 4)
    labels = torch.tensor([0, 1, 2])
    s = icd.similarity(D, feats, labels, b)
    by_hand = []
    for j in (0, 1):
        logit = D(feats[:1], b["feats"][j:j + 1])
        by_hand.append(float(torch.sigmoid(logit).detach()))
    assert float(s[0]) == pytest.approx(np.mean(by_hand), abs=1e-6)
    assert s[1].isnan()  # a class without labelled instances
    assert len(icd.similarity(D, feats[:0], labels[:0], b)) == 0


@pytest.mark.parametrize(("switches", "expected"), [
    ("eap+mpp", "dropped kept kept mined candidate candidate"),
    ("eap", "dropped kept kept candidate candidate candidate"),
    ("mpp", "kept kept kept mined candidate candidate"),
    ("none", "kept kept kept candidate candidate candidate"),
])
def test_refinement_drops_and_mines(switches, expected):
    D = icd.Discriminator(1, 1, 0.0).eval()  # its logit is a's feature less 10
    D.load_state_dict({
        "W_1.weight": torch.tensor([[1.0, 0.0]]),
        "W_1.bias": torch.zeros(1),
        "W_2.weight": torch.ones(1, 1),
        "W_2.bias": torch.tensor([-10.0]),
    })
    s = torch.tensor([0.2, 0.5, 0.9, 0.8, 0.6, 0.9])
    # Class 1 has no labelled instance: its similarity is NaN.
    b = {"feats": torch.zeros(1, 1), "labels": torch.tensor([0])}
    selected = {
        "segments": torch.arange(6.0)[:, None].expand(6, 2),
        "labels": torch.tensor([0, 0, 1, 0, 0, 1]),
        "positive": torch.tensor([True, True, True, False, False, False]),
    }
    before = dict(selected)
    compared = icd.compare(selected, D, b, s.logit()[:, None] + 10, "max", "absolute")
    assert compared["similarity"].isnan().tolist() == [False, False, True, False, False, True]
    refined = icd.refine(compared, 0.3, 0.7, switches)
    assert states(refined) == expected.split()
    assert "positive" not in refined
    # The input stays.
    assert selected == before
    assert compared.keys() == {*before, "similarity"}
    assert compared["positive"].tolist() == [True, True, True, False, False, False]


def test_pooling_takes_steps_inside_or_the_nearest():
    feats = torch.arange(10.0)[:, None]
    segments = torch.tensor([[1.5, 4.0], [2.2, 2.7], [-3.0, -1.0], [8.5, 30.0]])
    assert icd.pool_instances(feats, segments, "max")[:, 0].tolist() == [4, 2, 0, 9]
    assert icd.pool_instances(feats, segments, "mean")[:, 0].tolist() == [3, 2, 0, 9]
    assert icd.pool_instances(feats, segments[:0], "max").shape == (0, 1)


def test_bank_gives_one_key_to_a_twice_labelled_segment():
    segments = torch.tensor([[1.0, 3.0], [1.0, 3.0], [4.0, 6.0]])
    labels = torch.tensor([0, 1, 0])
    videos = [{"id": name, "feats": torch.randn(9, 4), "segments": segments, "labels": labels}
              for name in "ab"]
    b = icd.bank_of(iter(videos), "max", "absolute")
    assert b["keys"].tolist() == [0, 0, 1, 2, 2, 3]
    assert b["videos"] == ["a"] * 3 + ["b"] * 3
    assert b["feats"].shape == (6, 4)


# ---- acp.py -------------------------------------------------------------------------------------

def test_sampled_steps_come_one_from_each_part():
    for seed in range(20):
        steps = acp.sample_steps(torch.tensor([400, 40, 7, 1]), 40, generator(seed))
        assert torch.equal(steps[0] // 10, torch.arange(40))
        assert torch.equal(steps[1], torch.arange(40))
        assert steps[2].max() == 6
        assert (steps[3] == 0).all()


def test_representation_reads_each_level_between_its_points():
    masks = [torch.ones(2, 16 // 2 ** level, dtype=torch.bool) for level in range(3)]
    levels = [torch.randn(2, 16 // 2 ** level, 3) for level in range(3)]
    steps = torch.tensor([[0, 1, 5, 8, 15], [2, 3, 4, 14, 15]])
    parts = []
    for level, x in enumerate(levels):
        at = 2 ** level * torch.arange(x.shape[1])  # where the level's points lie
        read = [[np.interp(steps[b], at, x[b, :, c]) for c in range(3)] for b in range(2)]
        parts.append(torch.tensor(np.array(read)).transpose(1, 2))
    expected = torch.cat(parts, 2).float()
    assert torch.allclose(acp.representation(levels, masks, steps), expected, atol=1e-6)


def test_representation_of_a_step_lies_at_the_step_on_every_level():
    masks = [torch.ones(1, 128 // 2 ** level, dtype=torch.bool) for level in range(6)]
    levels = [2.0 ** level * torch.arange(mask.shape[1])[None, :, None]
              for level, mask in enumerate(masks)]
    steps = torch.tensor([[0, 64, 77, 96]])
    expected = steps[..., None].expand(-1, -1, 6).float()
    assert torch.equal(acp.representation(levels, masks, steps), expected)


def test_kmeans_finds_the_best_partition_and_is_seeded():
    centres = 8 * torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    x = torch.cat([torch.randn(6, 2) + centre for centre in centres])
    cluster = acp.kmeans(x, 3, generator(), 10)
    groups = [cluster[i:i + 6].unique().tolist() for i in (0, 6, 12)]
    assert sorted(groups) == [[0], [1], [2]]
    assert torch.equal(cluster, acp.kmeans(x, 3, generator(), 10))
    y = torch.randn(7, 2)

    def cost(cluster):
        parts = [y[cluster == k] for k in cluster.unique()]
        return sum(float(((part - part.mean(0)) ** 2).sum()) for part in parts)

    partitions = [torch.tensor([(n >> i) & 1 for i in range(7)]) for n in range(128)]
    best = min(cost(partition) for partition in partitions)
    assert cost(acp.kmeans(y, 2, generator(), 10)) == pytest.approx(best, rel=1e-4)


def test_kmeans_of_few_or_equal_rows():
    assert len(acp.kmeans(torch.zeros(0, 3), 2, generator(), 10)) == 0
    assert acp.kmeans(torch.ones(5, 3), 4, generator(), 10).shape == (5,)
    two = torch.tensor([[0.0], [1.0]])
    assert len(acp.kmeans(two, 4, generator(), 10).unique()) == 2


def test_kmeans_of_rows_far_from_0():
    x = torch.randn(30, 4).round(decimals=1) + 4 * (torch.arange(30) % 3)[:, None]
    far = acp.kmeans(x + 30_000, 3, generator(), 10)
    groups = [far[i::3].unique().tolist() for i in range(3)]
    assert sorted(groups) == [[0], [1], [2]]


def test_info_nce_against_a_loop():
    z = torch.randn(7, 5)
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 0])
    tau = 0.2
    unit = F.normalize(z, dim=-1)
    e = torch.exp(unit @ unit.T / tau)
    anchors = []
    for i in range(7):
        P = [p for p in range(7) if p != i and labels[p] == labels[i]]
        N = [n for n in range(7) if labels[n] != labels[i]]
        if P and N:
            negatives = sum(e[i, n] for n in N)
            anchors.append(np.mean([math.log(e[i, p] / (e[i, p] + negatives)) for p in P]))
    assert float(acp.info_nce(z, labels, tau)) == pytest.approx(-np.mean(anchors), abs=1e-5)
    for alone in (torch.zeros(7), torch.arange(7)):  # no negative, no positive
        assert float(acp.info_nce(z, alone, tau)) == 0
    assert float(acp.info_nce(z[:0], labels[:0], tau)) == 0
    unknown = torch.where(labels == 1, -1, labels)  # leaves the contrast
    known = acp.info_nce(z[labels != 1], labels[labels != 1], tau)
    assert torch.equal(acp.info_nce(z, unknown, tau), known)


def test_step_classes_know_action_background_and_the_rejected():
    steps = torch.arange(10)
    segments = torch.tensor([[0.0, 6.0], [2.0, 3.0]])
    rejected = torch.tensor([[5.0, 8.0]])
    classes = acp.step_classes(steps, segments, torch.tensor([4, 1]), rejected, 9)
    assert classes.tolist() == [4, 4, 1, 1, 4, 4, 4, -1, -1, 9]
    classes = acp.step_classes(steps, NO_SEGMENT, NO_LABEL, NO_SEGMENT, 9)
    assert classes.unique().tolist() == [9]


@pytest.mark.parametrize("kinds", ["coarse", "fine", "coarse+fine"])
def test_acp_loss_has_a_gradient_and_ignores_padding(kinds):
    s = settings(
        "--acp", kinds, "--acp-steps", 10, "--acp-clusters", 4, "--acp-tau", 0.1)
    detector = small_detector()
    feats = torch.randn(2, 30, 6)
    mask = torch.ones(2, 30, dtype=torch.bool)
    nothing = {"segments": NO_SEGMENT, "labels": NO_LABEL, "rejected": NO_SEGMENT}
    segments = torch.tensor([[3.0, 12.0]])
    some = {"segments": segments, "labels": torch.tensor([1]), "rejected": NO_SEGMENT}
    for instances in (None, [some, some], [some, nothing], [nothing, nothing]):
        losses = []
        for pad in (0, 19):
            padded = F.pad(feats, (0, 0, 0, pad))
            out = detector(padded, F.pad(mask, (0, pad)))
            pyramid = (out.levels, out.masks)
            losses.append(acp.acp_loss(pyramid, padded, instances, 3, s, generator()))
        assert torch.allclose(losses[0], losses[1], atol=1e-4)
        losses[0].backward()
        assert (float(losses[0].detach()) > 0) == (instances is None or instances[0] is some)


# ---- train.py: the objective --------------------------------------------------------------------

def test_objective_is_equation_12():
    s = settings(
        "--lambda-u", 2, "--lambda-reg", 3, "--lambda-quality", 0.5, "--lambda-acp", 0.25)
    sup = {"cls": 4.0, "reg": 2.0, "quality": 8.0, "t_plus": 2.0, "acp": 4.0}
    unsup = {"cls": 1.0, "reg": 0.0, "quality": 0.0, "t_plus": 4.0, "acp": 0.0}
    assert train.objective(sup, None, s) == (4 + 3 * 2 + 0.5 * 8) / 2 + 0.25 * 4
    assert train.objective(sup, unsup, s) == 8 + 2 * 0.25
