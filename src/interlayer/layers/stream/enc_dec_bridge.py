"""Encoder-decoder bridge: every decoder layer reads a learned linear map of all encoder layers."""

from __future__ import annotations

from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from interlayer.core.example import Example
from interlayer.core.taps import first

STARTS = ("original", "granularity", "ones", "random")


class EncDecBridge(nn.Module):
    """A bias-free fully connected layer from the concatenated outputs of all encoder layers to each decoder layer.

    Paper: Song, "Rethinking the adaptive relationship between Encoder Layers and Decoder Layers", arXiv:2405.08570.

    Equation: decoder layer m attends to ``[h_1, ..., h_L] W_m`` with ``W_m`` of L D x D, instead of the encoder's last
    output ``h_L``. Initialisations of the study: ``original`` (identity on ``h_L``, zero elsewhere: the model's outputs do
    not change by a bit) and ``granularity``, granularity-consistent attention (identity on the encoder layer that
    mirrors the decoder layer: the first decoder layer reads the last encoder layer and vice versa, as in the author's
    code). In the last experiment the author sets the weights of the model to ones and trains it again; here ``ones`` sets
    those of the bridge, and ``random`` draws them as ``nn.Linear`` does.

    ``attach`` puts a bridge into an unmodified encoder-decoder model by hooks, ``generate`` included. It
    has M L D^2 weights and costs as many multiply-adds for each source token, once for each source; L outputs of the encoder
    are kept until its next run.

    Args:
        width: Features D.
        encoder_layers: Number of encoder layers L.
        decoder_layers: Number of decoder layers M. Defaults to L.
        start: Initialisation, one of ``STARTS``.

    Shapes: the encoder's states [B, L, S, D] to what each decoder layer reads [B, M, S, D].

    Raises:
        ValueError: Unknown ``start``; states of another shape.

    Examples:
        >>> import torch
        >>> net = nn.Transformer(8, 2, 2, 2, 16, dropout=0.0, batch_first=True)
        >>> source, target = torch.randn(3, 5, 8), torch.randn(3, 4, 8)
        >>> before = net(source, target)
        >>> bridge = EncDecBridge.attach(net, encoder=net.encoder, decoder=net.decoder)
        >>> torch.equal(net(source, target), before), tuple(bridge.weight.shape)
        (True, (2, 8, 16))
    """

    def __init__(
        self, width: int, encoder_layers: int, decoder_layers: int | None = None, *, start: str = "original"
    ) -> None:
        super().__init__()
        if start not in STARTS:
            raise ValueError(f"EncDecBridge: start {start!r} is not one of {STARTS}.")
        outputs = decoder_layers or encoder_layers
        self.width, self.encoder_layers = width, encoder_layers
        weight = torch.zeros(outputs, width, encoder_layers, width)
        if start == "ones":
            nn.init.ones_(weight)
        elif start == "random":
            nn.init.uniform_(weight, -((encoder_layers * width) ** -0.5), (encoder_layers * width) ** -0.5)
        else:
            for m in range(outputs):
                mirror = encoder_layers - 1 - m * encoder_layers // outputs
                weight[m, :, encoder_layers - 1 if start == "original" else mirror] = torch.eye(width)
        self.weight = nn.Parameter(weight.flatten(2))
        self._handles: list[RemovableHandle] = []
        self._owner: list[nn.Module] = []  # in a list, so that it is not registered as a submodule
        self._forget()

    def forward(self, states: Float[Tensor, "B L S D"]) -> Float[Tensor, "B M S D"]:
        """The input of every decoder layer."""
        if states.ndim != 4 or states.shape[1] != self.encoder_layers or states.shape[-1] != self.width:
            raise ValueError(
                f"EncDecBridge: states {tuple(states.shape)}; expected [batch, {self.encoder_layers}, sequence, {self.width}], "
                "the outputs of all encoder layers stacked."
            )
        return torch.einsum("bsk,mdk->bmsd", states.transpose(1, 2).flatten(2), self.weight)

    @classmethod
    def attach(
        cls,
        model: nn.Module,
        *,
        start: str = "original",
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
    ) -> Self:
        """Put a bridge between encoder and decoder of a model, in place, as its submodule ``bridge``.

        It trains, moves, copies and saves with the model; to load, attach a bridge to a new model and load the weights.
        The last encoder state is the encoder's output, after its final norm if it has one; the earlier ones are the
        layers' outputs. Encoder outputs that are passed to the model must be those of the encoder's latest run, possibly
        repeated for beams.

        Args:
            model: Any Hugging Face encoder-decoder model, or another module.
            start: As above.
            encoder: Needed where the model has no ``get_encoder``; its first ``ModuleList`` is the layers.
            decoder: As ``encoder``; it is called with the encoder's output as ``encoder_hidden_states``, ``memory`` or second.

        Raises:
            ValueError: No encoder or decoder, no layers in it, or a bridge is there already; layers that are dropped at
                random. In a forward pass: encoder outputs of another run.
        """
        if hasattr(model, "bridge"):
            raise ValueError(f"EncDecBridge: {type(model).__name__} already has a bridge; call its detach() first.")
        ends = (encoder or _end(model, "get_encoder"), decoder or _end(model, "get_decoder"))
        stacks = [next((m for m in end.modules() if isinstance(m, nn.ModuleList)), nn.ModuleList()) for end in ends]
        norms = [m.get_parameter("weight") for m in stacks[0].modules() if "Norm" in type(m).__name__]
        if not len(stacks[1]) or not norms:
            raise ValueError(
                f"EncDecBridge: {type(model).__name__} has no encoder and decoder whose layers are in a ModuleList, with "
                "norms as wide as the states; take an encoder-decoder model, or give encoder= and decoder=."
            )
        if getattr(getattr(model, "config", None), "encoder_layerdrop", 0):
            raise ValueError("EncDecBridge: encoder_layerdrop leaves out layers at random; set it to 0.")
        bridge = cls(norms[0].numel(), len(stacks[0]), len(stacks[1]), start=start).to(norms[0])
        model.add_module("bridge", bridge)
        keep = bridge._handles.append
        keep(ends[0].register_forward_pre_hook(bridge._start))
        for layer in stacks[0]:
            keep(layer.register_forward_hook(bridge._see))
        keep(ends[0].register_forward_hook(bridge._end))
        keep(ends[1].register_forward_pre_hook(bridge._match, with_kwargs=True))
        for number, layer in enumerate(stacks[1]):
            keep(layer.register_forward_pre_hook(partial(bridge._feed, number), with_kwargs=True))
        bridge._owner.append(model)
        return bridge

    def detach(self) -> None:
        """Remove the bridge and restore the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for owner in self._owner:
            delattr(owner, "bridge")
        self._owner.clear()
        self._forget()

    def _forget(self) -> None:
        self._states: list[Tensor] = []
        self._source: Tensor | None = None
        self._fed: dict[int, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Copies do not carry the activations of the last pass."""
        return {**self.__dict__, "_states": [], "_source": None, "_fed": {}}

    def _start(self, module: nn.Module, args: Any) -> None:
        self._forget()

    def _see(self, module: nn.Module, args: Any, output: Any) -> None:
        self._states.append(first(output))

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._states[-1] = self._source = first(output)

    def _match(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check that the decoder got the encoder's output, and repeat the earlier states as that was repeated."""
        source = kwargs.get("encoder_hidden_states", kwargs.get("memory", args[1] if len(args) > 1 else None))
        if source is self._source:
            return
        states = self._states
        if isinstance(source, Tensor) and states:
            times = max(source.shape[0] // states[-1].shape[0], 1)
            states = [s.repeat_interleave(times, 0) for s in states]
        if not states or not isinstance(source, Tensor) or not torch.equal(source, states[-1]):
            raise ValueError(
                "EncDecBridge: the decoder got encoder outputs that are not those of the encoder's latest run, so the "
                "states of its other layers are not known; run the encoder again."
            )
        self._states, self._source, self._fed = states, source, {}

    def _feed(self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        fed = self._fed.get(number)
        if fed is None:
            fed = F.linear(torch.cat(self._states, -1), self.weight[number])
            if not torch.is_grad_enabled():  # decoding: the same source for every token
                self._fed[number] = fed
        return (
            tuple(fed if a is self._source else a for a in args),
            {k: fed if a is self._source else a for k, a in kwargs.items()},
        )


def _end(model: nn.Module, get: str) -> nn.Module:
    """A Hugging Face model's encoder or decoder; an empty module if it has none."""
    found = getattr(model, get, nn.Module)()
    return found if isinstance(found, nn.Module) and found is not model else nn.Module()


EXAMPLE = Example(
    make=lambda: EncDecBridge(4, 3, 2, start="random"),
    inputs=lambda: (torch.randn(2, 3, 5, 4),),
    odd=lambda: (torch.randn(3, 3, 7, 4),),
    axis=2,
)
