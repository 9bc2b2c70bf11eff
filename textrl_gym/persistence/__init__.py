"""Persistence: what lets every training run, supervised or RL, be stopped at any moment and go on.

- `signals`: Ctrl-C, SIGTERM and SIGHUP, heard between two updates
- `run_lock`: one process at a time trains in a folder
- `save_schedule`: when a checkpoint is due, by updates and by time
- `recovery`: going back to the last whole update
- `optimizer_state`: the optimizer's moments in a safetensors file, and those of a sharded optimizer
- `update_log`: the log of updates, and cutting it at a checkpoint
"""
