"""Tests of what people see and use: a new video, the console, --help, weights from elsewhere."""
import csv
import json

import numpy as np
import pytest
import torch

import data
import evaluate
import train
from tests.helpers import (
    SHARED,
    evaluated,
    needs_shared,
    own_argv,
    read_log,
    read_result,
    refused,
    settings,
)

# ---- A new video --------------------------------------------------------------------------------

def test_python_command_and_run_find_the_same_in_a_video(own, capsys):
    assert train.main(own_argv(own, "--stage", "supervised")) == 0
    predicted = read_result(own / "run/predictions.json")["results"]["v12"]
    assert len(predicted) > 10
    for path in (own / "run", own / "run/checkpoint.pt", own / "run/detector.pt"):
        localize = evaluate.Localizer(path)
        segments, labels, scores = localize(np.load(own / "features/v12.npy"))
        assert labels == [d["label"] for d in predicted]
        assert scores.tolist() == pytest.approx([d["score"] for d in predicted], abs=1e-6)
        expected = np.array([d["segment"] for d in predicted])
        assert np.abs(segments - expected).max() < 1e-4
    video = ("--checkpoint", own / "run/detector.pt", "--features", own / "features/v12.npy")
    least = predicted[4]["score"]
    assert evaluated(*video, "--min-score", least - 1e-6, "--out", own / "found.json") == 0
    found = read_result(own / "found.json")["results"]["v12"]
    rounded = [(d["label"], round(d["score"], 2)) for d in predicted[:5]]
    assert [(d["label"], d["score"]) for d in found] == rounded
    capsys.readouterr()
    assert evaluated(*video, "--min-score", least - 1e-6) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert f"{rounded[0][1]:.2f}  {rounded[0][0]}" in lines[1]


def test_what_is_found_is_written_as_json_csv_and_subtitles(own, capsys):
    assert train.main(own_argv(own, "--stage", "supervised", "--supervised-epochs", 1)) == 0
    folder = ("--checkpoint", own / "run", "--features", own / "features", "--min-score", 0)
    assert evaluated(*folder, "--out", own / "found.csv") == 0
    with open(own / "found.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["video"] for row in rows} == {f"v{i}" for i in range(14)}
    one = ("--checkpoint", own / "run", "--features", own / "features/v1.npy", "--min-score", 0)
    assert evaluated(*one, "--out", own / "found.srt") == 0
    first = (own / "found.srt").read_text().split("\n\n")[0].splitlines()
    assert first[0] == "1"
    assert " --> " in first[1]
    capsys.readouterr()
    refused(["evaluate", *folder, "--out", own / "found.srt"], capsys, "found.srt", "one video")
    refused(["evaluate", *one, "--out", own / "found.txt"], capsys, "found.txt")
    np.save(own / "wide.npy", np.zeros((20, 7)))
    wide = ("--checkpoint", own / "run", "--features", own / "wide.npy")
    refused(["evaluate", *wide], capsys, "7 channels", "5")


def test_the_grid_of_a_new_video_can_be_another(own):
    assert train.main(own_argv(own, "--stage", "supervised", "--supervised-epochs", 1)) == 0
    feats = np.load(own / "features/v1.npy")
    as_trained = evaluate.Localizer(own / "run")(feats)
    twice = evaluate.Localizer(own / "run", fps=25.0)(feats)
    assert np.allclose(2 * as_trained[0], twice[0], atol=1e-4)


def test_clocks():
    assert evaluate.clock(3.04) == "0:03.0"
    assert evaluate.clock(59.96) == "1:00.0"
    assert evaluate.clock(3725.5, ",") == "01:02:05,500"


# ---- The console and what a run leaves ----------------------------------------------------------

def test_the_console_has_a_line_an_epoch_of_at_most_100_columns(own, capsys):
    assert train.main(own_argv(own, "--theta-l", 0.0, "--log-every", 1)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:-7])) <= 100
    for stage in train.STAGES:
        mine = [line for line in lines if line.startswith(stage) and line.endswith(" left")]
        assert len(mine) == 2
        assert len([row for row in read_log(own / "run") if row["stage"] == stage]) > 2
    metrics = read_result(own / "run/metrics.json")
    before, after = 100 * metrics["supervised_mAP"], 100 * metrics["average_mAP"]
    assert f"supervised {before:.2f} -> APL {after:.2f}" in lines
    assert "--features video.npy" in lines[-1]


def test_what_stage_2_reached_is_the_same_in_a_run_of_its_own(own):
    assert train.main(own_argv(own)) == 0
    assert train.main(own_argv(own, "--stage", "supervised", "--out", own / "two")) == 0
    two = read_result(own / "two/metrics.json")
    assert read_result(own / "run/metrics.json")["supervised_mAP"] == two["average_mAP"]


def test_a_run_leaves_what_its_page_shows(own):
    assert train.main(own_argv(own, "--page", "--pretrain-epochs", 1)) == 0
    videos = read_result(own / "run/videos.json")
    parts = [video["part"] for video in videos.values()]
    assert [parts.count(part) for part in ("labelled", "unlabelled", "test")] == [3, 7, 4]
    hidden = [video for video in videos.values() if video["part"] == "unlabelled"]
    assert all(video["annotations"] is None for video in hidden)
    assert videos["v12"]["annotations"][0] == {"segment": [2.0, 8.0], "label": "A"}
    points = read_result(own / "run/representation.json")
    assert len(points["label"]) == len(points["before"]) == len(points["after"]) == 3 * 10
    assert points["before"] != points["after"]
    assert points["classes"] == ["A", "B", "background"]
    assert "v12" in (own / "run/page.html").read_text()


def test_help_lists_what_matters_first_with_the_defaults_in_force(capsys):
    def text_of(*argv):
        with pytest.raises(SystemExit) as end:
            train.main([*argv, "--help"])
        assert end.value.code == 0
        return " ".join(capsys.readouterr().out.split())

    text = text_of()
    assert text.index("--dataset") < text.index("--stride") < text.index("--focal-alpha")
    assert "[S] the paper states it" in text
    assert "one of mean+std, mean, mean-std, fixed, frequency" in text
    assert "0: every video is cut into as many as it has (default 1.0)" in text
    assert "(default 4.0)" in text_of("--dataset", "thumos")


# ---- Weights from elsewhere ---------------------------------------------------------------------

def test_a_run_starts_from_the_weights_of_another_with_other_classes(own, capsys):
    assert train.main(own_argv(own, "--stage", "supervised")) == 0
    more = ("--init", own / "run/checkpoint.pt", "--ignore-labels", "B", "--out", own / "one")
    capsys.readouterr()
    assert train.main(own_argv(own, *more, "--stage", "pretrain", "--pretrain-epochs", 0)) == 0
    text = capsys.readouterr().out
    assert "new: cls_out.weight, cls_out.bias;" in text
    first = torch.load(own / "run/checkpoint.pt", weights_only=True)["ema"]
    second = torch.load(own / "one/checkpoint.pt", weights_only=True)["detector"]
    assert torch.equal(first["reg_out.weight"], second["reg_out.weight"])
    (own / "other.pt").write_bytes(b"")
    argv = own_argv(own, "--init", own / "other.pt", "--out", own / "two")
    refused(argv, capsys, "other.pt", "cannot be read")
    torch.save({"state_dict": {"module.x": torch.zeros(2)}}, own / "other.pt")
    refused(argv, capsys, "other.pt", "no weight")


@needs_shared
@pytest.mark.parametrize("part", ["state_dict", "state_dict_ema"])
def test_a_public_checkpoint_gives_all_but_what_it_lacks(tmp_path, part):
    path = SHARED / "reference/actionformer_tiny.pth.tar"
    state = torch.load(path, weights_only=True)["state_dict"]
    torch.save({part: {f"module.{key}": value for key, value in state.items()}}, tmp_path / "a.pt")
    config = json.loads((SHARED / "reference/actionformer_tiny.json").read_text())
    ranges = ",".join(f"{low}:{high}" for low, high in config["regression_range"])
    s = settings("--channels", config["embd_dim"], "--heads", config["n_head"], "--windows",
                 config["n_mha_win_size"], "--ranges", ranges)
    detector = train.model.Detector(config["input_dim"], config["num_classes"], s)
    text = evaluate.take_weights(detector, tmp_path / "a.pt")
    assert "new: quality.tiou.weight" in text
    assert text.endswith("not used: none")
    expected = evaluate.public_weights(state)
    mine = detector.state_dict()
    assert all(torch.equal(mine[name], value) for name, value in expected.items())


@needs_shared
def test_real_clips_go_through_a_detector_of_their_width(tmp_path):
    clips = SHARED / "data/thumos14/clips"
    argv = ["--dataset", "thumos", "--annotations", clips / "clips.json", "--features", clips,
            "--train-subset", "test", "--ratio", 0.5, "--channels", 16, "--device", "cpu"]
    shape = settings(*argv)
    other = train.model.Detector(2048, 20, shape)
    torch.save({"state_dict": other.state_dict()}, tmp_path / "af.pt")
    steps = ["--pretrain-epochs", 1, "--supervised-epochs", 1, "--supervised-steps", 1,
             "--joint-epochs", 1, "--no-page", "--init", tmp_path / "af.pt", "--out",
             tmp_path / "run"]
    assert train.main([str(word) for word in argv + steps]) == 0
    segments, labels, scores = evaluate.Localizer(tmp_path / "run")(clips / "highjump.npy")
    assert len(segments) == len(labels) == len(scores) > 0
    with pytest.raises(data.BadInput, match="2048"):
        evaluate.Localizer(tmp_path / "run")(np.zeros((9, 4)))


# ---- Classes from elsewhere ---------------------------------------------------------------------

def test_video_level_scores_name_the_classes_of_a_detector_without(own, capsys):
    argv = own_argv(own, "--one-class", "--stage", "supervised", "--supervised-steps", 60)
    assert train.main(argv) == 0
    alone = read_result(own / "run/metrics.json")
    assert set(alone["ap"]) == {"action"}
    assert alone["external_scores"] == ""
    truth = json.loads((own / "own.json").read_text())["database"]
    labels = {name: [a["label"] for a in entry["annotations"]] for name, entry in truth.items()}
    lists = {name: [labels[name].count("A"), labels[name].count("B"), 0] for name in labels}
    content = {"results": lists, "class": ["A", "B", "C"]}
    (own / "scores.json").write_text(json.dumps(content))
    capsys.readouterr()
    evaluating = ("--checkpoint", own / "run", "--ext-scores", own / "scores.json")
    assert evaluated(*evaluating, "--json", own / "m.json") == 0
    assert "with external video-level scores" in capsys.readouterr().out
    named = read_result(own / "m.json")
    assert set(named["ap"]) == {"A", "B"}
    assert named["average_mAP"] > 0
    assert named["external_scores"] == str(own / "scores.json")
    (own / "scores.json").write_text('{"results": {"v12": [1, 2]}}')
    refused(["evaluate", *evaluating], capsys, "scores.json", "v12")
    refused(own_argv(own, "--ext-scores", own / "scores.json"), capsys, "--one-class")


def test_each_detection_gets_the_two_best_classes_of_its_video():
    one = [{"label": "action", "score": 0.25, "segment": [1, 2]}]
    results = {"a": one, "b": one, "c": one}
    scores = {"a": {"x": 0.04, "y": 1.0, "z": 0.0}, "v_b": {"x": 0.16}}
    found = evaluate.with_video_scores(results, scores)
    assert [(d["label"], d["score"]) for d in found["a"]] == [
        ("y", pytest.approx(0.5)), ("x", pytest.approx(0.1))]
    assert [(d["label"], d["score"]) for d in found["b"]] == [("x", pytest.approx(0.2))]
    assert found["c"] == []
