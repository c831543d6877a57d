"""The way to a device."""

from __future__ import annotations

import pytest
import torch

from flowdistill.utils import devices


def test_a_compiled_function_sends_without_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's compiler cannot trace it; meta stands for a GPU here."""
    monkeypatch.setattr(devices, "WITHOUT_PINNED", ("cpu",))
    called = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: called.append(self) or self)
    assert devices.sent(torch.ones(2), "meta").device.type == "meta"
    assert len(called) == 1
    send = torch.compile(lambda x: 2 * devices.sent(x, "meta"), backend="eager", fullgraph=True)
    assert send(torch.ones(2)).device.type == "meta"
    assert len(called) == 1
