"""The training loop, its engines and checkpoints, the launch under Ray Train, initial and final model folders."""
