"""Fixtures of all tests; test_apl.py, one folder up, takes what it needs from here."""
import os
import signal

import numpy as np
import pytest
import torch

import data
import model
import train
from plumbing import public
from tests.helpers import SHARED, generator, own_argv, read_result, settings, write_own


def pytest_configure(config):
    config.addinivalue_line("markers", "campaign: the whole fault campaign, run by -m campaign")
    config.option.reportchars += "s"  # a test that is skipped says why
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # under nohup
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    # Sums depend on the number of threads, and a forked process has no other: one, everywhere.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(config, items):
    """Leave the large fault campaign out unless it is asked for."""
    if "campaign" not in (config.option.markexpr or ""):
        many = [item for item in items if item.get_closest_marker("campaign")]
        config.hook.pytest_deselected(items=many)
        items[:] = [item for item in items if item not in many]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def in_time():
    def fail(number, frame):
        raise TimeoutError("the test took 90 seconds")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(90)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def own(tmp_path):
    write_own(tmp_path)
    return tmp_path


@pytest.fixture
def run(own):
    """A train.Run of the user's data set, at the start of stage 3."""
    s = settings(*own_argv(own))
    run = train.begin(s, data.training_data(s))
    run.folder.path.mkdir()
    run.generator, run.at.stage = generator(), "joint"
    return run


@pytest.fixture
def tiny():
    """The public tiny ActionFormer: its outputs here, its settings, its reference arrays."""
    if not SHARED.exists():
        pytest.skip("the reference outputs lie in ../shared, which is absent")
    config = read_result(SHARED / "reference/actionformer_tiny.json")
    s = model.DetectorSettings(
        channels=config["embd_dim"], heads=config["n_head"], windows=str(config["n_mha_win_size"]),
        ranges=",".join(f"{low}:{high}" for low, high in config["regression_range"]), alqa="none")
    detector = model.Detector(config["input_dim"], config["num_classes"], s).eval()
    saved = torch.load(SHARED / "reference/actionformer_tiny.pth.tar", weights_only=True)
    detector.load_state_dict(public.public_weights(saved["state_dict"]))
    reference = np.load(SHARED / "reference/actionformer_tiny.npz")
    ref = {name: torch.from_numpy(reference[name]) for name in reference.files}
    return detector(ref["x"].transpose(1, 2), ref["mask"][:, 0]), config, ref
