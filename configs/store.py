"""Where Hydra finds the schemas that the YAML files extend."""

from __future__ import annotations

from hydra.core.config_store import ConfigStore

from configs import schema
from configs.budgets import LatencyBudgetConfig
from configs.controls import ControlConfig
from configs.methods import METHODS
from configs.studies import BenchConfig


def register() -> None:
    """Make the schemas known to Hydra under the names the YAML files extend."""
    store = ConfigStore.instance()
    scripts: dict[str, type] = {
        "eval": schema.EvalConfig,
        "export": schema.ExportConfig,
        "calibrate": schema.CalibrateConfig,
        "latency_budget": LatencyBudgetConfig,
        "train": schema.TrainConfig,
        "make_demos": schema.MakeDemosConfig,
        "import_checkpoint": schema.ImportConfig,
        "compare": schema.CompareConfig,
        "bench": BenchConfig,
        "report": schema.ReportConfig,
    }
    for name, node in scripts.items():
        store.store(name=f"{name}_schema", node=node)
    groups: dict[str, dict[str, type]] = {
        "task": {"task": schema.TaskConfig},
        "policy": {"policy": schema.PolicyConfig},
        "sampler": {"ddpm": schema.DdpmConfig, "ddim": schema.DdimConfig, "dpm_solver": schema.DpmSolverConfig},
        "executor": {"executor": schema.ExecutorConfig},
        "control": {"control": ControlConfig},
        "cache": METHODS,
    }
    for group, nodes in groups.items():
        for name, node in nodes.items():
            store.store(group=group, name=f"{name}_schema", node=node)
