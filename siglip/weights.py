"""Loading a checkpoint's weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from siglip.checkpoints.files import CheckpointError
from siglip.checkpoints.layouts import check_weights, list_weights
from siglip.checkpoints.settings import Architecture, NaFlexArchitecture
from siglip.towers.naflex import NaFlexTower
from siglip.towers.text import TextTower
from siglip.towers.vit import VisionTower

DTYPES = ("F64", "F32", "F16", "BF16")
"""The dtypes, as safetensors names them, in which weights are stored as they are."""
PREFIXES = ("module.", "_orig_mod.", "model.", "siglip.")
"""What wrappers put before every name: data-parallel training, torch.compile, and classes with the model as a field."""


class Siglip(nn.Module):
    """Both towers, and the scale and bias of the logits: all weights of a checkpoint, by its names."""

    def __init__(self, architecture: Architecture | NaFlexArchitecture) -> None:
        super().__init__()
        self.text_model = TextTower(architecture.text_config)
        self.vision_model: VisionTower | NaFlexTower
        if isinstance(architecture, NaFlexArchitecture):
            self.vision_model = NaFlexTower(architecture.vision_config)
        else:
            self.vision_model = VisionTower(architecture.vision_config)
        self.logit_scale, self.logit_bias = (nn.Parameter(torch.empty(1)) for _ in range(2))


def load_model(
    directory: Path, source: str, architecture: Architecture | NaFlexArchitecture, *, texts: bool = True
) -> Siglip:
    """Load a checkpoint's weights as float32, from one safetensors file or from shards, stored as float16 to float64.

    Without `texts` the text tower's weights are not read, and stay on torch's `meta` device. Position ids, which older
    versions of transformers saved, and a prefix before every name (`PREFIXES`) are ignored. Raises `CheckpointError`
    for weights that are missing, not the model's, of another shape, quantized, or not finite; the message names the
    first few.
    """
    check_weights(directory, source)
    paths = list_weights(directory, source)
    with torch.device("meta"):
        model = Siglip(architecture)
    wanted = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    try:
        with ExitStack() as stack:
            files = [stack.enter_context(safe_open(path, framework="pt")) for path in paths]
            all_names = [(name, file) for file in files for name in list(file.keys())]
            prefix = find_prefix([name for name, _ in all_names])
            found = {name.removeprefix(prefix): file for name, file in all_names if not name.endswith(".position_ids")}
            shapes = {name: tuple(file.get_slice(prefix + name).get_shape()) for name, file in found.items()}
            fit = [name for name in wanted if shapes.get(name) == wanted[name]]
            # Integers and float8 are values of a quantization, which are not the weights without their scales.
            stored = {name: str(found[name].get_slice(prefix + name).get_dtype()) for name in fit}
            whole = [name for name in fit if stored[name] in DTYPES]
            # Copied, because a tensor that is mapped from a file changes or disappears with the file.
            weights = {
                name: found[name].get_tensor(prefix + name).to(torch.float32, copy=True)
                for name in whole
                if texts or not name.startswith("text_model.")
            }
    except Exception as error:  # safetensors raises its own types for bad files, and Python's for bad names
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"model.source: {source}: {reason}") from error
    names = [name.removeprefix(prefix) for name, _ in all_names]
    problems = {
        "missing": wanted.keys() - found.keys(),
        "of another shape": (wanted.keys() & found.keys()) - set(fit),
        "in more than one file": {name for name in found if names.count(name) > 1} if len(paths) > 1 else set(),
        "quantized": set(fit) - set(whole),
        "not this model's": found.keys() - wanted.keys(),
        "not finite": [name for name, weight in weights.items() if not weight.isfinite().all()],
    }
    wrong = [f"{what}: {_show_names(sorted(names))}" for what, names in problems.items() if names]
    if wrong:
        raise CheckpointError(
            f"model.source: {source}: its weights are not those of its config.json ({'; '.join(wrong)})"
        )
    if not 0 < (scale := weights["logit_scale"].exp().item()) < math.inf:
        raise CheckpointError(
            f"model.source: {source}: the exponential of its weight logit_scale is {scale:g}, and scores need a number "
            "above 0 that is not infinite: use weights that were saved whole"
        )
    model.load_state_dict(weights, strict=False, assign=True)
    return model.requires_grad_(False).eval()


def find_prefix(names: Sequence[str]) -> str:
    """The prefix out of `PREFIXES`, or several of them, with which all names begin; else the empty text."""
    prefix = ""
    while found := next((one for one in PREFIXES if names and all(n.startswith(prefix + one) for n in names)), ""):
        prefix += found
    return prefix


def _show_names(names: Sequence[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(names[:2]) + more
