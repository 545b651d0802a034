"""Tests of train.py: settings, losses of a batch, whole runs, stopping and going on, processes."""
import json
import math
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import alqa
import data
import evaluate
import icd
import train
from plumbing import files, runs, sources
from plumbing.words import BadInput
from tests import helpers
from tests.helpers import evaluated, own_argv, read_log, read_result, record, settings, weights

# A run in which pseudo labels are made twice: 8, 6 and 9 steps, each with a row in the log.
LONGER = (
    "--log-every", 1, "--theta-l", 0.0, "--refresh", 2, "--batch", 3, "--supervised-steps", 6,
    "--joint-epochs", 3, "--acp-after", "labelled+unlabelled", "--audit")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A user's data set with a run of LONGER that nobody stopped; no test changes it."""
    return helpers.finished(tmp_path_factory, train.main, own_argv, *LONGER)


@pytest.mark.parametrize("row", [
    "--batch 0|setting batch must be|0", "--lr inf|setting lr must be|inf",
    "--clip 0.0|setting clip must be|0.0", "--ratio nan|setting ratio must be|nan",
    "--icd-dropout 2.0|setting icd_dropout must be|2.0", "--lambda-u x|--lambda-u|'x'",
    "--crop-min 1.5|setting crop_min must be|1.5", "--device tpu9|--device tpu9",
    "--lambda-u -1.0|setting lambda_u must be|-1.0", "--lamda-u 3|--lamda-u",
    "--lambda- 3|--lambda-"])  # no abbreviations
def test_settings_refuse_what_is_out_of_range_or_unknown(capsys, row):
    argv, *words = row.split("|")
    helpers.refused(argv.split(), capsys, *words)
    with pytest.raises(TypeError, match="lamda_u"):
        train.Settings(lamda_u=3)
    with pytest.raises(BadInput, match="scope must be one of"):
        train.Settings(scope="videos")


# ---- The losses of a batch ----------------------------------------------------------------------

def losses_of(run, *records):
    """The losses of a batch, the batch, its instances: of two labelled videos, or of as many
    unlabelled ones as there are records of pseudo labels, which teach them."""
    videos = run.data.unlabelled[:len(records)] or run.data.labelled[:2]
    batch = data.collate([data.load_item(video, run.data, run.s) for video in videos])
    run.pseudo = dict(zip(batch["id"], records))
    instances = train.pseudo_truth(run, batch) if records else data.ground_truth(batch)
    kind = "unlabelled" if records else "labelled"
    return train.batch_losses(run, batch, instances, kind), batch, instances


def test_a_step_moves_the_running_mean_of_its_branch_and_the_averaged_weights(run):
    train.begin_stage(run, "joint")
    with pytest.raises(BadInput, match="nan at step 1 of stage joint .videos v1, v2.*--lr"):
        train.advance(run, torch.tensor(math.nan, requires_grad=True), {}, ["v1", "v2"])
    losses, _, _ = losses_of(run)
    n = int(losses["positives"])
    assert n > 0
    assert [T.item() for T in run.t_plus.values()] == pytest.approx([0.9 * 100 + 0.1 * n, 100.0])
    train.begin_stage(run, "supervised")
    run.steps, before = [], run.ema.cls_out.bias.clone()
    train.advance(run, train.objective(losses, None, run.s), {}, ["v1"])
    after, now = run.ema.cls_out.bias, run.detector.cls_out.bias
    # Fast at first: the decay is min(0.999, 1 / 10).
    assert torch.allclose(after, before + 0.9 * (now - before), atol=1e-7)


def test_a_video_without_pseudo_labels_leaves_the_loss_and_stays_finite(run):
    some, nothing = record([[3, 15]], [0], [icd.KEPT]), record([], [], [])
    both, one = losses_of(run, some, nothing)[0], losses_of(run, some)[0]
    for key in ("cls", "reg", "quality"):  # drop path draws differ
        assert both[key].item() == pytest.approx(one[key].item(), rel=0.2), key
    run.detector.eval()
    both, one = losses_of(run, some, nothing)[0], losses_of(run, some)[0]
    assert both["cls"].item() == pytest.approx(one["cls"].item(), rel=1e-5)
    before = run.t_plus["unlabelled"]
    losses, _, _ = losses_of(run, nothing, nothing)
    assert losses["t_plus"] == run.t_plus["unlabelled"] == before < 100
    total = train.objective(losses, losses, run.s)
    total.backward()
    assert total.item() == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in run.detector.parameters())


def test_rejected_instances_are_masked_or_background(run):
    run.detector.eval()
    segments, masked = [[3, 15], [30, 50]], [icd.KEPT, icd.DROPPED]
    found = [losses_of(run, record(segments[:len(status)], [0, 1][:len(status)], status))
             for status in ([icd.KEPT], masked, [icd.KEPT, icd.MINED])]
    assert [len(instances["labels"]) for _, _, (instances,) in found] == [1, 1, 2]
    (kept, masked_out, mined) = (
        {key: losses[key].item() for key in ("cls", "positives")} for losses, _, _ in found)
    assert masked_out["cls"] < kept["cls"]
    assert masked_out["positives"] == kept["positives"] < mined["positives"]
    run.s = settings(*own_argv(run.folder.path.parent, "--rejected", "background"))
    background, _, _ = losses_of(run, record(segments, [0, 1], masked))
    assert background["cls"].item() == pytest.approx(kept["cls"], rel=1e-6)


def test_mixup_mixes_the_input_and_the_losses(run):
    run.detector.eval()
    run.s = settings(*own_argv(run.folder.path.parent, "--mixup", 0.4, "--acp", "none"))
    torch.manual_seed(0)
    together, batch, truth = losses_of(run)
    torch.manual_seed(0)
    mixed, lam = data.mixed(batch, 0.4)
    first, second = batch["feats"]
    assert 0 <= lam <= 1
    assert torch.allclose(mixed["feats"][0], lam * first + (1 - lam) * second)
    assert mixed["mask"].all()
    outputs, K = evaluate.forward(run.detector, mixed, run.s), len(run.data.classes)
    first, second = (alqa.point_losses(outputs, x, K, run.s) for x in (truth, truth[::-1]))
    for key in ("cls", "reg", "positives"):
        expected = (lam * first[key] + (1 - lam) * second[key]).item()
        assert together[key].item() == pytest.approx(expected, rel=1e-5)


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
    out, again, third = whole / "run", tmp_path / "again.json", tmp_path / "third.json"
    metrics, split, pseudo = (
        read_result(out / f"{name}.json") for name in ("metrics", "split", "pseudo_labels"))
    assert {"tiou", "mAP", "average_mAP", "ap", "videos", "instances"} <= set(metrics)
    assert (metrics["videos"], metrics["instances"], set(metrics["ap"])) == (4, 12, {"A", "B"})
    assert (len(split["labelled"]), len(split["unlabelled"])) == (3, 7)
    assert split["missing_classes"] == []
    assert read_result(out / "config.json")["channels"] == 16
    assert set(pseudo) == set(split["unlabelled"])
    found = [label for labels in pseudo.values() for label in labels]
    assert set(found[0]) == {
        "label", "segment", "score", "class_score", "tIoU", "tND", "similarity", "status"}
    assert found[0]["status"] in icd.STATUS
    assert {label["status"] for label in found} & {"kept", "mined"}
    rows = read_log(out)
    pulse = next(row for row in rows if "theta_h" in row)
    assert {"positives", "candidates", "dropped", "mined", "class_accuracy",
            "mean_tIoU", "positive_accuracy", "precision", "recall"} <= set(pulse)
    for row in rows:
        assert "step" not in row or {"steps_a_second", "seconds_left", "loss"} <= set(row)
    assert not list(out.glob("*.tmp"))
    text = (whole / "stdout").read_text()
    table = text[text.index("\ntIoU  ") + 1:].splitlines()[:2]
    assert evaluated("--checkpoint", out / "checkpoint.pt", "--json", again) == 0
    assert capsys.readouterr().out.splitlines()[1:3] == table
    assert read_result(again)["ap"] == metrics["ap"]
    argv = ("--pred", out / "predictions.json", "--gt", whole / "own.json", "--json", third)
    assert evaluated(*argv, "--subset", "VALIDATION") == 0
    assert read_result(third)["mAP"] == pytest.approx(metrics["mAP"])


def test_the_labels_of_unlabelled_videos_do_not_enter_training(whole, own):
    hidden = read_result(whole / "run/split.json")["unlabelled"]
    other = {"annotations": [{"segment": [1.0, 2.0], "label": "B"}]}
    helpers.edit(own, lambda database: [database[name].update(other) for name in hidden])
    assert train.main(own_argv(own, *LONGER)) == 0
    assert helpers.same(weights(whole / "run"), weights(own / "run"))
    assert train.main(own_argv(own, *LONGER, "--out", own / "third", "--seed", 1)) == 0
    assert not helpers.same(weights(whole / "run"), weights(own / "third"))


def test_class_without_labelled_instance_and_a_video_of_one_step(own, capsys):
    def change(database):
        for name, annotations in (("v9", [{"segment": [0.2, 0.8], "label": "A"}]), ("v13", [])):
            np.save(own / f"features/{name}.npy", np.zeros((1, 5), dtype=np.float32))
            database[name] |= {"duration": 1.0, "annotations": annotations}
        database["v1"]["duration"] = 60.0  # longer than its features, an instance behind them
        database["v1"]["annotations"].insert(1, {"segment": [50.0, 55.0], "label": "B"})
        database["v0"]["annotations"] = []
        database["v8"]["annotations"][0]["label"] = "only unlabelled"

    helpers.edit(own, change)
    (own / "split.txt").write_text("v0\nv1\nv9\n")
    argv = own_argv(own, "--split", own / "split.txt", "--ratio", 0, "--theta-l", 0.0)
    assert train.main(argv) == 0
    err = capsys.readouterr().err
    assert "1 of 3 classes have no labelled instance: only unlabelled" in err
    assert all(value.isfinite().all() for value in weights(own / "run").values())
    s = settings(*argv)
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
    "--weights raw --position --nms-agnostic",
    "--precision bfloat16"])
def test_every_switch_trains_and_stays_finite(own, switches):
    more = ("--pretrain-epochs", 1, "--supervised-epochs", 1, "--joint-epochs", 2, "--theta-l", 0)
    assert train.main(own_argv(own, *more, *switches.split())) == 0
    assert all(value.isfinite().all() for value in weights(own / "run").values())


@pytest.mark.parametrize(("name", "dim", "seconds"), [
    ("thumos", 8, 7.0), ("activitynet", 8, 32.0), ("epic-verb", 9, 27.2), ("epic-noun", 9, 27.2)])
def test_published_layouts_train_with_their_presets_and_are_evaluated_where_they_move(
        tmp_path, name, dim, seconds):
    root, moved, run, json_path = (tmp_path / path for path in ("a", "b", "run", "out.json"))
    s, (path, features) = settings("--dataset", name), sources.LAYOUTS[name]
    (root / features).mkdir(parents=True)
    (root / path).parent.mkdir()
    save = np.save if s.extension == ".npy" else lambda file, x: np.savez(file, feats=x)
    subsets = ("training", "validation") if name != "thumos" else ("Validation", "Test")
    rng = np.random.default_rng(0)
    database = {}
    for i in range(6):
        save(root / features / f"{s.prefix}v{i}{s.extension}",
             rng.normal(size=(50, dim)).astype(np.float32))
        annotations = [{"segment": [1.0, 4.0], "label": f"{i % 2}", "label_id": i % 2},
                       {"segment": [5.0, 4.0], "label": "0", "label_id": 0}]  # a bad one
        entry = {"subset": subsets[i > 3], "duration": seconds, "annotations": annotations}
        database[f"v{i}"] = entry | ({"fps": 30.0} if name == "thumos" else {})
    (root / path).write_text(json.dumps({"database": database}))
    argv = (
        "--dataset", name, "--root", root, "--ratio", 0.5, "--out", run, "--channels", 16,
        "--batch", 2, "--pretrain-epochs", 1, "--supervised-epochs", 1, "--supervised-steps", 2,
        "--joint-epochs", 1, "--device", "cpu", "--no-page")
    assert train.main([str(word) for word in argv]) == 0
    metrics = read_result(run / "metrics.json")
    assert metrics["instances"] == 4  # the bad ones count in the ground truth
    assert evaluated("--checkpoint", run / "checkpoint.pt") == 0
    root.rename(moved)
    assert evaluated("--checkpoint", run, "--root", moved, "--json", json_path) == 0
    assert read_result(json_path)["ap"] == metrics["ap"]


# ---- Stopping and going on ----------------------------------------------------------------------

def fill_disk(size=100_000):
    """From now on no file can grow over so many bytes -> the limit before."""
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    return before


# How a run ends: what happens to it, its exit code, words of its line of stderr if it has one.
ENDS = {
    "SIGTERM": (lambda: signal.raise_signal(signal.SIGTERM), 143, ["SIGTERM"]),
    "SIGINT": (lambda: signal.raise_signal(signal.SIGINT), 130, ["SIGINT"]),
    "SIGKILL": (lambda: signal.raise_signal(signal.SIGKILL), -9, None),
    "an exception": (lambda: 1 / 0, 1, None),
    "SIGHUP": (lambda: signal.raise_signal(signal.SIGHUP), 129, ["SIGHUP"]),
    "a full disk": (fill_disk, 2, ["checkpoint.pt", "cannot be written", "File too large"]),
    "a closed pipe": (None, 0, None),  # it only ends the printing
}
STEP = (train, "average_weights")  # in each step, before its row of the log
SAVE = (torch, "save")  # at the end of each epoch, before the file is moved to its place
WRITE = (files, "write_atomically")  # first a checkpoint, before the log begins
DETECT = (evaluate, "detect")  # after stage 2, for pseudo labels twice, in the report twice
# (when a run ends, after which call of what, {how: steps in the log that it leaves})
STOPS = [
    ("in the first step", STEP, 1, {"SIGTERM": 1}),
    ("between the first checkpoint and its log", WRITE, 1, {"SIGKILL": 0}),
    ("amid an epoch of stage 1", STEP, 6, {"SIGINT": 6, "SIGKILL": 5}),
    ("between stages 1 and 2", SAVE, 2, {"SIGTERM": 8}),
    ("in the last step of an epoch", STEP, 11, {"SIGTERM": 11}),
    ("amid an epoch of stage 2", STEP, 13, {
        "SIGINT": 13, "SIGKILL": 12, "an exception": 12, "a full disk": 14}),
    ("as an epoch is saved", SAVE, 4, {"SIGKILL": 14}),
    ("between stages 2 and 3", DETECT, 1, {"SIGINT": 14}),
    ("as pseudo labels are made", DETECT, 2, {"SIGKILL": 14}),
    ("as pseudo labels are made anew", DETECT, 3, {"SIGTERM": 21}),
    ("amid an epoch of stage 3", STEP, 19, {"SIGTERM": 19, "SIGKILL": 18}),
    ("in the report", DETECT, 4, {"SIGINT": 23}),
    ("from outside", None, None,
     {"SIGTERM": None, "SIGINT": None, "SIGHUP": None, "a closed pipe": 23}),
]


def stopped(command, stderr, end, place, number):
    """The exit code, minus a signal's number, of a command that ends in a process of its own.

    end: what happens to it after a call of this number of a function, (its module, its name)"""
    function, calls = getattr(*place), []

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


def disturbed(argv, stderr, how):
    """The exit code of train.py that gets a signal in stage 2, or whose stdout is closed."""
    command = [sys.executable, helpers.ROOT / "train.py", *argv]
    with open(stderr, "w") as file, subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=file, text=True) as process:
        if how == "a closed pipe":
            process.stdout.readline()
            process.stdout.close()
        else:
            next(line for line in process.stdout if line.startswith("supervised"))
            process.send_signal(signal.Signals[how])
        return process.wait(60)


def steps_of(folder):
    """[(stage, epoch, step, loss)] of a run's log, if it has one."""
    rows = read_log(folder) if (folder / "log.jsonl").exists() else []
    return [tuple(map(row.get, ("stage", "epoch", "step", "loss"))) for row in rows]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(("when", "place", "call", "how", "steps"), [
    (*moment, how, steps) for *moment, ends in STOPS for how, steps in ends.items()])
def test_a_stopped_run_goes_on_bit_for_bit(whole, tmp_path, when, place, call, how, steps):
    out, stderr = tmp_path / "run", tmp_path / "stderr"
    end, code, words = ENDS[how]
    argv = own_argv(whole, *LONGER, "--out", out)
    found = (stopped(lambda: train.main(argv), stderr, end, place, call) if place
             else disturbed(argv, stderr, how))
    err, left = stderr.read_text(), steps_of(out)
    assert found == code, err
    assert left == steps_of(whole / "run")[:len(left)]
    assert steps in (None, sum(loss is not None for *_, loss in left))
    if words:
        assert (err[:7], err.count("\n")) == ("error: ", 1), err
        assert [word for word in (*words, f"--resume {out}") if word not in err] == [], err
        assert not list(out.glob("*.tmp"))
    if code:
        assert not (out / "metrics.json").exists()
        assert train.main(["--resume", str(out)]) == 0
        if when == "in the report":  # a run that has ended goes on to the same end
            assert train.main(["--resume", str(out)]) == 0
    else:
        assert err == ""
    assert helpers.same(weights(out), weights(whole / "run"))
    for name in ("metrics.json", "predictions.json", "pseudo_labels.json"):
        assert (out / name).read_bytes() == (whole / "run" / name).read_bytes(), name
    assert steps_of(out) == steps_of(whole / "run")
    assert not list(out.glob("*.tmp"))


@pytest.mark.parametrize(("stage", "later", "earlier", "name"), [
    ("pretrain", "--quality-form kl", "--acp-tau 0.2", "acp_tau"),
    ("supervised", "--threshold fixed", "--beta 3", "beta")])
def test_later_stages_start_from_shared_ones(own, capsys, stage, later, earlier, name):
    def argv(out, *more):
        return own_argv(own, "--theta-l", 0, "--joint-epochs", 1, *more, "--out", own / out)

    assert train.main(argv("first", "--stage", stage)) == 0
    assert (own / "first/metrics.json").exists() == (stage == "supervised")
    more = ("--start", own / "first/checkpoint.pt", *later.split())
    assert train.main(argv("on", *more)) == 0
    assert train.main(argv("whole", *later.split())) == 0
    assert helpers.same(weights(own / "on"), weights(own / "whole"))
    capsys.readouterr()
    helpers.refused(argv("other", *more, *earlier.split()), capsys, "another configuration", name)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_one_of_two_processes_ends_both_with_one_sentence(own, number):
    argv = own_argv(own, "--supervised-epochs", 300)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
               "2", "train.py", *argv]
    with subprocess.Popen(command, cwd=helpers.ROOT, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        next(line for line in process.stdout if line.startswith("supervised"))
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), number)
        _, err = process.communicate(timeout=60)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert "stopped by SIGTERM" in errors[0] or "another process of the run" in errors[0]
    assert f"--resume {own / 'run'}" in errors[0]
    assert train.main(["--resume", str(own / "run"), "--check"]) == 2  # of two processes


def test_the_discriminator_learns_the_same_whatever_a_process_has_drawn(run):
    run.discriminator.train()
    batch = {"ids": run.bank["videos"]}
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        run.generator.manual_seed(7)
        found.append(float(train.train_icd(run, batch).detach()))
        run.discriminator.load_state_dict(train.begin(run.s, run.data).discriminator.state_dict())
    assert found[0] == found[1]


def test_two_processes_with_half_the_batch_follow_one(own):
    more = ("--theta-l", 0.0, "--log-every", 1, "--drop-path", 0.1,
            "--acp-after", "labelled+unlabelled", "--ratio", 0.5)
    assert train.main(own_argv(own, *more, "--batch", 4, "--out", own / "one")) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
               "2", "train.py", *own_argv(own, *more, "--batch", 2, "--out", own / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=helpers.ROOT)
    assert done.returncode == 0, done.stderr
    one, two = ([row for row in read_log(own / name) if "loss" in row] for name in ("one", "two"))
    assert len(one) == len(two) > 12
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in two], rel=1e-3)
    assert {row["stage"] for row in two} == set(train.STAGES)
    one, two = (read_result(own / name / "metrics.json") for name in ("one", "two"))
    assert one["average_mAP"] == pytest.approx(two["average_mAP"], abs=0.02)
