"""Pipelines: TOML files of commands, from raw files to a contest's answer."""

from clipret_training.pipelines.pipeline import Pipeline, Step, StepRecord, run_pipeline

__all__ = ["Pipeline", "Step", "StepRecord", "run_pipeline"]
