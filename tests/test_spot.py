"""Tests of extras/spot.py: the public SPOT's outputs, brute force, empty cases, whole runs."""
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import evaluate
import train
from extras import bmn, fig4, pgcn, spot, tables
from plumbing import arguments, public
from plumbing.listing import once
from tests.helpers import (
    SHARED,
    assert_padding_changes_nothing,
    edit,
    finished,
    generator,
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

TINY = ("--mask-hidden", 8, "--max-steps", 40)
W = 12  # the steps of small()'s window


def small(**changes):
    """The settings of a small SPOT."""
    return spot.Settings(**{"mask_hidden": 6, "max_steps": W, "smooth": 0} | changes)


def main(*argv):
    """The exit code of extras.spot."""
    return spot.main([str(word) for word in argv])


def argv_of(own, *more):
    """A command line of extras.spot for the user's data set, with SPOT's own pretext."""
    return own_argv(own, *TINY, "--acp", "pretext", *more)


def instances(segments, labels=None, rejected=()):
    """A record of instances."""
    both = [torch.tensor(part, dtype=torch.float32).reshape(-1, 2) for part in (segments, rejected)]
    labels = torch.tensor(labels or [0] * len(segments), dtype=torch.long)
    return {"segments": both[0], "labels": labels, "rejected": both[1]}


def outputs_of(s, record, steps=W, classes=3):
    """Perfect Outputs of a video of one window: what its steps are by the record."""
    inside = torch.arange(W) < steps
    labels, truth = spot.targets(record, W, classes)
    logits = 20.0 * F.one_hot(labels.clamp(min=0), classes + 1)[None, None]
    maps = (truth & inside & inside[:, None]).float()[None, None]
    p = torch.softmax(logits, -1)[..., :-1]
    found = spot.find(p, maps, inside[None, None], torch.tensor([0]), s)
    x = torch.zeros(1, W, 2)
    return spot.Outputs(logits, maps, inside[None, None], x, [x], [inside[None]], found)


# ---- The public SPOT ----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def reference():
    """The arrays of the public tiny SPOT, and our detector with its weights."""
    if not SHARED.exists():
        pytest.skip("the reference outputs lie in ../shared, which is absent")
    arrays = np.load(SHARED / "reference/spot_tiny.npz")
    s = small(mask_hidden=256, max_steps=20, acp="pretext")
    detector = spot.Detector(16, 5, s).eval()
    public.take_weights(detector, SHARED / "reference/spot_tiny.pth.tar")
    return {name: torch.from_numpy(arrays[name]) for name in arrays.files}, detector


@torch.no_grad()
def test_the_public_checkpoint_gives_the_public_outputs(reference):
    ref, detector = reference
    everything = torch.ones(2, 20).bool()
    out = detector(ref["x"].transpose(1, 2), everything)
    logits, embedded = detector.order(ref["x"].transpose(1, 2), everything)
    for mine, theirs in (
            (out.logits[:, 0].transpose(1, 2), "cls"), (out.maps[:, 0], "mask"),
            (out.levels[0].transpose(1, 2), "features"), (logits, "order_logits"),
            (embedded.transpose(1, 2), "features")):
        assert torch.allclose(mine, ref[theirs], atol=1e-5), theirs
    assert F.cross_entropy(logits, ref["order_target"]) == pytest.approx(ref["order_loss"].item())
    classes, maps = spot.pseudo_maps(out.logits[:, 0], out.maps[:, 0], 0, 0.7)
    assert torch.equal(classes, ref["pseudo_class"])
    assert torch.equal(maps, ref["pseudo_mask"].bool())


@needs_shared
def test_the_targets_of_the_public_code_are_ours_of_its_spans(reference):
    ref, _ = reference
    for b, (start, end, label) in enumerate(ref["spans"].tolist()):
        # A span ends before its `end`, and takes one step less than it covers on either side.
        record = instances([[start + 1, end - 2]], [label])
        classes, truth = spot.targets(record, 20, 5)
        assert torch.equal(classes, ref["gt_class"][b])
        assert torch.equal(truth, ref["gt_mask"][b].bool())


@needs_shared
def test_the_losses_are_the_public_ones(reference):
    ref, _ = reference
    everything = torch.ones(2, 20, 20).bool()
    for classes, truth, prefix in (
            (ref["gt_class"], ref["gt_mask"], ""),
            (ref["pseudo_class"], ref["pseudo_mask"], "unsup_")):
        # The public code makes the focal loss of the batch's mean cross-entropy.
        L_class = spot.focal(F.cross_entropy(ref["cls"], classes))
        L_mask = spot.mask_loss(ref["mask"], truth.bool(), everything)
        assert L_class.item() == pytest.approx(ref[f"{prefix}class_loss"].item(), abs=1e-5)
        assert L_mask.item() == pytest.approx(ref[f"{prefix}mask_loss"].item(), abs=1e-5)
        assert (L_class + L_mask).item() == pytest.approx(ref[f"{prefix}loss"].item(), abs=1e-5)
    x, inputs = ref["features"].transpose(1, 2), ref["x"].transpose(1, 2)
    L_feature = spot.feature_loss(x, inputs, torch.ones(2, 20).bool())
    assert L_feature.item() == pytest.approx(ref["feature_loss"].item(), abs=1e-5)
    pairs = zip(*(ref[f"pair_{kind}"] for kind in ("HA", "EA", "HB", "EB")))
    each = [spot.nce(HA, EA, EB) + spot.nce(HB, EB, EA) for HA, EA, HB, EB in pairs]
    assert sum(each).item() / 2 == pytest.approx(ref["snico_loss"].item(), abs=1e-5)


def groups(on):
    """The groups of neighbouring steps that are on, a list of lists."""
    found = []
    for t in np.nonzero(np.asarray(on))[0].tolist():
        if not found or t > found[-1][-1] + 1:
            found.append([])
        found[-1].append(t)
    return found


def public_proposals(p, own, maps, least):
    """The public SPOT's proposals of a video: (start, end, score of the mask, of the class).

    From first to last step over a level, where ours are single runs; ends do not count."""
    best, T = p.max(0), maps.shape[1]
    of_classes = []
    for level in np.arange(0.1, 1, 0.1):
        on = np.nonzero(best > level)[0]
        if len(on) and on[-1] - on[0] > 1:
            of_classes.append((on[0], on[-1], best[on[0]:on[-1]].max()))
    rows = set()
    for i, level in itertools.product(best.argsort()[::-1][:10], spot.MASK_LEVELS):
        found = groups(maps[i] > level)
        longest = max(found, key=len, default=[0])
        first, last = longest[0], longest[-1]
        if last - first <= least * T:
            continue
        high = own[first:last].max()
        of_mask = high * maps[i, first + 1:last - 1].mean()
        rows.add((found[0][0] / T, found[-1][-1] / T, of_mask, high * best[i]))
        rows |= {(s / T, e / T, maps[i, s:e].max(), score) for s, e, score in of_classes}
    return np.array(sorted(rows))


@torch.no_grad()
def test_the_public_proposals_follow_from_our_outputs(reference):
    ref, detector = reference
    out = detector(ref["x"].transpose(1, 2), torch.ones(2, 20).bool())
    p = torch.softmax(out.logits[0, 0], -1)[:, :-1].T.numpy()
    own = p[out.logits[0, 0, :, :-1].mean(0).argmax()]
    mine = public_proposals(p, own, out.maps[0, 0].numpy(), 0.1)
    theirs = np.array(sorted(map(tuple, ref["own_proposals"].tolist())))
    assert mine.shape == theirs.shape == (52, 4)
    assert np.abs(mine - theirs).max() < 1e-5


def test_the_published_size_has_the_published_number_of_parameters():
    detector = spot.Detector(400, 200, spot.Settings(max_steps=100, acp="none"))
    count = [sum(p.numel() for p in part.parameters()) for part in detector.children()]
    assert count == [2_561_200, 80_601, 333_056]


# ---- Brute force and empty cases ----------------------------------------------------------------

def test_runs_and_means_are_loops():
    over = torch.rand(2, 9, 9) < 0.7
    over[1, :, 8] = False  # a video of 8 steps
    first, stop = spot.runs(over)
    x = torch.rand(2, 9, 3)
    inside = torch.arange(9) < torch.tensor([[9], [8]])
    scores = spot.class_scores(x, first, stop, 0.5, inside)
    for b, i in itertools.product(range(2), range(9)):
        mine = [group for group in groups(over[b, i]) if i in group]
        assert (first[b, i] < stop[b, i]) == bool(mine)
        for group in mine:
            start, end = group[0], group[-1] + 1
            assert (first[b, i], stop[b, i]) == (start, end)
            margin = math.ceil(0.5 * (end - start))
            around = [*range(max(start - margin, 0), start), *range(end, min(end + margin, 9 - b))]
            rest = x[b, around].sum(0) / max(len(around), 1)
            expected = (x[b, group].mean(0) - rest).clamp(min=0)
            assert torch.allclose(scores[b, i], expected, atol=1e-5)
    inside = inside[:, None]  # (2, 1, 9)
    means = spot.smoothed(x.transpose(1, 2), inside, 2)
    for b, t in itertools.product(range(2), range(9)):
        expected = x[b, max(t - 2, 0):min(t + 3, 9 - b)].mean(0) * inside[b, 0, t]
        assert torch.allclose(means[b, :, t], expected)


def test_targets_are_a_double_loop_over_steps():
    record = instances([[1.5, 8.2], [3.0, 5.0], [9.0, 9.0], [9.6, 9.9]], [2, 0, 1, 1],
                       [[9.9, 20.0]])
    classes, truth = spot.targets(record, W, 3)
    mine = {}  # the instance of each step, the shortest
    order = sorted(range(4), key=lambda n: -record["segments"][n].diff())
    for n, t in itertools.product(order, range(W)):
        start, end = record["segments"][n].tolist()
        if start <= t <= end:
            mine[t] = n
    for i, j in itertools.product(range(W), range(W)):
        start, end = record["segments"][mine[i]].tolist() if i in mine else (1, 0)
        assert truth[i, j] == (start <= j <= end), (i, j)
    expected = [record["labels"][mine[t]].item() if t in mine else -1 if t > 9 else 3
                for t in range(W)]
    assert classes.tolist() == expected
    classes, truth = spot.targets(instances([]), W, 3)
    assert (classes == 3).all() and not truth.any()


@pytest.mark.parametrize("around", [0.0, 0.25])
@pytest.mark.parametrize(("segments", "labels"), [
    ([[0.5, 3.5], [4.5, 9.5]], [2, 0]),
    ([[0.5, 3.5], [3.5, 9.5]], [2, 0]),  # they touch
    ([[2.5, 7.5]], [1]),
    ([[-0.5, 8.5]], [1]),  # the whole video
])
def test_perfect_maps_give_the_ground_truth(segments, labels, around):
    s = small(min_score=0.3, around=around)
    record = instances(segments, labels)
    found = evaluate.suppress(outputs_of(s, record, steps=9), s)[0]
    order = found["segments"][:, 0].argsort()
    expected = torch.tensor(segments).clamp(max=8.5)
    assert torch.equal(found["segments"][order], expected)
    assert found["labels"][order].tolist() == labels
    right = outputs_of(s, record)
    wrong = outputs_of(s, instances([[4.5, 6.5]], [0]))
    perfect, other = (spot.batch_losses(out, [record], 3, s) for out in (right, wrong))
    assert perfect["cls"] < other["cls"] and perfect["reg"] < other["reg"]


@pytest.mark.parametrize(("first", "end", "found"), [
    (8, 14, {(7.5, 13.5)}),  # the second window alone has it whole
    (3, 8, {(2.5, 7.5)}),  # the first alone
    (7, 11, {(6.5, 10.5)}),  # both
    (2, 17, {(1.5, 11.5), (5.5, 16.5)}),  # neither: its longest parts
    (14, 18, {(13.5, 17.5)}),  # at the video's end, where no window follows
])
def test_a_run_that_a_window_cuts_is_found_where_more_of_it_is(first, end, found):
    s = small(min_score=0.3)
    truth = torch.zeros(1, 40, 1)
    truth[:, first:end] = 1
    p, inside, begin = bmn.windows_of(truth, torch.arange(40)[None] < 18, W)
    maps = p * p.transpose(2, 3)
    runs = spot.find(p, maps, inside, begin, s)
    assert set(map(tuple, runs.segments[runs.mask].tolist())) == found


def test_training_draws_as_much_for_short_videos_as_for_long_ones():
    detector, kept = small(input_dropout=0.3).build(4, 3), set()
    for T, training in ((3, True), (12, True), (12, False)):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        detector.train(training).pyramid(torch.ones(1, T, 4), torch.ones(1, T).bool())
        assert torch.equal(before, torch.get_rng_state()) != training
        if training:
            kept.add(float(torch.rand(())))
    assert len(kept) == 1  # so processes with videos of other lengths stay in step


@torch.no_grad()
@pytest.mark.parametrize("smooth", [0, 2])
def test_padding_changes_nothing_and_a_long_video_is_seen_in_half_overlapping_windows(smooth):
    s = small(smooth=smooth)
    detector = spot.Detector(4, 3, s).eval()
    assert_padding_changes_nothing(detector, s)
    out = detector(torch.randn(2, 27, 4), torch.arange(27) < torch.tensor([[27], [5]]))
    assert all(part.isfinite().all() for part in (*out.predictions(), out.p_cls()))
    assert len(out.sizes()) == 4
    assert out.segments().shape == (2, sum(out.sizes()), 2)
    assert out.segments()[0][out.mask[0]].max() == 26.5
    assert out.segments()[1][out.mask[1]].max() <= 4.5
    assert not out.levels[0][1, 5:].any() and not out.maps[1, 0, :, 5:].any()


@pytest.mark.parametrize("records", [
    [instances([]), instances([])], [instances([], rejected=[[-math.inf, math.inf]])] * 2,
    [instances([[1.0, 2.0]]), instances([])], [{}, {}]])
def test_losses_without_instances_or_with_everything_rejected_are_finite(records):
    s = small(theta_class=1.0)
    detector = spot.Detector(4, 3, s)
    outputs = detector(torch.randn(2, W, 4), torch.ones(2, W).bool())
    parts = spot.batch_losses(outputs, records, 3, s)
    loss = train.objective(parts | {"t_plus": torch.ones(()), "acp": 0}, None, s)
    loss.backward()
    assert loss.isfinite()
    gradients = [p.grad for p in detector.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert len(evaluate.suppress(outputs_of(s, instances([])), s)[0]["scores"]) == 0


def test_pairs_of_steps_that_do_not_count_change_no_mask_loss():
    maps, truth = torch.rand(2, 6, 6), torch.rand(2, 6, 6) < 0.5
    use = torch.zeros(2, 6, 6).bool()
    use[:, :4, :4] = True
    part = [x[:, :4, :4] for x in (maps, truth, use)]
    assert torch.allclose(spot.mask_loss(maps, truth, use), spot.mask_loss(*part))


def test_the_contrast_is_of_steps_near_a_boundary_with_clear_ones():
    action = torch.zeros(20).bool()
    action[4:14] = True
    assert spot.near(action).nonzero()[:, 0].tolist() == list(range(2, 16))
    x = torch.randn(20, 3)
    HA, EA, HB, EB = (x[steps] for steps in (
        [4, 5, 12, 13], list(range(6, 12)), [2, 3, 14, 15], [0, 1, 16, 17, 18, 19]))
    expected = spot.nce(HA, EA, EB) + spot.nce(HB, EB, EA)
    assert torch.allclose(spot.contrast(x, action, ~action), expected)
    assert spot.contrast(x, action, torch.zeros(20).bool()) == 0


def test_what_is_rejected_or_outside_the_video_is_contrasted_with_nothing():
    s, record = small(), instances([[2.0, 6.0]], rejected=[[-0.5, 0.5]])
    x = torch.randn(1, W, 2)
    out = outputs_of(s, record, steps=11)._replace(levels=[x], inputs=x)
    action, known = torch.zeros(2, W).bool()
    action[2:7] = known[1:11] = True
    quality = spot.batch_losses(out, [record], 3, s)["quality"]
    expected = spot.contrast(x[0], action, known & ~action)
    assert expected > 0 and torch.allclose(quality, expected)


def test_published_rows_over_a_whole_video_are_one_window_in_the_public_way():
    s = arguments.settings_of(["--dataset", "activitynet", "--device", "cpu"], spot.Settings)
    assert (s.window(), s.position, s.smooth, s.around, s.vote) == (100, False, 0, 0, 0)
    shorter = small(resize=10)
    out = spot.Detector(4, 3, shorter).eval()(torch.randn(1, 10, 4), torch.ones(1, 10).bool())
    assert out.maps.shape == (1, 1, 10, 10)


def test_a_step_of_a_pseudo_map_teaches_from_its_score_on():
    logits = torch.tensor([[0.0, 9.0], [0.0, 0.5], [3.0, 0.0]])
    classes, truth = spot.pseudo_maps(logits, torch.tensor([0.1, 0.7, 0.8]), 0.9, 0.7)
    assert classes.tolist() == [1, -1, 0]
    assert truth.tolist() == [False, True, True]


# ---- The pretext --------------------------------------------------------------------------------

def test_halves_are_swapped_within_the_video_and_spans_do_not_meet():
    x = torch.arange(14.0).reshape(2, 7, 1)
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    turned = spot.swap_halves(x, mask, torch.tensor([True, True]))[..., 0]
    assert turned.tolist() == [[3, 4, 5, 6, 0, 1, 2], [9, 10, 7, 8, 11, 12, 13]]
    assert torch.equal(spot.swap_halves(x, mask, torch.tensor([False, False])), x)
    for record in spot.random_spans(mask.repeat(50, 1), generator()):
        (a, b), (c, d) = record["segments"].tolist()
        assert 0 <= a <= b <= c <= d < 7
    short = spot.random_spans(mask, generator())[1]["segments"]
    assert short.max() < 4


@torch.no_grad()
def test_the_pretext_learns_the_mask_of_what_is_left_and_the_order(monkeypatch):
    s = small(acp="pretext", device="cpu", precision="float32")
    detector = spot.Detector(4, 3, s).eval()
    x, mask = torch.randn(2, 9, 4), torch.arange(9) < torch.tensor([[9], [7]])
    record = instances([[1.0, 3.0], [5.0, 6.0]])
    monkeypatch.setattr(spot, "random_spans", lambda mask, generator: [record] * 2)
    draws = torch.rand(2, generator=generator(3))
    parts = spot.pretext_losses(detector, {"feats": x, "mask": mask}, s, generator(3))
    erased = x.clone()
    erased[:, [0, 4, 7, 8]] = 0
    square = torch.zeros(2, W, W).bool()
    square[:, 1:4, 1:4] = square[:, 5:7, 5:7] = True
    maps = detector(erased, mask).maps[:, 0]
    use = F.pad(mask[..., None] & mask[:, None], (0, 3, 0, 3))
    assert torch.allclose(parts["mask"], spot.mask_loss(maps, square, use))
    turned = spot.swap_halves(x, mask, draws < 0.5)
    logits, embedded = detector.order(turned, mask)
    assert torch.allclose(parts["order"], F.cross_entropy(logits, (draws >= 0.5).long()))
    expected = ((embedded - turned) ** 2)[mask].mean()
    assert torch.allclose(parts["feature"], expected)


# ---- Whole runs ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A user's data set with a run of three stages; no test changes what the run knows."""
    return finished(tmp_path_factory, spot.main, argv_of)


def test_a_run_of_three_stages_its_page_and_a_new_video(whole, tmp_path):
    run = whole / "run"
    log = read_log(run)
    assert {row["stage"] for row in log} == set(train.STAGES)
    assert {"mask", "order", "feature"} <= log[0].keys()
    assert "unsup_reg" in log[-1]
    assert read_result(fig4.write_representation(run))["after"]
    predicted, found = look_into(main, spot.Settings, whole, tmp_path / "found.json")
    assert len(found) == len(once(predicted))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(("how", "step"), [  # in the pretext, in stage 3
    ("SIGTERM", 2), ("SIGTERM", 17), ("SIGKILL", 20)])
def test_a_run_goes_on_where_it_was_killed(whole, tmp_path, how, step):
    argv = argv_of(whole, "--out", tmp_path / "run")
    kill, code, _ = ENDS[how]
    assert stopped(lambda: spot.main(argv), tmp_path / "stderr", kill, STEP, step) == code
    assert main("--resume", tmp_path / "run") == 0
    assert same(weights(whole / "run"), weights(tmp_path / "run"))


@pytest.mark.parametrize("stage", ["pretrain", "all"])
def test_no_label_of_an_unlabelled_video_and_none_in_the_pretext_changes_a_weight(own, stage):
    assert main(*argv_of(own, "--stage", stage)) == 0
    labelled = read_result(own / "run/split.json")["labelled"]

    def shuffle(database):
        for name, entry in database.items():
            if stage == "pretrain" or name not in labelled:
                entry["annotations"] = [
                    {"label": "AB"[k % 2], "segment": [3.0 * k + 1, 3.0 * k + 5]} for k in range(5)]

    edit(own, shuffle)
    (own / "split.txt").write_text("\n".join(labelled))
    more = ("--split", own / "split.txt", "--ratio", 0, "--out", own / "other")
    assert main(*argv_of(own, "--stage", stage, *more)) == 0
    assert same(weights(own / "run"), weights(own / "other"))


@needs_shared
def test_init_takes_a_public_checkpoint(own, capsys):
    more = ("--init", SHARED / "reference/spot_tiny.pth.tar", "--max-steps", 20, "--mask-hidden",
            256, "--precision", "bfloat16")
    assert main(*argv_of(own, "--stage", "pretrain", *more)) == 0
    text = capsys.readouterr().out
    assert "weights are those of" in text
    assert "not used:" in text  # of another width


def test_the_table_of_spot(own, capsys):
    epochs = ("--pretrain-epochs", 1, "--supervised-epochs", 1, "--joint-epochs", 1)
    assert tables.main(["S3-spot", *table_argv(own, *TINY, *epochs, "--seeds", 1)]) == 0
    text = capsys.readouterr().out
    for name, *_ in tables.ROWS["S3-spot"]:
        assert f"| {name} |" in text


@pytest.mark.parametrize(("more", "word"), [
    (("--max-steps", 5000), "at most 512"),
    (("--alqa", "tiou"), "alqa"),
    (("--acp-after", "labelled"), "acp_after"),
    (("--acp", "coarse", "--acp-after", "labelled+unlabelled"), "--pseudo labels"),
    (("--pseudo", "none"), "pseudo"),
])
def test_bad_settings_are_refused(own, capsys, more, word):
    assert main(*argv_of(own, *more)) == 2
    assert word in capsys.readouterr().err
    assert not (own / "run").exists()


@pytest.mark.parametrize("kind", [bmn.Settings, pgcn.Settings, spot.Settings])
def test_published_data_are_nobodys_own(kind):
    own, published = (kind.preset(name).items() for name in ("my.json", "epic-noun"))
    assert kind.OWN.items() <= own and not kind.OWN.items() & published


def test_the_checkpoint_of_the_other_detector_is_refused(whole, capsys):
    assert evaluate.main(["--checkpoint", str(whole / "run")]) == 2
    assert "Settings" not in capsys.readouterr().err
