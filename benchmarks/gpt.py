"""A GPT-2 in plain torch, and a LightningModule that trains it and measures its computing time."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override


@dataclass(frozen=True)
class Size:
    """A GPT's dimensions and its batch.

    Attributes:
        layers: Transformer blocks.
        width: Features of a token.
        heads: Attention heads.
        vocabulary: The number of different tokens.
        positions: The longest sequence.
        sequence: Tokens of one sequence.
        batch: Sequences of one training step.
        dtype: The type of the parameters. Moments are float32.

    """

    layers: int
    width: int
    heads: int
    vocabulary: int
    positions: int
    sequence: int
    batch: int = 1
    dtype: torch.dtype = torch.float32


#: 124 M parameters; with Adam 1.49 GB of state. Few tokens, so that one step takes about a second on two cores.
GPT2_SMALL = Size(layers=12, width=768, heads=12, vocabulary=50257, positions=1024, sequence=96)
#: For a quick check that everything works.
TINY = Size(layers=2, width=64, heads=2, vocabulary=4096, positions=64, sequence=32)
#: The first with as many tokens as an accelerator needs to be busy.
GPT2_SMALL_ON_DEVICE = replace(GPT2_SMALL, sequence=1024, batch=8)
#: 1.3 B parameters in bfloat16; with moments 13.2 GB of state.
GPT_1_3B = Size(
    layers=24, width=2048, heads=16, vocabulary=50257, positions=2048, sequence=1024, batch=4, dtype=torch.bfloat16
)


class _Block(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads, width = size.heads, size.width
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    @override
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.attention_norm(x)).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))  # type: ignore[no-any-return]


class GPT(nn.Module):
    """GPT-2: pre-norm blocks, learned positions, and the token embedding as the output layer.

    Args:
        size: Its dimensions.

    """

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens = nn.Embedding(size.vocabulary, size.width)
        self.positions = nn.Embedding(size.positions, size.width)
        self.blocks = nn.ModuleList(_Block(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                # As in GPT-2. Torch's default for embeddings makes gradients denormal, and the CPU five times slower.
                nn.init.normal_(parameter, std=0.02)

    @override
    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        # Tied by use, not by a second name, so that no peer writes the same tensor twice.
        return F.linear(self.norm(x), self.tokens.weight)


class WideAdam(Optimizer):
    """Adam with moments in float32, whatever the type of the parameters.

    Args:
        parameters: The parameters.
        rate: The learning rate.

    """

    def __init__(self, parameters: Iterable[nn.Parameter], rate: float) -> None:
        super().__init__(parameters, {"lr": rate, "betas": (0.9, 0.999), "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make a step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._update([parameter for parameter in group["params"] if parameter.grad is not None], group)
        return loss

    def _update(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        first, second = group["betas"]
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros(())
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = torch.zeros_like(parameter, dtype=torch.float32)
            state["step"] += 1
            gradient = parameter.grad.float()  # type: ignore[union-attr]
            state["exp_avg"].lerp_(gradient, 1 - first)
            state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
            steps = int(state["step"])
            root = state["exp_avg_sq"].sqrt().div_((1 - second**steps) ** 0.5).add_(group["eps"])
            parameter.add_((state["exp_avg"] / root).to(parameter.dtype), alpha=-group["lr"] / (1 - first**steps))


class Stopwatch:
    """Sums the time between starts and stops."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started: float | None = None

    def start(self) -> None:
        """Start counting."""
        self._started = time.perf_counter()

    def stop(self) -> None:
        """Stop counting, if it is running."""
        if self._started is not None:
            self.seconds += time.perf_counter() - self._started
            self._started = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of a block."""
        self.start()
        yield
        self.stop()


class GPTModule(pl.LightningModule):
    """Trains a :class:`GPT` with Adam.

    ``computing`` counts forward, backward and update. A save can only lengthen what the training thread does between
    them, so a stall shows there wherever its cause is called from.

    Args:
        size: The model's dimensions.
        device: Where it is made.

    """

    def __init__(self, size: Size, device: str = "cpu") -> None:
        super().__init__()
        with torch.device(device):
            self.model = GPT(size).to(size.dtype)
        self.computing = Stopwatch()
        self.forward_backward = Stopwatch()

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        with self.computing.running(), self.forward_backward.running():
            logits = self.model(batch[:, :-1])
            return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

    @override
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        with self.computing.running(), self.forward_backward.running():
            loss.backward(*args, **kwargs)  # type: ignore[no-untyped-call]

    @override
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        with self.computing.running():
            optimizer.zero_grad()

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        # Called after the callbacks' hook of the same name, thus after their fences; the update follows.
        self.computing.start()

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.computing.stop()

    @override
    def configure_optimizers(self) -> Optimizer:
        is_narrow = any(parameter.dtype != torch.float32 for parameter in self.parameters())
        return WideAdam(self.parameters(), 1e-4) if is_narrow else torch.optim.Adam(self.parameters(), lr=1e-4)


class _Tokens(IterableDataset[Tensor]):
    def __init__(self, size: Size) -> None:
        generator = torch.Generator().manual_seed(0)
        self.sequences = torch.randint(size.vocabulary, (64, size.sequence + 1), generator=generator)

    @override
    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield from self.sequences


def token_loader(size: Size) -> "DataLoader[Tensor]":
    """Return an endless loader of random tokens, generated in advance."""
    return DataLoader(_Tokens(size), batch_size=size.batch)


def new_trainer(callbacks: list[Callback], device: str = "cpu") -> pl.Trainer:
    """Return a Trainer on one device that does nothing but train and call the callbacks."""
    return pl.Trainer(
        max_epochs=1,
        accelerator=device,
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )


def state_bytes(module: nn.Module, optimizer: Optimizer) -> tuple[int, int]:
    """Return the bytes of the parameters, without and with their optimizer state."""
    parameters = sum(parameter.nbytes for parameter in module.parameters())
    moments = sum(value.nbytes for state in optimizer.state.values() for value in state.values() if value.dim())
    return parameters, parameters + moments
