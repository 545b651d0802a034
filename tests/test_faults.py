"""Tests of wrong input: one plain sentence, exit code 2, nothing half-written."""
import json
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from plumbing import files
from tests import users
from tests.helpers import edit, own_argv
from tests.users import NAMES, TESTED, actions, all_of, check, entries, predict, refusal, text

pytestmark = pytest.mark.usefixtures("in_time")


def all_refused(own, capsys, command, words):
    """Every command line that a table's word or words mean is refused, and no run begins."""
    kind, *more = command.split() if isinstance(command, str) else command
    more = [word.replace("OWN", str(own)) for word in more]
    scoring = ["evaluate", "--pred", own / "pred.json", "--gt", own / "own.json"]
    for argv in {
            "data": [own_argv(own, *more), check(own, *more)], "training": [own_argv(own, *more)],
            "train": [more], "evaluate": [["evaluate", *more]], "predictions": [[*scoring, *more]],
            }[kind]:
        refusal(argv, capsys, *words.replace("OWN", str(own)).split("|"))
    assert not (own / "run").exists()


def name_of(row):
    """The name of a table's row: what it says."""
    return " ".join(ascii(cell)[:50] for cell in row if not callable(cell))


# ---- Feature files ------------------------------------------------------------------------------

def npy(shape=(64, 5), dtype="<f4", held=b"\0" * 1280, header=None):
    """The bytes of a .npy file whose header says what it likes."""
    header = header or {"descr": dtype, "fortran_order": False, "shape": shape}
    content = f"{header}\n".encode("latin1")
    return b"\x93NUMPY\x01\x00" + len(content).to_bytes(2, "little") + content + held


BAD_ARRAYS = {
    "a terabyte": npy((50_000_000_000, 5)), "beyond 64 bits": npy((2 ** 62, 2 ** 62)),
    "negative": npy((-64, 5)), "negative twice": npy((-64, -5)), "no width": npy((64, 0)),
    "nothing held": npy(held=b""), "void": npy(dtype="|V0"), "objects": npy(dtype="|O"),
    "no dict": npy(header="[1, 2]"), "no Python": npy(header="{'descr': "),
    "brackets": npy(header="(" * 9000), "long": npy(header="{" + " " * 60_000 + "}"),
    "a call": npy(header="{'descr': '<f4', 'fortran_order': False, 'shape': tuple([64, 5])}"),
    "version 9": b"\x93NUMPY\x09\x00" + b"\0" * 2000, "magic alone": b"\x93NUMPY",
}
LOCAL, CENTRAL = b"PK\x03\x04", b"PK\x01\x02"  # how the headers of an archive's members begin


def patched(*fields):
    """Other numbers in all headers of an archive: each (mark, offset, bytes)."""
    def change(path):
        content = bytearray(path.read_bytes())
        for mark, offset, value in fields:
            for header in re.finditer(re.escape(mark), content):
                start = header.start() + offset
                content[start:start + len(value)] = value
        path.write_bytes(content)
    return change


def flip(path):
    """Another bit in the midst of an archive's longest member."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        member = max(archive.infolist(), key=lambda member: member.compress_size)
    head = member.header_offset
    names = [int.from_bytes(content[at:at + 2], "little") for at in (head + 26, head + 28)]
    content[head + 30 + sum(names) + member.compress_size // 2] ^= 8
    path.write_bytes(content)


def archive_of(members):
    """A change of a file to an archive of these members."""
    def change(path):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
    return change


ARCHIVES = {
    "encrypted": patched((LOCAL, 6, b"\1\0"), (CENTRAL, 8, b"\1\0")),
    "compressed strangely": patched((LOCAL, 8, b"\x63\0"), (CENTRAL, 10, b"\x63\0")),
    "promising 4 GB": patched((CENTRAL, 24, b"\xfe\xff\xff\xff")), "flipped": flip,
    "cut": lambda path: os.truncate(path, path.stat().st_size - 30),
    "text": b"PK not really", "without members": archive_of({}),
    "of other members": archive_of({"feats": "no array", "\x1b[31m.npy": npy((2, 2))}),
}
NO_FILES = {
    "a pipe": os.mkfifo, "zeros": lambda path: path.symlink_to("/dev/zero"),
    "a loop": lambda path: path.symlink_to(path), "a folder": Path.mkdir,
    "dangling": lambda path: path.symlink_to(path.with_name("nowhere")),
}
PICKLED = np.array([{"a": 1}], dtype=object)
STEP_41 = np.arange(320).reshape(64, 5) == 208


def rows(extensions, words="", **spoils):
    """Rows of BAD_FEATURES."""
    return {f"{extension} {name}": (spoil, words)
            for extension in extensions.split() for name, spoil in spoils.items()}


# {extension and name: (what stands in the file's place: bytes, an array, a tensor or other content
# of a .pt file, or what is done to the file; words of the sentence with "|" between)}
BAD_FEATURES = {
    **rows(".npy", "not found", missing=Path.unlink), **rows(".npy", "4|5", thin=np.zeros((64, 4))),
    **rows(".npy", "cannot be read", truncated=lambda path: os.truncate(path, 300), empty=b"",
           pickled=PICKLED),
    **rows(".npy", "(T, D)", shape=np.zeros(64), no_steps=np.zeros((0, 5)),
           of_text=np.array([["x"] * 5])),
    **rows(".npy", "transposed", transposed=np.zeros((5, 70))),
    **rows(".npy", "nan|step 41", nan=np.where(STEP_41, np.nan, 1)),
    **rows(".npy", "inf|step 41", inf=np.where(STEP_41, np.inf, 1)),
    **rows(".npy", "step 41", **{
        str(x): np.where(STEP_41, x, 1) for x in (-np.inf, 1e300, -1e39, 3.5e38)}),
    **rows(".npy", "real numbers", **{str(dtype): np.zeros((64, 5), dtype) for dtype in (
        "c8", "c16", "m8[s]", "M8[s]", "?", "S4", "U4", "V8", [("a", "<f4")])}),
    **rows(".npy", **BAD_ARRAYS),
    **rows(".npz", **{name: archive_of({"feats.npy": array}) for name, array in BAD_ARRAYS.items()},
           pickled=lambda path: np.savez(path, feats=PICKLED)),
    **rows(".npz", "unpacks",
           large=lambda path: np.savez_compressed(path, feats=np.zeros((400_000, 5)))),
    **rows(".pt", "real numbers", **{str(dtype): torch.zeros((64, 5), dtype=dtype) for dtype in (
        torch.complex64, torch.bool, torch.complex128)}),
    **rows(".pt", a_dict={"x": 1}, a_list=[torch.zeros(64, 5)], of_text="text", a_number=3,
           none=None, of_petabytes=torch.zeros(1).expand(10 ** 8, 10 ** 8),
           sparse=torch.zeros(64, 5).to_sparse(), a_dict_of_none={"feats": None},
           a_dict_of_a_dict={"feats": {"feats": torch.zeros(64, 5)}},
           executing=lambda path: torch.save(os.system, path)),
    **rows(".csv", **{f"{content}": content for content in (
        b"1;2;3\n4;5;6\n", b"a,b\n1,x\n", b"1,2\n3\n", b"", b"\n\n", b"f0,f1\n", b"\x00\x01\n",
        b"1,nan\n2,3\n")}),
    # What is no table says where, and what is another kind of file which
    **{f".csv {content}": (content, words) for content, words in {
        b"1;2\n3;x\n": "line 2, column 2 is 'x'", b"1,2\n3,\n": "line 2, column 2 is ''",
        b"a,b\n1,2\n3,4-5-6\n": "line 3, column 2 is '4-5-6'",
        b"1\t2\n3\n": "line 2 has 1 columns", b"1,5;2\n": "line 1, column 1 is '1,5'"}.items()},
    **rows(".npy .npz .pt .csv", "git lfs pull",
           lfs=b"version https://git-lfs.github.com/spec/v1\n"),
    **rows(".npy .npz .pt .csv", "web page", page=b"\n<!DOCTYPE html>\n", html=b"<HTML>"),
    **rows(".npy .npz .pt .csv", "a recording|README", mp4=b"\0\0\0\x18ftypmp42\0\0"),
    **rows(".npz .pt", **ARCHIVES), **rows(".npy .npz .pt .csv", **NO_FILES),
}
WRITERS = {
    ".npy": np.save, ".npz": lambda path, x: np.savez(path, feats=x),
    ".pt": lambda path, x: torch.save(torch.from_numpy(x), path),
    ".csv": lambda path, x: np.savetxt(path, x, delimiter=",", fmt="%.9g"),
}


def convert(own, extension, write=None):
    """Write all features in another kind of file, as write(path, array) does it."""
    for name in NAMES:
        path = own / f"features/{name}.npy"
        x = np.load(path)
        path.unlink()
        (write or WRITERS[extension])(path.with_suffix(extension), x)


def damage(path, spoil):
    """What a table says in the place of a file."""
    if callable(spoil):
        spoil(path)
    elif isinstance(spoil, bytes):
        path.write_bytes(spoil)
    elif path.suffix == ".npy":
        np.save(path, spoil)
    else:
        torch.save(spoil, path)


@pytest.mark.parametrize("name", ["v1", "v9", "v12"])  # whichever subset it is in
@pytest.mark.parametrize("fault", BAD_FEATURES)
def test_bad_feature_files(own, capsys, monkeypatch, name, fault):
    monkeypatch.setattr(files, "MOST_UNPACKED", 10 ** 7)  # which the row "large" passes
    extension, kind = fault.split(" ", 1)
    spoil, words = BAD_FEATURES[fault]
    convert(own, extension)
    path = own / f"features/{name}{extension}"
    if kind in NO_FILES:
        path.unlink()
    damage(path, spoil)
    all_refused(own, capsys, f"training --extension {extension}", f"{name}|{words}")


# ---- Annotations and predictions ----------------------------------------------------------------

def segment(*times):
    """Fields of an entry with one instance of these times."""
    return {"annotations": [{"label": "A", "segment": list(times)}]}


def action(**fields):
    """Fields of an entry with one instance, with other fields or without a label."""
    return {"annotations": [{"segment": [1.0, 2.0]} | fields]}


def found(**fields):
    """Detections of a video, one with other fields."""
    return [{"label": "A", "score": 1, "segment": [1, 2]} | fields]


NO_NUMBERS = (
    "nan", "-Infinity", "1" * 401, "twelve", 10 ** 400, "", True, [1], {"s": 1}, np.nan)
# (other fields of a video's entry, words of the sentence with "|" between)
BAD_ENTRIES = [
    (segment(20.0, 12.0), "[20.0, 12.0]"), (segment(12.0, 12.0), "[12.0, 12.0]"),
    (segment(40.0, 50.0), "[40.0, 50.0]|outside"), (segment(10.0, 9999.0), "outside"),
    (segment(-9.0, -3.0), "outside"), ({"duration": None} | segment(900.0, 910.0), "outside"),
    (action(label="A", segment="12-20"), "'12-20'"), (segment(1, None), "None"), (segment(1), ""),
    (action(), "no label"), ({"annotations": 3}, "list"),
    ({"fps": 0}, "fps|0"), ({"fps": -1}, "fps"), ({"fps": None}, "--fps"),
    ({"duration": "long"}, "'long'"), ({"subset": ["x"]}, ""), ({"subset": 3}, "subset"),
    *(({key: value}, "number") for key in ("duration", "fps") for value in NO_NUMBERS),
    *((segment(1.0, value), "number") for value in NO_NUMBERS),
    *((action(label=label), "label")
      for label in ([], [["A"]], [None], {"name": "A"}, True, "  ", [""])),
]
# (the detections of a video, words of the sentence)
BAD_DETECTIONS = [
    ([{"label": "A", "segment": [1, 2]}], ""), (3, "3"), ({}, "{}"), (found(label=["A"]), ""),
    (found(score=np.nan), "nan"),
    *((found(score=value), "number") for value in NO_NUMBERS),
    *((found(segment=[value, 3]), "number") for value in NO_NUMBERS),
]


# ---- JSON ---------------------------------------------------------------------------------------

BAD_JSON = (
    "[" * 100_000, '{"a":' * 100_000, "[" * 100_000 + "]" * 100_000,
    '{"database": {"v1": {"x": ' + "[" * 100_000 + "]" * 100_000 + "}}}",
    '{"database": {"v1": {"duration": ' + "9" * 5000 + "}}}", '{"database": {"v1": 3}}',
    "", " \n", "null", "3", '"database"', "[]", '[{"subset": "training"}]', '{"database": null}',
    '{"database": [{"subset": "training"}]}', '{"database": {"v1\0": {}}}', '{"database": {}}',
    '{"database": {', '{"database": {}} {"database": {}}', '{"database": {}} // all',
    "{'database': {}}", b"\xff\xfe{\x00", b"\x80abc", b'{"\xe4": 1}')
ODD_FILES = {f"{content[-30:]!a}": content for content in BAD_JSON} | NO_FILES
# {a command that reads a file: words of the sentence}
INPUTS = {
    "data --dataset OWN/odd.json": "annotation file", "predictions --gt OWN/odd.json": "",
    "predictions --pred OWN/odd.json": "",
    "data --ratio 0 --split OWN/odd.json": "split file", "evaluate --checkpoint OWN/odd.pt": "",
    "data --ratio 0 --split OWN/odd.txt": "split file", "data --start OWN/odd.pt": "",
    "train --resume OWN/odd.pt": "",
}


@pytest.mark.parametrize("fault", ODD_FILES)
def test_inputs_that_are_no_json_or_no_file(own, capsys, fault):
    predict(own, users.perfect(own, TESTED))
    content = ODD_FILES[fault]
    for name in ("odd.json", "odd.txt", "odd.pt"):
        damage(own / name, content.encode() if isinstance(content, str) else content)
    for command, words in INPUTS.items():
        if command.endswith("json") or fault in NO_FILES:
            more = "JSON" if content == '{"database": {' else ""
            all_refused(own, capsys, command, f"{words}|{command.split('/')[1]}|{more}")


ODD_TEXTS = {
    "ESC": "\x1b[31mred\x1b]0;title\x07", "NUL": "a\0b", "newline": "a\nerror: b\r\nc",
    "lone surrogate": "a\ud800b", "right to left": "a\u202eb\u2066", "C1": "a\x9b31mb",
    "line separator": "a\u2028b", "long": "x" * 300_000, "long and odd": "\x1b" * 300_000,
}


# ---- Every other refusal ------------------------------------------------------------------------

def predictions(rule, **fields):
    """Perfect predictions of the test videos, whose ids or fields are written otherwise."""
    return lambda folder: predict(folder, {
        rule.format(name): [d | fields for d in found]
        for name, found in users.perfect(folder, TESTED).items()})


def moved_to(*keys):
    """Entries in another form: what happens stands under other keys."""
    def change(entry):
        instances = entry.pop("annotations")
        entry.update(dict.fromkeys(keys, instances))
        if keys == ("segments", "labels"):
            entry.update({f"{key}s": [a[key] for a in instances] for key in ("segment", "label")})
    return users.edits(lambda database: [change(entry) for entry in database.values()])


def scored(rule, of_video):
    """External scores of the test videos, whose ids are written otherwise."""
    results = {rule.format(name): of_video for name in TESTED}
    return text("scores.json", json.dumps({"results": results}))


def with_gaps(x):
    """Features with three steps that a sensor did not see."""
    x[3:6, 2] = np.nan
    return x


def recordings(folder):
    """Recordings in the place of feature files."""
    for name in NAMES:
        (folder / f"features/{name}.npy").rename(folder / f"features/{name}.mp4")


def all_renamed(name="{}", file="{}"):
    """Other ids of all videos and other names of their feature files; {} is what they were."""
    return all_of(*(users.renamed(old, name.format(old), file.format(old)) for old in NAMES))


def leaving(name):
    """Another id of a video, which leads to a file elsewhere or to none."""
    def change(folder):
        (folder / "features/a").mkdir()
        for path in ("secret.npy", "features/...npy"):
            (folder / path).write_bytes((folder / "features/v1.npy").read_bytes())
        new = name.format(folder)
        edit(folder, lambda database: database.update({new: database.pop("v1")}))
    return change


BAD_FILES = all_of(
    users.features(["v1"], lambda x: np.full((64, 5), np.nan)), users.features(["v5"], np.ravel),
    users.features(["v3"], lambda x: x[:, :4]), text("features/v12.npy", "nothing"))
MANY_BAD_SEGMENTS = all_of(
    actions(NAMES[1:8], 1, segment=[20.0, 12.0]), actions(["v1"], 2, segment=[90.0, 95.0]))
SPLIT = "data --ratio 0 --split OWN/s.txt"
# (a change of the data, or {id: other fields of the entry, or detections}; a command; words)
CHANGED = [
    # Entries and predictions of one video are named, of many counted
    *(({name: fields}, "training", f"own.json|{name}|{words}")  # whichever subset it is in
      for name in ("v1", "v9", "v12") for fields, words in BAD_ENTRIES),
    *((dict.fromkeys(NAMES[2:9], fields), "data", "7 videos|v2, v3, v4, v5, v6|2 more")
      for fields, _ in BAD_ENTRIES),
    *(({"v12": found}, f"predictions{more}", f"pred.json|v12|{words}")
      for more in ("", " --subset validation") for found, words in BAD_DETECTIONS),
    *((dict.fromkeys(("v10", "v11", "v13"), found), "predictions", "3 videos|v10|v11|v13")
      for found, _ in BAD_DETECTIONS),
    # Odd text is escaped and cut wherever it stands
    *((change, command, "") for odd in ODD_TEXTS.values() for change, command in (
        ({"v1": {"duration": odd}}, "data"), ({"v1": {"annotations": odd}}, "data"),
        ({"v1": {"annotations": [odd]}}, "data"), ({"v1": {"subset": [odd]}}, "data"),
        ({"v1": action(label="A", segment=odd)}, "data"), ({"v1": segment(odd, odd)}, "data"),
        (dict.fromkeys(NAMES, {"subset": odd}), "data"), ({"v10": found(score=odd)}, "predictions"),
        (users.renamed("v1", odd, file="v1"), "data"),
        (text("pred.json", json.dumps({"results": {odd: []}})), "predictions"),
        (users.nothing, ("predictions", "--subset", odd)),
        (text("s.json", json.dumps([odd])), "data --ratio 0 --split OWN/s.json"))),
    # The annotation file
    *((text("own.json", content), "data", f"own.json|{key}|twice") for content, key in (
        ('{"database": {"v1": {"subset": "training"}, "v1": {"subset": "training"}}}', "v1"),
        ('{"database": {}, "database": {}}', "database"),
        ('{"database": {"v1": {"subset": "training", "fps": 1, "fps": 2}}}', "fps"))),
    (text("own.json", "[]"), "data", "own.json|database"),
    (entries(NAMES, subset=None), "data", "no entry has a subset|--test-subset none"),
    *((moved_to(*keys), "data", f"own.json|14 videos|{keys[0]}|" '"annotations": [{"segment"')
      for keys in (["actions"], ["segments", "labels"], ["events"], ["result", "actions"])),
    (text("own.json", '{"_via_settings": {"ui": {}}, "_via_img_metadata": {"a": {"regions": []}}}'),
     "data", "_via_settings|is a video"),
    (text("own.json", "<!DOCTYPE html>"), "data", "own.json|web page"),
    (actions(["v1"], 0, segment=[5.0, 5.0]), "data", "[5.0, 5.0]|empty|give events a length"),
    *((leaving(name), command, "leads out of the feature folder") for name in (
        "../secret", "a/../../secret", "..", "{}/secret", "x/..", "\0", "secret\0.npy", "a/../v1")
      for command in ("data", "data --missing skip")),
    *((leaving(name), "data", "") for name in ("", ".", "/")),
    (MANY_BAD_SEGMENTS, "data", "[20.0, 12.0]|1 more|7 videos|v1, v2, v3, v4, v5|2 more"),
    *((users.every_time(lambda t, unit=unit: unit * t), "data", f"{word}|seconds")
      for unit, word in ((50, "frames"), (1e3, "milli"), (1e6, "micro"))),
    (users.without(*TESTED), "data --train-subset other", "--train-subset|Training (10)"),
    (entries(NAMES[5:10], subset="unlabeled"), ("data", "--unlabelled-subset", "none such"),
     "none such|unlabeled (5)"),
    # The feature files
    (BAD_FILES, "data", "4 videos|v1, v3, v5, v12"),
    (users.features(["v1", "v5"], with_gaps), "data",
     "v1|nan at step 3|3 of its 64 steps|--fill-gaps|2 videos"),
    (users.features(["v1"], lambda x: x * np.nan), "data --fill-gaps", "v1|64 of its 64 steps"),
    (users.nothing, "data --skip-columns 5", "5 columns|--skip-columns 5"),
    (recordings, "data --extension .mp4", "14 videos|a recording|README"),
    *((loose, f"data {more}", words) for loose, more, words in (
        (users.loose_features, "--stride 0", "1 feature files|loose|--unlabelled-features none"),
        (all_of(users.loose_features, entries(["v1"], fps=49.5)), "", "loose|fps"))),
    (users.features(NAMES, np.transpose), "data", "transposed"),
    (users.no_features(*NAMES[:6], "v12"), "data", "7|--missing skip|v0, v1, v2, v3, v4|2 more"),
    (all_renamed("v_{}"), "data", "prefix|v_"),
    *((all_renamed(file=prefix + "{}"), "data", f"--prefix {prefix}|14")
      for prefix in ("v_", "video_", "rgb-")),
    (users.lacking("duration", "v2"), "data --stride 0", "v2|duration|--stride 0"),
    # Splits
    (all_of(users.lacking("annotations", "v7"), text("s.txt", "v1\nv7\n")), SPLIT,
     "s.txt|v7|1 of 2"),
    (text("s.txt", "v1\n"), "data --split OWN/s.txt", "s.txt|--ratio"),
    (text("s.txt", "v1\nv99\nv98"), SPLIT, "s.txt|v99|2 of 3 ids"),
    *((text("s.json", content), "data --ratio 0 --split OWN/s.json", words) for content, words in (
        ('{"labelled": [["v1"]]}', "s.json"), ('{"labelled": []}', "s.json|no labelled video"))),
    # External scores
    *((scores, "data --one-class --ext-scores OWN/scores.json", f"scores.json|{words}")
      for scores, words in (
          (scored("other {}", {"A": 1, "B": 1}), "4 of 4 test videos|v10"),
          (scored("{}", {"walk": 0.5, "C": 1}), "2 of 2 classes|A, B"),
          (scored("{}", {"A": 0.5, "B": -1.25}), "v10|-1.25|logits"))),
    # Nothing to learn
    *((change, f"data {more}", "own.json|nothing to learn") for change, more in (
        (actions(NAMES[:10], segment=[9.0, 3.0]), "--bad-segments skip"),
        (actions(NAMES[:10], segment=[50.0, 90.0]), "--bad-segments skip"),
        (actions(NAMES[:10], segment=[8.1, 8.2]), ""), (entries(NAMES[:10], annotations=[]), ""),
        (all_of(entries(NAMES, duration=100.0), actions(NAMES, segment=[60.0, 70.0])),
         "--trust-grid"))),
    *((change, f"data {more}", f"nothing to learn|{words}") for change, more, words in (
        (entries(NAMES[:10], annotations=[]), "", "no instance|--split stratified"),
        (actions(NAMES[:10], segment=[9.0, 3.0]), "--bad-segments skip", "--bad-segments skip"),
        (actions(NAMES[:10], segment=[8.1, 8.2]), "", "0.2 of a step|give events a length"),
        (all_of(entries(NAMES, duration=100.0), actions(NAMES, segment=[60.0, 70.0])),
         "--trust-grid", "after the last one|--stride"),
        (users.nothing, "--max-steps 4 --crop-keep 0.9", "too long for a crop|--max-steps"))),
    # Predictions
    (predictions("{}", segment=[20, 10]), "predictions", "[20.0, 10.0]|ends before it starts"),
    (text("pred.json", "[]"), "predictions", "pred.json|results"),
    (text("pred.json", '{"results": {"v10": [], "v11": [], "v10": []}}'), "predictions",
     "pred.json|v10|twice"),
    *((predictions(rule), "predictions", f"none of the 4|{rule.format('v10')}|v0")
      for rule in ("v_{}", "{}.mp4", "x/{}")),
]
TOO_FAR = ["--stride 2500", "--fps 0.001"]  # nothing is left to learn
OFF = ["--stride 50", "--stride 12.5", "--stride 5", "--fps 25", "--fps 100", "--fps 1", *TOO_FAR]
THRESHOLDS = (
    "0.5:0.9:0.15", "0.3:0.7:0.3", "0.7:0.3:0.1", "0.1:0.5:-0.1", "0.1:0.9:nan", "0.1:nan:0.1",
    "0.1:inf:0.1", "0.1:0.9:1e-9", "0.1:0.5:0.1:0.1", "0.5,,0.7", "nan", "-0.5,0.5", ":::", "0.5:")
COUNTS = (
    "stem", "channels", "heads", "batch", "resize", "crop-tries", "pretrain-epochs",
    "supervised-epochs", "supervised-steps", "joint-epochs", "icd-hidden", "icd-pairs", "acp-steps",
    "acp-clusters", "acp-restarts", "pre-nms", "max-detections", "windows")
# {a command on data that are right: words of the sentence}
UNCHANGED = {
    # The data
    **{f"data {more}": "span|14 videos|--trust-grid|--stride" for more in OFF},
    **{f"data {more} --trust-grid": "nothing to learn" for more in TOO_FAR},
    "data --train-subset x": "'x'|Training", "data --ratio 0.01": "0.01 (--ratio)|0 of 10",
    "data --features OWN/none --missing skip": "none", SPLIT: "s.txt|split file not found",
    "data --unlabelled-features OWN/empty": "--unlabelled-features",
    "data --stage pretrain --acp none": "stage pretrain|acp",
    "data --rato 0.1": "--rato|--ratio?", "data --joint_epoch 2": "--joint-epochs?",
    "data --alqua tiou": "--alqa?", "data --device gpu": "gpu|cuda, mps and others",
    "data --device privateuseone": "privateuseone", ("data", " "): "unrecognized",
    "data --ratio 2": "from 0 to 1, not 2", "train --dataset Thumos": "thumos?",
    "train --dataset active-net": "activitynet?", "evaluate --chekpoint x": "--checkpoint?",
    "data --ranges 900:999,900:999,900:999": "learn", "data --radius 1e-9": "learn",
    # Predictions
    "predictions --subset test": "'test'|Training (10)|validation (4)",
    **{("predictions", "--json", f"OWN/{name}"): "cannot be written" for name in (
        "full", "features", "none/out.json", "own.json/out.json", "x" * 300, "a\0b")},
    # Settings
    **{f"{kind} --tiou={x}": "--tiou" for x in THRESHOLDS for kind in ("data", "predictions")},
    "data --tiou high": "'high'", "data --windows 5,5": "windows|2 windows for 3 regression ranges",
    "training --out OWN/own.json": "own.json", "data --start OWN/none.pt": "none.pt",
    "data --ranges nan:4": "ranges", "data --ranges 0-4": "ranges|'0-4'",
    "data --windows five": "windows|'five'", "data --channels 15": "channels|15",
    **{f"data --{name} {10 ** 12}": name.replace("-", "_") for name in COUNTS},
    **{f"data --{name} {value}": name.replace("-", "_") for name, value in {
        "stem": 1000, "seed": 10 ** 30, "max-steps": 10 ** 30, "lr": 1e300, "stride": 1e300,
        "fps": 1e300, "tiou": "0:1:0.0000001", "ranges": ",".join(["0:4"] * 100_000)}.items()},
    # Command lines
    "train --dataset kinetics": "'kinetics'",
    "train --dataset OWN/no.json": "not found|no.json|--dataset|--features",
    "train --dataset thumos --root OWN --ratio 0.1":
        "OWN/annotations/thumos14.json|OWN/i3d_features|<id>.npy|ActionFormer",
    **{("train", *argv): "" for argv in (
        ["--lamda", "3"], ["--batch"], ["--batch", "two"], ["--batch", "9" * 5000], ["x" * 100_000],
        ["--dataset", "x" * 100_000 + ".json"], ["--device", "\x1b[31m"], ["--device", ""],
        ["--out", "a\0b"], ["--check", "--features", "a\0b", "--dataset", "a\0b.json"],
        ["--icd", "\udcff"], ["--precision", "x" * 5000], ["--device", "cuda:99"])},
    **{f"evaluate {argv}": "" for argv in (
        "", "--pred x.json", "--lamda 3", "--weights best", "--checkpoint a --pred b --gt c",
        "--tiou")},
    # Where there is no run
    **{command.format(name): "checkpoint" for name in ("none", "empty", "features", "own.json")
       for command in ("train --resume OWN/{0}", "training --resume OWN/{0} --out OWN/{0}")},
}
REFUSALS = CHANGED + [(users.nothing, *row) for row in UNCHANGED.items()]


@pytest.mark.parametrize(("change", "command", "words"), REFUSALS, ids=map(name_of, REFUSALS))
def test_refusals(own, capsys, monkeypatch, change, command, words):
    monkeypatch.chdir(own)
    (own / "full").symlink_to("/dev/full")
    (own / "empty").mkdir()
    of_predictions = isinstance(change, dict) and command.startswith("predictions")
    predict(own, users.perfect(own, TESTED) | (change if of_predictions else {}))
    if callable(change):
        change(own)
    elif not of_predictions:
        edit(own, lambda database: [database[name].update(change[name]) for name in change])
    before = sorted(own.rglob("*"))
    all_refused(own, capsys, command, words)
    assert sorted(own.rglob("*")) == before
