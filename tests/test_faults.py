"""Tests of bad input: one sentence, exit code 2, nothing half-written."""
import json

import numpy as np
import pytest
import torch

import train
from tests.helpers import edit, own_argv, refused

# ---- Feature files ------------------------------------------------------------------------------

def missing(path):
    path.unlink()


def truncated(path):
    path.write_bytes(path.read_bytes()[:300])


def pickled(path):
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)


def empty(path):
    path.write_bytes(b"")


def holding(array):
    """Another array in the place of the features."""
    def spoil(path):
        np.save(path, array)
    return spoil


def with_value(value):
    """One value of the features changed."""
    def spoil(path):
        x = np.load(path)
        x[7, 2] = value
        np.save(path, x)
    return spoil


FEATURES = {
    "missing": (missing, ["not found"]),
    "truncated": (truncated, ["cannot be read"]),
    "pickled": (pickled, ["cannot be read"]),
    "empty": (empty, ["cannot be read"]),
    "width": (holding(np.zeros((64, 4))), ["4", "5"]),
    "shape": (holding(np.zeros(64)), ["(T, D)"]),
    "no steps": (holding(np.zeros((0, 5))), ["(T, D)"]),
    "text": (holding(np.array([["x"] * 5])), ["(T, D)"]),
    "nan": (with_value(np.nan), ["nan", "step 7"]),
    "inf": (with_value(np.inf), ["inf", "step 7"]),
}


@pytest.mark.parametrize("name", ["v1", "v9", "v12"])  # whichever subset it is in
@pytest.mark.parametrize("fault", FEATURES)
def test_bad_feature_files(own, capsys, name, fault):
    spoil, words = FEATURES[fault]
    spoil(own / f"features/{name}.npy")
    refused(own_argv(own), capsys, name, *words)
    assert not (own / "run").exists()


# ---- Annotations --------------------------------------------------------------------------------

def with_segment(segment):
    """Another segment in the place of a video's second."""
    def change(entry):
        entry["annotations"][1]["segment"] = segment
    return change


def without_duration(entry):
    del entry["duration"]
    entry["annotations"][1]["segment"] = [900.0, 910.0]


def without_label(entry):
    del entry["annotations"][1]["label"]


def without_fps(entry):
    del entry["fps"]


def with_field(key, value):
    """Another value of a video's field."""
    def change(entry):
        entry[key] = value
    return change


ANNOTATIONS = {
    "reversed": (with_segment([20.0, 12.0]), ["[20.0, 12.0]"]),
    "of no length": (with_segment([12.0, 12.0]), ["[12.0, 12.0]"]),
    "after the end": (with_segment([40.0, 50.0]), ["[40.0, 50.0]", "outside"]),
    "far past the end": (with_segment([10.0, 9999.0]), ["outside"]),
    "before the start": (with_segment([-9.0, -3.0]), ["outside"]),
    "after the features": (without_duration, ["outside"]),
    "text": (with_segment("12-20"), ["'12-20'"]),
    "null": (with_segment([1, None]), ["None"]),
    "no label": (without_label, ["no label"]),
    "fps 0": (with_field("fps", 0), ["fps", "0"]),
    "no fps": (without_fps, ["--fps"]),
    "duration": (with_field("duration", "long"), ["'long'"]),
    "no list": (with_field("annotations", 3), ["list"]),
}


@pytest.mark.parametrize("name", ["v1", "v9", "v12"])
@pytest.mark.parametrize("fault", ANNOTATIONS)
def test_bad_annotations(own, capsys, name, fault):
    change, words = ANNOTATIONS[fault]
    edit(own, lambda database: change(database[name]))
    refused(own_argv(own), capsys, "own.json", name, *words)
    assert not (own / "run").exists()


# ---- Settings and the files that they name ------------------------------------------------------

def test_bad_files_and_settings(own, capsys):
    def refuses(option, value, *words):
        refused(own_argv(own, option, value), capsys, *words)

    refuses("--ratio", 0.01, "--ratio 0.01", "0 of 10")
    refuses("--ratio", 1.0, "--ratio 1.0", "no unlabelled video")
    refuses("--train-subset", "x", "'x'", "Training")
    refuses("--tiou", "high", "'high'")
    refuses("--out", own / "own.json", "own.json")
    refuses("--ranges", "nan:4", "ranges")
    refuses("--windows", "five", "windows", "'five'")
    refuses("--windows", "5,5", "windows", "2 windows for 3 regression ranges")
    refuses("--ranges", "0-4", "ranges", "'0-4'")
    refuses("--channels", 15, "channels", "15")
    refused(["--dataset", "kinetics"], capsys, "'kinetics'")
    refused(["--dataset", own / "none.json"], capsys, "not found", "none.json")
    assert not (own / "run").exists()


def test_bad_split_files(own, capsys):
    def refuses(name, content, *words):
        if content is not None:
            (own / name).write_text(content)
        refused(own_argv(own, "--split", own / name, "--ratio", 0), capsys, name, *words)

    refuses("nested.json", '{"labelled": [["v1"]]}')
    refuses("none.txt", None, "split file not found")
    refuses("bad.txt", "v1\nv99\nv98", "v99", "2 of 3 ids")
    refuses("empty.json", '{"labelled": []}', "no labelled video")
    assert not (own / "run").exists()


@pytest.mark.parametrize(("content", "word"), [('{"database": {', "JSON"), ("[]", "database")])
def test_annotation_files_of_another_form(own, capsys, content, word):
    (own / "own.json").write_text(content)
    refused(own_argv(own), capsys, "own.json", word)
    assert not (own / "run").exists()


def test_a_published_dataset_without_its_files_says_what_is_expected(tmp_path, capsys):
    refused(["--dataset", "thumos", "--root", tmp_path, "--ratio", "0.1"], capsys,
            tmp_path / "annotations/thumos14.json", tmp_path / "i3d_features", "<id>.npy",
            "ActionFormer")


# ---- Checkpoints and predictions ----------------------------------------------------------------

def test_bad_checkpoints(own, capsys):
    assert train.main(own_argv(own, "--stage", "supervised")) == 0
    capsys.readouterr()
    checkpoint = own / "run/checkpoint.pt"
    whole = checkpoint.read_bytes()
    resumed = ["--resume", own / "run"]
    refused([*resumed, "--channels", 32], capsys, "another configuration", "channels", "16", "32")
    refused(own_argv(own, "--start", own / "none.pt", "--out", own / "new"), capsys, "none.pt")
    content = torch.load(checkpoint, weights_only=True)
    for part, key in ((content, "theta_h"), (content["settings"], "acp_tau")):
        part.pop(key)
        torch.save(content, own / "old.pt")
        argv = own_argv(own, "--start", own / "old.pt", "--out", own / "new")
        refused(argv, capsys, "old.pt", "not of this version")

    def new_label(database):
        database["v12"]["annotations"][0]["label"] = "new"

    evaluating = ["evaluate", "--checkpoint", checkpoint]
    np.save(own / "features/v12.npy", np.zeros((64, 5), dtype=np.float32))
    edit(own, new_label)
    refused(evaluating, capsys, "v12", "'new'", "unknown")
    checkpoint.write_bytes(whole[:1000])
    refused(resumed, capsys, "checkpoint.pt", "cannot be read")
    refused(evaluating, capsys, "checkpoint.pt", "cannot be read")
    for content in (b"", b"\x80\x02}", b"text"):
        checkpoint.write_bytes(content)
        refused(evaluating, capsys, "checkpoint.pt", "cannot be read")
    torch.save({"a": 1}, checkpoint)
    refused(evaluating, capsys, "checkpoint.pt")


def test_evaluation_refuses_checkpoints_of_another_version_or_other_data(own, capsys):
    assert train.main(own_argv(own, "--stage", "supervised", "--supervised-epochs", 1)) == 0
    capsys.readouterr()
    whole = torch.load(own / "run/checkpoint.pt", weights_only=True)
    path = own / "changed.pt"

    def refuses(changes, *words):
        torch.save(whole | changes, path)
        refused(["evaluate", "--checkpoint", path], capsys, *words)

    lacking = dict(whole["settings"])
    del lacking["nms_sigma"]
    refuses({"settings": lacking}, "changed.pt", "not of this version", "nms_sigma")
    wrong = whole["settings"] | {"pre_nms": "many"}
    refuses({"settings": wrong}, "setting pre_nms must be of type int", "'many'")
    narrow = whole["settings"] | {"channels": 8}
    refuses({"settings": narrow}, "changed.pt", "not of this version")
    refuses({"mean": torch.zeros(4), "std": torch.ones(4)}, "not of this version", "5]", "4]")
    for name in ("v10", "v11", "v12", "v13"):
        np.save(own / f"features/{name}.npy", np.zeros((64, 4)))
    torch.save(whole, path)
    refused(["evaluate", "--checkpoint", path], capsys, "is 4 wide", "5", "4 videos")


@pytest.mark.parametrize(("content", "words"), [
    ("{", ["JSON"]),
    ("[]", ["results"]),
    ({"v10": [{"label": "A", "score": float("nan"), "segment": [1, 2]}]}, ["v10", "nan"]),
    ({"v10": [{"label": "A", "segment": [1, 2]}]}, ["v10"]),
    ({"v10": 3}, ["v10", "3"]),
    ({"v10": {}}, ["v10", "{}"]),
    ({"v10": [{"label": ["A"], "score": 1, "segment": [1, 2]}]}, ["v10"]),
])
def test_bad_predictions(own, capsys, content, words):
    if isinstance(content, dict):
        content = json.dumps({"results": content})
    (own / "pred.json").write_text(content)
    argv = ["evaluate", "--pred", own / "pred.json", "--gt", own / "own.json",
            "--subset", "validation"]
    refused(argv, capsys, *words)
