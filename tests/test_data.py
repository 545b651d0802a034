"""Tests of data.py: annotations, grids, features, splits, crops, batches."""
import errno
import io
import json
import os

import numpy as np
import pytest
import torch

import data
import model
import train
from tests.helpers import (
    SHARED,
    edit,
    needs_shared,
    own_argv,
    read_result,
    refused,
    settings,
)

# ---- Seconds, annotations, features -------------------------------------------------------------

def test_seconds_and_grid_are_inverse_and_right():
    grid = data.Grid(fps=30.0, stride=4.0, frames=16.0)
    assert grid.to_grid(0.0) == -2.0  # feature 0 sees frames 0-15: its centre is 8 frames in
    assert grid.to_seconds(0.0) == pytest.approx(8 / 30)
    assert grid.span(3) == pytest.approx((8 + 16) / 30)
    t = torch.rand(50) * 100
    assert torch.allclose(grid.to_seconds(grid.to_grid(t)), t, atol=1e-4)


def test_datasets_open_with_their_presets(own):
    d = data.load_dataset(settings(*own_argv(own)))
    assert (len(d.labelled), len(d.unlabelled), len(d.test)) == (3, 7, 4)
    assert (d.classes, d.dim) == (["A", "B"], 5)
    assert d.labelled[0].segments[0].tolist() == [2 * 2 - 1, 8 * 2 - 1]  # (t * 50 - 25) / 25
    thumos = settings("--dataset", "thumos", "--ratio", 0.1)
    assert (thumos.stride, thumos.frames, thumos.channels) == (4, 16, 512)
    assert (thumos.t_plus, thumos.tiou) == (100, "0.3:0.7:0.1")
    anet = settings("--dataset", "activitynet", "--lr", 0.5)
    assert (anet.resize, anet.nms_sigma, anet.lambda_reg) == (192, 0.75, 2)
    assert (anet.scope, anet.lr) == ("dataset", 0.5)
    for name in [*train.PRESETS, "x.json"]:
        detector = model.Detector(8, 2, settings("--dataset", name))
        assert detector.ranges.shape == (6, 2)


def test_annotations_as_users_have_them(own):
    def change(database):
        for i, entry in enumerate(database.values()):
            training = ["TRAINING", "training", "Training"][i % 3]
            entry["subset"] = training if i < 10 else "Validation"
            del entry["fps"]
            for a in entry["annotations"]:
                a["label_id"] = {"A": "10", "B": "9"}[a["label"]]  # strings, and B before A
        database["v0"]["annotations"][2]["segment"] = [30.0, 34.0]  # half past the end: clipped
        del database["v1"]["annotations"]

    edit(own, change)
    more = ("--fps", 50, "--ratio", 1.0, "--stage", "supervised")
    d = data.load_dataset(settings(*own_argv(own, *more)))
    assert d.classes == ["B", "A"]
    assert len(d.labelled) == 9
    assert d.labelled[0].segments[2].tolist() == [30 * 2 - 1, 32.5 * 2 - 1]
    assert [video.id for video in d.unlabelled] == ["v1"]


def test_resizing_keeps_the_seconds(own):
    s = settings(*own_argv(own, "--resize", 48))
    d = data.load_dataset(s)
    video = d.labelled[0]
    assert data.load_item(video, d, s)["feats"].shape == (48, 5)
    seconds = video.in_seconds(video.segments)
    assert seconds[0].tolist() == pytest.approx([2.0, 8.0], abs=1e-5)
    # The last half step ends where the last feature does.
    assert video.grid.to_seconds(47.5) == pytest.approx(32.5)
    s = settings(*own_argv(own, "--resize", 200, "--max-steps", 2304))
    video = data.load_dataset(s).labelled[0]
    whole = data.load_item(video, d, s)
    rng = np.random.default_rng(0)
    lengths = set()
    for _ in range(20):
        item = data.load_item(video, d, s, rng)
        start, length = item["start"], len(item["feats"])
        lengths.add(length)
        assert torch.equal(item["feats"], whole["feats"][start:start + length])
    assert 180 <= min(lengths) < max(lengths) <= 200


def test_a_grid_that_does_not_fit_the_annotations_is_pointed_out(own, capsys):
    assert data.load_dataset(settings(*own_argv(own))).warnings == []
    more = ("--stride", 50)
    refused(own_argv(own, *more), capsys, "14 videos", "--stride 25", "--trust-grid")
    d = data.load_dataset(settings(*own_argv(own, *more, "--trust-grid")))
    assert "14 videos" in d.warnings[0]
    assert "--stride" in d.warnings[0]


def test_bad_segments_can_be_left_out(own):
    def change(database):
        database["v1"]["annotations"][0]["segment"] = [9.0, 3.0]

    edit(own, change)
    more = ("--bad-segments", "skip", "--ratio", 1.0, "--stage", "supervised")
    d = data.load_dataset(settings(*own_argv(own, *more)))
    assert [len(video.segments) for video in d.labelled if video.id == "v1"] == [2]


def test_npz_features(own):
    for path in (own / "features").glob("*.npy"):
        np.savez(path.with_suffix(".npz"), feats=np.load(path))
        path.unlink()
    assert data.load_dataset(settings(*own_argv(own, "--extension", ".npz"))).dim == 5
    s = settings(*own_argv(own, "--extension", ".npz", "--feature-key", "x"))
    with pytest.raises(data.BadInput, match="no array named 'x'"):
        data.load_dataset(s)


def test_standardisation_uses_all_training_videos_and_no_test_video(own):
    d = data.load_dataset(settings(*own_argv(own)))
    x = np.concatenate([np.load(own / f"features/v{i}.npy") for i in range(10)])
    assert np.allclose(d.mean, x.mean(0), atol=1e-5)
    assert np.allclose(d.std, x.std(0), atol=1e-5)
    d = data.load_dataset(settings(*own_argv(own, "--no-standardize")))
    assert not d.mean.any()
    assert (d.std == 1).all()


# ---- Splits -------------------------------------------------------------------------------------

def videos_of(*labels):
    """Annotations of videos v0, v1, ..., each with these labels, a letter each."""
    annotations = {}
    for i, letters in enumerate(labels):
        segments = np.array([[0.0, 1.0]] * len(letters))
        annotations[f"v{i}"] = data.Annotation("training", 10.0, 1.0, segments, list(letters))
    return annotations


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


# ---- Items: no label of an unlabelled video -----------------------------------------------------

@pytest.mark.parametrize("audit", ["--no-audit", "--audit"])
def test_unlabelled_items_have_no_label_field_audited_or_not(own, audit):
    s = settings(*own_argv(own, audit))
    d = data.load_dataset(s)
    for video in d.unlabelled + d.test:
        assert type(video) is data.Video
        assert not hasattr(video, "labels")
        assert not hasattr(video, "segments")
        assert set(data.load_item(video, d, s)) == {"id", "video", "feats", "start"}
    batch = data.collate([data.load_item(video, d, s) for video in d.unlabelled[:2]])
    assert "labels" not in batch
    assert "segments" not in batch
    assert bool(d.hidden) == (audit == "--audit")


def test_unlabelled_crops_are_blind_to_labels(own):
    def crops():
        s = settings(*own_argv(own, "--max-steps", 20))
        d = data.load_dataset(s)
        rng = np.random.default_rng(3)
        items = [data.load_item(v, d, s, rng) for v in d.unlabelled for _ in range(10)]
        return [item["start"] for item in items]

    labelled = {video.id for video in data.load_dataset(settings(*own_argv(own))).labelled}

    def clear(database):
        for name in database.keys() - labelled - {"v10", "v11", "v12", "v13"}:
            database[name]["annotations"] = []

    before = crops()
    edit(own, clear)
    assert crops() == before
    assert len(set(before)) > 5


def test_labelled_crops_hold_an_action(own):
    s = settings(*own_argv(own, "--max-steps", 20))
    d = data.load_dataset(s)
    rng = np.random.default_rng(0)
    items = [data.load_item(d.labelled[0], d, s, rng) for _ in range(40)]
    for item in items:
        assert len(item["feats"]) == 20
        assert len(item["segments"])
        assert item["segments"].min() >= -1
        assert item["segments"].max() <= 21
    whole = data.load_item(d.labelled[0], d, s)
    start = items[0]["start"]
    assert torch.equal(items[0]["feats"], whole["feats"][start:start + 20])


def test_labelled_crops_try_windows_until_one_holds_an_action(own):
    s = settings(*own_argv(own, "--max-steps", 20, "--crop-tries", 100))
    d = data.load_dataset(s)
    video = d.labelled[0]
    video.segments = video.segments[2:]  # a rare action: 8 of 64 steps
    video.labels = video.labels[2:]
    rng = np.random.default_rng(0)
    for _ in range(40):
        assert len(data.load_item(video, d, s, rng)["segments"]) == 1


# ---- Batches ------------------------------------------------------------------------------------

def video_of(name, steps):
    """A Video that has nothing but a name and a length."""
    return data.Video(name, None, "", None, steps, 1.0, False)


def plan(videos, steps, size, *argv):
    """data.plan_batches() with seed 0."""
    return data.plan_batches(videos, settings(*argv), steps, size, np.random.default_rng(0))


def numbers_of(batches):
    """The numbers of the videos of each batch."""
    return [[i for i, _ in batch] for batch in batches]


def test_batches_are_padded_to_their_longest_video_only():
    d = data.load_dataset(settings())
    s = settings("--batch", 3)
    batch = next(data.training_batches(d.labelled, d, s, 1, np.random.default_rng(0)))
    lengths = batch["mask"].sum(1)
    assert batch["feats"].shape[:2] == (3, int(lengths.max()))
    assert not batch["feats"][~batch["mask"]].any()


def test_every_video_is_seen_once_a_pass_beside_one_of_like_length():
    videos = [video_of(f"v{T}", T) for T in range(100, 900, 100)]
    batches = plan(videos, 8, 2, "--length-noise", 0)
    first, second = numbers_of(batches[:4]), numbers_of(batches[4:])
    for batch_numbers in (first, second):
        assert sorted(sum(batch_numbers, [])) == list(range(8))
        pairs = {tuple(sorted(numbers)) for numbers in batch_numbers}
        assert pairs == {(0, 1), (2, 3), (4, 5), (6, 7)}
    assert sum(first, []) != sum(second, [])
    assert len({seed for batch in batches for _, seed in batch}) == 16
    odd = numbers_of(plan(videos[:3], 2, 2))
    assert set(sum(odd, [])) == {0, 1, 2}
    for numbers in numbers_of(plan(videos[:5], 30, 2)):
        assert len(set(numbers)) == 2
    assert numbers_of(plan(videos[:1], 1, 3)) == [[0, 0, 0]]


@needs_shared
def test_batches_of_thumos_lengths_hold_little_padding():
    lengths = read_result(SHARED / "data/thumos14/i3d_feature_lengths.json")
    videos = [video_of(name, min(video["feature_length"], 2304))
              for name, video in lengths.items() if "validation" in name]
    batches = plan(videos, len(videos) // 2, 2, "--dataset", "thumos")
    longest = [max(videos[i].steps for i in numbers) for numbers in numbers_of(batches)]
    assert 2 * sum(longest) < 1.25 * sum(video.steps for video in videos)


def test_loading_ahead_keeps_the_order_and_passes_errors_on():
    assert list(data.ahead(lambda n: n * n, range(7))) == [0, 1, 4, 9, 16, 25, 36]
    assert list(data.ahead(len, [])) == []
    with pytest.raises(ZeroDivisionError):
        list(data.ahead(lambda n: 1 / n, [2, 1, 0, 1]))


# ---- Published data -----------------------------------------------------------------------------

@needs_shared
def test_thumos_annotations_and_real_clips_open():
    clips = SHARED / "data/thumos14/clips"
    d = data.load_dataset(settings(
        "--dataset", "thumos", "--annotations", clips / "clips.json", "--features", clips,
        "--train-subset", "test", "--ratio", 0.5))
    assert d.dim == 2048
    assert [len(video.segments) for video in d.labelled] in ([1], [3])

    annotations = data.read_annotations(SHARED / "data/thumos14/thumos14.json")
    training = {name: a for name, a in annotations.items() if a.subset == "Validation"}

    def missing(split, seed):
        ids = data.split_videos(training, 0.1, split, seed)
        return 20 - len({label for name in ids for label in training[name].labels})

    assert len(data.split_videos(training, 0.1, "uniform", 0)) == 20
    assert missing("stratified", 0) == 0
    lacking = [missing("uniform", seed) for seed in range(100)]
    assert 5 < np.mean(lacking) < 7  # 6 of 20 on average
    bad = [(~data.good_segments(a, a.duration)).sum() for a in annotations.values()]
    assert sum(bad) >= 30


@needs_shared
def test_epic_and_activitynet_annotations_open():
    noun = data.read_annotations(SHARED / "data/epic/epic_kitchens_100_noun_reduced.json")
    names = data.class_names(noun.values())
    assert names == sorted(names, key=int)  # string ids, in the order of their numbers
    anet = data.read_annotations(SHARED / "data/activitynet/activitynet_v1.3.json")
    anet = {name: a for name, a in anet.items() if a.subset == "training"}
    split = SHARED / "data/activitynet/sstap_labelled_10pct.txt"
    assert len(data.split_videos(anet, 0.1, str(split), 0)) > 900


# ---- Results that are written -------------------------------------------------------------------

def test_a_log_cut_short_is_read_up_to_its_last_whole_line(tmp_path):
    path = tmp_path / "log.jsonl"
    assert data.read_rows(path) == []
    data.append_row(path, {"step": 1})
    data.append_row(path, {"step": 2})
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"step": 3, "lo')
    assert data.read_rows(path) == [{"step": 1}, {"step": 2}]


def test_a_file_half_written_does_not_replace_the_old_one(tmp_path):
    path = tmp_path / "metrics.json"
    data.write_json(path, {"mAP": 1})

    def fail(file):
        file.write(b'{"mA')
        raise OSError(errno.ENOSPC, "disk full")

    with pytest.raises(data.BadInput, match="disk full"):
        data.write_atomically(path, fail)
    assert read_result(path) == {"mAP": 1}
    assert list(tmp_path.iterdir()) == [path]


# ---- Real annotations ---------------------------------------------------------------------------

def write_lengths(folder, lengths, name_of):
    """Feature files of these numbers of steps, of 4 channels: {id: steps}."""
    x = np.random.default_rng(0).normal(size=(max(lengths.values()), 4)).astype(np.float32)
    folder.mkdir()
    for video, steps in lengths.items():
        file = folder / name_of.format(video)
        if file.suffix == ".npz":
            np.savez(file, feats=x[:steps])
        else:
            np.save(file, x[:steps])


def alarms(*argv):
    """The warnings about a data set but those about classes that the draw left without a label."""
    warnings = data.load_dataset(settings(*argv)).warnings
    return [text for text in warnings if "have no labelled instance" not in text]


@needs_shared
def test_real_annotations_of_thumos_give_no_false_alarm(tmp_path):
    found = read_result(SHARED / "data/thumos14/i3d_feature_lengths.json")
    lengths = {name: video["feature_length"] for name, video in found.items()}
    write_lengths(tmp_path / "features", lengths, "{}.npy")
    argv = ("--dataset", "thumos", "--annotations", SHARED / "data/thumos14/thumos14.json",
            "--features", tmp_path / "features", "--ratio", 0.1)
    assert alarms(*argv) == []


@needs_shared
@pytest.mark.parametrize(("name", "path", "fps", "stride", "frames", "every"), [
    ("activitynet", "activitynet/activitynet_v1.3.json", 25, 16, 16, 30),
    ("epic-noun", "epic/epic_kitchens_100_noun_reduced.json", 30, 16, 32, 5),
])
def test_real_annotations_give_no_false_alarm(tmp_path, name, path, fps, stride, frames, every):
    database = read_result(SHARED / "data" / path)["database"]
    database = dict(list(database.items())[::every])
    (tmp_path / "some.json").write_text(json.dumps({"database": database}))
    lengths = {video: max(int((entry["duration"] * fps - frames) // stride) + 1, 1)
               for video, entry in database.items()}
    preset = train.PRESETS[name]
    name_of = f"{preset.get('prefix', '')}{{}}{preset.get('extension', '.npy')}"
    write_lengths(tmp_path / "features", lengths, name_of)
    argv = ("--dataset", name, "--annotations", tmp_path / "some.json",
            "--features", tmp_path / "features", "--ratio", 0.2)
    assert [text for text in alarms(*argv) if "no grid step" not in text] == []


@needs_shared
@pytest.mark.parametrize(("fps", "words"), [
    (50, []), (60, ["0.83 times", "--stride 30"]), (40, ["1.25 times", "--stride 20"])])
def test_a_real_data_set_gives_an_alarm_where_its_fps_is_off(fps, words):
    hapt = SHARED / "data/hapt"
    found = alarms("--dataset", hapt / "hapt.json", "--features", hapt / "features",
                   "--stride", 25, "--frames", 50, "--fps", fps)
    assert bool(found) == bool(words)
    for word in words:
        assert word in found[0]


# ---- What is known of files that have not changed -----------------------------------------------

@pytest.fixture
def read(monkeypatch):
    """The ids of the videos whose feature files are read."""
    seen = []
    sum_features = data.sum_features

    def note(source, key, name):
        seen.append(name)
        return sum_features(source, key, name)

    monkeypatch.setattr(data, "sum_features", note)
    return seen


def test_a_file_is_checked_once_until_it_changes(own, read):
    s = settings(*own_argv(own))
    first = data.load_dataset(s)
    assert sorted(read) == sorted(f"v{i}" for i in range(14))
    read.clear()
    again = data.load_dataset(s)
    assert read == []
    assert torch.equal(first.mean, again.mean)
    assert torch.equal(first.std, again.std)
    assert first.fingerprint == again.fingerprint

    file = own / "features/v3.npy"
    then = file.stat()
    feats = np.load(file)
    feats[5, 2] = np.nan
    np.save(file, feats)
    os.utime(file, ns=(then.st_atime_ns, then.st_mtime_ns))  # as a copy that keeps its times
    with pytest.raises(data.BadInput, match="v3.*nan at step 5, channel 2"):
        data.load_dataset(s)
    assert read == ["v3"]


def test_new_files_are_added_to_what_is_known(own, read):
    s = settings(*own_argv(own))
    file = own / "features/v12.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    with pytest.raises(data.BadInput, match="v12"):
        data.load_dataset(s)
    file.write_bytes(whole)
    read.clear()
    data.load_dataset(s)
    assert read == ["v12"]
    trained = {"classes": ["A", "B"], "mean": torch.zeros(5), "std": torch.ones(5)}
    read.clear()
    data.load_dataset(s, trained)
    data.load_dataset(s)
    assert read == []


def test_a_memory_that_cannot_be_read_or_written_is_none(own, read, monkeypatch):
    s = settings(*own_argv(own))
    data.load_dataset(s)
    memory = data.memory_of(s)
    whole = memory.read_bytes()
    other = io.BytesIO()
    np.savez(other, files=["x"], states=[1, 2], rows=[3.0])
    for content in (b"", whole[:-40], other.getvalue()):
        memory.write_bytes(content)
        read.clear()
        data.load_dataset(s)
        assert len(read) == 14
    monkeypatch.setenv("XDG_CACHE_HOME", str(own / "own.json"))  # a file, no folder
    data.load_dataset(s)
    data.load_dataset(s)
    assert len(read) == 3 * 14
