from pathlib import Path

import pytest

from lightning_scar.storage.directory import Directory
from lightning_scar.storage.source import Source

DATA = bytes(i % 251 for i in range(2000))


@pytest.fixture(params=["file", "memory"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    urls = {"file": str(tmp_path), "memory": f"memory://source-{tmp_path.name}"}
    folder = Directory(urls[request.param])
    folder.write("a", [DATA])
    return folder.source("a")


@pytest.mark.parametrize(
    "spans",
    [
        [(0, 2000)],
        [(10, 20), (20, 21), (21, 90)],
        [(10, 20), (20, 30), (40, 50), (50, 60), (60, 60), (60, 70)],
        [(50, 60), (0, 10)],
        [(3, 3), (3, 7), (9, 9)],
        [(i, i + 1) for i in range(1500)],
        [],
    ],
    ids=["all", "neighbours", "stretches", "in any order", "empty ones", "more than one call takes", "none"],
)
def test_memories_are_filled_from_their_offsets(source: Source, spans: list[tuple[int, int]]) -> None:
    into = [bytearray(stop - start) for start, stop in spans]
    with source:
        source.expect(sorted(spans))
        assert source.fill([(start, memoryview(m)) for (start, _), m in zip(spans, into, strict=True)])
    assert into == [DATA[start:stop] for start, stop in spans]


@pytest.mark.parametrize(
    "spans", [[(1950, 2050)], [(1950, 1980), (1980, 2001)], [(3000, 3001)], [(0, 1), (2050, 2051)]]
)
def test_a_file_that_ends_too_early_is_noticed(source: Source, spans: list[tuple[int, int]]) -> None:
    with source:
        assert not source.fill([(start, memoryview(bytearray(stop - start))) for start, stop in spans])


def test_its_end_closes_the_file(source: Source) -> None:
    with source:
        pass
    with pytest.raises(ValueError, match="closed"):
        source.fill([(0, memoryview(bytearray(1)))])
