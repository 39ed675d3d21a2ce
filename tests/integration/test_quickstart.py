"""The quickstart in its full length: Internal Guidance must show what the README says."""

import json
from pathlib import Path

import pytest

from tests.conftest import succeed


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_the_best_scale_beats_unguided_and_lies_where_the_paper_has_it(tmp_path: Path) -> None:
    done = succeed(["ig-dist", "quickstart", "--out", tmp_path], timeout=1700, env=None)
    assert "stopped: saved at step" in done.stderr and "resume at step" in done.stdout
    (sweep,) = tmp_path.glob("run/**/sweep.json")
    rows = json.loads(sweep.read_text())["rows"]
    scores = {row["ig_scale"]: row["scores"]["fd_pixel"] for row in rows}
    best = min(scores, key=lambda scale: scores[scale])
    assert list(scores) == [1.0, 1.2, 1.4, 1.7, 2.0, 2.5]
    assert scores[best] <= 0.85 * scores[1.0]
    assert 1.2 <= best <= 2.0
    for file in (sweep.with_name("grid.png"), sweep.with_name("sweep.png"), tmp_path / "run/report.html"):
        assert file.stat().st_size > 10_000
