"""Files: JSON, atomic writing, feature files, and what is remembered of them.

Everything from outside is read without executing anything and checked; bad input raises BadInput.
"""
import hashlib
import json
import math
import os
import stat
import warnings
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch

from plumbing.words import BadInput, is_first, several, short, shown

MOST_TEXT = 200 * 10 ** 6  # bytes of a JSON or text file; the largest published one has 30 million
MOST_UNPACKED = 2 ** 31  # bytes of features read at once; a .npy file is read piece by piece


# ---- Text and JSON ------------------------------------------------------------------------------

@contextmanager
def reading(what, path, fault):
    """Turn whatever is raised while a file is read into BadInput.

    Of numpy, torch and zipfile that are a dozen kinds, whose words advise to unpickle.
    what, path  the file, as the message names it
    fault       what is wrong with it, in words, where the system does not say"""
    try:
        yield
    except BadInput:
        raise
    except FileNotFoundError:
        raise BadInput(f"{what} not found: {path}") from None
    except Exception as error:
        reason = getattr(error, "strerror", None) or fault
        raise BadInput(f"{what} {short(path, 200)} cannot be read: {reason}") from None


def check_file(path, what, most=math.inf):
    """Raise BadInput unless the path is a regular file of at most `most` bytes.

    A device or a pipe might never end, or give what is not there twice."""
    with reading(what, path, "its name is none"):
        found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise BadInput(f"{what} {path} cannot be read: it is no regular file")
    if found.st_size > most:
        raise BadInput(f"{what} {path} cannot be read: it has {found.st_size} bytes, over {most}")


def read_text(path, what):
    """The text of a file; `what` names it in the message. Raises BadInput."""
    check_file(path, what, MOST_TEXT)
    with reading(what, path, "it is no UTF-8 text"):
        return Path(path).read_text(encoding="utf-8-sig")  # with or without a byte order mark


def without_repeated_keys(pairs):
    """A dict of the pairs of a JSON object; raises KeyError for a key that comes twice."""
    content = {}
    for key, value in pairs:
        if key in content:
            raise KeyError(key)
        content[key] = value
    return content


def read_json(path, what):
    """The content of a JSON file; `what` names it in the message. Raises BadInput."""
    text = read_text(path, what)
    try:
        return json.loads(text, object_pairs_hook=without_repeated_keys)
    except RecursionError:
        reason = "it is nested too deeply"
    except KeyError as error:
        reason = f"the key {shown(*error.args)} comes twice"
    except json.JSONDecodeError as error:
        reason = f"{error.msg} in line {error.lineno}"
    except ValueError:
        reason = "a number has too many digits"
    raise BadInput(f"{what} {path} cannot be read as JSON: {reason}")


def write_atomically(path, write):
    """write(file), a binary file beside `path`, then move it there: never half-written.

    What is no regular file, like /dev/null, is written as it is. Raises BadInput where the disk
    is full or closed; what lay at `path` is still there then."""
    try:
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
    except ValueError:
        raise BadInput(f"{short(path, 200)} cannot be written: its name is none") from None
    except (OSError, RuntimeError) as error:  # torch.save: "failed writing", the cause behind it
        cause = error if isinstance(error, OSError) else error.__context__
        reason = getattr(cause, "strerror", None) or "the disk may be full"
        raise BadInput(f"{short(path, 200)} cannot be written: {reason}") from None


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
    """Append a dict to a log of JSON lines."""
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def read_rows(path):
    """The dicts of a log of JSON lines, [] where there is none, without a last line cut short."""
    found = []
    with suppress(FileNotFoundError, ValueError):
        for line in path.read_text(errors="replace").splitlines():
            found.append(json.loads(line))
    return [row for row in found if isinstance(row, dict)]


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
        feats = chosen(arrays, "arr_0" if nameless else key, path, what)
        return np.asarray(feats)  # a part that is no array comes as bytes


def read_pt(path, key, what):
    """The tensor of a .pt file, or that under `key` of its dict."""
    tensor = load_torch(path, what)
    if isinstance(tensor, dict):
        tensor = chosen(tensor, key, path, what)
    if tensor.nbytes > MOST_UNPACKED:  # one number can be shown as many
        raise ValueError
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def is_header(cells):
    """Whether the first line of a .csv file names its columns: in words, or as 0, 1, 2, ..."""
    numbers = []
    for cell in cells:
        with suppress(ValueError):
            numbers.append(float(cell))
    return not numbers or len(cells) > 1 and numbers == list(range(len(cells)))


def read_csv(path, key, what):
    """The numbers of a .csv file, a line a step, without its header."""
    check_file(path, what, MOST_UNPACKED // 8)
    with open(path, encoding="utf-8-sig") as file:
        if not is_header(file.readline().split(",")):
            file.seek(0)
        return np.loadtxt(file, delimiter=",", ndmin=2, comments=None)


READERS = {".npy": read_npy, ".npz": read_npz, ".pt": read_pt, ".pth": read_pt, ".csv": read_csv}
NO_ARRAY = "it is damaged, pickled or of another kind"


def read_features(source, key, name):
    """Features (T, D), memory-mapped where possible, read without executing anything.

    source  a file .npy, .npz, .pt or .csv, or an array
    key     the name of the array in .npz and .pt files
    Raises BadInput if the file is missing, truncated, pickled, of another shape or empty."""
    if isinstance(source, np.ndarray):
        where, feats = f"video {short(name)}: the array", source
    else:
        what = f"video {short(name)}: feature file"
        where = f"{what} {source}"
        check_file(source, what)
        suffix = Path(source).suffix
        if suffix not in READERS:
            raise BadInput(f"{where} is of no kind that is read: {', '.join(READERS)} "
                           "(--extension)")
        with reading(what, source, NO_ARRAY), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong is said below
            feats = READERS[suffix](source, key, what)
    if feats.ndim != 2 or 0 in feats.shape or feats.dtype.kind not in "fiu":
        raise BadInput(f"{where} must hold real numbers of shape (T, D), not "
                       f"{short(feats.dtype)} {short(feats.shape)}")
    return feats


# ---- What is known of a file --------------------------------------------------------------------

@np.errstate(over="ignore", invalid="ignore")  # what is wrong is said
def sum_features(source, key, name):
    """(steps, mean (D,), spread (D,)) of a video's features: the sum of squares about the mean.

    Raises BadInput for NaN, infinity, and what float32 cannot hold."""
    feats = read_features(source, key, name)
    steps = len(feats)
    origin = np.array(feats[0], dtype=np.float64)  # far from 0 squares would swallow the variance
    total = square = 0
    for first in range(0, steps, 4096):  # a long video is never held as a whole
        part = np.array(feats[first:first + 4096], dtype=np.float64)
        wrong = np.argwhere(~np.isfinite(part.astype(np.float32)))
        if len(wrong):
            step, channel = wrong[0]
            raise BadInput(f"video {short(name)}: feature file {source} holds "
                           f"{part[step, channel]} at step {first + step}, channel {channel}")
        part -= origin
        total += part.sum(0)
        square += (part ** 2).sum(0)
    return steps, origin + total / steps, np.maximum(square - total ** 2 / steps, 0)


def memory_of(source, key):
    """The file, in the user's cache, that remembers sum_features() of a feature file."""
    name = hashlib.sha256(os.fsencode(f"{os.path.abspath(source)}\n{key}")).hexdigest()
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache, "apl", f"{name[:32]}.npz")


def sum_once(source, key, name):
    """sum_features(), of a file remembered until its size, or the times of its content and of its
    entry, are others.

    A memory that cannot be read or written is none: it would only have saved time."""
    if isinstance(source, np.ndarray) or not os.path.isfile(source):
        return sum_features(source, key, name)
    now = os.stat(source)
    state = np.array([now.st_size, now.st_mtime_ns, now.st_ctime_ns], dtype=np.float64)
    memory = memory_of(source, key)
    if os.path.lexists(memory) and not stat.S_ISREG(os.lstat(memory).st_mode):  # a link: not ours
        return sum_features(source, key, name)
    with suppress(Exception), np.load(memory, allow_pickle=False) as known:  # an archive: checksums
        row = known["row"]
        if np.array_equal(row[:3], state) and np.isfinite(row).all():
            return int(row[3]), *np.split(row[4:], 2)
    sums = sum_features(source, key, name)
    if is_first():
        with suppress(OSError):
            memory.parent.mkdir(parents=True, exist_ok=True)
            np.savez(memory, row=np.hstack([state, *sums]))
    return sums


def sum_all(sources, key):
    """({id: sum_once()}, {id: BadInput}) of all sources; a video that is bad is in the second."""
    sums = {}
    faults = {}
    for name, source in sources.items():
        try:
            sums[name] = sum_once(source, key, name)
        except BadInput as fault:
            faults[name] = fault
    return sums, faults


def statistics(sums):
    """Mean and std (D,) over all videos of their (steps, mean, spread); a std of 0 becomes 1."""
    steps, means, spreads = (np.array(column) for column in zip(*sums))
    share = (steps / steps.sum())[:, None]
    mean = (share * means).sum(0)
    variance = spreads.sum(0) / steps.sum() + (share * (means - mean) ** 2).sum(0)
    std = np.sqrt(variance)
    return mean, np.where(std > 1e-6, std, 1)


def fingerprint_of(steps, mean, spread):
    """[T, mean, spread] of a video's features: what changes when they do, or their order.

    Each channel has a weight of its own, so that channels that changed places are seen."""
    weight = np.linspace(1, 2, len(mean))
    return [steps, float(weight @ mean), float(weight @ spread)]
