"""A seeded campaign of faults: kills at any moment, inputs and settings damaged in many ways.

    python -m pytest -m campaign -s tests/test_campaign.py      all of it, in some minutes

The ordinary tests run a small part. A run that was killed and resumed must end as one that nobody
disturbed, bit for bit. A damaged input is read rightly, by an independent reading, or refused in
one sentence. Every case has a seed of its own, which a failure names, and a forked process.
"""
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import struct
import sys
import time
import traceback
import warnings
import zipfile
from collections import Counter
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import evaluate
import train
from tests.helpers import own_argv, read_log, read_result, same, weights, write_own

SECONDS = 60  # of a case; more is a hang
MEMORY = 6 * 2 ** 30  # bytes of address space of a case
AT_A_TIME = 2  # children

# ---- Children -----------------------------------------------------------------------------------


def show_warning(message, category, filename, lineno, file=None, line=None):
    """Print a Python warning as a command would."""
    print(f"{filename}:{lineno}: {category.__name__}: {message}", file=sys.stderr)


def be_a_command(folder):
    """Give this process what a command has: its files for output, a folder, warnings, a thread."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    os.chdir(folder)
    warnings.resetwarnings()
    for hidden in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", hidden)
    warnings.showwarning = show_warning
    torch.set_num_threads(1)


def fork(work, folder):
    """Start work() in a forked process that prints into files of the folder -> its id.

    Its exit code is what work() returns, 1 after an exception."""
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        be_a_command(folder)
        code = work()
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code if isinstance(code, int) else 1)


def wait_for(child, limit=SECONDS):
    """The exit code of a child, minus the signal that ended it, or "hang": then it is killed."""
    until = time.time() + limit
    while time.time() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hang"


def run_children(tasks, limit=SECONDS):
    """Run the tasks (key, work, folder) in children, some at a time; yields (key, exit code).

    A child leads a group of its own, so that its children end with it."""
    tasks = iter(tasks)
    running = {}  # {id: (key, deadline)}
    try:
        while True:
            while len(running) < AT_A_TIME:
                task = next(tasks, None)
                if task is None:
                    break
                key, work, folder = task
                child = fork(work, folder)
                os.setpgid(child, child)
                running[child] = key, time.time() + limit
            if not running:
                return
            for child, (key, until) in list(running.items()):
                done, status = os.waitpid(child, os.WNOHANG)
                late = time.time() > until
                if done or late:
                    if late and not done:
                        os.killpg(child, signal.SIGKILL)
                        os.waitpid(child, 0)
                    del running[child]
                    yield key, os.waitstatus_to_exitcode(status) if done else "hang"
            time.sleep(0.002)
    finally:
        for child in running:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)


# ---- What all cases start from ------------------------------------------------------------------

LONGER = (  # than helpers.TINY: pseudo labels are made twice
    "--log-every", 1, "--theta-l", 0.0, "--refresh", 2, "--supervised-epochs", 3,
    "--supervised-steps", 6, "--joint-epochs", 3)
STEPS, JOINT = 28, 16  # of such a run, and of those before stage 3
EXTENSIONS = (".npy", ".npz", ".pt", ".csv")
ARRAY = "feats"  # its name in .npz and .pt files


@dataclass
class Base:
    """A data set in all kinds of feature files, a finished run, and one stopped in stage 3."""
    folder: Path
    whole: Path  # the finished run
    middle: Path  # the run that was stopped
    features: dict  # {extension: folder}
    arrays: dict  # {id: (T, D)}
    metrics: dict = None  # of the stopped run's checkpoint


def write_features(folder, arrays):
    """The features in all kinds of files -> {extension: folder}."""
    folders = {".npy": folder / "features"}
    for extension in EXTENSIONS[1:]:
        folders[extension] = folder / f"features{extension}"
        folders[extension].mkdir()
    for name, x in arrays.items():
        np.savez(folders[".npz"] / f"{name}.npz", **{ARRAY: x})
        torch.save({ARRAY: torch.from_numpy(x)}, folders[".pt"] / f"{name}.pt")
        np.savetxt(folders[".csv"] / f"{name}.csv", x, fmt="%.9g", delimiter=",")
    return folders


def train_and_stop(argv):
    """Train until a SIGTERM in the midst of an epoch of stage 3 -> the exit code."""
    advance = train.advance

    def interrupted(run, *rest):
        if run.stage == "joint" and run.step == 5:
            run.stop.signal = signal.SIGTERM
        return advance(run, *rest)

    train.advance = interrupted
    return train.main(argv)


def warm_up():
    """Let torch load what it loads at the first step of an optimizer: once, not in every child."""
    for kind in (torch.optim.Adam, torch.optim.AdamW):
        weight = torch.zeros(1, requires_grad=True)
        weight.grad = torch.ones(1)
        kind([weight]).step()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The Base."""
    warm_up()
    folder = tmp_path_factory.mktemp("campaign")
    write_own(folder)
    arrays = {path.stem: np.load(path) for path in (folder / "features").glob("*.npy")}
    found = Base(folder, folder / "whole", folder / "middle", write_features(folder, arrays),
                 arrays)
    whole = own_argv(folder, *LONGER, "--out", found.whole)
    middle = own_argv(folder, *LONGER, "--out", found.middle)
    measure = ["--checkpoint", str(found.middle), "--json", str(folder / "metrics.json")]
    works = {
        "whole": partial(train.main, whole),
        "middle": partial(train_and_stop, middle),
    }
    tasks = [(name, work, folder / f"of {name}") for name, work in works.items()]
    assert dict(run_children(tasks)) == {"whole": 0, "middle": 143}
    work = partial(evaluate.main, measure)
    assert list(run_children([("measure", work, folder / "of measure")])) == [("measure", 0)]
    found.metrics = read_result(folder / "metrics.json")
    return found


# ---- Damage to bytes ----------------------------------------------------------------------------

def place(rng, raw):
    """A random place in bytes."""
    return int(rng.integers(len(raw) + 1))


def truncated(rng, raw):
    """Bytes cut short."""
    return raw[:place(rng, raw[1:])]


def flipped(rng, raw):
    """Bytes with one to eight bits flipped."""
    found = bytearray(raw)
    for _ in range(int(rng.integers(1, 9))):
        found[int(rng.integers(len(found)))] ^= 1 << int(rng.integers(8))
    return bytes(found)


def one_bit(rng, raw):
    """Bytes with one bit flipped."""
    found = bytearray(raw)
    found[int(rng.integers(len(found)))] ^= 1 << int(rng.integers(8))
    return bytes(found)


def with_garbage(rng, raw):
    """Bytes with others put in between."""
    at = place(rng, raw)
    return raw[:at] + rng.bytes(int(rng.integers(1, 200))) + raw[at:]


def overwritten(rng, raw):
    """Bytes with a block of zeros or ones, as a broken disk leaves them."""
    at = place(rng, raw)
    block = (b"\0", b"\xff")[int(rng.integers(2))] * int(rng.integers(1, 600))
    return raw[:at] + block[:len(raw) - at] + raw[at + len(block):]


def without_a_block(rng, raw):
    """Bytes without a block."""
    a, b = sorted((place(rng, raw), place(rng, raw)))
    return raw[:a] + raw[b + (a == b):]


def doubled(rng, raw):
    """Bytes twice."""
    return raw + raw


def other_bytes(rng, raw):
    """Something else altogether."""
    return (b"", b"\0", b"text\n", rng.bytes(500), b"\x80\x02}q\x00.", b"PK\x05\x06" + 18 * b"\0",
            b"\x93NUMPY", b"\xff\xfe" + raw)[int(rng.integers(8))]


BYTES = (truncated, truncated, flipped, one_bit, one_bit, with_garbage, overwritten,
         without_a_block, doubled, other_bytes)


def chosen(rng, choices):
    """One of the choices."""
    return choices[int(rng.integers(len(choices)))]


def damage_bytes(rng, raw):
    """(bytes damaged in one of the ways of BYTES, its name)."""
    way = chosen(rng, BYTES)
    return way(rng, raw), way.__name__


# ---- Damage to JSON -----------------------------------------------------------------------------

HUGE, DEEP, TWICE = "@@HUGE@@", "@@DEEP@@", "@@TWICE@@"  # stand for what json.dumps cannot write
TEXTS = (
    "", " ", "A", "B", "a", "A ", "v1", "v_1", "nan", "-Infinity", "1e999", "12.5", " 3 ", "1_0",
    "²", "٣", "0x10", "1,5", "../secret", "/abs/x", "a/b/c", "..", ".", "~", "a\0b", "\x1b[31mred",
    "line\nline\r", "\x85", "\u2028", "\ud800", "\U0001f600", "é", "x" * 300, "x" * 300_000,
    "training", "validation", "none", "toy", "%s%n{0}", HUGE, DEEP)
NUMBERS = (
    0, 1, -1, 3, -0.0, 0.5, 1e300, -1e300, 1e-300, 5e-324, 1e10, 2 ** 31, 2 ** 63, -2 ** 63,
    10 ** 30, 10 ** 400, math.nan, math.inf, -math.inf)
OTHERS = (
    None, True, False, [], {}, [[]], [None], [1, 2, 3], [2, 8], ["1", "2"], ["A", "B"], ["A", "A"],
    [[1, 2], [3, 4]], {"a": 1}, {"segment": [1, 2]}, [math.nan, 1], [1, True])


def odd_value(rng):
    """A value of any type."""
    return chosen(rng, (TEXTS, TEXTS, NUMBERS, NUMBERS, OTHERS)[int(rng.integers(5))])


def spot(rng, content, stop=0.2):
    """(container, key) of a random part of nested dicts and lists."""
    while True:
        keys = list(content) if isinstance(content, dict) else range(len(content))
        key = keys[int(rng.integers(len(keys)))]
        inner = content[key]
        if not isinstance(inner, (dict, list)) or not inner or rng.random() < stop:
            return content, key
        content = inner


def replaced(rng, content):
    """One value is another."""
    container, key = spot(rng, content)
    container[key] = odd_value(rng)


def replaced_many(rng, content):
    """Several values are others."""
    for _ in range(int(rng.integers(2, 6))):
        replaced(rng, content)


def deleted(rng, content):
    """One value is gone."""
    container, key = spot(rng, content)
    del container[key]


def key_twice(rng, content):
    """A key comes twice."""
    container, key = spot(rng, content, 0.4)
    if isinstance(container, dict):
        container[f"{TWICE}{key}"] = (container[key], odd_value(rng))[int(rng.integers(2))]
    else:
        container.append(container[key])


def renamed(rng, content):
    """A key has another name."""
    container, key = spot(rng, content, 0.4)
    if isinstance(container, dict):
        container[chosen(rng, TEXTS)] = container.pop(key)
    else:
        container.reverse()


def grown(rng, content):
    """A container holds more."""
    container, _ = spot(rng, content, 0.4)
    if isinstance(container, list):
        container.insert(int(rng.integers(len(container) + 1)), odd_value(rng))
    else:
        names = ("label_id", "duration_second", "frame_rate", "fps", "subset", "annotations",
                 "segment", "label", "score", "database", "results", "extra")
        container[chosen(rng, names)] = odd_value(rng)


def exchanged(rng, content):
    """Two values change places."""
    a, b = spot(rng, content), spot(rng, content)
    first, second = a[0][a[1]], b[0][b[1]]
    if json.dumps(first) in json.dumps(second) or json.dumps(second) in json.dumps(first):
        return  # one might hold the other
    a[0][a[1]], b[0][b[1]] = second, first


JSONS = (replaced, replaced, replaced, replaced_many, deleted, key_twice, renamed, grown, exchanged)


def to_text(content, plain=True):
    """JSON text of damaged content; without `plain` letters stand as they are."""
    text = json.dumps(content, ensure_ascii=plain).replace(TWICE, "")
    return text.replace(f'"{HUGE}"', "9" * 5000).replace(f'"{DEEP}"', "[" * 10 ** 5 + "]" * 10 ** 5)


def damage_json(rng, content):
    """(the bytes of damaged JSON content, the name of the way)."""
    if rng.random() < 0.25:
        raw, way = damage_bytes(rng, to_text(content).encode())
        return raw, way
    way = chosen(rng, JSONS)
    way(rng, content)
    text = to_text(content, rng.random() < 0.7)
    return text.encode("utf-8", "surrogatepass"), way.__name__


def numbers_as_text(content):
    """Nested content whose numbers are text."""
    if isinstance(content, dict):
        return {key: numbers_as_text(value) for key, value in content.items()}
    if isinstance(content, list):
        return [numbers_as_text(value) for value in content]
    return str(content) if type(content) in (int, float) else content


# ---- Damage to zip archives ---------------------------------------------------------------------

def zipped(members, method=zipfile.ZIP_STORED):
    """The bytes of an archive of members [(name, bytes)]."""
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", method) as archive:
        warnings.simplefilter("ignore")  # a name may come twice
        for name, raw in members:
            archive.writestr(name, raw)
    return file.getvalue()


def unzipped(raw):
    """The members [(name, bytes)] of an archive."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


# Where the headers of a member and of the directory have: flags, method, checksum, two sizes.
FIELDS = {
    b"PK\x03\x04": ((6, "<H"), (8, "<H"), (14, "<I"), (18, "<I"), (22, "<I")),
    b"PK\x01\x02": ((8, "<H"), (10, "<H"), (16, "<I"), (20, "<I"), (24, "<I")),
}


def lying_header(rng, raw):
    """An archive with a wrong field in a header, or in all headers of a kind."""
    found = bytearray(raw)
    mark = chosen(rng, tuple(FIELDS))
    at, form = chosen(rng, FIELDS[mark])
    value = int(chosen(rng, (0, 1, 8, 9, 99, 0x7fff, 0xffff, 0x7fffffff, 0xffffffff)))
    value &= 2 ** (8 * struct.calcsize(form)) - 1
    heads = [match.start() for match in re.finditer(re.escape(mark), raw)]
    for head in heads if rng.random() < 0.3 else [chosen(rng, heads)]:
        if head + at + 4 <= len(found):
            struct.pack_into(form, found, head + at, value)
    return bytes(found)


def other_members(rng, raw):
    """An archive that lacks a member, has one more, one twice, or one by another name."""
    members = unzipped(raw)
    i = int(rng.integers(len(members)))
    name, content = members[i]
    way = int(rng.integers(6))
    if way == 0:
        del members[i]
    elif way == 1:
        members.insert(i, (chosen(rng, ("../out", "/abs", "extra.npy", "a" * 5000, "é")), b"abc"))
    elif way == 2:
        members.insert(i, (name, damage_bytes(rng, content or b"\0")[0]))
    elif way == 3:
        members.append((name, damage_bytes(rng, content or b"\0")[0]))
    elif way == 4:
        members[i] = (chosen(rng, ("../feats.npy", "arr_0.npy", "x", f"{name}.npy", "/")), content)
    else:
        return zipped(members, zipfile.ZIP_DEFLATED)
    return zipped(members)


def damaged_member(rng, raw):
    """An archive one of whose members is damaged, with the right checksum for what it is now."""
    members = unzipped(raw)
    i = int(rng.integers(len(members)))
    name, content = members[i]
    members[i] = (name, damage_bytes(rng, content or b"\0")[0])
    return zipped(members)


def bomb(base):
    """The bytes of an archive of some MB that unpacks to more than 2 GB; made once."""
    path = base.folder / "bomb.npz"
    if not path.exists():
        own = base.folder / f"bomb.{os.getpid()}"
        with zipfile.ZipFile(own, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive, \
                archive.open(f"{ARRAY}.npy", "w", force_zip64=True) as member:
            shape = {"descr": "<f4", "fortran_order": False, "shape": (2 ** 20, 600)}
            np.lib.format.write_array_header_1_0(member, shape)
            for _ in range(150):
                member.write(bytes(2 ** 24))
        os.replace(own, path)
    return path.read_bytes()


def damage_zip(rng, raw, base):
    """(the bytes of a damaged archive, the way, whether checksums or names must show it)."""
    way = rng.random()
    if way < 0.45:
        return *damage_bytes(rng, raw), True
    if way < 0.65:
        return lying_header(rng, raw), "lying header", True
    if way < 0.8:
        return other_members(rng, raw), "other members", True
    if way < 0.99:
        return damaged_member(rng, raw), "damaged member", False
    return bomb(base), "bomb", False


# ---- Damage to arrays ---------------------------------------------------------------------------

DTYPES = ("<c8", "<c16", "<m8[s]", "<M8[s]", "|b1", "|O", "<U8", "|S8", "|V4")
READABLE = ("<f2", "<f8", ">f4", ">f8", "|i1", "<i8", ">i2", "<u4")


def as_dtype(x, dtype):
    """An array as another dtype."""
    if dtype[1] in "mMUS":
        return (10 * x).astype(np.int64).astype(dtype)
    return x.view(dtype) if dtype[1] == "V" else x.astype(dtype)


def of_other_shape(rng, x):
    """An array of another shape."""
    return chosen(rng, (
        x.T, x[0], x[:, 0], x[None], x[:, :, None], x[:0], x[:, :0], x[:, :4], x[:1], x[:, :1],
        x.ravel(), np.float32(3), np.hstack([x, x]), np.vstack(200 * [x]), x[::-2], x[:5, :]))


def with_odd_numbers(rng, x):
    """An array with odd numbers, in one place or everywhere."""
    x = x.astype(chosen(rng, ("<f4", "<f8", "<f8", np.longdouble)))
    with np.errstate(over="ignore"):
        value = x.dtype.type(chosen(rng, (
            math.nan, math.inf, -math.inf, 1e300, -1e300, 3.5e38, 3e38, 1e38, 1e30, 1e-320, 0.0)))
    if rng.random() < 0.3:
        x[:] = value
    else:
        x[int(rng.integers(len(x))), int(rng.integers(x.shape[1]))] = value
    return x


def odd_array(rng, x):
    """(another array than the features x, the way, whether it must be read)."""
    way = rng.random()
    if way < 0.25:
        dtype = chosen(rng, DTYPES)
        return as_dtype(x, dtype), f"dtype {dtype}", False
    if way < 0.5:
        return of_other_shape(rng, x), "shape", False
    if way < 0.8:
        return with_odd_numbers(rng, x), "numbers", False
    dtype = chosen(rng, READABLE)
    order = chosen(rng, ("C", "F"))
    return np.asarray(as_dtype(x, dtype), order=order), f"readable {dtype} {order}", True


SHAPES = (
    "(64, 5)", "(1000000000000, 5)", "(64, 1000000000000)", "(-1, 5)", "(64, -5)", "(65, 5)",
    "(63, 5)", "(5, 64)", "(64, 5, 1)", "(320,)", "()", "(0, 5)", "(64, 0)", "(64.0, 5)",
    "(True, 5)", "(4611686018427387904, 4611686018427387904)", "(64, 5", "None", "[64, 5]",
    "(64, 'x')", "(" * 300 + "64, 5" + ")" * 300, "(9" + "9" * 5000 + ", 5)")
DESCRS = (
    "'<f4'", "'<f4'", "'<f4'", "'<f8'", "'>f4'", "'<f2'", "'<c8'", "'<m8[s]'", "'|O'", "'|b1'",
    "'<U1'", "'<U1000000000'", "'|V4'", "[('a', '<f4')]", "'<f4, <f4'", "('<f4', (5,))", "''",
    "None", "'x'", "__import__('os')", "'<f0'", "'<i4'", "'<f16'", "'S0'")


def npy_with_header(rng, x):
    """The bytes of a .npy file whose header may lie about its array."""
    order = chosen(rng, ("False", "True", "0", "None"))
    head = (f"{{'descr': {chosen(rng, DESCRS)}, 'fortran_order': {order}, "
            f"'shape': {chosen(rng, SHAPES)}, }}").ljust(118) + "\n"
    version = chosen(rng, ((1, 0), (1, 0), (2, 0), (3, 0), (9, 9)))
    size = struct.pack("<H" if version == (1, 0) else "<I", min(len(head), 65535))
    return b"\x93NUMPY" + bytes(version) + size + head.encode() + x.tobytes()


def saved(writer, *content, **named):
    """The bytes that a writer writes of the content."""
    file = io.BytesIO()
    writer(file, *content, **named)
    return file.getvalue()


def odd_tensor(rng, x):
    """(another tensor than x, the way), of which nothing could be made."""
    ways = {
        "of doubles": x.double() if x.is_floating_point() else x.float(),
        "complex": x.to(torch.complex64),
        "bool": x.bool(),
        "int8": x.to(torch.int8) if x.dtype != torch.int8 else x.int(),
        "one dimension more": x[None],
        "empty": x.flatten()[:0],
        "one number": torch.zeros(()) if x.ndim else torch.zeros(3),
        "a number less": x.flatten()[:-1] if x.numel() > 1 else torch.zeros(7),
        "sparse": (x if x.ndim else x[None]).to_sparse(),
        "from one number": torch.zeros(1).expand(10 ** 11, 5),
        "float8": x.to(torch.float8_e5m2),
        "meta": torch.empty(x.shape, dtype=x.dtype, device="meta"),
    }
    if x.is_floating_point():
        ways |= {"NaN": torch.full_like(x, math.nan), "infinite": torch.full_like(x, -math.inf)}
        if x.numel():
            one = x.clone()
            one.view(-1)[int(rng.integers(x.numel()))] = math.nan
            ways["one NaN"] = one
    way = chosen(rng, tuple(ways))
    return ways[way], way


# ---- Independent readings -----------------------------------------------------------------------

def expect(condition, text):
    """Raise ValueError with the text unless the condition holds."""
    if not condition:
        raise ValueError(text)


def plain_json(path):
    """The content of a JSON file."""
    return json.loads(path.read_bytes().decode("utf-8-sig"))


def plain_number(value):
    """The finite number of a JSON value, written as text or not."""
    expect(not isinstance(value, bool), "a bool is no number")
    x = float(value)
    expect(math.isfinite(x), "it is not finite")
    return x


def plain_label(value):
    """The text of a label."""
    expect(type(value) in (str, int, float) and str(value).strip(), "it is no label")
    return str(value)


def plain_segment(value):
    """(start, end) of a JSON value."""
    expect(isinstance(value, list), "a segment is no list")
    start, end = value
    return plain_number(start), plain_number(end)


def first_of(entry, *keys):
    """The number of the first key that an entry has, or None."""
    for key in keys:
        if entry.get(key) is not None:
            x = plain_number(entry[key])
            expect(x > 0, f"{key} is not positive")
            return x
    return None


def plain_video(entry):
    """(duration, fps, [(start, end, label)], whether it is annotated) of an entry."""
    instances = []
    for item in entry.get("annotations") or []:
        segment = plain_segment(item["segment"])
        labels = item["label"] if isinstance(item["label"], list) else [item["label"]]
        expect(labels, "a segment has no label")
        instances += [(*segment, plain_label(label)) for label in labels]
    return (first_of(entry, "duration", "duration_second", "duration_seconds"),
            first_of(entry, "fps", "frame_rate"), instances, entry.get("annotations") is not None)


def plain_videos(path, subset):
    """{id: plain_video()} of a subset of an annotation file."""
    content = plain_json(path)
    database = content.get("database", content)
    return {name: plain_video(entry) for name, entry in database.items()
            if (entry.get("subset") or "").strip().lower() == subset}


def read_videos(path, subset):
    """The same as data.read_annotations() reads it."""
    found = {}
    for name, a in data.read_annotations(path).items():
        if a.subset.lower() == subset:
            instances = [(*segment, label) for segment, label in zip(a.segments.tolist(), a.labels)]
            found[name] = a.duration, a.fps, instances, a.annotated
    return found


def truth_of(path, subsets):
    """{id: annotation} of the annotated videos of the subsets, read independently."""
    found = {}
    for subset in subsets:
        for name, (_, _, instances, annotated) in plain_videos(path, subset).items():
            if not annotated:
                continue
            found[name] = SimpleNamespace(labels=[label for _, _, label in instances],
                                          segments=[[start, end] for start, end, _ in instances])
    return found


def plain_predictions(path, truth, known):
    """({id: detections}, how many need a word): those of known labels, of whatever video."""
    found = {}
    left_out = 0
    for video, detections in plain_json(path)["results"].items():
        left_out += video not in truth
        found[video] = []
        for d in detections:
            if plain_label(d["label"]) not in known:
                left_out += 1
                continue
            found[video].append({
                "label": plain_label(d["label"]),
                "score": plain_number(d["score"]),
                "segment": list(plain_segment(d["segment"])),
            })
    return found, left_out


def plain_csv(path):
    """The numbers of a .csv file: a header has no number at all, or counts from 0."""
    lines = re.split(r"\r\n|\r|\n", path.read_bytes().decode("utf-8-sig"))
    cells = [line.split(",") for line in lines if line.strip()]

    def is_number(cell):
        try:
            float(cell)
        except ValueError:
            return False
        return True

    head = [float(cell) if is_number(cell) else None for cell in cells[0]]
    if set(head) == {None} or len(head) > 1 and head == list(range(len(head))):
        cells = cells[1:]
    return np.array([[float(cell) for cell in line] for line in cells])


def plain_features(path):
    """The features of a file, read without our code."""
    if path.suffix == ".csv":
        return plain_csv(path)
    if path.suffix == ".pt":
        content = torch.load(path, weights_only=True)
        x = content[ARRAY] if isinstance(content, dict) else content
        return (x.float() if x.dtype == torch.bfloat16 else x).detach().numpy()
    content = np.load(path, allow_pickle=False)
    if path.suffix == ".npz":
        return content[ARRAY if ARRAY in content.files else "arr_0"]
    return content


def plain_split(path):
    """The ids of a split file."""
    if path.suffix == ".json":
        content = plain_json(path)
        return content["labelled"] if isinstance(content, dict) else content
    lines = re.split(r"\r\n|\r|\n", path.read_bytes().decode("utf-8-sig"))
    return [line.strip() for line in lines if line.strip()]


def equal(a, b):
    """Whether two contents of a checkpoint are the same, tensors bit for bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


# ---- Cases --------------------------------------------------------------------------------------

@dataclass
class Trial:
    """A command on a damaged input."""
    argv: list  # of train.py, or "evaluate" and those of evaluate.py
    way: str  # what was done to it
    judge: object  # called after exit code 0; raises where what was read is wrong
    must_read: bool = False  # whether it must not be refused


def checking(base, folder, *more):
    """The command line of train.py that reads the data and stops."""
    return own_argv(base.folder, "--out", folder / "new", "--check", *more)


def counts_of(folder):
    """The numbers of labelled, unlabelled and test videos that a command has printed."""
    sys.stdout.flush()
    text = (folder / "stdout").read_text()
    return [int(x) for x in re.match(r"(\d+) labelled, (\d+) unlab\w*, (\d+) test", text).groups()]


def finite_metrics(path):
    """The metrics of a file, which are numbers between 0 and 1."""
    found = read_result(path)
    for value in (*found["mAP"], found["average_mAP"]):
        expect(0 <= value <= 1 + 1e-9, f"the mAP is {value}")
    return found


def judge_videos(path, folder):
    """Compare what train.py has read of an annotation file with an independent reading."""
    training, test = (plain_videos(path, subset) for subset in ("training", "validation"))
    expect(read_videos(path, "training") == training, "training videos are read otherwise")
    expect(read_videos(path, "validation") == test, "test videos are read otherwise")
    labelled, unlabelled, tested = counts_of(folder)
    expect((labelled + unlabelled, tested) == (len(training), len(test)), "videos are lost")
    for name, (duration, _, instances, _) in (training | test).items():
        end = duration or 32.5
        for a, b, _ in instances:
            expect(b > a and min(b, end) - max(a, 0) >= 0.5 * (b - a), f"{name} has [{a}, {b}]")


def judge_metrics(pred, gt, subset, folder):
    """Compare metrics with those of independent readings; what is left out must be said.

    Without a subset those count that the predicted videos are in, or all."""
    videos = {subset: plain_videos(gt, subset) for subset in ("training", "validation")}
    known = {label for part in videos.values() for _, _, instances, _ in part.values()
             for _, _, label in instances}
    predicted = plain_json(pred)["results"].keys()
    subsets = [name for name, part in videos.items() if part.keys() & predicted] or list(videos)
    truth = truth_of(gt, [subset] if subset else subsets)
    predictions, left_out = plain_predictions(pred, truth, known)
    expected = evaluate.mean_average_precision(
        truth, predictions, evaluate.parse_tious("0.3:0.7:0.1"))
    found = finite_metrics(folder / "out/metrics.json")
    expect(found == json.loads(json.dumps(expected)), "the metrics are others")
    sys.stderr.flush()
    said = (folder / "stderr").read_text()
    expect(not left_out or "warning: " in said, f"{left_out} are left out without a word")


def scoring(pred, gt, folder, *more):
    """The command line of evaluate.py for predictions."""
    (folder / "out").mkdir()
    argv = ("--pred", pred, "--gt", gt, "--json", folder / "out/metrics.json", *more)
    return ["evaluate", *map(str, argv)]


def readable_annotations(rng, content):
    """(the bytes of annotations in another form that must be read, the form)."""
    database = content["database"]
    way = int(rng.integers(6))
    entries = list(database.values())
    if way == 0:
        content = numbers_as_text(content)
    elif way == 1:
        content = database
    elif way == 2:
        for entry in entries:
            entry["duration_second"] = entry.pop("duration")
    elif way == 3:
        for entry in entries:
            entry |= {"resolution": None, "url": "\ud800", "extra": [{}], "frame": math.nan}
    elif way == 4:
        for item in chosen(rng, entries)["annotations"]:
            item["label"] = [item["label"]]
    mark = "\ufeff" if way == 5 else ""
    return (mark + to_text(content)).encode(), f"readable form {way}"


def annotation_case(rng, base, folder):
    """A damaged annotation file, for train.py or as the ground truth of evaluate.py."""
    content = read_result(base.folder / "own.json")
    path = folder / "own.json"
    must_read = rng.random() < 0.08
    damage = readable_annotations if must_read else damage_json
    raw, way = damage(rng, content)
    path.write_bytes(raw)
    if rng.random() < 0.25:
        pred = base.whole / "predictions.json"
        argv = scoring(pred, path, folder, "--subset", "validation")
        return Trial(argv, way, partial(judge_metrics, pred, path, "validation", folder),
                     must_read)
    argv = checking(base, folder, "--dataset", path)
    return Trial(argv, way, partial(judge_videos, path, folder), must_read)


def prediction_case(rng, base, folder):
    """A damaged prediction file."""
    content = read_result(base.whole / "predictions.json")
    for name, detections in content["results"].items():
        content["results"][name] = detections[:int(rng.integers(1, 12))]
    must_read = rng.random() < 0.08
    if must_read:
        mark = chosen(rng, ("", "\ufeff"))
        raw, way = (mark + to_text(numbers_as_text(content))).encode(), "numbers as text"
    else:
        raw, way = damage_json(rng, content)
    path = folder / "pred.json"
    path.write_bytes(raw)
    gt = base.folder / "own.json"
    subset = chosen(rng, ("", "validation"))
    argv = scoring(path, gt, folder, *(("--subset", subset) if subset else ()))
    return Trial(argv, way, partial(judge_metrics, path, gt, subset, folder), must_read)


def judge_split(path, folder):
    """Compare the number of labelled videos with an independent reading of a split file."""
    names = {f"v{i}" for i in range(10)}
    ids = plain_split(path)
    expect(isinstance(ids, list), "it lists no ids")
    ids = {name if name in names else name.removeprefix("v_") for name in ids}
    expect(ids and ids <= names, "it lists other ids")
    expect(counts_of(folder)[0] == len(ids), "other videos are labelled")


def split_case(rng, base, folder):
    """A damaged split file."""
    ids = [f"v{i}" for i in rng.permutation(10)[:int(rng.integers(1, 8))]]
    kind = int(rng.integers(3))
    path = folder / ("split.txt" if kind == 0 else "split.json")
    if kind == 0:
        lines = list(ids)
        if rng.random() < 0.5:
            lines[int(rng.integers(len(lines)))] = str(odd_value(rng))
        raw, way = "\n".join(lines).encode("utf-8", "surrogatepass"), "line"
        if rng.random() < 0.7:
            raw, way = damage_bytes(rng, raw)
    else:
        content = ids if kind == 1 else {"labelled": ids, "unlabelled": ["v8", "v9"]}
        raw, way = damage_json(rng, content)
    path.write_bytes(raw)
    argv = checking(base, folder, "--split", path, "--ratio", 0)
    return Trial(argv, way, partial(judge_split, path, folder))


def judge_features(path, original):
    """Compare features with an independent reading, and with the original if that is given."""
    found = data.read_features(path, ARRAY, path.stem)
    x = plain_features(path)
    expect(x.ndim == 2 and x.shape[1] == 5 and len(x), f"their shape is {x.shape}")
    expect(x.dtype.kind in "fiu", f"their dtype is {x.dtype}")
    with np.errstate(over="ignore"):
        expect(np.isfinite(x.astype(np.float32)).all(), "they are not finite")
    expect(np.array_equal(found, x), "they are read otherwise")
    expect(original is None or np.array_equal(found, original), "the damage was not seen")


def npy_damage(rng, x, base):
    """(bytes of a damaged .npy file, way, whether it must be read, whether it must be seen)."""
    way = rng.random()
    if way < 0.35:
        return *damage_bytes(rng, saved(np.save, x)), False, False
    if way < 0.6:
        return npy_with_header(rng, x), "header", False, False
    x, words, readable = odd_array(rng, x)
    return saved(np.save, x, allow_pickle=True), words, readable, False


def npz_damage(rng, x, base):
    """The same of a .npz file."""
    way = rng.random()
    save = chosen(rng, (np.savez, np.savez_compressed))
    if way < 0.6:
        raw, words, seen = damage_zip(rng, saved(save, **{ARRAY: x}), base)
        return raw, words, False, seen
    if way < 0.75:
        return zipped([(f"{ARRAY}.npy", npy_with_header(rng, x))]), "header", False, False
    x, words, readable = odd_array(rng, x)
    if rng.random() < 0.2:
        return saved(save, x), f"without a name, {words}", readable, False
    return saved(save, **{ARRAY: x}), words, readable, False


def saved_tensor(content, **how):
    """The bytes of torch.save."""
    file = io.BytesIO()
    torch.save(content, file, **how)
    return file.getvalue()


def pt_damage(rng, x, base):
    """The same of a .pt file."""
    way = rng.random()
    tensor = torch.from_numpy(x)
    raw = saved_tensor({ARRAY: tensor} if rng.random() < 0.5 else tensor)
    if way < 0.55:
        raw, words, seen = damage_zip(rng, raw, base)
        return raw, words, False, seen
    if way < 0.65:
        content = chosen(rng, (
            tensor.half(), tensor.bfloat16(), tensor.double(), tensor.T.contiguous().T,
            torch.nn.Parameter(tensor), tensor.int(), {ARRAY: tensor, "more": [1, "x"]}))
        return saved_tensor(content), "readable", True, False
    if way < 0.75:
        content = chosen(rng, (
            None, 3, "text", [tensor], (tensor, tensor), {}, {"x": tensor}, {ARRAY: None},
            {ARRAY: [tensor]}, {3: tensor, "\x1b": tensor, ARRAY * 9999: tensor}, Path("x"), x,
            {ARRAY: {ARRAY: tensor}}))
        return saved_tensor(content), "no tensor", False, False
    if way < 0.8:
        return saved_tensor(tensor, _use_new_zipfile_serialization=False), "old kind", False, False
    if way < 0.9:
        array, words, readable = odd_array(rng, x)
        if array.dtype.kind in "fiucb" and array.dtype.itemsize <= 8 and array.dtype.isnative:
            return saved_tensor(torch.from_numpy(np.array(array))), words, False, False
    tensor, words = odd_tensor(rng, tensor)
    return saved_tensor({ARRAY: tensor}), words, False, False


CELLS = (
    "nan", "inf", "-inf", "1e999", "1e39", "1e300", "", " ", "text", "1_0", "0x1p3", "1+2j", '"1"',
    "²", "٣", "1.5.2", "--1", "1e", "#", "# 1", "\0", "\x1b[31m", "9" * 5000, "True", "None",
    "1;2", "1 2", "\u2028")


def damaged_table(rng, rows):
    """Damage the rows of a table of text in place -> the way."""
    row = int(rng.integers(len(rows)))
    column = int(rng.integers(len(rows[row])))
    way = int(rng.integers(8))
    if way in (0, 1):
        rows[row][column] = chosen(rng, CELLS)
    elif way == 2:
        rows[row].append(chosen(rng, ("1", *CELLS)))
    elif way == 3:
        del rows[row][column]
    elif way == 4:
        rows.insert(row, [chosen(rng, CELLS)])
    elif way == 5:
        rows[0][column] = chosen(rng, CELLS)
    elif way == 6:
        rows[row][0] = "#" + rows[row][0]
    else:
        rows.insert(row, [f"c{i}" for i in range(5)])
    return f"table, way {way}"


def csv_damage(rng, x, base):
    """The same of a .csv file."""
    rows = [[f"{value:.9g}" for value in row] for row in x]
    way = rng.random()
    words = "readable form"
    separator, end = ",", "\n"
    if way < 0.3:
        text = "\n".join(map(",".join, rows))
        return *damage_bytes(rng, text.encode()), False, False
    if way < 0.8:
        words = damaged_table(rng, rows)
    elif way < 0.9:
        if rng.random() < 0.5:
            rows.insert(0, chosen(rng, (list("abcde"), list("01234"))))
        end = chosen(rng, ("\n", "\r\n"))
    else:
        separator = chosen(rng, (";", "\t", " ", ",,", "|"))
        end = chosen(rng, ("\n", "\r", "\n\n"))
        words = f"separators {separator!r} {end!r}"
    mark = "\ufeff" if rng.random() < 0.1 else ""
    text = mark + end.join(map(separator.join, rows))
    return text.encode("utf-8", "surrogatepass"), words, words == "readable form", False


def feature_case(extension, damage, rng, base, folder):
    """A damaged feature file of one kind; links stand for all others."""
    features = folder / "features"
    features.mkdir()
    name = f"v{int(rng.integers(14))}"
    for file in base.features[extension].iterdir():
        if file.stem != name:
            (features / file.name).symlink_to(file)
    raw, way, must_read, must_see = damage(rng, base.arrays[name], base)
    path = features / f"{name}{extension}"
    path.write_bytes(raw)
    argv = checking(base, folder, "--features", features, "--extension", extension)
    original = base.arrays[name] if must_see else None
    return Trial(argv, f"{name}: {way}", partial(judge_features, path, original), must_read)


# ---- Cases of checkpoints -----------------------------------------------------------------------

def odd_part(rng, value):
    """(something else than a value of a checkpoint, the way, whether it might be right)."""
    if isinstance(value, torch.Tensor) and rng.random() < 0.7:
        return *odd_tensor(rng, value), False
    tensors = (torch.zeros(3), torch.tensor(math.nan), torch.zeros(0), torch.tensor(True))
    new = chosen(rng, tensors) if rng.random() < 0.15 else odd_value(rng)
    if new in (HUGE, DEEP):
        new = 10 ** 400
    if isinstance(new, torch.Tensor) or isinstance(value, torch.Tensor):
        return new, f"{data.shown(new)} for {data.shown(value)}", False
    number = {type(new), type(value)} <= {int, float} and -1e300 <= new <= 1e300
    alike = number or type(new) is type(value) and type(new) in (str, bool)
    return new, f"{data.shown(new)} for {data.shown(value)}", alike or new == value


def damage_part(rng, content, root):
    """Damage a part of a checkpoint's content in place -> (way, whether it might be right)."""
    if rng.random() < 0.1:
        del content[root]
        return f"without {root}", False
    if rng.random() < 0.15 or not isinstance(content[root], (dict, list)) or not content[root]:
        content[root], way, plausible = odd_part(rng, content[root])
        return f"{root}: {way}", plausible
    container, key = spot(rng, content[root], 0.1)
    if rng.random() < 0.15:
        del container[key]
        return f"{root}: without {data.short(key)}", False
    if rng.random() < 0.1 and isinstance(container, dict):
        container[chosen(rng, ("more", 3, "\x1b"))] = container[key]
        return f"{root}: more than {data.short(key)}", True
    container[key], way, plausible = odd_part(rng, container[key])
    return f"{root}, {data.short(key)}: {way}", plausible


def damage_state(rng, content):
    """Damage to what only torch can judge: the states of generators, the optimizer's numbers."""
    if rng.random() < 0.4:
        name = chosen(rng, ("torch", "run"))
        state = content["rng"][name]
        size = state.numel()
        content["rng"][name] = torch.from_numpy(rng.integers(0, 256, size, dtype=np.uint8))
        return f"rng: garbage in {name}"
    key = chosen(rng, ("optimizer", "icd_optimizer"))
    i = chosen(rng, tuple(content[key]["state"]))
    state = content[key]["state"][i]
    name = chosen(rng, tuple(state))
    state[name] = chosen(rng, (-1 - state[name].abs(), 1e30 * (1 + state[name].abs())))
    return f"{key}: {name} of {i} out of range"


def judge_evaluation(folder, metrics):
    """Look at the metrics of a checkpoint; they must be the given ones, if any."""
    found = finite_metrics(folder / "out/metrics.json")
    expect(metrics is None or found == metrics, f"the mAP is {found['average_mAP']}")


def judge_content(path, content):
    """A damaged checkpoint that was taken must hold the content of the undamaged one, if given."""
    if content is not None:
        found = torch.load(path, weights_only=True)
        expect(equal(found, content), "the damage was not seen")


def judge_whole(folder, whole):
    """A run that went on must end with finite weights, and with those of another run, if given."""
    found = weights(folder)
    expect(all(x.isfinite().all() for x in found.values()), "weights are not finite")
    finite_metrics(folder / "metrics.json")
    expect(whole is None or same(found, weights(whole)), "the weights are others")


def checkpoint_command(rng, base, folder, seen, modes):
    """(argv, judge) for the checkpoint of folder/run: evaluate, or go on, or only check that.

    seen  whether the damage must be refused or do nothing"""
    path = folder / "run/checkpoint.pt"
    mode = chosen(rng, modes)
    if mode == "evaluate":
        (folder / "out").mkdir()
        argv = ["evaluate", "--checkpoint", str(path), "--json", str(folder / "out/metrics.json")]
        return argv, partial(judge_evaluation, folder, base.metrics if seen else None)
    argv = ["--resume", str(folder / "run")]
    if mode == "check":
        content = None
        if seen:
            content = torch.load(base.middle / "checkpoint.pt", weights_only=True)
        return [*argv, "--check"], partial(judge_content, path, content)
    return argv, partial(judge_whole, folder / "run", base.whole if seen else None)


READ_BY_ALL = ("settings", "classes", "mean", "std", "labelled", "detector", "ema")


def with_way(command, way):
    """(argv, way, judge) of (argv, judge)."""
    argv, judge = command
    return argv, way, judge


def checkpoint_case(rng, base, folder):
    """A damaged checkpoint: to evaluate, or to resume."""
    original = base.middle / "checkpoint.pt"
    (folder / "run").mkdir()
    path = folder / "run/checkpoint.pt"
    if rng.random() < 0.45:
        raw, way, seen = damage_zip(rng, original.read_bytes(), base)
        path.write_bytes(raw)
        modes = ("evaluate", "check", "check", "evaluate", "go on") if seen else (
            "evaluate", "check")
        return Trial(*with_way(checkpoint_command(rng, base, folder, seen, modes), way))
    content = torch.load(original, weights_only=True)
    if rng.random() < 0.12:
        way = damage_state(rng, content)
        torch.save(content, path)
        return Trial(*with_way(checkpoint_command(rng, base, folder, False, ("go on",)), way))
    root = chosen(rng, tuple(content))
    way, plausible = damage_part(rng, content, root)
    torch.save(content, path)
    modes = ("evaluate", "check") if root in READ_BY_ALL else ("check", "check", "go on")
    return Trial(*with_way(checkpoint_command(rng, base, folder, not plausible, modes), way))


# ---- Cases of settings --------------------------------------------------------------------------

WORDS = {
    int: ("0", "1", "-1", "2", "3", "7", "16", "100", "8192", "1000000", "2147483648",
          "9223372036854775808", "1" + "0" * 30, "9" * 5000, "1e3", "1.5", "nan", "", "٣", "1_000",
          "0x10", " 4", "abc", "²"),
    float: ("0", "1", "-1", "0.5", "1e-12", "1e12", "1e300", "1e999", "nan", "-inf", "5e-324",
            "-0.0", "", "٣", "1_0", " 2", "0x1", "abc", "1,5", "9" * 5000),
    str: ("", " ", "x", "none", "5,5,5", "5,-5,5", "0", "1,2,3,4", "0:8,8:16", "0:4,4:8,8:inf",
          "inf:0,0:1,1:2", "1e400:2", "0:1:1e-9", "0.5:0.4:0.1", "0.3,0.5", "1.5", "nan:1:1",
          "\x1b[31m", "a\nb", "\udcff", "../x", "/", "/dev/zero", "/dev/null", "é", "x" * 5000,
          "0:4", "2147483647", "99999999999999999999", "A", "training", "validation", "stratified",
          ".npz", ".txt", "0.3:0.7:0.1:0.1", ",", ":", "Ⅷ", "%s"),
}
DEVICES = ("cuda", "meta", "mps", "xla", "cpu:7", "cpu", "cpu:x", "", "cuda:99", "hpu", "tpu9",
           "privateuseone", "xpu", "mkldnn", "\x1b", "CPU", "vulkan", "lazy", "ipu")
QUICK = (  # what does not make a run longer
    "acp_tau", "beta", "clip", "crop_keep", "crop_min", "drop_path", "ema", "eps", "focal_alpha",
    "focal_gamma", "icd_dropout", "icd_lr", "lambda_acp", "lambda_quality", "lambda_reg",
    "lambda_u", "length_noise", "lr", "min_length", "min_score", "mixup", "nms_sigma",
    "offset_bias", "radius", "repeat", "scope", "theta_drop", "theta_fixed", "theta_l",
    "theta_mine", "threshold", "t_plus", "t_plus_momentum", "tnd_bias", "warmup", "weight_decay",
    "seed", "standardize", "rerank", "exclusive", "icd", "acp", "acp_after", "alqa", "position",
    "quality_form", "soft_label", "rejected", "windows", "ranges", "max_detections", "pre_nms",
    "nms_agnostic", "pseudo_weights", "crop_tries", "resize", "refresh", "tiou", "weights")


def words_for(rng, f):
    """The words on a command line that give a setting a random value."""
    flag = "--" + f.name.replace("_", "-")
    if f.type is bool:
        return [chosen(rng, (flag, f"--no-{flag[2:]}"))]
    words = DEVICES if f.name == "device" else WORDS[f.type]
    if isinstance(f.metadata["allowed"], tuple) and rng.random() < 0.6:
        words = f.metadata["allowed"]
    return [f"{flag}={chosen(rng, words)}"]


def judge_settings(argv, names):
    """The settings of a command line that was taken must be what it says."""
    s = train.parse_settings(argv)
    for name in names:
        f = next(f for f in fields(train.Settings) if f.name == name)
        given = [word for word in argv if word.startswith(f"--{name.replace('_', '-')}=")]
        if given and name not in data.PLACES:
            value = f.type(given[-1].partition("=")[2])
            expect(getattr(s, name) == value, f"{name} is {getattr(s, name)!r}")
            expect(f.type is not float or math.isfinite(value), f"{name} is {value}")


def judge_run(folder, names):
    """A run must end with finite weights, its files whole."""
    found = weights(folder / "new")
    for name, x in found.items():
        expect(x.isfinite().all(), f"{name} is not finite, with {names}")
    if (folder / "new/metrics.json").exists():
        finite_metrics(folder / "new/metrics.json")


def shown_words(argv):
    """The words of a command line behind those that all cases share."""
    shared = argv.index("--precision") + 2
    return " ".join(ascii(word)[:80] for word in argv[shared:])


def settings_case(rng, base, folder):
    """A command line of train.py with random values for random settings, or an odd one."""
    way = rng.random()
    if way < 0.1:
        argv = checking(base, folder, *chosen(rng, (
            ("--lambda", "3"), ("--batch",), ("--batch", "2", "3"), ("x",), ("--no-batch",),
            ("--standardize=yes",), ("--\x1b[31m",), ("--" + "x" * 5000,), ("--lr", "--batch", "2"),
            ("--ratio", "0.3", "--split", "x.txt"), ("--resume", "nothing"), ("--start", ""),
            ("--start", "/dev/zero"), ("--resume", ""), ("\udcff",), ("-h3",), ("--", "--lr"),
            ("@x",), ("--overwrite", "--resume", "x"), ("--tiou=0.1:1:0.0001",))))
        return Trial(argv, shown_words(argv), partial(judge_settings, argv, ()))
    left_alone = ("check", "out", "resume", "overwrite")
    known = [f for f in fields(train.Settings) if f.name not in left_alone]
    trains = way > 0.85
    if trains:
        known = [f for f in known if f.name in QUICK]
    some = [known[i] for i in rng.permutation(len(known))[:int(rng.integers(1, 4))]]
    words = [word for f in some for word in words_for(rng, f)]
    names = [f.name for f in some]
    if trains:
        argv = own_argv(base.folder, "--out", folder / "new", "--pretrain-epochs", 1,
                        "--joint-epochs", 1, "--theta-l", 0.0, *words)
        return Trial(argv, shown_words(argv), partial(judge_run, folder, names))
    argv = checking(base, folder, *words)
    return Trial(argv, shown_words(argv), partial(judge_settings, argv, names))


def evaluation_settings_case(rng, base, folder):
    """A command line of evaluate.py with odd values."""
    pred, gt = base.whole / "predictions.json", base.folder / "own.json"
    text = chosen(rng, WORDS[str])
    flag = chosen(rng, ("--tiou", "--subset", "--ignore-labels", "--weights", "--device", "--json",
                        "--pred", "--gt", "--checkpoint", "--dataset", "--features", "--x"))
    if rng.random() < 0.5:
        argv = scoring(pred, gt, folder)
    else:
        (folder / "out").mkdir()
        argv = ["evaluate", "--checkpoint", str(base.middle), "--json",
                str(folder / "out/metrics.json")]
    if flag == "--json" and text in ("../x", "/", "/dev/zero", "/dev/null", "x" * 5000):
        text = str(folder / "out")
    return Trial([*argv, f"{flag}={text}"], f"{flag}={ascii(text)[:80]}", partial(expect, True, ""))


# ---- One case -----------------------------------------------------------------------------------

@dataclass
class Kind:
    """A kind of damaged input."""
    make: object  # (rng, base, folder) -> Trial
    few: int  # cases in the ordinary tests
    many: int  # in the campaign


KINDS = {
    "annotations": Kind(annotation_case, 7, 480),
    "predictions": Kind(prediction_case, 5, 320),
    "split files": Kind(split_case, 4, 160),
    ".npy": Kind(partial(feature_case, ".npy", npy_damage), 4, 200),
    ".npz": Kind(partial(feature_case, ".npz", npz_damage), 4, 220),
    ".pt": Kind(partial(feature_case, ".pt", pt_damage), 4, 200),
    ".csv": Kind(partial(feature_case, ".csv", csv_damage), 4, 160),
    "checkpoints": Kind(checkpoint_case, 6, 520),
    "settings": Kind(settings_case, 4, 320),
    "settings of evaluate.py": Kind(evaluation_settings_case, 1, 60),
}


def attempt(kind, seed, base, folder):
    """Make one case and run its command in this process -> its exit code.

    Leaves in the folder what was done ("way"), and what is wrong with the outcome ("fault")."""
    rng = np.random.default_rng([list(KINDS).index(kind), seed])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numpy and torch, when they make odd values
        trial = KINDS[kind].make(rng, base, folder)
    (folder / "way").write_text(ascii(trial.way)[:300])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    if trial.argv[0] == "evaluate":
        code = evaluate.main(trial.argv[1:])
    else:
        code = train.main(trial.argv)
    fault = "refused, but it can be read" if code and trial.must_read else ""
    if code == 0:
        try:
            trial.judge()
        except Exception as error:
            fault = f"exit code 0, but {type(error).__name__}: {ascii(str(error))[1:200]}"
    (folder / "fault").write_text(fault)
    return code


def left_behind(folder, code):
    """What a case has left that it must not, in words; "" if nothing."""
    if list(folder.rglob("*.tmp")):
        return "a temporary file is left"
    if code != 0 and (folder / "out").exists() and list((folder / "out").iterdir()):
        return "a result is left although it was refused"
    for path in [*folder.glob("new/*.json"), *folder.glob("run/*.json"), *folder.glob("out/*")]:
        try:
            json.loads(path.read_text())
        except ValueError:
            return f"{path.name} is half-written"
    for path in folder.glob("new/checkpoint.pt"):
        try:
            torch.load(path, weights_only=True)
        except Exception:
            return f"{path.name} is half-written"
    return ""


def last_call(text):
    """The last line of a traceback, and the last of our functions in it."""
    calls = re.findall(r'File "[^"]*/(\w+\.py)", line \d+, in (\w+)', text)
    ours = [call for call in calls if call[0] in (
        "data.py", "evaluate.py", "train.py", "model.py", "alqa.py", "acp.py", "icd.py")]
    where = "{}, {}".format(*ours[-1]) if ours else "-"
    return f"{text.strip().splitlines()[-1][:200]} ({where})"


def fault_of_text(out, err, code):
    """What is wrong with what a command has printed, in words; "" if nothing."""
    if "Traceback" in out + err:
        return f"a traceback: {last_call(err)}"
    lines = err.splitlines()
    if code == 2:
        last = lines.pop() if lines else ""
        if not last.startswith("error: ") or len(last) > 400:
            return f"no error line: {last[:100]!r}"
    odd = [line for line in lines if not line.startswith("warning: ")]
    if odd:
        return f"other lines on stderr: {odd[0][:200]!r}"
    if re.search(r"[\0-\x08\x0b-\x1f\x7f-\x9f]", out + err):
        return "control characters reach the terminal"
    long = max(map(len, (out + err).splitlines()), default=0)
    if long > 2000:
        return f"a line of {long} letters"
    return ""


def verdict(folder, code):
    """What is wrong with a case that has ended, in words; "" if nothing."""
    out, err = ((folder / name).read_text(errors="replace") for name in ("stdout", "stderr"))
    if not (folder / "way").exists():
        return f"THE CAMPAIGN'S OWN FAULT: {last_call(err)}"
    if code == "hang":
        return f"a hang of {SECONDS} s"
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    fault = fault_of_text(out, err, code)
    if not fault and code not in (0, 2):
        fault = f"exit code {code}"
    return fault or (folder / "fault").read_text() or left_behind(folder, code)


# ---- Counts -------------------------------------------------------------------------------------

@dataclass
class Tally:
    """What the campaign has done."""
    inputs: dict = field(default_factory=dict)  # {kind: Counter of refused, read, failures}
    kills: Counter = field(default_factory=Counter)  # by signal, stage and how
    seconds: dict = field(default_factory=dict)  # {what: time}

    def lines(self):
        """The counts as lines of text."""
        found = []
        total = Counter()
        for kind, counts in self.inputs.items():
            total += counts
            found.append((kind, counts))
        if found:
            found.append(("all damaged inputs", total))
        lines = [f"{kind:24} {sum(counts.values()):5}  refused {counts['refused']:5}  read "
                 f"{counts['read']:4}  failures {counts['failures']:3}  "
                 f"{self.seconds.get(kind, sum(self.seconds.values())):6.1f} s"
                 for kind, counts in found]
        if self.kills:
            kills = ", ".join(f"{name} {count}" for name, count in self.kills.items())
            lines.append(f"kills: {kills}; {self.seconds['kills']:.1f} s")
        return lines


@pytest.fixture(scope="module")
def tally(request):
    """The Tally, printed at the end."""
    found = Tally()
    yield found
    plugins = request.config.pluginmanager
    reporter = plugins.getplugin("terminalreporter")
    with plugins.getplugin("capturemanager").global_and_fixture_disabled():
        reporter.ensure_newline()
        for line in found.lines():
            reporter.write_line(line)


# ---- Damaged inputs -----------------------------------------------------------------------------

def try_all(kind, count, base, tally):
    """Run so many cases of a kind -> {fault: [case]} of those that failed."""
    begun = time.time()
    root = base.folder / f"cases of {kind}"
    counts = Counter(refused=0, read=0, failures=0)
    tasks = (((seed, root / str(seed)), partial(attempt, kind, seed, base, root / str(seed)),
              root / str(seed)) for seed in range(count))
    faults = {}
    for (seed, folder), code in run_children(tasks):
        fault = verdict(folder, code)
        counts["failures" if fault else "refused" if code else "read"] += 1
        if fault:
            way = (folder / "way").read_text() if (folder / "way").exists() else ""
            faults.setdefault(fault, []).append(f"{kind}, seed {seed}: {way}")
        else:
            shutil.rmtree(folder)
    tally.inputs[kind] = counts
    tally.seconds[kind] = time.time() - begun
    return faults


def told(faults):
    """The faults {fault: [case]} as text: how many cases each, and the first three."""
    alike = {}  # {fault without its values: (fault, cases)}
    for fault, cases in faults.items():
        kind = re.sub(r"'.*?'|\d+|\".*?\"", "_", fault)
        alike.setdefault(kind, (fault, []))[1].extend(cases)
    lines = []
    for fault, cases in alike.values():
        lines.append(f"{len(cases)} x {fault}")
        lines += [f"    {case}" for case in cases[:3]]
    return "\n".join(lines)


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_damaged_inputs_are_read_rightly_or_refused(kind, base, tally):
    faults = try_all(kind, KINDS[kind].few, base, tally)
    assert not faults, told(faults)


@pytest.mark.campaign
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_inputs_are_read_rightly_or_refused(kind, base, tally):
    faults = try_all(kind, KINDS[kind].many, base, tally)
    assert not faults, told(faults)


def test_the_campaign_is_large_enough():
    assert sum(kind.many for kind in KINDS.values()) >= 2000


# ---- Kills --------------------------------------------------------------------------------------

@dataclass
class Moment:
    """When and how a run ends before its time."""
    how: str  # a key of ARMS
    at: int  # the step of all stages from which on it may, or which file or row it is
    share: float  # of what is written then, or of the time that passes until the signal
    signal: int = signal.SIGKILL


def arm_step(moment, tell):
    """At a step."""
    advance = train.advance

    def watched(run, *rest):
        if run.ema_step >= moment.at:
            tell(run.stage)
        return advance(run, *rest)

    train.advance = watched


def arm_report(moment, tell):
    """While the report is made."""
    report = train.report

    def watched(run):
        tell("report")
        return report(run)

    train.report = watched


def arm_start(moment, tell):
    """At any time from the start on."""
    tell("start")


def saved_by(save, content):
    """The bytes that torch.save writes."""
    file = io.BytesIO()
    save(content, file)
    return file.getvalue()


def arm_save(moment, tell):
    """In the midst of torch.save: a part of the checkpoint is written."""
    save = torch.save

    def partly(content, file):
        if content["ema_step"] < moment.at:
            return save(content, file)
        raw = saved_by(save, content)
        file.write(raw[:int(moment.share * len(raw))])
        file.flush()
        tell(content["stage"])
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = partly


def arm_move(moment, tell):
    """Just before or after a file is moved to its place."""
    move = os.replace
    moved = []

    def watched(source, target):
        moved.append(target)
        if len(moved) < moment.at:
            return move(source, target)
        if moment.share < 0.5:
            move(source, target)
        tell("a move")
        os.kill(os.getpid(), signal.SIGKILL)

    os.replace = watched


def arm_row(moment, tell):
    """In the midst of a line of the log."""
    append = data.append_row
    written = []

    def partly(path, row):
        written.append(row)
        if len(written) < moment.at:
            return append(path, row)
        text = json.dumps(row) + "\n"
        with open(path, "a") as file:
            file.write(text[:int(moment.share * len(text))])
        tell(row["stage"])
        os.kill(os.getpid(), signal.SIGKILL)

    data.append_row = partly


ARMS = {
    "step": arm_step,
    "report": arm_report,
    "start": arm_start,
    "torch.save": arm_save,
    "move": arm_move,
    "row": arm_row,
}
OUTSIDE = {"step": 0.08, "report": 0.25, "start": 0.4}  # seconds at most until the signal


def disturbed(argv, moment, pipe):
    """train.py that ends at a moment, or tells through the pipe that it may be ended."""
    def tell(stage):
        os.write(pipe, f"{stage}\n".encode())

    ARMS[moment.how](moment, tell)
    return train.main(argv)


def end_at(argv, moment, folder):
    """Run train.py and end it at a moment -> (exit code, the stage that it was in or "")."""
    reading, writing = os.pipe()
    child = fork(partial(disturbed, argv, moment, writing), folder)
    os.close(writing)
    stage = os.read(reading, 100).decode().split("\n")[0]
    if stage and moment.how in OUTSIDE:
        time.sleep(moment.share * OUTSIDE[moment.how])
        os.kill(child, moment.signal)
    code = wait_for(child)
    os.close(reading)
    return code, stage


def moments_of(rng, count):
    """So many Moments of one run, in order, the last one in its report if there are many."""
    found = []
    odds = np.where(np.arange(STEPS) < JOINT, 1.0, 2.0)
    odds /= odds.sum()
    for at in sorted(int(x) for x in rng.choice(STEPS, count, replace=False, p=odds)):
        how = chosen(rng, 10 * ["step"] + 3 * ["torch.save"] + 2 * ["move", "row"] + ["start"])
        share = float(rng.random())
        number = signal.SIGKILL
        if how == "step" and rng.random() < 0.2:
            number = chosen(rng, (signal.SIGTERM, signal.SIGINT))
        if how in ("move", "row"):
            at = int(rng.integers(1, 9))
        found.append(Moment(how, at, share, number))
    if count > 4:
        found[-1] = Moment("report", 0, float(rng.random()))
    return found


def fault_of_end(code, moment, folder):
    """What is wrong with the way a run has ended, in words; "" if nothing."""
    allowed = {0, -moment.signal if moment.signal == signal.SIGKILL else 128 + moment.signal}
    if code not in allowed:
        return f"exit code {code}"
    if moment.signal == signal.SIGKILL or code == 0:
        return ""
    lines = (folder / "stderr").read_text().splitlines()
    sane = len(lines) == 1 and lines[0].startswith("error: stopped by SIG")
    return "" if sane else f"it says {lines}"


def fault_of_run(run, whole):
    """What parts a run that was ended often from a whole one, in words; "" if nothing."""
    if not same(weights(run), weights(whole)):
        return "the weights are others"
    for name in ("metrics.json", "pseudo_labels.json", "predictions.json"):
        if (run / name).read_bytes() != (whole / name).read_bytes():
            return f"{name} is another"
    mine, theirs = ([(row["stage"], row["epoch"], row.get("step"), row.get("loss"))
                     for row in read_log(folder)] for folder in (run, whole))
    if mine != theirs:
        return "the log is another"
    known = {path.name for path in whole.iterdir()}
    left = {path.name for path in run.iterdir()} - known
    return f"files are left: {left}" if left else ""


def next_command(argv, run, folder):
    """The command that goes on with a run: resume, or begin where nothing was saved."""
    again = ["--resume", str(run)]
    if (run / "checkpoint.pt").exists():
        evaluate.read_checkpoint(run)
        return again
    expect(wait_for(fork(partial(train.main, again), folder)) == 2, "resumed without a checkpoint")
    lines = (folder / "stderr").read_text().splitlines()
    expect(len(lines) == 1 and lines[0].startswith("error: "), f"it says {lines}")
    return argv


def chain(number, count, base, folder):
    """One run that is ended so many times and goes on each time; writes what happened -> 0."""
    rng = np.random.default_rng([100, number])
    run = folder / "run"
    argv = own_argv(base.folder, *LONGER, "--out", run)
    ended = []
    fault = ""
    command = argv
    for i, moment in enumerate(moments_of(rng, count)):
        part = folder / f"part {i}"
        code, stage = end_at(command, moment, part)
        fault = fault_of_end(code, moment, part)
        if code != 0:
            ended.append([signal.Signals(moment.signal).name, stage, moment.how])
        if fault:
            fault = f"{moment}, command {command[:2]}: {fault}"
            break
        command = next_command(argv, run, folder / f"refused {i}")
    if not fault:
        code = wait_for(fork(partial(train.main, command), folder / "end"))
        fault = f"at the end exit code {code}" if code else fault_of_run(run, base.whole)
    (folder / "chain.json").write_text(json.dumps({"ended": ended, "fault": fault}))
    return 0


def kill_all(chains, count, base, tally):
    """So many chains of so many ends each -> what is wrong, a line each."""
    begun = time.time()
    root = base.folder / f"chains of {count}"
    tasks = ((number, partial(chain, number, count, base, root / str(number)), root / str(number))
             for number in range(chains))
    faults = []
    for number, code in run_children(tasks, 300):
        if code != 0:
            text = (root / str(number) / "stderr").read_text()
            faults.append(f"chain {number}: {code}: {last_call(text or '-')}")
            continue
        told = read_result(root / str(number) / "chain.json")
        if told["fault"]:
            faults.append(f"chain {number}: {told['fault']}")
        for name, stage, how in told["ended"]:
            tally.kills[name] += 1
            tally.kills[f"in {stage}"] += 1
            tally.kills[f"by {how}"] += 1
    tally.seconds["kills"] = time.time() - begun
    return faults


def test_a_run_that_is_killed_twice_ends_as_a_whole_one(base, tally):
    faults = kill_all(1, 2, base, tally)
    assert not faults, "\n".join(faults)


@pytest.mark.campaign
def test_runs_that_are_killed_often_end_as_a_whole_one(base, tally):
    faults = kill_all(14, 6, base, tally)
    assert not faults, "\n".join(faults)
    assert tally.kills["SIGKILL"] >= 50, tally.kills
    assert tally.kills["by torch.save"] >= 2, tally.kills
    for stage in train.STAGES:
        assert tally.kills[f"in {stage}"] >= 5, tally.kills
    assert tally.kills["SIGTERM"] and tally.kills["SIGINT"], tally.kills
