"""Tests of extras/viewer.py: the page about a run, its numbers, its safety, and in a browser."""
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from unittest.mock import Mock

import pytest

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
    assert "default-src 'none'" in plain
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


# ---- What is missing, odd or large --------------------------------------------------------------

@pytest.mark.parametrize(("name", "content"), [
    ("config.json", None), ("config.json", {}), ("metrics.json", {"mAP": 1}),
    ("videos.json", None), ("videos.json", []),
    ("videos.json", {"v": {"part": "odd", "annotations": []}}),
    ("videos.json", json.loads('{"v": ' + '{"part": ' * 400 + "1" + "}" * 401)),
    ("metrics.json", {"tiou": [0.5], "mAP": [], "average_mAP": 0.1, "videos": 1, "instances": 1,
                      "weights": "ema", "ap": {}}),
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
