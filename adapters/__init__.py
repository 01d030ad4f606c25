"""Model families and how a pruner gets onto them."""

from foveate.adapters import (  # noqa: F401  (they register their families)
    hf_vit,
    llava,
    llava_next,
    llava_onevision,
    llava_original,
    open_clip,
    qwen_vl,
    timm_vit,
)
from foveate.adapters.base import FAMILIES, Adapter, adapter_for
from foveate.adapters.frame_scorer import FrameScorer, FrameScores
from foveate.adapters.session import Session, attach
from foveate.adapters.trace import ImageTrace, StageTrace, Trace
from foveate.adapters.video import Video, read_video
from foveate.adapters.vit import MergeTrace
from foveate.adapters.vit_session import VitSession

__all__ = [
    "FAMILIES",
    "Adapter",
    "FrameScorer",
    "FrameScores",
    "ImageTrace",
    "MergeTrace",
    "Session",
    "StageTrace",
    "Trace",
    "Video",
    "VitSession",
    "adapter_for",
    "attach",
    "read_video",
]
