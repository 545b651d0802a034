"""The companion of the paper: Eq. (1) to (12), each checked by hand, by a loop or by a limit.

In the paper's order. Then what they stand on, the detector [62]; then the reference outputs of
the public tools, skipped where ../shared is absent, and Tab. S6. All else: tests/.
"""
import json
import math
from functools import partial
from itertools import permutations, product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import allclose, tensor

import acp
import alqa
import evaluate
import icd
import model
import train
from extras import bench, tables
from plumbing.forms import read_predictions
from tests import conftest
from tests.helpers import SHARED, detections, generator, needs_shared, settings, small_detector

LARGEST = 1 - 2 ** -24  # that torch.rand draws

seeded, tiny = conftest.seeded, conftest.tiny  # fixtures
SOME = (tensor([[2.0, 9.0]]), tensor([1]))  # segments and labels of a video
NOTHING = (torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))
valid = partial(torch.ones, dtype=torch.bool)  # a mask without padding


def outputs(B, T, detector=None):
    """What a small detector gives for B videos of T random steps."""
    return (detector or small_detector())(torch.randn(B, T, 6), valid(B, T))


def targets(points, *videos):
    """The targets of videos of 3 classes."""
    return model.assign_targets(points, *zip(*videos), 3, 1.5)


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs, allow_unused=True, retain_graph=True)


def bce(p, y):
    return -(y * math.log(p) + (1 - y) * math.log(1 - p))


# ---- Sec. 3.1, ALQA: Eq. (1) to (6) -------------------------------------------------------------

def test_eq_1_with_its_tiou_and_tnd_by_hand_and_its_limits():
    a, b = tensor([[0.0, 4]]), tensor([[2.0, 6], [10, 12], [0, 4], [1, 1]])
    assert allclose(model.tiou(a, b), tensor([2 / 6, 0, 1, 0]))
    assert allclose(model.tnd(a, b), tensor([4 / 36, 81 / 144, 0, 1 / 16]))
    assert model.tiou(torch.zeros(2), torch.zeros(2)) == 0
    a, b = torch.rand(50, 1, 2).cumsum(-1), torch.rand(1, 60, 2).cumsum(-1)
    assert np.allclose(model.tiou(a.numpy(), b.numpy()), model.tiou(a, b).numpy())
    a, b = tensor([[1.0, 3.0], [2.0, 2.0]])  # seen from 0, of [-1, 3] and [-2, 2]
    assert float(alqa.diou_loss(a, b)) == pytest.approx(1 - 3 / 5 + 1 ** 2 / 5 ** 2)
    assert float(alqa.diou_loss(a, a)) == 0
    p, q = 10 * torch.rand(2, 1000, 2)
    assert alqa.tiou_and_tnd(p, q)[1].max() <= 0.25  # tND, since they share a point
    assert alqa.diou_loss(p, q).min() >= 0


def test_eq_2_by_hand_and_where_the_joint_score_and_both_offsets_start_with_a_gradient():
    branches, h = model.QualityBranches(4, "tiou+tnd", -2.0), torch.randn(1, 3, 4)
    for P, conv in zip(branches(h, valid(1, 3)), (branches.tiou, branches.tnd)):
        logit = (conv.weight[:, 0] * h[0]).sum() + conv.bias  # in the middle, which sees all steps
        assert allclose(P[0, 1], torch.sigmoid(logit), atol=1e-6)
    out = outputs(2, 20)
    assert (out.p_tiou - out.p_tnd).min() > 0.1
    out = small_detector(offset_bias=1.0)(0.1 * torch.randn(2, 40, 6), valid(2, 40))
    assert (out.offsets > 0).float().mean((0, 1)).min() > 0.9
    plain = outputs(1, 8, small_detector(alqa="none"))
    assert (plain.p_tiou == 1).all() and (plain.p_tnd == 0).all()
    assert "quality.tnd.weight" not in dict(small_detector(alqa="diou").named_parameters())


def test_eq_3_by_hand_and_that_kl_is_another_loss_and_both_are_least_at_the_target():
    P_tiou, P_tnd, tIoU, tND = tensor([[0.8], [0.3], [0.6], [0.1]])
    P_tiou.requires_grad_()
    L_quality, L_kl = (alqa.quality_loss(P_tiou, P_tnd, tIoU, tND, "tiou+tnd", form).sum()
                       for form in ("bce", "kl"))
    assert float(L_quality.detach()) == pytest.approx(bce(0.8, 0.6) + bce(0.3, 0.1))
    assert not allclose(*gradients(L_quality, P_tiou), *gradients(L_kl, P_tiou), rtol=0.1)
    p, zero = torch.linspace(0.01, 0.99, 99), torch.zeros(99)
    for form, branch in product(("bce", "kl"), ("tiou", "diou")):
        tND, target = {"tiou": (0.0, 0.7), "diou": (0.2, 0.5)}[branch]
        loss = alqa.quality_loss(p, zero, zero + 0.7, zero + tND, branch, form)
        assert float(p[loss.argmin()]) == pytest.approx(target, abs=0.011), (form, branch)


def test_eq_4_and_eq_5_by_hand_and_that_eq_5_is_least_at_the_soft_label_and_focal_loss_is_not():
    p_cls = tensor([[0.5, 0.2], [0.5, 0.2]])
    P = alqa.joint_score(p_cls, tensor([0.9, 0.1]), tensor([0.1, 0.4]), 1e-6)
    assert allclose(P, tensor([[0.4, 0.16], [0.5e-6, 0.2e-6]]))  # 0.1 - 0.4: clamped
    onehot = tensor([[1.0, 0.0]])
    Y = alqa.soft_label(onehot, tensor([0.8]), tensor([0.1]), "tiou+tnd", 1e-6)
    assert allclose(Y, tensor([[0.7, 0.0]]))
    p_cls, p_tiou, p_tnd = tensor([[0.5, 0.25]]), tensor([0.9]), tensor([0.1])
    L_cls = alqa.classification_loss(p_cls.logit(), p_tiou, p_tnd, Y, beta=2.0, eps=1e-6)
    by_hand = (0.7 - 0.4) ** 2 * bce(0.4, 0.7) + (0 - 0.2) ** 2 * bce(0.2, 0)
    assert float(L_cls) == pytest.approx(by_hand, rel=1e-5)
    p, one = torch.linspace(0.01, 0.99, 99), torch.ones(99)
    for y in (0.12, 0.3, 0.9):
        cls_logits, Y = p.logit()[:, None], torch.full((99, 1), y)
        loss = alqa.classification_loss(cls_logits, one, 0 * one, Y, 2.0, 1e-6)
        focal = alqa.focal_loss(cls_logits, Y, 0.25, 2.0)
        assert abs(float(p[loss.argmin()]) - y) < 0.011, y
        assert abs(float(p[focal.argmin()]) - y) > 0.08, y


@pytest.mark.parametrize(("branches", "form"), [*product(model.BRANCHES, ("bce", "kl"))])
def test_losses_are_finite_with_and_without_positives(branches, form):
    s = settings("--alqa", branches, "--quality-form", form)
    losses_of = alqa.plain_losses if branches == "none" else alqa.alqa_losses
    detector = small_detector(alqa=branches).train()
    out = outputs(2, 16, detector)
    for video in (SOME, NOTHING):
        losses = losses_of(out, *targets(out.points, video, video), out.mask, s)
        total = losses["cls"] + losses["reg"] + losses["quality"]
        for g in gradients(total, *detector.parameters()):
            assert g is None or g.isfinite().all()
        assert (losses["positives"] > 0) == (video is SOME)
        assert (losses["quality"] > 0) == (video is SOME and branches != "none")


@pytest.mark.parametrize("source", alqa.SOFT_LABELS)
def test_quality_targets_and_soft_labels_carry_no_gradient(source):
    s, out = settings("--soft-label", source), outputs(1, 16, small_detector().train())
    leaves = [part.detach().requires_grad_() for part in out.predictions()]
    cls_logits, offsets, p_tiou, p_tnd = leaves
    cls, off = targets(out.points, SOME)
    losses = alqa.alqa_losses(model.Outputs(*leaves, *out[4:]), cls, off, out.mask, s)
    assert gradients(losses["cls"] + losses["quality"], offsets) == (None,)
    assert gradients(losses["reg"], offsets)[0].abs().sum() > 0
    tIoU, tND = (p_tiou, p_tnd) if source == "predicted" else alqa.tiou_and_tnd(offsets, off)
    Y = torch.where(cls > 0, alqa.soft_label(cls, tIoU, tND, "tiou+tnd", s.eps), 0).detach()
    L_cls = alqa.classification_loss(cls_logits, p_tiou, p_tnd, Y, s.beta, s.eps).sum()
    both = (gradients(loss, cls_logits, p_tiou, p_tnd) for loss in (losses["cls"], L_cls))
    for mine, theirs in zip(*both):
        assert allclose(mine, theirs, atol=1e-6) and mine.abs().sum() > 0


def test_eq_6_by_hand_and_its_thresholds_and_scopes():
    theta_h = [float(alqa.theta_h(tensor([0.9, 0.5]), sign)) for sign in (1, 0, -1)]
    assert theta_h == pytest.approx([0.7 + 0.2, 0.7, 0.7 - 0.2])  # 0.2: the population's std
    videos = {"a": detections(0.9, 0.5, 0.1), "b": detections(0.3, 0.2), "empty": detections()}
    selected, theta_h = alqa.select(videos, 0.15, "mean+std", 0.3, "video")
    assert selected["a"]["scores"].tolist() == pytest.approx([0.9, 0.5])  # theta_l dropped 0.1
    # 0.7 + 0.2 reaches 0.9.
    assert [r["positive"].tolist() for r in selected.values()] == [[1, 0], [1, 0], []]
    assert theta_h == pytest.approx([0.9, 0.3])
    assert all(r.keys() == {"scores", "labels"} for r in videos.values())  # the input stays
    videos = {"a": detections(0.9, 0.5, labels=[0, 1]), "b": detections(0.3, 0.2, labels=[0, 1])}
    for threshold, scope, *expected in (
            ("mean+std", "dataset", [1, 0], [0, 0]), ("mean", "dataset", [1, 1], [0, 0]),
            ("mean-std", "dataset", [1, 1], [1, 0]),  # theta_h is 0.475 - 0.268
            ("mean+std", "class", [1, 1], [0, 0]), ("mean", "class", [1, 1], [0, 0]),
            ("fixed", "video", [1, 1], [1, 0])):
        selected, _ = alqa.select(videos, 0.15, threshold, 0.3, scope)
        assert [r["positive"].tolist() for r in selected.values()] == expected, (threshold, scope)
        assert alqa.select({}, 0.15, threshold, 0.3, scope) == ({}, [])


# ---- Sec. 3.2, ICD: Eq. (7) to (10) -------------------------------------------------------------

def bank(labels, keys=None):
    """Labelled instances of random features, D = 4."""
    keys = tensor(keys or range(len(labels)))
    return {"feats": torch.randn(len(labels), 4), "labels": tensor(labels), "keys": keys}


def discriminator(W_1, W_2, bias):
    """A Discriminator of features of one number with these weights."""
    D = icd.Discriminator(1, len(W_1), 0.0).eval()
    D.W_1.weight.data, D.W_2.weight.data, D.W_2.bias.data = map(tensor, (W_1, W_2, [bias]))
    return D


def test_the_sets_of_eq_7_hold_the_class_and_never_the_same_segment():
    b = bank([0, 0, 0, 1, 1, 2], keys=[0, 1, 2, 0, 3, 4])  # 3 is 0 under another class
    for seed in range(20):
        F_pos, F_neg = icd.sample_sets(b, tensor([0, 5]), 10, generator(seed))
        assert F_pos.shape == F_neg.shape == (2, 10)
        assert F_pos[0].bincount().tolist() == [0, 5, 5]  # each again, there being fewer
        assert F_neg[0].bincount().tolist() == [0, 0, 0, 0, 5, 5]
        assert set(F_pos[1].tolist()) == {-1}  # the only one of its class
        assert set(F_neg[1].tolist()) == set(range(5))
    F_pos, F_neg = icd.sample_sets(bank([0] * 30 + [1] * 30), tensor([0]), 10, generator())
    assert len(F_pos.unique()) == len(F_neg.unique()) == 10  # each once, there being enough
    F_pos, F_neg = icd.sample_sets(bank([0]), tensor([0]), 10, generator())
    assert set(F_pos.flatten().tolist()) == set(F_neg.flatten().tolist()) == {-1}


def test_eq_8_against_a_loop_and_that_it_learns_and_survives_a_single_instance():
    D, b = icd.Discriminator(4, 8, 0.0), bank([0, 0, 1, 1])
    L_icd = icd.icd_loss(D, b, range(4), 2, generator())  # both others, the one of the class twice
    parts = ([], [])  # of others, of the same class
    for i, j in permutations(range(4), 2):
        same = int(b["labels"][i] == b["labels"][j])
        p = float(torch.sigmoid(D(b["feats"][[i]], b["feats"][[j]])).detach())
        parts[same].append(bce(p, same))
    assert float(L_icd.detach()) == pytest.approx(np.mean(parts[1]) + np.mean(parts[0]), rel=1e-5)
    D, losses = icd.Discriminator(4, 128, 0.5), []
    for b, batch in ((bank([0]), [0]), (bank([0, 1]), [])):
        L_icd = icd.icd_loss(D, b, batch, 10, generator())
        assert float(L_icd.detach()) == 0
        L_icd.backward()
    b, adam = bank([0, 1] * 20), torch.optim.Adam(D.parameters(), lr=1e-2)
    b["feats"][:, 0] = 6.0 * b["labels"] - 3
    for step in range(150):
        L_icd = icd.icd_loss(D, b, range(10), 10, generator(step))
        adam.zero_grad()
        L_icd.backward()
        adam.step()
        losses.append(float(L_icd.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_eq_9_by_hand_and_eq_10_as_the_mean_over_labelled_instances_of_the_class():
    # The hidden units are relu(a - b) and relu(b - a), so the logit is 1 - |a - b|.
    D = discriminator([[1.0, -1.0], [-1.0, 1.0]], [[-1.0, -1.0]], 1.0)
    logits = D(tensor([[2.0], [5.0], [3.0]]), tensor([[5.0], [4.0], [3.0]]))
    assert logits.tolist() == [1 - 3, 1 - 1, 1 - 0]
    D, b = icd.Discriminator(4, 128, 0.5).eval(), bank([0, 0, 2])
    feats, labels = torch.randn(3, 4), tensor([0, 1, 2])
    s = icd.similarity(D, feats, labels, b)
    of_class = torch.sigmoid(D(feats[[0, 0]], b["feats"][:2]))
    assert float(s[0]) == pytest.approx(float(of_class.detach().mean()), abs=1e-6)
    assert s[1].isnan()  # a class without labelled instances
    assert s[2].isnan()  # with one: D has never seen it equal
    b = bank([0, 0])
    assert icd.similarity(D, feats, labels * 0, b).isnan().all()  # D has seen equal pairs alone
    b = bank([0, 0, 2, 2])
    assert not icd.similarity(D, feats, labels, b)[[0, 2]].isnan().any()
    b["keys"][3] = b["keys"][2]  # of one segment, labelled twice
    assert icd.similarity(D, feats, labels, b)[2].isnan()
    assert len(icd.similarity(D, feats[:0], labels[:0], b)) == 0


def test_eap_drops_and_mpp_mines():
    D = discriminator([[1.0, 0.0]], [[1.0]], -10.0)  # its logit is a's feature less 10
    s = tensor([0.2, 0.5, 0.9, 0.8, 0.6, 0.9])
    b = {"feats": torch.zeros(3, 1), "labels": tensor([0, 0, 2]), "keys": torch.arange(3)}
    selected = {"segments": torch.arange(6.0)[:, None].expand(6, 2),
                "labels": tensor([0, 0, 1, 0, 0, 1]), "positive": tensor([True] * 3 + [False] * 3)}
    before = dict(selected)
    compared = icd.compare(selected, D, b, s.logit()[:, None] + 10, "max", "absolute")
    assert compared["similarity"].isnan().tolist() == [False, False, True, False, False, True]
    for switches, expected in (("eap+mpp", "dropped kept kept mined candidate candidate"),
                               ("eap", "dropped kept kept candidate candidate candidate"),
                               ("mpp", "kept kept kept mined candidate candidate"),
                               ("none", "kept kept kept candidate candidate candidate")):
        refined = icd.refine(compared, 0.3, 0.7, switches)
        assert [icd.STATUS[i] for i in refined["status"]] == expected.split(), switches
        assert "positive" not in refined
    assert selected == before  # the input stays
    assert compared.keys() == {*before, "similarity"}
    assert compared["positive"].tolist() == [True] * 3 + [False] * 3


def random_segments(n):
    """n segments (n, 2) that begin between 0 and 40, many of which overlap."""
    start = 40 * torch.rand(n)
    return torch.stack([start, start + 0.5 + 20 * torch.rand(n)], 1)


def test_the_bank_pools_steps_inside_or_the_nearest_and_has_one_key_a_segment():
    feats = torch.arange(10.0)[:, None]
    segments = tensor([[1.5, 4.0], [2.2, 2.7], [-3.0, -1.0], [8.5, 30.0]])
    assert icd.pool_instances(feats, segments, "max")[:, 0].tolist() == [4, 2, 0, 9]
    assert icd.pool_instances(feats, segments, "mean")[:, 0].tolist() == [3, 2, 0, 9]
    assert icd.pool_instances(feats, segments[:0], "max").shape == (0, 1)
    feats, segments = torch.randn(50, 3), random_segments(40)
    for pool, of_rows in (("max", torch.amax), ("mean", torch.mean)):
        by_hand = [of_rows(feats[math.ceil(start):math.floor(end) + 1], 0)
                   for start, end in segments.tolist() if math.ceil(start) <= math.floor(end) < 50]
        assert len(by_hand) > 20
        inside = segments[:, 0].ceil() <= segments[:, 1].floor()
        pooled = icd.pool_instances(feats, segments[inside & (segments[:, 1] < 50)], pool)
        assert allclose(pooled, torch.stack(by_hand), atol=1e-6)
    twice = {"segments": tensor([[1.0, 3.0], [1.0, 3.0], [4.0, 6.0]]), "labels": tensor([0, 1, 0])}
    videos = ({"id": name, "feats": torch.randn(9, 4)} | twice for name in "ab")
    b = icd.bank_of(videos, "max", "absolute")
    assert b["keys"].tolist() == [0, 0, 1, 2, 2, 3] and b["feats"].shape == (6, 4)
    assert b["videos"] == ["a"] * 3 + ["b"] * 3


# ---- Sec. 3.3, ACP: Eq. (11) and Fig. S1 --------------------------------------------------------

def test_eq_11_against_a_loop():
    z, labels, tau = torch.randn(7, 5), tensor([0, 0, 1, 1, 1, 2, 0]), 0.2
    unit, anchors = F.normalize(z, dim=-1), []
    e = torch.exp(unit @ unit.T / tau)
    for i in range(7):
        P = [p for p in range(7) if p != i and labels[p] == labels[i]]
        N = [n for n in range(7) if labels[n] != labels[i]]
        if P and N:
            anchors.append(np.mean([math.log(e[i, p] / (e[i, p] + e[i, N].sum())) for p in P]))
    assert float(acp.info_nce(z, labels, tau)) == pytest.approx(-np.mean(anchors), abs=1e-5)
    # No negative, no positive, no step.
    for x, alone in ((z, torch.zeros(7)), (z, torch.arange(7)), (z[:0], labels[:0])):
        assert float(acp.info_nce(x, alone, tau)) == 0
    unknown = torch.where(labels == 1, -1, labels)  # leaves the contrast
    known = acp.info_nce(z[labels != 1], labels[labels != 1], tau)
    assert allclose(acp.info_nce(z, unknown, tau), known)
    both = acp.info_nce(torch.stack([z, z]), torch.stack([labels, unknown]), tau)
    assert allclose(both, torch.stack([acp.info_nce(z, labels, tau), known]))  # a batch


@pytest.mark.parametrize("kinds", ["coarse", "fine", "coarse+fine"])
def test_acp_loss_has_a_gradient_and_ignores_padding(kinds):
    s = settings("--acp", kinds, "--acp-steps", 10, "--acp-clusters", 4, "--acp-tau", 0.1)
    detector, feats = small_detector(), torch.randn(2, 30, 6)
    some, nothing = ({"segments": segments, "labels": labels, "rejected": segments[:0]}
                     for segments, labels in (SOME, NOTHING))
    for instances in (None, [some, some], [some, nothing], [nothing, nothing]):
        losses = []
        for pad in (0, 19):
            padded = F.pad(feats, (0, 0, 0, pad))
            out = detector(padded, F.pad(valid(2, 30), (0, pad)))
            pyramid = (out.levels, out.masks)
            losses.append(acp.acp_loss(pyramid, padded, instances, 3, s, generator()))
        assert allclose(*losses, atol=1e-4)
        losses[0].backward()
        assert (float(losses[0].detach()) > 0) == (instances is None or instances[0] is some)


def test_steps_come_one_from_each_part_have_classes_and_read_each_level_between_its_points(
        monkeypatch):
    for seed in range(20):
        steps = acp.sample_steps(tensor([400, 40, 7, 1]), 40, generator(seed))
        assert torch.equal(steps[0] // 10, torch.arange(40))
        assert torch.equal(steps[1], torch.arange(40))
        assert steps[2].max() == 6 and not steps[3].any()
    monkeypatch.setattr(acp, "draws_of_batch", lambda size, generator: torch.full(size, LARGEST))
    assert torch.equal(acp.sample_steps(tensor([40]), 40, None)[0], torch.arange(40))
    steps, segments, rejected = torch.arange(10), tensor([[0.0, 6], [2, 3]]), tensor([[5.0, 8]])
    some, nothing = ({"segments": segments[:n], "labels": tensor([4, 1])[:n], "rejected": rejected}
                     for n in (2, 0))
    coarse, fine = acp.action_labels(steps.expand(2, 10), [some, nothing], 9)
    assert fine[1].tolist() == 5 * [9] + 4 * [-1] + [9]  # a labelled video without any action
    assert torch.equal(coarse, torch.where(fine < 0, -1, (fine < 9).long()))
    classes = acp.step_classes(steps, segments, tensor([4, 1]), rejected, 9)
    assert classes.tolist() == [4, 4, 1, 1, 4, 4, 4, -1, -1, 9]  # -1: rejected, 9: background
    assert acp.step_classes(steps, *NOTHING, NOTHING[0], 9).unique().tolist() == [9]
    masks = [valid(2, 128 // 2 ** level) for level in range(6)]
    levels = [torch.randn(2, mask.shape[1], 3) for mask in masks]
    steps = tensor([[0, 1, 5, 64, 77, 127], [2, 3, 4, 14, 96, 126]])
    found = acp.representation(levels, masks, steps)
    for (level, x), b, c in product(enumerate(levels), range(2), range(3)):
        at = 2 ** level * torch.arange(x.shape[1])  # where the level's points lie
        expected = np.interp(steps[b], at, x[b, :, c])
        assert np.allclose(found[b, :, 3 * level + c], expected, atol=1e-6), (level, b, c)


def groups_of(cluster, size):
    """The clusters of each run of so many rows, in order."""
    return sorted(part.unique().tolist() for part in cluster.split(size))


def test_kmeans_finds_the_best_partition_is_seeded_and_takes_few_or_equal_or_far_rows():
    x = torch.randn(18, 2) + 8 * tensor([[0.0, 0], [1, 0], [0, 1]]).repeat_interleave(6, 0)
    cluster = acp.kmeans(x, 3, generator(), 10)
    assert groups_of(cluster, 6) == [[0], [1], [2]]
    assert torch.equal(cluster, acp.kmeans(x, 3, generator(), 10))
    y = torch.randn(7, 2)

    def cost(cluster):
        parts = [y[cluster == k] for k in cluster.unique()]
        return sum(float(((part - part.mean(0)) ** 2).sum()) for part in parts)

    best = min(cost(tensor(partition)) for partition in product([0, 1], repeat=7))
    assert cost(acp.kmeans(y, 2, generator(), 10)) == pytest.approx(best, rel=1e-4)
    assert len(acp.kmeans(torch.zeros(0, 3), 2, generator(), 10)) == 0
    assert acp.kmeans(torch.ones(5, 3), 4, generator(), 10).shape == (5,)
    assert len(acp.kmeans(tensor([[0.0], [1.0]]), 4, generator(), 10).unique()) == 2
    x = torch.randn(30, 4).round(decimals=1) + 4 * (torch.arange(30) // 10)[:, None]
    assert groups_of(acp.kmeans(x + 30_000, 3, generator(), 10), 10) == [[0], [1], [2]]


def test_eq_12_by_hand():
    s = settings("--lambda-u", 2, "--lambda-reg", 3, "--lambda-quality", 0.5, "--lambda-acp", 0.25)
    sup = {"cls": 4.0, "reg": 2.0, "quality": 8.0, "t_plus": 2.0, "acp": 4.0}
    unsup = {"cls": 1.0, "reg": 0.0, "quality": 0.0, "t_plus": 4.0, "acp": 0.0}
    assert train.objective(sup, None, s) == (4 + 3 * 2 + 0.5 * 8) / 2 + 0.25 * 4
    assert train.objective(sup, unsup, s) == 8 + 2 * 0.25


# ---- The detector -------------------------------------------------------------------------------

def test_convolutions_match_torch_and_local_attention_a_dense_one_with_a_band():
    x, mask = torch.randn(2, 11, 4, requires_grad=True), torch.arange(11) < tensor([[11], [9]])
    conv = model.Conv(4, 5)
    conv.bias.data.normal_()
    theirs = F.conv1d(x.transpose(1, 2), conv.weight.permute(1, 2, 0), conv.bias, padding=1)
    both = (conv(x, mask), theirs.transpose(1, 2) * mask[..., None])
    assert allclose(*both, atol=1e-6)
    wanted = torch.randn(2, 11, 5)
    of_both = [gradients((y * wanted).sum(), x, conv.weight, conv.bias) for y in both]
    for mine, theirs in zip(*of_both):
        assert allclose(mine, theirs, atol=1e-5)
    # Sequences one behind the other, of which the first ends in padding.
    behind = conv(x.flatten(0, 1)[None], torch.cat([mask[1:], mask[1:]], 1))
    assert allclose(behind.view(2, 11, 5), conv(x, mask[1:]), atol=1e-6)
    conv = model.DepthwiseConv(4)
    for stride in (1, 2):
        theirs = F.conv1d(x.transpose(1, 2), conv.weight.T[:, None], None, stride, 1, groups=4)
        assert allclose(conv(model.shifted(x, stride)), theirs.transpose(1, 2), atol=1e-6), stride
    for T, half in ((1, 3), (7, 2), (40, 4), (64, 9), (33, 100)):
        (q, k, v), step = torch.randn(3, 2, T, 8), torch.arange(T)
        mask, gap = step < tensor([[T], [T // 2 + 1]]), (step[:, None] - step).abs()
        seen = ((gap <= half) & mask[:, None, None]) | (gap == 0)
        Q, K, V = (x.view(2, T, 2, 4).transpose(1, 2) for x in (q, k, v))  # by head
        dense = (Q @ K.transpose(2, 3) / 2).masked_fill(~seen, -torch.inf).softmax(-1) @ V
        dense = dense.transpose(1, 2).reshape(2, T, 8)
        found = model.local_attention(q, k, v, mask, 2, half)
        assert allclose(found, dense, atol=1e-5), (T, half)


@pytest.mark.parametrize("position", [False, True])
def test_padding_changes_no_valid_output(position):
    detector = small_detector(position=position)
    for p in detector.parameters():  # trained weights: every bias counts
        p.data.add_(0.2 * torch.randn_like(p))
    feats, lengths = torch.randn(3, 37, 6), [37, 32, 1]
    together = detector(feats, torch.arange(37) < tensor(lengths)[:, None])
    for b, T in enumerate(lengths):
        alone, rows = detector(feats[b:b + 1, :T], valid(1, T)), together.mask[b]
        assert alone.mask.all()
        assert rows.sum() == alone.mask.shape[1] == sum(-(-T // 2 ** level) for level in range(3))
        for mine, theirs in zip(together.predictions(), alone.predictions()):
            assert allclose(mine[b][rows], theirs[0], atol=1e-5)


def targets_by_hand(points, segments, labels):
    """What targets() gives for a video, point by point."""
    cls, off = torch.zeros(len(points.time), 3), torch.zeros(len(points.time), 2)
    for p, (t, stride, low, high) in enumerate(torch.stack(points, 1).tolist()):
        lengths = {}  # of the segments for which the point is positive
        for n, (start, end) in enumerate(segments.tolist()):
            central = abs(t - (start + end) / 2) < 1.5 * stride
            if central and start < t < end and low <= max(t - start, end - t) <= high:
                lengths[n] = end - start
        shortest = min(lengths, key=lengths.get, default=None)
        for n, length in lengths.items():
            if length <= lengths[shortest] + 1e-3:
                cls[p, labels[n]] = 1
                start, end = segments[shortest].tolist()
                off[p] = tensor([t - start, end - t]) / stride
    return cls, off


def test_target_assignment_against_a_loop_with_a_twice_labelled_segment():
    points, segments = small_detector().points(50), random_segments(8)
    segments = segments[[*range(8), 0]]  # the same segment with another class
    labels = tensor([0, 1, 2, 0, 1, 2, 0, 1, 2])
    cls, off = targets(points, (segments, labels), NOTHING)
    cls_by_hand, off_by_hand = targets_by_hand(points, segments, labels)
    positive = cls[0].any(-1)
    assert torch.equal(cls[0], cls_by_hand) and not cls[1].any()
    assert allclose(off[0][positive], off_by_hand[positive], atol=1e-5)
    assert (cls[0].sum(-1) == 2).any()  # the twice labelled one
    decoded = model.decode(points, off)[0][positive]
    assert (torch.cdist(decoded, segments).min(1).values < 1e-3).all()
    cls, off = targets(small_detector().points(9), NOTHING, NOTHING)
    assert cls.shape == (2, 9 + 5 + 3, 3) and not cls.any() and not off.any()


def test_soft_nms_against_a_loop_with_scores_that_vanish_and_of_nothing():
    segments, scores, expected = random_segments(60), 0.1 + 0.9 * torch.rand(60), []
    groups = 7 * torch.randint(4, (60,))
    index, decayed = model.soft_nms(segments, scores, groups, 0.5, 0.2, 10)
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
    assert decayed.tolist() == pytest.approx([score for score, _ in expected], rel=1e-5)
    same, group = tensor([[0.0, 10.0]]).expand(120, 2), torch.zeros(120, dtype=torch.long)
    index, decayed = model.soft_nms(same, torch.rand(120), group, 0.5, 0.0, 200)
    assert len(index.unique()) == len(index) and decayed.min() > 0  # each once
    for scores in (torch.zeros(0), tensor([0.0001])):
        found = model.soft_nms(same[:len(scores)], scores, group[:len(scores)], 0.5, 0.001, 5)
        assert list(map(len, found)) == [0, 0]


# ---- Reference outputs of the public tools, and Tab. S6 -----------------------------------------

def read_arrays(name):
    """The arrays of a reference file as tensors."""
    return {key: torch.from_numpy(x) for key, x in np.load(SHARED / "reference" / name).items()}


def test_public_checkpoint_gives_the_public_outputs_targets_and_losses(tiny):
    out, config, ref = tiny
    time, stride, low, high = out.points
    points = torch.cat([ref[f"points_{level}"] for level in range(4)])
    assert torch.equal(torch.stack([time, low, high, stride], 1), points)
    masks = [ref[f"mask_{level}"][:, 0] for level in range(4)]
    assert out.sizes() == [mask.shape[1] for mask in masks]
    assert all(map(torch.equal, out.masks, masks))
    mask = torch.cat(masks, 1)
    found = {"fpn": torch.cat(out.levels, 1), "cls_logits": out.cls_logits, "offsets": out.offsets}
    for name, mine in found.items():
        theirs = torch.cat([ref[f"{name}_{level}"] for level in range(4)], 2).transpose(1, 2)
        assert allclose(mine[mask], theirs[mask], rtol=0, atol=1e-5), name
    segments, labels = (list(map(tensor, config[key])) for key in ("segments", "labels"))
    cls, off = model.assign_targets(out.points, segments, labels, config["num_classes"], 1.5)
    positive = ref["gt_cls"].any(-1)
    assert torch.equal(cls, ref["gt_cls"])
    assert allclose(off[positive], ref["gt_offsets"][positive], rtol=0, atol=1e-5)
    losses = alqa.plain_losses(out, cls, off, out.mask, train.Settings(alqa="none"))
    t_plus = 0.9 * float(ref["init_loss_norm"]) + 0.1 * max(int(losses["positives"]), 1)
    for name in ("cls", "reg"):
        theirs = pytest.approx(float(ref[f"{name}_loss"]), abs=1e-5)
        assert float(losses[name].detach()) / t_plus == theirs


@needs_shared
def test_losses_and_soft_nms_match_the_public_ones():
    s, ref = train.Settings(), read_arrays("losses.npz")
    L_diou = alqa.diou_loss(ref["pred_offsets"], ref["gt_offsets"])
    focal = alqa.focal_loss(ref["logits"], ref["targets"], s.focal_alpha, s.focal_gamma)
    assert allclose(L_diou, ref["diou_loss"], rtol=0, atol=1e-6)
    assert allclose(focal, ref["focal"], rtol=0, atol=1e-6)
    ref = read_arrays("soft_nms.npz")
    for case in range(6):
        names = ("segments", "scores", "labels", "sigma", "min_score", "max_num")
        segments, scores, labels, *rest = (ref[f"{case}_{name}"] for name in names)
        sigma, min_score, number = (x.item() for x in rest)
        index, decayed = model.soft_nms(segments, scores, labels, sigma, min_score, number)
        index, decayed = index[:number], decayed[:number]
        assert torch.equal(labels[index], ref[f"{case}_out_labels"]), case
        assert allclose(segments[index], ref[f"{case}_out_segments"], rtol=0, atol=1e-5), case
        assert allclose(decayed, ref[f"{case}_out_scores"], rtol=0, atol=1e-5), case


@needs_shared
@pytest.mark.parametrize("name", ["actionformer_thumos14", "map_thumos14"])
def test_map_matches_the_activitynet_toolkit(name):
    reference = SHARED / "reference"
    expected = json.loads((reference / f"{name}_expected.json").read_text())
    truth, found = bench.given_detections(
        reference / "actionformer_thumos14_detections.npz", SHARED / "data/thumos14/thumos14.json")
    if name == "map_thumos14":
        found = read_predictions(reference / "map_thumos14_predictions.json")
    metrics = evaluate.mean_average_precision(truth, found, expected["tious"])
    mine = np.array([metrics["ap"][label] for label in expected["labels"]]).T
    assert np.abs(mine - np.array(expected["ap"])).max() < 1e-9
    assert metrics["average_mAP"] == pytest.approx(expected["average_mAP"], abs=1e-9)
    assert (metrics["videos"], metrics["instances"]) == (212, 3358)


def test_tab_s6_is_the_papers_and_needs_no_run(capsys):
    assert tables.main(["S6"]) == 0
    table = capsys.readouterr().out
    for figure in ("26.017 M, 30.608 G", "3.179 M, 14.422 G", "3.182 M, 14.436 G", "26,016,768",
                   "3,179,542", "3,182,616", "524,545", "30.608", "14.422", "14.436"):
        assert figure in table
        table = table.replace(figure, "")  # the paper's are gone where ours are looked for
