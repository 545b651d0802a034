"""Tests of wrong input: one plain sentence, exit code 2, nothing half-written."""
import io
import json
import math
import os
import re
import struct
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from plumbing import files
from tests.helpers import edit, own_argv
from tests.users import (
    NAMES,
    TESTED,
    TRAINED,
    actions,
    all_of,
    check,
    entries,
    every_time,
    features,
    lacking,
    no_features,
    nothing,
    perfect,
    predict,
    refusal,
    renamed,
    text,
    without,
)

pytestmark = pytest.mark.usefixtures("in_time")


def commands_of(own, command):
    """The command lines that a table's word or words mean; OWN is the folder of the data set."""
    kind, *more = command.split() if isinstance(command, str) else command
    more = [str(word).replace("OWN", str(own)) for word in more]
    return {
        "data": [own_argv(own, *more), check(own, *more)],
        "training": [own_argv(own, *more)],
        "train": [more],
        "evaluate": [["evaluate", *more]],
        "predictions": [
            ["evaluate", "--pred", own / "pred.json", "--gt", own / "own.json", *more]],
    }[kind]


def all_refused(own, capsys, command, *words):
    """Every command line is refused, and no run begins."""
    for argv in commands_of(own, command):
        refusal(argv, capsys, *words)
    assert not (own / "run").exists()


def names_of(table):
    """The names of a table's rows."""
    return [row[0] for row in table]


# ---- Feature files ------------------------------------------------------------------------------

def npy(shape, dtype="<f4", held=b"\0" * 1280):
    """The bytes of a .npy file whose header says what it likes."""
    file = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + held


def raw_npy(header):
    """The bytes of a .npy file with this text as its header."""
    content = header.encode("latin1")
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(content)) + content + b"\0" * 1280


BAD_ARRAYS = {
    "a terabyte": npy((50_000_000_000, 5)), "beyond 64 bits": npy((2 ** 62, 2 ** 62)),
    "negative": npy((-64, 5)), "negative twice": npy((-64, -5)), "no width": npy((64, 0)),
    "nothing held": npy((64, 5), held=b""), "void": npy((64, 5), dtype="|V0"),
    "objects": npy((64, 5), dtype="|O"), "no dict": raw_npy("[1, 2]\n"),
    "no Python": raw_npy("{'descr': \n"), "brackets": raw_npy("(" * 9000 + "\n"),
    "long": raw_npy("{" + " " * 60_000 + "}\n"),
    "a call": raw_npy("{'descr': '<f4', 'fortran_order': False, 'shape': tuple([64, 5])}\n"),
    "version 9": b"\x93NUMPY\x09\x00" + b"\0" * 2000, "magic alone": b"\x93NUMPY",
}


LOCAL = b"PK\x03\x04"
CENTRAL = b"PK\x01\x02"


def patched(path, *fields):
    """Other numbers in all headers of an archive: each (mark, offset, format, value)."""
    content = bytearray(path.read_bytes())
    for mark, offset, form, value in fields:
        for found in re.finditer(re.escape(mark), content):
            struct.pack_into(form, content, found.start() + offset, value)
    path.write_bytes(content)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 8
    path.write_bytes(content)


def archive_of(**members):
    """A change of a file to an archive of these members."""
    def change(path):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name.replace("_npy", ".npy"), content)
    return change


ARCHIVES = {
    "encrypted": lambda path: patched(path, (LOCAL, 6, "<H", 1), (CENTRAL, 8, "<H", 1)),
    "compressed strangely": lambda path: patched(
        path, (LOCAL, 8, "<H", 99), (CENTRAL, 10, "<H", 99)),
    "promising 4 GB": lambda path: patched(path, (CENTRAL, 24, "<I", 2 ** 32 - 2)),
    "cut": lambda path: os.truncate(path, path.stat().st_size - 30),
    "flipped": flip,
    "text": b"PK not really",
    "without members": archive_of(),
    "of other members": archive_of(**{"feats": "no array", "\x1b[31m_npy": npy((2, 2))}),
}
NO_FILES = {
    "a pipe": os.mkfifo,
    "zeros": lambda path: path.symlink_to("/dev/zero"),
    "a loop": lambda path: path.symlink_to(path),
    "a folder": Path.mkdir,
    "dangling": lambda path: path.symlink_to(path.with_name("nowhere")),
}
PICKLED = np.array([{"a": 1}], dtype=object)


def with_value(value):
    """A change of one value of the features."""
    def change(path):
        x = np.load(path).astype(np.float64)
        x[41, 3] = value
        np.save(path, x)
    return change


def instead(make):
    """A change of a file to what is none."""
    def change(path):
        path.unlink()
        make(path)
    return change


def rows(extension, table, *words):
    """Rows of BAD_FEATURES."""
    return [(f"{extension} {name}", extension, spoil, words) for name, spoil in table.items()]


# (name, extension, what stands in the file's place: bytes, an array, a tensor or other content of
# a .pt file, or what is done to the file; words of the sentence)
BAD_FEATURES = [
    (".npy missing", ".npy", Path.unlink, ["not found"]),
    (".npy truncated", ".npy", lambda path: os.truncate(path, 300), ["cannot be read"]),
    *rows(".npy", {"pickled": PICKLED, "empty": b""}, "cannot be read"),
    (".npy width", ".npy", np.zeros((64, 4)), ["4", "5"]),
    *rows(".npy", {"shape": np.zeros(64), "no steps": np.zeros((0, 5)),
                   "of text": np.array([["x"] * 5])}, "(T, D)"),
    (".npy transposed", ".npy", np.zeros((5, 70)), ["transposed"]),
    (".npy nan", ".npy", with_value(np.nan), ["nan", "step 41"]),
    (".npy inf", ".npy", with_value(np.inf), ["inf", "step 41"]),
    *rows(".npy", {str(x): with_value(x) for x in (-np.inf, 1e300, -1e39, 3.5e38)}, "step 41"),
    *rows(".npy", {str(dtype): np.zeros((64, 5), dtype) for dtype in (
        "c8", "c16", "m8[s]", "M8[s]", "?", "S4", "U4", "V8", [("a", "<f4")])}, "real numbers"),
    *rows(".npy", BAD_ARRAYS),
    *rows(".npz", {name: archive_of(feats_npy=array) for name, array in BAD_ARRAYS.items()}),
    *rows(".npz", {"pickled": lambda path: np.savez(path, feats=PICKLED)} | ARCHIVES),
    *rows(".pt", {str(dtype): torch.zeros((64, 5), dtype=dtype) for dtype in (
        torch.complex64, torch.bool, torch.complex128)}, "real numbers"),
    *rows(".pt", {
        "a dict": {"x": 1}, "a list": [torch.zeros(64, 5)], "of text": "text", "a number": 3,
        "none": None,
        "of petabytes": torch.zeros(1).expand(10 ** 8, 10 ** 8),
        "sparse": torch.zeros(64, 5).to_sparse(),
        "a dict of none": {"feats": None},
        "a dict of a dict": {"feats": {"feats": torch.zeros(64, 5)}},
        "executing": lambda path: torch.save(subprocess.Popen, path),
    } | ARCHIVES),
    *rows(".csv", {f"{content}": content for content in (
        b"1;2;3\n4;5;6\n", b"a,b\n1,x\n", b"1,2\n3\n", b"", b"\n\n", b"f0,f1\n", b"\x00\x01\n",
        b"1,nan\n2,3\n")}),
    *(row for extension in (".npy", ".npz", ".pt", ".csv")
      for row in rows(extension, {name: instead(make) for name, make in NO_FILES.items()})),
]


def convert(own, extension, write=None):
    """Write all features in another kind of file, as write(path, array) does it."""
    writers = {
        ".npy": np.save,
        ".npz": lambda path, x: np.savez(path, feats=x),
        ".pt": lambda path, x: torch.save(torch.from_numpy(x), path),
        ".csv": lambda path, x: np.savetxt(path, x, delimiter=",", fmt="%.9g"),
    }
    for name in NAMES:
        path = own / f"features/{name}.npy"
        x = np.load(path)
        path.unlink()
        (write or writers[extension])(path.with_suffix(extension), x)


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
@pytest.mark.parametrize(
    ("extension", "spoil", "words"), [row[1:] for row in BAD_FEATURES], ids=names_of(BAD_FEATURES))
def test_bad_feature_files(own, capsys, name, extension, spoil, words):
    if extension != ".npy":
        convert(own, extension)
    damage(own / f"features/{name}{extension}", spoil)
    refusal(own_argv(own, "--extension", extension), capsys, name, *words)
    assert not (own / "run").exists()


def test_an_archive_that_unpacks_to_more_than_fits_is_refused(own, capsys, monkeypatch):
    convert(own, ".npz")
    np.savez_compressed(own / "features/v7.npz", feats=np.zeros((400_000, 5)))
    monkeypatch.setattr(files, "MOST_UNPACKED", 10 ** 7)
    refusal(check(own, "--extension", ".npz"), capsys, "v7", "unpacks")


# ---- Annotations and predictions ----------------------------------------------------------------

def segment(found):
    """Fields of an entry with one instance."""
    return {"annotations": [{"label": "A", "segment": found}]}


def label(found):
    """Fields of an entry with one instance of this label."""
    return {"annotations": [{"label": found, "segment": [1.0, 2.0]}]}


NO_NUMBERS = {
    "nan": "nan", "infinity": "-Infinity", "401 digits": "1" * 401, "words": "twelve",
    "a whole number of 401 digits": 10 ** 400, "empty": "", "bool": True, "list": [1],
    "dict": {"s": 1}, "float nan": math.nan}
# (name, other fields of a video's entry, words of the sentence)
BAD_ENTRIES = [
    ("reversed", segment([20.0, 12.0]), ["[20.0, 12.0]"]),
    ("of no length", segment([12.0, 12.0]), ["[12.0, 12.0]"]),
    ("after the end", segment([40.0, 50.0]), ["[40.0, 50.0]", "outside"]),
    ("far past the end", segment([10.0, 9999.0]), ["outside"]),
    ("before the start", segment([-9.0, -3.0]), ["outside"]),
    ("after the features", {"duration": None} | segment([900.0, 910.0]), ["outside"]),
    ("text", segment("12-20"), ["'12-20'"]),
    ("null", segment([1, None]), ["None"]),
    ("one time", segment([1]), []),
    ("no label", {"annotations": [{"segment": [1.0, 2.0]}]}, ["no label"]),
    ("fps 0", {"fps": 0}, ["fps", "0"]),
    ("fps negative", {"fps": -1}, ["fps"]),
    ("no fps", {"fps": None}, ["--fps"]),
    ("duration", {"duration": "long"}, ["'long'"]),
    ("no list", {"annotations": 3}, ["list"]),
    ("a list of subsets", {"subset": ["x"]}, []),
    ("subset a number", {"subset": 3}, ["subset"]),
    *((f"{key} {name}", {key: value}, ["number"])
      for key in ("duration", "fps") for name, value in NO_NUMBERS.items()),
    *((f"time {name}", segment([1.0, value]), ["number"]) for name, value in NO_NUMBERS.items()),
    *((f"label {x}", label(x), ["label"])
      for x in ([], [["A"]], [None], {"name": "A"}, True, "  ", [""])),
]


@pytest.mark.parametrize(
    ("fields", "words"), [row[1:] for row in BAD_ENTRIES], ids=names_of(BAD_ENTRIES))
def test_bad_entries_of_one_video_are_named_and_of_many_counted(own, capsys, fields, words):
    whole = (own / "own.json").read_bytes()
    for name in ("v1", "v9", "v12"):  # whichever subset it is in
        entries([name], **fields)(own)
        refusal(own_argv(own), capsys, "own.json", name, *words)
        text("own.json", whole)(own)
    assert not (own / "run").exists()
    entries(NAMES[2:9], **fields)(own)
    refusal(check(own), capsys, "7 videos", "v2, v3, v4, v5, v6", "2 more")


def found(**fields):
    """Detections of a video, one with other fields."""
    return [{"label": "A", "score": 1, "segment": [1, 2]} | fields]


# (name, the detections of a video, words of the sentence)
BAD_DETECTIONS = [
    ("without a score", [{"label": "A", "segment": [1, 2]}], []),
    ("no list", 3, ["3"]),
    ("a dict", {}, ["{}"]),
    ("a list of labels", found(label=["A"]), []),
    ("score nan", found(score=math.nan), ["nan"]),
    *((f"score {name}", found(score=value), ["number"]) for name, value in NO_NUMBERS.items()),
    *((f"time {name}", found(segment=[value, 3]), ["number"])
      for name, value in NO_NUMBERS.items()),
]


@pytest.mark.parametrize(
    ("detections", "words"), [row[1:] for row in BAD_DETECTIONS], ids=names_of(BAD_DETECTIONS))
def test_bad_predictions_of_one_video_are_named_and_of_many_counted(
        own, capsys, detections, words):
    argv = predict(own, perfect(own, TESTED) | {"v12": detections})
    refusal(argv, capsys, "pred.json", "v12", *words)
    refusal([*argv, "--subset", "validation"], capsys, "pred.json", "v12", *words)
    argv = predict(own, perfect(own, TESTED) | dict.fromkeys(("v10", "v11", "v13"), detections))
    refusal(argv, capsys, "3 videos", "v10", "v11", "v13")


# ---- JSON ---------------------------------------------------------------------------------------

BAD_JSON = {
    "100000 brackets": "[" * 100_000,
    "100000 braces": '{"a":' * 100_000,
    "100000 brackets closed": "[" * 100_000 + "]" * 100_000,
    "brackets in a field": '{"database": {"v1": {"x": ' + "[" * 100_000 + "]" * 100_000 + "}}}",
    "5000 digits": '{"database": {"v1": {"duration": ' + "9" * 5000 + "}}}",
    "empty": "", "blank": " \n", "null": "null", "number": "3", "text": '"database"', "list": "[]",
    "a list of entries": '[{"subset": "training"}]',
    "database as a list": '{"database": [{"subset": "training"}]}',
    "database null": '{"database": null}',
    "entries as numbers": '{"database": {"v1": 3}}',
    "NUL": '{"database": {"v1\0": {}}}',
    "cut": '{"database": {', "trailing": '{"database": {}} {"database": {}}',
    "comments": '{"database": {}} // all', "single quotes": "{'database': {}}",
    "no videos": '{"database": {}}',
    "UTF-16": b"\xff\xfe{\x00", "bytes": b"\x80abc", "latin-1": b'{"\xe4": 1}',
}
# (a command that reads a file of this kind, words of the sentence with "|" between)
JSON_INPUTS = [
    ("data --dataset OWN/odd.json", "annotation file|odd.json"),
    ("data --annotations OWN/odd.json", "annotation file|odd.json"),
    ("data --ratio 0 --split OWN/odd.json", "split file|odd.json"),
    ("predictions --gt OWN/odd.json", "odd.json"),
    ("predictions --pred OWN/odd.json", "odd.json"),
]
OTHER_INPUTS = [
    ("data --ratio 0 --split OWN/odd.txt", "split file|odd.txt"),
    ("evaluate --checkpoint OWN/odd.pt", "odd.pt"),
    ("data --start OWN/odd.pt", "odd.pt"),
    ("train --resume OWN/odd.pt", "odd.pt"),
]


@pytest.mark.parametrize("fault", BAD_JSON | NO_FILES)
def test_inputs_that_are_no_json_or_no_file(own, capsys, fault):
    predict(own, perfect(own, TESTED))
    for ending in ("json", "txt", "pt"):
        content = (BAD_JSON | NO_FILES)[fault]
        damage(own / f"odd.{ending}", content.encode() if isinstance(content, str) else content)
    word = "|JSON" if fault == "cut" else ""
    for command, words in JSON_INPUTS + (OTHER_INPUTS if fault in NO_FILES else []):
        all_refused(own, capsys, command, *(words + word).split("|"))


ODD_TEXTS = {
    "ESC": "\x1b[31mred\x1b]0;title\x07", "NUL": "a\0b", "newline": "a\nerror: b\r\nc",
    "lone surrogate": "a\ud800b", "right to left": "a\u202eb\u2066", "C1": "a\x9b31mb",
    "line separator": "a\u2028b", "long": "x" * 300_000, "long and odd": "\x1b" * 300_000,
}


@pytest.mark.parametrize("name", ODD_TEXTS)
def test_odd_text_is_escaped_and_cut_wherever_it_stands(own, capsys, name):
    odd = ODD_TEXTS[name]
    whole = (own / "own.json").read_bytes()
    for change in (
            lambda folder: edit(folder, lambda database: database.update({odd: database["v1"]})),
            entries(["v1"], duration=odd),
            entries(["v1"], annotations=odd),
            entries(["v1"], **segment(odd)),
            entries(["v1"], **segment([odd, odd])),
            entries(["v1"], annotations=[odd]),
            entries(["v1"], subset=[odd]),
            entries(NAMES, subset=odd)):
        change(own)
        refusal(check(own), capsys)
        text("own.json", whole)(own)
    refusal(predict(own, {"v10": found(score=odd)}), capsys)
    refusal(predict(own, {odd: []}), capsys)
    refusal([*predict(own, {"v10": []}), "--subset", odd], capsys)
    text("s.json", json.dumps([odd]))(own)
    refusal(check(own, "--ratio", 0, "--split", own / "s.json"), capsys)


# ---- Every other refusal ------------------------------------------------------------------------
def predictions(rule="{}", names=TESTED, **more):
    """Perfect predictions of these videos, whose ids are written otherwise."""
    def change(folder):
        results = {rule.format(name): found for name, found in perfect(folder, names).items()}
        predict(folder, results | more)
    return change


def all_prefixed(folder):
    for name in NAMES:
        renamed(name, f"v_{name}", file=name)(folder)


def bad_features(folder):
    for name, array in (
            ("v1", np.full((64, 5), np.nan)), ("v3", np.zeros((64, 4))), ("v5", np.zeros(64))):
        np.save(folder / f"features/{name}.npy", array)
    text("features/v12.npy", "nothing")(folder)


def leaving(name):
    """Another id of a video, which leads to a file elsewhere or to none."""
    def change(folder):
        new = name.format(folder)
        (folder / "features/a").mkdir()
        for path in (folder / "secret.npy", folder / "features/...npy"):
            path.write_bytes((folder / "features/v1.npy").read_bytes())
        edit(folder, lambda database: database.update({new: database.pop("v1")}))
    return change


def prefixed_files(prefix):
    """Feature files that all have a prefix."""
    def change(folder):
        for name in NAMES:
            (folder / f"features/{name}.npy").rename(folder / f"features/{prefix}{name}.npy")
    return change


TOO_FAR = ["--stride 2500", "--fps 0.001"]  # nothing is left to learn
OFF = [f"--stride {x}" for x in (50, 12.5, 5, 2500)] + [f"--fps {x}" for x in (25, 100, 1, 0.001)]
MANY_BAD_SEGMENTS = all_of(
    actions(NAMES[1:8], 1, segment=[20.0, 12.0]), actions(["v1"], 2, segment=[90.0, 95.0]))
DUPLICATES = {
    '{"database": {"v1": {"subset": "training"}, "v1": {"subset": "training"}}}': "v1",
    '{"database": {}, "database": {}}': "database",
    '{"database": {"v1": {"subset": "training", "fps": 1, "fps": 2}}}': "fps",
}
THRESHOLDS = (
    "0.5:0.9:0.15", "0.3:0.7:0.3", "0.7:0.3:0.1", "0.1:0.5:-0.1", "0.1:0.9:nan", "0.1:nan:0.1",
    "0.1:inf:0.1", "0.1:0.9:1e-9", "0.1:0.5:0.1:0.1", "0.5,,0.7", "nan", "-0.5,0.5", ":::", "0.5:")
HUGE = 10 ** 12
BOUNDED = [
    ("stem", 1000), ("seed", 10 ** 30), ("max-steps", 10 ** 30), ("lr", 1e300), ("stride", 1e300),
    ("fps", 1e300), ("tiou", "0:1:0.0000001"), ("ranges", ",".join(["0:4"] * 100_000)),
    *((name, HUGE) for name in (
        "stem", "channels", "heads", "batch", "resize", "crop-tries", "pretrain-epochs",
        "supervised-epochs", "supervised-steps", "joint-epochs", "icd-hidden", "icd-pairs",
        "acp-steps", "acp-clusters", "acp-restarts", "pre-nms", "max-detections", "windows")),
]
SPLIT = "data --ratio 0 --split OWN/s.txt"

# (a change, a command of commands_of(), words of the sentence with "|" between)
REFUSALS = [
    # The annotation file
    *((text("own.json", content), "data", f"own.json|{key}|twice")
      for content, key in DUPLICATES.items()),
    (text("own.json", "[]"), "data", "own.json|database"),
    (text("pred.json", "[]"), "predictions", "pred.json|results"),
    (entries(NAMES, subset=None), "data", "subset|none (14)"),
    *((nothing, f"data {more}", "span|14 videos|--trust-grid|--stride") for more in OFF),
    *((nothing, f"data {more} --trust-grid", "nothing to learn") for more in TOO_FAR),
    *((leaving(name), command, "leads out of the feature folder") for name in (
        "../secret", "a/../../secret", "..", "{}/secret", "x/..", "\0", "secret\0.npy", "a/../v1")
      for command in ("data", "data --missing skip")),
    *((leaving(name), "data", "") for name in ("", ".", "/")),
    (MANY_BAD_SEGMENTS, "data", "[20.0, 12.0]|1 more|7 videos|v1, v2, v3, v4, v5|2 more"),
    (every_time(lambda t: 50 * t), "data", "frames|seconds"),
    (every_time(lambda t: 1e3 * t), "data", "milli|seconds"),
    (every_time(lambda t: 1e6 * t), "data", "micro|seconds"),
    (nothing, "data --train-subset x", "'x'|Training"),
    (without(*TESTED), "data --train-subset other", "--test-subset|none"),
    (entries(NAMES[5:10], subset="unlabeled"), ["data", "--unlabelled-subset", "none such"],
     "none such|unlabeled (5)"),
    # The feature files
    (bad_features, "data", "4 videos|v1, v3, v5, v12"),
    (features(NAMES, np.transpose), "data", "transposed"),
    (no_features(*NAMES[:6], "v12"), "data", "7|--missing skip|v0, v1, v2, v3, v4|2 more"),
    (nothing, "data --features OWN/none --missing skip", "none"),
    (lambda own: (own / "empty").mkdir(), "data --unlabelled-features OWN/empty",
     "--unlabelled-features"),
    (all_prefixed, "data", "prefix|v_"),
    *((prefixed_files(prefix), "data", f"--prefix {prefix}|14")
      for prefix in ("v_", "video_", "rgb-")),
    (lacking("duration", "v2"), "data --stride 0", "v2|duration|--stride 0"),
    # Splits
    (all_of(lacking("annotations", "v7"), text("s.txt", "v1\nv7\n")), SPLIT, "s.txt|v7|1 of 2"),
    (text("s.txt", "v1\n"), "data --split OWN/s.txt", "s.txt|--ratio"),
    (text("s.txt", "v1\nv99\nv98"), SPLIT, "s.txt|v99|2 of 3 ids"),
    (nothing, SPLIT, "s.txt|split file not found"),
    *((text("s.json", content), "data --ratio 0 --split OWN/s.json", words) for content, words in (
        ('{"labelled": [["v1"]]}', "s.json"),
        ('{"labelled": []}', "s.json|no labelled video"))),
    (nothing, "training --ratio 1.0", "--ratio 1.0|no unlabelled video"),
    (nothing, "data --ratio 0.01", "--ratio 0.01|0 of 10"),
    # Nothing to learn
    *((change, f"data {more}", "own.json|nothing to learn") for change, more in (
        (actions(TRAINED, segment=[9.0, 3.0]), "--bad-segments skip"),
        (actions(TRAINED, segment=[50.0, 90.0]), "--bad-segments skip"),
        (actions(TRAINED, segment=[8.1, 8.2]), ""),
        (all_of(entries(NAMES, duration=100.0), actions(NAMES, segment=[60.0, 70.0])),
         "--trust-grid"),
        (entries(TRAINED, annotations=[]), ""))),
    (nothing, "data --ranges 900:999,900:999,900:999", "learn"),
    (nothing, "data --radius 1e-9", "learn"),
    # Predictions
    *((predictions(rule), "predictions", f"none of the 4|{rule.format('v10')}|v0")
      for rule in ("v_{}", "{}.mp4", "x/{}")),
    (predictions(), "predictions --subset test", "'test'|Training (10)|validation (4)"),
    (text("pred.json", '{"results": {"v10": [], "v11": [], "v10": []}}'), "predictions",
     "pred.json|v10|twice"),
    *((predictions(), f"predictions --tiou={tiou}", "--tiou") for tiou in THRESHOLDS),
    *((predictions(), ["predictions", "--json", f"OWN/{name}"], "cannot be written") for name in (
        "full", "features", "none/out.json", "own.json/out.json", "x" * 300, "a\0b")),
    # Settings
    *((nothing, f"data --tiou={tiou}", "--tiou") for tiou in THRESHOLDS),
    (nothing, "data --tiou high", "'high'"),
    (nothing, "training --out OWN/own.json", "own.json"),
    (nothing, "data --ranges nan:4", "ranges"),
    (nothing, "data --ranges 0-4", "ranges|'0-4'"),
    (nothing, "data --windows five", "windows|'five'"),
    (nothing, "data --windows 5,5", "windows|2 windows for 3 regression ranges"),
    (nothing, "data --channels 15", "channels|15"),
    (nothing, "data --start OWN/none.pt", "none.pt"),
    *((nothing, f"data --{name} {value}", name.replace("-", "_")) for name, value in BOUNDED),
    # Command lines
    (nothing, "train --dataset kinetics", "'kinetics'"),
    (nothing, "train --dataset OWN/none.json", "not found|none.json"),
    (nothing, "train --dataset thumos --root OWN --ratio 0.1",
     "OWN/annotations/thumos14.json|OWN/i3d_features|<id>.npy|ActionFormer"),
    *((nothing, ["train", *argv], "") for argv in (
        ["--lamda", "3"], ["--batch"], ["--batch", "two"], ["--batch", "9" * 5000], ["x" * 100_000],
        ["--dataset", "x" * 100_000 + ".json"], ["--device", "\x1b[31m"], ["--device", ""],
        ["--out", "a\0b"], ["--check", "--features", "a\0b", "--dataset", "a\0b.json"],
        ["--icd", "\udcff"], ["--precision", "x" * 5000], ["--device", "cuda:99"])),
    *((nothing, f"evaluate {argv}", "") for argv in (
        "", "--pred x.json", "--lamda 3", "--weights best", "--checkpoint a --pred b --gt c",
        "--tiou")),
    # Where there is no run
    *((lambda own: (own / "empty").mkdir(), command, "checkpoint")
      for name in ("none", "empty", "features", "own.json")
      for command in (f"train --resume OWN/{name}",
                      f"training --resume OWN/{name} --out OWN/{name}")),
]


def name_of(row):
    """The name of a row of REFUSALS."""
    command = row[1] if isinstance(row[1], str) else " ".join(map(str, row[1]))
    return f"{command[:40]} {row[2][:40]}".encode("ascii", "backslashreplace").decode()


@pytest.mark.parametrize(("change", "command", "words"), REFUSALS, ids=map(name_of, REFUSALS))
def test_refusals(own, capsys, monkeypatch, change, command, words):
    monkeypatch.chdir(own)
    (own / "full").symlink_to("/dev/full")
    change(own)
    before = sorted(own.rglob("*"))
    all_refused(own, capsys, command, *words.replace("OWN", str(own)).split("|"))
    assert sorted(own.rglob("*")) == before
