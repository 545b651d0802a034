"""Tests of extras/viewer.py: the page about a run, its numbers, its safety, and in a browser."""
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from extras import viewer
from plumbing.files import write_json, write_rows
from plumbing.words import BadInput

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")

SCRIPT = "<script>alert(1)</script>"
ODD = (SCRIPT, "</SCRIPT><!--", "a & \"b\" 'c'", "line\u2028break", "名前", "x" * 300)


# ---- Made-up runs -------------------------------------------------------------------------------

METRICS = {
    "tiou": [0.3, 0.5], "mAP": [0.75, 0.5], "average_mAP": 0.625, "videos": 1, "instances": 3,
    "weights": "ema", "average_mAP_raw": 0.6125, "supervised_mAP": 0.4321}


def log_rows():
    """Rows of log.jsonl: two stages, and pseudo labels of two epochs."""
    rows = [{"stage": "supervised", "epoch": 1, "step": step, "of": 40, "steps_a_second": 9.0,
             "seconds_left": 1.0, "loss": 2.0 / step, "cls": 1.0 / step} for step in range(1, 41)]
    quality = {key: 0.1 * i for i, key in enumerate(viewer.QUALITY, 1)}
    for epoch in (1, 2):
        at = {"stage": "joint", "epoch": epoch}
        rows.append(at | quality | {"positives": 10, "candidates": 7, "dropped": 3, "mined": 2,
                                    "theta_h": 0.25, "silent": 0})
        rows.append(at | {"step": 10 * epoch, "of": 20, "loss": 0.5, "unsup_cls": 3.5})
    return rows


def detections(classes, count):
    """`count` detections, each of a second in turn, scores falling from 0.9."""
    return [{"label": classes[i % len(classes)], "score": 0.9 * (1 - i / count),
             "segment": [float(i), i + 1.5]} for i in range(count)]


def pseudo_labels(classes):
    """A pseudo label of each status."""
    found = detections(classes, len(viewer.STATUS))
    scores = {"class_score": 0.8, "tIoU": 0.7, "tND": 0.01, "similarity": None}
    return [one | scores | {"status": status} for one, status in zip(found, viewer.STATUS)]


def representation_of(classes):
    """The content of representation.json."""
    label = [i % (len(classes) + 1) for i in range(5 * len(classes) + 5)]
    before = [[0.5 * i, 1.0] for i in range(len(label))]
    after = [[float(c), 0.1 * i] for i, c in enumerate(label)]
    return {"classes": [*classes, "background"], "label": label, "before": before, "after": after}


def write_run(folder, videos=(1, 1, 1), classes=("walk", "run"), count=12):
    """A made-up run.

    videos  how many of each of viewer.PARTS
    count   detections of a test video"""
    folder.mkdir(parents=True, exist_ok=True)
    entries = {}
    for part, number in zip(viewer.PARTS, videos):
        for i in range(number):
            truth = [{"segment": [2.0 * k, 2.0 * k + 1.5], "label": classes[(i + k) % len(classes)]}
                     for k in range(3)]
            entries[f"{part}{i}"] = {"part": part, "duration": 100.0,
                                     "annotations": None if part == "unlabelled" else truth}
    names = {part: [name for name in entries if name.startswith(part)] for part in viewer.PARTS}
    files = {
        "config.json": {"dataset": "/somewhere/my.json", "ratio": 0.5, "seed": 7, "stage": "all"},
        "split.json": {"labelled": [], "unlabelled": [], "missing_classes": ["run"]},
        "videos.json": entries,
        "predictions.json": {"results": dict.fromkeys(names["test"], detections(classes, count))},
        "pseudo_labels.json": dict.fromkeys(names["unlabelled"], pseudo_labels(classes)),
        "metrics.json": METRICS | {"ap": dict.fromkeys(classes, [0.75, 0.5])},
        "representation.json": representation_of(classes),
    }
    for name, content in files.items():
        write_json(folder / name, content)
    write_rows(folder / "log.jsonl", log_rows())
    return folder


@pytest.fixture
def small_run(tmp_path):
    """The folder of a small made-up run."""
    return write_run(tmp_path / "my")


def embedded(path):
    """The content of the JSON in a page."""
    text = path.read_text(encoding="utf-8")
    found = re.findall(r'<script type="application/json" id="run">(.*?)</script>', text, re.DOTALL)
    assert len(found) == 1
    return json.loads(found[0])


# ---- The page and its numbers -------------------------------------------------------------------

def test_the_page_holds_the_numbers_of_the_run(small_run):
    path = viewer.write_page(small_run)
    assert path == small_run / "page.html"
    shown = embedded(path)
    assert shown["name"] == "my"
    assert dict(shown["facts"]) == {
        "data set": "my", "labelled": "50.0 %, 1 of 2 training videos", "test videos": "1",
        "seed": "7", "stages": "supervised, joint", "classes without a label": "1",
        "average mAP, supervised only": "43.2 %", "average mAP, ema weights": "62.5 %",
        "average mAP, raw weights": "61.3 %",
    }
    assert shown["metrics"] == METRICS | {"ap": dict.fromkeys(("walk", "run"), [0.75, 0.5])}
    assert shown["representation"] == viewer.compact(representation_of(("walk", "run")))
    test, unlabelled, labelled = shown["videos"]
    assert [test["part"], unlabelled["part"], labelled["part"]] == list(viewer.PARTS)
    assert test["truth"] == [[0, 0, 1.5], [1, 2, 3.5], [0, 4, 5.5]]
    assert test["found"][:2] == [[0, 0, 1.5, 0.9], [1, 1, 2.5, 0.825]]
    assert unlabelled["truth"] is None
    assert [row[4] for row in unlabelled["found"]] == [0, 1, 2, 3]
    assert unlabelled["found"][0] == [0, 0, 1.5, 0.9, 0, 0.8, 0.7, 0.01, None]
    assert labelled["found"] is None
    curves = shown["curves"]
    assert list(curves) == ["supervised", "joint"]
    assert curves["supervised"]["x"] == list(range(1, 41))
    assert curves["supervised"]["y"].keys() == {"loss", "cls"}
    assert curves["joint"] == {
        "every": 1, "x": [10, 20], "y": {"loss": [0.5, 0.5], "unsup_cls": [3.5, 3.5]}}
    count = {"kept": [7, 7], "dropped": [3, 3], "mined": [2, 2], "candidate": [5, 5]}
    assert shown["pulses"]["count"] == count
    assert shown["pulses"]["quality"]["class_accuracy"] == [0.1, 0.1]
    assert list(shown["pulses"]["quality"]) == list(viewer.QUALITY)


def test_long_curves_are_thinned_and_no_number_is_none(small_run):
    rows = [{"stage": "joint", "epoch": 1, "step": i, "loss": float("nan")} for i in range(4001)]
    write_rows(small_run / "log.jsonl", rows)
    curve = embedded(viewer.write_page(small_run))["curves"]["joint"]
    assert curve["every"] == 3
    assert curve["x"] == list(range(0, 4001, 3))
    assert set(curve["y"]["loss"]) == {None}


def test_the_best_segments_go_into_the_page_candidates_last(tmp_path):
    folder = write_run(tmp_path / "my", count=1000)
    test = embedded(viewer.write_page(folder))["videos"][0]
    assert len(test["found"]) == viewer.MOST
    assert test["left_out"] == 1000 - viewer.MOST
    scores = [row[3] for row in test["found"]]
    assert scores == sorted(scores, reverse=True)
    found = [{"score": 0.9, "status": "candidate"}, {"score": 0.001, "status": "kept"},
             {"score": 0.5, "status": "mined"}]
    assert [one["score"] for one in viewer.best(found, 2)] == [0.5, 0.001]
    assert viewer.best([{"score": 0.009}], 2) == []


def test_the_page_is_written_where_it_is_asked_for(small_run, tmp_path, capsys):
    assert viewer.main([str(small_run), "--out", str(tmp_path / "other.html")]) == 0
    assert "other.html is written" in capsys.readouterr().out
    assert not (small_run / "page.html").exists()
    assert embedded(tmp_path / "other.html")["name"] == "my"


# ---- Self-contained, and safe for odd names -----------------------------------------------------

def tags_of(path):
    """[(tag, attributes)] of a page."""
    found = []
    parser = HTMLParser()

    def keep(tag, attributes):
        found.append((tag, dict(attributes)))

    parser.handle_starttag = keep
    parser.feed(path.read_text(encoding="utf-8"))
    return found


def test_the_page_needs_nothing_else(small_run):
    path = viewer.write_page(small_run)
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"https?:|@import|\bfetch\(|XMLHttpRequest|\bimport\(", text)
    for tag, attributes in tags_of(path):
        assert "src" not in attributes, tag
        assert attributes.get("href", "data:,") == "data:,", tag
    assert "innerHTML" not in text
    assert "default-src 'none'" in text


def test_odd_names_come_back_and_make_no_tag(tmp_path):
    plain = viewer.write_page(write_run(tmp_path / "plain"))
    odd = viewer.write_page(write_run(tmp_path / "odd", classes=ODD))
    assert tags_of(odd) == tags_of(plain)
    assert embedded(odd)["classes"] == list(ODD)
    assert SCRIPT not in odd.read_text(encoding="utf-8")
    assert odd.read_bytes().isascii()
    text = viewer.embedded({SCRIPT: "&<>\u2028\u2029\ud800"})  # no letter that HTML reads
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == {SCRIPT: "&<>\u2028\u2029\ud800"}


# ---- What is missing, odd or large --------------------------------------------------------------

@pytest.mark.parametrize(("name", "content", "words"), [
    ("config.json", None, "config.json"),
    ("videos.json", None, "videos.json"),
    ("videos.json", [], "no run of this version"),
    ("videos.json", {"v": {"part": "odd", "annotations": []}}, "no run of this version"),
    ("metrics.json", {"mAP": 1}, "no run of this version"),
    ("predictions.json", {"results": {"test0": [{}]}}, "no run of this version"),
    ("pseudo_labels.json", {"unlabelled0": 3}, "no run of this version"),
    ("config.json", {}, "no run of this version"),
])
def test_a_run_that_train_did_not_write_is_refused(small_run, capsys, name, content, words):
    (small_run / name).unlink()
    if content is not None:
        write_json(small_run / name, content)
    with pytest.raises(BadInput, match=words):
        viewer.write_page(small_run)
    assert viewer.main([str(small_run)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", [
    "metrics.json", "pseudo_labels.json", "representation.json", "split.json", "predictions.json",
    "log.jsonl"])
def test_a_run_may_lack_the_other_files_and_all_videos(small_run, name):
    (small_run / name).unlink()
    shown = embedded(viewer.write_page(small_run))
    if name in ("metrics.json", "representation.json"):
        assert shown[name.split(".")[0]] is None
    if name == "log.jsonl":
        assert (shown["curves"], shown["pulses"]) == ({}, None)
    assert len(shown["videos"]) == 3
    write_json(small_run / "videos.json", {})
    write_json(small_run / "pseudo_labels.json", {})
    assert embedded(viewer.write_page(small_run))["videos"] == []


@pytest.mark.parametrize(("videos", "number", "count", "classes", "most"), [
    ((250, 200, 50), 200, 400, "class number {}", None),
    ((2000, 0, 0), 2, 60, "{}", 25),  # more videos have fewer segments each
])
def test_pages_of_large_runs_are_small(tmp_path, videos, number, count, classes, most):
    names = [classes.format(i) for i in range(number)]
    path = viewer.write_page(write_run(tmp_path / "my", videos, names, count))
    assert path.stat().st_size < 3_000_000
    shown = embedded(path)
    assert len(shown["videos"]) == sum(videos)
    assert len(shown["classes"]) == number
    assert most in (None, shown["limits"]["most"])


# ---- In a browser -------------------------------------------------------------------------------

# Before the page's own script: what goes wrong is kept.
WATCH = """<script>
const faults = [];
addEventListener("error", event => faults.push(String(event.message)));
addEventListener("securitypolicyviolation", event => faults.push(event.blockedURI));
console.error = console.warn = (...words) => faults.push(words.join(" "));
</script>"""

# After it: what a test looks at, and its answer.
HELPERS = """
const all = selector => [...document.querySelectorAll(selector)];
const segments = () => all("#timeline svg:not(.axis) rect");
const labels = () => all("#timeline .axis text").map(node => node.textContent);
const press = key => document.body.dispatchEvent(
  new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
const slide = value => {
  document.getElementById("score").value = value;
  document.getElementById("score").dispatchEvent(new Event("input"));
};
const wheel = (by, x) => {
  const box = document.getElementById("timeline");
  const event = new WheelEvent("wheel", { deltaY: by, clientX: x, cancelable: true });
  box.dispatchEvent(event);
  return event.defaultPrevented;
};
const drag = (from, to) => {
  const box = document.getElementById("timeline");
  box.setPointerCapture = () => {};  // which knows real pointers alone
  const send = (type, x) => box.dispatchEvent(new PointerEvent(type, { clientX: x, button: 0 }));
  send("pointerdown", from);
  send("pointermove", to);
  send("pointerup", to);
};
"""


def look(path, script, address="", size=(1200, 1000)):
    """What a script, the body of a function, returns in a page that a browser has drawn.

    Asserts that nothing went wrong in it."""
    answer = ("<script>" + HELPERS + "document.body.dataset.answer = JSON.stringify("
              "{ answer: (() => {" + script + "})(), faults });</script>")
    text = path.read_text(encoding="utf-8").replace("<body>", "<body>" + WATCH, 1)
    copy = path.with_name("looked_at.html")
    copy.write_text(text.replace("</body>", answer + "</body>"), encoding="utf-8")
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        f"--user-data-dir={path.parent / 'browser'}", f"--window-size={size[0]},{size[1]}",
        "--virtual-time-budget=2000", "--dump-dom", copy.as_uri() + address]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    found = re.findall(r'data-answer="([^"]*)"', done.stdout.decode())
    assert len(found) == 1, done.stdout[-2000:]
    content = json.loads(html.unescape(found[0]))
    assert content["faults"] == []
    return content.get("answer")


def large_run(folder):
    """A run of 500 videos and 200 classes."""
    classes = [f"class number {i}" for i in range(200)]
    return write_run(folder, videos=(250, 200, 50), classes=classes, count=400)


@needs_browser
def test_slider_zoom_and_pan_change_what_is_drawn(small_run):
    path = viewer.write_page(small_run)
    whole, above, zoomed, axis, moved, back, scrolls = look(path, """
        slide(0);
        const whole = segments().length;
        slide(0.5);
        const above = segments().length;
        const width = () => segments()[0].getBoundingClientRect().width;
        const before = width();
        press("+");
        press("0");
        wheel(-400, document.getElementById("timeline").getBoundingClientRect().left + 26);
        const zoomed = width() / before;
        const axis = labels();
        drag(600, 400);
        const moved = labels();
        press("ArrowLeft");
        press("ArrowLeft");
        press("ArrowLeft");
        const back = labels();
        press("0");
        return [whole, above, zoomed, axis, moved, back, wheel(400, 600)];
    """)
    assert whole == 3 + 12
    assert above == 3 + 6  # scores 0.9, 0.825, ... 0.525
    assert zoomed == pytest.approx(2.718, rel=0.01)
    assert float(axis[0]) == 0
    assert float(moved[0]) > 0
    assert back == axis
    assert scrolls is False  # the page scrolls where the whole video is there


@needs_browser
def test_the_address_opens_a_video_at_a_score_and_a_zoom(small_run):
    path = viewer.write_page(small_run)
    script = """
        const summary = document.getElementById("summary").textContent;
        return [document.getElementById("title").textContent, summary,
                segments().map(node => node.getAttribute("class")),
                document.documentElement.dataset.theme];
    """
    title, summary, kinds, theme = look(path, script, "#video=1&score=0.3&zoom=4&theme=dark")
    assert title == "unlabelled0 (unlabelled)"
    assert "0.00 s to 25.00 s of 100.00 s, zoom 4." in summary
    assert "3 of 4 pseudo labels shown." in summary
    assert sorted(kinds) == ["dropped", "kept", "mined"]
    assert theme == "dark"
    title, *_ = look(path, script, "#video=99&score=x&zoom=-1&start=1e9&theme=odd")
    assert title == "labelled0 (labelled)"


@needs_browser
def test_the_list_is_searched_and_keys_go_through_it(tmp_path):
    path = viewer.write_page(large_run(tmp_path / "large"))
    found = look(path, """
        const titles = [];
        const note = () => titles.push(document.getElementById("title").textContent);
        press("n"); note();
        press("p"); note();
        press("p"); note();
        const search = document.getElementById("search");
        search.value = "LABELLED19";
        search.dispatchEvent(new Event("input"));
        press("n"); note();
        return [titles, all("#videos option").length, all("#ap .value").length];
    """)
    titles = ["test1 (test)", "test0 (test)", "test0 (test)", "unlabelled19 (unlabelled)"]
    # unlabelled19, unlabelled190 to 199, labelled19
    assert found == [titles, 12, 200]


@needs_browser
def test_names_are_shown_as_text(tmp_path):
    path = viewer.write_page(write_run(tmp_path / "my", classes=ODD))
    names, scripts = look(path, """
        slide(0);
        document.getElementById("numbers").open = true;
        return [all("#ap .name").map(node => node.textContent), all("script").length];
    """)
    assert names == list(ODD)
    assert scripts == 4  # the JSON, the page's own and the two of this test


@needs_browser
def test_panels_without_files_are_sentences(small_run):
    for name in ("metrics.json", "representation.json", "pseudo_labels.json", "log.jsonl",
                 "predictions.json"):
        (small_run / name).unlink()
    write_json(small_run / "videos.json", {})
    script = """
        for (const key of ["n", "p", "+", "-", "0", "ArrowLeft", "t"]) press(key);
        dispatchEvent(new Event("resize"));
        for (const id of ["previous", "closer", "whole"]) document.getElementById(id).click();
        return all(".absent").map(node => node.parentNode.id);
    """
    found = look(viewer.write_page(small_run), script)
    assert sorted(found) == ["ap", "curves", "frames", "map", "pulses", "timeline"]


@needs_browser
def test_curves_are_chosen_and_numbers_show_beside_the_pointer(small_run):
    found = look(viewer.write_page(small_run), """
        const stage = document.getElementById("stage");
        stage.value = "supervised";
        stage.dispatchEvent(new Event("change"));
        const count = [all("#curves .curve[d]").length];
        all("#losses input")[1].click();
        count.push(all("#curves .plot .curve").length);
        const cover = all("#curves .plot rect")[0];
        const box = cover.getBoundingClientRect();
        cover.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left, bubbles: true }));
        const tip = document.getElementById("tip");
        const words = [tip.hidden, tip.textContent];
        press("Escape");
        const button = document.querySelector("#frame-classes button");
        button.click();
        return [count[1], words, tip.hidden, all("#before .faded").length];
    """)
    assert found == [2, [False, "1\nloss 2\ncls 1"], True, 2]


@needs_browser
@pytest.mark.parametrize("width", [360, 760, 1600])
@pytest.mark.parametrize("kind", ["small", "large"])
def test_nothing_is_cut_off_or_overlaps(tmp_path, width, kind):
    folder = tmp_path / kind
    folder = large_run(folder) if kind == "large" else write_run(folder, classes=ODD)
    # A browser's window cannot be as narrow as a telephone, but the page can.
    found = look(viewer.write_page(folder), f"""
        document.documentElement.style.width = "{width}px";
        document.body.style.width = "{width}px";
        dispatchEvent(new Event("resize"));
        const right = document.body.getBoundingClientRect().right;
        const visible = all("body *").filter(node => !node.closest("svg, .scroll, option, script"));
        const wide = visible.filter(node => node.getBoundingClientRect().right > right + 1);
        const texts = all("section svg text").filter(node => !node.closest("#timeline"));
        const cut = texts.filter(node => {{
          const [inner, outer] = [node, node.ownerSVGElement].map(n => n.getBoundingClientRect());
          return inner.left < outer.left - 1 || inner.right > outer.right + 1
            || inner.top < outer.top - 1 || inner.bottom > outer.bottom + 1;
        }});
        const boxes = texts.map(node => [node.textContent, node.getBoundingClientRect()]);
        const over = boxes.filter(([, a], i) => boxes.some(([, b], k) => k < i
          && a.left < b.right - 1 && b.left < a.right - 1
          && a.top < b.bottom - 1 && b.top < a.bottom - 1));
        return [wide.map(node => node.tagName + node.id), cut.map(node => node.textContent),
                over.map(([text]) => text)];
    """, "#video=1", (max(width, 500), 1000))
    assert found == [[], [], []]
