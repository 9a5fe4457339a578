"""Fixed-latency control: actions with due times, a loop with deadlines, schedules by budget. Imports no torch."""

from bac.control.chunk_buffer import ActionChunk, ChunkBuffer, DueAction, Seam
from bac.control.clock import Clock, MonotonicClock, TickGrid, VirtualClock, ticks_for
from bac.control.degradation import Degradation
from bac.control.guards import ActionLimits
from bac.control.history import ObservationHistory
from bac.control.inference import Answer, Inference, Observation, Predict, Request, ThreadInference
from bac.control.latency_budget import LatencyBudget, LatencyVerdict
from bac.control.loop import ControlLoop, repeat
from bac.control.loop_types import Command, CommandKind, Fallback, LoopCounters, LoopReport, LoopSettings
from bac.control.process_inference import ProcessPredictor
from bac.control.schedule_bank import BankEntry, DeviceBank, DeviceProfile, Measured, ScheduleBank
from bac.control.simulation import SimulatedInference

__all__ = [
    "ActionChunk",
    "ActionLimits",
    "Answer",
    "BankEntry",
    "ChunkBuffer",
    "Clock",
    "Command",
    "CommandKind",
    "ControlLoop",
    "Degradation",
    "DeviceBank",
    "DeviceProfile",
    "DueAction",
    "Fallback",
    "Inference",
    "LatencyBudget",
    "LatencyVerdict",
    "LoopCounters",
    "LoopReport",
    "LoopSettings",
    "Measured",
    "MonotonicClock",
    "Observation",
    "ObservationHistory",
    "Predict",
    "ProcessPredictor",
    "Request",
    "ScheduleBank",
    "Seam",
    "SimulatedInference",
    "ThreadInference",
    "TickGrid",
    "VirtualClock",
    "repeat",
    "ticks_for",
]
