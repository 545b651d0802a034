"""Tables: annotations as people and labelling tools write them, read for --dataset and --gt.

    my.csv, my.tsv   a row an instance, columns by name: video, start, end, label, and, where they
                     are, subset, duration, fps; or as BORIS and ELAN export tables
    labels/          a text file <id>.txt a video: a label track, as Audacity writes it; with --fps
                     a label a frame, as action segmentation has them; or a table of ELAN's
    my.json          ActivityNet's form, which forms.py reads

Times are in seconds or h:mm:ss. Bad input raises BadInput: the file, the line and the value.
"""
import csv
import io
import re
from itertools import groupby, takewhile
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

from plumbing import forms
from plumbing.files import (
    VIDEOS,
    files_in,
    files_left,
    lies_in,
    read_text,
    real_paths,
    separator_of,
)
from plumbing.words import BadInput, refuse, several, short, shown

# What columns are called, in any letter case, by people, BORIS and ELAN: of several the first in
# this order is read.
NAMES = {
    "video": "video, media file name, media file, file name, file path, observation id",
    "start": "start, start (s), begin time - ss.msec, begin time - hh:mm:ss.ms, begin time - msec",
    "end": "end, stop (s), end time - ss.msec, end time - hh:mm:ss.ms, end time - msec",
    "label": "label, behavior, annotation",
    "subset": "subset",
    "duration": "total length, media duration (s), duration",
    "fps": "fps, fps (frame/s)",
    "observation": "observation id",  # these two of BORIS alone
    "offset": "time offset (s)",
}
NUMBERS = ("start", "end", "duration", "fps", "offset")
OF_BORIS = ("media file name", "media file")
UNKNOWN = ("", "NA", "LIVE")  # what BORIS writes of what it does not know, or that had no file
OF_ELAN = re.compile("(begin time|end time|duration) - .*|tier|participant|file (name|path)|")
CLOCK = re.compile(r"(?:([0-9]+):)?([0-9]+):([0-5]?[0-9](?:\.[0-9]*)?)")  # h:mm:ss or m:ss
# How a label track without tabs begins; 3,7 alone may be two labels.
TIMES = re.compile(r"[0-9.:]+[ ,;]+[0-9.:]+[ ,;]|(?=.*[.:])[0-9.:]+[ ,;]+[0-9.:]+$")


class Table(NamedTuple):
    """A table whose columns are understood."""
    names: dict  # {key of NAMES: what its column is called, in lower case, where it has a name}
    rows: list  # [(line, {key: cell})]
    unused: list = ()  # the names of the other columns


# ---- Cells --------------------------------------------------------------------------------------

def is_before(line):
    """Whether a line is one that may stand before a header: empty, or as ELAN writes some."""
    return not line.strip() or line.startswith(("#", '"#'))


def read_cells(path):
    """([(line, cells)] of a file of cells, the header first, what stands between cells).

    Empty lines are left out. Raises BadInput."""
    lines = io.StringIO(read_text(path, "annotation file")).readlines()
    head = len([*takewhile(is_before, lines)])
    first = "".join(lines[head:head + 1])
    between = separator_of(first)
    of_elan = "begin time - " in first.lower() and '"' not in first
    quoting = csv.QUOTE_NONE if of_elan else csv.QUOTE_MINIMAL
    reader = csv.reader(lines[head:], delimiter=between, strict=True, quoting=quoting)
    try:
        rows = [(head + reader.line_num, [*map(str.strip, cells)]) for cells in reader]
    except csv.Error as error:
        raise BadInput(
            f"annotation file {path}, line {head + reader.line_num}: {error}") from None
    return [row for row in rows if any(row[1])], between


def is_of_elan(names):
    """Whether the columns of a table are those of ELAN's export."""
    return names.get("start", "").startswith("begin time")


def names_of(header):
    """{key of NAMES: what its column is called, in lower case} of the cells of a header.

    ELAN has a column a tier, under the tier's own name: where there is one, it has the labels."""
    header = [cell.lower() for cell in header]
    names = {}
    for key, known in NAMES.items():
        for name in known.split(", "):
            if name in header:
                names.setdefault(key, name)
    if names.get("video") not in OF_BORIS:
        names.pop("observation", None)
        names.pop("offset", None)
    tiers = [name for name in header if not OF_ELAN.fullmatch(name)]
    if is_of_elan(names) and len(tiers) == 1:
        names["label"] = tiers[0]
    return names


def check_names(names, header, path):
    """Raise BadInput where a column is missing that a table needs.

    One of ELAN's may have no column of videos: it is of the one that its file is named after."""
    needed = {"video", "start", "end", "label"}
    why = ""
    if is_of_elan(names):
        needed.remove("video")
        why = "; of ELAN's tiers export one, with column headers"
    missing = sorted(needed - names.keys())
    if missing:
        raise BadInput(f"annotation file {path} has no column {', '.join(missing)}: its header is "
                       f"{several(header, 8) or 'empty'}{why}")


def with_points(row):
    """A row {key: cell} where no comma stands between cells: one in a number is its point."""
    return {key: cell.replace(",", ".") if key in NUMBERS else cell
            for key, cell in row.items()}


def open_table(path):
    """The Table of a file with a header; raises BadInput."""
    rows, between = read_cells(path)
    header = rows[0][1] if rows else []
    names = names_of(header)
    check_names(names, header, path)
    lower = [cell.lower() for cell in header]
    number = {key: lower.index(name) for key, name in names.items()}
    unused = [name for i, name in enumerate(header) if name and i not in number.values()]
    table = Table(names, [], unused)
    for line, cells in rows[1:]:
        if any(cells[len(header):]):
            raise BadInput(f"annotation file {path}, line {line} has {len(cells)} cells, its "
                           f"header {len(header)}: {shown(between.join(cells))}")
        cells += [""] * len(header)
        row = {key: forms.from_cell(cells[i]) for key, i in number.items()}
        table.rows.append((line, row if between == "," else with_points(row)))
    return table


# ---- What they say ------------------------------------------------------------------------------

def seconds_of(text, name, where):
    """The seconds of a time in a column of a name; raises BadInput."""
    clock = CLOCK.fullmatch(text)
    if clock:
        hours, minutes, seconds = clock.groups(default="0")
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    time = forms.number(text, where, f"{name}, in seconds or h:mm:ss,")
    return time / 1000 if name.endswith("- msec") else time


def id_of(recording):
    """The id of the video that a tool names by a path: its name, without folder and ending."""
    path = Path(PureWindowsPath(recording).name)  # of any system
    return path.stem if path.suffix.lower() in (*VIDEOS, ".eaf") else path.name


def measure_of(row, key, names, where):
    """The duration or the fps that a row says, None without; raises BadInput.

    BORIS writes that of each player, and 0 frames a second of a sound."""
    value = row.get(key, "").partition("|")[0]
    of_sound = key == "fps" and "observation" in row and not value.strip("0.")
    if value in UNKNOWN or of_sound:
        return None
    if ";" in value:
        raise BadInput(f"{where} {shown(names[key])} is {shown(value)}: of several files played "
                       "one after the other, whose times count on")
    return forms.positive_number({names[key]: value}, [names[key]], where)


def fill(entry, row, names, where):
    """Add what a row says to its video's entry, as forms.read_annotation() takes it.

    A row that has neither start nor end nor label says that the video is there. Raises BadInput.
    """
    for key in ("subset", "duration", "fps"):
        value = row.get(key) if key == "subset" else measure_of(row, key, names, where)
        if value in (None, *UNKNOWN):
            continue
        if entry.setdefault(key, value) != value:
            raise BadInput(f"{where} {key} is {shown(value)}, in a row before {shown(entry[key])}:"
                           " it is the whole video's")
    if not row["start"] + row["end"] + row["label"]:
        return
    start, end = (seconds_of(row[key], names.get(key, key), where) for key in ("start", "end"))
    if row.get("offset", "") not in UNKNOWN:  # BORIS has added it to its times
        offset = forms.number(row["offset"], where, names["offset"])
        start, end = start - offset, end - offset
    if end < start:
        raise BadInput(f"{where} the segment [{row['start']}, {row['end']}] ends before it starts")
    label = forms.read_label(row["label"], where)
    entry["annotations"].append({"segment": [start, end], "label": label})


def entries_of(table, path):
    """{id: entry} of the videos of a Table; raises BadInput, which counts the faults."""
    entries = {}
    faults = {}
    cells = {}  # {id: what names its recording in the first of its rows}
    played = {}  # {observation of BORIS: the id of the first of its rows}
    for line, row in table.rows:
        cell = row.get("video", path.stem)
        observation = row.get("observation")
        if observation and cell in UNKNOWN:  # coded live, without a recording
            cell = observation
        name = cell if table.names.get("video", "video") == "video" else id_of(cell)
        where = f"annotation file {path}, line {line}, video {short(name)}:"
        try:
            if not name:
                raise BadInput(f"{where} it names no video")
            if observation and cell == "Not found":
                raise BadInput(f"{where} BORIS has found no file that was played at this time")
            first = cells.setdefault(name, cell)
            if first != cell:
                raise BadInput(f"{where} {shown(cell)} and {shown(first)} have one name: "
                               "write one path if they are one recording, else rename one")
            if observation and played.setdefault(observation, name) != name:
                raise BadInput(f"{where} its observation {shown(observation)} played another file "
                               "before, and its times count on from that one's")
            fill(entries.setdefault(name, {"annotations": []}), row, table.names, where)
        except BadInput as fault:
            faults.setdefault(name, fault)
    refuse(faults)
    return entries


# ---- One text file a video ----------------------------------------------------------------------

def track_of(lines, path):
    """The Table of a label track: start, end and label in each line [(number, text)] of a file.

    Lines that begin with a backslash, in which Audacity has frequencies, are left out. Raises
    BadInput."""
    rows = []
    for number, line in lines:
        if line.startswith("\\"):
            continue
        cells = [cell.strip() for cell in line.split("\t")]
        if any(cells[3:]):
            raise BadInput(f"annotation file {path}, line {number} has {len(cells)} cells, a label "
                           f"track start, end and label: {shown(line)} (of ELAN, export with "
                           "column headers)")
        row = dict(zip(("start", "end", "label"), [*cells, "", ""]))
        rows.append((number, with_points(row)))
    return Table({}, rows)


def frames_entry(lines, path, fps):
    """The entry of a video with a label a frame: equal neighbours are one instance."""
    if TIMES.match(lines[0][1]):
        raise BadInput(f"annotation file {path}: its first line {shown(lines[0][1])} begins with "
                       "two times, but there are no tabs between, as a label track has them")
    if not fps:
        raise BadInput(f"annotation file {path} has a label a frame, as its first line "
                       f"{shown(lines[0][1])} has no tab: give --fps")
    numbers = [re.match(r"(\d+)[ ,]+\S", line) for _, line in lines]
    if all(numbers) and all(int(found[1]) - i in (0, 1) for i, found in enumerate(numbers)):
        raise BadInput(f"annotation file {path}: its lines begin with the numbers of their frames, "
                       f"like {shown(lines[0][1])}; a label a frame is the label alone")
    empty = next((i for i, (number, _) in enumerate(lines, 1) if number != i), 0)
    if empty:
        raise BadInput(f"annotation file {path}, line {empty} is empty: a frame where nothing "
                       "happens needs a label too, as background (--ignore-labels background); a "
                       "file without labels does not belong in the folder")
    annotations = []
    first = 0
    for label, group in groupby(line for _, line in lines):
        last = first + len(list(group))
        annotations.append({"segment": [first / fps, last / fps], "label": label})
        first = last
    return {"duration": first / fps, "fps": fps, "annotations": annotations}


def read_table(path, fps):
    """{id: entry} of a table; fps is not needed. Raises BadInput."""
    return entries_of(open_table(path), path)


def lines_of(path):
    """The lines of a text file without blanks at their ends; raises BadInput."""
    text = read_text(path, "annotation file")
    return [line.strip(" ") for line in text.splitlines()]


def first_of(lines):
    """The first line that is no comment."""
    return next((line for line in lines if not is_before(line)), "")


def has_header(lines):
    """Whether the lines of a text file are a table's, which has columns for start and end."""
    first = first_of(lines)
    cells = [cell.strip('" ') for cell in first.split(separator_of(first))]
    return {"start", "end"} <= names_of(cells).keys()


def read_text_file(path, fps):
    """{id: entry} of a text file: a table, or of the video that it is named after a label track
    or a label a frame; raises BadInput."""
    lines = lines_of(path)
    if has_header(lines):
        return read_table(path, fps)
    written = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if written and "\t" not in first_of(lines):
        return {path.stem: frames_entry(written, path, fps)}
    return {path.stem: {"annotations": []}} | entries_of(track_of(written, path), path)


def read_folder(folder, fps):
    """{id: entry} of the text files of a folder and its sub-folders; raises BadInput."""
    found = {}
    for place, path in files_in(folder):
        if path.suffix.lower() != ".txt":
            continue
        entries = read_text_file(path, fps)
        if entries.keys() == {path.stem}:
            entries = {place.with_suffix("").as_posix(): entries[path.stem]}
        twice = found.keys() & entries.keys()
        if twice:
            raise BadInput(f"annotation file {path}: the video {short(min(twice))} is in another "
                           "file of the folder too")
        found |= entries
    if not found:
        raise BadInput(f"annotation files: the folder {folder} holds no label track <id>.txt")
    return found


# ---- All forms ----------------------------------------------------------------------------------

READERS = {".csv": read_table, ".tsv": read_table, ".txt": read_text_file}  # of what is no JSON


def reader_of(path):
    """What reads the entries of a path in another form than JSON; None: nothing."""
    return read_folder if path.is_dir() else READERS.get(path.suffix.lower())


def is_known(path):
    """Whether a path names annotations, by its ending or as a folder."""
    path = Path(path)
    return path.suffix.lower() == ".json" or reader_of(path) is not None


def unused(path, used=()):
    """Yield what is not read of annotations, in words: columns of a table, other files of a folder.

    used: the folder's files that something else reads"""
    path = Path(path)
    reader = reader_of(path)
    tracks = [file for _, file in files_in(path) if file.suffix.lower() == ".txt"]
    read = real_paths(used)
    left = files_left(path, {*tracks, *used})
    others = [place for place in left if not lies_in(Path(path, place), read)]
    if others:
        yield f"{len(others)} files that are no *.txt of {path}: {several(others)}"
    is_table = reader is read_table or reader is read_text_file and has_header(lines_of(path))
    names = open_table(path).unused if is_table else []
    if names:
        yield f"the column(s) {several(names)} of {path}"


def read_any(path, ignored="", fps=0):
    """{id: Annotation} of annotations in any form, as forms.read_annotations() gives them.

    ignored  labels that are left out, with commas, or None
    fps      of all videos; 0 or None: as the file says
    Where no video has a subset, all are of "training". Raises BadInput."""
    path = Path(path)
    read = reader_of(path)
    if read is None:
        return forms.read_annotations(path, ignored or "", fps)
    entries = read(path, fps)
    if not any("subset" in entry for entry in entries.values()):
        for entry in entries.values():
            entry["subset"] = "training"
    return forms.annotations_of(entries, ignored or "", fps, f"annotation file {path}")
