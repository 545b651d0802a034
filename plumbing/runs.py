"""Runs: signals and errors, the folder of a run with its lock and log, how fast it goes."""
import fcntl
import math
import re
import shlex
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch

from plumbing.files import append_row, read_rows, write_rows
from plumbing.processes import leave_processes, process_count, rows_of_all
from plumbing.words import BadInput, complain, is_first, several, warn

# ---- Signals and errors -------------------------------------------------------------------------

class Stopped(KeyboardInterrupt):
    """A signal has stopped the run: no error that what reads files would take for one of theirs."""


class Diverged(BadInput):
    """The loss or a gradient is no number any more."""


class Broken(BadInput):
    """The memory is too small, or another process has ended: the first process alone says so."""


@dataclass
class Stop:
    """Whether Ctrl-C or SIGTERM has asked a command to stop, and how it ended."""
    signal: int = 0  # which did; 0: none
    gently: bool = False  # whether a step is under way, which is finished and saved first
    way_on: str = ""  # "; " and how to go on from what is saved, in words
    lock: object = None  # the open file that keeps other runs out of the folder
    folder: Path = None  # which is that of the run
    code: int = 0  # the exit code


def on_signals(stop):
    """Let Ctrl-C, SIGTERM and SIGHUP fill a Stop -> what they did before, {signal: handler}.

    Raises Stopped where no step is under way, and at the second signal. What the shell ignores,
    as under nohup, stays ignored."""
    def handle(number, frame):
        again = stop.signal
        stop.signal = number
        if again or not stop.gently:
            raise Stopped
    if threading.current_thread() is not threading.main_thread():
        return {}  # Python sets handlers there alone
    heard = [number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
             if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handle) for number in heard}


def asked_to_stop(stop, device):
    """Whether a signal has reached this process, or another that shares the batch."""
    if process_count() > 1:
        signals = rows_of_all(torch.tensor([float(stop.signal)], device=device))
        stop.signal = int(signals.max())
    return stop.signal > 0


def cause_of(error):
    """The cause of an error, in words, where it is not ours; else ""."""
    said = str(error).lower()
    if isinstance(error, MemoryError) or "memory" in said:
        return "the memory is too small: lower --batch or --max-steps"
    if process_count() > 1 and re.search("gloo|nccl|connection", said):
        return "another process of the run has ended"
    return ""


@contextmanager
def watch(unsaved=""):
    """The signals and errors of a call from Python -> a Stop.

    Raises BadInput for input that cannot be used, a file that cannot be written or too little
    memory, and Stopped, a KeyboardInterrupt, after a signal, each with a sentence; anything else
    as it is.
    unsaved  how the sentence ends where nothing is saved"""
    stop = Stop()
    before = on_signals(stop)
    try:
        yield stop
        leave_processes()
    except Stopped:
        name = signal.Signals(stop.signal).name
        raise Stopped(f"stopped by {name}{stop.way_on or unsaved}") from None
    except Diverged:  # what is saved may be no way on
        raise
    except (BadInput, OSError) as error:
        raise BadInput(f"{error}{stop.way_on}") from None
    except (MemoryError, RuntimeError) as error:
        cause = cause_of(error)
        if not cause:
            raise
        raise Broken(f"{cause}{stop.way_on or unsaved}") from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if stop.lock:
            stop.lock.close()


@contextmanager
def guard(unsaved=""):
    """A command's signals and errors -> a Stop, whose `code` is the exit code afterwards.

    2 for bad input, 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP, each with the sentence
    of watch(). Others may wait for a process that failed: torchrun ends them."""
    try:
        with watch(unsaved) as stop:
            yield stop
    except Stopped as error:
        stop.code = 128 + stop.signal
        if is_first():
            complain(error)
    except BadInput as error:
        stop.code = 2
        if is_first() or not isinstance(error, Broken):
            complain(error)


# ---- The folder of a run ------------------------------------------------------------------------

RESULTS = ("metrics.json", "predictions.json", "pseudo_labels.json", "detector.pt", "page.html",
           "representation.json")
# What else a run writes: over that of a run before, and not removed at the first save.
OTHERS = ("checkpoint.pt", "config.json", "split.json", "videos.json", "log.jsonl")


def files_of_run(folder):
    """The files in a folder of a run, or of its names, that a new one would destroy."""
    return [name for name in (*RESULTS, *OTHERS) if (Path(folder) / name).exists()]


def free_folder(folder):
    """The folder, or that with the next number, which holds no run."""
    number = 1
    name = folder
    while files_of_run(name):
        number += 1
        name = f"{folder}-{number}"
    return name


def check_folder(s):
    """Raise BadInput where a new run would destroy one, or cannot have its folder."""
    if s.check:
        return
    found = files_of_run(s.out)
    if found and not s.resume and not s.overwrite:
        goes_on = f"--resume {shlex.quote(s.out)} goes on with it, "
        way_on = goes_on if "checkpoint.pt" in found else ""
        what = "a run" if way_on else f"files that a run would replace, {several(found)}"
        raise BadInput(f"{s.out} holds {what}: {way_on}--overwrite begins anew, another --out "
                       "keeps it")
    if Path(s.out).exists() and not Path(s.out).is_dir():
        raise BadInput(f"--out {s.out} is no folder")


def keep_others_out(folder):
    """The open file that keeps other runs out of a folder until it is closed; raises BadInput."""
    file = open(folder / ".lock", "a")  # noqa: SIM115, open as long as the run
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise BadInput(f"another run is writing to {folder}; give another --out") from None
    for left in folder.glob("*.tmp"):  # of a run that was killed while it wrote
        if re.fullmatch(r".+\.\d+\.tmp", left.name):
            left.unlink()
    return file


@dataclass
class Progress:
    """How far a run is."""
    stage: str
    epoch: int = 0  # of the stage, done so far
    step: int = 0  # of the stage, done so far
    done: int = 0  # steps of the epoch, done so far
    ema_step: int = 0  # steps of all stages, done so far

    def count_step(self):
        """One more step is done."""
        self.step += 1
        self.done += 1
        self.ema_step += 1


@dataclass
class Folder:
    """The folder of a run and its log; the first process writes.

    What lies in it goes when there is something better: until the first save, rows wait."""
    path: Path
    stop: Stop = field(default_factory=Stop)  # of the command
    saved: bool = False  # whether the files in it are this run's
    rows: list = field(default_factory=list)  # of the log, until then

    def open(self, stop):
        """Make it, and keep others out while a command's Stop lasts; raises BadInput."""
        self.stop = stop
        stop.folder = self.path
        if is_first():
            self.path.mkdir(parents=True, exist_ok=True)
            stop.lock = keep_others_out(self.path)

    def rows_until(self, at, stages):
        """Of the log of a resumed run the rows up to its checkpoint's Progress `at`.

        A run that was killed at its first save has them in the checkpoint alone. Rows that no run
        wrote are left out, which a warning counts."""
        path = self.path / "log.jsonl"
        reached = stages.index(at.stage), at.epoch + (at.done > 0), at.step
        found, others = read_rows(path, stages)
        if others:
            warn([f"{path}: {others} lines are no rows of a run, and left out"])
        return [row for row in self.rows or found if reached >= (
            stages.index(row["stage"]), row["epoch"], row.get("step", 0))]

    def begin(self, rows, way_on):
        """From here on the files in it are this run's, and rows are logged at once.

        rows    of the log so far
        way_on  how to go on, in words"""
        write_rows(self.path / "log.jsonl", rows)
        self.rows = []
        self.saved = True
        self.stop.way_on = f"; {way_on}"

    def log(self, at, **row):
        """A row of log.jsonl."""
        row = {"stage": at.stage, "epoch": at.epoch + 1} | row
        if self.saved:
            append_row(self.path / "log.jsonl", row)
        elif is_first():
            self.rows.append(row)


# ---- Time ---------------------------------------------------------------------------------------

class Pace:
    """How fast the steps of a stage go.

    plan  {stage: (epochs, steps of an epoch, cost of a step)} of the whole run
    step  done in this stage so far"""

    def __init__(self, plan, stage, step):
        epochs, steps, cost = plan[stage]
        rest = list(plan.values())[list(plan).index(stage):]
        self.total = epochs * steps  # steps of the stage
        self.whole = sum(map(math.prod, rest)) / cost  # and of those after it, at its pace
        self.first = step
        self.since = time.monotonic()  # a clock that is set does not matter

    def seconds(self, step):
        """Seconds a step, `step` being done now."""
        return (time.monotonic() - self.since) / max(step - self.first, 1)

    def time_left(self, step):
        """How long the whole run still takes at this pace, in words."""
        seconds = (self.whole - step) * self.seconds(step)
        return f"{timedelta(seconds=round(seconds))} left"

    def row(self, step):
        """What log.jsonl says of it."""
        seconds = max(self.seconds(step), 1e-9)
        return {"step": step, "of": self.total, "steps_a_second": 1 / seconds,
                "seconds_left": (self.total - step) * seconds}
