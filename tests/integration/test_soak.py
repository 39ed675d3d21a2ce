"""The campaign of faults in short; `make soak` and docs/running.md have the long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak import soak, table


@pytest.mark.parametrize(("faults", "minutes"), [(15, 2.0), pytest.param(60, 10.0, marks=pytest.mark.full)])
def test_a_campaign_of_faults_breaks_no_promise(tmp_path: Path, faults: int, minutes: float) -> None:
    campaign = soak(faults, minutes, seed=faults, folder=tmp_path)
    broken = {kind: tally.failures for kind, tally in campaign.tallies.items() if tally.failures}
    assert not broken
    assert campaign.faults >= faults and len(campaign.tallies) >= 4, table(campaign)
