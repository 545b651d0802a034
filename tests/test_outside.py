"""Tests of what comes from outside: files as people have them, faults as machines have them.

Four kinds: A right files that must be read, B wrong input that must be told, C files that lie,
D machines that fail."""
import contextlib
import copy
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
import zipfile

import numpy as np
import pytest
import torch

import data
import evaluate
import train
from tests.helpers import (
    ROOT,
    TINY,
    edit,
    evaluated,
    own_argv,
    read_log,
    read_result,
    refused,
    same,
    settings,
    small_detector,
    weights,
    write_own,
)
from tests.test_train import write_published

NAMES = [f"v{i}" for i in range(14)]
TESTED = NAMES[10:]
LOWEST = ("--theta-l", 0.0)  # so that a detector of few steps has pseudo labels
SUPERVISED = ("--stage", "supervised", "--acp", "none", "--supervised-epochs", 1)


@pytest.fixture(autouse=True)
def in_time():
    """A test that waits for ever fails."""
    def fail(number, frame):
        raise TimeoutError("the test took 90 seconds")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(90)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def with_run(tmp_path_factory, name, *more):
    """The folder of a user's data set with a finished run."""
    folder = tmp_path_factory.mktemp(name)
    write_own(folder)
    torch.manual_seed(0)
    assert train.main(own_argv(folder, *more)) == 0
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A user's data set with a finished run; no test changes it."""
    return with_run(tmp_path_factory, "original", *LOWEST)


@pytest.fixture
def trained(original, tmp_path):
    """A copy of the data set with a finished run, which has moved here together."""
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    return tmp_path


def places(folder):
    """The arguments that say where a moved run's data is."""
    return ["--dataset", str(folder / "own.json"), "--features", str(folder / "features")]


def resumed(folder, *more):
    """The command line that goes on with a moved run."""
    return ["--resume", str(folder / "run"), *places(folder), *map(str, more)]


def evaluating(folder, *more):
    """The command line that evaluates a moved run, for refusal()."""
    return ["evaluate", "--checkpoint", folder / "run", *places(folder), *more]


def refusal(argv, capsys, *words):
    """The sentence of a refused command: one line, short, printable, without a bad advice."""
    capsys.readouterr()
    text = refused(argv, capsys, *words)
    assert len(text) <= 401, text
    assert text[:-1].isprintable(), text
    for advice in ("allow_pickle", "weights_only", "set_int_max", "Traceback"):
        assert advice not in text, text
    return text


def check(own, *more):
    """The command line that looks at the data only."""
    return own_argv(own, "--check", *more)


def opened(own, *more):
    """The Dataset of the user's files."""
    return data.load_dataset(settings(*own_argv(own, *more)))


def everything(own, *more):
    """The Dataset of the user's files, all training videos labelled."""
    return opened(own, "--ratio", 1.0, "--stage", "supervised", *more)


def instances_of(dataset):
    """All that the labelled videos teach, as lists of numbers."""
    return {v.id: (v.segments.tolist(), v.labels.tolist()) for v in dataset.labelled}


def rewrite(own, content):
    """Another content of the annotation file."""
    (own / "own.json").write_text(json.dumps(content))


def read_own(own):
    """The database of the annotation file."""
    return read_result(own / "own.json")["database"]


def convert(own, extension, write):
    """Write the features in another kind of file: write(path, array)."""
    for path in sorted((own / "features").glob("*.npy")):
        write(path.with_suffix(extension), np.load(path))
        path.unlink()


def write_npz(path, x):
    """Features as an .npz file."""
    np.savez(path, feats=x)


def write_pt(path, x):
    """Features as a tensor in a .pt file."""
    torch.save(torch.from_numpy(x), path)


def predict(own, results, name="pred.json"):
    """The command line that evaluates these predictions, which are written."""
    (own / name).write_text(json.dumps({"results": results}))
    return ["evaluate", "--pred", own / name, "--gt", own / "own.json"]


def perfect(own, names):
    """Predictions equal to the annotations of these videos."""
    database = read_own(own)
    return {name: [{"label": a["label"], "segment": a["segment"], "score": 0.9}
                   for a in database[name]["annotations"]] for name in names}


def score_of(own, argv):
    """The average mAP that evaluate.py gives, in percent."""
    assert evaluated(*argv[1:], "--json", own / "out.json") == 0
    return 100 * read_result(own / "out.json")["average_mAP"]


# ---- A. Numbers as text -------------------------------------------------------------------------

TEXTS = {
    "plain": str,
    "blanks": lambda x: f"  {x}\n",
    "exponent": lambda x: f"{x:.12e}",
    "signed": lambda x: f"+{x}",
}


@pytest.mark.parametrize("form", TEXTS)
def test_numbers_of_annotations_may_be_text(own, form):
    before = everything(own)
    write = TEXTS[form]

    def change(database):
        for entry in database.values():
            entry["duration"] = write(entry["duration"])
            entry["fps"] = write(entry["fps"])
            for a in entry["annotations"]:
                a["segment"] = [write(t) for t in a["segment"]]

    edit(own, change)
    after = everything(own)
    assert instances_of(after) == instances_of(before)
    assert [v.duration for v in after.labelled] == [32.5] * 10
    assert after.warnings == before.warnings


@pytest.mark.parametrize("form", TEXTS)
def test_numbers_of_predictions_may_be_text(own, form):
    write = TEXTS[form]
    results = perfect(own, TESTED)
    for detections in results.values():
        for d in detections:
            d["score"] = write(d["score"])
            d["segment"] = [write(t) for t in d["segment"]]
    assert score_of(own, predict(own, results)) == pytest.approx(100)


NO_NUMBERS = {
    "nan": "nan",
    "infinity": "-Infinity",
    "401 digits": "1" * 401,
    "a whole number of 401 digits": 10 ** 400,
    "words": "twelve",
    "empty": "",
    "bool": True,
    "list": [1],
    "dict": {"s": 1},
    "float nan": math.nan,
}


@pytest.mark.parametrize("what", NO_NUMBERS)
def test_what_is_no_number_is_one_sentence(own, capsys, what):
    value = NO_NUMBERS[what]
    whole = read_own(own)
    for change in ({"duration": value}, {"fps": value},
                   {"annotations": [{"label": "A", "segment": [1.0, value]}]}):
        rewrite(own, {"database": whole | {"v3": whole["v3"] | change}})
        refusal(check(own), capsys, "own.json", "video v3", "number")
    rewrite(own, {"database": whole})
    results = perfect(own, TESTED)
    results["v12"][0]["score"] = value
    refusal(predict(own, results), capsys, "pred.json", "video v12", "number")
    results = perfect(own, TESTED)
    results["v12"][0]["segment"] = [value, 3]
    refusal(predict(own, results), capsys, "pred.json", "video v12", "number")


def test_a_number_of_5000_digits_is_one_sentence(own, capsys):
    text = (own / "own.json").read_text().replace("32.5", "3" * 5000, 1)
    (own / "own.json").write_text(text)
    refusal(check(own), capsys, "own.json")


# ---- A. Other forms of annotations --------------------------------------------------------------

def bare(database):
    """As BSN has it: no "database"."""
    return database


def with_duration_second(database):
    for entry in database.values():
        entry["duration_second"] = entry.pop("duration")
    return {"database": database}


def with_extra_fields(database):
    for entry in database.values():
        entry |= {"url": "https://x", "resolution": "320x240", "taxonomy": [], "frames": None}
        for a in entry["annotations"]:
            a |= {"segment(frames)": [1, 2], "verb": None, "noun_class": 7}
    return {"version": "1.3", "taxonomy": [{"nodeId": 1}], "database": database}


def with_null_fields(database):
    for entry in database.values():
        entry |= {"duration_second": None, "frame_rate": None, "url": None}
        for a in entry["annotations"]:
            a["label_id"] = None
    return {"database": database, "version": None}


def perfect_from(dataset):
    """Predictions equal to a Dataset's ground truth."""
    return {name: [{"label": label, "segment": segment, "score": 1}
                   for label, segment in zip(a.labels, a.segments.tolist())]
            for name, a in dataset.ground_truth.items()}


@pytest.mark.parametrize(
    "form", [bare, with_duration_second, with_extra_fields, with_null_fields])
def test_other_forms_of_annotations(own, form):
    before = everything(own)
    rewrite(own, form(read_own(own)))
    after = everything(own)
    assert instances_of(after) == instances_of(before)
    assert after.classes == before.classes
    assert [v.duration for v in after.test] == [32.5] * 4
    assert score_of(own, predict(own, perfect_from(before))) == pytest.approx(100)


def test_null_duration_and_fps_are_unknown(own):
    def change(database):
        for entry in database.values():
            entry |= {"duration": None, "fps": None}

    before = instances_of(everything(own))
    edit(own, change)
    assert instances_of(everything(own, "--fps", 50)) == before


def test_a_byte_order_mark_is_read_over(own):
    before = instances_of(everything(own))
    results = perfect(own, TESTED)
    argv = predict(own, results)
    mark = b"\xef\xbb\xbf"
    for name in ("own.json", "pred.json"):
        (own / name).write_bytes(mark + (own / name).read_bytes())
    assert instances_of(everything(own)) == before
    assert score_of(own, argv) == pytest.approx(100)
    (own / "s.txt").write_bytes(mark + b"v2\r\nv1\r\n")
    (own / "s.json").write_bytes(mark + b'["v2", "v1"]')
    for name in ("s.txt", "s.json"):
        d = opened(own, "--ratio", 0, "--split", own / name)
        assert [v.id for v in d.labelled] == ["v1", "v2"]


# ---- A. Labels ----------------------------------------------------------------------------------

def test_a_list_of_labels_is_one_instance_a_label(own):
    def change(database):
        for entry in database.values():
            for a in entry["annotations"]:
                a["label"] = [a["label"], "C"]
                a["label_id"] = [{"A": 0, "B": 1}[a["label"][0]], 2]

    edit(own, change)
    d = everything(own)
    assert d.classes == ["A", "B", "C"]
    assert [len(v.labels) for v in d.labelled] == [6] * 10
    first = d.labelled[0]
    assert first.segments[0].tolist() == first.segments[1].tolist()
    assert first.labels.tolist() == [0, 2, 1, 2, 0, 2]
    assert sum(len(a.labels) for a in d.ground_truth.values()) == 24
    results = perfect_from(d)
    assert score_of(own, predict(own, results)) == pytest.approx(100)
    assert len(read_result(own / "out.json")["ap"]) == 3


@pytest.mark.parametrize("label", [[], [["A"]], [None], {"name": "A"}, True, "  ", [""]])
def test_labels_of_no_known_form_are_one_sentence(own, capsys, label):
    edit(own, lambda database: database["v5"]["annotations"][0].update(label=label))
    refusal(check(own), capsys, "own.json", "v5", "label")


def test_ignored_labels_neither_teach_nor_count(own):
    whole = instances_of(everything(own))

    def change(database):
        for entry in database.values():
            entry["annotations"] += [
                {"segment": [1.0, 30.0], "label": "Ambiguous"},
                {"segment": [9.0, 11.0], "label": "un clear "}]

    edit(own, change)
    more = ("--ignore-labels", "Ambiguous, un clear")
    d = everything(own, *more)
    assert d.classes == ["A", "B"]
    assert instances_of(d) == whole
    assert {label for a in d.ground_truth.values() for label in a.labels} == {"A", "B"}
    results = perfect_from(d)
    assert score_of(own, predict(own, results)) < 99
    assert score_of(own, [*predict(own, results), *more]) == pytest.approx(100)
    d = everything(own, "--ignore-labels", "Ambiguous")
    assert "un clear " in d.classes


@pytest.mark.parametrize("twin", ["a", "A ", " A", "A\u00a0", "a\t"])
def test_labels_that_differ_by_case_or_blanks_are_named(own, twin):
    edit(own, lambda database: database["v4"]["annotations"][0].update(label=twin))
    text = "\n".join(everything(own).warnings)
    assert "'A'" in text
    assert data.shown(twin) in text
    assert "differ" in text


# ---- A. Unlabelled videos -----------------------------------------------------------------------

def without_annotations(*names):
    """A change that takes the key "annotations" from these videos."""
    def change(database):
        for name in names:
            del database[name]["annotations"]
    return change


def ids(videos):
    """The ids of videos."""
    return {video.id for video in videos}


@pytest.mark.parametrize("seed", range(3))
def test_an_entry_without_annotations_is_never_drawn_as_labelled(own, seed):
    unlabelled = set(NAMES[2:10])
    edit(own, without_annotations(*unlabelled))
    d = opened(own, "--ratio", 0, "--seed", seed)  # by default all annotated are labelled
    assert ids(d.labelled) == {"v0", "v1"}
    assert ids(d.unlabelled) == unlabelled
    for split in ("uniform", "stratified"):
        thin = opened(own, "--ratio", 0.5, "--seed", seed, "--split", split)
        assert len(thin.labelled) == 1
        assert ids(thin.labelled) < {"v0", "v1"}
        assert len(thin.unlabelled) == 9


def test_a_split_file_may_not_name_an_unlabelled_video(own, capsys):
    edit(own, without_annotations("v7"))
    (own / "s.txt").write_text("v1\nv7\n")
    refusal(check(own, "--ratio", 0, "--split", own / "s.txt"), capsys, "s.txt", "v7", "1 of 2")


def test_an_empty_list_means_truly_none_and_null_means_unknown(own):
    def change(database):
        database["v1"]["annotations"] = []
        database["v2"]["annotations"] = None

    edit(own, change)
    d = opened(own, "--ratio", 0)
    assert "v1" in ids(d.labelled)
    assert ids(d.unlabelled) == {"v2"}
    assert [len(v.labels) for v in d.labelled if v.id == "v1"] == [0]


def test_a_tenth_is_drawn_where_all_are_annotated(own):
    d = opened(own, "--ratio", 0)
    assert (len(d.labelled), len(d.unlabelled)) == (1, 9)


def test_an_unlabelled_subset_is_taken_without_its_labels(own, capsys):
    def change(database):
        for i in range(5, 10):
            database[f"v{i}"]["subset"] = "unlabeled"
            database[f"v{i}"]["annotations"] = [{"segment": [1, 2], "label": "secret"}]

    edit(own, change)
    assert train.main(check(own, "--ratio", 1.0)) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert "5 entries of other subsets" in first
    assert "unlabeled (5)" in first
    d = opened(own, "--ratio", 0, "--unlabelled-subset", "Unlabeled", "--audit")
    assert ids(d.labelled) == set(NAMES[:5])
    assert ids(d.unlabelled) == set(NAMES[5:10])
    assert d.classes == ["A", "B"]
    assert d.hidden == {}
    refusal(check(own, "--unlabelled-subset", "none such"), capsys, "none such", "unlabeled (5)")


def test_feature_files_without_an_entry(own, capsys):
    more = own / "more/deep"
    more.mkdir(parents=True)
    for name in ("w1", "w2"):
        shutil.copy(own / "features/v1.npy", more / f"{name}.npy")
    shutil.copy(own / "features/v1.npy", own / "features/loose.npy")
    assert train.main(check(own)) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert "1 feature files without an entry" in first
    assert "loose" in first
    d = opened(own, "--ratio", 0, "--unlabelled-features", own / "more")
    assert ids(d.labelled) == set(NAMES[:10])
    assert ids(d.unlabelled) == {"deep/w1", "deep/w2"}
    d = opened(own, "--ratio", 0, "--unlabelled-features", own / "features")
    assert ids(d.unlabelled) == {"loose"}
    assert train.main(check(own, "--ratio", 0, "--unlabelled-features", own / "features")) == 0
    assert "10 labelled, 1 unlabelled" in capsys.readouterr().out.splitlines()[0]
    (own / "empty").mkdir()
    refusal(check(own, "--unlabelled-features", own / "empty"), capsys, "--unlabelled-features")


def test_a_file_with_annotated_videos_alone_trains_on_the_loose_files(own):
    def change(database):
        for name in NAMES[3:10]:
            del database[name]

    edit(own, change)
    argv = own_argv(own, "--ratio", 0, "--unlabelled-features", own / "features", *LOWEST)
    assert train.main(argv) == 0
    split = read_result(own / "run/split.json")
    assert split["labelled"] == NAMES[:3]
    assert split["unlabelled"] == NAMES[3:10]
    assert set(read_result(own / "run/pseudo_labels.json")) == set(NAMES[3:10])


# ---- A. Ids -------------------------------------------------------------------------------------

def rename(own, name, new, file=None):
    """Give a video another id, and its feature file another name."""
    edit(own, lambda database: database.update({new: database.pop(name)}))
    path = own / f"features/{new if file is None else file}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    (own / f"features/{name}.npy").rename(path)


def test_a_split_file_has_one_id_a_line(own):
    rename(own, "v1", "my first video (1)")
    rename(own, "v2", "P01/P01_02")
    (own / "s.txt").write_text("my first video (1)\r\n\r\n  P01/P01_02  \n")
    d = opened(own, "--ratio", 0, "--split", own / "s.txt")
    assert ids(d.labelled) == {"my first video (1)", "P01/P01_02"}


@pytest.mark.parametrize("name", ["P01/P01_02", "a/b/c d", "ä/ö", "x.y/z.mp4", "-o"])
def test_ids_may_name_folders(own, name):
    rename(own, "v3", name)
    d = everything(own)
    assert name in ids(d.labelled)


def test_ids_with_folders_and_a_prefix(own):
    for i, name in enumerate(NAMES):
        rename(own, name, f"day{i % 2}/{name}", file=f"day{i % 2}/feat_{name}")
    assert len(everything(own, "--prefix", "feat_").labelled) == 10


@pytest.mark.parametrize("prefix", ["v_", "video_", "rgb-"])
def test_a_prefix_that_all_files_have_is_named(own, capsys, prefix):
    for path in sorted((own / "features").glob("*.npy")):
        path.rename(path.with_name(prefix + path.name))
    refusal(check(own), capsys, f"--prefix {prefix}", "14")
    assert len(everything(own, "--prefix", prefix).labelled) == 10


def test_a_prefix_that_all_ids_have_is_named(own, capsys):
    for name in NAMES:
        rename(own, name, f"v_{name}", file=name)
    refusal(check(own), capsys, "prefix", "v_")


# ---- A. Feature files ---------------------------------------------------------------------------

def write_unnamed(path, x):
    np.savez_compressed(path, x)


def write_pt_dict(path, x):
    torch.save({"feats": torch.from_numpy(x), "fps": 25, "id": path.stem}, path)


def write_pt_learnt(path, x):
    torch.save(torch.nn.Parameter(torch.from_numpy(x)), path)


def write_headed_csv(path, x):
    head = ",".join(f"f{i}" for i in range(x.shape[1]))
    np.savetxt(path, x, delimiter=",", header=head, comments="", fmt="%.9g")


def write_numbered_csv(path, x):
    head = ",".join(str(i) for i in range(x.shape[1]))
    np.savetxt(path, x, delimiter=",", header=head, comments="", fmt="%.9g")


def write_headless_csv(path, x):
    np.savetxt(path, x, delimiter=",", fmt="%.9g", newline="\r\n")


def write_marked_csv(path, x):
    write_headless_csv(path, x)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


@pytest.mark.parametrize("write", [
    write_npz, write_unnamed, write_pt, write_pt_dict, write_pt_learnt, write_headed_csv,
    write_numbered_csv, write_headless_csv, write_marked_csv])
def test_features_in_other_kinds_of_files(own, write):
    s = settings(*own_argv(own, "--ratio", 1.0, "--stage", "supervised"))
    before = data.load_dataset(s)
    a = data.load_item(before.labelled[4], before, s)["feats"]
    kind = write.__name__.split("_")[-1]
    extension = {"unnamed": ".npz", "dict": ".pt", "learnt": ".pt"}.get(kind, f".{kind}")
    convert(own, extension, write)
    s = settings(*own_argv(own, "--ratio", 1.0, "--stage", "supervised", "--extension", extension))
    after = data.load_dataset(s)
    assert torch.allclose(after.mean, before.mean)
    assert torch.allclose(after.std, before.std)
    b = data.load_item(after.labelled[4], after, s)["feats"]
    assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("dtype", ["<f2", ">f4", "<f8", ">f8", "i1", "<u2", ">i8"])
def test_real_dtypes_are_read(own, dtype):
    for path in (own / "features").glob("*.npy"):
        x = np.abs(np.round(np.load(path)))
        np.save(path, np.asfortranarray(x.astype(dtype)))
    s = settings(*own_argv(own))
    d = data.load_dataset(s)
    item = data.load_item(d.labelled[0], d, s)
    assert item["feats"].isfinite().all()
    x = np.stack([np.load(own / f"features/v{i}.npy") for i in range(10)]).astype(np.float64)
    assert d.mean.numpy() == pytest.approx(x.mean((0, 1)), abs=1e-5)


def test_one_transposed_file_is_called_so(own, capsys):
    path = own / "features/v6.npy"
    np.save(path, np.zeros((5, 70)))
    refusal(check(own), capsys, "v6", "transposed")


def test_transposed_files_everywhere_are_called_so(own, capsys):
    for path in (own / "features").glob("*.npy"):
        np.save(path, np.load(path).T)
    refusal(check(own), capsys, "transposed")


def test_transposed_files_are_called_so_in_evaluation(trained, capsys):
    for name in TESTED:
        path = trained / f"features/{name}.npy"
        np.save(path, np.load(path).T)
    refusal(evaluating(trained), capsys, "transposed", "4 videos")


@pytest.mark.parametrize("content", [
    "1;2;3\n4;5;6\n", "a,b\n1,x\n", "1,2\n3\n", "", "\n\n", "f0,f1\n", "\x00\x01\n",
    "1,nan\n2,3\n"])
def test_bad_csv_files_are_one_sentence(own, capsys, content):
    convert(own, ".csv", write_headed_csv)
    (own / "features/v8.csv").write_text(content)
    refusal(check(own, "--extension", ".csv"), capsys, "v8")


# ---- A. Features of a fixed number a video ------------------------------------------------------

def test_stride_0_cuts_each_video_into_its_features(own):
    lengths = {name: 20.0 + i for i, name in enumerate(NAMES)}
    rng = np.random.default_rng(0)
    for name in NAMES:
        np.save(own / f"features/{name}.npy", rng.normal(size=(40, 5)))

    def change(database):
        for name, entry in database.items():
            entry["duration"] = lengths[name]
            del entry["fps"]
            entry["annotations"] = [{"segment": [2.0, 12.0], "label": "AB"[len(name) % 2]}]

    edit(own, change)
    d = everything(own, "--stride", 0, "--frames", 1)
    assert d.warnings == [] or "grid" not in d.warnings[0]
    for video in d.labelled:
        a_step = lengths[video.id] / 40
        expected = [2.0 / a_step - 0.5, 12.0 / a_step - 0.5]
        assert video.segments[0].tolist() == pytest.approx(expected, abs=1e-4)
        assert video.in_seconds(video.segments)[0].tolist() == pytest.approx([2, 12], abs=1e-4)
        assert video.grid.to_seconds(39.5) == pytest.approx(lengths[video.id])


def test_stride_0_needs_durations(own, capsys):
    edit(own, lambda database: database["v2"].pop("duration"))
    refusal(check(own, "--stride", 0), capsys, "v2", "duration", "--stride 0")


# ---- A. Missing feature files -------------------------------------------------------------------

def test_missing_feature_files_are_counted_and_five_named(own, capsys):
    gone = [*NAMES[:6], "v12"]
    for name in gone:
        (own / f"features/{name}.npy").unlink()
    text = refusal(check(own), capsys, "7", "--missing skip")
    for name in NAMES[:5]:
        assert re.search(rf"\b{name}\b", text)
    assert "2 more" in text
    assert train.main(check(own, "--missing", "skip")) == 0
    shown = capsys.readouterr()
    assert "7 videos" in shown.err
    assert "unlabelled, 3 test videos" in shown.out
    d = everything(own, "--missing", "skip")
    assert ids(d.labelled) == set(NAMES[6:10])
    assert ids(d.test) == set(d.ground_truth) == {"v10", "v11", "v13"}


def test_missing_feature_files_of_all_videos_are_refused(own, capsys):
    refusal(check(own, "--features", own / "none", "--missing", "skip"), capsys, "none")


def test_evaluation_leaves_missing_videos_out_too(own, capsys):
    (own / "features/v12.npy").unlink()
    assert train.main(own_argv(own, *SUPERVISED, "--missing", "skip")) == 0
    assert read_result(own / "run/metrics.json")["videos"] == 3
    capsys.readouterr()
    (own / "features/v11.npy").unlink()
    assert evaluated("--checkpoint", own / "run", "--json", own / "out.json") == 0
    assert read_result(own / "out.json")["videos"] == 2
    assert "2 videos are left out" in capsys.readouterr().err


def test_what_evaluation_advises_for_missing_videos_can_be_done(trained, capsys):
    (trained / "features/v12.npy").unlink()
    text = refusal(evaluating(trained), capsys, "v12", "not found")
    advised = re.search(r"--missing skip", text)
    more = ["--missing", "skip"] if advised else []
    try:
        code = evaluated(*evaluating(trained, *more)[1:])
    except SystemExit as error:
        code = error.code
    assert advised
    assert code == 0


# ---- A. No test set, test videos without labels -------------------------------------------------

def test_a_run_without_a_test_set(own, capsys):
    def change(database):
        for name in TESTED:
            del database[name]

    edit(own, change)
    assert train.main(check(own)) == 0
    assert "no test videos, so no mAP" in capsys.readouterr().err
    refusal(check(own, "--train-subset", "other"), capsys, "--test-subset", "none")
    argv = own_argv(own, *SUPERVISED, "--test-subset", "none")
    assert train.main(argv) == 0
    assert (own / "run/checkpoint.pt").exists()
    assert not (own / "run/metrics.json").exists()
    assert (own / "run/pseudo_labels.json").exists()
    refusal(["evaluate", "--checkpoint", own / "run"], capsys, "--subset")


def test_a_file_without_any_subset_needs_no_test_set(own):
    def change(database):
        for entry in database.values():
            del entry["subset"]

    edit(own, change)
    d = everything(own, "--test-subset", "none")
    assert (len(d.labelled), len(d.test)) == (14, 0)


def test_test_videos_without_labels_are_predicted_and_not_judged(own, capsys):
    edit(own, without_annotations(*TESTED))
    assert train.main(own_argv(own, *SUPERVISED)) == 0
    shown = capsys.readouterr()
    assert set(read_result(own / "run/predictions.json")["results"]) == set(TESTED)
    assert not (own / "run/metrics.json").exists()
    assert "mAP" in shown.out + shown.err
    assert evaluated("--checkpoint", own / "run") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert "mAP" in last


def test_test_videos_partly_with_labels(own, capsys):
    edit(own, without_annotations("v10", "v13"))
    assert train.main(own_argv(own, *SUPERVISED)) == 0
    assert set(read_result(own / "run/predictions.json")["results"]) == set(TESTED)
    assert read_result(own / "run/metrics.json")["videos"] == 2
    assert "2 of 4 test videos have no annotations" in capsys.readouterr().err


# ---- A. Predictions -----------------------------------------------------------------------------

def test_unknown_labels_of_predictions_are_left_out_and_counted(own, capsys):
    results = perfect(own, TESTED)
    results["v10"].append({"label": "fly", "segment": [1, 2], "score": 1})
    results["v11"].append({"label": "a", "segment": [1, 2], "score": 1})
    assert score_of(own, predict(own, results)) == pytest.approx(100)
    err = capsys.readouterr().err
    assert "2 of 14 predictions" in err
    assert "fly" in err


def test_predicted_videos_that_the_ground_truth_lacks_are_counted(own, capsys):
    results = perfect(own, TESTED[:3]) | {"v_v13": [], "other": []}
    assert score_of(own, predict(own, results)) < 100
    err = capsys.readouterr().err
    assert "2 of 5 predicted videos are not in the ground truth" in err
    assert "1 of its 4 videos have no prediction" in err
    assert "v13" in err


@pytest.mark.parametrize("rule", ["v_{}", "{}.mp4", "x/{}"])
def test_predictions_of_which_no_id_matches_are_refused(own, capsys, rule):
    results = {rule.format(name): found for name, found in perfect(own, TESTED).items()}
    refusal(predict(own, results), capsys, "none of the 4", rule.format("v10"), "v0")


def test_the_subset_is_by_default_that_of_the_predictions(own, capsys):
    assert score_of(own, predict(own, perfect(own, TESTED))) == pytest.approx(100)
    assert "validation" in capsys.readouterr().out
    assert score_of(own, predict(own, perfect(own, NAMES[:10]))) == pytest.approx(100)
    assert "training" in capsys.readouterr().out


def test_a_wrong_subset_lists_those_there_are(own, capsys):
    argv = predict(own, perfect(own, TESTED))
    refusal([*argv, "--subset", "test"], capsys, "'test'", "Training (10)", "validation (4)")


# ---- A. Thresholds, 0 / 0, runs that moved ------------------------------------------------------

@pytest.mark.parametrize("text", [
    "0.5:0.9:0.15", "0.3:0.7:0.3", "0.7:0.3:0.1", "0.1:0.5:-0.1", "0.1:0.9:nan", "0.1:nan:0.1",
    "0.1:inf:0.1", "0.1:0.9:1e-9", "0.1:0.5:0.1:0.1", "0.5,,0.7", "nan", "-0.5,0.5", ":::", "0.5:"])
def test_threshold_ranges_that_do_not_fit(own, capsys, text):
    argv = predict(own, perfect(own, TESTED))
    refusal([*argv, f"--tiou={text}"], capsys, "--tiou")
    refusal(check(own, f"--tiou={text}"), capsys, "--tiou")


@pytest.mark.parametrize(("text", "expected"), [
    ("0.5:0.95:0.15", [0.5, 0.65, 0.8, 0.95]), ("0.1:0.7:0.2", [0.1, 0.3, 0.5, 0.7]),
    ("0.5:0.5:0.1", [0.5]), ("0.1:1:0.3", [0.1, 0.4, 0.7, 1.0])])
def test_threshold_ranges_that_fit(text, expected):
    assert evaluate.parse_tious(text) == pytest.approx(expected)


@pytest.mark.parametrize("place", [5.0, 0.0, 9.0])
def test_zero_by_zero_is_a_hit_as_in_the_toolkit(place):
    truth = {"v": data.Annotation("test", 9.0, 1.0, np.array([[5.0, 5.0]]), ["a"])}
    found = {"v": [{"label": "a", "score": 0.5, "segment": [place, place]}]}
    metrics = evaluate.mean_average_precision(truth, found, [0.3, 0.7])
    assert metrics["mAP"] == [1.0, 1.0]


def test_a_detection_of_no_length_misses_an_instance_with_one():
    truth = {"v": data.Annotation("test", 9.0, 1.0, np.array([[4.0, 6.0]]), ["a"])}
    found = {"v": [{"label": "a", "score": 0.5, "segment": [5.0, 5.0]}]}
    assert evaluate.mean_average_precision(truth, found, [0.3])["mAP"] == [0.0]


def test_detections_of_no_length_are_never_exported():
    video = data.Video("v", None, "", data.Grid(1.0, 1.0, 1.0), 30, 10.0, False)
    segments = torch.tensor([[2.0, 4.0], [9.5, 20.0], [12.0, 20.0], [-9.0, -3.0]])
    detections = {
        "segments": segments,
        "labels": torch.zeros(4, dtype=torch.long),
        "scores": torch.ones(4),
        "p_cls": torch.ones(4),
        "p_tiou": torch.ones(4),
        "p_tnd": torch.ones(4),
        "similarity": torch.ones(4),
        "status": torch.zeros(4, dtype=torch.long),
    }
    found = evaluate.export([video], {"v": detections}, ["a"])["results"]["v"]
    assert [d["segment"] for d in found] == [[2.5, 4.5]]
    pseudo = evaluate.export_pseudo_labels([video], {"v": detections}, ["a"], ["kept"])["v"]
    assert [d["segment"] for d in pseudo] == [[2.5, 4.5]]


def test_a_run_that_moved_is_evaluated_without_its_training_videos(trained, capsys):
    for name in NAMES[:10]:
        (trained / f"features/{name}.npy").unlink()
    (trained / "features").rename(trained / "feats")
    argv = ("--checkpoint", trained / "run/checkpoint.pt", "--dataset", trained / "own.json",
            "--features", trained / "feats", "--json", trained / "out.json")
    assert evaluated(*argv) == 0
    expected = read_result(trained / "run/metrics.json")
    assert read_result(trained / "out.json")["ap"] == expected["ap"]


def test_a_run_that_moved_is_resumed(own, monkeypatch):
    assert train.main(own_argv(own, *LOWEST)) == 0
    whole = weights(own / "run")
    assert train.main(own_argv(own, "--stage", "pretrain", "--out", own / "part")) == 0
    moved = own / "elsewhere"
    moved.mkdir()
    for name in ("part", "own.json", "features"):
        (own / name).rename(moved / name)
    monkeypatch.chdir(moved)
    argv = ["--resume", "part", "--dataset", "own.json", "--features", "features", "--stage",
            "all", "--theta-l", "0"]
    assert train.main(argv) == 0
    assert same(weights(moved / "part"), whole)
    assert evaluated("--checkpoint", "part") == 0  # which knows the new places now


def test_a_published_dataset_that_moved_is_evaluated_by_its_root(tmp_path):
    root = tmp_path / "a"
    root.mkdir()
    write_published(root, "thumos")
    argv = ("--dataset", "thumos", "--root", root, "--ratio", 0.5, "--out", tmp_path / "run",
            *TINY, *SUPERVISED)
    assert train.main([str(word) for word in argv]) == 0
    root.rename(tmp_path / "b")
    argv = ("--checkpoint", tmp_path / "run", "--root", tmp_path / "b")
    assert evaluated(*argv, "--json", tmp_path / "out.json") == 0
    assert read_result(tmp_path / "out.json")["ap"] == read_result(tmp_path / "run/metrics.json")[
        "ap"]


# ---- B. The time axis ---------------------------------------------------------------------------

def test_an_fps_off_by_20_percent_is_a_warning_repeated_at_the_end(own, capsys):
    assert train.main(own_argv(own, *SUPERVISED, "--fps", 60)) == 0
    shown = capsys.readouterr()
    warnings = [line for line in shown.err.splitlines() if "span" in line]
    assert len(warnings) == 2
    for line in warnings:
        assert line.startswith("warning: ")
        assert "14 videos" in line
        assert re.search(r"--stride (30|29|31)", line)


@pytest.mark.parametrize("more", [
    ("--stride", 50),
    ("--stride", 12.5),
    ("--stride", 5),
    ("--stride", 2500),
    ("--fps", 25),
    ("--fps", 100),
    ("--fps", 1),
    ("--fps", 0.001),
])
def test_a_time_axis_off_by_half_is_an_error(own, capsys, more):
    refusal(check(own, *more), capsys, "span", "14 videos", "--trust-grid", "--stride")
    assert train.main(check(own, *more, "--trust-grid")) in (0, 2)
    assert "--trust-grid" not in capsys.readouterr().err


def test_trust_grid_goes_on_with_a_warning(own, capsys):
    assert train.main(check(own, "--stride", 50, "--trust-grid")) == 0
    assert "span" in capsys.readouterr().err


def test_a_single_odd_video_does_not_decide_about_the_time_axis(own, capsys):
    np.save(own / "features/v4.npy", np.ones((300, 5)))
    assert train.main(check(own)) == 0
    err = capsys.readouterr().err
    assert "v4" in err
    assert "error" not in err


def test_a_time_axis_off_by_less_than_a_window_is_silent(own):
    def change(database):
        for i, entry in enumerate(database.values()):
            entry["duration"] = 32.5 + 0.1 * (i % 9)

    edit(own, change)
    assert opened(own).warnings == []


def test_the_time_axis_is_compared_in_evaluation_too(trained, capsys):
    def change(database):
        for name in TESTED:
            database[name]["fps"] = 62

    edit(trained, change)
    assert evaluated(*evaluating(trained)[1:]) == 0
    assert "4 videos" in capsys.readouterr().err


# ---- B. Nothing to learn ------------------------------------------------------------------------

def every_segment(start, end):
    """A change of all segments of the training videos."""
    def change(database):
        for name in NAMES[:10]:
            for a in database[name]["annotations"]:
                a["segment"] = [start, end]
    return change


def no_instance(database):
    """A change: nothing happens in any training video."""
    for name in NAMES[:10]:
        database[name]["annotations"] = []


def features_end_before(database):
    """A change: what happens does so after the features end."""
    for name in NAMES:
        database[name]["duration"] = 100.0
        for a in database[name]["annotations"]:
            a["segment"] = [60.0, 70.0]


@pytest.mark.parametrize(("change", "more"), [
    (every_segment(9.0, 3.0), ("--bad-segments", "skip")),
    (every_segment(50.0, 90.0), ("--bad-segments", "skip")),
    (every_segment(8.1, 8.2), ()),
    (features_end_before, ("--trust-grid",)),
    (no_instance, ()),
])
def test_nothing_to_learn_is_an_error(own, capsys, change, more):
    edit(own, change)
    refusal(check(own, *more), capsys, "own.json", "nothing to learn")


@pytest.mark.parametrize("more", [("--ranges", "900:999,900:999,900:999"), ("--radius", 1e-9)])
def test_settings_that_leave_no_positive_are_an_error(own, capsys, more):
    refusal(check(own, *more), capsys, "learn")


def test_instances_without_a_grid_step_are_counted(own, capsys):
    def change(database):
        for name in NAMES[:4]:
            database[name]["annotations"][0]["segment"] = [8.1, 8.2]

    edit(own, change)
    assert train.main(check(own, "--ratio", 1.0, "--stage", "supervised")) == 0
    assert "4 of 30 labelled instances hold no grid step" in capsys.readouterr().err


def test_no_pseudo_label_at_all_is_a_warning_with_the_best_score(own, capsys):
    more = ("--theta-l", 0.999, "--joint-epochs", 1, "--pretrain-epochs", 0)
    assert train.main(own_argv(own, *more)) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "no pseudo label" in line]
    assert len(lines) == 2  # now, and at the end
    for line in lines:
        assert line.startswith("warning: ")
        assert "0.999" in line
        score = re.search(r"best score(?: seen)?(?: is)? ([0-9.e-]+)", line)
        assert score
        assert 0 <= float(score[1]) < 0.999


# ---- B. One error at a time ---------------------------------------------------------------------

def test_bad_segments_of_many_videos_are_counted(own, capsys):
    def change(database):
        for name in NAMES[1:8]:
            database[name]["annotations"][1]["segment"] = [20.0, 12.0]
        database["v1"]["annotations"][2]["segment"] = [90.0, 95.0]

    edit(own, change)
    text = refusal(check(own), capsys, "[20.0, 12.0]", "1 more", "7 videos", "2 more")
    for name in NAMES[1:6]:
        assert re.search(rf"\b{name}\b", text)


@pytest.mark.parametrize("change", [
    {"duration": "long"}, {"annotations": 3}, {"fps": -1}, {"subset": ["x"]},
    {"annotations": [{"segment": [1]}]}])
def test_bad_entries_are_counted(own, capsys, change):
    def spoil(database):
        for name in NAMES[2:9]:
            database[name] |= change

    edit(own, spoil)
    refusal(check(own), capsys, "7 videos", "v2, v3, v4, v5, v6", "2 more")


def test_bad_feature_files_are_counted(own, capsys):
    np.save(own / "features/v1.npy", np.full((64, 5), np.nan))
    np.save(own / "features/v3.npy", np.zeros((64, 4)))
    np.save(own / "features/v5.npy", np.zeros(64))
    (own / "features/v12.npy").write_bytes(b"nothing")
    refusal(check(own), capsys, "4 videos", "v1, v3, v5, v12")


def test_bad_predictions_are_counted(own, capsys):
    results = perfect(own, TESTED)
    for name in ("v10", "v11", "v13"):
        results[name][0]["score"] = "high"
    refusal(predict(own, results), capsys, "3 videos", "v10", "v11", "v13")


# ---- B. Odd files -------------------------------------------------------------------------------

@pytest.mark.parametrize(("text", "key"), [
    ('{"database": {"v1": {"subset": "training"}, "v1": {"subset": "training"}}}', "v1"),
    ('{"database": {}, "database": {}}', "database"),
    ('{"database": {"v1": {"subset": "training", "fps": 1, "fps": 2}}}', "fps"),
])
def test_duplicate_keys_are_named(own, capsys, text, key):
    (own / "own.json").write_text(text)
    refusal(check(own), capsys, "own.json", key, "twice")


def test_duplicate_ids_of_predictions_are_named(own, capsys):
    argv = predict(own, {})
    (own / "pred.json").write_text('{"results": {"v10": [], "v11": [], "v10": []}}')
    refusal(argv, capsys, "pred.json", "v10", "twice")


def test_a_null_subset_is_told(own, capsys):
    edit(own, lambda database: database["v3"].update(subset=None))
    assert train.main(check(own)) == 0
    assert "1 entries of other subsets: none (1)" in capsys.readouterr().out

    def change(database):
        for entry in database.values():
            entry["subset"] = None

    edit(own, change)
    refusal(check(own), capsys, "subset", "none (14)")
    edit(own, lambda database: database["v3"].update(subset=3))
    refusal(check(own), capsys, "v3", "subset")


def test_the_same_subset_for_training_and_test_is_told(own, capsys):
    assert train.main(check(own, "--test-subset", "TRAINING")) == 0
    assert "10 test videos are training videos too" in capsys.readouterr().err


def test_a_split_file_beside_a_ratio_is_told(own, capsys):
    (own / "s.txt").write_text("v1\n")
    refusal(check(own, "--split", own / "s.txt"), capsys, "s.txt", "--ratio")


@pytest.mark.parametrize(("factor", "unit"), [(50, "frames"), (1e3, "milli"), (1e6, "micro")])
def test_segments_in_another_unit_are_told(own, capsys, factor, unit):
    def change(database):
        for entry in database.values():
            for a in entry["annotations"]:
                a["segment"] = [t * factor for t in a["segment"]]

    edit(own, change)
    refusal(check(own), capsys, unit, "seconds")


@pytest.mark.parametrize("dtype", [
    "c8", "c16", "m8[s]", "M8[s]", "?", "S4", "U4", "V8", [("a", "<f4")]])
def test_dtypes_that_are_no_real_numbers_are_refused(own, capsys, dtype):
    np.save(own / "features/v6.npy", np.zeros((64, 5), dtype=dtype))
    refusal(check(own), capsys, "v6", "real numbers")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool, torch.complex128])
def test_tensors_that_are_no_real_numbers_are_refused(own, capsys, dtype):
    convert(own, ".pt", write_pt)
    torch.save(torch.zeros((64, 5), dtype=dtype), own / "features/v6.pt")
    refusal(check(own, "--extension", ".pt"), capsys, "v6", "real numbers")


@pytest.mark.parametrize("value", [1e300, -1e39, 3.5e38, np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("name", ["v2", "v13"])
def test_values_beyond_float32_are_named(own, capsys, value, name):
    path = own / f"features/{name}.npy"
    x = np.load(path).astype(np.float64)
    x[41, 3] = value
    np.save(path, x)
    refusal(check(own), capsys, name, "step 41")


def test_values_beyond_float32_once_standardised_are_named(own):
    for name in NAMES[:10]:
        path = own / f"features/{name}.npy"
        x = np.load(path)
        x[:, 3] = -3e38
        np.save(path, x)
    path = own / "features/v11.npy"
    x = np.load(path)
    x[:, 3] = -3e38
    x[23, 3] = 3e38
    np.save(path, x)
    s = settings(*own_argv(own))
    with pytest.raises(data.BadInput, match="v11.*step 23"):
        d = data.load_dataset(s)
        for video in d.test:
            data.load_item(video, d, s)


def test_outputs_that_are_not_finite_are_told():
    d = data.load_dataset(settings())
    for part, value in (("cls_out", math.nan), ("reg_out", math.inf)):
        detector = small_detector(len(d.classes), d.dim)
        getattr(detector, part).bias.data.fill_(value)
        with pytest.raises(data.BadInput, match=d.test[0].id):
            evaluate.detect(detector, d.test[:1], d, settings())


@pytest.mark.parametrize("offset", [1e9, -3e11])
def test_the_variance_of_features_far_from_0_does_not_cancel(own, offset):
    expected = everything(own).std
    for path in (own / "features").glob("*.npy"):
        np.save(path, np.load(path).astype(np.float64) + offset)
    d = everything(own)
    assert d.mean.numpy() == pytest.approx(np.full(5, offset), rel=1e-6)
    assert d.std.numpy() == pytest.approx(expected.numpy(), rel=1e-3)


def test_float64_features_far_from_0_reach_the_network_unharmed(own):
    s = settings(*own_argv(own))
    d = data.load_dataset(s)
    expected = data.load_item(d.labelled[0], d, s)["feats"]
    for path in (own / "features").glob("*.npy"):
        np.save(path, np.load(path).astype(np.float64) + 1e9)
    d = data.load_dataset(s)
    found = data.load_item(d.labelled[0], d, s)["feats"]
    assert torch.allclose(found, expected, atol=1e-3)


# ---- C. Checkpoints -----------------------------------------------------------------------------

def setting_of(name, value):
    """A change of a checkpoint's setting."""
    def change(content):
        content["settings"][name] = value
    return change


def part_of(name, value):
    """A change of a part of a checkpoint."""
    def change(content):
        content[name] = value
    return change


def weight_of(part, change):
    """A change of the first matrix of a state dict: change(tensor) -> another."""
    def spoil(content):
        name = next(key for key, x in content[part].items() if x.ndim > 1)
        content[part][name] = change(content[part][name])
    return spoil


def nan_weights(x):
    x = x.clone()
    x.view(-1)[3] = math.nan
    return x


def std_with(value):
    """A change of one number of a checkpoint's std."""
    def change(content):
        content["std"][2] = value
    return change


BAD_CHECKPOINTS = {
    "channels as text": setting_of("channels", "16"),
    "channels as bool": setting_of("channels", True),
    "channels as float": setting_of("channels", 16.0),
    "heads 0": setting_of("heads", 0),
    "stem huge": setting_of("stem", 10 ** 12),
    "batch 0": setting_of("batch", 0),
    "batch as None": setting_of("batch", None),
    "min_score nan": setting_of("min_score", math.nan),
    "tiou as a list": setting_of("tiou", [0.5]),
    "tiou of no sense": setting_of("tiou", "0.5:0.9:0.15"),
    "windows as a list": setting_of("windows", [5, 5, 5]),
    "windows of no sense": setting_of("windows", "5,x,5"),
    "fps inf": setting_of("fps", math.inf),
    "features as a number": setting_of("features", 3),
    "weights unknown": setting_of("weights", "best"),
    "settings as a list": part_of("settings", []),
    "no classes": part_of("classes", None),
    "classes as numbers": part_of("classes", [1, 2]),
    "classes twice the same": part_of("classes", ["A", "A"]),
    "classes too many": part_of("classes", ["A", "B", "C"]),
    "std 0": std_with(0.0),
    "std negative": std_with(-1.0),
    "std nan": std_with(math.nan),
    "std inf": std_with(math.inf),
    "mean as a list": part_of("mean", [0.0] * 5),
    "mean of two dimensions": part_of("mean", torch.zeros(5, 1)),
    "mean of another width": part_of("mean", torch.zeros(6)),
    "mean whole": part_of("mean", torch.zeros(5, dtype=torch.long)),
    "mean of a petabyte": part_of("mean", torch.zeros(1).expand(10 ** 15)),
    "ema none": part_of("ema", None),
    "ema lacks": part_of("ema", {}),
    "nan weights": weight_of("ema", nan_weights),
    "inf weights": weight_of("detector", torch.Tensor.log),
    "float64 weights": weight_of("ema", torch.Tensor.double),
    "bool weights": weight_of("ema", torch.Tensor.bool),
    "transposed weights": weight_of("ema", lambda x: x.transpose(-1, -2)[..., :-1]),
    "sparse weights": weight_of("detector", torch.Tensor.to_sparse),
    "weights as a list": weight_of("ema", torch.Tensor.tolist),
}


@pytest.mark.parametrize("fault", BAD_CHECKPOINTS)
def test_a_checkpoint_with_wrong_content_is_refused(trained, capsys, fault):
    path = trained / "run/checkpoint.pt"
    content = copy.deepcopy(torch.load(path, weights_only=True))
    if fault == "inf weights":
        content["detector"] = {key: x.abs() * 0 if x.ndim > 1 else x
                               for key, x in content["detector"].items()}
    BAD_CHECKPOINTS[fault](content)
    torch.save(content, path)
    refusal(evaluating(trained), capsys, "checkpoint")
    refusal(resumed(trained), capsys, "checkpoint")


def optimizer_state(part, key, value):
    """A change of the state of an optimizer's first parameter."""
    def change(content):
        state = content[part]["state"][0]
        state[key] = value(state[key])
    return change


def lr_of(value):
    """A change of an optimizer's learning rate."""
    def change(content):
        content["optimizer"]["param_groups"][0]["lr"] = value
    return change


def first_record(key, value):
    """A change of the pseudo labels of a video."""
    def change(content):
        record = next(r for r in content["pseudo"].values() if len(r["labels"]))
        record[key] = value(record[key])
    return change


def swapped_groups(content):
    """A change: the parameter groups in another order."""
    content["optimizer"]["param_groups"].reverse()


def processes_as_text(content):
    """A change: the number of processes is no number, in the midst of an epoch."""
    content["processes"] = "1"
    content["done"] = 1
    content["rng"] = {"torch": torch.get_rng_state(), "run": torch.Generator().get_state()}


BAD_RUNS = {
    "optimizer of another shape": optimizer_state("optimizer", "exp_avg", lambda x: x[..., :-1]),
    "optimizer of one number": optimizer_state("optimizer", "exp_avg_sq", lambda x: x.view(-1)[0]),
    "optimizer of float64": optimizer_state("optimizer", "exp_avg", torch.Tensor.double),
    "optimizer with nan": optimizer_state("optimizer", "exp_avg_sq", lambda x: x * math.nan),
    "optimizer with a list": optimizer_state("optimizer", "exp_avg", torch.Tensor.tolist),
    "step of many numbers": optimizer_state("optimizer", "step", lambda x: x.expand(7)),
    "step none": optimizer_state("optimizer", "step", lambda x: None),
    "ICD's optimizer": optimizer_state("icd_optimizer", "exp_avg", lambda x: x.flatten()[:3]),
    "lr nan": lr_of(math.nan),
    "lr as text": lr_of("0.1"),
    "groups in another order": swapped_groups,
    "optimizer empty": part_of("optimizer", {}),
    "optimizer none": part_of("optimizer", None),
    "icd none": part_of("icd", None),
    "icd nan": weight_of("icd", nan_weights),
    "t_plus nan": part_of("t_plus", torch.full((2,), math.nan)),
    "t_plus as a number": part_of("t_plus", 100.0),
    "epoch as text": part_of("epoch", "2"),
    "epoch negative": part_of("epoch", -1),
    "stage unknown": part_of("stage", "final"),
    "stage as a list": part_of("stage", ["joint"]),
    "theta_h nan": part_of("theta_h", math.nan),
    "processes as text in the midst of an epoch": processes_as_text,
    "fingerprint none": part_of("fingerprint", None),
    "instances none": part_of("instances", None),
    "pseudo as a list": part_of("pseudo", []),
    "pseudo of other videos": part_of("pseudo", {"x": {}}),
    "pseudo labels out of range": first_record("labels", lambda x: x + 99),
    "pseudo status out of range": first_record("status", lambda x: x - 9),
    "pseudo segments nan": first_record("segments", lambda x: x * math.nan),
    "pseudo segments of another shape": first_record("segments", lambda x: x[:, :1]),
    "pseudo scores of another length": first_record("scores", lambda x: x[1:]),
    "lr setting as text": setting_of("lr", "fast"),
    "epochs setting huge": setting_of("joint_epochs", 10 ** 15),
}


@pytest.mark.parametrize("fault", BAD_RUNS)
def test_a_run_with_wrong_content_is_not_resumed(trained, capsys, fault):
    path = trained / "run/checkpoint.pt"
    content = copy.deepcopy(torch.load(path, weights_only=True))
    BAD_RUNS[fault](content)
    torch.save(content, path)
    refusal(resumed(trained), capsys, "checkpoint")
    argv = own_argv(trained, *LOWEST, "--start", path, "--out", trained / "new")
    refusal(argv, capsys, "checkpoint")
    assert not (trained / "new/checkpoint.pt").exists()


def test_generators_of_a_run_in_the_midst_of_an_epoch_are_checked(trained, capsys):
    path = trained / "run/checkpoint.pt"
    content = torch.load(path, weights_only=True)
    for rng in (None, {}, {"torch": torch.zeros(3, dtype=torch.uint8)}, "abc"):
        torch.save(content | {"done": 1, "epoch": 1, "rng": rng}, path)
        refusal(resumed(trained), capsys, "checkpoint")


def test_flipped_bits_of_a_checkpoint_are_refused(trained, capsys):
    path = trained / "run/checkpoint.pt"
    whole = path.read_bytes()
    draw = random.Random(0)
    with zipfile.ZipFile(path) as archive:
        members = [m for m in archive.infolist() if m.file_size > 100]
    for member in draw.sample(members, 12):
        name, extra = struct.unpack_from("<HH", whole, member.header_offset + 26)
        first = member.header_offset + 30 + name + extra
        spoilt = bytearray(whole)
        spoilt[first + draw.randrange(member.file_size)] ^= 1 << draw.randrange(8)
        path.write_bytes(spoilt)
        refusal(evaluating(trained), capsys, "checkpoint.pt")
        refusal(resumed(trained), capsys, "checkpoint.pt")


def test_a_checkpoint_that_would_execute_something_is_refused_in_our_own_words(trained, capsys):
    torch.save({"a": subprocess.Popen}, trained / "run/checkpoint.pt")
    refusal(evaluating(trained), capsys, "checkpoint.pt", "cannot be read")
    refusal(resumed(trained), capsys, "checkpoint.pt", "cannot be read")


# ---- C. Archives and headers --------------------------------------------------------------------

def npy(shape, dtype="<f4", held=b"\0" * 1280):
    """The bytes of a .npy file whose header says what it likes."""
    file = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + held


def raw_npy(header):
    """The bytes of a .npy file with this text as its header."""
    text = header.encode("latin1")
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + b"\0" * 1280


BAD_ARRAYS = {
    "a terabyte": npy((50_000_000_000, 5)),
    "beyond 64 bits": npy((2 ** 62, 2 ** 62)),
    "negative": npy((-64, 5)),
    "negative twice": npy((-64, -5)),
    "nothing held": npy((64, 5), held=b""),
    "no width": npy((64, 0)),
    "void": npy((64, 5), dtype="|V0"),
    "pickled": npy((64, 5), dtype="|O"),
    "no dict": raw_npy("[1, 2]\n"),
    "no Python": raw_npy("{'descr': \n"),
    "brackets": raw_npy("(" * 9000 + "\n"),
    "long": raw_npy("{" + " " * 60_000 + "}\n"),
    "a call": raw_npy("{'descr': '<f4', 'fortran_order': False, 'shape': tuple([64, 5])}\n"),
    "version 9": b"\x93NUMPY\x09\x00" + b"\0" * 2000,
    "magic alone": b"\x93NUMPY",
}


@pytest.mark.parametrize("fault", BAD_ARRAYS)
def test_arrays_that_lie_are_refused(own, capsys, fault):
    (own / "features/v7.npy").write_bytes(BAD_ARRAYS[fault])
    refusal(check(own), capsys, "v7")


@pytest.mark.parametrize("fault", BAD_ARRAYS)
def test_arrays_that_lie_in_archives_are_refused(own, capsys, fault):
    convert(own, ".npz", write_npz)
    with zipfile.ZipFile(own / "features/v7.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("feats.npy", BAD_ARRAYS[fault])
    refusal(check(own, "--extension", ".npz"), capsys, "v7")


def test_an_archive_that_unpacks_to_more_than_fits_is_refused(own, capsys, monkeypatch):
    convert(own, ".npz", write_npz)
    np.savez_compressed(own / "features/v7.npz", feats=np.zeros((400_000, 5)))
    monkeypatch.setattr(data, "MOST_UNPACKED", 10 ** 7)
    refusal(check(own, "--extension", ".npz"), capsys, "v7", "unpacks")


def patched(path, offset_local, offset_central, value):
    """Change a 16-bit field in all headers of an archive."""
    content = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x03\x04", offset_local), (b"PK\x01\x02", offset_central)):
        at = content.find(mark)
        while at >= 0:
            struct.pack_into("<H", content, at + offset, value)
            at = content.find(mark, at + 4)
    path.write_bytes(content)


def encrypt(path):
    patched(path, 6, 8, 1)


def compress_strangely(path):
    patched(path, 8, 10, 99)


def promise_much(path):
    """The directory promises 4 GB for each member."""
    content = bytearray(path.read_bytes())
    at = content.find(b"PK\x01\x02")
    struct.pack_into("<I", content, at + 24, 2 ** 32 - 2)
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-30])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 8
    path.write_bytes(content)


def of_text(path):
    path.write_text("PK not really")


def without_members(path):
    with zipfile.ZipFile(path, "w"):
        pass


def with_other_members(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("feats", "no array")
        archive.writestr("\x1b[31m.npy", npy((2, 2)))


ARCHIVES = (encrypt, compress_strangely, promise_much, cut, flip, of_text, without_members,
            with_other_members)


@pytest.mark.parametrize("spoil", ARCHIVES)
@pytest.mark.parametrize("extension", [".npz", ".pt"])
def test_archives_that_lie_are_refused(own, capsys, spoil, extension):
    convert(own, extension, write_npz if extension == ".npz" else write_pt)
    spoil(own / f"features/v7{extension}")
    refusal(check(own, "--extension", extension), capsys, "v7")


@pytest.mark.parametrize("spoil", ARCHIVES)
def test_checkpoints_that_lie_as_archives_are_refused(trained, capsys, spoil):
    spoil(trained / "run/checkpoint.pt")
    refusal(evaluating(trained), capsys, "checkpoint.pt")
    refusal(resumed(trained), capsys, "checkpoint.pt")


def test_an_array_beside_a_text_in_an_archive_is_read(own):
    convert(own, ".npz", write_npz)
    with zipfile.ZipFile(own / "features/v7.npz", "a") as archive:
        archive.writestr("readme.txt", "see the paper")
    assert len(everything(own, "--extension", ".npz").labelled) == 10


@pytest.mark.parametrize("content", [
    {"x": 1}, [torch.zeros(64, 5)], "text", 3, None, torch.zeros(1).expand(10 ** 8, 10 ** 8),
    torch.zeros(64, 5).to_sparse(), {"feats": None}, {"feats": {"feats": torch.zeros(64, 5)}}])
def test_tensors_that_are_none_are_refused(own, capsys, content):
    convert(own, ".pt", write_pt)
    torch.save(content, own / "features/v7.pt")
    refusal(check(own, "--extension", ".pt"), capsys, "v7")


def write_npz_pickled(path, x):
    np.savez(path, feats=np.array([{"a": 1}], dtype=object))


def test_pickled_features_are_refused_in_our_own_words(own, capsys):
    pickled = np.array([{"a": 1}], dtype=object)
    np.save(own / "features/v7.npy", pickled, allow_pickle=True)
    refusal(check(own), capsys, "v7")
    shutil.copy(own / "features/v6.npy", own / "features/v7.npy")
    convert(own, ".npz", write_npz_pickled)
    refusal(check(own, "--extension", ".npz"), capsys)
    for path in (own / "features").glob("*.npz"):
        torch.save(subprocess.Popen, path.with_suffix(".pt"))
    refusal(check(own, "--extension", ".pt"), capsys)


# ---- C. JSON ------------------------------------------------------------------------------------

BAD_JSON = {
    "100000 brackets": "[" * 100_000,
    "100000 braces": '{"a":' * 100_000,
    "100000 brackets closed": "[" * 100_000 + "]" * 100_000,
    "brackets in a field": '{"database": {"v1": {"x": ' + "[" * 100_000 + "]" * 100_000 + "}}}",
    "digits": '{"database": {"v1": {"duration": ' + "9" * 5000 + "}}}",
    "empty": "",
    "blank": " \n",
    "null": "null",
    "number": "3",
    "text": '"database"',
    "a list of entries": '[{"subset": "training"}]',
    "database as a list": '{"database": [{"subset": "training"}]}',
    "database null": '{"database": null}',
    "entries as numbers": '{"database": {"v1": 3}}',
    "NUL": '{"database": {"v1\0": {}}}',
    "trailing": '{"database": {}} {"database": {}}',
    "comments": '{"database": {}} // all',
    "single quotes": "{'database': {}}",
    "no videos": '{"database": {}}',
}


def write_own_again(own):
    """The annotation file as it was."""
    shutil.rmtree(own / "features")
    write_own(own)


@pytest.mark.parametrize("fault", BAD_JSON)
def test_bad_json_is_one_sentence(own, capsys, fault):
    argv = predict(own, {})
    (own / "own.json").write_text(BAD_JSON[fault])
    refusal(check(own), capsys, "own.json")
    refusal(argv, capsys, "own.json")
    (own / "s.json").write_text(BAD_JSON[fault])
    write_own_again(own)
    refusal(check(own, "--ratio", 0, "--split", own / "s.json"), capsys, "s.json")
    (own / "pred.json").write_text(BAD_JSON[fault])
    refusal(argv, capsys, "pred.json")


@pytest.mark.parametrize("content", [b"\xff\xfe{\x00", b"\x80abc", '{"ä": 1}'.encode("latin1")])
def test_json_of_another_encoding_is_one_sentence(own, capsys, content):
    (own / "own.json").write_bytes(content)
    refusal(check(own), capsys, "own.json")


@pytest.mark.parametrize("label_id", [
    "²", "٣", "1" * 5000, -1, 1.5, "x", [1], {"a": 1}, True, 10 ** 400])
def test_label_ids_of_any_kind_do_no_harm(own, label_id):
    def change(database):
        for entry in database.values():
            for a in entry["annotations"]:
                a["label_id"] = label_id if a["label"] == "A" else 5

    edit(own, change)
    assert sorted(everything(own).classes) == ["A", "B"]


# ---- C. Text that reaches the terminal ----------------------------------------------------------

ODD_TEXTS = {
    "ESC": "\x1b[31mred\x1b]0;title\x07",
    "NUL": "a\0b",
    "newline": "a\nerror: b\r\nc",
    "lone surrogate": "a\ud800b",
    "right to left": "a\u202eb\u2066",
    "C1": "a\x9b31mb",
    "line separator": "a\u2028b",
    "long": "x" * 300_000,
    "long and odd": "\x1b" * 300_000,
}


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_odd_text_is_escaped_and_cut_wherever_it_stands(own, capsys, text):
    odd = ODD_TEXTS[text]
    whole = read_own(own)

    def refuses(changes, *more):
        rewrite(own, {"database": whole | changes})
        refusal(check(own, *more), capsys)

    refuses({odd: whole["v1"]})
    refuses({"v1": whole["v1"] | {"duration": odd}})
    refuses({"v1": whole["v1"] | {"annotations": odd}})
    refuses({"v1": whole["v1"] | {"annotations": [{"segment": odd, "label": "A"}]}})
    refuses({"v1": whole["v1"] | {"annotations": [{"segment": [odd, odd], "label": "A"}]}})
    refuses({"v1": whole["v1"] | {"annotations": [odd]}})
    refuses({"v1": whole["v1"] | {"subset": [odd]}})
    refuses({name: entry | {"subset": odd} for name, entry in whole.items()})
    rewrite(own, {"database": whole})
    argv = predict(own, {"v10": [{"label": "A", "score": odd, "segment": [1, 2]}]})
    refusal(argv, capsys)
    refusal(predict(own, {odd: []}), capsys)
    refusal([*predict(own, {"v10": []}), "--subset", odd], capsys)
    (own / "s.json").write_text(json.dumps([odd]))
    refusal(check(own, "--ratio", 0, "--split", own / "s.json"), capsys)


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_odd_labels_are_warned_about_in_plain_lines(own, capsys, text):
    odd = ODD_TEXTS[text]

    def change(database):
        database["v4"]["annotations"][0]["label"] = odd
        database["v5"]["annotations"][0]["label"] = odd.upper() + " "
        database["v6"]["subset"] = odd

    edit(own, change)
    assert train.main(check(own)) == 0
    shown = capsys.readouterr()
    lines = (shown.out + shown.err).splitlines()
    assert any("labelled instance" in line for line in lines)
    for line in (shown.out + shown.err).split("\n"):
        assert line.isprintable()
        assert len(line) < 600
    argv = predict(own, {"v10": [{"label": odd * 2, "score": 1, "segment": [1, 2]}]})
    assert evaluated(*argv[1:]) == 0
    for line in capsys.readouterr().err.split("\n"):
        assert line.isprintable()
        assert len(line) < 600


def test_a_run_with_odd_ids_and_labels_goes_to_its_end(own, capsys):
    rename(own, "v3", "\x1b[31m\n3")
    rename(own, "v12", "ü \x07 12")

    def change(database):
        for entry in database.values():
            for a in entry["annotations"]:
                a["label"] = {"A": "\x1b[2J", "B": "b\ud800\n"}[a["label"]]

    edit(own, change)
    assert train.main(own_argv(own, *SUPERVISED)) == 0
    assert evaluated("--checkpoint", own / "run") == 0
    shown = capsys.readouterr()
    assert all(line.isprintable() for line in (shown.out + shown.err).split("\n"))
    assert set(read_result(own / "run/metrics.json")["ap"]) == {"\x1b[2J", "b\ud800\n"}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "cp437"])
def test_a_terminal_that_cannot_show_a_letter_ends_no_run(own, monkeypatch, encoding):
    rename(own, "v3", "日本語")
    edit(own, lambda database: database["v5"]["annotations"][0].update(label="跳ぶ"))
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    err = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    (own / "s.txt").write_text("v0\nv1\n")
    assert train.main(check(own, "--ratio", 0, "--split", own / "s.txt")) == 0
    assert b"have no labelled instance" in err.buffer.getvalue()
    (own / "features/日本語.npy").unlink()
    assert train.main(check(own)) == 2
    assert b"not found" in err.buffer.getvalue()


def test_closed_streams_end_no_run(own, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert train.main(check(own, "--fps", 60)) == 0
    assert train.main(check(own, "--fps", 1)) == 2


# ---- C. Names that leave the folder, what is no file --------------------------------------------

@pytest.mark.parametrize("name", [
    "../secret", "a/../../secret", "..", "{}/secret", "x/..", "\0", "secret\0.npy", "a/../v1"])
def test_ids_that_leave_the_feature_folder_are_refused(own, capsys, name):
    name = name.format(own)
    (own / "features/a").mkdir()
    for path in (own / "secret.npy", own / "features/...npy"):
        shutil.copy(own / "features/v1.npy", path)
    edit(own, lambda database: database.update({name: database.pop("v1")}))
    refusal(check(own), capsys, "leads out of the feature folder")
    refusal(check(own, "--missing", "skip"), capsys, "leads out of the feature folder")


@pytest.mark.parametrize("name", ["", ".", "/"])
def test_ids_that_name_no_file_are_one_sentence(own, capsys, name):
    edit(own, lambda database: database.update({name: database.pop("v1")}))
    refusal(check(own), capsys)


def make_fifo(path):
    os.mkfifo(path)


def make_zero(path):
    path.symlink_to("/dev/zero")


def make_loop(path):
    path.symlink_to(path)


def make_folder(path):
    path.mkdir()


def make_dangling(path):
    path.symlink_to(path.with_name("nowhere"))


NO_FILES = (make_fifo, make_zero, make_loop, make_folder, make_dangling)


@pytest.mark.parametrize("make", NO_FILES)
@pytest.mark.parametrize("extension", [".npy", ".npz", ".pt", ".csv"])
def test_features_that_are_no_regular_file(own, capsys, make, extension):
    for path in (own / "features").glob("*.npy"):
        path.rename(path.with_suffix(extension))
    path = own / f"features/v0{extension}"
    path.unlink()
    make(path)
    refusal(check(own, "--extension", extension), capsys, "v0")


@pytest.mark.parametrize("make", NO_FILES)
def test_other_inputs_that_are_no_regular_file(own, capsys, make):
    argv = predict(own, perfect(own, TESTED))
    make(own / "odd.json")
    make(own / "odd.txt")
    make(own / "odd.pt")
    refusal(check(own, "--dataset", own / "odd.json"), capsys, "annotation file")
    refusal(check(own, "--annotations", own / "odd.json"), capsys, "annotation file")
    for name in ("odd.json", "odd.txt"):
        refusal(check(own, "--ratio", 0, "--split", own / name), capsys, "split file")
    refusal([*argv, "--gt", own / "odd.json"], capsys, "odd.json")
    refusal([*argv, "--pred", own / "odd.json"], capsys, "odd.json")
    refusal(["evaluate", "--checkpoint", own / "odd.pt"], capsys, "odd.pt")
    refusal(check(own, "--start", own / "odd.pt"), capsys, "odd.pt")
    refusal(["--resume", own / "odd.pt"], capsys, "odd.pt")


def test_a_link_to_a_feature_file_is_followed(own):
    path = own / "features/v3.npy"
    path.rename(own / "stored.npy")
    path.symlink_to(own / "stored.npy")
    assert len(everything(own).labelled) == 10


# ---- D. Writing ---------------------------------------------------------------------------------

def test_a_target_that_is_no_regular_file_is_written_as_it_is(own):
    argv = predict(own, perfect(own, TESTED))
    target = own / "target"
    os.mkfifo(target)
    read = []
    reader = threading.Thread(target=lambda: read.append(target.read_text()), daemon=True)
    reader.start()
    assert evaluated(*argv[1:], "--json", target) == 0
    reader.join(30)
    assert stat.S_ISFIFO(target.stat().st_mode)
    assert json.loads(read[0])["average_mAP"] == pytest.approx(1)
    null = own / "null"
    null.symlink_to("/dev/null")
    assert evaluated(*argv[1:], "--json", null) == 0
    assert null.is_symlink()
    assert stat.S_ISCHR(null.stat().st_mode)


def test_targets_that_cannot_be_written_are_one_sentence(own, capsys):
    argv = predict(own, perfect(own, TESTED))
    (own / "full").symlink_to("/dev/full")
    (own / "loop").symlink_to(own / "loop")
    for name in ("full", "features", "none/out.json", "own.json/out.json", "x" * 300, "a\0b"):
        refusal([*argv, "--json", own / name], capsys, "cannot be written")
    assert (own / "features").is_dir()


def test_planted_links_are_not_followed(own):
    argv = predict(own, perfect(own, TESTED))
    victim = own / "victim"
    victim.write_text("precious")
    number = os.getpid()
    planted = ["out.json.tmp", f"out.json.{number}.tmp", "out.tmp", ".out.json.tmp"]
    for name in planted:
        (own / name).symlink_to(victim)
    assert evaluated(*argv[1:], "--json", own / "out.json") == 0
    assert victim.read_text() == "precious"
    assert not (own / "out.json").is_symlink()
    run = own / "run"
    run.mkdir()
    for name in ("checkpoint.pt", "metrics.json", "config.json", "split.json", "log.jsonl"):
        for ending in (".tmp", f".{number}.tmp"):
            (run / f"{name}{ending}").symlink_to(victim)
    assert train.main(own_argv(own, *SUPERVISED)) == 0
    assert victim.read_text() == "precious"


def test_a_link_as_target_stays_a_link(own):
    argv = predict(own, perfect(own, TESTED))
    (own / "link.json").symlink_to(own / "real.json")
    (own / "real.json").write_text("old")
    assert evaluated(*argv[1:], "--json", own / "link.json") == 0
    assert (own / "link.json").is_symlink()
    assert "average_mAP" in read_result(own / "real.json")


@contextlib.contextmanager
def small_disk(size):
    """Inside, no file can grow over `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_during_a_save(own, capsys):
    assert train.main(own_argv(own, *SUPERVISED, "--out", own / "whole", "--acp", "fine")) == 0
    argv = own_argv(own, *SUPERVISED, "--acp", "fine")
    assert train.main([*argv, "--stage", "pretrain"]) == 0
    path = own / "run/checkpoint.pt"
    before = path.read_bytes()
    go_on = ["--resume", own / "run", "--stage", "supervised"]
    with small_disk(100_000):
        text = refusal(go_on, capsys, "checkpoint.pt", "cannot be written", "--resume")
    assert "too large" in text or "space" in text or "full" in text
    assert path.read_bytes() == before
    assert not list((own / "run").glob("*.tmp"))
    assert train.main([str(word) for word in go_on]) == 0
    assert same(weights(own / "run"), weights(own / "whole"))


def test_a_full_disk_at_the_first_save_leaves_nothing(own, capsys):
    with small_disk(100_000):
        refusal(own_argv(own, *SUPERVISED), capsys, "cannot be written")
    assert not [path for path in (own / "run").iterdir()
                if path.suffix in (".tmp", ".pt", ".json")]


def predict_before(folder):
    """The command line that evaluates a finished run's predictions."""
    return ["evaluate", "--pred", folder / "run/predictions.json", "--gt", folder / "own.json"]


@pytest.mark.parametrize("size", [1, 700, 1300])
def test_a_full_disk_for_the_small_files(trained, capsys, size):
    before = (trained / "run/checkpoint.pt").read_bytes()
    argv = predict_before(trained)
    with small_disk(size):
        refusal(resumed(trained), capsys)
    with small_disk(1):
        refusal([*argv, "--json", trained / "o.json"], capsys, "o.json", "cannot be written")
    assert not list(trained.rglob("*.tmp"))
    assert (trained / "run/checkpoint.pt").read_bytes() == before
    assert train.main(resumed(trained)) == 0
    assert read_log(trained / "run")


def files_of(folder):
    """{name: content} of what a run has written."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.mark.parametrize(("more", "word"), [
    (("--lr", 1e12, "--clip", 1e12), "diverged"),
    (("--features", "none"), "not found"),
    (("--ratio", 0.01), "0 of 10"),
    (("--start", "none.pt"), "none.pt"),
])
def test_nothing_old_goes_before_the_new_is_whole(trained, capsys, more, word):
    before = files_of(trained / "run")
    argv = own_argv(trained, "--overwrite", "--log-every", 1, *more)
    refusal(argv, capsys, word)
    after = files_of(trained / "run")
    changed = [name for name in before if after.get(name) != before[name]]
    assert changed == []


def test_temporary_files_of_a_killed_run_go(trained):
    for name in ("checkpoint.pt.4711.tmp", "metrics.json.4711.tmp"):
        (trained / "run" / name).write_bytes(b"half")
    assert train.main(resumed(trained)) == 0
    assert not list((trained / "run").glob("*.tmp"))


# ---- D. Two runs, finished runs, default folders ------------------------------------------------

def test_two_runs_in_one_folder(trained, capsys):
    before = files_of(trained / "run")
    held = train.keep_others_out(trained / "run")
    try:
        refusal(resumed(trained), capsys, "another run", "run")
        refusal(own_argv(trained, "--overwrite"), capsys, "another run", "--out")
    finally:
        held.close()
    assert files_of(trained / "run") == before
    assert train.main(resumed(trained)) == 0
    assert train.main(resumed(trained)) == 0  # the lock has gone with the run


def test_a_run_holds_its_folder_while_it_trains(own, capsys, monkeypatch):
    inner = []
    learning_rate = train.learning_rate

    def try_another(s, step, total):
        """The learning rate; at the first step another run tries the folder."""
        if not inner:
            inner.append(None)
            inner[0] = train.main(own_argv(own, *SUPERVISED, "--overwrite"))
        return learning_rate(s, step, total)

    monkeypatch.setattr(train, "learning_rate", try_another)
    assert train.main(own_argv(own, *SUPERVISED)) == 0
    assert inner == [2]
    assert "another run is writing" in capsys.readouterr().err
    assert (own / "run/metrics.json").exists()


def test_a_folder_that_holds_a_run_is_kept(trained, capsys):
    before = files_of(trained / "run")
    refusal(own_argv(trained), capsys, "--resume", "--overwrite", "--out")
    assert files_of(trained / "run") == before
    assert train.main(own_argv(trained, *SUPERVISED, "--overwrite")) == 0
    after = files_of(trained / "run")
    assert after["checkpoint.pt"] != before["checkpoint.pt"]
    assert json.loads(after["pseudo_labels.json"]) == {}


@pytest.mark.parametrize(
    "name", ["checkpoint.pt", "metrics.json", "predictions.json", "pseudo_labels.json"])
def test_a_folder_that_holds_part_of_a_run_is_kept(own, capsys, name):
    (own / "run").mkdir()
    (own / "run" / name).write_text("mine")
    refusal(own_argv(own), capsys, "--overwrite")
    assert (own / "run" / name).read_text() == "mine"


def test_the_default_folder_is_a_free_one(own, monkeypatch):
    monkeypatch.chdir(own)
    for expected in ("runs/toy", "runs/toy-2", "runs/toy-3"):
        assert settings().out == expected
        (own / expected).mkdir(parents=True)
        (own / expected / "checkpoint.pt").write_text("")
    (own / "runs/toy-2/checkpoint.pt").unlink()
    assert settings().out == "runs/toy-2"
    assert settings("--overwrite").out == "runs/toy"
    argv = own_argv(own, *SUPERVISED)
    at = argv.index("--out")
    del argv[at:at + 2]
    assert train.main(argv) == 0
    assert train.main(argv) == 0
    assert (own / "runs/own/metrics.json").exists()
    assert (own / "runs/own-2/metrics.json").exists()


# ---- D. Signals and pipes -----------------------------------------------------------------------

ROOMY = ("--log-every", 1, "--pretrain-epochs", 2, "--supervised-epochs", 2,
         "--supervised-steps", 8, "--joint-epochs", 2, *LOWEST)


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory):
    """A user's data set with a run of ROOMY that was never stopped; no test changes it."""
    return with_run(tmp_path_factory, "unstopped", *ROOMY)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [1, 7, 14, 24])
def test_a_signal_stops_a_run_that_goes_on_bit_for_bit(
        unstopped, tmp_path, capsys, monkeypatch, number, step):
    average_weights = train.average_weights
    steps = []

    def interrupted(run):
        """Average the weights; at one step a signal comes."""
        steps.append(run.step)
        assert signal.getsignal(number) not in (signal.SIG_DFL, signal.default_int_handler)
        if len(steps) == step:
            signal.raise_signal(number)
        average_weights(run)

    out = tmp_path / "run"
    monkeypatch.setattr(train, "average_weights", interrupted)
    assert train.main(own_argv(unstopped, *ROOMY, "--out", out)) == 128 + number
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"--resume {out}" in err
    assert signal.Signals(number).name in err
    assert len(steps) == step  # which was finished, and no other began
    monkeypatch.setattr(train, "average_weights", average_weights)
    assert train.main(["--resume", str(out)]) == 0
    assert same(weights(out), weights(unstopped / "run"))
    for name in ("metrics.json", "predictions.json", "pseudo_labels.json"):
        assert (out / name).read_bytes() == (unstopped / "run" / name).read_bytes()
    losses = [[row.get("loss") for row in read_log(folder)] for folder in (out, unstopped / "run")]
    assert losses[0] == losses[1]


def command_of(argv):
    """train.py with these arguments as a command of its own process."""
    return [sys.executable, str(ROOT / "train.py"), *argv]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_from_outside(unstopped, tmp_path, number):
    argv = own_argv(unstopped, *ROOMY, "--out", tmp_path / "run")
    log = tmp_path / "run/log.jsonl"
    process = subprocess.Popen(
        command_of(argv), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while not log.exists() or '"supervised"' not in log.read_text():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert err.count("\n") == 1, err
    assert err.startswith("error: ")
    assert "--resume" in err
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert same(weights(tmp_path / "run"), weights(unstopped / "run"))


def test_a_signal_before_anything_is_saved(own, capsys, monkeypatch):
    load_dataset = data.load_dataset

    def interrupted(*arguments):
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        signal.raise_signal(signal.SIGINT)
        return load_dataset(*arguments)

    monkeypatch.setattr(data, "load_dataset", interrupted)
    assert train.main(own_argv(own)) == 130
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert not (own / "run/checkpoint.pt").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_in_evaluation_and_in_the_report(own, capsys, monkeypatch):
    detect = evaluate.detect

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        return detect(*arguments)

    monkeypatch.setattr(evaluate, "detect", interrupted)
    try:
        codes = [train.main(own_argv(own, *SUPERVISED))]
        assert "--resume" in capsys.readouterr().err
        codes.append(evaluated("--checkpoint", own / "run"))
    except KeyboardInterrupt:
        pytest.fail("Ctrl-C came through")
    assert codes == [130, 130]
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr(evaluate, "detect", detect)
    assert train.main(["--resume", str(own / "run")]) == 0
    assert (own / "run/metrics.json").exists()


def test_a_closed_pipe_only_ends_the_printing(unstopped, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen(
        command_of(own_argv(unstopped, *ROOMY, "--out", out)),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(60) == 0
    finally:
        process.kill()
    assert err == ""
    assert same(weights(out), weights(unstopped / "run"))
    assert (out / "metrics.json").exists()


def test_a_pipe_closed_before_the_first_line(own):
    argv = [str(word) for word in predict(own, perfect(own, TESTED))[1:]]
    commands = (command_of(check(own, "--fps", 60)), [sys.executable, "evaluate.py", *argv])
    for command in commands:
        end, start = os.pipe()
        os.close(end)
        done = subprocess.run(command, cwd=ROOT, stdout=start, stderr=start, check=False)
        os.close(start)
        assert done.returncode == 0


# ---- D. Going on --------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["none", "empty", "features", "own.json", ""])
def test_resume_where_there_is_no_run(own, capsys, name):
    (own / "empty").mkdir()
    if name:
        refusal(["--resume", own / name], capsys, "checkpoint")
        argv = own_argv(own, "--resume", own / name, "--out", own / name)
        refusal(argv, capsys, "checkpoint")
    assert not (own / "none").exists()
    assert not list((own / "empty").iterdir())


def test_resume_takes_the_settings_from_the_run(own, capsys):
    more = ("--seed", 3, "--ema", 0.5, "--ignore-labels", "C", "--log-every", 7)
    assert train.main(own_argv(own, *SUPERVISED, *more)) == 0
    before = read_result(own / "run/config.json")
    assert train.main(["--resume", str(own / "run")]) == 0
    after = read_result(own / "run/config.json")
    assert after | {"resume": ""} == before
    argv = ["--resume", own / "run"]
    refusal([*argv, "--seed", 4], capsys, "seed", "3", "4")
    refusal([*argv, "--out", own / "other"], capsys, "--out")
    refusal([*argv, "--overwrite"], capsys, "--overwrite")


def spoil_features(name, change):
    """A change of a video's feature file: change(array) -> another."""
    def spoil(folder):
        path = folder / f"features/{name}.npy"
        np.save(path, change(np.load(path)))
    return spoil


def spoil_entry(change):
    """A change of a labelled video's entry."""
    def spoil(folder):
        name = read_result(folder / "run/split.json")["labelled"][0]
        edit(folder, lambda database: change(database[name]))
    return spoil


def other_label(entry):
    entry["annotations"][0]["label"] = "B" if entry["annotations"][0]["label"] == "A" else "A"


def other_segment(entry):
    entry["annotations"][0]["segment"] = [3.0, 8.0]


def fewer_segments(entry):
    entry["annotations"].pop()


def renamed(folder):
    name = read_result(folder / "run/split.json")["unlabelled"][2]
    rename(folder, name, "renamed")


def renamed_labelled(folder):
    name = read_result(folder / "run/split.json")["labelled"][1]
    rename(folder, name, "renamed")


def one_more(folder):
    shutil.copy(folder / "features/v1.npy", folder / "features/v77.npy")
    edit(folder, lambda database: database.update(v77=database["v1"]))


def one_less(folder):
    edit(folder, lambda database: database.pop("v9"))


def renamed_class(folder):
    text = (folder / "own.json").read_text()
    (folder / "own.json").write_text(text.replace('"label": "A"', '"label": "Z"'))


def other_fps(folder):
    def change(database):
        for entry in database.values():
            entry["fps"] = 48
    edit(folder, change)


CHANGES = {
    "scaled": spoil_features("v3", lambda x: 2 * x),
    "shifted": spoil_features("v8", lambda x: x + 1),
    "one value": spoil_features("v5", lambda x: np.where(x == x.max(), 99, x)),
    "shorter": spoil_features("v2", lambda x: x[:-1]),
    "channels in another order": spoil_features("v4", lambda x: np.roll(x, 1, 1)),
    "label": spoil_entry(other_label),
    "segment": spoil_entry(other_segment),
    "fewer": spoil_entry(fewer_segments),
    "renamed": renamed,
    "renamed labelled": renamed_labelled,
    "one more": one_more,
    "one less": one_less,
    "class": renamed_class,
    "fps": other_fps,
}


@pytest.mark.parametrize("what", CHANGES)
def test_data_that_changed_before_resume_are_refused(trained, capsys, what):
    CHANGES[what](trained)
    before = files_of(trained / "run")
    refusal(resumed(trained), capsys, "other data")
    assert files_of(trained / "run") == before


def test_data_that_only_look_changed_are_resumed(trained):
    hidden = read_result(trained / "run/split.json")["unlabelled"]
    for name in NAMES:
        path = trained / f"features/{name}.npy"
        np.save(path, np.asfortranarray(np.load(path).astype(np.float64)))

    def change(database):
        other_segment(database[hidden[0]])  # which no training reads
        database["v1"]["url"] = "new"

    edit(trained, change)
    assert train.main(resumed(trained)) == 0


def test_divergence_is_one_sentence(own, capsys):
    text = refusal(own_argv(own, "--lr", 1e12, "--clip", 1e12), capsys, "diverged", "--lr")
    assert re.search(r"step \d+ of stage (pretrain|supervised)", text)
    assert re.search(r"\bv\d\b", text)
    assert train.main(own_argv(own, "--stage", "pretrain", "--out", own / "one")) == 0
    good = own / "one/checkpoint.pt"
    more = ("--start", good, "--lr", 1e12, "--clip", 1e12, "--out", own / "two")
    refusal(own_argv(own, *more), capsys, "diverged", "stage supervised")
    more = ("--start", good, "--lr", 1e-5, *SUPERVISED[:2], "--out", own / "three")
    assert train.main(own_argv(own, *more)) == 0
    assert all(x.isfinite().all() for x in weights(own / "three").values())


def test_divergence_names_the_checkpoint_that_is_good(own, capsys, monkeypatch):
    check_finite = train.check_finite

    def fail(run, what, value, ids):
        """In stage 2 the loss is no number."""
        bad = run.stage == "supervised" and run.step == 2
        check_finite(run, what, math.nan if bad else value, ids)

    monkeypatch.setattr(train, "check_finite", fail)
    text = refusal(own_argv(own, *SUPERVISED[:2]), capsys, "diverged", "step 3", "supervised")
    path = re.search(r"--start (\S+) --lr (\S+)", text)
    assert path[1] == str(own / "run/checkpoint.pt")
    assert float(path[2]) < 1e-3
    monkeypatch.setattr(train, "check_finite", check_finite)
    more = (*SUPERVISED[:2], "--start", path[1], "--lr", path[2], "--out", own / "new")
    assert train.main(own_argv(own, *more)) == 0


def test_threads_wait_without_spinning_unless_the_user_says_otherwise():
    code = "import train, os; print(os.environ.get('OMP_WAIT_POLICY'))"
    found = []
    for policy in (None, "ACTIVE"):
        environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
        if policy:
            environment["OMP_WAIT_POLICY"] = policy
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, text=True,
                              capture_output=True, check=True)
        found.append(done.stdout.strip())
    assert found == ["PASSIVE", "ACTIVE"]


HUGE = 10 ** 12


@pytest.mark.parametrize("more", [
    ("--stem", HUGE),
    ("--stem", 1000),
    ("--channels", HUGE),
    ("--heads", HUGE),
    ("--batch", HUGE),
    ("--resize", HUGE),
    ("--crop-tries", HUGE),
    ("--pretrain-epochs", HUGE),
    ("--supervised-epochs", HUGE),
    ("--supervised-steps", HUGE),
    ("--joint-epochs", HUGE),
    ("--icd-hidden", HUGE),
    ("--icd-pairs", HUGE),
    ("--acp-steps", HUGE),
    ("--acp-clusters", HUGE),
    ("--acp-restarts", HUGE),
    ("--pre-nms", HUGE),
    ("--max-detections", HUGE),
    ("--windows", HUGE),
    ("--ranges", ",".join(["0:4"] * 100_000)),
    ("--tiou", "0:1:0.0000001"),
    ("--seed", 10 ** 30),
    ("--max-steps", 10 ** 30),
    ("--lr", 1e300),
    ("--stride", 1e300),
    ("--fps", 1e300),
])
def test_settings_have_sane_upper_bounds(own, capsys, more):
    name = str(more[0]).removeprefix("--").replace("-", "_")
    refusal(check(own, *more), capsys, name)


# ---- Every refusal ------------------------------------------------------------------------------

@pytest.mark.parametrize("argv", [
    [], ["--pred", "x.json"], ["--lamda", "3"], ["--weights", "best"],
    ["--checkpoint", "a", "--pred", "b", "--gt", "c"], ["--tiou"]])
def test_a_wrong_command_line_of_evaluation_is_one_sentence(capsys, argv):
    try:
        code = evaluate.main(argv)
    except SystemExit as error:
        code = error.code
    err = capsys.readouterr().err
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("argv", [
    ["--lamda", "3"], ["--batch"], ["--batch", "two"], ["--batch", "9" * 5000], ["x" * 100_000],
    ["--dataset", "x" * 100_000 + ".json"], ["--device", "\x1b[31m"], ["--device", ""],
    ["--out", "a\0b"], ["--check", "--features", "a\0b", "--dataset", "a\0b.json"],
    ["--icd", "\udcff"], ["--precision", "x" * 5000], ["--device", "cuda:99"]])
def test_a_wrong_command_line_of_training_is_one_sentence(capsys, argv):
    refusal(argv, capsys)
