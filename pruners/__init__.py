"""The methods, one file per published method."""

from foveate.pruners.avgpool import AvgPool
from foveate.pruners.cdpruner import CDPruner
from foveate.pruners.core.clip_text import ClipText
from foveate.pruners.core.compose import Then
from foveate.pruners.core.control import RandomLike
from foveate.pruners.core.method import PRUNERS, ByView, ModelInfo, Pruner, Scorer, create, find, register
from foveate.pruners.core.stages import AtEntry, AtPixels, BeforeLayer, InCache, InMLP, InTower, Stage
from foveate.pruners.core.tokens import Layout, Selection, Tokens, View
from foveate.pruners.corematching import CoreMatching
from foveate.pruners.divprune import DivPrune
from foveate.pruners.downsample import Downsample
from foveate.pruners.fastv import FastV
from foveate.pruners.focusui import FocusUI
from foveate.pruners.fopru import FoPru
from foveate.pruners.globalcom2 import GlobalCom2
from foveate.pruners.grid import Grid
from foveate.pruners.hiprune import HiPrune
from foveate.pruners.pitome import PiToMe
from foveate.pruners.pospad import PosPad
from foveate.pruners.quota import QuoTA
from foveate.pruners.random import Random
from foveate.pruners.todre import ToDRE
from foveate.pruners.tome import ToMe
from foveate.pruners.transprune import TransPrune
from foveate.pruners.visionzip import VisionZip

__all__ = [
    "PRUNERS",
    "AtEntry",
    "AtPixels",
    "AvgPool",
    "BeforeLayer",
    "ByView",
    "CDPruner",
    "ClipText",
    "CoreMatching",
    "DivPrune",
    "Downsample",
    "FastV",
    "FoPru",
    "FocusUI",
    "GlobalCom2",
    "Grid",
    "HiPrune",
    "InCache",
    "InMLP",
    "InTower",
    "Layout",
    "ModelInfo",
    "PiToMe",
    "PosPad",
    "Pruner",
    "QuoTA",
    "Random",
    "RandomLike",
    "Scorer",
    "Selection",
    "Stage",
    "Then",
    "ToDRE",
    "ToMe",
    "Tokens",
    "TransPrune",
    "View",
    "VisionZip",
    "create",
    "find",
    "register",
]
