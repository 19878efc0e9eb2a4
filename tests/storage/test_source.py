from pathlib import Path

import pytest

from lightning_scar.storage.directory import Directory
from lightning_scar.storage.source import Source

DATA = bytes(range(200))


@pytest.fixture(params=["file", "memory"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    folder = Directory(str(tmp_path) if request.param == "file" else f"memory://source-{tmp_path.name}")
    folder.create()
    folder.write("a", [DATA])
    return folder.source("a")


@pytest.mark.parametrize(
    "spans",
    [
        [(0, 200)],
        [(10, 20), (20, 21), (21, 90)],
        [(50, 60), (0, 10)],
        [(3, 3), (3, 7), (9, 9)],
        [(i, i + 1) for i in range(100)],
        [],
    ],
    ids=["all", "neighbours", "in any order", "empty ones", "more than one call takes", "none"],
)
def test_memories_are_filled_from_their_offsets(source: Source, spans: list[tuple[int, int]]) -> None:
    into = [bytearray(stop - start) for start, stop in spans]
    with source:
        source.expect(sorted(spans))
        assert source.fill([(start, memoryview(m)) for (start, _), m in zip(spans, into, strict=True)])
    assert into == [DATA[start:stop] for start, stop in spans]


@pytest.mark.parametrize("spans", [[(150, 250)], [(150, 180), (180, 201)], [(300, 301)], [(0, 1), (250, 251)]])
def test_a_file_that_ends_too_early_is_noticed(source: Source, spans: list[tuple[int, int]]) -> None:
    with source:
        assert not source.fill([(start, memoryview(bytearray(stop - start))) for start, stop in spans])


def test_its_end_closes_the_file(source: Source) -> None:
    with source:
        pass
    with pytest.raises(ValueError, match="closed"):
        source.fill([(0, memoryview(bytearray(1)))])
