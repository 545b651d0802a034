"""Tests of extras/viewer.py: the page about a run, its numbers, its safety, and in a browser."""
import html
import json
import re
import shutil
import subprocess
from dataclasses import asdict
from html.parser import HTMLParser
from unittest.mock import Mock

import numpy as np
import pytest

import train
from extras import viewer
from plumbing import files
from plumbing.words import BadInput
from tests.helpers import read_result

BROWSERS = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
BROWSER = next(filter(None, BROWSERS), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")

SCRIPT = "<script>alert(1)</script>"
ODD = (SCRIPT, "</SCRIPT><!--", "a & \"b\" 'c'", "line\u2028break", "名前", "x" * 300)


# ---- Made-up runs -------------------------------------------------------------------------------

def log_rows():
    """Rows of log.jsonl: two stages, and pseudo labels of two epochs."""
    rows = [{"stage": "supervised", "epoch": 1, "step": step, "of": 40, "steps_a_second": 9.0,
             "seconds_left": 1.0, "loss": 2.0 / step, "cls": 1.0 / step} for step in range(1, 41)]
    pulse = {"positives": 10, "candidates": 7, "dropped": 3, "mined": 2, "theta_h": 0.25,
             "silent": 0} | {key: 0.1 * i for i, key in enumerate(viewer.QUALITY, 1)}
    for epoch in (1, 2):
        at = {"stage": "joint", "epoch": epoch}
        rows += [at | pulse, at | {"step": 10 * epoch, "of": 20, "loss": 0.5, "unsup_cls": 3.5}]
    return rows


def detections(classes, count):
    """`count` detections, each of a second in turn, scores falling from 0.9."""
    return [{"label": classes[i % len(classes)], "score": 0.9 * (1 - i / count),
             "segment": [float(i), i + 1.5]} for i in range(count)]


def write_run(folder, videos=(1, 1, 1), classes=("walk", "run"), count=12, changes=()):
    """A made-up run: of how many videos of each of viewer.PARTS, of how many detections of each.

    changes: other contents of its files by name, None for a file that is not there"""
    folder.mkdir()
    entries = {}
    for part, number in zip(viewer.PARTS, videos):
        for i in range(number):
            truth = [{"segment": [2.0 * k, 2.0 * k + 1.5], "label": classes[(i + k) % len(classes)]}
                     for k in range(3)]
            entries[f"{part}{i}"] = {"part": part, "duration": 100.0,
                                     "annotations": None if part == "unlabelled" else truth}
    test, unlabelled, _ = ([v for v in entries if v.startswith(part)] for part in viewer.PARTS)
    scores = {"class_score": 0.8, "tIoU": 0.7, "tND": 0.01, "similarity": None}
    pseudo = [found | scores | {"status": status}  # one of each status
              for found, status in zip(detections(classes, len(viewer.STATUS)), viewer.STATUS)]
    label = [i % (len(classes) + 1) for i in range(5 * len(classes) + 5)]
    contents = {
        "config.json": {"dataset": "/somewhere/my.json", "ratio": 0.5, "seed": 7, "stage": "all"},
        "split.json": {"labelled": [], "unlabelled": [], "missing_classes": ["run"]},
        "videos.json": entries, "pseudo_labels.json": dict.fromkeys(unlabelled, pseudo),
        "predictions.json": {"results": dict.fromkeys(test, detections(classes, count))},
        "metrics.json": {
            "tiou": [0.3, 0.5], "mAP": [0.75, 0.5], "average_mAP": 0.625, "videos": 1,
            "instances": 3, "weights": "ema", "average_mAP_raw": 0.6125, "supervised_mAP": 0.4321,
            "ap": dict.fromkeys(classes, [0.75, 0.5])},
        "representation.json": {
            "classes": [*classes, "background"], "label": label,
            "before": [[0.5 * i, 1.0] for i in range(len(label))],
            "after": [[float(c), 0.1 * i] for i, c in enumerate(label)]},
        "log.jsonl": log_rows()}
    for name, content in (contents | dict(changes)).items():
        write = files.write_rows if name == "log.jsonl" else files.write_json
        if content is not None:
            write(folder / name, content)
    return folder


RUNS = {  # what write_run() is given
    "small": {}, "odd": {"classes": ODD},
    "large": {"videos": (250, 200, 50), "classes": [f"class number {i}" for i in range(200)],
              "count": 400},
    "many videos": {"videos": (2000, 0, 0), "classes": ("0", "1"), "count": 60},
    "two tests": {"videos": (2, 0, 1)},
    "bare": {"changes": {
        "videos.json": {}, "metrics.json": None, "representation.json": None,
        "pseudo_labels.json": None, "log.jsonl": None, "predictions.json": None}}}


def page_of(folder, **how):
    """The path of the page about a made-up run."""
    return viewer.write_page(write_run(folder, **how))


def embedded(path):
    """The content of the JSON in a page."""
    text = path.read_text(encoding="utf-8")
    found, = re.findall(r'<script type="application/json" id="run">(.*?)</script>', text, re.DOTALL)
    return json.loads(found)


# ---- The page, its numbers and its safety -------------------------------------------------------

def test_the_page_holds_the_numbers_of_the_run_and_lies_where_it_is_asked_for(tmp_path, capsys):
    run, other = write_run(tmp_path / "my"), tmp_path / "other.html"
    assert viewer.main([str(run), "--out", str(other)]) == 0
    assert "other.html is written" in capsys.readouterr().out
    assert not (run / "page.html").exists()
    assert viewer.write_page(run) == run / "page.html"
    shown = embedded(run / "page.html")
    assert embedded(other) == shown
    assert shown["name"] == "my"
    assert dict(shown["facts"]) == {
        "data set": "my", "labelled": "50.0 %, 1 of 2 training videos", "test videos": "1",
        "seed": "7", "stages": "supervised, joint", "classes without a label": "1",
        "average mAP, supervised only": "43.2 %", "average mAP, ema weights": "62.5 %",
        "average mAP, raw weights": "61.3 %"}
    assert shown["metrics"] == read_result(run / "metrics.json")
    assert shown["representation"] == viewer.compact(read_result(run / "representation.json"))
    test, unlabelled, labelled = shown["videos"]
    assert [test["part"], unlabelled["part"], labelled["part"]] == list(viewer.PARTS)
    assert test["truth"] == [[0, 0, 1.5], [1, 2, 3.5], [0, 4, 5.5]]
    assert test["found"][:2] == [[0, 0, 1.5, 0.9], [1, 1, 2.5, 0.825]]
    assert [row[4] for row in unlabelled["found"]] == [0, 1, 2, 3]
    assert unlabelled["found"][0] == [0, 0, 1.5, 0.9, 0, 0.8, 0.7, 0.01, None]
    assert unlabelled["truth"] is labelled["found"] is None
    supervised, joint = (shown["curves"][stage] for stage in ("supervised", "joint"))
    assert list(shown["curves"]) == ["supervised", "joint"]
    assert supervised["x"] == list(range(1, 41))
    assert supervised["y"].keys() == {"loss", "cls"}
    assert joint == {"every": 1, "x": [10, 20], "y": {"loss": [0.5] * 2, "unsup_cls": [3.5] * 2}}
    assert shown["pulses"]["count"] == {
        "kept": [7, 7], "dropped": [3, 3], "mined": [2, 2], "candidate": [5, 5]}
    assert shown["pulses"]["quality"]["class_accuracy"] == [0.1, 0.1]
    assert list(shown["pulses"]["quality"]) == list(viewer.QUALITY)


def test_long_curves_are_thinned_and_the_best_segments_shown_candidates_last(tmp_path):
    rows = [{"stage": "joint", "epoch": 1, "step": i, "loss": float("nan")} for i in range(4001)]
    shown = embedded(page_of(tmp_path / "my", count=1000, changes={"log.jsonl": rows}))
    assert shown["curves"]["joint"] == {
        "every": 3, "x": list(range(0, 4001, 3)), "y": {"loss": [None] * 1334}}  # no number: None
    test = shown["videos"][0]
    scores = [row[3] for row in test["found"]]
    assert scores == sorted(scores, reverse=True)
    assert (len(scores), test["left_out"]) == (viewer.MOST, 1000 - viewer.MOST)
    found = [{"score": 0.9, "status": "candidate"}, {"score": 0.001, "status": "kept"},
             {"score": 0.5, "status": "mined"}]
    assert [one["score"] for one in viewer.best(found, 2)] == [0.5, 0.001]
    assert viewer.best([{"score": 0.009}], 2) == []


def tags_of(text):
    """[(tag, attributes)] of a page."""
    parser = HTMLParser()
    parser.handle_starttag = Mock()
    parser.feed(text)
    return [(call.args[0], dict(call.args[1])) for call in parser.handle_starttag.call_args_list]


def test_the_page_needs_nothing_else_and_odd_names_come_back_and_make_no_tag(tmp_path):
    paths = [page_of(tmp_path / name, **RUNS[name]) for name in ("small", "odd")]
    plain, odd = (path.read_text(encoding="utf-8") for path in paths)
    assert not re.search(r"https?:|@import|\bfetch\(|XMLHttpRequest|\bimport\(|innerHTML", plain)
    assert "default-src 'none'; img-src data:; media-src 'self' file:;" in plain
    for tag, attributes in tags_of(plain):
        assert "src" not in attributes, tag
        assert attributes.get("href", "data:,") == "data:,", tag
    assert tags_of(odd) == tags_of(plain)
    assert embedded(paths[1])["classes"] == list(ODD)
    assert SCRIPT not in odd
    assert odd.isascii()
    text = viewer.embedded({SCRIPT: "&<>\u2028\u2029\ud800"})  # no letter that HTML reads
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == {SCRIPT: "&<>\u2028\u2029\ud800"}


# ---- Errors, the top, another run, recordings and features --------------------------------------

def test_the_page_says_what_is_wrong_with_the_detections(tmp_path):
    # Truth: walk 0-1.5, run 2-3.5, walk 4-5.5. Detections: walk and run in turn, i to i + 1.5;
    # those at odd times overlap two instances by 0.2, of which the first counts.
    shown = embedded(page_of(tmp_path / "my"))
    judged, test = shown["analysis"], shown["videos"][0]
    kinds = [judged["types"][kind] for kind in test["kinds"]]
    assert kinds[:6] == ["true positive", "confusion", "wrong label", "localization",
                         "true positive", "confusion"]
    assert set(kinds[6:]) == {"background"}
    assert test["takes"] == [0, -1, -1, -1, 2, *[-1] * 7]
    assert judged["point"] == {"score": 0.9, "precision": 1, "recall": 0.333333, "f1": 0.5}
    assert judged["videos"] == {
        "test0": {"video": "test0", "f1": 0.5, "missed": 2, "false": 0, "instances": 3}}
    assert judged["confusion"] == {"rows": ["walk", "run", "background"], "cells": [
        [0, 0, 1], [0, 2, 1], [1, 2, 1]], "columns": ["walk", "run", "missed"]}
    counts = [(name, one["instances"], one["labelled"]) for name, one in judged["classes"].items()]
    assert counts == [("walk", 2, 2), ("run", 1, 1)]
    # Of walk, 2 instances, ranks 1 and 2 are in the first block, of run, 1 instance, rank 1.
    assert judged["errors"]["blocks"][0]["counts"] == {
        "true positive": [1, 1], "double": [0, 0], "localization": [0, 0], "confusion": [1, 1],
        "wrong label": [1, 1], "background": [0, 0]}
    assert [one["kinds"] for one in shown["videos"][1:]] == [[], []]
    assert sum(group["instances"] for group in judged["groups"]["length"]) == 3
    second = embedded(page_of(tmp_path / "two", **RUNS["two tests"]))["videos"][1]
    assert second["truth"] == [[1, 0, 1.5], [0, 2, 3.5], [1, 4, 5.5]]
    assert second["takes"] == [-1, -1, 1, *[-1] * 9]  # walk at 2; numbers are of the video


def test_the_operating_point_is_that_of_the_list_where_the_run_has_it(tmp_path):
    trust = {"score": 0.6, "precision": 0.4, "recall": 0.5, "f1": 0.45, "classes": {}}
    metrics = read_result(write_run(tmp_path / "plain") / "metrics.json") | {"trust": trust}
    shown = embedded(page_of(tmp_path / "my", changes={"metrics.json": metrics}))
    assert shown["analysis"]["point"] == {key: trust[key] for key in trust if key != "classes"}
    assert shown["analysis"]["videos"]["test0"]["false"] == 3  # 0.9, 0.6 are right, three between
    empty = {"predictions.json": {"results": {"test0": []}}}
    assert embedded(page_of(tmp_path / "none", changes=empty))["analysis"]["point"]["score"] is None


def test_what_is_left_out_is_counted_by_its_score():
    found = [{"score": score, "label": "a", "segment": [0, 1]} for score in (
        0.29, 0.295, 0.3, 0.009, 0.58)]
    row = viewer.video_of("v", {"part": "test", "annotations": None}, found, {"a": 0}, 1)
    assert row["found"] == [[0, 0, 1, 0.58]]
    assert row["left_out"] == 4
    assert row["left_out_by_score"] == {29: 2, 30: 1, 0: 1}


def test_the_top_has_date_duration_gain_and_command_where_the_files_have_them(tmp_path):
    run = write_run(tmp_path / "my")
    rest = [["took", "0:00:04 of training steps"],  # 40 steps, 9 a second; joint does not say
            ["gain over the supervised stage", "+19.3 points of average mAP"]]
    begun, *others = embedded(viewer.write_page(run))["about"]
    assert begun[0] == "begun, or last resumed"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d", begun[1])
    assert others == rest
    own = asdict(train.Settings(dataset="toy", **train.Settings.preset("toy")))
    words = viewer.command_of(own | {"out": "runs/a b", "audit": True, "page": False, "seed": 3})
    assert sorted(words.split(" --")) == [
        "audit", "no-page", "out 'runs/a b'", "python train.py", "seed 3"]
    assert viewer.command_of(own | {"another": 1}) is None


def test_two_runs_are_compared_and_three_or_one_without_a_test_refused(tmp_path, capsys):
    runs = [str(write_run(tmp_path / name)) for name in "ab"]
    bare = str(write_run(tmp_path / "c", **RUNS["bare"]))
    out = tmp_path / "page.html"
    assert viewer.main([*runs, "--out", str(out)]) == 0
    shown = embedded(out)
    assert (shown["name"], shown["other"]["name"]) == ("a", "b")
    assert shown["other"]["metrics"] == read_result(tmp_path / "b" / "metrics.json")
    assert shown["other"]["errors"] == shown["analysis"]["errors"]
    out.unlink()
    capsys.readouterr()
    for given, sentence in (([*runs, bare], "compares two runs, not 3"),
                            ([runs[0], bare], "nothing to compare"),
                            ([bare, runs[0]], "nothing to compare")):
        assert viewer.main([*given, "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert sentence in error
        assert error.count("\n") == 1
        assert not out.exists()


def test_recordings_are_found_by_id_and_named_as_seen_from_the_page(tmp_path, capsys):
    run, folder = write_run(tmp_path / "my"), tmp_path / "a # b"
    (folder / "sub").mkdir(parents=True)
    for name in ("test0.webm", "test0.wav", "sub/labelled0.mp4", "unlabelled0.txt"):
        (folder / name).touch()
    assert viewer.main([str(run), "--videos", str(folder)]) == 0
    assert embedded(run / "page.html")["recordings"] == {"test0": "../a%20%23%20b/test0.webm"}
    assert viewer.main([str(run), "--videos", str(tmp_path / "none")]) == 2
    assert "holds no recording <id>" in capsys.readouterr().err


def own_data(folder, videos, shape):
    """The settings of a run on features of a shape (T, D), one file a video, channel k times k."""
    (folder / "features").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in videos:
        feats = rng.normal(size=shape) * np.arange(shape[1])
        np.save(folder / "features" / f"{name}.npy", feats.astype(np.float32))
    return asdict(train.Settings(dataset=str(folder / "my.json")))


def test_feature_curves_are_few_and_thinned_and_pages_with_them_small(tmp_path):
    feats = np.array([[0, 5, 1, 9], [4, 5, 3, 0], [2, 5, 2, 9]], dtype=np.float32)
    assert viewer.feature_curves(feats, 9) == {  # by variance: 3, 0, 2, 1
        "channels": [3, 0, 2, 1], "y": [[99, 0, 99], [0, 99, 50], [0, 99, 50], [0, 0, 0]]}
    assert viewer.feature_curves(feats, 2) == {  # of the first and last step alone
        "channels": [0, 2, 1, 3], "y": [[0, 99], [0, 99], [0, 0], [0, 0]]}
    names = [f"{part}{i}" for part, number in zip(viewer.PARTS, (200, 150, 49))
             for i in range(number)]
    config = own_data(tmp_path / "data", names, (600, 6))
    path = page_of(tmp_path / "my", videos=(200, 150, 50), count=400,
                   changes={"config.json": config})
    assert path.stat().st_size < 4_000_000
    features = embedded(path)["features"]
    assert features.keys() == set(names)  # not labelled49, which has no file
    assert features["test0"]["channels"] == [5, 4, 3, 2]
    assert [len(y) for y in features["test0"]["y"]] == [viewer.MOST_STEPS] * 4


# ---- What is missing, odd or large --------------------------------------------------------------

@pytest.mark.parametrize(("name", "content"), [
    ("config.json", None), ("config.json", {}), ("metrics.json", {"mAP": 1}),
    ("videos.json", None), ("videos.json", []),
    ("videos.json", {"v": {"part": "odd", "annotations": []}}),
    ("videos.json", json.loads('{"v": ' + '{"part": ' * 400 + "1" + "}" * 401)),
    ("metrics.json", {"tiou": [0.5], "mAP": [], "average_mAP": 0.1, "videos": 1, "instances": 1,
                      "weights": "ema", "ap": {}}),
    ("metrics.json", {"tiou": [], "mAP": [], "average_mAP": 0.1, "videos": 1, "instances": 1,
                      "weights": "ema", "ap": {}, "trust": {"score": 0.5}}),
    ("representation.json", {"classes": ["a"], "label": [3], "before": [[0, 1]],
                             "after": [[0, 1]]}),
    ("representation.json", [1]), ("split.json", {"missing_classes": [{}]}),
    ("predictions.json", {"results": {"test0": [{}]}}), ("pseudo_labels.json", {"unlabelled0": 3})])
def test_a_run_that_train_did_not_write_is_refused(tmp_path, capsys, name, content):
    run = write_run(tmp_path / "my", changes={name: content})
    with pytest.raises(BadInput, match=name if content is None else "no run of this version"):
        viewer.write_page(run)
    assert viewer.main([str(run)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(("name", "absent"), [
    ("metrics.json", {"metrics": None}), ("representation.json", {"representation": None}),
    ("log.jsonl", {"curves": {}, "pulses": None}), ("pseudo_labels.json", {}), ("split.json", {}),
    ("predictions.json", {})])
def test_a_run_may_lack_the_other_files_and_all_videos(tmp_path, name, absent):
    shown = embedded(page_of(tmp_path / "my", changes={name: None}))
    assert shown == shown | absent
    assert len(shown["videos"]) == 3
    none = {name: None} | {"videos.json": {}, "pseudo_labels.json": {}}
    assert embedded(page_of(tmp_path / "none", changes=none))["videos"] == []


@pytest.mark.parametrize(("kind", "most"), [("large", 100), ("many videos", 25)])
def test_pages_of_large_runs_are_small_by_fewer_segments_a_video(tmp_path, kind, most):
    path = page_of(tmp_path / "my", **RUNS[kind])
    assert path.stat().st_size < 3_000_000
    shown = embedded(path)
    assert len(shown["videos"]) == sum(RUNS[kind]["videos"])
    assert len(shown["classes"]) == len(RUNS[kind]["classes"])
    assert shown["limits"]["most"] == most


# ---- In a browser -------------------------------------------------------------------------------

# Before the page's own script: its faults are kept; what a test does and looks at. byId() is its.
WATCH = """<script>
const faults = [];
addEventListener("error", event => faults.push(String(event.message)));
addEventListener("securitypolicyviolation", event => faults.push(event.blockedURI));
console.error = console.warn = (...words) => faults.push(words.join(" "));

const all = selector => [...document.querySelectorAll(selector)];
const texts = selector => all(selector).map(node => node.textContent);
const box = node => node.getBoundingClientRect();
const segments = () => all("#timeline svg:not(.axis) rect");
const labels = () => texts("#timeline .axis text");
const title = () => byId("title").textContent;
const press = (...keys) => keys.forEach(key => document.body.dispatchEvent(
  new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true })));
const set = (id, value, event = "input") => {
  byId(id).value = value;
  byId(id).dispatchEvent(new Event(event));
};
const wheel = (by, x) => !byId("timeline").dispatchEvent(  // -> whether the page does not scroll
  new WheelEvent("wheel", { deltaY: by, clientX: x, cancelable: true }));
const drag = (from, to) => {
  byId("timeline").setPointerCapture = () => {};  // which knows real pointers alone
  for (const [type, x] of [["pointerdown", from], ["pointermove", to], ["pointerup", to]])
    byId("timeline").dispatchEvent(new PointerEvent(type, { clientX: x, button: 0 }));
};
</script>"""


def look(path, script, address="", width=1200):
    """What a script, the body of a function, returns in a page that is drawn without a fault."""
    answer = ("<script>document.body.dataset.answer = JSON.stringify([(() => {" + script
              + "})(), faults]);</script></body>")
    text = path.read_text(encoding="utf-8").replace("<body>", "<body>" + WATCH, 1)
    path.write_text(text.replace("</body>", answer), encoding="utf-8")
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        f"--user-data-dir={path.parent / 'browser'}", f"--window-size={width},1000",
        "--virtual-time-budget=2000", "--dump-dom", path.as_uri() + address]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    found = re.findall(r'data-answer="([^"]*)"', done.stdout.decode())
    assert len(found) == 1, done.stdout[-2000:]
    answer, faults = json.loads(html.unescape(found[0]))
    assert faults == []
    return answer


# What is done in a page of one of RUNS: the run, the script, what it returns, the address.
DEEDS = {
    "the slider, zoom and pan change what is drawn": ("small", """
        const width = () => box(segments()[0]).width;
        set("score", 0);
        const whole = segments().length;
        set("score", 0.5);
        const [above, before] = [segments().length, width()];
        press("+", "0");
        wheel(-400, box(byId("timeline")).left + 26);
        const [zoomed, axis] = [width() / before, labels()];
        drag(600, 400);
        const moved = labels();
        press("ArrowLeft", "ArrowLeft", "ArrowLeft");
        const back = String(labels()) === String(axis);
        press("0");
        return [whole, above, zoomed, parseFloat(axis[0]), parseFloat(moved[0]) > 0, back,
                wheel(400, 600)];""",
        # Scores above 0.5: 0.9, 0.825, ... 0.525. Where the whole video is, the page scrolls.
        [3 + 12, 3 + 6, pytest.approx(2.718, rel=0.01), 0, True, True, False]),
    "the address opens a video at a score and a zoom": ("small", """
        const words = ["0.00 s to 25.00 s of 100.00 s, zoom 4.", "3 of 4 pseudo labels shown."];
        const kinds = segments().map(node => node.getAttribute("class")).sort();
        return [title(), words.map(word => byId("summary").textContent.includes(word)), kinds,
                document.documentElement.dataset.theme];""",
        ["unlabelled0 (unlabelled)", [True, True], ["dropped", "kept", "mined"], "dark"],
        "#video=1&score=0.3&zoom=4&theme=dark"),
    "an odd address opens what is nearest": ("small", "return title();", "labelled0 (labelled)",
        "#video=99&score=x&zoom=-1&start=1e9&theme=odd"),
    "the list is searched and keys go through it": ("large", """
        const titles = ["n", "p", "p"].map(key => [press(key), title()][1]);
        set("search", "LABELLED19");
        press("n");
        return [...titles, title(), all("#videos option").length, all("#ap .value").length];""",
        ["test1 (test)", "test0 (test)", "test0 (test)", "unlabelled19 (unlabelled)",
         12, 200]),  # unlabelled19, unlabelled190 to 199, labelled19; the classes
    "names are shown as text": ("odd", """
        set("score", 0);
        byId("numbers").open = true;
        return [texts("#ap .name"), all("script").length];""",
        [list(ODD), 4]),  # the JSON, the page's own script and the two of this test
    "panels without files are sentences": ("bare", """
        press("n", "p", "+", "-", "0", "ArrowLeft", "t");
        dispatchEvent(new Event("resize"));
        for (const id of ["previous", "closer", "whole"]) byId(id).click();
        return all(".absent").map(node => node.parentNode.id).sort();""",
        ["ap", "curves", "frames", "map", "pulses", "timeline"]),
    "the key e goes from error to error and on to the next video": ("two tests", """
        set("score", 0.6);
        const seen = [];
        const errors = () => byId("summary").textContent.split("Error ")[1];
        for (let i = 0; i < 5; i++) press("e"), seen.push(title()[4] + " " + errors());
        const orders = ["id", "f1", "missed", "false"].map(order =>
          [set("order", order, "change"), all("#videos option")[0].value][1]);
        return [seen, all("#timeline .marked").length, view.zoom > 1, byId("videos").value,
                orders];""",
        # From 0.6 on: those at 0 to 4. Of test0, 0 and 4 are right, of test1 only 2.
        [["0 1 of 4: run, false positive (confusion), 1.00 s to 2.50 s.",
          "0 2 of 4: walk, false positive (wrong label), 2.00 s to 3.50 s.",
          "0 3 of 4: run, missed, 2.00 s to 3.50 s.",
          "0 4 of 4: run, false positive (localization), 3.00 s to 4.50 s.",
          "1 1 of 6: walk, false positive (wrong label), 0.00 s to 1.50 s."], 1, True, "1",
         ["0", "1", "1", "1"]]),
    "curves are chosen and numbers show beside the pointer": ("small", """
        set("stage", "supervised", "change");
        all("#losses input")[1].click();
        const count = all("#curves .plot .curve").length;
        const cover = all("#curves .plot rect")[0];
        const at = { clientX: box(cover).left, bubbles: true };
        cover.dispatchEvent(new PointerEvent("pointermove", at));
        const tip = [byId("tip").hidden, byId("tip").textContent];
        press("Escape");
        document.querySelector("#frame-classes button").click();
        return [count, tip, byId("tip").hidden, all("#before .faded").length];""",
        [2, [False, "1\nloss 2\ncls 1"], True, 2]),
}


@needs_browser
@pytest.mark.parametrize("name", DEEDS)
def test_in_a_browser(tmp_path, name):
    kind, script, expected, *address = DEEDS[name]
    assert look(page_of(tmp_path / "my", **RUNS[kind]), script, *address) == expected


@needs_browser
def test_the_panels_about_errors_in_a_browser(tmp_path):
    run, other = (write_run(tmp_path / name) for name in "ab")
    (tmp_path / "test0.webm").touch()
    page = viewer.write_page(run, other=other, recordings=tmp_path)
    found = look(page, """
        const kinds = () => segments().map(node => node.getAttribute("class")).sort().join();
        const first = [byId("least").textContent, kinds()];
        set("score", 0);
        const whole = [kinds().split(",").filter(kind => kind === "missed").length];
        press("e", "e");
        const error = byId("summary").textContent.split("Error ")[1];
        byId("operate").click();
        set("order", "missed", "change");
        const options = texts("#videos option");
        const { title } = all("#videos option")[0];
        const player = document.querySelector("#player video").getAttribute("src");
        const tables = ["confusion", "other-map"].map(id =>
          [...byId(id).rows].map(row => [...row.cells].map(cell => cell.textContent).join("|")));
        return [first, whole, error, options, title, player, tables, texts("#ap .count"),
                all("#types [role=img] .column").length, all("#other-types [role=img] rect").length,
                all("#points .point").length, all("#bins .column").length,
                ["causes", "trust", "confused", "other"].map(id => byId(id).hidden)];""")
    assert found == [
        ["0.9", "missed,missed,true-positive,truth"], [1],
        "2 of 11: walk, false positive (wrong label), 2.00 s to 3.50 s.",
        ["\u2007" * 4 + "2  test0 (test)", "unlabelled0 (unlabelled)",
         "labelled0 (labelled)"],
        "test0 (test)\nF1 50.0 %, missed 2 of 3, false 0", "../test0.webm",
        [["what is there|1|2|missed", "1 walk|1||1", "2 run|||1",
          "background|||"],
         ["tIoU|a, %|b, %|difference", "0.3|75.0|75.0|+0.0", "0.5|50.0|50.0|+0.0",
          "average|62.5|62.5|+0.0"]],
        ["2", "2", "1", "1"], 60, 120, 1, 10, [False] * 4]


@needs_browser
@pytest.mark.parametrize("width", [360, 760, 1600])
@pytest.mark.parametrize("kind", ["odd", "large"])
def test_nothing_is_cut_off_or_overlaps(tmp_path, width, kind):
    # A browser's window cannot be as narrow as a telephone, but the page can.
    found = look(page_of(tmp_path / "my", **RUNS[kind]), f"const width = '{width}px';" + """
        for (const node of [document.documentElement, document.body]) node.style.width = width;
        dispatchEvent(new Event("resize"));
        const visible = all("body *").filter(node => !node.closest("svg, .scroll, option, script"));
        const wide = visible.filter(node => box(node).right > box(document.body).right + 1);
        const words = all("section svg text").filter(node => !node.closest("#timeline"));
        const holds = (a, b) => a.left <= b.left + 1 && b.right <= a.right + 1
          && a.top <= b.top + 1 && b.bottom <= a.bottom + 1;
        const cut = words.filter(node => !holds(box(node.ownerSVGElement), box(node)));
        const meet = (a, b) => a.left < b.right - 1 && b.left < a.right - 1
          && a.top < b.bottom - 1 && b.top < a.bottom - 1;
        const boxes = words.map(box);
        const over = words.filter((_, i) => boxes.slice(0, i).some(b => meet(boxes[i], b)));
        return [wide, cut, over].map(nodes => nodes.map(node => node.id || node.textContent));
    """, "#video=1", max(width, 500))
    assert found == [[], [], []]
