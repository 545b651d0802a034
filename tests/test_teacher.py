"""Tests of extras/mean_teacher.py: what the student sees, the flip by brute force, whole runs."""
import copy
from types import SimpleNamespace

import pytest
import torch

from extras import bmn, fig4, mean_teacher, tables
from tests.helpers import finished, read_result, same, weights
from tests.test_bmn import TINY, argv_of, small
from tests.test_extras import table_argv
from tests.test_people import look_into
from tests.test_train import ENDS, STEP, stopped

EPOCHS = ("--supervised-epochs", 1, "--joint-epochs", 2)


def main(*argv):
    """The exit code of extras.mean_teacher."""
    return mean_teacher.main([str(word) for word in argv])


def teacher_argv(own, *more):
    """A command line of extras.mean_teacher for the user's data set."""
    return argv_of(own, *EPOCHS, *more)


def batch_of(*lengths):
    """A batch of videos of 64 channels, without labels, padded to the longest."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return {"feats": torch.randn(*mask.shape, 64) * mask[..., None], "mask": mask}


def test_what_the_student_sees():
    torch.manual_seed(0)
    batch = batch_of(40, 25)
    feats, mask = batch["feats"], batch["mask"]
    seen = mean_teacher.masked(batch, 50)["feats"]
    left_out = (seen == 0).all(2) & mask
    assert 5 < left_out.sum() < 25
    assert seen[~left_out].equal(feats[~left_out])
    seen = mean_teacher.shifted(batch)["feats"]
    assert (seen[~mask] == 0).all()
    late, early, still = (torch.zeros(2, 64).bool() for _ in range(3))
    for b, steps in enumerate((40, 25)):
        of_it, as_it_is = seen[b, :steps], feats[b, :steps]
        late[b] = (of_it[1:] == as_it_is[:-1]).all(0) & (of_it[0] == 0)
        early[b] = (of_it[:-1] == as_it_is[1:]).all(0) & (of_it[-1] == 0)
        still[b] = (of_it == as_it_is).all(0)
    assert (late.int() + early.int() + still.int() == 1).all()
    assert late.any(1).all() and early.any(1).all() and still.any(1).all()
    assert not late[0].equal(late[1])
    seen = mean_teacher.flipped(batch)["feats"]
    assert seen[0].equal(feats[0].flip(0)) and seen[1, :25].equal(feats[1, :25].flip(0))


def test_predictions_turned_round_against_a_loop_and_twice():
    W, lengths = 6, (6, 4, 1)
    steps = torch.arange(W) < torch.tensor(lengths)[:, None]
    s, e = bmn.pairs_of(W).tolist()
    predictions = (*torch.rand(2, 3, W), *torch.rand(2, 3, len(s)))
    turned = mean_teacher.turned(predictions, steps)
    for b, L in enumerate(lengths):
        for t in range(L):
            assert turned[0][b, t] == predictions[1][b, L - 1 - t]
            assert turned[1][b, t] == predictions[0][b, L - 1 - t]
        for p, (first, last) in enumerate(zip(s, e)):
            if last < L:
                other = list(zip(s, e)).index((L - 1 - last, L - 1 - first))
                assert turned[2][b, p] == predictions[2][b, other]
                assert turned[3][b, p] == predictions[3][b, other]
    again = mean_teacher.turned(turned, steps)
    assert mean_teacher.consistency(again, predictions, steps) == 0
    # One number of a start counts, one of a pair that ends in the padding does not.
    other = copy.deepcopy(predictions)
    other[0][1, 2] += 1
    other[3][1, -1] += 1
    assert float(mean_teacher.consistency(other, predictions, steps)) == pytest.approx(1 / 11)


def test_the_student_learns_and_the_teacher_does_not():
    s = small()
    for teacher in ("ssp", "sstap"):
        torch.manual_seed(0)
        detector = bmn.Detector(64, 3, s)
        ema = copy.deepcopy(detector).requires_grad_(False)
        settings = mean_teacher.Settings(
            device="cpu", precision="float32", teacher=teacher, max_steps=12)
        run = SimpleNamespace(s=settings, detector=detector, ema=ema)
        loss = mean_teacher.teacher_loss(run, batch_of(12, 7))
        before = copy.deepcopy(ema.state_dict())
        loss.backward()
        assert same(before, ema.state_dict())
        assert 0 < loss.item() < 4
        assert detector.x_1d_s[0].weight.grad.abs().sum() > 0
        assert detector.classes.inside.weight.grad is None  # labelled videos alone teach classes


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A user's data set with a run of two stages; no test changes what the run knows."""
    return finished(tmp_path_factory, mean_teacher.main, teacher_argv)


def test_a_run_its_page_a_new_video_and_that_it_goes_on_where_it_was_killed(whole, tmp_path):
    log = (whole / "run/log.jsonl").read_text().splitlines()
    assert any("consistency" in row for row in log)
    assert read_result(whole / "run/pseudo_labels.json") == {}
    look_into(main, mean_teacher.Settings, whole, tmp_path / "found.json")
    assert type(fig4.read_run(whole / "run")[0]) is mean_teacher.Settings
    argv = teacher_argv(whole, "--out", tmp_path / "run")
    kill, code, _ = ENDS["SIGTERM"]  # amid an epoch of stage 3
    assert stopped(lambda: mean_teacher.main(argv), tmp_path / "stderr", kill, STEP, 17) == code
    assert main("--resume", tmp_path / "run") == 0
    assert same(weights(whole / "run"), weights(tmp_path / "run"))


def test_its_table_and_settings_that_it_does_not_read(own, capsys):
    assert tables.main(["1-teacher", *table_argv(own, *TINY, *EPOCHS, "--seeds", 1)]) == 0
    text = capsys.readouterr().out
    for name, *_ in tables.ROWS["1-teacher"]:
        assert f"| {name} |" in text
    assert main(*teacher_argv(own, "--theta-l", 0.2)) == 0
    assert "no theta_l" in capsys.readouterr().err
