"""Tests of runs: checkpoints that lie, files that cannot be written, folders, signals, going on."""
import contextlib
import copy
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
import threading
import zipfile

import numpy as np
import pytest
import torch

import data
import evaluate
import icd
import train
from plumbing import checkpoints, journal, resume, runs
from plumbing.words import BadInput, complain
from tests.helpers import (
    ROOT,
    TINY,
    edit,
    evaluated,
    finished,
    own_argv,
    read_log,
    read_result,
    same,
    settings,
    weights,
)
from tests.test_faults import ARCHIVES, damage
from tests.test_train import write_published
from tests.users import (
    LOWEST,
    NAMES,
    SUPERVISED,
    TESTED,
    TRAINED,
    actions,
    all_of,
    assert_plain,
    check,
    edits,
    entries,
    features,
    no_features,
    perfect,
    predict,
    refusal,
    renamed,
)

pytestmark = pytest.mark.usefixtures("in_time")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A user's data set with a finished run; no test changes it."""
    folder = finished(tmp_path_factory, train.main, own_argv, *LOWEST)
    assert read_result(folder / "run/split.json")["labelled"] == ["v1", "v3", "v9"]
    return folder


@pytest.fixture
def trained(original, tmp_path):
    """A copy of the data set with a finished run, which has moved here together."""
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    return tmp_path


def places(folder):
    """The arguments that say where a moved run's data is."""
    return ["--dataset", str(folder / "own.json"), "--features", str(folder / "features")]


def resumed(folder):
    """The command line that goes on with a moved run."""
    return ["--resume", str(folder / "run"), *places(folder)]


def evaluating(folder, *more):
    """The command line that evaluates a moved run, for refusal()."""
    return ["evaluate", "--checkpoint", folder / "run", *places(folder), *more]


def files_of(folder):
    """{name: content} of what a run has written."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


# ---- Checkpoints that lie -----------------------------------------------------------------------

def changed(found, where, value):
    """What a checkpoint holds, with another value at a place.

    where  keys with blanks between; * is the first video with pseudo labels
    value  the value, or a function of what was there"""
    if not where:
        return value(found) if callable(value) else value
    key, _, rest = where.partition(" ")
    if key == "*":
        key = next(name for name, record in found.items() if len(record["labels"]))
    elif key.isdigit():
        key = int(key)
    found[key] = changed(found[key], rest, value)
    return found


def spoil(path, where, value):
    """Another value in a checkpoint, or another file where `where` is None."""
    if where is None:
        damage(path, value)
    else:
        torch.save(changed(torch.load(path, weights_only=True), where, value), path)


def without(name):
    """A change of a dict, which lacks a key."""
    def change(content):
        return {key: value for key, value in content.items() if key != name}
    return change


def with_nan(x):
    return torch.cat([x.flatten()[:-1], torch.tensor([math.nan])]).view(x.shape)


def amid(**fields):
    """A change: the run is in the midst of an epoch."""
    def change(content):
        rng = {"torch": torch.get_rng_state(), "run": torch.Generator().get_state()}
        return content | {"done": 1, "epoch": 1, "rng": rng} | fields
    return change


def each(where, words, *values):
    """Rows of wrong values at one place."""
    return [(where, value, words) for value in values]


# (where in the checkpoint, the value there, words of the sentence with "|" between)
BAD_DETECTORS = [
    *((f"settings {name}", value, f"not of this version|{name}") for name, value in (
        ("channels", "16"), ("channels", True), ("channels", 16.0), ("heads", 0), ("batch", 0),
        ("batch", None), ("stem", 10 ** 12), ("min_score", math.nan), ("fps", math.inf),
        ("features", 3), ("weights", "best"), ("pre_nms", "many"), ("tiou", [0.5]),
        ("tiou", "0.5:0.9:0.15"), ("windows", [5, 5, 5]), ("windows", "5,x,5"))),
    ("settings pre_nms", "many", "must be of type int|'many'"),
    ("settings channels", 8, "not of this version"),
    ("settings", without("nms_sigma"), "not of this version|nms_sigma"),
    ("settings", [], ""),
    *each("classes", "", None, [1, 2], ["A", "A"], ["A", "B", "C"]),
    *each("std 2", "", 0.0, -1.0, math.nan, math.inf),
    *each("mean", "", [0.0] * 5, torch.zeros(5, 1), torch.zeros(6),
          torch.zeros(5, dtype=torch.long), torch.zeros(1).expand(10 ** 15)),
    ("", lambda content: content | {"mean": torch.zeros(4), "std": torch.ones(4)},
     "not of this version|5]|4]"),
    *each("ema", "", None, {}),
    *each("ema cls_out.weight", "", with_nan, torch.Tensor.double, torch.Tensor.bool,
          torch.Tensor.tolist, lambda x: x.transpose(-1, -2)[..., :-1]),
    *each("detector cls_out.weight", "", torch.Tensor.to_sparse, lambda x: x - math.inf),
    ("", {"a": 1}, "checkpoint.pt"),
    *each(None, "checkpoint.pt", *ARCHIVES.values()),
    *each(None, "checkpoint.pt|cannot be read", b"", b"\x80\x02}", b"text",
          lambda path: path.write_bytes(path.read_bytes()[:1000]),
          lambda path: torch.save({"a": subprocess.Popen}, path)),
]
BAD_RUNS = [
    *each("optimizer state 0 exp_avg", "", torch.Tensor.double, torch.Tensor.tolist,
          lambda x: x[..., :-1]),
    *each("optimizer state 0 exp_avg_sq", "", lambda x: x.view(-1)[0], lambda x: x * math.nan),
    *each("optimizer state 0 step", "", None, lambda x: x.expand(7)),
    ("icd_optimizer state 0 exp_avg", lambda x: x.flatten()[:3], ""),
    *each("optimizer param_groups 0 lr", "", math.nan, "0.1"),
    ("optimizer param_groups", lambda groups: groups[::-1], ""),
    *each("optimizer", "", {}, None),
    *each("icd", "", None, lambda state: {key: with_nan(x) for key, x in state.items()}),
    *each("t_plus", "", torch.full((2,), math.nan), 100.0),
    *each("epoch", "", "2", -1),
    *each("stage", "", "final", ["joint"]),
    ("theta_h", math.nan, ""),
    *each("", "not of this version", without("theta_h")),
    *each("", "", amid(processes="1"), amid(rng=None), amid(rng={}), amid(rng="abc"),
          amid(rng={"torch": torch.zeros(3, dtype=torch.uint8)})),
    *each("done", "", 10 ** 30, torch.zeros(3)),
    *each("", "", amid(rng=torch.zeros(9, dtype=torch.uint8))),
    ("pseudo *", without("p_cls"), ""),
    ("pseudo *", torch.zeros(2, 2), ""),
    *each("rows", "", None, [None], [{"stage": "x", "epoch": 1}], [{"stage": "joint"}]),
    ("pseudo * p_cls", torch.Tensor.cfloat, ""),
    *each("fingerprint", "", None),
    *each("instances", "", None),
    *each("pseudo", "", [], {"x": {}}),
    ("pseudo * labels", lambda x: x + 99, ""),
    ("pseudo * status", lambda x: x - 9, ""),
    ("pseudo * scores", lambda x: x[1:], ""),
    *each("pseudo * segments", "", lambda x: x * math.nan, lambda x: x[:, :1]),
    ("settings lr", "fast", ""),
    ("settings joint_epochs", 10 ** 15, ""),
    ("settings", without("acp_tau"), "not of this version"),
]
THROUGH_COMMANDS = [
    ("settings channels", "16"), ("std 2", math.nan), ("ema cls_out.weight", with_nan),
    (None, ARCHIVES["cut"]), ("fingerprint", None), ("pseudo", []),
    ("optimizer state 0 exp_avg", torch.Tensor.double)]


@pytest.fixture(scope="module")
def content(original):
    """What the finished run's checkpoint holds; no test changes it."""
    return torch.load(original / "run/checkpoint.pt", weights_only=True)


@pytest.fixture(scope="module")
def going_on(original):
    """What runs expect that could go on from the finished one, by --resume and by --start."""
    out = original / "run"
    start = ("--start", out / "checkpoint.pt", "--out", original / "new")
    expected = []
    for argv in (["--resume", out], own_argv(original, *LOWEST, *start)):
        s = settings(*argv)
        run = train.begin(s, data.training_data(s))
        limits = dict.fromkeys(train.PSEUDO_LABEL.values()) | {
            "labels": len(run.data.classes), "status": len(icd.STATUS)}
        expected.append(resume.expected_of(run, train.STAGES, limits))
    return expected


def assert_told(capsys, words, function, *arguments):
    """The function refuses its input with a plain sentence that holds the words."""
    with pytest.raises(BadInput) as error:
        function(*arguments)
    complain(error.value)
    text = capsys.readouterr().err
    assert_plain(text)
    for word in ("checkpoint", *words.split("|")):
        assert word in text


@pytest.mark.parametrize(("where", "value", "words"), BAD_DETECTORS)
def test_detectors_that_lie_are_not_read(content, tmp_path, capsys, where, value, words):
    path = tmp_path / "checkpoint.pt"
    names = ("settings", "classes", "mean", "std", "fps", "detector", "ema")
    torch.save({name: content[name] for name in names}, path)
    spoil(path, where, value)
    for kind in (evaluate.DetectionSettings, train.Settings):
        assert_told(capsys, words, checkpoints.load, path, kind)


@pytest.mark.parametrize(("where", "value", "words"), BAD_RUNS)
def test_runs_that_lie_do_not_go_on(content, going_on, tmp_path, capsys, where, value, words):
    path = tmp_path / "old.pt"
    torch.save(changed(copy.deepcopy(content), where, value), path)
    for expected in going_on:
        assert_told(capsys, words, checkpoints.load, path, train.Settings, expected)


def test_a_checkpoint_that_does_not_lie_is_read_and_flipped_bits_are_refused(
        original, going_on, tmp_path):
    path = original / "run/checkpoint.pt"
    for expected in going_on:
        checkpoints.load(path, train.Settings, expected)
    whole = path.read_bytes()
    draw = random.Random(0)
    with zipfile.ZipFile(path) as archive:
        members = [m for m in archive.infolist() if m.file_size > 100]
    for member in draw.sample(members, 12):
        name, extra = struct.unpack_from("<HH", whole, member.header_offset + 26)
        first = member.header_offset + 30 + name + extra
        spoilt = bytearray(whole)
        spoilt[first + draw.randrange(member.file_size)] ^= 1 << draw.randrange(8)
        (tmp_path / "checkpoint.pt").write_bytes(spoilt)
        for kind in (evaluate.DetectionSettings, train.Settings):
            with pytest.raises(BadInput, match="checkpoint.pt"):
                checkpoints.load(tmp_path / "checkpoint.pt", kind)


@pytest.mark.parametrize(("where", "value"), THROUGH_COMMANDS)
def test_commands_refuse_checkpoints_that_lie(trained, capsys, where, value):
    path = trained / "run/checkpoint.pt"
    spoil(path, where, value)
    start = own_argv(trained, *LOWEST, "--start", path, "--out", trained / "new")
    of_run = where in ("fingerprint", "pseudo", "optimizer state 0 exp_avg")
    for argv in (resumed(trained), start, *([] if of_run else [evaluating(trained)])):
        refusal(argv, capsys, "checkpoint")
    assert not (trained / "new/checkpoint.pt").exists()


# ---- Data that changed or moved -----------------------------------------------------------------

def one_more(folder):
    shutil.copy(folder / "features/v1.npy", folder / "features/v77.npy")
    edit(folder, lambda database: database.update(v77=database["v1"]))


CHANGES = {
    "scaled": features(["v3"], lambda x: 2 * x),
    "shifted": features(["v8"], lambda x: x + 1),
    "one value": features(["v5"], lambda x: np.where(x == x.max(), 99, x)),
    "shorter": features(["v2"], lambda x: x[:-1]),
    "channels in another order": features(["v4"], lambda x: np.roll(x, 1, 1)),
    "label": actions(["v1"], 0, label="A"),
    "segment": actions(["v1"], 0, segment=[3.0, 8.0]),
    "fewer": edits(lambda database: database["v1"]["annotations"].pop()),
    "renamed": renamed("v4", "renamed"),
    "renamed labelled": renamed("v3", "renamed"),
    "one more": one_more,
    "one less": edits(lambda database: database.pop("v9")),
    "class": edits(lambda database: [
        a.update(label="Z") for entry in database.values() for a in entry["annotations"]
        if a["label"] == "A"]),
    "fps": entries(NAMES, fps=48),
}


@pytest.mark.parametrize("what", CHANGES)
def test_data_that_changed_before_resume_are_refused(trained, capsys, what):
    CHANGES[what](trained)
    before = files_of(trained / "run")
    refusal(resumed(trained), capsys, "other data")
    assert files_of(trained / "run") == before


def test_data_that_only_look_changed_are_resumed(trained):
    features(NAMES, lambda x: np.asfortranarray(x.astype(np.float64)))(trained)
    entries(["v1"], url="new")(trained)
    actions(["v4"], 0, segment=[3.0, 8.0])(trained)  # which no training reads
    assert train.main(resumed(trained)) == 0


@pytest.mark.parametrize(("change", "words"), [
    (features(TESTED, np.transpose), ["transposed", "4 videos"]),
    (features(TESTED, lambda x: np.zeros((64, 4))), ["is 4 wide", "5", "4 videos"]),
    (all_of(features(["v12"], np.zeros_like), actions(["v12"], 0, label="new")),
     ["v12", "'new'", "unknown"]),
    (no_features("v12"), ["v12", "not found", "--missing skip"]),
])
def test_other_data_are_refused_in_evaluation(trained, capsys, change, words):
    change(trained)
    text = refusal(evaluating(trained), capsys, *words)
    if "--missing skip" in text:  # the advice can be followed
        assert evaluated(*evaluating(trained, "--missing", "skip")[1:]) == 0


def test_the_time_axis_is_compared_in_evaluation_too(trained, capsys):
    entries(TESTED, fps=62)(trained)
    assert evaluated(*evaluating(trained)[1:]) == 0
    assert "4 videos" in capsys.readouterr().err


def test_a_run_that_moved_is_evaluated_without_its_training_videos(trained):
    no_features(*TRAINED)(trained)
    (trained / "features").rename(trained / "feats")
    argv = ("--checkpoint", trained / "run/checkpoint.pt", "--dataset", trained / "own.json",
            "--features", trained / "feats", "--json", trained / "out.json")
    assert evaluated(*argv) == 0
    expected = read_result(trained / "run/metrics.json")
    assert read_result(trained / "out.json")["ap"] == expected["ap"]


def test_a_published_dataset_that_moved_is_evaluated_by_its_root(tmp_path):
    root = tmp_path / "a"
    root.mkdir()
    write_published(root, "thumos")
    argv = ("--dataset", "thumos", "--root", root, "--ratio", 0.5, "--out", tmp_path / "run",
            *TINY, *SUPERVISED)
    assert train.main([str(word) for word in argv]) == 0
    root.rename(tmp_path / "b")
    argv = ("--checkpoint", tmp_path / "run", "--root", tmp_path / "b")
    assert evaluated(*argv, "--json", tmp_path / "out.json") == 0
    expected = read_result(tmp_path / "run/metrics.json")
    assert read_result(tmp_path / "out.json")["ap"] == expected["ap"]


# ---- Writing ------------------------------------------------------------------------------------

def test_targets_that_are_no_regular_file_are_written_as_they_are(own):
    argv = predict(own, perfect(own, TESTED))[1:]
    target = own / "target"
    os.mkfifo(target)
    read = []
    reader = threading.Thread(target=lambda: read.append(target.read_text()), daemon=True)
    reader.start()
    assert evaluated(*argv, "--json", target) == 0
    reader.join(30)
    assert stat.S_ISFIFO(target.stat().st_mode)
    assert json.loads(read[0])["average_mAP"] == pytest.approx(1)
    (own / "null").symlink_to("/dev/null")
    assert evaluated(*argv, "--json", own / "null") == 0
    assert (own / "null").is_symlink()
    assert stat.S_ISCHR((own / "null").stat().st_mode)
    (own / "link.json").symlink_to(own / "real.json")
    (own / "real.json").write_text("old")
    assert evaluated(*argv, "--json", own / "link.json") == 0
    assert (own / "link.json").is_symlink()
    assert "average_mAP" in read_result(own / "real.json")


def test_planted_links_are_not_followed(own):
    argv = predict(own, perfect(own, TESTED))[1:]
    victim = own / "victim"
    victim.write_text("precious")
    (own / "run").mkdir()
    names = ["checkpoint.pt", "metrics.json", "config.json", "split.json", "log.jsonl"]
    ending = f".{os.getpid()}.tmp"
    planted = ["out.json.tmp", f"out.json{ending}", "out.tmp", ".out.json.tmp"]
    for name in planted + [f"run/{name}{end}" for name in names for end in (".tmp", ending)]:
        (own / name).symlink_to(victim)
    assert evaluated(*argv, "--json", own / "out.json") == 0
    assert not (own / "out.json").is_symlink()
    assert train.main(own_argv(own, *SUPERVISED)) == 0
    assert victim.read_text() == "precious"


@contextlib.contextmanager
def small_disk(size):
    """Inside, no file can grow over `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_at_the_first_save_leaves_nothing(own, capsys):
    with small_disk(100_000):
        refusal(own_argv(own, *SUPERVISED), capsys, "cannot be written")
    assert not [path for path in (own / "run").iterdir()
                if path.suffix in (".tmp", ".pt", ".json")]


@pytest.mark.parametrize("size", [1, 700, 1300])
def test_a_full_disk_for_the_small_files(trained, capsys, size):
    before = (trained / "run/checkpoint.pt").read_bytes()
    with small_disk(size):
        refusal(resumed(trained), capsys)
    with small_disk(1):
        argv = ["evaluate", "--pred", trained / "run/predictions.json", "--gt",
                trained / "own.json", "--json", trained / "o.json"]
        refusal(argv, capsys, "o.json", "cannot be written")
    assert not list(trained.rglob("*.tmp"))
    assert (trained / "run/checkpoint.pt").read_bytes() == before
    assert train.main(resumed(trained)) == 0
    assert read_log(trained / "run")


# ---- The folder of a run ------------------------------------------------------------------------

RESULTS = ["checkpoint.pt", "metrics.json", "predictions.json", "pseudo_labels.json"]


@pytest.mark.parametrize(("kept", "more", "words"), [
    (None, ("--overwrite", "--lr", 1e12, "--clip", 1e12), ["diverged"]),
    (None, ("--overwrite", "--features", "none"), ["not found"]),
    (None, ("--overwrite", "--ratio", 0.01), ["0 of 10"]),
    (None, ("--overwrite", "--start", "none.pt"), ["none.pt"]),
    *((name, (), ["--resume", "--overwrite", "--out"]) for name in (None, *RESULTS)),
])
def test_nothing_old_goes_before_the_new_is_whole(trained, capsys, kept, more, words):
    for path in (trained / "run").iterdir() if kept else ():
        if path.name != kept:
            path.unlink()
    before = files_of(trained / "run")
    refusal(own_argv(trained, "--log-every", 1, *more), capsys, *words)
    after = files_of(trained / "run")
    assert [name for name in before if after.get(name) != before[name]] == []
    if not more:
        assert train.main(own_argv(trained, *SUPERVISED, "--overwrite")) == 0
        assert read_result(trained / "run/pseudo_labels.json") == {}
        after = files_of(trained / "run")
        assert before.get("checkpoint.pt") != after["checkpoint.pt"]


def test_a_run_holds_its_folder_while_it_trains(trained, capsys, monkeypatch):
    learning_rate = train.learning_rate
    others = [resumed(trained), own_argv(trained, "--overwrite")]

    def try_others(s, step, total):
        """The learning rate; at the first step other runs try the folder."""
        before = files_of(trained / "run")
        while others:
            refusal(others.pop(), capsys, "another run is writing", "--out")
        assert files_of(trained / "run") == before
        return learning_rate(s, step, total)

    for name in ("checkpoint.pt.4711.tmp", "metrics.json.4711.tmp"):  # of a run that was killed
        (trained / "run" / name).write_bytes(b"half")
    monkeypatch.setattr(train, "learning_rate", try_others)
    assert train.main(own_argv(trained, *SUPERVISED, "--overwrite")) == 0
    assert not others
    assert not list((trained / "run").glob("*.tmp"))
    assert train.main(["--resume", str(trained / "run")]) == 0  # the lock has gone with the run
    assert (trained / "run/metrics.json").exists()


def test_the_default_folder_is_a_free_one(own, monkeypatch):
    monkeypatch.chdir(own)
    for expected in ("runs/toy", "runs/toy-2", "runs/toy-3"):
        assert settings().out == expected
        (own / expected).mkdir(parents=True)
        (own / expected / "checkpoint.pt").write_text("")
    (own / "runs/toy-2/checkpoint.pt").unlink()
    assert settings().out == "runs/toy-2"
    assert settings("--overwrite").out == "runs/toy"
    argv = own_argv(own, *SUPERVISED)
    at = argv.index("--out")
    del argv[at:at + 2]
    assert train.main(argv) == 0
    assert train.main(argv) == 0
    assert (own / "runs/own/metrics.json").exists()
    assert (own / "runs/own-2/metrics.json").exists()


# ---- Warnings and errors of training ------------------------------------------------------------

@pytest.mark.parametrize(("more", "mark", "word", "number", "least", "most"), [
    ((*SUPERVISED, "--fps", 60), "span", "14 videos", r"--stride ([0-9.]+)", 29, 32),
    (("--theta-l", 0.999, "--joint-epochs", 1, "--pretrain-epochs", 0), "no pseudo label",
     "0.999", r"best score(?: seen)?(?: is)? ([0-9.e-]+)", 0, 0.999),
])
def test_warnings_are_repeated_at_the_end(own, capsys, more, mark, word, number, least, most):
    assert train.main(own_argv(own, *more)) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if mark in line]
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("warning: ")
        assert word in line
        assert least <= float(re.search(number, line)[1]) < most


def test_divergence_is_one_sentence(own, capsys):
    text = refusal(own_argv(own, "--lr", 1e12, "--clip", 1e12), capsys, "diverged", "--lr")
    assert re.search(r"step \d+ of stage (pretrain|supervised)", text)
    assert re.search(r"\bv\d\b", text)
    assert train.main(own_argv(own, "--stage", "pretrain", "--out", own / "one")) == 0
    good = own / "one/checkpoint.pt"
    more = ("--start", good, "--lr", 1e12, "--clip", 1e12, "--out", own / "two")
    refusal(own_argv(own, *more), capsys, "diverged", "stage supervised")
    more = ("--start", good, "--lr", 1e-5, *SUPERVISED[:2], "--out", own / "three")
    assert train.main(own_argv(own, *more)) == 0
    assert all(x.isfinite().all() for x in weights(own / "three").values())


def test_divergence_names_the_checkpoint_that_is_good(own, capsys, monkeypatch):
    check_finite = journal.check_finite

    def fail(run, what, value, ids):
        """In stage 2 the loss is no number."""
        bad = run.at.stage == "supervised" and run.at.step == 2
        check_finite(run, what, math.nan if bad else value, ids)

    monkeypatch.setattr(journal, "check_finite", fail)
    text = refusal(own_argv(own, *SUPERVISED[:2]), capsys, "diverged", "step 3", "supervised")
    path = re.search(r"--start (\S+) --lr (\S+)", text)
    assert path[1] == str(own / "run/checkpoint.pt")
    assert float(path[2]) < 1e-3
    monkeypatch.setattr(journal, "check_finite", check_finite)
    more = (*SUPERVISED[:2], "--start", path[1], "--lr", path[2], "--out", own / "new")
    assert train.main(own_argv(own, *more)) == 0


def test_threads_wait_without_spinning_unless_the_user_says_otherwise():
    code = "import train, os; print(os.environ.get('OMP_WAIT_POLICY'))"
    for given, expected in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment | given,
                              text=True, capture_output=True, check=True)
        assert done.stdout.strip() == expected


def test_a_pipe_closed_before_the_first_line(own):
    argv = [str(word) for word in predict(own, perfect(own, TESTED))[1:]]
    for command in (["train.py", *check(own, "--fps", 60)], ["evaluate.py", *argv]):
        end, start = os.pipe()
        os.close(end)
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, stdout=start, stderr=start, check=False)
        os.close(start)
        assert done.returncode == 0


# ---- Ctrl-C and --resume (test_train.py stops runs in every stage) ------------------------------

def test_a_signal_before_anything_is_saved(own, capsys, monkeypatch):
    load_dataset = data.training_data

    def interrupted(*arguments):
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        signal.raise_signal(signal.SIGINT)
        return load_dataset(*arguments)

    monkeypatch.setattr(data, "training_data", interrupted)
    assert train.main(own_argv(own)) == 130
    assert capsys.readouterr().err.count("\n") == 1
    assert not (own / "run/checkpoint.pt").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_in_evaluation(trained, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "detect", lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        code = evaluated(*evaluating(trained)[1:])
    except KeyboardInterrupt:
        pytest.fail("Ctrl-C came through")
    assert code == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_a_run_that_moved_is_resumed(original, own, monkeypatch):
    assert train.main(own_argv(own, "--stage", "pretrain", "--out", own / "part")) == 0
    moved = own / "elsewhere"
    moved.mkdir()
    for name in ("part", "own.json", "features"):
        (own / name).rename(moved / name)
    monkeypatch.chdir(moved)
    argv = ["--resume", "part", "--dataset", "own.json", "--features", "features", "--stage",
            "all", "--theta-l", "0"]
    assert train.main(argv) == 0
    assert same(weights(moved / "part"), weights(original / "run"))
    assert evaluated("--checkpoint", "part") == 0  # which knows the new places now


def test_resume_takes_the_settings_from_the_run(own, capsys):
    more = ("--seed", 3, "--ema", 0.5, "--ignore-labels", "C", "--log-every", 7)
    assert train.main(own_argv(own, *SUPERVISED, *more)) == 0
    before = read_result(own / "run/config.json")
    argv = ["--resume", str(own / "run")]
    assert train.main(argv) == 0
    assert read_result(own / "run/config.json") | {"resume": ""} == before
    refusal([*argv, "--seed", 4], capsys, "seed", "3", "4")
    refusal([*argv, "--channels", 32], capsys, "another configuration", "channels", "16", "32")
    refusal([*argv, "--out", own / "other"], capsys, "--out")
    refusal([*argv, "--overwrite"], capsys, "--overwrite")


def test_a_run_killed_at_its_first_save_keeps_the_rows_of_its_log(original, tmp_path, monkeypatch):
    argv = own_argv(original, *LOWEST, "--out", tmp_path / "run", "--log-every", 1)

    def killed(folder):
        raise SystemExit("between the checkpoint and the log")

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(runs.Folder, "clear", killed)
        train.main(argv)
    logged = len(torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["rows"])
    assert logged > 0
    assert not (tmp_path / "run/log.jsonl").exists()
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    rows = read_log(tmp_path / "run")
    assert [row["step"] for row in rows[:logged]] == list(range(1, logged + 1))
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert read_log(tmp_path / "run") == rows
