"""Tests of APL: invariants, brute-force oracles, the reference outputs of the public tools, and the empty case.

Tests against ../shared (annotations, a real data set, reference outputs) are skipped where it is absent.
"""
import ast
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import acp
import alqa
import data
import evaluate
import icd
import model
import tables
import train

HERE = Path(__file__).parent
SHARED = HERE.parent / "shared"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="the reference outputs and the real data lie in ../shared, which is absent")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- Reference outputs of the public tools --------------------------------------------------------------------------

def public_weights(state):
    """The public ActionFormer's state dict under this project's names and shapes."""
    names = [(r"backbone\.embd\.(\d)\.conv", r"backbone.embed.convs.\1"), (r"backbone\.embd_norm", "backbone.embed.norms"),
             (r"\.ln(\d)\.", r".norm\1."),
             (r"attn\.(query|key|value)_conv\.conv", r"attn.convs.\1"), (r"attn\.(query|key|value)_norm", r"attn.norms.\1"),
             (r"attn\.(query|key|value)\.", r"attn.linears.\1."), (r"mlp\.3", "mlp.2"), (r"drop_path_attn", "drop1"),
             (r"drop_path_mlp", "drop2"),
             (r"neck\.fpn_norms", "backbone.neck"), (r"cls_head\.cls_head\.conv", "cls_out"), (r"reg_head\.offset_head\.conv", "reg_out"),
             (r"(cls|reg)_head\.head\.(\d)\.conv", r"\1_trunk.convs.\2"), (r"(cls|reg)_head\.norm", r"\1_trunk.norms"),
             (r"query", "0"), (r"key", "1"), (r"value", "2")]
    out, scales = {}, []
    for key, value in state.items():
        if "reg_head.scale" in key:
            scales.append(value)
            continue
        for old, new in names:
            key = re.sub(old, new, key)
        if key.endswith("weight") and value.ndim == 3 and value.shape[1:] == (1, 3):
            value = value[:, 0].T  # depth-wise
        elif key.endswith("weight") and value.ndim == 3 and value.shape[2] == 3:
            value = value.permute(2, 0, 1)  # (out, in, 3) -> (3, out, in)
        elif value.ndim == 3:
            value = value.squeeze(-1) if value.shape[0] > 1 else value.flatten()
        out[key] = value
    return out | {"scales": torch.stack(scales).flatten()}


@pytest.fixture
def tiny():
    """The public tiny ActionFormer, loaded: (detector, its settings, its reference arrays)."""
    if not SHARED.exists():
        pytest.skip("the reference outputs lie in ../shared, which is absent")
    config = json.loads((SHARED / "reference/actionformer_tiny.json").read_text())
    state = torch.load(SHARED / "reference/actionformer_tiny.pth.tar", weights_only=True)["state_dict"]
    detector = model.Detector(config["input_dim"], config["num_classes"], config["embd_dim"], config["n_head"],
                              [config["n_mha_win_size"]] * 4, ranges=config["regression_range"], branches="none").eval()
    detector.load_state_dict(public_weights(state))
    return detector, config, np.load(SHARED / "reference/actionformer_tiny.npz")


def test_public_checkpoint_gives_the_public_outputs(tiny):
    detector, _, ref = tiny
    out = detector(torch.from_numpy(ref["x"]).transpose(1, 2), torch.from_numpy(ref["mask"])[:, 0])
    start = 0
    for level in range(4):
        T = ref[f"mask_{level}"].shape[-1]
        mask = torch.from_numpy(ref[f"mask_{level}"])[:, 0]
        assert torch.equal(out.masks[level], mask)
        rows = slice(start, start + T)
        for name, mine in (("fpn", out.levels[level]), ("cls_logits", out.cls_logits[:, rows]), ("offsets", out.offsets[:, rows])):
            theirs = torch.from_numpy(ref[f"{name}_{level}"]).transpose(1, 2)
            assert torch.allclose(mine[mask], theirs[mask], rtol=0, atol=1e-5), (name, level)
        points = torch.stack([out.points.time, out.points.low, out.points.high, out.points.stride], 1)[start:start + T]
        assert torch.equal(points, torch.from_numpy(ref[f"points_{level}"]))
        start += T


def test_public_checkpoint_gives_the_public_targets_and_losses(tiny):
    detector, config, ref = tiny
    out = detector(torch.from_numpy(ref["x"]).transpose(1, 2), torch.from_numpy(ref["mask"])[:, 0])
    segments, labels = [torch.tensor(s) for s in config["segments"]], [torch.tensor(l) for l in config["labels"]]
    cls_target, offset_target = model.assign_targets(out.points, segments, labels, config["num_classes"])
    positive = torch.from_numpy(ref["gt_cls"]).any(-1)
    assert torch.equal(cls_target, torch.from_numpy(ref["gt_cls"]))
    assert torch.allclose(offset_target[positive], torch.from_numpy(ref["gt_offsets"])[positive], rtol=0, atol=1e-5)
    losses = alqa.detection_losses(out, cls_target, offset_target, out.mask, "none", "bce")
    t_plus = 0.9 * float(ref["init_loss_norm"]) + 0.1 * max(int(losses["positives"]), 1)
    assert float(losses["cls"].detach()) / t_plus == pytest.approx(float(ref["cls_loss"]), abs=1e-5)
    assert float(losses["reg"].detach()) / t_plus == pytest.approx(float(ref["reg_loss"]), abs=1e-5)


@needs_shared
def test_diou_and_focal_loss_match_the_public_ones():
    ref = {k: torch.from_numpy(v) for k, v in np.load(SHARED / "reference/losses.npz").items()}
    assert torch.allclose(alqa.diou_loss(ref["pred_offsets"], ref["gt_offsets"]), ref["diou_loss"], rtol=0, atol=1e-6)
    assert torch.allclose(alqa.focal_loss(ref["logits"], ref["targets"]), ref["focal"], rtol=0, atol=1e-6)


@needs_shared
@pytest.mark.parametrize("case", range(6))
def test_soft_nms_matches_the_public_one(case):
    ref = {k[2:]: v for k, v in np.load(SHARED / "reference/soft_nms.npz").items() if k.startswith(f"{case}_")}
    segments, scores, labels = (torch.from_numpy(ref[k]) for k in ("segments", "scores", "labels"))
    index, decayed = model.soft_nms(segments, scores, labels, float(ref["sigma"]), float(ref["min_score"]), int(ref["max_num"]))
    index, decayed = index[:int(ref["max_num"])], decayed[:int(ref["max_num"])]
    assert torch.equal(labels[index], torch.from_numpy(ref["out_labels"]))
    assert torch.allclose(segments[index], torch.from_numpy(ref["out_segments"]), rtol=0, atol=1e-5)
    assert torch.allclose(decayed, torch.from_numpy(ref["out_scores"]), rtol=0, atol=1e-5)


def thumos_predictions():
    z = np.load(SHARED / "reference/actionformer_thumos14_detections.npz")
    found = {}
    for video, label, start, end, score in zip(*(z[k].tolist() for k in ("video_id", "label", "start", "end", "score"))):
        found.setdefault(video, []).append({"label": label, "score": score, "segment": [start, end]})
    return found


@needs_shared
@pytest.mark.parametrize("name", ["actionformer_thumos14", "map_thumos14"])
def test_map_matches_the_activitynet_toolkit(name):
    expected = json.loads((SHARED / f"reference/{name}_expected.json").read_text())
    truth = {n: a for n, a in data.read_annotations(SHARED / "data/thumos14/thumos14.json").items() if a.subset == "Test"}
    made_up = SHARED / "reference/map_thumos14_predictions.json"
    found = thumos_predictions() if name == "actionformer_thumos14" else evaluate.read_predictions(made_up)
    metrics = evaluate.mean_average_precision(truth, found, expected["tious"])
    mine = np.array([metrics["ap"][label] for label in expected["labels"]]).T
    assert np.abs(mine - np.array(expected["ap"])).max() < 1e-9
    assert metrics["average_mAP"] == pytest.approx(expected["average_mAP"], abs=1e-9)
    assert (metrics["videos"], metrics["instances"]) == (212, 3358)


# ---- model.py -------------------------------------------------------------------------------------------------------

def small_detector(branches="tiou+tnd", classes=3, dim=6, windows=(5, 5, 0), **kwargs):
    ranges = [(0, 4), (4, 8), (8, math.inf)]
    return model.Detector(dim, classes, 16, 2, windows, ranges=ranges, branches=branches, **kwargs).eval()


def test_tiou_and_tnd_by_hand():
    a, b = torch.tensor([[0.0, 4.0]]), torch.tensor([[2.0, 6.0], [10.0, 12.0], [0.0, 4.0], [1.0, 1.0]])
    assert torch.allclose(model.tiou(a, b), torch.tensor([2 / 6, 0, 1, 0]))
    assert torch.allclose(model.tnd(a, b), torch.tensor([4 / 36, 81 / 144, 0, 1 / 16]))
    assert model.tiou(torch.zeros(2), torch.zeros(2)) == 0


def test_tiou_of_arrays_is_that_of_tensors():
    a, b = torch.rand(50, 1, 2).cumsum(-1), torch.rand(1, 60, 2).cumsum(-1)
    assert np.allclose(model.tiou(a.numpy(), b.numpy()), model.tiou(a, b).numpy())


def test_segments_that_share_a_point_have_tnd_of_a_quarter_at_most():
    p, q = 10 * torch.rand(1000, 2), 10 * torch.rand(1000, 2)
    assert alqa.overlap(p, q)[1].max() <= 0.25
    assert alqa.diou_loss(p, q).min() >= 0


def test_convolutions_match_torch():
    x, mask = torch.randn(2, 11, 4), torch.ones(2, 12, dtype=torch.bool)
    mask[:, 0], mask[1, 9:] = False, False
    conv, deep = model.Conv(4, 5), model.DepthwiseConv(4)
    conv.bias.data.normal_()
    wanted, gradients = torch.randn(2, 11, 5), []
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    both = (conv(F.pad(ours, (0, 0, 1, 0)), mask)[:, 1:],
            F.conv1d(theirs.transpose(1, 2), conv.weight.permute(1, 2, 0), conv.bias, padding=1).transpose(1, 2) * mask[:, 1:, None])
    assert torch.allclose(*both, atol=1e-6)
    for y, inputs in zip(both, (ours, theirs)):
        gradients.append(torch.autograd.grad((y * wanted).sum(), [inputs, conv.weight, conv.bias]))
    for a, b in zip(*gradients):
        assert torch.allclose(a, b, atol=1e-5)
    for stride in (1, 2):
        theirs = F.conv1d(x.transpose(1, 2), deep.weight.T[:, None], groups=4, padding=1, stride=stride).transpose(1, 2)
        assert torch.allclose(deep(model.shifted(x, stride)), theirs, atol=1e-6)


@pytest.mark.parametrize(("T", "half"), [(1, 3), (7, 2), (40, 4), (64, 9), (33, 100)])
def test_local_attention_equals_dense_attention_with_a_band(T, half):
    q, k, v = torch.randn(3, 2, T, 8).unbind(0)
    mask = torch.ones(2, T, dtype=torch.bool)
    mask[1, T // 2 + 1:] = False
    split = lambda x: x.view(2, T, 2, 4).transpose(1, 2)
    gap = (torch.arange(T)[:, None] - torch.arange(T)).abs()
    seen = ((gap <= half) & mask[:, None, None]) | (gap == 0)
    logits = (split(q) @ split(k).transpose(2, 3) / 2).masked_fill(~seen, -torch.inf)
    dense = (logits.softmax(-1) @ split(v)).transpose(1, 2).reshape(2, T, 8)
    assert torch.allclose(model.local_attention(q, k, v, mask, 2, half), dense, atol=1e-5)


@pytest.mark.parametrize("position", [False, True])
def test_padding_changes_no_valid_output(position):
    detector = small_detector(position=position)
    for p in detector.parameters():  # trained weights: every bias counts
        p.data.add_(0.2 * torch.randn_like(p))
    feats, lengths = torch.randn(3, 37, 6), [37, 32, 1]
    mask = torch.arange(37) < torch.tensor(lengths)[:, None]
    together = detector(feats, mask)
    for b, T in enumerate(lengths):
        alone = detector(feats[b:b + 1, :T], torch.ones(1, T, dtype=torch.bool))
        rows = together.mask[b]
        assert alone.mask.all()
        assert rows.sum() == alone.mask.shape[1] == sum(-(-T // 2 ** l) for l in range(3))
        for name in ("cls_logits", "offsets", "p_tiou", "p_tnd"):
            assert torch.allclose(getattr(together, name)[b][rows], getattr(alone, name)[0], atol=1e-5), name


def test_quality_branches_start_apart_so_that_the_joint_score_has_a_gradient():
    out = small_detector()(torch.randn(2, 20, 6), torch.ones(2, 20, dtype=torch.bool))
    assert (out.p_tiou - out.p_tnd).min() > 0.1
    plain = small_detector("none")(torch.randn(1, 8, 6), torch.ones(1, 8, dtype=torch.bool))
    assert (plain.p_tiou == 1).all()
    assert (plain.p_tnd == 0).all()
    assert "quality.tnd.weight" not in dict(small_detector("diou").named_parameters())


def test_offsets_start_positive_so_that_neither_side_dies():
    detector = small_detector(offset_bias=1.0).eval()
    offsets = detector(0.1 * torch.randn(2, 40, 6), torch.ones(2, 40, dtype=torch.bool)).offsets
    assert (offsets > 0).float().mean((0, 1)).min() > 0.9


def test_windows_and_ranges_must_agree():
    with pytest.raises(ValueError, match="2 windows for 3"):
        small_detector(windows=(5, 5))


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""
    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.size = max([self.size, *(x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor))])
        return result


def test_detection_of_a_long_video_needs_memory_in_proportion_to_its_length():
    detector, sizes = small_detector(windows=(5, 5, 5)).eval(), []
    for T in (10_000, 100_000):
        with Largest() as largest, torch.no_grad():
            outputs = detector(torch.randn(1, T, 6), torch.ones(1, T, dtype=torch.bool))
            evaluate.suppress(outputs, settings())
        sizes.append(largest.size)
    assert outputs.mask.sum() == 175_000
    assert sizes[0] > 10_000
    assert sizes[1] < 10.1 * sizes[0]


def assign_by_hand(points, segments, labels, K, radius=1.5):
    P = len(points.time)
    cls, off = torch.zeros(P, K), torch.zeros(P, 2)
    for p in range(P):
        t, stride = float(points.time[p]), float(points.stride[p])
        best = []
        for n, (s, e) in enumerate(segments.tolist()):
            mid = (s + e) / 2
            inside = t > max(mid - radius * stride, s) and t < min(mid + radius * stride, e)
            if inside and float(points.low[p]) <= max(t - s, e - t) <= float(points.high[p]):
                best.append((e - s, n))
        for length, n in best:
            if length <= min(best)[0] + 1e-3:
                cls[p, labels[n]] = 1
        if best:
            s, e = segments[min(best)[1]].tolist()
            off[p] = torch.tensor([t - s, e - t]) / stride
    return cls, off


def test_target_assignment_against_a_loop_with_a_twice_labelled_segment():
    detector, rng = small_detector(), np.random.default_rng(0)
    points = detector.points(50)
    start = rng.uniform(0, 40, 8)
    segments = torch.tensor(np.stack([start, start + rng.uniform(0.5, 20, 8)], 1), dtype=torch.float32)
    segments = torch.cat([segments, segments[:1]])  # the same segment with another class
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2])
    cls, off = model.assign_targets(points, [segments, torch.zeros(0, 2)], [labels, torch.zeros(0, dtype=torch.long)], 3)
    by_hand = assign_by_hand(points, segments, labels, 3)
    assert torch.equal(cls[0], by_hand[0])
    assert torch.allclose(off[0][cls[0].any(-1)], by_hand[1][cls[0].any(-1)], atol=1e-5)
    assert (cls[0].sum(-1) == 2).any()  # the twice labelled one
    assert not cls[1].any()
    positive = cls[0].any(-1)
    decoded = model.decode(points, off)[0][positive]
    assert (torch.cdist(decoded, segments).min(1).values < 1e-3).all()


def test_assignment_of_a_batch_without_any_segment():
    cls, off = model.assign_targets(small_detector().points(9), [torch.zeros(0, 2)] * 2, [torch.zeros(0, dtype=torch.long)] * 2, 3)
    assert cls.shape == (2, 9 + 5 + 3, 3)
    assert not cls.any() and not off.any()


def test_soft_nms_against_a_loop():
    rng = np.random.default_rng(1)
    start = rng.uniform(0, 20, 60)
    segments = torch.tensor(np.stack([start, start + rng.uniform(1, 6, 60)], 1))
    scores, groups = torch.tensor(rng.uniform(0.1, 1, 60)), torch.tensor(rng.integers(0, 4, 60)) * 7
    index, decayed = model.soft_nms(segments, scores, groups, 0.5, 0.2, 10)
    expected = []
    for g in groups.unique():
        left = {i: float(scores[i]) for i in (groups == g).nonzero()[:, 0].tolist()}
        for _ in range(10):
            if not left or max(left.values()) < 0.2:
                break
            best = max(left, key=left.get)
            expected.append((left.pop(best), best))
            left = {i: v * math.exp(-float(model.tiou(segments[best], segments[i])) ** 2 / 0.5) for i, v in left.items()}
    expected.sort(reverse=True)
    assert index.tolist() == [i for _, i in expected]
    assert torch.allclose(decayed, torch.tensor([v for v, _ in expected], dtype=decayed.dtype))


def test_soft_nms_gives_each_detection_once_even_where_scores_vanish():
    segments, scores = torch.tensor([[0.0, 10.0]]).expand(120, 2), torch.rand(120)
    index, decayed = model.soft_nms(segments, scores, torch.zeros(120, dtype=torch.long), 0.5, 0.0, 200)
    assert len(index.unique()) == len(index)
    assert decayed.min() > 0


def test_soft_nms_of_nothing():
    for scores in (torch.zeros(0), torch.tensor([0.0001])):
        index, decayed = model.soft_nms(torch.zeros(len(scores), 2), scores, torch.zeros(len(scores), dtype=torch.long), 0.5, 0.001, 5)
        assert len(index) == len(decayed) == 0


def test_complexity_table_is_the_papers(capsys):
    model.main()
    table = capsys.readouterr().out
    for figure in ("26,016,768", "3,179,542", "3,182,616", "524,545", "30.608", "14.422", "14.436"):
        assert figure in table.replace("26.017 M, 30.608 G", "").replace("3.179 M, 14.422 G", "").replace("3.182 M, 14.436 G", "")


# ---- alqa.py --------------------------------------------------------------------------------------------------------

def test_classification_loss_has_its_minimum_at_the_soft_label_and_focal_loss_has_not():
    for y in (0.12, 0.3, 0.9):
        p = torch.linspace(0.01, 0.99, 99)
        loss = alqa.classification_loss(torch.logit(p)[:, None], torch.ones(99), torch.zeros(99), torch.full((99, 1), y))
        assert abs(float(p[loss.argmin()]) - y) < 0.011
        focal = alqa.focal_loss(torch.logit(p), torch.full((99,), y))
        assert abs(float(p[focal.argmin()]) - y) > 0.08


def test_joint_score_clamps_a_negative_reliability():
    score = alqa.joint_score(torch.tensor([[0.5, 0.2]]), torch.tensor([0.1]), torch.tensor([0.4]))
    assert torch.allclose(score, torch.tensor([[0.5e-6, 0.2e-6]]))
    assert torch.allclose(alqa.joint_score(torch.tensor([[0.5]]), torch.tensor([0.9]), torch.tensor([0.1])), torch.tensor([[0.4]]))


@pytest.mark.parametrize("branches", model.BRANCHES)
@pytest.mark.parametrize("form", ["bce", "kl"])
def test_losses_are_finite_with_and_without_positives(branches, form):
    detector = small_detector(branches).train()
    out = detector(torch.randn(2, 16, 6), torch.ones(2, 16, dtype=torch.bool))
    for segments, labels in ((torch.tensor([[2.0, 9.0]]), torch.tensor([1])), (torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))):
        cls, off = model.assign_targets(out.points, [segments] * 2, [labels] * 2, 3)
        losses = alqa.detection_losses(out, cls, off, out.mask, branches, form)
        total = losses["cls"] + losses["reg"] + losses["quality"]
        grads = torch.autograd.grad(total, list(detector.parameters()), allow_unused=True, retain_graph=True)
        assert all(g.isfinite().all() for g in grads if g is not None)
        assert (losses["positives"] > 0) == (len(labels) > 0)
        assert (losses["quality"] > 0) == (len(labels) > 0 and branches != "none")


@pytest.mark.parametrize("form", ["bce", "kl"])
def test_quality_loss_is_least_at_the_target(form):
    p, zero = torch.linspace(0.01, 0.99, 99), torch.zeros(99)
    loss = alqa.quality_loss(p, zero, torch.full((99,), 0.7), zero, "tiou", form)
    assert float(p[loss.argmin()]) == pytest.approx(0.7, abs=0.011)
    diou = alqa.quality_loss(p, zero, torch.full((99,), 0.7), torch.full((99,), 0.2), "diou", form)
    assert float(p[diou.argmin()]) == pytest.approx(0.5, abs=0.011)


def test_kl_is_another_loss_than_bce():
    p = torch.tensor([0.2], requires_grad=True)
    loss = lambda form: alqa.quality_loss(p, p * 0, torch.tensor([0.7]), p * 0, "tiou", form).sum()
    assert not torch.allclose(torch.autograd.grad(loss("bce"), p)[0], torch.autograd.grad(loss("kl"), p)[0], rtol=0.1)


@pytest.mark.parametrize("source", alqa.SOFT_LABELS)
def test_quality_targets_and_soft_labels_carry_no_gradient(source):
    out = small_detector().train()(torch.randn(1, 16, 6), torch.ones(1, 16, dtype=torch.bool))
    leaves = {key: getattr(out, key).detach().requires_grad_() for key in ("offsets", "cls_logits", "p_tiou", "p_tnd")}
    out = out._replace(**leaves)
    cls, off = model.assign_targets(out.points, [torch.tensor([[2.0, 9.0]])], [torch.tensor([1])], 3)
    losses = alqa.detection_losses(out, cls, off, out.mask, "tiou+tnd", "bce", source)
    gradients = lambda loss, *keys: torch.autograd.grad(loss, [leaves[key] for key in keys], allow_unused=True, retain_graph=True)
    assert gradients(losses["cls"] + losses["quality"], "offsets") == (None,)
    assert gradients(losses["reg"], "offsets")[0].abs().sum() > 0
    positive, Y = cls.any(-1), torch.zeros_like(cls)
    overlaps = alqa.overlap(out.offsets[positive], off[positive]) if source == "computed" else (out.p_tiou[positive], out.p_tnd[positive])
    Y[positive] = alqa.soft_label(cls[positive], *overlaps, "tiou+tnd").detach()
    expected = alqa.classification_loss(out.cls_logits, out.p_tiou, out.p_tnd, Y)[out.mask].sum()
    for mine, theirs in zip(*(gradients(loss, "cls_logits", "p_tiou", "p_tnd") for loss in (losses["cls"], expected))):
        assert torch.allclose(mine, theirs, atol=1e-6) and mine.abs().sum() > 0


def detections(*scores, labels=None):
    s = torch.tensor(scores)
    return {"scores": s, "labels": torch.zeros(len(s), dtype=torch.long) if labels is None else torch.tensor(labels)}


def test_selection_keeps_scores_of_mean_plus_std():
    (a, b, empty), theta = alqa.select([detections(0.9, 0.5, 0.1), detections(0.3, 0.2), detections()], 0.15, "mean+std", 0.3, "video")
    assert a["scores"].tolist() == pytest.approx([0.9, 0.5])  # theta_l dropped 0.1
    assert a["positive"].tolist() == [True, False]  # population std: 0.7 + 0.2 reaches 0.9
    assert b["positive"].tolist() == [True, False]
    assert theta[:2] == pytest.approx([0.9, 0.3])
    assert len(empty["positive"]) == 0


def test_selection_scopes_and_thresholds():
    videos = [detections(0.9, 0.5, labels=[0, 1]), detections(0.3, 0.2, labels=[0, 1])]
    pick = lambda *how: [r["positive"].tolist() for r in alqa.select(videos, 0.15, *how)[0]]
    assert pick("mean+std", 0.3, "dataset") == [[True, False], [False, False]]
    assert pick("mean", 0.3, "dataset") == [[True, True], [False, False]]
    assert pick("mean-std", 0.3, "dataset") == [[True, True], [True, False]]  # 0.475 - 0.268
    assert pick("mean", 0.3, "class") == [[True, True], [False, False]]
    assert pick("mean+std", 0.3, "class") == [[True, True], [False, False]]
    assert pick("fixed", 0.3, "video") == [[True, True], [True, False]]
    assert alqa.select([], 0.15, "mean", 0.3, "dataset") == ([], [])


def test_thresholds_by_class_frequency_are_lower_for_rare_classes():
    d = detections(0.9, 0.2, 0.5, 0.11, 0.3, labels=[0, 0, 0, 0, 1])
    (r,), theta = alqa.select([d], 0.1, "frequency", 0.3, "video")
    assert theta == pytest.approx([0.3, 0.3 * 0.5 / 1.5])
    assert r["positive"].tolist() == [True, False, True, False, True]


def test_reranking_lowers_what_is_spread_over_its_length():
    d = {"segments": torch.tensor([[0.0, 10.0], [0.0, 14.0], [50.0, 60.0], [0.0, 10.0]]), "labels": torch.tensor([0, 0, 0, 1]),
         "scores": torch.tensor([0.5, 0.5, 0.8, 0.4])}
    scores = alqa.rerank(d, 0.5)["scores"].tolist()
    assert scores == pytest.approx([0.5 * math.exp(-2 / 10), 0.5 * math.exp(-2 / 14), 0.8, 0.4], rel=1e-4)
    assert len(alqa.rerank({k: v[:0] for k, v in d.items()}, 0.5)["scores"]) == 0


def test_repeats_are_removed_within_their_class():
    d = {"segments": torch.tensor([[0.0, 9.0], [0.0, 10.0], [0.0, 10.0], [8.0, 20.0], [0.0, 8.0]]), "labels": torch.tensor([0, 0, 1, 0, 0]),
         "scores": torch.tensor([0.5, 0.9, 0.4, 0.3, 0.2])}
    kept = alqa.without_repeats(d, 0.5, exclusive=False)
    assert kept["scores"].tolist() == pytest.approx([0.9, 0.4, 0.3])
    assert alqa.without_repeats(d, 0.5, exclusive=True)["scores"].tolist() == pytest.approx([0.9, 0.3])
    assert len(alqa.without_repeats(d, 1.0, exclusive=True)["scores"]) == 5
    assert len(alqa.without_repeats({k: v[:0] for k, v in d.items()}, 0.5, exclusive=True)["scores"]) == 0


def test_classes_share_segments_where_two_labels_overlap():
    def video(segments, labels):
        return SimpleNamespace(segments=torch.tensor(segments), labels=torch.tensor(labels))
    apart = video([[0.0, 10.0], [8.0, 20.0], [0.0, 9.0]], [0, 1, 0])  # a repeat of one class is none of another
    assert not alqa.classes_share_segments([apart], 0.5)
    assert alqa.classes_share_segments([apart, video([[0.0, 10.0], [1.0, 10.0]], [0, 1])], 0.5)
    assert not alqa.classes_share_segments([], 0.5)


def test_exclusive_drops_second_classes_only_where_the_labels_have_none(own):
    shared = data.load_dataset(settings(*own_argv(own))).labelled[0].id
    argv = own_argv(own, "--theta-l", 0.0, "--min-score", 0.0, "--pre-nms", 200)

    def overlapping(*more):
        """Whether a video has two pseudo labels or candidates of different classes with tIoU over 0.5."""
        run = train.launch(settings(*argv, *more))
        return alqa.classes_share_segments([SimpleNamespace(**r) for r in train.make_pseudo_labels(run).values()], 0.5)
    assert overlapping("--no-exclusive")
    assert not overlapping("--exclusive")
    edit(own, lambda database: database[shared]["annotations"].append(
        database[shared]["annotations"][0] | {"label": "AB"[database[shared]["annotations"][0]["label"] == "A"]}))
    assert overlapping("--exclusive")


# ---- icd.py ---------------------------------------------------------------------------------------------------------

def bank(labels, keys=None, dim=4):
    n = len(labels)
    return {"feats": torch.randn(n, dim), "labels": torch.tensor(labels), "keys": torch.arange(n) if keys is None else torch.tensor(keys)}


def test_sampled_sets_hold_the_class_and_never_the_same_segment():
    b = bank([0, 0, 0, 1, 1, 2], keys=[0, 1, 2, 0, 3, 4])  # instance 3 is instance 0 under another class
    for seed in range(20):
        pos, neg = icd.sample_sets(b, 0, 10, generator(seed))
        assert len(pos) == len(neg) == 10  # with replacement, there being fewer
        assert set(pos.tolist()) <= {1, 2}
        assert set(neg.tolist()) <= {4, 5}
    pos, neg = icd.sample_sets(bank([0] * 30 + [1] * 30), 0, 10, generator())
    assert len(set(pos.tolist())) == len(set(neg.tolist())) == 10  # without, there being enough
    pos, neg = icd.sample_sets(bank([0]), 0, 10, generator())
    assert len(pos) == len(neg) == 0


def test_icd_loss_learns_and_survives_a_single_instance():
    D = icd.Discriminator(4)
    alone = icd.icd_loss(D, bank([0]), [0], 10, generator())
    assert float(alone.detach()) == 0
    alone.backward()
    assert float(icd.icd_loss(D, bank([0, 1]), [], 10, generator()).detach()) == 0
    b = bank([0, 1] * 20)
    b["feats"][:, 0] = 6.0 * b["labels"] - 3
    adam, losses = torch.optim.Adam(D.parameters(), lr=1e-2), []
    for step in range(150):
        losses.append(icd.icd_loss(D, b, range(10), 10, generator(step)))
        adam.zero_grad(), losses[-1].backward(), adam.step()
    assert float(losses[-1].detach()) < 0.5 * float(losses[0].detach())


def test_similarity_is_the_mean_over_labelled_instances_of_the_class():
    D, b = icd.Discriminator(4).eval(), bank([0, 0, 2])
    feats, labels = torch.randn(3, 4), torch.tensor([0, 1, 2])
    s = icd.similarity(D, feats, labels, b)
    by_hand = [float(torch.sigmoid(D(feats[:1], b["feats"][j:j + 1])).detach()) for j in (0, 1)]
    assert float(s[0]) == pytest.approx(np.mean(by_hand), abs=1e-6)
    assert s[1].isnan()  # a class without labelled instances
    assert len(icd.similarity(D, feats[:0], labels[:0], b)) == 0


def test_refinement_drops_and_mines():
    s = torch.tensor([0.2, 0.5, 0.9, 0.8, 0.6, 0.9])
    b = {"feats": torch.zeros(1, 1), "labels": torch.tensor([0])}  # class 1 has no labelled instance: similarity NaN
    D = lambda a, _: torch.logit(a[:, 0])

    def words(*how):
        r = {"segments": torch.arange(6.0)[:, None].expand(6, 2), "labels": torch.tensor([0, 0, 1, 0, 0, 1]),
             "positive": torch.tensor([True, True, True, False, False, False])}
        icd.compare(r, D, b, s[:, None], "max")
        icd.refine_pseudo_labels([r], 0.3, 0.7, *how)
        assert r["similarity"].isnan().tolist() == [False, False, True, False, False, True]
        assert "positive" not in r
        return [icd.STATUS[i] for i in r["status"]]
    assert words("eap+mpp", "fixed") == ["dropped", "kept", "kept", "mined", "candidate", "candidate"]
    assert words("eap", "fixed") == ["dropped", "kept", "kept", "candidate", "candidate", "candidate"]
    assert words("mpp", "fixed") == ["kept", "kept", "kept", "mined", "candidate", "candidate"]
    assert words("none", "fixed") == ["kept", "kept", "kept", "candidate", "candidate", "candidate"]


def test_adaptive_thresholds_are_the_best_cut_in_three():
    s = torch.rand(12)
    x = sorted(s.tolist())
    error = lambda part: sum((v - np.mean(part)) ** 2 for v in part)
    cuts = {(i, j): error(x[:i]) + error(x[i:j]) + error(x[j:]) for i in range(1, 11) for j in range(i + 1, 12)}
    i, j = min(cuts, key=cuts.get)
    assert icd.split_in_three(s) == pytest.approx(((x[i - 1] + x[i]) / 2, (x[j - 1] + x[j]) / 2))
    assert icd.split_in_three(torch.tensor([0.1, 0.5, 0.9])) == pytest.approx((0.3, 0.7))
    for few in ([], [0.5], [0.2, 0.2, 0.6, 0.6]):
        assert icd.split_in_three(torch.tensor(few)) == (0, 1)


def test_adaptive_refinement_has_the_thresholds_of_each_class():
    low, high = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.7, 0.8, 0.9])
    positive = torch.tensor([True, True, False])
    records = [{"labels": torch.full((3,), c), "similarity": s, "positive": positive.clone()} for c, s in ((0, low), (1, high))]
    icd.refine_pseudo_labels(records, 0.3, 0.7, "eap+mpp", "adaptive")
    assert [[icd.STATUS[i] for i in r["status"]] for r in records] == [["dropped", "kept", "mined"]] * 2
    icd.refine_pseudo_labels([], 0.3, 0.7, "eap+mpp", "adaptive")


def test_pooling_takes_steps_inside_or_the_nearest():
    feats = torch.arange(10.0)[:, None]
    segments = torch.tensor([[1.5, 4.0], [2.2, 2.7], [-3.0, -1.0], [8.5, 30.0]])
    assert icd.pool_instances(feats, segments, "max")[:, 0].tolist() == [4, 2, 0, 9]
    assert icd.pool_instances(feats, segments, "mean")[:, 0].tolist() == [3, 2, 0, 9]
    assert icd.pool_instances(feats, segments[:0], "max").shape == (0, 1)


def test_bank_gives_one_key_to_a_twice_labelled_segment():
    segments, labels = torch.tensor([[1.0, 3.0], [1.0, 3.0], [4.0, 6.0]]), torch.tensor([0, 1, 0])
    b = icd.bank_of(({"id": name, "feats": torch.randn(9, 4), "segments": segments, "labels": labels} for name in "ab"), "max")
    assert b["keys"].tolist() == [0, 0, 1, 2, 2, 3]
    assert b["videos"] == ["a"] * 3 + ["b"] * 3
    assert b["feats"].shape == (6, 4)


# ---- acp.py ---------------------------------------------------------------------------------------------------------

def test_sampled_steps_come_one_from_each_part():
    for seed in range(20):
        steps = acp.sample_steps([400, 40, 7, 1], 40, generator(seed))
        assert torch.equal(steps[0] // 10, torch.arange(40))
        assert torch.equal(steps[1], torch.arange(40))
        assert steps[2].max() == 6
        assert (steps[3] == 0).all()


def test_representation_is_the_upsampled_and_concatenated_pyramid():
    levels = [torch.randn(2, 16 // 2 ** l, 3) for l in range(3)]
    masks = [torch.ones(2, 16 // 2 ** l, dtype=torch.bool) for l in range(3)]
    whole = torch.cat([F.interpolate(x.transpose(1, 2), size=16, mode="linear", align_corners=False) for x in levels], 1).transpose(1, 2)
    steps = torch.tensor([[0, 1, 5, 8, 15], [2, 3, 4, 14, 15]])
    assert torch.allclose(acp.representation(levels, masks, steps), whole.gather(1, steps[..., None].expand(-1, -1, 9)), atol=1e-6)


def test_kmeans_finds_the_best_partition_and_is_seeded():
    x = torch.cat([torch.randn(6, 2) + 8 * torch.tensor(c) for c in ([0.0, 0.0], [1.0, 0.0], [0.0, 1.0])])
    cluster = acp.kmeans(x, 3, generator())
    groups = [cluster[i:i + 6].unique().tolist() for i in (0, 6, 12)]
    assert sorted(groups) == [[0], [1], [2]]
    assert torch.equal(cluster, acp.kmeans(x, 3, generator()))
    y = torch.randn(7, 2)

    def cost(c):
        return sum(float(((y[c == k] - y[c == k].mean(0)) ** 2).sum()) for k in c.unique())
    best = min(cost(torch.tensor([(n >> i) & 1 for i in range(7)])) for n in range(128))
    assert cost(acp.kmeans(y, 2, generator())) == pytest.approx(best, rel=1e-4)


def test_kmeans_of_few_or_equal_rows():
    assert len(acp.kmeans(torch.zeros(0, 3), 2, generator())) == 0
    assert acp.kmeans(torch.ones(5, 3), 4, generator()).shape == (5,)
    assert len(acp.kmeans(torch.tensor([[0.0], [1.0]]), 4, generator()).unique()) == 2


def test_info_nce_against_a_loop():
    z, labels, tau = torch.randn(7, 5), torch.tensor([0, 0, 1, 1, 1, 2, 0]), 0.2
    unit = F.normalize(z, dim=-1)
    e = torch.exp(unit @ unit.T / tau)
    anchors = []
    for i in range(7):
        P = [p for p in range(7) if p != i and labels[p] == labels[i]]
        N = [n for n in range(7) if labels[n] != labels[i]]
        if P and N:
            anchors.append(np.mean([math.log(e[i, p] / (e[i, p] + sum(e[i, n] for n in N))) for p in P]))
    assert float(acp.info_nce(z, labels, tau)) == pytest.approx(-np.mean(anchors), abs=1e-5)
    for alone in (torch.zeros(7), torch.arange(7)):  # no negative, no positive
        assert float(acp.info_nce(z, alone, tau)) == 0
    assert float(acp.info_nce(z[:0], labels[:0], tau)) == 0


def test_step_classes_know_action_background_and_the_rejected():
    steps, segments = torch.arange(10), torch.tensor([[0.0, 6.0], [2.0, 3.0]])
    classes = acp.step_classes(steps, segments, torch.tensor([4, 1]), torch.tensor([[5.0, 8.0]]), 9)
    assert classes.tolist() == [4, 4, 1, 1, 4, 4, 4, -1, -1, 9]
    assert acp.step_classes(steps, segments[:0], torch.zeros(0, dtype=torch.long), segments[:0], 9).unique().tolist() == [9]


@pytest.mark.parametrize("kinds", ["coarse", "fine", "coarse+fine"])
def test_acp_loss_has_a_gradient_and_ignores_padding(kinds):
    detector, feats = small_detector(), torch.randn(2, 30, 6)
    mask = torch.ones(2, 30, dtype=torch.bool)
    nothing = {"segments": torch.zeros(0, 2), "labels": torch.zeros(0, dtype=torch.long), "rejected": torch.zeros(0, 2)}
    some = {"segments": torch.tensor([[3.0, 12.0]]), "labels": torch.tensor([1]), "rejected": torch.zeros(0, 2)}
    for instances in (None, [some, some], [some, nothing], [nothing, nothing]):
        losses = []
        for pad in (0, 19):
            out = detector(F.pad(feats, (0, 0, 0, pad)), F.pad(mask, (0, pad)))
            losses.append(acp.acp_loss(out.levels, out.masks, F.pad(feats, (0, 0, 0, pad)), instances, 3, kinds, 10, 4, 0.1, generator()))
        assert torch.allclose(losses[0], losses[1], atol=1e-4)
        losses[0].backward()
        assert (float(losses[0].detach()) > 0) == (instances is None or instances[0] is some)


# ---- data.py --------------------------------------------------------------------------------------------------------

def settings(*argv):
    return train.parse_settings([str(a) for a in argv])


TINY = ("--channels", 16, "--heads", 2, "--windows", 5, "--ranges", "0:8,8:16,16:inf", "--pretrain-epochs", 2, "--supervised-epochs", 2,
        "--supervised-steps", 4, "--joint-epochs", 2, "--max-steps", 96, "--acp-steps", 10, "--log-every", 5, "--device", "cpu",
        "--precision", "float32")


@pytest.fixture
def own(tmp_path):
    """A small data set of a user's own: 10 training and 4 test videos of 64 steps, 2 steps a second, 5 channels, 2 classes."""
    rng = np.random.default_rng(0)
    (tmp_path / "features").mkdir()
    database = {}
    for i in range(14):
        x = rng.normal(size=(64, 5)).astype(np.float32)
        annotations = []
        for k, (start, end) in enumerate([(2.0, 8.0), (12.0, 20.0), (24.0, 28.0)]):
            x[int(2 * start):int(2 * end), (i + k) % 2] += 3
            annotations.append({"segment": [start, end], "label": "AB"[(i + k) % 2]})
        np.save(tmp_path / f"features/v{i}.npy", x)
        database[f"v{i}"] = {"subset": "Training" if i < 10 else "validation", "duration": 32.5, "fps": 50, "annotations": annotations}
    (tmp_path / "own.json").write_text(json.dumps({"database": database}))
    return tmp_path


def own_argv(own, *more):
    return [str(a) for a in ("--dataset", own / "own.json", "--features", own / "features", "--stride", 25, "--frames", 50, "--ratio", 0.3,
                             "--out", own / "run", *TINY, *more)]


def edit(own, change):
    """Change the user's annotation file in place."""
    content = json.loads((own / "own.json").read_text())
    change(content["database"])
    (own / "own.json").write_text(json.dumps(content))


def test_seconds_and_grid_are_inverse_and_right():
    grid = data.Grid(fps=30.0, stride=4.0, frames=16.0)
    assert grid.to_grid(0.0) == -2.0  # feature 0 sees frames 0-15: its centre is 8 frames in
    assert grid.to_seconds(0.0) == pytest.approx(8 / 30)
    assert grid.span(3) == pytest.approx((8 + 16) / 30)
    t = torch.rand(50) * 100
    assert torch.allclose(grid.to_seconds(grid.to_grid(t)), t, atol=1e-4)


def test_datasets_open_with_their_presets(own):
    d = data.load_dataset(settings(*own_argv(own)))
    assert (len(d.labelled), len(d.unlabelled), len(d.test), d.classes, d.dim) == (3, 7, 4, ["A", "B"], 5)
    assert d.labelled[0].segments[0].tolist() == [2 * 2 - 1, 8 * 2 - 1]  # (t * 50 - 25) / 25
    thumos = settings("--dataset", "thumos", "--ratio", 0.1)
    assert (thumos.stride, thumos.frames, thumos.channels, thumos.t_plus, thumos.tiou) == (4, 16, 512, 100, "0.3:0.7:0.1")
    anet = settings("--dataset", "activitynet", "--lr", 0.5)
    assert (anet.resize, anet.nms_sigma, anet.lambda_reg, anet.scope, anet.lr) == (192, 0.75, 2, "dataset", 0.5)
    for name in [*train.PRESETS, "x.json"]:
        s = settings("--dataset", name)
        assert evaluate.build_detector(s, 8, 2).ranges.shape == (6, 2)


def test_annotations_as_users_have_them(own):
    def change(database):
        for i, entry in enumerate(database.values()):
            entry["subset"] = ["TRAINING", "training", "Training"][i % 3] if i < 10 else "Validation"
            del entry["fps"]
            for a in entry["annotations"]:
                a["label_id"] = str(10 - ord(a["label"]) + ord("A"))  # strings, and B before A
        database["v0"]["annotations"][2]["segment"] = [30.0, 34.0]  # half past the end: clipped
        del database["v1"]["annotations"]
    edit(own, change)
    d = data.load_dataset(settings(*own_argv(own, "--fps", 50, "--ratio", 1.0, "--stage", "supervised")))
    assert d.classes == ["B", "A"]
    assert len(d.labelled) == 10
    assert d.labelled[0].segments[2].tolist() == [30 * 2 - 1, 32.5 * 2 - 1]
    assert len(d.labelled[1].segments) == 0


def test_resizing_keeps_the_seconds(own):
    s = settings(*own_argv(own, "--resize", 48))
    d = data.load_dataset(s)
    video = d.labelled[0]
    assert data.load_item(video, d, s)["feats"].shape == (48, 5)
    assert evaluate.in_seconds(video, video.segments)[0].tolist() == pytest.approx([2.0, 8.0], abs=1e-5)
    assert video.grid.to_seconds(47.5) == pytest.approx(32.5)  # the last half step ends where the last feature does
    same_length = data.load_dataset(settings(*own_argv(own, "--resize", 64))).labelled[0]
    assert len(data.load_item(same_length, d, s, np.random.default_rng(0))["feats"]) == 64  # never cropped


def test_a_grid_that_does_not_fit_the_annotations_is_pointed_out(own, capsys):
    data.load_dataset(settings(*own_argv(own)))
    assert capsys.readouterr().err == ""
    data.load_dataset(settings(*own_argv(own, "--stride", 1, "--frames", 1, "--bad-segments", "skip")))
    text = capsys.readouterr().err
    assert "14 videos" in text and "--stride" in text and text.count("\n") == 1


def test_npz_features(own):
    for path in (own / "features").glob("*.npy"):
        np.savez(path.with_suffix(".npz"), feats=np.load(path))
        path.unlink()
    assert data.load_dataset(settings(*own_argv(own, "--extension", ".npz"))).dim == 5
    with pytest.raises(data.BadInput, match="no array named 'x'"):
        data.load_dataset(settings(*own_argv(own, "--extension", ".npz", "--feature-key", "x")))


def test_standardisation_uses_all_training_videos_and_no_test_video(own):
    d = data.load_dataset(settings(*own_argv(own)))
    x = np.concatenate([np.load(own / f"features/v{i}.npy") for i in range(10)])
    assert np.allclose(d.mean, x.mean(0), atol=1e-5)
    assert np.allclose(d.std, x.std(0), atol=1e-5)
    d = data.load_dataset(settings(*own_argv(own, "--no-standardize")))
    assert not d.mean.any() and (d.std == 1).all()


def videos_of(*labels):
    return {f"v{i}": data.Annotation("training", 10.0, 1.0, np.array([[0.0, 1.0]] * len(l)), list(l)) for i, l in enumerate(labels)}


def test_splits(tmp_path):
    many = videos_of(*["ab"] * 18, "c", "d")
    uniform = data.split_videos(many, 0.2, "uniform", 0)
    assert len(uniform) == 4
    assert uniform == data.split_videos(many, 0.2, "uniform", 0)
    assert uniform != data.split_videos(many, 0.2, "uniform", 1)
    for seed in range(10):
        chosen = data.split_videos(many, 0.2, "stratified", seed)
        assert {"v18", "v19"} < set(chosen)  # the only videos of c and d
        assert len(set(chosen)) == 4
    (tmp_path / "s.json").write_text('{"labelled": ["v3", "v1"]}')
    (tmp_path / "s.txt").write_text("v_v2\nv5\n")
    assert data.split_videos(many, 0.1, str(tmp_path / "s.json"), 0) == ["v1", "v3"]
    assert data.split_videos(many, 0.1, str(tmp_path / "s.txt"), 0) == ["v2", "v5"]


def test_unlabelled_items_have_no_label_field_audited_or_not(own):
    for argv in ((), ("--audit",)):
        s = settings(*own_argv(own, *argv))
        d = data.load_dataset(s)
        for video in d.unlabelled + d.test:
            assert type(video) is data.Video
            assert not hasattr(video, "labels") and not hasattr(video, "segments")
            assert set(data.load_item(video, d, s)) == {"id", "video", "feats", "start"}
        batch = data.collate([data.load_item(v, d, s) for v in d.unlabelled[:2]])
        assert "labels" not in batch and "segments" not in batch
        assert bool(d.hidden) == bool(argv)


def test_unlabelled_crops_are_blind_to_labels(own):
    def crops():
        s = settings(*own_argv(own, "--max-steps", 20))
        d = data.load_dataset(s)
        rng = np.random.default_rng(3)
        return [data.load_item(v, d, s, rng)["start"] for v in d.unlabelled for _ in range(10)]
    before = crops()
    edit(own, lambda db: [e["annotations"].clear() for e in list(db.values())[:10]])
    assert crops() == before
    assert len(set(before)) > 5


def test_labelled_crops_hold_an_action(own):
    s = settings(*own_argv(own, "--max-steps", 20))
    d = data.load_dataset(s)
    rng = np.random.default_rng(0)
    items = [data.load_item(d.labelled[0], d, s, rng) for _ in range(40)]
    assert all(len(i["feats"]) == 20 for i in items)
    assert all(len(i["segments"]) for i in items)
    assert all(i["segments"].min() >= -0.5 and i["segments"].max() <= 19.5 for i in items)
    whole = data.load_item(d.labelled[0], d, s)
    start = items[0]["start"]
    assert torch.equal(items[0]["feats"], whole["feats"][start:start + 20])


def test_batches_are_padded_to_their_longest_video_only():
    d = data.load_dataset(settings())
    batch = next(data.training_batches(d.labelled, d, settings("--batch", 3), 1, np.random.default_rng(0)))
    lengths = batch["mask"].sum(1)
    assert batch["feats"].shape[:2] == (3, int(lengths.max()))
    assert not batch["feats"][~batch["mask"]].any()


def test_every_video_is_seen_once_a_pass_beside_one_of_like_length():
    videos = [data.Video(f"v{T}", None, "", None, T, 1.0, False) for T in range(100, 900, 100)]
    plan = data.plan_batches(videos, settings("--length-noise", 0), 8, 2, np.random.default_rng(0))
    for batches in (plan[:4], plan[4:]):
        assert sorted(i for batch in batches for i, _ in batch) == list(range(8))
        assert {tuple(sorted(i for i, _ in batch)) for batch in batches} == {(0, 1), (2, 3), (4, 5), (6, 7)}
    assert [i for batch in plan[:4] for i, _ in batch] != [i for batch in plan[4:] for i, _ in batch]
    assert len({seed for batch in plan for _, seed in batch}) == 16
    odd = data.plan_batches(videos[:3], settings(), 2, 2, np.random.default_rng(0))
    assert {i for batch in odd for i, _ in batch} == {0, 1, 2}
    assert all(len({i for i, _ in batch}) == 2 for batch in data.plan_batches(videos[:5], settings(), 30, 2, np.random.default_rng(0)))
    assert [[i for i, _ in batch] for batch in data.plan_batches(videos[:1], settings(), 1, 3, np.random.default_rng(0))] == [[0, 0, 0]]


@needs_shared
def test_batches_of_thumos_lengths_hold_little_padding():
    lengths = json.loads((SHARED / "data/thumos14/i3d_feature_lengths.json").read_text())
    videos = [data.Video(name, None, "", None, min(v["feature_length"], 2304), 1.0, False)
              for name, v in lengths.items() if "validation" in name]
    s = settings("--dataset", "thumos")
    plan = data.plan_batches(videos, s, len(videos) // 2, 2, np.random.default_rng(0))
    computed = sum(2 * max(videos[i].steps for i, _ in batch) for batch in plan)
    assert computed < 1.25 * sum(v.steps for v in videos)


def test_loading_ahead_keeps_the_order_and_passes_errors_on():
    assert list(data.ahead(lambda n: n * n, range(7))) == [0, 1, 4, 9, 16, 25, 36]
    assert list(data.ahead(len, [])) == []
    with pytest.raises(ZeroDivisionError):
        list(data.ahead(lambda n: 1 / n, [2, 1, 0, 1]))


@needs_shared
def test_thumos_annotations_and_real_clips_open(tmp_path):
    clips = SHARED / "data/thumos14/clips"
    d = data.load_dataset(settings("--dataset", "thumos", "--annotations", clips / "clips.json", "--features", clips,
                                   "--train-subset", "test", "--ratio", 0.5))
    assert d.dim == 2048
    assert [len(v.segments) for v in d.labelled] in ([1], [3])
    annotations = data.read_annotations(SHARED / "data/thumos14/thumos14.json")
    training = {n: a for n, a in annotations.items() if a.subset == "Validation"}
    uniform = data.split_videos(training, 0.1, "uniform", 0)
    missing = lambda ids: 20 - len({label for n in ids for label in training[n].labels})
    assert len(uniform) == 20
    assert missing(data.split_videos(training, 0.1, "stratified", 0)) == 0
    lacking = [missing(data.split_videos(training, 0.1, "uniform", seed)) for seed in range(100)]
    assert 5 < np.mean(lacking) < 7  # 6 of 20 on average
    assert sum((~data.good_segments(a, a.duration)).sum() for a in annotations.values()) >= 30


@needs_shared
def test_epic_and_activitynet_annotations_open():
    noun = data.read_annotations(SHARED / "data/epic/epic_kitchens_100_noun_reduced.json")
    names = data.class_names(noun.values())
    assert names == sorted(names, key=int)  # string ids, in the order of their numbers
    anet = {n: a for n, a in data.read_annotations(SHARED / "data/activitynet/activitynet_v1.3.json").items() if a.subset == "training"}
    labelled = data.split_videos(anet, 0.1, str(SHARED / "data/activitynet/sstap_labelled_10pct.txt"), 0)
    assert len(labelled) > 900


# ---- evaluate.py ----------------------------------------------------------------------------------------------------

def ap_by_hand(truth, found, tiou):
    """The toolkit's definition, detection by detection. truth [(video, segment)], found [(video, segment, score)]."""
    used, tp = set(), []
    for video, segment, _ in sorted(found, key=lambda f: -f[2]):
        free = [(float(model.tiou(torch.tensor(segment), torch.tensor(s))), i) for i, (v, s) in enumerate(truth)
                if v == video and i not in used]
        best = max(free, default=(0, None))
        tp.append(best[0] >= tiou)
        if tp[-1]:
            used.add(best[1])
    recall = np.cumsum(tp) / len(truth)
    precision = np.cumsum(tp) / np.arange(1, len(tp) + 1)
    steps = np.diff(np.concatenate([[0], recall]))
    return sum(step * max(precision[i:]) for i, step in enumerate(steps))


def test_map_against_a_loop():
    rng = np.random.default_rng(0)
    draw = lambda: np.cumsum([rng.uniform(0, 30), rng.uniform(2, 8)]).tolist()
    truth = {f"v{v}": data.Annotation("test", 40.0, 1.0, np.array([draw() for _ in range(5)]), list("aabab")) for v in range(4)}
    found = {f"v{v}": [{"label": "ab"[int(rng.integers(2))], "score": float(rng.uniform()), "segment": draw()} for _ in range(40)]
             for v in range(5)}
    metrics = evaluate.mean_average_precision(truth, found, [0.3, 0.5, 0.7])
    for label in "ab":
        t = [(v, s.tolist()) for v, a in truth.items() for s, l in zip(a.segments, a.labels) if l == label]
        f = [(v, d["segment"], d["score"]) for v, ds in found.items() for d in ds if d["label"] == label]
        assert metrics["ap"][label] == pytest.approx([ap_by_hand(t, f, x) for x in (0.3, 0.5, 0.7)], abs=1e-9)
    assert metrics["average_mAP"] == pytest.approx(np.mean(metrics["mAP"]))


def test_perfect_and_empty_predictions():
    truth = {"v": data.Annotation("test", 9.0, 1.0, np.array([[0.0, 2.0], [0.0, 2.0], [4.0, 5.0]]), ["a", "b", "a"])}
    found = {"v": [{"label": l, "score": 0.5, "segment": s.tolist()} for s, l in zip(truth["v"].segments, truth["v"].labels)]}
    assert evaluate.mean_average_precision(truth, found, [0.5])["mAP"] == [1.0]
    assert evaluate.mean_average_precision(truth, {"v": []}, [0.5])["mAP"] == [0.0]
    assert evaluate.mean_average_precision(truth, {}, [0.5])["average_mAP"] == 0.0
    twice = {"v": found["v"] + found["v"]}  # a duplicate is a false positive, but behind all true ones it costs nothing
    assert evaluate.mean_average_precision(truth, twice, [0.5])["ap"]["b"] == [1.0]


def test_predictions_of_a_class_that_the_subset_lacks_count_nowhere(own, capsys):
    edit(own, lambda database: [a.update(label="A") for name in ("v10", "v11", "v12", "v13") for a in database[name]["annotations"]])
    found = {"v10": [{"label": l, "score": 0.5, "segment": [2, 8]} for l in "AB"]}
    (own / "pred.json").write_text(json.dumps({"results": found}))
    argv = ["--pred", own / "pred.json", "--gt", own / "own.json", "--subset", "validation", "--json", own / "out.json"]
    assert evaluate.main([str(a) for a in argv]) == 0
    assert set(json.loads((own / "out.json").read_text())["ap"]) == {"A"}
    edit(own, lambda database: [database[name]["annotations"].clear() for name in ("v10", "v11", "v12", "v13")])
    refused(["evaluate", *(str(a) for a in argv)], capsys, "own.json", "no instance")
    refused(own_argv(own), capsys, "own.json", "no instance")


def test_threshold_lists():
    assert evaluate.parse_tious("0.3:0.7:0.1") == pytest.approx([0.3, 0.4, 0.5, 0.6, 0.7])
    assert len(evaluate.parse_tious("0.5:0.95:0.05")) == 10
    assert evaluate.parse_tious("0.5") == pytest.approx([0.5])
    for bad in ("x", "0.3:0.7", "0.3:0.7:0", "0", "1.5", ""):
        with pytest.raises(data.BadInput):
            evaluate.parse_tious(bad)


def test_detection_decodes_suppresses_and_exports_seconds():
    d, s = data.load_dataset(settings()), settings(*TINY)
    detector = evaluate.build_detector(s, d.dim, len(d.classes))
    detector.cls_out.bias.data.fill_(0.0)
    records = evaluate.detect(detector, d.test[:3], d, s, torch.device("cpu"))
    alone = evaluate.detect(detector, d.test[1:2], d, s, torch.device("cpu"))[0]
    assert 0 < len(records[1]["scores"]) <= s.max_detections
    assert (records[1]["scores"].diff() <= 0).all()
    n = min(20, len(alone["scores"]))
    assert torch.allclose(records[1]["scores"][:n], alone["scores"][:n], atol=1e-5)
    results = evaluate.export(d.test[:3], records, d.classes)["results"]
    for video in d.test[:3]:
        assert all(0 <= r["segment"][0] <= r["segment"][1] <= video.duration for r in results[video.id])
    assert {r["label"] for r in results[d.test[1].id]} <= set(d.classes)


def test_pseudo_label_quality_by_hand():
    hidden = data.LabelledVideo("v", None, "", data.Grid(1, 1, 1), 30, 30.0, False, torch.tensor([[0.0, 4.0], [10.0, 20.0]]),
                                torch.tensor([0, 1]))
    record = {"segments": torch.tensor([[0.0, 4.0], [0.0, 3.0], [10.0, 19.0], [25.0, 29.0]]), "labels": torch.tensor([0, 0, 2, 1]),
              "scores": torch.tensor([0.9, 0.8, 0.7, 0.6])}
    q = evaluate.pseudo_label_quality([record], [hidden])
    assert (q["precision"], q["recall"]) == (0.25, 0.5)  # a duplicate, a wrong class and a miss
    assert q["class_accuracy"] == 0.5
    assert q["positive_accuracy"] == 0.5
    assert q["mean_tIoU"] == pytest.approx((1 + 0.75 + 0.9) / 4)


# ---- train.py -------------------------------------------------------------------------------------------------------

def test_settings_refuse_what_they_do_not_know(own, capsys):
    refused(["--lamda-u", "3"], capsys, "--lamda-u")
    refused(["--lambda-", "3"], capsys, "--lambda-")  # no abbreviations
    refused(["--lambda-u", "x"], capsys, "--lambda-u", "'x'")
    with pytest.raises(TypeError, match="lamda_u"):
        train.Settings(lamda_u=3)
    with pytest.raises(data.BadInput, match="scope must be one of"):
        train.Settings(scope="videos")
    for name, value in (("batch", 0), ("clip", 0.0), ("ratio", "nan"), ("lr", "inf"), ("icd_dropout", 2.0), ("crop_min", 1.5),
                        ("lambda_u", -1.0)):
        refused([f"--{name.replace('_', '-')}", str(value)], capsys, f"setting {name} must be", value)
    refused(["--device", "tpu9"], capsys, "--device tpu9")


def test_every_setting_is_commented_and_read_somewhere():
    source = "".join((HERE / f).read_text() for f in ("train.py", "data.py", "evaluate.py"))
    for f in train.fields(train.Settings):
        assert len(f.metadata["comment"]) > 1, f.name
        assert re.search(rf"\b(s|self)\.{f.name}\b", source), f.name


def test_every_switch_has_its_choices_in_the_components():
    choices = {f.name: f.metadata["allowed"] for f in train.fields(train.Settings)}
    assert choices["alqa"] is model.BRANCHES and choices["threshold"] is alqa.THRESHOLDS and choices["acp"] is acp.ACP


def test_objective_is_equation_12():
    s = settings("--lambda-u", 2, "--lambda-reg", 3, "--lambda-quality", 0.5, "--lambda-acp", 0.25)
    sup = {"cls": 4.0, "reg": 2.0, "quality": 8.0, "t_plus": 2.0, "acp": 4.0}
    unsup = {"cls": 1.0, "reg": 0.0, "quality": 0.0, "t_plus": 4.0, "acp": 0.0}
    assert train.objective(sup, None, s) == (4 + 3 * 2 + 0.5 * 8) / 2 + 0.25 * 4
    assert train.objective(sup, unsup, s) == 8 + 2 * 0.25


@pytest.fixture
def run(own):
    s = settings(*own_argv(own))
    r = train.begin(s, data.load_dataset(s))
    r.out.mkdir()
    r.generator, r.stage = generator(), "joint"
    return r


def unlabelled_batch(run, n=2):
    return data.collate([data.load_item(v, run.data, run.s) for v in run.data.unlabelled[:n]])


def record(segments, labels, status):
    n = len(segments)
    return {"segments": torch.tensor(segments, dtype=torch.float32).reshape(n, 2), "labels": torch.tensor(labels, dtype=torch.long),
            "status": torch.tensor(status, dtype=torch.long), "scores": torch.ones(n)}


def test_t_plus_is_a_running_mean_for_each_branch(run):
    batch = data.collate([data.load_item(v, run.data, run.s) for v in run.data.labelled[:2]])
    losses = train.batch_losses(run, batch, train.ground_truth(batch), 0)
    n = int(losses["positives"])
    assert n > 0
    assert run.t_plus.tolist() == pytest.approx([0.9 * 100 + 0.1 * n, 100.0])


def test_a_video_without_pseudo_labels_leaves_the_loss_and_stays_finite(run):
    batch = unlabelled_batch(run)
    names = [v.id for v in run.data.unlabelled]
    both = {names[0]: record([[3, 15]], [0], [icd.KEPT]), names[1]: record([], [], [])}
    run.pseudo = both
    with_empty = train.batch_losses(run, batch, train.pseudo_truth(run, batch), 1)
    alone = unlabelled_batch(run, 1)
    without = train.batch_losses(run, alone, train.pseudo_truth(run, alone), 1)
    for key in ("cls", "reg", "quality"):
        assert float(with_empty[key].detach()) == pytest.approx(float(without[key].detach()), rel=0.2), key  # drop path draws differ
    run.detector.eval()
    with_empty = train.batch_losses(run, batch, train.pseudo_truth(run, batch), 1)
    without = train.batch_losses(run, alone, train.pseudo_truth(run, alone), 1)
    assert float(with_empty["cls"].detach()) == pytest.approx(float(without["cls"].detach()), rel=1e-5)
    run.pseudo = {name: record([], [], []) for name in names}
    nothing = train.batch_losses(run, batch, train.pseudo_truth(run, batch), 1)
    total = train.objective(nothing, nothing, run.s)
    total.backward()
    assert float(total.detach()) == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in run.detector.parameters())


def test_rejected_instances_are_masked_or_background(run):
    run.detector.eval()
    batch, name = unlabelled_batch(run, 1), run.data.unlabelled[0].id
    kept, out = ([3, 15], 0, icd.KEPT), ([30, 50], 1, icd.DROPPED)
    loss = {}
    for case, rows in (("kept", [kept]), ("masked", [kept, out]), ("mined", [kept, (out[0], 1, icd.MINED)])):
        run.pseudo = {name: record(*map(list, zip(*rows)))}
        truth = train.pseudo_truth(run, batch)
        loss[case] = train.batch_losses(run, batch, truth, 1)
        assert len(truth[0]["labels"]) == (2 if case == "mined" else 1)
    assert float(loss["masked"]["cls"].detach()) < float(loss["kept"]["cls"].detach())
    assert int(loss["masked"]["positives"]) == int(loss["kept"]["positives"]) < int(loss["mined"]["positives"])
    run.s = settings(*own_argv(run.out.parent, "--rejected", "background"))
    run.pseudo = {name: record(*map(list, zip(kept, out)))}
    background = train.batch_losses(run, batch, train.pseudo_truth(run, batch), 1)
    assert float(background["cls"].detach()) == pytest.approx(float(loss["kept"]["cls"].detach()), rel=1e-6)


def test_mixup_mixes_the_input_and_the_losses(run):
    batch = data.collate([data.load_item(v, run.data, run.s) for v in run.data.labelled[:2]])
    mixed, lam = train.mix(batch, 0.4)
    assert 0 <= lam <= 1
    assert torch.allclose(mixed["feats"][0], lam * batch["feats"][0] + (1 - lam) * batch["feats"][1])
    assert mixed["mask"].all()
    run.detector.eval(), torch.manual_seed(0)
    run.s = settings(*own_argv(Path(run.s.dataset).parent, "--mixup", 0.4, "--acp", "none"))
    truth = train.ground_truth(batch)
    together = train.batch_losses(run, batch, truth, 0)
    torch.manual_seed(0)
    mixed, lam = train.mix(batch, 0.4)
    outputs = evaluate.forward(run.detector, mixed, run.s, run.device)
    first, second = (train.point_losses(run, outputs, instances, 0) for instances in (truth, truth[::-1]))
    for key in ("cls", "reg", "positives"):
        assert together[key].item() == pytest.approx((lam * first[key] + (1 - lam) * second[key]).item(), rel=1e-5)


def test_averaged_weights_follow_fast_at_first(run):
    run.stage, run.total, run.clock = "supervised", 10, (0, time.time())
    run.optimizer = train.make_optimizer(run.detector, run.s)
    before = run.ema.cls_out.bias.clone()
    batch = data.collate([data.load_item(v, run.data, run.s) for v in run.data.labelled[:2]])
    train.advance(run, train.objective(train.batch_losses(run, batch, train.ground_truth(batch), 0), None, run.s), {})
    after, now = run.ema.cls_out.bias, run.detector.cls_out.bias
    assert torch.allclose(after, before + 0.9 * (now - before), atol=1e-7)  # decay min(0.999, 1 / 10)


def test_a_loss_that_is_not_finite_stops_the_run(run):
    run.total, run.optimizer = 1, train.make_optimizer(run.detector, run.s)
    with pytest.raises(FloatingPointError, match="nan"):
        train.advance(run, torch.tensor(math.nan, requires_grad=True), {})


def weights(path):
    content = torch.load(path / "checkpoint.pt", weights_only=True)
    return {f"{k}.{n}": v for k in ("detector", "ema", "icd") for n, v in content[k].items()} | {"t_plus": content["t_plus"]}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_the_whole_run_writes_its_files_and_evaluates_the_same(own, capsys):
    assert train.main(own_argv(own, "--audit", "--theta-l", 0.0)) == 0
    out, text = own / "run", capsys.readouterr().out
    metrics = json.loads((out / "metrics.json").read_text())
    assert {"tiou", "mAP", "average_mAP", "ap", "videos", "instances"} <= set(metrics)
    assert (metrics["videos"], metrics["instances"], set(metrics["ap"])) == (4, 12, {"A", "B"})
    split = json.loads((out / "split.json").read_text())
    assert (len(split["labelled"]), len(split["unlabelled"]), split["missing_classes"]) == (3, 7, [])
    assert json.loads((out / "config.json").read_text())["channels"] == 16
    pseudo = json.loads((out / "pseudo_labels.json").read_text())
    assert set(pseudo) == set(split["unlabelled"])
    one = next(p for ps in pseudo.values() for p in ps)
    assert {"label", "segment", "score", "class_score", "tIoU", "tND", "similarity", "status"} == set(one)
    assert one["status"] in icd.STATUS
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    pulse = next(r for r in rows if "theta_h" in r)
    assert {"positives", "candidates", "dropped", "mined", "silent", "class_accuracy", "mean_tIoU", "positive_accuracy", "precision",
            "recall"} <= set(pulse)
    assert all({"steps_a_second", "seconds_left", "loss"} <= set(r) for r in rows if "step" in r)
    assert not list(out.glob("*.tmp"))
    table = text[text.index("\ntIoU  ") + 1:].splitlines()[:2]
    assert evaluate.main(["--checkpoint", str(out / "checkpoint.pt"), "--json", str(own / "again.json")]) == 0
    assert capsys.readouterr().out.splitlines()[1:3] == table
    assert json.loads((own / "again.json").read_text())["ap"] == metrics["ap"]
    argv = ["--pred", out / "predictions.json", "--gt", own / "own.json", "--subset", "VALIDATION", "--json", own / "third.json"]
    assert evaluate.main([str(a) for a in argv]) == 0
    assert json.loads((own / "third.json").read_text())["mAP"] == pytest.approx(metrics["mAP"])


def test_the_labels_of_unlabelled_videos_do_not_enter_training(own):
    more = ("--theta-l", 0.0, "--acp-after", "labelled+unlabelled", "--audit")
    assert train.main(own_argv(own, *more)) == 0
    first = weights(own / "run")
    assert any(p["status"] in ("kept", "mined") for ps in json.loads((own / "run/pseudo_labels.json").read_text()).values() for p in ps)
    hidden = json.loads((own / "run/split.json").read_text())["unlabelled"]

    def change(database):
        for name in hidden:
            database[name]["annotations"] = [{"segment": [1.0, 2.0], "label": "B"}]
    edit(own, change)
    assert train.main(own_argv(own, *more, "--out", own / "other")) == 0
    assert same(first, weights(own / "other"))
    assert train.main(own_argv(own, *more, "--out", own / "third", "--seed", 1)) == 0
    assert not same(first, weights(own / "third"))


def test_class_without_labelled_instance_and_a_video_of_one_step(own, capsys):
    np.save(own / "features/v9.npy", np.zeros((1, 5), dtype=np.float32))
    np.save(own / "features/v13.npy", np.zeros((1, 5), dtype=np.float32))

    def change(database):
        database["v9"] |= {"duration": 1.0, "annotations": [{"segment": [0.2, 0.8], "label": "A"}]}
        database["v13"] |= {"duration": 1.0, "annotations": []}
        database["v1"] |= {"duration": 60.0}  # longer than its features, with an instance behind them
        database["v1"]["annotations"].insert(1, {"segment": [50.0, 55.0], "label": "B"})
        database["v0"]["annotations"] = []
        database["v8"]["annotations"][0]["label"] = "only unlabelled"
    edit(own, change)
    (own / "split.txt").write_text("v0 v1 v9")
    assert train.main(own_argv(own, "--split", own / "split.txt", "--theta-l", 0.0)) == 0
    assert "1 without a labelled instance: only unlabelled" in capsys.readouterr().out
    assert all(v.isfinite().all() for v in weights(own / "run").values())
    s = settings(*own_argv(own, "--split", own / "split.txt"))
    b = train.begin(s, data.load_dataset(s)).bank
    assert b["videos"] == ["v1"] * 3 + ["v9"]
    assert len(b["feats"]) == len(b["labels"]) == len(b["keys"]) == 4


@pytest.mark.parametrize("switch", [
    ("--alqa", "none"), ("--alqa", "tiou"), ("--alqa", "diou"), ("--quality-form", "kl"), ("--threshold", "fixed"), ("--threshold", "mean"),
    ("--scope", "dataset"), ("--scope", "class"), ("--icd", "none"), ("--icd", "eap"), ("--icd", "mpp"), ("--acp", "none"),
    ("--acp", "coarse"), ("--acp", "fine"), ("--acp-after", "labelled+unlabelled"), ("--acp-after", "labelled"),
    ("--rejected", "background"), ("--pseudo-weights", "ema"),
    ("--weights", "raw"), ("--refresh", 1), ("--precision", "bfloat16"), ("--icd-pool", "max"), ("--icd-steps", 1), ("--position",),
    ("--nms-agnostic",), ("--stage", "supervised"), ("--split", "stratified"), ("--resize", 40)], ids=lambda s: "=".join(map(str, s)))
def test_every_switch_trains_and_stays_finite(own, switch):
    argv = own_argv(own, "--pretrain-epochs", 1, "--joint-epochs", 2, "--theta-l", 0.0, *switch)
    assert train.main(argv) == 0
    assert all(v.isfinite().all() for v in weights(own / "run").values())


@pytest.mark.parametrize(("name", "suffix", "prefix", "dim", "subsets"), [
    ("thumos", ".npy", "", 8, ("Validation", "Test")), ("activitynet", ".npy", "v_", 8, ("training", "validation")),
    ("epic-verb", ".npz", "", 9, ("training", "validation")), ("epic-noun", ".npz", "", 9, ("training", "validation"))])
def test_published_layouts_train_with_their_presets(tmp_path, name, suffix, prefix, dim, subsets):
    layout, folder = data.LAYOUTS[name]
    (tmp_path / folder).mkdir()
    (tmp_path / layout).parent.mkdir()
    rng, database = np.random.default_rng(0), {}
    for i in range(6):
        x = rng.normal(size=(50, dim)).astype(np.float32)
        path = tmp_path / folder / f"{prefix}v{i}{suffix}"
        np.save(path, x) if suffix == ".npy" else np.savez(path, feats=x)
        annotations = [{"segment": [1.0, 4.0], "label": f"{i % 2}", "label_id": i % 2},
                       {"segment": [5.0, 4.0], "label": "0", "label_id": 0}]
        database[f"v{i}"] = {"subset": subsets[i > 3], "duration": 50 * 4 / 30, "annotations": annotations} | (
            {"fps": 30.0} if name == "thumos" else {})
    (tmp_path / layout).write_text(json.dumps({"database": database}))
    argv = ("--dataset", name, "--root", tmp_path, "--ratio", 0.5, "--out", tmp_path / "run", "--channels", 16, "--batch", 2,
            "--pretrain-epochs", 1, "--supervised-epochs", 1, "--supervised-steps", 2, "--joint-epochs", 1, "--device", "cpu")
    assert train.main([str(a) for a in argv]) == 0
    assert json.loads((tmp_path / "run/metrics.json").read_text())["instances"] == 4  # the bad ones count in the ground truth
    assert evaluate.main(["--checkpoint", str(tmp_path / "run/checkpoint.pt")]) == 0


def kill_when(argv, written, appears):
    """Run train.py in a process of its own and SIGKILL it once the predicate is true; returns whether it was killed."""
    process = subprocess.Popen([sys.executable, HERE / "train.py", *argv], stdout=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            if written.exists() and appears(written.read_text()):
                process.kill()
                return process.wait() != 0
            time.sleep(0.01)
        return False
    finally:
        process.kill()


@pytest.mark.parametrize("stage", train.STAGES)
def test_a_killed_run_resumes_to_the_same_weights_bit_for_bit(own, stage):
    more = ("--log-every", 1, "--theta-l", 0.0, "--refresh", 2, "--pretrain-epochs", 3, "--supervised-epochs", 3, "--supervised-steps", 9,
            "--joint-epochs", 3)
    assert train.main(own_argv(own, *more, "--out", own / "whole")) == 0
    argv = own_argv(own, *more, "--out", own / "killed")
    middle = lambda log: f'"stage": "{stage}", "epoch": 2, "step"' in log  # within the second epoch, after a checkpoint
    assert kill_when(argv, own / "killed/log.jsonl", middle)
    assert not (own / "killed/metrics.json").exists()
    assert train.main([*argv, "--resume"]) == 0
    assert same(weights(own / "whole"), weights(own / "killed"))
    assert (own / "whole/metrics.json").read_text() == (own / "killed/metrics.json").read_text()
    assert (own / "whole/pseudo_labels.json").read_text() == (own / "killed/pseudo_labels.json").read_text()
    rows = lambda name: map(json.loads, (own / name / "log.jsonl").read_text().splitlines())
    loss = lambda name: [(r["stage"], r["epoch"], r.get("loss")) for r in rows(name)]
    assert loss("whole") == loss("killed")


def test_later_stages_start_from_a_shared_one(own, capsys):
    assert train.main(own_argv(own, "--stage", "pretrain", "--out", own / "one")) == 0
    assert not (own / "one/metrics.json").exists()
    more = ("--start", own / "one/checkpoint.pt", "--quality-form", "kl")
    assert train.main(own_argv(own, *more, "--out", own / "kl")) == 0
    assert train.main(own_argv(own, "--quality-form", "kl", "--out", own / "whole")) == 0
    assert same(weights(own / "kl"), weights(own / "whole"))
    capsys.readouterr()
    refused(own_argv(own, *more, "--acp-tau", 0.2, "--out", own / "c"), capsys, "another configuration", "acp_tau")


def test_stage_3_starts_from_a_shared_stage_2(own, capsys):
    assert train.main(own_argv(own, "--stage", "supervised", "--out", own / "two")) == 0
    assert train.main(own_argv(own, "--start", own / "two/checkpoint.pt", "--out", own / "a")) == 0
    assert train.main(own_argv(own, "--out", own / "b")) == 0
    assert same(weights(own / "a"), weights(own / "b"))
    assert train.main(own_argv(own, "--start", own / "two/checkpoint.pt", "--threshold", "fixed", "--out", own / "c")) == 0
    capsys.readouterr()
    refused(own_argv(own, "--start", own / "a/checkpoint.pt"), capsys, "not at the end of stage 1 or 2")


def test_two_processes_with_half_the_batch_follow_one(own):
    more = ("--theta-l", 0.0, "--log-every", 1, "--drop-path", 0.1, "--acp-after", "labelled+unlabelled", "--ratio", 0.5)
    assert train.main(own_argv(own, *more, "--batch", 4, "--out", own / "one")) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", HERE / "train.py"]
    argv = own_argv(own, *more, "--batch", 2, "--out", own / "two")
    done = subprocess.run([*launch, *argv], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = ([json.loads(line) for line in (own / name / "log.jsonl").read_text().splitlines()] for name in ("one", "two"))
    losses = lambda rows: [row["loss"] for row in rows if "loss" in row]
    assert len(losses(one)) == len(losses(two)) > 12
    assert losses(one) == pytest.approx(losses(two), rel=1e-3)
    assert {row["stage"] for row in two if "loss" in row} == set(train.STAGES)
    mine, other = (json.loads((own / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert mine["average_mAP"] == pytest.approx(other["average_mAP"], abs=0.02)


# ---- tables.py ------------------------------------------------------------------------------------------------------

def table_argv(own, *more):
    argv = own_argv(own, "--theta-l", 0.0, *more)
    del argv[argv.index("--out"):argv.index("--out") + 2]
    return [*argv, "--runs", str(own / "tables"), "--seeds", "2"]


def test_tables_share_stages_resume_and_print_markdown(own, capsys, monkeypatch):
    assert tables.main(["3a", "3b", *table_argv(own)]) == 0
    text = capsys.readouterr().out
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0][2:] for row in rows] == ["row", "---", *(name for name, _, _ in tables.ROWS["3a"]), "row", "---",
                                                         *(name for name, _, _ in tables.ROWS["3b"])]
    assert len({row.count("|") for row in rows[:6]}) == 1
    stages = [path.name.split("-")[0] for path in (own / "tables").iterdir()]
    assert {stage: stages.count(stage) for stage in set(stages)} == {"pretrain": 2, "supervised": 2 * 5, "all": 2 * 7}
    calibrated = [path.parent.name.split("-")[0] for path in (own / "tables").glob("*/calibration.json")]
    assert calibrated == ["supervised"] * 2 * 4  # after stage 3 the videos are no longer held out
    monkeypatch.setattr(train, "main", None)  # nothing is trained again
    assert tables.main(["3a", "3b", *table_argv(own)]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")] == rows


@pytest.mark.parametrize("name", [*tables.ROWS, "S2"])
def test_every_row_of_the_tables_is_a_command_of_train(own, name):
    for row in tables.ROWS.get(name, tables.PROBES.get(name)):
        assert train.parse_settings([*own_argv(own), *row[-1].split()])


def test_the_probe_tells_classes_and_the_supervised_row_needs_no_stage_3(own, capsys):
    assert tables.main(["S2", *table_argv(own, "--seeds", "1,")]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    assert [row[0][2:] for row in rows] == [name for name, *_ in tables.PROBES["S2"]]
    assert float(rows[0][2].split()[0]) > 80  # the made-up features shift a column by three inside each action
    x = torch.randn(300, 3)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    W = tables.logistic_regression(x, y, 3)
    assert ((x @ W[:-1] + W[-1]).argmax(1) == y).float().mean() > 0.7
    assert tables.main(["S6"]) == 0
    assert "26,016,768" in capsys.readouterr().out


@pytest.mark.parametrize("case", ["ranked", "reversed", "another class"])
def test_calibration_ranks_scores_against_the_true_tiou(own, monkeypatch, case):
    folder = tables.reach(own_argv(own, "--acp", "none"), "supervised", own / "tables")
    labelled = json.loads((folder / "split.json").read_text())["labelled"]

    def detect(detector, videos, d, s, device):
        assert len(videos) == 7 and not {video.id for video in videos} & set(labelled)
        for i, video in enumerate(videos):  # two detections an instance; over all videos the true tIoU falls, or rises, with the score
            h = d.hidden[video.id]
            number = torch.arange(2 * len(h.labels))
            shift = 0.01 * (6 * i + (number if case != "reversed" else 5 - number))
            labels = h.labels[number // 2]
            labels = 1 - labels if case == "another class" and i < 4 else labels  # of those with the best scores
            scores = 0.9 - 0.01 * (number - 6 * i if case == "reversed" else number + 6 * i)
            segments = h.segments[number // 2] + shift[:, None] * (h.segments[:, 1:] - h.segments[:, :1])[number // 2]
            tail = torch.arange(3)  # beyond twice as many as instances: low scores of a perfect tIoU do not count
            yield {"segments": torch.cat([segments, h.segments[tail]]), "labels": torch.cat([labels, h.labels[tail]]),
                   "scores": torch.cat([scores, 0.01 - 0.001 * tail])}
    monkeypatch.setattr(evaluate, "detect", detect)
    found = tables.calibration(folder)["rank_correlation"]
    assert found < 0 if case == "another class" else found == pytest.approx(-1 if case == "reversed" else 1)


def test_auc_against_a_count_of_pairs():
    values, right = torch.tensor([0.1, 0.4, 0.4, 0.9]), torch.tensor([False, True, False, True])
    assert tables.auc(values, right) == (1 + 0.5 + 1 + 1) / 4
    assert tables.auc(values, right | True) is None


def test_causes_count_pseudo_labels_by_class_and_state(own, capsys):
    argv = [*table_argv(own, "--joint-epochs", 1), "--seeds", "0,"]
    assert tables.main(["causes", *argv]) == 0
    folder, = (own / "tables").glob("all-*")
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    _, d, _ = tables.read_run(folder)
    nothing = {key: content["pseudo"][d.unlabelled[0].id][key][:0] for key in ("segments", "labels", "scores", "similarity", "status")}
    h = d.hidden[d.unlabelled[0].id]
    c, other, _ = h.labels.tolist()  # the third instance is of the first's class
    record = {"segments": torch.cat([h.segments, torch.tensor([[60.0, 63.0]])]), "labels": torch.tensor([c, c, c, other]),
              "scores": torch.tensor([0.9, 0.8, 0.4, 0.3]), "similarity": torch.tensor([0.9, 0.1, 0.8, math.nan]),
              "status": torch.tensor([icd.KEPT, icd.DROPPED, icd.MINED, icd.CANDIDATE])}
    content["pseudo"] = dict.fromkeys(content["pseudo"], nothing) | {d.unlabelled[0].id: record}
    torch.save(content, folder / "checkpoint.pt")
    row, *_, total = sorted(tables.causes(folder), key=lambda row: (row["class"] == "all classes", row["class"] != d.classes[c]))
    n = sum(int((v.labels == c).sum()) for v in d.hidden.values())
    assert row == {"class": d.classes[c], "labelled": sum(int((v.labels == c).sum()) for v in d.labelled), "hidden": n,
                   "ALQA precision": 1 / 2, "ALQA recall": 1 / n, "ICD precision": 1.0, "ICD recall": 2 / n, "AUC score": 0.5,
                   "AUC similarity": 1.0}
    assert (total["hidden"], total["ICD recall"]) == (21, 2 / 21)
    missed, = (row for row in tables.causes(folder) if row["class"] == d.classes[other])
    assert (missed["ALQA precision"], missed["ALQA recall"], missed["AUC score"]) == (None, 0.0, None)
    capsys.readouterr()
    assert tables.main(["causes", *argv]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[0][2:] for row in rows] == ["class", "---", "A", "B", "all classes"]
    content["pseudo"] = None
    torch.save(content, folder / "checkpoint.pt")
    with pytest.raises(data.BadInput, match="no pseudo labels"):
        tables.causes(folder)


def test_tables_refuse_what_they_do_not_know(own, capsys):
    assert tables.main(["7", *table_argv(own)]) == 2
    assert tables.main(["3a", *table_argv(own, "--no-such-setting", 1)]) == 2
    assert tables.main(["3a", *table_argv(own, "--splits", own / "absent.json")]) == 2
    assert tables.main(["3a", *table_argv(own, "--start", own / "x.pt")]) == 2
    assert tables.main(["S2", *table_argv(own, "--acp", "none")]) == 2
    for seeds in ("0", "-1", ",", "x"):
        assert tables.main(["3a", *table_argv(own), "--seeds", seeds]) == 2
    assert capsys.readouterr().err.count("error: ") == 9
    assert not (own / "tables").exists()


def test_a_killed_shared_stage_goes_on_under_another_row(own):
    assert tables.main(["S1", *table_argv(own)]) == 0
    for path in (own / "tables").glob("*/finished.json"):
        path.unlink()
    stages = set((own / "tables").glob("supervised-*"))
    assert tables.main(["fig3a", *table_argv(own, "--acp", "none", "--icd", "none")]) == 0  # from S1's stage 2 with BCE
    assert set((own / "tables").glob("supervised-*")) == stages


# ---- Bad input: one sentence, exit 2, nothing half-written ----------------------------------------------------------

def refused(argv, capsys, *words):
    """The command exits with 2 and one line that holds the words."""
    code = train.main(argv) if argv and argv[0].startswith("--") else evaluate.main(argv[1:])
    text = capsys.readouterr().err
    assert code == 2
    assert text.startswith("error: ") and text.count("\n") == 1, text
    for word in words:
        assert str(word) in text, text


def truncated(path):
    path.write_bytes(path.read_bytes()[:300])


def pickled(path):
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)


def changed(value):
    def change(path):
        x = np.load(path)
        x[7, 2] = value
        np.save(path, x)
    return change


@pytest.mark.parametrize("name", ["v1", "v9", "v12"])  # whichever subset it is in
@pytest.mark.parametrize(("spoil", "words"), [
    (lambda p: p.unlink(), ["not found"]), (truncated, ["cannot be read"]), (pickled, ["cannot be read"]),
    (lambda p: p.write_bytes(b""), ["cannot be read"]), (lambda p: np.save(p, np.zeros((64, 4))), ["4", "5"]),
    (lambda p: np.save(p, np.zeros(64)), ["(T, D)"]), (lambda p: np.save(p, np.zeros((0, 5))), ["(T, D)"]),
    (lambda p: np.save(p, np.array([["x"] * 5])), ["(T, D)"]), (changed(np.nan), ["nan", "step 7"]), (changed(np.inf), ["inf", "step 7"])],
    ids=["missing", "truncated", "pickled", "empty", "width", "shape", "no steps", "text", "nan", "inf"])
def test_bad_feature_files(own, capsys, name, spoil, words):
    spoil(own / f"features/{name}.npy")
    refused(own_argv(own), capsys, name, *words)
    assert not (own / "run").exists()


@pytest.mark.parametrize(("change", "words"), [
    (lambda e: e["annotations"][1].update(segment=[20.0, 12.0]), ["[20.0, 12.0]"]),
    (lambda e: e["annotations"][1].update(segment=[12.0, 12.0]), ["[12.0, 12.0]"]),
    (lambda e: e["annotations"][1].update(segment=[40.0, 50.0]), ["[40.0, 50.0]", "outside"]),
    (lambda e: e["annotations"][1].update(segment=[10.0, 9999.0]), ["outside"]),
    (lambda e: e["annotations"][1].update(segment=[-9.0, -3.0]), ["outside"]),
    (lambda e: (e.pop("duration"), e["annotations"][1].update(segment=[900.0, 910.0])), ["outside"]),
    (lambda e: e["annotations"][1].update(segment="12-20"), ["'12-20'"]),
    (lambda e: e["annotations"][1].update(segment=[1, None]), ["None"]),
    (lambda e: e["annotations"][1].pop("label"), ["no label"]),
    (lambda e: e.update(fps=0), ["fps", "0"]), (lambda e: e.pop("fps"), ["--fps"]),
    (lambda e: e.update(duration="long"), ["'long'"]), (lambda e: e.update(annotations=3), ["list"])])
@pytest.mark.parametrize("name", ["v1", "v9", "v12"])
def test_bad_annotations(own, capsys, name, change, words):
    edit(own, lambda database: change(database[name]))
    refused(own_argv(own), capsys, "own.json", name, *words)
    assert not (own / "run").exists()


def test_bad_segments_can_be_left_out(own):
    edit(own, lambda database: database["v1"]["annotations"][0].update(segment=[9.0, 3.0]))
    d = data.load_dataset(settings(*own_argv(own, "--bad-segments", "skip", "--ratio", 1.0, "--stage", "supervised")))
    assert [len(v.segments) for v in d.labelled if v.id == "v1"] == [2]


def test_bad_files_and_settings(own, capsys):
    refused(own_argv(own, "--ratio", 0.01), capsys, "--ratio 0.01", "0 of 10")
    refused(own_argv(own, "--ratio", 1.0), capsys, "--ratio 1.0", "no unlabelled video")
    refused(own_argv(own, "--train-subset", "x"), capsys, "'x'", "Training")
    refused(own_argv(own, "--tiou", "high"), capsys, "'high'")
    refused(own_argv(own, "--out", own / "own.json"), capsys, "own.json")
    refused(own_argv(own, "--ranges", "nan:4"), capsys, "ranges")
    (own / "nested.json").write_text('{"labelled": [["v1"]]}')
    refused(own_argv(own, "--split", own / "nested.json"), capsys, "nested.json")
    refused(own_argv(own, "--windows", "five"), capsys, "windows", "'five'")
    refused(own_argv(own, "--ranges", "0-4"), capsys, "ranges", "'0-4'")
    refused(own_argv(own, "--channels", 15), capsys, "channels", "15")
    refused(own_argv(own, "--split", own / "none.txt"), capsys, "none.txt")
    (own / "bad.txt").write_text("v1 v99")
    refused(own_argv(own, "--split", own / "bad.txt"), capsys, "bad.txt", "v99")
    (own / "empty.json").write_text('{"labelled": []}')
    refused(own_argv(own, "--split", own / "empty.json"), capsys, "empty.json", "no labelled video")
    refused(["--dataset", "kinetics"], capsys, "'kinetics'")
    refused(["--dataset", str(own / "none.json")], capsys, "not found", "none.json")
    (own / "own.json").write_text('{"database": {')
    refused(own_argv(own), capsys, "own.json", "JSON")
    (own / "own.json").write_text("[]")
    refused(own_argv(own), capsys, "own.json", "database")
    assert not (own / "run").exists()


def test_a_published_dataset_without_its_files_says_what_is_expected(tmp_path, capsys):
    refused(["--dataset", "thumos", "--root", str(tmp_path), "--ratio", "0.1"], capsys, tmp_path / "annotations/thumos14.json",
            tmp_path / "i3d_features", "<id>.npy", "ActionFormer")


def test_bad_checkpoints(own, capsys):
    assert train.main(own_argv(own, "--stage", "supervised")) == 0
    capsys.readouterr()
    checkpoint, whole = own / "run/checkpoint.pt", (own / "run/checkpoint.pt").read_bytes()
    refused(own_argv(own, "--resume", "--channels", 32), capsys, "another configuration", "channels", "16", "32")
    refused(own_argv(own, "--start", own / "none.pt"), capsys, "none.pt")
    content = torch.load(checkpoint, weights_only=True)
    for part, key in ((content, "theta_h"), (content["settings"], "acp_tau")):
        part.pop(key)
        torch.save(content, own / "old.pt")
        refused(own_argv(own, "--start", own / "old.pt"), capsys, "old.pt", "not of this version")
    np.save(own / "features/v12.npy", np.zeros((64, 5), dtype=np.float32))
    edit(own, lambda database: database["v12"]["annotations"][0].update(label="new"))
    refused(["evaluate", "--checkpoint", str(checkpoint)], capsys, "v12", "'new'", "unknown")
    checkpoint.write_bytes(whole[:1000])
    refused(own_argv(own, "--resume"), capsys, "checkpoint.pt", "cannot be read")
    refused(["evaluate", "--checkpoint", str(checkpoint)], capsys, "checkpoint.pt", "cannot be read")
    for content in (b"", b"\x80\x02}", b"text"):
        checkpoint.write_bytes(content)
        refused(["evaluate", "--checkpoint", str(checkpoint)], capsys, "checkpoint.pt", "cannot be read")
    torch.save({"a": 1}, checkpoint)
    refused(["evaluate", "--checkpoint", str(checkpoint)], capsys, "checkpoint.pt")


@pytest.mark.parametrize(("content", "words"), [
    ("{", ["JSON"]), ("[]", ["results"]), ('{"results": {"v10": [{"label": "C", "score": 1, "segment": [1, 2]}]}}', ["v10", "'C'"]),
    ('{"results": {"v10": [{"label": "A", "score": NaN, "segment": [1, 2]}]}}', ["v10", "nan"]),
    ('{"results": {"v10": [{"label": "A", "segment": [1, 2]}]}}', ["v10"]), ('{"results": {"v10": 3}}', ["v10", "3"]),
    ('{"results": {"v10": {}}}', ["v10", "{}"]),
    ('{"results": {"v10": [{"label": ["A"], "score": 1, "segment": [1, 2]}]}}', ["v10"])])
def test_bad_predictions(own, capsys, content, words):
    (own / "pred.json").write_text(content)
    refused(["evaluate", "--pred", str(own / "pred.json"), "--gt", str(own / "own.json"), "--subset", "validation"], capsys, *words)


# ---- The project ----------------------------------------------------------------------------------------------------

def test_every_equation_has_one_home_and_the_readme_names_it():
    tags = {}
    for path in HERE.glob("*.py"):
        if path.name.startswith("test"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                for number in re.findall(r"Eq\. \((\d+)\)", (ast.get_docstring(node) or "").split("\n")[0]):
                    tags.setdefault(int(number), []).append(f"{path.name} `{node.name}`")
    assert {n: len(homes) for n, homes in tags.items()} == dict.fromkeys(range(1, 13), 1)
    rows = dict(re.findall(r"^\| Eq\. \((\d+)\) \| [^|]* \| ([^|]*) \|$", (HERE / "README.md").read_text(), flags=re.MULTILINE))
    assert {int(n): home for n, home in rows.items()} == {n: homes[0] for n, homes in tags.items()}


def test_imports_run_one_way_and_importing_does_nothing():
    allowed = {"data": set(), "model": {"icd"}, "alqa": {"model"}, "icd": set(), "acp": set(), "evaluate": {"alqa", "data", "model"},
               "train": {"acp", "alqa", "data", "evaluate", "icd", "model"},
               "bench": {"acp", "data", "evaluate", "model", "train"}, "tables": {"acp", "data", "evaluate", "icd", "model", "train"}}
    for name, ours in allowed.items():
        tree = ast.parse((HERE / f"{name}.py").read_text())
        imported = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)} | {
            a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        assert imported & set(allowed) <= ours, name
        for node in tree.body:
            kind = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign)
            assert isinstance(node, (*kind, ast.Expr)) or "__main__" in ast.dump(node), (name, node.lineno)


@pytest.mark.parametrize("name", ["model", "alqa", "icd", "acp", "data", "evaluate", "train", "bench", "tables"])
def test_nothing_refers_to_what_is_defined_below_it(name):
    body = ast.parse((HERE / f"{name}.py").read_text()).body
    line = {node.name: node.lineno for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for node in body:
        used = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} & set(line)
        assert all(line[n] <= node.lineno for n in used) or isinstance(node, ast.If), (node.lineno, used)
