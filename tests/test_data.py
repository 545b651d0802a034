"""Tests of data.py: annotations, grids, features, splits, crops, batches."""
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
from plumbing import files, forms, splits
from plumbing.words import BadInput
from tests.helpers import SHARED, edit, needs_shared, own_argv, read_result, refused, settings
from tests.test_faults import convert
from tests.users import NAMES, TRAINED, actions, entries, everything, lacking, opened


def test_data_open_standardised_by_all_training_videos_and_bad_ones_are_pointed_out(own, capsys):
    d = opened(own)
    assert (len(d.labelled), len(d.unlabelled), len(d.test)) == (3, 7, 4)
    assert (d.classes, d.dim, d.warnings) == (["A", "B"], 5, [])
    assert d.labelled[0].segments[0].tolist() == [2 * 2 - 1, 8 * 2 - 1]  # (t * 50 - 25) / 25
    x = np.concatenate([np.load(own / f"features/{name}.npy") for name in TRAINED])
    assert np.allclose([*d.mean, *d.std], [*x.mean(0), *x.std(0)], atol=1e-5)
    d = opened(own, "--no-standardize")
    assert not d.mean.any() and (d.std == 1).all()
    refused(own_argv(own, "--stride", 50), capsys, "14 videos", "--stride 25", "--trust-grid")
    warning = opened(own, "--stride", 50, "--trust-grid").warnings[0]
    assert "14 videos" in warning and "--stride" in warning
    convert(own, ".npz")
    with pytest.raises(BadInput, match="no array named 'x'"):
        opened(own, "--extension", ".npz", "--feature-key", "x")


def test_annotations_as_users_have_them(own):
    def change(database):
        for i, entry in enumerate(database.values()):
            entry["subset"] = "Validation" if i > 9 else ["TRAINING", "training", "Training"][i % 3]
            for a in entry["annotations"]:
                a["label_id"] = {"A": "10", "B": "9"}[a["label"]]  # strings, and B before A
    edit(own, change)
    lacking("fps", *NAMES)(own)
    lacking("annotations", "v1")(own)
    actions(["v0"], 2, segment=[30.0, 34.0])(own)  # half past the end: clipped
    d = everything(own, "--fps", 50)
    assert (d.classes, len(d.labelled)) == (["B", "A"], 9)
    assert d.labelled[0].segments[2].tolist() == [30 * 2 - 1, 32.5 * 2 - 1]
    assert [video.id for video in d.unlabelled] == ["v1"]
    actions(["v2"], 0, segment=[9.0, 3.0])(own)
    d = everything(own, "--fps", 50, "--bad-segments", "skip")
    assert [len(video.segments) for video in d.labelled if video.id == "v2"] == [2]


def test_seconds_and_grid_are_inverse_and_resizing_keeps_the_seconds(own):
    grid, t = data.Grid(fps=30.0, stride=4.0, frames=16.0), torch.rand(50) * 100
    assert grid.to_grid(0.0) == -2.0  # feature 0 sees frames 0-15: its centre is 8 frames in
    assert [grid.to_seconds(0.0), grid.span(3)] == pytest.approx([8 / 30, (8 + 16) / 30])
    assert torch.allclose(grid.to_seconds(grid.to_grid(t)), t, atol=1e-4)
    s = settings(*own_argv(own, "--resize", 48))
    d = data.training_data(s)
    video = d.labelled[0]
    assert data.load_item(video, d, s)["feats"].shape == (48, 5)
    assert video.in_seconds(video.segments)[0].tolist() == pytest.approx([2.0, 8.0], abs=1e-5)
    assert video.grid.to_seconds(47.5) == pytest.approx(32.5)  # where the last feature ends
    s = settings(*own_argv(own, "--resize", 200, "--max-steps", 2304))
    video, rng = data.training_data(s).labelled[0], np.random.default_rng(0)
    whole = data.load_item(video, d, s)["feats"]
    crops = [data.load_item(video, d, s, rng) for _ in range(20)]
    lengths = [len(crop["feats"]) for crop in crops]
    assert 180 <= min(lengths) < max(lengths) <= 200
    for crop, length in zip(crops, lengths):
        assert torch.equal(crop["feats"], whole[crop["start"]:crop["start"] + length])

def test_splits(tmp_path):
    many = {}
    for i, labels in enumerate(["ab"] * 18 + ["c", "d"]):  # a letter each
        segments = np.array([[0.0, 1.0]] * len(labels))
        many[f"v{i}"] = forms.Annotation("training", 10.0, 1.0, segments, list(labels))
    uniform, again, other = (splits.split_videos(many, 0.2, "uniform", seed) for seed in (0, 0, 1))
    assert len(uniform) == 4 and uniform == again != other
    for seed in range(10):
        chosen = splits.split_videos(many, 0.2, "stratified", seed)
        assert {"v18", "v19"} < set(chosen) and len(set(chosen)) == 4  # the only videos of c and d
    for name, text, ids in (("s.json", '{"labelled": ["v3", "v1"]}', ["v1", "v3"]),
                            ("s.txt", "v_v2\nv5\n", ["v2", "v5"])):
        (tmp_path / name).write_text(text)
        assert splits.split_videos(many, 0.1, str(tmp_path / name), 0) == ids


def test_a_stratified_split_is_that_of_a_plain_loop_and_fast():
    rng = np.random.default_rng(0)
    for _ in range(50):
        order = [f"v{i}" for i in rng.permutation(rng.integers(1, 30))]
        has = rng.random((len(order), rng.integers(6))) < rng.random()
        labels = {name: set(np.nonzero(row)[0].tolist()) for name, row in zip(order, has)}
        left, chosen, covered = list(order), [], set()
        while left:
            best = max(left, key=lambda name: len(labels[name] - covered))
            if covered and not labels[best] - covered:
                covered = set()
                continue
            left.remove(best)
            chosen.append(best)
            covered |= labels[best]
        for count in (1, len(order) // 2, len(order)):
            assert splits.stratify(order, labels, count) == chosen[:count]


def test_a_file_that_is_replaced_under_a_run_is_named(own):
    s = settings(*own_argv(own))
    d = data.training_data(s)
    for shape in ((63, 5), (65, 5), (64, 4), (64, 6), (64,)):
        np.save(own / f"features/{d.test[0].id}.npy", np.zeros(shape))
        with pytest.raises(BadInput, match=d.test[0].id):
            data.load_item(d.test[0], d, s)


@pytest.mark.parametrize("audit", ["--no-audit", "--audit"])
def test_unlabelled_items_have_no_label_field_and_their_crops_are_blind(own, audit):
    s, starts = settings(*own_argv(own, "--max-steps", 20, audit)), []
    for _ in range(2):
        d, rng = data.training_data(s), np.random.default_rng(3)
        for video in d.unlabelled + d.test:
            assert type(video) is data.Video
            assert not hasattr(video, "labels") and not hasattr(video, "segments")
            assert set(data.load_item(video, d, s)) == {"id", "video", "feats", "start"}
        items = [data.load_item(v, d, s, rng) for v in d.unlabelled for _ in range(10)]
        assert not {"labels", "segments"} & set(data.collate(items[:2]))
        assert bool(d.hidden) == (audit == "--audit")
        starts.append([item["start"] for item in items])
        entries([video.id for video in d.unlabelled], annotations=[])(own)
    assert starts[0] == starts[1] and len(set(starts[0])) > 5


def test_labelled_crops_hold_an_action(own):
    few, many = (settings(*own_argv(own, "--max-steps", 20, "--crop-tries", n)) for n in (10, 100))
    d, rng = data.training_data(many), np.random.default_rng(0)
    video = d.labelled[0]
    whole = data.load_item(video, d, few)["feats"]
    for item in [data.load_item(video, d, few, rng) for _ in range(40)]:
        assert len(item["segments"])
        assert -1 <= item["segments"].min() < item["segments"].max() <= 21
        assert torch.equal(item["feats"], whole[item["start"]:item["start"] + 20])
    video.segments, video.labels = video.segments[2:], video.labels[2:]  # rare: 8 of 64 steps
    for item in [data.load_item(video, d, many, rng) for _ in range(40)]:
        assert len(item["segments"]) == 1

def plan(lengths, steps, size, *argv):
    """The numbers of the videos of each of data.plan_batches() with seed 0, and all seeds."""
    videos = [SimpleNamespace(steps=length) for length in lengths]
    batches = data.plan_batches(videos, settings(*argv), steps, size, np.random.default_rng(0))
    return [[i for i, _ in batch] for batch in batches], [seed for b in batches for _, seed in b]


def test_batches_are_padded_to_their_longest_video_only_and_loaded_ahead_in_order():
    d, s = data.training_data(settings()), settings("--batch", 3)
    batch = next(data.training_batches(d.labelled, d, s, 1, np.random.default_rng(0)))
    assert batch["feats"].shape[:2] == (3, int(batch["mask"].sum(1).max()))
    assert not batch["feats"][~batch["mask"]].any()
    assert list(data.prefetch(lambda n: n * n, range(7))) == [0, 1, 4, 9, 16, 25, 36]
    assert list(data.prefetch(len, [])) == []
    with pytest.raises(ZeroDivisionError):
        list(data.prefetch(lambda n: 1 / n, [2, 1, 0, 1]))


def test_every_video_is_seen_once_a_pass_beside_one_of_like_length():
    lengths = range(100, 900, 100)
    batches, seeds = plan(lengths, 8, 2, "--length-noise", 0)
    for numbers in (batches[:4], batches[4:]):
        assert sorted(map(sorted, numbers)) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert batches[:4] != batches[4:] and len(set(seeds)) == 16
    assert set(sum(plan(lengths[:3], 2, 2)[0], [])) == {0, 1, 2}
    assert {len(set(numbers)) for numbers in plan(lengths[:5], 30, 2)[0]} == {2}
    assert plan(lengths[:1], 1, 3)[0] == [[0, 0, 0]]

@needs_shared
def test_published_annotations_and_real_clips_open_and_batches_hold_little_padding():
    found = read_result(SHARED / "data/thumos14/i3d_feature_lengths.json")
    lengths = [min(video["feature_length"], 2304)
               for name, video in found.items() if "validation" in name]
    batches, _ = plan(lengths, len(lengths) // 2, 2, "--dataset", "thumos")
    longest = [max(lengths[i] for i in numbers) for numbers in batches]
    assert 2 * sum(longest) < 1.25 * sum(lengths)
    clips = SHARED / "data/thumos14/clips"
    d = data.training_data(settings(
        "--dataset", "thumos", "--annotations", clips / "clips.json", "--features", clips,
        "--train-subset", "test", "--ratio", 0.5))
    assert d.dim == 2048 and [len(video.segments) for video in d.labelled] in ([1], [3])
    thumos, anet, noun = (forms.read_annotations(SHARED / "data" / path) for path in (
        "thumos14/thumos14.json", "activitynet/activitynet_v1.3.json",
        "epic/epic_kitchens_100_noun_reduced.json"))
    training = {name: a for name, a in thumos.items() if a.subset == "Validation"}
    missing = {"stratified": [], "uniform": []}  # the classes without a label, of 20
    for split, seed in [("stratified", 0), *(("uniform", seed) for seed in range(100))]:
        ids = splits.split_videos(training, 0.1, split, seed)
        assert len(ids) == 20 or split == "stratified"
        labels = {label for name in ids for label in training[name].labels}
        missing[split].append(20 - len(labels))
    assert missing["stratified"] == [0] and 5 < np.mean(missing["uniform"]) < 7
    assert sum((~forms.good_segments(a, a.duration)).sum() for a in thumos.values()) >= 30
    training = {name: a for name, a in anet.items() if a.subset == "training"}
    split = SHARED / "data/activitynet/sstap_labelled_10pct.txt"
    assert len(splits.split_videos(training, 0.1, str(split), 0)) > 900
    names = forms.class_names(noun.values())
    assert names == sorted(names, key=int)  # string ids, in the order of their numbers


def alarms(*argv):
    """The warnings about a data set but those about classes that the draw left without a label."""
    warnings = data.training_data(settings(*argv)).warnings
    return [text for text in warnings if "have no labelled instance" not in text]


@needs_shared
@pytest.mark.parametrize(("name", "path", "every", "ratio", "left_out"), [
    ("thumos", "thumos14/thumos14.json", 1, 0.1, None),
    ("activitynet", "activitynet/activitynet_v1.3.json", 30, 0.2, "no grid step"),
    ("epic-noun", "epic/epic_kitchens_100_noun_reduced.json", 5, 0.2, "no grid step")])
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
    x = np.random.default_rng(0).normal(size=(max(lengths.values()), 4)).astype(np.float32)
    save = np.savez if s.extension == ".npz" else np.save
    for video, steps in lengths.items():
        save(tmp_path / f"{s.prefix}{video}{s.extension}", x[:steps])
    found = alarms("--dataset", name, "--annotations", tmp_path / "some.json",
                   "--features", tmp_path, "--ratio", ratio)
    assert [text for text in found if not left_out or left_out not in text] == []


@needs_shared
@pytest.mark.parametrize(("fps", "words"), [
    (50, []), (60, ["0.83 times", "--stride 30"]), (40, ["1.25 times", "--stride 20"])])
def test_a_real_data_set_gives_an_alarm_where_its_fps_is_off(fps, words):
    hapt = SHARED / "data/hapt"
    found = alarms("--dataset", hapt / "hapt.json", "--features", hapt / "features",
                   "--stride", 25, "--frames", 50, "--fps", fps, "--ratio", 0.5)
    assert bool(found) == bool(words) and all(word in found[0] for word in words)

@pytest.fixture
def read(monkeypatch):
    """The ids of the videos whose feature files are read."""
    seen, sum_features = [], files.sum_features

    def note(source, key, name):
        seen.append(name)
        return sum_features(source, key, name)
    monkeypatch.setattr(files, "sum_features", note)
    return seen


def test_a_file_is_checked_once_until_it_changes(own, read):
    file = own / "features/v12.npy"
    content = file.read_bytes()
    file.write_bytes(content[:-8])
    with pytest.raises(BadInput, match="v12"):
        opened(own)
    assert sorted(read) == sorted(NAMES)
    file.write_bytes(content)
    read.clear()
    first = opened(own)
    assert read == ["v12"]
    again = opened(own)
    again.columns = []
    data.test_data(settings(*own_argv(own)), again)
    assert read == ["v12"]
    assert torch.equal(first.mean, again.mean) and torch.equal(first.std, again.std)
    assert first.fingerprint == again.fingerprint
    file = own / "features/v3.npy"
    feats, then = np.load(file), file.stat()
    feats[5, 2] = np.nan
    np.save(file, feats)
    os.utime(file, ns=(then.st_atime_ns, then.st_mtime_ns))  # as a copy that keeps its times
    with pytest.raises(BadInput, match="v3.*nan at step 5, channel 2"):
        opened(own)
    assert read == ["v12", "v3"]


def test_a_memory_that_cannot_be_read_or_written_is_none(own, read, monkeypatch):
    s = settings(*own_argv(own))
    data.training_data(s)
    memory = files.memory_of(own / "features/v3.npy", s.reading())
    raw = memory.read_bytes()
    wrong = bytearray(raw)
    wrong[54] ^= 1  # a mean
    for content in (b"", raw[:-40], raw[:32], wrong):
        memory.write_bytes(content)
        read.clear()
        data.training_data(s)
        assert len(read) == 1
    for odd in (os.mkfifo, Path.mkdir, lambda path: path.symlink_to(own / "own.json")):
        memory.unlink()
        odd(memory)
        before = (own / "own.json").read_bytes()
        for _ in range(2):
            read.clear()
            data.training_data(s)
            assert len(read) == 1
        assert (own / "own.json").read_bytes() == before
        if memory.is_dir():
            memory.rmdir()
            memory.touch()
    read.clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(own / "own.json"))  # a file, no folder
    data.training_data(s)
    data.training_data(s)
    assert len(read) == 2 * 14


def test_of_a_log_the_rows_are_read_and_other_lines_counted(tmp_path):
    log = tmp_path / "log.jsonl"
    rows = [{"stage": "joint", "epoch": 1, "step": step} for step in (1, 2)]
    assert files.read_rows(log) == ([], 0)
    for row in rows:
        files.append_row(log, row)
    odd = ("{}", "[1]", '{"stage": 3, "epoch": 1}', '{"stage": "joint", "epoch": 1, "loss": [2]}',
           '{"stage": "joint", "epoch": ' + "[" * 9000, "\ufffd")
    log.write_text("\n".join([*odd, log.read_text() + '{"step": 3, "lo']))
    assert files.read_rows(log) == (rows, len(odd))
