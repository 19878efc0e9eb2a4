import pytest
import torch

from lightning_scar.core.memory import memory


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float8_e5m2, torch.complex128, torch.uint16])
def test_memory_shows_every_byte_of_any_dtype(dtype: torch.dtype) -> None:
    tensor = torch.ones(2, 3).to(dtype)
    assert memory(tensor).nbytes == tensor.nbytes
    assert memory(tensor).tobytes() == bytes(tensor.view(-1).view(torch.uint8).tolist())


def test_writing_to_the_memory_changes_the_tensor() -> None:
    tensor = torch.zeros(2, dtype=torch.int16)
    memory(tensor)[2] = 7
    assert tensor.tolist() == [0, 7]
