"""Tests of extras/windows.py and extras/video_features.py: from recordings to features."""
import json
import statistics
import sys

import numpy as np
import pytest
import torch

import train
from extras import video_features, windows
from plumbing.words import BadInput
from tests.helpers import SHARED, needs_shared, own_argv
from tests.users import assert_plain

RNG = np.random.default_rng(0)


def noise(rows, channels):
    """Rows of a sensor."""
    return RNG.normal(size=(rows, channels))


def with_clock(times, channels=2):
    """Rows of a sensor behind a column of times."""
    return np.column_stack([times, noise(len(times), channels)])


def write(path, rows, header=""):
    """Write a recording, as the ending says; the header has commas."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, rows)
        return
    between = "\t" if path.suffix == ".tsv" else ","
    header = header.replace(",", between)
    np.savetxt(path, rows, fmt="%.17g", delimiter=between, header=header, comments="")


def run(main, *argv):
    """The exit code of a command."""
    return main([str(word) for word in argv])


def refused_by(main, argv, capsys, *words):
    """The command exits with 2, and its error is a plain sentence that holds the words."""
    capsys.readouterr()
    assert run(main, *argv) == 2
    error = capsys.readouterr().err.splitlines(keepends=True)[-1]
    assert error.startswith("error: ")
    assert_plain(error)
    for word in words:
        assert word in error, error


def files_in(folder):
    """The files below a folder by their names from there."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# ---- Windows ------------------------------------------------------------------------------------

def by_hand(rows, window, stride):
    """The features of rows, number by number."""
    features = []
    for start in range(0, len(rows), stride):
        channels = [list(map(float, channel)) for channel in rows[start:start + window].T]
        if len(channels[0]) < window:
            break
        changes = [[abs(b - a) for a, b in zip(x, x[1:])] for x in channels]
        features.append([
            *map(statistics.fmean, channels), *map(statistics.pstdev, channels),
            *map(min, channels), *map(max, channels), *map(statistics.fmean, changes)])
    return np.array(features)


@pytest.mark.parametrize("rows, channels, window, stride, number", [
    (10, 3, 4, 2, 4), (11, 3, 4, 2, 4), (10, 1, 10, 3, 1), (10, 2, 2, 5, 2), (9, 2, 3, 1, 7)])
@pytest.mark.parametrize("ending", [".csv", ".tsv", ".npy"])
def test_windows_are_what_a_count_by_hand_gives(
        tmp_path, capsys, rows, channels, window, stride, number, ending):
    x = noise(rows, channels)
    write(tmp_path / f"raw/a{ending}", x)
    assert run(windows.main, tmp_path / "raw", "--out", tmp_path / "out", "--window", window,
               "--stride", stride, "--rate", 50) == 0
    features = np.load(tmp_path / "out/a.npy")
    assert features.dtype == np.float32
    assert features.shape == (number, 5 * channels)
    np.testing.assert_allclose(features, by_hand(x, window, stride), rtol=1e-6, atol=1e-7)
    assert f"--stride {stride} --frames {window} --fps 50\n" in capsys.readouterr().out


def assert_blocks(features, window):
    """The blocks are means, standard deviations, minima, maxima, mean absolute differences.

    Of n numbers that span s the standard deviation lies from s / sqrt(2 n) to s / 2, and n - 1
    steps between them are s / (n - 1) long or more; no other order of blocks obeys all of it."""
    x = features.astype(np.float64)
    slack = 0.002 * (1 + abs(x).max(0).reshape(5, -1).max(0))  # of float16
    mean, std, low, high, change = np.split(x, 5, axis=1)
    span = high - low
    least = np.sqrt(2 * window)
    assert ((low - slack <= mean) & (mean <= high + slack)).all()
    assert ((span / least - slack <= std) & (std <= span / 2 + slack)).all()
    assert (span / (window - 1) - slack <= change).all()
    assert (span / least - slack > change).any()  # it is no standard deviation


@needs_shared
def test_hapt_features_have_the_same_blocks():
    for path in sorted((SHARED / "data/hapt/features").glob("*.npy")):
        assert_blocks(np.load(path), 50)
    slow = np.cumsum(noise(2000, 8), axis=0)
    features = windows.features_of(slow, 50, 25)
    assert_blocks(features, 50)
    for order in ((1, 0, 2, 3, 4), (0, 1, 3, 2, 4), (0, 4, 2, 3, 1)):
        with pytest.raises(AssertionError):
            assert_blocks(np.hstack([np.split(features, 5, axis=1)[i] for i in order]), 50)


EVEN = np.arange(200)
JITTER = EVEN + RNG.uniform(-0.2, 0.2, 200)
SECONDS = "by its clock in seconds"
ASSUMED = "assumed by its size"


@pytest.mark.parametrize("ending, header, rows, left_out, said", [
    (".csv", "time,x,y", with_clock(EVEN / 50), "time", f"50 rows a second {SECONDS}, {ASSUMED}"),
    (".csv", '"Time",x,y', with_clock(1.6e9 + EVEN / 50), "Time", "50 rows a second"),
    (".tsv", "timestamp,x,y", with_clock(20 * EVEN), "timestamp", f"milliseconds, {ASSUMED}"),
    (".csv", "t,x,y", with_clock(1.6e18 + 2e7 * EVEN), "t", f"nanoseconds, {ASSUMED}"),
    (".csv", "Time (s),x,y", with_clock(2 * EVEN), "Time (s)", f"0.5 rows a second {SECONDS}"),
    (".csv", "date_us,x,y", with_clock(4 * EVEN), "date_us", "250000 rows a second by its clock"),
    (".csv", "time,x,y", with_clock(np.repeat(EVEN[::2], 2)), "time", "rows a second"),
    (".csv", "", with_clock(JITTER / 50), "column 1", "rows a second"),
    (".npy", "", with_clock(EVEN / 4), "column 1", f"4 rows a second {SECONDS}, {ASSUMED}"),
    (".npy", "", with_clock(20 * EVEN).astype(int), "column 1", "50 rows a second"),
    (".csv", "index,time,x", np.column_stack([EVEN, with_clock(EVEN / 50, 1)]), "index, time",
     "50 rows a second"),
    (".csv", ",x,y", with_clock(EVEN), "column 1", None),
    (".csv", "index,x,y", with_clock(20 * EVEN), "index", None),
    *((".csv", f"{name},x,y", with_clock(np.repeat(EVEN[::2], 2) / 50), name, SECONDS)
      for name in ("seconds_elapsed", "Time (sec)", "time_stamp", "Timestamp (seconds)", "unix")),
    (".csv", "elapsed_ms,x,y", with_clock(20 * JITTER), "elapsed_ms", "clock in milliseconds\n"),
    (".csv", "time,x,y", with_clock(1.7e9 + 1200 * EVEN), "time", "0.000833333 rows a second"),
    (".csv", "time,x,y", with_clock(EVEN), "time", f"1 rows a second {SECONDS}, {ASSUMED}"),
    (".csv", "unix,x,y", with_clock(1.7e9 + 5 * EVEN), "unix", "0.2 rows a second"),
    (".csv", "unix,x,y", with_clock(1.7e12 + 5000 * EVEN), "unix", "0.2 rows a second"),
    *((".csv", "time,x,y", with_clock(start + step * EVEN), "time", "50 rows a second")
      for start, step in ((5.2e13, 2e7), (2e12, 2e7), (2e9, 2e4))),  # since a phone was started
    *((".csv", f"{name},x,y", with_clock(20 * np.repeat(EVEN[::2], 2)), name, "50.2525")
      for name in ("ts", "times", "timems", "timestamps")),
    (".csv", "time0,x,y", noise(200, 3), None, None),
    (".csv", "x,time,y", noise(200, 3), None, None),
    (".npy", "", with_clock(EVEN ** 3), None, None),
    (".npy", "", noise(200, 3), None, None),
    (".npy", "", EVEN[:, None] / 50, None, None)])
def test_a_leading_clock_is_no_channel_and_says_the_rate(
        tmp_path, capsys, ending, header, rows, left_out, said):
    write(tmp_path / f"raw/a{ending}", rows, header)
    assert run(windows.main, tmp_path / f"raw/a{ending}", "--out", tmp_path / "out") == 0
    first, last = capsys.readouterr().out.splitlines(keepends=True)
    columns = len(left_out.split(", ")) if left_out else 0
    assert ("without" in first) == bool(left_out)
    assert f"without {left_out}" in first or not left_out
    assert np.load(tmp_path / "out/a.npy").shape == (7, 5 * (rows.shape[1] - columns))
    assert said in first if said else "rows a second" not in first
    assert ("--fps RATE" in last) == (said is None)


@pytest.mark.parametrize("rates, more, said", [
    ((50, 50.01), (), "--fps 50.005\n"), ((50, 49), (), "differ, from 49 to 50\n"),
    ((50, None), (), "--fps RATE, the rows"), ((50, None), ("--rate", 60), "--fps 60\n")])
def test_the_rate_to_train_with_is_that_of_all_recordings(tmp_path, capsys, rates, more, said):
    for i, rate in enumerate(rates):
        count = EVEN if rate is None else EVEN / rate
        ending = ".npy" if i else ".csv"
        write(tmp_path / f"raw/{i}{ending}", with_clock(count), "time,x,y")
    assert run(windows.main, tmp_path / "raw", "--out", tmp_path / "out", *more) == 0
    assert said in capsys.readouterr().out


def test_a_channel_that_is_a_clock_or_the_answer_is_told(tmp_path, capsys):
    rows = np.column_stack([np.repeat(EVEN[::2], 2), noise(200, 1), EVEN % 3, EVEN])
    for name in "ab":  # told once
        write(tmp_path / f"raw/{name}.csv", rows, "tick,x,Activity,time_s")
    assert run(windows.main, tmp_path / "raw", "--out", tmp_path / "out") == 0
    out, err = capsys.readouterr()
    assert "4 channels (tick, x, Activity, time_s)" in out
    never, answer, late = err.splitlines()
    assert "tick never falls" in never and "Activity may be the answer" in answer
    assert "time_s may be a clock" in late


def test_a_folder_holds_features_of_one_kind(tmp_path, capsys):
    for name in "ab":
        write(tmp_path / f"{name}.csv", noise(200, 2), "x,y")
    out = ("--out", tmp_path / "out")
    write(tmp_path / "out/old.npy", noise(9, 2))
    refused_by(windows.main, (tmp_path / "a.csv", *out), capsys, "old.npy exists, and no")
    (tmp_path / "out/old.npy").unlink()
    (tmp_path / "out/windows.json").write_text('{"my": "own"}')
    refused_by(windows.main, (tmp_path / "a.csv", *out), capsys, "windows.json does not say")
    (tmp_path / "out/windows.json").write_text('[{"window": 50}]')
    refused_by(windows.main, (tmp_path / "a.csv", *out), capsys, "windows.json does not say")
    (tmp_path / "out/windows.json").unlink()
    assert run(windows.main, tmp_path / "a.csv", *out) == 0
    assert run(windows.main, tmp_path / "a.csv", *out, "--window", 20, "--overwrite") == 0
    refused_by(windows.main, (tmp_path / "b.csv", *out), capsys, "json says", "window 20, not 50")
    write(tmp_path / "b.csv", noise(200, 2), "y,x")
    refused_by(windows.main, (tmp_path / "b.csv", *out, "--window", 20), capsys, "y in the place")
    write(tmp_path / "b.csv", noise(200, 3))
    refused_by(windows.main, (tmp_path / "b.csv", *out, "--window", 20), capsys, "channels 2")
    assert files_in(tmp_path / "out") == {"a.npy", "windows.json"}
    write(tmp_path / "b.csv", noise(200, 2))  # without names, which may be the same
    assert run(windows.main, tmp_path / "b.csv", *out, "--window", 20) == 0
    write(tmp_path / "c.csv", noise(200, 2), "y,x")
    refused_by(windows.main, (tmp_path / "c.csv", *out, "--window", 20), capsys, "y in the place")
    (tmp_path / "out/b.npy").unlink()
    (tmp_path / "out/windows.json").rename(tmp_path / "out/video_features.json")
    more = ("--window", 20, "--overwrite")
    refused_by(windows.main, (tmp_path / "a.csv", *out, *more), capsys, "_features.json exists")


def test_only_features_beside_the_new_ones_count(tmp_path, capsys, monkeypatch):
    write(tmp_path / "raw/a.npy", noise(200, 2))
    write(tmp_path / "features/emg/b.npy", noise(9, 2))
    monkeypatch.chdir(tmp_path)
    for out in (".", "features"):
        assert run(windows.main, "raw", "--out", out) == 0
    (tmp_path / "round").symlink_to("round")
    refused_by(windows.main, ("raw", "--out", "round"), capsys, "round")


def test_names_count_from_the_first_recording_that_has_some(tmp_path, capsys):
    for name, header in (("a", ""), ("b", "x,Label"), ("c", "Label,x")):
        write(tmp_path / f"raw/{name}.csv", noise(200, 2), header)
    refused_by(windows.main, (tmp_path / "raw",), capsys, "c.csv has", "Label in the place of x")
    (tmp_path / "raw/c.csv").unlink()
    assert run(windows.main, tmp_path / "raw", "--out", tmp_path / "out") == 0
    assert "Label may be the answer" in capsys.readouterr().err
    assert json.loads((tmp_path / "out/windows.json").read_text())["names"] == ["x", "Label"]


@pytest.mark.parametrize("pause, warned", [(0.1, False), (3.0, True)])
def test_a_clock_with_a_gap_is_a_warning(tmp_path, capsys, pause, warned):
    times = EVEN / 50 + pause * (EVEN >= 100)
    write(tmp_path / "raw/a.csv", with_clock(times), "time,x,y")
    assert run(windows.main, tmp_path / "raw", "--out", tmp_path / "out") == 0
    error = capsys.readouterr().err
    beside = abs(times - EVEN * times[-1] / EVEN[-1]).max()
    assert (error != "") == warned
    assert not warned or f"a.csv: its clock has gaps or changes its pace: rows lie up to " \
        f"{beside:.1f} s" in error


def test_folders_are_kept_and_hidden_and_other_files_passed_over(tmp_path, capsys):
    names = ("a.csv", "sub/a.csv", "sub/b.v2.npy", ".c.csv", ".git/d.csv", "__MACOSX/e.csv")
    for name in names:
        write(tmp_path / "raw" / name, noise(60, 2))
    (tmp_path / "raw/notes.txt").write_text("walked")
    argv = (windows.main, tmp_path / "raw", "--out", tmp_path / "out")
    assert run(*argv) == 0
    assert files_in(tmp_path / "out") == {"a.npy", "sub/a.npy", "sub/b.v2.npy", "windows.json"}
    assert "1 files of" in (err := capsys.readouterr().err) and "notes.txt" in err
    before = np.load(tmp_path / "out/a.npy")
    write(tmp_path / "raw/a.csv", noise(60, 2))
    refused_by(windows.main, argv[1:], capsys, "a.npy exists (--overwrite replaces it)")
    np.testing.assert_array_equal(np.load(tmp_path / "out/a.npy"), before)
    assert run(*argv, "--overwrite") == 0
    assert (np.load(tmp_path / "out/a.npy") != before).any()


def spoilt(row, channel, value):
    """Rows of a sensor with one odd value."""
    rows = with_clock(EVEN / 50)
    rows[row, channel] = value
    return rows


@pytest.mark.parametrize("rows, header, more, words", [
    (noise(49, 3), "", (), ("b.csv is shorter", "49 rows", "--window is 50")),
    (np.zeros((0, 3)), "x,y,z", (), ("b.csv",)),
    (spoilt(11, 2, np.nan), "time,x,y", (), ("b.csv holds nan in row 12, column 3; 1 of its 200",)),
    (spoilt(0, 1, 1e300), "time,x,y", (), ("b.csv holds 1e+300 in row 1, column 2",)),
    (spoilt(11, 0, np.nan), "time,x,y", (), ("'time' does not rise at row 12",)),
    (spoilt(11, 0, 0.0), "time,x,y", (), ("b.csv: its column 'time' does not rise at row 12",)),
    (with_clock(0 * EVEN), "time,x,y", (), ("b.csv: its column 'time' does not rise",)),
    (noise(200, 4), "", (), ("b.csv has 4 channels, but", "a.csv has 2, without time")),
    (with_clock(EVEN), "time,y,x", (), ("b.csv has the columns y, x", "a.csv has x, y")),
    (with_clock(EVEN), "t,x,y", ("--window", 1), ("window must be from 2 to a million",)),
    (with_clock(EVEN), "t,x,y", ("--stride", 0), ("stride", "0")),
    (with_clock(EVEN), "t,x,y", ("--rate", "nan"), ("rate", "nan")),
    (with_clock(EVEN), "t,x,y", ("--strid", 2), ("do you mean --stride?",))])
def test_what_gives_no_features_is_one_sentence_and_nothing_is_written(
        tmp_path, capsys, rows, header, more, words):
    write(tmp_path / "raw/a.csv", with_clock(EVEN / 50), "time,x,y")
    write(tmp_path / "raw/b.csv", rows, header)
    argv = (tmp_path / "raw", "--out", tmp_path / "out", *more)
    refused_by(windows.main, argv, capsys, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("raw, out, word", [
    ("nowhere", "out", "not found"), ("empty", "out", "must hold"),
    ("clip.mp4", "out", "extractor"),
    ("raw/words.csv", "out", "'walk', no number"), ("raw/b.npy", "raw", "among the recordings"),
    ("raw", "raw/sub", "among the recordings"), ("raw/b.npy", "clip.mp4", "clip.mp4")])
def test_no_recordings_and_a_place_among_them(tmp_path, capsys, raw, out, word):
    (tmp_path / "empty").mkdir()
    (tmp_path / "clip.mp4").write_bytes(b"0000ftyp")
    write(tmp_path / "raw/b.npy", noise(60, 2))
    (tmp_path / "raw/words.csv").write_text("x,y\n1,2\n1,walk\n")
    before = files_in(tmp_path)
    argv = (tmp_path / raw, "--out", tmp_path / out, "--overwrite")
    refused_by(windows.main, argv, capsys, word)
    assert files_in(tmp_path) == before


def test_the_printed_grid_is_the_one_to_train_with(own, capsys):
    database = json.loads((own / "own.json").read_text())["database"]
    for name, entry in database.items():
        del entry["fps"]
        write(own / f"raw/{name}.csv", with_clock(np.arange(0, entry["duration"], 0.02)), "t,x,y")
    (own / "own.json").write_text(json.dumps({"database": database}))
    assert run(windows.main, own / "raw", "--out", own / "new", "--window", 40, "--stride", 20) == 0
    grid = capsys.readouterr().out.split("train with ")[1].split()
    assert grid == ["--stride", "20", "--frames", "40", "--fps", "50"]
    argv = own_argv(own, "--check", "--features", own / "new", *grid)
    assert train.main(argv) == 0
    assert "span" not in capsys.readouterr().err


# ---- Videos -------------------------------------------------------------------------------------

@pytest.fixture
def packages():
    """The modules av and torchvision.models."""
    try:
        return video_features.packages()
    except BadInput as error:
        pytest.skip(str(error))


def write_clip(path, frames, fps, av):
    """A video whose frame i is grey, of the level 8 i."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.bit_rate = 10 ** 7  # so that the levels stay what they are
        for i in range(frames):
            picture = np.full((48, 64, 3), 8 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


SMALL = ("--weights", "none", "--frames", 4, "--stride", 2, "--device", "cpu")


@pytest.mark.parametrize("lacking", ["av", "torchvision"])
def test_lacking_packages_are_named_in_a_sentence(tmp_path, capsys, monkeypatch, lacking):
    for name in ("av", "torchvision"):
        monkeypatch.setitem(sys.modules, name, type(sys)(name))
    sys.modules["torchvision"].models = None
    monkeypatch.setitem(sys.modules, lacking, None)
    argv = (tmp_path, "--out", tmp_path / "out")
    refused_by(video_features.main, argv, capsys, "pip install torchvision av", lacking)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fps, frames, rate, ending", [
    (30, 30, 15, ".mp4"), (15, 20, 15, ".mkv"), (25, 25, 15, ".avi"), (10, 10, 15, ".mp4"),
    (15, 1, 15, ".mp4"), (12, 12, 48, ".mkv")])
def test_frames_are_the_nearest_in_time(packages, tmp_path, fps, frames, rate, ending):
    av, _ = packages
    path = tmp_path / f"a{ending}"
    write_clip(path, frames, fps, av)
    found = list(video_features.frames_at(path, rate, av))
    assert found[0].shape == (1, 3, 48, 64)
    levels = [round(float(frame.float().mean()) / 8) for frame in found]
    last = (frames - 1) / fps
    times = [k / rate for k in range(1000) if k / rate < last + 0.5 / rate]
    assert len(levels) == len(times)
    for level, t in zip(levels, times):
        off = min(abs(i / fps - t) for i in range(frames))
        assert abs(level / fps - t) <= off + 0.002  # some files count milliseconds


def test_features_of_a_folder_of_videos_row_by_row(packages, tmp_path, capsys):
    av, models = packages
    for name, frames in (("a.mp4", 11), ("sub/b.MKV", 4), (".c.mp4", 9)):
        write_clip(tmp_path / "videos" / name, frames, 15, av)
    (tmp_path / "videos/a.wav").write_bytes(b"sound")
    argv = (tmp_path / "videos", "--out", tmp_path / "out", *SMALL, "--stride", 3)
    torch.manual_seed(1)
    assert run(video_features.main, *argv) == 0
    out = capsys.readouterr().out
    assert "train with --stride 3 --frames 4 --fps 15\n" in out
    assert files_in(tmp_path / "out") == {"a.npy", "sub/b.npy", "video_features.json"}
    torch.manual_seed(0)
    network = models.get_model("r3d_18", weights=None).eval()
    network.fc = torch.nn.Identity()
    frames = torch.cat(list(video_features.frames_at(tmp_path / "videos/a.mp4", 15, av)))
    assert len(frames) == 11
    prepare = models.get_model_weights("r3d_18").DEFAULT.transforms()
    with torch.no_grad():
        rows = [network(prepare(frames[start:start + 4])[None])[0] for start in (0, 3, 6)]
    features = np.load(tmp_path / "out/a.npy")
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, torch.stack(rows), rtol=1e-4, atol=1e-5)


def test_features_of_another_extractor_are_not_mixed_with_ours(tmp_path):
    s = video_features.Settings(str(tmp_path), out=str(tmp_path))
    path, made = tmp_path / "video_features.json", video_features.how_made(s)
    write(tmp_path / "a.npy", noise(3, 2))
    with pytest.raises(BadInput, match="a.npy exists"):
        windows.keep_settings(path, made, [])
    assert not path.exists()
    windows.keep_settings(path, made, [tmp_path / "a.npy"])
    windows.keep_settings(path, made, [])  # of this extractor
    with pytest.raises(BadInput, match="stride 8, not 4"):
        windows.keep_settings(path, made | {"stride": 4}, [])


def test_the_command_goes_on_and_says_which_videos_failed(packages, tmp_path, capsys):
    av, _ = packages
    for name, frames in (("a.mp4", 5), ("b.mp4", 3), ("d.mp4", 6)):
        write_clip(tmp_path / "videos" / name, frames, 15, av)
    (tmp_path / "videos/c.mp4").write_bytes(b"no video")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.npy").write_bytes(b"there already")
    argv = (tmp_path / "videos", "--out", tmp_path / "out", *SMALL)
    s = windows.read_command([str(word) for word in argv], video_features.Settings)
    made = video_features.how_made(s)
    windows.keep_settings(tmp_path / "out/video_features.json", made, [tmp_path / "out/a.npy"])
    words = ("b.mp4 is shorter than a window: it has 3 frames at 15", "2 videos", "b, c")
    refused_by(video_features.main, argv, capsys, *words)
    assert (tmp_path / "out/a.npy").read_bytes() == b"there already"
    assert files_in(tmp_path / "out") == {"a.npy", "d.npy", "video_features.json"}
    refused_by(video_features.main, (*argv, "--stride", 3), capsys, "stride 2", "another --out")
    for name in ("b.mp4", "c.mp4"):
        (tmp_path / "videos" / name).unlink()
    assert run(video_features.main, *argv) == 0
    assert "2 videos, 2 have their features already" in capsys.readouterr().out


@pytest.mark.parametrize("network, frames, width", [
    ("r3d_18", 4, 512), ("s3d", 14, 1024), ("swin3d_t", 2, 768)])
def test_the_layer_before_the_classes_gives_the_features(packages, network, frames, width):
    s = video_features.Settings("", network=network, frames=frames, weights="none", device="cpu")
    loaded, prepare = video_features.load_network(s, packages[1])
    frame = prepare(torch.zeros(1, 3, 48, 64, dtype=torch.uint8))
    assert video_features.row_of(loaded, [frame] * frames).shape == (width,)


def test_the_default_weights_are_taken_from_the_cache_of_torch(
        packages, tmp_path, capsys, monkeypatch):
    _, models = packages
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = models.get_model_weights("r3d_18").DEFAULT.url
    torch.manual_seed(1)
    saved = models.get_model("r3d_18", weights=None).state_dict()
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    torch.save(saved, tmp_path / "hub/checkpoints" / url.split("/")[-1])
    s = video_features.Settings("", frames=4, device="cpu")
    network, _ = video_features.load_network(s, models)
    assert torch.equal(network.stem[0].weight, saved["stem.0.weight"])


@pytest.mark.parametrize("videos, more, word", [
    ("nowhere.mp4", (), "video not found"), ("empty", (), "must hold one file a video"),
    ("empty", ("--rate", 0), "rate must be positive"), ("twice", (), "must hold one file a video"),
    ("a.mp4", ("--network", "r3d_81"), "do you mean r3d_18?"),
    ("a.mp4", ("--network", "s3d"), "--network s3d cannot take 4 frames"),
    ("a.mp4", ("--weights", "mine"), "weights must be one of default, none"),
    ("sound.mp4", (), "sound.mp4 cannot be read")])
def test_what_gives_no_features_of_videos_is_one_sentence(
        packages, tmp_path, capsys, videos, more, word):
    (tmp_path / "empty").mkdir()
    write_clip(tmp_path / "a.mp4", 5, 15, packages[0])
    for name in ("twice/a.mp4", "twice/a.avi"):
        write_clip(tmp_path / name, 1, 15, packages[0])
    with packages[0].open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = packages[0].AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    argv = (tmp_path / videos, "--out", tmp_path / "out", *SMALL, *more)
    refused_by(video_features.main, argv, capsys, word)
    assert not list((tmp_path / "out").glob("*.npy"))
