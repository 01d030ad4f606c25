"""Model families and how a pruner gets onto them."""

from foveate.adapters.families import (  # noqa: F401  (they register themselves)
    llava,
    llava_next,
    llava_onevision,
    llava_original,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_vl,
)
from foveate.adapters.families.base import FAMILIES, Adapter, adapter_for
from foveate.adapters.session import Session, VitSession, attach
from foveate.adapters.towers import open_clip, timm, transformers  # noqa: F401  (they register themselves)
from foveate.adapters.towers.base import MergeTrace
from foveate.adapters.trace import ImageTrace, StageTrace, Trace
from foveate.adapters.video.frame_scorer import FrameScorer, FrameScores
from foveate.adapters.video.reading import Video, read_video

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
