"""The parts, in the order of the table."""

from gpu.part import Part

_OUTAGES = ("survivors_seconds_median", "seconds_median", "outages", "off_by")
_STALL = (
    *("scar_blocked_s", "dcp_blocked_s", "dcp_overlapped_blocked_s", "async_blocked_s"),
    *("scar_added_s", "dcp_added_s", "async_added_s", "scar_kept_bytes", "scar_extra_bytes", "restore_s"),
)


def _job(name: str, shows: str, function: str, seconds: float = 120, *more: str) -> Part:
    return Part(name, shows, f"gpu.jobs:{function}", seconds, tells=(*_OUTAGES, *more))


_ALL = [
    Part("machine", "the card, its driver and versions", "gpu.machine:facts", 60, True, ("card", "torch", "nccl")),
    Part(
        "staging",
        "saves hold old values, however late the device is, and the training thread waits for nothing",
        "gpu.staging:tests",
        120,
        tells=("passed", "failing"),
    ),
    Part(
        "waits",
        "a save in a Trainer adds no call that waits, by the profile of the training thread",
        "gpu.staging:waits",
        90,
        tells=("steps", "with", "without"),
    ),
    Part("stall-small", "a save of GPT-2 small: time, device memory", "gpu.stall:small", 150, True, _STALL),
    Part("stall-large", "the same of 1.3 B parameters in bf16, moments in fp32", "gpu.stall:large", 240, True, _STALL),
    Part(
        "resuming",
        "runs of many kinds go on in another process, on the card, to the same bits",
        "gpu.resuming:resumed",
        200,
        tells=("same",),
    ),
    _job("trainer-gloo", "two ranks of a Trainer: kills in a step, in a collective, of rank 0", "trainer_gloo"),
    _job("trainer-nccl", "the same over NCCL", "trainer_nccl"),
    _job("loop-gloo", "three ranks of a loop: two die at once, then rank 0", "loop_gloo"),
    _job("loop-nccl", "the same over NCCL", "loop_nccl"),
    _job("hang-gloo", "a worker that is stopped is killed and replaced", "hang_gloo"),
    _job("hang-nccl", "the same over NCCL", "hang_nccl"),
    _job("random", "dropout on the device: an outage changes no random number", "random_numbers", 180),
    _job(
        "broken-device",
        "a device fails in a step, in replacements, and for ever",
        "broken_device",
        180,
        "for_ever_code",
    ),
    _job(
        "prepared",
        "the process that workers are forked from has no context of the device",
        "prepared_parent",
        120,
        "parents_with_a_context",
        "workers_with_a_context",
    ),
]
PARTS = {part.name: part for part in _ALL}
