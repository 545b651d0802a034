"""Files: JSON, atomic writing, feature files, and what is remembered of them.

Everything from outside is read without executing anything and checked; bad input raises BadInput.
"""
import fnmatch
import hashlib
import json
import math
import os
import re
import stat
import warnings
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from plumbing.words import BadInput, is_first, several, short, shown

MOST_TEXT = 200 * 10 ** 6  # bytes of a JSON or text file; the largest published one has 30 million
MOST_UNPACKED = 2 ** 31  # bytes of features read at once; a .npy file is read piece by piece


SOUNDS = (".wav", ".mp3", ".flac", ".ogg", ".oga", ".opus", ".m4a", ".aac", ".wma", ".aiff")
VIDEOS = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".mpg", ".mpeg", ".m4v", ".mts", ".m2ts", ".ts",
          ".wmv", ".flv", ".3gp", ".ogv", *SOUNDS)  # what is labelled in time
IS_VIDEO = "it is a recording, of which an extractor makes features first (README: Your own data)"
OF_WINDOWS, OF_VIDEOS = "windows.json", "video_features.json"  # how features were made
SIGNS = {  # how files begin that are often taken for another kind, and what they are
    rb"\s*version https://git-lfs": "it is a Git LFS pointer, and git lfs pull brings the file",
    rb"\s*<": "it is a web page",
    rb"\x89HDF": "it is an HDF5 file",
    rb"(?s:.{4})ftyp": IS_VIDEO,
}


def is_hidden(path):
    """Whether a path is of what systems leave beside files."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def files_in(folder, pattern="*"):
    """[(path within it, file)] of the files of a folder and its sub-folders, none of them hidden.

    Links to folders elsewhere are followed, each folder once; those to a folder within it are not.
    """
    if not os.path.isdir(folder):  # nor is a name that no system can have
        return []
    top = os.path.realpath(folder)
    found = []
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        linked = os.path.islink(place) and place != os.fspath(folder)
        if real in seen or linked and Path(real).is_relative_to(top):
            folders.clear()
            continue
        seen.add(real)
        folders.sort()  # of two links to one folder the first is taken, on every system
        found += [Path(place, name) for name in fnmatch.filter(folders + names, pattern)]
    rows = [(file.relative_to(folder), file) for file in sorted(found)]
    return [row for row in rows if not is_hidden(row[0])]


def real_paths(files):
    """Where files and folders lie behind links, as a set; without those that do not exist."""
    return {os.path.realpath(file) for file in files if os.path.exists(file)}


def lies_in(file, places):
    """Whether a file is one of the real_paths() of some places, or lies below one."""
    real = Path(os.path.realpath(file))
    return not places.isdisjoint(map(str, (real, *real.parents)))


def files_left(folder, taken):
    """[path within it] of a folder's files without those taken, those that share the name of one
    taken, and those that say how features were made."""
    stems = {file.with_suffix("") for file in taken}
    return [place for place, file in files_in(folder)
            if stems.isdisjoint((file, file.with_suffix(""))) and not file.is_dir()
            and file.name not in (OF_WINDOWS, OF_VIDEOS)]


# ---- Text and JSON ------------------------------------------------------------------------------

def kind_of(path):
    """What a file is instead of what it should be, in words; "" where its first bytes do not say.
    """
    head = b""
    with suppress(OSError, ValueError), open(path, "rb") as file:
        head = file.read(64)
    return next((words for sign, words in SIGNS.items() if re.match(sign, head)), "")


@contextmanager
def reading(what, path, fault):
    """Turn whatever is raised while a file is read into BadInput.

    Of numpy, torch and zipfile that are a dozen kinds, whose words advise to unpickle.
    what, path  the file, as the message names it
    fault       what is wrong with it, in words, where neither the system says it nor its kind"""
    try:
        yield
    except BadInput:
        raise
    except FileNotFoundError:
        raise BadInput(f"{what} not found: {path}") from None
    except Exception as error:
        reason = getattr(error, "strerror", None) or kind_of(path) or fault
        raise BadInput(f"{what} {short(path, 200)} cannot be read: {reason}") from None


@contextmanager
def writing(path):
    """Turn what the system says while a file is written into BadInput."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # of torch.save()'s
        reason = getattr(cause, "strerror", None) or "its name is none, or the disk is full"
        raise BadInput(f"{short(path, 200)} cannot be written: {reason}") from None


def check_file(path, what, most=math.inf):
    """Raise BadInput unless the path is a regular file of at most `most` bytes.

    A device or a pipe might never end, or give what is not there twice."""
    with reading(what, path, "its name is none"):
        found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise BadInput(f"{what} {path} cannot be read: it is no regular file")
    if found.st_size > most:
        raise BadInput(f"{what} {path} cannot be read: it has {found.st_size} bytes, over {most}")


def read_text(path, what, most=MOST_TEXT):
    """The text of a file of at most `most` bytes; `what` names it in the message. Raises BadInput.
    """
    check_file(path, what, most)
    with reading(what, path, "it is no UTF-8 text"):
        return Path(path).read_text(encoding="utf-8-sig")  # with or without a byte order mark


def without_repeated_keys(pairs):
    """A dict of the pairs of a JSON object; raises ValueError for a key that comes twice."""
    content = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"the key {shown(key)} comes twice")
        content[key] = value
    return content


def read_json(path, what):
    """The content of a JSON file; `what` names it in the message. Raises BadInput."""
    text = read_text(path, what)
    try:
        return json.loads(text, object_pairs_hook=without_repeated_keys)
    except (ValueError, RecursionError) as error:  # of too many digits it says after ; what to set
        reason = kind_of(path) or str(error).partition(";")[0]
        raise BadInput(f"{what} {path} cannot be read as JSON: {reason}") from None


def check_replaced(path, sign, what):
    """Raise BadInput where a file to write exists without the sign of its kind: it is another's."""
    there = Path(path).read_text(errors="replace") if os.path.isfile(path) else ""
    if there and sign not in there:
        raise BadInput(f"{path} exists and is no {what}: name another file")


def write_atomically(path, write):
    """write(file), a binary file beside `path`, then move it there: never half-written.

    What is no regular file, like /dev/null, is written as it is. Raises BadInput where the disk
    is full or closed; what lay at `path` is still there then."""
    with writing(path):
        path = Path(os.path.realpath(path))
        if path.exists() and not path.is_file():
            with open(path, "wb") as file:
                write(file)
            return
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.unlink(missing_ok=True)
        try:
            with open(temporary, "xb") as file:  # a new file, no link that somebody planted
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path, text):
    """Write a text file atomically."""
    write_atomically(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))


def write_json(path, content, indent=None):
    """Write JSON atomically."""
    write_text(path, json.dumps(content, indent=indent))


def write_rows(path, content):
    """Write a log of JSON lines anew, atomically."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in content))


def append_row(path, row):
    """Append a dict to a log of JSON lines; raises BadInput where the disk is full."""
    with writing(path), open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def is_row(row, stages=None):
    """Whether what a line of a log holds is a row that a run wrote, of one of some stages."""
    match row:
        case {"stage": str(stage), "epoch": int()} if type(row.get("step", 0)) is int:
            flat = not any(isinstance(value, list | dict) for value in row.values())
            return flat and (stages is None or stage in stages)
    return False


def read_rows(path, stages=None):
    """(the rows of a run's log, how many lines are none); a last one that was cut is not counted.

    stages  of the rows; None: any"""
    text = path.read_text(errors="replace") if path.exists() else ""
    rows = []
    others = 0
    for line in text.splitlines(keepends=True):
        row = None
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
        if is_row(row, stages):
            rows.append(row)
        else:
            others += line.endswith("\n")
    return rows, others


# ---- Feature files ------------------------------------------------------------------------------

def check_unpacked(archive, path, what):
    """Raise BadInput for a zip archive that unpacks to too much, or has two parts of one name."""
    names = archive.namelist()
    size = sum(member.file_size for member in archive.infolist())
    if size > max(MOST_UNPACKED, 2 * os.path.getsize(path)):
        raise BadInput(f"{what} {path} cannot be read: it unpacks to {size} bytes")
    if len(set(names)) < len(names):
        raise BadInput(f"{what} {path} cannot be read: it has two parts of one name")


def load_torch(path, what):
    """The content of a file of torch.save, on the CPU; raises BadInput.

    Its checksums are tested first: torch.load does not look at them."""
    check_file(path, what)
    with reading(what, path, "it is no whole archive"), zipfile.ZipFile(path) as archive:
        check_unpacked(archive, path, what)
        broken = archive.testzip()
    if broken:
        raise BadInput(f"{what} {path} cannot be read: its part {short(broken)} is damaged")
    with reading(what, path, "it holds no tensors alone"):
        return torch.load(path, map_location="cpu", weights_only=True)


@dataclass(frozen=True)
class Reading:
    """How feature files are read."""
    key: str = "feats"  # the name of the array in .npz and .pt files
    skip: int = 0  # leading columns that are left out
    fill: bool = False  # whether a step that holds NaN or infinity takes the values before it


def chosen(arrays, key, path, what):
    """The array under `key` of many; raises BadInput."""
    if key not in arrays:
        raise BadInput(f"{what} {path} holds no array named {key!r} (--feature-key), only "
                       f"{several(arrays)}")
    return arrays[key]


def read_npy(path, key, what):
    """The array of a .npy file, memory-mapped."""
    return np.lib.format.open_memmap(path, mode="r")


def read_npz(path, key, what):
    """The array `key` of an .npz file, or its only one without a name."""
    with np.load(path, allow_pickle=False) as arrays:
        check_unpacked(arrays.zip, path, what)
        nameless = arrays.files == ["arr_0"]
        key = "arr_0" if nameless else key
        return np.asarray(chosen(arrays, key, path, what))  # what is no array comes as bytes


def source_of(feats):
    """A feature file, or an array, of what somebody gives as features: a path, an array, a tensor.
    """
    if isinstance(feats, str | Path):
        return Path(feats)
    if isinstance(feats, torch.Tensor):
        feats = feats.detach().cpu()
        feats = feats.float() if feats.dtype == torch.bfloat16 else feats
    try:
        return np.asarray(feats)
    except ValueError as error:
        raise BadInput(f"features must be an array (T, D): {short(error)}") from None


def read_pt(path, key, what):
    """The tensor of a .pt file, or that under `key` of its dict."""
    tensor = load_torch(path, what)
    if isinstance(tensor, dict):
        tensor = chosen(tensor, key, path, what)
    if tensor.nbytes > MOST_UNPACKED:  # one number can be shown as many
        raise ValueError
    return source_of(tensor)


EMPTY = ("", "na", "n/a", "null", "none")  # cells without a number, as tables have them


def is_header(cells, second):
    """Whether the first line of a table names its columns: in words, or as 0, 1, 2, ... where the
    second line has decimals."""
    numbers = []
    for cell in cells:
        with suppress(ValueError):
            numbers.append(float(cell))
    named = not numbers and any(cell.lower() not in EMPTY for cell in cells)
    counted = len(cells) > 1 and cells == list(map(str, range(len(cells))))
    return named or counted and "." in second


def separator_of(line):
    """What stands between the cells of a table with this first line."""
    return next((mark for mark in "\t;" if mark in line), ",")


def head_of(first, second):
    """What the first two lines of a table say: (whether the first is no row of it, the names of
    its columns or [], what stands between its cells).

    A first line that begins with # is no row: a header where it has as many cells, else a title."""
    is_title = first.startswith("#")
    between = separator_of(second if is_title else first)
    names = [cell.strip(" \"'#\n") for cell in first.split(between)]
    if is_title:
        fits = len(names) == second.count(between) + 1
        return True, names if fits else [], between
    named = is_header(names, second)
    return named, names if named else [], between


def odd_cell(lines, between, first):
    """Where a table is none, in words; first: the number of the first of its lines."""
    width = lines[0].count(between) + 1 if lines else 0
    for number, line in enumerate(lines, first):
        cells = line.split(between)
        if not line.strip():
            return f"line {number} is empty: a step needs its values"
        if len(cells) != width:
            return f"line {number} has {len(cells)} columns, those before {width}"
        for column, cell in enumerate(cells, 1):
            try:
                float(cell)
            except ValueError:
                return f"line {number}, column {column} is {shown(cell.strip())}, no number"
    return NO_ARRAY


def read_table(path, key, what):
    """The numbers of a text file, a line a step, with commas, semicolons or tabs between them."""
    lines = read_text(path, what, MOST_UNPACKED // 8).split("\n")
    above, names, between = head_of(lines[0], "".join(lines[1:2]))
    lines = lines[above:]
    while lines and not lines[-1].strip():
        lines.pop()
    with suppress(ValueError):
        found = np.loadtxt(lines, delimiter=between, ndmin=2, comments=None)
        if names and found.size and len(names) != found.shape[1]:
            raise BadInput(f"{what} {path}: its header names {len(names)} columns, and its rows "
                           f"have {found.shape[1]} (a decimal comma? a row number?)")
        if found.size and len(found) == len(lines):
            return found
    fault = kind_of(path) or odd_cell(lines, between, 1 + above)
    raise BadInput(f"{what} {path} cannot be read: {fault}")


def columns_of(source):
    """What the header of a table of features calls its columns; [] of another source."""
    if isinstance(source, np.ndarray) or READERS.get(source.suffix.lower()) is not read_table:
        return []
    with reading("feature file", source, NO_ARRAY), open(source, encoding="utf-8-sig") as file:
        return head_of(file.readline(), file.readline())[1]


READERS = {".npy": read_npy, ".npz": read_npz, ".pt": read_pt, ".pth": read_pt,
           ".csv": read_table, ".tsv": read_table}
NO_ARRAY = "it is damaged, pickled or of another kind"


@np.errstate(over="ignore", invalid="ignore")  # what is wrong is said
def bad_steps(feats):
    """Which steps hold NaN, infinity or what float32 cannot hold -> (T,) bool."""
    parts = (feats[first:first + 4096] for first in range(0, len(feats), 4096))
    return np.concatenate([~np.isfinite(np.array(x, np.float32)).all(1) for x in parts])


def first_bad(feats, bad):
    """(step, channel, value) of the first that is bad; bad: bad_steps(feats)."""
    step = bad.argmax()
    channel = bad_steps(feats[step][:, None]).argmax()
    return step, channel, feats[step, channel]


def filled(feats, bad):
    """Features (T, D) with the values of the step before, or else after, at the bad steps (T,).

    Without a bad step, or a good one, they stay as they are."""
    if bad.all() or not bad.any():
        return feats
    good = np.nonzero(~bad)[0]
    before = np.searchsorted(good, np.arange(len(bad)), side="right") - 1
    return np.asarray(feats)[good[before.clip(0)]]


def place_of(source, name):
    """A video's features as a message names them."""
    if isinstance(source, np.ndarray):
        return f"video {short(name)}: the array"
    return f"video {short(name)}: feature file {source}"


def read_features(source, how, name, shape=None):
    """Features (T, D), memory-mapped where possible, read without executing anything.

    source  a file .npy, .npz, .pt, .csv or .tsv, or an array
    how     a Reading
    shape   (T, D) that it had, where it was read before
    Raises BadInput if the file is missing, truncated, pickled, of another shape or empty."""
    where = place_of(source, name)
    feats = source
    if not isinstance(source, np.ndarray):
        what = f"video {short(name)}: feature file"
        check_file(source, what)
        suffix = Path(source).suffix.lower()
        if suffix not in READERS:
            reason = IS_VIDEO if suffix in VIDEOS else kind_of(source)
            raise BadInput(f"{where} is of no kind that is read, {', '.join(READERS)}"
                           f"{reason and '; '}{reason}")
        with reading(what, source, NO_ARRAY), warnings.catch_warnings(action="ignore"):
            feats = READERS[suffix](source, how.key, what)
    if feats.ndim != 2 or 0 in feats.shape or feats.dtype.kind not in "fiu":
        raise BadInput(f"{where} must hold real numbers of shape (T, D), not "
                       f"{short(feats.dtype)} {short(feats.shape)}")
    if feats.shape[1] <= how.skip:
        raise BadInput(f"{where} has {feats.shape[1]} columns, and --skip-columns {how.skip} "
                       "leaves none")
    feats = feats[:, how.skip:]
    if shape and feats.shape != shape:
        raise BadInput(f"{where} was replaced: its shape is {feats.shape}, no longer {shape}")
    if how.fill:
        feats = filled(feats, bad_steps(feats))
    return feats


# ---- What is known of a file --------------------------------------------------------------------

class Sums(NamedTuple):
    """What is known of a video's features."""
    steps: int
    mean: np.ndarray  # (D,)
    spread: np.ndarray  # (D,), the sum of squares about the mean
    gaps: int  # steps that were filled


def sum_features(source, how, name):
    """The Sums of a video's features; how: a Reading.

    Raises BadInput for NaN, infinity, and what float32 cannot hold, unless they are to be filled.
    """
    feats = read_features(source, replace(how, fill=False), name)
    bad = bad_steps(feats)
    if bad.all() or bad.any() and not how.fill:
        step, channel, value = first_bad(feats, bad)
        beyond = ", which float32 cannot hold," if np.isfinite(value) else ""
        raise BadInput(f"{place_of(source, name)} holds {value}{beyond} at step {step}, channel "
                       f"{channel}; {bad.sum()} of its {len(bad)} steps hold such (--fill-gaps "
                       "gives them the values of the step before)")
    feats = filled(feats, bad)
    steps = len(feats)
    origin = np.array(feats[0], dtype=np.float64)  # far from 0 squares would swallow the variance
    total = square = 0
    for first in range(0, steps, 4096):  # a long video is never held as a whole
        part = np.array(feats[first:first + 4096], dtype=np.float64) - origin
        total += part.sum(0)
        square += (part ** 2).sum(0)
    spread = np.maximum(square - total ** 2 / steps, 0)
    return Sums(steps, origin + total / steps, spread, int(bad.sum()))


def memory_of(source, how):
    """The file, in the user's cache, that remembers sum_features() of a feature file."""
    name = hashlib.sha256(os.fsencode(f"{os.path.abspath(source)}\n{how}")).hexdigest()
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache, "apl", f"{name[:32]}.sums")


def seal_of(state, numbers):
    """What tells that a file's state is another, or that its numbers (bytes) were changed."""
    return hashlib.sha256(state.encode() + numbers).digest()


def remembered(memory, state):
    """The Sums in a file of the cache; None if it is of another state, or odd in any way."""
    with suppress(OSError):
        content = memory.read_bytes()
        if content[:32] == seal_of(state, content[32:]):
            steps, gaps, *rest = np.frombuffer(content[32:])
            mean, spread = np.split(np.array(rest), 2)
            return Sums(int(steps), mean, spread, int(gaps))
    return None


def sum_once(source, how, name):
    """sum_features(), of a file remembered until its size, or the times of its content and of its
    entry, are others.

    A memory that cannot be read or written is none: it would only have saved time."""
    if isinstance(source, np.ndarray) or not os.path.isfile(source):
        return sum_features(source, how, name)
    now = os.stat(source)
    state = f"{now.st_size} {now.st_mtime_ns} {now.st_ctime_ns}"
    memory = memory_of(source, how)
    ours = not memory.is_symlink() and (memory.is_file() or not memory.exists())
    known = remembered(memory, state) if ours else None
    sums = known or sum_features(source, how, name)
    if ours and not known and is_first():
        numbers = np.hstack([sums.steps, sums.gaps, sums.mean, sums.spread]).tobytes()
        with suppress(OSError):
            memory.parent.mkdir(parents=True, exist_ok=True)
            memory.write_bytes(seal_of(state, numbers) + numbers)
    return sums


def check_columns(columns, known, where, others):
    """Raise BadInput where both lists have names, and the names differ.

    where, others  who has the columns, who the known ones, in words"""
    if not columns or not known or columns == known:
        return
    pairs = zip_longest(columns, known, fillvalue="nothing")
    mine, theirs = next(pair for pair in pairs if pair[0] != pair[1])
    raise BadInput(f"{where} the columns {several(columns)}, {others} {several(known)}: "
                   f"{short(mine)} in the place of {short(theirs)}")


def sum_all(sources, how):
    """({id: sum_once()}, {id: BadInput}) of all sources; a video that is bad is in the second."""
    sums = {}
    faults = {}
    named = []  # the columns of the first table that names them
    for name, source in sources.items():
        try:
            found = sum_once(source, how, name)
            columns = columns_of(source)[how.skip:]
            named = named or columns
            check_columns(columns, named, f"{place_of(source, name)} has", "others have")
            sums[name] = found
        except BadInput as fault:
            faults[name] = fault
    return sums, faults


def statistics(sums):
    """Mean and std (D,) over all videos of their Sums; a std of 0 becomes 1."""
    steps, means, spreads, _ = (np.array(column) for column in zip(*sums))
    mean = np.average(means, 0, steps)
    variance = spreads.sum(0) / steps.sum() + np.average((means - mean) ** 2, 0, steps)
    std = np.sqrt(variance)
    return mean, np.where(std > 1e-6, std, 1)


def fingerprint_of(sums):
    """[T, mean, spread] of a video's Sums: what changes when its features do, or their order.

    Each channel has a weight of its own, so that channels that changed places are seen."""
    weight = np.linspace(1, 2, len(sums.mean))
    return [sums.steps, float(weight @ sums.mean), float(weight @ sums.spread)]
