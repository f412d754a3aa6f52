"""Learning one task after another, and the baselines: fine-tuning, EWC, linear probes, joint training."""

from interlayer.learn.continual._baselines import EWC, FineTune, Joint, LinearProbe

__all__ = ["EWC", "FineTune", "Joint", "LinearProbe"]
