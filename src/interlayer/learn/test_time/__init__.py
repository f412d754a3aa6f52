"""Learning while in use, and what it is measured against: the source model, BatchNorm's batch statistics, TENT."""

from interlayer.learn.test_time._baselines import BatchStatistics, Source, Tent

__all__ = ["BatchStatistics", "Source", "Tent"]
