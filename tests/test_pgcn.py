"""Tests of extras/pgcn.py: the public P-GCN's outputs, brute force, empty cases, whole runs."""
import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

import data
import evaluate
import icd
import model
import train
from extras import bmn, pgcn, tables
from plumbing import arguments, processes, public
from tests.helpers import (
    ROOT,
    SHARED,
    finished,
    needs_shared,
    own_argv,
    read_log,
    read_result,
    same,
    weights,
)
from tests.test_extras import table_argv
from tests.test_people import look_into
from tests.test_train import ENDS, STEP, stopped

TINY = ("--hidden", 8)
NOTHING = torch.zeros(0, 2)
FRAMES = 400  # of the reference's video


def small(**changes):
    """The settings of a small P-GCN."""
    return pgcn.Settings(**{"hidden": 8, "proposals": "p.json", "device": "cpu"} | changes)


def main(*argv):
    """The exit code of extras.pgcn."""
    return pgcn.main([str(word) for word in argv])


def argv_of(own, *more):
    """A command line of extras.pgcn for the user's data set; --proposals may be given again."""
    return own_argv(own, "--acp", "none", *TINY, "--proposals", own / "p.json", *more)


def write_proposals(own, change=None):
    """The user's proposals: of each instance some of other ends, and background; `change` them."""
    rng = np.random.default_rng(1)
    found = {}
    for name, entry in read_result(own / "own.json")["database"].items():
        near = [a["segment"] for a in entry["annotations"] for _ in range(4)]
        near = np.array(near) + rng.normal(size=(len(near), 2)) * [0.5, 0.8]
        far = [[9.0, 11.0], [4.0, 13.0], [20.5, 23.5], [28.5, 32.0]]
        rows = [*near.clip(0, 32.5).tolist(), *far]
        found[name] = [{"segment": row, "score": 1 / n} for n, row in enumerate(rows, 1)]
    content = {"results": found}
    if change:
        change(content)
    (own / "p.json").write_text(json.dumps(content))


def instances(segments, labels=None, rejected=()):
    """A record of instances."""
    both = [torch.tensor(part, dtype=torch.float32).reshape(-1, 2) for part in (segments, rejected)]
    labels = torch.tensor(labels or [0] * len(segments))
    return {"segments": both[0], "labels": labels, "rejected": both[1]}


def some_proposals(number, steps):
    """Random proposals (number, 2) in a video of some steps."""
    start = torch.rand(number) * (steps - 4)
    return torch.stack([start, start + 1 + torch.rand(number) * 3], 1)


# ---- The public P-GCN ---------------------------------------------------------------------------

@pytest.fixture
def ref():
    """The public P-GCN's arrays."""
    arrays = np.load(SHARED / "reference/pgcn_tiny.npz")
    return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@pytest.fixture
def theirs():
    """Detector with the public weights."""
    detector = pgcn.Detector(8, 5, small(hidden=512, alqa="none")).eval()
    public.take_weights(detector, SHARED / "reference/pgcn_tiny.pth.tar")
    return detector


def of_block(detector, act, comp):
    """The outputs for blocks of 21 rows: a root, its children, theirs: (1, N, ...) of the roots."""
    nodes = torch.arange(len(act)).view(-1, 21)
    trees = torch.zeros(1, len(act), 5, 5).long()
    trees[0, ::21, :, 0] = nodes[:, :5]
    trees[0, ::21, :, 1:] = nodes[:, 1:].view(-1, 5, 4)
    with torch.no_grad():
        h = (detector.Act_GCN(act[None], trees), detector.Comp_GCN(comp[None], trees))
        return [part[:, ::21] for part in detector.heads(*h)]


@needs_shared
def test_the_graph_is_the_public_one(ref, theirs):
    both = {"act": ref["act"][0, :21], "com": ref["comp"][0, :21]}
    neighbours = torch.arange(1, 21).view(1, 1, 5, 4)
    nodes = torch.cat([torch.arange(5)[None, None, :, None], neighbours], 3)
    for name, x in both.items():
        weight = torch.zeros(21, 21)
        weight[nodes[0, 0, :, :1], nodes[0, 0]] = pgcn.edges(x[None], nodes)[0, 0]
        assert torch.allclose(weight, ref[f"adj_{name}"], atol=1e-5)
    segments = (ref["proposals"] + torch.tensor([0, 1])).float()[None]  # both ends belong to it
    tIoU = model.tiou(segments[0][:, None], segments[0])
    assert torch.allclose(tIoU, ref["iou"], atol=1e-5)
    tND = model.tnd(segments[0][:, None], segments[0])
    assert torch.allclose(tND.sqrt(), ref["distance"], atol=1e-5)
    everything = torch.ones(1, 24).bool()
    found = pgcn.candidates(segments, everything)
    assert torch.equal(found[0], ref["candidates"])


@needs_shared
def test_the_public_outputs_and_losses(ref, theirs):
    act, comp = ref["act"].flatten(0, 1), ref["comp"].flatten(0, 1)
    activity, completeness, offsets, *_ = of_block(theirs, act, comp)
    activity, completeness, offsets = activity[0], completeness[0], offsets[0]  # (16, ...)
    kind, label = ref["prop_type"][:, ::21].flatten(), ref["target"][:, ::21].flatten()
    used = kind != 1
    assert torch.allclose(activity[used], ref["train_act_logits"], atol=1e-5)
    L_activity = torch.nn.functional.cross_entropy(activity[used], label[used])
    assert L_activity.item() == pytest.approx(ref["act_loss"].item(), abs=1e-5)
    used = kind != 2
    assert torch.allclose(completeness[used], ref["train_comp_scores"], atol=1e-5)
    scores = ref["train_comp_scores"].clone().requires_grad_()
    of_class = scores.gather(1, ref["train_comp_target"][:, None] - 1).view(2, 7)
    L_completeness = pgcn.completeness_loss(of_class, kind[used].view(2, 7) == 0)
    assert L_completeness.item() == pytest.approx(ref["comp_loss"].item(), abs=1e-5)
    L_completeness.backward()
    assert torch.allclose(scores.grad, ref["comp_loss_grad"], atol=1e-6)
    raw = offsets[kind == 0] / torch.tensor(pgcn.SPREAD)
    assert torch.allclose(raw, ref["train_reg"], atol=1e-5)
    mine = raw[torch.arange(2), ref["train_reg_label"] - 1]
    L_reg = pgcn.regression_loss(mine, ref["train_reg_goal"])
    assert L_reg.item() == pytest.approx(ref["reg_loss"].item(), abs=1e-5)
    total = L_activity + pgcn.OF_COMPLETENESS * L_completeness + pgcn.OF_REGRESSION * L_reg
    assert total.item() == pytest.approx(ref["loss"].item(), abs=1e-5)


@needs_shared
def test_targets_are_the_public_ones(ref):
    truth = ref["truth"].float()
    proposals = ref["proposals"].float()
    of = pgcn.targets(proposals + torch.tensor([0, 1]), torch.ones(24).bool(), {
        "segments": truth + torch.tensor([0, 1]), "labels": ref["truth_label"],
        "rejected": NOTHING}, FRAMES)
    named = ref["named"]
    overlapping = named[:, 0] > 0
    assert torch.equal(of["label"][overlapping] + 1, named[overlapping, 0].long())
    goal = pgcn.offset_target(proposals + torch.tensor([0, 1]), of["truth"])
    action = of["kinds"][0]  # the public code leaves the others 0
    assert torch.equal(action, ref["reg_targets"].any(1))
    assert torch.allclose(goal[action], ref["reg_targets"][action], atol=1e-5)


@needs_shared
@pytest.mark.parametrize("split", ["train", "test"])
def test_pooled_features_are_the_public_ones(ref, split):
    def rows(first, last):
        """The rows that the public code takes of frames, as segments."""
        low, high = first // 8, -((64 - last) // 8)
        return torch.stack([low, torch.maximum(low, high)], 1).float()

    start, end, before, after = ref[f"ticks_{split}"].T
    parts = [icd.pool_instances(ref["feats"], rows(*pair), "max")
             for pair in ((before, start), (start, end), (end, after))]
    assert torch.allclose(parts[1], ref[f"pooled_act_{split}"], atol=1e-5)
    assert torch.allclose(torch.cat(parts, 1), ref[f"pooled_comp_{split}"], atol=1e-5)


def hard_nms(rows, overlap):
    """Detections [(class, start, end, score, ...)], best first, without those that overlap."""
    kept = []
    for row in rows:
        same_class = [other for other in kept if other[0] == row[0]]
        if all(model.tiou(np.array(other[1:3]), np.array(row[1:3])) <= overlap
               for other in same_class):
            kept.append(row)
    return kept


@needs_shared
def test_the_public_detections(ref, theirs):
    nodes = ref["neighbours"]
    act, comp = (ref[f"pooled_{name}_test"][nodes].flatten(0, 1) for name in ("act", "comp"))
    activity, completeness, offsets, *_ = (part[0] for part in of_block(theirs, act, comp))
    for mine, name in ((activity, "test_act"), (completeness, "test_comp")):
        assert torch.allclose(mine, ref[name], atol=1e-4, rtol=1e-5)
    raw = offsets / torch.tensor(pgcn.SPREAD)
    assert torch.allclose(raw, ref["test_reg_raw"], atol=1e-5)
    mean, std = ref["stats"]
    offsets = raw * std + mean
    assert torch.allclose(offsets, ref["test_reg"], atol=1e-5)
    score = activity.softmax(1)[:, 1:] * completeness.exp()
    shares = ref["proposals"].double() / FRAMES
    moved = pgcn.regressed(shares[:, None].expand(-1, 5, -1), offsets.double()).clamp(0, 1)
    best = score.flatten().argsort(descending=True)[:60]
    rows = [(c, *shares[p].tolist(), score[p, c].item(), *moved[p, c].tolist())
            for p, c in zip((best // 5).tolist(), (best % 5).tolist())]
    kept = sorted((c, -s, *ends) for c, _, _, s, *ends in hard_nms(rows, 0.35))
    expected = sorted((c, -s, a, b) for c, a, b, s in ref["detections"].double().tolist())
    assert len(kept) == 20
    assert np.allclose(kept, expected, rtol=1e-5, atol=1e-5)


def test_the_published_size_has_the_published_number_of_parameters():
    for branches, more in (("none", 0), ("tiou+tnd", 12_290)):
        detector = pgcn.Detector(1024, 20, small(hidden=512, alqa=branches))
        assert sum(p.numel() for p in detector.parameters()) == 4_611_153 + more


# ---- Brute force --------------------------------------------------------------------------------

def candidates_by_hand(segments, valid, node):
    """The candidates of a node, by a loop over the others."""
    overlapping, apart = [], []
    for i in range(len(segments)):
        tIoU = float(model.tiou(segments[node], segments[i]))
        tND = float(model.tnd(segments[node], segments[i]))
        if i == node or not valid[i]:
            continue
        if tIoU > 0.7:
            overlapping.append((-tIoU, i))
        if tIoU <= 0 and tND > 0:
            apart.append((tND, i))
    found = []
    for kind, number in ((overlapping, 8), (apart, 2)):
        best = [i for _, i in sorted(kind)[:number]] or [node]
        found += itertools.islice(itertools.cycle(best), number)
    return found


def test_neighbours_are_those_of_a_loop_over_all_others():
    segments = some_proposals(12, 16)
    segments = torch.cat([segments, segments[:5] + 0.05, segments[:2]])[None]
    valid = torch.ones(1, 19).bool()
    valid[0, [3, 8]] = False
    found = pgcn.candidates(segments, valid)
    for node in valid[0].nonzero()[:, 0].tolist():
        assert found[0, node].tolist() == candidates_by_hand(segments[0], valid[0], node)
    fixed, drawn = (pgcn.trees(found, training, 30)[0] for training in (False, True))
    for tree in (fixed, drawn):
        assert torch.equal(tree[:, 0, 0], torch.arange(19))
        assert torch.equal(tree[:, :, 0], tree[:, 0])  # the rows are of the root and its neighbours
    fixed, drawn = fixed[:, :, 1:], drawn[:, :, 1:]
    assert not torch.equal(drawn, fixed)
    for node in range(19):
        mine = found[0, node].tolist()
        assert fixed[node, 0].tolist() == [mine[i] for i in (0, 1, 2, 8)]
        for i, child in enumerate(fixed[node, 0].tolist(), 1):
            assert torch.equal(fixed[node, i], fixed[child, 0])
        for i, one in enumerate([node, *drawn[node, 0].tolist()]):
            left = found[0, one].tolist()
            for neighbour in drawn[node, i].tolist():
                left.remove(neighbour)  # drawn without replacement


def test_the_graph_is_two_products_with_its_adjacency():
    graph, x = pgcn.Graph(3, 4, 0.0), torch.randn(1, 7, 3)
    neighbours = torch.randint(0, 7, (1, 7, 5, 4))
    firsts = torch.cat([torch.arange(7)[None, :, None], neighbours[:, :, 0]], 2)
    out = graph(x, torch.cat([firsts[..., None], neighbours], 3))
    for root in range(7):
        nodes = [root, *neighbours[0, root].flatten().tolist()]
        A = torch.zeros(21, 21)
        for i in range(5):
            A[i, i] = 1
            for j in range(4 * i + 1, 4 * i + 5):
                cosine = torch.cosine_similarity(x[0, nodes[i]], x[0, nodes[j]], dim=0)
                A[i, j] = max(float(cosine), 0) / 4
        h = torch.relu(A @ x[0, nodes] @ graph.gc1.weight + graph.gc1.bias)
        expected = (A @ h @ graph.gc2.weight + graph.gc2.bias)[0]
        assert torch.allclose(out[0, root], torch.cat([expected, x[0, root]]), atol=1e-5)


def test_training_drops_hidden_numbers_and_the_tnd_branch_starts_low():
    nodes, x = torch.zeros(1, 1, 5, 5).long(), torch.ones(1, 1, 3)
    graph = pgcn.Graph(3, 50, 0.5)
    assert not torch.equal(graph(x, nodes), graph(x, nodes))
    graph.eval()
    assert torch.equal(graph(x, nodes), graph(x, nodes))
    assert small(tnd_bias=-3.0).build(4, 3).tnd.bias.item() == -3


def test_features_are_pooled_before_inside_and_after():
    feats = torch.arange(12.0)[:, None]
    for pool, expected in (("mean", [2, 5, 8]), ("max", [3, 7, 9])):
        assert pgcn.pooled(feats, torch.tensor([[3.0, 7.0]]), pool).tolist() == [expected]
    assert pgcn.pooled(feats, NOTHING, "mean").shape == (0, 3)


@pytest.mark.parametrize("proposal, kinds", [
    ((10, 20), "a"),  # the instance itself
    ((10, 18), "a"),  # tIoU 0.8
    ((10, 16), ""),  # 0.6
    ((10, 12), "p"),  # 0.2, and all of it inside
    ((1, 8), "b"),
    ((19.95, 29), "b"),  # it touches the instance: share inside 0.006, tIoU 0.003
    ((40, 40.5), ""),  # shorter than 0.02 of the video
    ((60, 70), ""),  # inside a rejected segment
    ((66, 86), "b"),  # a fifth of it is
])
def test_kinds_of_proposals(proposal, kinds):
    record = instances([[10, 20]], [2], [[60, 70]])
    segments = torch.tensor([proposal]).float()
    of = pgcn.targets(segments, torch.ones(1).bool(), record, 90)
    found = [kind for kind, members in zip("apb", of["kinds"]) if members[0]]
    assert "".join(found) == kinds
    assert not pgcn.targets(segments, torch.zeros(1).bool(), record, 90)["kinds"].any()
    if kinds in ("a", "p"):
        assert of["label"].item() == 2
        assert of["truth"][0].tolist() == [10, 20]


def test_completeness_by_hand():
    scores = torch.tensor([[0.5, -2, -0.5, 0, 0.1, -3, -1], [2, 0.2, 0.3, -5, 3, -1, 0]])
    whole = torch.tensor([[1, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 1, 0, 0]]).bool()
    # 0.5 of the wholes; 1.1 and 1.3 are the hardest parts; 3 wholes, int(0.17 * 11) = 1.
    assert pgcn.completeness_loss(scores, whole).item() == pytest.approx((0.5 + 1.1 + 1.3) / 4)


def test_roots_are_of_their_kinds_and_an_action_stands_for_what_is_not_there():
    kinds = torch.zeros(2, 3, 9).bool()
    kinds[0, 0, [1, 4]] = kinds[0, 1, [2, 3, 8]] = kinds[0, 2, 5] = kinds[1, 0, 6] = True
    roots = pgcn.draw_roots(kinds, 50)
    assert roots.shape == (2, 50, 8)
    assert set(roots[0, :, 0].tolist()) == {1, 4}
    assert set(roots[0, :, 1:7].flatten().tolist()) == {2, 3, 8}
    assert set(roots[0, :, 7].tolist()) == {5}
    assert set(roots[1].flatten().tolist()) == {6}


def test_regression_and_its_target_undo_each_other():
    proposals = some_proposals(6, 40)
    truth = some_proposals(6, 40)
    goal = pgcn.offset_target(proposals, truth)
    assert torch.allclose(pgcn.regressed(proposals, goal), truth, atol=1e-4)
    far = pgcn.regressed(proposals, torch.full((6, 2), 1e9))
    assert far.isfinite().all()


# ---- The whole network --------------------------------------------------------------------------

def perfect(proposals, labels, num_classes=3):
    """Outputs that are sure: proposals [(start, end)] are of these classes, -1 background."""
    P = len(labels)
    activity = torch.full((1, P, num_classes + 1), -20.0)
    completeness = torch.full((1, P, num_classes), -20.0)
    for i, label in enumerate(labels):
        activity[0, i, label + 1] = 20
        completeness[0, i, label] = 20 if label >= 0 else -20
    offsets = torch.zeros(1, P, num_classes, 2)
    ones = torch.ones(1, P)
    mask = torch.ones(1, 90).bool()
    return pgcn.Outputs(activity, completeness, offsets, ones, 0 * ones, ones.bool(),
                        torch.tensor([proposals]).float(), [mask[..., None].float()], [mask])


def test_perfect_proposals_give_the_ground_truth():
    proposals = [(10, 20), (11, 13), (40, 50), (25, 35)]
    truth = [instances([[10, 20], [40, 50]], [2, 0])]
    right = perfect(proposals, [2, -1, 0, -1])
    found = evaluate.suppress(right, small())[0]
    order = found["segments"][:, 0].argsort()
    assert found["segments"][order].tolist() == [[10, 20], [40, 50]]
    assert found["labels"][order].tolist() == [2, 0]
    s = small(alqa="none", sets=20)
    losses = pgcn.batch_losses(right, truth, s)
    assert losses["reg"] == losses["quality"] == 0
    # A part of an action is pushed below -1, an action over 1: both are there.
    assert losses["cls"].item() == pytest.approx(0, abs=1e-4)
    wrong = pgcn.batch_losses(perfect(proposals, [0, 2, 2, 1]), truth, s)
    assert wrong["cls"] > 10


def test_the_class_score_is_that_of_both_graphs_and_the_best_class_moves_the_ends():
    out = perfect([(10, 20)], [0], 2)._replace(
        activity=torch.tensor([[[0.25, 0.5, 0.25]]]).log(),
        completeness=torch.tensor([[[-1.0, 2.0]]]),
        offsets=torch.tensor([[[[0.0, 0.0], [0.2, math.log(2)]]]]))
    low, high = 1 / (1 + math.e), 1 / (1 + math.exp(-2))
    assert torch.allclose(out.p_cls(), torch.tensor([[[0.5 * low, 0.25 * high]]]))
    assert torch.allclose(out.segments(), torch.tensor([[[7.0, 27.0]]]))


def bce_by_hand(p, y):
    return -(y * math.log(p) + (1 - y) * math.log(1 - p))


def test_quality_is_that_of_the_regressed_segment():
    sure = perfect([(10, 20)], [0])._replace(
        p_tiou=torch.full((1, 1), 0.8), p_tnd=torch.full((1, 1), 0.1))
    longer = sure._replace(offsets=torch.tensor([0.1, math.log(1.2)]).expand(1, 1, 3, 2))
    assert torch.allclose(longer.segments()[0], torch.tensor([[10.0, 22.0]]))
    truth = [instances([[10, 22]], [0])]
    for out, tIoU, tND in ((sure, 10 / 12, 1 / 144), (longer, 1, 0)):
        for branches, expected in (
                ("tiou+tnd", bce_by_hand(0.8, tIoU) + bce_by_hand(0.1, tND)),
                ("tiou", bce_by_hand(0.8, tIoU)), ("none", 0)):
            found = pgcn.batch_losses(out, truth, small(alqa=branches))["quality"].item()
            assert found == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
def test_padding_and_the_videos_beside_it_change_nothing():
    s = small()
    detector = s.build(4, 3).eval()
    for part in detector.parameters():
        part.normal_(std=0.3)
    x = torch.randn(3, 12, 4)
    mask = torch.stack([torch.arange(12) < n for n in (9, 12, 5)])
    proposals = [some_proposals(6, 9), some_proposals(11, 12), NOTHING]
    together = detector(x, mask, proposals)
    assert together.mask.sum(1).tolist() == [6, 11, 0]
    for b, (length, number) in enumerate(((9, 6), (12, 11), (5, 0))):
        alone = detector(x[b:b + 1, :length], mask[b:b + 1, :length], proposals[b:b + 1])
        for mine, other in zip(alone.predictions(), together.predictions()):
            assert torch.allclose(mine[0, :number], other[b, :number], atol=1e-5)
    found = evaluate.suppress(together, small(min_score=0.0))
    assert len(found[0]["scores"]) > 0
    assert len(found[2]["scores"]) == 0


def test_losses_without_proposals_actions_or_with_everything_rejected_are_finite():
    everything = [[-math.inf, math.inf]]
    for proposals, record in (
            (NOTHING, instances([[1, 5]])),
            (torch.tensor([[1.0, 5.0], [2.0, 2.0]]), instances([])),
            (torch.tensor([[1.0, 5.0]]), instances([], rejected=everything)),
            (torch.tensor([[1.0, 5.0]]), instances([[1, 5]], rejected=everything))):
        s = small()
        detector = s.build(4, 3)
        out = detector(torch.zeros(2, 12, 4), torch.ones(2, 12).bool(), [proposals] * 2)
        parts = pgcn.batch_losses(out, [record, record], s)
        loss = train.objective(parts | {"t_plus": torch.ones(()), "acp": 0}, None, s)
        assert loss.isfinite()
        loss.backward()
        gradients = [p.grad for p in detector.parameters() if p.grad is not None]
        assert gradients and all(gradient.isfinite().all() for gradient in gradients)
        assert (loss.item() > 0) == (parts["positives"].item() > 0)


def test_a_process_with_nothing_to_learn_from_leaves_the_loss(monkeypatch):
    torch.manual_seed(0)
    s = small()
    out = s.build(4, 3).eval()(torch.randn(1, 12, 4), torch.ones(1, 12).bool(),
                               [torch.tensor([[1.0, 5.0]])])
    alone = pgcn.batch_losses(out, [instances([[1, 5]])], s)
    assert alone["cls"] > 0
    monkeypatch.setattr(processes, "process_count", lambda: 2)
    monkeypatch.setattr(processes.dist, "all_reduce", lambda whole: None)  # the other one adds 0
    for name, part in pgcn.batch_losses(out, [instances([[1, 5]])], s).items():
        assert part.item() == pytest.approx(alone[name].item())


def test_training_draws_as_much_for_few_proposals_as_for_many():
    detector, kept = small().build(4, 3), set()
    feats, proposals = torch.randn(1, 20, 4), some_proposals(9, 20)
    for P, training in ((1, True), (9, True), (9, False)):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        detector.train(training)(feats, torch.ones(1, 20).bool(), [proposals[:P]])
        assert torch.equal(before, torch.get_rng_state()) != training
        if training:
            kept.add(float(torch.rand(())))
    assert len(kept) == 1  # so processes with other videos stay in step


# ---- Whole runs ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A user's data set with a run of all stages; no test changes what the run knows."""
    def with_proposals(own, *more):
        write_proposals(own)
        return argv_of(own, *more)
    return finished(tmp_path_factory, pgcn.main, with_proposals, "--theta-l", 0)


def test_a_run_its_page_and_a_new_video(whole, tmp_path, capsys):
    run, video = whole / "run", whole / "features/v12.npy"
    assert any(read_result(run / "pseudo_labels.json").values())
    found = tmp_path / "found.json"
    assert look_into(main, pgcn.Settings, whole, found)[1]
    new = tmp_path / "new.npy"
    new.write_bytes(video.read_bytes())
    capsys.readouterr()
    assert main("--checkpoint", run, "--features", new) == 2
    assert "video new: it has no proposals" in capsys.readouterr().err
    (tmp_path / "q.json").write_text(json.dumps(
        {"results": {"new": read_result(whole / "p.json")["results"]["v12"]}}))
    argv = ("--checkpoint", run, "--features", new, "--proposals", tmp_path / "q.json")
    assert main(*argv, "--out", tmp_path / "new.json", "--min-score", 0) == 0
    assert read_result(tmp_path / "new.json")["results"]["new"]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_run_goes_on_where_it_was_killed(whole, tmp_path):
    argv = argv_of(whole, "--theta-l", 0, "--out", tmp_path / "run")
    kill, code, _ = ENDS["SIGKILL"]
    assert stopped(lambda: pgcn.main(argv), tmp_path / "stderr", kill, STEP, 7) == code
    assert main("--resume", tmp_path / "run") == 0
    assert same(weights(whole / "run"), weights(tmp_path / "run"))


def test_two_processes_with_half_the_batch_follow_one(own):
    write_proposals(own)
    more = ("--theta-l", 0.0, "--log-every", 1, "--graph-dropout", 0, "--activity-dropout", 0,
            "--ratio", 0.5, "--joint-epochs", 1)
    assert main(*argv_of(own, *more, "--batch", 4, "--out", own / "one")) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
               "2", "-m", "extras.pgcn", *argv_of(own, *more, "--batch", 2, "--out", own / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    one, two = ([row for row in read_log(own / name) if "loss" in row] for name in ("one", "two"))
    assert len(one) == len(two) > 3
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in two], rel=0.1)


def test_acp_contrasts_the_first_layer_of_single_steps(own):
    write_proposals(own)
    more = ("--acp", "coarse+fine", "--acp-after", "labelled", "--stage", "supervised")
    assert main(*argv_of(own, *more)) == 0
    assert {row["stage"] for row in read_log(own / "run")} == {"pretrain", "supervised"}
    detector, x = small().build(4, 3), torch.randn(2, 6, 4)
    mask = (torch.arange(6) < torch.tensor([[6], [4]]))
    (level,), (same_mask,) = detector.pyramid(x, mask)
    assert torch.allclose(level[0], detector.Act_GCN.single(x[0]))
    assert not level[1, 4:].any()
    assert torch.equal(same_mask, mask)


def test_proposals_follow_crops_and_an_unlabelled_videos_carry_no_label(own):
    write_proposals(own)
    s = arguments.settings_of([str(word) for word in argv_of(own)], pgcn.Settings)
    d = data.training_data(s)
    video = d.unlabelled[0]
    proposals = s.proposals_of(video)
    assert not hasattr(video, "labels")
    assert proposals.shape == (16, 2)
    seconds = torch.tensor(s.found[video.id])
    assert torch.allclose(video.in_seconds(proposals).float(), seconds.float(), atol=1e-4)
    item = data.load_item(video, d, s)
    crop = item | {"feats": item["feats"][10:40], "start": 10}
    batch = data.collate([crop, item])
    assert "labels" not in batch and "segments" not in batch
    part, all_of_them = s.apply(lambda feats, mask, found: found, batch)
    assert torch.equal(all_of_them, proposals)
    expected, inside = data.crop_segments(proposals, video, 10, 30, s.crop_keep)
    assert torch.equal(part, expected[inside])
    assert 0 < len(part) < 16
    best = arguments.settings_of([str(word) for word in argv_of(own, "--most", 3)], pgcn.Settings)
    assert torch.equal(best.proposals_of(video), proposals[:3])
    name = video.id
    write_proposals(own, lambda content: content["results"].update(
        {f"v_{name}": content["results"].pop(name)}))  # as ActivityNet's lists have it
    again = arguments.settings_of([str(word) for word in argv_of(own)], pgcn.Settings)
    assert torch.equal(again.proposals_of(video), proposals)


def gone(name):
    return lambda content: content["results"].pop(name)


def of_video(name, found):
    return lambda content: content["results"].update({name: found})


def every(function):
    """A change of each proposal: function(proposal)."""
    return lambda content: [function(p) for found in content["results"].values() for p in found]


@pytest.mark.parametrize("change, words", [
    (gone("v3"), ["p.json, video v3: it has no proposals", "--proposals FILE"]),
    (lambda content: content["results"].clear(), ["p.json has no proposals"]),
    (of_video("v4", [{"segment": [1, "x"], "score": 1}]), ["p.json, video v4", "'x'"]),
    (of_video("v4", [{"segment": [3, 2], "score": 1}]), ["v4", "[3.0, 2.0] ends before"]),
    (of_video("v4", [{"segment": [3, 4]}]), ["v4", "a score must be a number, not None"]),
    (of_video("v4", [{"segment": [3, 3], "score": 1}]), ["v4", "is empty", "--bad-segments skip"]),
    (of_video("v4", [{"segment": [300, 400], "score": 1}]), ["v4", "outside the video", "32.5"]),
    (of_video("v4", {"a": 1}), ["v4", "must list predictions"]),
    (every(lambda p: p.update(segment=[28.0, 30.0])), ["9 of 9 labelled", "nothing to learn"]),
    (lambda content: content.pop("results"), ['no "results"']),
    (lambda content: content.update(labelled=None), ["p.json: labelled is None, must be a list"]),
])
def test_proposals_that_cannot_be_used_are_one_sentence(own, capsys, change, words):
    write_proposals(own, change)
    assert main(*argv_of(own)) == 2
    *idle, text = capsys.readouterr().err.splitlines()
    assert idle[0].startswith("warning: this detector reads no setting channels and no heads")
    assert text.startswith("error: ") and "have such faults" not in text
    for word in words:
        assert word in text
    assert not (own / "run").exists()


@pytest.mark.parametrize("change, words", [
    (of_video("v4", []), "1 videos have no proposal that can be used: v4"),
    (of_video("stray", []), "1 videos are none of this run: stray"),
    (lambda content: content.update(labelled=["v0", "v12"]), "has seen the labels of"),
    (lambda content: content.update(labelled=["v_v12"]), "that are not labelled here: v12"),
    (of_video("v4", [{"segment": [300, 400], "score": 1}]), ""),
])
def test_odd_proposals_are_warnings(own, capsys, change, words):
    write_proposals(own, change)
    assert main(*argv_of(own, "--check", "--bad-segments", "skip")) == 0
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("more, words", [
    (("--proposals", ""), "setting proposals is needed"),
    (("--proposals", "absent.json"), "absent.json"),
    (("--mixup", 0.4), "setting mixup mixes"),
    (("--most", 0), "setting most"),
])
def test_bad_settings_are_refused(own, capsys, more, words):
    write_proposals(own)
    assert main(*argv_of(own, *more)) == 2
    text = capsys.readouterr().err
    assert words in text and text.count("error: ") == 1


def test_a_run_goes_on_with_moved_proposals_but_not_with_others(whole, capsys):
    moved = whole / "moved.json"
    moved.write_bytes((whole / "p.json").read_bytes())
    assert main("--resume", whole / "run", "--proposals", moved, "--check") == 0
    content = read_result(moved)
    content["results"]["v5"] = content["results"]["v5"][1:]
    moved.write_text(json.dumps(content))
    capsys.readouterr()
    assert main("--resume", whole / "run", "--proposals", moved, "--check") == 2
    assert "is of other data: 1 videos" in capsys.readouterr().err


def test_bmn_writes_the_proposals_of_all_videos_of_its_run(own, tmp_path, capsys):
    tiny = ("--hidden", 8, "--map-wide", 8, "--map-width", 4, "--samples", 4, "--max-steps", 40)
    words = own_argv(own, "--acp", "none", *tiny, "--stage", "supervised", "--out", own / "bmn")
    assert bmn.main(words) == 0
    of_bmn = ("--export-proposals", own / "q.json", "--checkpoint", own / "bmn")
    assert bmn.main([str(word) for word in of_bmn]) == 0
    content = read_result(own / "q.json")
    assert set(content["results"]) == {f"v{i}" for i in range(14)}
    assert content["labelled"] == read_result(own / "bmn/split.json")["labelled"]
    found = bmn.read_proposals(own / "q.json")
    assert all(len(segments) > 20 for segments in found.values())
    argv = argv_of(own, "--proposals", own / "q.json", "--stage", "supervised")
    assert main(*argv) == 0
    assert "has seen" not in capsys.readouterr().err
    new = [*of_bmn, "--features", own / "features/v12.npy"]
    assert bmn.main([str(word) for word in new]) == 0
    again = bmn.read_proposals(own / "q.json")
    assert set(again) == {"v12"}
    assert np.allclose(again["v12"], found["v12"], atol=1e-4)
    (own / "features").rename(own / "elsewhere")
    moved = [*of_bmn, "--dataset", own / "own.json", "--features", own / "elsewhere"]
    assert bmn.main([str(word) for word in moved]) == 0
    assert len(bmn.read_proposals(own / "q.json")) == 14
    for argv, word in ((of_bmn[:2], "--checkpoint"), (of_bmn, "no folder")):
        assert bmn.main([str(part) for part in argv]) == 2
        assert word in capsys.readouterr().err


def test_the_table_of_p_gcn(own, capsys):
    write_proposals(own)
    (own / "p.json").rename(own / "p0.json")
    epochs = ("--supervised-epochs", 1, "--joint-epochs", 1)
    argv = table_argv(own, *TINY, *epochs, "--proposals", own / "p{seed}.json", "--seeds", 1)
    assert tables.main(["S8", *argv]) == 0
    text = capsys.readouterr().out
    for name, *_ in tables.ROWS["S8"]:
        assert f"| {name} |" in text
