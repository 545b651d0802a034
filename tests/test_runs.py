"""Tests of runs: checkpoints that lie, files that cannot be written, folders, signals, going on."""
import json
import math
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import evaluate
import train
from plumbing import journal
from tests import helpers, users
from tests.helpers import evaluated, own_argv, read_result, weights
from tests.test_faults import ARCHIVES, damage
from tests.test_train import fill_disk
from tests.users import LOWEST, NAMES, SUPERVISED, TESTED, actions, edits, features, refusal

pytestmark = pytest.mark.usefixtures("in_time")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A user's data set with a finished run; no test changes it."""
    folder = helpers.finished(tmp_path_factory, train.main, own_argv, *LOWEST)
    assert read_result(folder / "run/split.json")["labelled"] == ["v1", "v3", "v9"]
    return folder


@pytest.fixture
def trained(original, tmp_path, monkeypatch):
    """A copy of the data set with a finished run: all has moved into the working folder."""
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Command lines in that folder: a run goes on or is evaluated, a new one begins over it or from it.
PLACES = ("--dataset", "own.json", "--features", "features")
RESUME = ["--resume", "run", *PLACES]
EVALUATE = ["evaluate", "--checkpoint", "run", *PLACES]
NEW = own_argv(Path(), "--log-every", 1)
START = own_argv(Path(), *LOWEST, "--start", "run/checkpoint.pt", "--out", "new")


# ---- What is refused ----------------------------------------------------------------------------

def spoil(where, value):
    """A change of a run's checkpoint: another value at a place, or a function of what was there.

    where: keys with blanks between; * is the first video with pseudo labels; None: another file"""
    def change(folder):
        path = folder / "run/checkpoint.pt"
        if where is None:
            return damage(path, value)
        whole = place = {"": torch.load(path, weights_only=True)}
        key = ""
        for word in where.split():
            place, key = place[key], int(word) if word.isdigit() else word
            if key == "*":
                key = next(name for name, record in place.items() if len(record["labels"]))
        place[key] = value(place[key]) if callable(value) else value
        torch.save(whole[""], path)
    return change


def flipped(seed):
    """A change of an archive: another bit in one of its long members."""
    def change(path):
        draw, content = random.Random(seed), bytearray(path.read_bytes())
        with zipfile.ZipFile(path) as archive:
            member = draw.choice([m for m in archive.infolist() if m.file_size > 100])
        lengths = struct.unpack_from("<HH", content, member.header_offset + 26)  # of its names
        at = member.header_offset + 30 + sum(lengths) + draw.randrange(member.file_size)
        content[at] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
    return change


def without(name):
    """A change of a dict, which lacks a key."""
    return lambda content: {key: value for key, value in content.items() if key != name}


def with_nan(x):
    return torch.cat([x.flatten()[:-1], torch.tensor([math.nan])]).view(x.shape)


def amid(**fields):
    """A change: the run is in the midst of an epoch."""
    rng = {"torch": torch.get_rng_state(), "run": torch.Generator().get_state()}
    return lambda content: content | {"done": 1, "epoch": 1, "rng": rng} | fields


# (where in the checkpoint, words of the sentence with "|" between, the wrong values there)
BAD_DETECTORS = [
    *((f"settings {name}", f"not of this version|{name}", *values) for name, *values in (
        ("channels", "16", True, 16.0), ("heads", 0), ("batch", 0, None), ("stem", 10 ** 12),
        ("min_score", math.nan), ("fps", math.inf), ("features", 3), ("weights", "best"),
        ("tiou", [0.5], "0.5:0.9:0.15"), ("windows", [5, 5, 5], "5,x,5"))),
    ("settings pre_nms", "not of this version|pre_nms|must be of type int|'many'", "many"),
    ("settings channels", "not of this version", 8), ("settings", "", []),
    ("settings", "not of this version|nms_sigma", without("nms_sigma")),
    ("classes", "", None, [1, 2], ["A", "A"], ["A", "B", "C"]),
    ("std 2", "", 0.0, -1.0, math.nan, math.inf),
    ("mean", "", [0.0] * 5, torch.zeros(5, 1), torch.zeros(6), torch.zeros(5, dtype=torch.long),
     torch.zeros(1).expand(10 ** 15)),
    ("", "not of this version|5]|4]", lambda x: x | {"mean": torch.zeros(4), "std": torch.ones(4)}),
    ("ema", "", None, {}), ("", "checkpoint.pt", {"a": 1}), ("trust", "", {}, 3, {"score": 0.5}),
    ("trust score", "", None, 2.0, math.nan), ("trust exclusive", "", 1),
    ("ema cls_out.weight", "", with_nan, torch.Tensor.double, torch.Tensor.bool,
     torch.Tensor.tolist, lambda x: x.transpose(-1, -2)[..., :-1]),
    ("detector cls_out.weight", "", torch.Tensor.to_sparse, lambda x: x - math.inf),
    (None, "checkpoint.pt", *ARCHIVES.values(), *map(flipped, range(12))),
    (None, "checkpoint.pt|cannot be read", b"", b"\x80\x02}", b"text",
     lambda path: path.write_bytes(path.read_bytes()[:1000]),
     lambda path: torch.save({"a": subprocess.Popen}, path)),
]
BAD_RUNS = [
    ("optimizer state 0 exp_avg", "", lambda x: x[..., :-1], torch.Tensor.double,
     torch.Tensor.tolist), ("settings joint_epochs", "", 10 ** 15),
    ("optimizer state 0 exp_avg_sq", "", lambda x: x.view(-1)[0], lambda x: x * math.nan),
    ("optimizer state 0 step", "", None, lambda x: x.expand(7)), ("optimizer", "", {}, None),
    ("optimizer param_groups 0 lr", "", math.nan, "0.1"), ("settings lr", "", "fast"),
    ("optimizer param_groups", "", lambda groups: groups[::-1]),
    ("icd_optimizer state 0 exp_avg", "", lambda x: x.flatten()[:3]),
    ("icd", "", None, lambda state: {key: with_nan(x) for key, x in state.items()}),
    ("t_plus", "", torch.full((2,), math.nan), 100.0), ("epoch", "", "2", -1),
    ("stage", "", "final", ["joint"]), ("theta_h", "", math.nan),
    ("", "not of this version", without("theta_h")), ("done", "", 10 ** 30, torch.zeros(3)),
    ("", "", amid(processes="1"), amid(processes=torch.zeros(0)), *(amid(rng=rng) for rng in (
        None, {}, {"torch": torch.get_rng_state()[None], "run": torch.Generator().get_state()},
        "abc", {"torch": torch.zeros(3, dtype=torch.uint8)},
        torch.zeros(9, dtype=torch.uint8)))),
    ("rows", "", None, [None], [{"stage": "x", "epoch": 1}], [{"stage": "joint"}]),
    ("fingerprint", "", None), ("instances", "", None), ("pseudo", "", [], {"x": {}}),
    ("pseudo *", "", without("p_cls"), torch.zeros(2, 2)),
    ("pseudo * p_cls", "", torch.Tensor.cfloat), ("pseudo * labels", "", lambda x: x + 99),
    ("pseudo * status", "", lambda x: x - 9), ("pseudo * scores", "", lambda x: x[1:], torch.neg),
    ("pseudo * segments", "", lambda x: x * math.nan, lambda x: x[:, :1]),
    ("settings", "not of this version", without("acp_tau")),
]


def only(name):
    """A change: of the run's files this one is left, or all."""
    return lambda folder: [path.unlink() for path in (folder / "run").iterdir()
                           if name not in ("", path.name)]


OTHER_DATA = {  # changes for which a run does not go on
    "scaled": features(["v3"], lambda x: 2 * x), "shifted": features(["v8"], lambda x: x + 1),
    "one value": features(["v5"], lambda x: np.where(x == x.max(), 99, x)),
    "shorter": features(["v2"], lambda x: x[:-1]), "label": actions(["v1"], 0, label="A"),
    "channels in another order": features(["v4"], lambda x: np.roll(x, 1, 1)),
    "segment": actions(["v1"], 0, segment=[3.0, 8.0]),
    "one more": users.all_of(
        lambda folder: shutil.copy(folder / "features/v1.npy", folder / "features/v77.npy"),
        edits(lambda database: database.update(v77=database["v1"]))),
    "fewer": edits(lambda database: database["v1"]["annotations"].pop()),
    "renamed": users.renamed("v4", "new"), "renamed labelled": users.renamed("v3", "new"),
    "one less": users.without("v9"), "fps": users.entries(NAMES, fps=48),
    "class": edits(lambda database: [
        a.update(label="Z") for entry in database.values() for a in entry["annotations"]
        if a["label"] == "A"])}
# (name, a change, command lines, words of the sentence with "|" between)
REFUSED = [
    *((f"{where} of {commands[0][0]}", spoil(where, value), commands, f"checkpoint|{words}")
      for table, commands in (
          (BAD_DETECTORS, (EVALUATE, RESUME, START)), (BAD_RUNS, (RESUME, START)))
      for where, words, *values in table for value in values),
    *((name, change, [RESUME], "other data") for name, change in OTHER_DATA.items()),
    *((f"{name} is there", only(name), [NEW], "--resume|--overwrite|--out")
      for name in ("", "checkpoint.pt")),
    *((f"{name} is there", only(name), [NEW], f"{name}: --overwrite|--out")
      for name in ("metrics.json", "predictions.json", "pseudo_labels.json", "split.json")),
    *((" ".join(more), users.nothing, [[*argv, *more]], words) for argv, more, words in (
        (NEW, ["--overwrite", "--lr", "1e12", "--clip", "1e12"], "diverged"),
        (NEW, ["--overwrite", "--features", "none"], "not found"),
        (NEW, ["--overwrite", "--ratio", "0.01"], "0 of 10"),
        (NEW, ["--overwrite", "--start", "none.pt"], "none.pt"),
        (START, ["--lambda-u", "3"], "another configuration|lambda_u"),
        (RESUME, ["--seed", "4"], "another configuration|its seed is 0, not 4"),
        (RESUME, ["--channels", "32"], "another configuration|its channels is 16, not 32"),
        (RESUME, ["--out", "other"], "--out"), (RESUME, ["--overwrite"], "--overwrite"))),
    *((words, change, [EVALUATE], words) for change, words in (
        (features(TESTED, np.transpose), "transposed|4 videos"),
        (features(TESTED, lambda x: np.zeros((64, 4))), "has 4 channels|5|4 videos"),
        (users.all_of(features(["v12"], np.zeros_like), actions(["v12"], 0, label="new")),
         "v12|'new'|unknown"),
        (users.no_features("v12"), "v12|not found|--missing skip"))),
]


def files_of(folder):
    """{name: content} of what a run has written."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.mark.parametrize(
    ("change", "commands", "words"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_is_refused_leaves_the_run_as_it_was(trained, capsys, change, commands, words):
    change(trained)
    before = files_of(trained / "run")
    for argv in commands:
        refusal(argv, capsys, *words.split("|"))
    assert files_of(trained / "run") == before
    assert not (trained / "new/checkpoint.pt").exists()
    # The advice can be followed.
    if "--missing skip" in words:
        assert evaluated(*EVALUATE[1:], "--missing", "skip") == 0
    if "--resume|--overwrite" in words:
        assert train.main(own_argv(trained, *SUPERVISED, "--overwrite")) == 0
        assert read_result(trained / "run/pseudo_labels.json") == {}
        assert before.get("checkpoint.pt") != files_of(trained / "run")["checkpoint.pt"]


def test_a_checkpoint_of_an_older_version_goes_on_and_is_evaluated(trained):
    path = trained / "run/checkpoint.pt"
    content = torch.load(path, weights_only=True)
    for name in ("rows", "trust"):
        del content[name]
    for name in ("skip_columns", "fill_gaps", "input_jitter", "input_view", "passes"):
        del content["settings"][name]
    content["icd_optimizer"]["param_groups"][0]["fused"] = None
    former = content["settings"] | {"icd_steps": 0, "pseudo_weights": "raw"}
    torch.save(content | {"settings": former}, path)
    (trained / "run/metrics.json").unlink()
    assert evaluated(*EVALUATE[1:]) == 0
    assert train.main(RESUME) == 0
    assert (trained / "run/metrics.json").exists()


# ---- Data that moved, results, the folder of a run ----------------------------------------------

def test_data_that_only_look_changed_go_on_and_a_test_needs_no_training_videos(trained, capsys):
    features(NAMES, lambda x: np.asfortranarray(x.astype(np.float64)))(trained)
    users.entries(["v1"], url="new")(trained)
    actions(["v4"], 0, segment=[3.0, 8.0])(trained)  # which no training reads
    assert train.main(RESUME) == 0
    users.no_features(*users.TRAINED)(trained)
    (trained / "features").rename("feats")
    argv = (*EVALUATE[1:], "--features", "feats", "--json", "out.json")
    assert evaluated(*argv) == 0
    found, expected = map(read_result, (trained / "out.json", trained / "run/metrics.json"))
    assert found["ap"] == expected["ap"]
    capsys.readouterr()
    users.entries(TESTED, fps=62)(trained)  # the time axis is compared too
    assert evaluated(*argv) == 0
    assert "4 videos" in capsys.readouterr().err


def test_results_go_through_links_and_pipes_but_not_through_planted_links(own, monkeypatch):
    monkeypatch.chdir(own)
    argv = users.predict(own, users.perfect(own, TESTED))[1:]
    victim, pipe, null, link = (Path(name) for name in ("victim", "pipe", "null", "link.json"))
    victim.write_text("precious")
    Path("real.json").write_text('{"tiou": [0.5]}')
    Path("run").mkdir()
    ending = f".{os.getpid()}.tmp"
    names = ["checkpoint.pt", "metrics.json", "config.json", "split.json", "log.jsonl"]
    planted = ["out.json.tmp", f"out.json{ending}", "out.tmp", ".out.json.tmp"]
    for name in planted + [f"run/{name}{end}" for name in names for end in (".tmp", ending)]:
        Path(name).symlink_to(own / victim)
    os.mkfifo(pipe)
    null.symlink_to("/dev/null")
    link.symlink_to("real.json")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    for target in (pipe, null, link, "out.json"):
        assert evaluated(*argv, "--json", target) == 0
    assert train.main(own_argv(own, *SUPERVISED)) == 0
    assert pipe.is_fifo()
    assert json.loads(os.read(reader, 10 ** 6))["average_mAP"] == pytest.approx(1)
    assert (null.is_symlink(), null.is_char_device(), link.is_symlink()) == (True, True, True)
    assert "average_mAP" in read_result(Path("real.json"))
    assert not Path("out.json").is_symlink()
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("size", [1, 700, 1300])
def test_a_full_disk_leaves_what_was_there(trained, capsys, request, size):
    before = (trained / "run/checkpoint.pt").read_bytes()
    free = fill_disk(100_000)  # too small for the first save
    request.addfinalizer(lambda: fill_disk(free))
    refusal(own_argv(trained, *SUPERVISED, "--out", "new"), capsys, "cannot be written")
    fill_disk(size)
    refusal(RESUME, capsys)
    fill_disk(1)
    argv = ["evaluate", "--pred", "run/predictions.json", "--gt", "own.json", "--json", "o.json"]
    refusal(argv, capsys, "o.json", "cannot be written")
    fill_disk(free)
    left = [path.suffix for path in [*Path("new").iterdir(), *trained.rglob("*.tmp")]]
    assert not {".tmp", ".pt", ".json"} & set(left)
    assert (trained / "run/checkpoint.pt").read_bytes() == before
    assert train.main(RESUME) == 0
    assert helpers.read_log(trained / "run")


def test_a_run_holds_its_folder_and_its_settings(trained, capsys, monkeypatch):
    learning_rate, others = train.learning_rate, [RESUME, [*NEW, "--overwrite"]]

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
    more = ("--seed", 3, "--ema", 0.5, "--ignore-labels", "C", "--log-every", 7, "--overwrite")
    assert train.main(own_argv(trained, *SUPERVISED, *more)) == 0
    assert not others
    assert not list((trained / "run").glob("*.tmp"))
    before = read_result(trained / "run/config.json")
    assert train.main(["--resume", str(trained / "run")]) == 0  # the lock has gone with the run
    assert (trained / "run/metrics.json").exists()
    assert read_result(trained / "run/config.json") | {"resume": "", "overwrite": True} == before


def test_the_default_folder_is_a_free_one(own, monkeypatch):
    monkeypatch.chdir(own)
    for expected in ("runs/toy", "runs/toy-2", "runs/toy-3"):
        assert helpers.settings().out == expected
        Path(expected).mkdir(parents=True)
        Path(expected, "checkpoint.pt").write_text("")
    Path("runs/toy-2/checkpoint.pt").unlink()
    assert helpers.settings().out == "runs/toy-2"
    assert helpers.settings("--overwrite").out == "runs/toy"
    argv = own_argv(own, *SUPERVISED)
    at = argv.index("--out")
    del argv[at:at + 2]
    for expected in ("runs/own", "runs/own-2"):
        assert train.main(argv) == 0
        assert Path(expected, "metrics.json").exists()


# ---- Warnings, errors, signals (test_train.py stops runs in every stage) ------------------------

@pytest.mark.parametrize(("more", "mark", "word", "number", "least", "most"), [
    ((*SUPERVISED, "--fps", 60), "span", "14 videos", r"--stride ([0-9.]+)", 29, 32),
    (("--theta-l", 0.999, "--joint-epochs", 1, "--pretrain-epochs", 0), "no pseudo label",
     "0.999", r"best score(?: seen)?(?: is)? ([0-9.e-]+)", 0, 0.999)])
def test_warnings_are_said_once_and_counted_at_the_end(
        own, capsys, more, mark, word, number, least, most):
    assert train.main(own_argv(own, *more)) == 0
    printed = capsys.readouterr()
    [line] = [line for line in printed.err.splitlines() if mark in line]
    assert line.startswith("warning: ") and word in line
    assert least <= float(re.search(number, line)[1]) < most
    count = printed.err.count("warning: ") - printed.err.count("without effect")
    assert f"{count} warning(s) stand above" in printed.out


def test_divergence_is_one_sentence_that_names_the_checkpoint_that_is_good(
        own, capsys, monkeypatch):
    too_high = ("--lr", 1e12, "--clip", 1e12)
    text = refusal(own_argv(own, *too_high), capsys, "diverged", "--lr")
    assert re.search(r"step \d+ of stage (pretrain|supervised)", text)
    assert re.search(r"\bv\d\b", text)
    check_finite = journal.check_finite

    def fail(run, what, value, ids):
        """In stage 2 the loss is no number."""
        bad = run.at.stage == "supervised" and run.at.step == 2
        check_finite(run, what, math.nan if bad else value, ids)

    with monkeypatch.context() as patch:
        patch.setattr(journal, "check_finite", fail)
        text = refusal(own_argv(own, *SUPERVISED[:2]), capsys, "diverged", "step 3", "supervised")
    path, lr = re.search(r"--start (\S+) --lr (\S+)", text).groups()
    assert path == str(own / "run/checkpoint.pt")
    assert float(lr) < 1e-3
    more = (*SUPERVISED[:2], "--start", path, "--out", own / "new")
    refusal(own_argv(own, *more, *too_high), capsys, "diverged", "stage supervised")
    assert train.main(own_argv(own, *more, "--lr", lr)) == 0
    assert all(x.isfinite().all() for x in weights(own / "new").values())


def test_threads_wait_without_spinning_unless_the_user_says_otherwise():
    code = "import train, os; print(os.environ.get('OMP_WAIT_POLICY'))"
    clean = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    for given, expected in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        done = subprocess.run([sys.executable, "-c", code], cwd=helpers.ROOT, env=clean | given,
                              text=True, capture_output=True, check=True)
        assert done.stdout.strip() == expected


def test_a_pipe_closed_before_the_first_line(own):
    argv = [str(word) for word in users.predict(own, users.perfect(own, TESTED))[1:]]
    end, start = os.pipe()
    os.close(end)
    for command in (["train.py", *users.check(own, "--fps", 60)], ["evaluate.py", *argv]):
        assert subprocess.call([sys.executable, *command], cwd=helpers.ROOT, stdout=start,
                               stderr=start) == 0
    os.close(start)


def test_ctrl_c_before_anything_is_saved_and_in_evaluation(trained, capsys, monkeypatch):
    def interrupted(*_):
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(data, "training_data", interrupted)
    monkeypatch.setattr(evaluate, "detect", interrupted)
    new = own_argv(trained, "--out", trained / "new")
    for main, argv in ((train.main, new), (evaluate.main, EVALUATE[1:])):
        assert main(argv) == 130
        assert capsys.readouterr().err.count("\n") == 1
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not (trained / "new/checkpoint.pt").exists()


def test_a_run_that_moved_is_resumed(original, own, monkeypatch):
    assert train.main(own_argv(own, "--stage", "pretrain")) == 0
    (own / "elsewhere").mkdir()
    for name in ("run", "own.json", "features"):
        (own / name).rename(own / "elsewhere" / name)
    monkeypatch.chdir(own / "elsewhere")
    assert train.main([*RESUME, "--stage", "all", "--theta-l", "0"]) == 0
    assert helpers.same(weights(Path("run")), weights(original / "run"))
    assert evaluated("--checkpoint", "run") == 0  # which knows the new places now
