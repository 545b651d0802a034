"""The commands on a user's data set, and changes: functions of its folder, for tables."""
import json
import shutil
from functools import partial

import numpy as np

import data
from tests.helpers import edit, evaluated, own_argv, read_result, refused, settings

NAMES = [f"v{i}" for i in range(14)]
TRAINED, TESTED = NAMES[:10], NAMES[10:]
LOWEST = ("--theta-l", 0.0)  # so that a detector of few steps has pseudo labels
SUPERVISED = ("--stage", "supervised", "--acp", "none", "--supervised-epochs", 1)


def assert_plain(text):
    """A sentence for a person: one line, short, printable, without a bad advice."""
    assert len(text) <= 401, text
    assert text[:-1].isprintable(), text
    for advice in ("allow_pickle", "weights_only", "set_int_max", "Traceback"):
        assert advice not in text, text


def refusal(argv, capsys, *words):
    """The sentence of a refused command, which is plain and holds the words."""
    capsys.readouterr()
    text = refused(argv, capsys, *words)
    assert_plain(text)
    return text


def check(own, *more):
    return own_argv(own, "--check", *more)


def opened(own, *more):
    return data.training_data(settings(*own_argv(own, *more)))


def everything(own, *more):
    """The Dataset of the user's files, all training videos labelled."""
    return opened(own, "--ratio", 1.0, "--stage", "supervised", *more)


def instances_of(dataset):
    return {v.id: (v.segments.tolist(), v.labels.tolist()) for v in dataset.labelled}


def ids(videos):
    return {video.id for video in videos}


def nothing(folder):
    """No change."""


def all_of(*changes):
    def change(folder):
        for one in changes:
            one(folder)
    return change


def text(name, content):
    def change(folder):
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return change


def edits(function):
    """A change of the annotation file: function(database)."""
    return partial(edit, change=function)


def entries(names, **fields):
    """Other fields of these videos' entries."""
    return edits(lambda database: [database[name].update(fields) for name in names])


def lacking(key, *names):
    return edits(lambda database: [database[name].pop(key) for name in names])


def without(*names):
    return edits(lambda database: [database.pop(name) for name in names])


def actions(names, which=None, **fields):
    """Other fields of these videos' instances, of all or of the one with a number."""
    some = slice(None) if which is None else slice(which, which + 1)
    return edits(lambda database: [
        a.update(fields) for name in names for a in database[name]["annotations"][some]])


def every_time(function):
    """Other start and end times of all instances: function(seconds)."""
    return edits(lambda database: [
        a.update(segment=[function(t) for t in a["segment"]])
        for entry in database.values() for a in entry["annotations"]])


def features(names, function):
    """Other features of these videos: function(array)."""
    def change(folder):
        for name in names:
            path = folder / f"features/{name}.npy"
            np.save(path, function(np.load(path)))
    return change


def no_features(*names):
    def change(folder):
        for name in names:
            (folder / f"features/{name}.npy").unlink()
    return change


def renamed(name, new, file=None):
    """Another id of a video, and another name of its feature file."""
    def change(folder):
        edit(folder, lambda database: database.update({new: database.pop(name)}))
        path = folder / f"features/{new if file is None else file}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        (folder / f"features/{name}.npy").rename(path)
    return change


def loose_features(folder):
    """Feature files without an entry, in this folder and in others."""
    (folder / "more/deep").mkdir(parents=True)
    for path in ("more/deep/w1", "more/deep/w2", "features/loose"):
        shutil.copy(folder / "features/v1.npy", folder / f"{path}.npy")


def perfect(own, names):
    database = read_result(own / "own.json")["database"]
    return {name: [{"label": a["label"], "segment": a["segment"], "score": 0.9}
                   for a in database[name]["annotations"]] for name in names}


def predict(own, results):
    """The command line that evaluates these predictions, which are written."""
    text("pred.json", json.dumps({"results": results}))(own)
    return ["evaluate", "--pred", own / "pred.json", "--gt", own / "own.json"]


def score_of(own, argv):
    """The average mAP that evaluate.py gives, in percent."""
    assert evaluated(*argv[1:], "--json", own / "out.json") == 0
    return 100 * read_result(own / "out.json")["average_mAP"]
