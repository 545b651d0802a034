"""A seeded campaign of kills and damaged inputs; all: -m campaign -s, in some minutes, else a part.

A run that was killed and resumed must end as one that nobody disturbed, bit for bit. A damaged
input is read rightly, by an independent reading, or refused in one sentence. Every case has a seed
and a forked process of its own; what fails keeps its folder."""
import io
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
import warnings
import zipfile
from collections import Counter, namedtuple
from copy import deepcopy
from dataclasses import fields
from functools import partial
from pathlib import Path
from random import choice, randbytes, randrange

import numpy as np
import pytest
import torch

import data
import evaluate
import train
from extras import viewer
from plumbing import arguments, checkpoints, files, forms, journal, runs, settings, sources
from tests.helpers import evaluated, own_argv, read_log, read_result, same, weights, write_own

SECONDS, MEMORY = 60, 6 * 2 ** 30  # of a child, more is a hang; bytes of address space of a case
MANY = pytest.mark.parametrize("many", [False, pytest.param(True, marks=pytest.mark.campaign)])
LONGER = ("--log-every", 1, "--theta-l", 0.0, "--refresh", 2, "--supervised-epochs", 3,
          "--supervised-steps", 6, "--joint-epochs", 3)  # than TINY: pseudo labels are made twice
Base = namedtuple("Base", "folder arrays whole middle metrics")  # {id: features}; middle's metrics
STEPS, PRETRAINED, JOINT = 28, 10, 16  # of such a run, and those before stages 2 and 3


def run_child(work, argument, folder):
    """The exit code of work(argument), minus a signal, or "hang": forked, in a new folder."""
    def be_a_command():
        os.chdir(folder)
        sys.stdout = open("stdout", "w", encoding="utf-8")
        sys.stderr = open("stderr", "w", encoding="utf-8", errors="backslashreplace")
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stderr.fileno(), 2)
        sys.exit(work(argument))

    folder.mkdir(parents=True)
    child = multiprocessing.get_context("fork").Process(target=be_a_command, daemon=True)
    child.start()
    child.join(SECONDS)
    code = "hang" if child.is_alive() else child.exitcode
    child.kill()
    return code


# ---- Damage -------------------------------------------------------------------------------------

def saved(content, save=torch.save):
    """The bytes that save(content, file) writes."""
    file = io.BytesIO()
    save(content, file)
    return file.getvalue()


HUGE, DEEP, TWICE = "@@HUGE@@", "@@DEEP@@", "@@TWICE@@"  # stand for what json.dumps cannot write
TEXTS = (
    "", " ", "A", "B", "a", "A ", "v1", "v_1", "a\0b", "\x1b[31mred", "line\nline\r", "\x85", "é",
    "\u2028", "\ud800", "\udcff", "\U0001f600", "x" * 300, "x" * 300_000, "%s%n{0}", HUGE, DEEP,
    *"training validation none toy stratified .npz .txt ../secret /abs/x a/b/c .. . ~ /".split(),
    *"/dev/zero /dev/null nan inf -Infinity 1e999 1e39 -inf 12.5".split(), " 3 ", "1_0", "²", "٣",
    "Ⅷ", "0x10", "0x1p3", "1+2j", '"1"', "1,5", "1;2", "1 2", "1.5.2", "--1", "1e", "1e3", "#",
    "# 1", "True", "2147483648", "9" * 20, "9" * 5000,
    *"None 5,5,5 5,-5,5 1,2,3,4 0:4 0:8,8:16 0:4,4:8,8:inf inf:0,0:1,1:2 1e400:2 0:1:1e-9".split(),
    *"0.5:0.4:0.1 0.3,0.5 nan:1:1 0.3:0.7:0.1:0.1 , :".split())
NUMBERS = (
    0, 1, -1, 2, 3, 7, 16, 100, 8192, 10 ** 6, -0.0, 0.5, 1e-12, 1e12, 1e300, -1e300, 1e-300,
    5e-324, 1e10, 2 ** 31, 2 ** 63, -2 ** 63, 10 ** 30, 10 ** 400, math.nan, math.inf, -math.inf)
OTHERS = (
    None, True, False, [], {}, [[]], [None], [1, 2, 3], [2, 8], ["1", "2"], ["A", "B"], ["A", "A"],
    [[1, 2], [3, 4]], {"a": 1}, {"segment": [1, 2]}, [math.nan, 1], [1, True])
VALUES = (TEXTS, TEXTS, NUMBERS, NUMBERS, OTHERS)
TENSORS = (torch.zeros(3), torch.tensor(math.nan), torch.zeros(0), torch.tensor(True))
CELLS = ("1", "c1", list("abcde"), list("01234"))
NO_FILES = (  # what may stand in a file's place
    b"", b"\0", b"text\n", b"\x80\x02}q\x00.", b"\x93NUMPY", b"PK\x05\x06" + 18 * b"\0",
    saved(TENSORS[0], partial(torch.save, _use_new_zipfile_serialization=False)))
KEYS = (*"label_id duration_second frame_rate fps subset annotations segment label score".split(),
        "database", "results", "extra", 3)  # of the files that are read; and no key at all
WAYS = (*3 * ("replaced",), "several", "gone", "twice", "renamed", "more", "exchanged")
DTYPES = ("<c8", "<c16", "<m8[s]", "<M8[s]", "|b1", "|O", "<U8", "|S8", "|V4")
READABLE = ("<f2", "<f8", ">f4", ">f8", "|i1", "<i8", ">i2", "<u4")


def damaged_bytes(raw):
    a, b = sorted((randrange(len(raw) + 1), randrange(len(raw) + 1)))
    near = min(a, choice((a, randrange(100))))  # in a header, which then lies
    block = choice((b"\0", b"\xff")) * randrange(1, 600)  # as a broken disk leaves it
    flipped = bytearray(raw)
    for _ in range(choice((1, 1, 1, 2, 4, 8))):
        flipped[randrange(len(raw))] ^= 1 << randrange(8)
    return choice((
        *2 * [raw[:min(a, len(raw) - 1)]], *3 * [bytes(flipped)], raw + raw,
        raw[:a] + randbytes(randrange(1, 200)) + raw[a:],
        raw[:a] + block[:len(raw) - a] + raw[a + len(block):], raw[:a] + raw[b + (a == b):],
        raw.replace(raw[a:a + 1], choice((b";", b"\t", b" ", b"|", randbytes(1)))),
        raw[:near] + re.sub(rb"\d+", str(choice(NUMBERS)).encode(), raw[near:], count=1),
        choice((*NO_FILES, randbytes(500), b"\xff\xfe" + raw))))


def zipped(members, method=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for member in members:
            archive.writestr(*member)
    return file.getvalue()


def damaged_zip(raw):
    """(the bytes of a damaged archive, whether checksums or names must show it)."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    i = randrange(len(members))
    before, (name, content), after = members[:i], members[i], members[i + 1:]
    spoilt = name, damaged_bytes(content or b"\0")
    odd = choice(("../feats.npy", "/abs", "arr_0.npy", "a" * 5000, "é", "x", f"{name}.npy", "/"))
    lying = bytearray(raw)  # a wrong field in some headers: the flags, a checksum, a size, ...
    at, value = 2 * randrange(2, 14), choice((0, 1, 8, 9, 99, 0x7fff, 0xffff))
    heads = [match.start() + at for match in re.finditer(b"PK\x03\x04|PK\x01\x02", raw)]
    for head in choice((heads, [choice(heads)])):
        lying[head:head + 2] = value.to_bytes(2, "little")
    if random.random() < 0.2:  # the checksum is right
        return zipped([*before, spoilt, *after]), False
    return choice((
        *3 * [damaged_bytes(raw)], bytes(lying), zipped(members, zipfile.ZIP_DEFLATED),
        zipped(choice((before + after, [*before, (odd, b"abc"), *members[i:]], [*members, spoilt],
                       [*before, spoilt, *members[i:]], [*before, (odd, content), *after]))))), True


def odd_forms(x):
    """Arrays, or tensors, that cannot stand for x: no such numbers, or in another form."""
    if isinstance(x, np.ndarray):
        numbers = x.astype(choice(("<f4", "<f8", np.longdouble)))
        numbers.flat[choice((slice(None), randrange(x.size)))] = choice((
            math.nan, math.inf, -math.inf, 1e300, -1e300, 3.5e38, 3e38, 1e38, 1e30, 1e-320, 0.0))
        return numbers, x.astype(choice(DTYPES)), choice((
            x.T, x[0], x[:, 0], x[None], x[:, :, None], x[:0], x[:, :0], x[:, :4], x[:1], x[:, :1],
            x.ravel(), np.float32(3), np.hstack([x, x]), np.vstack(200 * [x]), x[::-2], x[:5, :]))
    some = torch.where(torch.rand(x.shape) < 2 / (2 + x.numel()), math.nan, x)
    return (
        some, torch.full(x.shape, math.nan), torch.full(x.shape, -math.inf), 1e300 * x.double(),
        x.double() if x.is_floating_point() else x.float(), x.to(torch.complex64), x.bool(),
        x.to(torch.int8) if x.dtype != torch.int8 else x.int(), x.to(torch.float8_e5m2), x[None],
        x.flatten()[:0], x.flatten()[:-1] if x.numel() > 1 else torch.zeros(7),
        torch.zeros(()) if x.ndim else torch.zeros(3), (x if x.ndim else x[None]).to_sparse(),
        torch.zeros(1).expand(10 ** 11, 5), torch.empty(x.shape, dtype=x.dtype, device="meta"))


def spot(content, stop=0.2):
    """(container, key) of a random part of nested dicts and lists."""
    key = choice(list(content) if isinstance(content, dict) else range(len(content)))
    inner = content[key] if isinstance(content[key], (dict, list)) else []
    return spot(inner, stop) if inner and random.random() >= stop else (content, key)


def spoil(content, values=VALUES):
    """Damage nested dicts and lists in place, in one of the WAYS."""
    way = choice(WAYS)
    for again in range(randrange(2, 6) if way == "several" else 1):
        box, key = spot(content)
        old, new = box[key], choice(choice(values))
        if isinstance(old, (np.ndarray, torch.Tensor)) and not again and random.random() < 0.75:
            new = choice(odd_forms(old))
        if way in ("replaced", "several"):
            box[key] = new
        elif way == "gone":
            del box[key]
        elif way == "exchanged":  # copies: one might hold the other
            other, place = spot(content)
            box[key], other[place] = deepcopy(other[place]), deepcopy(old)
        elif isinstance(box, list):
            box.insert(key, choice((old, new)))
            box[:] = box[::-1 if way == "renamed" else 1]
        elif way == "renamed":
            box[choice(TEXTS)] = box.pop(key)
        else:
            box[f"{TWICE}{key}" if way == "twice" else choice(KEYS)] = choice((old, new))


def damaged_json(content):
    damage = damaged_bytes if random.random() < 0.25 else bytes
    if damage is bytes:
        spoil(content)
    text = json.dumps(content, ensure_ascii=choice((True, True, False))).replace(TWICE, "")
    text = text.replace(f'"{HUGE}"', "9" * 5000).replace(f'"{DEEP}"', 10 ** 5 * "[" + 10 ** 5 * "]")
    return damage(text.encode("utf-8", "surrogatepass"))


def says(raw, found):
    """Whether JSON content says just what was found in it: numbers may be text, labels numbers."""
    if isinstance(found, (list, tuple)):
        return isinstance(raw, list) and len(raw) == len(found) and all(map(says, raw, found))
    if isinstance(found, float) and type(raw) in (int, float, str):
        return math.isfinite(found) and float(raw) == found
    return type(raw) in (int, float, str) and str(raw) == found and bool(found.strip())


def checked_annotations(path):
    """The annotations {id: Annotation} of a file, which says just that."""
    found, content = forms.read_annotations(path), json.loads(path.read_bytes())
    database = content.get("database", content)
    assert found.keys() == database.keys(), "other videos are read"
    for name, entry in database.items():
        a, items, pairs = found[name], entry.get("annotations"), []
        assert (a.subset, a.annotated) == ((entry.get("subset") or "").strip(), items is not None)
        for x, *keys in ((a.duration, "duration", "duration_second", "duration_seconds"),
                         (a.fps, "fps", "frame_rate")):
            given = [entry[key] for key in keys if entry.get(key) is not None]
            assert says(given[0], x) and x > 0 if given else x is None, f"{name}: {keys[0]}"
        for item in items or []:
            labels = item["label"] if isinstance(item["label"], list) else [item["label"]]
            assert labels, "a segment has no label"
            pairs += [[item["segment"], label] for label in labels]
        assert says(pairs, list(zip(a.segments.tolist(), a.labels))), f"{name} is read otherwise"
    return found


def plain_features(path):
    """The features of a file, read without our code."""
    if path.suffix == ".csv":  # a header has no number at all, or counts from 0 above decimals
        lines = re.split(r"\r\n|\r|\n", path.read_bytes().decode("utf-8-sig"))
        mark = [mark for mark in "\t;," if mark in lines[0]] or ","
        rows = [line.split(mark[0]) for line in lines if line.strip()]
        number = r"(?i)\s*[-+]?(nan|inf(inity)?|(\d[\d_]*\.?\d*|\.\d+)(e[-+]?\d+)?)\s*"
        words = not any(re.fullmatch(number, cell) for cell in rows[0])
        counts = rows[0] == list(map(str, range(len(rows[0])))) and len(rows[0]) > 1
        counts &= "." in lines[1]
        return np.array([list(map(float, row)) for row in rows[words or counts:]])
    if path.suffix == ".pt":
        content = torch.load(path, weights_only=True)
        x = content["feats"] if isinstance(content, dict) else content
        return (x.float() if x.dtype == torch.bfloat16 else x).detach().numpy()
    content = np.load(path, allow_pickle=False)
    return content if path.suffix == ".npy" else content.get("feats", content.get("arr_0"))


def fits(a, b):
    """Whether content `a` of a checkpoint might stand for `b`, as nobody can see the difference."""
    kinds = {type(a), type(b)}
    if kinds == {torch.Tensor}:  # two of the same form may have changed places
        forms = [(x.dtype, x.device, x.layout, x.shape) for x in (a, b)]
        return forms[0] == forms[1] and torch.equal(a.isfinite(), b.isfinite())
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() >= b.keys() and all(fits(a[key], b[key]) for key in b)
    if kinds in ({list}, {tuple}):
        return len(a) == len(b) and all(map(fits, a, b))
    alike = kinds <= {int, float} and -1e300 <= a <= 1e300 or kinds in ({str}, {bool})
    return alike or torch.Tensor not in kinds and a == b


def counts_printed():
    """The numbers of labelled, unlabelled and test videos that a command has printed."""
    return list(map(int, re.match(
        r"(\d+) labelled, (\d+) unlab\w*, (\d+) test", Path("stdout").read_text()).groups()))


def finite_metrics(name="out/metrics.json"):
    found = read_result(Path(name))
    assert all(0 <= x <= 1 + 1e-9 for x in (*found["mAP"], found["average_mAP"])), found
    return found


# ---- Cases: (command line, judge(), whether it must be read) ------------------------------------
# A command line is train.py's, or "evaluate" and evaluate.py's. After exit code 0 the judge raises
# where what was read is wrong. All are in a folder of their own.

CHECK = ("--out", "new", "--check")
MEASURE = ("evaluate", "--json", "out/metrics.json")
NAMES = [f"v{i}" for i in range(10)]  # of the training videos
DEVICES = ("cuda", "meta", "mps", "xla", "cpu:7", "cpu", "cpu:x", "", "cuda:99", "hpu", "tpu9",
           "privateuseone", "xpu", "mkldnn", "\x1b", "CPU", "vulkan", "lazy", "ipu")
FLAGS = "tiou subset ignore-labels weights device json pred gt checkpoint dataset features x"
SLOW = {  # what may make a run longer, and where it would read other data
    *"max_steps batch channels heads stem icd_pairs icd_hidden acp_steps acp_clusters".split(),
    *"acp_restarts pretrain_epochs supervised_epochs supervised_steps joint_epochs device".split(),
    "stage", "start", "init", "page", *sources.PLACES}
ODD_LINES = [line.split(" ") for line in (
    "--lambda 3", "--batch", "--batch 2 3", "x", "--no-batch", "--standardize=yes", "--\x1b[31m",
    "--" + "x" * 5000, "--lr --batch 2", "--ratio 0.3 --split x.txt", "--resume nothing",
    "--start ", "--start /dev/zero", "--resume ", "\udcff", "-h3", "-- --lr", "@x",
    "--overwrite --resume x", "--tiou=0.1:1:0.0001")]
NO_FEATURES = np.array(0, dtype=object)
FEATURES = {  # what each kind of feature file holds, {"feats": convert(x)}, and how that is saved
    ".npy": (np.asarray, lambda content, file: np.save(file, content.get("feats", NO_FEATURES))),
    ".npz": (np.asarray, lambda content, file: np.savez(
        file, **{ascii(name).strip("'")[:50]: x for name, x in content.items()})),
    ".pt": (lambda x: torch.from_numpy(x.astype(x.dtype.newbyteorder("="))), torch.save),
    ".csv": (np.ndarray.tolist, lambda content, file: file.write("\n".join(
        ",".join(map(str, row)) if isinstance(row, list) else str(row)
        for row in content["feats"]).encode("utf-8", "surrogatepass"))),
}


def judge_annotations(path):
    """The videos that train.py counts are those of an independent reading, all sane."""
    subsets = ("training", "validation")
    used = [a for a in checked_annotations(path).values() if a.subset.lower() in subsets]
    test = sum(a.subset.lower() == "validation" for a in used)
    labelled, unlabelled, tested = counts_printed()
    loose = {f"v{i}" for i in range(14)} - checked_annotations(path).keys()
    expected = len(used) - test + len(loose), test
    assert (labelled + unlabelled, tested) == expected, "videos are lost"
    for a in used:
        for start, end in a.segments:
            inside = min(end, a.duration or 32.5) - max(start, 0)
            assert end > start and inside >= 0.5 * (end - start), f"a segment is [{start}, {end}]"


def judge_metrics(pred, gt, subsets):
    """The metrics are those of independent readings, and what is left out is said."""
    def rows(part):
        return [[d["segment"], d["label"], d["score"]] for name in results for d in part[name]]

    annotations, predictions = checked_annotations(gt), forms.read_predictions(pred)
    results = json.loads(pred.read_bytes())["results"]
    assert results.keys() == predictions.keys(), "other videos are read"
    assert says(rows(results), rows(predictions)), "predictions are read otherwise"
    subsets = subsets or [  # those that the predicted videos are in, or all
        a.subset.lower() for name, a in annotations.items() if name in results or not results]
    truth = {name: a for name, a in annotations.items()
             if a.annotated and a.subset.lower() in subsets}
    tious = settings.thresholds_of("0.3:0.7:0.1")
    expected = evaluate.mean_average_precision(truth, predictions, tious)
    assert finite_metrics() == json.loads(json.dumps(expected)), "the metrics are others"
    known = {label for a in annotations.values() for label in a.labels}
    unknown = {label for _, label, _ in rows(predictions)} - known
    whole = not unknown and results.keys() <= truth.keys()
    assert whole or "warning: " in Path("stderr").read_text(), "left out without a word"


def text_case(kind, base):
    """A damaged file of annotations, for train.py or evaluate.py, or of predictions."""
    path = Path(f"{kind}.json").absolute()
    gt, pred = base.folder / "own.json", base.whole / "predictions.json"
    content = read_result(gt if kind == "annotations" else pred)
    for name, detections in content.get("results", {}).items():
        content["results"][name] = detections[:randrange(1, 12)]
    path.write_bytes(damaged_json(content))
    if kind == "annotations" and random.random() < 0.75:
        argv = own_argv(base.folder, *CHECK, "--dataset", path)
        return argv, partial(judge_annotations, path), False
    gt, pred = (path, pred) if kind == "annotations" else (gt, path)
    more = choice(((), ("--subset", "validation")))
    judge = partial(judge_metrics, pred, gt, more[1:])
    return [*MEASURE, "--pred", pred, "--gt", gt, *more], judge, False


def split_case(base):
    """A damaged split file: our JSON, a list, or lines."""
    ids = random.sample(NAMES, randrange(1, 8))
    odd = [choice((name, choice(TEXTS))) for name in ids]
    path, raw = choice((
        (Path("split.txt"), damaged_bytes("\n".join(ids).encode())),
        (Path("split.txt"), "\n".join(odd).encode("utf-8", "surrogatepass")),
        (Path("split.json"), damaged_json(list(ids))),
        (Path("split.json"), damaged_json({"labelled": ids, "unlabelled": ["v8", "v9"]}))))
    path.write_bytes(raw)

    def judge():
        if path.suffix == ".json":
            found = json.loads(raw)
            found = found["labelled"] if isinstance(found, dict) else found
            assert isinstance(found, list), "it lists no ids"
        else:
            found = filter(None, map(str.strip, path.read_text("utf-8-sig").splitlines()))
        found = {name if name in NAMES else name.removeprefix("v_") for name in found}
        assert found and found <= set(NAMES), "it lists other ids"
        assert counts_printed()[0] == len(found), "other videos are labelled"

    return own_argv(base.folder, *CHECK, "--split", path, "--ratio", 0), judge, False


def damaged_features(extension, x):
    """(the bytes of a damaged feature file, must it be read, must it be x if it is read)."""
    convert, save = FEATURES[extension]
    way = choice(("readable", *4 * ("spoilt",), *5 * ("bytes",)))
    if way == "readable":
        x = np.asarray(x.astype(choice(READABLE)), order=choice("CF"))
    content = {"feats": convert(x)}
    if way == "readable" and extension == ".pt":
        content["feats"] = choice((content["feats"], content["feats"].bfloat16()))
    elif way == "spoilt" and extension == ".csv":  # the first line may be a header
        first = [content["feats"].pop(0)]
        spoil(choice((first, content["feats"])), (TEXTS, TEXTS, CELLS))
        content["feats"][:0] = first
    elif way == "spoilt":
        spoil(content, (*VALUES, TENSORS) if extension == ".pt" else VALUES)
    if extension in (".npy", ".npz"):  # what is no array is written as an array of objects
        content = {name: np.asarray(x, None if isinstance(x, np.ndarray) else object)
                   for name, x in content.items()}
    if "feats" in content and random.random() < 0.3:  # without a name
        alone = {".npz": {"arr_0": content["feats"]}, ".pt": content["feats"]}
        content = alone.get(extension, content)
    raw, seen = saved(content, save), False
    if way == "bytes":
        zips = extension in (".npz", ".pt")
        raw, seen = damaged_zip(raw) if zips else (damaged_bytes(raw), False)
    return raw, way == "readable", seen


def feature_case(extension, base):
    """A damaged feature file of one kind; links stand for all others."""
    shutil.copytree(base.folder / extension, "features", copy_function=os.symlink)
    name, original = choice(list(base.arrays.items()))
    raw, must_read, seen = damaged_features(extension, original)
    path = Path(f"features/{name}{extension}")
    path.unlink()
    path.write_bytes(raw)

    def judge():
        found, x = files.read_features(path, files.Reading(), path.stem), plain_features(path)
        assert x.ndim == 2 and x.shape[1] == 5 and len(x), f"their shape is {x.shape}"
        assert x.dtype.kind in "fiu", f"their dtype is {x.dtype}"
        with np.errstate(over="ignore"):
            assert np.isfinite(x.astype(np.float32)).all(), "they are not finite"
        assert np.array_equal(found, x), "they are read otherwise"
        assert not seen or np.array_equal(found, original), "the damage was not seen"

    argv = own_argv(base.folder, *CHECK, "--features", "features", "--extension", extension)
    return argv, judge, must_read


def judge_run(folder, whole=None):
    """A run has ended with finite weights, and with those of another run if that is given."""
    found = weights(folder)
    assert all(x.isfinite().all() for x in found.values()), "weights are not finite"
    if whole or (folder / "metrics.json").exists():
        finite_metrics(folder / "metrics.json")
    assert whole is None or same(found, weights(whole)), "the weights are others"


def cache_case(base):
    """What is remembered of a feature file is damaged: it is read anew."""
    os.environ["XDG_CACHE_HOME"] = "cache"
    argv = own_argv(base.folder, *CHECK)
    s = arguments.settings_of(argv, train.Settings)
    expected = data.training_data(s)
    memory = files.memory_of(base.folder / "features" / f"{choice(NAMES)}.npy", s.reading())
    raw = memory.read_bytes()
    memory.unlink()
    way = choice(("bytes", "bytes", "numbers", "numbers", "link", "pipe", "folder"))
    if way == "bytes":
        memory.write_bytes(damaged_bytes(raw))
    elif way == "numbers":  # under the seal of others
        numbers = np.frombuffer(raw[32:]).copy()
        numbers[randrange(len(numbers))] = choice([x for x in NUMBERS if abs(x) < 1e308 or x != x])
        memory.write_bytes(raw[:32] + numbers.tobytes())
    elif way == "link":
        Path("victim").write_bytes(raw)
        memory.symlink_to(Path("victim").absolute())
    else:
        (os.mkfifo if way == "pipe" else Path.mkdir)(memory)

    def judge():
        found = data.training_data(s)
        assert found.fingerprint == expected.fingerprint, "wrong sums were believed"
        assert way != "link" or Path("victim").read_bytes() == raw, "a link's target was written"

    return argv, judge, True


def log_case(base):
    """A run goes on whose log was damaged: rows that are none are left out."""
    shutil.copytree(base.middle, "run")
    log = Path("run/log.jsonl")
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    if random.random() < 0.5:
        log.write_bytes(damaged_bytes(log.read_bytes()))
    else:
        spoil(rows)
        text = "\n".join(map(json.dumps, rows)).replace(TWICE, "").replace(f'"{HUGE}"', "9" * 5000)
        log.write_text(text.replace(f'"{DEEP}"', 10 ** 5 * "["))

    def judge():
        judge_run(Path("run"), base.whole)
        assert all(map(files.is_row, read_log(Path("run")))), "the log has other rows"

    return ["--resume", "run"], judge, True


def replaced_case(base):
    """A feature file is replaced while a run trains."""
    shutil.copytree(base.folder / "features", "features")
    name, x = choice(list(base.arrays.items()))
    content, at, calls, advance = [x], randrange(1, STEPS), [], train.advance
    spoil(content)

    def watched(*words):
        calls.append(words)
        if len(calls) == at:
            with warnings.catch_warnings(action="ignore"):
                np.save(f"features/{name}.npy", np.asarray(content[0] if content else 0, None if (
                    content and isinstance(content[0], np.ndarray)) else object))
        return advance(*words)

    train.advance = watched
    argv = own_argv(base.folder, *LONGER, "--out", "new", "--features", "features")
    return argv, partial(judge_run, Path("new")), False


def scores_case(base):
    """A damaged file of external scores."""
    of_video = {"A": 0.25, "B": 1}
    names = [f"v{i}" for i in range(10, 14)]
    content = choice((
        {"results": {name: dict(of_video) for name in names}},
        {"class": ["A", "B"], "results": {f"v_{name}": [0.25, 1] for name in names}}))
    path = Path("scores.json")
    path.write_bytes(damaged_json(content))

    def judge():
        found = json.loads(path.read_bytes())
        named, told = found.get("class"), Path("stderr").read_text()
        results = found["results"]
        for scores in results.values():
            values = scores.values() if isinstance(scores, dict) else scores
            assert all(float(x) >= 0 and math.isfinite(float(x)) for x in values), "odd scores"
            assert isinstance(scores, dict) or len(scores) == len(named), "scores without names"
        here = {name.removeprefix("v_") for name in results} | results.keys()
        assert here & set(names), "no test video has scores"
        assert set(names) <= here or "test videos" in told, "a video lacks scores without a word"

    return own_argv(base.folder, *CHECK, "--one-class", "--ext-scores", path), judge, False


def viewer_case(base):
    """The page of a run one of whose files is damaged."""
    shutil.copytree(base.whole, "viewed")
    path = choice([*Path("viewed").glob("*.json"), Path("viewed/log.jsonl")])
    raw = path.read_bytes()
    path.write_bytes(damaged_bytes(raw) if path.suffix == ".jsonl" else damaged_json(
        json.loads(raw)))

    def judge():
        page = Path("page.html").read_text(encoding="utf-8")
        content = re.search(r'<script[^>]*type="application/json"[^>]*>(.*?)</script>', page, re.S)
        shown = json.loads(content[1])
        assert set(shown["curves"]) <= set(train.STAGES) or path.suffix == ".jsonl"
        for video in shown["videos"]:
            rows = [*(video["truth"] or []), *(video["found"] or [])]
            assert all(0 <= row[0] < len(shown["classes"]) for row in rows), "an unknown class"

    return ["viewer", "viewed", "--out", "page.html"], judge, False


def checkpoint_case(base):
    """A damaged checkpoint: to evaluate, to go on with, or only to check that."""
    raw = (base.middle / "checkpoint.pt").read_bytes()
    original, content = (torch.load(io.BytesIO(raw), weights_only=True) for _ in range(2))
    what = choice(6 * ["archive"] + 6 * ["content"] + ["state"])
    if what == "archive":
        raw, seen = damaged_zip(raw)
        modes = ["evaluate", "check"] + seen * ["evaluate", "check", "go on"]
    elif what == "state":  # only torch can judge it
        state = content[choice(("rng", "optimizer", "icd_optimizer"))]
        numbers, name = spot(state.get("state", state), 0)
        x, seen, modes = numbers[name], False, ["go on"]
        numbers[name] = torch.randint_like(x, 256) if x.dtype == torch.uint8 else choice(
            (-1 - x.abs(), 1e30 * (1 + x.abs())))
    else:
        root = choice([key for key in content if key != "tests"])  # another sum: of other tests
        part = {root: content.pop(root)}
        spoil(part, (*VALUES, TENSORS))
        content |= part
        optional = ("theta_h", "supervised_mAP", "rows", "trust")  # None, or not in older ones
        seen = not fits(content, {key: value for key, value in original.items()
                                  if key not in optional or content.get(key) is not None})
        by_all = ("settings", "classes", "mean", "std", "labelled", "detector", "ema")
        modes = ["check", "evaluate"] if root in by_all else ["check", "check", "go on"]
    mode = choice(modes)
    Path("run").mkdir()
    Path("run/checkpoint.pt").write_bytes(raw if what == "archive" else saved(content))

    def judge():  # damage that must be seen was refused, or has done nothing
        if mode == "evaluate":
            found = finite_metrics()
            assert not seen or found == base.metrics, f"the mAP is {found['average_mAP']}"
        elif mode == "go on":
            judge_run(Path("run"), base.whole if seen else None)
        elif seen:
            found = torch.load("run/checkpoint.pt", weights_only=True)
            assert saved(found) == saved(original), "the damage was not seen"

    argv = ["--resume", "run"] + ["--check"] * (mode == "check")
    measure = [*MEASURE, "--checkpoint", "run/checkpoint.pt"]
    return measure if mode == "evaluate" else argv, judge, False


def word_for(f):
    """A word on a command line that gives a setting (its field) a random value."""
    flag, kind = f.name.replace("_", "-"), settings.type_of(f)
    if kind is bool:
        return choice((f"--{flag}", f"--no-{flag}"))
    words = DEVICES if f.name == "device" else TEXTS
    if kind is not str and random.random() < 0.7:
        words = NUMBERS
    elif settings.choices_of(f) and random.random() < 0.6:
        words = settings.choices_of(f)
    return f"--{flag}={choice(words)}"


def settings_case(ways, base):
    """A command line with random values for random settings, or an odd one."""
    way = choice(ways)
    given = choice((("--pred", base.whole / "predictions.json", "--gt", base.folder / "own.json"),
                    ("--checkpoint", base.middle)))
    if way == "evaluate":
        flag, text = choice(FLAGS.split()), choice(TEXTS)
        text = "out" if flag == "json" and "/" in text else text  # nothing is written elsewhere
        return [*MEASURE, *given, f"--{flag}={text}"], lambda: None, False
    left = {"check", "out", "resume", "overwrite"} | (SLOW if way == "train" else set())
    known = [f for f in fields(train.Settings) if f.name not in left]
    some = [] if way == "odd" else random.sample(known, randrange(1, 4))
    words = list(map(word_for, some)) or choice(ODD_LINES)
    if way == "train":
        short = ("--out", "new", "--pretrain-epochs", 1, "--joint-epochs", 1, "--theta-l", 0.0)
        return own_argv(base.folder, *short, *words), partial(judge_run, Path("new")), False
    argv = own_argv(base.folder, *CHECK, *words)

    def judge():  # the settings are what the words say
        s = arguments.settings_of(argv, train.Settings)
        for f, word in zip(some, words):
            kind, (_, equals, text) = settings.type_of(f), word.partition("=")
            if equals and text != "auto" and f.name not in sources.PLACES:
                assert getattr(s, f.name) == kind(text), f"{f.name} is {getattr(s, f.name)!r}"
                assert kind is not float or math.isfinite(kind(text)), f"{f.name} is {text}"

    return argv, judge, False


KINDS = {  # kind: (how a case is made, how many in the ordinary tests, in the campaign)
    "annotations": (partial(text_case, "annotations"), 7, 480),
    "predictions": (partial(text_case, "predictions"), 5, 320),
    "split files": (split_case, 4, 160),
    **{end: (partial(feature_case, end), 4, n) for end, n in zip(FEATURES, (200, 220, 200, 160))},
    "checkpoints": (checkpoint_case, 6, 520),
    "settings": (partial(settings_case, ("odd", *7 * ("check",), "train", "train")), 4, 320),
    "settings of evaluate.py": (partial(settings_case, ["evaluate"]), 1, 60),
    "the cache": (cache_case, 2, 120), "logs": (log_case, 2, 80),
    "replaced features": (replaced_case, 2, 60), "external scores": (scores_case, 2, 120),
    "a run's page": (viewer_case, 2, 160),
}


def check_traces(folder, code):
    """Assert that a command has printed clean short lines, and left no half or wrong result."""
    out, err = ((folder / name).read_text(errors="replace") for name in ("stdout", "stderr"))
    lines = err.splitlines()
    if code == 2:
        last = lines.pop() if lines else ""
        assert last.startswith("error: ") and len(last) <= 400, f"no error line: {last[:100]!r}"
    odd = [line for line in lines if not line.startswith("warning: ")]
    assert not odd, f"other lines on stderr: {odd[0][:200]!r}"
    assert not re.search(r"[\0-\x08\x0b-\x1f\x7f-\x9f]", out + err), "control characters"
    assert max(map(len, (out + err).splitlines()), default=0) <= 2000, "a long line"
    assert not list(folder.rglob("*.tmp")), "a temporary file is left"
    assert code == 0 or not list(folder.glob("out/*")), "a result is left"
    for path in [*folder.glob("new/*.json"), *folder.glob("run/*.json"), *folder.glob("out/*")]:
        read_result(path)
    for path in folder.glob("new/checkpoint.pt"):
        torch.load(path, weights_only=True)


def attempt(kind, seed, base):
    """Make one case, run its command, judge what came of it -> 2 if it was refused, or 0."""
    random.seed(f"{kind} {seed}")
    torch.manual_seed(seed)
    Path("out").mkdir()
    with warnings.catch_warnings(action="ignore"):  # of numpy and torch, when they make odd values
        argv, judge, must_read = KINDS[kind][0](base)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with warnings.catch_warnings(record=True, action="default") as said:
        commands = {"evaluate": evaluated, "viewer": lambda *words: viewer.main(words)}
        known = commands.get(argv[0])
        code = known(*argv[1:]) if known else train.main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    hidden = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)
    said = [str(warning) for warning in said if not issubclass(warning.category, hidden)]
    assert not said, f"a warning of Python: {said}"
    assert code in (0, 2), f"exit code {code}"
    check_traces(Path.cwd(), code)
    assert code == 0 or not must_read, "refused, but it can be read"
    if code == 0:
        judge()
    return code


@MANY
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_inputs_are_read_rightly_or_refused(kind, many, base):
    assert sum(row[2] for row in KINDS.values()) >= 3000  # the campaign is large enough
    codes, faults = Counter(), []
    for seed in range(KINDS[kind][1 + many]):
        folder = base.folder / f"cases of {kind}, {many}/{seed}"
        code = run_child(partial(attempt, kind, seed), base, folder)
        codes[code] += 1
        if code in (0, 2):
            shutil.rmtree(folder)
        else:
            text = (folder / "stderr").read_text(errors="replace")
            last = re.findall(r"^\w*Error.*", text, re.M)[-1:] or [text[-300:]]
            faults.append(f"{folder}, {code}: {last[0][:300]}")
    print(f"{kind}: {codes[2]} refused, {codes[0]} read, {len(faults)} failures")
    assert not faults, "\n".join(faults)


# ---- Kills --------------------------------------------------------------------------------------

# How a run ends (of CALLS); from which step of all stages on, or in which call; after what share of
# what is written then, or of the seconds.
Moment = namedtuple("Moment", "how at share number", defaults=(1, 0.0, signal.SIGKILL))
CALLS = {  # a run ends in a call of these: at some time within the seconds, or after a part of it
    "start": (train, "main", 0.4), "step": (train, "advance", 0.08),
    "report": (journal, "report", 0.25),
    "torch.save": (torch, "save", lambda share, save, content, file: (
        save(content, file), file.truncate(int(share * file.tell())))),
    "move": (os, "replace", lambda share, move, *paths: share < 0.5 and move(*paths)),
    "row": (runs, "append_row", lambda share, append, path, row: (append(path, row), os.truncate(
        path, os.path.getsize(path) - int(share * len(json.dumps(row)))))),
}


def disturbed(moment, argv):
    """train.py that ends at a moment; the stage that it was in is left in the file "stage"."""
    module, name, how = CALLS[moment.how]
    call, told, this, calls = getattr(module, name), Path("stage").absolute(), os.getpid(), []

    def watched(*arguments):
        calls.append(arguments)
        at = arguments[0].at if moment.how == "step" else None
        if (at.ema_step if at else len(calls)) >= moment.at and not told.exists():
            told.write_text(at.stage if at else moment.how)
            if callable(how):
                how(moment.share, call, *arguments)
            if callable(how) or moment.share == 0:
                os.kill(this, moment.number)
            elif os.fork() == 0:  # from outside, at any time
                time.sleep(moment.share * how)
                if os.getppid() == this:
                    os.kill(this, moment.number)
                os._exit(0)
        return call(*arguments)

    setattr(module, name, watched)
    return train.main(argv)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A data set in all kinds of feature files, a finished run, and one stopped in stage 3."""
    for kind in (torch.optim.Adam, torch.optim.AdamW):  # load what the first step loads only once
        weight = torch.zeros(1, requires_grad=True)
        weight.grad = torch.ones(1)
        kind([weight]).step()
    folder = tmp_path_factory.mktemp("campaign")
    write_own(folder)
    whole, middle, metrics = (folder / name for name in ("whole", "middle", "metrics.json"))
    arrays = {path.stem: np.load(path) for path in sorted((folder / "features").iterdir())}
    for extension, (convert, save) in FEATURES.items():
        (folder / extension).mkdir()
        for name, x in arrays.items():
            path = folder / extension / f"{name}{extension}"
            path.write_bytes(saved({"feats": convert(x)}, save))
    argv = own_argv(folder, *LONGER, "--out", whole)
    assert run_child(train.main, argv, folder / "1") == 0
    stop = partial(disturbed, Moment("step", JOINT + 5, number=signal.SIGTERM))
    assert run_child(stop, [*argv, "--out", str(middle)], folder / "2") == 143
    argv = ["--checkpoint", str(middle), "--json", str(metrics)]
    assert run_child(evaluate.main, argv, folder / "3") == 0
    return Base(folder, arrays, whole, middle, read_result(metrics))


def moments_of(number, count):
    """So many Moments of the run of a number, in order; of many the last is in its report."""
    draw, found = random.Random(number), []
    steps = [*range(STEPS), *range(PRETRAINED, STEPS)]  # the later stages do more
    for at in sorted(draw.sample(steps, count)):
        how = draw.choice(5 * ["step"] + 2 * ["torch.save"] + ["move", "row"] + ["start"])
        number = draw.choice(8 * [signal.SIGKILL] + [signal.SIGTERM, signal.SIGINT])
        if how != "step":
            at, number = draw.randrange(1, 4 if how == "torch.save" else 9), signal.SIGKILL
        found.append(Moment(how, 1 if how == "start" else at, draw.uniform(0.001, 1), number))
    return found if count < 5 else [*found[:-1], Moment("report", share=draw.random())]


def end_often(number, count, base):
    """A run that ends so often and goes on each time is a whole one -> Counter of the ends."""
    root, kills = base.folder / f"run {number} ended {count} times", Counter()
    run = root / "run"
    first = argv = own_argv(base.folder, *LONGER, "--out", run)
    for i, moment in enumerate(moments_of(number, count)):
        part = root / str(i)
        code = run_child(partial(disturbed, moment), argv, part)
        killed = moment.number == signal.SIGKILL
        assert code in (0, -moment.number if killed else 128 + moment.number), f"{moment}: {code}"
        if code != 0:
            stage = (part / "stage").read_text()
            kills += Counter([moment.number.name, f"in {stage}", f"by {moment.how}"])
        if code > 0:
            assert re.fullmatch("error: stopped by SIG.*\n", (part / "stderr").read_text()), moment
        argv = ["--resume", str(run)]
        if (run / "checkpoint.pt").exists():
            checkpoints.load(run, train.Settings)
        else:
            refused = run_child(train.main, argv, part / "refused")
            assert refused == 2, f"{moment}: {refused} of a run that goes on from nothing"
            check_traces(part / "refused", 2)
            argv = first
    assert run_child(train.main, argv, root / "end") == 0, f"run {number} does not end"
    judge_run(run, base.whole)
    for name in ("metrics.json", "pseudo_labels.json", "predictions.json"):
        assert (run / name).read_bytes() == (base.whole / name).read_bytes(), f"{name} is another"
    for pair in zip(read_log(run), read_log(base.whole), strict=True):
        mine, other = ((x["stage"], x["epoch"], x.get("step"), x.get("loss")) for x in pair)
        assert mine == other, "the log is another"
    left = {path.name for path in run.iterdir()} - {path.name for path in base.whole.iterdir()}
    assert not left, f"files are left: {left}"
    return kills


@MANY
def test_runs_that_are_killed_often_end_as_a_whole_one(many, base):
    kills = Counter()
    for number in range(14 if many else 1):
        kills += end_often(number, 6 if many else 2, base)
    print("kills:", dict(kills))
    least = Counter(SIGKILL=50, SIGTERM=1, SIGINT=1, **{"by torch.save": 2})
    least += Counter({f"in {stage}": 5 for stage in train.STAGES})
    assert kills >= least if many else kills.total(), kills
