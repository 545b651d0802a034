"""Tests of extras/bmn.py: the public BMN's outputs, brute force, empty cases, whole runs."""
import json
import math

import numpy as np
import pytest
import torch

import data
import evaluate
import train
from extras import bench, bmn, tables, viewer
from plumbing import arguments, forms
from plumbing.public import take_weights
from tests.helpers import SHARED, finished, needs_shared, own_argv, read_result, same, weights
from tests.test_train import ENDS, STEP, stopped

TINY = ("--hidden", 8, "--map-wide", 8, "--map-width", 4, "--samples", 4, "--max-steps", 40)


def small(**changes):
    """The settings of a small BMN."""
    shape = {"hidden": 8, "map_wide": 6, "map_width": 4, "samples": 4, "max_steps": 12}
    return bmn.Settings(**shape | changes)


def argv_of(own, *more):
    """A command line of extras.bmn for the user's data set."""
    return own_argv(own, *(str(word) for word in (*TINY, *more)))


def outputs_of(s, pairs, steps=12):
    """Perfect Outputs of a video in one window: its actions are the pairs [(s, e, label)]."""
    W = s.window()
    start, end = torch.zeros(2, 1, 1, W)
    of = bmn.pairs_of(W).T.tolist()
    p = torch.zeros(4, 1, len(of))
    logits = torch.full((1, len(of), 3), -20.0)
    for first, last, label in pairs:
        start[..., first] = end[..., last] = 1
        i = of.index([first, last])
        p[:2, 0, i] = 1
        logits[0, i, label] = 20
    inside = (torch.arange(W) < steps)[None, None]
    mask = (p[0] > 0) if pairs else p[0] > 1
    return bmn.Outputs(logits, start, end, p[1], p[0], p[2], mask, inside, torch.tensor([0]),
                       [torch.zeros(1, steps, 2)], [inside[0]])


def instances(segments, labels=None, rejected=()):
    """A record of instances."""
    return {
        "segments": torch.tensor(segments, dtype=torch.float32).reshape(-1, 2),
        "labels": torch.tensor(labels or [0] * len(segments)),
        "rejected": torch.tensor(rejected, dtype=torch.float32).reshape(-1, 2),
    }


# ---- The public BMN and the ActivityNet toolkit -------------------------------------------------

@pytest.fixture
def public():
    """The public tiny BMN's arrays, channels last, and its detector here."""
    if not SHARED.exists():
        pytest.skip("the reference outputs lie in ../shared, which is absent")
    arrays = np.load(SHARED / "reference/bmn_tiny.npz")
    ref = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    s = small(hidden=16, map_wide=24, map_width=8, samples=32, max_steps=20, alqa="none")
    detector = bmn.Detector(16, 3, s)
    take_weights(detector, SHARED / "reference/bmn_tiny.pth.tar")
    return ref, detector, s


@torch.no_grad()
def test_the_public_checkpoint_gives_the_public_outputs(public):
    ref, detector, _ = public
    s, e = bmn.pairs_of(20)
    out = detector(ref["x"].transpose(1, 2), torch.ones(2, 20).bool())
    regression, classification = ref["confidence_map"][:, :, s, e].unbind(1)
    assert torch.allclose(out.p_tiou, regression, atol=1e-5)
    assert torch.allclose(out.action, classification, atol=1e-5)
    assert torch.allclose(out.start[:, 0], ref["start"], atol=1e-5)
    assert torch.allclose(out.end[:, 0], ref["end"], atol=1e-5)


def test_the_sampling_is_the_public_mask(public):
    ref, _, settings = public
    s, e = bmn.pairs_of(20)
    mine = bmn.sampling(20, settings).to_dense().float().reshape(-1, 32, 20)
    assert torch.equal(mine, ref["sample_mask"][:, :, s, e].permute(2, 1, 0))


def test_the_losses_are_the_public_ones(public):
    ref, _, _ = public
    everything = torch.ones(2, 20).bool()
    loss = sum(bmn.weighted_logistic(ref[side], ref[f"gt_{side}"] > 0.5, everything)
               for side in ("start", "end"))
    assert float(loss) == pytest.approx(float(ref["tem_loss"]), abs=1e-6)
    above = ref["mask"].bool().expand(2, -1, -1)
    loss = bmn.weighted_logistic(ref["confidence_map"][:, 1], ref["iou_map"] > 0.9, above)
    assert float(loss) == pytest.approx(float(ref["pem_cls_loss"]), abs=1e-6)


def test_the_published_size_has_the_published_number_of_parameters():
    detector = bmn.Detector(400, 200, bmn.Settings(alqa="none", max_steps=100))
    public = [p for name, p in detector.named_parameters() if name.startswith("x_")]
    assert sum(p.numel() for p in public) == 4_978_564


@needs_shared
def test_average_recall_is_the_toolkits(tmp_path, capsys):
    path = SHARED / "reference/proposals_activitynet.json"
    expected = read_result(SHARED / "reference/proposals_activitynet_expected.json")
    annotations = forms.read_annotations(SHARED / "data/activitynet/activitynet_v1.3.json")
    proposals = bmn.read_proposals(path)
    truth = {name: annotations[name].segments for name in proposals}
    result = bmn.average_recall(truth, proposals)
    assert np.abs(result["recall"] - expected["recall"]).max() < 1e-9
    for n, value in expected["AR_at"].items():
        assert result["average_recall"][int(n) - 1] == pytest.approx(value, abs=1e-9)
    assert result["area"] == pytest.approx(expected["area_under_AR_AN_percent"], abs=1e-6)
    assert result["proposals"] == pytest.approx(expected["proposals_per_video"])


# ---- Brute force --------------------------------------------------------------------------------

def sample_by_hand(x, start, end, n, s):
    """Sample n of a pair of x (W, C): the mean of its interpolated points."""
    total = torch.zeros(x.shape[1])
    more = s.margin * (end + 2 - start)
    every = s.samples * s.points
    for k in range(n * s.points, (n + 1) * s.points):
        position = start - more + (end + 1 - start + 2 * more) * k / (every - 1)
        below = math.trunc(position)
        above = position - below
        for step, weight in ((below, 1 - above), (math.ceil(position), above)):
            if 0 <= step < len(x):
                total += weight * x[step]
    return total / s.points


def test_the_matching_layer_is_a_loop_over_interpolated_samples():
    s = small(max_steps=7)
    x = torch.randn(2, 7, 3, requires_grad=True)
    weight = torch.randn(5, 3, 4, 1, 1, requires_grad=True)
    y = bmn.Matching(s)(x, weight)
    for p, (start, end) in enumerate(bmn.pairs_of(7).T.tolist()):
        for b in range(2):
            samples = torch.stack([sample_by_hand(x[b], start, end, n, s) for n in range(4)])
            expected = torch.einsum("nc,wcn->w", samples, weight[..., 0, 0])
            assert torch.allclose(y[p, b], expected, atol=1e-5)
    dense = bench.DenseMatching(s)(x, weight)  # that of the bench
    assert torch.allclose(dense, y, atol=1e-5)
    assert torch.autograd.gradcheck(
        lambda x, w: bmn.Matching(s).forward(x.float(), w.float()).double().sum(0),
        (x[:1].double(), weight[:2].double()), eps=1e-2, atol=1e-2)


def test_the_segment_classifier_is_linear_in_means():
    head = bmn.Segmentwise(3, 2)
    x = torch.randn(1, 9, 3)
    logits = head(x)
    i = bmn.pairs_of(9).T.tolist().index([4, 6])
    expected = (head.before(x[0, 2:4].mean(0)) + head.inside(x[0, 4:7].mean(0))
                + head.after(x[0, 7:9].mean(0)))
    assert torch.allclose(logits[0, i], expected, atol=1e-5)
    first = bmn.pairs_of(9).T.tolist().index([0, 8])  # nothing before, nothing after
    assert torch.allclose(logits[0, first], head.inside(x[0].mean(0)), atol=1e-5)


@torch.no_grad()
def test_padding_changes_nothing():
    s = small()
    detector = bmn.Detector(4, 3, s).eval()
    x = torch.randn(1, 9, 4)
    alone = evaluate.suppress(detector(x, torch.ones(1, 9).bool()), s)[0]
    padded = torch.cat([x, torch.randn(1, 2, 4)], 1)
    mask = (torch.arange(11) < 9)[None]
    beside = evaluate.suppress(detector(padded, mask), s)[0]
    assert len(alone["scores"])
    for key, value in alone.items():
        assert torch.allclose(value.double(), beside[key].double(), atol=1e-5)
    assert alone["segments"].max() <= 8.5


def test_a_long_video_is_seen_in_half_overlapping_windows():
    detector = bmn.Detector(4, 3, small()).eval()
    out = detector(torch.randn(2, 27, 4), torch.ones(2, 27).bool())
    assert out.first.tolist() == [0, 6, 12, 15]
    assert len(out.sizes()) == 4
    assert out.segments().shape == (2, 4 * 78, 2)
    assert out.segments()[0, -1].tolist() == [25.5, 26.5]
    assert out.p_cls().shape == (2, 4 * 78, 3)


# ---- Targets, losses, proposals -----------------------------------------------------------------

def test_perfect_maps_and_boundaries_give_the_ground_truth():
    s = small(min_length=0.5)
    record = evaluate.suppress(outputs_of(s, [(1, 3, 2), (5, 9, 0)]), s)[0]
    order = record["segments"][:, 0].argsort()
    assert record["segments"][order].tolist() == [[0.5, 3.5], [4.5, 9.5]]
    assert record["labels"][order].tolist() == [2, 0]
    truth = [instances([[0.5, 3.5], [4.5, 9.5]], [2, 0])]
    perfect = bmn.batch_losses(outputs_of(s, [(1, 3, 2), (5, 9, 0)]), truth, s)
    wrong = bmn.batch_losses(outputs_of(s, [(1, 3, 0), (5, 8, 2)]), truth, s)
    assert float(perfect["cls"]) < float(wrong["cls"])


def test_boundaries_are_peaks_or_high():
    p = torch.tensor([[[0.1, 0.3, 0.2, 0.2, 0.9, 0.5, 0.6, 0.1, 0.2]]])
    found = bmn.peaks(p, torch.ones_like(p).bool())
    assert found[0, 0].nonzero()[:, 0].tolist() == [1, 4, 5, 6, 8]
    assert not bmn.peaks(p, torch.zeros_like(p).bool()).any()


def test_targets_of_a_window():
    s = small()
    out = outputs_of(s, [])
    found = bmn.targets(out, 0, instances([[2.5, 6.5]], [1], [[8.0, 11.0]]))
    of = bmn.pairs_of(12).T.tolist()
    assert found["tIoU"][of.index([3, 6])] == 1
    assert found["tND"][of.index([3, 6])] == 0
    assert found["tIoU"][of.index([3, 4])] == 0.5
    assert found["label"][of.index([3, 4])] == 1
    assert found["unsure"][of.index([8, 11])]
    assert not found["unsure"][of.index([3, 11])]
    assert found["start"][2] == found["start"][3] == 1
    assert found["start"][1] == pytest.approx(0.5)
    assert found["end"].nonzero()[:, 0].tolist() == [5, 6, 7, 8]


def test_losses_without_instances_or_with_everything_rejected_are_finite():
    s = small()
    detector = bmn.Detector(4, 3, s)
    mask = torch.ones(2, 12).bool()
    for record in (instances([]), instances([], rejected=[[-math.inf, math.inf]])):
        out = detector(torch.randn(2, 12, 4), mask)
        parts = bmn.batch_losses(out, [record, record], s)
        loss = train.objective(parts | {"t_plus": torch.ones(()), "acp": 0}, None, s)
        assert loss.isfinite()
        loss.backward()
        gradients = [p.grad for p in detector.parameters() if p.grad is not None]
        assert all(gradient.isfinite().all() for gradient in gradients)
    assert parts["cls"].item() == 0
    assert len(evaluate.suppress(outputs_of(s, []), s)[0]["scores"]) == 0


def test_the_regression_draws_high_middle_and_low_alike():
    tIoU = torch.rand(1, 20_000)
    use = torch.rand(1, 20_000) < 0.5
    drawn = bmn.drawn_pairs(tIoU, use)
    assert not (drawn & ~use).any()
    high, low = drawn & (tIoU > 0.7), drawn & (tIoU <= 0.3)
    assert high.sum() == (use & (tIoU > 0.7)).sum()
    assert low.sum() == pytest.approx(int(high.sum()), rel=0.1)
    assert not bmn.drawn_pairs(tIoU * 0.6, use).any()


def test_average_recall_of_nothing():
    truth = {"a": np.array([[0.0, 1.0]]), "b": np.zeros((0, 2))}
    nothing = bmn.average_recall(truth, {})
    assert nothing["area"] == 0
    whole = bmn.average_recall(truth, {"a": truth["a"]})
    assert whole["recall"].max() == 1


# ---- Whole runs ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A user's data set with a run of three stages; no test changes what the run knows."""
    return finished(tmp_path_factory, bmn.main, argv_of, "--theta-l", 0)


def test_a_run_of_three_stages_its_page_and_a_new_video(whole, tmp_path, capsys):
    run = whole / "run"
    assert "python -m extras.bmn --checkpoint" in (whole / "stdout").read_text()
    predicted = read_result(run / "predictions.json")["results"]["v12"]
    assert len(predicted) > 3
    assert any(read_result(run / "pseudo_labels.json").values())
    localize = evaluate.Localizer(run, kind=bmn.Settings)
    segments, labels, scores = localize(np.load(whole / "features/v12.npy"))
    assert labels == [d["label"] for d in predicted]
    assert scores.tolist() == pytest.approx([d["score"] for d in predicted], abs=1e-6)
    assert np.abs(segments - [d["segment"] for d in predicted]).max() < 1e-4
    argv = ("--checkpoint", run, "--features", whole / "features/v12.npy", "--min-score", 0,
            "--out", tmp_path / "found.json")
    assert bmn.main([str(word) for word in argv]) == 0
    assert len(read_result(tmp_path / "found.json")["results"]["v12"]) == len(predicted)
    assert bmn.main(["--checkpoint", str(run)]) == 0
    assert viewer.main([str(run)]) == 0
    assert (run / "page.html").stat().st_size > 10_000
    capsys.readouterr()
    assert bmn.main(["--proposals", str(run / "predictions.json"),
                     "--gt", str(whole / "own.json")]) == 0
    assert "AR@100" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_run_goes_on_where_it_was_killed(whole, tmp_path):
    argv = argv_of(whole, "--theta-l", 0, "--out", tmp_path / "run")
    kill, code, _ = ENDS["SIGKILL"]
    assert stopped(lambda: bmn.main(argv), tmp_path / "stderr", kill, STEP, 7) == code
    assert bmn.main(["--resume", str(tmp_path / "run")]) == 0
    assert same(weights(whole / "run"), weights(tmp_path / "run"))


@needs_shared
def test_init_takes_a_public_checkpoint(own, capsys):
    more = ("--hidden", 16, "--map-wide", 24, "--map-width", 8, "--samples", 32,
            "--init", SHARED / "reference/bmn_tiny.pth.tar", "--stage", "supervised",
            "--precision", "bfloat16")
    assert bmn.main(argv_of(own, *more)) == 0
    text = capsys.readouterr().out
    assert "weights are those of" in text
    assert "not used: x_1d_b.0.weight" in text  # of another width


def test_rows_over_a_whole_video_are_read_as_the_public_bmn_has_them(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "features").mkdir()
    header = ",".join(f"c{j}" for j in range(8))
    database = {}
    for i in range(4):
        np.savetxt(tmp_path / f"features/v_{i}.csv", rng.normal(size=(100, 8)), "%.4f", ",",
                   header=header, comments="")
        database[f"{i}"] = {
            "subset": "training" if i < 3 else "validation", "duration": 50.0,
            "annotations": [{"segment": [10.0, 30.0], "label": "AB"[i % 2]}]}
    (tmp_path / "anet.json").write_text(json.dumps({"database": database}))
    (tmp_path / "split.txt").write_text("v_0\nv_2\n")  # as SSTAP's split files name them
    s = arguments.settings_of([
        "--dataset", "activitynet", "--annotations", str(tmp_path / "anet.json"),
        "--features", str(tmp_path / "features"), "--split", str(tmp_path / "split.txt"),
        "--out", str(tmp_path / "run")], bmn.Settings)
    d = data.training_data(s)
    assert [video.id for video in d.labelled] == ["0", "2"]
    assert d.labelled[0].steps == s.window() == 100
    action = bmn.pairs_of(100).T.tolist().index([20, 59])  # two rows a second
    out = s.build(8, 2)(data.load_item(d.labelled[0], d, s)["feats"][None],
                        torch.ones(1, 100).bool())
    record = instances(d.labelled[0].segments.tolist(), d.labelled[0].labels.tolist())
    assert bmn.targets(out, 0, record)["tIoU"].argmax() == action


def test_external_scores_name_the_classes_and_the_result_says_so(own):
    scores = {f"v{i}": {"A": 0.9, "B": 0.1} for i in range(14)}
    (own / "scores.json").write_text(json.dumps({"results": scores}))
    more = ("--one-class", "--ext-scores", own / "scores.json", "--stage", "supervised")
    assert bmn.main(argv_of(own, *more)) == 0
    assert read_result(own / "run/metrics.json")["external_scores"]


def test_the_tables_of_bmn(own, capsys):
    argv = argv_of(own, "--theta-l", 0, "--pretrain-epochs", 1, "--supervised-epochs", 1,
                   "--joint-epochs", 1)
    at = argv.index("--out")
    del argv[at:at + 2]
    argv.remove("--no-page")
    assert tables.main(["1-bmn", "S3-bmn", "--seeds", "1", "--runs", str(own / "runs"), *argv]) == 0
    text = capsys.readouterr().out
    for name, *_ in tables.ROWS["1-bmn"] + tables.ROWS["S3-bmn"]:
        assert f"| {name} |" in text


def test_bad_settings_and_the_checkpoint_of_the_other_detector_are_refused(own, capsys):
    assert train.main(own_argv(own, "--stage", "supervised", "--acp", "none")) == 0
    for main, argv, word in (
            (bmn.main, argv_of(own, "--hidden", 6), "multiple of 4"),
            (bmn.main, argv_of(own, "--max-steps", 5000), "at most 512"),
            (bmn.main, ["--proposals", own / "none.json", "--gt", own / "own.json"], "none.json"),
            (bmn.main, ["--checkpoint", own / "run"], "lacks the setting"),
            (train.main, own_argv(own, "--hidden", 8), "--hidden")):
        assert main([str(part) for part in argv]) == 2, word
        assert word in capsys.readouterr().err
