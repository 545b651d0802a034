"""Tests of train.py: settings, losses of a batch, whole runs, switches, resuming, processes."""
import json
import math
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import data
import evaluate
import icd
import train
from tests.helpers import (
    ROOT,
    edit,
    evaluated,
    own_argv,
    read_log,
    read_result,
    record,
    refused,
    same,
    settings,
    weights,
)

# ---- Settings -----------------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "value"), [
    ("batch", 0),
    ("clip", 0.0),
    ("ratio", "nan"),
    ("lr", "inf"),
    ("icd_dropout", 2.0),
    ("crop_min", 1.5),
    ("lambda_u", -1.0),
])
def test_settings_refuse_numbers_out_of_range(capsys, name, value):
    option = "--" + name.replace("_", "-")
    refused([option, value], capsys, f"setting {name} must be", value)


def test_settings_refuse_what_they_do_not_know(capsys):
    refused(["--lamda-u", "3"], capsys, "--lamda-u")
    refused(["--lambda-", "3"], capsys, "--lambda-")  # no abbreviations
    refused(["--lambda-u", "x"], capsys, "--lambda-u", "'x'")
    with pytest.raises(TypeError, match="lamda_u"):
        train.Settings(lamda_u=3)
    with pytest.raises(data.BadInput, match="scope must be one of"):
        train.Settings(scope="videos")
    refused(["--device", "tpu9"], capsys, "--device tpu9")


# ---- The losses of a batch ----------------------------------------------------------------------

def batch_of(run, videos):
    """These videos, whole, as a batch."""
    return data.collate([data.load_item(video, run.data, run.s) for video in videos])


def labelled_losses(run, batch):
    """The losses of a labelled batch."""
    return train.batch_losses(run, batch, train.ground_truth(batch), train.LABELLED)


def unlabelled_losses(run, batch):
    """The losses of an unlabelled batch, which its pseudo labels teach."""
    return train.batch_losses(run, batch, train.pseudo_truth(run, batch), train.UNLABELLED)


def test_t_plus_is_a_running_mean_for_each_branch(run):
    losses = labelled_losses(run, batch_of(run, run.data.labelled[:2]))
    n = int(losses["positives"])
    assert n > 0
    assert run.t_plus.tolist() == pytest.approx([0.9 * 100 + 0.1 * n, 100.0])


def test_a_video_without_pseudo_labels_leaves_the_loss_and_stays_finite(run):
    videos = run.data.unlabelled[:2]
    batch = batch_of(run, videos)
    alone = batch_of(run, videos[:1])
    nothing = record([], [], [])
    run.pseudo = {
        videos[0].id: record([[3, 15]], [0], [icd.KEPT]),
        videos[1].id: nothing,
    }
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
    run.s = settings(*own_argv(run.out.parent, "--rejected", "background"))
    run.pseudo = {video.id: masked}
    background = unlabelled_losses(run, batch)
    assert background["cls"].item() == pytest.approx(with_kept["cls"].item(), rel=1e-6)


def test_mixup_mixes_the_input_and_the_losses(run):
    batch = batch_of(run, run.data.labelled[:2])
    mixed, lam = train.mix(batch, 0.4)
    first, second = batch["feats"]
    assert 0 <= lam <= 1
    assert torch.allclose(mixed["feats"][0], lam * first + (1 - lam) * second)
    assert mixed["mask"].all()

    run.detector.eval()
    run.s = settings(*own_argv(run.out.parent, "--mixup", 0.4, "--acp", "none"))
    truth = train.ground_truth(batch)
    torch.manual_seed(0)
    together = labelled_losses(run, batch)
    torch.manual_seed(0)
    mixed, lam = train.mix(batch, 0.4)
    outputs = evaluate.forward(run.detector, mixed, run.s)
    K = len(run.data.classes)
    first = train.point_losses(outputs, truth, K, run.s)
    second = train.point_losses(outputs, truth[::-1], K, run.s)
    for key in ("cls", "reg", "positives"):
        expected = (lam * first[key] + (1 - lam) * second[key]).item()
        assert together[key].item() == pytest.approx(expected, rel=1e-5)


def test_averaged_weights_follow_fast_at_first(run):
    run.stage = "supervised"
    run.total = 10
    run.clock = (0, time.time())
    run.optimizer = train.make_optimizer(run.detector, run.s)
    before = run.ema.cls_out.bias.clone()
    losses = labelled_losses(run, batch_of(run, run.data.labelled[:2]))
    train.advance(run, train.objective(losses, None, run.s), {}, ["v1"])
    after, now = run.ema.cls_out.bias, run.detector.cls_out.bias
    # The decay is min(0.999, 1 / 10).
    assert torch.allclose(after, before + 0.9 * (now - before), atol=1e-7)


def test_a_loss_that_is_not_finite_stops_the_run(run):
    run.total = 1
    run.optimizer = train.make_optimizer(run.detector, run.s)
    with pytest.raises(data.BadInput, match="nan at step 1 of stage joint .videos v1, v2.*--lr"):
        train.advance(run, torch.tensor(math.nan, requires_grad=True), {}, ["v1", "v2"])


def test_every_stream_of_random_numbers_has_its_own_seed(run):
    run.stage = train.STAGES[0]
    numpy_streams = [np.random.default_rng([run.s.seed, of]) for of in (0, 1)]  # of toy and split
    torch_seeds = [run.s.seed]  # of the first weights
    for stage in train.STAGES:
        for rng in train.epochs(run, stage, 2, 1):
            numpy_streams.append(rng)
            torch_seeds += [torch.initial_seed(), run.generator.initial_seed()]
    drawn = [int(rng.integers(2 ** 62)) for rng in numpy_streams]
    assert len(set(drawn)) == len(drawn) == 8
    assert len(set(torch_seeds)) == len(torch_seeds) == 13


# ---- Whole runs ---------------------------------------------------------------------------------

def test_the_whole_run_writes_its_files_and_evaluates_the_same(own, capsys):
    assert train.main(own_argv(own, "--audit", "--theta-l", 0.0)) == 0
    out = own / "run"
    text = capsys.readouterr().out
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
    assert {"positives", "candidates", "dropped", "mined", "silent"} <= set(pulse)
    assert {"class_accuracy", "mean_tIoU", "positive_accuracy"} <= set(pulse)
    assert {"precision", "recall"} <= set(pulse)
    for row in rows:
        assert "step" not in row or {"steps_a_second", "seconds_left", "loss"} <= set(row)
    assert not list(out.glob("*.tmp"))

    table = text[text.index("\ntIoU  ") + 1:].splitlines()[:2]
    assert evaluated("--checkpoint", out / "checkpoint.pt", "--json", own / "again.json") == 0
    assert capsys.readouterr().out.splitlines()[1:3] == table
    assert read_result(own / "again.json")["ap"] == metrics["ap"]
    code = evaluated("--pred", out / "predictions.json", "--gt", own / "own.json",
                     "--subset", "VALIDATION", "--json", own / "third.json")
    assert code == 0
    assert read_result(own / "third.json")["mAP"] == pytest.approx(metrics["mAP"])


def test_the_labels_of_unlabelled_videos_do_not_enter_training(own):
    more = ("--theta-l", 0.0, "--acp-after", "labelled+unlabelled", "--audit")
    assert train.main(own_argv(own, *more)) == 0
    first = weights(own / "run")
    pseudo = read_result(own / "run/pseudo_labels.json")
    states = {label["status"] for labels in pseudo.values() for label in labels}
    assert states & {"kept", "mined"}
    hidden = read_result(own / "run/split.json")["unlabelled"]

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
    bank = train.begin(s, data.load_dataset(s)).bank
    assert bank["videos"] == ["v1"] * 3 + ["v9"]
    assert len(bank["feats"]) == len(bank["labels"]) == len(bank["keys"]) == 4


@pytest.mark.parametrize("switch", [
    "--alqa none",
    "--alqa tiou",
    "--alqa diou",
    "--quality-form kl",
    "--threshold fixed",
    "--threshold mean",
    "--scope dataset",
    "--scope class",
    "--icd none",
    "--icd eap",
    "--icd mpp",
    "--icd-score absolute --theta-drop 0.3 --theta-mine 0.7",
    "--acp none",
    "--acp coarse",
    "--acp fine",
    "--acp-after labelled+unlabelled",
    "--acp-after labelled",
    "--rejected background",
    "--pseudo-weights ema",
    "--weights raw",
    "--refresh 1",
    "--precision bfloat16",
    "--icd-pool max",
    "--icd-steps 1",
    "--position",
    "--nms-agnostic",
    "--stage supervised",
    "--split stratified",
    "--resize 40",
])
def test_every_switch_trains_and_stays_finite(own, switch):
    more = ("--pretrain-epochs", 1, "--joint-epochs", 2, "--theta-l", 0.0)
    assert train.main(own_argv(own, *more, *switch.split())) == 0
    assert all(value.isfinite().all() for value in weights(own / "run").values())


DURATIONS = {"thumos": 7.0, "activitynet": 32.0, "epic-verb": 27.2, "epic-noun": 27.2}  # seconds


def write_published(folder, name):
    """Six videos in the layout of a published dataset, each with a bad segment."""
    prefix = "v_" if name == "activitynet" else ""
    dim = 9 if name.startswith("epic") else 8
    subsets = ("Validation", "Test") if name == "thumos" else ("training", "validation")
    path, features = data.LAYOUTS[name]
    (folder / features).mkdir()
    (folder / path).parent.mkdir()
    rng = np.random.default_rng(0)
    database = {}
    for i in range(6):
        x = rng.normal(size=(50, dim)).astype(np.float32)
        file = folder / features / f"{prefix}v{i}"
        if name.startswith("epic"):
            np.savez(f"{file}.npz", feats=x)
        else:
            np.save(f"{file}.npy", x)
        annotations = [
            {"segment": [1.0, 4.0], "label": f"{i % 2}", "label_id": i % 2},
            {"segment": [5.0, 4.0], "label": "0", "label_id": 0},
        ]
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
        "--supervised-steps", 2, "--joint-epochs", 1, "--device", "cpu")
    assert train.main([str(word) for word in argv]) == 0
    # The bad ones count in the ground truth.
    assert read_result(tmp_path / "run/metrics.json")["instances"] == 4
    assert evaluated("--checkpoint", tmp_path / "run/checkpoint.pt") == 0


# ---- Going on -----------------------------------------------------------------------------------

def kill_when(argv, path, words):
    """Run train.py in a process of its own and SIGKILL it once the file holds the words.

    -> whether it was killed"""
    command = [sys.executable, ROOT / "train.py", *argv]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            if path.exists() and words in path.read_text():
                process.kill()
                return process.wait() != 0
            time.sleep(0.01)
        return False
    finally:
        process.kill()


@pytest.mark.parametrize("stage", train.STAGES)
def test_a_killed_run_resumes_to_the_same_weights_bit_for_bit(own, stage):
    more = (
        "--log-every", 1, "--theta-l", 0.0, "--refresh", 2, "--pretrain-epochs", 3,
        "--supervised-epochs", 3, "--supervised-steps", 9, "--joint-epochs", 3)
    assert train.main(own_argv(own, *more, "--out", own / "whole")) == 0
    argv = own_argv(own, *more, "--out", own / "killed")
    # Within the second epoch, after a checkpoint.
    middle = f'"stage": "{stage}", "epoch": 2, "step"'
    assert kill_when(argv, own / "killed/log.jsonl", middle)
    assert not (own / "killed/metrics.json").exists()
    assert train.main(["--resume", str(own / "killed")]) == 0
    assert same(weights(own / "whole"), weights(own / "killed"))
    for name in ("metrics.json", "pseudo_labels.json"):
        assert (own / "whole" / name).read_text() == (own / "killed" / name).read_text()

    def losses(folder):
        return [(row["stage"], row["epoch"], row.get("loss")) for row in read_log(folder)]

    assert losses(own / "whole") == losses(own / "killed")


def test_later_stages_start_from_a_shared_one(own, capsys):
    assert train.main(own_argv(own, "--stage", "pretrain", "--out", own / "one")) == 0
    assert not (own / "one/metrics.json").exists()
    more = ("--start", own / "one/checkpoint.pt", "--quality-form", "kl")
    assert train.main(own_argv(own, *more, "--out", own / "kl")) == 0
    assert train.main(own_argv(own, "--quality-form", "kl", "--out", own / "whole")) == 0
    assert same(weights(own / "kl"), weights(own / "whole"))
    capsys.readouterr()
    argv = own_argv(own, *more, "--acp-tau", 0.2, "--out", own / "c")
    refused(argv, capsys, "another configuration", "acp_tau")


def test_stage_3_starts_from_a_shared_stage_2(own, capsys):
    start = ("--start", own / "two/checkpoint.pt")
    assert train.main(own_argv(own, "--stage", "supervised", "--out", own / "two")) == 0
    assert train.main(own_argv(own, *start, "--out", own / "a")) == 0
    assert train.main(own_argv(own, "--out", own / "b")) == 0
    assert same(weights(own / "a"), weights(own / "b"))
    assert train.main(own_argv(own, *start, "--threshold", "fixed", "--out", own / "c")) == 0
    capsys.readouterr()
    argv = own_argv(own, "--start", own / "a/checkpoint.pt", "--lambda-u", 3)
    refused(argv, capsys, "another configuration", "lambda_u")


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
