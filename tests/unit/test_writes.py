"""Files are whole or not there on stores of any kind, and what suffers on the way is read again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ig_dist.errors import DamagedError
from ig_dist.storage import writes
from ig_dist.storage.faults import Patience, intact
from ig_dist.storage.files import list_sizes, open_url
from ig_dist.storage.urls import LOCAL

PIECES = [memoryview(bytes(range(256)))] * 3


def test_a_stream_is_whole_or_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writes, "PART_BYTES", 100)
    fs, path = open_url("memory://writes", "test")
    writes.write_stream(fs, f"{path}/whole", PIECES, Patience(), size=768)
    assert fs.cat_file(f"{path}/whole") == b"".join(PIECES)

    def cut_off() -> Iterator[memoryview]:
        yield PIECES[0]
        raise OSError("the source is gone")

    with pytest.raises(OSError, match="the source is gone"):
        writes.write_stream(fs, f"{path}/torn", cut_off(), Patience(), size=768)
    assert list_sizes(fs, path) == {"whole": 768}
    parts = list(writes._cut(PIECES, 100))
    assert [*map(len, parts)] == [100] * 7 + [68] and b"".join(parts) == b"".join(PIECES)


@pytest.mark.parametrize(("local", "tries"), [(False, 4), (True, 1)])
def test_what_is_damaged_is_read_again_a_few_times(local: bool, tries: int) -> None:
    patience, reads = Patience(), list[int]()
    fs = LOCAL if local else open_url("memory://writes", "test", patience)[0]

    def read(whole_at: int) -> str:
        reads.append(whole_at)
        if len(reads) < whole_at:
            raise DamagedError("its CRC differs")
        return "whole"

    assert intact(fs, "/file", lambda: read(tries)) == "whole"
    assert len(reads) == tries and patience.faults == tries - 1
    reads.clear()
    with pytest.raises(DamagedError, match="its CRC differs"):
        intact(fs, "/file", lambda: read(9))
    assert len(reads) == tries
