"""Models that decide themselves what they load, each as it was saved and as it resumes."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from helpers import TinyModel, WithABody
from torch import Tensor, nn
from torch.optim import SGD

#: An optimizer whose state a resumed run needs, and which takes parameters without values.
MOMENTUM = partial(SGD, lr=0.01, momentum=0.9)


class Renamed(WithABody):
    """Reads what was saved when ``body`` was called ``net``."""

    def load_state_dict(self, state_dict: Any, *args: Any, **options: Any) -> Any:
        renamed = {name.replace("net.", "body."): value for name, value in state_dict.items()}
        return super().load_state_dict(renamed, *args, **options)


class Compiled(TinyModel):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(self.net, backend="eager")  # type: ignore[assignment]


def _without_prefix(module: Any, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    for name in list(state_dict):
        state_dict[name.replace("_orig_mod.", "")] = state_dict.pop(name)


class NoLongerCompiled(TinyModel):
    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(_without_prefix)


class Transposed(nn.Linear):
    """Its weight once lay the other way round, under another name."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if f"{prefix}kernel" in state_dict:
            state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}kernel").T
        super()._load_from_state_dict(state_dict, prefix, *args)


class WithTransposed(TinyModel):
    def __init__(self) -> None:
        super().__init__()
        last = Transposed(32, 1)
        last.load_state_dict(self.net[2].state_dict())
        self.net[2] = last


class SavedTransposed(WithTransposed):
    def state_dict(self, *args: Any, **options: Any) -> Any:
        found, prefix = super().state_dict(*args, **options), options.get("prefix", "")
        found[f"{prefix}net.2.kernel"] = found.pop(f"{prefix}net.2.weight").T
        return found


class Lazy(TinyModel):
    def __init__(self) -> None:
        super().__init__(optimizer=MOMENTUM)
        self.net[0] = nn.LazyLinear(32)

    def on_train_start(self) -> None:
        torch.manual_seed(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Growing(TinyModel):
    """A buffer that grows at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("losses", torch.zeros(1))
        self.register_load_state_dict_pre_hook(_take_the_size)

    def loss(self, batch: Any) -> Tensor:
        loss = super().loss(batch)
        self.losses = torch.cat([self.losses, loss.detach().view(1)])
        return loss


def _take_the_size(module: Any, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    module.losses = torch.empty_like(state_dict[f"{prefix}losses"])


class Remembering(TinyModel):
    """An extra state, a tensor that grows."""

    def __init__(self) -> None:
        super().__init__()
        self.history: list[Tensor] = []

    def loss(self, batch: Any) -> Tensor:
        loss = super().loss(batch)
        self.history.append(loss.detach())
        return loss

    def get_extra_state(self) -> Tensor:
        return torch.tensor([float(loss) for loss in self.history])

    def set_extra_state(self, state: Tensor) -> None:
        self.history = list(state)


class WithoutBackbone(TinyModel):
    """Saves its head only: the rest does not change, and comes from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.net[0].requires_grad_(False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {n: v for n, v in checkpoint["state_dict"].items() if not n.startswith("net.0")}

    def load_state_dict(self, state_dict: Any, strict: bool = True, **options: Any) -> Any:
        return super().load_state_dict(state_dict, strict=False, **options)


class NotStrict(WithoutBackbone):
    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False

    load_state_dict = TinyModel.load_state_dict


class PastTheCounters(TinyModel):
    """Copies in a way that autograd does not see."""

    def load_state_dict(self, state_dict: Any, *args: Any, **options: Any) -> Any:
        for name, parameter in self.named_parameters():
            parameter.data.copy_(state_dict[name])


class Way(NamedTuple):
    saved: Callable[[], TinyModel]
    resumed: Callable[[], TinyModel]


WAYS: dict[str, Way] = {
    "its own load_state_dict": Way(TinyModel, Renamed),
    "no longer compiled": Way(Compiled, NoLongerCompiled),
    "another layout": Way(SavedTransposed, WithTransposed),
    "lazy": Way(Lazy, Lazy),
    "a buffer that grows": Way(Growing, Growing),
    "an extra state that grows": Way(Remembering, Remembering),
    "a backbone left out": Way(WithoutBackbone, WithoutBackbone),
    "a backbone left out, strict_loading": Way(NotStrict, NotStrict),
    "through .data": Way(PastTheCounters, PastTheCounters),
}
