"""Features of raw sensor recordings: what each channel does in a window that slides over the rows.

    python -m extras.windows raw --out features --window 50 --stride 25
    python -m extras.windows raw/walk.npy --rate 50      a recording without a clock

A recording is a .csv, .tsv or .npy file, a row a moment, a column a channel. Its features are
<id>.npy, a row a window: the means of all channels, then their standard deviations, minima,
maxima, and mean absolute differences from row to row. Leading columns that count rows or time are
no channels: those named so, as "time (ms)", or that rise evenly. Rows after the last whole window
are left out. windows.json beside them says how they were made. All is read and checked before
anything is written.
"""
import re
import sys
from argparse import SUPPRESS
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from plumbing.files import (
    OF_VIDEOS,
    OF_WINDOWS,
    Reading,
    bad_steps,
    check_columns,
    columns_of,
    files_in,
    first_bad,
    lies_in,
    read_features,
    read_json,
    real_paths,
    write_atomically,
    write_json,
)
from plumbing.runs import guard
from plumbing.settings import (
    CheckedSettings,
    Count,
    Flag,
    NotNegative,
    Parser,
    Text,
    add_setting,
    comment_of,
    number,
)
from plumbing.sources import files_of_videos
from plumbing.words import BadInput, say, several, short, shown, warn

# Units of time: the word for each, and how many are a second.
UNITS = {
    "s": ("seconds", 1), "ms": ("milliseconds", 1e3), "us": ("microseconds", 1e6),
    "ns": ("nanoseconds", 1e9)}
UNIT_OF = {"sec": "s", "seconds": "s", "msec": "ms", "milliseconds": "ms", "microseconds": "us",
           "nanoseconds": "ns"} | {unit: unit for unit in UNITS}
# The words of which the name of a column that counts rows or time consists, beside its unit.
CLOCK = {"time", "times", "timestamp", "timestamps", "stamp", "t", "ts", "date", "index", "elapsed",
         "seconds", "unix", "epoch"}
ANSWERS = {"label", "class", "activity", "annotation", "target", "gesture", "subject", "id"}
SAME_RATE = 0.001  # rates that differ by a smaller share are one
AtLeast2 = number(int, 2, 10 ** 6, "from 2 to a million")


@dataclass(frozen=True)
class Settings(CheckedSettings):
    """What the command is asked for."""
    raw: Text("a recording, or a folder of them")
    out: Text("folder of the features, with the sub-folders of the recordings") = "features"
    window: AtLeast2("rows of a window") = 50
    stride: Count("rows from the start of a window to that of the next") = 25
    rate: NotNegative("rows a second; 0: what the recordings' clocks say") = 0.0
    overwrite: Flag("replace feature files that exist") = False


@dataclass
class Recording:
    """A recording without its clock."""
    file: Path
    rows: np.ndarray  # (N, C)
    channels: list  # C names, each "" where no header has them
    left_out: list  # the names of the columns before
    rate: float | None  # rows a second, None where nothing says it
    clock: str  # what says it, in words


# ---- The clock of a recording -------------------------------------------------------------------

def is_even(steps):
    """Whether all the steps of a column rise, nearly all of them by about the same."""
    middle = np.median(steps)
    usual = abs(steps - middle) <= middle / 2
    return (steps > 0).all() and usual.mean() >= 0.9


def words_of(name):
    """The words of a column's name, in lower case; timems is two."""
    words = re.split(r"[\W_]+|(?<=time|tamp)(?=[mun]s$)", name.lower())
    return set(filter(None, words))


def read_counter(times, name, file):
    """What a column counts: (the words of its name, its unit or None).

    None for a channel, that is, a column of another name that does not rise evenly. Raises
    BadInput for one that is named as a clock and does not rise."""
    words = words_of(name)
    steps = np.diff(times)
    if not words & CLOCK or words - CLOCK - UNIT_OF.keys():
        return (set(), None) if is_even(steps) else None
    falls = ~(steps >= 0)  # so is NaN
    if falls.any() or times[-1] == times[0]:
        raise BadInput(f"recording {file}: its column {shown(name)} does not rise at row "
                       f"{falls.argmax() + 2}: rows must be in the order of time")
    return words, next((UNIT_OF[word] for word in words if word in UNIT_OF), None)


def likely_unit(times, rows_a_tick):
    """The unit of a clock that does not name it: that in which it counts since 1970, with over a
    row an hour, else the first in which at least one row comes a second."""
    for unit, (_, many) in UNITS.items():
        if 1e9 <= times[0] / many < 4e9 and rows_a_tick * many > 1 / 3600:
            return unit
    return next((unit for unit, (_, many) in UNITS.items()
                 if rows_a_tick * many >= 1 - SAME_RATE), "ns")


def read_clock(times, words, unit, file, stride):
    """(rows a second, the clock in words) of a column that rises; (None, "") if it counts rows.

    Rows that lie more than `stride` rows from where the rate puts them are a warning.
    words, unit  as read_counter() gives them"""
    if "index" in words or not words and (np.diff(times) == 1).all():
        return None, ""
    passed = times - times[0]
    rows = np.arange(len(times))
    rows_a_tick = rows[-1] / passed[-1]
    assumed = "" if unit else ", assumed by its size"
    word, many = UNITS[unit or likely_unit(times, rows_a_tick)]
    rate = rows_a_tick * many
    if assumed and rate < 1 - SAME_RATE:
        warn([f"recording {file}: its clock gives {rate:.3g} rows a second, if it counts {word}; "
              "else give --rate"])
    beside = abs(passed * rows_a_tick - rows).max()
    if beside > stride:
        warn([f"recording {file}: its clock has gaps or changes its pace: rows lie up to "
              f"{beside / rate:.1f} s from where {rate:.6g} rows a second put them"])
    return rate, f"by its clock in {word}{assumed}"


# ---- A recording and its features ---------------------------------------------------------------

def check_finite(recording):
    """Raise BadInput where a row holds NaN, infinity or what float32 cannot hold."""
    bad = bad_steps(recording.rows)
    if bad.any():
        row, channel, value = first_bad(recording.rows, bad)
        column = len(recording.left_out) + channel + 1
        raise BadInput(f"recording {recording.file} holds {value} in row "
                       f"{row + 1}, column {column}; {bad.sum()} of its {len(bad)} rows hold NaN, "
                       "infinity or what float32 cannot: fill or cut them first")


def leading_clocks(rows, names, file, s):
    """(how many leading columns count rows or time, rows a second or None, which clock says it).

    names: of all columns, "" where they have none. Raises BadInput."""
    rate, clock = None, ""
    for column, name in enumerate(names[:-1]):  # the last is a channel, whatever it does
        times = np.array(rows[:, column], dtype=np.float64)
        counter = read_counter(times, name, file)
        if counter is None:
            return column, rate, clock
        found = read_clock(times, *counter, file, s.stride)
        rate, clock = found if found[0] else (rate, clock)
    return len(names) - 1, rate, clock


def read_recording(file, name, s):
    """The Recording in a file; raises BadInput for what gives no features."""
    rows = read_features(file, Reading(), name)
    length, width = rows.shape
    if length < s.window:
        raise BadInput(f"recording {file} is shorter than a window: it has {length} rows, and "
                       f"--window is {s.window}")
    names = columns_of(file) or [""] * width
    first, rate, clock = leading_clocks(rows, names, file, s)
    if s.rate:
        rate, clock = s.rate, "by --rate"
    left_out = [name or f"column {i}" for i, name in enumerate(names[:first], 1)]
    recording = Recording(file, rows[:, first:], names[first:], left_out, rate, clock)
    check_finite(recording)
    return recording


def odd_channels(recording):
    """Yield (the name of a channel that may be none, why)."""
    steps = np.diff(np.array(recording.rows[:, 0], dtype=np.float64))
    if (steps >= 0).all() and steps.any():
        name = recording.channels[0] or f"column {len(recording.left_out) + 1}"
        yield name, "never falls, as a clock"
    for name in recording.channels:
        words = words_of(name)
        if words & ANSWERS:
            yield name, "may be the answer"
        elif words & CLOCK and not words - CLOCK - UNIT_OF.keys():
            yield name, "may be a clock"


def statistics(rows):
    """The features of a window: rows (W, C) -> (5 C,)."""
    rows = np.array(rows, dtype=np.float64)
    change = abs(np.diff(rows, axis=0)).mean(0)
    return np.concatenate([rows.mean(0), rows.std(0), rows.min(0), rows.max(0), change])


def features_of(rows, window, stride):
    """The features of a recording's rows (N, C) -> (T, 5 C), float32."""
    starts = range(0, len(rows) - window + 1, stride)
    windows = [statistics(rows[start:start + window]) for start in starts]
    return np.array(windows, dtype=np.float32)


def without(recording):
    """Which columns of a recording are left out, in words."""
    return f", without {several(recording.left_out)}" if recording.left_out else ""


def check_alike(first, other):
    """Raise BadInput where two recordings have not the same channels."""
    a, b = first.channels, other.channels
    if len(a) != len(b):
        raise BadInput(f"recording {other.file} has {len(b)} channels{without(other)}, but "
                       f"{first.file} has {len(a)}{without(first)}")
    if any(a) and any(b):
        check_columns(b, a, f"recording {other.file} has", f"{first.file} has")


# ---- All recordings -----------------------------------------------------------------------------

def feature_targets(names, out, source, overwrite):
    """{name: the file that its features go to}; raises BadInput for one that must stay."""
    targets = {name: Path(out, f"{name}.npy") for name in names}
    recordings = real_paths([source])
    for target in targets.values():
        if lies_in(target, recordings):
            raise BadInput(f"--out {out}: {target} would lie among the recordings of {source}")
        if target.exists() and not overwrite:
            raise BadInput(f"{target} exists (--overwrite replaces it)")
    return targets


def keep_settings(path, made, targets):
    """Write how the features of a folder are made; raises BadInput where others there are made
    otherwise, or nothing says how.

    made     {name: value}; "names" of columns, where they are known
    targets  the files that will be written"""
    folders = {path.parent, *(file.parent for file in targets)}
    kept = [file for _, file in files_in(path.parent, "*.npy")
            if file not in targets and (path.exists() or file.parent in folders)]
    before = read_json(path, "file of settings") if path.exists() else {}
    if path.exists() and (not isinstance(before, dict) or made.keys() - before.keys()):
        raise BadInput(f"{path} does not say how features were made: give another --out")
    other = path.with_name(OF_VIDEOS if path.name == OF_WINDOWS else OF_WINDOWS)
    if kept and not path.exists() or other.exists():
        raise BadInput(f"{kept[0] if kept else other} exists, and no {path} says how features "
                       "there were made: give another --out")
    for name in made if kept else ():
        if name != "names" and before[name] != made[name]:
            raise BadInput(f"{path} says that the features there are of {name} "
                           f"{short(before[name])}, not {short(made[name])}: give another --out")
    if kept and "names" in made:
        check_columns(made["names"], before["names"], "these features have",
                      f"those that {path} is about have")
        made = made | {"names": made["names"] or before["names"]}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, made)


def write_features(path, features):
    """Write a .npy file atomically, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: np.save(file, features))


def describe(name, recording, windows):
    """A recording and its features in a line."""
    rate = f"; {recording.rate:.6g} rows a second {recording.clock}" if recording.rate else ""
    named = f" ({several(recording.channels, 8)})" if any(recording.channels) else ""
    return (f"{name}: {windows} windows of {len(recording.channels)} channels{named}"
            f"{without(recording)}{rate}")


def advice(rates, s):
    """What to train with, in words; rates: rows a second of each recording, or None."""
    grid = f"--stride {s.stride} --frames {s.window}"
    if None in rates:
        return (f"{grid} --fps RATE, the rows a second, which not every recording says "
                "(--rate HZ)")
    if max(rates) > (1 + SAME_RATE) * min(rates):
        return (f'{grid} and each recording\'s own rate as "fps" in its annotation entry: they '
                f"differ, from {min(rates):.6g} to {max(rates):.6g}")
    return f"{grid} --fps {np.median(rates):.6g}"


def make_features(s):
    """Write the features of all recordings, and say what to train with; raises BadInput."""
    files = files_of_videos(s.raw)
    targets = feature_targets(files, s.out, s.raw, s.overwrite)
    features = {}
    rates = []
    odd = {}
    first = None  # a recording, the first that names its channels where one does
    for name, file in files.items():
        recording = read_recording(file, name, s)
        first = first or recording
        check_alike(first, recording)
        first = first if any(first.channels) else recording
        odd |= odd_channels(recording)
        features[name] = features_of(recording.rows, s.window, s.stride)
        rates.append(recording.rate)
        say(describe(name, recording, len(features[name])))
    warn(f"the column {short(name)} {why}: it is taken as a channel; if it is none, cut it out"
         for name, why in odd.items())
    made = {"window": s.window, "stride": s.stride, "channels": len(first.channels),
            "names": first.channels if any(first.channels) else []}
    keep_settings(Path(s.out, OF_WINDOWS), made, set(targets.values()))
    for name, target in targets.items():
        write_features(target, features[name])
    say(f"the features of {len(files)} recordings are in {s.out}; train with {advice(rates, s)}")


def read_command(argv, kind):
    """The settings, of a class, of a command line whose first word is the first of them; raises
    BadInput."""
    parser = Parser(kind.__module__, argument_default=SUPPRESS)
    source, *others = fields(kind)
    parser.add_argument(source.name, help=comment_of(source))
    for f in others:
        add_setting(parser, f, {}, False)
    return kind(**vars(parser.parse_args(argv)))


def main(argv=None):
    """The command line; returns the exit code, 2 for bad input."""
    with guard() as stop:
        make_features(read_command(argv, Settings))
    return stop.code


if __name__ == "__main__":
    sys.exit(main())
