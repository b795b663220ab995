"""A command as a process: one message for an expected failure, and several processes under `torchrun`."""
