"""Tests of data.py: annotations, grids, features, splits, crops, batches."""
import errno
import io
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import model
import plumbing.files
from plumbing import forms, splits
from plumbing.words import BadInput
from tests.helpers import SHARED, edit, needs_shared, own_argv, read_result, refused, settings


def opened(own, *more):
    """The user's data set as train.py has it."""
    return data.training_data(settings(*own_argv(own, *more)))


# ---- Seconds, annotations, features -------------------------------------------------------------

def test_seconds_and_grid_are_inverse_and_right():
    grid = data.Grid(fps=30.0, stride=4.0, frames=16.0)
    assert grid.to_grid(0.0) == -2.0  # feature 0 sees frames 0-15: its centre is 8 frames in
    assert grid.to_seconds(0.0) == pytest.approx(8 / 30)
    assert grid.span(3) == pytest.approx((8 + 16) / 30)
    t = torch.rand(50) * 100
    assert torch.allclose(grid.to_seconds(grid.to_grid(t)), t, atol=1e-4)


def test_datasets_open_with_their_presets(own):
    d = opened(own)
    assert (len(d.labelled), len(d.unlabelled), len(d.test)) == (3, 7, 4)
    assert (d.classes, d.dim) == (["A", "B"], 5)
    assert d.labelled[0].segments[0].tolist() == [2 * 2 - 1, 8 * 2 - 1]  # (t * 50 - 25) / 25
    t = settings("--dataset", "thumos", "--ratio", 0.1)
    assert (t.stride, t.frames, t.channels, t.t_plus, t.tiou) == (4, 16, 512, 100, "0.3:0.7:0.1")
    a = settings("--dataset", "activitynet", "--lr", 0.5)
    found = (a.resize, a.nms_sigma, a.lambda_reg, a.scope, a.lr)
    assert found == (192, 0.75, 2, "dataset", 0.5)
    for name in [*data.PRESETS, "x.json"]:
        detector = model.Detector(8, 2, settings("--dataset", name))
        assert detector.ranges.shape == (6, 2)


def test_annotations_as_users_have_them(own):
    def change(database):
        for i, entry in enumerate(database.values()):
            entry["subset"] = "Validation" if i > 9 else ["TRAINING", "training", "Training"][i % 3]
            del entry["fps"]
            for a in entry["annotations"]:
                a["label_id"] = {"A": "10", "B": "9"}[a["label"]]  # strings, and B before A
        database["v0"]["annotations"][2]["segment"] = [30.0, 34.0]  # half past the end: clipped
        del database["v1"]["annotations"]

    edit(own, change)
    d = opened(own, "--fps", 50, "--ratio", 1.0, "--stage", "supervised")
    assert (d.classes, len(d.labelled)) == (["B", "A"], 9)
    assert d.labelled[0].segments[2].tolist() == [30 * 2 - 1, 32.5 * 2 - 1]
    assert [video.id for video in d.unlabelled] == ["v1"]


def test_resizing_keeps_the_seconds(own):
    s = settings(*own_argv(own, "--resize", 48))
    d = data.training_data(s)
    video = d.labelled[0]
    assert data.load_item(video, d, s)["feats"].shape == (48, 5)
    assert video.in_seconds(video.segments)[0].tolist() == pytest.approx([2.0, 8.0], abs=1e-5)
    # The last half step ends where the last feature does.
    assert video.grid.to_seconds(47.5) == pytest.approx(32.5)
    s = settings(*own_argv(own, "--resize", 200, "--max-steps", 2304))
    video = data.training_data(s).labelled[0]
    whole = data.load_item(video, d, s)
    rng = np.random.default_rng(0)
    crops = [data.load_item(video, d, s, rng) for _ in range(20)]
    lengths = {len(crop["feats"]) for crop in crops}
    assert 180 <= min(lengths) < max(lengths) <= 200
    for crop in crops:
        start = crop["start"]
        assert torch.equal(crop["feats"], whole["feats"][start:start + len(crop["feats"])])


def test_a_grid_that_does_not_fit_the_annotations_is_pointed_out(own, capsys):
    assert opened(own).warnings == []
    refused(own_argv(own, "--stride", 50), capsys, "14 videos", "--stride 25", "--trust-grid")
    text = opened(own, "--stride", 50, "--trust-grid").warnings[0]
    assert "14 videos" in text
    assert "--stride" in text


def test_bad_segments_can_be_left_out(own):
    edit(own, lambda database: database["v1"]["annotations"][0].update(segment=[9.0, 3.0]))
    d = opened(own, "--bad-segments", "skip", "--ratio", 1.0, "--stage", "supervised")
    assert [len(video.segments) for video in d.labelled if video.id == "v1"] == [2]


def test_an_array_of_another_name_is_not_found(own):
    for path in (own / "features").glob("*.npy"):
        np.savez(path.with_suffix(".npz"), feats=np.load(path))
    assert opened(own, "--extension", ".npz", "--feature-key", "feats").dim == 5
    with pytest.raises(BadInput, match="no array named 'x'"):
        opened(own, "--extension", ".npz", "--feature-key", "x")


def test_standardisation_uses_all_training_videos_and_no_test_video(own):
    d = opened(own)
    x = np.concatenate([np.load(own / f"features/v{i}.npy") for i in range(10)])
    assert np.allclose(d.mean, x.mean(0), atol=1e-5)
    assert np.allclose(d.std, x.std(0), atol=1e-5)
    d = opened(own, "--no-standardize")
    assert not d.mean.any() and (d.std == 1).all()


# ---- Splits, items, crops ------------------------------------------------------------------------

def annotation_of(labels):
    """An Annotation with instances of these labels, a letter each."""
    segments = np.array([[0.0, 1.0]] * len(labels))
    return forms.Annotation("training", 10.0, 1.0, segments, list(labels))


def test_splits(tmp_path):
    many = {f"v{i}": annotation_of(labels) for i, labels in enumerate(["ab"] * 18 + ["c", "d"])}
    uniform = splits.split_videos(many, 0.2, "uniform", 0)
    assert len(uniform) == 4
    assert uniform == splits.split_videos(many, 0.2, "uniform", 0)
    assert uniform != splits.split_videos(many, 0.2, "uniform", 1)
    for seed in range(10):
        chosen = splits.split_videos(many, 0.2, "stratified", seed)
        assert {"v18", "v19"} < set(chosen)  # the only videos of c and d
        assert len(set(chosen)) == 4
    (tmp_path / "s.json").write_text('{"labelled": ["v3", "v1"]}')
    (tmp_path / "s.txt").write_text("v_v2\nv5\n")
    assert splits.split_videos(many, 0.1, str(tmp_path / "s.json"), 0) == ["v1", "v3"]
    assert splits.split_videos(many, 0.1, str(tmp_path / "s.txt"), 0) == ["v2", "v5"]


@pytest.mark.parametrize("audit", ["--no-audit", "--audit"])
def test_unlabelled_items_have_no_label_field_audited_or_not(own, audit):
    s = settings(*own_argv(own, audit))
    d = data.training_data(s)
    for video in d.unlabelled + d.test:
        assert type(video) is data.Video
        assert not hasattr(video, "labels") and not hasattr(video, "segments")
        assert set(data.load_item(video, d, s)) == {"id", "video", "feats", "start"}
    batch = data.collate([data.load_item(video, d, s) for video in d.unlabelled[:2]])
    assert not {"labels", "segments"} & set(batch)
    assert bool(d.hidden) == (audit == "--audit")


def test_unlabelled_crops_are_blind_to_labels(own):
    s = settings(*own_argv(own, "--max-steps", 20))

    def crops():
        d = data.training_data(s)
        rng = np.random.default_rng(3)
        items = [data.load_item(v, d, s, rng) for v in d.unlabelled for _ in range(10)]
        return [item["start"] for item in items]

    def clear(database):
        for name in hidden:
            database[name]["annotations"] = []

    before = crops()
    hidden = [video.id for video in data.training_data(s).unlabelled]
    edit(own, clear)
    assert crops() == before
    assert len(set(before)) > 5


def test_labelled_crops_hold_an_action(own):
    s = settings(*own_argv(own, "--max-steps", 20, "--crop-tries", 100))
    d = data.training_data(s)
    video = d.labelled[0]
    rng = np.random.default_rng(0)
    few = settings(*own_argv(own, "--max-steps", 20))
    whole = data.load_item(video, d, few)["feats"]
    for item in [data.load_item(video, d, few, rng) for _ in range(40)]:
        assert len(item["segments"])
        assert -1 <= item["segments"].min() < item["segments"].max() <= 21
        assert torch.equal(item["feats"], whole[item["start"]:item["start"] + 20])
    video.segments = video.segments[2:]  # a rare action: 8 of 64 steps
    video.labels = video.labels[2:]
    for item in [data.load_item(video, d, s, rng) for _ in range(40)]:
        assert len(item["segments"]) == 1


# ---- Batches ------------------------------------------------------------------------------------

def video_of(name, steps):
    """A Video that has nothing but a name and a length."""
    return data.Video(name, None, "", None, steps, 1.0, False)


def plan(videos, steps, size, *argv):
    """The numbers of the videos of each of data.plan_batches() with seed 0, and all seeds."""
    batches = data.plan_batches(videos, settings(*argv), steps, size, np.random.default_rng(0))
    seeds = [seed for batch in batches for _, seed in batch]
    return [[i for i, _ in batch] for batch in batches], seeds


def test_batches_are_padded_to_their_longest_video_only():
    d = data.training_data(settings())
    s = settings("--batch", 3)
    batch = next(data.training_batches(d.labelled, d, s, 1, np.random.default_rng(0)))
    lengths = batch["mask"].sum(1)
    assert batch["feats"].shape[:2] == (3, int(lengths.max()))
    assert not batch["feats"][~batch["mask"]].any()


def test_every_video_is_seen_once_a_pass_beside_one_of_like_length():
    videos = [video_of(f"v{T}", T) for T in range(100, 900, 100)]
    batches, seeds = plan(videos, 8, 2, "--length-noise", 0)
    for numbers in (batches[:4], batches[4:]):
        assert sorted(sum(numbers, [])) == list(range(8))
        assert {tuple(sorted(pair)) for pair in numbers} == {(0, 1), (2, 3), (4, 5), (6, 7)}
    assert batches[:4] != batches[4:]
    assert len(set(seeds)) == 16
    assert set(sum(plan(videos[:3], 2, 2)[0], [])) == {0, 1, 2}
    for numbers in plan(videos[:5], 30, 2)[0]:
        assert len(set(numbers)) == 2
    assert plan(videos[:1], 1, 3)[0] == [[0, 0, 0]]


@needs_shared
def test_batches_of_thumos_lengths_hold_little_padding():
    lengths = read_result(SHARED / "data/thumos14/i3d_feature_lengths.json")
    videos = [video_of(name, min(video["feature_length"], 2304))
              for name, video in lengths.items() if "validation" in name]
    batches, _ = plan(videos, len(videos) // 2, 2, "--dataset", "thumos")
    longest = [max(videos[i].steps for i in numbers) for numbers in batches]
    assert 2 * sum(longest) < 1.25 * sum(video.steps for video in videos)


def test_loading_ahead_keeps_the_order_and_passes_errors_on():
    assert list(data.prefetch(lambda n: n * n, range(7))) == [0, 1, 4, 9, 16, 25, 36]
    assert list(data.prefetch(len, [])) == []
    with pytest.raises(ZeroDivisionError):
        list(data.prefetch(lambda n: 1 / n, [2, 1, 0, 1]))


# ---- Published data -----------------------------------------------------------------------------

@needs_shared
def test_thumos_annotations_and_real_clips_open():
    clips = SHARED / "data/thumos14/clips"
    d = data.training_data(settings(
        "--dataset", "thumos", "--annotations", clips / "clips.json", "--features", clips,
        "--train-subset", "test", "--ratio", 0.5))
    assert d.dim == 2048
    assert [len(video.segments) for video in d.labelled] in ([1], [3])

    annotations = forms.read_annotations(SHARED / "data/thumos14/thumos14.json")
    training = {name: a for name, a in annotations.items() if a.subset == "Validation"}

    def missing(split, seed):
        ids = splits.split_videos(training, 0.1, split, seed)
        assert len(ids) == 20 or split == "stratified"
        return 20 - len({label for name in ids for label in training[name].labels})

    assert missing("stratified", 0) == 0
    assert 5 < np.mean([missing("uniform", seed) for seed in range(100)]) < 7  # 6 of 20
    bad = [(~forms.good_segments(a, a.duration)).sum() for a in annotations.values()]
    assert sum(bad) >= 30


@needs_shared
def test_epic_and_activitynet_annotations_open():
    noun = forms.read_annotations(SHARED / "data/epic/epic_kitchens_100_noun_reduced.json")
    names = forms.class_names(noun.values())
    assert names == sorted(names, key=int)  # string ids, in the order of their numbers
    anet = forms.read_annotations(SHARED / "data/activitynet/activitynet_v1.3.json")
    anet = {name: a for name, a in anet.items() if a.subset == "training"}
    split = SHARED / "data/activitynet/sstap_labelled_10pct.txt"
    assert len(splits.split_videos(anet, 0.1, str(split), 0)) > 900


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
    warnings = data.training_data(settings(*argv)).warnings
    return [text for text in warnings if "have no labelled instance" not in text]


@needs_shared
@pytest.mark.parametrize(("name", "path", "every", "ratio", "left_out"), [
    ("thumos", "thumos14/thumos14.json", 1, 0.1, None),
    ("activitynet", "activitynet/activitynet_v1.3.json", 30, 0.2, "no grid step"),
    ("epic-noun", "epic/epic_kitchens_100_noun_reduced.json", 5, 0.2, "no grid step"),
])
def test_real_annotations_give_no_false_alarm(tmp_path, name, path, every, ratio, left_out):
    database = read_result(SHARED / "data" / path)["database"]
    database = dict(list(database.items())[::every])
    (tmp_path / "some.json").write_text(json.dumps({"database": database}))
    s = settings("--dataset", name)
    lengths = {video: max(int((entry["duration"] * s.fps - s.frames) // s.stride) + 1, 1)
               for video, entry in database.items()}
    if name == "thumos":  # what its features have
        found = read_result(SHARED / "data/thumos14/i3d_feature_lengths.json")
        lengths = {video: entry["feature_length"] for video, entry in found.items()}
    write_lengths(tmp_path / "features", lengths, f"{s.prefix}{{}}{s.extension}")
    argv = ("--dataset", name, "--annotations", tmp_path / "some.json",
            "--features", tmp_path / "features", "--ratio", ratio)
    assert [text for text in alarms(*argv) if not left_out or left_out not in text] == []


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


# ---- What is known of files, and files that are written -----------------------------------------

@pytest.fixture
def read(monkeypatch):
    """The ids of the videos whose feature files are read."""
    seen = []
    sum_features = plumbing.files.sum_features

    def note(source, key, name):
        seen.append(name)
        return sum_features(source, key, name)

    monkeypatch.setattr(plumbing.files, "sum_features", note)
    return seen


def test_a_file_is_checked_once_until_it_changes(own, read):
    first = opened(own)
    assert sorted(read) == sorted(f"v{i}" for i in range(14))
    read.clear()
    again = opened(own)
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
    with pytest.raises(BadInput, match="v3.*nan at step 5, channel 2"):
        opened(own)
    assert read == ["v3"]


def test_new_files_are_added_to_what_is_known(own, read):
    file = own / "features/v12.npy"
    content = file.read_bytes()
    file.write_bytes(content[:-8])
    with pytest.raises(BadInput, match="v12"):
        opened(own)
    file.write_bytes(content)
    read.clear()
    opened(own)
    assert read == ["v12"]
    read.clear()
    trained = SimpleNamespace(classes=["A", "B"], mean=torch.zeros(5), std=torch.ones(5))
    data.test_data(settings(*own_argv(own)), trained)
    opened(own)
    assert read == []


def test_a_memory_that_cannot_be_read_or_written_is_none(own, read, monkeypatch):
    s = settings(*own_argv(own))
    data.training_data(s)
    memory = plumbing.files.memory_of(own / "features/v3.npy", s.feature_key)
    whole = memory.read_bytes()
    other = io.BytesIO()
    np.savez(other, state=[1, 2], row=[3.0])
    for content in (b"", whole[:-40], other.getvalue()):
        memory.write_bytes(content)
        read.clear()
        data.training_data(s)
        assert len(read) == 1
    read.clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(own / "own.json"))  # a file, no folder
    data.training_data(s)
    data.training_data(s)
    assert len(read) == 2 * 14


def test_a_log_cut_short_is_read_up_to_its_last_whole_line(tmp_path):
    path = tmp_path / "log.jsonl"
    assert plumbing.files.read_rows(path) == []
    for step in (1, 2):
        plumbing.files.append_row(path, {"step": step})
    path.write_text(path.read_text() + '{"step": 3, "lo')
    assert plumbing.files.read_rows(path) == [{"step": 1}, {"step": 2}]


def test_a_file_half_written_does_not_replace_the_old_one(tmp_path):
    path = tmp_path / "metrics.json"
    plumbing.files.write_json(path, {"mAP": 1})

    def fail(file):
        file.write(b'{"mA')
        raise OSError(errno.ENOSPC, "disk full")

    with pytest.raises(BadInput, match="disk full"):
        plumbing.files.write_atomically(path, fail)
    assert read_result(path) == {"mAP": 1}
    assert list(tmp_path.iterdir()) == [path]
