"""What versions before format 2 have written is read, continued and merged."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from toy_blocks import head

from lightning_scar.storage.delta import StoredBlock
from lightning_scar.storage.head import Mark, Version
from lightning_scar.storage.index import Located
from lightning_scar.storage.rank_store import RankStore
from lightning_scar.storage.reading import Reading, fill
from lightning_scar.storage.store import DeltaStore

FIXTURE = Path(__file__).parent / "format_1"
GROUPS = ["state_dict/weight", "state_dict/bias"]


@pytest.fixture
def store(tmp_path: Path) -> RankStore:
    shutil.copytree(FIXTURE / "scar", tmp_path / "scar")
    store = RankStore(tmp_path / "scar")
    store.refresh()
    return store


def values(store: DeltaStore, located: Located) -> dict[str, np.ndarray]:
    into = located.block.new_memory()
    assert not fill([Reading(located, lambda: into)])
    return {slot: np.frombuffer(into[slot], "<f4") for slot in into if located.block.group in GROUPS}


def expected(block: StoredBlock) -> dict[str, np.ndarray]:
    """What the version that wrote it loaded."""
    loaded = torch.load(FIXTURE / "loaded.pt", weights_only=True)
    state = loaded["optimizer_states"][0]["state"][GROUPS.index(block.group)]
    tensors = {"param": loaded["state_dict"][block.group.removeprefix("state_dict/")], **state}
    return {slot: tensors[slot][slice(*block.span)].flatten().numpy() for slot in block.slots}


def check(store: DeltaStore) -> None:
    """Both versions of every block are intact, and the newest are what they were."""
    assert store.verify() == []
    keys = [f"state_dict/weight[{i}:{i + 1}]" for i in range(6)] + ["state_dict/bias[0:6]", "skeleton-0000"]
    assert sorted(store.index.keys()) == sorted(keys)
    for key in keys[:-1]:
        newest, older = store.index.versions(key)
        assert older.block.version == Version(1, 0, 1)
        assert values(store, older).keys() == {"param", "exp_avg", "exp_avg_sq"}
        found = values(store, newest)
        for slot, value in expected(newest.block).items():
            assert np.array_equal(found[slot], value), (key, slot)


def test_all_blocks_are_read_in_both_versions(store: RankStore) -> None:
    check(store)
    assert (store.index.lineage, store.index.consistent) == ((1,), Mark(1, 1))
    assert [delta.refreshes for delta in store.deltas] == [()] * 5


def test_every_flipped_byte_of_a_header_is_noticed(store: RankStore) -> None:
    path = Path(store.directory.path) / store.deltas[-1].name
    data = path.read_bytes()
    for position in range(0, 8 + int.from_bytes(data[:8], "little"), 7):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        reader = DeltaStore(store.directory.url)
        reader.refresh()
        assert len(reader.damaged) == 1


def test_it_is_merged_into_the_present_format_as_it_is(store: RankStore) -> None:
    store._merge(head(Version(1, 6, 7), (Mark(1, 1),)), store.own_deltas)
    reader = DeltaStore(store.directory.url)
    check(reader)
    newest, older = reader.deltas
    assert {block.version.sequence for block in older.blocks} == {0}
    assert len(newest.blocks) == len(older.blocks) == 8
    with safe_open(newest.file, framework="pt") as file:
        assert file.get_tensor("state_dict/weight/exp_avg").shape == (6, 8)
