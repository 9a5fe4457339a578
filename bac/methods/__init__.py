"""Caching methods, one file each: a feature profile in, a cache schedule out."""

from bac.methods.ab_cache import AdamsBashforth
from bac.methods.acs import IntervalScore, adaptive_update_steps
from bac.methods.asymrnr import AsymRnR
from bac.methods.bac import BlockAdaptive
from bac.methods.bac_weighted import SensitivityWeighted, Sharing
from bac.methods.base import LastStep, Method
from bac.methods.bubbling_union import Downstream, bubbling_union
from bac.methods.bwcache import BwCache
from bac.methods.cross_chunk import CrossChunk
from bac.methods.ertacache import ErtaCache
from bac.methods.foca import FoCa
from bac.methods.harmonica import HarmoniCa, Opening
from bac.methods.hyca import HyCa
from bac.methods.late import Late
from bac.methods.none import NoCache, full_schedule
from bac.methods.profilingdit import ProfilingDit
from bac.methods.search import Objective, Search
from bac.methods.skip_cache import SkipCache
from bac.methods.taylorseer import TaylorSeer
from bac.methods.teacache import TeaCache
from bac.methods.toca import ToCa
from bac.methods.uniform import Uniform

__all__ = [
    "AdamsBashforth",
    "AsymRnR",
    "BlockAdaptive",
    "BwCache",
    "CrossChunk",
    "Downstream",
    "ErtaCache",
    "FoCa",
    "HarmoniCa",
    "HyCa",
    "IntervalScore",
    "LastStep",
    "Late",
    "Method",
    "NoCache",
    "Objective",
    "Opening",
    "ProfilingDit",
    "Search",
    "SensitivityWeighted",
    "Sharing",
    "SkipCache",
    "TaylorSeer",
    "TeaCache",
    "ToCa",
    "Uniform",
    "adaptive_update_steps",
    "bubbling_union",
    "full_schedule",
]
