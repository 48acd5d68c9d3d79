"""The states of the random generators as a snapshot takes them."""

from __future__ import annotations

import numpy as np

from resumable_trainer.state import generators


def test_two_captures_share_no_array_which_a_resumed_run_would_not_either() -> None:
    """What is one object is written down as one: the state of a run never killed would be spelled otherwise."""
    one, other = (generators.capture_global() for _ in range(2))
    assert np.array_equal(one["python"]["words"], other["python"]["words"])
    assert not np.shares_memory(one["python"]["words"], other["python"]["words"])
    assert not np.shares_memory(one["numpy"]["state"]["key"], other["numpy"]["state"]["key"])
