"""The choice of the device: a GPU that does not work is an error, and the model does not silently use the CPU."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from siglip.checkpoint import pin_model
from siglip.checkpoints.files import CheckpointError
from siglip.config import ModelConfig
from siglip.encoder import DeviceError, Encoder, choose_device


def test_an_assigned_gpu_that_does_not_work_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=r"num_gpus: 0.5: CUDA does not work here") as refused:
        Encoder(pin_model(ModelConfig(source="tiny", compile=False)), gpus=0.5)
    assert isinstance(refused.value, CheckpointError)
    assert "\n" not in str(refused.value)
    with pytest.raises(DeviceError, match=r"model.device: cuda: CUDA does not work here"):
        choose_device(ModelConfig(device="cuda"), 0)
    assert choose_device(ModelConfig(device="cpu"), 1).type == "cpu"
    assert choose_device(ModelConfig(), 0).type == "cpu"


def test_a_working_gpu_is_used_unless_the_cpu_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device(ModelConfig(), 1).type == "cuda"
    assert choose_device(ModelConfig(device="cpu"), 1).type == "cpu"


@pytest.mark.parametrize("size", [0, -1, "many"])
def test_an_invalid_batch_size_is_refused(size: object) -> None:
    with pytest.raises(ValidationError, match="batch_size"):
        ModelConfig.model_validate({"batch_size": size})
