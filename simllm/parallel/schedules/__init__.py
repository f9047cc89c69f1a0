"""Pipeline schedules: the order of work on every rank, its exact simulation, and the closed forms.

A schedule is a table of actions per pipeline rank (`schedule_actions`). `simulate` runs a table to the exact end of its
last action; `pipeline_time` and `in_flight_chunks` are the closed forms that a search over many plans uses.
"""

from simllm.parallel.schedules.actions import Action, Pair, Table, stage_of
from simllm.parallel.schedules.catalog import SCHEDULES, Schedule, check_schedule, schedule_actions, schedule_named
from simllm.parallel.schedules.closed_form import in_flight_chunks, pipeline_bubble, pipeline_time, zero_bubble_time
from simllm.parallel.schedules.searched import searched_zero_bubble
from simllm.parallel.schedules.simulate import StageTimes, Timeline, held_peak, simulate, simulated_time

__all__ = [
    "SCHEDULES",
    "Action",
    "Pair",
    "Schedule",
    "StageTimes",
    "Table",
    "Timeline",
    "check_schedule",
    "held_peak",
    "in_flight_chunks",
    "pipeline_bubble",
    "pipeline_time",
    "schedule_actions",
    "schedule_named",
    "searched_zero_bubble",
    "simulate",
    "simulated_time",
    "stage_of",
    "zero_bubble_time",
]
