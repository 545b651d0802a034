"""Tests of train.py: settings, losses of a batch, whole runs, stopping and going on, processes."""
import errno
import json
import math
import multiprocessing
import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import alqa
import data
import evaluate
import icd
import train
from plumbing import runs, sources
from plumbing.words import BadInput
from tests.helpers import (
    ROOT,
    edit,
    evaluated,
    finished,
    own_argv,
    read_log,
    read_result,
    record,
    refused,
    same,
    settings,
    weights,
)

# A run in which pseudo labels are made twice: 8, 6 and 9 steps, each with a row in the log.
LONGER = (
    "--log-every", 1, "--theta-l", 0.0, "--refresh", 2, "--batch", 3, "--supervised-steps", 6,
    "--joint-epochs", 3, "--acp-after", "labelled+unlabelled", "--audit")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A user's data set with a run of LONGER that nobody stopped; no test changes it."""
    return finished(tmp_path_factory, train.main, own_argv, *LONGER)


# ---- Settings -----------------------------------------------------------------------------------

@pytest.mark.parametrize(("argv", "words"), [
    ("--batch 0", ["setting batch must be", "0"]),
    ("--clip 0.0", ["setting clip must be", "0.0"]),
    ("--ratio nan", ["setting ratio must be", "nan"]),
    ("--lr inf", ["setting lr must be", "inf"]),
    ("--icd-dropout 2.0", ["setting icd_dropout must be", "2.0"]),
    ("--crop-min 1.5", ["setting crop_min must be", "1.5"]),
    ("--lambda-u -1.0", ["setting lambda_u must be", "-1.0"]),
    ("--lamda-u 3", ["--lamda-u"]),
    ("--lambda- 3", ["--lambda-"]),  # no abbreviations
    ("--lambda-u x", ["--lambda-u", "'x'"]),
    ("--device tpu9", ["--device tpu9"]),
])
def test_settings_refuse_what_is_out_of_range_or_unknown(capsys, argv, words):
    refused(argv.split(), capsys, *words)


def test_settings_in_python_refuse_what_they_do_not_know():
    with pytest.raises(TypeError, match="lamda_u"):
        train.Settings(lamda_u=3)
    with pytest.raises(BadInput, match="scope must be one of"):
        train.Settings(scope="videos")


# ---- The losses of a batch ----------------------------------------------------------------------

def batch_of(run, videos):
    """These videos, whole, as a batch."""
    return data.collate([data.load_item(video, run.data, run.s) for video in videos])


def labelled_losses(run, batch):
    """The losses of a labelled batch."""
    return train.batch_losses(run, batch, data.ground_truth(batch), "labelled")


def unlabelled_losses(run, batch):
    """The losses of an unlabelled batch, which its pseudo labels teach."""
    return train.batch_losses(run, batch, train.pseudo_truth(run, batch), "unlabelled")


def test_t_plus_is_a_running_mean_for_each_branch(run):
    losses = labelled_losses(run, batch_of(run, run.data.labelled[:2]))
    n = int(losses["positives"])
    assert n > 0
    assert [T.item() for T in run.t_plus.values()] == pytest.approx([0.9 * 100 + 0.1 * n, 100.0])


def test_a_video_without_pseudo_labels_leaves_the_loss_and_stays_finite(run):
    videos = run.data.unlabelled[:2]
    batch = batch_of(run, videos)
    alone = batch_of(run, videos[:1])
    nothing = record([], [], [])
    run.pseudo = {videos[0].id: record([[3, 15]], [0], [icd.KEPT]), videos[1].id: nothing}
    both, one = unlabelled_losses(run, batch), unlabelled_losses(run, alone)
    for key in ("cls", "reg", "quality"):  # drop path draws differ
        assert both[key].item() == pytest.approx(one[key].item(), rel=0.2), key
    run.detector.eval()
    both, one = unlabelled_losses(run, batch), unlabelled_losses(run, alone)
    assert both["cls"].item() == pytest.approx(one["cls"].item(), rel=1e-5)
    run.pseudo = {video.id: nothing for video in videos}
    losses = unlabelled_losses(run, batch)
    total = train.objective(losses, losses, run.s)
    total.backward()
    assert total.item() == 0
    for p in run.detector.parameters():
        assert p.grad is None or p.grad.isfinite().all()


def test_rejected_instances_are_masked_or_background(run):
    run.detector.eval()
    video = run.data.unlabelled[0]
    batch = batch_of(run, [video])
    segments = [[3, 15], [30, 50]]
    kept = record(segments[:1], [0], [icd.KEPT])
    masked = record(segments, [0, 1], [icd.KEPT, icd.DROPPED])
    mined = record(segments, [0, 1], [icd.KEPT, icd.MINED])
    losses = []
    for pseudo, instances in ((kept, 1), (masked, 1), (mined, 2)):
        run.pseudo = {video.id: pseudo}
        assert len(train.pseudo_truth(run, batch)[0]["labels"]) == instances
        losses.append(unlabelled_losses(run, batch))
    with_kept, with_masked, with_mined = losses
    assert with_masked["cls"].item() < with_kept["cls"].item()
    assert with_masked["positives"].item() == with_kept["positives"].item()
    assert with_kept["positives"].item() < with_mined["positives"].item()
    run.s = settings(*own_argv(run.folder.path.parent, "--rejected", "background"))
    run.pseudo = {video.id: masked}
    background = unlabelled_losses(run, batch)
    assert background["cls"].item() == pytest.approx(with_kept["cls"].item(), rel=1e-6)


def test_mixup_mixes_the_input_and_the_losses(run):
    batch = batch_of(run, run.data.labelled[:2])
    mixed, lam = data.mixed(batch, 0.4)
    first, second = batch["feats"]
    assert 0 <= lam <= 1
    assert torch.allclose(mixed["feats"][0], lam * first + (1 - lam) * second)
    assert mixed["mask"].all()

    run.detector.eval()
    run.s = settings(*own_argv(run.folder.path.parent, "--mixup", 0.4, "--acp", "none"))
    truth = data.ground_truth(batch)
    torch.manual_seed(0)
    together = labelled_losses(run, batch)
    torch.manual_seed(0)
    mixed, lam = data.mixed(batch, 0.4)
    outputs = evaluate.forward(run.detector, mixed, run.s)
    K = len(run.data.classes)
    first = alqa.point_losses(outputs, truth, K, run.s)
    second = alqa.point_losses(outputs, truth[::-1], K, run.s)
    for key in ("cls", "reg", "positives"):
        expected = (lam * first[key] + (1 - lam) * second[key]).item()
        assert together[key].item() == pytest.approx(expected, rel=1e-5)


def test_averaged_weights_follow_fast_at_first(run):
    train.begin_stage(run, "supervised")
    run.steps = []
    before = run.ema.cls_out.bias.clone()
    losses = labelled_losses(run, batch_of(run, run.data.labelled[:2]))
    train.advance(run, train.objective(losses, None, run.s), {}, ["v1"])
    after, now = run.ema.cls_out.bias, run.detector.cls_out.bias
    # The decay is min(0.999, 1 / 10).
    assert torch.allclose(after, before + 0.9 * (now - before), atol=1e-7)


def test_a_loss_that_is_not_finite_stops_the_run(run):
    words = "nan at step 1 of stage joint .videos v1, v2.*--lr"
    with pytest.raises(BadInput, match=words):
        train.advance(run, torch.tensor(math.nan, requires_grad=True), {}, ["v1", "v2"])


def test_every_stream_of_random_numbers_has_its_own_seed(run):
    numpy_streams = [np.random.default_rng([run.s.seed, of]) for of in (0, 1)]  # of toy and split
    torch_seeds = [run.s.seed]  # of the first weights
    for stage in train.STAGES:
        run.at = runs.Progress(stage)
        for run.at.epoch in range(2):
            numpy_streams.append(train.begin_epoch(run))
            torch_seeds += [torch.initial_seed(), run.generator.initial_seed()]
    drawn = [int(rng.integers(2 ** 62)) for rng in numpy_streams]
    assert len(set(drawn)) == len(drawn) == 8
    assert len(set(torch_seeds)) == len(torch_seeds) == 13


# ---- Whole runs ---------------------------------------------------------------------------------

def test_the_whole_run_writes_its_files_and_evaluates_the_same(whole, tmp_path, capsys):
    out = whole / "run"
    metrics = read_result(out / "metrics.json")
    assert {"tiou", "mAP", "average_mAP", "ap", "videos", "instances"} <= set(metrics)
    assert (metrics["videos"], metrics["instances"]) == (4, 12)
    assert set(metrics["ap"]) == {"A", "B"}
    split = read_result(out / "split.json")
    assert (len(split["labelled"]), len(split["unlabelled"])) == (3, 7)
    assert split["missing_classes"] == []
    assert read_result(out / "config.json")["channels"] == 16
    pseudo = read_result(out / "pseudo_labels.json")
    assert set(pseudo) == set(split["unlabelled"])
    one = next(label for labels in pseudo.values() for label in labels)
    assert set(one) == {
        "label", "segment", "score", "class_score", "tIoU", "tND", "similarity", "status"}
    assert one["status"] in icd.STATUS
    rows = read_log(out)
    pulse = next(row for row in rows if "theta_h" in row)
    assert {"positives", "candidates", "dropped", "mined", "silent", "class_accuracy",
            "mean_tIoU", "positive_accuracy", "precision", "recall"} <= set(pulse)
    for row in rows:
        assert "step" not in row or {"steps_a_second", "seconds_left", "loss"} <= set(row)
    assert not list(out.glob("*.tmp"))

    text = (whole / "stdout").read_text()
    table = text[text.index("\ntIoU  ") + 1:].splitlines()[:2]
    again, third = tmp_path / "again.json", tmp_path / "third.json"
    assert evaluated("--checkpoint", out / "checkpoint.pt", "--json", again) == 0
    assert capsys.readouterr().out.splitlines()[1:3] == table
    assert read_result(again)["ap"] == metrics["ap"]
    assert evaluated("--pred", out / "predictions.json", "--gt", whole / "own.json",
                     "--subset", "VALIDATION", "--json", third) == 0
    assert read_result(third)["mAP"] == pytest.approx(metrics["mAP"])


def test_the_labels_of_unlabelled_videos_do_not_enter_training(whole, own):
    pseudo = read_result(whole / "run/pseudo_labels.json")
    states = {label["status"] for labels in pseudo.values() for label in labels}
    assert states & {"kept", "mined"}
    hidden = read_result(whole / "run/split.json")["unlabelled"]

    def change(database):
        for name in hidden:
            database[name]["annotations"] = [{"segment": [1.0, 2.0], "label": "B"}]

    edit(own, change)
    assert train.main(own_argv(own, *LONGER)) == 0
    assert same(weights(whole / "run"), weights(own / "run"))
    assert train.main(own_argv(own, *LONGER, "--out", own / "third", "--seed", 1)) == 0
    assert not same(weights(whole / "run"), weights(own / "third"))


def test_class_without_labelled_instance_and_a_video_of_one_step(own, capsys):
    for name in ("v9", "v13"):
        np.save(own / f"features/{name}.npy", np.zeros((1, 5), dtype=np.float32))

    def change(database):
        short = [{"segment": [0.2, 0.8], "label": "A"}]
        database["v9"] |= {"duration": 1.0, "annotations": short}
        database["v13"] |= {"duration": 1.0, "annotations": []}
        # Longer than its features, with an instance behind them.
        database["v1"]["duration"] = 60.0
        database["v1"]["annotations"].insert(1, {"segment": [50.0, 55.0], "label": "B"})
        database["v0"]["annotations"] = []
        database["v8"]["annotations"][0]["label"] = "only unlabelled"

    edit(own, change)
    (own / "split.txt").write_text("v0\nv1\nv9\n")
    split = ("--split", own / "split.txt", "--ratio", 0)
    assert train.main(own_argv(own, *split, "--theta-l", 0.0)) == 0
    text = "1 of 3 classes have no labelled instance: only unlabelled"
    assert text in capsys.readouterr().err
    assert all(value.isfinite().all() for value in weights(own / "run").values())
    s = settings(*own_argv(own, *split))
    bank = train.begin(s, data.training_data(s)).bank
    assert bank["videos"] == ["v1"] * 3 + ["v9"]
    assert len(bank["feats"]) == len(bank["labels"]) == len(bank["keys"]) == 4


@pytest.mark.parametrize("switches", [
    "--alqa none --threshold fixed --scope dataset --acp none --split stratified",
    "--alqa tiou --threshold mean --scope class --acp coarse",
    "--alqa diou --icd none --acp fine --acp-after labelled",
    "--quality-form kl --icd eap --acp-after labelled+unlabelled",
    "--icd mpp --icd-pool max --refresh 1 --resize 40",
    "--icd-score absolute --theta-drop 0.3 --theta-mine 0.7 --rejected background",
    "--pseudo-weights ema --weights raw --position --nms-agnostic",
    "--precision bfloat16",
])
def test_every_switch_trains_and_stays_finite(own, switches):
    more = ("--pretrain-epochs", 1, "--supervised-epochs", 1, "--joint-epochs", 2, "--theta-l", 0)
    assert train.main(own_argv(own, *more, *switches.split())) == 0
    assert all(value.isfinite().all() for value in weights(own / "run").values())


DURATIONS = {"thumos": 7.0, "activitynet": 32.0, "epic-verb": 27.2, "epic-noun": 27.2}  # seconds


def write_published(folder, name):
    """Six videos in the layout of a published dataset, each with a bad segment."""
    s = settings("--dataset", name)
    dim = 9 if name.startswith("epic") else 8
    subsets = ("Validation", "Test") if name == "thumos" else ("training", "validation")
    path, features = sources.LAYOUTS[name]
    (folder / features).mkdir()
    (folder / path).parent.mkdir()
    rng = np.random.default_rng(0)
    database = {}
    for i in range(6):
        x = rng.normal(size=(50, dim)).astype(np.float32)
        file = folder / features / f"{s.prefix}v{i}{s.extension}"
        if s.extension == ".npz":
            np.savez(file, feats=x)
        else:
            np.save(file, x)
        annotations = [{"segment": [1.0, 4.0], "label": f"{i % 2}", "label_id": i % 2},
                       {"segment": [5.0, 4.0], "label": "0", "label_id": 0}]
        database[f"v{i}"] = {
            "subset": subsets[i > 3], "duration": DURATIONS[name], "annotations": annotations}
        if name == "thumos":
            database[f"v{i}"]["fps"] = 30.0
    (folder / path).write_text(json.dumps({"database": database}))


@pytest.mark.parametrize("name", ["thumos", "activitynet", "epic-verb", "epic-noun"])
def test_published_layouts_train_with_their_presets(tmp_path, name):
    write_published(tmp_path, name)
    argv = (
        "--dataset", name, "--root", tmp_path, "--ratio", 0.5, "--out", tmp_path / "run",
        "--channels", 16, "--batch", 2, "--pretrain-epochs", 1, "--supervised-epochs", 1,
        "--supervised-steps", 2, "--joint-epochs", 1, "--device", "cpu", "--no-page")
    assert train.main([str(word) for word in argv]) == 0
    # The bad ones count in the ground truth.
    assert read_result(tmp_path / "run/metrics.json")["instances"] == 4
    assert evaluated("--checkpoint", tmp_path / "run/checkpoint.pt") == 0


# ---- Stopping and going on ----------------------------------------------------------------------

def fill_disk():
    """From now on no file can grow over 100,000 bytes."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))


# How a run ends: what happens to it, its exit code, words of its line of stderr if it has one.
ENDS = {
    "SIGTERM": (lambda: signal.raise_signal(signal.SIGTERM), 143, ["SIGTERM"]),
    "SIGINT": (lambda: signal.raise_signal(signal.SIGINT), 130, ["SIGINT"]),
    "SIGKILL": (lambda: signal.raise_signal(signal.SIGKILL), -9, None),
    "an exception": (lambda: 1 / 0, 1, None),
    "a full disk": (fill_disk, 2, ["checkpoint.pt", "cannot be written", os.strerror(errno.EFBIG)]),
}
STEP = (train, "average_weights")  # in each step, before its row of the log
SAVE = (torch, "save")  # at the end of each epoch, before the file is moved to its place
DETECT = (evaluate, "detect")  # after stage 2, for pseudo labels twice, in the report twice
STOPS = [  # how, when, after which call of what, steps in the log that it leaves
    ("SIGTERM", "in the first step", STEP, 1, 1),
    ("SIGINT", "amid an epoch of stage 1", STEP, 6, 6),
    ("SIGKILL", "amid an epoch of stage 1", STEP, 6, 5),
    ("SIGTERM", "between stages 1 and 2", SAVE, 2, 8),
    ("SIGTERM", "in the last step of an epoch", STEP, 11, 11),
    ("SIGINT", "amid an epoch of stage 2", STEP, 13, 13),
    ("SIGKILL", "amid an epoch of stage 2", STEP, 13, 12),
    ("an exception", "amid an epoch of stage 2", STEP, 13, 12),
    ("a full disk", "amid an epoch of stage 2", STEP, 13, 14),
    ("SIGKILL", "as an epoch is saved", SAVE, 4, 14),
    ("SIGINT", "between stages 2 and 3", DETECT, 1, 14),
    ("SIGKILL", "as pseudo labels are made", DETECT, 2, 14),
    ("SIGTERM", "as pseudo labels are made anew", DETECT, 3, 21),
    ("SIGTERM", "amid an epoch of stage 3", STEP, 19, 19),
    ("SIGKILL", "amid an epoch of stage 3", STEP, 19, 18),
    ("SIGINT", "in the report", DETECT, 4, 23),
]


def stopped(command, stderr, end, place, number):
    """The exit code, minus a signal's number, of a command that ends in a process of its own.

    end: what happens to it after a call of this number of a function, (its module, its name)"""
    function = getattr(*place)
    calls = []

    def watched(*words):
        found = function(*words)
        calls.append(words)
        if len(calls) == number:
            end()
        return found

    def child():
        sys.stderr = open(stderr, "w")
        setattr(*place, watched)
        sys.exit(command())

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    code = process.exitcode
    process.kill()
    return code


def steps_of(folder):
    """[(stage, epoch, step, loss)] of a run's log."""
    keys = ("stage", "epoch", "step", "loss")
    return [tuple(row.get(key) for key in keys) for row in read_log(folder)]


def assert_stopped(err, out, words):
    """The line that says what has stopped a run and how it goes on."""
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    for word in (*words, f"--resume {out}"):
        assert word in err, err


def assert_same_run(out, whole):
    """A run has ended as the one that nobody stopped."""
    assert same(weights(out), weights(whole / "run"))
    for name in ("metrics.json", "predictions.json", "pseudo_labels.json"):
        assert (out / name).read_bytes() == (whole / "run" / name).read_bytes(), name
    assert steps_of(out) == steps_of(whole / "run")
    assert not list(out.glob("*.tmp"))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(("how", "when", "place", "call", "steps"), STOPS)
def test_a_stopped_run_goes_on_bit_for_bit(whole, tmp_path, how, when, place, call, steps):
    out, stderr = tmp_path / "run", tmp_path / "stderr"
    end, code, words = ENDS[how]
    argv = own_argv(whole, *LONGER, "--out", out)
    assert stopped(lambda: train.main(argv), stderr, end, place, call) == code, stderr.read_text()
    if words:
        assert_stopped(stderr.read_text(), out, words)
        assert not list(out.glob("*.tmp"))
    left = steps_of(out)
    assert left == steps_of(whole / "run")[:len(left)]
    assert sum(loss is not None for *_, loss in left) == steps
    assert not (out / "metrics.json").exists()
    assert train.main(["--resume", str(out)]) == 0
    assert_same_run(out, whole)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, "a closed pipe"])
def test_a_run_that_is_disturbed_from_outside(whole, tmp_path, how):
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *own_argv(whole, *LONGER, "--out", out)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        if how == "a closed pipe":
            process.stdout.readline()
            process.stdout.close()
        else:
            while not process.stdout.readline().startswith("supervised"):
                assert process.poll() is None
            process.send_signal(how)
        err = process.stderr.read()
        code = process.wait(60)
    finally:
        process.kill()
    if how == "a closed pipe":  # it only ends the printing
        assert (code, err) == (0, "")
    else:
        assert code == 128 + how
        assert_stopped(err, out, [how.name])
        assert train.main(["--resume", str(out)]) == 0
    assert_same_run(out, whole)


@pytest.mark.parametrize(("stage", "later", "earlier", "name"), [
    ("pretrain", "--quality-form kl", "--acp-tau 0.2", "acp_tau"),
    ("supervised", "--threshold fixed", "--beta 3", "beta"),
])
def test_later_stages_start_from_shared_ones(own, capsys, stage, later, earlier, name):
    def argv(out, *more):
        return own_argv(own, "--theta-l", 0, "--joint-epochs", 1, *more, "--out", own / out)

    assert train.main(argv("first", "--stage", stage)) == 0
    assert (own / "first/metrics.json").exists() == (stage == "supervised")
    more = ("--start", own / "first/checkpoint.pt", *later.split())
    assert train.main(argv("on", *more)) == 0
    assert train.main(argv("whole", *later.split())) == 0
    assert same(weights(own / "on"), weights(own / "whole"))
    capsys.readouterr()
    refused(argv("other", *more, *earlier.split()), capsys, "another configuration", name)


def test_a_finished_run_is_no_start_for_other_settings(whole, tmp_path, capsys):
    argv = own_argv(whole, *LONGER, "--start", whole / "run/checkpoint.pt", "--lambda-u", 3)
    refused([*argv, "--out", tmp_path], capsys, "another configuration", "lambda_u")


def test_two_processes_with_half_the_batch_follow_one(own):
    more = ("--theta-l", 0.0, "--log-every", 1, "--drop-path", 0.1,
            "--acp-after", "labelled+unlabelled", "--ratio", 0.5)
    assert train.main(own_argv(own, *more, "--batch", 4, "--out", own / "one")) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node", "2", ROOT / "train.py",
               *own_argv(own, *more, "--batch", 2, "--out", own / "two")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr

    def losses(folder):
        return [row["loss"] for row in read_log(folder) if "loss" in row]

    one, two = losses(own / "one"), losses(own / "two")
    assert len(one) == len(two) > 12
    assert one == pytest.approx(two, rel=1e-3)
    assert {row["stage"] for row in read_log(own / "two") if "loss" in row} == set(train.STAGES)
    mine = read_result(own / "one/metrics.json")["average_mAP"]
    other = read_result(own / "two/metrics.json")["average_mAP"]
    assert mine == pytest.approx(other, abs=0.02)
