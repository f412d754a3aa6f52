"""Backbones with named slots, and ``build``, which makes one for a task."""

from __future__ import annotations

from typing import Any

from torch import nn

from interlayer import catalog
from interlayer.core.data import DataShape
from interlayer.core.fields import Implicit
from interlayer.core.search import CellNet, Supernet, read_genotype
from interlayer.core.slots import parse_spec
from interlayer.models.classic import MobileNetV3Small, ResNet18
from interlayer.models.convnet import ConvNet
from interlayer.models.crepe import Crepe
from interlayer.models.diffusion import DiT
from interlayer.models.encoder_decoder import EncoderDecoder
from interlayer.models.mlp import MLP
from interlayer.models.transformer import Encoder, Transformer, VisionTransformer
from interlayer.models.trees import SoftTrees

__all__ = [
    "BASES",
    "MLP",
    "CellNet",
    "ConvNet",
    "Crepe",
    "DiT",
    "Encoder",
    "EncoderDecoder",
    "MobileNetV3Small",
    "ResNet18",
    "SoftTrees",
    "Supernet",
    "Transformer",
    "VisionTransformer",
    "build",
]


def _transformer(shape: DataShape, **options: Any) -> nn.Module:
    return Transformer(**{"vocab": shape.vocab, "length": shape.length, **options})


def _encoder(shape: DataShape, **options: Any) -> nn.Module:
    return Encoder(**{"vocab": shape.vocab, "classes": shape.classes, "length": shape.length, **options})


def _vit(shape: DataShape, **options: Any) -> nn.Module:
    options.setdefault("patch", 2 if shape.height <= 16 else 4)
    return VisionTransformer(shape.channels, (shape.height, shape.width), classes=shape.classes, **options)


def _vit_digits(shape: DataShape, **options: Any) -> nn.Module:
    return _vit(shape, **{"depth": 2, "width": 32, "heads": 2, **options})


def _mlp(shape: DataShape, **options: Any) -> nn.Module:
    return MLP(shape.flat, shape.classes, **options)


def _soft_trees(shape: DataShape, **options: Any) -> nn.Module:
    return SoftTrees(shape.flat, shape.classes, **options)


def _convnet(shape: DataShape, **options: Any) -> nn.Module:
    return ConvNet(shape.channels, shape.classes, **options)


def _resnet18(shape: DataShape, **options: Any) -> nn.Module:
    return ResNet18(shape.channels, shape.classes, **{"width": 16, **options})


def _mobilenet(shape: DataShape, **options: Any) -> nn.Module:
    return MobileNetV3Small(shape.channels, shape.classes, **{"width": 0.5, **options})


def _dit(shape: DataShape, **options: Any) -> nn.Module:
    given = {
        "patch": 2,
        "depth": 4,
        "width": 64,
        "heads": 4,
        "classes": shape.classes,
        "learned_variance": False,
        **options,
    }
    return DiT(shape.channels, (shape.height, shape.width), **given)


def _field(shape: DataShape, **options: Any) -> nn.Module:
    options = {"activation": "sine", **options}
    if "width" in options:
        return Implicit(shape.features, shape.classes, **options)
    return Implicit.within(options.pop("size", 1800), shape.features, shape.classes, **options)


def _encoder_decoder(shape: DataShape, **options: Any) -> nn.Module:
    return EncoderDecoder(**{"vocab": shape.vocab, "source": shape.source, "length": shape.length, **options})


def _cells(shape: DataShape, **options: Any) -> nn.Module:
    given = options.get("genotype")
    if isinstance(given, str):  # on the command line, the name of a file
        options["genotype"] = read_genotype(given)
    return CellNet(shape.channels, shape.classes, **options)


def _supernet(shape: DataShape, **options: Any) -> nn.Module:
    return Supernet(shape.channels, shape.classes, **options)


BASES = {
    "transformer": (_transformer, {("tokens", "tokens")}),
    "encoder": (_encoder, {("tokens", "classes")}),
    "vit": (_vit, {("image", "classes")}),
    "vit-digits": (_vit_digits, {("image", "classes")}),  # small enough to be trained on the built-in digits in seconds
    "mlp": (_mlp, {(kind, out) for kind in ("image", "vector", "series") for out in ("classes", "values")}),
    "soft-trees": (_soft_trees, {(kind, out) for kind in ("image", "vector") for out in ("classes", "values")}),
    "convnet": (_convnet, {("image", "classes")}),
    "dit": (_dit, {("image", "noise")}),
    "cells": (_cells, {("image", "classes")}),
    "supernet": (_supernet, {("image", "classes")}),
    "resnet18": (_resnet18, {("image", "classes")}),
    "mobilenetv3": (_mobilenet, {("image", "classes")}),
    "field": (_field, {("vector", "values")}),
    "encoder-decoder": (_encoder_decoder, {("seq2seq", "tokens")}),
}


def build(base: str, shape: DataShape, **options: Any) -> nn.Module:
    """A backbone of a named family, or a catalogue model, sized for the task's data.

    Args:
        base: One of ``BASES``, or a catalogue system that is or brings a network with ``for_task(shape, **options)``;
            options may be given in brackets: ``"transformer(depth=12)"``.
        shape: What the task gives and wants.
        **options: Sizes and slots of the backbone.

    Raises:
        ValueError: Unknown base, or one that cannot take this kind of data.
    """
    name, own = parse_spec(base)
    options = {**own, **options}
    if name in BASES:
        make, takes = BASES[name]
        if (shape.kind, shape.outputs) not in takes:
            fits = [b for b, (_, t) in BASES.items() if (shape.kind, shape.outputs) in t]
            these = f"these can: {fits}" if fits else "no backbone can. Take a model of the catalogue"
            raise ValueError(f"models: {name!r} cannot take {shape.kind} and give {shape.outputs}; {these}.")
        return make(shape, **options)
    systems = catalog.load()
    if name in systems and systems[name].has_network:
        return systems[name].resolve_network().for_task(shape, **options)
    models = [*BASES, *(s.slug for s in systems.values() if s.has_network)]
    raise ValueError(f"models: no base {name!r}.{catalog.nearest(name, models)} There are {models}.")
