"""Tests of what people see and use: a new video, the console, --help, weights from elsewhere."""
import csv
import io
import json

import numpy as np
import pytest
import torch

import evaluate
import train
from extras import viewer
from plumbing import forms, listing, public
from plumbing.words import BadInput
from tests import helpers
from tests.helpers import SHARED, evaluated, finished, needs_shared, own_argv, read_result, refused


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A user's data set with a run of all stages and its page; no test changes it."""
    more = ("--theta-l", 0.0, "--log-every", 1, "--page")
    return finished(tmp_path_factory, train.main, own_argv, *more)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The same data set with a run of stages 1 and 2; no test changes it."""
    return finished(tmp_path_factory, train.main, own_argv, "--stage", "supervised")


def assert_found(predicted, localize, path):
    """A Localizer finds in a file of features what a run predicted of the video."""
    segments, labels, scores = localize(np.load(path))
    assert labels == [d["label"] for d in predicted]
    assert scores.tolist() == pytest.approx([d["score"] for d in predicted], abs=1e-6)
    assert np.abs(segments - [d["segment"] for d in predicted]).max() < 1e-4


def look_into(main, kind, whole, out):
    """A user's run of another detector detects in a video as in its own test, and has a page.

    -> what the run predicted in the video, and what the command found in it, written to `out`"""
    run, video = whole / "run", whole / "features/v12.npy"
    assert f"{kind.EVALUATE} --checkpoint" in (whole / "stdout").read_text()
    predicted = read_result(run / "predictions.json")["results"]["v12"]
    assert len(predicted) > 3
    localize = evaluate.Localizer(run, kind=kind)
    assert_found(predicted, lambda feats: localize(feats, name="v12"), video)
    assert main("--checkpoint", run, "--features", video, "--min-score", 0, "--out", out) == 0
    assert main("--checkpoint", run) == 0
    assert viewer.main([str(run)]) == 0
    assert (run / "page.html").stat().st_size > 10_000
    return predicted, read_result(out)["results"]["v12"]


def test_python_command_and_run_find_the_same_in_a_video(two, tmp_path, capsys):
    features = two / "features/v12.npy"
    predicted = read_result(two / "run/predictions.json")["results"]["v12"]
    assert len(predicted) > 10
    for path in (two / "run", two / "run/checkpoint.pt", two / "run/detector.pt"):
        assert_found(predicted, evaluate.Localizer(path), features)
    video = ("--checkpoint", path, "--features", features, "--min-score",
             predicted[4]["score"] - 1e-6)
    assert evaluated(*video, "--out", tmp_path / "found.json") == 0
    found = read_result(tmp_path / "found.json")["results"]["v12"]
    in_time = sorted(listing.once(predicted[:5]), key=lambda d: d["segment"])
    rounded = [(d["label"], round(d["score"], 4)) for d in in_time]
    assert [(d["label"], d["score"]) for d in found] == rounded
    capsys.readouterr()
    assert evaluated(*video) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(in_time)
    assert f"{rounded[0][1]:.2f}  {rounded[0][0]}" in lines[1]
    # What Python gives may be a file, an array, a tensor.
    localize = evaluate.Localizer(two / "run")
    x = torch.from_numpy(np.load(features)).bfloat16()
    for given, scores in (
            (str(features), localize(features)[2]), (x, localize(x.float().numpy())[2]),
            (x.float().requires_grad_(), localize(x.float().tolist())[2])):
        assert np.allclose(localize(given)[2], scores, atol=1e-6)
    # The grid of a new video can be another.
    as_trained = evaluate.Localizer(two / "run")(np.load(features))[0]
    twice = evaluate.Localizer(two / "run", fps=25.0)(np.load(features))[0]
    assert len(twice)
    assert np.allclose(2 * as_trained, twice, atol=1e-4)


def test_what_is_found_is_written_as_json_csv_and_subtitles(two, tmp_path, capsys):
    argv = ("--checkpoint", two / "run", "--min-score", 0, "--features")
    one, table, titles = two / "features/v1.npy", tmp_path / "found.csv", tmp_path / "found.srt"
    assert evaluated(*argv, two / "features", "--out", table) == 0
    rows = csv.DictReader(table.read_text().splitlines())
    assert {row["video"] for row in rows} == {f"v{i}" for i in range(14)}
    assert evaluated(*argv, one, "--out", titles) == 0
    first = titles.read_text().split("\n\n")[0].splitlines()
    assert first[0] == "1"
    assert " --> " in first[1]
    np.save(tmp_path / "wide.npy", np.zeros((20, 7)))
    for *bad, words in ((two / "features", "--out", titles, ["found.srt", "one video"]),
                        (one, "--out", titles, ["found.srt exists"]),
                        (one, "--out", tmp_path / "found.doc", ["found.doc"]),
                        (tmp_path / "wide.npy", ["7 channels", "5"])):
        capsys.readouterr()
        refused(["evaluate", *argv, *bad], capsys, *words)
    odd = {name: [{"segment": [1.0, 2.0], "label": name, "score": 0.5}]
           for name in ("=1+1", "+a", "-1", "@x", "a\n\n2\nb")}
    forms.write_found(table, odd)
    cells = [row["label"] for row in csv.DictReader(io.StringIO(table.read_text()))]
    assert cells == ["'=1+1", "'+a", "'-1", "'@x", "a\n\n2\nb"]  # no formula of a spreadsheet
    forms.write_found(titles, {"v": odd["a\n\n2\nb"]})
    assert titles.read_text().count("\n\n") == 0 and "\na 2 b 0.50\n" in titles.read_text()
    assert [forms.clock(3.04), forms.clock(59.96)] == ["0:03.0", "1:00.0"]
    assert forms.subtitle_clock(3725.5) == "01:02:05,500"


def test_the_list_is_what_the_runs_own_test_says_can_be_trusted(two, capsys):
    trust = read_result(two / "run/metrics.json")["trust"]
    argv = ("--checkpoint", two / "run", "--features", two / "features/v11.npy")
    assert evaluated(*argv) == 0
    first, counted, *lines = capsys.readouterr().out.splitlines()
    right, found = (f"{100 * trust[key]:.0f} %" for key in ("precision", "recall"))
    assert first == f"of such actions {right} were right on 4 test videos, {found} were found"
    assert f"{len(lines)} actions of a score of at least {trust['score']:.3g}" in counted
    assert evaluated(*argv, "--min-score", 1) == 0
    counted, *lines = capsys.readouterr().out.splitlines()
    assert "0 actions of a score of at least 1; the best there is:" in counted and len(lines) == 1
    segments = [[8.0, 9.0], [1.0, 5.0], [1.2, 5.0], [4.0, 7.0]]
    found = np.array(segments), list("abca"), np.array([0.3, 0.5, 0.6, 0.2])
    for exclusive, expected in ((False, [1, 2, 3, 0]), (True, [2, 3, 0])):
        listed, below = listing.actions_of(found, 0.1, exclusive)
        assert [a["segment"] for a in listed] == [segments[i] for i in expected] and not below


def test_the_console_has_short_lines_and_a_run_leaves_what_its_page_shows(whole, two):
    run, lines = whole / "run", (whole / "stdout").read_text().splitlines()
    assert max(map(len, lines[:-7])) <= 100
    for stage in train.STAGES:
        epochs = [line for line in lines if line.startswith(stage) and line.endswith(" left")]
        assert len(epochs) == 2
        assert len([row for row in helpers.read_log(run) if row["stage"] == stage]) > 2
    metrics = read_result(run / "metrics.json")
    before, after = 100 * metrics["supervised_mAP"], 100 * metrics["average_mAP"]
    assert f"supervised {before:.2f} -> APL {after:.2f}" in lines
    assert "--features video.npy" in lines[-1]
    assert metrics["supervised_mAP"] == read_result(two / "run/metrics.json")["average_mAP"]
    videos = read_result(run / "videos.json")
    parts = [video["part"] for video in videos.values()]
    assert [parts.count(part) for part in ("labelled", "unlabelled", "test")] == [3, 7, 4]
    hidden = [video for video in videos.values() if video["part"] == "unlabelled"]
    assert all(video["annotations"] is None for video in hidden)
    assert videos["v12"]["annotations"][0] == {"segment": [2.0, 8.0], "label": "A"}
    points = read_result(run / "representation.json")
    assert len(points["label"]) == len(points["before"]) == len(points["after"]) == 3 * 10
    assert points["before"] != points["after"]
    assert points["classes"] == ["A", "B", "background"]
    assert "v12" in (run / "page.html").read_text()


def test_help_lists_what_matters_first_with_the_defaults_in_force(capsys):
    texts = []
    for argv in (["--help"], ["--dataset", "thumos", "--help"]):
        with pytest.raises(SystemExit, match="^0$"):
            train.main(argv)
        texts.append(" ".join(capsys.readouterr().out.split()))
    text, thumos = texts
    assert text.index("--dataset") < text.index("--stride") < text.index("--focal-alpha")
    assert "[S] the paper states it" in text
    assert "one of mean+std, mean, mean-std, fixed, frequency" in text
    assert "0: every video is cut into as many as it has (default 1.0)" in text
    assert "(default 4.0)" in thumos


# ---- Weights and classes from elsewhere ---------------------------------------------------------

def test_a_run_starts_from_the_weights_of_another_with_other_classes(two, tmp_path, capsys):
    more = ("--init", two / "run/checkpoint.pt", "--ignore-labels", "B", "--stage", "pretrain",
            "--pretrain-epochs", 0, "--out", tmp_path / "run")
    assert train.main(own_argv(two, *more)) == 0
    assert "new: cls_out.weight, cls_out.bias;" in capsys.readouterr().out
    first, second = helpers.weights(two / "run"), helpers.weights(tmp_path / "run")
    assert torch.equal(first["ema.reg_out.weight"], second["detector.reg_out.weight"])
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"state_dict": {"module.x": torch.zeros(2)}}, tmp_path / "other.pt")
    for name, words in (("empty.pt", "cannot be read"), ("other.pt", "no weight")):
        argv = own_argv(two, "--init", tmp_path / name, "--out", tmp_path / "two")
        refused(argv, capsys, name, words)


@needs_shared
@pytest.mark.parametrize("part", ["state_dict", "state_dict_ema"])
def test_a_public_checkpoint_gives_all_but_what_it_lacks(tmp_path, part):
    path = SHARED / "reference/actionformer_tiny.pth.tar"
    state = torch.load(path, weights_only=True)["state_dict"]
    torch.save({part: {f"module.{key}": value for key, value in state.items()}}, tmp_path / "a.pt")
    config = read_result(SHARED / "reference/actionformer_tiny.json")
    detector = helpers.small_detector(
        config["num_classes"], config["input_dim"], channels=config["embd_dim"],
        heads=config["n_head"], windows=str(config["n_mha_win_size"]),
        ranges=",".join(f"{low}:{high}" for low, high in config["regression_range"]))
    text = public.take_weights(detector, tmp_path / "a.pt")
    assert "new: quality.tiou.weight" in text
    assert text.endswith("not used: none")
    mine, expected = detector.state_dict(), public.public_weights(state)
    assert helpers.same({name: mine[name] for name in expected}, expected)


@needs_shared
def test_real_clips_go_through_a_detector_of_their_width(tmp_path):
    clips = SHARED / "data/thumos14/clips"
    argv = ["--dataset", "thumos", "--annotations", clips / "clips.json", "--features", clips,
            "--train-subset", "test", "--ratio", 0.5, "--channels", 16, "--device", "cpu"]
    other = train.model.Detector(2048, 20, helpers.settings(*argv))
    torch.save({"state_dict": other.state_dict()}, tmp_path / "af.pt")
    argv += ["--pretrain-epochs", 1, "--supervised-epochs", 1, "--supervised-steps", 1,
             "--joint-epochs", 1, "--no-page", "--init", tmp_path / "af.pt",
             "--out", tmp_path / "run"]
    assert train.main([str(word) for word in argv]) == 0
    localize = evaluate.Localizer(tmp_path / "run")
    segments, labels, scores = localize(clips / "highjump.npy")
    assert len(segments) == len(labels) == len(scores) > 0
    with pytest.raises(BadInput, match="2048"):
        localize(np.zeros((9, 4)))
    for wrong, words in ((np.full((9, 2048), np.nan), "the array holds nan at step 0"),
                         (np.zeros(9), r"the array must hold .*\(T, D\)")):
        with pytest.raises(BadInput, match=words) as told:
            localize(wrong)
        assert len(str(told.value)) < 250
    with pytest.raises(BadInput, match="min_scor is no setting; do you mean min_score"):
        evaluate.Localizer(tmp_path / "run", min_scor=0.5)
    few = evaluate.Localizer(tmp_path / "run", min_score=float(scores[0]) - 1e-6)
    assert 0 < len(few(clips / "highjump.npy")[0]) < len(segments)


def test_video_level_scores_name_the_classes_of_a_detector_without(own, capsys):
    external = own / "scores.json"
    argv = own_argv(own, "--one-class", "--stage", "supervised", "--supervised-steps", 60)
    assert train.main(argv) == 0
    alone = read_result(own / "run/metrics.json")
    assert set(alone["ap"]) == {"action"}
    assert alone["external_scores"] == ""
    lists = {}
    for name, entry in read_result(own / "own.json")["database"].items():
        labels = [a["label"] for a in entry["annotations"]]
        lists[name] = [labels.count("A"), labels.count("B"), 0]
    external.write_text(json.dumps({"results": lists, "class": ["A", "B", "C"]}))
    capsys.readouterr()
    evaluating = ("--checkpoint", own / "run", "--ext-scores", external)
    assert evaluated(*evaluating, "--json", own / "m.json") == 0
    assert "with external video-level scores" in capsys.readouterr().out
    named = read_result(own / "m.json")
    assert set(named["ap"]) == {"A", "B"}
    assert named["average_mAP"] > 0
    assert named["external_scores"] == str(external)
    external.write_text('{"results": {"v12": [1, 2]}}')
    refused(["evaluate", *evaluating], capsys, "scores.json", "v12")
    refused(own_argv(own, "--ext-scores", external), capsys, "--one-class")


def test_each_detection_gets_the_two_best_classes_of_its_video():
    one = [{"label": "action", "score": 0.25, "segment": [1, 2]}]
    scores = {"a": {"x": 0.04, "y": 1.0, "z": 0.0}, "v_b": {"x": 0.16}}
    found = forms.with_video_scores(dict.fromkeys("abc", one), scores)
    pairs = {name: [(d["label"], d["score"]) for d in listed] for name, listed in found.items()}
    assert pairs == {"a": [("y", pytest.approx(0.5)), ("x", pytest.approx(0.1))],
                     "b": [("x", pytest.approx(0.2))], "c": []}
