"""Loads the state of optimizers; if the model has changed, that of every parameter which is still there."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_scar.core.blocks import BlockMap
from lightning_scar.core.compatibility import ModelMismatchError
from lightning_scar.core.skeleton import identity
from lightning_scar.core.zero import is_sharded, shard_state


class Owner(NamedTuple):
    """The parameter that a saved optimizer state belongs to: its names, and its shape."""

    names: tuple[str, ...]
    shape: tuple[int, ...]


#: The owner of a state, by the numbers of the optimizer and of the parameter in it.
Owners = Mapping[tuple[int, int], Owner]

NO_OWNERS: Owners = MappingProxyType({})


def owners_of_states(block_map: BlockMap) -> dict[tuple[int, int], Owner]:
    """Return which parameter each saved optimizer state belongs to; a block map pairs them.

    Args:
        block_map: The map that the checkpoint was saved with.

    """
    owners: dict[tuple[int, int], Owner] = {}
    parameters = {group.name: group for group in block_map.groups}
    for group in block_map.groups:
        for slot in group.slots:
            for path in slot.paths:
                if path[0] != "optimizer_states" or len(path) < 5:
                    continue
                # A state of the parameter's shape shares its group; another's group is named after the parameter.
                _, optimizer, _, number, *word = path
                inner = group.name.removeprefix(f"optimizer_states/{optimizer}/state/")
                parameter = parameters.get(inner.removesuffix("/" + ".".join(map(str, word))), group)
                # The name is the second part of the place; that of a wrapped tensor has a third.
                places = [place for place in parameter.slots[0].paths if place[0] != path[0] and len(place) in (2, 3)]
                names = tuple(str(place[1]) for place in places)
                if names:
                    owners[int(optimizer), int(number)] = Owner(names, parameter.shape)
    return owners


def load_optimizers(
    path: str,
    optimizers: Sequence[Optimizer],
    states: Sequence[dict[str, Any]],
    load: Callable[[Sequence[dict[str, Any]]], Any],
    *,
    owners: Owners,
    live: Mapping[str, Any],
    saved_model: Mapping[str, Any],
    strict: bool,
    is_same_model: bool,
) -> None:
    """Load the states of optimizers.

    Torch pairs them with parameters by position. If the model has changed, that would give parameters the state of
    others, so they are paired by name here; or by value, those that the model renames as it loads them.

    Args:
        path: The path of the checkpoint, for messages.
        optimizers: The optimizers.
        states: Their saved states.
        load: Loads such states.
        owners: From :func:`owners_of_states`.
        live: The ``state_dict`` of the model, after it has loaded.
        saved_model: The one that it has loaded.
        strict: Whether it is an error if torch refuses a state.
        is_same_model: Whether all of the model was loaded.

    Raises:
        ModelMismatchError: If torch refuses a state.

    """
    if is_same_model:
        try:
            load(states)
            return
        except ValueError as error:
            if strict:
                raise ModelMismatchError(
                    f"{path} was written with other optimizers: {_sizes(state['param_groups'] for state in states)} "
                    "parameters in the groups of each, now "
                    f"{_sizes(optimizer.param_groups for optimizer in optimizers)}: {error}. Use another dirpath, or "
                    "`strict=False` to load what fits."
                ) from error
    former = _former_names(live, saved_model)
    names = {identity(value): former.get(name, name) for name, value in live.items() if isinstance(value, Tensor)}
    fitting, loaded, count = [], 0, 0
    for i, (optimizer, state) in enumerate(zip(optimizers, states, strict=False)):
        saved = {name: number for (j, number), owner in owners.items() if j == i for name in owner.names}
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        numbers = [saved.get(names.get(identity(parameter), "")) for parameter in parameters]
        fits = [
            number if number is not None and owners[i, number].shape == tuple(parameter.shape) else None
            for number, parameter in zip(numbers, parameters, strict=True)
        ]
        fitting.append(_rearranged(optimizer, state, fits))
        loaded += len(fitting[-1]["state"])
        count += len(parameters)
    load(fitting)
    if any(state["state"] for state in states) and loaded < count:
        warnings.warn(
            f"lightning-scar: {path}: the optimizers' state of {loaded} of {count} parameters was loaded; for the "
            "others they begin anew",
            stacklevel=2,
        )


def _former_names(live: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, str]:
    """Return under which names the tensors were saved that have none of the saved names: those of the same values."""
    before, now = (
        _by_value({name: value for name, value in one.items() if name not in other and isinstance(value, Tensor)})
        for one, other in ((saved, live), (live, saved))
    )
    return {
        name: before[key][0]
        for key, (name, *others) in now.items()
        if not others and len(before.get(key, ())) == 1 and torch.equal(live[name].cpu(), saved[before[key][0]].cpu())
    }


def _by_value(tensors: Mapping[str, Tensor]) -> dict[Any, list[str]]:
    """Return the names of tensors by shape and first values, which tell most of them apart."""
    names: dict[Any, list[str]] = {}
    for name, value in tensors.items():
        if not is_lazy(value) and value.layout is torch.strided and value.numel():
            names.setdefault((value.shape, tuple(value.detach().flatten()[:16].tolist())), []).append(name)
    return names


def _rearranged(optimizer: Optimizer, saved: dict[str, Any], numbers: Sequence[int | None]) -> dict[str, Any]:
    """Return an optimizer's state with the saved one of some parameters.

    Args:
        optimizer: The optimizer.
        saved: A saved state.
        numbers: For each parameter of the optimizer, its number in the saved state; ``None`` if it has none.

    """
    present = shard_state(optimizer) if is_sharded(optimizer) else optimizer.state_dict()
    if not {"state", "param_groups"} <= present.keys() & saved.keys():
        return {**present, "state": {}}  # Not in torch's format.
    groups, saved_groups = present["param_groups"], saved["param_groups"]
    ids = [i for group in groups for i in group["params"]]
    source = {i: number for i, number in zip(ids, numbers, strict=True) if number in saved["state"]}
    group_of = {number: group for group in saved_groups for number in group["params"]}
    arranged = []
    for i, group in enumerate(groups):
        if len(groups) == len(saved_groups):
            options = saved_groups[i]
        else:
            # E.g. a rate that a schedule has lowered.
            options = next((group_of[source[j]] for j in group["params"] if j in source), group)
        fixed = {"params", "param_names"}
        arranged.append({key: options.get(key, value) if key not in fixed else value for key, value in group.items()})
    return {**present, "state": {i: saved["state"][number] for i, number in source.items()}, "param_groups": arranged}


def _sizes(groups_of_all: Iterable[Sequence[Mapping[str, Any]]]) -> list[list[int]]:
    return [[len(group["params"]) for group in groups] for groups in groups_of_all]
