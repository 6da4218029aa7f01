"""Pipelines: recipes of commands, from raw files to an answer."""

from clipret_training.pipelines.pipeline import Pipeline, Step, StepRecord, run_pipeline

__all__ = ["Pipeline", "Step", "StepRecord", "run_pipeline"]
