"""Tests that what a run writes is of what it says, and replaces nothing of the user's."""
import json
import shutil

import numpy as np
import pytest
import torch

import evaluate
import train
from extras import analysis, annotations, bmn, export, fig4, intervals, tables, viewer
from plumbing import forms
from plumbing.words import BadInput
from tests import users
from tests.helpers import edit, finished, own_argv, read_result, refused, settings, weights

WORDS = {"train": train.main, "evaluate": evaluate.main, "analysis": analysis.main, "bmn": bmn.main,
         "export": export.main, "intervals": intervals.main, "viewer": viewer.main}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A user's data set with a run of all stages."""
    return finished(tmp_path_factory, train.main, own_argv, "--theta-l", 0.0)


@pytest.fixture
def ran(whole, tmp_path):
    """The same, which a test may change."""
    folder = tmp_path / "own"
    shutil.copytree(whole, folder)
    return folder


def run_of(ran, name, *more):
    """Another run of the user's data set, of two stages, in a folder of that name."""
    argv = own_argv(ran, *users.SUPERVISED, "--features", ran / "features", *more)
    assert train.main([*argv, "--out", str(ran / name)]) == 0
    return ran / name


def said(capsys, command, *argv, code=2):
    """What a command prints that ends with this exit code."""
    capsys.readouterr()
    assert WORDS[command]([str(word) for word in argv]) == code
    return "".join(capsys.readouterr())


# ---- What a resumed run leaves ------------------------------------------------------------------

def test_a_resumed_run_leaves_no_result_of_another_end(ran, capsys):
    edit(ran, lambda database: database["v13"].update(subset="other"))
    more = ("--resume", ran / "run", "--no-page", "--dataset", ran / "own.json", "--features",
            ran / "features")
    out = said(capsys, "train", *more, "--test-subset", "other", code=0)
    assert " -> APL " not in out
    assert not (ran / "run/page.html").exists()
    assert "supervised_mAP" not in read_result(ran / "run/metrics.json")
    said(capsys, "train", *more, "--test-subset", "none", code=0)
    for name in ("metrics.json", "predictions.json"):
        assert not (ran / f"run/{name}").exists()


def test_how_right_a_list_is_said_to_be_is_how_right_it_is(ran, capsys):
    features = ran / "tested"
    features.mkdir()
    for name in users.TESTED:
        shutil.copy(ran / f"features/{name}.npy", features)
    out = said(capsys, "evaluate", "--checkpoint", ran / "run", "--features", features, "--out",
               ran / "list.json", code=0)
    listed = read_result(ran / "list.json")["results"]
    video = read_result(ran / "own.json")["database"]
    truth = {name: forms.Annotation(
        "", 32.5, 50.0, np.array([a["segment"] for a in video[name]["annotations"]]),
        [a["label"] for a in video[name]["annotations"]]) for name in users.TESTED}
    trust = evaluate.mean_average_precision(truth, listed, np.array([0.5]))["trust"]
    assert f"such actions {100 * trust['precision']:.0f} % were right" in out
    assert f"videos, {100 * trust['recall']:.0f} % were found" in out


# ---- What evaluation advises --------------------------------------------------------------------

def test_what_evaluation_advises_it_takes(ran, tmp_path, capsys):
    x = np.load(ran / "features/v12.npy")
    x[3] = np.nan
    np.save(tmp_path / "gap.npy", x)
    new = ("--checkpoint", ran / "run", "--features", tmp_path / "gap.npy")
    assert "--fill-gaps" in said(capsys, "evaluate", *new)
    said(capsys, "evaluate", *new, "--fill-gaps", code=0)
    for change, word, more in (
            (users.lacking("fps", *users.NAMES), "give --fps", ("--fps", 50)),
            (users.actions(["v12"], 0, segment=[3, 3]), "--bad-segments",
             ("--bad-segments", "skip")),
            (users.entries(users.TESTED, duration=90), "--trust-grid", ("--trust-grid",)),
            (users.entries(users.TESTED, duration=64.5), "--stride", ("--stride", 50)),
            (lambda own: [(own / f"features/{name}.npy").rename(own / f"features/{name}.npz")
                          for name in users.TESTED], "--extension", ("--extension", ".npz"))):
        folder = tmp_path / word.strip("-")
        shutil.copytree(ran, folder)
        change(folder)
        argv = ("--checkpoint", folder / "run", "--dataset", folder / "own.json", "--features",
                folder / "features")
        assert word in said(capsys, "evaluate", *argv)
        for name in users.TESTED if word == "--extension" else ():
            x = np.load(ran / f"features/{name}.npy")
            np.savez(folder / f"features/{name}.npz", feats=x)
        said(capsys, "evaluate", *argv, *more, code=0)


def test_columns_in_another_order_than_the_training_had_are_refused(ran, capsys):
    for name in users.NAMES:
        np.savetxt(ran / f"features/{name}.csv", np.load(ran / f"features/{name}.npy"),
                   delimiter=",", header="a,b,c,d,e", comments="")
    run = run_of(ran, "named", "--extension", ".csv")
    new = ran / "new.csv"
    for header, code in (("a,b,c,d,e", 0), ("e,d,c,b,a", 2)):
        np.savetxt(new, np.load(ran / "features/v12.npy"), delimiter=",", header=header,
                   comments="")
        text = said(capsys, "evaluate", "--checkpoint", run / "detector.pt", "--features", new,
                    code=code)
        assert ("columns e, d, c, b, a, the training had a, b, c, d, e: e in the place of a"
                in text) == bool(code)
    for name in users.TESTED:
        shutil.copy(new, ran / f"features/{name}.csv")
    assert "v10" in (text := said(capsys, "evaluate", "--checkpoint", run))
    assert "the training had a" in text
    for file in ("detector.pt", "checkpoint.pt"):  # as they were once
        content = torch.load(run / file)
        del content["columns"]
        torch.save(content, run / file)
    said(capsys, "evaluate", "--checkpoint", run / "detector.pt", "--features", new, code=0)
    for name in users.TESTED:
        np.savetxt(ran / f"features/{name}.csv", np.load(ran / f"features/{name}.npy"),
                   delimiter=",", header="a,b,c,d,e", comments="")
    assert train.main(["--resume", str(run)]) == 0


def test_lists_of_detections_are_named_where_others_are_expected(ran, capsys):
    pred = ran / "run/predictions.json"
    refused(["--dataset", pred, "--check"], capsys, "list of detections", "found.csv")
    (ran / "found.csv").write_text("video,start,end,label\n")
    assert "read as JSON" in said(
        capsys, "evaluate", "--pred", ran / "found.csv", "--gt", ran / "own.json")


# ---- What is replaced ---------------------------------------------------------------------------

def test_no_command_replaces_what_is_not_its_own(ran, capsys, monkeypatch):
    monkeypatch.setattr(export, "FOR_ONNX", ())
    pred = ran / "run/predictions.json"
    shutil.copy(ran / "own.json", ran / "gt.json")
    gt = ran / "gt.json"
    before = gt.read_bytes()
    for command, argv in (
            ("evaluate", ("--pred", pred, "--gt", gt, "--json", gt)),
            ("analysis", (ran / "run", "--out", gt)),
            ("bmn", ("--export-proposals", gt, "--checkpoint", ran / "run")),
            ("viewer", (ran / "run", "--out", gt)),
            ("export", (ran / "run", "--out", ran / "gt.pt2"))):
        assert "gt.json exists" in said(capsys, command, *argv)
        assert gt.read_bytes() == before
    (ran / "mine.html").write_text("<!DOCTYPE html><p>mine")
    (ran / "mine.onnx").write_bytes(b"\xff of another network")
    for command, argv in (
            ("evaluate", ("--checkpoint", ran / "run", "--json", ran / "run/metrics.json")),
            ("bmn", ("--export-proposals", ran / "run/split.json", "--checkpoint", ran / "run")),
            ("export", (ran / "run", "--out", ran / "mine.onnx")),
            ("viewer", (ran / "run", "--out", ran / "mine.html"))):
        assert f"{argv[-1] if command != 'bmn' else argv[1]} exists" in said(capsys, command, *argv)
    for _ in range(2):  # its own it does replace
        said(capsys, "evaluate", "--pred", pred, "--gt", gt, "--json", ran / "m.json", code=0)
        said(capsys, "analysis", ran / "run", "--out", ran / "a.json", code=0)
        said(capsys, "viewer", ran / "run", "--out", ran / "p.html", code=0)


@pytest.mark.parametrize("name", ["split.json", "config.json", "videos.json"])
def test_a_run_begins_in_no_folder_with_files_of_its_names(own, capsys, name):
    (own / "run").mkdir()
    (own / "run" / name).write_text('["v0", "v1", "v2"]')
    refused(own_argv(own), capsys, f"files that a run would replace, {name}")
    assert (own / "run" / name).read_text() == '["v0", "v1", "v2"]'


def test_a_run_begun_anew_has_no_figure_of_the_one_before(ran):
    assert (ran / "run/representation.json").exists() or fig4.main([str(ran / "run")]) == 0
    run_of(ran, "run", "--overwrite")
    assert not (ran / "run/representation.json").exists()


# ---- Beside --resume, --start and --weights -----------------------------------------------------

@pytest.mark.parametrize(("more", "words"), [
    (("--resume", "run", "--init", "run"), "--init"),
    (("--start", "run", "--init", "run", "--out", "new"), "--init"),
    (("--resume", "run", "--paper"), "--paper"),
    (("--resume", "run", "--stage", "supervised"), "is in the stage joint already"),
    (("--resume", "run", "--weights", "raw"), "has pseudo labels of its ema weights"),
])
def test_what_cannot_go_with_resume_is_refused(ran, capsys, more, words):
    argv = [str(ran / word) if word in ("run", "new") else word for word in more]
    before = weights(ran / "run")
    refused(["--dataset", ran / "own.json", *argv] if "--start" in more else argv, capsys, words)
    assert all(torch.equal(value, before[key]) for key, value in weights(ran / "run").items())


def test_a_resumed_run_knows_how_it_began(ran):
    run_of(ran, "second", "--init", ran / "run/detector.pt")
    assert fig4.main([str(ran / "second")]) == 0
    before = read_result(ran / "second/representation.json")["before"]
    again = ["--resume", str(ran / "second"), "--init", str(ran / "run/detector.pt")]
    assert train.main(again) == 0
    assert tables.read_checkpoint(ran / "second")[1].resume == ""
    assert read_result(ran / "second/config.json")["init"] == str(ran / "run/detector.pt")
    assert fig4.main([str(ran / "second")]) == 0
    assert read_result(ran / "second/representation.json")["before"] == before


def test_a_list_is_judged_by_the_weights_that_make_it(whole):
    assert evaluate.Localizer(whole / "run").trust["videos"] == 4
    raw = evaluate.Localizer(whole / "run", weights="raw").trust
    assert raw == {"exclusive": evaluate.Localizer(whole / "run").trust["exclusive"]}


# ---- Results of something else ------------------------------------------------------------------

def test_a_run_that_has_not_ended_is_told(own, capsys):
    assert train.main(own_argv(own, "--stage", "pretrain")) == 0
    text = said(capsys, "evaluate", "--checkpoint", own / "run", code=0)
    assert "its detector is not finished, it is that of stage pretrain, epoch 2" in text


def test_a_run_that_goes_on_has_no_list_to_trust_yet(ran, tmp_path):
    argv = own_argv(ran, "--theta-l", 0.0, "--start", ran / "run", "--out", tmp_path / "new")
    assert train.launch(settings(*argv, "--features", ran / "features")).trust is None


def test_rates_that_differ_are_told(own, capsys):
    users.entries(users.TRAINED[:5], fps=25)(own)
    capsys.readouterr()
    assert train.main(own_argv(own, *users.SUPERVISED, "--trust-grid")) == 0
    assert "25 to 50 frames a second; a new one is taken to have 25" in capsys.readouterr().err
    assert evaluate.Localizer(own / "run").fps == 25


def test_averages_that_mean_different_things_are_not_subtracted(ran, capsys):
    other = run_of(ran, "other", "--tiou", "0.1")
    one = run_of(ran, "one", "--one-class")
    for command in ("intervals", "viewer"):
        assert "other tIoU thresholds" in said(capsys, command, ran / "run", other)
        text = said(capsys, command, ran / "run", one, code=2 if command == "intervals" else 0)
        assert "other annotations of them" in text
    shutil.copytree(ran / "run", ran / "same")
    videos = read_result(ran / "run/videos.json")
    (ran / "same/videos.json").write_text(json.dumps(dict(reversed(videos.items()))))
    assert "warning" not in said(capsys, "viewer", ran / "run", ran / "same", code=0)


def test_the_threshold_of_external_scores_is_no_list_s(own):
    users.text("scores.json", json.dumps({"results": {
        name: {"A": 0.6, "B": 0.4} for name in users.NAMES}}))(own)
    argv = own_argv(own, *users.SUPERVISED, "--one-class", "--ext-scores", own / "scores.json")
    assert train.main(argv) == 0
    assert evaluate.Localizer(own / "run").trust.keys() == {"exclusive"}


def test_a_table_s_runs_are_of_its_labels_and_weights(own, tmp_path):
    (own / "lab").mkdir()
    for name in users.NAMES:
        (own / f"lab/{name}.txt").write_text("2\t8\tA\n")
    (own / "scores.json").write_text("{}")
    base = ("--dataset", own / "lab", "--init", own / "w.pt", "--one-class",
            "--ext-scores", own / "scores.json")
    (own / "w.pt").write_bytes(b"1")
    s = settings(*own_argv(own, *base))
    names = [tables.folder_of(s, "supervised", tmp_path)]
    for file in ("lab/v3.txt", "w.pt", "scores.json"):
        (own / file).write_text("2\t9\tA\n")
        names.append(tables.folder_of(s, "supervised", tmp_path))
    assert len(set(names)) == 4
    (own / "lab/runs").mkdir()
    (own / "lab/runs/x.json").write_text("{}")
    assert tables.folder_of(s, "supervised", tmp_path) == names[-1]


@pytest.mark.parametrize(("more", "words"), [
    (("--seeds", "5,6", "--splits", "a.json", "b.json"), "--splits"),
    (("--check",), "--check"),
    (("--test-subset", "none"), "--test-subset"),
])
def test_a_table_refuses_what_it_cannot_use(own, capsys, more, words):
    argv = ["S1", "--dataset", own / "own.json", "--runs", own / "t", *more]
    assert tables.main([str(word) for word in argv]) == 2
    assert words in capsys.readouterr().err


# ---- The list of new videos ---------------------------------------------------------------------

def listed(ran, capsys, *more, code=0):
    """(what is printed, the results in the file) of all videos of the user."""
    out = ran / "found.json"
    out.unlink(missing_ok=True)
    text = said(capsys, "evaluate", "--checkpoint", ran / "run", "--features", ran / "features",
                "--out", out, *more, code=code)
    return text, read_result(out)["results"] if out.exists() else None


def test_the_least_score_holds_in_the_file(ran, capsys):
    text, found = listed(ran, capsys, "--min-score", 1)
    assert "the best there is" in text
    assert found == {name: [] for name in users.NAMES}


def test_a_fine_grid_keeps_its_times(ran, capsys):
    text, found = listed(ran, capsys, "--fps", 50000, "--min-score", 0)
    segments = [a["segment"] for actions in found.values() for a in actions]
    assert all(end > start for start, end in segments) and "0:00.0" in text


def test_a_list_has_the_ids_of_the_data(ran, capsys):
    for name in users.NAMES:
        (ran / f"features/{name}.npy").rename(ran / f"features/x_{name}_y.npy")
    ends = ("--prefix", "x_", "--extension", "_y.npy")
    run_of(ran, "run", "--overwrite", *ends)
    _, found = listed(ran, capsys)
    assert found.keys() == set(users.NAMES)
    np.save(ran / "features/v3.npy", np.zeros((9, 5)))
    text, found = listed(ran, capsys, code=2)
    assert "two files of the video v3" in text and found is None


def test_what_is_odd_about_a_new_video_is_told(ran, capsys):
    assert "taken for each of the 14 videos" not in listed(ran, capsys)[0]
    one = ("--checkpoint", ran / "run", "--features", ran / "features/v3.npy")
    text = said(capsys, "evaluate", *one, "--duration", 40, code=0)
    assert "span 0.81 times the duration" in text
    assert "--trust-grid" in said(capsys, "evaluate", *one, "--duration", 1000)
    assert "0.03 times" in said(capsys, "evaluate", *one, "--duration", 1000, "--trust-grid",
                                code=0)
    x = np.load(ran / "features/v3.npy")
    x[5:9] = np.nan
    np.save(ran / "features/v3.npy", x)
    text = said(capsys, "evaluate", *one, "--fill-gaps", code=0)
    assert "4 steps of 1 videos hold NaN or infinity and were filled" in text
    localize = evaluate.Localizer(ran / "run", fps=np.float64(50), device=torch.device("cpu"))
    for feats, duration in ((x, "32.5"), ([[1, 2], [3]], None)):
        with pytest.raises(BadInput):
            localize(feats, duration)


def test_a_resumed_run_with_other_labels_of_its_tests_says_no_gain(ran, capsys):
    edit(ran, lambda database: database["v13"]["annotations"].pop())
    more = ("--resume", ran / "run", "--no-page", "--dataset", ran / "own.json", "--features",
            ran / "features")
    assert " -> APL " not in said(capsys, "train", *more, code=0)


def test_a_bad_file_is_told_before_the_first_is_searched(ran, capsys):
    np.save(ran / "features/z.npy", np.zeros((9, 7)))
    text, found = listed(ran, capsys, code=2)
    assert text.startswith("error: video z: feature") and text.count("\n") == 1 and found is None
    (ran / "features/z.npy").unlink()
    text, _ = listed(ran, capsys, "--duration", 3, code=2)
    assert "--duration" in text
    run_of(ran, "run", "--overwrite", "--stride", 0)
    assert len(listed(ran, capsys, "--duration", 32.5)[1]) == 14  # all have it
    nowhere = ("--duration", 32.5, "--out", ran / "nowhere/f.csv")
    assert "no folder" in listed(ran, capsys, *nowhere, code=2)[0]


# ---- Other commands -----------------------------------------------------------------------------

def test_annotations_that_say_no_time_are_told(tmp_path, capsys):
    via = {"project": {}, "attribute": {"1": {"anchor_id": "FILE1_Z2_XY0"}},
           "file": {"5": {"fname": "clip.mp4"}}, "view": {"1": {"fid_list": ["5"]}},
           "metadata": {"a": {"vid": "1", "z": [5], "av": {"1": "hit"}},
                        "b": {"vid": "1", "z": [5, 7], "av": {"1": "hit"}}}}
    box = {"type": "rectangle", "value": {"x": 1}}
    range_ = {"type": "labels", "value": {"start": 1, "end": 2, "labels": ["a"]}}
    person = {"type": "labels", "value": {"start": 3, "end": 9, "text": "Ann", "labels": ["b"]}}
    tasks = [{"data": {"audio": "/d/clip.wav"},
              "annotations": [{"result": [box, range_, person]}]}]
    for name, content, words in (("v", via, "1 regions are no segments"),
                                 ("s", tasks, "of the kinds labels, rectangle")):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        argv = [tmp_path / f"{name}.json", "--out", tmp_path / f"{name}2.json", "--fps", 25]
        assert annotations.main([str(word) for word in argv]) == 0
        text = capsys.readouterr().err
        assert words in text and "--fps is not used" in text


def test_proposals_of_other_videos_are_refused(own, capsys):
    database = read_result(own / "own.json")["database"]
    results = {f"v_{name}": [{"segment": [1, 5], "score": 1.0}] for name in database}
    (own / "p.json").write_text(json.dumps({"results": results}))
    argv = (f"--proposals={own / 'p.json'}", "--gt", own / "own.json")
    assert "4 of 4 test videos have no proposal" in said(capsys, "bmn", *argv)


def test_proposals_name_the_labels_that_the_detector_has_seen(own):
    tiny = ("--hidden", 8, "--map-wide", 8, "--map-width", 4, "--samples", 4, "--max-steps", 40)
    argv = own_argv(own, "--acp", "none", *tiny, "--stage", "supervised")
    assert bmn.main(argv) == 0
    seen = read_result(own / "run/split.json")["labelled"]
    argv = [f"--export-proposals={own / 'q.json'}", f"--checkpoint={own / 'run/detector.pt'}"]
    assert bmn.main(argv) == 0
    assert read_result(own / "q.json")["labelled"] == seen
    first = read_result(own / "q.json")["results"]["v1"]
    edit(own, lambda database: database.update(
        {f"w{i}": database["v0"] | {"annotations": []} for i in range(10)}))
    for i in range(10):
        np.save(own / f"features/w{i}.npy", 9 * np.load(own / "features/v0.npy"))
    argv = [f"--export-proposals={own / 'p.json'}", f"--checkpoint={own / 'run'}"]
    assert bmn.main(argv) == 0
    result = read_result(own / "p.json")
    assert result["labelled"] == seen
    assert result["results"]["v1"] == first  # standardised as in training, whatever came since


def test_a_checkpoint_of_another_detector_is_named_so(own, capsys):
    tiny = ("--hidden", 8, "--map-wide", 8, "--map-width", 4, "--samples", 4, "--max-steps", 40)
    assert bmn.main(own_argv(own, "--acp", "none", *tiny, "--stage", "supervised")) == 0
    for command, argv in (("evaluate", ("--checkpoint", own / "run")),
                          ("export", (own / "run", "--out", own / "d.pt2"))):
        assert "is of another detector" in said(capsys, command, *argv)


def test_recordings_that_are_not_played_are_told(ran, capsys):
    (ran / "films").mkdir()
    for name in ("v10.mp4", "v10.webm", "holiday.mp4"):
        (ran / "films" / name).write_bytes(b"")
    text = said(capsys, "viewer", ran / "run", "--videos", ran / "films", code=0)
    assert "2 recordings are not used: v10.webm, holiday.mp4" in text
    assert "13 of 14 videos of the run have no recording" in text


def test_hidden_labels_of_some_videos_are_told(ran, capsys):
    unlabelled = read_result(ran / "run/split.json")["unlabelled"]
    edit(ran, lambda database: [database.pop(name) for name in unlabelled[1:]])
    text = said(capsys, "analysis", ran / "run", "--hidden", ran / "own.json", code=0)
    assert f"lacks {len(unlabelled) - 1} of {len(unlabelled)} videos" in text


def test_a_root_is_of_published_data(own, capsys):
    refused(users.check(own, "--root", "nowhere"), capsys, "--root")


def test_fig4_complains_in_one_sentence(capsys):
    assert fig4.main([]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1
