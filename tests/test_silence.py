"""Tests that what a user gives is used, or told."""
import json

import numpy as np
import pytest

import train
from extras import annotations, windows
from plumbing import files, forms, sources, tables
from plumbing.words import BadInput
from tests import users
from tests.helpers import edit, evaluated, refused, settings

HEAD = "video,start,end,label\n"


def told(own, capsys, *more, code=0):
    """What --check says, first line and warnings."""
    capsys.readouterr()  # what was said before
    assert train.main(users.check(own, "--ratio", 0, *more)) == code
    return "".join(capsys.readouterr())


def labels_of(own, *more):
    """The command line words of a folder of label tracks of the user's data set."""
    (own / "labels").mkdir()
    for name in users.NAMES:
        (own / f"labels/{name}.txt").write_text("2\t8\tA\n12\t20\tB\n")
    return "--dataset", own / "labels", "--fps", 50, *more


def test_two_recordings_of_one_name_are_told(tmp_path, capsys):
    (tmp_path / "t.csv").write_text(
        "Observation id,Media file name,Behavior,Start (s),Stop (s)\n"
        "o1,/d/s1/GX01.MP4,walk,5,24\no2,/d/s2/GX01.MP4,sit,3,9\n")
    with pytest.raises(BadInput, match="t.csv, line 3, video GX01.*s2/GX01.*s1/GX01"):
        tables.read_any(tmp_path / "t.csv")
    via = {"project": {}, "attribute": {}, "metadata": {},
           "file": {"5": {"fname": "s1/clip.mp4"}, "6": {"fname": "s2/clip.mp4"}},
           "view": {"1": {"fid_list": ["5"]}, "2": {"fid_list": ["6"]}}}
    (tmp_path / "via.json").write_text(json.dumps(via))
    assert annotations.main([str(tmp_path / "via.json"), "--out", str(tmp_path / "new.json")]) == 2
    assert "clip" in capsys.readouterr().err and not (tmp_path / "new.json").exists()


def test_two_entries_of_one_feature_file_are_refused(own, capsys):
    edit(own, lambda database: database.update({"v10.mp4": database["v0"]}))
    refused(users.check(own), capsys, "own.json", "v10", "v10.mp4", "v10.npy")


def test_one_recording_behind_a_link_is_not_two_videos(own, capsys):
    (own / "features/v10.npy").unlink()
    (own / "features/v10.npy").symlink_to(own / "features/v0.npy")
    refused(users.check(own), capsys, "own.json", "v0 and v10 are one video")


@pytest.mark.parametrize(("ending", "words"), [
    ("npz", "--extension npz must end in one of .npy"), ("_y", "--extension _y must end in")])
def test_an_extension_is_one_that_can_be_read(own, capsys, ending, words):
    refused(users.check(own, "--extension", ending), capsys, words)


@pytest.mark.parametrize(("name", "hint"), [
    ("{}.npy", "ids are without the ending"), ("{}", "other capital letters")])
def test_ids_that_are_nearly_those_of_files_are_told(own, capsys, name, hint):
    edit(own, lambda database: [database.update({name.format(old.upper()): database.pop(old)})
                                for old in users.NAMES])
    if name != "{}":
        for old in users.NAMES:
            (own / f"features/{old}.npy").rename(own / f"features/{old.upper()}.npy")
    refused(users.check(own, "--missing", "skip"), capsys, "feature file not found", hint)


def test_the_annotations_are_no_features(own, capsys):
    for name in users.NAMES:
        np.savetxt(own / f"features/{name}.csv", np.load(own / f"features/{name}.npy"),
                   delimiter=",")
    forms.write_found(own / "features/labels.csv", users.perfect(own, users.NAMES))
    words = ("--extension", ".csv", "--fps", 50, "--dataset", own / "features/labels.csv")
    assert "14 labelled, 0 unlabelled" in told(own, capsys, *words)


def test_a_first_step_without_a_number_is_no_header(tmp_path):
    for first in (",,", "NA,na,"):
        (tmp_path / "v.csv").write_text(f"{first}\n1,2,3\n4,5,6\n")
        with pytest.raises(BadInput, match="v.csv.*line 1, column 1"):
            files.read_features(tmp_path / "v.csv", files.Reading(), "v")


def test_lines_with_the_numbers_of_their_frames_are_told(own, capsys):
    for between in (" ", ", "):
        (own / "v0.txt").write_text("".join(f"{i}{between}walk\n" for i in range(9)))
        with pytest.raises(BadInput, match="v0.txt.*numbers of their frames"):
            tables.read_any(own / "v0.txt", fps=25)
    (own / "v0.txt").write_text("0\n1\n2\n")  # labels that are numbers
    assert len(tables.read_any(own / "v0.txt", fps=25)["v0"].labels) == 3


@pytest.mark.parametrize("name", ["v2.TXT", "P01"])
def test_label_files_are_read_whatever_their_case_and_behind_links(own, capsys, name):
    words = labels_of(own)
    if name == "P01":
        for folder, ending in (("labels", "txt"), ("features", "npy")):
            (own / f"far{folder}").mkdir()
            (own / f"{folder}/v2.{ending}").rename(own / f"far{folder}/w.{ending}")
            (own / f"{folder}/P01").symlink_to(own / f"far{folder}")
        (own / "labels/round").symlink_to(own / "labels")
    else:
        (own / "labels/v2.txt").rename(own / "labels" / name)
    assert "14 labelled, 0 unlabelled" in told(own, capsys, *words)


def test_other_files_among_labels_are_told(own, capsys):
    words = labels_of(own)
    (own / "labels/v2.txt").rename(own / "labels/v2.tsv")
    assert "v2.tsv" in told(own, capsys, *words)


def test_an_empty_line_among_labels_of_frames_or_steps_is_refused(tmp_path):
    (tmp_path / "v.txt").write_text("a\na\n\nb\n\n")
    with pytest.raises(BadInput, match="v.txt, line 3"):
        tables.read_any(tmp_path / "v.txt", fps=25)
    (tmp_path / "v.csv").write_text("x,y\n1,2\n\n3,4\n")
    with pytest.raises(BadInput, match="v.csv.*line 3"):
        files.read_features(tmp_path / "v.csv", files.Reading(), "v")
    (tmp_path / "v.csv").write_text("x,y\n1,2\n3,4\n\n\n")
    assert files.read_features(tmp_path / "v.csv", files.Reading(), "v").shape == (2, 2)


@pytest.mark.parametrize("flag", ["--annotations", "--features", "--root", "--unlabelled-features",
                                  "--ignore-labels"])
def test_files_do_not_go_with_the_toy_data(own, capsys, flag):
    refused(["--check", flag, own / "own.json"], capsys, flag, "--dataset")


@pytest.mark.parametrize("content", ["emg\n0,53\n0,61\n", "a,b\n1,.3,.2\n2,.1,.4\n", "t,a,\n1,2\n"])
def test_a_header_fits_its_rows(tmp_path, content, capsys):
    (tmp_path / "v.csv").write_text(content)
    with pytest.raises(BadInput, match="v.csv.*header"):
        files.read_features(tmp_path / "v.csv", files.Reading(), "v")
    (tmp_path / "v.csv").write_text(content + content.splitlines()[-1] + "\n")
    argv = [tmp_path / "v.csv", "--out", tmp_path / "o", "--window", 2]
    assert windows.main([str(word) for word in argv]) == 2


def test_tables_have_their_columns_in_one_order(own, capsys):
    for name in users.NAMES:
        head = "gx,gy,ax,ay,az" if name == "v3" else "ax,ay,az,gx,gy"
        np.savetxt(own / f"features/{name}.csv", np.load(own / f"features/{name}.npy"),
                   delimiter=",", header=head, comments="")
    refused(users.check(own, "--extension", ".csv"), capsys, "v3", "gx, gy, ax", "ax, ay, az")


def test_instances_that_are_listed_twice_are_told(own, capsys):
    edit(own, lambda database: database["v11"]["annotations"].append(
        dict(database["v11"]["annotations"][0])))
    assert "1 instances of 1 videos repeat another" in told(own, capsys)


@pytest.mark.parametrize("label", ["bakground", "a"])
def test_a_label_to_ignore_that_is_nowhere_is_told(own, capsys, label):
    text = told(own, capsys, "--ignore-labels", f"{label},B")
    assert f"no label '{label}'" in text and "no label 'B'" not in text
    assert "its labels are A, B" in text


def test_feature_files_that_are_not_taken_are_told(own, capsys):
    for name in ("v0", "v1"):
        edit(own, lambda database, name=name: database.pop(name))
    x = np.load(own / "features/v0.npy")
    np.savez(own / "features/v0.npz", feats=x)
    (own / "features/v0.npy").unlink()
    (own / "features/v1.npy").rename(own / "features/v1.NPY")
    (own / "far").mkdir()
    np.save(own / "far/w.npy", x)
    (own / "features/P01").symlink_to(own / "far")
    assert "8 labelled, 1 unlabelled, 4 test videos; ignored: 2 files" in told(own, capsys)
    (own / "more").mkdir()
    for path in ("more/m", "more/v2", "features/loose"):
        np.save(own / f"{path}.npy", x)
    text = told(own, capsys, "--unlabelled-features", own / "more")
    assert "8 labelled, 1 unlabelled" in text and "loose" in text and "v2" in text


def test_label_files_of_another_kind_are_told(own, capsys):
    words = labels_of(own)
    for name in ("v1.aup3", "v20.vtt"):  # of v1.txt, and of no other file
        (own / "labels" / name).write_text("x")
    assert "1 files that are no *.txt of" in (text := told(own, capsys, *words))
    assert "v20.vtt" in text and "v1.aup3" not in text


def test_files_that_are_read_are_not_told_as_ignored(own, capsys):
    (own / "features/un").mkdir()
    (own / "features/v3.npy").rename(own / "features/un/m.npy")
    edit(own, lambda database: database.pop("v3"))
    for name in users.NAMES:
        (own / f"features/{name}.mp4").write_text("x")
    (own / "features/split.txt").write_text("v0\nv1\n")
    text = told(own, capsys, "--unlabelled-features", own / "features/un", "--split",
                own / "features/split.txt")
    assert "ignored: 1 files that are no *.npy (--extension): v3.mp4" in text


def test_files_among_label_tracks_that_are_read_are_not_told(own, capsys):
    words = labels_of(own)
    (own / "labels/split.csv").write_text("v0\nv1\n")
    (own / "labels/other.csv").write_text("x")
    (own / "features").rename(own / "labels/feats")
    (own / "features").symlink_to(own / "labels/feats")
    text = told(own, capsys, *words, "--split", own / "labels/split.csv")
    assert "ignored: 1 files that are no *.txt" in text and "other.csv" in text


@pytest.mark.parametrize(("line", "words"), [
    ("2.0\t8.0\t6.0\tA", ["4 cells", "column headers"]), ("2.0 8.0 A", ["no tabs"]),
    ("2,8,A", ["no tabs"]), ("0:02; 0:08; A", ["no tabs"])])
def test_a_label_track_of_other_cells_is_refused(own, capsys, line, words):
    argv = users.check(own, *labels_of(own))
    (own / "labels/v3.txt").write_text(f"{line}\n")
    refused(argv, capsys, "v3.txt", *words)


def test_a_table_called_txt_is_a_table(tmp_path):
    (tmp_path / "all.txt").write_text(f"{HEAD}v,1,2,walk\nw,3,4,sit\n")
    assert tables.read_any(tmp_path / "all.txt").keys() == {"v", "w"}


def test_annotations_in_the_place_of_own_ones_are_refused(own, capsys):
    argv = users.check(own, "--annotations", own / "own.json")
    refused(argv, capsys, "--annotations", "--dataset")


def test_an_unlabelled_list_that_chooses_nothing_is_told(own, capsys):
    split = {"labelled": ["v0", "v1"], "unlabelled": ["v2"]}
    (own / "split.json").write_text(json.dumps(split))
    assert "names 1 unlabelled videos" in told(own, capsys, "--split", own / "split.json")
    split["unlabelled"] = users.TRAINED[2:]
    (own / "split.json").write_text(json.dumps(split))
    assert "names" not in told(own, capsys, "--split", own / "split.json")


def test_an_audit_without_hidden_labels_is_told(own, capsys):
    users.loose_features(own)
    assert "--audit" in told(own, capsys, "--audit")
    assert "--audit" not in told(own, capsys)


def test_a_subset_that_is_labelled_is_not_unlabelled_too(own, capsys):
    refused(users.check(own, "--unlabelled-subset", "training"), capsys, "names 10 videos", "v0")


def test_a_folder_of_new_features_of_many_kinds_is_told(own, capsys):
    (own / "features/v20.mat").write_text("x")
    assert sources.files_of_videos(own / "features").keys() == set(users.NAMES)
    assert "1 files of" in (text := capsys.readouterr().err) and "v20.mat" in text


def test_a_folder_of_a_name_that_none_can_have_is_refused(own, capsys):
    refused(users.check(own, "--unlabelled-features", "odd\ud800"), capsys, "holds no file")


def test_segments_that_are_left_out_or_cut_are_counted(own, capsys):
    users.actions(["v1"], 0, segment=[9.0, 9.0])(own)
    users.actions(["v11"], 0, segment=[20.0, 45.0])(own)
    users.actions(["v3"], 0, segment=[-4.0, 8.0])(own)
    text = told(own, capsys, "--bad-segments", "skip")
    assert "1 segments of 1 videos, empty or outside: v1" in text
    assert "2 segments of 2 videos begin before" in text


@pytest.mark.parametrize("named", ["a", "b"])
def test_a_file_behind_two_links_is_one_video(own, capsys, named):
    (own / "far").mkdir()
    for name in users.TESTED:
        (own / f"features/{name}.npy").rename(own / f"far/{name}.npy")
    for link in "ab":
        (own / "features" / link).symlink_to(own / "far")
    edit(own, lambda database: database.update(
        {f"{named}/{name}": database.pop(name) for name in users.TESTED}))
    assert "0 unlabelled, 4 test videos; ignored: nothing" in told(own, capsys)


def test_headers_are_alike_whatever_their_blanks_and_what_is_skipped(own, capsys):
    for name in users.NAMES:
        head = "clock, ax,ay,az,gx" if name == "v3" else "time,ax,ay,az,gx"
        np.savetxt(own / f"features/{name}.csv", np.load(own / f"features/{name}.npy"),
                   delimiter=",", header=head, comments="")
    text = told(own, capsys, "--extension", ".csv", "--skip-columns", 1)
    assert "of 4 channels: ax, ay, az, gx" in text


@pytest.mark.parametrize(("first", "names"), [
    ("# recorded at home", []), ("# x, y", ["x", "y"]), ("x,y", ["x", "y"]), ("0.5,1", [])])
def test_the_first_line_of_a_table(tmp_path, first, names):
    (tmp_path / "v.csv").write_text(f"{first}\n1,2\n3,4\n")
    found = files.read_features(tmp_path / "v.csv", files.Reading(), "v")
    assert len(found) == (3 if first == "0.5,1" else 2)
    assert files.columns_of(tmp_path / "v.csv") == names


def test_a_window_beyond_the_end_is_no_cut(own, capsys):
    users.actions(["v1"], 2, segment=[28.0, 32.8])(own)
    assert "cut there" not in told(own, capsys, "--frames", 1)
    assert "cut there" in told(own, capsys, "--frames", 1, "--stride", 10, "--trust-grid")


def test_what_is_used_is_not_told_as_ignored(own, capsys):
    words = labels_of(own)
    for name in users.NAMES:
        x = np.load(own / f"features/{name}.npy")
        np.savetxt(own / f"labels/f_{name}.csv", x, delimiter=",")
        np.savez(own / f"labels/f_{name}.npz", feats=x)
    (own / "labels/v2.txt").unlink()
    found = told(own, capsys, *words, "--prefix", "f_", "--extension", ".csv",
                 "--features", own / "labels")
    assert "13 labelled, 1 unlabelled, 0 test videos; ignored: nothing" in found


def test_of_one_class_no_instance_repeats_another(own, capsys):
    edit(own, lambda database: database["v0"]["annotations"].append(
        database["v0"]["annotations"][0] | {"label": "C"}))
    assert "repeat" not in told(own, capsys, "--one-class")


def test_labels_to_ignore_are_told_where_they_are_typed(own, capsys):
    argv = users.predict(own, users.perfect(own, users.TESTED))
    assert evaluated(*argv[1:], "--ignore-labels", "bakground") == 0
    assert "bakground" in capsys.readouterr().err
    s = settings(*users.check(own, "--ignore-labels", "bakground", "--test-subset", "validation"))
    assert sources.choose_test_data(s).warnings == [] and not capsys.readouterr().err


def test_feature_files_of_any_case(own, capsys):
    for file in (own / "features").glob("*.npy"):
        file.rename(file.with_suffix(".NPY"))
    assert "4 test videos" in told(own, capsys, "--extension", ".NPY")


def test_no_unlabelled_features_go_with_the_toy_data():
    assert settings("--unlabelled-features", "none").dataset == "toy"
