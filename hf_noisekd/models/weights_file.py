"""A file of weights that a training wrote: which weights are meant, and what it says of the model beside them."""

import argparse
import contextlib
import pickle
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import safetensors.torch
import timm
import torch
from timm.models import get_deprecated_models

from hf_noisekd.models.preprocessing import INTERPOLATIONS

# Numbers of numpy, arrays of them and their types. Arrays of objects, which may be anything, are not among them.
CODES = np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?USMm"
BUILDERS: tuple[Any, ...] = (np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0])
PLAIN: list[Any] = [argparse.Namespace, np.dtype, np.ndarray, *{type(np.dtype(code)) for code in CODES}]
PLAIN += [(build, f"numpy.{core}.multiarray.{build.__name__}") for build in BUILDERS for core in ("core", "_core")]

SIZES = ("input_size", "img_size")
PREPROCESSING = (*SIZES, "mean", "std", "interpolation", "crop_pct")


@dataclass(frozen=True)
class WeightsFile:
    """What a file of weights holds.

    timm's `train.py` saves its arguments as `args`, and the name of the model as `arch`. A None or an empty text among
    the arguments means: as that model of timm has it.
    """

    content: Any
    arch: str = ""
    args: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "WeightsFile":
        """Read safetensors, or what `torch.save` wrote, without running pickled code; a `ValueError` if it has some."""
        if path.suffix == ".safetensors":
            return cls(safetensors.torch.load_file(path))
        with torch.serialization.safe_globals(PLAIN):
            try:
                content = torch.load(path, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError as error:
                raise ValueError(
                    f"it {_harm(path)}, which may run code. Save only the `state_dict()` of the model."
                ) from error
        if not isinstance(content, Mapping):
            return cls(content)
        args = content.get("args")
        args = vars(args) if isinstance(args, argparse.Namespace) else args
        args = args if isinstance(args, Mapping) else {}
        return cls(content, str(content.get("arch") or args.get("model") or ""), args)

    def weights(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """Return the tensors with the most of `names`; averaged weights before others."""
        if not (found := list(_named_tensors(self.content))):
            raise ValueError("it contains no tensors with names")
        return max(found, key=lambda tensors: len(tensors.keys() & names))

    def full_name(self, name: str) -> str:
        """Return timm's `name` of a model, with the tag that the file has where it has none.

        There is a `ValueError` if the file is of another architecture.
        """
        given, said = _current_name(name), _current_name(self.arch)
        architecture = said.partition(".")[0]
        if not timm.is_model(architecture):  # the name of a class, for want of another, or a repository
            return name
        if architecture != given.partition(".")[0]:
            raise ValueError(f"its weights are of {self.arch!r}, and the model is {name!r}: give {self.arch!r}")
        is_known = said in (architecture, *timm.list_pretrained(f"{architecture}.*"))
        return said if is_known and "." not in given else name

    def model_args(self) -> dict[str, Any]:
        """Return the arguments of timm that the model was built with, but for those of its training alone."""
        further = self.args.get("model_kwargs") or {}
        if not isinstance(further, Mapping) or not all(isinstance(key, str) for key in further):
            raise self._refusal("model_kwargs", "to build a model with")
        given = {"global_pool": self.args.get("gp"), "bn_eps": self.args.get("bn_eps")} | dict(further)
        return {key: value for key, value in given.items() if value is not None and "drop" not in key}

    def preprocessing(self, cfg: Mapping[str, Any], channels: int) -> dict[str, Any]:
        """Return what images of some `channels` were made with, as far as `cfg`, timm's `pretrained_cfg`, has others.

        It is empty if the file says nothing of it.
        """
        if not self.args.keys() & PREPROCESSING:
            return {}
        args = {key for key in PREPROCESSING if self.args.get(key) is not None and str(self.args[key])}
        sizes = [self._numbers(key, (1, 2, 3)) for key in SIZES if key in args]
        sides = [int(side) for side in (*sizes, cfg["input_size"])[0][-2:]]
        found: dict[str, Any] = {"input_size": (channels, *sides * (2 // len(sides)))}
        for key in ("mean", "std"):
            values = self._numbers(key, (1, channels)) if key in args else cfg[key]
            # timm's loaders do the same with gray images.
            values = values if len(values) == channels else [fmean(values)] * channels
            found[key] = tuple(values)
        if "crop_pct" in args:
            [found["crop_pct"]] = self._numbers("crop_pct", (1,))
        if "interpolation" in args:
            found["interpolation"] = self.args["interpolation"]
            if found["interpolation"] not in INTERPOLATIONS:
                raise self._refusal("interpolation", f"and timm knows {', '.join(INTERPOLATIONS)}")
        return found

    def _numbers(self, key: str, lengths: Sequence[int]) -> list[float]:
        """Return the number or the numbers of an argument."""
        with contextlib.suppress(TypeError, ValueError):
            found = np.atleast_1d(np.asarray(self.args[key], dtype=float)).tolist()
            if len(found) in lengths and np.isfinite(found).all() and (key == "mean" or min(found) > 0):
                return found
        sign = "" if key == "mean" else " above 0"
        raise self._refusal(key, f"where {' or '.join(map(str, sorted(set(lengths))))} numbers{sign} are wanted")

    def _refusal(self, key: str, why: str) -> ValueError:
        return ValueError(
            f"the arguments of its training have {key}={self.args[key]!r}, {why}. Save only the `state_dict()` of the "
            "model to load it without them."
        )


def _harm(path: Path) -> str:
    with contextlib.suppress(Exception):  # of a damaged file
        if names := torch.serialization.get_unsafe_globals_in_checkpoint(path):
            return f"contains Python objects ({', '.join(sorted(names))})"
    return "is damaged, or contains Python objects"


def _current_name(name: str) -> str:
    """Return what timm calls a model today, without the place of its weights."""
    name = name.rpartition("/")[2]
    return get_deprecated_models().get(name.partition(".")[0]) or name


def _named_tensors(content: Any, depth: int = 8) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the mappings from names to tensors in a file, also those below a prefix like `module.`."""
    if not isinstance(content, Mapping) or depth == 0:
        return
    for key in sorted(content, key=_is_not_average):
        yield from _named_tensors(content[key], depth - 1)
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and torch.is_tensor(value)}
    prefixes = dict.fromkeys(name.partition(".")[0] + "." for name in tensors if "." in name)
    for prefix in sorted(["", *prefixes], key=_is_not_average):
        below = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if prefix:
            yield from _named_tensors(below, depth - 1)
        elif tensors:
            yield tensors


def _is_not_average(name: object) -> bool:
    """Whether a name is not that of weights averaged over the training (EMA), which come first, as in timm."""
    return "ema" not in str(name).lower()
