"""What a method may ask of a model."""

from __future__ import annotations

import pytest

from foveate.errors import MissingSignalError, ParameterError
from foveate.pruners import ModelInfo
from tests.pruners.synthetic import QWEN


def test_encoder_blocks() -> None:
    """Statement: None is the feature layer, negative numbers count from the end, other blocks are refused."""
    model = ModelInfo(encoder_layers=24, feature_layer=22)
    assert [model.block("layer", i) for i in (None, 0, 23, -1, -24)] == [22, 0, 23, 23, 0]
    for wrong in (24, -25):
        with pytest.raises(ParameterError, match=f"layer={wrong}"):
            model.block("layer", wrong)


def test_missing_class_token() -> None:
    """Statement: the error names what was asked, the tower and what to use."""
    with pytest.raises(MissingSignalError, match=r"this.*Qwen2_5_VisionTransformer.*qwen2_5_vl.*that"):
        QWEN.require_class_token("this", "that")
