"""Model families and how a pruner gets onto them."""

from foveate.adapters import llava, llava_next, llava_onevision, qwen_vl  # noqa: F401  (they register their families)
from foveate.adapters.base import FAMILIES, Adapter, adapter_for
from foveate.adapters.frame_scorer import FrameScorer, FrameScores
from foveate.adapters.session import Session, attach
from foveate.adapters.trace import ImageTrace, StageTrace, Trace
from foveate.adapters.video import Video, read_video

__all__ = [
    "FAMILIES",
    "Adapter",
    "FrameScorer",
    "FrameScores",
    "ImageTrace",
    "Session",
    "StageTrace",
    "Trace",
    "Video",
    "adapter_for",
    "attach",
    "read_video",
]
