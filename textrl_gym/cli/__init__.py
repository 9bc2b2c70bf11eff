"""The command line: `textrl-gym COMMAND ...`.

In reading order:
- `main`: the commands and how their errors end
- `options`: flags and TOML files as dataclasses
- `terminal`: tables and errors as commands print them
- `about`: agents, env-info and completion
- `train`: train
- `compare`: compare, report and watch
- `judge`: evaluate and judge
- `play`: play
- `collect`: collect
- `export`: export
- `feedback`: annotate and labels
- `pipeline`: sft, reward-model and preferences
"""
