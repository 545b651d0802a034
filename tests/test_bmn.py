"""Tests of extras/bmn.py: the public BMN's outputs, brute force, empty cases, whole runs."""
import itertools
import json
import math

import numpy as np
import pytest
import torch

import data
import evaluate
import train
from extras import bench, bmn, tables
from plumbing import arguments, forms, public
from plumbing.listing import once
from tests.helpers import (
    SHARED,
    assert_padding_changes_nothing,
    finished,
    needs_shared,
    own_argv,
    read_result,
    same,
    weights,
)
from tests.test_extras import table_argv
from tests.test_people import look_into
from tests.test_train import ENDS, STEP, stopped

TINY = ("--hidden", 8, "--map-wide", 8, "--map-width", 4, "--samples", 4, "--max-steps", 40)


def small(**changes):
    """The settings of a small BMN."""
    shape = {"hidden": 8, "map_wide": 6, "map_width": 4, "samples": 4, "max_steps": 12}
    return bmn.Settings(**shape | changes)


def main(*argv):
    """The exit code of extras.bmn."""
    return bmn.main([str(word) for word in argv])


def argv_of(own, *more):
    """A command line of extras.bmn for the user's data set."""
    return own_argv(own, *TINY, *more)


def place(W, first, last):
    """Where a pair of steps is among all those of a window."""
    return bmn.pairs_of(W).T.tolist().index([first, last])


def outputs_of(s, pairs):
    """Perfect Outputs of a video of one window: its actions are the pairs [(s, e, label)]."""
    W = s.window()
    start, end = torch.zeros(2, 1, 1, W)
    p = torch.zeros(3, 1, W * (W + 1) // 2)
    logits = torch.full((1, p.shape[2], 3), -20.0)
    for first, last, label in pairs:
        i = place(W, first, last)
        start[..., first] = end[..., last] = p[:2, 0, i] = 1
        logits[0, i, label] = 20
    inside = torch.ones(1, 1, W).bool()
    return bmn.Outputs(logits, start, end, *p, p[0] > 0, inside, torch.tensor([0]),
                       [torch.zeros(1, W, 2)], [inside[0]])


def instances(segments, labels=None, rejected=()):
    """A record of instances."""
    both = [torch.tensor(part, dtype=torch.float32).reshape(-1, 2) for part in (segments, rejected)]
    labels = torch.tensor(labels or [0] * len(segments))
    return {"segments": both[0], "labels": labels, "rejected": both[1]}


# ---- The public BMN and the ActivityNet toolkit, brute force, empty cases -----------------------

@needs_shared
@torch.no_grad()
def test_the_public_checkpoint_gives_the_public_outputs_samples_and_losses():
    arrays = np.load(SHARED / "reference/bmn_tiny.npz")
    ref = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    s = small(hidden=16, map_wide=24, map_width=8, samples=32, max_steps=20, alqa="none")
    detector = bmn.Detector(16, 3, s)
    public.take_weights(detector, SHARED / "reference/bmn_tiny.pth.tar")
    first, last = bmn.pairs_of(20)
    everything = torch.ones(2, 20).bool()
    out = detector(ref["x"].transpose(1, 2), everything)
    theirs = (*ref["confidence_map"][:, :, first, last].unbind(1), ref["start"], ref["end"])
    for mine, expected in zip((out.p_tiou, out.action, out.start[:, 0], out.end[:, 0]), theirs):
        assert torch.allclose(mine, expected, atol=1e-5)
    samples = bmn.sampling(20, s).to_dense().float().reshape(-1, 32, 20)
    assert torch.equal(samples, ref["sample_mask"][:, :, first, last].permute(2, 1, 0))
    boundaries = [bmn.weighted_logistic(ref[side], ref[f"gt_{side}"] > 0.5, everything)
                  for side in ("start", "end")]
    above = ref["mask"].bool().expand(2, -1, -1)
    loss = bmn.weighted_logistic(ref["confidence_map"][:, 1], ref["iou_map"] > 0.9, above)
    assert float(sum(boundaries)) == pytest.approx(float(ref["tem_loss"]), abs=1e-6)
    assert float(loss) == pytest.approx(float(ref["pem_cls_loss"]), abs=1e-6)


def test_the_published_size_has_the_published_number_of_parameters():
    detector = bmn.Detector(400, 200, bmn.Settings(alqa="none", max_steps=100))
    theirs = [p for name, p in detector.named_parameters() if name.startswith("x_")]
    assert sum(p.numel() for p in theirs) == 4_978_564


@needs_shared
def test_average_recall_is_the_toolkits():
    expected = read_result(SHARED / "reference/proposals_activitynet_expected.json")
    annotations = forms.read_annotations(SHARED / "data/activitynet/activitynet_v1.3.json")
    proposals = bmn.read_proposals(SHARED / "reference/proposals_activitynet.json")
    truth = {name: annotations[name].segments for name in proposals}
    result = bmn.average_recall(truth, proposals)
    assert np.abs(result["recall"] - expected["recall"]).max() < 1e-9
    for n, value in expected["AR_at"].items():
        assert result["average_recall"][int(n) - 1] == pytest.approx(value, abs=1e-9)
    assert result["area"] == pytest.approx(expected["area_under_AR_AN_percent"], abs=1e-6)
    assert result["proposals"] == pytest.approx(expected["proposals_per_video"])


def test_average_recall_of_nothing():
    truth = {"a": np.array([[0.0, 1.0]]), "b": np.zeros((0, 2))}
    assert bmn.average_recall(truth, {})["area"] == 0
    assert bmn.average_recall(truth, {"a": truth["a"]})["recall"].max() == 1


def sample_by_hand(x, start, end, n, s):
    """Sample n of a pair of x (W, C): the mean of its interpolated points."""
    total = torch.zeros(x.shape[1])
    more = s.margin * (end + 2 - start)
    for k in range(n * s.points, (n + 1) * s.points):
        position = start - more + (end + 1 - start + 2 * more) * k / (s.samples * s.points - 1)
        above = position - math.trunc(position)
        for step, weight in ((math.trunc(position), 1 - above), (math.ceil(position), above)):
            if 0 <= step < len(x):
                total += weight * x[step]
    return total / s.points


def test_the_matching_layer_is_a_loop_over_interpolated_samples():
    s = small(max_steps=7)
    x = torch.randn(2, 7, 3, requires_grad=True)
    weight = torch.randn(5, 3, 4, 1, 1, requires_grad=True)
    y = bmn.Matching(s)(x, weight)
    for b, (start, end) in itertools.product(range(2), bmn.pairs_of(7).T.tolist()):
        samples = torch.stack([sample_by_hand(x[b], start, end, n, s) for n in range(4)])
        expected = torch.einsum("nc,wcn->w", samples, weight[..., 0, 0])
        assert torch.allclose(y[place(7, start, end), b], expected, atol=1e-5)
    assert torch.allclose(bench.DenseMatching(s)(x, weight), y, atol=1e-5)
    assert torch.autograd.gradcheck(
        lambda x, w: bmn.Matching(s).forward(x.float(), w.float()).double().sum(0),
        (x[:1].double(), weight[:2].double()), eps=1e-2, atol=1e-2)


def test_the_segment_classifier_is_linear_in_means():
    head, x = bmn.Segmentwise(3, 2), torch.randn(1, 9, 3)
    logits = head(x)[0]
    before, inside, after = x[0, 2:4].mean(0), x[0, 4:7].mean(0), x[0, 7:9].mean(0)
    expected = head.before(before) + head.inside(inside) + head.after(after)
    assert torch.allclose(logits[place(9, 4, 6)], expected, atol=1e-5)
    # Of the whole there is nothing before and nothing after.
    assert torch.allclose(logits[place(9, 0, 8)], head.inside(x[0].mean(0)), atol=1e-5)


@torch.no_grad()
def test_padding_changes_nothing_and_a_long_video_is_seen_in_half_overlapping_windows():
    s = small()
    detector = bmn.Detector(4, 3, s).eval()
    assert_padding_changes_nothing(detector, s)
    out = detector(torch.randn(2, 27, 4), torch.ones(2, 27).bool())
    assert out.first.tolist() == [0, 6, 12, 18]
    assert out.steps[0].sum(1).tolist() == [12, 12, 12, 9]
    assert len(out.sizes()) == 4
    assert (out.segments().shape, out.p_cls().shape) == ((2, 4 * 78, 2), (2, 4 * 78, 3))
    assert out.segments()[0][out.mask[0]].max() <= 26.5


def test_perfect_maps_and_boundaries_give_the_ground_truth():
    s = small(min_length=0.5)
    right, wrong = outputs_of(s, [(1, 3, 2), (5, 9, 0)]), outputs_of(s, [(1, 3, 0), (5, 8, 2)])
    found = evaluate.suppress(right, s)[0]
    order = found["segments"][:, 0].argsort()
    assert found["segments"][order].tolist() == [[0.5, 3.5], [4.5, 9.5]]
    assert found["labels"][order].tolist() == [2, 0]
    truth = [instances([[0.5, 3.5], [4.5, 9.5]], [2, 0])]
    perfect, other = (bmn.batch_losses(out, truth, s)["cls"] for out in (right, wrong))
    assert perfect < other


def test_boundaries_are_peaks_or_high_and_pairs_are_drawn_high_middle_and_low_alike():
    p = torch.tensor([[[0.1, 0.3, 0.2, 0.2, 0.9, 0.5, 0.6, 0.1, 0.2]]])
    found = bmn.peaks(p, torch.ones_like(p).bool())
    assert found[0, 0].nonzero()[:, 0].tolist() == [1, 4, 5, 6, 8]
    assert not bmn.peaks(p, torch.zeros_like(p).bool()).any()
    tIoU, use = torch.rand(1, 20_000), torch.rand(1, 20_000) < 0.5
    drawn = bmn.drawn_pairs(tIoU, use)
    assert not (drawn & ~use).any()
    high, low = drawn & (tIoU > 0.7), drawn & (tIoU <= 0.3)
    assert high.sum() == (use & (tIoU > 0.7)).sum()
    assert low.sum() == pytest.approx(int(high.sum()), rel=0.1)
    assert not bmn.drawn_pairs(tIoU * 0.6, use).any()


def test_targets_of_a_window():
    found = bmn.targets(outputs_of(small(), []), 0, instances([[2.5, 6.5]], [1], [[8.0, 11.0]]))
    for key, *pair, value in (
            ("tIoU", 3, 6, 1), ("tND", 3, 6, 0), ("tIoU", 3, 4, 0.5), ("label", 3, 4, 1),
            ("unsure", 8, 11, True), ("unsure", 3, 11, False)):
        assert found[key][place(12, *pair)] == value, (key, pair)
    assert found["start"][1:4].tolist() == [pytest.approx(0.5), 1, 1]
    assert found["end"].nonzero()[:, 0].tolist() == [5, 6, 7, 8]


def test_losses_without_instances_or_with_everything_rejected_are_finite():
    s = small()
    detector = bmn.Detector(4, 3, s)
    for record in (instances([]), instances([], rejected=[[-math.inf, math.inf]])):
        out = detector(torch.randn(2, 12, 4), torch.ones(2, 12).bool())
        parts = bmn.batch_losses(out, [record, record], s)
        loss = train.objective(parts | {"t_plus": torch.ones(()), "acp": 0}, None, s)
        assert loss.isfinite()
        loss.backward()
        gradients = [p.grad for p in detector.parameters() if p.grad is not None]
        assert all(gradient.isfinite().all() for gradient in gradients)
        # As without a pair in one process alone: sum_gradients() adds up those of all.
        assert detector.tnd.weight.grad is not None
    assert parts["cls"].item() == 0
    assert len(evaluate.suppress(outputs_of(s, []), s)[0]["scores"]) == 0


# ---- Whole runs ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A user's data set with a run of three stages; no test changes what the run knows."""
    return finished(tmp_path_factory, bmn.main, argv_of, "--theta-l", 0)


def test_a_run_of_three_stages_its_page_and_a_new_video(whole, tmp_path, capsys):
    run = whole / "run"
    assert any(read_result(run / "pseudo_labels.json").values())
    predicted, found = look_into(main, bmn.Settings, whole, tmp_path / "found.json")
    assert len(found) == len(once(predicted))
    capsys.readouterr()
    assert main("--proposals", run / "predictions.json", "--gt", whole / "own.json") == 0
    assert "AR@100" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_run_goes_on_where_it_was_killed(whole, tmp_path):
    argv = argv_of(whole, "--theta-l", 0, "--out", tmp_path / "run")
    kill, code, _ = ENDS["SIGKILL"]
    assert stopped(lambda: bmn.main(argv), tmp_path / "stderr", kill, STEP, 7) == code
    assert main("--resume", tmp_path / "run") == 0
    assert same(weights(whole / "run"), weights(tmp_path / "run"))


@needs_shared
def test_init_takes_a_public_checkpoint(own, capsys):
    more = ("--hidden", 16, "--map-wide", 24, "--map-width", 8, "--samples", 32, "--init",
            SHARED / "reference/bmn_tiny.pth.tar", "--precision", "bfloat16")
    assert main(*argv_of(own, "--stage", "supervised", *more)) == 0
    text = capsys.readouterr().out
    assert "weights are those of" in text
    assert "not used: x_1d_b.0.weight" in text  # of another width


def test_rows_over_a_whole_video_are_read_as_the_public_bmn_has_them(tmp_path):
    rows = np.random.default_rng(0).normal(size=(4, 100, 8))
    database = {}
    for i in range(4):
        np.savetxt(tmp_path / f"v_{i}.csv", rows[i], "%.4f", ",", header="a,b,c,d,e,f,g,h",
                   comments="")
        database[f"{i}"] = {
            "subset": "training" if i < 3 else "validation", "duration": 50.0,
            "annotations": [{"segment": [10.0, 30.0], "label": "AB"[i % 2]}]}
    (tmp_path / "anet.json").write_text(json.dumps({"database": database}))
    (tmp_path / "split.txt").write_text("v_0\nv_2\n")  # as SSTAP's split files name them
    argv = ("--dataset", "activitynet", "--annotations", tmp_path / "anet.json", "--features",
            tmp_path, "--split", tmp_path / "split.txt", "--out", tmp_path / "run")
    s = arguments.settings_of([str(word) for word in argv], bmn.Settings)
    d = data.training_data(s)
    assert [video.id for video in d.labelled] == ["0", "2"]
    video = d.labelled[0]
    assert video.steps == s.window() == 100
    feats = data.load_item(video, d, s)["feats"][None]
    record = instances(video.segments.tolist(), video.labels.tolist())
    found = bmn.targets(s.build(8, 2)(feats, torch.ones(1, 100).bool()), 0, record)
    assert found["tIoU"].argmax() == place(100, 20, 59)  # two rows a second


def test_external_scores_name_the_classes_and_the_result_says_so(own):
    scores = {f"v{i}": {"A": 0.9, "B": 0.1} for i in range(14)}
    (own / "scores.json").write_text(json.dumps({"results": scores}))
    more = ("--one-class", "--ext-scores", own / "scores.json", "--stage", "supervised")
    assert main(*argv_of(own, *more)) == 0
    assert read_result(own / "run/metrics.json")["external_scores"]


def test_the_tables_of_bmn(own, capsys):
    epochs = ("--pretrain-epochs", 1, "--supervised-epochs", 1, "--joint-epochs", 1)
    assert tables.main(["1-bmn", "S3-bmn", *table_argv(own, *TINY, *epochs, "--seeds", 1)]) == 0
    text = capsys.readouterr().out
    for name, *_ in tables.ROWS["1-bmn"] + tables.ROWS["S3-bmn"]:
        assert f"| {name} |" in text


def test_bad_settings_and_the_checkpoint_of_the_other_detector_are_refused(own, capsys):
    assert train.main(own_argv(own, "--stage", "supervised", "--acp", "none")) == 0
    for command, argv, word in (
            (bmn.main, argv_of(own, "--hidden", 6), "multiple of 4"),
            (bmn.main, argv_of(own, "--max-steps", 5000), "at most 512"),
            (bmn.main, ["--proposals", own / "none.json", "--gt", own / "own.json"], "none.json"),
            (bmn.main, ["--checkpoint", own / "run"], "lacks the setting"),
            (train.main, own_argv(own, "--hidden", 8), "--hidden")):
        assert command([str(part) for part in argv]) == 2, word
        assert word in capsys.readouterr().err
