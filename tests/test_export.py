"""Tests of extras/export.py: what a file gives other programs, at any length."""
import json
import shutil

import numpy as np
import pytest
import torch

import data
import evaluate
import model
import train
from extras import export
from plumbing import forms
from tests.helpers import finished, own_argv, read_result

LENGTHS = (1, 5, 67, 100, 140)  # traced with 64; the levels' strides are 1 and 2
NETWORK = ("--windows", "5,0", "--ranges", "0:8,8:inf", "--stem", 1)
SHORT = ("--stage", "supervised", "--acp", "none", "--supervised-epochs", 1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A user's data set with a run of a very small detector."""
    return finished(tmp_path_factory, train.main, lambda own: own_argv(own, *SHORT, *NETWORK))


@pytest.fixture(scope="module")
def exported(trained):
    """(a run's folder, its detector as a function, what stands in the .json beside it)."""
    path = trained / "detector.pt2"
    assert export.main([str(trained / "run"), "--out", str(path)]) == 0
    return trained / "run", torch.export.load(path).module(), read_result(trained / "detector.json")


def features_of(steps):
    """Features like those of the data set, as the extractor gave them."""
    return np.random.default_rng(steps).normal(1, 2, (steps, 5)).astype(np.float32)


def detections_of(segments, scores, told):
    """What a user's program makes of a file's outputs: [(class, start, end, score)], best first.

    By hand: thresholds, Gaussian Soft-NMS class by class, seconds."""
    found = []
    for c, name in enumerate(told["classes"]):
        long = segments[:, 1] - segments[:, 0] > told["min_length"]
        good = long & (scores[:, c] > told["min_score"])
        boxes, left = segments[good], scores[good, c].copy()
        while len(left) and left.max() >= told["min_score"]:
            best = left.argmax()
            start, end = boxes[best]
            found.append((name, start, end, left[best]))
            overlap = (np.minimum(end, boxes[:, 1]) - np.maximum(start, boxes[:, 0])).clip(0)
            union = (end - start) + (boxes[:, 1] - boxes[:, 0]) - overlap
            left *= np.exp(-(overlap / union) ** 2 / told["nms_sigma"])
            left[best] = -1
    found.sort(key=lambda one: -one[3])
    return found[:told["max_detections"]]


def in_seconds(steps, told):
    """Grid steps in seconds, by the formula that stands beside a file."""
    return eval(told["seconds"], {}, told | {"steps": steps})


# ---- The file -----------------------------------------------------------------------------------

@pytest.mark.parametrize("steps", LENGTHS)
def test_a_file_gives_what_the_detector_gives_at_any_length(exported, steps):
    run, function, _ = exported
    localize = evaluate.Localizer(run, device="cpu")
    feats = features_of(steps)
    item = data.load_item(data.place_video(
        "v", forms.unknown_video(None, 50.0), feats, steps, localize.s), localize,
        localize.s)
    outputs = localize.detector.eval()(item["feats"][None], torch.ones(1, steps).bool())
    scores = evaluate.joint_score(outputs.p_cls(), outputs.p_tiou, outputs.p_tnd, localize.s.eps)
    found = function(torch.from_numpy(feats)[None])
    assert found[0].shape == (steps + (steps + 1) // 2, 2)
    assert torch.allclose(found[0], outputs.segments()[0], rtol=1e-5, atol=1e-4)
    assert torch.allclose(found[1], scores[0], rtol=0, atol=1e-6)


def test_what_lies_beside_a_file_is_enough_for_the_localizers_detections(exported):
    run, function, told = exported
    feats = features_of(90)
    segments, scores = (x.detach().numpy() for x in function(torch.from_numpy(feats)[None]))
    found = detections_of(segments, scores, told)
    expected = evaluate.Localizer(run, device="cpu")(feats)
    assert len(found) == len(expected[0]) > 5
    for mine, segment, label, score in zip(found, *expected):
        assert mine[0] == label
        assert mine[3] == pytest.approx(score, abs=1e-5)
        seconds = np.array([in_seconds(steps, told) for steps in mine[1:3]])
        assert np.allclose(seconds.clip(0, (89 * 25 + 50) / 50), segment, atol=1e-3)


def test_the_least_length_gives_every_level_two_blocks_of_attention(monkeypatch):
    blocks = []
    attend = model.F.scaled_dot_product_attention

    def count(q, *more, **named):
        blocks.append(len(q))
        return attend(q, *more, **named)

    monkeypatch.setattr(model.F, "scaled_dot_product_attention", count)
    for windows in ("5,5,5", "19,40,7", "1,3,33"):
        s = model.DetectorSettings(
            channels=8, heads=1, windows=windows, ranges="0:4,4:8,8:inf", stem=1)
        detector = model.Detector(3, 2, s).eval()
        least = export.least_steps(s)
        for steps, enough in ((least, True), (least - 4, False)):
            blocks.clear()
            detector(torch.zeros(1, steps, 3), torch.ones(1, steps).bool())
            assert (min(blocks) > 1) == enough, (windows, steps)


def portable(**changes):
    """A Portable of a small detector without a run."""
    s = evaluate.DetectionSettings(
        channels=8, heads=1, windows="5,0", ranges="0:4,4:inf", stem=1, **changes)
    torch.manual_seed(1)

    class Localize:
        detector = s.build(5, 2)
        mean, std = torch.full((5,), 2.0), torch.full((5,), 3.0)
        classes, fps = ["a", "b"], 25.0

    Localize.s = s
    return export.Portable(Localize).eval(), Localize


@torch.no_grad()
@pytest.mark.parametrize("view", ["all", "both"])
def test_features_are_standardised_and_resized_as_in_training(view):
    network, localize = portable(resize=40, stride=4.0, frames=16.0, input_view=view)
    function = export.pt2_of(network, {})[1]
    for steps in (33, 40, 151):
        feats = features_of(steps)
        video = data.place_video(
            "v", forms.unknown_video(None, 25.0), feats, steps, localize.s)
        item = data.load_item(video, localize, localize.s)
        outputs = network.detector(item["feats"][None], torch.ones(1, 40).bool())
        segments, scores = function(torch.from_numpy(feats)[None])
        assert torch.allclose(segments, outputs.segments()[0], atol=1e-4)
        told = export.about(localize)
        told["stride"] = told["frames"] = ((steps - 1) * told["stride"] + 16) / told["resize"]
        told["seconds"] = told["seconds"].split(";")[0]
        expected = video.grid.to_seconds(segments)
        assert torch.allclose(in_seconds(segments, told), expected, atol=1e-4)


def test_onnx_gives_the_same_and_carries_the_same(exported, tmp_path):
    for name in export.FOR_ONNX:
        pytest.importorskip(name, reason=f"a file .onnx needs {name}, which is not installed")
    import onnxruntime
    run, function, told = exported
    path = tmp_path / "detector.onnx"
    assert export.main([str(run), "--out", str(path)]) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["detector.onnx"]
    session = onnxruntime.InferenceSession(path)
    metadata = session.get_modelmeta().custom_metadata_map
    assert {name: json.loads(metadata[name]) for name in told} == told
    for steps in LENGTHS:
        feats = features_of(steps)[None]
        expected = function(torch.from_numpy(feats))
        for mine, theirs in zip(session.run(None, {"features": feats}), expected):
            assert np.allclose(mine, theirs.detach(), rtol=1e-5, atol=1e-4)


# ---- What is refused ----------------------------------------------------------------------------

def spoiled(network, told):
    """A file that gives other numbers than the detector."""
    def function(features):
        segments, scores = network.expected(features)
        return segments * (1 + 2e-4), scores
    return b"spoiled", function


def of_another_length(network, told):
    """A file that fits one length alone."""
    def function(features):
        return [part[:3] for part in network.expected(features)]
    return b"spoiled", function


@pytest.mark.parametrize("kind", [spoiled, of_another_length])
def test_a_file_that_differs_from_torch_is_not_written(
        trained, tmp_path, monkeypatch, capsys, kind):
    monkeypatch.setitem(export.KINDS, ".pt2", kind)
    assert export.main([str(trained / "run"), "--out", str(tmp_path / "x.pt2")]) == 2
    assert "is not written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "words"), [
    ("x.pt", "must end in .onnx or .pt2"), ("x", "must end in"), ("absent/x.pt2", "absent")])
def test_wrong_files_to_write(trained, tmp_path, monkeypatch, capsys, name, words):
    monkeypatch.setitem(export.KINDS, ".pt2", lambda network, told: (b"", network.expected))
    assert export.main([str(trained / "run"), "--out", str(tmp_path / name)]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1
    assert words in text
    assert not list(tmp_path.iterdir())


def test_wrong_runs(trained, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    shutil.copy(trained / "own.json", tmp_path / "detector.pt")
    for run in (tmp_path / "empty", tmp_path / "absent.pt", tmp_path / "detector.pt"):
        assert export.main([str(run), "--out", str(tmp_path / "x.pt2")]) == 2
        assert capsys.readouterr().err.startswith("error: checkpoint")
    assert export.main([str(trained / "run")]) == 2
    assert "--out" in capsys.readouterr().err
    assert not (tmp_path / "x.pt2").exists()


@pytest.mark.parametrize("lacking", export.FOR_ONNX)
def test_a_package_that_lacks_is_named(trained, tmp_path, monkeypatch, capsys, lacking):
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == lacking else name)
    assert export.main([str(trained / "run"), "--out", str(tmp_path / "x.onnx")]) == 2
    text = capsys.readouterr().err
    assert f"pip install {lacking};" in text
    assert text.count("\n") == 1
    assert not list(tmp_path.iterdir())
