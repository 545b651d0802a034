"""Tests of right input: files as people have them are read, and what is odd is told."""
import io
import json
import sys
import zipfile

import numpy as np
import pytest
import torch

import data
import evaluate
import train
from plumbing import files, forms
from plumbing.settings import thresholds_of
from plumbing.words import BadInput, shown
from tests import users
from tests.helpers import evaluated, own_argv, read_result, record, settings, small_detector
from tests.test_faults import ODD_TEXTS, OFF, TOO_FAR, action, all_renamed, convert, name_of
from tests.users import NAMES, TESTED, TRAINED, actions, all_of, check, entries, lacking, text

pytestmark = pytest.mark.usefixtures("in_time")
MARK = b"\xef\xbb\xbf"  # a byte order mark


# ---- Annotations --------------------------------------------------------------------------------

def rewritten(function):
    """Another content of the annotation file: function(content)."""
    return lambda folder: text(
        "own.json", json.dumps(function(read_result(folder / "own.json"))))(folder)


def marked(name):
    """A file with a byte order mark."""
    return lambda folder: text(name, MARK + (folder / name).read_bytes())(folder)


def subsets(training, test):
    """Other names of the subsets."""
    return all_of(entries(TRAINED, subset=training), entries(TESTED, subset=test))


def hidden_files(folder):
    """What systems leave beside files."""
    (folder / "features/__MACOSX").mkdir()
    for name in ("._v1.npy", ".DS_Store", "__MACOSX/v99.npy", ".v98.npy"):
        (folder / "features" / name).write_bytes(b"Mac OS X")


TEXTS = {
    "plain": str, "blanks": "  {}\n".format, "exponent": "{:.12e}".format, "signed": "+{}".format}
FORMS = {
    "bare, as BSN has it": rewritten(lambda content: content["database"]),
    "marked": marked("own.json"),
    **{name: all_of(users.every_time(write), entries(NAMES, duration=write(32.5), fps=write(50)))
       for name, write in TEXTS.items()},
    "duration_second": all_of(entries(NAMES, duration_second=32.5), lacking("duration", *NAMES)),
    "more fields": all_of(
        entries(NAMES, url="https://x", resolution="320x240", taxonomy=[], frames=None),
        actions(NAMES, **{"segment(frames)": [1, 2], "verb": None, "noun_class": 7}),
        rewritten(lambda content: content | {"version": "1.3", "taxonomy": [{"nodeId": 1}]})),
    "null fields": all_of(
        entries(NAMES, duration_second=None, frame_rate=None, url=None),
        actions(NAMES, label_id=None), rewritten(lambda content: content | {"version": None})),
    "null duration and fps": entries(NAMES, duration=None, fps=None),
    "train and val": subsets("train", "val"), "TRAIN and valid": subsets("TRAIN", "valid"),
    "train and test": subsets("train", "test"), "Training, testing": subsets("Training", "testing"),
    "hidden files": hidden_files,
    "no fps": lacking("fps", *NAMES),
    # Label ids do no harm, whatever they are
    **{f"label_id {value!a:.20}": actions(NAMES, label_id=value) for value in (
        "²", "٣", "1" * 5000, -1, 1.5, "x", [1], {"a": 1}, True, 10 ** 400)},
}


def perfect_from(dataset, write=float):
    """Predictions equal to a Dataset's ground truth, their numbers as write() gives them."""
    found = {name: forms.listed(a.segments.tolist(), a.labels) for name, a in dataset.truth.items()}
    for detection in sum(found.values(), []):
        detection.update(score=write(0.9), segment=[write(t) for t in detection["segment"]])
    return found


@pytest.mark.parametrize("form", FORMS)
def test_other_forms_of_annotations_and_predictions(own, form):
    before = users.everything(own, "--fps", 50)
    FORMS[form](own)
    after = users.everything(own, "--fps", 50)
    assert users.instances_of(after) == users.instances_of(before)
    assert (after.classes, after.warnings) == (before.classes, before.warnings)
    assert [v.duration for v in after.labelled + after.test] == [32.5] * 14
    argv = users.predict(own, perfect_from(before, TEXTS.get(form, float)))
    if form in TEXTS:
        marked("pred.json")(own)
    assert users.score_of(own, argv) == pytest.approx(100)


def test_a_list_of_labels_is_one_instance_a_label(own):
    users.edits(lambda database: [
        a.update(label=[a["label"], "C"], label_id=["AB".index(a["label"]), 2])
        for entry in database.values() for a in entry["annotations"]])(own)
    d = users.everything(own)
    assert d.classes == ["A", "B", "C"]
    assert [len(v.labels) for v in d.labelled] == [6] * 10
    segments, labels = users.instances_of(d)["v0"]
    assert (segments[0], labels) == (segments[1], [0, 2, 1, 2, 0, 2])
    assert sum(len(a.labels) for a in d.truth.values()) == 24
    assert users.score_of(own, users.predict(own, perfect_from(d))) == pytest.approx(100)
    assert len(read_result(own / "out.json")["ap"]) == 3


def test_ignored_labels_neither_teach_nor_count(own):
    whole = users.instances_of(users.everything(own))
    ignored = forms.listed([[1.0, 30.0], [9.0, 11.0]], ["Ambiguous", "un clear "])
    users.edits(lambda database: [
        entry["annotations"].extend(ignored) for entry in database.values()])(own)
    more = ("--ignore-labels", "Ambiguous, un clear")
    d = users.everything(own, *more)
    assert (d.classes, users.instances_of(d)) == (["A", "B"], whole)
    assert {label for a in d.truth.values() for label in a.labels} == {"A", "B"}
    argv = users.predict(own, perfect_from(d))
    assert users.score_of(own, argv) < 99
    assert users.score_of(own, [*argv, *more]) == pytest.approx(100)
    assert "un clear " in users.everything(own, "--ignore-labels", "Ambiguous").classes


# ---- Who is labelled ----------------------------------------------------------------------------

V12_IS_GONE = users.no_features(*NAMES[:6], "v12")
V1_IS_EMPTY = all_of(entries(["v1"], annotations=[]), lacking("annotations", "v2"))
SPLIT = "--split OWN/s.txt"
ALL = "--ratio 1 --stage supervised"
LOOSE = "--unlabelled-features OWN/features"
UNLABELLED = entries(NAMES[5:10], subset="unlabeled", **action(label="secret"))
DAYS = [f"day{i % 2}/{name}" for i, name in enumerate(NAMES)]
IN_DAYS = all_of(*(users.renamed(day[5:], day, file=f"{day[:4]}/feat_{day[5:]}") for day in DAYS))
# (a change, more arguments, the labelled, the unlabelled, the test videos; None: all others of
# TRAINED or TESTED)
CHOICES = [
    *((lacking("annotations", *NAMES[2:10]), f"--seed {seed}", NAMES[:2], None, None)
      for seed in range(3)),
    (entries(["v2"], annotations=None), "", None, ["v2"], None),
    (V1_IS_EMPTY, "", None, ["v2"], None),
    (UNLABELLED, "--unlabelled-subset Unlabeled --audit", NAMES[:5], NAMES[5:10], None),
    (users.loose_features, "--unlabelled-features OWN/more", TRAINED, ["deep/w1", "deep/w2"], None),
    *((users.loose_features, more, TRAINED, ["loose"], None) for more in (LOOSE, "")),
    (users.loose_features, "--unlabelled-features none", TRAINED, [], None),
    (users.nothing, "", TRAINED, [], None),
    *((entries(NAMES, fps=fps), "--fps 50", TRAINED, [], None) for fps in (0, -1, 25, "x")),
    (all_of(*(users.renamed(name, f"{name}.MP4", name) for name in NAMES)), "",
     [f"{name}.MP4" for name in TRAINED], [], [f"{name}.MP4" for name in TESTED]),
    (text("s.txt", MARK + b"v2\r\nv1\r\n"), SPLIT, ["v1", "v2"], None, None),
    (text("s.json", MARK + b'["v2", "v1"]'), "--split OWN/s.json", ["v1", "v2"], None, None),
    (all_of(users.renamed("v1", "my first video (1)"), users.renamed("v2", "P01/P01_02"),
            text("s.txt", "my first video (1)\r\n\r\n  P01/P01_02  \n")), SPLIT,
     ["P01/P01_02", "my first video (1)"], ["v0", *NAMES[3:10]], None),
    *((all_of(users.renamed("v3", name), text("s.txt", name)), SPLIT, [name],
       [*NAMES[:3], *NAMES[4:10]], None)
      for name in ("P01/P01_02", "a/b/c d", "ä/ö", "x.y/z.mp4", "-o")),
    *((all_renamed(file=prefix + "{}"), f"--prefix {prefix} {ALL}", TRAINED, [], None)
      for prefix in ("v_", "video_", "rgb-")),
    (IN_DAYS, f"--prefix feat_ {ALL}", DAYS[:10], [], DAYS[10:]),
    (V12_IS_GONE, f"--missing skip {ALL}", NAMES[6:10], [], ["v10", "v11", "v13"]),
    (lacking("subset", *NAMES), f"--test-subset none {ALL}", NAMES, [], []),
]


@pytest.mark.parametrize(("change", "more", "labelled", "unlabelled", "tested"), CHOICES)
def test_who_is_labelled(own, change, more, labelled, unlabelled, tested):
    change(own)
    d = users.opened(own, "--ratio", 0, *more.replace("OWN", str(own)).split())
    others = set(TRAINED) - set(labelled or unlabelled)
    assert users.ids(d.labelled) == set(labelled or others)
    assert users.ids(d.unlabelled) == (others if unlabelled is None else set(unlabelled))
    assert users.ids(d.test) == set(d.truth) == set(TESTED if tested is None else tested)
    assert d.classes == ["A", "B"]
    assert [v.id for v in d.labelled if not len(v.labels)] == ["v1"] * (change is V1_IS_EMPTY)
    if "--audit" in more:
        assert d.hidden == {}


@pytest.mark.parametrize("seed", range(3))
def test_shares_are_drawn_from_the_annotated(own, seed):
    for split in ("uniform", "stratified"):
        d = users.opened(own, "--ratio", 0, "--seed", seed, "--split", split)
        assert (len(d.labelled), len(d.unlabelled)) == (1, 9)  # a tenth, where one is drawn
    lacking("annotations", *NAMES[2:10])(own)
    for split in ("uniform", "stratified"):
        d = users.opened(own, "--ratio", 0.5, "--seed", seed, "--split", split)
        assert (len(d.labelled), len(d.unlabelled)) == (1, 9)
        assert users.ids(d.labelled) < {"v0", "v1"}


# ---- Feature files ------------------------------------------------------------------------------

def csv(head="", mark=b"", **more):
    """A writer of .csv files."""
    def write(path, x):
        as_written = {"delimiter": ",", "fmt": "%.9g", "header": head, "comments": ""} | more
        np.savetxt(path, x, **as_written)
        path.write_bytes(mark + path.read_bytes())
    return write


def with_text(path, x):
    np.savez(path, feats=x)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("readme.txt", "see the paper")


def linked(path, x):
    np.save(path.parent.parent / f"stored {path.name}", x)
    path.symlink_to(path.parent.parent / f"stored {path.name}")


def standardised(own, *more):
    """The Dataset of the user's files, and the input that one of its videos gives."""
    s = settings(*own_argv(own, *more))
    d = data.training_data(s)
    return d, data.load_item(d.labelled[1], d, s)["feats"]


@pytest.mark.parametrize(("extension", "write"), [
    (".npy", linked), (".npz", None), (".npz", np.savez_compressed), (".npz", with_text),
    (".pt", None),
    (".pt", lambda path, x: torch.save({"feats": torch.from_numpy(x), "fps": 25, "id": "v"}, path)),
    (".pt", lambda path, x: torch.save(torch.nn.Parameter(torch.from_numpy(x)), path)),
    (".csv", csv("f0,f1,f2,f3,f4")), (".csv", csv("0,1,2,3,4", fmt="%.2f")),
    (".csv", csv(newline="\r\n")), (".csv", csv(delimiter=";")),
    (".csv", csv("a;b;c;d;e", delimiter=";")), (".tsv", csv(delimiter="\t")),
    (".tsv", csv("a\tb\tc\td\te", delimiter="\t")),
    (".csv", csv(mark=MARK)),
    *((".npy", lambda path, x, dtype=dtype: np.save(path, np.asfortranarray(x.astype(dtype))))
      for dtype in ("<f2", ">f4", "<f8", ">f8", "i1", "<u2", ">i8")),
])
def test_features_in_other_kinds_of_files(own, extension, write):
    users.features(NAMES, lambda x: np.abs(np.round(x)))(own)  # what every type can hold
    before, expected = standardised(own)
    convert(own, extension, write)
    after, found = standardised(own, "--extension", extension)
    assert torch.allclose(after.mean, before.mean)
    assert torch.allclose(after.std, before.std)
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("fmt", ["%d", "%.18e"])
def test_a_table_whose_first_row_is_0_1_2_keeps_it(own, fmt):
    x = np.arange(64 * 5).reshape(64, 5)
    path = own / "x.csv"
    np.savetxt(path, x, delimiter=",", fmt=fmt)
    assert np.array_equal(files.read_features(path, files.Reading(), "x"), x)
    skipped = files.read_features(path, files.Reading(skip=2), "x")
    assert np.array_equal(skipped, x[:, 2:])


@pytest.mark.parametrize("offset", [1e9, -3e11])
def test_features_far_from_0_do_not_cancel(own, offset):
    before, expected = standardised(own)
    users.features(NAMES, lambda x: x.astype(np.float64) + offset)(own)
    after, found = standardised(own)
    assert after.mean.numpy() == pytest.approx(np.full(5, offset), rel=1e-6)
    assert after.std.numpy() == pytest.approx(before.std.numpy(), rel=1e-3)
    if offset == 1e9:
        assert torch.allclose(found, expected, atol=1e-3)


def test_values_beyond_float32_once_standardised_are_named(own):
    place = np.arange(5) == 3
    users.features([*TRAINED, "v11"], lambda x: np.where(place, np.float32(-3e38), x))(own)
    place = place & (np.arange(64) == 23)[:, None]
    users.features(["v11"], lambda x: np.where(place, np.float32(3e38), x))(own)
    s = settings(*own_argv(own))
    with pytest.raises(BadInput, match="v11.*step 23"):
        d = data.training_data(s)
        for video in d.test:
            data.load_item(video, d, s)


def test_outputs_that_are_not_finite_are_told():
    d = data.training_data(settings())
    for part, value in (("cls_out", np.nan), ("reg_out", np.inf)):
        detector = small_detector(len(d.classes), d.dim)
        getattr(detector, part).bias.data.fill_(value)
        with pytest.raises(BadInput, match=d.test[0].id):
            evaluate.detect(detector, d.test[:1], d, settings())


def test_stride_0_cuts_each_video_into_its_features(own):
    lengths = {name: 20.0 + i for i, name in enumerate(NAMES)}
    rng = np.random.default_rng(0)
    users.features(NAMES, lambda x: rng.normal(size=(40, 5)))(own)
    all_of(*(entries([name], duration=seconds) for name, seconds in lengths.items()),
           lacking("fps", *NAMES), actions(NAMES, segment=[2.0, 12.0]))(own)
    d = users.everything(own, "--stride", 0, "--frames", 1)
    assert d.warnings == [] or "grid" not in d.warnings[0]
    for video in d.labelled:
        expected = [t * 40 / lengths[video.id] - 0.5 for t in (2, 12)]
        assert video.segments[0].tolist() == pytest.approx(expected, abs=1e-4)
        assert video.in_seconds(video.segments)[0].tolist() == pytest.approx([2, 12], abs=1e-4)
        assert video.grid.to_seconds(39.5) == pytest.approx(lengths[video.id])


# ---- What is odd is told ------------------------------------------------------------------------

OFF_BY_LESS_THAN_A_WINDOW = all_of(
    *(entries([name], duration=32.5 + 0.1 * (i % 9)) for i, name in enumerate(NAMES)))
def gap(x):
    """Features with three steps that a sensor did not see."""
    x[3:6] = np.inf
    return x


def scores(number, of_video):
    """External scores of some of the test videos."""
    results = {"results": dict.fromkeys(TESTED[:number], of_video)}
    return text("scores.json", json.dumps(results))


SCORED = "--one-class --ext-scores OWN/scores.json"
# (a change, more arguments, words of the first line, words of the warnings, with "|" between)
TOLD = [
    (UNLABELLED, "--ratio 1.0", "5 entries of other subsets|unlabeled (5)", "no unlabelled"),
    (entries(["v3"], subset=None), "", "1 entries of other subsets: none (1)", ""),
    (users.loose_features, "--ratio 0", "10 labelled, 1 unlabelled", ""),
    (users.loose_features, "--unlabelled-features none",
     "3 labelled, 7 unlabelled, 4 test videos; ignored: 1 feature files without an entry, which "
     "--unlabelled-features takes: loose",
     ""),
    (users.nothing, "--ratio 0", "10 labelled, 0 unlabelled", "no unlabelled video|Stage 3 needs"),
    (actions(NAMES[:10], 0, segment=[1.0, 31.0]), "--ratio 1 --max-steps 20 --crop-keep 0.9",
     "", "10 of 30 labelled instances are too long|--max-steps 55"),
    (entries(NAMES[:3], fps=40), "", "", "3 videos|v0, v1, v2|fps"),
    (users.features(NAMES, lambda x: np.hstack([np.arange(7.0, 39, 0.5)[:, None], x])), "", "",
     "first 1 column(s)|--skip-columns 1"),
    (users.features(NAMES, lambda x: np.hstack([np.mgrid[0:64, 0:2].cumsum(1)[0], x])), "", "",
     "first 2 column(s)|--skip-columns 2"),
    (all_of(users.every_time(lambda t: t / 16), entries(NAMES, duration=32.5 / 16, fps=800)),
     "--ranges 0:1,1:2,2:inf", "", "32 steps a second|raw recording|extras.windows"),
    (users.features(["v1", "v5"], gap), "--fill-gaps", "", "6 steps of 2 videos|v1, v5"),
    *((actions(["v4"], 0, label=name), ALL, "", f"{name}|--ignore-labels")
      for name in ("background", "Background", "BG", "no action")),
    (scores(3, {"A": 0.5, "B": 0.5}), SCORED, "", "1 of 4 test videos|v13"),
    (scores(4, {"A": 0.5, "C": 0.5}), SCORED, "", "1 of 2 classes|B"),
    (users.loose_features, f"{LOOSE} --ratio 0", "10 labelled, 1 unlabelled", ""),
    (V12_IS_GONE, "--missing skip", "unlabelled, 3 test videos", "7 videos"),
    (users.without(*TESTED), "", "", "no test videos, so no mAP"),
    (users.nothing, "--test-subset TRAINING", "", "10 test videos are training videos too"),
    (users.features(["v4"], lambda x: np.ones((300, 5))), "", "", "v4"),
    (OFF_BY_LESS_THAN_A_WINDOW, "", "", ""),
    (entries(["v2", "v5"], annotations=[]), ALL, "",
     "2 of 10 labelled videos teach that nothing happens in them: v2, v5"),
    (all_of(actions(["v4"], 0, label="\u00d6l"), actions(["v4"], 1, label="O\u0308l")), ALL, "",
     "coding of a letter"),
    (all_of(text("features/v20.h5", "x"), text("features/v3.mp4", "x")), "",
     "ignored: 1 files that are no *.npy (--extension): v20.h5", ""),
    *((users.nothing, f"{more} --trust-grid", "", "span") for more in OFF if more not in TOO_FAR),
    (actions(NAMES[:4], 0, segment=[8.1, 8.2]), ALL, "",
     "4 of 30 labelled instances hold no grid step"),
    *((actions(["v4"], 0, label=twin), ALL, "", f"'A'|{shown(twin)}|differ")
      for twin in ("a", "A ", " A", "A\u00a0", "a\t")),
]


def assert_told(capsys, first, warned):
    """The words are in the first line printed and in the warnings -> the warnings."""
    out, err = capsys.readouterr()
    for told, words in ((out.splitlines()[0], first), (err, warned)):
        for word in words.split("|"):
            assert word in told
    return err


@pytest.mark.parametrize(("change", "more", "first", "warned"), TOLD, ids=map(name_of, TOLD))
def test_what_is_odd_is_told(own, capsys, change, more, first, warned):
    change(own)
    assert train.main(check(own, *more.replace("OWN", str(own)).split())) == 0
    err = assert_told(capsys, first, warned)
    assert "error" not in err and "--trust-grid" not in err
    assert bool(err) == bool(warned)


def test_predictions_that_match_in_part_are_scored_and_told(own, capsys):
    whole, more = users.perfect(own, TESTED), users.perfect(own, TESTED)
    for name, label in (("v10", "fly"), ("v11", "a")):
        more[name].append({"label": label, "segment": [1, 2], "score": 1})
    fewer = users.perfect(own, TESTED[:3]) | {"v_v13": [], "other": []}
    late = whole | {"v11": [{"label": "A", "segment": [t, t + 4], "score": 0.1} for t in (40, 50)]}
    milli = {name: [d | {"segment": [1e3 * t for t in d["segment"]]} for d in found]
             for name, found in whole.items()}
    for results, score, printed, warned in (  # the subset is by default that of the predictions
            (whole, 100, "validation", ""), (users.perfect(own, TRAINED), 100, "training", ""),
            (more, 100, "validation", "2 of 14 predictions|fly"),
            (late, 75, "validation", "2 predictions in 1 videos lie outside their video: v11"),
            (milli, 0, "validation", "12 predictions in 4 videos|milliseconds, not seconds"),
            (fewer, 75, "validation", "2 of 5 predicted videos are not in the ground truth|"
             "1 of 4 videos of the ground truth have no prediction|v13")):
        assert users.score_of(own, users.predict(own, results)) == pytest.approx(score)
        assert_told(capsys, printed, warned)


# ---- Thresholds, segments of no length ----------------------------------------------------------

def test_threshold_ranges_that_fit():
    for tiou, expected in {
            "0.5:0.95:0.15": [0.5, 0.65, 0.8, 0.95], "0.1:0.7:0.2": [0.1, 0.3, 0.5, 0.7],
            "0.5:0.5:0.1": [0.5], "0.1:1:0.3": [0.1, 0.4, 0.7, 1.0]}.items():
        assert thresholds_of(tiou) == pytest.approx(expected), tiou


def test_zero_by_zero_is_a_hit_as_in_the_toolkit_and_else_a_miss():
    for truth, place, expected in (
            ([5.0, 5.0], 5.0, 1.0), ([5.0, 5.0], 0.0, 1.0), ([5.0, 5.0], 9.0, 1.0),
            ([4.0, 6.0], 5.0, 0.0)):
        annotations = {"v": forms.Annotation("test", 9.0, 1.0, np.array([truth]), ["a"])}
        found = {"v": [{"label": "a", "score": 0.5, "segment": [place, place]}]}
        metrics = evaluate.mean_average_precision(annotations, found, [0.3, 0.7])
        assert metrics["mAP"] == [expected, expected], (truth, place)


def test_detections_of_no_length_are_never_exported():
    video = data.Video("v", None, "", data.Grid(1.0, 1.0, 1.0), 30, 10.0, 30)
    segments = [[2.0, 4.0], [9.5, 20.0], [12.0, 20.0], [-9.0, -3.0]]
    found = record(segments, [0] * 4, [0] * 4)
    found |= dict.fromkeys(("p_cls", "p_tiou", "p_tnd", "similarity"), torch.ones(4))
    names = {"labels": ["a"], "status": ["kept"]}
    for columns in ({"segment": "segments", "label": "labels"}, train.PSEUDO_LABEL):
        exported = evaluate.export([video], {"v": found}, columns, names)["v"]
        assert [d["segment"] for d in exported] == [[2.5, 4.5]]


# ---- Text that reaches the terminal -------------------------------------------------------------

def printed(capsys):
    """What a command has printed, which has no line that a terminal takes amiss."""
    shown = "".join(capsys.readouterr())
    for line in shown.split("\n"):
        assert line.isprintable()
        assert len(line) < 600
    return shown


@pytest.mark.parametrize("name", ODD_TEXTS)
def test_odd_labels_are_warned_about_in_plain_lines(own, capsys, name):
    odd = ODD_TEXTS[name]
    all_of(actions(["v4"], 0, label=odd), actions(["v5"], 0, label=odd.upper() + " "),
           entries(["v6"], subset=odd))(own)
    assert train.main(check(own)) == 0
    assert "labelled instance" in printed(capsys)
    argv = users.predict(own, {"v10": [{"label": odd * 2, "score": 1, "segment": [1, 2]}]})
    assert evaluated(*argv[1:]) == 0
    printed(capsys)


def test_a_run_with_odd_ids_and_labels_goes_to_its_end(own, capsys):
    odd = {"A": "\x1b[2J", "B": "b\ud800\n"}
    all_of(users.renamed("v3", "\x1b[31m\n3"), users.renamed("v12", "ü \x07 12"),
           users.edits(lambda database: [
               a.update(label=odd[a["label"]]) for entry in database.values()
               for a in entry["annotations"]]))(own)
    assert train.main(own_argv(own, *users.SUPERVISED)) == 0
    assert evaluated("--checkpoint", own / "run") == 0
    printed(capsys)
    assert set(read_result(own / "run/metrics.json")["ap"]) == set(odd.values())


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "cp437"])
def test_a_terminal_that_cannot_show_a_letter_or_is_closed_ends_no_run(own, monkeypatch, encoding):
    all_of(users.renamed("v3", "日本語"), actions(["v5"], 0, label="跳ぶ"),
           text("s.txt", "v0\nv1\n"))(own)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert train.main(check(own, "--ratio", 0, "--split", own / "s.txt")) == 0
    assert b"have no labelled instance" in sys.stderr.buffer.getvalue()
    users.no_features("日本語")(own)
    assert train.main(check(own)) == 2
    assert b"not found" in sys.stderr.buffer.getvalue()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert train.main(check(own, "--missing", "skip", "--fps", 60)) == 0
    assert train.main(check(own, "--missing", "skip", "--fps", 1)) == 2


# ---- Runs on data that lack something -----------------------------------------------------------

def test_a_file_with_annotated_videos_alone_trains_on_the_loose_files(own):
    users.without(*NAMES[3:10])(own)
    more = ("--ratio", 0, "--unlabelled-features", own / "features", *users.LOWEST)
    assert train.main(own_argv(own, *more)) == 0
    split = read_result(own / "run/split.json")
    assert (split["labelled"], split["unlabelled"]) == (NAMES[:3], NAMES[3:10])
    assert set(read_result(own / "run/pseudo_labels.json")) == set(NAMES[3:10])


# (a change, more arguments, videos in the mAP, words of what is printed)
THIN = [
    (users.without(*TESTED), "--test-subset none", None, ""),
    (lacking("annotations", *TESTED), "", None, "mAP"),
    (lacking("annotations", "v10", "v13"), "", 2, "2 of 4 test videos have no annotations"),
    (users.no_features("v12"), "--missing skip", 3, "1 videos are left out"),
]


@pytest.mark.parametrize(("change", "more", "videos", "words"), THIN)
def test_runs_on_data_that_lack_something(own, capsys, change, more, videos, words):
    change(own)
    assert train.main(own_argv(own, *users.SUPERVISED, *more.split())) == 0
    assert words in printed(capsys)
    run = own / "run"
    assert (run / "checkpoint.pt").exists() and (run / "pseudo_labels.json").exists()
    if videos:
        assert read_result(run / "metrics.json")["videos"] == videos
    else:
        assert not (run / "metrics.json").exists()
        assert evaluated("--checkpoint", run) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("error: ")
        assert ("mAP" if "none" not in more else "--subset") in last
    if "none" not in more:
        found = set(read_result(run / "predictions.json")["results"])
        assert found == set(TESTED) - ({"v12"} if "skip" in more else set())
    if "skip" in more:
        users.no_features("v11")(own)
        assert evaluated("--checkpoint", run, "--json", own / "out.json") == 0
        assert read_result(own / "out.json")["videos"] == 2
        assert "2 videos are left out" in capsys.readouterr().err
