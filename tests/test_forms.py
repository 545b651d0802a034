"""Tests of right input: files as people have them are read, and what is odd is told."""
import io
import json
import shutil
import sys
import zipfile

import numpy as np
import pytest
import torch

import data
import evaluate
import train
from plumbing import forms
from plumbing.settings import thresholds_of
from plumbing.words import BadInput, shown
from tests.helpers import edit, evaluated, own_argv, read_result, settings, small_detector
from tests.test_faults import ODD_TEXTS, OFF, TOO_FAR, convert, prefixed_files
from tests.users import (
    LOWEST,
    NAMES,
    SUPERVISED,
    TESTED,
    TRAINED,
    actions,
    all_of,
    check,
    entries,
    every_time,
    everything,
    features,
    ids,
    instances_of,
    lacking,
    no_features,
    nothing,
    opened,
    perfect,
    predict,
    renamed,
    score_of,
    text,
    without,
)

pytestmark = pytest.mark.usefixtures("in_time")
MARK = b"\xef\xbb\xbf"  # a byte order mark


# ---- Annotations --------------------------------------------------------------------------------

def rewritten(function):
    """Another content of the annotation file: function(content)."""
    def change(folder):
        content = function(read_result(folder / "own.json"))
        text("own.json", json.dumps(content))(folder)
    return change


def marked(folder):
    text("own.json", MARK + (folder / "own.json").read_bytes())(folder)


TEXTS = {"plain": str, "blanks": "  {}\n".format, "exponent": "{:.12e}".format,
         "signed": "+{}".format}
FORMS = {
    "bare, as BSN has it": rewritten(lambda content: content["database"]),
    "marked": marked,
    **{f"{name} text": all_of(
        every_time(write), entries(NAMES, duration=write(32.5), fps=write(50)))
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
    "no fps": lacking("fps", *NAMES),
    # Label ids do no harm, whatever they are
    **{f"label_id {name}": actions(NAMES, label_id=value) for name, value in {
        "superscript": "²", "Arabic": "٣", "5000 digits": "1" * 5000, "negative": -1,
        "float": 1.5, "text": "x", "list": [1], "dict": {"a": 1}, "bool": True,
        "401 digits": 10 ** 400}.items()},
}


def perfect_from(dataset):
    """Predictions equal to a Dataset's ground truth."""
    return {name: [{"label": label, "segment": segment, "score": 1}
                   for label, segment in zip(a.labels, a.segments.tolist())]
            for name, a in dataset.truth.items()}


@pytest.mark.parametrize("form", FORMS)
def test_other_forms_of_annotations(own, form):
    before = everything(own, "--fps", 50)
    FORMS[form](own)
    after = everything(own, "--fps", 50)
    assert instances_of(after) == instances_of(before)
    assert after.classes == before.classes
    assert after.warnings == before.warnings
    assert [v.duration for v in after.labelled + after.test] == [32.5] * 14
    assert score_of(own, predict(own, perfect_from(before))) == pytest.approx(100)


@pytest.mark.parametrize("form", TEXTS)
def test_numbers_of_predictions_may_be_text(own, form):
    every_time(TEXTS[form])(own)
    results = perfect(own, TESTED)
    for d in (d for detections in results.values() for d in detections):
        d["score"] = TEXTS[form](d["score"])
    argv = predict(own, results)
    text("pred.json", MARK + (own / "pred.json").read_bytes())(own)
    assert score_of(own, argv) == pytest.approx(100)


# ---- Labels -------------------------------------------------------------------------------------

def test_a_list_of_labels_is_one_instance_a_label(own):
    def change(database):
        for entry in database.values():
            for a in entry["annotations"]:
                a["label"] = [a["label"], "C"]
                a["label_id"] = [{"A": 0, "B": 1}[a["label"][0]], 2]

    edit(own, change)
    d = everything(own)
    assert d.classes == ["A", "B", "C"]
    assert [len(v.labels) for v in d.labelled] == [6] * 10
    first = d.labelled[0]
    assert first.segments[0].tolist() == first.segments[1].tolist()
    assert first.labels.tolist() == [0, 2, 1, 2, 0, 2]
    assert sum(len(a.labels) for a in d.truth.values()) == 24
    assert score_of(own, predict(own, perfect_from(d))) == pytest.approx(100)
    assert len(read_result(own / "out.json")["ap"]) == 3


def test_ignored_labels_neither_teach_nor_count(own):
    whole = instances_of(everything(own))

    def change(database):
        for entry in database.values():
            entry["annotations"] += [
                {"segment": [1.0, 30.0], "label": "Ambiguous"},
                {"segment": [9.0, 11.0], "label": "un clear "}]

    edit(own, change)
    more = ("--ignore-labels", "Ambiguous, un clear")
    d = everything(own, *more)
    assert d.classes == ["A", "B"]
    assert instances_of(d) == whole
    assert {label for a in d.truth.values() for label in a.labels} == {"A", "B"}
    argv = predict(own, perfect_from(d))
    assert score_of(own, argv) < 99
    assert score_of(own, [*argv, *more]) == pytest.approx(100)
    assert "un clear " in everything(own, "--ignore-labels", "Ambiguous").classes


# ---- Who is labelled ----------------------------------------------------------------------------

def loose_features(folder):
    """Feature files without an entry, in this folder and in others."""
    (folder / "more/deep").mkdir(parents=True)
    for path in ("more/deep/w1", "more/deep/w2", "features/loose"):
        shutil.copy(folder / "features/v1.npy", folder / f"{path}.npy")


def prefixed(folder):
    for i, name in enumerate(NAMES):
        renamed(name, f"day{i % 2}/{name}", file=f"day{i % 2}/feat_{name}")(folder)


SPLIT = "--split OWN/s.txt"
HALF = all_of(lacking("annotations", *NAMES[2:10]))
UNLABELLED = all_of(entries(NAMES[5:10], subset="unlabeled", annotations=[
    {"segment": [1, 2], "label": "secret"}]))
DAYS = [f"day{i % 2}/v{i}" for i in range(10)]
# (a change, more arguments, the labelled, the unlabelled, the test videos; None: all others of
# TRAINED or TESTED)
CHOICES = [
    *((HALF, f"--seed {seed}", NAMES[:2], None, None) for seed in range(3)),
    (entries(["v2"], annotations=None), "", None, ["v2"], None),
    (all_of(entries(["v1"], annotations=[]), lacking("annotations", "v2")), "", None, ["v2"],
     None),
    (UNLABELLED, "--unlabelled-subset Unlabeled --audit", NAMES[:5], NAMES[5:10], None),
    (loose_features, "--unlabelled-features OWN/more", TRAINED, ["deep/w1", "deep/w2"], None),
    (loose_features, "--unlabelled-features OWN/features", TRAINED, ["loose"], None),
    (text("s.txt", MARK + b"v2\r\nv1\r\n"), SPLIT, ["v1", "v2"], None, None),
    (text("s.json", MARK + b'["v2", "v1"]'), "--split OWN/s.json", ["v1", "v2"], None, None),
    (all_of(renamed("v1", "my first video (1)"), renamed("v2", "P01/P01_02"),
            text("s.txt", "my first video (1)\r\n\r\n  P01/P01_02  \n")), SPLIT,
     ["P01/P01_02", "my first video (1)"], ["v0", *NAMES[3:10]], None),
    *((all_of(renamed("v3", name), text("s.txt", name)), SPLIT, [name],
       [*NAMES[:3], *NAMES[4:10]], None)
      for name in ("P01/P01_02", "a/b/c d", "ä/ö", "x.y/z.mp4", "-o")),
    *((prefixed_files(prefix), f"--prefix {prefix} --ratio 1 --stage supervised", TRAINED, [], None)
      for prefix in ("v_", "video_", "rgb-")),
    (prefixed, "--prefix feat_ --ratio 1 --stage supervised", DAYS, [],
     ["day0/v10", "day1/v11", "day0/v12", "day1/v13"]),
    (no_features(*NAMES[:6], "v12"), "--missing skip --ratio 1 --stage supervised", NAMES[6:10],
     [], ["v10", "v11", "v13"]),
    (lacking("subset", *NAMES), "--test-subset none --ratio 1 --stage supervised", NAMES, [], []),
]


@pytest.mark.parametrize(("change", "more", "labelled", "unlabelled", "tested"), CHOICES)
def test_who_is_labelled(own, change, more, labelled, unlabelled, tested):
    change(own)
    d = opened(own, "--ratio", 0, *more.replace("OWN", str(own)).split())
    if labelled is None:
        labelled = set(TRAINED) - set(unlabelled)
    if unlabelled is None:
        unlabelled = set(TRAINED) - set(labelled)
    assert ids(d.labelled) == set(labelled)
    assert ids(d.unlabelled) == set(unlabelled)
    assert ids(d.test) == set(d.truth) == set(TESTED if tested is None else tested)
    assert d.classes == ["A", "B"]
    if "--audit" in more:
        assert d.hidden == {}


@pytest.mark.parametrize("seed", range(3))
def test_shares_are_drawn_from_the_annotated(own, seed):
    d = opened(own, "--ratio", 0, "--seed", seed)
    assert (len(d.labelled), len(d.unlabelled)) == (1, 9)  # a tenth, by default
    lacking("annotations", *NAMES[2:10])(own)
    for split in ("uniform", "stratified"):
        d = opened(own, "--ratio", 0.5, "--seed", seed, "--split", split)
        assert len(d.labelled) == 1
        assert ids(d.labelled) < {"v0", "v1"}
        assert len(d.unlabelled) == 9


def test_an_empty_list_means_truly_none(own):
    entries(["v1"], annotations=[])(own)
    assert [len(v.labels) for v in everything(own).labelled if v.id == "v1"] == [0]


# ---- Feature files ------------------------------------------------------------------------------

def csv(head="", **more):
    """A writer of .csv files."""
    def write(path, x):
        np.savetxt(path, x, delimiter=",", fmt="%.9g", header=head, comments="", **more)
    return write


def marked_csv(path, x):
    csv()(path, x)
    path.write_bytes(MARK + path.read_bytes())


def with_text(path, x):
    np.savez(path, feats=x)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("readme.txt", "see the paper")


def linked(path, x):
    np.save(path.parent.parent / f"stored {path.name}", x)
    path.symlink_to(path.parent.parent / f"stored {path.name}")


@pytest.mark.parametrize(("extension", "write"), [
    (".npy", linked),
    (".npz", lambda path, x: np.savez(path, feats=x)),
    (".npz", np.savez_compressed),
    (".npz", with_text),
    (".pt", lambda path, x: torch.save(torch.from_numpy(x), path)),
    (".pt", lambda path, x: torch.save({"feats": torch.from_numpy(x), "fps": 25, "id": "v"}, path)),
    (".pt", lambda path, x: torch.save(torch.nn.Parameter(torch.from_numpy(x)), path)),
    (".csv", csv("f0,f1,f2,f3,f4")),
    (".csv", csv("0,1,2,3,4")),
    (".csv", csv(newline="\r\n")),
    (".csv", marked_csv),
    *((".npy", lambda path, x, dtype=dtype: np.save(path, np.asfortranarray(x.astype(dtype))))
      for dtype in ("<f2", ">f4", "<f8", ">f8", "i1", "<u2", ">i8")),
])
def test_features_in_other_kinds_of_files(own, extension, write):
    features(NAMES, lambda x: np.abs(np.round(x)))(own)  # what every type can hold
    s = settings(*own_argv(own))
    before = data.training_data(s)
    expected = data.load_item(before.labelled[1], before, s)["feats"]
    convert(own, extension, write)
    s = settings(*own_argv(own, "--extension", extension))
    after = data.training_data(s)
    assert torch.allclose(after.mean, before.mean)
    assert torch.allclose(after.std, before.std)
    found = data.load_item(after.labelled[1], after, s)["feats"]
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("offset", [1e9, -3e11])
def test_features_far_from_0_do_not_cancel(own, offset):
    s = settings(*own_argv(own))
    before = data.training_data(s)
    expected = data.load_item(before.labelled[0], before, s)["feats"]
    features(NAMES, lambda x: x.astype(np.float64) + offset)(own)
    d = data.training_data(s)
    assert d.mean.numpy() == pytest.approx(np.full(5, offset), rel=1e-6)
    assert d.std.numpy() == pytest.approx(before.std.numpy(), rel=1e-3)
    if offset == 1e9:
        found = data.load_item(d.labelled[0], d, s)["feats"]
        assert torch.allclose(found, expected, atol=1e-3)


def test_values_beyond_float32_once_standardised_are_named(own):
    def low(x):
        x[:, 3] = -3e38
        return x

    def peak(x):
        x[23, 3] = 3e38
        return x

    features([*TRAINED, "v11"], low)(own)
    features(["v11"], peak)(own)
    s = settings(*own_argv(own))
    with pytest.raises(BadInput, match="v11.*step 23"):
        d = data.training_data(s)
        for video in d.test:
            data.load_item(video, d, s)


@pytest.mark.parametrize(("part", "value"), [("cls_out", np.nan), ("reg_out", np.inf)])
def test_outputs_that_are_not_finite_are_told(part, value):
    d = data.training_data(settings())
    detector = small_detector(len(d.classes), d.dim)
    getattr(detector, part).bias.data.fill_(value)
    with pytest.raises(BadInput, match=d.test[0].id):
        evaluate.detect(detector, d.test[:1], d, settings())


def test_stride_0_cuts_each_video_into_its_features(own):
    lengths = {name: 20.0 + i for i, name in enumerate(NAMES)}
    rng = np.random.default_rng(0)
    features(NAMES, lambda x: rng.normal(size=(40, 5)))(own)
    lacking("fps", *NAMES)(own)
    for name in NAMES:
        entries([name], duration=lengths[name])(own)
    actions(NAMES, segment=[2.0, 12.0])(own)
    d = everything(own, "--stride", 0, "--frames", 1)
    assert d.warnings == [] or "grid" not in d.warnings[0]
    for video in d.labelled:
        a_step = lengths[video.id] / 40
        expected = [2.0 / a_step - 0.5, 12.0 / a_step - 0.5]
        assert video.segments[0].tolist() == pytest.approx(expected, abs=1e-4)
        assert video.in_seconds(video.segments)[0].tolist() == pytest.approx([2, 12], abs=1e-4)
        assert video.grid.to_seconds(39.5) == pytest.approx(lengths[video.id])


# ---- What is odd is told ------------------------------------------------------------------------

NO_STEP = actions(NAMES[:4], 0, segment=[8.1, 8.2])
EVERYTHING = "--ratio 1.0 --stage supervised"
# (a change, more arguments, words of the first line, words of the warnings, with "|" between)
TOLD = [
    (UNLABELLED, "--ratio 1.0", "5 entries of other subsets|unlabeled (5)", ""),
    (entries(["v3"], subset=None), "", "1 entries of other subsets: none (1)", ""),
    (loose_features, "", "1 feature files without an entry|loose", ""),
    (loose_features, "--ratio 0 --unlabelled-features OWN/features", "10 labelled, 1 unlabelled",
     ""),
    (no_features(*NAMES[:6], "v12"), "--missing skip", "unlabelled, 3 test videos", "7 videos"),
    (without(*TESTED), "", "", "no test videos, so no mAP"),
    (nothing, "--test-subset TRAINING", "", "10 test videos are training videos too"),
    (features(["v4"], lambda x: np.ones((300, 5))), "", "", "v4"),
    *((nothing, f"{more} --trust-grid", "", "span") for more in OFF if more not in TOO_FAR),
    (NO_STEP, EVERYTHING, "", "4 of 30 labelled instances hold no grid step"),
    *((actions(["v4"], 0, label=twin), EVERYTHING, "", f"'A'|{shown(twin)}|differ")
      for twin in ("a", "A ", " A", "A\u00a0", "a\t")),
]


@pytest.mark.parametrize(("change", "more", "first", "warned"), TOLD)
def test_what_is_odd_is_told(own, capsys, change, more, first, warned):
    change(own)
    assert train.main(check(own, *more.replace("OWN", str(own)).split())) == 0
    shown = capsys.readouterr()
    for word in first.split("|"):
        assert word in shown.out.splitlines()[0]
    for word in warned.split("|"):
        assert word in shown.err
    assert "error" not in shown.err
    assert "--trust-grid" not in shown.err


def test_a_time_axis_off_by_less_than_a_window_is_silent(own):
    for i, name in enumerate(NAMES):
        entries([name], duration=32.5 + 0.1 * (i % 9))(own)
    assert opened(own).warnings == []


def test_predictions_that_match_nothing_are_counted(own, capsys):
    results = perfect(own, TESTED)
    for name, label in (("v10", "fly"), ("v11", "a")):
        results[name].append({"label": label, "segment": [1, 2], "score": 1})
    assert score_of(own, predict(own, results)) == pytest.approx(100)
    err = capsys.readouterr().err
    assert "2 of 14 predictions" in err
    assert "fly" in err
    results = perfect(own, TESTED[:3]) | {"v_v13": [], "other": []}
    assert score_of(own, predict(own, results)) < 100
    err = capsys.readouterr().err
    assert "2 of 5 predicted videos are not in the ground truth" in err
    assert "1 of its 4 videos have no prediction" in err
    assert "v13" in err


@pytest.mark.parametrize(("names", "subset"), [(TESTED, "validation"), (TRAINED, "training")])
def test_the_subset_is_by_default_that_of_the_predictions(own, capsys, names, subset):
    assert score_of(own, predict(own, perfect(own, names))) == pytest.approx(100)
    assert subset in capsys.readouterr().out


# ---- Thresholds, segments of no length ----------------------------------------------------------

@pytest.mark.parametrize(("text", "expected"), [
    ("0.5:0.95:0.15", [0.5, 0.65, 0.8, 0.95]), ("0.1:0.7:0.2", [0.1, 0.3, 0.5, 0.7]),
    ("0.5:0.5:0.1", [0.5]), ("0.1:1:0.3", [0.1, 0.4, 0.7, 1.0])])
def test_threshold_ranges_that_fit(text, expected):
    assert thresholds_of(text) == pytest.approx(expected)


@pytest.mark.parametrize(("truth", "place", "expected"), [
    ([5.0, 5.0], 5.0, 1.0), ([5.0, 5.0], 0.0, 1.0), ([5.0, 5.0], 9.0, 1.0), ([4.0, 6.0], 5.0, 0.0)])
def test_zero_by_zero_is_a_hit_as_in_the_toolkit_and_else_a_miss(truth, place, expected):
    annotations = {"v": forms.Annotation("test", 9.0, 1.0, np.array([truth]), ["a"])}
    found = {"v": [{"label": "a", "score": 0.5, "segment": [place, place]}]}
    metrics = evaluate.mean_average_precision(annotations, found, [0.3, 0.7])
    assert metrics["mAP"] == [expected, expected]


def test_detections_of_no_length_are_never_exported():
    video = data.Video("v", None, "", data.Grid(1.0, 1.0, 1.0), 30, 10.0, False)
    whole = torch.zeros(4, dtype=torch.long)
    record = {
        "segments": torch.tensor([[2.0, 4.0], [9.5, 20.0], [12.0, 20.0], [-9.0, -3.0]]),
        "labels": whole,
        "status": whole,
        **dict.fromkeys(("scores", "p_cls", "p_tiou", "p_tnd", "similarity"), torch.ones(4)),
    }
    names = {"labels": ["a"], "status": ["kept"]}
    for columns in ({"segment": "segments", "label": "labels"}, train.PSEUDO_LABEL):
        found = evaluate.export([video], {"v": record}, columns, names)["v"]
        assert [d["segment"] for d in found] == [[2.5, 4.5]]


# ---- Text that reaches the terminal -------------------------------------------------------------

def assert_printable(shown):
    """What a command has printed has no line that a terminal takes amiss."""
    for line in (shown.out + shown.err).split("\n"):
        assert line.isprintable()
        assert len(line) < 600


@pytest.mark.parametrize("name", ODD_TEXTS)
def test_odd_labels_are_warned_about_in_plain_lines(own, capsys, name):
    odd = ODD_TEXTS[name]
    actions(["v4"], 0, label=odd)(own)
    actions(["v5"], 0, label=odd.upper() + " ")(own)
    entries(["v6"], subset=odd)(own)
    assert train.main(check(own)) == 0
    shown = capsys.readouterr()
    assert "labelled instance" in shown.out + shown.err
    assert_printable(shown)
    argv = predict(own, {"v10": [{"label": odd * 2, "score": 1, "segment": [1, 2]}]})
    assert evaluated(*argv[1:]) == 0
    assert_printable(capsys.readouterr())


def test_a_run_with_odd_ids_and_labels_goes_to_its_end(own, capsys):
    renamed("v3", "\x1b[31m\n3")(own)
    renamed("v12", "ü \x07 12")(own)

    def change(database):
        for entry in database.values():
            for a in entry["annotations"]:
                a["label"] = {"A": "\x1b[2J", "B": "b\ud800\n"}[a["label"]]

    edit(own, change)
    assert train.main(own_argv(own, *SUPERVISED)) == 0
    assert evaluated("--checkpoint", own / "run") == 0
    assert_printable(capsys.readouterr())
    assert set(read_result(own / "run/metrics.json")["ap"]) == {"\x1b[2J", "b\ud800\n"}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "cp437"])
def test_a_terminal_that_cannot_show_a_letter_ends_no_run(own, monkeypatch, encoding):
    renamed("v3", "日本語")(own)
    actions(["v5"], 0, label="跳ぶ")(own)
    text("s.txt", "v0\nv1\n")(own)
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    err = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert train.main(check(own, "--ratio", 0, "--split", own / "s.txt")) == 0
    assert b"have no labelled instance" in err.buffer.getvalue()
    (own / "features/日本語.npy").unlink()
    assert train.main(check(own)) == 2
    assert b"not found" in err.buffer.getvalue()


def test_closed_streams_end_no_run(own, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert train.main(check(own, "--fps", 60)) == 0
    assert train.main(check(own, "--fps", 1)) == 2


# ---- Runs on data that lack something -----------------------------------------------------------

def test_a_file_with_annotated_videos_alone_trains_on_the_loose_files(own):
    without(*NAMES[3:10])(own)
    argv = own_argv(own, "--ratio", 0, "--unlabelled-features", own / "features", *LOWEST)
    assert train.main(argv) == 0
    split = read_result(own / "run/split.json")
    assert split["labelled"] == NAMES[:3]
    assert split["unlabelled"] == NAMES[3:10]
    assert set(read_result(own / "run/pseudo_labels.json")) == set(NAMES[3:10])


# (a change, more arguments, videos in the mAP, words of what is printed)
THIN = [
    (without(*TESTED), "--test-subset none", None, ""),
    (lacking("annotations", *TESTED), "", None, "mAP"),
    (lacking("annotations", "v10", "v13"), "", 2, "2 of 4 test videos have no annotations"),
    (no_features("v12"), "--missing skip", 3, "1 videos are left out"),
]


@pytest.mark.parametrize(("change", "more", "videos", "words"), THIN)
def test_runs_on_data_that_lack_something(own, capsys, change, more, videos, words):
    change(own)
    assert train.main(own_argv(own, *SUPERVISED, *more.split())) == 0
    shown = capsys.readouterr()
    assert words in shown.out + shown.err
    run = own / "run"
    assert (run / "checkpoint.pt").exists()
    assert (run / "pseudo_labels.json").exists()
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
        no_features("v11")(own)
        assert evaluated("--checkpoint", run, "--json", own / "out.json") == 0
        assert read_result(own / "out.json")["videos"] == 2
        assert "2 videos are left out" in capsys.readouterr().err
