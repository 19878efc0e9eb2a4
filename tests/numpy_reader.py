"""A reader of running checkpoints that knows docs/format.md and numpy, and nothing of this library."""

import collections
import json
from pathlib import Path
from typing import Any

import numpy as np

Block = tuple[str, int, int]


def read_delta(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The strings of a header, and the entries as arrays; bfloat16 as float32."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:start])
    metadata, arrays = entries.pop("__metadata__"), {}
    for name, entry in entries.items():
        raw = data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]
        if entry["dtype"] == "BF16":
            found = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
        else:
            kind, size = entry["dtype"][0].lower(), entry["dtype"][1:]
            found = np.frombuffer(raw, "?" if size == "OOL" else f"<{kind}{int(size) // 8}")
        arrays[name] = found.reshape(entry["shape"])
    return {name: json.loads(text) for name, text in metadata.items() if text[0] in "[{"}, arrays


def decode(codec: str, codes: np.ndarray, scales: np.ndarray, n: int) -> np.ndarray:
    """The float32 values of one block, from its codes and scales."""
    is_linear, bits, tiles = codec.startswith("linear"), int(codec[-1]), -(-n // 128)
    rest = (codes.view("i1") if is_linear else codes).reshape(tiles, -1).astype("<i4")
    offset, pieces = (1 << (bits - 1) if is_linear else 0), []
    for _ in range(8 // bits):
        pieces.append(((rest + offset) & ((1 << bits) - 1)) - offset)
        rest = (rest - pieces[-1]) >> bits
    found = np.concatenate(pieces, 1)
    if is_linear:
        return (found.astype("<f4") * scales[:, None]).reshape(-1)[:n]
    low, high = scales.view("<i4").reshape(2, tiles, 1) >> 16
    patterns = (low << 16) + (found - 1) * ((high - low) * (65536 // ((1 << bits) - 2)))
    return np.where(found > 0, patterns.view("<f4"), np.float32(0)).reshape(-1)[:n]


def read(directory: Path) -> dict[Block, dict[str, np.ndarray]]:
    """The slots of every block in its newest state, base and refresh together, by group, first row and last row."""
    files = [read_delta(path) for path in directory.glob("rank-*/*.safetensors")]
    files.sort(key=lambda file: (file[0]["head"]["incarnation"], file[0]["head"]["sequence"]))
    bases: dict[Block, tuple[list[int], dict[str, np.ndarray]]] = {}
    for metadata, arrays in files:
        table = iter(arrays["blocks"].tolist())
        for group, slots, count in metadata["sections"]:
            done = 0
            for first, last, *version in (next(table) for _ in range(count)):
                rows = slice(done, done := done + last - first) if last else slice(None)
                if bases.get((group, first, last), ([], {}))[0] <= version:
                    bases[group, first, last] = version, {slot: arrays[f"{group}/{slot}"][rows] for slot in slots}
    found = {block: dict(slots) for block, (_, slots) in bases.items()}
    for metadata, arrays in files:
        table = iter(arrays["refreshed"].tolist())
        codes_end, scales_end = collections.Counter[str](), collections.Counter[str]()
        for group, slots, count in metadata["refresh"]:
            for first, last, *base in (next(table) for _ in range(count)):
                version, exact = bases[group, first, last]
                for slot, codec in slots.items():
                    n = exact[slot].size
                    tiles = -(-n // 128)
                    codes, scales = (arrays[f"refresh/{slot}/{kind}"] for kind in ("codes", "scales"))
                    codes = codes[codes_end[slot] :][: tiles * -(-n // (8 * tiles)) * int(codec[-1])]
                    scales = scales[scales_end[slot] :][: tiles * (1 if codec.startswith("linear") else 2)]
                    codes_end[slot] += codes.size
                    scales_end[slot] += scales.size
                    if version[:2] == base:
                        new = decode(codec, codes, scales, n).reshape(exact[slot].shape)
                        if slot == next(iter(exact)):
                            new = exact[slot].astype(np.promote_types(exact[slot].dtype, np.float32)) + new
                        found[group, first, last][slot] = new.astype(exact[slot].dtype)
    return found
