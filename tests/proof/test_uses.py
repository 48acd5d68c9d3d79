"""Which variables steer a training, by the text of the script."""

from __future__ import annotations

import pytest

from resumable_trainer.proof.uses import steers


@pytest.mark.parametrize(
    "source",
    [
        "for e in run.epochs(9):\n    if bad >= 8:\n        break",
        "if bad % 100 == 0:\n    for group in optimizer.param_groups:\n        group['lr'] *= 0.5",
        "if self.bad > 3:\n    return True",
        "while bad < 3:\n    optimizer.step()",
        "if bad > 3:\n    print('restored')\n    model.load_state_dict(kept)",
    ],
)
def test_a_variable_that_decides_over_more_than_words_steers(source: str) -> None:
    assert steers("bad", [source])


@pytest.mark.parametrize(
    "source",
    [
        "bad += 1\nprint(bad)",
        "if loss < bad:\n    bad = loss\n    torch.save(model.state_dict(), 'best.pt')",
        "if bad % 50 == 0:\n    print(bad)\n    if other > 3:\n        raise ValueError",
        "if good > 3:\n    sys.exit(bad)",
        "this is no Python, bad",
    ],
)
def test_a_variable_that_is_only_shown_or_kept_does_not(source: str) -> None:
    assert not steers("bad", [source])
