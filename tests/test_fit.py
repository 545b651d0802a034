"""Tests of train.fit(), a run from Python, and of what --help shows of each command."""
import re
import signal
import threading
from dataclasses import asdict

import numpy as np
import pytest

import data
import evaluate
import train
from extras import bmn, pgcn, spot
from plumbing import journal
from plumbing.arguments import settings_of, words_of
from plumbing.runs import Stopped
from plumbing.words import BadInput
from tests.helpers import finished, own_argv, read_log, read_result, same, weights

QUICK = {"stage": "supervised", "acp": "none", "supervised_epochs": 1}


def own_settings(own, **changes):
    """own_argv() as settings in Python, with changes."""
    words = iter(own_argv(own))
    given = {}
    for word in words:
        name = word[2:].replace("-", "_")
        if name.startswith("no_"):
            given[name[3:]] = False
        else:
            given[name] = next(words)
    return given | {"stride": 25, "ratio": np.float64(0.3), "split": None} | changes


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A user's data set with a finished run of the command line."""
    return finished(tmp_path_factory, train.main, own_argv)


def interrupting(monkeypatch, number, at_step):
    """A signal comes at a step of stage 2."""
    show_step = journal.show_step

    def show(run, parts):
        show_step(run, parts)
        if run.at.stage == "supervised" and run.at.step == at_step:
            signal.raise_signal(number)

    monkeypatch.setattr(journal, "show_step", show)


# ---- A run from Python --------------------------------------------------------------------------

@pytest.mark.parametrize("in_thread", [False, True])
def test_fit_is_the_command_line(whole, tmp_path, in_thread):
    found = []

    def work():
        found.append(train.fit(**own_settings(
            whole, dataset=whole / "own.json", out=tmp_path / "run")))

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    if in_thread:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    else:
        work()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    (metrics, localize), = found
    assert same(weights(whole / "run"), weights(tmp_path / "run"))
    assert metrics == read_result(whole / "run/metrics.json")
    video = np.load(whole / "features/v12.npy")
    expected = evaluate.Localizer(whole / "run", device="cpu")(video)
    assert len(expected[0]) > 0
    for mine, theirs in zip(localize(video), expected):
        assert np.array_equal(mine, theirs)


def test_a_run_without_tests_a_check_and_the_other_detector(own, capsys):
    s = own_settings(own, **QUICK)
    assert train.fit(**s, check=True) == (None, None)
    assert not (own / "run").exists()
    metrics, localize = train.fit(**s, test_subset="none")
    assert metrics is None
    assert localize.s.test_subset == "none"
    small = {"hidden": 8, "map_wide": 8, "map_width": 4, "samples": 4, "max_steps": 40}
    metrics, localize = train.fit(kind=bmn.Settings, **s | small | {"out": own / "bmn"})
    assert metrics["videos"] == 4
    assert isinstance(localize.detector, bmn.Detector)
    assert "error" not in capsys.readouterr().err


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"strid": 25}, "strid is no setting; do you mean stride?"),
    ({"supervised_epoch": 1}, "supervised_epoch is no setting; do you mean supervised_epochs?"),
    ({"zzz": 1}, "zzz is no setting"),
    ({"stride": "wide"}, "'wide'"),
    ({"lr": -1}, "setting lr must be positive"),
    ({"seed": 0.5}, "'0.5'"),
    ({"audit": "yes"}, "--audit/--no-audit: ignored explicit argument 'yes'"),
    ({"audit": 1}, "--audit/--no-audit: ignored explicit argument '1'"),
    ({"alqa": "diuo"}, "must be one of none, tiou, diou"),
    ({"windows": [9, 9]}, "setting windows"),
    ({"dataset": "absent.json"}, "absent.json"),
    ({"resume": "absent", "out": None}, "absent"),
])
def test_wrong_settings_are_raised_as_a_sentence_and_nothing_is_written(
        own, capsys, changes, sentence):
    with pytest.raises(BadInput, match=re.escape(sentence)) as raised:
        train.fit(**own_settings(own, **changes))
    assert "\n" not in str(raised.value)
    assert capsys.readouterr().err == ""
    assert not (own / "run").exists()


def test_a_run_is_not_destroyed(own):
    s = own_settings(own, **QUICK)
    train.fit(**s)
    with pytest.raises(BadInput, match="holds a run"):
        train.fit(**s)
    assert train.fit(**s, check=True) == (None, None)
    assert train.fit(**s, overwrite=True)[0] is not None


# ---- Signals and errors -------------------------------------------------------------------------

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_step_and_raises_keyboard_interrupt(
        whole, tmp_path, monkeypatch, capsys, number):
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        interrupting(patch, number, 2)
        with pytest.raises(KeyboardInterrupt, match=f"{number.name}.*--resume {tmp_path}/run"):
            train.fit(**own_settings(whole, out=tmp_path / "run"))
    assert signal.getsignal(number) is handler
    assert capsys.readouterr().err == ""
    metrics, _ = train.fit(resume=tmp_path / "run")
    assert metrics == read_result(whole / "run/metrics.json")
    assert same(weights(whole / "run"), weights(tmp_path / "run"))


def test_a_signal_before_anything_is_saved(own, monkeypatch):
    monkeypatch.setattr(data, "training_data", lambda s: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Stopped, match="stopped by SIGINT; nothing was saved yet"):
        train.fit(**own_settings(own))


@pytest.mark.parametrize(("error", "kind", "sentence"), [
    (MemoryError(), BadInput, "the memory is too small: .*; nothing was saved yet"),
    (RuntimeError("out of memory"), BadInput, "the memory is too small"),
    (OSError(28, "No space left on device"), BadInput, "No space left"),
    (RuntimeError("a fault of ours"), RuntimeError, "a fault of ours"),
    (ValueError("a fault of ours"), ValueError, "a fault of ours")])
def test_what_the_user_can_mend_is_bad_input(own, monkeypatch, error, kind, sentence):
    def fail(s):
        raise error

    monkeypatch.setattr(data, "training_data", fail)
    with pytest.raises(kind, match=sentence):
        train.fit(**own_settings(own))


def test_an_error_amid_a_run_says_how_to_go_on(own, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(journal, "report", fail)
    with pytest.raises(BadInput, match=r"No space left.*--resume .*run goes on"):
        train.fit(**own_settings(own, **QUICK))
    monkeypatch.undo()
    rows = read_log(own / "run")
    assert train.fit(resume=own / "run")[0] is not None
    assert read_log(own / "run") == rows  # no step was left to do


# ---- Words --------------------------------------------------------------------------------------

@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("dataset", ["toy", "thumos", "activitynet", "epic-noun", "own.json"])
def test_settings_in_python_are_those_of_the_command_line(dataset, paper):
    argv = ["--dataset", dataset, "--device", "cpu", "--out", "a=b c", *["--paper"] * paper]
    s = settings_of(argv, train.Settings)
    assert settings_of(words_of(asdict(s), train.Settings), train.Settings) == s
    given = {"dataset": dataset, "device": "cpu", "out": "a=b c", "paper": paper, "split": None}
    assert settings_of(words_of(given, train.Settings), train.Settings) == s


COMMANDS = {
    "train": (train.main, (), "python train.py --resume runs/my"),
    "evaluate": (evaluate.main, (), "python evaluate.py --pred pred.json"),
    "bmn": (bmn.main, (), "python -m extras.bmn --checkpoint runs/my --features video.npy"),
    "spot": (spot.main, (), "python -m extras.spot --checkpoint runs/my --features video.npy"),
    "bmn as evaluate": (bmn.main, ("--checkpoint", "x"), "python -m extras.bmn --proposals"),
    "bmn export": (bmn.main, ("--export-proposals", "x"), "python -m extras.bmn --proposals"),
    "pgcn": (pgcn.main, (), "python -m extras.pgcn --proposals FILE --dataset my.json"),
    "pgcn as evaluate": (pgcn.main, ("--checkpoint", "x"), "python -m extras.pgcn --resume"),
    "bmn proposals": (bmn.main, ("--proposals", "x"), "python -m extras.bmn [-h] --proposals"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_the_commands_own_lines(capsys, name):
    main, argv, line = COMMANDS[name]
    with pytest.raises(SystemExit, match="^0$"):
        main([*argv, "--help"])
    text = capsys.readouterr().out
    assert line in text
    programs = ("train.py", "evaluate.py", "extras.bmn", "extras.pgcn", "extras.spot")
    shown = [name for name in programs
             if f"python {name}" in text or f"python -m {name}" in text]
    assert len(shown) == 1, shown


@pytest.mark.parametrize(("detector", "first"), [(bmn, "--hidden"), (spot, "--mask-hidden")])
def test_help_of_another_detector_shows_the_settings_that_it_has(capsys, detector, first):
    with pytest.raises(SystemExit, match="^0$"):
        detector.main(["--help"])
    text = capsys.readouterr().out
    for name in detector.Settings.__annotations__:
        assert f"--{name.replace('_', '-')} " in text
    for name in detector.Settings.UNUSED:
        assert not re.search(rf"--{name.replace('_', '-')}\b", text), name
    assert text.index(first) < text.index("--theta-l") < text.index("--input-dropout")
