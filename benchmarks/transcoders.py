"""A training step of a transcoder as a multiple of sae-lens' training step at the same sizes.

sae-lens trains sparse autoencoders only (it loads transcoders), so its step is that of an autoencoder with as many features and as
wide an output. `make bench` installs it (`benchmarks/peers.txt`).
"""

from __future__ import annotations

import torch
from sae_lens import LoggingConfig, StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

from benchmarks.harness import compare, version
from interlayer.probe.transcoders import Coder, Trainer

SIZES = ((64, 512, 1024), (128, 1024, 1024), (256, 4096, 1024))  # width, features, batch


def step_of_sae_lens(width: int, features: int, x: torch.Tensor):
    """The step of their trainer, as its ``fit`` calls it."""
    config = StandardTrainingSAEConfig(d_in=width, d_sae=features, l1_coefficient=1e-3, l1_warm_up_steps=0)
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=10**9,
            train_batch_size_samples=len(x),
            lr=4e-4,
            lr_end=4e-5,
            lr_warm_up_steps=0,
            lr_decay_steps=0,
            lr_scheduler_name="constant",
            adam_beta1=0.9,
            adam_beta2=0.999,
            n_restart_cycles=1,
            dead_feature_window=10**6,
            feature_sampling_window=10**6,
            device="cpu",
            autocast=False,
            checkpoint_path=None,
            n_checkpoints=0,
            save_final_checkpoint=False,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=StandardTrainingSAE(config),
        data_provider=iter(()),
    )
    return trainer.sae, lambda: trainer._train_step(sae=trainer.sae, sae_in=x)


def agree(coder: Coder, sae: StandardTrainingSAE, x: torch.Tensor) -> bool:
    """Whether both layers give the same output for the same weights."""
    with torch.no_grad():
        coder.encoder.copy_(sae.W_enc.T)
        coder.decoder.copy_(sae.W_dec)
        coder.bias.copy_(sae.b_enc)
        coder.before.zero_()
        coder.after.copy_(sae.b_dec)
        return torch.allclose(coder(x), sae(x), rtol=1e-4, atol=1e-4)


def main() -> None:
    """Time both."""
    torch.set_num_threads(1)
    for width, features, batch in SIZES:
        torch.manual_seed(0)
        x, y = torch.randn(batch, width), torch.randn(batch, width)
        sae, theirs = step_of_sae_lens(width, features, x)
        coder = Coder(width, width, features)
        same = agree(coder, sae, x)
        coder.normalise()
        trainer = Trainer(coder, 1e-3)
        compare(
            f"training step, width {width}, {features} features, batch {batch} ({version('sae-lens')})",
            {"interlayer": lambda t=trainer, x=x, y=y: t.step(x, y), "sae-lens": theirs},
            agree=lambda same=same: same,
            inner=max(1, 2**29 // (width * features * batch)),
            goal={"sae-lens": 1.0},
        )


if __name__ == "__main__":
    main()
