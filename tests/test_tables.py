"""Tests of annotations in other forms: tables, label tracks, tools' exports, in and out again."""
import json

import pytest
import torch

import train
from extras import annotations
from plumbing import forms, public, tables
from plumbing.words import BadInput
from tests.helpers import (
    evaluated,
    own_argv,
    read_result,
    refused,
    settings,
    small_detector,
    weights,
)
from tests.users import TRAINED, instances_of, opened, perfect, predict, score_of

pytestmark = pytest.mark.usefixtures("in_time")


def read(folder, content, name="my.csv", **how):
    """What tables.read_any() makes of a file of a content: {id: (segments, labels)}."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = tables.read_any(path, **how)
    return {name: (a.segments.tolist(), a.labels) for name, a in found.items()}


def refusal(call, *words):
    """The sentence of a refused call, which holds the words."""
    with pytest.raises(BadInput) as caught:
        call()
    for word in words:
        assert word in str(caught.value), caught.value
    return str(caught.value)


# ---- Tables -------------------------------------------------------------------------------------

WALK = {"v": ([[5.0, 24.5]], ["walk"])}
SAME = {  # tables that say that in v somebody walks from 5 to 24.5
    "commas": "video,start,end,label\nv,5,24.5,walk\n",
    "semicolons and decimal commas": "video;start;end;label\nv;5,0;24,5;walk",
    "tabs": "video\tstart\tend\tlabel\nv\t5\t24.5\twalk",
    "a mark, quotes, carriage returns": b'\xef\xbb\xbf"video","start","end","label"\r\n"v","5",'
                                        b'"24.5","walk"\r\n',
    "another order and letter case": "Label, END ,Start,Video\nwalk,24.5,5,v",
    "blanks and empty lines": "\nvideo, start, end, label\n\nv, 5, 24.5, walk \n,,,\n",
    "clocks": "video,start,end,label\nv,0:05,0:00:24.500,walk",
    "empty cells at the end": "video,start,end,label,,\nv,5,24.5,walk,,,",
    "the video is there too": "video,start,end,label\nv,,,\nv,5,24.5,walk",
    "BORIS 7": "Observation id,Observation date,Media file,Total length,FPS,Subject,Behavior,"
               "Behavior type,Start (s),Stop (s),Duration (s)\n"
               "obs,2021-12-06,T:/My videos\\v.mp4,60.0,29.97,,walk,STATE,5.000,24.500,19.5",
    "BORIS 9": "Observation id\tSource\tMedia duration (s)\tFPS (frame/s)\tBehavior\tStart (s)\t"
               "Stop (s)\tMedia file name\nobs\t1:x\t60.0\tNA\twalk\t5.0\t24.5\tdata/v.avi",
    "BORIS, two players": "Observation id\tMedia duration (s)\tFPS (frame/s)\tBehavior\tStart (s)\t"
                          "Stop (s)\tMedia file name\n"
                          "obs\t60.0|61.5\t29.97|25\twalk\t5.0\t24.5\tdata/v.MTS",
    "BORIS, an offset": "Observation id,Time offset (s),FPS (frame/s),Media duration (s),Behavior,"
                        "Start (s),Stop (s),Media file name\no,10.0,0.000,|60,walk,15,34.5,v.wav",
    "BORIS, live": "Observation id\tMedia duration (s)\tBehavior\tStart (s)\tStop (s)\t"
                   "Media file name\nv\tNA\twalk\t5.0\t24.5\tNA",
    "BORIS 7, live": "Observation id,Media file,Behavior,Start (s),Stop (s)\nv,LIVE,walk,5,24.5",
    "ELAN, all times": '"#file:///C:/x/v.eaf"\nBegin Time - hh:mm:ss.ms\tBegin Time - ss.msec\t'
                       "Begin Time - msec\tEnd Time - hh:mm:ss.ms\tEnd Time - ss.msec\t"
                       "End Time - msec\tDuration - msec\tposture\tFile Name\tFile Path\n"
                       "00:00:05.000\t5.0\t5000\t00:00:24.500\t24.5\t24500\t19500\twalk\tv.eaf\t/x",
    "ELAN, clocks": "Begin Time - hh:mm:ss.ms\tEnd Time - hh:mm:ss.ms\tAnnotation\tFile Path\t\n"
                    "00:00:05.000\t00:00:24.500\twalk\tfile:///C:/x/v.eaf",
    "ELAN, milliseconds": "Begin Time - msec\tEnd Time - msec\twhat\tFile Name\n"
                          "5000\t24500\twalk\tv.eaf",
}


@pytest.mark.parametrize("form", SAME)
def test_tables_that_say_the_same(tmp_path, form):
    assert read(tmp_path, SAME[form]) == WALK
    assert read(tmp_path, SAME[form], "my.TSV") == WALK
    [a] = tables.read_any(tmp_path / "my.csv").values()
    assert a.subset == "training" and a.annotated
    assert (a.duration, a.fps) == {
        "BORIS 7": (60.0, 29.97), "BORIS, two players": (60.0, 29.97),
        "BORIS 9": (60.0, None)}.get(form, (None, None))


def test_a_table_of_elan_without_a_file_name_is_of_its_own_video(tmp_path):
    content = "Begin Time - ss.msec\tEnd Time - ss.msec\tposture\n5\t24.5\twalk"
    assert read(tmp_path, content, "v.csv") == read(tmp_path, content, "v.txt") == WALK


def test_quotes_are_letters_in_a_table_of_elan(tmp_path):
    content = ('Begin Time - ss.msec\tEnd Time - ss.msec\tsaid\n5\t6\t"a\n7\t8\tb"\n'
               '9\t10\t"go" he says')
    assert read(tmp_path, content, "v.csv") == {
        "v": ([[5, 6], [7, 8], [9, 10]], ['"a', 'b"', '"go" he says'])}


def test_what_else_a_table_says(tmp_path):
    content = ("video,start,end,label,subset,duration,fps,note\n"
               "a,1,2,walk,training,60,25,x\na,1,2,=sit,,,,\nb,3,3,stand,validation,,,\nc,,,,,,,\n")
    assert read(tmp_path, content, ignored="stand, x") == {
        "a": ([[1, 2], [1, 2]], ["walk", "=sit"]), "b": ([], []), "c": ([], [])}
    found = tables.read_any(tmp_path / "my.csv", None, 30.0)
    assert [(a.subset, a.duration, a.fps) for a in found.values()] == [
        ("training", 60.0, 30.0), ("validation", None, 30.0), ("", None, 30.0)]
    assert all(a.annotated for a in found.values())
    [note] = tables.unused(tmp_path / "my.csv")
    assert note == f"the column(s) note of {tmp_path / 'my.csv'}"
    [other] = tables.unused(tmp_path)
    assert other == f"1 files that are no *.txt of {tmp_path}: my.csv"
    assert read(tmp_path, "video,start,end,label") == {}
    content = "video,start,end,label,observation id\nNA,1,2,a,1\nw,1,2,a,1"
    assert read(tmp_path, content).keys() == {"NA", "w"}
    [note] = tables.unused(tmp_path / "my.csv")
    assert "observation id" in note


HEAD = "video,start,end,label\nv,1,2,walk\n"
WRONG = [  # (content, words of the sentence)
    ("", "no column end, label, start, video|empty"),
    ("video,start,stop,label\nv,1,2,walk", "no column end|video, start, stop, label"),
    ("start,end,label\n1,2,walk", "no column video"),
    ("Begin Time - msec\tEnd Time - msec\tA\tB\n1\t2\tx\ty", "no column label|tiers"),
    (HEAD + "v,x,2,walk", "line 3|video v|start|'x'"),
    (HEAD + "v,1,,walk", "line 3|video v|end|''"),
    (HEAD + "v,1,inf,walk", "line 3|end|'inf'"),
    (HEAD + "v,1,0:75,walk", "line 3|'0:75'"),
    (HEAD + 'v,1,"2,5",walk', "line 3|'2,5'"),
    (HEAD + "v,5,2,walk", "line 3|[5, 2]|ends before it starts"),
    (HEAD + "v,1,2,", "line 3|no label"),
    ('"#x"\nBegin Time - msec\tEnd Time - msec\tA\nx\t2\ty', "line 3|'x'"),
    (HEAD + ",1,2,walk", "line 3|names no video"),
    (HEAD + "v,1,2,walk, slowly", "line 3|5 cells|4"),
    (HEAD + 'v,1,2,"walk', "line 3|my.csv"),
    (HEAD + "a,x,2,w\nb,x,2,w\nb,x,2,w", "line 3|2 videos have such faults: a, b"),
    ("video,start,end,label,duration\nv,1,2,a,1\nv,3,5,a,2", "line 3|2.0|1.0|whole video"),
    ("video,start,end,label,fps\nv,1,2,a,-1", "line 2|fps|positive|'-1'"),
    ("video,start,end,label,subset\nv,1,2,a,x\nv,3,5,a,y", "line 3|'y'|'x'"),
    (b"video,start\xff", "UTF-8"),
    ("Media file name,Behavior,Start (s),Stop (s),Media duration (s)\nv.mp4,a,1,2,60;30",
     "line 2|'media duration (s)' is '60;30'|one after the other"),
    ("Observation id,Media file name,Behavior,Start (s),Stop (s)\no,v.mp4,a,1,2\no,w.mp4,a,61,62",
     "line 3|video w|observation 'o'|another file"),
    ("Observation id,Media file name,Behavior,Start (s),Stop (s)\no,Not found,a,61,62",
     "line 2|BORIS has found no file"),
    (HEAD.replace("label", "label,fps").replace("walk", "walk,0"), "line 2|fps|positive"),
]


@pytest.mark.parametrize(("content", "words"), WRONG)
def test_a_table_that_is_wrong_is_one_sentence(tmp_path, content, words):
    refusal(lambda: read(tmp_path, content), "my.csv", *words.split("|"))


# ---- A text file a video ------------------------------------------------------------------------

def test_a_folder_of_label_tracks(tmp_path):
    folder = tmp_path / "labels"
    (folder / "P01").mkdir(parents=True)
    track = "5.000000\t24.500000\twalk\n\\\t100.0\t200.0\n30,5\t1:00:02\tsit down, slowly\n"
    (folder / "v.txt").write_text(track)
    (folder / "P01/w.txt").write_text("1\t2\ta\r\n")
    (folder / "none.txt").write_text("")
    (folder / "._v.txt").write_bytes(b"\xff")
    found = {name: (a.segments.tolist(), a.labels, a.subset, a.annotated)
             for name, a in tables.read_any(folder).items()}
    assert found == {
        "v": ([[5, 24.5], [30.5, 3602]], ["walk", "sit down, slowly"], "training", True),
        "P01/w": ([[1, 2]], ["a"], "training", True), "none": ([], [], "training", True)}
    (folder / "v.txt").write_text(track + "9\t8\twalk")
    refusal(lambda: tables.read_any(folder), "v.txt", "line 4", "[9, 8]")
    (folder / "v.txt").write_text("1\t2\ta\n3\twalk")
    refusal(lambda: tables.read_any(folder), "v.txt", "line 2", "'walk'")
    (folder / "v.txt").write_text("1\t2\t \n")
    refusal(lambda: tables.read_any(folder), "v.txt", "line 1", "no label")
    (tmp_path / "empty").mkdir()
    refusal(lambda: tables.read_any(tmp_path / "empty"), "empty", "<id>.txt")


def test_labels_of_frames(tmp_path):
    content = "bg\nbg\nwalk\nwalk\nwalk\nsit\nbg\nwalk\n\n"
    runs = [("bg", 0, 2), ("walk", 2, 5), ("sit", 5, 6), ("bg", 6, 7), ("walk", 7, 8)]
    whole = {"v": ([[a / 4, b / 4] for _, a, b in runs], [label for label, _, _ in runs])}
    assert read(tmp_path, content, "labels/v.txt", fps=4) == whole
    found = tables.read_any(tmp_path / "labels", "bg", 4)["v"]
    assert found.labels == ["walk", "sit", "walk"]
    assert (found.duration, found.fps) == (2.0, 4)
    refusal(lambda: tables.read_any(tmp_path / "labels"), "v.txt", "'bg'", "--fps")


# ---- Out and in again ---------------------------------------------------------------------------

ODD = ["walk", "a, b; c", 'say "x"', "=1+1", "'=x", "''-y", "'quoted'", "@a", "+", "ü", "#1", "1.5"]


def test_what_is_written_is_read_again(tmp_path):
    actions = [{"segment": [i + 0.25, i + 1.5], "label": label, "score": 0.5}
               for i, label in enumerate(ODD)]
    found = {"v": actions, "-w/x": actions[:1], "still": []}
    expected = {name: ([a["segment"] for a in listed], [a["label"] for a in listed])
                for name, listed in found.items()}
    forms.write_found(tmp_path / "found.csv", found)
    text = (tmp_path / "found.csv").read_text()
    assert text.splitlines()[0] == "video,start,end,label,score"
    assert not any(cell.startswith(("=", "+", "-", "@"))
                   for line in text.splitlines() for cell in line.split(","))
    assert read(tmp_path, text) == expected
    forms.check_ending(tmp_path / "v.txt", 1)
    forms.write_found(tmp_path / "v.txt", {"v": actions})
    assert read(tmp_path, (tmp_path / "v.txt").read_text(), "v.txt") == {"v": expected["v"]}
    refusal(lambda: forms.check_ending(tmp_path / "v.txt", 2), "v.txt", "one video")


# ---- What tools export as JSON ------------------------------------------------------------------

def region(value, kind="timelinelabels"):
    return {"type": kind, "from_name": "x", "to_name": "video", "value": value}


def ranges(first, last, *labels):
    return region({"ranges": [{"start": first, "end": last}], "timelinelabels": list(labels)})


def task(address, *given):
    return {"id": 1, "data": {"note": "x", "video": address},
            "annotations": [{"result": result, **more} for result, more in given]}


TASKS = [
    task("/data/upload/3/0a1b2c3d-my%20video.mp4", ([ranges(26, 50, "walk", "talk")], {})),
    task("/data/local-files/?d=clips/b.MP4", ([ranges(1, 25, "no")], {"was_cancelled": True,
                                                                 "ground_truth": True}),
         ([ranges(1, 25, "no")], {}), ([ranges(1, 75, "yes")], {"ground_truth": True})),
    task("s3://bucket/c.wav?sign=1",
         ([region({"start": 1.5, "end": 2, "labels": ["sit"]}, "labels") | {"original_length": 9.0},
           region({"x": 1, "rectanglelabels": ["box"]}, "rectanglelabels"),
           region({"start": 3, "end": 4, "text": ["said"]}, "textarea")], {})),
    task("still.mp4", ([{"type": "relation", "from_id": "a", "to_id": "b"}], {})),
    task("open.mp4"),
    task("/data/upload/1/0a1b2c3d-hand.CSV",
         ([region({"start": 5, "end": 9, "timeserieslabels": ["run"]}, "timeserieslabels")], {})),
    {"id": 9, "data": {"series": "/d/w.csv", "video": "/d/w.csv.mp4"}},
]
LISTED = {"my video": ([[1, 2], [1, 2]], ["walk", "talk"]), "b": ([[0, 3]], ["yes"]),
          "c": ([[1.5, 2]], ["sit"]), "still": ([], []), "open": None, "hand": ([[5, 9]], ["run"]),
          "w.csv": None}
VIA = {
    "project": {"pname": "x", "vid_list": ["1", "2"]},
    "attribute": {
        "1": {"aname": "what", "anchor_id": "FILE1_Z2_XY0", "type": 4,
              "options": {"w": "walk", "s": "sit"}},
        "2": {"aname": "note", "anchor_id": "FILE1_Z1_XY1", "type": 1, "options": {}},
        "3": {"aname": "free", "anchor_id": "FILE1_Z2_XY0", "type": 1, "options": {}}},
    "file": {"5": {"fname": "a.mp4"}, "6": {"fname": "clips/open.webm"}},
    "view": {"1": {"fid_list": ["5"]}, "2": {"fid_list": ["6"]}},
    "metadata": {
        "1_a": {"vid": "1", "flg": 0, "z": [5.0, 24.5], "xy": [], "av": {"1": "w", "2": "no"}},
        "1_b": {"vid": "1", "flg": 1, "z": [1, 2], "xy": [], "av": {"1": "w"}},
        "1_c": {"vid": "1", "z": [30, 31], "xy": [], "av": {"1": "w,s", "3": "", "9": "x"}},
        "1_d": {"vid": "1", "flg": 0, "z": [7.5], "xy": [2, 1, 1, 9, 9], "av": {"2": "cat"}},
        "1_e": {"vid": "1", "flg": 0, "z": [40, 41.5], "xy": [], "av": {"3": "a, b"}}},
}
OF_VIA = {"a": ([[5, 24.5], [30, 31], [30, 31], [40, 41.5]], ["walk", "walk", "sit", "a, b"]),
          "open": None}


@pytest.mark.parametrize(("content", "more", "expected"), [
    (TASKS, ["--fps", "25"], LISTED), (VIA, [], OF_VIA)])
def test_exports_become_activitynets_form(own, capsys, content, more, expected):
    (own / "export.json").write_text(json.dumps(content))
    refused(["--dataset", own / "export.json", "--check"], capsys, "export.json",
            f"python -m extras.annotations {own / 'export.json'} --out")
    assert annotations.main([str(own / "export.json"), "--out", str(own / "new.json"), *more]) == 0
    assert f"{len(expected)} videos" in capsys.readouterr().out
    found = forms.read_annotations(own / "new.json")
    assert {name: (a.segments.tolist(), a.labels) if a.annotated else None
            for name, a in found.items()} == expected
    assert {a.subset for a in found.values()} == {"training"}
    assert {name: a.duration for name, a in found.items() if a.duration} == (
        {"c": 9.0} if content is TASKS else {})


def changed(content, change):
    """A copy of a content with a change: function(content)."""
    content = json.loads(json.dumps(content))
    change(content)
    return content


@pytest.mark.parametrize(("content", "more", "words"), [
    (TASKS, [], "my video|--fps"), (TASKS, ["--fps", "-1"], "--fps|-1"), (TASKS, ["--fp"], "--fp"),
    ([], [], "Label Studio|VIA"), ({"database": {}}, [], "Label Studio|VIA"),
    ([*TASKS, TASKS[0]], ["--fps", "25"], "two tasks|my video"),
    ([task("x.txt", ([], {}))], [], "export.json|x.txt|no file of a recording"),
    ([task("v.mp4", ([region({"start": "x", "end": 2, "labels": ["a"]})], {}))], [], "v|'x'"),
    ([task("v.mp4", ([{"value": 3}], {}))], [], "Label Studio|TypeError"),
    (changed(VIA, lambda x: x["metadata"]["1_a"].update(av={})), [], "video a|no label"),
    (changed(VIA, lambda x: x["metadata"]["1_a"].update(vid="9")), [], "VIA|'9'"),
    (changed(VIA, lambda x: x["metadata"]["1_a"].update(z=[1, "b"])), [], "video a|'b'"),
])
def test_exports_that_are_wrong_are_one_sentence(tmp_path, capsys, content, more, words):
    (tmp_path / "export.json").write_text(json.dumps(content))
    argv = [str(tmp_path / "export.json"), "--out", str(tmp_path / "new.json"), *more]
    assert annotations.main(argv) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1
    for word in words.split("|"):
        assert word in text, text
    assert not (tmp_path / "new.json").exists()


# ---- The loop -----------------------------------------------------------------------------------

def write_table(own, name, ids):
    """A table of what the user's annotation file says of these videos."""
    found = perfect(own, ids)
    forms.write_found(own / name, found)


def refused_after_warnings(argv, capsys, *words):
    """The command line of train.py ends with 2, and its last sentence holds the words."""
    capsys.readouterr()
    assert train.main([str(word) for word in argv]) == 2
    text = capsys.readouterr().err.splitlines()[-1]
    assert text.startswith("error: ")
    for word in words:
        assert word in text, text


def table_argv(own, name, out, *more):
    """The command line of train.py for a table of the user's."""
    argv = own_argv(own, "--fps", 50, "--stage", "supervised", "--acp", "none", *more)
    argv[argv.index("--dataset") + 1] = str(own / name)
    argv[argv.index("--ratio") + 1] = "0"
    argv[argv.index("--out") + 1] = str(own / out)
    return argv


def test_a_table_teaches_and_judges_what_the_json_does(own, capsys):
    write_table(own, "my.csv", TRAINED)
    argv = own_argv(own, "--fps", 50, "--ratio", 1, "--stage", "supervised")
    expected = instances_of(opened(own, "--ratio", 1, "--stage", "supervised"))
    argv[argv.index("--dataset") + 1] = str(own / "my.csv")
    dataset = train.data.training_data(settings(*argv))
    assert instances_of(dataset) == expected
    assert any("the column(s) score of" in told for told in dataset.ignored)
    argv = predict(own, perfect(own, TRAINED))
    argv[argv.index("--gt") + 1] = own / "my.csv"
    assert score_of(own, argv) == pytest.approx(100)
    (own / "labels").mkdir()
    for name in TRAINED:
        (own / f"labels/{name}.txt").write_text("walk\n" * 4 + "sit\n" * 2)
    argv[argv.index("--gt") + 1] = own / "labels"
    capsys.readouterr()
    refused(argv, capsys, "v0.txt", "--fps")
    assert evaluated(*argv[1:], "--fps", 2) == 0
    capsys.readouterr()
    refused(["--dataset", "my.xls"], capsys, "my.xls", "*.csv")
    refused(["--dataset", own / "none.csv"], capsys, "none.csv", "not found")


def test_label_three_localize_correct_train_again(own, capsys):
    write_table(own, "three.csv", TRAINED[:3])
    assert train.main(table_argv(own, "three.csv", "one")) == 0
    assert "3 labelled, 11 unlabelled" in capsys.readouterr().out
    assert evaluated("--checkpoint", own / "one", "--features", own / "features", "--min-score",
                     0.001, "--out", own / "found.csv") == 0
    assert len(tables.read_any(own / "found.csv")) == 14
    write_table(own, "found.csv", TRAINED[:6])  # corrected
    argv = table_argv(own, "found.csv", "two")
    refused_after_warnings([*argv, "--start", own / "one"], capsys, "other data", "3 videos", "v3",
                           "--init")
    assert not (own / "two").exists()
    assert train.main([*argv, "--init", str(own / "one"), "--supervised-epochs", "1"]) == 0
    text = capsys.readouterr().out
    assert "6 labelled, 8 unlabelled" in text
    assert "weights are those of" in text and "new: none; not used: none" in text
    rows = (own / "two/log.jsonl").read_text().splitlines()
    assert {json.loads(row)["stage"] for row in rows} == {"supervised"}
    assert read_result(own / "two/split.json")["labelled"] == TRAINED[:6]


def test_weights_of_a_class_are_not_taken_for_another_class(own, capsys):
    write_table(own, "three.csv", TRAINED[:3])
    assert train.main(table_argv(own, "three.csv", "one")) == 0
    first = weights(own / "one")
    for classes, kept in ((["A", "B"], True), (["B", "C"], False), (["A", "B", "C"], False)):
        s = settings(*table_argv(own, "three.csv", "new"))
        detector = s.build(5, len(classes))
        text = public.take_weights(detector, own / "one", classes)
        assert ("new: none" in text) == kept
        mine = detector.state_dict()
        for name in ("cls_out.weight", "cls_out.bias", "reg_out.weight"):
            equal = torch.equal(mine[name], first[f"ema.{name}"])
            assert equal == (kept or name == "reg_out.weight"), (classes, name)
    (own / "one/checkpoint.pt").unlink()
    assert "new: none" in public.take_weights(s.build(5, 2), own / "one", ["A", "B"])
    refused_after_warnings(["--resume", own / "one"], capsys, "detector.pt", "the detector alone")
    with pytest.raises(BadInput, match="not found"):
        public.take_weights(small_detector(), own / "none")
